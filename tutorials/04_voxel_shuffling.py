# %% [markdown]
# # 4. Voxel shuffling: a task without labels
#
# In v1, v2 and v3 the CT branch reconstructs the CT. If it got the clean CT this task would be easy
# and useless: the skip connections allow it to copy the input to the output. So the input is
# *corrupted*, and the target stays clean. The paper compares two corruptions: Gaussian **noise**,
# and **voxel shuffling**, which permutes the voxels inside a cube at random. This notebook looks at
# both, at the permutation behind the second, and at what a network learns from them.
#
# You need the basics of PyTorch, no GPU and no download
# ([how long it takes](../results/tutorials.csv)).

# %%
import os
from pathlib import Path

if Path.cwd().name == "tutorials":  # Jupyter starts here; the code is one folder up
    os.chdir("..")
# Let waiting threads sleep, so that other programs can use the cores. Set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import sys
import time

sys.path.append(".")

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.ndimage import gaussian_filter

import data
import kernels
import losses
import phantom
from mirror_unet import MirrorUNet
from patches import Augmentation, PatchDataset, corrupt_ct

plt.rcParams["figure.dpi"] = 90
# Colors of the Okabe-Ito palette, for color-blind readers, too.
NOISE, SHUFFLE, CLEAN = "#0072B2", "#D55E00", "#444a54"

# %% [markdown]
# ## What it looks like
#
# `phantom.py` draws a synthetic patient; `preprocess` resamples it to the network's grid and scales
# the CT values of a window to 0 to 1. We cut a patch of $64^3$ voxels of 4 mm out of the chest
# and corrupt it with `patches.corrupt_ct`, the function that training uses. It takes a batch of CT
# and PET and leaves the PET untouched. All its random numbers follow from a *key*, one integer per
# sample. You see slices from below (axial), from the front (coronal) and from the side (sagittal).

# %%
spacing = (4.0, 4.0, 4.0)
phantom.write_petct("cache/tutorials/petct-4mm", 1, spacing=spacing)
case = data.find_petct("cache/tutorials/petct-4mm")[0]
preprocessing = data.Preprocessing(spacing=spacing)
study = data.preprocess(case, preprocessing)
print("HU that become 0 and 1:", preprocessing.ct_window)
image = torch.from_numpy(study["image"].astype(np.float32))  # (2, D, H, W): CT, PET
clean = image[None, :, 16:80, 4:68, 90:154]  # (1, 2, 64, 64, 64)

key = torch.tensor([7])
views = {
    "clean": clean,
    "noise, sigma 0.3": corrupt_ct(clean, "noise", key),
    "shuffled, 1 cube of 16³": corrupt_ct(clean, "shuffle", key),
    "shuffled, 12 cubes of 16³": corrupt_ct(clean, "shuffle", key, cubes=12),
}
assert all(torch.equal(view[:, 1], clean[:, 1]) for view in views.values())  # the PET is the same

moved = (views["shuffled, 1 cube of 16³"] != clean)[0, 0].nonzero()
x, y, z = moved.float().mean(0).round().int().tolist()  # slices through the center of the cube
fig, axes = plt.subplots(3, 4, figsize=(9, 7.4), layout="constrained")
for column, (title, view) in zip(axes.T, views.items()):
    ct = view[0, 0]
    for ax, plane in zip(column, (ct[:, :, z], ct[:, y], ct[x])):
        shown = ax.imshow(plane.T, origin="lower", cmap="gray", vmin=-0.1, vmax=1.1)
        ax.set(xticks=[], yticks=[])
    column[0].set_title(title, fontsize=10)
for ax, name in zip(axes[:, 0], ("axial", "coronal", "sagittal")):
    ax.set_ylabel(name)
fig.colorbar(shown, ax=axes, shrink=0.5, label="CT value", extend="both")
plt.show()

# %% [markdown]
# ## What is kept, and what is destroyed
#
# Look at a single cube. There are two ways to describe it without its geometry: its **histogram**
# says how often each value occurs, wherever it is; its **power spectrum** says how much of its
# contrast is in low and how much in high frequencies (it is the squared magnitude of the Fourier
# transform). The spectrum of a structured image falls: in natural images low frequencies are the
# strongest.
#
# **Your turn.** Which of the two does a shuffle keep, and which does noise keep?


# %%
def spectrum(cubes):
    """Mean power of 8 frequencies, in cycles per cube side, of cubes (N, 16, 16, 16)."""
    power = np.abs(np.fft.fftn(cubes, axes=(1, 2, 3))) ** 2
    f = np.fft.fftfreq(16, 1 / 16)
    squares = f[:, None, None] ** 2 + f[None, :, None] ** 2 + f[None, None, :] ** 2
    distance = np.sqrt(squares).round().astype(int)
    return [power[:, distance == n].mean() for n in range(1, 9)]


def split_into_cubes(image):
    """(1, 1, 64, 64, 64) -> (64, 16, 16, 16)."""
    cubes = image[0, 0].unfold(0, 16, 16).unfold(1, 16, 16).unfold(2, 16, 16)
    return cubes.reshape(-1, 16, 16, 16).numpy()


places = (0, 16, 32, 48)
corners = torch.tensor([[[i, j, k] for i in places for j in places for k in places]])  # (1, 64, 3)
ct = clean[:, :1]  # (1, 1, 64, 64, 64)
versions = {
    "clean": ct,
    "noise": corrupt_ct(clean, "noise", key)[:, :1],
    "shuffled": kernels.voxel_shuffle(ct, corners, 16, seed=7),  # all 64 cubes of the patch
}
styles = {
    "clean": dict(color=CLEAN, lw=5, alpha=0.4),
    "noise": dict(color=NOISE, lw=2, ls="--"),
    "shuffled": dict(color=SHUFFLE, lw=2),
}
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
for name, image in versions.items():
    options = dict(bins=100, range=(-0.6, 1.6), histtype="step", label=name)
    left.hist(image.flatten(), **options, **styles[name])
    power = spectrum(split_into_cubes(image))
    right.semilogy(range(1, 9), power, marker="o", label=name, **styles[name])
left.set(title="histogram of the whole patch", xlabel="CT value", ylabel="voxels", yscale="log")
right.set(title="power spectrum, mean over 64 cubes of 16³", ylabel="power")
right.set(xlabel="frequency, cycles per cube side")
left.legend()
right.legend()
plt.show()

sorted_values = [versions[name].flatten().sort().values for name in ("shuffled", "clean")]
print("the shuffled patch has exactly the same values:", torch.equal(*sorted_values))

# %% [markdown]
# **Answer.**
#
# * The **shuffle** keeps the histogram exactly, and thus the mean and the contrast of each cube. It
#   makes the spectrum *white*: the power of the low frequencies is spread evenly over all. Values
#   stay, structure is lost.
# * **Noise** broadens the histogram (it makes values that no tissue has) and leaves the low
#   frequencies almost unchanged: it only adds a constant, below which the high frequencies vanish.
#   Structure stays, values are lost.
#
# So the two corruptions ask for different abilities. Noise is removed by *averaging neighbors*.
# Does this also help against a shuffle? We smooth both with a Gaussian filter, the simplest kind of
# averaging, and measure the distance to the clean CT:

# %%
widths = np.linspace(0, 4, 17)
target = ct[0, 0].numpy()
fig, ax = plt.subplots(figsize=(9, 3.2), layout="constrained")
for name, marker in (("noise", "o"), ("shuffled", "s")):
    image = versions[name][0, 0].numpy()
    errors = [np.mean((gaussian_filter(image, width) - target) ** 2) for width in widths]
    ax.plot(widths, errors, marker=marker, label=name, **styles[name])
    best = int(np.argmin(errors))
    print(f"{name:9} error {errors[0]:.3f}, at best {errors[best]:.3f}", end=" ")
    print(f"with a width of {widths[best]} voxels")
variance = split_into_cubes(ct).var((1, 2, 3)).mean()  # within a cube; a shuffle does not change it
print(f"every cube replaced by its mean: error {variance:.3f}")
ax.axhline(variance, color=CLEAN, ls=":", label="every cube replaced by its mean")
ax.set(xlabel="width of the Gaussian filter, voxels", ylabel="mean squared error", ylim=(0, None))
ax.set_title("What averaging achieves")
ax.legend()
plt.show()

# %% [markdown]
# A narrow filter removes most of the noise. Against the shuffle averaging soon reaches its limit,
# close to the mean of the cube, because it has no information about the arrangement inside a cube.
# To do better one has to know what belongs there, from the surroundings and from other patients:
# the wall of a lung is on *this* side, a rib has *that* thickness. The paper reports that shuffling
# helps the segmentation more than noise, and noise more than no corruption. In our own short runs
# on real studies the three segmentations cannot be distinguished, and the network that was trained
# with noise reconstructs a clean CT worst
# ([claim 2](../results/README.md#the-papers-claims-on-40-real-petct-studies)).
#
# ## A permutation without a table
#
# How does one shuffle? The usual way is a list of the $16^3=4096$ positions in random order. On a
# GPU this list must be made, stored and read for each sample and each cube of a batch. There is a
# more elegant way: a *formula* for the position that the voxel at $(i,j,k)$ comes from. It must
# look random, and it must be a **bijection**: no position is used twice, none is left out. A hash
# function $h$ scrambles numbers but is not invertible, so this seems impossible. The solution comes
# from cryptography (Feistel). For a cube of side $s$:
#
# $$i\leftarrow i+h(j,k)\bmod s\qquad\text{then}\qquad j\leftarrow j+h(k,i)\bmod s
#   \qquad\text{then}\qquad k\leftarrow k+h(i,j)\bmod s$$
#
# and so on for several rounds, with a different $h$ in each step. Why is this a bijection? The
# first step changes only $i$. From its result one still knows $j$ and $k$, can compute $h(j,k)$,
# and can *subtract* it. So each step can be undone, whatever $h$ is, and therefore also the whole
# chain, in reverse order. A function that can be undone never maps two positions to one.


# %%
def h(a, b, step, key):
    """Any function to integers works. This one multiplies and drops the last bits."""
    return (a * 40503 + b * 30011 + step * 7919 + key) * 69621 % 2147483647 >> 8


def apply_steps(i, j, k, size, key, rounds=4):
    """Return a list of the coordinates: before the first step and after each step."""
    position, history = [i, j, k], [(i, j, k)]
    for step in range(3 * rounds):
        a, b, c = step % 3, (step + 1) % 3, (step + 2) % 3
        position[a] = (position[a] + h(position[b], position[c], step, key)) % size
        history.append(tuple(position))
    return history


size = 16
start = np.indices((size, size, size))  # i, j and k of all 4096 positions
history = apply_steps(*start, size, key=7)
i, j, k = history[-1]
index = (i * size + j) * size + k
print("each of the 4096 positions occurs once:", sorted(index.flatten()) == list(range(size**3)))

# %% [markdown]
# **Your turn.** Write `my_undo`, which recovers $(i,j,k)$ from the last result of `apply_steps`.
# Then replace `h` by anything you like, for example a function that always returns 3. Is the result
# still a bijection? Is it a good shuffle?


# %% tags=["exercise"]
def my_undo(i, j, k, size, key, rounds=4):
    """The coordinates from which `apply_steps` started."""
    raise NotImplementedError  # your turn


# %% tags=["check"]
def check_undo(undo):
    for side, key in ((4, 7), (16, 7), (16, 8)):
        before = np.indices((side, side, side))
        try:
            found = undo(*apply_steps(*before, side, key)[-1], side, key)
        except NotImplementedError:
            return print("not yet: my_undo is empty")
        if found is None or not all(np.array_equal(a, b) for a, b in zip(found, before)):
            return print(
                f"not yet: it does not undo the shuffle of a cube of {side}³ with key {key}"
            )
    print("right")


check_undo(my_undo)

# %% [markdown]
# The answer (folded; click on the dots to open it):


# %% jupyter={"source_hidden": true} tags=["solution"]
def undo(i, j, k, size, key, rounds=4):
    """The coordinates from which `apply_steps` started."""
    position = [i, j, k]
    for step in reversed(range(3 * rounds)):
        a, b, c = step % 3, (step + 1) % 3, (step + 2) % 3
        position[a] = (position[a] - h(position[b], position[c], step, key)) % size
    return tuple(position)


check_undo(undo)

# %% [markdown]
# To see the steps, look at one slice of the cube. Each row of the figure shows one coordinate as a
# brightness, from 0 (dark) to 15 (bright):

# %%
restored = undo(*history[-1], size, key=7)
pictures = {
    "start": history[0],
    "step 1: i": history[1],
    "step 2: j": history[2],
    "step 3: k": history[3],
    "4 rounds": history[-1],
    "undone": restored,
}
fig, axes = plt.subplots(3, 6, figsize=(9, 4.9), layout="constrained")
for column, (title, position) in zip(axes.T, pictures.items()):
    column[0].set_title(title, fontsize=10)
    for ax, values in zip(column, position):
        ax.imshow(values[:, :, 8].T, origin="lower", cmap="cividis", vmin=0, vmax=size - 1)
        ax.set(xticks=[], yticks=[])
for ax, name in zip(axes[:, 0], "ijk"):
    ax.set_ylabel(name, rotation=0, labelpad=10)
plt.show()
print("step 1 shifts the rows of this slice by", *((history[1][0] - start[0]) % size)[0, :, 8])
for title, position in (("start", history[0]), ("after 4 rounds", history[-1])):
    pairs = [np.corrcoef(a[:-1].ravel(), a[1:].ravel())[0, 1] for a in position]
    print(f"{title:14} correlation of neighbors along i:", *[f"{r:5.2f}" for r in pairs])

# %% [markdown]
# The first step shifts the rows by different amounts (the first line above), so the order within a
# row stays. Three steps have changed every coordinate once, and after four rounds neighbors have
# nothing in common any more (the last line: a correlation near 0). (With $h=3$ the map is still a
# bijection: it moves the cube as a whole, by a multiple of 3 along each axis, and does not shuffle
# it at all.)
#
# `kernels.voxel_shuffle` of the library does the same with a better hash, in one pass over memory,
# with the same bits on CPU and GPU. It takes the corners and the side of the cubes and the key
# (`seed`); `inverse=True` undoes it. Its gradient is simple, too: if $y=\Pi x$ with a permutation
# matrix $\Pi$, then $\frac{dL}{dx}=\Pi^T\frac{dL}{dy}=\Pi^{-1}\frac{dL}{dy}$, the inverse shuffle.

# %%
corner = torch.tensor([[[24, 20, 24], [30, 26, 30]]])  # two cubes that overlap, one after the other
shuffled = kernels.voxel_shuffle(ct, corner, 16, seed=7)
restored = kernels.voxel_shuffle(shuffled, corner, 16, seed=7, inverse=True)
wrong_key = kernels.voxel_shuffle(shuffled, corner, 16, seed=8, inverse=True)

x = ct.clone().requires_grad_()
weights = torch.randn(ct.shape)
(kernels.voxel_shuffle(x, corner, 16, seed=7) * weights).sum().backward()
expected = kernels.voxel_shuffle(weights, corner, 16, seed=7, inverse=True)
print("restored, bit for bit:", torch.equal(restored, ct))
print("restored with another key:", torch.equal(wrong_key, ct))
print("gradient = inverse shuffle:", torch.equal(x.grad, expected))

fig, axes = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained")
titles = ("clean", "two cubes shuffled", "inverse, same key", "inverse, another key")
for ax, image, title in zip(axes, (ct, shuffled, restored, wrong_key), titles):
    ax.imshow(image[0, 0, :, 31].T, origin="lower", cmap="gray", vmin=0, vmax=1)
    ax.set_title(title, fontsize=10)
    ax.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# The key determines everything, and this is worth more than it seems: a training sample is
# corrupted in the same way whatever the number of loader processes, on any device, and after a run
# was stopped and resumed.
#
# ## Learning to restore
#
# Now we train a network on this task: only the CT branch of a v1, one half of a Mirror U-Net, since
# the other half does not see the CT. There are three runs with the same initial weights: no
# corruption, noise, shuffling. To be fast they use voxels of 6 mm, narrow layers, 100 steps, and 24
# cubes per patch instead of one. A cube has a side of 8 voxels, here 48 mm; the 16 voxels of the
# paper are 32 to 48 mm. `PatchDataset` cuts random patches out of sixteen studies; four studies of
# other patients are held out.

# %%
import contextlib
import io

spacing = (6.0, 6.0, 6.0)
phantom.write_petct("cache/tutorials/petct-6mm", 20, spacing=spacing)
with contextlib.redirect_stderr(io.StringIO()):  # without the progress bar
    found = data.find_petct("cache/tutorials/petct-6mm")[:20]
    preprocessing = data.Preprocessing(spacing=spacing)
    cases = data.build_cache(found, preprocessing, "cache/tutorials/arrays", workers=1)
print("held out:", *[case.name for case in cases[-4:]])
SIDE, CUBES, STEPS = 8, 24, 100


def batch_of(patches, numbers):
    """Images (B, 2, D, H, W) and keys (B,) of some patches."""
    items = [patches[n] for n in numbers]
    return torch.stack([p["image"] for p in items]), torch.stack([p["key"] for p in items])


size, flips = (48, 48, 48), Augmentation(flip_axes=(0,))
test, test_keys = batch_of(PatchDataset(cases[-4:], size, 8, seed=1), range(8))
target = test[:, :1]  # (8, 1, 48, 48, 48)

# The test has eight cubes per patch at known places, so that their means can be computed, too.
places = (8, 32)
grid = torch.tensor([[i, j, k] for i in places for j in places for k in places])
grid = grid.expand(8, -1, -1)  # (8, 8, 3): the same places in all patches
cube_mean, in_cubes = target.clone(), torch.zeros_like(target, dtype=torch.bool)
for i, j, k in grid[0].tolist():
    cube = (..., slice(i, i + SIDE), slice(j, j + SIDE), slice(k, k + SIDE))
    cube_mean[cube] = target[cube].mean((2, 3, 4), keepdim=True)
    in_cubes[cube] = True
inputs = {
    "none": target,
    "noise": corrupt_ct(test, "noise", test_keys)[:, :1],
    "shuffle": kernels.voxel_shuffle(target, grid, SIDE, test_keys),
}


# %%
def train(how):
    """Train a CT branch; return it and its test outputs every 20 steps."""
    torch.manual_seed(0)
    branch = MirrorUNet("v1", channels=(8, 16, 32, 64, 128)).ct
    optimizer = torch.optim.Adam(branch.parameters(), 5e-3)
    training = PatchDataset(cases[:-4], size, 2 * (STEPS + 1), seed=0, aug=flips)
    outputs = {}
    for step in range(STEPS + 1):
        if step % 20 == 0 or step == STEPS:
            with torch.no_grad():
                outputs[step] = branch.decode(*branch.encode(inputs[how]))
        image, keys = batch_of(training, (2 * step, 2 * step + 1))
        corrupted = corrupt_ct(image, how, keys, SIDE, CUBES)[:, :1]
        loss = losses.l2(branch.decode(*branch.encode(corrupted)), image[:, :1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return branch, outputs


begin = time.perf_counter()
branches, outputs = {}, {}
for how in inputs:
    branches[how], outputs[how] = train(how)
print(f"three trainings of {STEPS} steps: {time.perf_counter() - begin:.0f} seconds")

# %% [markdown]
# Here are the results before and after training, for a patient that the network has never seen, in
# a slice through four shuffled cubes:

# %%
# Of two coronal slices of each patch, show the one that shuffling changes the most.
slices = (12, 36)
change = (inputs["shuffle"] - target)[:, 0, :, slices].square().mean((1, 3))  # (8, 2)
patch, y = divmod(int(change.argmax()), 2)
y = slices[y]
fig, axes = plt.subplots(3, 5, figsize=(9, 5.6), layout="constrained")
for row, (how, out) in zip(axes, outputs.items()):
    images = {"target": target, "input": inputs[how], "untrained": out[0]}
    images |= {"20 steps": out[20], f"{STEPS} steps": out[STEPS]}
    for ax, (title, image) in zip(row, images.items()):
        ax.imshow(image[patch, 0, :, y].T, origin="lower", cmap="gray", vmin=0, vmax=1)
        ax.set_title(title if how == "none" else "", fontsize=10)
        ax.set(xticks=[], yticks=[])
        if how == "shuffle":
            for corner in ((8, 8), (8, 32), (32, 8), (32, 32)):
                lower_left = (corner[0] - 0.5, corner[1] - 0.5)
                box = plt.Rectangle(lower_left, SIDE, SIDE, fill=False, ec=SHUFFLE, lw=1.2)
                ax.add_patch(box)
    row[0].set_ylabel(how)
plt.show()

# %% [markdown]
# The pattern of small squares comes from the transposed convolutions and fades slowly. How good is
# the result in numbers? For the shuffle we count only the voxels of the eight cubes, and compare
# with simple methods: leave the input as it is, smooth it, or replace each cube by its mean
# (shuffle).


# %%
def error(image, where=slice(None)):
    return ((image - target)[where] ** 2).mean().item()


def smoothed(image, width):
    filtered = [gaussian_filter(sample[0].numpy(), width) for sample in image]
    return torch.from_numpy(np.stack(filtered))[:, None]


everywhere = slice(None)
settings = {  # corruption: which voxels count, widths of the filter, color and marker
    "noise": (everywhere, (0.5, 0.75, 1, 1.5), NOISE, "o-"),
    "shuffle": (in_cubes, (1, 1.5, 2, 3, 4), SHUFFLE, "s-"),
}
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for ax, (how, (where, widths, color, style)) in zip(axes, settings.items()):
    before = error(inputs[how], where)
    filtered = min(error(smoothed(inputs[how], width), where) for width in widths)
    curve = {step: error(image, where) for step, image in outputs[how].items() if step}
    ax.plot(list(curve), list(curve.values()), style, color=color, label="network")
    ax.axhline(before, color=CLEAN, lw=1, ls=":", label="input")
    ax.axhline(filtered, color=CLEAN, lw=1, ls="--", label="best Gaussian filter")
    ax.set(title=f"{how}: error on held-out patches", ylim=(0, None))
    ax.set(xlabel="training step", ylabel="mean squared error")
    ax.legend()
    print(f"{how:8} input {before:.3f}   best Gaussian filter {filtered:.3f}", end="   ")
    print(f"network {curve[STEPS]:.3f}")
print(f"shuffle  mean of each cube {error(cube_mean, in_cubes):.3f}")
plt.show()

# %% [markdown]
# In 100 steps the network gets from values near zero to a blurred body. The lines above compare it
# with the best of a few Gaussian filters, which need no training: its error is far below that of
# its input, but not far below that of the filter, or even above it; in the cubes it no longer falls
# after the first steps. In the cubes the filter also beats the mean of the cube, because it uses
# the surroundings. What the shuffle really asks for, to know what belongs in a place, takes more
# than sixteen patients and 100 steps. The paper trains for 400 epochs.
#
# **Your turn.** What does a network that was trained on one corruption do with the other? Guess the
# table before you look at it: a row is what a network was trained on, a column what it gets as
# input.

# %%
table = np.zeros((3, 3))
with torch.no_grad():
    for i, branch in enumerate(branches.values()):
        for j, image in enumerate(inputs.values()):
            table[i, j] = error(branch.decode(*branch.encode(image)), in_cubes)

fig, ax = plt.subplots(figsize=(5.5, 3), layout="constrained")
limits = dict(vmin=np.log(0.015), vmax=np.log(0.1))
ax.imshow(np.log(table), cmap="Oranges", aspect="auto", **limits)
for (i, j), value in np.ndenumerate(table):
    ax.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=12)
ax.set(xticks=range(3), xticklabels=inputs, xlabel="input")
ax.set(yticks=range(3), yticklabels=branches, ylabel="trained on")
ax.set_title("mean squared error in the eight cubes", fontsize=11)
plt.show()
trained = list(branches)
for how, column in zip(inputs, table.T):
    best, worst = trained[column.argmin()], trained[column.argmax()]
    print(f"input {how:8} best after training on {best:8} {column.min():.3f}", end="   ")
    print(f"worst on {worst:8} {column.max():.3f}")

# %% [markdown]
# One would expect the smallest error of each column on the diagonal, in the row of the same
# corruption. The lines above say where it is: for shuffled cubes it need not be the network that
# was trained on them. After such a short training each network is a blurred copier, and the one
# that blurs the most may win in a cube without structure. A *pretext task* (one that is trained for
# its effect on another) has to be compared with exactly this baseline: the same network, trained
# for as long on *another* corruption and without any, and next to it the simple methods.
#
# **Your turn.** Set `STEPS = 1000` in a new cell above "def train" (the training then takes as much
# longer as there are more steps; its time is printed there) and run the cells from there on again.
# Does the row "shuffle" become better than the others in its column? And with `CUBES = 1`, as in
# the paper, so that only one small cube per patch is shuffled?
#
# **Where to continue.** `corrupt_ct` is in [`patches.py`](../patches.py), the permutation and the
# proof are in [`kernels/voxel_shuffle.py`](../kernels/voxel_shuffle.py); `train.py` has the options
# `--corrupt`, `--cube`, `--cubes` and `--sigma`.
