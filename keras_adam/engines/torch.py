"""PyTorch's engine: its fused kernel, its functions of lists, and no gradient through the update."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import keras
import torch
import torch.distributed as dist
from keras.src.backend.common.stateless_scope import in_stateless_scope

from keras_adam import hyperparameters, rule
from keras_adam.engines.base import Bucket, Engine, Gradients, StepFunction, Tensor, Variable
from keras_adam.engines.torch_kernel import FUSED, Tensors, apart, can_fuse
from keras_adam.groups import NUMERIC, ParamGroup
from keras_adam.parameters import Joining, Parameter, Plan
from keras_adam.sparse import Rows
from keras_adam.step_config import StepConfig
from keras_adam.storage import Compensated


class TorchEngine(Engine):
    """The work of a step on PyTorch."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._host_values: dict[int, tuple[Any, float, Any]] = {}
        self._host_numbers: dict[ParamGroup, tuple[Any, dict[str, Any], list[str], Any]] = {}

    @torch.no_grad()
    def run(
        self, step: StepFunction, grads: Gradients, variables: list[Variable], config: StepConfig
    ) -> None:
        iterations = self.optimizer._iterations
        before, version = self._read(iterations), _version(iterations._value)
        with _without_autocast(iterations._value.device.type):
            step(grads, variables, config)
        if _version(iterations._value) == version + 1:
            # The count rose by one step. Reading it from the device would wait for all work in its queue.
            self._remember(iterations, before + 1)

    def to_build(self) -> Engine:
        if not (self.optimizer.shard_state and _has_group()) or dist.get_world_size() == 1:
            return self
        from keras_adam.engines.torch_spread import SpreadEngine  # which imports this module

        return SpreadEngine(self.optimizer, self.parameters, self.trace)

    def parts_of(self, plans: list[Plan]) -> list[Any]:
        for variable, _, _ in plans:
            if type(variable._value).__name__ == "DTensor":
                raise ValueError(
                    "`variables` must be whole tensors in each process, as Keras makes them, under "
                    "`keras.distribution.DataParallel` too; `shard_state=True` spreads their state. "
                    f"Received: '{variable.path}', a DTensor"
                )
        return super().parts_of(plans)

    def process(self) -> int:
        return dist.get_rank() if _has_group() else 0

    def wait_for_all(self) -> None:
        if _has_group():
            dist.barrier()

    def is_compiling(self) -> bool:
        return torch.compiler.is_compiling()

    # Counting on the host; the device is asked only for what was written to since.

    def count(self, is_done: Tensor) -> None:
        variable = self.optimizer._iterations if is_done else self.optimizer.skipped_steps
        if self._read(variable) < torch.iinfo(_tensor_of(variable).dtype).max:
            if in_stateless_scope():
                variable.assign_add(1)
            else:  # as `assign_add` does, in a tenth of the time
                variable._value.add_(1)

    def updates(self) -> Tensor:
        if self._is_stateless() or self.is_compiling():
            return super().updates()
        return self._updates()

    def is_last_call(self, every: int) -> bool:
        return (self._read(self.optimizer._iterations) + 1) % every == 0

    def is_last_update(self, every: int) -> bool:
        return (self._updates() + 1) % every == 0

    def is_first_update(self, every: int) -> bool:
        return self._updates() % every == 0

    def has_started(self, joined: Joining | None) -> bool:
        return self._updates() != (0 if joined is None else self._read(joined.update))

    def begin_again(self) -> None:
        if self.parameters.joinings:
            updates = self._updates()
            for joining in self.parameters.joinings:
                if self._read(joining.update) > updates:
                    joining.update.assign(0)

    def _updates(self) -> int:
        steps = self.optimizer.gradient_accumulation_steps or 1
        return self._read(self.optimizer._iterations) // steps

    def _is_stateless(self) -> bool:
        iterations = self.optimizer._iterations
        return _tensor_of(iterations) is not iterations._value

    def _read(self, variable: Variable) -> Any:
        """Return a scalar variable's value as a Python number, asking the device only if it was written to."""
        value = _tensor_of(variable)
        known = self._host_values.get(id(variable))
        if known is not None and known[0] is value and known[1] == _version(value):
            return known[2]
        number = value.item()
        self._remember(variable, number)
        return number

    def _remember(self, variable: Variable, number: Any) -> None:
        value = _tensor_of(variable)
        self._host_values[id(variable)] = value, _version(value), number

    # The fused kernel

    def apart(self, grads: Gradients, variables: list[Variable]) -> Gradients:
        if self._is_stateless() or self.is_compiling():
            return grads
        return apart(grads, self.buckets(variables))

    def update(self, grads: Gradients, variables: list[Variable], learning_rate: Any) -> None:
        if self._is_stateless() or self.is_compiling():
            self.update_each(grads, variables, learning_rate)
            return
        buckets = self.buckets(variables)
        grads = apart(grads, buckets)
        updates = self._updates()
        for bucket in buckets:
            chosen = [grads[i] for i in bucket.positions]
            if can_fuse(bucket, chosen):
                self._fused_step(bucket, chosen, learning_rate, updates)
            else:
                self.update_each(chosen, bucket.variables, learning_rate)

    def buckets(self, variables: list[Variable]) -> list[Bucket]:
        buckets = super().buckets(variables)
        # A list, not a generator: each bucket must renew its parameters.
        if not all([bucket.memory.is_current() for bucket in buckets]):
            self.forget()
            buckets = super().buckets(variables)
        return buckets

    def bucket(
        self, kind: tuple[Any, ...], positions: list[int], parameters: list[Parameter]
    ) -> Bucket:
        bucket = super().bucket(kind, positions, parameters)
        bucket.memory = Tensors(bucket)
        return bucket

    def device_of(self, variable: Variable) -> Any:
        return variable.value.device

    def _fused_step(
        self, bucket: Bucket, grads: list[Any], learning_rate: Any, updates: int
    ) -> None:
        group, options = bucket.group, bucket.group.options
        tensors = bucket.memory
        start = 0 if bucket.joined is None else self._read(bucket.joined.update)
        t = updates + 1 - start
        now = self._numbers_of(group, learning_rate)
        epsilon = now["epsilon"]
        if options.epsilon_hat:
            epsilon = rule.epsilon_of_algorithm_1(epsilon, now["beta_2"], t)
        tensors.step.fill_(t)
        update = functools.partial(
            FUSED[options.decoupled_weight_decay],
            lr=now["learning_rate"],
            beta1=now["beta_1"],
            beta2=now["beta_2"],
            weight_decay=now["weight_decay"] if bucket.decays else 0.0,
            eps=epsilon,
            amsgrad=bool(options.amsgrad),
            maximize=options.maximize,
        )
        if not all(map(torch.Tensor.is_contiguous, grads)):
            grads = [g.contiguous() for g in grads]
        if any(map(torch.Tensor.is_neg, grads)):  # as of the imaginary part of a conjugate
            grads = [g.resolve_neg() for g in grads]
        if tensors.in_pieces:
            # Concatenated as they are, gradients of several dtypes would be rounded to one of them.
            if len({g.dtype for g in grads}) > 1:
                grads = [g.float() for g in grads]
            tensors.update_in_pieces(update, grads, self.dither())
        else:
            tensors.update_whole(update, grads)

    def _numbers_of(self, group: ParamGroup, learning_rate: Any) -> dict[str, float]:
        """Return the group's numbers on the host; the device is asked only after they were changed."""
        stored = None if group.stored is None else group.stored._value
        key = group.changes, None if stored is None else (id(stored), _version(stored))
        known = self._host_numbers.get(group)
        if known is None or known[0] != key:
            numbers = {name: group.own(name) for name in NUMERIC}
            dynamic = [name for name, x in numbers.items() if hyperparameters.is_dynamic(x)]
            # `stored` is held, so that its `id` is not used again.
            known = self._host_numbers[group] = key, numbers, dynamic, stored
        _, numbers, dynamic, _ = known
        now = dict(numbers)
        for name in dynamic:
            value: Any = hyperparameters.resolve(
                name, now[name], self.optimizer._iterations, compiling=False
            )
            # A schedule's rate may stay on the device, where the kernel reads it; the rest must be numbers.
            now[name] = value if name == "learning_rate" else float(value)
        if now["learning_rate"] is None:
            if isinstance(learning_rate, keras.Variable):
                learning_rate = self._read(learning_rate)
            now["learning_rate"] = learning_rate * now["learning_rate_multiplier"]
        now["weight_decay"] = now["weight_decay"] or 0.0
        return now

    # What is done to all gradients or averages, by PyTorch's functions of lists

    def densify_all(self, grads: Gradients) -> list[Tensor]:
        if {*map(type, grads)} == {torch.Tensor} and {g.layout for g in grads} == {torch.strided}:
            return grads
        return super().densify_all(grads)

    def densify(self, gradient: Any) -> Tensor:
        if not isinstance(gradient, torch.Tensor):
            return keras.ops.convert_to_tensor(gradient)
        if gradient.layout is torch.strided:
            return gradient
        # In bfloat16 a sum of ones stops at 256.
        return (gradient.float() if gradient.dtype.itemsize < 4 else gradient).to_dense()

    def sparse_rows(self, gradient: Any) -> Rows | None:
        if not isinstance(gradient, torch.Tensor) or gradient.layout is not torch.sparse_coo:
            return None
        if gradient.sparse_dim() != 1:
            return None
        return Rows(tuple(gradient.shape), gradient._indices()[0], gradient._values())

    def put_rows(self, indices: Tensor, variable: Variable, rows: Tensor) -> None:
        value = variable.value
        value.index_copy_(0, indices, rows.to(value.dtype))

    def unscale(self, values: list[Tensor]) -> list[Tensor]:
        return torch._foreach_div(widened_all(values), self.config.loss_scale_factor)

    def are_finite(self, values: list[Tensor]) -> bool:
        # The only read from the device in a step; PyTorch's own `GradScaler` makes it too.
        return bool(self.finite(values))

    def finite(self, values: list[Tensor]) -> Tensor:
        """Return on the device whether no value is infinite or NaN."""
        values = [x for x in values if x.numel() and x.is_floating_point()]
        largest = torch._foreach_norm(values, float("inf")) if values else [torch.zeros(())]
        return torch.stack(largest).isfinite().all()

    def norms(self, values: list[Tensor]) -> Tensor:
        norms = torch._foreach_norm(widened_all(values))
        if len({(x.dtype, x.device) for x in norms}) > 1:
            norms = [x.to(norms[0].device, torch.float32) for x in norms]
        return torch.stack(norms)

    def has_no_spike(self, norm: Tensor, window: Tensor, deviations: float) -> bool:
        return bool(super().has_no_spike(norm, window, deviations))  # read from the device

    def samples(self, bucket: Bucket) -> list[Tensor]:
        if self._is_stateless() or self.is_compiling():
            return super().samples(bucket)
        views = bucket.memory.samples
        if views is None:
            return super().samples(bucket)
        return [torch.cat(of_kind) for of_kind in views]

    def clip(self, values: list[Tensor]) -> list[Tensor]:
        values = widened_all(values)
        if len({(x.dtype, x.device) for x in values}) != 1:
            return super().clip(values)
        name, limit = self.config.clipping or ("", 0.0)
        if name == "clipnorm":
            norms = torch.stack(torch._foreach_norm(values))
            return torch._foreach_mul(values, (limit / norms).clamp_(max=1.0).unbind())
        if name == "global_clipnorm":
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(values)))
            return torch._foreach_mul(values, (limit / norm).clamp_(max=1.0))
        values = torch._foreach_clamp_min(values, -limit)
        return torch._foreach_clamp_max(values, limit)

    def accumulate(self, accumulators: list[Variable], grads: list[Tensor]) -> None:
        values = [a.value for a in accumulators]
        torch._foreach_add_(values, [g.to(a.dtype) for g, a in zip(grads, values, strict=True)])

    def means(self, accumulators: list[Variable], steps: int) -> list[Tensor]:
        return torch._foreach_div([a.value for a in accumulators], steps)

    def reset(self, accumulators: list[Variable]) -> None:
        torch._foreach_zero_([a.value for a in accumulators])

    def move_averages(self, variables: list[Variable]) -> None:
        if self._is_stateless():
            super().move_averages(variables)
            return
        going_on: tuple[list, list] = [], []
        first: tuple[list, list] = [], []
        for variable, average, started in self.averages_of(variables):
            averages, values = going_on if started else first
            averages.append(average._value)
            parameter = self.parameters[variable]
            has_lost = isinstance(parameter.value.storage, Compensated)
            values.append(self.read_parameter(variable) if has_lost else parameter.here._value)
        if going_on[0]:
            torch._foreach_lerp_(*_alike(*going_on), rule.complement(self.config.ema_momentum))
        if first[0]:  # the first update sets the average
            torch._foreach_copy_(*first)

    @torch.no_grad()
    def overwrite_with_averages(self, variables: list[Variable]) -> None:
        super().overwrite_with_averages(variables)

    # Differentiation

    def differentiate(
        self, loss_fn: Callable[[], Tensor], variables: list[Variable]
    ) -> tuple[Tensor, list[Any]]:
        values = [v.value for v in variables]
        before = [v.grad for v in values]  # held, so that no new one can be mistaken for an old one
        # A closure in PyTorch's way may call `loss.backward()` itself, or assign gradients.
        called: list[Any] = []
        leaves = [v for v in values if v.requires_grad and v.is_leaf]
        hooks = [v.register_post_accumulate_grad_hook(called.append) for v in leaves]
        with torch.enable_grad():
            try:
                loss = loss_fn()
            finally:
                for hook in hooks:
                    hook.remove()
            done = bool(called) or any(
                v.grad is not None and v.grad is not old
                for v, old in zip(values, before, strict=True)
            )
            if done:
                return loss.detach(), [v.grad for v in values]
            scaled = self.optimizer.scale_loss(loss)
            grads = torch.autograd.grad(scaled, values, allow_unused=True)
        return loss.detach(), list(grads)

    def stored_gradients(self) -> list[Any]:
        return [v.value.grad for v in self.optimizer._trainable_variables]

    def clear_gradients(self, set_to_none: bool) -> None:
        for variable in self.optimizer._trainable_variables:
            if set_to_none:
                variable.value.grad = None
            elif variable.value.grad is not None:
                variable.value.grad.zero_()


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _tensor_of(variable: Variable) -> Any:
    """Return a variable's value; outside of scopes, without its property, which takes a microsecond."""
    return variable.value if in_stateless_scope() else variable._value


def _without_autocast(device: str):
    """Return a context without autocast, which refuses to concatenate tensors of the other half precision."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _version(tensor):
    """Return how often a tensor was written to; in inference mode, which does not count, NaN, equal to nothing."""
    return float("nan") if tensor.is_inference() else tensor._version


def _alike(targets, values):
    return targets, [
        v if v.dtype is t.dtype else v.to(t.dtype) for t, v in zip(targets, values, strict=True)
    ]


def widened_all(values: list[Any]) -> list[Tensor]:
    """Return tensors in float32 at least."""
    values = [keras.ops.convert_to_tensor(x) for x in values]
    return [x if x.is_floating_point() and x.dtype.itemsize >= 4 else x.float() for x in values]
