"""`lazy=True`: sparse gradients update only the rows they touch, as `torch.optim.SparseAdam` does."""

import keras
import numpy as np
import pytest
import torch

import keras_adam
from support import reference
from support.models import assert_close
from support.steps import sparse_gradient
from support.tolerances import TOLERANCES

BACKEND = keras.backend.backend()
ROWS, WIDTH = 11, 3
FLOAT32 = TOLERANCES["float32"]


def sparse(indices, values, shape=(ROWS, WIDTH)):
    return sparse_gradient(indices, values, shape)


def problem(steps):
    rng = np.random.default_rng(0)
    start = rng.standard_normal((ROWS, WIDTH)).astype("float32")
    gradients = []
    for _ in range(steps):
        count = rng.choice([1, 6])  # JAX compiles each anew
        indices = rng.integers(0, ROWS - 1, count)  # the last row is never touched
        gradients.append(
            (indices, rng.standard_normal((count, WIDTH)) * 10.0 ** rng.integers(-4, 2))
        )
    return start, gradients


def dense(indices, values):
    whole = np.zeros((ROWS, WIDTH))
    np.add.at(whole, indices, values)
    return whole


def train(optimizer, start, gradients, compiled=False):
    variable = keras.Variable(start, name="embedding")
    optimizer.build([variable])
    if not compiled or BACKEND == "torch":
        for g in gradients:
            optimizer.apply([sparse(*g)], [variable])
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        # One trace for any number of rows.
        signature = [tf.TensorSpec([None], "int32"), tf.TensorSpec([None, WIDTH], "float32")]

        @tf.function(input_signature=signature)
        def step(indices, values):
            optimizer.apply(
                [tf.IndexedSlices(values, indices, tf.constant([ROWS, WIDTH]))], [variable]
            )

        for indices, values in gradients:
            step(indices.astype("int32"), values.astype("float32"))
    else:
        import jax

        step = jax.jit(optimizer.stateless_apply, donate_argnums=0)
        for g in gradients:
            state = [v.value for v in optimizer.variables]
            values, state = step(state, [sparse(*g)], [variable.value])
            variable.assign(values[0])
            for v, x in zip(optimizer.variables, state, strict=True):
                v.assign(x)
    return variable.numpy(), optimizer


def by_sparse_adam(start, gradients, lr=0.01, eps=1e-8, **options):
    parameter = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = torch.optim.SparseAdam([parameter], lr=lr, eps=eps, **options)
    for indices, values in gradients:
        parameter.grad = torch.sparse_coo_tensor(
            torch.tensor(indices[None]), torch.tensor(values), (ROWS, WIDTH)
        )
        optimizer.step()
    return parameter.detach().numpy()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [{}, {"maximize": True}])
def test_against_sparse_adam(options, compiled):
    start, gradients = problem(60)
    # PyTorch's SparseAdam has epsilon where Keras has it.
    optimizer = keras_adam.Adam(0.01, epsilon=1e-8, lazy=True, **options)
    actual, optimizer = train(optimizer, start, gradients, compiled)
    np.testing.assert_allclose(actual, by_sparse_adam(start, gradients, **options), **FLOAT32)
    np.testing.assert_array_equal(actual[-1], start[-1])
    assert int(optimizer.iterations) == 60


def test_without_lazy_the_result_is_the_dense_one():
    start, gradients = problem(60)
    actual, _ = train(keras_adam.Adam(0.01), start, gradients)
    expected = reference.Adam([start], learning_rate=0.01)
    for g in gradients:
        expected.step([dense(*g)])
    np.testing.assert_allclose(actual, expected.parameters[0], **FLOAT32)


OPTIONS = {
    "amsgrad": {"amsgrad": True},
    "corrected": {"amsgrad": "corrected"},
    "decoupled": {"weight_decay": 0.1},
    "L2": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "loss_scale": {"loss_scale_factor": 8.0},
    "ema": {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3},
}


@pytest.mark.parametrize(
    ("name", "compiled"),
    [*((name, BACKEND == "tensorflow") for name in OPTIONS), ("clipnorm", BACKEND == "jax")],
)
def test_a_gradient_of_all_rows_is_a_dense_one(name, compiled):
    """With every row touched, in any order and some twice, lazy and dense are the same."""
    rng = np.random.default_rng(1)
    start, gradients = rng.standard_normal((ROWS, WIDTH)).astype("float32"), []
    for _ in range(20):
        indices = np.concatenate([rng.permutation(ROWS), rng.integers(0, ROWS, 4)])
        gradients.append((indices, rng.standard_normal((len(indices), WIDTH))))
    optimizer = keras_adam.Adam(0.01, lazy=True, **OPTIONS[name])
    actual, _ = train(optimizer, start, gradients, compiled)
    expected = reference.Adam([start], learning_rate=0.01, **OPTIONS[name])
    for g in gradients:
        expected.step([dense(*g)])
    np.testing.assert_allclose(actual, expected.parameters[0], **FLOAT32)


def test_rows_and_whole_gradients_in_one_step():
    start, gradients = problem(10)
    other = keras.Variable(np.ones(4, "float32"), name="dense")
    variable = keras.Variable(start, name="embedding")
    optimizer = keras_adam.Adam(
        0.01, lazy=True, param_groups=[{"params": "embedding", "learning_rate_multiplier": 2.0}]
    )
    alone, _ = train(keras_adam.Adam(0.02, lazy=True), start, gradients)
    for g in gradients:
        optimizer.apply([keras.ops.ones(4), sparse(*g)], [other, variable])
    np.testing.assert_allclose(variable.numpy(), alone, **FLOAT32)
    np.testing.assert_allclose(other.numpy(), 1 - 0.1, rtol=1e-5)


def test_no_rows_at_all():
    start = np.ones((ROWS, WIDTH), "float32")
    actual, optimizer = train(
        keras_adam.Adam(0.01, lazy=True, clipnorm=1.0),
        start,
        [(np.zeros(0, "int64"), np.zeros((0, WIDTH)))],
    )
    np.testing.assert_array_equal(actual, start)
    assert int(optimizer.iterations) == 1


def test_not_with_accumulation():
    with pytest.raises(ValueError, match="`lazy` must be False with `gradient_accumulation_steps`"):
        keras_adam.Adam(lazy=True, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="`lazy` must be True or False"):
        keras_adam.Adam(lazy="rows")


def test_config():
    assert keras_adam.Adam.from_config(keras_adam.Adam(lazy=True).get_config()).lazy
    assert "lazy" not in keras_adam.Adam().get_config()


def test_wrong_width():
    variable = keras.Variable(np.ones((ROWS, WIDTH), "float32"), name="embedding")
    gradient = sparse([1], np.ones((1, WIDTH + 1)), (ROWS, WIDTH + 1))
    with pytest.raises(ValueError, match="Each gradient must have its variable's shape"):
        keras_adam.Adam(lazy=True).apply([gradient], [variable])


@pytest.mark.parametrize("jit_compile", [False, True])
def test_embedding_in_fit(jit_compile):
    """On TensorFlow an embedding's gradient is sparse; under XLA, too."""
    if BACKEND == "torch" and jit_compile:
        pytest.skip("PyTorch's compiler takes a minute, and its embeddings have dense gradients")
    tokens = np.array([[1, 2, 2], [4, 2, 1]] * 4)
    start = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype("float32")

    def trained(optimizer):
        model = keras.Sequential(
            [keras.Input((3,), dtype="int32"), keras.layers.Embedding(ROWS, WIDTH)]
        )
        model.set_weights([start])
        model.compile(optimizer, loss="mse", jit_compile=jit_compile)
        model.fit(tokens, np.ones((8, 3, WIDTH)), batch_size=2, epochs=2, shuffle=False, verbose=0)
        return model.get_weights()

    # All batches touch the same rows, so that dense and lazy give the same.
    assert_close(trained(keras_adam.Adam(0.1, lazy=True)), trained(keras_adam.Adam(0.1)), rtol=1e-5)


@pytest.mark.skipif(BACKEND != "jax", reason="only JAX fills up its arrays")
@pytest.mark.parametrize("fill", [7.0, np.nan])
def test_padding_counts_for_nothing(fill):
    values = np.ones((4, WIDTH))
    values[2:] = fill
    start = np.zeros((ROWS, WIDTH), "float32")
    options = {"clipnorm": 1.0, "skip_nonfinite": True, "lazy": True}
    padded, _ = train(keras_adam.Adam(**options), start, [([1, -1, ROWS, ROWS], values)])
    plain, _ = train(keras_adam.Adam(**options), start, [([1, ROWS - 1], values[:2])])
    np.testing.assert_array_equal(padded, plain)
    assert padded[1].any()
