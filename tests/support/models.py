"""A linear model and its data: small enough for NumPy to say what training must give."""

import keras
import numpy as np

import keras_adam
from support import reference

if keras.backend.backend() == "torch":
    import torch

    torch.set_num_threads(1)  # For tensors this small a second thread only costs.

_rng = np.random.default_rng(1412)
X = _rng.standard_normal((16, 4)).astype("float32")
Y = _rng.standard_normal((16, 2)).astype("float32")
START = [_rng.standard_normal((4, 2)).astype("float32"), np.array([1, -1], "float32")]
BATCH = 4
BATCHES = [(X[i : i + BATCH], Y[i : i + BATCH]) for i in range(0, len(X), BATCH)]

# Two dozen steps in float32 against float64; an error in the rule shows up at 1e-3.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}

# As many options as go together.
TOGETHER = {
    "amsgrad": True,
    "weight_decay": 0.1,
    "global_clipnorm": 0.5,
    "use_ema": True,
    "ema_momentum": 0.75,
    "ema_overwrite_frequency": 3,
    "gradient_accumulation_steps": 2,
}
EVERYTHING = {"learning_rate": 0.02, **TOGETHER, "loss_scale_factor": 64.0}


def make_model(optimizer=None, name="model", **compile_options):
    layers = [keras.Input((4,)), keras.layers.Dense(2, name="dense")]
    model = keras.Sequential(layers, name=name)
    model.set_weights(START)
    if optimizer is not None:
        model.compile(optimizer, loss="mse", **compile_options)
    return model


def fit(model, epochs=1, **options):
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0} | options
    return model.fit(X, Y, epochs=epochs, **options)


def weights(model):
    return [np.array(w, dtype="float64") for w in model.get_weights()]


def assert_close(actual, desired, **tolerance):
    for got, want in zip(actual, desired, strict=True):
        np.testing.assert_allclose(got, want, **(tolerance or TOLERANCE))


def gradients(model, x, y):
    """Return the gradients that a custom loop of each backend computes."""
    return _GRADIENTS[keras.backend.backend()](model, x, y)


def loss(prediction, y):
    return keras.ops.mean(keras.ops.square(prediction - y))


def _jax_gradients(model, x, y):
    import jax

    def compute(values):
        return loss(model.stateless_call(values, [], x)[0], y)

    return jax.grad(compute)([v.value for v in model.trainable_variables])


def _tensorflow_gradients(model, x, y):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        value = loss(model(x), y)
    return tape.gradient(value, [v.value for v in model.trainable_variables])


def _torch_gradients(model, x, y):
    model.zero_grad()
    loss(model(x), keras.ops.convert_to_tensor(y)).backward()
    return [v.value.grad for v in model.trainable_variables]


_GRADIENTS = {
    "jax": _jax_gradients,
    "tensorflow": _tensorflow_gradients,
    "torch": _torch_gradients,
}


class Expected:
    """Training in NumPy, with one or more reference optimizers that share the variables.

    `optimizers` are the options of each variable's own optimizer, or of one for both.
    """

    def __init__(self, *optimizers):
        self.optimizers = []
        starts = [START] if len(optimizers) == 1 else [[w] for w in START]
        for options, variables in zip(optimizers, starts, strict=True):
            self.optimizers.append(reference.Adam(variables, **options))
        self.scales = [options.get("loss_scale_factor") or 1 for options in optimizers]

    @property
    def weights(self):
        return [p for optimizer in self.optimizers for p in optimizer.parameters]

    @property
    def averages(self):
        return [a for optimizer in self.optimizers for a in optimizer.average]

    def step(self, x, y):
        remaining = gradients_of(self.weights, x, y)
        for optimizer, scale in zip(self.optimizers, self.scales, strict=True):
            count = len(optimizer.parameters)
            optimizer.step([scale * g for g in remaining[:count]])
            del remaining[:count]

    def fit(self, epochs=1):
        """As `fit` above, which ends by replacing the weights with their average if there is one."""
        for _ in range(epochs):
            for x, y in BATCHES:
                self.step(x, y)
        for optimizer in self.optimizers:
            if optimizer.use_ema:
                optimizer.parameters = list(optimizer.average)
        return self


def gradients_of(weights, x, y):
    kernel, bias = weights
    residual = x @ kernel + bias - y
    slope = 2 * residual / residual.size
    return [x.T @ slope, slope.sum(axis=0)]


def mean_squared_error(weights, x, y):
    kernel, bias = weights
    return np.mean((x @ kernel + bias - y) ** 2)


# One optimizer in two models

OWN_OPTIMIZER = (
    "If this is another model, give it an optimizer of its own: "
    r"`Adam\.from_config\(optimizer\.get_config\(\)\)`"
)


def trained_optimizer(**options):
    model = make_model(keras_adam.Adam(**{"learning_rate": 0.02} | options))
    fit(model)
    return model.optimizer


def other_model(optimizer, units=(2,), name="other"):
    layers = [keras.layers.Dense(n, name=f"dense_{i}") for i, n in enumerate(units)]
    model = keras.Sequential([keras.Input((4,)), *layers], name=name)
    model.compile(optimizer, loss="mse")
    return model


def fit_other(model):
    y = np.zeros((len(X), *model.output_shape[1:]), "float32")
    model.fit(X, y, batch_size=BATCH, shuffle=False, verbose=0)
