"""PyTorch's argument names, defaults, and ways to take a step."""

import inspect

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops

import keras_adam
from support import reference
from support.helpers import assert_same_trajectory, random_problem, run, run_torch
from support.steps import BACKEND, KERAS
from support.tolerances import TOLERANCES

torch.set_num_threads(1)  # For tensors this small a second thread only costs.

ON_TORCH = BACKEND == "torch"
STEP = {"rtol": 1e-5, "atol": 1e-6}  # a few steps in float32


def array(x):
    return np.array(ops.convert_to_numpy(x))


# ---------------------------------------------------------------------------------------------------------------------
# with_torch_arguments


def test_arguments_are_pytorchs():
    """Names, order and defaults are the same, for arguments that have a meaning here."""
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
    """The name decides: a class of that name with an L2 penalty would be a trap."""
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
# PyTorch's choices of an implementation

IMPLEMENTATION = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}
CHOICES = [
    {"foreach": True},
    {"foreach": False, "fused": True},
    {"fused": False, "capturable": True},
]


def test_implementation_has_pytorchs_defaults():
    ours = inspect.signature(keras_adam.Adam.with_torch_arguments).parameters
    theirs = torch.optim.Adam([torch.zeros(1)]).defaults
    for name, default in IMPLEMENTATION.items():
        assert ours[name].default is default is theirs[name]
        assert ours[name].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("cls", [keras_adam.Adam, keras_adam.AdamW])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_implementation_has_no_effect(rng, cls, choice):
    starts, gradients = random_problem(rng, steps=3)
    got = run(cls.with_torch_arguments(**choice), starts, gradients)
    want = run(cls.with_torch_arguments(), starts, gradients)
    for step, arrays in want.items():
        for x, y in zip(got[step], arrays, strict=True):
            np.testing.assert_array_equal(x, y)


def grouped(choice, **options):
    variables = [keras.Variable(np.zeros(2, "float32"), name=name) for name in "ab"]
    optimizer = keras_adam.Adam.with_torch_arguments(
        param_groups=[{"params": "a", **choice}], **options
    )
    optimizer.build(variables)
    return optimizer


def implementations(groups):
    return [{name: group[name] for name in IMPLEMENTATION} for group in groups]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_implementation_of_a_group(choice):
    optimizer = grouped(choice)
    want = [IMPLEMENTATION | choice, IMPLEMENTATION]
    assert implementations(optimizer.param_groups) == want
    optimizer.add_param_group({"params": keras.Variable(np.zeros(2), name="c"), **choice})
    want.append(want[0])
    assert implementations(optimizer.state_dict()["param_groups"]) == want
    again = keras_adam.Adam.from_config(optimizer.get_config())
    assert implementations(again.param_groups) == want
    optimizer.param_groups[1]["capturable"] = True  # as some do by hand
    assert optimizer.param_groups[1]["capturable"] is True


def test_group_follows_the_implementation_of_the_others():
    optimizer = grouped({}, fused=True)
    assert implementations(optimizer.param_groups) == [IMPLEMENTATION | {"fused": True}] * 2
    optimizer = grouped({"fused": None}, fused=True)
    again = keras_adam.Adam.from_config(optimizer.get_config())
    assert [g["fused"] for g in again.param_groups] == [None, True]


def refusals(choice):
    """Ways to give the choice."""
    return {
        "argument": lambda: keras_adam.Adam.with_torch_arguments(**choice),
        "AdamW": lambda: keras_adam.AdamW.with_torch_arguments(**choice),
        "group": lambda: grouped(choice),
        "added": lambda: keras_adam.Adam().add_param_group({"params": "a", **choice}),
        "set": lambda: [grouped({}).param_groups[0].update({n: v}) for n, v in choice.items()],
        "loaded": lambda: load(choice),
    }


def load(choice):
    optimizer = grouped({})
    saved = optimizer.state_dict()
    saved["param_groups"][1] |= {"lr": 0.5, **choice}
    try:
        optimizer.load_state_dict(saved)
    finally:
        assert optimizer.param_groups[1]["lr"] == 1e-3  # nothing was assigned


@pytest.mark.parametrize("way", refusals({}))
@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"differentiable": True}, "`differentiable` must be False.*differentiable=True"),
        ({"foreach": True, "fused": True}, "`foreach` and `fused`.*foreach=True, fused=True"),
        ({"fused": "yes"}, "`fused` must be True or False or None.*fused='yes'"),
        ({"capturable": None}, "`capturable` must be True or False. Received: capturable=None"),
    ],
    ids=["differentiable", "both", "fused", "capturable"],
)
def test_implementation_that_is_refused(way, choice, message):
    if way == "set" and len(choice) > 1:
        group = grouped({"foreach": True}).param_groups[0]
        with pytest.raises(ValueError, match=message):
            group["fused"] = True
        assert group["fused"] is None
        return
    with pytest.raises(ValueError, match=message):
        refusals(choice)[way]()


def test_combination_is_refused_over_groups():
    """The group would have both set to True."""
    with pytest.raises(ValueError, match="`foreach` and `fused`"):
        grouped({"fused": True}, foreach=True)
    assert grouped({"fused": True, "foreach": None}, foreach=True).param_groups[0]["fused"]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_loaded_implementation_comes_back(choice):
    """Where a state dict of an old PyTorch lacks a choice, ours stays."""
    optimizer = grouped({}, capturable=True)
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= IMPLEMENTATION | choice
    del saved["param_groups"][1]["capturable"]
    optimizer.load_state_dict(saved)
    want = [IMPLEMENTATION | choice, IMPLEMENTATION | {"capturable": True}]
    assert implementations(optimizer.state_dict()["param_groups"]) == want


@pytest.mark.parametrize("choice", CHOICES[:2], ids=str)
def test_run_of_pytorch_keeps_its_implementation(rng, choice):
    """The choice goes through Keras and back; then PyTorch takes a step with it."""
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups = [{"params": parameters[:1], **choice}, {"params": parameters[1:]}]
    theirs = torch.optim.Adam(groups, lr=0.1)
    variables = [keras.Variable(np.ones(3, "float32"), name=name) for name in "ab"]
    optimizer = keras_adam.Adam.with_torch_arguments(param_groups=[{"params": "a"}])
    optimizer.build(variables)

    def step(optimizer, parameters, gradients):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.tensor(gradient)
        optimizer.step()

    gradients = rng.standard_normal((4, 2, 3)).astype("float32")
    step(theirs, parameters, gradients[0])
    optimizer.load_state_dict(theirs.state_dict())
    for variable, parameter in zip(variables, parameters, strict=True):
        variable.assign(parameter.detach().numpy())
    optimizer.apply([ops.convert_to_tensor(g) for g in gradients[1]], variables)
    step(theirs, parameters, gradients[1])

    copies = [torch.nn.Parameter(torch.tensor(array(v))) for v in variables]
    again = torch.optim.Adam([{"params": [p]} for p in copies])
    again.load_state_dict(optimizer.state_dict())
    assert implementations(again.param_groups) == implementations(theirs.param_groups)
    for optimizer, some in ((theirs, parameters), (again, copies)):
        step(optimizer, some, gradients[2])
    for x, y in zip(copies, parameters, strict=True):
        np.testing.assert_allclose(x.detach().numpy(), y.detach().numpy(), **STEP)


# ---------------------------------------------------------------------------------------------------------------------
# Habits: an error says what to write

VARIABLES = [keras.Variable(np.zeros(2, "float32"), name=name) for name in "ab"]


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {"lr": 0.1}, "NAME has no argument `lr`; write `learning_rate=`. Received: lr=0.1"),
        ((), {"decay": 1e-4}, r"`decay`.*InverseTimeDecay\(.*decay_rate=decay.*decay=0.0001"),
        ((), {"betas": (0.9, 0.99)}, "`betas`.*`beta_1=` and `beta_2=`.*NAME.with_torch_arguments"),
        ((), {"eps": 1e-8}, "`eps`.*`epsilon=`.*`epsilon_hat=False`.*eps=1e-08"),
        ((), {"fused": True}, "`fused`.*`NAME.with_torch_arguments`.*fused=True"),
        ((), {"params": VARIABLES}, r"`params`.*NAME\(learning_rate=0.001\).*optimizer.build"),
        ((), {"clip_norm": 1.0}, "`clip_norm`; did you mean `clipnorm`.*clip_norm=1.0"),
        ((), {"zzz": 1.0}, "`zzz`; known are learning_rate, beta_1.*zzz=1.0"),
        (
            (VARIABLES,),
            {"lr": 0.1},
            r"first argument must be a learning rate.*NAME\(learning_rate=",
        ),
        ((VARIABLES, 0.1), {}, "first argument.*`model.compile.optimizer.`.*class list"),
        ((VARIABLES,), {"learning_rate": 0.1}, "first argument must be a learning rate"),
        ((iter(VARIABLES),), {}, "first argument must be a learning rate"),
        (([{"params": VARIABLES}],), {"lr": 0.1}, "first argument must be a learning rate"),
    ],
)
def test_what_to_write_instead(name, arguments, options, message):
    with pytest.raises(TypeError, match=message.replace("NAME", name)):
        getattr(keras_adam, name)(*arguments, **options)


@pytest.mark.parametrize("cls", [keras_adam.Adam, keras_adam.AdamW])
def test_variables_before_pytorchs_arguments(cls):
    for options in ({}, {"lr": 0.1}):
        with pytest.raises(TypeError, match=rf"{cls.__name__}.with_torch_arguments\(lr=.*build"):
            cls.with_torch_arguments(VARIABLES, **options)
    for name, instead in {"learning_rate": "lr", "beta_1": "betas", "epsilon": "eps"}.items():
        with pytest.raises(TypeError, match=f"write `{instead}=` for `{name}`.*{name}=0.1"):
            cls.with_torch_arguments(**{name: 0.1})


def test_lr_is_no_attribute():
    """Keras 2 had it; set without an error, it would do nothing."""
    optimizer = keras_adam.Adam(0.5)
    with pytest.raises(AttributeError, match=r"write `optimizer.learning_rate = 0.1`"):
        optimizer.lr = 0.1
    with pytest.raises(AttributeError, match="write `learning_rate`"):
        optimizer.lr  # noqa: B018
    assert not hasattr(optimizer, "lr")
    assert float(optimizer.learning_rate) == 0.5


def test_subclass_may_have_such_arguments():
    class Mine(keras_adam.Adam):
        def __init__(self, lr, decay=0.0):
            super().__init__(learning_rate=lr / (1 + decay))

    assert float(Mine(lr=0.5, decay=1.0).learning_rate) == 0.25
    assert next(iter(inspect.signature(keras_adam.Adam).parameters)) == "learning_rate"
    for rate in (np.float32(0.5), ops.convert_to_tensor(0.5), keras.Variable(0.5)):
        assert float(keras_adam.Adam(rate).learning_rate) == 0.5


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
    """On JAX its gradient is zero, and it decays, as it does in Keras's own train step."""
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
    """The closure clears and computes the gradients itself; other backends have no `backward` to call."""
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
    """The closure has stored gradients of the scaled loss, or of the unscaled one."""
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


@pytest.mark.skipif(BACKEND != "torch", reason="only PyTorch keeps gradients on the variables")
def test_closure_that_writes_to_old_gradients():
    """Zeros written in place are no call of `backward`: the loss is differentiated."""
    variable = keras.Variable([1.0, 2.0])
    optimizer = keras_adam.Adam(0.1)
    optimizer.build([variable])
    variable.value.grad = torch.ones(2)

    def closure():
        optimizer.zero_grad(set_to_none=False)
        return (variable.value * variable.value).sum()

    optimizer.step(closure)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(variable), [0.9, 1.9], rtol=1e-6)
