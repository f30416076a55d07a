"""The training program: config, a step, the run folder, resuming, and what it says when something is wrong."""

import csv
import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import phantom
import train
from files import UserError
from train import PRESETS, Config, Run, learning_rate, load_cases, main, parse_config, prepare_folder, summarise

SMALL = "--patch 32 32 32 --channels 2 3 4 5 6 --spacing 10 10 10 --batch 2 --validations 2 --overlap 0 --no-flips".split()


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
    """Of a run of seconds; its cache is shared with the session's other runs."""
    return [
        "--data",
        "petct",
        "--root",
        str(petct_root),
        "--cache",
        str(petct_root.parent / "cache"),
        "--folds",
        "2",
        "--out",
        str(tmp_path / "run"),
        *SMALL,
    ]


def make_run(args):
    c = parse_config(args)
    cases = load_cases(c)
    prepare_folder(c)
    return Run(c, *cases)


def losses(folder):
    return [r["loss"] for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in r]


# ------------------------------------------------------------------------------------------------------------- config
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_config(name):
    c = parse_config(["--preset", name, "--root", "x", "--model", "v2"])
    assert all(p % 16 == 0 for p in c.patch) and len(c.channels) == 5
    assert {k: v for k, v in dataclasses.asdict(c).items() if k in PRESETS[name]} == PRESETS[name]


def test_the_papers_recipes_are_the_papers():
    c = parse_config(["--preset", "autopet", "--root", "x"])
    assert (c.spacing, c.ct_window, c.suv_window, c.patch) == ((2.0, 2.0, 3.0), (-100.0, 250.0), (0.0, 15.0), (96, 96, 96))
    assert (c.optimizer, c.lr, c.weight_decay, c.schedule, c.patches_per_case) == ("adam", 1e-3, 1e-5, "step", 4)
    assert (c.positive, c.rotate, c.scale, c.flip, c.cube, c.sigma) == (2 / 3, 0.2, 0.2, 0.5, 16, 0.3)
    assert (c.lambda_seg, c.lambda_rec, c.lambda_cls, c.channels) == (0.5, 1e-3, 1e-2, (16, 32, 64, 128, 256))
    assert (c.data, c.model, c.corrupt) == ("petct", "v3", "shuffle")
    b = parse_config(["--preset", "brats", "--root", "x"])
    assert (b.data, b.model) == ("brain", "v2")
    assert (b.spacing, b.patch, b.corrupt) == ((1.0, 1.0, 1.0), (224, 224, 144), "none")


def test_options_win_over_the_preset_and_a_budget_over_its_budget():
    def budget(*options):
        c = parse_config([*options])
        return c.steps, c.minutes

    petct, paper = ["--data", "petct", "--root", "x"], ["--preset", "autopet", "--root", "x"]
    assert parse_config(["--lr", "0.5"]).lr == 0.5
    steps, minutes = budget()
    assert 0 < steps < 2000 and not minutes  # the same training, however busy the machine
    assert budget("--steps", "7") == (7, 0) and budget("--minutes", "3") == (100_000, 3)
    assert budget("--steps", "7", "--minutes", "3") == (7, 3)
    assert budget(*petct) == (100_000, 12) and budget(*petct, "--steps", "7") == (7, 0) and budget(*petct, "--minutes", "3") == (100_000, 3)
    assert budget(*paper, "--minutes", "3") == (320_000, 3)
    assert parse_config(["--share"]).share == () and parse_config(["--share", "4", "5"]).share == (4, 5)
    assert parse_config(["--no-channels-last"]).channels_last is False


def test_the_corruption_follows_the_version():
    assert parse_config(["--model", "v1"]).corrupt == "shuffle"
    assert parse_config(["--model", "v4"]).corrupt == "none"
    with pytest.raises(UserError, match="reconstructs no CT"):
        parse_config(["--model", "v4", "--corrupt", "noise"])


@pytest.mark.parametrize(
    "args,message",
    [
        ("--data petct", "--root"),
        ("--data mouse", "phantom, petct, brain"),
        ("--optimizer lion", "adam, adamw, sgd"),
        ("--patch 32 32", "takes 3 numbers"),
        ("--amp fp16 --device cpu", "bf16"),
        ("--amp bf16 --device cpu --patch 32 32 32", "not 32"),
        ("--corrupt blur", "none, noise, shuffle"),
        ("--resume --out nowhere", "no run to resume"),
    ],
)
def test_options_that_cannot_work_are_refused_in_a_sentence(args, message):
    with pytest.raises(UserError, match=message):
        parse_config(args.split())


def test_no_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="sees no CUDA device"):
        parse_config(["--device", "cuda"])


def test_the_brain_has_a_version_of_its_own_by_default():
    for source in ("brain", "phantom-brain"):
        c = parse_config(["--data", source, "--root", "x"])
        assert (c.model, c.kind, c.corrupt) == ("v2", "brain", "none")


def test_healthy_patients_can_be_left_out(arguments):
    with_, without = (load_cases(parse_config([*arguments, *more])) for more in ([], ["--no-healthy"]))
    assert sum(not k.tumor for side in with_ for k in side) > 0
    assert [[k.name for k in side if k.tumor] for side in with_] == [[k.name for k in side] for side in without]


def test_schedules():
    at = lambda name, t: learning_rate(Config(schedule=name, lr=2.0), t)  # noqa: E731
    assert [at("cosine", t) for t in (0, 0.5, 1)] == pytest.approx([2, 1, 0])
    assert [at("step", t) for t in (0, 0.624, 0.626)] == pytest.approx([2, 2, 0.2])  # epoch 250 of 400
    assert at("poly", 0.5) == pytest.approx(2 * 0.5**0.9) and at("constant", 0.9) == 2


# ------------------------------------------------------------------------------------------------------------ training
@pytest.mark.parametrize("model", ["v1", "v2", "v3", "v4"])
def test_a_run_leaves_everything_in_its_folder(arguments, model):
    main([*arguments, "--model", model, "--steps", "4"])
    folder = train.Path(arguments[arguments.index("--out") + 1])
    names = {p.name for p in folder.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "last.pt", "best.pt", "curves.png", "validation.png", "validation.csv"}
    rows = list(csv.DictReader(open(folder / "validation.csv")))
    assert len(rows) == len({r["case"] for r in rows}) >= 2
    healthy = [r for r in rows if r["has_tumor"] == "False"]
    assert all(r["dice"] == r["fnv_ml"] == "" and r["fpv_ml"] for r in healthy)
    assert all(bool(r["tumor_score"]) == (model == "v3") for r in rows)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    parts = {"v1": {"ct_l2"}, "v2": {"ct_l2", "pet_l2"}, "v3": {"ct_l2", "pet_l2", "cls_bce"}, "v4": set()}[model] | {"seg_dice", "seg_ce"}
    assert parts <= set(log[0]) and [r["step"] for r in log if "loss" in r] == [1, 2, 3, 4]
    state = torch.load(folder / "last.pt", weights_only=True)
    assert state["step"] == 4 and state["config"]["model"] == model


@pytest.mark.parametrize("model", ["v1", "v2"])
def test_the_brain_trains(brain_root, tmp_path, model):
    args = ["--data", "brain", "--root", str(brain_root), "--cache", str(tmp_path / "c"), "--folds", "3", "--out", str(tmp_path / "r")]
    main([*args, *SMALL, "--spacing", "5", "5", "5", "--model", model, "--steps", "2", "--validations", "1"])
    rows = list(csv.DictReader(open(tmp_path / "r" / "validation.csv")))
    assert [r["target"] for r in rows] == (["core", "whole", "edema"] if model == "v2" else ["core", "edema"])


@pytest.mark.parametrize("options", ["", "--optimizer sgd --lr 0.01", "--norm batch", "--amp bf16 --patch 48 32 32", "--no-channels-last"])
def test_the_loss_falls_on_one_batch(arguments, options):
    fixed = "--model v2 --steps 1000 --lr 0.01 --schedule constant --corrupt none".split()
    run = make_run([*arguments, *fixed, *options.split()])
    batch = next(iter(train.DataLoader(run.patches, 2)))
    values = [run.train_step(batch)["loss"] for _ in range(25)]
    assert all(map(math.isfinite, values)) and sum(values[-3:]) < 0.8 * sum(values[:3])


def test_a_run_is_reproducible_and_a_resumed_one_is_the_same_run(arguments, tmp_path):
    """Stopped at step 3 of 6, by the signal that Ctrl-C sends, and taken up again: bit for bit the losses of the run that went through."""
    out = arguments.index("--out") + 1
    args = [*arguments, "--model", "v3", "--steps", "6", "--ema", "0.9"]
    main(args)
    whole = losses(train.Path(args[out]))
    args[out] = str(tmp_path / "halves")
    run = make_run(args)
    (run.folder / "config.json").write_text(json.dumps(dataclasses.asdict(run.c)))
    step = run.train_step

    def step_and_signal(batch):
        if run.step == 2:
            os.kill(os.getpid(), train.signal.SIGINT)
        return step(batch)

    run.train_step = step_and_signal
    with pytest.raises(SystemExit, match="stopped after step 3; go on with"):
        run.train()
    run.log({"step": 4, "loss": -1.0})  # a line written after the checkpoint: dropped when the run is taken up
    main(["--resume", "--out", args[out]])
    assert losses(tmp_path / "halves") == whole
    a, b = (torch.load(train.Path(f) / "last.pt", weights_only=True)["model"] for f in (tmp_path / "run", tmp_path / "halves"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_running_mean_averages_each_weight_once(arguments):
    run = make_run([*arguments, "--model", "v2", "--steps", "9", "--ema", "0.9", "--share", "4", "5", "6"])
    start = {k: v.clone() for k, v in run.net.state_dict().items()}
    run.train_step(next(iter(train.DataLoader(run.patches, 2))))
    for name, now in run.net.state_dict().items():  # the first decay is (1 + 0) / (10 + 0)
        torch.testing.assert_close(run.mean_net.state_dict()[name], 0.1 * start[name] + 0.9 * now, msg=name)


def test_a_time_limit_ends_a_run_and_its_schedule(arguments):
    run = make_run([*arguments, "--model", "v1", "--steps", "100000", "--minutes", "0.02"])
    run.train()
    assert run.progress() == 1 and 0 < run.step < 1000
    log = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    rates = [r["lr"] for r in log if "lr" in r]
    assert rates[0] == pytest.approx(1e-3) and rates[-1] < rates[0] / 2


def test_a_run_folder_is_never_overwritten_unasked(arguments, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        prepare_folder(parse_config(arguments))
    prepare_folder(parse_config([*arguments, "--overwrite"]))
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        c = parse_config([])
        prepare_folder(c)
        names.append(c.out)
    assert names == ["runs/phantom-v3-fold0", "runs/phantom-v3-fold0-2", "runs/phantom-v3-fold0-3"]


def test_an_interrupted_write_leaves_the_old_checkpoint(arguments, monkeypatch):
    run = make_run([*arguments, "--model", "v1", "--steps", "4"])
    run.save("last.pt")
    before = (run.folder / "last.pt").read_bytes()

    write = train.Path.write_bytes

    def half(path, content):
        write(path, content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Path, "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        run.save("last.pt")
    assert (run.folder / "last.pt").read_bytes() == before
    assert {p.name for p in run.folder.iterdir()} == {"last.pt"}


def test_summary_leaves_undefined_numbers_out():
    row = {"target": "seg", "tumor_score": 0.9, "has_tumor": True, "dice": 0.5, "fpv_ml": 2.0, "fnv_ml": 4.0}
    healthy = row | {"has_tumor": False, "tumor_score": 0.1, "dice": math.nan, "fnv_ml": math.nan, "fpv_ml": 4.0}
    got = summarise([row, healthy], ("seg",))
    assert (got["seg_dice"], got["seg_fpv_ml"], got["seg_fnv_ml"], got["patient_auc"]) == (0.5, 3.0, 4.0, 1.0)


def test_errors_are_one_line_and_exit_code_2(tmp_path):
    def call(*args):
        return subprocess.run([sys.executable, str(ROOT / "train.py"), *args], capture_output=True, text=True, cwd=tmp_path)

    petct = ["--data", "petct", "--root", str(tmp_path)]
    for args in (petct, [*petct, "--model", "v9"], [*petct, "--patch", "40", "32", "32"], ["--channels", "4", "8"]):
        done = call(*args)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_default_run_keeps_what_the_readme_promises(tmp_path):
    """Minutes on two cores: a v3 on the phantom, Dice >= 0.75 on held-out patients."""
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--out", str(tmp_path / "run")], cwd=tmp_path)
    assert done.returncode == 0
    dice = [float(r["dice"]) for r in csv.DictReader(open(tmp_path / "run" / "validation.csv")) if r["dice"]]
    assert len(dice) >= 4 and sum(dice) / len(dice) >= 0.75
