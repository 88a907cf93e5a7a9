"""Parameter groups: which hyperparameters hold for which variables."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_adam import hyperparameters, rule, selection
from keras_adam.paths import path_of
from keras_adam.storage import STATE_DTYPES

# Settable while training, in the order of `ParamGroup.stored`. A `learning_rate` of None follows the optimizer's.
NUMERIC = (
    "learning_rate",
    "learning_rate_multiplier",
    "beta_1",
    "beta_2",
    "epsilon",
    "weight_decay",
)
_MAY_BE_NONE = ("learning_rate", "weight_decay")
# Stored as `1 - beta`: with beta = 0.999 in float32, `1 - beta` would be off by 1.3e-5 of itself.
_STORED_AS_COMPLEMENT = ("beta_1", "beta_2")
_NOT_SET = -1.0  # stored for a learning rate that follows the optimizer's
_ASKED = -2.0  # stored for a schedule or a callable, which is called in each step
INHERITED = "inherited"  # a group's `state_dtype` that is the optimizer's
PYTORCH_NAMES = {"lr": "learning_rate", "eps": "epsilon"}
# PyTorch's choices of an implementation, with its defaults: how a step is computed, not what it computes.
IMPLEMENTATION = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}


class ParamGroup:
    """The hyperparameters that some variables share.

    Args:
        numeric: Dictionary from the names in `NUMERIC` to numbers, schedules and callables. Both learning rates may
            be left out.
        options: The choices that change the formula, and so are constant.
        selector: What selects its variables. Defaults to `None`: all that no other group selects.
        default: The default group. Defaults to `None`: this group itself.
    """

    def __init__(
        self,
        numeric: dict[str, Any],
        options: rule.Options,
        selector: Any = None,
        default: "ParamGroup | None" = None,
    ):
        self.options = options
        self.selector = selector
        self.default = self if default is None else default
        self.variables: list[Any] = []
        self.selected: dict[str, Any] | None = None  # what it selected before it was saved
        self.stored: Any = None  # the state variable that holds the numbers, if there is one
        self.state_dtype: str | None = INHERITED
        self.changes = 0  # how often a number was set
        self.is_constant = False  # whether the last compiled step holds the numbers as constants
        self._implementation: dict[str, Any] = {}  # PyTorch's choices, without effect here
        self._given: dict[str, Any] = {
            "learning_rate": None,
            "learning_rate_multiplier": 1.0,
            **{name: check_numeric(name, value) for name, value in numeric.items()},
        }

    @property
    def is_default(self) -> bool:
        return self.default is self

    # Numbers

    def given(self, name: str) -> Any:
        """Return a number as it was last given, whatever is stored."""
        return self._given[name]

    def own(self, name: str) -> Any:
        """Return the group's own number: as it was given, unless another one was stored since."""
        given = self._given[name]
        numbers = self._read()
        if numbers is None or hyperparameters.is_dynamic(given):
            return given
        number = numbers[NUMERIC.index(name)]
        if number == _ASKED:
            return given
        if number == np.asarray(_encode(name, given), number.dtype):
            return given
        if number == _NOT_SET:
            return None
        number = hyperparameters.exact(number)
        # Round to the decimal that was meant: 1 - 0.001 is 0.999, not 0.9990000000000000213.
        return round(1 - number, 12) if name in _STORED_AS_COMPLEMENT else number

    def readable(self, name: str) -> Any:
        """Return an option or the group's own number; if that cannot be read now, as it was given."""
        if name in rule.Options._fields:
            return getattr(self.options, name)
        return hyperparameters.readable(lambda: self.own(name), self._given[name])

    def set_number(self, name: str, value: Any) -> None:
        """Set a number that was checked."""
        values = {name: value}
        if name == "learning_rate" and value is not None:
            values["learning_rate_multiplier"] = 1.0  # it has no effect any more
        numbers = self.current_numbers() if self.stored is not None else None
        for changed, number in values.items():
            self._given[changed] = number
            if numbers is not None:
                numbers[NUMERIC.index(changed)] = _encode(changed, number)
        self.changes += 1
        if numbers is not None:
            self.stored.assign(numbers)

    # Stored numbers

    def current_numbers(self) -> np.ndarray:
        """Return the numbers in the order in which they are stored."""
        return np.array([_encode(name, self.own(name)) for name in NUMERIC])

    def initial_numbers(self, shape, dtype):
        """Initialize the variable that will hold the numbers, where a compiled step reads them."""
        return ops.convert_to_tensor(self.current_numbers(), dtype)

    def store_numbers(self, numbers: np.ndarray) -> None:
        """Store numbers that `current_numbers` returned, if the group stores any."""
        if self.stored is not None:
            self.stored.assign(numbers)

    def renew_numbers(self) -> None:
        """Store the group's own numbers if a loaded one only stands for a schedule or a callable."""
        if self.stored is not None and _ASKED in ops.convert_to_numpy(self.stored):
            self.stored.assign(self.current_numbers())

    def _read(self) -> np.ndarray | None:
        # While `fit` runs on JAX, Keras holds the state elsewhere, and its variables are empty.
        if self.stored is None or getattr(self.stored, "_value", None) is None:
            return None
        return ops.convert_to_numpy(self.stored)

    # A step

    def scalars(
        self,
        compute: Callable[..., rule.Scalars],
        learning_rate,
        iterations,
        t,
        dtype: str,
        compiling: bool,
        for_kernel: bool = False,
    ) -> rule.Scalars:
        """Return the scalars of step `t`.

        Args:
            compute: `rule.step_scalars`, or a backend's own version.
            learning_rate: The optimizer's current learning rate.
            iterations: The count that schedules take.
            t: Scalar tensor.
            dtype: Dtype of the scalars.
            compiling: Whether what is read here is frozen into a compiled step.
            for_kernel: Whether the update is done by a kernel that takes the betas in `dtype`. Defaults to `False`.
        """
        numbers = self._numbers_in_step(iterations, dtype, compiling)
        if self.stored is None:
            rate, factor = numbers["learning_rate"], numbers["learning_rate_multiplier"]
            if rate is None:
                rate = learning_rate if factor == 1 else ops.cast(learning_rate, dtype) * factor
        elif hyperparameters.is_dynamic(self._given["learning_rate"]):
            rate = numbers["learning_rate"]
        else:
            following = ops.cast(learning_rate, dtype) * numbers["learning_rate_multiplier"]
            rate = ops.where(numbers["learning_rate"] < 0, following, numbers["learning_rate"])
        rates = [numbers["beta_1"], numbers["beta_2"]]
        if for_kernel:
            rates = [rule.representable(rate_, dtype) for rate_ in rates]
        return compute(
            self.options,
            learning_rate=rate,
            rate_1=rates[0],
            rate_2=rates[1],
            epsilon=numbers["epsilon"],
            weight_decay=numbers["weight_decay"],
            t=t,
            dtype=dtype,
        )

    def _numbers_in_step(self, iterations, dtype: str, compiling: bool) -> dict[str, Any]:
        """Return each number's value in this step, the betas as their complements."""
        if compiling:
            self.is_constant = self.stored is None
        numbers = {}
        for i, (name, given) in enumerate(self._given.items()):
            if self.stored is not None and not hyperparameters.is_dynamic(given):
                numbers[name] = ops.cast(self.stored[i], dtype)
                continue
            value = hyperparameters.resolve(name, given, iterations, compiling)
            numbers[name] = rule.complement(value) if name in _STORED_AS_COMPLEMENT else value
        return numbers

    # PyTorch's choices of an implementation

    def implementation(self) -> dict[str, Any]:
        """Return PyTorch's choices: the group's own, the default group's, PyTorch's defaults."""
        return {**IMPLEMENTATION, **self.default._implementation, **self._implementation}

    def set_implementation(self, choices: Mapping[str, Any]) -> None:
        """Set some of the choices, checked together with the others."""
        check_implementation({**self.implementation(), **choices})
        self._implementation |= check_implementation(choices)

    def unusual_implementation(self) -> dict[str, Any]:
        """Return the choices that differ from the default group's; for that group, from PyTorch's defaults."""
        usual = IMPLEMENTATION if self.is_default else self.default.implementation()
        return {name: x for name, x in self.implementation().items() if x != usual[name]}

    # Configuration

    def get_config(self, known) -> dict[str, Any]:
        """Return a dictionary for `param_groups` that makes an equal group.

        `known` are the variables that the optimizer was built for.
        """
        config: dict[str, Any] = {"params": self._selector_config()}
        if self.variables:
            paths = [path_of(v) for v in self.variables]
            for variable in known:
                if path_of(variable) in paths and not any(variable is v for v in self.variables):
                    raise ValueError(
                        "A parameter group is saved by the paths of its variables, which no other variable may have. "
                        f"Received: '{path_of(variable)}' in the group and outside it"
                    )
            config["selected"] = {"paths": paths, "among": [path_of(v) for v in known]}
        elif self.selected:
            config["selected"] = self.selected
        for name in NUMERIC:
            value = self.own(name)
            if name == "learning_rate_multiplier" and self.own("learning_rate") is not None:
                continue
            if value != self.default.own(name):
                dynamic = hyperparameters.is_dynamic(value)
                config[name] = keras.saving.serialize_keras_object(value) if dynamic else value
        for name, value in self.options._asdict().items():
            if value != getattr(self.default.options, name):
                config[name] = value
        if self.state_dtype != INHERITED:
            config["state_dtype"] = self.state_dtype
        return config | self.unusual_implementation()

    def _selector_config(self):
        parts = selection.flatten(self.selector)
        if all(isinstance(part, str) for part in parts):
            return self.selector if isinstance(self.selector, str) else parts
        if not self.variables:
            raise ValueError(
                "A parameter group selected by a variable, layer or predicate is saved as the paths that it selected, "
                f"which are known once the optimizer is built. Received: params={self.selector!r}"
            )
        return [re.escape(path_of(v)) for v in self.variables]


def parse(label: str, spec: Mapping[str, Any], default: ParamGroup) -> ParamGroup:
    """Make a group of a user's dictionary; errors name it `label`, and missing values are those of `default`."""
    if not isinstance(spec, Mapping) or "params" not in spec:
        raise ValueError(
            f"`{label}` must be a dictionary with the key 'params'. Received: {spec!r}"
        )
    spec = dict(spec)
    selected = spec.pop("selected", None)  # from `get_config`
    given = {PYTORCH_NAMES.get(name, name): value for name, value in spec.items()}
    betas_twice = "betas" in given and not {"beta_1", "beta_2"}.isdisjoint(given)
    if len(given) != len(spec) or betas_twice:
        raise ValueError(f"`{label}` gives an option under two names. Received: {spec!r}")
    if "betas" in given:
        given |= check_betas(given.pop("betas"), label)
    implementation = {name: given.pop(name) for name in IMPLEMENTATION if name in given}
    known = ("params", *NUMERIC, *rule.Options._fields, "state_dtype")
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ValueError(
                f"`{label}` has an unknown option '{name}'.{hint} Known are: {', '.join(known)}. "
                f"Received: {name}={given[name]!r}"
            )
    if given.get("learning_rate") is not None and "learning_rate_multiplier" in given:
        raise ValueError(
            f"`{label}` must have `learning_rate` or `learning_rate_multiplier`, not both. "
            f"Received: {spec!r}"
        )
    inherited = {name: default.own(name) for name in NUMERIC[2:]}
    try:
        numeric = {**inherited, **{k: v for k, v in given.items() if k in NUMERIC}}
        choices = {k: v for k, v in given.items() if k in rule.Options._fields}
        options = check_options(default.options, choices)
        group = ParamGroup(numeric, options, selection.check(given["params"]), default)
        group.set_implementation(implementation)
        if "state_dtype" in given:
            dtype = given["state_dtype"]
            group.state_dtype = hyperparameters.check_choice("state_dtype", dtype, STATE_DTYPES)
    except (TypeError, ValueError) as error:
        raise type(error)(f"In `{label}`: {error}") from None
    group.selected = selected
    return group


def assign(groups: list[ParamGroup], default: ParamGroup, variables) -> list[ParamGroup]:
    """Return each variable's group: the first that selects it, else the default one.

    Raises:
        ValueError: If a group of `groups` gets no variable, or two groups name the same variable.
    """
    places = selection.assign([g.selector for g in groups], [g.selected for g in groups], variables)
    return [default if place is None else groups[place] for place in places]


def group_for(variable, groups: list[ParamGroup], default: ParamGroup) -> ParamGroup:
    """Return the first group that selects the variable, else the default one."""
    place = selection.first_that_selects([g.selector for g in groups], variable)
    return default if place is None else groups[place]


def check_numeric(name: str, value: Any) -> Any:
    """Return a number as a float, a schedule or callable as it is, None where it may be; raise for anything else."""
    if value is None and name in _MAY_BE_NONE:
        return None
    return hyperparameters.check(name, value)


def check_options(default: rule.Options, choices: dict[str, Any]) -> rule.Options:
    """Return `default` with the checked choices in place."""
    both = (True, False)
    allowed = {"amsgrad": (*both, "corrected")}
    return default._replace(
        **{
            name: hyperparameters.check_choice(name, value, allowed.get(name, both))
            for name, value in choices.items()
        }
    )


def check_implementation(choices: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `choices` that are PyTorch's choices of an implementation, checked."""
    checked = {}
    for name, default in IMPLEMENTATION.items():
        if name in choices:
            allowed = (True, False) if default is False else (True, False, None)
            checked[name] = hyperparameters.check_choice(name, choices[name], allowed)
    if checked.get("differentiable"):
        raise ValueError(
            "`differentiable` must be False: a step writes to the variables, and nothing can be differentiated through "
            "it; on JAX, `stateless_apply` can be. Received: differentiable=True"
        )
    if checked.get("foreach") and checked.get("fused"):
        raise ValueError(
            "`foreach` and `fused` must not both be True, as in PyTorch: leave one out; neither has an effect here. "
            "Received: foreach=True, fused=True"
        )
    return checked


def check_betas(betas: Any, label: str | None = None) -> dict[str, Any]:
    """Return PyTorch's pair of `betas` under our names."""
    if not isinstance(betas, Iterable) or len(pair := tuple(betas)) != 2:
        where = "" if label is None else f" of `{label}`"
        raise ValueError(f"`betas`{where} must be a pair of numbers. Received: betas={betas!r}")
    return dict(zip(("beta_1", "beta_2"), pair, strict=True))


def _encode(name: str, value: Any) -> float:
    if hyperparameters.is_dynamic(value):
        return _ASKED
    if value is None:
        return 0.0 if name == "weight_decay" else _NOT_SET
    return rule.complement(value) if name in _STORED_AS_COMPLEMENT else value
