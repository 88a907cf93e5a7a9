"""Random groups, changed and added at random times, against one reference per variable."""

import keras
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keras_adam
from support import reference

STEPS = 8
# Gradients are at least 0.1, hence no step is larger than some 10 rates; ten steps of float32.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}

runs = settings(
    # JAX compiles each list of variables anew.
    max_examples=6 if keras.backend.backend() == "jax" else 25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

shapes = st.sampled_from([(), (0, 3), (3,), (2, 2)])
NUMBERS = {
    "learning_rate": st.sampled_from([0, 1e-3, 3e-3, 0.01]),
    "beta_1": st.sampled_from([0, 0.5, 0.9, 0.99]),
    "beta_2": st.sampled_from([0, 0.9, 0.99, 0.999]),
    "epsilon": st.sampled_from([1e-8, 1e-7, 1e-3, 0.1]),
    "weight_decay": st.sampled_from([None, 0, 0.01, 0.5]),
}
CHOICES = {
    "amsgrad": st.sampled_from([False, True, "corrected"]),
    "maximize": st.booleans(),
    "decoupled_weight_decay": st.booleans(),
    "epsilon_hat": st.booleans(),
}
MULTIPLIER = {"learning_rate_multiplier": st.sampled_from([0, 0.5, 1, 3])}


@st.composite
def groups_of_variables(draw):
    """Draw groups, each as options, shapes of its variables, way to select them, and step at which it joins."""
    found = []
    for _ in range(draw(st.integers(0, 4))):
        options = draw(st.fixed_dictionaries({}, optional={**NUMBERS, **CHOICES}))
        if "learning_rate" not in options:
            options |= draw(st.fixed_dictionaries({}, optional=MULTIPLIER))
        found.append(
            {
                "options": options,
                "shapes": draw(st.lists(shapes, min_size=1, max_size=2)),
                "selector": draw(st.sampled_from(["variables", "regex", "predicate"])),
                "joins": draw(st.sampled_from([0, 0, 0, 4])),
            }
        )
    return found


settings_of_groups = st.dictionaries(
    st.tuples(st.integers(1, STEPS - 1), st.integers(0, 4)),
    st.fixed_dictionaries({}, optional={**NUMBERS, **MULTIPLIER}),
    max_size=5,
)


class Oracle:
    """What holds for a group, and the references of its variables."""

    def __init__(self, variables, options):
        self.options = {"learning_rate": None, "learning_rate_multiplier": 1, **options}
        self.adams = [reference.Adam([v.numpy()]) for v in variables]

    def step(self, gradients, rate):
        own = self.options["learning_rate"]
        rate = rate * self.options["learning_rate_multiplier"] if own is None else own
        for adam, gradient in zip(self.adams, gradients, strict=True):
            for name, value in {**self.options, "learning_rate": rate}.items():
                setattr(adam, name, value)
            if gradient is None:
                adam.t += 1
            else:
                adam.step([gradient])

    @property
    def values(self):
        return [adam.parameters[0] for adam in self.adams]


def selector_of(kind, variables):
    ids = {id(v) for v in variables}
    return {
        "variables": variables,
        "regex": "|".join(v.path for v in variables),
        "predicate": lambda v: id(v) in ids,
    }[kind]


def make_variables(rng, name, group_shapes):
    return [
        keras.Variable(np.asarray(rng.standard_normal(shape), "float32"), name=f"{name}_{i}")
        for i, shape in enumerate(group_shapes)
    ]


def draw_gradient(rng, shape):
    size = rng.uniform(0.1, 1, shape) * rng.choice([-1.0, 1.0], shape)
    return np.asarray(size, "float32")


@runs
@given(
    common=st.fixed_dictionaries({}, optional={**NUMBERS, **CHOICES}),
    rest=st.lists(shapes, min_size=1, max_size=2),
    groups=groups_of_variables(),
    changes=settings_of_groups,
    seed=st.integers(0, 2**16),
)
def test_against_one_reference_per_variable(common, rest, groups, changes, seed):
    rng = np.random.default_rng(seed)
    defaults = keras_adam.Adam().get_config()
    names = [*NUMBERS, *CHOICES]
    fallback = {
        "decoupled_weight_decay": True,
        "epsilon_hat": True,
        "maximize": False,
        **{name: defaults[name] for name in names if name in defaults},
        **common,
    }
    inherited = {name: value for name, value in fallback.items() if name != "learning_rate"}
    rate = fallback["learning_rate"]

    for i, group in enumerate(groups):
        group["variables"] = make_variables(rng, f"group{i}", group["shapes"])
        group["params"] = selector_of(group["selector"], group["variables"])
    others = make_variables(rng, "rest", rest)
    oracles = [(others, Oracle(others, inherited))]
    first = [g for g in groups if g["joins"] == 0]
    optimizer = keras_adam.Adam(
        **common, param_groups=[{"params": g["params"], **g["options"]} for g in first]
    )
    members = [*others, *(v for g in first for v in g["variables"])]
    order = list(rng.permutation(len(members)))
    optimizer.build([members[i] for i in order])
    for group in first:
        oracle = Oracle(group["variables"], {**inherited, **group["options"]})
        oracles.append((group["variables"], oracle))
    # As `optimizer.param_groups`: what joins later comes after the default group.
    listed = [oracle for _, oracle in [*oracles[1:], oracles[0]]]

    for step in range(STEPS):
        for group in groups:
            if group["joins"] == step > 0:
                # Inherited is what the default group has now.
                now = {**oracles[0][1].options}
                del now["learning_rate"], now["learning_rate_multiplier"]
                optimizer.add_param_group({"params": group["params"], **group["options"]})
                oracle = Oracle(group["variables"], {**now, **group["options"]})
                oracles.append((group["variables"], oracle))
                listed.append(oracle)
        for (when, which), values in changes.items():
            if when == step and which < len(listed):
                values = dict(values)
                is_default = listed[which] is oracles[0][1]
                own = {**listed[which].options, **values}["learning_rate"]
                if is_default or own is not None:  # it would be without effect, and is refused
                    values.pop("learning_rate_multiplier", None)
                optimizer.param_groups[which].update(values)
                if is_default:  # its rate is the optimizer's
                    rate = values.pop("learning_rate", rate)
                listed[which].options.update(values)
        grads, variables = [], []
        for members, oracle in oracles:
            found = [draw_gradient(rng, v.shape) for v in members]
            if step % 3 == 2 and members is not others:
                found[0] = None  # its variable stays, its step counts
            grads.extend(None if g is None else keras.ops.convert_to_tensor(g) for g in found)
            variables.extend(members)
            oracle.step(found, rate)
        optimizer.apply(grads, variables)

    for members, oracle in oracles:
        for variable, value in zip(members, oracle.values, strict=True):
            actual = keras.ops.convert_to_numpy(variable)
            np.testing.assert_allclose(actual, value, err_msg=variable.path, **TOLERANCE)


@runs
@given(
    common=st.fixed_dictionaries({}, optional={**NUMBERS, **CHOICES}),
    groups=groups_of_variables(),
    changes=settings_of_groups,
)
def test_config_makes_an_equal_optimizer(common, groups, changes):
    rng = np.random.default_rng(0)
    for i, group in enumerate(groups):
        group["variables"] = make_variables(rng, f"group{i}", group["shapes"])
        group["params"] = selector_of(group["selector"], group["variables"])
    variables = [v for g in groups for v in g["variables"]] + make_variables(rng, "rest", [()])
    optimizer = keras_adam.Adam(
        **common, param_groups=[{"params": g["params"], **g["options"]} for g in groups]
    )
    optimizer.build(variables)
    rates = [g["options"].get("learning_rate") for g in groups]
    for (_, which), values in changes.items():
        if which < len(groups):
            values = dict(values)
            rates[which] = values.get("learning_rate", rates[which])
            if rates[which] is not None:  # it would be without effect, and is refused
                values.pop("learning_rate_multiplier", None)
            optimizer.param_groups[which].update(values)
    again = keras_adam.Adam.from_config(optimizer.get_config())
    again.build(variables)
    for got, want in zip(again.param_groups, optimizer.param_groups, strict=True):
        assert [v.path for v in got["params"]] == [v.path for v in want["params"]]
        for name in want:
            if name != "params":
                # A number may have become that of float32 nearest to it.
                assert (got[name] or 0.0) == (want[name] or 0.0), name
