"""What `shard_state=True` saves and costs: bytes of state per device, time of a step.

    python benchmarks/sharding.py

On JAX eight devices are made of this machine's CPU, on PyTorch two processes and four, so that their time tells of the
work that is done, not of a network. Writes `sharding.md`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

DEVICES = 8
os.environ["KERAS_BACKEND"] = "jax"
flag = f" --xla_force_host_platform_device_count={DEVICES}"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flag

import keras
import numpy as np
from keras import layers
from rich.console import Console

import keras_adam

HERE = Path(__file__).parent
WIDTH, LAYERS, BATCH = 1024, 4, 64
VARIANTS = {
    "float32": ("float32", {}),
    "float32, average, AMSGrad": ("float32", {"use_ema": True, "amsgrad": True}),
    "bfloat16": ("bfloat16", {}),
    "bfloat16, moments too": ("bfloat16", {"state_dtype": "bfloat16"}),
}


def trained(dtype: str, shard: bool, options: dict):
    """Return a model that has made its first step, and what makes another."""
    keras.utils.clear_session()
    keras.config.set_dtype_policy(dtype)
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(devices=keras.distribution.list_devices())
    )
    model = keras.Sequential(
        [keras.Input((WIDTH,)), *(layers.Dense(WIDTH, activation="relu") for _ in range(LAYERS))]
    )
    model.compile(keras_adam.Adam(1e-3, shard_state=shard, **options), loss="mse")
    x = np.random.default_rng(0).normal(size=(BATCH, WIDTH)).astype("float32")

    def step():
        model.train_on_batch(x, x)

    step()
    return model, step


def state_of(model) -> list:
    return [v for v in model.optimizer.variables if v.shape]


def on_one_device(variables) -> int:
    """Return the bytes of the shards that the first device holds."""
    return sum(v.value.addressable_shards[0].data.nbytes for v in variables)


def seconds(step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def on_torch(rounds: int) -> list[str]:
    """Return the paragraphs for PyTorch, whose processes are started anew."""
    rows = []
    for processes in (2, 4):
        launch = [sys.executable, HERE.parent / "examples" / "launch.py"]
        command = [*launch, "--processes", str(processes), HERE / "sharding_torch.py"]
        options = ["--rounds", str(rounds)]
        done = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True, check=True)
        printed = next(line for line in done.stdout.splitlines() if line.startswith("[{"))
        rows += json.loads(printed)
    names = list(rows[0]["share"])
    table = (
        f"| model | processes | bytes: {' | '.join(names)} | time: {' | '.join(names[1:])} | weights |\n"
        f"| --- |{' ---: |' * (2 * len(names) + 1)}"
    )
    for row in rows:
        shares = [f"{row['share'][name] * row['processes']:.2f}" for name in names]
        ratios = [f"{row['ratio'][name]:.2f}" for name in names[1:]]
        cells = [row["model"], row["processes"], *shares, *ratios, f"{row['away']:.0e}"]
        table += f"\n| {' | '.join(map(str, cells))} |"
    return [
        "### Processes of PyTorch",
        "`DistributedDataParallel` over gloo, one thread each, beside "
        "`torch.distributed.optim.ZeroRedundancyOptimizer` over `torch.optim.Adam`, as it is and with `fused=True`. "
        "Bytes: the most that a process holds, times the number of processes, divided by the whole; 1 is a just "
        "share. Time: of the optimizer's step, divided by that of keras_adam's, medians of rounds in turn. Weights: "
        "how far the two are apart after 50 steps.",
        table,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    console = Console()
    lines = [
        "# State spread over devices",
        f"{LAYERS} layers of {WIDTH} x {WIDTH}, batch of {BATCH}, {DEVICES} devices made of {os.cpu_count()} cores; "
        "JAX, `keras.distribution.DataParallel`, `train_on_batch`. Bytes of state per parameter, as the shards of "
        "the first device tell; the time of a sharded step divided by that of a whole one, medians of rounds in turn.",
        "| | whole | sharded | time |\n| --- | ---: | ---: | ---: |",
    ]
    for name, (dtype, options) in VARIANTS.items():
        bytes_each, steps = [], []
        for shard in (False, True):
            model, step = trained(dtype, shard, options)
            parameters = sum(v.value.size for v in model.trainable_variables)
            bytes_each.append(on_one_device(state_of(model)) / parameters)
            steps.append(step)
        times = np.array([[seconds(step) for step in steps] for _ in range(rounds)])
        ratio = np.median(times[:, 1] / times[:, 0])
        row = f"| {name} | {bytes_each[0]:.2f} | {bytes_each[1]:.2f} | {ratio:.2f} |"
        console.print(row)
        lines[-1] += f"\n{row}"
    lines += on_torch(rounds)
    console.print(lines[-1])
    (HERE / "sharding.md").write_text("\n\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
