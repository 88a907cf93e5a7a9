"""What `repr` shows of an optimizer and its groups, in a traced step too."""

import keras
import pytest

import keras_adam
from support.models import fit, make_model
from support.steps import compiled_step, eager_step

SCHEDULE = keras.optimizers.schedules.CosineDecay(0.01, 10)


def slowly():
    return 0.5


def make_variables():
    return [keras.Variable([1.0, 2.0], name=name) for name in ("kernel", "bias")]


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (keras_adam.Adam(), "<Adam learning_rate=0.001>"),
        (keras_adam.AdamW(), "<AdamW learning_rate=0.001>"),
        (keras_adam.AdamW(SCHEDULE), "<AdamW learning_rate=CosineDecay>"),
        (
            keras_adam.Adam(0.1, beta_1=slowly, amsgrad="corrected", weight_decay=0.0),
            "<Adam learning_rate=0.1, beta_1=slowly, amsgrad='corrected', weight_decay=0.0>",
        ),
        (
            keras_adam.AdamW(global_clipnorm=1, state_dtype="bfloat16", param_groups=[]),
            "<AdamW learning_rate=0.001, global_clipnorm=1.0, state_dtype='bfloat16', 1 param_groups>",
        ),
        (
            keras_adam.Adam.with_torch_arguments(weight_decay=0.1),
            "<Adam learning_rate=0.001, epsilon=1e-08, weight_decay=0.1, decoupled_weight_decay=False, "
            "epsilon_hat=False>",
        ),
    ],
    ids=str,
)
def test_optimizer_shows_what_differs_from_its_defaults(optimizer, expected):
    assert repr(optimizer) == expected
    optimizer.build(make_variables())
    assert repr(optimizer) == expected


def test_subclass_has_its_own_name_and_defaults():
    class Careful(keras_adam.AdamW):
        def __init__(self, own, learning_rate=1e-4, **options):
            super().__init__(learning_rate, **options)

    assert repr(Careful(own=1)) == "<Careful learning_rate=0.0001>"
    assert repr(Careful(own=1, beta_2=0.99)) == "<Careful learning_rate=0.0001, beta_2=0.99>"


def test_groups_are_printed_one_a_line_with_what_differs():
    model = make_model()
    dense, late = model.layers[-1], keras.layers.Dense(2, name="late")
    late.build((None, 2))
    optimizer = keras_adam.Adam(
        param_groups=[
            {"params": ".*bias", "weight_decay": 0.0, "learning_rate_multiplier": 0.5},
            {"params": [dense, *"abc"], "lr": SCHEDULE, "maximize": True, "state_dtype": "8bit"},
        ],
    )
    first = "learning_rate=0.001 * 0.5, weight_decay=0.0>"
    second = "learning_rate=CosineDecay, maximize=True, state_dtype='8bit'>"
    others = "learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-07>"
    assert repr(optimizer.param_groups) == (
        f"[<ParamGroup of '.*bias', not built: {first},\n"
        f" <ParamGroup of layer dense, 'a', 'b', 1 more, not built: {second},\n"
        f" <ParamGroup of the others, not built: {others}]"
    )
    optimizer.build(model.trainable_variables)
    optimizer.learning_rate = 0.25
    optimizer.param_groups[0]["beta_1"] = 0.75
    optimizer.add_param_group({"params": [late.kernel, lambda variable: True]})
    optimizer.build([*model.trainable_variables, *late.trainable_variables])
    assert str(optimizer.param_groups).split("\n") == [
        "[<ParamGroup of '.*bias', 1 variable: learning_rate=0.25 * 0.5, beta_1=0.75, weight_decay=0.0>,",
        f" <ParamGroup of layer dense, 'a', 'b', 1 more, 1 variable: {second},",
        f" <ParamGroup of the others, 0 variables: {others.replace('0.001', '0.25')},",
        " <ParamGroup of late/kernel, <lambda>, 2 variables: learning_rate=0.25>]",
    ]
    assert isinstance(optimizer.param_groups, list)


class Watched(keras_adam.Adam):
    """Calls its own `repr` in each step."""

    def apply(self, grads, trainable_variables=None):
        """Step, and read before and after."""
        self.__dict__["read"] = [repr(self), repr(self.param_groups)]
        super().apply(grads, trainable_variables)
        self.read.extend([repr(self), repr(self.param_groups)])


@pytest.mark.parametrize(
    "groups", [None, [{"params": ".*bias", "beta_1": 0.5}]], ids=["", "groups"]
)
@pytest.mark.parametrize("make_step", [eager_step, compiled_step])
def test_reads_in_a_step_what_was_given(make_step, groups):
    variables = make_variables()
    optimizer = Watched(0.25, beta_1=0.75, param_groups=groups)
    make_step(optimizer, variables)([1.0, 1.0], [1.0, 1.0])
    for i in (0, 2):
        assert optimizer.read[i].startswith("<Watched learning_rate=0.25, beta_1=0.75")
        assert "learning_rate=0.25, beta_1=0.75" in optimizer.read[i + 1]
        assert ("learning_rate=0.25, beta_1=0.5>" in optimizer.read[i + 1]) == bool(groups)


def test_reads_while_fit_runs():
    optimizer = Watched(0.25, param_groups=[])
    read = []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: read.append(
            (repr(optimizer), repr(optimizer.param_groups))
        )
    )
    fit(make_model(optimizer), callbacks=[callback])
    assert {one for one, _ in read} == {"<Watched learning_rate=0.25, 1 param_groups>"}
    assert all("the others, 2 variables: learning_rate=0.25" in groups for _, groups in read)
    assert optimizer.read[-2:] == list(read[-1])
