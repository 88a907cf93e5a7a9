"""Saving and loading of an optimizer's state: all of it fits, or nothing is assigned.

A file holds what `keras.optimizers.Adam` writes, arrays numbered in the order of `optimizer.variables`, so that each of
the two reads the other's. Where the store is HDF5, each array also bears its role ("momentum", "velocity", ...), the
path of the variable that it belongs to, its dtype, and a checksum of this and of its values; Keras passes over these.
"""

import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_adam.paths import align

# What an optimizer without the option does not save, and what then begins at zero.
MAY_LACK = ("compensation", "skipped_steps")

# How Keras names its other optimizers, if the user does not. Some keep as many arrays as Adam, of the same shapes.
_OTHER_KINDS = (
    *("adadelta", "adafactor", "adagrad", "adamax", "ftrl", "lamb", "lion", "muon", "nadam"),
    *("rm_sprop", "rmsprop", "schedule_free_adam_w", "sgd"),
)


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

    def saved(self, to_numpy: Callable[[Any], np.ndarray]) -> "Saved":
        """Return it as it is to be saved; `to_numpy` gives a variable's values."""
        dtype = keras.backend.standardize_dtype(self.variable.dtype)
        start = "" if self.start is None else str(self.start)
        array = np.asarray(to_numpy(self.variable))
        if dtype == "bfloat16":  # which HDF5 does not have
            array = array.astype("float32")
        return Saved(self.role, self.path, array, start, self.frozen, dtype)


class Saved(NamedTuple):
    """One array of a file; role, path and dtype are empty where the file does not tell them."""

    role: str
    path: str
    value: np.ndarray
    start: str = ""
    frozen: bool = False
    dtype: str = ""  # of the state variable: a file keeps one in bfloat16 as float32

    @property
    def label(self) -> str:
        return _label(self.role, self.path) if self.role else "an array"

    def checksum(self) -> int:
        """Return a number that another one, or one that was damaged, is most unlikely to have."""
        told = repr((self.role, self.path, self.start, self.frozen, self.dtype, self.value.shape))
        values = np.ascontiguousarray(self.value).reshape(-1).view(np.uint8)
        return zlib.crc32(values.data, zlib.crc32(told.encode()))


def save(store, state: Iterable[Saved]) -> None:
    """Write the state into a Keras store."""
    for i, s in enumerate(state):
        store[str(i)] = s.value
        attributes = _attributes(store, str(i))
        if attributes is None or not s.role:
            continue
        attributes["role"], attributes["path"], attributes["state_dtype"] = s.role, s.path, s.dtype
        if s.start:
            attributes["start"] = s.start
        if s.frozen:
            attributes["frozen"] = True
        attributes["crc32"] = s.checksum()


def read(store, owner: str) -> list[Saved]:
    """Read all arrays of a Keras store, in their order; a damaged one is a ValueError."""
    keys = set(store.keys())
    saved = []
    for i in range(len(keys)):
        key = str(i)
        if key not in keys:
            raise ValueError(
                f"The saved state of optimizer '{owner}' must be numbered without a gap: it holds "
                f"{len(keys)} arrays, but none named '{key}'. Received: {sorted(keys)}"
            )
        value = np.array(store[key])
        if not value.dtype.isnative:  # another machine's order of bytes, which no backend takes
            value = value.astype(value.dtype.newbyteorder("="))
        told = _read_attributes(store, key)
        role, path, start, dtype = (
            str(told.get(name, "")) for name in ("role", "path", "start", "state_dtype")
        )
        s = Saved(role, path, value, start, bool(told.get("frozen", False)), dtype)
        if "crc32" in told and told["crc32"] != s.checksum():
            raise ValueError(
                f"Optimizer '{owner}': in the saved state, {s.label} (array '{key}') is damaged: it does not have the "
                "checksum that it was saved with. An array that was changed on purpose must lose its attribute "
                "'crc32'. No state was loaded."
            )
        saved.append(s)
    unmarked = [i for i, s in enumerate(saved) if not s.role]
    if 0 < len(unmarked) < len(saved):
        raise ValueError(
            f"Optimizer '{owner}': in the saved state array '{unmarked[0]}' does not tell what it is, and others do, "
            "so that it was put there later. To change an array on purpose, write into it, as in `array[...] = value` "
            "of h5py, and remove its attribute 'crc32'. No state was loaded."
        )
    other = _other_optimizer(store)
    if other and unmarked:
        raise ValueError(
            f"Optimizer '{owner}': the saved state is that of '{other}', another kind of optimizer, whose arrays mean "
            "something else. No state was loaded."
        )
    return saved


def is_of_copy(store) -> bool:
    """Whether the store is in a file of an optimizer without its model, as `copy.deepcopy` and `pickle` make it.

    The optimizer is the root of the file, or it is within a `LossScaleOptimizer` that is the root.
    """
    file = getattr(getattr(store, "_h5_entry_group", None), "file", None)
    return file is not None and set(file) <= {"vars", "inner_optimizer"}


def first_other(saved: list[Saved], wanted: list[tuple[str, tuple[int, ...], bool]]) -> str:
    """Return the first thing in the state that is not that of the wanted variables; "" if there is none.

    Args:
        saved: The state; that of a variable that was frozen when it was saved may be left over.
        wanted: Path and shape of each variable, and whether it must have state.
    """
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for path, shape, _ in wanted:
        shapes.setdefault(path, []).append(shape)
    aligned = align((s.path for s in saved), shapes)
    for s in saved:
        if s.path not in aligned:
            if s.path and not s.frozen:
                return f"{s.label}, which is not one of them"
            continue
        path = aligned[s.path]
        if s.value.shape not in shapes[path]:
            return f"{s.label} in shape {s.value.shape}, but '{path}' has {shapes[path][0]}"
    have = set(aligned.values())
    lacking = next((path for path, _, must in wanted if must and path not in have), None)
    return "" if lacking is None else f"none of '{lacking}'"


def is_unused(saved: list[Saved]) -> bool:
    """Whether no step was made: the count of iterations and all that is kept of a variable is zero."""
    return not any(s.value.any() for s in saved if s.path or s.role == "iteration")


def match(
    saved: list[Saved], entries: list[Entry], owner: str, by_name: bool = False
) -> list[tuple[Entry, Saved]]:
    """Pair the state with what was saved; raise a ValueError that names the first difference.

    With `by_name` names decide even if they are numbered ones, which in another session tell the order of creation.
    """
    pairs = _match_names(saved, entries, owner, by_name) or _match_positions(saved, entries, owner)
    check(pairs, owner)
    # What rounding took in another dtype is kept at another scale, and the variable itself has been rounded anew.
    return [
        (e, _zeros(e)) if e.role == "compensation" and _other_half(e, s) else (e, s)
        for e, s in pairs
    ]


def check(pairs: list[tuple[Entry, Saved]], owner: str) -> None:
    """Raise a ValueError if an array does not fit the state variable that it is for.

    Floats of any width fit a float; what does not is one that counts, and the reverse.
    """
    for entry, s in pairs:
        if s.value.shape != tuple(entry.variable.shape):
            raise ValueError(
                f"Optimizer '{owner}': {entry.label} has shape {tuple(entry.variable.shape)}, but the saved "
                f"array has shape {s.value.shape}. No state was loaded."
            )
        dtype = keras.backend.standardize_dtype(entry.variable.dtype)
        if not keras.backend.is_float_dtype(dtype):
            whole_number(s, owner, entry.label, dtype)
        elif not s.value.dtype.name.startswith(("float", "bfloat")):
            raise ValueError(
                f"Optimizer '{owner}': {entry.label} is of dtype {dtype}, but the saved array is of dtype "
                f"{s.value.dtype}. No state was loaded."
            )


def whole_number(s: Saved, owner: str, label: str, dtype: str) -> int:
    """Return the count that an array holds; raise a ValueError if it holds none, or one that `dtype` does not have."""
    value, most = s.value, int(np.iinfo(dtype).max)
    is_number = value.shape == () and value.dtype.name.startswith(("int", "uint", "float"))
    # As a whole number: beside a float of NumPy, `most` would be rounded up to one.
    number = int(value) if is_number and np.isfinite(value) else -1
    if not 0 <= number <= most or value != number:
        shown = value.item() if value.shape == () else f"an array of shape {value.shape}"
        raise ValueError(
            f"Optimizer '{owner}': {label} must be a whole number from 0 to {most}. Received: {shown!r}. No state was "
            "loaded."
        )
    return number


def is_beginning(saved: list[Saved]) -> bool:
    """Whether this is the state of an optimizer that was not built, so that no training had begun.

    It holds the count of iterations, and the learning rate if that is a number.
    """
    roles = [s.role for s in saved]
    return (
        roles in (["iteration"], ["iteration", "learning_rate"], [""], ["", ""])
        and all(s.value.shape == () for s in saved)
        and saved[0].value == 0
    )


def _other_half(entry: Entry, s: Saved) -> bool:
    # Files of before the dtype was told have bfloat16 as float32, too, and float16 as it is.
    kept = s.dtype or ("float16" if s.value.dtype == "float16" else "bfloat16")
    return kept != keras.backend.standardize_dtype(entry.variable.dtype)


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
    """Give the state what was saved, rounded to its dtype."""
    for entry, s in pairs:
        dtype = keras.backend.standardize_dtype(entry.variable.dtype)
        whole = not keras.backend.is_float_dtype(dtype)
        entry.variable.assign(s.value.astype(dtype) if whole else s.value)


def _match_names(saved: list[Saved], entries: list[Entry], owner: str, by_name: bool):
    """Pair by role and path; return nothing where the file does not tell them or they cannot serve."""
    if not all(s.role for s in saved):
        return None
    ours = {e[:2] for e in entries}
    aligned = align((s.path for s in saved), (e.path for e in entries))
    if not any(aligned):  # a model rebuilt in the same session has other layer names
        if any(s.start for s in saved):
            raise ValueError(
                f"Optimizer '{owner}': the saved state is of variables that joined late, and of another model: none of "
                "its paths is known here, so that which is which cannot be told. No state was loaded."
            )
        return None
    in_order = [aligned.get(s.path) for s in saved] == [e.path for e in entries]
    if not (in_order or by_name) and _are_alike(saved, entries):
        if {aligned.get(s.path) for s in saved} == {e.path for e in entries}:
            raise ValueError(
                f"Optimizer '{owner}': by name the saved state is in another order than by position, and the names are "
                "numbered ones, which tell the order of creation, so that which is which cannot be told. Build the "
                "optimizer with the variables in the order in which they were saved. No state was loaded."
            )
        return None  # a model rebuilt after another one has names that are numbered on
    files = {(s.role, aligned.get(s.path, s.path)): s for s in saved}
    if len(files) < len(saved):  # variables of one path
        pairs = _match_positions(saved, entries, owner)
        for entry, s in pairs:
            if s.path and aligned.get(s.path, s.path) != entry.path:
                raise ValueError(
                    f"Optimizer '{owner}': the saved state holds arrays of one role and path, which only their order "
                    f"tells apart, but where it holds {s.label}, the optimizer has {entry.label}. No state was loaded."
                )
        return pairs
    # What was frozen when it was saved is not among the variables that a loaded model is built for.
    files = {name: s for name, s in files.items() if name in ours or not s.frozen}
    # A learning rate that was a number and is a schedule now, or the reverse, loses no moments.
    rate = ("learning_rate", "")
    for name in [*(e[:2] for e in entries), *files]:
        if name != rate and name not in files and name[0] not in MAY_LACK:
            raise ValueError(
                f"Optimizer '{owner}': the saved state lacks {_label(*name)}. No state was loaded."
            )
        if name != rate and name not in ours:
            raise ValueError(
                f"Optimizer '{owner}': the saved state holds {_label(*name)}, which the optimizer does not have. "
                "No state was loaded."
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
            "arrays: it was saved by an optimizer with other options or for other variables. No state was loaded."
        )
    for s, entry in zip(saved, entries, strict=True):
        if s.role and s.role != entry.role:
            raise ValueError(
                f"Optimizer '{owner}': where it has {entry.label}, the saved state has "
                f"{_label(s.role, s.path)}. No state was loaded."
            )
    return [*zip(entries, saved, strict=True), *lacking]


def _label(role: str, path: str) -> str:
    return f"{role} of '{path}'" if path else role


def _attributes(store, key: str):
    # Keras's stores have no public place for an array's attributes; HDF5 itself does.
    group = getattr(store, "_h5_entry_group", None)
    return group[key].attrs if group is not None and hasattr(group, "attrs") else None


def _other_optimizer(store) -> str:
    """Return the name of the optimizer whose state this is, if it is one that Keras gave to another kind of its own."""
    name = str(getattr(getattr(store, "_h5_entry_group", None), "attrs", {}).get("name", ""))
    kind = re.sub(r"_\d+$", "", name).lower()  # Keras 3.10 calls one 'SGD'
    return name if kind in _OTHER_KINDS else ""


def _read_attributes(store, key: str) -> dict[str, Any]:
    """Return the attributes of an array, of which a store in several files shows only those of the open one."""
    for name in getattr(store, "current_shard_filenames", []):
        if key in store._h5_entry_group:
            break
        store._switch_h5_file(name, mode="r")
    told = dict(_attributes(store, key) or {})
    if hasattr(store, "_restore_h5_file"):
        store._restore_h5_file()
    return told
