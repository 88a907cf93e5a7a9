"""Operations that `keras.ops` lacks, at least in Keras 3.10."""

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


def greatest(x: Any) -> Any:
    """Return the greatest along the last axis, also of a tensor without elements, which Keras refuses."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.reduce_max(x, axis=-1)
    return x.amax(-1) if backend == "torch" else x.max(-1)


def _root():
    """Return the active backend's square root; on JAX and TensorFlow, with the derivative 0 at 0.

    The true derivative is infinite: times 0, which is the derivative of `g * g` at 0, it gives NaN.
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
    """Return a function `(result, x)` that returns `result`; on JAX, with the derivative of `x`.

    A `result` that was made from the bits of `x` has no derivative of its own.
    """
    if keras.backend.backend() != "jax":
        return lambda result, x: result
    import jax

    function = jax.custom_jvp(lambda result, x: result)
    function.defjvp(lambda primals, tangents: (primals[0], tangents[1]))
    return function


root = _root()
with_derivative_of = _with_derivative_of()
