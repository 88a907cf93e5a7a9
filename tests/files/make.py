"""How the files beside this one were made: by the code of the commits that their names tell.

git archive COMMIT keras_adam | tar -x -C /tmp/old
KERAS_BACKEND=torch PYTHONPATH=/tmp/old:tests python tests/files/make.py COMMIT
"""

import pathlib
import sys

import keras

import keras_adam
from support import wide
from support.models import EVERYTHING, START, fit, make_model

HERE = pathlib.Path(__file__).parent


def everything(commit):
    model = make_model(keras_adam.Adam(**EVERYTHING))
    fit(model)
    model.save_weights(HERE / f"everything-{commit}.weights.h5")


def joined_late(commit):
    """The kernel has an epoch alone; then the bias joins it for another one."""
    model = make_model(keras_adam.Adam(0.02, param_groups=[]))
    bias = model.layers[0].bias
    bias.trainable = False
    model.compile(model.optimizer, loss="mse")
    fit(model)
    bias.trainable = True
    group = {"params": bias, "learning_rate_multiplier": 0.5}
    model.optimizer.add_param_group(group)
    model.compile(model.optimizer, loss="mse")
    fit(model)
    model.save_weights(HERE / f"joined_late-{commit}.weights.h5")


def half(commit):
    for dtype in ("bfloat16", "float16"):
        layers = [keras.Input((4,)), keras.layers.Dense(2, dtype=dtype, name="dense")]
        model = keras.Sequential(layers, name="model")
        model.set_weights(START)
        model.compile(keras_adam.Adam(0.02, amsgrad=True, skip_nonfinite=True), loss="mse")
        fit(model)
        model.save_weights(HERE / f"{dtype}-{commit}.weights.h5")


def eight_bits(commit):
    groups = [{"params": ".*second.*", "state_dtype": "float32"}]
    model = wide.trained(amsgrad=True, param_groups=groups)
    wide.save(HERE, f"eight_bits-{commit}", model)


if __name__ == "__main__":
    commit = sys.argv[1]
    if commit == "84035b6":
        eight_bits(commit)
        sys.exit()
    everything(commit)
    if commit in ("c374e95", "0f12d19"):
        joined_late(commit)
    if commit == "0f12d19":
        half(commit)
