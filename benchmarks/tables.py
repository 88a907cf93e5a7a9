"""The tables of a report, as lists of strings, and how they are written for a terminal and in Markdown."""

from typing import NamedTuple

import cases
import results
from rich import table

BACKENDS = {"torch": "PyTorch", "tensorflow": "TensorFlow", "jax": "JAX"}


class Table(NamedTuple):
    title: str
    head: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        rows = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.lines]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def rich(self) -> table.Table:
        found = table.Table(title=self.title, title_justify="left")
        for i, name in enumerate(self.head):
            found.add_column(name, justify="right" if i else "left", no_wrap=not i)
        for line in self.lines:
            found.add_row(*line)
        return found


def all_tables(found: list[dict]) -> list[Table]:
    tables = [_goals(found)]
    for result in found:
        backend = BACKENDS[result["backend"]]
        steps = [row for row in result["rows"] if row.work == "step"]
        others = [row for row in result["rows"] if row.work not in ("step", "fit")]
        fits = [row for row in result["rows"] if row.work == "fit"]
        tables.append(_ratios(f"{backend}: one optimizer step", steps))
        tables.append(_ratios(f"{backend}: accumulation and sparse gradients", others))
        tables.append(_ratios(f"{backend}: model.fit, per training step", fits))
        tables.append(_bandwidth(f"{backend}: share of the memory bandwidth", steps))
        tables.append(_memory(f"{backend}: peak memory of a step beyond what stays", result))
    return [table for table in tables if table.lines]


def _goals(found) -> Table:
    lines = []
    for goal, row in results.goals(found):
        ratio = row.ratio(goal.against)
        work = f"{BACKENDS[row.backend]}, {row.title}"
        lines.append([work, goal.against, str(ratio), str(goal), goal.verdict(ratio)])
    head = ["work", "against", "their time / ours", "goal", "verdict"]
    return Table("Goals", head, lines)


def _ratios(title, rows) -> Table:
    """Our time, and each other's divided by it."""
    names = list(dict.fromkeys(name for row in rows for name in (*row.seconds, *row.skipped)))
    others = [n for n in names if n != cases.MEMORY_PASS and any(n != r.ours for r in rows)]
    others = [n for n in others if any(n in r.seconds and n != r.ours for r in rows)]
    lines = []
    for row in rows:
        cells = [str(row.ratio(n)) if n in row.seconds and n != row.ours else "" for n in others]
        lines.append([row.title, milliseconds(row.time(row.ours)), *cells])
    return Table(title, ["work", "ours", *map(_short, others)], lines)


def _short(name) -> str:
    """Return a contestant's name as a column's head."""
    for long, short in (
        ("keras.optimizers.", "Keras "),
        ("torch.optim.Adam,", "torch"),
        (" subclass", ""),
    ):
        name = name.replace(long, short)
    return name.replace(cases.OURS, "ours")


def _bandwidth(title, rows) -> Table:
    lines = [
        [
            row.title,
            f"{100 * row.bandwidth_share().median:.0f} %",
            f"{row.bandwidth() / 1e9:.1f} GB/s",
        ]
        for row in rows
        if row.bandwidth_share()
    ]
    return Table(title, ["work", "ours", "measured bandwidth"], lines)


def _memory(title, result) -> Table:
    lines = []
    for mode, peaks in result["memory"].items():
        for name, peak in peaks.items():
            beyond, parameters = peak["beyond"], peak["parameters"]
            share = f"{beyond / parameters:.2f}"
            lines.append([f"{cases.LARGEST}, {mode}: {name}", f"{beyond / 1e6:.0f} MB", share])
    return Table(title, ["work", "peak", "times the parameters' size"], lines)


def milliseconds(spread: results.Spread) -> str:
    scale, unit = (1e6, "µs") if spread.median < 1e-3 else (1e3, "ms")
    return f"{results.Spread(*(scale * x for x in spread))} {unit}"


def skipped(found: list[dict]) -> list[str]:
    """Return one sentence for each contestant and reason."""
    reasons: dict[tuple, list[str]] = {}
    for result in found:
        for row in result["rows"]:
            for name, reason in row.skipped.items():
                reasons.setdefault((result["backend"], name, reason), []).append(row.title)
    return [
        f"{BACKENDS[backend]}, {name}: {reason} ({'; '.join(titles)})"
        for (backend, name, reason), titles in reasons.items()
    ]
