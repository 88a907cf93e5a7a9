"""`tf.train.Checkpoint` of an optimizer with parameter groups.

Keras's list of all state variables is in the order in which they were made, which depends on when a group was added.
With groups, a checkpoint holds a list per kind of state instead, each group's numbers by name, and when each variable
joined.
"""

import json
from typing import Any

import keras
import tensorflow as tf


class CheckpointedOptimizer(keras.optimizers.Optimizer):
    """Keras's optimizer, as a checkpoint of TensorFlow takes it."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.__dict__["_joined"] = _Joined(self)
        super().__init__(*args, **kwargs)

    def _trackable_children(self, save_type="checkpoint", **kwargs):
        children = super()._trackable_children(save_type, **kwargs)
        if save_type == "checkpoint" and self._has_groups:
            children = {k: v for k, v in children.items() if k != "_variables"}
            children["_joined"] = self._joined
        return children

    def _lookup_dependency(self, name, cached_dependencies=None):
        if name == "_joined":
            return self._joined
        if name == "_variables" and self._has_groups:
            return None
        return super()._lookup_dependency(name, cached_dependencies)


class _Joined(tf.train.experimental.PythonState):
    """At which update each variable joined, 0 being the beginning, as a `tf.train.Checkpoint` holds it."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self._pending = None  # what was restored before `build`

    def serialize(self):
        joined = [p.joined for p in self._optimizer._parameters]
        return json.dumps([0 if x is None else int(x.update.numpy()) for x in joined])

    def deserialize(self, string_value):
        # TensorFlow calls this before it restores any variable.
        self._pending = json.loads(string_value)
        self.set_pending()

    def set_pending(self):
        optimizer = self._optimizer
        if self._pending is None or not optimizer._parameters:
            return
        joined, self._pending = self._pending, None
        if len(joined) != len(optimizer._parameters):
            raise ValueError(
                f"Optimizer '{optimizer.name}': the checkpoint holds the state of {len(joined)} variables. Build the "
                "optimizer for all of them, and call `add_param_group` for those of a late group, before `restore`. "
                f"Received: an optimizer built for {len(optimizer._parameters)} variables"
            )
        with optimizer._engine.outside_graph():
            optimizer._loading.check_joined(joined)
            optimizer._loading.set_joined(joined)
