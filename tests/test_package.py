"""The installed package: what `pip install .` makes of the flat files, used from another folder."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import ROOT

from hatch_build import PACKAGE, write_package

EXAMPLE = """
import sys
import torch
from mirrorunet import MirrorLoss, MirrorUNet, kernels, load_model, predict_study
from mirrorunet.config import Config

model = MirrorUNet("v1", channels=(2, 2, 2, 2, 2))
x = torch.rand(1, 2, 32, 32, 32)
batch = {"ct": x[:, :1], "pet": x[:, 1:], "seg": (x[:, 1:] > 0.9).long()}
loss, parts = MirrorLoss("v1")(model(x), batch)
assert loss.isfinite() and set(parts) == {"seg_dice", "seg_ce", "ct_l2"}

c = Config(data="petct", model="v1", patch=(32, 32, 32), channels=(2, 2, 2, 2, 2), flips=False)
torch.save({"config": c.to_dict(), "model": c.build_model().state_dict()}, "w.pt")
model, config = load_model("w.pt")
assert config == c and not model.training

from pathlib import Path
import nibabel as nib
import numpy as np
from mirrorunet.data import Case

nib.save(nib.Nifti1Image(np.ones((20, 20, 20), np.float32), np.diag([4.0, 4, 4, 1])), "pet.nii.gz")
case = Case("P", "P", (None, Path("pet.nii.gz")), None)
found = predict_study([(model, config)], case, Path("mask.nii.gz"))
assert found.rows[0]["lesions"] == len(found.lesions) and found.rows[0]["pred_ml"] >= 0
assert nib.load("mask.nii.gz").shape == (20, 20, 20)
assert kernels.dice_ce.__module__ == "mirrorunet.kernels"
print("bare names:", sorted(set(sys.modules) & set(sys.argv[1:])))
"""


def run_example(path: Path, folder: Path) -> str:
    """What the example prints, run in a folder where only `path` leads to the package."""
    names = [p.stem for p in ROOT.glob("*.py")] + ["kernels"]
    env = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", EXAMPLE, *names]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_package_works_from_another_folder_and_takes_no_bare_names(tmp_path):
    write_package(tmp_path / "site" / PACKAGE)
    assert "bare names: []" in run_example(tmp_path / "site", tmp_path)


@pytest.mark.slow
def test_programs_run_as_modules(tmp_path):
    write_package(tmp_path / PACKAGE)
    for program in ("train", "predict", "replicate"):
        command = [sys.executable, "-m", f"{PACKAGE}.{program}", "--help"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "usage" in done.stdout, done.stderr


@pytest.mark.slow
def test_pip_installs_the_package_and_nothing_else(tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    pip = [str(tmp_path / "venv/bin/python"), "-m", "pip", "install", "--quiet", "--no-deps"]
    site = tmp_path / "site"
    subprocess.run([*pip, "--target", str(site), str(ROOT)], check=True, capture_output=True)
    assert {p.name for p in site.iterdir() if "dist-info" not in p.name} <= {PACKAGE, "__pycache__"}
    assert "bare names: []" in run_example(site, tmp_path)
