"""PyTorch's engine where processes share the state: each keeps a part of it, and updates a part of the weights.

The elements of all variables are laid end to end and cut into as many stretches as there are processes, of as many
bytes of state each: ZeRO, stage 1 (https://arxiv.org/abs/1910.02054). The rule is elementwise, so that a step works on
the parts as it does on whole variables; norms and checks are agreed upon, and the weights are sent around at the end.
"""

import itertools
import math
from typing import Any

import keras
import numpy as np
import torch
import torch.distributed as dist

from keras_adam import rule
from keras_adam.engines.base import Gradients, StepFunction, Tensor, Variable
from keras_adam.engines.torch import TorchEngine, widened_all
from keras_adam.parameters import Plan
from keras_adam.sparse import Rows
from keras_adam.step_config import StepConfig
from keras_adam.storage import Compensated, InBlocks, Spec
from keras_adam.tensors import Part, compute_dtype

# Hooks of a subclass that would be given parts, and take them for whole variables or gradients.
_OF_PARTS = (
    "_backend_update_step",
    "_clip_gradients",
    "_overwrite_model_variables_with_average_value",
    "_update_model_variables_moving_average",
    "assign",
    "assign_sub",
    "update_step",
)
# A part of so many bytes is sent from where it lies; smaller ones are packed into buckets of at most so many bytes.
_LARGE, _BUCKET = 2**18, 2**24
_MOST_PLANS = 16  # lists of variables for which it is remembered what to send


class SpreadVariable(keras.Variable):
    """A state variable of which this process holds a part: `shape` is that of the whole, `value` is flat."""

    part: Part
    whole_shape: tuple[int, ...]

    @property
    def shape(self):
        return self.whole_shape

    @torch.no_grad()
    def assign(self, value):
        """Take over the whole, of which only the part is kept, or the part."""
        value = keras.ops.convert_to_tensor(value, dtype=self.dtype)
        if tuple(value.shape) == self.whole_shape:
            value = value.reshape(-1)[self.part.stretch]
        if value.shape != self.value.shape:
            raise ValueError(
                f"'{self.path}' takes values of shape {self.whole_shape}, or of its part in this process, "
                f"{tuple(self.value.shape)}. Received: a value of shape {tuple(value.shape)}"
            )
        self.value.copy_(value)
        return value


class SpreadEngine(TorchEngine):
    """The work of a step on PyTorch, of which each process does a part."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self._plans: dict[tuple[int, ...], list[list[tuple[Part, slice]]]] = {}
        self._under_way: list[tuple[Any, Tensor, list[Tensor]]] = []

    # Who holds what

    def parts_of(self, plans: list[Plan]) -> list[Any]:
        super().parts_of(plans)  # which refuses what cannot be cut
        sizes = [sum(x.nbytes(tuple(v.shape)) for x in kept.values()) for v, _, kept in plans]
        for i, (_, _, kept) in enumerate(plans):
            # What is kept of a part is flat, and blocks of rows are not; the other has no moments.
            by_row = any(isinstance(x, InBlocks) and x.by_row for x in kept.values())
            if by_row or "momentum" not in kept:
                sizes[i] = 0
        share = sum(sizes) / self.processes
        parts = []
        ends = itertools.accumulate(sizes)
        for (variable, _, kept), size, end in zip(plans, sizes, ends, strict=True):
            if size == 0:
                parts.append(variable)
                continue
            elements = math.prod(variable.shape)
            block = max(s.unit for x in kept.values() for s in x.specs("", tuple(variable.shape)))
            at = [(share * k - (end - size)) / size for k in range(1, self.processes)]
            inner = [round(min(max(x, 0), 1) * elements / block) * block for x in at]
            cuts = [0, *(min(x, elements) for x in inner), elements]
            parts.append(Part(variable, cuts, self.rank))
        return parts

    def slot(self, array: Variable, part: Any, spec: Spec) -> Variable:
        if isinstance(part, Part):
            array.__class__ = SpreadVariable  # Keras makes it, and keeps it among the optimizer's
            if spec.shape is None:
                array.part, array.whole_shape = part, tuple(part.variable.shape)
            else:  # scales, each of a block
                cuts = [-(-cut // spec.unit) for cut in part.cuts]
                array.part = Part(part.variable, cuts, part.rank)
                array.whole_shape = (cuts[-1],)
        return array

    def whole(self, variable: Variable) -> np.ndarray:
        if not isinstance(variable, SpreadVariable):
            return super().whole(variable)
        mine = variable.value.detach()
        whole = mine.new_empty(math.prod(variable.whole_shape))
        whole[variable.part.stretch] = mine
        for rank, stretch in enumerate(variable.part.stretches()):
            if stretch.start < stretch.stop:
                dist.broadcast(whole[stretch].view(torch.uint8), rank)
        return super().whole(whole.reshape(variable.whole_shape))

    # A step

    @torch.compiler.disable
    def run(
        self, step: StepFunction, grads: Gradients, variables: list[Variable], config: StepConfig
    ) -> None:
        if self._is_stateless():
            raise ValueError(
                "`shard_state` on PyTorch serves steps that change the variables: `apply`, and what calls it. "
                "Received: shard_state=True in `stateless_apply`, or in a `StatelessScope`"
            )
        if self.optimizer._overrides(*_OF_PARTS):
            own = [name for name in _OF_PARTS if self.optimizer._overrides(name)]
            raise ValueError(
                "`shard_state` on PyTorch cuts variables into parts, which a subclass's own hooks do not know. "
                f"Received: shard_state=True and a `{own[0]}` that is not Adam's"
            )
        super().run(step, grads, variables, config)
        self._arrived()

    def reduce(self, grads: Gradients) -> Gradients:
        return [_cut(g, self.parameters[v].here) for g, v in zip(grads, self.in_step, strict=False)]

    def are_finite(self, values: list[Tensor]) -> bool:
        return bool(self._agreed(self.finite(values), dist.ReduceOp.MIN))

    def is_left(self, mean: Tensor) -> bool:
        return bool(self._agreed(mean.ne(0).any(), dist.ReduceOp.MAX))

    def _agreed(self, told: Tensor, how: Any) -> Tensor:
        number = told.to(self.optimizer._iterations._value.device, torch.float32)
        dist.all_reduce(number, how)
        return number

    def norms(self, values: list[Tensor]) -> Tensor:
        values = widened_all(values)
        wide = max((x.dtype for x in values), key=lambda dtype: dtype.itemsize)
        # Of each process its norms in a row of its own, so that all compute the same bits from them.
        norms = torch.zeros(self.processes, len(values), dtype=wide, device=values[0].device)
        for i, x in enumerate(values):
            norms[self.rank, i] = torch.linalg.vector_norm(x)
        dist.all_reduce(norms)
        return torch.linalg.vector_norm(norms, dim=0)

    def is_any_above(self, values: list[Tensor], limit: Tensor) -> Tensor:
        return self._agreed(super().is_any_above(values, limit), dist.ReduceOp.MAX)

    def clip(self, values: list[Tensor]) -> list[Tensor]:
        values = widened_all(values)
        name, limit = self.config.clipping or ("", 0.0)
        if name == "clipvalue":
            return [rule.clipped(x, limit) for x in values]
        whole = self.norms(values)
        if name == "global_clipnorm":
            whole = torch.linalg.vector_norm(whole).expand(len(values))
        factors = (limit / whole).clamp_(max=1.0)
        return [x * f.to(x.dtype) for x, f in zip(values, factors.unbind(), strict=True)]

    def update(self, grads: Gradients, variables: list[Variable], learning_rate: Any) -> None:
        mine = [(g, v) for g, v in zip(grads, variables, strict=True) if g.numel()]
        if mine:
            super().update([g for g, _ in mine], [v for _, v in mine], learning_rate)

    def constrain(self, variables: list[Variable]) -> None:
        """Send the parts around, which are updated now; apply constraints, to whole variables."""
        self._send(variables)
        constrained = [v for v in variables if v.constraint is not None]
        if not constrained:
            return
        self._arrived()
        for variable in constrained:
            slot, dtype = self.parameters[variable].value, compute_dtype(variable.dtype)
            arrays = [variable.value]
            if isinstance(slot.storage, Compensated):
                arrays.append(keras.ops.convert_to_tensor(self.whole(slot.arrays[1])))
            value = variable.constraint(slot.storage.read(arrays, dtype))
            kept = slot.storage.write(value, self.dither() if slot.storage.dithers else None)
            for array, x in zip((variable, *slot.arrays[1:]), kept, strict=True):
                array.assign(x)

    @torch.no_grad()
    def overwrite_with_averages(self, variables: list[Variable]) -> None:
        self._arrived()
        super().overwrite_with_averages(variables)
        self._send(variables)
        self._arrived()

    # Weights on their way

    def _send(self, variables: list[Variable]) -> None:
        """Begin to send each part from its process to all others."""
        key = tuple(map(id, variables))
        if key not in self._plans:
            if len(self._plans) == _MOST_PLANS:
                self._plans.clear()
            parts = [p for v in variables if isinstance(p := self.parameters[v].here, Part)]
            stretches = [[(p, x) for x in p.stretches()] for p in parts]
            self._plans[key] = [
                [(p, x) for p, x in of_rank if x.start < x.stop]
                for of_rank in zip(*stretches, strict=True)
            ]
        for rank, pieces in enumerate(self._plans[key]):
            tensors = [part.flat[stretch].view(torch.uint8) for part, stretch in pieces]
            for bucket in _buckets(tensors):
                if len(bucket) == 1:
                    work = dist.broadcast(bucket[0], rank, async_op=True)
                    self._under_way.append((work, bucket[0], []))
                    continue
                is_mine = rank == self.rank
                size = sum(x.numel() for x in bucket)
                packed = torch.cat(bucket) if is_mine else bucket[0].new_empty(size)
                work = dist.broadcast(packed, rank, async_op=True)
                self._under_way.append((work, packed, [] if is_mine else bucket))

    def _arrived(self) -> None:
        """Wait for what is being sent, and unpack it."""
        for work, packed, targets in self._under_way:
            work.wait()
            if targets:
                torch._foreach_copy_(targets, list(packed.split([x.numel() for x in targets])))
        self._under_way.clear()

    def forget(self) -> None:
        super().forget()
        self._plans.clear()


def _cut(gradient: Any, part: Any) -> Any:
    """Return the part of a gradient that belongs to a part of its variable."""
    if not isinstance(part, Part):
        return gradient
    if not isinstance(gradient, Rows):
        return gradient.reshape(-1)[part.stretch]
    # Elements in place of rows, as a part may begin within a row.
    indices, slots = torch.unique(gradient.indices, return_inverse=True)
    values = gradient.values.flatten(1) if gradient.values.ndim > 1 else gradient.values[:, None]
    values = values.new_zeros(len(indices), values.shape[1]).index_add_(0, slots, values)
    width, stretch = values.shape[1], part.stretch
    touched = (indices * width < stretch.stop) & ((indices + 1) * width > stretch.start)
    indices, values = indices[touched], values[touched]
    places = indices[:, None] * width + torch.arange(width, device=indices.device)
    inside = (places >= stretch.start) & (places < stretch.stop)
    places = places[inside] - stretch.start
    slots = torch.arange(len(places), device=places.device)
    return Rows(part.shape, places, values[inside], slots)


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Return the large tensors one by one, and then the small ones together."""
    buckets = [[x] for x in tensors if x.numel() >= _LARGE]
    room = 0
    for x in tensors:
        if x.numel() < _LARGE:
            if x.numel() > room:
                buckets.append([])
                room = _BUCKET
            buckets[-1].append(x)
            room -= x.numel()
    return buckets
