"""PyTorch's argument names, defaults, and ways to take a step."""

import inspect

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops

import keras_adam
import reference
from helpers import assert_same_trajectory, random_problem, run, run_torch
from steps import BACKEND, KERAS
from tolerances import TOLERANCES

torch.set_num_threads(1)  # For tensors this small a second thread only costs.

ON_TORCH = BACKEND == "torch"
STEP = {"rtol": 1e-5, "atol": 1e-6}  # a few steps in float32


def array(x):
    return np.array(ops.convert_to_numpy(x))


# ---------------------------------------------------------------------------------------------------------------------
# with_torch_arguments


def test_arguments_are_pytorchs():
    """Names, order and defaults of those that have a meaning here."""
    ours = inspect.signature(keras_adam.Adam.with_torch_arguments).parameters
    theirs = inspect.signature(torch.optim.Adam).parameters
    positional = ["lr", "betas", "eps", "weight_decay", "amsgrad"]
    assert list(ours)[:5] == positional == list(theirs)[1:6]
    for name in [*positional, "maximize", "decoupled_weight_decay"]:
        assert ours[name].default == theirs[name].default
    optimizer = keras_adam.Adam.with_torch_arguments()
    group, want = optimizer.param_groups[0], torch.optim.Adam([torch.zeros(1)]).defaults
    names = [*positional, "maximize", "decoupled_weight_decay"]
    assert {n: group[n] for n in names} == {n: want[n] for n in names}
    assert group["epsilon_hat"] is False


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 2e-3, "betas": (0.8, 0.99), "weight_decay": 0.1},
        {"eps": 1e-2, "weight_decay": 0.1, "amsgrad": True},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
    ids=["defaults", "L2", "amsgrad", "maximize", "decoupled"],
)
def test_trajectory_is_pytorchs(rng, options):
    starts, gradients = random_problem(rng, steps=100)
    got = run(keras_adam.Adam.with_torch_arguments(**options), starts, gradients)
    options = dict(options)
    decoupled = options.pop("decoupled_weight_decay", False)
    torch_class = torch.optim.AdamW if decoupled else torch.optim.Adam
    want = run_torch(torch_class, starts, gradients, **options)
    assert_same_trajectory(got, want, TOLERANCES["float32"])


def test_adamw_is_pytorchs_adamw(rng):
    """What it is called decides: a class of that name with an L2 penalty would be a trap."""
    starts, gradients = random_problem(rng, steps=10)
    got = run(keras_adam.AdamW.with_torch_arguments(weight_decay=0.1), starts, gradients)
    want = run_torch(torch.optim.AdamW, starts, gradients, weight_decay=0.1)
    assert_same_trajectory(got, want, TOLERANCES["float32"])


def test_positional_arguments_and_keras_options():
    optimizer = keras_adam.Adam.with_torch_arguments(
        0.5, (0.25, 0.75), 1e-3, 0.125, True, clipnorm=2.0, epsilon_hat=True, name="mine"
    )
    assert optimizer.param_groups[0]["betas"] == (0.25, 0.75)
    assert (optimizer.epsilon, optimizer.weight_decay, optimizer.amsgrad) == (1e-3, 0.125, True)
    assert (optimizer.clipnorm, optimizer.epsilon_hat, optimizer.name) == (2.0, True, "mine")
    assert float(optimizer.learning_rate) == 0.5


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.99, 0.999), (0.9, 1.0)])
def test_betas_must_be_a_pair(betas):
    with pytest.raises(ValueError, match="beta"):
        keras_adam.Adam.with_torch_arguments(betas=betas)


# ---------------------------------------------------------------------------------------------------------------------
# minimize

START = np.array([3.0, -1.0], "float32"), np.array([0.5, 2.0], "float32")
TARGET = np.array([1.0, 1.0], "float32")


class Problem:
    """The squared distance of the product of two variables from a target, here and in NumPy."""

    def __init__(self, **options):
        self.variables = [keras.Variable(x, name=n) for x, n in zip(START, "ab", strict=True)]
        self.optimizer = keras_adam.Adam.with_torch_arguments(lr=0.1, eps=0.1, **options)
        self.expected = reference.Adam(START, learning_rate=0.1, epsilon=0.1, epsilon_hat=False)

    def loss(self):
        a, b = self.variables
        return ops.sum(ops.square(ops.subtract(a * b, TARGET)))

    def expect_step(self):
        """Return the loss before the step."""
        a, b = self.expected.parameters
        slope = 2 * (a * b - TARGET)
        self.expected.step([slope * b, slope * a])
        return np.sum((a * b - TARGET) ** 2)

    def check(self, loss):
        np.testing.assert_allclose(array(loss), self.expect_step(), **STEP)
        for variable, want in zip(self.variables, self.expected.parameters, strict=True):
            np.testing.assert_allclose(array(variable), want, **STEP)


@pytest.mark.parametrize("options", [{}, {"loss_scale_factor": 1024.0}], ids=["plain", "scaled"])
def test_minimize(options):
    """The loss comes back unscaled, from before the step."""
    problem = Problem(**options)
    for _ in range(2):
        loss = problem.optimizer.minimize(problem.loss, problem.variables)
        problem.check(loss)
    assert not getattr(loss, "requires_grad", False)
    problem.check(problem.optimizer.minimize(problem.loss))  # over those it was built with


def test_minimize_takes_an_iterator_of_variables():
    problem = Problem()
    problem.check(problem.optimizer.minimize(problem.loss, iter(problem.variables)))


def test_minimize_some_of_the_variables():
    problem = Problem()
    a, b = problem.variables
    problem.optimizer.build([a, b])
    problem.optimizer.minimize(problem.loss, [a])
    assert not np.array_equal(array(a), START[0])
    np.testing.assert_array_equal(array(b), START[1])


def test_minimize_updates_moving_statistics(rng):
    """What the loss function assigns stays assigned, although JAX differentiates a pure function."""
    x = rng.standard_normal((8, 3)).astype("float32") + 5
    norm = layers.BatchNormalization(momentum=0.5)
    dropout = layers.Dropout(0.5, seed=1)
    model = keras.Sequential([keras.Input((3,)), norm, dropout, layers.Dense(1)])
    optimizer = keras_adam.Adam(0.01)
    first_seed = array(dropout.seed_generator.state)
    optimizer.minimize(
        lambda: ops.mean(ops.square(model(x, training=True))), model.trainable_variables
    )
    np.testing.assert_allclose(array(norm.moving_mean), x.mean(axis=0) / 2, rtol=1e-5)
    variance = (1 + x.var(axis=0)) / 2
    np.testing.assert_allclose(array(norm.moving_variance), variance, rtol=1e-4)
    assert not np.array_equal(array(dropout.seed_generator.state), first_seed)
    assert np.isfinite(array(model(x))).all()  # nothing traced was left behind


def test_minimize_counts_losses_that_layers_add():
    layer = layers.Dense(
        2, kernel_initializer="ones", activity_regularizer=keras.regularizers.L2(1.0)
    )
    model = keras.Sequential([keras.Input((3,)), layer])
    x = np.ones((4, 3), "float32")
    divisor = 1 if KERAS == (3, 10) else len(x)  # that Keras has the sum over the batch
    want = np.sum(array(model(x)) ** 2) / divisor
    loss = keras_adam.Adam(0.1).minimize(
        lambda: ops.sum(0.0 * model(x)) + sum(model.losses), model.trainable_variables
    )
    np.testing.assert_allclose(array(loss), want, rtol=1e-5)
    assert np.sum(array(model(x)) ** 2) / divisor < want
    for added in model.losses:
        array(added)  # nothing traced was left behind


def test_minimize_leaves_a_variable_without_part_in_the_loss():
    """Its gradient is None on TensorFlow and PyTorch, and zeros on JAX: without momentum or decay, it stays."""
    problem = Problem()
    other = keras.Variable(START[0], name="other")
    problem.optimizer.build([*problem.variables, other])
    problem.check(problem.optimizer.minimize(problem.loss))
    np.testing.assert_array_equal(array(other), START[0])


def test_decay_of_a_variable_without_part_in_the_loss():
    """JAX cannot tell it from one whose gradient is zero, which decays; in Keras's own train step it does so too."""
    problem = Problem(weight_decay=0.5, decoupled_weight_decay=True)
    other = keras.Variable(START[0], name="other")
    problem.optimizer.minimize(problem.loss, [*problem.variables, other])
    shrunk = 1 - 0.1 * 0.5 if BACKEND == "jax" else 1
    np.testing.assert_allclose(array(other), shrunk * START[0], **STEP)


def test_minimize_unbuilt_needs_variables():
    with pytest.raises(ValueError, match=r"`variables`.*variables=None"):
        Problem().optimizer.minimize(lambda: 0.0)


def test_minimize_refuses_a_variable_it_was_not_built_for():
    problem = Problem()
    problem.optimizer.build(problem.variables[:1])
    with pytest.raises(ValueError, match="Unknown variable: 'b'"):
        problem.optimizer.minimize(problem.loss, problem.variables)


# ---------------------------------------------------------------------------------------------------------------------
# step, zero_grad


def test_step_with_a_closure():
    problem = Problem(loss_scale_factor=1024.0)
    problem.optimizer.build(problem.variables)
    for _ in range(2):
        problem.check(problem.optimizer.step(problem.loss))


def test_unbuilt_step():
    with pytest.raises(ValueError, match=r"optimizer.build"):
        Problem().optimizer.step(lambda: 0.0)
    with pytest.raises(ValueError, match=r"optimizer.build"):
        Problem().optimizer.step()


def test_step_without_a_closure():
    problem = Problem()
    problem.optimizer.build(problem.variables)
    if not ON_TORCH:
        with pytest.raises(ValueError, match=f"closure=None on the backend '{BACKEND}'"):
            problem.optimizer.step()
        return
    for _ in range(2):
        problem.optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        assert problem.optimizer.step() is None
        problem.check(loss.detach())


def test_pytorchs_closure():
    """One that clears and computes the gradients itself; elsewhere there is no `backward` to call."""
    problem = Problem()
    problem.optimizer.build(problem.variables)

    def closure():
        problem.optimizer.zero_grad()
        loss = problem.loss()
        if ON_TORCH:
            loss.backward()
        return loss

    for _ in range(10):
        problem.check(problem.optimizer.step(closure))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_pytorchs_closure_for_one_variable(set_to_none):
    weight = keras.Variable(np.ones(4, "float32"))
    optimizer = keras_adam.Adam.with_torch_arguments()
    optimizer.build([weight])
    expected = reference.Adam([np.ones(4)], epsilon=1e-8, epsilon_hat=False)

    def closure():
        optimizer.zero_grad(set_to_none)
        loss = ops.sum(ops.square(weight))
        if ON_TORCH:
            loss.backward()
        return loss

    # Often: a new gradient may lie where the old one lay in memory.
    for _ in range(500 if ON_TORCH else 5):
        optimizer.step(closure)
        expected.step([2 * expected.parameters[0]])
    np.testing.assert_allclose(array(weight), expected.parameters[0], **TOLERANCES["float32"])


def test_closure_that_clears_gradients_only():
    """Leftovers of another loss are cleared, and the loss is differentiated as usual."""
    problem = Problem()
    problem.optimizer.build(problem.variables)
    if ON_TORCH:
        (100 * problem.loss()).backward()

    def closure():
        problem.optimizer.zero_grad()
        return problem.loss()

    for _ in range(2):
        problem.check(problem.optimizer.step(closure))


def test_minimize_leaves_stored_gradients_alone():
    if not ON_TORCH:
        assert not hasattr(keras.Variable(1.0).value, "backward")
        return
    problem = Problem()
    values = [v.value for v in problem.variables]
    for value in values:
        value.grad = torch.full((2,), 7.0)
    problem.check(problem.optimizer.minimize(problem.loss, problem.variables))
    for value in values:
        assert value.grad.tolist() == [7.0, 7.0]


def test_closure_with_backward_and_a_loss_scale():
    """The gradients that the closure has stored are those of the scaled loss, or of the loss as it is."""
    problem = Problem(loss_scale_factor=1024.0)
    problem.optimizer.build(problem.variables)

    def closure():
        problem.optimizer.zero_grad()
        loss = problem.loss()
        if ON_TORCH:
            problem.optimizer.scale_loss(loss).backward()
        return loss

    for _ in range(2):
        problem.check(problem.optimizer.step(closure))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    problem = Problem()
    problem.optimizer.build(problem.variables)
    a, b = problem.variables
    if ON_TORCH:
        a.value.grad = torch.ones(2)
    assert problem.optimizer.zero_grad(set_to_none) is None
    if ON_TORCH:
        if set_to_none:
            assert a.value.grad is None
        else:
            assert a.value.grad.tolist() == [0.0, 0.0]
        assert b.value.grad is None
    np.testing.assert_array_equal(array(a), START[0])
    problem.check(problem.optimizer.minimize(problem.loss))
