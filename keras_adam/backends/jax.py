"""What JAX does its own way: branches that carry state."""

from collections.abc import Callable

import jax
import keras
from jax.experimental import sparse


class Backend:
    """Overrides for JAX."""

    def finalize_variable_values(self, var_list):
        # When a train step has failed, Keras's trainer calls this with all variables empty; an error from here would
        # hide the one that matters.
        if self._iterations._value is not None:
            super().finalize_variable_values(var_list)

    def _is_compiling(self) -> bool:
        return isinstance(self._iterations.value, jax.core.Tracer)

    def _densify(self, gradient):
        return gradient.todense() if isinstance(gradient, sparse.JAXSparse) else gradient

    def _differentiate(self, loss_fn, variables):
        assigned: list[
            keras.Variable
        ] = []  # such as the moving statistics of a batch normalisation

        def compute(values):
            with _RecordingScope(zip(variables, values, strict=True)) as scope:
                loss = loss_fn()
                scaled = self.scale_loss(loss)
            assigned[:] = scope.assigned
            return scaled, (loss, [scope.get_current_value(v) for v in assigned])

        values = [v.value for v in variables]
        (_, (loss, updates)), grads = jax.value_and_grad(compute, has_aux=True)(values)
        for variable, value in zip(assigned, updates, strict=True):
            variable.assign(value)
        return loss, grads

    def _when(self, condition, update: Callable[[], None]) -> None:
        if not isinstance(condition, jax.core.Tracer):
            if condition:
                update()
            return
        variables = [*self._trainable_variables, *self.variables]

        def body(carry):
            _, values = carry
            with keras.StatelessScope(zip(variables, values, strict=True)) as scope:
                update()
            return False, [scope.get_current_value(v) for v in variables]

        # A loop that runs zero times or once: unlike `lax.cond`, it works in place on CPU, where `cond` copies every
        # array that passes through it, whether or not the branch is taken.
        carry = (condition, [v.value for v in variables])
        _, values = jax.lax.while_loop(lambda carry: carry[0], body, carry)
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


class _RecordingScope(keras.StatelessScope):
    """A stateless scope that knows which variables were assigned in it."""

    def __init__(self, state_mapping):
        super().__init__(state_mapping)
        self.assigned = []

    def add_update(self, update):
        if not any(update[0] is v for v in self.assigned):
            self.assigned.append(update[0])
        super().add_update(update)
