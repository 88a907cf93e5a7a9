"""Groups that are added, above all in the middle of training, against the NumPy reference."""

import keras
import numpy as np
import pytest

import keras_adam
from support import reference
from support.models import TOLERANCE, X, Y, assert_close, fit, weights
from support.resume import load_state, save_state

BACKEND = keras.backend.backend()
_rng = np.random.default_rng(77)
# base/kernel, base/bias, head/kernel, head/bias
START = [_rng.standard_normal(shape).astype("float32") for shape in [(4, 3), (3,), (3, 2), (2,)]]
BASE, HEAD = [0, 1], [2, 3]
ALL = [*BASE, *HEAD]
BATCHES = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, len(X), 4)]


def make_net(name="net", start=START):
    units = [s.size for s in start[1::2]]
    layers = [keras.layers.Dense(n, name=f"{name}_{i}") for i, n in enumerate(units)]
    model = keras.Sequential([keras.Input(start[0].shape[:1]), *layers], name=name)
    model.set_weights(start)
    return model


def train_only(model, indices):
    for i, variable in enumerate(v for layer in model.layers for v in layer.variables):
        variable.trainable = i in indices


def fit_again(model, optimizer, epochs=1, **options):
    model.compile(optimizer, "mse")
    fit(model, epochs, **options)


class Net:
    """Training of a linear net of two layers in NumPy, with an Adam for each variable."""

    def __init__(self, start=START):
        self.weights = [w.astype("float64") for w in start]
        self.adams = [None] * len(start)
        self.calls = 0

    def join(self, indices, **options):
        for i in indices:
            self.adams[i] = reference.Adam([self.weights[i]], **options)
            # Only so that it is at the same place of a cycle of accumulation as the others.
            self.adams[i].calls = self.calls

    def step(self, x, y, indices):
        for i, gradient in zip(indices, self.gradients(x, y, indices), strict=True):
            self.adams[i].step([gradient])
            self.weights[i] = self.adams[i].parameters[0]
        self.calls += 1

    def gradients(self, x, y, indices=ALL):
        kernel, bias, head_kernel, head_bias = self.weights
        hidden = x @ kernel + bias
        residual = hidden @ head_kernel + head_bias - y
        slope = 2 * residual / residual.size
        back = slope @ head_kernel.T
        found = [x.T @ back, back.sum(axis=0), hidden.T @ slope, slope.sum(axis=0)]
        return [found[i] for i in indices]

    def fit(self, indices, epochs=1):
        for _ in range(epochs):
            for x, y in BATCHES:
                self.step(x, y, indices)
        for i in indices:
            if self.adams[i].use_ema and self.adams[i].average is not None:
                self.adams[i].parameters = list(self.adams[i].average)
                self.weights[i] = self.adams[i].parameters[0]


def state_of(optimizer, variables):
    """Return copies of all state of the variables, and of the optimizer's counters."""
    state = {"iterations": optimizer._iterations.numpy().copy()}
    for parameter in optimizer._parameters:
        if not any(parameter.variable is v for v in variables):
            continue
        path = parameter.variable.path
        for name in ("momentum", "velocity", "velocity_hat", "average", "accumulator"):
            array = parameter.array(name)
            if array is not None:
                state[name, path] = np.array(keras.ops.convert_to_numpy(array))
        joined = parameter.joined
        state["joined", path] = np.array(0 if joined is None else int(joined.update.numpy()))
    return state


def assert_same_state(actual, desired):
    assert actual.keys() == desired.keys()
    for name, array in desired.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=str(name))


# Options of the optimizer, and of the added group alone. With accumulation by 3 the new variables join in the middle of
# a cycle, as an epoch has 4 steps.
OPTIONS = {
    "plain": ({}, {}),
    "rates": ({}, {"learning_rate": 0.003, "beta_1": 0.5}),
    "amsgrad of the new": ({}, {"amsgrad": "corrected"}),
    "amsgrad of the old": ({"amsgrad": True}, {"amsgrad": False}),
    "average": ({"use_ema": True, "ema_momentum": 0.75}, {}),
    "accumulation": ({"gradient_accumulation_steps": 3}, {}),
    "everything": (
        {
            "amsgrad": True,
            "weight_decay": 0.1,
            "use_ema": True,
            "ema_momentum": 0.75,
            "loss_scale_factor": 64.0,
            "gradient_accumulation_steps": 3,
        },
        {"learning_rate": 0.01, "weight_decay": 0.2},
    ),
}


def in_two_phases(case, select=lambda model: model.layers[0], epochs=(1, 1)):
    """Train the head, then head and base; return model and oracle."""
    options, own = OPTIONS[case]
    options = {"learning_rate": 0.02, **options}
    model, net = make_net(), Net()
    of_net = {name: value for name, value in options.items() if name != "loss_scale_factor"}
    optimizer = keras_adam.Adam(**options)

    model.layers[0].trainable = False
    fit_again(model, optimizer, epochs[0])
    net.join(HEAD, **of_net)
    net.fit(HEAD, epochs[0])
    assert_close(weights(model), net.weights)

    model.layers[0].trainable = True
    head = model.layers[1].trainable_variables
    before = state_of(optimizer, head)
    optimizer.add_param_group({"params": select(model), **own})
    assert_same_state(state_of(optimizer, head), before)
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    assert_same_state(state_of(optimizer, head), before)
    fit(model, epochs[1])
    net.join(BASE, **{**of_net, **own})
    net.fit(ALL, epochs[1])
    return model, net


@pytest.mark.short("plain", "amsgrad of the old", "everything")
@pytest.mark.parametrize("case", OPTIONS)
def test_unfreeze(case):
    model, net = in_two_phases(case)
    assert_close(weights(model), net.weights)
    steps = OPTIONS[case][0].get("gradient_accumulation_steps", 1)
    assert int(model.optimizer.iterations) == 2 * len(BATCHES) // steps


SELECTORS = {
    "regex": lambda model: ".*net_0/.*",
    "predicate": lambda model: lambda v: "net_0" in v.path,
    "everything that is new": lambda model: ".*",
    "variables": lambda model: list(model.layers[0].trainable_variables),
    "mixed": lambda model: [model.layers[0].kernel, ".*net_0/bias"],
    "layer and its variable": lambda model: [model.layers[0], model.layers[0].kernel],
}


@pytest.mark.parametrize("case", SELECTORS)
def test_selector(case):
    model, net = in_two_phases("rates", SELECTORS[case])
    assert_close(weights(model), net.weights)
    assert [len(g["params"]) for g in model.optimizer.param_groups] == [2, 2]


def after_the_head(**options):
    model = make_net()
    optimizer = keras_adam.Adam(0.02, **options)
    model.layers[0].trainable = False
    fit_again(model, optimizer)
    return model, optimizer


def test_added_patterns_are_resolved_without_an_explicit_build():
    net = Net()
    model, optimizer = after_the_head()
    model.layers[0].trainable = True
    optimizer.add_param_group({"params": ".*net_0/.*", "lr": 0.003})
    fit_again(model, optimizer)
    net.join(HEAD, learning_rate=0.02)
    net.fit(HEAD)
    net.join(BASE, learning_rate=0.003)
    net.fit(ALL)
    assert_close(weights(model), net.weights)


@pytest.mark.short("everything")
@pytest.mark.parametrize("case", ["amsgrad of the new", "everything"])
def test_saved_and_loaded(case, tmp_path):
    model, _ = in_two_phases(case)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for one in (model, loaded):
        fit(one)
    for got, want in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(got, want)
    paths = [[len(g["params"]) for g in m.optimizer.param_groups] for m in (model, loaded)]
    assert paths[0] == paths[1]
    again = state_of(loaded.optimizer, loaded.trainable_variables)
    for got, want in zip(
        again.values(), state_of(model.optimizer, model.trainable_variables).values(), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_saved_between_adding_and_training(tmp_path):
    model, optimizer = after_the_head()
    model.layers[0].trainable = True
    optimizer.add_param_group({"params": model.layers[0], "lr": 0.003})
    model.compile(optimizer, "mse")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for one in (model, loaded):
        fit(one)
    assert_close(weights(loaded), weights(model))


def test_saved_with_frozen_layers(tmp_path):
    """A layer is frozen after it was trained; the saved model can be loaded and trained on."""
    model, net = make_net(), Net()
    optimizer = keras_adam.Adam(0.02)
    fit_again(model, optimizer)
    model.layers[0].trainable = False
    optimizer.build(model.trainable_variables)
    fit_again(model, optimizer)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    fit(loaded)
    net.join(ALL, learning_rate=0.02)
    net.fit(ALL)
    net.fit(HEAD, 2)
    assert_close(weights(loaded), net.weights)


def test_two_additions(tmp_path):
    model, net = make_net(), Net()
    optimizer = keras_adam.Adam(0.02)
    for index, rate in ((None, 0.02), (0, 0.01), (1, 0.005)):
        if index is None:
            indices = HEAD
        else:
            indices = sorted([*indices, index])
        train_only(model, indices)
        if index is not None:
            optimizer.add_param_group({"params": model.layers[0].weights[index], "lr": rate})
        fit_again(model, optimizer)
        net.join([index] if index is not None else HEAD, learning_rate=rate)
        net.fit(indices)
        assert_close(weights(model), net.weights)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    fit(loaded)
    net.fit(ALL)
    assert_close(weights(loaded), net.weights)


def test_two_patterns_before_one_build():
    net = Net()
    model, optimizer = after_the_head()
    model.layers[0].trainable = True
    optimizer.add_param_group({"params": ".*net_0/kernel", "lr": 0.01})
    optimizer.add_param_group({"params": ".*", "lr": 0.005})
    fit_again(model, optimizer)
    net.join(HEAD, learning_rate=0.02)
    net.fit(HEAD)
    net.join([0], learning_rate=0.01)
    net.join([1], learning_rate=0.005)
    net.fit(ALL)
    assert_close(weights(model), net.weights)


def test_first_step_of_new_variables_is_as_large_as_the_rate():
    """Adam's first step is so for any gradient; with the others' step count it would be smaller."""
    model = make_net()
    optimizer = keras_adam.Adam(0.02, epsilon=1e-12)
    model.layers[0].trainable = False
    fit_again(model, optimizer, epochs=5)
    model.layers[0].trainable = True
    optimizer.add_param_group({"params": model.layers[0], "lr": 0.01})
    before = weights(model)
    model.compile(optimizer, "mse")
    model.train_on_batch(*BATCHES[0])
    for i in BASE:
        moved = np.abs(weights(model)[i] - before[i])
        np.testing.assert_allclose(moved, 0.01, rtol=1e-3)


def test_before_build():
    model, net = make_net(), Net()
    optimizer = keras_adam.Adam(0.02, param_groups=[{"params": ".*bias", "lr": 0.01}])
    optimizer.add_param_group({"params": model.layers[0], "lr": 0.003})
    fit_again(model, optimizer)
    for index, rate in enumerate((0.003, 0.01, 0.02, 0.01)):
        net.join([index], learning_rate=rate)
    net.fit(ALL)
    assert_close(weights(model), net.weights)
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 1, 1]


def test_variable_that_was_not_given_a_step_before():
    """The group joins after `build`, but before any training: all are at step 1."""
    model, net = make_net(), Net()
    optimizer = keras_adam.Adam(0.02)
    optimizer.build(model.layers[1].trainable_variables)
    optimizer.add_param_group({"params": model.layers[0], "lr": 0.01})
    fit_again(model, optimizer)
    net.join(HEAD, learning_rate=0.02)
    net.join(BASE, learning_rate=0.01)
    net.fit(ALL)
    assert_close(weights(model), net.weights)


def trained_in_turns(frozen_first):
    """Return two layers of one shape that were both trained, and a function that trains one of them alone."""
    start = [_rng.standard_normal(shape).astype("float32") for shape in [(4, 4), (4,)] * 2]
    model = make_net("turns", start)
    optimizer = keras_adam.Adam(0.01)
    y = np.concatenate([Y, Y], axis=1)

    def train(layer, build=False):
        for i in (0, 1):
            model.layers[i].trainable = i == layer
        model.compile(optimizer, "mse")
        if build:
            optimizer.build(model.trainable_variables)
        model.fit(X, y, batch_size=4, shuffle=False, verbose=0)

    train(1 - frozen_first)
    for layer in model.layers:
        layer.trainable = True
    optimizer.add_param_group({"params": model.layers[frozen_first]})
    train(frozen_first)
    return model, optimizer, train


@pytest.mark.parametrize("frozen_first", [0, 1])
def test_layers_that_train_in_turns(frozen_first):
    """Each has its own state, whatever the trainer's order."""
    model, optimizer, train = trained_in_turns(frozen_first)
    resting = model.layers[frozen_first].variables
    before = state_of(optimizer, resting)
    train(1 - frozen_first, build=True)  # nothing to add: both are known
    after = state_of(optimizer, resting)
    assert after.pop("iterations") == before.pop("iterations") + len(BATCHES)
    assert_same_state(after, before)


@pytest.mark.skipif(BACKEND != "jax", reason="elsewhere the optimizer is given the variables")
@pytest.mark.parametrize("frozen_first", [0, 1])
def test_layers_that_train_in_turns_without_build(frozen_first):
    """JAX's trainer passes values alone; they must not be mistaken for the other layer's."""
    *_, train = trained_in_turns(frozen_first)
    with pytest.raises(ValueError, match=r"optimizer\.build\(model\.trainable_variables\)"):
        train(1 - frozen_first)


@pytest.mark.skipif(BACKEND != "jax", reason="elsewhere the optimizer is given the variables")
def test_frozen_without_build(tmp_path):
    """All that is trained is known, so that the error has one way out, and that leads on."""
    model = make_net(
        "shrinking", [np.ones(shape, "float32") for shape in [(4, 3), (3,), (3, 2), (2,)]]
    )
    model.compile(keras_adam.Adam(0.01), "mse")
    model.fit(X, Y, verbose=0)
    model.layers[0].trainable = False
    model.compile(model.optimizer, "mse")
    epoch = int(model.optimizer.iterations)
    model.save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match=r"optimizer\.build\(.*Received: 2 values") as raised:
        model.fit(X, Y, verbose=0)
    assert "add_param_group" not in str(raised.value)
    model.optimizer.build(model.trainable_variables)
    model.load_weights(tmp_path / "model.weights.h5")
    model.fit(X, Y, verbose=0)
    assert int(model.optimizer.iterations) == 2 * epoch


def test_average_of_a_variable_without_an_update():
    """It must not replace the variable: it is not an average of anything yet."""
    model = make_net()
    optimizer = keras_adam.Adam(0.02, use_ema=True, gradient_accumulation_steps=8)
    model.layers[0].trainable = False
    fit_again(model, optimizer, epochs=2)
    model.layers[0].trainable = True
    optimizer.add_param_group({"params": model.layers[0]})
    fit_again(model, optimizer)
    for i in BASE:
        np.testing.assert_array_equal(model.get_weights()[i], START[i])


# ----------------------------------------------------------------------------------------------
# Custom loops


def tensors(arrays):
    return [keras.ops.convert_to_tensor(a, "float32") for a in arrays]


@pytest.mark.parametrize("given", [True, False], ids=["with variables", "without variables"])
def test_custom_loop(given):
    model, net = make_net(), Net()
    optimizer = keras_adam.Adam(0.02)
    order = [*model.layers[1].variables]

    def train(indices):
        for x, y in BATCHES:
            found = tensors(net.gradients(x, y, indices))
            if given:
                optimizer.apply(found, model.trainable_variables)
            else:
                by_id = dict(zip(map(id, model.trainable_variables), found, strict=True))
                optimizer.apply([by_id[id(v)] for v in order])
            net.step(x, y, indices)
            assert_close(weights(model), net.weights)

    model.layers[0].trainable = False
    optimizer.build(model.trainable_variables)
    net.join(HEAD, learning_rate=0.02)
    train(HEAD)
    model.layers[0].trainable = True
    optimizer.add_param_group({"params": model.layers[0], "lr": 0.003})
    order += model.layers[0].variables
    net.join(BASE, learning_rate=0.003)
    train(ALL)


def test_custom_loop_with_an_added_pattern():
    model, net = make_net(), Net()
    optimizer = keras_adam.Adam(0.02)
    model.layers[0].trainable = False
    optimizer.apply(tensors(net.gradients(*BATCHES[0], HEAD)), model.trainable_variables)
    net.join(HEAD, learning_rate=0.02)
    net.step(*BATCHES[0], HEAD)
    model.layers[0].trainable = True
    optimizer.add_param_group({"params": ".*net_0/.*", "lr": 0.003})
    net.join(BASE, learning_rate=0.003)
    for x, y in BATCHES:
        optimizer.apply(tensors(net.gradients(x, y, ALL)), model.trainable_variables)
        net.step(x, y, ALL)
    assert_close(weights(model), net.weights)


def test_built_in_another_order_between_steps():
    """What the engine remembers of earlier steps must not mix up the variables."""
    values = []
    for reorder in (False, True):
        a, b = (keras.Variable([x], name=name) for name, x in (("a", 1.0), ("b", 5.0)))
        optimizer = keras_adam.Adam(0.1)
        found = tensors([[1.0], [-1.0]])
        optimizer.apply(found, [a, b])
        if reorder:
            optimizer.build([b, a])
        optimizer.apply(found, [a, b])
        values.append([float(a.numpy()[0]), float(b.numpy()[0])])
    np.testing.assert_allclose(values, [[0.8, 5.2]] * 2, rtol=1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a feature of tensorflow")
def test_tf_function():
    import tensorflow as tf

    model, net = make_net(), Net()
    optimizer = keras_adam.Adam(0.02)

    def make_step(variables):
        @tf.function
        def step(x, y):
            with tf.GradientTape() as tape:
                value = tf.reduce_mean((model(x) - y) ** 2)
            optimizer.apply(tape.gradient(value, [v.value for v in variables]), variables)

        return step

    for indices, variables in ((HEAD, model.layers[1].variables), (ALL, model.variables)):
        if indices is ALL:
            optimizer.add_param_group({"params": ".*net_0/.*", "lr": 0.003})
        net.join(
            HEAD if indices is HEAD else BASE, learning_rate=0.02 if indices is HEAD else 0.003
        )
        step = make_step(variables)
        for x, y in BATCHES:
            step(tf.constant(x), tf.constant(y))
            net.step(x, y, indices)
        assert_close(weights(model), net.weights)


@pytest.mark.skipif(BACKEND != "jax", reason="a feature of jax")
def test_stateless_apply():
    import jax

    net = Net()
    variables = [keras.Variable(w, name=f"w{i}") for i, w in enumerate(START)]
    optimizer = keras_adam.Adam(0.02)
    order = HEAD
    optimizer.build([variables[i] for i in order])
    for phase in (HEAD, BASE):
        if phase is BASE:
            optimizer.add_param_group({"params": [variables[i] for i in BASE], "lr": 0.003})
            order = [*HEAD, *BASE]  # the order in which they joined
        net.join(phase, learning_rate=0.02 if phase is HEAD else 0.003)
        step = jax.jit(optimizer.stateless_apply)
        for x, y in BATCHES:
            found = tensors(net.gradients(x, y, order))
            state = [v.value for v in optimizer.variables]
            values, state = step(state, found, [variables[i].value for i in order])
            for i, value in zip(order, values, strict=True):
                variables[i].assign(value)
            for variable, value in zip(optimizer.variables, state, strict=True):
                variable.assign(value)
            net.step(x, y, order)
    assert_close([v.numpy() for v in variables], net.weights)


def test_under_mixed_float16():
    """Each `compile` wraps the same optimizer in a new LossScaleOptimizer."""
    keras.config.set_dtype_policy("mixed_float16")
    model = make_net("mixed")
    optimizer = keras_adam.Adam(0.01, epsilon=1e-12)
    model.layers[0].trainable = False
    fit_again(model, optimizer, epochs=2)
    model.layers[0].trainable = True
    wrapper = model.optimizer
    head = model.layers[1].trainable_variables
    before = state_of(optimizer, head)
    assert before["iterations"] > 0
    assert wrapper.inner_optimizer is optimizer
    optimizer.add_param_group({"params": model.layers[0], "lr": 0.005})
    assert_same_state(state_of(optimizer, head), before)
    start = weights(model)
    model.compile(optimizer, "mse")
    assert model.optimizer is not wrapper
    while int(optimizer.iterations) == before["iterations"]:  # until the loss scale has come down
        model.train_on_batch(*BATCHES[0])
    for i in BASE:
        np.testing.assert_allclose(np.abs(weights(model)[i] - start[i]), 0.005, rtol=1e-3)
    fit(model)
    assert optimizer.iterations > before["iterations"] + 1
    after = state_of(optimizer, model.trainable_variables)
    joined = [int(value) for name, value in after.items() if name[0] == "joined"]
    assert sorted(joined) == [0, 0, *[int(before["iterations"])] * 2]


# ----------------------------------------------------------------------------------------------
# State that comes from elsewhere


def test_state_loaded_between_eager_steps(tmp_path):
    """As below, in a custom loop."""

    def train(first):
        a, b = (keras.Variable([x], name=name) for name, x in (("a", 1.0), ("b", 5.0)))
        early, late = (a, b) if first == "a" else (b, a)
        optimizer = keras_adam.Adam(0.1, param_groups=[])
        for _ in range(5):
            optimizer.apply(tensors([[1.0]]), [early])
        optimizer.add_param_group({"params": late})
        optimizer.apply(tensors([[1.0], [-1.0]]), [a, b])
        return optimizer, [a, b]

    (saved, expected), (loaded, actual) = train("a"), train("b")
    load_state(save_state(tmp_path / "state.h5", saved), loaded)
    for variable, value in zip(actual, expected, strict=True):
        variable.assign(value.numpy())
    for optimizer, variables in ((saved, expected), (loaded, actual)):
        optimizer.apply(tensors([[0.5], [-0.5]]), variables)
    assert_close([v.numpy() for v in actual], [v.numpy() for v in expected], rtol=1e-6)


@pytest.mark.parametrize("order", ["other way round", "together"])
def test_state_loaded_into_a_compiled_model(order, tmp_path):
    """The state tells when each variable joined, but the train step is compiled already."""

    def train(first):
        model = make_net("net")
        optimizer = keras_adam.Adam(0.02, param_groups=[])
        if first is None:
            optimizer.build(model.layers[1].trainable_variables)
        else:
            model.layers[1 - first].trainable = False
            fit_again(model, optimizer)
            model.layers[1 - first].trainable = True
        optimizer.add_param_group({"params": model.layers[0 if first is None else 1 - first]})
        fit_again(model, optimizer)
        return model

    saved = train(0 if order == "other way round" else None)
    saved.save_weights(tmp_path / "model.weights.h5")
    model = train(1)
    try:
        model.load_weights(tmp_path / "model.weights.h5")
    except ValueError as error:
        assert "compile" in str(error)  # noqa: PT017
        return
    fit(model)
    fit(saved)
    assert_close(weights(model), weights(saved), rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------
# Errors


def test_forgotten():
    model, optimizer = after_the_head()
    model.layers[0].trainable = True
    with pytest.raises(ValueError, match="add_param_group"):
        fit_again(model, optimizer)


def test_forgotten_with_as_many_variables():
    """One layer is frozen as another is unfrozen, of the same shapes."""
    start = [_rng.standard_normal(shape).astype("float32") for shape in [(4, 4), (4,)] * 2]
    model = make_net("exchanged", start)
    optimizer = keras_adam.Adam(0.02)
    y = np.concatenate([Y, Y], axis=1)
    model.layers[0].trainable = False
    model.compile(optimizer, "mse")
    model.fit(X, y, verbose=0)
    model.layers[0].trainable, model.layers[1].trainable = True, False
    model.compile(optimizer, "mse")
    with pytest.raises(ValueError, match="add_param_group"):
        model.fit(X, y, verbose=0)


def test_known_variable():
    model, optimizer = after_the_head()
    model.layers[0].trainable = True
    before = state_of(optimizer, model.variables)
    for selector in (model.layers[1], [model.layers[0], model.layers[1].bias]):
        with pytest.raises(ValueError, match=r"net_1/(kernel|bias)'.* knows already"):
            optimizer.add_param_group({"params": selector})
    assert len(optimizer.param_groups) == 1
    assert_same_state(state_of(optimizer, model.variables), before)
    model.layers[0].trainable = False
    fit_again(model, optimizer)


def test_frozen_layer():
    model, optimizer = after_the_head()
    with pytest.raises(ValueError, match="must be trainable first"):
        optimizer.add_param_group({"params": model.layers[0]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("options", [{"lr": -1}, {"learning": 1}, {"amsgrad": 3}])
def test_bad_option(options):
    model, optimizer = after_the_head()
    model.layers[0].trainable = True
    with pytest.raises(ValueError, match="`param_group`"):
        optimizer.add_param_group({"params": model.layers[0], **options})
    assert len(optimizer.param_groups) == 1


def test_pattern_that_selects_nothing_can_be_corrected():
    model, optimizer = after_the_head()
    model.layers[0].trainable = True
    optimizer.add_param_group({"params": ".*ent_0/kernl"})
    with pytest.raises(ValueError, match="net_0"):
        optimizer.build(model.trainable_variables)
    optimizer.add_param_group({"params": ".*net_0/.*"})
    optimizer.build(model.trainable_variables)
    fit_again(model, optimizer)
    net = Net()
    net.join(HEAD, learning_rate=0.02)
    net.fit(HEAD)
    net.join(BASE, learning_rate=0.02)
    net.fit(ALL)
    np.testing.assert_allclose(model.get_weights()[0], net.weights[0], **TOLERANCE)


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
@pytest.mark.parametrize("selector", ["layers", "pattern", "none"])
def test_all_was_frozen_in_the_first_fit(selector):
    """Nothing was trained, so that the optimizer then trains like a new one."""

    def train(optimizer, is_frozen_first):
        model = make_net()
        if is_frozen_first:
            train_only(model, [])
            fit_again(model, optimizer)
            for got, start in zip(weights(model), START, strict=True):
                np.testing.assert_array_equal(got, start)
        train_only(model, ALL)
        if is_frozen_first and selector != "none":
            params = {"layers": model.layers, "pattern": ".*"}[selector]
            optimizer.add_param_group({"params": params, "learning_rate": 0.01})
        fit_again(model, optimizer, epochs=2)
        return weights(model), int(optimizer.iterations)

    ours, steps = train(keras_adam.Adam(0.01), is_frozen_first=True)
    theirs, expected_steps = train(keras.optimizers.Adam(0.01), is_frozen_first=False)
    assert steps == expected_steps
    for got, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, expected, **TOLERANCE)


def test_built_for_no_variable_it_is_not_built():
    optimizer = keras_adam.Adam(0.1)
    optimizer.build([])
    assert not optimizer.built
    variable = keras.Variable([1.0])
    optimizer.add_param_group({"params": variable, "maximize": True})
    optimizer.apply([keras.ops.ones(1)], [variable])
    np.testing.assert_allclose(variable.numpy(), [1.1], rtol=1e-6)
