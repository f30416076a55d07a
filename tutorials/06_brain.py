# %% [markdown]
# # 6. Brain tumors: other images, other tasks
#
# Mirror U-Net is not limited to PET and CT. In the paper's second study the two branches read two
# MR images of a brain, and the three decoders compute three *segmentations*. This notebook trains
# such a network, looks at its results for single patients, and then shows how to use other images,
# other labels, and your own tasks. You need the abstract of the paper; the first notebook takes the
# network apart. You need no GPU and no download: the patients are synthetic (`phantom.py`)
# ([how long it takes](../results/tutorials.csv)).

# %%
import os
from pathlib import Path

if Path.cwd().name == "tutorials":  # Jupyter starts here; the code is one folder up
    os.chdir("..")
# Let waiting threads sleep, so that other programs can use the cores. Set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import json
import sys
from dataclasses import replace
from typing import NamedTuple

sys.path += [".", "tutorials"]

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import torch
from IPython.display import Image
from torch import nn

import data
import figures
import losses
import mirror_unet
import predict
import slices
import train
from config import parse_config
from metrics import lesion_metrics
from patches import Augmentation, PatchDataset

plt.rcParams["figure.dpi"] = 90
# Colors of the Okabe-Ito palette, for color-blind readers, too.
SKY, YELLOW, RED = "#56B4E9", "#F0E442", "#D55E00"
STEPS, FEWER = 90, 60  # of the first training, and of the two others

# %% [markdown]
# ## Four images of one head
#
# The files have the layout of the Medical Segmentation Decathlon, Task01: per patient one file with
# four channels, and one with labels. `--data brain --root Task01_BrainTumour` reads the real data;
# `--data phantom-brain` first writes synthetic patients in the same layout.

# %%
options = f"""
    --data phantom-brain --phantoms 24 --spacing 3 3 3 --patch 48 48 48 --flip-axes 0
    --steps {STEPS} --lr 0.003 --validations 3
    --cache cache/tutorials --out runs/tutorial-brain --overwrite
"""
config = parse_config(options.split())
train_cases, held_out = train.load_cases(config)
print(f"{len(train_cases)} patients for training, {len(held_out)} held out;", end=" ")
print(f"voxels of {config.spacing} mm, patches of {config.patch}")


def fill(axis, mask, color, hatch):
    """Fill a mask (D, H)."""
    if mask.any():
        levels = [0.5, 1.5]
        axis.contourf(mask.T, levels, colors=[color], hatches=[hatch], alpha=0.75)


def legend(fig, looks, outlines=()):
    """Add a legend of {name: (color, hatch)}, and of {name: (color, line style)}."""
    marks = [
        plt.Rectangle((0, 0), 1, 1, fc=color, hatch=hatch, label=name)
        for name, (color, hatch) in looks.items()
    ]
    for name, (color, style) in dict(outlines).items():
        marks.append(plt.Line2D([], [], color=color, ls=style, label=name))
    fig.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=8)


case = held_out[0].case
image, codes = nib.load(case.images[0]).get_fdata(), nib.load(case.label).get_fdata()
z = int((codes > 0).sum((0, 1)).argmax())  # the slice with the most tumor
LABELS = {  # in the order of their codes 1, 2, 3
    "edema": (SKY, ""),
    "core, not enhancing": (YELLOW, ".."),
    "core, enhancing": (RED, "////"),
}
channels = ("FLAIR", "T1w", "T1gd", "T2w")  # their order in the file

fig, axes = plt.subplots(1, 5, figsize=(10, 2.6), layout="constrained")
for axis, number, title in zip(axes, (0, 1, 2, 3, 0), (*channels, "labels")):
    axis.imshow(image[..., z, number].T, origin="lower", cmap="gray")
    axis.set_title(title, fontsize=9)
    axis.axis("off")
for code, (color, hatch) in enumerate(LABELS.values(), start=1):
    fill(axes[-1], codes[..., z] == code, color, hatch)
legend(fig, LABELS)

# %% [markdown]
# (The gray values of MR have no unit; each image is scaled by itself.) Each image shows a different
# part best: **FLAIR** shows the edema, the swollen tissue around the tumor (bright, while the water
# in the ventricles stays dark), **T2w** the core (brighter than the edema around it, although the
# ventricles are bright, too), and **T1gd** the *enhancing* rim of the core, which takes up the
# contrast agent (gadolinium). T1w is not used here. So each image should get
# the task for which it is good. This is the preset `brain`, version v2:
#
# | part | reads | segments |
# |---|---|---|
# | first branch | T2w | **core**, enhancing or not |
# | second branch | FLAIR | **edema** |
# | light decoder | both bottlenecks | **whole** tumor = core ∪ edema |
#
# $$ L = \frac13 \sum_{t\,\in\,\text{core, whole, edema}} \frac13\,(\text{Dice}_t + \text{CE}_t) $$
#
# **Your turn.** The branches share the weights of level 5, not features. Which of the three outputs
# change if FLAIR is replaced by noise? Decide, then run the cell.

# %%
net = mirror_unet.MirrorUNet("v2", channels=config.channels, preset="brain").eval()
x = torch.randn(1, 2, 48, 48, 48)  # channel 0: T2w, channel 1: FLAIR
y = torch.cat([x[:, :1], torch.randn(1, 1, 48, 48, 48)], dim=1)  # the same T2w, another FLAIR
with torch.no_grad():
    for name, before, after in zip(("core", "whole", "edema"), net(x), net(y)):
        print(f"{name:6}", "does not change" if torch.equal(before, after) else "changes")

# %% [markdown]
# The decoder of the core never sees FLAIR, and that of the edema never sees T2w. Only the decoder
# of the bottleneck reads both. It has no skip connections: it sees the tumor at a sixteenth of the
# resolution and has to guess the border from that. Keep this in mind when you look at its outlines.
# ([Notebook 5](05_petct.ipynb) explains the columns FPV and FNV of the next table.)
#
# ## Training

# %%
train.prepare_folder(config)
run = train.Run(config, train_cases, held_out)
run.train()

# %%
lines = (run.folder / "metrics.jsonl").read_text().splitlines()
rows = [row for row in map(json.loads, lines) if "loss" in row]
print("mean of the last 20 steps:")
for task in config.targets:
    ends = [np.mean([row[f"{task}_{name}"] for row in rows[-20:]]) for name in ("dice", "ce")]
    print(f"{task:6} Dice loss {ends[0]:.2f}   cross entropy {ends[1]:.3f}")
Image(run.folder / "curves.png")

# %% [markdown]
# There are three Dice losses and three cross entropies, one of each per task. Compare those of the
# whole tumor with the others. A likely reason for a difference is that its decoder has no skip
# connections: it has to guess the border. The figure on the right has the Dice of the masks.
#
# ## Patient by patient
#
# The figure shows each task on the image that it uses (the whole tumor, which uses both, on FLAIR).
# The solid outline is the truth, the dashed one the prediction.


# %%
def show(axis, picture, title):
    low, high = np.percentile(picture, (1, 99.8))
    axis.imshow(picture.T, origin="lower", cmap="gray", vmin=low, vmax=high)
    axis.set_title(title, fontsize=9)
    axis.axis("off")


def outlines(axis, picture, truth, pred, title):
    """Show a slice (D, H) with the outlines of two masks: truth solid, prediction dashed."""
    show(axis, picture, title)
    for mask, color, style in ((truth, figures.TRUTH, "-"), (pred, figures.PREDICTION, "--")):
        if mask.any():
            axis.contour(mask.T, [0.5], colors=color, linewidths=1.5, linestyles=style)


def true_masks(label):
    """The masks of all tasks, from label codes: 0 background, 1 edema, 2 core."""
    return {"core": label == 2, "whole": label > 0, "edema": label == 1}


def arrays_of(case):
    """Both images, the labels, and the slice with the most tumor."""
    image, label = case.array("image").astype(np.float32), case.array("label")
    return *image, label, int((label > 0).sum((0, 1)).argmax())


masks = {}  # patient: {task: predicted mask}
for case in held_out:
    maps, _ = run.predict(case, last=True)
    masks[case.name] = dict(zip(config.targets, maps >= config.threshold))

LINES = {"truth": (figures.TRUTH, "-"), "prediction": (figures.PREDICTION, "--")}
fig, axes = plt.subplots(3, 3, figsize=(8, 9), layout="constrained")
for row, case in zip(axes, held_out):
    t2w, flair, label, z = arrays_of(case)
    pictures = {"core": (t2w, "T2w"), "edema": (flair, "FLAIR"), "whole": (flair, "both")}
    for axis, (task, (picture, source)) in zip(row, pictures.items()):
        truth, pred = true_masks(label)[task], masks[case.name][task]
        dice = lesion_metrics(pred, truth, config.spacing)["dice"]
        title = f"{task}, from {source}: Dice {dice:.2f}"
        outlines(axis, picture[..., z], truth[..., z], pred[..., z], title)
    place = dict(ha="right", va="center", transform=row[0].transAxes)
    row[0].text(-0.05, 0.5, case.name, rotation=90, fontsize=9, **place)
legend(fig, {}, LINES)

# %% [markdown]
# The outlines of core and edema follow edges that are visible in the images. The whole tumor is a
# rounded shape that does not follow the border: this decoder has no skip connections. The paper's
# idea is that its task makes both branches carry what they know about the tumor to the bottleneck.
# Whether that helps the other two tasks, this notebook does not show; in our runs on phantoms v1,
# which has no such decoder, and v2 cannot be distinguished
# ([results](../results/README.md#the-brain-rows-on-phantoms)).
#
# Scroll through the first of these patients, to see how far a rounded shape can go wrong (slices
# from the lowest to the highest outline, and a slider if ipywidgets is installed and you run this
# cell):

# %%
case = held_out[0]
pictures = {}
for name, picture in zip(("T2w", "FLAIR"), arrays_of(case)):
    limits = dict(zip(("vmin", "vmax"), np.percentile(picture, (1, 99.8))))
    pictures[name] = (picture, dict(cmap="gray", **limits), "no unit")
whole = {"truth": case.array("label") > 0, "prediction": masks[case.name]["whole"]}
browser = slices.show(pictures, whole, config.spacing, number=6)

# %% [markdown]
# **Your turn.** Three decoders answer three questions, and nothing makes the answers agree. By
# definition the core and the edema are parts of the whole tumor and do not overlap. Count the
# predicted voxels of the held-out patients that break either rule (`masks[patient][task]` is a
# mask; the tasks are "core", "whole" and "edema"). The next cell has the answer.

# %%
counts = {"core or edema, but not whole": 0, "core and edema": 0, "whole, but neither": 0}
total = 0
for m in masks.values():
    either = m["core"] | m["edema"]
    total += (either | m["whole"]).sum()
    counts["core or edema, but not whole"] += (either & ~m["whole"]).sum()
    counts["core and edema"] += (m["core"] & m["edema"]).sum()
    counts["whole, but neither"] += (m["whole"] & ~either).sum()
print(f"of {total} voxels that at least one decoder calls tumor:")
for what, count in counts.items():
    print(f"{count:7} {count / total:6.1%}  {what}")

# %% [markdown]
# A file of labels has one code per voxel, so there must be a rule. `predict.py` writes code 2 if
# the decoder of the core says core, and code 1 if one of the others says tumor. Here is the result
# of this rule:

# %%
CODES = {"core": (YELLOW, ".."), "edema": (SKY, "")}
fig, axes = plt.subplots(1, len(held_out), figsize=(10, 2.8), layout="constrained", squeeze=False)
for axis, case in zip(axes[0], held_out):
    m = masks[case.name]
    _, flair, label, z = arrays_of(case)
    show(axis, flair[..., z], case.name)
    core, edema = m["core"][..., z], (m["whole"] | m["edema"])[..., z]
    fill(axis, core, *CODES["core"])
    fill(axis, edema & ~core, *CODES["edema"])
    axis.contour(label[..., z].T, [0.5, 1.5], colors="black", linewidths=1)
legend(fig, CODES, {"true borders of both": ("black", "-")})

# %% [markdown]
# ## Your own images and labels
#
# **Two properties of a case determine what the branches read and learn**; `find_brain` takes both
# from `dataset.json`:
#
# * `channels`: which channel of the file goes to the first branch, and which to the second. The
#   default is (T2w, FLAIR).
# * `roles`: which label codes count as "core" (the task of the first branch) and which as "edema"
#   (the task of the second). The task of the bottleneck is all of them.
#
# So another assignment needs no change in the library. Let T1gd find the *enhancing* rim, for
# example, and FLAIR the rest of the tumor:

# %%
# load_cases wrote the phantoms here; with real data: Task01_BrainTumour
root = Path("cache/tutorials/phantom-brain-24-3x3x3mm")
found = data.find_brain(root)
print("found:", found[0].channels, found[0].roles)

roles = ((3, "core"), (1, "edema"), (2, "edema"))
mine = [replace(case, channels=(2, 0), roles=roles) for case in found]
print("mine: ", mine[0].channels, mine[0].roles)

# Other channels need another preprocessing; the split of the patients stays the same.
cached = {c.name: c for c in data.build_cache(mine, config.preprocessing, config.cache)}
my_train = [cached[case.name] for case in train_cases]
my_held_out = [cached[case.name] for case in held_out]

my_config = replace(config, steps=FEWER, out="runs/tutorial-brain-t1gd")
train.prepare_folder(my_config)
my_run = train.Run(my_config, my_train, my_held_out)
my_run.train()

# %% [markdown]
# In this table "core" is the enhancing rim and "edema" is everything else: the names are those of
# the branches' tasks, and `roles` defines what they mean.

# %%
fig, axes = plt.subplots(2, 3, figsize=(8, 6), layout="constrained")
for row, case in zip(axes, my_held_out):
    t1gd, flair, label, _ = arrays_of(case)
    z = int((label == 2).sum((0, 1)).argmax())  # the slice with the most rim
    maps, _ = my_run.predict(case, last=True)
    pred = dict(zip(my_config.targets, maps >= my_config.threshold))
    pictures = {
        "core": (t1gd, "rim, from T1gd"),
        "edema": (flair, "the rest, from FLAIR"),
        "whole": (flair, "whole, from both"),
    }
    for axis, (task, (picture, title)) in zip(row, pictures.items()):
        truth = true_masks(label)[task]
        outlines(axis, picture[..., z], truth[..., z], pred[task][..., z], title)
legend(fig, {}, LINES)

# %% [markdown]
# The rim is thin, but T1gd shows it brighter than everything around it: compare its Dice with that
# of the whole core in the first table, which had more steps. The other branch now has the tumor
# *without* its rim, from an image that hardly shows the rim: look whether its outline leaves the
# rim out. How difficult a task is depends on the image, and that is the reason to choose.
#
# To train like this from the command line, write the two properties into a `dataset.json`.
# `find_brain` gives the channel whose name contains "t2" to the first branch, and the one with
# "flair" to the second. A label whose name contains "edema" counts as edema; one with "tumor",
# "core", "enhancing" or "necrotic" counts as core. These names, too, only stand for the tasks. The
# images need not be copied:

# %%
description = json.loads((root / "dataset.json").read_text())
description["modality"] = {"0": "FLAIR", "1": "T1w", "2": "T2w (really T1gd)", "3": "not used"}
description["labels"] = {
    "0": "background",
    "1": "edema",
    "2": "edema (really the core without its rim)",
    "3": "core (really the rim)",
}
for entry in description["training"]:
    for name, path in entry.items():
        entry[name] = str((root / path).resolve())
folder = Path("cache/tutorials/brain-t1gd")
folder.mkdir(exist_ok=True)
(folder / "dataset.json").write_text(json.dumps(description))
read = data.find_brain(folder)
print("mine:", mine[0].channels, sorted(mine[0].roles))
print("read:", read[0].channels, sorted(read[0].roles))
print(f"python train.py --data brain --root {folder}")

# %% [markdown]
# **Your turn.** Swap the tasks of the images: let FLAIR find the core, and T2w the edema. What has
# to change? (The next cell has the answer. What to expect: FLAIR shows the core darker than the
# edema, and T2w shows edema, ventricles and core all bright.)

# %%
# The task of the first branch is the core, whatever image it reads.
swapped = [replace(case, channels=case.channels[::-1]) for case in found]
print("swapped:", swapped[0].channels, "the roles stay:", swapped[0].roles)

# %% [markdown]
# ## Your own tasks
#
# For tasks that the presets do not have, combine the parts: `Branch(out_channels, ...)` is a U-Net
# of one modality, `LightDecoder` the decoder at the bottleneck. The task decides the number of
# output channels: 1 to reconstruct, K to separate K classes. In this example the first branch
# separates background, edema and core at once, the second segments the whole tumor, and the
# bottleneck *reconstructs* both images (as in the paper's v2-rec). You write four things: the
# output, the network, the loss and the training step.


# %%
class MyOutput(NamedTuple):
    parts: torch.Tensor  # (B, 3, D, H, W) logits of background, edema, core; from T2w
    whole: torch.Tensor  # (B, 2, D, H, W) logits; from FLAIR
    images: torch.Tensor  # (B, 2, D, H, W) both images, reconstructed from the bottlenecks


class MyMirrorUNet(nn.Module):
    def __init__(self, channels=(8, 16, 32, 64, 128), share=(5,)):
        super().__init__()
        self.first = mirror_unet.Branch(3, channels, "instance")
        self.second = mirror_unet.Branch(2, channels, "instance")
        self.light = mirror_unet.LightDecoder(2, channels, "instance")
        for level in share:  # sharing means one module object in both branches
            self.second.levels[level - 1] = self.first.levels[level - 1]

    def forward(self, x):  # (B, 2, D, H, W)
        bottleneck1, skips1 = self.first.encode(x[:, 0:1])
        bottleneck2, skips2 = self.second.encode(x[:, 1:2])
        return MyOutput(
            parts=self.first.decode(bottleneck1, skips1),
            whole=self.second.decode(bottleneck2, skips2),
            images=self.light(torch.cat([bottleneck1, bottleneck2], dim=1)),
        )


def my_loss(out, batch):
    label = batch["label"]
    segmentation = losses.dice_ce(out.parts, label) + losses.dice_ce(out.whole, (label > 0).long())
    return 0.5 * segmentation + 0.1 * losses.l2(out.images, batch["image"])


# %% [markdown]
# The rest is ordinary PyTorch. `PatchDataset` returns patches; patch $n$ depends only on the seed
# and on $n$.

# %%
steps, batch_size = FEWER, 2
aug = Augmentation(flip=0.5, flip_axes=(0,), intensity=0.3)
dataset = PatchDataset(train_cases, config.patch, steps * batch_size, seed=0, aug=aug)
torch.manual_seed(0)
my_net = MyMirrorUNet()
optimizer = torch.optim.AdamW(my_net.parameters(), 3e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
history = []
for batch in torch.utils.data.DataLoader(dataset, batch_size):
    loss = my_loss(my_net(batch["image"]), batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    history.append(loss.item())
print(f"mean loss: {np.mean(history[:10]):.2f} in the first ten steps,", end=" ")
print(f"{np.mean(history[-10:]):.2f} in the last ten")

# %% [markdown]
# `sliding_window` predicts whole heads. It takes any function of a batch of windows. Here this
# function returns five channels at once: the probabilities of the three classes, and the two
# images.


# %%
def predict_windows(x):
    out = my_net(x)
    return torch.cat([out.parts.softmax(1), out.images], dim=1)


my_net.eval()
fig, axes = plt.subplots(2, 4, figsize=(10, 5.6), layout="constrained")
for row, case in zip(axes, held_out):
    t2w, flair, label, z = arrays_of(case)
    image = torch.from_numpy(np.stack([t2w, flair]))  # (2, D, H, W)
    maps = predict.sliding_window(image, predict_windows, config.patch).numpy()  # (5, D, H, W)
    classes = maps[:3].argmax(0)
    for axis, name, code in zip(row, ("edema", "core"), (1, 2)):
        truth, pred = label == code, classes == code
        dice = lesion_metrics(pred, truth, config.spacing)["dice"]
        title = f"{name}, from T2w: Dice {dice:.2f}"
        outlines(axis, t2w[..., z], truth[..., z], pred[..., z], title)
    for axis, name, picture in zip(row[2:], ("T2w", "FLAIR"), maps[3:]):
        axis.imshow(picture[..., z].T, origin="lower", cmap="gray")
        axis.set_title(f"{name}, reconstructed", fontsize=9)
        axis.axis("off")
legend(fig, {}, LINES)

# %% [markdown]
# The first branch separates three classes in one image, and T2w shows the edema less clearly than
# FLAIR does: compare its edema with that of the first training (which also had more steps). The
# bottleneck's reconstruction is a blurred spot at the place of the tumor, with the checkerboard
# pattern of transposed convolutions, and little else: this is what two segmenting branches have
# stored there after so few steps.
#
# **Your turn**, this time without an answer: what changes with a much larger weight of the
# reconstruction, or with many more steps?
#
# To make such a task an option of `train.py`, change these places: `TASKS`, `MirrorUNet.forward`
# and its NamedTuple in `mirror_unet.py`; `MirrorLoss` in `losses.py`; `make_targets` in
# `patches.py` (what the loss reads); `Config.targets` in `config.py` and `foreground_probability`
# in `predict.py` (which maps are saved). [`exercises.md`](exercises.md) has some tasks to begin
# with.
