"""The plot: each contestant's time relative to ours, on a logarithmic axis, one panel per backend."""

from pathlib import Path

import cases
import matplotlib
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from tables import BACKENDS, milliseconds

matplotlib.use("Agg")

# Fewer kinds than contestants: readers look for Keras, for an optimizer they would write, and for the best there is.
_KINDS = {
    cases.KERAS: ("keras.optimizers.Adam", "s"),
    cases.NAIVE: ("naive Keras subclass", "v"),
    "peer": ("best of the framework's own", "o"),
    cases.GROUPS: ("keras_adam, 4 groups", "|"),
    cases.SGD: ("keras.optimizers.SGD", "x"),
}
THEMES = {
    "light": {
        "ground": "#ffffff",
        "text": "#1f2328",
        "grid": "#d8dee4",
        "ours": "#0a7f3f",
        "colors": ["#cf222e", "#bc6c00", "#0969da", "#0a7f3f", "#6e7781"],
    },
    "dark": {
        "ground": "#0d1117",
        "text": "#e6edf3",
        "grid": "#30363d",
        "ours": "#3fb950",
        "colors": ["#ff7b72", "#e3a03c", "#58a6ff", "#3fb950", "#9198a1"],
    },
}


def draw(results: list[dict], folder: Path) -> list[Path]:
    """Write the plot for light and for dark pages."""
    paths = []
    for theme in THEMES:
        path = folder / f"ratios-{theme}.png"
        drawn = figure(results, theme)
        drawn.savefig(path, dpi=200)
        plt.close(drawn)
        paths.append(path)
    return paths


def figure(results: list[dict], theme: str):
    """Return the plot; also for the notebook on speed."""
    panels = [(result["backend"], _chosen(result["rows"])) for result in results]
    return _figure([(backend, rows) for backend, rows in panels if rows], THEMES[theme])


def _chosen(rows):
    """XLA's rows are in the tables alone: they are much like the graph's."""
    return [row for row in rows if row.mode != "XLA"]


def _figure(panels, theme):
    heights = [len(rows) + 2.4 for _, rows in panels]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(8.4, 0.245 * sum(heights) + 0.9),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
        layout="constrained",
        facecolor=theme["ground"],
    )
    for ax, (backend, rows) in zip(axes[:, 0], panels, strict=True):
        _panel(ax, rows, theme)
        ax.set_title(BACKENDS[backend], loc="left", color=theme["text"], weight="bold", fontsize=11)
    ax.set_xlabel("time relative to keras_adam.Adam (further right: slower)", color=theme["text"])
    handles = {}
    for ax in axes[:, 0]:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=3,
        frameon=False,
        labelcolor=theme["text"],
        fontsize=10,
    )
    return figure


def _panel(ax, rows, theme):
    places = range(len(rows))
    ax.set_facecolor(theme["ground"])
    ax.set(xscale="log", ylim=(len(rows) - 0.4, -0.6))
    ax.set_yticks(places, [_label(row) for row in rows], fontsize=9.5)
    ax.axvline(1, color=theme["ours"], linewidth=2, zorder=1, label="keras_adam.Adam")
    ax.grid(axis="both", color=theme["grid"], linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", colors=theme["text"], length=0, labelbottom=True)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    for side in ax.spines.values():
        side.set_visible(False)
    for (kind, (label, marker)), color in zip(_KINDS.items(), theme["colors"], strict=True):
        found = [(row, row.best_peer() if kind == "peer" else kind) for row in rows]
        points = [
            (row.ratio(name), place)
            for place, (row, name) in zip(places, found, strict=True)
            if name in row.seconds and name != row.ours
        ]
        if not points:
            continue
        ratios, ys = zip(*points, strict=True)
        x = [r.median for r in ratios]
        spreads = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
        ax.errorbar(
            x, ys, xerr=spreads, fmt=marker, color=color, label=label, markersize=6, linewidth=1.2
        )


def _label(row) -> str:
    name = row.name.replace("accumulation", "acc.").replace(", per micro-step", "")
    mode = "" if row.mode == "fit" else f", {row.mode}"
    kind = "fit: " if row.mode == "fit" else ""
    return f"{kind}{name}{mode} ({milliseconds(row.time(row.ours)).split(' ±')[0]} {_unit(row)})"


def _unit(row) -> str:
    return milliseconds(row.time(row.ours)).rsplit(" ", 1)[1]
