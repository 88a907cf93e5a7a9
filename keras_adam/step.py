"""The order of a step."""

import functools
from typing import Any, Protocol

from keras_adam.engines import Engine
from keras_adam.engines.base import Gradients, Tensor, Variable
from keras_adam.monitor import Monitor, is_no_spike
from keras_adam.sparse import Rows, map_values, values_of
from keras_adam.step_config import StepConfig


class StepHooks(Protocol):
    """Keras's hooks that a step calls; a subclass of the optimizer may override each."""

    learning_rate: Any
    _trainable_variables: list[Variable]
    _monitor: Monitor | None
    _recent_norms: Any

    def _filter_empty_gradients(self, grads: Gradients, vars: list[Variable]) -> Any: ...
    def _overwrite_variables_directly_with_gradients(
        self, grads: Gradients, vars: list[Variable]
    ) -> Any: ...
    def _clip_gradients(self, grads: Gradients) -> Gradients: ...
    def _backend_update_step(
        self, grads: Gradients, trainable_variables: list[Variable], learning_rate: Any
    ) -> None: ...
    def _update_model_variables_moving_average(
        self, trainable_variables: list[Variable]
    ) -> None: ...
    def _overwrite_model_variables_with_average_value(
        self, trainable_variables: list[Variable]
    ) -> None: ...


class Step:
    """One call of `apply`.

    Unscale by the loss scale; sum over replicas; check finiteness or spikes; accumulate; clip; decay and Adam;
    constraints; measure; averages; count. Constraints and averages act only when an update happens.
    """

    def __init__(self, hooks: StepHooks, engine: Engine, config: StepConfig, lazy: bool):
        self.hooks = hooks
        self.engine = engine
        self.config = config
        self.lazy = lazy

    def __call__(self, grads: Gradients, variables: list[Variable]) -> None:
        hooks, engine, config = self.hooks, self.engine, self.config
        absent = [v for g, v in zip(grads, variables, strict=True) if g is None]
        if absent:
            grads, variables = hooks._filter_empty_gradients(grads, variables)
        grads, variables = hooks._overwrite_variables_directly_with_gradients(grads, variables)
        engine.in_step = [*variables, *absent]
        is_done: Tensor = True
        if grads:
            grads = engine.gather(grads, variables, self.lazy)
            if config.loss_scale_factor is not None:
                grads = map_values(engine.unscale, grads)
            grads = engine.reduce(grads)
            if self.lazy:
                grads = [g.summed() if isinstance(g, Rows) else g for g in grads]
            # A variable that is overwritten with its gradient has no update.
            absent = [v for v in absent if engine.parameters[v].momentum is not None]
            act = functools.partial(self._act, grads, variables, absent)
            if config.may_skip:
                is_done = self._is_good(values_of(grads))
                engine.when(is_done, act)
            else:
                act()
        engine.count(is_done)

    def _is_good(self, values: list[Tensor]) -> Tensor:
        deviations = self.config.skip_spikes
        if deviations is None:
            return self.engine.are_finite(values)
        return is_no_spike(self.engine, values, self.hooks._recent_norms, deviations)

    def _measure(self, grads: Gradients, variables: list[Variable]) -> None:
        if self.hooks._monitor is not None:
            rate = self.hooks.learning_rate
            self.hooks._monitor.measure(self.engine, grads, variables, rate)

    def _act(self, grads: Gradients, variables: list[Variable], absent: list[Variable]) -> None:
        self.engine.begin_again()
        if self.config.gradient_accumulation_steps:
            self._accumulate(grads, variables, absent)
        else:
            self._update(self.hooks._clip_gradients(grads), variables)
            self._measure(grads, variables)
            self._average()

    def _accumulate(
        self, grads: Gradients, variables: list[Variable], absent: list[Variable]
    ) -> None:
        """Add the gradients to the accumulators; the last of `steps` calls updates from their mean.

        A variable without a gradient in the last call is updated too, if its mean is not zero.
        """
        engine, steps = self.engine, self.config.gradient_accumulation_steps or 1
        accumulators = [engine.parameters[v].array("accumulator") for v in (*variables, *absent)]
        engine.accumulate(accumulators[: len(grads)], grads)

        def update() -> None:
            means = engine.means(accumulators, steps)
            clipped = self.hooks._clip_gradients(means)
            self._update(clipped[: len(variables)], variables)
            for mean, variable in zip(clipped[len(variables) :], absent, strict=True):
                update_one = functools.partial(self._update, [mean], [variable])
                engine.when(engine.is_left(mean), update_one)
            self._measure(means, [*variables, *absent])
            engine.reset(accumulators)
            self._average()

        engine.when(engine.is_last_call(steps), update)

    def _update(self, grads: Gradients, variables: list[Variable]) -> None:
        rate = self.hooks.learning_rate
        has_rows = [isinstance(g, Rows) for g in grads] if self.lazy else []
        if any(has_rows):
            pairs = [*zip(grads, variables, has_rows, strict=True)]
            of_rows = [(g, v) for g, v, has in pairs if has]
            dense = [(g, v) for g, v, has in pairs if not has]
            self.engine.update_each([g for g, _ in of_rows], [v for _, v in of_rows], rate)
            self.hooks._backend_update_step([g for g, _ in dense], [v for _, v in dense], rate)
        else:
            self.hooks._backend_update_step(grads, variables, rate)
        self.engine.constrain(variables)

    def _average(self) -> None:
        if not self.config.use_ema:
            return
        trained = self.hooks._trainable_variables
        self.hooks._update_model_variables_moving_average(trained)
        if self.config.ema_overwrite_frequency:
            # Variables that were frozen since are left alone.
            trained = [v for v in trained if v.trainable]
            overwrite = self.hooks._overwrite_model_variables_with_average_value
            is_due = self.engine.is_last_update(self.config.ema_overwrite_frequency)
            self.engine.when(is_due, functools.partial(overwrite, trained))
