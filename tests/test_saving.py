"""Models that are saved, loaded and trained on, within a backend and between backends."""

import functools

import keras
import numpy as np
import pytest

import keras_adam
from support.models import Expected, assert_close, fit, make_model, weights
from support.processes import run_under
from support.resume import FROM_KERAS, OPTIMIZERS, SCHEDULE, resume, state_of

BACKEND = keras.backend.backend()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a folder with a model for each optimizer, trained for an epoch, and the optimizer's state."""
    folder = tmp_path_factory.mktemp("saved")
    for name, (make_optimizer, _) in (OPTIMIZERS | FROM_KERAS).items():
        model = make_model(make_optimizer())
        fit(model)
        model.save(folder / f"{name}.keras")
        np.savez(folder / f"{name}.npz", *state_of(model.optimizer))
    return folder


@pytest.mark.short("everything", "keras")
@pytest.mark.parametrize("name", OPTIMIZERS | FROM_KERAS)
def test_goes_on(saved, name):
    resume(saved / f"{name}.keras")


@pytest.mark.short("jax", "torch")
@pytest.mark.parametrize("other", sorted({"jax", "tensorflow", "torch"} - {BACKEND}))
def test_goes_on_under_another_backend(saved, other):
    output = run_under(other, "resume", saved)
    assert output.split()[1::2] == sorted(OPTIMIZERS | FROM_KERAS)


def test_goes_on_in_keras(saved):
    model = make_model(keras.optimizers.Adam())
    model.optimizer.build(model.trainable_variables)  # Keras drops the state of an unbuilt one.
    model.load_weights(saved / "default.keras")
    assert int(model.optimizer.iterations) == 4
    fit(model)
    assert_close(weights(model), Expected({}).fit().fit().weights)


def test_state_loaded_before_build_is_kept(saved):
    model = make_model(keras_adam.Adam())
    assert not model.optimizer.built
    model.load_weights(saved / "default.keras")
    fit(model)
    assert int(model.optimizer.iterations) == 8
    assert_close(weights(model), Expected({}).fit().fit().weights)


@pytest.mark.parametrize("name", ["model", "other"])
def test_weights_file(saved, tmp_path, name):
    """State is matched in order where the model has another name, hence its variables' paths."""
    model = keras.saving.load_model(saved / "default.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    model = make_model(keras_adam.Adam(), name)
    model.optimizer.build(model.trainable_variables)
    model.load_weights(tmp_path / "model.weights.h5")
    fit(model)
    assert_close(weights(model), Expected({}).fit().fit().weights)


def kernel_alone(optimizer):
    model = make_model(optimizer)
    model.layers[0].bias.trainable = False
    return model


MISFITS = {
    "fewer variables": (
        lambda: kernel_alone(keras_adam.Adam()),
        lambda: make_model(keras_adam.Adam()),
        "lacks .* of '.*bias'",
    ),
    "more variables": (
        lambda: make_model(keras_adam.Adam()),
        lambda: kernel_alone(keras_adam.Adam()),
        "holds .* of '.*bias'",
    ),
    "average for maximum": (
        lambda: make_model(keras_adam.Adam(use_ema=True)),
        lambda: make_model(keras_adam.Adam(amsgrad=True)),
        "average|velocity_hat",
    ),
    "maximum for average": (
        lambda: make_model(keras_adam.Adam(amsgrad=True)),
        lambda: make_model(keras_adam.Adam(use_ema=True)),
        "average|velocity_hat",
    ),
    "fewer of Keras's": (
        lambda: kernel_alone(keras.optimizers.Adam()),
        lambda: make_model(keras_adam.Adam()),
        "6 .* 4 ",
    ),
    "average for maximum, of Keras's": (
        lambda: make_model(keras.optimizers.Adam(use_ema=True)),
        lambda: make_model(keras_adam.Adam(amsgrad=True)),
        r"shape \(4, 2\).* shape \(2,\)|shape \(2,\).* shape \(4, 2\)",
    ),
}


@pytest.mark.short("fewer variables-built", "average for maximum-unbuilt", "*Keras's-built")
@pytest.mark.parametrize("built", [True, False], ids=["built", "unbuilt"])
@pytest.mark.parametrize("case", MISFITS)
def test_state_that_does_not_fit(case, built, tmp_path):
    """Nothing is assigned, and training does not start without the state."""
    make_saved, make_loaded, message = MISFITS[case]
    model = make_saved()
    fit(model)
    model.save_weights(tmp_path / "model.weights.h5")
    model = make_loaded()

    def build():
        model.optimizer.build(model.trainable_variables)

    if built:
        build()
        with pytest.raises(ValueError, match=message):
            model.load_weights(tmp_path / "model.weights.h5")
    else:
        model.load_weights(tmp_path / "model.weights.h5")
        with pytest.raises(ValueError, match=message):
            build()
    assert int(model.optimizer.iterations) == 0
    for variable, value in zip(model.optimizer.variables, state_of(model.optimizer), strict=True):
        if variable is not model.optimizer.learning_rate:
            assert not value.any(), variable.path


def test_array_of_another_shape():
    optimizer = keras_adam.Adam()
    optimizer.build([keras.Variable([1.0, 2.0], name="weight")])
    store = {str(i): value + 1 for i, value in enumerate(state_of(optimizer))}
    store["3"] = np.ones(3)
    with pytest.raises(ValueError, match=r"velocity of 'weight' has shape \(2,\).*\(3,\)"):
        optimizer.load_own_variables(store)
    assert [float(v.sum()) for v in state_of(optimizer)] == pytest.approx([0, 0.001, 0, 0])


def schedule():
    return keras.optimizers.schedules.ExponentialDecay(**SCHEDULE)


@pytest.mark.parametrize("cls", [keras_adam.Adam, keras.optimizers.Adam], ids=["ours", "keras"])
@pytest.mark.parametrize("to_schedule", [True, False], ids=["to schedule", "to number"])
def test_number_and_schedule(cls, to_schedule, tmp_path):
    """The learning rate may change from number to schedule and back in a training; the moments are kept."""
    before, after = (cls(0.02), keras_adam.Adam(schedule()))
    rates = (lambda step: 0.02, lambda step: 0.02 * 0.5 ** (step / 4))
    if not to_schedule:
        before, after = cls(schedule()), keras_adam.Adam(0.02)
        rates = rates[::-1]
    model = make_model(before)
    fit(model)
    model.save_weights(tmp_path / "model.weights.h5")
    model = make_model(after)
    model.optimizer.build(model.trainable_variables)
    model.load_weights(tmp_path / "model.weights.h5")
    fit(model)
    expected = Expected({"learning_rate": lambda step: rates[step >= 4](step)})
    assert_close(weights(model), expected.fit(2).weights)


@pytest.mark.parametrize(
    "exclude",
    [
        lambda optimizer, model: optimizer.exclude_from_weight_decay(var_names=["bias"]),
        lambda optimizer, model: optimizer.exclude_from_weight_decay([model.layers[0].bias]),
    ],
    ids=["by name", "by variable"],
)
def test_exclusions_from_decay_survive(exclude, tmp_path):
    decayed = {"learning_rate": 0.02, "weight_decay": 0.5}
    model = make_model(keras_adam.Adam(**decayed))
    exclude(model.optimizer, model)
    fit(model)
    model.save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    fit(model)
    assert_close(weights(model), Expected(decayed, {"learning_rate": 0.02}).fit(2).weights)


def numbered_model(first_units=4, waste=0):
    """Return a model whose layers Keras names: their numbers show the order of creation in the session."""
    for _ in range(waste):
        keras.layers.Dense(1)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(first_units), keras.layers.Dense(2)]
    )
    model.compile(keras_adam.Adam(0.01), loss="mse")
    return model


def test_weights_of_a_model_whose_names_are_numbered_on(tmp_path):
    keras.utils.clear_session()
    model = numbered_model(waste=1)
    fit(model)
    model.save_weights(tmp_path / "numbered.weights.h5")
    keras.utils.clear_session()
    again = numbered_model()
    again.optimizer.build(again.trainable_variables)
    again.load_weights(tmp_path / "numbered.weights.h5")
    for got, want in zip(again.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(got.numpy(), want.numpy())


def test_numbered_names_in_another_order(tmp_path):
    def two_layers(swapped):
        keras.utils.clear_session()
        layers = [keras.layers.Dense(4), keras.layers.Dense(4)]
        model = keras.Sequential([keras.Input((4,)), *(layers[::-1] if swapped else layers)])
        model.compile(keras_adam.Adam(0.01), loss="mse")
        model.optimizer.build(model.trainable_variables)
        return model

    two_layers(False).save_weights(tmp_path / "order.weights.h5")
    with pytest.raises(ValueError, match="by name the saved state is in another order"):
        two_layers(True).load_weights(tmp_path / "order.weights.h5")
    two_layers(False).load_weights(tmp_path / "order.weights.h5")


def test_numbers_set_after_loading_and_before_building_stay(saved):
    model = make_model(keras_adam.Adam(0.1))
    model.load_weights(saved / "default.keras")
    assert int(model.optimizer.iterations) == 4
    model.optimizer.learning_rate = 0.0
    before = weights(model)
    fit(model)
    assert float(model.optimizer.learning_rate) == 0.0
    assert int(model.optimizer.iterations) == 8
    assert_close(weights(model), before, rtol=0)


@pytest.mark.parametrize("selector", [".*body/.*", "layer"])
def test_groups_of_a_model_with_frozen_layers(selector, tmp_path):
    body, head = (keras.layers.Dense(4, name=name) for name in ("body", "head"))
    model = keras.Sequential([keras.Input((4,)), body, head, keras.layers.Dense(2, name="out")])
    params = head if selector == "layer" else [selector, ".*head/.*"]
    optimizer = keras_adam.AdamW(
        0.01, param_groups=[{"params": params, "learning_rate_multiplier": 0.0}]
    )
    model.compile(optimizer, loss="mse")
    fit(model)
    body.trainable = False
    optimizer.build(model.trainable_variables)
    model.compile(optimizer, loss="mse")
    fit(model)
    model.save(tmp_path / "frozen.keras")
    loaded = keras.saving.load_model(tmp_path / "frozen.keras")
    before = loaded.get_layer("head").get_weights()
    fit(loaded)
    for now, then in zip(loaded.get_layer("head").get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_a_group_of_frozen_layers_alone(tmp_path):
    body = keras.layers.Dense(4, name="body")
    model = keras.Sequential([keras.Input((4,)), body, keras.layers.Dense(2, name="out")])
    groups = [{"params": ".*body/.*", "learning_rate_multiplier": 0.1}]
    model.compile(keras_adam.Adam(0.01, param_groups=groups), loss="mse")
    fit(model)
    body.trainable = False
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "frozen.keras")
    fit(keras.saving.load_model(tmp_path / "frozen.keras"))


def test_numbers_of_groups_go_through_a_store_that_tells_no_roles():
    # Found by test_fuzz.py: the variables that hold the numbers were left out, and nothing was loaded.
    variables = [keras.Variable([1.0, 2.0], name="a"), keras.Variable([3.0, 4.0], name="b")]
    make = functools.partial(keras_adam.Adam, 0.1, param_groups=[{"params": "b", "beta_1": 0.5}])
    optimizer = make()
    optimizer.build(variables)
    optimizer.param_groups[0]["weight_decay"] = 0.25
    store = {}
    optimizer.save_own_variables(store)
    other = make()
    other.build(variables)
    other.load_own_variables(store)
    assert other.param_groups[0]["weight_decay"] == 0.25


def test_order_of_joining_does_not_matter_to_a_store_that_tells_no_roles():
    # Found by test_fuzz.py: a group added before training had its state behind all else, but not in an optimizer built
    # anew. With equal shapes, variables would get each other's state.
    variables = [keras.Variable([1.0, 2.0], name=name) for name in "abc"]
    optimizer = keras_adam.Adam(0.1, use_ema=True)
    optimizer.build(variables[:2])
    optimizer.add_param_group({"params": variables[2], "beta_1": 0.5})
    optimizer.build(variables)
    gradients = [keras.ops.convert_to_tensor([i, -i], "float32") for i in (1.0, 2.0, 3.0)]
    optimizer.apply(gradients, variables)
    store = {}
    optimizer.save_own_variables(store)
    other = keras_adam.Adam.from_config(optimizer.get_config())
    other.build(variables)
    other.load_own_variables(store)
    for role in ("_momentums", "_velocities", "_model_variables_moving_average"):
        for got, want in zip(getattr(other, role), getattr(optimizer, role), strict=True):
            np.testing.assert_array_equal(
                keras.ops.convert_to_numpy(got), keras.ops.convert_to_numpy(want), err_msg=role
            )
