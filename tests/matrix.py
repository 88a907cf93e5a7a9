"""Run the suite over versions of Keras and Python, under each backend; write the results to docs/versions.md.

`make test-matrix` runs all rows; `make test-matrix MATRIX_ARGS="--rows newest"` one. Each row has an environment of
its own in .matrix/. A run replaces its own lines of the table, and leaves the others.
"""

import argparse
import datetime
import functools
import glob
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
ENVIRONMENTS = ROOT / ".matrix"
PAGE = ROOT / "docs" / "versions.md"
BACKENDS = {"jax": "jax", "tensorflow": "tensorflow-cpu", "torch": "torch"}

# The least that pyproject.toml asks for, and what goes with it.
OLDEST = {
    "keras": "3.10.0",
    "jax": "0.5.0",
    "jaxlib": "0.5.0",
    "tensorflow-cpu": "2.18.0",
    "torch": "2.4.0",
    "numpy": "1.26.4",
    "ml_dtypes": "0.4.1",
    "optax": "0.2.4",
    "orbax-checkpoint": "0.11.20",
}
# By row: the Python, and what is not at the version of constraints.txt: a version, or a commit of the source.
ROWS: dict[str, tuple[str, dict[str, str]]] = {
    "oldest": ("3.11", OLDEST),
    # TensorFlow 2.21 asks for Keras 3.12.
    "keras-3.10": ("3.11", {"keras": "3.10.0", "tensorflow-cpu": "2.20.0"}),
    "python-3.11": ("3.11", {}),
    "python-3.12": ("3.12", {}),
    "python-3.13": ("3.13", {}),
    "newest": ("3.13", {"jax": "0.12.0.1", "jaxlib": "0.12.0.1", "torch": "2.15.0"}),
    "keras-source": ("3.11", {"keras": "3422977a5e38fb2f7709aaa9a08e47f0c43d0f60"}),  # August 2026
}
SOURCE = {"keras": "https://github.com/keras-team/keras"}

HEAD = "row Keras Python backend tests passed xfailed skipped failed date".split()
ALIGNED = ["---"] * 5 + ["---:"] * 4 + ["---"]
RESULTS = HEAD[5:9]


@functools.cache
def interpreter(version):
    """Return a Python of this minor version from the path or from pyenv, or None."""
    pyenv = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    of_pyenv = sorted(glob.glob(f"{pyenv}/versions/{version}.*/bin/python"))
    for found in (shutil.which(f"python{version}"), *of_pyenv):
        if found:
            code = "import sys; print('%d.%d' % sys.version_info[:2])"
            told = subprocess.run([found, "-c", code], capture_output=True, text=True)
            if (
                told.stdout.strip() == version
            ):  # pyenv's shims exist for versions that are not active
                return found
    return None


def environment(name):
    """Make or renew the row's environment, and return its Python."""
    python, pins = ROWS[name]
    folder = ENVIRONMENTS / name
    own = folder / "bin" / "python"
    if not own.exists():
        subprocess.run([interpreter(python), "-m", "venv", folder], check=True)
    kept = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.partition("==")[0] not in pins
    ]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join([*kept, *map(requirement, pins.items())]) + "\n")
    # All three backends, whichever is tested: the others serve as oracles.
    wanted = ["-c", constraints, "-e", f"{ROOT}[test]", *BACKENDS.values()]
    subprocess.run([own, "-m", "pip", "install", "-q", *wanted], check=True)
    # Comes with PyTorch's CUDA build, which does without it on a CPU; loaded after JAX it crashes.
    subprocess.run([own, "-m", "pip", "uninstall", "-q", "-y", "triton"], check=True)
    return own


def requirement(pin):
    """Return what tells pip to install this package at this version, or at this commit of its source."""
    package, version = pin
    return (
        f"{package}=={version}"
        if "." in version
        else f"{package} @ git+{SOURCE[package]}@{version}"
    )


def version_of(own, package):
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run(
        [own, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def run(own, backend, subset, jobs):
    """Run the tests, show their output, and return the counts of pytest's last line."""
    command = [own, "-m", "pytest", "-n", jobs, "-p", "no:cacheprovider", *shlex.split(subset)]
    variables = {"KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, text=True
    )
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    status = process.wait()
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (\w+)", last.rpartition(" in ")[0])}
    failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    failed += counts.get("xpassed", 0) if status and not failed else 0
    if status not in (0, 1) or bool(status) != bool(failed) or not counts.get("passed"):
        raise SystemExit(f"pytest ended with status {status} and no result: {last}")
    return counts | {"failed": failed}


def read_table():
    """Return the lines of the page, by row and backend without its version."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return {key_of(row): row for row in cells[2:]}


def key_of(row):
    return row[0], row[3].partition(" ")[0]


def write_table(table):
    order = [(name, backend) for name in ROWS for backend in BACKENDS]
    rows = [HEAD, ALIGNED, *(table[key] for key in order if key in table)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    before = PAGE.read_text().partition("| " + HEAD[0])[0]
    PAGE.write_text(before + "\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--subset", default="", help="arguments for pytest; the table tells them")
    parser.add_argument("--jobs", default="2", help="test processes")
    args = parser.parse_args()
    outcomes = []
    for name in args.rows:
        python, pins = ROWS[name]
        if interpreter(python) is None:
            outcomes.append((False, f"{name}: NOT RUN, there is no python{python}"))
            continue
        own = environment(name)
        keras = version_of(own, "keras")
        if "." not in pins.get("keras", "."):
            keras += f" at {pins['keras'][:10]}"
        for backend in args.backends:
            print(f"== {name}, {backend}", flush=True)
            counts = run(own, backend, args.subset, args.jobs)
            date = datetime.date.today().isoformat()
            shown = f"{backend} {version_of(own, BACKENDS[backend])}"
            tests = f"`{args.subset}`" if args.subset else "all"
            numbers = [str(counts.get(what, 0)) for what in RESULTS]
            row = [name, keras, python, shown, tests, *numbers, date]
            write_table(read_table() | {key_of(row): row})
            result = "FAILED" if counts["failed"] else "ok"
            outcomes.append((not counts["failed"], f"{name}, {backend}: {result}"))
    print("\n".join(text for _, text in outcomes))
    sys.exit(not all(fine for fine, _ in outcomes))


if __name__ == "__main__":
    main()
