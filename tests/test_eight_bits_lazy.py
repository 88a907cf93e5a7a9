"""State in 8 bits with `lazy=True`: each row has blocks of its own, and one that is not touched stays to the bit."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_adam
from support import eight_bits
from support.eight_bits import assert_same_codes, decoded, encoded
from support.steps import BACKEND, either_way, slots, sparse_gradient, value_of

ROWS = 64
SHAPES = [(ROWS, 64), (ROWS, 256), (ROWS, 300), (ROWS, 2, 90)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def build(shape, **options):
    rng = np.random.default_rng(4)
    variable = keras.Variable(rng.standard_normal(shape), dtype="float32", name="v")
    optimizer = keras_adam.Adam(0.01, state_dtype="8bit", lazy=True, **options)
    optimizer.build([variable])
    return optimizer, variable


def arrays_of(optimizer, role):
    roles = (role, f"{role}_scale")
    return [np.array(ops.convert_to_numpy(slots(optimizer, r)[0])) for r in roles]


@each_shape
@either_way
def test_rows_that_are_touched_and_not(make_step, shape):
    rng = np.random.default_rng(1)
    optimizer, variable = build(shape)
    step = make_step(optimizer, [variable])
    for i in range(4):
        p = value_of(variable)
        before = {role: arrays_of(optimizer, role) for role in ("momentum", "velocity")}
        indices = rng.integers(0, ROWS - 1, 12)  # the last row is never touched; some are twice
        indices[5] = indices[2]
        values = rng.standard_normal((12, *shape[1:])) * 10.0 ** rng.uniform(-3, 1, (12, 1))[0]
        step(sparse_gradient(indices, values, shape))
        touched = np.isin(np.arange(ROWS), indices)
        g = np.zeros(shape)
        np.add.at(g, indices, values.astype("float32").astype("float64"))
        wanted_p, *wanted = eight_bits.adam_step(
            p,
            g,
            decoded(*before["momentum"], signed=True, by_row=True),
            decoded(*before["velocity"], signed=False, by_row=True),
            i + 1,
            learning_rate=0.01,
        )
        found = value_of(variable)
        np.testing.assert_allclose(found[touched], wanted_p[touched], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found[~touched], p[~touched])
        for role, numbers in zip(before, wanted, strict=True):
            signed = role == "momentum"
            codes, scale = arrays_of(optimizer, role)
            for now, then in zip((codes, scale), before[role], strict=True):
                np.testing.assert_array_equal(now[~touched], then[~touched])
            right, its_scale, margin = encoded(
                numbers[touched], signed, eight_bits.dither(i), by_row=True
            )
            np.testing.assert_allclose(scale[touched].ravel(), its_scale, rtol=1e-4)
            assert_same_codes(codes[touched], right, margin, signed, near=2e-3)
    codes, scale = arrays_of(optimizer, "momentum")
    assert not codes[-1].any()
    assert not scale[-1].any()


@either_way
def test_a_gradient_of_all_rows_is_a_dense_one(make_step):
    rng = np.random.default_rng(2)
    ends = []
    for is_sparse in (True, False):
        rng = np.random.default_rng(2)
        optimizer, variable = build((ROWS, 300), amsgrad=True, weight_decay=0.1)
        step = make_step(optimizer, [variable])
        for _ in range(3):
            values = rng.standard_normal((ROWS, 300)).astype("float32")
            step(sparse_gradient(np.arange(ROWS), values, (ROWS, 300)) if is_sparse else values)
        ends.append(value_of(variable))
    np.testing.assert_allclose(*ends, rtol=1e-5, atol=1e-6)


def test_narrow_rows_stay_float32():
    for shape, expected in {
        (ROWS, 63): "float32",
        (ROWS, 64): "uint8",
        (63, 64): "float32",
    }.items():
        optimizer, _ = build(shape)
        dtype = keras.backend.standardize_dtype(slots(optimizer, "momentum")[0].dtype)
        assert dtype == expected, shape


def test_no_rows():
    optimizer, variable = build((ROWS, 64))
    before = value_of(variable)
    optimizer.apply([sparse_gradient(np.zeros(0), np.zeros((0, 64)), (ROWS, 64))], [variable])
    np.testing.assert_array_equal(value_of(variable), before)
    assert not any(a.any() for a in arrays_of(optimizer, "momentum"))


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch refuses an index that is no row's")
def test_an_index_that_counts_for_nothing():
    """JAX fills its arrays up with the number of rows; TensorFlow leaves out what is negative."""
    filler = ROWS if BACKEND == "jax" else -1
    states = []
    for indices in ([3, filler], [3]):
        optimizer, variable = build((ROWS, 64))
        values = np.ones((len(indices), 64))
        optimizer.apply([sparse_gradient(indices, values, (ROWS, 64))], [variable])
        states.append([value_of(v) for v in (variable, *optimizer.variables)])
    for one, other in zip(*states, strict=True):
        np.testing.assert_array_equal(one, other)
    assert arrays_of(optimizer, "momentum")[0][3].all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    variable = keras.Variable(np.ones((ROWS, 64)), dtype=dtype, name="v")
    optimizer = keras_adam.Adam(0.01, state_dtype="8bit", lazy=True)
    for _ in range(3):
        gradient = sparse_gradient([3, 3, 7], np.ones((3, 64)), (ROWS, 64))
        optimizer.apply([gradient], [variable])
    whole = value_of(optimizer._engine.read_parameter(variable))
    np.testing.assert_allclose(whole[[3, 7]], 0.97, rtol=1e-3)
    np.testing.assert_array_equal(np.delete(whole, [3, 7], axis=0), 1)
