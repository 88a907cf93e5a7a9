"""Conversions of arrays between Keras's layouts and PyTorch's."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from keras_adam.paths import path_of

# A variable's kind is read from its name and its layer's name. Keras gives layers these names; a layer that the user
# named may need `convert`.
_INTO_HEADS = ("query", "key", "value")
_OUT_OF_HEADS = "attention_output"
_EINSUM = "einsum_dense"
_DEPTHWISE = "depthwise_conv"
_GATES_IN_ANOTHER_ORDER = "gru_cell"


class Layouts:
    """Conversions between both layouts, for the variables of one optimizer.

    `convert` is a user's function `(variable, array) -> array`, or None for the default. `alike` are variables with
    the same layout in PyTorch: there they are parameters of a Keras model.
    """

    def __init__(self, variables, convert: Callable | None, alike: Iterable[Any] = ()):
        self._alike = {id(v) for v in alike}
        self._by_path: Mapping[str, Any] = {path_of(v): v for v in variables}
        self._convert = convert or (lambda variable, array: None)

    def from_torch(self, variable, array: np.ndarray) -> np.ndarray:
        """Convert an array from PyTorch's layout to the variable's; for a misfit, raise a ValueError."""
        shape = tuple(variable.shape)
        converted = self._convert(variable, array)
        if converted is None:
            converted = self._from_torch(variable, shape, array)
        if converted is None or np.shape(converted) != shape:
            raise ValueError(
                f"'{path_of(variable)}' has shape {shape}, which PyTorch's array of shape {array.shape} does not "
                "fit. Give the right order in `variables`, or the conversion in `convert`"
            )
        return np.array(
            converted
        )  # a copy: JAX may take over an array's memory, and its owner may write to it

    def to_torch(self, variable, array: np.ndarray) -> np.ndarray:
        """Convert an array from the variable's layout to PyTorch's, in new memory."""
        converted = self._convert(variable, array)
        if converted is None:
            converted = self._to_torch(variable, array)
        return np.array(converted, order="C")

    def read_moments(self, variable, moments: dict[str, Any] | None, amsgrad: bool):
        """Return the step and the arrays of one parameter of a state dict; zeros if it has had no step."""
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad
        if not moments:
            return 0, {name: np.zeros(tuple(variable.shape), "float32") for name in names}
        for name in ("step", *names):
            if name not in moments:
                raise ValueError(
                    f"The state of '{path_of(variable)}' in the state dict lacks '{name}'"
                    + ": create the optimizer with `amsgrad=False`."
                    * (name == names[-1] and amsgrad)
                )
        arrays = {name: self.from_torch(variable, to_numpy(moments[name])) for name in names}
        step = float(to_numpy(moments["step"]))
        if not step >= 0 or step != int(step):
            raise ValueError(
                f"The `step` of '{path_of(variable)}' must be a whole number. Received: step={step}"
            )
        return int(step), arrays

    def _from_torch(self, variable, shape: tuple[int, ...], array: np.ndarray):
        kind = self._kind(variable)
        if kind == "as it is":
            return array
        if kind == "bias of heads":
            return array.reshape(shape) if array.shape == (math.prod(shape),) else None
        if kind == "matrix of heads":
            size = math.prod(shape)
            splits = [math.prod(shape[:i]) for i in self._axes_in(variable)]
            fits = any(array.shape == (size // max(rows, 1), rows) for rows in splits)
            return array.T.reshape(shape) if fits else None
        if kind == "depthwise":
            channels, multiplier = shape[-2:]
            fits = array.shape == (channels * multiplier, 1, *shape[:-2])
            return _to_the_end(array.reshape(shape[-2:] + shape[:-2]), (0, 1)) if fits else None
        if kind == "kernel":
            return _to_the_end(array, (1, 0)) if array.ndim == len(shape) else None
        return None

    def _to_torch(self, variable, array: np.ndarray) -> np.ndarray:
        kind = self._kind(variable)
        if kind == "bias of heads":
            return array.reshape(-1)
        if kind == "matrix of heads":
            splits = self._axes_in(variable)
            if len(splits) > 1:
                raise ValueError(
                    f"Input and output axes of '{path_of(variable)}' cannot be told apart without a bias that has all "
                    f"output axes: give the conversion in `convert`. Received: shape {array.shape}"
                )
            return array.reshape((math.prod(array.shape[: splits[0]]), -1)).T
        if kind == "depthwise":
            first = _to_the_front(array, (0, 1))
            return first.reshape((-1, 1, *first.shape[2:]))
        if kind == "kernel":
            return _to_the_front(array, (1, 0))
        if kind == "unknown":
            raise ValueError(
                f"PyTorch has the gates of '{path_of(variable)}' in another order: give the conversion in `convert`"
            )
        return array

    def _kind(self, variable) -> str:
        *parents, name = path_of(variable).split("/")
        layer = parents[-1] if parents else ""
        rank = len(variable.shape)
        if id(variable) in self._alike:
            return "as it is"
        heads = layer in (*_INTO_HEADS, _OUT_OF_HEADS) or layer.startswith(_EINSUM)
        if layer.startswith(_GATES_IN_ANOTHER_ORDER):
            return "unknown"
        if name == "depthwise_kernel" or (name == "kernel" and layer.startswith(_DEPTHWISE)):
            return "depthwise"
        if name == "kernel" and heads and rank > 2:
            return "matrix of heads"
        if name == "bias" and heads and rank > 1:
            return "bias of heads"
        if name in ("kernel", "pointwise_kernel", "recurrent_kernel") and rank >= 2:
            return "kernel"
        return "as it is"

    def _axes_in(self, variable) -> list[int]:
        """Return how many of a kernel's axes are input axes, the first ones; several numbers if it is uncertain."""
        parent, _, _ = path_of(variable).rpartition("/")
        layer = parent.rpartition("/")[2]
        rank = len(variable.shape)
        if layer in _INTO_HEADS:
            return [1]
        if layer == _OUT_OF_HEADS:
            return [rank - 1]
        bias = self._by_path.get(f"{parent}/bias")
        if bias is None or tuple(bias.shape) != tuple(variable.shape)[rank - len(bias.shape) :]:
            return list(range(1, rank))
        return [rank - len(bias.shape)]


def to_numpy(value: Any) -> np.ndarray:
    """Return a value as an array; a tensor of PyTorch is converted without an import of PyTorch."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # NumPy has no bfloat16.
        value = value.float() if str(value.dtype) in ("torch.bfloat16", "torch.float16") else value
        return value.numpy()
    return np.asarray(value)


def _to_the_end(array: np.ndarray, order: tuple[int, int]) -> np.ndarray:
    """Move the two channel axes, which PyTorch has first, to the end in `order`."""
    return array.transpose((*range(2, array.ndim), *order))


def _to_the_front(array: np.ndarray, order: tuple[int, int]) -> np.ndarray:
    """Move the last two axes to the front in `order`."""
    spatial = array.ndim - 2
    return array.transpose((*(spatial + i for i in order), *range(spatial)))
