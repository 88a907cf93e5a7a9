"""Variables of 8 or 11 bits do what float32 would do, to their precision, and lose no small step."""

import itertools

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops
from keras.src.backend.common.variables import AutocastScope

import keras_adam
from keras_adam import rule
from support import helpers, reference
from support.models import BATCH, X, Y, make_model
from support.steps import sparse_gradient, value_of

BACKEND = keras.backend.backend()
HALF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # half a spacing, relative
NUMPY = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
half = pytest.mark.parametrize("dtype", HALF)


def run_on(optimizer, dtype, starts, gradients):
    variables = [keras.Variable(s, dtype=dtype, name=f"v{i}") for i, s in enumerate(starts)]
    optimizer.build(variables)
    step = stepper(optimizer, variables)
    for arrays in gradients:
        step([ops.convert_to_tensor(g, dtype=dtype) for g in arrays])
    return variables


def numbers(variable):
    return np.array(ops.convert_to_numpy(ops.cast(variable, "float32")), "float64")


def problem(dtype, steps, shapes=((5, 3), (7,), (), (0, 3))):
    """Return start values and gradients that `dtype` can hold."""
    rng = np.random.default_rng(5)
    as_held = lambda x: x.astype("float32").astype(NUMPY[dtype]).astype("float32")  # noqa: E731
    starts = [as_held(rng.standard_normal(s)) for s in shapes]
    return starts, [[as_held(rng.standard_normal(s) * 0.1) for s in shapes] for _ in range(steps)]


# Rounding ---------------------------------------------------------------------------------------


def numbers_to_round():
    rng = np.random.default_rng(0)
    spread = rng.standard_normal(3000) * 10.0 ** rng.uniform(-9, 4, 3000)
    odd = [0.0, -0.0, 1.0, -1.0, 1 + 2.0**-9, 1 + 3 * 2.0**-9, 65504.0, 6e-8, 3e-8, np.inf, np.nan]
    all_bits_set = np.array([2**31 - 1, -1], "int32").view("float32")  # two more NaNs
    return np.append(np.array([*spread, *odd], "float32"), all_bits_set)


def compiled(function):
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    return function


@half
@pytest.mark.parametrize("is_compiled", [False, True])
def test_rounding_is_that_of_the_dtype(dtype, is_compiled):
    x = numbers_to_round()

    def rounded(x):
        return rule.rounded(x, dtype)

    function = compiled(rounded) if is_compiled else rounded
    got = ops.convert_to_numpy(function(ops.convert_to_tensor(x)))
    np.testing.assert_array_equal(got, x.astype(NUMPY[dtype]).astype("float32"))


@half
def test_dithered_rounding_is_right_on_average(dtype):
    x = numbers_to_round()
    x = x[np.isfinite(x) & (np.abs(x) < 6e4)]
    total = np.zeros(x.shape)
    for t in range(1000, 1256):
        result = rule.rounded(
            ops.convert_to_tensor(x), dtype, rule.dither(ops.convert_to_tensor(t))
        )
        result = ops.convert_to_numpy(result)
        np.testing.assert_array_equal(result, result.astype(NUMPY[dtype]).astype("float32"))
        total += result
    spacing = np.maximum(2 * HALF[dtype] * np.abs(x), 2.0**-24 if dtype == "float16" else 0)
    assert np.all(np.abs(total / 256 - x) <= 0.02 * spacing)


def test_dither_is_spread_evenly():
    values = [float(rule.dither(ops.convert_to_tensor(t))) for t in range(10946, 10946 + 512)]
    counts, _ = np.histogram(values, bins=16, range=(0, 1))
    assert counts.min() >= 30
    assert counts.max() <= 34


# Against float64 --------------------------------------------------------------------------------

OPTIONS = {
    "default": {},
    "L2": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "decoupled": {"weight_decay": 0.1},
    "amsgrad": {"amsgrad": True},
    "corrected": {"amsgrad": "corrected"},
    "pytorch": {"epsilon_hat": False, "epsilon": 1e-8},
    "maximize": {"maximize": True},
    "clipnorm": {"clipnorm": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "ema": {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 5},
    "accumulation": {"gradient_accumulation_steps": 2},
}


@pytest.mark.short("*-default", "bfloat16-corrected", "bfloat16-accumulation")
@pytest.mark.parametrize(
    ("dtype", "name"),
    [*(("bfloat16", name) for name in OPTIONS), ("float16", "default"), ("float16", "ema")],
)
def test_two_hundred_steps_far_below_the_spacing(dtype, name):
    """Steps of 1e-4 on values of order 1, where the spacing is 8e-3 or 1e-3.

    The end may be off by half a spacing, which the variable cannot hold, and by what the compensation loses: 2^-16 of
    the value in a step, or less, with errors that cancel.
    """
    options = {"learning_rate": 1e-4, **OPTIONS[name]}
    starts, gradients = problem(dtype, 200)
    variables = run_on(keras_adam.Adam(**options), dtype, starts, gradients)
    expected = reference.Adam(starts, **options)
    for g in gradients:
        expected.step(g)
    for variable, want in zip(variables, expected.parameters, strict=True):
        np.testing.assert_allclose(numbers(variable), want, rtol=1.02 * HALF[dtype], atol=3e-5)


@pytest.mark.short("bfloat16")
@half
def test_one_hundred_thousand_steps(dtype):
    """A weight of 1.0 makes steps of 1e-5 and ends at 0.0. Rounded to nearest, it would stay at 1.0."""
    # PyTorch makes each step in Python, and TensorFlow each operation of a step.
    steps = 100_000 if BACKEND == "jax" else 5_000
    rate = 1.0 / steps * 0.9

    def final(**options):
        variable = keras.Variable(1.0, dtype=dtype)
        optimizer = keras_adam.Adam(rate, **options)
        optimizer.build([variable])
        gradient = ops.ones((), dtype)
        if BACKEND == "jax":
            import jax

            def body(i, carry):
                values, state = optimizer.stateless_apply(carry[1], [gradient], carry[0])
                return list(values), list(state)

            start = [variable.value], [v.value for v in optimizer.variables]
            values, _ = jax.jit(lambda c: jax.lax.fori_loop(0, steps, body, c))(start)
            return float(values[0])
        if BACKEND == "tensorflow":
            import tensorflow as tf

            @tf.function
            def loop():
                for _ in tf.range(steps):
                    optimizer.apply([gradient], [variable])

            loop()
        else:
            for _ in range(steps):
                optimizer.apply([gradient], [variable])
        return float(numbers(variable))

    assert final() == pytest.approx(0.1, rel=0.01)
    assert final(state_dtype="bfloat16") == pytest.approx(0.1, rel=0.02)
    assert final(kahan_sum=False) == 1.0


def test_second_moment_in_bfloat16_does_not_stall():
    """After large gradients come small ones: v falls by a thousandth per step, less than its spacing."""
    variable = keras.Variable(np.zeros(4, "float32"))
    optimizer = keras_adam.Adam(0.0, state_dtype="bfloat16")
    optimizer.build([variable])
    step = stepper(optimizer, [variable])
    large, small = ops.full((4,), 1.0), ops.full((4,), 0.01)
    for i in range(1500):
        step([large if i < 500 else small])
    expected = 0.0
    for i in range(1500):
        expected += 0.001 * ((1.0 if i < 500 else 0.01) ** 2 - expected)
    np.testing.assert_allclose(numbers(optimizer._velocities[0]), expected, rtol=0.05)


BOTH_HALF = {"state_dtype": "bfloat16", "amsgrad": True}


@pytest.mark.short("float16-options1", "bfloat16-options2")
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("bfloat16", {"use_ema": True}),
        ("float16", {"use_ema": True}),
        ("bfloat16", BOTH_HALF),
        ("bfloat16", {**BOTH_HALF, "kahan_sum": False}),
        ("float32", BOTH_HALF),
    ],
)
def test_fast_path_equals_the_portable_one(dtype, options, monkeypatch):
    """In a few places, a rounding of float32 may change one of bfloat16."""

    class Portable(keras_adam.Adam):
        def update_step(self, gradient, variable, learning_rate):
            super().update_step(gradient, variable, learning_rate)

    starts, gradients = problem(dtype, 50)
    options = {"learning_rate": 1e-3, "weight_decay": 0.1, **options}
    one = keras_adam.Adam(**options)
    other = Portable(**options)
    want = run_on(other, dtype, starts, gradients)
    if BACKEND == "torch":
        monkeypatch.setattr(one._engine, "update_each", None)
    got = run_on(one, dtype, starts, gradients)
    for a, b in zip(got, want, strict=True):
        spacing = 2.1 * HALF[dtype] if dtype in HALF else 1e-5
        np.testing.assert_allclose(numbers(a), numbers(b), rtol=spacing, atol=1e-6)
    for a, b in zip(one.variables, other.variables, strict=True):
        if "compensation" in a.path:
            tolerance = {"atol": 1e-2}
        elif a.dtype == "bfloat16":
            tolerance = {"rtol": 2.1 * HALF["bfloat16"], "atol": 1e-6}
            assert np.sum(numbers(a) != numbers(b)) <= 1
        else:
            tolerance = {"rtol": 1e-4, "atol": 1e-6}
        np.testing.assert_allclose(numbers(a), numbers(b), **tolerance)


# What a variable is set to ----------------------------------------------------------------------


@half
def test_a_value_set_from_outside_stands_alone(dtype):
    """What rounding once took from a weight of 100 must not be added to one of 0.001."""
    variable = keras.Variable([100.0, 100.0], dtype=dtype)
    optimizer = keras_adam.Adam(1e-2)
    for _ in range(3):
        optimizer.apply([ops.ones((2,), dtype)], [variable])
    variable.assign([1e-3, 0.0])
    optimizer.learning_rate = 0.0
    optimizer.apply([ops.ones((2,), dtype)], [variable])
    np.testing.assert_allclose(numbers(variable), [1e-3, 0.0], rtol=2 * HALF[dtype])


@half
def test_constraint_acts_on_the_whole_value(dtype):
    variable = keras.Variable([0.01, 1.0], dtype=dtype)
    variable.constraint = keras.constraints.NonNeg()
    optimizer = keras_adam.Adam(1e-3)
    optimizer.build([variable])
    step = stepper(optimizer, [variable])
    for _ in range(200):
        step([ops.ones((2,), dtype)])
    np.testing.assert_allclose(numbers(variable), [0.0, 0.8], rtol=2 * HALF[dtype])


def test_three_dtypes_in_one_step():
    rng = np.random.default_rng(0)
    start = rng.standard_normal(5).astype("float32")
    variables = [
        keras.Variable(start, dtype=dtype, name=dtype)
        for dtype in ("float32", "bfloat16", "float16")
    ]
    held = [numbers(v) for v in variables]
    optimizer = keras_adam.Adam(1e-3, global_clipnorm=1.0, amsgrad=True)
    optimizer.build(variables)
    step = stepper(optimizer, variables)
    expected = reference.Adam(held, learning_rate=1e-3, global_clipnorm=1.0, amsgrad=True)
    for _ in range(100):
        g = (rng.integers(-8, 9, 5) / 4).astype("float32")  # each dtype can hold it
        step([ops.convert_to_tensor(g, v.dtype) for v in variables])
        expected.step([g] * 3)
    for variable, want in zip(variables, expected.parameters, strict=True):
        spacing = HALF.get(variable.dtype, 1e-6)
        np.testing.assert_allclose(numbers(variable), want, rtol=1.02 * spacing, atol=2e-5)


@pytest.mark.parametrize("limit", ["clipnorm", "global_clipnorm"])
def test_norm_beyond_float16(limit):
    variable = keras.Variable(np.zeros(1000), dtype="float16")
    optimizer = keras_adam.Adam(1e-2, beta_1=0.0, **{limit: 1.0})
    optimizer.apply([ops.full((1000,), 60000.0, "float16")], [variable])
    np.testing.assert_allclose(numbers(optimizer._momentums[0]), 1 / np.sqrt(1000), rtol=1e-3)


# State ------------------------------------------------------------------------------------------


def test_dtypes_of_the_state():
    variable = keras.Variable(np.ones(3), dtype="bfloat16", name="w")
    options = {"amsgrad": True, "use_ema": True, "gradient_accumulation_steps": 2}
    for state_dtype in (None, "float32", "bfloat16"):
        optimizer = keras_adam.Adam(state_dtype=state_dtype, **options)
        optimizer.build([variable])
        kept = {v.path.rpartition("w_")[2]: v.dtype for v in optimizer.variables[2:]}
        moments = state_dtype or "float32"
        assert kept == {
            "average": "float32",
            "gradient_accumulator": "float32",
            "momentum": moments,
            "velocity": moments,
            "velocity_hat": moments,
            "compensation": "bfloat16",
        }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"kahan_sum": False}])
def test_state_size(dtype, state_dtype, options):
    variables = [
        keras.Variable(np.ones(shape), dtype=dtype, name=name)
        for name, shape in (("matrix", (4, 3)), ("scalar", ()))
    ]
    optimizer = keras_adam.Adam(state_dtype=state_dtype, use_ema=True, **options)
    promised = optimizer.state_size(variables)
    optimizer.build(variables)
    size = {"float32": 4, "bfloat16": 2, "float16": 2}
    held = sum(size[v.dtype] * int(np.prod(v.shape)) for v in optimizer.variables[2:])
    assert sum(promised.values()) == held
    assert optimizer.state_size() == promised
    assert list(promised) == ["matrix", "scalar"]
    with pytest.raises(ValueError, match="`state_size` needs `variables`"):
        keras_adam.Adam().state_size()


@pytest.mark.short("options0-float16", "options1-bfloat16")
@half
@pytest.mark.parametrize("options", [{}, {"state_dtype": "bfloat16"}, {"kahan_sum": False}])
def test_save_and_go_on(dtype, options, tmp_path):
    def model_of(optimizer):
        keras.config.set_dtype_policy(dtype)
        return make_model(optimizer)

    def fit(model):
        model.fit(X, Y, batch_size=BATCH, shuffle=False, verbose=0)

    undisturbed = model_of(keras_adam.Adam(1e-3, **options))
    fit(undisturbed)
    undisturbed.save(tmp_path / "half.keras")
    fit(undisturbed)
    loaded = keras.saving.load_model(tmp_path / "half.keras")
    fit(loaded)
    for a, b in zip(loaded.optimizer.variables, undisturbed.optimizer.variables, strict=True):
        np.testing.assert_array_equal(numbers(a), numbers(b))
    for a, b in zip(loaded.weights, undisturbed.weights, strict=True):
        np.testing.assert_array_equal(numbers(a), numbers(b))


def test_state_saved_without_compensation(tmp_path):
    """It was saved by Keras's Adam, or with kahan_sum=False: the compensation begins at zero."""
    keras.config.set_dtype_policy("bfloat16")
    for other in (keras.optimizers.Adam(1e-3), keras_adam.Adam(1e-3, kahan_sum=False)):
        model = make_model(other)
        model.fit(X, Y, batch_size=BATCH, verbose=0)
        model.save_weights(tmp_path / "other.weights.h5")
        ours = make_model(keras_adam.Adam(1e-3))
        ours.optimizer.build(ours.trainable_variables)
        ours.load_weights(tmp_path / "other.weights.h5")
        assert int(ours.optimizer.iterations) == 4
        np.testing.assert_allclose(
            numbers(ours.optimizer._momentums[0]), numbers(other._momentums[0]), rtol=1e-6
        )
        for lost in ours.optimizer._compensations:
            assert not numbers(lost).any()


def test_state_dict_of_half_precision():
    variable = keras.Variable(np.ones((2, 3)), dtype="bfloat16", name="kernel")
    optimizer = keras_adam.Adam.with_torch_arguments(1e-3)
    optimizer.build([variable])
    for _ in range(3):
        optimizer.apply([ops.ones((2, 3), "bfloat16")], [variable])
    state = optimizer.state_dict(as_numpy=True)
    other = keras_adam.Adam.with_torch_arguments(1e-3)
    other.build([keras.Variable(np.ones((2, 3)), dtype="bfloat16", name="kernel")])
    other.load_state_dict(state)
    for name in ("_momentums", "_velocities"):
        a, b = getattr(optimizer, name)[0], getattr(other, name)[0]
        np.testing.assert_array_equal(numbers(a), numbers(b))


# Steps that are skipped -------------------------------------------------------------------------

BAD = {"-inf": -np.inf, "nan": np.nan}


def stepper(optimizer, variables):
    """A function that takes a step, compiled where the backend compiles."""
    if BACKEND == "jax":
        import jax

        step = jax.jit(optimizer.stateless_apply)

        def run(gradients):
            values, state = step(
                [v.value for v in optimizer.variables], gradients, [v.value for v in variables]
            )
            for v, x in zip([*variables, *optimizer.variables], [*values, *state], strict=True):
                v.assign(x)

        return run
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(lambda gradients: optimizer.apply(gradients, variables))
    return lambda gradients: optimizer.apply(gradients, variables)


@pytest.mark.short("plain-True--inf", "accumulation-True-nan", "clipped-False--inf")
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3, "use_ema": True, "ema_overwrite_frequency": 2},
        {"global_clipnorm": 1.0, "weight_decay": 0.1, "loss_scale_factor": 16.0},
    ],
    ids=["plain", "accumulation", "clipped"],
)
def test_bad_steps_change_nothing(options, is_compiled, bad):
    """A run with some bad gradients equals the run without them, to the bit."""
    starts, gradients = helpers.random_problem(np.random.default_rng(2), 12)

    def train(strewn):
        variables = helpers.make_variables(starts)
        optimizer = keras_adam.Adam(0.01, skip_nonfinite=True, **options)
        optimizer.build(variables)
        step = stepper(optimizer, variables) if is_compiled else None
        for i, arrays in enumerate(gradients):
            for poisoned in [True, False] if strewn and i % 4 == 1 else [False]:
                tensors = [np.array(a) for a in arrays]
                if poisoned:
                    tensors[1][2] = BAD[bad]
                tensors = helpers.to_tensors(tensors)
                step(tensors) if step else optimizer.apply(tensors, variables)
        return variables, optimizer

    (got, optimizer), (want, undisturbed) = train(True), train(False)
    assert int(optimizer.skipped_steps) == 3
    assert int(undisturbed.skipped_steps) == 0
    assert int(optimizer._iterations) == 12
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(numbers(a), numbers(b))
    for a, b in zip(optimizer.variables, undisturbed.variables, strict=True):
        if "skipped_steps" not in a.path:
            np.testing.assert_array_equal(numbers(a), numbers(b))


def test_skipping_in_fit(tmp_path):
    x = X.copy()
    x[5] = np.nan  # in the second of four batches
    model = make_model(keras_adam.Adam(0.01, skip_nonfinite=True))
    model.fit(x, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    assert int(model.optimizer.skipped_steps) == 2
    assert int(model.optimizer.iterations) == 6
    assert all(np.isfinite(w).all() for w in model.get_weights())
    model.save(tmp_path / "skipped.keras")
    assert int(keras.saving.load_model(tmp_path / "skipped.keras").optimizer.skipped_steps) == 2


# Options ----------------------------------------------------------------------------------------


def test_config():
    options = {"state_dtype": "bfloat16", "kahan_sum": False, "skip_nonfinite": True}
    config = keras_adam.Adam(**options).get_config()
    again = keras_adam.Adam.from_config(config)
    assert {name: getattr(again, name) for name in options} == options
    assert not {*options} & {*keras_adam.Adam().get_config()}


@pytest.mark.parametrize(
    "options", [{"state_dtype": "float16"}, {"kahan_sum": "yes"}, {"skip_nonfinite": 1}]
)
def test_errors(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}="):
        keras_adam.Adam(**options)


def test_lora():
    """bfloat16 adapters over a frozen base, at learning rates that are usual for fine-tuning."""
    keras.config.set_dtype_policy("bfloat16")
    rng = np.random.default_rng(0)
    base = keras.layers.Dense(16, name="base")
    inputs = keras.Input((16,))
    outputs = base(inputs)
    down = keras.layers.Dense(4, use_bias=False, name="down", kernel_initializer="he_normal")
    up = keras.layers.Dense(16, use_bias=False, name="up", kernel_initializer="zeros")
    outputs = keras.layers.Add()([outputs, up(down(inputs))])
    model = keras.Model(inputs, outputs)
    base.trainable = False
    x = rng.standard_normal((256, 16))
    y = x @ rng.standard_normal((16, 4)) @ rng.standard_normal((4, 16)) * 0.1
    model.compile(keras_adam.Adam(2e-4), loss="mse")
    before = [numbers(w) for w in model.trainable_variables]
    history = model.fit(x, y, batch_size=32, epochs=30, verbose=0).history["loss"]
    assert history[-1] < 0.97 * history[0]
    for w, old in zip(model.trainable_variables, before, strict=True):
        assert np.mean(numbers(w) != old) > 0.9


# Odd cases --------------------------------------------------------------------------------------


@half
def test_rounding_leaves_any_nan(dtype):
    bits = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001], "uint32")
    got = rule.rounded(ops.convert_to_tensor(bits.view("float32")), dtype)
    assert np.isnan(ops.convert_to_numpy(got)).all()


def test_small_float16_weights():
    """Below 2^-13 float16 has no number as small as a rounding error."""
    variable = keras.Variable([0.0], dtype="float16")
    optimizer = keras_adam.Adam(2e-8, epsilon=1e-12)
    optimizer.build([variable])
    step, gradient = stepper(optimizer, [variable]), ops.convert_to_tensor([-1.0], "float16")
    for _ in range(500):
        step([gradient])
    np.testing.assert_allclose(numbers(variable), [1e-5], rtol=5e-3)


@pytest.mark.parametrize("lazy", [False, True])
def test_many_parts_of_a_row_are_summed_in_float32(lazy):
    """A sum of 0.75 stops at 256 in bfloat16."""
    shape = (3, 2)
    gradient = sparse_gradient(np.ones(4000, "int64"), np.full((4000, 2), 0.75), shape)
    if BACKEND == "jax":
        gradient = gradient.astype("bfloat16")
    elif BACKEND == "torch":
        import torch

        gradient = gradient.to(torch.bfloat16)
    else:
        import tensorflow as tf

        values = tf.cast(gradient.values, tf.bfloat16)
        gradient = tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    variable = keras.Variable(np.zeros(shape), dtype="bfloat16")
    optimizer = keras_adam.Adam(lazy=lazy, beta_1=0.0)
    optimizer.apply([gradient], [variable])
    # On JAX, XLA rounds the sum once to bfloat16.
    np.testing.assert_allclose(numbers(optimizer._momentums[0])[1], 3000.0, rtol=3e-3)


def test_float64_gradient_of_a_half_variable():
    with helpers.float64_allowed():
        variable = keras.Variable([1.0], dtype="bfloat16")
        optimizer = keras_adam.Adam(0.5)
        optimizer.apply([ops.convert_to_tensor(np.array([2.0]), "float64")], [variable])
        np.testing.assert_allclose(numbers(variable), [0.5])


@pytest.mark.parametrize("options", [{"skip_nonfinite": True}, {"gradient_accumulation_steps": 2}])
def test_variables_beyond_the_last_build(options):
    variables = [keras.Variable(np.ones(3, "float32"), name=n) for n in "ab"]
    optimizer = keras_adam.Adam(0.1, **options)
    optimizer.build(variables)
    optimizer.build(variables[:1])
    for _ in range(2):
        optimizer.apply([ops.ones(3)] * 2, variables)
    want = 0.8 if "skip_nonfinite" in options else 0.9
    for variable in variables:
        np.testing.assert_allclose(numbers(variable), want, rtol=1e-6)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch alone updates them in pieces")
def test_pieces_that_end_within_a_variable(monkeypatch, rng):
    """They equal one piece, except for the kernel's rounding at a piece's end; an empty variable is in no piece."""
    from keras_adam.engines import torch_kernel as backend

    sizes = [(3, 5), (), (0,), (7,), (2, 2, 4)]
    start = [rng.normal(size=size) for size in sizes]
    gradients = [[rng.normal(size=size) for size in sizes] for _ in range(5)]
    results = []
    for piece in (6, 1000):
        monkeypatch.setattr(backend, "_PIECE", piece)
        variables = [keras.Variable(x, dtype="bfloat16") for x in start]
        optimizer = keras_adam.Adam(0.01, amsgrad=True, weight_decay=0.1)
        for step in gradients:
            optimizer.apply([ops.convert_to_tensor(g, "bfloat16") for g in step], variables)
        moments = [v for v in optimizer.variables if "compensation" not in v.path]
        results.append([value_of(x) for x in map(optimizer._engine.read_parameter, variables)])
        results[-1] += [value_of(v) for v in moments]
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert not np.array_equal(results[0][0], np.asarray(start[0], "float32"))


@half
@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch alone has a way of its own")
def test_own_way_to_round_is_that_of_the_rule(dtype):
    """It is so to the bit, for each bfloat16; also where another value was set, and for NaN."""
    import torch

    from keras_adam.engines import torch_kernel as backend

    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    rng = np.random.default_rng(0)
    factors = torch.tensor(1 + rng.uniform(-0.01, 0.01, 2**16).astype("float32"))
    numbers = torch.cat([every.float() * factors, torch.tensor(numbers_to_round())])
    if dtype == "float16":
        numbers = numbers[numbers.isnan() | (numbers.abs() < 6e4)]
    finite = numbers[numbers.abs() < 1e30]  # also their sum, which tells
    for t, p in itertools.product((0, 1, 5000), (numbers, finite)):
        dither = rule.dither(torch.tensor(t))
        got, want = backend._dithered(p.clone(), dither), rule.rounded(p, "bfloat16", dither)
        np.testing.assert_array_equal(value_of(got), value_of(want))
        kept, lost = backend._split(p, dtype, dither)
        for got, want in zip((kept, lost), rule.split(p, dtype, dither), strict=True):
            np.testing.assert_array_equal(value_of(got), value_of(want))
        half = getattr(torch, dtype)
        kept, lost = kept.to(half), lost.to(half)
        for others in (lost, lost.roll(1), lost * 1e30, torch.full_like(lost, torch.nan)):
            want = rule.joined(kept.float(), others.float(), dtype)
            got = backend._joined(kept, others, dtype)
            np.testing.assert_array_equal(value_of(got), value_of(want))


def test_moments_of_a_float64_variable_in_bfloat16_do_not_stall():
    expected = 0.0
    with helpers.float64_allowed():
        variable = keras.Variable(0.0, dtype="float64")
        optimizer = keras_adam.Adam(0.0, state_dtype="bfloat16")
        optimizer.build([variable])
        step = stepper(optimizer, [variable])
        for i in range(1000):
            gradient = 10.0 if i < 20 else 0.1
            step([ops.convert_to_tensor(gradient, "float64")])
            expected += 0.001 * (gradient**2 - expected)
    np.testing.assert_allclose(numbers(optimizer._velocities[0]), expected, rtol=0.05)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch alone joins gradients")
@pytest.mark.parametrize(("dtype", "large"), [("bfloat16", 257), ("float16", 100_000)])
def test_gradients_of_different_dtypes(dtype, large):
    variables = [keras.Variable([1.0], dtype=dtype) for _ in range(2)]
    optimizer = keras_adam.Adam(0.0)
    gradients = [ops.convert_to_tensor([large], "int32"), ops.ones((1,), dtype)]
    optimizer.apply(gradients, variables)
    momenta = [numbers(m).item() for m in optimizer._momentums]
    np.testing.assert_allclose(momenta, [0.1 * large, 0.1], rtol=1e-6)


@pytest.mark.parametrize("built", ["before", "by build", "by the first step"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("options", [{}, {"amsgrad": "corrected"}], ids=["fused", "portable"])
def test_step_within_a_layer_of_mixed_precision(options, dtype, built):
    """Within such a layer `variable.value` is a copy in bfloat16."""
    variable = keras.Variable([1.0], dtype=dtype)
    optimizer = keras_adam.Adam(0.1, **options)
    if built == "before":
        optimizer.build([variable])
    elif built == "by build":
        with AutocastScope("bfloat16"):
            optimizer.build([variable])
    gradient = ops.ones(1)
    for _ in range(2):
        with AutocastScope("bfloat16"):
            optimizer.apply([gradient], [variable])
        optimizer.apply([gradient], [variable])
    whole = ops.convert_to_numpy(optimizer._engine.read_parameter(variable))
    np.testing.assert_allclose(whole, [0.6], rtol=1e-5)
    assert keras.backend.standardize_dtype(variable._value.dtype) == dtype
    assert ("compensation" in optimizer.variables[-1].path) == (dtype == "float16")
    for x in (*optimizer._momentums, *optimizer._velocities):
        assert keras.backend.standardize_dtype(x._value.dtype) == "float32"


def test_state_within_a_layer_of_mixed_precision():
    """Within such a layer a float32 variable returns a float16 value, which must not be saved or restored."""
    variable = keras.Variable([1.2345678, 2.3456789], name="v")
    optimizer = keras_adam.Adam(0.01, use_ema=True, ema_momentum=0.5)
    for gradient in ([0.1234567, 0.2], [0.3, -0.7654321]):
        optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
    plain, within = {}, {}
    optimizer.save_own_variables(plain)
    other_variable = keras.Variable([0.0, 0.0], name="v")
    other, loaded = (keras_adam.Adam(0.01, use_ema=True, ema_momentum=0.5) for _ in range(2))
    other.build([other_variable])
    loaded.build([other_variable])
    expected = [keras.ops.convert_to_numpy(x) for x in optimizer.variables]
    with AutocastScope("float16"):
        optimizer.save_own_variables(within)
        other.set_weights(optimizer.variables)
        loaded.load_own_variables(plain)
        torch_s = optimizer.state_dict()
        optimizer.finalize_variable_values([variable])
    for name, value in plain.items():
        np.testing.assert_array_equal(within[name], value, strict=True)
    for of_one in (other, loaded):
        for x, value in zip(of_one.variables, expected, strict=True):
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(x), value)
    saved = [np.asarray(torch_s["state"][0][key]) for key in ("exp_avg", "exp_avg_sq")]
    np.testing.assert_array_equal(saved, expected[-2:], strict=True)
    average = next(v for v in optimizer.variables if "average" in v.path)
    np.testing.assert_array_equal(variable.numpy(), average.numpy())
