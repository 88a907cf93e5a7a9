"""The portable engine: all operations of a step, in `keras.ops`, one variable at a time.

`Engine` alone makes a step that is right on any backend. A backend's engine does some operations its own way, and each
fast path is tested against this one.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import keras
import numpy as np
from keras import ops

from keras_adam import rule
from keras_adam.groups import ParamGroup
from keras_adam.parameters import Joining, Parameter, Parameters, Plan
from keras_adam.paths import path_of
from keras_adam.sparse import Rows, map_values
from keras_adam.step_config import StepConfig
from keras_adam.storage import Spec, Storage
from keras_adam.tensors import compute_dtype, value_of, widened
from keras_adam.trace import Trace

Tensor = Any
Variable = Any
Gradients = list[Any]  # tensors, or `Rows`
# Function of a group, a joining, a dtype and whether weight decay applies, which returns the scalars of this step.
Scalars = Callable[[ParamGroup, Joining | None, str, bool], rule.Scalars]
StepFunction = Callable[[Gradients, list[Variable], StepConfig], None]

_MOST_LISTS = 16  # of variables for which buckets are remembered


class Hooks(Protocol):
    """What an engine uses of the optimizer: its counts, and hooks that a subclass may override."""

    name: str
    iterations: Any  # updates
    shard_state: bool
    gradient_accumulation_steps: int | None
    _iterations: Variable  # calls of `apply`
    _trainable_variables: list[Variable]
    _groups: list[ParamGroup]
    _learning_rate: Any
    skipped_steps: Variable
    variables: list[Variable]

    def assign(self, variable: Variable, value: Tensor) -> None: ...
    def assign_sub(self, variable: Variable, value: Tensor) -> None: ...
    def scale_loss(self, loss: Tensor) -> Tensor: ...
    def _use_weight_decay(self, variable: Variable) -> bool: ...
    def _overrides(self, *hooks: str) -> bool: ...

    _joined: Any  # TensorFlow's

    def _track_trackable(
        self, trackable: Any, name: str, overwrite: bool
    ) -> Any: ...  # TensorFlow's


@dataclass
class Bucket:
    """Variables that are updated alike: same group, joined together, same dtype and device."""

    group: ParamGroup
    joined: Joining | None
    dtype: str
    decays: bool
    positions: list[int]  # in the list of variables of the step
    parameters: list[Parameter]
    memory: Any = None  # what a backend wants to remember

    @property
    def variables(self) -> list[Variable]:
        return [p.variable for p in self.parameters]


class Engine:
    """The work of a step."""

    def __init__(self, optimizer: Hooks, parameters: Parameters, trace: Trace):
        self.optimizer = optimizer
        self.parameters = parameters
        self.trace = trace
        self.config_of_step: StepConfig | None = None  # None: outside of a step
        self.in_step: list[Variable] = []  # the variables of the present step
        self._buckets: dict[tuple[Any, ...], list[Bucket]] = {}

    @property
    def config(self) -> StepConfig:
        """The configuration of the present step, in which numbers may be tensors."""
        return self.config_of_step or StepConfig.of(self.optimizer)

    def forget(self) -> None:
        """Forget all that was remembered about lists of variables, as their records have changed."""
        self._buckets.clear()

    # How a step is run

    def run(
        self, step: StepFunction, grads: Gradients, variables: list[Variable], config: StepConfig
    ) -> None:
        """Run a step."""
        step(grads, variables, config)

    def is_compiling(self) -> bool:
        """Whether this call is being traced, so that what Python computes now is frozen into a compiled step."""
        return False

    def outside_graph(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context whose operations run once and now, even while a train step is being traced."""
        return contextlib.nullcontext()

    def when(self, condition: Tensor, act: Callable[[], None]) -> None:
        """Call `act`, which assigns to variables, if `condition` holds in this step."""
        if condition:
            act()

    def choose(self, condition: Tensor, one: Callable[[], Any], other: Callable[[], Any]) -> Any:
        """Return what `one` returns if `condition` holds in this step, else what `other` does: tuples of tensors."""
        return one() if condition else other()

    # Counting

    def count(self, is_done: Tensor) -> None:
        """Count this call of `apply` as a step, or as a skipped one; a count stays at its dtype's maximum."""
        counts = [(self.optimizer._iterations, is_done)]
        if is_done is not True:
            counts.append((self.optimizer.skipped_steps, ops.logical_not(is_done)))
        for variable, by in counts:
            value = value_of(variable)
            # An overflow gives a negative number, and the maximum keeps the old one.
            variable.assign(ops.maximum(value, value + ops.cast(by, value.dtype)))

    def updates(self) -> Tensor:
        """Return the number of updates so far; with accumulation, several calls of `apply` make one update."""
        return self.optimizer.iterations

    def is_last_call(self, every: int) -> Tensor:
        """Whether this call of `apply` is the last of `every` calls."""
        return self.optimizer._iterations % every == every - 1

    def is_last_update(self, every: int) -> Tensor:
        """Whether this update is the last of `every` updates."""
        return self.updates() % every == every - 1

    def is_first_update(self, every: int) -> Tensor:
        """Whether this update is the first of `every` updates."""
        return self.updates() % every == 0

    def has_started(self, joined: Joining | None) -> Tensor:
        """Whether variables of this joining had an update before."""
        return ops.not_equal(self.updates(), 0 if joined is None else joined.update)

    def begin_again(self) -> None:
        """Let variables count from the beginning if the count was set back to before they joined."""
        for joining in self.parameters.joinings:
            start = joining.update
            is_past = ops.less_equal(start, self.updates())
            self.optimizer.assign(start, value_of(start) * ops.cast(is_past, start.dtype))

    def dither(self) -> Tensor:
        """Return the dither of this update.

        It follows the updates, not the calls of `apply`: every 144th dither, say, is near its predecessor.
        """
        return rule.dither(self.updates())

    # Gradients

    def gather(self, grads: Gradients, variables: list[Variable], lazy: bool) -> Gradients:
        """Return the gradients, dense or as rows, each of its variable's shape."""
        if lazy:
            rows = [self.sparse_rows(g) for g in grads]
            grads = [r or self.densify(g) for g, r in zip(grads, rows, strict=True)]
            # Parts of a row are summed in float32: in bfloat16 a sum of ones stops at 256.
            grads = map_values(lambda values: [widened(x) for x in values], grads)
        else:
            grads = self.densify_all(grads)
        if [g.shape for g in grads] == [v.shape for v in variables]:
            return grads
        return [self.of_its_shape(g, v) for g, v in zip(grads, variables, strict=True)]

    def densify_all(self, grads: Gradients) -> list[Tensor]:
        """Return sparse gradients as dense ones."""
        return [self.densify(g) for g in grads]

    def densify(self, gradient: Any) -> Tensor:
        """Return a sparse gradient as a dense one, the values of a repeated index summed."""
        return ops.convert_to_tensor(gradient, sparse=False)

    def sparse_rows(self, gradient: Any) -> Rows | None:
        """Return the rows of a gradient of the backend's own sparse kind, or None if it is of another."""
        return None

    def of_its_shape(self, gradient: Any, variable: Variable) -> Any:
        """Return the gradient, or raise a ValueError if its shape is not its variable's."""
        if gradient.shape != variable.shape:
            raise ValueError(
                f"Each gradient must have its variable's shape, which for '{path_of(variable)}' is "
                f"{tuple(variable.shape)}. Received: a gradient of shape {tuple(gradient.shape)}"
            )
        return gradient

    def reduce(self, grads: Gradients) -> Gradients:
        """Return the gradients summed over the replicas."""
        return grads

    def unscale(self, values: list[Tensor]) -> list[Tensor]:
        """Return gradients divided by the loss scale."""
        return [widened(x) / self.config.loss_scale_factor for x in values]

    def are_finite(self, values: list[Tensor]) -> Tensor:
        """Whether no value is infinite or NaN."""
        return ops.all(ops.stack([ops.all(ops.isfinite(x)) for x in values]))

    def norms(self, values: list[Tensor]) -> Tensor:
        """Return the norm of each gradient, as one vector."""
        return ops.stack([rule.norm([widened(x)]) for x in values])

    def is_any_above(self, values: list[Tensor], limit: Tensor) -> Tensor:
        """Whether an element of a gradient is larger than `limit`."""
        return ops.any(ops.stack([ops.any(ops.absolute(x) > limit) for x in values]))

    def has_no_spike(self, norm: Tensor, window: Tensor, deviations: float) -> Tensor:
        """Return what `rule.is_no_spike` does."""
        return rule.is_no_spike(norm, window, deviations)

    def clip(self, values: list[Tensor]) -> list[Tensor]:
        """Return gradients clipped as `config` says. Norms are float32: the square of 256 is infinite in float16."""
        values = [widened(x) for x in values]
        name, limit = self.config.clipping or ("", 0.0)
        if name == "clipnorm":
            return [rule.clipped_to_norm(x, rule.norm([x]), limit) for x in values]
        if name == "global_clipnorm":
            norm = rule.norm(values)
            return [rule.clipped_to_norm(x, norm, limit) for x in values]
        return [rule.clipped(x, limit) for x in values]

    # Accumulation

    def accumulate(self, accumulators: list[Variable], grads: list[Tensor]) -> None:
        """Add gradients to their accumulators."""
        for accumulator, gradient in zip(accumulators, grads, strict=True):
            total = value_of(accumulator) + ops.cast(gradient, accumulator.dtype)
            self.optimizer.assign(accumulator, total)

    def is_left(self, mean: Tensor) -> Tensor:
        """Whether earlier calls left an accumulator something."""
        return ops.any(ops.not_equal(mean, 0))

    def means(self, accumulators: list[Variable], steps: int) -> list[Tensor]:
        """Return the mean gradients of a number of steps."""
        return [value_of(a) / steps for a in accumulators]

    def reset(self, accumulators: list[Variable]) -> None:
        """Set the accumulators to zero: not by a multiplication, which a NaN survives."""
        for accumulator in accumulators:
            self.optimizer.assign(accumulator, ops.zeros(accumulator.shape, accumulator.dtype))

    # The update

    def apart(self, grads: Gradients, variables: list[Variable]) -> Gradients:
        """Return the gradients, none in memory that the update of these variables writes to."""
        return grads

    def update(self, grads: Gradients, variables: list[Variable], learning_rate: Any) -> None:
        """Update the variables and their moments."""
        self.update_each(grads, variables, learning_rate)

    def update_each(self, grads: Gradients, variables: list[Variable], learning_rate: Any) -> None:
        """Update the variables one by one."""
        scalars = self.scalars(learning_rate)
        for gradient, variable in zip(grads, variables, strict=True):
            self.update_one(gradient, variable, scalars)

    def update_one(self, gradient: Any, variable: Variable, scalars: Scalars) -> None:
        """Update one variable and its moments: read, `rule.adam_step`, write."""
        parameter = self.parameters[variable]
        group, dtype = parameter.group, compute_dtype(variable.dtype)
        take: Callable[[Variable], Tensor] = value_of
        put = self.optimizer.assign
        if isinstance(gradient, Rows):
            take = functools.partial(self.take_rows, gradient.indices)
            put = functools.partial(self.put_rows, gradient.indices)
            gradient = gradient.rows()
        elif self.optimizer._overrides(
            "assign_sub"
        ):  # through which Keras's Adam changes a variable
            put = functools.partial(self._assign_difference, variable)
        slots = parameter.updated
        kept = self.updated(
            gradient,
            [[take(array) for array in slot.arrays] for slot in slots],
            scalars(group, parameter.joined, dtype, self.optimizer._use_weight_decay(variable)),
            self.dither() if any(slot.storage.dithers for slot in slots) else None,
            storages=tuple(slot.storage for slot in slots),
            options=group.options,
            dtype=dtype,
        )
        for slot, values in zip(slots, kept, strict=True):
            for array, value in zip(slot.arrays, values, strict=True):
                put(array, value)

    def updated(self, *args: Any, **options: Any) -> list[list[Tensor]]:
        """Return what the function `updated` does."""
        return updated(*args, **options)

    def scalars(self, learning_rate: Any, for_kernel: bool = False) -> Scalars:
        """Return the function that gives the scalars of this step, each computed once.

        `for_kernel`: the update is done by a kernel that takes the betas in the dtype of the update.
        """
        updates, compiling = self.updates(), self.is_compiling()

        @remembering
        def of_group(group: ParamGroup, joined: Joining | None, dtype: str) -> rule.Scalars:
            # Subtract as integers: float32 is inexact above 2^24. Add 1 after the cast, so that int32's maximum cannot
            # overflow.
            count = updates if joined is None else updates - joined.update
            t = ops.cast(count, dtype) + 1
            now = learning_rate, self.optimizer._iterations, t, dtype, compiling, for_kernel
            return group.scalars(self.step_scalars, *now)

        def scalars(
            group: ParamGroup, joined: Joining | None, dtype: str, decays: bool
        ) -> rule.Scalars:
            found = of_group(group, joined, dtype)
            return found if decays else found._replace(decay=None)

        return scalars

    def step_scalars(self, options: rule.Options, **numbers: Any) -> rule.Scalars:
        """Return what `rule.step_scalars` does."""
        return rule.step_scalars(options, **numbers)

    def read_parameter(self, variable: Variable) -> Tensor:
        """Return a variable's value in the dtype of the update, with what rounding took from it."""
        return self.parameters[variable].value.read(value_of, compute_dtype(variable.dtype))

    def write_parameter(self, variable: Variable, value: Tensor) -> None:
        """Assign a value of the dtype of the update, and keep what rounding takes from it."""
        slot = self.parameters[variable].value
        slot.write(self.optimizer.assign, value, self.dither() if slot.storage.dithers else None)

    def constrain(self, variables: list[Variable]) -> None:
        """Apply the constraints that the variables have."""
        for variable in variables:
            if variable.constraint is not None:
                whole = self.read_parameter(variable)
                self.write_parameter(variable, variable.constraint(whole))

    def samples(self, bucket: Bucket) -> list[Tensor]:
        """Return elements of the variables, and of their moments, as `rule.sample` chooses them, each in one vector."""
        dtype = compute_dtype(bucket.dtype)
        kept: list[list[Tensor]] = []
        for parameter in bucket.parameters:
            size = math.prod(parameter.here.shape)
            flat = [ops.reshape(slot.read(value_of, dtype), (-1,)) for slot in parameter.updated]
            kept.append([rule.sample(x, size) for x in flat])
        return [ops.concatenate(of_kind) for of_kind in zip(*kept, strict=True)]

    def take_rows(self, indices: Tensor, variable: Variable) -> Tensor:
        """Return some rows of a variable."""
        return ops.take(value_of(variable), indices, axis=0)

    def put_rows(self, indices: Tensor, variable: Variable, rows: Tensor) -> None:
        """Assign to some rows of a variable; rows of a repeated index are equal."""
        value = value_of(variable)
        rows = ops.cast(rows, value.dtype)
        self.optimizer.assign(variable, ops.scatter_update(value, indices[:, None], rows))

    def buckets(self, variables: list[Variable]) -> list[Bucket]:
        """Group variables that one kernel can update together; computed once for the same list of variables."""
        key: tuple[Any, ...] = tuple(map(id, variables))
        if self.optimizer._overrides(
            "_use_weight_decay"
        ):  # its result may change from step to step
            key += tuple(map(self.optimizer._use_weight_decay, variables))
        if key not in self._buckets:
            members: dict[tuple[Any, ...], list[int]] = {}
            for position, variable in enumerate(variables):
                parameter = self.parameters[variable]
                kind = (
                    parameter.group,
                    parameter.joined,
                    keras.backend.standardize_dtype(variable.dtype),
                    self.optimizer._use_weight_decay(variable),
                    tuple(slot.storage for slot in parameter.updated),
                    self.device_of(variable),
                )
                members.setdefault(kind, []).append(position)
            if len(self._buckets) == _MOST_LISTS:
                self._buckets.clear()
            self._buckets[key] = [
                self.bucket(kind, positions, [self.parameters[variables[i]] for i in positions])
                for kind, positions in members.items()
            ]
        return self._buckets[key]

    def bucket(
        self, kind: tuple[Any, ...], positions: list[int], parameters: list[Parameter]
    ) -> Bucket:
        """Make a bucket of variables of one kind."""
        group, joined, dtype, decays, *_ = kind
        return Bucket(group, joined, dtype, decays, positions, parameters)

    def device_of(self, variable: Variable) -> Any:
        """Return a key that is equal for variables that one kernel can update together."""
        return None

    # Averages

    def move_averages(self, variables: list[Variable]) -> None:
        """Take the variables into their averages; the first update sets the average."""
        for variable, average, started in self.averages_of(variables):
            value = ops.cast(self.read_parameter(variable), average.dtype)
            after = rule.moving_average(value_of(average), value, self.config.ema_momentum, started)
            self.optimizer.assign(average, after)

    def overwrite_with_averages(self, variables: list[Variable]) -> None:
        """Assign the variables their averages."""
        for variable, average, started in self.averages_of(variables):
            # Before the first update there is no average. Never the average itself: on JAX the two would share one
            # buffer, which the next train step may not donate twice.
            value = rule.where(started, value_of(average), self.read_parameter(variable))
            self.write_parameter(variable, value)

    def averages_of(self, variables: list[Variable]) -> Iterator[tuple[Variable, Variable, Tensor]]:
        """Yield variables with their averages, and whether there was an update before this one.

        A variable that is overwritten with its gradient has no average.
        """
        started = remembering(self.has_started)
        for variable in variables:
            parameter = self.parameters[variable]
            if parameter.average is not None:
                yield variable, parameter.array("average"), started(parameter.joined)

    # State on devices

    def assign(self, variable: Variable, value: Tensor) -> None:
        """Assign a value to a variable, as the optimizer's `assign` does."""
        variable.assign(value)

    def to_build(self) -> "Engine":
        """Return the engine for an optimizer that is being built now, on the devices that there are."""
        return self

    def parts_of(self, plans: list[Plan]) -> list[Any]:
        """Return what this process updates of new variables: they themselves, or a `Part` of each."""
        return [variable for variable, _, _ in plans]

    def slot(self, array: Variable, part: Any, spec: Spec) -> Variable:
        """Return a new state variable as one of a variable, or of a part of it."""
        return array

    def slot_layout(self, layout: Any, shape: tuple[int, ...], spec: Spec) -> Any:
        """Return how an array that is kept of a variable of `layout` and `shape` is spread over devices."""
        return layout

    def whole(self, variable: Variable) -> np.ndarray:
        """Return the whole value of a state variable as an array of NumPy; this process may hold only a part."""
        return ops.convert_to_numpy(variable)

    def process(self) -> int:
        """Return the number of this process among those that train together."""
        return 0

    def wait_for_all(self) -> None:
        """Wait until all processes that train together are here."""

    def built(self) -> None:
        """Take note that the optimizer was built."""

    def track(self, variable: Variable, name: str) -> None:
        """Let a checkpoint of the backend find a state variable by name; None is no variable."""

    def was_emptied(self) -> bool:
        """Whether a failed trainer has left the variables without values."""
        return False

    def check_trained(self, variables: list[Variable], unknown: Callable[[Variable], str]) -> None:
        """Raise if the steps just made may have used other state than that of a model's variables, in its order.

        `unknown` gives the error for a variable that is not known.
        """

    # Differentiation

    def differentiate(
        self, loss_fn: Callable[[], Tensor], variables: list[Variable]
    ) -> tuple[Tensor, list[Any]]:
        """Return the loss, and the gradients of the scaled loss."""
        raise NotImplementedError

    def stored_gradients(self) -> list[Any]:
        """Return the gradients that the backend keeps on the variables."""
        raise ValueError(
            "`step` needs a closure: only PyTorch keeps gradients on the variables. "
            f"Received: closure=None on the backend '{keras.backend.backend()}'"
        )

    def clear_gradients(self, set_to_none: bool) -> None:
        """Clear the gradients that the backend keeps on the variables, if it does."""

    def _assign_difference(self, variable: Variable, array: Variable, value: Tensor) -> None:
        if array is variable:
            self.optimizer.assign_sub(variable, value_of(variable) - value)
        else:
            self.optimizer.assign(array, value)


def updated(
    gradient: Tensor,
    kept: list[list[Tensor]],
    scalars: rule.Scalars,
    dither: Tensor | None,
    *,
    storages: tuple[Storage, ...],
    options: rule.Options,
    dtype: str,
) -> list[list[Tensor]]:
    """Return the new arrays of one variable after a step: read, `rule.adam_step`, write.

    Nothing is assigned, so that a backend may compile this once for all variables that are alike.

    Args:
        gradient: The gradient.
        kept: The present arrays of each storage.
        scalars: The scalars of the step.
        dither: The dither of the step; None if no storage needs one.
        storages: How the variable and its moments are kept, in the order of `rule.Moments`.
        options: The group's options.
        dtype: Dtype in which the update is computed.
    """
    now = [storage.read(arrays, dtype) for storage, arrays in zip(storages, kept, strict=True)]
    p, moments = rule.adam_step(
        ops.cast(gradient, dtype), now[0], rule.Moments(*now[1:]), scalars, options
    )
    values = [p, *(x for x in moments if x is not None)]
    return [storage.write(x, dither) for storage, x in zip(storages, values, strict=True)]


def remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a cache of its results. PyTorch's compiler warns at `functools.cache`."""
    results: dict[tuple[Any, ...], Any] = {}

    def remembered(*arguments: Any) -> Any:
        if arguments not in results:
            results[arguments] = function(*arguments)
        return results[arguments]

    return remembered
