"""What to write here instead of PyTorch's and Keras 2's arguments."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])

_NO_PARAMETERS = (
    "the variables are not an argument here: write `{call}`, and then "
    "`model.compile(optimizer)` or `optimizer.build(variables)`"
)
_OF_PYTORCH = "it is PyTorch's: `{name}.with_torch_arguments` takes it, and it has no effect"
_INSTEAD = {
    "lr": "write `learning_rate=`",
    "betas": "write `beta_1=` and `beta_2=`, or use `{name}.with_torch_arguments`",
    "eps": "write `epsilon=`, with `epsilon_hat=False` for PyTorch's, or use `{name}.with_torch_arguments`",
    "decay": "it lowered the learning rate: write `learning_rate=keras.optimizers.schedules.InverseTimeDecay("
    "learning_rate, decay_steps=1, decay_rate=decay)`; decay of the weights is `weight_decay=`",
    "params": _NO_PARAMETERS,
    **dict.fromkeys(("foreach", "fused", "capturable", "differentiable"), _OF_PYTORCH),
}


def variables_come_later(function: _F) -> _F:
    """Make a constructor refuse variables as its first argument, where PyTorch's takes them."""

    @functools.wraps(function)
    def checked(self, *args, **options):
        if args and _holds_several(args[0]):
            raise TypeError(
                f"The first argument must be a learning rate; {_NO_PARAMETERS.format(**_words(self))}. "
                f"Received: an object of the class {type(args[0]).__name__}"
            )
        return function(self, *args, **options)

    return checked  # type: ignore[return-value]


def names_are_known(function: _F) -> _F:
    """Make a constructor say what to write instead of an argument that it does not have."""
    known = list(inspect.signature(function).parameters)[1:]

    @functools.wraps(function)
    def checked(self, *args, **options):
        for name, value in options.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(known)}"
                instead = _INSTEAD.get(name, hint).format(**_words(self))
                end = "" if instead.endswith("?") else "."
                raise TypeError(
                    f"{_words(self)['name']} has no argument `{name}`; {instead}{end} "
                    f"Received: {name}={_shown(value)}"
                )
        return function(self, *args, **options)

    return checked  # type: ignore[return-value]


def _words(self) -> dict[str, str]:
    """Return the class's name and an example of a call; in `with_torch_arguments`, `self` is the class."""
    if isinstance(self, type):
        return {"name": self.__name__, "call": f"{self.__name__}.with_torch_arguments(lr=0.001)"}
    name = type(self).__name__
    return {"name": name, "call": f"{name}(learning_rate=0.001)"}


def _holds_several(value: Any) -> bool:
    """Whether it is a list, generator or view; not a number, a tensor, a schedule or a callable."""
    single = hasattr(value, "shape") or callable(value) or isinstance(value, str | bytes | Mapping)
    return isinstance(value, Iterable) and not single


def _shown(value: Any) -> str:
    return (
        f"an object of the class {type(value).__name__}" if _holds_several(value) else repr(value)
    )
