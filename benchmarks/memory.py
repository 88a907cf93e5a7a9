"""Peak memory of one optimizer step beyond the variables, gradients and state; each contestant in its own process.

Linux keeps each process's highest resident memory (VmHWM) and resets it on request. A step is run after others have
allocated all that stays; the peak minus the resident memory before is the step's own. C's allocator is set to return
freed memory at once, so that it keeps none.
"""

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cases
import measure

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def measure_peaks(backend: str, quick: bool, advance) -> dict[str, dict]:
    """Return the bytes that each contestant's largest step takes in addition to what stays, by mode and name."""
    if not (_STATUS.exists() and os.access(_RESET, os.W_OK)):
        return {}
    peaks: dict[str, dict] = {}
    wanted = [
        (case, name)
        for case in cases.cases(backend, quick)
        if case.work == "step" and case.name == cases.LARGEST
        for name in _wanted(case)
    ]
    wanted = wanted[:1] if quick else wanted
    for i, (case, name) in enumerate(wanted):
        advance(f"memory of {name}", i / len(wanted))
        flags = ["--quick"] if quick else []
        command = [sys.executable, __file__, case.mode, name, *flags]
        done = subprocess.run(
            command, env=os.environ | ALLOCATOR, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        peaks.setdefault(case.mode, {})[name] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def _wanted(case: cases.Case) -> list[str]:
    of_torch = [cases.TORCH[kind] for kind in ("single", "foreach", "fused")]
    peers = {
        "eager": of_torch if case.backend == "torch" else [],
        "graph": [cases.KERNEL],
        "XLA": [],
        "jit": [cases.OPTAX],
    }
    return [cases.OURS, cases.KERAS, *peers[case.mode]]


def _peak(mode: str, name: str, quick: bool) -> dict[str, int]:
    import run

    case = next(
        case
        for case in cases.cases(run.backend_name(), quick)
        if case.mode == mode and case.work == "step" and case.name == cases.LARGEST
    )
    step: measure.Step = run.contestants(case, quick)[name]()
    for _ in range(3):
        step.run()
    gc.collect()
    return {"beyond": beyond(step), "parameters": 4 * case.parameters}


def beyond(step: measure.Step) -> int:
    """Return the bytes of resident memory that a step takes at its peak, beyond what there was before."""
    before = resident()
    _RESET.write_text("5")
    step.run()
    return max(0, resident("VmHWM") - before)


def resident(field: str = "VmRSS") -> int:
    """Return the bytes of this process's resident memory; 0 where Linux does not tell."""
    status = _STATUS.read_text() if _STATUS.exists() else ""
    found = re.search(rf"{field}:\s*(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


if __name__ == "__main__":
    print(json.dumps(_peak(sys.argv[1], sys.argv[2], "--quick" in sys.argv)))
