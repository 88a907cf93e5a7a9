"""Saving and loading of an optimizer's state: all of it fits, or nothing is assigned.

A file holds what `keras.optimizers.Adam` writes, arrays numbered in the order of `optimizer.variables`, so that each of
the two reads the other's. In HDF5 each array also has attributes, which Keras ignores: its role ("momentum",
"velocity", ...), the path of its variable, its dtype, and a checksum of these and of its values.
"""

import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_adam.paths import align
from keras_adam.storage import MOMENTS, SCALE, InBlocks, Storage

# Beginnings of roles that a file may lack, if it was saved without the option; their arrays then begin at zero.
MAY_LACK = ("compensation", "skipped_steps", "recent_norms", "monitor")
# Beginnings of roles that are left out of a file where the optimizer is without the option.
MAY_LEAVE = ("recent_norms", "monitor")
SIGNED_MOMENT = "momentum"  # the one that may be negative

# How Keras names its other optimizers, if the user does not. A `.weights.h5` file of Keras shows nothing else of the
# optimizer's class: Adamax, Lamb and RMSprop save as many arrays as Adam, of the same shapes and without roles.
_OTHER_KINDS = (
    *("adadelta", "adafactor", "adagrad", "adamax", "ftrl", "lamb", "lion", "muon", "nadam"),
    *("rm_sprop", "rmsprop", "schedule_free_adam_w", "sgd"),
)


class Entry(NamedTuple):
    """One state variable: what it is, whose it is, the variable itself."""

    role: str
    path: str
    variable: Any
    start: int | None = None  # of a momentum: the number of the "start" of its variable
    frozen: bool = False  # whether it belongs to a variable that is not trainable now
    storage: Storage | None = None  # of codes
    scale: Any = None  # of codes: the variable with their scales

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
        scale = None if self.scale is None else np.asarray(to_numpy(self.scale))
        return Saved(self.role, self.path, array, start, self.frozen, dtype, scale)

    def assign(self, s: "Saved") -> None:
        """Give the state what was saved, rounded to its dtype."""
        values = s.value
        if s.scale is not None:
            if self.scale is not None and s.scale.shape == tuple(self.scale.shape):
                self.variable.assign(s.value)
                self.scale.assign(s.scale)
                return
            values = self.blocks_of(s.scale).numbers([s.value, s.scale])
        if self.storage is not None:
            codes, scale = self.storage.arrays_of(values)
            self.variable.assign(codes)
            self.scale.assign(scale)
            return
        dtype = keras.backend.standardize_dtype(self.variable.dtype)
        is_float = keras.backend.is_float_dtype(dtype)
        self.variable.assign(values if is_float else values.astype(dtype))

    def blocks_of(self, scale: np.ndarray) -> InBlocks:
        """Return how a file keeps this, if it holds codes with such scales."""
        return InBlocks(signed=self.role == SIGNED_MOMENT, by_row=scale.ndim == 2)


class Saved(NamedTuple):
    """One array of a file; role, path and dtype are empty if the file lacks them."""

    role: str
    path: str
    value: np.ndarray
    start: str = ""
    frozen: bool = False
    dtype: str = ""  # of the state variable: a file keeps one in bfloat16 as float32
    scale: np.ndarray | None = None  # of codes

    @property
    def label(self) -> str:
        return _label(self.role, self.path) if self.role else "an array"

    @property
    def arrays(self) -> list["Saved"]:
        """Its arrays in a file: the codes, then their scales."""
        if self.scale is None:
            return [self]
        scale = Saved(_scale_role(self.role), self.path, self.scale, dtype="float32")
        return [self._replace(scale=None), scale]

    def checksum(self) -> int:
        """Return a CRC-32 of the metadata and the values."""
        told = repr((self.role, self.path, self.start, self.frozen, self.dtype, self.value.shape))
        values = np.ascontiguousarray(self.value).reshape(-1).view(np.uint8)
        return zlib.crc32(values.data, zlib.crc32(told.encode()))


def save(store, state: Iterable[Saved]) -> None:
    """Write the state into a Keras store."""
    for i, s in enumerate(x for whole in state for x in whole.arrays):
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
        if not value.dtype.isnative:  # backends take native byte order only
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
    saved = _with_scales(saved, owner)
    other = _other_optimizer(store)
    if other and unmarked:
        raise ValueError(
            f"Optimizer '{owner}': the saved state is that of '{other}', another kind of optimizer, whose arrays mean "
            "something else. No state was loaded."
        )
    return saved


def _with_scales(saved: list[Saved], owner: str) -> list[Saved]:
    """Return what was saved, with each array of codes joined to its scales, which come next."""
    whole: list[Saved] = []
    rest = iter(saved)
    for s in rest:
        if s.role.endswith(SCALE):
            raise ValueError(
                f"Optimizer '{owner}': in the saved state {s.label} must come after its codes. No state was loaded."
            )
        if s.value.dtype == np.uint8 and s.value.shape:
            scale = next(rest, None)
            if scale is None or scale.role != _scale_role(s.role) or scale.path != s.path:
                raise ValueError(
                    f"Optimizer '{owner}': in the saved state {s.label} holds 8-bit codes, after which must come their "
                    f"scales. Received: {'nothing' if scale is None else scale.label}. No state was loaded."
                )
            s = s._replace(scale=scale.value)
        whole.append(s)
    return whole


def is_of_copy(store) -> bool:
    """Whether the store's file holds an optimizer without a model, as `copy.deepcopy` and `pickle` write it.

    The root of the file is the optimizer, or a `LossScaleOptimizer` around it.
    """
    file = getattr(getattr(store, "_h5_entry_group", None), "file", None)
    return file is not None and set(file) <= {"vars", "inner_optimizer"}


def first_other(saved: list[Saved], wanted: list[tuple[str, tuple[int, ...], bool]]) -> str:
    """Return the first difference between the state and the wanted variables; "" if there is none.

    Args:
        saved: The state. It may hold state of other variables that were frozen when it was saved.
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
    """Whether no step was made: the count of iterations and all state of variables are zero."""
    values = (
        s.value if s.scale is None else s.scale for s in saved if s.path or s.role == "iteration"
    )
    return not any(x.any() for x in values)


def match(
    saved: list[Saved], entries: list[Entry], owner: str, by_name: bool = False
) -> list[tuple[Entry, Saved]]:
    """Pair the state with what was saved; raise a ValueError that names the first difference.

    With `by_name`, names decide even if Keras numbered them; such names depend on the session.
    """
    roles = {e.role for e in entries}
    saved = [s for s in saved if s.role in roles or not s.role.startswith(MAY_LEAVE)]
    pairs = _match_names(saved, entries, owner, by_name) or _match_positions(saved, entries, owner)
    check(pairs, owner)
    # In another dtype, the compensation has another scale, and the variable was rounded anew: start from zero.
    return [
        (e, _zeros(e)) if e.role == "compensation" and _other_half(e, s) else (e, s)
        for e, s in pairs
    ]


def check(pairs: list[tuple[Entry, Saved]], owner: str) -> None:
    """Raise a ValueError if an array does not fit the state variable that it is for.

    A float of any width fits a float; a count fits a count only.
    """
    for entry, s in pairs:
        if s.value.shape != tuple(entry.variable.shape):
            raise ValueError(
                f"Optimizer '{owner}': {entry.label} has shape {tuple(entry.variable.shape)}, but the saved "
                f"array has shape {s.value.shape}. No state was loaded."
            )
        dtype = keras.backend.standardize_dtype(entry.variable.dtype)
        if s.scale is not None:
            _check_scale(entry, s, s.scale, owner)
        elif dtype == "uint8" and entry.storage is None:  # codes alone, as `set_weights` takes them
            if s.value.dtype != np.uint8:
                raise ValueError(
                    f"Optimizer '{owner}': {entry.label} holds 8-bit codes, but the array is of dtype {s.value.dtype}. "
                    "No state was loaded."
                )
        elif not keras.backend.is_float_dtype(dtype) and entry.storage is None:
            whole_number(s, owner, entry.label, dtype)
        elif not s.value.dtype.name.startswith(("float", "bfloat")):
            raise ValueError(
                f"Optimizer '{owner}': {entry.label} is of dtype {dtype}, but the saved array is of dtype "
                f"{s.value.dtype}. No state was loaded."
            )


def _check_scale(entry: Entry, s: Saved, scale: np.ndarray, owner: str) -> None:
    """Raise a ValueError if the codes are not a moment's, or the scales do not fit them."""
    needed = entry.blocks_of(scale).specs(entry.role, s.value.shape)[1].shape
    if entry.role not in MOMENTS or not s.value.shape or scale.shape != needed:
        raise ValueError(
            f"Optimizer '{owner}': the scales of {entry.label}, which is saved in 8 bits, must be of shape {needed} "
            f"for codes of shape {s.value.shape}. Received: shape {scale.shape}. No state was loaded."
        )
    if scale.dtype.kind != "f":
        raise ValueError(
            f"Optimizer '{owner}': the scales of {entry.label} must be floats. Received: dtype {scale.dtype}. No state "
            "was loaded."
        )


def whole_number(s: Saved, owner: str, label: str, dtype: str) -> int:
    """Return the count that an array holds; raise a ValueError if it holds none, or one outside of `dtype`."""
    value, most = s.value, int(np.iinfo(dtype).max)
    is_number = value.shape == () and value.dtype.name.startswith(("int", "uint", "float"))
    # Compare as integers: beside a float of NumPy, `most` would be rounded up to a float.
    number = int(value) if is_number and np.isfinite(value) else -1
    if not 0 <= number <= most or value != number:
        shown = value.item() if value.shape == () else f"an array of shape {value.shape}"
        raise ValueError(
            f"Optimizer '{owner}': {label} must be a whole number from 0 to {most}. Received: {shown!r}. No state was "
            "loaded."
        )
    return number


def is_beginning(saved: list[Saved]) -> bool:
    """Whether this is the state of an optimizer that was not built.

    Such state is a count of iterations of zero, and the learning rate if that is a number.
    """
    roles = [s.role for s in saved]
    return (
        roles in (["iteration"], ["iteration", "learning_rate"], [""], ["", ""])
        and all(s.value.shape == () for s in saved)
        and saved[0].value == 0
    )


def _other_half(entry: Entry, s: Saved) -> bool:
    # Older files lack the dtype. They hold bfloat16 as float32, and float16 as it is.
    kept = s.dtype or ("float16" if s.value.dtype == "float16" else "bfloat16")
    return kept != keras.backend.standardize_dtype(entry.variable.dtype)


def _are_alike(saved: list[Saved], entries: list[Entry]) -> bool:
    """Whether both are the same, in the same order, except for numbers at the end of names."""

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
        entry.assign(s)


def _match_names(saved: list[Saved], entries: list[Entry], owner: str, by_name: bool):
    """Pair by role and path; return None if the file lacks these, or they do not match."""
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
        return None  # a model rebuilt after another one has names with higher numbers
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
        if name != rate and name not in files and not name[0].startswith(MAY_LACK):
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
        if entry[:2] in files or entry.role.startswith(MAY_LACK)
    ]


def _zeros(entry: Entry) -> Saved:
    return Saved(entry.role, entry.path, np.zeros(tuple(entry.variable.shape), "float32"))


def _match_positions(saved: list[Saved], entries: list[Entry], owner: str):
    lacking: list[tuple[Entry, Saved]] = []
    if len(saved) < len(entries):
        told = {s.role for s in saved}
        without = [e for e in entries if e.role.startswith(MAY_LACK) and e.role not in told]
        lacking = [(entry, _zeros(entry)) for entry in without]
        left = set(map(id, without))
        entries = [entry for entry in entries if id(entry) not in left]
    # Only the learning rate can be a scalar at index 1. It is there unless it was a schedule, so that a file may have
    # one array more or less.
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


def _scale_role(role: str) -> str:
    return role + SCALE if role else ""


def _label(role: str, path: str) -> str:
    return f"{role} of '{path}'" if path else role


def _attributes(store, key: str):
    # Keras's stores have no public place for an array's attributes; HDF5 itself does.
    group = getattr(store, "_h5_entry_group", None)
    return group[key].attrs if group is not None and hasattr(group, "attrs") else None


def _other_optimizer(store) -> str:
    """Return the name of the optimizer whose state this is, if Keras gives that name to another kind of optimizer."""
    name = str(getattr(getattr(store, "_h5_entry_group", None), "attrs", {}).get("name", ""))
    kind = re.sub(r"_\d+$", "", name).lower()  # Keras 3.10 calls one 'SGD'
    return name if kind in _OTHER_KINDS else ""


def _read_attributes(store, key: str) -> dict[str, Any]:
    """Return the attributes of an array; if the store has several files, open the one that holds the array."""
    for name in getattr(store, "current_shard_filenames", []):
        if key in store._h5_entry_group:
            break
        store._switch_h5_file(name, mode="r")
    told = dict(_attributes(store, key) or {})
    if hasattr(store, "_restore_h5_file"):
        store._restore_h5_file()
    return told
