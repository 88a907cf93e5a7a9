"""What the optimizer knows of each variable: one record, made, added to and put in order here alone."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from keras import ops

from keras_adam.groups import ParamGroup
from keras_adam.storage import Spec, Storage

# The order in which slots are made: first the averages of all variables, then their accumulators, then variable by
# variable both moments, and so on. Keras's Adam makes its state in this order.
_BUILD_ORDER = (
    ("average",),
    ("accumulator",),
    ("momentum", "velocity"),
    ("velocity_hat",),
    ("value",),
)
_ROLES = {"accumulator": "gradient_accumulator"}  # in files, where it is not the slot's name

# A new variable, its group, and the storage of each of its slots.
Plan = tuple[Any, ParamGroup, dict[str, Storage]]


@dataclass(eq=False)
class Slot:
    """A number per element of a variable: how it is kept, and the state variables that hold it."""

    storage: Storage
    arrays: tuple[Any, ...]

    def read(self, take: Callable[[Any], Any], dtype: str) -> Any:
        """Return the numbers in `dtype`; `take` gives an array's value, or some of its rows."""
        return self.storage.read([take(array) for array in self.arrays], dtype)

    def write(self, put: Callable[[Any, Any], None], value: Any, dither: Any) -> None:
        """Keep the numbers; `put` assigns to an array, or to some of its rows."""
        for array, part in zip(self.arrays, self.storage.write(value, dither), strict=True):
            put(array, part)

    def numbers(self, to_host: Callable[[Any], np.ndarray]) -> np.ndarray:
        """Return what a moment is; `to_host` gives an array's value."""
        arrays = [to_host(array) for array in self.arrays]
        return self.storage.numbers(arrays) if len(arrays) > 1 else arrays[0]

    def set_numbers(self, values: np.ndarray) -> None:
        """Let a moment be these numbers, rounded to nearest."""
        parts = self.storage.arrays_of(values) if len(self.arrays) > 1 else [values]
        for array, part in zip(self.arrays, parts, strict=True):
            array.assign(part)


@dataclass(eq=False)
class Joining:
    """When some late variables joined."""

    update: Any  # a scalar state variable: how many updates there had been


@dataclass(eq=False)
class Parameter:
    """A variable, its group, when it joined, and its state.

    A slot is None if the variable has no such state. A variable that is overwritten with its gradient has no moments.
    """

    variable: Any
    group: ParamGroup
    value: Slot  # the variable itself, with its compensation where it has one
    joined: Joining | None = None  # None: at the beginning
    momentum: Slot | None = None
    velocity: Slot | None = None
    velocity_hat: Slot | None = None
    average: Slot | None = None
    accumulator: Slot | None = None

    def had_steps(self, updates: Any) -> bool:
        """Whether there were updates since it joined late; `updates` is the number of all updates so far."""
        if self.joined is None:
            return False
        joined, now = map(ops.convert_to_numpy, (self.joined.update, updates))
        return bool(joined < now)

    @property
    def here(self) -> Any:
        """What this process updates: the variable, or a part of it."""
        return self.value.arrays[0]

    @property
    def updated(self) -> list[Slot]:
        """The slots that a step changes: the value and the existing moments, in the order of `rule.Moments`."""
        slots = (self.value, self.momentum, self.velocity, self.velocity_hat)
        return [slot for slot in slots if slot is not None]

    def array(self, name: str) -> Any:
        """Return a slot's first state variable, or None; a model's variable itself, or its part, does not count."""
        slot = getattr(self, name)
        arrays = () if slot is None else slot.arrays[name == "value" :]
        return arrays[0] if arrays else None

    def scales(self, name: str) -> tuple[Any, ...]:
        """Return the state variable with the scales of a moment that is kept in blocks, if it is."""
        slot = getattr(self, name)
        return () if slot is None else slot.arrays[1:]

    def state(self, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        """Give the state variables of the slots named, each with its role in files."""
        for name in names:
            slot = getattr(self, name)
            if slot is not None:
                specs = slot.storage.specs(_ROLES.get(name, name), tuple(self.variable.shape))
                arrays = slot.arrays[len(slot.arrays) - len(specs) :]
                yield from ((spec.role, array) for spec, array in zip(specs, arrays, strict=True))


@dataclass(eq=False)
class Parameters:
    """All records: those of the last `build` first, in its order.

    Args:
        key_of: Function that tells variables apart.
        add: Function `(variable or part of one, spec) -> state variable` that makes state.
        add_start: Function `(number, update) -> state variable` that makes the scalar of late variables.
    """

    key_of: Callable[[Any], Any]
    add: Callable[[Any, Spec], Any]
    add_start: Callable[[int, int], Any]
    records: list[Parameter] = field(default_factory=list)
    joinings: list[Joining] = field(default_factory=list)
    _index: dict[Any, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self.records)

    def __contains__(self, variable: Any) -> bool:
        return self.key_of(variable) in self._index

    def __getitem__(self, variable: Any) -> Parameter:
        return self.records[self._index[self.key_of(variable)]]

    def index(self, variable: Any) -> int:
        """Return the place of a variable's record."""
        return self._index[self.key_of(variable)]

    @property
    def variables(self) -> list[Any]:
        return [p.variable for p in self.records]

    def create(self, plans: list[Plan], parts: list[Any], update: int) -> None:
        """Make records of new variables.

        Args:
            plans: What each is to have.
            parts: What is updated here of each: the variable itself, or a part of it.
            update: When they join, 0 being the beginning.
        """
        new = []
        for (variable, group, plan), part in zip(plans, parts, strict=True):
            new.append(Parameter(variable, group, Slot(plan["value"], (part,))))
            group.variables.append(variable)
        late = [p for p, (_, _, plan) in zip(new, plans, strict=True) if "momentum" in plan]
        if update and late:
            joined = self._new_joining(update)
            for p in late:
                p.joined = joined
        for names in _BUILD_ORDER:
            for p, part, (_, _, plan) in zip(new, parts, plans, strict=True):
                for name in names:
                    if name in plan:
                        role, shape = _ROLES.get(name, name), tuple(part.shape)
                        made = [self.add(part, x) for x in plan[name].specs(role, shape)]
                        itself = (part,) if name == "value" else ()
                        setattr(p, name, Slot(plan[name], (*itself, *made)))
        self.records = [*self.records, *new]
        self._reindex()

    def put_first(self, variables: list[Any]) -> None:
        """Put the records of `variables` first, in this order, in which Keras's JAX trainer passes values."""
        first = {self.key_of(v): self[v] for v in variables}
        rest = [p for p in self.records if self.key_of(p.variable) not in first]
        self.records = [*first.values(), *rest]
        self._reindex()

    def in_build_order(self) -> Iterator[tuple[Parameter, str, Any]]:
        """Yield each state variable with its record and role, in the order of an optimizer that is built anew."""
        for names in _BUILD_ORDER:
            for p in self.records:
                yield from ((p, role, array) for role, array in p.state(names))

    def first_arrays(self, name: str) -> list[Any]:
        """Return one slot's first state variable of each record; None where a record has none."""
        return [p.array(name) for p in self.records]

    # Late variables

    def joined_at(self, updates: list[int]) -> tuple[list[int], list[int | None]]:
        """Return the updates at which variables join late, and each record's place among these.

        `updates` holds the update at which each record joined. It does not matter for a record without moments.
        """
        of_each = [u if p.momentum else 0 for u, p in zip(updates, self.records, strict=True)]
        values = sorted(set(of_each) - {0})
        return values, [values.index(u) if u else None for u in of_each]

    def joinings_of(self) -> list[int | None]:
        """Return each record's place in `joinings`, or None."""
        places = {joining: i for i, joining in enumerate(self.joinings)}
        return [None if p.joined is None else places[p.joined] for p in self.records]

    def set_joined(self, updates: list[int]) -> None:
        """Set the update at which each record joined; 0 is the beginning."""
        values, of_each = self.joined_at(updates)
        while len(self.joinings) < len(values):
            self._new_joining(0)
        unused = [0] * (len(self.joinings) - len(values))
        for joining, value in zip(self.joinings, [*values, *unused], strict=True):
            joining.update.assign(value)
        for p, i in zip(self.records, of_each, strict=True):
            p.joined = None if i is None else self.joinings[i]

    def reset(self) -> None:
        """Set all state of all variables to zero."""
        for _, _, array in self.in_build_order():
            array.assign(ops.zeros(array.shape, array.dtype))

    def _new_joining(self, update: int) -> Joining:
        self.joinings.append(Joining(self.add_start(len(self.joinings), update)))
        return self.joinings[-1]

    def _reindex(self) -> None:
        self._index = {self.key_of(p.variable): i for i, p in enumerate(self.records)}
