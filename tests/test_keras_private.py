"""The private hooks of Keras that this package replaces or calls: if one is gone, the import must fail."""

import importlib.util
import inspect
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import types

import keras
import pytest
from keras.src.backend.common import stateless_scope, variables
from keras.src.optimizers import base_optimizer
from keras.src.saving import saving_lib

import keras_adam
from keras_adam import keras_private
from keras_adam.keras_private import ATTRIBUTES, HOOKS, PYTORCH, SUPPORTED

PYPROJECT = pathlib.Path(__file__).parent.parent / "pyproject.toml"


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
    assert replaced
    # Public and documented, with no parameters to rely on.
    assert replaced - set(HOOKS) <= {"get_config"}


@pytest.mark.parametrize(
    "name", [n for n, c in ATTRIBUTES.items() if c is keras.optimizers.Optimizer]
)
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


def test_import_says_which_hook_is_gone_and_which_keras_serves():
    base = "from keras.src.optimizers.base_optimizer import BaseOptimizer"
    code = f"import keras\n{base}\ndel BaseOptimizer._clip_gradients\nimport keras_adam"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: keras_adam needs Keras {SUPPORTED}, whose insides it relies on: "
        f"keras.optimizers.Optimizer has no `_clip_gradients`. Received: keras {keras.__version__}"
    )


def refused(why):
    return pytest.raises(ImportError, match=f"{re.escape(why)}. Received: keras ")


@pytest.mark.parametrize(
    ("hook", "found"),
    [
        (lambda self, v: 0, "self, v"),
        (lambda self, variable, key: 0, "self, variable, key"),
        (lambda self, variable, name=None, *, key: 0, "self, variable, name, key"),
    ],
)
def test_a_hook_that_takes_other_parameters_is_refused(monkeypatch, hook, found):
    monkeypatch.setattr(keras.optimizers.Optimizer, "_get_variable_index", hook)
    with refused(f"Optimizer._get_variable_index takes ({found}) instead of (self, variable)"):
        keras_private.check()


def test_a_hook_may_take_further_parameters_that_can_be_left_out(monkeypatch):
    def hook(self, variable, key=None, *args, name=None, **kwargs): ...

    monkeypatch.setattr(keras.optimizers.Optimizer, "_get_variable_index", hook)
    keras_private.check()


def test_a_hook_that_another_library_has_wrapped_is_let_pass(monkeypatch):
    """A wrapper that takes any arguments does not show which it needs."""
    hook = keras.optimizers.Optimizer.apply_gradients

    def wrapper(*args, **kwargs):
        return hook(*args, **kwargs)

    monkeypatch.setattr(keras.optimizers.Optimizer, "apply_gradients", wrapper)
    keras_private.check()


def changed_copy(module, old, new):
    """Return a copy of one of Keras's modules with a changed source; Keras itself stays as it is."""
    source = inspect.getsource(module)
    assert old in source
    source = source.replace("@keras_export", "@(lambda *names: lambda x: x)").replace(old, new)
    copy = types.ModuleType(module.__name__)
    exec(compile(source, module.__file__, "exec"), vars(copy))
    return copy


@pytest.mark.parametrize(
    ("module", "owner", "name"),
    [
        (base_optimizer, "BaseOptimizer", "_iterations"),
        (base_optimizer, "BaseOptimizer", "_learning_rate"),
        (base_optimizer, "BaseOptimizer", "_trainable_variables"),
        (base_optimizer, "BaseOptimizer", "_trainable_variables_indices"),
        (saving_lib, "H5IOStore", "_h5_entry_group"),
    ],
)
def test_an_attribute_of_another_name_is_refused(monkeypatch, module, owner, name):
    copy = changed_copy(module, name, f"_renamed{name}")
    assert name in ATTRIBUTES
    monkeypatch.setitem(ATTRIBUTES, name, getattr(copy, owner))
    with refused(f"no method of {module.__name__}.{owner} names `{name}`"):
        keras_private.check()


def test_another_key_of_autocast_scopes_is_refused(monkeypatch):
    copy = changed_copy(variables, '"autocast_scope"', '"dtype_scope"')
    monkeypatch.setattr(keras_private, "variables", copy)
    with refused("an AutocastScope is not kept as the global attribute `autocast_scope`"):
        keras_private.check()


def test_another_name_of_the_outer_stateless_scope_is_refused(monkeypatch):
    copy = changed_copy(stateless_scope, "original_scope", "outer_scope")
    monkeypatch.setattr(keras, "StatelessScope", copy.StatelessScope)
    with refused("a StatelessScope does not keep the one around it as `original_scope`"):
        keras_private.check()
    assert not stateless_scope.in_stateless_scope()


@pytest.mark.parametrize("kernel", ["_fused_adam_", "_fused_adamw_"])
def test_a_pytorch_without_a_fused_kernel_is_refused(monkeypatch, kernel):
    import torch

    monkeypatch.delattr(torch, kernel)
    path = pathlib.Path(keras_adam.__file__).parent / "engines" / "torch_kernel.py"
    spec = importlib.util.spec_from_file_location("copy_of_backend", path)
    lacking = f"needs PyTorch {PYTORCH}, .* 'torch' has no attribute '{kernel}'. Received: torch "
    with pytest.raises(ImportError, match=lacking):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_supported_versions_are_those_that_are_installed():
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    assert f"keras{SUPPORTED}" in project["dependencies"]
    assert project["optional-dependencies"]["torch"] == [f"torch{PYTORCH}"]
