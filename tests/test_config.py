"""`get_config`, `from_config`, and the serialization that `model.save` builds on."""

import copy
import json

import keras
import numpy as np
import pytest

import keras_adam

schedules = keras.optimizers.schedules


@keras.saving.register_keras_serializable("keras_adam_tests")
def constant():
    return 0.5


OPTIMIZERS = {
    "default": lambda: keras_adam.Adam(),
    "adamw": lambda: keras_adam.AdamW(),
    "keras's options": lambda: keras_adam.Adam(
        learning_rate=0.003,
        beta_1=0.8,
        beta_2=0.98,
        epsilon=1e-5,
        amsgrad=True,
        weight_decay=0.1,
        clipnorm=2.0,
        use_ema=True,
        ema_momentum=0.9,
        ema_overwrite_frequency=5,
        loss_scale_factor=8.0,
        gradient_accumulation_steps=4,
        name="special",
    ),
    "own options": lambda: keras_adam.Adam(
        amsgrad="corrected", decoupled_weight_decay=False, epsilon_hat=False, maximize=True
    ),
    "clipvalue": lambda: keras_adam.Adam(clipvalue=0.3),
    "global_clipnorm": lambda: keras_adam.AdamW(global_clipnorm=0.3, maximize=True),
    "schedules": lambda: keras_adam.Adam(
        schedules.ExponentialDecay(0.01, 10, 0.5),
        beta_1=schedules.PolynomialDecay(0.9, 10, 0.5),
        weight_decay=schedules.CosineDecay(0.1, 10),
    ),
    "callables": lambda: keras_adam.Adam(constant, beta_2=constant),
    "NumPy's numbers": lambda: keras_adam.Adam(np.float32(0.1), 0, np.float64(0.99), epsilon=0),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_round_trip(case):
    optimizer = OPTIMIZERS[case]()
    config = optimizer.get_config()
    untouched = copy.deepcopy(config)
    revived = type(optimizer).from_config(config)
    assert config == untouched
    assert revived.get_config() == config
    # As a `.keras` file holds it.
    stored = json.loads(json.dumps(config))
    assert type(optimizer).from_config(stored).get_config() == config


@pytest.mark.parametrize(
    "deserialize",
    [keras.saving.deserialize_keras_object, keras.optimizers.deserialize, keras.optimizers.get],
)
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_serialization(case, deserialize):
    """Keras has classes of the same names, which must not be mistaken for ours."""
    optimizer = OPTIMIZERS[case]()
    revived = deserialize(keras.saving.serialize_keras_object(optimizer))
    assert type(revived) is type(optimizer)
    assert revived.get_config() == optimizer.get_config()


@pytest.mark.parametrize("cls", [keras_adam.Adam, keras_adam.AdamW])
def test_registration(cls):
    assert keras.saving.get_registered_name(cls) == f"keras_adam>{cls.__name__}"
    assert keras.saving.get_registered_object(f"keras_adam>{cls.__name__}") is cls


@pytest.mark.parametrize("rate", [0.001, 1 / 3, 1e-5, 0.1, 0.0])
def test_learning_rate_is_what_was_given(rate):
    """Not 0.0010000000474974513, which is what float32 makes of 0.001."""
    assert keras_adam.Adam(rate).get_config()["learning_rate"] == rate
    optimizer = keras_adam.Adam(0.7)
    optimizer.learning_rate = rate
    assert optimizer.get_config()["learning_rate"] == rate


def test_learning_rate_that_a_step_or_a_file_set():
    optimizer = keras_adam.Adam(0.7)
    optimizer.learning_rate.assign(0.001)
    assert optimizer.get_config()["learning_rate"] == 0.001


def test_default_config_is_that_of_keras():
    """So a file says nothing that Keras's Adam does not know."""
    ours, theirs = keras_adam.Adam(name="a").get_config(), keras.optimizers.Adam(name="a")
    assert ours == {**theirs.get_config(), "learning_rate": 0.001}
    assert keras.optimizers.Adam.from_config(dict(ours)).get_config() == theirs.get_config()
    assert keras_adam.Adam.from_config(theirs.get_config()).beta_2 == 0.999


def test_exclusions_from_decay():
    optimizer = keras_adam.Adam(weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer.exclude_from_weight_decay([keras.Variable([1.0], name="gamma")])
    config = json.loads(json.dumps(optimizer.get_config()))
    assert keras_adam.Adam.from_config(config).get_config() == config
