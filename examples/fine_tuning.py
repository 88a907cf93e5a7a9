"""Fine-tune with two rates, no decay on biases and norms, and a layer unfrozen half-way.

A network learns the digits 0 to 4; its new head then learns 5 to 9. The backend is Keras's own choice:
`KERAS_BACKEND=tensorflow python examples/fine_tuning.py`.
"""

import sys

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_adam

digits = load_digits()
images = digits.images[..., None].astype("float32") / 16


def split(classes):
    """Return training images, test images, and their labels, counted from 0."""
    rows = np.isin(digits.target, classes)
    labels = digits.target[rows] - min(classes)
    return train_test_split(images[rows], labels, stratify=labels, random_state=0)


def fit(epochs):
    """Compile the model, train it, and return its test accuracy."""
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(x_train, y_train, batch_size=64, epochs=epochs, verbose=0)
    accuracy = model.evaluate(x_test, y_test, verbose=0)[1]
    print(f"test accuracy after {epochs} epochs: {accuracy:.1%}")
    return accuracy


keras.utils.set_random_seed(0)
early = layers.Conv2D(32, 3, padding="same", activation="relu", name="early")
late = layers.Conv2D(32, 3, padding="same", activation="relu", name="late")
body = [early, layers.BatchNormalization(), layers.MaxPooling2D(), late, layers.Flatten()]

print("digits 0 to 4:")
x_train, x_test, y_train, y_test = split(range(5))
model = keras.Sequential([keras.Input((8, 8, 1)), *body, layers.Dense(5)])
optimizer = keras_adam.AdamW(3e-3)
fit(epochs=8)

print("digits 5 to 9, a new head on the layers that are there, the first of them frozen:")
x_train, x_test, y_train, y_test = split(range(5, 10))
early.trainable = False
model = keras.Sequential([keras.Input((8, 8, 1)), *body, layers.Dense(5, name="head")])
optimizer = keras_adam.AdamW(
    learning_rate=3e-3,
    weight_decay=0.05,
    param_groups=[
        # A variable belongs to the first group that selects it. A path may begin with the model's name, hence the ".*".
        {"params": [".*bias", ".*gamma", ".*beta"], "weight_decay": 0},
        {"params": ".*late/kernel", "learning_rate_multiplier": 0.3},
    ],
)
fit(epochs=4)

print("the first layer unfrozen:")
early.trainable = True
state = {v.path: v.numpy().copy() for v in optimizer.variables}
optimizer.add_param_group({"params": early, "learning_rate_multiplier": 0.1, "weight_decay": 0})
optimizer.build(model.trainable_variables)  # as the next `fit` would, to look at the state first
for variable in optimizer.variables:
    if variable.path in state:
        np.testing.assert_array_equal(variable.numpy(), state[variable.path])
print(
    f"{len(state)} state variables kept as they were, {len(optimizer.variables) - len(state)} new"
)
after = fit(epochs=8)

print("\nrate      decay  variables")
for group in optimizer.param_groups:
    names = ", ".join("/".join(v.path.split("/")[-2:]) for v in group["params"])
    print(f"{group['learning_rate']:<8.2g}  {group['weight_decay']:<5}  {names}")

if after < 0.95:
    sys.exit(f"test accuracy must be at least 95 %. Received: {after:.1%}")
