"""One optimizer step on PyTorch: Keras's optimizers and PyTorch's own."""

import functools
import shutil

import cases
import measure
import numpy as np
import optimizers
import torch

# Its compiler takes minutes for hundreds of variables.
_MOST_COMPILED = 50


def gradients(case: cases.Case) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(case.elements) for _ in range(case.count)]


def contestants(case: cases.Case, grads) -> dict:
    found = {
        name: functools.partial(keras_step, case, make, grads)
        for name, make in optimizers.optimizers(case).items()
    }
    if case.work == "step":
        for kind, name in cases.TORCH.items():
            found[name] = functools.partial(_torch_step, case, grads, kind)
    return found


@torch.no_grad()
def keras_step(case, make, grads) -> measure.Step:
    variables = optimizers.new_variables(case)
    optimizer = make(variables)
    optimizer.build(variables)

    @torch.no_grad()  # as Keras's trainer does
    def run():
        for _ in range(case.accumulation or 1):
            optimizer.apply(grads, variables)

    return measure.Step(
        run, lambda: variables[0].value.detach().numpy().copy(), case.accumulation or 1
    )


def _torch_step(case, grads, kind) -> measure.Step:
    parameters = [torch.nn.Parameter(torch.zeros(case.elements)) for _ in range(case.count)]
    for parameter, gradient in zip(parameters, grads, strict=True):
        parameter.grad = gradient
    optimizer = torch.optim.Adam(
        parameters,
        lr=cases.LEARNING_RATE,
        betas=(cases.BETA_1, cases.BETA_2),
        eps=cases.EPSILON,
        foreach=kind == "foreach",
        fused=kind == "fused",
    )
    run = _compiled(case, optimizer.step) if kind == "compiled" else optimizer.step
    return measure.Step(run, lambda: np.array(parameters[0].detach()))


def _compiled(case, step):
    if not any(map(shutil.which, ("g++", "clang++", "cl"))):
        raise measure.UnavailableError("torch.compile needs a C++ compiler, and none was found")
    if case.count > _MOST_COMPILED:
        raise measure.UnavailableError(
            f"torch.compile takes minutes for more than {_MOST_COMPILED} variables"
        )
    torch._dynamo.reset()
    compiled = torch.compile(step)

    def run():
        try:
            compiled()
        except Exception as error:  # a compiler may be there and not work
            line = str(error).strip().splitlines()[0]
            raise measure.UnavailableError(f"torch.compile failed: {line}") from error

    return run
