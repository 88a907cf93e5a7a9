"""What PyTorch does its own way: no gradient may flow through the update."""

from collections.abc import Callable

import torch


class Backend:
    """Overrides for PyTorch."""

    @torch.no_grad()
    def apply(self, grads, trainable_variables=None):
        return super().apply(grads, trainable_variables)

    def _is_compiling(self) -> bool:
        return torch.compiler.is_compiling()

    def _densify(self, gradient):
        return gradient.to_dense() if gradient.layout is not torch.strided else gradient

    def _when(self, condition, update: Callable[[], None]) -> None:
        if condition:
            update()
