"""Single steps with given gradients, as a plain call and as `fit` compiles them."""

import keras
import numpy as np
import pytest

BACKEND = keras.backend.backend()
KERAS = tuple(int(number) for number in keras.__version__.split(".")[:2])


def to_tensor(gradient, variable):
    if gradient is None or not isinstance(gradient, np.ndarray | np.generic | float | list):
        return gradient
    return keras.ops.convert_to_tensor(gradient, dtype=variable.dtype)


def sparse_gradient(indices, values, shape):
    """Rows of a gradient, in the backend's own kind of sparse tensor."""
    indices, values = np.asarray(indices, "int32"), np.asarray(values, "float32")
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.IndexedSlices(tf.constant(values), tf.constant(indices), tf.constant(shape))
    if BACKEND == "jax":
        import jax.numpy as jnp
        from jax.experimental.sparse import BCOO

        return BCOO((jnp.array(values), jnp.array(indices[:, None])), shape=shape)
    import torch

    indices, values = torch.tensor(indices[None].astype("int64")), torch.tensor(values)
    return torch.sparse_coo_tensor(indices, values, shape)


def eager_step(optimizer, variables):
    def step(*gradients):
        tensors = [to_tensor(g, v) for g, v in zip(gradients, variables, strict=True)]
        optimizer.apply(tensors, variables)

    return step


def compiled_step(optimizer, variables):
    return _COMPILED[BACKEND](optimizer, variables)


def _jax_step(optimizer, variables):
    import jax

    optimizer.build(variables)
    compiled = jax.jit(optimizer.stateless_apply)

    def step(*gradients):
        tensors = [to_tensor(g, v) for g, v in zip(gradients, variables, strict=True)]
        known = [*variables, *optimizer.variables]
        values, state = compiled(
            [v.value for v in optimizer.variables], tensors, [v.value for v in variables]
        )
        for variable, value in zip(known, [*values, *state], strict=True):
            variable.assign(value)

    return step


def _tensorflow_step(optimizer, variables):
    import tensorflow as tf

    optimizer.build(variables)
    # Without AutoGraph, as Keras compiles its train step.
    compiled = tf.function(lambda tensors: optimizer.apply(tensors, variables), autograph=False)

    def step(*gradients):
        compiled([to_tensor(g, v) for g, v in zip(gradients, variables, strict=True)])

    return step


_COMPILED = {"jax": _jax_step, "tensorflow": _tensorflow_step, "torch": eager_step}

either_way = pytest.mark.parametrize(
    "make_step",
    [eager_step] if BACKEND == "torch" else [eager_step, compiled_step],
    ids=lambda f: f.__name__,
)


def values_of(tensors):
    return [value_of(tensor) for tensor in tensors]


def value_of(tensor):
    """Return a float64 copy, since torch goes on writing to a variable's memory."""
    if keras.backend.standardize_dtype(tensor.dtype) == "bfloat16":
        tensor = keras.ops.cast(tensor, "float32")
    return np.array(keras.ops.convert_to_numpy(tensor), dtype="float64")


def slots(optimizer, role):
    """The optimizer's variables of a kind: "momentum", "average", "gradient_accumulator"..."""
    return [v for v in optimizer.variables if v.path.endswith(f"_{role}")]
