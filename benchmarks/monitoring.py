"""Measure what `monitor` and `skip_spikes` cost: one optimizer step with them over one without, in one run.

KERAS_BACKEND=torch python benchmarks/monitoring.py
"""

import importlib
import os
import statistics

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cases
import keras
import measure
import results

import keras_adam
from keras_adam.monitor import EVERY

OPTIONS = {
    "off": {},
    "monitor=True": {"monitor": True},
    "monitor=1": {"monitor": 1},
    "skip_nonfinite=True": {"skip_nonfinite": True},
    "skip_spikes=6": {"skip_spikes": 6.0},
    "global_clipnorm": {"global_clipnorm": 1e9},
    "global_clipnorm, monitor=True": {"global_clipnorm": 1e9, "monitor": True},
}
SIZES = [(200, 4_096), (20, 2_000_000)]
BUDGET = measure.Budget(seconds=60.0, least=15, most=41, sample=0.1)


def main() -> None:
    backend = keras.backend.backend()
    mode = {"torch": "eager", "tensorflow": "graph", "jax": "jit"}[backend]
    module = importlib.import_module(f"on_{backend}")
    print(f"| {backend}, {mode} | " + " | ".join(OPTIONS) + " |")
    print("| --- |" + " ---: |" * len(OPTIONS))
    for size in SIZES:
        case = cases.step(backend, mode, *size, quick=False)
        grads = module.gradients(case)
        contestants = {
            name: lambda options=options, case=case, grads=grads: _many(
                module.keras_step(case, lambda variables: _adam(options), grads)
            )
            for name, options in OPTIONS.items()
        }
        seconds = measure.measure(contestants, BUDGET, lambda *_: None)["seconds"]
        keras.utils.clear_session()
        print(f"| {case.name} | " + " | ".join(_cells(seconds)) + " |", flush=True)


def _adam(options) -> keras.optimizers.Optimizer:
    return keras_adam.Adam(cases.LEARNING_RATE, **options)


def _many(step: measure.Step) -> measure.Step:
    """Return so many steps that one of them is measured by `monitor=True`."""

    def run():
        for _ in range(EVERY):
            step.run()

    return measure.Step(run, step.read, EVERY)


def _cells(seconds) -> list[str]:
    """Return the time without, and the others' over it, round by round: median and half the quartiles' distance."""
    off = seconds["off"]
    cells = [f"{statistics.median(off) * 1e3:.2f} ms"]
    for name in list(OPTIONS)[1:]:
        ratios = [a / b for a, b in zip(seconds[name], off, strict=True)]
        ratio = results.spread(ratios)
        cells.append(f"{ratio.median:.3f} ±{ratio.half:.3f}")
    return cells


if __name__ == "__main__":
    main()
