"""From a trained network to a mask on the input's own grid: sliding window -> probabilities -> resample back -> metrics.

    python predict.py --checkpoint runs/NAME/best.pt --pet SUV.nii.gz [--ct CTres.nii.gz] --out SEG_pred.nii.gz
    python predict.py --checkpoint runs/NAME/best.pt --image FOUR_CHANNEL.nii.gz --out SEG_pred.nii.gz          (brain)
    python predict.py --checkpoint runs/NAME/best.pt --root DIR --out DIR      every study of a folder; a table where truth is there

Windows overlap by half; each is weighted by a Gaussian, so that a voxel listens most to the window it is central in, and the
probabilities (not the logits) are averaged: one map a target, nothing else is kept.
"""

import argparse
import os
import sys
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nibabel.processing import resample_from_to
from torch import Tensor

from data import CachedCase, Case, Recipe, UserError, find_brain, find_petct, load_images, read_header, read_label
from metrics import case_metrics, print_table, write_table
from mirror_unet import BrainOutput, MirrorUNet

TARGETS = {"petct": ("seg",), "brain": ("core", "whole", "edema")}


def window_starts(shape, size, overlap: float = 0.5) -> list[tuple[int, ...]]:
    """Corners of the windows that cover a volume: a regular grid, the last window of an axis moved back inside.

    shape, size: of the volume (at least the window's) and the window, in voxels; overlap in [0, 1).
    """
    axes = []
    for n, s in zip(shape, size, strict=True):
        stride = max(1, int(s * (1 - overlap)))
        count = -(-(n - s) // stride) + 1
        axes.append([min(i * stride, n - s) for i in range(count)])
    return list(product(*axes))


def gaussian_window(size, sigma: float = 0.125) -> Tensor:
    """(D, H, W) weights: a Gaussian of standard deviation `sigma` times the side, 1 at the centre, at least 1e-3."""
    axes = [torch.exp(-0.5 * ((torch.arange(s) - (s - 1) / 2) / (sigma * s)) ** 2) for s in size]
    weight = axes[0][:, None, None] * axes[1][:, None] * axes[2]
    return weight.clamp_min(max(float(weight.min()), 1e-3))


@torch.no_grad()
def sliding_window(image: Tensor, predict: Callable[[Tensor], Tensor], size, overlap: float = 0.5, batch: int = 2) -> Tensor:
    """Gaussian-weighted mean of `predict` over overlapping windows.

    Args:
        image: (C, D, H, W); zero-padded on both sides where it is smaller than a window.
        predict: (N, C, *size) -> (N, K, *size), at most `batch` windows at a time.
        size: window, three numbers. overlap: share of a window's side that the next one covers again.

    Returns (K, D, H, W) float32 on image's device.
    """
    shape = image.shape[1:]
    missing = [max(s - n, 0) for n, s in zip(shape, size, strict=True)]
    pad = [p for m in reversed(missing) for p in (m // 2, m - m // 2)]
    image = torch.nn.functional.pad(image, pad)
    weight = gaussian_window(size).to(image.device)
    starts = window_starts(image.shape[1:], size, overlap)
    places = [tuple(slice(a, a + s) for a, s in zip(start, size)) for start in starts]
    total = norm = None
    for i in range(0, len(places), batch):
        out = predict(torch.stack([image[(slice(None), *place)] for place in places[i : i + batch]])).float()
        if total is None:
            total, norm = image.new_zeros(out.shape[1], *image.shape[1:]), image.new_zeros(image.shape[1:])
        for one, place in zip(out, places[i : i + batch]):
            total[(slice(None), *place)] += one * weight
            norm[place] += weight
    inner = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, shape))
    return total[(slice(None), *inner)] / norm[inner]


def foreground_probability(model: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(B, 2, D, H, W) -> probabilities (B, K, D, H, W) of the K targets, and the probability of a tumour (B,) where there is one.

    A Mirror U-Net v1-v3 runs only its PET branch: its segmentation does not depend on CT.
    """
    if isinstance(model, MirrorUNet) and model.preset == "petct" and model.version != "v4":
        out = model.segment(x[:, 1:2])
    else:
        out = model(x)
    logits = [t for t in (out.core, out.whole, out.edema) if t is not None] if isinstance(out, BrainOutput) else [out.seg]
    prob = torch.cat([t.float().softmax(1)[:, 1:2] for t in logits], dim=1)
    tumor = None if isinstance(out, BrainOutput) or out.tumor is None else out.tumor.float().sigmoid()
    return prob, tumor


@torch.no_grad()
def predict_image(model, image: Tensor, size, overlap=0.5, batch=2, flip_axes=(), autocast=None) -> tuple[Tensor, float | None]:
    """Probability maps (K, D, H, W) of a preprocessed study (2, D, H, W), and its score: the highest "tumour" probability of a window.

    flip_axes: average over the mirror images along all combinations of these axes (test-time augmentation): give only axes that
    training mirrored too. autocast: a context for mixed precision.
    """
    scores: list[Tensor] = []
    flips = [[2 + axis for axis in some] for n in range(len(flip_axes) + 1) for some in combinations(flip_axes, n)]

    def predict(x: Tensor) -> Tensor:
        mean, score = 0.0, 0.0
        for flip in flips:
            prob, tumor = foreground_probability(model, x.flip(flip))
            mean = mean + prob.flip(flip) / len(flips)
            score = score if tumor is None else score + tumor / len(flips)
        if tumor is not None:
            scores.append(score)
        return mean

    was_training = model.training
    model.eval()
    with autocast or torch.autocast(image.device.type, enabled=False):
        prob = sliding_window(image, predict, size, overlap, batch)
    model.train(was_training)
    return prob, float(torch.cat(scores).max()) if scores else None


def reconstructions(model, image: Tensor, size, overlap=0.5, batch=2) -> dict[str, np.ndarray]:
    """What a Mirror U-Net v1-v3 reconstructs of a clean study (2, D, H, W): {"CT": (D, H, W)}, in v2 and v3 also "PET"; else {}."""
    if not isinstance(model, MirrorUNet) or model.preset == "brain" or model.version == "v4":
        return {}

    def predict(x: Tensor) -> Tensor:
        out = model(x)
        return out.ct if out.pet is None else torch.cat([out.ct, out.pet], dim=1)

    was_training = model.training
    model.eval()
    maps = sliding_window(image, predict, size, overlap, batch)
    model.train(was_training)
    return dict(zip(("CT", "PET"), maps.cpu().numpy()))


def to_original(prob: np.ndarray, affine: np.ndarray, like: nib.Nifti1Image) -> np.ndarray:
    """Resample a map (D, H, W) from the grid of `affine` to the grid of the image `like`, trilinearly; 0 outside."""
    if prob.shape == like.shape[:3] and np.allclose(affine, like.affine, atol=1e-4):
        return prob
    return resample_from_to(nib.Nifti1Image(prob, affine), (like.shape[:3], like.affine), order=1, cval=0.0).get_fdata(dtype=np.float32)


def evaluate(case: Case, prob: np.ndarray, affine: np.ndarray, targets: tuple[str, ...], threshold: float = 0.5) -> list[dict]:
    """Metrics of one case on its original grid, a row a target: probabilities (K, D, H, W) on the grid of `affine` >= threshold."""
    truth = read_label(case)
    labels, rows = np.asarray(truth.dataobj), []
    spacing = nib.affines.voxel_sizes(truth.affine)
    for name, p in zip(targets, prob, strict=True):
        mask = to_original(p, affine, truth) >= threshold
        true = {"seg": labels > 0, "whole": labels > 0, "core": labels == 2, "edema": labels == 1}[name]
        rows.append({"case": case.name, "target": name, **case_metrics(mask, true, spacing)})
    return rows


def suv_threshold(train: list[CachedCase], val: list[CachedCase]) -> tuple[float, list[dict]]:
    """What no network at all would reach: "tumour is where PET > t", with the t that is best on the training studies.

    Returns t as a share of the SUV window, and the metrics of each held-out study on the network's grid.
    """
    thresholds = np.linspace(0.02, 0.98, 49)
    scores = np.zeros(len(thresholds))
    for case in train:
        if not case.tumor:
            continue
        pet, truth = case.array("image")[1].ravel(), case.array("label").ravel() > 0
        counts = [np.histogram(p, bins=[*thresholds, np.inf])[0][::-1].cumsum()[::-1] for p in (pet, pet[truth])]
        scores += 2 * counts[1] / (counts[0] + truth.sum())  # Dice of every threshold from two histograms
    best = float(thresholds[scores.argmax()])
    rows = []
    for case in val:
        mask = np.asarray(case.array("image")[1]) >= best
        rows.append({"case": case.name, **case_metrics(mask, case.array("label"), nib.affines.voxel_sizes(case.affine))})
    return best, rows


# ------------------------------------------------------------------------------------- what a run's config (a dict) means
def kind_of(source: str) -> str:
    """ "petct" or "brain", of a run's `data`."""
    return "brain" if source in ("brain", "phantom-brain") else "petct"


def targets_of(c: dict) -> tuple[str, ...]:
    """The names of the maps that `foreground_probability` returns, in its order: the brain's v1 has no whole tumour."""
    return tuple(t for t in TARGETS[kind_of(c["data"])] if not (t == "whole" and c["model"] == "v1"))


def recipe_of(c: dict) -> Recipe:
    """The preprocessing that a config asks for."""
    if kind_of(c["data"]) == "brain":
        return Recipe("brain", tuple(c["spacing"]), "RAS")
    return Recipe("petct", tuple(c["spacing"]), "LAS", tuple(c["ct_window"]), tuple(c["suv_window"]))


def model_of(c: dict) -> MirrorUNet:
    """The network that a config names, freshly initialised. Raises ValueError where there is no such network."""
    weight = c["ct_weight"] if c["ct_weight"] == "learnable" else float(c["ct_weight"])
    return MirrorUNet(c["model"], c["share"], c["channels"], c["norm"], kind_of(c["data"]), weight)


# --------------------------------------------------------------------------------------------------------- the program
def load_model(path, device: str = "cpu") -> tuple[MirrorUNet, dict]:
    """The network of a checkpoint, in eval mode, and its run's config. Raises UserError for anything that is no checkpoint of ours."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)  # a stranger's file cannot run code
        c = state["config"]
        model = model_of(c).to(device)
        model.load_state_dict(state["model"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as e:  # torch, pickle and zip each have errors of their own
        raise UserError(f"{path}: not a checkpoint of train.py: {(str(e) or repr(e)).splitlines()[0]}") from None
    return model.eval(), c


def save_mask(mask: np.ndarray, like: nib.Nifti1Image, path: Path) -> None:
    """Write labels (D, H, W) as uint8 NIfTI with the shape, affine and header of `like`; whole or not at all."""
    header = like.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    image = nib.Nifti1Image(mask.astype(np.uint8), like.affine, header)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(image, part)
        os.replace(part, path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {e.strerror or e}") from None
    finally:
        part.unlink(missing_ok=True)


def predict_study(models: list, c: dict, case: Case, out: Path, device: str, threshold: float) -> list[dict]:
    """Segment one study, write the mask, and score it where its truth is there: rows as `evaluate`'s.

    Several models: their probabilities are averaged. Brain masks hold MSD's codes, 1 edema and 2 core.
    """
    brain = kind_of(c["data"]) == "brain"
    both = brain or any(model.version == "v4" for model in models)
    if both and None in case.images:
        raise UserError(f"{case.name}: {c['model']} needs CT and PET, and the CT is missing (v1, v2 and v3 segment from PET alone)")
    image, affine, _ = load_images(case, recipe_of(c))
    x = torch.from_numpy(image).to(device)
    options = dict(size=c["patch"], overlap=c["overlap"], batch=c["batch"], flip_axes=c["flip_axes"] if c["flips"] else ())
    prob = sum(predict_image(model, x, **options)[0] / len(models) for model in models).cpu().numpy()
    like = read_header(case.images[-1])
    like = like if like.ndim == 3 else like.slicer[..., 0]
    maps = [to_original(p, affine, like) >= threshold for p in prob]
    mask = maps[0]
    if brain:
        mask = np.where(maps[0], 2, np.logical_or.reduce(maps[1:]))
    save_mask(mask, like, out)
    return evaluate(case, prob, affine, targets_of(c), threshold) if case.label else []


def main(argv: list[str]) -> None:
    """The program: checkpoints and files -> masks. Raises UserError for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", nargs="+", required=True, help="best.pt of a run; several of one kind: an ensemble")
    parser.add_argument("--pet", type=Path, help="SUV.nii.gz")
    parser.add_argument("--ct", type=Path, help="CTres.nii.gz on the PET's grid; v1, v2 and v3 do not need it")
    parser.add_argument("--image", type=Path, help="brain: four channels FLAIR, T1w, T1gd, T2w in one file")
    parser.add_argument("--root", type=Path, help="a folder of studies in the layout of the training data")
    parser.add_argument("--out", type=Path, required=True, help="the mask to write, .nii.gz; with --root a folder")
    parser.add_argument("--threshold", type=float, help="probability from which a voxel is tumour; default the run's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args(argv)
    if a.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    loaded = [load_model(path, a.device) for path in a.checkpoint]
    models, c = [model for model, _ in loaded], loaded[0][1]
    kind = kind_of(c["data"])
    if any(recipe_of(d) != recipe_of(c) for _, d in loaded):
        raise UserError("--checkpoint: the checkpoints of an ensemble must be trained on equally preprocessed data")
    if sum(map(bool, (a.pet, a.image, a.root))) != 1 or bool(a.image) != (kind == "brain") and not a.root:
        raise UserError(f"this checkpoint is of {kind}: give {'--image' if kind == 'brain' else '--pet'} or --root")
    if a.root:
        cases = find_brain(a.root) if kind == "brain" else find_petct(a.root, complete=False)
        outs = [a.out / f"{case.name}.nii.gz" for case in cases]
    else:
        one = a.image or a.pet
        cases = [Case(one.name.split(".nii")[0], "", (a.image,) if a.image else (a.ct, a.pet), None, (3, 0) if a.image else ())]
        outs = [a.out]
    threshold, rows = c["threshold"] if a.threshold is None else a.threshold, []
    for case, out in zip(cases, outs):
        rows += predict_study(models, c, case, out, a.device, threshold)
        print(f"{case.name} -> {out}", flush=True)
    if rows:
        write_table(rows, a.out / "metrics.csv")
        print_table(rows, tuple(dict.fromkeys(r["target"] for r in rows)))


def program(main: Callable[[list[str]], None]) -> None:
    """Run a program's main on the command line; what the user can mend becomes one line on stderr and exit code 2."""
    try:
        main(sys.argv[1:])
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    program(main)
