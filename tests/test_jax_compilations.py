"""How often an eager step on JAX is compiled, and that it does the same compiled or not."""

import keras
import numpy as np
import pytest

import keras_adam
from support import reference
from support.portable import OPTIONS, Portable, run
from support.tolerances import AGAINST_KERAS, TOLERANCES

if keras.backend.backend() != "jax":
    pytest.skip("only JAX compiles an eager step", allow_module_level=True)

import jax

from keras_adam.engines import jax as backend

SHAPES = [(3, 2), (4,), (2, 2)] * 4


class Compilations:
    """Counts what XLA compiles."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, duration, **details):
        self.count += event.endswith("backend_compile_duration")


COMPILATIONS = Compilations()  # a listener cannot be taken away again by a public name


def problem(rng, steps, shapes=SHAPES):
    starts = [rng.standard_normal(shape).astype("float32") for shape in shapes]
    grads = [[rng.standard_normal(s).astype("float32") for s in shapes] for _ in range(steps)]
    return starts, grads


def variables_of(starts):
    return [keras.Variable(start, name=f"v{i}") for i, start in enumerate(starts)]


def tensors(arrays):
    return [None if a is None else keras.ops.convert_to_tensor(a) for a in arrays]


def assert_close(variables, expected, tolerance):
    for variable, reference_value in zip(variables, expected, strict=True):
        np.testing.assert_allclose(variable.numpy(), reference_value, **tolerance)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_new_pattern_of_missing_gradients_compiles_nothing(rng):
    starts, grads = problem(rng, 14)
    for step in range(1, len(grads)):  # another pattern in each step
        for i in range(step % 5 + 1):
            grads[step][(step + 5 * i) % len(SHAPES)] = None
    variables, theirs = variables_of(starts), variables_of(starts)
    optimizer, adam = keras_adam.Adam(0.01), keras.optimizers.Adam(0.01)
    adam.build(theirs)
    compiled = []
    for arrays in grads:
        given, before = tensors(arrays), COMPILATIONS.count
        optimizer.apply(given, variables)
        compiled.append(COMPILATIONS.count - before)
        adam.apply(given, theirs)
    assert not any(compiled[2:]), compiled
    assert_close(variables, [v.numpy() for v in theirs], AGAINST_KERAS)


@pytest.mark.parametrize(
    ("name", "values", "more"),
    [
        ("clipnorm", [0.5, 0.3, 2.0, 0.1], {}),
        ("clipvalue", [0.5, 0.3, 2.0, 0.1], {}),
        ("global_clipnorm", [0.5, 0.3, 2.0, 0.1], {}),
        ("loss_scale_factor", [8.0, 3.0, 0.5, 1.0], {}),
        ("ema_momentum", [0.5, 0.3, 0.9, 1.0], {"use_ema": True}),
    ],
)
def test_a_new_number_compiles_nothing(name, values, more, rng):
    starts, grads = problem(rng, len(values))
    variables = variables_of(starts)
    options = {"learning_rate": 0.01, name: values[0], **more}
    optimizer = keras_adam.Adam(**options)
    expected = reference.Adam(starts, **options)
    compiled = []
    for value, arrays in zip(values, grads, strict=True):
        setattr(optimizer, name, value)
        setattr(expected, name, value)
        given, before = tensors(arrays), COMPILATIONS.count
        optimizer.apply(given, variables)
        compiled.append(COMPILATIONS.count - before)
        expected.step(arrays)
    assert compiled[1:] == [0, 0, 0]
    assert len(optimizer._engine.compiled) == 1
    assert_close(variables, expected.parameters, TOLERANCES["float32"])
    if more:
        averages = optimizer._model_variables_moving_average
        assert_close(averages, expected.average, TOLERANCES["float32"])


def test_a_limit_that_comes_or_goes_is_obeyed(rng):
    starts, grads = problem(rng, 4)
    variables = variables_of(starts)
    optimizer, expected = keras_adam.Adam(0.01), reference.Adam(starts, learning_rate=0.01)
    for limit, arrays in zip([None, 0.1, 0, 0.1], grads, strict=True):
        optimizer.clipnorm, expected.clipnorm = limit, limit or None
        optimizer.apply(tensors(arrays), variables)
        expected.step(arrays)
    assert_close(variables, expected.parameters, TOLERANCES["float32"])


def test_more_variables_of_the_same_shapes_compile_nothing(rng):
    found = []
    for count in (300, 396):
        shapes = [(3,), (2, 2), ()] * (count // 3)
        starts, grads = problem(rng, 3, shapes)
        variables = variables_of(starts)
        optimizer, expected = keras_adam.Adam(0.01), reference.Adam(starts, learning_rate=0.01)
        optimizer.build(variables)
        before = COMPILATIONS.count
        for arrays in grads:
            optimizer.apply(tensors(arrays), variables)
            expected.step(arrays)
        found.append(COMPILATIONS.count - before)
        assert_close(variables, expected.parameters, TOLERANCES["float32"])
    assert found[1] == 0


def test_what_comes_often_is_compiled(rng, monkeypatch):
    monkeypatch.setattr(backend, "_OFTEN", 2)
    monkeypatch.setattr(backend, "_MOST_COMPILED", 2)
    starts, grads = problem(rng, 15)
    variables, theirs = variables_of(starts), variables_of(starts)
    optimizer, adam = keras_adam.Adam(0.01), keras.optimizers.Adam(0.01)
    optimizer.build(variables)
    adam.build(theirs)
    compiled = []
    for step, arrays in enumerate(grads):
        chosen = slice(0, len(SHAPES) - step % 3)
        optimizer.apply(tensors(arrays[chosen]), variables[chosen])
        adam.apply(tensors(arrays[chosen]), theirs[chosen])
        compiled.append(len(optimizer._engine.compiled))
    # The first kind at once, the others when they come for the third time; then the oldest goes.
    assert compiled == [1] * 7 + [2] * 8
    assert_close(variables, [v.numpy() for v in theirs], AGAINST_KERAS)


@pytest.mark.short(
    "plain-float32", "l2-bfloat16", "accumulation_ema_clip-bfloat16", "groups-float32"
)
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["plain", "amsgrad_corrected", "l2", "clipnorm", "accumulation_ema_clip", "groups"]
)
def test_pieces_do_what_the_portable_path_does(name, dtype, monkeypatch):
    monkeypatch.setattr(backend, "_MOST_AT_ONCE", 0)
    monkeypatch.setattr(backend, "_PIECE", 2)
    variables, optimizer = run(keras_adam.Adam, OPTIONS[name], dtype)
    assert not optimizer._engine.compiled
    expected, portable = run(Portable, OPTIONS[name], dtype)
    pairs = zip([*variables, *optimizer.variables], [*expected, *portable.variables], strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        ours, theirs = (np.asarray(keras.ops.cast(v, "float32")) for v in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, **TOLERANCES[dtype])


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pieces_give_the_bits_of_the_compiled_call(options, dtype, monkeypatch):
    """A run that is resumed compiles at another step, and must still be the same run."""
    found = []
    for at_once in (256, 0):
        monkeypatch.setattr(backend, "_MOST_AT_ONCE", at_once)
        starts, grads = problem(np.random.default_rng(3), 10)
        variables = [keras.Variable(start, dtype=dtype) for start in starts]
        optimizer = keras_adam.Adam(0.01, **options)
        for arrays in grads:
            optimizer.apply([keras.ops.convert_to_tensor(a, dtype) for a in arrays], variables)
        assert len(optimizer._engine.compiled) == bool(at_once)
        found.append([np.asarray(v.value) for v in (*variables, *optimizer.variables)])
    for compiled, in_pieces in zip(*found, strict=True):
        np.testing.assert_array_equal(compiled, in_pieces)


@pytest.mark.parametrize("held", ["nothing", "array", "view of NumPy", "variable of a copy"])
def test_state_that_somebody_holds_stays_as_it_was(held, rng):
    starts, grads = problem(rng, 4)
    variables, others = variables_of(starts), variables_of(starts)
    optimizer = keras_adam.Adam(0.1)
    without = Portable(0.1)
    for gradients in grads[:2]:
        optimizer.apply(tensors(gradients), variables)
        without.apply(tensors(gradients), others)
    momentum = optimizer._momentums[0]
    value = momentum.numpy().copy()
    holders = {
        "nothing": lambda: value,
        "array": lambda: momentum.value,
        "view of NumPy": lambda: np.asarray(momentum.value),
        "variable of a copy": lambda: keras.Variable(momentum.value),
    }
    holder = holders[held]()
    for gradients in grads[2:]:
        optimizer.apply(tensors(gradients), variables)
        without.apply(tensors(gradients), others)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(holder), value)
    assert_close(variables, [v.numpy() for v in others], TOLERANCES["float32"])


def test_state_that_nobody_holds_is_updated_in_its_own_memory(rng):
    starts, grads = problem(rng, 2)
    variables, optimizer = variables_of(starts), keras_adam.Adam(0.1)
    optimizer.apply(tensors(grads[0]), variables)
    before = [v.value.unsafe_buffer_pointer() for v in optimizer.variables if v.shape]
    optimizer.apply(tensors(grads[1]), variables)
    after = [v.value.unsafe_buffer_pointer() for v in optimizer.variables if v.shape]
    assert sorted(before) == sorted(after)
