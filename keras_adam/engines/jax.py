"""JAX's engine: an eager step as one compiled call, and branches that carry state."""

import functools
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
from keras_adam.tensors import compute_dtype, value_of

_MOST_COMPILED = 16  # kinds of eager step that are kept compiled; see `_pays_to_compile`
_MOST_COUNTED = 256  # kinds of which it is counted how often they came
_OFTEN = 200  # steps of one kind, from which on compiling it pays
_MOST_AT_ONCE = 256  # variables of which a step is compiled when it comes first
_NO_ARRAYS = (keras.Variable, list, tuple, int, float)
_PIECE = 16  # variables that are alike and updated by one compiled call, where the step is not compiled as a whole


class JaxEngine(Engine):
    """The work of a step on JAX."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.compiled: dict[tuple[Any, ...], tuple[Any, Any]] = {}  # eager steps, as wholes
        self._times_seen: dict[int, int] = {}  # kinds of eager step that are not

    # An eager step: operation by operation it would take a hundred times as long as one compiled call.

    def run(
        self, step: StepFunction, grads: Gradients, variables: list[Variable], config: StepConfig
    ) -> None:
        grads, iterations = [_as_array(g) for g in grads], self.optimizer._iterations
        is_eager = not self._is_traced(grads) and iterations.value is iterations._value
        if not (is_eager and self._may_compile()):
            step(grads, variables, config)
            return
        pattern = tuple(g is None for g in grads)
        key = tuple(map(id, variables)), pattern, config.kind(), self._constants()
        if key not in self.compiled:
            if not self._pays_to_compile(key, variables, config):
                step(grads, variables, config)
                return
            if len(self.compiled) >= _MOST_COMPILED:
                del self.compiled[next(iter(self.compiled))]  # the oldest
            # References, so that an `id` in the key is not used again.
            constraints = [v.constraint for v in self.parameters.variables]
            kept = variables, self.optimizer._learning_rate, self._dynamic(), constraints
            stateless = jax.jit(functools.partial(self._stateless_step, step, variables, config))
            self.compiled[key] = stateless, kept
        changing = self._changing(variables)
        assign = self.optimizer.assign if in_stateless_scope() else _assign
        # Nothing is donated: the caller may hold the arrays.
        with self.trace.apart():
            values = self.compiled[key][0]([v.value for v in changing], grads, config.numbers())
        for variable, value in zip(changing, values, strict=True):
            assign(variable, value)

    def _pays_to_compile(self, key: tuple, variables: list[Variable], config: StepConfig) -> bool:
        """Whether to compile an eager step of a new kind: other variables, other options, other gradients of None.

        Otherwise the step runs in pieces. Compiling takes as long as what some hundred steps then save, so that it
        pays for the first kind, and for another one that has come often. Where there are many variables and nothing
        but their update to compute, pieces are as fast.
        """
        are_many = len(variables) > _MOST_AT_ONCE
        if are_many and config.only_updates:
            return False
        seen, kind = self._times_seen, hash(key)
        is_first = not (seen or self.compiled)
        if len(seen) >= _MOST_COUNTED and kind not in seen:
            seen.clear()
        seen[kind] = seen.get(kind, 0) + 1
        pays = seen[kind] > _OFTEN or (is_first and not are_many)
        if pays:
            del seen[kind]
        return pays

    def _stateless_step(
        self,
        step: StepFunction,
        variables: list[Variable],
        config: StepConfig,
        values,
        grads,
        numbers,
    ) -> list[Tensor]:
        changing = self._changing(variables)
        with keras.StatelessScope(zip(changing, values, strict=True)) as scope:
            step(grads, variables, config.with_numbers(numbers))
        return [scope.get_current_value(v) for v in changing]

    def _changing(self, variables: list[Variable]) -> list[Variable]:
        """Return all variables that a step of these may assign to."""
        trained = self.optimizer._trainable_variables
        known = {id(v) for v in trained}
        others = [v for v in variables if id(v) not in known]
        return [*trained, *others, *self.optimizer.variables]

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
        """Return each number of each group that is a schedule, None in place of the others."""
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
        variables = self._changing(self.in_step)

        def body(carry):
            _, values = carry
            with keras.StatelessScope(zip(variables, values, strict=True)) as scope:
                act()
            return False, [scope.get_current_value(v) for v in variables]

        # A loop that runs zero times or once: unlike `lax.cond`, it works in place on CPU, where `cond` copies every
        # array that passes through it, whether or not the branch is taken.
        carry = (condition, [v.value for v in variables])
        _, values = jax.lax.while_loop(lambda carry: carry[0], body, carry)
        for variable, value in zip(variables, values, strict=True):
            # What leaves the loop may be split otherwise than what was assigned in it.
            is_spread = self.optimizer.shard_state
            variable.assign(_laid_out_like(variable, value) if is_spread else value)

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

    def step_scalars(self, options: rule.Options, **numbers: Any) -> rule.Scalars:
        if self.is_compiling():  # there Python's numbers are to be constants
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
        # Beyond the last row stands what only fills up the arrays.
        counts = ((indices >= 0) & (indices < rows)).reshape(-1, *[1] * (values.ndim - 1))
        return Rows(gradient.shape, indices, jax.numpy.where(counts, values, 0))

    # State that is spread over the data-parallel devices: gradients are handed on in its layout, so that XLA sums them
    # and splits them in one; each device updates its part, and the weights are put together again.

    def slot_layout(self, layout: Any, shape: tuple[int, ...]) -> Any:
        distribution = keras.distribution.distribution()
        axis = getattr(distribution, "batch_dim_name", None)
        sharding = getattr(layout, "backend_layout", layout)  # Keras's layouts and JAX's serve
        if not (self.optimizer.shard_state and axis and isinstance(sharding, NamedSharding)):
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
                "The optimizer was built for the model's variables in another order than the model has them, so that "
                "the state of one may have been used for another in the steps just made. Call "
                "`optimizer.build(model.trainable_variables)` before `fit`. "
                f"Received: '{path_of(first)}' as the first variable that stands elsewhere"
            )

    # Differentiation

    def differentiate(
        self, loss_fn: Callable[[], Tensor], variables: list[Variable]
    ) -> tuple[Tensor, list[Any]]:
        # What the loss assigns to, such as the moving statistics of a batch normalisation.
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
    """Return the value of a variable, or an array of a list or a number; `jax.jit` takes none of them as one array."""
    if isinstance(gradient, _NO_ARRAYS):
        return keras.ops.convert_to_tensor(gradient)
    return gradient


def _pieces(count: int) -> Iterator[slice]:
    """Give slices of so many variables that are alike, of two sizes: each size is compiled once."""
    whole = count - count % _PIECE
    yield from (slice(i, i + _PIECE) for i in range(0, whole, _PIECE))
    yield from (slice(i, i + 1) for i in range(whole, count))


_compiled_scalars = jax.jit(rule.step_scalars, static_argnames=("options", "dtype"))


@functools.partial(jax.jit, static_argnames=("storages", "counts", "options", "dtype"))
def _updated_alike(grads, kept, scalars, dither, *, counts, **alike):
    """Return what is to be kept of variables that are alike; `counts` tells how many arrays each storage has."""

    def of_one(gradient, arrays):
        rest = iter(arrays)
        grouped = [[next(rest) for _ in range(count)] for count in counts]
        return [x for some in updated(gradient, grouped, scalars, dither, **alike) for x in some]

    return [of_one(g, arrays) for g, arrays in zip(grads, kept, strict=True)]


def _assign(variable: Variable, value: Tensor) -> None:
    """Assign a value that is of the right shape and dtype, which `assign` would find out for each."""
    variable._direct_assign(value)


def _laid_out_like(variable: Variable, value: Tensor) -> Tensor:
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
