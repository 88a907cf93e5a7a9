"""`skip_spikes`: which steps are skipped, that they change nothing, and what is saved of it."""

import copy

import keras
import numpy as np
import pytest

import keras_adam
from support import helpers
from support.steps import compiled_step

WINDOW, FEWEST = 128, 64


class Guard:
    """What is skipped, told again in NumPy: the norms of the last 128 steps, None for one that was skipped."""

    def __init__(self, deviations):
        self.deviations, self.window = deviations, []

    def takes(self, arrays):
        norm = np.sqrt(sum(np.sum(np.float64(a) ** 2) for a in arrays))
        known = [x for x in self.window[-WINDOW:] if x]
        taken = bool(np.isfinite(norm))
        if taken and len(known) >= FEWEST:
            limit = np.mean(known) + self.deviations * np.std(known, ddof=1)
            taken = norm <= max(limit, 3 * max(known))
        self.window.append(norm if taken else None)
        return taken


def gradients(rng, steps, spikes=()):
    made = []
    for i in range(steps):
        size = 100.0 if i in spikes else 1.0 + 0.3 * rng.random()
        arrays = [rng.standard_normal(shape) for shape in ((4, 3), (7,))]
        made.append([np.asarray(size * a, "float32") for a in arrays])
    return made


def variables():
    return helpers.make_variables([np.ones((4, 3), "float32"), np.ones(7, "float32")])


def run(optimizer, chosen, steps, is_compiled=False):
    """Take the steps and return which of them were skipped."""
    optimizer.build(chosen)
    step = compiled_step(optimizer, chosen) if is_compiled else None
    skipped = []
    for i, arrays in enumerate(steps):
        before = int(optimizer.skipped_steps.numpy())
        tensors = helpers.to_tensors(arrays)
        step(*tensors) if step else optimizer.apply(tensors, chosen)
        skipped += [i] * (int(optimizer.skipped_steps.numpy()) - before)
    return skipped


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("options", [{}, {"global_clipnorm": 0.5}, {"loss_scale_factor": 8.0}])
def test_what_is_skipped(options, is_compiled, rng):
    """Spikes before the window has 64 norms, spikes one by one, a row of them that outlasts it, NaN and infinity."""
    spikes = {20, 70, 90, 91, *range(150, 260)}
    steps = gradients(rng, 280, spikes)
    steps[20] = [0.1 * a for a in steps[20]]  # is taken, and stays in the window
    steps[10][0][0, 0] = np.nan
    steps[140][1][3] = np.inf
    guard = Guard(6.0)
    want = [i for i, arrays in enumerate(steps) if not guard.takes(arrays)]
    scale = options.get("loss_scale_factor", 1.0)
    scaled = [[np.float32(scale) * a for a in arrays] for arrays in steps]
    optimizer = keras_adam.Adam(1e-3, skip_spikes=6.0, **options)
    assert run(optimizer, variables(), scaled, is_compiled) == want
    assert {10, 70, 90, 91, 140, 150} <= {*want}
    assert 20 not in want
    assert max(want) < 259  # a norm that stays high is taken at last


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 3, "use_ema": True}, {"amsgrad": True, "monitor": 1}],
    ids=["plain", "accumulation", "monitored"],
)
def test_skipped_steps_change_nothing(options, rng):
    """A run with spikes strewn in is, to the bit, the run without them; but for the window, which they pass through."""
    steps = gradients(rng, 99)

    def train(strewn):
        chosen = variables()
        optimizer = keras_adam.Adam(0.01, skip_spikes=6.0, **options)
        given = []
        for i, arrays in enumerate(steps):
            given += [[100 * a for a in arrays]] if strewn and i >= 70 and i % 5 == 0 else []
            given.append(arrays)
        skipped = run(optimizer, chosen, given)
        return chosen, optimizer, skipped

    (got, optimizer, skipped), (want, undisturbed, none) = train(True), train(False)
    assert len(skipped) == 6
    assert not none
    assert int(optimizer._iterations.numpy()) == len(steps)
    own = ("skipped_steps", "recent_norms", "monitor")
    for a, b in zip((*got, *optimizer.variables), (*want, *undisturbed.variables), strict=True):
        if not any(name in a.path for name in own):
            np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (a, b)), a.path)


def test_twenty_of_twenty_spikes(rng):
    spikes = {*range(100, 300, 10)}
    optimizer = keras_adam.Adam(1e-3, skip_spikes=6.0)
    assert run(optimizer, variables(), gradients(rng, 300, spikes)) == sorted(spikes)


def test_what_is_less_than_three_times_the_largest_is_no_spike():
    """Norms that are all alike, whose deviation is zero, and the last, smaller batch of an epoch."""
    sizes = [1.0] * 80 + [2.9] + [1.0] * 90 + [4.0]
    steps = [[np.full((4, 3), x, "float32"), np.zeros(7, "float32")] for x in sizes]
    assert run(keras_adam.Adam(skip_spikes=6.0), variables(), steps) == []
    steps[-1][0] *= 3
    assert run(keras_adam.Adam(skip_spikes=6.0), variables(), steps) == [len(steps) - 1]


def test_window_is_saved_and_copied(tmp_path, rng):
    """A run that is saved, loaded and copied in the middle skips what the one in one go does."""
    steps = gradients(rng, 140, {75, 100, 130})
    whole = keras_adam.Adam(1e-3, skip_spikes=6.0)
    want = run(whole, variables(), steps)
    assert want == [75, 100, 130]
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile(keras_adam.Adam(1e-3, skip_spikes=6.0), loss="mse")
    trained = model.trainable_variables
    of_model = [[a[0], a[1][:3]] for a in steps]
    first = run(model.optimizer, trained, of_model[:90])
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    for optimizer, chosen in (
        (loaded.optimizer, loaded.trainable_variables),
        (copy.deepcopy(model.optimizer), trained),
    ):
        rest = run(optimizer, chosen, of_model[90:])
        assert [*first, *(90 + i for i in rest)] == want


@pytest.mark.parametrize("saved", [None, 6.0])
def test_files_with_and_without_a_window_load(saved, tmp_path):
    def compiled(deviations):
        layers = [keras.Input((4,)), keras.layers.Dense(3, name="d")]
        model = keras.Sequential(layers, name="m")
        model.compile(keras_adam.Adam(skip_nonfinite=True, skip_spikes=deviations), loss="mse")
        model.optimizer.build(model.trainable_variables)
        return model

    source = compiled(saved)
    arrays = helpers.to_tensors([np.ones((4, 3)), np.ones(3)])
    source.optimizer.apply(arrays, source.trainable_variables)
    source.save_weights(tmp_path / "m.weights.h5")
    target = compiled(None if saved else 6.0)
    target.load_weights(tmp_path / "m.weights.h5")
    assert int(target.optimizer.iterations.numpy()) == 1
    np.testing.assert_array_equal(
        *(keras.ops.convert_to_numpy(m.optimizer._momentums[0]) for m in (source, target))
    )
    if not saved:
        assert not keras.ops.convert_to_numpy(target.optimizer._recent_norms).any()


def test_set_late(rng):
    optimizer, chosen = keras_adam.Adam(1e-3), variables()
    steps = gradients(rng, 180, {150})
    optimizer.build(chosen)
    assert optimizer.skipped_steps is None
    optimizer.apply(helpers.to_tensors(steps[0]), chosen)
    optimizer.skip_spikes = 6.0
    assert run(optimizer, chosen, steps) == [150]
    optimizer.skip_spikes = None
    assert not run(optimizer, chosen, steps)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "six", True])
def test_errors(value):
    with pytest.raises((ValueError, TypeError), match=r"`skip_spikes`.*Received"):
        keras_adam.Adam(skip_spikes=value)


def test_config():
    config = keras_adam.Adam(skip_spikes=6.0).get_config()
    assert keras_adam.Adam.from_config(config).skip_spikes == 6.0
    assert "skip_spikes" not in keras_adam.Adam().get_config()
    assert "skip_spikes=6.0" in repr(keras_adam.Adam(skip_spikes=6.0))
