"""What TensorFlow does its own way: variables with one component per replica, and branches inside a graph."""

from collections.abc import Callable

import keras
import tensorflow as tf


class Backend:
    """Overrides for TensorFlow.

    Keras updates variables through `merge_call`, which may not stand inside `tf.cond`, and clips before it sums over
    the replicas. Here the gradients are summed first; from then on every replica holds the same numbers, so each
    updates its own component of every variable and nothing needs to be merged.
    """

    def assign(self, variable, value):
        variable = _component(variable)
        variable.assign(tf.cast(value, variable.dtype))

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        self._portable_update_step(grads, trainable_variables, learning_rate)

    def _backend_apply_gradients(self, grads, trainable_variables, absent=()):
        if tf.distribute.in_cross_replica_context() and tf.distribute.has_strategy():
            raise ValueError(
                "`apply` must be called in a replica context, through `strategy.run(...)`, as only there "
                "it is known which replica's gradients `grads` are."
            )
        super()._backend_apply_gradients(grads, trainable_variables, absent)

    def _reduce(self, grads):
        context = tf.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync == 1:
            return grads
        return context.all_reduce(tf.distribute.ReduceOp.SUM, grads)

    def _outside_graph(self):
        return tf.init_scope()

    def _is_compiling(self) -> bool:
        return not tf.executing_eagerly()

    def _densify(self, gradient):
        # TensorFlow sums the rows of an id that stands twice, which squaring the slices first would not.
        if isinstance(gradient, tf.IndexedSlices):
            return tf.convert_to_tensor(gradient)
        if isinstance(gradient, tf.SparseTensor):
            return tf.sparse.to_dense(tf.sparse.reorder(gradient))
        return gradient

    def _differentiate(self, loss_fn, variables):
        values = [v.value if isinstance(v, keras.Variable) else v for v in variables]
        with tf.GradientTape() as tape:
            tape.watch(
                values
            )  # also variables that are not trainable, or of another framework's making
            loss = loss_fn()
            scaled = self.scale_loss(loss)
        return loss, tape.gradient(scaled, values)

    def _when(self, condition, update: Callable[[], None]) -> None:
        def run():
            update()
            return tf.no_op()

        tf.cond(condition, run, tf.no_op)


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
