"""Which variable each name of PyTorch's parameters means: "encoder.norm.weight" is "encoder/norm/gamma"."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Keras's word: PyTorch's word.
_WORDS = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "gamma": "weight",
    "scale": "weight",
    "embeddings": "weight",
    "beta": "bias",
}
_SHOWN = 5  # names that are printed
_Key = tuple[str, ...]


def meanings(names: Sequence[str], paths: Sequence[str]) -> dict[int, int]:
    """Return which of `paths` each of `names` means, as positions; uncertain names are left out.

    These are tried in turn, and each must give one path for the name and one name for the path:

    - the path is the same as the name;
    - it is the same but for separators, also without the enclosing names that all names, or all paths, share;
    - for the rest, it is the same but for the words of `_WORDS` as well, or one then ends in the other.
    """
    bare_names, bare_paths = _without_common(names), _without_common(paths)
    exact_names, exact_paths = [{_tokens(n)} for n in names], [{_tokens(p)} for p in paths]
    whole_names, whole_paths = [_spellings(n) for n in names], [_spellings(p) for p in paths]
    longer = _candidates(whole_names, [_endings(p) for p in paths])
    shorter = _candidates([_endings(n) for n in names], whole_paths)
    meant: dict[int, int] = {}
    for candidates in (
        _candidates([{(n,)} for n in names], [{(p,)} for p in paths]),
        _candidates(exact_names, exact_paths),
        _candidates(
            [keys | {_tokens(n)} for keys, n in zip(exact_names, bare_names, strict=True)],
            [keys | {_tokens(p)} for keys, p in zip(exact_paths, bare_paths, strict=True)],
        ),
    ):
        meant |= _certain(candidates, meant)
    # A path that was found word for word is no candidate by `_WORDS`: "scale", beside "weight", is no kernel.
    exact_matches, found_paths = set(meant), set(meant.values())
    for candidates in (
        _candidates(whole_names, whole_paths),
        _candidates(
            [keys | _spellings(n) for keys, n in zip(whole_names, bare_names, strict=True)],
            [keys | _spellings(p) for keys, p in zip(whole_paths, bare_paths, strict=True)],
        ),
        [one | other for one, other in zip(longer, shorter, strict=True)],
    ):
        rest = [
            set() if i in exact_matches else some - found_paths for i, some in enumerate(candidates)
        ]
        meant |= _certain(rest, meant)
    return meant


def renumbered(names: Sequence[str], paths: Sequence[str]) -> dict[int, int]:
    """Return what `names` mean if only the layers' numbers differ; empty if that does not explain all names.

    Keras numbers layers as they are created: a second model of the same code has "dense_2" in place of "dense".
    """
    theirs, ours = _ranked(names), _ranked(paths)
    where = {key: position for position, key in enumerate(ours)}
    if len(set(theirs)) < len(theirs) or set(theirs) != set(where) or len(where) < len(ours):
        return {}
    return {position: where[key] for position, key in enumerate(theirs)}


def differ_in_kind(name: str, path: str) -> bool:
    """Whether one is a weight and the other a bias, by their last words."""
    one, other = _kind(name), _kind(path)
    return None not in (one, other) and one != other


def of_keras(name: str) -> bool:
    """Whether it names a parameter of a Keras model, which is a `torch.nn.Module` on the PyTorch backend."""
    return re.search(r"(^|\.)_?torch_params\.", name) is not None


def counted_down(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first two names that differ in one number only, the greater before the smaller."""
    last: dict[tuple[_Key, _Key], tuple[int, str]] = {}
    for name in names:
        tokens = _tokens(name)
        for i, token in enumerate(tokens):
            if token.isdecimal():
                around = tokens[:i], tokens[i + 1 :]
                before = last.get(around)
                if before is not None and int(token) < before[0]:
                    return before[1], name
                last[around] = int(token), name
    return None


def names_in(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the `param_names` of all groups of a state dict, as one list; empty if it has none.

    In `torch.distributed`'s state dicts, names stand in place of the parameters' numbers.
    """
    names: list[str] = []
    parameters = [parameter for group in groups for parameter in group["params"]]
    of_params = all(isinstance(parameter, str) for parameter in parameters)
    if not of_params and not any("param_names" in group for group in groups):
        return names
    for i, group in enumerate(groups):
        theirs = group.get("param_names", group["params"] if of_params else [])
        if not isinstance(theirs, list | tuple) or not all(
            isinstance(name, str) for name in theirs
        ):
            raise ValueError(
                f"`param_names` of `param_groups[{i}]` of the state dict must be a list of strings. "
                f"Received: param_names={theirs!r}"
            )
        if len(theirs) != len(group["params"]):
            raise ValueError(
                f"`param_groups[{i}]` of the state dict must have a name for each of its {len(group['params'])} "
                f"parameters. Received: {len(theirs)} in `param_names`"
            )
        names += theirs
    return names


def check_order(
    saved: Sequence[Mapping[str, Any]],
    paths: Sequence[str],
    meant: dict[int, int],
    order: Sequence[int],
    by_build: bool,
    may_be_renumbered: bool,
) -> None:
    """Raise if the names contradict the order, which decides if the meaning of some names is uncertain.

    Args:
        saved: The groups of the state dict.
        paths: The paths of all variables.
        meant: For each name whose meaning is certain, the place of its path.
        order: The places of the variables in the order of the names.
        by_build: Whether that is the order of `build`. Only certain meanings contradict an order that the caller gave.
        may_be_renumbered: Whether the layers' numbers alone may differ.
    """
    names = names_in(saved)
    in_order = [paths[index] for index in order]
    likely = renumbered(names, in_order) if may_be_renumbered else {}
    if likely and all(i == j for i, j in likely.items()):
        return
    if by_build:
        meant = {i: order[j] for i, j in likely.items()} | meant
    for i, index in enumerate(order):
        if meant.get(i, index) != index:
            raise _contradiction(
                names, meant, by_build, f"{names[i]!r} is '{paths[meant[i]]}'", in_order[i]
            )
        if i not in meant and differ_in_kind(names[i], in_order[i]):
            raise _contradiction(
                names, meant, by_build, f"{names[i]!r} is of another kind", in_order[i]
            )
    position = 0
    for group in saved if by_build else ():
        end = position + len(group["params"])
        down = counted_down(names[i] for i in range(position, end) if i not in meant)
        if down is not None:
            raise _contradiction(
                names, meant, by_build, f"{down[0]!r} stands before {down[1]!r}", None
            )
        position = end


def shown(names: Sequence[str]) -> str:
    """Return the first names, as they are printed."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(map(repr, names[:_SHOWN])) or "none") + more


def _candidates(names: Sequence[set[_Key]], paths: Sequence[set[_Key]]) -> list[set[int]]:
    """Return for each name the paths that have a key in common with it."""
    by_key: dict[_Key, set[int]] = defaultdict(set)
    for position, keys in enumerate(paths):
        for key in keys:
            by_key[key].add(position)
    return [set().union(*(by_key.get(key, set()) for key in keys)) for keys in names]


def _certain(candidates: Sequence[set[int]], meant: dict[int, int]) -> dict[int, int]:
    """Return the names with one candidate that no other name has, except names and paths that are in `meant`."""
    claims = Counter(path for some in candidates for path in some)
    certain = {name: next(iter(some)) for name, some in enumerate(candidates) if len(some) == 1}
    known_paths = set(meant.values())
    return {
        n: p
        for n, p in certain.items()
        if claims[p] == 1 and n not in meant and p not in known_paths
    }


def _parts(path: str) -> list[str]:
    return re.split(r"[./]", path)


def _tokens(path: str) -> _Key:
    """Split into words and numbers: "layer_0" is "layer.0"."""
    return tuple(re.findall(r"[^\W\d_]+|\d+", path))


def _spellings(path: str) -> set[_Key]:
    *parents, leaf = _parts(path)
    enclosing = _tokens("/".join(parents))
    return {enclosing + _tokens(leaf), enclosing + _tokens(_WORDS.get(leaf, leaf))}


def _endings(path: str) -> set[_Key]:
    """Return the spellings without one or more enclosing names; the last part alone says too little."""
    parts = _parts(path)
    ends = ("/".join(parts[i:]) for i in range(1, len(parts) - 1))
    return {key for end in ends for key in _spellings(end)}


def _without_common(paths: Sequence[str]) -> list[str]:
    """Remove the enclosing names that all paths share."""
    parts = [_parts(path) for path in paths]
    common = 0
    while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    return ["/".join(p[common:]) for p in parts]


def _kind(path: str) -> str | None:
    leaf = _parts(path)[-1]
    word = _WORDS.get(leaf, leaf)
    return word if word in _WORDS.values() else None


def _ranked(paths: Sequence[str]) -> list[tuple[tuple[str, int], ...]]:
    """Replace each layer's number by its rank among layers of the same name; a layer without a number has 0."""
    numbered = [_numbered(path) for path in paths]
    ranked: list[tuple[tuple[str, int], ...]] = [()] * len(numbered)
    for depth in range(max(map(len, numbered), default=0)):
        deep = [i for i, parts in enumerate(numbered) if len(parts) > depth]
        numbers = defaultdict(set)
        for i in deep:
            stem, number = numbered[i][depth]
            numbers[ranked[i], stem].add(number)
        ranks = {key: sorted(some) for key, some in numbers.items()}
        for i in deep:
            stem, number = numbered[i][depth]
            ranked[i] = (*ranked[i], (stem, ranks[ranked[i], stem].index(number)))
    return ranked


def _numbered(path: str) -> list[tuple[str, int]]:
    *parents, leaf = _parts(path)
    parts: list[tuple[str, int]] = []
    for part in parents:
        stem, number = re.findall(r"^(.*?)_?(\d*)$", part)[0]
        if not stem and parts:  # "layer.0" is "layer_0"
            stem = parts.pop()[0]
        parts.append((stem, int(number or 0)))
    return [*parts, (_WORDS.get(leaf, leaf), 0)]


def _contradiction(names, meant, by_build: bool, what: str, path: str | None) -> ValueError:
    unknown = [name for i, name in enumerate(names) if i not in meant]
    where = "" if path is None else f", where the order of the variables has '{path}'"
    ways = ["say what a name means in `mapping={name: variable or path}`"] * bool(unknown)
    ways += ["give the right order in `variables`" if by_build else "leave `variables` out"]
    ways += ["leave 'param_names' out to go by the order"]
    return ValueError(
        f"The names in the state dict contradict the order: {what}{where}. Names without a certain meaning: "
        f"{shown(unknown)}. {'; or '.join(ways).capitalize()}. Received: param_names={shown(names)}"
    )
