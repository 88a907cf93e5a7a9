"""Each backend's fast path does what the portable path does, over all options that matter to them."""

import keras
import numpy as np
import pytest

import keras_adam
from keras_adam.engines import Engine
from support.portable import OPTIONS, Portable, run
from support.tolerances import TOLERANCES


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("name", OPTIONS)
def test_fast_path_equals_the_portable_path(name):
    variables, optimizer = run(keras_adam.Adam, OPTIONS[name])
    expected, portable = run(Portable, OPTIONS[name])
    for variable, reference in zip(variables, expected, strict=True):
        np.testing.assert_allclose(
            variable.numpy(), reference.numpy(), **TOLERANCES["float32"], err_msg=variable.path
        )
    for state, reference in zip(optimizer.variables, portable.variables, strict=True):
        # TensorFlow's kernel takes beta_2 in float32, which moves `1 - beta_2` by 1.3e-5 of itself.
        np.testing.assert_allclose(
            state.numpy(), reference.numpy(), rtol=3e-5, atol=1e-9, err_msg=state.path
        )


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_the_fast_path_is_taken(monkeypatch):
    """Without it, the comparison above might compare the portable path with itself."""

    def refuse(*args):
        raise AssertionError("the portable path ran")

    if keras.backend.backend() == "jax":  # there the compiled call is what is fast
        optimizer = run(keras_adam.Adam, {})[1]
        assert len(optimizer._engine.compiled) == 1  # without the missing gradient
    else:
        monkeypatch.setattr(Engine, "update_each", refuse)
        run(keras_adam.Adam, {})
    portable = run(Portable, {})[1] if keras.backend.backend() == "jax" else None
    assert portable is None or not portable._engine.compiled


def test_a_constant_that_changes_is_noticed():
    """An eager step may be compiled, but an attribute that is set holds from the next step on."""
    variable = keras.Variable([1.0])
    optimizer = keras_adam.Adam(0.1, beta_1=0.0, beta_2=0.0, epsilon=0.0)
    gradient = keras.ops.convert_to_tensor([1.0])
    optimizer.apply([gradient], [variable])
    np.testing.assert_allclose(variable.numpy(), [0.9], rtol=1e-6)
    optimizer.weight_decay = 1.0
    optimizer.apply([gradient], [variable])
    np.testing.assert_allclose(variable.numpy(), [0.9 * 0.9 - 0.1], rtol=1e-6)
    optimizer.learning_rate = 0.2
    optimizer.apply([gradient], [variable])
    np.testing.assert_allclose(variable.numpy(), [0.71 * 0.8 - 0.2], rtol=1e-6)


def test_arrays_that_the_caller_holds_stay_valid():
    variable = keras.Variable([1.0, 2.0])
    optimizer = keras_adam.Adam(0.1)
    gradient = keras.ops.convert_to_tensor([1.0, 1.0])
    optimizer.apply([gradient], [variable])
    held = [keras.ops.copy(variable.value), gradient]
    if keras.backend.backend() == "jax":
        held[0] = variable.value
    optimizer.apply([gradient], [variable])
    np.testing.assert_allclose(keras.ops.convert_to_numpy(held[0]), [0.9, 1.9], rtol=1e-6)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(held[1]), [1.0, 1.0])


@pytest.mark.parametrize("options", [{}, {"param_groups": []}], ids=["constants", "settable"])
def test_small_betas_lose_no_digits(options):
    """With beta = 0 the average is the new value, however much greater the old one was."""
    variable = keras.Variable([0.0])
    optimizer = keras_adam.Adam(0.01, beta_1=0.0, beta_2=0.0, **options)
    for gradient in (1000.0, 1e-4):
        optimizer.apply([keras.ops.convert_to_tensor([gradient])], [variable])
    np.testing.assert_allclose(variable.numpy(), [-0.01 - 0.01 / 1.001], rtol=1e-5)


def test_a_constraint_that_has_no_hash():
    class Constraint(keras.constraints.NonNeg):
        def __eq__(self, other):
            return isinstance(other, Constraint)

    variable = keras.Variable([0.1], name="v")
    variable.constraint = Constraint()
    optimizer = keras_adam.Adam(0.2)
    optimizer.apply([keras.ops.ones(1)], [variable])
    np.testing.assert_array_equal(variable.numpy(), [0.0])


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="only PyTorch has strides")
def test_strides_that_change_between_steps():
    import torch

    def train(changes):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((6, 6, 4)), keras.layers.Conv2D(5, 3)])
        optimizer = keras_adam.Adam(0.01)
        rng = np.random.default_rng(0)
        for step in range(4):
            if step == 2 and changes:
                model.to(memory_format=torch.channels_last)
            variables = model.trainable_variables
            grads = [torch.tensor(rng.standard_normal(v.shape)).float() for v in variables]
            optimizer.apply(grads, variables)
        return model.weights[0].numpy()

    np.testing.assert_allclose(train(True), train(False), rtol=1e-6, atol=1e-7)
