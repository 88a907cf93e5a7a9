"""What PyTorch does its own way: its fused kernel, and no gradient through the update."""

import contextlib
import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any

import keras
import torch

from keras_adam import hyperparameters, rule, seams
from keras_adam.groups import NUMERIC
from keras_adam.rows import Rows

# PyTorch's own fused Adam, one call for many tensors. The function around it in `torch.optim` sorts the tensors by
# device and dtype at each call, which for many small ones takes longer than the kernel: here they are sorted once.
try:
    _FUSED: dict[bool, Any] = {False: torch._fused_adam_, True: torch._fused_adamw_}
except AttributeError as error:
    raise ImportError(
        f"keras_adam needs PyTorch {seams.PYTORCH}, whose fused kernels it calls: {error}. "
        f"Received: torch {torch.__version__}"
    ) from None
_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


class Backend:
    """Overrides for PyTorch."""

    def __init__(self, *args, **kwargs):
        self.__dict__.update(_host_values={}, _host_numbers={})
        super().__init__(*args, **kwargs)

    @torch.no_grad()
    def apply(self, grads, trainable_variables=None):
        before, version = self._read(self._iterations), _version(self._iterations._value)
        self._check_count(before)
        with _without_autocast(self._iterations._value.device.type):
            super().apply(grads, trainable_variables)
        if _version(self._iterations._value) == version + 1:
            # One step was counted: known without asking the device, which would wait for all that is under way.
            self._remember(self._iterations, before + 1)

    @torch.no_grad()
    def _overwrite_model_variables_with_average_value(self, trainable_variables):
        return super()._overwrite_model_variables_with_average_value(trainable_variables)

    # The fused step

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        if self._is_stateless() or self._is_compiling():
            return self._portable_update_step(grads, trainable_variables, learning_rate)
        buckets = self._buckets(trainable_variables)
        grads = _apart(grads, buckets)
        if not self._may_fuse():
            return self._portable_update_step(grads, trainable_variables, learning_rate)
        updates = self._updates()
        for bucket in buckets:
            chosen = [grads[i] for i in bucket.positions]
            if self._can_fuse(bucket, chosen):
                self._fused_step(bucket, chosen, learning_rate, updates)
            else:
                self._portable_update_step(chosen, bucket.variables, learning_rate)

    def _is_stateless(self) -> bool:
        return self._iterations.value is not self._iterations._value

    def _may_fuse(self) -> bool:
        return not self._overrides_update()

    def _buckets(self, variables):
        buckets = super()._buckets(variables)
        # All of them: each renews its list of parameters.
        if not all([bucket.memory.is_current() for bucket in buckets]):
            self._bucket_cache.clear()
            buckets = super()._buckets(variables)
        return buckets

    def _bucket(self, kind, positions, variables):
        bucket = super()._bucket(kind, positions, variables)
        bucket.memory = _Tensors(bucket)
        return bucket

    def _can_fuse(self, bucket, grads) -> bool:
        tensors = bucket.memory
        return (
            tensors.serve
            # A model's `to(memory_format=...)` keeps its tensors, and changes their strides.
            and all(map(torch.Tensor.is_contiguous, tensors.parameters))
            and bucket.group.options.amsgrad != "corrected"
            and {g.device for g in grads} == {tensors.device}
            and (tensors.in_pieces or {g.dtype for g in grads} == {tensors.dtype})
        )

    def _fused_step(self, bucket, grads, learning_rate, updates: int) -> None:
        group, options = bucket.group, bucket.group.options
        tensors = bucket.memory
        start = 0 if bucket.start is None else self._read(self._starts[bucket.start])
        t = updates + 1 - start
        now = self._numbers_of(group, learning_rate)
        epsilon = now["epsilon"]
        if options.epsilon_hat:
            epsilon = rule.epsilon_of_algorithm_1(epsilon, now["beta_2"], t)
        tensors.step.fill_(t)
        update = functools.partial(
            _FUSED[options.decoupled_weight_decay],
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
            # Joined as they are, gradients of several dtypes would be rounded to one of these.
            if len({g.dtype for g in grads}) > 1:
                grads = [g.float() for g in grads]
            tensors.update_in_pieces(update, grads, self._dither())
        else:
            moments = tensors.m, tensors.v, tensors.s
            update(tensors.parameters, grads, *moments, tensors.steps)

    def _numbers_of(self, group, learning_rate) -> dict[str, float]:
        """Return the group's numbers on the host; they are read from the device only after they were changed."""
        stored = None if group.stored is None else group.stored._value
        key = group.changes, None if stored is None else (id(stored), _version(stored))
        if self._host_numbers.get(group, (None,))[0] != key:
            numbers = {name: group.own(name) for name in NUMERIC}
            self._host_numbers[group] = (
                key,
                numbers,
                stored,
            )  # held, so that its `id` is not used again
        now = dict(self._host_numbers[group][1])
        for name, value in now.items():
            if hyperparameters.is_dynamic(value):
                now[name] = hyperparameters.resolve(name, value, self._iterations, compiling=False)
        if now["learning_rate"] is None:
            if isinstance(learning_rate, keras.Variable):
                learning_rate = self._read(learning_rate)
            now["learning_rate"] = learning_rate * now["learning_rate_multiplier"]
        now["weight_decay"] = now["weight_decay"] or 0.0
        # A schedule's rate may stay on the device, where the kernel reads it; the rest must be numbers.
        return {name: x if name == "learning_rate" else float(x) for name, x in now.items()}

    def _read(self, variable):
        """Return a scalar variable's value as a Python number, asking the device only if it was written to."""
        value = variable.value
        tensor, version, number = self._host_values.get(id(variable), (None, None, None))
        if tensor is not value or version != _version(value):
            number = value.item()
            self._remember(variable, number)
        return number

    def _updates(self) -> int:
        """Return the number of updates so far, several calls of `apply` each where gradients are accumulated."""
        return self._read(self._iterations) // (self.gradient_accumulation_steps or 1)

    def _remember(self, variable, number) -> None:
        value = variable.value
        self._host_values[id(variable)] = value, _version(value), number

    # What is done to all gradients or averages, by PyTorch's functions of lists

    def _densify_all(self, grads):
        if {*map(type, grads)} == {torch.Tensor} and {g.layout for g in grads} == {torch.strided}:
            return grads
        return super()._densify_all(grads)

    def _unscale(self, values):
        return torch._foreach_div(_widened(values), self.loss_scale_factor)

    def _clip(self, values):
        values = _widened(values)
        if len({(x.dtype, x.device) for x in values}) != 1:
            return super()._clip(values)
        if self.clipnorm:
            norms = torch.stack(torch._foreach_norm(values))
            return torch._foreach_mul(values, (self.clipnorm / norms).clamp_(max=1.0).unbind())
        if self.global_clipnorm:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(values)))
            return torch._foreach_mul(values, (self.global_clipnorm / norm).clamp_(max=1.0))
        values = torch._foreach_clamp_min(values, -self.clipvalue)
        return torch._foreach_clamp_max(values, self.clipvalue)

    def _begin_again(self):
        updates = self._updates()
        for start in self._starts:
            if self._read(start) > updates:
                start.assign(0)

    def _are_finite(self, values):
        # The one thing that is read from the device in a step, as by PyTorch's own `GradScaler`.
        values = [x for x in values if x.numel() and x.is_floating_point()]
        largest = torch._foreach_norm(values, float("inf")) if values else [torch.zeros(())]
        return bool(torch.stack(largest).isfinite().all())

    def _has_started(self, start):
        return self._updates() != (0 if start is None else self._read(self._starts[start]))

    def _update_model_variables_moving_average(self, trainable_variables):
        if self._is_stateless():
            super()._update_model_variables_moving_average(trainable_variables)
            return
        going_on: tuple[list, list] = [], []
        first: tuple[list, list] = [], []
        has_lost = any(x is not None for x in self._slots("_compensations"))
        for variable, average, started in self._averages_of(trainable_variables):
            averages, values = going_on if started else first
            averages.append(average._value)
            values.append(self._read_parameter(variable) if has_lost else variable._value)
        if going_on[0]:
            torch._foreach_lerp_(*_alike(*going_on), rule.complement(self.ema_momentum))
        if first[0]:  # the first update sets the average
            torch._foreach_copy_(*first)

    # Accumulation

    def _is_due(self, iterations, every):
        of_calls = iterations is self._iterations
        count = self._read(self._iterations) if of_calls else self._updates()
        return (count + 1) % every == 0

    def _backend_increment_gradient_accumulators(self, grads, acc_grads):
        values = [a.value for a in acc_grads[: len(grads)]]
        torch._foreach_add_(values, [g.to(a.dtype) for g, a in zip(grads, values, strict=True)])

    def _means(self, accumulators, steps):
        return torch._foreach_div([a.value for a in accumulators], steps)

    def _reset(self, accumulators):
        torch._foreach_zero_([a.value for a in accumulators])

    def _device_of(self, variable):
        return variable.value.device

    # Differentiation

    def _is_compiling(self) -> bool:
        return torch.compiler.is_compiling()

    def _densify(self, gradient):
        if not isinstance(gradient, torch.Tensor):
            return keras.ops.convert_to_tensor(gradient)
        if gradient.layout is torch.strided:
            return gradient
        # In bfloat16 a sum of ones stops at 256.
        return (gradient.float() if gradient.dtype.itemsize < 4 else gradient).to_dense()

    def _sparse_rows(self, gradient):
        if not isinstance(gradient, torch.Tensor) or gradient.layout is not torch.sparse_coo:
            return None
        if gradient.sparse_dim() != 1:
            return None
        return Rows(tuple(gradient.shape), gradient._indices()[0], gradient._values())

    def _put_rows(self, indices, variable, rows):
        value = variable.value
        value.index_copy_(0, indices, rows.to(value.dtype))

    def _differentiate(self, loss_fn, variables):
        values = [v.value for v in variables]
        before = [v.grad for v in values]  # held, so that no new one can be mistaken for an old one
        with torch.enable_grad():
            loss = loss_fn()
            # A closure in PyTorch's way may have called `loss.backward()` itself.
            done = any(
                v.grad is not None and v.grad is not old
                for v, old in zip(values, before, strict=True)
            )
            if not done:
                try:
                    scaled = self.scale_loss(loss)
                    grads = torch.autograd.grad(scaled, values, allow_unused=True)
                except RuntimeError as error:
                    if "a second time" not in str(error):
                        raise
                    done = True
        return loss.detach(), [v.grad for v in values] if done else list(grads)

    def _stored_gradients(self):
        return [v.value.grad for v in self._trainable_variables]

    def _clear_gradients(self, set_to_none):
        for variable in self._trainable_variables:
            if set_to_none:
                variable.value.grad = None
            elif variable.value.grad is not None:
                variable.value.grad.zero_()

    def _when(self, condition, update: Callable[[], None]) -> None:
        if condition:
            update()


def _without_autocast(device: str):
    """Return a context without autocast, which refuses to join tensors of the half precision that is not its own."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _version(tensor):
    """Return how often a tensor was written to; of inference mode, which does not count, NaN: it equals nothing."""
    return float("nan") if tensor.is_inference() else tensor._version


def _apart(grads, buckets):
    """Return the gradients, copied where their memory is that of a tensor which the update writes to."""
    starts = list(map(torch.Tensor.data_ptr, grads))
    if any(map(torch.Tensor.storage_offset, grads)):
        starts = list(map(_start, grads))
    written = [bucket.memory.starts for bucket in buckets]
    if all(memory.isdisjoint(starts) for memory in written):
        return grads
    return [
        g.clone() if any(start in memory for memory in written) else g
        for g, start in zip(grads, starts, strict=True)
    ]


def _start(tensor) -> int:
    """Return the address where the storage of a tensor begins, which all its views share."""
    return tensor.data_ptr() - tensor.storage_offset() * tensor.itemsize


def _alike(targets, values):
    return targets, [
        v if v.dtype is t.dtype else v.to(t.dtype) for t, v in zip(targets, values, strict=True)
    ]


def _widened(values):
    values = [keras.ops.convert_to_tensor(x) for x in values]
    return [x if x.is_floating_point() and x.dtype.itemsize >= 4 else x.float() for x in values]


# How many elements of half precision are updated at once. Float32 copies of all of them would take more memory than
# their state; these stay in the processor's cache, which makes it five times as fast.
_PIECE = 2**18


class _Tensors:
    """A bucket's tensors, in the lists that the kernel takes."""

    def __init__(self, bucket):
        self.variables = bucket.variables
        self.parameters = [v._value for v in bucket.variables]
        self.pointers = list(map(torch.Tensor.data_ptr, self.parameters))
        slots = [list(x) for x in zip(*bucket.moments, strict=True)]
        self.slots = [x for x in itertools.chain(*slots, bucket.compensations) if x is not None]
        self.m, self.v, self.s, self.lost = (
            [x._value for x in of_kind if x is not None]
            for of_kind in (*slots, bucket.compensations)
        )
        self.state = [*self.m, *self.v, *self.s, *self.lost]
        self.starts = {_start(x) for x in (*self.parameters, *self.state) if x.numel()}
        first = self.parameters[0]
        self.dtype, self.device = first.dtype, first.device
        is_half = self.dtype.itemsize < 4
        wide = torch.float32 if is_half else self.dtype
        self.has_half_state = wide is torch.float32 and self.m[0].dtype is torch.bfloat16
        self.in_pieces = is_half or self.has_half_state
        with torch.inference_mode(False):  # else it could be written to in inference mode alone
            self.step = torch.zeros((), dtype=torch.float32, device=self.device)
        self.steps = [self.step] * len(self.parameters)
        state = (*self.m, *self.v, *self.s)
        filled = [x.data_ptr() for x in self.parameters if x.numel()]
        # The kernel walks through memory, all tensors in step, and knows one dtype at a time.
        self.serve = (
            self.device.type in _FUSED_DEVICES
            # Of variables that share their tensor, each is updated from what the one before left.
            and len(set(filled)) == len(filled)
            and all(x.dtype is (torch.bfloat16 if self.has_half_state else wide) for x in state)
            and all(x.dtype is self.dtype for x in self.parameters)
            and all(
                x.device == self.device and x.is_contiguous() for x in (*self.parameters, *state)
            )
        )

    def is_current(self) -> bool:
        """Whether the variables still have the tensors that they had, which may be other Python objects now."""
        # A parameter's memory tells: a model's `to` may leave the object and change that.
        self.parameters = [v._value for v in self.variables]
        return self.pointers == list(map(torch.Tensor.data_ptr, self.parameters)) and all(
            map(operator.is_, self.state, [x._value for x in self.slots])
        )

    def update_in_pieces(self, update, grads, dither) -> None:
        """Update what is of half precision in float32, so many elements at a time, in one piece of memory."""
        name = keras.backend.standardize_dtype(self.dtype)
        tensors = self.parameters, self.lost, grads, self.m, self.v, self.s
        for cuts in self._pieces:
            parameters, lost, chosen, *state = (
                [x[cut] for x, cut in _flat(y, cuts)] for y in tensors
            )
            sizes = [x.numel() for x in parameters]
            whole = torch.cat(parameters)
            whole = _joined(whole, torch.cat(lost), name) if lost else whole.float()
            moments, widened = state, []
            if self.has_half_state:
                widened = [torch.cat(x).float() for x in state if x]
                moments = [list(x.split(sizes)) for x in widened]
                moments += [[]] * (len(state) - len(moments))
            steps = self.steps[:1] * len(sizes)
            update(whole.split(sizes), torch.cat(chosen).float().split(sizes), *moments, steps)
            if lost:
                whole, rest = _split(whole, name, dither)
                torch._foreach_copy_(lost, rest.split(sizes))
            torch._foreach_copy_(parameters, whole.split(sizes))
            for kept, x in zip(state, widened, strict=False):
                torch._foreach_copy_(kept, _dithered(x, dither).split(sizes))

    @functools.cached_property
    def _pieces(self) -> list[list[tuple[int, slice]]]:
        """Return, by piece, which tensors are in it, and which of their elements."""
        pieces: list[list[tuple[int, slice]]] = []
        room = 0
        for i, parameter in enumerate(self.parameters):
            for start in range(0, parameter.numel(), _PIECE):
                stop = min(start + _PIECE, parameter.numel())
                if stop - start > room:
                    pieces.append([])
                    room = _PIECE
                pieces[-1].append((i, slice(start, stop)))
                room -= stop - start
        return pieces


def _joined(p, lost, dtype: str):
    """`rule.joined`; in bfloat16 by casts, without new memory, and without comparisons, which are slow on CPUs."""
    if dtype != "bfloat16":
        return rule.joined(p.float(), lost.float(), dtype)
    wide, lost = p.float(), lost.float()
    rounded = lost.mul(0.99).add_(wide).to(p.dtype)
    away = rounded.view(torch.int16).bitwise_xor_(p.view(torch.int16))  # 0 where they are the same
    fits = away.neg().bitwise_or_(away).bitwise_right_shift_(15).bitwise_not_()  # all bits, or none
    lost.view(torch.int32).bitwise_and_(fits.to(torch.int32))
    return wide.add_(lost)


def _split(p, dtype: str, dither):
    """`rule.split`; in bfloat16 by casts."""
    if dtype != "bfloat16":
        return rule.split(p, dtype, dither)
    kept = p.to(torch.bfloat16)
    rest = kept.float()
    return kept, _dithered(torch.sub(p, rest, out=rest), dither)


def _dithered(x, dither):
    """`rule.rounded` to bfloat16, of an `x` that may be overwritten."""
    # A NaN may carry into the sign, and become a number. A look for one costs little on a CPU, where nothing waits.
    if x.device.type != "cpu" or not x.sum().isfinite():
        return rule.rounded(x, "bfloat16", dither)
    bits = x.view(torch.int32)
    bits.add_((dither * 2**16).to(torch.int32)).bitwise_right_shift_(16)
    return bits.to(torch.int16).view(torch.bfloat16)


def _flat(tensors, cuts):
    return [(tensors[i].view(-1), cut) for i, cut in cuts] if tensors else []
