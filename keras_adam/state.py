"""The state: which variables the optimizer knows, and what it keeps of each."""

import functools
from typing import Any

import keras
from keras import ops

from keras_adam import groups, keras_private, rule, selection, storage
from keras_adam.engines import Engine, engine_class, optimizer_base
from keras_adam.group_view import GroupViews, ParamGroups
from keras_adam.groups import ParamGroup
from keras_adam.loading import Loading
from keras_adam.monitor import Monitor, Reading
from keras_adam.parameters import Parameters
from keras_adam.paths import path_of
from keras_adam.storage import Spec, Storage
from keras_adam.tensors import compute_dtype
from keras_adam.trace import Trace

# What Keras reads of the state: `SwapEMAWeights`, checkpoints of TensorFlow. Lists in the order of the records.
_VIEWS = {
    "_model_variables_moving_average": "average",
    "_accumulated_gradients": "accumulator",
    "_momentums": "momentum",
    "_velocities": "velocity",
    "_velocity_hats": "velocity_hat",
    "_compensations": "value",
}
_SCALES = {
    "_momentum_scales": "momentum",
    "_velocity_scales": "velocity",
    "_velocity_hat_scales": "velocity_hat",
}
_ALWAYS = ("_momentums", "_velocities")
_ENGINE = engine_class()


class State(optimizer_base()):  # type: ignore[misc]
    """Variables, their groups, and their state."""

    built: bool
    iterations: Any

    # Set without Keras's tracking, which would add the model's variables in them to the optimizer's state.
    _groups: list[ParamGroup]
    _default_group: ParamGroup
    _views: GroupViews
    _parameters: Parameters
    _loading: Loading
    _pending_groups: list[ParamGroup]
    _trace: Trace
    _engine: Engine
    _verified_lists: set[tuple[int, ...]]
    _has_groups: bool
    lazy: bool
    state_dtype: str | None
    kahan_sum: bool | None
    skip_nonfinite: bool
    skip_spikes: float | None
    monitor: int
    shard_state: bool
    _skipped_steps: Any
    _spec: Spec | None  # of the array that is being made, if it is kept for a variable
    _recent_norms: Any  # the window by which spikes are known
    _monitor: Monitor | None

    def _init_groups(self, numeric, options, param_groups) -> None:
        """Set up what Keras's constructor does not know, before it runs."""
        default = ParamGroup(numeric, options)
        self.__dict__.update(
            _default_group=default,
            _views=GroupViews(self),
            _has_groups=param_groups is not None,
            _pending_groups=[],  # added after `build`, to be resolved by the next one
            _parameters=Parameters(self._var_key, self._add_slot, self._add_start),
            _loading=Loading(self),
            _trace=Trace(),
            _verified_lists=set(),  # lists of variables, by identity, without unknown ones and duplicates
            _spec=None,
            _monitor=None,
        )
        self.__dict__["_engine"] = _ENGINE(self, self._parameters, self._trace)
        if param_groups is not None and not isinstance(param_groups, list | tuple):
            raise TypeError(
                f"`param_groups` must be a list of dictionaries. Received: param_groups={param_groups!r}"
            )
        parsed = [
            groups.parse(f"param_groups[{i}]", spec, default)
            for i, spec in enumerate(param_groups or [])
        ]
        self.__dict__["_groups"] = [*parsed, default]

    @property
    def param_groups(self) -> ParamGroups:
        """The parameter groups, for reading, and for setting numbers: in the order given, then the default group.

        A group that `add_param_group` adds to a built optimizer comes last, as in PyTorch.
        """
        return ParamGroups(self._views[group] for group in self._groups)

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
        group = groups.parse("param_group", param_group, self._default_group)
        named = selection.named_variables(group.selector) if self._parameters else None
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
        if not self._parameters:
            self._groups.insert(self._groups.index(self._default_group), group)
            return
        self._groups.append(group)
        if named is None:
            self._pending_groups.append(group)
        else:
            self._create_state(named, [group] * len(named))
            self._show_keras()
            self.__dict__["_trainable_variables"] = [*self._trainable_variables, *named]
        self.built = (
            False  # so that the next `fit` builds again, in the order of the model's variables
        )

    # ---------------------------------------------------------------------------------------------------------------
    # Building

    def build(self, variables) -> None:
        """Create the state of `variables`, a list of `keras.Variable`.

        Called again, it puts the variables in the order given, creates the state of those that a group added since
        then selects, and leaves all other state as it is.

        Raises:
            ValueError: If a parameter group selects no variable, a variable is given twice or is not of a floating
                dtype, or, in a later call, no group was added for a new variable.
        """
        with keras_private.without_autocast():
            self._build(list(variables))

    def _build(self, variables) -> None:
        if self.built and list(map(id, variables)) == list(map(id, self._trainable_variables)):
            return
        new = [v for v in variables if not self._is_known(v)]
        _check_trainable(variables)
        self._loading.check_copy(variables)
        if self._parameters:
            self._build_more(new)
        else:
            self.__dict__["_engine"] = self._engine.to_build()
            chosen = groups.assign(self._selecting_groups(), self._default_group, variables)
            self._create_state(variables, chosen)
        self._reorder(variables)
        # Without any variable, as when all are frozen, it stays unbuilt, so that the next `fit` builds it.
        self.built = bool(self._parameters)
        with self._engine.outside_graph():
            self._loading.load_pending()
        self._engine.built()

    def _selecting_groups(self) -> list[ParamGroup]:
        return [g for g in self._groups if g is not self._default_group]

    def _build_more(self, new) -> None:
        pending = list(self._pending_groups)
        unselected = [v for v in new if not any(selection.selects(g.selector, v) for g in pending)]
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
        with self._engine.outside_graph():
            now = int(ops.convert_to_numpy(self.iterations)) if self._parameters else 0
        plans = [
            (v, group, self._storage_of(v, group))
            for v, group in zip(variables, chosen, strict=True)
        ]
        self._parameters.create(plans, self._engine.parts_of(plans), now)
        self._store_numbers()
        self._prepare_skipping()
        self._prepare_monitor()

    def _show_keras(self) -> None:
        """Set the attributes that Keras reads, derived from the records."""
        for attribute, name in _VIEWS.items():
            arrays = self._parameters.first_arrays(name)
            if attribute in _ALWAYS or any(x is not None for x in arrays):
                # Set as a whole: TensorFlow's checkpoints track the list that was assigned, not what is appended later.
                setattr(self, attribute, arrays)
        for attribute, name in _SCALES.items():
            scales = [x for p in self._parameters for x in p.scales(name)]
            if scales:
                setattr(self, attribute, scales)
        self._trainable_variables_indices.update(
            {self._var_key(v): i for i, v in enumerate(self._parameters.variables)}
        )

    def _prepare_skipping(self) -> None:
        """Add the count of skipped steps, if steps may be skipped, and the window by which spikes are known."""
        if not self._parameters:
            return
        finds_spikes = self.skip_spikes is not None
        if (self.skip_nonfinite or finds_spikes) and self._skipped_steps is None:
            self._skipped_steps = self._add_alike("skipped_steps", "int")
        if finds_spikes and self._recent_norms is None:
            self._recent_norms = self._add_alike("recent_norms", "float32", (rule.WINDOW,))

    def _prepare_monitor(self) -> None:
        """Add what is measured, of new groups too."""
        if not self.monitor:
            return
        monitor = self._monitor or Monitor(self.monitor, self._add_alike)
        self.__dict__["_monitor"] = monitor
        monitor.include(self._groups)
        for role, variable in monitor.described(self._groups):
            self._engine.track(variable, role)

    def _add_alike(self, name: str, dtype: str, shape: tuple[int, ...] = (), first: Any = "zeros"):
        """Add a state variable that is no variable's, and the same in all replicas; `first` initializes it."""
        return self.add_variable(
            shape, first, dtype=dtype, aggregation="only_first_replica", name=name
        )

    @property
    def skipped_steps(self):
        """The number of steps that `skip_nonfinite` and `skip_spikes` skipped, a scalar variable.

        None before `build`, and without these options.
        """
        return self._skipped_steps

    def monitored(self) -> dict[str, float]:
        """Return what `monitor` measured since the last call, and begin anew; NaN where nothing was measured.

        Returns:
            A dictionary with `grad_norm` and `grad_norm_max`, mean and maximum of the norm of all gradients together,
            before clipping; `clipped` and `skipped`, the shares of the steps that were; and `update_ratio`, the mean
            rms of a step over the rms of the weights. With several groups there is `update_ratio/0` and so on instead,
            numbered as in `param_groups`.

        Raises:
            ValueError: If `monitor` is False, or the optimizer is not built.

        Examples:
            >>> import keras, keras_adam
            >>> weight = keras.Variable([1.0, -2.0])
            >>> optimizer = keras_adam.Adam(learning_rate=0.1, monitor=1)
            >>> optimizer.apply([keras.ops.array([3.0, -4.0])], [weight])
            >>> optimizer.monitored()["grad_norm"]
            5.0
        """
        return self._read_monitor().shown()

    def _read_monitor(self) -> Reading:
        if self._monitor is None:
            raise ValueError(
                "`monitored()` needs an optimizer that is built, with `monitor=True`. "
                f"Received: monitor={self.monitor}, built={self.built}"
            )
        skipped = 0 if self._skipped_steps is None else int(self._skipped_steps.numpy())
        calls = int(self._iterations.numpy()) + skipped
        return self._monitor.read(self._groups, calls, skipped)

    def _storage_of(self, variable, group: ParamGroup) -> dict[str, Storage]:
        """Return the storage of each kind of state that a variable of the group has."""
        own, wide = keras.backend.standardize_dtype(variable.dtype), compute_dtype(variable.dtype)
        plan: dict[str, Storage] = {"value": storage.for_variable(own, self.kahan_sum)}
        if self.gradient_accumulation_steps:
            # Also for variables that are overwritten with their gradient, which have no other state.
            plan["accumulator"] = storage.AsItIs(wide)
        if self._overwrite_variable_with_gradient(variable):
            return plan | {"value": storage.for_variable(own, kahan_sum=False)}
        if self.use_ema:
            plan["average"] = storage.AsItIs(wide)
        of_moment = functools.partial(
            storage.for_moment, self._state_dtype_of(group), variable, by_row=self.lazy
        )
        plan["momentum"], plan["velocity"] = of_moment(signed=True), of_moment(signed=False)
        if group.options.amsgrad:  # a maximum of dithered numbers would climb
            plan["velocity_hat"] = of_moment(signed=False, dithers=False)
        return plan

    def _state_dtype_of(self, group: ParamGroup) -> str | None:
        own = group.state_dtype
        return self.state_dtype if own == groups.INHERITED else own

    def _add_slot(self, part, spec: Spec):
        self._spec = spec
        try:
            return self._engine.slot(self.add_variable_from_reference(part, spec.role), part, spec)
        finally:
            self._spec = None

    def state_size(self, variables=None) -> dict[str, int]:
        """Return the bytes of state that each variable has, or would have; `sum(sizes.values())` is the total.

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
            if not self._parameters:
                raise ValueError(
                    "`state_size` needs `variables`, as the optimizer is not built. Received: variables=None"
                )
            variables = self._parameters.variables
        sizes = {}
        for variable in variables:
            if self._is_known(variable):
                group = self._parameters[variable].group
            else:
                group = groups.group_for(variable, self._selecting_groups(), self._default_group)
            plan, shape = self._storage_of(variable, group), tuple(variable.shape)
            sizes[path_of(variable)] = sum(kept.nbytes(shape) for kept in plan.values())
        return sizes

    def _add_start(self, number: int, update: int):
        """Add the state variable that holds the update at which some variables joined."""
        first = keras.initializers.Constant(update)
        return self._add_alike(f"start_{number}", "int", first=first)

    def _store_numbers(self) -> None:
        """Keep the groups' numbers in state variables; without groups there are none, as in Keras."""
        if not self._has_groups:
            return
        wide = any(compute_dtype(v.dtype) == "float64" for v in self._parameters.variables)
        for i, group in enumerate(self._groups):
            if group.stored is None:
                name, dtype = f"hyperparameters_{i}", "float64" if wide else "float32"
                shape = (len(groups.NUMERIC),)
                group.stored = self._add_alike(name, dtype, shape, group.initial_numbers)
        for i, group in enumerate(self._selecting_groups()):
            self._engine.track(group.stored, f"hyperparameters_{i}")
        self._engine.track(self._default_group.stored, "hyperparameters")

    def _reorder(self, variables) -> None:
        """Put `variables` first, in the model's order, in which Keras's JAX trainer passes values."""
        self._parameters.put_first(variables)
        self._show_keras()
        self.__dict__["_trainable_variables"] = list(variables)
        self._engine.forget()

    def add_variable(self, shape, initializer="zeros", dtype=None, **kwargs):
        """Add a state variable; one of half precision becomes float32, as a moment in bfloat16 stalls."""
        spec = self._spec
        if spec is not None:
            dtype = spec.dtype
            kwargs["layout"] = self._engine.slot_layout(kwargs.get("layout"), shape, spec)
            shape = shape if spec.shape is None else spec.shape
        elif dtype is None or keras.backend.is_float_dtype(dtype):
            dtype = compute_dtype(dtype or keras.config.floatx())
        return super().add_variable(shape, initializer, dtype, **kwargs)

    def _check_variables_are_known(self, variables) -> None:
        for variable in variables:
            if not self._is_known(variable):
                raise ValueError(self._unknown(variable))

    def _is_known(self, variable) -> bool:
        return variable in self._parameters

    def _unknown(self, variable) -> str:
        return (
            f"Unknown variable: '{path_of(variable)}'. This optimizer was built for {len(self._parameters)} other "
            f"variables. {self._own_optimizer()} To train more variables with this one, such as those of a layer "
            "that was unfrozen, call `optimizer.add_param_group({'params': layer_or_variables})` first; the state of "
            "the others stays."
        )

    def _own_optimizer(self) -> str:
        """Return the advice for users who give one optimizer to two models."""
        return (
            "If this is another model, give it an optimizer of its own: "
            f"`{type(self).__name__}.from_config(optimizer.get_config())`."
        )

    # ---------------------------------------------------------------------------------------------------------------
    # Saving and loading

    @keras_private.without_autocast()
    def save_own_variables(self, store) -> None:
        """Write the state into a store of `keras.saving`."""
        self._loading.save(store)

    @keras_private.without_autocast()
    def load_own_variables(self, store) -> None:
        """Read the state from a store of `keras.saving`; before `build`, it is kept until then.

        A store without arrays comes from a model without an optimizer: the state stays as it is, with a warning.

        Raises:
            ValueError: If what is stored does not fit; then nothing is assigned.
        """
        self._loading.load(store)

    @keras_private.without_autocast()
    def set_weights(self, weights) -> None:
        """Set all state variables, in the order of `self.variables`, from arrays or variables.

        Raises:
            ValueError: If the optimizer is not built, or `weights` differ in number or shape; then nothing is set.
        """
        self._loading.set_weights(weights)


def check_given_once(variables) -> None:
    """Raise a ValueError if a list holds a variable twice."""
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
