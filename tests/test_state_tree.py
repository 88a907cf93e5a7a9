"""`check_state_tree` refuses what `model.set_state_tree` would silently pass over, before anything is set."""

import keras
import numpy as np
import pytest

import keras_adam
from support.models import EVERYTHING, Expected, assert_close, fit, make_model, weights


def trained_tree(value_format="backend_tensor", **options):
    model = make_model(keras_adam.Adam(**{"name": "adam", "learning_rate": 0.02} | options))
    fit(model)
    return model.get_state_tree(value_format)


def built_model(**options):
    model = make_model(keras_adam.Adam(**{"name": "adam", "learning_rate": 0.02} | options))
    model.optimizer.build(model.trainable_variables)
    return model


def state_of(model):
    return [
        np.array(keras.ops.convert_to_numpy(v)) for v in model.weights + model.optimizer.variables
    ]


@pytest.mark.parametrize("value_format", ["backend_tensor", "numpy_array"])
def test_a_tree_that_fits_lets_training_go_on(value_format):
    tree = trained_tree(value_format, **EVERYTHING)
    model = built_model(**EVERYTHING)
    keras_adam.check_state_tree(model, tree)
    model.set_state_tree(tree)
    fit(model)
    assert_close(weights(model), Expected(EVERYTHING).fit().fit().weights)


# Options of the model, and what does not fit it in the tree of a plain Adam named "adam".
OTHERS = {
    "name": ({"name": "other"}, "without 'other/iteration', but with 'adam/iteration'"),
    "amsgrad": ({"amsgrad": True}, "without 'adam/model_dense_kernel_velocity_hat'$"),
    "average": ({"use_ema": True}, "without 'adam/model_dense_kernel_average'$"),
    "groups": ({"param_groups": []}, "without 'adam/hyperparameters_0'$"),
    "schedule": (
        {"learning_rate": keras.optimizers.schedules.CosineDecay(0.01, 10)},
        "with 'adam/learning_rate', which the model does not have$",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_name_or_other_options_are_refused(other):
    options, difference = OTHERS[other]
    tree = trained_tree()
    model = built_model(**options)
    before = state_of(model)
    rule = "`state_tree` must hold a value for each path of the model's 'optimizer_variables'"
    way_out = r"Adam\(name='adam'\).*"
    with pytest.raises(ValueError, match=f"{rule}.*{way_out}Received: a tree {difference}"):
        keras_adam.check_state_tree(model, tree)
    for got, want in zip(state_of(model), before, strict=True):
        np.testing.assert_array_equal(got, want)


def test_an_option_that_the_model_lacks_is_refused():
    tree = trained_tree(amsgrad=True)
    with pytest.raises(ValueError, match="a tree with 'adam/model_dense_kernel_velocity_hat'"):
        keras_adam.check_state_tree(built_model(), tree)


def test_an_optimizer_that_is_not_built_or_not_there_is_refused():
    tree = trained_tree()
    model = make_model(keras_adam.Adam(0.02, name="adam"))
    with pytest.raises(ValueError, match=r"optimizer\.build\(model\.trainable_variables\)"):
        keras_adam.check_state_tree(model, tree)
    with pytest.raises(ValueError, match="Compile the model"):
        keras_adam.check_state_tree(make_model(), tree)


@pytest.mark.parametrize("collection", ["trainable_variables", "non_trainable_variables"])
def test_weights_that_do_not_fit_are_refused(collection):
    tree = trained_tree()
    tree[collection]["another"] = {"kernel": np.zeros(2)}
    rule = f"a value for each path of the model's '{collection}'"
    with pytest.raises(ValueError, match=f"{rule}.*with 'another/kernel'"):
        keras_adam.check_state_tree(built_model(), tree)


@pytest.mark.parametrize(
    ("path", "shape"),
    [("trainable_variables/model/dense/bias", (3,)), ("optimizer_variables/adam/iteration", (1,))],
)
def test_a_value_of_another_shape_is_refused(path, shape):
    tree = trained_tree()
    collection, *names, last = path.split("/")
    inner = tree[collection]
    for name in names:
        inner = inner[name]
    inner[last] = np.zeros(shape)
    of_path = "/".join([*names, last])
    with pytest.raises(
        ValueError, match=rf"'{of_path}' is \(.*Received: a value of shape \({shape[0]},\)"
    ):
        keras_adam.check_state_tree(built_model(), tree)


def test_numbers_serve_as_values_and_metrics_are_not_looked_at():
    """A new model has no metrics yet; Orbax may give numbers for scalars."""
    tree = trained_tree()
    tree["optimizer_variables"]["adam"]["iteration"] = 4
    tree["metrics_variables"] = {"another": np.zeros(3)}
    keras_adam.check_state_tree(built_model(), tree)


def test_weights_alone_are_looked_at_alone():
    tree = trained_tree()
    del tree["optimizer_variables"]
    keras_adam.check_state_tree(built_model(name="other"), tree)


def test_what_is_no_dictionary_is_refused():
    with pytest.raises(TypeError, match=r"`state_tree` must be a dictionary.*of type list"):
        keras_adam.check_state_tree(built_model(), [])
    with pytest.raises(TypeError, match=r"`state_tree\['optimizer_variables'\]` must be a dict"):
        keras_adam.check_state_tree(built_model(), {"optimizer_variables": [1]})


def test_another_optimizer_and_its_loss_scale_are_looked_at_too():
    def make(inner):
        model = make_model(keras.optimizers.LossScaleOptimizer(inner, name="scaled"))
        model.optimizer.build(model.trainable_variables)
        return model

    tree = make(keras.optimizers.Adam(name="adam")).get_state_tree()
    keras_adam.check_state_tree(make(keras_adam.Adam(name="adam")), tree)
    with pytest.raises(ValueError, match="without 'other/iteration'"):
        keras_adam.check_state_tree(make(keras_adam.Adam(name="other")), tree)
