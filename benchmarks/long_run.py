"""Does a longer training lose anything by a state in 8 bits? Validation loss every 100 steps.

    KERAS_BACKEND=torch python benchmarks/long_run.py --state-dtype float32
    KERAS_BACKEND=torch python benchmarks/long_run.py --state-dtype 8bit
    python benchmarks/long_run.py --report

The first two train a transformer of 4.8 million parameters on the characters of Python's own library, with the same
start and the same batches, and write `long-run.json` as they go. The last draws `long-run-light.png` and
`long-run-dark.png`.
"""

import argparse
import fcntl
import json
import os
import string
import sysconfig
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers
from rich.console import Console

import keras_adam

HERE = Path(__file__).parent
OUT = HERE / "long-run.json"
WIDTH, BLOCKS, HEADS = 256, 6, 4
LENGTH, BATCH, VALIDATED = 64, 4, 128  # VALIDATED: sequences of which the loss is the mean
RATE, WARM_UP, EVERY = 1e-3, 200, 100


def text(held_out: bool) -> np.ndarray:
    """Return the codes of the characters of one in ten modules, or of the others."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    chosen = [f for i, f in enumerate(files) if (i % 10 == 9) == held_out]
    codes = {c: i for i, c in enumerate(string.printable)}
    whole = "".join(f.read_text("utf-8", errors="replace") for f in chosen)
    return np.array([codes[c] for c in whole if c in codes], "int32")


def batch(codes: np.ndarray, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    starts = rng.integers(0, len(codes) - LENGTH - 1, size)
    rows = codes[starts[:, None] + np.arange(LENGTH + 1)]
    return rows[:, :-1], rows[:, 1:]


def transformer() -> keras.Model:
    inputs = keras.Input((LENGTH,), dtype="int32")
    places = keras.ops.zeros_like(inputs) + keras.ops.arange(LENGTH)
    x = layers.Embedding(len(string.printable), WIDTH)(inputs)
    x = layers.Add()([x, layers.Embedding(LENGTH, WIDTH)(places)])
    for _ in range(BLOCKS):
        y = layers.LayerNormalization()(x)
        y = layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(y, y, use_causal_mask=True)
        x = layers.Add()([x, y])
        y = layers.Dense(4 * WIDTH, activation="gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(WIDTH)(y)])
    x = layers.LayerNormalization()(x)
    return keras.Model(inputs, layers.Dense(len(string.printable))(x))


def train(state_dtype: str, seed: int, steps: int) -> None:
    keras.utils.set_random_seed(seed)
    model = transformer()
    rate = keras.optimizers.schedules.CosineDecay(
        RATE / 100, steps - WARM_UP, alpha=0.05, warmup_target=RATE, warmup_steps=WARM_UP
    )
    optimizer = keras_adam.AdamW(rate, state_dtype=state_dtype)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss)
    optimizer.build(model.trainable_variables)
    learned, held_out = text(False), text(True)
    validation = batch(held_out, np.random.default_rng(1), VALIDATED)
    rng = np.random.default_rng(seed)
    name, begin, recent = f"{state_dtype}, seed {seed}", time.perf_counter(), []
    run = {
        "backend": keras.backend.backend(),
        "keras": keras.__version__,
        "parameters": model.count_params(),
        "state_bytes": sum(optimizer.state_size().values()),
        "training_characters": len(learned),
        "steps": [],
        "validation_loss": [],
        "training_loss": [],
    }
    for step in range(1, steps + 1):
        recent.append(float(model.train_on_batch(*batch(learned, rng, BATCH))))
        if step % EVERY == 0:
            run["steps"].append(step)
            run["training_loss"].append(float(np.mean(recent)))
            run["validation_loss"].append(float(model.evaluate(*validation, 64, verbose=0)))
            run["seconds"] = time.perf_counter() - begin
            recent = []
            _write(name, run)
            Console().print(
                f"{name}: {step} steps, {run['validation_loss'][-1]:.4f}, {run['seconds']:.0f} s"
            )


def _write(name: str, run: dict) -> None:
    """Put the run beside the others in the file, which two runs may write at once."""
    with OUT.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        runs = json.loads(file.read() or "{}")
        runs[name] = run
        file.truncate(0)
        file.write(json.dumps(dict(sorted(runs.items())), indent=1) + "\n")


def report() -> None:
    """Draw the runs of the file, for light and for dark pages."""
    import matplotlib.pyplot as plt
    from plot import THEMES

    runs = json.loads(OUT.read_text())
    for name, theme in THEMES.items():
        figure, axes = plt.subplots(
            1, 2, figsize=(8.4, 3.2), facecolor=theme["ground"], layout="constrained"
        )
        first = np.array(runs["float32, seed 0"]["validation_loss"])
        for kind, run in reversed(runs.items()):  # float32, below the others
            look = {"color": theme["grid"], "lw": 5} if kind.startswith("float32") else {}
            look = look or {"color": theme["ours"], "lw": 1.5}
            label = f"{kind.split(',')[0].replace('8bit', '8 bits')}: {run['state_bytes'] / 1e6:.1f} MB of state"
            losses = np.array(run["validation_loss"])
            axes[0].plot(run["steps"], losses, label=label, **look)
            axes[1].plot(run["steps"], losses - first, **look)
        axes[0].set_ylabel("validation loss (nats)", color=theme["text"])
        axes[1].set_ylabel("beyond float32's", color=theme["text"])
        for axis in axes:
            axis.set_facecolor(theme["ground"])
            axis.set_xlabel("step", color=theme["text"])
            axis.tick_params(colors=theme["text"], labelsize=8)
            axis.grid(color=theme["grid"], lw=0.5)
            for spine in axis.spines.values():
                spine.set_color(theme["grid"])
        axes[0].legend(frameon=False, labelcolor=theme["text"], fontsize=9)
        figure.savefig(HERE / f"long-run-{name}.png", dpi=160, facecolor=theme["ground"])
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state-dtype", choices=["float32", "bfloat16", "8bit"], default="8bit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--report", action="store_true", help="draw the curves")
    arguments = parser.parse_args()
    if arguments.report:
        report()
    else:
        train(arguments.state_dtype, arguments.seed, arguments.steps)


if __name__ == "__main__":
    main()
