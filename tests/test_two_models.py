"""One optimizer in two models is refused; the first advice is to make another optimizer."""

import keras
import numpy as np
import pytest
from keras.wrappers import SKLearnClassifier
from sklearn.base import clone

import keras_adam
from support.models import (
    OWN_OPTIMIZER,
    X,
    fit,
    fit_other,
    make_model,
    other_model,
    trained_optimizer,
)


@pytest.mark.parametrize("units", [(2,), (3,), (2, 2), (4, 2)], ids=str)
def test_one_optimizer_in_two_models_is_refused(units):
    """The advice to make another one comes before that on unfrozen layers."""
    optimizer = trained_optimizer()
    model = other_model(optimizer, units)
    with pytest.raises(ValueError, match=OWN_OPTIMIZER) as raised:
        fit_other(model)
    assert "add_param_group" not in str(raised.value).partition("If this is another model")[0]


def test_model_that_follows_a_frozen_one_is_refused():
    first = make_model(keras_adam.Adam(0.02))
    fit(first)
    first.trainable = False
    with pytest.raises(ValueError, match=OWN_OPTIMIZER):
        fit(make_model(first.optimizer, name="second"))


def test_clone_of_scikit_learn_shares_an_optimizer_that_is_an_argument():
    def build(X, y, optimizer):  # noqa: N803 - as scikit-learn names them
        layers = [keras.Input((X.shape[1],)), keras.layers.Dense(y.shape[1], "softmax")]
        model = keras.Sequential(layers)
        model.compile(optimizer, loss="categorical_crossentropy")
        return model

    classes = np.arange(len(X)) % 2
    arguments = {"optimizer": keras_adam.Adam(0.02)}
    classifier = SKLearnClassifier(build, model_kwargs=arguments, fit_kwargs={"verbose": 0})
    classifier.fit(X, classes)
    cloned = clone(classifier)
    with pytest.raises(ValueError, match=OWN_OPTIMIZER):
        cloned.fit(X, classes, verbose=0)
    fresh = keras_adam.Adam.from_config(arguments["optimizer"].get_config())
    cloned.set_params(model_kwargs={"optimizer": fresh}).fit(X, classes, verbose=0)
    assert int(fresh.iterations) == 1
