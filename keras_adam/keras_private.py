"""The parts of Keras's insides that this package relies on, checked when it is imported."""

import contextlib
import inspect
from typing import Any, NoReturn

import keras
from keras.src.backend.common import global_state, variables
from keras.src.saving import saving_lib

# As in pyproject.toml.
SUPPORTED = ">=3.10,<4"
PYTORCH = ">=2.4"

_ANY_NUMBER = [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]

# Each method of `keras.optimizers.Optimizer` that is replaced or called, with the parameters relied on. Public ones
# are replaced by methods with the same parameters.
HOOKS = {
    "_backend_update_step": ("self", "grads", "trainable_variables", "learning_rate"),
    "_check_super_called": ("self",),
    "_check_variables_are_known": ("self", "variables"),
    "_clip_gradients": ("self", "grads"),
    "_filter_empty_gradients": ("self", "grads", "vars"),
    "_get_current_learning_rate": ("self",),
    "_get_variable_index": ("self", "variable"),
    "_overwrite_model_variables_with_average_value": ("self", "trainable_variables"),
    "_overwrite_variables_directly_with_gradients": ("self", "grads", "vars"),
    "_overwrite_variable_with_gradient": ("self", "variable"),
    "_update_model_variables_moving_average": ("self", "trainable_variables"),
    "_use_weight_decay": ("self", "variable"),
    "_var_key": ("self", "variable"),
    "add_optimizer_variables": ("self", "trainable_variables", "name", "initializer"),
    "add_variable": ("self", "shape", "initializer", "dtype"),
    "add_variable_from_reference": ("self", "reference_variable", "name", "initializer"),
    "apply": ("self", "grads", "trainable_variables"),
    "apply_gradients": ("self", "grads_and_vars"),
    "assign": ("self", "variable", "value"),
    "build": ("self", "variables"),
    "exclude_from_weight_decay": ("self", "var_list", "var_names"),
    "finalize_variable_values": ("self", "var_list"),
    "load_own_variables": ("self", "store"),
    "save_own_variables": ("self", "store"),
    "scale_loss": ("self", "loss"),
    "set_weights": ("self", "weights"),
    "stateless_apply": ("self", "optimizer_variables", "grads", "trainable_variables"),
    "update_step": ("self", "gradient", "variable", "learning_rate"),
}
# The hooks that a step calls. If a subclass overrides one, each step must call it.
STEP_HOOKS = (
    "_backend_update_step",
    "_clip_gradients",
    "_filter_empty_gradients",
    "_get_current_learning_rate",
    "_overwrite_model_variables_with_average_value",
    "_overwrite_variables_directly_with_gradients",
    "_update_model_variables_moving_average",
    "_use_weight_decay",
    "assign",
    "assign_sub",
    "update_step",
)
if keras.backend.backend() == "tensorflow":  # what `tf.train.Checkpoint` asks of an object
    HOOKS |= {
        "_lookup_dependency": ("self", "name", "cached_dependencies"),
        "_track_trackable": ("self", "trackable", "name", "overwrite"),
        "_trackable_children": ("self", "save_type"),
    }

# Attributes that Keras's methods set and this package reads.
ATTRIBUTES = {
    "_iterations": keras.optimizers.Optimizer,
    "_learning_rate": keras.optimizers.Optimizer,
    "_trainable_variables": keras.optimizers.Optimizer,
    "_trainable_variables_indices": keras.optimizers.Optimizer,
    "_h5_entry_group": saving_lib.H5IOStore,
}


def autocast_scope() -> Any:
    """Return the scope in which a layer of mixed precision casts variables, or None."""
    return global_state.get_global_attribute("autocast_scope")


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer in a `LossScaleOptimizer`; any other one itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


@contextlib.contextmanager
def without_autocast():
    """Let variables return their own value and dtype, within a layer of mixed precision too.

    `AutocastScope(None)` is no help: under it, each variable says that its dtype is `keras.config.floatx()`.
    """
    scope = global_state.get_global_attribute("autocast_scope")
    if scope is None:
        yield
        return
    global_state.set_global_attribute("autocast_scope", None)
    try:
        yield
    finally:
        global_state.set_global_attribute("autocast_scope", scope)


def check() -> None:
    """Raise an ImportError if something relied on is gone, or means something else."""
    _check_hooks()
    _check_attributes()
    _check_scopes()


def _check_hooks() -> None:
    for name, parameters in HOOKS.items():
        hook = getattr(keras.optimizers.Optimizer, name, None)
        if hook is None:
            _refuse(f"keras.optimizers.Optimizer has no `{name}`")
        actual = inspect.signature(hook).parameters
        if [x.kind for x in actual.values()] == _ANY_NUMBER:
            continue  # a wrapper of another library, which takes anything
        names, further = tuple(actual), list(actual.values())[len(parameters) :]
        if names[: len(parameters)] != parameters or any(map(_is_required, further)):
            _refuse(
                f"keras.optimizers.Optimizer.{name} takes ({', '.join(names)}) instead of ({', '.join(parameters)})"
            )


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in _ANY_NUMBER


def _check_attributes() -> None:
    # Look for the names in the compiled methods. An instance would show more, but making its variables would start
    # the backend's devices at import.
    for name, owner in ATTRIBUTES.items():
        methods = (x for c in owner.__mro__ for x in vars(c).values() if inspect.isfunction(x))
        if not any(name in inspect.unwrap(m).__code__.co_names for m in methods):
            _refuse(f"no method of {owner.__module__}.{owner.__qualname__} names `{name}`")


def _check_scopes() -> None:
    with variables.AutocastScope("float16"), without_autocast():
        if variables.get_autocast_scope() is not None:
            _refuse("an AutocastScope is not kept as the global attribute `autocast_scope`")
    # With initialization, the outermost scope would initialize the variables that wait for it.
    outer, inner = (keras.StatelessScope(initialize_variables=False) for _ in range(2))
    with outer, inner:
        if getattr(inner, "original_scope", None) is not outer:
            _refuse("a StatelessScope does not keep the one around it as `original_scope`")


def _refuse(why: str) -> NoReturn:
    raise ImportError(
        f"keras_adam needs Keras {SUPPORTED}, whose insides it relies on: {why}. "
        f"Received: keras {keras.__version__}"
    )
