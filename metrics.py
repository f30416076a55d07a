"""Dice, false-positive and false-negative volume of a segmentation, and patient-level scores.

    Dice = 2 |P n T| / (|P| + |T|)
    FPV  = volume (ml) of the predicted components that touch no true voxel: false lesions
    FNV  = volume (ml) of the true components that touch no predicted voxel: missed lesions

Components are 18-connected (voxels that share a face or an edge), and values equal those of the
AutoPET challenge's script. FPV does not see a false volume that is connected to a true one.
"""

import math

import numpy as np
from scipy import ndimage, stats

_CONNECTIVITY_18 = ndimage.generate_binary_structure(3, 2)


def _untouched_voxels(mask: np.ndarray, other: np.ndarray) -> int:
    """Count the voxels of those components of `mask` that `other` does not touch."""
    labels = np.zeros(mask.shape, np.int32)
    count = int(ndimage.label(mask, _CONNECTIVITY_18, labels))  # type: ignore
    touched = np.zeros(count + 1, bool)
    touched[labels[other]] = True
    touched[0] = True  # the background is no component
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    return int(sizes[~touched].sum())


def voxel_ml(spacing) -> float:
    """Volume of a voxel in ml, from its three sides in mm."""
    return math.prod(float(s) for s in spacing) / 1000


def lesion_metrics(pred: np.ndarray, truth: np.ndarray, spacing) -> dict[str, float]:
    """Dice, FPV and FNV of one case, exactly as the AutoPET challenge's script computes them.

    Args:
        pred, truth: 3D masks of equal shape (non-zero is tumor).
        spacing: voxel size in mm, three numbers.

    Returns {"dice", "fpv_ml", "fnv_ml"}. Dice is NaN if both masks are empty; if only the truth is
    empty, Dice and FNV are 0 (`case_metrics` calls them undefined, as later editions of the
    challenge do). Raises ValueError if the shapes differ.
    """
    pred, truth = np.asarray(pred) != 0, np.asarray(truth) != 0
    if pred.shape != truth.shape or pred.ndim != 3:
        raise ValueError(f"expected 3D masks of one shape, got {pred.shape} and {truth.shape}")
    total = int(pred.sum()) + int(truth.sum())
    ml = voxel_ml(spacing)
    return {
        "dice": 2 * int((pred & truth).sum()) / total if total else math.nan,
        "fpv_ml": _untouched_voxels(pred, truth) * ml,
        "fnv_ml": _untouched_voxels(truth, pred) * ml,
    }


def case_metrics(pred: np.ndarray, truth: np.ndarray, spacing) -> dict[str, float]:
    """`lesion_metrics` and both volumes in ml ("pred_ml", "truth_ml").

    With an empty truth, Dice and FNV are undefined (NaN) and FPV counts.
    """
    row = lesion_metrics(pred, truth, spacing)
    row["pred_ml"] = np.count_nonzero(pred) * voxel_ml(spacing)
    row["truth_ml"] = np.count_nonzero(truth) * voxel_ml(spacing)
    if not row["truth_ml"]:
        row["dice"] = row["fnv_ml"] = math.nan
    return row


def patient_metrics(score, has_tumor, threshold: float = 0.5) -> dict[str, float]:
    """How well a score per patient separates patients with tumor from those without.

    Args:
        score: (N,) numbers, higher means tumor is more likely. has_tumor: (N,) truth.
        threshold: patients with score >= threshold count as positive, except in the AUC.

    Returns {"accuracy", "sensitivity", "specificity", "auc"}. The AUC is the probability that a
    patient with tumor scores above one without, ties counting half (Mann-Whitney). A value is NaN
    if the patients it needs are missing.
    """
    score, positive = np.asarray(score, float), np.asarray(has_tumor, bool)
    if score.shape != positive.shape or score.ndim != 1:
        shapes = f"{score.shape} and {positive.shape}"
        raise ValueError(f"expected score and has_tumor of shape (N,), got {shapes}")
    called = score >= threshold
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    rank_sum = stats.rankdata(score)[positive].sum()  # ties get their mean rank
    u = rank_sum - n_positive * (n_positive + 1) / 2
    pairs = n_positive * n_negative
    return {
        "accuracy": float((called == positive).mean()) if len(positive) else math.nan,
        "sensitivity": float(called[positive].mean()) if n_positive else math.nan,
        "specificity": float((~called[~positive]).mean()) if n_negative else math.nan,
        "auc": float(u / pairs) if pairs else math.nan,
    }
