# %% [markdown]
# # 5. PET/CT: train a v3, then look at its errors
#
# This notebook trains Mirror U-Net v3 on whole bodies, briefly. The rest of it is about what a mean
# Dice hides: *which* lesions were missed, *what* was taken for a lesion, and what the classifier
# adds. You need the abstract of the paper; the first notebook takes the network apart, and the
# second explains the loss. You need no GPU and no download
# ([how long it takes](../results/tutorials.csv)).
#
# The patients are synthetic (`phantom.py`), so the numbers say nothing about real patients. The
# same cells work with your own studies: set `ROOT` to a folder in AutoPET's layout, in which each
# `PATIENT/STUDY/` has the files `SUV.nii.gz`, `CTres.nii.gz` and `SEG.nii.gz`.

# %%
import os
from pathlib import Path

if Path.cwd().name == "tutorials":  # Jupyter starts here; the code is one folder up
    os.chdir("..")
# Let waiting threads sleep, so that other programs can use the cores. Set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import json
import sys

sys.path += [".", "tutorials"]

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

import figures
import predict
import slices
import train
from config import parse_config
from evaluate import mean_of
from metrics import case_metrics, patient_metrics, voxel_ml
from patches import Augmentation, PatchDataset

plt.rcParams["figure.dpi"] = 90
# Colors of the Okabe-Ito palette, for color-blind readers, too.
BLUE, SKY, RED, YELLOW = "#0072B2", "#56B4E9", "#D55E00", "#F0E442"

ROOT = None  # None: synthetic patients; or a folder, for example "/data/FDG-PET-CT-Lesions"
STEPS = 200  # few, to be fast; the last section says what good results need

# %% [markdown]
# ## The studies
#
# One config describes a run. `parse_config` reads the options of `python train.py`, so whatever
# works there works here. `load_cases` finds the studies, resamples them to the network's grid
# (once: the results are cached) and splits them by patient, so that two visits of one patient are
# never on different sides of the split.

# %%
options = f"--model v3 --steps {STEPS} --batch 2 --lr 0.003 --validations 1 --overwrite"
options = [*options.split(), "--cache", "cache/tutorials"]
if ROOT is None:
    options += "--data phantom --phantoms 48 --out runs/tutorial-petct".split()
else:
    options += ["--data", "petct", "--root", str(ROOT), "--out", "runs/tutorial-petct-own"]
config = parse_config(options)
train_cases, held_out = train.load_cases(config)
shown = held_out[:12]

for name, cases in (("training", train_cases), ("held out", held_out)):
    patients, with_tumor = {c.patient for c in cases}, sum(c.tumor for c in cases)
    print(f"{name}: {len(cases)} studies of {len(patients)} patients, {with_tumor} with tumor")
print(f"voxels of {config.spacing} mm, patches of {config.patch}, widths {config.channels}")

# %% [markdown]
# PET is shown as a **maximum-intensity projection**: each pixel is the highest value along the line
# of sight, here from front to back. High uptake is dark, and everything above the end of the scale
# is black; the tumors are outlined.


# %%
def spacing_of(case):
    """The voxel size of a study on the network's grid, in mm."""
    return nib.affines.voxel_sizes(case.affine)


def suv_of(case):
    """The PET in SUV: the arrays hold a window of SUV, scaled to 0 to 1."""
    low, high = config.preprocessing.suv_window
    return low + (high - low) * case.array("image")[1].astype(np.float32)


BLACK = min(10, config.preprocessing.suv_window[1])  # the SUV that is shown as black


def projections(cases, columns=6):
    """Show the PET of each study from the front; return the figure and the axes."""
    rows = -(-len(cases) // columns)
    shape, mm = cases[0].array("label").shape, spacing_of(cases[0])
    height = shape[2] * mm[2] / (shape[0] * mm[0])  # in units of the width
    size = (9, rows * (8.4 / columns * height + 0.5))
    fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.ravel():
        axis.axis("off")
    for axis, case in zip(axes.ravel(), cases):
        mip, mm = suv_of(case).max(1), spacing_of(case)
        style = dict(cmap="gray_r", vmin=0, vmax=BLACK, aspect=mm[2] / mm[0])
        image = axis.imshow(mip.T, origin="lower", **style)
    fig.colorbar(image, ax=axes, shrink=0.4, label="SUV", extend="max")
    return fig, axes.ravel()


fig, axes = projections(shown)
for axis, case in zip(axes, shown):
    truth = case.array("label") > 0
    title = case.name.replace("PETCT_", "").replace("__", " ")
    axis.set_title(title + ("" if case.tumor else "\nno tumor"), fontsize=8)
    if truth.any():
        axis.contour(truth.max(1).T, [0.5], colors=figures.TRUTH, linewidths=1.5)
outline = plt.Line2D([], [], color=figures.TRUTH, label="true tumor")
_ = fig.legend(handles=[outline], loc="outside lower center", fontsize=8)

# %% [markdown]
# No threshold on the uptake separates tumor from normal tissue: brain, heart, kidneys and bladder
# are as dark as most tumors, and the heart does not take up sugar in every patient. A network has
# to learn *where* uptake is normal.
#
# ## Training
#
# v3 has four tasks. The PET branch segments; the CT branch reconstructs a CT in which one cube of
# voxels was shuffled; a light decoder at the bottleneck reconstructs PET; and a classifier at the
# PET bottleneck decides whether the patch contains a tumor. MSE, the mean squared error, is the L2
# of the second notebook.
#
# $$ L = \lambda_\text{seg}\,(\text{Dice} + \text{CE}) + \lambda_\text{rec}\,\text{MSE}
#    + \lambda_\text{cls}\,\text{BCE}, \qquad \lambda = (0.5,\ 10^{-3},\ 10^{-2}) $$

# %%
train.prepare_folder(config)
run = train.Run(config, train_cases, held_out)
run.train()

# %% [markdown]
# The table shows the held-out patients, on the grid of their files (FPV and FNV are explained
# below; the numbers `patient_` in the first line judge the classifier). If there is no true tumor,
# Dice is undefined and any predicted volume is a false positive. The last line is what a simple
# threshold reaches, without any network. Here are the parts of the loss during training, each
# before it is multiplied by its $\lambda$:

# %%
lines = (run.folder / "metrics.jsonl").read_text().splitlines()
rows = [row for row in map(json.loads, lines) if "loss" in row]
panels = {
    "segmentation": {"seg_dice": "1 - soft Dice", "seg_ce": "cross entropy"},
    "reconstruction": {"ct_l2": "CT, L2", "pet_l2": "PET, L2"},
    "classification": {"cls_bce": "BCE"},
}
width = max(1, len(rows) // 15)  # of a running mean
steps = np.arange(width, len(rows) + 1)
fig, axes = plt.subplots(1, 3, figsize=(9, 2.7), layout="constrained")
for axis, (title, parts) in zip(axes, panels.items()):
    for (color, line), (key, label) in zip(((BLUE, "-"), (RED, "--")), parts.items()):
        values = np.array([row[key] for row in rows])
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        axis.plot(np.arange(1, len(rows) + 1), values, lw=0.5, alpha=0.3, color=color)
        axis.plot(steps, smooth, line, color=color, label=label)
    axis.set(title=title, xlabel="step", ylabel="loss")
    if title == "classification":
        axis.axhline(np.log(2), color="gray", ls=":", label="ln 2: guessing")
        axis.set_ylim(0, 1.5)
    else:
        axis.set_yscale("log")
    axis.legend(fontsize=8)

# %% [markdown]
# Cross entropy falls first: most voxels are background, which is learned quickly. Dice takes
# longer, because it counts the tumor voxels only. The reconstructions improve although their weight
# is a thousandth: the layers that serve only them get no other gradient, and the steps of Adam do
# not depend on the scale of a gradient. A later section returns to the classifier.
#
# ## Two kinds of error, in milliliters
#
# The same Dice can mean one tumor with inaccurate borders, or one that was found and one that was
# missed. For a patient these are different. The AutoPET challenge counts **connected components**
# (of voxels that share a face or an edge). A component *touches* a voxel if it contains it:
#
# * **FPV**, false-positive volume: predicted components that touch no true voxel, that is, lesions
#   that do not exist.
# * **FNV**, false-negative volume: true components that touch no predicted voxel, that is, lesions
#   that were missed.
#
# **Your turn.** Write `attempt(mask, other)`, which returns the components of `mask` that share no
# voxel with `other`, as a mask. `ndimage.label(mask, FACE_OR_EDGE)` returns the components,
# numbered from 1, and their count; two or three lines are enough.

# %% tags=["exercise"]
FACE_OR_EDGE = ndimage.generate_binary_structure(3, 2)


def attempt(mask, other):
    raise NotImplementedError  # your turn


# %% tags=["check"]
def line(*voxels):
    """A mask (3, 3, 9) that is true at some voxels of its middle line."""
    mask = np.zeros((3, 3, 9), bool)
    mask[1, 1, list(voxels)] = True
    return mask


def check_untouched(function):
    """Try three small examples, whose answers do not depend on any study."""
    examples = {
        "three components, of which `other` touches the first": (
            (line(0, 1, 3, 6, 7), line(1, 8)),
            line(3, 6, 7),
        ),
        "an empty `other` touches nothing": ((line(0, 1, 3), line()), line(0, 1, 3)),
        "a component next to `other` is not touched by it": ((line(2, 3), line(4)), line(2, 3)),
    }
    for what, (arguments, expected) in examples.items():
        try:
            found = function(*arguments)
        except NotImplementedError:
            return print("not yet: attempt is empty")
        if not np.array_equal(found, expected):
            return print("not yet:", what)
    print("right")


check_untouched(attempt)

# %% [markdown]
# The answer (folded; click on the dots to open it):


# %% jupyter={"source_hidden": true} tags=["solution"]
def untouched(mask, other):
    components, _ = ndimage.label(mask, FACE_OR_EDGE)
    return mask & ~np.isin(components, components[other & mask])


check_untouched(untouched)

# %% [markdown]
# Now the held-out patients. The solution has to give the FPV and FNV of the library:

# %%
probability, score = {}, {}
for case in held_out:
    maps, score[case.name] = run.predict(case, last=True)  # last: averaged over mirror images
    probability[case.name] = maps[0]  # (D, H, W)


def masks_of(case, threshold=config.threshold):
    """Prediction and truth on the network's grid, (D, H, W) each."""
    return probability[case.name] >= threshold, case.array("label") > 0


def numbers_of(case, threshold=config.threshold):
    """Dice, FPV, FNV and volumes; NaN if undefined."""
    return case_metrics(*masks_of(case, threshold), spacing_of(case))


for case in held_out:
    pred, truth = masks_of(case)
    ml, numbers = voxel_ml(spacing_of(case)), numbers_of(case)
    assert np.isclose(untouched(pred, truth).sum() * ml, numbers["fpv_ml"])
    if truth.any():
        assert np.isclose(untouched(truth, pred).sum() * ml, numbers["fnv_ml"])
print(f"the solution gives the library's FPV and FNV in {len(held_out)} studies")

# %% [markdown]
# ## Case by case
#
# Now we can look at the errors. Each component has a color and a symbol: true tumors that were
# found (sky blue, disc), predicted components without a true voxel (vermillion, cross), and missed
# tumors (yellow, triangle). The dashed line is the outline of the prediction of found tumors.

# %%
KINDS = {"found": (SKY, "o"), "false": (RED, "X"), "missed": (YELLOW, "v")}


def paint(axis, mask, kind):
    """Fill the projection of a mask, and mark its components."""
    color, marker = KINDS[kind]
    rgba = np.zeros((*mask.max(1).T.shape, 4))
    rgba[mask.max(1).T] = (*plt.matplotlib.colors.to_rgb(color), 0.75)
    axis.imshow(rgba, origin="lower", aspect=axis.get_aspect())
    components, count = ndimage.label(mask, FACE_OR_EDGE)
    centers = ndimage.center_of_mass(mask, components, range(1, count + 1))
    for x, _, z in centers:
        axis.plot(x, z, marker, color=color, mec="black", mew=0.7, ms=5)


fig, axes = projections(shown)
for axis, case in zip(axes, shown):
    pred, truth = masks_of(case)
    paint(axis, truth & ~untouched(truth, pred), "found")
    paint(axis, untouched(pred, truth), "false")
    paint(axis, untouched(truth, pred), "missed")
    hit = pred & ~untouched(pred, truth)
    if hit.any():
        axis.contour(hit.max(1).T, [0.5], colors="black", linewidths=0.8, linestyles="--")
    title = "no tumor\nFPV {fpv_ml:.0f} ml"
    if truth.any():
        title = "Dice {dice:.2f}\nFPV {fpv_ml:.0f}  FNV {fnv_ml:.0f} ml"
    axis.set_title(title.format(**numbers_of(case)), fontsize=8)
line = plt.Line2D([], [], color="black", lw=1, ls="--", label="prediction of a found tumor")
marks = [
    plt.Line2D([], [], color=color, marker=marker, lw=5, mec="black", label=kind)
    for kind, (color, marker) in KINDS.items()
]
_ = fig.legend(handles=[*marks, line], loc="outside lower center", ncols=4, fontsize=8)

# %% [markdown]
# The false components are at similar places in all patients: nearly all of them are in organs that
# take up sugar (look for crosses at the bladder, the kidneys, the heart, and brown fat at the
# shoulders). The brain, the darkest organ, is hardly ever marked: that it is no tumor has been
# learned. An organ is as large as several lesions, so a few of them make a large FPV (the titles
# have it). A component that touches a true voxel does not count as FPV, however far it extends; its
# excess lowers the Dice
# ([how far this can go](../results/README.md#measured-so-far)).
#
# What did the network take for a tumor? Here are the largest false component and the largest missed
# lesion, each in the slice that contains most of it:

# %%
worst = {}  # kind: (case, mask of the component)
for case in held_out:
    pred, truth = masks_of(case)
    errors = {"false": untouched(pred, truth), "missed": untouched(truth, pred)}
    for kind, wrong in errors.items():
        components, count = ndimage.label(wrong, FACE_OR_EDGE)
        if count:
            largest = components == 1 + np.bincount(components.ravel())[1:].argmax()
            if kind not in worst or largest.sum() > worst[kind][1].sum():
                worst[kind] = case, largest

fig, axes = plt.subplots(2, 3, figsize=(9, 5.6), layout="constrained")
for axis in axes.ravel():
    axis.axis("off")
for row, kind in zip(axes, ("false", "missed")):
    if kind not in worst:
        row[0].set_title(f"no {kind} component")
        continue
    case, wrong = worst[kind]
    z = int(wrong.sum((0, 1)).argmax())
    low, high = config.preprocessing.ct_window
    ct = low + (high - low) * case.array("image")[0, ..., z].astype(np.float32)
    pet, here = suv_of(case)[..., z], probability[case.name][..., z]
    others = (case.array("label")[..., z] > 0) & ~wrong[..., z]
    pictures = {
        "CT": (ct, dict(cmap="gray", vmin=low, vmax=high), "HU"),
        "PET": (pet, dict(cmap="gray_r", vmin=0, vmax=BLACK), "SUV"),
        "prediction": (here, dict(cmap="magma", vmin=0, vmax=1), "probability"),
    }
    for axis, (name, (image, style, label)) in zip(row, pictures.items()):
        image = axis.imshow(image.T, origin="lower", **style)
        fig.colorbar(image, ax=axis, shrink=0.7, label=label)
        for color, width in (("black", 3), (KINDS[kind][0], 1.5)):  # yellow on white needs an edge
            axis.contour(wrong[..., z].T, [0.5], colors=color, linewidths=width)
        if others.any():
            axis.contour(others.T, [0.5], colors=SKY, linewidths=1, linestyles="--")
        title = f"{name}: largest {kind} component" if name == "CT" else name
        axis.set_title(title, fontsize=9)
    ml = wrong.sum() * voxel_ml(spacing_of(case))
    sure = probability[case.name][wrong].max()
    print(f"largest {kind} component: {ml:.1f} ml, highest probability in it {sure:.2f}")
lines = {
    "false component": dict(color=RED),
    "missed lesion": dict(color=YELLOW),
    "true tumor": dict(color=SKY, ls="--"),
}
marks = [plt.Line2D([], [], label=name, **style) for name, style in lines.items()]
_ = fig.legend(handles=marks, loc="outside lower center", ncols=3, fontsize=8, facecolor="0.8")

# %% [markdown]
# The slices are seen from the feet, as radiologists see them: the left side of the patient is on
# the right. Which organ is the false component, and what is next to the missed lesion? The lines
# above say how certain the network is. CT could have helped with both, but the segmentation of v3
# reads PET only: CT acted on the shared weights during training.
#
# A reader of such a study scrolls through it. Here is the patient with the largest false component,
# in slices from the lowest to the highest outline (and with a slider, if ipywidgets is installed
# and you run this cell):

# %%
case = worst["false"][0] if "false" in worst else held_out[0]
pred, truth = masks_of(case)
pictures = {
    "PET": (suv_of(case), dict(cmap="gray_r", vmin=0, vmax=BLACK), "SUV"),
    "prediction": (probability[case.name], dict(cmap="magma", vmin=0, vmax=1), "probability"),
}
outlines = {"truth": truth, "prediction": pred}
browser = slices.show(pictures, outlines, spacing_of(case), plane="axial", number=6)

# %% [markdown]
#
# ## A trade-off between the errors
#
# The network gives probabilities, and somebody has to choose the threshold above which a voxel
# counts as tumor. A higher threshold gives fewer false lesions and more missed ones.
#
# **Your turn.** Before you run the next cell, sketch three curves over the threshold: mean Dice,
# mean FPV and mean FNV.

# %%
thresholds = np.array([0.02, 0.05, *np.arange(0.1, 0.95, 0.1), 0.95, 0.98])
titles = {"dice": "mean Dice", "fpv_ml": "mean FPV, ml", "fnv_ml": "mean FNV, ml"}
curves = {key: [] for key in titles}
for threshold in thresholds:
    rows = [numbers_of(case, threshold) for case in held_out]
    for key in curves:
        curves[key].append(mean_of(rows, key))

fig, axes = plt.subplots(1, 3, figsize=(9, 2.5), layout="constrained")
for axis, (key, title) in zip(axes, titles.items()):
    axis.plot(thresholds, curves[key], "o-", ms=4, color=BLUE)
    axis.axvline(config.threshold, color="gray", ls=":")
    axis.set(title=title, xlabel="threshold", ylim=(0, None))
    axis.grid(alpha=0.3)

# %% [markdown]
# FPV falls. (It may rise at a single step: if a component that touched a true voxel breaks up, its
# distant part becomes a false component.) FNV can only stay or rise, because fewer voxels are
# predicted. A lesion that is missed even at the lowest threshold has a low probability everywhere,
# and only better training can change that. Dice is flat in the
# middle. The dotted line is the threshold of the preset, which was chosen with other runs. Choosing
# it by these curves would mean choosing it on the held-out patients, and the results would be
# too optimistic.
#
# ## What does the classifier add?
#
# The classifier is trained on cells of $16^3$ voxels: is there tumor in this cell? The answer for a
# patch is the highest of its cells. A body is predicted in overlapping windows of the size of a
# patch, and the score of a patient is the highest of them. The hope is this: *if the score is low,
# the patient has no tumor, and every predicted component is false*. Is the score good enough? The
# **AUC** is the probability that a patient with tumor has a higher score than a patient without.
# For comparison we take a score that needs no classifier, the segmented volume.

# %%
has_tumor = np.array([case.tumor for case in held_out])
scores = np.array([score[case.name] for case in held_out])
rows = [numbers_of(case) for case in held_out]
volume = np.array([row["pred_ml"] for row in rows])
fpv = np.array([row["fpv_ml"] for row in rows])

# The question it was trained on: single patches, here of patients that it has not seen.
aug = Augmentation(flip=0.0)
dataset = PatchDataset(held_out, config.patch, 96, seed=1, aug=aug, foreground_fraction=0.5)
answers, labels = [], []
run.ema_model.eval()
with torch.no_grad():
    for patch in dataset:
        out = run.ema_model.segment(patch["image"][None, 1:])  # PET alone
        answers.append(out.tumor.sigmoid().item())
        labels.append(bool(patch["tumor"]))
answers, labels = np.array(answers), np.array(labels)

cohort = f"{len(has_tumor)} studies, {has_tumor.sum()} with tumor"
results = {
    f"classifier, {len(labels)} patches, {labels.sum()} with tumor": (answers, labels),
    f"classifier, {cohort}": (scores, has_tumor),
    f"segmented volume, {cohort}": (volume, has_tumor),
}
print("an AUC of 1 is perfect, one of 0.5 guessing")
for name, (values, truth) in results.items():
    print(f"AUC {patient_metrics(values, truth)['auc']:.2f}  {name}")
pairs = has_tumor.sum() * (~has_tumor).sum()
if pairs:
    print(f"{pairs} pairs of patients: one that changes its order moves the AUC by {1 / pairs:.2f}")

fig, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
bins = np.linspace(0, 1, 21)
axes[0].hist(answers[~labels], bins=bins, color="#c9ced6", label="without tumor")
axes[0].hist(answers[labels], bins=bins, histtype="step", color=RED, lw=2, label="with tumor")
axes[0].set(title="patches", xlabel="classifier: probability of tumor", ylabel="number")
without = ~has_tumor
axes[1].plot(scores[has_tumor], fpv[has_tumor], "o", color=RED, label="with tumor")
axes[1].plot(scores[without], fpv[without], "s", mfc="none", color=BLUE, label="without tumor")
axes[1].set(title="patients", xlabel="score: highest of the windows", ylabel="FPV, ml")
axes[1].margins(x=0.08)  # the scores may lie close together
for axis in axes:
    axis.legend(fontsize=8, loc="upper left")

# %% [markdown]
# The figures show more than one number. Most patches without tumor get a low answer and most
# patches with tumor a high one, although the network saw only a few hundred patches. Three things
# help the classifier: it has an answer to learn for each cell of $16^3$ voxels, not one per patch;
# it is shown the highest logit that the segmentation has in a cell; and a score is the highest of
# all cells, so that no tumor is averaged away. The classifier of the authors' code, one number per
# patch from the bottleneck alone, learns next to nothing in such short runs
# ([why](../docs/tasks.md)).
#
# For patients be careful: this is one network, of one seed, and few pairs (the last line above says
# how much one pair counts). Compare the AUC of the segmented volume, which costs nothing extra.
# [docs/tasks.md](../docs/tasks.md#classification-a-classifier-of-cells) has longer runs with three
# seeds.
#
# **Your turn.** Use the score as a gate: empty the prediction of every study whose score is below
# $s$. What happens to the mean FPV, and how many patients lose a tumor that had been found? Draw
# both over $s$; the answer follows.

# %%
gates = np.linspace(0, 1, 101)
found = np.array([(pred & truth).any() for pred, truth in map(masks_of, held_out)])
left = [np.where(scores >= s, fpv, 0).mean() for s in gates]
lost = [(found & (scores < s)).sum() for s in gates]

fig, axes = plt.subplots(1, 2, figsize=(9, 2.5), layout="constrained", sharex=True)
axes[0].plot(gates, left, color=BLUE)
axes[0].set(title="mean FPV that remains, ml", xlabel="gate s", ylim=(0, None))
axes[1].step(gates, lost, color=RED)
_ = axes[1].set(title=f"patients who lose a found tumor, of {found.sum()}", xlabel="gate s")
saved = [fpv.mean() - f for f, n in zip(left, lost) if n == 0]
print(f"mean FPV {fpv.mean():.1f} ml; the best gate that loses no tumor", end=" ")
print(f"removes {max(saved, default=0.0):.1f} ml of it")

# %% [markdown]
# The gate works if patients without tumor have lower scores than patients with tumor. A patient
# with tumor whose score is low pays for it: beyond that score the right figure rises. `predict.py
# --reject-below` is this gate. Do not choose it on the patients on whom it is judged, as the last
# cell did. Whether the task of the classifier improves the *shared features* is a different
# question: only a comparison of v2 with v3 over many runs can answer it.
#
# ## Your own studies, and longer runs
#
# Set `ROOT` at the top and run all cells again. The preset changes (finer voxels, larger patches,
# more augmentation), and the studies are preprocessed first. No cell changes. If no held-out study
# is without tumor, the AUC is undefined and prints as `nan`.
#
# Serious runs use the program instead of the notebook:
#
# ```
# python train.py                                            # the phantom
# python train.py --data petct --root ROOT --model v3        # your studies, on a laptop
# python train.py --preset autopet --root ROOT --model v3    # the paper's options, for a GPU
# ```
#
# [results/README.md](../results/README.md) has the results of such runs and how long they took. The
# network trained above is a checkpoint like theirs:

# %%
case = next((c for c in held_out if c.tumor), held_out[0])
pet, out = case.case.images[1], run.folder / "SEG_pred.nii.gz"
predict.main(["--checkpoint", str(run.folder / "best.pt"), "--pet", str(pet), "--out", str(out)])
mask = nib.load(out)
print(f"{pet.name} {nib.load(pet).shape} -> {mask.shape},", end=" ")
print(f"{np.asarray(mask.dataobj).sum()} voxels of tumor, on the grid of the input")
