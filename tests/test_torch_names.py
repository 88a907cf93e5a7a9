"""State dicts of PyTorch with names of parameters: the names decide, and contradictions are refused."""

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops
from torch import nn

import keras_adam
from keras_adam import torch_names

torch.set_num_threads(1)  # For tensors this small a second thread only costs.


def array(x):
    return np.array(x.detach() if isinstance(x, torch.Tensor) else ops.convert_to_numpy(x))


def trained(groups, steps=2, **options):
    """An optimizer of PyTorch over groups of named parameters, after some steps of gradients of their own."""
    generator = torch.Generator().manual_seed(0)
    groups = [{"params": list(group)} for group in groups]
    optimizer = torch.optim.Adam(groups, **options)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return optimizer


def moments_of(optimizer):
    """The first moment of each parameter, by its name."""
    return {
        name: array(optimizer.state[parameter]["exp_avg"])
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


class Net(nn.Module):
    """Layers of one shape, which only their names tell apart."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3)


def named_model(*names, norm="norm", enclosing=None):
    dense = [layers.Dense(3, name=name) for name in names]
    return keras.Sequential(
        [keras.Input((3,)), *dense, layers.LayerNormalization(name=norm)], name=enclosing
    )


def built(model, **options):
    optimizer = keras_adam.Adam.with_torch_arguments(**options)
    optimizer.build(model if isinstance(model, list) else model.trainable_variables)
    return optimizer


def momentum(optimizer, ending):
    (index,) = [i for i, v in enumerate(optimizer._parameters.variables) if v.path.endswith(ending)]
    return array(optimizer._momentums[index])


NET = {
    "first/kernel": "first.weight",
    "first/bias": "first.bias",
    "second/kernel": "second.weight",
    "second/bias": "second.bias",
    "norm/gamma": "norm.weight",
    "norm/beta": "norm.bias",
}


def assert_each_has_its_own(optimizer, theirs, names=NET):
    want = moments_of(theirs)
    for ending, name in names.items():
        value = want[name].T  # of a vector, itself
        np.testing.assert_array_equal(momentum(optimizer, ending), value, err_msg=name)


@pytest.mark.parametrize("enclosing", [None, "outer"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_names_decide_in_any_order(rng, enclosing, prefix):
    """All shapes agree, so that the order alone would silently mix up the layers."""
    parameters = list(Net().named_parameters(prefix.rstrip(".")))
    theirs = trained([[parameters[i] for i in rng.permutation(len(parameters))]])
    optimizer = built(named_model("first", "second", enclosing=enclosing))
    optimizer.load_state_dict(theirs.state_dict())
    names = {path: prefix + name for path, name in NET.items()}
    assert_each_has_its_own(optimizer, theirs, names)


@pytest.mark.parametrize("order", [(2, 3, 0, 1, 4, 5), (0, 1, 2, 3, 5, 4), (2, 1, 0, 3, 4, 5)])
def test_names_decide_where_each_shape_fits(order):
    """By the order, each moment would silently go to another variable."""
    parameters = list(Net().named_parameters())
    theirs = trained([[parameters[i] for i in order]])
    optimizer = built(named_model("first", "second"))
    optimizer.load_state_dict(theirs.state_dict())
    assert_each_has_its_own(optimizer, theirs)


def test_a_run_goes_on_with_names_in_another_order(rng):
    net = Net()
    parameters = dict(net.named_parameters())
    theirs = trained([reversed(parameters.items())], weight_decay=0.1)
    model = named_model("first", "second")
    variables = model.trainable_variables
    mine = [parameters[NET["/".join(v.path.split("/")[-2:])]] for v in variables]
    for variable, parameter in zip(variables, mine, strict=True):
        variable.assign(array(parameter).T)
    optimizer = built(variables)
    optimizer.load_state_dict(theirs.state_dict())
    for _ in range(3):
        gradients = [rng.standard_normal(v.shape).astype("float32") for v in variables]
        for parameter, gradient in zip(mine, gradients, strict=True):
            parameter.grad = torch.tensor(gradient.T.copy())
        theirs.step()
        optimizer.apply([ops.convert_to_tensor(g) for g in gradients], variables)
    for variable, parameter in zip(variables, mine, strict=True):
        np.testing.assert_allclose(array(variable), array(parameter).T, rtol=1e-5, atol=1e-6)


def test_groups_in_another_order():
    """A group's numbers go with its variables."""
    parameters = dict(Net().named_parameters())
    weights = [(n, p) for n, p in parameters.items() if p.ndim > 1]
    others = [(n, p) for n, p in parameters.items() if p.ndim == 1]
    theirs = trained([others, weights])
    theirs.param_groups[0]["lr"], theirs.param_groups[1]["lr"] = 0.25, 0.5
    optimizer = built(named_model("first", "second"), param_groups=[{"params": ".*kernel"}])
    optimizer.load_state_dict(theirs.state_dict())
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.25]
    assert_each_has_its_own(optimizer, theirs)


def refused(optimizer, state_dict, message, **options):
    before = [array(v).tobytes() for v in optimizer.variables]
    numbers = [{**g, "params": None} for g in optimizer.param_groups]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict, **options)
    assert [array(v).tobytes() for v in optimizer.variables] == before
    assert [{**g, "params": None} for g in optimizer.param_groups] == numbers


def test_groups_divided_in_another_way():
    parameters = list(Net().named_parameters())
    theirs = trained([parameters[:2], parameters[2:]])
    optimizer = built(named_model("first", "second"), param_groups=[{"params": ".*/kernel"}])
    refused(optimizer, theirs.state_dict(), r"`param_groups\[0\]`.*'first.weight'.*of 2 groups")


def test_names_that_mean_nothing_here_go_by_the_order():
    """Such a state dict is taken like one without names."""
    theirs = trained(
        [nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).named_parameters()]
    )
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3), layers.Dense(3)])
    optimizer = built(model)
    optimizer.load_state_dict(theirs.state_dict())
    got = [array(m) for m in optimizer._momentums]
    for ours, want in zip(got, moments_of(theirs).values(), strict=True):
        np.testing.assert_array_equal(ours, want.T)


def sequential(order):
    """The parameters of two layers of one shape, whose names are numbers."""
    named = list(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).named_parameters())
    return trained([[named[i] for i in order]])


def two_layers():
    return keras.Sequential([keras.Input((3,)), layers.Dense(3), layers.Dense(3)])


def test_numbers_that_count_down_contradict_the_order():
    theirs = sequential([2, 3, 0, 1])
    optimizer = built(two_layers())
    message = r"'1.weight' stands before '0.weight'.*`mapping=.*`variables`.*param_names='1.weight'"
    refused(optimizer, theirs.state_dict(), message.replace("`mapping", ".*mapping"))


def test_variables_give_the_order_of_names_that_mean_nothing_here():
    theirs = sequential([2, 3, 0, 1])
    a, b, c, d = variables = two_layers().trainable_variables
    optimizer = built(variables)
    optimizer.load_state_dict(theirs.state_dict(), [c, d, a, b])
    want = moments_of(theirs)
    for got, name in zip(
        optimizer._momentums, ["0.weight", "0.bias", "1.weight", "1.bias"], strict=True
    ):
        np.testing.assert_array_equal(array(got), want[name].T)


@pytest.mark.parametrize("by_path", [True, False], ids=["paths", "variables"])
def test_mapping(by_path):
    theirs = sequential([3, 1, 2, 0])
    variables = two_layers().trainable_variables
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    meant = [v.path for v in variables] if by_path else variables
    optimizer = built(variables)
    optimizer.load_state_dict(theirs.state_dict(), mapping=dict(zip(names, meant, strict=True)))
    want = moments_of(theirs)
    for got, name in zip(optimizer._momentums, names, strict=True):
        np.testing.assert_array_equal(array(got), want[name].T)


def test_mapping_for_the_rest():
    """All names but one layer's have a clear meaning, in another order; without `mapping` they contradict the order."""
    theirs = trained([reversed(list(Net().named_parameters()))])
    optimizer = built(named_model("first", "other"))
    refused(optimizer, theirs.state_dict(), "'norm.bias' is '.*norm/beta', where .*first/kernel")
    optimizer.load_state_dict(
        theirs.state_dict(),
        mapping={
            "second.weight": next(
                v for v in optimizer._parameters.variables if v.path.endswith("other/kernel")
            ),
            "second.bias": next(
                v.path for v in optimizer._parameters.variables if v.path.endswith("other/bias")
            ),
        },
    )
    names = {path.replace("second", "other"): name for path, name in NET.items()}
    assert_each_has_its_own(optimizer, theirs, names)


def test_mapping_wins_over_names():
    theirs = trained([Net().named_parameters()])
    optimizer = built(named_model("first", "second"))
    paths = [v.path for v in optimizer._parameters.variables]
    crossed = dict(
        zip(["second.weight", "second.bias", "first.weight", "first.bias"], paths, strict=False)
    )
    optimizer.load_state_dict(theirs.state_dict(), mapping=crossed)
    swap = {"first": "second", "second": "first"}
    names = {
        path: name.replace(head, swap[head]) if (head := name.partition(".")[0]) in swap else name
        for path, name in NET.items()
    }
    assert_each_has_its_own(optimizer, theirs, names)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"1.weight": "dense_9/kernel"}, "values of `mapping`.*'dense_9/kernel'"),
        ({"2.weight": 0}, "keys of `mapping`.*'0.weight'.*Received: '2.weight'"),
        ({"0.weight": 0, "1.weight": 0}, "variable of its own"),
    ],
    ids=["path", "name", "twice"],
)
def test_mapping_must_fit(mapping, message):
    optimizer = built(two_layers())
    mapping = {
        name: optimizer._parameters.variables[to] if isinstance(to, int) else to
        for name, to in mapping.items()
    }
    refused(optimizer, sequential(range(4)).state_dict(), message, mapping=mapping)


def test_mapping_needs_names():
    theirs = torch.optim.Adam(nn.Linear(3, 3).parameters())
    optimizer = built(
        [
            keras.Variable(np.zeros((3, 3), "float32"), name="kernel"),
            keras.Variable(np.zeros(3, "float32"), name="bias"),
        ]
    )
    refused(optimizer, theirs.state_dict(), "keys of `mapping`", mapping={"weight": "kernel"})
    with pytest.raises(TypeError, match="`mapping` must be a dictionary"):
        optimizer.load_state_dict(theirs.state_dict(), mapping=["weight"])


def test_given_order_that_certain_names_contradict():
    theirs = trained([Net().named_parameters()])
    variables = named_model("first", "second").trainable_variables
    optimizer = built(variables)
    wrong = [*variables[2:4], *variables[:2], *variables[4:]]
    refused(optimizer, theirs.state_dict(), "first.weight.*eave `variables` out", variables=wrong)
    optimizer.load_state_dict(theirs.state_dict(), variables)
    assert_each_has_its_own(optimizer, theirs)


def test_a_bias_is_no_weight():
    """A norm's bias and weight have the same shape."""
    named = list(nn.LayerNorm(3).named_parameters("ln"))
    more = list(nn.LayerNorm(3).named_parameters("final"))
    theirs = trained([[*named[::-1], *more]])
    model = keras.Sequential(
        [keras.Input((3,)), layers.LayerNormalization(), layers.LayerNormalization()]
    )
    refused(built(model), theirs.state_dict(), "'ln.bias' is of another kind.*gamma")


def test_state_dict_writes_the_paths(rng):
    """An optimizer with the variables in another order finds them by these, and PyTorch takes them over."""
    variables = named_model("first", "second").trainable_variables
    optimizer = built(variables)
    optimizer.apply(
        [ops.convert_to_tensor(rng.standard_normal(v.shape), "float32") for v in variables],
        variables,
    )
    saved = optimizer.state_dict()
    assert [g["param_names"] for g in saved["param_groups"]] == [[v.path for v in variables]]

    order = rng.permutation(len(variables))
    other = built([variables[i] for i in order])
    other.load_state_dict(saved)
    for got, i in zip(other._momentums, order, strict=True):
        np.testing.assert_array_equal(array(got), array(optimizer._momentums[i]))

    theirs = torch.optim.Adam([nn.Parameter(torch.zeros(tuple(v.shape))) for v in variables])
    theirs.load_state_dict(saved)
    assert theirs.state_dict()["param_groups"][0]["param_names"] == [v.path for v in variables]


def functional(names):
    """The layer nearer to the output is made first, so that its number is the smaller one."""
    x = keras.Input((3,))
    last, first = (layers.Dense(3, name=name) for name in names)
    return keras.Model(x, last(first(x)))


def test_own_state_dict_of_a_model_with_other_numbers():
    """Keras numbers layers as they are made: "dense_2" may be another layer in a second model of the same code."""
    saving, loading = (
        built(functional(["dense_1", "dense_2"])),
        built(functional(["dense_2", "dense_3"])),
    )
    for i, m in enumerate(saving._momentums):
        m.assign(np.full(m.shape, i + 1.0))
    saving.iterations.assign(1)
    loading.load_state_dict(saving.state_dict())
    assert [float(array(m).flat[0]) for m in loading._momentums] == [1, 2, 3, 4]

    turned = built(functional(["dense_3", "dense_2"]))
    refused(turned, saving.state_dict(), "contradict the order")


def test_names_in_the_place_of_numbers():
    """`torch.distributed.checkpoint` writes them, also for an optimizer that was not given names."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict  # takes seconds

    net = Net()
    parameters = dict(reversed(list(net.named_parameters())))
    theirs = trained([parameters.items()])
    plain = torch.optim.Adam(parameters.values())
    plain.load_state_dict(theirs.state_dict())
    del plain.param_groups[0]["param_names"]
    saved = get_optimizer_state_dict(net, plain)
    assert set(saved["state"]) == set(NET.values())
    optimizer = built(named_model("first", "second"))
    optimizer.load_state_dict(saved)
    assert_each_has_its_own(optimizer, theirs)


def test_equal_paths_go_by_the_order():
    variables = [keras.Variable(np.zeros(2, "float32"), name="v") for _ in range(2)]
    optimizer = built(variables)
    optimizer._momentums[1].assign([1.0, 2.0])
    optimizer.iterations.assign(1)
    saved = optimizer.state_dict()
    other = built(variables)
    other.load_state_dict(saved)
    np.testing.assert_array_equal(array(other._momentums[1]), [1.0, 2.0])


@pytest.mark.parametrize("names", [["a"], "ab", [1, 2]])
def test_names_must_be_a_list_of_as_many_strings(names):
    theirs = trained([nn.Linear(3, 3).named_parameters()]).state_dict()
    theirs["param_groups"][0]["param_names"] = names
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3)])
    refused(built(model), theirs, "param_names")


def test_parameters_of_a_keras_model():
    """PyTorch has them sorted by name, and their layout is Keras's."""
    model = named_model("second", "first")
    if keras.backend.backend() == "torch":
        named = model.named_parameters()
    else:  # there a model is no `torch.nn.Module`
        variables = sorted(model.trainable_variables, key=lambda v: v.path)
        named = [
            (f"_functional._torch_params.{v.path}", nn.Parameter(torch.tensor(array(v))))
            for v in variables
        ]
    theirs = trained([named])
    optimizer = built(model)
    optimizer.load_state_dict(theirs.state_dict())
    for name, value in moments_of(theirs).items():
        np.testing.assert_array_equal(momentum(optimizer, "/".join(name.split("/")[-2:])), value)


# ---------------------------------------------------------------------------------------------------------------------
# What a name means


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("dense.weight", "dense/kernel"),
        ("encoder.layer.0.attention.query.weight", "encoder/layer_0/attention/query/kernel"),
        ("encoder.layer.0.attention.query.weight", "bert/encoder/layer/0/attention/query/kernel"),
        ("_orig_mod.module.norm.weight", "norm/gamma"),
        ("embed.weight", "embed/embeddings"),
        ("norm.weight", "norm/scale"),
        ("conv1.bias", "conv_1/bias"),
        ("norm.bias", "norm/beta"),
        ("dense/kernel", "sequential/dense/kernel"),
        ("sequential/dense/kernel", "dense/kernel"),
        ("cls_token", "cls_token"),
    ],
)
def test_name_means_path(name, path):
    """Other paths fit an end or a beginning of the name."""
    names, paths = ["other.weight", name, "x.bias"], ["q_dense/bias", path, "y/weight"]
    assert torch_names.meanings(names, paths) == {1: 1}


@pytest.mark.parametrize(
    ("names", "paths"),
    [
        (["0.weight", "2.weight"], ["dense/kernel", "dense_1/kernel"]),
        (["proj.weight", "x.bias"], ["q_proj/kernel", "y/bias"]),
        (["norm.weight", "x.bias"], ["a/norm/gamma", "b/norm/gamma"]),
        (["weight", "x.bias"], ["dense/kernel", "y/bias"]),
        (["dense.weight", "x.bias"], ["dense/kernel", "dense/scale"]),
        (["v", "v"], ["v", "w"]),
        (["v", "w"], ["v", "v"]),
        (["norm.bias", "x.y"], ["norm/gamma", "z"]),
    ],
)
def test_name_that_is_not_certain_means_nothing(names, paths):
    assert torch_names.meanings(names, paths) == {}


def test_what_all_have_in_common_tells_nothing():
    assert torch_names.meanings(
        ["a.norm.weight", "a.b.norm.weight"], ["m/norm/gamma", "m/b/norm/gamma"]
    ) == {0: 0, 1: 1}
    assert torch_names.meanings(["0.weight", "0.bias"], ["dense/bias", "dense/kernel"]) == {
        0: 1,
        1: 0,
    }
    assert torch_names.meanings(["weight"], ["dense/kernel"]) == {0: 0}


@pytest.mark.parametrize(
    ("names", "paths"),
    [
        (["gamma", "weight", "beta", "bias"], ["m/a/gamma", "m/a/weight", "m/a/beta", "m/a/bias"]),
        (["a.scale", "a.weight", "b.bias"], ["m/a/scale", "m/a/kernel", "m/b/beta"]),
        (["a.bias", "a.beta"], ["a/bias", "a/beta"]),
        (["a.weight", "a.scale"], ["a/weight", "a/gamma"]),
    ],
)
def test_what_is_the_same_by_the_letter_comes_before_what_is_by_a_word(rng, names, paths):
    order = rng.permutation(len(names))
    assert torch_names.meanings(names, [paths[i] for i in order]) == {
        int(i): position for position, i in enumerate(order)
    }


def test_a_scale_beside_a_weight():
    """With one shape and in another order, one would silently get the other's moments."""
    names = ["norm.scale", "norm.weight"]
    theirs = trained([[(name, nn.Parameter(torch.ones(3))) for name in names]])
    with keras.name_scope("norm"):
        variables = [
            keras.Variable(np.ones(3, "float32"), name=name) for name in ("gamma", "scale")
        ]
    optimizer = built(variables)
    optimizer.load_state_dict(theirs.state_dict())
    want = moments_of(theirs)
    np.testing.assert_array_equal(array(optimizer._momentums[0]), want["norm.weight"])
    np.testing.assert_array_equal(array(optimizer._momentums[1]), want["norm.scale"])


def test_many_names_are_quick():
    """The matching is by keys, not pair by pair."""
    paths = [f"encoder/layer_{i}/block_{j}/kernel" for i in range(40) for j in range(50)]
    names = [p.replace("/", ".").replace("_", ".").replace("kernel", "weight") for p in paths]
    assert torch_names.meanings(names, paths) == {i: i for i in range(2000)}
    assert torch_names.renumbered(names, paths) == {i: i for i in range(2000)}
