"""Gradients of which only some rows are not zero, such as an embedding's."""

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops


class Rows(NamedTuple):
    """The rows of a gradient that are not zero.

    At first `values[i]` is a part of row `indices[i]`, and an index may come several times. After `summed`, the whole
    row `indices[i]` is `values[slots[i]]`.
    """

    shape: tuple[int | None, ...]  # of the whole gradient
    indices: Any
    values: Any
    slots: Any = None

    def summed(self) -> "Rows":
        """Return the gradient with the parts of each row summed.

        Duplicates stay in `indices`; unused `values` are zero. Compiled shapes must be static.
        """
        if self.slots is not None:
            return self
        if self.indices.shape[0] == 0:  # which PyTorch cannot sum
            return self._replace(slots=self.indices)
        order = ops.argsort(self.indices)
        indices = ops.take(self.indices, order, axis=0)
        is_new = ops.cast(ops.not_equal(indices[1:], indices[:-1]), "int32")
        slots = ops.cumsum(
            ops.concatenate([ops.cast(ops.zeros_like(indices[:1]), "int32"), is_new])
        )
        values = ops.segment_sum(
            ops.take(self.values, order, axis=0), slots, num_segments=ops.shape(indices)[0]
        )
        return self._replace(indices=indices, values=values, slots=slots)

    def rows(self) -> Any:
        """Return the gradient of each of `indices`, once summed."""
        return ops.take(self.values, self.slots, axis=0)


def values_of(gradients: list[Any]) -> list[Any]:
    """Return each gradient's values as one tensor: the stored rows of a sparse one, all of a dense one."""
    return [g.values if isinstance(g, Rows) else g for g in gradients]


def map_values(function: Callable[[list[Any]], list[Any]], gradients: list[Any]) -> list[Any]:
    """Apply a function to the values of all gradients, one tensor for each; None stays None.

    For a sparse gradient, only the stored values are passed; `function` must map 0 to 0.
    """
    present = [g for g in gradients if g is not None]
    results = iter(function(values_of(present)))
    return [
        g
        if g is None
        else g._replace(values=next(results))
        if isinstance(g, Rows)
        else next(results)
        for g in gradients
    ]
