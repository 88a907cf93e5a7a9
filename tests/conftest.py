"""The suite runs under the backend that KERAS_BACKEND names; CI runs it once per backend.

A backend that was asked for and is missing fails the run: `import keras` below raises. NumPy,
torch, optax and keras itself serve as oracles whatever the backend is.
"""

import fnmatch
import importlib.metadata
import os
import re

# The frameworks read these on import: no start-up notices, and no device memory for an oracle.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# The suite compiles hundreds of small programs and runs each for milliseconds.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Compile for the CPU on one thread, with the older emitters where XLA has a choice: it takes a quarter of the time. XLA
# aborts on an unknown flag.
flags = ["--xla_cpu_parallel_codegen_split_count=1"]
jaxlib = [int(n) for n in re.findall(r"\d+", importlib.metadata.version("jaxlib"))]
if [0, 5, 3] <= jaxlib < [0, 11, 1]:
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(flags))

import keras
import numpy as np
import pytest

from support.helpers import random_problem


def pytest_configure(config):
    asked = os.environ.get("KERAS_BACKEND")
    if asked and keras.backend.backend() != asked:
        raise pytest.UsageError(
            f"KERAS_BACKEND={asked}, but keras was imported with {keras.backend.backend()}."
        )
    # Keras's convert_to_numpy, for torch's tensors under NumPy 2.
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation:DeprecationWarning")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config, items):
    """Mark as long each parameter of a test that its mark `short` does not name."""
    marked, kept = set(), set()
    for item in items:
        for mark in item.iter_markers("short"):
            test = item.nodeid.partition("[")[0]
            marked.add(test)
            if any(fnmatch.fnmatchcase(item.callspec.id, pattern) for pattern in mark.args):
                kept.add(test)
            else:
                item.add_marker("long")
    asked_for_one = any("::" in argument for argument in config.args)
    if marked != kept and not asked_for_one:
        raise pytest.UsageError(f"The mark `short` keeps no parameter of {sorted(marked - kept)}.")


def pytest_report_header(config):
    return f"keras {keras.__version__}, backend: {keras.backend.backend()}"


@pytest.fixture
def rng():
    return np.random.default_rng(2015)


@pytest.fixture
def problem(rng):
    """Start values and 200 steps of gradients, new for each test."""
    return random_problem(rng, steps=200)


@pytest.fixture(autouse=True)
def restore_keras_state():
    """Undo what a test does to Keras's global settings, so that tests pass in any order."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    yield
    keras.distribution.set_distribution(None)
    if keras.config.floatx() != floatx or keras.config.dtype_policy() != policy:
        keras.utils.clear_session()
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)
