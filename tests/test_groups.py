"""Parameter groups: which variables are in which group, what holds for them, what may be set while training."""

import copy
import operator

import keras
import numpy as np
import pytest
import torch

import keras_adam
from support.helpers import SHAPES, assert_same_trajectory, run, run_reference, run_torch
from support.models import BATCHES, Expected, assert_close, fit, make_model, weights
from support.steps import compiled_step, value_of
from support.tolerances import TOLERANCES

BACKEND = keras.backend.backend()
COMPILES = BACKEND != "torch"


def make_net():
    """Two layers, of which the second's path contains the first's."""
    layers = [keras.Input((3,)), keras.layers.Dense(2, name="a"), keras.layers.Dense(2, name="aa")]
    return keras.Sequential(layers, name="net")


def built(model, *groups, **options):
    optimizer = keras_adam.Adam(param_groups=list(groups), **options)
    optimizer.build(model.trainable_variables)
    return optimizer


def members(optimizer):
    """For each group, its variables as "layer/variable"."""
    return [
        sorted("/".join(v.path.split("/")[-2:]) for v in group["params"])
        for group in optimizer.param_groups
    ]


ALL = ["a/bias", "a/kernel", "aa/bias", "aa/kernel"]
SELECTORS = {
    "regex": (lambda m: r".*kernel", ["a/kernel", "aa/kernel"]),
    "regex of a whole path": (lambda m: r"(.*/)?a/kernel", ["a/kernel"]),
    "variable": (lambda m: m.layers[1].bias, ["aa/bias"]),
    "layer": (lambda m: m.layers[0], ["a/bias", "a/kernel"]),
    "model": (lambda m: m, ALL),
    "predicate": (lambda m: lambda v: v.ndim == 1, ["a/bias", "aa/bias"]),
    "list": (lambda m: [m.layers[0].bias, m.layers[1]], ["a/bias", "aa/bias", "aa/kernel"]),
    "nested lists": (
        lambda m: [(r".*aa/bias",), [[lambda v: v is m.layers[0].kernel], m.layers[0].bias]],
        ["a/bias", "a/kernel", "aa/bias"],
    ),
}


@pytest.mark.parametrize("case", SELECTORS)
def test_selector(case):
    select, expected = SELECTORS[case]
    model = make_net()
    optimizer = built(model, {"params": select(model)})
    assert members(optimizer) == [expected, sorted(set(ALL) - set(expected))]


def test_regex_must_match_the_whole_path():
    model = make_net()
    with pytest.raises(ValueError, match=r"param_groups\[0\].*selects no variable"):
        built(model, {"params": "kernel"})


def test_first_match_wins():
    model = make_net()
    first, second = {"params": ".*aa/.*", "beta_1": 0.5}, {"params": ".*kernel", "beta_1": 0.6}
    optimizer = built(model, first, second)
    assert members(optimizer) == [["aa/bias", "aa/kernel"], ["a/kernel"], ["a/bias"]]
    assert members(built(model, second, first)) == [
        ["a/kernel", "aa/kernel"],
        ["aa/bias"],
        ["a/bias"],
    ]
    # A variable that one group names as an object may also match an earlier group's pattern.
    objects = built(model, {"params": ".*a/kernel"}, {"params": model.layers[0]})
    assert members(objects)[:2] == [["a/kernel", "aa/kernel"], ["a/bias"]]


def test_options_are_the_constructors_unless_given():
    model = make_net()
    options = {
        "learning_rate": 0.25,
        "beta_1": 0.5,
        "beta_2": 0.75,
        "epsilon": 1e-3,
        "weight_decay": 0.125,
        "amsgrad": "corrected",
        "decoupled_weight_decay": False,
        "epsilon_hat": False,
        "maximize": True,
    }
    own = {
        "learning_rate": 0.5,
        "beta_1": 0.25,
        "beta_2": 0.5,
        "epsilon": 1e-2,
        "weight_decay": None,
        "amsgrad": False,
        "decoupled_weight_decay": True,
        "epsilon_hat": True,
        "maximize": False,
    }
    groups = [{"params": ".*a/kernel", **own}, {"params": ".*a/bias"}]
    first, second, default = built(make_net(), *groups, **options).param_groups[:3]
    assert {name: first[name] for name in own} == own
    assert {name: second[name] for name in options} == options
    assert {name: default[name] for name in options} == options
    for name, value in own.items():
        group = built(model, {"params": ".*a/kernel", name: value}, **options).param_groups[0]
        assert {n: group[n] for n in options} == options | {name: value}


def test_names_of_pytorch():
    spec = {"params": ".*kernel", "lr": 0.5, "betas": (0.25, 0.75), "eps": 1e-3}
    group = built(make_net(), spec).param_groups[0]
    assert group["lr"] == group["learning_rate"] == 0.5
    assert group["betas"] == (group["beta_1"], group["beta_2"]) == (0.25, 0.75)
    assert group["eps"] == group["epsilon"] == 1e-3
    group["lr"], group["betas"], group["eps"] = 0.25, [0.5, 0.875], 1e-2
    assert (group["learning_rate"], group["betas"], group["epsilon"]) == (0.25, (0.5, 0.875), 1e-2)


def test_groups_are_in_the_order_given():
    optimizer = keras_adam.Adam(param_groups=[{"params": ".*a/bias"}, {"params": ".*a/kernel"}])
    optimizer.add_param_group({"params": ".*aa/nothing|.*bias|.*kernel", "beta_1": 0.5})
    assert [len(g["params"]) for g in optimizer.param_groups] == [0, 0, 0, 0]
    model = make_net()
    model.layers[0].bias.trainable = False
    model.layers[1].kernel.trainable = False
    optimizer = built(model, {"params": ".*aa/bias"})
    model.layers[1].kernel.trainable = model.layers[0].bias.trainable = True
    optimizer.add_param_group({"params": model.layers[1].kernel})
    optimizer.add_param_group({"params": model.layers[0].bias})
    assert members(optimizer) == [["aa/bias"], ["a/kernel"], ["aa/kernel"], ["a/bias"]]


def test_group_is_a_mapping():
    group = built(make_net(), {"params": ".*a/kernel", "maximize": True}).param_groups[0]
    assert dict(group)["maximize"] is True
    assert len(group) == len(list(group)) == len(dict(group))


def test_group_is_the_same_object_each_time():
    model = make_net()
    optimizer = keras_adam.Adam(param_groups=[{"params": model.layers[0]}])
    selected, others = optimizer.param_groups
    optimizer.build(model.trainable_variables)
    selected["beta_1"] = 0.5
    late = keras.Variable([1.0], name="late")
    optimizer.add_param_group({"params": [late]})
    assert optimizer.param_groups[0] is selected
    assert optimizer.param_groups[1] is others
    assert {selected: "selected"}[optimizer.param_groups[0]] == "selected"
    assert optimizer.param_groups.index(others) == 1
    assert selected != dict(selected)
    assert selected["beta_1"] == 0.5


def test_rate_of_a_group_with_a_multiplier():
    optimizer = built(
        make_net(),
        {"params": ".*kernel", "learning_rate_multiplier": 0.5},
        {"params": ".*a/bias", "learning_rate": 0.25},
        learning_rate=0.125,
    )
    assert [g["learning_rate"] for g in optimizer.param_groups[:3]] == [0.0625, 0.25, 0.125]
    optimizer.learning_rate = 0.5
    assert [g["learning_rate"] for g in optimizer.param_groups[:3]] == [0.25, 0.25, 0.5]
    optimizer.param_groups[-1]["learning_rate"] = 2.0
    assert float(optimizer.learning_rate) == 2.0


BAD = {
    "nothing selected": (
        ValueError,
        [{"params": ".*bias"}, {"params": "net/a/kernl"}],
        r"param_groups\[1\].*selects no variable.*'.*a/kernel'",
    ),
    "all taken by an earlier group": (
        ValueError,
        [{"params": ".*"}, {"params": ".*a/bias"}],
        r"param_groups\[1\].*bias.* to param_groups\[0\]",
    ),
    "unknown option": (
        ValueError,
        [{"params": ".*"}, {"params": ".*", "weight_deacy": 0.1}],
        r"param_groups\[1\].*'weight_deacy'.*Did you mean 'weight_decay'.*0\.1",
    ),
    "out of range": (
        ValueError,
        [{"params": ".*"}, {"params": ".*", "beta_2": 1.0}],
        r"param_groups\[1\].*`beta_2` must be in \[0, 1\).*1\.0",
    ),
    "pair out of range": (
        ValueError,
        [{"params": ".*", "betas": (0.9, 1.5)}],
        r"param_groups\[0\].*`beta_2`.*1\.5",
    ),
    "no pair": (ValueError, [{"params": ".*", "betas": 0.9}], r"`betas`.*param_groups\[0\].*pair"),
    "negative multiplier": (
        ValueError,
        [{"params": ".*", "learning_rate_multiplier": -1}],
        r"param_groups\[0\].*`learning_rate_multiplier`.*-1",
    ),
    "not a number": (
        TypeError,
        [{"params": ".*", "epsilon": "small"}],
        r"param_groups\[0\].*`epsilon`.*small",
    ),
    "no such choice": (
        ValueError,
        [{"params": ".*", "amsgrad": "yes"}],
        r"param_groups\[0\].*`amsgrad`.*'corrected'.*'yes'",
    ),
    "rate and multiplier": (
        ValueError,
        [{"params": ".*", "lr": 0.1, "learning_rate_multiplier": 2}],
        r"param_groups\[0\].*not both",
    ),
    "rate under two names": (
        ValueError,
        [{"params": ".*", "lr": 0.1, "learning_rate": 0.1}],
        r"param_groups\[0\].*two names",
    ),
    "beta under two names": (
        ValueError,
        [{"params": ".*", "betas": (0.5, 0.5), "beta_1": 0.9}],
        r"param_groups\[0\].*two names",
    ),
    "without params": (ValueError, [{"lr": 0.1}], r"param_groups\[0\].*'params'"),
    "not a dictionary": (ValueError, [".*"], r"param_groups\[0\].*dictionary"),
    "not a list": (TypeError, {"params": ".*"}, "`param_groups` must be a list"),
    "bad regex": (ValueError, [{"params": "(unclosed"}], r"param_groups\[0\].*'\(unclosed'"),
    "wrong selector": (TypeError, [{"params": 3}], r"param_groups\[0\].*predicate.*params=3"),
    "wrong selector in a list": (TypeError, [{"params": [".*", None]}], r"param_groups\[0\].*None"),
    "empty list": (ValueError, [{"params": [[]]}], r"param_groups\[0\].*select something"),
}


@pytest.mark.parametrize("case", BAD)
def test_error(case):
    error, groups, message = BAD[case]
    with pytest.raises(error, match=message):
        keras_adam.Adam(param_groups=groups).build(make_net().trainable_variables)


def test_variable_named_in_two_groups():
    model = make_net()
    kernel = model.layers[0].kernel
    groups = [{"params": kernel}, {"params": [model.layers[1].bias, kernel]}]
    with pytest.raises(ValueError, match=r"a/kernel'.*param_groups\[0\].*param_groups\[1\]"):
        built(model, *groups)


# ----------------------------------------------------------------------------------------------
# Trajectories

DEFAULT = {"lr": 5e-4, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.02}
TORCH_GROUPS = {
    "matrix": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1},
    "vector": {"lr": 3e-4, "betas": (0.5, 0.9), "amsgrad": True, "weight_decay": 0.0},
    "scalar": {"betas": (0.95, 0.999), "eps": 1e-4, "maximize": True},
}


@pytest.mark.parametrize("decoupled", [False, True], ids=["l2", "decoupled"])
def test_trajectory_of_torch(problem, decoupled):
    def make_torch(parameters):
        groups = [
            {"params": [p], **TORCH_GROUPS.get(name, {})}
            for name, p in zip(SHAPES, parameters, strict=True)
        ]
        return (torch.optim.AdamW if decoupled else torch.optim.Adam)(groups, **DEFAULT)

    ours = keras_adam.Adam.with_torch_arguments(
        **DEFAULT,
        decoupled_weight_decay=decoupled,
        param_groups=[{"params": name, **group} for name, group in TORCH_GROUPS.items()],
    )
    expected = run_torch(make_torch, *problem)
    assert_same_trajectory(run(ours, *problem), expected, TOLERANCES["float32"])


# For each variable its group's options; the reference gets these together with the default's.
OWN = {
    "matrix": {"learning_rate": 1e-3, "beta_1": 0.5, "beta_2": 0.9, "amsgrad": "corrected"},
    "vector": {"learning_rate": 2e-4, "decoupled_weight_decay": False, "epsilon_hat": False},
    "scalar": {"epsilon": 1e-3, "weight_decay": None, "maximize": True, "amsgrad": True},
}
COMMON = {"learning_rate": 5e-4, "beta_1": 0.8, "beta_2": 0.99, "weight_decay": 0.1}


def run_references(problem, own, common, groups=SHAPES):
    """One reference for each variable, all trajectories together as `run` returns them."""
    starts, gradients = problem
    parts = [
        run_reference([start], [[g[i]] for g in gradients], **{**common, **own.get(name, {})})
        for i, (name, start) in enumerate(zip(groups, starts, strict=True))
    ]
    return {step: [part[step][0] for part in parts] for step in parts[0]}


def grouped(own, **common):
    return keras_adam.Adam(
        **common, param_groups=[{"params": name, **options} for name, options in own.items()]
    )


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
def test_trajectory_of_references(problem, compiled):
    starts, gradients = problem
    gradients = gradients if compiled else gradients[:20]
    actual = run(grouped(OWN, **COMMON), starts, gradients, compiled=compiled)
    expected = run_references((starts, gradients), OWN, COMMON)
    assert_same_trajectory(actual, expected, TOLERANCES["float32"])


def decay(rate):
    return keras.optimizers.schedules.ExponentialDecay(rate, 50, 0.5)


@pytest.mark.parametrize("rate", [5e-4, decay(5e-4)], ids=["number", "schedule"])
def test_schedules(problem, rate):
    """One group has a schedule of its own, one a number, one follows the optimizer's rate."""
    own = {
        "matrix": {"learning_rate": decay(1e-3), "beta_1": 0.5},
        "vector": {"learning_rate": 2e-4},
        "scalar": {"learning_rate_multiplier": 1.5},
    }

    def common(steps):
        return 5e-4 if rate == 5e-4 else 5e-4 * 0.5 ** (steps / 50)

    of_references = {
        "matrix": {"learning_rate": lambda steps: 1e-3 * 0.5 ** (steps / 50), "beta_1": 0.5},
        "vector": {"learning_rate": 2e-4},
        "scalar": {"learning_rate": lambda steps: 1.5 * common(steps)},
    }
    actual = run(grouped(own, learning_rate=rate), *problem)
    expected = run_references(problem, of_references, {"learning_rate": common})
    assert_same_trajectory(actual, expected, TOLERANCES["float32"])


# ----------------------------------------------------------------------------------------------
# Setting numbers while training


class Settings(keras.callbacks.Callback):
    """Sets numbers of the groups when an epoch begins, and counts the traces of the train step."""

    def __init__(self, by_epoch):
        super().__init__()
        self.by_epoch, self.traces = by_epoch, [0]

    def loss(self, y, prediction):
        self.traces[-1] += 1
        return keras.ops.mean(keras.ops.square(prediction - y), axis=-1)

    def on_epoch_begin(self, epoch, logs=None):
        for group, values in zip(
            self.model.optimizer.param_groups, self.by_epoch[epoch], strict=True
        ):
            group.update(values)
        self.traces.append(0)


# For each epoch, what is set on the kernel's group and on the default one.
SET = [
    ({}, {}),
    ({"learning_rate": 0.03, "beta_1": 0.5, "epsilon": 0.01}, {"beta_2": 0.9}),
    (
        {"weight_decay": 0.2, "beta_2": 0.99, "learning_rate": None},
        {"learning_rate": 0.04, "epsilon": 0.1},
    ),
    ({"learning_rate_multiplier": 0.25}, {"weight_decay": 0.3, "betas": (0.7, 0.95)}),
]
START_NUMBERS = {"learning_rate": 0.02, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7}


def in_effect(epochs):
    """The reference's options of kernel and bias: functions of the step."""
    kernel = {**START_NUMBERS, "weight_decay": 0.0, "learning_rate": 0.01, "multiplier": 1.0}
    bias = {**START_NUMBERS, "weight_decay": 0.0}
    table = []
    for of_kernel, of_bias in epochs:
        for now, values in ((kernel, of_kernel), (bias, of_bias)):
            values = dict(values)
            if "betas" in values:
                values["beta_1"], values["beta_2"] = values.pop("betas")
            values["multiplier"] = values.pop("learning_rate_multiplier", now.get("multiplier", 1))
            now.update(values)
        rate = kernel["learning_rate"]
        rate = bias["learning_rate"] * kernel["multiplier"] if rate is None else rate
        table.append(({**kernel, "learning_rate": rate}, dict(bias)))
    names = [*START_NUMBERS, "weight_decay"]

    def options(i):
        return {
            name: lambda step, name=name: table[min(step // len(BATCHES), len(table) - 1)][i][name]
            for name in names
        }

    return options(0), options(1)


def make_grouped_model(**options):
    optimizer = keras_adam.Adam(
        0.02, param_groups=[{"params": ".*kernel", "learning_rate": 0.01}], **options
    )
    return make_model(optimizer)


@pytest.fixture
def after_settings():
    """A model trained for an epoch with each of SET, and the callback that set it."""
    callback = Settings(SET)
    model = make_grouped_model()
    model.compile(model.optimizer, callback.loss)
    fit(model, epochs=len(SET), callbacks=[callback])
    return model, callback


def test_numbers_act_on_the_next_step(after_settings):
    model, callback = after_settings
    assert_close(weights(model), Expected(*in_effect(SET)).fit(len(SET)).weights)
    if COMPILES:
        assert callback.traces[1] > 0
        assert callback.traces[2:] == [0] * (len(SET) - 1)


def test_numbers_act_within_an_epoch():
    class Halt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                for group in self.model.optimizer.param_groups:
                    group["learning_rate"] = 0.0

    model = make_grouped_model()
    fit(model, callbacks=[Halt()])
    rates = [{"learning_rate": lambda step, r=r: r if step < 2 else 0.0} for r in (0.01, 0.02)]
    assert_close(weights(model), Expected(*rates).fit().weights)


def numbers(optimizer):
    return [
        {name: group[name] for name in group if name != "params"}
        for group in optimizer.param_groups
    ]


SET_AT_THE_END = [
    {"learning_rate": 0.04 * 0.25, "beta_1": 0.5, "beta_2": 0.99, "epsilon": 0.01},
    {"learning_rate": 0.04, "beta_1": 0.7, "beta_2": 0.95, "epsilon": 0.1, "weight_decay": 0.3},
]


def test_numbers_are_saved(after_settings, tmp_path):
    model, _ = after_settings
    for group, expected in zip(model.optimizer.param_groups, SET_AT_THE_END, strict=True):
        assert {name: group[name] for name in expected} == expected
    model.save_weights(tmp_path / "model.weights.h5")
    model.compile(model.optimizer, "mse")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    fresh = make_grouped_model()
    fresh.load_weights(tmp_path / "model.weights.h5")
    expected = Expected(*in_effect(SET)).fit(len(SET) + 1)
    for other in (loaded, fresh):
        fit(other)
        assert_close(weights(other), expected.weights)
        assert numbers(other.optimizer) == numbers(model.optimizer)


def test_numbers_are_in_the_config(after_settings):
    model, _ = after_settings
    again = keras_adam.Adam.from_config(model.optimizer.get_config())
    assert numbers(again) == numbers(model.optimizer)
    again.build(model.trainable_variables)
    assert numbers(again) == numbers(model.optimizer)
    assert members(again) == members(model.optimizer)


def test_multipliers_are_in_the_config():
    """The default group's multiplier too, if it can be set at all."""
    optimizer = built(make_net(), {"params": ".*kernel", "learning_rate_multiplier": 0.5})
    assert optimizer.get_config()["param_groups"][0]["learning_rate_multiplier"] == 0.5
    try:
        optimizer.param_groups[-1]["learning_rate_multiplier"] = 0.5
    except ValueError:
        return
    again = keras_adam.Adam.from_config(optimizer.get_config())
    assert [g["learning_rate_multiplier"] for g in again.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize("added", [False, True], ids=["given", "added"])
def test_selected_objects_are_saved(added, tmp_path):
    """Layers, variables and predicates cannot be saved; the paths that they selected can."""
    model = make_model()
    dense = model.layers[0]
    groups = [{"params": dense.kernel, "lr": 0.01}, {"params": lambda v: v.ndim == 1, "lr": 0.03}]
    optimizer = keras_adam.Adam(param_groups=None if added else groups)
    for group in groups if added else []:
        optimizer.add_param_group(group)
    model.compile(optimizer, "mse")
    with pytest.raises(ValueError, match="known once the optimizer is built"):
        optimizer.get_config()
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    fit(loaded)
    expected = Expected({"learning_rate": 0.01}, {"learning_rate": 0.03})
    assert_close(weights(loaded), expected.fit(2).weights)
    assert members(loaded.optimizer) == [["dense/kernel"], ["dense/bias"], []]


def test_variables_of_one_path():
    """Keras allows two variables to have the same path, which then names neither."""
    first, second = (keras.Variable([1.0, 1.0], name="same") for _ in range(2))
    optimizer = keras_adam.Adam(param_groups=[{"params": first, "learning_rate": 0.5}])
    optimizer.build([first, second])
    try:
        again = keras_adam.Adam.from_config(optimizer.get_config())
    except ValueError as error:
        assert "same" in str(error)  # noqa: PT017
        return
    again.build([first, second])
    assert [g["params"] for g in again.param_groups] == [[first], [second]]


@pytest.mark.parametrize("name", ["learning_rate", "beta_1"])
def test_number_where_a_schedule_was_saved(name, tmp_path):
    """The saved value stands for a schedule, and must not be taken for a number."""
    dynamic = {
        "learning_rate": keras.optimizers.schedules.ExponentialDecay(0.01, 4, 0.5),
        "beta_1": lambda: keras.ops.convert_to_tensor(0.5),
    }[name]
    model = make_model(keras_adam.Adam(param_groups=[{"params": ".*kernel", name: dynamic}]))
    fit(model)
    model.save_weights(tmp_path / "model.weights.h5")
    model = make_model(keras_adam.Adam(param_groups=[{"params": ".*kernel", name: 0.25}]))
    model.optimizer.build(model.trainable_variables)
    model.load_weights(tmp_path / "model.weights.h5")
    assert model.optimizer.param_groups[0][name] == 0.25


def test_learning_rate_scheduler():
    """A group with a multiplier follows the optimizer's rate; one with a rate does not."""
    rates = [0.02, 0.01, 0.04]
    expected_rate = {"learning_rate": lambda step: 0.5 * rates[step // len(BATCHES)]}
    for options in ({"learning_rate_multiplier": 0.5}, {"learning_rate": 0.005}):
        model = make_model(keras_adam.Adam(param_groups=[{"params": ".*bias", **options}]))
        callback = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rates[epoch])
        fit(model, epochs=3, callbacks=[callback])
        kernel = {"learning_rate": lambda step: rates[step // len(BATCHES)]}
        bias = expected_rate if "learning_rate" not in options else options
        assert_close(weights(model), Expected(kernel, bias).fit(3).weights)


def test_reduce_lr_on_plateau():
    groups = [{"params": ".*bias", "learning_rate_multiplier": 2.0}]
    model = make_model(keras_adam.Adam(0.02, param_groups=groups))
    callback = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=100)
    fit(model, epochs=4, callbacks=[callback])
    rates = [0.02, 0.02, 0.01, 0.005]
    options = [
        {"learning_rate": lambda step, factor=factor: factor * rates[step // len(BATCHES)]}
        for factor in (1, 2)
    ]
    assert_close(weights(model), Expected(*options).fit(4).weights)
    assert model.optimizer.param_groups[0]["learning_rate"] == pytest.approx(0.005)


def test_exclusions_from_decay():
    decayed = {"learning_rate": 0.02, "weight_decay": 0.5}
    plain = {"learning_rate": 0.02}
    for excluded, expected in (("bias", (decayed, plain)), ("kernel", (plain, decayed))):
        groups = [{"params": ".*dense/.*", "weight_decay": 0.5}]
        model = make_model(keras_adam.Adam(0.02, param_groups=groups))
        model.optimizer.exclude_from_weight_decay(var_names=[excluded])
        fit(model)
        assert_close(weights(model), Expected(*expected).fit().weights)


def test_no_decay_for_a_group():
    groups = [{"params": ".*bias", "weight_decay": None}]
    model = make_model(keras_adam.Adam(0.02, weight_decay=0.5, param_groups=groups))
    fit(model)
    expected = Expected({"learning_rate": 0.02, "weight_decay": 0.5}, {"learning_rate": 0.02})
    assert_close(weights(model), expected.fit().weights)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("amsgrad", True),
        ("maximize", True),
        ("epsilon_hat", False),
        ("decoupled_weight_decay", False),
        ("params", ".*"),
        ("nesterov", True),
    ],
)
def test_only_numbers_can_be_set(name, value):
    group = built(make_net(), {"params": ".*kernel"}).param_groups[0]
    with pytest.raises(ValueError, match=f"`{name}` cannot be set.*learning_rate"):
        group[name] = value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("beta_1", 1.0, r"`beta_1` must be in \[0, 1\)"),
        ("betas", (0.5, 1.0), r"`beta_2` must be in \[0, 1\)"),
        ("lr", -0.5, "`learning_rate` must be >= 0"),
        ("epsilon", float("nan"), "`epsilon` must be >= 0"),
    ],
)
def test_set_out_of_range(name, value, message):
    optimizer = built(make_net(), {"params": ".*kernel"})
    before = numbers(optimizer)
    for group in optimizer.param_groups:
        with pytest.raises(ValueError, match=message):
            group[name] = value
    assert numbers(optimizer) == before


def test_schedule_can_be_set_before_the_first_compiled_step_only():
    model = make_grouped_model()
    model.optimizer.param_groups[0]["learning_rate"] = decay(0.0)
    fit(model)
    expected = Expected({"learning_rate": 0.0}, {"learning_rate": 0.02}).fit()
    assert_close(weights(model), expected.weights)
    if COMPILES:
        for value in (0.5, decay(0.5)):
            with pytest.raises(TypeError, match=r"`learning_rate`.*before the first compiled step"):
                model.optimizer.param_groups[0]["learning_rate"] = value


def test_number_of_a_compiled_optimizer_without_groups():
    """The number is a constant of the train step: setting it works or is refused, never ignored."""
    model = make_model(keras_adam.Adam(0.02))
    fit(model)
    if COMPILES:
        for name in ("beta_1", "beta_2", "epsilon", "weight_decay"):
            with pytest.raises(ValueError, match=rf"`{name}` is a constant.*param_groups=\[\]"):
                model.optimizer.param_groups[0][name] = 0.5
            with pytest.raises(ValueError, match=rf"`{name}` is a constant.*param_groups=\[\]"):
                setattr(model.optimizer, name, 0.5)
        assert model.optimizer.beta_1 == 0.9
        return
    model.optimizer.param_groups[0]["weight_decay"] = 0.5
    fit(model)
    options = {"learning_rate": 0.02, "weight_decay": lambda step: 0.5 * (step >= len(BATCHES))}
    assert_close(weights(model), Expected(options).fit(2).weights)


def test_number_of_a_compiled_optimizer_with_the_default_group_alone():
    model = make_model(keras_adam.Adam(0.02, param_groups=[]))
    fit(model)
    model.optimizer.weight_decay = 0.5
    fit(model)
    options = {"learning_rate": 0.02, "weight_decay": lambda step: 0.5 * (step >= len(BATCHES))}
    assert_close(weights(model), Expected(options).fit(2).weights)
    assert model.optimizer.weight_decay == 0.5


def test_set_weights_brings_the_numbers_of_groups():
    """Weights of an optimizer with a callable hold no number; the optimizer then keeps its own."""
    variables = [keras.Variable([1.0]) for _ in range(2)]
    asking = keras_adam.Adam(0.5, beta_1=lambda: 0.5, param_groups=[])
    told = keras_adam.Adam(0.5, beta_1=0.9, param_groups=[])
    for optimizer, variable in zip((asking, told), variables, strict=True):
        optimizer.build([variable])
    told.set_weights(asking.variables)
    compiled_step(told, variables[1:])(np.array([0.1], "float32"))
    np.testing.assert_allclose(value_of(told._momentums[0]), [0.01], rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The list of groups only shows what there is


def two_groups():
    variables = [keras.Variable(np.ones(2, "float32"), name=name) for name in "ab"]
    optimizer = keras_adam.Adam(0.5, param_groups=[{"params": "a", "lr": 0.25}])
    optimizer.build(variables)
    return optimizer, variables


def set_item(groups, index, value):
    groups[index] = value


def delete_item(groups, index):
    del groups[index]


CHANGES = {
    "append": lambda groups: groups.append({"params": "c"}),
    "extend": lambda groups: groups.extend([{"params": "c"}]),
    "insert": lambda groups: groups.insert(0, {"params": "c"}),
    "pop": lambda groups: groups.pop(),
    "pop 0": lambda groups: groups.pop(0),
    "remove": lambda groups: groups.remove(groups[0]),
    "clear": lambda groups: groups.clear(),
    "sort": lambda groups: groups.sort(key=len, reverse=True),
    "reverse": lambda groups: groups.reverse(),
    "[0] =": lambda groups: set_item(groups, 0, {"params": "c"}),
    "[:] =": lambda groups: set_item(groups, slice(None), []),
    "del [0]": lambda groups: delete_item(groups, 0),
    "del [:]": lambda groups: delete_item(groups, slice(None)),
    "+=": lambda groups: operator.iadd(groups, [{"params": "c"}]),
    "*=": lambda groups: operator.imul(groups, 2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("of", ["groups", "variables of a group"])
def test_change_of_the_list_is_refused(of, change):
    optimizer, _ = two_groups()
    groups = optimizer.param_groups
    before = list(groups)
    changed = groups if of == "groups" else groups[0]["params"]
    with pytest.raises(TypeError, match=r"`optimizer.param_groups.*`optimizer.add_param_group\("):
        CHANGES[change](changed)
    assert list(groups) == list(optimizer.param_groups) == before


def test_assignment_of_the_list_is_refused():
    optimizer, _ = two_groups()
    for value in ([], optimizer.param_groups[:1]):
        with pytest.raises(TypeError, match=r"`optimizer.add_param_group"):
            optimizer.param_groups = value
    with pytest.raises(TypeError, match=r"`optimizer.add_param_group.*Received: .*list of 1"):
        optimizer.param_groups += [{"params": "c"}]
    assert len(optimizer.param_groups) == 2


def test_reading_of_the_list():
    optimizer, (a, b) = two_groups()
    groups = optimizer.param_groups
    first, second = groups
    assert isinstance(groups, list)
    assert (len(groups), groups[0], groups[-1], groups[:1]) == (2, first, second, [first])
    assert first in groups
    assert (groups.index(second), groups.count(first)) == (1, 1)
    assert list(reversed(groups)) == [second, first]
    assert repr(groups) == f"[{first!r},\n {second!r}]"
    assert groups == optimizer.param_groups == [first, second]
    assert [*groups, None] == [first, second, None]
    assert copy.copy(groups) == groups.copy() == groups
    assert [list(g["params"]) for g in groups] == [[a], [b]]
    groups[0]["lr"] = 0.125
    groups[1].update({"beta_1": 0.5})
    assert [g["lr"] for g in optimizer.param_groups] == [0.125, 0.5]
    assert optimizer.beta_1 == 0.5
    # A list that a user makes from it may be changed.
    own = sorted(groups, key=lambda g: g["lr"], reverse=True)
    own.append(None)
    assert own == [second, first, None]


def test_deepcopy_of_the_list_is_a_snapshot():
    """It holds the numbers, which people copy to restore them later; the variables are the same ones."""
    optimizer, variables = two_groups()
    saved = copy.deepcopy(optimizer.param_groups)
    optimizer.param_groups[0]["lr"] = 0.125
    optimizer.param_groups[1]["betas"] = (0.5, 0.75)
    assert [g["lr"] for g in saved] == [g["learning_rate"] for g in saved] == [0.25, 0.5]
    assert [g["betas"] for g in saved] == [(0.9, 0.999)] * 2
    assert [g["eps"] for g in saved] == [1e-7] * 2
    for kept, variable in zip(saved, variables, strict=True):
        assert kept["params"][0] is variable
    with pytest.raises(KeyError):
        saved[0]["unknown"]
    for group, kept in zip(optimizer.param_groups, saved, strict=True):
        for name in ("lr", "betas"):
            group[name] = kept[name]
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.5]
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)
    saved[0]["lr"] = 7.0
    saved.append({"lr": 8.0})
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.5]
