"""Train under BackupAndRestore and die at given places: `python -m support.killed_run FOLDER RUNS`.

RUNS is JSON: for each run its configuration, its name, and the places of death, one for each life. The last life ends
by itself. Each life is a process of its own, forked before the backend has done anything, and is killed by SIGKILL.
What the last one ends with is written to FOLDER/NAME.npz.
"""

import json
import os
import pathlib
import signal
import sys
import traceback

import keras
import numpy as np

import keras_adam
from support.models import TOGETHER
from support.steps import value_of

EPOCHS, BATCHES, BATCH = 5, 5, 4

CONFIGURATIONS = {
    # Of 5 batches an epoch, accumulated by twos: an epoch may end between two updates.
    "everything": (
        "float32",
        lambda: {
            "learning_rate": keras.optimizers.schedules.ExponentialDecay(0.05, 4, 0.9),
            **TOGETHER,
            "param_groups": [{"params": ".*bias", "weight_decay": 0.0, "beta_1": 0.5}],
        },
    ),
    "bfloat16": (
        "bfloat16",
        lambda: {
            "learning_rate": 0.01,
            "state_dtype": "bfloat16",
            "skip_nonfinite": True,
            "use_ema": True,
            "ema_overwrite_frequency": 4,
            "param_groups": [{"params": ".*bias", "learning_rate_multiplier": 0.1}],
        },
    ),
    "float16": (
        "float16",
        lambda: {
            "learning_rate": keras.optimizers.schedules.CosineDecay(0.01, 40),
            "amsgrad": "corrected",
            "gradient_accumulation_steps": 3,
            "param_groups": [],
        },
    ),
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Death(keras.callbacks.Callback):
    """Kills the process at the end of a batch; sets a number of a group before each epoch."""

    def __init__(self, place):
        super().__init__()
        self.place = place
        self.epoch = None

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        self.model.optimizer.param_groups[0]["epsilon"] = 1e-7 * (1 + epoch)

    def on_train_batch_end(self, batch, logs=None):
        if self.place == ["batch", self.epoch, batch]:
            die()


def make_model(configuration):
    dtype, options = CONFIGURATIONS[configuration]
    keras.config.set_dtype_policy(dtype)
    layers = [
        keras.Input((4,)),
        keras.layers.Dense(3, activation="tanh", name="first"),
        keras.layers.Dense(2, name="second"),
    ]
    model = keras.Sequential(layers)
    rng = np.random.default_rng(5)
    model.set_weights([rng.standard_normal(w.shape) for w in model.weights])
    model.compile(keras_adam.Adam(**options()), loss="mse")
    return model


def live(folder, configuration, place, result):
    model = make_model(configuration)
    death = Death(place)
    if place and place[0] in ("during save", "after save"):
        _die_in_save(model, death, *place)
    rng = np.random.default_rng(6)
    x, y = (rng.standard_normal((BATCHES * BATCH, n)).astype("float32") for n in (4, 2))
    path = folder / f"{result.stem}-backup"
    backup = keras.callbacks.BackupAndRestore(path, double_checkpoint=True)
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0, "epochs": EPOCHS}
    model.fit(x, y, callbacks=[backup, death], **options)
    found = [value_of(v) for v in [*model.weights, *model.optimizer.variables]]
    np.savez(result, *found)


def _die_in_save(model, death, kind, epoch):
    """Die while the file is being written, or after it, but before its epoch is written."""
    optimizer = model.optimizer
    save_state, save_weights = optimizer.save_own_variables, model.save_weights

    def save_part(store):
        save_state(store)
        if death.epoch == epoch:
            die()

    def save_all(*args, **kwargs):
        save_weights(*args, **kwargs)
        if death.epoch == epoch:
            die()

    if kind == "during save":
        optimizer.__dict__["save_own_variables"] = save_part
    else:
        model.__dict__["save_weights"] = save_all


def main(folder, configuration, name, plan):
    result = folder / f"{name}.npz"
    for place in [*plan, None]:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                live(folder, configuration, place, result)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != (-signal.SIGKILL if place else 0):
            sys.exit(f"The life that was to end at {place} ended with {status}")


if __name__ == "__main__":
    for configuration, name, plan in json.loads(sys.argv[2]):
        main(pathlib.Path(sys.argv[1]), configuration, name, plan)
