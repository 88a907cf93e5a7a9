"""Gradients whose squares a dtype does not hold, and derivatives of a step where the square root has none."""

import keras
import numpy as np
import pytest

import keras_adam
from keras_adam import rule
from support import reference
from support.steps import BACKEND, either_way, value_of
from support.tolerances import TOLERANCES

# TensorFlow's kernel makes such an element NaN, as the documentation says.
BY_PORTABLE_PATH = ("amsgrad", "amsgrad_corrected")
HUGE_OPTIONS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "amsgrad_corrected": {"amsgrad": "corrected"},
    "l2": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "accumulation": {"gradient_accumulation_steps": 2},
    "settable": {"param_groups": []},
}


@either_way
@pytest.mark.parametrize("size", [3e19, 1e38])
@pytest.mark.parametrize("name", HUGE_OPTIONS)
def test_huge_gradients(make_step, name, size):
    """Adam does not depend on the size of gradients: equal ones make steps of the learning rate."""
    if BACKEND == "torch" and size > 5.8e20 and name != "amsgrad_corrected":
        pytest.skip("PyTorch's kernel stands still, as the documentation tells")
    if BACKEND == "tensorflow" and name not in BY_PORTABLE_PATH:
        pytest.skip("TensorFlow's kernel makes it NaN, as the documentation tells")
    options = HUGE_OPTIONS[name]
    start = np.array([1.0, 2.0, 3.0])
    variable = keras.Variable(start, dtype="float32")
    optimizer = keras_adam.Adam(0.01, **options)
    oracle = reference.Adam(
        [start], learning_rate=0.01, **{k: v for k, v in options.items() if k != "param_groups"}
    )
    step = make_step(optimizer, [variable])
    for i in range(20):
        signs = [1, -1 if i % 6 < 2 else 1]
        gradient = np.array([*(np.float32(size) * sign for sign in signs), 1.0], "float32")
        oracle.step([gradient])
        step(gradient)
    np.testing.assert_allclose(value_of(variable), oracle.parameters[0], **TOLERANCES["float32"])


@either_way
@pytest.mark.parametrize("amsgrad", [False, True, "corrected"][BACKEND == "tensorflow" :])
def test_one_huge_gradient_among_others(make_step, amsgrad):
    start, size = np.array([1.0, 2.0]), 3e20 if BACKEND == "torch" else 1e38
    variable = keras.Variable(start, dtype="float32")
    oracle = reference.Adam([start], learning_rate=0.01, amsgrad=amsgrad)
    step = make_step(keras_adam.Adam(0.01, amsgrad=amsgrad), [variable])
    for i in range(20):
        gradient = np.array([size if i == 5 else 0.5, 0.5], "float32")
        oracle.step([gradient])
        step(gradient)
    np.testing.assert_allclose(value_of(variable), oracle.parameters[0], **TOLERANCES["float32"])


@either_way
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("amsgrad", [False, "corrected"])
def test_a_gradient_that_is_not_finite_shows(make_step, amsgrad, bad):
    variable = keras.Variable([1.0, 2.0])
    step = make_step(keras_adam.Adam(0.01, amsgrad=amsgrad), [variable])
    step(np.array([bad, 1.0], "float32"))
    np.testing.assert_array_equal(np.isfinite(value_of(variable)), [False, True])


@either_way
@pytest.mark.parametrize("clipping", ["clipnorm", "global_clipnorm", "clipvalue"])
def test_huge_gradients_that_are_clipped_stay_finite(make_step, clipping):
    variable = keras.Variable([1.0, 2.0])
    step = make_step(keras_adam.Adam(0.01, **{clipping: 1.0}), [variable])
    for _ in range(3):
        step(np.array([1e30, 1.0], "float32"))
    assert np.isfinite(value_of(variable)).all()


DERIVATIVE_OPTIONS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "amsgrad_corrected": {"amsgrad": "corrected"},
    "algorithm_1": {"epsilon_hat": False},
    "clipnorm": {"clipnorm": 1.0},
    "global_clipnorm": {"global_clipnorm": 1.0},
}


@pytest.mark.short("plain", "global_clipnorm")
@pytest.mark.skipif(BACKEND != "jax", reason="only on JAX is a step a function without effects")
@pytest.mark.parametrize("name", DERIVATIVE_OPTIONS)
def test_derivative_of_a_step_where_a_gradient_is_zero(name):
    """With m = r_1 g and sqrt(v) = sqrt(r_2) |g|, a step at g = 0 has the slope -lr r_1 / (c_1 epsilon)."""
    import jax

    epsilon = 1e-3
    variable = keras.Variable([1.0, 2.0])
    optimizer = keras_adam.Adam(0.1, epsilon=epsilon, **DERIVATIVE_OPTIONS[name])
    optimizer.build([variable])
    state = [v.value for v in optimizer.variables]

    def step(gradient):
        return optimizer.stateless_apply(state, [gradient], [variable.value])[0][0]

    for jacobian in (jax.jacrev(step), jax.jit(jax.jacfwd(step))):
        slopes = jacobian(keras.ops.convert_to_tensor([0.0, 0.0]))
        hat = name not in ("algorithm_1", "amsgrad_corrected")
        slope = -0.1 / epsilon * (np.sqrt(1 - 0.999) if hat else 1)
        np.testing.assert_allclose(slopes, slope * np.eye(2), rtol=1e-5)
    hessian = jax.hessian(lambda g: step(g)[0])(keras.ops.convert_to_tensor([0.0, 0.5]))
    assert np.isfinite(hessian).all()


@pytest.mark.skipif(BACKEND != "jax", reason="only on JAX is a step a function without effects")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_derivative_of_steps_in_half_precision(dtype, state_dtype):
    """Rounding counts as having the derivative 1; the oracle is the same in float32."""
    import jax

    def derivative(dtype, state_dtype):
        variable = keras.Variable([1.0, 2.0, 0.5], dtype=dtype)
        optimizer = keras_adam.Adam(0.1, epsilon=0.1, weight_decay=0.5, state_dtype=state_dtype)
        optimizer.build([variable])
        state = [v.value for v in optimizer.variables]

        def loss(start):
            values, now = [start], state
            for _ in range(3):
                gradient = values[0] * np.array([1.0, 0.0, -1.0], dtype)
                values, now = optimizer.stateless_apply(now, [gradient], values)
            return (values[0].astype("float32") * np.array([1.0, 2.0, 3.0])).sum()

        return jax.jit(jax.grad(loss))(variable.value).astype("float32")

    expected = derivative("float32", None)
    np.testing.assert_allclose(derivative(dtype, state_dtype), expected, rtol=0.02)


@pytest.mark.skipif(BACKEND == "jax", reason="tested on a whole step")
def test_derivative_of_the_rule_where_a_gradient_is_zero():
    """On PyTorch the square root has no derivative at 0; `apply` is not differentiable there anyway."""
    scalars = rule.Scalars(0.1, 0.001, 0.01, 1e-3, None, 0.001)
    moments = rule.Moments(*(keras.ops.zeros(2) for _ in range(2)))

    def step(gradient):
        return rule.adam_step(gradient, keras.ops.ones(2), moments, scalars, rule.Options())[0]

    gradient = keras.ops.convert_to_tensor([0.0, 0.5])
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as outer:
            outer.watch(gradient)
            with tf.GradientTape() as tape:
                tape.watch(gradient)
                value = step(gradient)
            slopes = tape.gradient(value, gradient)
        np.testing.assert_allclose(slopes[0], -0.01 * 0.1 / 1e-3, rtol=1e-5)
        assert np.isfinite(slopes).all()
        assert np.isfinite(outer.gradient(slopes, gradient)).all()
    else:
        import torch

        gradient.requires_grad_()
        assert torch.autograd.grad(step(gradient).sum(), gradient)[0].isnan().tolist() == [
            True,
            False,
        ]
