"""Parameter groups: which hyperparameters hold for which variables."""

import copy
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_adam import hyperparameters, rule
from keras_adam.paths import align, path_of, same

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
# Stored as `1 - beta`: float32 has no 0.999, and what it has instead is 5e-5 off in the number that counts, 0.001.
_STORED_AS_COMPLEMENT = ("beta_1", "beta_2")
_NOT_SET = -1.0  # stored for a learning rate that follows the optimizer's
_ASKED = -2.0  # stored for a schedule or a callable, which is asked in each step
_SHOWN = 3  # so many parts of a selector are printed
_PYTORCH_NAMES = {"lr": "learning_rate", "eps": "epsilon"}
# What PyTorch's groups hold besides, at its own defaults: how a step is computed, not what it computes.
_IMPLEMENTATION = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}


class ParamGroup(Mapping):
    """The hyperparameters that some variables share; a mapping in which the numeric ones can be set.

    A value set on it holds from the next step on, in a compiled train function too, without a retrace. PyTorch's names
    `lr`, `betas` and `eps` serve besides Keras's.
    """

    def __init__(self, optimizer, numeric: dict[str, Any], options: rule.Options, selector=None):
        self.options = options
        self.selector = selector
        self.variables: list[Any] = []
        self.selected: dict[str, Any] | None = None  # what it selected before it was saved
        self.stored: Any = None  # the optimizer's variable that holds the numbers, if it has one
        self.changes = 0  # how often a number was set
        self.implementation: dict[str, Any] = {}  # PyTorch's choices of one, without effect here
        self._is_constant = (
            False  # whether the last compiled step made holds the numbers as its constants
        )
        self._optimizer = optimizer
        self._numeric: dict[str, Any] = {
            "learning_rate": None,
            "learning_rate_multiplier": 1.0,
            **{name: _check(name, value) for name, value in numeric.items()},
        }

    # A mapping for users

    def __getitem__(self, name: str) -> Any:
        name = _PYTORCH_NAMES.get(name, name)
        if name == "params":
            return _Members(self.variables)
        if name in _IMPLEMENTATION:
            others = self._optimizer._default_group.implementation
            return {**_IMPLEMENTATION, **others, **self.implementation}[name]
        if name == "betas":
            return self["beta_1"], self["beta_2"]
        if name in rule.Options._fields:
            return getattr(self.options, name)
        value = self.own(name)
        if name == "learning_rate" and value is None:
            return self._optimizer.learning_rate_number() * self.own("learning_rate_multiplier")
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        name = _PYTORCH_NAMES.get(name, name)
        if name == "betas":
            pair = dict(zip(("beta_1", "beta_2"), check_pair(value), strict=True))
            for beta, number in pair.items():  # both, before either is set
                _check(beta, number)
            self.update(pair)
            return
        if name in _IMPLEMENTATION:
            self.set_implementation({name: value})
            return
        if name not in NUMERIC:
            raise ValueError(
                f"A parameter group's `{name}` cannot be set: only numbers can, which are {', '.join(NUMERIC)}. "
                f"Received: {name}={value!r}"
            )
        if self is self._optimizer._default_group:
            if name == "learning_rate":
                self._optimizer.learning_rate = value
                return
            if name == "learning_rate_multiplier":
                raise ValueError(
                    "`learning_rate_multiplier` of the default group is 1: set the optimizer's learning rate. "
                    f"Received: learning_rate_multiplier={value!r}"
                )
        if name == "learning_rate_multiplier" and self.own("learning_rate") is not None:
            raise ValueError(
                "`learning_rate_multiplier` has no effect beside a learning rate of the group's own: set that "
                f"one, or set it to None first. Received: learning_rate_multiplier={value!r}"
            )
        value = _check(name, value)
        self.check_settable(name, value)
        check_held(self.stored, name, value)
        values = {name: value}
        if name == "learning_rate" and value is not None:
            values["learning_rate_multiplier"] = 1.0  # it has no effect any more
        numbers = self.current_numbers() if self.stored is not None else None
        for changed, number in values.items():
            self._numeric[changed] = number
            if numbers is not None:
                numbers[NUMERIC.index(changed)] = _encode(changed, number)
        self.changes += 1
        if numbers is not None:
            self.stored.assign(numbers)

    def update(self, values: Mapping[str, Any]) -> None:
        """Set several numbers."""
        for name, value in values.items():
            self[name] = value

    def __iter__(self) -> Iterator[str]:
        return iter(("params", *NUMERIC, *rule.Options._fields))

    def __len__(self) -> int:
        return 1 + len(NUMERIC) + len(rule.Options._fields)

    def __eq__(self, other) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        default = self._optimizer._default_group
        usual = rule.Options._field_defaults.get if self is default else default.readable
        values = {"learning_rate": self._shown_rate()}
        for name in (*NUMERIC[2:], *rule.Options._fields):
            value = self.readable(name)
            if value != usual(name):
                values[name] = hyperparameters.shown(value)
        selected = "the others" if self is default else _shown_selector(self.selector)
        count = len(self.variables)
        members = (
            f"{count} variable{'s' * (count != 1)}" if self._optimizer._parameters else "not built"
        )
        numbers = ", ".join(f"{name}={value}" for name, value in values.items())
        return f"<ParamGroup of {selected}, {members}: {numbers}>"

    def _shown_rate(self) -> str:
        rate = self.readable("learning_rate")
        if rate is not None:
            return hyperparameters.shown(rate)
        rate = hyperparameters.shown(self._optimizer._readable_learning_rate())
        factor = self.readable("learning_rate_multiplier")
        return rate if factor == 1 else f"{rate} * {factor}"

    # For the optimizer

    def set_implementation(self, choices: Mapping[str, Any]) -> None:
        """Set some of PyTorch's choices of an implementation, checked beside the others."""
        default = self._optimizer._default_group
        check_implementation({**default.implementation, **self.implementation, **choices})
        self.implementation |= check_implementation(choices)

    def unusual_implementation(self) -> dict[str, Any]:
        """Return the choices in which the group differs from the default group, or that one from PyTorch's defaults."""
        default = self._optimizer._default_group
        usual = _IMPLEMENTATION if self is default else default
        return {name: self[name] for name in _IMPLEMENTATION if self[name] != usual[name]}

    def own(self, name: str) -> Any:
        """Return the group's own value of a numeric hyperparameter, as it was given."""
        given = self._numeric[name]
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
        # The decimal that `1 - 0.001` is meant to be: 0.999, not 0.9990000000000000213.
        return round(1 - number, 12) if name in _STORED_AS_COMPLEMENT else number

    def readable(self, name: str) -> Any:
        """Return an option or the group's own number; if that cannot be read now, as it was given."""
        if name in rule.Options._fields:
            return getattr(self.options, name)
        return hyperparameters.readable(lambda: self.own(name), self._numeric[name])

    def given(self, name: str) -> Any:
        """Return a numeric hyperparameter as it was last given, without a look at what is stored."""
        return self._numeric[name]

    def number(self, name: str) -> float:
        """Return what a numeric hyperparameter is worth at the optimizer's present iteration."""
        iterations = self._optimizer._iterations
        value = hyperparameters.resolve(name, self[name], iterations, compiling=False)
        return 0.0 if value is None else float(value)

    def follows_schedule(self) -> bool:
        """Whether the learning rate is a schedule or a callable, the group's own or the optimizer's."""
        own = self.own("learning_rate")
        return hyperparameters.is_dynamic(self._optimizer._learning_rate if own is None else own)

    def renew_numbers(self) -> None:
        """Store our own number where one was loaded that is none: a schedule's or a callable's."""
        if self.stored is not None and _ASKED in ops.convert_to_numpy(self.stored):
            self.stored.assign(self.current_numbers())

    def current_numbers(self) -> np.ndarray:
        """Return the numbers in the order in which they are stored."""
        return np.array([_encode(name, self.own(name)) for name in NUMERIC])

    def store_numbers(self, numbers: np.ndarray) -> None:
        """Store numbers that `current_numbers` returned, if there is where to store them."""
        if self.stored is not None:
            self.stored.assign(numbers)

    def initial_numbers(self, shape, dtype):
        """Initialize the variable that will hold the numbers, where a compiled step reads them."""
        return ops.convert_to_tensor(self.current_numbers(), dtype)

    def scalars(
        self,
        learning_rate,
        iterations,
        t,
        dtype: str,
        compiling: bool,
        for_kernel: bool,
        step_scalars: Callable[..., rule.Scalars],
    ) -> rule.Scalars:
        """Return the scalars of step `t`; `learning_rate` is the optimizer's current one.

        `for_kernel`: the update is done by a kernel that takes the betas in `dtype`. `step_scalars` does what
        `rule.step_scalars` does.
        """
        now = self._now(iterations, dtype, compiling)
        if self.stored is None:
            rate, factor = now["learning_rate"], now["learning_rate_multiplier"]
            if rate is None:
                rate = learning_rate if factor == 1 else ops.cast(learning_rate, dtype) * factor
        elif hyperparameters.is_dynamic(self._numeric["learning_rate"]):
            rate = now["learning_rate"]
        else:
            following = ops.cast(learning_rate, dtype) * now["learning_rate_multiplier"]
            rate = ops.where(now["learning_rate"] < 0, following, now["learning_rate"])
        rates = [now["beta_1"], now["beta_2"]]
        if for_kernel:
            rates = [rule.representable(rate_, dtype) for rate_ in rates]
        return step_scalars(
            self.options,
            learning_rate=rate,
            rate_1=rates[0],
            rate_2=rates[1],
            epsilon=now["epsilon"],
            weight_decay=now["weight_decay"],
            t=t,
            dtype=dtype,
        )

    def get_config(self, default: "ParamGroup", known) -> dict[str, Any]:
        """Return what makes an equal group beside `default`, as `param_groups` takes it.

        `known` are the variables that the optimizer was built for.
        """
        config: dict[str, Any] = {"params": self._selector_config()}
        if self.variables:
            paths = [path_of(v) for v in self.variables]
            for variable in known:
                if path_of(variable) in paths and not any(variable is v for v in self.variables):
                    raise ValueError(
                        "A parameter group is saved by the paths of its variables, which must be their own. Received: "
                        f"'{path_of(variable)}' for a variable of the group and for another one"
                    )
            config["selected"] = {"paths": paths, "among": [path_of(v) for v in known]}
        elif self.selected:
            config["selected"] = self.selected
        for name in NUMERIC:
            value = self.own(name)
            if name == "learning_rate_multiplier" and self.own("learning_rate") is not None:
                continue
            if value != default.own(name):
                dynamic = hyperparameters.is_dynamic(value)
                config[name] = keras.saving.serialize_keras_object(value) if dynamic else value
        for name, value in self.options._asdict().items():
            if value != getattr(default.options, name):
                config[name] = value
        return config | self.unusual_implementation()

    def _selector_config(self):
        strings = [s for s in _flatten(self.selector) if isinstance(s, str)]
        if len(strings) == len(_flatten(self.selector)):
            return self.selector if isinstance(self.selector, str) else strings
        if not self.variables:
            raise ValueError(
                "A parameter group selected by a variable, layer or predicate is saved as the paths that it selected, "
                f"which are known once the optimizer is built. Received: params={self.selector!r}"
            )
        return [re.escape(path_of(v)) for v in self.variables]

    def _now(self, iterations, dtype: str, compiling: bool) -> dict[str, Any]:
        """Return each numeric hyperparameter's value in this step, the betas as their complements."""
        if compiling:
            self._is_constant = self.stored is None
        now = {}
        for i, (name, given) in enumerate(self._numeric.items()):
            if self.stored is not None and not hyperparameters.is_dynamic(given):
                now[name] = ops.cast(self.stored[i], dtype)
                continue
            value = hyperparameters.resolve(name, given, iterations, compiling)
            now[name] = rule.complement(value) if name in _STORED_AS_COMPLEMENT else value
        return now

    def check_settable(self, name: str, value: Any) -> None:
        """Raise if a compiled step would not notice that `name` was set to `value`."""
        dynamic = hyperparameters.is_dynamic
        if self._optimizer._trace.is_traced and (dynamic(value) or dynamic(self._numeric[name])):
            raise TypeError(
                f"`{name}` of a parameter group is part of a compiled step where it is, or becomes, a schedule or a "
                "callable: it can be set to or from one before the first compiled step only. "
                f"Received: {name}={value!r}"
            )
        if self._optimizer._trace.is_traced and (self.stored is None or self._is_constant):
            raise ValueError(
                f"`{name}` is a constant of the train step that was compiled already. For numbers that can be set "
                "while training, give the optimizer parameter groups from the start, if only `param_groups=[]`. "
                f"Received: {name}={value!r}"
            )

    def _read(self) -> np.ndarray | None:
        # While `fit` runs on JAX, Keras holds the state elsewhere, and its variables are empty.
        if self.stored is None or getattr(self.stored, "_value", None) is None:
            return None
        return ops.convert_to_numpy(self.stored)


class _ReadOnlyList(list):
    """A list that shows what the optimizer has: a change to it would change nothing else, so it is refused."""

    what = ""  # the expression that returned it

    def refuse_change(self, *args, **kwargs):
        """Raise, and say what to call instead."""
        received = ", ".join(
            [*map(_shown_change, args), *(f"{k}={_shown_change(v)}" for k, v in kwargs.items())]
        )
        raise TypeError(
            f"`{self.what}` cannot be changed, as it only shows what the optimizer has. To add variables, call "
            "`optimizer.add_param_group({'params': ...})`; groups and variables cannot be taken out or put in another "
            "order; the numbers of a group can be set, as in `optimizer.param_groups[0]['learning_rate'] = 0.1`. "
            f"Received: a change with ({received})"
        )

    append = extend = insert = pop = remove = clear = sort = reverse = refuse_change
    __setitem__ = __delitem__ = __iadd__ = __imul__ = refuse_change

    def __reduce_ex__(self, protocol):
        return type(self), (list(self),)

    def __deepcopy__(self, memo):
        return copy.deepcopy(list(self), memo)


class _Members(_ReadOnlyList):
    what = "optimizer.param_groups[...]['params']"


class ParamGroups(_ReadOnlyList):
    """A list of groups that is printed one a line."""

    what = "optimizer.param_groups"

    def __repr__(self) -> str:
        return "[" + ",\n ".join(map(repr, self)) + "]"

    def __deepcopy__(self, memo):
        """Return plain dictionaries, with the variables themselves: a copy of a group would need its optimizer."""
        return [_Snapshot(group) for group in self]


class _Snapshot(dict):
    """What a group held when it was copied; PyTorch's names serve too."""

    def __init__(self, group: ParamGroup):
        super().__init__({**group, "params": list(group.variables)})

    def __missing__(self, name: str) -> Any:
        if name == "betas":
            return self["beta_1"], self["beta_2"]
        if name in _PYTORCH_NAMES:
            return self[_PYTORCH_NAMES[name]]
        raise KeyError(name)


def parse(optimizer, label: str, spec: Mapping[str, Any], default: ParamGroup) -> ParamGroup:
    """Make a group of a user's dictionary, the argument `label`; what it does not say is as in `default`."""
    if not isinstance(spec, Mapping) or "params" not in spec:
        raise ValueError(
            f"`{label}` must be a dictionary with the key 'params'. Received: {spec!r}"
        )
    spec = dict(spec)
    selected = spec.pop("selected", None)  # from `get_config`
    given = {_PYTORCH_NAMES.get(name, name): value for name, value in spec.items()}
    betas_twice = "betas" in given and not {"beta_1", "beta_2"}.isdisjoint(given)
    if len(given) != len(spec) or betas_twice:
        raise ValueError(f"`{label}` gives an option under two names. Received: {spec!r}")
    if "betas" in given:
        given["beta_1"], given["beta_2"] = check_pair(given.pop("betas"), label)
    implementation = {name: given.pop(name) for name in _IMPLEMENTATION if name in given}
    known = ("params", *NUMERIC, *rule.Options._fields)
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
        group = ParamGroup(optimizer, numeric, options, _check_selector(given["params"]))
        group.set_implementation(implementation)
    except (TypeError, ValueError) as error:
        raise type(error)(f"In `{label}`: {error}") from None
    group.selected = selected
    return group


def check_held(variable, name: str, value: Any) -> None:
    """Raise if `variable` is empty because Keras's trainer on JAX holds its value, so that an assignment is lost."""
    if variable is not None and getattr(variable, "_value", variable) is None:
        raise ValueError(
            f"`{name}` cannot be set here: while `fit` runs on JAX, the state is with Keras's trainer. In a callback, "
            "reach the optimizer through `self.model`, which brings it back: `self.model.optimizer`. "
            f"Received: {name}={value!r}"
        )


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
    """Return PyTorch's choices of an implementation, checked; those that are not among them are left out."""
    checked = {}
    for name, default in _IMPLEMENTATION.items():
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


def check_pair(betas: Any, label: str | None = None) -> tuple[Any, Any]:
    """Return PyTorch's `betas` as a pair."""
    if not isinstance(betas, Iterable) or len(pair := tuple(betas)) != 2:
        where = "" if label is None else f" of `{label}`"
        raise ValueError(f"`betas`{where} must be a pair of numbers. Received: betas={betas!r}")
    return pair


def assign(groups: list[ParamGroup], default: ParamGroup, variables) -> list[ParamGroup]:
    """Return each variable's group: the first that selects it, else the default one.

    Raises:
        ValueError: If a group of `groups` gets no variable, or one is named as an object in two groups.
    """
    named: dict[int, int] = {}
    for i, group in enumerate(groups):
        for item in _flatten(group.selector):
            if _is_variable(item) and named.setdefault(id(item), i) != i:
                raise ValueError(
                    "A variable must be named in one parameter group only. Received: "
                    f"'{path_of(item)}' in `param_groups[{named[id(item)]}]` and `param_groups[{i}]`"
                )
    chosen = _as_before(groups, default, variables)
    if chosen is not None:
        return chosen
    chosen = [group_for(variable, groups, default) for variable in variables]
    for i, group in enumerate(groups):
        if not any(g is group for g in chosen) and not group.variables:
            raise ValueError(_selects_nothing(i, group, groups, variables))
    return chosen


def group_for(variable, groups: list[ParamGroup], default: ParamGroup) -> ParamGroup:
    """Return the first group that selects the variable, else the default one."""
    return next((group for group in groups if selects(group.selector, variable)), default)


def _as_before(groups, default: ParamGroup, variables) -> list[ParamGroup] | None:
    """Return the assignment that a saved optimizer had, if this is the same model.

    A Sequential model's paths lose the model's name when it is loaded, so that its regular expressions may not match.
    Variables that were frozen when it was saved are not there; a group may have no others.
    """
    if not groups or any(g.selected is None for g in groups):
        return None
    among = [path for g in groups for path in g.selected["among"]]
    ours = align(among, map(path_of, variables))
    if set(ours.values()) != {path_of(v) for v in variables}:
        return None
    group_of = {ours.get(path): group for group in groups for path in group.selected["paths"]}
    return [group_of.get(path_of(v), default) for v in variables]


def selects(selector: Any, variable) -> bool:
    """Whether a selector, or one of a list, selects the variable."""
    for item in _flatten(selector):
        if isinstance(item, str):
            if re.fullmatch(item, path_of(variable)):
                return True
        elif _is_variable(item):
            if item is variable:
                return True
        elif isinstance(item, keras.Layer):
            if any(v is variable for v in item.trainable_variables):
                return True
        elif item(variable):
            return True
    return False


def named_variables(selector: Any) -> list[Any] | None:
    """Return the variables that a selector of variables and layers names; None if it holds another kind."""
    variables: dict[int, Any] = {}
    for item in _flatten(selector):
        if _is_variable(item):
            variables[id(item)] = item
        elif isinstance(item, keras.Layer):
            variables |= {id(v): v for v in item.trainable_variables}
        else:
            return None
    return list(variables.values())


class DecayExclusions:
    """Which variables weight decay leaves out: by identity, by path if they were saved, by pattern."""

    def __init__(self):
        self._keys: set[Any] = set()
        self._paths: list[str] = []
        self._saved_paths: list[str] = []
        self._patterns: list[str] = []
        self._verdicts: dict[Any, bool] = {}

    def add(self, variables: dict[Any, Any], patterns) -> None:
        """Exclude more variables, given by their keys, and all that a pattern is found in."""
        self._keys.update(variables)
        self._paths.extend(path_of(v) for v in variables.values())
        self._patterns.extend(patterns)
        self._verdicts.clear()

    def add_config(self, config: dict[str, list[str]]) -> None:
        """Exclude the variables that `get_config` told of."""
        self._paths.extend(config["paths"])
        self._saved_paths.extend(config["paths"])
        self._patterns.extend(config["patterns"])

    def hold(self, key, variable) -> bool:
        """Whether the variable is excluded."""
        if not self:
            return False
        if key not in self._verdicts:
            path, name = path_of(variable), variable.name.partition(":")[0]
            self._verdicts[key] = (
                key in self._keys
                or any(same(path, saved) for saved in self._saved_paths)
                or any(re.search(pattern, x) for pattern in self._patterns for x in (path, name))
            )
        return self._verdicts[key]

    def __bool__(self) -> bool:
        return bool(self._paths or self._patterns)

    def get_config(self) -> dict[str, list[str]]:
        """Return what excludes the same variables of another model."""
        return {"paths": list(self._paths), "patterns": list(self._patterns)}


def _check(name: str, value: Any) -> Any:
    if value is None and name in _MAY_BE_NONE:
        return None
    return hyperparameters.check(name, value)


def _encode(name: str, value: Any) -> float:
    if hyperparameters.is_dynamic(value):
        return _ASKED
    if value is None:
        return 0.0 if name == "weight_decay" else _NOT_SET
    return rule.complement(value) if name in _STORED_AS_COMPLEMENT else value


def _flatten(selector: Any) -> list[Any]:
    if isinstance(selector, list | tuple | set):
        return [item for part in selector for item in _flatten(part)]
    return [selector]


def _shown_selector(selector: Any) -> str:
    items = _flatten(selector)
    shown = [_shown_item(item) for item in items[:_SHOWN]]
    return ", ".join(shown + [f"{len(items) - _SHOWN} more"] * (len(items) > _SHOWN))


def _shown_item(item: Any) -> str:
    if isinstance(item, str):
        return repr(item)
    if _is_variable(item):
        return path_of(item)
    return f"layer {item.name}" if isinstance(item, keras.Layer) else hyperparameters.shown(item)


def _shown_change(item: Any) -> str:
    if isinstance(item, list | tuple):
        return f"{type(item).__name__} of {len(item)}"
    return path_of(item) if _is_variable(item) else hyperparameters.shown(item)


def _is_variable(item: Any) -> bool:
    # A raw `tf.Variable` is no `keras.Variable`, but Keras's optimizers take it.
    return isinstance(item, keras.Variable) or (hasattr(item, "assign") and hasattr(item, "name"))


def _check_selector(selector: Any) -> Any:
    items = _flatten(selector)
    if not items:
        raise ValueError(f"`params` must select something. Received: params={selector!r}")
    for item in items:
        if isinstance(item, str):
            try:
                re.compile(item)
            except re.error as error:
                raise ValueError(
                    f"`params` must hold valid regular expressions ({error}). Received: params={item!r}"
                ) from None
        elif not (_is_variable(item) or isinstance(item, keras.Layer | Callable)):
            raise TypeError(
                "`params` must be a regular expression, a variable, a layer, a predicate, or a list of these. "
                f"Received: params={item!r}"
            )
    return selector


def _selects_nothing(index: int, group: ParamGroup, groups, variables) -> str:
    paths = [path_of(v) for v in variables]
    taken = {
        path_of(v): i
        for v in variables
        if selects(group.selector, v)
        for i, other in reversed(list(enumerate(groups[:index])))
        if selects(other.selector, v)
    }
    if taken:
        why = "all that it selects belongs to an earlier group: " + ", ".join(
            f"'{path}' to param_groups[{i}]" for path, i in list(taken.items())[:3]
        )
    else:
        wanted = [
            s if isinstance(s, str) else getattr(s, "path", "") for s in _flatten(group.selector)
        ]
        near = [p for w in wanted for p in difflib.get_close_matches(w, paths, n=3, cutoff=0.3)]
        why = "the nearest paths are " + ", ".join(repr(p) for p in (near or paths)[:5])
    return (
        f"`param_groups[{index}]` selects no variable; {why}. Received: params={group.selector!r}"
    )
