"""Changes after the train step was compiled: they take effect, or there is an error."""

import keras
import numpy as np
import pytest

import keras_adam
from support import helpers
from support.models import fit, make_model, weights

BACKEND = keras.backend.backend()
only_jax = pytest.mark.skipif(BACKEND != "jax", reason="JAX's trainer holds the state itself")
only_compiled = pytest.mark.skipif(BACKEND == "torch", reason="its train step is not compiled")


def two_equal_layers(optimizer):
    layers = [keras.Input((4,)), *(keras.layers.Dense(4, name=n) for n in ("first", "second"))]
    model = keras.Sequential([*layers, keras.layers.Dense(2)])
    model.compile(optimizer, loss="mse")
    return model


@only_jax
def test_built_in_another_order_than_the_models():
    optimizer = keras_adam.Adam(0.01)
    model = two_equal_layers(optimizer)
    variables = model.trainable_variables
    optimizer.build([*variables[2:4], *variables[:2], *variables[4:]])
    with pytest.raises(ValueError, match=r"another order.*first/kernel"):
        fit(model)
    optimizer.build(model.trainable_variables)
    fit(model)


def test_frozen_layers_are_not_overwritten_with_their_average():
    optimizer = keras_adam.Adam(0.1, use_ema=True, ema_overwrite_frequency=1, ema_momentum=0.9)
    model = two_equal_layers(optimizer)
    fit(model)
    first = model.get_layer("first")
    first.set_weights([w + 1.0 for w in first.get_weights()])
    before = first.get_weights()
    first.trainable = False
    optimizer.build(model.trainable_variables)
    model.compile(optimizer, loss="mse")
    fit(model)
    for now, then in zip(first.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


@only_compiled
def test_number_set_after_a_group_was_added_without_compiling():
    optimizer = keras_adam.Adam(0.01)
    model = two_equal_layers(optimizer)
    model.get_layer("first").trainable = False
    model.compile(optimizer, loss="mse")
    fit(model)
    model.get_layer("first").trainable = True
    optimizer.add_param_group({"params": model.get_layer("first")})
    with pytest.raises(ValueError, match="`beta_1` is a constant of the train step"):
        optimizer.param_groups[0]["beta_1"] = 0.5
    model.compile(optimizer, loss="mse")
    fit(model)
    optimizer.param_groups[0]["beta_1"] = 0.5
    assert optimizer.param_groups[0]["beta_1"] == 0.5


def test_group_added_without_compiling():
    """On TensorFlow the compiled train step goes on without the new variables; elsewhere it includes them."""
    optimizer = keras_adam.Adam(0.01)
    model = two_equal_layers(optimizer)
    first = model.get_layer("first")
    first.trainable = False
    model.compile(optimizer, loss="mse")
    fit(model)
    first.trainable = True
    optimizer.add_param_group({"params": first})
    before = first.get_weights()
    if BACKEND == "tensorflow":
        with pytest.raises(ValueError, match=r"first/kernel' was not trained.*Compile the model"):
            fit(model)
        model.compile(optimizer, loss="mse")
    fit(model, epochs=0)
    fit(model)
    assert np.abs(first.get_weights()[0] - before[0]).max() > 1e-3


@only_compiled
def test_schedule_set_without_compiling():
    optimizer = keras_adam.Adam(0.01)
    model = make_model(optimizer)
    fit(model)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.0, 10, 0.5)
    optimizer.learning_rate = schedule
    if BACKEND == "tensorflow":  # JAX traces anew, as there is one state variable less
        with pytest.raises(ValueError, match="`learning_rate` was made a schedule"):
            fit(model)
        model.compile(optimizer, loss="mse")
    before = weights(model)
    fit(model)
    for now, then in zip(weights(model), before, strict=True):
        np.testing.assert_array_equal(now, then)


class SetsThroughAClosure(keras.callbacks.Callback):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def on_train_batch_end(self, batch, logs=None):
        self.change()


@only_jax
@pytest.mark.parametrize("name", ["learning_rate", "beta_1"])
def test_number_set_while_the_trainer_holds_the_state(name):
    optimizer = keras_adam.Adam(0.01, param_groups=[])
    model = make_model(optimizer)

    def change():
        optimizer.param_groups[0][name] = 0.5

    with pytest.raises(ValueError, match=rf"`{name}` cannot be set here.*self\.model"):
        fit(model, callbacks=[SetsThroughAClosure(change)])


def test_multiplier_beside_a_rate_of_the_groups_own():
    variables = [keras.Variable(np.ones(2, "float32"), name=n) for n in ("a", "b")]
    optimizer = keras_adam.Adam(param_groups=[{"params": variables[0], "learning_rate": 0.1}])
    optimizer.build(variables)
    with pytest.raises(ValueError, match="`learning_rate_multiplier` has no effect"):
        optimizer.param_groups[0]["learning_rate_multiplier"] = 2.0
    optimizer.param_groups[0]["learning_rate"] = None
    optimizer.param_groups[0]["learning_rate_multiplier"] = 2.0
    assert optimizer.param_groups[0]["learning_rate"] == pytest.approx(0.002)


def test_exclusion_after_a_group_was_added():
    variables = [keras.Variable(np.ones(2, "float32"), name=n) for n in ("a", "b")]
    optimizer = keras_adam.Adam(weight_decay=0.1)
    optimizer.build(variables[:1])
    optimizer.add_param_group({"params": variables[1]})
    with pytest.raises(ValueError, match="before the optimizer is built"):
        optimizer.exclude_from_weight_decay(var_names=["a"])
    optimizer.set_weights([v.numpy() for v in optimizer.variables])


def test_steps_without_any_gradient_on_the_variables():
    if BACKEND != "torch":
        pytest.skip("only PyTorch keeps gradients on the variables")
    variable = keras.Variable(np.ones(2, "float32"))
    optimizer = keras_adam.Adam()
    optimizer.build([variable])
    variable.value.grad = None
    optimizer.step()
    assert int(optimizer.iterations) == 0


def test_gradient_as_a_numpy_array():
    variable = keras.Variable(np.ones(2, "float32"))
    keras_adam.Adam(0.1).apply([np.array([1.0, -1.0], "float32")], [variable])
    np.testing.assert_allclose(variable.numpy(), [0.9, 1.1], rtol=1e-6)


def test_clipping_norms_in_float64():
    with helpers.float64_allowed():
        variable = keras.Variable(np.zeros(2), dtype="float64")
        optimizer = keras_adam.Adam(clipnorm=1.0, beta_1=0.0)
        gradient = np.array([3.0, 4.0]) * (1 + 1e-12)
        optimizer.build([variable])
        optimizer.apply([keras.ops.convert_to_tensor(gradient, "float64")], [variable])
        np.testing.assert_allclose(
            np.array(optimizer.variables[2]), gradient / np.linalg.norm(gradient), rtol=1e-14
        )


@only_jax
def test_minimize_in_a_stateless_scope():
    weight, target = keras.Variable(3.0), keras.Variable(0.0)
    optimizer = keras_adam.Adam(0.5)
    optimizer.build([weight])
    with keras.StatelessScope([(target, keras.ops.array(1.0))]):
        loss = optimizer.minimize(lambda: (weight - target) ** 2, [weight])
    assert float(loss) == 4.0


def test_schedule_of_a_group_between_eager_steps():
    def moved(first, second, name="learning_rate"):
        variable = keras.Variable(np.ones(2, "float32"), name="a")
        optimizer = keras_adam.Adam(0.01, param_groups=[{"params": "a", name: first}])
        optimizer.apply([keras.ops.ones(2)], [variable])
        before = variable.numpy()[0]
        optimizer.param_groups[0][name] = second
        optimizer.apply([keras.ops.ones(2)], [variable])
        return before - variable.numpy()[0]

    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 1000, 1.0)
    np.testing.assert_allclose(moved(schedule, 0.5), 0.5, rtol=1e-5)
    np.testing.assert_allclose(moved(0.5, schedule), 0.1, rtol=1e-5)
    decay = moved(0.0, schedule, "weight_decay")
    np.testing.assert_allclose(decay, 0.01 + 0.01 * 0.1 * 0.99, rtol=1e-4)
