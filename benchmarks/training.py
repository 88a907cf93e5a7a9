"""Do variables and moments in fewer bits train as well as in float32? Final validation losses over several seeds.

    KERAS_BACKEND=torch python benchmarks/training.py
    python benchmarks/training.py --report

The first trains a convolutional net on scikit-learn's digits and a small transformer on the characters of a module of
Python's library, wholly in one dtype, and writes `training-<backend>.json`. Runs that the file holds already are not
repeated. The second makes a table and plots of all such files: `training.md`, `training-light.png`,
`training-dark.png`.

These models are small, and 8 bits start at 4,096 elements of a variable. Here they start at 256, in each of the
packages that have them.
"""

import argparse
import contextlib
import inspect
import json
import math
import os
import re
import time
from pathlib import Path
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers, ops
from rich.console import Console

import keras_adam
from keras_adam import rule, storage

HERE = Path(__file__).parent
BACKEND = keras.backend.backend()
RATE, LAST_RATE = 2e-3, 0.01  # the last as a share of the first
FLOAT32, OURS_16 = "keras_adam, float32", "keras_adam, bfloat16"
LINEAR = "float32, v in evenly spaced 8 bits"  # which must fail
LEAST_IN_8_BITS = 256
SCALE = {"loss_scale_factor": 256.0}  # gradients below 6e-8 are zero in float16


def contestants(steps: int) -> dict:
    """Return (dtype, what makes an optimizer) by name."""

    def rate():
        return keras.optimizers.schedules.CosineDecay(RATE, steps, alpha=LAST_RATE)

    def ours(**options):
        return lambda: keras_adam.Adam(rate(), **options)

    in_16, in_8 = {"state_dtype": "bfloat16"}, {"state_dtype": "8bit"}
    found = {
        FLOAT32: ("float32", ours()),
        "keras_adam, float32, moments in bfloat16": ("float32", ours(**in_16)),
        "keras_adam, float32, moments in 8 bits": ("float32", ours(**in_8)),
        OURS_16: ("bfloat16", ours()),
        "keras_adam, bfloat16, moments too": ("bfloat16", ours(**in_16)),
        "keras_adam, bfloat16, moments in 8 bits": ("bfloat16", ours(**in_8)),
        "keras_adam, bfloat16, kahan_sum=False": ("bfloat16", ours(kahan_sum=False)),
        "keras_adam, float16": ("float16", ours(**SCALE)),
        LINEAR: ("float32", lambda: LinearVelocity(rate())),
        "keras.optimizers.Adam, float32": ("float32", lambda: keras.optimizers.Adam(rate())),
        "keras.optimizers.Adam, bfloat16": ("bfloat16", lambda: keras.optimizers.Adam(rate())),
        "keras.optimizers.Adam, float16": (
            "float16",
            lambda: keras.optimizers.Adam(rate(), **SCALE),
        ),
    }
    if BACKEND == "torch":
        found |= _of_torch()
    return found


def _of_torch() -> dict:
    import torch

    options = {"lr": RATE, "eps": 1e-7, "weight_decay": 0.0}
    found = {
        "torch.optim.AdamW, bfloat16": (
            "bfloat16",
            lambda: lambda parameters: torch.optim.AdamW(parameters, **options),
        )
    }
    with contextlib.suppress(ImportError):
        import optimi

        found["optimi.AdamW, bfloat16, Kahan"] = (
            "bfloat16",
            lambda: lambda parameters: optimi.AdamW(parameters, kahan_sum=True, **options),
        )
    with contextlib.suppress(ImportError):
        import bitsandbytes

        found["bitsandbytes.AdamW8bit, float32"] = (
            "float32",
            lambda: (
                lambda parameters: bitsandbytes.optim.AdamW8bit(
                    parameters, min_8bit_size=LEAST_IN_8_BITS, **options
                )
            ),
        )
    with contextlib.suppress(ImportError):
        import torchao.optim

        class AdamW8bit(torchao.optim.AdamW8bit):
            def _new_buffer(self, p, signed):
                if p.numel() < LEAST_IN_8_BITS or p.numel() % self.block_size:
                    return torch.zeros_like(p)
                return self._subclass_zeros(p, signed, self.block_size)

        found["torchao.AdamW8bit, float32"] = (
            "float32",
            lambda: lambda parameters: AdamW8bit(parameters, **options),
        )
    return found


class LinearVelocity(keras_adam.Adam):
    """Rounds the second moments after each step as 8-bit whole numbers, relative to the largest of a block, would."""

    def apply(self, grads, trainable_variables=None):
        super().apply(grads, trainable_variables)
        for variable in self.variables:
            if variable.name.endswith("velocity") and math.prod(variable.shape) >= LEAST_IN_8_BITS:
                variable.assign(_evenly_spaced(variable.value))


def _evenly_spaced(x):
    size = math.prod(x.shape)
    blocks = ops.reshape(ops.pad(ops.reshape(x, (-1,)), (0, -size % rule.BLOCK)), (-1, rule.BLOCK))
    unit = ops.max(blocks, axis=-1, keepdims=True) / 255
    rounded = ops.round(ops.divide_no_nan(blocks, unit)) * unit
    return ops.reshape(ops.reshape(rounded, (-1,))[:size], x.shape)


class Digits:
    """A small convolutional net on 1,797 images of 8 x 8."""

    name, epochs, batch = "digits, convnet", 8, 32

    def __init__(self):
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        x, y = (digits.images[order, ..., None] / 16).astype("float32"), digits.target[order]
        self.train, self.test = (x[:1437], y[:1437]), (x[1437:], y[1437:])

    def model(self):
        return keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Conv2D(16, 3, activation="relu", padding="same"),
                layers.MaxPooling2D(),
                layers.Conv2D(32, 3, activation="relu", padding="same"),
                layers.Flatten(),
                layers.Dense(64, activation="relu"),
                layers.Dense(10),
            ]
        )


class Characters:
    """A transformer of one block that predicts the next character of `argparse`'s source."""

    name, epochs, batch = "characters, transformer", 4, 64
    length, width = 24, 32

    def __init__(self):
        text = inspect.getsource(argparse)
        alphabet = sorted(set(text))
        codes = np.array([alphabet.index(c) for c in text], "int32")
        rows = np.stack([codes[i : i + self.length + 1] for i in range(0, len(codes) - 40, 18)])
        rows = np.random.default_rng(0).permutation(rows)
        cut = len(rows) * 8 // 10
        self.size = len(alphabet)
        self.train = rows[:cut, :-1], rows[:cut, 1:]
        self.test = rows[cut:, :-1], rows[cut:, 1:]

    def model(self):
        inputs = keras.Input((self.length,), dtype="int32")
        x = layers.Embedding(self.size, self.width)(inputs)
        x = layers.Add()([x, _Position(self.length, self.width)(x)])
        y = layers.LayerNormalization()(x)
        # With the scores asked for, Keras multiplies them itself: JAX's own attention has no float16 on CPU.
        y, _ = layers.MultiHeadAttention(4, self.width // 4)(
            y, y, use_causal_mask=True, return_attention_scores=True
        )
        x = layers.Add()([x, y])
        y = layers.Dense(4 * self.width, activation="gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(self.width)(y)])
        return keras.Model(inputs, layers.Dense(self.size)(layers.LayerNormalization()(x)))


class _Position(layers.Layer):
    def __init__(self, length, width):
        super().__init__()
        self.table = self.add_weight(shape=(length, width), initializer="random_normal")

    def call(self, x):
        return keras.ops.broadcast_to(self.table, keras.ops.shape(x))


def final_loss(task, dtype: str, make, seed: int) -> float:
    """Train in `dtype`, and return the validation loss of the weights that came out, computed in float32."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    reference = task.model()
    start = reference.get_weights()
    keras.config.set_dtype_policy(dtype)
    try:
        model = task.model()
        model.set_weights(start)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        optimizer = make()
        if isinstance(optimizer, keras.optimizers.Optimizer):
            model.compile(optimizer, loss=loss)
            model.fit(*task.train, batch_size=task.batch, epochs=task.epochs, verbose=0)
        else:
            _train_on_torch(task, model, loss, optimizer, seed)
    finally:
        keras.config.set_dtype_policy("float32")
    reference.set_weights(
        [keras.ops.convert_to_numpy(keras.ops.cast(w, "float32")) for w in model.weights]
    )
    reference.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return float(reference.evaluate(*task.test, batch_size=512, verbose=0))


def _train_on_torch(task, model, loss, make, seed) -> None:
    import torch

    parameters = [v.value for v in model.trainable_variables]
    optimizer = make(parameters)
    x, y = task.train
    steps = _steps(task)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + np.cos(np.pi * min(1, t / steps))),
    )
    torch.compiler.set_stance("force_eager")  # torchao compiles for each shape, which takes longer
    rng = np.random.default_rng(seed)
    for _ in range(task.epochs):
        order = rng.permutation(len(x))
        for i in range(0, len(x), task.batch):
            rows = order[i : i + task.batch]
            optimizer.zero_grad()
            loss(y[rows], model(x[rows], training=True)).backward()
            optimizer.step()
            schedule.step()


def _steps(task) -> int:
    return task.epochs * -(-len(task.train[0]) // task.batch)


def run(seeds: int, only: str) -> None:
    console = Console()
    found = {"backend": BACKEND, "keras": keras.__version__, "seeds": seeds, "tasks": {}}
    out = HERE / f"training-{BACKEND}.json"
    if out.exists() and (before := json.loads(out.read_text()))["seeds"] == seeds:
        found["tasks"] = before["tasks"]  # a run that was broken off goes on
    mock.patch.object(storage, "_LEAST_IN_8_BITS", LEAST_IN_8_BITS).start()
    for task in (Digits(), Characters()):
        losses = found["tasks"].setdefault(task.name, {})
        known = contestants(_steps(task))
        for name, (dtype, make) in known.items():
            if name in losses or not re.search(only, f"{task.name}: {name}"):
                continue
            begin = time.perf_counter()
            try:
                losses[name] = [final_loss(task, dtype, make, seed) for seed in range(seeds)]
            except TypeError as error:
                # Keras's Adam with a loss scale and an embedding, on TensorFlow.
                console.print(f"{name} raises {error}")
                losses[name] = [float("nan")] * seeds
            spent = time.perf_counter() - begin
            console.print(
                f"{BACKEND}, {task.name}, {name}: {_summary(losses[name])} ({spent:.0f} s)"
            )
            found["tasks"][task.name] = {n: losses[n] for n in known if n in losses}
            out.write_text(json.dumps(found, indent=1))
    console.print(f"wrote {out}")


def _summary(losses) -> str:
    return f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}"


def report() -> None:
    """Write the table and the plots of all results beside this file."""
    from plot import THEMES
    from tables import BACKENDS

    files = sorted(HERE.glob("training-*.json"))
    results = [json.loads(f.read_text()) for f in files]
    seeds = {r["seeds"] for r in results}
    lines = [
        "# Training in fewer bits: validation losses at the end",
        f"Mean ± standard deviation over {' or '.join(map(str, seeds))} seeds, of models whose variables "
        "have the dtype that is named first. The loss is computed in float32 from the weights that came "
        "out, and is NaN where training raised or diverged. *In spread*: the mean lies within the smallest "
        "and the largest loss that float32 reached with any of the seeds, or below.",
        f"8 bits start at {LEAST_IN_8_BITS} elements of a variable here, in each package, and not at 4,096, "
        f"since these models are small. *{LINEAR}* is a control that must fail: second moments, rounded to "
        "255 even steps of their block's largest.",
    ]
    for result in results:
        for task, losses in result["tasks"].items():
            low, high = min(losses[FLOAT32]), max(losses[FLOAT32])
            lines += [
                f"## {BACKENDS[result['backend']]}: {task}",
                "| | loss | in spread |\n| --- | ---: | ---: |",
            ]
            for name in _names(results):
                if name not in losses:
                    continue
                values = losses[name]
                mean = np.mean(values)
                verdict = "yes" if mean <= high else "no"
                lines[-1] += f"\n| {name} | {_summary(values)} | {verdict} |"
            lines.append(f"float32 lay between {low:.4f} and {high:.4f}.")
    (HERE / "training.md").write_text("\n\n".join(lines) + "\n")
    for name, theme in THEMES.items():
        _draw(results, theme, HERE / f"training-{name}.png")


def _names(results) -> list[str]:
    """Return the contestants of the backend that has most."""
    return list(max((losses for r in results for losses in r["tasks"].values()), key=len))


_LARGEST_DRAWN = 6.0


def _draw(results, theme, path) -> None:
    import matplotlib.pyplot as plt
    from tables import BACKENDS

    tasks = list(results[0]["tasks"])
    names = _names(results)
    figure, axes = plt.subplots(
        len(tasks),
        len(results),
        figsize=(2.2 * len(results) + 2.4, 2.7 * len(tasks)),
        sharey=True,
        sharex="row",
        facecolor=theme["ground"],
        squeeze=False,
        layout="constrained",
    )
    for row, task in zip(axes, tasks, strict=True):
        for axis, result in zip(row, results, strict=True):
            axis.set_facecolor(theme["ground"])
            losses = result["tasks"].get(task)
            if not losses:
                axis.set_axis_off()
                continue
            spread = min(losses[FLOAT32]), max(losses[FLOAT32])
            axis.axvspan(*spread, color=theme["ours"], alpha=0.2, lw=0)
            for i, name in enumerate(names):
                if name in losses:
                    color = theme["ours"] if name.startswith("keras_adam") else theme["colors"][0]
                    axis.plot(
                        losses[name], [i] * len(losses[name]), "o", ms=3, alpha=0.6, color=color
                    )
                    axis.plot(np.mean(losses[name]), i, "|", ms=14, mew=2, color=color)
                    if not all(x < _LARGEST_DRAWN for x in losses[name]):
                        axis.text(spread[1], i, "  diverged", color=color, va="center", fontsize=8)
            axis.set_yticks(range(len(names)), names)
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.set_xscale("log")
            axis.set_xticks([0.1, 0.3, 1, 2, 3, 5], minor=False)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(plt.NullLocator())
            known = [x for r in results for v in r["tasks"].get(task, {}).values() for x in v]
            known = [x for x in known if x < _LARGEST_DRAWN]
            axis.set_xlim(0.93 * min(known), 1.07 * max(known))
            axis.set_title(
                f"{BACKENDS[result['backend']]}: {task}", color=theme["text"], fontsize=8
            )
            axis.tick_params(colors=theme["text"], which="both", labelsize=8)
            axis.grid(axis="x", color=theme["grid"], which="both", lw=0.5)
            for spine in axis.spines.values():
                spine.set_color(theme["grid"])
    figure.supxlabel(
        "validation loss at the end, each seed and the mean; shaded: float32's seeds",
        color=theme["text"],
        fontsize=9,
    )
    figure.savefig(path, dpi=160, facecolor=theme["ground"])
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="regular expression of contestants")
    parser.add_argument("--report", action="store_true", help="make the table and the plots")
    arguments = parser.parse_args()
    if arguments.report:
        report()
    else:
        run(arguments.seeds, arguments.only)


if __name__ == "__main__":
    main()
