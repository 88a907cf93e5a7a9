"""Saving and loading of an optimizer's state: all of it fits, or nothing is assigned.

A file holds what `keras.optimizers.Adam` writes, arrays numbered in the order of `optimizer.variables`, so that each of
the two reads the other's. Where the store is HDF5, each array also bears its role ("momentum", "velocity", ...) and the
path of the variable that it belongs to; Keras passes over these.
"""

import re
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_adam.paths import align

# What an optimizer without the option does not save, and what then begins at zero.
MAY_LACK = ("compensation", "skipped_steps")


class Entry(NamedTuple):
    """One state variable: what it is, whose it is, the variable itself."""

    role: str
    path: str
    variable: Any
    start: int | None = None  # of a momentum: which "start" tells when its variable joined
    frozen: bool = False  # whether it belongs to a variable that is not trainable now

    @property
    def label(self) -> str:
        return _label(self.role, self.path)


class Saved(NamedTuple):
    """One array of a file; role and path are empty where the file does not tell them."""

    role: str
    path: str
    value: np.ndarray
    start: str = ""
    frozen: bool = False


def save(store, entries: list[Entry]) -> None:
    """Write the state into a Keras store."""
    for i, entry in enumerate(entries):
        # HDF5 has no bfloat16.
        is_half = keras.backend.standardize_dtype(entry.variable.dtype) == "bfloat16"
        value = ops.cast(entry.variable, "float32") if is_half else entry.variable
        store[str(i)] = ops.convert_to_numpy(value)
        attributes = _attributes(store, str(i))
        if attributes is not None:
            attributes["role"], attributes["path"] = entry.role, entry.path
            if entry.start is not None:
                attributes["start"] = str(entry.start)
            if entry.frozen:
                attributes["frozen"] = True


def read(store, owner: str) -> list[Saved]:
    """Read all arrays of a Keras store, in their order."""
    saved = []
    for i in range(len(store.keys())):
        key = str(i)
        if key not in store.keys():
            raise ValueError(
                f"The saved state of optimizer '{owner}' must be numbered without a gap: it holds "
                f"{len(store.keys())} arrays, but none named '{key}'. Received: {sorted(store.keys())}"
            )
        told = _attributes(store, key) or {}
        role, path, start = (told.get(name, "") for name in ("role", "path", "start"))
        frozen = bool(told.get("frozen", False))
        saved.append(Saved(role, path, np.array(store[key]), start, frozen))
    return saved


def match(saved: list[Saved], entries: list[Entry], owner: str) -> list[tuple[Entry, Saved]]:
    """Pair the state with what was saved; raise a ValueError that names the first difference."""
    pairs = _match_names(saved, entries, owner) or _match_positions(saved, entries, owner)
    for entry, s in pairs:
        if s.value.shape != tuple(entry.variable.shape):
            raise ValueError(
                f"Optimizer '{owner}': {entry.label} has shape {tuple(entry.variable.shape)}, but the saved "
                f"array has shape {s.value.shape}. Nothing was loaded."
            )
    return pairs


def _are_alike(saved: list[Saved], entries: list[Entry]) -> bool:
    """Whether both are the same but for the numbers at the end of names, in the same order."""

    def plain(path: str) -> list[str]:
        return [re.sub(r"_\d+$", "", name) for name in path.split("/")]

    return len(saved) == len(entries) and all(
        not (s.start or s.frozen)
        and s.role == e.role
        and plain(s.path) == plain(e.path)
        and s.value.shape == tuple(e.variable.shape)
        for s, e in zip(saved, entries, strict=True)
    )


def assign(pairs: list[tuple[Entry, Saved]]) -> None:
    """Give the state what was saved."""
    for entry, s in pairs:
        entry.variable.assign(s.value)


def _match_names(saved: list[Saved], entries: list[Entry], owner: str):
    """Pair by role and path; return nothing where the file does not tell them or they cannot serve."""
    if not all(s.role for s in saved):
        return None
    ours = {e[:2] for e in entries}
    aligned = align((s.path for s in saved), (e.path for e in entries))
    if not any(aligned):  # a model rebuilt in the same session has other layer names
        if any(s.start for s in saved):
            raise ValueError(
                f"Optimizer '{owner}': the saved state is of variables that joined late, and of another model: none of "
                "its paths is known here, so that which is which cannot be told. Nothing was loaded."
            )
        return None
    if _are_alike(saved, entries) and [aligned.get(s.path) for s in saved] != [
        e.path for e in entries
    ]:
        if {aligned.get(s.path) for s in saved} == {e.path for e in entries}:
            raise ValueError(
                f"Optimizer '{owner}': by name the saved state is in another order than by position, and the names are "
                "numbered ones, which tell the order of creation, so that which is which cannot be told. Build the "
                "optimizer with the variables in the order in which they were saved. Nothing was loaded."
            )
        return None  # a model rebuilt after another one has names that are numbered on
    files = {(s.role, aligned.get(s.path, s.path)): s for s in saved}
    if len(files) < len(saved):
        return None
    # What was frozen when it was saved is not among the variables that a loaded model is built for.
    files = {name: s for name, s in files.items() if name in ours or not s.frozen}
    # A learning rate that was a number and is a schedule now, or the reverse, loses no moments.
    rate = ("learning_rate", "")
    for name in [*(e[:2] for e in entries), *files]:
        if name != rate and name not in files and name[0] not in MAY_LACK:
            raise ValueError(
                f"Optimizer '{owner}': the saved state lacks {_label(*name)}. Nothing was loaded."
            )
        if name != rate and name not in ours:
            raise ValueError(
                f"Optimizer '{owner}': the saved state holds {_label(*name)}, which the optimizer does not have. "
                "Nothing was loaded."
            )
    return [
        (entry, files[entry[:2]] if entry[:2] in files else _zeros(entry))
        for entry in entries
        if entry[:2] in files or entry.role in MAY_LACK
    ]


def _zeros(entry: Entry) -> Saved:
    return Saved(entry.role, entry.path, np.zeros(tuple(entry.variable.shape), "float32"))


def _match_positions(saved: list[Saved], entries: list[Entry], owner: str):
    lacking: list[tuple[Entry, Saved]] = []
    if not any(s.role in MAY_LACK for s in saved) and len(saved) < len(entries):
        lacking = [(entry, _zeros(entry)) for entry in entries if entry.role in MAY_LACK]
        entries = [entry for entry in entries if entry.role not in MAY_LACK]
    # The learning rate, if it is a state variable, stands second, and what follows it in a file of Keras's Adam is the
    # state of a variable; so a file with one array more or less shows whether its learning rate was a schedule.
    has_rate = any(entry.role == "learning_rate" for entry in entries)
    if len(saved) == len(entries) + 1 and not has_rate and saved[1].value.shape == ():
        saved = [saved[0], *saved[2:]]
    elif len(saved) == len(entries) - 1 and has_rate:
        entries = [entry for entry in entries if entry.role != "learning_rate"]
    if len(saved) != len(entries):
        raise ValueError(
            f"Optimizer '{owner}' has {len(entries)} state variables, but the saved state has {len(saved)} "
            "arrays: it was saved by an optimizer with other options or for other variables. Nothing was loaded."
        )
    for s, entry in zip(saved, entries, strict=True):
        if s.role and s.role != entry.role:
            raise ValueError(
                f"Optimizer '{owner}': where it has {entry.label}, the saved state has "
                f"{_label(s.role, s.path)}. Nothing was loaded."
            )
    return [*zip(entries, saved, strict=True), *lacking]


def _label(role: str, path: str) -> str:
    return f"{role} of '{path}'" if path else role


def _attributes(store, key: str):
    # Keras's stores have no public place for an array's attributes; HDF5 itself does.
    group = getattr(store, "_h5_entry_group", None)
    return group[key].attrs if group is not None and hasattr(group, "attrs") else None
