"""What JAX does its own way: an eager step as one compiled call, and branches that carry state."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import keras
from jax.experimental import sparse
from jax.sharding import NamedSharding, PartitionSpec
from keras.optimizers.schedules import LearningRateSchedule
from keras.src.backend.common.stateless_scope import in_stateless_scope

from keras_adam import hyperparameters, rule, seams
from keras_adam.groups import NUMERIC
from keras_adam.paths import path_of
from keras_adam.rows import Rows
from keras_adam.state import compute_dtype, value_of
from keras_adam.step import STEP_HOOKS, has_half, updated

_MOST_COMPILED = 16  # kinds of eager step that are kept compiled; see `_pays_to_compile`
_MOST_COUNTED = 256  # kinds of which it is counted how often they came
_OFTEN = 200  # steps of one kind, from which on compiling it pays
_MOST_AT_ONCE = 256  # variables of which a step is compiled when it comes first
_PIECE = 16  # variables that are alike and updated by one compiled call, where the step is not compiled as a whole
_NO_ARRAYS = (keras.Variable, list, tuple, int, float)
# Constants of a compiled step.
_CONSTANTS = (
    "use_ema",
    "ema_overwrite_frequency",
    "gradient_accumulation_steps",
    "lazy",
    "skip_nonfinite",
)
# Its arguments, so that it serves for any value; whether one is None or 0 is a constant.
_NUMBERS = ("clipnorm", "clipvalue", "global_clipnorm", "ema_momentum", "loss_scale_factor")
# What makes a step more than the update of each variable: these go operation by operation where it is not compiled.
_BESIDES_UPDATE = (
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "loss_scale_factor",
    "use_ema",
    "gradient_accumulation_steps",
    "skip_nonfinite",
)


class Backend:
    """Overrides for JAX."""

    _traced: bool
    _traced_rate: Any

    def __init__(self, *args, **kwargs):
        self.__dict__["_compiled"] = {}
        self.__dict__["_times_seen"] = {}  # kinds of eager step that are not compiled
        self.__dict__["_numbers_in_step"] = {}
        # The array of iterations that the last step left, and its number, at most.
        self.__dict__["_counted"] = None, 0
        super().__init__(*args, **kwargs)

    def apply(self, grads, trainable_variables=None):
        with seams.without_autocast():
            self._apply(grads, trainable_variables)

    def _apply(self, grads, trainable_variables):
        # As one compiled call when called eagerly; operation by operation it would take a hundred times as long.
        # Nothing is donated: the caller may hold the arrays.
        grads = [_as_array(g) for g in grads]
        is_eager = not self._is_traced(grads) and self._iterations.value is self._iterations._value
        if grads and is_eager:
            self._check_count_at_most()
        if not (grads and is_eager and self._may_compile()):
            super().apply(grads, trainable_variables)
            return
        variables = self._variables_for(grads, trainable_variables)
        key = tuple(map(id, variables)), tuple(g is None for g in grads), self._constants()
        if key not in self._compiled:
            if not self._pays_to_compile(key, variables):
                super().apply(grads, variables)
                return
            if len(self._compiled) >= _MOST_COMPILED:
                del self._compiled[next(iter(self._compiled))]  # the oldest
            step = jax.jit(functools.partial(self._stateless_step, variables))
            # References, so that an `id` in the key is not used again.
            kept = self._learning_rate, self._dynamic(), [v.constraint for v in self._known]
            self._compiled[key] = step, kept
        changing = self._changing(variables)
        traced = self._traced, self._traced_rate
        assign = self.assign if in_stateless_scope() else _assign
        numbers = {name: getattr(self, name) for name in _NUMBERS if getattr(self, name)}
        values = self._compiled[key][0]([v.value for v in changing], grads, numbers)
        for variable, value in zip(changing, values, strict=True):
            assign(variable, value)
        # What was compiled here is compiled anew when a constant of it changes.
        self._traced, self._traced_rate = traced
        self.__dict__["_counted"] = self._iterations._value, self._counted[1] + 1

    def _pays_to_compile(self, key, variables) -> bool:
        """Whether to compile an eager step of a new kind: other variables, other options, other gradients of None.

        Otherwise the step runs in pieces. Compiling takes as long as what some hundred steps then save, so that it
        pays for the first kind, and for another one that has come often. Where there are many variables and nothing
        but their update to compute, pieces are as fast.
        """
        are_many = len(variables) > _MOST_AT_ONCE
        if are_many and not any(getattr(self, name) for name in _BESIDES_UPDATE):
            return False
        seen, kind = self._times_seen, hash(key)
        is_first = not (seen or self._compiled)
        if len(seen) >= _MOST_COUNTED and kind not in seen:
            seen.clear()
        seen[kind] = seen.get(kind, 0) + 1
        pays = seen[kind] > _OFTEN or (is_first and not are_many)
        if pays:
            del seen[kind]
        return pays

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        if self._overrides_update() or self._is_compiling() or in_stateless_scope():
            self._portable_update_step(grads, trainable_variables, learning_rate)
            return
        scalars = self._scalars(learning_rate)
        assign = self.assign if self.shard_state else _assign
        for bucket in self._buckets(trainable_variables):
            now = scalars(bucket.group, bucket.start, compute_dtype(bucket.dtype), bucket.decays)
            slots = [
                (variable, lost, *moments)
                for variable, lost, moments in zip(
                    bucket.variables, bucket.compensations, bucket.moments, strict=True
                )
            ]
            dither = self._dither() if has_half(*slots[0][1:]) else None
            given = [grads[i] for i in bucket.positions]
            for piece in _pieces(len(slots)):
                values = [[x if x is None else x.value for x in kept] for kept in slots[piece]]
                results = _updated_alike(
                    given[piece], values, now, dither, options=bucket.group.options
                )
                for kept, result in zip(slots[piece], results, strict=True):
                    for variable, value in zip(kept, result, strict=True):
                        if variable is not None:
                            assign(variable, value)

    def _step_scalars(self, options, **numbers):
        if self._is_compiling():  # there Python's numbers are to be constants
            return super()._step_scalars(options, **numbers)
        return _compiled_scalars(options, **{name: value_of(x) for name, x in numbers.items()})

    def _device_of(self, variable):
        return tuple(variable.shape)

    def _number(self, name: str):
        return self._numbers_in_step.get(name, getattr(self, name))

    def _check_count_at_most(self) -> None:
        # The device is asked, which would wait for it, only after the count was set, or where it may be at its end.
        array, count = self._counted
        if array is self._iterations._value and count < 2**30:
            return
        count = int(self._iterations._value)
        self.__dict__["_counted"] = self._iterations._value, count
        self._check_count(count)

    def _increment_iterations(self, by):
        # A compiled step cannot raise. At the end of int32 the count goes round in its last cycle instead of becoming
        # negative: bias corrections are 1 there; accumulation, averages and dither keep their rhythm. Only schedules
        # stand still, as the end of `fit` and an eager step tell.
        count = self._iterations.value
        last = jax.numpy.iinfo(count.dtype).max
        following = jax.numpy.where(count == last, self._last_count(), count + 1)
        self._iterations.assign(jax.numpy.where(by == 0, count, following))

    def _last_count(self):
        last, steps = super()._last_count(), self.gradient_accumulation_steps or 1
        cycle = steps * (self.ema_overwrite_frequency or 1 if self.use_ema else 1)
        is_half = self.state_dtype == "bfloat16" or any(
            x is not None for x in self._slots("_compensations")
        )
        if is_half:
            cycle = math.lcm(cycle, rule.DITHERS)
        return last + 1 - (cycle if cycle <= last else steps)

    def _stateless_step(self, variables, values, grads, numbers):
        changing = self._changing(variables)
        self.__dict__["_numbers_in_step"] = numbers
        try:
            with keras.StatelessScope(zip(changing, values, strict=True)) as scope:
                super().apply(grads, variables)
        finally:
            self.__dict__["_numbers_in_step"] = {}
        return [scope.get_current_value(v) for v in changing]

    def _changing(self, variables):
        known = {id(v) for v in self._trainable_variables}
        others = [v for v in variables if id(v) not in known]
        return [*self._trainable_variables, *others, *self.variables]

    def _is_traced(self, grads) -> bool:
        return self._is_compiling() or any(
            isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(grads)
        )

    def _may_compile(self) -> bool:
        hyperparameters = [
            self._learning_rate,
            *(g.given(name) for g in self._groups for name in NUMERIC),
        ]
        asked = any(
            callable(x) and not isinstance(x, LearningRateSchedule) for x in hyperparameters
        )
        # A hook of a subclass is called in each step, not once for all of them.
        return not (asked or self._overrides(*STEP_HOOKS))

    def _dynamic(self):
        """Return each number of each group that is a schedule, None in place of the others."""
        given = [g.given(name) for g in self._groups for name in NUMERIC]
        return [x if hyperparameters.is_dynamic(x) else None for x in given]

    def _constants(self):
        """Return all that a compiled step holds as a constant."""
        rate = self._learning_rate
        return (
            None if isinstance(rate, keras.Variable) else id(rate),
            tuple(map(id, self._trainable_variables)),
            tuple(self._start_of),
            tuple((id(v.constraint), v.trainable) for v in self._known),
            tuple(map(id, self._dynamic())),
            *((g.options, g.stored is None and g.changes) for g in self._groups),
            *(getattr(self, name) for name in _CONSTANTS),
            *((getattr(self, name) is None, not getattr(self, name)) for name in _NUMBERS),
        )

    # State that is spread over the data-parallel devices: gradients are handed on in its layout, so that XLA sums them
    # and splits them in one; each device updates its part, and the weights are put together again.

    def _slot_layout(self, layout, shape):
        distribution = keras.distribution.distribution()
        axis = getattr(distribution, "batch_dim_name", None)
        sharding = getattr(layout, "backend_layout", layout)  # Keras's layouts and JAX's serve
        if not (self.shard_state and axis and isinstance(sharding, NamedSharding)):
            return layout
        axes = [*sharding.spec] + [None] * (len(shape) - len(sharding.spec))
        taken = {
            name for given in axes for name in (given if isinstance(given, tuple) else [given])
        }
        devices = sharding.mesh.shape.get(axis)
        if devices is None or axis in taken:
            return layout
        for i, size in enumerate(shape):
            if axes[i] is None and size and size % devices == 0:
                axes[i] = axis
                break
        if sharding is layout:
            return NamedSharding(sharding.mesh, PartitionSpec(*axes))
        return keras.distribution.TensorLayout(axes, layout.device_mesh)

    def _reduce(self, grads):
        if not self.shard_state:
            return grads
        states = [self._momentums[self._get_variable_index(v)] for v in self._in_step]
        return [
            g if isinstance(g, Rows) else _laid_out_like(state, g)
            for g, state in zip(grads, states, strict=False)
        ]

    def assign(self, variable, value):
        if self.shard_state and isinstance(variable, keras.Variable):
            value = _laid_out_like(variable, keras.ops.cast(value, variable.dtype))
        super().assign(variable, value)

    def _whole(self, variable):
        value = variable.value if isinstance(variable, keras.Variable) else variable
        if isinstance(value, jax.Array) and not (
            value.is_fully_addressable or value.is_fully_replicated
        ):
            from jax.experimental import multihost_utils  # takes time to import

            return multihost_utils.process_allgather(value, tiled=True)
        return super()._whole(variable)

    def finalize_variable_values(self, var_list):
        # When a train step has failed, Keras's trainer calls this with all variables empty; an error from here would
        # hide the one that matters.
        if self._iterations._value is None:
            return
        # Keras's trainer hands over values without saying whose they are: in the order of its model's variables.
        theirs, ours = list(var_list), self._trainable_variables
        unknown = next((v for v in theirs if not self._is_known(v)), None)
        if self._traced and unknown is not None:
            raise ValueError(
                "The steps just made used other variables' state: on JAX, Keras's trainer hands over values alone. "
                f"{self._unknown(unknown)}"
            )
        same = {id(v) for v in theirs} == {id(v) for v in ours}
        first = next((v for v, known in zip(theirs, ours, strict=False) if v is not known), None)
        if self._traced and same and first is not None:
            raise ValueError(
                "The optimizer was built for the model's variables in another order than the model has them, so that "
                "the state of one may have been used for another in the steps just made. Call "
                "`optimizer.build(model.trainable_variables)` before `fit`. "
                f"Received: '{path_of(first)}' as the first variable that stands elsewhere"
            )
        super().finalize_variable_values(var_list)

    def _is_compiling(self) -> bool:
        return isinstance(self._iterations.value, jax.core.Tracer)

    def _densify(self, gradient):
        if not isinstance(gradient, sparse.JAXSparse):
            return gradient
        if gradient.dtype.itemsize < 4:  # in bfloat16 a sum of ones stops at 256
            gradient = gradient.astype("float32")
        return gradient.todense()

    def _sparse_rows(self, gradient):
        if not isinstance(gradient, sparse.BCOO) or (gradient.n_batch, gradient.n_sparse) != (0, 1):
            return None
        indices, values, rows = gradient.indices[:, 0], gradient.data, gradient.shape[0]
        indices = jax.numpy.where(indices < 0, indices + rows, indices)
        # Beyond the last row stands what only fills up the arrays.
        counts = ((indices >= 0) & (indices < rows)).reshape(-1, *[1] * (values.ndim - 1))
        return Rows(gradient.shape, indices, jax.numpy.where(counts, values, 0))

    def _differentiate(self, loss_fn, variables):
        # What the loss assigns to, such as the moving statistics of a batch normalisation.
        assigned: list[keras.Variable] = []

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
        variables = self._changing(self._in_step)

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
            # What leaves the loop may be split otherwise than what was assigned in it.
            variable.assign(_laid_out_like(variable, value) if self.shard_state else value)


def _as_array(gradient):
    """Return the value of a variable, or an array of a list or a number; `jax.jit` takes none of them as one array."""
    if isinstance(gradient, _NO_ARRAYS):
        return keras.ops.convert_to_tensor(gradient)
    return gradient


def _pieces(count: int):
    """Give slices of so many variables that are alike, of two sizes: each size is compiled once."""
    whole = count - count % _PIECE
    yield from (slice(i, i + _PIECE) for i in range(0, whole, _PIECE))
    yield from (slice(i, i + 1) for i in range(whole, count))


_compiled_scalars = jax.jit(rule.step_scalars, static_argnames=("options", "dtype"))


@functools.partial(jax.jit, static_argnames="options")
def _updated_alike(grads, values, scalars, dither, *, options):
    return [
        updated(g, p, lost, rule.Moments(*moments), scalars, dither, options=options)
        for g, (p, lost, *moments) in zip(grads, values, strict=True)
    ]


def _assign(variable, value) -> None:
    """Assign a value that is of the right shape and dtype, which `assign` would find out for each."""
    variable._direct_assign(value)


def _laid_out_like(variable, value):
    """Return the value spread over devices as the variable is."""
    layout = getattr(variable, "_layout", None)
    return value if layout is None else keras.distribution.distribute_tensor(value, layout)


class _RecordingScope(keras.StatelessScope):
    """A stateless scope that knows which variables were assigned in it, and sees what an outer one holds."""

    def __init__(self, state_mapping):
        super().__init__(state_mapping, collect_losses=True)  # those that layers add
        self.assigned = []

    def get_current_value(self, variable):
        value = super().get_current_value(variable)
        outer = self.original_scope
        return outer.get_current_value(variable) if value is None and outer is not None else value

    def add_update(self, update):
        if not any(update[0] is v for v in self.assigned):
            self.assigned.append(update[0])
        super().add_update(update)
