"""PyTorch's fused Adam over many tensors at once, and what it takes to use it in half precision.

Each function that rounds stands for one of `keras_adam.rule`, which it names.
"""

import functools
import itertools
import operator
from typing import Any

import keras
import torch

from keras_adam import keras_private, rule
from keras_adam.engines.base import Bucket
from keras_adam.parameters import MOMENTS
from keras_adam.storage import Dithered

# PyTorch's own fused Adam, one call for many tensors. The function around it in `torch.optim` sorts the tensors by
# device and dtype at each call, which for many small ones takes longer than the kernel: here they are sorted once.
try:
    FUSED: dict[bool, Any] = {False: torch._fused_adam_, True: torch._fused_adamw_}
except AttributeError as error:
    raise ImportError(
        f"keras_adam needs PyTorch {keras_private.PYTORCH}, whose fused kernels it calls: {error}. "
        f"Received: torch {torch.__version__}"
    ) from None
_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def can_fuse(bucket: Bucket, grads: list[Any]) -> bool:
    """Whether the kernel can update a bucket from these gradients."""
    tensors = bucket.memory
    return (
        tensors.can_fuse
        # A model's `to(memory_format=...)` keeps its tensors, and changes their strides.
        and all(map(torch.Tensor.is_contiguous, tensors.parameters))
        and bucket.group.options.amsgrad != "corrected"
        and {g.device for g in grads} == {tensors.device}
        and (tensors.in_pieces or {g.dtype for g in grads} == {tensors.dtype})
    )


def apart(grads: list[Any], buckets: list[Bucket]) -> list[Any]:
    """Return the gradients, copied where their memory is that of a tensor which the update writes to."""
    starts = list(map(torch.Tensor.data_ptr, grads))
    if any(map(torch.Tensor.storage_offset, grads)):
        starts = list(map(_start, grads))
    written = [bucket.memory.starts for bucket in buckets]
    if all(memory.isdisjoint(starts) for memory in written):
        return grads
    return [
        g.clone() if any(start in memory for memory in written) else g
        for g, start in zip(grads, starts, strict=True)
    ]


def _start(tensor) -> int:
    """Return the address where the storage of a tensor begins, which all its views share."""
    return tensor.data_ptr() - tensor.storage_offset() * tensor.itemsize


# How many elements of half precision are updated at once. Float32 copies of all of them would take more memory than
# their state; these stay in the processor's cache, which makes it five times as fast.
_PIECE = 2**18


class Tensors:
    """A bucket's tensors, in the lists that the kernel takes."""

    def __init__(self, bucket):
        self.variables = [p.value.arrays[0] for p in bucket.parameters]
        self.parameters = [v._value for v in self.variables]
        self.pointers = list(map(torch.Tensor.data_ptr, self.parameters))
        slots = [[slot for p in bucket.parameters if (slot := getattr(p, x))] for x in MOMENTS]
        kept = [[slot.arrays[0] for slot in of_kind] for of_kind in slots]
        kept.append([x for p in bucket.parameters for x in p.value.arrays[1:]])
        self.slots = list(itertools.chain(*kept))
        self.m, self.v, self.s, self.lost = ([x._value for x in of_kind] for of_kind in kept)
        self.state = [*self.m, *self.v, *self.s, *self.lost]
        self.starts = {_start(x) for x in (*self.parameters, *self.state) if x.numel()}
        first = self.parameters[0]
        self.dtype, self.device = first.dtype, first.device
        is_half = self.dtype.itemsize < 4
        wide = torch.float32 if is_half else self.dtype
        dithered = slots[0][0].storage == Dithered("bfloat16")
        self.has_half_state = wide is torch.float32 and dithered
        self.in_pieces = is_half or self.has_half_state
        with torch.inference_mode(False):  # else it could be written to in inference mode alone
            self.step = torch.zeros((), dtype=torch.float32, device=self.device)
        self.steps = [self.step] * len(self.parameters)
        state = (*self.m, *self.v, *self.s)
        filled = [x.data_ptr() for x in self.parameters if x.numel()]
        # The kernel walks through memory, all tensors in step, and knows one dtype at a time.
        self.can_fuse = (
            self.device.type in _FUSED_DEVICES
            # Of variables that share their tensor, each is updated from what the one before left.
            and len(set(filled)) == len(filled)
            and all(x.dtype is (torch.bfloat16 if self.has_half_state else wide) for x in state)
            and all(x.dtype is self.dtype for x in self.parameters)
            and all(
                x.device == self.device and x.is_contiguous() for x in (*self.parameters, *state)
            )
        )

    def is_current(self) -> bool:
        """Whether the variables still have the tensors that they had, which may be other Python objects now."""
        # A parameter's memory tells: a model's `to` may leave the object and change that.
        self.parameters = [v._value for v in self.variables]
        return self.pointers == list(map(torch.Tensor.data_ptr, self.parameters)) and all(
            map(operator.is_, self.state, [x._value for x in self.slots])
        )

    def update_in_pieces(self, update, grads, dither) -> None:
        """Update what is of half precision in float32, so many elements at a time, in one piece of memory."""
        name = keras.backend.standardize_dtype(self.dtype)
        tensors = self.parameters, self.lost, grads, self.m, self.v, self.s
        for cuts in self._pieces:
            parameters, lost, chosen, *state = (
                [x[cut] for x, cut in _flat(y, cuts)] for y in tensors
            )
            sizes = [x.numel() for x in parameters]
            whole = torch.cat(parameters)
            whole = _joined(whole, torch.cat(lost), name) if lost else whole.float()
            moments, widened = state, []
            if self.has_half_state:
                widened = [torch.cat(x).float() for x in state if x]
                moments = [list(x.split(sizes)) for x in widened]
                moments += [[]] * (len(state) - len(moments))
            steps = self.steps[:1] * len(sizes)
            update(whole.split(sizes), torch.cat(chosen).float().split(sizes), *moments, steps)
            if lost:
                whole, rest = _split(whole, name, dither)
                torch._foreach_copy_(lost, rest.split(sizes))
            torch._foreach_copy_(parameters, whole.split(sizes))
            for kept, x in zip(state, widened, strict=False):
                torch._foreach_copy_(kept, _dithered(x, dither).split(sizes))

    @functools.cached_property
    def _pieces(self) -> list[list[tuple[int, slice]]]:
        """Return, by piece, which tensors are in it, and which of their elements."""
        pieces: list[list[tuple[int, slice]]] = []
        room = 0
        for i, parameter in enumerate(self.parameters):
            for start in range(0, parameter.numel(), _PIECE):
                stop = min(start + _PIECE, parameter.numel())
                if stop - start > room:
                    pieces.append([])
                    room = _PIECE
                pieces[-1].append((i, slice(start, stop)))
                room -= stop - start
        return pieces


def _joined(p, lost, dtype: str):
    """`rule.joined`; in bfloat16 by casts, without new memory, and without comparisons, which are slow on CPUs."""
    if dtype != "bfloat16":
        return rule.joined(p.float(), lost.float(), dtype)
    wide, lost = p.float(), lost.float()
    rounded = lost.mul(rule.FITTING).add_(wide).to(p.dtype)
    away = rounded.view(torch.int16).bitwise_xor_(p.view(torch.int16))  # 0 where they are the same
    fits = away.neg().bitwise_or_(away).bitwise_right_shift_(15).bitwise_not_()  # all bits, or none
    lost.view(torch.int32).bitwise_and_(fits.to(torch.int32))
    return wide.add_(lost)


def _split(p, dtype: str, dither):
    """`rule.split`; in bfloat16 by casts."""
    if dtype != "bfloat16":
        return rule.split(p, dtype, dither)
    kept = p.to(torch.bfloat16)
    rest = kept.float()
    return kept, _dithered(torch.sub(p, rest, out=rest), dither)


def _dithered(x, dither):
    """`rule.rounded` to bfloat16, of an `x` that may be overwritten."""
    # A NaN may carry into the sign, and become a number. A look for one costs little on a CPU, where nothing waits.
    if x.device.type != "cpu" or not x.sum().isfinite():
        return rule.rounded(x, "bfloat16", dither)
    bits = x.view(torch.int32)
    drop = rule.DROPPED["bfloat16"]
    bits.add_((dither * 2**drop).to(torch.int32)).bitwise_right_shift_(drop)
    return bits.to(torch.int16).view(torch.bfloat16)


def _flat(tensors, cuts):
    return [(tensors[i].view(-1), cut) for i, cut in cuts] if tensors else []
