"""Hyperparameters: checked when they are given, and resolved to their values in a step."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras.optimizers.schedules import LearningRateSchedule

# Anything a user may pass: a number, a scalar tensor, a schedule, or a callable without arguments.
Hyperparameter = Any

# An update is computed with float32 numbers, unless its variable is float64.
_LARGEST = float(np.finfo(np.float32).max)
_RULES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "learning_rate": (">= 0 and finite", lambda x: x >= 0),
    "learning_rate_multiplier": (">= 0 and finite", lambda x: x >= 0),
    "beta_1": ("in [0, 1)", lambda x: 0 <= x < 1),
    "beta_2": ("in [0, 1)", lambda x: 0 <= x < 1),
    "epsilon": (">= 0 and finite", lambda x: x >= 0),
    "weight_decay": (">= 0 and finite", lambda x: x >= 0),
    "clipnorm": (">= 0 and finite", lambda x: x >= 0),
    "clipvalue": (">= 0 and finite", lambda x: x >= 0),
    "global_clipnorm": (">= 0 and finite", lambda x: x >= 0),
    "loss_scale_factor": ("> 0 and finite", lambda x: bool(np.float32(x) > 0)),
    "skip_spikes": ("> 0 and finite", lambda x: x > 0),
    "ema_momentum": ("in [0, 1]", lambda x: 0 <= x <= 1),
}


def is_dynamic(value: Hyperparameter) -> bool:
    """Whether `value` is called at each step: a schedule or a callable."""
    return isinstance(value, LearningRateSchedule) or callable(value)


def shown(value: Any) -> str:
    """Return the `repr`; for a schedule or a callable, its name or its class's name."""
    return getattr(value, "__name__", type(value).__name__) if is_dynamic(value) else repr(value)


def readable(read: Callable[[], Any], given: Any) -> Any:
    """Return `read()`, or `given` where no number can be read: in a traced step, or during `fit` on JAX."""
    try:
        return read()
    except Exception:  # each backend has its own for a tensor without a value
        return given


def check_number(name: str, value: Any) -> float:
    """Return `value` as a Python float, or raise an error that names the argument, its rule and the value."""
    number = _as_number(name, value)
    rule, holds = _RULES[name]
    if not (math.isfinite(number) and holds(number)):
        raise ValueError(f"`{name}` must be {rule}. Received: {name}={value}")
    if number > _LARGEST:
        raise ValueError(
            f"`{name}` must be at most {_LARGEST:.4g}, the largest number of float32. Received: {name}={value}"
        )
    return number


def check(name: str, value: Hyperparameter) -> Hyperparameter:
    """Return a number as a float, a schedule or callable as it is; raise for anything else."""
    return value if is_dynamic(value) else check_number(name, value)


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """Return the choice that `value` equals, a boolean of NumPy included; raise for anything else."""
    for choice in choices:
        if isinstance(value, str) == isinstance(choice, str) and _same(value, choice):
            return choice
    expected = " or ".join(repr(choice) for choice in choices)
    raise ValueError(f"`{name}` must be {expected}. Received: {name}={value!r}")


def check_count(name: str, value: Any, minimum: int) -> int | None:
    """Return a whole number of at least `minimum` as an int; None passes."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        raise ValueError(f"`{name}` must be an integer >= {minimum}. Received: {name}={value!r}")
    return int(value)


def resolve(
    name: str, value: Hyperparameter, iterations: Any, compiling: bool
) -> Hyperparameter | None:
    """Return the value in this step: a float, or a scalar tensor.

    A compiled step would call a callable once and freeze a Python number, so there such a callable is refused.
    """
    if isinstance(value, LearningRateSchedule):
        return value(iterations)
    if not callable(value):
        return value
    result = value()
    if keras.ops.is_tensor(result) or isinstance(result, keras.Variable):
        return result
    if compiling:
        raise ValueError(
            f"`{name}` is a callable that returns a Python number, which a compiled train step would keep for ever. "
            "Return a tensor or a variable, or use a `keras.optimizers.schedules.LearningRateSchedule`. "
            f"Received: {name}={value} returning {result!r}"
        )
    return check_number(name, result)


def exact(stored: Any, given: float | None = None) -> float:
    """Return the Python float that a stored scalar stands for.

    0.001 stored in float32 reads as 0.0010000000474974513. If the stored value still is that of `given`, `given` is
    returned; otherwise the shortest decimal that names the stored value.
    """
    stored = np.asarray(stored)
    if given is not None and np.asarray(given, stored.dtype) == stored:
        return given
    return float(str(stored[()]))


def _as_number(name: str, value: Any) -> float:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    if hasattr(value, "detach"):  # a tensor of PyTorch, which a state dict brings to any backend
        value = value.detach().cpu().numpy()
    if isinstance(value, keras.Variable | np.ndarray | np.generic) or keras.ops.is_tensor(value):
        array = np.asarray(keras.ops.convert_to_numpy(value))
        if array.shape == () and array.dtype != bool:
            return float(array)
        value = f"an array of shape {array.shape} and dtype {array.dtype}"
    raise TypeError(
        f"`{name}` must be a number, a scalar tensor, a `LearningRateSchedule` or a callable without arguments. "
        f"Received: {name}={value}"
    )


def _same(value: Any, choice: Any) -> bool:
    if isinstance(choice, bool):
        return isinstance(value, bool | np.bool_) and bool(value) is choice
    return bool(value == choice)
