"""One step of the portable path, in `keras.ops`, one variable at a time.

Its order: unscale by the loss scale; sum over replicas; check finiteness; accumulate; clip; decay and Adam;
constraints; averages; iterations. Constraints and averages act only when an update happens.
"""

import dataclasses
import functools
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_adam import hyperparameters, rule, seams
from keras_adam.bits import root
from keras_adam.groups import ParamGroup
from keras_adam.paths import path_of
from keras_adam.rows import Rows, map_values, values_of
from keras_adam.state import HALF, State, check_given_once, compute_dtype, value_of

_MOST_LISTS = 16  # of variables for which buckets are remembered
# Keras's hooks that a step calls. One that a subclass has of its own must be called in each step.
STEP_HOOKS = (
    "_backend_apply_gradients",
    "_backend_increment_gradient_accumulators",
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
_EMPTIED = "If this comes from `fit`, Keras has emptied the model meanwhile: load its weights again"


@dataclasses.dataclass
class Bucket:
    """Variables that are updated alike: same group, joined together, same dtype and device."""

    group: ParamGroup
    start: int | None
    dtype: str
    decays: bool
    positions: list[int]  # in the list of variables that `apply` got
    variables: list[Any]
    moments: list[rule.Moments]
    compensations: list[Any]
    memory: Any = None  # what a backend wants to remember


class PortableAdam(State):
    """Adam without anything of a backend's own: what every backend can do, and what its fast paths are tested against.

    The methods whose names begin with `_backend`, and the last few, are what a backend may do its own way.
    """

    _own_hooks: dict[str, Any]  # as they are when the package is imported

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("keras_adam."):
            cls._own_hooks = {name: getattr(cls, name) for name in STEP_HOOKS}

    def apply_gradients(self, grads_and_vars):
        """Apply (gradient, variable) pairs and return the iterations; no pair, no step."""
        grads_and_vars = list(grads_and_vars)
        self.apply([g for g, _ in grads_and_vars], [v for _, v in grads_and_vars])
        return self._iterations

    def apply(self, grads, trainable_variables=None) -> None:
        """Update the variables by one step.

        Args:
            grads: List of gradients, each of its variable's shape; None leaves its variable as it is. They are not
                written to. TensorFlow's `IndexedSlices` and JAX's `BCOO` serve too.
            trainable_variables: List of variables, one per gradient. Defaults to those that the optimizer was built
                with; given on the first call, they build it.

        Raises:
            ValueError: If the numbers of gradients and variables differ, a variable is not known or stands twice, or
                no variable has a gradient.
        """
        grads = list(grads)
        if not grads:
            return
        with seams.without_autocast():
            variables = self._variables_for(grads, trainable_variables)
            if self._is_compiling():
                self._traced, self._traced_rate = True, self._dynamic_rate()
            with keras.name_scope(self.name, caller=self):
                self._step(grads, variables)

    # A function of its own: PyTorch 2.15 cannot trace a comprehension in a `with` on Python 3.13.
    def _step(self, grads, variables) -> None:
        absent = [v for g, v in zip(grads, variables, strict=True) if g is None]
        if absent:
            grads, variables = self._filter_empty_gradients(grads, variables)
        grads, variables = self._overwrite_variables_directly_with_gradients(grads, variables)
        self.__dict__.update(_in_step=[*variables, *absent], _is_done=True)
        if grads:
            grads = self._densify_all(grads)
            grads = self._of_their_shapes(grads, variables)
            if self.loss_scale_factor is not None:
                grads = map_values(self._unscale, grads)
            self._backend_apply_gradients(grads, variables)
        self._count(self._is_done)
        self.__dict__["_is_done"] = True  # nothing of a traced step is held

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        """Return new values of the trainable variables and of the optimizer's, given their values and the gradients.

        Args:
            optimizer_variables: List of tensors, one for each of `optimizer.variables`.
            grads: List of gradients, one for each trainable variable, in the order of the last `build`.
            trainable_variables: List of tensors, one for each trainable variable, in the same order.
        """
        if self._known and len(trainable_variables) != len(self._trainable_variables):
            raise ValueError(
                f"The optimizer was built for {len(self._trainable_variables)} variables. Received: "
                f"{len(trainable_variables)} trainable variables. {self._own_optimizer()} If layers were unfrozen "
                "since, call `optimizer.add_param_group({'params': layer_or_variables})`; if layers were frozen, "
                f"`optimizer.build(model.trainable_variables)`; the state stays. {_EMPTIED}"
            )
        for variable, value in zip(self._trainable_variables, trainable_variables, strict=False):
            if not variable.trainable:
                raise ValueError(
                    f"'{path_of(variable)}' is not trainable any more, so that it cannot be told which variables the "
                    f"values are of. {self._own_optimizer()} If layers of this one were frozen, call "
                    "`optimizer.build(model.trainable_variables)`, and before it "
                    "`optimizer.add_param_group({'params': layer_or_variables})` for those unfrozen; the state stays"
                )
            shape = np.shape(value)
            if shape != tuple(variable.shape):
                raise ValueError(
                    "`trainable_variables` must be the values of the variables that the optimizer was built for, in "
                    f"that order. {self._own_optimizer()} Received: a value of shape {shape} for "
                    f"'{path_of(variable)}', which has {tuple(variable.shape)}. {_EMPTIED}"
                )
        # Only for this call: a group added since must still be met by the next `fit`, which builds.
        is_met = bool(self._known) or not trainable_variables
        built, self.built = self.built, self.built or is_met
        try:
            return super().stateless_apply(optimizer_variables, grads, trainable_variables)
        finally:
            self.built = built

    def _variables_for(self, grads, trainable_variables):
        if trainable_variables is None:
            if not self._known:
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
        if not self._known or self._pending_groups:
            with keras.name_scope(self.name, caller=self):
                self.build(variables)
        identities = tuple(map(id, variables))
        if identities not in self._checked_lists:
            check_given_once(variables)
            self._check_variables_are_known(variables)
            self._checked_lists.add(identities)
        return variables

    def _dynamic_rate(self):
        """Return the learning rate if it is a schedule or a callable, which a compiled step keeps; else None."""
        return self._learning_rate if hyperparameters.is_dynamic(self._learning_rate) else None

    def _densify_all(self, grads):
        """Return sparse gradients as dense ones, or as rows if only these are to be updated."""
        if self.lazy and not self._overrides_update():
            found = [(g, self._sparse_rows(g)) for g in grads]
            grads = [rows or self._densify(g) for g, rows in found]
            # Parts of a row are summed in float32: in bfloat16 a sum of ones stops at 256.
            return map_values(lambda values: [_widened(x) for x in values], grads)
        return [self._densify(g) for g in grads]

    def _of_their_shapes(self, grads, variables):
        """Return the gradients, each of its variable's shape."""
        if [g.shape for g in grads] == [v.shape for v in variables]:
            return grads
        return [self._of_its_shape(g, v) for g, v in zip(grads, variables, strict=True)]

    def _unscale(self, values):
        return [_widened(x) / self._number("loss_scale_factor") for x in values]

    def _backend_apply_gradients(self, grads, trainable_variables):
        grads = self._reduce(grads)
        if self.lazy:
            grads = [g.summed() if isinstance(g, Rows) else g for g in grads]

        def act():
            self._begin_again()
            if self.gradient_accumulation_steps:
                self._accumulate(grads, trainable_variables)
            else:
                self._update(self._clip_gradients(grads), trainable_variables)
                self._update_averages()

        if not self.skip_nonfinite:
            act()
            return
        self.__dict__["_is_done"] = is_finite = self._are_finite(values_of(grads))
        self._when(is_finite, act)

    def _begin_again(self) -> None:
        """Let all variables count from the beginning if the count was set back to before some of them joined."""
        for start in self._starts:
            is_past = ops.less_equal(start, self.iterations)
            self.assign(start, value_of(start) * ops.cast(is_past, start.dtype))

    def _are_finite(self, values):
        """Whether no value is infinite or NaN."""
        return ops.all(ops.stack([ops.all(ops.isfinite(x)) for x in values]))

    def _count(self, is_done) -> None:
        """Count this call of `apply` as a step, or as a skipped one."""
        if is_done is True:
            self._increment_iterations(1)
        elif is_done is False:
            self._increment_skipped(1)
        else:
            self._increment_iterations(ops.cast(is_done, self._iterations.dtype))
            self._increment_skipped(ops.cast(ops.logical_not(is_done), self.skipped_steps.dtype))

    def _increment_iterations(self, by) -> None:
        self._iterations.assign_add(by)

    def _increment_skipped(self, by) -> None:
        # Beyond the end of what the dtype holds comes its most negative number.
        skipped = self.skipped_steps.value
        self.skipped_steps.assign(ops.maximum(skipped, skipped + by))

    def _check_count(self, count: int) -> None:
        """Raise if `count`, the number of steps so far, is the last from which all can go on."""
        last = self._last_count()
        if count >= last:
            raise OverflowError(
                f"`optimizer.iterations` has come to {last}, the end of what its dtype holds: schedules, accumulation "
                "and averages cannot all go on from here. Train on with a new optimizer, or set its count of steps "
                f"to a smaller number, for which they are what you want. Received: iterations={count}"
            )

    def _last_count(self) -> int:
        return int(np.iinfo(keras.backend.standardize_dtype(self._iterations.dtype)).max)

    def _accumulate(self, grads, variables) -> None:
        """Add the gradients to the accumulators; when enough micro-steps have come together, update from their mean.

        A variable without a gradient in the last micro-step is updated too if the earlier ones left it something.
        """
        known = self._in_step
        absent = known[len(variables) :]
        accumulators = [self._accumulated_gradients[self._get_variable_index(v)] for v in known]
        self._backend_increment_gradient_accumulators(grads, accumulators[: len(grads)])
        steps = self.gradient_accumulation_steps

        def update():
            means = self._clip_gradients(self._means(accumulators, steps))
            self._update(means[: len(variables)], variables)
            for mean, variable in zip(means[len(variables) :], absent, strict=True):
                self._when(
                    ops.any(ops.not_equal(mean, 0)),
                    functools.partial(self._update, [mean], [variable]),
                )
            self._reset(accumulators)
            self._update_averages()

        self._when(self._is_due(self._iterations, steps), update)

    def _means(self, accumulators, steps: int):
        return [value_of(a) / steps for a in accumulators]

    def _reset(self, accumulators) -> None:
        for accumulator in accumulators:  # not by a multiplication with zero, which a NaN survives
            self.assign(accumulator, ops.zeros(accumulator.shape, accumulator.dtype))

    def _is_due(self, iterations, every: int):
        """Whether this is the last of `every` steps; `iterations` is the number of steps before it."""
        return (iterations + 1) % every == 0

    def _backend_increment_gradient_accumulators(self, grads, acc_grads):
        for gradient, accumulator in zip(grads, acc_grads, strict=True):
            total = value_of(accumulator) + ops.cast(gradient, accumulator.dtype)
            self.assign(accumulator, total)

    def _clip_gradients(self, grads):
        if not (self.clipnorm or self.global_clipnorm or self.clipvalue):
            return grads
        return map_values(self._clip, grads)

    def _clip(self, values):
        # Norms in float32: the square of 256 is infinite in float16.
        values = [_widened(x) for x in values]
        if self.clipnorm:
            limit = self._number("clipnorm")
            return [_scaled_to_norm(x, _norm([x]), limit) for x in values]
        if self.global_clipnorm:
            norm, limit = _norm(values), self._number("global_clipnorm")
            return [_scaled_to_norm(x, norm, limit) for x in values]
        limit = self._number("clipvalue")
        return [ops.clip(x, -limit, limit) for x in values]

    def _update(self, grads, variables) -> None:
        learning_rate = self.learning_rate
        has_rows = [isinstance(g, Rows) for g in grads] if self.lazy else []
        if not any(has_rows):
            self._backend_update_step(grads, variables, learning_rate)
        else:
            pairs = list(zip(grads, variables, strict=True))
            for wanted, update in (
                (True, self._portable_update_step),
                (False, self._backend_update_step),
            ):
                chosen = [pair for pair, has in zip(pairs, has_rows, strict=True) if has is wanted]
                update([g for g, _ in chosen], [v for _, v in chosen], learning_rate)
        for variable in variables:
            if variable.constraint is not None:
                whole = self._read_parameter(variable)
                self._write_parameter(variable, variable.constraint(whole))

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        self._portable_update_step(grads, trainable_variables, learning_rate)

    def _portable_update_step(self, grads, variables, learning_rate) -> None:
        is_own = self._overrides("update_step")
        scalars = None if is_own else self._scalars(learning_rate)
        for gradient, variable in zip(grads, variables, strict=True):
            if is_own:
                self.update_step(gradient, variable, learning_rate)
            else:
                self._update_one(gradient, variable, scalars)

    def update_step(self, gradient, variable, learning_rate) -> None:
        """Update one variable and its moments; a subclass may override it, and call this one.

        Args:
            gradient: Tensor of the variable's shape.
            variable: One of the variables that the optimizer was built with.
            learning_rate: Number or scalar tensor; a group's own learning rate, where it has one, stands above it.
        """
        self._update_one(gradient, variable, self._scalars(learning_rate))

    def _update_one(self, gradient, variable, scalars) -> None:
        index = self._get_variable_index(variable)
        group = self._group_of[index]
        dtype = compute_dtype(variable.dtype)
        scalars = scalars(group, self._start_of[index], dtype, self._use_weight_decay(variable))
        slots, lost = self._moments_of(index), self._compensation_of(variable)
        read, write = value_of, self.assign
        if isinstance(gradient, Rows):
            indices = gradient.indices
            read = functools.partial(self._take_own_rows, indices)
            write = functools.partial(self._put_rows, indices)
            gradient = gradient.rows()
        value, lost_value, *moments = updated(
            gradient,
            read(variable),
            None if lost is None else read(lost),
            rule.Moments(*(x if x is None else read(x) for x in slots)),
            scalars,
            self._dither() if has_half(lost, *slots) else None,
            options=group.options,
        )
        # Keras's Adam changes a variable through `assign_sub`, which a subclass may have of its own.
        change = self._assign_difference if self._overrides("assign_sub") else write
        change(variable, value)
        for slot, value in zip((lost, *slots), (lost_value, *moments), strict=True):
            if slot is not None:
                write(slot, value)

    def _take_own_rows(self, indices, variable):
        return self._take_rows(indices, variable, keras.backend.standardize_dtype(variable.dtype))

    def _read_parameter(self, variable):
        """Return a variable's value in the dtype of the update, with what rounding took from it."""
        dtype = compute_dtype(variable.dtype)
        value, lost = value_of(variable, dtype), self._compensation_of(variable)
        if lost is None:
            return value
        return rule.joined(
            value, value_of(lost, dtype), keras.backend.standardize_dtype(lost.dtype)
        )

    def _write_parameter(self, variable, value) -> None:
        """Assign a value of the dtype of the update, and keep what rounding takes from it."""
        lost = self._compensation_of(variable)
        if lost is not None:
            dtype = keras.backend.standardize_dtype(lost.dtype)
            value, rest = rule.split(value, dtype, self._dither())
            self.assign(lost, rest)
        self.assign(variable, value)

    def _assign_difference(self, variable, value) -> None:
        self.assign_sub(variable, value_of(variable) - value)

    def _compensation_of(self, variable):
        return self._slots("_compensations")[self._get_variable_index(variable)]

    def _dither(self):
        return rule.dither(self._iterations)

    def _buckets(self, variables) -> list[Bucket]:
        """Group variables that one kernel can update together; computed once for the same list of variables."""
        key = tuple(map(id, variables))
        if self._overrides("_use_weight_decay"):  # it may tell something else in each step
            key += tuple(map(self._use_weight_decay, variables))
        if key not in self._bucket_cache:
            members: dict[tuple[Any, ...], list[int]] = {}
            for position, variable in enumerate(variables):
                index = self._get_variable_index(variable)
                kind = (
                    self._group_of[index],
                    self._start_of[index],
                    keras.backend.standardize_dtype(variable.dtype),
                    self._use_weight_decay(variable),
                    self._device_of(variable),
                )
                members.setdefault(kind, []).append(position)
            if len(self._bucket_cache) == _MOST_LISTS:
                self._bucket_cache.clear()
            self._bucket_cache[key] = [
                self._bucket(kind, positions, variables) for kind, positions in members.items()
            ]
        return self._bucket_cache[key]

    def _bucket(self, kind, positions, variables) -> Bucket:
        chosen = [variables[i] for i in positions]
        moments = [self._moments_of(self._get_variable_index(v)) for v in chosen]
        group, start, dtype, decays, _ = kind
        lost = [self._compensation_of(v) for v in chosen]
        return Bucket(group, start, dtype, decays, positions, chosen, moments, lost)

    def _overrides(self, *hooks: str) -> bool:
        """Whether one of the hooks is not ours: a subclass's, this very optimizer's, or put into our class."""
        return any(
            name in self.__dict__ or getattr(type(self), name) is not self._own_hooks[name]
            for name in hooks
        )

    def _overrides_update(self) -> bool:
        """Whether variables are to be updated one by one, through a hook that a subclass has of its own."""
        return self._overrides("update_step", "assign", "assign_sub")

    def _device_of(self, variable):
        """Return what tells variables apart that one kernel cannot update together."""
        return None

    def _scalars(self, learning_rate, for_kernel: bool = False):
        """Return a function that gives a group's scalars of this step, each computed once.

        They depend on the group, on when the variable joined (None: at the beginning), on the dtype, and on whether
        weight decay applies.
        """
        iterations = self.iterations
        compiling = self._is_compiling()

        @_remembering
        def of_group(group: ParamGroup, start: int | None, dtype: str) -> rule.Scalars:
            # The difference in whole numbers: float32 has not all of them from 2^24 on, but a `t` that large
            # corrects nothing any more. The one added last: the greatest whole number has no next one.
            updates = iterations if start is None else iterations - self._starts[start]
            t = ops.cast(updates, dtype) + 1
            return group.scalars(learning_rate, self._iterations, t, dtype, compiling, for_kernel)

        def scalars(group, start, dtype, decays) -> rule.Scalars:
            found = of_group(group, start, dtype)
            return found if decays else found._replace(decay=None)

        return scalars

    # Averages

    def _update_averages(self) -> None:
        if not self.use_ema:
            return
        self._update_model_variables_moving_average(self._trainable_variables)
        if self.ema_overwrite_frequency:
            due = self._is_due(self.iterations, self.ema_overwrite_frequency)
            # What was frozen since has no update from here either.
            trained = [v for v in self._trainable_variables if v.trainable]
            overwrite = self._overwrite_model_variables_with_average_value
            self._when(due, functools.partial(overwrite, trained))

    def _update_model_variables_moving_average(self, trainable_variables) -> None:
        for variable, average, started in self._averages_of(trainable_variables):
            # The first update sets the average.
            keep = ops.cast(started, average.dtype) * self._number("ema_momentum")
            value = ops.cast(self._read_parameter(variable), average.dtype)
            self.assign(average, keep * value_of(average) + (1 - keep) * value)

    def _has_started(self, start: int | None):
        return ops.not_equal(self.iterations, 0 if start is None else self._starts[start])

    @seams.without_autocast()
    def finalize_variable_values(self, var_list) -> None:
        """End a training, as Keras's `fit` does: overwrite the variables with their averages, if there are any.

        Args:
            var_list: List of the model's trainable variables.

        Raises:
            ValueError: If the train step was compiled before the learning rate became a schedule, or another one, or
                before a group of these variables was added, so that it knew nothing of that.
        """
        super().finalize_variable_values(var_list)
        self._check_count(int(ops.convert_to_numpy(self._iterations)))
        self._check_joined(var_list)
        if self._traced and self._traced_rate is not self._dynamic_rate():
            raise ValueError(
                "`learning_rate` was made a schedule, or another one, after the train step was compiled, so that the "
                "steps just made did not follow it. Compile the model again after setting it. "
                f"Received: learning_rate={self._learning_rate}"
            )

    def _check_joined(self, variables) -> None:
        """Raise if there were steps since some of the variables joined, and none knew of them."""
        met = set().union(*self._checked_lists)
        for variable in variables:
            if not self._traced or id(variable) in met or not self._is_known(variable):
                continue
            start = self._start_of[self._get_variable_index(variable)]
            if start is None:
                continue
            joined, now = map(ops.convert_to_numpy, (self._starts[start], self.iterations))
            if joined < now:
                raise ValueError(
                    f"'{path_of(variable)}' was not trained: the train step was compiled before its group was added. "
                    "Compile the model again after `add_param_group`."
                )

    def _overwrite_model_variables_with_average_value(self, trainable_variables) -> None:
        self._check_variables_are_known(trainable_variables)
        for variable, average, started in self._averages_of(trainable_variables):
            # Before the first update there is no average. Never the average itself: on JAX the two would share one
            # buffer, which the next train step may not donate twice.
            value = rule.where(started, value_of(average), self._read_parameter(variable))
            self._write_parameter(variable, value)

    def _averages_of(self, variables):
        """Give variables with their averages, and whether there was an update before this one.

        A variable that is overwritten with its gradient has no average.
        """
        started = _remembering(self._has_started)
        for variable in variables:
            index = self._get_variable_index(variable)
            average = self._model_variables_moving_average[index]
            if average is not None:
                yield variable, average, started(self._start_of[index])

    # What a backend may do its own way

    def _is_compiling(self) -> bool:
        """Whether this call is being traced, so that what Python computes now is frozen into a compiled step."""
        return False

    def _step_scalars(self, options: rule.Options, **numbers) -> rule.Scalars:
        """Return what `rule.step_scalars` does."""
        return rule.step_scalars(options, **numbers)

    def _number(self, name: str):
        """Return a number such as `clipnorm` for this step; a compiled step may get it as an argument."""
        return getattr(self, name)

    def _densify(self, gradient):
        """Return a sparse gradient as a dense one, the values of a repeated index summed."""
        return ops.convert_to_tensor(gradient, sparse=False)

    def _of_its_shape(self, gradient, variable):
        """Return the gradient, or raise a ValueError if its shape is not its variable's."""
        if gradient.shape != variable.shape:
            raise ValueError(
                f"Each gradient must have its variable's shape, which for '{path_of(variable)}' is "
                f"{tuple(variable.shape)}. Received: a gradient of shape {tuple(gradient.shape)}"
            )
        return gradient

    def _sparse_rows(self, gradient) -> Rows | None:
        """Return the rows of a gradient of the backend's own sparse kind, or None if it is of another."""
        return None

    def _take_rows(self, indices, variable, dtype):
        """Return some rows of a variable."""
        return ops.cast(ops.take(value_of(variable), indices, axis=0), dtype)

    def _put_rows(self, indices, variable, rows) -> None:
        """Assign to some rows of a variable; those of an index that stands twice are equal."""
        value = value_of(variable)
        rows = ops.cast(rows, value.dtype)
        self.assign(variable, ops.scatter_update(value, indices[:, None], rows))

    def _reduce(self, grads):
        """Return the gradients summed over the replicas."""
        return grads

    def _when(self, condition, update) -> None:
        """Call `update`, which assigns to variables, if `condition` holds in this step."""
        if condition:
            update()


def has_half(*slots) -> bool:
    """Whether one of some state variables is of half precision, so that rounding it takes a dither."""
    dtypes = (keras.backend.standardize_dtype(x.dtype) for x in slots if x is not None)
    return any(dtype in HALF for dtype in dtypes)


def updated(
    gradient, value, lost, moments: rule.Moments, scalars: rule.Scalars, dither, *, options
):
    """Return one variable's next value, what rounding takes from it, and its moments: a flat tuple.

    All are tensors, given and returned in the dtype in which they are kept. Nothing is assigned, so that a backend may
    compile this once for all variables that are alike.

    `lost` is what rounding took from the value before; None without compensation. `dither` is that of this step; None
    if nothing here is of half precision.
    """
    dtype = compute_dtype(value.dtype)
    p = ops.cast(value, dtype)
    if lost is not None:
        kept = keras.backend.standardize_dtype(lost.dtype)
        p = rule.joined(p, ops.cast(lost, dtype), kept)
    wide = rule.Moments(*(x if x is None else ops.cast(x, dtype) for x in moments))
    p, wide = rule.adam_step(ops.cast(gradient, dtype), p, wide, scalars, options)
    if lost is not None:
        p, lost = rule.split(p, kept, dither)
        lost = ops.cast(lost, kept)
    return ops.cast(p, value.dtype), lost, *map(functools.partial(_narrowed, dither), wide, moments)


def _narrowed(dither, value, old):
    """Return a moment in the dtype of the old one, rounded so that it does not stall."""
    if old is None:
        return None
    kept = keras.backend.standardize_dtype(old.dtype)
    if kept in HALF:
        value = rule.rounded(ops.cast(value, "float32"), kept, dither)
    return ops.cast(value, kept)


def _remembering(function):
    """Return the function with a memory of its results: `functools.cache`, at which PyTorch's compiler warns."""
    results: dict[tuple[Any, ...], Any] = {}

    def remembered(*arguments):
        if arguments not in results:
            results[arguments] = function(*arguments)
        return results[arguments]

    return remembered


def _widened(values):
    return ops.cast(values, compute_dtype(values.dtype))


def _norm(values):
    squares = [ops.sum(ops.square(x)) for x in values]
    wide = any(compute_dtype(x.dtype) == "float64" for x in squares)
    return root(sum(ops.cast(x, "float64" if wide else "float32") for x in squares))


def _scaled_to_norm(values, norm, limit):
    limit = ops.convert_to_tensor(limit, norm.dtype)
    return values * ops.cast(limit / rule.maximum(limit, norm), values.dtype)
