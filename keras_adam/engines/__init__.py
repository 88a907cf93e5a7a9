"""Who does the work of a step: one engine for each backend, and the portable one that they all are."""

from typing import Any

import keras

from keras_adam.engines.base import Engine

__all__ = ["Engine", "engine_class", "optimizer_base"]


def engine_class() -> type[Engine]:
    """Return the engine of the active backend; those of the others are never imported."""
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
    """Return the class that the optimizer derives from: Keras's, on TensorFlow with checkpoints of late groups."""
    if keras.backend.backend() == "tensorflow":
        from keras_adam.engines.tensorflow_checkpoint import CheckpointedOptimizer

        return CheckpointedOptimizer
    return keras.optimizers.Optimizer
