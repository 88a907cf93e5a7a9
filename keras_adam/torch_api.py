"""PyTorch's vocabulary, for people who port: its argument names, its state format, its ways to step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_adam import argument_hints, keras_private
from keras_adam.groups import IMPLEMENTATION, check_betas, check_implementation
from keras_adam.state import State
from keras_adam.torch_state import TorchState

_PYTORCH_NAMES = {"learning_rate": "lr", "beta_1": "betas", "beta_2": "betas", "epsilon": "eps"}


class TorchVocabulary(State):
    """Methods with the names of `torch.optim.Optimizer`'s."""

    @property
    def lr(self):
        """Refuse the name of PyTorch and Keras 2, which would be set without effect."""
        raise AttributeError(
            f"{type(self).__name__} has no attribute `lr`: write `learning_rate`, which can be read and set."
        )

    @lr.setter
    def lr(self, value):
        raise AttributeError(
            f"{type(self).__name__} has no attribute `lr`: write `optimizer.learning_rate = {value!r}`. "
            f"Received: lr={value!r}"
        )

    @classmethod
    @argument_hints.variables_come_later
    def with_torch_arguments(
        cls,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0,
        amsgrad=False,
        *,
        foreach=None,
        maximize=False,
        capturable=False,
        differentiable=False,
        fused=None,
        decoupled_weight_decay=False,
        param_groups=None,
        **keras_options,
    ):
        """Return an optimizer that computes what `torch.optim.Adam`, or `AdamW`, does with these arguments.

        Args:
            lr: Learning rate. Defaults to `1e-3`.
            betas: Pair of decay rates, of the first and the second moment. Defaults to `(0.9, 0.999)`.
            eps: Epsilon of Algorithm 1, added after the bias correction. Defaults to `1e-8`.
            weight_decay: Strength of the weight decay. Defaults to `0`; of `AdamW`, to `0.01`.
            amsgrad: As in the constructor. Defaults to `False`.
            foreach: PyTorch's choice of an implementation, like `capturable` and `fused`. It has no effect here;
                `state_dict` writes it, so that PyTorch goes on with it. Defaults to `None`.
            maximize: Whether to ascend. Defaults to `False`.
            capturable: See `foreach`. Defaults to `False`.
            differentiable: Must be `False`: nothing can be differentiated through a step. Defaults to `False`.
            fused: See `foreach`; not both True. Defaults to `None`.
            decoupled_weight_decay: `False`: an L2 penalty, as `torch.optim.Adam`; `True`: as `torch.optim.AdamW`.
                Defaults to `False`; of `AdamW`, to `True`.
            param_groups: As in the constructor. Defaults to `None`.
            **keras_options: Any other argument of the constructor, such as `clipnorm` or `use_ema`.

        Raises:
            ValueError: If an argument is out of its range, `differentiable` is True, or `foreach` and `fused` are both
                True.
            TypeError: If an argument is unknown or of the wrong kind.

        Examples:
            >>> import keras_adam
            >>> keras_adam.Adam.with_torch_arguments(lr=3e-4, weight_decay=0.01).epsilon
            1e-08
        """
        rates = check_betas(betas)
        choices = (foreach, capturable, differentiable, fused)
        implementation = check_implementation(dict(zip(IMPLEMENTATION, choices, strict=True)))
        for name, instead in _PYTORCH_NAMES.items():
            if name in keras_options:
                raise TypeError(
                    f"`with_torch_arguments` takes PyTorch's names: write `{instead}=` for `{name}`. "
                    f"Received: {name}={keras_options[name]!r}"
                )
        optimizer = cls(
            learning_rate=lr,
            **rates,
            epsilon=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            decoupled_weight_decay=decoupled_weight_decay,
            epsilon_hat=keras_options.pop("epsilon_hat", False),
            param_groups=param_groups,
            **keras_options,
        )
        for group in reversed(optimizer._groups):  # the default one first, which the others follow
            group.set_implementation(implementation if group.is_default else {})
        return optimizer

    # State

    @keras_private.without_autocast()
    def state_dict(
        self,
        variables: Sequence[Any] | None = None,
        *,
        convert: Callable | None = None,
        as_numpy: bool = False,
    ) -> dict[str, Any]:
        """Return the state as `torch.optim.Adam.state_dict` does; its `load_state_dict` takes it.

        Args:
            variables: The variables, or their paths, in the order of PyTorch's parameters; all of them. Defaults to
                the order in which the optimizer was built.
            convert: Function `(variable, array) -> array` that brings an array of the variable's shape into PyTorch's
                layout, or returns None for the default: kernels transposed or permuted, all else as it is. Needed for
                a DepthwiseConv2D or EinsumDense that was given a name, as only Keras's own names tell its kind; and
                for a Dense after a Flatten, as PyTorch flattens channels first. Defaults to `None`.
            as_numpy: Whether to return NumPy arrays rather than PyTorch's tensors, for which PyTorch must be
                installed. Defaults to `False`.

        Each group has `param_names`, as from `named_parameters()` in PyTorch: the variables' paths, which
        `load_state_dict` follows.

        PyTorch's `eps` is that of Algorithm 1. With `epsilon_hat=True`, Keras's default, the epsilon means something
        else there as long as the bias correction lasts.

        Raises:
            ValueError: If the optimizer is not built, `variables` are not its variables, or a group has
                `amsgrad="corrected"`, whose maximum PyTorch's format cannot hold.
            ImportError: If PyTorch is not installed and `as_numpy` is False.
        """
        wrap = np.array if as_numpy else _torch().from_numpy
        updates = int(ops.convert_to_numpy(self.iterations))
        return self._torch_state(variables, convert).write(updates, self._engine.whole, wrap)

    def load_state_dict(
        self,
        state_dict: dict[str, Any],
        variables: Sequence[Any] | None = None,
        *,
        mapping: Mapping[str, Any] | None = None,
        convert: Callable | None = None,
    ) -> None:
        """Take over the state and the hyperparameters of a `torch.optim.Adam` or `AdamW`; or of `state_dict`.

        The optimizer must be built, with as many groups as the state dict has, each of as many variables. Arrays may be
        PyTorch's tensors or NumPy's. A learning-rate schedule stays; a number is replaced by `lr`.

        The state dict of an optimizer that was given `named_parameters()` holds `param_names`. The names decide, and
        not the order, if each name and each variable has its counterpart. A name means the path that is the same but
        for separators, enclosing names and the last word: "weight" is a kernel, gamma, scale or embeddings, and "bias"
        a bias or beta. So "encoder.layer.0.norm.weight" is "model/encoder/layer_0/norm/gamma".

        Otherwise the order decides. A name that contradicts it is refused: one that means a variable at another
        place; "weight" where the order has a bias; and, unless `variables` gives the order, "2.weight" before
        "0.weight". A state dict without `param_names` goes by the order alone.

        Args:
            state_dict: What `torch.optim.Adam.state_dict()` returned, or what `torch.load(..., weights_only=True)`
                read of it.
            variables: The variables, or their paths, in the order of PyTorch's parameters; all of them. Defaults to
                the order in which the optimizer was built.
            mapping: Dictionary from PyTorch's name to the variable or its path, for names that have no counterpart
                or mean something else here. Defaults to `None`.
            convert: Function `(variable, array) -> array` that brings PyTorch's array into the variable's layout, or
                returns None for the default: kernels transposed or permuted, all else as it is. Defaults to `None`.

        Raises:
            ValueError: If anything does not fit; the error names the first difference, and nothing is assigned.
        """
        read = self._torch_state(variables, convert).read(
            state_dict, mapping, self._trace.is_traced
        )
        self._loading.check_joined(read.joined)
        # From here on nothing can fail.
        read.assign(self._views)
        self._iterations.assign(read.updates * (self.gradient_accumulation_steps or 1))
        if self.gradient_accumulation_steps:
            self._engine.reset(self._parameters.first_arrays("accumulator"))
        self._loading.set_joined(read.joined)

    def _torch_state(self, order, convert) -> TorchState:
        return TorchState(self._parameters, self._groups, self._views, order, convert)

    # Steps

    def minimize(self, loss_fn: Callable[[], Any], variables: Iterable[Any] | None = None):
        """Compute the loss, differentiate it, and apply the gradients.

        Args:
            loss_fn: Function without arguments that returns the scalar loss, computed from the variables.
            variables: The variables to update. Defaults to those that the optimizer was built with.

        Returns:
            The loss before the step, unscaled.

        Raises:
            ValueError: If `variables` is None and the optimizer is not built.

        Examples:
            >>> import keras, keras_adam
            >>> weight = keras.Variable(3.0)
            >>> optimizer = keras_adam.Adam(0.5)
            >>> losses = [optimizer.minimize(lambda: (weight - 1) ** 2, [weight]) for _ in range(3)]
            >>> [round(float(loss), 2) for loss in losses]
            [4.0, 2.25, 1.02]
        """
        if variables is None:
            if not self._parameters:
                raise ValueError(
                    "`minimize` needs `variables`, as the optimizer is not built. Received: variables=None"
                )
            variables = self._trainable_variables
        variables = list(variables)
        loss, grads = self._engine.differentiate(loss_fn, variables)
        self.apply(grads, variables)
        return loss

    def step(self, closure: Callable[[], Any] | None = None):
        """Minimize the loss that `closure` returns over the variables that the optimizer was built with.

        Args:
            closure: Function without arguments that returns the loss. On the PyTorch backend it may call
                `loss.backward()` itself. There it may also be left out after a `backward()`: then the variables'
                `.grad` is applied, if there is any. With `loss_scale_factor`, call `backward()` on
                `optimizer.scale_loss(loss)`. Defaults to `None`.

        Returns:
            The loss before the step, or None without a closure.

        Raises:
            ValueError: If the optimizer is not built, or `closure` is None on another backend than PyTorch.
        """
        if not self._parameters:
            raise ValueError(
                "`step` needs a built optimizer: call `optimizer.build(variables)` first."
            )
        if closure is None:
            grads = self._engine.stored_gradients()
            if any(g is not None for g in grads):
                self.apply(grads, self._trainable_variables)
            return None
        return self.minimize(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients that PyTorch keeps on the variables; other backends keep none.

        Args:
            set_to_none: Whether `.grad` becomes None rather than zeros. Defaults to `True`.
        """
        self._engine.clear_gradients(set_to_none)


def _torch():
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "`state_dict()` returns PyTorch's tensors, and PyTorch is not installed; "
            "`state_dict(as_numpy=True)` returns NumPy arrays."
        ) from error
    return torch
