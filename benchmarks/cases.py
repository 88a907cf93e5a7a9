"""What is measured: one optimizer step at several sizes, and whole training steps of small models."""

import dataclasses

SIZES = [
    (1, 10),
    (500, 10),
    (200, 4_096),
    (1, 2_000_000),
    (50, 200_000),
    (20, 2_000_000),
]
XLA_SIZES = [
    (1, 10),
    (50, 200_000),
    (20, 2_000_000),
]  # it compiles hundreds of variables for minutes
LARGEST = "20 x 2,000,000"  # where memory is measured too
ACCUMULATION = 8
LEARNING_RATE, BETA_1, BETA_2, EPSILON = 1e-3, 0.9, 0.999, 1e-7

# Contestants.
OURS = "keras_adam.Adam"
GROUPS = "keras_adam.Adam, 4 groups"
LAZY = "keras_adam.Adam(lazy=True)"
KERAS = "keras.optimizers.Adam"
NAIVE = "naive Keras subclass"
SGD = "keras.optimizers.SGD"
TORCH = {kind: f"torch.optim.Adam, {kind}" for kind in ("single", "foreach", "fused", "compiled")}
PLAIN_TORCH = "plain PyTorch loop, fused Adam"
OPTAX, MULTI_STEPS = "optax.adam", "optax.MultiSteps"
KERNEL = "ResourceApplyAdam"
PEERS = (*TORCH.values(), PLAIN_TORCH, OPTAX, MULTI_STEPS, KERNEL)
MEMORY_PASS = "memory pass, 28 bytes per parameter"
WITHOUT_ACCUMULATION = ", no accumulation"


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the results. Its contestants take turns in one process."""

    backend: str
    work: str  # "step", "accumulation", "embedding" or "fit"
    mode: str  # how the step is run: eager, jit, graph, XLA
    name: str  # of the full size, also in a quick run
    count: int = 0  # of variables; for an embedding, of rows
    elements: int = 0  # of each variable; for an embedding, of each row
    accumulation: int | None = None

    @property
    def parameters(self) -> int:
        return self.count * self.elements

    @property
    def title(self) -> str:
        return f"{self.backend}, {self.mode}: {self.name}"


def cases(backend: str, quick: bool) -> list[Case]:
    """Return the cases of a backend; a quick run has the same ones, so small that they only show that all works."""
    modes = {"torch": ["eager"], "tensorflow": ["graph", "XLA"], "jax": ["jit", "eager"]}[backend]
    found = [
        step(backend, mode, *size, quick)
        for mode in modes
        for size in (XLA_SIZES if mode == "XLA" else SIZES)
    ]
    found.append(
        dataclasses.replace(
            step(backend, modes[0], 20, 500_000, quick),
            work="accumulation",
            name=f"20 x 500,000, accumulation {ACCUMULATION}, per micro-step",
            accumulation=ACCUMULATION,
        )
    )
    if backend == "tensorflow":
        rows = 1_000 if quick else 1_000_000
        name = "embedding 1,000,000 x 32, 512 rows"
        found.append(Case(backend, "embedding", modes[0], name, rows, 32))
    fits = ["8 x Dense(1024), batch 32", "small convnet", "small transformer"]
    found += [Case(backend, "fit", "fit", name) for name in fits]
    if backend == "jax":
        name = f"{fits[0]}, accumulation 4"
        found.append(Case(backend, "fit", "fit", name, accumulation=4))
    return found


def step(backend, mode, count, elements, quick) -> Case:
    """Return the case of one step of so many variables."""
    name = f"{count} x {elements:,}"
    if quick:
        count, elements = -(-count // 100), max(10, elements // 100)
    return Case(backend, "step", mode, name, count, elements)
