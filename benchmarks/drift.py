"""A million steps of a scalar beside float64: `KERAS_BACKEND=jax python benchmarks/drift.py [STEPS]`.

The gradient is that of (p - 3)^2 / 2 plus a fixed oscillation, computed from a target that does not depend on `p`, so
that the float64 reference and the optimizer see the same numbers. So the result is the sum of rounding errors alone.
"""

import pathlib
import sys

import keras
import numpy as np

import keras_adam

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
}


def gradients_of(start):
    """Return numbers that bfloat16 holds exactly, with a mean of -1/64 and a size of 1."""
    i = np.arange(start, start + CHUNK, dtype="float64")
    return (np.round(64 * np.sin(0.1 * i)) - 1) / 64


def reference(steps, amsgrad=False, weight_decay=0.0):
    """Algorithm 1 with epsilon-hat, in Python's own float64."""
    p, m, v, s = 1.0, 0.0, 0.0, 0.0
    for start in range(0, steps, CHUNK):
        for i, g in enumerate(gradients_of(start).tolist(), start + 1):
            p -= RATE * weight_decay * p
            m = 0.9 * m + 0.1 * g
            v = 0.999 * v + 0.001 * g * g
            s = max(s, v) if amsgrad else v
            p -= RATE * (1 - 0.999**i) ** 0.5 / (1 - 0.9**i) * m / (s**0.5 + 1e-7)
    return p


def whole_value(optimizer, variable):
    lost = optimizer._parameters[variable].array("value")
    rest = 0.0 if lost is None else value_of(lost) / (2**11 if variable.dtype == "float16" else 1)
    return float(value_of(variable) + rest)


def run(steps, dtype="float32", **options):
    variable = keras.Variable(1.0, dtype=dtype)
    optimizer = keras_adam.Adam(RATE, **options)
    optimizer.build([variable])
    advance = {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}[BACKEND]
    take = advance(optimizer, variable)
    for start in range(0, steps, CHUNK):
        take(keras.ops.convert_to_tensor(gradients_of(start), dtype=dtype))
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


def main(steps):
    print(f"{BACKEND}, {steps} steps of a scalar from 1.0, learning rate {RATE}\n")
    print("| case | float64 reference | ends at | drift |\n| --- | --- | --- | --- |", flush=True)
    references = {}
    for name, case in CASES.items():
        options = {k: v for k, v in case.items() if k in ("amsgrad", "weight_decay")}
        key = str(options)
        if key not in references:
            references[key] = reference(steps, **options)
        with float64_allowed():
            end = run(steps, **case)
        print(
            f"| {name} | {references[key]:.8f} | {end:.8f} | {end - references[key]:+.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    if BACKEND == "tensorflow":
        import tensorflow

        tensorflow.get_logger().setLevel("ERROR")  # each case is traced anew
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
