"""Layouts through the programs: each row of the table in docs/data.md, folds, patients, grids."""

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from test_data import make_affine, refused, save
from test_predict import checkpoint, table, voxels

import predict
import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "nothing_said")]
TINY = "--spacing 8 8 8 --patch 32 32 32 --channels 2 3 4 5 6 --batch 1 --folds 2 --steps 2"
TINY += " --validations 1 --no-flips --overlap 0"
LAS = make_affine("LAS", (8, 8, 8))


def rows_of_docs() -> list[tuple[str, str, list[str]]]:
    """Layout, task and the names of the files of each row of the table."""
    text = (ROOT / "docs" / "data.md").read_text()
    rows = re.findall(r"^\| (.+), `--data (petct|brain)` \| (.+?) \|", text, re.M)
    return [(name, task, re.findall(r"`(\S+\.nii\.gz)`", files)) for name, task, files in rows]


def content(name: str, number: int, task: str) -> np.ndarray:
    """The voxels of a file, by its name: truth, CT, PET, or MR of one or four channels."""
    rng = np.random.default_rng([number, len(name)])
    body = np.zeros((16, 15, 14), np.float32)
    body[2:-2, 2:-2, 2:-2] = 1 + rng.random((12, 11, 10))
    label = np.zeros(body.shape, np.uint8)
    label[5:9, 5:9, 5:9], label[6:8, 6:8, 6 : 7 + number] = 1, 2 - (task == "petct")
    if re.search("seg|labels", name, re.I):
        return label
    if re.search("CTres|__CT", name) or (task == "petct" and "_0000" in name):
        return (100 * body - 100).astype(np.int16)
    if name.startswith("imagesTr/CASE.nii"):
        return np.stack([body, body**2, body**3, body + 3 * label], axis=-1)
    return body + 4 * label


def write_layout(root: Path, task: str, files: list[str], cases=("A1", "A2", "A3", "A4")) -> None:
    """Studies in a layout; a name without a folder is in that of the file before it."""
    folder, listed = "", []
    for name in files:
        folder = name.rpartition("/")[0] or folder
        path = f"{folder}/{Path(name).name}"
        for number, case in enumerate(cases):
            own = path.replace("PATIENT", case).replace("STUDY", "visit1").replace("CASE", case)
            save(root / own, content(path, number, task), LAS)
    if "imagesTr/CASE.nii.gz" in files:
        listed = [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in cases]
        meta = {"modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}}
        meta["labels"] = {"0": "background", "1": "edema", "2": "non-enhancing tumor"}
        (root / "dataset.json").write_text(json.dumps(meta | {"training": listed}))


def run(program, *words) -> None:
    program.main([str(word) for word in words])


def train_on(root: Path, task: str, *more, model="") -> Path:
    """best.pt of two steps on a folder of studies."""
    out = root.with_name(f"{root.name}-run")
    words = ("--data", task, "--root", root, "--cache", root.with_name("cache"), *TINY.split())
    run(train, *words, "--model", model or ("v1" if task == "petct" else "v2"), "--out", out, *more)
    return out / "best.pt"


@pytest.mark.parametrize("layout,task,files", rows_of_docs())
def test_each_layout_of_the_table_is_trained_on_and_predicted(
    tmp_path, capsys, layout, task, files
):
    root, out = tmp_path / "R", tmp_path / "out"
    write_layout(root, task, files)
    weights = train_on(root, task)
    said = f"{layout.split()[0]} layout: 4 studies of 4 patients"
    assert f"{said}, 0 without tumor\n" in capsys.readouterr().out
    run(predict, "--checkpoint", weights, "--root", root, "--out", out)
    assert f"{said}\n" in capsys.readouterr().out
    rows = table(out / "metrics.csv")
    assert len({row["case"] for row in rows}) == 4
    for row in rows:
        assert float(row["truth_ml"]) > 0
        assert voxels(out / f"{row['case']}.nii.gz").shape == (16, 15, 14)


def test_the_table_has_the_layouts_that_are_known():
    names = [(name.split()[0], task) for name, task, _ in rows_of_docs()]
    petct = ["AutoPET", "nnU-Net", "HECKTOR"]
    brain = ["MSD", "nnU-Net", "BraTS", "BraTS"]
    assert names == [(n, "petct") for n in petct] + [(n, "brain") for n in brain]


# ------------------------------------------------------------------------------- nnU-Net's layout
NNUNET = next(files for name, _, files in rows_of_docs() if name == "nnU-Net raw")  # PET/CT


@pytest.fixture
def nnunet(tmp_path) -> Path:
    """Four studies of three patients."""
    root = tmp_path / "Dataset221"
    names = ["fdg_a_2001", "fdg_a_2002", "fdg_b_2001", "psma_c_2003"]
    write_layout(root, "petct", NNUNET, names)
    return root


def test_folds_that_come_with_the_data_are_used(nnunet, capsys):
    folds = [{"train": ["fdg_a_2001", "fdg_a_2002"], "val": ["psma_c_2003"]}]
    (nnunet / "splits_final.json").write_text(json.dumps(folds))
    train_on(nnunet, "petct")
    printed = capsys.readouterr().out
    assert "4 studies of 3 patients, 0 without tumor" in printed
    assert "2 studies to train on, 1 held out" in printed
    other = nnunet.with_name("own.json")
    other.write_text(json.dumps([{"train": ["fdg_b"], "val": ["fdg_a"]}]))
    train_on(nnunet, "petct", "--splits", other, "--overwrite")
    assert "1 studies to train on, 2 held out" in capsys.readouterr().out
    folds[0]["val"] = ["fdg_a_2002"]
    (nnunet / "splits_final.json").write_text(json.dumps(folds))
    with refused("splits_final.json", "fdg_a", "in training and validation", "--splits"):
        train_on(nnunet, "petct", "--overwrite")


def test_the_options_for_patients_and_labels_reach_the_data(nnunet, capsys):
    with refused("1 folds of 1 patient(s)"):
        train_on(nnunet, "petct", "--patient-regex", "_200")
    assert "4 studies of 1 patient" in capsys.readouterr().out
    for path in (nnunet / "labelsTr").iterdir():
        save(path, voxels(path) * 255, LAS)
    with refused("found [0, 255]", "--label-nonzero"):
        train_on(nnunet, "petct")
    weights = train_on(nnunet, "petct", "--label-nonzero")
    out = nnunet.with_name("out")

    def volumes(*words) -> list[bool]:
        run(predict, "--checkpoint", weights, "--root", nnunet, "--out", out, *words)
        return [float(row["truth_ml"]) > 0 for row in table(out / "metrics.csv")]

    assert volumes() == [True] * 4  # as in training
    assert volumes("--label-values", 255) == [True] * 4
    capsys.readouterr()
    assert volumes("--label-values", 1) == [False] * 4
    assert capsys.readouterr().out.count("[255] are not tumor, as --label-values says") == 1


def test_labels_that_are_not_understood_do_not_stop_a_prediction(nnunet, tmp_path, capsys):
    (nnunet / "dataset.json").write_text('{"labels": {"background": 0, "organ": 1, "x": 2}}')
    with refused("'organ' has no known meaning", "--label-values"):
        train_on(nnunet, "petct")
    weights = checkpoint(tmp_path / "w.pt", model="v1")
    capsys.readouterr()
    run(predict, "--checkpoint", weights, "--root", nnunet, "--out", tmp_path / "out")
    assert capsys.readouterr().out.count("'organ' has no known meaning") == 1
    assert [row["dice"] for row in table(tmp_path / "out/metrics.csv")] == [""] * 4
    before = {path: path.read_bytes() for path in (nnunet / "labelsTr").iterdir()}
    with refused("never overwritten"):
        run(predict, "--checkpoint", weights, "--root", nnunet, "--out", nnunet / "labelsTr")
    assert before == {path: path.read_bytes() for path in (nnunet / "labelsTr").iterdir()}


@pytest.mark.parametrize("name", ["bare", "imagesTs"])
def test_a_folder_of_images_is_predicted_to_masks_that_nnunet_reads(nnunet, tmp_path, capsys, name):
    bare = tmp_path / "elsewhere" / name
    bare.parent.mkdir()
    (nnunet / "imagesTr").rename(bare)
    (bare / "fdg_a_2001_0000.nii.gz").unlink()
    (bare / "fdg_b_2001_0000.nii.gz").write_bytes(b"no image")
    weights = checkpoint(tmp_path / "w.pt", model="v3")
    run(predict, "--checkpoint", weights, "--root", bare, "--out", tmp_path / "out")
    assert "nnU-Net layout: 4 studies of 3 patients\n" in capsys.readouterr().out
    masks = sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz"))
    cases = ["fdg_a_2001", "fdg_a_2002", "fdg_b_2001", "psma_c_2003"]
    assert masks == [f"{case}.nii.gz" for case in cases]
    for case in cases:
        mask = nib.load(tmp_path / f"out/{case}.nii.gz")
        image = nib.load(bare / f"{case}_0001.nii.gz")
        assert mask.shape == image.shape and np.array_equal(mask.affine, image.affine)


# ------------------------------------------------------------------------- CT and truth elsewhere
def hecktor(root: Path, ct_affine=None) -> Path:
    """One study whose CT and truth have voxels of 4 mm, and the PET of 8 mm."""
    pet = content("__PT", 1, "petct")
    ct, seg = (np.kron(content(name, 1, "petct"), np.ones((2, 2, 2), np.int16))
               for name in ("__CT", "labels"))
    fine = make_affine("LAS", (4, 4, 4), center_of_first(LAS, 8, 4))
    save(root / "imagesTs/C__PT.nii.gz", pet, LAS)
    save(root / "imagesTs/C__CT.nii.gz", ct, fine if ct_affine is None else ct_affine)
    save(root / "labelsTs/C.nii.gz", (2 * seg).astype(np.uint8), fine)
    return root


def center_of_first(affine, coarse: float, fine: float) -> np.ndarray:
    """Where the first fine voxel has its center, if it fills a corner of the first coarse one."""
    return (affine @ np.array([*[(fine / coarse - 1) / 2] * 3, 1]))[:3]


@pytest.mark.parametrize("model", ["v1", "v2", "v3", "v4"])
def test_a_ct_and_a_truth_on_a_grid_of_their_own(tmp_path, capsys, model):
    root = hecktor(tmp_path / "R")
    weights = checkpoint(tmp_path / "w.pt", model=model)
    run(predict, "--checkpoint", weights, "--root", root, "--out", tmp_path / "out")
    (row,) = table(tmp_path / "out/metrics.csv")
    voxel_ml = 0.512
    assert float(row["truth_ml"]) == pytest.approx(64 * voxel_ml)
    assert voxels(tmp_path / "out/C.nii.gz").shape == (16, 15, 14)


@pytest.mark.parametrize("how", ["missing", "broken", "elsewhere"])
def test_v1_to_v3_predict_folders_whatever_the_ct_is(tmp_path, how):
    root = hecktor(tmp_path / "R", make_affine("LAS", (4, 4, 4), (3000, 0, 0)))
    ct = root / "imagesTs/C__CT.nii.gz"
    if how == "missing":
        ct.unlink()
    if how == "broken":
        ct.write_bytes(b"no image")
    for model in ("v1", "v2", "v3"):
        weights = checkpoint(tmp_path / f"{model}.pt", model=model)
        run(predict, "--checkpoint", weights, "--root", root, "--out", tmp_path / model)
        (row,) = table(tmp_path / model / "metrics.csv")
        assert float(row["truth_ml"]) > 0
    with refused("C"):
        weights = checkpoint(tmp_path / "v4.pt", model="v4")
        run(predict, "--checkpoint", weights, "--root", root, "--out", tmp_path / "v4")
    assert not list((tmp_path / "v4").glob("*.nii.gz"))


@pytest.mark.parametrize(
    "file,name",
    [
        ("P7/SUV.nii.gz", "P7"), ("P7/SUV.NII", "P7"), ("x/C_0001.nii.gz", "C"),
        ("x/C__PT.nii.gz", "C"), ("x/fdg_a_SUV.nii.gz", "fdg_a"), ("x/carpet.nii.gz", "carpet"),
    ],
)  # fmt: skip
def test_a_single_prediction_has_the_name_of_its_study(tmp_path, capsys, file, name):
    save(tmp_path / file, content("PT", 1, "petct"), LAS)
    weights = checkpoint(tmp_path / "w.pt", model="v1")
    run(predict, "--checkpoint", weights, "--pet", tmp_path / file, "--out", tmp_path / "m.nii")
    assert capsys.readouterr().out.startswith(f"{name} -> ")
