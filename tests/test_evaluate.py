"""evaluate.py: rows per case, means and tables, and the SUV threshold, by hand on tiny studies."""

import csv
import dataclasses
import math

import nibabel as nib
import numpy as np
import pytest
from test_data import write_petct

from baselines import suv_threshold
from data import CachedCase, find_petct
from evaluate import (
    evaluate_case,
    mean_of,
    print_table,
    read_truth,
    summarize,
    true_mask,
)
from files import write_table

AFFINE = np.diag([-2.0, 2.0, 2.5, 1.0])  # mm: 0.01 ml per voxel
NAN = math.nan


@pytest.fixture
def case(tmp_path):
    """A study of 8^3 voxels with a tumor of two voxels."""
    seg = np.zeros((8, 8, 8), np.uint8)
    seg[2, 2, 2:4] = 1
    return write_petct(tmp_path / "P1", seg * 4.0, seg=seg, affine=AFFINE)


def masks(*voxels) -> list[np.ndarray]:
    """A single mask of 8^3 voxels, true at these."""
    mask = np.zeros((8, 8, 8), bool)
    mask[tuple(zip(*voxels, strict=True))] = True
    return [mask]


# -------------------------------------------------------------------------------------------- rows
def test_a_row_of_a_study_by_hand(case):
    found = masks((2, 2, 2), (6, 6, 6), (6, 6, 7))  # half of the tumor, and a false lesion
    (row,) = evaluate_case(case, read_truth(case), found, ("seg",))
    expected = {"dice": 2 * 1 / (2 + 3), "fpv_ml": 0.02, "fnv_ml": 0, "pred_ml": 0.03}
    expected |= {"truth_ml": 0.02}
    assert (row.pop("case"), row.pop("target")) == ("P1", "seg")
    assert row == pytest.approx(expected)


def test_without_a_truth_only_the_predicted_volume_is_known(case):
    case = dataclasses.replace(case, label=None)
    assert read_truth(case) is None
    (row,) = evaluate_case(case, None, masks((1, 1, 1), (1, 1, 2)), ("seg",))
    expected = {"dice": NAN, "fpv_ml": NAN, "fnv_ml": NAN, "pred_ml": 0.02, "truth_ml": NAN}
    assert (row.pop("case"), row.pop("target")) == ("P1", "seg")
    assert row == pytest.approx(expected, nan_ok=True)


def test_with_an_empty_truth_the_false_positive_volume_counts(tmp_path):
    case = write_petct(tmp_path / "P2", np.zeros((8, 8, 8)), affine=AFFINE)
    (row,) = evaluate_case(case, read_truth(case), masks((1, 1, 1)), ("seg",))
    expected = {"dice": NAN, "fpv_ml": 0.01, "fnv_ml": NAN, "pred_ml": 0.01, "truth_ml": 0}
    assert {name: row[name] for name in expected} == pytest.approx(expected, nan_ok=True)


def test_every_target_has_a_row_with_its_own_mask_and_truth(case):
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[1, 1, 1] = 1
    labels[2, 1, 1:3] = 2
    targets = ("core", "whole", "edema")
    perfect = [true_mask(labels, target) for target in targets]
    rows = evaluate_case(case, nib.Nifti1Image(labels, AFFINE), perfect, targets)
    assert [row["target"] for row in rows] == list(targets)
    assert [row["truth_ml"] for row in rows] == pytest.approx([0.02, 0.03, 0.01])
    assert [row["dice"] for row in rows] == [1, 1, 1]
    with pytest.raises(ValueError, match="shorter"):  # a mask too few
        evaluate_case(case, None, perfect[:2], targets)


def test_the_voxels_of_each_target():
    labels = np.array([0, 1, 2])  # background, edema (PET/CT: tumor), core
    found = {name: true_mask(labels, name).tolist() for name in ("seg", "whole", "core", "edema")}
    assert found == {
        "seg": [False, True, True],
        "whole": [False, True, True],
        "core": [False, False, True],
        "edema": [False, True, False],
    }


# -------------------------------------------------------------------------------- the SUV threshold
def threshold_studies(root, *values) -> list[CachedCase]:
    """A study for each (tumor, organ), the SUVs of a tumor of 512 voxels and an organ of 64.

    The cache entries have no arrays: the threshold is found on the files' own values and grid.
    """
    seg = np.zeros((24, 24, 24), np.uint8)
    seg[4:12, 4:12, 4:12] = 1
    for i, (tumor, organ) in enumerate(values):
        suv = np.full(seg.shape, 0.3)
        suv[seg > 0] = tumor
        suv[16:20, 16:20, 16:20] = organ
        write_petct(root / f"P{i}", suv, seg=seg, affine=AFFINE)
    cases = find_petct(root)
    return [CachedCase(c.name, c.patient, root, True, np.eye(4), c) for c in cases]


@pytest.mark.parametrize(
    "tumor,organ,low,high,dice,fpv",
    [
        # Tumor and organ lie above the threshold: all of the organ is false positive.
        (6, 9, 0.3, 6, 2 * 512 / (512 + 576), 64 * 0.01),
        # The threshold lies between organ and tumor.
        (9, 6, 6, 9, 1, 0),
    ],
)
def test_the_threshold_is_the_best_one_of_the_training_studies(
    tmp_path, tumor, organ, low, high, dice, fpv
):
    train, val = threshold_studies(tmp_path, (tumor, organ), (tumor, organ))
    best, (row,) = suv_threshold([train], [val])
    assert low < best <= high
    assert row["case"] == val.name
    assert row["dice"] == pytest.approx(dice) and row["fpv_ml"] == pytest.approx(fpv)


def test_the_threshold_is_found_on_a_few_studies_with_tumor(tmp_path):
    hot, cool, val = threshold_studies(tmp_path, (40, 20), (10, 1), (40, 20))
    best_for_hot, _ = suv_threshold([hot], [val])
    best_for_cool, _ = suv_threshold([cool], [val])
    assert 1 < best_for_cool <= 10 and 20 < best_for_hot <= 40
    assert suv_threshold([hot, cool], [val], most=1)[0] == best_for_hot
    without_tumor = dataclasses.replace(hot, tumor=False)
    assert suv_threshold([without_tumor, cool], [val])[0] == best_for_cool


# ------------------------------------------------------------------------------------------- means
def test_a_mean_leaves_undefined_and_missing_values_out():
    assert mean_of([{"dice": NAN}, {"dice": 0.5}, {}, {"dice": 1.0}], "dice") == 0.75
    assert math.isnan(mean_of([{"dice": NAN}], "dice"))
    assert math.isnan(mean_of([], "dice"))


POSITIVE = {
    "target": "seg", "dice": 0.5, "fpv_ml": 2.0, "fnv_ml": 4.0, "has_tumor": True,
    "tumor_score": 0.9,
}  # fmt: skip
NEGATIVE = {
    "target": "seg", "dice": NAN, "fpv_ml": 4.0, "fnv_ml": NAN, "has_tumor": False,
    "tumor_score": 0.1,
}  # fmt: skip


def test_the_summary_has_the_means_of_the_cases_and_the_scores_of_the_patients():
    assert summarize([POSITIVE, NEGATIVE], ("seg",)) == {
        "seg_dice": 0.5, "seg_fpv_ml": 3.0, "seg_fnv_ml": 4.0, "patient_accuracy": 1.0,
        "patient_sensitivity": 1.0, "patient_specificity": 1.0, "patient_auc": 1.0,
    }  # fmt: skip


def test_the_summary_keeps_targets_apart_and_has_no_patients_without_scores():
    rows = []
    for target, dice in (("core", 0.4), ("edema", 0.8)):
        rows.append(POSITIVE | {"target": target, "dice": dice, "tumor_score": NAN})
        rows.append(NEGATIVE | {"target": target, "tumor_score": NAN})
    assert summarize(rows, ("core", "edema")) == {
        "core_dice": 0.4, "core_fpv_ml": 3.0, "core_fnv_ml": 4.0,
        "edema_dice": 0.8, "edema_fpv_ml": 3.0, "edema_fnv_ml": 4.0,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------ tables
ROWS = [
    {"case": "P1", "target": "seg", "dice": 0.51239, "fpv_ml": 0.0, "fnv_ml": 1.5,
     "pred_ml": 3.0, "truth_ml": 4.126},
    {"case": "PATIENT2", "target": "seg", "dice": NAN, "fpv_ml": 2.0, "fnv_ml": NAN,
     "pred_ml": 2.0, "truth_ml": 0.0},
]  # fmt: skip


def test_a_written_table_has_an_empty_cell_for_an_undefined_number(tmp_path):
    write_table(ROWS, tmp_path / "new" / "t.csv")
    assert (tmp_path / "new" / "t.csv").read_text().splitlines() == [
        "case,target,dice,fpv_ml,fnv_ml,pred_ml,truth_ml",
        "P1,seg,0.51239,0.0,1.5,3.0,4.126",
        "PATIENT2,seg,,2.0,,2.0,0.0",
    ]
    with open(tmp_path / "new" / "t.csv") as f:
        assert [row["dice"] for row in csv.DictReader(f)] == ["0.51239", ""]


def test_a_printed_table_has_means_and_counts_the_cases_without_tumor(capsys):
    print_table(ROWS, ("seg",))
    assert capsys.readouterr().out.splitlines() == [
        "",
        "seg            Dice   FPV ml   FNV ml  true ml pred. ml",
        "P1            0.512     0.00     1.50     4.13     3.00",
        "PATIENT2          -     2.00        -     0.00     2.00",
        "mean          0.512     1.00     1.50",
        "1 of 2 without a true tumor: Dice and FNV are undefined there, and FPV counts",
    ]


def test_a_printed_table_of_cases_with_tumor_has_no_remark(capsys):
    print_table([ROWS[0], ROWS[0] | {"target": "core", "dice": 0.25}], ("seg", "core"))
    lines = capsys.readouterr().out.splitlines()
    first_words = [line.split()[0] for line in lines if line]
    assert first_words == ["seg", "P1", "mean", "core", "P1", "mean"]
    assert lines[-2].split() == ["P1", "0.250", "0.00", "1.50", "4.13", "3.00"]
