"""How far a trajectory of 200 steps may lie from its oracle, by dtype of the variables.

Problems have start values of order 1 and learning rates up to 1e-3, so that a step moves a value by
1e-3, at most 3.2e-3 (the bound (1 - beta_1) / sqrt(1 - beta_2) of section 2.1 of the paper), and
the whole run by 0.2 or so. An error in the rule (a missing correction, another place for epsilon)
shows up at 1e-4 and above. Use as `assert_allclose(x, reference, **TOLERANCES[dtype])`.
"""

TOLERANCES = {
    # The variables do not round, but a step's scalars are float32: the learning rate and its bias
    # correction are off by some 4 roundings of 6e-8 each, in each of 200 moves of 1e-3.
    "float64": {"rtol": 1e-7, "atol": 1e-7},
    # 200 roundings of the variable by half a spacing, 2**-24 of its size: 1.2e-5 if all fall on one
    # side. Near zero a value's size is no measure of what it was rounded at, nor of the error in
    # its moves: 2e-6 of each (m is 30 times less exact than sqrt(v), relative to its size).
    "float32": {"rtol": 1.2e-5, "atol": 1e-6},
}

# Short runs of large steps, since a half-precision value of 1 does not move by 1e-3: 20 steps of
# 2e-2. Each may round by half a spacing, 2**-9 or 2**-12 of the variable's size; near zero, of the
# size that it had on its way there, up to 1. Gradients are rounded before either side sees them.
HALF_PRECISION_STEPS = 20
TOLERANCES["bfloat16"] = {"rtol": 20 * 2**-9, "atol": 20 * 2**-9}
TOLERANCES["float16"] = {"rtol": 20 * 2**-12, "atol": 20 * 2**-12}

# For oracles among themselves, each wholly in float64: 200 steps of a few roundings, 1e-16 each.
EXACT = {"rtol": 1e-10, "atol": 1e-12}

# Keras computes 1 - beta_2**t in float32. For beta_2 = 0.999 that is off by 1.3e-5 (float32 has no
# 0.999) plus 3e-5 / t (the power's own rounding), relative; a move carries half of it. Summed over
# 200 moves of 1e-3: 0.2 * 6.5e-6 + 1e-3 * 1.5e-5 * (1 + 1/2 + ... + 1/200) = 1.4e-6, in addition
# to the float32 rounding of either side.
AGAINST_KERAS = {"rtol": 2.4e-5, "atol": 4e-6}
