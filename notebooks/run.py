"""Execute notebooks in place: `KERAS_BACKEND=jax python notebooks/run.py [notebook ...]`; by default all of them."""

import sys
from pathlib import Path

import nbclient
import nbformat

HERE = Path(__file__).parent


def execute(path: Path) -> nbformat.NotebookNode:
    """Run a notebook in its own folder, by this Python, and return it; an error in a cell raises."""
    notebook = nbformat.read(path, as_version=4)
    # Without the times of cells, which would differ in each run.
    options = {"kernel_name": "python3", "timeout": 300, "record_timing": False}
    nbclient.NotebookClient(
        notebook, **options, resources={"metadata": {"path": str(HERE)}}
    ).execute()
    notebook.metadata.language_info.pop("version", None)
    return notebook


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        print(path.name)
        nbformat.write(execute(path), path)
