"""Stop a PyTorch run half-way, carry weights and optimizer state into Keras, and finish it there.

The backend is Keras's own choice: `KERAS_BACKEND=jax python examples/continue_from_pytorch.py`.
Prints the losses beside those of the same run finished in PyTorch; writes `continue_from_pytorch.png`.
"""

import io

import keras
import matplotlib.pyplot as plt
import numpy as np
import torch
from keras import layers
from sklearn.datasets import load_digits

import keras_adam

STEPS, HALF, BATCH = 300, 150, 64

digits = load_digits()
images = digits.images.astype("float32") / 16
labels = digits.target
order = np.random.default_rng(0).permuted(np.tile(np.arange(len(images)), (STEPS, 1)), axis=1)
batches = [(images[rows], labels[rows]) for rows in order[:, :BATCH]]

torch.manual_seed(0)
torch.set_num_threads(1)
net = torch.nn.Sequential(
    torch.nn.Conv2d(1, 16, 3, padding=1),
    torch.nn.ReLU(),
    torch.nn.MaxPool2d(2),
    torch.nn.Conv2d(16, 32, 3, padding=1),
    torch.nn.ReLU(),
    torch.nn.Flatten(),
    torch.nn.Linear(32 * 4 * 4, 10),
)
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)


def train_in_pytorch(batches):
    """Take a step on each batch and return their losses."""
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        logits = net(torch.tensor(x[:, None]))
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(y))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


first_half = train_in_pytorch(batches[:HALF])
checkpoint = io.BytesIO()  # stands for a file
torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
in_pytorch = train_in_pytorch(batches[HALF:])

# The same model in Keras. PyTorch flattens an image channel by channel, hence the Permute.
model = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        layers.Conv2D(16, 3, padding="same", activation="relu"),
        layers.MaxPooling2D(2),
        layers.Conv2D(32, 3, padding="same", activation="relu"),
        layers.Permute((3, 1, 2)),
        layers.Flatten(),
        layers.Dense(10),
    ]
)
model.compile(
    # Rate, betas, epsilon and decay come with the state.
    optimizer=keras_adam.Adam.with_torch_arguments(decoupled_weight_decay=True),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)

checkpoint.seek(0)
saved = torch.load(checkpoint, weights_only=True)
weights = [tensor.numpy() for tensor in saved["net"].values()]
# PyTorch's kernels are (out, in, height, width) and (out, in); Keras has (height, width, in, out) and (in, out).
model.set_weights([w.transpose(2, 3, 1, 0) if w.ndim == 4 else w.T for w in weights])
model.optimizer.build(model.trainable_variables)
model.optimizer.load_state_dict(saved["optimizer"])  # its arrays are brought into Keras's layout
in_keras = []
for x, y in batches[HALF:]:
    model.reset_metrics()  # for Keras 3.10, which returns the mean over all steps so far
    in_keras.append(float(model.train_on_batch(x[..., None], y)))

name = keras.backend.backend()
print(f"{'step':>5} {'PyTorch':>10} {'Keras, ' + name:>18} {'difference':>11}")
for i in [*range(0, STEPS - HALF, 15), STEPS - HALF - 1]:
    difference = in_keras[i] - in_pytorch[i]
    print(f"{HALF + i + 1:5} {in_pytorch[i]:10.6f} {in_keras[i]:18.6f} {difference:11.1e}")

# Both compute in float32, but sum in another order: the last of seven digits differs at once, and grows to some 1e-6 in
# the end. Without the optimizer's state the losses would soon be 1e-2 apart.
np.testing.assert_allclose(in_keras, in_pytorch, rtol=1e-3, atol=1e-5)
print(f"the losses of {STEPS - HALF} steps agree")

figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
steps = range(HALF + 1, STEPS + 1)
axes.plot(range(1, HALF + 1), first_half, color="gray", linewidth=1, label="PyTorch, first half")
axes.plot(steps, in_pytorch, color="tab:orange", linewidth=4, alpha=0.5, label="PyTorch")
axes.plot(steps, in_keras, color="tab:blue", linewidth=1, label=f"Keras on {name}")
axes.axvline(HALF + 0.5, color="gray", linestyle=":", label="handed over")
axes.set(xlabel="step", ylabel="loss of the batch", yscale="log")
axes.set_title("One training run, begun in PyTorch and finished twice")
axes.spines[["top", "right"]].set_visible(False)
axes.grid(alpha=0.3)
axes.legend(frameon=False)
figure.savefig("continue_from_pytorch.png", dpi=150)
