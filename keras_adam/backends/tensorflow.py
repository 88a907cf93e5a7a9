"""What TensorFlow does its own way: variables with one component per replica, and branches inside a graph."""

import functools
import json
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from keras_adam import hyperparameters, rule
from keras_adam.rows import Rows


class Backend:
    """Overrides for TensorFlow.

    Keras updates variables through `merge_call`, which may not stand inside `tf.cond`, and clips before it sums over
    the replicas. Here the gradients are summed first; from then on every replica holds the same numbers, so each
    updates its own component of every variable and nothing needs to be merged.
    """

    def __init__(self, *args, **kwargs):
        self.__dict__["_joined"] = _Joined(self)
        super().__init__(*args, **kwargs)

    def build(self, variables):
        super().build(variables)
        self._joined.set_pending()

    def assign(self, variable, value):
        variable = _component(variable)
        variable.assign(tf.cast(value, variable.dtype))

    # TensorFlow's kernels: one pass over memory, in graphs and eagerly, where separate operations make many.

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        if self._overrides_update():
            self._portable_update_step(grads, trainable_variables, learning_rate)
            return
        scalars = self._scalars(learning_rate)
        kernel_scalars = self._scalars(learning_rate, for_kernel=True)
        for bucket in self._buckets(trainable_variables):
            chosen = [grads[i] for i in bucket.positions]
            if _has_kernel(bucket):
                dtype = bucket.dtype
                now = kernel_scalars(bucket.group, bucket.start, dtype, bucket.decays)
                _kernel_step(bucket, [tf.cast(g, dtype) for g in chosen], now, self.assign)
            else:
                for gradient, variable in zip(chosen, bucket.variables, strict=True):
                    self._update_one(gradient, variable, scalars)

    def _backend_apply_gradients(self, grads, trainable_variables):
        if tf.distribute.in_cross_replica_context() and tf.distribute.has_strategy():
            raise ValueError(
                "`apply` must be called in a replica context, through `strategy.run(...)`, as only there "
                "it is known which replica's gradients `grads` are."
            )
        super()._backend_apply_gradients(grads, trainable_variables)

    def _reduce(self, grads):
        context = tf.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync == 1:
            return grads
        # Rows are gathered from all replicas, to be summed like those of one.
        slices = [
            tf.IndexedSlices(g.values, g.indices) if isinstance(g, Rows) else g for g in grads
        ]
        reduced = context.all_reduce(tf.distribute.ReduceOp.SUM, slices)
        return [
            g._replace(indices=r.indices, values=r.values) if isinstance(g, Rows) else r
            for g, r in zip(grads, reduced, strict=True)
        ]

    def _sparse_rows(self, gradient):
        if not isinstance(gradient, tf.IndexedSlices):
            return None
        values, indices, dense_shape = _tensors_of(gradient)
        if indices.shape.rank != 1:
            indices = tf.ensure_shape(indices, [None])
        rows = None
        if dense_shape is not None:
            known = tf.get_static_value(dense_shape, partial=True)
            rows = None if known is None else known[0]
        # A row of a negative index counts for nothing, as where a dense gradient is made of them.
        values = tf.raw_ops.Select(condition=indices >= 0, x=values, y=tf.zeros_like(values))
        shape = tf.TensorShape([rows]).concatenate(values.shape[1:])
        return Rows(shape, indices, values)

    def _take_rows(self, indices, variable, dtype):
        variable = _component(variable)
        rows = tf.raw_ops.ResourceGather(
            resource=variable.handle, indices=tf.maximum(indices, 0), dtype=variable.dtype
        )
        return tf.cast(rows, dtype)

    def _put_rows(self, indices, variable, rows):
        variable = _component(variable)
        tf.raw_ops.ResourceScatterNdUpdate(
            ref=variable.handle,
            indices=indices[:, None],
            updates=tf.cast(rows, variable.dtype),
            bad_indices_policy="IGNORE",  # those that are negative; `_take_rows` refuses what is beyond the last row
        )

    def _of_its_shape(self, gradient, variable):
        # What a graph does not know is checked when it runs. An optimizer of Keras goes on without a check.
        shape = tf.TensorShape(variable.shape)
        if not shape.is_compatible_with(gradient.shape):
            return super()._of_its_shape(gradient, variable)
        if isinstance(gradient, Rows):
            values = tf.ensure_shape(gradient.values, [None, *shape[1:]])
            return gradient._replace(shape=shape, values=values)
        return tf.ensure_shape(gradient, shape)

    # `tf.train.Checkpoint`. Keras's list of all state variables is in the order in which they were made, which depends
    # on when a group was added. With groups, a checkpoint holds a list per kind of state instead, each group's numbers
    # by name, and when each variable joined.

    def _trackable_children(self, save_type="checkpoint", **kwargs):
        children = super()._trackable_children(save_type, **kwargs)
        if save_type == "checkpoint" and self._has_groups:
            children = {k: v for k, v in children.items() if k not in ("_variables", "_starts")}
            children["_joined"] = self._joined
        return children

    def _lookup_dependency(self, name, cached_dependencies=None):
        if name == "_joined":
            return self._joined
        if name == "_variables" and self._has_groups:
            return None
        return super()._lookup_dependency(name, cached_dependencies)

    def _store_numbers(self):
        super()._store_numbers()
        names = ["hyperparameters"]
        names += [f"hyperparameters_{i}" for i in range(len(self._groups) - 1)]
        groups = [self._default_group, *self._selecting_groups()]
        for name, group in zip(names, groups, strict=True):
            if group.stored is not None:
                self._track_trackable(group.stored, name, overwrite=True)

    def _outside_graph(self):
        return tf.init_scope()

    def _is_compiling(self) -> bool:
        return not tf.executing_eagerly()

    def _densify(self, gradient):
        # TensorFlow sums the rows of an id that stands twice, which squaring the slices first would not.
        if isinstance(gradient, tf.IndexedSlices):
            values, indices, dense_shape = _tensors_of(gradient)
            if values.dtype.size < 4:  # in bfloat16 a sum of ones stops at 256
                values = tf.cast(values, tf.float32)
            return tf.convert_to_tensor(tf.IndexedSlices(values, indices, dense_shape))
        if isinstance(gradient, tf.SparseTensor):
            return tf.sparse.to_dense(tf.sparse.reorder(gradient))
        if isinstance(gradient, tf.RaggedTensor):
            raise TypeError(
                "A gradient must be a tensor, `tf.IndexedSlices` or `tf.SparseTensor`; `gradient.to_tensor()` makes "
                f"a tensor of it. Received: a RaggedTensor of shape {gradient.shape}"
            )
        # A variable is read now: another one's update may write to it before it is used.
        return tf.convert_to_tensor(gradient)

    def _differentiate(self, loss_fn, variables):
        values = [v.value if isinstance(v, keras.Variable) else v for v in variables]
        with tf.GradientTape() as tape:
            tape.watch(values)  # not only those that are trainable
            loss = loss_fn()
            scaled = self.scale_loss(loss)
        return loss, tape.gradient(scaled, values)

    def _when(self, condition, update: Callable[[], None]) -> None:
        def run():
            update()
            return tf.no_op()

        tf.cond(condition, run, tf.no_op)


class _Joined(tf.train.experimental.PythonState):
    """At which update each variable joined, 0 being the beginning, as a `tf.train.Checkpoint` holds it."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self._pending = None  # what was restored before `build`

    def serialize(self):
        optimizer = self._optimizer
        starts = [int(start.numpy()) for start in optimizer._starts]
        return json.dumps([0 if i is None else starts[i] for i in optimizer._start_of])

    def deserialize(self, string_value):
        # TensorFlow calls this before it restores any variable.
        self._pending = json.loads(string_value)
        self.set_pending()

    def set_pending(self):
        optimizer = self._optimizer
        if self._pending is None or not optimizer._known:
            return
        joined, self._pending = self._pending, None
        if len(joined) != len(optimizer._known):
            raise ValueError(
                f"Optimizer '{optimizer.name}': the checkpoint holds the state of {len(joined)} variables. Build the "
                "optimizer for all of them, and call `add_param_group` for those of a late group, before `restore`. "
                f"Received: an optimizer built for {len(optimizer._known)} variables"
            )
        with optimizer._outside_graph():
            optimizer._check_starts(joined)
            optimizer._set_starts(joined)


def _tensors_of(slices: tf.IndexedSlices):
    """Return values, indices and dense shape as tensors, which lists, arrays and a `TensorShape` serve for."""
    indices = tf.convert_to_tensor(slices.indices, dtype_hint=tf.int32)
    if indices.dtype not in (tf.int32, tf.int64):
        indices = tf.cast(indices, tf.int64)
    shape = slices.dense_shape
    if shape is not None:
        shape = tf.convert_to_tensor(shape)
    return tf.convert_to_tensor(slices.values), indices, shape


def _component(variable):
    """Return this replica's own part of a variable, or the variable where there is only one."""
    if isinstance(variable, keras.Variable):
        variable = variable.value
    if (
        isinstance(variable, tf.distribute.DistributedValues)
        and not tf.distribute.in_cross_replica_context()
    ):
        return variable._get()
    return variable


def _has_kernel(bucket) -> bool:
    # AMSGrad's kernel is not used: XLA, which `fit` uses by default, does not know it.
    same = all(m.m.dtype == m.v.dtype == bucket.dtype for m in bucket.moments)
    return (
        same
        and bucket.dtype in ("float32", "float64")
        and not bucket.group.options.amsgrad
        and all(_suits_kernel(bucket.group.given(beta)) for beta in ("beta_1", "beta_2"))
    )


def _suits_kernel(beta) -> bool:
    """Whether the kernel is exact for this beta.

    It takes beta in float32, which must leave `1 - beta` to four digits, and it adds the distance to the new value to
    the old average, which for a small beta loses the new value's digits where the old average is much greater.
    """
    if hyperparameters.is_dynamic(beta) or beta < 0.5:
        return False
    rate = rule.complement(beta)
    return abs(rule.complement(float(np.float32(beta))) - rate) <= 1e-4 * rate


def _kernel_step(bucket, grads, scalars, assign) -> None:
    options = bucket.group.options
    parameters = [_component(v) for v in bucket.variables]
    if scalars.decay is not None:
        # A decay that can be set while training costs a pass over memory only while it is not zero.
        zero = bucket.group.stored is not None and scalars.decay == 0
        decouple = functools.partial(_decay, grads, parameters, scalars, options, assign)
        if options.decoupled_weight_decay:
            tf.cond(zero, tf.no_op, decouple) if tf.is_tensor(zero) else decouple()
    for gradient, parameter, moments in zip(grads, parameters, bucket.moments, strict=True):
        gradient, _ = rule.prepare(gradient, parameter, scalars, options)
        tf.raw_ops.ResourceApplyAdam(
            var=parameter.handle,
            m=_component(moments.m).handle,
            v=_component(moments.v).handle,
            # The step size has the bias corrections in it already.
            beta1_power=tf.zeros((), gradient.dtype),
            beta2_power=tf.zeros((), gradient.dtype),
            lr=scalars.step_size,
            beta1=rule.complement(tf.cast(scalars.rate_1, gradient.dtype)),
            beta2=rule.complement(tf.cast(scalars.rate_2, gradient.dtype)),
            epsilon=tf.cast(scalars.epsilon, gradient.dtype),
            grad=gradient,
        )


def _decay(grads, parameters, scalars, options, assign):
    for gradient, parameter in zip(grads, parameters, strict=True):
        assign(parameter, rule.prepare(gradient, parameter, scalars, options)[1])
    return tf.no_op()
