"""Subclasses written like those in Keras's guides and in well-known optimizers: hooks with Keras's parameters."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_adam
from support.helpers import make_variables, random_problem, to_numpy, to_tensors
from support.tolerances import AGAINST_KERAS, TOLERANCES


def halved(base):
    class Halved(base):
        def update_step(self, gradient, variable, learning_rate):
            super().update_step(gradient, variable, learning_rate * 0.5)

    return Halved


def halved_in_backend_hook(base):
    class Halved(base):
        def _backend_update_step(self, grads, trainable_variables, learning_rate):
            super()._backend_update_step(grads, trainable_variables, learning_rate * 0.5)

    return Halved


def centralized(base):
    """Gradient centralization, through an `apply` of its own."""

    class Centralized(base):
        def apply(self, grads, trainable_variables=None):
            grads = [g - ops.mean(g) for g in grads]
            super().apply(grads, trainable_variables)

    return Centralized


def damped(base):
    """Keras's Adam changes variables through `assign_sub`."""

    class Damped(base):
        def assign_sub(self, variable, value):
            super().assign_sub(variable, value * 0.25)

    return Damped


def with_state(base):
    """State of its own for each variable, as in the guide: here the previous gradient, which is averaged in."""

    class WithState(base):
        def build(self, variables):
            if self.built:
                return
            super().build(variables)
            self._before = self.add_optimizer_variables(variables, "before")

        def update_step(self, gradient, variable, learning_rate):
            before = self._before[self._get_variable_index(variable)]
            gradient = ops.cast(gradient, before.dtype)
            super().update_step((gradient + before) / 2, variable, learning_rate)
            self.assign(before, gradient)

    return WithState


def on_average(base):
    """Writes half of the way to the average."""

    class OnAverage(base):
        def _overwrite_model_variables_with_average_value(self, trainable_variables):
            before = [ops.copy(v.value) for v in trainable_variables]
            super()._overwrite_model_variables_with_average_value(trainable_variables)
            for variable, value in zip(trainable_variables, before, strict=True):
                variable.assign((variable.value + value) / 2)

    return OnAverage


def own_rule(base):
    """Its own update, without bias correction, from the state that Keras's Adam has."""

    class OwnRule(base):
        def update_step(self, gradient, variable, learning_rate):
            index = self._get_variable_index(variable)
            m, v = self._momentums[index], self._velocities[index]
            rate = ops.cast(learning_rate, variable.dtype)
            self.assign_add(m, (gradient - m) * (1 - self.beta_1))
            self.assign_add(v, (ops.square(gradient) - v) * (1 - self.beta_2))
            self.assign_sub(variable, rate * m / (ops.sqrt(v) + self.epsilon))

    return OwnRule


AVERAGED = {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}
SUBCLASSES = {
    "update_step": (halved, {}),
    "update_step, AMSGrad": (halved, {"amsgrad": True}),
    "update_step, accumulation": (halved, {"gradient_accumulation_steps": 2}),
    "_backend_update_step": (halved_in_backend_hook, {}),
    "apply": (centralized, {}),
    "assign_sub": (damped, {}),
    "build and add_optimizer_variables": (with_state, {}),
    "_overwrite_model_variables_with_average_value": (on_average, AVERAGED),
    "update_step without super": (own_rule, {}),
}
# On JAX Keras overwrites without calling the hook, which `test_hook_of_averages` looks at instead.
if keras.backend.backend() == "jax":
    del SUBCLASSES["_overwrite_model_variables_with_average_value"]
CASES = pytest.mark.parametrize(("make", "options"), SUBCLASSES.values(), ids=SUBCLASSES)


@CASES
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_does_what_it_does_on_the_adam_of_keras(make, options, mode, rng):
    starts, gradients = random_problem(rng, steps=6)
    starts, gradients = starts[:3], [arrays[:3] for arrays in gradients]
    values = []
    for base in (keras_adam.Adam, keras.optimizers.Adam):
        optimizer = make(base)(0.01, **options)
        variables = make_variables(starts)
        optimizer.build(variables)
        step = STEPS[keras.backend.backend() if mode == "compiled" else "torch"]
        step(optimizer, variables, map(to_tensors, gradients))
        values.append(to_numpy(variables))
    for name, ours, keras_s in zip(("matrix", "vector", "scalar"), *values, strict=True):
        np.testing.assert_allclose(ours, keras_s, err_msg=name, **AGAINST_KERAS)


def eagerly(optimizer, variables, gradients):
    for arrays in gradients:
        optimizer.apply(arrays, variables)


def in_a_graph(optimizer, variables, gradients):
    import tensorflow as tf

    step = tf.function(lambda *arrays: optimizer.apply(list(arrays), variables))
    for arrays in gradients:
        step(*arrays)


def jitted(optimizer, variables, gradients):
    import jax

    step = jax.jit(optimizer.stateless_apply)
    for arrays in gradients:
        known = variables, optimizer.variables
        new = step([v.value for v in optimizer.variables], arrays, [v.value for v in variables])
        for of_kind, values in zip(known, new, strict=True):
            for variable, value in zip(of_kind, values, strict=True):
                variable.assign(value)


STEPS = {"jax": jitted, "tensorflow": in_a_graph, "torch": eagerly}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_half_the_rate_is_half_the_step(dtype):
    moved = []
    for optimizer_class in (keras_adam.Adam, halved(keras_adam.Adam)):
        variable = keras.Variable([0.0, 0.0], dtype=dtype)
        optimizer_class(0.5).apply([ops.convert_to_tensor([1.0, -3.0], dtype)], [variable])
        moved.append(to_numpy([variable])[0])
    np.testing.assert_allclose(moved[0], [-0.5, 0.5], rtol=1e-2)
    np.testing.assert_allclose(moved[1], moved[0] / 2, rtol=1e-2)


@pytest.mark.short("update_step", "apply", "build and add_optimizer_variables", "*DType*")
@CASES
def test_in_fit(make, options, rng):
    """As `fit` compiles it, with the model's own gradients; on PyTorch it does not compile."""
    x, y = (rng.standard_normal((16, n)).astype("float32") for n in (3, 1))
    predictions = []
    for base in (keras_adam.Adam, keras.optimizers.Adam):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])
        model.compile(make(base)(0.01, **options), loss="mse")
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
        predictions.append(model.predict(x, verbose=0))
    np.testing.assert_allclose(*predictions, rtol=1e-4, atol=1e-5)


def test_hook_of_averages():
    """Two steps of -0.1 from 0; the average is then -0.15, and half of the way to it -0.175."""
    variable = keras.Variable([0.0])
    optimizer = on_average(keras_adam.Adam)(0.1, **AVERAGED)
    for _ in range(2):
        optimizer.apply([ops.ones(1)], [variable])
    np.testing.assert_allclose(to_numpy([variable])[0], [-0.175], **TOLERANCES["float32"])


@pytest.mark.parametrize("hook", ["update_step", "_backend_update_step"])
def test_hook_of_one_optimizer_alone(hook):
    """A function that is set on the optimizer is called, too."""
    variable, called = keras.Variable([0.0]), []
    optimizer = keras_adam.Adam(0.1)
    original = getattr(optimizer, hook)

    def own(first, second, learning_rate):
        called.append(hook)
        original(first, second, learning_rate)

    setattr(optimizer, hook, own)
    for _ in range(3):
        optimizer.apply([ops.ones(1)], [variable])
    assert called == [hook] * 3
    np.testing.assert_allclose(to_numpy([variable])[0], [-0.3], **TOLERANCES["float32"])


@pytest.mark.parametrize("hook", ["update_step", "_backend_update_step", "_clip_gradients"])
def test_hook_that_is_put_into_the_class(hook, monkeypatch):
    """`unittest.mock` does this, and libraries that watch a training."""
    original, called = getattr(keras_adam.Adam, hook), []

    def own(self, *arguments):
        called.append(hook)
        return original(self, *arguments)

    monkeypatch.setattr(keras_adam.Adam, hook, own)
    variable = keras.Variable([0.0])
    optimizer = keras_adam.Adam(0.1)
    for _ in range(3):
        optimizer.apply([ops.ones(1)], [variable])
    assert called == [hook] * 3
    np.testing.assert_allclose(to_numpy([variable])[0], [-0.3], **TOLERANCES["float32"])


def test_weight_decay_that_ends():
    """With gradients of zero, three steps shrink the weight by a twentieth each; those after them do nothing."""

    class Ending(keras_adam.Adam):
        decays = True

        def _use_weight_decay(self, variable):
            return self.decays and super()._use_weight_decay(variable)

    variable, optimizer = keras.Variable([1.0, 2.0]), Ending(0.1, weight_decay=0.5)
    for step in range(6):
        optimizer.decays = step < 3
        optimizer.apply([ops.zeros(2)], [variable])
    expected = np.array([1.0, 2.0]) * 0.95**3
    np.testing.assert_allclose(to_numpy([variable])[0], expected, **TOLERANCES["float32"])


def test_state_of_a_subclass_is_saved(tmp_path, rng):
    x, y = rng.standard_normal((8, 3)), rng.standard_normal((8, 1))

    @keras.saving.register_keras_serializable("tests")
    class WithState(with_state(keras_adam.Adam)):
        pass

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(WithState(0.01), loss="mse")
    model.fit(x, y, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for v, w in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(*(to_numpy([x])[0] for x in (v, w)), err_msg=v.path)
    for each in (model, loaded):
        each.fit(x, y, shuffle=False, verbose=0)
    np.testing.assert_array_equal(model.predict(x, verbose=0), loaded.predict(x, verbose=0))


def test_numbers_are_asked_once_a_step():
    """All variables get the same number from a callable, also in a subclass with its own `assign`."""

    class Assigning(keras_adam.Adam):
        def assign(self, variable, value):
            super().assign(variable, value)

    asked = []
    optimizer = Assigning(0.1, beta_1=lambda: asked.append(1) or 0.9 - 0.01 * len(asked))
    variables = [keras.Variable([1.0]) for _ in range(3)]
    for _ in range(2):
        optimizer.apply([ops.ones(1)] * 3, variables)
    assert len(asked) == 2
    values = np.array(to_numpy(variables))
    np.testing.assert_array_equal(values, np.broadcast_to(values[0], values.shape))
