"""Training on devices of JAX with `keras.callbacks.OrbaxCheckpoint`: `python -m support.orbax_run FOLDER TASK`."""

import pathlib
import sys

import keras
import numpy as np

import keras_adam

OPTIONS = {
    "amsgrad": True,
    "use_ema": True,
    "gradient_accumulation_steps": 4,  # of 6 batches an epoch: saved in the middle of an accumulation
    "global_clipnorm": 0.5,
    "param_groups": [{"params": ".*bias", "learning_rate_multiplier": 0.5}],
}


def make_model(name="adam", **options):
    keras.utils.set_random_seed(0)
    layers = [keras.Input((8,)), keras.layers.Dense(16, name="dense")]
    model = keras.Sequential(layers, name="model")
    options = OPTIONS | options
    model.compile(keras_adam.Adam(0.01, name=name, shard_state=True, **options), loss="mse")
    model.optimizer.build(model.trainable_variables)
    return model


def fit(model, **options):
    rng = np.random.default_rng(3)
    x, y = (rng.normal(size=(48, n)).astype("float32") for n in (8, 16))
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, **options)


def arrays(model):
    return [v.numpy() for v in [*model.variables, *model.optimizer.variables]]


def spread(model):
    """Into how many parts the kernel's momentum is cut."""
    momentum = next(v for v in model.optimizer.variables if v.path.endswith("kernel_momentum"))
    return 8 // momentum.value.addressable_shards[0].data.shape[0]


def save(folder):
    model = make_model()
    callback = keras.callbacks.OrbaxCheckpoint(folder / "orbax", save_on_background=False)
    fit(model, callbacks=[callback])
    assert int(model.optimizer._iterations.value) % 4 == 2
    np.savez(folder / "saved.npz", *arrays(model))
    fit(model)
    np.savez(folder / "end.npz", *arrays(model))


def restore(folder):
    import pytest
    from orbax.checkpoint import v1 as ocp

    model = make_model()
    tree = ocp.metadata(folder / "orbax" / "0", "pytree").metadata
    keras_adam.check_state_tree(model, tree)
    for other in (make_model(name="other"), make_model(amsgrad=False)):
        with pytest.raises(ValueError, match=r"`state_tree` must hold .* Received: a tree with"):
            keras_adam.check_state_tree(other, tree)
    model.load_weights(folder / "orbax")
    devices = len(keras.distribution.list_devices())
    assert spread(model) == devices
    for state, tolerance in (("saved", 0), ("end", 0 if devices == 8 else 1e-7)):
        with np.load(folder / f"{state}.npz") as wanted:
            for got, name in zip(arrays(model), wanted.files, strict=True):
                np.testing.assert_allclose(got, wanted[name], rtol=0, atol=tolerance)
        if state == "saved":
            fit(model)
            assert spread(model) == devices


def silent(folder):
    """What Keras itself does with a checkpoint of another optimizer: nothing, and says nothing."""
    model = make_model(name="other")
    model.load_weights(folder / "orbax")
    assert int(model.optimizer._iterations.value) == 0


def main(folder, task):
    # A distribution for one device too, without which Keras asks for the devices that saved.
    devices = keras.distribution.list_devices()
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    globals()[task](pathlib.Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
