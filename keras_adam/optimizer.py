"""`Adam` and `AdamW`: the state, the order of a step, the configuration."""

import functools
import re
from typing import Any

import keras
from keras import ops

from keras_adam import checkpoint, hyperparameters, rule
from keras_adam.backends import Backend
from keras_adam.groups import ParamGroup

# Per-variable state: attribute, role in files, in the order in which Keras's Adam creates it.
_STATE = {
    "_model_variables_moving_average": "average",
    "_accumulated_gradients": "gradient_accumulator",
    "_momentums": "momentum",
    "_velocities": "velocity",
    "_velocity_hats": "velocity_hat",
}


class _OfDefaultGroup:
    """An attribute of the optimizer that is a hyperparameter of its default group."""

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, optimizer, owner=None):
        return self if optimizer is None else optimizer._default_group[self.name]

    def __set__(self, optimizer, value):
        optimizer._default_group[self.name] = value


class PortableAdam(keras.optimizers.Optimizer):
    """Adam in `keras.ops`, one variable at a time: the path that every backend can take."""

    _learning_rate: Any
    built: bool

    beta_1 = _OfDefaultGroup()
    beta_2 = _OfDefaultGroup()
    epsilon = _OfDefaultGroup()
    weight_decay = _OfDefaultGroup()

    def __init__(
        self,
        learning_rate: hyperparameters.Hyperparameter = 0.001,
        beta_1: hyperparameters.Hyperparameter = 0.9,
        beta_2: hyperparameters.Hyperparameter = 0.999,
        epsilon: hyperparameters.Hyperparameter = 1e-7,
        amsgrad: bool | str = False,
        weight_decay: hyperparameters.Hyperparameter | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
        *,
        decoupled_weight_decay: bool = True,
        epsilon_hat: bool = True,
        maximize: bool = False,
    ):
        both = (True, False)
        options = rule.Options(
            amsgrad=hyperparameters.check_choice("amsgrad", amsgrad, (*both, "corrected")),
            decoupled_weight_decay=hyperparameters.check_choice(
                "decoupled_weight_decay", decoupled_weight_decay, both
            ),
            epsilon_hat=hyperparameters.check_choice("epsilon_hat", epsilon_hat, both),
            maximize=hyperparameters.check_choice("maximize", maximize, both),
        )
        # Before `super().__init__`, which sets `weight_decay`; past Keras's lock, as it is no state to be tracked.
        self.__dict__["_default_group"] = ParamGroup(
            {"beta_1": beta_1, "beta_2": beta_2, "epsilon": epsilon, "weight_decay": weight_decay},
            options,
        )
        learning_rate = hyperparameters.check("learning_rate", learning_rate)
        dynamic = hyperparameters.is_dynamic(learning_rate)
        super().__init__(
            learning_rate=learning_rate if dynamic else _unset_learning_rate,
            weight_decay=self.weight_decay,
            clipnorm=_check_limit("clipnorm", clipnorm),
            clipvalue=_check_limit("clipvalue", clipvalue),
            global_clipnorm=_check_limit("global_clipnorm", global_clipnorm),
            use_ema=hyperparameters.check_choice("use_ema", use_ema, both),
            ema_momentum=hyperparameters.check_number("ema_momentum", ema_momentum),
            ema_overwrite_frequency=hyperparameters.check_count(
                "ema_overwrite_frequency", ema_overwrite_frequency or None, 1
            ),
            loss_scale_factor=_check_limit("loss_scale_factor", loss_scale_factor),
            gradient_accumulation_steps=hyperparameters.check_count(
                "gradient_accumulation_steps", gradient_accumulation_steps or None, 2
            ),
            name=name,
        )
        if not dynamic:
            self.learning_rate = learning_rate
        self._decay_exclusions = _DecayExclusions()
        self._pending_state: list[checkpoint.Saved] | None = None

    @property
    def amsgrad(self) -> bool | str:
        return self._default_group.options.amsgrad

    @property
    def decoupled_weight_decay(self) -> bool:
        return self._default_group.options.decoupled_weight_decay

    @property
    def epsilon_hat(self) -> bool:
        return self._default_group.options.epsilon_hat

    @property
    def maximize(self) -> bool:
        return self._default_group.options.maximize

    # ---------------------------------------------------------------------------------------------------------------
    # Learning rate

    @property
    def learning_rate(self):
        return self._get_current_learning_rate()

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        if hyperparameters.is_dynamic(learning_rate):
            keras.optimizers.Optimizer.learning_rate.fset(self, learning_rate)
            return
        if isinstance(self._learning_rate, keras.optimizers.schedules.LearningRateSchedule):
            raise TypeError(
                "This optimizer was created with a `LearningRateSchedule` object as its `learning_rate`, hence its "
                "learning rate is not settable. Give it a number to make it settable, or assign another schedule. "
                f"Received: learning_rate={learning_rate}"
            )
        if not self._is_compiling():
            learning_rate = hyperparameters.check_number("learning_rate", learning_rate)
            self._given_learning_rate = learning_rate
        if isinstance(self._learning_rate, keras.Variable):
            self._learning_rate.assign(learning_rate)
        else:
            # float32 at least: 0.001 in bfloat16 is 0.00099945.
            self._learning_rate = self.add_variable(
                (),
                keras.initializers.Constant(learning_rate),
                dtype=keras.config.floatx(),
                aggregation="only_first_replica",
                name="learning_rate",
            )

    def _get_current_learning_rate(self):
        rate = self._learning_rate
        if isinstance(rate, keras.Variable):
            return rate
        return hyperparameters.resolve(
            "learning_rate", rate, self._iterations, self._is_compiling()
        )

    # ---------------------------------------------------------------------------------------------------------------
    # State

    def build(self, variables) -> None:
        """Create the state of `variables`, a list of `keras.Variable`; a second call does nothing."""
        if self.built:
            return
        variables = list(variables)
        _check_trainable(variables)
        self._create_state(variables)
        self.built = True
        if self._pending_state is not None:
            pending, self._pending_state = self._pending_state, None
            checkpoint.load(pending, self._entries(), self.name)

    def _create_state(self, variables) -> None:
        def create(attribute, wanted=True):
            return self.add_optimizer_variables(variables, _STATE[attribute]) if wanted else []

        # Past Keras's tracking, which would take the model's variables for state of the optimizer.
        self.__dict__["_trainable_variables"] = variables
        self.__dict__["_trainable_variables_indices"] = {
            self._var_key(v): i for i, v in enumerate(variables)
        }
        if self.use_ema:
            self._model_variables_moving_average = create("_model_variables_moving_average")
        if self.gradient_accumulation_steps:
            # Also for variables that are overwritten with their gradient, which have no other state.
            self._accumulated_gradients = [
                self.add_variable_from_reference(v, "gradient_accumulator") for v in variables
            ]
        self._momentums, self._velocities = self.add_optimizer_variables(
            variables, ["momentum", "velocity"]
        )
        if self.amsgrad:
            self._velocity_hats = create("_velocity_hats")

    def add_variable(self, shape, initializer="zeros", dtype=None, **kwargs):
        """Add a state variable; one of half precision becomes float32, as a moment in bfloat16 stalls."""
        dtype = compute_dtype(dtype or keras.config.floatx()) if _is_float(dtype) else dtype
        return super().add_variable(shape, initializer, dtype, **kwargs)

    def _entries(self) -> list[checkpoint.Entry]:
        """Describe each state variable, in the order of `self.variables`."""
        described = {id(self._iterations): ("iteration", "")}
        described[id(self._learning_rate)] = ("learning_rate", "")
        for attribute, role in _STATE.items():
            slots = getattr(self, attribute, None) or []
            for slot, variable in zip(slots, self._trainable_variables, strict=False):
                described[id(slot)] = (role, path_of(variable))
        return [
            checkpoint.Entry(role, path, v)
            for v in self.variables
            for role, path in [described.get(id(v), ("other", v.path))]
        ]

    def save_own_variables(self, store) -> None:
        """Write the state into a store of `keras.saving`."""
        checkpoint.save(store, self._entries())

    def load_own_variables(self, store) -> None:
        """Read the state from a store of `keras.saving`; before `build`, it is kept until then.

        Raises:
            ValueError: If what is stored does not fit; then nothing is assigned.
        """
        saved = checkpoint.read(store, self.name)
        if not self.built and len(saved) > len(self.variables):
            self._pending_state = saved
        else:
            checkpoint.load(saved, self._entries(), self.name)

    def set_weights(self, weights) -> None:
        """Set all state variables, in the order of `self.variables`, from arrays or variables.

        Raises:
            ValueError: If the optimizer is not built, or `weights` differ in number or shape; then nothing is set.
        """
        if not self.built:
            raise ValueError(
                "You are calling `set_weights()` on an optimizer that has not yet been built. Call "
                "`optimizer.build(trainable_variables)` first."
            )
        weights = [checkpoint.Saved("", "", ops.convert_to_numpy(w)) for w in weights]
        entries = self._entries()
        if len(weights) != len(entries):
            raise ValueError(
                f"`weights` must hold one array for each of the {len(entries)} state variables. "
                f"Received: {len(weights)} arrays"
            )
        checkpoint.load(weights, entries, self.name)

    # ---------------------------------------------------------------------------------------------------------------
    # One step. Its order: unscale, sum over replicas, accumulate, clip, decay and Adam, constraints, EMA, iterations.

    def apply_gradients(self, grads_and_vars):
        """Apply (gradient, variable) pairs and return the iterations; no pair, no step."""
        grads_and_vars = list(grads_and_vars)
        self.apply([g for g, _ in grads_and_vars], [v for _, v in grads_and_vars])
        return self._iterations

    def apply(self, grads, trainable_variables=None) -> None:
        """Update the variables by one step.

        Args:
            grads: List of gradients, each of its variable's shape; None leaves its variable as it is. They are not
                written to. TensorFlow's `IndexedSlices` and JAX's `BCOO` serve too.
            trainable_variables: List of variables, one per gradient. Defaults to those that the optimizer was built
                with; given on the first call, they build it.

        Raises:
            ValueError: If the numbers of gradients and variables differ, a variable is not known, or no variable has
                a gradient.
        """
        grads = list(grads)
        if not grads:
            return
        variables = self._variables_for(grads, trainable_variables)
        with keras.name_scope(self.name, caller=self):
            absent = [v for g, v in zip(grads, variables, strict=True) if g is None]
            grads, variables = self._filter_empty_gradients(grads, variables)
            grads, variables = self._overwrite_variables_directly_with_gradients(grads, variables)
            if grads:
                grads = [self._unscale(self._densify(g)) for g in grads]
                self._backend_apply_gradients(grads, variables, absent)
        self._iterations.assign_add(1)

    def _variables_for(self, grads, trainable_variables):
        if trainable_variables is None:
            if not self.built:
                raise ValueError(
                    "When passing `grads` without `variables`, the optimizer must already be built on a list of "
                    "variables. Call `optimizer.build(trainable_variables)` first."
                )
            variables = self._trainable_variables
        else:
            variables = list(trainable_variables)
        if len(grads) != len(variables):
            raise ValueError(
                "`grads` must hold one gradient (or None) for each variable. "
                f"Received: {len(grads)} gradients for {len(variables)} variables"
            )
        if not self.built:
            with keras.name_scope(self.name, caller=self):
                self.build(variables)
        self._check_variables_are_known(variables)
        return list(variables)

    def _unscale(self, gradient):
        if self.loss_scale_factor is None:
            return gradient
        return ops.cast(gradient, compute_dtype(gradient.dtype)) / self.loss_scale_factor

    def _backend_apply_gradients(self, grads, trainable_variables, absent=()):
        grads = self._reduce(grads)
        if self.gradient_accumulation_steps:
            self._accumulate(grads, trainable_variables, absent)
        else:
            self._update(self._clip_gradients(grads), trainable_variables)
            self._update_averages()

    def _accumulate(self, grads, variables, absent) -> None:
        """Add the gradients to the accumulators; when enough micro-steps have come together, update from their mean.

        A variable without a gradient in the last micro-step is updated too if the earlier ones left it something.
        """
        known = [*variables, *absent]
        accumulators = [self._accumulated_gradients[self._get_variable_index(v)] for v in known]
        self._backend_increment_gradient_accumulators(grads, accumulators[: len(grads)])
        steps = self.gradient_accumulation_steps

        def update():
            means = self._clip_gradients([ops.convert_to_tensor(a) / steps for a in accumulators])
            self._update(means[: len(variables)], variables)
            for mean, variable in zip(means[len(variables) :], absent, strict=True):
                self._when(
                    ops.any(ops.not_equal(mean, 0)),
                    functools.partial(self._update, [mean], [variable]),
                )
            for accumulator in accumulators:
                self.assign(accumulator, ops.zeros(accumulator.shape, accumulator.dtype))
            self._update_averages()

        self._when((self._iterations + 1) % steps == 0, update)

    def _backend_increment_gradient_accumulators(self, grads, acc_grads):
        for gradient, accumulator in zip(grads, acc_grads, strict=True):
            total = ops.convert_to_tensor(accumulator) + ops.cast(gradient, accumulator.dtype)
            self.assign(accumulator, total)

    def _clip_gradients(self, grads):
        # Norms in float32: the square of 256 is infinite in float16.
        if self.clipnorm:
            return [self._scale_to_norm(g, _norm([g]), self.clipnorm) for g in grads]
        if self.global_clipnorm:
            norm = _norm(grads)
            return [self._scale_to_norm(g, norm, self.global_clipnorm) for g in grads]
        if self.clipvalue:
            return [g if g is None else ops.clip(g, -self.clipvalue, self.clipvalue) for g in grads]
        return grads

    @staticmethod
    def _scale_to_norm(gradient, norm, limit):
        if gradient is None:
            return None
        dtype = compute_dtype(gradient.dtype)
        return ops.cast(gradient, dtype) * ops.cast(limit / ops.maximum(norm, limit), dtype)

    def _update(self, grads, variables) -> None:
        self._backend_update_step(grads, variables, self.learning_rate)
        for variable in variables:
            if variable.constraint is not None:
                self.assign(variable, variable.constraint(ops.convert_to_tensor(variable)))

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        self._portable_update_step(grads, trainable_variables, learning_rate)

    def _portable_update_step(self, grads, variables, learning_rate) -> None:
        scalars = self._scalars(learning_rate)
        for gradient, variable in zip(grads, variables, strict=True):
            self.update_step(gradient, variable, learning_rate, scalars)

    def update_step(self, gradient, variable, learning_rate, scalars=None) -> None:
        """Update one variable and its moments; `scalars` are those of the whole step, where known."""
        index = self._get_variable_index(variable)
        group = self._default_group
        dtype = compute_dtype(variable.dtype)
        scalars = (scalars or self._scalars(learning_rate))(group, dtype)
        if not self._use_weight_decay(variable):
            scalars = scalars._replace(decay=None)
        slots = self._moments_of(index)
        moments = rule.Moments(*(x if x is None else ops.cast(x, dtype) for x in slots))
        p, moments = rule.adam_step(
            ops.cast(gradient, dtype), ops.cast(variable, dtype), moments, scalars, group.options
        )
        self.assign(variable, p)
        for slot, value in zip(slots, moments, strict=True):
            if slot is not None:
                self.assign(slot, value)

    def _moments_of(self, index: int) -> rule.Moments:
        s = self._velocity_hats[index] if self.amsgrad else None
        return rule.Moments(self._momentums[index], self._velocities[index], s)

    def _scalars(self, learning_rate):
        """Return a function that gives a group's scalars of this step, each computed once."""
        t = self.iterations + 1
        compiling = self._is_compiling()

        @functools.cache
        def scalars(group: ParamGroup, dtype: str) -> rule.Scalars:
            return group.scalars(learning_rate, self._iterations, t, dtype, compiling)

        return scalars

    # Averages

    def _update_averages(self) -> None:
        if not self.use_ema:
            return
        self._update_model_variables_moving_average(self._trainable_variables)
        if self.ema_overwrite_frequency:
            self._when(
                (self.iterations + 1) % self.ema_overwrite_frequency == 0,
                self._overwrite_with_averages,
            )

    def _update_model_variables_moving_average(self, trainable_variables) -> None:
        started = ops.not_equal(self.iterations, 0)  # the first update sets the average
        for variable, average in self._averages_of(trainable_variables):
            keep = ops.cast(started, average.dtype) * self.ema_momentum
            value = ops.cast(variable, average.dtype)
            average_value = ops.convert_to_tensor(average)
            self.assign(average, keep * average_value + (1 - keep) * value)

    def _overwrite_with_averages(self) -> None:
        for variable, average in self._averages_of(self._trainable_variables):
            self.assign(variable, ops.cast(average, variable.dtype))

    def _overwrite_model_variables_with_average_value(self, trainable_variables) -> None:
        self._check_variables_are_known(trainable_variables)
        for variable, average in self._averages_of(trainable_variables):
            variable.assign(ops.cast(average, variable.dtype))

    def _averages_of(self, variables):
        """Pair variables with their averages; one that is overwritten with its gradient has none."""
        for variable in variables:
            average = self._model_variables_moving_average[self._get_variable_index(variable)]
            if average is not None:
                yield variable, average

    # What a backend may do its own way

    def _is_compiling(self) -> bool:
        """Whether this call is being traced, so that what Python computes now is frozen into a compiled step."""
        return False

    def _densify(self, gradient):
        """Return a sparse gradient as a dense one, the values of a repeated index summed."""
        return ops.convert_to_tensor(gradient, sparse=False)

    def _reduce(self, grads):
        """Return the gradients summed over the replicas."""
        return grads

    def _when(self, condition, update) -> None:
        """Call `update`, which assigns to variables, if `condition` holds in this step."""
        if condition:
            update()

    # ---------------------------------------------------------------------------------------------------------------
    # Weight decay

    def exclude_from_weight_decay(self, var_list=None, var_names=None) -> None:
        """Exclude variables from weight decay, besides those excluded before.

        Args:
            var_list: List of variables to exclude. Defaults to None.
            var_names: List of regular expressions; a variable is excluded if one is found in its `path` or `name`, as
                `["bias"]` excludes all biases. Defaults to None.

        Raises:
            ValueError: If the optimizer is already built.
        """
        if self.built:
            raise ValueError(
                "`exclude_from_weight_decay()` can only be configured before the optimizer is built."
            )
        if isinstance(var_names, str):
            raise TypeError(
                f"`var_names` must be a list of strings. Received: var_names={var_names!r}"
            )
        self._decay_exclusions.add(
            keys=[self._var_key(v) for v in var_list or []],
            paths=[path_of(v) for v in var_list or []],
            patterns=var_names or [],
        )

    def _use_weight_decay(self, variable) -> bool:
        return not self._decay_exclusions.hold(self._var_key(variable), variable)

    # ---------------------------------------------------------------------------------------------------------------
    # Configuration

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make an equal optimizer, without its state.

        The keys are those of `keras.optimizers.Adam`; an option that Keras does not have is there if it was changed.
        """
        config = super().get_config()
        if isinstance(self._learning_rate, keras.Variable):
            config["learning_rate"] = hyperparameters.exact(
                self._learning_rate.numpy(), self._given_learning_rate
            )
        for name in ("beta_1", "beta_2", "epsilon", "weight_decay"):
            value = getattr(self, name)
            dynamic = hyperparameters.is_dynamic(value)
            config[name] = keras.saving.serialize_keras_object(value) if dynamic else value
        config["amsgrad"] = self.amsgrad
        for name, default in rule.Options._field_defaults.items():
            if name != "amsgrad" and getattr(self, name) != default:
                config[name] = getattr(self, name)
        if self._decay_exclusions:
            config["exclude_from_weight_decay"] = self._decay_exclusions.get_config()
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Return the optimizer that `config`, from `get_config`, describes. `config` is not changed."""
        config = dict(config)
        exclusions = config.pop("exclude_from_weight_decay", None)
        for name in ("learning_rate", "beta_1", "beta_2", "epsilon", "weight_decay"):
            if isinstance(config.get(name), dict):
                config[name] = keras.saving.deserialize_keras_object(
                    config[name], custom_objects=custom_objects
                )
        optimizer = cls(**config)
        if exclusions:
            optimizer._decay_exclusions.add(keys=[], **exclusions)
        return optimizer


@keras.saving.register_keras_serializable("keras_adam")
class Adam(Backend, PortableAdam):
    """Adam: a drop-in for `keras.optimizers.Adam` with the options of `torch.optim.Adam`.

    With its defaults it computes what `keras.optimizers.Adam` computes, on each backend. The hyperparameters
    `learning_rate`, `beta_1`, `beta_2`, `epsilon` and `weight_decay` each take a number, a scalar tensor, a
    `keras.optimizers.schedules.LearningRateSchedule`, or a callable without arguments that returns one of the former
    two. All arithmetic is done in float32 at least, so that float16 and bfloat16 variables train.

    Args:
        learning_rate: Step size. Defaults to `0.001`.
        beta_1: Decay rate of the first moment, in [0, 1). Defaults to `0.9`.
        beta_2: Decay rate of the second moment, in [0, 1). Defaults to `0.999`.
        epsilon: Small number added to the denominator; see `epsilon_hat`. Defaults to `1e-7`.
        amsgrad: Whether the denominator uses a running maximum of the second moment: `True` takes the maximum of the
            raw moment and corrects its bias afterwards, as Keras and PyTorch do; `"corrected"` takes the maximum of
            the bias-corrected moment, as optax does. Defaults to `False`.
        weight_decay: Strength of the weight decay, or `None` for none. Defaults to `None`.
        clipnorm: Largest norm of each variable's gradient. Defaults to `None`: no limit, as with `0`.
        clipvalue: Largest absolute value of each element of a gradient. Defaults to `None`: no limit, as with `0`.
        global_clipnorm: Largest norm of all gradients together. Defaults to `None`: no limit, as with `0`.
        use_ema: Whether to keep an exponential moving average of the weights. Defaults to `False`.
        ema_momentum: Decay rate of that average, in [0, 1]. Defaults to `0.99`.
        ema_overwrite_frequency: Number of updates after which the weights are overwritten with their average, each
            time. Defaults to `None`: only at the end of `fit`.
        loss_scale_factor: Factor by which the loss is multiplied before, and the gradients are divided after,
            differentiation. Defaults to `None`.
        gradient_accumulation_steps: Number (at least 2) of calls whose mean gradient makes one update. Defaults to
            `None`: each call updates.
        name: Name of the optimizer. Defaults to the class's name.
        decoupled_weight_decay: `True`: the weights shrink by `learning_rate * weight_decay` (AdamW). `False`: the
            decay is an L2 penalty, added to the gradient, as in `torch.optim.Adam`. Defaults to `True`.
        epsilon_hat: `True`: `epsilon` is the paper's epsilon-hat, added to the square root of the uncorrected second
            moment, as in Keras. `False`: it is the epsilon of Algorithm 1, added after the bias correction, as in
            PyTorch and optax. Without effect with `amsgrad="corrected"`, which follows Algorithm 1. Defaults to
            `True`.
        maximize: Whether to ascend the gradient rather than descend it. Defaults to `False`.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of a kind that cannot serve.

    References:
        - [Kingma & Ba, 2015: Adam](https://arxiv.org/abs/1412.6980)
        - [Loshchilov & Hutter, 2019: decoupled weight decay](https://arxiv.org/abs/1711.05101)
        - [Reddi et al., 2018: AMSGrad](https://arxiv.org/abs/1904.09237)

    Example:
        >>> import keras, keras_adam
        >>> weight = keras.Variable([1.0, -2.0])
        >>> optimizer = keras_adam.Adam(learning_rate=0.1)
        >>> optimizer.apply([keras.ops.array([0.5, -3.0])], [weight])
        >>> [round(float(w), 4) for w in weight.numpy()]
        [0.9, -1.9]
    """


@keras.saving.register_keras_serializable("keras_adam")
class AdamW(Adam):
    """Adam with decoupled weight decay, a drop-in for `keras.optimizers.AdamW`.

    Args:
        learning_rate: Step size. Defaults to `0.001`.
        weight_decay: Strength of the weight decay. Defaults to `0.004`.
        beta_1: Decay rate of the first moment, in [0, 1). Defaults to `0.9`.
        beta_2: Decay rate of the second moment, in [0, 1). Defaults to `0.999`.
        epsilon: Small number added to the denominator. Defaults to `1e-7`.
        amsgrad: `False`, `True` or `"corrected"`, as in `Adam`. Defaults to `False`.
        *args: The arguments of `Adam` from `clipnorm` on, in its order.
        **kwargs: Any other argument of `Adam`.

    Raises:
        ValueError: If `weight_decay` is None, or an argument is out of its range.

    References:
        - [Loshchilov & Hutter, 2019](https://arxiv.org/abs/1711.05101), Algorithm 2. Keras and PyTorch both multiply
          the decay by the learning rate; so does this class.

    Example:
        >>> import keras_adam
        >>> keras_adam.AdamW(1e-3).weight_decay
        0.004
    """

    def __init__(
        self,
        learning_rate=0.001,
        weight_decay=0.004,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-7,
        amsgrad=False,
        *args,
        **kwargs,
    ):
        if weight_decay is None:
            raise ValueError(
                "`weight_decay` of AdamW must be a number. Received: weight_decay=None"
            )
        super().__init__(
            learning_rate, beta_1, beta_2, epsilon, amsgrad, weight_decay, *args, **kwargs
        )


class _DecayExclusions:
    """Which variables weight decay leaves out: by identity, by path (after loading), by pattern."""

    def __init__(self):
        self._keys: set[Any] = set()
        self._paths: list[str] = []
        self._patterns: list[str] = []
        self._verdicts: dict[Any, bool] = {}

    def add(self, keys, paths, patterns) -> None:
        self._keys.update(keys)
        self._paths.extend(paths)
        self._patterns.extend(patterns)
        self._verdicts.clear()

    def hold(self, key, variable) -> bool:
        if not self:
            return False
        if key not in self._verdicts:
            names = {path_of(variable), variable.name.partition(":")[0]}
            self._verdicts[key] = (
                key in self._keys
                or not names.isdisjoint(self._paths)
                or any(re.search(pattern, name) for pattern in self._patterns for name in names)
            )
        return self._verdicts[key]

    def __bool__(self) -> bool:
        return bool(self._paths or self._patterns)

    def get_config(self) -> dict[str, list[str]]:
        return {"paths": list(self._paths), "patterns": list(self._patterns)}


def compute_dtype(dtype) -> str:
    """Return the dtype in which an update of a variable of `dtype` is computed: float32, or float64."""
    return "float64" if keras.backend.standardize_dtype(dtype) == "float64" else "float32"


def path_of(variable) -> str:
    """Return a variable's path; a raw `tf.Variable` has its name instead."""
    return getattr(variable, "path", None) or variable.name.partition(":")[0]


def _is_float(dtype) -> bool:
    return dtype is None or keras.backend.is_float_dtype(dtype)


def _unset_learning_rate() -> float:
    """Stand for the learning rate while Keras's constructor runs, which takes only a float for a number."""
    return 0.0


def _check_limit(name: str, value) -> float | None:
    return None if value is None else hyperparameters.check_number(name, value)


def _check_trainable(variables) -> None:
    seen = set()
    for variable in variables:
        if id(variable) in seen:
            raise ValueError(
                "`variables` must not hold a variable twice. "
                f"Received: '{path_of(variable)}' more than once"
            )
        seen.add(id(variable))
        if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(variable.dtype)):
            raise ValueError(
                "`variables` must be of a floating dtype. "
                f"Received: '{path_of(variable)}' of dtype {variable.dtype}"
            )


def _norm(grads):
    squares = [
        ops.sum(ops.square(ops.cast(g, compute_dtype(g.dtype)))) for g in grads if g is not None
    ]
    return ops.sqrt(sum(ops.cast(x, "float32") for x in squares))
