"""The metrics: exact against the AutoPET challenge's script, and by hand."""

import json
import math
import time

import numpy as np
import pytest

from metrics import case_metrics, lesion_metrics, mean_of, patient_metrics


def test_equals_the_challenge_script(golden):
    z = np.load(golden / "metrics.npz")
    for i, want in enumerate(json.loads(str(z["expected"]))):
        n = math.prod(want["shape"])
        pred, truth = (np.unpackbits(z[f"{k}{i}"])[:n].reshape(want["shape"]) for k in ("pred", "gt"))
        got = lesion_metrics(pred, truth, want["spacing"])
        expected = {k: math.nan if want[k] is None else want[k] for k in got}
        assert got == pytest.approx(expected, abs=1e-6, nan_ok=True), i


def test_by_hand():
    truth, pred = np.zeros((2, 8, 8, 8), bool)
    truth[0:2, 0, 0] = True  # found by one of its two voxels
    pred[1:3, 0, 0] = True
    truth[6, 6, 6] = True  # missed: 1 voxel
    pred[0, 7, 0:3] = True  # invented: 3 voxels
    got = lesion_metrics(pred, truth, (2.0, 5.0, 10.0))  # 0.1 ml a voxel
    assert got == pytest.approx({"dice": 2 * 1 / (5 + 3), "fpv_ml": 0.3, "fnv_ml": 0.1})


@pytest.mark.parametrize("offset,connected", [((1, 0, 0), True), ((1, 1, 0), True), ((0, 1, 1), True), ((1, 1, 1), False)])
def test_components_join_by_faces_and_edges_but_not_by_corners(offset, connected):
    truth, pred = np.zeros((2, 4, 4, 4), bool)
    truth[1, 1, 1] = pred[1, 1, 1] = True
    pred[tuple(1 + np.array(offset))] = True
    assert lesion_metrics(pred, truth, (10, 10, 10))["fpv_ml"] == (0 if connected else 1)


def test_empty_masks():
    empty, full = np.zeros((3, 3, 3)), np.ones((3, 3, 3))
    ml = (10, 10, 10)
    assert lesion_metrics(full, full, ml) == {"dice": 1, "fpv_ml": 0, "fnv_ml": 0}
    assert lesion_metrics(empty, full, ml) == {"dice": 0, "fpv_ml": 0, "fnv_ml": 27}
    assert lesion_metrics(full, empty, ml) == {"dice": 0, "fpv_ml": 27, "fnv_ml": 0}
    assert lesion_metrics(empty, empty, ml) == pytest.approx({"dice": math.nan, "fpv_ml": 0, "fnv_ml": 0}, nan_ok=True)
    row = case_metrics(full, empty, ml)
    assert math.isnan(row["dice"]) and math.isnan(row["fnv_ml"]) and row["fpv_ml"] == 27 and row["pred_ml"] == 27
    assert mean_of([{"dice": math.nan}, {"dice": 0.5}, {"dice": 1.0}], "dice") == 0.75
    assert math.isnan(mean_of([{"dice": math.nan}], "dice"))


def test_laws():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.random((2, 12, 11, 10)) < rng.random()
        m, swapped = lesion_metrics(a, b, (1, 2, 3)), lesion_metrics(b, a, (1, 2, 3))
        assert m["dice"] == pytest.approx(swapped["dice"], nan_ok=True)
        assert (m["fpv_ml"], m["fnv_ml"]) == (swapped["fnv_ml"], swapped["fpv_ml"])
        assert 0 <= m["fpv_ml"] <= a.sum() * 0.006
        turned = lesion_metrics(a.transpose(2, 0, 1), b.transpose(2, 0, 1), (3, 1, 2))
        assert turned == pytest.approx(m, nan_ok=True)


def test_other_inputs_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        lesion_metrics(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)), (1, 1, 1))
    with pytest.raises(ValueError, match="3D"):
        lesion_metrics(np.zeros((2, 2)), np.zeros((2, 2)), (1, 1, 1))


def test_thousands_of_components_take_under_a_second():
    shape = (200, 200, 160)
    pred, truth = np.zeros((2, *shape), bool)
    pred[::12, ::12, ::10] = True  # 17 * 17 * 16 = 4,624 components
    truth[6::12, 6::12, 5::10] = True
    truth[0, 0, 0] = True
    start = time.perf_counter()
    got = lesion_metrics(pred, truth, (10, 10, 10))
    assert time.perf_counter() - start < 1
    assert got["fpv_ml"] == 17 * 17 * 16 - 1


def test_patient_metrics_by_hand():
    got = patient_metrics([0.9, 0.4, 0.6, 0.1], [1, 1, 0, 0])  # pairs won: (.9 > .6), (.9 > .1), (.4 > .1) of 4
    assert got == {"accuracy": 0.5, "sensitivity": 0.5, "specificity": 0.5, "auc": 0.75}
    assert patient_metrics([0.5, 0.5], [1, 0])["auc"] == 0.5  # a tie counts half
    assert patient_metrics([0.2, 0.3], [0, 1], threshold=0.25)["accuracy"] == 1
    one = patient_metrics([0.9, 0.2], [1, 1])
    assert one["sensitivity"] == 0.5 and math.isnan(one["specificity"]) and math.isnan(one["auc"])
    with pytest.raises(ValueError):
        patient_metrics([0.1], [1, 0])


def test_auc_equals_counting_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        score, ill = rng.integers(0, 6, 40), rng.random(40) < 0.4
        pairs = score[ill][:, None] - score[~ill][None]
        assert patient_metrics(score, ill)["auc"] == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
