"""The whole optimizer in float64 NumPy, with a bound on what rounding may have done to each number.

`reference.py` is Adam as the papers print it, for finite numbers of ordinary size. This is what a
step does around it as well: accumulation, clipping, groups, late joiners, averages, skipped steps; for
any gradient, infinities and NaNs among them. Like `reference.py` it never imports keras_adam.

Each array has an `error`: how far an implementation that rounds may be from it. Each equation computes it
along with the numbers. So a small difference is allowed where it is expected (a step after a cancellation,
or a division by almost nothing), and nowhere else.
"""

import dataclasses

import numpy as np

from support import eight_bits

LARGEST = float(np.finfo("float32").max)
# Beyond, a square is infinite in float32. What becomes of such a finite gradient differs by path, see docs/rule.md.
SQUARABLE = 1.8e19
FLUSHED = 2.0**-125  # numbers below 2^-126 may be taken for zero: XLA and TensorFlow do

# Half the distance between neighbours, relative.
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}
# The error of storing a variable: relative, absolute. Without a compensation, a variable of half precision is rounded
# to its 8 or 11 bits; with one, only the compensation is rounded, up or down.
STORED = {
    ("float64", False): (2.0**-53, 0.0),
    ("float32", False): (2.0**-24, 0.0),
    ("bfloat16", False): (2.0**-8, 2.0**-133),
    ("float16", False): (2.0**-11, 2.0**-25),
    ("bfloat16", True): (2.0**-15, 2.0**-133),
    ("float16", True): (2.0**-21, 2.0**-35),
}
# Beyond this a variable may be infinite.
LIMIT = {"float64": 1e300, "float32": 1e30, "bfloat16": 1e30, "float16": 6e4}


@dataclasses.dataclass
class Variable:
    """One variable with its state: each kind as an array, and the bound on its error."""

    p: np.ndarray
    dtype: str
    group: dict
    start: int = 0  # updates made before it joined
    decays: bool = True

    def __post_init__(self):
        self.p = np.array(self.p, "float64")
        self.wide = "float64" if self.dtype == "float64" else "float32"
        self.e_p, self.e_m, self.e_v, self.e_s, self.e_average, self.e_total = (
            np.zeros_like(self.p) for _ in range(6)
        )
        self.m, self.v, self.s, self.total = (np.zeros_like(self.p) for _ in range(4))
        self.average = None
        # The second moment has left float32's range: the gradient's square is infinite there, so that no step is made.
        # From then on no step is made, or the element is NaN, from infinity minus infinity.
        self.may_be_nan = np.zeros(self.p.shape, bool)
        self.is_lost = np.zeros(self.p.shape, bool)  # anything goes: it left its dtype's range


class Optimizer:
    """`options` are those of `keras_adam.Adam`; each variable's group has all of a group's own.

    `scalar_error` is how exact the scalars of a step are, relative. `lone_norms_hold`: the norm of a
    single number is its size, also where its square is infinite, as in PyTorch's own norms, which are
    taken of gradients that are all of one dtype; None: it may be either, as a compiler may see that the
    root of a square is the number itself, and what follows from it may be anything.
    """

    def __init__(
        self, variables, options, scalar_error=2e-6, lone_norms_hold=False, least_in_8_bits=4096
    ):
        self.least_in_8_bits = least_in_8_bits
        self.lone_norms_hold = lone_norms_hold
        self.variables = list(variables)
        self.options = options
        self.learning_rate = options["learning_rate"]
        self.scalar_error = scalar_error
        self.calls = self.skipped = 0

    @property
    def accumulation(self):
        return self.options["gradient_accumulation_steps"] or 1

    @property
    def updates(self):
        return self.calls // self.accumulation

    def step(self, gradients):
        """Take a step; `gradients` are float64 arrays, each a number of its variable's dtype, or None."""
        with np.errstate(all="ignore"):
            self._step(gradients)

    def _step(self, gradients):
        scale = self.options["loss_scale_factor"] or 1
        gradients = [None if g is None else g / scale for g in gradients]
        present = [g for g in gradients if g is not None]
        if self.options["skip_nonfinite"] and not all(np.isfinite(g).all() for g in present):
            self.skipped += 1
            return
        if self.accumulation == 1:
            chosen = [i for i, g in enumerate(gradients) if g is not None]
            values = [gradients[i] for i in chosen]
            errors = [self._unit(i) * np.abs(gradients[i]) for i in chosen]
            self._update(chosen, values, errors)
            self._average()
        else:
            self._accumulate(gradients)
        self.calls += 1

    def _unit(self, i):
        return 4 * UNIT[self.variables[i].wide]

    def _accumulate(self, gradients):
        for variable, g in zip(self.variables, gradients, strict=True):
            if g is not None:
                variable.total = variable.total + g
                size = np.abs(variable.total) + np.abs(g)
                variable.e_total = variable.e_total + 4 * UNIT[variable.wide] * size
        if (self.calls + 1) % self.accumulation:
            return
        means = [v.total / self.accumulation for v in self.variables]
        errors = [v.e_total / self.accumulation for v in self.variables]
        # One without a gradient in the last of them is updated if the others left it something.
        chosen = [
            i
            for i, g in enumerate(gradients)
            if g is not None or np.any(self.variables[i].total != 0)
        ]
        self._update(chosen, [means[i] for i in chosen], [errors[i] for i in chosen])
        for variable in self.variables:
            variable.total = np.zeros_like(variable.p)
            variable.e_total = np.zeros_like(variable.p)
        self._average()

    def _clip(self, chosen, gradients, errors):
        options = self.options
        if options["clipvalue"]:
            limit = options["clipvalue"]
            errors = [
                np.where(np.abs(g) > 1.01 * limit, 0, e)
                for g, e in zip(gradients, errors, strict=True)
            ]
            return [np.clip(g, -limit, limit) for g in gradients], errors
        wide = {self.variables[i].wide for i in chosen}
        lone_holds = self.lone_norms_hold and len(wide) == 1
        if self.lone_norms_hold is None:
            for i, g in zip(chosen, gradients, strict=True):
                if g.size == 1 and not np.isinf(g).any() and np.isinf(_in_range(g * g, "float32")):
                    everyone = chosen if options["global_clipnorm"] else [i]
                    for j in everyone:
                        self.variables[j].is_lost[...] = True
        norms = [
            _norm(g.ravel(), self.variables[i].wide, lone_holds)
            for i, g in zip(chosen, gradients, strict=True)
        ]
        if options["clipnorm"]:
            factors = [_factor(options["clipnorm"], norm) for norm in norms]
        elif options["global_clipnorm"]:
            widest = "float64" if "float64" in wide else "float32"
            total = _norm(np.array(norms), widest, lone_holds)
            factors = [_factor(options["global_clipnorm"], total)] * len(gradients)
        else:
            return gradients, errors
        clipped = [g * factor for g, factor in zip(gradients, factors, strict=True)]
        errors = [
            (e * factor) + 1e-5 * np.abs(g)
            for e, g, factor in zip(errors, clipped, factors, strict=True)
        ]
        return clipped, errors

    def _update(self, chosen, gradients, errors):
        gradients, errors = self._clip(chosen, gradients, errors)
        for i, g, e_g in zip(chosen, gradients, errors, strict=True):
            self._update_variable(self.variables[i], g, e_g)

    def _rate(self, group):
        rate = self.learning_rate
        if callable(rate):
            rate = rate(self.calls)
        own = group["learning_rate"]
        return rate * group["learning_rate_multiplier"] if own is None else own

    def _update_variable(self, x, g, e_g):
        group, u, q = x.group, UNIT[x.wide], self.scalar_error
        if x.wide == "float32":
            x.is_lost |= np.isfinite(g) & (np.abs(g) > SQUARABLE)
        t = self.updates + 1 - x.start
        lr, beta_1, beta_2 = self._rate(group), group["beta_1"], group["beta_2"]
        decay = (group["weight_decay"] or 0.0) if x.decays else 0.0
        if group["maximize"]:
            g = -g
        if group["decoupled_weight_decay"]:
            x.p = x.p - lr * decay * x.p
            x.e_p = x.e_p + (q * lr * decay + 2 * u) * np.abs(x.p)
        elif decay:  # else 0 times a NaN would come in
            e_g = e_g + decay * x.e_p + q * decay * np.abs(x.p) + u * np.abs(g)
            g = g + decay * x.p
        state = self._state_error(x)
        square = _in_range(g * g, x.wide)

        size = beta_1 * np.abs(x.m) + (1 - beta_1) * np.abs(g)
        x.m = beta_1 * x.m + (1 - beta_1) * g
        x.e_m = beta_1 * x.e_m + (1 - beta_1) * e_g + (q + 4 * u) * size + FLUSHED
        x.e_m = x.e_m + state * (np.abs(x.m) + x.e_m)
        e_square = 2 * np.abs(g) * e_g + e_g**2
        size = beta_2 * x.v + (1 - beta_2) * square
        # `beta_2 * inf`, but for no memory at all.
        x.v = _in_range(size if beta_2 else np.where(np.isinf(x.v), np.inf, size), x.wide)
        x.e_v = beta_2 * x.e_v + (1 - beta_2) * e_square + (q + 4 * u) * size + FLUSHED
        x.e_v = x.e_v + state * (np.abs(x.v) + x.e_v)
        x.may_be_nan |= np.isinf(x.v)

        correction = 1 - beta_2**t
        s, e_s = x.v, x.e_v
        if group["amsgrad"]:
            factor = 1 / correction if group["amsgrad"] == "corrected" else 1.0
            x.e_s = np.maximum(x.e_s, x.e_v * factor + q * x.v * factor)
            x.s = np.where(x.s > x.v * factor, x.s, _in_range(x.v * factor, x.wide))
            x.e_s = x.e_s + state * (np.abs(x.s) + x.e_s)
            s, e_s = x.s, x.e_s
        epsilon = group["epsilon"]
        if group["amsgrad"] == "corrected":
            size = lr / (1 - beta_1**t)
        else:
            size = lr * np.sqrt(correction) / (1 - beta_1**t)
            if not group["epsilon_hat"]:
                epsilon = epsilon * np.sqrt(correction)
        root, e_root = np.sqrt(s), np.sqrt(s) - np.sqrt(np.maximum(s - e_s, 0))
        divisor = root + epsilon
        step = size * x.m / divisor
        least = (root - e_root + epsilon) * (1 - q - 4 * u)
        longer = (np.abs(x.m) + x.e_m) / least - np.abs(x.m) / divisor
        most = np.sqrt(s + e_s) + epsilon
        shorter = np.abs(x.m) / divisor - np.maximum(np.abs(x.m) - x.e_m, 0) / most
        # A product below 2^-126 may be taken for zero before it is divided.
        e_step = size * np.fmax(longer, shorter) + q * np.abs(step) + FLUSHED / least
        frozen = np.isinf(s)
        x.may_be_nan |= frozen
        x.p = x.p - step
        x.e_p = x.e_p + np.where(frozen, 0, e_step) + u * (np.abs(x.p) + np.abs(step))
        self._store(x)
        kept = self._state_dtype(x)
        if kept == "8bit":
            x.is_lost = _any_in_block(x.is_lost)  # which may have been taken for the largest
            x.m, x.e_m = _in_blocks(x.m, x.e_m, signed=True)
            x.v, x.e_v = _in_blocks(x.v, x.e_v, signed=False)
            if group["amsgrad"]:
                x.s, x.e_s = _in_blocks(x.s, x.e_s, signed=False)
        elif kept != x.wide:  # of less range than a float64 variable
            x.m, x.v, x.s = (_in_range(y, "float32") for y in (x.m, x.v, x.s))
            x.may_be_nan |= np.isinf(x.v)

    def _state_error(self, x):
        """The relative error of storing a moment."""
        kept = self._state_dtype(x)
        return {"bfloat16": 2.0**-7, "float32": 2.0**-24, "float64": 0.0, "8bit": 0.0}[kept]

    def _state_dtype(self, x):
        kept = x.group.get("state_dtype", self.options["state_dtype"]) or x.wide
        in_blocks = x.p.size >= self.least_in_8_bits and x.wide == "float32"
        return x.wide if kept == "8bit" and not in_blocks else kept

    def _store(self, x):
        has_rest = x.dtype in ("bfloat16", "float16") and self.options["kahan_sum"] is not False
        relative, absolute = STORED[x.dtype, has_rest]
        x.e_p = x.e_p + relative * (np.abs(x.p) + x.e_p) + absolute
        x.is_lost |= np.abs(x.p) + x.e_p > LIMIT[x.dtype]

    def _average(self):
        if not self.options["use_ema"]:
            return
        keep = self.options["ema_momentum"]
        every = self.options["ema_overwrite_frequency"]
        due = every and (self.updates + 1) % every == 0
        for x in self.variables:
            if x.average is None:
                x.average, x.e_average = x.p, x.e_p
            size = np.abs(x.average) + np.abs(x.p)
            x.average = keep * x.average + (1 - keep) * x.p
            x.e_average = keep * x.e_average + (1 - keep) * x.e_p + 4 * UNIT[x.wide] * size
            if due:
                x.p, x.e_p = x.average, x.e_average
                self._store(x)


def _in_blocks(x, error, signed):
    """What 8 bits keep of a moment: within a spacing, which near zero is that of the block's smallest."""
    blocks, error = eight_bits.blocks_of(x), eight_bits.blocks_of(error)
    is_finite = np.isfinite(blocks)
    error = np.where(is_finite, np.nan_to_num(error, nan=np.inf), 0)
    size = np.where(is_finite, np.abs(blocks), 0)
    largest = np.max(size, axis=1, keepdims=True)
    most = np.max(size + error, axis=1, keepdims=True)  # what may have been taken for the largest
    kept = np.where(is_finite, blocks, 0 if signed else largest)
    size = np.abs(kept) + error
    away = size / 8 + most * 2.0**-18 if signed else size / 16 + most * 2.0**-15.9
    away = away + error + np.where(size > 2.0**126, size, 0) + FLUSHED
    away = np.where(is_finite, away, most)
    return eight_bits.joined(kept, x.shape), eight_bits.joined(away, x.shape)


def _any_in_block(condition):
    """Whether the condition holds for any element of the block."""
    blocks = eight_bits.blocks_of(condition)
    of_each = np.repeat(blocks.any(axis=1, keepdims=True), eight_bits.BLOCK, axis=1)
    return eight_bits.joined(of_each, condition.shape)


def _in_range(x, wide):
    """Replace what is beyond float32's range by infinity, if all is computed in float32."""
    return np.where(np.abs(x) > LARGEST, np.copysign(np.inf, x), x) if wide == "float32" else x


def _norm(values, wide, lone_holds):
    if lone_holds and values.size == 1:
        return np.abs(values[0])
    return np.sqrt(_in_range(np.sum(_in_range(values * values, wide)), wide))


def _factor(limit, norm):
    return limit / norm if not norm <= limit else 1.0
