"""PyTorch alone has tensors that share memory or are replaced, and modes that change what tensors do."""

import keras
import numpy as np
import pytest

import keras_adam
from support import reference
from support.tolerances import TOLERANCES

if keras.backend.backend() != "torch":
    pytest.skip("only PyTorch's tensors share memory and modes", allow_module_level=True)
import torch

STARTS = [np.arange(1.0, 5.0), np.array([2.0, -4.0, 6.0, 8.0]), np.array([-1.0, 0.5, 3.0])]


PATHS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "amsgrad_corrected": {"amsgrad": "corrected"},
    "l2": {"weight_decay": 0.1, "decoupled_weight_decay": False},
}


def make(path="plain", dtype="float32"):
    options = PATHS[path]
    variables = [keras.Variable(x, dtype=dtype, name=f"v{i}") for i, x in enumerate(STARTS)]
    optimizer = keras_adam.Adam(0.1, **options)
    optimizer.build(variables)
    oracle = reference.Adam(STARTS, learning_rate=0.1, **options)
    return variables, optimizer, oracle


def arrays(tensors):
    """Copies: an array of a torch tensor is its memory."""
    tensors = [keras.ops.convert_to_tensor(x) for x in tensors]
    return [np.array(keras.ops.convert_to_numpy(x), "float64") for x in tensors]


def check(variables, oracle):
    for got, want in zip(arrays(variables), oracle.parameters, strict=True):
        np.testing.assert_allclose(got, want, **TOLERANCES["float32"])


SHARING = {
    "value": lambda vs, slots: vs[0].value,
    "detached": lambda vs, slots: vs[0].value.detach(),
    "data": lambda vs, slots: vs[0].value.data,
    "own": lambda vs, slots: vs[1].value.data,
    "own_reversed": lambda vs, slots: vs[1].value.data.view(2, 2).t().reshape(4),
    "first_moment": lambda vs, slots: slots[0].value.data,
    "second_moment": lambda vs, slots: slots[1].value.data,
    "own_moment": lambda vs, slots: slots[3].value.data,
}


@pytest.mark.parametrize("kind", SHARING)
@pytest.mark.parametrize("path", PATHS)
def test_a_gradient_that_shares_memory(path, kind):
    variables, optimizer, oracle = make(path)
    slots = [
        x for pair in zip(optimizer._momentums, optimizer._velocities, strict=True) for x in pair
    ]
    for _ in range(5):
        shared = SHARING[kind](variables, slots)
        # The third one has a part of the same memory, which begins elsewhere.
        gradients = [keras.ops.ones(4), shared, shared[1:].detach()]
        oracle.step(arrays(gradients))
        optimizer.apply(gradients, variables)
        check(variables, oracle)


def test_gradients_of_their_own_memory_are_not_copied(monkeypatch):
    variables, optimizer, _ = make()
    monkeypatch.setattr(torch.Tensor, "clone", None)
    flat = torch.ones(11)
    optimizer.apply([flat[:4], flat[4:8], flat[8:]], variables)


def replace(variable):
    variable._value = torch.nn.Parameter(variable.value.detach().clone(), variable.trainable)


def swap_data(variable):
    variable.value.data = variable.value.data.clone()


@pytest.mark.parametrize("change", [replace, swap_data], ids=lambda f: f.__name__)
@pytest.mark.parametrize("path", PATHS)
def test_a_variable_whose_tensor_was_replaced(path, change):
    variables, optimizer, oracle = make(path)
    rng = np.random.default_rng(0)
    for step in range(6):
        gradients = [rng.normal(size=x.shape).astype("float32") for x in STARTS]
        if step in (2, 4):
            old = [v.value.data for v in variables]
            for variable in variables[:2] if step == 2 else variables:
                change(variable)
            before = arrays(old)
        oracle.step(gradients)
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients], variables)
        check(variables, oracle)
        if step == 4:
            np.testing.assert_equal(arrays(old), before)


def test_a_gradient_in_the_memory_of_a_replaced_tensor():
    variables, optimizer, oracle = make()
    for change in (None, replace, swap_data):
        if change:
            change(variables[0])
        gradients = [keras.ops.ones(4), variables[0].value.data, keras.ops.ones(3)]
        oracle.step(arrays(gradients))
        optimizer.apply(gradients, variables)
        check(variables, oracle)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{"amsgrad": True}, {"use_ema": True, "param_groups": []}])
def test_state_whose_tensors_were_replaced(dtype, options):
    """A step goes on as if nothing had been replaced."""
    results = []
    for replaced in (False, True):
        variables = [keras.Variable(x, dtype=dtype, name=f"v{i}") for i, x in enumerate(STARTS)]
        optimizer = keras_adam.Adam(0.1, **options)
        rng = np.random.default_rng(0)
        for step in range(6):
            if replaced and step % 2:
                for variable in optimizer.variables:
                    variable._value = variable.value.detach().clone()
            gradients = [
                keras.ops.convert_to_tensor(rng.normal(size=x.shape), dtype) for x in STARTS
            ]
            optimizer.apply(gradients, variables)
        results.append([keras.ops.cast(v, "float32") for v in (*variables, *optimizer.variables)])
    for got, want in zip(arrays(results[1]), arrays(results[0]), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("float32", {}), ("bfloat16", {}), ("float16", {}), ("float32", {"state_dtype": "bfloat16"})],
)
def test_variables_of_one_tensor(dtype, options):
    """Each is updated from the result of the one before, as by separate optimizers."""
    rng = np.random.default_rng(0)
    variables = [keras.Variable([1.0, -2.0, 0.5], dtype=dtype) for _ in range(2)]
    variables[1]._value = variables[0]._value
    optimizer = keras_adam.Adam(0.1, **options)
    moments = [reference.Adam([np.zeros(3)], learning_rate=0.1) for _ in variables]
    want = np.array([1.0, -2.0, 0.5])
    for gradients in rng.normal(size=(5, 2, 3)).astype("float32"):
        tensors = [torch.tensor(g).to(variables[0].value.dtype) for g in gradients]
        optimizer.apply(tensors, variables)
        for oracle, gradient in zip(moments, arrays(tensors), strict=True):
            oracle.parameters = [want]
            oracle.step([gradient])
            want = oracle.parameters[0]
    half = "bfloat16" in (dtype, *options.values())
    tolerance = TOLERANCES["bfloat16" if half else dtype]
    np.testing.assert_allclose(*arrays([variables[0].value.float(), want]), **tolerance)


GRADIENT_KINDS = {
    # As of the imaginary part of a conjugate; such a gradient of a scalar is contiguous.
    "negated_view": lambda x: torch._neg_view(torch.tensor(-x).float()),
    "whole_numbers": lambda x: torch.tensor(x).long(),
}


@pytest.mark.parametrize(
    "options",
    [{}, {"clipnorm": 0.5}, {"global_clipnorm": 0.5}, {"clipvalue": 0.5}, {"skip_nonfinite": True}],
    ids=lambda options: "".join(options) or "plain",
)
@pytest.mark.parametrize("kind", GRADIENT_KINDS)
def test_a_gradient_of_another_kind(kind, options):
    variables = [keras.Variable(x, dtype="float32") for x in STARTS]
    optimizer = keras_adam.Adam(0.1, **options)
    clipping = {k: v for k, v in options.items() if k != "skip_nonfinite"}
    oracle = reference.Adam(STARTS, learning_rate=0.1, **clipping)
    for step in range(3):
        gradients = [np.round(x + step) for x in STARTS]
        oracle.step(gradients)
        optimizer.apply([GRADIENT_KINDS[kind](g) for g in gradients], variables)
        check(variables, oracle)


def test_the_gradient_of_an_imaginary_part():
    variables = [keras.Variable(1.0), keras.Variable(2.0)]
    optimizer = keras_adam.Adam(0.1)

    def loss():
        number = torch.complex(variables[0].value, variables[1].value)
        return (number.conj() * (1 + 2j)).abs()  # of which only the sum of squares counts

    optimizer.minimize(loss, variables)
    for variable, want in zip(variables, (0.9, 1.9), strict=True):
        np.testing.assert_allclose(float(variable), want, **TOLERANCES["float32"])


MODES = {
    "inference": torch.inference_mode,
    "autocast_bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast_float16": lambda: torch.autocast("cpu", torch.float16),
}
MODE_OPTIONS = {
    "plain": {},
    "no_compensation": {"kahan_sum": False},
    "clipnorm": {"clipnorm": 0.5},
    "global_clipnorm_groups": {"global_clipnorm": 0.5, "param_groups": []},
    "amsgrad_corrected": {"amsgrad": "corrected"},
    "ema": {"use_ema": True, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 2},
    "skip_nonfinite": {"skip_nonfinite": True, "loss_scale_factor": 8.0},
    "state_of_bfloat16": {"state_dtype": "bfloat16"},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MODE_OPTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_all_within_a_mode(mode, name, dtype):
    """Variables, state and steps are the same as outside of the mode, to the bit."""
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(6, 7)).astype("float32")

    def train():
        variables = [
            keras.Variable([1.0, -2.0, 0.0], dtype=dtype),
            keras.Variable(np.ones((2, 2)), dtype=dtype),
        ]
        optimizer = keras_adam.Adam(0.01, **MODE_OPTIONS[name])
        for step, gradient in enumerate(gradients):
            if step == 3:
                optimizer.learning_rate = 0.02
            given = [
                keras.ops.convert_to_tensor(g, dtype)
                for g in (gradient[:3], gradient[3:].reshape(2, 2))
            ]
            optimizer.apply(given, variables)
        return [v.value.float().numpy(force=True) for v in (*variables, *optimizer.variables)]

    want = train()
    with MODES[mode]():
        got = train()
    for array, expected in zip(got, want, strict=True):
        np.testing.assert_array_equal(array, expected)


def test_steps_within_inference_mode_and_outside_of_it():
    variables, optimizer, oracle = make()
    for step in range(4):
        gradients = [np.full(x.shape, step - 1.5, "float32") for x in STARTS]
        oracle.step(gradients)
        with torch.inference_mode(step % 2 == 0):
            optimizer.apply([torch.tensor(g) for g in gradients], variables)
        check(variables, oracle)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    "options", [{}, {"use_ema": True, "param_groups": []}], ids=["plain", "ema"]
)
def test_the_compiler_does_not_warn(options):
    torch._dynamo.reset()
    variables = [keras.Variable(x) for x in STARTS]
    optimizer = keras_adam.Adam(0.1, **options)
    optimizer.build(variables)
    oracle = reference.Adam(STARTS, learning_rate=0.1, use_ema="use_ema" in options)
    step = torch.compile(lambda gradients: optimizer.apply(gradients, variables), backend="eager")
    for gradients in ([np.ones(x.shape, "float32") for x in STARTS] for _ in range(3)):
        oracle.step(gradients)
        step([torch.tensor(g) for g in gradients])
    check(variables, oracle)
