"""Training a model in each of the ways that Keras offers, against the NumPy reference."""

import functools

import keras
import numpy as np
import pytest

import keras_adam
from support.models import (
    BATCH,
    BATCHES,
    EVERYTHING,
    START,
    Expected,
    X,
    Y,
    assert_close,
    fit,
    gradients,
    loss,
    make_model,
    weights,
)
from support.steps import BACKEND, KERAS

only = {
    backend: pytest.mark.skipif(BACKEND != backend, reason=f"a feature of {backend}")
    for backend in ("jax", "tensorflow", "torch")
}
DEFAULT = {"learning_rate": 0.02}

COMPILE_OPTIONS = {
    "plain": {},
    "run_eagerly": {"run_eagerly": True},
    "jit_compile": {"jit_compile": True},
    "steps_per_execution": {"steps_per_execution": 3},
}


def test_fit_with_default_options():
    model = make_model(keras_adam.Adam(**DEFAULT))
    fit(model, epochs=2)
    assert_close(weights(model), Expected(DEFAULT).fit(epochs=2).weights)
    assert int(model.optimizer.iterations) == 8


@pytest.mark.parametrize("way", COMPILE_OPTIONS)
def test_fit(way, monkeypatch):
    if BACKEND == "torch" and way == "steps_per_execution":
        pytest.skip("Keras has it on the other backends only")
    if BACKEND == "torch" and way == "jit_compile":
        if KERAS == (3, 10):
            pytest.skip("PyTorch 2.13 cannot trace its train step, whatever the optimizer")
        import torch

        # The same tracing of the train step, without the C++ compiler and the minute that
        # torch's own code generator takes.
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = make_model(keras_adam.Adam(**EVERYTHING), **COMPILE_OPTIONS[way])
    fit(model, epochs=2)
    assert_close(weights(model), Expected(EVERYTHING).fit(epochs=2).weights)
    assert int(model.optimizer.iterations) == 4  # 8 batches, accumulated in pairs


def test_train_on_batch():
    model, expected = make_model(keras_adam.Adam(**EVERYTHING)), Expected(EVERYTHING)
    for x, y in BATCHES:
        model.train_on_batch(x, y)
        expected.step(x, y)
        assert_close(weights(model), expected.weights)


def test_fit_twice_goes_on():
    model = make_model(keras_adam.Adam(**DEFAULT))
    fit(model)
    fit(model)
    assert_close(weights(model), Expected(DEFAULT).fit(epochs=2).weights)


def call_apply(optimizer, values, variables):
    optimizer.apply(values, variables)


def call_apply_on_known_variables(optimizer, values, variables):
    optimizer.build(variables)
    optimizer.apply(values)


def call_apply_gradients(optimizer, values, variables):
    iterations = optimizer.apply_gradients(zip(values, variables, strict=True))
    assert int(iterations) == int(optimizer.iterations)


@pytest.mark.parametrize("call", [call_apply, call_apply_on_known_variables, call_apply_gradients])
def test_custom_loop(call):
    options = {"learning_rate": 0.02, "weight_decay": 0.1, "amsgrad": True}
    model, expected = make_model(), Expected(options)
    optimizer = keras_adam.Adam(**options)
    for x, y in BATCHES:
        call(optimizer, gradients(model, x, y), model.trainable_variables)
        expected.step(x, y)
        assert_close(weights(model), expected.weights)


@only["jax"]
def test_stateless_apply_in_jit_with_donation():
    import jax

    model, optimizer = make_model(), keras_adam.Adam(**EVERYTHING)
    optimizer.build(model.trainable_variables)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(values, state, x, y):
        def compute(values):
            return optimizer.scale_loss(loss(model.stateless_call(values, [], x)[0], y))

        return optimizer.stateless_apply(state, jax.grad(compute)(values), values)

    values = [jax.numpy.array(w) for w in START]
    state = [jax.numpy.array(v.value) for v in optimizer.variables]
    expected = Expected(EVERYTHING)
    for x, y in BATCHES * 2:
        given = [*values, *state]
        values, state = step(values, state, x, y)
        expected.step(x, y)
        assert_close(values, expected.weights)
        assert all(array.is_deleted() for array in given)


@only["tensorflow"]
@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_tf_function(jit_compile):
    import tensorflow as tf

    model, optimizer = make_model(), keras_adam.Adam(**EVERYTHING)
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=jit_compile)
    def step(x, y):
        with tf.GradientTape() as tape:
            value = optimizer.scale_loss(loss(model(x), y))
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(value, [v.value for v in variables]), variables)

    expected = Expected(EVERYTHING)
    for x, y in BATCHES * 2:
        step(tf.constant(x), tf.constant(y))
        expected.step(x, y)
        assert_close(weights(model), expected.weights)
    assert step.experimental_get_tracing_count() == 1


def test_inside_loss_scale_optimizer():
    """A batch whose gradient overflows is skipped, and halves the scale."""
    options = {**EVERYTHING, "loss_scale_factor": None}  # It scales the loss itself.
    inner = keras_adam.Adam(**options)
    model = make_model(keras.optimizers.LossScaleOptimizer(inner, initial_scale=1024.0))
    overflowing = np.concatenate([X, np.full((BATCH, 4), 1e30, "float32")])
    model.fit(
        overflowing, np.concatenate([Y, Y[:BATCH]]), batch_size=BATCH, shuffle=False, verbose=0
    )
    assert_close(weights(model), Expected(options).fit().weights)
    assert float(model.optimizer.dynamic_scale) == 512.0
    assert int(inner.iterations) == 2


def test_mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    trained = {}
    for cls in (keras.optimizers.Adam, keras_adam.Adam):
        model = make_model(cls(0.02))
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert model.layers[0].kernel.dtype == "float32"
        fit(model, epochs=2)
        trained[cls] = weights(model)
    assert isinstance(model.optimizer.inner_optimizer, keras_adam.Adam)
    assert int(model.optimizer.iterations) > 0
    assert not np.allclose(trained[keras_adam.Adam][0], START[0], atol=0.05)
    # Where the weights of the two differ by a rounding of float32, the layer may round them to
    # another float16, 1e-3 away.
    assert_close(trained[keras_adam.Adam], trained[keras.optimizers.Adam], rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(
    not hasattr(keras.optimizers, "OptimizerMap"), reason="this Keras has no MultiOptimizer"
)
def test_inside_multi_optimizer():
    of_kernel = {"learning_rate": 0.02, "amsgrad": True}
    of_bias = {"learning_rate": 0.005, "beta_1": 0.5}
    optimizers = keras.optimizers.OptimizerMap(keras_adam.Adam(**of_bias))
    optimizers[".*kernel"] = keras_adam.Adam(**of_kernel)
    model = make_model(keras.optimizers.MultiOptimizer(optimizers))
    fit(model, epochs=2)
    assert_close(weights(model), Expected(of_kernel, of_bias).fit(epochs=2).weights)
