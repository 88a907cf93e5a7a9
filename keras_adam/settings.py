"""Options of the whole optimizer: checked whenever they are set, and obeyed from the next step on."""

from collections.abc import Callable
from typing import Any

from keras_adam import hyperparameters

_CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")


class Setting:
    """An attribute that is checked as in the constructor, and refused where a compiled step would not notice.

    Args:
        check: Function `(name, value) -> value` that raises for an invalid value.
        makes_state: Whether the option decides which state variables there are. Defaults to `False`.
    """

    def __init__(self, check: Callable[[str, Any], Any], makes_state: bool = False):
        self.check = check
        self.makes_state = makes_state

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, optimizer, owner=None):
        if optimizer is None:
            return self
        if self.name not in optimizer.__dict__:  # in the constructor
            raise AttributeError(self.name)
        return optimizer.__dict__[self.name]

    def __set__(self, optimizer, value):
        name, values = self.name, optimizer.__dict__
        value = self.check(name, value)
        if name in values:
            if value == values[name]:
                return
            self._check_can_change(optimizer, value)
        check_together({**values, name: value})
        values[name] = value
        values.pop("_step_config", None)

    def decides_state(self, optimizer) -> bool:
        """Whether the option decides which state variables this optimizer has."""
        return self.makes_state

    def _check_can_change(self, optimizer, value) -> None:
        name = self.name
        if self.decides_state(optimizer) and optimizer._parameters:
            why = "decides which state variables there are, and the optimizer is built"
            instead = (
                "Make a new optimizer, without the state: "
                f"`type(optimizer).from_config({{**optimizer.get_config(), '{name}': {value!r}}})`"
            )
        elif optimizer._trace.is_traced:
            why = "is a constant of the train step that was compiled already"
            instead = (
                "Set it on a copy, which keeps the state, `new = copy.deepcopy(optimizer)`, and compile the model "
                "with that"
            )
        else:
            return
        raise ValueError(
            f"`{name}` cannot be set now: it {why}. {instead}. "
            f"Received: {name}={value!r}, where it was {optimizer.__dict__[name]!r}"
        )


def check_together(values: dict[str, Any]) -> None:
    """Raise if two options exclude each other; those that `values` lacks are not set yet."""
    given = {name: values.get(name) for name in _CLIPPING}
    if sum(limit is not None for limit in given.values()) > 1:
        raise ValueError(
            "Only one of `clipnorm`, `clipvalue` and `global_clipnorm` can be set. Received: "
            + ", ".join(f"{name}={limit}" for name, limit in given.items())
            + ". To change from one to another, set the first to None"
        )
    if values.get("lazy") and values.get("gradient_accumulation_steps"):
        raise ValueError(
            "`lazy` must be False with `gradient_accumulation_steps`: an accumulated gradient has all rows. "
            f"Received: lazy=True, gradient_accumulation_steps={values['gradient_accumulation_steps']}"
        )


def limit(name: str, value: Any) -> float | None:
    """Return a number that may be None."""
    return None if value is None else hyperparameters.check_number(name, value)


def one_of(*choices: Any) -> Callable[[str, Any], Any]:
    """Return a check that a value is one of `choices`."""
    return lambda name, value: hyperparameters.check_choice(name, value, choices)


def interval(default: int) -> Callable[[str, Any], int]:
    """Return a check that a value is a whole number of at least 0; True is `default`, and False is 0."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool):
            return default if value else 0
        return hyperparameters.check_count(name, value, 0) or 0

    return check


def count(minimum: int) -> Callable[[str, Any], int | None]:
    """Return a check that a value is None or a whole number of at least `minimum`."""
    return lambda name, value: hyperparameters.check_count(name, value, minimum)
