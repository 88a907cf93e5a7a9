"""Which variable each name of PyTorch's parameters means: "encoder.norm.weight" is "encoder/norm/gamma"."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

# PyTorch's word for what Keras calls so.
_WORDS = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "gamma": "weight",
    "scale": "weight",
    "embeddings": "weight",
    "beta": "bias",
}
_Key = tuple[str, ...]


def meanings(names: Sequence[str], paths: Sequence[str]) -> dict[int, int]:
    """Return which of `paths` each of `names` means, as positions; what is not certain is left out.

    A name means a path that is the same; or the same but for separators, also without the enclosing names that all
    names, or all paths, have in common. Of the rest it means one that is the same but for the words of `_WORDS` too; or
    that, where one ends in the other. Each time there must be one such path for the name, and one such name for the
    path.
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
    # What is the same by the letter is no candidate for what is so by a word: "scale", beside "weight", is no kernel.
    exact, taken = set(meant), set(meant.values())
    for candidates in (
        _candidates(whole_names, whole_paths),
        _candidates(
            [keys | _spellings(n) for keys, n in zip(whole_names, bare_names, strict=True)],
            [keys | _spellings(p) for keys, p in zip(whole_paths, bare_paths, strict=True)],
        ),
        [one | other for one, other in zip(longer, shorter, strict=True)],
    ):
        rest = [set() if i in exact else some - taken for i, some in enumerate(candidates)]
        meant |= _certain(rest, meant)
    return meant


def renumbered(names: Sequence[str], paths: Sequence[str]) -> dict[int, int]:
    """Return what `names` mean if layers are only numbered from elsewhere; empty if that does not explain them all.

    Keras numbers layers as they are created: a second model of one code has "dense_2" where the first has "dense".
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


def _candidates(names: Sequence[set[_Key]], paths: Sequence[set[_Key]]) -> list[set[int]]:
    """Return for each name the paths that have a key in common with it."""
    by_key: dict[_Key, set[int]] = defaultdict(set)
    for position, keys in enumerate(paths):
        for key in keys:
            by_key[key].add(position)
    return [set().union(*(by_key.get(key, set()) for key in keys)) for keys in names]


def _certain(candidates: Sequence[set[int]], meant: dict[int, int]) -> dict[int, int]:
    """Return the names that have one candidate, which is no other name's, without what is in `meant`."""
    claims = Counter(path for some in candidates for path in some)
    certain = {name: next(iter(some)) for name, some in enumerate(candidates) if len(some) == 1}
    taken = set(meant.values())
    return {
        n: p for n, p in certain.items() if claims[p] == 1 and n not in meant and p not in taken
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
    """Take off the enclosing names that all have in common."""
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
    """Replace each number of a layer by its rank among those of its name; a layer without one has the number 0."""
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
