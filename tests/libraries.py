"""Run each example of docs/guides/other_libraries.md with the libraries that it needs, under each backend.

`make test-libraries` runs all; `make test-libraries LIBRARIES_ARGS="--backends jax --only keras_hub"` some. They have
an environment of their own in .matrix/: keras-hub brings a second TensorFlow, which `make test` does without.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
ENVIRONMENT = ROOT / ".matrix" / "libraries"
PAGE = ROOT / "docs" / "guides" / "other_libraries.md"
BACKENDS = ["jax", "tensorflow", "torch"]

# What an example imports, and its name on the index.
LIBRARIES = {
    "keras_hub": "keras-hub",
    "keras_tuner": "keras-tuner",
    "keras_rs": "keras-rs",
    "bayesflow": "bayesflow",
    "sklearn": "scikit-learn",
}
BESIDES = ["tensorboard"]  # keras-tuner imports it under TensorFlow


def examples():
    """Return (library, code, line) of each block of the page."""
    text = PAGE.read_text(encoding="utf-8")
    found = []
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        imported = re.findall(r"^(?:import|from) (\w+)", block[1], re.MULTILINE)
        (library,) = LIBRARIES.keys() & set(imported)
        found.append((library, block[1], text.count("\n", 0, block.start(1))))
    return found


def environment():
    """Make or renew the environment, and return its Python."""
    own = ENVIRONMENT / "bin" / "python"
    if not own.exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
    wanted = [*BACKENDS, *LIBRARIES.values(), *BESIDES]
    command = [own, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    subprocess.run([*command, "-e", ROOT, *wanted], check=True)
    # Comes with PyTorch's CUDA build, which does without it on a CPU; loaded after JAX it crashes.
    subprocess.run([own, "-m", "pip", "uninstall", "-q", "-y", "triton"], check=True)
    return own


def run(own, backend, code):
    """Run one example in a process and an empty folder of its own; return what it said if it failed."""
    variables = {"KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [own, "-c", code],
            cwd=folder,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    return done.stdout[-4000:] + f"\nstatus {done.returncode}" if done.returncode else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--only", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    args = parser.parse_args()
    own = environment()
    failed = 0
    for backend in args.backends:
        for library, code, line in examples():
            if library in args.only:
                said = run(own, backend, code)
                failed += bool(said)
                name = f"{PAGE.relative_to(ROOT)}:{line + 1}, {library}, {backend}"
                print(f"{said}\n{name}: FAILED" if said else f"{name}: ok", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
