"""One of several processes of PyTorch that share the state: `python -m support.spread_run TASK FOLDER RANK PROCESSES
ADDRESS [arguments]`. TASK is one of the functions of this module.

All processes are given the same gradients, as they are after PyTorch has summed them.
"""

import os
import pathlib
import signal
import sys

import keras
import numpy as np

import keras_adam
from support.models import EVERYTHING
from support.steps import sparse_gradient, to_tensor

SHAPES = {"kernel": (5, 7), "bias": (7,), "scalar": (), "empty": (0, 3), "rows": (40, 3)}
# In 8 bits, of 4,096 elements and more: cut between blocks, the last of which is not full.
SHAPES_OF_8_BITS = SHAPES | {"kernel": (70, 70), "bias": (4096,)}
STEPS = 12
PLAIN = {"learning_rate": 0.01, "weight_decay": 0.1}
# Options of the optimizer and the dtype of the variables; what else a case has is told by its name.
CASES = {
    "plain": (PLAIN, "float32"),
    "float64": (PLAIN, "float64"),
    "transposed": ({"amsgrad": True}, "float32"),
    "everything": (
        EVERYTHING | {"param_groups": [{"params": "bias", "beta_1": 0.5, "weight_decay": 0}]},
        "float32",
    ),
    "amsgrad corrected": ({"amsgrad": "corrected", "epsilon_hat": False}, "float32"),
    "clipnorm": ({"clipnorm": 0.5, "decoupled_weight_decay": False} | PLAIN, "float32"),
    "clipvalue": ({"clipvalue": 0.5, "maximize": True}, "float32"),
    "absent": ({"gradient_accumulation_steps": 3, "global_clipnorm": 0.5} | PLAIN, "float32"),
    "late": ({"use_ema": True} | PLAIN, "float32"),
    "constraint": ({"clipnorm": 0.5}, "float32"),
    "nonfinite": ({"skip_nonfinite": True, "gradient_accumulation_steps": 2}, "float32"),
    "monitor": ({"monitor": 1, "skip_spikes": 6.0, "clipvalue": 0.5} | PLAIN, "float32"),
    "monitor, groups": (
        {"monitor": 2, "global_clipnorm": 0.5, "param_groups": [{"params": "bias"}]} | PLAIN,
        "float32",
    ),
    "lazy": ({"lazy": True, "global_clipnorm": 0.5} | PLAIN, "float32"),
    "moments in bfloat16": ({"state_dtype": "bfloat16", "amsgrad": True} | PLAIN, "float32"),
    "8bit": ({"state_dtype": "8bit", "amsgrad": True, "use_ema": True} | PLAIN, "float32"),
    "8bit, lazy": ({"state_dtype": "8bit", "lazy": True} | PLAIN, "float32"),
    "8bit, bfloat16": ({"state_dtype": "8bit"} | PLAIN, "bfloat16"),
    "bfloat16": ({"use_ema": True, "ema_overwrite_frequency": 5} | PLAIN, "bfloat16"),
    "constraint, bfloat16": ({"state_dtype": "bfloat16"} | PLAIN, "bfloat16"),
    "float16": ({"skip_nonfinite": True, "gradient_accumulation_steps": 2} | PLAIN, "float16"),
}
# Of weights below 1. Parts of a norm are summed in another order.
ATOL = {"float32": 2e-7, "float64": 1e-15, "bfloat16": 0, "float16": 0}


def train(case, spread):
    options, dtype = CASES[case]
    rng = np.random.default_rng(11)
    shapes = SHAPES_OF_8_BITS if case.startswith("8bit") else SHAPES
    start = {name: rng.uniform(-0.8, 0.8, shape) for name, shape in shapes.items()}
    variables = [keras.Variable(x, dtype=dtype, name=name) for name, x in start.items()]
    if case == "transposed":  # as `keras.initializers.Orthogonal` leaves it
        variables[0]._value.data = variables[0].value.data.T.contiguous().T
        assert not variables[0].value.is_contiguous()
    if case.startswith("constraint"):
        variables[0].constraint = keras.constraints.UnitNorm(axis=0)
    optimizer = keras_adam.Adam(**{"learning_rate": 0.01, **options}, shard_state=spread)
    optimizer.build(variables[2:] if case == "late" else variables)
    for step in range(STEPS):
        grads = [rng.normal(size=shape) for shape in shapes.values()]
        if case == "nonfinite" and step in (3, 4):
            grads[step - 3].flat[2] = np.nan
        grads = [to_tensor(np.asarray(g), v) for g, v in zip(grads, variables, strict=True)]
        if case == "absent" and step % 3 == 2:
            grads[step % 2] = None
        if case.endswith("lazy"):
            indices = rng.integers(0, 40, 9)
            grads[-1] = sparse_gradient(indices, rng.normal(size=(9, 3)), SHAPES["rows"])
        if case == "late" and step == 4:
            optimizer.add_param_group({"params": variables[:2], "beta_2": 0.9})
        known = 2 if case == "late" and step < 4 else 0
        before = [None if g is None else g.clone() for g in grads]
        optimizer.apply(grads[known:], variables[known:])
        for g, old in zip(grads, before, strict=True):
            assert g is None or g.is_sparse or g.equal(old) or old.isnan().any()
    optimizer.finalize_variable_values(variables)
    return optimizer, variables


def wide(array):
    return np.asarray(array).astype("float64")


def state_of(optimizer):
    return [wide(optimizer._engine.whole(v)) for v in optimizer.variables]


def values_of(variables):
    return [wide(v.value.detach().double()) for v in variables]


def options(folder, rank, processes):
    """Each case ends where it ends without `shard_state`, in all processes; and each holds its share of the bytes."""
    import torch.distributed as dist

    for case, (_, dtype) in CASES.items():
        spread, variables = train(case, True)
        whole, others = train(case, False)
        state, values = state_of(spread), values_of(variables)
        for got, want in zip(values, values_of(others), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=ATOL[dtype], err_msg=case)
        for v, got, want in zip(spread.variables, state, state_of(whole), strict=True):
            assert got.shape == v.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=ATOL[dtype], err_msg=v.path)
        of_all = [None] * processes
        dist.all_gather_object(of_all, values)
        for of_one in of_all:
            for got, first in zip(of_one, of_all[0], strict=True):
                np.testing.assert_array_equal(got, first, err_msg=case)
        # Each joining is cut for itself; blocks of rows and the norms of recent steps are not cut.
        if case not in ("late", "8bit, lazy", "monitor"):
            held = sum(
                v.value.nbytes for v in spread.variables if v.shape and "hyper" not in v.path
            )
            of_one = sum(spread.state_size().values()) / processes
            assert abs(held / of_one - 1) < 0.05, (case, held, of_one)


def make_model():
    keras.utils.set_random_seed(1)
    layers = [keras.Input((4,)), keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(2)]
    model = keras.Sequential(layers)
    groups = [{"params": ".*bias", "learning_rate_multiplier": 0.5}]
    options = EVERYTHING | {"param_groups": groups, "shard_state": True}
    model.compile(keras_adam.Adam(**options), loss="mse")
    return model


def steps(model, first, last):
    """Take some steps, each on a batch of its own, which is all there is in each process."""
    from support.models import gradients

    model.optimizer.build(model.trainable_variables)
    for step in range(first, last):
        rng = np.random.default_rng(step)
        x, y = (rng.normal(size=(8, n)).astype("float32") for n in (4, 2))
        model.optimizer.apply(gradients(model, x, y), model.trainable_variables)


def write(path, model):
    arrays = [*values_of(model.trainable_variables), *state_of(model.optimizer)]
    np.savez(path, *arrays)


def files(folder, rank, processes, source, end):
    """Go on from a file, or begin; save in the middle of an accumulation; go on to the end."""
    if source == "-":
        model = make_model()
        steps(model, 0, 5)
        keras_adam.save_model(model, folder / "model.keras")
        assert (folder / "model.keras").exists()
    else:
        model = keras.saving.load_model(folder / source)
    steps(model, 5, 10)
    write(folder / f"{end}-{rank}.npz", model)


def killed(folder, rank, processes, end, dies):
    """Train and save every second step, from the file that there is; process `dies` dies in the second saving."""
    path = folder / f"{end}.keras"
    model = keras.saving.load_model(path) if path.exists() else make_model()
    model.optimizer.build(model.trainable_variables)
    done = int(keras.ops.convert_to_numpy(model.optimizer._iterations))
    for step in range(done, 8, 2):
        steps(model, step, step + 2)
        if str(rank) == dies and step == 2:
            store = model.optimizer.save_own_variables

            def save_part(into, store=store):
                store(into)
                os.kill(os.getpid(), signal.SIGKILL)

            model.optimizer.__dict__["save_own_variables"] = save_part
        keras_adam.save_model(model, path)
    write(folder / f"{end}-{rank}.npz", model)


def state_dict(folder, rank, processes):
    """PyTorch's state dict and `set_weights` hold and take whole arrays."""
    spread, variables = train("plain", True)
    whole, _ = train("plain", False)
    ours, others = spread.state_dict(), whole.state_dict()
    for number, theirs in others["state"].items():
        for name, array in theirs.items():
            # The last elements of an array, which fill no vector of the processor, are rounded otherwise.
            got = ours["state"][number][name]
            np.testing.assert_allclose(got, array, rtol=1e-6, atol=0, err_msg=name)
    for take, given in (
        (lambda new: new.load_state_dict(others), whole),
        (lambda new: new.set_weights(state_of(whole)), whole),
        (lambda new: new.set_weights(spread.variables), spread),
    ):
        new = keras_adam.Adam(0.01, weight_decay=0.1, shard_state=True)
        new.build(variables)
        take(new)
        for got, want in zip(state_of(new), state_of(given), strict=True):
            np.testing.assert_array_equal(got, want)


def refused(folder, rank, processes):
    """What would take parts for whole variables is refused, knowingly."""
    import pytest

    class Own(keras_adam.Adam):
        def update_step(self, gradient, variable, learning_rate):
            super().update_step(gradient, variable, learning_rate)

    variable = keras.Variable(np.ones((4, 3), "float32"))
    gradient = keras.ops.ones((4, 3))
    with pytest.raises(ValueError, match=r"`shard_state` on PyTorch cuts .* a `update_step` that"):
        Own(0.1, shard_state=True).apply([gradient], [variable])
    optimizer = keras_adam.Adam(0.1, shard_state=True)
    optimizer.build([variable])
    state = [keras.ops.zeros(v.shape, v.dtype) for v in optimizer.variables]
    with pytest.raises(ValueError, match="Received: shard_state=True in `stateless_apply`"):
        optimizer.stateless_apply(state, [gradient], [variable.value])
    with pytest.raises(ValueError, match=r"takes values of shape \(4, 3\), or of its part"):
        optimizer._momentums[0].assign(np.ones(5))
    optimizer.apply([gradient], [variable])
    np.testing.assert_allclose(values_of([variable])[0], 0.9, atol=1e-6)

    import torch
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (processes,))
    value = distribute_tensor(torch.ones(4, 3), mesh, [Replicate()])
    variable = keras.Variable(torch.nn.Parameter(value))
    for spread in (True, False):
        with pytest.raises(ValueError, match=r"`variables` must be whole .* '.*', a DTensor"):
            keras_adam.Adam(0.1, shard_state=spread).build([variable])


def compiled(folder, rank, processes):
    """`fit` with PyTorch's compiler: the step of the optimizer stays out of it."""
    ends = []
    for spread in (True, False):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        optimizer = keras_adam.Adam(0.01, shard_state=spread)
        model.compile(optimizer, loss="mse", jit_compile=True)
        rng = np.random.default_rng(0)
        model.fit(rng.normal(size=(8, 4)), rng.normal(size=(8, 3)), batch_size=4, verbose=0)
        ends.append(values_of(model.trainable_variables))
    for got, want in zip(*ends, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-7)


def fitted(folder, rank, processes):
    """`fit`, which from Keras 3.16 on sums gradients over the processes, ends alike in all with the state spread."""
    import torch.distributed as dist

    if int(keras.__version__.split(".")[1]) >= 16:
        devices = keras.distribution.list_devices()
        distribution = keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
        keras.distribution.set_distribution(distribution)
    ends = []
    for spread in (True, False):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        model.compile(keras_adam.Adam(0.01, shard_state=spread, global_clipnorm=0.1), loss="mse")
        rng = np.random.default_rng(0)
        model.fit(rng.normal(size=(8, 4)), rng.normal(size=(8, 3)), batch_size=4, verbose=0)
        ends.append(values_of(model.trainable_variables))
    of_all = [None] * processes
    dist.all_gather_object(of_all, ends[0])
    for of_one in (*of_all, ends[1]):
        for got, want in zip(of_one, ends[0], strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=0 if of_one is not ends[1] else 2e-7)


def on_jax(folder, rank, processes, source, target):
    """On eight devices of JAX: load, or train; save."""
    distribution = keras.distribution.DataParallel(devices=keras.distribution.list_devices())
    keras.distribution.set_distribution(distribution)
    if source == "-":
        model = make_model()
        rng = np.random.default_rng(2)
        x, y = (rng.normal(size=(24, n)).astype("float32") for n in (4, 2))
        model.fit(x, y, batch_size=8, verbose=0)
    else:
        model = keras.saving.load_model(folder / source)
        model.optimizer.build(model.trainable_variables)
    kernel = next(v for v in model.optimizer.variables if v.shape == (4, 16))
    assert kernel.value.addressable_shards[0].data.shape == (4, 2)
    keras_adam.save_model(model, folder / target)


def on_torch(folder, rank, processes, source, target):
    """Load a file, save it again."""
    model = keras.saving.load_model(folder / source)
    model.optimizer.build(model.trainable_variables)
    keras_adam.save_model(model, folder / target)


def main(task, folder, rank, processes, address, *arguments):
    folder, rank, processes = pathlib.Path(folder), int(rank), int(processes)
    if processes > 1:
        import torch.distributed as dist

        where = f"tcp://{address}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=processes)
    globals()[task](folder, rank, processes, *arguments)
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
