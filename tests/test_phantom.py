"""The synthetic studies: reproducible, hard for a threshold, in the layouts of the real data."""

import json
import os

import nibabel as nib
import numpy as np
import pytest

import files
import phantom
from files import UserError

SMALL = (8.0, 8.0, 8.0)  # mm: an eighth of the voxels, for tests of everything but the anatomy


@pytest.fixture(scope="module")
def studies():
    return [phantom.petct_study(index) for index in range(8)]


def volume_ml(study) -> float:
    voxel = abs(np.linalg.det(study.affine[:3, :3]))  # mm^3
    return float(study.seg.sum() * voxel / 1000)


def equal(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("make", [phantom.petct_study, phantom.brain_study])
@pytest.mark.slow
def test_a_study_is_a_function_of_seed_and_index(make):
    study = make(3, seed=1)
    assert equal(study, make(3, seed=1))
    for other in (make(3, seed=2), make(4, seed=1)):
        assert study[0].shape != other[0].shape or not np.array_equal(study[0], other[0])


def test_petct_arrays_and_units(studies):
    for s in studies:
        assert s.ct.shape == s.suv.shape == s.seg.shape
        assert 1.2e6 < s.ct.size < 1.7e6
        assert (s.ct.dtype, s.suv.dtype, s.seg.dtype) == (np.float32, np.float32, np.uint8)
        assert nib.aff2axcodes(s.affine) == ("L", "A", "S")
        assert np.allclose(nib.affines.voxel_sizes(s.affine), 4)
        assert s.ct.min() >= -1024 and 700 < s.ct.max() < 1200
        assert -1010 < np.median(s.ct[:4]) < -990  # air at the edge of the image
        assert s.suv.min() >= 0 and 6 < s.suv.max() < 40
        body = s.ct > -200
        assert 0.2 < np.median(s.suv[body]) < 0.8  # soft tissue
        litres = ((s.suv > 5) & body).sum() * 0.064 / 1000
        assert 1 < litres < 3  # most of the bright voxels are brain
        assert set(np.unique(s.seg)) <= {0, 1}
        assert (s.ct[s.seg > 0] > -50).sum() >= 0.8 * s.seg.sum()


@pytest.mark.slow
def test_a_third_of_the_patients_has_no_tumor():
    has_tumor = {}
    for index in range(24):
        s = phantom.petct_study(index, spacing=SMALL)
        found = bool(s.seg.any())
        assert has_tumor.setdefault(s.patient, found) == found  # a patient's visits agree
        if found:
            assert volume_ml(s) > 15
    drawn = list(has_tumor.values())  # 24 studies are 18 patients
    assert len(drawn) == 18 and sum(drawn) == 12
    assert all(0 < sum(drawn[k : k + 5]) < 5 for k in range(len(drawn) - 4))


@pytest.mark.parametrize("has_tumor", [True, False])
def test_a_study_with_or_without_tumor_can_be_asked_for(has_tumor):
    study = phantom.petct_study(0, spacing=SMALL, has_tumor=has_tumor)
    assert study.seg.any() == has_tumor


@pytest.mark.slow
def test_no_suv_threshold_finds_the_tumors(studies):
    # 16 studies, since the best threshold for a handful of patients looks too good
    more = [phantom.petct_study(index) for index in range(8, 16)]
    positive = [s for s in (*studies, *more) if s.seg.any()]

    def dice(study, threshold: float) -> float:
        hot = study.suv > threshold
        overlap = (hot & (study.seg > 0)).sum()
        return 2 * overlap / (hot.sum() + study.seg.sum())

    for threshold in np.arange(2, 15, 0.5):
        assert np.mean([dice(s, threshold) for s in positive]) < 0.35
    for s in positive:  # although the tumors are hot
        assert s.suv[s.seg > 0].mean() > 2 * np.median(s.suv[s.ct > -200])


def test_brain_labels_and_contrast():
    for index in range(4):
        s = phantom.brain_study(index)
        assert s.image.shape == (*s.seg.shape, 4)
        assert (s.image.dtype, s.seg.dtype) == (np.float32, np.uint8)
        assert nib.aff2axcodes(s.affine) == ("R", "A", "S")
        brain = (s.image > 0).all(-1)
        assert np.array_equal(brain, (s.image > 0).any(-1))
        assert not s.seg[~brain].any()
        assert set(np.unique(s.seg)) == {0, 1, 2, 3} and volume_ml(s) > 30
        median = [np.median(s.image[brain & (s.seg == label)], axis=0) for label in range(4)]
        flair, _, t1gd, t2w = np.array(median).T
        assert flair.argmax() == 1  # edema
        assert t2w[2] > t2w[1] > t2w[0]  # core, edema, normal brain
        assert t1gd.argmax() == 3  # the enhancing rim


def test_petct_files(tmp_path):
    folders = phantom.write_petct(tmp_path, 4, seed=5, spacing=SMALL)
    visits = ["visit1", "visit1", "visit1", "visit2"]  # the last two belong to one patient
    assert [folder.name for folder in folders] == visits
    for index, folder in enumerate(folders):
        s = phantom.petct_study(index, 5, SMALL)
        assert folder == tmp_path / s.patient / visits[index]
        assert s.name == f"{s.patient}_{folder.name}"
        files = sorted(p.name for p in folder.iterdir())
        assert files == ["CTres.nii.gz", "SEG.nii.gz", "SUV.nii.gz"]
        for file, array in (("CTres", s.ct), ("SUV", s.suv), ("SEG", s.seg)):
            image = nib.load(folder / f"{file}.nii.gz")
            assert np.array_equal(image.get_fdata(), array)
            assert np.allclose(image.affine, s.affine)
        assert nib.load(folder / "CTres.nii.gz").get_data_dtype() == np.int16
    assert folders[2].parent == folders[3].parent
    assert len({folder.parent for folder in folders}) == 3


def test_brain_files(tmp_path):
    root = phantom.write_brain(tmp_path / "Task01", 2, spacing=(4.0, 4.0, 4.0))
    content = json.loads((root / "dataset.json").read_text())
    assert content["numTraining"] == len(content["training"]) == 2
    assert content["modality"]["2"] == "t1gd"
    for index, pair in enumerate(content["training"]):
        s = phantom.brain_study(index, spacing=(4.0, 4.0, 4.0))
        for file, array in (("image", s.image), ("label", s.seg)):
            written = nib.load(root / pair[file])
            assert np.array_equal(written.get_fdata(), array)
            assert np.allclose(written.affine, s.affine)


def test_writing_again_keeps_the_files_and_refuses_another_seed(tmp_path):
    folders = phantom.write_petct(tmp_path, 2, spacing=SMALL)
    times = {p: p.stat().st_mtime_ns for f in folders for p in f.iterdir()}
    phantom.write_petct(tmp_path, 2, spacing=SMALL)
    assert times == {p: p.stat().st_mtime_ns for p in times}
    with pytest.raises(ValueError, match="seed 0.*choose another folder"):
        phantom.write_petct(tmp_path, 2, seed=1, spacing=SMALL)


def test_an_interrupted_write_leaves_no_partial_file(tmp_path, monkeypatch):
    done = []
    replace = os.replace

    def stop(source, target):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        phantom.write_petct(tmp_path, 1, spacing=SMALL)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == done
    monkeypatch.undo()
    (folder,) = phantom.write_petct(tmp_path, 1, spacing=SMALL)  # the next run completes the study
    expected = phantom.petct_study(0, spacing=SMALL)
    assert np.array_equal(nib.load(folder / "SEG.nii.gz").get_fdata(), expected.seg)


# ----------------------------------------------------------------------------------- harder studies
def test_benign_foci_look_like_lesions_in_pet_and_not_in_ct():
    plain = phantom.petct_study(0, spacing=SMALL, has_tumor=True)
    hard = phantom.petct_study(0, spacing=SMALL, has_tumor=True, harder=phantom.Harder(uptake=8))
    assert np.array_equal(plain.seg, hard.seg)
    focus = hard.suv - plain.suv > 2.5
    assert focus.sum() > 30 and not (focus & (plain.seg > 0)).any()
    lesion = plain.seg > 0
    bright = [np.percentile(hard.suv[mask], 90) for mask in (focus, lesion)]
    assert 0.5 < bright[0] / bright[1] < 2
    assert np.median(hard.ct[focus]) < 20 < 45 < np.median(plain.ct[lesion])
    none = phantom.petct_study(0, spacing=SMALL, has_tumor=False, harder=phantom.Harder(uptake=8))
    assert not none.seg.any()


def test_the_noise_of_pet_is_multiplied():
    """The scanner is linear: noise of factor 3 differs from none by three times as much."""
    none, one, three = (
        phantom.petct_study(1, spacing=SMALL, harder=phantom.Harder(noise=n)) for n in (0, 1, 3)
    )
    assert np.array_equal(none.ct, three.ct)
    bright = (none.suv > 1.5) & (three.suv > 0)  # not clipped at 0
    once, thrice = (one.suv - none.suv)[bright], (three.suv - none.suv)[bright]
    assert 0.02 < once.std() < 0.5
    assert np.abs(thrice - 3 * once).max() < 4 / 512 + 1e-4  # values are rounded to 1/512


def test_breathing_shifts_the_ct_at_the_diaphragm_by_hand():
    """A CT whose HU is the slice's place, mm: 5 mm slices, shifted by up to 20 mm at z = 430."""
    z = np.arange(0, 900, 5.0)
    ct = np.broadcast_to(z.astype(np.float32), (2, 2, len(z)))
    rng = np.random.default_rng(3)
    shifted = phantom._breathe(ct, z, 20, rng)
    most = 20 * np.random.default_rng(3).uniform(-1, 1)
    assert shifted[0, 0, 86] == pytest.approx(430 + most, abs=0.01)
    assert shifted[0, 0, 64] == pytest.approx(320 + most / np.e, abs=0.01)  # 110 mm away
    assert np.abs(shifted[..., [1, -2]] - ct[..., [1, -2]]).max() < 0.01
    assert np.array_equal(phantom._breathe(ct, z, 0, rng), ct)


def test_breathing_leaves_pet_and_truth_where_they_are():
    plain = phantom.petct_study(2, spacing=SMALL)
    hard = phantom.petct_study(2, spacing=SMALL, harder=phantom.Harder(breathing=40))
    assert np.array_equal(plain.suv, hard.suv) and np.array_equal(plain.seg, hard.seg)
    moved = np.abs(plain.ct - hard.ct).mean((0, 1))
    around, legs = moved[45:60].mean(), moved[:8].mean()  # z = 430 mm is slice 53
    assert around > 20 and legs < 1


def test_harder_studies_have_a_folder_and_a_header_that_tell_them_apart(tmp_path):
    harder = phantom.Harder(3, 2.5, 12)
    assert str(harder) == "uptake 3, noise 2.5, breathing 12" and str(phantom.Harder()) == ""
    [folder] = phantom.write_petct(tmp_path, 1, spacing=SMALL, harder=harder)
    before = (folder / "SUV.nii.gz").read_bytes()
    phantom.write_petct(tmp_path, 1, spacing=SMALL, harder=harder)
    assert (folder / "SUV.nii.gz").read_bytes() == before
    with pytest.raises(UserError, match="uptake 3, noise 2.5, breathing 12', not 'phantom 1"):
        phantom.write_petct(tmp_path, 1, spacing=SMALL)


def test_what_a_killed_process_left_in_a_study_is_removed(tmp_path):
    (study,) = phantom.write_petct(tmp_path, 1, spacing=(20.0, 20.0, 20.0))
    with pytest.raises(KeyboardInterrupt):
        with files.atomic_write(study / "SUV.nii.gz") as part:
            part.write_bytes(b"half")
            left = part.rename(part.with_name(part.name.replace(str(os.getpid()), str(2**22 + 1))))
            raise KeyboardInterrupt
    (study / "SUV.nii.gz").unlink()
    phantom.write_petct(tmp_path, 1, spacing=(20.0, 20.0, 20.0))
    assert not left.exists()
    assert {p.name for p in study.iterdir()} == {"CTres.nii.gz", "SUV.nii.gz", "SEG.nii.gz"}
