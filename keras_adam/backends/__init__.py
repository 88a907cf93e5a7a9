"""What differs between the backends, and nothing else.

One module per backend, chosen once, when the package is imported; the others are never imported. Each holds a class
`Backend`, a mixin in front of the portable optimizer, whose methods either bear the name of the Keras hook that they
replace or are declared in `keras_adam.step.PortableAdam`. No equation stands here: those are in `keras_adam.rule`.
"""

import keras

if keras.backend.backend() == "jax":
    from keras_adam.backends.jax import Backend
elif keras.backend.backend() == "tensorflow":
    from keras_adam.backends.tensorflow import Backend
elif keras.backend.backend() == "torch":
    from keras_adam.backends.torch import Backend
else:
    raise ImportError(
        "keras_adam needs Keras's backend to be 'jax', 'tensorflow' or 'torch'. "
        f"Received: keras.backend.backend()={keras.backend.backend()!r}"
    )

__all__ = ["Backend"]
