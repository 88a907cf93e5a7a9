"""Adam for Keras 3: one optimizer, with the same numbers on JAX, TensorFlow and PyTorch."""

from keras_adam import keras_private

keras_private.check()  # before what relies on them is imported

from keras_adam.callbacks import OptimizerMonitor  # noqa: E402
from keras_adam.optimizer import Adam, AdamW  # noqa: E402
from keras_adam.saving import save_model  # noqa: E402
from keras_adam.state_tree import check_state_tree  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "Adam",
    "AdamW",
    "OptimizerMonitor",
    "__version__",
    "check_state_tree",
    "save_model",
]
