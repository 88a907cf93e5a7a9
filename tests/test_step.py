"""What one step does, in which order, and to which variables."""

import keras
import numpy as np
import pytest

import keras_adam
from support import reference
from support.steps import BACKEND, compiled_step, either_way, slots, value_of, values_of

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
without_some = pytest.mark.filterwarnings("ignore:Gradients do not exist for variables")


def variable(value, name="variable", dtype="float32", constraint=None):
    made = keras.Variable(value, dtype=dtype, name=name)
    made.constraint = constraint
    return made


class AtLeastHalf(keras.constraints.Constraint):
    def __call__(self, values):
        return keras.ops.maximum(values, 0.5)


@either_way
def test_order_of_a_step(make_step, rng):
    """All stages at once: unscale, accumulate, clip, decay and Adam, constraints, EMA."""
    options = {
        "learning_rate": 0.1,
        "weight_decay": 0.3,
        "amsgrad": True,
        "global_clipnorm": 0.5,
        "loss_scale_factor": 128.0,
        "gradient_accumulation_steps": 3,
        "use_ema": True,
        "ema_momentum": 0.5,
        "ema_overwrite_frequency": 3,
    }
    starts = [rng.uniform(0.5, 0.6, (3, 2)), rng.uniform(0.5, 0.6, 4)]
    variables = [variable(s, f"v{i}", constraint=AtLeastHalf()) for i, s in enumerate(starts)]
    optimizer = keras_adam.Adam(**options)
    oracle = reference.Adam(starts, constraints=[lambda p: np.maximum(p, 0.5)] * 2, **options)
    step = make_step(optimizer, variables)
    constrained = 0
    for _ in range(14):
        gradients = [128 * rng.standard_normal(s.shape).astype("float32") for s in starts]
        step(*gradients)
        oracle.step(gradients)
        constrained += sum(np.sum(p == 0.5) for p in oracle.parameters)
        for got, want in zip(values_of(variables), oracle.parameters, strict=True):
            np.testing.assert_allclose(got, want, **CLOSE)
        for got, want in zip(slots(optimizer, "gradient_accumulator"), oracle.sum, strict=True):
            np.testing.assert_allclose(value_of(got), want, rtol=1e-5, atol=1e-5)
        averages = oracle.average or [np.zeros_like(s) for s in starts]
        for got, want in zip(slots(optimizer, "average"), averages, strict=True):
            np.testing.assert_allclose(value_of(got), want, **CLOSE)
    assert constrained > 0
    assert int(optimizer.iterations) == 4


@either_way
def test_sum_of_micro_steps_is_clipped_not_each(make_step):
    v = variable([1.0])
    step = make_step(keras_adam.Adam(0.1, clipvalue=1.0, gradient_accumulation_steps=2), [v])
    step([10.0])
    step([-10.0])
    np.testing.assert_array_equal(value_of(v), [1.0])


@without_some
@either_way
@pytest.mark.parametrize("present", [0, 1], ids=["first", "last"])
def test_gradient_in_one_micro_step_only(make_step, present):
    """Half of it counts, whichever of the two is None."""
    a, b = variable([1.0], "a"), variable([1.0], "b")
    optimizer = keras_adam.Adam(0.1, gradient_accumulation_steps=2)
    step = make_step(optimizer, [a, b])
    for i in range(4):
        step([1.0], [4.0] if i % 2 == present else None)
    expected = reference.Adam([np.ones(1)], 0.1)
    expected.step([[2.0]])
    expected.step([[2.0]])
    np.testing.assert_allclose(value_of(b), expected.parameters[0], **CLOSE)
    for accumulator in slots(optimizer, "gradient_accumulator"):
        np.testing.assert_array_equal(value_of(accumulator), [0.0])


@without_some
@either_way
@pytest.mark.parametrize("accumulation", [None, 2])
def test_variable_without_gradient_is_left_alone(make_step, accumulation):
    """Weight decay leaves it alone too, and its moments stay."""
    a, b = variable([1.0], "a"), variable([1.0], "b")
    optimizer = keras_adam.Adam(0.1, weight_decay=0.5, gradient_accumulation_steps=accumulation)
    step = make_step(optimizer, [a, b])
    for _ in range(2):
        step([1.0], [1.0])
    before = value_of(b), value_of(slots(optimizer, "momentum")[1])
    for _ in range(2):
        step([1.0], None)
    assert value_of(a) < before[0]
    np.testing.assert_array_equal(value_of(b), before[0])
    np.testing.assert_array_equal(value_of(slots(optimizer, "momentum")[1]), before[1])


@without_some
def test_average_of_a_variable_without_gradient():
    """The average follows the variable all the same, when the others are updated."""
    a, b = variable([1.0], "a"), variable([1.0], "b")
    optimizer = keras_adam.Adam(0.1, use_ema=True, ema_momentum=0.5)
    step = compiled_step(optimizer, [a, b])
    step([1.0], [1.0])
    b.assign([3.0])
    step([1.0], None)
    np.testing.assert_allclose(value_of(slots(optimizer, "average")[1]), [1.95], **CLOSE)


@either_way
def test_constraint_and_average_wait_for_an_update(make_step):
    v = variable([0.1], constraint=AtLeastHalf())
    optimizer = keras_adam.Adam(0.1, gradient_accumulation_steps=2, use_ema=True)
    step = make_step(optimizer, [v])
    step([1.0])
    np.testing.assert_allclose(value_of(v), [0.1])
    np.testing.assert_array_equal(value_of(slots(optimizer, "average")[0]), [0.0])
    step([1.0])
    np.testing.assert_allclose(value_of(v), [0.5])
    np.testing.assert_allclose(value_of(slots(optimizer, "average")[0]), [0.5])


@either_way
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_accumulator_forgets_what_is_not_finite(make_step, bad):
    v = variable([1.0])
    optimizer = keras_adam.Adam(0.1, gradient_accumulation_steps=2)
    step = make_step(optimizer, [v])
    step([bad])
    step([1.0])
    assert not np.isfinite(value_of(v)).any()
    np.testing.assert_array_equal(value_of(slots(optimizer, "gradient_accumulator")[0]), [0.0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"maximize": True, "weight_decay": 0.1, "decoupled_weight_decay": False},
        {"amsgrad": True, "global_clipnorm": 0.1, "loss_scale_factor": 4.0},
        {"clipnorm": 0.1, "gradient_accumulation_steps": 2},
        {"clipvalue": 0.1, "use_ema": True, "ema_overwrite_frequency": 1},
    ],
    ids=lambda options: "+".join(options) or "default",
)
def test_gradients_are_not_written_to(options, dtype, rng):
    v = variable(rng.standard_normal(5), dtype=dtype)
    optimizer = keras_adam.Adam(0.1, **options)
    gradient = keras.ops.convert_to_tensor(rng.standard_normal(5), dtype=dtype)
    gradients, before = [gradient], value_of(gradient)
    for _ in range(3):
        optimizer.apply(gradients, [v])
    assert gradients[0] is gradient
    np.testing.assert_array_equal(value_of(gradient), before)


def test_scalar_and_empty_variables():
    options = {"learning_rate": 0.1, "global_clipnorm": 1.0, "weight_decay": 0.1, "amsgrad": True}
    starts = [np.float32(2.0), np.zeros((0, 3), "float32")]
    variables = [variable(s, f"v{i}") for i, s in enumerate(starts)]
    step, oracle = (
        compiled_step(keras_adam.Adam(**options), variables),
        reference.Adam(starts, **options),
    )
    for _ in range(3):
        step(np.float32(4.0), np.zeros((0, 3)))
        oracle.step([4.0, np.zeros((0, 3))])
    for got, want in zip(values_of(variables), oracle.parameters, strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, **CLOSE)


# Half of the spacing of values near 1, times the number of steps: each may round so much.
STEPS = 10
BY_DTYPE = {"float16": STEPS * 2**-11, "bfloat16": STEPS * 2**-8, "float32": 1e-5}
if BACKEND != "jax":  # which has it on request only, for the whole process
    BY_DTYPE["float64"] = 1e-6  # of the learning rate's float32


@pytest.mark.parametrize("order", [1, -1], ids=["half first", "half last"])
def test_several_dtypes_in_one_model(order, rng):
    """Each variable is updated in its own precision, whichever comes first."""
    options = {"learning_rate": 0.05, "weight_decay": 0.1, "global_clipnorm": 2.0}
    dtypes = list(BY_DTYPE)[::order]
    start = rng.uniform(0.5, 1, 6).astype("float16").astype("float64")
    start = np.round(start * 64) / 64  # which all of these dtypes can hold
    variables = [variable(start, dtype, dtype) for dtype in dtypes]
    step = compiled_step(keras_adam.Adam(**options), variables)
    oracle = reference.Adam([start] * len(dtypes), **options)
    for _ in range(STEPS):
        gradient = np.round(rng.uniform(-1, 1, 6) * 64) / 64
        step(*[gradient] * len(dtypes))
        oracle.step([gradient] * len(dtypes))
    for v, want in zip(variables, oracle.parameters, strict=True):
        tolerance = BY_DTYPE[v.dtype]
        np.testing.assert_allclose(value_of(v), want, rtol=tolerance, atol=tolerance)
        assert np.abs(want - start).max() > 4 * tolerance


@pytest.mark.parametrize("amsgrad", [False, True, "corrected"])
@pytest.mark.parametrize("dtype", BY_DTYPE)
def test_zero_gradients(dtype, amsgrad):
    """From the first step on: 0 / (0 + epsilon), where float16 has no 1e-8."""
    v = variable([1.0, -2.0], dtype=dtype)
    step = compiled_step(keras_adam.Adam(0.5, epsilon=1e-8, amsgrad=amsgrad), [v])
    for _ in range(2):
        step([0.0, 0.0])
    np.testing.assert_array_equal(value_of(v), [1.0, -2.0])
    step([1e-4, 0.0])
    assert np.isfinite(value_of(v)).all()
    assert value_of(v)[0] < 1.0
    assert value_of(v)[1] == -2.0


@pytest.mark.parametrize("options", [{}, {"amsgrad": "corrected"}], ids=["plain", "portable"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_that_is_the_value_of_another_variable(options, compiled):
    """The gradient is that variable's value before the step, whichever is updated first."""
    starts = [np.arange(1.0, 4.0), np.array([2.0, -4.0, 6.0])]
    variables = [variable(x, f"v{i}") for i, x in enumerate(starts)]
    optimizer = keras_adam.Adam(0.1, **options)
    oracle = reference.Adam(starts, learning_rate=0.1, **options)

    def apply():
        optimizer.apply([v.value for v in reversed(variables)], variables)

    if compiled and BACKEND == "tensorflow":
        import tensorflow as tf

        optimizer.build(variables)
        apply = tf.function(apply, autograph=False)
    for _ in range(5):
        oracle.step(oracle.parameters[::-1])
        apply()
        for got, want in zip(variables, oracle.parameters, strict=True):
            np.testing.assert_allclose(value_of(got), want, **CLOSE)


def test_accumulation_without_a_gradient_for_what_has_no_moments():
    """A variable that is overwritten with its gradient waits for one."""
    moved, scale = keras.Variable([1.0]), keras.Variable([5.0])
    scale.overwrite_with_gradient = True
    optimizer = keras_adam.Adam(0.1, gradient_accumulation_steps=2)
    optimizer.build([moved, scale])
    one = keras.ops.ones(1)
    optimizer.apply([one, 7 * one], [moved, scale])
    optimizer.apply([one, None], [moved, scale])
    np.testing.assert_allclose(value_of(moved), [0.9], rtol=1e-6)
    assert np.isfinite(value_of(scale)).all()
