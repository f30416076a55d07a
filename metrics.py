"""Numbers of a segmentation, of its lesions and surfaces, and patient-level scores.

    Dice = 2 |P n T| / (|P| + |T|)
    FPV  = volume (ml) of the predicted components that touch no true voxel: false lesions
    FNV  = volume (ml) of the true components that touch no predicted voxel: missed lesions

Components are 18-connected (voxels that share a face or an edge), and values equal those of the
AutoPET challenge's script. FPV does not see a false volume that is connected to a true one.

A lesion is a component. Of its SUV, the field reports the maximum, the mean, the peak (the highest
mean of a ball of 1 ml around one of its voxels) and TLG, total lesion glycolysis: volume x mean.
A patient's metabolic tumor volume (MTV) and TLG are the sums over the lesions.
"""

import math
from itertools import product

import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from scipy import ndimage, stats
from scipy.spatial import KDTree

_CONNECTIVITY_18 = ndimage.generate_binary_structure(3, 2)
MOST_SURFACE = 5_000_000  # voxels; more are noise, and would take gigabytes
PEAK_BLOCK = 24  # voxels along a side
SUV_MEASURES = ("suv_max", "suv_mean", "suv_peak", "tlg")
CENTER = ("x_mm", "y_mm", "z_mm")
LESION_MEASURES = ("volume_ml", *SUV_MEASURES, *CENTER, "meets_truth")


# -------------------------------------------------------------------------------------- components
def components(mask: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number the components of a mask (D, H, W) from 1; 0 is the background.

    Returns the numbers (D, H, W), int32; and for each number, 0 included, how many voxels it has
    and whether one of them is also in `other` (D, H, W).
    """
    labels = np.zeros(mask.shape, np.int32)
    count = 1 + int(ndimage.label(mask, _CONNECTIVITY_18, labels))  # type: ignore
    sizes = np.zeros(count, np.int64)
    touched = np.zeros(count, bool)
    parts = np.array_split(labels, 16), np.array_split(other, 16)  # for less memory
    for numbers, there in zip(*parts):
        sizes += np.bincount(numbers.ravel(), minlength=count)
        touched[numbers[there]] = True
    return labels, sizes, touched


def remove_small(mask: np.ndarray, spacing, min_ml: float) -> np.ndarray:
    """The mask (D, H, W), bool, without the components of less than `min_ml`."""
    if not min_ml:
        return mask
    labels, sizes, _ = components(mask, mask)
    keep = sizes * voxel_ml(spacing) >= min_ml * (1 - 1e-9)  # rounding
    keep[0] = False
    return np.concatenate([keep[part] for part in np.array_split(labels, 16)])


def voxel_ml(spacing) -> float:
    """Volume of a voxel in ml, from its three sides in mm."""
    return math.prod(float(s) for s in spacing) / 1000


# ---------------------------------------------------------------------------------- mask and truth
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

    def untouched(mask, other):
        _, sizes, touched = components(mask, other)
        return int(sizes[1:][~touched[1:]].sum()) * voxel_ml(spacing)

    return {
        "dice": 2 * int((pred & truth).sum()) / total if total else math.nan,
        "fpv_ml": untouched(pred, truth),
        "fnv_ml": untouched(truth, pred),
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


def surface_metrics(pred, truth, spacing, tolerance: float = 2.0) -> dict[str, float]:
    """Agreement of the surfaces of two bool masks (D, H, W), as MONAI defines it.

    A surface is the voxels of a mask that share a face with a voxel outside the mask. Returns
    {"surface_dice", the share of both surfaces within `tolerance` mm of the other one, "hd95_mm",
    the larger of the two 95 % quantiles of the distances}. Both are NaN with an empty truth, and
    if a surface has more than `MOST_SURFACE` voxels. Without a prediction they are 0 and NaN.
    """
    surfaces = [mask ^ ndimage.binary_erosion(mask) for mask in (pred, truth)]
    sizes = [np.count_nonzero(surface) for surface in surfaces]
    if min(sizes) == 0 or max(sizes) > MOST_SURFACE:
        missed = sizes[0] == 0 < sizes[1]
        return {"surface_dice": 0.0 if missed else math.nan, "hd95_mm": math.nan}
    a, b = (np.argwhere(surface) * np.asarray(spacing) for surface in surfaces)  # (N, 3), mm
    distances = KDTree(b).query(a)[0], KDTree(a).query(b)[0]
    near = np.concatenate(distances) <= tolerance + 1e-6  # rounding
    hd95 = max(np.percentile(d, 95) for d in distances)
    return {"surface_dice": float(near.mean()), "hd95_mm": float(hd95)}


# ----------------------------------------------------------------------------------------- lesions
def lesion_table(mask: np.ndarray, affine: np.ndarray, suv=None, truth=None) -> list[dict]:
    """The numbers of each lesion of a mask (D, H, W), the largest lesion first.

    affine: (4, 4), from voxels to mm. suv, truth: arrays (D, H, W), or None: then what depends on
    them is NaN. Returns rows of `LESION_MEASURES`; x, y and z are those of the center, and
    "meets_truth" is whether the lesion and the truth share a voxel, 0 or 1.
    """
    labels, _, touched = components(mask, mask if truth is None else truth)
    rows = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        row = _lesion(labels, number, box, affine, suv)
        if truth is not None:
            row["meets_truth"] = int(touched[number])
        rows.append(row)
    return sorted(rows, key=lambda row: -row["volume_ml"])


def _lesion(labels, number: int, box: tuple[slice, ...], affine, suv) -> dict:
    """A row of `lesion_table`, without the truth."""
    spacing = voxel_sizes(affine)
    inside = labels[box] == number  # (d, h, w)
    volume = np.count_nonzero(inside) * voxel_ml(spacing)
    row = dict.fromkeys(LESION_MEASURES, math.nan) | {"volume_ml": volume}
    center = []
    for axis, edge in enumerate(box):
        counts = inside.sum(tuple({0, 1, 2} - {axis}))
        center.append(np.average(np.arange(edge.start, edge.stop), weights=counts))
    row |= zip(CENTER, apply_affine(affine, center).tolist())
    if suv is not None:
        mean = suv[box].mean(where=inside, dtype=np.float64)
        highest = suv[box].max(where=inside, initial=-math.inf)
        peak = _peak(suv, labels, number, box, spacing)
        row |= zip(SUV_MEASURES, map(float, (highest, mean, peak, mean * volume)))
    return row


def _peak(suv, labels, number: int, box: tuple[slice, ...], spacing: np.ndarray) -> float:
    """The highest mean SUV of a ball of 1 ml, a radius of 6.2 mm, around a voxel of the lesion."""
    radius = (3000 / (4 * math.pi)) ** (1 / 3)
    reach = (radius // spacing).astype(int)
    axes = [np.arange(-n, n + 1) * s for n, s in zip(reach, spacing)]
    ball = np.linalg.norm(np.meshgrid(*axes, indexing="ij"), axis=0) <= radius

    # Block by block, the brightest first, until none left has a voxel above the peak.
    blocks = []
    for corner in product(*(range(s.start, s.stop, PEAK_BLOCK) for s in box)):
        block = tuple(slice(i, min(i + PEAK_BLOCK, s.stop)) for i, s in zip(corner, box))
        if (labels[block] == number).any():
            outer = tuple(slice(max(0, s.start - n), s.stop + n) for s, n in zip(block, reach))
            blocks.append((suv[outer].max(), block, outer))
    peak = -math.inf
    for brightest, block, outer in sorted(blocks, key=lambda b: -b[0]):
        if brightest <= peak:
            break
        means = ndimage.correlate(suv[outer], ball / ball.sum(), mode="nearest")
        inner = tuple(slice(s.start - o.start, s.stop - o.start) for s, o in zip(block, outer))
        peak = max(peak, float(means[inner][labels[block] == number].max()))
    return peak


def lesion_totals(lesions: list[dict]) -> dict[str, float]:
    """A patient's numbers: of `lesion_table`'s rows the sums, the mean and the maxima."""
    volume, tlg = (sum(row[k] for row in lesions) for k in ("volume_ml", "tlg"))
    suv_max = max((row["suv_max"] for row in lesions), default=math.nan)
    suv_peak = max((row["suv_peak"] for row in lesions), default=math.nan)
    numbers = (suv_max, tlg / volume if lesions else math.nan, suv_peak, tlg)
    return {"lesions": len(lesions), "mtv_ml": volume, **dict(zip(SUV_MEASURES, numbers))}


# ---------------------------------------------------------------------------------------- patients
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
