"""Masks against the truth, on the input's own grid: rows per case and lesion, means, tables.

An empty truth has no Dice and no FNV (NaN): such cases are left out of those means, and counted.
"""

import math

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.nifti1 import Nifti1Image

import metrics
from data import Case, read_label
from files import read_header

MEASURES = ("dice", "fpv_ml", "fnv_ml")  # AutoPET's
AGREEMENT = ("surface_dice", "hd95_mm", "true_lesions", "lesion_sensitivity", "false_lesions")
LESION_COLUMNS = ("case", "target", "lesion", *metrics.LESION_MEASURES)


# -------------------------------------------------------------------------------------------- rows
def read_truth(case: Case) -> Nifti1Image | None:
    """The labels of a study (`data.read_label`), or None if it has none."""
    return read_label(case) if case.label else None


def evaluate_case(
    case: Case, truth: Nifti1Image | None, masks: list[np.ndarray], targets: tuple[str, ...]
) -> list[dict]:
    """Metrics of one study, a row for each target.

    truth: `read_truth(case)`; without it only the predicted volume is known, and the other numbers
    are NaN. masks: a bool array (D, H, W) per target, on the grid of the study's last image.
    """
    spacing = voxel_sizes(read_header(case.images[-1]).affine)
    rows = []
    for target, mask in zip(targets, masks, strict=True):
        numbers = dict.fromkeys((*MEASURES, "pred_ml", "truth_ml"), math.nan)
        numbers["pred_ml"] = np.count_nonzero(mask) * metrics.voxel_ml(spacing)
        if truth is not None:
            true = true_mask(np.asarray(truth.dataobj), target)
            numbers |= metrics.case_metrics(mask, true, spacing)
        rows.append({"case": case.name, "target": target} | numbers)
    return rows


def describe_case(
    case: Case, truth: Nifti1Image | None, masks: list[np.ndarray], targets: tuple[str, ...],
    suv: np.ndarray | None, tolerance: float,
) -> tuple[list[dict], list[dict]]:
    """`evaluate_case` with more columns, and a row of `LESION_COLUMNS` for each predicted lesion.

    The columns are the agreement with the truth, `AGREEMENT`, NaN without one, and the patient's
    `metrics.lesion_totals`. suv: the PET (D, H, W); None leaves out its numbers. tolerance: of the
    surface Dice, mm.
    """
    affine = np.asarray(read_header(case.images[-1]).affine)
    rows, lesions = evaluate_case(case, truth, masks, targets), []
    for row, mask in zip(rows, masks):
        true = None if truth is None else true_mask(np.asarray(truth.dataobj), row["target"])
        found = metrics.lesion_table(mask, affine, suv, true)
        row |= dict.fromkeys(AGREEMENT, math.nan)
        if true is not None:
            touched = metrics.components(true, mask)[2][1:]
            row |= metrics.surface_metrics(mask, true, voxel_sizes(affine), tolerance)
            row["true_lesions"] = len(touched)
            row["lesion_sensitivity"] = float(touched.mean()) if len(touched) else math.nan
            row["false_lesions"] = sum(not lesion["meets_truth"] for lesion in found)
        row |= {"lesions": len(found)} if suv is None else metrics.lesion_totals(found)
        first = {"case": case.name, "target": row["target"]}
        lesions += [first | {"lesion": i} | lesion for i, lesion in enumerate(found, start=1)]
    return rows, lesions


def true_mask(labels: np.ndarray, target: str) -> np.ndarray:
    """The voxels of a target among `read_label`'s codes: 1 tumor (brain: edema), 2 core."""
    if target == "core":
        return labels == 2
    return labels == 1 if target == "edema" else labels > 0


# ------------------------------------------------------------------------------------------- means
def mean_of(rows: list[dict], key: str) -> float:
    """Mean of a column over the rows in which it is defined; NaN if there are none."""
    values = [row[key] for row in rows if key in row and not math.isnan(row[key])]
    return float(np.mean(values)) if values else math.nan


def summarize(rows: list[dict], targets: tuple[str, ...]) -> dict[str, float]:
    """Means over the cases per target: {"seg_dice", "seg_fpv_ml", "seg_fnv_ml", ...}.

    If the rows have tumor scores (v3), also the patient-level metrics: {"patient_auc", ...}.
    """
    means = {}
    for target in targets:
        mine = [r for r in rows if r["target"] == target]
        means |= {f"{target}_{k}": mean_of(mine, k) for k in MEASURES}
    scored = [r for r in rows if r["target"] == targets[0] and not math.isnan(r["tumor_score"])]
    if scored:
        scores, truths = ([r[k] for r in scored] for k in ("tumor_score", "has_tumor"))
        means |= {f"patient_{k}": v for k, v in metrics.patient_metrics(scores, truths).items()}
    return means


# ------------------------------------------------------------------------------------------ tables
def print_table(rows: list[dict], targets: tuple[str, ...]) -> None:
    """Print Dice, FPV, FNV and volumes per case, and the means over the defined ones."""
    width = max(len(r["case"]) for r in rows) + 2
    for target in targets:
        mine = [r for r in rows if r["target"] == target]
        titles = ("Dice", "FPV ml", "FNV ml", "true ml", "pred. ml")
        print(f"\n{target:{width}}" + "".join(f"{title:>9}" for title in titles))
        for r in mine:
            volumes = [_cell(r[k]) for k in ("fpv_ml", "fnv_ml", "truth_ml", "pred_ml")]
            print(f"{r['case']:{width}}{_cell(r['dice'], 3)}{''.join(volumes)}")
        means = [_cell(mean_of(mine, k)) for k in ("fpv_ml", "fnv_ml")]
        print(f"{'mean':{width}}{_cell(mean_of(mine, 'dice'), 3)}{''.join(means)}")
        surface, hd95, _, sensitivity, false = (_cell(mean_of(mine, k)).strip() for k in AGREEMENT)
        if any(name in mine[0] for name in AGREEMENT):
            lesions = f"lesions: sensitivity {sensitivity}, {false} false ones per study"
            print(f"{lesions}; surface Dice {surface}, HD95 {hd95} mm")
        if empty := sum(not r["truth_ml"] for r in mine):
            line = f"{empty} of {len(mine)} without a true tumor"
            print(f"{line}: Dice and FNV are undefined there, and FPV counts")


def _cell(value: float, digits: int = 2) -> str:
    return f"{'-':>9}" if math.isnan(value) else f"{value:9.{digits}f}"
