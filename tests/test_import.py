"""`import keras_adam` brings nothing along but itself: no other framework, and nothing that would take time."""

import json
import os
import subprocess
import sys

import keras

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
    # Nor more of what keras has begun to import: each module but the package's own takes time.
    assert {m.partition(".")[0] for m in modules} == {"keras_adam"}
    engines = {m for m in modules if m.startswith("keras_adam.engines.")}
    names = {m.rpartition(".")[2].partition("_")[0] for m in engines}
    assert names == {"base", BACKEND}
