"""data.py: from files to preprocessed cases and folds, with values that can be checked by hand."""

import json
import os
import pickle
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine, voxel_sizes
from scipy import ndimage

import data
import files
from data import BRAIN_PREPROCESSING, CachedCase, Preprocessing, to_grid
from files import UserError
from patches import PatchDataset

DIRECTION = {
    "R": (1, 0, 0),
    "L": (-1, 0, 0),
    "A": (0, 1, 0),
    "P": (0, -1, 0),
    "S": (0, 0, 1),
    "I": (0, 0, -1),
}
TRAINING = [{"image": "imagesTr/B_1.nii.gz", "label": "labelsTr/B_1.nii.gz"}]


# ------------------------------------------------------------------------------------------ helpers
@contextmanager
def refused(*words):
    """The block raises a UserError (one line for a person) that says each of `words`."""
    with pytest.raises(UserError) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text and all(str(w) in text for w in words), text


def same(a, b) -> bool:
    """Equal to the last bit: arrays or tensors, in dicts, lists and tuples."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


def grid(codes="LAS", spacing=(2, 2, 3), origin=(-31, 17, 250), tilt=0) -> np.ndarray:
    """The affine of axes `codes`, turned by `tilt` degrees about the world's diagonal."""
    axes = np.array([DIRECTION[c] for c in codes], float).T * spacing
    x, y, z = np.ones(3) / np.sqrt(3)
    cross, t = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]), np.deg2rad(tilt)
    turn = np.eye(3) + np.sin(t) * cross + (1 - np.cos(t)) * cross @ cross  # Rodrigues
    return nib.affines.from_matvec(turn @ axes, origin)


def save(path, array, affine=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, grid() if affine is None else affine), path)
    return path


def petct(folder, suv, ct=None, seg=None, affine=None) -> data.Case:
    """Write one study; without `ct` and `seg` a water-like body without a tumor."""
    suv = np.asarray(suv, np.float32)
    save(folder / "SUV.nii.gz", suv, affine)
    save(
        folder / "CTres.nii.gz",
        np.zeros_like(suv) if ct is None else np.asarray(ct, np.float32),
        affine,
    )
    save(
        folder / "SEG.nii.gz",
        np.zeros(suv.shape, np.uint8) if seg is None else np.asarray(seg, np.uint8),
        affine,
    )
    return data.Case(
        folder.name,
        folder.name,
        (folder / "CTres.nii.gz", folder / "SUV.nii.gz"),
        folder / "SEG.nii.gz",
    )


def brain(root, image, label, affine=None, **meta) -> data.Case:
    """Write one case in MSD's layout, `meta` beside "training", and find it."""
    affine = grid("RAS", (1, 1, 1)) if affine is None else affine
    save(root / TRAINING[0]["image"], np.asarray(image, np.float32), affine)
    save(root / TRAINING[0]["label"], np.asarray(label), affine)
    (root / "dataset.json").write_text(json.dumps({"training": TRAINING} | meta))
    (case,) = data.find_brain(root)
    return case


def blob(shape, centre, sigma) -> np.ndarray:
    index = np.indices(shape) - np.reshape(centre, (3, 1, 1, 1))
    return np.exp(-0.5 * sum((i / s) ** 2 for i, s in zip(index, sigma)))


def patient(name, patient=None, tumor=True):
    return SimpleNamespace(name=name, patient=patient or name, tumor=tumor)


# ----------------------------------------------------------------------------------- files -> cases
def test_studies_are_found_at_any_depth_and_the_patient_is_what_lies_above_the_study(tmp_path):
    small = np.ones((2, 2, 2))
    for path in ("P1/S1", "P1/S2", "P2/S1", "alone", "site/P3/S1", "site/P3/S2"):
        petct(tmp_path / path, small)
    cases = data.find_petct(tmp_path)
    assert {c.name: c.patient for c in cases} == {
        "P1__S1": "P1", "P1__S2": "P1", "P2__S1": "P2", "alone": "alone", "site__P3__S1": "site__P3", "site__P3__S2": "site__P3",
    }  # fmt: skip
    first = next(c for c in cases if c.name == "P1__S1")
    assert [*first.images, first.label] == [
        tmp_path / "P1/S1" / f"{n}.nii.gz" for n in ("CTres", "SUV", "SEG")
    ]
    (one,) = data.find_petct(
        str(tmp_path / "alone")
    )  # the study's own folder, and a root that is a str
    assert (one.name, one.patient) == ("alone", "alone")


def test_a_patient_behind_a_symbolic_link_is_found(tmp_path):
    petct(tmp_path / "disk/P1/S1", np.ones((2, 2, 2)))
    (tmp_path / "root").mkdir()
    (tmp_path / "root/P1").symlink_to(tmp_path / "disk/P1")
    assert [c.name for c in data.find_petct(tmp_path / "root")] == ["P1__S1"]


@pytest.mark.parametrize("gone", ["SEG.nii.gz", "CTres.nii.gz"])
def test_a_study_with_a_missing_file_is_named(tmp_path, gone):
    petct(tmp_path / "P1/S1", np.ones((2, 2, 2)))
    (tmp_path / "P1/S1" / gone).unlink()
    with refused(tmp_path / "P1/S1" / gone, "missing"):
        data.find_petct(tmp_path)


@pytest.mark.parametrize("root", [".", "nowhere"])
def test_a_folder_without_studies_is_refused(tmp_path, root):
    with refused(tmp_path / root, "SUV.nii.gz"):
        data.find_petct(tmp_path / root)


MSD = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumor"}
BRATS = {
    "0": "background",
    "1": "necrotic and non-enhancing tumor core",
    "2": "peritumoral edema",
    "4": "GD-enhancing tumor",
}
E, C = 1, 2  # what read_label makes of it: edema, core


@pytest.mark.parametrize(
    "names,codes,expected",
    [
        (MSD, (0, 1, 2, 3), (0, E, C, C)),
        (BRATS, (0, 1, 2, 4), (0, C, E, C)),
        (
            {"0": "background", "1": "necrotic", "2": "edema", "4": "enhancing"},
            (0, 1, 2, 4),
            (0, C, E, C),
        ),
        (
            {"0": "background", "1": "NECROTIC", "2": "Edema", "3": "Enhancing"},
            (0, 1, 2, 3),
            (0, C, E, C),
        ),  # BraTS 2023's codes
        (None, (0, 1, 2, 3), (0, E, C, C)),
        (None, (0, 1, 2, 4), (0, C, E, C)),
        (None, (0, 1), (0, E)),
        (
            {"0": "background", "1": "a", "2": "b", "3": "c"},
            (0, 1, 2, 3),
            (0, E, C, C),
        ),  # names that say nothing
        (MSD, (0,), (0,)),
    ],
)
def test_brain_labels_become_edema_and_core_by_their_names_or_codes(
    tmp_path, names, codes, expected
):
    label = np.resize(np.array(codes, np.uint8), (3, 4, 5))
    case = brain(tmp_path, np.ones((3, 4, 5, 4)), label, **({"labels": names} if names else {}))
    assert (case.name, case.patient) == ("B_1", "B_1")
    read = data.read_label(case)
    assert same(np.asarray(read.dataobj), np.resize(np.array(expected, np.uint8), label.shape))
    assert np.array_equal(read.affine, grid("RAS", (1, 1, 1)))


@pytest.mark.parametrize(
    "modality,channels",
    [
        ({"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}, (3, 0)),  # MSD
        ({"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}, (2, 3)),
        ({"0": "t2w", "1": "flair"}, (0, 1)),
        (None, (3, 0)),
    ],
)
def test_t2w_comes_first_and_flair_second_wherever_the_file_has_them(tmp_path, modality, channels):
    image = np.ones((4, 4, 4, 4)) * [1, 10, 100, 1000]
    image[0] *= 3  # a quarter is 3, the rest 1
    case = brain(
        tmp_path,
        image,
        np.zeros((4, 4, 4), np.uint8),
        **({"modality": modality} if modality else {}),
    )
    assert case.channels == channels


@pytest.mark.parametrize(
    "text",
    [
        "not json", "", "[]", "null", "3", "{}", '{"training": null}', '{"training": [1]}', '{"training": ["a.nii.gz"]}',
        '{"training": []}', '{"training": [{"image": "a.nii.gz"}]}', b"\x80\x04\xff",
        json.dumps({"training": TRAINING, "modality": ["FLAIR", "T2w"]}),
        json.dumps({"training": TRAINING, "labels": {"background": "nothing", "edema": "1"}}),
    ],
)  # fmt: skip
def test_a_dataset_json_that_is_none_is_refused_by_name(tmp_path, text):
    (tmp_path / "dataset.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused(tmp_path / "dataset.json"):
        data.find_brain(tmp_path)


def test_names_and_codes_the_other_way_round_are_read_or_refused_and_never_a_traceback(tmp_path):
    """nnU-Net v2 writes {"edema": 1} where MSD writes {"1": "edema"}."""
    turned = {name: int(code) for code, name in MSD.items()}
    try:
        case = brain(
            tmp_path, np.ones((2, 2, 2, 4)), np.full((2, 2, 2), 1, np.uint8), labels=turned
        )
    except UserError as e:
        assert "dataset.json" in str(e)
    else:
        assert (np.asarray(data.read_label(case).dataobj) == E).all()


@pytest.mark.parametrize("root", ["empty", "a_file"])
def test_a_missing_dataset_json_is_refused(tmp_path, root):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").write_text("")
    with refused("dataset.json"):
        data.find_brain(tmp_path / root)


# ------------------------------------------------------------------------------------ reading files
def test_files_that_cannot_be_used_are_refused_by_name(tmp_path):
    ones = np.ones((3, 4, 5), np.float32)
    whole = save(
        tmp_path / "whole.nii.gz", np.random.default_rng(0).random((20, 20, 20)).astype(np.float32)
    )
    assert files.read_nifti(whole).get_fdata().shape == (20, 20, 20)
    cut, empty, text = (tmp_path / f"{n}.nii.gz" for n in ("cut", "empty", "text"))
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    empty.write_bytes(b"")
    text.write_text("this is no image")
    for path in (cut, empty, text):
        with refused(path):
            files.read_nifti(path)
    with refused(tmp_path / "missing.nii.gz", "no such file"):
        files.read_nifti(tmp_path / "missing.nii.gz")
    with refused("4d.nii.gz", "(3, 4, 5, 2)"):
        files.read_nifti(save(tmp_path / "4d.nii.gz", np.stack([ones, ones], -1)))
    with refused("3d.nii.gz", "(3, 4, 5)"):
        files.read_nifti(save(tmp_path / "3d.nii.gz", ones), ndim=4)
    for name, bad in (("nan", [np.nan]), ("inf", [np.inf, -np.inf])):
        broken = ones.copy()
        broken.flat[: len(bad)] = bad
        with refused(f"{name}.nii.gz", f"{len(bad)} voxels"):
            files.read_nifti(save(tmp_path / f"{name}.nii.gz", broken))


def test_an_error_without_a_message_is_still_reported_by_file(tmp_path, monkeypatch):
    path = save(tmp_path / "a.nii.gz", np.ones((2, 2, 2), np.float32))

    def fail(*args):
        raise EOFError

    monkeypatch.setattr(nib, "load", fail)
    for read in (files.read_nifti, files.read_header):
        with refused(path):
            read(path)


@pytest.mark.parametrize("values", [(0, 2), (0, 1, 2), (0, 1, -1), (0, 255), (0, 0.5), (0, 1.5)])
def test_petct_labels_other_than_0_and_1_are_refused(tmp_path, values):
    case = petct(tmp_path / "P", np.ones((2, 3, 4)))
    save(case.label, np.resize(np.array(values, np.float32), (2, 3, 4)))
    with refused(case.label, "0 and 1"):
        data.read_label(case)


@pytest.mark.parametrize("values", [(0, 5), (0, 1, 2, 3, 4), (0, -1), (0, 1, 2.5), (0, 1.5)])
def test_brain_labels_that_are_neither_msd_nor_brats_are_refused(tmp_path, values):
    label = np.resize(np.array(values, np.float32), (2, 3, 4))
    case = brain(tmp_path, np.ones((2, 3, 4, 4)), label)
    with refused(case.label, "0, 1, 2, 4"):
        data.read_label(case)


def test_pet_in_becquerel_is_refused_and_hot_suv_is_not(tmp_path):
    hot = np.ones((10, 10, 10))
    hot[5, 5, 4:7] = 400  # a bladder: 3 voxels of 1000
    data.preprocess(petct(tmp_path / "hot", hot), Preprocessing())
    case = petct(tmp_path / "bq", hot * 5000)
    with refused(case.images[1], "Bq/ml", "SUV"):
        data.preprocess(case, Preprocessing())


@pytest.mark.parametrize(
    "other",
    [
        dict(shape=(10, 10, 9)),
        dict(affine=grid(origin=(-30, 17, 250))),  # 1 mm beside it
        dict(affine=grid("LPS")),
        dict(affine=grid(tilt=1)),
        dict(affine=grid(spacing=(2, 2, 3.2))),
    ],
)
@pytest.mark.parametrize("file", ["CTres.nii.gz", "SEG.nii.gz"])
def test_images_on_different_grids_are_refused(tmp_path, file, other):
    case = petct(tmp_path / "P", np.ones((10, 10, 10)))
    save(
        tmp_path / "P" / file,
        np.zeros(other.get("shape", (10, 10, 10)), np.float32),
        other.get("affine"),
    )
    with refused(tmp_path / "P" / file, tmp_path / "P/SUV.nii.gz"):
        data.preprocess(case, Preprocessing())


def test_grids_that_drift_apart_by_two_voxels_at_the_far_end_are_refused():
    """Affines that agree to 0.009 mm are 400 x 0.009 = 3.6 mm apart at the 400th voxel."""
    a, b = (
        nib.Nifti1Image(np.zeros((401, 2, 2), np.uint8), grid(spacing=(s, 2, 3)))
        for s in (2.0, 2.009)
    )
    with refused("a.nii", "b.nii"):
        files.same_grid(a, b, "a.nii", "b.nii")


@pytest.mark.parametrize("file", ["CTres.nii.gz", "SEG.nii.gz"])
def test_rounding_in_one_header_does_not_part_the_arrays(tmp_path, file):
    """15 voxels of 1 mm are 7.5 of 2 mm: one file rounds to 8 and the other, of 0.99999 mm, to 7."""
    shape, preprocessing = (15, 15, 15), Preprocessing(spacing=(2, 2, 2))
    case = petct(tmp_path / "P", np.ones(shape), affine=grid(spacing=(1, 1, 1)))
    save(tmp_path / "P" / file, np.ones(shape, np.float32), grid(spacing=(0.99999,) * 3))
    out = data.preprocess(case, preprocessing)
    assert out["image"].shape[1:] == out["label"].shape


# --------------------------------------------------------------------------------------- resampling
@pytest.mark.parametrize("spacing", [(2, 2, 3), (0.7, 1.3, 4.1)])
@pytest.mark.parametrize("target", ["LAS", "RAS"])
@pytest.mark.parametrize(
    "codes,tilt",
    [("RAS", 0), ("LPS", 0), ("LAS", 0), ("PIR", 0), ("SLA", 0), ("LPS", 9), ("IRP", -7)],
)
def test_a_voxel_keeps_its_place_in_the_world(codes, tilt, target, spacing):
    """The voxels hold 2x - 3y + z/2 of their world coordinates; linear interpolation reproduces it on any new grid."""
    weights, shape = np.array((2, -3, 0.5)), (13, 17, 11)
    affine = grid(codes, (1.9, 2.4, 3.1), tilt=tilt)
    world = apply_affine(affine, np.indices(shape).reshape(3, -1).T) @ weights
    new = to_grid(nib.Nifti1Image(world.reshape(shape).astype(np.float32), affine), target, spacing)
    assert "".join(nib.aff2axcodes(new.affine)) == target
    assert voxel_sizes(new.affine) == pytest.approx(spacing, rel=1e-6)

    at = apply_affine(new.affine, np.indices(new.shape).reshape(3, -1).T)
    old = apply_affine(np.linalg.inv(affine), at)  # in old voxels
    inside = ((old >= 0) & (old <= np.array(shape) - 1)).all(1)
    assert inside.mean() > 0.5
    assert (
        np.abs(new.get_fdata().reshape(-1) - at @ weights)[inside].max() < 1e-3
    )  # float32 of numbers up to 300

    # The field of view: the same centre, and each side the same to half a new voxel.
    centre = [
        apply_affine(a, (np.array(s) - 1) / 2)
        for a, s in ((affine, shape), (new.affine, new.shape))
    ]
    assert np.allclose(*centre, atol=1e-4)
    axis = nib.io_orientation(np.linalg.inv(new.affine) @ affine)[:, 0].astype(
        int
    )  # old axis -> new axis
    sides = np.array(new.shape) * spacing
    for a, side in zip(axis, np.array(shape) * (1.9, 2.4, 3.1)):
        assert abs(sides[a] - side) <= spacing[a] / 2 + 1e-6


def test_the_right_grid_is_left_as_it_is_to_the_last_bit():
    array = np.random.default_rng(0).random((5, 6, 7)).astype(np.float32)
    out = to_grid(nib.Nifti1Image(array, grid()), "LAS", (2, 2, 3))
    assert same(np.asarray(out.dataobj), array) and np.array_equal(out.affine, grid())
    turned = to_grid(nib.Nifti1Image(array, grid("LPS")), "LAS", (2, 2, 3))
    assert same(np.asarray(turned.dataobj), array[:, ::-1])
    assert np.allclose(
        turned.affine[:3, 3], (-31, 17 - 5 * 2, 250)
    )  # the first voxel was the last of six along P


def test_half_the_spacing_by_hand():
    """Faces stay: centres of 4 mm voxels at 0, 4, 8 become centres of 2 mm voxels at -1, 1, 3, 5, 7, 9; edges repeat."""
    line = np.array([0, 4, 8], np.float32).reshape(3, 1, 1)
    out = to_grid(nib.Nifti1Image(line, grid("RAS", (4, 2, 2), origin=(0, 0, 0))), "RAS", (2, 2, 2))
    assert out.get_fdata().ravel() == pytest.approx([0, 1, 3, 5, 7, 8])
    assert np.allclose(out.affine, [[2, 0, 0, -1], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])


def test_a_volume_thinner_than_a_voxel_stays_one_voxel():
    out = to_grid(
        nib.Nifti1Image(np.full((9, 9, 1), 5, np.float32), grid("RAS", (1, 1, 1))), "RAS", (3, 3, 3)
    )
    assert out.shape == (3, 3, 1) and (out.get_fdata() == 5).all()


# -------------------------------------------------------------------------------------- intensities
def test_windows_by_hand(tmp_path):
    hu = {-1000: 0, -100: 0, -12.5: 0.25, 75: 0.5, 162.5: 0.75, 250: 1, 3000: 1}
    suv = {
        0.9375: 0.0625,
        3.75: 0.25,
        7.5: 0.5,
        11.25: 0.75,
        15: 1,
        40: 1,
    }  # none is 0: nothing is cropped
    ct_array, suv_array = (np.resize(np.array([*d], np.float32), (6, 7, 8)) for d in (hu, suv))
    out = data.preprocess(petct(tmp_path / "P", suv_array, ct_array), Preprocessing())
    expected = [
        np.vectorize(d.get, otypes=[float])(a) for d, a in ((hu, ct_array), (suv, suv_array))
    ]
    assert same(out["image"], np.array(expected, np.float16))
    assert (
        not out["label"].any()
        and out["label"].dtype == np.uint8
        and out["foreground"].shape == (0, 3)
    )


def test_other_windows_are_obeyed_and_negative_suv_is_zero(tmp_path):
    suv = np.full((4, 4, 4), 5.0)
    suv[1, 1, 1] = -2
    out = data.preprocess(
        petct(tmp_path / "P", suv, np.full((4, 4, 4), 100)),
        Preprocessing(ct_window=(0, 400), suv_window=(0, 10)),
    )
    assert out["image"][:, 1, 1, 1].tolist() == [0.25, 0] and out["image"][:, 0, 0, 0].tolist() == [
        0.25,
        0.5,
    ]


def test_brain_channels_are_standardised_over_their_non_zero_voxels(tmp_path):
    image = np.zeros((4, 6, 8, 4))
    image[1:3, 1:5, 2:6] = (10, 5, 5, 1)
    image[1, 1:5, 2:6] = (30, 7, 9, 3)  # half of the brain: FLAIR 20 +- 10, T2w 2 +- 1
    out = data.preprocess(
        brain(tmp_path, image, np.zeros((4, 6, 8), np.uint8)), BRAIN_PREPROCESSING
    )
    assert out["image"].shape == (2, 2, 4, 4)  # cropped to the brain
    assert (out["image"][:, 0] == 1).all() and (out["image"][:, 1] == -1).all()
    assert np.allclose(out["affine"][:3, 3] - grid("RAS", (1, 1, 1))[:3, 3], (1, 1, 2))


@pytest.mark.parametrize("value", [0, 0.1, 1234.567, 1e6 / 3])
def test_a_channel_without_contrast_becomes_zero(value):
    """The mean of equal float32 numbers need not be that number, and (tiny) / 1e-8 is not small."""
    out = data._z_score(np.full((23, 29, 31), value, np.float32))
    assert out.dtype == np.float32 and not out.any()


def test_too_few_channels_are_refused(tmp_path):
    case = brain(tmp_path, np.ones((3, 3, 3, 2)), np.zeros((3, 3, 3), np.uint8))
    with refused(case.images[0], "2 channels"):
        data.preprocess(case, BRAIN_PREPROCESSING)


# ------------------------------------------------------------------------------- crop, labels, grid
@pytest.mark.parametrize("codes", ["LAS", "RAS", "LPS", "PIR"])
def test_a_marked_voxel_keeps_its_world_position_through_turn_and_crop(tmp_path, codes):
    suv, seg = np.zeros((10, 11, 12)), np.zeros((10, 11, 12))
    suv[2:9, 3:7, 4:11] = 1
    marks = np.array([(2, 3, 4), (8, 6, 10), (5, 4, 9)])
    seg[tuple(marks.T)] = 1
    suv[5, 4, 9] = 6  # the only one of its kind
    spacing = {"LAS": (2, 2, 3), "RAS": (2, 2, 3), "LPS": (2, 2, 3), "PIR": (2, 3, 2)}[
        codes
    ]  # no interpolation
    affine = grid(codes, spacing)
    out = data.preprocess(petct(tmp_path / "P", suv, seg=seg, affine=affine), Preprocessing())
    assert sorted(out["image"].shape[1:]) == [4, 7, 7]
    got = apply_affine(out["affine"], np.argwhere(out["label"]))
    assert np.allclose(
        sorted(map(tuple, got)), sorted(map(tuple, apply_affine(affine, marks))), atol=1e-4
    )
    assert np.array_equal(out["foreground"], np.argwhere(out["label"]))
    hottest = np.unravel_index(out["image"][1].argmax(), out["label"].shape)
    assert np.allclose(
        apply_affine(out["affine"], hottest), apply_affine(affine, (5, 4, 9)), atol=1e-4
    )


@pytest.mark.parametrize("codes,tilt", [("LPS", 0), ("PIR", 0), ("RAS", 8)])
def test_image_and_label_keep_place_and_volume_through_resampling(tmp_path, codes, tilt):
    affine, shape, centre = grid(codes, (1.3, 1.7, 2.2), tilt=tilt), (60, 50, 44), (32, 22, 23)
    suv = blob(shape, centre, 10 / np.array((1.3, 1.7, 2.2)))  # a Gaussian of 10 mm
    seg = suv > 0.35
    out = data.preprocess(
        petct(tmp_path / "P", 10 * suv * (suv > 1e-3), seg=seg, affine=affine), Preprocessing()
    )
    assert np.allclose(voxel_sizes(out["affine"]), (2, 2, 3))
    world = apply_affine(affine, centre)
    for array, tolerance in (
        (out["image"][1].astype(float), 0.1),
        (out["label"], 0.3),
    ):  # mm; a mask is coarse
        assert (
            np.abs(apply_affine(out["affine"], ndimage.center_of_mass(array)) - world).max()
            < tolerance
        )
    assert out["label"].sum() * 12 == pytest.approx(seg.sum() * 1.3 * 1.7 * 2.2, rel=0.04)


def test_edema_and_core_keep_their_volumes_and_leave_no_gap_between_them(tmp_path):
    distance = np.sqrt(sum((i - 15) ** 2 for i in np.indices((31, 31, 31))))
    label = np.select((distance < 6, distance < 11), (3, 1), 0).astype(
        np.uint8
    )  # 1.3 mm voxels: core within edema
    image = np.ones((31, 31, 31, 4)) + label[..., None]
    out = data.preprocess(
        brain(tmp_path, image, label, grid("LPS", (1.3,) * 3), labels=MSD), BRAIN_PREPROCESSING
    )
    for code, file_code in ((E, 1), (C, 3)):
        assert (out["label"] == code).sum() == pytest.approx(
            (label == file_code).sum() * 1.3**3, rel=0.04
        )
    whole = out["label"] > 0
    assert np.array_equal(ndimage.binary_fill_holes(whole), whole) and ndimage.label(whole)[1] == 1
    assert len(out["foreground"]) == whole.sum()


def test_the_whole_tumor_is_what_it_would_be_as_one_label(tmp_path):
    """Where edema, core and background meet, none of the three has half of a voxel."""
    rng, affine = np.random.default_rng(0), grid("RAS", (1.3, 1.4, 1.7))
    label = rng.integers(0, 3, (20, 20, 20)).astype(np.uint8)
    out = data.preprocess(
        brain(tmp_path, rng.random((20, 20, 20, 4)), label, affine), BRAIN_PREPROCESSING
    )
    soft = to_grid(
        nib.Nifti1Image((label > 0).astype(np.float32), affine), "RAS", (1, 1, 1)
    ).get_fdata()
    clear = np.abs(soft - 0.5) > 1e-4
    assert soft.shape == out["label"].shape and clear.mean() > 0.9
    assert np.array_equal((out["label"] > 0)[clear], (soft > 0.5)[clear])


def test_on_its_own_grid_a_label_is_unchanged(tmp_path):
    rng = np.random.default_rng(0)
    seg = rng.random((9, 8, 7)) < 0.3
    assert np.array_equal(
        data.preprocess(petct(tmp_path / "P", np.ones(seg.shape), seg=seg), Preprocessing())[
            "label"
        ],
        seg,
    )
    label = rng.choice(np.array((0, 1, 2, 4), np.uint8), (9, 8, 7))
    out = data.preprocess(
        brain(tmp_path / "B", np.ones((9, 8, 7, 4)) + rng.random((9, 8, 7, 4)), label),
        BRAIN_PREPROCESSING,
    )
    assert same(out["label"], np.array((0, C, E, 0, C), np.uint8)[label])


def test_an_empty_pet_is_not_cropped(tmp_path):
    out = data.preprocess(petct(tmp_path / "P", np.zeros((4, 5, 6))), Preprocessing())
    assert out["image"].shape == (2, 4, 5, 6) and np.allclose(out["affine"], grid())


def test_a_tumor_too_small_for_the_coarse_grid_still_makes_its_patient_ill(tmp_path):
    """`tumor` is "any foreground in the truth": it decides the folds' balance and the patient's class."""
    seg = np.zeros((12, 12, 12))
    seg[4, 4, 4] = 1
    case = petct(tmp_path / "P", np.ones(seg.shape), seg=seg, affine=grid(spacing=(1, 1, 1)))
    (cached,) = data.build_cache(
        [case], Preprocessing(spacing=(4, 4, 4)), tmp_path / "cache", workers=1
    )
    assert cached.tumor


# -------------------------------------------------------------------------------------------- cache
@pytest.fixture
def studies(tmp_path):
    rng = np.random.default_rng(0)
    return [
        petct(
            tmp_path / f"data/P{i}",
            0.1 + rng.random((6, 7, 8)),
            seg=rng.random((6, 7, 8)) < 0.1 * i,
        )
        for i in range(3)
    ]


@pytest.fixture
def made(monkeypatch):
    """The names of the cases that were preprocessed, in this process."""
    names, real = [], data.preprocess
    monkeypatch.setattr(
        data,
        "preprocess",
        lambda case, preprocessing: names.append(case.name) or real(case, preprocessing),
    )
    return names


def arrays(case: CachedCase) -> dict:
    return {name: np.array(case.array(name)) for name in ("image", "label", "foreground")}


def test_the_cache_holds_what_preprocess_returns(studies, tmp_path):
    cached = data.build_cache(studies, Preprocessing(), tmp_path / "deep/cache", workers=1)
    for case, got in zip(studies, cached):
        expected = data.preprocess(case, Preprocessing())
        assert np.array_equal(got.affine, expected["affine"]) and same(
            arrays(got), {k: expected[k] for k in arrays(got)}
        )
        assert (got.name, got.patient, got.case, got.tumor) == (
            case.name,
            case.patient,
            case,
            bool(expected["label"].any()),
        )
    assert [c.tumor for c in cached] == [False, True, True]


def test_several_processes_make_the_same_cache_and_report_the_same_error(studies, tmp_path):
    one, two = (
        data.build_cache(studies, Preprocessing(), tmp_path / f"cache{w}", workers=w)
        for w in (1, 2)
    )
    assert all(
        same(arrays(a), arrays(b)) and np.array_equal(a.affine, b.affine) for a, b in zip(one, two)
    )
    studies[1].label.write_bytes(b"broken")
    with refused(studies[1].label):
        data.build_cache(studies, Preprocessing(), tmp_path / "cache3", workers=2)


def test_a_case_is_made_anew_when_a_file_or_the_recipe_changes_and_only_then(
    studies, tmp_path, made
):
    default = Preprocessing()

    def build(preprocessing=default, cases=studies):
        made.clear()
        return data.build_cache(cases, preprocessing, tmp_path / "cache", workers=1)

    everyone = ["P0", "P1", "P2"]
    build()
    assert made == everyone
    build()
    assert made == []
    os.utime(studies[2].images[0], ns=(1, 1))
    build()
    assert made == ["P2"]
    save(studies[0].label, np.ones((6, 7, 8), np.uint8))
    assert build()[0].array("label").all() and made == ["P0"]
    for preprocessing in (
        Preprocessing(spacing=(4, 4, 4)),
        Preprocessing(ct_window=(0, 1)),
        Preprocessing(suv_window=(0, 1)),
        Preprocessing(orientation="RAS"),
    ):
        build(preprocessing)
        assert made == everyone
    build(cases=studies[::-1])  # their order is no matter
    assert made == []


def test_the_meaning_of_a_brain_label_is_part_of_the_entry(tmp_path):
    label = np.resize(np.array([0, 1, 2], np.uint8), (3, 3, 3))
    names = ({"1": "edema", "2": "core"}, {"1": "core", "2": "edema"})
    first, second = (brain(tmp_path / "B", np.ones((3, 3, 3, 4)), label, labels=n) for n in names)
    (
        os.utime(first.images[0], ns=(1, 1)),
        os.utime(first.label, ns=(1, 1)),
    )  # the files are the same, the meaning is not
    a, b = (
        data.build_cache([c], BRAIN_PREPROCESSING, tmp_path / "cache", workers=1)[0].array("label")
        for c in (first, second)
    )
    assert np.array_equal(a, label) and np.array_equal(b, np.array([0, 2, 1])[label])


@pytest.mark.parametrize("when", [1, 2, 3, "case.json", "rename"])
def test_a_killed_run_leaves_a_whole_entry_or_none(studies, tmp_path, monkeypatch, when):
    calls, write = [], np.save

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    def save_some(path, array):
        calls.append(path)
        Path(path).write_bytes(b"half") if len(calls) == when else write(path, array)
        if len(calls) == when:
            stop()

    if when == "case.json":
        monkeypatch.setattr(Path, "write_text", stop)
    elif when == "rename":
        (
            monkeypatch.setattr(Path, "rename", stop),
            monkeypatch.setattr(os, "rename", stop),
            monkeypatch.setattr(os, "replace", stop),
        )
    else:
        monkeypatch.setattr(np, "save", save_some)
    with pytest.raises(KeyboardInterrupt):
        data.build_cache(studies, Preprocessing(), tmp_path / "cache", workers=1)
    monkeypatch.undo()
    for case in studies:
        left = tmp_path / "cache" / f"{case.name}-{data._fingerprint(case, Preprocessing())}"
        assert not left.exists()
    clean = data.build_cache(studies, Preprocessing(), tmp_path / "clean", workers=1)
    again = data.build_cache(studies, Preprocessing(), tmp_path / "cache", workers=1)
    assert all(same(arrays(a), arrays(b)) for a, b in zip(again, clean))


def test_two_processes_may_make_one_entry_at_the_same_time(studies, tmp_path):
    job = (studies[1], Preprocessing(), tmp_path / "cache/P1-x")
    for _ in range(2):  # the second finds the entry of the first in its way
        data._cache_one(job)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["P1-x"]
    assert sorted(p.name for p in (tmp_path / "cache/P1-x").iterdir()) == [
        "case.json",
        "foreground.npy",
        "image.npy",
        "label.npy",
    ]


def test_arrays_are_memory_mapped_and_read_only_and_a_case_travels_light(studies, tmp_path):
    case = data.build_cache(studies, Preprocessing(), tmp_path / "cache", workers=1)[1]
    dtypes = {"image": np.float16, "label": np.uint8, "foreground": np.int16}
    for name, dtype in dtypes.items():
        array = case.array(name)
        assert isinstance(array, np.memmap) and array.dtype == dtype and array.flags.c_contiguous
        with pytest.raises(ValueError):
            array[...] = 0
    assert case.array("image").nbytes == 2 * 2 * 6 * 7 * 8
    sent = pickle.dumps(case)
    assert len(sent) < 2000
    assert same(arrays(pickle.loads(sent)), arrays(case))


def test_two_cases_of_one_name_are_refused(studies, tmp_path):
    with refused("P1", "twice"):
        data.build_cache([*studies, studies[1]], Preprocessing(), tmp_path / "cache", workers=1)


# -------------------------------------------------------------------------------------------- folds
def crowd(rng) -> list:
    """Patients with 1 to 3 studies; a patient is ill where any of the studies shows a tumor."""
    people = [(f"p{i}", rng.integers(1, 4), rng.random() < 0.5) for i in range(rng.integers(5, 40))]
    return [
        patient(f"{p}_{s}", p, bool(ill and (s == 0 or rng.random() < 0.5)))
        for p, n, ill in people
        for s in range(n)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_folds_are_a_partition_that_splits_no_patient_and_shares_out_the_ill(seed):
    rng = np.random.default_rng(seed)
    cases, k = crowd(rng), int(rng.integers(2, 6))
    of = {c.name: c.patient for c in cases}
    ill = {c.patient for c in cases if c.tumor}
    folds = data.make_folds(cases, k, seed)
    assert len(folds) == k and all(f.keys() == {"train", "val"} for f in folds)
    assert sorted(n for f in folds for n in f["val"]) == sorted(of)
    for f in folds:
        assert sorted(f["train"] + f["val"]) == sorted(of)
        assert not {of[n] for n in f["train"]} & {of[n] for n in f["val"]}
    patients = [{of[n] for n in f["val"]} for f in folds]
    for group in (patients, [p & ill for p in patients], [p - ill for p in patients]):
        assert max(map(len, group)) - min(map(len, group)) <= 1
    order = rng.permutation(len(cases))
    assert folds == data.make_folds([cases[i] for i in order], k, seed)
    json.dumps(folds)


def test_another_seed_gives_other_folds():
    cases = [patient(f"p{i:02d}", tumor=i % 3 > 0) for i in range(30)]
    assert len({json.dumps(data.make_folds(cases, 5, seed)) for seed in range(20)}) == 20


@pytest.mark.parametrize("k", [0, 1, 4])
def test_more_folds_than_patients_or_fewer_than_two_are_refused(k):
    cases = [patient(f"p{i}_{j}", f"p{i}") for i in range(3) for j in range(2)]
    with refused(k, "3 patient"):
        data.make_folds(cases, k)


PEOPLE = [
    patient("a_1", "a"),
    patient("a_2", "a"),
    patient("b_1", "b"),
    patient("c_1", "c"),
    patient("d_1", "d"),
]


def splits(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return data.read_splits(path, PEOPLE)


def test_splits_name_cases_or_patients(tmp_path):
    file = tmp_path / "splits.json"
    cases = [{"train": ["c_1", "a_1", "a_2"], "val": ["b_1"]}, {"train": ["b_1"], "val": ["a_2"]}]
    assert splits(file, cases) == [
        {"train": ["a_1", "a_2", "c_1"], "val": ["b_1"]},
        {"train": ["b_1"], "val": ["a_2"]},
    ]
    assert splits(file, [{"train": ["a", "c_1"], "val": ["b", "d"]}]) == [
        {"train": ["a_1", "a_2", "c_1"], "val": ["b_1", "d_1"]}
    ]
    assert splits(file, [{"train": ["a", "a_1"], "val": ["b"]}]) == [
        {"train": ["a_1", "a_2"], "val": ["b_1"]}
    ]  # once each
    folds = data.make_folds(PEOPLE, 4)
    assert splits(file, folds) == folds  # what make_folds writes, read_splits reads


@pytest.mark.parametrize(
    "content,word",
    [
        (
            [{"train": ["a_1", "b_1"], "val": ["a_2"]}],
            "training and validation",
        ),  # two studies of one patient
        ([{"train": ["a", "b"], "val": ["b_1"]}], "training and validation"),
        ([{"train": ["a"], "val": ["b"]}, {"train": ["c"], "val": ["c"]}], "fold 1"),
        ([{"train": ["a", "nobody"], "val": ["b"]}], "nobody"),
        ([{"train": ["a", 7], "val": ["b"]}], "7"),
        ([{"train": ["a"], "val": []}], "fold 0"),
        ([{"train": [], "val": ["a"]}], "fold 0"),
        ([{"train": ["a"]}], "val"),
        ([{"train": "a", "val": None}], "expected"),
        ([{"train": [["a"]], "val": ["b"]}], ""),
        ({"train": ["a"], "val": ["b"]}, "expected"),
        ([["a"], ["b"]], "expected"),
        ([1], "expected"),
        (None, "expected"),
        ([], ""),
        ("not json", "expected"),
        ("", "expected"),
    ],
)
def test_splits_that_leak_or_make_no_sense_are_refused(tmp_path, content, word):
    with refused(tmp_path / "splits.json", word):
        splits(tmp_path / "splits.json", content)


def test_a_missing_or_pickled_splits_file_is_refused(tmp_path):
    with refused("none.json", "no such file"):
        data.read_splits(tmp_path / "none.json", PEOPLE)
    (tmp_path / "splits_final.pkl").write_bytes(
        pickle.dumps([{"train": ["a"], "val": ["b"]}])
    )  # nnU-Net v1's
    with refused("splits_final.pkl"):
        data.read_splits(tmp_path / "splits_final.pkl", PEOPLE)


def test_the_real_splits_of_the_sarcoma_studies(real_petct):
    cases = data.find_petct(real_petct)
    folds = data.read_splits(real_petct / "splits.json", cases)
    names = [f"STS_{n:03d}" for n in (1, 7, 13, 20, 26, 32, 39, 45)]
    assert len(cases) == 40 and len(folds) == 5 and folds[0]["val"] == names
    assert sorted(n for f in folds for n in f["val"]) == sorted(c.name for c in cases)
    assert all(len(f["train"]) == 32 and len(f["val"]) == 8 for f in folds)


# ---------------------------------------------------------------------------------------- real data
def test_a_real_petct_study_is_preprocessed(real_petct, tmp_path):
    case = next(c for c in data.find_petct(real_petct) if c.name == "STS_002")
    (cached,) = data.build_cache([case], Preprocessing(), tmp_path, workers=1)
    image, label = cached.array("image"), cached.array("label")
    truth = nib.load(case.label)
    assert cached.tumor and cached.patient == "STS_002" and image.shape == (2, *label.shape)
    assert nib.aff2axcodes(cached.affine) == ("L", "A", "S") and np.allclose(
        voxel_sizes(cached.affine), (2, 2, 3)
    )
    assert image.min() == 0 and image.max() <= 1 and 0.1 < image[0].mean() < 0.6
    volume = truth.get_fdata().sum() * np.prod(voxel_sizes(truth.affine))
    assert label.sum() * 12 == pytest.approx(volume, rel=0.04)
    centre = [
        apply_affine(a, ndimage.center_of_mass(x))
        for a, x in ((cached.affine, label), (truth.affine, truth.get_fdata()))
    ]
    assert np.abs(np.subtract(*centre)).max() < 0.2  # mm
    item = PatchDataset([cached], (96, 96, 96), 1, foreground_fraction=1)[
        0
    ]  # larger than the study along an axis
    assert item["image"].shape == (2, 96, 96, 96) and item["label"].sum() == label.sum()


def test_the_real_brain_case_is_preprocessed(real_brain):
    (case,) = data.find_brain(real_brain)
    assert case.channels == (3, 0) and dict(case.roles) == {1: "edema", 2: "core", 3: "core"}
    out = data.preprocess(case, replace(BRAIN_PREPROCESSING, spacing=(1, 1, 1)))
    image, label = out["image"].astype(np.float32), out["label"]
    truth = np.asarray(nib.load(case.label).dataobj)
    assert nib.aff2axcodes(out["affine"]) == ("R", "A", "S") and max(label.shape) < 240  # cropped
    assert [(label == v).sum() for v in (1, 2)] == [(truth == 1).sum(), (truth > 1).sum()]
    for channel in image:
        values = channel[channel != 0]
        assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    assert (
        image[1][label == 1].mean() > 1 and image[0][label == 2].mean() > 0.5
    )  # edema shines on FLAIR, the core on T2w
