"""JAX's engine: an eager step as one compiled call, and branches that carry state."""

import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import keras
import numpy as np
from jax.experimental import sparse
from jax.sharding import NamedSharding, PartitionSpec
from keras.optimizers.schedules import LearningRateSchedule
from keras.src.backend.common.stateless_scope import in_stateless_scope

from keras_adam import hyperparameters, keras_private, rule
from keras_adam.engines.base import (
    Bucket,
    Engine,
    Gradients,
    StepFunction,
    Tensor,
    Variable,
    updated,
)
from keras_adam.groups import NUMERIC
from keras_adam.parameters import Parameter
from keras_adam.paths import path_of
from keras_adam.sparse import Rows
from keras_adam.step_config import StepConfig
from keras_adam.storage import Spec
from keras_adam.tensors import compute_dtype, value_of

_MOST_COMPILED = 16  # kinds of eager step that are kept compiled; see `_pays_to_compile`
_MOST_COUNTED = 256  # kinds of eager step whose number of steps is counted
_OFTEN = 200  # steps of one kind after which compiling it pays
_MOST_AT_ONCE = 256  # variables up to which the first kind of step is compiled at once
_SOMETHING = object()
_HELD_TWICE = next(map(sys.getrefcount, [_SOMETHING]))  # its count, with that of the call
_NO_ARRAYS = (keras.Variable, list, tuple, int, float)
_PIECE = 16  # alike variables that one compiled call updates, if the step is not compiled whole


class JaxEngine(Engine):
    """The work of a step on JAX."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.compiled: dict[tuple[Any, ...], tuple[Any, Any]] = {}  # eager steps, as wholes
        self._is_taken: Tensor = None  # in a branch that is being traced: whether it is taken
        self._times_seen: dict[int, int] = {}  # the other kinds of eager step, by hash

    # An eager step: operation by operation it would take a hundred times as long as one compiled call.

    def run(
        self, step: StepFunction, grads: Gradients, variables: list[Variable], config: StepConfig
    ) -> None:
        grads, iterations = [_as_array(g) for g in grads], self.optimizer._iterations
        is_eager = not self._is_traced(grads) and iterations.value is iterations._value
        in_pieces = len(variables) > _MOST_AT_ONCE and config.only_updates  # which are as fast
        if in_pieces or not (is_eager and self._may_compile()):
            step(grads, variables, config)
            return
        kept, ours = self._changing(variables)
        given = [v.value for v in ours]
        # State that only its variable and this list hold is updated in its own memory; but when JAX looks for NaNs,
        # it needs the arguments again.
        is_needed = jax.config.jax_debug_nans or jax.config.jax_debug_infs
        may_donate = not is_needed and all(n == _HELD_TWICE for n in map(sys.getrefcount, given))
        pattern = tuple(g is None for g in grads)
        key = tuple(map(id, variables)), pattern, config.kind(), self._constants(), may_donate
        if key not in self.compiled:
            if not self._pays_to_compile(key, len(variables)):
                step(grads, variables, config)
                return
            if len(self.compiled) >= _MOST_COMPILED:
                del self.compiled[next(iter(self.compiled))]  # the oldest
            # Keep references, so that an `id` in the key is not reused.
            constraints = [v.constraint for v in self.parameters.variables]
            references = variables, self.optimizer._learning_rate, self._dynamic(), constraints
            stateless = functools.partial(self._stateless_step, step, variables, config)
            donated = 0 if may_donate else ()
            self.compiled[key] = jax.jit(stateless, donate_argnums=donated), references
        assign = self.optimizer.assign if in_stateless_scope() else _assign
        arguments = given, [v.value for v in kept], grads, config.numbers()
        # Python raises Ctrl-C after the call. By then the old state may be donated, so the new one must not be lost.
        # Hence not `results.append(call(*arguments))`: `extend` stores the result before Python looks for signals.
        results: list[list[Tensor]] = []
        try:
            with self.trace.apart():
                results.extend(map(self.compiled[key][0], *([x] for x in arguments)))
            _assign_each(assign, [*ours, *kept], results[0])
        except KeyboardInterrupt:
            for values in results:
                _assign_each(assign, [*ours, *kept], values)
            raise

    def _pays_to_compile(self, key: tuple, count: int) -> bool:
        """Whether to compile an eager step of a new kind: other variables, other options, other gradients of None.

        Otherwise the step runs in pieces. Compiling costs as much time as some 200 steps then save. So the first kind
        is compiled at once, and another one when it has come often; of many variables, as `count` tells, only that.
        """
        seen, kind = self._times_seen, hash(key)
        is_first = not (seen or self.compiled)
        if len(seen) >= _MOST_COUNTED and kind not in seen:
            seen.clear()
        seen[kind] = seen.get(kind, 0) + 1
        pays = seen[kind] > _OFTEN or (is_first and count <= _MOST_AT_ONCE)
        if pays:
            del seen[kind]
        return pays

    def _stateless_step(
        self,
        step: StepFunction,
        variables: list[Variable],
        config: StepConfig,
        ours,
        kept,
        grads,
        numbers,
    ) -> list[Tensor]:
        theirs, state = self._changing(variables)
        changing, values = [*state, *theirs], [*ours, *kept]
        with keras.StatelessScope(zip(changing, values, strict=True)) as scope:
            step(grads, variables, config.with_numbers(numbers))
        return [scope.get_current_value(v) for v in changing]

    def _changing(self, variables: list[Variable]) -> tuple[list[Variable], list[Variable]]:
        """Return all that a step of these may assign to: variables and scalars; then arrays that are ours alone."""
        trained = self.optimizer._trainable_variables
        known = {id(v) for v in trained}
        others = [v for v in variables if id(v) not in known]
        state = self.optimizer.variables
        scalars = [v for v in state if not v.shape]
        return [*trained, *others, *scalars], [v for v in state if v.shape]

    def _is_traced(self, grads: Gradients) -> bool:
        return self.is_compiling() or any(
            isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(grads)
        )

    def _may_compile(self) -> bool:
        hyperparameters = [
            self.optimizer._learning_rate,
            *(g.given(name) for g in self.optimizer._groups for name in NUMERIC),
        ]
        asked = any(
            callable(x) and not isinstance(x, LearningRateSchedule) for x in hyperparameters
        )
        # A hook of a subclass is called in each step, not once for all of them.
        return not (asked or self.optimizer._overrides(*keras_private.STEP_HOOKS))

    def _dynamic(self) -> list[Any]:
        """Return each number of each group that is a schedule, and None for each other."""
        given = [g.given(name) for g in self.optimizer._groups for name in NUMERIC]
        return [x if hyperparameters.is_dynamic(x) else None for x in given]

    def _constants(self) -> tuple[Any, ...]:
        """Return what a compiled step holds as a constant besides its configuration."""
        rate = self.optimizer._learning_rate
        return (
            None if isinstance(rate, keras.Variable) else id(rate),
            tuple(map(id, self.optimizer._trainable_variables)),
            tuple(self.parameters.joinings_of()),
            tuple((id(v.constraint), v.trainable) for v in self.parameters.variables),
            tuple(map(id, self._dynamic())),
            *((g.options, g.stored is None and g.changes) for g in self.optimizer._groups),
        )

    def is_compiling(self) -> bool:
        return isinstance(self.optimizer._iterations.value, jax.core.Tracer)

    def when(self, condition: Tensor, act: Callable[[], None]) -> None:
        if not isinstance(condition, jax.core.Tracer):
            if condition:
                act()
            return
        variables = [v for some in self._changing(self.in_step) for v in some]

        def body(carry):
            is_taken, values = carry
            outer, self._is_taken = self._is_taken, is_taken
            try:
                with keras.StatelessScope(zip(variables, values, strict=True)) as scope:
                    act()
            finally:
                self._is_taken = outer
            return False, [scope.get_current_value(v) for v in variables]

        # A loop that runs zero times or once: unlike `lax.cond`, it works in place on CPU, where `cond` copies every
        # array that passes through it, whether or not the branch is taken.
        carry = (condition, [v.value for v in variables])
        _, values = jax.lax.while_loop(lambda carry: carry[0], body, carry)
        for variable, value in zip(variables, values, strict=True):
            # The loop may return a value in another layout than it was assigned in.
            is_spread = self.optimizer.shard_state
            variable.assign(_laid_out_like(variable, value) if is_spread else value)

    def choose(self, condition: Tensor, one: Callable[[], Any], other: Callable[[], Any]) -> Any:
        if isinstance(condition, jax.core.Tracer):
            return jax.lax.cond(condition, one, other)
        return super().choose(condition, one, other)

    def reset(self, accumulators: list[Variable]) -> None:
        if self._is_taken is None:
            super().reset(accumulators)
            return
        # Within a branch XLA copies an accumulator that is read and then set to a constant. It does not know that the
        # branch is taken; so it computes these zeros in the accumulator's own memory.
        for accumulator in accumulators:
            old = value_of(accumulator)
            zeros = jax.numpy.where(self._is_taken, jax.numpy.zeros_like(old), old)
            self.optimizer.assign(accumulator, zeros)

    # The update of an eager step that is not compiled as a whole: alike variables in pieces.

    def update(self, grads: Gradients, variables: list[Variable], learning_rate: Any) -> None:
        if self.is_compiling() or in_stateless_scope():
            self.update_each(grads, variables, learning_rate)
            return
        scalars = self.scalars(learning_rate)
        assign = self.optimizer.assign if self.optimizer.shard_state else _assign
        for bucket in self.buckets(variables):
            now = scalars(bucket.group, bucket.joined, compute_dtype(bucket.dtype), bucket.decays)
            storages, arrays = bucket.memory
            alike = {
                "options": bucket.group.options,
                "dtype": compute_dtype(bucket.dtype),
                **storages,
            }
            dither = self.dither() if any(x.dithers for x in storages["storages"]) else None
            given = [grads[i] for i in bucket.positions]
            for piece in _pieces(len(arrays)):
                kept = [[x.value for x in of_one] for of_one in arrays[piece]]
                results = _updated_alike(given[piece], kept, now, dither, **alike)
                for of_one, values in zip(arrays[piece], results, strict=True):
                    for variable, value in zip(of_one, values, strict=True):
                        assign(variable, value)

    def bucket(
        self, kind: tuple[Any, ...], positions: list[int], parameters: list[Parameter]
    ) -> Bucket:
        bucket = super().bucket(kind, positions, parameters)
        slots = parameters[0].updated
        storages = {
            "storages": tuple(slot.storage for slot in slots),
            "counts": tuple(len(slot.arrays) for slot in slots),
        }
        arrays = [[x for slot in p.updated for x in slot.arrays] for p in parameters]
        bucket.memory = storages, arrays
        return bucket

    def updated(
        self, gradient: Tensor, kept: Any, scalars: rule.Scalars, dither: Tensor, **options: Any
    ) -> list[list[Tensor]]:
        # One call per variable in the trace, and one function for all that are alike, in place of some 30 operations.
        constants = tuple(x if isinstance(x, int | float) else None for x in scalars)
        rest = rule.Scalars(*(None if isinstance(x, int | float) else x for x in scalars))
        return _updated_one(gradient, kept, rest, dither, constants=constants, **options)

    def step_scalars(self, options: rule.Options, **numbers: Any) -> rule.Scalars:
        if self.is_compiling():  # so that Python's numbers become constants
            return super().step_scalars(options, **numbers)
        return _compiled_scalars(options, **{name: value_of(x) for name, x in numbers.items()})

    def device_of(self, variable: Variable) -> Any:
        return tuple(variable.shape)

    # Sparse gradients

    def densify(self, gradient: Any) -> Tensor:
        if not isinstance(gradient, sparse.JAXSparse):
            return gradient
        if gradient.dtype.itemsize < 4:  # in bfloat16 a sum of ones stops at 256
            gradient = gradient.astype("float32")
        return gradient.todense()

    def sparse_rows(self, gradient: Any) -> Rows | None:
        if not isinstance(gradient, sparse.BCOO) or (gradient.n_batch, gradient.n_sparse) != (0, 1):
            return None
        indices, values, rows = gradient.indices[:, 0], gradient.data, gradient.shape[0]
        indices = jax.numpy.where(indices < 0, indices + rows, indices)
        # Indices beyond the last row are padding.
        counts = ((indices >= 0) & (indices < rows)).reshape(-1, *[1] * (values.ndim - 1))
        return Rows(gradient.shape, indices, jax.numpy.where(counts, values, 0))

    # State that is spread over the data-parallel devices. Gradients take its layout, so that XLA sums and splits them
    # at once. Each device updates its part; then the weights are put together again.

    def slot_layout(self, layout: Any, shape: tuple[int, ...], spec: Spec) -> Any:
        distribution = keras.distribution.distribution()
        axis = getattr(distribution, "batch_dim_name", None)
        sharding = getattr(layout, "backend_layout", layout)  # of Keras's layout, or JAX's own
        if not isinstance(sharding, NamedSharding):
            return layout
        axes = [*sharding.spec] + [None] * (len(shape) - len(sharding.spec))
        if self.optimizer.shard_state and axis:
            axes = _spread(axes, axis, sharding.mesh.shape, shape, spec.unit)
        if spec.shape is not None:
            axes = _axes_of_scales(axes, sharding.mesh.shape, shape, spec)
        if sharding is layout:
            return NamedSharding(sharding.mesh, PartitionSpec(*axes))
        return keras.distribution.TensorLayout(axes, layout.device_mesh)

    def reduce(self, grads: Gradients) -> Gradients:
        if not self.optimizer.shard_state:
            return grads
        states = [self.parameters[v].array("momentum") for v in self.in_step]
        return [
            g if isinstance(g, Rows) else _laid_out_like(state, g)
            for g, state in zip(grads, states, strict=False)
        ]

    def assign(self, variable: Variable, value: Tensor) -> None:
        if self.optimizer.shard_state and isinstance(variable, keras.Variable):
            value = _laid_out_like(variable, keras.ops.cast(value, variable.dtype))
        super().assign(variable, value)

    def whole(self, variable: Variable) -> np.ndarray:
        value = variable.value if isinstance(variable, keras.Variable) else variable
        if isinstance(value, jax.Array) and not (
            value.is_fully_addressable or value.is_fully_replicated
        ):
            from jax.experimental import multihost_utils  # takes time to import

            return multihost_utils.process_allgather(value, tiled=True)
        return super().whole(variable)

    def process(self) -> int:
        return jax.process_index()

    def wait_for_all(self) -> None:
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("keras_adam")

    # Keras's trainer hands over values without saying whose they are: in the order of its model's variables.

    def was_emptied(self) -> bool:
        return self.optimizer._iterations._value is None

    def check_trained(self, variables: list[Variable], unknown: Callable[[Variable], str]) -> None:
        if not self.trace.is_traced:
            return
        other = next((v for v in variables if v not in self.parameters), None)
        if other is not None:
            raise ValueError(
                "The steps just made used other variables' state: on JAX, Keras's trainer hands over values alone. "
                f"{unknown(other)}"
            )
        ours = self.optimizer._trainable_variables
        same = {id(v) for v in variables} == {id(v) for v in ours}
        first = next((v for v, known in zip(variables, ours, strict=False) if v is not known), None)
        if same and first is not None:
            raise ValueError(
                "The optimizer was built for the model's variables in another order, so that the steps just made may "
                "have mixed up their state. Call `optimizer.build(model.trainable_variables)` before `fit`. "
                f"Received: '{path_of(first)}' as the first variable at another place"
            )

    # Differentiation

    def differentiate(
        self, loss_fn: Callable[[], Tensor], variables: list[Variable]
    ) -> tuple[Tensor, list[Any]]:
        # Variables that the loss assigns to, such as the moving statistics of a batch normalisation.
        assigned: list[keras.Variable] = []

        def compute(values):
            with _RecordingScope(zip(variables, values, strict=True)) as scope:
                loss = loss_fn()
                scaled = self.optimizer.scale_loss(loss)
            assigned[:] = scope.assigned
            return scaled, (loss, [scope.get_current_value(v) for v in assigned])

        values = [v.value for v in variables]
        (_, (loss, updates)), grads = jax.value_and_grad(compute, has_aux=True)(values)
        for variable, value in zip(assigned, updates, strict=True):
            variable.assign(value)
        return loss, grads


def _as_array(gradient: Any) -> Any:
    """Return a gradient that is a variable, a list or a number as an array, since `jax.jit` would not."""
    if isinstance(gradient, _NO_ARRAYS):
        return keras.ops.convert_to_tensor(gradient)
    return gradient


def _pieces(count: int) -> Iterator[slice]:
    """Split a number of alike variables into slices of two sizes; each size is compiled once."""
    whole = count - count % _PIECE
    yield from (slice(i, i + _PIECE) for i in range(0, whole, _PIECE))
    yield from (slice(i, i + 1) for i in range(whole, count))


_compiled_scalars = jax.jit(rule.step_scalars, static_argnames=("options", "dtype"))


@functools.partial(jax.jit, static_argnames=("storages", "counts", "options", "dtype"))
def _updated_alike(grads, kept, scalars, dither, *, counts, **alike):
    """Return the new arrays of alike variables; `counts` holds each storage's number of arrays."""

    def of_one(gradient, arrays):
        rest = iter(arrays)
        grouped = [[next(rest) for _ in range(count)] for count in counts]
        return [x for some in updated(gradient, grouped, scalars, dither, **alike) for x in some]

    return [of_one(g, arrays) for g, arrays in zip(grads, kept, strict=True)]


@functools.partial(jax.jit, static_argnames=("constants", "storages", "options", "dtype"))
def _updated_one(gradient, kept, scalars, dither, *, constants, **alike):
    """Return what `updated` does; `constants` are the scalars that are numbers of Python."""
    pairs = zip(scalars, constants, strict=True)
    whole = rule.Scalars(*(x if constant is None else constant for x, constant in pairs))
    return updated(gradient, kept, whole, dither, **alike)


def _assign_each(assign: Any, variables: list[Variable], values: list[Tensor]) -> None:
    for variable, value in zip(variables, values, strict=True):
        assign(variable, value)


def _assign(variable: Variable, value: Tensor) -> None:
    """Assign a value of the right shape and dtype, without the checks that `assign` makes."""
    variable._direct_assign(value)


def _laid_out_like(variable: Variable, value: Tensor) -> Tensor:
    """Return the value spread over devices as the variable is."""
    layout = getattr(variable, "_layout", None)
    return value if layout is None else keras.distribution.distribute_tensor(value, layout)


def _spread(axes: list[Any], axis: str, mesh: Any, shape: tuple[int, ...], unit: int) -> list[Any]:
    """Return the axes of a layout with one more that is split over a mesh's `axis`, if one can be."""
    taken = {name for given in axes for name in (given if isinstance(given, tuple) else [given])}
    devices = mesh.get(axis)
    if devices is None or axis in taken:
        return axes
    for i, size in enumerate(shape):
        if (
            axes[i] is None
            and size
            and size % devices == 0
            and _is_in_units(i, shape, devices, unit)
        ):
            return [*axes[:i], axis, *axes[i + 1 :]]
    return axes


def _axes_of_scales(axes: list[Any], mesh: Any, shape: tuple[int, ...], spec: Spec) -> list[Any]:
    """Return the axes of the layout of scales whose codes have these: each device has the scales of its codes."""
    whole = [None] * len(spec.shape or ())
    for i, given in enumerate(axes):
        names = given if isinstance(given, tuple) else (given,)
        devices = math.prod(mesh[name] for name in names if name is not None)
        if devices > 1 and _is_in_units(i, shape, devices, spec.unit):
            return [given, *whole[1:]]
    return whole


def _is_in_units(i: int, shape: tuple[int, ...], devices: int, unit: int) -> bool:
    """Whether the parts that so many devices have of axis `i` are each so many elements in a row, or a multiple."""
    is_in_one_piece = math.prod(shape[:i]) == 1
    return unit == 1 or (is_in_one_piece and math.prod(shape) // devices % unit == 0)


class _RecordingScope(keras.StatelessScope):
    """A stateless scope that records which variables were assigned in it, and reads from the scope around it."""

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
