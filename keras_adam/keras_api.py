"""Keras's vocabulary: the entry points and the hooks of Keras's optimizers."""

from typing import Any

import keras
import numpy as np

from keras_adam import hyperparameters, keras_private
from keras_adam.paths import path_of
from keras_adam.sparse import map_values
from keras_adam.state import State, check_given_once
from keras_adam.step import Step
from keras_adam.step_config import StepConfig


class KerasVocabulary(State):
    """The methods of `keras.optimizers.Optimizer`; each calls a `Step` or an `Engine`."""

    _own_hooks: dict[str, Any]  # as they are when the package is imported

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("keras_adam."):
            cls._own_hooks = {name: getattr(cls, name) for name in keras_private.STEP_HOOKS}

    def apply_gradients(self, grads_and_vars):
        """Apply (gradient, variable) pairs and return the iterations; no pair, no step."""
        grads_and_vars = list(grads_and_vars)
        self.apply([g for g, _ in grads_and_vars], [v for _, v in grads_and_vars])
        return self._iterations

    def apply(self, grads, trainable_variables=None) -> None:
        """Update the variables by one step.

        Args:
            grads: List of gradients, each of its variable's shape; None leaves its variable as it is. Gradients are
                not written to. TensorFlow's `IndexedSlices` and JAX's `BCOO` are gradients too.
            trainable_variables: List of variables, one per gradient. Defaults to those that the optimizer was built
                with; given on the first call, they build it.

        Raises:
            ValueError: If the numbers of gradients and variables differ, a variable is unknown or is given twice, or
                no variable has a gradient.
        """
        grads = list(grads)
        if not grads:
            return
        if keras_private.autocast_scope() is not None:
            with keras_private.without_autocast():
                self._apply(grads, trainable_variables)
        else:
            self._apply(grads, trainable_variables)

    def _apply(self, grads, trainable_variables) -> None:
        variables = self._variables_for(grads, trainable_variables)
        config = self.__dict__.get("_step_config")
        if config is None:  # kept until an option is set
            config = self.__dict__["_step_config"] = StepConfig.of(self)
        self._engine.run(self._take_step, grads, variables, config)

    def _take_step(self, grads, variables, config: StepConfig) -> None:
        """Take one step; a compiled step traces this."""
        if self._engine.is_compiling():
            self._trace.note(self._dynamic_rate())
        is_lazy = config.lazy and not self._overrides_update()
        self._engine.config_of_step = config
        try:
            with keras.name_scope(self.name, caller=self):
                Step(self, self._engine, config, is_lazy)(grads, variables)
        finally:
            self._engine.config_of_step = None

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        """Return new values of the trainable variables and of the optimizer's, given their values and the gradients.

        Args:
            optimizer_variables: List of tensors, one for each of `optimizer.variables`.
            grads: List of gradients, one for each trainable variable, in the order of the last `build`.
            trainable_variables: List of tensors, one for each trainable variable, in the same order.
        """
        self._check_values(list(map(np.shape, trainable_variables)))
        # Only for this call: a group added since must still be met by the next `fit`, which builds.
        is_met = bool(self._parameters) or not trainable_variables
        built, self.built = self.built, self.built or is_met
        try:
            return super().stateless_apply(optimizer_variables, grads, trainable_variables)
        finally:
            self.built = built

    def _check_values(self, shapes: list[tuple[int, ...]]) -> None:
        """Raise if values of these shapes cannot be those of the last `build`'s variables, all still trainable."""
        variables = self._trainable_variables
        frozen = next((v for v in variables if not v.trainable), None)
        pairs = zip(variables, shapes, strict=False)
        misfit = next(((v, shape) for v, shape in pairs if shape != tuple(v.shape)), None)
        if self._parameters and len(shapes) != len(variables):
            received = f"{len(shapes)} values"
        elif frozen is not None:
            received = f"values while '{path_of(frozen)}' is frozen"
        elif misfit is not None:
            variable, shape = misfit
            received = f"a value of shape {shape} for '{path_of(variable)}' of shape {tuple(variable.shape)}"
        else:
            return
        trainable = [tuple(p.variable.shape) for p in self._parameters if p.variable.trainable]
        if sorted(shapes) == sorted(trainable):
            way_out = "Call `optimizer.build(model.trainable_variables)`; the state stays."
        else:
            way_out = (
                f"{self._own_optimizer()} For layers that were unfrozen, call "
                "`optimizer.add_param_group({'params': layer_or_variables})`."
            )
        raise ValueError(
            f"`trainable_variables` must be the values of the {len(variables)} trainable variables that the optimizer "
            f"was last built for. {way_out} If `fit` raised this, the model is empty: call `load_weights`. "
            f"Received: {received}"
        )

    def _variables_for(self, grads, trainable_variables):
        if trainable_variables is None:
            if not self._parameters:
                raise ValueError(
                    "When passing `grads` without `variables`, the optimizer must already be built on a list of "
                    "variables. Call `optimizer.build(trainable_variables)` first."
                )
            variables = self._trainable_variables
        else:
            variables = list(trainable_variables)
        if len(grads) != len(variables):
            raise ValueError(
                "`grads` must hold one gradient (or None) for each variable. "
                f"Received: {len(grads)} gradients for {len(variables)} variables"
            )
        if not self._parameters or self._pending_groups:
            with keras.name_scope(self.name, caller=self):
                self.build(variables)
        identities = tuple(map(id, variables))
        if identities not in self._verified_lists:
            check_given_once(variables)
            self._check_variables_are_known(variables)
            self._verified_lists.add(identities)
        return variables

    def _dynamic_rate(self):
        """Return the learning rate if it is a schedule or a callable, which a compiled step keeps; else None."""
        return self._learning_rate if hyperparameters.is_dynamic(self._learning_rate) else None

    # Hooks that a subclass may override

    def update_step(self, gradient, variable, learning_rate) -> None:
        """Update one variable and its moments; a subclass may override it, and call this one.

        Args:
            gradient: Tensor of the variable's shape.
            variable: One of the variables that the optimizer was built with.
            learning_rate: Number or scalar tensor; a group with its own learning rate ignores it.
        """
        self._engine.update_one(gradient, variable, self._engine.scalars(learning_rate))

    def _backend_update_step(self, grads, trainable_variables, learning_rate) -> None:
        if not self._overrides_update():
            self._engine.update(grads, trainable_variables, learning_rate)
            return
        grads = self._engine.apart(grads, trainable_variables)
        if not self._overrides("update_step"):
            self._engine.update_each(grads, trainable_variables, learning_rate)
            return
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            self.update_step(gradient, variable, learning_rate)

    def _clip_gradients(self, grads):
        return (
            grads if self._engine.config.clipping is None else map_values(self._engine.clip, grads)
        )

    def _update_model_variables_moving_average(self, trainable_variables) -> None:
        self._engine.move_averages(trainable_variables)

    def _overwrite_model_variables_with_average_value(self, trainable_variables) -> None:
        self._check_variables_are_known(trainable_variables)
        self._engine.overwrite_with_averages(trainable_variables)

    def assign(self, variable, value) -> None:
        self._engine.assign(variable, value)

    def _overrides(self, *hooks: str) -> bool:
        """Whether one of the hooks was replaced: in a subclass, on this optimizer, or in our class."""
        return any(
            name in self.__dict__ or getattr(type(self), name) is not self._own_hooks[name]
            for name in hooks
        )

    def _overrides_update(self) -> bool:
        """Whether a hook that sees each variable was replaced, so that they are updated one by one."""
        return self._overrides("update_step", "assign", "assign_sub")

    @keras_private.without_autocast()
    def finalize_variable_values(self, var_list) -> None:
        """End a training, as Keras's `fit` does: overwrite the variables with their averages, if there are any.

        Args:
            var_list: List of the model's trainable variables.

        Raises:
            ValueError: If the train step was compiled before the schedule of the learning rate was set, or before a
                group of these variables was added.
        """
        if self._engine.was_emptied():  # an error from here would hide the trainer's own
            return
        variables = list(var_list)
        self._engine.check_trained(variables, self._unknown)
        super().finalize_variable_values(variables)
        met = set().union(*self._verified_lists)
        for variable in variables:
            if self._is_known(variable):
                had_steps = self._parameters[variable].had_steps(self.iterations)
                self._trace.check_late(path_of(variable), id(variable) in met, had_steps)
        self._trace.check_rate(self._dynamic_rate())
