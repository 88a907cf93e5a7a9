"""Memory and time of an optimizer step in half precision, beside float32's.

    KERAS_BACKEND=torch python benchmarks/half_precision_step.py
    python benchmarks/half_precision_step.py --report

The first writes `half-precision-step-<backend>.json`; the second makes `half-precision-step.md` of all such files.
Memory is resident memory as Linux reports it, each contestant in its own process: what variables and state take after
three steps, minus what there was before, and what one more step takes beyond that. Time is measured for all in one
process, in turns.
"""

import argparse
import functools
import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

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
CASE = cases.Case(BACKEND, "step", MODE, "20 x 1,000,000", 20, 1_000_000)
OURS, KERAS = keras_adam.Adam, keras.optimizers.Adam
CONTESTANTS = {
    "keras_adam, float32": ("float32", OURS, {}),
    "keras_adam, bfloat16": ("bfloat16", OURS, {}),
    "keras_adam, bfloat16, moments too": ("bfloat16", OURS, {"state_dtype": "bfloat16"}),
    "keras_adam, bfloat16, kahan_sum=False": ("bfloat16", OURS, {"kahan_sum": False}),
    "keras_adam, float16": ("float16", OURS, {}),
    "keras.optimizers.Adam, float32": ("float32", KERAS, {}),
    "keras.optimizers.Adam, bfloat16": ("bfloat16", KERAS, {}),
}


def step_of(name: str, grads) -> measure.Step:
    """Return a step of a contestant, on variables of its dtype."""
    dtype, kind, options = CONTESTANTS[name]
    keras.config.set_floatx(dtype)  # of new variables
    module = importlib.import_module(f"on_{BACKEND}")
    make = module._compiled_step if BACKEND == "jax" else module._keras_step
    step = make(CASE, lambda variables: kind(cases.LEARNING_RATE, **options), grads[dtype])
    keras.config.set_floatx("float32")
    return step._replace(read=None)  # half precision does not agree with float32 to its digits


def gradients(dtypes) -> dict:
    module = importlib.import_module(f"on_{BACKEND}")
    found = {}
    for dtype in dtypes:
        if BACKEND == "tensorflow":
            import tensorflow as tf

            values = [tf.cast(g, dtype) for g in module.gradients(CASE)]
            found[dtype] = [tf.Variable(g, trainable=False) for g in values]
        else:
            found[dtype] = [keras.ops.cast(g, dtype) for g in module.gradients(CASE)]
    return found


def memory_of(name: str) -> dict[str, float]:
    """Return the bytes per parameter that stay, and those that a step takes in addition."""
    grads = gradients([CONTESTANTS[name][0]])
    gc.collect()
    before = memory._bytes("VmRSS")
    step = step_of(name, grads)
    for _ in range(3):
        step.run()
    gc.collect()
    stays = memory._bytes("VmRSS")
    memory._RESET.write_text("5")
    step.run()
    beyond = max(0, memory._bytes("VmHWM") - stays)
    return {
        "stays": (stays - before) / CASE.parameters,
        "beyond": beyond / CASE.parameters,
    }


def run() -> None:
    console = Console()
    found = {"backend": BACKEND, "memory": {}}
    for name in CONTESTANTS:
        command = [sys.executable, __file__, "--memory-of", name]
        done = subprocess.run(
            command, env=os.environ | memory._ALLOCATOR, capture_output=True, text=True, check=True
        )
        found["memory"][name] = json.loads(done.stdout.splitlines()[-1])
        console.print(name, found["memory"][name])
    grads = gradients({dtype for dtype, _, _ in CONTESTANTS.values()})
    ready = {name: functools.partial(step_of, name, grads) for name in CONTESTANTS}
    measured = measure.measure(ready, measure.FULL, lambda *progress: None)
    found["seconds"] = measured["seconds"]
    (HERE / f"half-precision-step-{BACKEND}.json").write_text(json.dumps(found, indent=1))


def report() -> None:
    from tables import BACKENDS

    parts = [
        "# Half precision: memory and time of a step",
        f"{CASE.name} parameters. Bytes per parameter of resident memory: *stays* is variable and state; *beyond* is "
        "what one step takes besides. *Time* is divided by that of ours in float32 in the same round: medians.",
    ]
    for file in sorted(HERE.glob("half-precision-step-*.json")):
        result = json.loads(file.read_text())
        first = np.array(result["seconds"]["keras_adam, float32"])
        rows = ["| | stays | beyond | time |", "| --- | ---: | ---: | ---: |"]
        for name, seconds in result["seconds"].items():
            of = result["memory"][name]
            ratio = np.median(np.array(seconds) / first)
            rows.append(f"| {name} | {of['stays']:.1f} | {of['beyond']:.1f} | {ratio:.2f} |")
        parts += [f"## {BACKENDS[result['backend']]}", "\n".join(rows)]
    (HERE / "half-precision-step.md").write_text("\n\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="make the table")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(memory_of(arguments.memory_of)))
    elif arguments.report:
        report()
    else:
        run()


if __name__ == "__main__":
    main()
