"""Processes of their own: devices are set up before a framework starts, and each of several speaks to the others."""

import contextlib
import os
import random
import socket
import subprocess
import sys

import keras


def environment(devices=1, backend=None):
    return {
        **os.environ,
        "KERAS_BACKEND": backend or keras.backend.backend(),
        "OMP_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }


def free_address():
    """Return an address with a free port, and another free one above it; none that another connection may be given."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as sockets:
            for place in (port, port + 1):
                sockets.enter_context(socket.socket()).bind(("127.0.0.1", place))
            return f"127.0.0.1:{port}"


def run_under(backend, module, *arguments):
    """Run a module of `support` under a backend, and return what it prints."""
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-m", f"support.{module}", *arguments],
        env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(module, arguments, devices=1, backend=None):
    command = [sys.executable, "-m", f"support.{module}", *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment(devices, backend),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(workers, expected=0, seconds=600):
    """Wait until all have ended, each as expected; end them if it takes longer."""
    try:
        outputs = [w.communicate(timeout=seconds)[0].decode() for w in workers]
    finally:
        for w in workers:
            w.kill()
    for w, output in zip(workers, outputs, strict=True):
        assert w.returncode == expected, output
