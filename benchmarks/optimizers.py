"""The optimizers that a Keras user can choose from, on any backend."""

import inspect
from collections.abc import Callable

import cases
import keras
import measure
from cases import GROUPS, KERAS, LAZY, NAIVE, OURS, SGD
from keras import ops

import keras_adam


class NaiveAdam(keras.optimizers.Optimizer):
    """Adam as one writes it in an afternoon: the paper's lines, one variable at a time."""

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._m, self._v = self.add_optimizer_variables(variables, ["m", "v"])

    def update_step(self, gradient, variable, learning_rate):
        i = self._get_variable_index(variable)
        m, v = self._m[i], self._v[i]
        t = ops.cast(self.iterations + 1, variable.dtype)
        beta_1, beta_2 = cases.BETA_1, cases.BETA_2
        self.assign(m, beta_1 * m + (1 - beta_1) * gradient)
        self.assign(v, beta_2 * v + (1 - beta_2) * ops.square(gradient))
        m_hat = m / (1 - ops.power(beta_1, t))
        v_hat = v / (1 - ops.power(beta_2, t))
        step = ops.cast(learning_rate, variable.dtype) * m_hat / (ops.sqrt(v_hat) + cases.EPSILON)
        self.assign_sub(variable, step)


def optimizers(case: cases.Case) -> dict[str, Callable[[list], keras.optimizers.Optimizer]]:
    """Return functions that make an optimizer for a list of variables."""
    arguments = {"gradient_accumulation_steps": case.accumulation}
    adam = {
        OURS: lambda variables: keras_adam.Adam(cases.LEARNING_RATE, **arguments),
        KERAS: lambda variables: keras.optimizers.Adam(cases.LEARNING_RATE, **arguments),
    }
    if case.work == "accumulation":
        return adam
    if case.work == "embedding":
        return {LAZY: _lazy, **adam, SGD: _sgd}
    if case.work == "fit":
        return {**adam, SGD: _sgd}
    if case.count >= 4:
        adam[GROUPS] = _with_groups
    adam[NAIVE] = lambda variables: NaiveAdam(cases.LEARNING_RATE)
    return adam


def _with_groups(variables):
    """Return an optimizer with four groups, in turns, that differ in their options but not in the result."""
    groups = [{"params": variables[k::4], "learning_rate_multiplier": 1.0} for k in range(4)]
    return keras_adam.Adam(cases.LEARNING_RATE, param_groups=groups)


def _lazy(variables):
    if "lazy" not in inspect.signature(keras_adam.Adam).parameters:
        raise measure.UnavailableError("this version of keras_adam has no `lazy`")
    return keras_adam.Adam(cases.LEARNING_RATE, lazy=True)


def _sgd(variables):
    return keras.optimizers.SGD(cases.LEARNING_RATE)


def new_variables(case: cases.Case) -> list[keras.Variable]:
    """Make the variables of one contestant, in memory that the framework itself allocates."""
    count, shape = case.count, (case.elements,)
    if case.work == "embedding":
        count, shape = 1, (case.count, case.elements)
    return [keras.Variable("zeros", shape=shape, name=f"v{i}") for i in range(count)]
