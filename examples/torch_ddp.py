"""Train with PyTorch's DistributedDataParallel, one process per device, the optimizer's state spread over them.

    python examples/launch.py examples/torch_ddp.py    # or: torchrun --nproc_per_node 2 examples/torch_ddp.py

`--backup FOLDER` saves after each epoch, and goes on from there when all processes are started again. It runs on the
CPU with gloo; with GPUs choose "nccl", and give each process its device.
"""

import argparse
import os
import pathlib

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
from keras import layers
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel

import keras_adam

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--backup", type=pathlib.Path)
given = parser.parse_args()

torch.distributed.init_process_group("gloo")
rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
keras.utils.set_random_seed(0)
digits = load_digits()
x, y, batch = digits.data.astype("float32") / 16, digits.target, 64

saved = sorted(given.backup.glob("epoch-*.keras")) if given.backup else []
if saved:
    model = keras.saving.load_model(saved[-1])
else:
    model = keras.Sequential(
        [keras.Input((64,)), layers.Dense(128, activation="relu"), layers.Dense(10)]
    )
    model.compile(optimizer=keras_adam.Adam(3e-3, shard_state=True))
optimizer, variables = model.optimizer, model.trainable_variables
optimizer.build(variables)
parallel = DistributedDataParallel(model)  # means gradients over the processes in `backward`
loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

for epoch in range(len(saved), given.epochs):
    order = np.random.default_rng(epoch).permutation(len(x))
    share = batch // processes
    for i in range(0, len(x) - batch + 1, batch):
        rows = order[i + rank * share : i + (rank + 1) * share]
        optimizer.zero_grad()
        loss_fn(y[rows], parallel(x[rows], training=True)).backward()
        optimizer.apply([v.value.grad for v in variables], variables)
    if rank == 0:
        # The model is called: from Keras 3.16 on, `predict`, `evaluate` and `fit` wait for all processes.
        with torch.no_grad():
            accuracy = np.mean(model(x).argmax(1).numpy() == y)
        print(f"epoch {epoch}: accuracy {accuracy:.1%}")
    if given.backup:  # all processes together, as each holds a part of the state
        given.backup.mkdir(parents=True, exist_ok=True)
        keras_adam.save_model(model, given.backup / f"epoch-{epoch:04}.keras")
held = sum(v.value.nbytes for v in optimizer.variables)
print(f"state in process {rank}: {held} of {sum(optimizer.state_size().values())} bytes")
torch.distributed.barrier()  # the first process serves the others until they are done
torch.distributed.destroy_process_group()
