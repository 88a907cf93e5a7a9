"""Measure keras_adam beside its peers under one backend.

KERAS_BACKEND=torch python benchmarks/run.py --out results-torch.json
"""

import argparse
import dataclasses
import importlib
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cases
import fit
import keras
import machine
import measure
import memory
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file; default: results-<backend>.json")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="shrink all, to see that it works: figures mean nothing",
    )
    parser.add_argument("--only", default="", help="only cases whose title has this text")
    arguments = parser.parse_args()
    backend = backend_name()
    console = Console(stderr=True)
    begin = time.perf_counter()
    with _progress(console) as progress:
        results = _measure_all(backend, arguments.quick, arguments.only, progress)
    out = arguments.out or Path(f"results-{backend}.json")
    out.write_text(json.dumps(results, indent=1))
    console.print(f"{out}: {len(results['cases'])} cases in {time.perf_counter() - begin:.0f} s")


def backend_name() -> str:
    return keras.backend.backend()


def contestants(case: cases.Case, quick: bool) -> dict:
    """Return what prepares each contestant of a case, by name."""
    if case.work == "fit":
        return fit.contestants(case, quick)
    module = importlib.import_module(f"on_{case.backend}")
    found = module.contestants(case, module.gradients(case))
    if case.name == cases.LARGEST:
        found[cases.MEMORY_PASS] = lambda: machine.memory_pass(case.parameters)
    return found


def _measure_all(backend: str, quick: bool, only: str, progress: Progress) -> dict:
    chosen = [case for case in cases.cases(backend, quick) if only in case.title]
    task = progress.add_task(backend, total=len(chosen) + 1, doing="")
    budget = measure.QUICK if quick else measure.FULL
    measured = []
    for i, case in enumerate(chosen):

        def advance(doing, share, i=i, case=case):
            progress.update(task, completed=i + share, doing=f"{case.mode}: {case.name}: {doing}")

        found = measure.measure(contestants(case, quick), budget, advance)
        keras.utils.clear_session()
        measured.append(dataclasses.asdict(case) | {"parameters": case.parameters} | found)

    def advance_memory(doing, share):
        progress.update(task, completed=len(chosen) + share, doing=doing)

    return {
        "backend": backend,
        "quick": quick,
        "machine": machine.describe(backend),
        "cases": measured,
        "memory": {} if only else memory.measure_peaks(backend, quick, advance_memory),
    }


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[doing]}"),
    )
    return Progress(*columns, console=console)


if __name__ == "__main__":
    main()
