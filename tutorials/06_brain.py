# %% [markdown]
# # 6. Brain tumors: other images, other tasks
#
# Nothing in Mirror U-Net is about PET and CT. The paper's second study gives two MR images of a brain to the two branches, and three
# *segmentations* to the three decoders. This notebook trains that, looks at what it makes of single patients, and then goes where you will
# want to go: other images, other labels, tasks of your own. You need the paper's abstract; the first notebook takes the network apart. Two
# minutes of computing on two cores, no GPU, nothing downloaded: the patients are made up by `phantom.py`.

# %%
import os
from pathlib import Path

if Path.cwd().name == "tutorials":  # where Jupyter starts; the code is one folder up
    os.chdir("..")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # lets two cores be shared with other programs; must come before torch

import json
import sys
from dataclasses import replace
from typing import NamedTuple

sys.path.append(".")

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import torch
from IPython.display import Image
from torch import nn

import data
import losses
import mirror_unet
import predict
import train
from metrics import lesion_metrics

plt.rcParams["figure.dpi"] = 90
STEPS, FEWER = 160, 100  # of the first training, and of the two that follow: a minute and a half in all on two cores

# %% [markdown]
# ## Four images of one head
#
# The layout is that of the Medical Segmentation Decathlon, Task01: one file a patient with four channels, and one with labels. `--data
# brain --root Task01_BrainTumour` reads the real thing; `--data phantom-brain` writes synthetic patients in the same layout first.

# %%
options = f"--data phantom-brain --phantoms 24 --spacing 3 3 3 --patch 48 48 48 --flip-axes 0 --steps {STEPS} --lr 0.003 --validations 3"
config = train.parse_config(f"{options} --cache cache/tutorials --out runs/tutorial-brain --overwrite".split())
train_cases, held_out = train.load_cases(config)
print(f"{len(train_cases)} patients to train on, {len(held_out)} held out; voxels of {config.spacing} mm, patches of {config.patch}")

case = held_out[0].case
image, codes = nib.load(case.images[0]).get_fdata(), nib.load(case.label).get_fdata()
z = int((codes > 0).sum((0, 1)).argmax())  # the slice with the most tumor
channels = ("FLAIR", "T1w", "T1gd", "T2w")  # their order in the file
colors = {1: "tab:blue", 2: "tab:green", 3: "tab:red"}
names = {1: "edema", 2: "core, not enhancing", 3: "core, enhancing"}

fig, axes = plt.subplots(1, 5, figsize=(10, 2.6), layout="constrained")
for axis, picture, title in zip(axes, [*np.moveaxis(image, -1, 0), image[..., 0]], [*channels, "the labels"]):
    axis.imshow(picture[..., z].T, origin="lower", cmap="gray")
    axis.set_title(title, fontsize=9)
    axis.axis("off")
for code, color in colors.items():
    rgba = np.zeros((*codes[..., z].T.shape, 4))
    rgba[codes[..., z].T == code] = (*plt.matplotlib.colors.to_rgb(color), 0.7)
    axes[-1].imshow(rgba, origin="lower")
marks = [plt.Line2D([], [], color=colors[c], lw=5, label=names[c]) for c in colors]
_ = fig.legend(handles=marks, loc="outside lower center", ncols=3, fontsize=8)
# %% [markdown]
# Each image shows something else best: **FLAIR** the edema (bright; water in the ventricles stays dark), **T2w** the core (brighter than
# the edema around it, though the ventricles are bright, too), **T1gd** the core's enhancing rim. So give each image the task it is good
# at. The preset `brain`, version v2:
#
# | who | reads | segments |
# |---|---|---|
# | first branch | T2w | **core**: enhancing or not |
# | second branch | FLAIR | **edema** |
# | light decoder | both bottlenecks | **whole** tumor = core ∪ edema |
#
# $$ L = \frac13 \sum_{t\,\in\,\text{core, whole, edema}} \frac13\,(\text{Dice}_t + \text{CE}_t) $$
#
# **Your turn.** The branches share the weights of level 5, not features. Which of the three outputs change if FLAIR is replaced by noise?
# Decide, then run the cell.

# %%
net = mirror_unet.MirrorUNet("v2", channels=config.channels, preset="brain").eval()
x = torch.randn(1, 2, 48, 48, 48)
y = torch.cat([x[:, :1], torch.randn(1, 1, 48, 48, 48)], dim=1)  # the same T2w, another FLAIR
with torch.no_grad():
    for name, before, after in zip(("core", "whole", "edema"), net(x), net(y)):
        print(f"{name:6}", "does not change" if torch.equal(before, after) else "changes")

# %% [markdown]
# The core's decoder never sees FLAIR, nor the edema's T2w. Only the bottleneck's decoder reads both, and it has no skip connections: it
# sees the tumor at a sixteenth of the resolution and has to make up the border from there. Remember that when you look at its outlines.
#
# ## Training

# %%
train.prepare_folder(config)
run = train.Run(config, train_cases, held_out)
run.train()

# %%
Image(run.folder / "curves.png")

# %% [markdown]
# Three Dice losses and three cross entropies, one of each a task. Those of the whole tumor stay highest. Two reasons are at hand: no
# skips, and a last layer that keeps its norm and PReLU (the other two end in a bare convolution), so that its logits stay moderate and its
# probabilities away from 0 and 1. The soft Dice of the loss minds that. The Dice of the masks, on the right, minds it less.
#
# ## Patient by patient
#
# Each task on the image it was made from, truth green, prediction pink; for the whole tumor, which is made from both, FLAIR.


# %%
def outlines(axis, picture, truth, pred, title):
    axis.imshow(picture.T, origin="lower", cmap="gray", vmin=np.percentile(picture, 1), vmax=np.percentile(picture, 99.8))
    for mask, color in ((truth, "#2ca02c"), (pred, "#ff2d95")):
        if mask.any():
            axis.contour(mask.T, [0.5], colors=color, linewidths=1.2)
    axis.set_title(title, fontsize=9)
    axis.axis("off")


truth_of = {"core": lambda label: label == 2, "whole": lambda label: label > 0, "edema": lambda label: label == 1}
masks = {}
for case in held_out:
    maps, _ = run.predict(case, last=True)
    masks[case.name] = dict(zip(run.targets, maps >= config.threshold))

fig, axes = plt.subplots(3, 3, figsize=(8, 9), layout="constrained")
for row, case in zip(axes, held_out):
    (t2w, flair), label = case.array("image").astype(np.float32), case.array("label")
    z = int((label > 0).sum((0, 1)).argmax())
    for axis, task, picture, source in zip(row, ("core", "edema", "whole"), (t2w, flair, flair), ("T2w", "FLAIR", "both")):
        truth, pred = truth_of[task](label), masks[case.name][task]
        dice = lesion_metrics(pred, truth, (3, 3, 3))["dice"]
        outlines(axis, picture[..., z], truth[..., z], pred[..., z], f"{task}, from {source}: Dice {dice:.2f}")
    row[0].text(-0.05, 0.5, case.name, rotation=90, ha="right", va="center", transform=row[0].transAxes, fontsize=9)

# %% [markdown]
# Core and edema are cut along edges that one sees in the images. The whole tumor is a rounded shape that stands off the border: what a
# decoder without skips can know. In the mirror it is not there to be the best segmentation; it makes both branches carry to the
# bottleneck what they know of the tumor.
#
# **Your turn.** Three decoders answer three questions, and nothing makes the answers agree. By definition the core and the edema lie
# within the whole tumor and do not overlap. Count, over the held-out patients, how many of the predicted voxels break either rule. The
# answer is in the next cell.

# %%
outside = sum(int(((m["core"] | m["edema"]) & ~m["whole"]).sum()) for m in masks.values())
both = sum(int((m["core"] & m["edema"]).sum()) for m in masks.values())
neither = sum(int((m["whole"] & ~m["core"] & ~m["edema"]).sum()) for m in masks.values())
some = sum(int((m["core"] | m["edema"] | m["whole"]).sum()) for m in masks.values())
print(f"of {some} voxels that some decoder calls tumor:")
for count, what in ((outside, "are core or edema, but not whole"), (both, "are core and edema"), (neither, "are whole, but neither")):
    print(f"{count:7} {count / some:6.1%}  {what}")

# %% [markdown]
# A file of labels has one code a voxel, so somebody has to settle it. `predict.py` writes code 2 where the core's decoder says core, code
# 1 where one of the others says tumor, and the same rule makes a picture of what it would write:

# %%
fig, axes = plt.subplots(1, len(held_out), figsize=(10, 2.6), layout="constrained", squeeze=False)
for axis, case in zip(axes[0], held_out):
    m, flair, label = masks[case.name], case.array("image")[1].astype(np.float32), case.array("label")
    written = np.where(m["core"], 2, m["whole"] | m["edema"])
    z = int((label > 0).sum((0, 1)).argmax())
    axis.imshow(flair[..., z].T, origin="lower", cmap="gray")
    axis.imshow(np.ma.masked_equal(written[..., z].T, 0), origin="lower", cmap="cool", vmin=1, vmax=2, alpha=0.6)
    axis.contour(label[..., z].T, [0.5, 1.5], colors="#2ca02c", linewidths=1)
    axis.set_title(case.name, fontsize=8)
    axis.axis("off")

# %% [markdown]
# (Light blue: edema, pink: core; green: the true borders of both.)
#
# ## Your own images and labels
#
# **Two facts of a case decide what the branches read and learn**, and `find_brain` takes both from `dataset.json`:
#
# * `channels`: which channel of the file goes to the first branch, which to the second. The default is (T2w, FLAIR).
# * `roles`: which label code counts as "core" (the first branch's task), which as "edema" (the second's). The bottleneck gets both.
#
# So another assignment needs no change of any file of the library. Say T1gd shall find the *enhancing* rim, and FLAIR the rest of the
# tumor:

# %%
root = Path("cache/tutorials/phantom-brain-24-3x3x3mm")  # where load_cases wrote them; for you: Task01_BrainTumour
found = data.find_brain(root)
print("found :", found[0].channels, found[0].roles)

mine = [replace(case, channels=(2, 0), roles=((3, "core"), (1, "edema"), (2, "edema"))) for case in found]
print("mine  :", mine[0].channels, mine[0].roles)

recipe = data.Preprocessing("brain", config.spacing, "RAS")
cached = {case.name: case for case in data.build_cache(mine, recipe, config.cache)}  # preprocessed anew: the channels differ
my_train, my_held_out = ([cached[case.name] for case in side] for side in (train_cases, held_out))

my_config = replace(config, steps=FEWER, out="runs/tutorial-brain-t1gd")
train.prepare_folder(my_config)
my_run = train.Run(my_config, my_train, my_held_out)
my_run.train()

# %% [markdown]
# In this table "core" is the enhancing rim and "edema" everything else: the names are slots, and `roles` says what is in them.

# %%
fig, axes = plt.subplots(2, 3, figsize=(8, 6), layout="constrained")
for row, case in zip(axes, my_held_out):
    (t1gd, flair), label = case.array("image").astype(np.float32), case.array("label")
    z = int((label == 2).sum((0, 1)).argmax())
    maps, _ = my_run.predict(case, last=True)
    pictures = zip(row, ("core", "edema", "whole"), (t1gd, flair, flair), ("rim, from T1gd", "the rest, from FLAIR", "whole, from both"))
    for axis, task, picture, title in pictures:
        pred = maps[my_run.targets.index(task)] >= config.threshold
        outlines(axis, picture[..., z], truth_of[task](label)[..., z], pred[..., z], title)

# %% [markdown]
# The rim is a thin target, and yet it is learned quickly, as T1gd shows it brighter than all around it. The other branch has the harder
# question now, the tumor *without* its rim, of an image that hardly shows the rim: it tends to fill it in. Whether a task is easy depends
# on the image that it is given; that is the reason to choose.
#
# To train so from the command line, write the two facts into a `dataset.json`. `find_brain` gives the channel whose name has "t2" in it to
# the first branch and the one with "flair" to the second; of the labels, a name with "edema" makes a code edema, and "tumor", "core",
# "enhancing" or "necrotic" make it core. These names are slots, too. The images need not be copied:

# %%
description = json.loads((root / "dataset.json").read_text())
description["modality"] = {"0": "FLAIR", "1": "T1w", "2": "T2w (in truth T1gd)", "3": "not used"}
description["labels"] = {"0": "background", "1": "edema", "2": "edema (in truth not enhancing)", "3": "core (in truth the rim)"}
for entry in description["training"]:
    entry |= {name: str((root / path).resolve()) for name, path in entry.items()}
folder = Path("cache/tutorials/brain-t1gd")
folder.mkdir(exist_ok=True)
(folder / "dataset.json").write_text(json.dumps(description))
print("mine  :", mine[0].channels, sorted(mine[0].roles))
print("read  :", data.find_brain(folder)[0].channels, sorted(data.find_brain(folder)[0].roles))
print(f"python train.py --data brain --root {folder}")

# %% [markdown]
# **Your turn.** Swap the branches' tasks: FLAIR shall find the core, and T2w the edema. What has to change? (The answer is the next cell;
# what to expect of it: FLAIR shows the core darker than the edema, and T2w shows edema, ventricles and core all bright.)

# %%
swapped = [replace(case, channels=case.channels[::-1]) for case in found]  # the first branch's task is the core, whatever it reads
print("swapped:", swapped[0].channels, "the roles stay:", swapped[0].roles)

# %% [markdown]
# ## Your own tasks
#
# For tasks that the presets do not have, take the parts: `Branch(out_channels, ...)` is a U-Net of one modality, `LightDecoder` the
# decoder at the bottleneck. How many channels come out is the task's business: 1 to reconstruct, K to tell K classes apart. Here the first
# branch tells background, edema and core apart in one go, the second segments the whole tumor, and the bottleneck *reconstructs* both
# images (the paper's v2-rec has such a task there). Four things are yours to write: what comes out, the network, the loss, and the step.


# %%
class MyOutput(NamedTuple):
    parts: torch.Tensor  # (B, 3, D, H, W) logits: background, edema, core; from T2w
    whole: torch.Tensor  # (B, 2, D, H, W) logits; from FLAIR
    images: torch.Tensor  # (B, 2, D, H, W) both images, reconstructed from the bottlenecks


class MyMirrorUNet(nn.Module):
    def __init__(self, channels=(8, 16, 32, 64, 128), share=(5,)):
        super().__init__()
        self.first = mirror_unet.Branch(3, channels, "instance")
        self.second = mirror_unet.Branch(2, channels, "instance")
        self.light = mirror_unet.LightDecoder(2, channels, "instance")
        for level in share:  # sharing: the same module in both
            self.second.levels[level - 1] = self.first.levels[level - 1]

    def forward(self, x):  # (B, 2, D, H, W)
        deep1, skips1 = self.first.encode(x[:, 0:1])
        deep2, skips2 = self.second.encode(x[:, 1:2])
        images = self.light(torch.cat([deep1, deep2], dim=1))
        return MyOutput(self.first.decode(deep1, skips1), self.second.decode(deep2, skips2), images)


def my_loss(out, batch):
    segment = losses.dice_ce(out.parts, batch["label"]) + losses.dice_ce(out.whole, (batch["label"] > 0).long())
    return 0.5 * segment + 0.1 * losses.l2(out.images, batch["image"])


# %% [markdown]
# The rest is PyTorch as usual. `PatchDataset` gives patches; item $n$ depends on the seed and on $n$ alone.

# %%
steps, batch_size = FEWER, 2
augment = data.Augmentation(flip=0.5, flip_axes=(0,), intensity=0.3)
patches = data.PatchDataset(train_cases, config.patch, steps * batch_size, seed=0, aug=augment)
torch.manual_seed(0)
my_net = MyMirrorUNet()
optimizer = torch.optim.AdamW(my_net.parameters(), 3e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
history = []
for batch in torch.utils.data.DataLoader(patches, batch_size):
    loss = my_loss(my_net(batch["image"]), batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    history.append(loss.item())
print(f"loss: {np.mean(history[:10]):.2f} over the first ten steps, {np.mean(history[-10:]):.2f} over the last ten")

# %% [markdown]
# Predicting whole heads is `sliding_window`, which takes any function of a batch of windows. Five channels at once here: the three
# classes' probabilities, and the two images.


# %%
def windows(x):
    out = my_net(x)
    return torch.cat([out.parts.softmax(1), out.images], dim=1)


my_net.eval()
fig, axes = plt.subplots(2, 4, figsize=(10, 5.6), layout="constrained")
for row, case in zip(axes, held_out):
    image, label = case.array("image").astype(np.float32), case.array("label")
    maps = predict.sliding_window(torch.from_numpy(image), windows, config.patch).numpy()
    classes, z = maps[:3].argmax(0), int((label > 0).sum((0, 1)).argmax())
    for axis, name, code, picture in zip(row, ("edema", "core"), (1, 2), (image[0], image[0])):
        dice = lesion_metrics(classes == code, label == code, (3, 3, 3))["dice"]
        outlines(axis, picture[..., z], label[..., z] == code, classes[..., z] == code, f"{name}, from T2w: Dice {dice:.2f}")
    for axis, name, picture in zip(row[2:], ("T2w", "FLAIR"), maps[3:]):
        axis.imshow(picture[..., z].T, origin="lower", cmap="gray")
        axis.set_title(f"{name}, reconstructed", fontsize=9)
        axis.axis("off")

# %% [markdown]
# The first branch tells three classes apart in one image, and T2w shows the edema less clearly than FLAIR does: compare its edema with
# that of the first training, which had more steps, too. Out of the bottleneck comes a blurred spot where the tumor is, in the
# checkerboard of transposed convolutions, and hardly anything of the rest: this is what two segmenting branches have put there after a
# hundred steps.
# **Your turn**, without an answer here: what changes with ten times the weight, or ten times the steps?
#
# If such a task shall become an option of `train.py`, these are the places: `MirrorUNet.forward` and its NamedTuple in `mirror_unet.py`,
# `MirrorLoss` in `losses.py`, `make_targets` in `data.py` (what the loss reads), and `foreground_probability` with `TARGETS` in
# `predict.py` (what is a map to be saved). `exercises.md` has some to begin with.
