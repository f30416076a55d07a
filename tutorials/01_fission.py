# %% [markdown]
# # 1. Fission: two networks that share a bottleneck
#
# A PET/CT scanner takes two pictures of the same body. **PET** shows where sugar is used: tumors light up, and so do brain, heart,
# kidneys and bladder. **CT** shows what the body is made of. To find tumors one wants both, and nearly every network *fuses* them:
# the two images enter as two channels, or two predictions are averaged at the end.
#
# Mirror U-Net ([arXiv 2303.07126](https://arxiv.org/abs/2303.07126)) does the opposite, **fission**: each modality keeps a U-Net of its
# own, each U-Net gets a *task* of its own, and only a few layers belong to both. This notebook takes the network apart: what it is made
# of, what is shared, and what follows from that. You need PyTorch's basics and the paper's abstract. It runs in about a minute, without
# a GPU and with nothing to download.

# %%
import os
from pathlib import Path

if Path.cwd().name == "tutorials":  # where Jupyter starts; the code is one folder up
    os.chdir("..")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # lets two cores be shared with other programs; must come before torch

import sys
from io import BytesIO

sys.path.append(".")

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image

import data
import figures
import phantom
from losses import MirrorLoss
from mirror_unet import MirrorUNet, from_official

plt.rcParams["figure.dpi"] = 90

# %% [markdown]
# ## Two pictures of one patient
#
# The patients here are made up: `phantom.py` draws synthetic bodies. `write_petct` writes them as NIfTI files, `find_petct` lists them, and
# `preprocess` brings one to the network's grid and scales both images to values of about 0 to 1, exactly as with real data.

# %%
spacing = (6.0, 6.0, 6.0)  # mm: coarse, so that everything here is quick
phantom.write_petct("cache/tutorials/petct-6mm", 2, spacing=spacing)
case = data.find_petct("cache/tutorials/petct-6mm")[0]
study = data.preprocess(case, data.Preprocessing(spacing=spacing))
ct, pet = study["image"].astype(np.float32)
tumor = study["label"]

where = int(tumor.sum((0, 2)).argmax())  # the coronal slice with the most tumor
fig, axes = plt.subplots(1, 3, figsize=(8.5, 6.6), layout="constrained")
axes[0].imshow(ct[:, where].T, origin="lower", cmap="gray")
axes[1].imshow(pet.max(1).T, origin="lower", cmap="gray_r", vmax=0.7)
axes[2].imshow(pet[:, where].T, origin="lower", cmap="gray_r", vmax=0.7)
axes[2].contour(tumor[:, where].T, [0.5], colors=figures.TRUTH)
for ax, title in zip(axes, ("CT, one slice", "PET, brightest along the view", "PET, tumors outlined")):
    ax.set(title=title, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# In the projection (middle; uptake is dark) one sees four tumors: two that the slice on the right outlines, one in the spine and one
# in the liver. Brain and bladder are as dark, and kidneys not much lighter. How far does each modality get by its values alone? Here
# are all voxels of the body, and those of the tumors:

# %%
body = ct > 0
fig, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
for ax, image, title in ((axes[0], ct, "CT: -100 to 250 HU became 0 to 1"), (axes[1], pet, "PET: SUV 0 to 15 became 0 to 1")):
    for mask, color, label in ((body, "#8a919c", "body"), (tumor > 0, figures.TRUTH, "tumor")):
        ax.hist(image[mask], bins=50, range=(0, 1), density=True, histtype="stepfilled", alpha=0.6, color=color, label=label)
    ax.set(title=title, yscale="log", ylabel="share of voxels (log scale)", yticks=[])
axes[1].legend()
plt.show()

low, high = np.percentile(ct[tumor > 0], [10, 90])
alike = ((ct[body] > low) & (ct[body] < high)).mean()
hotter = (pet[body] > np.median(pet[tumor > 0])).mean()
print(f"{(tumor[body] > 0).mean():.1%} of the body's voxels are tumor")
print(f"CT: {alike:.0%} of them have values like the middle four fifths of the tumors' voxels")
print(f"PET: {hotter:.1%} of them are hotter than half of the tumors' voxels")

# %% [markdown]
# In CT three of the tumors have the values of soft tissue, and the one in the spine those of bone (at 1). PET has the contrast, but
# most of what is hot is not tumor. So the modalities are not two views of one kind: they are good at *different tasks*.
#
# **Why not fuse, then?** In early fusion (two channels into one U-Net) no layer belongs to a modality, and a single loss decides what
# is taken from which: nothing asks for the anatomy as such. In late fusion (two U-Nets, predictions averaged) the CT has to segment
# what it hardly shows. Fission gives each its own task:
#
# * the **PET** branch segments the tumor;
# * the **CT** branch reconstructs its own (corrupted) input: a task that needs no labels and is all anatomy;
# * both send their features through **the same bottleneck weights**, which must therefore serve both.
#
# That this beats fusion is the paper's claim; this notebook shows how it works, not that it wins. Here is the network, drawn from the
# live object: box sizes are the true sizes, and levels 1 to 9 are numbered as in the paper.


# %%
def draw(net, size=(96, 96, 96)):
    png = BytesIO()
    figures.architecture(net, png, size)
    return Image(png.getvalue(), width=860)


v3 = MirrorUNet("v3")
draw(v3)

# %% [markdown]
# ## What is shared: ask the objects
#
# A branch is a list of nine levels. Sharing level 5 means that *the same module object* sits in both lists. In Python that is the `is`
# operator, nothing more.

# %%
for n, (a, b) in enumerate(zip(v3.ct.levels, v3.pet.levels), start=1):
    print(f"level {n}   {type(a).__name__:13}  {'one object, in both branches' if a is b else 'two objects'}")

# %% [markdown]
# So a step of the optimiser that was asked for by one branch changes the other one, too. Let us change a shared and an unshared weight
# in the CT branch and look at the PET branch:

# %%
with torch.no_grad():
    for n in (4, 5):
        weight = v3.ct.levels[n - 1].units[0].conv.weight
        weight[0, 0, 0, 0, 0] = 42.0
        seen = v3.pet.levels[n - 1].units[0].conv.weight[0, 0, 0, 0, 0]
        print(f"level {n}: wrote 42 into the CT branch, the PET branch holds {seen:.3f}")

# %% [markdown]
# The paper calls the set of shared levels $L$ and studies several. Each row below is a network built with that `share`; a cell is
# filled where `ct.levels[n] is pet.levels[n]`.

# %%
shares = [(), (3,), (4,), (5,), (6,), (7,), (4, 5, 6), (3, 4, 5, 6, 7)]
nets = [MirrorUNet("v1", share) for share in shares]
same = np.array([[a is b for a, b in zip(net.ct.levels, net.pet.levels)] for net in nets])
millions = [sum(p.numel() for p in net.parameters()) / 1e6 for net in nets]

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
left.pcolormesh(same, cmap="Purples", vmax=1.3, edgecolors="white", linewidth=2)
left.set(xticks=np.arange(9) + 0.5, xticklabels=range(1, 10), xlabel="level", title="shared levels")
left.set(yticks=np.arange(len(shares)) + 0.5, yticklabels=[f"L = {set(s) if s else '{ }'}" for s in shares])
left.invert_yaxis()
bars = right.barh(np.arange(len(shares)) + 0.5, millions, color=figures.SHARED, height=0.7)
right.bar_label(bars, fmt="%.2f", padding=3)
right.set(xlabel="million parameters (v1)", xlim=(0, 11.5), title="a shared level counts once")
plt.show()

# %% [markdown]
# **Your turn.** $L=\{5\}$ saves more than $L=\{3\}$, $\{4\}$, $\{6\}$ and $\{7\}$ do. Before you go on: why? (Look at the drawing: what
# is wide at level 5?)
#
# ## Shapes at every level
#
# Answer: a convolution from $a$ to $b$ channels has $27ab$ weights, and level 5 is where channels are many, 128 to 256. Its images are
# small, though: four strides of two leave $96/16=6$ voxels a side. A forward hook on every level writes down what comes out:

# %%
shapes = {}
for n, level in enumerate(v3.pet.levels, start=1):
    level.register_forward_hook(lambda module, inputs, output, n=n: shapes.__setitem__(n, tuple(output.shape)))

with torch.no_grad():
    out = v3.eval()(torch.rand(1, 2, 96, 96, 96))  # channel 0 CT, channel 1 PET
weights = [sum(p.numel() for p in level.parameters()) for level in v3.pet.levels]
values = [int(np.prod(shapes[n])) for n in range(1, 10)]
print("level   output of a 96 x 96 x 96 patch    values     weights")
for n in range(1, 10):
    print(f"  {n}     {str(shapes[n]):26}   {values[n - 1]:9,}   {weights[n - 1]:9,}")

# %%
fig, ax = plt.subplots(figsize=(9, 3), layout="constrained")
at = np.arange(1, 10)
ax.bar(at - 0.2, np.array(values) / 1e6, 0.4, color=figures.PET, edgecolor=figures.INK, label="values that come out (millions)")
ax.bar(at + 0.2, np.array(weights) / 1e6, 0.4, color=figures.SHARED, edgecolor=figures.INK, label="weights (millions)")
ax.set(xticks=at, xlabel="level of one branch", title="Memory goes to the ends, parameters to the middle")
ax.legend()
plt.show()

# %% [markdown]
# Sharing the bottleneck therefore costs little freedom where images are fine, and ties the branches where each value has seen a large
# part of the patch. The paper finds $L=\{5\}$ best, and sharing shallower, deeper or more levels worse.
#
# ## Four versions
#
# The same two branches, four sets of tasks. v3 is above; here are the other three.
#
# | version | CT decoder | PET decoder | from the bottleneck |
# |---|---|---|---|
# | v1 | reconstruct CT | segment | – |
# | v2 | reconstruct CT | segment | a light decoder reconstructs PET from *both* bottlenecks |
# | v3 | reconstruct CT | segment | as v2, and a classifier: is there a tumor at all? |
# | v4 | segment | segment | –; the two segmentations are averaged, $w\cdot\mathrm{CT}+(1-w)\cdot\mathrm{PET}$ with $w=0.1$ |

# %%
draw(MirrorUNet("v1"))

# %%
draw(MirrorUNet("v2"))

# %%
draw(MirrorUNet("v4"))

# %% [markdown]
# The network returns a named tuple; a field is `None` where a version has no such output. `seg` holds logits (numbers whose softmax are
# the probabilities) of background and tumor.

# %%
x = torch.rand(1, 2, 32, 32, 32)
for version in ("v1", "v2", "v3", "v4"):
    fields = MirrorUNet(version).eval()(x)._asdict()
    print(version, {name: tuple(value.shape) for name, value in fields.items() if value is not None})

# %% [markdown]
# ## Parameters by part
#
# Each parameter is counted once, under the part that owns it. `parameters()` already lists a shared one only once.


# %%
def part_of(name, net):
    branch, *rest = name.split(".")
    if rest[:1] == ["levels"] and int(rest[1]) + 1 in net.share:
        return "shared"
    return {"ct": "CT branch", "pet": "PET branch", "bottleneck_decoder": "light decoder"}.get(branch, branch)


parts = {"CT branch": figures.CT, "PET branch": figures.PET, "shared": figures.SHARED, "light decoder": "#8a919c", "classifier": "#2b2f36"}
fig, ax = plt.subplots(figsize=(9, 2.8), layout="constrained")
for row, version in enumerate(("v1", "v2", "v3", "v4")):
    net, start = MirrorUNet(version), 0
    count = dict.fromkeys(parts, 0)
    for name, p in net.named_parameters():
        count[part_of(name, net)] += p.numel()
    for part, n in count.items():
        ax.barh(row, n / 1e6, left=start, color=parts[part], edgecolor="white", label=part if row == 2 else None)
        start += n / 1e6
    ax.text(start + 0.1, row, f"{sum(count.values()):,}", va="center")
    print(version, {part: f"{n:,}" for part, n in count.items() if n})
ax.set(yticks=range(4), yticklabels=["v1", "v2", "v3", "v4"], xlabel="million parameters", xlim=(0, 10))
ax.invert_yaxis()
fig.legend(loc="outside upper center", ncols=5)
plt.show()

# %% [markdown]
# Of v1's 6.9 million each branch has 2.1 to itself; the one shared level alone has 2.7.
#
# ## Loading the authors' weights
#
# The authors published their code; this network computes the same function, and `from_official` reads a state dict (a checkpoint's
# names and tensors) of theirs. Their file is **not** here, so we make one that looks like it: a network's own weights, under the names
# that the release gives them. The two functions that do the renaming are those by which `from_official` reads, so this cell alone would
# not prove that the names are right; the tests do, against outputs and gradients that the authors' code computed.

# %%
from mirror_unet import _official_name, _official_prefixes

torch.manual_seed(0)
donor = MirrorUNet("v3", norm="batch").eval()  # the release uses batch norm; our default is instance norm
prefixes = _official_prefixes("v3", (5,), ups_finest_first=True)
official = {_official_name(name, prefixes): value for name, value in donor.state_dict().items()}
print(f"{len(donor.state_dict())} names here, {len(official)} in the official style: what is shared is named once there")
for name in ("ct.levels.0.units.1.conv.weight", "pet.levels.8.up.slope", "ct.levels.4.shortcut.bias", "pet.levels.4.shortcut.bias"):
    print(f"{name:32} -> {_official_name(name, prefixes)}")

# %%
loaded, report = from_official(official)
print({key: report[key] for key in ("version", "preset", "share", "channels", "left_over")})
with torch.no_grad():
    print("same outputs, bit for bit:", all(torch.equal(a, b) for a, b in zip(donor(x), loaded(x))))

# %% [markdown]
# Version, share set and widths were read off the names and shapes alone. With a file it is `from_official(torch.load(file,
# weights_only=True))`; `weights_only` means that a stranger's file cannot run code. What does not fit is refused, not half-loaded:

# %%
try:
    from_official({name: value for name, value in official.items() if name != "dec.1.0.conv.bias"})
except ValueError as error:
    print(error)

# %% [markdown]
# ## Weights are shared, not features
#
# Now the point that is easiest to miss. Follow the arrows in v1's drawing from "segment tumor" back to the left: decoder, bottleneck,
# encoder, PET. No arrow comes from the CT. The branches use the same *weights* at level 5, but each sends its own image through them.
#
# **Your turn.** If that is so, what happens to the segmentation of v1, v2, v3 and v4 when the CT is replaced by noise? And the two
# reconstructions? Write down your guess.
#
# To have something to look at, we first train each version for some seconds on 48 slices of the one patient above. (So this says
# nothing about other patients. The loss is the subject of the next notebook; `MirrorLoss` knows each version's.)

# %%
low = int(np.clip(tumor.sum((0, 1)).argmax() - 24, 0, tumor.shape[2] - 48))
slab = torch.from_numpy(study["image"][None, :, 8:56, :, low : low + 48]).float()  # (1, 2, 48, 48, 48)
truth = torch.from_numpy(tumor[None, None, 8:56, :, low : low + 48]).long()
batch = {"ct": slab[:, :1], "pet": slab[:, 1:], "seg": truth, "tumor": torch.ones(1)}

trained = {}
for version in ("v1", "v2", "v3", "v4"):
    torch.manual_seed(0)
    net, loss = MirrorUNet(version, channels=(8, 16, 32, 64, 128)), MirrorLoss(version)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(50):
        total, parts_of_loss = loss(net(slab), batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    trained[version] = net.eval()
    print(f"{version}: Dice loss {parts_of_loss['seg_dice']:.2f}")

# %% [markdown]
# Now each network twice: with the patient's CT, and with noise in its place.

# %%
torch.manual_seed(1)
noisy = slab.clone()
noisy[:, 0] = torch.rand_like(slab[:, 0])

changes, tumor_maps = {}, {}
with torch.no_grad():
    for version, net in trained.items():
        before, after = net(slab), net(noisy)
        tumor_maps[version] = [o.seg.softmax(1)[0, 1].numpy() for o in (before, after)]
        for name, a, b in zip(before._fields, before, after):
            if a is not None:
                changes[version, name] = (a - b).abs().max().item()

print("largest change of an output when CT becomes noise")
for version in trained:
    print(f"{version}   " + "   ".join(f"{name} {c:.4f}" for (v, name), c in changes.items() if v == version))
assert all(changes[v, "seg"] == 0 for v in ("v1", "v2", "v3")) and changes["v3", "tumor"] == 0  # not small: zero
assert changes["v4", "seg"] > 0

# %%
y = int(truth[0, 0].sum((0, 2)).argmax())
fig, axes = plt.subplots(4, 4, figsize=(8, 6.6), layout="constrained")
inputs = (("CT", slab[0, 0], "gray"), ("noise in its place", noisy[0, 0], "gray"), ("PET", slab[0, 1], "gray_r"))
for ax, (title, image, cmap) in zip(axes[:, 0], inputs):
    ax.imshow(image[:, y].T, origin="lower", cmap=cmap, vmax=0.7 if title == "PET" else 1)
    ax.set_ylabel(title)
axes[3, 0].axis("off")
for row, version in zip(axes[:, 1:], trained):
    a, b = tumor_maps[version]
    row[0].imshow(a[:, y].T, origin="lower", cmap="magma", vmin=0, vmax=1)
    row[1].imshow(b[:, y].T, origin="lower", cmap="magma", vmin=0, vmax=1)
    shown = row[2].imshow(np.abs(a - b)[:, y].T, origin="lower", cmap="magma", vmin=0, vmax=0.1)
    row[0].set_ylabel(version, fontsize=13)
for ax, title in zip(axes[0], ("inputs", "P(tumor), with the CT", "P(tumor), with noise", "difference")):
    ax.set_title(title, fontsize=10)
for ax in axes.ravel():
    ax.set(xticks=[], yticks=[])
for ax in axes[:, 1:].ravel():
    ax.contour(truth[0, 0, :, y].T, [0.5], colors="white", linewidths=0.8)
fig.colorbar(shown, ax=axes[:, 3], shrink=0.7)
plt.show()

# %% [markdown]
# **Answer.** In v1, v2 and v3 the segmentation and v3's classifier do not change by one bit, whatever the share set. What does change:
# the CT's reconstruction of course, and the PET's reconstruction in v2 and v3, since the light decoder reads both bottlenecks. v4's
# segmentation changes, because its CT branch votes with weight $w=0.1$.
#
# This follows from the architecture (the authors' own code behaves so, too), and the paper does not spell it out. Two consequences:
#
# * At test time a v1–v3 is a PET network. It needs no CT, and `segment` runs just the half that matters, with equal bits.
# * The CT acts in *training* only: its loss moves the shared weights. That is a gradient, and we can measure it.

# %%
net = trained["v3"]
with torch.no_grad():
    print("PET alone gives the same segmentation:", torch.equal(net.segment(slab[:, 1:]).seg, net(slab).seg))

out = net(slab)
pulls = {"CT reconstruction": (out.ct - batch["ct"]).square().mean(), "segmentation": MirrorLoss("v4")(out, batch)[0]}
table = {}
for task, value in pulls.items():
    for n in range(1, 10):
        for branch in ("ct", "pet"):
            level = getattr(net, branch).levels[n - 1]
            grads = torch.autograd.grad(value, list(level.parameters()), retain_graph=True, allow_unused=True)
            table[task, branch, n] = sum(g.square().sum() for g in grads if g is not None) ** 0.5

fig, axes = plt.subplots(1, 2, figsize=(9, 2.5), sharey=True, layout="constrained")
for ax, task in zip(axes, pulls):
    reached = np.array([[float(table[task, branch, n]) > 0 for n in range(1, 10)] for branch in ("ct", "pet")])
    ax.pcolormesh(reached, cmap="Greens", vmin=0, vmax=1.4, edgecolors="white", linewidth=2)
    ax.set(title=f"levels that the {task} trains", xlabel="level", xticks=np.arange(9) + 0.5, xticklabels=range(1, 10))
    ax.set(yticks=(0.5, 1.5), yticklabels=("CT branch", "PET branch"), ylim=(2, 0))
plt.show()

# %% [markdown]
# The CT's loss reaches one level of the PET branch, the shared one. Through that level alone the CT has its say in the segmentation.
#
# **Your turn.** Build `MirrorUNet("v1", share=(4, 5, 6))` and `MirrorUNet("v1", share=())` in place of `net` (and `pulls` as above).
# Which cells fill? What, with nothing shared, is a v1? The answers are checked in the next cell.

# %%
for share in ((4, 5, 6), ()):
    net = MirrorUNet("v1", share, channels=(4, 4, 4, 4, 4))
    value = net(slab).ct.square().mean()
    value.backward()
    reached = [n for n, level in enumerate(net.pet.levels, start=1) if any(p.grad is not None for p in level.parameters())]
    print(f"share={share}: the CT's loss trains levels {reached} of the PET branch")

# %% [markdown]
# With nothing shared, a v1 is two networks that happen to be trained at the same time; and the CT is of no use to the segmentation at all.
#
# **Where to go on.** [`mirror_unet.py`](../mirror_unet.py) is the whole network in under 400 lines. Notebook 2 is about the losses, 4
# about the corruption that makes the CT's reconstruction worth learning, and 5 trains a v3 and looks at its errors.
