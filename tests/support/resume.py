"""Load what another backend saved, check the state, and go on training: `python -m support.resume FOLDER`."""

import pathlib
import sys

import keras
import numpy as np
from keras.src.saving.saving_lib import H5IOStore

import keras_adam
from support.models import EVERYTHING, Expected, assert_close, fit, make_model, weights

SCHEDULE = {"initial_learning_rate": 0.02, "decay_steps": 4, "decay_rate": 0.5}

# How to make the optimizer, and the reference's options for the same.
OPTIMIZERS = {
    "default": (keras_adam.Adam, {}),
    "everything": (lambda: keras_adam.Adam(**EVERYTHING), EVERYTHING),
    "own_options": (
        lambda: keras_adam.AdamW(
            keras.optimizers.schedules.ExponentialDecay(**SCHEDULE),
            amsgrad="corrected",
            decoupled_weight_decay=False,
            epsilon_hat=False,
            maximize=True,
        ),
        {
            "learning_rate": lambda step: 0.02 * 0.5 ** (step / 4),
            "weight_decay": 0.004,
            "amsgrad": "corrected",
            "decoupled_weight_decay": False,
            "epsilon_hat": False,
            "maximize": True,
        },
    ),
}
# What Keras's own Adam saved goes on in ours.
FROM_KERAS = {"keras": (lambda: keras.optimizers.Adam(0.02), {"learning_rate": 0.02})}


def state_of(optimizer):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in optimizer.variables]


def save_state(file, optimizer):
    store = H5IOStore(file, mode="w")
    optimizer.save_own_variables(store.make("optimizer"))
    store.close()
    return file


def load_state(file, optimizer):
    store = H5IOStore(file, mode="r")
    try:
        optimizer.load_own_variables(store.get("optimizer"))
    finally:
        store.close()


def replace(arrays, key, value, **attributes):
    """Replace an array of an HDF5 file on purpose, that is without its checksum."""
    told = dict(arrays[key].attrs) | attributes
    del arrays[key], told["crc32"]
    arrays[key] = value
    arrays[key].attrs.update(told)


def load(path):
    if path.stem not in FROM_KERAS:
        model = keras.saving.load_model(path)
        # A file holds what "auto" came to under the backend that wrote it. PyTorch would take a
        # C++ compiler and minutes for JAX's True, and JAX would run op by op for PyTorch's False.
        model.jit_compile = keras.backend.backend() == "jax"
        return model
    model = make_model(keras_adam.Adam(0.02))
    model.load_weights(path)
    model.optimizer.build(model.trainable_variables)
    return model


def resume(path):
    """Check that training goes on as if it had not been interrupted after its first epoch."""
    options = (OPTIMIZERS | FROM_KERAS)[path.stem][1]
    model = load(path)
    assert type(model.optimizer).__module__.startswith("keras_adam")
    with np.load(path.with_suffix(".npz")) as saved:
        for got, name in zip(state_of(model.optimizer), saved, strict=True):
            np.testing.assert_array_equal(got, saved[name])
    fit(model)
    assert_close(weights(model), Expected(options).fit().fit().weights)


if __name__ == "__main__":
    for path in sorted(pathlib.Path(sys.argv[1]).glob("*.keras")):
        resume(path)
        print("resumed", path.stem)
