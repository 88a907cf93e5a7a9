"""Train on all devices with JAX, the optimizer's state spread over them.

    python examples/jax_data_parallel.py                       # one process with 4 devices
    python examples/launch.py examples/jax_data_parallel.py    # two processes with 2 each

Keras before 3.15 may ask for a `tf.data.Dataset` where there are several processes; 3.10 does.

`--backup FOLDER` saves after each epoch, and goes on from there when all processes are started again. The devices are
parts of this machine's CPU; on a machine with GPUs or TPUs leave the lines with `flag` out.
"""

import argparse
import os
import pathlib

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
os.environ["KERAS_BACKEND"] = "jax"
flag = f" --xla_force_host_platform_device_count={4 // PROCESSES}"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flag

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

import keras_adam

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--backup", type=pathlib.Path)
given = parser.parse_args()

keras.utils.set_random_seed(0)
if PROCESSES > 1:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    os.environ.setdefault("JAX_CPU_COLLECTIVES_IMPLEMENTATION", "gloo")
    keras.distribution.initialize(address, PROCESSES, RANK)
devices = keras.distribution.list_devices()
# Each process gives its own share of each batch.
distribution = keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
keras.distribution.set_distribution(distribution)

digits = load_digits()
x, y, batch = digits.data.astype("float32") / 16, digits.target, 64


def batches(epoch):
    order = np.random.default_rng(epoch).permutation(len(x))
    share = batch // PROCESSES
    for i in range(0, len(x) - batch + 1, batch):
        rows = order[i + RANK * share : i + (RANK + 1) * share]
        yield x[rows], y[rows]


saved = sorted(given.backup.glob("epoch-*.keras")) if given.backup else []
if saved:
    model = keras.saving.load_model(saved[-1])
else:
    model = keras.Sequential(
        [keras.Input((64,)), layers.Dense(128, activation="relu"), layers.Dense(10)]
    )
    model.compile(
        optimizer=keras_adam.Adam(3e-3, shard_state=True),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
for epoch in range(len(saved), given.epochs):
    steps = len(x) // batch
    history = model.fit(batches(epoch), steps_per_epoch=steps, shuffle=False, verbose=0).history
    if RANK == 0:
        print(f"epoch {epoch}: accuracy {history['accuracy'][-1]:.1%}")
    if given.backup:  # all processes together, as each holds a part of the state
        given.backup.mkdir(parents=True, exist_ok=True)
        keras_adam.save_model(model, given.backup / f"epoch-{epoch:04}.keras")

if RANK == 0:
    state = model.optimizer.variables
    here = sum(v.value.addressable_shards[0].data.nbytes for v in state)
    whole = sum(v.value.nbytes for v in state)
    print(f"state on each of {len(devices)} devices: {here} of {whole} bytes")
