"""The private hooks of Keras that this package replaces or calls: if one goes, that must be loud."""

import inspect
import os
import pathlib
import subprocess
import sys
import tomllib

import keras
import pytest

import keras_adam
from keras_adam.backends import Backend
from keras_adam.seams import HOOKS, SUPPORTED

ATTRIBUTES = [
    "_iterations",
    "_learning_rate",
    "_trainable_variables",
    "_trainable_variables_indices",
]


@pytest.mark.parametrize("hook", HOOKS)
def test_keras_has_the_hook_with_the_parameters_relied_on(hook):
    parameters = list(inspect.signature(getattr(keras.optimizers.Optimizer, hook)).parameters)
    assert tuple(parameters[: len(HOOKS[hook])]) == HOOKS[hook]


def test_every_hook_that_is_replaced_is_listed():
    keras_names = {n for c in keras.optimizers.Optimizer.__mro__[:-1] for n in vars(c)}
    ours = [c for c in keras_adam.Adam.__mro__ if c.__module__.startswith("keras_adam")]
    replaced = {
        name
        for c in ours
        for name, value in vars(c).items()
        if inspect.isfunction(value) and name in keras_names and not name.startswith("__")
    }
    assert Backend in ours
    # Public and documented, with no parameters to rely on.
    assert replaced - set(HOOKS) <= {"get_config"}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_keras_has_the_attribute(name):
    optimizer = keras.optimizers.Adam()
    optimizer.build([keras.Variable([1.0])])
    assert hasattr(optimizer, name)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="relied on there alone")
def test_keras_has_what_an_eager_step_on_jax_relies_on():
    from keras.src.backend.common.stateless_scope import in_stateless_scope

    variable = keras.Variable([1.0])
    with keras.StatelessScope():
        assert in_stateless_scope()
    assert not in_stateless_scope()
    variable._direct_assign(keras.ops.array([2.0]))
    assert float(variable._value[0]) == 2.0


CHANGES = {
    "del Optimizer._clip_gradients": "keras.optimizers.Optimizer has no `_clip_gradients`",
    # One that no backend's own optimizer replaces.
    "Optimizer._get_variable_index = lambda self, v: 0": (
        "keras.optimizers.Optimizer._get_variable_index takes (self, v) instead of (self, variable)"
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_import_says_which_hook_is_gone_and_which_keras_serves(change):
    base = "from keras.src.optimizers.base_optimizer import BaseOptimizer as Optimizer"
    code = f"import keras\n{base}\n{change}\nimport keras_adam"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: keras_adam needs Keras {SUPPORTED}, whose insides it relies on: {CHANGES[change]}. "
        f"Received: keras {keras.__version__}"
    )


def test_supported_versions_are_those_that_are_installed():
    pyproject = pathlib.Path(__file__).parent.parent / "pyproject.toml"
    assert f"keras{SUPPORTED}" in tomllib.loads(pyproject.read_text())["project"]["dependencies"]
