"""Lesions and surfaces: by hand, on balls of known SUV, and equal to what MONAI computes."""

import csv
import math

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy import ndimage
from test_data import make_affine, write_petct
from test_predict import Oracle, ball, table

import metrics
import predict
from config import parse_config
from evaluate import LESION_COLUMNS, describe_case, print_table, read_truth
from metrics import (
    LESION_MEASURES,
    lesion_table,
    lesion_totals,
    remove_small,
    surface_metrics,
)

pytestmark = pytest.mark.usefixtures("one_thread")
NAN = math.nan
AFFINE = np.diag([-2.0, 2.0, 2.5, 1.0])  # mm: 0.01 ml per voxel


# ----------------------------------------------------------------------------------------- lesions
@pytest.mark.parametrize("codes,tilt", [("LAS", 0), ("PIR", 0), ("RAS", 25)])
def test_a_ball_of_known_suv(codes, tilt):
    affine = make_affine(codes, (2.0, 1.5, 2.5), tilt=tilt)
    center, radius = (25, 30, 22), 20.0  # voxels, mm
    mask = ball((50, 60, 45), affine, center, radius)
    suv = np.where(mask, 8.0, 0.5).astype(np.float32)
    suv[center] = 11.25
    (lesion,) = lesion_table(mask, affine, suv)
    assert list(lesion) == list(LESION_MEASURES)
    ml = 4 / 3 * math.pi * 2.0**3  # 33.5
    expected = {"volume_ml": ml, "suv_mean": 8, "tlg": 8 * ml}
    assert {k: lesion[k] for k in expected} == pytest.approx(expected, rel=0.01)
    assert lesion["suv_max"] == 11.25
    in_a_ball = 1000 / (2.0 * 1.5 * 2.5)  # voxels
    assert lesion["suv_peak"] == pytest.approx(8 + 3.25 / in_a_ball, rel=0.01)
    found = [lesion[k] for k in ("x_mm", "y_mm", "z_mm")]
    np.testing.assert_allclose(found, apply_affine(affine, center), atol=0.05)
    assert math.isnan(lesion["meets_truth"])


def test_the_peak_of_a_single_hot_voxel_is_spread_over_the_ball():
    suv = np.zeros((9, 9, 9), np.float32)
    suv[4, 4, 4] = 95
    (lesion,) = lesion_table(suv > 0, np.diag([4.0, 4, 4, 1]), suv)
    # Within 6.2 mm lie the voxel, its 6 neighbors at 4 mm and 12 at 5.7 mm.
    assert lesion["suv_peak"] == pytest.approx(95 / 19)
    assert (lesion["suv_max"], lesion["suv_mean"]) == (95, 95)
    (lesion,) = lesion_table(suv > 0, np.diag([8.0, 8, 8, 1]), suv)
    assert lesion["suv_peak"] == 95  # a voxel is larger than the ball


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 3.0), (4.0, 1.0, 2.0), (10.0, 10.0, 10.0)])
@pytest.mark.parametrize("smoothing", [0, 2])
def test_the_peak_is_the_highest_of_all_balls(spacing, smoothing):
    """In a lesion of many blocks, most of which are left out as too dark."""
    rng = np.random.default_rng(0)
    suv = ndimage.gaussian_filter(rng.gamma(2, 1, (60, 50, 40)), smoothing).astype(np.float32)
    mask = np.zeros(suv.shape, bool)
    mask[1:58, 2:50, :39] = True
    offsets = np.stack(np.meshgrid(*[np.arange(-6, 7)] * 3, indexing="ij"), axis=-1) * spacing
    near = np.linalg.norm(offsets, axis=-1) <= (3000 / (4 * math.pi)) ** (1 / 3)
    means = ndimage.correlate(suv, near / near.sum(), mode="nearest")
    (lesion,) = lesion_table(mask, np.diag([*spacing, 1]), suv)
    assert lesion["suv_peak"] == pytest.approx(means[mask].max(), rel=1e-6)


def test_the_peak_need_not_lie_at_the_maximum():
    suv = np.ones((24, 12, 12), np.float32)
    suv[4, 6, 6] = 10
    suv[14:20, 3:9, 3:9] = 5
    mask = np.zeros(suv.shape, bool)
    mask[3:21, 3:9, 3:9] = True
    (lesion,) = lesion_table(mask, np.diag([3.0, 3, 3, 1]), suv)
    assert (lesion["suv_max"], lesion["suv_peak"]) == (10, 5)


def test_lesions_are_the_components_largest_first():
    mask = np.zeros((12, 12, 12), bool)
    mask[1, 1, 1] = mask[2, 2, 1] = True  # a common edge: one lesion
    mask[5, 5, 5:9] = True
    mask[6, 6, 9] = True  # only a corner in common: another one
    truth = np.zeros_like(mask)
    truth[2, 2, 1:4] = True
    lesions = lesion_table(mask, AFFINE, mask * 2.0, truth)
    assert [row["volume_ml"] for row in lesions] == pytest.approx([0.04, 0.02, 0.01])
    assert [row["meets_truth"] for row in lesions] == [0, 1, 0]
    totals = lesion_totals(lesions)
    expected = {"lesions": 3, "mtv_ml": 0.07, "tlg": 0.14, "suv_mean": 2, "suv_max": 2}
    assert {name: totals[name] for name in expected} == pytest.approx(expected)


def test_without_lesions_the_volume_is_zero_and_suv_undefined():
    assert lesion_table(np.zeros((4, 4, 4), bool), AFFINE, np.zeros((4, 4, 4))) == []
    expected = {"lesions": 0, "mtv_ml": 0, "tlg": 0}
    expected |= dict.fromkeys(("suv_mean", "suv_max", "suv_peak"), NAN)
    assert lesion_totals([]) == pytest.approx(expected, nan_ok=True)


def test_without_pet_a_lesion_has_no_suv():
    mask = np.zeros((4, 4, 4), bool)
    mask[1, 1, 1:3] = True
    (lesion,) = lesion_table(mask, AFFINE)
    assert lesion["volume_ml"] == pytest.approx(0.02)
    assert all(math.isnan(lesion[k]) for k in ("suv_max", "suv_mean", "suv_peak", "tlg"))


def test_large_lesions_are_measured_in_slabs():
    """The same numbers as those of the volume seen along another axis."""
    rng = np.random.default_rng(0)
    mask = rng.random((100, 9, 12)) < 0.15
    mask[:, 4, 4] = True  # a lesion that spans all slabs
    suv = rng.random(mask.shape, np.float32)
    other = rng.random(mask.shape) < 0.1
    found = lesion_table(mask, AFFINE, suv, other)
    assert len(found) > 10 and found[0]["volume_ml"] >= 1
    turned = (volume.transpose(1, 2, 0) for volume in (mask, suv, other))
    mask, suv, other = turned
    again = lesion_table(mask, AFFINE[:, [1, 2, 0, 3]], suv, other)
    at_once, in_slabs = (sorted([*row.values()] for row in rows) for rows in (again, found))
    np.testing.assert_allclose(in_slabs, at_once, rtol=1e-5)


def test_small_components_are_removed_by_volume():
    mask = np.zeros((10, 10, 10), bool)
    mask[1, 1, 1:4] = True  # 0.03 ml
    mask[5, 5, 5:7] = True  # 0.02 ml
    kept = remove_small(mask, (2, 2, 2.5), 0.03)
    assert kept.dtype == bool and kept.sum() == 3 and kept[1, 1, 1:4].all()
    assert not remove_small(mask, (2, 2, 2.5), 0.031).any()
    assert np.array_equal(remove_small(mask, (2, 2, 2.5), 0.02), mask)


# ---------------------------------------------------------------------------------------- surfaces
def balls(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two masks (24, 20, 18) of a few overlapping balls."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, (24, 20, 18)), indexing="ij"), -1)

    def some(count):
        mask = np.zeros(grid.shape[:3], bool)
        for _ in range(count):
            center = rng.uniform(3, 15, 3)
            radius = rng.uniform(2, 5)
            mask |= ((grid - center) ** 2).sum(-1) <= radius**2
        return mask

    return some(3), some(2)


@pytest.mark.parametrize(
    "seed,dice,hd95",
    [
        # compute_surface_dice and compute_hausdorff_distance (percentile 95) of MONAI 1.6.1.
        # DeepMind's surface-distance 0.1, which weights the surface by its area, has
        # 0.236, 0.241, 0.527, 0.297 and 19.7, 22.7, 10.4, 13.9 mm.
        (0, 0.14540059864521027, 20.23854637145996),
        (1, 0.18899083137512207, 24.00676918029785),
        (2, 0.4356435537338257, 11.834794998168945),
        (3, 0.22580644488334656, 15.372448921203613),
    ],
)
def test_surfaces_equal_monais(seed, dice, hd95):
    pred, truth = balls(seed)
    found = surface_metrics(pred, truth, (2.0, 2.5, 3.0), tolerance=3.0)
    assert found == pytest.approx({"surface_dice": dice, "hd95_mm": hd95}, rel=1e-6)


def test_surfaces_of_plates_by_hand():
    """Plates of one voxel are surface throughout."""
    pred, truth = np.zeros((2, 20, 12, 12), bool)
    truth[4, 1:11, 1:11] = True
    pred[6, 1:11, 1:11] = True
    spacing = (2.04, 1, 1)
    assert surface_metrics(pred, truth, spacing, 4.08) == pytest.approx(
        {"surface_dice": 1, "hd95_mm": 4.08}
    )
    assert surface_metrics(pred, truth, spacing, 4.0)["surface_dice"] == 0
    pred[4] = truth[4]  # now 100 voxels of 200, and all 100 of the truth, agree
    found = surface_metrics(pred, truth, spacing, 1.0)
    assert found == pytest.approx({"surface_dice": 2 / 3, "hd95_mm": 4.08})


def test_surfaces_of_empty_masks_and_of_noise(monkeypatch):
    empty, full = np.zeros((4, 4, 4), bool), np.ones((4, 4, 4), bool)
    unknown = {"surface_dice": NAN, "hd95_mm": NAN}
    for pred in (empty, full):
        assert surface_metrics(pred, empty, (1, 1, 1)) == pytest.approx(unknown, nan_ok=True)
    missed = unknown | {"surface_dice": 0}
    assert surface_metrics(empty, full, (1, 1, 1)) == pytest.approx(missed, nan_ok=True)
    assert surface_metrics(full, full, (1, 1, 1)) == {"surface_dice": 1, "hd95_mm": 0}
    monkeypatch.setattr(metrics, "MOST_SURFACE", 50)  # a cube of 4^3 has 56
    assert surface_metrics(full, full, (1, 1, 1)) == pytest.approx(unknown, nan_ok=True)


# ------------------------------------------------------------------------------------- the tables
def write_study(folder, seg=True):
    """A study of 24^3 voxels with three hot balls; the truth has the first, and a cold one."""
    affine = make_affine("LAS", (4, 4, 4))
    hot = [ball((24, 24, 24), affine, c, r) for c, r in HOT]
    suv = np.full((24, 24, 24), 0.4, np.float32)
    for mask, value in zip(hot, (6.0, 4.0, 8.0)):
        suv[mask] = value
    truth = hot[0] | ball((24, 24, 24), affine, (18, 18, 5), 9)
    case = write_petct(folder, suv, seg=truth, affine=affine)
    if not seg:
        (folder / "SEG.nii.gz").unlink()
    return case, hot


HOT = [((6, 6, 6), 12), ((17, 7, 16), 10), ((6, 17, 17), 8)]


def test_rows_of_a_case_by_hand(tmp_path, capsys):
    case, hot = write_study(tmp_path / "P1")
    pred = hot[0] | hot[1] | hot[2]
    suv = np.asarray(nib.load(case.images[1]).dataobj)
    (row,), lesions = describe_case(case, read_truth(case), [pred], ("seg",), suv, 2.0)
    assert list(row)[:5] == ["case", "target", "dice", "fpv_ml", "fnv_ml"]
    volumes = [mask.sum() * 0.064 for mask in hot]
    expected = {
        "true_lesions": 2, "lesion_sensitivity": 0.5, "false_lesions": 2, "lesions": 3,
        "mtv_ml": sum(volumes), "tlg": np.dot(volumes, (6, 4, 8)), "suv_max": 8,
        "fpv_ml": volumes[1] + volumes[2],
    }  # fmt: skip
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert 0 < row["surface_dice"] < 1 and row["hd95_mm"] > 10
    assert [tuple(lesion) for lesion in lesions] == [LESION_COLUMNS] * 3
    assert [lesion["lesion"] for lesion in lesions] == [1, 2, 3]
    assert [lesion["meets_truth"] for lesion in lesions] == [1, 0, 0]
    print_table([row], ("seg",))
    assert "lesions: sensitivity 0.50, 2.00 false ones per study" in capsys.readouterr().out
    (row,), lesions = describe_case(case, None, [pred], ("seg",), None, 2.0)
    unknown = ("surface_dice", "hd95_mm", "true_lesions", "lesion_sensitivity", "false_lesions")
    assert all(math.isnan(row[name]) for name in unknown)
    assert row["lesions"] == 3 and "tlg" not in row


def test_the_program_writes_lesions_with_and_without_a_truth(tmp_path, monkeypatch, capsys):
    for name, seg in (("P1", True), ("P2", False)):
        _, hot = write_study(tmp_path / "in" / name, seg)
    options = "--data petct --root x --spacing 4 4 4 --patch 32 32 32 --no-flips"
    c = parse_config([*options.split(), "--suv-window", "0", "5"])
    monkeypatch.setattr(predict, "load_model", lambda *_: (Oracle(0.5), c))
    out = tmp_path / "out"
    words = ["--checkpoint", "x", "--root", str(tmp_path / "in"), "--out", str(out)]
    predict.main(words)
    rows, lesions = table(out / "metrics.csv"), table(out / "lesions.csv")
    assert [row["case"] for row in rows] == ["P1", "P2"]
    assert [(row["case"], row["lesion"]) for row in lesions] == [
        (case, number) for case in ("P1", "P2") for number in "123"
    ]
    for row in rows:
        assert float(row["suv_max"]) == 8 and float(row["lesions"]) == 3
        volume = sum(mask.sum() for mask in hot) * 0.064
        assert float(row["mtv_ml"]) == pytest.approx(volume)
        assert float(row["pred_ml"]) == pytest.approx(volume)
        mine = [lesion for lesion in lesions if lesion["case"] == row["case"]]
        assert float(row["tlg"]) == pytest.approx(sum(float(k["tlg"]) for k in mine))
        assert [float(k["suv_mean"]) for k in mine] == pytest.approx([6, 4, 8])
    assert float(rows[0]["lesion_sensitivity"]) == 0.5 and float(rows[0]["false_lesions"]) == 2
    assert rows[1]["dice"] == rows[1]["surface_dice"] == rows[1]["false_lesions"] == ""
    assert [k["meets_truth"] for k in lesions] == ["1", "0", "0", "", "", ""]
    capsys.readouterr()

    smallest = hot[2].sum() * 0.064
    predict.main([*words, "--min-lesion-ml", str(smallest * 1.01)])
    lesions = table(out / "lesions.csv")
    assert [lesion["lesion"] for lesion in lesions] == ["1", "2", "1", "2"]
    mask = np.asarray(nib.load(out / "P1.nii.gz").dataobj) > 0
    assert np.array_equal(mask, hot[0] | hot[1])


def test_a_folder_without_lesions_has_a_table_with_its_columns(tmp_path, monkeypatch):
    write_study(tmp_path / "in" / "P1")
    c = parse_config("--data petct --root x --spacing 4 4 4 --patch 32 32 32 --no-flips".split())
    monkeypatch.setattr(predict, "load_model", lambda *_: (Oracle(5), c))
    words = ["--checkpoint", "x", "--root", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    predict.main(words)
    with open(tmp_path / "out" / "lesions.csv") as f:
        assert list(csv.reader(f)) == [list(LESION_COLUMNS)]
    (row,) = table(tmp_path / "out" / "metrics.csv")
    assert (row["lesions"], row["suv_max"], float(row["tlg"])) == ("0", "", 0)
    assert (float(row["lesion_sensitivity"]), float(row["surface_dice"])) == (0, 0)


def test_numbers_that_no_lesion_has_are_refused(tmp_path):
    words = ["--checkpoint", "x", "--pet", "p.nii", "--out", "m.nii"]
    for option in ("--min-lesion-ml", "--tolerance-mm"):
        for value in ("-1", "nan", "inf"):
            with pytest.raises(predict.UserError, match=f"{option} {value}"):
                predict.parse_arguments([*words, option, value])
