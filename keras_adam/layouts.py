"""How PyTorch lays out the arrays that Keras's layers lay out another way."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_adam.paths import path_of

# Parts of a path that tell what a kernel of more than two axes is; Keras gives its own layers these names.
_ATTENTION = ("query", "key", "value", "attention_output")
_DEPTHWISE = ("depthwise_conv",)
_GATED_OTHERWISE = ("gru",)


def from_torch(variable, array: np.ndarray, convert: Callable) -> np.ndarray:
    """Return an array of PyTorch's layout in the variable's, or raise a ValueError that names both shapes."""
    converted = convert(variable, array)
    shape = tuple(variable.shape)
    if converted is None:
        converted = _from_torch(variable, shape, array)
    converted = None if converted is None else np.asarray(converted)
    if converted is None or converted.shape != shape:
        raise ValueError(
            f"'{path_of(variable)}' has shape {shape}, which PyTorch's array of shape {array.shape} does not fit"
            f"{_order_hint(variable)}. Give the right order in `variables`, or the conversion in `convert`"
        )
    return converted


def to_torch(variable, array: np.ndarray, convert: Callable) -> np.ndarray:
    """Return an array of the variable's layout in PyTorch's, in memory of its own."""
    converted = convert(variable, array)
    if converted is None:
        converted = _to_torch(variable, array)
    return np.array(converted, order="C")


def read_moments(variable, moments: dict[str, Any] | None, amsgrad: bool, convert: Callable):
    """Return the step and the arrays of one parameter of a state dict; zeros if it has had no step."""
    names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad
    if not moments:
        return 0, {name: np.zeros(tuple(variable.shape), "float32") for name in names}
    for name in ("step", *names):
        if name not in moments:
            raise ValueError(
                f"The state of '{path_of(variable)}' in the state dict lacks '{name}'."
            )
    arrays = {name: from_torch(variable, _to_numpy(moments[name]), convert) for name in names}
    step = float(_to_numpy(moments["step"]))
    if step < 0 or step != int(step):
        raise ValueError(
            f"The `step` of '{path_of(variable)}' must be a whole number. Received: step={step}"
        )
    return int(step), arrays


def _from_torch(variable, shape: tuple[int, ...], array: np.ndarray) -> np.ndarray | None:
    kind = _kind(variable)
    if kind == "depthwise":
        return (
            _rows_last(array.reshape(shape[-2:] + array.shape[2:]), (0, 1))
            if (array.size == math.prod(shape) and array.ndim == len(shape))
            else None
        )
    if kind == "einsum":
        return (
            array.T.reshape(shape) if array.size == math.prod(shape) and array.ndim == 2 else None
        )
    if kind == "kernel":
        return _rows_last(array, (1, 0)) if array.ndim == len(shape) else None
    if kind == "bias of heads":
        return array.reshape(shape) if array.size == math.prod(shape) else None
    return array


def _to_torch(variable, array: np.ndarray) -> np.ndarray:
    kind = _kind(variable)
    if kind == "depthwise":
        first = _channels_first(array, (0, 1))
        return first.reshape((-1, 1, *first.shape[2:]))
    if kind == "einsum":
        # The features that come in are the first axis; of an attention's output, all but the last.
        output = "attention_output" in path_of(variable).split("/")
        rows = math.prod(array.shape[:-1]) if output else array.shape[0]
        return array.reshape((rows, -1)).T
    if kind == "kernel":
        return _channels_first(array, (1, 0))
    if kind == "bias of heads":
        return array.reshape(-1)
    return array


def _rows_last(array: np.ndarray, order: tuple[int, int]) -> np.ndarray:
    """Move the two channel axes, which PyTorch has first, to the end in `order`."""
    return array.transpose((*range(2, array.ndim), *order))


def _channels_first(array: np.ndarray, order: tuple[int, int]) -> np.ndarray:
    """Move the last two axes to the front in `order`."""
    spatial = array.ndim - 2
    return array.transpose((*(spatial + i for i in order), *range(spatial)))


def _kind(variable) -> str:
    """Tell how PyTorch lays out the variable, by Keras's own names; a user's layer may need `convert`."""
    *parents, name = path_of(variable).split("/")
    rank = len(variable.shape)
    einsum = any(p in _ATTENTION or p.startswith("einsum_dense") for p in parents)
    if any(part.startswith(_GATED_OTHERWISE) for part in parents) and rank > 0:
        return "unknown"
    if name == "depthwise_kernel" or (
        name == "kernel" and any(part.startswith(_DEPTHWISE) for part in parents)
    ):
        return "depthwise"
    if name == "kernel" and einsum and rank > 2:
        return "einsum"
    if name == "bias" and einsum and rank > 1:
        return "bias of heads"
    if name in ("kernel", "pointwise_kernel", "recurrent_kernel") and rank >= 2:
        return "kernel"
    return "as it is"


def _order_hint(variable) -> str:
    if _kind(variable) == "unknown":
        return " as PyTorch orders the gates otherwise"
    return ""


def _to_numpy(value: Any) -> np.ndarray:
    # A tensor of PyTorch, without importing it: it may require a gradient, or be in bfloat16, which NumPy lacks.
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) in ("torch.bfloat16", "torch.float16") else value
        return value.numpy()
    return np.asarray(value)
