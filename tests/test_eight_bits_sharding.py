"""State in 8 bits with `shard_state` on eight devices of JAX: codes and scales divided, and nobody asks for them."""

import keras
import pytest

from test_jax_sharding import run_with_eight_devices

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="other backends have no sharded arrays"
)

BEGIN = """
        import re
        import jax, keras, keras_adam, numpy as np
        from support import wide

        devices = keras.distribution.list_devices()
        rng = np.random.default_rng(3)

        def is_divided(v, by=8):
            return v.value.addressable_shards[0].data.size * by == v.value.size
"""


def run(script):
    run_with_eight_devices(BEGIN + script)


@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True, "gradient_accumulation_steps": 2}], ids=str
)
def test_codes_and_scales_are_divided_and_the_result_is_that_of_one_device(options):
    run(f"""
        def variables():
            rng = np.random.default_rng(0)
            shapes = {{"a": (64, 64), "b": (16, 16, 24), "c": (8192,), "odd": (24, 200), "few": (8, 8)}}
            return [
                keras.Variable(rng.standard_normal(s), dtype="float32", name=n)
                for n, s in shapes.items()
            ]

        def train(shard_state):
            known = variables()
            optimizer = keras_adam.Adam(0.01, state_dtype="8bit", shard_state=shard_state, **{options!r})
            optimizer.build(known)
            rng = np.random.default_rng(1)
            step = jax.jit(optimizer.stateless_apply, donate_argnums=(0, 2))
            state, values = ([v.value for v in x] for x in (optimizer.variables, known))
            text = None
            for _ in range(4):
                grads = [rng.standard_normal(v.shape).astype("float32") for v in known]
                if text is None:
                    text = step.lower(state, grads, values).compile().as_text()
                values, state = step(state, grads, values)
            for v, x in zip([*known, *optimizer.variables], [*values, *state]):
                v.assign(x)
            return known, optimizer, text

        known, one, _ = train(False)
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
        spread, eight, text = train(True)
        for v in eight.variables:
            name = v.path.split("/")[-1]
            if name[0] in "abc" and "_" in name:
                assert is_divided(v), name
            elif name.startswith("odd_") and "accumulator" not in name:
                assert is_divided(v, 1), name  # 600 elements a device are no whole blocks
        for line in text.splitlines():
            assert not re.search(r"= \\(?u8\\[\\S* all-gather", line), line
        assert "all-gather" in text or "all-reduce" in text  # the weights, put together
        for a, b in zip([*known, *one.variables], [*spread, *eight.variables]):
            a, b = a.numpy(), b.numpy()
            if a.dtype == np.uint8:
                from support.eight_bits import places
                away = np.abs(places(a, True) - places(b, True))
                assert (away > 0).mean() < 1e-3 and away.max() <= 1
            else:
                assert (np.abs(a - b) > 1e-5 * np.abs(b) + 1e-6).mean() < 1e-3
    """)


@pytest.mark.long
def test_fit_files_and_another_number_of_devices(tmp_path):
    run(f"""
        def on(count):
            keras.distribution.set_distribution(
                keras.distribution.DataParallel(devices=devices[:count]) if count > 1 else None
            )

        ends = []
        for count in (1, 8):
            on(count)
            model = wide.make_model(keras_adam.Adam(shard_state=count > 1, **wide.EIGHT_BITS))
            wide.fit(model)
            if count > 1:
                kept = [v for v in model.optimizer.variables if "first_kernel" in v.path]
                # 64 x 80: of 20 blocks eight devices have none that are whole.
                assert len(kept) == 4 and all(is_divided(v, 1) for v in kept)
                model.save(r"{tmp_path}/model.keras")
                state = wide.state_of(model.optimizer)
            ends.append(wide.fit(model).get_weights())
        for count in (8, 4, 1):
            on(count)
            model = keras.saving.load_model(r"{tmp_path}/model.keras")
            model.optimizer.build(model.trainable_variables)
            wide.assert_same_bits(wide.state_of(model.optimizer), state)
            ends.append(wide.fit(model).get_weights())
            kept = [v for v in model.optimizer.variables if "first_kernel" in v.path]
            assert all(is_divided(v, 4 if count == 4 else 1) for v in kept), count
        for end in ends:
            assert wide.distance(end, ends[0], wide.STARTS) < 0.02
    """)


@pytest.mark.long
def test_model_parallel():
    run("""
        mesh = keras.distribution.DeviceMesh((4, 2), ["batch", "model"], devices)
        layouts = keras.distribution.LayoutMap(mesh)
        layouts[".*rows/kernel"] = ("model", None)
        layouts[".*columns/kernel"] = (None, "model")

        def train(distribution, **options):
            keras.distribution.set_distribution(distribution)
            keras.utils.set_random_seed(0)
            model = keras.Sequential([
                keras.Input((64,)),
                keras.layers.Dense(128, name="rows"),
                keras.layers.Dense(64, name="columns"),
                keras.layers.Dense(64, name="whole"),
            ])
            model.compile(keras_adam.Adam(0.01, state_dtype="8bit", **options), loss="mse")
            rng = np.random.default_rng(0)
            x, y = rng.standard_normal((64, 64)), rng.standard_normal((64, 64))
            model.fit(x, y, batch_size=16, shuffle=False, verbose=0)
            return model

        parallel = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
        one = train(None)
        # Two devices share `rows` as they share its variable; the columns of `columns` are no whole blocks, so that
        # each device has all scales of its part. `shard_state` divides by four more where blocks can be.
        expected = {
            False: {"rows": [(32, 128), (16,)], "columns": [(128, 32), (32,)], "whole": [(64, 64), (16,)]},
            True: {"rows": [(32, 128), (16,)], "columns": [(32, 32), (8,)], "whole": [(16, 64), (4,)]},
        }
        for shard_state, shapes in expected.items():
            model = train(parallel, shard_state=shard_state)
            for a, b in zip(one.get_weights(), model.get_weights()):
                assert (np.abs(a - b) > 1e-4).mean() < 1e-2
            for name, wanted in shapes.items():
                kept = [v for v in model.optimizer.variables if f"{name}_kernel" in v.path]
                parts = [v.value.addressable_shards[0].data.shape for v in kept]
                assert parts == wanted * 2, (shard_state, name, parts)
    """)
