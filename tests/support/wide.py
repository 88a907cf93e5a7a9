"""A model with layers large enough for state in 8 bits, and its training."""

import pathlib
import sys

import keras
import numpy as np

import keras_adam
from support.models import TOGETHER
from support.resume import state_of

_rng = np.random.default_rng(88)
X = _rng.standard_normal((32, 64)).astype("float32")
Y = np.tanh(X @ _rng.standard_normal((64, 2)) / 8).astype("float32")
STARTS = [_rng.standard_normal(shape) / 8 for shape in [(64, 80), (80,), (80, 2), (2,)]]
BATCH = 8
EIGHT_BITS = {"learning_rate": 0.01, "state_dtype": "8bit"}
# The second layer keeps 32 bits.
EVERYTHING = {
    **EIGHT_BITS,
    **TOGETHER,
    "param_groups": [{"params": ".*second.*", "state_dtype": "float32", "beta_1": 0.5}],
}


def make_model(optimizer=None, **compile_options):
    layers = [
        keras.Input((64,)),
        keras.layers.Dense(80, activation="tanh", name="first"),
        keras.layers.Dense(2, name="second"),
    ]
    model = keras.Sequential(layers, name="model")
    model.set_weights(STARTS)
    if optimizer is not None:
        model.compile(optimizer, loss="mse", **compile_options)
    return model


def fit(model, epochs=1):
    model.fit(X, Y, batch_size=BATCH, shuffle=False, verbose=0, epochs=epochs)
    return model


def trained(epochs=1, **options):
    return fit(make_model(keras_adam.Adam(**EIGHT_BITS | options)), epochs)


def all_of(model):
    return [np.array(w) for w in model.get_weights()] + state_of(model.optimizer)


def assert_same_bits(actual, desired):
    for got, want in zip(actual, desired, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def distance(actual, desired, starts):
    """How far weights are from those desired, relative to how far these moved."""
    away = sum(np.sum((a - b) ** 2) for a, b in zip(actual, desired, strict=True))
    moved = sum(np.sum((b - s) ** 2) for b, s in zip(desired, starts, strict=True))
    return np.sqrt(away / moved)


def save(folder, name, model):
    """Write the model, its state and its weights, and what another epoch makes of these."""
    model.save(folder / f"{name}.keras")
    before = all_of(model)
    np.savez(folder / f"{name}.npz", *before)
    np.savez(folder / f"{name}-later.npz", *fit(model).get_weights())


def check_resumed(folder, name):
    """Load what any backend wrote: the same bits, and another epoch that ends where it ended there."""
    model = keras.saving.load_model(folder / f"{name}.keras")
    model.jit_compile = keras.backend.backend() == "jax"  # a file holds what "auto" came to
    with np.load(folder / f"{name}.npz") as saved:
        arrays = [saved[key] for key in saved.files]
    found = all_of(model)
    # One backend counts in int64, another in int32.
    assert_same_bits(
        [x for x in found if x.dtype.kind != "i"], [x for x in arrays if x.dtype.kind != "i"]
    )
    assert [int(x) for x in found if x.dtype.kind == "i"] == [
        int(x) for x in arrays if x.dtype.kind == "i"
    ]
    before = model.get_weights()
    with np.load(folder / f"{name}-later.npz") as saved:
        later = [saved[key] for key in saved.files]
    assert distance(fit(model).get_weights(), later, before) < 0.03


if __name__ == "__main__":  # `python -m support.wide FOLDER`
    for path in sorted(pathlib.Path(sys.argv[1]).glob("*.keras")):
        check_resumed(path.parent, path.stem)
        print("resumed", path.stem)
