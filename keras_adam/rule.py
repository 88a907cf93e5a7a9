"""The Adam update, stated once, as pure functions of tensors.

Nothing here assigns, reads `self`, or knows a backend. Every path of the package either calls these functions or is
tested against them. Symbols: `g` gradient, `p` parameter, `m` and `v` first and second moment, `s` the second moment
that the division uses (`v`, or AMSGrad's running maximum), `t` the step, starting at 1.

Sources: Kingma & Ba 2015 (https://arxiv.org/abs/1412.6980), Algorithm 1 and the end of section 2; Loshchilov &
Hutter 2019 (https://arxiv.org/abs/1711.05101), Algorithm 2; Reddi, Kale & Kumar 2018
(https://arxiv.org/abs/1904.09237), Algorithm 2.
"""

import functools
import math
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_adam.bits import greatest, root, view, with_derivative_of
from keras_adam.tensors import compute_dtype

# The greatest number of each dtype whose square is finite, minus a margin for rounding.
_ROOTS = {"float32": (1 - 2.0**-20) * 2.0**64, "float64": (1 - 2.0**-20) * 2.0**512}

Tensor = Any  # a tensor of the active backend, or a Python float


class Options(NamedTuple):
    """The choices that change the formula; constants of a compiled step."""

    amsgrad: bool | str = False
    decoupled_weight_decay: bool = True
    epsilon_hat: bool = True
    maximize: bool = False


class Scalars(NamedTuple):
    """The scalars of one step, the same for all parameters of a group."""

    rate_1: Tensor  # 1 - beta_1
    rate_2: Tensor  # 1 - beta_2
    step_size: Tensor  # alpha, with both bias corrections; learning_rate / (1 - beta_1^t) for amsgrad="corrected"
    epsilon: Tensor
    decay: Tensor | None  # lr * wd if decoupled, wd if L2; None without decay
    correction_2: Tensor  # 1 - beta_2^t


class Moments(NamedTuple):
    """What Adam remembers of one parameter."""

    m: Tensor
    v: Tensor
    s: Tensor | None = None  # AMSGrad's running maximum


def complement(beta: Tensor) -> Tensor:
    """Return `1 - beta`, or `beta` back from it."""
    return 1 - beta


def representable(rate: Tensor, dtype: str) -> Tensor:
    """Return `1 - beta` after rounding beta to `dtype`, for a kernel that takes beta: float32 has no 0.999.

    With bias corrections for this rate, the kernel is exact for a beta that is off by 1e-8. With corrections for the
    unrounded rate, its second moment and its correction would disagree by 1e-5.
    """
    return complement(ops.cast(complement(rate), dtype))


def bias_correction(rate: Tensor, t: Tensor) -> Tensor:
    """Return `1 - beta^t`, given `rate = 1 - beta`.

    It uses `log1p` and `expm1`: in float32, `1 - 0.999**1` is wrong in the fifth digit, as the subtraction cancels.
    """
    log_beta = ops.log1p(-ops.convert_to_tensor(rate, dtype=t.dtype))
    return -ops.expm1(t * log_beta)


def epsilon_of_algorithm_1(epsilon: float, beta_2: float, t: int) -> float:
    """Return Algorithm 1's epsilon for step `t`, given the epsilon-hat that is added before the bias correction."""
    return epsilon / (1 - beta_2**t) ** 0.5


def step_scalars(
    options: Options,
    *,
    learning_rate: Tensor,
    rate_1: Tensor,
    rate_2: Tensor,
    epsilon: Tensor,
    weight_decay: Tensor | None,
    t: Tensor,
    dtype: str,
) -> Scalars:
    """Compute the scalars of step `t` in `dtype`, which is float32 or wider: in bfloat16, 0.999 is 1.0."""
    learning_rate, rate_1, rate_2, epsilon, weight_decay = (
        _scalar(x, dtype) for x in (learning_rate, rate_1, rate_2, epsilon, weight_decay)
    )
    t = ops.cast(t, dtype)
    step_size = learning_rate / bias_correction(rate_1, t)
    correction_2 = bias_correction(rate_2, t)
    if options.amsgrad != "corrected":  # there the maximum itself holds the correction
        root = ops.sqrt(correction_2)
        step_size = step_size * root
        if not options.epsilon_hat:
            epsilon = epsilon * root
    decay = weight_decay
    if decay is not None and options.decoupled_weight_decay:
        decay = learning_rate * decay
    return Scalars(rate_1, rate_2, step_size, epsilon, decay, correction_2)


def prepare(g: Tensor, p: Tensor, scalars: Scalars, options: Options) -> tuple[Tensor, Tensor]:
    """Return the gradient to descend and the parameter to descend from: signs turned, decay applied."""
    if options.maximize:
        g = -g
    if scalars.decay is not None:
        if options.decoupled_weight_decay:
            p = p - scalars.decay * p
        else:
            g = g + scalars.decay * p
    return g, p


def bounded(g: Tensor) -> Tensor:
    """Return a gradient with finite elements limited to what can be squared: 1.8e19 in float32.

    Beyond that, the square and `v` would be infinite, and the next step would subtract infinity from infinity. An
    infinite element stays infinite, so that the step shows it.
    """
    largest = _ROOTS[keras.backend.standardize_dtype(g.dtype)]
    return where(ops.isfinite(g), ops.clip(g, -largest, largest), g)


def adam_step(
    g: Tensor, p: Tensor, moments: Moments, scalars: Scalars, options: Options
) -> tuple[Tensor, Moments]:
    """Return the parameter and its moments after one step; all tensors in the dtype of `scalars`."""
    m, v, s = moments
    g, p = prepare(bounded(g), p, scalars, options)
    m = _average(m, g, scalars.rate_1)
    v = _average(v, g * g, scalars.rate_2)
    if options.amsgrad:
        s = maximum(s, v / scalars.correction_2 if options.amsgrad == "corrected" else v)
    moments = Moments(m, v, s)
    return p - _step(moments, scalars, options), moments


def _step(moments: Moments, scalars: Scalars, options: Options) -> Tensor:
    m, v, s = moments
    return scalars.step_size * m / (root(s if options.amsgrad else v) + scalars.epsilon)


# Half precision: a parameter of 8 or 11 bits is kept with a second number, which is what rounding took from it.

DROPPED = {
    "bfloat16": 16,
    "float16": 13,
}  # bits of float32's significand that the dtype does not have
# The value plus this share of what rounding took must round to the value; otherwise it was set from outside.
FITTING = 0.99
_SMALLEST = 2.0**-24  # spacing of float16 below its smallest normal number, 2^-14
# What rounding takes is stored times this: what it takes from a small float16 is too small for a float16.
_MAGNIFIED = {"bfloat16": 1, "float16": 2**11}
DITHERS = 10946


def rounded(x: Tensor, dtype: str, dither: Tensor | None = None) -> Tensor:
    """Return the float32 `x` with the precision of `dtype`, still as float32: to nearest, ties to even.

    With `dither`, a number in [0, 1) that takes all values equally often, it is rounded up or down so that the error is
    zero on average. So steps smaller than the spacing add up.

    It uses integer arithmetic, as compilers may drop a cast there and back. On JAX its derivative is 1, like a cast's.
    """
    drop = DROPPED[dtype]
    bits = view(x, "int32")
    if dither is None:
        up = 2 ** (drop - 1) - 1 + ops.bitwise_and(ops.bitwise_right_shift(bits, drop), 1)
    else:
        up = ops.cast(dither * 2**drop, "int32")
    result = view(ops.bitwise_and(bits + up, -(2**drop)), "float32")
    if dtype == "float16":
        small = x / _SMALLEST
        small = ops.round(small) if dither is None else ops.floor(small + dither)
        result = where(ops.absolute(x) < 2.0**-14, small * _SMALLEST, result)
    result = where(ops.isnan(x), x, result)  # the addition may have carried a NaN into the sign
    return with_derivative_of(result, x)


# State in 8 bits: each element is a small float, relative to the largest magnitude of its block.

BLOCK = 256  # elements that share a scale
# `m`: a sign, 4 bits of exponent, 3 of significand. Let F(c) be the float32 whose bits are those of 2^-15 plus c steps
# of 2^20. The code c, from 0 to 127, stands for F(c) - F(0): zero is a code, and the smallest are evenly spaced.
SIGNED_DROP, SIGNED_FIRST = 20, 112 << 23
SIGNED_ZERO, SIGNED_LAST = 2.0**-15, 1.875 - 2.0**-15
# `v`: 4 bits of exponent, 4 of significand. The code c, from 0 to 255, stands for the float32 that is 255 - c steps of
# 2^19 below 1.0. No code is zero: a `v` of 0 beside an `m` that is not would divide by epsilon.
POSITIVE_DROP, POSITIVE_FIRST = 19, (127 << 23) - (255 << 19)
POSITIVE_LEAST = (1 + 1 / 16) * 2.0**-16
# The range of a scale: outside, it or its inverse is not a normal float32. A block below it counts as zero.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**126


def largest(blocks: Tensor) -> Tensor:
    """Return the scale of each block, given as the last axis: its largest finite magnitude."""
    size = ops.absolute(blocks)
    size = greatest(where(ops.isfinite(size), size, ops.zeros_like(size)))
    return ops.clip(where(size < SMALLEST_SCALE, ops.zeros_like(size), size), 0.0, LARGEST_SCALE)


def power_of_two(scale: Tensor) -> Tensor:
    """Return scales rounded up to powers of two.

    There are 16 codes of `v` per octave, so that a number once rounded stays as it is while the scale grows. With the
    largest as the scale, a growth too small to change an element's code would enlarge the element as well.
    """
    bits = ops.bitwise_and(view(scale, "int32") + (2**23 - 1), -(2**23))
    return view(bits, "float32")


def inverse(scale: Tensor, last: float = 1.0) -> Tensor:
    """Return `last / scale`; 0 for a block of zeros."""
    is_zero = ops.equal(scale, 0)
    return where(is_zero, ops.zeros_like(scale), last / where(is_zero, ops.ones_like(scale), scale))


def signed_codes(x: Tensor, scale: Tensor, dither: Tensor) -> Tensor:
    """Return the codes of first moments as whole numbers from 0 to 255; a number that is not finite counts as 0.

    Args:
        x: Blocks, float32.
        scale: Their scales, with a last axis of 1.
        dither: Number in [0, 1); 0.5 rounds to nearest.
    """
    x = where(ops.isfinite(x), x, ops.zeros_like(x))
    relative = ops.absolute(x) * inverse(scale, SIGNED_LAST) + SIGNED_ZERO
    codes = _steps(relative, SIGNED_FIRST, SIGNED_DROP, dither)
    return codes + 128 * ops.cast(x < 0, "int32")


def signed_values(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the first moments that whole numbers from 0 to 255 stand for."""
    bits = SIGNED_FIRST + ops.bitwise_left_shift(ops.bitwise_and(codes, 127), SIGNED_DROP)
    size = (view(bits, "float32") - SIGNED_ZERO) * (scale / SIGNED_LAST)
    return where(codes > 127, -size, size)


def positive_codes(x: Tensor, scale: Tensor, dither: Tensor) -> Tensor:
    """Return second moments' codes, as `signed_codes` does; a number that is not finite counts as the largest."""
    relative = where(ops.isfinite(x), x * inverse(scale), ops.ones_like(x))
    relative = ops.clip(relative, POSITIVE_LEAST, 1.0)
    return _steps(relative, POSITIVE_FIRST, POSITIVE_DROP, dither)


def positive_values(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the second moments that whole numbers from 0 to 255 stand for."""
    return view(POSITIVE_FIRST + ops.bitwise_left_shift(codes, POSITIVE_DROP), "float32") * scale


def _steps(x: Tensor, first: int, drop: int, dither: Tensor) -> Tensor:
    """Return how many steps of 2^`drop` the bits of a positive `x` are from `first`, rounded up with the dither."""
    up = ops.cast(dither * 2**drop, "int32") - first
    return ops.bitwise_right_shift(view(x, "int32") + up, drop)


def clipped(g: Tensor, limit: Tensor) -> Tensor:
    """Return a gradient, each element of at most `limit` in size."""
    return ops.clip(g, -limit, limit)


def norm(values: list[Tensor]) -> Tensor:
    """Return the norm of all values together, in float32 at least."""
    squares = [ops.sum(ops.square(x)) for x in values]
    wide = any(compute_dtype(x.dtype) == "float64" for x in squares)
    return root(sum(ops.cast(x, "float64" if wide else "float32") for x in squares))


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Return a ratio; 0 where the whole is 0."""
    return part / where(whole > 0, whole, ops.ones_like(whole))


def moved(p: Tensor, moments: Moments, scalars: Scalars, options: Options) -> Tensor:
    """Return what the step that led to this parameter and these moments added to it."""
    step = _step(moments, scalars, options)
    if scalars.decay is None or not options.decoupled_weight_decay:
        return -step
    return p - (p + step) / (1 - scalars.decay)


# Of a variable, at most so many elements are looked at to tell how far it moved.
SAMPLE = 512


@functools.cache
def stride(size: int) -> int:
    """Return the distance between the elements of a sample of `size`.

    It has no divisor in common with `size`, and so with no axis: else a sample could be one column of a matrix.
    """
    distance = max(1, -(-size // SAMPLE))
    while distance > 1 and math.gcd(distance, size) > 1:
        distance += 1
    return distance


def sample(x: Tensor, size: int) -> Tensor:
    """Return at most `SAMPLE` elements of a vector of `size`, spread evenly."""
    distance = stride(size)
    return x if distance == 1 else x[::distance]


def weights_of_samples(sizes: list[int]) -> Any:
    """Return by what to multiply each element of the samples of such variables, so that their squares stand for all."""
    counts = [-(-size // stride(size)) for size in sizes]
    weights = [(size / max(1, count)) ** 0.5 for size, count in zip(sizes, counts, strict=True)]
    if len(set(weights)) == 1:
        return weights[0]
    return np.repeat(np.array(weights, "float32"), counts)


# Spikes: a window holds the norms of the last so many steps, the newest last, and 0 for each that was skipped.

WINDOW = 128
_FEWEST = WINDOW // 2  # with fewer norms than this, none is too large
_BEYOND = 3  # times the largest norm of the window: what is smaller was as good as seen before, and is no spike


def is_no_spike(norm: Tensor, window: Tensor, deviations: float) -> Tensor:
    """Whether a norm is finite, and not far above those of the window.

    Far above is more than so many standard deviations above their mean, and more than three times the largest of them.

    Source: `SkipStepOptimizer` of OLMo-core, which Levanter's `skipstep` and MaxText's `skip_step_on_spikes` follow;
    they have the first condition alone.
    """
    known = ops.cast(window > 0, "float32")
    count = ops.sum(known)
    one = ops.ones_like(count)
    mean = ops.sum(window) / maximum(one, count)
    variance = ops.sum(known * ops.square(window - mean)) / maximum(one, count - 1)
    limit = maximum(mean + deviations * root(variance), _BEYOND * ops.max(window))
    is_low = ops.logical_or(count < _FEWEST, norm <= limit)
    return ops.logical_and(ops.isfinite(norm), is_low)


def window_after(window: Tensor, norm: Tensor, is_taken: Tensor) -> Tensor:
    """Return the window after a step of this norm, which was taken or skipped."""
    newest = where(is_taken, norm, ops.zeros_like(norm))
    return ops.concatenate([window[1:], ops.reshape(newest, (1,))])


def clipped_to_norm(g: Tensor, norm: Tensor, limit: Tensor) -> Tensor:
    """Return a gradient, scaled down if `norm`, its own or that of all gradients, is above `limit`."""
    limit = ops.convert_to_tensor(limit, norm.dtype)
    return g * ops.cast(limit / maximum(limit, norm), g.dtype)


def moving_average(average: Tensor, p: Tensor, momentum: Tensor, started: Tensor) -> Tensor:
    """Return the exponential moving average after `p`; if it has not `started` before, `p` itself."""
    keep = ops.cast(started, average.dtype) * momentum
    return keep * average + complement(keep) * p


def dither(t: Tensor) -> Tensor:
    """Return the `t`-th of `DITHERS` numbers between 0 and 1; any run of them is spread evenly.

    They are multiples of the golden ratio modulo 1, from two neighbouring Fibonacci numbers, and half of the least
    distance. With 0 itself, what needs no rounding, as the largest of a block in 8 bits, would go down by chance.
    """
    t = t % DITHERS
    place = (t if isinstance(t, int) else ops.cast(t, "int32")) * 6765 % DITHERS
    return (ops.cast(place, "float32") + 0.5) / DITHERS


def joined(p: Tensor, lost: Tensor, dtype: str) -> Tensor:
    """Return the parameter with what rounding to `dtype` took from it; both as float32, and as `split` gave them.

    A `lost` that is too large means that `p` was overwritten; it is ignored.
    """
    lost = lost / _MAGNIFIED[dtype]
    fits = rounded(p + FITTING * lost, dtype) == p
    return where(fits, p + lost, p)


def split(p: Tensor, dtype: str, dither: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float32 `p` with the precision of `dtype`, and what that rounding took, magnified; as float32."""
    kept = rounded(p, dtype)
    return kept, rounded((p - kept) * _MAGNIFIED[dtype], dtype, dither)


def where(condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return `ops.where` of two tensors of one shape; the condition is of that shape or a scalar.

    TensorFlow's own takes eight axes at most.
    """
    shape = one.shape
    if len(shape) <= 8:
        return ops.where(condition, one, other)
    condition, one, other = (_flat(x) for x in (condition, one, other))
    return ops.reshape(ops.where(condition, one, other), shape)


def maximum(old: Tensor, new: Tensor) -> Tensor:
    """Return the greater, or a NaN in `new`; `ops.maximum` makes float32 of float64 on PyTorch."""
    return where(old > new, old, new)


def _flat(x: Tensor) -> Tensor:
    return ops.reshape(x, (-1,)) if getattr(x, "shape", ()) else x


def _average(old: Tensor, new: Tensor, rate: Tensor) -> Tensor:
    """Move `old` towards `new` by `rate` of the distance. It starts from the nearer end: with beta = 0 it is `new`."""
    if isinstance(rate, int | float):
        return new - complement(rate) * (new - old) if rate > 0.5 else old + rate * (new - old)
    return where(rate > 0.5, new - complement(rate) * (new - old), old + rate * (new - old))


def _scalar(x: Tensor, dtype: str) -> Tensor:
    # A Python number stays a Python number: a compiled step makes it a constant, and until then it has all its 53 bits.
    return x if x is None or isinstance(x, int | float) else ops.cast(x, dtype)
