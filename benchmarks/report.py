"""Tables and a plot from the results of one or more backends.

    python benchmarks/report.py benchmarks/results-*.json

Prints the tables, and writes `results.md`, `ratios-light.png` and `ratios-dark.png` beside this file.
"""

import argparse
from pathlib import Path

import plot
import results
import tables
from rich.console import Console

HERE = Path(__file__).parent
_EXPLANATION = """\
Medians of interleaved rounds in one process per backend; ± is half the distance between the quartiles. Columns other
than *ours* are that contestant's time divided by ours in the same round: above 1, ours is faster. Only such ratios,
taken in one run, compare; times differ from machine to machine."""
_BANDWIDTH = """\
A plain step must read p, g, m and v and write p, m and v: 28 bytes per parameter. The bandwidth is that of a NumPy pass
over four arrays which moves the same bytes with one thread per core, measured in the same rounds."""
_MEMORY = """\
Of one more step, after three: highest resident memory (Linux's VmHWM, reset before the step) less the resident memory
before it. Each contestant in its own process, with an allocator that gives back at once what is freed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: results-*.json beside this")
    parser.add_argument("--folder", type=Path, default=HERE, help="where to write")
    arguments = parser.parse_args()
    files = arguments.files or sorted(HERE.glob("results-*.json"))
    if not files:
        parser.error("no results: run benchmarks/run.py first")
    found = results.load(files)
    console = Console()
    if console.width < 140 and not console.is_terminal:
        console = Console(width=140)
    for table in tables.all_tables(found):
        console.print(table.rich(), "")
    for sentence in tables.skipped(found):
        console.print(f"Skipped: {sentence}", highlight=False)
    if not any(result["quick"] for result in found):
        sentences = results.fallen(found, results.committed(files))
        for sentence in sentences or ["none"]:
            console.print(f"Slower than in the committed results: {sentence}", highlight=False)
    page = arguments.folder / "results.md"
    page.write_text(_page(found))
    for path in (page, *plot.draw(found, arguments.folder)):
        console.print(f"wrote {path}")


def _page(found: list[dict]) -> str:
    parts = ["# Speed and memory", _EXPLANATION, _machine(found)]
    if any(result["quick"] for result in found):
        parts.insert(
            1, "**From a quick run, which only shows that all works: the figures mean nothing.**"
        )
    for table in tables.all_tables(found):
        parts.append(f"## {table.title}")
        parts += [_BANDWIDTH] if "bandwidth" in table.title else []
        parts += [_MEMORY] if "memory of" in table.title else []
        parts.append(table.markdown())
    sentences = tables.skipped(found)
    if sentences:
        parts += ["## Skipped", "\n".join(f"- {sentence}" for sentence in sentences)]
    return "\n\n".join(parts) + "\n"


def _machine(found: list[dict]) -> str:
    described = {key: value for result in found for key, value in result["machine"].items()}
    return "Machine and versions: " + "; ".join(f"{k} {v}" for k, v in described.items()) + "."


if __name__ == "__main__":
    main()
