# %% [markdown]
# # 7. Your data: from a folder of studies to a table of lesions
#
# You have a folder with PET/CT studies in which somebody outlined the tumors. This notebook goes
# with it from the files to trained networks, their ensemble, a table of lesions, and a look at the
# errors, case by case. The networks are Mirror U-Net v3 ([taken apart here](01_fission.ipynb)): it
# segments the tumors from PET, CT takes part in its training, and a classifier gives a score per
# patient. You need the abstract of the paper and some Python. No GPU and no download are needed.
#
# As it stands, the notebook writes synthetic patients (`phantom.py`) and treats them as your
# folder, so its numbers say nothing about real patients. **For your own studies change one line**,
# `ROOT` below, and run all cells again. Two layouts are shown here, others are in
# [docs/data.md](../docs/data.md):
#
# | nnU-Net raw | AutoPET (FDG-PET-CT-Lesions as NIfTI) |
# |---|---|
# | `imagesTr/CASE_0000.nii.gz`: CT in HU | `PATIENT/STUDY/CTres.nii.gz` |
# | `imagesTr/CASE_0001.nii.gz`: PET in SUV | `PATIENT/STUDY/SUV.nii.gz` |
# | `labelsTr/CASE.nii.gz`: one in tumor, zero elsewhere | `PATIENT/STUDY/SEG.nii.gz` |
# | `dataset.json`; `splits_final.json`, if you have folds | |
#
# Nothing is written into your folder.

# %%
import os
from pathlib import Path

if Path.cwd().name == "tutorials":  # Jupyter starts here; the code is one folder up
    os.chdir("..")
# Let waiting threads sleep, so that other programs can use the cores. Set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import contextlib
import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from typing import NamedTuple

sys.path.append(".")

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nibabel.processing import resample_from_to
from scipy import ndimage

import data
import figures
import metrics
import phantom
import predict
import train
from config import parse_config
from evaluate import mean_of
from files import UserError, on_one_grid, read_header, read_nifti
from patches import Augmentation, PatchDataset

plt.rcParams["figure.dpi"] = 90
# Colors of the Okabe-Ito palette. Each kind has a symbol or a line style, too.
BLUE, ORANGE, PINK, VERMILLION = "#0072B2", "#EEBC4D", "#CC79A7", "#D55E00"

ROOT = None  # None: synthetic patients; or your folder, for example "/data/FDG-PET-CT-Lesions"

# The rest can stay as it is.
MORE = ""  # more options of train.py about your files, for example "--label-values 1 2"
BUDGET = "--steps 50"  # of each network; for results that you want to use "--minutes 60" or more
FOLDS = 3  # the number of networks
OUT = None  # None: a temporary folder, deleted at the end; or a folder that keeps all results

temporary = tempfile.TemporaryDirectory(prefix="your-data-")
WORK = Path(OUT or temporary.name)
WORK.mkdir(parents=True, exist_ok=True)


class ShortPaths(io.StringIO):
    """Prints what is written to it, with short paths."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def write(self, text):
        return self.out.write(text.replace(f"{WORK}/", ""))


@contextlib.contextmanager
def plainly():
    """Print short paths, and errors of files as one line without a traceback."""
    try:
        with contextlib.redirect_stdout(ShortPaths(sys.stdout)):
            yield
    except UserError as e:
        raise SystemExit(f"error: {e}") from None


# %% [markdown]
# ## 1. What is on disk, and what the reader sees
#
# The next cell writes the synthetic patients with nibabel, all in nnU-Net's layout and the first
# few in AutoPET's as well. If your files are not in a layout that is known, a function like one of
# these two brings them there. A *fold* is one division into studies to train on and held-out ones.
# `make_folds` divides by *patient*, as two visits of one patient must never be on different sides,
# and gives each fold its share of the patients with tumor.


# %%
def save(array, affine, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def write_nnunet(root, study):
    """Add a study to root/imagesTr and root/labelsTr."""
    save(study.ct.astype(np.int16), study.affine, root / f"imagesTr/{study.name}_0000.nii.gz")
    save(study.suv, study.affine, root / f"imagesTr/{study.name}_0001.nii.gz")
    save(study.seg, study.affine, root / f"labelsTr/{study.name}.nii.gz")


def write_autopet(root, study):
    """Add a study to root, as PATIENT/STUDY/{CTres,SUV,SEG}.nii.gz."""
    folder = root / study.patient / study.name.removeprefix(f"{study.patient}_")
    save(study.ct.astype(np.int16), study.affine, folder / "CTres.nii.gz")
    save(study.suv, study.affine, folder / "SUV.nii.gz")
    save(study.seg, study.affine, folder / "SEG.nii.gz")


class Study(NamedTuple):
    """What folds are made from."""

    name: str
    patient: str
    tumor: bool


def files_below(folder, most=9):
    """Print the tree of a folder, or the beginning of it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths[:most]:
        print(f"   {path.relative_to(folder)}")
    if len(paths) > most:
        print(f"   ... {len(paths)} files")


root = Path(ROOT or WORK / "nnunet").expanduser()
if ROOT is None:
    studies = []
    for index in range(32):
        study = phantom.petct_study(index, spacing=(5, 5, 6))
        studies.append(Study(study.name, study.patient, bool(study.seg.any())))
        write_nnunet(root, study)
        if index < 4:
            write_autopet(WORK / "autopet", study)
    meaning = {
        "channel_names": {"0": "CT", "1": "PET"},
        "labels": {"background": 0, "tumor": 1},
        "numTraining": len(studies),
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(meaning, indent=1))
    folds = data.make_folds(studies, FOLDS + 1)
    (root / "splits_final.json").write_text(json.dumps(folds, indent=1))
    print("autopet:")
    files_below(WORK / "autopet")
    print(data.find_cases(WORK / "autopet", "petct")[1], "\n")
print(f"{root.name}:")
files_below(root)

about_files = ["--data", "petct", "--root", str(root), *MORE.split()]
about_files += ["--cache", str(WORK / "cache")]
with plainly():
    config = parse_config(about_files)
    found = data.find_cases(root, "petct", True, config.patient_regex, config.label_codes)
cases, line = {case.name: case for case in found[0]}, found[1]
print(line)

# %% [markdown]
# The last line is the first thing that `train.py` says about a folder: its layout, and how many
# studies and patients were found. **Check the number of patients.** It is derived from names; if it
# is wrong, `MORE = "--patient-regex ..."` says which part of a name is the patient.
#
# Look at some studies before you train on them. `volumes` reads the files on their own grid,
# without any preprocessing, and turns them so that the axes point left, to the front and up. The
# study below is the first one with a tumor.


# %%
def turned(image):
    """The same volume with axes left, anterior, superior."""
    turn = ornt_transform(io_orientation(image.affine), axcodes2ornt("LAS"))
    return image.as_reoriented(turn)


def volumes(case):
    """CT in HU, PET in SUV, truth (bool), each (D, H, W); and the affine."""
    ct, pet = read_nifti(case.images[0], air=-1000.0), read_nifti(case.images[1])
    truth = data.read_label(case)
    if not on_one_grid(ct, pet):
        ct = resample_from_to(ct, (pet.shape, pet.affine), order=1, cval=-1000.0)
    ct, pet, truth = (turned(image) for image in (ct, pet, truth))
    arrays = [image.get_fdata(dtype=np.float32) for image in (ct, pet)]
    return *arrays, np.asarray(truth.dataobj) > 0, pet.affine


def view(axis, image, mask, mm, style, color=figures.TRUTH):
    """Show a plane (D, H) and the outline of a mask; mm: the two sides of a voxel."""
    shown = axis.imshow(image.T, origin="lower", aspect=mm[1] / mm[0], **style)
    outline(axis, mask, color)
    axis.set(xticks=[], yticks=[])
    return shown


def outline(axis, mask, color):
    if mask.any() and min(mask.shape) > 1:
        line = figures.OUTLINES[color]
        axis.contour(mask.T, [0.5], colors=color, linestyles=line, linewidths=1.4)


BONE_TO_AIR = dict(cmap="gray", vmin=-200, vmax=300)


def uptake(highest):
    return dict(cmap="gray_r", vmin=0, vmax=float(highest))


with plainly():
    for case in cases.values():
        ct, pet, truth, affine = volumes(case)
        if truth.any():
            break
mm = voxel_sizes(affine)
y, z = int(truth.sum((0, 2)).argmax()), int(truth.sum((0, 1)).argmax())
size = np.array(pet.shape) * mm
ratios = [size[0] / size[2]] * 2 + [size[0] / size[1]] * 2
fig, axes = plt.subplots(1, 4, figsize=(10, 3.2), layout="constrained", width_ratios=ratios)
dark = uptake(np.percentile(pet[pet > 0], 99.5))
view(axes[0], ct[:, y], truth[:, y], mm[[0, 2]], BONE_TO_AIR)
view(axes[1], pet[:, y], truth[:, y], mm[[0, 2]], dark)
view(axes[2], ct[..., z], truth[..., z], mm[:2], BONE_TO_AIR)
shown = view(axes[3], pet[..., z], truth[..., z], mm[:2], dark)
for axis, title in zip(axes, ("CT, coronal", "PET, coronal", "CT, axial", "PET, axial")):
    axis.set_title(title, fontsize=9)
fig.colorbar(shown, ax=axes[3], label="SUV", shrink=0.7)
fig.legend([plt.Line2D([], [], color=figures.TRUTH)], ["truth"], loc="outside lower center")
plt.show()
codes = "".join(nib.aff2axcodes(read_header(case.images[1]).affine))
print(f"{case.name}, patient {case.patient}: {pet.shape} voxels of {np.round(mm, 2)} mm,", end=" ")
print(f"axes {codes} in the file")
print(f"CT {ct.min():.0f} to {ct.max():.0f} HU, PET up to SUV {pet.max():.1f};", end=" ")
print(f"tumor {truth.sum() * metrics.voxel_ml(mm):.1f} ml, SUV up to {pet[truth].max():.1f}")

# %% [markdown]
# What to look for: is the outline *on* the tumor in both images? Is left on the side where you
# expect it (the left side of the patient is on the right)? Are SUVs plausible (the liver has about
# two)? Does CT have HU, with fat below zero and soft tissue above?
#
# Much of this is checked when files are read ([the list](../docs/data.md#what-is-checked)). A
# message says which file it is, what is wrong and what to do. Here are four of them, provoked on
# purpose: with a PET in Bq/ml (activity, not yet SUV), with a truth that was moved, with a file
# that was cut short, and with a study without CT.

# %%
broken = WORK / "broken"
ct_file, pet_file = case.images
bad_pet, bad_truth, bad_ct = (broken / f"{name}.nii.gz" for name in ("becquerel", "moved", "short"))
image = read_nifti(pet_file)
save(image.get_fdata(dtype=np.float32) * 4000, image.affine, bad_pet)
moved = image.affine.copy()
moved[0, 3] += 30  # mm
save(np.zeros(image.shape, np.uint8), moved, bad_truth)
content = ct_file.read_bytes()
bad_ct.write_bytes(content[: len(content) // 2])
(broken / "P1/visit1").mkdir(parents=True, exist_ok=True)
for name, path in (("SUV", pet_file), ("SEG", case.label)):
    shutil.copy(path, broken / f"P1/visit1/{name}.nii.gz")

bad = {
    "Bq/ml": replace(case, images=(ct_file, bad_pet)),
    "moved": replace(case, label=bad_truth),
    "short": replace(case, images=(bad_ct, pet_file)),
    "no CT": None,
}
for name, study in bad.items():
    try:
        if study:
            data.preprocess(study, config.preprocessing)
        else:
            data.find_cases(broken, "petct")
        print(f"{name}: accepted")
    except UserError as e:
        with plainly():
            print(f"{name}:\n   {e}")

# %% [markdown]
# ## 2. Choose the settings from the data
#
# First keep some patients for the very end. The notebook takes the last fold for this: its held-out
# studies are the **test studies**, and no network and no setting sees them. The other folds,
# without these studies, are for training. If your folder has `splits_final.json`, its folds are
# used.

# %%
with plainly():
    own = data.find_splits(root)
    folds = data.read_splits(own, found[0]) if own else []
    if len(folds) < 2:
        studies = []
        for case in cases.values():
            tumor = bool(np.any(data.read_label(case).dataobj))
            studies.append(Study(case.name, case.patient, tumor))
        folds = data.make_folds(studies, FOLDS + 1)
    apart = folds[-1]["val"]
    kept = []
    for fold in folds[:-1][:FOLDS]:
        kept.append({side: [n for n in fold[side] if n not in apart] for side in fold})
    splits = WORK / "splits.json"
    splits.write_text(json.dumps(kept, indent=1))
    data.read_splits(splits, found[0])  # refuses an empty side, and a patient on both sides
test = apart[:40]  # more would take long to look at
others = [name for name in cases if name not in apart]
print(f"{len(apart)} test studies; {len(kept)} folds of the other {len(others)}:", end=" ")
print(", ".join(f"{len(f['train'])} to train on, {len(f['val'])} held out" for f in kept))

# %% [markdown]
# Then measure the training studies (at most forty of them, which is enough for quantiles):
#
# * **Lesions**: their volumes say how fine the network's voxels have to be.
# * **SUV**: where the uptake of the tumors lies says which window of SUV the network should see.
# * **A threshold**: how far does the rule "tumor is SUV above $t$" get without any network? A
#   network has to beat the best of these, or something is wrong.
#
# **Your turn.** Which $t$ will be the best, and what mean Dice will it reach? Write down a guess.

# %%
thresholds = np.geomspace(1, 20, 25)
surveyed = others[:: max(1, len(others) // 40)]
lesions, tumor_suv, dice, fields, sizes = [], [], [], [], []
with plainly():
    for name in surveyed:
        _, pet, truth, affine = volumes(cases[name])
        mm = voxel_sizes(affine)
        fields.append(np.array(pet.shape) * mm)
        sizes.append(mm)
        if truth.any():
            lesions += metrics.lesion_table(truth, affine, pet)
            tumor_suv.append(np.percentile(pet[truth], [10, 50, 90]))
            total = truth.sum() + np.array([(pet >= t).sum() for t in thresholds])
            hits = np.array([(pet[truth] >= t).sum() for t in thresholds])
            dice.append(2 * hits / total)
volume = np.array([lesion["volume_ml"] for lesion in lesions])
field, voxel = np.median(fields, 0), np.median(sizes, 0)
mean_dice = np.mean(dice, 0)
best = int(mean_dice.argmax())
low, middle, high = np.median(tumor_suv, 0)
small, medium, large = np.percentile(volume, [10, 50, 90])
print(f"{len(surveyed)} studies, {len(dice)} with tumor, {len(lesions)} lesions:", end=" ")
print(f"{small:.2f}, {medium:.2f}, {large:.1f} ml (10 %, 50 % and 90 % are smaller)")
print(f"SUV in a typical tumor: {low:.1f}, {middle:.1f}, {high:.1f} (the same quantiles)")
print(f"voxels of {np.round(voxel, 2)} mm, field of view {np.round(field)} mm")
print(f"best threshold: SUV {thresholds[best]:.1f}, mean Dice {mean_dice[best]:.2f}")

grids = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)  # mm
TWO_ACROSS = 8  # voxels, two along each side: fewer are hard to find, and to outline
fine = [np.mean(volume >= TWO_ACROSS * side**3 / 1000) for side in grids]
fig, axes = plt.subplots(1, 3, figsize=(9.5, 2.9), layout="constrained")
axes[0].hist(volume, bins=np.geomspace(volume.min() * 0.9, volume.max() * 1.1, 20), color="#c9ced6")
axes[0].set(xscale="log", xlabel="volume, ml", ylabel="number", title="lesions")
axes[1].plot(grids, fine, "o-", color=BLUE)
axes[1].set(xlabel="side of a voxel, mm", ylim=(0, 1.05))
axes[1].set_title(f"share of lesions with {TWO_ACROSS} voxels", fontsize=10)
axes[2].plot(thresholds, mean_dice, "s-", ms=3, color=BLUE)
axes[2].axvline(thresholds[best], color=VERMILLION, ls=":", label="best")
axes[2].set(xscale="log", xlabel="threshold, SUV", ylabel="mean Dice", ylim=(0, 1))
axes[2].set(xticks=(1, 2, 5, 10, 20), xticklabels=(1, 2, 5, 10, 20), title="SUV threshold")
axes[2].minorticks_off()
axes[2].legend()
for axis in axes:
    axis.grid(alpha=0.3)
plt.show()

# %% [markdown]
# Now decide:
#
# * **Voxels.** Finer voxels show small lesions, and cost: halving the side multiplies voxels and
#   time by about eight. The rule below takes the coarsest grid on which most lesions have two
#   voxels along each side, but none that is much finer than the files. This notebook is in a hurry
#   and gives up some small lesions; the cell prints which share is left.
# * **SUV window.** It ends a bit above the uptake of a typical tumor. All brighter voxels get the
#   value of its end, so they look alike to the network.
# * **Patch.** It has to be large enough to show *where* in the body it is, because that tells a
#   tumor from an organ, and small enough for the memory. A side is a multiple of sixteen voxels, as
#   the network halves it at four levels. What extends beyond the field of view is wasted.

# %%
ENOUGH = 0.75  # share of the lesions; for a real run rather 0.95
of_files = float(np.prod(voxel) ** (1 / 3))
finest = min(grids, key=lambda grid: abs(grid - of_files))
able = [grid for grid, share in zip(grids, fine) if share >= ENOUGH and grid <= 6]
side = max([finest, *able])
window = float(np.clip(np.ceil(1.25 * high), 5, 15))
longest = 48  # voxels; for a real run 64 on a laptop, 96 or more on a GPU
patch = [int(min(longest, 16 * math.ceil(n / side / 16))) for n in field]
patch = [max(32, n) for n in patch]
print(f"voxels of {side:g} mm: {fine[grids.index(side)]:.0%} of the lesions have", end=" ")
print(f"{TWO_ACROSS} voxels or more")
print(f"SUV 0 to {window:g} becomes 0 to 1")
print(f"patch {patch} voxels, {[round(n * side / 10) for n in patch]} cm of", end=" ")
print(f"{[round(n / 10) for n in field]} cm; {math.prod(patch) / 1e3:.0f} thousand voxels")

# %% [markdown]
# How much tumor does such a patch hold? Tumors are tiny compared with a body. If patches were drawn
# anywhere, the network would hardly ever see one; so `--foreground-fraction` of the patches are
# centered on a tumor voxel, if the patient has one. The next cell preprocesses all studies (once:
# the result is cached), draws patches of three sizes both ways, and counts.

# %%
words = [*about_files, "--model", "v3", "--splits", str(splits), "--fold", "all"]
words += ["--spacing", *[f"{side:g}"] * 3, "--suv-window", "0", f"{window:g}"]
words += ["--patch", *map(str, patch), "--out", str(WORK / "runs"), *BUDGET.split()]
# A run of minutes: a higher learning rate, no heavy augmentation, one validation, no mirror images.
words += "--lr 0.003 --rotate 0 --scale 0 --gamma 0 --flip-axes 0 --threshold 0.5".split()
words += "--validations 1 --no-flips --checkpoint-minutes 0.2 --overwrite".split()
with plainly():
    config = parse_config(words)
    sides = train.load_folds(config)
train_cases = sides[0][0]

share = config.foreground_fraction
options = {"anywhere": 0.0, f"{share:.0%} on tumor": share}
candidates = dict.fromkeys(tuple(min(n, most) for n in patch) for most in (longest, 32, 16))
fig, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
marks = {"anywhere": dict(color=ORANGE, hatch="//"), None: dict(color=BLUE)}
for k, (name, fraction) in enumerate(options.items()):
    shares, voxels = [], []
    for size in candidates:
        drawn = PatchDataset(train_cases, size, 100, 0, Augmentation(flip=0.0), fraction)
        counts = np.array([int(item["label"].sum()) for item in drawn])
        shares.append((counts > 0).mean())
        voxels.append(counts[counts > 0].mean() if counts.any() else 0.0)
    style = marks.get(name, marks[None]) | dict(edgecolor="black", label=name)
    for axis, values, form in zip(axes, (shares, voxels), ("%.2f", "%.0f")):
        bars = axis.bar(np.arange(len(values)) + 0.4 * k - 0.2, values, 0.38, **style)
        axis.bar_label(bars, fmt=form, fontsize=8)
names = ["x".join(map(str, size)) for size in candidates]
axes[0].set(title="share of patches with tumor", ylim=(0, 1.1))
axes[1].set(title="tumor voxels in those, mean", ylabel="voxels")
axes[1].margins(y=0.12)
for axis in axes:
    axis.set(xticks=range(len(names)), xticklabels=names, xlabel="patch, voxels")
axes[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# The smaller the patch, the less often it holds tumor by chance, and the less it shows of the body.
#
# ## 3. Train, and resume after an interruption
#
# The options above are those of `python train.py`; `--fold all` trains one network per fold, each
# with its own held-out studies, into `runs/fold0`, `runs/fold1` and so on. We start it as you
# would, as a program, and then something happens: the process gets SIGTERM, the signal that a queue
# sends when the time is up. (Ctrl-C does the same.)

# %%
AFTER = 12  # steps

with open(WORK / "terminal.txt", "w") as terminal:
    command = [sys.executable, "train.py", *words]
    process = subprocess.Popen(command, stdout=terminal, stderr=subprocess.STDOUT)
    log = WORK / "runs/fold0/metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= AFTER):
        time.sleep(0.2)
    process.terminate()
    process.wait()
said = (WORK / "terminal.txt").read_text().replace("\r", "\n").splitlines()
said = [text for text in said if text.strip() and not re.search(r"% ?\|", text)]  # no bars
with plainly():
    print("\n".join(said))
print("exit code", process.returncode)

# %% [markdown]
# It finished its step, saved everything that decides the next step, and printed the command that
# continues. (A process that is killed without a warning loses the time since its last checkpoint,
# `--checkpoint-minutes`.) The next cell is that command: `train.main` is `train.py` without a new
# process. It continues the first network and then trains the others.

# %%
with plainly():
    train.main(["--resume", "--out", str(WORK / "runs")])

# %% [markdown]
# Each table has the held-out studies of one fold. FPV is the volume of predicted components that
# touch no true voxel, false lesions; FNV that of true components that touch no predicted voxel,
# missed ones ([more about them](05_petct.ipynb)). The last line below a table is the best
# threshold, for comparison: a network has to beat it. Did the interruption leave a trace? Every
# step must be in the log exactly once.

# %%
runs = [WORK / f"runs/fold{i}" for i in range(len(kept))]
logs = []
for run in runs:
    rows = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    logs.append([row for row in rows if "loss" in row])
steps = [row["step"] for row in logs[0]]
assert steps == list(range(1, len(steps) + 1))
print(f"fold 0: steps 1 to {steps[-1]}, each once")

stopped = next((text for text in said if "stopped after step" in text), "")
where = int(stopped.split("step ")[1].split(";")[0]) if stopped else None
fig, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
styles = [(BLUE, "-"), (ORANGE, "--"), ("black", ":")]
for i, rows in enumerate(logs):
    color, ls = styles[i % 3]
    values = np.array([row["seg_dice"] for row in rows])
    width = max(1, len(values) // 10)  # of a running mean
    smooth = np.convolve(values, np.ones(width) / width, "valid")
    axis.plot(np.arange(width, len(values) + 1), smooth, ls, color=color, label=f"fold {i}")
if where:
    axis.axvline(where, color="gray", lw=1, ls="-.", label="interrupted")
axis.set(xlabel="step", ylabel="1 - soft Dice", ylim=(0, 1.02))
axis.set_title("training loss, running mean")
axis.legend(fontsize=8)
plt.show()
minutes = [rows[-1]["seconds"] / 60 for rows in logs]
print(f"the steps took {', '.join(f'{m:.1f}' for m in minutes)} minutes")

# %% [markdown]
# **Do not take these networks for a result.** They were trained for the time that the last line
# says, enough to see every step of the way. A first useful network takes the options of the laptop
# preset and its twelve minutes per fold on two cores ([docs/data.md](../docs/data.md#layouts)): set
# `BUDGET`. The paper's recipe, `--preset autopet`, is for a GPU and takes far more. What follows is
# the same for all of them, only the numbers differ.
#
# ## 4. The ensemble, on studies that no network has seen
#
# An ensemble averages the probabilities of the networks. `predict.py` takes several checkpoints and
# a folder. We give it the test studies, as a folder of links to your files with the same names, and
# ask for probability maps as well. (To predict new patients, give it their folder. Truth and, for
# v1 to v3, CT may be missing there.)


# %%
def link(source, target):
    """A link to a file, or a copy if the system does not allow links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        target.symlink_to(source.resolve())
    except OSError:
        shutil.copy(source, target)


test_root = WORK / "test"
for name in test:
    for path in cases[name].files():
        link(path, test_root / path.relative_to(root))
if (root / "dataset.json").exists():
    link(root / "dataset.json", test_root / "dataset.json")

checkpoints = [str(run / "best.pt") for run in runs]
places = ["--root", str(test_root), "--out", str(WORK / "predictions")]
with plainly():
    predict.main(["--checkpoint", *checkpoints, *places, "--probabilities"])

# %% [markdown]
# Dice is undefined in a patient without tumor; there any predicted volume is a false positive. Is
# the ensemble better than its members? We let each network predict the same studies alone. The
# tables are `metrics.csv` (a row per study) and `lesions.csv` (a row per predicted lesion) in the
# folder of the predictions. ([What each number means](../docs/running.md#the-tables), such as
# surface Dice and HD95.)


# %%
def read_table(path):
    """The rows of a CSV file; an empty cell is NaN."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    text = ("case", "target", "has_tumor")
    return [{k: v if k in text else float(v or "nan") for k, v in r.items()} for r in rows]


tables = {}
for i, checkpoint in enumerate(checkpoints):
    alone = WORK / f"predictions-fold{i}"
    with plainly(), contextlib.redirect_stdout(io.StringIO()):
        predict.main(["--checkpoint", checkpoint, "--root", str(test_root), "--out", str(alone)])
    tables[f"fold {i}"] = read_table(alone / "metrics.csv")
tables["ensemble"] = results = read_table(WORK / "predictions/metrics.csv")

print(f"{'':10}{'Dice':>8}{'FPV ml':>9}{'FNV ml':>9}{'found':>8}{'false per study':>17}")
for name, rows in tables.items():
    dice, fpv, fnv, found_share, false_count = (
        mean_of(rows, key)
        for key in ("dice", "fpv_ml", "fnv_ml", "lesion_sensitivity", "false_lesions")
    )
    print(f"{name:10}{dice:8.3f}{fpv:9.1f}{fnv:9.1f}{found_share:8.0%}{false_count:17.1f}")
alone = [mean_of(rows, "dice") for name, rows in tables.items() if name != "ensemble"]
gain = mean_of(results, "dice") - np.mean(alone)
print(f"the ensemble's Dice is {gain:+.3f} from the mean of its members,", end=" ")
print(f"{mean_of(results, 'dice') - max(alone):+.3f} from the best one")

# %% [markdown]
# Errors that the members do not share are averaged away; errors that all of them make stay. Do not
# conclude more from a handful of studies.
#
# ## 5. The table of lesions
#
# `lesions.csv` knows predicted lesions only: a missed one has no row. `metrics.lesion_table` makes
# the same numbers of any mask. We apply it to the truth, too, and get three kinds: **found** (a
# true lesion that shares a voxel with the prediction), **missed**, and **false** (a predicted
# lesion that shares none with the truth). The numbers are the volume, SUVmax, SUVpeak (the highest
# mean of a small ball around a voxel of the lesion) and TLG, total lesion glycolysis: volume times
# mean SUV ([all columns](../docs/running.md#the-tables)).


# %%
def mask_of(name):
    """The ensemble's mask of a test study, (D, H, W)."""
    mask = turned(nib.load(WORK / f"predictions/{name}.nii.gz"))
    return np.asarray(mask.dataobj) > 0


predicted = read_table(WORK / "predictions/lesions.csv")
table = []
for name in test:
    _, pet, truth, affine = volumes(cases[name])
    for row in metrics.lesion_table(truth, affine, pet, mask_of(name)):
        table.append({"case": name, "kind": "found" if row["meets_truth"] else "missed", **row})
table += [{"kind": "false", **r} for r in predicted if not r["meets_truth"]]


def print_lesions(rows, most=8):
    columns = ("volume_ml", "suv_max", "suv_peak", "tlg")
    print(f"{'study':24}{'kind':8}" + "".join(f"{name:>11}" for name in columns))
    for row in rows[:most]:
        numbers = "".join(f"{row[name]:11.2f}" for name in columns)
        print(f"{row['case']:24}{row['kind']:8}{numbers}")
    if len(rows) > most:
        print(f"... and {len(rows) - most} smaller ones")


for kind in ("found", "missed", "false"):
    rows = [row for row in table if row["kind"] == kind]
    print(f"\n{kind}: {len(rows)} lesions, {sum(row['volume_ml'] for row in rows):.1f} ml")
    print_lesions(sorted(rows, key=lambda row: -row["volume_ml"]))

# %% [markdown]
# "Shares a voxel" is generous: a large lesion counts as found if its tip is. **Your turn.** Write
# `attempt(true_mask, pred_mask, least)`, which counts the lesions of `true_mask` of which at least
# the share `least` of the voxels is in `pred_mask`. `ndimage.label(true_mask, FACE_OR_EDGE)`
# numbers the lesions from one and returns the numbers and their count; four or five lines are
# enough. The cell below yours checks it with examples that depend on no study.

# %% tags=["exercise"]
FACE_OR_EDGE = ndimage.generate_binary_structure(3, 2)


def attempt(true_mask, pred_mask, least):
    raise NotImplementedError  # your turn


# %% tags=["check"]
def line_of(*at):
    """A mask (3, 3, 12) that is true at some voxels of its middle line."""
    strip = np.zeros((3, 3, 12), bool)
    strip[1, 1, list(at)] = True
    return strip


def check_found(function):
    """Three lesions, of four, two and two voxels, of which one, two and none are predicted."""
    three, predicted_line = line_of(0, 1, 2, 3, 5, 6, 9, 10), line_of(0, 5, 6, 7)
    examples = {
        "half of its voxels: one lesion": ((three, predicted_line, 0.5), 1),
        "a quarter of its voxels: two lesions": ((three, predicted_line, 0.25), 2),
        "a bit more than a quarter: one lesion": ((three, predicted_line, 0.26), 1),
        "without a prediction nothing is found": ((three, line_of(), 0.5), 0),
        "without a lesion there is none to find": ((line_of(), predicted_line, 0.5), 0),
    }
    for what, (arguments, expected) in examples.items():
        try:
            answer = function(*arguments)
        except NotImplementedError:
            return print("not yet: attempt is empty")
        if not np.array_equal(answer, expected):
            return print("not yet:", what)
    print("right")


check_found(attempt)

# %% [markdown]
# The answer (folded; click on the dots to open it):


# %% jupyter={"source_hidden": true} tags=["solution"]
def count_found(true_mask, pred_mask, least):
    labels, how_many = ndimage.label(true_mask, FACE_OR_EDGE)
    all_voxels = np.bincount(labels.ravel(), minlength=how_many + 1)[1:]
    covered = np.bincount(labels[pred_mask], minlength=how_many + 1)[1:]
    return int((covered >= least * all_voxels).sum())


check_found(count_found)

# %% [markdown]
# Now count in all test studies, from one voxel to the whole lesion. The first count has to be that
# of the table above.

# %%
pairs = [(volumes(cases[name])[2], mask_of(name)) for name in test]
shares = np.array([1e-9, *np.arange(0.1, 1.01, 0.1)])
counts = [sum(count_found(*pair, share) for pair in pairs) for share in shares]
kinds = [row["kind"] for row in table]
assert counts[0] == kinds.count("found")
number = kinds.count("found") + kinds.count("missed")
print(f"of {number} lesions {counts[0]} share a voxel with the prediction,", end=" ")
print(f"{counts[5]} at least half of their voxels, {counts[-1]} all of them")
fig, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
axes[0].step(100 * shares, counts, "o-", where="pre", ms=4, color=BLUE)
axes[0].axhline(number, color="gray", ls=":", label="all true lesions")
axes[0].set(xlabel="share that must be predicted, %", ylabel="lesions found", ylim=(0, None))
axes[0].yaxis.get_major_locator().set_params(integer=True)
axes[0].legend(fontsize=8)
true_ml = np.array([row["truth_ml"] for row in results])
pred_ml = np.array([row["pred_ml"] for row in results])
top = max(true_ml.max(), pred_ml.max()) * 1.5
axes[1].plot([0, top], [0, top], color="gray", ls=":", label="equal")
for name, mask, style in (
    ("with tumor", true_ml > 0, dict(marker="o", color=BLUE)),
    ("without tumor", true_ml == 0, dict(marker="s", color=VERMILLION, mfc="none")),
):
    axes[1].plot(true_ml[mask], pred_ml[mask], ls="none", label=name, **style)
axes[1].set(xlabel="true tumor volume, ml", ylabel="predicted volume, ml")
axes[1].set_xscale("symlog", linthresh=1)
axes[1].set_yscale("symlog", linthresh=1)
axes[1].legend(fontsize=8)
plt.show()

# %% [markdown]
# On the left, the steeper the curve falls, the more lesions are found only in part. On the right is
# the volume per patient (the metabolic tumor volume, MTV, if the outline follows the uptake), on
# scales that are linear near zero and logarithmic beyond. Points above the dotted line have too
# much volume; the squares on the left edge are patients without tumor.
#
# ## 6. Errors, case by case
#
# A mean hides what a look shows. Sort the studies by Dice and look at the best, the middle and the
# worst one, and at the patient without tumor who has the largest false volume. In the projection
# (the highest value along each line of sight) you see *what* was outlined; in the slice, *how*.

# %%
positive = sorted((row for row in results if row["truth_ml"]), key=lambda row: -row["dice"])
negative = sorted((row for row in results if not row["truth_ml"]), key=lambda row: -row["fpv_ml"])
picked = {"best": positive[:1], "middle": positive[len(positive) // 2 :][:1]}
picked |= {"worst": positive[-1:], "without tumor": negative[:1]}
picked = {title: rows[0] for title, rows in picked.items() if rows}


def probability_of(name):
    """The ensemble's probability map of a test study, (D, H, W)."""
    path = predict.probability_path(WORK / f"predictions/{name}.nii.gz", "seg")
    return turned(nib.load(path)).get_fdata(dtype=np.float32)


def slice_of(truth, pred):
    """The slice with the largest missed or false area, among those with tumor if there are any."""
    area = (truth ^ pred).sum((0, 1))
    has_tumor = truth.any((0, 1))
    if has_tumor.any():
        area = np.where(has_tumor, area + 1, 0)
    return int(area.argmax())


opened = {row["case"]: volumes(cases[row["case"]]) for row in picked.values()}
size = np.array(opened[next(iter(opened))][1].shape) * voxel_sizes(affine)
ratios = [size[0] / size[2]] + [size[0] / size[1]] * 3
height = 2.1 * len(picked) + 0.4
fig = plt.figure(figsize=(9.5, height), layout="constrained")
axes = fig.subplots(len(picked), 4, squeeze=False, width_ratios=ratios)
titles = ("PET, projection", "CT", "PET", "probability")
for row, (title, numbers) in zip(axes, picked.items()):
    name = numbers["case"]
    ct, pet, truth, affine = opened[name]
    pred, probability, mm = mask_of(name), probability_of(name), voxel_sizes(affine)
    z = slice_of(truth, pred)
    dark = uptake(np.percentile(pet[pet > 0], 99.5))
    view(row[0], pet.max(1), truth.max(1), mm[[0, 2]], dark)
    view(row[1], ct[..., z], truth[..., z], mm[:2], BONE_TO_AIR)
    shown = view(row[2], pet[..., z], truth[..., z], mm[:2], dark)
    fig.colorbar(shown, ax=row[2], label="SUV", shrink=0.8)
    style = dict(cmap="gray_r", vmin=0, vmax=1)
    shown = view(row[3], probability[..., z], truth[..., z], mm[:2], style)
    fig.colorbar(shown, ax=row[3], label="probability", shrink=0.8)
    outline(row[0], pred.max(1), figures.PREDICTION)
    for axis in row[1:]:
        outline(axis, pred[..., z], figures.PREDICTION)
    dice = "" if math.isnan(numbers["dice"]) else f"Dice {numbers['dice']:.2f}, "
    fnv = "" if math.isnan(numbers["fnv_ml"]) else f", FNV {numbers['fnv_ml']:.0f}"
    label = f"{title}\n{name}\n{dice}FPV {numbers['fpv_ml']:.0f}{fnv} ml"
    row[0].set_ylabel(label, fontsize=8, parse_math=False)
for axis, title in zip(axes[0], titles):
    axis.set_title(title, fontsize=9)
lines = [plt.Line2D([], [], color=c, ls=ls) for c, ls in figures.OUTLINES.items()]
fig.legend(lines, ["truth", "prediction"], loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# Why did it fail? Four numbers per lesion answer most of this:
#
# * its **volume in voxels of the network**: a few voxels are hard to learn;
# * its **contrast**: its mean SUV over that of a shell of a centimeter around it. A contrast near
#   one means that its surroundings are as bright, for example an organ that it touches;
# * its mean **HU**: fat is far below zero, water and urine near zero, soft tissue above, bone far
#   above. A false lesion with the HU of urine may be in a kidney or the bladder;
# * the highest **probability** in it: just below the threshold, or nowhere near?


# %%
def surroundings(mask, other, mm):
    """The voxels within a centimeter of a mask that are neither in it nor in `other`."""
    distance = ndimage.distance_transform_edt(~mask, mm)
    return (distance > 0) & (distance <= 10) & ~other


def explain(name):
    """A row per true lesion and per false one of a study."""
    ct, pet, truth, affine = volumes(cases[name])
    pred, probability, mm = mask_of(name), probability_of(name), voxel_sizes(affine)
    rows = []
    for mask, other in ((truth, pred), (pred, truth)):
        numbers, count = ndimage.label(mask, FACE_OR_EDGE)
        for n, box in enumerate(ndimage.find_objects(numbers), start=1):
            margin = np.ceil(12 / mm).astype(int)
            near = tuple(slice(max(0, s.start - m), s.stop + m) for s, m in zip(box, margin))
            lesion = numbers[near] == n
            touched = bool((lesion & other[near]).any())
            if mask is pred and touched:
                continue  # is in the table as a found lesion
            kind = "false" if mask is pred else "found" if touched else "missed"
            shell = surroundings(lesion, mask[near], mm)
            around = pet[near][shell].mean() if shell.any() else math.nan
            ml = lesion.sum() * metrics.voxel_ml(mm)
            rows.append({
                "case": name, "kind": kind, "volume_ml": ml, "voxels": ml * 1000 / side**3,
                "suv_max": pet[near][lesion].max(),
                "contrast": pet[near][lesion].mean() / max(around, 1e-3),
                "hu": ct[near][lesion].mean(), "probability": probability[near][lesion].max(),
            })  # fmt: skip
    return rows


reasons = [row for name in test for row in explain(name)]


def print_reasons(rows, most=10):
    columns = {"volume_ml": 2, "voxels": 0, "suv_max": 1, "contrast": 1, "hu": 0, "probability": 2}
    print(f"{'study':24}{'kind':8}" + "".join(f"{name:>12}" for name in columns))
    for row in sorted(rows, key=lambda row: -row["volume_ml"])[:most]:
        numbers = "".join(f"{row[name]:12.{digits}f}" for name, digits in columns.items())
        print(f"{row['case']:24}{row['kind']:8}{numbers}")


worst = picked.get("worst", results[0])["case"]
print(f"the worst study, {worst}:")
print_reasons([row for row in reasons if row["case"] == worst])
missed = [row for row in reasons if row["kind"] == "missed"]
false = [row for row in reasons if row["kind"] == "false"]
for kind, rows in (("missed", missed), ("false", false)):
    print(f"\nthe largest {kind} lesions of all test studies:")
    print_reasons(rows, most=6)
faint = [row for row in missed if row["contrast"] < 2]
tiny = [row for row in missed if row["voxels"] < TWO_ACROSS]
near = [row for row in missed if row["probability"] >= config.threshold / 2]
print(f"\nof {len(missed)} missed lesions {len(tiny)} have fewer than {TWO_ACROSS} voxels,")
print(f"{len(faint)} a contrast below 2,", end=" ")
print(f"{len(near)} a probability of at least half the threshold")

# %% [markdown]
# Two pictures of all test studies. On the left, does Dice depend on the volume? A border that is
# one voxel off costs a small lesion much more. A triangle is a study of which a lesion was missed.
# On the right is every lesion: which ones were missed, and where do the false ones lie?

# %%
KINDS = {
    "found": dict(color=BLUE, marker="o"),
    "missed": dict(color=VERMILLION, marker="v"),
    "false": dict(color=PINK, marker="X"),
}
fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.3), layout="constrained")
for name, style in (("found", KINDS["found"]), ("missed", KINDS["missed"])):
    rows = [row for row in positive if (row["lesion_sensitivity"] < 1) == (name == "missed")]
    label = "all lesions found" if name == "found" else "one or more missed"
    points = [row["truth_ml"] for row in rows], [row["dice"] for row in rows]
    axes[0].plot(*points, ls="none", mec="black", label=label, **style)
axes[0].set(xscale="log", xlabel="true tumor volume of the study, ml", ylabel="Dice")
axes[0].set(ylim=(-0.03, 1.03))
axes[0].xaxis.set_minor_formatter("{x:g}")
for kind, style in KINDS.items():
    rows = [row for row in reasons if row["kind"] == kind]
    points = [row["volume_ml"] for row in rows], [row["contrast"] for row in rows]
    axes[1].plot(*points, ls="none", mec="black", mew=0.7, label=f"{kind} ({len(rows)})", **style)
axes[1].axvline(TWO_ACROSS * side**3 / 1000, color="gray", ls=":", label=f"{TWO_ACROSS} voxels")
axes[1].set(xscale="log", yscale="log", xlabel="volume of the lesion, ml", ylabel="contrast")
for axis in axes:
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# ### Patients without tumor
#
# Every predicted voxel is false there. v3 has a score per patient: the highest probability of a
# tumor that its classifier gives in the body. `predict.py --reject-below P` empties the mask of a
# study whose score is below P. **P must not be chosen on the test studies.** We take the highest P
# that would have kept all patients with tumor among the *held-out studies of the folds* (their
# scores are in `validation.csv`), and then look what it does to the test studies.

# %%
held_out = [row for run in runs for row in read_table(run / "validation.csv")]
P = min((row["tumor_score"] for row in held_out if row["truth_ml"] > 0), default=0.0)
rejected = [row for row in results if row["tumor_score"] < P]
fpv = np.array([row["fpv_ml"] for row in results])
score = np.array([row["tumor_score"] for row in results])
has_tumor = np.array([row["truth_ml"] > 0 for row in results])
print(f"P = {P:.3f}: {len(rejected)} of {len(results)} test studies would be emptied,", end=" ")
print(f"{sum(row['truth_ml'] > 0 for row in rejected)} of them with tumor;", end=" ")
print(f"mean FPV {fpv.mean():.1f} -> {np.where(score < P, 0, fpv).mean():.1f} ml")

fig, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
for name, mask, style in (
    ("with tumor", has_tumor, dict(marker="o", color=BLUE)),
    ("without tumor", ~has_tumor, dict(marker="s", color=VERMILLION, mfc="none")),
):
    axis.plot(score[mask], fpv[mask], ls="none", label=name, **style)
axis.axvline(P, color="black", ls=":", label="P")
axis.set(xlabel="tumor score of the study", ylabel="FPV, ml", title="test studies")
axis.set_yscale("symlog", linthresh=1)
axis.set_ylim(-0.2, 2 * max(1.0, fpv.max()))
axis.legend(fontsize=8)
plt.show()
if has_tumor.all():
    print("no test study is without tumor: emptying a mask can only lose a tumor here")

# %% [markdown]
# The gate helps if the squares lie left of the dotted line and the discs right of it. With networks
# that were trained for so short a time, and so few patients, it may do nothing, or harm.
#
# ## 7. What to do next with your data
#
# * **Files.** Set `ROOT` to your folder, and run this notebook to the end. Is the number of
#   patients right? Look at a few studies of each scanner and each site. PET in Bq/ml, and DICOM:
#   [docs/python.md](../docs/python.md#dicom).
# * **Labels.** If the truth has other values than zero and one, `MORE = "--label-values ..."` says
#   which are tumor, `--label-nonzero` takes all.
# * **Test patients.** Keep them apart from now on: `splits.json` holds the folds without them.
# * **Baseline.** Know the best SUV threshold of your training studies. If a network does not beat
#   it, look for the reason in the data first.
# * **Settings.** Take the voxels from the smallest lesions that matter, the SUV window from your
#   tumors, and the largest patch that the memory allows.
# * **A real run.** All folds, without the options that this notebook gives because it is in a
#   hurry, on a GPU with `--preset autopet`; with `--resume` from the start, so that a queue may
#   start the same command again ([how](../docs/running.md#stop-and-resume)):
#   ```
#   python train.py --data petct --root ROOT --model v3 --splits splits.json --fold all \
#       --resume --out RUNS
#   ```
# * **Seeds.** Results vary between trainings, so compare settings over several seeds and all folds
#   ([how much](../results/README.md#synthetic-petct-make-train)).
# * **Errors.** Look at the worst cases first, together with somebody who reads PET/CT. Some errors
#   will be in the truth: correct them in the files (a new file is noticed, and preprocessed again)
#   before you tune anything.
# * **Rules after the network** (`--threshold`, `--min-lesion-ml`, `--reject-below`): choose them on
#   the held-out studies of the folds, never on the test studies.
# * **The test, once:**
#   ```
#   python predict.py --checkpoint RUNS/fold*/best.pt --root TEST --out PREDICTIONS
#   ```

# %%
written = [path for path in WORK.rglob("*") if path.is_file() and not path.is_symlink()]
size = sum(path.stat().st_size for path in written) / 2**20
place = f"in {OUT}" if OUT else "all of it deleted now: set OUT to keep the networks"
print(f"{size:.0f} MB were written, {place}")
temporary.cleanup()
