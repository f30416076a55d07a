# %% [markdown]
# # 4. Voxel shuffling: a task without labels
#
# In v1, v2 and v3 the CT branch reconstructs the CT. Given the clean CT that would be an easy task, and a useless one: copy the input
# to the output, the skip connections lead straight there. So the input is *corrupted* and the target stays clean. The paper compares
# two corruptions: Gaussian **noise**, and **voxel shuffling**, in which the voxels inside a cube change places at random. This notebook
# looks at both, at the permutation behind the second, and at what a network can make of them.
#
# You need PyTorch's basics. It runs in a minute or two, without a GPU and with nothing to download.

# %%
import os
from pathlib import Path

if Path.cwd().name == "tutorials":  # where Jupyter starts; the code is one folder up
    os.chdir("..")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # lets two cores be shared with other programs; must come before torch

import sys

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

plt.rcParams["figure.dpi"] = 90
NOISE, SHUFFLE, CLEAN = "#1b6ca8", "#d95f02", "#444a54"

# %% [markdown]
# ## What it looks like
#
# A synthetic patient (`phantom.py` draws it; `preprocess` brings it to the network's grid and scales CT values of -100 to 250 HU to 0
# to 1). We cut a patch of $64^3$ voxels of 4 mm out of the chest and corrupt it with `data.corrupt_ct`, the function that training
# uses. It takes a batch with CT and PET, leaves the PET alone, and draws everything random from a *key*, one integer a sample.

# %%
spacing = (4.0, 4.0, 4.0)
phantom.write_petct("cache/tutorials/petct-4mm", 1, spacing=spacing)
study = data.preprocess(data.find_petct("cache/tutorials/petct-4mm")[0], data.Preprocessing(spacing=spacing))
whole = torch.from_numpy(study["image"].astype(np.float32))  # (2, D, H, W): CT, PET
clean = whole[None, :, 16:80, 4:68, 90:154]  # (1, 2, 64, 64, 64)

key = torch.tensor([7])
views = {
    "clean": clean,
    "noise, sigma 0.3": data.corrupt_ct(clean, "noise", key),
    "shuffled, 1 cube of 16³": data.corrupt_ct(clean, "shuffle", key),
    "shuffled, 12 cubes of 16³": data.corrupt_ct(clean, "shuffle", key, cubes=12),
}
assert all(torch.equal(view[:, 1], clean[:, 1]) for view in views.values())  # the PET is untouched

moved = (views["shuffled, 1 cube of 16³"] != clean)[0, 0].nonzero()
x, y, z = moved.float().mean(0).round().int().tolist()  # slices through the middle of the one cube
fig, axes = plt.subplots(3, 4, figsize=(9, 7.4), layout="constrained")
for column, (title, view) in zip(axes.T, views.items()):
    for ax, plane in zip(column, (view[0, 0, :, :, z], view[0, 0, :, y], view[0, 0, x])):
        ax.imshow(plane.T, origin="lower", cmap="gray", vmin=-0.1, vmax=1.1)
        ax.set(xticks=[], yticks=[])
    column[0].set_title(title, fontsize=10)
for ax, name in zip(axes[:, 0], ("from below", "from the front", "from the side")):
    ax.set_ylabel(name)
plt.show()

# %% [markdown]
# ## What each keeps, and what it destroys
#
# Look at a cube on its own. Two ways to describe it without looking at it as a picture: its **histogram**, which values occur how
# often, wherever they are; and its **spectrum**, how much of its contrast is in slow and how much in fast waves (the squared size of
# its Fourier transform). Structure, be it large or small, is what makes a spectrum fall: in pictures of the world slow waves are
# strongest.
#
# **Your turn.** Which of the two does a shuffle keep, which does noise keep?


# %%
def spectrum(cubes):
    """Mean power at each frequency, in cycles a cube side: (N, 16, 16, 16) -> 8 numbers."""
    power = np.abs(np.fft.fftn(cubes, axes=(1, 2, 3))) ** 2
    f = np.fft.fftfreq(16, 1 / 16)
    distance = np.sqrt(f[:, None, None] ** 2 + f[None, :, None] ** 2 + f[None, None, :] ** 2).round().astype(int)
    return [power[:, distance == n].mean() for n in range(1, 9)]


corners = torch.tensor([[[i, j, k] for i in (0, 16, 32, 48) for j in (0, 16, 32, 48) for k in (0, 16, 32, 48)]])  # 64 cubes fill the patch
ct = clean[:, :1]
versions = {
    "clean": (ct, CLEAN),
    "noise": (data.corrupt_ct(clean, "noise", key)[:, :1], NOISE),
    "shuffled": (kernels.voxel_shuffle(ct, corners, 16, seed=7), SHUFFLE),
}
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
for name, (image, color) in versions.items():
    style = dict(color=color, lw=4 if name == "clean" else 2, alpha=0.5 if name == "clean" else 1.0, label=name)
    left.hist(image.flatten(), bins=100, range=(-0.6, 1.6), histtype="step", **style)
    blocks = image[0, 0].unfold(0, 16, 16).unfold(1, 16, 16).unfold(2, 16, 16).reshape(-1, 16, 16, 16).numpy()
    right.semilogy(range(1, 9), spectrum(blocks), "o-", **style)
left.set(title="histogram of the whole patch", xlabel="CT value", yscale="log", ylabel="voxels")
right.set(title="spectrum, mean over 64 cubes of 16³", xlabel="waves a cube side (slow to fast)", ylabel="power")
left.legend()
right.legend()
plt.show()

same = torch.equal(versions["shuffled"][0].flatten().sort().values, ct.flatten().sort().values)
print(f"after the shuffle exactly the same values are there: {same}")

# %% [markdown]
# **Answer.**
#
# * The **shuffle** keeps the histogram, to the last voxel, and so each cube's mean and contrast. It *whitens* the spectrum: the power
#   that was in slow waves is spread evenly over all. Values stay, structure goes.
# * **Noise** smears the histogram (there are values that no tissue has) and leaves the slow waves nearly as they were: it only adds a
#   floor, on which the fast ones drown. Structure stays, values go.
#
# So the two ask for different abilities. Noise is undone by *averaging neighbours*. Does that help against a shuffle? Smooth both with
# a Gaussian filter, the simplest averaging there is, and measure the distance to the clean CT:

# %%
widths = np.linspace(0, 4, 17)
fig, ax = plt.subplots(figsize=(9, 3.2), layout="constrained")
for name in ("noise", "shuffled"):
    image, color = versions[name]
    errors = [np.mean((gaussian_filter(image[0, 0].numpy(), w) - ct[0, 0].numpy()) ** 2) for w in widths]
    ax.plot(widths, errors, "o-", color=color, label=name)
    best = int(np.argmin(errors))
    print(f"{name:9} error {errors[0]:.3f}, at best {errors[best]:.3f}, at a width of {widths[best]} voxels")
variance = blocks.var((1, 2, 3)).mean()  # within a shuffled cube, and within the clean one: it is the same
ax.axhline(variance, color=SHUFFLE, ls="--", lw=1, label="every cube replaced by its mean")
ax.set(xlabel="width of the Gaussian filter, voxels", ylabel="mean squared error", ylim=(0, None), title="How far averaging goes")
ax.legend()
plt.show()

# %% [markdown]
# A narrow filter removes most of the noise. Against the shuffle averaging soon comes to its end, near the cube's mean: what lies where
# in a cube is lost to it. To do better one has to know what belongs there, from the surroundings and from other patients: the air of a
# lung with its wall at *this* side, a rib of *that* thickness. The paper reports that shuffling helps the segmentation more than noise,
# and noise more than nothing.
#
# ## A permutation without a table
#
# How does one shuffle? The usual way is a list of the $16^3=4096$ places in random order. On a GPU, for each sample and cube of a
# batch, that list has to be made, stored and read. There is a prettier way: a *formula* for where the voxel at $(i,j,k)$ comes from. It
# must look random, and it must be a **bijection**: no place used twice, none left out. With a hash function $h$, which scrambles
# numbers and is anything but invertible, that seems hopeless. The trick is Feistel's, from cryptography. For a cube of side $s$:
#
# $$i\leftarrow i+h(j,k)\bmod s\qquad\text{then}\qquad j\leftarrow j+h(k,i)\bmod s\qquad\text{then}\qquad k\leftarrow k+h(i,j)\bmod s$$
#
# and again, some rounds, $h$ a different one in each step. Why this is a bijection: the first step changes only $i$. Whoever sees the
# result still has $j$ and $k$, so can compute $h(j,k)$, and *subtract* it. Each step can be undone, whatever $h$ is; so can the chain,
# from its end. And what can be undone has mixed up no two places.


# %%
def h(a, b, step, key):
    """Any function to whole numbers will do. This one multiplies and throws the last bits away."""
    return (a * 40503 + b * 30011 + step * 7919 + key) * 27644437 % 65521 >> 5


def steps(i, j, k, size, key, rounds=4):
    """The coordinates after each single step, as a list that begins with the coordinates themselves."""
    at, seen = [i, j, k], [(i, j, k)]
    for step in range(3 * rounds):
        a, b, c = step % 3, (step + 1) % 3, (step + 2) % 3
        at[a] = (at[a] + h(at[b], at[c], step, key)) % size
        seen.append(tuple(at))
    return seen


size = 16
places = np.indices((size, size, size))  # i, j and k of all 4096 places
seen = steps(*places, size, key=7)
index = (seen[-1][0] * size + seen[-1][1]) * size + seen[-1][2]
print("each of the 4096 places occurs once:", sorted(index.flatten()) == list(range(size**3)))

# %% [markdown]
# **Your turn.** Write `undo`, which finds $(i,j,k)$ from what `steps` ends with. Then choose any `h` you like, for instance one that
# always returns 3: still a bijection? A good shuffle? The answer, with a check:


# %%
def undo(i, j, k, size, key, rounds=4):
    """The coordinates from which `steps` came here."""
    at = [i, j, k]
    for step in reversed(range(3 * rounds)):
        a, b, c = step % 3, (step + 1) % 3, (step + 2) % 3
        at[a] = (at[a] - h(at[b], at[c], step, key)) % size
    return tuple(at)


back = undo(*seen[-1], size, key=7)
print("undone:", all(np.array_equal(a, b) for a, b in zip(back, places)))

# %% [markdown]
# To see it, give each voxel a colour that says where it comes from (red for $i$, green for $j$, blue for $k$) and watch one slice of
# the cube:

# %%
fig, axes = plt.subplots(1, 6, figsize=(9, 2.1), layout="constrained")
pictures = [("the places", seen[0]), ("step 1: i moves", seen[1]), ("step 2: j", seen[2]), ("step 3: k", seen[3])]
for ax, (title, at) in zip(axes, [*pictures, ("4 rounds", seen[-1]), ("undone", back)]):
    ax.imshow(np.stack(at, -1)[:, :, 8].swapaxes(0, 1) / (size - 1), origin="lower")
    ax.set_title(title, fontsize=10)
    ax.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# The first step slides each row of the cube by its own amount, so that rows keep their order within. Three steps have moved every
# coordinate, and after four rounds no trace is left. (With $h=3$ it is a bijection, too: the cube is moved as a whole, by a multiple of
# 3 along each axis, and is not shuffled at all.)
#
# The library's `kernels.voxel_shuffle` is this with a better hash, in one pass over memory, on CPU and GPU with the same bits. It takes
# corners and side of the cubes, and the key (`seed`); `inverse=True` undoes it. Its gradient needs no thought either: if $y=\Pi x$ with
# a permutation matrix $\Pi$, then $\frac{dL}{dx}=\Pi^T\frac{dL}{dy}=\Pi^{-1}\frac{dL}{dy}$: the inverse shuffle.

# %%
corner = torch.tensor([[[24, 20, 24], [30, 26, 30]]])  # two cubes, which overlap: the second shuffles what the first has left
shuffled = kernels.voxel_shuffle(ct, corner, 16, seed=7)
restored = kernels.voxel_shuffle(shuffled, corner, 16, seed=7, inverse=True)
wrong_key = kernels.voxel_shuffle(shuffled, corner, 16, seed=8, inverse=True)

x = ct.clone().requires_grad_()
weights = torch.randn(ct.shape)
(kernels.voxel_shuffle(x, corner, 16, seed=7) * weights).sum().backward()
print("restored, bit for bit:", torch.equal(restored, ct), "  with a wrong key:", torch.equal(wrong_key, ct))
print("gradient = inverse shuffle:", torch.equal(x.grad, kernels.voxel_shuffle(weights, corner, 16, seed=7, inverse=True)))

fig, axes = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained")
titles = ("clean", "two cubes shuffled", "inverse, same key", "inverse, another key")
for ax, image, title in zip(axes, (ct, shuffled, restored, wrong_key), titles):
    ax.imshow(image[0, 0, :, 31].T, origin="lower", cmap="gray", vmin=0, vmax=1)
    ax.set_title(title, fontsize=10)
    ax.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# That the key decides everything is worth more than it seems: the same training sample is corrupted in the same way whatever the number
# of loader processes, on any device, and after a run was stopped and resumed.
#
# ## Learning to restore
#
# Now train a network on it: the CT branch of a v1 alone, one half of a Mirror U-Net, since the other half does not see the CT. Three
# times from the same start: nothing corrupted, noise, shuffling. To be quick: voxels of 6 mm, narrow layers, 100 steps, and 24
# cubes a patch instead of one. The cubes have a side of 8 voxels, here 48 mm; the paper's 16 voxels are 32 to 48 mm. `PatchDataset`
# cuts random patches out of sixteen studies; four studies of other patients are held out.

# %%
import contextlib
import io

spacing = (6.0, 6.0, 6.0)
phantom.write_petct("cache/tutorials/petct-6mm", 20, spacing=spacing)
with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
    found = data.find_petct("cache/tutorials/petct-6mm")[:20]
    cases = data.build_cache(found, data.Preprocessing(spacing=spacing), "cache/tutorials/arrays", workers=1)
print("held out:", *[case.name for case in cases[-4:]])
SIDE, CUBES, STEPS = 8, 24, 100


def batch_of(patches, numbers):
    items = [patches[n] for n in numbers]
    return torch.stack([item["image"] for item in items]), torch.stack([item["key"] for item in items])


patches = data.PatchDataset(cases[:-4], (48, 48, 48), 1000, seed=0, aug=data.Augmentation(flip_axes=(0,)))
test, test_keys = batch_of(data.PatchDataset(cases[-4:], (48, 48, 48), 8, seed=1), range(8))
target = test[:, :1]

# For the test eight cubes a patch, in places that we know: so we can also replace each by its mean.
grid = torch.tensor([[i, j, k] for i in (8, 32) for j in (8, 32) for k in (8, 32)]).expand(8, -1, -1)
cube_mean, touched = target.clone(), torch.zeros_like(target, dtype=torch.bool)
for i, j, k in grid[0].tolist():
    where = (..., slice(i, i + SIDE), slice(j, j + SIDE), slice(k, k + SIDE))
    cube_mean[where] = target[where].mean((2, 3, 4), keepdim=True)
    touched[where] = True
test_in = {
    "none": target,
    "noise": data.corrupt_ct(test, "noise", test_keys)[:, :1],
    "shuffle": kernels.voxel_shuffle(target, grid, SIDE, test_keys),
}

# %%
histories, branches = {}, {}
for how in test_in:
    torch.manual_seed(0)
    branch = MirrorUNet("v1", channels=(8, 16, 32, 64, 128)).ct
    optimizer = torch.optim.Adam(branch.parameters(), 5e-3)
    history = histories[how] = {}
    for step in range(STEPS + 1):
        if step % 20 == 0:  # look at the held-out patches on the way
            with torch.no_grad():
                history[step] = branch.decode(*branch.encode(test_in[how]))
        image, keys = batch_of(patches, (2 * step, 2 * step + 1))
        corrupted = data.corrupt_ct(image, how, keys, SIDE, CUBES)[:, :1]
        loss = losses.l2(branch.decode(*branch.encode(corrupted)), image[:, :1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    branches[how] = branch

# %% [markdown]
# Before and after, on a patient that the network has never seen, in a slice that goes through four shuffled cubes:

# %%
moved = (test_in["shuffle"] - target)[:, 0, :, (12, 36)].square().mean((1, 3))  # in two coronal slices of each patch
one, y = divmod(int(moved.argmax()), 2)  # the patch, and which of the slices, where shuffling does most
y = (12, 36)[y]
fig, axes = plt.subplots(3, 5, figsize=(9, 5.6), layout="constrained")
for row, how in zip(axes, histories):
    history = histories[how]
    images = (target, test_in[how], history[0], history[20], history[STEPS])
    for ax, image, title in zip(row, images, ("target", "input", "untrained", "20 steps", "100 steps")):
        ax.imshow(image[one, 0, :, y].T, origin="lower", cmap="gray", vmin=0, vmax=1)
        ax.set_title(title if how == "none" else "", fontsize=10)
        ax.set(xticks=[], yticks=[])
        for a, b in ((8, 8), (8, 32), (32, 8), (32, 32)):
            if how == "shuffle":
                ax.add_patch(plt.Rectangle((a - 0.5, b - 0.5), SIDE, SIDE, fill=False, ec=SHUFFLE, lw=1.2))
    row[0].set_ylabel(how)
plt.show()

# %% [markdown]
# The pattern of little squares comes from the up-sampling layers, and fades slowly. How good is it in numbers? For the shuffle, count
# the voxels of the eight cubes only, and compare with easy answers: to leave the input as it is, to smooth it, to replace each
# cube by its mean (shuffle).


# %%
def error(image, where=slice(None)):
    return ((image - target)[where] ** 2).mean().item()


def smoothed(image, width):
    return torch.from_numpy(np.stack([gaussian_filter(c[0].numpy(), width) for c in image]))[:, None]


easy = {  # the best of several widths
    "noise": min(error(smoothed(test_in["noise"], w)) for w in (0.5, 0.75, 1, 1.5)),
    "shuffle": min(error(smoothed(test_in["shuffle"], w), touched) for w in (1, 1.5, 2, 3, 4)),
}
print(f"shuffle: mean of the cube {error(cube_mean, touched):.3f}")
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for ax, how, where, color in ((axes[0], "noise", slice(None), NOISE), (axes[1], "shuffle", touched, SHUFFLE)):
    curve = {step: error(image, where) for step, image in histories[how].items() if step}
    ax.plot(list(curve), list(curve.values()), "o-", color=color, label="network")
    ax.axhline(error(test_in[how], where), color=CLEAN, lw=1, ls=":", label="input as it is")
    ax.axhline(easy[how], color=CLEAN, lw=1, ls="--", label="best Gaussian filter")
    ax.set(title=f"{how}: error on held-out patches", xlabel="training step", ylabel="mean squared error", ylim=(0, None))
    ax.legend()
    print(f"{how:8} input {error(test_in[how], where):.3f}   best Gaussian filter {easy[how]:.3f}   network {curve[STEPS]:.3f}")
plt.show()

# %% [markdown]
# From noise to a blurred body in 100 steps; and, to be honest about it, not yet better than the best of a few Gaussian filters. In the
# cubes network and filter beat the cube's mean (0.048), because they let the surroundings flow in. What the shuffle really asks for, to
# know what belongs in a place, is not learned from sixteen patients in 100 steps. The paper trains for 400 epochs.
#
# **Your turn.** What does a network that was trained on one corruption do with the other? Guess the table before you look: rows are
# what a network was trained on, columns what it is given.

# %%
table = np.zeros((3, 3))
with torch.no_grad():
    for i, how in enumerate(branches):
        for j, given in enumerate(test_in):
            table[i, j] = error(branches[how].decode(*branches[how].encode(test_in[given])), touched)

fig, ax = plt.subplots(figsize=(5.5, 3), layout="constrained")
ax.imshow(np.log(table), cmap="Oranges", aspect="auto", vmin=np.log(0.015), vmax=np.log(0.1))
for (i, j), value in np.ndenumerate(table):
    ax.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=12)
ax.set(xticks=range(3), xticklabels=test_in, yticks=range(3), yticklabels=branches, xlabel="given", ylabel="trained on")
ax.set_title("mean squared error inside the eight cubes", fontsize=11)
plt.show()

# %% [markdown]
# The rows are nearly the same: after so short a training each network is a blurring copier, and what it was trained on hardly shows,
# least of all in the first column. That is the baseline against which a pretext task has to prove itself: the same network, trained as
# long, *without* it, and the easy answers beside it.
#
# **Your turn.** Set `STEPS = 1000` (ten minutes or so) and run the last cells again: does the row "shuffle" pull away in its column?
# And with `CUBES = 1`, as in the paper, where only half a percent of the voxels are shuffled?
#
# **Where to go on.** `corrupt_ct` is in [`data.py`](../data.py), the permutation with its proof in
# [`kernels/voxel_shuffle.py`](../kernels/voxel_shuffle.py); `train.py` has `--corrupt`, `--cube`, `--cubes` and `--sigma`.
