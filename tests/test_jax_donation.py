"""On JAX an eager step may update state in its own memory: no error and no interruption may lose it."""

import itertools
import signal

import keras
import numpy as np
import pytest

import keras_adam
from support.tolerances import TOLERANCES

if keras.backend.backend() != "jax":
    pytest.skip("only JAX donates arrays", allow_module_level=True)

import jax

from keras_adam.engines import jax as backend


def made(size):
    """Return an optimizer, its variable, and a gradient whose every step is of the learning rate."""
    variable, gradient = keras.Variable(np.ones(size, "float32")), keras.ops.ones(size)
    optimizer = keras_adam.Adam(1e-3)
    for _ in range(3):
        optimizer.apply([gradient], [variable])
    return optimizer, variable, gradient


def check(optimizer, variable):
    """The state must be that of a whole number of steps."""
    steps = int(optimizer.iterations.numpy())
    np.testing.assert_allclose(variable.numpy(), 1 - 1e-3 * steps, **TOLERANCES["float32"])
    momentum = optimizer._momentums[0].numpy()
    np.testing.assert_allclose(momentum, 1 - 0.9**steps, **TOLERANCES["float32"])


def test_an_interruption_within_the_call():
    optimizer, variable, gradient = made(2**21)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)

    def train_until(delay):
        signal.setitimer(signal.ITIMER_REAL, delay)
        while True:
            optimizer.apply([gradient], [variable])

    try:
        for delay in (0.01, 0.03, 0.05, 0.08):
            with pytest.raises(KeyboardInterrupt):
                train_until(delay)
            check(optimizer, variable)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_an_interruption_between_assignments(monkeypatch):
    optimizer, variable, gradient = made(2)
    assign, calls = backend._assign, itertools.count()

    def interrupted(*arguments):
        if next(calls) == 1:
            raise KeyboardInterrupt
        assign(*arguments)

    monkeypatch.setattr(backend, "_assign", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.apply([gradient], [variable])
    assert optimizer.iterations.numpy() == 4
    check(optimizer, variable)


def test_the_search_for_nans():
    """JAX runs a step that gave one again, operation by operation."""
    optimizer, variable, gradient = made(2)
    bad = gradient * float("nan")
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        optimizer.apply([bad], [variable])
    check(optimizer, variable)
