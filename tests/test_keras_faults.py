"""Faults of the Adam and the optimizer base of Keras 3.15.1 that ours does not share.

Each test runs against ours, and where Keras's own Adam has the fault, also against that, which is
expected to fail: when a release of Keras mends a fault, its test passes unexpectedly. Only on 3.15.1 does that fail.
"""

import copy
import functools
import json
import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

import keras_adam
from support import reference
from support.models import Expected, assert_close, fit, make_model, weights
from support.steps import BACKEND, eager_step, slots, value_of
from support.tolerances import TOLERANCES

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
EVERYWHERE = ("jax", "tensorflow", "torch")


def fault(*backends, raises=AssertionError):
    """Parametrize a test over the class; `backends` are those where Keras's Adam fails it.

    Another release may have mended a fault, or not have it yet.
    """
    classes = [pytest.param(keras_adam.Adam, id="ours")]
    if BACKEND in backends:
        fails = pytest.mark.xfail(
            strict=keras.__version__ == "3.15.1", raises=raises, reason="a fault of Keras 3.15.1"
        )
        classes.append(pytest.param(keras.optimizers.Adam, id="keras", marks=fails))
    return pytest.mark.parametrize("cls", classes)


ROWS = set()


def row(number):
    """Mark which row of docs/keras_faults.md a test belongs to."""
    ROWS.add(number)
    return lambda test: test


def test_each_row_has_a_test():
    assert sorted(ROWS) == list(range(1, 35))


def only(backend):
    return pytest.mark.skipif(BACKEND != backend, reason=f"concerns {backend} alone")


def train(optimizer, start, gradients, dtype="float32"):
    variable = keras.Variable(start, dtype=dtype, name="weight")
    step = eager_step(optimizer, [variable])
    for gradient in gradients:
        step(gradient)
    return value_of(variable)


def train_reference(start, gradients, **options):
    oracle = reference.Adam([start], **options)
    for gradient in gradients:
        oracle.step([gradient])
    return oracle.parameters[0]


# Half precision


@row(1)
@fault(*EVERYWHERE)
def test_bfloat16_trains(cls):
    """0.999 is 1 there, and the bias correction 1 - 0.999**t is 0."""
    got = train(cls(0.02), [1.0, -1.0], [[1.0, 1.0]] * 10, "bfloat16")
    np.testing.assert_allclose(got, [0.8, -1.2], **TOLERANCES["bfloat16"])


@row(2)
@fault("torch")
def test_half_precision_first_leaves_the_rest_alone(cls):
    half = keras.Variable([1.0], dtype="bfloat16", name="half")
    full = keras.Variable([1.0], dtype="float32", name="full")
    step = eager_step(cls(0.01), [half, full])
    step([1.0], [1.0])
    np.testing.assert_allclose(value_of(full), [0.99], **CLOSE)


@row(3)
@fault(*EVERYWHERE)
def test_zero_gradient_in_float16(cls):
    """An epsilon of 1e-8 is 0 there, and 0 / 0 is not a number."""
    got = train(cls(0.01, epsilon=1e-8), [1.0], [[0.0]], "float16")
    np.testing.assert_array_equal(got, [1.0])


@row(3)
@fault(*EVERYWHERE)
def test_small_gradient_in_float16(cls):
    got = train(cls(0.01), [1.0], [[1e-4]] * 3, "float16")
    np.testing.assert_allclose(got, [0.97], **TOLERANCES["float16"])


@row(4)
@fault(*EVERYWHERE)
def test_decay_in_bfloat16(cls):
    """1 - 0.001 is 1 there."""
    got = train(cls(0.01, weight_decay=0.1), [1.0], [[0.0]] * 100, "bfloat16")
    np.testing.assert_allclose(got, [0.999**100], **TOLERANCES["bfloat16"])


@row(4)
@fault(*EVERYWHERE)
def test_decay_and_step_are_rounded_together(cls):
    """Each is less than half of float16's spacing below 1; their sum is more."""
    got = train(cls(2e-4, weight_decay=1.0), [1.0], [[1.0]], "float16")
    np.testing.assert_array_equal(got, [1 - 2.0**-11])


@row(31)
@fault(*EVERYWHERE)
def test_global_norm_in_float16(cls):
    """The square of 300 is infinite there."""
    got = train(cls(0.5, global_clipnorm=1.0), [1.0, 1.0], [[300.0, -300.0]], "float16")
    np.testing.assert_allclose(got, [0.5, 1.5], **TOLERANCES["float16"])


# Sparse gradients, loss scale, variables that are overwritten


def slices(values, rows, count):
    import tensorflow as tf

    return tf.IndexedSlices(tf.constant(values, "float32"), rows, (count, 1))


@row(5)
@only("tensorflow")
@fault("tensorflow")
def test_row_twice_in_a_sparse_gradient(cls):
    """Its two gradients must be added before they are squared."""
    optimizer, table = cls(), keras.Variable(np.ones((3, 1)), name="table")
    optimizer.apply([slices([[1.0], [1.0]], [2, 2], 3)], [table])
    velocity = value_of(slots(optimizer, "velocity")[0])
    # Not 0.002; to the digits that 1 - 0.999 has in float32.
    np.testing.assert_allclose(velocity, [[0.0], [0.0], [0.004]], rtol=1e-4)


@row(11)
@only("tensorflow")
@fault("tensorflow", raises=TypeError)
def test_loss_scale_and_sparse_gradient(cls):
    optimizer, table = cls(0.1, loss_scale_factor=4.0), keras.Variable(np.ones((2, 1)))
    optimizer.apply([slices([[1.0]], [1], 2)], [table])
    np.testing.assert_allclose(value_of(table), [[1.0], [0.9]], **CLOSE)


@row(12)
@fault("jax", "tensorflow", raises=(AttributeError, TypeError, ValueError))
def test_average_and_a_variable_that_is_overwritten(cls):
    """float8 training overwrites its scales with what it calls their gradients."""
    weight, scale = keras.Variable([1.0], name="weight"), keras.Variable([1.0], name="scale")
    scale.overwrite_with_gradient = True
    optimizer = cls(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2)
    step = eager_step(optimizer, [weight, scale])
    step([1.0], [7.0])
    step([1.0], [8.0])
    optimizer.finalize_variable_values([weight, scale])
    np.testing.assert_allclose(value_of(weight), [0.85], **CLOSE)
    np.testing.assert_array_equal(value_of(scale), [8.0])


@row(34)
@fault("jax", raises=TypeError)
def test_fit_after_the_averages_became_the_weights(cls):
    """On JAX a train step donates its arrays: a weight and its average must not share one."""
    model = make_model(cls(0.02, use_ema=True))
    fit(model)
    before = weights(model)
    fit(model)
    assert int(model.optimizer.iterations) == 8
    assert all((now != then).all() for now, then in zip(weights(model), before, strict=True))


# Replicas

MIRRORED = """
    import json
    import keras, keras_adam, numpy as np, tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        variable, optimizer = keras.Variable([0.0]), CLASS(1.0, beta_1=0.0, clipnorm=1.0)
        optimizer.build([variable])
    strategy.run(lambda: optimizer.apply([tf.constant([10.0])], [variable]))
    found = {"momentum": float(optimizer.variables[2].numpy()[0])}
    for options in (
        {"gradient_accumulation_steps": 2}, {"use_ema": True, "ema_overwrite_frequency": 2}
    ):
        with strategy.scope():
            model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
            model.compile(CLASS(0.1, **options), loss="mse", jit_compile=False)
        try:
            model.fit(np.ones((8, 2)), np.ones((8, 1)), batch_size=4, verbose=0)
            outcome = int(model.optimizer._iterations.numpy())
        except RuntimeError as error:
            outcome = str(error)
        found[[*options][-1]] = outcome
    print(json.dumps(found))
"""


@functools.cache
def on_two_replicas(name):
    """Return what a class does there; in a process of its own, as TensorFlow sets up devices only at its start."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = textwrap.dedent(MIRRORED).replace("CLASS", name)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:  # no AssertionError, which would pass for the fault
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def on_replicas_of(cls):
    ours = cls is keras_adam.Adam
    return on_two_replicas("keras_adam.Adam" if ours else "keras.optimizers.Adam")


@pytest.mark.short("ours")
@row(6)
@only("tensorflow")
@fault("tensorflow")
def test_clipping_of_the_reduced_gradient(cls):
    """Its norm is 1 after the clipping, not 1 per replica; beta_1 = 0 makes it the first moment."""
    assert on_replicas_of(cls)["momentum"] == pytest.approx(1.0, rel=1e-5)


@row(10)
@pytest.mark.parametrize("option", ["gradient_accumulation_steps", "ema_overwrite_frequency"])
@only("tensorflow")
@fault("tensorflow")
def test_fit_on_replicas(cls, option):
    assert on_replicas_of(cls)[option] == 2


# Gradient accumulation


@row(7)
@fault(*EVERYWHERE)
def test_average_under_accumulation(cls):
    """It averages the values after each update, not after each micro-step."""
    options = {"learning_rate": 0.1, "use_ema": True, "ema_momentum": 0.5}
    options["gradient_accumulation_steps"] = 2
    variable, optimizer = keras.Variable([1.0]), cls(**options)
    step, oracle = eager_step(optimizer, [variable]), reference.Adam([[1.0]], **options)
    for gradient in (1.0, 2.0, -1.0, 5.0, 3.0, 3.0):
        step([gradient])
        oracle.step([[gradient]])
    np.testing.assert_allclose(value_of(slots(optimizer, "average")[0]), oracle.average[0], **CLOSE)


@row(8)
@fault("torch")
def test_accumulator_forgets_nan(cls):
    """Multiplied by zero, a NaN would stay."""
    optimizer = cls(gradient_accumulation_steps=2)
    train(optimizer, [1.0], [[np.nan], [1.0]])
    np.testing.assert_array_equal(value_of(slots(optimizer, "gradient_accumulator")[0]), [0.0])


def operations(jaxpr):
    """Return the names of the operations on arrays that always run: those outside of branches and loops."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("cond", "while", "scan"):
            continue
        for inner in equation.params.values():
            if hasattr(inner, "jaxpr"):
                yield from operations(inner.jaxpr)
        if any(getattr(v.aval, "shape", ()) for v in equation.outvars):
            yield name


@row(26)
@only("jax")
@fault("jax")
def test_micro_step_does_no_work_of_an_update(cls):
    import jax

    variable, optimizer = keras.Variable([1.0, 2.0]), cls(gradient_accumulation_steps=4)
    optimizer.build([variable])
    state = [v.value for v in optimizer.variables]
    jaxpr = jax.make_jaxpr(optimizer.stateless_apply)(state, [variable.value], [variable.value])
    assert "sqrt" not in set(operations(jaxpr.jaxpr))


@row(27)
@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables")
@fault("tensorflow", "torch")
def test_no_gradient_when_an_update_is_due(cls):
    """The gradients of the earlier micro-steps are applied all the same."""
    a, b = keras.Variable([1.0], name="a"), keras.Variable([1.0], name="b")
    step = eager_step(cls(0.1, gradient_accumulation_steps=2), [a, b])
    step([1.0], [1.0])
    step([1.0], None)
    np.testing.assert_allclose(value_of(b), [0.9], **CLOSE)


@row(28)
@fault(*EVERYWHERE)
def test_constraint_waits_for_an_update(cls):
    variable = keras.Variable([-1.0])
    variable.constraint = keras.constraints.NonNeg()
    step = eager_step(cls(0.1, gradient_accumulation_steps=2), [variable])
    step([1.0])
    np.testing.assert_array_equal(value_of(variable), [-1.0])


@row(28)
@fault(*EVERYWHERE)
def test_average_is_of_constrained_values(cls):
    variable, optimizer = keras.Variable([-1.0]), cls(0.1, use_ema=True)
    variable.constraint = keras.constraints.NonNeg()
    eager_step(optimizer, [variable])([1.0])
    np.testing.assert_array_equal(value_of(slots(optimizer, "average")[0]), [0.0])


# Hyperparameters


@row(14)
@fault(*EVERYWHERE, raises=(TypeError, ValueError))
def test_callable_betas(cls):
    """Keras documents them."""
    optimizer = cls(0.1, beta_1=lambda: 0.8, beta_2=lambda: 0.9)
    expected = train_reference([1.0], [[1.0], [-2.0]], learning_rate=0.1, beta_1=0.8, beta_2=0.9)
    np.testing.assert_allclose(train(optimizer, [1.0], [[1.0], [-2.0]]), expected, **CLOSE)


@row(15)
@pytest.mark.parametrize("rate", [1, np.float32(0.5)], ids=["int", "NumPy"])
@fault(*EVERYWHERE, raises=ValueError)
def test_kind_of_learning_rate(cls, rate):
    expected = train_reference([1.0], [[1.0]], learning_rate=float(rate))
    np.testing.assert_allclose(train(cls(rate), [1.0], [[1.0]]), expected, **CLOSE)


@row(16)
@fault(*EVERYWHERE, raises=AttributeError)
def test_setting_a_learning_rate_over_a_callable(cls):
    optimizer = cls(lambda: 0.1)
    optimizer.learning_rate = 0.5
    expected = train_reference([1.0], [[1.0]], learning_rate=0.5)
    np.testing.assert_allclose(train(optimizer, [1.0], [[1.0]]), expected, **CLOSE)


@row(17)
@fault("jax", "tensorflow")
def test_callable_learning_rate_is_not_frozen(cls):
    """Each step of `fit` calls it; where `fit` is compiled, it is refused."""
    rates = iter([0.1, 0.001, 0.02, 0.01] * 2)  # with some more for calls ahead of a step
    model = make_model(cls(lambda: next(rates)))
    if cls is keras_adam.Adam and BACKEND != "torch":
        with pytest.raises(ValueError, match="callable"):
            fit(model)
        return
    fit(model)
    expected = Expected({"learning_rate": lambda step: [0.1, 0.001, 0.02, 0.01][step]})
    assert_close(weights(model), expected.fit().weights)


# Variables that join late


@row(9)
@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables")
@fault(*EVERYWHERE)
def test_first_step_of_a_variable_that_joins_late(cls):
    """It is as long as any first step. With Keras's Adam a variable joins late if it had no gradients before."""
    first, late = keras.Variable([1.0], name="first"), keras.Variable([1.0], name="late")
    optimizer = cls(0.01)
    if cls is keras_adam.Adam:
        for _ in range(20):
            eager_step(optimizer, [first])([1.0])
        optimizer.add_param_group({"params": late})
    else:
        for _ in range(20):
            eager_step(optimizer, [first, late])([1.0], None)
    eager_step(optimizer, [first, late])([1.0], [1.0])
    np.testing.assert_allclose(value_of(late), [0.99], **CLOSE)


@row(32)
@fault(*EVERYWHERE)
def test_unfrozen_variable(cls):
    """The error says what to do, and that does it."""
    first, late = keras.Variable([1.0], name="first"), keras.Variable([1.0], name="late")
    optimizer = cls(0.01)
    eager_step(optimizer, [first])([1.0])
    step = eager_step(optimizer, [first, late])
    with pytest.raises(ValueError, match="add_param_group"):
        step([1.0], [1.0])
    optimizer.add_param_group({"params": late})
    step([1.0], [1.0])
    np.testing.assert_allclose([value_of(first), value_of(late)], [[0.98], [0.99]], **CLOSE)


# State


@row(19)
@fault(*EVERYWHERE, raises=pytest.fail.Exception)
def test_state_of_as_many_arrays(cls, tmp_path):
    """An average is not a maximum, though both are the third array of a variable."""

    def make(**options):
        layers = [keras.Input((4,)), keras.layers.Dense(2, use_bias=False, name="dense")]
        model = keras.Sequential(layers, name="model")
        model.compile(cls(**options), loss="mse")
        model.optimizer.build(model.trainable_variables)
        return model

    make(use_ema=True).save_weights(tmp_path / "average.weights.h5")
    model = make(amsgrad=True)
    with pytest.raises(ValueError, match=r"average|velocity_hat"):
        model.load_weights(tmp_path / "average.weights.h5")


@pytest.fixture
def weights_file(tmp_path):
    """Return the file of a model that Adam trained for an epoch."""

    def save(optimizer):
        model = make_model(optimizer)
        fit(model)
        model.save_weights(tmp_path / "model.weights.h5")
        return tmp_path / "model.weights.h5"

    return save


@row(18)
@pytest.mark.filterwarnings("ignore:Skipping variable loading")
@fault(*EVERYWHERE, raises=pytest.fail.Exception)
def test_state_of_another_size(cls, weights_file):
    """Training must not go on from step 0 with trained weights."""
    path = weights_file(cls(amsgrad=True))
    model = make_model(cls())
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match="state"):
        model.load_weights(path)


@row(20)
@pytest.mark.filterwarnings("ignore:Skipping variable loading")
@fault(*EVERYWHERE)
def test_state_loaded_before_build(cls, weights_file):
    path = weights_file(cls())
    model = make_model(cls())
    model.load_weights(path)
    fit(model)
    assert int(model.optimizer.iterations) == 8
    assert_close(weights(model), Expected({}).fit(2).weights)


@row(33)
@pytest.mark.filterwarnings("ignore:Skipping variable loading")
@fault(*EVERYWHERE)
def test_number_and_schedule(cls, weights_file):
    path = weights_file(cls(0.02))
    model = make_model(cls(keras.optimizers.schedules.ExponentialDecay(0.02, 4, 0.5)))
    model.optimizer.build(model.trainable_variables)
    model.load_weights(path)
    assert int(model.optimizer.iterations) == 4


@row(21)
@fault(*EVERYWHERE, raises=pytest.fail.Exception)
def test_short_list_of_weights(cls):
    optimizer = cls()
    optimizer.build([keras.Variable([1.0])])
    with pytest.raises(ValueError, match="3"):
        optimizer.set_weights([v.numpy() for v in optimizer.variables][:3])


# Weight decay


def decayed(optimizer, variables):
    """Return the variables on which weight decay acts."""
    before = [value_of(v) for v in variables]
    eager_step(optimizer, variables)(*[np.zeros_like(b) for b in before])
    return [v.name for v, b in zip(variables, before, strict=True) if (value_of(v) != b).any()]


@row(13)
@fault("torch", raises=RuntimeError)
def test_every_variable_excluded(cls):
    optimizer = cls(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["weight"])
    assert decayed(optimizer, [keras.Variable([1.0], name="weight")]) == []


@row(22)
@fault(*EVERYWHERE, raises=pytest.fail.Exception)
def test_exclusion_after_build(cls):
    optimizer = cls(0.1, weight_decay=0.5)
    optimizer.build([keras.Variable([1.0])])
    with pytest.raises(ValueError, match="before the optimizer is built"):
        optimizer.exclude_from_weight_decay(var_names=["weight"])


def two_variables():
    return [keras.Variable([1.0], name=name) for name in ("kernel", "bias")]


@row(23)
@fault(*EVERYWHERE)
def test_second_exclusion_adds_to_the_first(cls):
    optimizer = cls(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["kernel"])
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    assert decayed(optimizer, two_variables()) == []


@row(24)
@fault(*EVERYWHERE)
def test_exclusions_in_the_config(cls):
    optimizer = cls(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer = cls.from_config(optimizer.get_config())
    assert decayed(optimizer, two_variables()) == ["kernel"]


@row(25)
@fault(*EVERYWHERE)
def test_pattern_means_the_same_everywhere(cls):
    """It is matched with name and path on each backend, without TensorFlow's ":0"."""
    for pattern in ("^bias$", "^dense/bias$"):
        with keras.name_scope("dense"):
            variables = two_variables()
        optimizer = cls(0.1, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_names=[pattern])
        assert decayed(optimizer, variables) == ["kernel"]


# Configuration and calls


@row(29)
@fault(*EVERYWHERE)
def test_from_config_leaves_its_argument_alone(cls):
    config = cls(keras.optimizers.schedules.CosineDecay(0.1, 10)).get_config()
    before = copy.deepcopy(config)
    cls.from_config(config)
    assert config == before


@row(29)
@fault(*EVERYWHERE)
def test_learning_rate_in_the_config(cls):
    assert cls(0.001).get_config()["learning_rate"] == 0.001


@row(30)
@fault(*EVERYWHERE, raises=ValueError)
def test_no_pairs(cls):
    optimizer = cls()
    optimizer.apply_gradients([])
    optimizer.apply([], [])
    assert int(optimizer.iterations) == 0
