"""`OptimizerMonitor`: what the optimizer measured, where Keras shows things."""

from typing import Any

import keras

from keras_adam import hyperparameters, keras_private
from keras_adam.monitor import Reading
from keras_adam.optimizer import Adam


class OptimizerMonitor(keras.callbacks.Callback):
    """Puts what `Adam(monitor=True)` measures into the logs of each epoch.

    `History`, `CSVLogger`, `TensorBoard` and the progress bar's last line show it from there: `grad_norm` and
    `grad_norm_max`, `clipped` and `skipped`, and `update_ratio`, with groups `update_ratio/0` and so on, as
    `optimizer.monitored()` tells them. It stands first in the list of callbacks, as each sees the logs that those
    before it left.

    Args:
        frequency: Number of batches after which the logs of a batch get what was measured since, so that
            `TensorBoard(update_freq=frequency)` writes it; with `steps_per_execution`, so many executions. Each time
            this waits for the device. Defaults to `None`: only the logs of epochs, and no batch waits.

    Raises:
        ValueError: When training begins, if the optimizer does not measure.

    Examples:
        >>> import keras, keras_adam
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
        >>> model.compile(keras_adam.Adam(1e-3, monitor=True), loss="mse")
        >>> x, y = keras.random.normal((64, 8)), keras.random.normal((64, 1))
        >>> history = model.fit(x, y, callbacks=[keras_adam.OptimizerMonitor()], verbose=0)
        >>> sorted(history.history)
        ['clipped', 'grad_norm', 'grad_norm_max', 'loss', 'skipped', 'update_ratio']
    """

    def __init__(self, frequency: int | None = None):
        super().__init__()
        self.frequency = hyperparameters.check_count("frequency", frequency, 1)
        # Without it nothing is done in a batch, so that Keras need not wait for one before it begins the next.
        self.async_safe = frequency is None
        self.history: dict[str, list[float]] = {}
        self._at: list[int] = []  # after how many epochs, or batches
        self._batches = 0
        self._of_epoch = Reading()

    def on_train_begin(self, logs: Any = None) -> None:
        self.history, self._at, self._batches = {}, [], 0
        self._read()  # what was measured before is none of this training's

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.frequency is None:
            return
        self._batches += 1
        if self._batches % self.frequency == 0:
            reading = self._read()
            self._of_epoch += reading
            self._show(reading, logs)
            self._keep(reading, self._batches)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        reading = self._of_epoch + self._read()
        self._of_epoch = Reading()
        self._show(reading, logs)
        if self.frequency is None:
            self._keep(reading, epoch + 1)

    def plot(self) -> Any:
        """Draw what was measured, and return matplotlib's figure.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If nothing was measured yet.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError(
                f"`plot()` needs matplotlib: `pip install matplotlib`. Received: {error}"
            ) from None
        if not self._at:
            raise ValueError(
                "`plot()` needs what a training measured; call `fit` with this callback first."
            )
        panels = {
            "gradient norm": ("grad_norm", "grad_norm_max"),
            "share of steps": ("clipped", "skipped"),
            "update / weight": [x for x in self.history if x.startswith("update_ratio")],
        }
        figure, axes = plt.subplots(3, 1, sharex=True, figsize=(7, 5.5), layout="constrained")
        for ax, (title, names) in zip(axes, panels.items(), strict=True):
            for name in names:
                ax.plot(self._at, self.history[name], label=name, marker=".")
            is_share = title == "share of steps"
            ax.set_ylim(-0.05, 1.05) if is_share else ax.set_yscale("log")
            ax.set_ylabel(title)
            ax.legend(loc="best", frameon=False)
        axes[-1].set_xlabel("epoch" if self.frequency is None else "batch")
        return figure

    def _read(self) -> Reading:
        optimizer = keras_private.unwrapped(self.model.optimizer)
        if not (isinstance(optimizer, Adam) and optimizer.monitor):
            raise ValueError(
                "`OptimizerMonitor` needs a model compiled with `keras_adam.Adam(monitor=True)`. "
                f"Received: optimizer={optimizer!r}"
            )
        # It is built with the first step at the latest.
        return optimizer._read_monitor() if optimizer.built else Reading()

    def _show(self, reading: Reading, logs: dict[str, float] | None) -> None:
        if logs is not None:
            logs.update(reading.shown())

    def _keep(self, reading: Reading, at: int) -> None:
        self._at.append(at)
        for name, value in reading.shown().items():
            self.history.setdefault(name, []).append(value)
