"""Each error names the argument, the rule and the value received."""

import re

import keras
import numpy as np
import pytest

import keras_adam
from support.models import fit, make_model

BACKEND = keras.backend.backend()

NOT_NEGATIVE = ">= 0 and finite"
OUT_OF_RANGE = {
    "learning_rate": (NOT_NEGATIVE, [-1, -0.001]),
    "beta_1": ("in [0, 1)", [-0.1, 1, 1.0, 1.5]),
    "beta_2": ("in [0, 1)", [-0.1, 1, 1.0, 1.5]),
    "epsilon": (NOT_NEGATIVE, [-1e-7]),
    "weight_decay": (NOT_NEGATIVE, [-0.1]),
    "clipnorm": (NOT_NEGATIVE, [-1.0]),
    "clipvalue": (NOT_NEGATIVE, [-1.0]),
    "global_clipnorm": (NOT_NEGATIVE, [-1.0]),
    "ema_momentum": ("in [0, 1]", [-0.1, 1.1]),
    "loss_scale_factor": ("> 0 and finite", [0, -2.0]),
}
# Values that are no number, or not a single one; None is the default of some arguments.
OF_NO_USE = [True, "0.1", [0.1], {"lr": 0.1}, np.ones((1,)), np.array(True), 1j]
COUNTS = {"ema_overwrite_frequency": 1, "gradient_accumulation_steps": 2}
CHOICES = {
    "amsgrad": "True or False or 'corrected'",
    "use_ema": "True or False",
    "decoupled_weight_decay": "True or False",
    "epsilon_hat": "True or False",
    "maximize": "True or False",
}


def cases(table):
    return [pytest.param(*case, id=f"{case[0]}={case[-1]!r}") for case in table]


def refused(error, name, rule, value):
    message = f"`{name}` must be {re.escape(rule)}.*Received: {name}=.*{re.escape(str(value))}"
    return pytest.raises(error, match=message)


@pytest.mark.parametrize("cls", [keras_adam.Adam, keras_adam.AdamW])
@pytest.mark.parametrize(
    ("name", "rule", "value"),
    cases(
        (name, rule, value)
        for name, (rule, values) in OUT_OF_RANGE.items()
        for value in [*values, float("nan"), float("inf"), np.float32("-inf")]
    ),
)
def test_number_out_of_range(cls, name, rule, value):
    with refused(ValueError, name, rule, value):
        cls(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), cases((name, value) for name in OUT_OF_RANGE for value in OF_NO_USE)
)
def test_not_a_number(name, value):
    shown = re.escape(str(value)) if not isinstance(value, np.ndarray) else r"an array of shape"
    with pytest.raises(TypeError, match=f"`{name}` must be a number.*Received: {name}={shown}"):
        keras_adam.Adam(**{name: value})


@pytest.mark.parametrize("name", ["learning_rate", "beta_1", "beta_2", "epsilon", "ema_momentum"])
def test_none_for_a_number(name):
    with pytest.raises(TypeError, match=f"`{name}` must be a number.*Received: {name}=None"):
        keras_adam.Adam(**{name: None})


def test_adamw_without_decay():
    with pytest.raises(ValueError, match=r"`weight_decay` of AdamW must be.*weight_decay=None"):
        keras_adam.AdamW(weight_decay=None)


def test_tensor_of_wrong_shape():
    with pytest.raises(TypeError, match=r"Received: beta_1=an array of shape \(2,\)"):
        keras_adam.Adam(beta_1=keras.ops.convert_to_tensor([0.9, 0.8]))


@pytest.mark.parametrize(
    ("name", "minimum", "value"),
    cases(
        (name, minimum, value)
        for name, minimum in COUNTS.items()
        for value in [-1, 2.5, 3.0, "4", True, float("nan"), np.array([4])]
    )
    + cases([("gradient_accumulation_steps", 2, 1)]),
)
def test_count(name, minimum, value):
    with refused(ValueError, name, f"an integer >= {minimum}", repr(value)):
        keras_adam.Adam(use_ema=True, **{name: value})


@pytest.mark.parametrize(
    ("name", "rule", "value"),
    cases((name, rule, value) for name, rule in CHOICES.items() for value in ["yes", 2, None]),
)
def test_choice(name, rule, value):
    with refused(ValueError, name, rule, repr(value)):
        keras_adam.Adam(**{name: value})


@pytest.mark.parametrize(
    "pair",
    [("clipnorm", "clipvalue"), ("clipnorm", "global_clipnorm"), ("clipvalue", "global_clipnorm")],
    ids="+".join,
)
def test_two_ways_of_clipping(pair):
    received = ".*".join(f"{name}=0.5" for name in pair)
    with pytest.raises(ValueError, match=f"Only one of .* can be set. Received:.*{received}"):
        keras_adam.Adam(**dict.fromkeys(pair, 0.5))


def test_unknown_argument():
    with pytest.raises(TypeError, match="lr"):
        keras_adam.Adam(lr=0.1)
    with pytest.raises(TypeError, match="lr"):
        keras_adam.AdamW(lr=0.1)


@pytest.mark.parametrize("name", ["beta_1", "weight_decay", "learning_rate"])
def test_setting_a_number_out_of_range(name):
    optimizer = keras_adam.Adam()
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}=-1"):
        setattr(optimizer, name, -1)
    assert optimizer.get_config()[name] == keras_adam.Adam().get_config()[name]


def test_setting_a_number_over_a_schedule():
    optimizer = keras_adam.Adam(keras.optimizers.schedules.CosineDecay(0.1, 10))
    with pytest.raises(TypeError, match=r"`LearningRateSchedule`.*not settable.*0\.5"):
        optimizer.learning_rate = 0.5


def test_callable_out_of_range():
    optimizer = keras_adam.Adam(beta_1=lambda: 1.5)
    with pytest.raises(ValueError, match=r"`beta_1` must be in \[0, 1\)\. Received: beta_1=1\.5"):
        optimizer.apply([keras.ops.ones(2)], [keras.Variable([1.0, 2.0])])


@pytest.mark.skipif(BACKEND == "torch", reason="there a train step is not compiled")
@pytest.mark.parametrize("name", ["learning_rate", "beta_1", "weight_decay"])
def test_callable_in_a_compiled_step(name):
    model = make_model(keras_adam.Adam(**{name: lambda: 0.25}))
    with pytest.raises(ValueError, match=rf"`{name}` is a callable .* returning 0\.25"):
        fit(model)


@pytest.fixture
def variables():
    return [keras.Variable([1.0, 2.0], name=name) for name in ("first", "second")]


GRADIENT = np.ones(2, "float32")


def test_apply_before_build():
    with pytest.raises(ValueError, match="must already be built on a list of variables"):
        keras_adam.Adam().apply([GRADIENT])


def test_unknown_variable(variables):
    optimizer = keras_adam.Adam()
    optimizer.build(variables[:1])
    with pytest.raises(ValueError, match=r"Unknown variable: .*second"):
        optimizer.apply([GRADIENT], variables[1:])


@pytest.mark.parametrize("built", [True, False], ids=["built", "unbuilt"])
@pytest.mark.parametrize("count", [1, 3])
def test_numbers_of_gradients_and_variables(variables, built, count):
    optimizer = keras_adam.Adam()
    if built:
        optimizer.build(variables)
    message = f"one gradient .* Received: {count} gradients for 2 variables"
    with pytest.raises(ValueError, match=message):
        optimizer.apply([GRADIENT] * count, variables)
    if built:
        with pytest.raises(ValueError, match=message):
            optimizer.apply([GRADIENT] * count)
    assert int(optimizer.iterations) == 0


def test_no_gradient_at_all(variables):
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        keras_adam.Adam().apply([None, None], variables)


def test_variable_twice(variables):
    with pytest.raises(ValueError, match=r"twice\. Received: 'first' more than once"):
        keras_adam.Adam().build([*variables, variables[0]])
    optimizer = keras_adam.Adam()
    optimizer.build(variables)
    with pytest.raises(ValueError, match=r"twice\. Received: 'first' more than once"):
        optimizer.apply([GRADIENT] * 2, [variables[0]] * 2)
    assert int(optimizer.iterations) == 0


def test_integer_variable(variables):
    counter = keras.Variable([1, 2], dtype="int32", trainable=False, name="counter")
    with pytest.raises(ValueError, match=r"floating dtype\. Received: 'counter' of dtype int32"):
        keras_adam.Adam().build([*variables, counter])


def test_excluding_after_build(variables):
    optimizer = keras_adam.Adam(weight_decay=0.1)
    optimizer.build(variables)
    with pytest.raises(ValueError, match="before the optimizer is built"):
        optimizer.exclude_from_weight_decay(var_names=["first"])


def test_excluding_by_a_bare_string():
    """Taken as a list of letters, it would exclude nearly all."""
    with pytest.raises(TypeError, match=r"`var_names` must be a list .*Received: var_names='bias'"):
        keras_adam.Adam().exclude_from_weight_decay(var_names="bias")


def test_set_weights(variables):
    optimizer = keras_adam.Adam()
    with pytest.raises(ValueError, match="has not yet been built"):
        optimizer.set_weights([])
    optimizer.build(variables)
    values = [np.ones(v.shape) for v in optimizer.variables]
    with pytest.raises(ValueError, match=r"each of the 6 state variables\. Received: 5 arrays"):
        optimizer.set_weights(values[:-1])
    values[-1] = np.ones(3)
    with pytest.raises(ValueError, match=r"velocity of 'second' has shape \(2,\).*\(3,\)"):
        optimizer.set_weights(values)
    assert int(optimizer.iterations) == 0


def test_errors_of_stateless_apply(variables):
    if BACKEND == "tensorflow":
        pytest.skip("Keras has it on the other backends only")
    optimizer = keras_adam.Adam()
    with pytest.raises(ValueError, match="must be built"):
        optimizer.stateless_apply([], [GRADIENT], [GRADIENT])
