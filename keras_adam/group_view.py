"""Parameter groups as users hold them: mappings in which the numbers can be set."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from keras_adam import hyperparameters, rule, selection
from keras_adam.groups import (
    IMPLEMENTATION,
    NUMERIC,
    PYTORCH_NAMES,
    ParamGroup,
    check_betas,
    check_numeric,
)
from keras_adam.paths import path_of

_NAMES = ("params", *NUMERIC, *rule.Options._fields, "state_dtype")


class GroupView(Mapping):
    """The hyperparameters that some variables share; a mapping in which the numeric ones can be set.

    A value that is set holds from the next step on, in a compiled train function too, without a retrace. PyTorch's
    names `lr`, `betas` and `eps` work beside Keras's.
    """

    def __init__(self, optimizer, group: ParamGroup):
        self._optimizer = optimizer
        self._group = group

    def __getitem__(self, name: str) -> Any:
        group, name = self._group, PYTORCH_NAMES.get(name, name)
        if name == "params":
            return _Members(group.variables)
        if name in IMPLEMENTATION:
            return group.implementation()[name]
        if name == "betas":
            return self["beta_1"], self["beta_2"]
        if name in rule.Options._fields:
            return getattr(group.options, name)
        if name == "state_dtype":
            return self._optimizer._state_dtype_of(group)
        value = group.own(name)
        if name == "learning_rate" and value is None:
            return self._optimizer.learning_rate_number() * group.own("learning_rate_multiplier")
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        group, name = self._group, PYTORCH_NAMES.get(name, name)
        if name == "betas":
            betas = check_betas(value)
            for beta, number in betas.items():  # check both before either is set
                check_numeric(beta, number)
            self.update(betas)
            return
        if name in IMPLEMENTATION:
            group.set_implementation({name: value})
            return
        if name not in NUMERIC:
            raise ValueError(
                f"`{name}` cannot be set after the constructor; only the numbers {', '.join(NUMERIC)} can. "
                f"Make a new optimizer. Received: {name}={value!r}"
            )
        if group.is_default:
            if name == "learning_rate":
                self._optimizer.learning_rate = value
                return
            if name == "learning_rate_multiplier":
                raise ValueError(
                    "`learning_rate_multiplier` of the default group is 1: set the optimizer's learning rate. "
                    f"Received: learning_rate_multiplier={value!r}"
                )
        if name == "learning_rate_multiplier" and group.own("learning_rate") is not None:
            raise ValueError(
                "`learning_rate_multiplier` has no effect beside a group's own learning rate: set "
                f"`learning_rate` to None first. Received: learning_rate_multiplier={value!r}"
            )
        value = check_numeric(name, value)
        self.check_settable(name, value)
        check_held(group.stored, name, value)
        group.set_number(name, value)

    def update(self, values: Mapping[str, Any]) -> None:
        """Set several numbers."""
        for name, value in values.items():
            self[name] = value

    def __iter__(self) -> Iterator[str]:
        return iter(_NAMES)

    def __len__(self) -> int:
        return len(_NAMES)

    def __eq__(self, other) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        group, default = self._group, self._group.default
        usual = rule.Options._field_defaults.get if group.is_default else default.readable
        values = {"learning_rate": self._shown_rate()}
        for name in (*NUMERIC[2:], *rule.Options._fields):
            value = group.readable(name)
            if value != usual(name):
                values[name] = hyperparameters.shown(value)
        if not group.is_default and self["state_dtype"] != self._optimizer.state_dtype:
            values["state_dtype"] = hyperparameters.shown(self["state_dtype"])
        selected = "the others" if group.is_default else selection.shown(group.selector)
        count = len(group.variables)
        members = (
            f"{count} variable{'s' * (count != 1)}" if self._optimizer._parameters else "not built"
        )
        numbers = ", ".join(f"{name}={value}" for name, value in values.items())
        return f"<ParamGroup of {selected}, {members}: {numbers}>"

    def _shown_rate(self) -> str:
        rate = self._group.readable("learning_rate")
        if rate is not None:
            return hyperparameters.shown(rate)
        rate = hyperparameters.shown(self._optimizer._readable_learning_rate())
        factor = self._group.readable("learning_rate_multiplier")
        return rate if factor == 1 else f"{rate} * {factor}"

    # For the optimizer

    def number(self, name: str) -> float:
        """Return a number's value, also a schedule's or a callable's, at the optimizer's present iteration."""
        iterations = self._optimizer._iterations
        value = hyperparameters.resolve(name, self[name], iterations, compiling=False)
        return 0.0 if value is None else float(value)

    def follows_schedule(self) -> bool:
        """Whether the learning rate is a schedule or a callable, the group's own or the optimizer's."""
        own = self._group.own("learning_rate")
        rate = self._optimizer._readable_learning_rate() if own is None else own
        return hyperparameters.is_dynamic(rate)

    def check_settable(self, name: str, value: Any) -> None:
        """Raise if a compiled step would not notice that `name` was set to `value`."""
        if not self._optimizer._trace.is_traced:
            return
        group, dynamic = self._group, hyperparameters.is_dynamic
        if dynamic(value) or dynamic(group.given(name)):
            raise TypeError(
                f"`{name}` can be set to or from a schedule or a callable only before the first compiled step, which "
                "holds it as a constant. Set it on a copy, which keeps the state, `new = copy.deepcopy(optimizer)`. "
                f"Received: {name}={value!r}"
            )
        if group.stored is None or group.is_constant:
            raise ValueError(
                f"`{name}` is a constant of the train step that was compiled already. For numbers that can be set "
                "while training, give the optimizer parameter groups from the start, if only `param_groups=[]`. "
                f"Received: {name}={value!r}"
            )


class GroupViews(dict[ParamGroup, GroupView]):
    """The view of each group: made on first use, then always the same one."""

    def __init__(self, optimizer):
        super().__init__()
        self._optimizer = optimizer

    def __missing__(self, group: ParamGroup) -> GroupView:
        return self.setdefault(group, GroupView(self._optimizer, group))


class _ReadOnlyList(list):
    """A list that only shows what the optimizer has. A change would have no effect, so it is refused."""

    what = ""  # the expression that returned it

    def refuse_change(self, *args, **kwargs):
        """Raise, and say what to call instead."""
        received = ", ".join(
            [*map(_shown_change, args), *(f"{k}={_shown_change(v)}" for k, v in kwargs.items())]
        )
        raise TypeError(
            f"`{self.what}` is read-only. To add variables, call `optimizer.add_param_group({{'params': ...}})`. Set "
            "numbers as in `optimizer.param_groups[0]['learning_rate'] = 0.1`. "
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
    """A list of groups, printed one group a line."""

    what = "optimizer.param_groups"

    def __repr__(self) -> str:
        return "[" + ",\n ".join(map(repr, self)) + "]"

    def __deepcopy__(self, memo):
        """Return dictionaries that hold the same variables; a copy of a group would need its optimizer."""
        return [_Snapshot(group) for group in self]


class _Snapshot(dict):
    """What a group held when it was copied; PyTorch's names work too."""

    def __init__(self, group: GroupView):
        super().__init__({**group, "params": list(group["params"])})

    def __missing__(self, name: str) -> Any:
        if name == "betas":
            return self["beta_1"], self["beta_2"]
        if name in PYTORCH_NAMES:
            return self[PYTORCH_NAMES[name]]
        raise KeyError(name)


def check_held(variable, name: str, value: Any) -> None:
    """Raise if Keras's trainer on JAX holds the value of `variable`, so that an assignment would be lost."""
    if variable is not None and getattr(variable, "_value", variable) is None:
        raise ValueError(
            f"`{name}` cannot be set here: while `fit` runs on JAX, the state is with Keras's trainer. In a callback, "
            "reach the optimizer through `self.model`, which brings it back: `self.model.optimizer`. "
            f"Received: {name}={value!r}"
        )


def _shown_change(item: Any) -> str:
    if isinstance(item, list | tuple):
        return f"{type(item).__name__} of {len(item)}"
    return path_of(item) if selection.is_variable(item) else hyperparameters.shown(item)
