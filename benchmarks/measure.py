"""Timing: contestants take turns, in a new order each round, so that what disturbs one disturbs all."""

import gc
import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Step(NamedTuple):
    """A contestant that is ready to run."""

    run: Callable[[], Any]  # returns when the result is there, not when it is under way
    read: Callable[[], np.ndarray] | None = None  # the first variable, where all must agree
    steps: int = 1  # optimizer steps in one run


class UnavailableError(Exception):
    """A contestant that cannot run here; the message says why."""


class Budget(NamedTuple):
    seconds: float  # for the rounds of one case, unless `least` rounds take longer
    least: int  # rounds
    most: int
    sample: float  # least seconds of one sample: short steps are repeated


FULL = Budget(seconds=3.0, least=7, most=31, sample=0.02)
QUICK = Budget(seconds=0.0, least=3, most=3, sample=0.0)


def measure(
    contestants: dict[str, Callable[[], Step]],
    budget: Budget,
    advance,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Return each contestant's seconds per optimizer step, round by round, and why others were skipped.

    Args:
        contestants: Functions that prepare a contestant, by name; the first is what the others must agree with.
        budget: How long to measure.
        advance: Called with what is being done and how much of the case is done, from 0 to 1.
        clock: What tells the seconds. Defaults to `time.perf_counter`.
    """
    ready, skipped = _prepare(contestants, advance)
    repeats = {name: _repeats(step, budget) for name, step in ready.items()}
    samples: dict[str, list[float]] = {name: [] for name in ready}
    shuffle = random.Random(0).shuffle
    begin, rounds = time.perf_counter(), 0
    try:
        while rounds < budget.least or (
            rounds < budget.most and time.perf_counter() - begin < budget.seconds
        ):
            order = list(ready)
            shuffle(order)
            gc.collect()
            gc.disable()  # a collection would be booked to whoever runs at that moment
            for name in order:
                samples[name].append(_sample(ready[name], repeats[name], clock))
            gc.enable()
            rounds += 1
            spent = (time.perf_counter() - begin) / (budget.seconds or 1e9)
            advance("measure", max(rounds / budget.most, min(1.0, spent, rounds / budget.least)))
    finally:
        gc.enable()
    return {"seconds": samples, "repeats": repeats, "skipped": skipped}


def _prepare(contestants, advance) -> tuple[dict[str, Step], dict[str, str]]:
    ready: dict[str, Step] = {}
    skipped = {}
    expected = None
    for name, make in contestants.items():
        advance(f"prepare {name}", 0.0)
        try:
            step = make()
            for _ in range(3 if step.steps == 1 else 2):  # compiles; allocates; touches all memory
                step.run()
        except UnavailableError as error:
            skipped[name] = str(error)
            continue
        ready[name] = step
        if step.read is not None:
            value = step.read()
            expected = value if expected is None else expected
            _check_agreement(name, value, expected)
    return ready, skipped


def _check_agreement(name, value, expected) -> None:
    # On average: an epsilon that is added in another place shows where a gradient is next to zero.
    error = np.abs(value - expected).mean() / np.abs(expected).mean()
    if not error < 1e-3:
        raise AssertionError(f"{name} computes something else: off by {error:.1%} on average")


def _repeats(step: Step, budget: Budget) -> int:
    once = _sample(step, 1, time.perf_counter) * step.steps
    return max(1, min(1000, round(budget.sample / once)))


def _sample(step: Step, repeats: int, clock) -> float:
    run = step.run
    begin = clock()
    for _ in range(repeats):
        run()
    return (clock() - begin) / (repeats * step.steps)
