"""How a number per element is kept between steps: as it is, dithered in fewer bits, or in two parts.

A `Storage` says which arrays it needs, makes the number from them, and them from the number. It knows no variable, no
backend and no optimizer. The equations of rounding stand in `keras_adam.rule`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from keras import ops

from keras_adam import rule

Tensor = Any
HALF = ("bfloat16", "float16")
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


class Spec(NamedTuple):
    """One array that a storage needs: its role in files, its dtype."""

    role: str
    dtype: str


class Storage(ABC):
    """One way to keep a number per element; equal ones are the same way, and a compiled call may hold one."""

    dithers = False  # whether `write` needs a dither
    block = (
        1  # how many elements are kept together, so that no part of a variable may end between them
    )

    @abstractmethod
    def specs(self, role: str) -> list[Spec]:
        """Return the state variables that it needs for a number of this role."""

    @abstractmethod
    def read(self, arrays: list[Tensor], dtype: str) -> Tensor:
        """Return the numbers in `dtype`, the dtype of the update."""

    @abstractmethod
    def write(self, value: Tensor, dither: Tensor | None) -> list[Tensor]:
        """Return what the arrays are to hold, in their dtypes."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of the state variables for a variable of `shape`."""
        return math.prod(shape) * sum(_BYTES[spec.dtype] for spec in self.specs(""))


@dataclass(frozen=True)
class AsItIs(Storage):
    """One array of a dtype that holds the number, or rounds it to nearest."""

    dtype: str

    def specs(self, role: str) -> list[Spec]:
        return [Spec(role, self.dtype)]

    def read(self, arrays: list[Tensor], dtype: str) -> Tensor:
        return ops.cast(arrays[0], dtype)

    def write(self, value: Tensor, dither: Tensor | None) -> list[Tensor]:
        return [ops.cast(value, self.dtype)]


@dataclass(frozen=True)
class Dithered(AsItIs):
    """One array of half precision, rounded up as often as the number is near the upper neighbour."""

    dithers = True

    def write(self, value: Tensor, dither: Tensor | None) -> list[Tensor]:
        rounded = rule.rounded(ops.cast(value, "float32"), self.dtype, dither)
        return [ops.cast(rounded, self.dtype)]


@dataclass(frozen=True)
class Uncompensated(AsItIs):
    """A model's variable itself, which is no state of the optimizer."""

    def specs(self, role: str) -> list[Spec]:
        return []


@dataclass(frozen=True)
class Compensated(Storage):
    """A model's variable of half precision, and a second array with what rounding took from it."""

    dtype: str
    dithers = True

    def specs(self, role: str) -> list[Spec]:
        return [Spec("compensation", self.dtype)]

    def read(self, arrays: list[Tensor], dtype: str) -> Tensor:
        value, lost = (ops.cast(x, dtype) for x in arrays)
        return rule.joined(value, lost, self.dtype)

    def write(self, value: Tensor, dither: Tensor | None) -> list[Tensor]:
        return [ops.cast(x, self.dtype) for x in rule.split(value, self.dtype, dither)]


def for_moment(dtype: str) -> Storage:
    """Return how a moment is kept in `dtype`."""
    return Dithered(dtype) if dtype in HALF else AsItIs(dtype)


def for_variable(dtype: str, kahan_sum: bool | None) -> Storage:
    """Return how a model's variable of `dtype` is kept."""
    if dtype in HALF and kahan_sum is not False:
        return Compensated(dtype)
    return Uncompensated(dtype)
