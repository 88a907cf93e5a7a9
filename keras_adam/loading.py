"""Saving and loading of state: all of it, or none. State that is loaded before `build` waits for it."""

import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_adam import checkpoint
from keras_adam.checkpoint import Entry, Saved
from keras_adam.groups import ParamGroup
from keras_adam.paths import path_of
from keras_adam.storage import MOMENTS

_OF_LATE_VARIABLES = "start"
_OF_GROUPS = "hyperparameters"


class Loading:
    """Saves and loads the state of one optimizer."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self._pending: list[Saved] | None = None
        self._is_copy = False  # whether the pending state came with this optimizer, which is a copy
        self._before_pending: list[
            Any
        ] = []  # values of the scalars before the pending state was loaded
        self._changes: dict[
            ParamGroup, int
        ] = {}  # how often each group was set when that was loaded

    def save(self, store) -> None:
        """Write the state into a store of `keras.saving`."""
        state = (entry.saved(self._optimizer._engine.whole) for entry in self._entries_in_order())
        if self._pending is None:
            checkpoint.save(store, state)
            return
        # The pending state is the state, except for the scalars, which may have been set since.
        scalars = {s.role: s for s in state}
        checkpoint.save(store, [scalars.get(s.role, s) for s in self._pending])

    def load(self, store) -> None:
        """Read the state from a store of `keras.saving`."""
        optimizer = self._optimizer
        saved = checkpoint.read(store, optimizer.name)
        if not saved:
            warnings.warn(
                f"No state of optimizer '{optimizer.name}' was saved there. The state that it has stays.",
                stacklevel=3,
            )
        elif optimizer._parameters:
            self._load(saved)
        else:
            before = [ops.convert_to_numpy(v) for v in optimizer.variables]
            self._load_scalars(saved)
            if self._pending is None:
                self._before_pending = before
            self._pending = None if checkpoint.is_beginning(saved) else saved
            # State without paths, as from Keras's Adam, is matched by order.
            self._is_copy = any(s.path for s in saved) and checkpoint.is_of_copy(store)
            self._changes = {g: g.changes for g in optimizer._groups}

    def check_copy(self, variables) -> None:
        """Raise a ValueError if this is a copy with other variables' state; an unused copy drops its state."""
        if not self._is_copy:
            return
        optimizer, saved = self._optimizer, self._pending or []
        wanted = [
            (path_of(v), tuple(v.shape), not optimizer._overwrite_variable_with_gradient(v))
            for v in variables
        ]
        other = checkpoint.first_other(saved, wanted)
        if other and not checkpoint.is_unused(saved):
            raise ValueError(
                f"Optimizer '{optimizer.name}' is a copy, made by `copy.deepcopy`, `pickle` or the like, and holds the "
                "state of its original's variables: it must be built for these, which it knows by path and shape. "
                f"{optimizer._own_optimizer()} Received: {len(variables)} variables, the first are "
                f"{[path for path, _, _ in wanted[:2]]}; the state holds {other}"
            )
        if other:
            self._pending, self._is_copy = None, False

    def load_pending(self) -> None:
        """Assign the pending state, except numbers that were set since it was loaded."""
        if self._pending is None:
            return
        saved, self._pending = self._pending, None
        is_copy, self._is_copy = self._is_copy, False
        optimizer, rate = self._optimizer, self._optimizer._learning_rate
        changed = [g for g in optimizer._groups if g.changes != self._changes.get(g)]
        set_since = {g: g.current_numbers() for g in changed}
        rate = ops.copy(rate) if isinstance(rate, keras.Variable) else None
        try:
            self._load(saved, by_name=is_copy)
        except ValueError as error:
            for variable, value in zip(optimizer.variables, self._before_pending, strict=False):
                variable.assign(value)
            raise ValueError(f"What was loaded before the optimizer was built: {error}") from None
        if rate is not None:
            optimizer._learning_rate.assign(rate)
        for group, numbers in set_since.items():
            group.store_numbers(numbers)

    def set_weights(self, weights) -> None:
        """Set all state variables, in the order of `optimizer.variables`, from arrays or variables."""
        optimizer = self._optimizer
        if not optimizer._parameters:
            raise ValueError(
                "You are calling `set_weights()` on an optimizer that has not yet been built. Call "
                "`optimizer.build(trainable_variables)` first."
            )
        arrays = [np.asarray(optimizer._engine.whole(w)) for w in weights]
        entries = self._entries()
        if len(arrays) != len(entries):
            raise ValueError(
                f"`weights` must hold one array for each of the {len(entries)} state variables. "
                f"Received: {len(arrays)} arrays"
            )
        saved = []
        for array, entry in zip(arrays, entries, strict=True):
            # Accept whole numbers for floats, as Python does.
            is_float = keras.backend.is_float_dtype(entry.variable.dtype)
            widen = is_float and array.dtype.kind in "iu"
            saved.append(Saved("", "", array.astype("float64") if widen else array))
        self._assign(checkpoint.match(saved, entries, optimizer.name))

    def check_joined(self, updates: list[int]) -> None:
        """Raise if a step was compiled for other variables joining together, which would not notice the change.

        `updates` holds the update at which each variable is to have joined.
        """
        parameters = self._optimizer._parameters
        of_each = parameters.joined_at(updates)[1]
        if self._optimizer._trace.is_traced and of_each != parameters.joinings_of():
            raise ValueError(
                f"Optimizer '{self._optimizer.name}': in what is loaded other variables joined late than in the train "
                "step that was compiled. Load it before the first step, or into a model compiled anew with a new "
                "optimizer. No state was loaded."
            )

    def set_joined(self, updates: list[int]) -> None:
        """Set the update at which each variable joined; 0 is the beginning."""
        self._optimizer._parameters.set_joined(updates)
        self._optimizer._engine.forget()

    def _load(self, saved: list[Saved], by_name: bool = False) -> None:
        """Assign what was saved; marks on the momenta say when each variable joined."""
        optimizer = self._optimizer
        if checkpoint.is_beginning(saved):
            self._load_beginning(saved)
            return
        starts = self._starts_in(saved)
        saved = [s for s in saved if not s.role.startswith(_OF_LATE_VARIABLES)]
        entries = [e for e in self._entries_in_order() if not e.role.startswith(_OF_LATE_VARIABLES)]
        if not any(s.role.startswith(_OF_GROUPS) for s in saved):
            without = [e for e in entries if not e.role.startswith(_OF_GROUPS)]
            # A store without roles (only HDF5 has them) holds the groups' numbers if it has enough arrays.
            if any(s.role for s in saved) or len(saved) <= len(without):
                entries = without
        pairs = checkpoint.match(saved, entries, optimizer.name, by_name)
        joined = {}
        for entry, s in pairs:
            if not s.start:
                continue
            if f"start_{s.start}" not in starts:
                raise ValueError(
                    f"Optimizer '{optimizer.name}': the saved state lacks start_{s.start}, which tells at which update "
                    f"'{entry.path}' joined. No state was loaded."
                )
            joined[id(entry.variable)] = starts[f"start_{s.start}"]
        momenta = optimizer._parameters.first_arrays("momentum")
        updates = [joined.get(id(m), 0) for m in momenta]
        self.check_joined(updates)
        self._assign(pairs)
        self.set_joined(updates)

    def _starts_in(self, saved: list[Saved]) -> dict[str, int]:
        """Return the updates at which variables joined, by role; one to which no momentum refers is refused."""
        optimizer = self._optimizer
        dtype = keras.backend.standardize_dtype(optimizer._iterations.dtype)
        starts = {
            s.role: checkpoint.whole_number(s, optimizer.name, s.role, dtype)
            for s in saved
            if s.role.startswith(_OF_LATE_VARIABLES)
        }
        marks = {f"start_{s.start}" for s in saved if s.start}
        unmarked = next((role for role, at in starts.items() if at and role not in marks), None)
        if unmarked:
            raise ValueError(
                f"Optimizer '{optimizer.name}': the saved state holds {unmarked}, at which a variable joined, but no "
                "momentum that is marked with it. No state was loaded."
            )
        return starts

    def _load_scalars(self, saved: list[Saved]) -> None:
        """Assign the scalars that exist before `build`: the count of iterations and the learning rate."""
        optimizer = self._optimizer
        known = {"iteration": optimizer._iterations, "learning_rate": optimizer._learning_rate}
        pairs = []
        for (role, variable), s in zip(known.items(), saved, strict=False):
            named = next((x for x in saved if x.role == role), None) if s.role else s
            if isinstance(variable, keras.Variable) and named is not None and not named.value.shape:
                pairs.append((Entry(role, "", variable), named))
        checkpoint.check(pairs, optimizer.name)
        checkpoint.assign(pairs)

    def _load_beginning(self, saved: list[Saved]) -> None:
        """Take over the state of an optimizer that was not built: no moments, and no late variables."""
        optimizer = self._optimizer
        updates = [0] * len(optimizer._parameters)
        self.check_joined(updates)
        self._load_scalars(saved)
        optimizer._parameters.reset()
        if optimizer.skipped_steps is not None:
            optimizer.skipped_steps.assign(0)
        if optimizer._recent_norms is not None:
            optimizer._recent_norms.assign(ops.zeros_like(optimizer._recent_norms))
        if optimizer._monitor is not None:
            optimizer._monitor.reset()
        self.set_joined(updates)

    def _assign(self, pairs) -> None:
        """Assign the saved state; groups keep their own numbers where it holds none."""
        checkpoint.assign(pairs)
        for group in self._optimizer._groups:
            group.renew_numbers()

    def _entries(self) -> list[Entry]:
        """Describe each state variable, codes and scales apart, in the order of `optimizer.variables`."""
        apart = [e._replace(storage=None, scale=None) for e in self._described()]
        return self._with_others(apart)

    def _with_others(self, described: list[Entry]) -> list[Entry]:
        """Return entries in the order of `optimizer.variables`, with an entry for what is not described."""
        known = {id(e.variable): e for e in described}
        return [known.get(id(v), Entry("other", "", v)) for v in self._optimizer.variables]

    def _entries_in_order(self) -> list[Entry]:
        """Describe each state variable, in the order in which an optimizer built anew would make them.

        The state of a group that was added comes after all else in `optimizer.variables`. A store without roles is read
        by order, which must not depend on when groups were added.
        """
        described = self._described()
        place = {id(e.variable): i for i, e in enumerate(described) if e.role not in self._added()}
        scales = {id(e.scale) for e in described if e.scale is not None}  # with their codes
        entries = [e for e in self._with_others(described) if id(e.variable) not in scales]
        return sorted(entries, key=lambda e: place.get(id(e.variable), len(described)))

    def _added(self) -> set[str]:
        """Return the roles of the scalars that stay where they were added."""
        starts = range(len(self._optimizer._parameters.joinings))
        return {"skipped_steps", "recent_norms", *(f"{_OF_LATE_VARIABLES}_{i}" for i in starts)}

    def _described(self) -> list[Entry]:
        """Describe each state variable that is known here; those that `build` makes come first, in its order."""
        optimizer, parameters = self._optimizer, self._optimizer._parameters
        default = optimizer._default_group
        described = [
            Entry("iteration", "", optimizer._iterations),
            Entry("learning_rate", "", optimizer._learning_rate),
        ]
        starts = dict(zip(map(id, parameters), parameters.joinings_of(), strict=True))
        for p, role, array in parameters.in_build_order():
            start = starts[id(p)] if role == "momentum" else None
            frozen = not p.variable.trainable
            entry = Entry(role, path_of(p.variable), array, start, frozen)
            if role in MOMENTS and p.scales(role):
                slot = getattr(p, role)
                entry = entry._replace(storage=slot.storage, scale=slot.arrays[1])
            described.append(entry)
        numbers = {g: f"{_OF_GROUPS}_{i}" for i, g in enumerate(optimizer._selecting_groups())}
        for group in optimizer._groups:
            role = _OF_GROUPS if group is default else numbers[group]
            described.append(Entry(role, "", group.stored))
        if optimizer.skipped_steps is not None:
            described.append(Entry("skipped_steps", "", optimizer.skipped_steps))
        if optimizer._recent_norms is not None:
            described.append(Entry("recent_norms", "", optimizer._recent_norms))
        if optimizer._monitor is not None:
            named = optimizer._monitor.described(optimizer._groups)
            described += [Entry(role, "", variable) for role, variable in named]
        described += [
            Entry(f"{_OF_LATE_VARIABLES}_{i}", "", joining.update)
            for i, joining in enumerate(parameters.joinings)
        ]
        return described
