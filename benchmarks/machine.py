"""The machine, the versions, and how fast memory is."""

import importlib.metadata
import itertools
import os
import platform
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import measure
import numpy as np

_PACKAGES = {
    "jax": ["jax", "jaxlib", "optax"],
    "tensorflow": ["tensorflow", "tensorflow-cpu"],
    "torch": ["torch"],
}


def describe(backend: str) -> dict[str, str]:
    """Return the machine's description and the versions."""
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = {
        "processor": f"{_processor()}, {cores()} cores",
        "memory": f"{gigabytes:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
    }
    for package in ["keras", *_PACKAGES[backend], "numpy"]:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # one of TensorFlow's two names
            continue
    return found


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def memory_pass(parameters: int) -> measure.Step:
    """Prepare a pass that moves as much as Adam must and computes next to nothing, with a thread per core.

    It updates three arrays in place and reads a fourth: the same ratio of reads to writes as Adam's.
    """
    p, g, m, v = np.zeros((4, parameters), np.float32)
    edges = np.linspace(0, parameters, cores() + 1).astype(int)
    parts = [slice(*pair) for pair in itertools.pairwise(edges)]
    pool = ThreadPoolExecutor(len(parts))

    def one(part):
        np.add(p[part], g[part], out=p[part])
        np.multiply(m[part], np.float32(1.0), out=m[part])
        np.multiply(v[part], np.float32(1.0), out=v[part])

    def run():
        list(pool.map(one, parts))

    return measure.Step(run)
