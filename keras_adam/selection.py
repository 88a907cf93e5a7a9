"""Selectors: which variables a user means, by regular expression, object, layer or predicate."""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_adam import hyperparameters
from keras_adam.paths import align, path_of, same

_SHOWN = 3  # parts of a selector that are printed


def check(selector: Any) -> Any:
    """Return a selector, or raise an error that says what one may be."""
    items = flatten(selector)
    if not items:
        raise ValueError(f"`params` must select something. Received: params={selector!r}")
    for item in items:
        if isinstance(item, str):
            try:
                re.compile(item)
            except re.error as error:
                raise ValueError(
                    f"`params` must hold valid regular expressions ({error}). Received: params={item!r}"
                ) from None
        elif not (is_variable(item) or isinstance(item, keras.Layer | Callable)):
            raise TypeError(
                "`params` must be a regular expression, a variable, a layer, a predicate, or a list of these. "
                f"Received: params={item!r}"
            )
    return selector


def flatten(selector: Any) -> list[Any]:
    """Return the parts of a selector, whose lists may be nested."""
    if isinstance(selector, list | tuple | set):
        return [item for part in selector for item in flatten(part)]
    return [selector]


def is_variable(item: Any) -> bool:
    """Whether it is a variable: Keras's, or a raw `tf.Variable`, which Keras's optimizers take too."""
    return isinstance(item, keras.Variable) or (hasattr(item, "assign") and hasattr(item, "name"))


def selects(selector: Any, variable) -> bool:
    """Whether a selector, or one of a list, selects the variable."""
    for item in flatten(selector):
        if isinstance(item, str):
            if re.fullmatch(item, path_of(variable)):
                return True
        elif is_variable(item):
            if item is variable:
                return True
        elif isinstance(item, keras.Layer):
            if any(v is variable for v in item.trainable_variables):
                return True
        elif item(variable):
            return True
    return False


def first_that_selects(selectors: Sequence[Any], variable) -> int | None:
    """Return the place of the first selector that selects the variable; None if none does."""
    return next((i for i, selector in enumerate(selectors) if selects(selector, variable)), None)


def named_variables(selector: Any) -> list[Any] | None:
    """Return the variables that a selector of variables and layers names; None if it holds another kind."""
    variables: dict[int, Any] = {}
    for item in flatten(selector):
        if is_variable(item):
            variables[id(item)] = item
        elif isinstance(item, keras.Layer):
            variables |= {id(v): v for v in item.trainable_variables}
        else:
            return None
    return list(variables.values())


def assign(
    selectors: Sequence[Any], before: Sequence[dict[str, Any] | None], variables
) -> list[int | None]:
    """Return for each variable the place of the first selector that selects it; None if none does.

    Args:
        selectors: The parameter groups' selectors.
        before: For each selector what it selected before it was saved, as paths; None if it was not saved.
        variables: List of variables.

    Raises:
        ValueError: If a selector gets no variable, or two selectors name the same variable.
    """
    named: dict[int, int] = {}
    for i, selector in enumerate(selectors):
        for item in flatten(selector):
            if is_variable(item) and named.setdefault(id(item), i) != i:
                raise ValueError(
                    "A variable must be named in one parameter group only. Received: "
                    f"'{path_of(item)}' in `param_groups[{named[id(item)]}]` and `param_groups[{i}]`"
                )
    chosen = _as_before(before, variables)
    if chosen is not None:
        return chosen
    chosen = [first_that_selects(selectors, variable) for variable in variables]
    for i in range(len(selectors)):
        if i not in chosen:
            raise ValueError(_selects_nothing(i, selectors, variables))
    return chosen


def shown(selector: Any) -> str:
    """Return a selector's first parts in short, for printing."""
    items = flatten(selector)
    parts = [_shown_part(item) for item in items[:_SHOWN]]
    return ", ".join(parts + [f"{len(items) - _SHOWN} more"] * (len(items) > _SHOWN))


class DecayExclusions:
    """Which variables weight decay leaves out: by identity, by path if they were saved, by pattern."""

    def __init__(self):
        self._keys: set[Any] = set()
        self._paths: list[str] = []
        self._saved_paths: list[str] = []
        self._patterns: list[str] = []
        self._verdicts: dict[Any, bool] = {}

    def add(self, variables: dict[Any, Any], patterns) -> None:
        """Exclude more variables, given by their keys, and all in which a pattern is found."""
        self._keys.update(variables)
        self._paths.extend(path_of(v) for v in variables.values())
        self._patterns.extend(patterns)
        self._verdicts.clear()

    def add_config(self, config: dict[str, list[str]]) -> None:
        """Exclude the variables that `get_config` described."""
        self._paths.extend(config["paths"])
        self._saved_paths.extend(config["paths"])
        self._patterns.extend(config["patterns"])

    def hold(self, key, variable) -> bool:
        """Whether the variable is excluded."""
        if not self:
            return False
        if key not in self._verdicts:
            path, name = path_of(variable), variable.name.partition(":")[0]
            self._verdicts[key] = (
                key in self._keys
                or any(same(path, saved) for saved in self._saved_paths)
                or any(re.search(pattern, x) for pattern in self._patterns for x in (path, name))
            )
        return self._verdicts[key]

    def __bool__(self) -> bool:
        return bool(self._paths or self._patterns)

    def get_config(self) -> dict[str, list[str]]:
        """Return what excludes the same variables of another model."""
        return {"paths": list(self._paths), "patterns": list(self._patterns)}


def _as_before(before, variables) -> list[int | None] | None:
    """Return the assignment that a saved optimizer had, if this is the same model.

    A Sequential model's paths lose the model's name when it is loaded, so that its regular expressions may not match.
    Variables that were frozen when it was saved are missing, so that a group may be empty.
    """
    if not before or any(selected is None for selected in before):
        return None
    among = [path for selected in before for path in selected["among"]]
    ours = align(among, map(path_of, variables))
    if set(ours.values()) != {path_of(v) for v in variables}:
        return None
    place = {ours.get(path): i for i, selected in enumerate(before) for path in selected["paths"]}
    return [place.get(path_of(v)) for v in variables]


def _selects_nothing(index: int, selectors: Sequence[Any], variables) -> str:
    selector = selectors[index]
    paths = [path_of(v) for v in variables]
    selected = [v for v in variables if selects(selector, v)]
    earlier = {path_of(v): first_that_selects(selectors[:index], v) for v in selected}
    if earlier:
        why = "all that it selects belongs to an earlier group: " + ", ".join(
            f"'{path}' to param_groups[{i}]" for path, i in list(earlier.items())[:3]
        )
    else:
        wanted = [s if isinstance(s, str) else getattr(s, "path", "") for s in flatten(selector)]
        near = [p for w in wanted for p in difflib.get_close_matches(w, paths, n=3, cutoff=0.3)]
        why = "the nearest paths are " + ", ".join(repr(p) for p in (near or paths)[:5])
    return f"`param_groups[{index}]` selects no variable; {why}. Received: params={selector!r}"


def _shown_part(item: Any) -> str:
    if isinstance(item, str):
        return repr(item)
    if is_variable(item):
        return path_of(item)
    return f"layer {item.name}" if isinstance(item, keras.Layer) else hyperparameters.shown(item)
