"""data.py: from files to preprocessed cases and folds, with values that can be checked by hand."""

import json
import os
import pickle
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine, from_matvec, voxel_sizes
from scipy import ndimage

import data
import files
from data import BRAIN_PREPROCESSING, CachedCase, Preprocessing, to_grid
from files import UserError
from patches import PatchDataset

DIRECTIONS = dict(
    R=(1, 0, 0), L=(-1, 0, 0), A=(0, 1, 0), P=(0, -1, 0), S=(0, 0, 1), I=(0, 0, -1)
)
TRAINING = [{"image": "imagesTr/B_1.nii.gz", "label": "labelsTr/B_1.nii.gz"}]
EDEMA, CORE = 1, 2  # the codes of read_label
PETCT_PREPROCESSING = Preprocessing()


# --------------------------------------------------------------------------------------- helpers
@contextmanager
def refused(*words):
    """Expect a UserError of one line that contains each of `words`."""
    with pytest.raises(UserError) as caught:
        yield
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and all(str(w) in text for w in words), text


def same(a, b) -> bool:
    """Whether arrays or tensors, also in dicts, lists and tuples, are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


def make_affine(codes="LAS", spacing=(2, 2, 3), origin=(-31, 17, 250), tilt=0) -> np.ndarray:
    """The affine of axes `codes`, rotated by `tilt` degrees about the diagonal (1, 1, 1)."""
    axes = np.array([DIRECTIONS[c] for c in codes], float).T * spacing
    x, y, z = np.ones(3) / np.sqrt(3)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.deg2rad(tilt)
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross  # Rodrigues
    return from_matvec(rotation @ axes, origin)


RAS_1MM = make_affine("RAS", (1, 1, 1))


def save(path, array, affine=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, make_affine() if affine is None else affine), path)
    return path


def write_petct(folder, suv, ct=None, seg=None, affine=None) -> data.Case:
    """Write one study; without `ct` and `seg`, a water-like body without tumor."""
    suv = np.asarray(suv, np.float32)
    ct = np.zeros_like(suv) if ct is None else np.asarray(ct, np.float32)
    seg = np.zeros(suv.shape, np.uint8) if seg is None else np.asarray(seg, np.uint8)
    suv_path = save(folder / "SUV.nii.gz", suv, affine)
    ct_path = save(folder / "CTres.nii.gz", ct, affine)
    seg_path = save(folder / "SEG.nii.gz", seg, affine)
    return data.Case(folder.name, folder.name, (ct_path, suv_path), seg_path)


def write_brain(root, image, label, affine=RAS_1MM, **meta) -> data.Case:
    """Write one case in MSD's layout, with `meta` in its dataset.json, and find it."""
    save(root / TRAINING[0]["image"], np.asarray(image, np.float32), affine)
    save(root / TRAINING[0]["label"], np.asarray(label), affine)
    (root / "dataset.json").write_text(json.dumps({"training": TRAINING} | meta))
    (case,) = data.find_brain(root)
    return case


def build_cache(cases, folder, preprocessing=PETCT_PREPROCESSING) -> list[CachedCase]:
    """Build the cache in this process."""
    return data.build_cache(cases, preprocessing, folder, workers=1)


def labels_of(image: nib.Nifti1Image) -> np.ndarray:
    return np.asarray(image.dataobj)


def world_center(array, affine) -> np.ndarray:
    """The center of mass in mm."""
    return apply_affine(affine, ndimage.center_of_mass(np.asarray(array, float)))


# -------------------------------------------------------------------------------- files -> cases
def test_studies_are_found_at_any_depth_and_grouped_by_patient(tmp_path):
    patients = {
        "P1/S1": "P1",
        "P1/S2": "P1",
        "P2/S1": "P2",
        "alone": "alone",
        "site/P3/S1": "site__P3",
        "site/P3/S2": "site__P3",
    }
    for path in patients:
        write_petct(tmp_path / path, np.ones((2, 2, 2)))
    cases = data.find_petct(tmp_path)
    expected = {path.replace("/", "__"): patient for path, patient in patients.items()}
    assert {case.name: case.patient for case in cases} == expected
    first = next(case for case in cases if case.name == "P1__S1")
    paths = [tmp_path / "P1/S1" / f"{name}.nii.gz" for name in ("CTres", "SUV", "SEG")]
    assert [*first.images, first.label] == paths
    (one,) = data.find_petct(str(tmp_path / "alone"))  # root: a str, and the study's own folder
    assert (one.name, one.patient) == ("alone", "alone")


def test_symbolic_links_to_patients_are_followed(tmp_path):
    write_petct(tmp_path / "disk/P1/S1", np.ones((2, 2, 2)))
    (tmp_path / "root").mkdir()
    (tmp_path / "root/P1").symlink_to(tmp_path / "disk/P1")
    assert [case.name for case in data.find_petct(tmp_path / "root")] == ["P1__S1"]


@pytest.mark.parametrize("file", ["SEG.nii.gz", "CTres.nii.gz"])
def test_a_missing_file_of_a_study_is_an_error_only_for_training(tmp_path, file):
    write_petct(tmp_path / "P1/S1", np.ones((2, 2, 2)))
    missing = tmp_path / "P1/S1" / file
    missing.unlink()
    with refused(missing, "missing"):
        data.find_petct(tmp_path)
    (case,) = data.find_petct(tmp_path, complete=False)
    assert (case.images[0] is None) == (file == "CTres.nii.gz")
    assert (case.label is None) == (file == "SEG.nii.gz")


@pytest.mark.parametrize("root,words", [(".", "SUV.nii.gz"), ("nowhere", "no such folder")])
def test_a_folder_without_studies_is_an_error(tmp_path, root, words):
    with refused(tmp_path / root, words):
        data.find_petct(tmp_path / root)


NONE = {}
MSD = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumor"}
BRATS = {
    "0": "background",
    "1": "necrotic and non-enhancing tumor core",
    "2": "peritumoral edema",
    "4": "GD-enhancing tumor",
}
BRATS_SHORT = {"0": "background", "1": "necrotic", "2": "edema", "4": "enhancing"}
BRATS_2023 = {"0": "background", "1": "NECROTIC", "2": "Edema", "3": "Enhancing"}


@pytest.mark.parametrize(
    "names,codes,expected",
    [
        (MSD, (0, 1, 2, 3), (0, EDEMA, CORE, CORE)),
        (MSD, (0,), (0,)),
        (BRATS, (0, 1, 2, 4), (0, CORE, EDEMA, CORE)),
        (BRATS_SHORT, (0, 1, 2, 4), (0, CORE, EDEMA, CORE)),
        (BRATS_2023, (0, 1, 2, 3), (0, CORE, EDEMA, CORE)),
        (NONE, (0, 1, 2, 3), (0, EDEMA, CORE, CORE)),
        (NONE, (0, 1, 2, 4), (0, CORE, EDEMA, CORE)),
        (NONE, (0, 1), (0, EDEMA)),
    ],
)
def test_brain_labels_are_mapped_to_edema_and_core(tmp_path, names, codes, expected):
    label = np.resize(np.array(codes, np.uint8), (3, 4, 5))
    meta = {"labels": names} if names else {}
    case = write_brain(tmp_path, np.ones((3, 4, 5, 4)), label, **meta)
    assert (case.name, case.patient) == ("B_1", "B_1")
    read = data.read_label(case)
    assert same(labels_of(read), np.resize(np.array(expected, np.uint8), label.shape))
    assert np.array_equal(read.affine, RAS_1MM)


@pytest.mark.parametrize(
    "modality,t2w,flair",
    [
        ({"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}, 3, 0),  # MSD
        ({"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}, 2, 3),
        ({"0": "t2w", "1": "flair"}, 0, 1),
        (NONE, 3, 0),
    ],
)
def test_t2w_is_the_first_channel_and_flair_the_second(tmp_path, modality, t2w, flair):
    image = 1 + np.random.default_rng(0).random((4, 4, 4, 4))
    meta = {"modality": modality} if modality else {}
    case = write_brain(tmp_path, image, np.zeros((4, 4, 4), np.uint8), **meta)
    assert case.channels == (t2w, flair)
    read, affine, box = data.load_images(case, BRAIN_PREPROCESSING)
    expected = np.moveaxis(image[..., [t2w, flair]], -1, 0)
    mean, sd = (f(expected, axis=(1, 2, 3), keepdims=True) for f in (np.mean, np.std))
    assert np.allclose(read, (expected - mean) / sd, atol=1e-5)
    assert np.array_equal(affine, RAS_1MM) and box == (slice(0, 4),) * 3


def test_a_brain_may_be_one_file_or_two(tmp_path):
    image = np.random.default_rng(0).random((4, 5, 6, 4)).astype(np.float32)
    one = write_brain(tmp_path, image, np.zeros((4, 5, 6), np.uint8))
    t2w = save(tmp_path / "t2w.nii.gz", image[..., 3], RAS_1MM)
    flair = save(tmp_path / "flair.nii.gz", image[..., 0], RAS_1MM)
    two = data.Case("B", "B", (t2w, flair), None)
    a, b = (data.load_images(case, BRAIN_PREPROCESSING) for case in (one, two))
    assert same(a[:2], b[:2]) and a[2] == b[2]
    save(flair, image[:-1, ..., 0], RAS_1MM)
    with refused("t2w.nii.gz", "flair.nii.gz", "not on one grid"):
        data.load_images(two, BRAIN_PREPROCESSING)


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "",
        "[]",
        "null",
        "3",
        "{}",
        '{"training": null}',
        '{"training": [1]}',
        '{"training": ["a.nii.gz"]}',
        '{"training": []}',
        '{"training": [{"image": "a.nii.gz"}]}',
        "\x80\x04",  # how a pickle starts
        json.dumps({"training": TRAINING, "modality": ["FLAIR", "T2w"]}),
        json.dumps({"training": TRAINING, "modality": {"0": "CT", "1": "PET"}}),
        json.dumps({"training": TRAINING, "labels": {"background": "nothing", "edema": "1"}}),
        json.dumps({"training": TRAINING, "labels": {"background": 0, "edema": 1.5}}),
    ],
)
def test_an_invalid_dataset_json_is_named_in_the_error(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text, encoding="latin-1")
    with refused(tmp_path / "dataset.json"):
        data.find_brain(tmp_path)


@pytest.mark.parametrize("root,words", [("empty", "dataset.json"), ("a_file", "no such folder")])
def test_a_missing_dataset_json_is_an_error(tmp_path, root, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").write_text("")
    with refused(root, words):
        data.find_brain(tmp_path / root)


# --------------------------------------------------------------------------------- reading files
def test_unusable_files_are_named_in_the_error(tmp_path):
    noise = np.random.default_rng(0).random((20, 20, 20)).astype(np.float32)
    complete = save(tmp_path / "complete.nii.gz", noise)
    assert same(files.read_nifti(complete).get_fdata(dtype=np.float32), noise)
    cut, empty, text = (tmp_path / f"{name}.nii.gz" for name in ("cut", "empty", "text"))
    cut.write_bytes(complete.read_bytes()[: complete.stat().st_size // 2])
    empty.write_bytes(b"")
    text.write_text("this is not an image")
    for path in (cut, empty, text):
        with refused(path):
            files.read_nifti(path)
    with refused(tmp_path / "missing.nii.gz", "no such file"):
        files.read_nifti(tmp_path / "missing.nii.gz")


def test_images_of_another_dimension_are_refused(tmp_path):
    ones = np.ones((3, 4, 5), np.float32)
    with refused("4d.nii.gz", "(3, 4, 5, 2)"):
        files.read_nifti(save(tmp_path / "4d.nii.gz", np.stack([ones, ones], -1)))
    with refused("3d.nii.gz", "(3, 4, 5)"):
        files.read_nifti(save(tmp_path / "3d.nii.gz", ones), ndim=4)


@pytest.mark.parametrize("values", [[np.nan], [np.inf, -np.inf]])
def test_voxels_that_are_not_finite_are_counted_in_the_error(tmp_path, values):
    image = np.ones((3, 4, 5), np.float32)
    image.flat[: len(values)] = values
    with refused("image.nii.gz", f"{len(values)} voxels"):
        files.read_nifti(save(tmp_path / "image.nii.gz", image), air=None)


def test_an_error_without_a_message_still_names_the_file(tmp_path, monkeypatch):
    path = save(tmp_path / "a.nii.gz", np.ones((2, 2, 2), np.float32))

    def fail(*args):
        raise EOFError

    monkeypatch.setattr(files.gzip, "open", fail)
    for read in (files.read_nifti, files.read_header):
        with refused(path):
            read(path)


@pytest.mark.parametrize("values", [(0, 2), (0, 1, 2), (0, 1, -1), (0, 255), (0, 0.5), (0, 1.5)])
def test_petct_labels_other_than_0_and_1_are_refused(tmp_path, values):
    case = write_petct(tmp_path / "P", np.ones((2, 3, 4)))
    save(case.label, np.resize(np.array(values, np.float32), (2, 3, 4)))
    with refused(case.label, "[0, 1]", "--label-values", "--label-nonzero"):
        data.read_label(case)


@pytest.mark.parametrize("values", [(0, 5), (0, 1, 2, 3, 4), (0, -1), (0, 1, 2.5), (0, 1.5)])
def test_brain_labels_that_are_neither_msd_nor_brats_are_refused(tmp_path, values):
    label = np.resize(np.array(values, np.float32), (2, 3, 4))
    with refused(tmp_path / TRAINING[0]["label"], "dataset.json"):
        data.read_label(write_brain(tmp_path, np.ones((2, 3, 4, 4)), label))


def test_pet_in_becquerel_is_refused_but_a_hot_suv_is_not(tmp_path):
    suv = np.ones((10, 10, 10))
    suv[5, 5, 4:7] = 400  # a bladder: 3 of 1000 voxels
    data.preprocess(write_petct(tmp_path / "suv", suv), PETCT_PREPROCESSING)
    case = write_petct(tmp_path / "becquerel", suv * 5000)
    with refused(case.images[1], "Bq/ml", "SUV"):
        data.preprocess(case, PETCT_PREPROCESSING)


@pytest.mark.parametrize(
    "other",
    [
        dict(shape=(10, 10, 9)),
        dict(affine=make_affine(origin=(-30, 17, 250))),  # 1 mm away
        dict(affine=make_affine("LPS")),
        dict(affine=make_affine(tilt=1)),
        dict(affine=make_affine(spacing=(2, 2, 3.2))),
    ],
)
def test_a_truth_on_another_grid_is_refused(tmp_path, other):
    case = write_petct(tmp_path / "P", np.ones((10, 10, 10)))
    array = np.zeros(other.get("shape", (10, 10, 10)), np.float32)
    path = save(tmp_path / "P/SEG.nii.gz", array, other.get("affine"))
    with refused(path, tmp_path / "P/SUV.nii.gz"):
        data.preprocess(case, PETCT_PREPROCESSING)


def test_grids_that_drift_apart_along_an_axis_are_refused():
    """Spacings that differ by 0.009 mm are 400 x 0.009 = 3.6 mm apart at the 400th voxel."""
    zeros = np.zeros((401, 2, 2), np.uint8)
    a = nib.Nifti1Image(zeros, make_affine(spacing=(2.0, 2, 3)))
    b = nib.Nifti1Image(zeros, make_affine(spacing=(2.009, 2, 3)))
    with refused("a.nii", "b.nii"):
        files.same_grid(a, b, "a.nii", "b.nii")


@pytest.mark.parametrize("file", ["CTres.nii.gz", "SEG.nii.gz"])
def test_rounding_in_one_header_does_not_change_the_shape(tmp_path, file):
    """15 voxels of 1 mm are 7.5 of 2 mm: 1 mm would round to 8 voxels, and 0.99999 mm to 7."""
    ones = np.ones((15, 15, 15), np.float32)
    case = write_petct(tmp_path / "P", ones, affine=make_affine(spacing=(1, 1, 1)))
    save(tmp_path / "P" / file, ones, make_affine(spacing=(0.99999,) * 3))
    out = data.preprocess(case, Preprocessing(spacing=(2, 2, 2)))
    assert out["image"].shape[1:] == out["label"].shape == (8, 8, 8)


# ------------------------------------------------------------------------------------ resampling
@pytest.mark.parametrize("spacing", [(2, 2, 3), (0.7, 1.3, 4.1)])
@pytest.mark.parametrize("target", ["LAS", "RAS"])
@pytest.mark.parametrize(
    "codes,tilt",
    [("RAS", 0), ("LPS", 0), ("LAS", 0), ("PIR", 0), ("SLA", 0), ("LPS", 9), ("IRP", -7)],
)
def test_resampling_keeps_world_positions_and_the_field_of_view(codes, tilt, target, spacing):
    """Linear interpolation reproduces a linear function of the position, 2x - 3y + z/2, exactly."""
    weights = np.array((2, -3, 0.5))
    shape, old_spacing = (13, 17, 11), (1.9, 2.4, 3.1)
    affine = make_affine(codes, old_spacing, tilt=tilt)
    values = apply_affine(affine, np.indices(shape).reshape(3, -1).T) @ weights
    image = nib.Nifti1Image(values.reshape(shape).astype(np.float32), affine)
    new = to_grid(image, target, spacing)
    assert "".join(nib.aff2axcodes(new.affine)) == target
    assert voxel_sizes(new.affine) == pytest.approx(spacing, rel=1e-6)

    positions = apply_affine(new.affine, np.indices(new.shape).reshape(3, -1).T)  # mm
    voxels = apply_affine(np.linalg.inv(affine), positions)  # of the old grid
    inside = ((voxels >= 0) & (voxels <= np.array(shape) - 1)).all(1)
    assert inside.mean() > 0.5
    error = np.abs(new.get_fdata().reshape(-1) - positions @ weights)[inside].max()
    assert error < 1e-3  # float32 of numbers up to 300

    # The centers are the same, and each side is the same to half a new voxel.
    old_center = apply_affine(affine, (np.array(shape) - 1) / 2)
    new_center = apply_affine(new.affine, (np.array(new.shape) - 1) / 2)
    assert np.allclose(old_center, new_center, atol=1e-4)
    new_axis = nib.io_orientation(np.linalg.inv(new.affine) @ affine)[:, 0].astype(int)
    new_sides = np.array(new.shape) * spacing
    for axis, side in zip(new_axis, np.array(shape) * old_spacing):
        assert abs(new_sides[axis] - side) <= spacing[axis] / 2 + 1e-6


def test_an_image_on_the_right_grid_is_unchanged_to_the_last_bit():
    array = np.random.default_rng(0).random((5, 6, 7)).astype(np.float32)
    out = to_grid(nib.Nifti1Image(array, make_affine()), "LAS", (2, 2, 3))
    assert same(labels_of(out), array) and np.array_equal(out.affine, make_affine())
    flipped = to_grid(nib.Nifti1Image(array, make_affine("LPS")), "LAS", (2, 2, 3))
    assert same(labels_of(flipped), array[:, ::-1])
    # The first voxel was the last of six along P.
    assert np.allclose(flipped.affine[:3, 3], (-31, 17 - 5 * 2, 250))


def test_halving_the_spacing_by_hand():
    """The outer faces stay: voxels of 4 mm at 0, 4, 8 become voxels of 2 mm at -1, 1, ..., 9.

    Beyond the outer centers the edge values repeat.
    """
    line = np.array([0, 4, 8], np.float32).reshape(3, 1, 1)
    image = nib.Nifti1Image(line, make_affine("RAS", (4, 2, 2), origin=(0, 0, 0)))
    out = to_grid(image, "RAS", (2, 2, 2))
    assert out.get_fdata().ravel() == pytest.approx([0, 1, 3, 5, 7, 8])
    assert np.allclose(out.affine, [[2, 0, 0, -1], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])


def test_a_volume_thinner_than_a_new_voxel_becomes_one_voxel_thick():
    image = nib.Nifti1Image(np.full((9, 9, 1), 5, np.float32), RAS_1MM)
    out = to_grid(image, "RAS", (3, 3, 3))
    assert out.shape == (3, 3, 1) and (out.get_fdata() == 5).all()


# ----------------------------------------------------------------------------------- intensities
def test_intensity_windows_by_hand(tmp_path):
    hu = {-1000: 0, -100: 0, -12.5: 0.25, 75: 0.5, 162.5: 0.75, 250: 1, 3000: 1}
    suv = {0.9375: 0.0625, 3.75: 0.25, 7.5: 0.5, 11.25: 0.75, 15: 1, 40: 1}  # no 0: no crop
    arrays, expected = [], []
    for table in (hu, suv):
        arrays.append(np.resize(np.array([*table], np.float32), (6, 7, 8)))
        expected.append(np.resize(np.array([*table.values()], np.float16), (6, 7, 8)))
    out = data.preprocess(write_petct(tmp_path / "P", arrays[1], arrays[0]), PETCT_PREPROCESSING)
    assert same(out["image"], np.stack(expected))
    assert not out["label"].any() and out["label"].dtype == np.uint8
    assert out["foreground"].shape == (0, 3)


def test_other_windows_are_used_and_a_negative_suv_becomes_zero(tmp_path):
    suv = np.full((4, 4, 4), 5.0)
    suv[1, 1, 1] = -2
    case = write_petct(tmp_path / "P", suv, np.full((4, 4, 4), 100))
    out = data.preprocess(case, Preprocessing(ct_window=(0, 400), suv_window=(0, 10)))
    assert out["image"][:, 0, 0, 0].tolist() == [0.25, 0.5]
    assert out["image"][:, 1, 1, 1].tolist() == [0.25, 0]


def test_brain_channels_are_standardized_over_their_non_zero_voxels(tmp_path):
    image = np.zeros((4, 6, 8, 4))
    image[1:3, 1:5, 2:6] = (10, 5, 5, 1)
    image[1, 1:5, 2:6] = (30, 7, 9, 3)  # half of the brain: FLAIR 20 +- 10, T2w 2 +- 1
    case = write_brain(tmp_path, image, np.zeros((4, 6, 8), np.uint8))
    out = data.preprocess(case, BRAIN_PREPROCESSING)
    assert out["image"].shape == (2, 2, 4, 4)  # cropped to the brain
    assert (out["image"][:, 0] == 1).all() and (out["image"][:, 1] == -1).all()
    assert np.allclose(out["affine"][:3, 3] - RAS_1MM[:3, 3], (1, 1, 2))


@pytest.mark.parametrize("value", [0, 0.1, 1234.567, 1e6 / 3])
def test_a_constant_channel_becomes_zero(value):
    """Also if its values differ in the last bit, as after resampling: rounding is not scaled up."""
    channel = np.full((23, 29, 31), value, np.float32)
    for _ in range(2):
        out = data._z_score(channel)
        assert out.dtype == np.float32 and not out.any()
        channel[::2] = np.nextafter(channel[::2], np.float32(np.inf))


def test_too_few_channels_are_an_error(tmp_path):
    case = write_brain(tmp_path, np.ones((3, 3, 3, 2)), np.zeros((3, 3, 3), np.uint8))
    with refused(case.images[0], "2 channels"):
        data.preprocess(case, BRAIN_PREPROCESSING)


# ------------------------------------------------------------------------------- crop and labels
@pytest.mark.parametrize(
    "codes,spacing",  # the network's own, so that nothing is interpolated
    [("LAS", (2, 2, 3)), ("RAS", (2, 2, 3)), ("LPS", (2, 2, 3)), ("PIR", (2, 3, 2))],
)
def test_reorienting_and_cropping_keep_world_positions(tmp_path, codes, spacing):
    suv, seg = np.zeros((10, 11, 12)), np.zeros((10, 11, 12))
    suv[2:9, 3:7, 4:11] = 1
    suv[5, 4, 9] = 6  # the maximum
    marks = np.array([(2, 3, 4), (8, 6, 10), (5, 4, 9)])
    seg[tuple(marks.T)] = 1
    affine = make_affine(codes, spacing)
    case = write_petct(tmp_path / "P", suv, seg=seg, affine=affine)
    out = data.preprocess(case, PETCT_PREPROCESSING)
    assert sorted(out["image"].shape[1:]) == [4, 7, 7]
    found = apply_affine(out["affine"], np.argwhere(out["label"]))
    expected = apply_affine(affine, marks)
    assert np.allclose(sorted(map(tuple, found)), sorted(map(tuple, expected)), atol=1e-4)
    assert np.array_equal(out["foreground"], np.argwhere(out["label"]))
    hottest = np.unravel_index(out["image"][1].argmax(), out["label"].shape)
    assert np.allclose(apply_affine(out["affine"], hottest), expected[2], atol=1e-4)


@pytest.mark.parametrize("codes,tilt", [("LPS", 0), ("PIR", 0), ("RAS", 8)])
def test_resampling_keeps_the_position_and_volume_of_a_lesion(tmp_path, codes, tilt):
    spacing, center = (1.3, 1.7, 2.2), (32, 22, 23)
    affine = make_affine(codes, spacing, tilt=tilt)
    offsets = np.indices((60, 50, 44)) - np.reshape(center, (3, 1, 1, 1))
    offsets = offsets * np.reshape(spacing, (3, 1, 1, 1))  # mm
    suv = np.exp(-0.5 * ((offsets / 10) ** 2).sum(0))  # a Gaussian of 10 mm
    seg = suv > 0.35
    case = write_petct(tmp_path / "P", 10 * suv * (suv > 1e-3), seg=seg, affine=affine)
    out = data.preprocess(case, PETCT_PREPROCESSING)
    assert np.allclose(voxel_sizes(out["affine"]), (2, 2, 3))
    true_center = apply_affine(affine, center)
    shift = world_center(out["image"][1], out["affine"]) - true_center
    assert np.abs(shift).max() < 0.1  # mm
    shift = world_center(out["label"], out["affine"]) - true_center
    assert np.abs(shift).max() < 0.3  # mm; a mask is coarser
    volume = seg.sum() * np.prod(spacing)
    assert out["label"].sum() * 12 == pytest.approx(volume, rel=0.04)  # mm^3


def test_edema_and_core_keep_their_volumes_and_have_no_gap_between_them(tmp_path):
    distance = np.sqrt(sum((i - 15) ** 2 for i in np.indices((31, 31, 31))))
    label = np.select((distance < 6, distance < 11), (3, 1), 0).astype(np.uint8)  # core in edema
    affine = make_affine("LPS", (1.3,) * 3)
    image = np.ones((31, 31, 31, 4)) + label[..., None]
    case = write_brain(tmp_path, image, label, affine, labels=MSD)
    out = data.preprocess(case, BRAIN_PREPROCESSING)
    for code, file_code in ((EDEMA, 1), (CORE, 3)):
        volume = (label == file_code).sum() * 1.3**3
        assert (out["label"] == code).sum() == pytest.approx(volume, rel=0.04)
    tumor = out["label"] > 0
    assert np.array_equal(ndimage.binary_fill_holes(tumor), tumor)
    assert ndimage.label(tumor)[1] == 1
    assert len(out["foreground"]) == tumor.sum()


def test_the_whole_tumor_is_resampled_like_a_single_label(tmp_path):
    """Where edema, core and background meet, each may fill less than half of a voxel."""
    rng = np.random.default_rng(0)
    affine = make_affine("RAS", (1.3, 1.4, 1.7))
    label = rng.integers(0, 3, (20, 20, 20)).astype(np.uint8)
    case = write_brain(tmp_path, rng.random((20, 20, 20, 4)), label, affine)
    out = data.preprocess(case, BRAIN_PREPROCESSING)
    tumor = nib.Nifti1Image((label > 0).astype(np.float32), affine)
    soft = to_grid(tumor, "RAS", (1, 1, 1)).get_fdata()
    clear = np.abs(soft - 0.5) > 1e-4
    assert soft.shape == out["label"].shape and clear.mean() > 0.9
    assert np.array_equal((out["label"] > 0)[clear], (soft > 0.5)[clear])


def test_a_label_on_the_right_grid_is_unchanged(tmp_path):
    rng = np.random.default_rng(0)
    seg = rng.random((9, 8, 7)) < 0.3
    case = write_petct(tmp_path / "P", np.ones(seg.shape), seg=seg)
    assert np.array_equal(data.preprocess(case, PETCT_PREPROCESSING)["label"], seg)
    label = rng.choice(np.array((0, 1, 2, 4), np.uint8), (9, 8, 7))
    case = write_brain(tmp_path / "B", 1 + rng.random((9, 8, 7, 4)), label)
    meaning = np.array((0, CORE, EDEMA, 0, CORE), np.uint8)  # of BraTS's codes
    assert same(data.preprocess(case, BRAIN_PREPROCESSING)["label"], meaning[label])


def test_an_empty_pet_is_not_cropped(tmp_path):
    case = write_petct(tmp_path / "P", np.zeros((4, 5, 6)))
    out = data.preprocess(case, PETCT_PREPROCESSING)
    assert out["image"].shape == (2, 4, 5, 6) and np.allclose(out["affine"], make_affine())


def test_a_tumor_that_resampling_loses_still_counts(tmp_path):
    """`tumor` is about the file: it stratifies the folds and is the class of the patient."""
    seg = np.zeros((12, 12, 12))
    seg[4, 4, 4] = 1
    affine = make_affine(spacing=(1, 1, 1))
    case = write_petct(tmp_path / "P", np.ones(seg.shape), seg=seg, affine=affine)
    (cached,) = build_cache([case], tmp_path / "cache", Preprocessing(spacing=(4, 4, 4)))
    assert cached.tumor and not cached.array("label").any()


# ----------------------------------------------------------------------------------------- cache
@pytest.fixture
def studies(tmp_path):
    rng = np.random.default_rng(0)
    cases = []
    for i in range(3):  # the first without tumor
        suv = 0.1 + rng.random((6, 7, 8))
        seg = rng.random((6, 7, 8)) < 0.1 * i
        cases.append(write_petct(tmp_path / f"data/P{i}", suv, seg=seg))
    return cases


@pytest.fixture
def preprocessed(monkeypatch):
    """The names of the cases that were preprocessed in this process."""
    names = []
    preprocess = data.preprocess

    def recorded(case, preprocessing):
        names.append(case.name)
        return preprocess(case, preprocessing)

    monkeypatch.setattr(data, "preprocess", recorded)
    return names


def arrays(case: CachedCase) -> dict:
    return {name: np.array(case.array(name)) for name in ("image", "label", "foreground")}


def test_the_cache_holds_what_preprocess_returns(studies, tmp_path):
    cached = build_cache(studies, tmp_path / "new/cache")
    for case, entry in zip(studies, cached, strict=True):
        expected = data.preprocess(case, PETCT_PREPROCESSING)
        assert np.array_equal(entry.affine, expected["affine"])
        assert same(arrays(entry), {name: expected[name] for name in arrays(entry)})
        assert (entry.name, entry.patient, entry.case) == (case.name, case.patient, case)
    assert [entry.tumor for entry in cached] == [False, True, True]


def test_several_processes_build_the_same_cache_and_report_the_same_error(studies, tmp_path):
    one = data.build_cache(studies, PETCT_PREPROCESSING, tmp_path / "one", workers=1)
    two = data.build_cache(studies, PETCT_PREPROCESSING, tmp_path / "two", workers=2)
    for a, b in zip(one, two, strict=True):
        assert same(arrays(a), arrays(b)) and np.array_equal(a.affine, b.affine)
    studies[1].label.write_bytes(b"broken")
    with refused(studies[1].label):
        data.build_cache(studies, PETCT_PREPROCESSING, tmp_path / "three", workers=2)


def test_a_case_is_preprocessed_again_only_if_a_file_or_the_preprocessing_changed(
    studies, tmp_path, preprocessed
):
    def build(preprocessing=PETCT_PREPROCESSING, cases=studies):
        preprocessed.clear()
        return build_cache(cases, tmp_path / "cache", preprocessing)

    build()
    assert preprocessed == ["P0", "P1", "P2"]
    build()
    assert preprocessed == []
    os.utime(studies[2].images[0], ns=(1, 1))
    build()
    assert preprocessed == ["P2"]
    save(studies[0].label, np.ones((6, 7, 8), np.uint8))
    assert build()[0].array("label").all() and preprocessed == ["P0"]
    for changed in (
        Preprocessing(spacing=(4, 4, 4)),
        Preprocessing(ct_window=(0, 1)),
        Preprocessing(suv_window=(0, 1)),
        Preprocessing(orientation="RAS"),
    ):
        build(changed)
        assert preprocessed == ["P0", "P1", "P2"]
    build(cases=studies[::-1])
    assert preprocessed == []


def test_another_meaning_of_the_brain_labels_is_another_entry(tmp_path):
    label = np.resize(np.array([0, 1, 2], np.uint8), (3, 3, 3))
    found = []
    for names in ({"1": "edema", "2": "core"}, {"1": "core", "2": "edema"}):
        case = write_brain(tmp_path / "B", np.ones((3, 3, 3, 4)), label, labels=names)
        for path in case.files():
            os.utime(path, ns=(1, 1))  # the files do not change, only the names
        (cached,) = build_cache([case], tmp_path / "cache", BRAIN_PREPROCESSING)
        found.append(cached.array("label"))
    assert np.array_equal(found[0], label)
    assert np.array_equal(found[1], np.array([0, 2, 1])[label])


@pytest.mark.parametrize("when", [1, 2, 3, "case.json", "rename"])
def test_a_cache_entry_is_written_atomically(studies, tmp_path, monkeypatch, when):
    """Stop in the middle of the first, second or third array, at case.json, and at the rename."""
    calls = []
    save_array = np.save

    def stop(*args, **kwargs):
        raise KeyboardInterrupt("stopped")

    def save_until(path, array):
        calls.append(path)
        if len(calls) == when:
            Path(path).write_bytes(b"half")
            stop()
        save_array(path, array)

    if when == "case.json":
        monkeypatch.setattr(Path, "write_text", stop)
    elif when == "rename":
        for owner, name in ((Path, "rename"), (os, "rename"), (os, "replace")):
            monkeypatch.setattr(owner, name, stop)
    else:
        monkeypatch.setattr(np, "save", save_until)
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        build_cache(studies, tmp_path / "cache")
    monkeypatch.undo()
    for case in studies:
        entry = f"{case.name}-{data._fingerprint(case, PETCT_PREPROCESSING)}"
        assert not (tmp_path / "cache" / entry).exists()
    again = build_cache(studies, tmp_path / "cache")
    clean = build_cache(studies, tmp_path / "clean")
    for a, b in zip(again, clean, strict=True):
        assert same(arrays(a), arrays(b))


def test_two_processes_may_write_the_same_entry(studies, tmp_path):
    job = (studies[1], PETCT_PREPROCESSING, tmp_path / "cache/P1-x")
    for _ in range(2):  # the second finds the entry of the first
        data._cache_one(job)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["P1-x"]
    names = sorted(path.name for path in (tmp_path / "cache/P1-x").iterdir())
    assert names == ["case.json", "foreground.npy", "image.npy", "label.npy"]


def test_arrays_are_memory_mapped_and_not_pickled(studies, tmp_path):
    case = build_cache(studies, tmp_path / "cache")[1]
    dtypes = {"image": np.float16, "label": np.uint8, "foreground": np.int16}
    for name, dtype in dtypes.items():
        array = case.array(name)
        assert isinstance(array, np.memmap) and array.dtype == dtype
        assert array.flags.c_contiguous
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    assert case.array("image").nbytes == 2 * 2 * 6 * 7 * 8
    sent = pickle.dumps(case)
    assert len(sent) < 2000
    assert same(arrays(pickle.loads(sent)), arrays(case))


def test_duplicate_cases_are_refused(studies, tmp_path):
    with refused("P1", "twice"):
        build_cache([*studies, studies[1]], tmp_path / "cache")
    image = np.asarray(nib.load(studies[1].images[1]).dataobj)
    copy = write_petct(tmp_path / "data/copy", image)
    for source, target in zip(studies[1].files(), copy.files()):
        target.write_bytes(source.read_bytes())
    with refused("two names", studies[1].images[1], copy.images[1]):
        build_cache([*studies, copy], tmp_path / "cache")


# ----------------------------------------------------------------------------------------- folds
def patient_case(name, patient=None, tumor=True):
    """What make_folds and read_splits need of a case."""
    return SimpleNamespace(name=name, patient=patient or name, tumor=tumor)


def random_cases(rng) -> list:
    """5 to 39 patients with 1 to 3 studies; about half have a tumor, in their first study."""
    cases = []
    for i in range(rng.integers(5, 40)):
        positive = rng.random() < 0.5
        for study in range(rng.integers(1, 4)):
            tumor = bool(positive and (study == 0 or rng.random() < 0.5))
            cases.append(patient_case(f"p{i}_{study}", f"p{i}", tumor))
    return cases


@pytest.mark.parametrize("seed", range(20))
def test_folds_keep_patients_together_and_are_stratified_by_tumor(seed):
    rng = np.random.default_rng(seed)
    cases = random_cases(rng)
    k = int(rng.integers(2, 6))
    patient_of = {case.name: case.patient for case in cases}
    folds = data.make_folds(cases, k, seed)
    assert len(folds) == k and all(fold.keys() == {"train", "val"} for fold in folds)
    assert sorted(name for fold in folds for name in fold["val"]) == sorted(patient_of)
    held_out = []
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == sorted(patient_of)
        train, val = ({patient_of[name] for name in fold[side]} for side in ("train", "val"))
        assert not train & val
        held_out.append(val)
    positive = {case.patient for case in cases if case.tumor}
    for group in (held_out, [p & positive for p in held_out], [p - positive for p in held_out]):
        sizes = [len(patients) for patients in group]
        assert max(sizes) - min(sizes) <= 1
    shuffled = [cases[i] for i in rng.permutation(len(cases))]
    assert folds == data.make_folds(shuffled, k, seed)
    assert json.loads(json.dumps(folds)) == folds


def test_another_seed_gives_other_folds():
    cases = [patient_case(f"p{i:02d}", tumor=i % 3 > 0) for i in range(30)]
    assert len({json.dumps(data.make_folds(cases, 5, seed)) for seed in range(20)}) == 20


@pytest.mark.parametrize("k", [0, 1, 4])
def test_the_number_of_folds_lies_between_two_and_the_number_of_patients(k):
    cases = [patient_case(f"p{i}_{j}", f"p{i}") for i in range(3) for j in range(2)]
    with refused(k, "3 patient"):
        data.make_folds(cases, k)


CASES = [patient_case(f"{patient}_1", patient) for patient in "abcd"] + [patient_case("a_2", "a")]


def write_and_read_splits(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return data.read_splits(path, CASES)


@pytest.mark.parametrize(
    "train,val,expected_train,expected_val",
    [
        (["c_1", "a_1", "a_2"], ["b_1"], ["a_1", "a_2", "c_1"], ["b_1"]),
        (["a", "c_1"], ["b", "d"], ["a_1", "a_2", "c_1"], ["b_1", "d_1"]),
        (["a", "a_1"], ["b"], ["a_1", "a_2"], ["b_1"]),  # each case once
    ],
)
def test_splits_name_cases_or_patients(tmp_path, train, val, expected_train, expected_val):
    other = {"train": ["b_1"], "val": ["a_2"]}
    read = write_and_read_splits(tmp_path / "s.json", [{"train": train, "val": val}, other])
    assert read == [{"train": expected_train, "val": expected_val}, other]


def test_read_splits_reads_what_make_folds_returns(tmp_path):
    folds = data.make_folds(CASES, 4)
    assert write_and_read_splits(tmp_path / "splits.json", folds) == folds


@pytest.mark.parametrize(
    "content,words",
    [
        ([{"train": ["a_1", "b_1"], "val": ["a_2"]}], "['a'] in training and validation"),
        ([{"train": ["a", "b"], "val": ["b_1"]}], "['b'] in training and validation"),
        ([{"train": ["a"], "val": ["b"]}, {"train": ["c"], "val": ["c"]}], "fold 1"),
        ([{"train": ["a", "nobody"], "val": ["b"]}], "nobody"),
        ([{"train": ["a", 7], "val": ["b"]}], "['7']"),
        ([{"train": [["a"]], "val": ["b"]}], "does not hold"),
        ([{"train": ["a"], "val": []}], "fold 0 has an empty side"),
        ([{"train": [], "val": ["a"]}], "fold 0 has an empty side"),
        ([{"train": ["a"]}], "'val'"),
        ([{"train": "a", "val": None}], "expected a JSON list"),
        ({"train": ["a"], "val": ["b"]}, "expected a JSON list"),
        ([["a"], ["b"]], "expected a JSON list"),
        ([1], "expected a JSON list"),
        (None, "expected a JSON list"),
        ([], "no folds"),
        ("not json", "expected a JSON list"),
        ("", "expected a JSON list"),
    ],
)
def test_splits_that_leak_or_are_invalid_are_refused(tmp_path, content, words):
    with refused(tmp_path / "splits.json", words):
        write_and_read_splits(tmp_path / "splits.json", content)


def test_a_missing_or_pickled_splits_file_is_refused(tmp_path):
    with refused("none.json", "no such file"):
        data.read_splits(tmp_path / "none.json", CASES)
    path = tmp_path / "splits_final.pkl"  # the form of nnU-Net v1
    path.write_bytes(pickle.dumps([{"train": ["a"], "val": ["b"]}]))
    with refused(path, "expected a JSON list"):
        data.read_splits(path, CASES)


# ------------------------------------------------------------------------------------- real data
def test_the_splits_of_the_real_sarcoma_studies(real_petct):
    cases = data.find_petct(real_petct)
    folds = data.read_splits(real_petct / "splits.json", cases)
    names = [f"STS_{n:03d}" for n in (1, 7, 13, 20, 26, 32, 39, 45)]
    assert len(cases) == 40 and len(folds) == 5 and folds[0]["val"] == names
    assert sorted(name for fold in folds for name in fold["val"]) == [case.name for case in cases]
    assert all(len(fold["train"]) == 32 and len(fold["val"]) == 8 for fold in folds)


def test_a_real_petct_study_is_preprocessed(real_petct, tmp_path):
    case = next(c for c in data.find_petct(real_petct) if c.name == "STS_002")
    (cached,) = build_cache([case], tmp_path)
    image, label = cached.array("image"), cached.array("label")
    assert cached.tumor and cached.patient == "STS_002" and image.shape == (2, *label.shape)
    assert nib.aff2axcodes(cached.affine) == ("L", "A", "S")
    assert np.allclose(voxel_sizes(cached.affine), (2, 2, 3))
    assert image.min() == 0 and image.max() <= 1 and 0.1 < image[0].mean() < 0.6
    file = nib.load(case.label)
    truth = file.get_fdata()
    volume = truth.sum() * np.prod(voxel_sizes(file.affine))
    assert label.sum() * 12 == pytest.approx(volume, rel=0.04)  # mm^3
    shift = world_center(label, cached.affine) - world_center(truth, file.affine)
    assert np.abs(shift).max() < 0.2  # mm
    item = PatchDataset([cached], (96, 96, 96), 1, foreground_fraction=1)[0]
    assert item["image"].shape == (2, 96, 96, 96)  # larger than the study along an axis
    assert item["label"].sum() == label.sum()


@pytest.mark.slow
def test_a_real_brain_case_is_preprocessed(real_brain):
    (case,) = data.find_brain(real_brain)
    assert case.channels == (3, 0)
    assert dict(case.roles) == {1: "edema", 2: "core", 3: "core"}
    out = data.preprocess(case, BRAIN_PREPROCESSING)
    image, label = out["image"].astype(np.float32), out["label"]
    truth = labels_of(nib.load(case.label))
    assert nib.aff2axcodes(out["affine"]) == ("R", "A", "S")
    assert max(label.shape) < 240  # cropped
    assert (label == EDEMA).sum() == (truth == 1).sum()
    assert (label == CORE).sum() == (truth > 1).sum()
    for channel in image:
        values = channel[channel != 0]
        assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    t2w, flair = image
    assert flair[label == EDEMA].mean() > 1 and t2w[label == CORE].mean() > 0.5  # both are bright
