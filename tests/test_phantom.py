"""The synthetic studies: reproducible, hard for a threshold, and in the layouts of the real data sets."""

import json
import os

import nibabel as nib
import numpy as np
import pytest

import phantom

SMALL = (8.0, 8.0, 8.0)  # mm: an eighth of the voxels, where only the plumbing is tested


@pytest.fixture(scope="module")
def studies():
    return [phantom.petct_study(index) for index in range(8)]


def ml(study) -> float:
    return float(study.seg.sum() * abs(np.linalg.det(study.affine[:3, :3])) / 1000)


def equal(a, b) -> bool:
    return all(np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y for x, y in zip(a, b))


@pytest.mark.parametrize("make", [phantom.petct_study, phantom.brain_study])
def test_a_study_is_a_function_of_seed_and_index(make):
    study = make(3, seed=1)
    assert equal(study, make(3, seed=1))
    for other in (make(3, seed=2), make(4, seed=1)):
        assert study[0].shape != other[0].shape or not np.array_equal(study[0], other[0])


def test_petct_arrays_and_units(studies):
    for s in studies:
        assert s.ct.shape == s.suv.shape == s.seg.shape and 1.2e6 < s.ct.size < 1.7e6
        assert (s.ct.dtype, s.suv.dtype, s.seg.dtype) == (np.float32, np.float32, np.uint8)
        assert nib.aff2axcodes(s.affine) == ("L", "A", "S") and np.allclose(nib.affines.voxel_sizes(s.affine), 4)
        assert s.ct.min() >= -1024 and 700 < s.ct.max() < 1200
        assert -1010 < np.median(s.ct[:4]) < -990  # air at the edge of the image
        assert s.suv.min() >= 0 and 6 < s.suv.max() < 40
        body = s.ct > -200
        assert 0.2 < np.median(s.suv[body]) < 0.8  # soft tissue
        assert 1 < ((s.suv > 5) & body).sum() * 0.064 / 1000 < 3  # litres that shine: most of them brain
        assert set(np.unique(s.seg)) <= {0, 1} and (s.ct[s.seg > 0] > -50).sum() >= 0.8 * s.seg.sum()


def test_a_third_of_the_patients_is_healthy_and_only_they_have_no_lesion():
    ill = {}
    for index in range(24):
        s = phantom.petct_study(index, spacing=SMALL)
        assert ill.setdefault(s.patient, bool(s.seg.any())) == bool(s.seg.any())  # the visits of a patient agree
        if s.seg.any():
            assert ml(s) > 15
    ill = list(ill.values())  # 24 studies are 18 patients
    assert len(ill) == 18 and sum(ill) == 12
    assert all(0 < sum(ill[k : k + 5]) < 5 for k in range(len(ill) - 4))
    assert not phantom.petct_study(0, spacing=SMALL, healthy=True).seg.any()
    assert phantom.petct_study(0, spacing=SMALL, healthy=False).seg.any()


def test_no_suv_threshold_finds_the_tumors(studies):
    # 16 studies, since the best threshold of a handful of patients flatters itself
    more = (phantom.petct_study(index) for index in range(8, 16))
    ill = [s for s in (*studies, *more) if s.seg.any()]
    dice = [
        np.mean([2 * ((s.suv > t) & (s.seg > 0)).sum() / ((s.suv > t).sum() + s.seg.sum()) for s in ill]) for t in np.arange(2, 15, 0.5)
    ]
    assert max(dice) < 0.35
    assert all(s.suv[s.seg > 0].mean() > 2 * np.median(s.suv[s.ct > -200]) for s in ill)  # and yet they are hot


def test_brain_labels_and_contrast():
    for index in range(4):
        s = phantom.brain_study(index)
        assert s.image.shape == (*s.seg.shape, 4) and s.image.dtype == np.float32 and s.seg.dtype == np.uint8
        assert nib.aff2axcodes(s.affine) == ("R", "A", "S")
        brain = (s.image > 0).all(-1)
        assert np.array_equal(brain, (s.image > 0).any(-1)) and not s.seg[~brain].any()
        assert set(np.unique(s.seg)) == {0, 1, 2, 3} and ml(s) > 30
        median = np.array([np.median(s.image[brain & (s.seg == label)], axis=0) for label in range(4)])
        flair, _, t1gd, t2w = median.T
        assert flair.argmax() == 1 and t2w[2] > t2w[1] > t2w[0] and t1gd.argmax() == 3


def test_petct_on_disk(tmp_path):
    folders = phantom.write_petct(tmp_path, 4, seed=5, spacing=SMALL)
    assert len(set(folders)) == 4 and folders[2].parent == folders[3].parent  # two visits of one patient
    assert len({folder.parent for folder in folders}) == 3
    for index, folder in enumerate(folders):
        s = phantom.petct_study(index, 5, SMALL)
        assert folder == tmp_path / s.patient / f"visit{2 if index == 3 else 1}" and s.name == f"{s.patient}_{folder.name}"
        assert sorted(p.name for p in folder.iterdir()) == ["CTres.nii.gz", "SEG.nii.gz", "SUV.nii.gz"]
        for file, array in (("CTres", s.ct), ("SUV", s.suv), ("SEG", s.seg)):
            image = nib.load(folder / f"{file}.nii.gz")
            assert np.array_equal(image.get_fdata(), array) and np.allclose(image.affine, s.affine)
        assert nib.load(folder / "CTres.nii.gz").get_data_dtype() == np.int16


def test_brain_on_disk(tmp_path):
    root = phantom.write_brain(tmp_path / "Task01", 2, spacing=(4.0, 4.0, 4.0))
    content = json.loads((root / "dataset.json").read_text())
    assert content["numTraining"] == len(content["training"]) == 2 and content["modality"]["2"] == "t1gd"
    for index, pair in enumerate(content["training"]):
        s = phantom.brain_study(index, spacing=(4.0, 4.0, 4.0))
        image, label = nib.load(root / pair["image"]), nib.load(root / pair["label"])
        assert np.array_equal(image.get_fdata(), s.image) and np.array_equal(label.get_fdata(), s.seg)
        assert np.allclose(image.affine, s.affine) and np.allclose(label.affine, s.affine)


def test_writing_again_keeps_the_files_and_refuses_others(tmp_path):
    files = {p: p.stat().st_mtime_ns for f in phantom.write_petct(tmp_path, 2, spacing=SMALL) for p in f.iterdir()}
    phantom.write_petct(tmp_path, 2, spacing=SMALL)
    assert files == {p: p.stat().st_mtime_ns for p in files}
    with pytest.raises(ValueError, match="seed 0.*choose another folder"):
        phantom.write_petct(tmp_path, 2, seed=1, spacing=SMALL)


def test_an_interrupted_write_leaves_no_half_file(tmp_path, monkeypatch):
    done, replace = [], os.replace

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
    assert np.array_equal(nib.load(folder / "SEG.nii.gz").get_fdata(), phantom.petct_study(0, spacing=SMALL).seg)
