"""State in 8 bits, saved and loaded: to the bit, between backends, from and to other dtypes, whole or not at all."""

import copy
import io
import pathlib
import pickle

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

import keras_adam
from support import wide
from support.eight_bits import assert_same_codes, decoded, encoded
from support.processes import run_under
from support.resume import load_state, replace, save_state, state_of
from support.steps import BACKEND, slots
from support.wide import EIGHT_BITS, EVERYTHING, all_of, assert_same_bits

OLD = pathlib.Path(__file__).parent / "files"
ARRAYS = "optimizer/vars"
ALL = {"plain": EIGHT_BITS, "everything": EVERYTHING}
each = pytest.mark.parametrize("options", ALL.values(), ids=ALL)


@pytest.fixture(scope="module")
def source():
    """A trained optimizer, and the variables that it was built for."""
    optimizer, variables = build({"amsgrad": True})
    steps(optimizer, variables, 3)
    return optimizer, variables


def build(options, shapes=((64, 64), (20, 300), (7,))):
    rng = np.random.default_rng(0)
    variables = [
        keras.Variable(rng.standard_normal(s), dtype="float32", name=f"v{i}")
        for i, s in enumerate(shapes)
    ]
    optimizer = keras_adam.Adam(**{"learning_rate": 0.01, "state_dtype": "8bit"} | options)
    optimizer.build(variables)
    return optimizer, variables


def steps(optimizer, variables, count, seed=1):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        grads = [rng.standard_normal(v.shape).astype("float32") for v in variables]
        optimizer.apply([ops.convert_to_tensor(g) for g in grads], variables)


def moments(optimizer, by_row=False):
    """Each moment's numbers, by role and name."""
    found = {}
    for role in ("momentum", "velocity", "velocity_hat"):
        scales = {v.path.removesuffix("_scale"): v for v in slots(optimizer, f"{role}_scale")}
        for v in slots(optimizer, role):
            array = ops.convert_to_numpy(ops.cast(v, "float32"))
            if v.path in scales:
                scale = ops.convert_to_numpy(scales[v.path])
                codes = array.astype("uint8")
                array = decoded(codes, scale, role == "momentum", by_row and scale.ndim == 2)
            found[v.path.partition("/")[2]] = np.array(array)
    return found


# Resumed


@each
def test_fit_save_load_fit_is_fit_fit(options, tmp_path):
    model = wide.trained(**options)
    model.save(tmp_path / "model.keras")
    before = all_of(model)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same_bits(all_of(loaded), before)
    assert_same_bits(all_of(wide.fit(loaded)), all_of(wide.fit(model)))
    fresh = wide.make_model(keras_adam.Adam(**options))
    model.save_weights(tmp_path / "model.weights.h5")
    fresh.load_weights(tmp_path / "model.weights.h5")  # before it is built
    assert_same_bits(all_of(wide.fit(fresh)), all_of(wide.fit(model)))


@pytest.mark.long
@pytest.mark.parametrize("other", sorted({"jax", "tensorflow", "torch"} - {BACKEND}))
def test_goes_on_under_another_backend(other, tmp_path):
    for name, options in ALL.items():
        wide.save(tmp_path, name, wide.trained(**options))
    assert run_under(other, "wide", tmp_path).split()[1::2] == sorted(ALL)


@pytest.mark.parametrize("path", sorted(OLD.glob("eight_bits-*.keras")), ids=lambda p: p.stem)
def test_old_file(path):
    wide.check_resumed(OLD, path.stem)


def test_there_is_an_old_file():
    assert list(OLD.glob("eight_bits-*.keras"))


@each
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copied, options):
    model = wide.trained(**options)
    twin = wide.make_model(copied(model.optimizer))
    twin.set_weights(model.get_weights())
    assert_same_bits(all_of(wide.fit(twin)), all_of(wide.fit(model)))


# Converted


CONVERSIONS = {
    "float32 to 8 bits": ({"state_dtype": None}, {}),
    "8 bits to float32": ({}, {"state_dtype": None}),
    "bfloat16 to 8 bits": ({"state_dtype": "bfloat16"}, {}),
    "8 bits to bfloat16": ({}, {"state_dtype": "bfloat16"}),
    "by row": ({}, {"lazy": True}),
    "from rows": ({"lazy": True}, {}),
}


@pytest.mark.parametrize("how", ["h5", "roleless"])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_converted(name, how):
    of_source, of_target = ({"amsgrad": True, **x} for x in CONVERSIONS[name])
    source, variables = build(of_source)
    steps(source, variables, 3)
    target, _ = build(of_target)
    if how == "h5":
        load_state(save_state(io.BytesIO(), source), target)
    else:
        store = {}
        source.save_own_variables(store)
        target.load_own_variables(store)
    by_row = [x.get("lazy", False) for x in (of_source, of_target)]
    given, found = moments(source, by_row[0]), moments(target, by_row[1])
    assert given.keys() == found.keys()
    assert int(target.iterations) == 3
    for path, numbers in given.items():
        in_blocks = of_target.get("state_dtype", "8bit") == "8bit" and numbers.size >= 4096
        if not in_blocks:
            kept = numbers.astype("float32")
            if of_target.get("state_dtype") == "bfloat16":
                kept = kept.astype(ml_dtypes.bfloat16).astype("float32")
            np.testing.assert_allclose(found[path], kept, rtol=2.0**-8 if "bf" in name else 3e-7)
            continue
        signed = path.endswith("_momentum")
        is_maximum = path.endswith("_velocity_hat")
        codes, scale, margin = encoded(numbers, signed, by_row=by_row[1], is_maximum=is_maximum)
        held = {v.path.partition("/")[2]: ops.convert_to_numpy(v) for v in target.variables}
        assert_same_codes(held[path], codes, margin, signed)
        np.testing.assert_allclose(held[f"{path}_scale"].ravel(), scale, rtol=1e-6)


def test_from_keras_and_back(tmp_path):
    theirs = wide.fit(wide.make_model(keras.optimizers.Adam(0.01)))
    theirs.save_weights(tmp_path / "keras.weights.h5")
    ours = wide.make_model(keras_adam.Adam(**EIGHT_BITS))
    ours.load_weights(tmp_path / "keras.weights.h5")
    before = ours.get_weights()
    later = [wide.fit(model).get_weights() for model in (ours, theirs)]
    assert wide.distance(*later, before) < 0.1
    ours.save_weights(tmp_path / "ours.weights.h5")
    between = wide.make_model(keras_adam.Adam(0.01))
    between.load_weights(tmp_path / "ours.weights.h5")
    between.optimizer.build(between.trainable_variables)
    between.save_weights(tmp_path / "float32.weights.h5")
    back = wide.make_model(keras.optimizers.Adam(0.01))
    back.optimizer.build(back.trainable_variables)
    back.load_weights(tmp_path / "float32.weights.h5")
    later = [wide.fit(model).get_weights() for model in (back, ours)]
    assert wide.distance(*later, before) < 0.1


def test_weights_as_a_list(source):
    optimizer, _ = source
    target, _ = build({"amsgrad": True})
    target.set_weights(optimizer.variables)
    assert_same_bits(state_of(target), state_of(optimizer))
    target, _ = build({"amsgrad": True})
    target.set_weights(state_of(optimizer))
    assert_same_bits(state_of(target), state_of(optimizer))
    before, arrays = state_of(target), state_of(optimizer)
    place = next(i for i, a in enumerate(arrays) if a.dtype == np.uint8)
    wrong = {
        "int32": arrays[place].astype("int32"),
        "float32": arrays[place].astype("float32"),
        "shape": arrays[place][:32],
    }
    for array in wrong.values():
        with pytest.raises(ValueError, match=r"holds 8-bit codes, but|has shape"):
            target.set_weights([*arrays[:place], array, *arrays[place + 1 :]])
    for scale in (arrays[place + 1][:3], arrays[place + 1].astype("complex64")):
        with pytest.raises(ValueError, match=r"has shape|of dtype"):
            target.set_weights([*arrays[: place + 1], scale, *arrays[place + 2 :]])
    wide_one, _ = build({"amsgrad": True, "state_dtype": None})
    with pytest.raises(ValueError, match="one array for each"):
        wide_one.set_weights(optimizer.variables)
    assert_same_bits(state_of(target), before)


def test_without_roles_as_they_are(source):
    """A store other than HDF5 tells no roles."""
    store = {}
    source[0].save_own_variables(store)
    target, _ = build({"amsgrad": True})
    target.load_own_variables(store)
    assert_same_bits(state_of(target), state_of(source[0]))


# Refused


def scale_of(arrays, role="momentum_scale"):
    return next(key for key in arrays if arrays[key].attrs["role"] == role)


def cut(arrays):
    key = scale_of(arrays)
    replace(arrays, key, arrays[key][:-1])


def too_long(arrays):
    key = scale_of(arrays)
    replace(arrays, key, np.append(arrays[key][()], np.float32(1)))


def foreign(arrays):
    key = scale_of(arrays)
    replace(arrays, key, np.ones((3, 7), "float32"))


def whole_numbers(arrays):
    key = scale_of(arrays)
    replace(arrays, key, arrays[key][()].astype("int32"))


def missing(arrays):
    key = int(scale_of(arrays))
    del arrays[str(key)]
    for i in range(key + 1, len(arrays) + 1):
        arrays.move(str(i), str(i - 1))


def swapped(arrays):
    """Codes after their scales."""
    key = int(scale_of(arrays))
    arrays.move(str(key), "x")
    arrays.move(str(key - 1), str(key))
    arrays.move("x", str(key - 1))


def of_another_moment(arrays):
    one, other = scale_of(arrays), scale_of(arrays, "velocity_scale")
    arrays.move(one, "x")
    arrays.move(other, one)
    arrays.move("x", other)


def of_another_variable(arrays):
    keys = [key for key in arrays if arrays[key].attrs["role"] == "momentum_scale"]
    arrays.move(keys[0], "x")
    arrays.move(keys[1], keys[0])
    arrays.move("x", keys[1])


def damaged(arrays):
    arrays[scale_of(arrays)][0] += 1.0


def damaged_codes(arrays):
    arrays[str(int(scale_of(arrays)) - 1)][0, 0] ^= 4


def wide_codes(arrays):
    key = str(int(scale_of(arrays)) - 1)
    replace(arrays, key, arrays[key][()].astype("int32"))


def float_codes(arrays):
    key = str(int(scale_of(arrays)) - 1)
    replace(arrays, key, arrays[key][()].astype("float32"))


def signed_codes(arrays):
    key = str(int(scale_of(arrays)) - 1)
    replace(arrays, key, arrays[key][()].view("int8"))


def other_shape(arrays):
    key = str(int(scale_of(arrays)) - 1)
    replace(arrays, key, arrays[key][()].reshape(32, 128))


def without_roles(arrays):
    for array in arrays.values():
        for name in list(array.attrs):
            del array.attrs[name]
    del arrays[str(len(arrays) - 1)]


EDITS = {
    f.__name__: f
    for f in [
        *(cut, too_long, foreign, whole_numbers, missing, swapped, of_another_moment),
        *(of_another_variable, damaged, damaged_codes, wide_codes, float_codes, signed_codes),
        *(other_shape, without_roles),
    ]
}
SAYS = {
    "cut": "the scales of momentum of 'v0'.*must be of shape",
    "too_long": "the scales of momentum of 'v0'.*must be of shape",
    "foreign": "the scales of momentum of 'v0'.*must be of shape",
    "whole_numbers": "the scales of momentum of 'v0' must be floats",
    "missing": "momentum of 'v0' holds 8-bit codes, after which must come their scales",
    "swapped": "momentum_scale of 'v0' must come after its codes",
    "of_another_moment": "holds 8-bit codes, after which must come their scales",
    "of_another_variable": "holds 8-bit codes, after which must come their scales",
    "damaged": "is damaged",
    "damaged_codes": "is damaged",
    "other_shape": "shape",
}


@pytest.mark.parametrize("state_dtype", ["8bit", None])
@pytest.mark.parametrize("built", [True, False], ids=["built", "unbuilt"])
@pytest.mark.parametrize("name", EDITS)
def test_refused(name, built, state_dtype, source, tmp_path):
    path = save_state(tmp_path / "state.h5", source[0])
    with h5py.File(path, "r+") as file:
        EDITS[name](file[ARRAYS])
    if built:
        target, _ = build({"amsgrad": True, "state_dtype": state_dtype})
        before = state_of(target)
        with pytest.raises(ValueError, match=SAYS.get(name, "No state was loaded")):
            load_state(path, target)
        assert_same_bits(state_of(target), before)
        return
    target = keras_adam.Adam(0.5, state_dtype=state_dtype, amsgrad=True)
    _, variables = build({})
    with pytest.raises(ValueError, match=SAYS.get(name, "No state was loaded")):
        load_and_build(path, target, variables)
    assert int(target.iterations) == 0
    assert float(ops.convert_to_numpy(target.learning_rate)) == 0.5


def load_and_build(path, target, variables):
    load_state(path, target)
    target.build(variables)


def test_codes_for_what_is_no_moment(source, tmp_path):
    path = save_state(tmp_path / "state.h5", source[0])
    with h5py.File(path, "r+") as file:
        arrays = file[ARRAYS]
        key = scale_of(arrays)
        replace(arrays, str(int(key) - 1), arrays[str(int(key) - 1)][()], role="average")
        replace(arrays, key, arrays[key][()], role="average_scale")
    target, _ = build({"amsgrad": True})
    before = state_of(target)
    with pytest.raises(ValueError, match="No state was loaded"):
        load_state(path, target)
    assert_same_bits(state_of(target), before)


# Other formats


def test_state_dict(source):
    optimizer, _ = source
    plain, _ = build({"amsgrad": True})
    plain.set_weights(optimizer.variables)
    theirs = plain.state_dict()
    given = moments(plain)
    for i in range(3):
        of_one = theirs["state"][i]
        names = {"exp_avg": "momentum", "exp_avg_sq": "velocity", "max_exp_avg_sq": "velocity_hat"}
        for name, role in names.items():
            array = np.asarray(of_one[name])
            assert array.dtype == np.float32
            assert array.size == given[f"v{i}_{role}"].size
            np.testing.assert_allclose(
                np.sort(array.ravel()), np.sort(given[f"v{i}_{role}"].ravel()), rtol=3e-7
            )
    target, _ = build({"amsgrad": True})
    target.load_state_dict(theirs)
    for path, numbers in moments(target).items():
        np.testing.assert_allclose(numbers, given[path], rtol=1e-6, err_msg=path)
    assert int(target.iterations) == 3


def test_state_tree():
    model = wide.make_model(keras_adam.Adam(name="adam", **EVERYTHING))
    tree = wide.fit(model).get_state_tree(value_format="numpy_array")
    target = wide.make_model(keras_adam.Adam(name="adam", **EVERYTHING))
    target.optimizer.build(target.trainable_variables)
    keras_adam.check_state_tree(target, tree)
    target.set_state_tree(tree)
    assert_same_bits(all_of(target), all_of(model))
    other = wide.make_model(keras_adam.Adam(name="adam", **EVERYTHING | {"state_dtype": None}))
    other.optimizer.build(other.trainable_variables)
    with pytest.raises(ValueError, match="momentum_scale"):
        keras_adam.check_state_tree(other, tree)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's own checkpoints")
@pytest.mark.parametrize("groups", [None, [], [{"params": "v0", "state_dtype": "8bit"}]], ids=str)
@pytest.mark.parametrize("built", [True, False])
def test_tensorflow_checkpoint(groups, built, tmp_path):
    import tensorflow as tf

    options = {"param_groups": groups, "amsgrad": True}
    optimizer, variables = build(options)
    steps(optimizer, variables, 3)
    saved = tf.train.Checkpoint(optimizer=optimizer, variables=variables)
    path = saved.save(str(tmp_path / "checkpoint"))
    target, others = build(options)
    if not built:
        target = keras_adam.Adam(0.01, state_dtype="8bit", **options)
    status = tf.train.Checkpoint(optimizer=target, variables=others).restore(path)
    target.build(others)
    status.assert_consumed()
    assert_same_bits(state_of(target), state_of(optimizer))
    for one, known in ((optimizer, variables), (target, others)):
        steps(one, known, 2, seed=5)
    assert_same_bits(state_of(target), state_of(optimizer))


def test_a_group_that_came_late(tmp_path):
    optimizer, variables = build({"param_groups": []})
    steps(optimizer, variables, 2)
    late = keras.Variable(np.ones((70, 70), "float32"), name="late")
    optimizer.add_param_group({"params": late, "state_dtype": "8bit"})
    steps(optimizer, [*variables, late], 2)
    path = save_state(tmp_path / "state.h5", optimizer)
    again, others = build({"param_groups": []})
    twin = keras.Variable(np.ones((70, 70), "float32"), name="late")
    again.add_param_group({"params": twin, "state_dtype": "8bit"})
    load_state(path, again)
    for one, known in ((optimizer, [*variables, late]), (again, [*others, twin])):
        for v, w in zip(known, [*variables, late], strict=True):
            v.assign(ops.ones(w.shape))
        steps(one, known, 2, seed=9)
    # Its own `start` is made at another time, and stands elsewhere. JAX may take one of the steps in pieces.
    given, found = moments(optimizer), moments(again)
    assert given.keys() == found.keys()
    for path, numbers in given.items():
        np.testing.assert_allclose(found[path], numbers, rtol=1e-6, err_msg=path)
    np.testing.assert_allclose(late.numpy(), twin.numpy(), rtol=1e-6)
