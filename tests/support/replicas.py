"""Train on one device or on several: `python -m support.replicas ENGINE OUT [RANK PROCESSES ADDRESS]`.

Writes, for each case, the weights that each replica of this process ended with. The engine "one" is a single device.
With a rank, this is one of several processes; the address is that of the first.
"""

import contextlib
import json
import os
import sys

import numpy as np

CASES = {
    "plain": {},
    "clipnorm": {"clipnorm": 0.05},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "accumulation": {"gradient_accumulation_steps": 4},
    "average": {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 5},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.1, "decoupled_weight_decay": False},
    "groups": {
        "weight_decay": 0.1,
        "param_groups": [{"params": ".*/bias", "learning_rate_multiplier": 0.1, "weight_decay": 0}],
    },
    "bfloat16": {},
    "8bit": {"state_dtype": "8bit"},
    "skip_nonfinite": {"skip_nonfinite": True},
    "late": {"skip_nonfinite": True},
    "monitor": {
        "monitor": 1,
        "skip_spikes": 6.0,
        "global_clipnorm": 0.5,
        "param_groups": [{"params": ".*/bias", "learning_rate_multiplier": 0.1}],
    },
}
OPTIMIZERS = []  # of the models, in their order
STEPS, BATCH = 16, 16


def cases_of(engine):
    # TensorFlow's collectives broadcast neither bfloat16 nor uint8: no such variable can be made under several workers.
    left_out = ("bfloat16", "8bit") if engine.startswith("multi-worker") else ()
    return [c for c in CASES if c not in left_out]


def data(case):
    rng = np.random.default_rng(7)
    x = rng.normal(size=(STEPS * BATCH, 8)).astype("float32")
    y = np.tanh(x @ rng.normal(size=(8, 3))).astype("float32")
    if case == "skip_nonfinite":
        x[5 * BATCH + 3, 2] = np.inf  # in the share of one replica
    return x, y


def compiled(case, **more):
    import keras

    import keras_adam

    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            # Of 4,096 elements where it is to be kept in 8 bits.
            keras.layers.Dense(512 if case == "8bit" else 16, activation="tanh", name="first"),
            keras.layers.Dense(3, name="second"),
        ]
    )
    optimizer = keras_adam.Adam(0.01, **CASES[case], **more)
    OPTIMIZERS.append(optimizer)
    if case == "late":  # and the count is set back to before that
        optimizer.build(model.layers[1].trainable_variables)
        optimizer.iterations.assign(9)
        optimizer.add_param_group({"params": model.layers[0]})
        optimizer.iterations.assign(5)
    model.compile(optimizer, loss="mse")
    return model


def begin(case):
    """Forget the models before; not in the scope of a distribution, which this would end."""
    import keras

    keras.utils.clear_session()
    keras.config.set_dtype_policy("bfloat16" if case == "bfloat16" else "float32")


def to_numpy(value):
    import keras

    return keras.ops.convert_to_numpy(keras.ops.cast(value, "float32"))


def weights(model):
    return [to_numpy(v) for v in model.weights]


def on_jax(distribution, case, **more):
    import jax
    import keras

    with distribution.scope() if distribution else contextlib.nullcontext():
        model = compiled(case, **more)
        if jax.process_count() == 1:
            x, y = data(case)
            model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
        else:
            import tensorflow as tf

            model.fit(tf.data.Dataset.from_tensor_slices(data(case)).batch(BATCH), verbose=0)
        if isinstance(distribution, keras.distribution.ModelParallel):
            return [weights(model)]  # a shard is not the whole
        shards = [v.value.addressable_shards for v in model.trainable_variables]
        return [[to_numpy(s.data) for s in replica] for replica in zip(*shards, strict=True)]


def jax_distribution(layout):
    import keras

    devices = keras.distribution.list_devices()
    if layout == "one":
        return None
    if layout == "data-parallel":
        return keras.distribution.DataParallel(devices=devices)
    mesh = keras.distribution.DeviceMesh((len(devices) // 2, 2), ["batch", "model"], devices)
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*first/kernel"] = (None, "model")
    layouts[".*second/kernel"] = ("model", None)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


def on_tensorflow(strategy, case, in_loop):
    import tensorflow as tf

    with strategy.scope():
        model = compiled(case)
    optimizer, variables = model.optimizer, model.trainable_variables
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    batches = tf.data.Dataset.from_tensor_slices(data(case)).batch(BATCH).with_options(options)
    if not in_loop:
        model.fit(batches, verbose=0)
    else:
        with strategy.scope():
            optimizer.build(variables)

        @tf.function
        def step(x, y):
            def run(x, y):
                with tf.GradientTape() as tape:
                    error = tf.cast(model(x, training=True), tf.float32) - y
                    loss = tf.reduce_sum(error * error) / (BATCH * 3)
                optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)

            strategy.run(run, (x, y))

        for x, y in strategy.experimental_distribute_dataset(batches):
            step(x, y)
        with strategy.scope():
            optimizer.finalize_variable_values(variables)
    components = [strategy.experimental_local_results(v.value) for v in variables]
    return [[to_numpy(c) for c in replica] for replica in zip(*components, strict=True)]


def on_torch(rank, count, case, **more):
    import torch
    from torch.nn.parallel import DistributedDataParallel

    model = compiled(case, **more)
    optimizer, variables = model.optimizer, model.trainable_variables
    optimizer.build(variables)
    parallel = DistributedDataParallel(model) if count > 1 else model
    x, y = data(case)
    share = BATCH // count
    for i in range(0, len(x), BATCH):
        rows = slice(i + rank * share, i + (rank + 1) * share)
        error = parallel(x[rows], training=True).float() - torch.from_numpy(y[rows])
        optimizer.zero_grad()
        (error * error).mean().backward()
        optimizer.apply([v.value.grad for v in variables], variables)
    optimizer.finalize_variable_values(variables)
    return [weights(model)]


def trainer(engine, rank, processes, address):
    """Return the function that trains a case on this engine."""
    import keras

    layout = engine.removesuffix("+shard_state")
    more = {"shard_state": True} if engine != layout else {}
    if keras.backend.backend() == "jax":
        if rank is not None:
            keras.distribution.initialize(address, processes, rank)
        return lambda case: on_jax(jax_distribution(layout), case, **more)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        strategy = tf.distribute.get_strategy()
        if engine.startswith("mirrored"):
            cpu = tf.config.list_physical_devices("CPU")[0]
            two = [tf.config.LogicalDeviceConfiguration()] * 2
            tf.config.set_logical_device_configuration(cpu, two)
            strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        elif rank is not None:
            host, port = address.split(":")
            workers = [address, f"{host}:{int(port) + 1}"]
            task = {"type": "worker", "index": rank}
            os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
        return lambda case: on_tensorflow(strategy, case, engine.endswith("loop"))
    if rank is None:
        return lambda case: on_torch(0, 1, case)
    import torch.distributed

    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://{address}", rank=rank, world_size=processes
    )
    return lambda case: on_torch(rank, processes, case, **more)


def main(engine, out, rank=None, processes=1, address=None):
    train = trainer(engine, rank, processes, address)
    found = {}
    for case in cases_of(engine):
        begin(case)
        replicas = train(case)
        if case == "monitor":
            measured = np.array([*OPTIMIZERS[-1].monitored().values()])
            replicas = [[*replica, measured] for replica in replicas]
        for i, replica in enumerate(replicas):
            found |= {f"{case}/{i}/{j}": array for j, array in enumerate(replica)}
    np.savez(out, **found)
    if engine.startswith("ddp"):
        import torch.distributed

        # The first process serves the others until they are done.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    engine, out, *rest = sys.argv[1:]
    main(engine, out, *(f(x) for f, x in zip((int, int, str), rest, strict=False)))
