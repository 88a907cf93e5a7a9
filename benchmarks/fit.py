"""Whole training steps: `model.fit` of small models, and the same model in plain PyTorch."""

import functools

import cases
import keras
import measure
import numpy as np
import optimizers
from keras import layers

WIDTH, DEPTH = 1024, 8
CLASSES, TOKENS, LENGTH = 10, 1_000, 32


def contestants(case: cases.Case, quick: bool) -> dict:
    steps = 4 if quick else 20
    found = {
        name: functools.partial(_fit, case, make, steps)
        for name, make in optimizers.optimizers(case).items()
    }
    if quick or case.accumulation:
        found.pop(cases.SGD)
    if case.accumulation:  # beside the same without it
        plain = cases.Case(case.backend, "fit", "fit", case.name)
        for name in (cases.OURS, cases.KERAS):
            make = optimizers.optimizers(plain)[name]
            found[name + cases.WITHOUT_ACCUMULATION] = functools.partial(_fit, plain, make, steps)
    elif case.backend == "torch" and case.name.startswith("8 x"):
        found[cases.PLAIN_TORCH] = functools.partial(_plain_torch, steps)
    return found


def _fit(case, make, steps) -> measure.Step:
    keras.utils.set_random_seed(0)
    build, batch = _MODELS[case.name.split(",")[0]]
    model, loss, x, y = build(steps * batch)
    model.compile(optimizer=make(model.trainable_variables), loss=loss)

    def run():
        model.fit(x, y, batch_size=batch, epochs=1, shuffle=False, verbose=0)

    return measure.Step(run, steps=steps)


def _mlp(rows):
    model = keras.Sequential(
        [
            keras.Input((WIDTH,)),
            *(layers.Dense(WIDTH, activation="relu") for _ in range(DEPTH)),
        ]
    )
    return model, "mse", *_mlp_data(rows)


def _mlp_data(rows):
    random = np.random.default_rng(0)
    return random.random((2, rows, WIDTH), dtype="float32")


def _convnet(rows):
    model = keras.Sequential([keras.Input((32, 32, 3))])
    for width in (32, 64, 64):
        model.add(layers.Conv2D(width, 3, padding="same", activation="relu"))
        model.add(layers.MaxPooling2D())
    model.add(layers.Flatten())
    model.add(layers.Dense(128, activation="relu"))
    model.add(layers.Dense(CLASSES))
    random = np.random.default_rng(0)
    x = random.random((rows, 32, 32, 3), dtype="float32")
    return model, _cross_entropy(), x, random.integers(0, CLASSES, rows)


def _transformer(rows, width=128, heads=4, blocks=2):
    tokens = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(TOKENS, width)(tokens)
    for _ in range(blocks):
        y = layers.LayerNormalization()(x)
        y = layers.MultiHeadAttention(heads, width // heads)(y, y, use_causal_mask=True)
        x = layers.Add()([x, y])
        y = layers.LayerNormalization()(x)
        y = layers.Dense(4 * width, activation="gelu")(y)
        x = layers.Add()([x, layers.Dense(width)(y)])
    model = keras.Model(tokens, layers.Dense(TOKENS)(layers.LayerNormalization()(x)))
    text = np.random.default_rng(0).integers(0, TOKENS, (rows, LENGTH + 1), dtype="int32")
    return model, _cross_entropy(), text[:, :-1], text[:, 1:]


def _cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


# The model, the loss and the data for a number of rows; and the batch size.
_MODELS = {
    "8 x Dense(1024)": (_mlp, 32),
    "small convnet": (_convnet, 32),
    "small transformer": (_transformer, 16),
}


def _plain_torch(steps) -> measure.Step:
    import torch

    torch.manual_seed(0)
    stack = [
        layer for _ in range(DEPTH) for layer in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU())
    ]
    model = torch.nn.Sequential(*stack)
    optimizer = torch.optim.Adam(model.parameters(), lr=cases.LEARNING_RATE, fused=True)
    x, y = (torch.from_numpy(a).split(32) for a in _mlp_data(steps * 32))

    def run():
        for inputs, targets in zip(x, y, strict=True):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()

    return measure.Step(run, steps=steps)
