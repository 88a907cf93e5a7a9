"""A million steps of a number beside float64: `KERAS_BACKEND=jax python benchmarks/drift.py [STEPS [CASE]]`.

The gradient is that of (p - 3)^2 / 2 plus a fixed oscillation, computed from a target that does not depend on `p`, so
that the float64 reference and the optimizer see the same numbers. So the result is the sum of rounding errors alone.

In 8 bits the largest element of a block is kept as it is. So 256 elements are led there, which share a block, with
gradients that are up to 100 times smaller than those of the first; epsilon aside, all take the same steps.
"""

import pathlib
import sys
from unittest import mock

import keras
import numpy as np

import keras_adam
from keras_adam import rule, storage

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))
from support.helpers import float64_allowed
from support.steps import value_of

BACKEND = keras.backend.backend()
CHUNK = 10_000
RATE = 1e-4
CASES = {
    "float32": {},
    "float32, AMSGrad": {"amsgrad": True},
    "float32, weight decay": {"weight_decay": 0.1},
    "float64": {"dtype": "float64"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, kahan_sum=False": {"dtype": "bfloat16", "kahan_sum": False},
    "bfloat16, moments too": {"dtype": "bfloat16", "state_dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "8 bits": {"state_dtype": "8bit"},
}
SIZES = np.geomspace(1.0, 0.01, rule.BLOCK)  # of the gradients in 8 bits


def gradients_of(start):
    """Return numbers that bfloat16 holds exactly, with a mean of -1/64 and a size of 1."""
    i = np.arange(start, start + CHUNK, dtype="float64")
    return (np.round(64 * np.sin(0.1 * i)) - 1) / 64


def reference(steps, sizes, amsgrad=False, weight_decay=0.0):
    """Algorithm 1 with epsilon-hat, in float64."""
    p, m, v, s = np.ones_like(sizes), *np.zeros((3, *sizes.shape))
    for start in range(0, steps, CHUNK):
        for i, g in enumerate(gradients_of(start)[:, None] * sizes, start + 1):
            p -= RATE * weight_decay * p
            m = 0.9 * m + 0.1 * g
            v = 0.999 * v + 0.001 * g * g
            s = np.maximum(s, v) if amsgrad else v
            p -= RATE * (1 - 0.999**i) ** 0.5 / (1 - 0.9**i) * m / (s**0.5 + 1e-7)
    return p


def whole_value(optimizer, variable):
    lost = optimizer._parameters[variable].array("value")
    rest = 0.0 if lost is None else value_of(lost) / (2**11 if variable.dtype == "float16" else 1)
    return value_of(variable) + rest


def run(steps, sizes, dtype="float32", **options):
    variable = keras.Variable(np.ones_like(sizes), dtype=dtype)
    optimizer = keras_adam.Adam(RATE, **options)
    with mock.patch.object(storage, "_LEAST_IN_8_BITS", rule.BLOCK):
        optimizer.build([variable])
    advance = {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}[BACKEND]
    take = advance(optimizer, variable)
    for start in range(0, steps, CHUNK):
        gradients = gradients_of(start)[:, None] * sizes
        take(keras.ops.convert_to_tensor(gradients, dtype=dtype))
    return whole_value(optimizer, variable)


def _jax(optimizer, variable):
    import jax

    @jax.jit
    def loop(carry, gradients):
        def body(carry, g):
            values, state = carry
            return tuple(optimizer.stateless_apply(state, [g], values)), None

        return jax.lax.scan(body, carry, gradients)[0]

    def take(gradients):
        known = [variable], optimizer.variables
        carry = tuple([v.value for v in variables] for variables in known)
        for variables, values in zip(known, loop(carry, gradients), strict=True):
            for one, value in zip(variables, values, strict=True):
                one.assign(value)

    return take


def _tensorflow(optimizer, variable):
    import tensorflow as tf

    @tf.function(autograph=False)
    def take(gradients):
        def body(i):
            optimizer.apply([gradients[i]], [variable])
            return i + 1

        tf.while_loop(lambda i: i < CHUNK, body, [tf.constant(0)])

    return take


def _torch(optimizer, variable):
    def take(gradients):
        for gradient in gradients.unbind():
            optimizer.apply([gradient], [variable])

    return take


def main(steps, only):
    print(f"{BACKEND}, {steps} steps from 1.0, learning rate {RATE}\n")
    print("| case | float64 reference | ends at | drift |\n| --- | --- | --- | --- |", flush=True)
    references = {}
    for name, case in CASES.items():
        if only not in name:
            continue
        options = {k: v for k, v in case.items() if k in ("amsgrad", "weight_decay")}
        sizes = SIZES if case.get("state_dtype") == "8bit" else np.ones(1)
        key = f"{options} {len(sizes)}"
        if key not in references:
            references[key] = reference(steps, sizes, **options)
        with float64_allowed():
            end = run(steps, sizes, **case)
        drift = end - references[key]
        spread = "" if len(drift) == 1 else f" ({drift.min():+.1e} to {drift.max():+.1e})"
        print(
            f"| {name} | {references[key].mean():.8f} | {end.mean():.8f} | {drift.mean():+.1e}{spread} |",
            flush=True,
        )


if __name__ == "__main__":
    if BACKEND == "tensorflow":
        import tensorflow

        tensorflow.get_logger().setLevel("ERROR")  # each case is traced anew
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000, "".join(sys.argv[2:]))
