"""`tf.train.Checkpoint` of an optimizer with groups, late ones too: restored, it goes on as the one that was saved."""

import functools

import keras
import numpy as np
import pytest

import keras_adam
from support.tolerances import TOLERANCES

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="TensorFlow's own checkpoints"
)
GROUP = {"params": "^late$", "learning_rate_multiplier": 0.5, "amsgrad": True}
EXACT = TOLERANCES["float64"]


def variables(dtype="float32"):
    return [
        keras.Variable(np.array([1.0, -2.0, 0.5, 3.0, 1.5, -1.0]), dtype=dtype, name="early"),
        # As many elements as a group's numbers, so that a match by order could restore one into the other.
        keras.Variable(np.linspace(-1.0, 1.0, 6), dtype=dtype, name="late"),
    ]


def steps(optimizer, chosen, first, count):
    """Take steps whose gradients depend on the number of the step."""
    for i in range(first, first + count):
        grads = [
            keras.ops.convert_to_tensor(np.cos(np.arange(6.0) * (i + 1)), v.dtype) for v in chosen
        ]
        optimizer.apply(grads, chosen)


def saved_run(folder, dtype="float32", **options):
    """Make two steps of one variable, three of both, a checkpoint, and four more steps."""
    import tensorflow as tf

    chosen = variables(dtype)
    optimizer = keras_adam.Adam(0.1, **options)
    optimizer.build(chosen[:1])
    steps(optimizer, chosen[:1], 0, 2)
    optimizer.add_param_group(GROUP | {"params": chosen[1:]})
    steps(optimizer, chosen, 2, 3)
    optimizer.param_groups[-1]["weight_decay"] = 0.25
    checkpoint = tf.train.Checkpoint(optimizer=optimizer, variables=chosen)
    path = checkpoint.save(str(folder / "checkpoint"))
    steps(optimizer, chosen, 5, 4)
    return path, chosen, optimizer


def in_constructor(chosen, build=True, **options):
    optimizer = keras_adam.Adam(0.1, param_groups=[GROUP], **options)
    if build:
        optimizer.build(chosen)
    return optimizer


def added(chosen, **options):
    optimizer = keras_adam.Adam(0.1, **options)
    optimizer.build(chosen[:1])
    optimizer.add_param_group(GROUP | {"params": chosen[1:]})
    return optimizer


def added_after_steps(chosen, **options):
    optimizer = keras_adam.Adam(0.1, **options)
    optimizer.build(chosen[:1])
    steps(optimizer, chosen[:1], 0, 4)
    optimizer.add_param_group(GROUP | {"params": chosen[1:]})
    return optimizer


OPTIONS = {
    "plain": {},
    "bfloat16": {"dtype": "bfloat16"},
    "average": {"use_ema": True, "ema_overwrite_frequency": 2},
    "accumulation": {"gradient_accumulation_steps": 2},
    "skip_nonfinite": {"skip_nonfinite": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make", [in_constructor, added, added_after_steps])
def test_goes_on(make, options, tmp_path):
    import tensorflow as tf

    path, expected, old = saved_run(tmp_path, **options)
    chosen = variables(options.get("dtype", "float32"))
    optimizer = make(chosen, **{k: v for k, v in options.items() if k != "dtype"})
    checkpoint = tf.train.Checkpoint(optimizer=optimizer, variables=chosen)
    checkpoint.restore(path).assert_consumed()
    assert optimizer.param_groups[0 if make is in_constructor else -1]["weight_decay"] == 0.25
    steps(optimizer, chosen, 5, 4)
    assert int(optimizer.iterations) == int(old.iterations)
    for actual, wanted in zip(chosen, expected, strict=True):
        np.testing.assert_allclose(
            *(keras.ops.convert_to_numpy(keras.ops.cast(v, "float32")) for v in (actual, wanted)),
            **EXACT,
        )


@pytest.mark.parametrize("partial", [False, True])
def test_restored_before_build(partial, tmp_path):
    import tensorflow as tf

    path, expected, _ = saved_run(tmp_path)
    chosen = variables()
    optimizer = in_constructor(chosen, build=False)
    status = tf.train.Checkpoint(optimizer=optimizer, variables=chosen).restore(path)
    if partial:
        status.expect_partial()
    optimizer.build(chosen)
    if not partial:
        status.assert_consumed()
    steps(optimizer, chosen, 5, 4)
    for actual, wanted in zip(chosen, expected, strict=True):
        np.testing.assert_allclose(actual.numpy(), wanted.numpy(), **EXACT)


def test_restored_before_a_build_in_a_graph(tmp_path):
    import tensorflow as tf

    path, expected, _ = saved_run(tmp_path)
    chosen = variables()
    optimizer = in_constructor(chosen, build=False)
    status = tf.train.Checkpoint(optimizer=optimizer, variables=chosen).restore(path)

    @tf.function
    def step(gradient):
        optimizer.apply([gradient, gradient], chosen)

    for i in range(5, 9):
        step(tf.constant(np.cos(np.arange(6.0) * (i + 1)), tf.float32))
    status.assert_consumed()
    for actual, wanted in zip(chosen, expected, strict=True):
        np.testing.assert_allclose(actual.numpy(), wanted.numpy(), **TOLERANCES["float32"])


@pytest.mark.parametrize("deferred", [False, True])
def test_another_number_of_variables_is_refused(deferred, tmp_path):
    import tensorflow as tf

    path, _, _ = saved_run(tmp_path)
    chosen = variables()[:1]
    optimizer = keras_adam.Adam(0.1, param_groups=[])
    if not deferred:
        optimizer.build(chosen)
    before = [v.numpy() for v in optimizer.variables]
    checkpoint = tf.train.Checkpoint(optimizer=optimizer)
    if deferred:
        checkpoint.restore(path).expect_partial()
    refused = functools.partial(
        *((optimizer.build, chosen) if deferred else (checkpoint.restore, path))
    )
    with pytest.raises(ValueError, match=r"state of 2 variables.*`add_param_group`.*before `rest"):
        refused()
    if not deferred:
        for old, new in zip(before, optimizer.variables, strict=True):
            np.testing.assert_array_equal(new.numpy(), old)


def test_into_a_compiled_step_that_knows_of_no_late_variable(tmp_path):
    import tensorflow as tf

    path, _, _ = saved_run(tmp_path)
    chosen = variables()
    optimizer = in_constructor(chosen)
    step = tf.function(lambda g: optimizer.apply([g, g], chosen))
    step(tf.ones(6))
    before = [v.numpy() for v in optimizer.variables]
    with pytest.raises(ValueError, match="other variables joined late"):
        tf.train.Checkpoint(optimizer=optimizer).restore(path).expect_partial()
    for old, new in zip(before, optimizer.variables, strict=True):
        np.testing.assert_array_equal(new.numpy(), old)


def test_without_groups_keras_reads_it_and_the_other_way_round(tmp_path):
    import tensorflow as tf

    made = {"ours": lambda: keras_adam.Adam(0.1), "keras": lambda: keras.optimizers.Adam(0.1)}
    grouped = {"ours": lambda: keras_adam.Adam(0.1, param_groups=[])}
    for writer, make in made.items():
        chosen = variables()
        old = make()
        old.build(chosen)
        steps(old, chosen, 0, 3)
        path = tf.train.Checkpoint(optimizer=old).save(str(tmp_path / writer))
        for read in (*made.values(), *grouped.values()):
            new = read()
            new.build(variables())
            tf.train.Checkpoint(optimizer=new).restore(path).expect_partial()
            assert int(new.iterations) == 3
            moments = [[*o._momentums, *o._velocities] for o in (old, new)]
            for a, b in zip(*moments, strict=True):
                np.testing.assert_array_equal(a.numpy(), b.numpy())
