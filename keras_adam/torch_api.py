"""PyTorch's vocabulary, for people who port: its argument names, its state format, its ways to step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_adam import habits, hyperparameters, rule, seams, torch_names
from keras_adam.groups import ParamGroup, check_implementation, check_pair
from keras_adam.layouts import Layouts
from keras_adam.paths import path_of
from keras_adam.state import State

# Between PyTorch's names in a state dict and ours.
_MOMENTS = {
    "exp_avg": "momentum",
    "exp_avg_sq": "velocity",
    "max_exp_avg_sq": "velocity_hat",
}
_PYTORCH_NAMES = {"learning_rate": "lr", "beta_1": "betas", "beta_2": "betas", "epsilon": "eps"}
_IMPLEMENTATION = ("foreach", "capturable", "differentiable", "fused")
_SHOWN = 5  # so many names are printed


class TorchVocabulary(State):
    """Methods with the names of `torch.optim.Optimizer`'s."""

    @property
    def lr(self):
        """Refuse the name of PyTorch and Keras 2, which would be set without effect."""
        raise AttributeError(
            f"{type(self).__name__} has no attribute `lr`: write `learning_rate`, which can be read and set."
        )

    @lr.setter
    def lr(self, value):
        raise AttributeError(
            f"{type(self).__name__} has no attribute `lr`: write `optimizer.learning_rate = {value!r}`. "
            f"Received: lr={value!r}"
        )

    @classmethod
    @habits.variables_come_later
    def with_torch_arguments(
        cls,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0,
        amsgrad=False,
        *,
        foreach=None,
        maximize=False,
        capturable=False,
        differentiable=False,
        fused=None,
        decoupled_weight_decay=False,
        param_groups=None,
        **keras_options,
    ):
        """Return an optimizer that computes what `torch.optim.Adam`, or `AdamW`, does with these arguments.

        Args:
            lr: Learning rate. Defaults to `1e-3`.
            betas: Pair of decay rates, of the first and the second moment. Defaults to `(0.9, 0.999)`.
            eps: Epsilon of Algorithm 1, added after the bias correction. Defaults to `1e-8`.
            weight_decay: Strength of the weight decay. Defaults to `0`; of `AdamW`, to `0.01`.
            amsgrad: As in the constructor. Defaults to `False`.
            foreach: PyTorch's choice of an implementation, as `capturable` and `fused` are: without effect here, and
                written by `state_dict`, so that PyTorch goes on with it. Defaults to `None`.
            maximize: Whether to ascend. Defaults to `False`.
            capturable: See `foreach`. Defaults to `False`.
            differentiable: Must be `False`: nothing can be differentiated through a step. Defaults to `False`.
            fused: See `foreach`; not both True. Defaults to `None`.
            decoupled_weight_decay: `False`: an L2 penalty, as `torch.optim.Adam`; `True`: as `torch.optim.AdamW`.
                Defaults to `False`; of `AdamW`, to `True`.
            param_groups: As in the constructor. Defaults to `None`.
            **keras_options: Any other argument of the constructor, such as `clipnorm` or `use_ema`.

        Raises:
            ValueError: If an argument is out of its range, `differentiable` is True, or `foreach` and `fused` are.
            TypeError: If an argument is unknown or of a kind that cannot serve.

        Examples:
            >>> import keras_adam
            >>> keras_adam.Adam.with_torch_arguments(lr=3e-4, weight_decay=0.01).epsilon
            1e-08
        """
        beta_1, beta_2 = check_pair(betas)
        choices = (foreach, capturable, differentiable, fused)
        implementation = check_implementation(dict(zip(_IMPLEMENTATION, choices, strict=True)))
        for name, instead in _PYTORCH_NAMES.items():
            if name in keras_options:
                raise TypeError(
                    f"`with_torch_arguments` takes PyTorch's names: write `{instead}=` for `{name}`. "
                    f"Received: {name}={keras_options[name]!r}"
                )
        optimizer = cls(
            learning_rate=lr,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            decoupled_weight_decay=decoupled_weight_decay,
            epsilon_hat=keras_options.pop("epsilon_hat", False),
            param_groups=param_groups,
            **keras_options,
        )
        for group in reversed(
            optimizer._groups
        ):  # the default group first, which the others follow
            group.set_implementation(implementation if group is optimizer._default_group else {})
        return optimizer

    # State

    @seams.without_autocast()
    def state_dict(
        self,
        variables: Sequence[Any] | None = None,
        *,
        convert: Callable | None = None,
        as_numpy: bool = False,
    ) -> dict[str, Any]:
        """Return the state as `torch.optim.Adam.state_dict` does; its `load_state_dict` takes it.

        Args:
            variables: The variables, or their paths, in the order of PyTorch's parameters; all of them. Defaults to
                the order in which the optimizer was built.
            convert: Function `(variable, array) -> array` that brings an array of the variable's shape into PyTorch's
                layout, or returns None for the default: kernels transposed or permuted, all else as it is. What a
                variable is, is told by Keras's own names: a DepthwiseConv2D or EinsumDense that was given another
                name needs it, and so does a Dense after a Flatten, whose rows PyTorch has in the order of channels
                first. Defaults to `None`.
            as_numpy: Whether to return NumPy arrays rather than PyTorch's tensors; without PyTorch there are no
                others. Defaults to `False`.

        Each group has `param_names`, as of an optimizer that was given `named_parameters()`: the variables' paths, by
        which `load_state_dict` knows them again.

        PyTorch's `eps` is that of Algorithm 1: an optimizer with `epsilon_hat=True`, Keras's default, goes on there
        with an epsilon that differs while the bias correction lasts.

        Raises:
            ValueError: If the optimizer is not built, `variables` are not its variables, or a group has
                `amsgrad="corrected"`, whose maximum PyTorch's format cannot hold.
            ImportError: If PyTorch is not installed and `as_numpy` is False.
        """
        packed = self._packed(variables)
        for group, _ in packed:
            if group.options.amsgrad == "corrected":
                raise ValueError(
                    "PyTorch's format holds AMSGrad's maximum of the raw second moment only; `model.save` keeps any. "
                    "Received: a parameter group with amsgrad='corrected'"
                )
        layouts = Layouts(self._parameters.variables, convert)
        wrap = np.array if as_numpy else _torch().from_numpy
        number, state = 0, {}
        dictionaries = []
        for group, members in packed:
            dictionaries.append(
                {
                    "lr": group.number("learning_rate"),
                    "betas": (group.number("beta_1"), group.number("beta_2")),
                    "eps": group.number("epsilon"),
                    "weight_decay": group.number("weight_decay"),
                    **{name: group[name] for name in rule.Options._fields},
                    **{name: group[name] for name in _IMPLEMENTATION},
                    "params": list(range(number, number + len(members))),
                    "param_names": [
                        path_of(self._parameters.variables[index]) for index in members
                    ],
                }
            )
            for index in members:
                moments = self._torch_state(index, layouts)
                if moments is not None:
                    state[number] = {name: wrap(array) for name, array in moments.items()}
                number += 1
        return {"state": state, "param_groups": dictionaries}

    def load_state_dict(
        self,
        state_dict: dict[str, Any],
        variables: Sequence[Any] | None = None,
        *,
        mapping: Mapping[str, Any] | None = None,
        convert: Callable | None = None,
    ) -> None:
        """Take over the state and the hyperparameters of a `torch.optim.Adam` or `AdamW`; or of `state_dict`.

        The optimizer must be built, with as many groups as the state dict has, each of as many variables. Arrays may be
        PyTorch's tensors or NumPy's. A learning-rate schedule stays; a number is replaced by `lr`.

        The state dict of an optimizer that was given `named_parameters()` holds `param_names`. The names decide, and
        not the order, if each name and each variable has its counterpart. A name means the path that is the same but
        for separators, enclosing names and the last word: "weight" is a kernel, gamma, scale or embeddings, and "bias"
        a bias or beta. So "encoder.layer.0.norm.weight" is "model/encoder/layer_0/norm/gamma".

        Otherwise the order decides. A name that contradicts it is refused: one that means a variable at another
        place; "weight" where the order has a bias; and, unless `variables` gives the order, "2.weight" before
        "0.weight". A state dict without `param_names` goes by the order alone.

        Args:
            state_dict: What `torch.optim.Adam.state_dict()` returned, or what `torch.load(..., weights_only=True)`
                read of it.
            variables: The variables, or their paths, in the order of PyTorch's parameters; all of them. Defaults to
                the order in which the optimizer was built.
            mapping: For names that cannot be told, or mean something else here: dictionary from PyTorch's name to the
                variable or its path. Defaults to `None`.
            convert: Function `(variable, array) -> array` that brings PyTorch's array into the variable's layout, or
                returns None for the default: kernels transposed or permuted, all else as it is. Defaults to `None`.

        Raises:
            ValueError: If anything does not fit; the error names the first difference, and nothing is assigned.
        """
        packed = self._packed(variables)
        _check_format(state_dict, len(packed))
        packed = self._packed_by_name(
            state_dict["param_groups"], packed, mapping, variables is None
        )
        parameters = _parameters(state_dict, packed)
        names = dict(zip(parameters, _names_of(state_dict["param_groups"]), strict=False))
        of_keras = [
            self._parameters.variables[parameters[n]]
            for n in names
            if torch_names.of_keras(names[n])
        ]
        layouts = Layouts(self._parameters.variables, convert, alike=of_keras)
        plan, steps = [], [0] * len(self._parameters)
        for number, index in parameters.items():
            moments = state_dict["state"].get(number)
            amsgrad = bool(self._parameters.records[index].group.options.amsgrad)
            steps[index], arrays = layouts.read_moments(
                self._parameters.variables[index], moments, amsgrad
            )
            plan.append((index, arrays))
        changes = [self._check_torch_group(i, packed, state_dict) for i in range(len(packed))]
        implementations = {
            group: check_implementation({n: saved.get(n, group[n]) for n in _IMPLEMENTATION})
            for (group, _), saved in zip(packed, state_dict["param_groups"], strict=True)
        }
        last = max(steps, default=0)
        joined = [last - step for step in steps]
        self._loading.check_joined(joined)
        # From here on nothing can fail.
        for (group, _), (options, numbers) in zip(packed, changes, strict=True):
            group.options = options
            group.update(numbers)
        for group in sorted(implementations, key=lambda g: g is not self._default_group):
            group.set_implementation(implementations[group])
        for index, arrays in plan:
            for name, attribute in _MOMENTS.items():
                array = self._parameters.records[index].array(attribute)
                if array is not None:
                    array.assign(arrays[name])
        self._iterations.assign(last * (self.gradient_accumulation_steps or 1))
        if self.gradient_accumulation_steps:
            self._engine.reset(self._parameters.first_arrays("accumulator"))
        self._loading.set_joined(joined)

    def _packed(self, variables) -> list[tuple[ParamGroup, list[int]]]:
        """Return the groups that have variables, each with their indices, in PyTorch's order."""
        if not self._parameters:
            raise ValueError(
                "The optimizer has no state yet: call `optimizer.build(variables)` first."
            )
        order = range(len(self._parameters)) if variables is None else self._order(variables)
        packed = [
            (g, [i for i in order if self._parameters.records[i].group is g]) for g in self._groups
        ]
        return [(group, members) for group, members in packed if members]

    def _packed_by_name(
        self, saved, packed, mapping, by_build: bool
    ) -> list[tuple[ParamGroup, list[int]]]:
        """Return the groups in the state dict's order, each with its variables, if names can tell; else `packed`.

        `by_build`: the order in `packed` is that of `build`, and not one that the caller gave.
        """
        names = _names_of(saved)
        given = self._check_mapping(mapping, names)
        taken = set(given.values())
        if not names:
            return packed
        paths = [path_of(v) for v in self._parameters.variables]
        order = [index for _, members in packed for index in members]
        meant = {
            position: index
            for position, index in torch_names.meanings(names, paths).items()
            if names[position] not in given and index not in taken
        }
        meant |= {i: given[name] for i, name in enumerate(names) if name in given}
        if len(meant) == len(names) == len(paths):
            if not by_build and [meant[i] for i in range(len(names))] != order:
                _check_order(saved, paths, meant, order, by_build, renumbered=False)
            return self._grouped_as(saved, names, meant)
        if [len(group["params"]) for group in saved] == [len(members) for _, members in packed]:
            _check_order(saved, paths, meant, order, by_build, renumbered=not given)
        return packed

    def _grouped_as(self, saved, names, meant) -> list[tuple[ParamGroup, list[int]]]:
        """Return the groups in the state dict's order, each with its variables, as the names have them."""
        packed, position = [], 0
        for i, theirs in enumerate(saved):
            members = [meant[position + k] for k in range(len(theirs["params"]))]
            groups = {
                id(group): group
                for group in (self._parameters.records[index].group for index in members)
            }
            if len(groups) != 1:
                raise ValueError(
                    f"`param_groups[{i}]` of the state dict must hold the variables of one group of the optimizer. "
                    f"Received: {_some(names[position : position + len(members)])}, of {len(groups)} groups"
                )
            packed.append((next(iter(groups.values())), members))
            position += len(members)
        return packed

    def _check_mapping(self, mapping, names: list[str]) -> dict[str, int]:
        """Return which variable each name of `mapping` means."""
        mapping = {} if mapping is None else mapping
        if not isinstance(mapping, Mapping):
            raise TypeError(
                "`mapping` must be a dictionary from names of PyTorch's parameters to variables or their paths. "
                f"Received: mapping={mapping!r}"
            )
        values = self._indices(mapping.values(), "The values of `mapping`")
        given = dict(zip(mapping, values, strict=True))
        for name in given:
            if names.count(name) != 1:
                raise ValueError(
                    "The keys of `mapping` must each stand once in the `param_names` of the state dict, which hold "
                    f"{_some(names)}. Received: {name!r}"
                )
        if len(set(given.values())) < len(given):
            raise ValueError(
                f"`mapping` must give each name a variable of its own. Received: mapping={mapping!r}"
            )
        return given

    def _indices(self, variables, argument: str) -> list[int]:
        """Return the indices of some of the optimizer's variables, or of their paths."""
        paths = [path_of(v) for v in self._parameters.variables]
        by_path = {path: i for i, path in enumerate(paths)}
        indices = []
        for variable in variables:
            if isinstance(variable, str):
                index = by_path.get(variable)
            else:
                index = self._trainable_variables_indices.get(self._var_key(variable))
            if index is None:
                name = variable if isinstance(variable, str) else path_of(variable)
                raise ValueError(f"{argument} must be the optimizer's. Received: '{name}'")
            if isinstance(variable, str) and paths.count(variable) > 1:
                raise ValueError(
                    f"{argument} must be variables where a path means several. Received: '{variable}'"
                )
            indices.append(index)
        return indices

    def _order(self, variables) -> list[int]:
        indices = self._indices(variables, "`variables`")
        if sorted(indices) != list(range(len(self._parameters))):
            missing = [
                path_of(v) for i, v in enumerate(self._parameters.variables) if i not in indices
            ]
            raise ValueError(
                "`variables` must hold each of the optimizer's variables once. Received: "
                f"{len(indices)}, without {missing}"
            )
        return indices

    def _torch_state(self, index: int, layouts: Layouts) -> dict[str, np.ndarray] | None:
        parameter = self._parameters.records[index]
        if parameter.momentum is None:
            return None
        step, late = int(ops.convert_to_numpy(self.iterations)), parameter.joined
        joined = 0 if late is None else int(ops.convert_to_numpy(late.update))
        step -= joined if joined <= step else 0  # the count was set back: `_begin_again`
        if step <= 0:
            return None  # as a parameter that has never had a gradient
        moments = {"step": np.array(step, "float32")}
        for name, attribute in _MOMENTS.items():
            array = parameter.array(attribute)
            if array is not None:
                moments[name] = layouts.to_torch(parameter.variable, self._engine.whole(array))
        return moments

    def _check_torch_group(self, index: int, packed, state_dict: dict[str, Any]):
        """Return the options of a saved group, and the numbers in which it differs from ours, all checked."""
        group, saved = packed[index][0], state_dict["param_groups"][index]
        options = group.options
        for name in rule.Options._fields:
            default = {"decoupled_weight_decay": options.decoupled_weight_decay}.get(name, False)
            value = saved.get(name, default)
            if value == getattr(options, name):
                continue
            if name == "amsgrad" or self._trace.is_traced:
                raise ValueError(
                    f"`param_groups[{index}]` of the state dict has {name}={value!r}, but the optimizer was "
                    f"{'compiled' if self._trace.is_traced else 'built'} with {name}={getattr(options, name)!r}. "
                    "Create the optimizer with that value (`with_torch_arguments` has PyTorch's) and load again"
                )
            options = options._replace(**{name: value})
        given = dict(zip(("beta_1", "beta_2"), check_pair(saved["betas"]), strict=True))
        given |= {"epsilon": saved["eps"], "weight_decay": saved["weight_decay"]}
        if not group.follows_schedule() and not self._will_follow(
            group, saved["lr"], packed, state_dict
        ):
            given["learning_rate"] = saved["lr"]
        numbers = {}
        for name, value in given.items():
            value = hyperparameters.check_number(name, value)
            if value != group.number(name):
                if not (name == "learning_rate" and group is self._default_group):
                    group.check_settable(name, value)
                numbers[name] = value
        return options, numbers

    def _will_follow(self, group: ParamGroup, rate, packed, state_dict) -> bool:
        """Whether a group that follows the optimizer's rate will have `rate` once that is loaded, and goes on so."""
        if group is self._default_group or group.own("learning_rate") is not None:
            return False
        base = self.learning_rate_number()
        for (other, _), saved in zip(packed, state_dict["param_groups"], strict=True):
            if other is self._default_group:
                base = float(saved["lr"])
        followed = base * group.own("learning_rate_multiplier")
        return bool(np.isclose(followed, float(rate), rtol=1e-6, atol=0))

    # Steps

    def minimize(self, loss_fn: Callable[[], Any], variables: Iterable[Any] | None = None):
        """Compute the loss, differentiate it, and apply the gradients.

        Args:
            loss_fn: Function without arguments that returns the scalar loss, computed from the variables.
            variables: The variables to update. Defaults to those that the optimizer was built with.

        Returns:
            The loss before the step, unscaled.

        Raises:
            ValueError: If `variables` is None and the optimizer is not built.

        Examples:
            >>> import keras, keras_adam
            >>> weight = keras.Variable(3.0)
            >>> optimizer = keras_adam.Adam(0.5)
            >>> losses = [optimizer.minimize(lambda: (weight - 1) ** 2, [weight]) for _ in range(3)]
            >>> [round(float(loss), 2) for loss in losses]
            [4.0, 2.25, 1.02]
        """
        if variables is None:
            if not self._parameters:
                raise ValueError(
                    "`minimize` needs `variables`, as the optimizer is not built. Received: variables=None"
                )
            variables = self._trainable_variables
        variables = list(variables)
        loss, grads = self._engine.differentiate(loss_fn, variables)
        self.apply(grads, variables)
        return loss

    def step(self, closure: Callable[[], Any] | None = None):
        """Minimize the loss that `closure` returns over the variables that the optimizer was built with.

        Args:
            closure: Function without arguments that returns the loss. On the PyTorch backend it may call
                `loss.backward()` itself, and may be left out if that was done: then the variables' `.grad` is applied,
                if there is any. With `loss_scale_factor`, what is differentiated so must be
                `optimizer.scale_loss(loss)`. Defaults to `None`.

        Returns:
            The loss before the step, or None without a closure.

        Raises:
            ValueError: If the optimizer is not built, or `closure` is None on another backend than PyTorch.
        """
        if not self._parameters:
            raise ValueError(
                "`step` needs a built optimizer: call `optimizer.build(variables)` first."
            )
        if closure is None:
            grads = self._engine.stored_gradients()
            if any(g is not None for g in grads):
                self.apply(grads, self._trainable_variables)
            return None
        return self.minimize(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients that PyTorch keeps on the variables; elsewhere there are none, and nothing happens.

        Args:
            set_to_none: Whether `.grad` becomes None rather than zeros. Defaults to `True`.
        """
        self._engine.clear_gradients(set_to_none)


def _check_format(state_dict, groups: int) -> None:
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            "`state_dict` must be a dictionary with 'state' and 'param_groups'. "
            f"Received: {sorted(state_dict) if isinstance(state_dict, dict) else state_dict!r}"
        )
    saved = state_dict["param_groups"]
    if len(saved) != groups:
        raise ValueError(
            f"`state_dict` must have as many parameter groups as the optimizer has with variables, {groups}. "
            f"Received: {len(saved)}"
        )
    for i, group in enumerate(saved):
        for name in ("lr", "betas", "eps", "weight_decay", "params"):
            if name not in group:
                raise ValueError(f"`param_groups[{i}]` of the state dict lacks '{name}'.")


def _parameters(state_dict, packed) -> dict[int, int]:
    """Return which of our variables each of PyTorch's parameters is."""
    parameters: dict[int, int] = {}
    for i, ((_, members), group) in enumerate(zip(packed, state_dict["param_groups"], strict=True)):
        if len(group["params"]) != len(members):
            raise ValueError(
                f"`param_groups[{i}]` of the state dict must have {len(members)} parameters, as the optimizer's. "
                f"Received: {len(group['params'])}"
            )
        parameters.update(zip(group["params"], members, strict=True))
    unknown = set(state_dict["state"]) - set(parameters)
    if unknown:
        raise ValueError(
            f"`state_dict` has state of parameters that are in no group. Received: {sorted(unknown)}"
        )
    return parameters


def _names_of(groups) -> list[str]:
    """Return the `param_names` of all groups, one behind the other; none if there are none.

    Of `torch.distributed`'s state dicts, parameters bear names in the place of numbers.
    """
    names: list[str] = []
    parameters = [parameter for group in groups for parameter in group["params"]]
    of_params = all(isinstance(parameter, str) for parameter in parameters)
    if not of_params and not any("param_names" in group for group in groups):
        return names
    for i, group in enumerate(groups):
        some = group.get("param_names", group["params"] if of_params else [])
        if not isinstance(some, list | tuple) or not all(isinstance(name, str) for name in some):
            raise ValueError(
                f"`param_names` of `param_groups[{i}]` of the state dict must be a list of strings. "
                f"Received: param_names={some!r}"
            )
        if len(some) != len(group["params"]):
            raise ValueError(
                f"`param_groups[{i}]` of the state dict must have a name for each of its {len(group['params'])} "
                f"parameters. Received: {len(some)} in `param_names`"
            )
        names += some
    return names


def _check_order(saved, paths, meant, order, by_build: bool, renumbered: bool) -> None:
    """Raise if the names contradict the order, which decides where not all names tell what they mean.

    `meant` are the variables of those that do. An order that the caller gave, not `by_build`, is contradicted by
    nothing that is only likely.
    """
    names = _names_of(saved)
    in_order = [paths[index] for index in order]
    likely = torch_names.renumbered(names, in_order) if renumbered else {}
    if likely and all(i == j for i, j in likely.items()):
        return
    if by_build:
        meant = {i: order[j] for i, j in likely.items()} | meant
    for i, index in enumerate(order):
        if meant.get(i, index) != index:
            raise _contradiction(
                names, meant, by_build, f"{names[i]!r} is '{paths[meant[i]]}'", in_order[i]
            )
        if i not in meant and torch_names.differ_in_kind(names[i], in_order[i]):
            raise _contradiction(
                names, meant, by_build, f"{names[i]!r} is of another kind", in_order[i]
            )
    position = 0
    for group in saved if by_build else ():
        end = position + len(group["params"])
        down = torch_names.counted_down(names[i] for i in range(position, end) if i not in meant)
        if down is not None:
            raise _contradiction(
                names, meant, by_build, f"{down[0]!r} stands before {down[1]!r}", None
            )
        position = end


def _contradiction(names, meant, by_build: bool, what: str, path: str | None) -> ValueError:
    unknown = [name for i, name in enumerate(names) if i not in meant]
    where = "" if path is None else f", where the order of the variables has '{path}'"
    ways = ["say what a name means in `mapping={name: variable or path}`"] * bool(unknown)
    ways += ["give the right order in `variables`" if by_build else "leave `variables` out"]
    ways += ["leave 'param_names' out to go by the order"]
    return ValueError(
        f"The names in the state dict contradict the order: {what}{where}. Names that could not be told: "
        f"{_some(unknown)}. {'; or '.join(ways).capitalize()}. Received: param_names={_some(names)}"
    )


def _some(names) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(map(repr, names[:_SHOWN])) or "none") + more


def _torch():
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "`state_dict()` returns PyTorch's tensors, and PyTorch is not installed; "
            "`state_dict(as_numpy=True)` returns NumPy arrays."
        ) from error
    return torch
