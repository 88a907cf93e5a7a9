"""Counts of steps that float32 cannot hold (above 2^24), and the end of int32."""

import keras
import numpy as np
import pytest

import keras_adam
from support.models import fit, make_model
from support.resume import state_of
from support.steps import BACKEND, compiled_step, either_way, value_of

# Of `iterations`: Keras makes it int64 on TensorFlow.
LAST = 2**63 - 1 if BACKEND == "tensorflow" else 2**31 - 1
GRADIENT = np.array([0.5, -0.5], "float32")


def at(count, **options):
    variable = keras.Variable([1.0, -1.0])
    optimizer = keras_adam.Adam(0.01, **options)
    optimizer.build([variable])
    optimizer._iterations.assign(np.array(count))
    return optimizer, variable


def moved(optimizer, variable, steps=1, make_step=compiled_step):
    step, before = make_step(optimizer, [variable]), value_of(variable)
    for _ in range(steps):
        step(GRADIENT)
    return value_of(variable) - before


@either_way
@pytest.mark.parametrize("count", [2**24 - 1, 2**24, 2**24 + 1, 2**31 - 3, 2**31 - 2])
def test_first_step_of_fresh_moments_at_a_late_count(make_step, count):
    """All bias corrections are 1: the step is lr * 0.1 g / sqrt(0.001 g^2)."""
    optimizer, variable = at(count)
    change = moved(optimizer, variable, make_step=make_step)
    np.testing.assert_allclose(change, [-0.01 * 0.1 / 0.001**0.5, 0.01 * 0.1 / 0.001**0.5], 1e-5)
    assert int(value_of(optimizer.iterations)) == count + 1


def test_bias_correction_goes_on_where_beta_2_is_all_but_one():
    """1 - beta_2^t is 0.0166 at 2^24; a `t` off by one is 6e-8 of it."""
    rate = 1e-9
    optimizer, variable = at(2**24, beta_1=0.0, beta_2=1 - rate)
    correction = -np.expm1((2**24 + 1) * np.log1p(-rate))
    change = moved(optimizer, variable)
    expected = 0.01 * correction**0.5 * 0.5 / ((rate * 0.25) ** 0.5 + 1e-7)
    np.testing.assert_allclose(-change[0], expected, rtol=1e-5)


@either_way
@pytest.mark.parametrize("count", [2**24 + 1, 2**31 - 4])
def test_variable_that_joins_late_starts_at_its_own_step_one(make_step, count):
    optimizer, variable = at(count)
    late = keras.Variable([1.0, -1.0])
    optimizer.add_param_group({"params": late})
    optimizer.build([variable, late])
    step = make_step(optimizer, [variable, late])
    for steps in (1, 2):  # each of them moves by the learning rate
        step(GRADIENT, GRADIENT)
        np.testing.assert_allclose(value_of(late), [1 - 0.01 * steps, 0.01 * steps - 1], 1e-5)


@pytest.mark.short("*-0-*", "*-2-*")
@either_way
@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epsilon_hat": False, "weight_decay": 0.1},
        {"amsgrad": "corrected"},
        {"gradient_accumulation_steps": 2, "skip_nonfinite": True},
        {"use_ema": True, "state_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_count_set_back_to_before_a_variable_joined(make_step, count, options):
    """The variable then counts from the beginning like the others, as if it had always been there."""
    ends = []
    every = options.get("gradient_accumulation_steps", 1)
    for joins_late in (True, False):
        variables = [keras.Variable([x, -x], name=f"v{x}") for x in (1.0, 2.0)]
        optimizer = keras_adam.Adam(0.01, param_groups=[], **options)
        optimizer.build(variables[:1] if joins_late else variables)
        if joins_late:
            optimizer._iterations.assign(3 * every)
            optimizer.add_param_group({"params": variables[1]})
            optimizer.build(variables)
            assert int(value_of(optimizer._parameters.joinings[0].update)) == 3
        step = make_step(optimizer, variables)
        for variable in (*optimizer._momentums, *optimizer._velocities):
            variable.assign(np.full(2, 0.25, "float32"))
        optimizer._iterations.assign(count * every)
        for _ in range(6 * every):
            step(GRADIENT, GRADIENT)
        ends.append([value_of(v) for v in (*variables, *optimizer._momentums)])
        assert int(value_of(optimizer._iterations)) == (count + 6) * every
        if joins_late and count < 3:
            assert int(value_of(optimizer._parameters.joinings[0].update)) == 0
    for late, early in zip(*ends, strict=True):
        assert np.isfinite(late).all()
        if count < 3:
            np.testing.assert_allclose(late, early, rtol=1e-6)
    assert np.allclose(ends[0][1], ends[1][1], rtol=1e-6) is (count < 3)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="int64 there")
@either_way
def test_count_stays_at_its_end(make_step):
    """Steps go on: bias corrections are 1 there, as they are a thousand steps before."""
    ends = []
    for count in (LAST - 2, LAST - 1000):
        optimizer, variable = at(count)
        step = make_step(optimizer, [variable])
        for _ in range(5):
            step(GRADIENT)
        assert int(value_of(optimizer.iterations)) == min(count + 5, LAST)
        ends.append(value_of(variable))
    assert np.isfinite(ends[0]).all()
    np.testing.assert_array_equal(*ends)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="int64 there")
def test_fit_goes_on_at_the_last_count():
    model = make_model(keras_adam.Adam())
    model.optimizer.build(model.trainable_variables)
    model.optimizer.iterations.assign(LAST - 2)
    before = model.get_weights()
    fit(model)
    assert int(value_of(model.optimizer.iterations)) == LAST
    for was, now in zip(before, model.get_weights(), strict=True):
        assert np.isfinite(now).all()
        assert not np.array_equal(was, now)


@either_way
def test_count_of_skipped_steps_stands_at_its_end(make_step):
    optimizer, variable = at(0, skip_nonfinite=True)
    optimizer.skipped_steps.assign(np.array(LAST - 1))
    step = make_step(optimizer, [variable])
    for _ in range(3):
        step(np.array([0.5, np.inf], "float32"))
    assert int(keras.ops.convert_to_numpy(optimizer.skipped_steps)) == LAST
    assert int(value_of(optimizer.iterations)) == 0


@pytest.mark.skipif(BACKEND != "tensorflow", reason="int32 elsewhere")
def test_tensorflow_goes_on_beyond_int32():
    optimizer, variable = at(2**31 - 2, gradient_accumulation_steps=2)
    moved(optimizer, variable, steps=4)
    assert int(value_of(optimizer._iterations)) == 2**31 + 2


def test_set_weights_does_not_round_counts():
    source, _ = at(LAST - 2, skip_nonfinite=True)
    source.skipped_steps.assign(np.array(LAST))
    target, _ = at(5, skip_nonfinite=True)
    target.set_weights(state_of(source))
    counts = [keras.ops.convert_to_numpy(x) for x in (target._iterations, target.skipped_steps)]
    assert [int(x) for x in counts] == [LAST - 2, LAST]


def test_saved_count_that_does_not_fit_is_refused():
    optimizer, _ = at(5)
    store = {}
    optimizer.save_own_variables(store)
    store["0"] = np.array(2**33 + 7)
    if BACKEND == "tensorflow":
        optimizer.load_own_variables(store)
        assert int(value_of(optimizer.iterations)) == 2**33 + 7
        return
    with pytest.raises(ValueError, match="8589934599"):
        optimizer.load_own_variables(store)
    assert int(value_of(optimizer.iterations)) == 5
