"""The exercises, done: each patch of tutorials/solutions/ applies to this tree, and then the check
of its exercise, with the commands of tutorials/exercises.md, shows what the exercise promises.
Without the solution it fails.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_benchmarks import QUICK as BUDGET  # without the launches, whose count takes minutes
from test_layouts import touch
from test_style import tracked

import data
import patches
from config import parse_config
from files import UserError
from train import build_model

pytest.importorskip("triton")  # the checks of the kernels need its interpreter
SOLUTIONS = ROOT / "tutorials" / "solutions"
TEXT = (ROOT / "tutorials" / "exercises.md").read_text()
PATCHES = sorted(SOLUTIONS.glob("*.patch"))
REFRESH = """{0} no longer applies. To refresh it, in a clean checkout:
    git apply --3way tutorials/solutions/{0}      # then resolve the conflicts that it marks
    git diff HEAD -- ':!tutorials/solutions' > tutorials/solutions/{0}
    git checkout HEAD -- ':!tutorials/solutions'
git apply says:
{1}"""
# Options that come before those of an exercise, which so count: a training of seconds.
QUICK = "--steps 2 --validations 1 --phantoms 6 --folds 3 --spacing 8 8 8 --patch 32 32 32 "
QUICK += "--channels 2 3 4 5 6 --batch 2 --no-flips --overlap 0"


# ----------------------------------------------------------------------------------------- helpers
def section(number: int) -> str:
    """The text of an exercise."""
    return re.search(rf"^## {number}\. .+?(?=^## |\Z)", TEXT, re.M | re.S)[0]


def commands(number: int) -> str:
    """The commands of its check."""
    check = section(number).split("**Check.**")[1]
    return re.search(r"^```\w*\n(.+?)^```", check, re.M | re.S)[1]


def solution(number: int) -> Path:
    """The file that solves it."""
    return next(SOLUTIONS.glob(f"{number:02}_*"))


def git_apply(patch: Path, folder: Path, *options) -> None:
    """Apply a patch, whose context must fit; lines may have moved."""
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", *options, str(patch)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, REFRESH.format(patch.name, done.stderr)


def added_lines(patch: Path) -> list[str]:
    return [s[1:] for s in patch.read_text().split("\n") if re.match(r"\+(?!\+\+ )", s)]


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the repository's tracked files, without the pictures."""
    root = tmp_path / "tree"
    for path in tracked():
        if path.suffix not in (".ipynb", ".png", ".gz"):
            target = root / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return root


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Preprocessed phantoms, for all exercises together."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def shell(tree, cache):
    """Run commands in the copy, as a reader does, but with shorter trainings: what they print."""
    python = tree.parent / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tree / "quick.py").write_text(BUDGET.replace("BENCHMARKS", str(tree / "benchmarks")))
    mine = ("TRITON_INTERPRET", "MIRROR_UNET_KERNELS")  # what conftest.py has set
    environment = {k: v for k, v in os.environ.items() if k not in mine and "PYTEST" not in k}
    environment["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"

    def run(script: str, expected: int = 0) -> str:
        script = script.replace("train.py", f"train.py {QUICK} --cache {cache}")
        script = script.replace(" --minutes 1", "")
        script = script.replace("benchmarks/budget.py", "quick.py")
        script = script.replace("--targets sm_80 sm_90", "--targets sm_90")
        script = script.replace("pytest -q", "pytest -q -p no:cacheprovider")
        command = ["bash", "-e", "-c", script]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        assert done.returncode == expected, f"{script}\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
        return done.stdout

    return run


def load(path: Path):
    """A file of the copy as a module; what it imports are the modules without the solution."""
    spec = importlib.util.spec_from_file_location(f"solved_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def last_step(tree: Path, run: str = "*") -> dict:
    """The numbers of the last training step of a run."""
    (path,) = tree.glob(f"runs/{run}/metrics.jsonl")
    rows = map(json.loads, path.read_text().splitlines())
    return [row for row in rows if "loss" in row][-1]


def refused(command: str) -> None:
    """Without the solution, train.py does not know these options."""
    with pytest.raises(UserError):
        build_model(parse_config(command.split()))


# ----------------------------------------------------------------------------- texts and patches
def test_every_exercise_has_a_row_a_check_and_a_solution_that_is_explained():
    numbers = [int(n) for n in re.findall(r"^## (\d+)\. ", TEXT, re.M)]
    assert numbers == list(range(1, 13)) and TEXT.startswith("# Twelve exercises\n")
    assert [int(n) for n in re.findall(r"^\| (\d+) \| \[", TEXT, re.M)] == numbers
    explained = (SOLUTIONS / "README.md").read_text()
    assert [int(n) for n in re.findall(r"^## (\d+)\. ", explained, re.M)] == numbers
    for number in numbers:
        assert commands(number) and "**Hint.**" in section(number)
        assert solution(number).name in explained
    assert len(list(SOLUTIONS.iterdir())) == len(numbers) + 1  # and README.md


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_a_patch_applies_and_its_lines_are_short(patch):
    git_apply(patch, ROOT, "--check")
    added = [line for line in added_lines(patch) if not line.startswith("|")]  # rows of tables
    assert added and max(map(len, added)) <= 100


def test_a_patch_that_does_not_apply_says_where_and_how_to_refresh_it(tmp_path):
    patch = SOLUTIONS / "02_tile.patch"
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "dice_ce.py").write_text("TILE = 1\n" * 400)
    with pytest.raises(AssertionError) as caught:
        git_apply(patch, tmp_path)
    message = str(caught.value)
    assert "patch failed: kernels/dice_ce.py:" in message
    assert "git apply --3way tutorials/solutions/02_tile.patch" in message


# -------------------------------------------------------------------------------------- the checks
@pytest.mark.slow
def test_1_the_bytes_are_those_that_were_predicted(shell):
    printed = json.loads(shell(commands(1)))
    assert printed == pytest.approx([16, 24], abs=0.1)
    assert printed != pytest.approx([9, 17], abs=0.1)  # a wrong prediction, for uint8, is seen
    table = shell(f"PYTHONPATH=.:benchmarks python {solution(1).relative_to(ROOT)}")
    rows = [list(map(float, re.findall(r"[\d.]+(?= |$)", s))) for s in table.split("\n")[1:-1]]
    assert [row[0] for row in rows] == [2, 2, 3, 2]
    for *_, forward, backward, counted_forward, counted_backward in rows:
        assert (counted_forward, counted_backward) == pytest.approx((forward, backward), abs=0.1)


@pytest.mark.slow
def test_2_a_large_tile_spills_in_the_sums_alone(tree, shell):
    def budget(expected: int) -> dict:
        """(registers, bytes spilled) of both kernels."""
        rows = re.findall(r"dice_ce (\w+) .*sm_90 +(\d+) +(\d+)", shell(commands(2), expected))
        return {name: (int(registers), int(spilled)) for name, registers, spilled in rows}

    before = budget(expected=0)
    git_apply(solution(2), tree)
    after = budget(expected=1)
    assert before["sums"][1] == before["grad"][1] == after["grad"][1] == 0
    assert after["sums"][0] == 255 and after["sums"][1] > 100
    assert before["grad"][0] < after["grad"][0] < 255


@pytest.mark.slow
def test_3_the_ct_acts_through_the_reconstruction_alone(shell):
    def steps(script: str) -> list[dict]:
        return [json.loads(line) for line in shell(script).split("\n") if '"step": 6' in line]

    silent = steps(commands(3))
    assert len(silent) == 2 and silent[0]["seg_ce"] == silent[1]["seg_ce"]
    assert silent[0]["grad_norm"] == silent[1]["grad_norm"]
    assert silent[0]["ct_l2"] != silent[1]["ct_l2"]
    heard = steps(commands(3).replace("--lambda-rec 0 ", "--lambda-rec 0.001 "))
    assert heard[0]["seg_ce"] != heard[1]["seg_ce"]
    seeds = {parse_config(["--corrupt", how]).random_seed for how in ("none", "shuffle")}
    assert len(seeds) == 2  # why two corruptions cannot be compared like this


@pytest.mark.slow
def test_4_another_share_set(tree, shell):
    refused("--model v1 --share 2 5 8")
    git_apply(solution(4), tree)
    shell(commands(4))
    assert last_step(tree)["step"] == 2
    (config,) = tree.glob("runs/*/config.json")
    assert json.loads(config.read_text())["share"] == [2, 5, 8]


@pytest.mark.slow
def test_5_another_corruption(tree, shell):
    refused("--model v1 --corrupt blank")
    git_apply(solution(5), tree)
    shell(commands(5))
    assert last_step(tree)["ct_l2"] > 0
    image = patches.torch.ones(1, 2, 9, 9, 9)
    y = load(tree / "patches.py").corrupt_ct(image, "blank", patches.torch.tensor([7]), size=4)
    assert (y[:, 0] == 0).sum() == 4**3 and (y[:, 1] == 1).all() and image.all()


@pytest.mark.slow
def test_6_another_metric(tree, shell):
    git_apply(solution(6), tree)
    with pytest.raises(KeyError):
        load(tree / "tests" / "test_metrics.py").test_two_of_three_lesions_are_found()
    table = shell(commands(6)).split("\n")
    header = next(i for i, line in enumerate(table) if line.startswith("case,"))
    assert "found" in table[header].split(",")
    assert table[header + 1].count(",") == table[header].count(",")


NOTEBOOK = (ROOT / "tutorials" / "03_kernels.py").read_text()


@pytest.mark.slow
def test_7_class_weights_in_the_kernels_of_the_notebook(tree, shell):
    """The notebook's kernels and their checks, up to its `Fused` and the logits; then the check."""
    cells = re.split(r"^# %%", NOTEBOOK, flags=re.M)
    code = [cell.partition("\n")[2] for cell in cells if "[markdown]" not in cell.split("\n")[0]]
    needed = r"^(os\.environ|from traffic|@jit|class Fused|def (exact_|check_[sg])|exact_loss)"
    before = [cell for cell in code if re.search(needed, cell, re.M) and "plt.show()" not in cell]
    last = next(i for i, cell in enumerate(before) if "exact_loss, _ = dice_ce_ref" in cell)
    before = before[: last + 1]
    check = commands(7)
    after = ["assert abs(loss - wanted) < 1e-6 and (grad - exact).abs().max() < 1e-6"]
    after += ["moved = measure(lambda x, y: Fused.apply(x, y, 5.0), (logits, labels))"]
    after += ["print(sum(p.bytes for p in moved) / labels.numel())"]
    without = ["try:", *(f"    {line}" for line in check.split("\n"))]
    without += ["except TypeError:", "    print('not without the solution')"]
    script = [*before, *without, solution(7).read_text(), check, *after]
    (tree / "cells.py").write_text("\n".join(script))
    *_, refusal, errors, moved, _ = shell("MPLBACKEND=agg python cells.py").split("\n")
    assert refusal == "not without the solution" and "tensor" in errors
    assert float(moved) == pytest.approx(26, abs=0.1)


@pytest.mark.slow
def test_8_a_new_task_for_the_bottleneck(tree, shell):
    refused("--model v5")
    git_apply(solution(8), tree)
    shell(commands(8))
    assert {"seg_dice", "ct_l2", "light_dice", "light_ce"} <= set(last_step(tree))


@pytest.mark.slow
def test_9_a_tversky_term(tree, shell, monkeypatch):
    git_apply(solution(9), tree)
    tests = load(tree / "tests" / "test_dice_ce.py")
    with pytest.raises(AttributeError, match="ALPHA"):
        tests.test_tversky_by_hand(monkeypatch, tests.dice_ce_plain, 0.3, 0.7)
    assert "1 kernels compiled, 0 over budget" in shell(commands(9))


@pytest.mark.slow
def test_10_a_third_modality(tree, shell):
    refused("--data phantom-brain --model three")
    git_apply(solution(10), tree)
    shell(commands(10))
    assert {"core_dice", "whole_dice", "edema_dice", "second_dice"} <= set(last_step(tree))
    solved, aug = load(tree / "patches.py"), patches.Augmentation(0.5, rotate=0.5, gamma=0.5)
    for n in range(20):  # two channels are drawn as before, and so is what is drawn after them
        old, new = (patches.random_stream(n) for _ in range(2))
        a, b = patches.draw_augmentation(old, aug), solved.draw_augmentation(new, aug)
        assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
        assert old.random() == new.random()


@pytest.mark.slow
def test_11_another_data_layout(tree, shell, tmp_path):
    touch(tmp_path / "R", [f"{kind}/A.nii.gz" for kind in ("CT", "PET", "SEG")])
    with pytest.raises(UserError, match="no studies in its 3 NIfTI files"):
        data.find_cases(tmp_path / "R", "petct")
    git_apply(solution(11), tree)
    shell(commands(11))
    (case,) = load(tree / "layouts.py").find_cases(tmp_path / "R", "petct")[0]
    assert case.images[1] == tmp_path / "R/PET/A.nii.gz"


@pytest.mark.slow
def test_12_a_focal_loss(tree, shell):
    git_apply(solution(12), tree)
    tests = load(tree / "tests" / "test_dice_ce.py")
    with pytest.raises(AssertionError):
        tests.test_focal_by_hand(tests.dice_ce_plain, 2)
    printed = shell(commands(12))
    ours, eager = (json.loads(line) for line in printed.split("\n") if line.startswith("["))
    assert ours == pytest.approx([9, 17], abs=0.1)
    assert sum(eager) > 600
    assert "2 kernels compiled, 0 over budget" in printed
