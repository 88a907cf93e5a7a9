"""One optimizer step on TensorFlow, as a graph or compiled by XLA: Keras's optimizers and TensorFlow's kernel."""

import functools

import cases
import measure
import optimizers
import tensorflow as tf

# It takes one function for each contestant for one function traced again and again.
tf.get_logger().setLevel("ERROR")


def gradients(case: cases.Case) -> list:
    """Return variables: a graph would hold small tensors as constants, and compute with them in advance."""
    tf.random.set_seed(0)
    if case.work == "embedding":
        rows = tf.random.uniform((512,), 0, case.count, tf.int32)
        return [(tf.Variable(tf.random.normal((512, case.elements))), tf.Variable(rows))]
    return [
        tf.Variable(tf.random.normal((case.elements,)), trainable=False) for _ in range(case.count)
    ]


def contestants(case: cases.Case, grads) -> dict:
    found = {
        name: functools.partial(keras_step, case, make, grads)
        for name, make in optimizers.optimizers(case).items()
    }
    if case.work == "step":
        found[cases.KERNEL] = functools.partial(_kernel_step, case, grads)
    return found


def keras_step(case, make, grads) -> measure.Step:
    variables = optimizers.new_variables(case)
    optimizer = make(variables)
    optimizer.build(variables)

    @tf.function(jit_compile=case.mode == "XLA")
    def step():
        optimizer.apply(_read(case, grads), variables)

    steps = case.accumulation or 1

    def run():
        for _ in range(steps):
            step()

    read = None if case.work == "embedding" else lambda: variables[0].numpy()
    return measure.Step(run, read, steps)


def _read(case, grads) -> list:
    if case.work != "embedding":
        return [tf.convert_to_tensor(g) for g in grads]
    shape = tf.constant([case.count, case.elements])
    return [
        tf.IndexedSlices(tf.convert_to_tensor(values), tf.convert_to_tensor(rows), shape)
        for values, rows in grads
    ]


def _kernel_step(case, grads) -> measure.Step:
    zeros = tf.zeros((case.elements,))
    slots = [tuple(tf.Variable(zeros) for _ in range(3)) for _ in range(case.count)]
    powers = tf.Variable(cases.BETA_1), tf.Variable(cases.BETA_2)

    @tf.function(jit_compile=case.mode == "XLA")
    def step():
        beta1_power, beta2_power = (tf.convert_to_tensor(x) for x in powers)
        for (variable, m, v), gradient in zip(slots, grads, strict=True):
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle,
                m=m.handle,
                v=v.handle,
                beta1_power=beta1_power,
                beta2_power=beta2_power,
                lr=cases.LEARNING_RATE,
                beta1=cases.BETA_1,
                beta2=cases.BETA_2,
                epsilon=cases.EPSILON,
                grad=tf.convert_to_tensor(gradient),
            )
        powers[0].assign(beta1_power * cases.BETA_1)
        powers[1].assign(beta2_power * cases.BETA_2)

    return measure.Step(step, lambda: slots[0][0].numpy())
