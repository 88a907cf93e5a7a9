"""Training on several devices ends where training on one ends, and all replicas hold the same weights.

support/replicas.py trains, in processes of its own, as devices must be set up before a framework starts. Devices are
parts of this machine's CPU; several processes of an engine talk over the loopback.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_adam  # noqa: F401 - a saved model names its class
from support.processes import environment, finish, free_address, start
from support.replicas import CASES, cases_of
from support.steps import BACKEND, KERAS, value_of

EXAMPLES = Path(__file__).parents[1] / "examples"
# For float32 weights near 1, after 16 steps: gradients are summed in another order, and Adam divides by their size.
ATOL = dict.fromkeys(CASES, 2e-7 if BACKEND == "torch" else 2e-5)
# Each replica's gradient is rounded to 8 bits before they are summed. Steps are 0.01 long, weights 0.004 apart.
ATOL["bfloat16"] = 0.01
# A code that goes the other way moves its element by an eighth of a step.
ATOL["8bit"] = 0.005
# By engine: how many processes, and how many replicas each of them can show.
ENGINES = {
    "jax": {
        "data-parallel": (1, 8),
        "data-parallel+shard_state": (1, 8),
        "model-parallel": (1, 1),
        "model-parallel+shard_state": (1, 1),
        "data-parallel in two processes": (2, 2),
        "data-parallel+shard_state in two processes": (2, 2),
    },
    "tensorflow": {"mirrored": (1, 2), "mirrored-loop": (1, 2), "multi-worker-loop": (2, 1)},
    "torch": {
        "ddp": (2, 1),
        "ddp+shard_state": (2, 1),
        "ddp+shard_state in four processes": (4, 1),
    },
}[BACKEND]


def replicas_in(*files):
    """Return the weights of each replica, by case."""
    found = {case: [] for case in CASES}
    for file in files:
        arrays = np.load(file)
        for case, replicas in found.items():
            names = [n.split("/") for n in arrays.files if n.startswith(f"{case}/")]
            for i in sorted({int(i) for _, i, _ in names}):
                of_replica = [int(j) for _, k, j in names if int(k) == i]
                replicas.append([arrays[f"{case}/{i}/{j}"] for j in sorted(of_replica)])
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "weights.npz"
    finish([start("replicas", ["one", out], devices=8)])
    return replicas_in(out)


@pytest.mark.short("data-parallel+shard_state", "mirrored", "ddp")
@pytest.mark.parametrize("engine", ENGINES)
def test_devices(engine, one, tmp_path):
    processes, shown = ENGINES[engine]
    engine = engine.partition(" in ")[0]
    files = [tmp_path / f"{rank}.npz" for rank in range(processes)]
    address = free_address()
    ranks = [[]] if processes == 1 else [[rank, processes, address] for rank in range(processes)]
    finish(
        [
            start("replicas", [engine, file, *rank], devices=max(8 // processes**2, 1))
            for file, rank in zip(files, ranks, strict=True)
        ]
    )
    found = replicas_in(*files)
    for case in cases_of(engine):
        replicas = found[case]
        assert len(replicas) == processes * shown
        for replica in replicas:
            for got, expected, first in zip(replica, one[case][0], replicas[0], strict=True):
                np.testing.assert_array_equal(got, first, err_msg=case)
                np.testing.assert_allclose(got, expected, rtol=0, atol=ATOL[case], err_msg=case)
        assert max(np.ptp(w) for w in replicas[0]) > 0.1


EXAMPLE = {
    "jax": "jax_data_parallel.py",
    "tensorflow": "tensorflow_strategies.py",
    "torch": "torch_ddp.py",
}[BACKEND]
EPOCHS = 4


def launch(folder):
    arguments = [EXAMPLES / EXAMPLE, "--epochs", EPOCHS, "--backup", folder]
    return subprocess.Popen(
        [sys.executable, EXAMPLES / "launch.py", *map(str, arguments)],
        # The example makes its devices itself.
        env=environment() | {"XLA_FLAGS": os.environ["XLA_FLAGS"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.long
@pytest.mark.skipif(
    BACKEND == "jax" and KERAS < (3, 15), reason="`fit` in several processes took tf.data alone"
)
def test_one_of_two_processes_is_killed(tmp_path):
    """Started again, both end where an undisturbed run ends, to the bit; the state is spread, but on TensorFlow."""
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    finish([launch(undisturbed)])
    launcher = launch(disturbed)
    deadline = time.monotonic() + 300
    while not (disturbed / "epoch-0001.keras").exists():
        assert launcher.poll() is None, launcher.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    output = launcher.communicate(timeout=120)[0].decode()
    assert launcher.returncode == 1, output
    assert "process 1 ended with -9" in output or "process 0 ended" in output
    assert not (disturbed / f"epoch-{EPOCHS - 1:04}.keras").exists()
    finish([launch(disturbed)])
    last = f"epoch-{EPOCHS - 1:04}.keras"
    first, second = (keras.saving.load_model(f / last) for f in (undisturbed, disturbed))
    compared = [first.variables, first.optimizer.variables]
    for ours, theirs in zip(compared, [second.variables, second.optimizer.variables], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(value_of(one), value_of(other), err_msg=one.path)
