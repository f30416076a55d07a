"""What a segmentation is worth to a patient: Dice, false-positive and false-negative volume; and patient-level classification.

    Dice = 2 |P n T| / (|P| + |T|)
    FPV  = volume (ml) of the predicted components that touch no true voxel: lesions that are not there
    FNV  = volume (ml) of the true components that touch no predicted voxel: lesions that were missed

Components are 18-connected (voxels that share a face or an edge), as in the AutoPET challenge's script, whose values these are.
"""

import csv
import math
from pathlib import Path

import numpy as np
from scipy import ndimage, stats

from files import atomic_write

_CONNECTIVITY_18 = ndimage.generate_binary_structure(3, 2)


def _untouched_voxels(mask: np.ndarray, other: np.ndarray) -> int:
    """Voxels of those components of `mask` that `other` does not touch: one labelling pass and one count."""
    labels, count = ndimage.label(mask, _CONNECTIVITY_18)
    touched = np.zeros(count + 1, bool)
    touched[labels[other]] = True
    touched[0] = True  # the background is no component
    return int(np.bincount(labels.ravel(), minlength=count + 1)[~touched].sum())


def lesion_metrics(pred: np.ndarray, truth: np.ndarray, spacing) -> dict[str, float]:
    """Dice, FPV and FNV of one case, exactly as the AutoPET challenge's script.

    Args:
        pred, truth: 3D masks of equal shape (non-zero is tumor).
        spacing: voxel size in mm, three numbers.

    Returns {"dice", "fpv_ml", "fnv_ml"}. Dice is NaN where both masks are empty; if only the truth is empty it is 0 and FNV is 0
    (`case_metrics` calls these undefined, as later editions of the challenge do). Raises ValueError for shapes that differ.
    """
    pred, truth = np.asarray(pred) != 0, np.asarray(truth) != 0
    if pred.shape != truth.shape or pred.ndim != 3:
        raise ValueError(f"masks must be 3D and of one shape, got {pred.shape} and {truth.shape}")
    ml = math.prod(float(s) for s in spacing) / 1000  # of one voxel
    total = int(pred.sum()) + int(truth.sum())
    return {
        "dice": 2 * int((pred & truth).sum()) / total if total else math.nan,
        "fpv_ml": _untouched_voxels(pred, truth) * ml,
        "fnv_ml": _untouched_voxels(truth, pred) * ml,
    }


def case_metrics(pred: np.ndarray, truth: np.ndarray, spacing) -> dict[str, float]:
    """`lesion_metrics` plus the two volumes in ml; with an empty truth, Dice and FNV are undefined (NaN) and FPV counts."""
    row = lesion_metrics(pred, truth, spacing)
    ml = math.prod(float(s) for s in spacing) / 1000
    row |= {"pred_ml": np.count_nonzero(pred) * ml, "truth_ml": np.count_nonzero(truth) * ml}
    return row if row["truth_ml"] else row | {"dice": math.nan, "fnv_ml": math.nan}


def mean_of(rows: list[dict], key: str) -> float:
    """Mean of a column over the rows in which it is defined; NaN where there are none."""
    values = [row[key] for row in rows if key in row and not math.isnan(row[key])]
    return float(np.mean(values)) if values else math.nan


def patient_metrics(score, has_tumor, threshold: float = 0.5) -> dict[str, float]:
    """How well a score a patient tells the ill from the healthy.

    Args:
        score: (N,) numbers, higher = more likely ill. has_tumor: (N,) truth.
        threshold: score >= threshold is called ill, for accuracy, sensitivity and specificity.

    Returns {"accuracy", "sensitivity", "specificity", "auc"}. AUC is the probability that an ill patient scores above a healthy one,
    ties counting half (Mann-Whitney). NaN where a class is missing.
    """
    score, ill = np.asarray(score, float), np.asarray(has_tumor, bool)
    if score.shape != ill.shape or score.ndim != 1:
        raise ValueError(f"score and has_tumor must be (N,), got {score.shape} and {ill.shape}")
    called, n_ill, n_well = score >= threshold, int(ill.sum()), int((~ill).sum())
    ranks = stats.rankdata(score)  # ties get their mean rank
    both = n_ill and n_well
    return {
        "accuracy": float((called == ill).mean()) if len(ill) else math.nan,
        "sensitivity": float(called[ill].mean()) if n_ill else math.nan,
        "specificity": float((~called[~ill]).mean()) if n_well else math.nan,
        "auc": float((ranks[ill].sum() - n_ill * (n_ill + 1) / 2) / (n_ill * n_well)) if both else math.nan,
    }


def bootstrap_means(values, groups=None, resamples: int = 10_000, seed: int = 0) -> np.ndarray:
    """What the mean might have been with other cases, and other seeds: (resamples,) means of values drawn anew, with replacement.

    Args:
        values: (N,), or (N, S) for S trainings that differ by their seed; NaN is unknown and counts nowhere.
        groups: (N,) names; the cases of one name (a patient) are drawn together. Default: each case for itself.
        seed: of the draws; equal arguments give equal draws.

    A column is drawn as cases are: a network that was lucky is so on all of them. With one column only cases are drawn. A mean is NaN
    where by chance no known value was drawn.
    """
    values = np.asarray(values, float).reshape(len(values), -1)
    _, group = np.unique(np.arange(len(values)) if groups is None else np.asarray(groups), return_inverse=True)
    sums, counts = np.zeros((2, group.max() + 1, values.shape[1]))
    np.add.at(sums, group, np.nan_to_num(values))
    np.add.at(counts, group, ~np.isnan(values))
    rng, (n, s) = np.random.default_rng(seed), sums.shape
    how_often, which = rng.multinomial(n, np.full(n, 1 / n), resamples), rng.multinomial(s, np.full(s, 1 / s), resamples)
    with np.errstate(invalid="ignore"):  # no value drawn at all
        return (how_often @ sums * which).sum(1) / (how_often @ counts * which).sum(1)


def interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of `bootstrap_means`."""
    low, high = np.nanpercentile(draws, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def write_table(rows: list[dict], path: Path) -> None:
    """A CSV file, a row a case and target; an undefined number is an empty cell."""
    with atomic_write(path) as part, open(part, "w", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in r.items()} for r in rows)


def print_table(rows: list[dict], targets: tuple[str, ...]) -> None:
    """The table of a run: Dice, FPV, FNV a case, and their means over the cases in which they are defined."""
    width = max(len(r["case"]) for r in rows) + 2
    show = lambda v, digits=2: f"{'-':>9}" if math.isnan(v) else f"{v:9.{digits}f}"  # noqa: E731
    for t in targets:
        mine = [r for r in rows if r["target"] == t]
        print(f"\n{t:{width}}{'Dice':>9}{'FPV ml':>9}{'FNV ml':>9}{'true ml':>9}{'pred. ml':>9}")
        for r in mine:
            print(f"{r['case']:{width}}{show(r['dice'], 3)}" + "".join(show(r[k]) for k in ("fpv_ml", "fnv_ml", "truth_ml", "pred_ml")))
        empty = sum(not r["truth_ml"] for r in mine)
        print(f"{'mean':{width}}{show(mean_of(mine, 'dice'), 3)}" + "".join(show(mean_of(mine, k)) for k in ("fpv_ml", "fnv_ml")))
        if empty:
            print(f"{empty} of {len(mine)} without a true tumor: Dice and FNV are undefined there, and FPV counts")
