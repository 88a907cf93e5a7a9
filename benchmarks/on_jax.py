"""One optimizer step on JAX, under `jax.jit` with donated buffers or eagerly: Keras's optimizers and optax's."""

import functools

import cases
import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
import optimizers


def gradients(case: cases.Case) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), case.count)
    return [jax.random.normal(key, (case.elements,)) for key in keys]


def contestants(case: cases.Case, grads) -> dict:
    step = _eager_step if case.mode == "eager" else keras_step
    found = {
        name: functools.partial(step, case, make, grads)
        for name, make in optimizers.optimizers(case).items()
    }
    if case.mode == "jit":
        name = cases.MULTI_STEPS if case.accumulation else cases.OPTAX
        found[name] = functools.partial(_optax_step, case, grads)
    return found


def _eager_step(case, make, grads) -> measure.Step:
    variables = optimizers.new_variables(case)
    optimizer = make(variables)
    optimizer.build(variables)

    def run():
        optimizer.apply(grads, variables)
        # `_value`: the property behind it takes a microsecond for each variable, which is not the optimizer's
        jax.block_until_ready([v._value for v in (*variables, *optimizer.variables)])

    return measure.Step(run, lambda: np.array(variables[0].value))


def keras_step(case, make, grads) -> measure.Step:
    variables = optimizers.new_variables(case)
    optimizer = make(variables)
    optimizer.build(variables)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(values, state, grads):
        return optimizer.stateless_apply(state, grads, values)

    # Copies, since Keras's variables may share a buffer and would go on holding what is donated.
    values = [jnp.array(v.value) for v in variables]
    state = [jnp.array(v.value) for v in optimizer.variables]
    for variable in (*variables, *optimizer.variables):
        variable._value = None  # frees the original
    return _run(case, step, values, state, grads)


def _optax_step(case, grads) -> measure.Step:
    transform = optax.adam(cases.LEARNING_RATE, cases.BETA_1, cases.BETA_2, cases.EPSILON)
    if case.accumulation:
        transform = optax.MultiSteps(transform, case.accumulation)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(values, state, grads):
        updates, state = transform.update(grads, state, values)
        return optax.apply_updates(values, updates), state

    values = [jnp.zeros((case.elements,)) for _ in range(case.count)]
    return _run(case, step, values, transform.init(values), grads)


def _run(case, step, values, state, grads) -> measure.Step:
    carried = [values, state]

    def run():
        for _ in range(case.accumulation or 1):
            carried[:] = step(*carried, grads)
            jax.block_until_ready(carried)

    return measure.Step(run, lambda: np.array(carried[0][0]), case.accumulation or 1)
