"""Memory and time of an optimizer step whose variables or moments are kept in fewer bits, beside float32's.

    KERAS_BACKEND=torch python benchmarks/state.py
    python benchmarks/state.py --report

The first writes `state-<backend>.json`; what the file holds already is not measured again. The second makes `state.md`
of all such files.
Memory is resident memory as Linux reports it, each contestant in its own process: what variables and state take after
three steps, minus what there was before, and what one more step takes beyond that. Time is measured for all in one
process, in turns. On one thread it is the processor's time, which other work on the machine hardly changes; on PyTorch
the elapsed time on two threads is measured too. bitsandbytes and torchao, where they are installed, are timed at the
smaller size.
"""

import argparse
import functools
import gc
import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# One thread, but where PyTorch is told otherwise.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"

import cases
import keras
import measure
import memory
import numpy as np
from rich.console import Console

import keras_adam

HERE = Path(__file__).parent
BACKEND = keras.backend.backend()
MODE = {"jax": "jit", "tensorflow": "graph", "torch": "eager"}[BACKEND]
SMALL = cases.Case(BACKEND, "step", MODE, "1 x 1,048,576", 1, 2**20)  # torchao wants whole blocks
LARGE = cases.Case(BACKEND, "step", MODE, "20 x 2,000,000", 20, 2_000_000)
BUDGET = measure.Budget(seconds=5.0, least=7, most=31, sample=0.0)
OURS, KERAS = keras_adam.AdamW, keras.optimizers.AdamW
FLOAT32, IN_8_BITS = "keras_adam, float32", "keras_adam, float32, moments in 8 bits"
CONTESTANTS = {
    FLOAT32: ("float32", OURS, {}),
    "keras_adam, float32, moments in bfloat16": ("float32", OURS, {"state_dtype": "bfloat16"}),
    IN_8_BITS: ("float32", OURS, {"state_dtype": "8bit"}),
    "keras_adam, bfloat16": ("bfloat16", OURS, {}),
    "keras_adam, bfloat16, moments too": ("bfloat16", OURS, {"state_dtype": "bfloat16"}),
    "keras_adam, bfloat16, moments in 8 bits": ("bfloat16", OURS, {"state_dtype": "8bit"}),
    "keras.optimizers.AdamW, float32": ("float32", KERAS, {}),
}
PEERS = {
    "bitsandbytes.AdamW8bit, float32": ("bitsandbytes.optim", "AdamW8bit"),
    "torchao.AdamW8bit, float32": ("torchao.optim", "AdamW8bit"),
}


def step_of(name: str, case: cases.Case, grads) -> measure.Step:
    """Return a step of a contestant, on variables of its dtype."""
    dtype, kind, options = CONTESTANTS[name]
    keras.config.set_floatx(dtype)  # of new variables
    module = importlib.import_module(f"on_{BACKEND}")
    make = module.keras_step
    step = make(case, lambda variables: kind(cases.LEARNING_RATE, **options), grads[dtype])
    keras.config.set_floatx("float32")
    return step._replace(read=None)  # fewer bits do not agree with float32 to its digits


def peer_of(name: str, case: cases.Case, grads) -> measure.Step:
    import torch

    module, kind = PEERS[name]
    try:
        make = getattr(importlib.import_module(module), kind)
    except ImportError as error:
        raise measure.UnavailableError(str(error)) from error
    parameters = [torch.nn.Parameter(torch.zeros(case.elements)) for _ in range(case.count)]
    for parameter, gradient in zip(parameters, grads["float32"], strict=True):
        parameter.grad = gradient
    return measure.Step(make(parameters, lr=cases.LEARNING_RATE).step)


def gradients(case: cases.Case, dtypes) -> dict:
    module = importlib.import_module(f"on_{BACKEND}")
    found = {}
    for dtype in dtypes:
        if BACKEND == "tensorflow":
            import tensorflow as tf

            values = [tf.cast(g, dtype) for g in module.gradients(case)]
            found[dtype] = [tf.Variable(g, trainable=False) for g in values]
        else:
            found[dtype] = [keras.ops.cast(g, dtype) for g in module.gradients(case)]
    return found


def memory_of(name: str) -> dict[str, float]:
    """Return the bytes per parameter that stay, and those that a step takes in addition."""
    grads = gradients(LARGE, [CONTESTANTS[name][0]])
    gc.collect()
    before = memory.resident()
    step = step_of(name, LARGE, grads)
    for _ in range(3):
        step.run()
    gc.collect()
    stays = memory.resident() - before
    beyond = memory.beyond(step)
    return {"stays": stays / LARGE.parameters, "beyond": beyond / LARGE.parameters}


def seconds_of(case: cases.Case, threads: int, names: list[str]) -> dict[str, list[float]]:
    """Return the seconds of a step, by contestant, round by round."""
    if BACKEND == "torch":
        import torch

        torch.set_num_threads(threads)
    np.zeros(2**24, np.uint8)  # Freed, as activations are. Then C's allocator keeps small memory.
    clock = time.process_time if threads == 1 else time.perf_counter
    grads = gradients(case, {CONTESTANTS[name][0] for name in names})
    ready = {name: functools.partial(step_of, name, case, grads) for name in names}
    if BACKEND == "torch" and case is SMALL:
        ready |= {name: functools.partial(peer_of, name, case, grads) for name in PEERS}
    return measure.measure(ready, BUDGET, lambda *progress: None, clock)["seconds"]


def run(only: str, threads_of_torch: list[int]) -> None:
    names = [name for name in CONTESTANTS if re.search(only, name)]
    console = Console()
    out = HERE / f"state-{BACKEND}.json"
    found = {"backend": BACKEND, "keras": keras.__version__, "memory": {}, "seconds": {}}
    if out.exists():
        found |= json.loads(out.read_text())
    for name in names:
        if name in found["memory"]:
            continue
        command = [sys.executable, __file__, "--memory-of", name]
        done = subprocess.run(
            command, env=os.environ | memory.ALLOCATOR, capture_output=True, text=True, check=True
        )
        found["memory"][name] = json.loads(done.stdout.splitlines()[-1])
        console.print(name, found["memory"][name])
        out.write_text(json.dumps(found, indent=1) + "\n")
    for threads in threads_of_torch if BACKEND == "torch" else [1]:
        for case in (SMALL, LARGE):
            key = f"{case.name}, {threads} thread{'s' * (threads > 1)}"
            if key in found["seconds"]:
                continue
            found["seconds"][key] = seconds = seconds_of(case, threads, names)
            console.print(key, {name: f"{np.median(x):.5f}" for name, x in seconds.items()})
            out.write_text(json.dumps(found, indent=1) + "\n")


def report() -> None:
    from tables import BACKENDS

    parts = [
        "# Memory and time of a step, by how variables and moments are kept",
        "Bytes per parameter of resident memory, of 20 x 2,000,000 parameters: *stays* is variable and state; *beyond* "
        "is what one step takes besides. Times are divided by that of ours in float32 in the same round: medians. "
        "On one thread it is the processor's time, on two the elapsed time. JAX and TensorFlow may keep "
        "what a step took for the next one: then it is counted as staying.",
    ]
    for file in sorted(HERE.glob("state-*.json")):
        result = json.loads(file.read_text())
        columns = result["seconds"]
        rows = [
            f"| | stays | beyond | {' | '.join(columns)} |",
            f"| --- | ---: | ---: |{' ---: |' * len(columns)}",
        ]
        for name in max(columns.values(), key=len):
            of = result["memory"].get(name)
            cells = [f"{of['stays']:.1f}", f"{of['beyond']:.2f}"] if of else ["", ""]
            for seconds in columns.values():
                ratio = np.array(seconds.get(name, [np.nan])) / np.array(seconds[FLOAT32])
                cells.append(f"{np.median(ratio):.2f}" if name in seconds else "")
            rows.append(f"| {name} | {' | '.join(cells)} |")
        firsts = ", ".join(
            f"{1e3 * np.median(seconds[FLOAT32]):.2f} ms ({name})"
            for name, seconds in columns.items()
        )
        parts += [
            f"## {BACKENDS[result['backend']]}",
            "\n".join(rows),
            f"The float32 step took {firsts}.",
        ]
    (HERE / "state.md").write_text("\n\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="make the table")
    parser.add_argument("--only", default="", help="regular expression of contestants")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of PyTorch")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(memory_of(arguments.memory_of)))
    elif arguments.report:
        report()
    else:
        run(arguments.only, arguments.threads)


if __name__ == "__main__":
    main()
