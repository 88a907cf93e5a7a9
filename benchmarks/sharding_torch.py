"""The part of `sharding.py` for PyTorch, beside `torch.distributed.optim.ZeroRedundancyOptimizer`; one of n processes.

    python examples/launch.py --processes 2 benchmarks/sharding_torch.py

The first process prints its rows as JSON.
"""

import argparse
import json
import os
import time

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
import torch.distributed as dist
from keras import layers
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import keras_adam

STEPS, BATCH = 50, 64
ZERO = "ZeroRedundancyOptimizer"


def stack(width, count):
    # Orthogonal, so that gradients reach the first layer: of vanishing ones Adam would amplify the rounding.
    kernel = {"kernel_initializer": "orthogonal", "activation": "tanh"}
    return [keras.Input((width,)), *(layers.Dense(width, **kernel) for _ in range(count))]


def embedded(rows, width, count):
    first = [keras.Input((1,)), layers.Embedding(rows, width), layers.Flatten()]
    return first + stack(width, count)[1:]


# Layers, width of the output, number of kinds of input.
MODELS = {
    "4 layers of 1024 x 1024": (lambda: stack(1024, 4), 1024, None),
    "64 layers of 128 x 128": (lambda: stack(128, 64), 128, None),
    "embedding of 8192 x 512, 8 layers": (lambda: embedded(8192, 512, 8), 512, 8192),
}


class Run:
    """A model that is trained in all processes, by one of the optimizers."""

    def __init__(self, name, optimizer):
        keras.utils.set_random_seed(0)
        make, self.width, self.kinds = MODELS[name]
        self.model = keras.Sequential(make())
        self.parallel = DistributedDataParallel(self.model)
        self.variables = self.model.trainable_variables
        self.optimizer = optimizer([v.value for v in self.variables], self.variables)

    def differentiate(self, step):
        rng = np.random.default_rng(step)
        y = rng.normal(size=(BATCH, self.width)).astype("float32")
        x = y if self.kinds is None else rng.integers(0, self.kinds, (BATCH, 1))
        mine = slice(dist.get_rank(), None, dist.get_world_size())
        for v in self.variables:
            v.value.grad = None
        error = self.parallel(x[mine], training=True) - torch.from_numpy(y[mine])
        (error * error).mean().backward()

    def state(self):
        """Return the bytes of state in this process."""
        if isinstance(self.optimizer, ZeroRedundancyOptimizer):
            kept = self.optimizer.optim.state.values()
            return sum(x.nbytes for of_one in kept for x in of_one.values() if x.ndim)
        return sum(v.value.nbytes for v in self.optimizer.variables)


def ours(parameters, variables):
    optimizer = keras_adam.Adam.with_torch_arguments(1e-3, shard_state=True)
    optimizer.build(variables)
    return optimizer


def zero(**options):
    return lambda parameters, variables: ZeroRedundancyOptimizer(
        parameters, torch.optim.Adam, lr=1e-3, **options
    )


OPTIMIZERS = {"keras_adam": ours, ZERO: zero(), f"{ZERO}, fused": zero(fused=True)}


def seconds(run):
    dist.barrier()
    begin = time.perf_counter()
    run.optimizer.step()
    return time.perf_counter() - begin


def most(number):
    """Return the greatest number of all processes."""
    number = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = []
    for name in MODELS:
        runs = {of: Run(name, optimizer) for of, optimizer in OPTIMIZERS.items()}
        for step in range(STEPS):
            for run in runs.values():
                run.differentiate(step)
                run.optimizer.step()
        weights = {of: [v.numpy() for v in run.variables] for of, run in runs.items()}
        pairs = zip(weights["keras_adam"], weights[ZERO], strict=True)
        away = max(np.abs(a - b).max() for a, b in pairs)
        times = np.array([[most(seconds(run)) for run in runs.values()] for _ in range(rounds)])
        whole = 8 * sum(v.value.numel() for v in runs["keras_adam"].variables)
        rows.append(
            {
                "model": name,
                "processes": dist.get_world_size(),
                "share": {of: most(run.state()) / whole for of, run in runs.items()},
                "ratio": dict(zip(runs, np.median(times / times[:, :1], axis=0), strict=True)),
                "seconds": float(np.median(times[:, 0])),
                "away": float(away),
            }
        )
    if dist.get_rank() == 0:
        print(json.dumps(rows), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
