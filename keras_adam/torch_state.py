"""The state in the format of `torch.optim.Adam.state_dict`: written, and read back."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from keras_adam import hyperparameters, rule, torch_names
from keras_adam.group_view import GroupViews
from keras_adam.groups import ParamGroup, check_betas, check_implementation
from keras_adam.parameters import Parameter, Parameters
from keras_adam.paths import path_of
from keras_adam.torch_layouts import Layouts

# Between PyTorch's names in a state dict and ours.
_MOMENTS = {
    "exp_avg": "momentum",
    "exp_avg_sq": "velocity",
    "max_exp_avg_sq": "velocity_hat",
}

# The groups that have variables, in PyTorch's order, each with the places of its variables' records.
_Packed = list[tuple[ParamGroup, list[int]]]


@dataclass(frozen=True)
class ReadGroup:
    """What a group takes over: all its options, the numbers in which it differs, PyTorch's choices."""

    group: ParamGroup
    options: rule.Options
    numbers: dict[str, float]
    implementation: dict[str, Any]


@dataclass(frozen=True)
class ReadState:
    """A state dict that was found to fit."""

    groups: list[ReadGroup]
    moments: list[tuple[Parameter, dict[str, np.ndarray]]]
    updates: int  # the most that any variable has had
    joined: list[int]  # at which update each record's variable joined

    def assign(self, views: GroupViews) -> None:
        """Set the groups and the moments; this cannot fail."""
        for read in self.groups:
            read.group.options = read.options
            views[read.group].update(read.numbers)
        # The default group first, which the others follow.
        for read in sorted(self.groups, key=lambda read: not read.group.is_default):
            read.group.set_implementation(read.implementation)
        for parameter, arrays in self.moments:
            for name, kind in _MOMENTS.items():
                slot = getattr(parameter, kind)
                if slot is not None:
                    slot.set_numbers(arrays[name])


@dataclass(frozen=True)
class TorchState:
    """Writes and reads state dicts of one optimizer.

    Args:
        parameters: The records of its variables.
        groups: All its groups.
        views: Their views.
        order: The variables, or their paths, in the order of PyTorch's parameters; all of them. None: that of `build`.
        convert: Function `(variable, array) -> array` between both layouts, or None for the default.
    """

    parameters: Parameters
    groups: list[ParamGroup]
    views: GroupViews
    order: Sequence[Any] | None
    convert: Callable | None

    def write(self, updates: int, to_host: Callable, wrap: Callable) -> dict[str, Any]:
        """Return the state dict.

        Args:
            updates: The number of updates so far.
            to_host: Function that returns a state variable's value as an array of NumPy.
            wrap: Function that converts an array for the state dict.
        """
        packed = self._packed()
        if any(group.options.amsgrad == "corrected" for group, _ in packed):
            raise ValueError(
                "PyTorch's format holds AMSGrad's maximum of the raw second moment only; `model.save` keeps any. "
                "Received: a parameter group with amsgrad='corrected'"
            )
        layouts = Layouts(self.parameters.variables, self.convert)
        number, state, dictionaries = 0, {}, []
        for group, members in packed:
            view = self.views[group]
            dictionaries.append(
                {
                    "lr": view.number("learning_rate"),
                    "betas": (view.number("beta_1"), view.number("beta_2")),
                    "eps": view.number("epsilon"),
                    "weight_decay": view.number("weight_decay"),
                    **group.options._asdict(),
                    **group.implementation(),
                    "params": list(range(number, number + len(members))),
                    "param_names": [path_of(self.parameters.variables[i]) for i in members],
                }
            )
            for i in members:
                moments = _moments_of(self.parameters.records[i], updates, layouts, to_host)
                if moments is not None:
                    state[number] = {name: wrap(array) for name, array in moments.items()}
                number += 1
        return {"state": state, "param_groups": dictionaries}

    def read(
        self, state_dict: dict[str, Any], mapping: Mapping[str, Any] | None, compiled: bool
    ) -> ReadState:
        """Return what a state dict holds, all of it checked; nothing is changed.

        Args:
            state_dict: The state dict.
            mapping: The variables, or their paths, that some names mean.
            compiled: Whether a step was compiled, which holds options as constants.
        """
        packed = self._packed()
        _check_format(state_dict, len(packed))
        saved = state_dict["param_groups"]
        packed = self._packed_by_name(saved, packed, mapping)
        places = _places_of_numbers(state_dict, packed)
        variables = self.parameters.variables
        names = dict(zip(places, torch_names.names_in(saved), strict=False))
        of_keras = [variables[places[n]] for n in names if torch_names.of_keras(names[n])]
        layouts = Layouts(variables, self.convert, alike=of_keras)
        moments, steps = [], [0] * len(variables)
        for number, place in places.items():
            parameter = self.parameters.records[place]
            steps[place], arrays = layouts.read_moments(
                parameter.variable,
                state_dict["state"].get(number),
                amsgrad=bool(parameter.group.options.amsgrad),
            )
            moments.append((parameter, arrays))
        groups = [self._read_group(i, packed, saved, compiled) for i in range(len(packed))]
        last = max(steps, default=0)
        return ReadState(groups, moments, last, [last - step for step in steps])

    def _read_group(self, index: int, packed: _Packed, saved, compiled: bool) -> ReadGroup:
        group, theirs = packed[index][0], saved[index]
        options, view = group.options, self.views[group]
        for name in rule.Options._fields:
            default = {"decoupled_weight_decay": options.decoupled_weight_decay}.get(name, False)
            value = theirs.get(name, default)
            if value == getattr(options, name):
                continue
            if name == "amsgrad" or compiled:
                raise ValueError(
                    f"`param_groups[{index}]` of the state dict has {name}={value!r}, but the optimizer was "
                    f"{'compiled' if compiled else 'built'} with {name}={getattr(options, name)!r}. "
                    "Create the optimizer with that value (`with_torch_arguments` has PyTorch's) and load again"
                )
            options = options._replace(**{name: value})
        given = check_betas(theirs["betas"])
        given |= {"epsilon": theirs["eps"], "weight_decay": theirs["weight_decay"]}
        if not view.follows_schedule() and not self._will_follow(
            group, theirs["lr"], packed, saved
        ):
            given["learning_rate"] = theirs["lr"]
        numbers = {}
        for name, value in given.items():
            value = hyperparameters.check_number(name, value)
            if value != view.number(name):
                if not (name == "learning_rate" and group.is_default):
                    view.check_settable(name, value)
                numbers[name] = value
        implementation = check_implementation({**group.implementation(), **theirs})
        return ReadGroup(group, options, numbers, implementation)

    def _will_follow(self, group: ParamGroup, rate, packed: _Packed, saved) -> bool:
        """Whether a group that follows the optimizer's learning rate will have `rate` after loading, and stays so."""
        if group.is_default or group.own("learning_rate") is not None:
            return False
        base = self.views[group.default]["learning_rate"]
        for (other, _), theirs in zip(packed, saved, strict=True):
            if other.is_default:
                base = float(theirs["lr"])
        followed = base * group.own("learning_rate_multiplier")
        return bool(np.isclose(followed, float(rate), rtol=1e-6, atol=0))

    # Which variable each of PyTorch's parameters is

    def _packed(self) -> _Packed:
        """Return the groups that have variables; these are in the caller's order, or in that of `build`."""
        records = self.parameters.records
        if not records:
            raise ValueError(
                "The optimizer has no state yet: call `optimizer.build(variables)` first."
            )
        order = range(len(records)) if self.order is None else self._places_in_order(self.order)
        packed = [(g, [i for i in order if records[i].group is g]) for g in self.groups]
        return [(group, members) for group, members in packed if members]

    def _packed_by_name(self, saved, packed: _Packed, mapping) -> _Packed:
        """Return the groups in the state dict's order, each with its variables, if names can tell; else `packed`."""
        names = torch_names.names_in(saved)
        given = self._check_mapping(mapping, names)
        if not names:
            return packed
        paths = [path_of(v) for v in self.parameters.variables]
        order = [place for _, members in packed for place in members]
        taken, by_build = set(given.values()), self.order is None
        meant = {
            i: place
            for i, place in torch_names.meanings(names, paths).items()
            if names[i] not in given and place not in taken
        }
        meant |= {i: given[name] for i, name in enumerate(names) if name in given}
        if len(meant) == len(names) == len(paths):
            if not by_build and [meant[i] for i in range(len(names))] != order:
                torch_names.check_order(saved, paths, meant, order, by_build, False)
            return self._grouped_as(saved, names, meant)
        if [len(group["params"]) for group in saved] == [len(members) for _, members in packed]:
            torch_names.check_order(saved, paths, meant, order, by_build, not given)
        return packed

    def _grouped_as(self, saved, names, meant) -> _Packed:
        """Return the groups in the state dict's order, each with the variables that the names mean."""
        packed, position = [], 0
        for i, theirs in enumerate(saved):
            end = position + len(theirs["params"])
            members = [meant[k] for k in range(position, end)]
            groups = list(dict.fromkeys(self.parameters.records[place].group for place in members))
            if len(groups) != 1:
                raise ValueError(
                    f"`param_groups[{i}]` of the state dict must hold the variables of one group of the optimizer. "
                    f"Received: {torch_names.shown(names[position:end])}, of {len(groups)} groups"
                )
            packed.append((groups[0], members))
            position = end
        return packed

    def _check_mapping(self, mapping, names: list[str]) -> dict[str, int]:
        """Return which variable each name of `mapping` means."""
        mapping = {} if mapping is None else mapping
        if not isinstance(mapping, Mapping):
            raise TypeError(
                "`mapping` must be a dictionary from names of PyTorch's parameters to variables or their paths. "
                f"Received: mapping={mapping!r}"
            )
        places = self._places_of(mapping.values(), "The values of `mapping`")
        given = dict(zip(mapping, places, strict=True))
        for name in given:
            if names.count(name) != 1:
                raise ValueError(
                    "The keys of `mapping` must each stand once in the `param_names` of the state dict, which hold "
                    f"{torch_names.shown(names)}. Received: {name!r}"
                )
        if len(set(given.values())) < len(given):
            raise ValueError(
                f"`mapping` must give each name a variable of its own. Received: mapping={mapping!r}"
            )
        return given

    def _places_of(self, variables, argument: str) -> list[int]:
        """Return the places of the records of some variables, which may be given as paths."""
        paths = [path_of(v) for v in self.parameters.variables]
        by_path = {path: i for i, path in enumerate(paths)}
        places = []
        for variable in variables:
            is_path = isinstance(variable, str)
            is_variable = hasattr(variable, "assign")
            name = variable if is_path else path_of(variable) if is_variable else repr(variable)
            known = by_path if is_path else self.parameters
            if not (is_path or is_variable) or variable not in known:
                near = difflib.get_close_matches(name, paths, n=3, cutoff=0.3) or paths[:3]
                raise ValueError(
                    f"{argument} must be the optimizer's, as variables or whole paths; the nearest paths are "
                    f"{', '.join(map(repr, near))}. Received: '{name}'"
                )
            if is_path and paths.count(variable) > 1:
                raise ValueError(
                    f"{argument} must be variables where a path means several. Received: '{variable}'"
                )
            places.append(by_path[variable] if is_path else self.parameters.index(variable))
        return places

    def _places_in_order(self, variables) -> list[int]:
        places = self._places_of(variables, "`variables`")
        if sorted(places) != list(range(len(self.parameters))):
            paths = [path_of(v) for v in self.parameters.variables]
            missing = [path for i, path in enumerate(paths) if i not in places]
            raise ValueError(
                "`variables` must hold each of the optimizer's variables once. Received: "
                f"{len(places)}, without {missing}"
            )
        return places


def _moments_of(
    parameter: Parameter, updates: int, layouts: Layouts, to_host: Callable
) -> dict[str, np.ndarray] | None:
    """Return the state of one of PyTorch's parameters; None if it has never had a gradient."""
    if parameter.momentum is None:
        return None
    late = parameter.joined
    joined = 0 if late is None else int(ops.convert_to_numpy(late.update))
    # A count from before the joining was set back; then all variables count from the beginning.
    step = updates - joined if joined <= updates else updates
    if step <= 0:
        return None
    moments = {"step": np.array(step, "float32")}
    for name, kind in _MOMENTS.items():
        slot = getattr(parameter, kind)
        if slot is not None:
            moments[name] = layouts.to_torch(parameter.variable, slot.numbers(to_host))
    return moments


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
            f"Received: {len(saved)}. Create the optimizer with the groups that the saved one had, "
            "`param_groups=[...]`, in their order"
        )
    for i, group in enumerate(saved):
        for name in ("lr", "betas", "eps", "weight_decay", "params"):
            if name not in group:
                raise ValueError(
                    f"`param_groups[{i}]` of the state dict lacks '{name}': it is not one of Adam or AdamW. "
                    f"Received: the keys {sorted(map(str, group))}"
                )


def _places_of_numbers(state_dict, packed: _Packed) -> dict[int, int]:
    """Return the place of the record for each of PyTorch's parameter numbers."""
    places: dict[int, int] = {}
    for i, ((_, members), group) in enumerate(zip(packed, state_dict["param_groups"], strict=True)):
        if len(group["params"]) != len(members):
            raise ValueError(
                f"`param_groups[{i}]` of the state dict must have {len(members)} parameters, as the optimizer's. "
                f"Received: {len(group['params'])}"
            )
        places.update(zip(group["params"], members, strict=True))
    unknown = set(state_dict["state"]) - set(places)
    if unknown:
        raise ValueError(
            f"`state_dict` has state of parameters that are in no group. Received: {sorted(unknown)}"
        )
    return places
