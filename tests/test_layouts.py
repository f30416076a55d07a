"""Finding studies: every layout of docs/data.md, patients, label codes, names."""

import gzip
import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from test_data import refused

import data
import files
from files import UserError

EDEMA, CORE = 1, 2  # the codes of read_label
NUMBERS = itertools.count(1)


def save(path: Path, array=None) -> Path:
    """Write a small image; without an array, a constant one that differs from all others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if array is None:
        array = np.full((4, 5, 6), next(NUMBERS) / 1000, np.float32)
    image = nib.Nifti1Image(np.asarray(array), np.diag([-4.0, 4, 4, 1]))
    raw = image.to_bytes()
    path.write_bytes(gzip.compress(raw) if path.name.lower().endswith(".gz") else raw)
    return path


def touch(root: Path, names: Iterable[str]) -> None:
    for name in names:
        save(root / name)


def summary(root, task="petct", complete=True, **more):
    """Names, patients and the line of a folder's studies."""
    cases, line = data.find_cases(root, task, complete, **more)
    return [case.name for case in cases], [case.patient for case in cases], line


def labels_of(case) -> np.ndarray:
    return np.asarray(data.read_label(case).dataobj)


# ---------------------------------------------------------------------------------------- PET/CT
NNUNET = ["imagesTr/{}_0000.nii.gz", "imagesTr/{}_0001.nii.gz", "labelsTr/{}.nii.gz"]
FDG, PSMA = "fdg_0a1b_12-31-2001-NA-PET-CT", "psma_0c2d_2015-01-01"


def write_nnunet(root: Path, *names: str) -> None:
    touch(root, [path.format(name) for name in names for path in NNUNET])


def test_nnunet_raw_without_dataset_json(tmp_path):
    write_nnunet(tmp_path, FDG, PSMA, "fdg_0a1b_05-01-2003-NA-PET-CT")
    names, patients, line = summary(tmp_path)
    assert names == ["fdg_0a1b_05-01-2003-NA-PET-CT", FDG, PSMA]
    assert patients == ["fdg_0a1b", "fdg_0a1b", "psma_0c2d"]
    assert line == "nnU-Net layout: 3 studies of 2 patients"
    first = data.find_petct(tmp_path)[0]
    assert [path.name[-11:-7] for path in first.images] == ["0000", "0001"]
    assert first.label == tmp_path / f"labelsTr/{first.name}.nii.gz"


@pytest.mark.parametrize(
    "channels,ct,pet",
    [
        ({"channel_names": {"0": "CT", "1": "PET"}}, 0, 1),
        ({"channel_names": {"0": "PET", "1": "CT"}}, 1, 0),
        ({"channel_names": {"0": "CT", "1": "CT"}}, 0, 1),  # both normalized like CT
        ({"channel_names": {"0": "noNorm", "1": "noNorm"}}, 0, 1),
        ({"modality": {"0": "SUV", "1": "CT"}}, 1, 0),  # version 1
        ({}, 0, 1),
    ],
)
def test_nnunet_channels_are_taken_by_name(tmp_path, channels, ct, pet):
    write_nnunet(tmp_path, "A")
    (tmp_path / "dataset.json").write_text(json.dumps(channels))
    (case,) = data.find_petct(tmp_path)
    expected = [tmp_path / f"imagesTr/A_000{i}.nii.gz" for i in (ct, pet)]
    assert list(case.images) == expected


def test_nnunet_version_1_lists_images_without_their_channel(tmp_path):
    write_nnunet(tmp_path, "A", "B")
    pairs = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in "AB"]
    meta = {"modality": {"0": "CT", "1": "PET"}, "labels": {"0": "background", "1": "tumor"}}
    (tmp_path / "dataset.json").write_text(json.dumps(meta | {"training": pairs, "test": []}))
    assert summary(tmp_path)[0] == ["A", "B"]


def test_nnunet_endings_may_be_upper_case_and_uncompressed(tmp_path):
    touch(tmp_path, ["imagesTr/A_0000.nii", "imagesTr/A_0001.NII.GZ", "labelsTr/A.NII"])
    (case,) = data.find_petct(tmp_path)
    assert [p.name for p in case.files()] == ["A_0000.nii", "A_0001.NII.GZ", "A.NII"]
    for path in case.files():
        assert files.read_nifti(path).shape == (4, 5, 6)


def test_test_images_and_bare_folders_are_for_prediction_only(tmp_path):
    write_nnunet(tmp_path, "A")
    touch(tmp_path, ["imagesTs/T_0000.nii.gz", "imagesTs/T_0001.nii.gz", "imagesTs/U_0001.nii.gz"])
    assert summary(tmp_path)[0] == ["A"]
    assert summary(tmp_path, complete=False)[0] == ["A", "T", "U"]
    _, t, u = data.find_petct(tmp_path, complete=False)
    assert t.label is None and u.images == (None, tmp_path / "imagesTs/U_0001.nii.gz")
    names, _, line = summary(tmp_path / "imagesTs", complete=False)
    assert names == ["T", "U"] and line == "nnU-Net layout: 2 studies of 2 patients"
    with refused("labelsTs/T.nii.gz", "missing"):
        data.find_petct(tmp_path / "imagesTs")
    (inside,) = data.find_petct(tmp_path / "imagesTr")  # the folder itself: with its labels
    assert inside.label == tmp_path / "labelsTr/A.nii.gz"


def test_a_folder_of_test_images_uses_the_names_of_its_data_set(tmp_path):
    touch(tmp_path, ["imagesTs/T_0000.nii.gz", "imagesTs/T_0001.nii.gz"])
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "PET", "1": "CT"}}')
    (case,) = data.find_petct(tmp_path / "imagesTs", complete=False)
    assert case.images[1].name == "T_0000.nii.gz"


@pytest.mark.parametrize("missing", NNUNET)
def test_a_missing_file_of_nnunet_is_named(tmp_path, missing):
    write_nnunet(tmp_path, "A")
    (tmp_path / missing.format("A")).unlink()
    with refused(tmp_path / missing.format("A"), "missing"):
        data.find_petct(tmp_path)


def test_labels_with_numbers_at_their_end_are_not_taken_for_images(tmp_path):
    write_nnunet(tmp_path, "case_0000", "case_0001")
    assert summary(tmp_path)[0] == ["case_0000", "case_0001"]


def test_the_folds_of_a_data_set_are_found(tmp_path):
    assert data.find_splits(tmp_path) is None
    (tmp_path / "splits_final.json").write_text("[]")
    assert data.find_splits(tmp_path) == tmp_path / "splits_final.json"


def test_hecktor(tmp_path):
    touch(tmp_path, [f"imagesTr/CHUM-00{i}__{c}.nii.gz" for i in (1, 2) for c in ("CT", "PT")])
    touch(tmp_path, ["imagesTr/CHUM-001__RTDOSE.nii.gz"])
    for i in (1, 2):
        label = np.zeros((4, 5, 6), np.uint8)
        label[0, 0, :3] = 0, 1, 2
        save(tmp_path / f"labelsTr/CHUM-00{i}.nii.gz", label)
    names, _, line = summary(tmp_path)
    assert names == ["CHUM-001", "CHUM-002"]
    assert line == "HECKTOR layout: 2 studies of 2 patients"
    case = data.find_petct(tmp_path)[0]
    assert [p.name for p in case.images] == ["CHUM-001__CT.nii.gz", "CHUM-001__PT.nii.gz"]
    assert labels_of(case)[0, 0, :3].tolist() == [0, 1, 1]
    (one, _), _ = data.find_cases(tmp_path, "petct", label_values=(2,))
    assert labels_of(one)[0, 0, :3].tolist() == [0, 0, 1]


def test_hecktor_2025_has_a_folder_per_patient(tmp_path):
    folder = tmp_path / "Task 1/CHUM-001"
    touch(folder, ["CHUM-001__CT.nii.gz", "CHUM-001__PT.nii.gz", "CHUM-001.nii.gz"])
    (case,) = data.find_petct(tmp_path)
    assert (case.name, case.label) == ("CHUM-001", folder / "CHUM-001.nii.gz")


def test_autopet_endings_and_the_original_ct(tmp_path):
    touch(tmp_path, ["P1/S1/SUV.nii", "P1/S1/CTres.NII", "P1/S1/seg.nii.gz"])
    touch(tmp_path, ["P2/S1/SUV.NII.GZ", "P2/S1/CT.nii.gz", "P2/S1/SEG.nii.gz"])
    touch(tmp_path, ["P3/S1/SUV.nii", "P3/S1/SUV.nii.gz", "P3/S1/CTres.nii.gz", "P3/S1/SEG.nii"])
    touch(tmp_path, ["P3/S1/._SUV.nii.gz", "P3/S1/PET.nii.gz"])
    names, patients, line = summary(tmp_path)
    assert names == ["P1__S1", "P2__S1", "P3__S1"] and patients == ["P1", "P2", "P3"]
    assert line == "AutoPET layout: 3 studies of 3 patients"
    found = data.find_petct(tmp_path)
    assert found[0].label.name == "seg.nii.gz" and found[1].images[0].name == "CT.nii.gz"
    assert found[2].images[1].name == "SUV.nii.gz"


# ------------------------------------------------------------------------------------------ brain
def write_brats(root: Path, case: str, forms, codes=(0, 1, 2, 4)) -> None:
    for form in forms:
        label = np.resize(np.array(codes, np.uint8), (4, 5, 6)) if "seg" in form else None
        save(root / case / f"{case}{form}.nii.gz", label)


OLD = ("_flair", "_t1", "_t1ce", "_t2", "_seg")
NEW = ("-t2f", "-t1n", "-t1c", "-t2w", "-seg")


@pytest.mark.parametrize(
    "case,forms,codes,expected",
    [
        ("BraTS20_Training_001", OLD, (0, 1, 2, 4), (0, CORE, EDEMA, CORE)),
        ("BraTS2021_00000", OLD, (0, 1, 2), (0, CORE, EDEMA)),  # a low grade: no 4
        ("BraTS-GLI-00005-100", NEW, (0, 1, 2, 3), (0, CORE, EDEMA, CORE)),
        ("BraTS-GLI-00005-100", NEW, (0, 1, 2, 3, 4), (0, CORE, EDEMA, CORE, 0)),  # 4: cavity
        ("BraTS-PED-00001-000", NEW, (0, 1, 2, 3, 4), (0, CORE, CORE, CORE, EDEMA)),  # from 2024
        ("BraTS-PED-00001-000", NEW, (0, 1, 2, 3), (0, CORE, EDEMA, CORE)),  # 2023
    ],
)
def test_brats_names_and_codes(tmp_path, case, forms, codes, expected):
    write_brats(tmp_path / "TrainingData", case, forms, codes)
    (found,) = data.find_brain(tmp_path)
    t2w, flair = found.images
    assert t2w.name in (f"{case}_t2.nii.gz", f"{case}-t2w.nii.gz")
    assert flair.name in (f"{case}_flair.nii.gz", f"{case}-t2f.nii.gz")
    assert (labels_of(found) == np.resize(np.array(expected), (4, 5, 6))).all()


def test_brats_time_points_are_one_patient(tmp_path):
    for case in ("BraTS-GLI-00005-000", "BraTS-GLI-00005-001", "BraTS-MEN-RT-0001-1"):
        write_brats(tmp_path, case, NEW)
    _, patients, line = summary(tmp_path, "brain")
    assert patients == ["BraTS-GLI-00005", "BraTS-GLI-00005", "BraTS-MEN-RT-0001"]
    assert line == "BraTS layout: 3 studies of 2 patients"


def test_brats_without_segmentation_is_for_prediction(tmp_path):
    write_brats(tmp_path, "BraTS20_Validation_001", OLD[:4])
    with refused("BraTS20_Validation_001_seg.nii.gz", "missing"):
        data.find_brain(tmp_path)
    (case,) = data.find_brain(tmp_path, complete=False)
    assert case.label is None and case.name == "BraTS20_Validation_001"


def four_channels(root: Path, *paths: str) -> None:
    rng = np.random.default_rng(len(paths))
    for path in paths:
        save(root / path, rng.random((4, 5, 6, 4)).astype(np.float32))


def test_msd_with_its_test_set(tmp_path):
    four_channels(tmp_path, "imagesTr/B_1.nii.gz", "imagesTr/B_2.nii.gz", "imagesTs/B_485.nii.gz")
    touch(tmp_path, ["labelsTr/B_1.nii.gz"])
    pair = {"image": "./imagesTr/B_1.nii.gz", "label": "./labelsTr/B_1.nii.gz"}
    meta = {"labels": {"0": "background", "1": "edema"}, "training": [pair]}
    for test in (["./imagesTs/B_485.nii.gz"], [{"image": "./imagesTs/B_485.nii.gz"}], []):
        (tmp_path / "dataset.json").write_text(json.dumps(meta | {"test": test}))
        assert summary(tmp_path, "brain")[0] == ["B_1"]
        assert summary(tmp_path, "brain", complete=False)[0] == ["B_1", "B_485"]
        names, _, line = summary(tmp_path / "imagesTs", "brain", complete=False)
        assert names == ["B_485"] and line == "MSD layout: 1 study of 1 patient"


def test_msd_without_dataset_json(tmp_path):
    four_channels(tmp_path, "imagesTr/BRATS_1000.nii.gz", "imagesTr/BRATS_1001.nii.gz")
    touch(tmp_path, ["labelsTr/BRATS_1000.nii.gz"])
    with refused("labelsTr/BRATS_1001.nii.gz", "no such file"):
        for case in data.find_brain(tmp_path):
            assert case.channels == (3, 0)
            with pytest.raises(UserError) if "1001" in case.name else refused("found [0"):
                data.read_label(case)
        data.read_label(case)


def test_nnunet_brain_channels(tmp_path):
    touch(tmp_path, [f"imagesTr/A_000{i}.nii.gz" for i in range(4)])
    save(tmp_path / "labelsTr/A.nii.gz", np.zeros((4, 5, 6), np.uint8))
    (case,) = data.find_brain(tmp_path)
    assert [p.name for p in case.images] == ["A_0003.nii.gz", "A_0000.nii.gz"]  # MSD's order
    meta = {"channel_names": {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}}
    (tmp_path / "dataset.json").write_text(json.dumps(meta))
    (case,) = data.find_brain(tmp_path)
    assert [p.name for p in case.images] == ["A_0002.nii.gz", "A_0003.nii.gz"]
    meta = {"channel_names": {"0": "T1", "1": "PET"}}
    (tmp_path / "dataset.json").write_text(json.dumps(meta))
    with refused(tmp_path / "dataset.json", "T2w and FLAIR"):
        data.find_brain(tmp_path)


# ------------------------------------------------------------------------------------ label codes
@pytest.mark.parametrize(
    "names,codes",
    [
        ({"0": "background", "1": "NCR", "2": "ED", "3": "ET"}, (CORE, EDEMA, CORE)),
        ({"0": "background", "1": "NETC", "2": "SNFH", "3": "ET"}, (CORE, EDEMA, CORE)),
        ({"background": 0, "edema": 1, "non_enhancing": 2, "ET": 3}, (EDEMA, CORE, CORE)),
        ({"0": "", "1": "necrosis", "2": "peritumoral oedema", "3": "x"}, None),
        ({"0": "background", "1": "a", "2": "b", "3": "c"}, None),
        ({"0": "background", "1": "whole tumor"}, None),
        (
            {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "ET": 3},
            (EDEMA, CORE, CORE),
        ),
        (
            {"2": "surrounding non-enhancing FLAIR hyperintensity", "1": "cyst", "3": "RC"},
            (CORE, EDEMA, 0),
        ),
    ],
)
def test_brain_labels_mean_what_their_names_say(tmp_path, names, codes):
    four_channels(tmp_path, "imagesTr/A.nii.gz")
    label = np.resize(np.arange(4, dtype=np.uint8), (4, 5, 6))
    save(tmp_path / "labelsTr/A.nii.gz", label)
    pair = {"image": "imagesTr/A.nii.gz", "label": "labelsTr/A.nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [pair], "labels": names}))
    if codes is None:
        with refused(tmp_path / "dataset.json", "no known meaning"):
            data.find_brain(tmp_path)
        return
    (case,) = data.find_brain(tmp_path)
    assert (labels_of(case) == np.array((0, *codes))[label]).all()


def test_codes_without_names_are_decided_by_all_files_together(tmp_path):
    """A low-grade tumor without 4 is in BraTS's codes as well, if another file has a 4."""
    four_channels(tmp_path, "imagesTr/A.nii.gz", "imagesTr/B.nii.gz")
    save(tmp_path / "labelsTr/A.nii.gz", np.resize(np.array([0, 1, 2], np.uint8), (4, 5, 6)))
    second = save(tmp_path / "labelsTr/B.nii.gz", np.full((4, 5, 6), 4, np.uint8))
    a, _ = data.find_brain(tmp_path)
    assert labels_of(a)[0, 0, :3].tolist() == [0, CORE, EDEMA]
    save(second, np.full((4, 5, 6), 3, np.uint8))
    a, _ = data.find_brain(tmp_path)
    assert labels_of(a)[0, 0, :3].tolist() == [0, EDEMA, CORE]
    save(tmp_path / "labelsTr/A.nii.gz", np.full((4, 5, 6), 4, np.uint8))
    with refused(second, tmp_path / "labelsTr/A.nii.gz", "name them in dataset.json"):
        data.find_brain(tmp_path)


@pytest.mark.parametrize(
    "labels,values,tumor",
    [
        ({"background": 0, "tumor": 1}, (), (1,)),
        ({"background": 0, "GTVp": 1, "GTVn": 2}, (), (1, 2)),
        ({"background": 0, "uptake": 1}, (), (1,)),  # a single label is the one to find
        ({"background": 0, "organ": 1, "other": 2}, (), None),
        ({"background": 0, "organ": 1, "other": 2}, (2,), (2,)),  # the file also has a 1
        ({}, (1, 2), (1, 2)),
        ({}, (None,), (1, 2)),
        ({}, (), None),
    ],
)
def test_petct_labels(tmp_path, labels, values, tumor):
    write_nnunet(tmp_path, "A")
    label = np.zeros((4, 5, 6), np.uint8)
    label[0, 0, :3] = 0, 1, 2
    if tumor == (1,):
        label[label == 2] = 0
    save(tmp_path / "labelsTr/A.nii.gz", label)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    if tumor is None:
        with refused("--label-values"):
            (case,), _ = data.find_cases(tmp_path, "petct", label_values=values)
            data.read_label(case)
        return
    (case,), _ = data.find_cases(tmp_path, "petct", label_values=values)
    assert (labels_of(case) == np.isin(label, tumor)).all()


@pytest.mark.parametrize("values", [(0, 255), (-1, 0), (0, 0.5)])
def test_masks_of_other_values_need_an_option(tmp_path, values):
    touch(tmp_path, [f"P/{name}.nii.gz" for name in ("SUV", "CTres")])
    label = np.resize(np.array(values, np.float32), (4, 5, 6))
    save(tmp_path / "P/SEG.nii.gz", label)
    (case,) = data.find_petct(tmp_path)
    with refused(case.label, "--label-nonzero"):
        data.read_label(case)
    (case,), _ = data.find_cases(tmp_path, "petct", label_values=(None,))
    assert (labels_of(case) == (label != 0)).all()
    with refused("--label-values", "PET/CT"):
        write_brats(tmp_path, "BraTS20_Training_001", OLD)
        data.find_cases(tmp_path, "brain", label_values=(1,))


# --------------------------------------------------------------------------------------- patients
@pytest.mark.parametrize(
    "folder,patient",
    [
        ("PETCT_0001/2001-01-01/nifti", "PETCT_0001"),
        ("PETCT_0001/12-31-2001-NA-PET-CT Ganzkoerper/1", "PETCT_0001"),
        ("site/PETCT_0001/20010131", "site__PETCT_0001"),
        ("PETCT_0001/2001_01_31/CT/1", "PETCT_0001"),
        ("PETCT_0001_31.01.2001/nifti", "PETCT_0001"),
        ("sub-01/ses-02/pet", "sub-01"),
        ("P1/visit1", "P1"),
        ("P1/S1", "P1"),
        ("site/P3/S1", "site__P3"),
        ("P1_2001-01-01", "P1"),
        ("fdg_0a1b_2001-01-01", "fdg_0a1b"),
        ("MDA-20123456", "MDA-20123456"),  # 34 is no month
        ("alone", "alone"),
    ],
)
def test_patients_by_folders_and_names(tmp_path, folder, patient):
    touch(tmp_path, [f"{folder}/{name}.nii.gz" for name in ("SUV", "CTres", "SEG")])
    names, patients, _ = summary(tmp_path)
    assert names == [folder.replace("/", "__")] and patients == [patient]


def test_patients_by_a_regular_expression(tmp_path):
    write_nnunet(tmp_path, "x1-p7", "x2-p7", "x3-p8")
    _, patients, line = summary(tmp_path, patient_regex="p[0-9]")
    assert patients == ["p7", "p7", "p8"] and line.endswith("3 studies of 2 patients")
    assert summary(tmp_path, patient_regex="-p(.)")[1] == ["7", "7", "8"]
    for regex, words in (("p[7", "not a regular expression"), ("p7", "x3-p8"), ("z*", "x1-p7")):
        with refused("--patient-regex", words):
            summary(tmp_path, patient_regex=regex)


# ------------------------------------------------------------------------------- names and folders
def test_two_studies_that_would_have_one_mask_are_refused(tmp_path):
    for folder in ("a/b", "a__b"):
        touch(tmp_path, [f"{folder}/{name}.nii.gz" for name in ("SUV", "CTres", "SEG")])
    for complete in (True, False):
        with refused("a/b/SUV.nii.gz", "a__b/SUV.nii.gz", "one mask"):
            data.find_petct(tmp_path, complete)


@pytest.mark.parametrize(
    "task,names,missing",
    [
        ("petct", ["P1/SUV", "P1/CTres", "P1/SEG", "P2/CTres", "P2/SEG"], "P2/SUV.nii.gz"),
        ("brain", ["A_t1", "A_t1ce", "A_seg"], "A_t2.nii.gz"),
        ("brain", ["A-t1n", "A-t2w", "A-seg"], "A-t2f.nii.gz"),
    ],
)
def test_a_study_without_its_main_image_is_not_left_out(tmp_path, task, names, missing):
    touch(tmp_path, [f"{name}.nii.gz" for name in names])
    with refused(tmp_path / missing, "missing"):
        data.find_cases(tmp_path, task)


def test_a_link_to_nowhere_is_an_error(tmp_path):
    touch(tmp_path, [f"P1/{name}.nii.gz" for name in ("CTres", "SEG")])
    (tmp_path / "P1/SUV.nii.gz").symlink_to(tmp_path / "P1/gone.nii.gz")
    with refused(tmp_path / "P1/SUV.nii.gz", "missing"):
        data.find_petct(tmp_path)


def test_one_image_in_two_files_is_refused(tmp_path):
    write_nnunet(tmp_path, "A")
    touch(tmp_path, ["imagesTr/A_0001.nii"])
    with refused("A_0001.nii", "A_0001.nii.gz"):
        data.find_petct(tmp_path)


def test_the_same_names_for_training_and_test_are_refused_together(tmp_path):
    write_nnunet(tmp_path, "A")
    touch(tmp_path, ["imagesTs/A_0001.nii.gz"])
    with refused("imagesTr/A_0001.nii.gz", "imagesTs/A_0001.nii.gz", "--root"):
        data.find_petct(tmp_path, complete=False)
    assert summary(tmp_path / "imagesTs", complete=False)[0] == ["A"]


def test_links_that_lead_back_are_not_followed(tmp_path):
    root, disk = tmp_path / "root", tmp_path / "disk"
    for folder in (root / "P1/S1", root / "P2/S1", disk / "P3/S1"):
        touch(folder, [f"{name}.nii.gz" for name in ("SUV", "CTres", "SEG")])
    (root / "P1/loop").symlink_to(root)  # to a folder above
    (root / "P1/other").symlink_to(root / "P2")  # two that lead to each other
    (root / "P2/other").symlink_to(root / "P1")
    (root / "P1/self").symlink_to(root / "P1/self")
    (root / "P3").symlink_to(disk / "P3")  # outside: followed
    (disk / "P3/up").symlink_to(disk)
    (disk / "P3/here").symlink_to(root)
    assert summary(root)[0] == ["P1__S1", "P2__S1", "P3__S1"]
    (tmp_path / "link").symlink_to(root)
    assert summary(tmp_path / "link")[0] == ["P1__S1", "P2__S1", "P3__S1"]


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    touch(tmp_path, [f"P1/{name}.nii.gz" for name in ("SUV", "CTres", "SEG")])
    (tmp_path / "P2").mkdir()
    scandir = os.scandir

    def deny(path):
        if Path(path).name == "P2":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    with refused(tmp_path / "P2", "Permission denied"):
        data.find_petct(tmp_path)


def test_names_that_are_unsafe_on_a_terminal_or_too_long(tmp_path):
    unsafe = ["P\x1b]0;title\x07", "Q\nerror: fake", os.fsdecode(b"R\xff"), "\u202eS", "T" * 255]
    for name in unsafe:
        touch(tmp_path, [f"{name}/visit1/{file}.nii.gz" for file in ("SUV", "CTres")])
        save(tmp_path / name / "visit1/SEG.nii.gz", np.zeros((4, 5, 6), np.uint8))
    cases = data.find_petct(tmp_path)
    names = [case.name for case in cases]
    assert len(set(names)) == 5 and all(name.isprintable() for name in names)
    assert "Q\\nerror: fake__visit1" in names and "R\\udcff__visit1" in names
    assert all(len(name.encode()) <= 200 for name in names)
    cached = data.build_cache(cases, data.Preprocessing(spacing=(4, 4, 4)), tmp_path / "c", 1)
    assert [case.name for case in cached] == names
    cases[0].label.unlink()
    with refused(files.printable(cases[0].label.parent)):
        data.find_petct(tmp_path)


def test_a_folder_of_something_else_says_what_was_found(tmp_path):
    touch(tmp_path, ["a/scan.nii.gz", "a/other.nii"])
    for task in ("petct", "brain"):
        with refused(tmp_path, "2 NIfTI files", tmp_path / "a", "docs/data.md"):
            data.find_cases(tmp_path, task)


ANY = [None, True, 3, -1, 1.5, 1e999, "x", "", [], {}, [[[]]], {"a": {}}, [1], ["x"], 10**30, "\0"]
WHERE = (
    "training test labels modality channel_names training.0 training.0.image training.0.label "
    "test.0 labels.1 modality.0 labels.key modality.key"
)


@pytest.mark.parametrize("where", WHERE.split())
def test_any_type_in_any_field_of_dataset_json_is_used_or_refused(tmp_path, where):
    four_channels(tmp_path, "imagesTr/A.nii.gz", "imagesTs/T.nii.gz")
    save(tmp_path / "labelsTr/A.nii.gz", np.zeros((4, 5, 6), np.uint8))
    *path, last = where.split(".")
    for value in ANY:
        meta = {
            "training": [{"image": "imagesTr/A.nii.gz", "label": "labelsTr/A.nii.gz"}],
            "test": ["imagesTs/T.nii.gz"],
            "labels": {"0": "background", "1": "edema"},
            "modality": {"0": "FLAIR", "1": "T2w"},
        }
        parent = meta
        for key in path:
            parent = parent[int(key) if isinstance(parent, list) else key]
        if last == "key":
            parent[str(value)] = "edema T2w FLAIR"
        elif isinstance(parent, list):
            parent[int(last)] = value
        else:
            parent[last] = value
        (tmp_path / "dataset.json").write_text(json.dumps(meta))
        for complete in (True, False):
            try:
                for case in data.find_brain(tmp_path, complete):
                    data.load_images(case, data.BRAIN_PREPROCESSING)
            except UserError as e:
                assert len(str(e).splitlines()) == 1 and len(str(e)) < 1000
