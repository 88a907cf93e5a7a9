"""Every example runs: the code blocks of README.md and docs/, and the docstrings' `>>>`.

The blocks of a page run in order and share their names, in an empty directory: ```python is executed, ```pycon is a
doctest, whose output is compared. Commands for a shell are ```console, and do not run. libraries.py runs the page on
other libraries, with these installed.
"""

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import keras_adam
import libraries
from support.steps import BACKEND, KERAS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted({*ROOT.glob("docs/**/*.md")} - {libraries.PAGE})]
BLOCK = re.compile(r"^```(python|pycon)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)

MODULES = [
    module.name
    for module in pkgutil.walk_packages(keras_adam.__path__, "keras_adam.")
    if not module.name.startswith("keras_adam.engines.")  # two of three are not to be imported
]
EXAMPLES = {
    example.name: example
    for name in ["keras_adam", *MODULES]
    for example in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
    if example.examples
}


def blocks(page):
    """Return (language, code, line) of each block that must run."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        yield found[1], found[2], text.count("\n", 0, found.start(2))


def run_doctest(example):
    report = []
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(example, out=report.append, clear_globs=False)
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(blocks(p))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for language, code, line in blocks(page):
        if language == "pycon":
            example = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line)
            example.globs = names  # not a copy: what a block defines, the next one knows
            run_doctest(example)
        else:
            exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.mark.long
@pytest.mark.skipif(KERAS != (3, 15), reason="the page is about Keras 3.15.1")
def test_reproductions_of_faults(tmp_path):
    """Each row shows that Keras's outcome is not ours. The blocks in boxes run too, in a process of their own."""
    page = (ROOT / "docs" / "keras_faults.md").read_text(encoding="utf-8")
    in_boxes = re.compile(r"^(?:    )?```python\n(.*?)^(?:    )?```$", re.DOTALL | re.MULTILINE)
    script = "\n".join(textwrap.dedent(found[1]) for found in in_boxes.finditer(page))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes: dict[str, dict[str, list[str]]] = {}
    for row, of, outcome in re.findall(r"^row (\w+), (\w+): (.*)$", done.stdout, re.MULTILINE):
        outcomes.setdefault(row, {}).setdefault(of, []).append(outcome)
    rows = re.findall(r"^\| (\d+) \|.*\| ([\w, ]+) \| [^|]+ \|$", page, re.MULTILINE)
    assert [int(row) for row, _ in rows] == list(range(1, 35))
    here = [row for row, backends in rows if backends == "all" or BACKEND in backends.lower()]
    for row in here:
        assert outcomes[row]["Keras"] != outcomes[row]["ours"], f"row {row}: {outcomes[row]}"
    raise_ours = {row for row in here if any("Error: " in x for x in outcomes[row]["ours"])}
    assert raise_ours - {"17"} == {"18", "19", "21", "22", "32"}  # 17 is asked or refused


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_doctest(EXAMPLES[name])


def test_page_of_other_libraries():
    """`make test-libraries` runs its blocks. Each library has one, and the version that the page names."""
    examples = libraries.examples()
    assert [(code, line) for _, code, line in examples] == [x[1:] for x in blocks(libraries.PAGE)]
    assert {library for library, _, _ in examples} == set(libraries.LIBRARIES)
    for _, code, line in examples:
        assert "keras_adam.Adam" in code
        compile("\n" * line + code, str(libraries.PAGE), "exec")
    page = libraries.PAGE.read_text(encoding="utf-8")
    pins = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    named = dict(re.findall(r"^\| \[([\w-]+)\]\(#[\w-]+\) \| (\S+) \|", page, re.MULTILINE))
    assert named == {name: pins[name] for name in libraries.LIBRARIES.values()}
    assert f"Keras {pins['keras']}" in page


def test_there_are_examples():
    languages = {language for page in PAGES for language, _, _ in blocks(page)}
    assert languages == {"python", "pycon"}
    assert {"keras_adam.optimizer.Adam", "keras_adam.optimizer.AdamW"} <= set(EXAMPLES)
