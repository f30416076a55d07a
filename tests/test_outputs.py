"""What predict.py reads and writes: no input is overwritten, no damaged file is used in silence."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from test_data import make_affine, refused, save, write_petct
from test_predict import checkpoint, run, table, voxels

import phantom
import predict
from config import Config
from data import Case
from files import refuse_overwriting
from predict import load_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def weights(tmp_path) -> Path:
    return checkpoint(tmp_path / "w.pt", model="v1")


@pytest.fixture
def studies(tmp_path) -> Path:
    """A folder of three studies of 16^3 voxels with a truth."""
    rng = np.random.default_rng(0)
    for i in range(3):
        seg = np.zeros((16, 16, 16))
        seg[4:8, 4:8, 4 : 6 + i] = 1
        affine = make_affine("LAS", (8, 8, 8))
        write_petct(tmp_path / "in" / f"P{i}", rng.random(seg.shape) + seg, seg=seg, affine=affine)
    return tmp_path / "in"


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ------------------------------------------------------------------------- nothing is overwritten
def link(kind: str, target: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "copy":
        shutil.copy(target, path)
    else:
        os.link(target, path) if kind == "hard link" else path.symlink_to(target)


@pytest.mark.parametrize("kind", ["symlink", "hard link"])
@pytest.mark.parametrize("name", ["SUV", "CTres", "SEG", "w.pt"])
@pytest.mark.parametrize("output", ["P1.nii.gz", "metrics.csv", "lesions.csv", "overview.png"])
@pytest.mark.slow
def test_no_output_of_a_folder_is_an_input(studies, weights, kind, name, output):
    """The PET, a CT that no network reads, the truth, the checkpoint; also through links."""
    target = weights if name == "w.pt" else studies / "P2" / f"{name}.nii.gz"
    out = studies.parent / "out"
    link(kind, target, out / output)
    before = content(studies.parent)
    with refused(f"{out / output} is an input, which is never overwritten; choose another name"):
        run(weights, "--root", studies, "--out", out)
    assert content(studies.parent) == before and names_in(out) == {output}


@pytest.mark.parametrize("sub", ["imagesTr", "labelsTr"])
@pytest.mark.parametrize("through", ["", "a link to the folder"])
def test_masks_do_not_replace_the_images_or_labels_of_a_data_set(tmp_path, sub, through):
    phantom.write_brain(tmp_path / "Task01", 2, spacing=(10.0, 10.0, 10.0))
    brain = checkpoint(tmp_path / "b.pt", data="brain", model="v2")
    out = tmp_path / "Task01" / sub
    if through:
        (tmp_path / "link").symlink_to(out)
        out = tmp_path / "link"
    before = content(tmp_path)
    with refused("never overwritten"):
        run(brain, "--root", tmp_path / "Task01", "--out", out)
    assert content(tmp_path) == before


def test_no_output_of_a_single_study_is_an_input(studies, weights):
    folder = studies.parent
    pet = folder / "P_seg_probability.nii.gz"
    shutil.copy(studies / "P0" / "SUV.nii.gz", pet)
    ct = studies / "P0" / "CTres.nii.gz"
    model = folder / "model.nii"
    shutil.copy(weights, model)
    before = content(folder)
    for words in (
        ("--out", pet),
        ("--out", folder / "in" / ".." / pet.name),
        ("--ct", ct, "--out", ct),
        ("--out", folder / "P.nii.gz", "--probabilities"),
    ):
        with refused("never overwritten"):
            run(weights, "--pet", pet, *words)
    with refused("never overwritten"):
        run(model, "--pet", pet, "--out", model)
    assert content(folder) == before


def test_two_outputs_of_a_run_are_never_one_file(studies, weights):
    """A/B and A__B have one name; so have the mask of one study and the map of another."""
    shutil.copytree(studies / "P0", studies / "P1" / "S")
    shutil.rmtree(studies / "P0")
    shutil.copytree(studies / "P2", studies / "P1__S")
    out = studies.parent / "out"
    with refused("P1__S"):
        run(weights, "--root", studies, "--out", out)
    assert not out.exists()
    shutil.rmtree(studies / "P1")
    (studies / "P2").rename(studies / "P1__S_seg_probability")
    with refused("two outputs would be", "P1__S_seg_probability.nii.gz"):
        run(weights, "--root", studies, "--out", out, "--probabilities")
    assert not out.exists()


def test_an_earlier_prediction_may_be_replaced(studies, weights):
    out = studies.parent / "out"
    for _ in range(2):
        run(weights, "--root", studies, "--out", out)
    masks = {f"P{i}.nii.gz" for i in range(3)}
    assert names_in(out) == masks | {"metrics.csv", "lesions.csv", "overview.png"}
    refuse_overwriting([out / "new.nii"], [out / "missing.nii"])


def test_a_folder_where_a_mask_would_be_is_found_before_the_first_mask(studies, weights):
    out = studies.parent / "out"
    (out / "P1.nii.gz").mkdir(parents=True)
    with refused("P1.nii.gz is a folder; choose another name"):
        run(weights, "--root", studies, "--out", out)
    assert names_in(out) == {"P1.nii.gz"}


# ------------------------------------------------------------------------------- the whole folder
def test_a_run_says_how_far_it_is(studies, weights, capsys):
    run(weights, "--root", studies, "--out", studies.parent / "out")
    lines = capsys.readouterr().out.splitlines()
    progress = [re.search(r"(\d) of 3, (\d+) min left$", line) for line in lines]
    assert [match[1] for match in progress if match] == ["1", "2", "3"]
    assert [match[2] for match in progress if match][2] == "0"


def broken_truth(studies: Path, how: str) -> str:
    """Spoil the truth of P1; returns what is to be said about it."""
    path = studies / "P1" / "SEG.nii.gz"
    if how == "missing":
        path.unlink()
        return "no truth"
    if how == "no image":
        path.write_bytes(b"nonsense")
        return "not a readable NIfTI file"
    if how == "another grid":
        save(path, np.zeros((5, 5, 5), np.uint8), make_affine())
        return "not on one grid"
    save(path, np.full((16, 16, 16), 7, np.uint8), make_affine("LAS", (8, 8, 8)))
    return "expected labels"


@pytest.mark.parametrize("how", ["missing", "no image", "another grid", "unknown codes"])
def test_a_study_without_a_usable_truth_is_predicted_and_in_the_table(
    studies, weights, capsys, how
):
    problem = broken_truth(studies, how)
    out = studies.parent / "out"
    run(weights, "--root", studies, "--out", out)
    rows = table(out / "metrics.csv")
    assert [row["case"] for row in rows] == ["P0", "P1", "P2"]
    assert [row["truth_ml"] == "" for row in rows] == [False, True, False]
    assert rows[1]["pred_ml"] and rows[1]["dice"] == rows[1]["false_lesions"] == ""
    assert voxels(out / "P1.nii.gz").shape == (16, 16, 16)
    printed = capsys.readouterr().out
    assert printed.count(problem) == 1 and "P1" in printed


def test_what_is_wrong_with_files_is_found_before_the_first_mask(studies, weights, monkeypatch):
    """The headers of all are checked; the good ones are predicted, the error names the rest."""
    (studies / "P2" / "SUV.nii.gz").write_bytes(b"nonsense")
    out = studies.parent / "out"
    events = []

    def record(name):
        real = getattr(predict, name)

        def recorded(*args):
            events.append(name)
            return real(*args)

        monkeypatch.setattr(predict, name, recorded)

    record("check_study")
    record("save_nifti")
    with refused("1 of 3 studies have no prediction", "P2", "not a readable NIfTI file"):
        run(weights, "--root", studies, "--out", out)
    assert events[:3] == ["check_study"] * 3 and events.count("save_nifti") == 2
    assert [row["case"] for row in table(out / "metrics.csv")] == ["P0", "P1"]


def test_v1_to_v3_do_not_open_the_ct(studies, weights):
    """It may be damaged, missing or elsewhere."""
    pet, ct = (studies / "P0" / f"{name}.nii.gz" for name in ("SUV", "CTres"))
    out = studies.parent / "m.nii"
    run(weights, "--pet", pet, "--out", out)
    expected = out.read_bytes()
    far = make_affine("LAS", (8, 8, 8), (2000, 2000, 2000))
    for spoil in (lambda: ct.write_bytes(b"x"), lambda: save(ct, np.zeros((16, 16, 16)), far)):
        spoil()
        run(weights, "--pet", pet, "--ct", ct, "--out", out)
        assert out.read_bytes() == expected
        with refused(str(ct)):
            run(checkpoint(out.with_name("v4.pt"), model="v4"), "--pet", pet, "--ct", ct,
                "--out", out.with_name("n.nii"))


@pytest.mark.parametrize("shape", [(1, 16, 16), (16, 1, 16), (16, 16, 1), (1, 1, 1)])
def test_a_study_that_is_one_voxel_wide(tmp_path, shape):
    seg = np.ones(shape)
    write_petct(tmp_path / "in" / "P", seg + 1, seg=seg, affine=make_affine("LAS", (8, 8, 8)))
    out = tmp_path / "out"
    run(checkpoint(tmp_path / "w.pt", model="v4"), "--root", tmp_path / "in", "--out", out)
    assert voxels(out / "P.nii.gz").shape == shape
    (row,) = table(out / "metrics.csv")
    assert float(row["truth_ml"]) == pytest.approx(0.512 * np.prod(shape))


def test_a_single_file_is_named_after_the_folder_of_its_study(studies, weights, capsys):
    own = studies.parent / "patient7.nii.gz"
    shutil.copy(studies / "P0" / "SUV.nii.gz", own)
    for pet, name in ((studies / "P0" / "SUV.nii.gz", "P0"), (own, "patient7")):
        run(weights, "--pet", pet, "--out", studies.parent / "m.nii")
        assert capsys.readouterr().out.startswith(f"{name} -> ")


def test_an_ensemble_says_which_folds_it_is_of(studies, tmp_path, capsys):
    folds = [checkpoint(tmp_path / f"{k}.pt", model="v1", fold=k, seed=k) for k in range(3)]
    pet = studies / "P0" / "SUV.nii.gz"
    run(folds, "--pet", pet, "--out", tmp_path / "m.nii")
    assert "mean of v1 fold 0, v1 fold 1, v1 fold 2\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_a_lack_of_memory_is_a_line_and_costs_no_other_study(
    studies, weights, monkeypatch, error
):
    def load_images(case, preprocessing):
        if case.name == "P1":
            raise error
        return real(case, preprocessing)

    real = predict.load_images
    monkeypatch.setattr(predict, "load_images", load_images)
    out = studies.parent / "out"
    with refused("1 of 3 studies", "P1: the memory is full"):
        run(weights, "--root", studies, "--out", out)
    assert [row["case"] for row in table(out / "metrics.csv")] == ["P0", "P2"]


def test_other_errors_of_the_program_are_not_hidden(studies, weights, monkeypatch):
    def load_images(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr(predict, "load_images", load_images)
    with pytest.raises(RuntimeError, match="a defect"):
        run(weights, "--root", studies, "--out", studies.parent / "out")


# ------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, weights, value):
    state = torch.load(weights, weights_only=True)
    next(iter(state["model"].values())).view(-1)[0] = value
    torch.save(state, tmp_path / "n.pt")
    with refused("n.pt", "holds NaN or infinity"):
        load_model(tmp_path / "n.pt")


def test_finite_weights_whose_probabilities_are_not_are_refused(studies, tmp_path, weights):
    state = torch.load(weights, weights_only=True)
    for tensor in state["model"].values():
        if tensor.is_floating_point():
            tensor.fill_(1e30)
    torch.save(state, tmp_path / "n.pt")
    with refused("P0", "probabilities are NaN"):
        run(tmp_path / "n.pt", "--pet", studies / "P0/SUV.nii.gz", "--out", tmp_path / "m.nii")
    assert not (tmp_path / "m.nii").exists()


def test_a_score_of_the_patient_that_is_not_finite_is_refused(monkeypatch):
    found = torch.zeros(1, 2, 2, 2), np.nan
    monkeypatch.setattr(predict, "predict_image", lambda *_, **__: found)
    with refused("P0", "NaN"):
        predict.predict_ensemble([(None, Config())], torch.zeros(1, 2, 2, 2), "P0")


def test_a_flipped_bit_anywhere_in_a_tensor_is_found(tmp_path, weights):
    whole = weights.read_bytes()
    with zipfile.ZipFile(weights) as records:
        tensors = [r for r in records.infolist() if "/data/" in r.filename and r.file_size > 64]
    rng = np.random.default_rng(0)
    for record in [tensors[i] for i in rng.integers(0, len(tensors), 20)]:
        place = whole.index(record.filename.encode()) + 128  # after the record's header
        place += int(rng.integers(record.file_size // 2))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "d.pt").write_bytes(damaged)
        with refused("d.pt", "not a checkpoint of train.py, or cut short"):
            load_model(tmp_path / "d.pt")


def test_a_packed_checkpoint_is_refused_before_it_is_unpacked(tmp_path):
    """A few kilobytes that would become a gigabyte."""
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as records:
        with records.open("archive/data/0", "w", force_zip64=True) as f:
            for _ in range(64):
                f.write(bytes(2**20))
    assert path.stat().st_size < 2**20
    with refused("bomb.pt", "not a checkpoint"):
        load_model(path)


def test_no_memory_is_taken_for_a_network_that_the_weights_do_not_fit(tmp_path, weights):
    """Its config asks for about 100 GB."""
    state = torch.load(weights, weights_only=True)
    for change in ({"channels": (4096,) * 5}, {"patch": (33, 32, 32)}):
        torch.save(state | {"config": state["config"] | change}, tmp_path / "c.pt")
        with refused("c.pt", "does not fit the network it names"):
            load_model(tmp_path / "c.pt")
    for model in ([], 3, {3: torch.zeros(2)}, {"pet": "x"}, None):
        torch.save(state | {"model": model}, tmp_path / "c.pt")
        with refused("c.pt", "does not fit the network it names"):
            load_model(tmp_path / "c.pt")


def test_a_study_is_predicted_from_python_without_its_broken_truth(studies, tmp_path, weights):
    broken_truth(studies, "another grid")
    files = [studies / "P1" / f"{name}.nii.gz" for name in ("CTres", "SUV", "SEG")]
    case = Case("P1", "P1", tuple(files[:2]), files[2])
    found = predict.predict_study([load_model(weights)], case, tmp_path / "m.nii.gz")
    assert "not on one grid" in found.problem and np.isnan(found.rows[0]["dice"])
    assert nib.load(tmp_path / "m.nii.gz").shape == (16, 16, 16)
    whole = dataclasses.replace(case, label=None)
    assert predict.predict_study([load_model(weights)], whole, tmp_path / "m.nii.gz").problem == ""


# ---------------------------------------------------------------------------------- a whole body
WRITE = """
import nibabel as nib, numpy as np
fine, other = np.diag([-1.65, 1.65, 1.65, 1]), np.diag([-1.7, 1.7, 1.65, 1])
image = np.zeros((400, 400, 1000), np.int16)
image[60:340, 100:300, 20:980] = 10
image[150:170, 150:170, 300:320] = 80
nib.save(nib.Nifti1Image(image / np.float32(10), fine), "in/P/SUV.nii")
nib.save(nib.Nifti1Image(image, other), "in/P/CTres.nii")
nib.save(nib.Nifti1Image((image > 50).astype(np.uint8), fine), "in/P/SEG.nii")
"""
PREDICT = """
import resource, sys, predict
predict.main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_a_total_body_of_160_million_voxels_takes_less_than_3_gb(tmp_path):
    """With a CT on its own grid and a truth; for v1, tests/test_report.py has the same."""
    weights = checkpoint(tmp_path / "w.pt", model="v4", spacing=(4, 4, 4), patch=(64, 64, 64))
    (tmp_path / "in" / "P").mkdir(parents=True)
    words = ["--checkpoint", str(weights), "--root", "in", "--out", "out", "--threshold", "0.9"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for code in (WRITE, PREDICT):
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "P.nii.gz").exists()
    assert float(done.stdout.split()[-1]) < 3  # GB
