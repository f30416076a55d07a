"""train.py: a step, the run folder, resuming, and what is said if something is wrong."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_data import refused
from torch.utils.data import DataLoader

import phantom
from config import Config, parse_config
from mirror_unet import TASKS
from train import Run, averaged, learning_rate, load_cases, main, prepare_folder

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = (
    "--patch 32 32 32 --channels 2 3 4 5 6 --spacing 10 10 10 --batch 2 --validations 2 "
    "--overlap 0 --no-flips"
).split()


@pytest.fixture(scope="session")
def petct_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("petct")
    phantom.write_petct(root, 6, spacing=(10.0, 10.0, 10.0))
    return root


@pytest.fixture(scope="session")
def brain_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("brain")
    phantom.write_brain(root, 3, spacing=(5.0, 5.0, 5.0))
    return root


@pytest.fixture
def arguments(petct_root, tmp_path):
    """Options of a run of seconds; the session's runs share a cache."""
    options = {"--data": "petct", "--root": petct_root, "--cache": petct_root.parent / "cache"}
    options |= {"--folds": 2, "--out": tmp_path / "run"}
    return [str(word) for option in options.items() for word in option] + SMALL


def make_run(args) -> Run:
    """A run that is ready for its first step."""
    c = parse_config(args)
    cases = load_cases(c)
    prepare_folder(c)
    return Run(c, *cases)


def log_of(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in log_of(folder) if "loss" in row]


def table(path: Path) -> list[dict[str, str]]:
    with open(path) as f:
        return list(csv.DictReader(f))


def first_batch(run: Run) -> dict[str, torch.Tensor]:
    return next(iter(DataLoader(run.patches, run.c.batch)))


def slow(value):
    """A case that only `make test-all` runs."""
    return pytest.param(value, marks=pytest.mark.slow)


# ------------------------------------------------------------------------------------------ studies
def test_patients_without_tumor_can_be_left_out(arguments):
    def names(*options):
        return [[k.name for k in side] for side in load_cases(parse_config([*arguments, *options]))]

    sides = load_cases(parse_config(arguments))
    positive = [[k.name for k in side if k.tumor] for side in sides]
    assert names() == [[k.name for k in side] for side in sides] != positive
    assert names("--no-negatives") == positive


def test_folds_share_no_patient_and_hold_every_patient_out_once(arguments):
    held_out = []
    for fold in ("0", "1"):
        train, val = load_cases(parse_config([*arguments, "--fold", fold]))
        assert not {k.patient for k in train} & {k.patient for k in val}
        held_out += [k.name for k in val]
    assert len(set(held_out)) == len(held_out) == len(train) + len(val)


# -------------------------------------------------------------------------------------------- steps
def test_schedules_by_hand():
    def rates(schedule, *shares):
        c = Config(schedule=schedule, lr=2.0)
        return [learning_rate(c, t) for t in shares]

    assert rates("cosine", 0, 0.5, 1) == pytest.approx([2, 1, 0])
    assert rates("step", 0, 0.624, 0.626) == pytest.approx([2, 2, 0.2])  # epoch 250 of 400
    assert rates("poly", 0, 0.5, 1) == pytest.approx([2, 2 * 0.5**0.9, 0])
    assert rates("constant", 0, 0.9) == [2, 2]


@pytest.mark.parametrize(
    "options",
    [
        "",
        slow("--optimizer sgd --lr 0.01"),
        slow("--norm batch"),
        slow("--amp bf16 --patch 48 16 16"),
        slow("--no-channels-last"),
    ],
)
def test_the_loss_falls_on_one_batch(arguments, options):
    fixed = "--model v2 --patch 32 16 16 --lr 0.01 --schedule constant --corrupt none".split()
    run = make_run([*arguments, *fixed, *options.split()])
    batch = first_batch(run)
    values = [run.train_step(batch)["loss"] for _ in range(15)]
    assert all(map(math.isfinite, values))
    assert values[-1] < 0.75 * values[0]


def test_a_step_reports_its_loss_parts_gradient_norm_and_learning_rate(arguments):
    run = make_run([*arguments, "--model", "v3", "--steps", "10", "--clip", "1e-9"])
    before = [p.clone() for p in run.model.parameters()]
    row = run.train_step(first_batch(run))
    parts = ("seg_dice", "seg_ce", "ct_l2", "pet_l2", "cls_bce")
    assert tuple(row) == ("loss", *parts, "grad_norm", "step", "lr")
    dice, ce, ct, pet, cls = (row[part] for part in parts)
    total = 0.5 * (dice + ce) + 1e-3 * (ct + pet) / 2 + 1e-2 * cls
    assert row["loss"] == pytest.approx(total, rel=1e-5)
    assert row["lr"] == run.c.lr
    norms = [p.grad.norm() for p in run.model.parameters()]
    assert torch.stack(norms).norm().item() == pytest.approx(1e-9, rel=1e-2)  # clipped
    assert row["grad_norm"] > 1e-3  # as it was before
    moved = [not torch.equal(p, q) for p, q in zip(run.model.parameters(), before, strict=True)]
    assert any(moved)


def test_the_moving_average_counts_each_weight_once(arguments):
    shared = ["--ema", "0.9", "--share", "4", "5", "6"]
    run = make_run([*arguments, "--model", "v2", "--steps", "9", *shared])
    before = {name: t.clone() for name, t in run.model.state_dict().items()}
    run.train_step(first_batch(run))
    average = run.ema_model.state_dict()
    for name, now in run.model.state_dict().items():
        expected = 0.1 * before[name] + 0.9 * now  # the first decay is (1 + 0) / (10 + 0)
        torch.testing.assert_close(average[name], expected, msg=name)
    addresses = [t.data_ptr() for t in averaged(run.model)]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.slow
def test_a_time_limit_ends_a_run_and_its_schedule(arguments, monkeypatch):
    monkeypatch.setattr(Run, "report", lambda *_: None)  # pictures take time
    run = make_run([*arguments, "--model", "v1", "--steps", "100000", "--minutes", "0.02"])
    run.train()
    assert run.progress() == 1 and 0 < run.step < 100_000
    rates = [row["lr"] for row in log_of(run.folder) if "lr" in row]
    assert rates[0] == pytest.approx(1e-3) and rates[-1] < rates[0] / 2


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(arguments):
    run = make_run([*arguments, "--model", "v1", "--steps", "4"])
    with torch.no_grad():
        next(run.model.parameters()).fill_(math.nan)
    with refused("the loss is nan at step 1: try a smaller --lr, or --amp off"):
        run.train()


# --------------------------------------------------------------------------------------- the folder
@pytest.mark.parametrize("model", ["v3", *map(slow, ("v1", "v2", "v4"))])
def test_a_run_leaves_everything_in_its_folder(arguments, tmp_path, model):
    main([*arguments, "--model", model, "--steps", "4"])
    folder = tmp_path / "run"
    files = "config.json metrics.jsonl last.pt best.pt curves.png validation.png validation.csv"
    assert {path.name for path in folder.iterdir()} == set(files.split())

    rows = table(folder / "validation.csv")
    assert len(rows) == len({row["case"] for row in rows}) >= 2
    negative = [row for row in rows if row["has_tumor"] == "False"]
    assert all(row["dice"] == row["fnv_ml"] == "" and row["fpv_ml"] for row in negative)
    assert all(bool(row["tumor_score"]) == (model == "v3") for row in rows)

    log = log_of(folder)
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in log if "val" in row] == [2, 4]
    (threshold,) = [row for row in log if "suv_threshold" in row]
    assert 0.5 <= threshold["suv_threshold"] <= 50

    state = torch.load(folder / "last.pt", weights_only=True)
    assert state["step"] == 4 and state["finished"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model"] == model
    assert Config.from_dict(config, "json") == Config.from_dict(state["config"], "pt")


@pytest.mark.parametrize("model", ["v2", slow("v1")])
def test_the_brain_trains(brain_root, tmp_path, model):
    args = ["--data", "brain", "--root", brain_root, "--cache", tmp_path / "c", "--folds", 3]
    args += [*SMALL, "--spacing", 5, 5, 5, "--model", model, "--steps", 2, "--validations", 1]
    main([*map(str, args), "--out", str(tmp_path / "run")])
    rows = table(tmp_path / "run" / "validation.csv")
    assert tuple(row["target"] for row in rows) == TASKS["brain"][model]


def test_a_resumed_run_is_the_same_run_bit_for_bit(arguments, tmp_path, monkeypatch):
    """Stopped in step 3 of 6 by the signal that Ctrl-C sends, and continued."""
    monkeypatch.setattr(Run, "report", lambda *_: None)  # pictures take time
    args = [*arguments, "--model", "v3", "--steps", "6", "--ema", "0.9"]
    main(args)
    args[args.index("--out") + 1] = str(tmp_path / "halves")
    run = make_run(args)
    (run.folder / "config.json").write_text(json.dumps(run.c.to_dict()))
    step = run.train_step

    def step_and_signal(batch):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(batch)

    run.train_step = step_and_signal
    with pytest.raises(SystemExit, match="stopped after step 3; to continue: python train.py"):
        run.train()
    run.log({"step": 4, "loss": -1.0})  # later than the checkpoint: cut when the run resumes
    main(["--resume", "--out", args[args.index("--out") + 1]])
    if torch.cuda.is_available():  # cuDNN sums a weight's gradient in any order
        assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "run"), rel=1e-3)
        return
    assert losses(tmp_path / "halves") == losses(tmp_path / "run")
    files = (tmp_path / folder / "last.pt" for folder in ("run", "halves"))
    a, b = (torch.load(file, weights_only=True)["model"] for file in files)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_folder_with_other_files_is_never_written_into_unasked(arguments, tmp_path):
    notes = tmp_path / "run" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    old = notes.with_name("last.pt")
    old.write_text("of an earlier run")
    with refused("run holds a run; name another with --out, continue it with --resume"):
        prepare_folder(parse_config(arguments))
    assert old.exists()
    prepare_folder(parse_config([*arguments, "--overwrite"]))
    assert notes.read_text() == "mine" and not old.exists()


def test_run_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        c = parse_config([])
        prepare_folder(c)
        names.append(c.out)
    base = "runs/phantom-v3-fold0"
    assert names == [base, f"{base}-2", f"{base}-3"]


def test_an_interrupted_write_leaves_the_old_checkpoint(arguments, monkeypatch):
    run = make_run([*arguments, "--model", "v1", "--steps", "4"])
    run.save("last.pt")
    before = (run.folder / "last.pt").read_bytes()
    write = Path.write_bytes

    def write_half(path, content):
        write(path, content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(KeyboardInterrupt):
        run.save("last.pt")
    assert (run.folder / "last.pt").read_bytes() == before
    assert [path.name for path in run.folder.iterdir()] == ["last.pt"]


@pytest.mark.slow
def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    options = ["--patch", "40", "32", "32"]
    command = [sys.executable, str(ROOT / "train.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "use (32, 32, 32)" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_default_run_reaches_the_dice_that_the_readme_promises(tmp_path):
    """Minutes on two cores: a v3 on the phantom, Dice >= 0.75 on held-out patients."""
    command = [sys.executable, str(ROOT / "train.py"), "--out", str(tmp_path / "run")]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0
    rows = table(tmp_path / "run" / "validation.csv")
    dice = [float(row["dice"]) for row in rows if row["dice"]]
    assert len(dice) >= 4
    assert np.mean(dice) >= 0.75
