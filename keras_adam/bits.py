"""Two operations that each backend has under a name of its own, and `keras.ops` lacks, at least in Keras 3.10."""

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


def _root():
    """Return the square root of tensors of the active backend; on JAX and TensorFlow, its derivative at 0 is 0.

    The true one is infinite, and what is multiplied by it then, such as the derivative of `g * g` at 0, would be NaN.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        square_root = jax.custom_jvp(jax.numpy.sqrt)

        @square_root.defjvp
        def _(primals, tangents):
            y = square_root(*primals)
            slope = jax.numpy.where(y > 0, 0.5 / jax.numpy.where(y > 0, y, 1), 0)
            return y, slope * tangents[0]

        return square_root
    if backend == "tensorflow":
        import tensorflow as tf

        @tf.custom_gradient
        def square_root(x):
            y = tf.sqrt(x)
            return y, lambda upstream: tf.math.divide_no_nan(0.5 * upstream, y)

        return square_root
    return keras.ops.sqrt


def _with_derivative_of():
    """Return a function `(result, x)` that gives `result`; on JAX, as if its derivative were that of `x`.

    Where `result` comes from the bits of `x` it has none of its own.
    """
    if keras.backend.backend() != "jax":
        return lambda result, x: result
    import jax

    function = jax.custom_jvp(lambda result, x: result)
    function.defjvp(lambda primals, tangents: (primals[0], tangents[1]))
    return function


root = _root()
with_derivative_of = _with_derivative_of()
