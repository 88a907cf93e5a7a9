"""Keras's `OrbaxCheckpoint` on JAX: spread state is saved as it lies, and restored onto any number of devices."""

import keras
import pytest

from support.processes import finish, start
from support.steps import KERAS

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        keras.backend.backend() != "jax" or KERAS < (3, 15),
        reason="Keras has it on JAX, restored onto other devices from 3.15 on",
    ),
]


def run(task, folder, devices):
    finish([start("orbax_run", [folder, task], devices)], seconds=300)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    run("save", folder, 8)
    return folder


@pytest.mark.parametrize("devices", [8, 4, 1])
def test_saved_on_eight_devices_in_the_middle_of_an_accumulation(devices, saved):
    """The state is restored to the bit, and training goes on from it; what does not fit is refused by name."""
    run("restore", saved, devices)


def test_keras_restores_nothing_of_another_optimizer_in_silence(saved):
    """If this fails, Keras has mended it: the guides need not tell to call `check_state_tree` any more."""
    run("silent", saved, 8)
