"""metrics.py: equal to the AutoPET challenge's script, and to cases computed by hand."""

import json
import math
import time

import numpy as np
import pytest

from metrics import case_metrics, lesion_metrics, patient_metrics, voxel_ml


# ----------------------------------------------------------------------------------------- lesions
def test_equals_the_script_of_the_challenge(golden):
    targets = np.load(golden / "metrics.npz")
    expected = json.loads(str(targets["expected"]))
    assert len(expected) == 12

    def mask(key, shape):
        bits = np.unpackbits(targets[key])
        return bits[: math.prod(shape)].reshape(shape)

    for i, row in enumerate(expected):
        pred = mask(f"pred{i}", row["shape"])
        truth = mask(f"gt{i}", row["shape"])
        found = lesion_metrics(pred, truth, row["spacing"])
        values = {k: math.nan if row[k] is None else row[k] for k in ("dice", "fpv_ml", "fnv_ml")}
        assert found == pytest.approx(values, abs=1e-6, nan_ok=True), i


def test_a_found_a_missed_and_a_false_lesion_by_hand():
    truth, pred = np.zeros((2, 8, 8, 8), bool)
    truth[0:2, 0, 0] = True  # found by one of its two voxels
    pred[1:3, 0, 0] = True
    truth[6, 6, 6] = True  # missed: 1 voxel
    pred[0, 7, 0:3] = True  # false: 3 voxels
    found = lesion_metrics(pred, truth, (2.0, 5.0, 10.0))  # 0.1 ml per voxel
    assert found == pytest.approx({"dice": 2 * 1 / (5 + 3), "fpv_ml": 0.3, "fnv_ml": 0.1})


@pytest.mark.parametrize(
    "offset,connected",
    [((1, 0, 0), True), ((1, 1, 0), True), ((0, 1, 1), True), ((1, 1, 1), False)],
)
def test_components_connect_by_faces_and_edges_but_not_by_corners(offset, connected):
    truth, pred = np.zeros((2, 4, 4, 4), bool)
    truth[1, 1, 1] = pred[1, 1, 1] = True
    pred[tuple(1 + np.array(offset))] = True
    false_ml = lesion_metrics(pred, truth, (10, 10, 10))["fpv_ml"]
    assert false_ml == (0 if connected else 1)


@pytest.mark.parametrize(
    "pred,truth,dice,fpv,fnv",
    [(1, 1, 1, 0, 0), (0, 1, 0, 0, 27), (1, 0, 0, 27, 0), (0, 0, math.nan, 0, 0)],
)
def test_empty_masks_as_the_challenge_scores_them(pred, truth, dice, fpv, fnv):
    masks = np.full((3, 3, 3), pred), np.full((3, 3, 3), truth)
    found = lesion_metrics(*masks, (10, 10, 10))  # 1 ml per voxel
    assert found == pytest.approx({"dice": dice, "fpv_ml": fpv, "fnv_ml": fnv}, nan_ok=True)


def test_an_empty_truth_has_no_dice_and_no_fnv():
    full, empty = np.ones((3, 3, 3)), np.zeros((3, 3, 3))
    found = case_metrics(full, empty, (10, 10, 10))
    undefined = {"dice": math.nan, "fnv_ml": math.nan}
    expected = undefined | {"fpv_ml": 27, "pred_ml": 27, "truth_ml": 0}
    assert found == pytest.approx(expected, nan_ok=True)
    row = case_metrics(full, full, (10, 10, 10))
    assert row == {"dice": 1, "fpv_ml": 0, "fnv_ml": 0, "pred_ml": 27, "truth_ml": 27}


def test_volume_of_a_voxel():
    assert voxel_ml((2.0, 2.0, 3.0)) == pytest.approx(0.012)


def test_swapping_the_masks_swaps_fpv_and_fnv_and_turning_them_changes_nothing():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.random((2, 12, 11, 10)) < rng.random()
        found = lesion_metrics(a, b, (1, 2, 3))
        swapped = lesion_metrics(b, a, (1, 2, 3))
        assert found["dice"] == pytest.approx(swapped["dice"], nan_ok=True)
        volumes = found["fpv_ml"], found["fnv_ml"]
        assert volumes == (swapped["fnv_ml"], swapped["fpv_ml"])
        assert 0 <= found["fpv_ml"] <= a.sum() * 0.006
        turned = lesion_metrics(a.transpose(2, 0, 1), b.transpose(2, 0, 1), (3, 1, 2))
        assert turned == pytest.approx(found, nan_ok=True)


def test_masks_of_two_shapes_or_not_3d_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 2, 2\) and \(2, 2, 3\)"):
        lesion_metrics(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)), (1, 1, 1))
    with pytest.raises(ValueError, match="expected 3D masks"):
        lesion_metrics(np.zeros((2, 2)), np.zeros((2, 2)), (1, 1, 1))


def test_thousands_of_components_take_under_a_second():
    pred, truth = np.zeros((2, 200, 200, 160), bool)
    pred[::12, ::12, ::10] = True  # 17 * 17 * 16 = 4,624 components
    truth[6::12, 6::12, 5::10] = True
    truth[0, 0, 0] = True
    start = time.thread_time()  # other programs may keep the processors busy
    found = lesion_metrics(pred, truth, (10, 10, 10))
    assert time.thread_time() - start < 1
    assert found["fpv_ml"] == 17 * 17 * 16 - 1


# ---------------------------------------------------------------------------------------- patients
def test_patient_metrics_by_hand():
    # Pairs in the right order: (0.9 > 0.6), (0.9 > 0.1), (0.4 > 0.1), 3 of 4.
    found = patient_metrics([0.9, 0.4, 0.6, 0.1], [1, 1, 0, 0])
    assert found == {"accuracy": 0.5, "sensitivity": 0.5, "specificity": 0.5, "auc": 0.75}
    assert patient_metrics([0.5, 0.5], [1, 0])["auc"] == 0.5  # a tie counts half
    found = patient_metrics([0.2, 0.3], [0, 1], threshold=0.25)
    assert found == {"accuracy": 1, "sensitivity": 1, "specificity": 1, "auc": 1}


def test_patient_metrics_are_undefined_without_the_patients_they_need():
    nan = math.nan
    positives = {"accuracy": 0.5, "sensitivity": 0.5, "specificity": nan, "auc": nan}
    assert patient_metrics([0.9, 0.2], [1, 1]) == pytest.approx(positives, nan_ok=True)
    negatives = {"accuracy": 0.5, "sensitivity": nan, "specificity": 0.5, "auc": nan}
    assert patient_metrics([0.9, 0.2], [0, 0]) == pytest.approx(negatives, nan_ok=True)
    assert all(math.isnan(value) for value in patient_metrics([], []).values())


@pytest.mark.parametrize(
    "score,truth,shapes",
    [([0.1], [1, 0], r"\(1,\) and \(2,\)"), ([[0.1]], [[1]], r"\(1, 1\) and \(1, 1\)")],
)
def test_scores_and_truth_must_be_two_lists_of_one_length(score, truth, shapes):
    with pytest.raises(ValueError, match=rf"score and has_tumor of shape \(N,\), got {shapes}"):
        patient_metrics(score, truth)


def test_auc_equals_counting_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        score, positive = rng.integers(0, 6, 40), rng.random(40) < 0.4
        difference = score[positive][:, None] - score[~positive][None]
        right = (difference > 0) + 0.5 * (difference == 0)
        assert patient_metrics(score, positive)["auc"] == pytest.approx(right.mean())
