"""Each notebook runs under one of the backends, and is stored as it ran: in order, whole, with its pictures."""

import re
import sys
from pathlib import Path

import keras
import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
STORED = sorted(FOLDER.glob("*.ipynb"))
# Each takes half a minute, so that none runs under all; together they meet each backend.
RUN = {
    "jax": ["1_quick_start", "4_amsgrad", "7_training_goes_wrong"],
    "tensorflow": ["2_from_pytorch", "5_half_precision"],
    "torch": ["3_parameter_groups", "6_speed", "8_eight_bits"],
}

sys.path.insert(0, str(FOLDER))

import run  # noqa: E402


def outputs(notebook):
    return [o for cell in notebook.cells for o in cell.get("outputs", [])]


def pictures(notebook):
    return [o.data["image/png"] for o in outputs(notebook) if "image/png" in o.get("data", {})]


def test_each_notebook_runs_somewhere():
    assert sorted(name for names in RUN.values() for name in names) == [p.stem for p in STORED]


@pytest.mark.long
@pytest.mark.parametrize("name", RUN[keras.backend.backend()])
def test_runs(name, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", keras.backend.backend())
    # Of this suite's environment; here programs run longer than they compile.
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
    path = FOLDER / f"{name}.ipynb"
    stored, done = nbformat.read(path, as_version=4), run.execute(path)
    assert len(pictures(done)) == len(pictures(stored))


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_is_stored_as_it_ran(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert pictures(notebook)
    assert path.stat().st_size < 400_000
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        text = output.get("text") or output.data.get("text/plain", "")
        assert not re.search(r"(?<![\w.:/])/\w+/|[A-Z]:\\|0x[0-9a-f]{6}", text), text


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_names_no_backend_in_its_code(path):
    cells = nbformat.read(path, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    named = {name for name in ("jax", "tensorflow", "torch") if re.search(rf"\b{name}\b", code)}
    assert named == ({"torch"} if path.stem == "2_from_pytorch" else set())
