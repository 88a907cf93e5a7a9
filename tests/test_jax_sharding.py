"""On JAX, arrays that are spread over devices stay so; tested in a process of its own, with eight devices."""

import os
import subprocess
import sys
import textwrap

import keras
import pytest

from support.processes import finish, start
from support.steps import KERAS

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="other backends have no sharded arrays"
)


def run_with_eight_devices(script):
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_eager_steps():
    run_with_eight_devices("""
        import jax, keras, keras_adam, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        spread = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
        variable = keras.Variable(np.ones((16, 4), "float32"))
        variable.assign(jax.device_put(variable.value, spread))
        optimizer = keras_adam.Adam(0.1, amsgrad=True)
        gradient = jax.device_put(np.ones((16, 4), "float32"), spread)
        for _ in range(3):
            optimizer.apply([gradient], [variable])
        for v in (variable, *optimizer.variables[2:]):
            assert v.value.sharding.is_equivalent_to(spread, 2), v.path
        np.testing.assert_allclose(variable.numpy(), 0.7, rtol=1e-5)
    """)


def test_state_follows_the_layout_of_its_variable():
    run_with_eight_devices("""
        import keras, keras_adam, numpy as np

        mesh = keras.distribution.DeviceMesh(
            (4, 2), ["batch", "model"], keras.distribution.list_devices()
        )
        layouts = keras.distribution.LayoutMap(mesh)
        layouts[".*wide/kernel"] = (None, "model")
        keras.distribution.set_distribution(
            keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
        )
        keras.config.set_dtype_policy("bfloat16")
        model = keras.Sequential(
            [keras.Input((8,)), keras.layers.Dense(16, name="wide"), keras.layers.Dense(1)]
        )
        optimizer = keras_adam.Adam(0.01, amsgrad=True, gradient_accumulation_steps=2, use_ema=True)
        model.compile(optimizer, loss="mse")
        x, y = np.random.randn(64, 8), np.random.randn(64, 1)
        model.fit(x, y, batch_size=16, verbose=0)
        state = [v for v in optimizer.variables if "wide_kernel" in v.path]
        assert len(state) == 6
        for v in (model.layers[0].kernel, *state):
            assert tuple(v.value.sharding.spec) == (None, "model"), v.path

        # Layouts of JAX's own, in which several axes of the mesh may share an axis of the array.
        from jax.sharding import NamedSharding, PartitionSpec

        keras.config.set_dtype_policy("float32")
        optimizer = keras_adam.Adam(0.1, shard_state=True)
        given = [(("batch", "model"), None), (None, "model"), (None, None)]
        layouts = [NamedSharding(mesh.backend_mesh, PartitionSpec(*axes)) for axes in given]
        variables = [keras.Variable(np.ones((16, 8)), layout=layout) for layout in layouts]
        optimizer.apply([np.ones((16, 8), "float32")] * 3, variables)
        shards = [v.value.addressable_shards[0].data.shape for v in optimizer.variables[2::2]]
        assert shards == [(2, 8), (4, 4), (4, 8)], shards
        for v in variables:
            np.testing.assert_allclose(v.numpy(), 0.9, rtol=1e-5)
    """)


@pytest.mark.long
def test_jitted_loop_of_ones_own_leaves_the_weights_whole_and_the_state_spread():
    run_with_eight_devices("""
        import jax, keras, keras_adam, numpy as np

        keras.distribution.set_distribution(keras.distribution.DataParallel())
        gradient = np.random.default_rng(3).normal(size=(8, 16)).astype("float32")
        for options in ({}, {"gradient_accumulation_steps": 2, "use_ema": True}):
            variable = keras.Variable(np.ones((8, 16), "float32"))
            optimizer = keras_adam.Adam(0.01, shard_state=True, **options)
            optimizer.build([variable])
            step = jax.jit(optimizer.stateless_apply)
            values, state = [variable.value], [v.value for v in optimizer.variables]
            for _ in range(4):
                values, state = step(state, [gradient], values)
                assert values[0].sharding.is_fully_replicated, options
                shards = [s.addressable_shards[0].data.shape for s in state if s.ndim]
                assert set(shards) == {(1, 16)}, (options, shards)
            moved = 0.01 * 4 / options.get("gradient_accumulation_steps", 1)
            np.testing.assert_allclose(values[0], 1 - moved * np.sign(gradient), rtol=1e-3)
    """)


@pytest.mark.long
def test_files_fit_any_number_of_devices(tmp_path):
    """Each device holds its share; a file is whole, and training goes on from it on eight devices, four, or one."""
    run_with_eight_devices(f"""
        import keras, keras_adam, numpy as np

        devices = keras.distribution.list_devices()
        rng = np.random.default_rng(3)
        x, y = rng.normal(size=(64, 8)), rng.normal(size=(64, 16))

        def share(model):
            state = [v for v in model.optimizer.variables if v.shape]
            held = sum(v.value.addressable_shards[0].data.nbytes for v in state)
            return held / sum(v.value.nbytes for v in state)

        def on(count):
            if count == 1:
                return keras.distribution.set_distribution(None)
            keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices[:count]))

        def fit(model):
            model.fit(x, y, batch_size=16, shuffle=False, verbose=0)
            return model

        options = dict(amsgrad=True, use_ema=True, gradient_accumulation_steps=2)
        ends = []
        for spread in (True, False):
            keras.utils.set_random_seed(0)
            on(8 if spread else 1)
            model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16)])
            model.compile(keras_adam.Adam(0.01, shard_state=spread, **options), loss="mse")
            fit(model)
            if spread:
                assert share(model) == 1 / 8
                model.save(r"{tmp_path}/model.keras")
            ends.append(fit(model))
        for count in (8, 4, 1):
            on(count)
            model = keras.saving.load_model(r"{tmp_path}/model.keras")
            assert share(fit(model)) == 1 / count
            ends.append(model)
        for model in ends:
            for one, other in zip(ends[0].weights, model.weights, strict=True):
                np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-6)
    """)


# `keras.callbacks.OrbaxCheckpoint`: the shards are saved as they lie.

needs_orbax = pytest.mark.skipif(
    KERAS < (3, 15), reason="Keras restores them onto other devices from 3.15 on"
)


def run_orbax(task, folder, devices):
    finish([start("orbax_run", [folder, task], devices)], seconds=300)


@pytest.fixture(scope="module")
def saved_by_orbax(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    run_orbax("save", folder, 8)
    return folder


@needs_orbax
@pytest.mark.long
@pytest.mark.parametrize("devices", [8, 4, 1])
def test_orbax_restores_what_eight_devices_saved(devices, saved_by_orbax):
    """In the middle of an accumulation, to the bit; training goes on; what does not fit is refused by name."""
    run_orbax("restore", saved_by_orbax, devices)


@needs_orbax
@pytest.mark.long
def test_keras_passes_over_a_checkpoint_of_another_optimizer(saved_by_orbax):
    """If this fails, Keras has mended it: the guides need not tell to call `check_state_tree` any more."""
    run_orbax("silent", saved_by_orbax, 8)
