"""A pytest plugin that puts ours in Adam's place before Keras's own tests are imported.

For test_keras_suite.py, which runs it in a process of its own: Keras is not the same afterwards.
"""

import collections
import inspect
import json
import os
import re
import sys
import types

import keras
import keras.src.optimizers as originals
import pytest

import keras_adam

if keras.backend.backend() == "torch":
    # These derive from Keras's Adam when they are first imported, which must be before any change.
    import keras.src.backend.torch.optimizers.torch_adamw

# Tests that an Adam, or ours, is not meant to pass.
LEFT_OUT = {
    # Compares the text of an error: ours has the one form of all our errors, see test_errors.py.
    "AdamWTest::test_weight_decay_is_none",
    # Compare with what SGD computes; the rest of this class fits any optimizer inside.
    "LossScaleOptimizerTest::test_apply_with_no_vars",
    "LossScaleOptimizerTest::test_finite_step_stateful",
    "LossScaleOptimizerTest::test_finite_step_stateless",
    "LossScaleOptimizerTest::test_finite_step_with_inner_loss_scale_stateful",
    "LossScaleOptimizerTest::test_finite_step_with_inner_loss_scale_stateless",
}
OURS = (keras_adam.Adam, keras_adam.AdamW)

report = collections.defaultdict(collections.Counter)


def current_file():
    return os.environ["PYTEST_CURRENT_TEST"].partition("::")[0]


def count_updates(cls):
    apply = cls.apply

    def counting_apply(self, *args, **kwargs):
        report[current_file()]["updates"] += 1
        return apply(self, *args, **kwargs)

    cls.apply = counting_apply


def get(identifier):
    optimizer = originals.get(identifier)
    if isinstance(identifier, dict) and not isinstance(optimizer, OURS):
        pytest.skip("a test of another optimizer, and a slow one")
    return optimizer


def in_place_of_sgd(*args, momentum=None, nesterov=None, **kwargs):
    return keras_adam.Adam(*args, **kwargs)


count_updates(keras_adam.Adam)
originals.adam.Adam, originals.adamw.AdamW = OURS
originals.ALL_OBJECTS_DICT.update(adam=keras_adam.Adam, adamw=keras_adam.AdamW)
# What the tests import as `optimizers`. The true module stays as it is: with ours as its Adam,
# Keras's torch backend would make its own Adam whenever ours is asked for.
stand_in = types.ModuleType(originals.__name__)
vars(stand_in).update(vars(originals), Adam=OURS[0], AdamW=OURS[1], get=get)
sys.modules["keras.src"].optimizers = stand_in


def is_left_out(item):
    cls, name = item.cls.__name__, item.name
    if cls == "OptimizerSparseTest":  # which tries sparse gradients on every optimizer of Keras
        return not re.search("_adamw?(_|$)", name)
    if cls in ("OptimizerTest", "MultiOptimizerTest"):  # where many a test takes SGD
        return "adam" not in inspect.getsource(inspect.unwrap(item.function)).lower()
    return f"{cls}::{name}" in LEFT_OUT


def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if is_left_out(item)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    for item in items:
        if item.cls.__name__ == "LossScaleOptimizerTest":
            item.module.SGD = in_place_of_sgd


def pytest_runtest_logreport(report: pytest.TestReport, counts=report):
    if report.when == "call" or report.outcome != "passed":
        counts[report.nodeid.partition("::")[0]][report.outcome] += 1


def pytest_sessionfinish():
    with open(os.environ["KERAS_SUITE_REPORT"], "w") as file:
        json.dump(report, file)
