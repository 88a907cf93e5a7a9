"""The tests that Keras ships for its Adam, AdamW and optimizers, with ours in their place."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import keras.src.optimizers
import pytest

from support.steps import KERAS

KERAS_TESTS = pathlib.Path(keras.src.optimizers.__file__).parent
# Two processes of about the same length.
FILES = [
    ("optimizer_test.py", "optimizer_sparse_test.py"),
    ("adam_test.py", "adamw_test.py", "loss_scale_optimizer_test.py", "multi_optimizer_test.py"),
]


@pytest.mark.short("adam_test.py+*")
@pytest.mark.skipif(KERAS < (3, 15), reason="Keras before 3.15 was packed without its tests")
@pytest.mark.parametrize("files", FILES, ids="+".join)
def test_passes(files, tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = requires_trainable_backend\n")
    environment = {
        **os.environ,
        "KERAS_BACKEND": keras.backend.backend(),
        "KERAS_SUITE_REPORT": str(tmp_path / "report.json"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    options = [
        "-p",
        "support.keras_suite_plugin",
        "-p",
        "no:cacheprovider",
        "-c",
        tmp_path / "pytest.ini",
    ]
    options += ["--rootdir", KERAS_TESTS, "-q", "-W", "ignore", "--tb", "short"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(KERAS_TESTS / file for file in files)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    for file in files:
        if file == "optimizer_sparse_test.py" and keras.backend.backend() == "torch":
            assert set(report[file]) == {"skipped"}  # Keras has no sparse tensors there.
        else:
            # Passed, and by ours: steps that the plugin counted.
            assert report[file]["passed"] > 0, done.stdout
            assert report[file]["updates"] > 0, done.stdout
