"""Training that is killed and started again under Keras's BackupAndRestore ends as if it had not been.

The callback itself has gaps, which the optimizer cannot close:

- It goes on at the beginning of the epoch in which it saved: it writes down the batch, but never reads it. So if
  `save_freq` is a number of batches, some of them are trained twice; here it saves once per epoch.
- It writes the weights, and then their epoch. Killed in between, that epoch is trained twice.
- Killed in the midst of a save, its file is broken, and `fit` raises. Only `double_checkpoint=True`, as here, keeps an
  earlier file to fall back on, and not before the second save.
"""

import json
import os

import keras
import numpy as np
import pytest

from support.killed_run import BATCHES, CONFIGURATIONS, EPOCHS
from support.processes import run_under

BACKEND = keras.backend.backend()
IS_FUZZ = bool(os.environ.get("FUZZ_EXAMPLES"))
DEATHS = 12 if IS_FUZZ else 2
# Each life compiles anew, which takes most of its time.
NAMES = list(CONFIGURATIONS) if IS_FUZZ else ["everything", "bfloat16"]


def train(folder, runs):
    """Train runs, each given as configuration, name and deaths, in one process that forks each life."""
    run_under(BACKEND, "killed_run", folder, json.dumps(runs))


def load(folder, name):
    with np.load(folder / f"{name}.npz") as saved:
        return [saved[key] for key in saved.files]


def deaths(rng):
    """Draw deaths in epochs one after another, or in the same one again; one is in the midst of a save."""
    epochs = sorted(int(e) for e in rng.integers(1, EPOCHS, DEATHS))
    places = [["batch", epoch, int(rng.integers(0, BATCHES))] for epoch in epochs]
    places[-1] = ["during save", epochs[-1]]
    return places


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each life is forked")
def test_ends_to_the_bit_where_an_undisturbed_run_ends(tmp_path):
    rng = np.random.default_rng(None if IS_FUZZ else 9)
    runs = [[name, name, []] for name in NAMES]
    runs += [[name, f"{name}-killed", deaths(rng)] for name in NAMES]
    train(tmp_path, runs)
    for name in NAMES:
        undisturbed, killed = load(tmp_path, name), load(tmp_path, f"{name}-killed")
        assert len(killed) == len(undisturbed)
        for got, want in zip(killed, undisturbed, strict=True):
            np.testing.assert_array_equal(got, want, err_msg=f"{name}: {runs}")


@pytest.mark.skipif(BACKEND != "torch", reason="the same everywhere, and fastest there")
def test_killed_between_weights_and_epoch_keras_trains_an_epoch_twice(tmp_path):
    """If this fails, Keras has mended it: the gap can go from the list above."""
    train(tmp_path, [["bfloat16", "killed", [["after save", 2]]]])
    iterations = load(tmp_path, "killed")[4]
    assert iterations == (EPOCHS + 1) * BATCHES
