"""State in 8 bits, on each backend: the codes, a step, and what bad values do; against tables in NumPy."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_adam
from keras_adam import rule
from keras_adam.storage import InBlocks
from support import eight_bits
from support.eight_bits import (
    DITHERS,
    POSITIVE,
    SIGNED,
    assert_same_codes,
    decoded,
    encoded,
    places,
)
from support.steps import either_way, slots

BOTH = pytest.mark.parametrize("signed", [True, False], ids=["signed", "positive"])
# The largest distance of two neighbours, relative to the lower.
SPACING = {True: 1 / 8, False: 1 / 16}
rng = np.random.default_rng(8)


def numbers(count, signed):
    """Of all sizes that a code has, and smaller ones."""
    x = 10.0 ** rng.uniform(-7, 0, count)
    return (x * rng.choice([-1.0, 1.0], count) if signed else x).astype("float32")


def write(x, signed, dither=None, by_row=False):
    storage = InBlocks(signed, dithers=True, by_row=by_row)
    dither = None if dither is None else ops.convert_to_tensor(dither, "float32")
    return [ops.convert_to_numpy(a) for a in storage.write(ops.convert_to_tensor(x), dither)]


def read(codes, scale, signed, by_row=False):
    return InBlocks(signed, by_row=by_row).numbers([codes, scale])


# Codes


@BOTH
def test_each_code(signed):
    codes = np.arange(256, dtype="uint8")
    for scale in (1.0, 3e-7, 2.0**-100, 2.0**120):
        scale = np.array([scale], "float32")
        table = (SIGNED if signed else POSITIVE) * np.float64(scale[0])
        values = read(codes, scale, signed)
        np.testing.assert_allclose(values, table, rtol=3e-7, atol=1e-38)
        for dither in (None, 1e-4, 0.5, (DITHERS - 1) / DITHERS):
            again, its_scale = write(values, signed, dither)
            np.testing.assert_allclose(its_scale, scale, rtol=2e-7)
            np.testing.assert_array_equal(places(again, signed), places(codes, signed))


@BOTH
def test_the_values_grow_with_the_codes(signed):
    table = SIGNED[:128] if signed else POSITIVE
    assert (np.diff(table) > 0).all()
    assert table[-1] == 1
    spacing = np.diff(table) / table[:-1].clip(2.0**-16)
    assert spacing[32:].max() <= 1.2 * SPACING[signed]


@BOTH
@pytest.mark.parametrize("size", [256, 4096, 5000, 100])
def test_codes_of_random_numbers(signed, size):
    x = numbers(size, signed)
    for dither in (None, 0.0, 0.25, 0.9):
        codes, scale = write(x, signed, dither)
        wanted, wanted_scale, margin = encoded(x, signed, dither)
        np.testing.assert_array_equal(scale, wanted_scale.astype("float32"))
        assert_same_codes(codes, wanted, margin, signed)
        np.testing.assert_allclose(
            read(codes, scale, signed), decoded(codes, scale, signed), rtol=3e-7, atol=1e-38
        )


@BOTH
@pytest.mark.parametrize("shape", [(5, 300), (3, 256), (4, 64), (2, 3, 100)])
def test_blocks_that_end_with_their_row(signed, shape):
    x = (numbers(int(np.prod(shape)), signed)).reshape(shape)
    x *= np.logspace(-3, 3, shape[0], dtype="float32").reshape(-1, *[1] * (len(shape) - 1))
    codes, scale = write(x, signed, 0.25, by_row=True)
    wanted, wanted_scale, margin = encoded(x, signed, 0.25, by_row=True)
    assert scale.shape == (shape[0], -(-int(np.prod(shape[1:])) // 256))
    np.testing.assert_array_equal(scale.ravel(), wanted_scale.astype("float32"))
    assert_same_codes(codes, wanted, margin, signed)
    np.testing.assert_allclose(
        read(codes, scale, signed, by_row=True),
        decoded(codes, scale, signed, by_row=True),
        rtol=3e-7,
    )
    for row, of_row, its_scale in zip(x, codes, scale, strict=True):  # each as if it were alone
        alone, scale_alone = write(row.reshape(1, -1), signed, 0.25, by_row=True)
        np.testing.assert_array_equal(alone.ravel(), of_row.ravel())
        np.testing.assert_array_equal(scale_alone[0], its_scale)


@BOTH
def test_rounded_up_as_often_as_near(signed):
    """The mean over all dithers is the number, within two of them."""
    x = numbers(256, signed)
    x[0] = 1.0
    floor = 0.0 if signed else POSITIVE[0]
    x = np.where(np.abs(x) < floor, floor, x).astype("float32")
    dithers = rule.dither(ops.arange(DITHERS, dtype="int32"))[:, None]
    encode = rule.signed_codes if signed else rule.positive_codes
    codes = encode(ops.convert_to_tensor(x[None]), ops.ones((1, 1)), dithers)
    mean = (SIGNED if signed else POSITIVE)[ops.convert_to_numpy(codes)].mean(axis=0)
    distance = SPACING[signed] * np.abs(x) + 2.0**-18
    assert (np.abs(mean - x) <= 2 * distance / DITHERS + 4e-7 * (np.abs(x) + 2.0**-16)).all()


def rule_dither(step):
    return float(ops.convert_to_numpy(rule.dither(ops.convert_to_tensor(step, "int32"))))


def test_the_dithers():
    for step in (0, 1, 2, 1000, DITHERS - 1, DITHERS, 10**6):
        assert rule_dither(step) == pytest.approx(eight_bits.dither(step), abs=1e-7)


@BOTH
def test_largest_relative_error(signed):
    """To nearest half a spacing, dithered a whole one; of a first moment's small ones half of 2^-18 / 1.875."""
    x = numbers(10240, signed).reshape(-1, 256)
    x[:, 0] = 1.0
    x = x.ravel()
    for dither, part in ((None, 0.5), (0.0, 1.0), (0.99, 1.0)):
        error = np.abs(decoded(*write(x, signed, dither), signed) - x)
        if signed:
            bound = part * (np.abs(x) / 8 + 2.0**-18 / 1.875)
        else:
            bound = np.where(x < POSITIVE[0], POSITIVE[0] - x, part * x / 16)
        assert (error <= bound * 1.0001 + 1e-9).all()
        assert (error > 0.8 * bound).any()


@BOTH
def test_blocks_of_zeros_and_one_huge_element(signed):
    x = np.zeros((3, 256), "float32")
    x[1] = np.linspace(1e-6, 1e-3, 256)
    x[2] = 1e-9
    x[2, 7] = 1e3
    codes, scale = write(x, signed, 0.3)
    values = decoded(codes, scale, signed)
    np.testing.assert_array_equal(values[0], 0)
    np.testing.assert_allclose(values[1], x[1], rtol=SPACING[signed], atol=1e-8)
    assert values[2, 7] == pytest.approx(1e3)
    tiny = np.delete(values[2], 7)
    np.testing.assert_allclose(tiny, 0 if signed else 1e3 * POSITIVE[0], rtol=1e-6)


@BOTH
def test_denormals_and_the_largest(signed):
    x = np.zeros((4, 256), "float32")
    x[0] = 1e-40
    x[1] = np.linspace(1e-39, 3e-38, 256)
    x[2] = 3e38 if not signed else 1e37
    x[3] = np.linspace(1e30, 1e36, 256)
    codes, scale = write(x, signed)
    values = read(codes, scale, signed)
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(values[0], 0)
    np.testing.assert_allclose(values[1], x[1], rtol=SPACING[signed], atol=2.0**-125)
    if signed:
        np.testing.assert_allclose(values[2], 1e37, rtol=1e-6)
    else:
        np.testing.assert_allclose(values[2], 2.0**126, rtol=1e-6)  # the largest scale
    np.testing.assert_allclose(values[3], x[3], rtol=SPACING[signed], atol=1e36 * 2.0**-15)


@BOTH
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_spoils_no_others(bad, signed):
    if not signed and bad < 0:
        pytest.skip("a second moment is not negative")
    x = numbers(512, signed)
    without = x.copy()
    x[[3, 300]], without[[3, 300]] = bad, 0
    codes, scale = write(x, signed, 0.4)
    others, other_scale = write(without, signed, 0.4)
    np.testing.assert_array_equal(scale, other_scale)
    is_good = np.isfinite(x)
    np.testing.assert_array_equal(codes[is_good], others[is_good])
    values = read(codes, scale, signed)
    np.testing.assert_allclose(values[[3, 300]], 0 if signed else scale)
    codes, scale = write(np.full(256, bad, "float32"), signed)
    np.testing.assert_array_equal(scale, 0)
    np.testing.assert_array_equal(read(codes, scale, signed), 0)


# A step


def state(optimizer, role, signed=None):
    (codes,), (scale,) = slots(optimizer, role), slots(optimizer, f"{role}_scale")
    codes, scale = (np.array(ops.convert_to_numpy(x)) for x in (codes, scale))
    assert codes.dtype == np.uint8
    assert scale.dtype == np.float32
    return codes, scale


@either_way
@pytest.mark.parametrize("shape", [(64, 64), (5000,), (17, 19, 16)])
def test_each_step_is_that_of_the_description(make_step, shape):
    """From the state that there is, so that a code that went the other way is not carried on."""
    variable = keras.Variable(rng.standard_normal(shape), dtype="float32", name="v")
    optimizer = keras_adam.Adam(0.01, state_dtype="8bit")
    optimizer.build([variable])
    step = make_step(optimizer, [variable])
    for i in range(5):
        p = np.array(variable.numpy(), "float64")
        m = decoded(*state(optimizer, "momentum"), signed=True)
        v = decoded(*state(optimizer, "velocity"), signed=False)
        g = (rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 1, shape)).astype("float32")
        step(g)
        p, m, v = eight_bits.adam_step(p, g, m, v, i + 1, learning_rate=0.01)
        np.testing.assert_allclose(variable.numpy(), p, rtol=1e-5, atol=1e-6)
        for role, x in (("momentum", m), ("velocity", v)):
            codes, scale = state(optimizer, role)
            signed = role == "momentum"
            wanted, wanted_scale, margin = encoded(x, signed, eight_bits.dither(i))
            np.testing.assert_allclose(scale, wanted_scale, rtol=1e-4)
            # beta_2 of TensorFlow and the rounding of a difference move a number by 1e-4 of a spacing at most.
            assert_same_codes(codes, wanted, margin, signed, near=2e-3)


@either_way
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_bad_gradient_spoils_its_element_alone(make_step, bad):
    def run(bad, state_dtype):
        variable = keras.Variable(np.ones(4352, "float32"), name="v")
        optimizer = keras_adam.Adam(0.01, state_dtype=state_dtype)
        step = make_step(optimizer, [variable])
        noise = np.random.default_rng(1)
        for i in range(4):
            g = noise.standard_normal(4352).astype("float32")
            if i == 1:
                g[[300, 4351]] = bad
            step(g)
        return variable.numpy()

    found, without, wide = run(bad, "8bit"), run(0.0, "8bit"), run(bad, None)
    is_bad = np.isin(np.arange(4352), [300, 4351])
    np.testing.assert_array_equal(np.isfinite(found), ~is_bad)
    np.testing.assert_array_equal(np.isfinite(wide), ~is_bad)
    np.testing.assert_allclose(found[~is_bad], without[~is_bad], rtol=0, atol=1e-6)


@pytest.mark.parametrize("state_dtype", ["8bit", "bfloat16"])
def test_dithers_follow_updates(state_dtype):
    """The mean of two equal gradients is the gradient, so that the state must be the same to the bit.

    If they followed the calls of `apply`, some numbers of accumulated steps would have dithers that hardly change.
    """
    gradients = rng.standard_normal((4, 4096)).astype("float32")
    ends = []
    for calls in (1, 2):
        variable = keras.Variable(np.ones(4096, "float32"), name="v")
        every = calls if calls > 1 else None
        optimizer = keras_adam.Adam(state_dtype=state_dtype, gradient_accumulation_steps=every)
        for g in np.repeat(gradients, calls, axis=0):
            optimizer.apply([ops.convert_to_tensor(g)], [variable])
        ends.append([slots(optimizer, role)[0] for role in ("momentum", "velocity")])
    for one, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(*(ops.convert_to_numpy(x.value) for x in (one, other)))


def test_zero_gradients():
    variable = keras.Variable(np.ones(4096, "float32"), name="v")
    optimizer = keras_adam.Adam(0.01, state_dtype="8bit")
    for g in (np.zeros(4096), np.ones(4096), np.zeros(4096)):
        optimizer.apply([ops.convert_to_tensor(g, "float32")], [variable])
        assert np.isfinite(variable.numpy()).all()
    expected = keras.Variable(np.ones(4096, "float32"), name="v")
    wide = keras_adam.Adam(0.01)
    for g in (np.zeros(4096), np.ones(4096), np.zeros(4096)):
        wide.apply([ops.convert_to_tensor(g, "float32")], [expected])
    np.testing.assert_allclose(variable.numpy(), expected.numpy(), rtol=1e-5)


# What is kept, and its size


def dtypes(optimizer):
    return [keras.backend.standardize_dtype(v.dtype) for v in optimizer.variables[2:]]


IN_BLOCKS, WIDE = ["uint8", "float32"] * 2, ["float32"] * 2


def test_small_variables_stay_float32():
    shapes = {(): WIDE, (0, 9): WIDE, (4095,): WIDE, (4096,): IN_BLOCKS, (64, 64): IN_BLOCKS}
    for shape, expected in shapes.items():
        optimizer = keras_adam.Adam(state_dtype="8bit")
        optimizer.build([keras.Variable(np.zeros(shape, "float32"))])
        assert dtypes(optimizer) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"lazy": True}, {"use_ema": True}])
def test_state_size_is_what_is_held(dtype, options):
    shapes = [(512, 512), (5000,), (100, 70), (200, 30), (7,)]
    variables = [
        keras.Variable(np.zeros(s), dtype=dtype, name=f"v{i}") for i, s in enumerate(shapes)
    ]
    optimizer = keras_adam.Adam(state_dtype="8bit", **options)
    asked = optimizer.state_size(variables)
    optimizer.build(variables)
    assert optimizer.state_size() == asked
    for variable in variables:
        held = [v for v in optimizer.variables if v.path.split("/")[-1].startswith(variable.name)]
        size = {"uint8": 1, "bfloat16": 2, "float16": 2, "float32": 4}
        bytes_held = sum(
            size[keras.backend.standardize_dtype(v.dtype)] * int(np.prod(v.shape)) for v in held
        )
        assert asked[variable.path] == bytes_held
    if dtype == "float32" and not {"amsgrad", "use_ema"} & {*options}:
        assert asked["v0"] <= 2.04 * 512 * 512
        held = [v for v in optimizer.variables if "v0_" in v.path]
        arrays = [ops.convert_to_numpy(v) for v in held]
        assert sum(a.nbytes for a in arrays) <= 2.04 * 512 * 512


def test_an_element_whose_gradient_was_huge_does_not_go_far(rng):
    variable = keras.Variable(np.zeros(4096, "float32"))
    optimizer = keras_adam.Adam(0.01, state_dtype="8bit")
    for step in range(4):
        gradient = rng.standard_normal(4096).astype("float32")
        if step == 1:
            gradient[5] = (
                1e21  # its square overflows in PyTorch's kernel; elsewhere it counts as 1.8e19
            )
        optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
    moved = np.abs(variable.numpy())
    assert np.isfinite(moved).all()
    assert moved[5] < 0.1
    assert moved[256:].min() > 1e-5  # the other blocks go on
