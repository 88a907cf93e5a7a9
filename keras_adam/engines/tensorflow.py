"""TensorFlow's engine: variables with one component per replica, its kernel, and branches inside a graph.

Keras updates variables through `merge_call`, which is not allowed in `tf.cond`, and clips before it sums over the
replicas. Here the gradients are summed first. From then on every replica holds the same numbers, so each updates its
own component of every variable and nothing needs to be merged.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.framework.attr_value_pb2 import AttrValue

from keras_adam import hyperparameters, rule, storage
from keras_adam.engines.base import Bucket, Engine, Gradients, StepFunction, Tensor, Variable
from keras_adam.sparse import Rows
from keras_adam.step_config import StepConfig


class TensorFlowEngine(Engine):
    """The work of a step on TensorFlow."""

    def run(
        self, step: StepFunction, grads: Gradients, variables: list[Variable], config: StepConfig
    ) -> None:
        if tf.distribute.in_cross_replica_context() and tf.distribute.has_strategy():
            raise ValueError(
                "`apply` must be called in a replica context, through `strategy.run(...)`: only there it is known to "
                "which replica `grads` belong."
            )
        # As TensorFlow treats Keras's optimizers: AutoGraph would take as long as all the rest of tracing.
        tf.autograph.experimental.do_not_convert(step)(grads, variables, config)

    def is_compiling(self) -> bool:
        return not tf.executing_eagerly()

    def outside_graph(self) -> contextlib.AbstractContextManager[Any]:
        return tf.init_scope()

    def when(self, condition: Tensor, act: Callable[[], None]) -> None:
        def run():
            act()
            return tf.no_op()

        tf.cond(condition, run, tf.no_op)

    def choose(self, condition: Tensor, one: Callable[[], Any], other: Callable[[], Any]) -> Any:
        results = tf.cond(condition, one, other)
        if not tf.executing_eagerly():
            # TensorFlow would put a switch before each of its hundreds of inputs, which take their time in each step.
            op = results[0].op
            op = op.inputs[0].op if op.type == "Identity" else op
            op._set_attr("_lower_using_switch_merge", AttrValue(b=False))
        return results

    def count(self, is_done: Tensor) -> None:
        if is_done is True:
            self.optimizer._iterations.assign_add(1)  # an int64, which threads may share
        else:
            super().count(is_done)

    def assign(self, variable: Variable, value: Tensor) -> None:
        variable = _component(variable)
        variable.assign(tf.cast(value, variable.dtype))

    def built(self) -> None:
        self.optimizer._joined.set_pending()

    def track(self, variable: Variable, name: str) -> None:
        if variable is not None:
            self.optimizer._track_trackable(variable, name, overwrite=True)

    def reduce(self, grads: Gradients) -> Gradients:
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

    # TensorFlow's kernel: it passes over memory once, in graphs and eagerly; separate operations do so many times.

    def update(self, grads: Gradients, variables: list[Variable], learning_rate: Any) -> None:
        scalars = self.scalars(learning_rate)
        kernel_scalars = self.scalars(learning_rate, for_kernel=True)
        for bucket in self.buckets(variables):
            chosen = [grads[i] for i in bucket.positions]
            if _has_kernel(bucket):
                dtype = bucket.dtype
                now = kernel_scalars(bucket.group, bucket.joined, dtype, bucket.decays)
                chosen = [tf.cast(g, dtype) for g in chosen]
                _kernel_step(bucket, chosen, now, self.optimizer.assign)
            else:
                for gradient, variable in zip(chosen, bucket.variables, strict=True):
                    self.update_one(gradient, variable, scalars)

    # Sparse gradients

    def densify(self, gradient: Any) -> Tensor:
        # The conversion sums the rows of a repeated index, which must be done before they are squared.
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
        # Read a variable now: an update may write to it before its value is used.
        return tf.convert_to_tensor(gradient)

    def sparse_rows(self, gradient: Any) -> Rows | None:
        if not isinstance(gradient, tf.IndexedSlices):
            return None
        values, indices, dense_shape = _tensors_of(gradient)
        if indices.shape.rank != 1:
            indices = tf.ensure_shape(indices, [None])
        rows = None
        if dense_shape is not None:
            known = tf.get_static_value(dense_shape, partial=True)
            rows = None if known is None else known[0]
        # Rows of negative indices are set to zero; the dense conversion leaves them out too.
        values = tf.raw_ops.Select(condition=indices >= 0, x=values, y=tf.zeros_like(values))
        shape = tf.TensorShape([rows]).concatenate(values.shape[1:])
        return Rows(shape, indices, values)

    def take_rows(self, indices: Tensor, variable: Variable) -> Tensor:
        variable = _component(variable)
        return tf.raw_ops.ResourceGather(
            resource=variable.handle, indices=tf.maximum(indices, 0), dtype=variable.dtype
        )

    def put_rows(self, indices: Tensor, variable: Variable, rows: Tensor) -> None:
        variable = _component(variable)
        tf.raw_ops.ResourceScatterNdUpdate(
            ref=variable.handle,
            indices=indices[:, None],
            updates=tf.cast(rows, variable.dtype),
            bad_indices_policy="IGNORE",  # negative ones; `take_rows` refuses those beyond the last row
        )

    def of_its_shape(self, gradient: Any, variable: Variable) -> Any:
        # A shape that the graph does not know is checked when it runs.
        shape = tf.TensorShape(variable.shape)
        if not shape.is_compatible_with(gradient.shape):
            return super().of_its_shape(gradient, variable)
        if isinstance(gradient, Rows):
            values = tf.ensure_shape(gradient.values, [None, *shape[1:]])
            return gradient._replace(shape=shape, values=values)
        return tf.ensure_shape(gradient, shape)

    def differentiate(
        self, loss_fn: Callable[[], Tensor], variables: list[Variable]
    ) -> tuple[Tensor, list[Any]]:
        values = [v.value if isinstance(v, keras.Variable) else v for v in variables]
        with tf.GradientTape() as tape:
            tape.watch(values)  # not only those that are trainable
            loss = loss_fn()
            scaled = self.optimizer.scale_loss(loss)
        return loss, tape.gradient(scaled, values)


def _tensors_of(slices: tf.IndexedSlices):
    """Return values, indices and dense shape as tensors; they may be lists, arrays or a `TensorShape`."""
    indices = tf.convert_to_tensor(slices.indices, dtype_hint=tf.int32)
    if indices.dtype not in (tf.int32, tf.int64):
        indices = tf.cast(indices, tf.int64)
    shape = slices.dense_shape
    if shape is not None:
        shape = tf.convert_to_tensor(shape)
    return tf.convert_to_tensor(slices.values), indices, shape


def _component(variable: Variable) -> Variable:
    """Return this replica's own part of a variable, or the variable where there is only one."""
    if isinstance(variable, keras.Variable):
        variable = variable.value
    # Outside of any strategy, as at the end of `fit`, all parts are meant.
    in_replica = tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context()
    if in_replica and isinstance(variable, tf.distribute.DistributedValues):
        return variable._get()
    return variable


def _has_kernel(bucket: Bucket) -> bool:
    # AMSGrad's kernel is not used: XLA, which `fit` uses by default, does not know it.
    plain = storage.AsItIs(bucket.dtype)
    slots = [slot for p in bucket.parameters for slot in p.updated[1:]]
    return (
        all(slot.storage == plain for slot in slots)
        and bucket.dtype in ("float32", "float64")
        and not bucket.group.options.amsgrad
        and all(_suits_kernel(bucket.group.given(beta)) for beta in ("beta_1", "beta_2"))
    )


def _suits_kernel(beta) -> bool:
    """Whether the kernel is exact for this beta.

    It takes beta in float32, in which `1 - beta` must be right to four digits. And it adds to the old average: with a
    small beta, a new value that is much smaller than the old average loses its digits.
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
    for gradient, parameter, p in zip(grads, parameters, bucket.parameters, strict=True):
        gradient, _ = rule.prepare(gradient, parameter, scalars, options)
        tf.raw_ops.ResourceApplyAdam(
            var=parameter.handle,
            m=_component(p.momentum.arrays[0]).handle,
            v=_component(p.velocity.arrays[0]).handle,
            # The step size already includes the bias corrections.
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
