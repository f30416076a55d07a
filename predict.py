"""From a trained network to a mask on the input's own grid: sliding window -> probabilities -> resample back -> metrics.

Windows overlap by half; each is weighted by a Gaussian, so that a voxel listens most to the window it is central in, and the
probabilities (not the logits) are averaged: one map a target, nothing else is kept.
"""

from collections.abc import Callable
from itertools import combinations, product

import nibabel as nib
import numpy as np
import torch
from nibabel.processing import resample_from_to
from torch import Tensor

from data import CachedCase, read_label
from metrics import case_metrics
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


def evaluate(case: CachedCase, prob: np.ndarray, targets: tuple[str, ...], threshold: float = 0.5) -> list[dict]:
    """Metrics of one case on its original grid, a row a target: probabilities (K, D, H, W) of the cached grid >= threshold."""
    truth = read_label(case.case)
    labels, rows = np.asarray(truth.dataobj), []
    spacing = nib.affines.voxel_sizes(truth.affine)
    for name, p in zip(targets, prob, strict=True):
        mask = to_original(p, case.affine, truth) >= threshold
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
