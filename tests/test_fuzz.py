"""Random variables, options, gradients and operations, against the model in `model_of_optimizer.py`.

`make test-long` runs a few dozen examples, the same each time; `make fuzz` runs FUZZ_EXAMPLES (2,000) other
ones. What it has found is tested below, in tests of their own.

Backends differ in the following, which is compared within these bounds rather than avoided:

- In float32 the square of 1e30 is infinite, and so is the second moment from then on. That step divides by
  infinity and leaves the variable as it is. PyTorch's kernel goes on so; elsewhere the next step subtracts
  infinity from infinity. Such an element must be NaN, or as if no step were made.
- A norm of 1e30 is infinite for the same reason, and a gradient clipped by it becomes zero. PyTorch
  computes the norm of a single number right, and XLA may.
- XLA and TensorFlow take numbers below 2^-126 for zero, PyTorch does not.
- A number that leaves the range of its variable's dtype may be anything from then on.
- epsilon=0 is not drawn: 0 / 0 is the caller's wish.
"""

import contextlib
import io
import itertools
import os

import jax
import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import keras_adam
from keras_adam import storage
from support import eight_bits
from support import model_of_optimizer as model
from support.helpers import float64_allowed
from support.resume import load_state, save_state
from support.steps import BACKEND, compiled_step, value_of

LEAST_IN_8_BITS = 3  # so that a few elements show it
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
runs = settings(
    max_examples=EXAMPLES or 25,
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    print_blob=bool(EXAMPLES),
    suppress_health_check=list(HealthCheck),
)

# The bounds are of first order in most places; and the one on TensorFlow allows for its kernel, which takes
# beta in float32, where 1 - 0.999 is off by 1.3e-5.
SLACK = 4
SCALAR_ERROR = {"jax": 2e-6, "tensorflow": 2e-5, "torch": 2e-6}[BACKEND]

SHAPES = [(), (0,), (3,), (1,), (2, 3), (0, 4), (2, 130)]
DTYPES = ["float32", "float32", "float32", "bfloat16", "float16", "float64"]
SCHEDULE = {"initial_learning_rate": 0.05, "decay_steps": 3, "decay_rate": 0.5}

NUMBERS = {
    "beta_1": st.sampled_from([0.9, 0.5, 0.0]),
    "beta_2": st.sampled_from([0.999, 0.9, 0.5, 0.0]),
    "epsilon": st.sampled_from([1e-7, 1e-8, 1e-3]),
    "weight_decay": st.sampled_from([None, 0.0, 0.01, 0.5]),
}
RATES = st.sampled_from([1e-3, 0.01, 0.1, 0.0])
CHOICES = {
    "amsgrad": st.sampled_from([False, True, "corrected"]),
    "decoupled_weight_decay": st.booleans(),
    "epsilon_hat": st.booleans(),
    "maximize": st.booleans(),
}
WHOLE = {
    "learning_rate": st.one_of(RATES, st.just("schedule")),
    "use_ema": st.booleans(),
    "ema_momentum": st.sampled_from([0.99, 0.5, 0.0, 1.0]),
    "ema_overwrite_frequency": st.sampled_from([None, 1, 2, 3]),
    "loss_scale_factor": st.sampled_from([None, 64.0, 1000.0]),
    "gradient_accumulation_steps": st.sampled_from([None, None, 2, 3]),
    "state_dtype": st.sampled_from([None, "float32", "bfloat16", "8bit"]),
    "kahan_sum": st.sampled_from([None, False]),
    "skip_nonfinite": st.booleans(),
}
CLIPS = st.one_of(
    st.just({}),
    *(
        st.fixed_dictionaries({name: st.sampled_from([0.5, 1e-3, 100.0])})
        for name in ("clipnorm", "clipvalue", "global_clipnorm")
    ),
)
DEFAULTS = {
    "learning_rate": 0.001,
    "beta_1": 0.9,
    "beta_2": 0.999,
    "epsilon": 1e-7,
    "weight_decay": None,
    "amsgrad": False,
    "decoupled_weight_decay": True,
    "epsilon_hat": True,
    "maximize": False,
    "clipnorm": None,
    "clipvalue": None,
    "global_clipnorm": None,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": None,
    "loss_scale_factor": None,
    "gradient_accumulation_steps": None,
    "state_dtype": None,
    "kahan_sum": None,
    "skip_nonfinite": False,
}
# A value that a whole gradient has, or one of its elements.
SPECIAL = [0.0, 1e30, -1e30, 1e-30, 1e-40, 6e-8, np.inf, -np.inf, np.nan]
ONCE = st.sampled_from(["normal", "normal", "normal", "normal", None, 0.0, 1e-40, 1e-30, 1e30])
MIXED = st.tuples(st.sampled_from(SPECIAL), st.integers(0, 5))
GRADIENTS = st.lists(st.one_of(ONCE, ONCE, ONCE, MIXED), min_size=1, max_size=4)

variables = st.lists(
    st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES)), min_size=1, max_size=4
)
OF_GROUPS = {"state_dtype": st.sampled_from([None, "float32", "bfloat16", "8bit"])}
group_options = st.fixed_dictionaries({}, optional={**NUMBERS, **CHOICES, **OF_GROUPS}).flatmap(
    lambda options: st.one_of(
        st.just(options),
        RATES.map(lambda rate: {**options, "learning_rate": rate}),
        st.sampled_from([0.0, 0.5, 3.0]).map(
            lambda factor: {**options, "learning_rate_multiplier": factor}
        ),
    )
)
step = st.tuples(st.just("step"), GRADIENTS)
operations = st.lists(
    st.one_of(
        step,
        step,
        step,
        st.tuples(st.just("save_and_load"), st.sampled_from(["h5", "dict", "set_weights"])),
        st.tuples(
            st.just("add_group"), group_options, st.sampled_from(SHAPES), st.sampled_from(DTYPES)
        ),
        st.tuples(st.just("set_rate"), RATES),
        st.tuples(
            st.just("set_numbers"), st.integers(0, 3), st.fixed_dictionaries({}, optional=NUMBERS)
        ),
        st.tuples(st.just("look")),
    ),
    min_size=2,
    max_size=8,
)
plans = st.fixed_dictionaries(
    {
        "options": st.builds(
            lambda *parts: {key: value for part in parts for key, value in part.items()},
            st.fixed_dictionaries({}, optional={**NUMBERS, **CHOICES, **WHOLE}),
            CLIPS,
        ),
        "variables": variables,
        # Groups that there are from the start, each with which of the variables it selects; None:
        # the numbers are constants.
        "groups": st.one_of(
            st.none(), st.lists(st.tuples(group_options, st.integers(0, 3)), max_size=2)
        ),
        "excluded": st.sampled_from([None, None, 0, 1]),
        "operations": operations,
        # How a step is made. On JAX most examples run operation by operation, which takes
        # milliseconds where compilation takes half a second; TensorFlow compiles rarely too.
        "how": st.sampled_from(["plain"] * 12 + ["eager", "compiled"]),
        "seed": st.integers(0, 2**16),
    }
)


def make_start(rng, shape, dtype):
    values = np.asarray(rng.standard_normal(shape), "float64")
    values = np.asarray(np.where(rng.random(shape) < 0.1, 0.0, values))
    return values.astype(_numpy_dtype(dtype))


def _numpy_dtype(dtype):
    return ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)


def make_gradient(rng, kind, shape, dtype):
    """Return an array of the variable's dtype, so that both sides see the same numbers."""
    if kind is None:
        return None
    size = 10 ** rng.uniform(-5, 2, shape) * rng.choice([-1.0, 1.0], shape)
    values = np.asarray(size, "float64")
    if isinstance(kind, tuple):
        value, where = kind
        if values.size:
            values.reshape(-1)[where % values.size] = value
    elif kind != "normal":
        values = np.full(shape, kind)
    with np.errstate(over="ignore"):
        return values.astype(_numpy_dtype(dtype))


def to_tensor(array, dtype):
    if dtype == "bfloat16":
        return keras.ops.cast(keras.ops.convert_to_tensor(array.astype("float32")), dtype)
    return keras.ops.convert_to_tensor(array, dtype=dtype)


def bits(tensors):
    return [value_of(t) for t in tensors]


def assert_same_bits(actual, desired, what):
    for got, want in zip(actual, desired, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=what)


def arrays_of(optimizer, but=None):
    """All state variables, as an optimizer built anew would make them, but for those of a role."""
    return [
        x
        for e in optimizer._loading._entries_in_order()
        if but is None or not e.role.startswith(but)
        for x in (e.variable, e.scale)
        if x is not None
    ]


def numbers_of(slot, signed=False):
    """What a moment is; codes are looked up in the table."""
    if len(slot.arrays) == 1:
        return value_of(slot.arrays[0])
    codes, scale = (keras.ops.convert_to_numpy(x) for x in slot.arrays)
    return eight_bits.decoded(np.array(codes), scale, signed)


class Run:
    """One optimizer and its model, which follow a plan."""

    def __init__(self, plan):
        self.rng = np.random.default_rng(plan["seed"])
        self.names = itertools.count()
        self.how = plan["how"]
        self.options = {**DEFAULTS, **plan["options"]}
        if self.options["ema_overwrite_frequency"] and not self.options["use_ema"]:
            self.options["ema_overwrite_frequency"] = None
        given = dict(self.options)
        self.follows_schedule = given["learning_rate"] == "schedule"
        if self.follows_schedule:
            given["learning_rate"] = keras.optimizers.schedules.ExponentialDecay(**SCHEDULE)
        self.variables = [self._variable(*v) for v in plan["variables"]]
        self.default = {
            **{name: self.options[name] for name in (*NUMBERS, *CHOICES)},
            "learning_rate": None,
            "learning_rate_multiplier": 1.0,
        }
        groups = plan["groups"]
        if self.how == "compiled" and groups is None:
            groups = []  # without groups, setting a number is refused, as it must be
        self.groups, specs, group_of = [], [], {}
        for options, which in groups or []:
            which %= len(self.variables)
            if which not in group_of:
                specs.append({"params": self.variables[which], **options})
                self.groups.append({**self.default, **options})
                group_of[which] = self.groups[-1]
        self.groups.append(self.default)
        if groups is not None:
            given["param_groups"] = specs
        self.optimizer = keras_adam.Adam(**given)
        excluded = plan["excluded"]
        if excluded is not None and excluded < len(self.variables):
            self.optimizer.exclude_from_weight_decay([self.variables[excluded]])
        self.optimizer.build(self.variables)
        rate = _schedule if self.follows_schedule else self.options["learning_rate"]
        self.model = model.Optimizer(
            [
                self._model_of(v, group_of.get(i, self.default), i != excluded)
                for i, v in enumerate(self.variables)
            ],
            {**self.options, "learning_rate": rate},
            SCALAR_ERROR,
            lone_norms_hold=None if BACKEND == "jax" else BACKEND == "torch",
            least_in_8_bits=LEAST_IN_8_BITS,
        )
        self.compiled = None

    def _variable(self, shape, dtype):
        start = make_start(self.rng, shape, dtype)
        variable = keras.Variable(
            np.zeros(shape, "float32"), dtype=dtype, name=f"v{next(self.names)}"
        )
        variable.assign(to_tensor(start, dtype))
        return variable

    def _model_of(self, variable, group, decays=True, start=0):
        return model.Variable(value_of(variable), variable.dtype, group, start, decays)

    # Operations

    def step(self, kinds):
        kinds = [kinds[i % len(kinds)] for i in range(len(self.variables))]
        if all(kind is None for kind in kinds):
            kinds[0] = "normal"
        arrays = [
            make_gradient(self.rng, kind, v.shape, v.dtype)
            for kind, v in zip(kinds, self.variables, strict=True)
        ]
        tensors = [
            None if a is None else to_tensor(a, v.dtype)
            for a, v in zip(arrays, self.variables, strict=True)
        ]
        if self.how == "compiled":
            if self.compiled is None:
                self.compiled = compiled_step(self.optimizer, self.variables)
            self.compiled(*tensors)
        else:
            self.optimizer.apply(tensors, self.variables)
        arrays = [None if a is None else a.astype("float64") for a in arrays]
        given = [(t, a) for t, a in zip(tensors, arrays, strict=True) if a is not None]
        assert_same_bits(bits(t for t, _ in given), [a for _, a in given], "a gradient")
        self.model.step(arrays)

    def save_and_load(self, how):
        old = self.optimizer
        new = keras_adam.Adam.from_config(old.get_config())
        assert new.get_config() == old.get_config()
        before = self._state(old)
        has_joined_late = any(v.start for v in self.model.variables)
        if has_joined_late and how != "h5":
            # Only HDF5 says when each of the variables joined.
            store = {}
            old.save_own_variables(store)
            new.build(self.variables)
            fresh = bits(new.variables)
            with pytest.raises(ValueError, match="No state was loaded"):
                new.load_own_variables(store)
            assert_same_bits(bits(new.variables), fresh, "after a refusal")
            return
        if how == "h5":
            file = save_state(io.BytesIO(), old)
            new.build(self.variables)
            load_state(file, new)
        elif how == "dict":
            store = {}
            old.save_own_variables(store)
            new.build(self.variables)
            new.load_own_variables(store)
        else:
            # These are in the order in which `old` made them.
            new.build(self.variables)
            new.set_weights(arrays_of(old))
        assert_same_bits(self._state(new), before, "the state loaded")
        self.optimizer, self.compiled = new, None

    def _state(self, optimizer):
        """All of it; when each variable joined is told as a number, as who joined together shares one variable."""
        entries = arrays_of(optimizer, but="start")
        joined = [
            0 if p.joined is None else value_of(p.joined.update) for p in optimizer._parameters
        ]
        return [*bits([*self.variables, *entries]), np.array(joined)]

    def add_group(self, options, shape, dtype):
        variable = self._variable(shape, dtype)
        self.optimizer.add_param_group({"params": variable, **options})
        self.optimizer.build([*self.variables, variable])
        inherited = {**self.default, "learning_rate": None, "learning_rate_multiplier": 1.0}
        group = {**inherited, **options}
        self.groups.append(group)
        self.variables.append(variable)
        joined = self._model_of(variable, group, start=self.model.updates)
        self.model.variables.append(joined)
        self.compiled = None

    def set_rate(self, rate):
        if not self.follows_schedule:
            self.optimizer.learning_rate = rate
            self.model.learning_rate = rate

    def set_numbers(self, which, numbers):
        which %= len(self.groups)
        self.optimizer.param_groups[which].update(numbers)
        self.groups[which].update(numbers)

    def look(self):
        before = bits([*self.variables, *self.optimizer.variables])
        repr(self.optimizer.param_groups)
        self.optimizer.get_config()
        self.optimizer.state_size()
        self.optimizer.param_groups[0].update({})
        after = bits([*self.variables, *self.optimizer.variables])
        assert_same_bits(after, before, "what was only looked at")

    # Comparison

    def check(self):
        optimizer = self.optimizer
        assert int(value_of(optimizer._iterations)) == self.model.calls
        if self.options["skip_nonfinite"]:
            assert int(value_of(optimizer.skipped_steps)) == self.model.skipped
        for i, (variable, x) in enumerate(zip(self.variables, self.model.variables, strict=True)):
            value = value_of(variable)
            assert value.shape == x.p.shape
            lost = optimizer._parameters[variable].array("value")
            whole = value
            if lost is not None:
                whole = value + value_of(lost) / {"bfloat16": 1, "float16": 2**11}[variable.dtype]
            self._compare(x, whole, x.p, x.e_p, f"{variable.path} ({variable.dtype})")
            index = optimizer._get_variable_index(variable)
            kept = optimizer._parameters[variable]
            self._compare(x, numbers_of(kept.momentum, signed=True), x.m, x.e_m, f"momentum {i}")
            self._compare(x, numbers_of(kept.velocity), x.v, x.e_v, f"velocity {i}")
            if self.options["use_ema"] and x.average is not None:
                average = value_of(optimizer._model_variables_moving_average[index])
                self._compare(x, average, x.average, x.e_average, f"average {i}")

    @staticmethod
    def _compare(x, actual, desired, error, what):
        with np.errstate(invalid="ignore"):
            near = np.abs(actual - desired) <= SLACK * error
        same = near | (actual == desired) | (np.isnan(actual) & np.isnan(desired))
        same |= (np.isnan(actual) & x.may_be_nan) | x.is_lost
        assert np.all(same), (
            f"{what}: {actual}, should be {desired} within {SLACK * error}, at {same}"
        )


def _schedule(calls):
    return SCHEDULE["initial_learning_rate"] * SCHEDULE["decay_rate"] ** (
        calls / SCHEDULE["decay_steps"]
    )


def run(plan):
    is_plain = plan["how"] == "plain" and BACKEND == "jax"
    needs_float64 = "float64" in str([plan["variables"], plan["operations"]])
    with contextlib.ExitStack() as stack:
        context = pytest.MonkeyPatch.context()
        stack.enter_context(context).setattr(storage, "_LEAST_IN_8_BITS", LEAST_IN_8_BITS)
        if is_plain:
            stack.enter_context(jax.disable_jit())
        if needs_float64:
            stack.enter_context(float64_allowed())
        taken = Run(plan)
        taken.check()
        for name, *arguments in plan["operations"]:
            getattr(taken, name)(*arguments)
            taken.check()
    return taken


def plan_of(operations, variables, **others):
    plan = {"options": {}, "groups": None, "excluded": None, "how": "plain", "seed": 0}
    return {**plan, "operations": operations, "variables": variables, **others}


FLOAT32 = [((3,), "float32"), ((3,), "float32")]
# What it has found: in a store that tells no roles, the numbers of groups, a group added before
# training among variables of one shape, and the count of skipped steps; two joinings at the same update, which share
# a start once loaded; the norm of a single number whose square is infinite, of one dtype among two; a float16 NaN,
# which as float32 has its upper bits set, in moments of bfloat16. In the model: moments of less range than their
# variable; no decay of a variable that is NaN.
FOUND = [
    plan_of([("step", ["normal"]), ("save_and_load", "dict")], FLOAT32, groups=[({}, 0)]),
    plan_of(
        [
            ("add_group", {"beta_1": 0.5}, (3,), "float32"),
            ("step", ["normal"]),
            ("save_and_load", "dict"),
            ("step", ["normal"]),
        ],
        FLOAT32,
        options={"use_ema": True},
    ),
    plan_of(
        [
            ("step", ["normal"]),
            ("add_group", {"learning_rate": 0.1}, (1,), "float16"),
            ("add_group", {"maximize": True}, (0, 4), "float32"),
            ("save_and_load", "h5"),
            ("step", ["normal"]),
        ],
        [((3,), "float16")],
    ),
    plan_of(
        [("step", [(1e30, 0), (-1e30, 0)])],
        [((), "float64"), ((1,), "float32"), ((3,), "float32")],
        options={"clipnorm": 100.0},
        how="compiled",
    ),
    plan_of(
        [("add_group", {}, (), "float32"), ("save_and_load", "dict")],
        [((), "float32")],
        options={"skip_nonfinite": True},
    ),
    plan_of(
        [("step", ["normal"]), ("step", [(1e30, 0)]), ("step", ["normal"])],
        [((), "float64")],
        options={"state_dtype": "float32"},
    ),
    plan_of(
        [("step", ["normal"]), ("step", [(float("nan"), 0)]), ("step", ["normal"])],
        [((), "float16")],
        options={"state_dtype": "bfloat16"},
    ),
    plan_of(
        [("step", [(float("inf"), 0)]), ("step", ["normal"])],
        [((), "float32")],
        options={"decoupled_weight_decay": False},
    ),
]


@pytest.mark.parametrize("plan", FOUND, ids=range(len(FOUND)))
def test_plan_that_was_found(plan):
    run(plan)


@pytest.mark.long
@runs
@given(plans)
def test_any_plan_gives_what_the_model_gives(plan):
    for name in {operation[0] for operation in plan["operations"]}:
        event(name)
    run(plan)
