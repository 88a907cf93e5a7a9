"""Whole trajectories: 200 steps of gradients over seven decades, against independent oracles."""

import itertools

import keras
import numpy as np
import optax
import pytest
import torch

import keras_adam
from support import reference
from support.helpers import (
    assert_same_trajectory,
    float64_allowed,
    make_variables,
    random_problem,
    run,
    run_optax,
    run_reference,
    run_torch,
    to_numpy,
    to_tensors,
    without_empty,
)
from support.tolerances import AGAINST_KERAS, HALF_PRECISION_STEPS, TOLERANCES

FLOAT32 = TOLERANCES["float32"]


def cases(table):
    return pytest.mark.parametrize("options", [pytest.param(v, id=k) for k, v in table.items()])


def grid(*axes):
    """The product of axes, each {readable name: options}, as one such table."""
    return {name_of(point): merged(point) for point in product_of(axes)}


def product_of(axes):
    return itertools.product(*(axis.items() for axis in axes))


def name_of(point):
    return "-".join(name for name, _ in point if name)


def merged(point):
    return dict(itertools.chain.from_iterable(options.items() for _, options in point))


# Against the reference -------------------------------------------------------------------------

AMSGRAD = {
    "adam": {},
    "amsgrad": {"amsgrad": True},
    "amsgrad_corrected": {"amsgrad": "corrected"},
}
EPSILON = {"epsilon_hat": {}, "epsilon": {"epsilon_hat": False}}
DECAY = {
    "": {},
    "decoupled": {"weight_decay": 0.1},
    "L2": {"weight_decay": 0.1, "decoupled_weight_decay": False},
}
SIGN = {"": {}, "maximize": {"maximize": True}}


@pytest.mark.short(
    "adam-epsilon_hat",
    "adam-epsilon-L2-maximize",
    "amsgrad-epsilon",
    "amsgrad-epsilon_hat-decoupled-maximize",
    "amsgrad_corrected-epsilon_hat-L2",
    "amsgrad_corrected-epsilon-decoupled",
)
@cases(grid(AMSGRAD, EPSILON, DECAY, SIGN))
def test_rule(options, problem):
    actual = run(keras_adam.Adam(**options), *problem)
    assert_same_trajectory(actual, run_reference(*problem, **options), FLOAT32)


CLIPPING = {
    "": {},
    "clipnorm": {"clipnorm": 0.1},
    "clipvalue": {"clipvalue": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.1},
}
EMA = {
    "": {},
    "ema": {"use_ema": True, "ema_momentum": 0.8},
    "ema_overwrite": {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 7},
}
ACCUMULATION = {
    "": {},
    "accumulate": {"gradient_accumulation_steps": 4},
    "accumulate_scaled": {"gradient_accumulation_steps": 3, "loss_scale_factor": 1000.0},
}
# The rest of the rule, chosen so that the order of a step shows: the L2 penalty is not clipped.
SENSITIVE = {"amsgrad": True, "weight_decay": 0.1, "decoupled_weight_decay": False}


def latin_square(*axes):
    """A third of the product of three axes, in which any two options of two axes still meet."""
    places = [{name: i for i, name in enumerate(axis)} for axis in axes]
    return {
        name_of(point): merged(point)
        for point in product_of(axes)
        if sum(place[name] for place, (name, _) in zip(places, point, strict=True)) % 3 == 0
    }


@cases(latin_square(CLIPPING, EMA, ACCUMULATION))
def test_order_of_a_step(options, problem):
    options = options | SENSITIVE
    actual = run(keras_adam.Adam(**options), *problem)
    assert_same_trajectory(actual, run_reference(*problem, **options), FLOAT32)


@cases(
    {
        "learning_rate_0": {"learning_rate": 0, "weight_decay": 0.1},
        "learning_rate_int": {"learning_rate": 1, "clipvalue": 1e-9, "epsilon": 1e-6},
        "beta_1_0": {"beta_1": 0},
        "no_memory": {"beta_1": 0.0, "beta_2": 0.0},
        "short_memory": {"beta_1": 0.5, "beta_2": 0.75},
        # float32 has 1 - 1e-7 only to a sixth; 1 - beta_2**t must not be computed from it.
        "long_memory": {"beta_1": 0.99, "beta_2": 1 - 1e-7},
        "epsilon_0": {"epsilon": 0.0},
        "epsilon_1": {"epsilon": 1.0},
        "epsilon_1_of_algorithm_1": {"epsilon": 1.0, "epsilon_hat": False},
        "weight_decay_0": {"weight_decay": 0},
        "loss_scale": {"loss_scale_factor": 2.0**15},
        "ema_momentum_0": {"use_ema": True, "ema_momentum": 0, "ema_overwrite_frequency": 1},
        "ema_momentum_1": {"use_ema": True, "ema_momentum": 1, "ema_overwrite_frequency": 50},
        "overwrite_each_update": {
            "use_ema": True,
            "ema_overwrite_frequency": 1,
            "gradient_accumulation_steps": 2,
        },
    }
)
def test_extreme_values(options, problem):
    actual = run(keras_adam.Adam(**options), *problem)
    assert_same_trajectory(actual, run_reference(*problem, **options), FLOAT32)


def test_adamw_decays_by_default(problem):
    actual = run(keras_adam.AdamW(), *problem)
    assert_same_trajectory(actual, run_reference(*problem, weight_decay=0.004), FLOAT32)


def halving(value):
    """A Keras schedule that halves `value` each 50 steps, and the same function in NumPy."""
    schedule = keras.optimizers.schedules.ExponentialDecay(value, decay_steps=50, decay_rate=0.5)
    return schedule, lambda calls: value * 0.5 ** (calls / 50)


@pytest.mark.parametrize(
    ("name", "value", "accumulation"),
    [
        ("learning_rate", 1e-3, None),
        # A schedule is asked for the count of calls, micro-steps included, as in Keras.
        ("learning_rate", 1e-3, 4),
        ("beta_1", 0.9, None),
        ("beta_2", 0.9, 4),
        ("epsilon", 1.0, None),
    ],
)
def test_schedule(name, value, accumulation, problem):
    schedule, function = halving(value)
    options = {"weight_decay": 0.1, "gradient_accumulation_steps": accumulation}
    actual = run(keras_adam.Adam(**{name: schedule}, **options), *problem)
    assert_same_trajectory(actual, run_reference(*problem, **{name: function}, **options), FLOAT32)


@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "L2"])
def test_schedule_of_weight_decay(decoupled, problem):
    schedule, function = halving(1.0)
    options = {"decoupled_weight_decay": decoupled}
    actual = run(keras_adam.Adam(weight_decay=schedule, **options), *problem)
    desired = run_reference(*problem, weight_decay=function, **options)
    assert_same_trajectory(actual, desired, FLOAT32)


@pytest.mark.parametrize("accumulation", [None, 4])
def test_constraint_acts_before_the_average(accumulation, problem):
    options = {
        "use_ema": True,
        "ema_momentum": 0.8,
        "ema_overwrite_frequency": 5,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-2,
    }
    # An average of unit vectors is shorter than one, so a constraint after it would show; the more
    # so the larger the steps are.
    bounds = [keras.constraints.UnitNorm(axis=0), keras.constraints.NonNeg(), None, None]
    actual = run(keras_adam.Adam(**options), *problem, constraints=bounds)
    bounds = [lambda p: p / np.linalg.norm(p, axis=0), lambda p: np.maximum(p, 0), None, None]
    desired = run_reference(*problem, constraints=bounds, **options)
    assert_same_trajectory(actual, desired, FLOAT32)


# Eager calls and dtypes ------------------------------------------------------------------------

ALL_AT_ONCE = {
    "weight_decay": 0.1,
    "amsgrad": True,
    "global_clipnorm": 0.1,
    "gradient_accumulation_steps": 3,
    "loss_scale_factor": 10.0,
    "use_ema": True,
    "ema_momentum": 0.8,
    "ema_overwrite_frequency": 2,
}
EAGER = {
    "default": {},
    "corrected_L2": {
        "amsgrad": "corrected",
        "weight_decay": 0.1,
        "decoupled_weight_decay": False,
    },
    "clipnorm": {"clipnorm": 0.1},
    "all_at_once": ALL_AT_ONCE,
}


@cases(EAGER)
def test_eager_apply(options, problem):
    starts, gradients = problem[0], problem[1][:20]
    actual = run(keras_adam.Adam(**options), starts, gradients, compiled=False)
    assert_same_trajectory(actual, run_reference(starts, gradients, **options), FLOAT32)


@cases(EAGER)
def test_float64(options, problem):
    with float64_allowed():
        actual = run(keras_adam.Adam(**options), *problem, dtype="float64")
    assert_same_trajectory(actual, run_reference(*problem, **options), TOLERANCES["float64"])


@pytest.mark.short("bfloat16-all_at_once", "float16-default", "float16-corrected_L2")
@cases(EAGER)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, options, rng):
    starts, gradients = random_problem(rng, HALF_PRECISION_STEPS)
    starts = rounded(starts, dtype)
    gradients = [rounded(arrays, dtype) for arrays in gradients]
    options = {"learning_rate": 2e-2} | options
    actual = run(keras_adam.Adam(**options), starts, gradients, dtype=dtype)
    assert_same_trajectory(actual, run_reference(starts, gradients, **options), TOLERANCES[dtype])


def rounded(arrays, dtype):
    return [np.float32(a) for a in to_numpy(make_variables(arrays, dtype))]


def test_numbers_in_every_form(problem):
    """NumPy scalars, tensors and callables mean what the Python number means."""
    starts, gradients = problem[0], problem[1][:20]
    optimizer = keras_adam.Adam(
        learning_rate=np.float32(1e-3),
        beta_1=lambda: 0.8,
        beta_2=keras.ops.convert_to_tensor(0.99),
        epsilon=np.float64(1e-7),
        weight_decay=lambda: keras.ops.convert_to_tensor(0.1),
    )
    actual = run(optimizer, starts, gradients, compiled=False)
    # 0.99 went through a float32 tensor.
    options = {"beta_1": 0.8, "beta_2": float(np.float32(0.99)), "weight_decay": 0.1}
    assert_same_trajectory(actual, run_reference(starts, gradients, **options), FLOAT32)


def test_callable_learning_rate_is_called_each_step(problem):
    starts, gradients = problem[0], problem[1][:20]
    rates = iter(1e-3 / (1 + i) for i in itertools.count())
    actual = run(keras_adam.Adam(lambda: next(rates)), starts, gradients, compiled=False)
    desired = run_reference(starts, gradients, learning_rate=lambda i: 1e-3 / (1 + i))
    assert_same_trajectory(actual, desired, FLOAT32)


def test_assigned_learning_rate_holds_from_the_next_step(problem):
    starts, gradients = problem[0], problem[1][:20]
    variables, optimizer = make_variables(starts), keras_adam.Adam(1e-3)
    for i, arrays in enumerate(gradients):
        optimizer.learning_rate = 1e-3 / (1 + i)
        optimizer.apply(to_tensors(arrays), variables)
    desired = run_reference(starts, gradients, learning_rate=lambda i: 1e-3 / (1 + i))
    assert_same_trajectory({20: to_numpy(variables)}, {20: desired[20]}, FLOAT32)


# Against Keras ---------------------------------------------------------------------------------


@pytest.mark.short("default", "betas", "weight_decay", "ema_overwrite", "accumulation_and_all")
@cases(
    {
        "default": {},
        "betas": {"learning_rate": 3e-4, "beta_1": 0.5, "beta_2": 0.95},
        "epsilon": {"epsilon": 1e-3},
        "amsgrad": {"amsgrad": True},
        "weight_decay": {"weight_decay": 0.1},
        "clipnorm": {"clipnorm": 0.1, "weight_decay": 0.1},
        "clipvalue": {"clipvalue": 0.1, "weight_decay": 0.1},
        "global_clipnorm": {"global_clipnorm": 0.1, "amsgrad": True},
        "ema": {"use_ema": True, "ema_momentum": 0.8},
        "ema_overwrite": {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 7},
        "loss_scale_factor": {"loss_scale_factor": 1000.0},
        # Without EMA: Keras averages on every micro-step.
        "accumulation": {"gradient_accumulation_steps": 4},
        "accumulation_and_all": {
            "gradient_accumulation_steps": 3,
            "weight_decay": 0.1,
            "amsgrad": True,
            "global_clipnorm": 0.1,
            "loss_scale_factor": 10.0,
        },
    }
)
def test_keras_adam(options, problem):
    problem = without_empty(problem)
    desired = run(keras.optimizers.Adam(**options), *problem)
    assert_same_trajectory(run(keras_adam.Adam(**options), *problem), desired, AGAINST_KERAS)


@cases({"default": {}, "options": {"weight_decay": 0.1, "amsgrad": True, "clipnorm": 0.1}})
def test_keras_adamw(options, problem):
    desired = run(keras.optimizers.AdamW(**options), *problem)
    assert_same_trajectory(run(keras_adam.AdamW(**options), *problem), desired, AGAINST_KERAS)


@pytest.mark.parametrize(
    ("schedule", "accumulation"), [("cosine", None), ("piecewise", 4), ("inverse_time", None)]
)
def test_keras_schedules(schedule, accumulation, problem):
    schedules = keras.optimizers.schedules
    rate = {
        "cosine": schedules.CosineDecay(0.0, 150, warmup_target=1e-3, warmup_steps=30),
        "piecewise": schedules.PiecewiseConstantDecay([20, 100], [1e-3, 3e-4, 1e-4]),
        "inverse_time": schedules.InverseTimeDecay(1e-3, 10, 0.5, staircase=True),
    }[schedule]
    options = {"gradient_accumulation_steps": accumulation, "weight_decay": 0.1}
    desired = run(keras.optimizers.Adam(rate, **options), *problem)
    assert_same_trajectory(run(keras_adam.Adam(rate, **options), *problem), desired, AGAINST_KERAS)


# Against torch and optax, which compute in float64 ----------------------------------------------


@cases(
    {
        "default": {},
        "eps": {"eps": 1e-3},
        "amsgrad": {"amsgrad": True},
        "maximize": {"maximize": True},
        "L2": {"weight_decay": 0.1},
        "L2_maximize": {"weight_decay": 0.1, "maximize": True},
        "L2_amsgrad_eps": {"weight_decay": 0.1, "amsgrad": True, "eps": 1e-3},
    }
)
def test_torch_adam(options, problem):
    actual = run(from_torch(decoupled_weight_decay=False, **options), *problem)
    assert_same_trajectory(actual, run_torch(torch.optim.Adam, *problem, **options), FLOAT32)


@cases(
    {
        "default": {"weight_decay": 0.01},
        "amsgrad": {"weight_decay": 0.1, "amsgrad": True},
        "maximize_eps": {"weight_decay": 0.1, "maximize": True, "eps": 1e-3},
    }
)
def test_torch_adamw(options, problem):
    actual = run(from_torch(**options), *problem)
    assert_same_trajectory(actual, run_torch(torch.optim.AdamW, *problem, **options), FLOAT32)


def from_torch(eps=1e-8, **options):
    return keras_adam.Adam(epsilon=eps, epsilon_hat=False, **options)


@pytest.mark.parametrize(
    ("transformation", "options", "eps"),
    [
        pytest.param(optax.adam, {}, 1e-8, id="adam"),
        pytest.param(optax.adam, {}, 1e-3, id="adam_eps"),
        pytest.param(optax.amsgrad, {"amsgrad": "corrected"}, 1e-8, id="amsgrad"),
        pytest.param(optax.amsgrad, {"amsgrad": "corrected"}, 1e-3, id="amsgrad_eps"),
        pytest.param(optax.adamw, {"weight_decay": 1e-4}, 1e-8, id="adamw"),
    ],
)
def test_optax(transformation, options, eps, problem):
    actual = run(keras_adam.Adam(epsilon=eps, epsilon_hat=False, **options), *problem)
    desired = run_optax(lambda: transformation(1e-3, eps=eps), *problem)
    assert_same_trajectory(actual, desired, FLOAT32)


# What a step leaves alone, and what it repeats ---------------------------------------------------


@cases(
    EAGER
    | {
        "maximize_L2": {"maximize": True, "weight_decay": 0.1, "decoupled_weight_decay": False},
        "clipvalue": {"clipvalue": 1e-3},
        "accumulation": {"gradient_accumulation_steps": 2},
        "loss_scale_factor": {"loss_scale_factor": 2.0},
    }
)
def test_gradients_are_not_written_to(options, problem):
    starts, gradients = problem
    variables = make_variables(starts)
    optimizer = keras_adam.Adam(**options)
    # All are kept: an accumulator must not share the memory of an earlier gradient.
    tensors = [to_tensors([a.copy() for a in arrays]) for arrays in gradients[:6]]
    for step in tensors:
        optimizer.apply(step, variables)
    for step, arrays in zip(tensors, gradients, strict=False):
        for tensor, array in zip(step, arrays, strict=True):
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(tensor), array)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="only torch's tensors can change")
@cases({"accumulation": {"gradient_accumulation_steps": 3}, "all_at_once": ALL_AT_ONCE})
def test_gradients_may_be_reused_by_the_caller(options, problem):
    """As with `zero_grad(set_to_none=False)`: the next backward pass writes to the same memory."""
    starts, gradients = problem[0], problem[1][:20]
    variables, optimizer = make_variables(starts), keras_adam.Adam(**options)
    buffers = [torch.zeros_like(v.value) for v in variables]
    for arrays in gradients:
        for buffer, array in zip(buffers, arrays, strict=True):
            buffer.copy_(torch.tensor(array))
        optimizer.apply(buffers, variables)
    desired = run_reference(starts, gradients, **options)
    assert_same_trajectory({20: to_numpy(variables)}, {20: desired[20]}, FLOAT32)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@cases({"default": {}, "all_at_once": ALL_AT_ONCE})
def test_same_run_gives_the_same_bits(options, compiled, problem):
    starts, gradients = problem[0], problem[1][:30]
    first, second = (
        run(keras_adam.Adam(**options), starts, gradients, compiled=compiled) for _ in range(2)
    )
    assert_same_trajectory(first, second, {"rtol": 0, "atol": 0})


def test_finalize_writes_the_average(problem):
    starts, gradients = problem[0], problem[1][:20]
    variables = make_variables(starts)
    optimizer = keras_adam.Adam(use_ema=True, ema_momentum=0.8)
    oracle = reference.Adam(starts, use_ema=True, ema_momentum=0.8)
    for arrays in gradients:
        optimizer.apply(to_tensors(arrays), variables)
        oracle.step(arrays)
    optimizer.finalize_variable_values(variables)
    assert_same_trajectory({20: to_numpy(variables)}, {20: oracle.average}, FLOAT32)
