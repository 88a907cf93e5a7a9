"""What only the optimizer sees of a run: how large gradients are, how far weights move, which steps are spikes."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from keras import ops

from keras_adam import rule
from keras_adam.engines import Engine
from keras_adam.engines.base import Gradients, Tensor, Variable
from keras_adam.groups import ParamGroup
from keras_adam.sparse import values_of
from keras_adam.tensors import compute_dtype, value_of

EVERY = 32  # `monitor=True` measures one of so many updates
_SUMS = ("updates", "grad_norm", "grad_norm_max", "clipped")


@dataclass
class Reading:
    """What was measured since the reading before: sums over the updates that were measured, and counts of all calls."""

    calls: int = 0  # of `apply`
    skipped: int = 0
    updates: float = 0.0
    largest: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)

    def __add__(self, other: "Reading") -> "Reading":
        """Return what was measured in both."""
        return Reading(
            self.calls + other.calls,
            self.skipped + other.skipped,
            self.updates + other.updates,
            max(self.largest, other.largest),
            {name: self.sums.get(name, 0.0) + x for name, x in other.sums.items()},
        )

    def shown(self) -> dict[str, float]:
        """Return what users see; NaN where nothing was measured."""
        means = {name: _share(x, self.updates) for name, x in self.sums.items()}
        return {
            "grad_norm": means.pop("grad_norm"),
            "grad_norm_max": self.largest if self.updates else math.nan,
            "clipped": means.pop("clipped"),
            "skipped": _share(self.skipped, self.calls),
            **means,
        }


class Monitor:
    """Measures one of every so many updates, and adds it up in scalar state variables.

    Args:
        every: Number of updates, the first of which is measured.
        add: Function `(name, dtype) -> state variable` that makes a scalar.
    """

    def __init__(self, every: int, add: Callable[[str, str], Variable]):
        self.every = every
        self._add = add
        self._sums = {name: add(f"monitor_{name}", "float32") for name in _SUMS}
        # How many calls there were at the last reading.
        self._before = {name: add(f"monitor_{name}", "int") for name in ("calls", "skipped")}
        self._ratios: dict[ParamGroup, Variable] = {}

    def include(self, groups: list[ParamGroup]) -> None:
        """Add what is kept of each group that has variables."""
        for i, group in enumerate(groups):
            if group.variables and group not in self._ratios:
                self._ratios[group] = self._add(f"monitor_update_ratio_{i}", "float32")

    def described(self, groups: list[ParamGroup]) -> Iterator[tuple[str, Variable]]:
        """Give each state variable with its role in files."""
        for name, variable in (self._sums | self._before).items():
            yield f"monitor_{name}", variable
        for i, group in enumerate(groups):
            if group in self._ratios:
                yield f"monitor_update_ratio_{i}", self._ratios[group]

    def measure(
        self, engine: Engine, grads: Gradients, variables: list[Variable], learning_rate: Any
    ) -> None:
        """Measure, if it is due, the update of these variables that was just made from these gradients."""
        is_due = engine.is_first_update(self.every)
        if is_due is False:  # known on the host
            return
        summed = [self._sums[name] for name in ("updates", "grad_norm", "clipped")]
        summed += self._ratios.values()

        def look() -> tuple[Tensor, ...]:
            values = values_of(grads)
            norms = engine.norms(values)
            ratios = _ratios(engine, variables, learning_rate)
            seen = [1.0, rule.norm([norms]), _is_clipped(engine, norms, values)]
            seen += [ratios.get(group, 0.0) for group in self._ratios]
            return tuple(ops.cast(x, "float32") for x in seen)

        def nothing() -> tuple[Tensor, ...]:
            return tuple(ops.zeros((), "float32") for _ in summed)

        seen = engine.choose(is_due, look, nothing)
        for variable, x in zip(summed, seen, strict=True):
            engine.assign(variable, value_of(variable) + x)
        largest = self._sums["grad_norm_max"]
        engine.assign(largest, rule.maximum(value_of(largest), seen[1]))

    # Between steps

    def read(self, groups: list[ParamGroup], calls: int, skipped: int) -> Reading:
        """Return what was measured since the last reading, and begin anew.

        Args:
            groups: The optimizer's parameter groups.
            calls: How often `apply` was called so far.
            skipped: How many of these calls were skipped.
        """
        updates, norm, largest, clipped = (_number(x) for x in self._sums.values())
        kept = [(i, self._ratios[group]) for i, group in enumerate(groups) if group in self._ratios]
        names = ["update_ratio"] if len(kept) == 1 else [f"update_ratio/{i}" for i, _ in kept]
        ratios = [_number(variable) for _, variable in kept]
        # A count that was set back has none since.
        called = max(0, calls - int(_number(self._before["calls"])))
        were_skipped = max(0, skipped - int(_number(self._before["skipped"])))
        self.reset(calls, skipped)
        sums = {"grad_norm": norm, "clipped": clipped, **dict(zip(names, ratios, strict=True))}
        return Reading(called, were_skipped, updates, largest, sums)

    def reset(self, calls: int = 0, skipped: int = 0) -> None:
        """Begin anew, at so many calls of `apply`."""
        for variable in (*self._sums.values(), *self._ratios.values()):
            variable.assign(0.0)
        self._before["calls"].assign(calls)
        self._before["skipped"].assign(skipped)


def is_no_spike(
    engine: Engine, values: list[Tensor], window: Variable, deviations: float
) -> Tensor:
    """Whether the norm of all these values is no spike; it is taken into the window."""
    norm = ops.cast(rule.norm([engine.norms(values)]), "float32")
    before = value_of(window)
    is_taken = engine.has_no_spike(norm, before, deviations)
    engine.assign(window, rule.window_after(before, norm, is_taken))
    return is_taken


def _is_clipped(engine: Engine, norms: Tensor, values: list[Tensor]) -> Tensor:
    """Whether clipping changes a gradient."""
    name, limit = engine.config.clipping or ("", 0.0)
    if name == "clipnorm":
        return ops.any(norms > limit)
    if name == "global_clipnorm":
        return rule.norm([norms]) > limit
    if name == "clipvalue":
        return engine.is_any_above(values, limit)
    return ops.zeros(())


def _ratios(
    engine: Engine, variables: list[Variable], learning_rate: Any
) -> dict[ParamGroup, Tensor]:
    """Return the rms of each group's last step over the rms of its weights; 0 where that is 0."""
    scalars = engine.scalars(learning_rate)
    moved: dict[ParamGroup, list[Tensor]] = {}
    weights: dict[ParamGroup, list[Tensor]] = {}
    for bucket in engine.buckets(variables):
        group = bucket.group
        now = scalars(group, bucket.joined, compute_dtype(bucket.dtype), bucket.decays)
        p, *moments = engine.samples(bucket)
        step = rule.moved(p, rule.Moments(*moments), now, group.options)
        share = rule.weights_of_samples([math.prod(p.here.shape) for p in bucket.parameters])
        share = ops.convert_to_tensor(share, p.dtype)
        moved.setdefault(group, []).append(step * share)
        weights.setdefault(group, []).append(p * share)
    norms = [[rule.norm(x[g]) for g in moved] for x in (moved, weights)]
    together = [engine.norms([ops.reshape(x, (1,)) for x in of_kind]) for of_kind in norms]
    return {g: rule.ratio(*(x[i] for x in together)) for i, g in enumerate(moved)}


def _number(variable: Variable) -> float:
    return float(ops.convert_to_numpy(variable))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
