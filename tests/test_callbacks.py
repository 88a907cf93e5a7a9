"""Keras's callbacks that reach into the optimizer, against the NumPy reference."""

import sys
import types

import keras
import numpy as np
import pytest

import keras_adam
from support.models import (
    BATCHES,
    EVERYTHING,
    TOLERANCE,
    Expected,
    X,
    Y,
    assert_close,
    fit,
    make_model,
    mean_squared_error,
    weights,
)


def by_epoch(rates):
    """A learning rate for the reference, which knows only the count of steps."""
    return lambda steps: rates[steps // len(BATCHES)]


def test_learning_rate_scheduler():
    rates = [0.02, 0.01, 0.04]
    model = make_model(keras_adam.Adam())
    callback = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rates[epoch])
    history = fit(model, epochs=3, callbacks=[callback]).history
    assert_close(weights(model), Expected({"learning_rate": by_epoch(rates)}).fit(3).weights)
    np.testing.assert_allclose(history["learning_rate"], rates, rtol=1e-6)


def test_reduce_lr_on_plateau():
    model = make_model(keras_adam.Adam(0.02))
    # No loss falls by 100, so that each epoch after the first counts as a plateau.
    callback = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=100)
    fit(model, epochs=4, callbacks=[callback])
    rates = [0.02, 0.02, 0.01, 0.005]
    assert_close(weights(model), Expected({"learning_rate": by_epoch(rates)}).fit(4).weights)
    np.testing.assert_allclose(float(model.optimizer.learning_rate), 0.0025, rtol=1e-6)


class Interruption(keras.callbacks.Callback):
    """Stops training as a power cut does, in the middle of an epoch."""

    def on_train_batch_begin(self, batch, logs=None):
        if self.model.optimizer.iterations == 3 and batch == 2:
            raise KeyboardInterrupt


def test_backup_and_restore(tmp_path):
    def callback():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    interrupted = make_model(keras_adam.Adam(**EVERYTHING))
    with pytest.raises(KeyboardInterrupt):
        fit(interrupted, epochs=3, callbacks=[callback(), Interruption()])
    model = make_model(keras_adam.Adam(**EVERYTHING))
    history = fit(model, epochs=3, callbacks=[callback()])
    assert history.epoch == [1, 2]
    assert_close(weights(model), Expected(EVERYTHING).fit(3).weights)
    assert int(model.optimizer.iterations) == 6


@pytest.mark.parametrize("swap_on_epoch", [False, True], ids=["validation", "epoch"])
def test_swap_ema_weights(swap_on_epoch):
    options = {**EVERYTHING, "ema_overwrite_frequency": None}
    callback = keras.callbacks.SwapEMAWeights(swap_on_epoch)
    at_epoch_end = []
    record = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: at_epoch_end.append(weights(model))
    )
    model = make_model(keras_adam.Adam(**options))
    history = fit(model, epochs=2, validation_data=(X, Y), callbacks=[callback, record]).history

    expected = Expected(options)
    for epoch in range(2):
        for x, y in BATCHES:
            expected.step(x, y)
        error = mean_squared_error(expected.averages, X, Y)
        np.testing.assert_allclose(history["val_loss"][epoch], error, **TOLERANCE)
        assert_close(at_epoch_end[epoch], expected.averages if swap_on_epoch else expected.weights)
    assert_close(weights(model), expected.averages)


def test_tensorboard(tmp_path, monkeypatch):
    rates = []

    def scalar(name, data, step, description):
        if name == "epoch_learning_rate":
            rates.append((step, float(data)))

    # Keras writes through TensorFlow under each backend, and TensorFlow through the `tensorboard` package. A stand-in
    # for that package records what is written.
    for name in ("tensorboard", "tensorboard.summary", "tensorboard.summary.v2"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["tensorboard.summary.v2"].scalar = scalar
    schedule = keras.optimizers.schedules.ExponentialDecay(0.02, len(BATCHES), 0.5)
    model = make_model(keras_adam.Adam(schedule))
    fit(model, epochs=2, callbacks=[keras.callbacks.TensorBoard(tmp_path, write_graph=False)])
    np.testing.assert_allclose(rates, [(0, 0.01), (1, 0.005)], rtol=1e-6)
