"""Whether a state tree of Keras, from `model.get_state_tree()`, fits a model, which Keras does not check."""

from typing import Any

import numpy as np

_COLLECTIONS = ("trainable_variables", "non_trainable_variables", "optimizer_variables")


def check_state_tree(model, state_tree: dict[str, Any]) -> None:
    """Raise a ValueError if `model.set_state_tree(state_tree)` would pass over anything in silence.

    Keras assigns the values whose paths the model has, and passes over all others. An optimizer with another name or
    other options keeps its state and its count of iterations. Call this before `set_state_tree`. Nothing is assigned.

    Args:
        model: The model, compiled, and with its optimizer built: `model.optimizer.build(model.trainable_variables)`.
        state_tree: What `model.get_state_tree()` returned, or what Orbax read of it. Metrics are not checked, as they
            begin anew in each epoch. A collection that the tree lacks is not checked either, such as the optimizer's
            if weights alone were saved.

    Raises:
        TypeError: If `state_tree` is not a dictionary.
        ValueError: If a path is missing in the tree or in the model, or a value has another shape.

    Examples:
        >>> import keras, keras_adam
        >>> def make_model(**options):
        ...     model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="dense")], name="model")
        ...     model.compile(keras_adam.Adam(**options), loss="mse")
        ...     model.optimizer.build(model.trainable_variables)
        ...     return model
        >>> tree = make_model(name="adam").get_state_tree()
        >>> model = make_model(name="adam")
        >>> keras_adam.check_state_tree(model, tree)
        >>> model.set_state_tree(tree)
        >>> try:
        ...     keras_adam.check_state_tree(make_model(name="other"), tree)
        ... except ValueError as error:
        ...     print(str(error).partition("Received: ")[2])
        a tree without 'other/iteration', but with 'adam/iteration', which the model does not have
    """
    _check_dictionary("state_tree", state_tree)
    for collection in _COLLECTIONS:
        if collection in state_tree:
            values = state_tree[collection]
            _check_dictionary(f"state_tree['{collection}']", values)
            _check_collection(model, collection, _by_path(values))


def _check_collection(model, collection: str, values: dict[str, Any]) -> None:
    optimizer = getattr(model, "optimizer", None)
    if collection == "optimizer_variables":
        variables = [] if optimizer is None else optimizer.variables
    else:
        variables = getattr(model, collection)
    shapes = {v.path: tuple(v.shape) for v in variables}
    lacking = next((path for path in shapes if path not in values), None)
    unknown = next((path for path in values if path not in shapes), None)
    if lacking or unknown:
        differences = [f"without '{lacking}'"] if lacking else []
        differences += [f"with '{unknown}', which the model does not have"] if unknown else []
        raise ValueError(
            f"`state_tree` must hold a value for each path of the model's '{collection}', and no other: "
            f"`set_state_tree` would pass over them in silence. {_advice(optimizer, collection)} "
            f"Received: a tree {', but '.join(differences)}"
        )
    for path, value in values.items():
        shape = tuple(np.shape(value) if not hasattr(value, "shape") else value.shape)
        if shape != shapes[path]:
            raise ValueError(
                f"`state_tree` must hold values of the shapes that the model's '{collection}' have, which for "
                f"'{path}' is {shapes[path]}. Received: a value of shape {shape}"
            )


def _advice(optimizer, collection: str) -> str:
    if collection != "optimizer_variables":
        return "Build the model, and give it and its layers the names that they had."
    if optimizer is None:
        return "Compile the model with the optimizer that it had."
    if not optimizer.built:
        return "Call `model.optimizer.build(model.trainable_variables)` first."
    return (
        "Give the optimizer the options and the name that it had, as in `Adam(name='adam')`, and the model's layers "
        "their names."
    )


def _by_path(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    by_path = {}
    for name, value in values.items():
        inner = isinstance(value, dict)
        by_path.update(_by_path(value, f"{prefix}{name}/") if inner else {f"{prefix}{name}": value})
    return by_path


def _check_dictionary(argument: str, value) -> None:
    if not isinstance(value, dict):
        raise TypeError(
            f"`{argument}` must be a dictionary, as `model.get_state_tree()` returns. "
            f"Received: {argument} of type {type(value).__name__}"
        )
