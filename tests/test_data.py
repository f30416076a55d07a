"""From files to patches: every promise of data.py's docstrings, with values a person can check and laws that hold for every seed."""

import itertools
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
import torch
from nibabel.affines import apply_affine, voxel_sizes
from scipy import ndimage
from torch.utils.data import DataLoader

import data
from data import BRAIN_PREPROCESSING, Augmentation, CachedCase, PatchDataset, Preprocessing, UserError, corrupt_ct, to_grid
from kernels import voxel_shuffle

STILL = Augmentation(flip=0)  # no augmentation at all
EVERYTHING = Augmentation(flip=0.5, rotate=0.7, scale=0.7, intensity=0.7)
DIRECTION = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
TRAINING = [{"image": "imagesTr/B_1.nii.gz", "label": "labelsTr/B_1.nii.gz"}]


# --------------------------------------------------------------------------------------------------------------- helpers
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
    save(folder / "CTres.nii.gz", np.zeros_like(suv) if ct is None else np.asarray(ct, np.float32), affine)
    save(folder / "SEG.nii.gz", np.zeros(suv.shape, np.uint8) if seg is None else np.asarray(seg, np.uint8), affine)
    return data.Case(folder.name, folder.name, (folder / "CTres.nii.gz", folder / "SUV.nii.gz"), folder / "SEG.nii.gz")


def brain(root, image, label, affine=None, **meta) -> data.Case:
    """Write one case in MSD's layout, `meta` beside "training", and find it."""
    affine = grid("RAS", (1, 1, 1)) if affine is None else affine
    save(root / TRAINING[0]["image"], np.asarray(image, np.float32), affine)
    save(root / TRAINING[0]["label"], np.asarray(label), affine)
    (root / "dataset.json").write_text(json.dumps({"training": TRAINING} | meta))
    (case,) = data.find_brain(root)
    return case


def entry(folder, label, image=None, spacing=(1, 1, 1)) -> CachedCase:
    """A cache entry that holds just these arrays; without `image`, both channels are the label."""
    label = np.asarray(label, np.uint8)
    arrays = {"label": label, "foreground": np.argwhere(label > 0).astype(np.int16)}
    arrays["image"] = np.asarray(np.stack([label, label]) if image is None else image, np.float16)
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return CachedCase(folder.name, folder.name, folder, bool(label.any()), np.diag((*spacing, 1)), None)


def blob(shape, centre, sigma) -> np.ndarray:
    index = np.indices(shape) - np.reshape(centre, (3, 1, 1, 1))
    return np.exp(-0.5 * sum((i / s) ** 2 for i, s in zip(index, sigma)))


def ramps(shape) -> np.ndarray:
    return np.indices(shape).astype(np.float32)


def patient(name, patient=None, tumor=True):
    return SimpleNamespace(name=name, patient=patient or name, tumor=tumor)


# ------------------------------------------------------------------------------------------------------- files -> cases
def test_studies_are_found_at_any_depth_and_the_patient_is_what_lies_above_the_study(tmp_path):
    small = np.ones((2, 2, 2))
    for path in ("P1/S1", "P1/S2", "P2/S1", "alone", "site/P3/S1", "site/P3/S2"):
        petct(tmp_path / path, small)
    cases = data.find_petct(tmp_path)
    assert {c.name: c.patient for c in cases} == {
        "P1__S1": "P1", "P1__S2": "P1", "P2__S1": "P2", "alone": "alone", "site__P3__S1": "site__P3", "site__P3__S2": "site__P3",
    }  # fmt: skip
    first = next(c for c in cases if c.name == "P1__S1")
    assert [*first.images, first.label] == [tmp_path / "P1/S1" / f"{n}.nii.gz" for n in ("CTres", "SUV", "SEG")]
    (one,) = data.find_petct(str(tmp_path / "alone"))  # the study's own folder, and a root that is a str
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
BRATS = {"0": "background", "1": "necrotic and non-enhancing tumor core", "2": "peritumoral edema", "4": "GD-enhancing tumor"}
E, C = 1, 2  # what read_label makes of it: edema, core


@pytest.mark.parametrize(
    "names,codes,expected",
    [
        (MSD, (0, 1, 2, 3), (0, E, C, C)),
        (BRATS, (0, 1, 2, 4), (0, C, E, C)),
        ({"0": "background", "1": "necrotic", "2": "edema", "4": "enhancing"}, (0, 1, 2, 4), (0, C, E, C)),
        ({"0": "background", "1": "NECROTIC", "2": "Edema", "3": "Enhancing"}, (0, 1, 2, 3), (0, C, E, C)),  # BraTS 2023's codes
        (None, (0, 1, 2, 3), (0, E, C, C)),
        (None, (0, 1, 2, 4), (0, C, E, C)),
        (None, (0, 1), (0, E)),
        ({"0": "background", "1": "a", "2": "b", "3": "c"}, (0, 1, 2, 3), (0, E, C, C)),  # names that say nothing
        (MSD, (0,), (0,)),
    ],
)
def test_brain_labels_become_edema_and_core_by_their_names_or_codes(tmp_path, names, codes, expected):
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
    case = brain(tmp_path, image, np.zeros((4, 4, 4), np.uint8), **({"modality": modality} if modality else {}))
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
        case = brain(tmp_path, np.ones((2, 2, 2, 4)), np.full((2, 2, 2), 1, np.uint8), labels=turned)
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


# --------------------------------------------------------------------------------------------------------- reading files
def test_files_that_cannot_be_used_are_refused_by_name(tmp_path):
    ones = np.ones((3, 4, 5), np.float32)
    whole = save(tmp_path / "whole.nii.gz", np.random.default_rng(0).random((20, 20, 20)).astype(np.float32))
    assert data.read_nifti(whole).get_fdata().shape == (20, 20, 20)
    cut, empty, text = (tmp_path / f"{n}.nii.gz" for n in ("cut", "empty", "text"))
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    empty.write_bytes(b"")
    text.write_text("this is no image")
    for path in (cut, empty, text):
        with refused(path):
            data.read_nifti(path)
    with refused(tmp_path / "missing.nii.gz", "no such file"):
        data.read_nifti(tmp_path / "missing.nii.gz")
    with refused("4d.nii.gz", "(3, 4, 5, 2)"):
        data.read_nifti(save(tmp_path / "4d.nii.gz", np.stack([ones, ones], -1)))
    with refused("3d.nii.gz", "(3, 4, 5)"):
        data.read_nifti(save(tmp_path / "3d.nii.gz", ones), ndim=4)
    for name, bad in (("nan", [np.nan]), ("inf", [np.inf, -np.inf])):
        broken = ones.copy()
        broken.flat[: len(bad)] = bad
        with refused(f"{name}.nii.gz", f"{len(bad)} voxels"):
            data.read_nifti(save(tmp_path / f"{name}.nii.gz", broken))


def test_an_error_without_a_message_is_still_reported_by_file(tmp_path, monkeypatch):
    path = save(tmp_path / "a.nii.gz", np.ones((2, 2, 2), np.float32))

    def fail(*args):
        raise EOFError

    monkeypatch.setattr(nib, "load", fail)
    for read in (data.read_nifti, data.read_header):
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
    save(tmp_path / "P" / file, np.zeros(other.get("shape", (10, 10, 10)), np.float32), other.get("affine"))
    with refused(tmp_path / "P" / file, tmp_path / "P/SUV.nii.gz"):
        data.preprocess(case, Preprocessing())


def test_grids_that_drift_apart_by_two_voxels_at_the_far_end_are_refused():
    """Affines that agree to 0.009 mm are 400 x 0.009 = 3.6 mm apart at the 400th voxel."""
    a, b = (nib.Nifti1Image(np.zeros((401, 2, 2), np.uint8), grid(spacing=(s, 2, 3))) for s in (2.0, 2.009))
    with refused("a.nii", "b.nii"):
        data.same_grid(a, b, "a.nii", "b.nii")


@pytest.mark.parametrize("file", ["CTres.nii.gz", "SEG.nii.gz"])
def test_rounding_in_one_header_does_not_part_the_arrays(tmp_path, file):
    """15 voxels of 1 mm are 7.5 of 2 mm: one file rounds to 8 and the other, of 0.99999 mm, to 7."""
    shape, preprocessing = (15, 15, 15), Preprocessing(spacing=(2, 2, 2))
    case = petct(tmp_path / "P", np.ones(shape), affine=grid(spacing=(1, 1, 1)))
    save(tmp_path / "P" / file, np.ones(shape, np.float32), grid(spacing=(0.99999,) * 3))
    out = data.preprocess(case, preprocessing)
    assert out["image"].shape[1:] == out["label"].shape


# ------------------------------------------------------------------------------------------------------------- resampling
@pytest.mark.parametrize("spacing", [(2, 2, 3), (0.7, 1.3, 4.1)])
@pytest.mark.parametrize("target", ["LAS", "RAS"])
@pytest.mark.parametrize("codes,tilt", [("RAS", 0), ("LPS", 0), ("LAS", 0), ("PIR", 0), ("SLA", 0), ("LPS", 9), ("IRP", -7)])
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
    assert np.abs(new.get_fdata().reshape(-1) - at @ weights)[inside].max() < 1e-3  # float32 of numbers up to 300

    # The field of view: the same centre, and each side the same to half a new voxel.
    centre = [apply_affine(a, (np.array(s) - 1) / 2) for a, s in ((affine, shape), (new.affine, new.shape))]
    assert np.allclose(*centre, atol=1e-4)
    axis = nib.io_orientation(np.linalg.inv(new.affine) @ affine)[:, 0].astype(int)  # old axis -> new axis
    sides = np.array(new.shape) * spacing
    for a, side in zip(axis, np.array(shape) * (1.9, 2.4, 3.1)):
        assert abs(sides[a] - side) <= spacing[a] / 2 + 1e-6


def test_the_right_grid_is_left_as_it_is_to_the_last_bit():
    array = np.random.default_rng(0).random((5, 6, 7)).astype(np.float32)
    out = to_grid(nib.Nifti1Image(array, grid()), "LAS", (2, 2, 3))
    assert same(np.asarray(out.dataobj), array) and np.array_equal(out.affine, grid())
    turned = to_grid(nib.Nifti1Image(array, grid("LPS")), "LAS", (2, 2, 3))
    assert same(np.asarray(turned.dataobj), array[:, ::-1])
    assert np.allclose(turned.affine[:3, 3], (-31, 17 - 5 * 2, 250))  # the first voxel was the last of six along P


def test_half_the_spacing_by_hand():
    """Faces stay: centres of 4 mm voxels at 0, 4, 8 become centres of 2 mm voxels at -1, 1, 3, 5, 7, 9; edges repeat."""
    line = np.array([0, 4, 8], np.float32).reshape(3, 1, 1)
    out = to_grid(nib.Nifti1Image(line, grid("RAS", (4, 2, 2), origin=(0, 0, 0))), "RAS", (2, 2, 2))
    assert out.get_fdata().ravel() == pytest.approx([0, 1, 3, 5, 7, 8])
    assert np.allclose(out.affine, [[2, 0, 0, -1], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])


def test_a_volume_thinner_than_a_voxel_stays_one_voxel():
    out = to_grid(nib.Nifti1Image(np.full((9, 9, 1), 5, np.float32), grid("RAS", (1, 1, 1))), "RAS", (3, 3, 3))
    assert out.shape == (3, 3, 1) and (out.get_fdata() == 5).all()


# ------------------------------------------------------------------------------------------------------------ intensities
def test_windows_by_hand(tmp_path):
    hu = {-1000: 0, -100: 0, -12.5: 0.25, 75: 0.5, 162.5: 0.75, 250: 1, 3000: 1}
    suv = {0.9375: 0.0625, 3.75: 0.25, 7.5: 0.5, 11.25: 0.75, 15: 1, 40: 1}  # none is 0: nothing is cropped
    ct_array, suv_array = (np.resize(np.array([*d], np.float32), (6, 7, 8)) for d in (hu, suv))
    out = data.preprocess(petct(tmp_path / "P", suv_array, ct_array), Preprocessing())
    expected = [np.vectorize(d.get, otypes=[float])(a) for d, a in ((hu, ct_array), (suv, suv_array))]
    assert same(out["image"], np.array(expected, np.float16))
    assert not out["label"].any() and out["label"].dtype == np.uint8 and out["foreground"].shape == (0, 3)


def test_other_windows_are_obeyed_and_negative_suv_is_zero(tmp_path):
    suv = np.full((4, 4, 4), 5.0)
    suv[1, 1, 1] = -2
    out = data.preprocess(petct(tmp_path / "P", suv, np.full((4, 4, 4), 100)), Preprocessing(ct_window=(0, 400), suv_window=(0, 10)))
    assert out["image"][:, 1, 1, 1].tolist() == [0.25, 0] and out["image"][:, 0, 0, 0].tolist() == [0.25, 0.5]


def test_brain_channels_are_standardised_over_their_non_zero_voxels(tmp_path):
    image = np.zeros((4, 6, 8, 4))
    image[1:3, 1:5, 2:6] = (10, 5, 5, 1)
    image[1, 1:5, 2:6] = (30, 7, 9, 3)  # half of the brain: FLAIR 20 +- 10, T2w 2 +- 1
    out = data.preprocess(brain(tmp_path, image, np.zeros((4, 6, 8), np.uint8)), BRAIN_PREPROCESSING)
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


# ------------------------------------------------------------------------------------------------------- crop, labels, grid
@pytest.mark.parametrize("codes", ["LAS", "RAS", "LPS", "PIR"])
def test_a_marked_voxel_keeps_its_world_position_through_turn_and_crop(tmp_path, codes):
    suv, seg = np.zeros((10, 11, 12)), np.zeros((10, 11, 12))
    suv[2:9, 3:7, 4:11] = 1
    marks = np.array([(2, 3, 4), (8, 6, 10), (5, 4, 9)])
    seg[tuple(marks.T)] = 1
    suv[5, 4, 9] = 6  # the only one of its kind
    spacing = {"LAS": (2, 2, 3), "RAS": (2, 2, 3), "LPS": (2, 2, 3), "PIR": (2, 3, 2)}[codes]  # no interpolation
    affine = grid(codes, spacing)
    out = data.preprocess(petct(tmp_path / "P", suv, seg=seg, affine=affine), Preprocessing())
    assert sorted(out["image"].shape[1:]) == [4, 7, 7]
    got = apply_affine(out["affine"], np.argwhere(out["label"]))
    assert np.allclose(sorted(map(tuple, got)), sorted(map(tuple, apply_affine(affine, marks))), atol=1e-4)
    assert np.array_equal(out["foreground"], np.argwhere(out["label"]))
    hottest = np.unravel_index(out["image"][1].argmax(), out["label"].shape)
    assert np.allclose(apply_affine(out["affine"], hottest), apply_affine(affine, (5, 4, 9)), atol=1e-4)


@pytest.mark.parametrize("codes,tilt", [("LPS", 0), ("PIR", 0), ("RAS", 8)])
def test_image_and_label_keep_place_and_volume_through_resampling(tmp_path, codes, tilt):
    affine, shape, centre = grid(codes, (1.3, 1.7, 2.2), tilt=tilt), (60, 50, 44), (32, 22, 23)
    suv = blob(shape, centre, 10 / np.array((1.3, 1.7, 2.2)))  # a Gaussian of 10 mm
    seg = suv > 0.35
    out = data.preprocess(petct(tmp_path / "P", 10 * suv * (suv > 1e-3), seg=seg, affine=affine), Preprocessing())
    assert np.allclose(voxel_sizes(out["affine"]), (2, 2, 3))
    world = apply_affine(affine, centre)
    for array, tolerance in ((out["image"][1].astype(float), 0.1), (out["label"], 0.3)):  # mm; a mask is coarse
        assert np.abs(apply_affine(out["affine"], ndimage.center_of_mass(array)) - world).max() < tolerance
    assert out["label"].sum() * 12 == pytest.approx(seg.sum() * 1.3 * 1.7 * 2.2, rel=0.04)


def test_edema_and_core_keep_their_volumes_and_leave_no_gap_between_them(tmp_path):
    distance = np.sqrt(sum((i - 15) ** 2 for i in np.indices((31, 31, 31))))
    label = np.select((distance < 6, distance < 11), (3, 1), 0).astype(np.uint8)  # 1.3 mm voxels: core within edema
    image = np.ones((31, 31, 31, 4)) + label[..., None]
    out = data.preprocess(brain(tmp_path, image, label, grid("LPS", (1.3,) * 3), labels=MSD), BRAIN_PREPROCESSING)
    for code, file_code in ((E, 1), (C, 3)):
        assert (out["label"] == code).sum() == pytest.approx((label == file_code).sum() * 1.3**3, rel=0.04)
    whole = out["label"] > 0
    assert np.array_equal(ndimage.binary_fill_holes(whole), whole) and ndimage.label(whole)[1] == 1
    assert len(out["foreground"]) == whole.sum()


def test_the_whole_tumor_is_what_it_would_be_as_one_label(tmp_path):
    """Where edema, core and background meet, none of the three has half of a voxel."""
    rng, affine = np.random.default_rng(0), grid("RAS", (1.3, 1.4, 1.7))
    label = rng.integers(0, 3, (20, 20, 20)).astype(np.uint8)
    out = data.preprocess(brain(tmp_path, rng.random((20, 20, 20, 4)), label, affine), BRAIN_PREPROCESSING)
    soft = to_grid(nib.Nifti1Image((label > 0).astype(np.float32), affine), "RAS", (1, 1, 1)).get_fdata()
    clear = np.abs(soft - 0.5) > 1e-4
    assert soft.shape == out["label"].shape and clear.mean() > 0.9
    assert np.array_equal((out["label"] > 0)[clear], (soft > 0.5)[clear])


def test_on_its_own_grid_a_label_is_unchanged(tmp_path):
    rng = np.random.default_rng(0)
    seg = rng.random((9, 8, 7)) < 0.3
    assert np.array_equal(data.preprocess(petct(tmp_path / "P", np.ones(seg.shape), seg=seg), Preprocessing())["label"], seg)
    label = rng.choice(np.array((0, 1, 2, 4), np.uint8), (9, 8, 7))
    out = data.preprocess(brain(tmp_path / "B", np.ones((9, 8, 7, 4)) + rng.random((9, 8, 7, 4)), label), BRAIN_PREPROCESSING)
    assert same(out["label"], np.array((0, C, E, 0, C), np.uint8)[label])


def test_an_empty_pet_is_not_cropped(tmp_path):
    out = data.preprocess(petct(tmp_path / "P", np.zeros((4, 5, 6))), Preprocessing())
    assert out["image"].shape == (2, 4, 5, 6) and np.allclose(out["affine"], grid())


def test_a_tumor_too_small_for_the_coarse_grid_still_makes_its_patient_ill(tmp_path):
    """`tumor` is "any foreground in the truth": it decides the folds' balance and the patient's class."""
    seg = np.zeros((12, 12, 12))
    seg[4, 4, 4] = 1
    case = petct(tmp_path / "P", np.ones(seg.shape), seg=seg, affine=grid(spacing=(1, 1, 1)))
    (cached,) = data.build_cache([case], Preprocessing(spacing=(4, 4, 4)), tmp_path / "cache", workers=1)
    assert cached.tumor


# ------------------------------------------------------------------------------------------------------------------- cache
@pytest.fixture
def studies(tmp_path):
    rng = np.random.default_rng(0)
    return [petct(tmp_path / f"data/P{i}", 0.1 + rng.random((6, 7, 8)), seg=rng.random((6, 7, 8)) < 0.1 * i) for i in range(3)]


@pytest.fixture
def made(monkeypatch):
    """The names of the cases that were preprocessed, in this process."""
    names, real = [], data.preprocess
    monkeypatch.setattr(data, "preprocess", lambda case, preprocessing: names.append(case.name) or real(case, preprocessing))
    return names


def arrays(case: CachedCase) -> dict:
    return {name: np.array(case.array(name)) for name in ("image", "label", "foreground")}


def test_the_cache_holds_what_preprocess_returns(studies, tmp_path):
    cached = data.build_cache(studies, Preprocessing(), tmp_path / "deep/cache", workers=1)
    for case, got in zip(studies, cached):
        expected = data.preprocess(case, Preprocessing())
        assert np.array_equal(got.affine, expected["affine"]) and same(arrays(got), {k: expected[k] for k in arrays(got)})
        assert (got.name, got.patient, got.case, got.tumor) == (case.name, case.patient, case, bool(expected["label"].any()))
    assert [c.tumor for c in cached] == [False, True, True]


def test_several_processes_make_the_same_cache_and_report_the_same_error(studies, tmp_path):
    one, two = (data.build_cache(studies, Preprocessing(), tmp_path / f"cache{w}", workers=w) for w in (1, 2))
    assert all(same(arrays(a), arrays(b)) and np.array_equal(a.affine, b.affine) for a, b in zip(one, two))
    studies[1].label.write_bytes(b"broken")
    with refused(studies[1].label):
        data.build_cache(studies, Preprocessing(), tmp_path / "cache3", workers=2)


def test_a_case_is_made_anew_when_a_file_or_the_recipe_changes_and_only_then(studies, tmp_path, made):
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
    for preprocessing in (Preprocessing(spacing=(4, 4, 4)), Preprocessing(ct_window=(0, 1)), Preprocessing(suv_window=(0, 1)), Preprocessing(orientation="RAS")):
        build(preprocessing)
        assert made == everyone
    build(cases=studies[::-1])  # their order is no matter
    assert made == []


def test_the_meaning_of_a_brain_label_is_part_of_the_entry(tmp_path):
    label = np.resize(np.array([0, 1, 2], np.uint8), (3, 3, 3))
    names = ({"1": "edema", "2": "core"}, {"1": "core", "2": "edema"})
    first, second = (brain(tmp_path / "B", np.ones((3, 3, 3, 4)), label, labels=n) for n in names)
    os.utime(first.images[0], ns=(1, 1)), os.utime(first.label, ns=(1, 1))  # the files are the same, the meaning is not
    a, b = (data.build_cache([c], BRAIN_PREPROCESSING, tmp_path / "cache", workers=1)[0].array("label") for c in (first, second))
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
        monkeypatch.setattr(Path, "rename", stop), monkeypatch.setattr(os, "rename", stop), monkeypatch.setattr(os, "replace", stop)
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
    assert sorted(p.name for p in (tmp_path / "cache/P1-x").iterdir()) == ["case.json", "foreground.npy", "image.npy", "label.npy"]


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


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files through Linux's /proc")
def test_many_cases_do_not_hold_many_files_open(tmp_path):
    """Every map keeps a file descriptor: 1014 studies x 3 arrays are more than the usual limit of 1024 files a process."""
    cases = [entry(tmp_path / f"c{i}", np.eye(4)[None].repeat(4, 0)) for i in range(60)]
    before = len(os.listdir("/proc/self/fd"))
    items = PatchDataset(cases, (2, 2, 2), 60)
    for n in range(60):
        items[n]
    assert len(os.listdir("/proc/self/fd")) - before < 60


def test_two_cases_of_one_name_are_refused(studies, tmp_path):
    with refused("P1", "twice"):
        data.build_cache([*studies, studies[1]], Preprocessing(), tmp_path / "cache", workers=1)


# ------------------------------------------------------------------------------------------------------------------- folds
def crowd(rng) -> list:
    """Patients with 1 to 3 studies; a patient is ill where any of the studies shows a tumor."""
    people = [(f"p{i}", rng.integers(1, 4), rng.random() < 0.5) for i in range(rng.integers(5, 40))]
    return [patient(f"{p}_{s}", p, bool(ill and (s == 0 or rng.random() < 0.5))) for p, n, ill in people for s in range(n)]


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


PEOPLE = [patient("a_1", "a"), patient("a_2", "a"), patient("b_1", "b"), patient("c_1", "c"), patient("d_1", "d")]


def splits(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return data.read_splits(path, PEOPLE)


def test_splits_name_cases_or_patients(tmp_path):
    file = tmp_path / "splits.json"
    cases = [{"train": ["c_1", "a_1", "a_2"], "val": ["b_1"]}, {"train": ["b_1"], "val": ["a_2"]}]
    assert splits(file, cases) == [{"train": ["a_1", "a_2", "c_1"], "val": ["b_1"]}, {"train": ["b_1"], "val": ["a_2"]}]
    assert splits(file, [{"train": ["a", "c_1"], "val": ["b", "d"]}]) == [{"train": ["a_1", "a_2", "c_1"], "val": ["b_1", "d_1"]}]
    assert splits(file, [{"train": ["a", "a_1"], "val": ["b"]}]) == [{"train": ["a_1", "a_2"], "val": ["b_1"]}]  # once each
    folds = data.make_folds(PEOPLE, 4)
    assert splits(file, folds) == folds  # what make_folds writes, read_splits reads


@pytest.mark.parametrize(
    "content,word",
    [
        ([{"train": ["a_1", "b_1"], "val": ["a_2"]}], "training and validation"),  # two studies of one patient
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
    (tmp_path / "splits_final.pkl").write_bytes(pickle.dumps([{"train": ["a"], "val": ["b"]}]))  # nnU-Net v1's
    with refused("splits_final.pkl"):
        data.read_splits(tmp_path / "splits_final.pkl", PEOPLE)


def test_the_real_splits_of_the_sarcoma_studies(real_petct):
    cases = data.find_petct(real_petct)
    folds = data.read_splits(real_petct / "splits.json", cases)
    names = [f"STS_{n:03d}" for n in (1, 7, 13, 20, 26, 32, 39, 45)]
    assert len(cases) == 40 and len(folds) == 5 and folds[0]["val"] == names
    assert sorted(n for f in folds for n in f["val"]) == sorted(c.name for c in cases)
    assert all(len(f["train"]) == 32 and len(f["val"]) == 8 for f in folds)


# ----------------------------------------------------------------------------------------------------------------- patches
@pytest.fixture
def three(tmp_path):
    """Two ill patients and a healthy one, of different shapes, smaller than a patch of 8 in places; anisotropic."""
    rng = np.random.default_rng(1)
    shapes = ((14, 12, 10), (6, 20, 9), (8, 7, 30))
    labels = [rng.random(s) < p for s, p in zip(shapes, (0.05, 0.02, 0))]
    return [entry(tmp_path / f"c{i}", x, rng.random((2, *x.shape)), (2, 2, 3)) for i, x in enumerate(labels)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of two cores
def test_item_n_is_a_function_of_seed_and_n_whatever_the_workers_and_the_start(three):
    make = lambda seed=3: PatchDataset(three, (8, 8, 8), 12, seed, EVERYTHING)  # noqa: E731
    batch = lambda items: {k: torch.stack([i[k] for i in items]) for k in items[0]}  # noqa: E731
    backwards = [make()[n] for n in reversed(range(12))][::-1]
    expected = [batch(backwards[n : n + 2]) for n in range(0, 12, 2)]
    for workers in (0, 1, 3):
        assert same(list(DataLoader(make(), 2, num_workers=workers)), expected)
        assert same(list(DataLoader(make(), 2, sampler=range(6, 12), num_workers=workers)), expected[3:])  # a resumed run
    assert same([PatchDataset(three, (8, 8, 8), 10**6, 3, EVERYTHING)[n] for n in range(12)], backwards)  # a longer run
    assert not any(same(make(4)[n], backwards[n]) for n in range(12))
    assert len({int(i["key"]) for i in backwards}) == 12


def test_the_global_random_state_is_neither_read_nor_written(three):
    items = PatchDataset(three, (8, 8, 8), 9, 0, EVERYTHING)
    first = [items[n] for n in range(9)]
    for seed in (0, 1):
        np.random.seed(seed), torch.manual_seed(seed)  # noqa: NPY002 (the legacy state is what must stay as it is)
        states = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
        assert same([items[n] for n in range(9)], first)
        assert same((np.random.get_state()[1], torch.get_rng_state()), states)  # noqa: NPY002


def test_an_item_has_the_promised_shapes_and_types(three):
    for n, item in enumerate(PatchDataset(three, (8, 4, 6), 30, 0, EVERYTHING)[n] for n in range(30)):
        assert {k: (tuple(v.shape), v.dtype) for k, v in item.items()} == {
            "image": ((2, 8, 4, 6), torch.float32), "label": ((1, 8, 4, 6), torch.int64),
            "tumor": ((), torch.float32), "key": ((), torch.int64),
        }, n  # fmt: skip
        assert item["tumor"] == bool(item["label"].any()) and item["key"] >= 0
        assert set(item["label"].unique().tolist()) <= {0, 1}


def test_iterating_over_a_dataset_ends_at_its_length(three):
    items = PatchDataset(three, (2, 2, 2), 5)
    assert len(items) == 5 and len(list(itertools.islice(items, 8))) == 5


@pytest.mark.parametrize("patches_per_case", [1, 4])
def test_each_round_visits_every_case_once_in_a_new_order(tmp_path, patches_per_case):
    cases = [entry(tmp_path / f"c{i}", np.zeros((3, 3, 3)), np.full((2, 3, 3, 3), i)) for i in range(7)]
    items = PatchDataset(cases, (2, 2, 2), 7 * 5 * patches_per_case, 0, STILL, patches_per_case=patches_per_case)
    visits = np.array([int(items[n]["image"][0, 0, 0, 0]) for n in range(len(items))]).reshape(5, 7, patches_per_case)
    assert (visits == visits[:, :, :1]).all()  # the patches of a case follow one another
    assert (np.sort(visits[:, :, 0], axis=1) == np.arange(7)).all()
    assert len({tuple(v) for v in visits[:, :, 0]}) == 5


def test_two_of_three_patches_hold_tumor(tmp_path):
    label = np.zeros((40, 40, 40))
    label[20, 31, 3] = 1  # a negative patch of 3^3 meets this voxel once in 2,000 times
    items = PatchDataset([entry(tmp_path / "c", label)], (3, 3, 3), 2000, 0)
    assert np.mean([float(items[n]["tumor"]) for n in range(2000)]) == pytest.approx(2 / 3, abs=0.03)  # 3 standard deviations


@pytest.mark.parametrize("positive", [0, 1])
def test_a_patch_of_one_voxel_is_tumor_or_is_not(tmp_path, positive):
    case = entry(tmp_path / "c", np.random.default_rng(0).random((9, 9, 9)) < 0.5)
    items = PatchDataset([case], (1, 1, 1), 300, 0, STILL, foreground_fraction=positive)
    assert {int(items[n]["label"]) for n in range(300)} == {positive}


def test_positive_patches_without_rotation_always_hold_tumor(three):
    items = PatchDataset(three[:2], (5, 8, 3), 200, 0, Augmentation(intensity=1), foreground_fraction=1)
    assert all(items[n]["tumor"] for n in range(200))


def test_a_patch_may_be_a_slice_one_voxel_thick(tmp_path):
    case = entry(tmp_path / "c", np.random.default_rng(0).random((9, 9, 9)) < 0.1)
    for patch in ((1, 8, 8), (8, 8, 1), (1, 1, 1)):
        items = PatchDataset([case], patch, 20, 0, EVERYTHING)
        assert all(items[n]["image"].shape == (2, *patch) for n in range(20))


def test_tumor_voxels_are_all_drawn_with_equal_chance(tmp_path):
    label = np.zeros((6, 6, 6))
    label[[0, 0, 5, 2], [0, 5, 5, 3], [0, 1, 5, 4]] = 1  # corners too
    image = np.arange(216).reshape(6, 6, 6)
    items = PatchDataset([entry(tmp_path / "c", label, np.stack([image, image]))], (1, 1, 1), 1200, 0, STILL, foreground_fraction=1)
    drawn, count = np.unique([int(items[n]["image"][0]) for n in range(1200)], return_counts=True)
    assert drawn.tolist() == [0, 31, 2 * 36 + 3 * 6 + 4, 215] and count.min() > 240  # 300 each, sd 15


def test_healthy_patients_and_patients_that_are_all_tumor_give_patches(tmp_path):
    for value, name in enumerate(("healthy", "all")):
        items = PatchDataset([entry(tmp_path / name, np.full((5, 5, 5), value))], (3, 3, 3), 20)
        assert {float(items[n]["tumor"]) for n in range(20)} == {float(value)}


# ----------------------------------------------------------------------------------------------------- crop and padding
def read(case, centre, size, **params):
    still = {"matrix": np.eye(3), "flip": [], "gain": np.ones(2), "shift": np.zeros(2), "gamma": np.ones(2)}
    return data.read_patch(case, centre, size, still | params)


def test_without_augmentation_a_patch_is_an_exact_crop_around_its_centre(tmp_path):
    shape = np.array((12, 13, 11))
    serial = np.arange(shape.prod()).reshape(shape)  # below 2048: exact in float16
    label = np.random.default_rng(0).integers(0, 3, shape)
    case = entry(tmp_path / "c", label, np.stack([serial, -serial]))
    for seed in range(60):
        rng = np.random.default_rng(seed)
        size, centre = rng.integers(1, 11, 3), rng.integers(0, shape)
        image, part = read(case, centre, size)
        start = np.array(np.unravel_index(int(image[0, 0, 0, 0]), shape))  # the voxels say where they are from
        box = tuple(slice(a, a + s) for a, s in zip(start, size))
        assert same(image, np.stack([serial[box], -serial[box]]).astype(np.float32)) and same(part, label[box].astype(np.uint8))
        ideal = centre - size // 2
        assert np.array_equal(start, np.clip(ideal, 0, shape - size))  # shifted only where it would leave the volume
        assert image.flags.c_contiguous and part.flags.c_contiguous


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 20, 7), (9, 9, 3), (1, 1, 1), (8, 9, 10)])
def test_a_volume_smaller_than_the_patch_is_centred_in_zeros_and_nothing_is_lost(tmp_path, shape):
    size, rng = np.array((8, 9, 11)), np.random.default_rng(0)
    serial = 1 + np.arange(np.prod(shape)).reshape(shape)
    case = entry(tmp_path / "c", np.ones(shape), np.stack([serial, -serial]))
    for _ in range(20):
        image, label = read(case, rng.integers(0, shape), size)
        box = ndimage.find_objects(label)[0]
        for axis, s in enumerate(box):
            if shape[axis] <= size[axis]:
                before, after = s.start, size[axis] - s.stop
                assert before + shape[axis] + after == size[axis] and abs(before - after) <= 1
            else:
                assert (s.start, s.stop) == (0, size[axis])  # filled
        inside = image[(0, *box)]
        start = np.unravel_index(int(inside[0, 0, 0]) - 1, shape)
        assert np.array_equal(inside, serial[tuple(slice(a, a + s) for a, s in zip(start, inside.shape))])
        assert np.array_equal(image[1], -image[0]) and np.array_equal(image[0] > 0, label > 0)


def test_read_region_fills_what_lies_outside_with_zeros():
    line = np.arange(1, 6).reshape(1, 1, 5)
    cases = {(-2, 4): [0, 0, 1, 2], (3, 4): [4, 5, 0, 0], (-1, 7): [0, 1, 2, 3, 4, 5, 0], (7, 2): [0, 0], (-9, 3): [0, 0, 0]}
    for (start, size), expected in cases.items():
        assert data.read_region(line, (0, 0, start), (1, 1, size)).ravel().tolist() == expected


# ------------------------------------------------------------------------------------------------------------ augmentation
def test_flips_move_image_and_label_together_by_hand(tmp_path):
    label = np.arange(24).reshape(2, 3, 4)
    case = entry(tmp_path / "c", label)
    for flip in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in range(4)):
        image, part = read(case, (1, 1, 1), (2, 3, 4), flip=list(flip))
        expected = label[tuple(slice(None, None, -1 if axis in flip else 1) for axis in range(3))]
        assert np.array_equal(part, expected) and np.array_equal(image, np.stack([expected, expected]))


def test_each_axis_is_flipped_half_of_the_time_on_its_own(three):
    flips = [tuple(data.draw_augmentation(data.random_stream(n), Augmentation())["flip"]) for n in range(1600)]
    count = {f: flips.count(f) for f in set(flips)}
    assert len(count) == 8 and all(140 < c < 260 for c in count.values())  # 200 each, sd 13


@pytest.mark.parametrize("seed", range(12))
def test_rotation_and_scaling_move_image_and_label_together(tmp_path, seed):
    """The image is a ramp and the label its step at 20: wherever the ramp reads 19.5 or more, so does the label."""
    ramp = ramps((40, 40, 40))
    axis = seed % 3
    case = entry(tmp_path / "c", ramp[axis] >= 20, np.stack([ramp[axis], ramp[axis - 1]]), (1, 1.5, 2))
    aug = Augmentation(rotate=1, scale=1)
    image, label = data.read_patch(case, (20, 20, 20), (12, 11, 10), data.draw_augmentation(data.random_stream(seed), aug))
    clear = np.abs(image[0] - 19.5) > 1e-3
    assert clear.mean() > 0.9 and 0.1 < label.mean() < 0.9
    assert np.array_equal((image[0] > 19.5)[clear], label.astype(bool)[clear])


def jacobian(folder, params, spacing, size=(9, 10, 11)):
    """(3, 3) in mm: how the place that is read moves with the place in the patch; and the place read in its middle, in voxels."""
    ramp, columns = ramps((48, 48, 48)), []
    for axis in range(3):
        case = entry(folder / f"axis{axis}", np.zeros((48, 48, 48)), ramp[[axis, axis]], spacing)
        columns.append(data.read_patch(case, (24, 24, 24), size, params)[0][0])
    place = np.stack(columns)  # (3, *size): input voxel of each output voxel
    steps = np.stack([np.diff(place, axis=a + 1).mean((1, 2, 3)) for a in range(3)], 1)
    index = np.indices(size) - (np.reshape(size, (3, 1, 1, 1)) - 1) / 2
    middle = place.mean((1, 2, 3))
    assert np.allclose(place, np.einsum("ij,jabc->iabc", steps, index) + middle.reshape(3, 1, 1, 1), atol=2e-3)  # affine
    return np.diag(spacing) @ steps @ np.diag(1 / np.array(spacing)), middle


@pytest.mark.parametrize("spacing", [(1, 1, 1), (1, 2, 3)])
def test_a_rotation_is_one_of_millimetres_about_the_middle_of_the_patch(tmp_path, spacing):
    axes = set()
    for seed in range(12):
        params = data.draw_augmentation(data.random_stream(seed), Augmentation(flip=0, rotate=1))
        turn, middle = jacobian(tmp_path / f"{seed}", params, spacing)
        assert np.allclose(turn @ turn.T, np.eye(3), atol=2e-3) and np.linalg.det(turn) == pytest.approx(1, abs=2e-3)
        assert np.degrees(np.arccos((np.trace(turn) - 1) / 2)) <= 30.1
        assert np.allclose(middle, 24 - np.array((9, 10, 11)) // 2 + (np.array((9, 10, 11)) - 1) / 2, atol=2e-3)
        (fixed,) = np.flatnonzero(np.isclose(np.diag(turn), 1, atol=1e-4))  # one axis stays
        axes.add(int(fixed))
    assert axes == {0, 1, 2}


def test_scaling_is_the_same_along_all_axes_and_within_a_fifth(tmp_path):
    zooms = []
    for seed in range(12):
        params = data.draw_augmentation(data.random_stream(seed), Augmentation(flip=0, scale=1))
        grow, _ = jacobian(tmp_path / f"{seed}", params, (1, 2, 3))
        assert np.allclose(grow, grow[0, 0] * np.eye(3), atol=2e-3)
        zooms.append(1 / grow[0, 0])
    assert 0.8 <= min(zooms) < 0.92 and 1.08 < max(zooms) <= 1.2


def test_a_quarter_turn_by_hand(tmp_path):
    """Reading at +90 degrees about axis 0: output (i, j, k) is input (i, -k, j) about the middle. Spacing 2, 1, 1: the same voxels."""
    rng, quarter = np.random.default_rng(0), np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])
    label = rng.integers(0, 3, (5, 7, 7))
    image, part = read(entry(tmp_path / "c", label, spacing=(2, 1, 1)), (2, 3, 3), (5, 7, 7), matrix=quarter)
    j, k = np.mgrid[:7, :7]
    expected = label[:, 6 - k, j]
    assert np.array_equal(part, expected) and np.allclose(image[0], expected, atol=1e-5)


def test_probabilities_and_ranges_of_the_augmentation():
    draws = [data.draw_augmentation(data.random_stream(n), Augmentation(0.5, (0, 1, 2), 0.2, 30, 0.2, 0.2, 0.3, 0.1)) for n in range(2000)]
    matrix, gain, shift = (np.array([d[k] for d in draws]) for k in ("matrix", "gain", "shift"))
    scale = np.cbrt(np.linalg.det(matrix))
    turned = np.abs(matrix / scale[:, None, None] - np.eye(3)).max((1, 2)) > 1e-9
    assert turned.mean() == pytest.approx(0.2, abs=0.03) and (np.abs(scale - 1) > 1e-9).mean() == pytest.approx(0.2, abs=0.03)
    assert 0.8 <= 1 / scale.max() < 0.81 and 1.19 < 1 / scale.min() <= 1.2  # a patch reads 1 / zoom of its size
    for values, neutral in ((gain, 1), (shift, 0)):
        active = values != neutral
        assert active.mean(0) == pytest.approx([0.3, 0.3], abs=0.03)
        assert np.abs(values - neutral).max() <= 0.1 and np.abs(values - neutral).max() > 0.09
    assert ((gain[:, 0] != 1) & (gain[:, 1] != 1)).mean() == pytest.approx(0.09, abs=0.02)  # the channels on their own
    assert all((d["gamma"] == 1).all() for d in draws)
    gamma = np.array([data.draw_augmentation(data.random_stream(n), Augmentation(gamma=0.3))["gamma"] for n in range(2000)])
    assert (gamma != 1).mean(0) == pytest.approx([0.3, 0.3], abs=0.03) and 0.5 <= gamma.min() < 0.51 and 1.97 < gamma.max() <= 2


def test_switching_one_part_off_leaves_the_others_as_they_are():
    for n in range(50):
        on = data.draw_augmentation(data.random_stream(n), Augmentation(0.5, (0, 1, 2), 1, 30, 0, 0.2, 1, 0.1))
        no_flip = data.draw_augmentation(data.random_stream(n), Augmentation(0, (0, 1, 2), 1, 30, 0, 0.2, 1, 0.1))
        no_turn = data.draw_augmentation(data.random_stream(n), Augmentation(0.5, (0, 1, 2), 0, 30, 0, 0.2, 1, 0.1))
        assert same([on[k] for k in ("matrix", "gain", "shift")], [no_flip[k] for k in ("matrix", "gain", "shift")])
        assert on["flip"] == no_turn["flip"] and same(on["gain"], no_turn["gain"]) and np.allclose(no_turn["matrix"], np.eye(3))


def test_intensities_by_hand(tmp_path):
    case = entry(tmp_path / "c", np.eye(3)[None].repeat(3, 0), np.full((2, 3, 3, 3), 0.5))
    image, label = read(case, (1, 1, 1), (3, 3, 3), gain=np.array((1.5, 0.5)), shift=np.array((0.25, -0.25)))
    assert (image[0] == 1).all() and (image[1] == 0).all()  # 0.5 x 1.5 + 0.25 and 0.5 x 0.5 - 0.25
    case = entry(tmp_path / "d", np.eye(3)[None].repeat(3, 0), np.full((2, 3, 3, 3), -0.25))
    bent = read(case, (1, 1, 1), (3, 3, 3), gamma=np.array((0.5, 2.0)))[0]
    assert (bent[0] == -0.5).all() and (bent[1] == -0.0625).all()  # the sign is kept
    assert np.array_equal(label, case.array("label"))


# ----------------------------------------------------------------------------------------------------------------- targets
def test_targets_by_hand():
    image, label = torch.arange(16.0).reshape(1, 2, 2, 2, 2), torch.tensor([0, 1, 2, 0, 1, 1, 2, 2]).reshape(1, 1, 2, 2, 2)
    batch = {"image": image, "label": (label > 0).long(), "tumor": torch.ones(1), "key": torch.ones(1)}
    made = data.make_targets(batch, "petct")
    assert same({k: made[k] for k in batch}, batch) and same(made["seg"], batch["label"])
    assert same(made["ct"], torch.arange(8.0).reshape(1, 1, 2, 2, 2)) and same(made["pet"], 8 + made["ct"])
    made = data.make_targets(batch | {"label": label}, "brain")
    assert {k: made[k].flatten().tolist() for k in ("edema", "core", "whole")} == {
        "edema": [0, 1, 0, 0, 1, 1, 0, 0], "core": [0, 0, 1, 0, 0, 0, 1, 1], "whole": [0, 1, 1, 0, 1, 1, 1, 1],
    }  # fmt: skip
    assert all(made[k].shape == label.shape and made[k].dtype == torch.int64 for k in ("edema", "core", "whole"))


# -------------------------------------------------------------------------------------------------------------- corruption
def serial(*shape, fmt=torch.contiguous_format) -> torch.Tensor:
    """Every voxel of a sample its own number, so that one can see where it went."""
    return torch.arange(float(np.prod(shape))).reshape(shape).contiguous(memory_format=fmt)


KEYS = torch.tensor([5, 2**61 + 5, 7, 5])


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("how", ["none", "noise", "shuffle"])
def test_corruption_leaves_pet_and_its_input_alone_and_keeps_the_layout(how, fmt):
    x = serial(4, 2, 9, 8, 7, fmt=fmt)
    before = x.clone()
    y = corrupt_ct(x, how, KEYS, size=5, cubes=2)
    assert same(x, before) and same(y[:, 1], x[:, 1])
    assert y.dtype == x.dtype and y.stride() == x.stride()
    assert (y[:, 0] == x[:, 0]).all() == (how == "none")


@pytest.mark.parametrize("how", ["noise", "shuffle"])
def test_a_samples_corruption_depends_on_its_key_alone(how):
    x = serial(1, 2, 9, 9, 9).repeat(4, 1, 1, 1, 1)
    y = corrupt_ct(x, how, KEYS, 6, 2)
    assert same(y, corrupt_ct(x, how, KEYS, 6, 2))
    for i in range(4):
        assert same(y[i : i + 1], corrupt_ct(x[i : i + 1], how, KEYS[i : i + 1], 6, 2))
    assert same(y.flip(0), corrupt_ct(x, how, KEYS.flip(0), 6, 2))
    assert same(y[0], y[3]) and not same(y[0], y[1]) and not same(y[0], y[2])  # keys that differ in high or low bits only


def test_noise_has_the_asked_for_deviation():
    x = torch.zeros(4, 2, 32, 32, 32)
    for sigma in (0.3, 0.05):
        noise = (corrupt_ct(x, "noise", torch.arange(4), sigma=sigma)[:, 0] / sigma).flatten(1)
        assert noise.mean(1).abs().max() < 0.025 and (noise.std(1) - 1).abs().max() < 0.02  # 4 standard errors each
        assert (noise.abs() < 1).float().mean().item() == pytest.approx(0.6827, abs=0.005)  # Gaussian
        assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.025
    assert same(corrupt_ct(x, "noise", torch.arange(4), sigma=0.0), x)


@pytest.mark.parametrize("size,cubes", [(3, 1), (8, 1), (5, 3), (16, 1)])
def test_shuffling_moves_voxels_only_inside_its_cubes(size, cubes):
    x = serial(1, 2, 20, 18, 22)
    for key in range(15):
        before, after = x[0, 0], corrupt_ct(x, "shuffle", torch.tensor([key]), size, cubes)[0, 0]
        moved = before != after
        assert same(after.flatten().sort().values, before.flatten())
        assert 0 < moved.sum() <= cubes * size**3
        if cubes == 1:
            box = ndimage.find_objects(moved.numpy().astype(int))[0]
            assert all(s.stop - s.start <= size for s in box) and moved.sum() > 0.7 * size**3
            assert same(after[box].flatten().sort().values, before[box].flatten().sort().values)


def test_cubes_reach_every_corner_of_the_patch():
    x, hit = serial(1, 2, 6, 5, 7), torch.zeros(6, 5, 7, dtype=bool)
    for n in range(200):  # the high half of a key counts too
        hit |= (corrupt_ct(x, "shuffle", torch.tensor([n << 33]), 4) != x)[0, 0]
    assert hit.all()


@pytest.mark.parametrize("shape", [(4, 6, 5), (16, 3, 16), (1, 8, 8), (16, 16, 16)])
def test_a_cube_larger_than_the_patch_is_made_to_fit(shape):
    x = serial(2, 2, *shape)
    y = corrupt_ct(x, "shuffle", torch.tensor([1, 2]), size=32)
    assert same(y[:, 0].flatten(1).sort().values, x[:, 0].flatten(1))
    assert (y != x).sum() <= 2 * min(shape) ** 3 and (min(shape) == 1 or not same(x, y))


def test_an_unknown_corruption_is_refused():
    with refused("blur", "noise", "shuffle"):
        corrupt_ct(torch.zeros(1, 2, 2, 2, 2), "blur", torch.zeros(1))


# ---------------------------------------------------------------------------------------------------------- voxel shuffling
CORNERS = torch.tensor([[[0, 0, 0], [2, 1, 3], [4, 4, 2]], [[1, 0, 4], [1, 0, 4], [0, 4, 0]]])  # (2, 3, 3), overlapping


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 16])
def test_the_inverse_restores_every_voxel_even_of_overlapping_cubes(size, fmt):
    x = serial(2, 3, size + 4, size + 4, size + 4, fmt=fmt)
    for seed in (0, -7, 2**62, torch.tensor([3, 2**40])):
        y = voxel_shuffle(x, CORNERS, size, seed)
        assert y.stride() == x.stride() and same(y.flatten(2).sort().values, x.flatten(2))
        assert same(voxel_shuffle(y, CORNERS, size, seed, inverse=True), x)
        assert same(y, x) == (size == 1)
        assert same(y[:, 1] - y[:, 0], x[:, 1] - x[:, 0])  # channels differ by a constant, and still do: one permutation


def python_shuffle(size: int, seed: int, cube: int) -> np.ndarray:
    """The file's formula in Python's own integers: the source coordinates of every voxel."""
    word = 2**32 - 1

    def mix(h):
        h = ((h ^ h >> 16) * 0x85EBCA6B) & word
        h = ((h ^ h >> 13) * 0xC2B2AE35) & word
        return h ^ h >> 16

    key = mix((mix(seed & word) + mix(((seed >> 32) & word) ^ 0x5BD1E995) + 0x632BE5AB * (cube + 1)) & word)
    out = np.empty((size, size, size, 3), int)
    for voxel in itertools.product(range(size), repeat=3):
        ijk = list(voxel)
        for r, a in itertools.product(range(4), range(3)):
            p, q = ijk[(a + 1) % 3], ijk[(a + 2) % 3]
            ijk[a] = (ijk[a] + mix(mix((p * 0x9E3779B1 + q + key) & word) ^ (3 * r + a))) % size
        out[voxel] = ijk
    return out


@pytest.mark.parametrize("size,seed", [(2, 0), (3, 2**33 + 1), (5, -1), (7, 2**61 - 1)])
def test_the_permutation_is_the_documented_formula_to_the_last_bit(size, seed):
    x = serial(1, 1, size, size, size)
    for cube, corners in ((0, [[[0, 0, 0]]]), (1, [[[0, 0, 0], [0, 0, 0]]])):
        i, j, k = np.moveaxis(python_shuffle(size, seed, cube), -1, 0)
        before = x if cube == 0 else voxel_shuffle(x, [[[0, 0, 0]]], size, seed)
        assert np.array_equal(voxel_shuffle(x, corners, size, seed)[0, 0], before[0, 0][i, j, k])


def test_an_integer_seed_counts_up_over_the_batch():
    x = serial(1, 1, 7, 7, 7).repeat(3, 1, 1, 1, 1)
    corners = torch.ones(3, 1, 3, dtype=torch.int64)
    assert same(voxel_shuffle(x, corners, 5, 11), voxel_shuffle(x, corners, 5, torch.tensor([11, 12, 13])))


@pytest.mark.parametrize("size", [4, 5, 8])
def test_the_permutation_is_as_random_as_a_random_one(size):
    """A random permutation of n voxels has 1 fixed point on average, whatever n, with variance 1; along an axis a voxel moves
    (s^2 - 1) / (3 s) on average; neighbours do not stay neighbours."""
    n, keys = size**3, 400
    x = serial(1, 1, size, size, size).repeat(keys, 1, 1, 1, 1)
    source = voxel_shuffle(x, torch.zeros(keys, 1, 3, dtype=torch.int64), size, 0).reshape(keys, n).long().numpy()
    fixed = (source == np.arange(n)).sum(1)
    assert fixed.mean() == pytest.approx(1, abs=0.2) and fixed.var() == pytest.approx(1, abs=0.35)  # 4 standard errors
    at, place = np.array(np.unravel_index(source, (size,) * 3)), np.array(np.unravel_index(np.arange(n), (size,) * 3))
    assert np.abs(at - place[:, None]).mean((1, 2)) == pytest.approx([(size**2 - 1) / (3 * size)] * 3, rel=0.02)
    together = (np.abs(np.diff(at, axis=2)).sum(0) == 1).mean()  # neighbours in the file that are neighbours in the cube
    assert together == pytest.approx(6 * size**2 * (size - 1) / (n * (n - 1)), rel=0.1)
    first, last = source[:, 0], source[:, -1]  # where one voxel comes from: everywhere, equally
    for one in (first, last):
        count = np.bincount(one % 4, minlength=4), np.bincount(one // (n // 4) % 4, minlength=4)
        assert all(60 < c.min() and c.max() < 145 for c in count)  # 100 each


@pytest.mark.parametrize(
    "corners,size",
    [
        ([[[0, 0, 3]]], 3),
        ([[[-1, 0, 0]]], 3),
        ([[[0, 0, 0]]], 6),
        ([[[0, 0, 0]]], 0),
        ([[0, 0, 0]], 3),
        ([[[0, 0]]], 3),
        ([[[0, 0, 0]]] * 2, 3),
    ],
)
def test_cubes_outside_the_volume_or_of_a_wrong_shape_are_refused(corners, size):
    with pytest.raises(ValueError):
        voxel_shuffle(torch.zeros(1, 1, 5, 5, 5), torch.tensor(corners), size, 0)


# --------------------------------------------------------------------------------------------------------------- real data
def test_a_real_petct_study_is_preprocessed(real_petct, tmp_path):
    case = next(c for c in data.find_petct(real_petct) if c.name == "STS_002")
    (cached,) = data.build_cache([case], Preprocessing(), tmp_path, workers=1)
    image, label = cached.array("image"), cached.array("label")
    truth = nib.load(case.label)
    assert cached.tumor and cached.patient == "STS_002" and image.shape == (2, *label.shape)
    assert nib.aff2axcodes(cached.affine) == ("L", "A", "S") and np.allclose(voxel_sizes(cached.affine), (2, 2, 3))
    assert image.min() == 0 and image.max() <= 1 and 0.1 < image[0].mean() < 0.6
    volume = truth.get_fdata().sum() * np.prod(voxel_sizes(truth.affine))
    assert label.sum() * 12 == pytest.approx(volume, rel=0.04)
    centre = [apply_affine(a, ndimage.center_of_mass(x)) for a, x in ((cached.affine, label), (truth.affine, truth.get_fdata()))]
    assert np.abs(np.subtract(*centre)).max() < 0.2  # mm
    item = PatchDataset([cached], (96, 96, 96), 1, foreground_fraction=1)[0]  # larger than the study along an axis
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
    assert image[1][label == 1].mean() > 1 and image[0][label == 2].mean() > 0.5  # edema shines on FLAIR, the core on T2w
