"""Problems, and one way to run each optimizer over them."""

import contextlib

import jax
import keras
import numpy as np
import optax

from support import reference

try:
    from jax import enable_x64
except ImportError:  # an older JAX
    from jax.experimental import enable_x64

# The empty one last: a problem may leave it out.
SHAPES = {"matrix": (4, 3), "vector": (7,), "scalar": (), "empty": (0, 3)}
# Steps at which trajectories are compared: an error in a bias correction fades with time.
RECORDED = (1, 2, 10, 50, 200)


def random_problem(rng, steps):
    """Return start values, and for each step the gradients, from 1e-5 to 1e2 in size.

    Every element varies around a size of its own, so that some are near epsilon.
    """
    starts = [rng.standard_normal(shape).astype("float32") for shape in SHAPES.values()]
    stacked = [random_gradients(rng, steps, shape) for shape in SHAPES.values()]
    return starts, [list(gradients) for gradients in zip(*stacked, strict=True)]


def without_empty(problem):
    """For Keras, whose EMA crashes on a variable without elements in a `tf.function`."""
    starts, gradients = problem
    return starts[:-1], [arrays[:-1] for arrays in gradients]


def random_gradients(rng, steps, shape):
    exponent = rng.uniform(-5, 2, shape) + rng.uniform(-1, 1, (steps, *shape))
    sign = rng.choice([-1.0, 1.0], (steps, *shape))
    return np.asarray(sign * 10 ** np.clip(exponent, -5, 2), dtype="float32")


def make_variables(starts, dtype="float32"):
    return [
        keras.Variable(start, dtype=dtype, name=name)
        for name, start in zip(SHAPES, starts, strict=False)
    ]


def to_tensors(gradients, dtype="float32"):
    return [keras.ops.convert_to_tensor(g, dtype=dtype) for g in gradients]


def to_numpy(variables):
    """Return copies, since a torch variable's array is the memory that the next step writes to."""
    return [
        np.array(keras.ops.convert_to_numpy(as_numpy_knows_it(v)), "float64") for v in variables
    ]


def as_numpy_knows_it(variable):
    if variable.dtype == "bfloat16":
        return keras.ops.cast(variable, "float32")
    return keras.ops.convert_to_tensor(variable)


def float64_allowed():
    """JAX knows float64 only on request."""
    on_jax = keras.backend.backend() == "jax"
    return enable_x64(True) if on_jax else contextlib.nullcontext()


def run(optimizer, starts, gradients, dtype="float32", constraints=None, compiled=True):
    """The values of the variables at the RECORDED steps, as {step: arrays}.

    Steps are compiled as in `fit` (`jax.jit`, `tf.function`, eager in torch), and to be quick the
    loop over them as well. With `compiled=False` all are plain calls of `apply`.
    """
    variables = make_variables(starts, dtype)
    for variable, constraint in zip(variables, constraints or [], strict=bool(constraints)):
        variable.constraint = constraint
    optimizer.build(variables)
    loop = LOOPS[keras.backend.backend()] if compiled else EagerLoop
    loop = loop(
        optimizer, variables, to_tensors(map(np.stack, zip(*gradients, strict=True)), dtype)
    )
    trajectory, done = {}, 0
    for step in recorded(len(gradients)):
        loop.advance(done, step)
        trajectory[step], done = to_numpy(variables), step
    return trajectory


class EagerLoop:
    """Takes steps from one index to another; `gradients` holds those of all steps, stacked."""

    def __init__(self, optimizer, variables, gradients):
        self.optimizer, self.variables, self.gradients = optimizer, variables, gradients

    def advance(self, start, stop):
        for i in range(start, stop):
            self.optimizer.apply([g[i] for g in self.gradients], self.variables)


class JitLoop(EagerLoop):
    def __init__(self, optimizer, variables, gradients):
        super().__init__(optimizer, variables, gradients)
        self.loop = jax.jit(self.pure_loop)

    def advance(self, start, stop):
        known = [self.variables, self.optimizer.variables]
        carry = self.loop(start, stop, [[v.value for v in vs] for vs in known])
        for variables, values in zip(known, carry, strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)

    def pure_loop(self, start, stop, carry):
        def body(i, carry):
            values, state = carry
            gradients = [g[i] for g in self.gradients]
            return list(self.optimizer.stateless_apply(state, gradients, values))

        return jax.lax.fori_loop(start, stop, body, carry)


class GraphLoop(EagerLoop):
    def __init__(self, optimizer, variables, gradients):
        super().__init__(optimizer, variables, gradients)
        import tensorflow as tf

        @tf.function(autograph=False)
        def loop(start, stop):
            def body(i):
                optimizer.apply([g[i] for g in gradients], variables)
                return i + 1

            tf.while_loop(lambda i: i < stop, body, [start])

        self.advance = lambda start, stop: loop(tf.constant(start), tf.constant(stop))


LOOPS = {"jax": JitLoop, "tensorflow": GraphLoop, "torch": EagerLoop}


def run_reference(starts, gradients, **options):
    adam = reference.Adam(starts, **options)
    return record(adam.step, lambda: list(adam.parameters), gradients)


def run_torch(optimizer_class, starts, gradients, **options):
    """In float64."""
    import torch  # here, so that most tests run where it is not installed

    parameters = [torch.nn.Parameter(torch.tensor(start).double()) for start in starts]
    optimizer = optimizer_class(parameters, **options)

    def step(arrays):
        for parameter, array in zip(parameters, arrays, strict=True):
            parameter.grad = torch.tensor(array).double()
        optimizer.step()

    return record(step, lambda: [p.detach().numpy().copy() for p in parameters], gradients)


def run_optax(make_transformation, starts, gradients):
    """In float64."""
    with enable_x64(True):
        transformation = make_transformation()
        values = [jax.numpy.asarray(start, dtype="float64") for start in starts]
        state = transformation.init(values)

        @jax.jit
        def update(arrays, state, values):
            updates, state = transformation.update(arrays, state, values)
            return optax.apply_updates(values, updates), state

        def step(arrays):
            nonlocal values, state
            values, state = update([np.float64(a) for a in arrays], state, values)

        return record(step, lambda: [np.asarray(v) for v in values], gradients)


def record(step, read, gradients):
    trajectory = {}
    for count, arrays in enumerate(gradients, 1):
        step(arrays)
        if count in recorded(len(gradients)):
            trajectory[count] = read()
    return trajectory


def recorded(steps):
    return [step for step in RECORDED if step < steps] + [steps]


def assert_same_trajectory(actual, desired, tolerance):
    assert list(actual) == list(desired)
    for step, arrays in desired.items():
        assert len(actual[step]) == len(arrays)
        for name, got, want in zip(SHAPES, actual[step], arrays, strict=False):
            np.testing.assert_allclose(got, want, err_msg=f"{name} at step {step}", **tolerance)
