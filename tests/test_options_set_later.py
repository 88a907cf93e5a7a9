"""Options set after the constructor: obeyed from the next step on, or refused; checked as in the constructor."""

import copy

import keras
import numpy as np
import pytest
from keras import ops

import keras_adam
from support.helpers import make_variables, random_problem, to_numpy, to_tensors
from support.tolerances import TOLERANCES

BACKEND = keras.backend.backend()
# Each option that a step obeys, with a value that changes its result.
OBEYED = {
    "clipnorm": 0.5,
    "clipvalue": 0.1,
    "global_clipnorm": 0.5,
    "loss_scale_factor": 256.0,
    "ema_momentum": 0.5,
    "ema_overwrite_frequency": 1,
    "learning_rate": 0.5,
    "beta_1": 0.5,
    "beta_2": 0.5,
    "epsilon": 10.0,
    "weight_decay": 0.5,
}
AVERAGED = {"use_ema": True, "ema_momentum": 0.9}
# Each option that decides which state there is, with another value.
OF_STATE = {
    "use_ema": True,
    "gradient_accumulation_steps": 2,
    "state_dtype": "bfloat16",
    "kahan_sum": False,
    "shard_state": True,
}
WRONG = {
    "clipnorm": [-1, float("nan"), float("inf"), "1", True, 1e40],
    "clipvalue": [-1, float("nan"), 1e40],
    "global_clipnorm": [-1, 1e39],
    "loss_scale_factor": [0, -1, float("inf"), 1e-60],
    "use_ema": [None, 1, "yes"],
    "ema_momentum": [-0.1, 1.1, None, "half"],
    "ema_overwrite_frequency": [0, -1, 1.5, True],
    "gradient_accumulation_steps": [0, 1, 2.0],
    "state_dtype": ["float16", "8-bit", 32],
    "kahan_sum": ["no", 0],
    "skip_nonfinite": [None, 1, "yes"],
    "lazy": [None, 1, "yes"],
    "shard_state": [None, "yes"],
    "learning_rate": [-1, float("nan"), 1e40, "fast"],
    "beta_1": [1.0, -0.1, "most"],
    "beta_2": [1.0, float("nan")],
    "epsilon": [-1e-8, 1e40],
    "weight_decay": [-1, 1e40],
}
EACH_WRONG = [(name, value) for name, values in WRONG.items() for value in values]


def problem(rng, steps=4):
    starts, gradients = random_problem(rng, steps)
    return starts[:3], [arrays[:3] for arrays in gradients]


@pytest.mark.parametrize("name", OBEYED)
def test_set_after_a_step_is_as_if_given_from_then_on(name, rng):
    """The oracle: a new optimizer that has the option from its constructor, given the state before."""
    starts, (first, *others) = problem(rng)
    one = keras_adam.Adam(0.01, **AVERAGED)
    variables = make_variables(starts)
    one.apply(to_tensors(first), variables)
    setattr(one, name, OBEYED[name])
    np.testing.assert_allclose(float(ops.convert_to_numpy(getattr(one, name))), OBEYED[name])
    other = keras_adam.Adam(**{"learning_rate": 0.01, **AVERAGED, name: OBEYED[name]})
    others_variables = make_variables(to_numpy(variables))
    other.build(others_variables)
    rate = ops.copy(other.learning_rate)
    other.set_weights(one.variables)
    other.learning_rate.assign(rate)
    for optimizer, of_it in ((one, variables), (other, others_variables)):
        for arrays in others:
            optimizer.apply(to_tensors(arrays), of_it)
    for ours, wanted in zip(to_numpy(variables), to_numpy(others_variables), strict=True):
        np.testing.assert_allclose(ours, wanted, **TOLERANCES["float32"])
    without = keras_adam.Adam(0.01, **AVERAGED)
    unchanged = make_variables(starts)
    for arrays in (first, *others):
        without.apply(to_tensors(arrays), unchanged)
    averages = [[v for v in o.variables if "average" in v.path] for o in (one, without)]
    assert any(
        not np.allclose(a, b, rtol=1e-6, atol=0)
        for a, b in zip(
            to_numpy([*variables, *averages[0]]), to_numpy([*unchanged, *averages[1]]), strict=True
        )
    ), "the option changes nothing, so that the comparison above says nothing"


@pytest.mark.parametrize("when", ["before build", "after build", "after a step"])
def test_skip_nonfinite_set_late(when):
    variable, optimizer = keras.Variable([1.0, 2.0]), keras_adam.Adam(0.1)
    if when == "after build":
        optimizer.build([variable])
    if when == "after a step":
        optimizer.apply([ops.ones(2)], [variable])
    optimizer.skip_nonfinite = True
    before = to_numpy([variable])[0]
    optimizer.apply([ops.convert_to_tensor([np.nan, 1.0], "float32")], [variable])
    np.testing.assert_array_equal(to_numpy([variable])[0], before)
    assert int(optimizer.skipped_steps.numpy()) == 1
    optimizer.apply([ops.ones(2)], [variable])
    np.testing.assert_allclose(to_numpy([variable])[0], before - 0.1, rtol=1e-5)
    optimizer.skip_nonfinite = False
    optimizer.apply([ops.convert_to_tensor([np.nan, 1.0], "float32")], [variable])
    assert np.isnan(to_numpy([variable])[0][0])


def test_lazy_set_late():
    """From then on the row without a gradient stays where it is."""
    variable, optimizer = keras.Variable(np.ones((2, 1), "float32")), keras_adam.Adam(0.1)
    optimizer.apply([ops.ones((2, 1))], [variable])
    for lazy in (True, False):
        optimizer.lazy = lazy
        before = to_numpy([variable])[0]
        optimizer.apply([first_row()], [variable])
        moved = to_numpy([variable])[0] != before
        assert moved.ravel().tolist() == [True, not lazy]


def first_row():
    """A gradient of one in the first of two rows, sparse in the backend's own way."""
    if BACKEND == "jax":
        from jax.experimental import sparse

        return sparse.BCOO((np.ones((1, 1), "float32"), np.array([[0]])), shape=(2, 1))
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.IndexedSlices(tf.ones((1, 1)), tf.constant([0]), tf.constant([2, 1]))
    import torch

    return torch.sparse_coo_tensor([[0]], torch.ones(1, 1), (2, 1))


@pytest.mark.parametrize("name", OF_STATE)
def test_what_decides_about_state_is_settable_before_build_only(name):
    optimizer = keras_adam.Adam()
    setattr(optimizer, name, OF_STATE[name])
    optimizer.build([keras.Variable([1.0])])
    setattr(optimizer, name, OF_STATE[name])  # no change
    before = optimizer.get_config()
    with pytest.raises(ValueError, match=rf"`{name}` cannot be set now.*from_config.*Received"):
        setattr(optimizer, name, keras_adam.Adam().__dict__[name])
    assert optimizer.get_config() == before


@pytest.mark.parametrize(("name", "value"), EACH_WRONG)
def test_checked_as_in_the_constructor(name, value):
    optimizer = keras_adam.Adam()
    optimizer.build([keras.Variable([1.0])])
    before = optimizer.get_config()
    errors = []
    for act in (
        lambda: keras_adam.Adam(**{name: value}),
        lambda: setattr(optimizer, name, value),
    ):
        with pytest.raises(
            (TypeError, ValueError), match=rf"`{name}` must be.*Received: {name}="
        ) as e:
            act()
        errors.append((e.type, str(e.value)))
    assert errors[0] == errors[1]
    assert optimizer.get_config() == before


def test_two_ways_to_clip():
    optimizer = keras_adam.Adam(clipnorm=1.0)
    with pytest.raises(ValueError, match="Only one of `clipnorm`"):
        optimizer.clipvalue = 0.5
    optimizer.clipnorm = None
    optimizer.clipvalue = 0.5
    assert (optimizer.clipnorm, optimizer.clipvalue) == (None, 0.5)


def test_lazy_and_accumulation():
    optimizer = keras_adam.Adam(gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="`lazy` must be False"):
        optimizer.lazy = True
    optimizer = keras_adam.Adam(lazy=True)
    with pytest.raises(ValueError, match="`lazy` must be False"):
        optimizer.gradient_accumulation_steps = 2


def test_count_of_skipped_steps_cannot_be_replaced():
    optimizer = keras_adam.Adam(skip_nonfinite=True)
    with pytest.raises(AttributeError):
        optimizer.skipped_steps = 0


@pytest.mark.parametrize("name", ["clipnorm", "loss_scale_factor", "lazy", "skip_nonfinite"])
def test_after_a_compiled_fit(name, rng):
    """It is a constant of that step: any other value is refused. PyTorch does not compile."""
    x, y = (rng.standard_normal((8, n)).astype("float32") for n in (3, 1))
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(keras_adam.Adam(0.1), loss="mse")
    model.fit(x, y, verbose=0)
    optimizer, value = model.optimizer, {"lazy": True, "skip_nonfinite": True}.get(name, 0.5)
    setattr(optimizer, name, getattr(optimizer, name))
    if BACKEND == "torch":
        setattr(optimizer, name, value)
        model.fit(x, y, verbose=0)
        return
    with pytest.raises(
        ValueError, match=rf"`{name}` cannot be set now.*compiled already.*Received"
    ):
        setattr(optimizer, name, value)


def test_the_way_out_of_a_refusal(rng):
    """As the error says: a copy, which keeps the state."""
    x, y = (rng.standard_normal((8, n)).astype("float32") for n in (3, 1))
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(keras_adam.Adam(0.1), loss="mse")
    model.fit(x, y, verbose=0)
    new = copy.deepcopy(model.optimizer)
    new.clipnorm = 1e-3
    before = to_numpy(model.optimizer.variables)
    model.compile(new, loss="mse")
    new.build(model.trainable_variables)
    for kept, was in zip(to_numpy(new.variables), before, strict=True):
        np.testing.assert_array_equal(kept, was)
    model.fit(x, y, verbose=0)
    assert int(ops.convert_to_numpy(new.iterations)) == 2
    velocities = to_numpy(new._velocities)  # of clipped gradients since
    assert all((v <= was + 1e-6).all() for v, was in zip(velocities, before[3::2], strict=True))
