"""One file of a model that several processes train."""

import os
import tempfile
from pathlib import Path
from typing import Any

import keras

from keras_adam import keras_private
from keras_adam.state import State


class _Nowhere:
    """A store of `keras.saving` that keeps nothing."""

    def __setitem__(self, key: str, value: Any) -> None:
        pass


def save_model(model: keras.Model, filepath: str | os.PathLike) -> None:
    """Save a model that several processes train into one file: the first process writes, the others take part.

    All processes must call this together. With `shard_state=True` each holds a part of the optimizer's state; the file
    holds all of it, and loads into any number of processes, on any backend. It is written under the name
    `unfinished-...` and moved into place when it is whole, so that a process that is killed leaves no half of it. On
    return it is there, for all processes. Where there is one process, it saves the model.

    On TensorFlow save in each process, to a file of its own: its strategies want that, and the state is whole.

    Args:
        model: The model, compiled with an optimizer of keras_adam, which may be inside a `LossScaleOptimizer`.
        filepath: Path of the file, in a folder that is there. A name that ends in `.weights.h5` is written by
            `model.save_weights`, any other by `model.save`.

    Raises:
        TypeError: If the model's optimizer is not of keras_adam.

    Examples:
        >>> import keras, keras_adam, tempfile
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> model.compile(keras_adam.Adam(shard_state=True), loss="mse")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     keras_adam.save_model(model, f"{folder}/model.keras")
        ...     loaded = keras.saving.load_model(f"{folder}/model.keras")
    """
    optimizer = keras_private.unwrapped(getattr(model, "optimizer", None))
    if not isinstance(optimizer, State):
        raise TypeError(
            "`model` must be compiled with an optimizer of keras_adam. "
            f"Received: an optimizer of type {type(optimizer).__name__}"
        )
    filepath, engine = Path(filepath), optimizer._engine
    save = model.save_weights if filepath.name.endswith(".weights.h5") else model.save
    if engine.process() == 0:
        scratch = filepath.with_name(f"unfinished-{filepath.name}")
        save(scratch)
        os.replace(scratch, filepath)
    elif keras.backend.backend() == "jax":  # where Keras makes variables meanwhile, as all must
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder) / filepath.name)
    else:
        optimizer.save_own_variables(_Nowhere())
    engine.wait_for_all()
