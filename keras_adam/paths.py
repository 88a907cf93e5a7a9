"""Paths of variables, and which of two models' paths mean the same variable."""

from collections import Counter
from collections.abc import Iterable


def path_of(variable) -> str:
    """Return a variable's path; a raw `tf.Variable` has its name instead."""
    return getattr(variable, "path", None) or variable.name.partition(":")[0]


def align(theirs: Iterable[str], ours: Iterable[str]) -> dict[str, str]:
    """Return which of our paths each of their paths means: the same one, or the same but for enclosing names.

    A Sequential model's variable is "sequential/dense/kernel" when the model was built by a call, and "dense/kernel"
    when it was loaded from a file. A path that could mean two variables is left out.
    """
    ours = set(ours)
    by_suffix: dict[str, list[str]] = {}
    for path in ours:
        for suffix in _suffixes(path):
            by_suffix.setdefault(suffix, []).append(path)
    aligned: dict[str, str] = {}
    for path in set(theirs):
        longer = by_suffix.get(path, [])
        shorter = [suffix for suffix in _suffixes(path) if suffix in ours]
        candidates = [path] if path in ours else list({*longer, *shorter})
        if len(candidates) == 1:
            aligned[path] = candidates[0]
    meant = Counter(aligned.values())
    return {t: o for t, o in aligned.items() if t == o or meant[o] == 1}


def same(one: str, other: str) -> bool:
    """Whether two paths are the same, or the same but for enclosing names; a bare name is only itself."""
    shorter, longer = sorted((one, other), key=len)
    return one == other or ("/" in shorter and longer.endswith("/" + shorter))


def _suffixes(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]
