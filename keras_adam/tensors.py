"""Values of variables, and their dtypes."""

from typing import Any

import keras
from keras import ops


def compute_dtype(dtype: Any) -> str:
    """Return the dtype in which an update of a variable of `dtype` is computed: float32, or float64."""
    return "float64" if keras.backend.standardize_dtype(dtype) == "float64" else "float32"


def widened(values: Any) -> Any:
    """Return a tensor in float32 at least."""
    return ops.cast(values, compute_dtype(values.dtype))


def value_of(variable: Any, dtype: str | None = None) -> Any:
    """Return a variable's value, cast if a dtype is given.

    Not through `ops.convert_to_tensor`: on TensorFlow that returns the variable itself, whose operators guess what is
    meant from shapes (`+` may become `bias_add`, which fails on an empty matrix).
    """
    value = variable.value if isinstance(variable, keras.Variable) else variable
    return value if dtype is None else ops.cast(value, dtype)
