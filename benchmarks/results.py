"""What the measurements say: ratios with their spread, and whether goals were reached."""

import json
import subprocess
from pathlib import Path
from typing import NamedTuple

import cases
import numpy as np

BYTES_PER_PARAMETER = 28  # p, g, m and v are read, p, m and v written, four bytes each


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    low: float
    median: float
    high: float

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        digits = 0 if self.median >= 100 else 1 if self.median >= 10 else 2
        return f"{self.median:.{digits}f} ±{self.half:.{digits}f}"


class Row:
    """One case's measurements under one backend."""

    def __init__(self, case: dict):
        self.backend, self.work, self.mode = case["backend"], case["work"], case["mode"]
        self.name, self.parameters = case["name"], case["parameters"]
        self.seconds = {name: np.array(x) for name, x in case["seconds"].items()}
        self.skipped = case["skipped"]
        self.ours = next(iter(self.seconds))
        self.title = self.name if self.mode == "fit" else f"{self.name}, {self.mode}"

    def time(self, name: str) -> Spread:
        return spread(self.seconds[name])

    def ratio(self, name: str) -> Spread:
        """Return the contestant's time divided by ours in the same round."""
        return spread(self.seconds[name] / self.seconds[self.ours])

    def best_peer(self) -> str | None:
        peers = [name for name in self.seconds if name in cases.PEERS]
        return min(peers, key=lambda name: self.time(name).median, default=None)

    def bandwidth_share(self) -> Spread | None:
        """Return how close our step comes to a pass that only moves the same bytes."""
        return self.ratio(cases.MEMORY_PASS) if cases.MEMORY_PASS in self.seconds else None

    def bandwidth(self) -> float:
        """Return the bytes per second of that pass."""
        return BYTES_PER_PARAMETER * self.parameters / self.time(cases.MEMORY_PASS).median


def spread(values) -> Spread:
    return Spread(*(float(x) for x in np.percentile(values, [25, 50, 75])))


def load(paths: list[Path]) -> list[dict]:
    """Read the files of one or more backends."""
    return _with_rows([json.loads(path.read_text()) for path in paths])


def _with_rows(found: list[dict]) -> list[dict]:
    for result in found:
        result["rows"] = [Row(case) for case in result["cases"]]
    order = {"torch": 0, "tensorflow": 1, "jax": 2}
    return sorted(found, key=lambda result: order[result["backend"]])


class Goal(NamedTuple):
    backend: str
    mode: str
    name: str
    against: str
    least: float = 0.0  # of their time divided by ours
    most: float = float("inf")

    def verdict(self, ratio: Spread) -> str:
        if self.least <= ratio.median <= self.most:
            return "reached"
        near = self.least <= ratio.high and ratio.low <= self.most
        return "within the spread" if near else "not reached"

    def __str__(self) -> str:
        return f"≥ {self.least:.3g}" if self.least else f"≤ {self.most:.3g}"


_ACCUMULATION = f"20 x 500,000, accumulation {cases.ACCUMULATION}, per micro-step"
_FIT = "8 x Dense(1024), batch 32"
_AS_FAST = 1 / 1.05

GOALS = [
    Goal("torch", "eager", cases.LARGEST, cases.KERAS, 10),
    Goal("torch", "eager", cases.LARGEST, cases.TORCH["fused"], _AS_FAST),
    Goal("torch", "eager", "50 x 200,000", cases.KERAS, 10),
    Goal("torch", "eager", "50 x 200,000", cases.TORCH["fused"], _AS_FAST),
    Goal("torch", "eager", "200 x 4,096", cases.TORCH["fused"], 1),
    Goal("torch", "fit", _FIT, cases.KERAS, 2.4),
    Goal("tensorflow", "graph", cases.LARGEST, cases.KERAS, 2.7),
    Goal("tensorflow", "graph", "embedding 1,000,000 x 32, 512 rows", cases.KERAS, 50),
    Goal("jax", "jit", cases.LARGEST, cases.KERAS, 1),
    Goal("jax", "jit", cases.LARGEST, cases.OPTAX, 1),
    Goal("jax", "jit", _ACCUMULATION, cases.KERAS, 8),
    Goal("jax", "eager", "200 x 4,096", cases.KERAS, 40),
    Goal("jax", "fit", f"{_FIT}, accumulation 4", cases.KERAS, 4),
    *(
        Goal(backend, mode, name, cases.GROUPS, most=1.1)
        for backend, mode in (("torch", "eager"), ("tensorflow", "graph"), ("jax", "jit"))
        for name in ("500 x 10", "200 x 4,096", cases.LARGEST)
    ),
]


def fallen(found: list[dict], before: list[dict]) -> list[str]:
    """Return a sentence for each ratio that is lower than in earlier results by more than their spread.

    Both are lists as `load` returns them. A ratio fell if its upper quartile is below the earlier one's lower.
    """
    old = {(r.backend, r.mode, r.name): r for result in before for r in result["rows"]}
    sentences = []
    for row in (row for result in found for row in result["rows"]):
        known = old.get((row.backend, row.mode, row.name))
        for name in row.seconds:
            if known is None or name == row.ours or name not in known.seconds:
                continue
            earlier, now = known.ratio(name), row.ratio(name)
            if now.high < earlier.low:
                sentences.append(
                    f"{row.backend}, {row.title}: {name} took {earlier} times as long as ours, and takes {now} now"
                )
    return sentences


def committed(paths: list[Path]) -> list[dict]:
    """Return the results that git has of these files at HEAD; those that it does not have are left out."""
    texts = []
    for path in paths:
        command = ["git", "show", f"HEAD:./{path.name}"]
        folder = path.resolve().parent
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        texts += [done.stdout] * (done.returncode == 0)
    return _with_rows([json.loads(text) for text in texts])


def goals(results: list[dict]) -> list[tuple[Goal, Row]]:
    """Pair the goals with the rows that were measured."""
    rows = {(r.backend, r.mode, r.name): r for result in results for r in result["rows"]}
    found = [(goal, rows.get((goal.backend, goal.mode, goal.name))) for goal in GOALS]
    return [(goal, row) for goal, row in found if row is not None and goal.against in row.seconds]
