"""The bits of a tensor as a tensor of another dtype of the same width: what `ops.view` is from Keras 3.12 on."""

from typing import Any

import keras


def view(x: Any, dtype: str) -> Any:
    """Return a tensor of the active backend with the bits of `x`, read as `dtype`."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.bitcast(x, dtype)
    if backend == "torch":
        import torch

        return x.view(getattr(torch, dtype))
    return x.view(dtype)
