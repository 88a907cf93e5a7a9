"""An optimizer without its fast path, and a run of steps over the options that a fast path must know."""

import keras
import numpy as np

import keras_adam

SHAPES = [(7, 5), (5,), (), (0, 3), (2, 3, 4)]
STEPS = 12


class Portable(keras_adam.Adam):
    """An optimizer with an `update_step` of its own, which keeps every backend from its fast path."""

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, learning_rate)


OPTIONS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "amsgrad_corrected": {"amsgrad": "corrected"},
    "decoupled": {"weight_decay": 0.1},
    "l2": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "epsilon_of_algorithm_1": {"epsilon_hat": False, "epsilon": 1e-2},
    "large_epsilon_hat": {"epsilon": 1e-2},
    "maximize_l2": {"maximize": True, "weight_decay": 0.1, "decoupled_weight_decay": False},
    "maximize_decoupled_amsgrad": {"maximize": True, "weight_decay": 0.1, "amsgrad": True},
    "betas_zero": {"beta_1": 0.0, "beta_2": 0.0, "epsilon": 1e-3},
    "clipnorm": {"clipnorm": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.1},
    "ema": {"use_ema": True, "ema_momentum": 0.7, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 3},
    "accumulation_ema_clip": {
        "gradient_accumulation_steps": 2,
        "use_ema": True,
        "ema_overwrite_frequency": 2,
        "global_clipnorm": 0.5,
    },
    "loss_scale": {"loss_scale_factor": 64.0},
    "schedule": {"learning_rate": keras.optimizers.schedules.ExponentialDecay(1e-2, 3, 0.5)},
    "callables": {"learning_rate": lambda: 2e-3, "beta_1": lambda: 0.8},
    "groups": {
        "param_groups": [
            {"params": "v0", "lr": 3e-3, "betas": (0.8, 0.99), "weight_decay": 0.2},
            {"params": "v[14]", "learning_rate_multiplier": 0.5, "amsgrad": True, "maximize": True},
        ]
    },
}


def run(cls, options, dtype="float32", excluded=("v1",)):
    rng = np.random.default_rng(7)
    variables = [
        keras.Variable(rng.normal(size=shape), dtype=dtype, name=f"v{i}")
        for i, shape in enumerate(SHAPES)
    ]
    optimizer = cls(**{"learning_rate": 1e-2, **options})
    optimizer.exclude_from_weight_decay(var_names=list(excluded))
    for step in range(STEPS):
        if step == STEPS // 2 and "param_groups" in options:
            late = keras.Variable(rng.normal(size=(3,)), dtype=dtype, name="late")
            optimizer.add_param_group({"params": late, "learning_rate": 5e-3})
            variables.append(late)
            optimizer.param_groups[0]["lr"] = 1e-3
        gradients = [rng.normal(size=v.shape) * 10.0 ** rng.integers(-4, 2) for v in variables]
        gradients = [keras.ops.convert_to_tensor(g, dtype) for g in gradients]
        if step % 4 == 3:
            gradients[0] = None
        optimizer.apply(gradients, variables)
    return variables, optimizer
