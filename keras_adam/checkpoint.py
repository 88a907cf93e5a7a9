"""Saving and loading of an optimizer's state: all of it fits, or nothing is assigned.

A file holds what `keras.optimizers.Adam` writes, arrays numbered in the order of `optimizer.variables`, so that each of
the two reads the other's. Where the store is HDF5, each array also bears its role ("momentum", "velocity", ...) and the
path of the variable that it belongs to; Keras passes over these.
"""

from typing import Any, NamedTuple

import numpy as np


class Entry(NamedTuple):
    """One state variable: what it is, whose it is, and the variable itself."""

    role: str
    path: str
    variable: Any

    @property
    def label(self) -> str:
        return f"{self.role} of '{self.path}'" if self.path else self.role


class Saved(NamedTuple):
    """One array of a file; role and path are empty where the file does not tell them."""

    role: str
    path: str
    value: np.ndarray


def save(store, entries: list[Entry]) -> None:
    """Write the state into a Keras store."""
    for i, entry in enumerate(entries):
        store[str(i)] = entry.variable.numpy()
        attributes = _attributes(store, str(i))
        if attributes is not None:
            attributes["role"], attributes["path"] = entry.role, entry.path


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
        attributes = _attributes(store, key) or {}
        saved.append(
            Saved(attributes.get("role", ""), attributes.get("path", ""), np.array(store[key]))
        )
    return saved


def load(saved: list[Saved], entries: list[Entry], owner: str) -> None:
    """Assign the saved arrays to the state; a difference is a ValueError, and then nothing is assigned."""
    pairs = list(_match(saved, entries, owner))
    for entry, value in pairs:
        if value.shape != tuple(entry.variable.shape):
            raise ValueError(
                f"Optimizer '{owner}': {entry.label} has shape {tuple(entry.variable.shape)}, but the saved "
                f"array has shape {value.shape}. Nothing was loaded."
            )
    for entry, value in pairs:
        entry.variable.assign(value)


def _match(saved: list[Saved], entries: list[Entry], owner: str):
    if saved and all(s.role for s in saved):
        files, ours = {s[:2]: s.value for s in saved}, {e[:2] for e in entries}
        # A model rebuilt in the same session has other layer names: then only order and roles can tell.
        renamed = not {path for _, path in files if path} & {path for _, path in ours if path}
        if len(files) == len(saved) and not renamed:
            return _match_names(files, entries, ours, owner)
    return _match_positions(saved, entries, owner)


def _match_names(files: dict, entries: list[Entry], ours: set, owner: str):
    rate = ("learning_rate", "")
    for entry in entries:
        if entry[:2] not in files and entry[:2] != rate:
            raise ValueError(
                f"Optimizer '{owner}': the saved state lacks {entry.label}. Nothing was loaded."
            )
    for role, path in files:
        if (role, path) not in ours and (role, path) != rate:
            label = Entry(role, path, None).label
            raise ValueError(
                f"Optimizer '{owner}': the saved state holds {label}, which the optimizer does not have. "
                "Nothing was loaded."
            )
    return [(entry, files[entry[:2]]) for entry in entries if entry[:2] in files]


def _match_positions(saved: list[Saved], entries: list[Entry], owner: str):
    # A learning rate that was a number and is a schedule now, or the reverse, is no reason to lose the moments. Its
    # place is the second, after the iterations; what follows it is never a scalar of Keras's own.
    had_rate = len(saved) == len(entries) + 1 and saved[1].value.shape == ()
    if had_rate and all(entry.role != "learning_rate" for entry in entries):
        saved = [saved[0], *saved[2:]]
    elif len(saved) == len(entries) - 1 and entries[1].role == "learning_rate":
        entries = [entries[0], *entries[2:]]
    if len(saved) != len(entries):
        raise ValueError(
            f"Optimizer '{owner}' has {len(entries)} state variables, but the saved state has {len(saved)} "
            "arrays: it was saved by an optimizer with other options or for other variables. Nothing was loaded."
        )
    for s, entry in zip(saved, entries, strict=True):
        if s.role and s.role != entry.role:
            raise ValueError(
                f"Optimizer '{owner}': where it has {entry.label}, the saved state has "
                f"{Entry(s.role, s.path, None).label}. Nothing was loaded."
            )
    return [(entry, s.value) for s, entry in zip(saved, entries, strict=True)]


def _attributes(store, key: str):
    # Keras's stores have no public place for an array's attributes; HDF5 itself does.
    group = getattr(store, "_h5_entry_group", None)
    return group[key].attrs if group is not None and hasattr(group, "attrs") else None
