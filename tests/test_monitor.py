"""`monitor`, `monitored()` and `OptimizerMonitor`: the numbers are those that NumPy computes from what was recorded."""

import csv
import math
import sys

import keras
import numpy as np
import pytest

import keras_adam
from keras_adam.monitor import EVERY
from support import helpers, reference
from support.steps import BACKEND, eager_step, either_way, value_of
from support.tolerances import TOLERANCES

SHAPES = {"first": (4, 3), "second": (7,)}
GROUPS = [{"params": "second", "learning_rate_multiplier": 0.1, "weight_decay": 0.1}]
OPTIONS = {
    "plain": {},
    "clipnorm": {"clipnorm": 2.5},
    "clipvalue": {"clipvalue": 2.0},
    "global_clipnorm": {"global_clipnorm": 4.0, "skip_nonfinite": True},
    "accumulation": {"gradient_accumulation_steps": 3, "global_clipnorm": 6.5},
    "groups": {"param_groups": GROUPS},
    "decay": {"weight_decay": 0.5, "amsgrad": True},
    "l2": {"weight_decay": 0.5, "decoupled_weight_decay": False, "maximize": True},
    "corrected": {"amsgrad": "corrected"},
    "loss_scale": {"loss_scale_factor": 16.0},
    "average": {"use_ema": True},
    "spikes": {"skip_spikes": 6.0},
}


def make_variables(shapes=SHAPES, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return [
        keras.Variable(rng.standard_normal(shape), dtype=dtype, name=name)
        for name, shape in shapes.items()
    ]


def random_gradients(steps, shapes=SHAPES, seed=1):
    rng = np.random.default_rng(seed)
    return [
        [np.asarray(rng.standard_normal(s) * (1 + i % 5), "float32") for s in shapes.values()]
        for i in range(steps)
    ]


class Record:
    """What a run must have measured, from its gradients and its weights before and after each update."""

    def __init__(self, options, every=1):
        self.every = every
        self.accumulation = options.get("gradient_accumulation_steps", 1)
        limits = ("clipnorm", "clipvalue", "global_clipnorm")
        self.clipping = next(((x, options[x]) for x in limits if x in options), None)
        self.has_groups = "param_groups" in options
        self.pending, self.updates = [], 0
        self.norms, self.clipped, self.ratios = [], [], []

    def add(self, arrays, before, after):
        self.pending.append(arrays)
        if len(self.pending) < self.accumulation:
            return
        mean = [np.mean(of_one, axis=0) for of_one in zip(*self.pending, strict=True)]
        self.pending, self.updates = [], self.updates + 1
        if (self.updates - 1) % self.every:
            return
        norms = [np.linalg.norm(a) for a in mean]
        self.norms.append(np.linalg.norm(norms))
        kind, limit = self.clipping or (None, np.inf)
        largest = {"clipnorm": max(norms), "global_clipnorm": self.norms[-1]}
        self.clipped.append(largest.get(kind, max(np.abs(a).max() for a in mean)) > limit)
        parts = [[1], [0]] if self.has_groups else [[0, 1]]  # in the order of `param_groups`
        self.ratios.append(
            [
                math.sqrt(sum(np.sum((after[i] - before[i]) ** 2) for i in part))
                / math.sqrt(sum(np.sum(after[i] ** 2) for i in part))
                for part in parts
            ]
        )

    def shown(self):
        means = np.mean(self.ratios, axis=0)
        names = ["update_ratio/0", "update_ratio/1"] if self.has_groups else ["update_ratio"]
        return {
            "grad_norm": np.mean(self.norms),
            "grad_norm_max": np.max(self.norms),
            "clipped": np.mean(self.clipped),
            "skipped": 0.0,
            **dict(zip(names, means, strict=True)),
        }


def run(optimizer, variables, gradients, record, make_step=eager_step, scale=1.0):
    optimizer.build(variables)
    step = make_step(optimizer, variables)
    for arrays in gradients:
        before = [value_of(v) for v in variables]
        step(*(np.float32(scale) * a for a in arrays))
        record.add(arrays, before, [value_of(v) for v in variables])


def check(measured, wanted, **tolerance):
    assert list(measured) == list(wanted)
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-7}  # a difference of weights loses digits
    for name, value in wanted.items():
        np.testing.assert_allclose(measured[name], value, err_msg=name, **tolerance)


@either_way
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.short(
    "plain-*", "decay-eager_step", "groups-compiled_step", "accumulation-*", "clip*-eager_step"
)
def test_numbers(options, make_step):
    optimizer, record = keras_adam.Adam(0.05, monitor=1, **options), Record(options)
    scale = options.get("loss_scale_factor", 1.0)
    run(optimizer, make_variables(), random_gradients(12), record, make_step, scale)
    wanted = record.shown()
    if record.clipping:
        assert 0 < wanted["clipped"] < 1
    check(optimizer.monitored(), wanted)
    assert math.isnan(optimizer.monitored()["grad_norm"])  # begun anew
    again = Record(options)
    run(
        optimizer,
        optimizer._trainable_variables,
        random_gradients(3, seed=2),
        again,
        make_step,
        scale,
    )
    check(optimizer.monitored(), again.shown())


@either_way
def test_true_measures_one_update_in_32(make_step):
    optimizer, record = keras_adam.Adam(0.05, monitor=True), Record({}, EVERY)
    assert optimizer.monitor == EVERY == 32
    run(optimizer, make_variables(), random_gradients(70), record, make_step)
    assert len(record.norms) == 3
    check(optimizer.monitored(), record.shown())


@pytest.mark.parametrize("options", [{"state_dtype": "bfloat16"}, {}], ids=["state", "variables"])
def test_half_precision(options):
    """Told from the moments that were kept, which are rounded: each by a part in 256, up or down."""
    dtype = "float32" if options else "bfloat16"
    optimizer, record = keras_adam.Adam(0.5, monitor=1, **options), Record(options)
    gradients = [[as_bfloat16(a) for a in arrays] for arrays in random_gradients(12)]
    run(optimizer, make_variables(dtype=dtype), gradients, record)
    wanted = record.shown()
    check(optimizer.monitored(), wanted, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("state_dtype", ["8bit", None])
def test_moments_in_8_bits(state_dtype):
    """Told from codes of `m` that are off by a part in 27 each, which hardly shows in the rms of all."""
    shapes = {"first": (64, 80)}
    options = {"state_dtype": state_dtype, "weight_decay": 0.1}
    optimizer, variables = keras_adam.Adam(0.05, monitor=1, **options), make_variables(shapes)
    optimizer.build(variables)
    ratios, norms = [], []
    for arrays in random_gradients(8, shapes):
        before = value_of(variables[0])
        optimizer.apply(helpers.to_tensors(arrays), variables)
        # 5120 elements: every tenth, and the next distance without a common divisor is 11.
        old, new = (x.reshape(-1)[::11] for x in (before, value_of(variables[0])))
        ratios.append(np.linalg.norm(new - old) / np.linalg.norm(new))
        norms.append(np.linalg.norm(arrays[0]))
    measured = optimizer.monitored()
    np.testing.assert_allclose(measured["grad_norm"], np.mean(norms), rtol=1e-5)
    rtol = 1e-2 if state_dtype else 1e-4
    np.testing.assert_allclose(measured["update_ratio"], np.mean(ratios), rtol=rtol)


def as_bfloat16(array):
    """Return an array as bfloat16 has it, so that both sides see the same gradient."""
    bits = np.asarray(array, "float32").view("uint32")
    return (bits & np.uint32(0xFFFF0000)).view("float32")


def test_gradient_in_float16_does_not_overflow():
    variable = keras.Variable(np.ones(3), dtype="float16")
    optimizer = keras_adam.Adam(monitor=1)
    optimizer.apply([keras.ops.full((3,), 300.0, "float16")], [variable])
    np.testing.assert_allclose(optimizer.monitored()["grad_norm"], 300 * 3**0.5, rtol=1e-6)


def test_sample_of_large_variables():
    """Of a large variable 512 elements tell how far it moved, weighed by its size; all columns are among them."""
    shapes = {"first": (64, 1024), "second": (7,)}
    optimizer, record = keras_adam.Adam(0.05, monitor=1), Record({})
    run(optimizer, make_variables(shapes), random_gradients(3, shapes), record)
    measured, wanted = optimizer.monitored(), record.shown()
    np.testing.assert_allclose(measured["grad_norm"], wanted["grad_norm"], rtol=1e-5)
    # The rms of 512 numbers is known to 1 / sqrt(2 * 512) of itself.
    np.testing.assert_allclose(measured["update_ratio"], wanted["update_ratio"], rtol=4 / 32)
    from keras_adam import rule

    for size in (513, 64 * 1024, 2_000_000, 50257 * 768):
        taken = rule.sample(np.arange(size), size)
        assert 256 <= len(taken) <= 512
        for columns in (d for d in (2, 3, 64, 768, 1000, 1024) if size % d == 0):
            assert len({*(taken % columns)}) == min(columns, len(taken))


def test_skipped_steps_are_counted_and_not_measured():
    optimizer, record = keras_adam.Adam(0.05, monitor=1, skip_nonfinite=True), Record({})
    variables, gradients = make_variables(), random_gradients(6)
    run(optimizer, variables, gradients[:3], record)
    optimizer.apply(helpers.to_tensors([np.full((4, 3), np.nan), np.ones(7)]), variables)
    run(optimizer, variables, gradients[3:], record)
    check(optimizer.monitored(), record.shown() | {"skipped": 1 / 7})
    assert math.isnan(optimizer.monitored()["skipped"])


def test_group_that_is_added():
    optimizer, variables = keras_adam.Adam(0.05, monitor=1), make_variables()
    optimizer.build(variables[:1])
    optimizer.apply(helpers.to_tensors([np.ones((4, 3))]), variables[:1])
    assert "update_ratio" in optimizer.monitored()
    optimizer.add_param_group({"params": variables[1], "learning_rate_multiplier": 0.0})
    optimizer.apply(helpers.to_tensors([np.ones((4, 3)), np.ones(7)]), variables)
    measured = optimizer.monitored()
    assert measured["update_ratio/0"] > 0.01
    assert measured["update_ratio/1"] == 0.0


# Off


def test_off_there_is_no_state_and_no_trace():
    from keras.optimizers import Adam

    ours, theirs = keras_adam.Adam(), Adam()
    for optimizer in (ours, theirs):
        optimizer.build(make_variables())
    names = [[v.path.partition("/")[2] for v in x.variables] for x in (ours, theirs)]
    assert names[0] == names[1]
    assert not {"monitor", "skip_spikes"} & {*ours.get_config()}
    measuring = keras_adam.Adam(monitor=True)
    measuring.build(make_variables())
    more = [v.path for v in measuring.variables[len(ours.variables) :]]
    assert len(more) == 7
    assert all("monitor" in path for path in more)


@pytest.mark.skipif(BACKEND != "jax", reason="a jaxpr")
def test_off_the_compiled_step_is_the_plain_one():
    import jax

    def text(**options):
        variables = make_variables()
        optimizer = keras_adam.Adam(0.1, **options)
        optimizer.build(variables)
        state = [v.value for v in optimizer.variables]
        values = [v.value for v in variables]
        return str(jax.make_jaxpr(optimizer.stateless_apply)(state, values, values))

    plain = text()
    assert not any(op in plain for op in ("cond", "while", "reduce_sum", "concatenate"))
    assert text(monitor=False, skip_spikes=None) == plain
    assert "cond" in text(monitor=True)


# In fit


def regression(**options):
    """A linear model, whose gradients and steps NumPy computes too: 5 epochs of 8 batches."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((64, 5)).astype("float32")
    y = (x @ rng.standard_normal((5, 1)) + 0.1 * rng.standard_normal((64, 1))).astype("float32")
    layers = [keras.Input((5,)), keras.layers.Dense(1, use_bias=False)]
    model = keras.Sequential(layers)
    model.set_weights([np.full((5, 1), 0.5)])
    model.compile(keras_adam.Adam(0.05, **options.pop("of_adam", {})), loss="mse", **options)
    return model, x, y


def in_numpy(x, y, epochs, accumulation=1):
    """Return each epoch's measures."""
    adam = reference.Adam([np.full((5, 1), 0.5)], learning_rate=0.05)
    found = []
    for _ in range(epochs):
        record = Record({"gradient_accumulation_steps": accumulation})
        pending = []
        for i in range(0, 64, 8):
            a, b = np.float64(x[i : i + 8]), np.float64(y[i : i + 8])
            pending.append(2 / 8 * a.T @ (a @ adam.parameters[0] - b))
            if len(pending) < accumulation:
                continue
            before = adam.parameters
            adam.step([np.mean(pending, axis=0)])
            for gradient in pending:
                record.add(
                    [gradient, np.zeros(1)], [*before, np.ones(1)], [*adam.parameters, np.ones(1)]
                )
            pending = []
        found.append(record)
    return found


FITS = {
    "plain": {},
    "steps_per_execution": {"steps_per_execution": 1 if BACKEND == "torch" else 4},
    "jit_compile": {"jit_compile": BACKEND != "torch"},
    "eagerly": {"run_eagerly": True},
    "accumulation": {"of_adam": {"gradient_accumulation_steps": 2}},
}


@pytest.mark.parametrize("options", FITS.values(), ids=FITS)
def test_history_in_fit(options, tmp_path):
    options = {**options, "of_adam": {"monitor": 1, **options.get("of_adam", {})}}
    accumulation = options["of_adam"].get("gradient_accumulation_steps", 1)
    model, x, y = regression(**options)
    monitor = keras_adam.OptimizerMonitor()
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    shown = model.fit(
        x, y, batch_size=8, epochs=5, shuffle=False, callbacks=[monitor, log], verbose=0
    ).history
    for epoch, record in enumerate(in_numpy(x, y, 5, accumulation)):
        norm, largest = np.mean(record.norms), np.max(record.norms)
        np.testing.assert_allclose(shown["grad_norm"][epoch], norm, rtol=1e-4)
        np.testing.assert_allclose(shown["grad_norm_max"][epoch], largest, rtol=1e-4)
    assert shown["clipped"] == shown["skipped"] == [0.0] * 5
    assert monitor.history == {name: x for name, x in shown.items() if name != "loss"}
    with open(tmp_path / "log.csv") as file:
        rows = [*csv.DictReader(file)]
    assert [float(row["update_ratio"]) for row in rows] == shown["update_ratio"]


def test_ratio_in_fit():
    model, x, y = regression(of_adam={"monitor": 1})
    before = model.get_weights()[0]
    monitor = keras_adam.OptimizerMonitor()
    model.fit(x[:8], y[:8], batch_size=8, callbacks=[monitor], verbose=0)
    after = model.get_weights()[0]
    want = np.linalg.norm(after - before) / np.linalg.norm(after)
    np.testing.assert_allclose(monitor.history["update_ratio"], [want], rtol=1e-4)


class Seen(keras.callbacks.Callback):
    """What a callback behind the monitor is given, such as TensorBoard."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(dict(logs))


def test_logs_of_batches():
    model, x, y = regression(of_adam={"monitor": 1})
    monitor, seen = keras_adam.OptimizerMonitor(frequency=4), Seen()
    shown = model.fit(
        x, y, batch_size=8, epochs=2, shuffle=False, callbacks=[monitor, seen], verbose=0
    ).history
    records = in_numpy(x, y, 2)
    norms = np.array([record.norms for record in records]).reshape(-1)
    told = [i for i, logs in enumerate(seen.batches) if "grad_norm" in logs]
    assert told == [3, 7, 11, 15]
    for i in told:
        np.testing.assert_allclose(
            seen.batches[i]["grad_norm"], norms[i - 3 : i + 1].mean(), rtol=1e-4
        )
    # An epoch's are those of all its batches.
    np.testing.assert_allclose(shown["grad_norm"], [norms[:8].mean(), norms[8:].mean()], rtol=1e-4)
    np.testing.assert_allclose(
        shown["grad_norm_max"], [norms[:8].max(), norms[8:].max()], rtol=1e-4
    )
    assert len(monitor.history["grad_norm"]) == 4


@pytest.mark.parametrize("frequency", [None, 4])
def test_event_file(frequency, tmp_path):
    """What TensorBoard's page shows, read back from the file."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    import tensorflow as tf

    model, x, y = regression(of_adam={"monitor": 1})
    board = keras.callbacks.TensorBoard(tmp_path, update_freq=frequency or "epoch")
    callbacks = [keras_adam.OptimizerMonitor(frequency), board]
    shown = model.fit(x, y, batch_size=8, epochs=2, callbacks=callbacks, verbose=0).history
    events = accumulator.EventAccumulator(str(tmp_path / "train"), {"tensors": 0}).Reload()

    def curve(tag):
        return [float(tf.make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)]

    for name in ("grad_norm", "grad_norm_max", "clipped", "skipped", "update_ratio"):
        np.testing.assert_allclose(curve(f"epoch_{name}"), shown[name], rtol=1e-6)
        if frequency:
            assert len(curve(f"batch_{name}")) == 4


def test_no_batch_is_waited_for():
    assert keras_adam.OptimizerMonitor().async_safe
    assert not keras_adam.OptimizerMonitor(frequency=10).async_safe


def test_loss_scale_optimizer():
    """Its own step scales and unscales before ours, which measures what is unscaled."""
    model, x, y = regression()
    inner = keras_adam.Adam(0.05, monitor=1)
    model.compile(keras.optimizers.LossScaleOptimizer(inner, initial_scale=1024.0), loss="mse")
    callback = keras_adam.OptimizerMonitor()
    history = model.fit(x, y, batch_size=8, shuffle=False, callbacks=[callback], verbose=0).history
    (record,) = in_numpy(x, y, 1)
    np.testing.assert_allclose(history["grad_norm"], [np.mean(record.norms)], rtol=1e-4)


def test_plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    model, x, y = regression(of_adam={"monitor": 1})
    monitor = keras_adam.OptimizerMonitor()
    with pytest.raises(ValueError, match=r"`plot\(\)`"):
        monitor.plot()
    model.fit(x, y, batch_size=8, epochs=3, callbacks=[monitor], verbose=0)
    axes = monitor.plot().axes
    lines = {line.get_label(): line for ax in axes for line in ax.lines}
    assert {*lines} == {*monitor.history}
    for name, line in lines.items():
        np.testing.assert_array_equal(line.get_ydata(), monitor.history[name])
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        keras_adam.OptimizerMonitor().plot()


# Saved and refused


def test_sums_are_saved(tmp_path):
    model, x, y = regression(of_adam={"monitor": 1, "param_groups": []})
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    measured = loaded.optimizer.monitored()
    assert measured == model.optimizer.monitored()
    assert measured["grad_norm"] > 0


@pytest.mark.parametrize("saved", [1, False])
def test_files_with_and_without_measures_load(saved, tmp_path):
    source, x, y = regression(of_adam={"monitor": saved})
    source.fit(x, y, batch_size=8, verbose=0)
    source.save_weights(tmp_path / "m.weights.h5")
    target, *_ = regression(of_adam={"monitor": 0 if saved else 1})
    target.optimizer.build(target.trainable_variables)
    target.load_weights(tmp_path / "m.weights.h5")
    for name in ("_momentums", "_velocities"):
        np.testing.assert_array_equal(
            *(value_of(getattr(m.optimizer, name)[0]) for m in (source, target))
        )
    if not saved:
        assert math.isnan(target.optimizer.monitored()["grad_norm"])


def test_reading_changes_no_training():
    plain, x, y = regression()
    measured, *_ = regression(of_adam={"monitor": 2})
    plain.fit(x, y, batch_size=8, shuffle=False, epochs=2, verbose=0)
    callbacks = [keras_adam.OptimizerMonitor(frequency=3)]
    measured.fit(x, y, batch_size=8, shuffle=False, epochs=2, verbose=0, callbacks=callbacks)
    np.testing.assert_allclose(
        *(m.get_weights()[0] for m in (plain, measured)), **TOLERANCES["float32"]
    )


@pytest.mark.parametrize("value", [-1, 1.5, "yes"])
def test_errors(value):
    with pytest.raises((ValueError, TypeError), match=r"`monitor`.*Received"):
        keras_adam.Adam(monitor=value)


def test_what_measures_nothing_is_refused():
    with pytest.raises(ValueError, match=r"`monitored\(\)` needs.*Received: monitor=0"):
        keras_adam.Adam().monitored()
    for optimizer in (keras_adam.Adam(), keras.optimizers.Adam()):
        model, x, y = regression()
        model.compile(optimizer, loss="mse")
        with pytest.raises(ValueError, match=r"`OptimizerMonitor` needs.*Received"):
            model.fit(x, y, callbacks=[keras_adam.OptimizerMonitor()], verbose=0)
    with pytest.raises(ValueError, match=r"`frequency`.*Received"):
        keras_adam.OptimizerMonitor(frequency=0)
    optimizer = keras_adam.Adam()
    optimizer.build(make_variables())
    with pytest.raises(ValueError, match="decides which state variables there are"):
        optimizer.monitor = True
