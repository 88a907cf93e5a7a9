"""Values of variables, and their dtypes."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops


@dataclass(eq=False)
class Part:
    """A stretch of a variable's elements, flat, that one of several processes updates; PyTorch's.

    Args:
        variable: The variable.
        cuts: At which element the part of each process begins; behind them, the number of elements.
        rank: The process.
    """

    variable: Any
    cuts: list[int]
    rank: int

    @property
    def stretch(self) -> slice:
        return slice(*self.cuts[self.rank : self.rank + 2])

    def stretches(self) -> Iterator[slice]:
        """Give the stretch of each process."""
        return itertools.starmap(slice, itertools.pairwise(self.cuts))

    # What is asked of a variable

    @property
    def path(self) -> str:
        return self.variable.path

    @property
    def dtype(self) -> Any:
        return self.variable.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stretch.stop - self.stretch.start,)

    @property
    def flat(self) -> Any:
        """The variable's elements in a row; it becomes contiguous, as Keras's orthogonal kernels are not."""
        value = self.variable._value
        if not value.is_contiguous():
            value.data = value.data.contiguous()
        return value.detach().view(-1)

    @property
    def value(self) -> Any:
        return self.flat[self.stretch]

    _value = value

    def assign(self, value: Any) -> None:
        """Take over the values of this part."""
        self.value.copy_(value)


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
    value = variable.value if isinstance(variable, keras.Variable | Part) else variable
    return value if dtype is None else ops.cast(value, dtype)
