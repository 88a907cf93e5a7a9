"""What JAX does its own way: branches that carry state."""

from collections.abc import Callable

import jax
import keras
from jax.experimental import sparse


class Backend:
    """Overrides for JAX."""

    def _is_compiling(self) -> bool:
        return isinstance(self._iterations.value, jax.core.Tracer)

    def _densify(self, gradient):
        return gradient.todense() if isinstance(gradient, sparse.JAXSparse) else gradient

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
