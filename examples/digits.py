"""Train a small convolutional network on 1,797 handwritten digits, save it, load it, go on.

The backend is Keras's own choice: `KERAS_BACKEND=torch python examples/digits.py`.
Writes `digits.keras` and `digits.png` to the current directory.
"""

import sys

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_adam

EPOCHS = 12

# Images of 8 x 8 pixels in 0..16, scaled to 0..1; a quarter is kept for the test.
digits = load_digits()
x_train, x_test, y_train, y_test = train_test_split(
    digits.images[..., None].astype("float32") / 16,
    digits.target,
    test_size=0.25,
    stratify=digits.target,
    random_state=0,
)

keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        layers.Conv2D(32, 3, padding="same", activation="relu"),
        layers.Conv2D(64, 3, padding="same", activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dropout(0.3),
        layers.Dense(10),
    ]
)
model.compile(
    optimizer=keras_adam.Adam(learning_rate=2e-3),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
history = model.fit(x_train, y_train, epochs=EPOCHS, validation_data=(x_test, y_test)).history

# A loaded model predicts the same and holds the same optimizer state, so training goes on.
model.save("digits.keras")
loaded = keras.saving.load_model("digits.keras")
np.testing.assert_allclose(
    loaded.predict(x_test, verbose=0), model.predict(x_test, verbose=0), rtol=1e-5, atol=1e-5
)
for ours, theirs in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
    np.testing.assert_array_equal(ours.numpy(), theirs.numpy(), err_msg=theirs.path)
print(f"digits.keras: predictions and {len(model.optimizer.variables)} optimizer variables agree")
more = loaded.fit(x_train, y_train, epochs=1, validation_data=(x_test, y_test)).history

predicted = loaded.predict(x_test, verbose=0).argmax(axis=-1)
wrong = predicted != y_test
accuracy = 1 - wrong.mean()
print(f"test accuracy with {keras.backend.backend()}: {accuracy:.1%}")

# The curves on the left, test digits on the right.
figure = plt.figure(figsize=(11, 5.2), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=[1, 1.2], wspace=0.04)
for axes, name in zip(left.subplots(2, 1, sharex=True), ["loss", "accuracy"], strict=True):
    for key, label in [(name, "training"), (f"val_{name}", "test")]:
        axes.plot(range(1, EPOCHS + 2), history[key] + more[key], marker=".", label=label)
    axes.axvline(EPOCHS + 0.5, color="gray", linestyle=":", label="saved and loaded")
    axes.set(ylabel=name, yscale="log" if name == "loss" else "linear")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
axes.set(xlabel="epoch", xticks=range(1, EPOCHS + 2))
axes.legend(loc="lower center", frameon=False)
left.suptitle(f"keras_adam.Adam on {keras.backend.backend()}")
right.suptitle(f"{wrong.sum()} of {len(y_test)} test digits read wrong (shown first, in red)")
for axes, i in zip(right.subplots(5, 8).flat, np.argsort(~wrong, kind="stable"), strict=False):
    axes.imshow(x_test[i, ..., 0], cmap="gray_r")
    axes.set_axis_off()
    title = f"{predicted[i]}, not {y_test[i]}" if wrong[i] else str(predicted[i])
    axes.set_title(title, color="crimson" if wrong[i] else "black", fontsize=10)
figure.savefig("digits.png", dpi=150)

if accuracy < 0.97:
    sys.exit(f"test accuracy must be at least 97 %. Received: {accuracy:.1%}")
