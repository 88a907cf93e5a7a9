"""State that travels to and from real `torch.optim.Adam` and `AdamW`."""

import io
import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops
from torch import nn

import keras_adam

torch.set_num_threads(1)  # For tensors this small a second thread only costs.

BACKEND = keras.backend.backend()
OPTIMIZERS = {
    "adam": (torch.optim.Adam, {"lr": 2e-3, "betas": (0.8, 0.99), "weight_decay": 1e-2}),
    "adamw": (torch.optim.AdamW, {"lr": 3e-3, "eps": 1e-7, "amsgrad": True}),
}


def make_ours(torch_class=torch.optim.Adam, **options):
    """What a user who knows the PyTorch optimizer writes."""
    decoupled = torch_class is torch.optim.AdamW
    kept = {k: v for k, v in options.items() if k in ("amsgrad", "maximize", "param_groups")}
    return keras_adam.Adam.with_torch_arguments(decoupled_weight_decay=decoupled, **kept)


def array(x):
    x = x.detach() if isinstance(x, torch.Tensor) else ops.convert_to_numpy(x)
    return np.array(x)


def bits(optimizer):
    """Return all that a refused state dict must leave as it was."""
    groups = [{**group, "params": len(group["params"])} for group in optimizer.param_groups]
    return [array(v).tobytes() for v in optimizer.variables], groups


def make_variables(*shapes):
    """Make variables with a path each; variables of one name would have one path."""
    return [keras.Variable(np.zeros(s, "float32"), name=f"v{i}") for i, s in enumerate(shapes)]


def trained_in_torch(*shapes, steps=3, groups=None, torch_class=torch.optim.Adam, **options):
    """Return a PyTorch optimizer that has taken steps on parameters of these shapes, and the parameters."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    if groups is None:
        optimizer = torch_class(parameters, **options)
    else:
        optimizer = torch_class(
            [{"params": [parameters[i] for i in members], **own} for members, own in groups],
            **options,
        )
    for _ in range(steps):
        torch_step(optimizer, parameters, [torch.randn(s, generator=generator) for s in shapes])
    return optimizer, parameters


def torch_step(optimizer, parameters, gradients):
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


def assert_same_state(actual, desired, **tolerance):
    """Assert that two state dicts are equal, exactly or within a tolerance."""
    assert list(actual["state"]) == list(desired["state"])
    for number, moments in desired["state"].items():
        assert set(actual["state"][number]) == set(moments)
        for name, value in moments.items():
            got = array(actual["state"][number][name])
            np.testing.assert_allclose(got, array(value), **({"rtol": 0} | tolerance))
    names = ("betas", "lr", "eps", "weight_decay", "amsgrad", "maximize", "params")
    for got, want in zip(actual["param_groups"], desired["param_groups"], strict=True):
        assert {n: got[n] for n in names} == {n: want[n] for n in names}
        decoupled = want.get("decoupled_weight_decay", got["decoupled_weight_decay"])
        assert got["decoupled_weight_decay"] == decoupled


# ---------------------------------------------------------------------------------------------------------------------
# Layouts: PyTorch's own layer is the judge of where an element belongs


def channels_last(x):
    return np.moveaxis(x, 1, -1) if x.ndim > 2 else x


def chunks(x, count):
    return [nn.Parameter(part) for part in x.detach().chunk(count)]


def attention(embed=8, heads=2):
    module = nn.MultiheadAttention(embed, heads, batch_first=True)
    nn.init.normal_(module.in_proj_bias)
    nn.init.normal_(module.out_proj.bias)
    kernels, biases = chunks(module.in_proj_weight, 3), chunks(module.in_proj_bias, 3)
    mixed = [p for pair in zip(kernels, biases, strict=True) for p in pair]
    return lambda x: module(x, x, x)[0], [*mixed, *module.out_proj.parameters()]


def chain(*modules):
    module = nn.Sequential(*modules)
    return module, list(module.parameters())


def einsum_out():
    linear = nn.Linear(8, 5)
    return lambda x: linear(x.flatten(2)), list(linear.parameters())


def einsum_in():
    linear = nn.Linear(5, 8)
    return lambda x: linear(x).unflatten(-1, (2, 4)), list(linear.parameters())


def lstm():
    module = nn.LSTM(3, 4, bias=False, batch_first=True)
    return lambda x: module(x)[0][:, -1], list(module.parameters())


def self_attention():
    x = keras.Input((None, 8))
    return keras.Model(x, layers.MultiHeadAttention(2, 4)(x, x))


def block(name, layer):
    """Return a layer inside something named `name`."""
    return keras.Sequential([layer], name=name)


# Keras's layer, PyTorch's, the input without its batch axis in PyTorch's order.
LAYERS = {
    "Dense": (lambda: layers.Dense(6), lambda: chain(nn.Linear(4, 6)), (4,)),
    "Dense, square": (lambda: layers.Dense(4), lambda: chain(nn.Linear(4, 4)), (4,)),
    "Conv1D": (lambda: layers.Conv1D(5, 3), lambda: chain(nn.Conv1d(4, 5, 3)), (4, 7)),
    "Conv1D, cube": (lambda: layers.Conv1D(3, 3), lambda: chain(nn.Conv1d(3, 3, 3)), (3, 7)),
    "Conv2D": (lambda: layers.Conv2D(5, (2, 3)), lambda: chain(nn.Conv2d(4, 5, (2, 3))), (4, 5, 6)),
    "Conv2D, groups": (
        lambda: layers.Conv2D(6, 3, groups=2),
        lambda: chain(nn.Conv2d(4, 6, 3, groups=2)),
        (4, 5, 6),
    ),
    "Conv3D": (
        lambda: layers.Conv3D(5, (2, 3, 2)),
        lambda: chain(nn.Conv3d(3, 5, (2, 3, 2))),
        (3, 4, 5, 4),
    ),
    "Conv1DTranspose": (
        lambda: layers.Conv1DTranspose(5, 3, 2),
        lambda: chain(nn.ConvTranspose1d(4, 5, 3, 2)),
        (4, 5),
    ),
    "Conv2DTranspose": (
        lambda: layers.Conv2DTranspose(5, (2, 3), 2),
        lambda: chain(nn.ConvTranspose2d(4, 5, (2, 3), 2)),
        (4, 3, 4),
    ),
    "Conv2DTranspose, square": (
        lambda: layers.Conv2DTranspose(3, 3),
        lambda: chain(nn.ConvTranspose2d(3, 3, 3)),
        (3, 3, 4),
    ),
    "DepthwiseConv1D": (
        lambda: layers.DepthwiseConv1D(3, depth_multiplier=2),
        lambda: chain(nn.Conv1d(4, 8, 3, groups=4)),
        (4, 6),
    ),
    "DepthwiseConv2D": (
        lambda: layers.DepthwiseConv2D((2, 3), depth_multiplier=3),
        lambda: chain(nn.Conv2d(3, 9, (2, 3), groups=3)),
        (3, 4, 5),
    ),
    "DepthwiseConv2D, square": (
        lambda: layers.DepthwiseConv2D(2, depth_multiplier=3),
        lambda: chain(nn.Conv2d(3, 9, 2, groups=3)),
        (3, 4, 5),
    ),
    "SeparableConv1D": (
        lambda: layers.SeparableConv1D(5, 3, depth_multiplier=2),
        lambda: chain(nn.Conv1d(4, 8, 3, groups=4, bias=False), nn.Conv1d(8, 5, 1)),
        (4, 6),
    ),
    "SeparableConv2D": (
        lambda: layers.SeparableConv2D(6, 3, depth_multiplier=2),
        lambda: chain(nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.Conv2d(6, 6, 1)),
        (3, 5, 4),
    ),
    "BatchNormalization": (
        lambda: layers.BatchNormalization(epsilon=1e-5),
        lambda: chain(nn.BatchNorm2d(4).eval()),
        (4, 3, 3),
    ),
    "GroupNormalization": (
        lambda: layers.GroupNormalization(2, epsilon=1e-5),
        lambda: chain(nn.GroupNorm(2, 4)),
        (4, 3, 3),
    ),
    "LayerNormalization": (
        lambda: layers.LayerNormalization(epsilon=1e-5),
        lambda: chain(nn.LayerNorm(4)),
        (4,),
    ),
    "Embedding": (lambda: layers.Embedding(4, 4), lambda: chain(nn.Embedding(4, 4)), "tokens"),
    "MultiHeadAttention": (self_attention, attention, "sequence of 8"),
    "EinsumDense, heads out": (
        lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 4), bias_axes="de"),
        einsum_in,
        "sequence of 5",
    ),
    "EinsumDense, heads in": (
        lambda: layers.EinsumDense("abde,dec->abc", (None, 5), bias_axes="c"),
        einsum_out,
        "sequence of heads",
    ),
    "EinsumDense, square": (
        lambda: layers.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d"),
        lambda: chain(nn.Linear(5, 5)),
        "sequence of 5",
    ),
    "LSTM": (lambda: layers.LSTM(4, use_bias=False), lstm, "sequence of 3"),
    # What encloses a layer may have any name.
    "Dense in gru_model": (
        lambda: block("gru_model", layers.Dense(4)),
        lambda: chain(nn.Linear(4, 4)),
        (4,),
    ),
    "Dense in depthwise_conv_model": (
        lambda: block("depthwise_conv_model", layers.Dense(4)),
        lambda: chain(nn.Linear(4, 4)),
        (4,),
    ),
    "Conv2D in depthwise_conv_block": (
        lambda: block("depthwise_conv_block", layers.Conv2D(5, 1)),
        lambda: chain(nn.Conv2d(4, 5, 1)),
        (4, 3, 3),
    ),
    "Conv1D in query": (
        lambda: block("query", layers.Conv1D(5, 3)),
        lambda: chain(nn.Conv1d(4, 5, 3)),
        (4, 6),
    ),
}
SEQUENCES = {
    "sequence of 3": (3,),
    "sequence of 5": (5,),
    "sequence of 8": (8,),
    "sequence of heads": (2, 4),
}


def both_inputs(kind, rng):
    if kind == "tokens":
        tokens = rng.integers(0, 4, (2, 6))
        return tokens.astype("int32"), torch.tensor(tokens)
    shape = (3, 4, *SEQUENCES[kind]) if kind in SEQUENCES else (3, *kind)
    x = rng.standard_normal(shape).astype("float32")
    return (x if kind in SEQUENCES else channels_last(x)), torch.tensor(x)


@pytest.mark.short(
    "Dense",
    "Conv2D",
    "Conv2DTranspose",
    "DepthwiseConv2D",
    "Embedding",
    "MultiHeadAttention",
    "LSTM",
)
@pytest.mark.parametrize("case", LAYERS)
def test_a_moment_lies_where_its_weight_lies(rng, case):
    """Weights loaded through `load_state_dict` as if they were momenta make Keras's layer compute what PyTorch's does;
    sent back, they are what they were."""
    make_layer, make_module, kind = LAYERS[case]
    torch.manual_seed(0)
    module, parameters = make_module()
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape))  # Norms start at ones and zeros.
    layer = make_layer()
    ours, theirs = both_inputs(kind, rng)
    layer(ours)
    optimizer = keras_adam.Adam.with_torch_arguments()
    optimizer.build(layer.trainable_variables)
    saved = torch.optim.Adam(parameters).state_dict()
    saved["state"] = {
        i: {"step": torch.tensor(1.0), "exp_avg": p.detach(), "exp_avg_sq": p.detach() ** 2}
        for i, p in enumerate(parameters)
    }
    optimizer.load_state_dict(saved)
    for variable, momentum in zip(layer.trainable_variables, optimizer._momentums, strict=True):
        variable.assign(array(momentum))

    want = array(module(theirs))
    want = want if isinstance(kind, str) else channels_last(want)
    np.testing.assert_allclose(array(layer(ours)), want, rtol=1e-4, atol=1e-5)
    assert_same_state(optimizer.state_dict(), saved)


# ---------------------------------------------------------------------------------------------------------------------
# Hand-over in the middle of training. Activations are smooth: the last bit of a float32 must not decide on which side
# of a kink a unit lies.


class TorchMLP(nn.Sequential):
    shape = (6,)

    def __init__(self):
        super().__init__(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def keras_mlp():
    hidden = [layers.Dense(6, activation="tanh") for _ in range(2)]
    return keras.Sequential([keras.Input((6,)), *hidden, layers.Dense(3)])


class TorchConvnet(nn.Module):
    shape = (2, 6, 6)

    def __init__(self):
        super().__init__()
        # No bias before the norm: its gradient would be rounding errors, which Adam scales to full steps.
        self.conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.depthwise = nn.Conv2d(3, 6, 3, groups=3)
        self.separable = nn.Conv2d(6, 6, 2, groups=6, bias=False)
        self.pointwise = nn.Conv2d(6, 4, 1)
        self.transpose = nn.ConvTranspose2d(4, 4, 2, 2)  # 3 x 3 to 6 x 6
        self.conv3d = nn.Conv3d(4, 4, 2)
        self.conv1d = nn.Conv1d(4, 5, 3)
        self.dense = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.tanh(self.norm(self.conv(x)))
        x = torch.tanh(self.pointwise(self.separable(torch.tanh(self.depthwise(x)))))
        x = torch.tanh(self.transpose(x)).unflatten(3, (3, 2))
        x = torch.tanh(self.conv3d(x)).mean((3, 4))
        return self.dense(torch.tanh(self.conv1d(x)).mean(2))


def keras_convnet():
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(3, 3, padding="same", use_bias=False),
            layers.BatchNormalization(epsilon=1e-5),
            layers.Activation("tanh"),
            layers.DepthwiseConv2D(3, depth_multiplier=2, activation="tanh"),
            layers.SeparableConv2D(4, 2, activation="tanh"),
            layers.Conv2DTranspose(4, 2, 2, activation="tanh"),
            layers.Reshape((6, 3, 2, 4)),
            layers.Conv3D(4, 2, activation="tanh"),
            layers.Reshape((5, 2, 4)),
            layers.AveragePooling2D((1, 2)),
            layers.Reshape((5, 4)),
            layers.Conv1D(5, 3, activation="tanh"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(3),
        ]
    )


class TorchAttention(nn.Module):
    shape = "tokens"

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.norm = nn.LayerNorm(8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.output = nn.Linear(8, 8)
        self.einsum = nn.Linear(8, 6)
        self.dense = nn.Linear(6, 3)

    def forward(self, x):
        x = self.embedding(x)
        y = self.norm(x)
        parts = [layer(y) for layer in (self.query, self.key, self.value)]
        parts = [p.unflatten(2, (2, 4)).transpose(1, 2) for p in parts]
        y = nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        return self.dense(torch.tanh(self.einsum(x + self.output(y))).mean(1))


def keras_attention():
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 8)(tokens)
    y = layers.LayerNormalization(epsilon=1e-5)(x)
    x = layers.add([x, layers.MultiHeadAttention(2, 4)(y, y)])
    x = layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de", activation="tanh")(x)
    x = layers.GlobalAveragePooling1D()(layers.Reshape((5, 6))(x))
    return keras.Model(tokens, layers.Dense(3)(x))


MODELS = {
    "mlp": (TorchMLP, keras_mlp),
    "convnet": (TorchConvnet, keras_convnet),
    "attention": (TorchAttention, keras_attention),
}


def batches(shape, rng, count=4):
    for _ in range(count):
        x = rng.integers(0, 7, (8, 5)) if shape == "tokens" else rng.standard_normal((8, *shape))
        y = rng.standard_normal((8, 3)).astype("float32")
        yield (x if shape == "tokens" else x.astype("float32")), y


def train_torch(model, optimizer, data, start, steps):
    for i in range(start, start + steps):
        x, y = data[i % len(data)]
        optimizer.zero_grad()
        nn.functional.mse_loss(model(torch.tensor(x)), torch.tensor(y)).backward()
        optimizer.step()


def train_keras(model, data, start, steps):
    for i in range(start, start + steps):
        x, y = data[i % len(data)]
        model.train_on_batch(x if x.dtype.kind == "i" else channels_last(x), y)


def in_torch_layout(variables, values):
    """Return the values in PyTorch's layout, by the mapping that `test_a_moment_lies_where_its_weight_lies` tests."""
    optimizer = keras_adam.Adam()
    optimizer.build(variables)
    optimizer.iterations.assign(1)
    for momentum, value in zip(optimizer._momentums, values, strict=True):
        momentum.assign(value)
    return [s["exp_avg"] for s in optimizer.state_dict()["state"].values()]


def in_keras_layout(variables, parameters):
    optimizer = keras_adam.Adam.with_torch_arguments()
    optimizer.build(variables)
    saved = torch.optim.Adam(parameters).state_dict()
    for i, p in enumerate(parameters):
        p = p.detach()
        saved["state"][i] = {"step": torch.tensor(1.0), "exp_avg": p, "exp_avg_sq": p}
    optimizer.load_state_dict(saved)
    return [array(m) for m in optimizer._momentums]


def assert_ends_alike(model, module):
    """Within 1e-5: a wrong step, moment or epsilon shows up at 1e-4 and above, as 50 steps move a weight by 0.1."""
    variables = model.trainable_variables
    ours = in_torch_layout(variables, [array(v) for v in variables])
    for variable, got, (name, want) in zip(variables, ours, module.named_parameters(), strict=True):
        note = f"{variable.path} and {name}"
        np.testing.assert_allclose(array(got), array(want), rtol=0, atol=1e-5, err_msg=note)


@pytest.mark.short("mlp-adamw", "attention-adam")
@pytest.mark.parametrize("options", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_hand_over(rng, name, options):
    """Half a run in PyTorch, the rest in Keras, ends where PyTorch alone ends; and the other way round."""
    torch_class, options = OPTIMIZERS[options]
    if name == "attention":
        # The bias of the keys cancels out of the softmax. Its gradient is rounding errors, 1e-9 or so, which an
        # epsilon of 1e-8 would let make steps of their own.
        options = options | {"eps": 1e-4}
    make_torch, make_keras = MODELS[name]
    torch.manual_seed(0)
    module = make_torch()
    data = list(batches(module.shape, rng))
    optimizer = torch_class(module.parameters(), **options)
    train_torch(module, optimizer, data, 0, 20)

    model = make_keras()
    variables = model.trainable_variables
    for variable, value in zip(
        variables, in_keras_layout(variables, list(module.parameters())), strict=True
    ):
        variable.assign(value)
    model.compile(make_ours(torch_class, **options), "mse", jit_compile=BACKEND == "jax")
    model.optimizer.build(variables)
    model.optimizer.load_state_dict(optimizer.state_dict())
    assert_same_state(model.optimizer.state_dict(), optimizer.state_dict())
    train_keras(model, data, 20, 50)
    train_torch(module, optimizer, data, 20, 50)
    assert_ends_alike(model, module)

    # From here Keras's run is the undisturbed one.
    weights = in_torch_layout(variables, [array(v) for v in variables])
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), weights, strict=True):
            parameter.copy_(value)
    saved = model.optimizer.state_dict()
    optimizer = torch_class(module.parameters())
    optimizer.load_state_dict(saved)
    assert_same_state(saved, optimizer.state_dict())
    train_torch(module, optimizer, data, 70, 50)
    train_keras(model, data, 70, 50)
    assert_ends_alike(model, module)


# ---------------------------------------------------------------------------------------------------------------------
# Groups, order, conversion

GROUPS = [
    ([0], {"lr": 1e-2, "betas": (0.7, 0.9), "eps": 1e-6, "weight_decay": 0.1}),
    ([1, 2], {"lr": 2e-3, "maximize": True}),
    ([3], {"amsgrad": True}),
]
SHAPES = [(4, 3), (3,), (2, 2), (5,)]


def three_groups():
    """Differ from PyTorch's in all that a state dict brings; the last one is the default group."""
    variables = make_variables(*SHAPES)
    optimizer = keras_adam.Adam(
        amsgrad=True,
        param_groups=[
            {"params": variables[:1], "lr": 0.5, "amsgrad": False},
            {"params": variables[1:3], "learning_rate_multiplier": 3, "amsgrad": False},
        ],
    )
    optimizer.build(variables)
    return optimizer, variables


@pytest.mark.parametrize("torch_class", [torch.optim.Adam, torch.optim.AdamW])
def test_several_groups(rng, torch_class):
    theirs, parameters = trained_in_torch(*SHAPES, groups=GROUPS, torch_class=torch_class)
    optimizer, variables = three_groups()
    optimizer.load_state_dict(theirs.state_dict())
    assert_same_state(optimizer.state_dict(), theirs.state_dict())
    assert [g["decoupled_weight_decay"] for g in optimizer.param_groups] == [
        torch_class is torch.optim.AdamW
    ] * 3
    assert [g["epsilon_hat"] for g in optimizer.param_groups] == [False] * 3

    # A fresh PyTorch optimizer takes over from ours, and all three go on alike.
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    groups = [{"params": [copies[i] for i in members]} for members, _ in GROUPS]
    again = torch_class(groups, lr=1.0)
    again.load_state_dict(optimizer.state_dict())
    for variable, parameter in zip(variables, parameters, strict=True):
        variable.assign(array(parameter))
    for _ in range(20):
        gradients = [rng.standard_normal(s).astype("float32") for s in SHAPES]
        for theirs_, ps in ((theirs, parameters), (again, copies)):
            torch_step(theirs_, ps, [torch.tensor(g) for g in gradients])
        optimizer.apply([ops.convert_to_tensor(g) for g in gradients], variables)
    for variable, parameter, copy in zip(variables, parameters, copies, strict=True):
        np.testing.assert_allclose(array(variable), array(parameter), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(array(copy), array(parameter))


def test_as_many_groups_as_have_variables():
    theirs, _ = trained_in_torch((3,), (3,), groups=[([0], {}), ([1], {"lr": 0.5})])
    variables = make_variables((3,), (3,))
    optimizer = make_ours(param_groups=[{"params": v} for v in variables])  # and the empty default
    optimizer.build(variables)
    optimizer.load_state_dict(theirs.state_dict())
    assert_same_state(optimizer.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("by_path", [False, True], ids=["variables", "paths"])
def test_explicit_order(by_path):
    """Two variables have one shape, and only the order tells them apart."""
    theirs, _ = trained_in_torch((3,), (3,), (2,))
    a, b, c = variables = make_variables((3,), (2,), (3,))
    optimizer = make_ours()
    optimizer.build(variables)
    order = [c.path, a.path, b.path] if by_path else [c, a, b]
    optimizer.load_state_dict(theirs.state_dict(), order)
    first = theirs.state_dict()["state"][0]["exp_avg"]
    np.testing.assert_array_equal(array(optimizer._momentums[2]), array(first))
    assert_same_state(optimizer.state_dict(order), theirs.state_dict())


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (["v0", "v9"], "Received: 'v9'"),
        (["v0"], "without .*v1"),
        (["v0", "v0"], "each of the optimizer's variables once"),
        ([keras.Variable(np.zeros(3, "float32"), name="stranger")] * 2, "'stranger'"),
    ],
)
def test_order_must_name_each_variable_once(order, message):
    theirs, _ = trained_in_torch((3,), (3,))
    optimizer = make_ours()
    optimizer.build(make_variables((3,), (3,)))
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(theirs.state_dict(), order)
    with pytest.raises(ValueError, match=message):
        optimizer.state_dict(order)


def test_convert():
    """It converts a variable that no rule fits; where it returns None, the default holds."""
    theirs, _ = trained_in_torch((2, 6), (5, 4))
    odd = keras.Variable(np.zeros((3, 4), "float32"), name="odd")
    dense = layers.Dense(5, use_bias=False)
    dense.build((None, 4))
    optimizer = make_ours()
    optimizer.build([odd, dense.kernel])

    def into_keras(variable, x):
        return x.reshape(3, 4)[:, ::-1] if variable is odd else None

    def into_torch(variable, x):
        return x[:, ::-1].reshape(2, 6) if variable is odd else None

    optimizer.load_state_dict(theirs.state_dict(), convert=into_keras)
    want = theirs.state_dict()["state"]
    got = array(optimizer._momentums[0])
    np.testing.assert_array_equal(got, array(want[0]["exp_avg"]).reshape(3, 4)[:, ::-1])
    np.testing.assert_array_equal(array(optimizer._velocities[1]), array(want[1]["exp_avg_sq"]).T)
    assert_same_state(optimizer.state_dict(convert=into_torch), theirs.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# Refused as a whole


def refused(optimizer, state_dict, message, **options):
    before = bits(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict, **options)
    assert bits(optimizer) == before


def trained_in_keras(*shapes, **options):
    """Return an optimizer whose state is not zero, so that a change to it shows."""
    variables = make_variables(*shapes)
    optimizer = make_ours(**options)
    optimizer.build(variables)
    optimizer.apply([ops.ones(s) for s in shapes], variables)
    return optimizer


def test_count_that_was_set_back_to_before_a_variable_joined():
    (a, b), gradient = make_variables((2,), (2,)), keras.ops.ones(2)
    optimizer = keras_adam.Adam()
    for _ in range(3):
        optimizer.apply([gradient], [a])
    optimizer.add_param_group({"params": b})
    optimizer.apply([gradient, gradient], [a, b])
    optimizer.iterations.assign(2)
    steps = [float(x["step"]) for x in optimizer.state_dict()["state"].values()]
    assert steps == [2, 2]


def test_mismatch_names_the_variable_and_both_shapes():
    """Only the last variable does not fit; neither the others nor the numbers are touched."""
    theirs, _ = trained_in_torch((4,), (4, 3), lr=0.5, betas=(0.5, 0.5))
    optimizer = trained_in_keras((4,), (3, 4))
    refused(optimizer, theirs.state_dict(), r"'v1' has shape \(3, 4\).*shape \(4, 3\)")
    refused(
        optimizer, theirs.state_dict(), r"'v1' .*\(3, 4\)", convert=lambda variable, x: x.ravel()
    )


def test_mismatch_of_a_kernel():
    theirs, _ = trained_in_torch((5, 4), (5,))
    dense = layers.Dense(4)
    dense.build((None, 5))
    optimizer = make_ours()
    optimizer.build(dense.trainable_variables)
    refused(optimizer, theirs.state_dict(), r"'dense.*/kernel' has shape \(5, 4\).*\(5, 4\)")


@pytest.mark.parametrize(
    ("make_layer", "shape", "wrong"),
    [
        (lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 4)), (None, 3, 5), (20, 2)),
        (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), (None, 4, 4, 3), (3, 2, 3, 3)),
        (lambda: layers.GRU(2), (None, 3, 6), (6, 6)),
    ],
    ids=["einsum", "depthwise", "gru"],
)
def test_as_many_elements_are_not_enough(make_layer, shape, wrong):
    """PyTorch's would be (8, 5), (6, 1, 3, 3), and a matrix with its gates in another order."""
    layer = make_layer()
    layer.build(shape)
    kernel = next(v for v in layer.trainable_variables if v.name == "kernel")
    optimizer = make_ours()
    optimizer.build([kernel])
    theirs, _ = trained_in_torch(wrong)
    refused(optimizer, theirs.state_dict(), "kernel' has shape")


@pytest.mark.parametrize("ours", [True, False, "corrected"])
def test_amsgrad_must_agree(ours):
    theirs, _ = trained_in_torch((4,), amsgrad=ours is False)
    optimizer = trained_in_keras((4,), amsgrad=ours)
    refused(optimizer, theirs.state_dict(), "amsgrad|max_exp_avg_sq")


def test_corrected_amsgrad_is_not_pytorchs():
    theirs, _ = trained_in_torch((4,), amsgrad=True)
    optimizer = trained_in_keras((4,), amsgrad="corrected")
    refused(optimizer, theirs.state_dict(), "amsgrad=True.*'corrected'")


def test_numbers_of_groups_and_parameters():
    theirs, _ = trained_in_torch((4,), (4,))
    refused(trained_in_keras((4,), (4,), (4,)), theirs.state_dict(), "3 parameters.*Received: 2")
    theirs, _ = trained_in_torch((4,), (4,), groups=[([0], {}), ([1], {})])
    refused(trained_in_keras((4,), (4,)), theirs.state_dict(), "1. Received: 2")


def test_damaged_state_dicts():
    theirs, _ = trained_in_torch((4,), (4,))
    optimizer = trained_in_keras((4,), (4,))
    refused(optimizer, {}, "'state' and 'param_groups'")
    refused(optimizer, theirs, "'state' and 'param_groups'")

    def damaged(change):
        state_dict = theirs.state_dict()
        state_dict["state"] = {i: dict(s) for i, s in state_dict["state"].items()}
        change(state_dict)
        return state_dict

    refused(optimizer, damaged(lambda d: d["param_groups"][0].pop("eps")), "lacks 'eps'")
    refused(optimizer, damaged(lambda d: d["state"][1].pop("exp_avg_sq")), "'v1'.*'exp_avg_sq'")
    refused(optimizer, damaged(lambda d: d["state"].update({7: d["state"][0]})), r"\[7\]")
    refused(optimizer, damaged(lambda d: d["state"][1].update(step=1.5)), "'v1'.*step=1.5")
    refused(optimizer, damaged(lambda d: d["param_groups"][0].update(eps=-1)), "epsilon.*-1")


def test_unbuilt():
    for use in (lambda o: o.state_dict(), lambda o: o.load_state_dict({})):
        with pytest.raises(ValueError, match=r"optimizer.build"):
            use(make_ours())


# ---------------------------------------------------------------------------------------------------------------------
# Formats


def test_reads_what_torch_save_wrote():
    theirs, _ = trained_in_torch((4,), (2, 3), amsgrad=True)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    optimizer = trained_in_keras((4,), (2, 3), amsgrad=True)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(optimizer.state_dict(), theirs.state_dict())

    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert_same_state(torch.load(file, weights_only=True), theirs.state_dict())


def test_bfloat16():
    """PyTorch's moments are of its parameters' dtype, ours are float32: no bit is lost on the way in or back."""
    parameter = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    theirs = torch.optim.Adam([parameter])
    torch_step(theirs, [parameter], [torch.linspace(-3, 3, 64, dtype=torch.bfloat16)])
    saved = theirs.state_dict()
    assert saved["state"][0]["exp_avg"].dtype == torch.bfloat16
    optimizer = make_ours()
    variable = keras.Variable(np.ones(64, "float32"), dtype="bfloat16")
    optimizer.build([variable])
    optimizer.load_state_dict(saved)
    assert optimizer._momentums[0].dtype == "float32"
    np.testing.assert_array_equal(
        array(optimizer._velocities[0]), array(saved["state"][0]["exp_avg_sq"].float())
    )
    theirs.load_state_dict(optimizer.state_dict())
    for name, value in theirs.state_dict()["state"][0].items():
        assert torch.equal(value, saved["state"][0][name])


def test_numbers_as_tensors():
    """PyTorch has tensors for numbers where it compiles its step."""
    betas = torch.tensor(0.5), torch.tensor(0.75)
    theirs, _ = trained_in_torch((4,), lr=torch.tensor(0.25), betas=betas)
    optimizer = trained_in_keras((4,))
    optimizer.load_state_dict(theirs.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"]) == (0.25, (0.5, 0.75))


def test_loaded_state_is_a_copy():
    """PyTorch's run goes on in the memory that the state dict shows; NumPy's arrays may be written to as well."""
    theirs, parameters = trained_in_torch((64,), (64,))
    optimizer = trained_in_keras((64,), (64,))
    optimizer.load_state_dict(theirs.state_dict())
    before = bits(optimizer)
    torch_step(theirs, parameters, [torch.ones(64)] * 2)
    assert bits(optimizer) == before

    saved = optimizer.state_dict(as_numpy=True)
    optimizer.load_state_dict(saved)
    for moments in saved["state"].values():
        moments["exp_avg"][:] = 7
    assert bits(optimizer) == before


def test_saved_state_is_a_copy():
    for as_numpy in (False, True):
        variables = make_variables((64,))
        optimizer = make_ours()
        optimizer.build(variables)
        optimizer.apply([ops.ones((64,))], variables)
        saved = optimizer.state_dict(as_numpy=as_numpy)["state"][0]
        kept = {name: array(value) for name, value in saved.items()}
        optimizer.apply([ops.ones((64,))], variables)
        for name, value in saved.items():
            np.testing.assert_array_equal(array(value), kept[name])


WITHOUT_TORCH = """
    import sys

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "torch":
                raise ModuleNotFoundError("No module named 'torch'", name="torch")

    sys.meta_path.insert(0, Block())
    import keras, keras_adam
    import numpy as np

    def make():
        variables = [keras.Variable(np.zeros(s, "float32"), name="v") for s in [(3,), (2, 2)]]
        optimizer = keras_adam.Adam.with_torch_arguments(lr=0.5, amsgrad=True)
        optimizer.build(variables)
        return optimizer, variables

    optimizer, variables = make()
    optimizer.apply([keras.ops.ones(v.shape) for v in variables], variables)
    saved = optimizer.state_dict(as_numpy=True)
    assert type(saved["state"][1]["max_exp_avg_sq"]) is np.ndarray
    other, _ = make()
    other.load_state_dict(saved)
    for ours, theirs in zip(optimizer.variables, other.variables, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    assert np.any(other.variables[-1].numpy() != 0)
    try:
        optimizer.state_dict()
    except ImportError as error:
        assert "as_numpy=True" in str(error)
    else:
        raise AssertionError("PyTorch's tensors without PyTorch")
    assert "torch" not in sys.modules
"""

IMPORTS = """
    import sys
    import keras
    before = set(sys.modules)  # Keras brings JAX along, if it finds it
    import keras_adam
    optimizer = keras_adam.Adam(param_groups=[{"params": "v", "lr": 0.1}])
    variable = keras.Variable([1.0], name="v")
    optimizer.apply([keras.ops.ones((1,))], [variable])
    optimizer.load_state_dict(optimizer.state_dict(as_numpy=True))
    print(sorted({"jax", "tensorflow", "torch"} & (set(sys.modules) - before)))
"""


def run_python(code, backend):
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_numpy_state_without_torch_installed():
    run_python(WITHOUT_TORCH, "jax" if BACKEND == "torch" else BACKEND)


def test_imports_no_framework_but_the_backend():
    assert run_python(IMPORTS, BACKEND).strip() == "[]"


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def test_steps_that_differ(rng):
    """A parameter without gradients for a while in PyTorch is behind, here too; one that never had any is new."""
    theirs, parameters = trained_in_torch((4,), (4,), (4,), steps=0)
    for i in range(9):
        present = [True, i >= 5, False]
        torch_step(theirs, parameters, [torch.ones(4) if p else None for p in present])
    saved = theirs.state_dict()
    assert [int(s["step"]) for s in saved["state"].values()] == [9, 4]
    variables = make_variables((4,), (4,), (4,))
    for variable, parameter in zip(variables, parameters, strict=True):
        variable.assign(array(parameter))
    optimizer = make_ours()
    optimizer.build(variables)
    optimizer.load_state_dict(saved)
    assert_same_state(optimizer.state_dict(), saved)
    for _ in range(5):
        gradients = [rng.standard_normal(4).astype("float32") for _ in range(3)]
        torch_step(theirs, parameters, [torch.tensor(g) for g in gradients])
        optimizer.apply([ops.convert_to_tensor(g) for g in gradients], variables)
        for variable, parameter in zip(variables, parameters, strict=True):
            np.testing.assert_allclose(array(variable), array(parameter), rtol=1e-5, atol=1e-6)
    assert_same_state(optimizer.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)


def test_gradient_accumulation():
    """`step` counts updates, `iterations` micro-steps; a half-filled accumulator is emptied."""
    theirs, _ = trained_in_torch((4,), steps=6)
    variables = make_variables((4,))
    optimizer = keras_adam.Adam.with_torch_arguments(gradient_accumulation_steps=3)
    optimizer.build(variables)
    optimizer.apply([ops.ones((4,))], variables)
    optimizer.load_state_dict(theirs.state_dict())
    assert int(array(optimizer._iterations)) == 18
    assert not array(optimizer._accumulated_gradients[0]).any()
    assert_same_state(optimizer.state_dict(), theirs.state_dict())


def test_schedule_stays():
    theirs, _ = trained_in_torch((4,), lr=0.5, eps=1e-3)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)
    optimizer = keras_adam.Adam.with_torch_arguments(lr=schedule)
    optimizer.build(make_variables((4,)))
    optimizer.load_state_dict(theirs.state_dict())
    assert float(optimizer.learning_rate) == pytest.approx(0.05)
    assert optimizer.epsilon == 1e-3


def test_group_with_multiplier_still_follows_the_rate():
    """The run is resumed at a rate that a callback has lowered; then the callback lowers it again."""
    variables = make_variables((3,), (3,))

    def make():
        group = {"params": variables[0], "learning_rate_multiplier": 0.1}
        optimizer = keras_adam.Adam(1e-2, param_groups=[group])
        optimizer.build(variables)
        return optimizer

    saving, loading = make(), make()
    saving.learning_rate = 1e-3
    loading.load_state_dict(saving.state_dict())
    assert [g["lr"] for g in loading.param_groups] == pytest.approx([1e-4, 1e-3])
    loading.learning_rate = 1e-4
    assert [g["lr"] for g in loading.param_groups] == pytest.approx([1e-5, 1e-4])


# ---------------------------------------------------------------------------------------------------------------------
# Before and after the first compiled step


def compiled_model(**options):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3)])
    model.compile(keras_adam.Adam(1e-3, **options), "mse", jit_compile=BACKEND == "jax")
    model.optimizer.build(model.trainable_variables)
    return model


DATA = np.eye(3, dtype="float32"), np.ones((3, 3), "float32")


def test_options_before_and_after_the_first_compiled_step():
    """PyTorch's epsilon and L2 decay replace Keras's before there is a compiled step; PyTorch compiles none here."""
    theirs, _ = trained_in_torch((3, 3), (3,), weight_decay=0.5)
    saved = theirs.state_dict()
    model = compiled_model(param_groups=[])
    model.optimizer.load_state_dict(saved)
    assert model.optimizer.decoupled_weight_decay is False
    assert model.optimizer.epsilon_hat is False
    model.train_on_batch(*DATA)

    late = compiled_model(param_groups=[])
    late.train_on_batch(*DATA)
    if BACKEND == "torch":
        late.optimizer.load_state_dict(saved)
        assert late.optimizer.decoupled_weight_decay is False
    else:
        refused(late.optimizer, saved, r"decoupled_weight_decay=False.*compiled")

    # The options agree, the numbers differ.
    saved["param_groups"][0].update(lr=0.25, betas=(0.5, 0.75))
    model.optimizer.load_state_dict(saved)
    group = model.optimizer.param_groups[0]
    assert (group["lr"], group["betas"]) == (0.25, (0.5, 0.75))


def test_numbers_after_the_first_compiled_step_need_groups():
    theirs, _ = trained_in_torch((3, 3), (3,), betas=(0.5, 0.75))
    model = compiled_model(decoupled_weight_decay=False, epsilon_hat=False)
    model.train_on_batch(*DATA)
    if BACKEND == "torch":
        model.optimizer.load_state_dict(theirs.state_dict())
        assert model.optimizer.beta_1 == 0.5
    else:
        refused(model.optimizer, theirs.state_dict(), "beta_1.*param_groups=")


@pytest.mark.parametrize("steps", [(4, 4), (4, 6)])
def test_steps_after_the_first_compiled_step(steps):
    """The step was compiled when the second variable had joined late: it fits the loaded state, or that is refused."""
    theirs, _ = trained_in_torch((2, 2), (2, 2), groups=[([0], {}), ([1], {})])
    saved = theirs.state_dict()
    for number, step in enumerate(steps):
        saved["state"][number]["step"] = torch.tensor(float(step))

    def make(groups):
        dense = [layers.Dense(2, use_bias=False, kernel_initializer="ones") for _ in range(2)]
        model = keras.Sequential([keras.Input((2,)), *dense])
        groups = [{"params": layer} for layer in dense[:groups]]
        model.compile(make_ours(param_groups=groups), "mse", jit_compile=BACKEND == "jax")
        return model, dense[1]

    def go_on(model):
        for variable in model.trainable_variables:
            variable.assign(np.ones((2, 2)))
        model.optimizer.load_state_dict(saved)
        assert_same_state(model.optimizer.state_dict(), saved)
        model.train_on_batch(np.eye(2), np.ones((2, 2)))
        return [array(v) for v in model.trainable_variables]

    model, _ = make(groups=2)
    model.optimizer.build(model.trainable_variables)
    want = go_on(model)

    model, late = make(groups=1)
    late.trainable = False
    model.compile(model.optimizer, "mse", jit_compile=BACKEND == "jax")
    model.train_on_batch(np.eye(2), np.ones((2, 2)))
    late.trainable = True
    model.optimizer.add_param_group({"params": late})
    model.compile(model.optimizer, "mse", jit_compile=BACKEND == "jax")
    model.train_on_batch(np.eye(2), np.ones((2, 2)))
    try:
        got, refusal = go_on(model), "compile"
    except ValueError as error:
        got, refusal = want, str(error)
    assert "compile" in refusal
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
