"""A copy of an optimizer keeps its state for the same variables; in another model it is refused."""

import copy
import io
import pickle
import re

import joblib
import keras
import numpy as np
import pytest

import keras_adam
from support.helpers import SHAPES, make_variables, to_tensors
from support.models import (
    EVERYTHING,
    OWN_OPTIMIZER,
    Expected,
    assert_close,
    fit,
    fit_other,
    make_model,
    other_model,
    trained_optimizer,
    weights,
)
from support.resume import state_of


def through_joblib(value):
    file = io.BytesIO()
    joblib.dump(value, file)
    file.seek(0)
    return joblib.load(file)


WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "joblib": through_joblib,
}
in_each_way = pytest.mark.parametrize("make_copy", WAYS.values(), ids=WAYS)

IS_COPY = f"is a copy, made by `copy.deepcopy`.*{OWN_OPTIMIZER}.*Received: "


@pytest.mark.short("deepcopy", "pickle")
@in_each_way
def test_copy_goes_on_with_the_same_variables(make_copy):
    model = make_model(keras_adam.Adam(**EVERYTHING))
    fit(model)
    copied = make_copy(model.optimizer)
    assert copied is not model.optimizer
    model.compile(copied, loss="mse")
    fit(model)
    assert_close(weights(model), Expected(EVERYTHING).fit().fit().weights)


@pytest.mark.parametrize(("way", "container"), [("deepcopy", dict), ("pickle", list)])
def test_model_and_optimizer_copied_together_go_on(way, container):
    model = make_model(keras_adam.Adam(**EVERYTHING))
    fit(model)
    expected = Expected(EVERYTHING).fit().fit().weights
    both = {0: model, 1: model.optimizer} if container is dict else [model, model.optimizer]
    copied = WAYS[way](both)
    fit(copied[0])
    assert_close(weights(copied[0]), expected)

    copied = WAYS[way](both)
    copied[0].compile(copied[1], loss="mse")
    fit(copied[0])
    assert_close(weights(copied[0]), expected)


@pytest.mark.short("deepcopy", "pickle")
@in_each_way
def test_copy_in_another_model_is_refused(make_copy):
    copied = make_copy(trained_optimizer())
    model = other_model(copied)
    before = weights(model)
    for _ in range(2):  # the first refusal must leave it a copy
        with pytest.raises(ValueError, match=IS_COPY):
            fit_other(model)
        assert not copied.built
        assert int(copied.iterations) == 4
    for got, want in zip(weights(model), before, strict=True):
        np.testing.assert_array_equal(got, want)


def misfits():
    """Return variables that are not those of `make_model`, and what the error says of them."""
    kernel, bias = make_model().trainable_variables
    wide = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="dense")], name="model")
    more = other_model("sgd").trainable_variables
    return {
        "other": (more, "momentum of 'model/dense/kernel', which is not one of them"),
        "fewer": ([kernel], "momentum of 'model/dense/bias', which is not one of them"),
        "more": ([kernel, bias, more[0]], "none of 'other/dense_0/kernel'"),
        "wide": (
            wide.trainable_variables,
            "momentum of 'model/dense/kernel' in shape (4, 2), but 'model/dense/kernel' has (4, 3)",
        ),
    }


@pytest.mark.parametrize("misfit", ["other", "fewer", "more", "wide"])
def test_error_tells_the_first_variable_that_is_another(misfit):
    variables, difference = misfits()[misfit]
    copied = copy.deepcopy(trained_optimizer())
    with pytest.raises(ValueError, match=f"{IS_COPY}.*{re.escape(difference)}$"):
        copied.build(variables)
    known = make_model().trainable_variables
    copied.build(known)  # it has kept what it holds
    assert int(copied.iterations) == 4
    assert np.any(state_of(copied)[2])


def test_configuration_of_a_copy_makes_one_for_another_model():
    copied = copy.deepcopy(trained_optimizer())
    model = make_model(keras_adam.Adam.from_config(copied.get_config()), name="other")
    fit(model)
    assert_close(weights(model), Expected({"learning_rate": 0.02}).fit().weights)


@pytest.mark.short("*-deepcopy")
@in_each_way
@pytest.mark.parametrize("built", [True, False], ids=["built", "unbuilt"])
def test_copy_of_one_that_was_not_used_serves_any_model(make_copy, built):
    optimizer = keras_adam.Adam(0.02, amsgrad=True)
    if built:
        optimizer.build(make_model().trainable_variables)
    model = make_model(make_copy(optimizer), name="other")
    fit(model)
    expected = Expected({"learning_rate": 0.02, "amsgrad": True})
    assert_close(weights(model), expected.fit().weights)


def test_names_tell_the_variables_of_a_copy_whatever_their_order():
    """The names may also be numbered by Keras."""
    variables = [keras.Variable(np.full(3, float(i), "float32")) for i in range(2)]
    optimizer = keras_adam.Adam(0.02)
    optimizer.apply(to_tensors([np.full(3, 1.0), np.full(3, 3.0)]), variables)
    copied = copy.deepcopy(optimizer)
    copied.build(variables[::-1])
    momenta = [float(keras.ops.convert_to_numpy(m)[0]) for m in copied._momentums]
    np.testing.assert_allclose(momenta, [0.3, 0.1], rtol=1e-6)


@pytest.mark.short("bfloat16")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copy_holds_all_that_the_original_does(dtype):
    """Scalar and empty variables, groups by variables, one that joined late, accumulators, averages."""
    rng = np.random.default_rng(31)
    gradients = [
        [rng.standard_normal(s).astype("float32") for s in SHAPES.values()] for _ in range(4)
    ]
    starts = [rng.standard_normal(s).astype("float32") for s in SHAPES.values()]
    variables = make_variables(starts, dtype)
    optimizer = keras_adam.Adam(
        0.02,
        amsgrad=True,
        use_ema=True,
        gradient_accumulation_steps=2,
        skip_nonfinite=True,
        param_groups=[{"params": [variables[1]], "beta_1": 0.5}],
    )
    optimizer.apply(to_tensors(gradients[0][:3], dtype), variables[:3])
    optimizer.param_groups[0]["beta_1"] = 0.75
    optimizer.add_param_group({"params": [variables[3]], "weight_decay": 0.1})
    optimizer.apply(to_tensors(gradients[1], dtype), variables)

    copied = copy.deepcopy(optimizer)
    copied.build(variables)
    assert copied.param_groups[0]["beta_1"] == 0.75
    theirs = {
        v.path: value for v, value in zip(optimizer.variables, state_of(optimizer), strict=True)
    }
    ours = {v.path: value for v, value in zip(copied.variables, state_of(copied), strict=True)}
    assert set(ours) == set(theirs)
    for path, value in theirs.items():
        np.testing.assert_array_equal(ours[path], value, err_msg=path)

    for arrays in gradients[2:]:
        values = [
            keras.ops.convert_to_numpy(keras.ops.cast(v, "float32")).copy() for v in variables
        ]
        outcomes = []
        for one in (optimizer, copied):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
            one.apply(to_tensors(arrays, dtype), variables)
            outcomes.append(
                [keras.ops.convert_to_numpy(keras.ops.cast(v, "float32")).copy() for v in variables]
            )
        for got, want in zip(*outcomes, strict=True):
            np.testing.assert_array_equal(got, want)


def test_two_variables_of_one_path_keep_their_state():
    variables = [keras.Variable(np.zeros(n, "float32"), name="weight") for n in (2, 3)]
    optimizer = keras_adam.Adam(0.02)
    optimizer.apply(to_tensors([np.ones(2), np.ones(3)]), variables)
    copied = copy.deepcopy(optimizer)
    copied.build(variables)
    for got, want in zip(state_of(copied), state_of(optimizer), strict=True):
        np.testing.assert_array_equal(got, want)


def test_copy_after_a_layer_was_frozen_goes_on_with_the_rest():
    model = other_model(keras_adam.Adam(0.02), units=(3, 2))
    fit(model)
    model.layers[0].trainable = False
    copied = copy.deepcopy(model.optimizer)
    copied.build(model.trainable_variables)
    assert int(copied.iterations) == 4
    of_all = dict(
        zip([v.path for v in model.optimizer.variables], state_of(model.optimizer), strict=True)
    )
    for variable, value in zip(copied.variables, state_of(copied), strict=True):
        np.testing.assert_array_equal(value, of_all[variable.path])


def test_copy_of_a_copy_that_waits_is_a_copy():
    copied = copy.deepcopy(pickle.loads(pickle.dumps(trained_optimizer())))
    with pytest.raises(ValueError, match=IS_COPY):
        copied.build(other_model("sgd").trainable_variables)
    model = make_model(copied)
    copied.build(model.trainable_variables)
    assert int(copied.iterations) == 4


def test_copy_within_a_loss_scale_optimizer():
    model = make_model(keras.optimizers.LossScaleOptimizer(keras_adam.Adam(0.02)))
    fit(model)
    with pytest.warns(
        UserWarning, match="variables whereas the saved optimizer"
    ):  # of the outer one
        copied = copy.deepcopy(model.optimizer)
    with pytest.raises(ValueError, match=IS_COPY):
        copied.build(other_model("sgd").trainable_variables)
    copied.inner_optimizer.build(model.trainable_variables)
    assert int(copied.inner_optimizer.iterations) == 4


def test_file_that_is_loaded_into_a_copy_takes_the_place_of_its_state(tmp_path):
    """A file's state is matched by order where a rebuilt model has other names."""
    source = make_model(keras_adam.Adam(0.02))
    fit(source)
    source.save_weights(tmp_path / "file.weights.h5")
    model = make_model(copy.deepcopy(trained_optimizer()), name="other")
    model.load_weights(tmp_path / "file.weights.h5")
    fit(model)
    assert_close(weights(model), Expected({"learning_rate": 0.02}).fit().fit().weights)


def test_state_of_keras_adam_that_waits_is_copied(tmp_path):
    """Keras's state has no paths."""
    theirs = make_model(keras.optimizers.Adam(0.02))
    fit(theirs)
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    model = make_model(keras_adam.Adam(0.02))
    model.load_weights(tmp_path / "theirs.weights.h5")
    model.compile(copy.deepcopy(model.optimizer), loss="mse")
    fit(model)
    assert_close(weights(model), Expected({"learning_rate": 0.02}).fit().fit().weights)
