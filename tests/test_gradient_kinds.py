"""Gradients of unusual kinds and shapes, which Keras's Adam takes too."""

import keras
import numpy as np
import pytest

import keras_adam
from support import reference
from support.tolerances import TOLERANCES

BACKEND = keras.backend.backend()
FLOAT32 = TOLERANCES["float32"]
NINE = (2, 1, 3, 1, 1, 2, 1, 1, 1)

only_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="kinds of TensorFlow's own")

RANK_OPTIONS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "corrected": {"amsgrad": "corrected"},
    "decay": {"weight_decay": 0.1},
    "clipnorm": {"clipnorm": 0.5},
    "accumulation": {"gradient_accumulation_steps": 2},
    "average": {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
}


@pytest.mark.short("plain-float32", "amsgrad-bfloat16", "accumulation-float16")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", RANK_OPTIONS.values(), ids=RANK_OPTIONS)
def test_nine_axes(options, dtype):
    rng = np.random.default_rng(0)
    start = rng.choice([0.5, 1.0, -2.0], NINE)  # exact in each dtype
    gradients = rng.choice([0.25, -0.5, 2.0], (4, *NINE))
    variable = keras.Variable(start, dtype=dtype, name="nine")
    # With groups the betas are tensors, which choose how an average is moved.
    optimizer = keras_adam.Adam(0.02, param_groups=[], **options)
    expected = reference.Adam([start], learning_rate=0.02, **options)
    for g in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(g, dtype)], [variable])
        expected.step([g])
    actual = keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32"))
    np.testing.assert_allclose(actual, expected.parameters[0], **TOLERANCES[dtype])


ARRAYS = {
    "variable": lambda g: keras.Variable(g, dtype="float32"),
    "NumPy": lambda g: np.array(g),
    "list": lambda g: g,
    "whole numbers": lambda g: np.array(g, "int32"),
}


@pytest.mark.parametrize("mode", ["whole", "pieces", *["stateless"] * (BACKEND == "jax")])
@pytest.mark.parametrize("kind", ARRAYS)
def test_gradients_that_are_no_tensors(kind, mode):
    """A gradient may be a variable in which a custom loop sums gradients; `mode` is how JAX takes the step."""
    starts, gradients = [[1.0, 2.0], 3.0], [[2.0, -1.0], 4.0]
    variables = [keras.Variable(x) for x in starts]
    optimizer = keras_adam.Adam(0.1, weight_decay=0.1)
    expected = reference.Adam(starts, learning_rate=0.1, weight_decay=0.1)
    given = [ARRAYS[kind](g) for g in gradients]
    if mode == "pieces":
        optimizer.build(variables)
        optimizer.learning_rate = lambda: 0.1  # such a step is not compiled
    for _ in range(3):
        expected.step(gradients)
        if mode != "stateless":
            optimizer.apply(given, variables)
            continue
        optimizer.build(variables)
        known = variables, optimizer.variables
        values = [[keras.ops.copy(v.value) for v in of_kind] for of_kind in known]
        new = optimizer.stateless_apply(values[1], given, values[0])
        for of_kind, renewed in zip(known, new, strict=True):
            for variable, value in zip(of_kind, renewed, strict=True):
                variable.assign(value)
    for variable, value in zip(variables, expected.parameters, strict=True):
        np.testing.assert_allclose(variable.numpy(), value, **FLOAT32)


def test_nine_axes_overwritten_with_averages():
    start = np.full(NINE, 2.0)
    variable = keras.Variable(start, dtype="float32", name="nine")
    optimizer = keras_adam.Adam(0.02, use_ema=True, ema_momentum=0.5)
    for _ in range(3):
        optimizer.apply([keras.ops.ones(NINE)], [variable])
    optimizer.finalize_variable_values([variable])
    # Each step is one of 0.02; the average starts from the first value.
    expected = 0.5 * (0.5 * 1.98 + 0.5 * 1.96) + 0.5 * 1.94
    np.testing.assert_allclose(variable.numpy(), np.full(NINE, expected), **FLOAT32)


def step_of_unknown_shape(optimizer, variable, shape=None, dtype="float32"):
    import tensorflow as tf

    optimizer.build([variable])

    @tf.function(input_signature=[tf.TensorSpec(shape, dtype)])
    def step(gradient):
        optimizer.apply([gradient], [variable])

    return step


UNKNOWN_OPTIONS = {
    **RANK_OPTIONS,
    "lazy": {"lazy": True},
    "skip_nonfinite": {"skip_nonfinite": True},
    "loss_scale": {"loss_scale_factor": 4.0},
}
NOT_OF_THE_RULE = ("lazy", "skip_nonfinite")


@pytest.mark.short(
    "plain-float32",
    "amsgrad-bfloat16",
    "accumulation-float32",
    "lazy-bfloat16",
    "skip_nonfinite-float32",
)
@only_tensorflow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", UNKNOWN_OPTIONS.values(), ids=UNKNOWN_OPTIONS)
def test_gradient_of_unknown_rank(options, dtype):
    import tensorflow as tf

    start = np.array([[1.0, -2.0], [0.5, 4.0]])
    variable = keras.Variable(start, dtype=dtype, name="w")
    step = step_of_unknown_shape(keras_adam.Adam(0.02, **options), variable, dtype=dtype)
    expected = reference.Adam(
        [start],
        learning_rate=0.02,
        **{k: v for k, v in options.items() if k not in NOT_OF_THE_RULE},
    )
    rng = np.random.default_rng(0)
    for g in rng.choice([0.25, -0.5, 2.0], (4, 2, 2)):
        step(tf.constant(g, dtype))
        expected.step([g])
    actual = keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32"))
    np.testing.assert_allclose(actual, expected.parameters[0], **TOLERANCES[dtype])


@only_tensorflow
def test_gradient_of_a_python_function():
    import tensorflow as tf

    variable = keras.Variable(np.ones((4, 2)), dtype="float32", name="w")
    optimizer = keras_adam.Adam(0.1)
    optimizer.build([variable])

    @tf.function
    def step():
        optimizer.apply([tf.py_function(lambda: tf.ones((4, 2)), [], tf.float32)], [variable])

    step()
    np.testing.assert_allclose(variable.numpy(), 0.9, rtol=1e-6)


@only_tensorflow
@pytest.mark.parametrize("shape", [None, (None,), (None, 2)])
def test_gradient_whose_shape_turns_out_wrong(shape):
    """A value that would broadcast is refused when the graph runs, or when the graph is made if its rank is known."""
    import tensorflow as tf

    variable = keras.Variable(np.ones((4, 2)), dtype="float32", name="w")
    step = step_of_unknown_shape(keras_adam.Adam(0.1), variable, shape)
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError), match=r"shape"):
        step(tf.ones((2,) if shape == (None,) else (1, 2)))
    np.testing.assert_array_equal(variable.numpy(), 1.0)


def forms():
    import tensorflow as tf

    values, indices, shape = [[1.0, -2.0], [3.0, 4.0]], [3, 1], [4, 2]
    return {
        "shape: tuple": (tf.constant(values), tf.constant(indices), (4, 2)),
        "shape: list": (tf.constant(values), tf.constant(indices), shape),
        "shape: TensorShape": (tf.constant(values), tf.constant(indices), tf.TensorShape(shape)),
        "shape: array": (tf.constant(values), tf.constant(indices), np.array(shape)),
        "shape: int64": (tf.constant(values), tf.constant(indices), tf.constant(shape, tf.int64)),
        "indices: list": (tf.constant(values), indices, tf.constant(shape)),
        "indices: array": (tf.constant(values), np.array(indices), tf.constant(shape)),
        "indices: uint8": (tf.constant(values), np.array(indices, "uint8"), tf.constant(shape)),
        "values: list": (values, indices, shape),
        "values: array": (np.array(values, "float32"), indices, shape),
        "no rows": (tf.zeros((0, 2)), [], shape),
    }


@only_tensorflow
@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("form", forms() if BACKEND == "tensorflow" else [])
def test_forms_of_indexed_slices(form, lazy, in_graph):
    import tensorflow as tf

    parts = forms()[form]
    variable = keras.Variable(np.ones((4, 2)), dtype="float32", name="embedding")
    optimizer = keras_adam.Adam(0.1, lazy=lazy)
    optimizer.build([variable])

    def step():
        optimizer.apply([tf.IndexedSlices(*parts)], [variable])

    step = tf.function(step) if in_graph else step
    step()
    expected = np.ones((4, 2))
    if form != "no rows":
        expected[3], expected[1] = [0.9, 1.1], [0.9, 0.9]
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-6)


@only_tensorflow
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("unknown", ["values", "indices", "both"])
def test_indexed_slices_of_unknown_rank(unknown, lazy):
    import tensorflow as tf

    variable = keras.Variable(np.ones((4, 2)), dtype="float32", name="embedding")
    optimizer = keras_adam.Adam(0.1, lazy=lazy)
    optimizer.build([variable])
    signature = [
        tf.TensorSpec([None, 2] if unknown == "indices" else None),
        tf.TensorSpec([None] if unknown == "values" else None, tf.int32),
    ]

    @tf.function(input_signature=signature)
    def step(values, indices):
        optimizer.apply([tf.IndexedSlices(values, indices, tf.constant([4, 2]))], [variable])

    step(tf.ones((2, 2)), tf.constant([3, 1]))
    np.testing.assert_allclose(variable.numpy()[:, 0], [1.0, 0.9, 1.0, 0.9], rtol=1e-6)


NEGATIVE = {"some": [1, -1, 1, -4], "all": [-1, -1, -3, -4], "beyond": [-9, 2, 1, -5]}


@only_tensorflow
@pytest.mark.parametrize("how", ["eager", "graph", "xla"])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("indices", NEGATIVE.values(), ids=NEGATIVE)
def test_negative_indices_are_left_out(indices, lazy, how):
    """TensorFlow's own conversion leaves them out, and so does Keras's Adam. They are not part of a norm either."""
    import tensorflow as tf

    values = np.array([[1.0, 2.0], [np.nan, 40.0], [3.0, -4.0], [50.0, 60.0]], "float32")
    values[[i for i, at in enumerate(indices) if at >= 0]] = 1.5
    options = {"global_clipnorm": 1.0}

    def trained(optimizer):
        variable = keras.Variable(np.arange(8.0).reshape(4, 2), dtype="float32", name="embedding")
        optimizer.build([variable])

        def step():
            gradient = tf.IndexedSlices(tf.constant(values), tf.constant(indices), (4, 2))
            optimizer.apply([gradient], [variable])

        step = step if how == "eager" else tf.function(step, jit_compile=how == "xla")
        step()  # in a first step, rows that are not touched stay
        return variable.numpy()

    actual = trained(keras_adam.Adam(0.1, lazy=lazy, **options))
    assert np.isfinite(actual).all()
    whole = np.zeros((4, 2))
    for at, row in zip(indices, values, strict=True):
        whole[at if at >= 0 else 0] += row if at >= 0 else 0
    expected = reference.Adam([np.arange(8.0).reshape(4, 2)], learning_rate=0.1, **options)
    expected.step([whole])
    np.testing.assert_allclose(actual, expected.parameters[0], **FLOAT32)


@only_tensorflow
def test_rows_left_out_keep_their_moments():
    import tensorflow as tf

    variable = keras.Variable(np.ones((4, 2)), dtype="float32", name="embedding")
    optimizer = keras_adam.Adam(0.1, lazy=True)
    for indices in ([0, 3], [-1, -4]):
        optimizer.apply([tf.IndexedSlices(tf.ones((2, 2)), indices, (4, 2))], [variable])
    np.testing.assert_allclose(variable.numpy()[:, 0], [0.9, 1.0, 1.0, 0.9], rtol=1e-6)
    np.testing.assert_allclose(optimizer._momentums[0].numpy()[:, 0], [0.1, 0, 0, 0.1], rtol=1e-6)


@pytest.mark.skipif(BACKEND != "jax", reason="PyTorch refuses negative indices itself")
def test_negative_indices_count_from_the_end():
    """As in the dense gradient that JAX makes of them."""
    import jax.numpy as jnp
    from jax.experimental.sparse import BCOO

    gradient = BCOO((jnp.array([[1.0, 2.0], [3.0, -4.0]]), jnp.array([[1], [-1]])), shape=(4, 2))
    start = np.arange(8.0).reshape(4, 2)
    expected = reference.Adam([start], learning_rate=0.1)
    expected.step([gradient.todense()])
    assert gradient.todense()[3, 0] == 3.0
    for lazy in (False, True):
        variable = keras.Variable(start, dtype="float32", name="embedding")
        keras_adam.Adam(0.1, lazy=lazy).apply([gradient], [variable])
        np.testing.assert_allclose(variable.numpy(), expected.parameters[0], **FLOAT32)


@only_tensorflow
def test_a_ragged_gradient_is_refused():
    import tensorflow as tf

    variable = keras.Variable(np.ones((2, 2)), dtype="float32", name="w")
    with pytest.raises(TypeError, match=r"must be a tensor.*to_tensor.*Received: a RaggedTensor"):
        keras_adam.Adam().apply([tf.ragged.constant([[1.0, 2.0], [3.0]])], [variable])
