"""The private hooks of Keras that this package replaces or calls: if one goes, that must be loud."""

import inspect

import keras
import pytest

import keras_adam
from keras_adam.backends import Backend

# Each hook with the parameters that are relied on.
HOOKS = {
    "_backend_apply_gradients": ["self", "grads", "trainable_variables"],
    "_backend_increment_gradient_accumulators": ["self", "grads", "acc_grads"],
    "_backend_update_step": ["self", "grads", "trainable_variables", "learning_rate"],
    "_check_super_called": ["self"],
    "_check_variables_are_known": ["self", "variables"],
    "_clip_gradients": ["self", "grads"],
    "_filter_empty_gradients": ["self", "grads", "vars"],
    "_get_current_learning_rate": ["self"],
    "_get_variable_index": ["self", "variable"],
    "_overwrite_model_variables_with_average_value": ["self", "trainable_variables"],
    "_overwrite_variables_directly_with_gradients": ["self", "grads", "vars"],
    "_overwrite_variable_with_gradient": ["self", "variable"],
    "_update_model_variables_moving_average": ["self", "trainable_variables"],
    "_use_weight_decay": ["self", "variable"],
    "_var_key": ["self", "variable"],
    "add_optimizer_variables": ["self", "trainable_variables", "name", "initializer"],
    "add_variable": ["self", "shape", "initializer", "dtype"],
    "add_variable_from_reference": ["self", "reference_variable", "name", "initializer"],
    "apply": ["self", "grads", "trainable_variables"],
    "apply_gradients": ["self", "grads_and_vars"],
    "assign": ["self", "variable", "value"],
    "build": ["self", "variables"],
    "exclude_from_weight_decay": ["self", "var_list", "var_names"],
    "finalize_variable_values": ["self", "var_list"],
    "load_own_variables": ["self", "store"],
    "save_own_variables": ["self", "store"],
    "scale_loss": ["self", "loss"],
    "set_weights": ["self", "weights"],
    "stateless_apply": ["self", "optimizer_variables", "grads", "trainable_variables"],
    "update_step": ["self", "gradient", "variable", "learning_rate"],
}
ATTRIBUTES = [
    "_iterations",
    "_learning_rate",
    "_trainable_variables",
    "_trainable_variables_indices",
]


@pytest.mark.parametrize("hook", HOOKS)
def test_keras_has_the_hook_with_the_parameters_relied_on(hook):
    parameters = list(inspect.signature(getattr(keras.optimizers.Optimizer, hook)).parameters)
    assert parameters[: len(HOOKS[hook])] == HOOKS[hook]


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
