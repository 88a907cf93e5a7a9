"""State files that are damaged, edited, foreign or old are loaded right, or a clear error changes nothing."""

import json
import pathlib
import shutil
import warnings
import zipfile

import h5py
import keras
import numpy as np
import pytest
import torch

import keras_adam
from support.models import EVERYTHING, Expected, assert_close, fit, make_model, weights
from support.resume import load_state, replace, save_state, state_of
from support.steps import BACKEND, KERAS, slots

OLD = pathlib.Path(__file__).parent / "files"
ARRAYS = "optimizer/vars"
LAST = 7  # the last array of `trained`


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a folder with a trained model, as `.keras` and as `.weights.h5`, and that model."""
    folder = tmp_path_factory.mktemp("trained")
    model = make_model(keras_adam.Adam(0.02, amsgrad=True))
    fit(model)
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    return folder, state_of(model.optimizer)


@pytest.fixture(scope="module")
def other_model():
    """Return a model whose optimizer has other state, to see that this does not change."""
    model = make_model(keras_adam.Adam(0.01, amsgrad=True))
    fit(model, epochs=2)
    return model


@pytest.fixture
def target(other_model):
    before = state_of(other_model.optimizer)
    yield other_model
    other_model.optimizer.set_weights(before)


@pytest.fixture
def edited(trained, tmp_path):
    """Write a copy of the weights file in which `edit` has changed the optimizer's arrays."""

    def write(edit):
        path = shutil.copy(trained[0] / "model.weights.h5", tmp_path / "edited.weights.h5")
        with h5py.File(path, "r+") as file:
            edit(file[ARRAYS])
        return path

    return write


def nameless(arrays):
    """Remove the attributes, which Keras's Adam does not write."""
    for array in arrays.values():
        for name in list(array.attrs):
            del array.attrs[name]


def assert_equal(actual, desired):
    for got, want in zip(actual, desired, strict=True):
        np.testing.assert_array_equal(got, want)


def assert_refused(model, path, message, error=(ValueError, OSError)):
    before = state_of(model.optimizer)
    with pytest.raises(error, match=message):
        model.load_weights(path)
    assert_equal(state_of(model.optimizer), before)


# What is told of each array


def test_each_array_tells_what_it_is(trained):
    with h5py.File(trained[0] / "model.weights.h5") as file:
        told = [dict(array.attrs) for array in file[ARRAYS].values()]
    roles = ["iteration", "learning_rate", *["momentum", "velocity"] * 2, *["velocity_hat"] * 2]
    assert [t["role"] for t in told] == roles
    kernel, bias = "model/dense/kernel", "model/dense/bias"
    assert [t["path"] for t in told] == ["", "", kernel, kernel, bias, bias, kernel, bias]
    whole = "int64" if BACKEND == "tensorflow" else "int32"
    assert [t["state_dtype"] for t in told] == [whole] + ["float32"] * LAST


# Keras 3.10 reads back 3 of 8 arrays of its own Adam; ours refuses them.
several = pytest.mark.skipif(KERAS < (3, 12), reason="Keras loses arrays of an optimizer in shards")


@pytest.mark.parametrize(
    "size",
    [pytest.param(1, id="one file"), pytest.param(40 / 1024**3, id="several files", marks=several)],
)
def test_shards(size, trained, target, tmp_path):
    """Keras may spread the arrays over several files."""
    model = keras.saving.load_model(trained[0] / "model.keras")
    model.save_weights(tmp_path / "model.weights.json", max_shard_size=size)
    assert (len(list(tmp_path.glob("*.h5"))) > 2) is (size < 1)
    target.load_weights(tmp_path / "model.weights.json")
    assert_equal(state_of(target.optimizer), trained[1])
    for path in tmp_path.glob("*.h5"):
        with h5py.File(path, "r+") as file:
            for key in set(file.get(ARRAYS, ())) & {"5"}:
                file[ARRAYS][key][0] += 1.0
    assert_refused(target, tmp_path / "model.weights.json", "velocity of '.*bias'.* is damaged")


# Damage


def test_cut_off_weights(trained, target, tmp_path):
    whole = (trained[0] / "model.weights.h5").read_bytes()
    path = tmp_path / "cut.weights.h5"
    for size in [0, 1, 7, 8, 100, 1000, *range(2000, len(whole), 3001), len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert_refused(target, path, "file", OSError)


def test_cut_off_archive(trained, tmp_path):
    whole = (trained[0] / "model.keras").read_bytes()
    path = tmp_path / "cut.keras"
    for size in [0, 1, 100, *range(2000, len(whole), 3001), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises((ValueError, OSError), match="file"):
            keras.saving.load_model(path)


@pytest.mark.filterwarnings("ignore:No state of optimizer")
def test_one_changed_byte_of_the_weights(trained, target, tmp_path):
    """The saved state is loaded, or nothing."""
    whole = (trained[0] / "model.weights.h5").read_bytes()
    before = state_of(target.optimizer)
    path = tmp_path / "changed.weights.h5"
    with h5py.File(trained[0] / "model.weights.h5") as file:
        datasets = [(a.id.get_offset(), a.nbytes) for a in file[ARRAYS].values()]
    in_data = [at for start, size in datasets for at in (start, start + size - 1)]
    in_metadata = range(0, len(whole), 211)
    outcomes = set()
    for at in [*in_data, *in_metadata]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :])
        try:
            target.load_weights(path)
        except Exception as error:
            outcomes.add("refused" if str(error) else "refused without a word")
        else:
            assert at not in in_data
            outcomes.add("loaded")
        now = state_of(target.optimizer)
        if any((a != b).any() for a, b in zip(now, before, strict=True)):
            assert at not in in_data
            assert_equal(now, trained[1])  # only the model's own arrays were refused
            target.optimizer.set_weights(before)
    assert outcomes == {"refused", "loaded"}


def test_one_changed_byte_of_the_archive(trained, tmp_path):
    whole = (trained[0] / "model.keras").read_bytes()
    with h5py.File(trained[0] / "model.weights.h5") as file:
        moments = np.concatenate([a[()].ravel() for a in file[ARRAYS].values() if a.shape])
    path = tmp_path / "changed.keras"
    places = [whole.index(moments[i].tobytes()) for i in range(0, len(moments), 5)]
    for at in places:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :])
        # Of the archive, or of the array: Keras reads on where the archive's checksum does not hold.
        with pytest.raises((ValueError, zipfile.BadZipFile), match=r"Bad CRC|is damaged"):
            keras.saving.load_model(path)


@pytest.mark.parametrize("name", ["role", "path", "state_dtype"])
def test_changed_description(name, edited, target):
    path = edited(lambda arrays: arrays["3"].attrs.modify(name, "changed"))
    assert_refused(target, path, r"array '3'\) is damaged")


# Foreign files


def png():
    return b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4


@pytest.mark.parametrize("kind", ["empty", "PNG", "text", "npz", "pt"])
@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_file_of_another_kind(kind, suffix, trained, target, tmp_path):
    path = tmp_path / f"foreign{suffix}"
    with open(path, "wb") as file:
        if kind == "npz":
            np.savez(file, *trained[1])
        elif kind == "pt":
            torch.save(torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict(), file)
        else:
            file.write({"empty": b"", "PNG": png(), "text": b"state: none\n" * 100}[kind])
    if suffix == ".keras":
        with pytest.raises((ValueError, OSError, KeyError)):
            keras.saving.load_model(path)
    else:
        assert_refused(target, path, "unable|Unable", OSError)


OTHERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "Lion": lambda: keras.optimizers.Lion(0.1),
    "Adamax": lambda: keras.optimizers.Adamax(0.1),
    "Lamb": lambda: keras.optimizers.Lamb(0.1),
    "RMSprop": lambda: keras.optimizers.RMSprop(0.1, momentum=0.9),
    "Nadam": lambda: keras.optimizers.Nadam(0.1),
}


@pytest.mark.short("SGD", "Nadam")
@pytest.mark.parametrize("name", OTHERS)
def test_state_of_another_optimizer(name, tmp_path):
    """Adamax, Lamb and RMSprop have as many arrays of the same shapes."""
    model = make_model(OTHERS[name]())
    fit(model)
    model.save_weights(tmp_path / "other.weights.h5")
    ours = make_model(keras_adam.Adam())
    fit(ours)
    assert_refused(ours, tmp_path / "other.weights.h5", "another kind of optimizer")


def test_model_without_an_optimizer(target, tmp_path):
    """Pretrained weights are published so: there is no state to load, and nothing is mistaken for it."""
    before = state_of(target.optimizer)
    make_model().save_weights(tmp_path / "pretrained.weights.h5")
    with pytest.warns(UserWarning, match="No state of optimizer '.*' was saved there"):
        target.load_weights(tmp_path / "pretrained.weights.h5")
    assert_equal(state_of(target.optimizer), before)


@pytest.mark.parametrize("make", [keras_adam.Adam, keras.optimizers.Adam], ids=["ours", "keras"])
@pytest.mark.parametrize("schedule", [False, True], ids=["number", "schedule"])
def test_model_that_was_never_trained(make, schedule, tmp_path):
    """Its optimizer has no moments yet; nor has one that loads it."""

    def rate():
        return keras.optimizers.schedules.ExponentialDecay(0.02, 4, 0.5) if schedule else 0.02

    make_model(make(rate())).save_weights(tmp_path / "fresh.weights.h5")
    model = make_model(
        keras_adam.Adam(rate() if schedule else 0.5, skip_nonfinite=True, use_ema=True)
    )
    fit(model)
    model.load_weights(tmp_path / "fresh.weights.h5")
    assert int(model.optimizer.iterations) == 0
    assert [float(np.sum(a)) for a in state_of(model.optimizer)[1:] if a.any()] == (
        [] if schedule else [pytest.approx(0.02)]
    )
    make_model(keras_adam.Adam()).save(tmp_path / "fresh.keras")
    assert int(keras.saving.load_model(tmp_path / "fresh.keras").optimizer.iterations) == 0


def test_count_without_moments(edited, target):
    def edit(arrays):
        for i in range(2, LAST + 1):
            del arrays[str(i)]

    assert_refused(target, edited(edit), "8 state variables, but the saved state has 2")


# Arrays that were edited


def another_role(arrays):
    replace(arrays, "3", arrays["3"][()], role="momentum")


def without_names_and_one_more(arrays):
    nameless(arrays)
    arrays["8"] = np.zeros(2, "f4")


def put_anew(arrays):
    del arrays["1"]
    arrays["1"] = np.float32(0.5)


BEYOND = np.float64(2**63) if BACKEND == "tensorflow" else np.float32(2**31)  # the next is less
EDITS = {
    "missing at the end": (
        lambda arrays: arrays.__delitem__("7"),
        "lacks velocity_hat of '.*bias'",
    ),
    "missing in between": (lambda arrays: arrays.__delitem__("3"), "none named '3'"),
    "extra": (lambda arrays: arrays.__setitem__("8", np.zeros(2, "f4")), "array '8' does not tell"),
    "extra among nameless ones": (without_names_and_one_more, "8 .* 9 arrays"),
    "nameless": (put_anew, "array '1' does not tell what it is"),
    "not a number": (lambda arrays: arrays.move("4", "x"), "none named '4'"),
    "role": (another_role, "lacks velocity of|has 8 state variables|where it has"),
    "shape": (lambda arrays: replace(arrays, "2", np.zeros((2, 4), "f4")), r"\(4, 2\).*\(2, 4\)"),
    "rank": (lambda arrays: replace(arrays, "0", [4]), r"shape \(\).* shape \(1,\)"),
    "no element": (lambda arrays: replace(arrays, "2", np.zeros((0,), "f4")), r"shape \(0,\)"),
    "int": (lambda arrays: replace(arrays, "2", np.ones((4, 2), int)), "momentum .*dtype int64"),
    "bool": (lambda arrays: replace(arrays, "5", np.ones(2, bool)), "velocity .*dtype bool"),
    "complex": (lambda arrays: replace(arrays, "5", np.ones(2, "c8")), "dtype complex64"),
    "text": (lambda arrays: replace(arrays, "1", "0.02"), "learning_rate .*dtype object"),
    "int learning rate": (lambda arrays: replace(arrays, "1", 1), "learning_rate .*dtype int64"),
    "minus one": (lambda arrays: replace(arrays, "0", -1), "iteration must be .* Received: -1"),
    "half": (lambda arrays: replace(arrays, "0", 2.5), "iteration must be .* Received: 2.5"),
    "NaN": (lambda arrays: replace(arrays, "0", np.nan), "iteration must be .* Received: nan"),
    "infinity": (lambda arrays: replace(arrays, "0", np.inf), "iteration must be .*: inf"),
    "beyond int64": (lambda arrays: replace(arrays, "0", np.uint64(2**63)), "iteration must be"),
    "beyond its dtype": (lambda arrays: replace(arrays, "0", BEYOND), "iteration must be"),
    "yes": (lambda arrays: replace(arrays, "0", True), "iteration must be .* Received: True"),
}


@pytest.mark.short("built-*")
@pytest.mark.parametrize("case", EDITS)
@pytest.mark.parametrize("built", [True, False], ids=["built", "unbuilt"])
def test_edited(case, built, edited, target):
    edit, message = EDITS[case]
    path = edited(edit)
    if built:
        assert_refused(target, path, message)
        return
    model = make_model(keras_adam.Adam(amsgrad=True))
    before = state_of(model.optimizer)

    def load_and_build():
        model.load_weights(path)
        model.optimizer.build(model.trainable_variables)

    with pytest.raises(ValueError, match=message):
        load_and_build()
    assert_equal(state_of(model.optimizer)[:2], before)
    fit(model)
    assert int(model.optimizer.iterations) == 4


def test_iteration_beyond_int32(edited, target):
    path = edited(lambda arrays: replace(arrays, "0", 2**40))
    if BACKEND == "tensorflow":
        target.load_weights(path)
        assert int(target.optimizer.iterations) == 2**40
    else:
        assert_refused(target, path, "from 0 to 2147483647. Received: 1099511627776")


@pytest.mark.parametrize("dtype", ["float64", "float16", ">f4"])
def test_floats_of_another_width(dtype, edited, target, trained):
    path = edited(lambda arrays: replace(arrays, "2", arrays["2"][()].astype(dtype)))
    target.load_weights(path)
    momentum = state_of(target.optimizer)[2]
    np.testing.assert_array_equal(momentum, trained[1][2].astype(dtype).astype("float32"))


def test_count_as_float(edited, target):
    target.load_weights(edited(lambda arrays: replace(arrays, "0", 4.0)))
    assert int(target.optimizer.iterations) == 4


def test_swapped_arrays(edited, target, trained):
    """Names decide which array is which, not the order."""

    def swap(arrays):
        for one, other in (("2", "x"), ("5", "2"), ("x", "5")):
            arrays.move(one, other)

    target.load_weights(edited(swap))
    assert_equal(state_of(target.optimizer), trained[1])


def test_swapped_values(edited, target):
    def swap(arrays):
        arrays["2"][...], arrays["3"][...] = arrays["3"][()], arrays["2"][()]

    assert_refused(target, edited(swap), "momentum of '.*kernel'.* is damaged")


def two_variables(*names):
    return [keras.Variable(np.ones(3, "float32"), name=name) for name in names]


def after_a_step(variables):
    optimizer = keras_adam.Adam()
    gradients = [keras.ops.full((3,), 1.0 + i) for i in range(len(variables))]
    optimizer.apply(gradients, variables)
    return optimizer


def test_two_variables_of_one_path(tmp_path):
    """Only their order tells them apart; another order is refused."""
    source = after_a_step(two_variables("a", "a"))
    path = save_state(tmp_path / "state.h5", source)
    target = keras_adam.Adam()
    target.build(two_variables("a", "a"))
    load_state(path, target)
    assert_equal(state_of(target), state_of(source))

    path = save_state(tmp_path / "other.h5", after_a_step(two_variables("a", "b")))
    with h5py.File(path, "r+") as file:
        replace(file[ARRAYS], "4", file[ARRAYS]["4"][()], path="a")
    for names in (("a", "b"), ("b", "a")):
        target = keras_adam.Adam()
        target.build(two_variables(*names))
        before = state_of(target)
        with pytest.raises(ValueError, match="arrays of one role and path"):
            load_state(path, target)
        assert_equal(state_of(target), before)


def unmark(arrays):
    replace(arrays, "4", arrays["4"][()])
    del arrays["4"].attrs["start"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (unmark, "holds start_0, at which a variable joined, but no momentum"),
        (lambda arrays: replace(arrays, "8", np.uint64(2**63)), "start_0 must be a whole number"),
        (lambda arrays: replace(arrays, "8", BEYOND), "start_0 must be a whole number"),
        (lambda arrays: arrays.__delitem__("8"), "lacks start_0"),
    ],
    ids=["unmarked", "beyond int64", "beyond its dtype", "missing"],
)
def test_start_of_a_late_variable(edit, message, tmp_path):
    a, b = two_variables("a", "b")
    optimizer = after_a_step([a])
    optimizer.add_param_group({"params": b})
    optimizer.apply([keras.ops.ones(3), keras.ops.ones(3)], [a, b])
    path = save_state(tmp_path / "state.h5", optimizer)
    with h5py.File(path, "r+") as file:
        told = [array.attrs["role"] for array in file[ARRAYS].values()]
        assert told.index("start_0") == 8
        assert file[ARRAYS]["4"].attrs["start"] == "0"
        edit(file[ARRAYS])
    target = keras_adam.Adam(param_groups=[{"params": b}])
    target.build([a, b])
    before = state_of(target)
    with pytest.raises(ValueError, match=message):
        load_state(path, target)
    assert_equal(state_of(target), before)


def test_late_variable_without_moments(tmp_path):
    a, b = two_variables("a", "b")
    b.overwrite_with_gradient = True
    optimizer = after_a_step([a])
    optimizer.add_param_group({"params": b})
    optimizer.apply([keras.ops.ones(3), keras.ops.full((3,), 7.0)], [a, b])
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(b), [7.0, 7.0, 7.0])
    path = save_state(tmp_path / "state.h5", optimizer)
    target = keras_adam.Adam(param_groups=[{"params": b}])
    target.build([a, b])
    load_state(path, target)
    assert int(target.iterations) == 2


def test_start_that_is_not_needed_any_more(tmp_path):
    """The loaded state has fewer late variables, and so has the state that is saved then."""
    a, b = two_variables("a", "b")
    late = after_a_step([a])
    late.add_param_group({"params": b})
    path = save_state(tmp_path / "early.h5", after_a_step([a, b]))
    load_state(path, late)
    again = save_state(tmp_path / "again.h5", late)
    target = keras_adam.Adam(param_groups=[{"params": b}])
    target.build([a, b])
    load_state(again, target)
    target.apply([keras.ops.ones(3), keras.ops.ones(3)], [a, b])
    assert int(target.iterations) == 2


def test_swapped_arrays_without_names(edited, target):
    def swap(arrays):
        nameless(arrays)
        for one, other in (("2", "x"), ("4", "2"), ("x", "4")):
            arrays.move(one, other)

    assert_refused(target, edited(swap), r"momentum of '.*' has shape")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_values_are_kept_as_they_are(value, edited, target):
    """Loading does not check values."""
    path = edited(lambda arrays: replace(arrays, "5", np.array([value, 1.0], "f4")))
    target.load_weights(path)
    np.testing.assert_array_equal(slots(target.optimizer, "velocity")[1].numpy(), [value, 1.0])


def test_moments_of_another_width(trained):
    """float32 into bfloat16: to the nearest."""
    model = make_model(keras_adam.Adam(amsgrad=True, state_dtype="bfloat16"))
    model.optimizer.build(model.trainable_variables)
    model.load_weights(trained[0] / "model.weights.h5")
    for got, want in zip(model.optimizer.variables, trained[1], strict=True):
        got = keras.ops.convert_to_numpy(keras.ops.cast(got, "float32"))
        np.testing.assert_allclose(got, want, rtol=2**-8)
    assert slots(model.optimizer, "momentum")[0].dtype == "bfloat16"


# Compensations


def stepped(dtype, steps, **options):
    weight = keras.Variable(np.linspace(-1, 1, 8), dtype=dtype, name="weight")
    optimizer = keras_adam.Adam(0.02, amsgrad=True, **options)
    optimizer.build([weight])
    for gradient in (0.3, -0.1, 0.2)[:steps]:
        optimizer.apply([keras.ops.full((8,), gradient, dtype)], [weight])
    return optimizer


def stored(optimizer):
    store = {}
    optimizer.save_own_variables(store)
    return store


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("other", ["bfloat16", "float16"])
def test_compensation_of_another_dtype(dtype, other):
    """In another dtype it has another scale, so that it begins at zero."""
    source, loaded = stepped(dtype, 3), stepped(other, 1)
    assert np.any(stored(source)["5"])
    loaded.load_own_variables(stored(source))
    got = stored(loaded)
    np.testing.assert_array_equal(got["2"], stored(source)["2"])
    np.testing.assert_array_equal(got["5"], stored(source)["5"] if dtype == other else np.zeros(8))


# Files of other versions


@pytest.mark.parametrize("path", sorted(OLD.glob("everything-*")), ids=lambda p: p.name[11:18])
def test_older_version(path):
    model = make_model(keras_adam.Adam(**EVERYTHING))
    model.optimizer.build(model.trainable_variables)
    model.load_weights(path)
    with h5py.File(path) as file:
        for i, got in enumerate(state_of(model.optimizer)):
            np.testing.assert_array_equal(got, file[ARRAYS][str(i)])
    fit(model)
    assert_close(weights(model), Expected(EVERYTHING).fit().fit().weights)


@pytest.mark.parametrize("path", sorted(OLD.glob("joined_late-*")), ids=lambda p: p.name[12:19])
def test_older_version_with_groups(path, tmp_path):
    """Training goes on from its state as in a run of the present version."""

    def prepared():
        model = make_model(keras_adam.Adam(0.02, param_groups=[]))
        bias = model.layers[0].bias
        bias.trainable = False
        model.optimizer.build(model.trainable_variables)
        return model, bias

    def join(model, bias):
        bias.trainable = True
        group = {"params": bias, "learning_rate_multiplier": 0.5}
        model.optimizer.add_param_group(group)
        model.compile(model.optimizer, loss="mse")

    model, bias = prepared()
    fit(model)
    join(model, bias)
    fit(model, epochs=2)
    older, bias = prepared()
    join(older, bias)
    older.optimizer.build(older.trainable_variables)
    older.load_weights(path)
    assert int(slots_named(older.optimizer, "start_0").numpy()) == 4
    fit(older)
    assert_close(weights(older), weights(model))

    cut_off = tmp_path / "cut_off.weights.h5"
    older.save_weights(cut_off)
    with h5py.File(cut_off, "a") as file:
        last = str(len(file[ARRAYS]) - 1)
        assert file[ARRAYS][last].attrs["role"] == "start_0"
        del file[ARRAYS][last]
    assert_refused(older, cut_off, "lacks start_0")


def slots_named(optimizer, name):
    return next(v for v in optimizer.variables if v.name == name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_older_version_in_half_precision(dtype):
    layers = [keras.Input((4,)), keras.layers.Dense(2, dtype=dtype, name="dense")]
    model = keras.Sequential(layers, name="model")
    model.compile(keras_adam.Adam(amsgrad=True, skip_nonfinite=True), loss="mse")
    model.optimizer.build(model.trainable_variables)
    path = OLD / f"{dtype}-0f12d19.weights.h5"
    model.load_weights(path)
    loaded = {
        (e.role, e.path): e.saved(keras.ops.convert_to_numpy).value
        for e in model.optimizer._loading._entries()
    }
    with h5py.File(path) as file:
        for array in file[ARRAYS].values():
            got = loaded.pop((array.attrs["role"], array.attrs["path"]))
            np.testing.assert_array_equal(got, array[()])
            assert array.attrs["role"] != "compensation" or got.any()
    assert not loaded


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"use_ema": True}], ids=str)
def test_what_keras_wrote(options, tmp_path):
    model = make_model(keras.optimizers.Adam(0.02, **options))
    fit(model)
    model.save_weights(tmp_path / "keras.weights.h5")
    ours = make_model(keras_adam.Adam(**options))
    ours.optimizer.build(ours.trainable_variables)
    ours.load_weights(tmp_path / "keras.weights.h5")
    for got, want in zip(state_of(ours.optimizer), state_of(model.optimizer), strict=True):
        np.testing.assert_array_equal(got, want)


# Before build


def test_pending_state_is_saved(trained, tmp_path):
    """State that is loaded, and saved before `build`, is not lost."""
    model = make_model(keras_adam.Adam(amsgrad=True))
    model.load_weights(trained[0] / "model.weights.h5")
    model.optimizer.learning_rate = 0.5
    model.save(tmp_path / "pending.keras")
    loaded = keras.saving.load_model(tmp_path / "pending.keras")
    want = list(trained[1])
    want[1] = np.float32(0.5)
    assert_equal(state_of(loaded.optimizer), want)


def test_second_loading_before_build(trained, tmp_path):
    """The last one counts; if it fails at `build`, the state is that from before the first one."""
    model = make_model(keras_adam.Adam(0.25))
    model.load_weights(trained[0] / "model.weights.h5")
    model.load_weights(trained[0] / "model.weights.h5")
    with pytest.raises(ValueError, match="velocity_hat"):
        model.optimizer.build(model.trainable_variables)
    assert float(model.optimizer.learning_rate) == 0.25
    assert int(model.optimizer.iterations) == 0


# No code of a file runs


def rewrite_config(source, target, change):
    """Copy a `.keras` file with another configuration of its optimizer."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "config.json":
                config = json.loads(data)
                change(config["compile_config"]["optimizer"]["config"])
                data = json.dumps(config)
            new.writestr(name, data)


def lambda_config(marker):
    """Return what Keras writes for a lambda that would leave a mark if it ran."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a lambda is saved
        return keras.saving.serialize_keras_object(
            lambda path=str(marker): open(path, "w").close() or 0.5
        )


PLACES = {
    "learning_rate": lambda code: {"learning_rate": code},
    "beta_1": lambda code: {"beta_1": code},
    "weight_decay": lambda code: {"weight_decay": code},
    "number of a group": lambda code: {
        "param_groups": [{"params": ".*bias", "learning_rate": code}]
    },
    "number of an added group": lambda code: {
        "added_param_groups": [{"params": ".*bias", "epsilon": code}]
    },
}


@pytest.mark.parametrize("place", PLACES)
def test_lambda_in_a_file(place, trained, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "lambda.keras"
    changed = PLACES[place](lambda_config(marker))
    rewrite_config(trained[0] / "model.keras", path, lambda config: config.update(changed))
    with pytest.raises(ValueError, match="lambda"):
        keras.saving.load_model(path)
    assert not marker.exists()
    config = keras.optimizers.Adam().get_config()
    with pytest.raises(ValueError, match="lambda"):
        keras_adam.Adam.from_config(config | changed)
    assert not marker.exists()


def test_lambda_as_a_selector(trained, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "lambda.keras"
    changed = {"param_groups": [{"params": lambda_config(marker)}]}
    rewrite_config(trained[0] / "model.keras", path, lambda config: config.update(changed))
    with pytest.raises((TypeError, ValueError), match="params"):
        keras.saving.load_model(path)
    assert not marker.exists()


def test_callable_beta_is_refused_on_loading(tmp_path):
    model = make_model(keras_adam.Adam(beta_1=lambda: 0.9), run_eagerly=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a lambda is saved
        model.save(tmp_path / "lambda.keras")
    with pytest.raises(ValueError, match="lambda"):
        keras.saving.load_model(tmp_path / "lambda.keras")
    loaded = keras.saving.load_model(tmp_path / "lambda.keras", safe_mode=False)
    assert loaded.optimizer.beta_1() == 0.9
