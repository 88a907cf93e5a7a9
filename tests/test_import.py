"""`import keras_adam` imports no other framework, and nothing that would take time."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import keras

import keras_adam

BACKEND = keras.backend.backend()

# What keras_adam adds to what keras imports: top-level names, and modules.
CODE = """
import json, sys
import keras
def names():
    return {name.partition(".")[0] for name in sys.modules}
before, modules = names(), set(sys.modules)
import keras_adam
print(json.dumps([sorted(names() - before), sorted(set(sys.modules) - modules)]))
"""


def test_nothing_but_the_package_is_imported():
    environment = {
        **os.environ,
        "KERAS_BACKEND": BACKEND,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # Keras itself imports JAX where it finds it, for a callback's sake.
    added, modules = json.loads(done.stdout.splitlines()[-1])
    assert added == ["keras_adam"]
    # Nor any further module of what keras imports: each takes time.
    assert {m.partition(".")[0] for m in modules} == {"keras_adam"}
    engines = {m for m in modules if m.startswith("keras_adam.engines.")}
    names = {m.rpartition(".")[2].partition("_")[0] for m in engines}
    assert names == {"base", BACKEND}


def test_a_module_imports_only_from_modules_below_it():
    """The order is that of the table in docs/design.md; `engines/` is one of its rows."""
    package = pathlib.Path(keras_adam.__file__).parent
    table = (package.parent / "docs" / "design.md").read_text().partition("## The house")[2]
    rows = [
        row.split("|")[1] for row in table.partition("\n### ")[0].splitlines() if row[:3] == "| `"
    ]
    rank = {name: i for i, row in enumerate(rows) for name in re.findall(r"`(\w+)(?:\.py|/)`", row)}
    found = {p.relative_to(package).parts[0].removesuffix(".py") for p in package.rglob("*.py")}
    assert set(rank) == found - {"__init__"}
    upwards = [
        (name, imported)
        for path in package.rglob("*.py")
        if (name := path.relative_to(package).parts[0].removesuffix(".py")) != "__init__"
        for imported in _imported_from(path)
        if rank[imported] < rank[name]
    ]
    assert not upwards


def _imported_from(path):
    """Return the package's modules that one of its files imports; `engines.base` counts as `engines`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keras_adam"):
            names = [node.module.removeprefix("keras_adam.")]
            if node.module == "keras_adam":
                names = [alias.name for alias in node.names]
            yield from (name.partition(".")[0] for name in names)
