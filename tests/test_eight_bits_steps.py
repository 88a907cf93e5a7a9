"""State in 8 bits beside every other option: fast path against portable path, and against float32."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_adam
from keras_adam.engines import Engine
from support import wide
from support.eight_bits import assert_same_codes, decoded, encoded, places
from support.helpers import float64_allowed
from support.portable import OPTIONS, Portable
from support.steps import BACKEND, compiled_step, either_way, slots, value_of

# Three in blocks, of which two end in the midst of one, and one too small for them.
SHAPES = [(64, 64), (5000,), (3,), (70, 80)]


def make_variables(shapes=SHAPES, dtype="float32", seed=3):
    rng = np.random.default_rng(seed)
    return [
        keras.Variable(rng.standard_normal(shape), dtype=dtype, name=f"v{i}")
        for i, shape in enumerate(shapes)
    ]


def gradients_of(variables, rng):
    arrays = [rng.standard_normal(v.shape) * 10.0 ** rng.uniform(-3, 1, v.shape) for v in variables]
    return [
        ops.cast(ops.convert_to_tensor(a.astype("float32")), v.dtype)
        for a, v in zip(arrays, variables, strict=True)
    ]


def compare(fast, portable, variables, expected, near_p):
    """What one step made from one state: at most one code in 10,000 may be its neighbour."""
    differing = total = 0
    for one, other in zip(fast.variables, portable.variables, strict=True):
        a, b = (np.array(ops.convert_to_numpy(x)) for x in (one, other))
        if a.dtype == np.uint8:
            signed = one.path.endswith("_momentum")
            away = np.abs(places(a, signed) - places(b, signed))
            assert away.max() <= 1, one.path
            differing, total = differing + np.sum(away), total + away.size
        elif "compensation" not in one.path:
            a, b = value_of(one), value_of(other)
            np.testing.assert_allclose(a, b, rtol=3e-5, atol=1e-9, err_msg=one.path)
    assert differing <= total / 10_000 + 1
    for one, other in zip(variables, expected, strict=True):
        whole = [value_of(o._engine.read_parameter(v)) for o, v in ((fast, one), (portable, other))]
        np.testing.assert_allclose(*whole, rtol=near_p, atol=near_p / 10)


def run_both(options, shapes=SHAPES, dtype="float32", steps=4, near_p=1.2e-5):
    rng = np.random.default_rng(7)
    variables, expected = make_variables(shapes, dtype), make_variables(shapes, dtype)
    options = {"learning_rate": 1e-2, "state_dtype": "8bit", **options}
    fast, portable = keras_adam.Adam(**options), Portable(**options)
    for optimizer, known in ((fast, variables), (portable, expected)):
        optimizer.exclude_from_weight_decay(var_names=["v1"])
        optimizer.build(known)
    for i in range(steps):
        portable.set_weights(fast.variables)
        for one, other in zip(expected, variables, strict=True):
            one.assign(ops.copy(other.value))
        gradients = gradients_of(variables, rng)
        fast.apply(gradients, variables)
        portable.apply(gradients, expected)
        assert int(value_of(fast._iterations)) == i + 1
        compare(fast, portable, variables, expected, near_p)
    return fast


@pytest.mark.short("plain", "amsgrad*", "l2", "groups")
@pytest.mark.parametrize("name", OPTIONS)
def test_fast_path_equals_the_portable_path(name):
    run_both(OPTIONS[name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"kahan_sum": False}], ids=str)
def test_half_precision(options, dtype):
    """A variable and what rounding took from it, together, are rounded up or down in 16 or 22 bits."""
    near = {"bfloat16": 2.0**-14, "float16": 2.0**-19}[dtype]
    if options.get("kahan_sum") is False:
        near = {"bfloat16": 2.0**-7, "float16": 2.0**-10}[dtype]
    run_both(options, dtype=dtype, near_p=near)


@pytest.mark.parametrize("shapes", [[(4096,)], [(5000,)], [(2**18 + 300,)], [(4500,)] * 5], ids=str)
def test_sizes(shapes):
    run_both({}, shapes, steps=2)


@pytest.mark.parametrize("width", [255, 256, 300, 512])
def test_a_dense_gradient_with_lazy(width):
    """Blocks end with their row, and PyTorch's kernel knows none that is not whole."""
    fast = run_both({"lazy": True}, [(17, width), (64, 64)])
    scales = slots(fast, "momentum_scale")
    assert [tuple(s.shape) for s in scales] == [(17, -(-width // 256)), (64, 1)]


@pytest.mark.skipif(BACKEND != "torch", reason="elsewhere all 8-bit state takes the portable path")
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"lazy": True}], ids=str)
def test_the_kernel_is_used(options, monkeypatch):
    def refuse(*args):
        raise AssertionError("the portable path ran")

    monkeypatch.setattr(Engine, "update_each", refuse)
    variables = make_variables([(16, 256), (8, 512)])
    optimizer = keras_adam.Adam(state_dtype="8bit", **options)
    optimizer.apply(gradients_of(variables, np.random.default_rng(0)), variables)


# Against the description and against float32


@either_way
@pytest.mark.parametrize("amsgrad", [True, "corrected"])
def test_the_maximum_is_rounded_to_nearest(make_step, amsgrad):
    rng = np.random.default_rng(2)
    (variable,) = make_variables([(5000,)])
    optimizer = keras_adam.Adam(0.01, state_dtype="8bit", amsgrad=amsgrad)
    optimizer.build([variable])
    step = make_step(optimizer, [variable])

    def moment(role):
        arrays = [ops.convert_to_numpy(slots(optimizer, r)[0]) for r in (role, f"{role}_scale")]
        return decoded(*arrays, signed=role == "momentum")

    for i in range(6):
        v, s, p = moment("velocity"), moment("velocity_hat"), value_of(variable)
        m = moment("momentum")
        g = rng.standard_normal(5000).astype("float32") * 10.0 ** rng.uniform(-3, 1, 5000)
        g = g.astype("float32").astype("float64")
        step(g)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        corrections = 1 - 0.9 ** (i + 1), 1 - 0.999 ** (i + 1)
        s = np.maximum(s, v / corrections[1] if amsgrad == "corrected" else v)
        scale = 1 if amsgrad == "corrected" else np.sqrt(corrections[1])
        p = p - 0.01 * m / corrections[0] * scale / (np.sqrt(s) + 1e-7)
        np.testing.assert_allclose(value_of(variable), p, rtol=1e-5, atol=1e-6)
        wanted, scale, margin = encoded(s, signed=False)
        found = ops.convert_to_numpy(slots(optimizer, "velocity_hat")[0])
        np.testing.assert_allclose(
            ops.convert_to_numpy(slots(optimizer, "velocity_hat_scale")[0]), scale, rtol=1e-4
        )
        assert_same_codes(np.array(found), wanted, margin, signed=False, near=2e-3)


WHOLE = {
    **{name: OPTIONS[name] for name in OPTIONS if "epsilon" not in name and name != "callables"},
    "skip_nonfinite": {"skip_nonfinite": True},
}


@pytest.mark.short("plain", "amsgrad*", "accumulation_ema_clip", "skip_nonfinite")
@pytest.mark.parametrize("name", WHOLE)
def test_trains_as_float32_does(name):
    """Over 20 steps, the way that 8 bits take ends within a tenth of where float32's does."""
    ends = []
    for state_dtype in (None, "8bit"):
        rng = np.random.default_rng(5)
        variables = make_variables()
        starts = [value_of(v) for v in variables]
        size = [np.abs(rng.standard_normal(v.shape)) for v in variables]
        optimizer = keras_adam.Adam(
            **{"learning_rate": 1e-2, **WHOLE[name]}, state_dtype=state_dtype
        )
        for i in range(20):
            noise = [rng.standard_normal(v.shape) + 0.5 for v in variables]
            gradients = [
                ops.convert_to_tensor((n * s).astype("float32"))
                for n, s in zip(noise, size, strict=True)
            ]
            if i == 7 and name == "skip_nonfinite":
                gradients[0] = gradients[0] * np.float32("inf")
            optimizer.apply(gradients, variables)
        ends.append([value_of(v) for v in variables])
    assert wide.distance(ends[1], ends[0], starts) < 0.1


# Options of groups


def dtypes_of(optimizer, variable):
    arrays = optimizer._parameters[variable].momentum.arrays
    return [keras.backend.standardize_dtype(a.dtype) for a in arrays]


KEPT = {"8bit": ["uint8", "float32"], "bfloat16": ["bfloat16"], "float32": ["float32"]}


@pytest.mark.parametrize("of_all", [None, "float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("own", [None, "float32", "bfloat16", "8bit"])
def test_group_of_its_own_dtype(own, of_all):
    variables = make_variables([(64, 64)] * 3)
    groups = [{"params": "v0", "state_dtype": own}, {"params": "v1"}]
    optimizer = keras_adam.Adam(0.01, state_dtype=of_all, param_groups=groups)
    optimizer.build(variables)
    effective = [own, of_all, of_all]
    for variable, dtype in zip(variables, effective, strict=True):
        assert dtypes_of(optimizer, variable) == KEPT[dtype or "float32"]
    for group, dtype in zip(optimizer.param_groups, effective, strict=True):
        assert group["state_dtype"] == dtype
        assert dict(group)["state_dtype"] == dtype
        with pytest.raises(ValueError, match="`state_dtype` cannot be set after the constructor"):
            group["state_dtype"] = "8bit"
    assert [("state_dtype" in repr(g)) for g in optimizer.param_groups] == [own != of_all, 0, 0]
    again = keras_adam.Adam.from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()
    again.build(make_variables([(64, 64)] * 3))
    assert again.state_size() == optimizer.state_size()
    optimizer.apply(gradients_of(variables, np.random.default_rng(0)), variables)
    late = keras.Variable(np.zeros((64, 64), "float32"), name="late")
    optimizer.add_param_group({"params": late, "state_dtype": "8bit"})
    assert dtypes_of(optimizer, late) == KEPT["8bit"]
    optimizer.apply([ops.ones((64, 64))], [late])
    np.testing.assert_allclose(value_of(late), -0.01, rtol=1e-4)


@pytest.mark.parametrize("wrong", ["float16", "float64", "8-bit", "int8", 8, True])
def test_no_such_dtype(wrong):
    with pytest.raises(ValueError, match=r"`state_dtype` must be .*8bit.*Received: state_dtype="):
        keras_adam.Adam(state_dtype=wrong)
    with pytest.raises(ValueError, match=r"In `param_groups\[0\]`: `state_dtype` must be"):
        keras_adam.Adam(param_groups=[{"params": ".*", "state_dtype": wrong}])


def test_config():
    optimizer = keras_adam.AdamW(state_dtype="8bit")
    assert keras_adam.AdamW.from_config(optimizer.get_config()).state_dtype == "8bit"
    assert "state_dtype='8bit'" in repr(optimizer)


def test_float64_variables_keep_float64():
    with float64_allowed():
        variables = make_variables([(64, 64)], "float64")
        optimizer = keras_adam.Adam(0.01, state_dtype="8bit")
        optimizer.apply([ops.ones((64, 64), "float64")], variables)
        assert dtypes_of(optimizer, variables[0]) == ["float64"]
        assert optimizer.state_size() == {"v0": 2 * 8 * 4096}


def test_with_float64_allowed():
    """JAX's other mode, in which whole numbers are wider too."""
    with float64_allowed():
        run_both({"amsgrad": True}, steps=2)


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("group", [True, False])
def test_lazy_cannot_change_once_there_are_blocks(built, group):
    variables = make_variables([(64, 64)])
    groups = [{"params": "v0", "state_dtype": "8bit"}] if group else None
    optimizer = keras_adam.Adam(state_dtype=None if group else "8bit", param_groups=groups)
    if not built:
        optimizer.lazy = True
        return
    optimizer.build(variables)
    with pytest.raises(ValueError, match="`lazy` cannot be set now: it decides which state"):
        optimizer.lazy = True
    assert optimizer.lazy is False
    optimizer.lazy = False


# Hooks, other optimizers, compiled steps


def test_hooks_of_a_subclass():
    assigned = []

    class Watched(keras_adam.Adam):
        def assign(self, variable, value):
            assigned.append(variable.path)
            super().assign(variable, value)

    results = []
    for cls in (Watched, Portable, keras_adam.Adam):
        variables = make_variables([(64, 64)])
        optimizer = cls(0.01, state_dtype="8bit")
        rng = np.random.default_rng(1)
        for _ in range(2):
            optimizer.apply(gradients_of(variables, rng), variables)
        results.append(value_of(variables[0]))
    roles = [path.partition("v0_")[2] for path in assigned]
    for role in ("momentum", "momentum_scale", "velocity", "velocity_scale"):
        assert roles.count(role) == 2
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-6)
    assert np.mean(np.abs(results[0] - results[2]) > 1e-5) < 1e-3


@pytest.mark.parametrize("jit_compile", [True, False])
@pytest.mark.parametrize("options", [wide.EIGHT_BITS, wide.EVERYTHING], ids=["plain", "everything"])
def test_fit(options, jit_compile):
    if BACKEND == "torch" and jit_compile:
        pytest.skip("PyTorch's compiler takes a minute")
    ends = []
    for state_dtype in (None, "8bit"):
        optimizer = keras_adam.Adam(**options | {"state_dtype": state_dtype})
        model = wide.make_model(optimizer, jit_compile=jit_compile)
        ends.append(wide.fit(model, epochs=3).get_weights())
    assert wide.distance(ends[1], ends[0], wide.STARTS) < 0.1
    eager = wide.make_model(keras_adam.Adam(**options), run_eagerly=True)
    wide.fit(eager, epochs=3)
    # A code that goes the other way moves its element by an eighth of a step.
    assert wide.distance(ends[1], eager.get_weights(), wide.STARTS) < 0.03


def test_loss_scale_optimizer():
    model = wide.make_model(
        keras.optimizers.LossScaleOptimizer(
            keras_adam.Adam(**wide.EIGHT_BITS), initial_scale=2.0**10
        )
    )
    wide.fit(model, epochs=2)
    plain = wide.trained(epochs=2)
    assert wide.distance(model.get_weights(), plain.get_weights(), wide.STARTS) < 0.03


@pytest.mark.skipif(BACKEND != "jax", reason="JAX's donated arrays")
def test_stateless_apply_with_donation():
    import jax

    variables, expected = make_variables(), make_variables()
    optimizer, other = (keras_adam.Adam(**wide.EIGHT_BITS, amsgrad=True) for _ in range(2))
    optimizer.build(variables)
    step = jax.jit(optimizer.stateless_apply, donate_argnums=(0, 2))
    values, state = ([ops.copy(v.value) for v in x] for x in (variables, optimizer.variables))
    plain = compiled_step(other, expected)
    for seed in range(3):
        gradients = gradients_of(variables, np.random.default_rng(seed))
        before = [*values, *state]
        values, state = step(state, gradients, values)
        assert all(x.is_deleted() for x in before if x.size > 4000)
        plain(*gradients)
    for got, want in zip([*values, *state], [*expected, *other.variables], strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want.value))
