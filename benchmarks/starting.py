"""How long a model of many variables takes to start: `build`, and the first step, which traces and compiles.

    python benchmarks/starting.py            all backends; writes `starting.md`
    python benchmarks/starting.py --quick    small models, to see that it works

Each measurement is made in a process of its own, as a second one would find compiled code. The processes take turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import memory
import tables
from rich.console import Console

HERE = Path(__file__).parent
COUNTS = (100, 500, 2_000)
ELEMENTS = 10
OURS, KERAS, OPTAX, TORCH = "keras_adam", "Keras", "optax", "PyTorch, fused"
MODES = {
    "torch": {"eager": (OURS, KERAS, TORCH)},
    "tensorflow": {"graph": (OURS, KERAS)},
    "jax": {"jit": (OURS, KERAS, OPTAX), "eager": (OURS, KERAS)},
}
EXPLANATION = f"""\
Models of so many variables, of {ELEMENTS} elements each. Seconds until the first step is done, `build` included; then
the time of others divided by that: above 1, ours is faster. Memory is what the resident memory has grown by then.
Medians of processes that take turns."""


def prepare(mode: str, name: str, count: int):
    """Return what builds, and what makes the first step."""
    if name in (OPTAX, TORCH):
        return {OPTAX: _optax, TORCH: _torch}[name](count)
    import keras

    import keras_adam

    optimizer = {OURS: keras_adam.Adam, KERAS: keras.optimizers.Adam}[name]()
    variables = [keras.Variable("zeros", shape=(ELEMENTS,), name=f"v{i}") for i in range(count)]
    grads = [keras.ops.ones((ELEMENTS,)) for _ in range(count)]

    def step():
        if mode == "graph":
            import tensorflow as tf

            tf.function(lambda: optimizer.apply(grads, variables))()
        elif mode == "jit":
            import jax

            state = [v.value for v in optimizer.variables]
            values = [v.value for v in variables]
            jax.block_until_ready(jax.jit(optimizer.stateless_apply)(state, grads, values))
        else:
            optimizer.apply(grads, variables)
            keras.ops.convert_to_numpy(variables[-1])

    return lambda: optimizer.build(variables), step


def _optax(count: int):
    import jax
    import optax

    values, grads = ([jax.numpy.zeros(ELEMENTS) + i for _ in range(count)] for i in range(2))
    transform, held = optax.adam(1e-3), []

    def step():
        def compute(values, state, grads):
            updates, state = transform.update(grads, state, values)
            return optax.apply_updates(values, updates), state

        jax.block_until_ready(jax.jit(compute)(values, held[0], grads))

    return lambda: held.append(transform.init(values)), step


def _torch(count: int):
    import torch

    values = [torch.nn.Parameter(torch.zeros(ELEMENTS)) for _ in range(count)]
    for value in values:
        value.grad = torch.ones(ELEMENTS)
    held: list = []
    return lambda: held.append(torch.optim.Adam(values, fused=True)), lambda: held[0].step()


def measure(mode: str, name: str, count: int) -> dict[str, float]:
    """Return the seconds of `build` and of the first step, and the bytes by which both let memory grow."""
    build, step = prepare(mode, name, count)
    before, begin = memory.resident(), time.perf_counter()
    build()
    built = time.perf_counter()
    step()
    return {
        "build": built - begin,
        "first": time.perf_counter() - built,
        "bytes": memory.resident() - before,
    }


def _in_its_own_process(backend: str, mode: str, name: str, count: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", mode, name, str(count)]
    environment = os.environ | {"KERAS_BACKEND": backend}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _table(mode: str, backend: str, names, counts, rounds: int, console: Console) -> tables.Table:
    found = {(name, count): [] for count in counts for name in names}
    for _ in range(rounds):
        for (name, count), samples in found.items():
            samples.append(_in_its_own_process(backend, mode, name, count))
            console.print(f"{backend}, {mode}, {count} variables, {name}: {samples[-1]}")
    lines = []
    for count in counts:
        median = {
            name: {
                key: statistics.median(sample[key] for sample in found[name, count])
                for key in ("build", "first", "bytes")
            }
            for name in names
        }
        ours = median[OURS]
        whole = ours["build"] + ours["first"]
        ratios = [
            f"{(median[name]['build'] + median[name]['first']) / whole:.2f}" for name in names[1:]
        ]
        memory = [f"{median[name]['bytes'] / 1e6:.0f}" for name in names]
        parts = [f"{ours['build']:.3g}", f"{whole:.3g}"]
        lines.append([f"{count:,}", *parts, *ratios, *memory])
    head = ["variables", "ours: `build`, s", "ours: all, s", *names[1:]]
    head += [f"MB, {name}" for name in names]
    return tables.Table(f"{tables.BACKENDS[backend]}, {mode}", head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        mode, name, count = arguments.one
        print(json.dumps(measure(mode, name, int(count))))
        return
    counts = (5, 10) if arguments.quick else arguments.counts
    rounds = 1 if arguments.quick else arguments.rounds
    console = Console()
    parts = ["# Starting", EXPLANATION]
    for backend, modes in MODES.items():
        for mode, names in modes.items():
            table = _table(mode, backend, names, counts, rounds, console)
            console.print(table.rich())
            parts += [f"## {table.title}", table.markdown()]
    if not arguments.quick:
        (HERE / "starting.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
