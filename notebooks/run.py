"""Execute notebooks in place: `KERAS_BACKEND=jax python notebooks/run.py [notebook ...]`; by default all of them."""

import base64
import sys
from pathlib import Path

import nbclient
import nbformat

HERE = Path(__file__).parent
PICTURES = HERE.parent / "docs" / "pictures"  # of cells whose metadata names a picture


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


def write_pictures(notebook: nbformat.NotebookNode) -> None:
    """Write the pictures that pages of the site show, too."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []) if "picture" in cell.metadata else []:
            if "image/png" in output.get("data", {}):
                path = PICTURES / f"{cell.metadata['picture']}.png"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(base64.b64decode(output.data["image/png"]))


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        print(path.name)
        done = execute(path)
        nbformat.write(done, path)
        write_pictures(done)
