"""`Adam` and `AdamW`: what users construct, set, and save as a configuration."""

import inspect
from typing import Any

import keras

from keras_adam import argument_hints, groups, hyperparameters, rule, settings
from keras_adam.group_view import check_held
from keras_adam.keras_api import KerasVocabulary
from keras_adam.monitor import EVERY
from keras_adam.selection import DecayExclusions
from keras_adam.settings import Setting
from keras_adam.storage import STATE_DTYPES
from keras_adam.torch_api import TorchVocabulary


class _OfDefaultGroup:
    """An attribute of the optimizer that is a hyperparameter of its default group."""

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, optimizer, owner=None):
        return self if optimizer is None else optimizer._default_group.own(self.name)

    def __set__(self, optimizer, value):
        optimizer._views[optimizer._default_group][self.name] = value


class _OptionOfDefaultGroup(_OfDefaultGroup):
    """An option of the default group; constant, as it changes the formula."""

    def __get__(self, optimizer, owner=None):
        return self if optimizer is None else getattr(optimizer._default_group.options, self.name)


class _Skipping(Setting):
    """An option that needs a count of the steps that it skips."""

    def __set__(self, optimizer, value):
        super().__set__(optimizer, value)
        optimizer._prepare_skipping()


class _Lazy(Setting):
    """The option that decides, of state in 8 bits, whether a block may go beyond a row."""

    def decides_state(self, optimizer):
        return any(optimizer._state_dtype_of(group) == "8bit" for group in optimizer._groups)


@keras.saving.register_keras_serializable("keras_adam")
class Adam(TorchVocabulary, KerasVocabulary):
    """Adam: a drop-in for `keras.optimizers.Adam` with the options of `torch.optim.Adam`.

    With its defaults it computes what `keras.optimizers.Adam` computes, on each backend. The hyperparameters
    `learning_rate`, `beta_1`, `beta_2`, `epsilon` and `weight_decay` each take a number, a scalar tensor, a
    `keras.optimizers.schedules.LearningRateSchedule`, or a callable without arguments that returns a number or a
    scalar tensor. All arithmetic is done in float32 at least, so that float16 and bfloat16 variables train.

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
        use_ema: Whether to keep an exponential moving average of the weights, in float32 for variables of half
            precision (with which Keras's callback `SwapEMAWeights` fails on TensorFlow). Defaults to `False`.
        ema_momentum: Decay rate of that average, in [0, 1]. Defaults to `0.99`.
        ema_overwrite_frequency: Number of updates after which the weights are overwritten with their average, each
            time. Defaults to `None`: only at the end of `fit`.
        loss_scale_factor: Factor by which the loss is multiplied; the gradients are divided by it again. Defaults to
            `None`.
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
        param_groups: List of dictionaries, each `{"params": selector, option: value, ...}`: other hyperparameters for
            some variables. A selector is a regular expression that matches the whole of a variable's `path`, a
            variable, a layer, a predicate `variable -> bool`, or a list of these. A variable belongs to the first
            group that selects it; the others follow this constructor's arguments. The options are
            `learning_rate` (a rate of the group's own), `learning_rate_multiplier` (times the optimizer's current
            rate), `beta_1`, `beta_2`, `epsilon`, `weight_decay`, `amsgrad`, `decoupled_weight_decay`, `epsilon_hat`,
            `maximize` and `state_dtype`; PyTorch's `lr`, `betas` and `eps` work too. Defaults to `None`: no groups.

        state_dtype: How the moments are kept, `"float32"`, `"bfloat16"` or `"8bit"`; a parameter group may have its
            own. In bfloat16 they are rounded up or down so that the error is zero on average, and do not stall. In
            8 bits too, relative to the largest of a block of 256, which takes 2.03 bytes per element for both moments.
            Variables of float64 and those under 4,096 elements are not kept in 8 bits (with `lazy`, nor those with
            rows under 64). Defaults to `None`: float32 for variables of half precision, else the variable's own dtype.
        kahan_sum: Whether variables of half precision (bfloat16, float16) keep their rounding errors, in a state
            variable of their dtype, so that steps smaller than their spacing add up. Other variables have none.
            Defaults to `None`, the same as `True`. `False` rounds to nearest.
        skip_nonfinite: Whether a step whose gradients hold an infinity or a NaN changes nothing but
            `optimizer.skipped_steps`. With `gradient_accumulation_steps`, only that call's gradients are left out. On
            PyTorch this reads one number per step from the device. Defaults to `False`.
        skip_spikes: Number of standard deviations: a step is skipped, as by `skip_nonfinite`, which this includes, if
            the norm of its gradients, all together and before clipping, lies more than that above the mean, and is
            more than three times the largest. Mean, deviation and largest are those of the steps among the last 128
            that were not skipped. With fewer than 64 of them no norm is too large, so that one that stays high is
            taken after some time. With `gradient_accumulation_steps` each call counts. OLMo-core, Levanter and
            MaxText use `6.0`. Defaults to `None`: no step is skipped for its norm.
        lazy: Whether a sparse gradient (TensorFlow's `IndexedSlices`, as an embedding has it; JAX's `BCOO`; PyTorch's
            sparse tensors) updates only the rows that it touches, as `torch.optim.SparseAdam` does: the moments of the
            others do not decay, and weight decay leaves them alone. Not with `gradient_accumulation_steps`. Defaults
            to `False`: the result is that of the dense gradient. With and without `lazy`, TensorFlow leaves out rows of
            negative indices, and JAX counts them from the end, as in their dense gradients.
        shard_state: Whether each data-parallel device keeps its part of the state (moments, averages, accumulators,
            compensations) and makes its part of the update (ZeRO, stage 1). On JAX under a `keras.distribution` the
            first axis that the number of devices divides is split, and a variable without such an axis has its
            state whole. On PyTorch with an initialized process group all elements are laid end to end and cut into
            stretches of as many bytes. Else, and on TensorFlow, the state stays whole. Results are the same, and so
            are files; several processes save together, by `keras_adam.save_model`. Defaults to `False`.
        monitor: Whether to measure the norm of the gradients, the share of clipped and skipped steps, and how far
            steps move the weights, for `monitored()` and `keras_adam.OptimizerMonitor`. `True` measures one update in
            32, a number one in so many, as to read all gradients once more in each would take a seventh of the time
            of an update. Of a variable of more than 512 elements some 512 tell how far it moves. Defaults to `False`.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong kind.

    References:
        - [Kingma & Ba, 2015: Adam](https://arxiv.org/abs/1412.6980)
        - [Loshchilov & Hutter, 2019: decoupled weight decay](https://arxiv.org/abs/1711.05101)
        - [Reddi et al., 2018: AMSGrad](https://arxiv.org/abs/1904.09237)
        - [Rajbhandari et al., 2020: ZeRO](https://arxiv.org/abs/1910.02054)
        - `skip_spikes`: [OLMo-core's `SkipStepOptimizer`](https://github.com/allenai/OLMo-core)

    Examples:
        >>> import keras, keras_adam
        >>> weight = keras.Variable([1.0, -2.0])
        >>> optimizer = keras_adam.Adam(learning_rate=0.1)
        >>> optimizer.apply([keras.ops.array([0.5, -3.0])], [weight])
        >>> [round(float(w), 4) for w in weight.numpy()]
        [0.9, -1.9]
    """

    _learning_rate: Any

    beta_1 = _OfDefaultGroup()
    beta_2 = _OfDefaultGroup()
    epsilon = _OfDefaultGroup()
    weight_decay = _OfDefaultGroup()
    amsgrad = _OptionOfDefaultGroup()
    decoupled_weight_decay = _OptionOfDefaultGroup()
    epsilon_hat = _OptionOfDefaultGroup()
    maximize = _OptionOfDefaultGroup()
    clipnorm = Setting(settings.limit)
    clipvalue = Setting(settings.limit)
    global_clipnorm = Setting(settings.limit)
    use_ema = Setting(settings.one_of(True, False), makes_state=True)
    ema_momentum = Setting(hyperparameters.check_number)
    ema_overwrite_frequency = Setting(settings.count(1))
    loss_scale_factor = Setting(settings.limit)
    gradient_accumulation_steps = Setting(settings.count(2), makes_state=True)
    state_dtype = Setting(settings.one_of(*STATE_DTYPES), makes_state=True)
    kahan_sum = Setting(settings.one_of(None, True, False), makes_state=True)
    skip_nonfinite = _Skipping(settings.one_of(True, False))
    skip_spikes = _Skipping(settings.limit)
    monitor = Setting(settings.interval(EVERY), makes_state=True)
    lazy = _Lazy(settings.one_of(True, False))
    shard_state = Setting(settings.one_of(True, False), makes_state=True)

    @argument_hints.variables_come_later
    @argument_hints.names_are_known
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
        param_groups: list[dict[str, Any]] | None = None,
        state_dtype: str | None = None,
        kahan_sum: bool | None = None,
        skip_nonfinite: bool = False,
        skip_spikes: float | None = None,
        lazy: bool = False,
        shard_state: bool = False,
        monitor: bool | int = False,
    ):
        numeric = {
            "beta_1": beta_1,
            "beta_2": beta_2,
            "epsilon": epsilon,
            "weight_decay": weight_decay,
        }
        choices = {
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
            "epsilon_hat": epsilon_hat,
            "maximize": maximize,
        }
        # Before Keras's constructor, which sets `weight_decay`.
        self._init_groups(numeric, groups.check_options(rule.Options(), choices), param_groups)
        learning_rate = hyperparameters.check("learning_rate", learning_rate)
        dynamic = hyperparameters.is_dynamic(learning_rate)
        # Checked before Keras's constructor makes its own checks; checked again when they are set.
        of_keras = {
            "clipnorm": clipnorm,
            "clipvalue": clipvalue,
            "global_clipnorm": global_clipnorm,
            "use_ema": use_ema,
            "ema_momentum": ema_momentum,
            "ema_overwrite_frequency": ema_overwrite_frequency,
            "loss_scale_factor": loss_scale_factor,
            "gradient_accumulation_steps": gradient_accumulation_steps,
        }
        of_keras = {
            key: getattr(type(self), key).check(key, value) for key, value in of_keras.items()
        }
        super().__init__(
            learning_rate=learning_rate if dynamic else _unset_learning_rate,
            weight_decay=self.weight_decay,
            name=name,
            **of_keras,
        )
        self.state_dtype = state_dtype
        self.kahan_sum = kahan_sum
        self.lazy = lazy
        self.shard_state = shard_state
        self.monitor = monitor
        self._skipped_steps = self._recent_norms = None  # until `build`
        self.skip_nonfinite = skip_nonfinite
        self.skip_spikes = skip_spikes
        if not dynamic:
            self.learning_rate = learning_rate
        self._decay_exclusions = DecayExclusions()

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
        if isinstance(self._learning_rate, keras.Variable):
            check_held(self._learning_rate, "learning_rate", learning_rate)
        if not self._engine.is_compiling():
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

    def learning_rate_number(self) -> float:
        """Return the current learning rate as a Python float, at its shortest: 0.001, not 0.0010000000474974513."""
        rate = self.learning_rate
        if isinstance(rate, keras.Variable):
            return hyperparameters.exact(rate.numpy(), self._given_learning_rate)
        return float(rate)

    def _readable_learning_rate(self) -> Any:
        """Return the schedule or callable, or the number; if that cannot be read now, as it was given."""
        if not isinstance(self._learning_rate, keras.Variable):
            return self._learning_rate
        return hyperparameters.readable(self.learning_rate_number, self._given_learning_rate)

    def _get_current_learning_rate(self):
        rate = self._learning_rate
        if isinstance(rate, keras.Variable):
            return rate
        return hyperparameters.resolve(
            "learning_rate", rate, self._iterations, self._engine.is_compiling()
        )

    def __repr__(self) -> str:
        of_group = (*groups.NUMERIC, *rule.Options._fields)
        values = {"learning_rate": self._readable_learning_rate()}
        for name, default in _defaults(type(self)).items():
            value = self._default_group.readable(name) if name in of_group else getattr(self, name)
            if name not in _SHOWN_APART and value != default:
                values[name] = value
        shown = [f"{name}={hyperparameters.shown(value)}" for name, value in values.items()]
        if self._has_groups:
            shown.append(f"{len(self._groups)} param_groups")
        return f"<{type(self).__name__} {', '.join(shown)}>"

    # Weight decay and groups

    def exclude_from_weight_decay(self, var_list=None, var_names=None) -> None:
        """Exclude variables from weight decay, in addition to those excluded before.

        Args:
            var_list: List of variables to exclude. Defaults to None.
            var_names: List of regular expressions; a variable is excluded if one is found in its `path` or `name`:
                `["bias"]` excludes all biases. Defaults to None.

        Raises:
            ValueError: If the optimizer is already built.
            TypeError: If `var_names` is a string.
        """
        if self._parameters:
            raise ValueError(
                "`exclude_from_weight_decay()` can only be configured before the optimizer is built."
            )
        if isinstance(var_names, str):
            raise TypeError(
                f"`var_names` must be a list of strings. Received: var_names={var_names!r}"
            )
        variables = {self._var_key(v): v for v in var_list or []}
        self._decay_exclusions.add(variables, var_names or [])

    def _use_weight_decay(self, variable) -> bool:
        return not self._decay_exclusions.hold(self._var_key(variable), variable)

    # Configuration

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make an equal optimizer, without its state.

        The keys are those of `keras.optimizers.Adam`, and those of our own options that were changed.
        """
        config = super().get_config()
        if isinstance(self._learning_rate, keras.Variable):
            config["learning_rate"] = self.learning_rate_number()
        for name in ("beta_1", "beta_2", "epsilon", "weight_decay"):
            value = getattr(self, name)
            dynamic = hyperparameters.is_dynamic(value)
            config[name] = keras.saving.serialize_keras_object(value) if dynamic else value
        config["amsgrad"] = self.amsgrad
        for name, default in rule.Options._field_defaults.items():
            if name != "amsgrad" and getattr(self, name) != default:
                config[name] = getattr(self, name)
        for name, default in _OWN_OPTIONS.items():
            if getattr(self, name) != default:
                config[name] = getattr(self, name)
        if self._has_groups:
            place = self._groups.index(self._default_group)
            described = [
                None if g is self._default_group else g.get_config(self._parameters.variables)
                for g in self._groups
            ]
            config["param_groups"] = described[:place]
            if described[place + 1 :]:
                config["added_param_groups"] = described[place + 1 :]
        implementation = self._default_group.unusual_implementation()
        if implementation:
            config["torch_implementation"] = implementation
        if self._decay_exclusions:
            config["exclude_from_weight_decay"] = self._decay_exclusions.get_config()
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Return the optimizer that `config`, from `get_config`, describes. `config` is not changed."""
        config = _deserialize(config, groups.NUMERIC, custom_objects)
        exclusions = config.pop("exclude_from_weight_decay", None)
        added = config.pop("added_param_groups", [])
        implementation = config.pop("torch_implementation", {})
        if config.get("param_groups"):
            config["param_groups"] = [
                _deserialize(g, groups.NUMERIC, custom_objects) for g in config["param_groups"]
            ]
        optimizer = cls(**config)
        optimizer._default_group.set_implementation(implementation)
        for spec in added:
            spec = _deserialize(spec, groups.NUMERIC, custom_objects)
            label = f"param_groups[{len(optimizer._groups)}]"
            optimizer._groups.append(groups.parse(label, spec, optimizer._default_group))
        if exclusions:
            optimizer._decay_exclusions.add_config(exclusions)
        return optimizer


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

    Examples:
        >>> import keras_adam
        >>> keras_adam.AdamW(1e-3).weight_decay
        0.004
    """

    @argument_hints.variables_come_later
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

    @classmethod
    @argument_hints.variables_come_later
    def with_torch_arguments(
        cls, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, amsgrad=False, **options
    ):
        """Return an optimizer that computes what `torch.optim.AdamW` does; it takes the arguments of `Adam`'s method.

        The defaults are PyTorch's for AdamW: `weight_decay=0.01`, and `decoupled_weight_decay=True`.
        """
        options = {"decoupled_weight_decay": True, **options}
        return super().with_torch_arguments(lr, betas, eps, weight_decay, amsgrad, **options)


# Options that Keras's Adam lacks, besides those of the rule.
_OWN_OPTIONS = {
    "state_dtype": None,
    "kahan_sum": None,
    "skip_nonfinite": False,
    "skip_spikes": None,
    "lazy": False,
    "shard_state": False,
    "monitor": 0,
}
_SHOWN_APART = ("learning_rate", "param_groups", "name")


def _defaults(optimizer_class) -> dict[str, Any]:
    """Return the arguments of `Adam`, in its order, with the class's defaults."""
    defaults = dict.fromkeys(inspect.signature(Adam).parameters)
    for base in reversed(optimizer_class.__mro__):
        for name, parameter in inspect.signature(base.__init__).parameters.items():
            if name in defaults:
                defaults[name] = parameter.default
    return defaults


def _unset_learning_rate() -> float:
    """Stand in for the learning rate while Keras's constructor runs, which accepts no number but a float."""
    return 0.0


def _deserialize(config: dict[str, Any], names, custom_objects) -> dict[str, Any]:
    """Return a copy in which schedules and callables among the named values are objects again."""
    return {
        name: keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)
        if name in names and isinstance(value, dict)
        else value
        for name, value in config.items()
    }
