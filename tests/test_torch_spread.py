"""Processes of PyTorch that share the state, in processes of their own, each test with a time limit.

What they do is in support/spread_run.py. That training with DistributedDataParallel ends where it ends on one device is
shown in test_devices.py.
"""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_adam
from support.processes import environment, finish, free_address, start

SECONDS = 300
EXAMPLE = Path(__file__).parents[1] / "examples" / "torch_ddp.py"
pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="JAX's are in test_jax_sharding.py"
)


def begin(task, folder, processes, *arguments):
    address = free_address()
    return [
        start("spread_run", [task, folder, rank, processes, address, *arguments])
        for rank in range(processes)
    ]


def run(task, folder, processes, *arguments):
    finish(begin(task, folder, processes, *arguments), seconds=SECONDS)


def arrays_in(path):
    with np.load(path) as saved:
        return [saved[name] for name in saved.files]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(
    "shapes",
    [[(64, 128), (128,), (128, 10), (10,)], [(500, 8), *[(3, 3, 8, 16), (16,)] * 2, (8, 8), (8,)]],
    ids=["small", "embedding"],
)
def test_each_process_holds_its_share(shapes, processes, monkeypatch):
    """Of the bytes, to within 5 %, also where one variable is most of the model; all agree on who has what."""
    import torch.distributed as dist

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: processes)
    variables = [keras.Variable(np.ones(shape, "float32")) for shape in shapes]
    held = [np.zeros(v.shape, "int").reshape(-1) for v in variables]
    sizes = []
    for rank in range(processes):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        # The first variable has more state than the others.
        groups = [{"params": variables[0], "amsgrad": True}]
        optimizer = keras_adam.Adam(shard_state=True, param_groups=groups, use_ema=True)
        optimizer.build(variables)
        state = [v for v in optimizer.variables if v.shape and "hyperparameters" not in v.path]
        sizes.append(sum(v.value.nbytes for v in state))
        for count, v in zip(held, optimizer._momentums, strict=True):
            count[v.part.stretch] += 1
    assert all((count == 1).all() for count in held)
    share = sum(optimizer.state_size().values()) / processes
    np.testing.assert_allclose(sizes, share, rtol=0.05)


def test_without_a_process_group_the_state_is_whole():
    variable = keras.Variable(np.ones((4, 3), "float32"))
    optimizer = keras_adam.Adam(0.1, shard_state=True)
    optimizer.apply([keras.ops.ones((4, 3))], [variable])
    assert optimizer._momentums[0].value.shape == (4, 3)


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 4])
def test_all_options(processes, tmp_path):
    run("options", tmp_path, processes)


@pytest.mark.long
@pytest.mark.parametrize("task", ["state_dict", "refused", "compiled"])
def test_two_processes(task, tmp_path):
    run(task, tmp_path, 2)


@pytest.mark.long
def test_the_example_ends_in_two_processes():
    """From Keras 3.16 on the first process would wait for ever if it called `fit` or `predict` alone."""
    host, _, port = free_address().partition(":")
    shared = environment() | {"MASTER_ADDR": host, "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [sys.executable, str(EXAMPLE), "--epochs", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    finish(
        [subprocess.Popen(command, env=shared | {"RANK": rank}, **pipes) for rank in "01"],
        seconds=SECONDS,
    )


@pytest.mark.long
def test_fit_of_two_processes(tmp_path):
    run("fitted", tmp_path, 2)


@pytest.mark.long
def test_a_file_of_four_processes_is_gone_on_from_in_four_two_and_one(tmp_path):
    run("files", tmp_path, 4, "-", "undisturbed")
    undisturbed = arrays_in(tmp_path / "undisturbed-0.npz")
    for processes in (4, 2, 1):
        run("files", tmp_path, processes, "model.keras", f"of-{processes}")
        for rank in range(processes):
            found = arrays_in(tmp_path / f"of-{processes}-{rank}.npz")
            for got, want in zip(found, undisturbed, strict=True):
                if processes == 4:
                    np.testing.assert_array_equal(got, want)
                else:
                    np.testing.assert_allclose(got, want, rtol=0, atol=2e-7)


@pytest.mark.long
@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_is_killed_while_it_saves(dies, tmp_path):
    """The earlier file stays as it was, and both, started again from it, end to the bit where they would have."""
    run("killed", tmp_path, 2, "undisturbed", "-")
    workers = begin("killed", tmp_path, 2, "disturbed", dies)
    try:
        assert workers[dies].wait(SECONDS) == -9, workers[dies].communicate()[0].decode()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    model = keras.saving.load_model(tmp_path / "disturbed.keras")
    model.optimizer.build(model.trainable_variables)
    # The first process writes; with what the second had given it, it may have got that done.
    assert int(model.optimizer._iterations.value) in ((2,) if dies == 0 else (2, 4))
    run("killed", tmp_path, 2, "disturbed", "-")
    for rank in range(2):
        ends = [arrays_in(tmp_path / f"{name}-{rank}.npz") for name in ("undisturbed", "disturbed")]
        for got, want in zip(*ends, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.long
def test_files_go_to_and_from_eight_devices_of_jax(tmp_path):
    """The state that JAX loads in the end is, to the bit, the one that it saved in the beginning."""
    address = free_address()

    def on_jax(*arguments):
        command = ["on_jax", tmp_path, 0, 1, address, *arguments]
        finish([start("spread_run", command, devices=8, backend="jax")], seconds=SECONDS)

    on_jax("-", "of-jax.keras")
    for processes in (4, 2, 1):
        run("on_torch", tmp_path, processes, "of-jax.keras", "of-torch.keras")
        on_jax("of-torch.keras", "back.keras")
        models = [keras.saving.load_model(tmp_path / f"{x}.keras") for x in ("of-jax", "back")]
        for model in models:
            model.optimizer.build(model.trainable_variables)
        pairs = zip(*([*m.variables, *m.optimizer.variables] for m in models), strict=True)
        for one, other in pairs:
            assert one.value.equal(other.value), one.path
