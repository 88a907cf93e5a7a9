"""The reference itself, against other people's implementations, all in float64."""

import keras
import optax
import pytest
import torch

from support.helpers import (
    assert_same_trajectory,
    float64_allowed,
    run,
    run_optax,
    run_reference,
    run_torch,
    without_empty,
)
from support.tolerances import EXACT, TOLERANCES

TORCH_CASES = {
    "adam": (torch.optim.Adam, {}),
    "betas": (torch.optim.Adam, {"betas": (0.5, 0.95)}),
    "no memory": (torch.optim.Adam, {"betas": (0.0, 0.0)}),
    "eps": (torch.optim.Adam, {"eps": 1e-3}),
    "L2": (torch.optim.Adam, {"weight_decay": 0.1}),
    "L2, maximize": (torch.optim.Adam, {"weight_decay": 0.1, "maximize": True}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "decoupled": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "decoupled, amsgrad": (torch.optim.AdamW, {"weight_decay": 0.1, "amsgrad": True}),
    "decoupled, maximize": (torch.optim.AdamW, {"weight_decay": 0.1, "maximize": True}),
}


@pytest.mark.parametrize("case", TORCH_CASES)
def test_agrees_with_torch(case, problem):
    torch_class, options = TORCH_CASES[case]
    beta_1, beta_2 = options.get("betas", (0.9, 0.999))
    actual = run_reference(
        *problem,
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=options.get("eps", 1e-8),
        weight_decay=options.get("weight_decay"),
        amsgrad=options.get("amsgrad", False),
        maximize=options.get("maximize", False),
        decoupled_weight_decay=torch_class is torch.optim.AdamW,
        epsilon_hat=False,
    )
    assert_same_trajectory(actual, run_torch(torch_class, *problem, **options), EXACT)


OPTAX_CASES = {
    "adam": (lambda: optax.adam(1e-3), {}),
    "schedule": (
        lambda: optax.adam(lambda i: 1e-3 / (1 + i)),
        {"learning_rate": lambda i: 1e-3 / (1 + i)},
    ),
    "adamw": (lambda: optax.adamw(1e-3, weight_decay=0.1), {"weight_decay": 0.1}),
    "amsgrad": (lambda: optax.amsgrad(1e-3), {"amsgrad": "corrected"}),
    "clipvalue": (
        lambda: optax.chain(optax.clip(0.1), optax.adam(1e-3)),
        {"clipvalue": 0.1},
    ),
    "global_clipnorm": (
        lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-3)),
        {"global_clipnorm": 0.1},
    ),
    "accumulation": (
        lambda: optax.MultiSteps(optax.adam(1e-3), 4, accumulator_dtype="float64"),
        {"gradient_accumulation_steps": 4},
    ),
}


@pytest.mark.parametrize("case", OPTAX_CASES)
def test_agrees_with_optax(case, problem):
    transformation, options = OPTAX_CASES[case]
    actual = run_reference(*problem, epsilon=1e-8, epsilon_hat=False, **options)
    assert_same_trajectory(actual, run_optax(transformation, *problem), EXACT)


# Keras holds the learning rate and reads the betas in float32. Here each is a sum of few powers of two, which float32
# holds exactly, so that all else is compared in float64.
IN_FLOAT32 = {"learning_rate": 2.0**-10, "beta_1": 1 - 2.0**-3, "beta_2": 1 - 2.0**-10}

KERAS_CASES = {
    "adam": {},
    "epsilon": {"epsilon": 1e-3},
    "amsgrad": {"amsgrad": True},
    "weight_decay": {"weight_decay": 0.125},
    "clipnorm": {"clipnorm": 0.125},
    "clipvalue": {"clipvalue": 0.125},
    "global_clipnorm": {"global_clipnorm": 0.125},
    "ema": {"use_ema": True, "ema_momentum": 0.75},
    "ema, overwrite": {"use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 7},
    "loss_scale_factor": {"loss_scale_factor": 1000.0},
    "accumulation": {"gradient_accumulation_steps": 4, "amsgrad": True},
}


@pytest.mark.parametrize("case", KERAS_CASES)
def test_agrees_with_keras(case, problem):
    options = IN_FLOAT32 | KERAS_CASES[case]
    problem = without_empty(problem)
    with float64_allowed():
        oracle = run(keras.optimizers.Adam(**options), *problem, dtype="float64")
    # On torch, Keras computes the maximum of a float64 tensor and a number in float32.
    tolerance = TOLERANCES["float64"] if "clipnorm" in case else EXACT
    assert_same_trajectory(run_reference(*problem, **options), oracle, tolerance)
