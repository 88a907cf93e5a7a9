"""PyTorch's fused Adam over many tensors at once, and what it takes to use it in half precision.

Each function that rounds stands for one of `keras_adam.rule`, which it names.
"""

import functools
import math
import operator
from typing import Any

import keras
import torch

from keras_adam import keras_private, rule
from keras_adam.engines.base import Bucket
from keras_adam.storage import MOMENTS, Dithered, InBlocks

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
    """Return the gradients; those that share memory with a tensor that the update writes to are copied."""
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
_SIGN_AND_CODE = -(2**31) + (127 << rule.SIGNED_DROP)  # of a float's bits, in 8 bits


class Tensors:
    """A bucket's tensors, in the lists that the kernel takes."""

    def __init__(self, bucket):
        self.variables = [p.here for p in bucket.parameters]
        self.parameters = [v._value for v in self.variables]
        self.pointers = list(map(torch.Tensor.data_ptr, self.parameters))
        of_each = [
            [slot for name in MOMENTS if (slot := getattr(p, name))] for p in bucket.parameters
        ]
        self.moments = [_moments(slots) for slots in zip(*of_each, strict=True)]
        kept = [x for slots in of_each for slot in slots for x in slot.arrays]
        lost = [x for p in bucket.parameters for x in p.value.arrays[1:]]
        self.kept = [*kept, *lost]
        self.state = [x._value for x in self.kept]
        self.lost = [x._value for x in lost]
        self.starts = {_start(x) for x in (*self.parameters, *self.state) if x.numel()}
        first = self.parameters[0]
        self.dtype, self.device = first.dtype, first.device
        is_half = self.dtype.itemsize < 4
        self.in_pieces = is_half or any(x.is_narrow for x in self.moments)
        # A tensor of inference mode could be written to there alone.
        with torch.inference_mode(False):
            self.step = torch.zeros((), dtype=torch.float32, device=self.device)
        self.steps = [self.step] * len(self.parameters)
        filled = [x.data_ptr() for x in self.parameters if x.numel()]
        # The kernel goes through the memory of all tensors in parallel, and takes one dtype at a time.
        self.can_fuse = (
            self.device.type in _FUSED_DEVICES
            # Variables that share a tensor must be updated one after another.
            and len(set(filled)) == len(filled)
            and all(x.can_give(torch.float32 if is_half else self.dtype) for x in self.moments)
            and all(x.dtype is self.dtype for x in self.parameters)
            and all(
                x.device == self.device and x.is_contiguous()
                for x in (*self.parameters, *self.state)
            )
        )

    def is_current(self) -> bool:
        """Whether the variables still have the same tensors, though perhaps as other Python objects."""
        # Compare the parameters' memory: a model's `to` may keep the object and change its memory.
        self.parameters = [v._value for v in self.variables]
        return self.pointers == list(map(torch.Tensor.data_ptr, self.parameters)) and all(
            map(operator.is_, self.state, [x._value for x in self.kept])
        )

    def update_whole(self, update, grads) -> None:
        """Update tensors that the kernel takes as they are."""
        moments = [x.arrays for x in self.moments] + [[]] * (len(MOMENTS) - len(self.moments))
        update(self.parameters, grads, *moments, self.steps)

    def update_in_pieces(self, update, grads, dither) -> None:
        """Update numbers that are kept in fewer bits in float32, piece by piece, each in one piece of memory."""
        name = keras.backend.standardize_dtype(self.dtype)
        is_half = self.dtype.itemsize < 4
        for cuts in self._pieces:
            parameters, lost, chosen = (_flat(x, cuts) for x in (self.parameters, self.lost, grads))
            sizes = [x.numel() for x in parameters]
            targets = parameters
            if is_half:
                whole = torch.cat(parameters)
                whole = _joined(whole, torch.cat(lost), name) if lost else whole.float()
                targets = whole.split(sizes)
            if chosen[0].dtype is not torch.float32:
                chosen = torch.cat(chosen).float().split(sizes)
            moments = [x.read(cuts) for x in self.moments]
            moments += [[]] * (len(MOMENTS) - len(moments))
            update(targets, chosen, *moments, self.steps[:1] * len(sizes))
            if lost:
                whole, rest = _split(whole, name, dither)
                torch._foreach_copy_(lost, rest.split(sizes))
            if is_half:
                torch._foreach_copy_(parameters, whole.split(sizes))
            first, second = self.moments[:2]
            if isinstance(first, _InBlocks) and isinstance(second, _InBlocks):
                _let_stand(first.wide, second.wide)
            for x in self.moments:
                x.write(dither)

    @functools.cached_property
    def samples(self) -> list[list[Any]] | None:
        """Return elements of the variables, and of their moments, as `rule.sample` chooses them; None if in pieces."""
        if self.in_pieces or not self.can_fuse:
            return None
        # By memory, which stays while these are current.
        kinds = [self.parameters, *(x.arrays for x in self.moments)]
        return [[rule.sample(x.detach().view(-1), x.numel()) for x in of_kind] for of_kind in kinds]

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


class _AsTheyAre:
    """One moment of each variable of a bucket, in tensors that the kernel writes to."""

    is_narrow = False

    def __init__(self, slots):
        self.storage = slots[0].storage
        self.arrays = [slot.arrays[0]._value for slot in slots]

    def can_give(self, dtype) -> bool:
        """Whether the kernel can get the moment in `dtype`."""
        return all(x.dtype is dtype for x in self.arrays)

    def read(self, cuts) -> list[Any]:
        """Return parts of the tensors, in the form that the kernel takes."""
        return _flat(self.arrays, cuts)

    def write(self, dither) -> None:
        """Store the kernel's results for the parts that were read last."""


class _InHalf(_AsTheyAre):
    """One moment of each variable, in bfloat16."""

    is_narrow = True

    def can_give(self, dtype) -> bool:
        return dtype is torch.float32

    def read(self, cuts) -> list[Any]:
        self.parts = _flat(self.arrays, cuts)
        self.wide = torch.cat(self.parts).float()
        return list(self.wide.split([x.numel() for x in self.parts]))

    def write(self, dither) -> None:
        rounded = _dithered(self.wide, dither)
        torch._foreach_copy_(self.parts, rounded.split([x.numel() for x in self.parts]))
        del self.parts, self.wide


class _InBlocks(_AsTheyAre):
    """One moment of each variable, as 8-bit codes and the scales of blocks."""

    is_narrow = True

    def __init__(self, slots):
        super().__init__(slots)
        self.scales = [slot.arrays[1]._value for slot in slots]

    def can_give(self, dtype) -> bool:
        is_plain = not self.storage.by_row or all(
            x[0].numel() % rule.BLOCK == 0 for x in self.arrays
        )
        return dtype is torch.float32 and is_plain

    def read(self, cuts) -> list[Any]:
        self.parts = _flat(self.arrays, cuts)
        blocks = [slice(cut.start // rule.BLOCK, -(-cut.stop // rule.BLOCK)) for _, cut in cuts]
        self.scale_parts = [
            self.scales[i].view(-1)[x] for (i, _), x in zip(cuts, blocks, strict=True)
        ]
        codes = _padded(self.parts)
        scale = self.scale_parts[0] if len(cuts) == 1 else torch.cat(self.scale_parts)
        decode = _signed_values if self.storage.signed else _positive_values
        self.wide = decode(codes, scale)
        pieces, padding = self._split(self.wide)
        for rest in padding:
            rest.zero_()
        return pieces

    def write(self, dither) -> None:
        if self.storage.signed:
            codes, scale = _signed_codes(self.wide, dither)
        elif self.storage.dithers:
            codes, scale = _positive_codes(self.wide, dither)
        else:  # to nearest
            half = torch.tensor(0.5, device=self.wide.device)
            codes, scale = _positive_codes(self.wide, half, rule.power_of_two)
        torch._foreach_copy_(self.parts, self._split(codes)[0])
        torch._foreach_copy_(self.scale_parts, scale.split([x.numel() for x in self.scale_parts]))
        del self.parts, self.scale_parts, self.wide

    def _split(self, whole) -> tuple[list[Any], list[Any]]:
        """Return the parts of a tensor in whole blocks, and the padding at the end of each."""
        sizes = [x.numel() for x in self.parts]
        pieces = whole.split([y for n in sizes for y in (n, -n % rule.BLOCK)])
        return list(pieces[::2]), list(pieces[1::2])


def _moments(slots) -> _AsTheyAre:
    """Return one kind of moment of a bucket's variables, which all have the same storage."""
    storage = slots[0].storage
    if isinstance(storage, InBlocks):
        return _InBlocks(slots)
    return _InHalf(slots) if storage == Dithered("bfloat16") else _AsTheyAre(slots)


def _let_stand(m, v) -> None:
    """Set `m` to 0 where `v` is not finite: codes have no infinity, and a large `m` over a finite `v` would go far."""
    if v.device.type != "cpu" or not v.amax().isfinite():
        m.masked_fill_(v.isfinite().logical_not_(), 0.0)


def _padded(parts):
    """Concatenate tensors, each filled up with zeros to whole blocks."""
    if len(parts) == 1 and parts[0].numel() % rule.BLOCK == 0:
        return parts[0]
    zeros = parts[0].new_zeros(rule.BLOCK)
    return torch.cat([y for x in parts for y in (x, zeros[: -x.numel() % rule.BLOCK])])


def _signed_values(codes, scale):
    """`rule.signed_values`."""
    # An int8 becomes an int32 with copies of its sign in front. After the shift, bit 31 is the sign, bits 26 to 20 are
    # the code, and the copies between them are cleared.
    bits = codes.view(torch.int8).to(torch.int32).bitwise_left_shift_(rule.SIGNED_DROP)
    bits.bitwise_and_(_SIGN_AND_CODE).add_(rule.SIGNED_FIRST)
    # `softshrink` moves a number by F(0) towards 0, and F(0) itself to 0: the sign needs no operation of its own.
    x = torch.nn.functional.softshrink(bits.view(torch.float32), rule.SIGNED_ZERO)
    x.view(-1, rule.BLOCK).mul_((scale / rule.SIGNED_LAST)[:, None])
    return x


def _signed_codes(x, dither):
    """`rule.signed_codes`, and the scales; `x` is overwritten."""
    negative = x.view(torch.int32).bitwise_right_shift(31)  # -1 or 0
    blocks = x.abs_().view(-1, rule.BLOCK)
    scale = _largest(blocks, 0.0)
    blocks.mul_(_inverse(scale, rule.SIGNED_LAST)[:, None]).add_(rule.SIGNED_ZERO)
    codes = _steps(x, rule.SIGNED_FIRST, rule.SIGNED_DROP, dither)
    return codes.sub_(negative, alpha=128), scale


def _positive_values(codes, scale):
    """`rule.positive_values`."""
    bits = codes.to(torch.int32).bitwise_left_shift_(rule.POSITIVE_DROP).add_(rule.POSITIVE_FIRST)
    x = bits.view(torch.float32)
    x.view(-1, rule.BLOCK).mul_(scale[:, None])
    return x


def _positive_codes(x, dither, scale_of=lambda scale: scale):
    """`rule.positive_codes`, and the scales, as `scale_of` the largest; `x` is overwritten."""
    blocks = x.view(-1, rule.BLOCK)
    scale = scale_of(_largest(blocks, float("inf")))
    blocks.mul_(_inverse(scale)[:, None]).clamp_(rule.POSITIVE_LEAST, 1.0)
    return _steps(x, rule.POSITIVE_FIRST, rule.POSITIVE_DROP, dither), scale


def _largest(blocks, instead: float):
    """`rule.largest` of blocks that are not negative; numbers that are not finite are set to `instead`."""
    scale = blocks.amax(1)
    is_finite = False
    if blocks.device.type == "cpu":  # where nothing waits for a number
        least, most = (x.item() for x in scale.aminmax())
        if least >= rule.SMALLEST_SCALE and most <= rule.LARGEST_SCALE:
            return scale
        is_finite = math.isfinite(most)
    if not is_finite:
        scale = rule.largest(blocks)
        blocks.nan_to_num_(nan=instead, posinf=instead)
    return scale.mul_(scale >= rule.SMALLEST_SCALE).clamp_(max=rule.LARGEST_SCALE)


def _inverse(scale, last: float = 1.0):
    """`rule.inverse`; only a scale of 0 has an infinite reciprocal."""
    return scale.reciprocal().mul_(last).nan_to_num_(posinf=0.0)


def _steps(x, first: int, drop: int, dither):
    """`rule._steps`; `x` is overwritten."""
    bits = x.view(torch.int32).add_((dither * 2**drop).to(torch.int32) - first)
    return bits.bitwise_right_shift_(drop)


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
    # The addition may carry a NaN into the sign, and make it a number. On a CPU, which has no queue, a check is cheap.
    if x.device.type != "cpu" or not x.sum().isfinite():
        return rule.rounded(x, "bfloat16", dither)
    bits = x.view(torch.int32)
    drop = rule.DROPPED["bfloat16"]
    bits.add_((dither * 2**drop).to(torch.int32)).bitwise_right_shift_(drop)
    return bits.to(torch.int16).view(torch.bfloat16)


def _flat(tensors, cuts):
    return [tensors[i].view(-1)[cut] for i, cut in cuts] if tensors else []
