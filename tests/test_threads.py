"""Two threads, each with its own model and optimizer; and one optimizer that is given two models."""

import threading

import numpy as np
import pytest

import keras_adam
from support.models import EVERYTHING, X, Y, fit, gradients, make_model, weights
from support.steps import BACKEND, values_of

OPTIONS = [
    {**EVERYTHING, "param_groups": [{"params": ".*bias", "weight_decay": 0.0}]},
    {"learning_rate": 0.01, "amsgrad": "corrected", "skip_nonfinite": True},
]
EPOCHS = 20


def train_with_fit(model):
    fit(model, epochs=EPOCHS)


def train_with_apply(model):
    for _ in range(EPOCHS):
        model.optimizer.apply(gradients(model, X, Y), model.trainable_variables)


def outcome(model):
    return [*weights(model), *values_of(model.optimizer.variables)]


def make():
    return [
        make_model(keras_adam.Adam(**options), name=f"model_{i}")
        for i, options in enumerate(OPTIONS)
    ]


@pytest.mark.parametrize("train", [train_with_fit, train_with_apply])
def test_two_threads_end_where_one_after_the_other_ends(train):
    expected = []
    for model in make():
        train(model)
        expected.append(outcome(model))
    models, errors = make(), []
    together = threading.Barrier(2)

    def work(model):
        try:
            together.wait()
            train(model)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    for model, wanted in zip(models, expected, strict=True):
        for got, want in zip(outcome(model), wanted, strict=True):
            np.testing.assert_array_equal(got, want)


def test_second_model_is_refused_by_an_optimizer_in_use():
    optimizer = keras_adam.Adam(0.01)
    first = make_model(optimizer)
    fit(first)
    before = weights(first) if BACKEND == "jax" else outcome(first)
    second = make_model(optimizer, name="second")
    with pytest.raises(ValueError, match="Unknown variable: 'second/dense/kernel'"):
        fit(second)
    # On JAX only the end of `fit` can tell: the state has been trained on meanwhile.
    after = weights(first) if BACKEND == "jax" else outcome(first)
    for got, want in zip(after, before, strict=True):
        np.testing.assert_array_equal(got, want)


def test_second_model_that_is_given_as_a_group_trains_beside_the_first():
    def train(optimizers):
        models = [make_model(name=f"model_{i}") for i in range(2)]
        for model, optimizer in zip(models, optimizers, strict=True):
            if optimizer.built:
                optimizer.add_param_group({"params": model})
        both = [v for model in models for v in model.trainable_variables]
        for _ in range(4):
            found = [gradients(model, X, Y) for model in models]
            if optimizers[0] is optimizers[1]:
                optimizers[0].apply([*found[0], *found[1]], both)
            else:
                for model, optimizer, grads in zip(models, optimizers, found, strict=True):
                    optimizer.apply(grads, model.trainable_variables)
        return [weights(model) for model in models]

    shared = keras_adam.Adam(0.01)
    wanted = train([keras_adam.Adam(0.01), keras_adam.Adam(0.01)])
    for got, want in zip(train([shared, shared]), wanted, strict=True):
        for array, expected in zip(got, want, strict=True):
            np.testing.assert_array_equal(array, expected)
