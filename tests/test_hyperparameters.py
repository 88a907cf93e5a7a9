"""Each kind of value that a hyperparameter may have, and changing it between steps."""

import itertools

import keras
import numpy as np
import pytest

import keras_adam
from support import reference
from support.steps import compiled_step, eager_step, either_way, value_of

START = np.array([1.0, -2.0, 3.0])
GRADIENTS = [np.array([1.0, 0.1, -0.3]) * k for k in (1, -2, 0.5, 3, 1, 1)]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
NAMES = ["learning_rate", "beta_1", "beta_2", "epsilon", "weight_decay"]
schedules = keras.optimizers.schedules


def train(make_step, optimizer, between=None):
    variable = keras.Variable(START)
    step = make_step(optimizer, [variable])
    for i, gradient in enumerate(GRADIENTS):
        if between is not None:
            between(optimizer, i)
        step(gradient)
    return value_of(variable)


def train_reference(**options):
    oracle = reference.Adam([START], **options)
    for gradient in GRADIENTS:
        oracle.step([gradient])
    return oracle.parameters[0]


def tensor(value):
    return keras.ops.convert_to_tensor(value, dtype="float32")


VALUES = dict(zip(NAMES, [0.5, 0.75, 0.875, 0.125, 0.25], strict=True))
CONVERSIONS = {
    "floats": float,
    "NumPy scalars": np.float32,
    "NumPy arrays": np.array,
    "tensors": tensor,
    "variables": lambda value: keras.Variable(value),
    "callables that return tensors": lambda value: lambda: tensor(value),
    "schedules": lambda value: schedules.PiecewiseConstantDecay([100], [value, 0.0]),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_kinds_of_values(convert):
    optimizer = keras_adam.Adam(**{name: convert(value) for name, value in VALUES.items()})
    np.testing.assert_allclose(train(compiled_step, optimizer), train_reference(**VALUES), **CLOSE)


def test_ints():
    options = {"learning_rate": 1, "beta_1": 0, "beta_2": 0, "epsilon": 2, "weight_decay": 0}
    optimizer = keras_adam.Adam(**options)
    np.testing.assert_allclose(train(compiled_step, optimizer), train_reference(**options), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_callable_is_called_at_each_step(name):
    """A step that is not compiled calls it each time, so that it may return a plain number."""
    values = [VALUES[name] * factor for factor in (1, 0.5, 0.25, 0.75, 0.5, 0.125)]
    calls = iter(values)
    optimizer = keras_adam.Adam(**{**VALUES, name: lambda: next(calls)})
    expected = train_reference(**{**VALUES, name: lambda step: values[step]})
    np.testing.assert_allclose(train(eager_step, optimizer), expected, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_schedule(name):
    value = VALUES[name]
    schedule = schedules.ExponentialDecay(value, 2, 0.5)
    optimizer = keras_adam.Adam(**{**VALUES, name: schedule})
    expected = train_reference(**{**VALUES, name: lambda step: value * 0.5 ** (step / 2)})
    np.testing.assert_allclose(train(compiled_step, optimizer), expected, **CLOSE)


def test_schedule_counts_micro_steps_under_accumulation():
    """Keras documents that it counts all calls."""
    schedule = schedules.ExponentialDecay(0.5, 2, 0.5)
    optimizer = keras_adam.Adam(schedule, gradient_accumulation_steps=3)
    expected = train_reference(
        learning_rate=lambda step: 0.5 * 0.5 ** (step / 2), gradient_accumulation_steps=3
    )
    np.testing.assert_allclose(train(compiled_step, optimizer), expected, **CLOSE)


@either_way
@pytest.mark.parametrize("given", [0.25, 1, np.float32(0.25), tensor(0.25)], ids=repr)
def test_setting_the_learning_rate(make_step, given):
    """It holds from the next step on, compiled or not."""

    def halfway(optimizer, i):
        if i == 3:
            optimizer.learning_rate = given

    expected = train_reference(learning_rate=lambda step: 0.5 if step < 3 else float(given))
    np.testing.assert_allclose(train(make_step, keras_adam.Adam(0.5), halfway), expected, **CLOSE)


def test_setting_the_learning_rate_over_a_callable():
    rates = itertools.repeat(0.5)
    optimizer = keras_adam.Adam(lambda: next(rates))

    def halfway(optimizer, i):
        if i == 3:
            optimizer.learning_rate = 0.25

    expected = train_reference(learning_rate=lambda step: 0.5 if step < 3 else 0.25)
    np.testing.assert_allclose(train(eager_step, optimizer, halfway), expected, **CLOSE)
    assert float(optimizer.learning_rate) == 0.25
    assert optimizer.get_config()["learning_rate"] == 0.25


def test_setting_a_schedule_over_a_number():
    def halfway(optimizer, i):
        if i == 3:
            optimizer.learning_rate = schedules.ExponentialDecay(0.5, 2, 0.5)

    expected = train_reference(
        learning_rate=lambda step: 0.5 if step < 3 else 0.5 * 0.5 ** (step / 2)
    )
    np.testing.assert_allclose(train(eager_step, keras_adam.Adam(0.5), halfway), expected, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_setting_a_hyperparameter(name):
    def halfway(optimizer, i):
        if i == 3:
            setattr(optimizer, name, VALUES[name] / 2)
            assert float(getattr(optimizer, name)) == VALUES[name] / 2

    expected = train_reference(
        **{**VALUES, name: lambda step: VALUES[name] * (1 if step < 3 else 0.5)}
    )
    np.testing.assert_allclose(
        train(eager_step, keras_adam.Adam(**VALUES), halfway), expected, **CLOSE
    )


def test_learning_rate_under_bfloat16():
    """The rate itself keeps float32: 0.001 in bfloat16 is 0.00099945."""
    keras.config.set_floatx("bfloat16")
    assert keras_adam.Adam(0.001).get_config()["learning_rate"] == 0.001
    np.testing.assert_allclose(float(keras_adam.Adam(0.001).learning_rate), 0.001, rtol=1e-6)
