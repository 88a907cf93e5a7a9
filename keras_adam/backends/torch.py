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

    def _differentiate(self, loss_fn, variables):
        values = [v.value for v in variables]
        before = [(id(v.grad), None if v.grad is None else v.grad._version) for v in values]
        with torch.enable_grad():
            loss = loss_fn()
            if before != [
                (id(v.grad), None if v.grad is None else v.grad._version) for v in values
            ]:
                # A closure in PyTorch's way, which has called `loss.backward()` itself.
                return loss.detach(), [v.grad for v in values]
            grads = torch.autograd.grad(self.scale_loss(loss), values, allow_unused=True)
        return loss.detach(), list(grads)

    def _stored_gradients(self):
        return [v.value.grad for v in self._trainable_variables]

    def _clear_gradients(self, set_to_none):
        for variable in self._trainable_variables:
            if set_to_none:
                variable.value.grad = None
            elif variable.value.grad is not None:
                variable.value.grad.zero_()

    def _when(self, condition, update: Callable[[], None]) -> None:
        if condition:
            update()
