"""How a number per element is kept between steps: as it is, dithered in fewer bits, in two parts, or in blocks.

A `Storage` says which arrays it needs, reads numbers from them, and writes numbers to them. It knows no variable, no
backend and no optimizer. The equations of rounding are in `keras_adam.rule`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_adam import rule
from keras_adam.tensors import compute_dtype

Tensor = Any
HALF = ("bfloat16", "float16")
STATE_DTYPES = (None, "float32", "bfloat16", "8bit")
MOMENTS = ("momentum", "velocity", "velocity_hat")  # each may be kept in blocks
SCALE = "_scale"  # the end of the role of the scales of blocks
_BYTES = {"uint8": 1, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
_LEAST_IN_8_BITS = 4096  # elements of a variable
_LEAST_IN_ROW = 64  # elements of a row, where each has blocks of its own


class Spec(NamedTuple):
    """One array that a storage needs: its role in files, its dtype, its shape; None is the variable's shape.

    Devices that share the array, or that with the codes of these scales, each hold a multiple of `unit` elements.
    """

    role: str
    dtype: str
    shape: tuple[int, ...] | None = None
    unit: int = 1


class Storage(ABC):
    """One way to keep a number per element; hashable, so that it can be a constant of a compiled call."""

    dithers = False  # whether `write` needs a dither

    @abstractmethod
    def specs(self, role: str, shape: tuple[int, ...]) -> list[Spec]:
        """Return the state variables needed for numbers of this role and of a variable of `shape`."""

    @abstractmethod
    def read(self, arrays: list[Tensor], dtype: str) -> Tensor:
        """Return the numbers in `dtype`, the dtype of the update."""

    @abstractmethod
    def write(self, value: Tensor, dither: Tensor | None) -> list[Tensor]:
        """Return the new values of the arrays, in their dtypes."""

    def numbers(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Do what `read` does, in float32, with arrays of NumPy."""
        tensors = [ops.convert_to_tensor(x) for x in arrays]
        return ops.convert_to_numpy(self.read(tensors, "float32"))

    def arrays_of(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Do what `write` does, rounding to nearest, with arrays of NumPy."""
        parts = self.write(ops.convert_to_tensor(numbers, "float32"), None)
        return [ops.convert_to_numpy(x) for x in parts]

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of the state variables for a variable of `shape`."""
        return sum(
            _BYTES[spec.dtype] * math.prod(shape if spec.shape is None else spec.shape)
            for spec in self.specs("", shape)
        )


@dataclass(frozen=True)
class AsItIs(Storage):
    """One array of a dtype that holds the number, or rounds it to nearest."""

    dtype: str

    def specs(self, role: str, shape: tuple[int, ...]) -> list[Spec]:
        return [Spec(role, self.dtype)]

    def read(self, arrays: list[Tensor], dtype: str) -> Tensor:
        return ops.cast(arrays[0], dtype)

    def write(self, value: Tensor, dither: Tensor | None) -> list[Tensor]:
        return [ops.cast(value, self.dtype)]


@dataclass(frozen=True)
class Dithered(AsItIs):
    """One array of half precision, rounded up or down so that the error is zero on average."""

    dithers = True

    def write(self, value: Tensor, dither: Tensor | None) -> list[Tensor]:
        rounded = rule.rounded(ops.cast(value, "float32"), self.dtype, dither)
        return [ops.cast(rounded, self.dtype)]


@dataclass(frozen=True)
class Uncompensated(AsItIs):
    """A model's variable itself, without any state of the optimizer."""

    def specs(self, role: str, shape: tuple[int, ...]) -> list[Spec]:
        return []


@dataclass(frozen=True)
class Compensated(Storage):
    """A model's variable of half precision, and a second array with what rounding took from it."""

    dtype: str
    dithers = True

    def specs(self, role: str, shape: tuple[int, ...]) -> list[Spec]:
        return [Spec("compensation", self.dtype)]

    def read(self, arrays: list[Tensor], dtype: str) -> Tensor:
        value, lost = (ops.cast(x, dtype) for x in arrays)
        return rule.joined(value, lost, self.dtype)

    def write(self, value: Tensor, dither: Tensor | None) -> list[Tensor]:
        return [ops.cast(x, self.dtype) for x in rule.split(value, self.dtype, dither)]


@dataclass(frozen=True)
class InBlocks(Storage):
    """An array of 8-bit codes, and one float32 scale for each block of 256 elements.

    Args:
        signed: Whether the numbers may be negative, as first moments may; second moments have codes without a zero.
        dithers: Whether numbers are rounded up or down so that the error is zero on average. If not, as for a maximum,
            they are rounded to nearest, and scales are powers of two.
        by_row: Whether each block is within one index of the first axis, so that rows can be read and written alone.
    """

    signed: bool
    dithers: bool = True
    by_row: bool = False

    def specs(self, role: str, shape: tuple[int, ...]) -> list[Spec]:
        rows = shape[:1] if self.by_row else ()
        size = math.prod(shape[len(rows) :])
        scales = (*rows, -(-size // rule.BLOCK))
        unit = size if self.by_row else rule.BLOCK
        return [Spec(role, "uint8", None, unit), Spec(role + SCALE, "float32", scales, unit)]

    def read(self, arrays: list[Tensor], dtype: str) -> Tensor:
        codes, scale = arrays
        decode = rule.signed_values if self.signed else rule.positive_values
        blocks = decode(ops.cast(self._blocks_of(codes), "int32"), scale[..., None])
        return ops.cast(self._joined(blocks, codes), dtype)

    def write(self, value: Tensor, dither: Tensor | None) -> list[Tensor]:
        encode = rule.signed_codes if self.signed else rule.positive_codes
        blocks = self._blocks_of(ops.cast(value, "float32"))
        scale = rule.largest(blocks)
        if not self.dithers:
            scale = rule.power_of_two(scale)
        is_dithered = self.dithers and dither is not None
        codes = encode(blocks, scale[..., None], dither if is_dithered else 0.5)
        return [self._joined(ops.cast(codes, "uint8"), value), scale]

    def _blocks_of(self, x: Tensor) -> Tensor:
        """Return the elements in blocks, the last axis; the last block, or each row's last, is filled with zeros."""
        size = math.prod(x.shape[1:] if self.by_row else x.shape)
        x = ops.reshape(x, (-1, size) if self.by_row else (size,))
        missing = -size % rule.BLOCK
        if missing:
            x = ops.pad(x, [(0, 0)] * self.by_row + [(0, missing)])
        blocks = (size + missing) // rule.BLOCK
        return ops.reshape(x, ((-1,) if self.by_row else ()) + (blocks, rule.BLOCK))

    def _joined(self, blocks: Tensor, like: Tensor) -> Tensor:
        """Return the elements in the shape of `like`."""
        size = math.prod(like.shape[1:] if self.by_row else like.shape)
        whole = ops.reshape(blocks, (-1, blocks.shape[-2] * rule.BLOCK) if self.by_row else (-1,))
        return ops.reshape(whole[..., :size], ops.shape(like))


def for_moment(
    state_dtype: str | None,
    variable: Any,
    *,
    signed: bool,
    dithers: bool = True,
    by_row: bool = False,
) -> Storage:
    """Return how a moment of a variable is kept.

    Args:
        state_dtype: One of `STATE_DTYPES`.
        variable: The variable; its dtype and shape decide.
        signed: Whether it is a first moment.
        dithers: Whether 8 bits are dithered. Defaults to `True`.
        by_row: Whether rows are read and written alone. Defaults to `False`.
    """
    wide, shape = compute_dtype(variable.dtype), tuple(variable.shape)
    if state_dtype != "8bit":
        dtype = state_dtype or wide
        return Dithered(dtype) if dtype in HALF else AsItIs(dtype)
    is_large = math.prod(shape) >= _LEAST_IN_8_BITS
    if by_row:
        is_large = is_large and math.prod(shape[1:]) >= _LEAST_IN_ROW
    if wide != "float32" or not is_large:
        return AsItIs(wide)
    return InBlocks(signed, dithers, by_row)


def for_variable(dtype: str, kahan_sum: bool | None) -> Storage:
    """Return how a model's variable of `dtype` is kept."""
    if dtype in HALF and kahan_sum is not False:
        return Compensated(dtype)
    return Uncompensated(dtype)
