"""Start a script in several processes on this machine, and end all of them when one dies.

    python examples/launch.py [--processes 2] examples/jax_data_parallel.py [arguments]

Each process finds its number in RANK, how many there are in WORLD_SIZE, and the address of the first in MASTER_ADDR and
MASTER_PORT. PyTorch's `torchrun` uses the same names and works as well. On a cluster, its scheduler does this.
"""

import argparse
import contextlib
import os
import random
import socket
import subprocess
import sys
import time


def free_ports(count):
    """Return the first of so many free ports in a row: TensorFlow takes one for each process."""
    while True:
        first = random.randrange(20_000, 32_000)  # below those that Linux gives to any connection
        with contextlib.suppress(OSError), contextlib.ExitStack() as sockets:
            for port in range(first, first + count):
                sockets.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(given.processes))}
    shared["WORLD_SIZE"] = str(given.processes)
    workers = [
        subprocess.Popen(
            [sys.executable, given.script, *given.arguments],
            env={**os.environ, **shared, "RANK": str(rank)},
        )
        for rank in range(given.processes)
    ]
    try:
        # When one process has died, the others would wait for it for ever.
        while any(w.poll() is None for w in workers) and not any(w.poll() for w in workers):
            time.sleep(0.2)
        failed = [(rank, w.poll()) for rank, w in enumerate(workers) if w.poll()]
    finally:
        for w in workers:
            w.kill()
    for rank, code in failed:
        sys.exit(f"process {rank} ended with {code}; all were ended")


if __name__ == "__main__":
    main()
