"""The engines, which do the work of a step: one for each backend, each based on the portable one."""

from typing import Any

import keras

from keras_adam.engines.base import Engine

__all__ = ["Engine", "engine_class", "optimizer_base"]


def engine_class() -> type[Engine]:
    """Return the engine of the active backend; the other engines are never imported."""
    backend = keras.backend.backend()
    if backend == "jax":
        from keras_adam.engines.jax import JaxEngine

        return JaxEngine
    if backend == "tensorflow":
        from keras_adam.engines.tensorflow import TensorFlowEngine

        return TensorFlowEngine
    if backend == "torch":
        from keras_adam.engines.torch import TorchEngine

        return TorchEngine
    raise ImportError(
        "keras_adam needs Keras's backend to be 'jax', 'tensorflow' or 'torch'. "
        f"Received: keras.backend.backend()={backend!r}"
    )


def optimizer_base() -> Any:
    """Return the optimizer's base class: Keras's, on TensorFlow extended by checkpoints of parameter groups."""
    if keras.backend.backend() == "tensorflow":
        from keras_adam.engines.tensorflow_checkpoint import CheckpointedOptimizer

        return CheckpointedOptimizer
    return keras.optimizers.Optimizer
