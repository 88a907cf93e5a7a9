"""Train on several devices with TensorFlow's strategies.

    python examples/tensorflow_strategies.py                       # MirroredStrategy: one process, two devices
    python examples/launch.py examples/tensorflow_strategies.py    # MultiWorkerMirroredStrategy: two processes

`--backup FOLDER` saves after each epoch, and goes on from there when all processes are started again. Under several
workers `fit` of Keras 3.15.1 fails with any optimizer, so that the loop is written out. The devices are parts of this
machine's CPU.
"""

import argparse
import json
import os
import pathlib

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
os.environ["KERAS_BACKEND"] = "tensorflow"
if PROCESSES > 1:
    first = int(os.environ["MASTER_PORT"])
    workers = [f"{os.environ['MASTER_ADDR']}:{first + i}" for i in range(PROCESSES)]
    task = {"type": "worker", "index": RANK}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from sklearn.datasets import load_digits

import keras_adam

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--backup", type=pathlib.Path)
given = parser.parse_args()

if PROCESSES > 1:
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
else:
    cpu = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

keras.utils.set_random_seed(0)
digits = load_digits()
x, y, batch = digits.data.astype("float32") / 16, digits.target, 64
loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

saved = sorted(given.backup.glob("epoch-*.keras")) if given.backup else []
with strategy.scope():
    if saved:
        model = keras.saving.load_model(saved[-1])
    else:
        model = keras.Sequential(
            [keras.Input((64,)), layers.Dense(128, activation="relu"), layers.Dense(10)]
        )
        model.compile(optimizer=keras_adam.Adam(3e-3), loss=loss_fn, metrics=["accuracy"])
    optimizer, variables = model.optimizer, model.trainable_variables
    optimizer.build(variables)


def batches(epoch):
    order = np.random.default_rng(epoch).permutation(len(x))
    rows = order[: len(x) // batch * batch]
    return tf.data.Dataset.from_tensor_slices((x[rows], y[rows])).batch(batch, drop_remainder=True)


@tf.function
def step(images, labels):
    def in_replica(images, labels):
        with tf.GradientTape() as tape:
            # The gradients are summed over the replicas, so each replica divides by their number.
            loss = loss_fn(labels, model(images, training=True)) / strategy.num_replicas_in_sync
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)

    strategy.run(in_replica, (images, labels))


def save(epoch):
    """Save in each process, as TensorFlow requires; keep the first process's file, whole or not at all."""
    given.backup.mkdir(parents=True, exist_ok=True)
    scratch = given.backup / f"unfinished-{RANK}.keras"
    model.save(scratch)
    if RANK == 0:
        os.replace(scratch, given.backup / f"epoch-{epoch:04}.keras")
    else:
        scratch.unlink()


for epoch in range(len(saved), given.epochs):
    if PROCESSES == 1:
        model.fit(batches(epoch), shuffle=False, verbose=0)
    else:
        for images, labels in strategy.experimental_distribute_dataset(batches(epoch)):
            step(images, labels)
    if RANK == 0:
        outputs = keras.ops.convert_to_numpy(model(x))
        print(f"epoch {epoch}: accuracy {np.mean(np.argmax(outputs, axis=1) == y):.1%}")
    if given.backup:
        save(epoch)
