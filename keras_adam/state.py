"""The state: which variables the optimizer knows, what it keeps of each, how that is saved and loaded."""

import contextlib
import math
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_adam import checkpoint, groups, seams
from keras_adam.groups import ParamGroup
from keras_adam.paths import path_of
from keras_adam.rule import Moments

# Per-variable state: attribute, role in files.
_ROLES = {
    "_model_variables_moving_average": "average",
    "_accumulated_gradients": "gradient_accumulator",
    "_momentums": "momentum",
    "_velocities": "velocity",
    "_velocity_hats": "velocity_hat",
    "_compensations": "compensation",
}
_ATTRIBUTES = {role: attribute for attribute, role in _ROLES.items()}
# In the order in which Keras's Adam makes it: both moments of one variable before those of the next.
_BUILD_ORDER = (
    ("average",),
    ("gradient_accumulator",),
    ("momentum", "velocity"),
    ("velocity_hat",),
    ("compensation",),
)
_ALWAYS = ("momentum", "velocity")
HALF = ("bfloat16", "float16")
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


class State(keras.optimizers.Optimizer):
    """Variables, their groups, and their state; all lists are in the order of `self._known`."""

    built: bool
    iterations: Any

    # Set past Keras's tracking, which would take the model's variables among them for state of the optimizer.
    _groups: list[ParamGroup]
    _default_group: ParamGroup
    _known: list[Any]  # every variable that has state; those of the last `build` come first
    _group_of: list[ParamGroup]
    _start_of: list[int | None]  # which of `_starts` tells when it joined; None: at the beginning
    _starts: list[Any]
    _pending_groups: list[ParamGroup]
    _pending_state: list[checkpoint.Saved] | None
    _pending_is_copy: bool  # whether that came with this optimizer, which is a copy
    _pending_changes: dict[ParamGroup, int]
    _before_pending: list[Any]  # values of what there was without variables
    _traced: bool
    _traced_rate: Any
    _bucket_cache: dict[tuple[int, ...], list[Any]]
    _checked_lists: set[tuple[int, ...]]
    _has_groups: bool
    lazy: bool
    state_dtype: str | None
    kahan_sum: bool | None
    skip_nonfinite: bool
    shard_state: bool
    _skipped_steps: Any
    _in_step: list[Any]  # the variables of the present call of `apply`
    _slot_dtype: str | None  # of the state variable that is being made, if not its variable's

    def _init_groups(self, numeric, options, param_groups) -> None:
        """Set up what Keras's constructor does not know, before it runs."""
        default = ParamGroup(self, numeric, options)
        self.__dict__.update(
            _default_group=default,
            _has_groups=param_groups is not None,
            _pending_groups=[],  # added after `build`, to be resolved by the next one
            _known=[],
            _group_of=[],
            _start_of=[],
            _starts=[],
            _pending_state=None,
            _pending_is_copy=False,
            _before_pending=[],
            _pending_changes={},  # how often each group's numbers were set when that was loaded
            _bucket_cache={},
            _checked_lists=set(),  # of variables, by identity, that are known not to hold an unknown one
            _in_step=[],
            _slot_dtype=None,
            _traced=False,  # whether a compiled step has been made, with today's options as its constants
            _traced_rate=None,  # the schedule or callable that the last one made holds as its learning rate
        )
        if param_groups is not None and not isinstance(param_groups, list | tuple):
            raise TypeError(
                f"`param_groups` must be a list of dictionaries. Received: param_groups={param_groups!r}"
            )
        parsed = [
            groups.parse(self, f"param_groups[{i}]", spec, default)
            for i, spec in enumerate(param_groups or [])
        ]
        self.__dict__["_groups"] = [*parsed, default]

    @property
    def param_groups(self) -> groups.ParamGroups:
        """The parameter groups, for reading, and for setting numbers: in the order given, then the default group.

        A group that `add_param_group` adds to a built optimizer comes last, as in PyTorch.
        """
        return groups.ParamGroups(self._groups)

    @param_groups.setter
    def param_groups(self, value):
        self.param_groups.refuse_change(value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of variables, before or after `build`; in the middle of training, too.

        New variables start at their own step 1; the state of the others stays as it is. Compile the model again
        before the next `fit`, so that its train function learns of them. Inside a `LossScaleOptimizer` of your own,
        call its `build(model.trainable_variables)` too.

        Args:
            param_group: Dictionary as in the constructor's `param_groups`. Once the optimizer is built, the variables
                that its selector names must be new to it; a regular expression or predicate is resolved when the
                optimizer is next built, which the next `fit` does.

        Raises:
            ValueError: If an option is unknown or out of range, a variable has a group already, or nothing is
                selected.
        """
        group = groups.parse(self, "param_group", param_group, self._default_group)
        named = groups.named_variables(group.selector) if self._known else None
        if named is not None:
            _check_trainable(named)
            for variable in named:
                if self._is_known(variable):
                    raise ValueError(
                        f"`param_group` must hold new variables. Received: '{path_of(variable)}', which the "
                        "optimizer knows already; set the numbers of its group in `optimizer.param_groups` instead"
                    )
            if not named:
                raise ValueError(
                    "`param_group` selects no variable; a layer must be trainable first. "
                    f"Received: params={group.selector!r}"
                )
        self.__dict__["_has_groups"] = True
        if not self._known:
            self._groups.insert(self._groups.index(self._default_group), group)
            return
        self._groups.append(group)
        if named is None:
            self._pending_groups.append(group)
        else:
            self._create_state(named, [group] * len(named))
            self.__dict__["_trainable_variables"] = [*self._trainable_variables, *named]
        self.built = False  # so that the next `fit` builds again, and tells the order of the model's variables

    def _slots(self, attribute: str) -> list[Any]:
        """Return one kind of per-variable state; None stands where a variable has none."""
        return getattr(self, attribute, None) or [None] * len(self._known)

    def _extend_slots(self, attribute: str, slots) -> None:
        # Set as a whole: TensorFlow's checkpoints track the list that was assigned, not what is appended to it later.
        old = getattr(self, attribute, None) or [None] * (len(self._known) - len(slots))
        setattr(self, attribute, [*old, *slots])

    # ---------------------------------------------------------------------------------------------------------------
    # Building

    def build(self, variables) -> None:
        """Create the state of `variables`, a list of `keras.Variable`.

        Called again, it puts the variables in the order given, creates the state of those that a group added since
        then selects, and leaves all other state as it is.

        Raises:
            ValueError: If a parameter group selects no variable, a variable stands twice or is not of a floating
                dtype, or, in a later call, no group was added for a new variable.
        """
        with seams.without_autocast():
            self._build(list(variables))

    def _build(self, variables) -> None:
        if self.built and list(map(id, variables)) == list(map(id, self._trainable_variables)):
            return
        new = [v for v in variables if not self._is_known(v)]
        _check_trainable(variables)
        if self._pending_is_copy:
            self._check_copied_state(variables)
        if self._known:
            self._build_more(new)
        else:
            chosen = groups.assign(self._selecting_groups(), self._default_group, variables)
            self._create_state(variables, chosen)
        self._reorder(variables)
        # Built for no variable, as when all are frozen, it is not built: the next `fit` builds it for what is trained.
        self.built = bool(self._known)
        if self._pending_state is not None:
            with self._outside_graph():
                self._load_pending()

    def _check_copied_state(self, variables) -> None:
        """Raise a ValueError if this is a copy with other variables' state; an unused one becomes as good as new."""
        saved = self._pending_state or []
        wanted = [
            (path_of(v), tuple(v.shape), not self._overwrite_variable_with_gradient(v))
            for v in variables
        ]
        other = checkpoint.first_other(saved, wanted)
        if other and not checkpoint.is_unused(saved):
            raise ValueError(
                f"Optimizer '{self.name}' is a copy, made by `copy.deepcopy`, `pickle` or the like, and holds the "
                "state of its original's variables: it must be built for these, which it knows by path and shape. "
                f"{self._own_optimizer()} Received: {len(variables)} variables, the first are "
                f"{[path for path, _, _ in wanted[:2]]}; the state holds {other}"
            )
        if other:
            self.__dict__.update(_pending_state=None, _pending_is_copy=False)

    def _selecting_groups(self) -> list[ParamGroup]:
        return [g for g in self._groups if g is not self._default_group]

    def _build_more(self, new) -> None:
        pending = list(self._pending_groups)
        unselected = [v for v in new if not any(groups.selects(g.selector, v) for g in pending)]
        if unselected and not pending:
            raise ValueError(self._unknown(unselected[0]))
        self._pending_groups.clear()
        if pending:
            try:
                chosen = groups.assign(pending, self._default_group, new)
            except ValueError:
                # They can be added again, corrected.
                self._groups[:] = [g for g in self._groups if all(g is not p for p in pending)]
                raise
            if unselected:
                raise ValueError(self._unknown(unselected[0]))
            self._create_state(new, chosen)

    def _create_state(self, variables, chosen: list[ParamGroup]) -> None:
        first = len(self._known)
        for variable, group in zip(variables, chosen, strict=True):
            self._trainable_variables_indices[self._var_key(variable)] = len(self._known)
            self._known.append(variable)
            self._group_of.append(group)
            group.variables.append(variable)
        with self._outside_graph():
            joined = int(ops.convert_to_numpy(self.iterations)) if first else 0
        has_moments = [not self._overwrite_variable_with_gradient(v) for v in variables]
        start = self._add_start(joined) if joined and any(has_moments) else None
        self._start_of.extend(start if has else None for has in has_moments)
        wanted = [self._dtypes_of(v, group) for v, group in zip(variables, chosen, strict=True)]
        for roles in _BUILD_ORDER:
            made = [
                [self._add_slot(v, role, dtypes.get(role)) for role in roles]
                for v, dtypes in zip(variables, wanted, strict=True)
            ]
            for i, role in enumerate(roles):
                slots = [of_variable[i] for of_variable in made]
                attribute = _ATTRIBUTES[role]
                if role in _ALWAYS or hasattr(self, attribute) or any(s is not None for s in slots):
                    self._extend_slots(attribute, slots)
        self._store_numbers()
        self._count_skipped_steps()

    def _count_skipped_steps(self) -> None:
        """Add the count of skipped steps, if steps may be skipped."""
        if self.skip_nonfinite and self._known and self._skipped_steps is None:
            self._skipped_steps = self.add_variable(
                (), "zeros", dtype="int", aggregation="only_first_replica", name="skipped_steps"
            )

    @property
    def skipped_steps(self):
        """The number of steps that `skip_nonfinite` skipped, a scalar variable; None before `build` and without it."""
        return self._skipped_steps

    def _dtypes_of(self, variable, group: ParamGroup) -> dict[str, str]:
        """Return the dtype of each kind of state that a variable of the group has."""
        wide = compute_dtype(variable.dtype)
        dtypes = {}
        if self.gradient_accumulation_steps:
            # Also for variables that are overwritten with their gradient, which have no other state.
            dtypes["gradient_accumulator"] = wide
        if self._overwrite_variable_with_gradient(variable):
            return dtypes
        if self.use_ema:
            dtypes["average"] = wide
        dtypes["momentum"] = dtypes["velocity"] = self.state_dtype or wide
        if group.options.amsgrad:
            dtypes["velocity_hat"] = self.state_dtype or wide
        own = keras.backend.standardize_dtype(variable.dtype)
        if own in HALF and self.kahan_sum is not False:
            dtypes["compensation"] = own
        return dtypes

    def _add_slot(self, variable, role: str, dtype: str | None):
        if dtype is None:
            return None
        self._slot_dtype = dtype
        try:
            return self.add_variable_from_reference(variable, role)
        finally:
            self._slot_dtype = None

    def state_size(self, variables=None) -> dict[str, int]:
        """Return how many bytes of state each variable has, or would have; `sum(sizes.values())` is that of all.

        Scalars, such as the count of iterations, are not counted.

        Args:
            variables: List of variables, such as `model.trainable_variables`; they need not be known. Defaults to those
                that the optimizer was built with.

        Returns:
            A dictionary from `variable.path` to bytes.

        Raises:
            ValueError: If `variables` is None and the optimizer is not built.

        Examples:
            >>> import keras, keras_adam
            >>> weight = keras.Variable(keras.ops.zeros((10, 10)), name="weight")
            >>> keras_adam.Adam().state_size([weight])
            {'weight': 800}
            >>> keras_adam.Adam(state_dtype="bfloat16").state_size([weight])
            {'weight': 400}
        """
        if variables is None:
            if not self._known:
                raise ValueError(
                    "`state_size` needs `variables`, as the optimizer is not built. Received: variables=None"
                )
            variables = self._known
        sizes = {}
        for variable in variables:
            if self._is_known(variable):
                group = self._group_of[self._trainable_variables_indices[self._var_key(variable)]]
            else:
                group = groups.group_for(variable, self._selecting_groups(), self._default_group)
            bytes_each = sum(_BYTES[dtype] for dtype in self._dtypes_of(variable, group).values())
            sizes[path_of(variable)] = bytes_each * math.prod(variable.shape)
        return sizes

    def _add_start(self, joined: int) -> int:
        """Add the state variable that tells at which update some variables joined; return its index."""
        start = self.add_variable(
            (),
            keras.initializers.Constant(joined),
            dtype="int",
            aggregation="only_first_replica",
            name=f"start_{len(self._starts)}",
        )
        self._starts = [*self._starts, start]
        return len(self._starts) - 1

    def _store_numbers(self) -> None:
        """Keep the groups' numbers in variables, unless there is the default group alone, as in Keras."""
        if not self._has_groups:
            return
        wide = any(compute_dtype(v.dtype) == "float64" for v in self._known)
        for i, group in enumerate(self._groups):
            if group.stored is None:
                group.stored = self.add_variable(
                    (len(groups.NUMERIC),),
                    group.initial_numbers,
                    dtype="float64" if wide else "float32",
                    aggregation="only_first_replica",
                    name=f"hyperparameters_{i}",
                )

    def _reorder(self, variables) -> None:
        """Put `variables` first in all lists: Keras's JAX trainer hands over values in its model's order."""
        keys = [self._var_key(v) for v in variables]
        given = set(keys)
        keys += [k for k in map(self._var_key, self._known) if k not in given]
        order = [self._trainable_variables_indices[k] for k in keys]
        if order != sorted(order):
            for attribute in _ROLES:
                if hasattr(self, attribute):
                    slots = getattr(self, attribute)
                    setattr(self, attribute, [slots[i] for i in order])
            for facts in (self._known, self._group_of, self._start_of):
                facts[:] = [facts[i] for i in order]
        self._trainable_variables_indices.update({k: i for i, k in enumerate(keys)})
        self.__dict__["_trainable_variables"] = list(variables)
        self._bucket_cache.clear()

    def _outside_graph(self):
        """Return a context in which what is done happens once and now, even while a train step is being traced."""
        return contextlib.nullcontext()

    def add_variable(self, shape, initializer="zeros", dtype=None, **kwargs):
        """Add a state variable; one of half precision becomes float32, as a moment in bfloat16 stalls."""
        if self._slot_dtype is not None:
            dtype = self._slot_dtype
            kwargs["layout"] = self._slot_layout(kwargs.get("layout"), shape)
        elif dtype is None or keras.backend.is_float_dtype(dtype):
            dtype = compute_dtype(dtype or keras.config.floatx())
        return super().add_variable(shape, initializer, dtype, **kwargs)

    def _slot_layout(self, layout, shape):
        """Return how a state variable of a variable of `layout` and `shape` is spread over devices."""
        return layout

    def _whole(self, variable):
        """Return a state variable's value, of which this process may hold a part, as one array of NumPy."""
        return ops.convert_to_numpy(variable)

    def _moments_of(self, index: int) -> Moments:
        s = self._slots("_velocity_hats")[index]
        return Moments(self._momentums[index], self._velocities[index], s)

    def _check_variables_are_known(self, variables) -> None:
        for variable in variables:
            if not self._is_known(variable):
                raise ValueError(self._unknown(variable))

    def _is_known(self, variable) -> bool:
        return self._var_key(variable) in self._trainable_variables_indices

    def _unknown(self, variable) -> str:
        return (
            f"Unknown variable: '{path_of(variable)}'. This optimizer was built for {len(self._known)} other "
            f"variables. {self._own_optimizer()} To train more variables with this one, such as those of a layer "
            "that was unfrozen, call `optimizer.add_param_group({'params': layer_or_variables})` first; the state of "
            "the others stays."
        )

    def _own_optimizer(self) -> str:
        """Return the advice for who gives one optimizer to two models."""
        return (
            "If this is another model, give it an optimizer of its own: "
            f"`{type(self).__name__}.from_config(optimizer.get_config())`."
        )

    # ---------------------------------------------------------------------------------------------------------------
    # Saving and loading

    def _entries(self) -> list[checkpoint.Entry]:
        """Describe each state variable, in the order of `self.variables`."""
        described: dict[int, tuple[str, str, int | None]] = {
            id(self._iterations): ("iteration", "", None)
        }
        described[id(self._learning_rate)] = ("learning_rate", "", None)
        for i, start in enumerate(self._starts):
            described[id(start)] = (f"start_{i}", "", None)
        described[id(self._default_group.stored)] = ("hyperparameters", "", None)
        for i, group in enumerate(self._selecting_groups()):
            described[id(group.stored)] = (f"hyperparameters_{i}", "", None)
        for attribute, role in _ROLES.items():
            for i, slot in enumerate(self._slots(attribute)):
                start = self._start_of[i] if role == "momentum" else None
                described[id(slot)] = (role, path_of(self._known[i]), start)
        if self._skipped_steps is not None:
            described[id(self._skipped_steps)] = ("skipped_steps", "", None)
        other = ("other", "", None)
        frozen = {path_of(v) for v in self._known if not v.trainable}
        return [
            checkpoint.Entry(role, path, variable, start, path in frozen)
            for variable in self.variables
            for role, path, start in [described.get(id(variable), other)]
        ]

    def _entries_in_order(self) -> list[checkpoint.Entry]:
        """Describe each state variable, in the order in which an optimizer built anew would make them.

        A group that was added has put its variables' state behind all else; a store that tells no roles is read by
        order, in which it must not matter when they were added.
        """
        in_order = [self._iterations, self._learning_rate]
        for roles in _BUILD_ORDER:
            slots = [self._slots(_ATTRIBUTES[role]) for role in roles]
            in_order += [slot for of_variable in zip(*slots, strict=True) for slot in of_variable]
        in_order += [group.stored for group in self._groups]
        place = {id(variable): i for i, variable in enumerate(in_order)}
        return sorted(self._entries(), key=lambda e: place.get(id(e.variable), len(in_order)))

    @seams.without_autocast()
    def save_own_variables(self, store) -> None:
        """Write the state into a store of `keras.saving`."""
        state = (entry.saved(self._whole) for entry in self._entries_in_order())
        if self._pending_state is None:
            checkpoint.save(store, state)
            return
        # What was loaded and waits for `build` is the state, but for the scalars, which may have been set since.
        scalars = {s.role: s for s in state}
        checkpoint.save(store, [scalars.get(s.role, s) for s in self._pending_state])

    @seams.without_autocast()
    def load_own_variables(self, store) -> None:
        """Read the state from a store of `keras.saving`; before `build`, it is kept until then.

        A store without any array is that of a model that had no optimizer: the state stays, with a warning.

        Raises:
            ValueError: If what is stored does not fit; then nothing is assigned.
        """
        saved = checkpoint.read(store, self.name)
        if not saved:
            warnings.warn(
                f"No state of optimizer '{self.name}' was saved there. The state that it has stays.",
                stacklevel=2,
            )
        elif self._known:
            self._load(saved)
        else:
            before = [ops.convert_to_numpy(v) for v in self.variables]
            self._load_scalars(saved)
            if self._pending_state is None:
                self.__dict__["_before_pending"] = before
            pending = None if checkpoint.is_beginning(saved) else saved
            self.__dict__["_pending_state"] = pending
            # Where no paths are told, as in a file of Keras's Adam, order must do.
            is_copy = any(s.path for s in saved) and checkpoint.is_of_copy(store)
            self.__dict__["_pending_is_copy"] = is_copy
            self.__dict__["_pending_changes"] = {g: g.changes for g in self._groups}

    def _load_scalars(self, saved: list[checkpoint.Saved]) -> None:
        """Assign what there is without variables: the count of iterations and the learning rate."""
        known = {"iteration": self._iterations, "learning_rate": self._learning_rate}
        pairs = []
        for (role, variable), s in zip(known.items(), saved, strict=False):
            named = next((x for x in saved if x.role == role), None) if s.role else s
            if isinstance(variable, keras.Variable) and named is not None and not named.value.shape:
                pairs.append((checkpoint.Entry(role, "", variable), named))
        checkpoint.check(pairs, self.name)
        checkpoint.assign(pairs)

    def _load_beginning(self, saved: list[checkpoint.Saved]) -> None:
        """Take over the state of an optimizer that was not built: no moments yet, and all here from the beginning."""
        joined = [0] * len(self._known)
        self._check_starts(joined)
        self._load_scalars(saved)
        for attribute in _ROLES:
            for slot in self._slots(attribute):
                if slot is not None:
                    slot.assign(ops.zeros(slot.shape, slot.dtype))
        if self._skipped_steps is not None:
            self._skipped_steps.assign(0)
        self._set_starts(joined)

    def _load_pending(self) -> None:
        """Assign what was loaded before the optimizer was built, but for numbers that were set since."""
        saved, self.__dict__["_pending_state"] = self._pending_state or [], None
        is_copy, self.__dict__["_pending_is_copy"] = self._pending_is_copy, False
        changes = self._pending_changes
        set_since = {g: g.current_numbers() for g in self._groups if g.changes != changes.get(g)}
        rate = self._learning_rate
        rate = ops.copy(rate) if isinstance(rate, keras.Variable) else None
        try:
            self._load(saved, by_name=is_copy)
        except ValueError as error:
            for variable, value in zip(self.variables, self._before_pending, strict=False):
                variable.assign(value)
            raise ValueError(f"What was loaded before the optimizer was built: {error}") from None
        if rate is not None:
            self._learning_rate.assign(rate)
        for group, numbers in set_since.items():
            group.store_numbers(numbers)

    def _load(self, saved: list[checkpoint.Saved], by_name: bool = False) -> None:
        """Assign what was saved; when each variable joined is told by the marks on the momenta."""
        if checkpoint.is_beginning(saved):
            self._load_beginning(saved)
            return
        dtype = keras.backend.standardize_dtype(self._iterations.dtype)
        starts = {
            s.role: checkpoint.whole_number(s, self.name, s.role, dtype)
            for s in saved
            if s.role.startswith("start")
        }
        marks = {f"start_{s.start}" for s in saved if s.start}
        unmarked = next((role for role, at in starts.items() if at and role not in marks), None)
        if unmarked:
            raise ValueError(
                f"Optimizer '{self.name}': the saved state holds {unmarked}, at which a variable joined, but no "
                "momentum that is marked with it. No state was loaded."
            )
        saved = [s for s in saved if not s.role.startswith("start")]
        entries = [e for e in self._entries_in_order() if not e.role.startswith("start")]
        if not any(s.role.startswith("hyperparameters") for s in saved):
            without = [e for e in entries if not e.role.startswith("hyperparameters")]
            # A store that tells no roles, which only HDF5 does, holds them if it holds as many arrays as there are.
            if any(s.role for s in saved) or len(saved) <= len(without):
                entries = without
        pairs = checkpoint.match(saved, entries, self.name, by_name)
        joined_late = {}
        for entry, s in pairs:
            if not s.start:
                continue
            if f"start_{s.start}" not in starts:
                raise ValueError(
                    f"Optimizer '{self.name}': the saved state lacks start_{s.start}, which tells at which update "
                    f"'{entry.path}' joined. No state was loaded."
                )
            joined_late[id(entry.variable)] = starts[f"start_{s.start}"]
        joined = [joined_late.get(id(m), 0) for m in self._slots("_momentums")]
        self._check_starts(joined)
        self._assign_state(pairs)
        self._set_starts(joined)

    def _assign_state(self, pairs) -> None:
        """Give the state what was saved, and the groups their own numbers where that holds none."""
        checkpoint.assign(pairs)
        for group in self._groups:
            group.renew_numbers()

    def _set_starts(self, joined: list[int]) -> None:
        """Let each variable have joined at the update given, 0 being the beginning."""
        values, start_of = self._starts_for(joined)
        while len(self._starts) < len(values):
            self._add_start(0)
        unused = [0] * (len(self._starts) - len(values))
        for start, value in zip(self._starts, [*values, *unused], strict=True):
            start.assign(value)
        self._start_of[:] = start_of
        self._bucket_cache.clear()

    def _check_starts(self, joined: list[int]) -> None:
        """Raise if a compiled step, which knows who joined with whom, would not notice that this has changed."""
        if self._traced and self._starts_for(joined)[1] != self._start_of:
            raise ValueError(
                f"Optimizer '{self.name}': in what is loaded other variables joined late than in the train step that "
                "was compiled. Load it before the first step, or into a model compiled anew with a new optimizer. "
                "No state was loaded."
            )

    def _starts_for(self, joined: list[int]) -> tuple[list[int], list[int | None]]:
        """Return the updates at which some joined late, and which of them is each variable's that has moments."""
        moments = self._slots("_momentums")
        joined = [0 if m is None else j for m, j in zip(moments, joined, strict=True)]
        values = sorted(set(joined) - {0})
        return values, [values.index(j) if j else None for j in joined]

    @seams.without_autocast()
    def set_weights(self, weights) -> None:
        """Set all state variables, in the order of `self.variables`, from arrays or variables.

        Raises:
            ValueError: If the optimizer is not built, or `weights` differ in number or shape; then nothing is set.
        """
        if not self._known:
            raise ValueError(
                "You are calling `set_weights()` on an optimizer that has not yet been built. Call "
                "`optimizer.build(trainable_variables)` first."
            )
        arrays = [np.asarray(self._whole(w)) for w in weights]
        entries = self._entries()
        if len(arrays) != len(entries):
            raise ValueError(
                f"`weights` must hold one array for each of the {len(entries)} state variables. "
                f"Received: {len(arrays)} arrays"
            )
        saved = []
        for array, entry in zip(arrays, entries, strict=True):
            # Whole numbers serve for floats here, as they do everywhere in Python.
            is_float = keras.backend.is_float_dtype(entry.variable.dtype)
            widen = is_float and array.dtype.kind in "iu"
            saved.append(checkpoint.Saved("", "", array.astype("float64") if widen else array))
        self._assign_state(checkpoint.match(saved, entries, self.name))


def compute_dtype(dtype) -> str:
    """Return the dtype in which an update of a variable of `dtype` is computed: float32, or float64."""
    return "float64" if keras.backend.standardize_dtype(dtype) == "float64" else "float32"


def value_of(variable, dtype=None):
    """Return a variable's value, cast if a dtype is given.

    Not through `ops.convert_to_tensor`: on TensorFlow that returns the variable itself, whose operators guess what is
    meant from shapes (`+` may become `bias_add`, which fails on an empty matrix).
    """
    value = variable.value if isinstance(variable, keras.Variable) else variable
    return value if dtype is None else ops.cast(value, dtype)


def check_given_once(variables) -> None:
    """Raise a ValueError if a variable stands twice in a list."""
    seen = set()
    for variable in variables:
        if id(variable) in seen:
            raise ValueError(
                "`variables` must not hold a variable twice. "
                f"Received: '{path_of(variable)}' more than once"
            )
        seen.add(id(variable))


def _check_trainable(variables) -> None:
    check_given_once(variables)
    for variable in variables:
        if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(variable.dtype)):
            raise ValueError(
                "`variables` must be of a floating dtype. "
                f"Received: '{path_of(variable)}' of dtype {variable.dtype}"
            )
