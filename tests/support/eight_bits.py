"""State in 8 bits as its format says it, in NumPy: a table of 256 values, looked up; never imports keras_adam.

A block is 256 consecutive elements of the flattened variable, or of a row of it. Its scale is its largest finite
magnitude. Relative to that, a code stands for one of 256 values:

- of a first moment the table is of magnitudes F(c) - F(0), up to F(127) - F(0); F(c) has 8 values per octave and
  begins at 2^-15;
- of a second moment the table has 16 values per octave, of which the last is 1.0.
"""

import numpy as np

BLOCK = 256
FIRST = np.array([2.0 ** (c // 8 - 15) * (1 + c % 8 / 8) for c in range(128)])
SIGNED = np.concatenate([FIRST - FIRST[0], FIRST[0] - FIRST]) / (FIRST[-1] - FIRST[0])
_PLACES = np.arange(256) + 127 * 16 - 255
POSITIVE = 2.0 ** (_PLACES // 16 - 127) * (1 + _PLACES % 16 / 16)
DITHERS = 10946


def dither(step):
    """Return the dither of the step that is taken after so many."""
    return (step % DITHERS * 6765 % DITHERS + 0.5) / DITHERS


def blocks_of(x, by_row=False):
    """Return the elements in rows of 256, those of a block; what is missing in the last is zero."""
    rows = x.reshape(x.shape[0], -1) if by_row else x.reshape(1, -1)
    rows = np.pad(rows, [(0, 0), (0, -rows.shape[1] % BLOCK)])
    return rows.reshape(-1, BLOCK)


def joined(blocks, shape, by_row=False):
    """Return what was taken apart by `blocks_of`."""
    rows = blocks.reshape(shape[0] if by_row else 1, -1)
    size = int(np.prod(shape[1:] if by_row else shape))
    return rows[:, :size].reshape(shape)


def decoded(codes, scale, signed, by_row=False):
    """Return the numbers that codes stand for, in float64."""
    table = SIGNED if signed else POSITIVE
    values = table[blocks_of(codes, by_row)] * np.asarray(scale, "float64").reshape(-1, 1)
    return joined(values, codes.shape, by_row)


def scales_of(x, by_row=False):
    size = np.abs(blocks_of(np.asarray(x, "float64"), by_row))
    largest = np.where(np.isfinite(size), size, 0).max(axis=1)
    return np.where(largest < 2.0**-126, 0, largest)


def encoded(x, signed, dither=None, by_row=False):
    """Return codes, scales, and for each element how near it was to another code, in spacings.

    Args:
        x: The numbers.
        signed: Whether they are first moments.
        dither: It goes up if its distance from the lower neighbour, in spacings, and the dither make 1. None: it goes
            to the nearest.
        by_row: Whether no block goes beyond a row.
    """
    dither = 0.5 if dither is None else dither
    scale = scales_of(x, by_row)
    blocks = blocks_of(np.asarray(x, "float64"), by_row)
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)[:, None]
    is_finite = np.isfinite(blocks)
    if signed:
        table, lift = FIRST, FIRST[0]
        relative = np.abs(np.where(is_finite, blocks, 0)) * inverse * (FIRST[-1] - lift) + lift
    else:
        table = POSITIVE
        relative = np.where(is_finite, np.where(is_finite, blocks, 0) * inverse, 1.0)
        relative = np.clip(relative, table[0], 1.0)
    below = np.clip(np.searchsorted(table, relative, side="right") - 1, 0, len(table) - 2)
    part = (relative - table[below]) / (table[below + 1] - table[below]) + dither
    codes = below + (part >= 1)
    margin = np.abs(part - np.round(part))
    if signed:
        codes = codes + 128 * ((blocks < 0) & is_finite)
    shape = np.shape(x)
    return joined(codes, shape, by_row).astype("uint8"), scale, joined(margin, shape, by_row)


def places(codes, signed):
    """Return the codes as whole numbers that grow with the value; the two zeros are one."""
    codes = codes.astype(int)
    return np.where(codes > 127, -(codes - 128), codes) if signed else codes


def assert_same_codes(codes, wanted, margin, signed, near=2.0**-15):
    """Codes must be those wanted; where the number is so near to the border of two, they may be the other one."""
    away = np.abs(places(codes, signed) - places(wanted, signed))
    assert (away[margin > near] == 0).all(), (codes[away > 0], wanted[away > 0], margin[away > 0])
    assert away.max(initial=0) <= 1


def adam_step(p, g, m, v, t, *, learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    """Return the parameter and both moments after step `t` of Adam, in float64; Kingma & Ba, epsilon-hat."""
    p, g, m, v = (np.asarray(x, "float64") for x in (p, g, m, v))
    m = beta_1 * m + (1 - beta_1) * g
    v = beta_2 * v + (1 - beta_2) * g * g
    alpha = learning_rate * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
    return p - alpha * m / (np.sqrt(v) + epsilon), m, v
