# %% [markdown]
# # 1. Fission: two networks that share a bottleneck
#
# A PET/CT scanner takes two images of the same body. **PET** shows where tissue takes up sugar:
# tumors light up, and so do the brain, the heart, the kidneys and the bladder. **CT** shows the
# anatomy. Both help to find tumors, and nearly every network *fuses* them: the two images enter
# as two channels, or two predictions are averaged at the end.
#
# Mirror U-Net ([arXiv 2303.07126](https://arxiv.org/abs/2303.07126)) does the opposite, called
# **fission**: each modality has its own U-Net, each U-Net has its own *task*, and the two share a
# few layers. This notebook takes the network apart: its parts, what is shared, and what follows
# from that. You need the basics of PyTorch and the abstract of the paper, no GPU and no download
# ([how long it takes](../results/tutorials.csv)).

# %%
import os
from pathlib import Path

if Path.cwd().name == "tutorials":  # Jupyter starts here; the code is one folder up
    os.chdir("..")
# Let waiting threads sleep, so that other programs can use the cores. Set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import sys
from io import BytesIO

sys.path += [".", "tutorials"]

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image
from scipy import ndimage

import data
import figures
import phantom
import slices
from losses import MirrorLoss
from mirror_unet import MirrorUNet, from_official

plt.rcParams["figure.dpi"] = 90

# %% [markdown]
# ## Two images of one patient
#
# The patients in these notebooks are synthetic: `phantom.py` draws them. `write_petct` writes them
# as NIfTI files (`.nii.gz`, a format of medical images), `find_petct` lists the files, and
# `preprocess` resamples a study to the network's grid, exactly as it does with real data. CT is
# measured in Hounsfield units (HU: water is zero, air far below, bone far above), PET in SUV
# (standardized uptake value: the uptake divided by what an even spread over the body would give).
# `preprocess` cuts both off at the ends of a *window* and scales the window to 0 to 1.

# %%
spacing = (6.0, 6.0, 6.0)  # mm; coarse, so that this notebook is fast
phantom.write_petct("cache/tutorials/petct-6mm", 2, spacing=spacing)
case = data.find_petct("cache/tutorials/petct-6mm")[0]
preprocessing = data.Preprocessing(spacing=spacing)
study = data.preprocess(case, preprocessing)
ct, pet = study["image"].astype(np.float32)  # (D, H, W) each
tumor = study["label"]  # (D, H, W)


def in_units(values, window):
    """From 0 to 1 back to HU or SUV; what was outside the window is at its end."""
    low, high = window
    return low + (high - low) * values


hu = in_units(ct, preprocessing.ct_window)
suv = in_units(pet, preprocessing.suv_window)
print("CT in the window of", preprocessing.ct_window, "HU, PET of", preprocessing.suv_window, "SUV")

y = int(tumor.sum((0, 2)).argmax())  # the coronal slice with the most tumor
fig, axes = plt.subplots(1, 3, figsize=(8.5, 6.6), layout="constrained")
shown = axes[0].imshow(hu[:, y].T, origin="lower", cmap="gray")
fig.colorbar(shown, ax=axes[0], location="bottom", label="HU")
for ax, picture in ((axes[1], suv.max(1)), (axes[2], suv[:, y])):
    shown = ax.imshow(picture.T, origin="lower", cmap="gray_r", vmin=0, vmax=10)
    fig.colorbar(shown, ax=ax, location="bottom", label="SUV", extend="max")
axes[1].contour(tumor.max(1).T, [0.5], colors=figures.TRUTH)
axes[2].contour(tumor[:, y].T, [0.5], colors=figures.TRUTH)
titles = ("CT, one slice", "PET, maximum projection", "PET, the same slice as the CT")
for ax, title in zip(axes, titles):
    ax.set_title(title, fontsize=10)
    ax.set(xticks=[], yticks=[])
outline = plt.Line2D([], [], color=figures.TRUTH, label="true tumor")
fig.legend(handles=[outline], loc="outside lower center")
plt.show()

parts, count = ndimage.label(tumor, np.ones((3, 3, 3)))  # components of voxels that touch
ml = np.prod(spacing) / 1000
print(f"{count} tumors, from the feet to the head:")
for n in sorted(range(1, count + 1), key=lambda n: np.argwhere(parts == n)[:, 2].mean()):
    here = parts == n
    print(f"{here.sum() * ml:6.1f} ml   mean CT {hu[here].mean():4.0f} HU", end="   ")
    print(f"mean PET {suv[here].mean():4.1f} SUV")

# %% [markdown]
# You see the patient from the front, so the left lung is on the right. In the projection (in the
# middle) each pixel is the highest value from front to back; high uptake is dark. Without the
# outlines you would see three of the tumors, in the left lung, in the spine and in the liver. The
# lowest one is as dark as the bladder next to it and merges with it; the slice on the right shows
# it. There the tumor in the lung is a ring: its core is dead and takes up little. Brain and bladder
# are as dark as the tumors, and the kidneys only a little lighter.
#
# A projection hides what a slice shows. Here are several such slices (*coronal* ones) through the
# tumors, and a slider through all of them if ipywidgets is installed and you run this cell:

# %%
pictures = {
    "CT": (hu, dict(cmap="gray"), "HU"),
    "PET": (suv, dict(cmap="gray_r", vmin=0, vmax=10), "SUV"),
}
browser = slices.show(pictures, {"true tumor": tumor}, spacing, plane="coronal", number=6)

# %% [markdown]
# How well can the values of one modality separate tumor from normal tissue? The histograms show
# all voxels of the body and those of the tumors:

# %%
body = ct > 0
fig, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
titles = ("CT: -100 to 250 HU scaled to 0 to 1", "PET: SUV 0 to 15 scaled to 0 to 1")
for ax, image, title in zip(axes, (ct, pet), titles):
    options = dict(bins=50, range=(0, 1), density=True)
    ax.hist(image[body], histtype="stepfilled", color="#c9ced6", label="body", **options)
    ax.hist(image[tumor > 0], histtype="step", color=figures.TRUTH, lw=2, label="tumor", **options)
    ax.set(title=title, xlabel="value", yscale="log", ylabel="density (log scale)", yticks=[])
axes[1].legend()
plt.show()

low, high = np.percentile(ct[tumor > 0], [10, 90])
similar = ((ct[body] > low) & (ct[body] < high)).mean()
brighter = pet > np.median(pet[tumor > 0])
print(f"{(tumor[body] > 0).mean():.1%} of the body's voxels are tumor")
print(f"CT:  {similar:.0%} of the body has values in the central 80 % of the tumors' values")
print(f"PET: {brighter[body].mean():.1%} of the body is brighter than the tumors' median;", end=" ")
print(f"{(tumor[brighter] == 0).mean():.0%} of that is not tumor")

# %% [markdown]
# On CT the tumors have the values of the tissue around them (the list above: the one in the spine
# those of bone, the others those of soft tissue). PET has the contrast, but most of what is bright
# on PET is not tumor. So the two modalities are not interchangeable: they are good at *different
# tasks*.
#
# **Why not fuse them?** In early fusion (two channels into one U-Net) no layer belongs to one
# modality, and a single loss decides what is used of which image; nothing asks for the anatomy
# itself. In late fusion (two U-Nets, averaged predictions) the CT network has to segment what CT
# hardly shows. Fission gives each modality its own task:
#
# * the **PET** branch segments the tumor;
# * the **CT** branch reconstructs its own (corrupted) input, a task that needs no labels and
#   consists of anatomy only;
# * both pass their features through **the same bottleneck weights**, which must serve both tasks.
#
# The paper claims that fission beats fusion. This notebook shows how fission works, not that it is
# better. Here is the network, drawn from the live object, with the levels numbered from 1 to 9 as
# in the paper. `16 @ 48³` is a feature map of 16 channels and 48³ voxels; `cat` concatenates the
# channels of both bottlenecks.


# %%
def draw(net, size=(96, 96, 96)):
    png = BytesIO()
    figures.architecture(net, png, size)
    return Image(png.getvalue(), width=860)


torch.manual_seed(0)
v3 = MirrorUNet("v3")
draw(v3)

# %% [markdown]
# ## What is shared?
#
# A branch is a list of nine levels: 1 to 4 are the encoder, 5 is the bottleneck, 6 to 9 the decoder
# (an `UpLayer` doubles each side). Level 5 is shared: *the same module object* is in both lists. In
# Python the operator `is` tests this.

# %%
for n, (a, b) in enumerate(zip(v3.ct.levels, v3.pet.levels), start=1):
    shared = "one object, in both branches" if a is b else "two objects"
    print(f"level {n}   {type(a).__name__:13}  {shared}")

# %% [markdown]
# So an optimizer step that comes from the loss of one branch also changes the other branch. As a
# test, we change an unshared weight (level 4) and a shared one (level 5) in the CT branch and read
# the same weights in the PET branch:

# %%
with torch.no_grad():
    for n in (4, 5):
        weight = v3.ct.levels[n - 1].units[0].conv.weight
        weight[0, 0, 0, 0, 0] = 42.0
        seen = v3.pet.levels[n - 1].units[0].conv.weight[0, 0, 0, 0, 0]
        print(f"level {n}: the CT branch now has 42.000, the PET branch has {seen:.3f}")

# %% [markdown]
# The paper calls the set of shared levels $L$ and compares several. Each row below is a network
# built with that `share`; a cell is filled if `ct.levels[n - 1] is pet.levels[n - 1]`.

# %%
shares = [(), (3,), (4,), (5,), (6,), (7,), (4, 5, 6), (3, 4, 5, 6, 7)]
nets = [MirrorUNet("v1", share) for share in shares]
same = [[a is b for a, b in zip(net.ct.levels, net.pet.levels)] for net in nets]
millions = [sum(p.numel() for p in net.parameters()) / 1e6 for net in nets]

rows, names = np.arange(len(shares)) + 0.5, [f"L = {set(s) if s else '{ }'}" for s in shares]
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
left.pcolormesh(np.array(same), cmap="Purples", vmax=1.3, edgecolors="white", linewidth=2)
left.set(xticks=np.arange(9) + 0.5, xticklabels=range(1, 10), xlabel="level")
left.set(title="shared levels", yticks=rows, yticklabels=names)
left.invert_yaxis()
bars = right.barh(rows, millions, color=figures.SHARED, height=0.7)
right.bar_label(bars, fmt="%.2f", padding=3)
right.set(xlabel="million parameters (v1)", xlim=(0, 11.5), title="a shared level counts once")
plt.show()

# %% [markdown]
# **Your turn.** $L=\{5\}$ saves more parameters than $L=\{3\}$, $\{4\}$, $\{6\}$ and $\{7\}$ do.
# Why? Think about it before you read on. (Look at the drawing: what is wide at level 5?)
#
# ## Shapes at every level
#
# Answer: a 3×3×3 convolution from $a$ to $b$ channels has $27ab$ weights, and level 5 has the most
# channels, 128 to 256. Its feature maps are small, though: after four strides of two, a side has
# $96/16=6$ voxels. A forward hook (PyTorch calls it after the level) records the shape of each
# output:

# %%
shapes = {}


def record_shape(n):
    """A forward hook that stores the shape of the output of level n."""

    def hook(module, inputs, output):
        shapes[n] = tuple(output.shape)

    return hook


for n, level in enumerate(v3.pet.levels, start=1):
    level.register_forward_hook(record_shape(n))
with torch.no_grad():
    out = v3.eval()(torch.rand(1, 2, 96, 96, 96))  # channel 0: CT, channel 1: PET
weights = [sum(p.numel() for p in level.parameters()) for level in v3.pet.levels]
values = [int(np.prod(shapes[n])) for n in range(1, 10)]
print("level   output, input 96 x 96 x 96       values     weights")
for n in range(1, 10):
    print(f"  {n}     {str(shapes[n]):26} {values[n - 1]:9,}   {weights[n - 1]:9,}")

# %%
fig, ax = plt.subplots(figsize=(9, 3), layout="constrained")
levels, style = np.arange(1, 10), dict(width=0.4, edgecolor=figures.INK)
outputs = np.array(values) / 1e6
ax.bar(levels - 0.2, outputs, color=figures.PET, label="output values (millions)", **style)
label = "weights (millions)"
ax.bar(levels + 0.2, np.array(weights) / 1e6, color=figures.SHARED, label=label, **style)
ax.set(xticks=levels, xlabel="level of one branch", ylabel="millions")
ax.set_title("Most values are at the outer levels, most weights in the middle")
ax.legend()
plt.show()

# %% [markdown]
# So sharing the bottleneck leaves the fine levels free, and ties the branches together at the level
# at which each value sees a large part of the patch. In the paper $L=\{5\}$ is the best choice;
# other levels, or more of them, are worse. Our own runs do not compare them yet
# ([claim 3](../results/README.md#the-papers-claims-on-40-real-petct-studies)).
#
# ## Four versions
#
# The same two branches, with four sets of tasks. v3 is drawn above; here are the other three.
#
# | version | CT decoder | PET decoder | from the bottleneck |
# |---|---|---|---|
# | v1 | reconstruct CT | segment | – |
# | v2 | reconstruct CT | segment | a light decoder reconstructs PET from *both* bottlenecks |
# | v3 | reconstruct CT | segment | as v2, and a classifier: is there any tumor? |
# | v4 | segment | segment | – |
#
# v4 averages its two segmentations, $w\cdot\mathrm{CT}+(1-w)\cdot\mathrm{PET}$ with $w=0.1$.

# %%
draw(MirrorUNet("v1"))

# %%
draw(MirrorUNet("v2"))

# %%
draw(MirrorUNet("v4"))

# %% [markdown]
# The network returns a named tuple; a field is `None` if the version has no such output. `seg`
# holds logits (the softmax turns them into probabilities) of background and tumor. `ct` and `pet`
# are the reconstructions, but in v4 each branch's own segmentation. v3's classifier answers for
# each cell of $16^3$ voxels (`cells`); the highest is its answer for the patch (`tumor`).

# %%
x = torch.rand(1, 2, 32, 32, 32)
for version in ("v1", "v2", "v3", "v4"):
    outputs = MirrorUNet(version).eval()(x)._asdict()
    print(version, {name: tuple(t.shape) for name, t in outputs.items() if t is not None})

# %% [markdown]
# ## Parameters per part
#
# Each parameter is counted once, for the part that owns it. `named_parameters()` already lists a
# shared parameter only once.

# %%
PARTS = {  # part: color, hatching
    "CT branch": (figures.CT, ""),
    "PET branch": (figures.PET, "//"),
    "shared": (figures.SHARED, ""),
    "light decoder": ("white", ".."),
    "classifier": (figures.INK, ""),
}


def part_of(name, net):
    """The part of the network that a parameter belongs to."""
    first, *rest = name.split(".")
    if rest[:1] == ["levels"] and int(rest[1]) + 1 in net.share:
        return "shared"
    names = {"ct": "CT branch", "pet": "PET branch", "bottleneck_decoder": "light decoder"}
    return names.get(first, first)


versions = ("v1", "v2", "v3", "v4")
fig, ax = plt.subplots(figsize=(9, 2.8), layout="constrained")
for row, version in enumerate(versions):
    net, start = MirrorUNet(version), 0
    count = dict.fromkeys(PARTS, 0)
    for name, p in net.named_parameters():
        count[part_of(name, net)] += p.numel()
    for part, n in count.items():
        color, hatch = PARTS[part]
        style = dict(facecolor=color, hatch=hatch, edgecolor=figures.INK)
        ax.barh(row, n / 1e6, left=start, label=part if version == "v3" else None, **style)
        start += n / 1e6
    ax.text(start + 0.1, row, f"{sum(count.values()):,}", va="center")
    print(version, {part: f"{n:,}" for part, n in count.items() if n})
ax.set(yticks=range(4), yticklabels=versions, xlabel="million parameters", xlim=(0, 10))
ax.invert_yaxis()
fig.legend(loc="outside upper center", ncols=5)
plt.show()

# %% [markdown]
# The one shared level alone has more parameters than either branch has on its own.
#
# ## Loading the authors' weights
#
# The authors published their code. This network computes the same function, and `from_official`
# reads a state dict (the names and tensors of a checkpoint) of the release. The authors' file is
# **not** part of this repository, so we make one that looks like it: the weights of one of our
# networks, under the names that the release uses. The function that renames them is the one that
# `from_official` uses, so this cell cannot prove that the names are right. The tests do that: they
# compare outputs and gradients with those of the authors' code.

# %%
from mirror_unet import _official_name


def official_name(name):
    return _official_name(name, share=(5,), finest_first=True)


torch.manual_seed(0)
donor = MirrorUNet("v3", norm="batch").eval()  # as in the release; our default is instance norm
official = {official_name(name): value for name, value in donor.state_dict().items()}
print(f"{len(donor.state_dict())} names here, {len(official)} in the official style,", end=" ")
print("which names a shared tensor once")
for name in (
    "ct.levels.0.units.1.conv.weight",
    "pet.levels.8.up.slope",
    "ct.levels.4.shortcut.bias",
    "pet.levels.4.shortcut.bias",
):
    print(f"{name:32} -> {official_name(name)}")

# %%
loaded, report = from_official(official)
print({key: report[key] for key in ("version", "preset", "share", "channels", "left_over")})
with torch.no_grad():
    equal = [torch.equal(a, b) for a, b in zip(donor(x), loaded(x))]
print("same outputs, bit for bit:", all(equal))

# %% [markdown]
# The function reads the version, the shared levels and the numbers of channels from the names and
# shapes alone. For a file the call is `from_official(torch.load(file, weights_only=True))`; with
# `weights_only` a file of unknown origin cannot run code. A state dict that does not fit is
# refused, never loaded in part:

# %%
missing_one = {name: t for name, t in official.items() if name != "dec.1.0.conv.bias"}
try:
    from_official(missing_one)
except ValueError as error:
    print(error)

# %% [markdown]
# ## Weights are shared, not features
#
# Here is the point that is easiest to miss. In the drawing of v1, follow the arrows from "segment
# tumor" back to the left: decoder, bottleneck, encoder, PET. No arrow comes from the CT. At level 5
# the branches use the same *weights*, but each passes only its own image through them.
#
# **Your turn.** What follows from this: how does the segmentation of v1, v2, v3 and v4 change if
# the CT is replaced by noise? How do the reconstructions of CT and PET change? Write down your
# guess.
#
# For a meaningful picture we first train each version briefly, on a part of the patient above. (So
# the result says nothing about other patients. The next notebook explains the loss; `MirrorLoss`
# computes it for each version.)

# %%
low = int(tumor.sum((0, 1)).argmax()) - 24
low = int(np.clip(low, 0, tumor.shape[2] - 48))
slab = study["image"][None, :, 8:56, :, low : low + 48]
slab = torch.from_numpy(slab).float()  # (1, 2, 48, 48, 48)
truth = torch.from_numpy(tumor[None, None, 8:56, :, low : low + 48]).long()  # (1, 1, 48, 48, 48)
batch = {"ct": slab[:, :1], "pet": slab[:, 1:], "seg": truth, "tumor": torch.ones(1)}

trained = {}
for version in versions:
    torch.manual_seed(0)
    net, loss = MirrorUNet(version, channels=(8, 16, 32, 64, 128)), MirrorLoss(version)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(50):
        total, parts = loss(net(slab), batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    trained[version] = net.eval()
    print(f"{version}: Dice loss {parts['seg_dice']:.2f}")

# %% [markdown]
# Now we run each network twice: with the patient's CT, and with noise instead of the CT.

# %%
torch.manual_seed(1)
noisy = slab.clone()
noisy[:, 0] = torch.rand_like(slab[:, 0])

changes, tumor_maps = {}, {}
with torch.no_grad():
    for version, net in trained.items():
        before, after = net(slab), net(noisy)
        tumor_maps[version] = [o.seg.softmax(1)[0, 1].numpy() for o in (before, after)]
        margins = [o.seg[0, 1] - o.seg[0, 0] for o in (before, after)]  # logit of P(tumor)
        tumor_maps[version].append((margins[0] - margins[1]).abs().numpy())
        for name, a, b in zip(before._fields, before, after):
            if a is not None:
                changes[version, name] = (a - b).abs().max().item()

print("largest change of each output when noise replaces the CT")
for version in trained:
    found = [f"{name} {change:.4f}" for (v, name), change in changes.items() if v == version]
    print(version, "  ".join(found), sep="   ")
assert all(changes[v, "seg"] == 0 for v in ("v1", "v2", "v3"))  # exactly zero
assert changes["v3", "tumor"] == 0
assert changes["v4", "seg"] > 0

# %%
y = int(truth[0, 0].sum((0, 2)).argmax())  # the coronal slice with the most tumor
fig, axes = plt.subplots(4, 4, figsize=(8, 6.6), layout="constrained")
inputs = {"CT": slab[0, 0], "noise": noisy[0, 0], "PET": slab[0, 1]}
for ax, (name, image) in zip(axes[:, 0], inputs.items()):
    if name == "PET":
        image, style = in_units(image, preprocessing.suv_window), dict(cmap="gray_r", vmax=10)
        name = "PET\n(white: SUV 0, black: 10)"
    else:
        style = dict(cmap="gray", vmax=1)
    ax.imshow(image[:, y].T, origin="lower", vmin=0, **style)
    ax.set_ylabel(name, fontsize=8)
axes[3, 0].axis("off")
most = max(maps[2][:, y].max() for maps in tumor_maps.values())
for row, version in zip(axes[:, 1:], trained):
    for ax, values, high in zip(row, tumor_maps[version], (1, 1, most)):
        image = ax.imshow(values[:, y].T, origin="lower", cmap="magma", vmin=0, vmax=high)
        ax.contour(truth[0, 0, :, y].T, [0.5], colors="white", linewidths=0.8)
    row[0].set_ylabel(version, fontsize=13)
titles = ("inputs", "P(tumor), with CT", "P(tumor), with noise", "change of the logit")
for ax, title in zip(axes[0], titles):
    ax.set_title(title, fontsize=10)
for ax in axes.ravel():
    ax.set(xticks=[], yticks=[])
probability = axes[0, 1].images[0]
fig.colorbar(probability, ax=axes[:, 1:3], shrink=0.7, location="bottom", label="P(tumor)")
name = "absolute change of the logit of P(tumor)"
fig.colorbar(image, ax=axes[:, 3], shrink=0.7, label=name)
plt.show()

# %% [markdown]
# The white outline is the true tumor.
#
# **Answer.** In v1, v2 and v3 the segmentation and v3's classifier do not change by a single bit,
# whichever levels are shared. What changes is the reconstruction of the CT, of course, and in v2
# and v3 also that of the PET, because the light decoder reads both bottlenecks. The segmentation of
# v4 changes, because its CT branch contributes with weight $w=0.1$. (Its mask need not change:
# where the network is certain, another logit is nearly the same probability.)
#
# This follows from the architecture (the authors' own code behaves in the same way), but the paper
# does not say so. It has two consequences:
#
# * At test time v1, v2 and v3 are PET networks. They need no CT, and the method `segment` runs only
#   the PET half, with the same result bit for bit.
# * The CT acts during *training* only: its loss changes the shared weights. That effect is a
#   gradient, and we can measure it.

# %%
net = trained["v3"]
with torch.no_grad():
    equal = torch.equal(net.segment(slab[:, 1:]).seg, net(slab).seg)
print("PET alone gives the same segmentation:", equal)

out = net(slab)
tasks = {
    "CT reconstruction": (out.ct - batch["ct"]).square().mean(),
    "segmentation": MirrorLoss("v4")(out, batch)[0],  # v4's loss is Dice + CE alone
}


def trains(loss, level):
    """Whether a loss has a gradient for the weights of a level."""
    parameters = list(level.parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return any(g is not None and g.any() for g in found)


fig, axes = plt.subplots(1, 2, figsize=(9, 2.5), sharey=True, layout="constrained")
for ax, (task, loss) in zip(axes, tasks.items()):
    reached = [[trains(loss, level) for level in branch.levels] for branch in (net.ct, net.pet)]
    style = dict(cmap="Greens", vmin=0, vmax=1.4, edgecolors="white", linewidth=2)
    ax.pcolormesh(np.array(reached, float), **style)
    ax.set(title=f"levels trained by the {task}", xlabel="level")
    ax.set(xticks=np.arange(9) + 0.5, xticklabels=range(1, 10))
    ax.set(yticks=(0.5, 1.5), yticklabels=("CT branch", "PET branch"), ylim=(2, 0))
plt.show()

# %% [markdown]
# The loss of the CT reconstruction reaches one level of the PET branch, the shared one. The CT
# influences the segmentation only through this level.
#
# **Your turn.** In the cell above, set `net` to `MirrorUNet("v1", share=(4, 5, 6))`, then to
# `MirrorUNet("v1", share=())`. Which cells of the figure are filled? What is a v1 that shares
# nothing? The next cell checks the answers.

# %%
for share in ((4, 5, 6), ()):
    net = MirrorUNet("v1", share, channels=(4, 4, 4, 4, 4))
    loss = net(slab).ct.square().mean()
    reached = [n for n, level in enumerate(net.pet.levels, start=1) if trains(loss, level)]
    print(f"share={share}: the CT loss trains levels {reached} of the PET branch")

# %% [markdown]
# A v1 that shares nothing is two separate networks that happen to be trained at the same time, and
# the CT does not help the segmentation at all.
#
# **Where to continue.** [`mirror_unet.py`](../mirror_unet.py) is the whole network. Notebook 2
# explains the losses, notebook 4 the corruption that makes reconstructing the CT worth learning,
# and notebook 5 trains a v3 and looks at what it gets wrong.
