"""The paper's claims as experiments: the list is sound, nothing is run twice or lost, intervals and verdicts are what they say they are."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy import stats

import claims
import replicate
import train
from claims import CLAIMS, EXPERIMENTS, NOT_SEEN, OPEN, SEEN, Claim, Estimate, Order, judge, read_rows, verdict
from files import UserError
from metrics import bootstrap_means, interval, write_table
from mirror_unet import VERSIONS, MirrorOutput

TINY = "--phantoms 6 --spacing 10 10 10 --patch 32 32 32 --channels 2 3 4 5 6 --folds 2".split()


# ------------------------------------------------------------------------------------------------------- the experiments
def test_each_claim_has_its_experiments_and_each_experiment_its_claim():
    assert {c.number for c in CLAIMS} == set(range(1, 10))
    defined = [(e.data, e.name) for e in EXPERIMENTS]
    assert len(set(defined)) == len(defined)
    named = {(c.data, name) for c in CLAIMS for name in claims.systems_of(c)}
    assert named == set(defined)
    assert all(o.measure in claims.MEASURES and o.better != o.worse for c in CLAIMS for o in c.orders)
    assert [e.name for e in claims.experiments_for([1], [], "laptop")] == ["v1", "v2", "v3", "v4"]
    assert [e.name for e in claims.experiments_for([2], [], "laptop")] == ["v2", "v2 noise", "v2 none"]
    assert {e.name for e in claims.experiments_for([2], [], "paper")} >= {"v1 none", "v3 noise"}
    assert {e.data for e in claims.experiments_for([6], [], "laptop")} == {"brain"}


def test_each_experiments_options_are_train_pys():
    """Of the systems whose network is here, and no two of one data are the same run."""
    configs = []
    for e in EXPERIMENTS:
        model = e.options.split()[1]
        if model in VERSIONS["petct"] or (ROOT / "baselines.py").exists():
            common = replicate.PRESETS["laptop"][e.data].split() + (["--root", "x"] if e.data == "petct" else [])
            c = train.parse_config([*common, *e.options.split()])
            assert c.model == model and c.steps < 1000 and not c.minutes and not c.flips
            configs.append((e.data, json.dumps(replicate.options_that_matter(c))))
    assert len(configs) >= 20 and len(set(configs)) == len(configs)
    share = {e.name: train.parse_config(e.options.split()).share for e in EXPERIMENTS if "share" in e.name}
    assert share["v2 share 3"] == (3,) and share["v2 share 4 5 6"] == (4, 5, 6) and len(share) == 6


@pytest.mark.parametrize(
    "args,message",
    [
        ("--claims 12", "there are claims 1 to 9"),
        ("--claims 1 --only v7", "no such system"),
        ("--claims 6 --only ct", "not among the systems"),
        ("", "say which claims"),
        ("--preset paper --claims 1", "needs --root"),
        ("--preset paper --claims 6", "needs --brain-root"),
        ("--claims 1 --folds 9", "folds 0 to 1"),
        ("--claims 1 --jobs -2", "give 1 or more"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_sentence(args, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(replicate, "splits_of", lambda c: FOLDS)
    with pytest.raises(UserError, match=message):
        replicate.main(args.split())


# ------------------------------------------------------------------------------------------------------------- the runs
FOLDS = [[["a", "b"], ["c", "d"]], [["c", "d"], ["a", "b"]]]
FAKE = """
    import csv, json, os, pathlib, sys, time
    folder, argv = pathlib.Path(sys.argv[1]), sys.argv[2:]
    model, fold = argv[argv.index("--model") + 1], argv[argv.index("--fold") + 1]
    with open("started.txt", "a") as f: f.write(f"{model} {fold}\\n")
    print("step 1\\rstep 2")
    if os.path.exists("slow"):
        os.read(0, 1)  # until the parent lets go
        sys.exit(1)
    if os.path.exists(f"fail {model}"): sys.exit("error: the disk is full")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 7, "loss": 0.5, "seconds": 1.5}) + "\\n" + json.dumps({"val": {}}) + "\\n")
    with open(folder / "validation.csv", "w") as f:
        f.write("case,target,dice,fpv_ml,fnv_ml,pred_ml,truth_ml,has_tumor,tumor_score\\n")
        for case in ("c", "d") if fold == "0" else ("a", "b"):
            f.write(f"{case},seg,0.{ord(case)}{ord(model[-1])},0.1234567890123456,,3,4,True,\\n")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """replicate.py with a train.py of milliseconds, in an empty folder. Call it with options; it returns which runs were started."""
    (tmp_path / "fake.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(replicate, "COMMAND", [sys.executable, str(tmp_path / "fake.py")])
    monkeypatch.setattr(replicate, "splits_of", lambda c: FOLDS)

    def call(*args: str) -> list[str]:
        Path("started.txt").write_text("")
        replicate.main(["--claims", "1", "--jobs", "2", *args])
        return sorted(Path("started.txt").read_text().splitlines())

    return call


def test_a_run_that_ended_is_never_repeated_and_other_options_are_another_run(fake, capsys):
    four = ["v1 0", "v2 0", "v3 0", "v4 0"]
    assert fake() == four  # the stand-in's first fold
    assert "[4/4] demo, v" in capsys.readouterr().out
    assert fake() == []
    assert "4 runs, 4 of them in results already" in capsys.readouterr().out
    before = Path("results/demo.csv").read_bytes()
    shutil.rmtree("runs")  # a fresh clone: only the csv file is there
    assert fake("--folds", "0", "1") == ["v1 1", "v2 1", "v3 1", "v4 1"]
    assert fake("--only", "v2", "--seeds", "0", "3", "--folds", "1") == ["v2 1"]
    assert fake("--", "--lr", "0.5") == four and fake("--", "--lr", "0.5", "--device", "cpu", "--cache", "elsewhere") == []
    after = Path("results/demo.csv").read_bytes()
    rows = read_rows(Path("results/demo.csv"))
    assert set(before.splitlines()) <= set(after.splitlines()) and len(rows) == 2 * (4 + 4 + 1 + 4)
    one = next(r for r in rows if r["system"] == "v2" and r["fold"] == "0")
    want = {"case": "c", "fpv_ml": "0.1234567890123456", "fnv_ml": "", "steps": "7", "seconds": "1.5", "folds": "2", "ct_clean": ""}
    assert want.items() <= one.items() and "--model v2 --fold 0 --seed 0" in one["options"] and len(one["commit"]) >= 7
    assert "## Study" in Path("results/demo.md").read_text() and Path("results/demo.png").exists()


def test_the_first_estimate_knows_the_networks_of_full_resolution(fake, capsys):
    fake("--claims", "5", "--only", "v1", "v2", "nnunet", "--folds", "0", "1")
    assert "about 40 min at 5 minutes" in capsys.readouterr().out  # (4 x 5 + 2 x 30) / 2
    fake("--claims", "5", "--only", "v3", "blackbean", "--jobs", "5")
    assert "about 30 min at 5 minutes" in capsys.readouterr().out  # the longest


def test_a_run_that_fails_stops_no_other_and_is_named(fake, capsys):
    Path("fail v2").touch()
    with pytest.raises(SystemExit) as error:
        fake()
    named = "1 of 4 runs failed:\ndemo, v2, fold 0, seed 0: error: the disk is full (all of it: runs/replicate/laptop/demo/v2-"
    assert named in str(error.value)
    assert {r["system"] for r in read_rows(Path("results/demo.csv"))} == {"v1", "v3", "v4"}
    Path("fail v2").unlink()
    assert fake() == ["v2 0"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_the_runs_save_and_says_how_to_go_on(fake, number):
    Path("slow").touch()
    starting = replicate.start

    def start_and_signal(run, *args):
        process = starting(run, *args)
        if run.experiment.name == "v2":
            os.kill(os.getpid(), number)
        return process

    replicate.start = start_and_signal
    try:
        with pytest.raises(SystemExit, match="stopped with 0 of 4 runs ended; the same command goes on"):
            fake()
    finally:
        replicate.start = starting
    Path("slow").unlink()
    assert fake() == ["v1 0", "v2 0", "v3 0", "v4 0"]


def test_what_serves_two_claims_is_run_once(monkeypatch):
    """AutoPET has healthy patients: with the paper's preset claim 9's v2 and v3, which the laptop trains on the phantom, are claim 1's."""
    monkeypatch.setattr(replicate, "splits_of", lambda c: FOLDS)
    a, extra = replicate.options_of("--preset paper --claims 1 9 --root x --folds 0".split())
    assert [(r.source, r.experiment.name) for r in replicate.plan(a, extra)] == [("petct", v) for v in ("v1", "v2", "v3", "v4")]


def test_rows_are_in_one_order_whatever_ended_first(fake):
    fake("--folds", "1", "--only", "v3")
    fake("--folds", "0", "1")
    keys = [(r["system"], r["fold"], r["case"]) for r in read_rows(Path("results/demo.csv"))]
    assert keys == sorted(keys) and len(keys) == 16


def test_the_reconstruction_error_is_that_of_the_held_out_ct(tmp_path, monkeypatch):
    """A network that returns its input errs by nothing on the clean CT, and by sigma, in HU, on a noisy one."""
    monkeypatch.chdir(tmp_path)
    c = train.parse_config(["--model", "v1", "--steps", "1", *TINY])

    class Identity(torch.nn.Module):
        def forward(self, x):
            return MirrorOutput(seg=None, ct=x[:, :1])

    monkeypatch.setattr(replicate, "load_model", lambda *a: (Identity(), {}))
    replicate.reconstruction_errors(tmp_path, c)
    rows = read_rows(tmp_path / "reconstruction.csv")
    assert {r["case"] for r in rows} == {k.name for k in train.load_cases(c)[1]}
    for r in rows:
        assert float(r["ct_clean"]) < 1e-4
        assert 0.8 * 105 < float(r["ct_noise"]) < 1.02 * 105  # 0.3 of 350 HU, less where two windows overlap
        assert 0 < float(r["ct_shuffle"]) < float(r["ct_noise"])


# --------------------------------------------------------------------------------------------- real runs, killed and taken up
def tiny(folder: Path, steps: int) -> subprocess.Popen:
    args = ["--claims", "1", "--only", "v2", "v3", "--jobs", "2", "--", *TINY, "--steps", str(steps), "--checkpoint-minutes", "0.01"]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "replicate.py"), *args], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_a_replication_killed_in_the_middle_is_the_one_that_went_through(tmp_path):
    """SIGKILL to replicate.py alone: its runs notice, save and stop. Started again at once, it waits for them and goes on from there."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    process = tiny(tmp_path / "whole", 60)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "[2/2]" in out, out
    for _ in range(2):
        process = tiny(tmp_path / "killed", 60)
        limit = time.monotonic() + 120
        steps = lambda: sum(p.read_text().count('"loss"') for p in (tmp_path / "killed").glob("runs/*/*/*/*/metrics.jsonl"))  # noqa: E731
        before = steps()
        while steps() < before + 20 and time.monotonic() < limit:
            time.sleep(0.02)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it came to its end before it was to be killed: give it more steps"
    process = tiny(tmp_path / "killed", 60)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "(goes on)" in out, out
    timeless = lambda name: [r | {"seconds": ""} for r in read_rows(tmp_path / name / "results/demo.csv")]  # noqa: E731
    rows = [timeless("whole"), timeless("killed")]
    assert rows[0] == rows[1] and len(rows[0]) >= 4
    assert all(r["ct_clean"] and r["steps"] == "60" for r in rows[0])
    for log in (tmp_path / "killed").glob("runs/*/*/*/*/metrics.jsonl"):  # each step once
        assert [r["step"] for r in map(json.loads, log.read_text().splitlines()) if "loss" in r] == list(range(1, 61))
    process = tiny(tmp_path / "killed", 60)
    assert "2 runs, 2 of them in results already" in process.communicate(timeout=60)[0]


# ---------------------------------------------------------------------------------------------------- intervals and verdicts
def test_the_bootstrap_of_two_values_by_hand():
    """Two values drawn twice: their means are 0, 1/2, 1 with probability 1/4, 1/2, 1/4."""
    draws = bootstrap_means([0.0, 1.0], resamples=40_000)
    assert np.bincount((2 * draws).astype(int)) / 40_000 == pytest.approx([0.25, 0.5, 0.25], abs=0.01)
    assert interval(draws) == (0, 1) and (bootstrap_means([0.0, 1.0], resamples=40_000) == draws).all()


def test_cases_of_a_patient_and_trainings_of_a_seed_are_drawn_together():
    values = np.array([0.0, 0.0, 1.0, 1.0])
    assert set(bootstrap_means(values, ["a", "a", "b", "b"])) == {0.0, 0.5, 1.0}
    assert len(set(bootstrap_means(values, ["a", "b", "c", "d"]))) == 5
    lucky = np.array([[0.0, 1.0]] * 5)  # the second training is better on every case
    assert set(bootstrap_means(lucky)) == {0.0, 0.5, 1.0}
    partly = bootstrap_means(np.array([[0.0, math.nan]] * 3 + [[1.0, 1.0]]))  # the unknown counts nowhere
    assert np.nanmax(partly) == 1 and np.nanmin(partly) == 0 and np.nanmean(partly) == pytest.approx(2 / 5, abs=0.06)


def test_the_interval_is_scipys_and_covers_the_truth():
    rng = np.random.default_rng(0)
    values = rng.gamma(2.0, size=40)
    want = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=rng).confidence_interval
    assert interval(bootstrap_means(values)) == pytest.approx(tuple(want), rel=0.02)
    inside = [low < 0 < high for low, high in (interval(bootstrap_means(rng.normal(size=40), resamples=500)) for _ in range(400))]
    assert 0.90 < np.mean(inside) < 0.98


def test_the_rule_of_a_verdict():
    near = np.random.default_rng(0).normal(0, 0.01, 10_000)
    assert [judge(near + shift) for shift in (0.05, 0.0, -0.05)] == [SEEN, OPEN, NOT_SEEN]
    assert [judge(near + shift, margin=0.05) for shift in (0.0, 0.05, 0.2, -0.2)] == [SEEN, OPEN, NOT_SEEN, NOT_SEEN]
    two = Claim(1, "petct", "", (Order("a", "b"), Order("b", "c", "fpv_ml")))
    found = lambda mean, patients=40: Estimate(mean, near + mean, patients, patients)  # noqa: E731
    assert verdict(two, [found(0.05), found(-0.05)]) == SEEN  # less FPV is better
    assert verdict(two, [found(0.05), found(0.0)]) == OPEN
    assert verdict(two, [found(0.05), found(0.05)]) == NOT_SEEN
    assert verdict(two, [found(0.05), None]) == OPEN  # not run yet
    assert verdict(two, [found(-0.05), None]) == NOT_SEEN
    assert verdict(two, [found(0.05), found(-0.05, patients=9)]) == OPEN
    many = Claim(1, "petct", "", (Order("a", "b"),) * 50)
    slightly = found(-0.021)  # reversed at 95 %, but one of fifty may be by chance
    assert judge(slightly.draws) == NOT_SEEN and verdict(many, [slightly] + [found(0.05)] * 49) == OPEN


# -------------------------------------------------------------------------------------------------------------- the report
def made_up(path: Path, systems: dict[str, float], cases=24, folds=2, target="seg", study="s") -> None:
    """Results in which a system's Dice is a case's own difficulty plus the system's gain."""
    hard = np.random.default_rng(0).uniform(0.2, 0.7, cases)
    rows = []
    for system, gain in systems.items():
        for i in range(cases if system != "v3" else cases // 2):  # v3 has done one fold of two
            ill, fold = i % 4 > 0, i // (cases // folds)
            score = (0.9 if ill else 0.1) if system == "v3" else ""
            rows.append({
                "study": study, "preset": "laptop", "system": system, "fold": fold, "folds": folds, "seed": 0,
                "case": f"P{i // 2}__{i % 2}", "target": target, "dice": hard[i] + gain + 0.001 * (i % 3) if ill else math.nan,
                "fpv_ml": 10 - 20 * gain + (i % 5), "fnv_ml": 0.0 if ill else math.nan, "pred_ml": 1.0, "truth_ml": 1.0,
                "has_tumor": ill, "tumor_score": score, "ct_clean": 20.0, "ct_noise": "", "ct_shuffle": "", "steps": 9, "seconds": 1.0,
                "commit": "abc1234", "options": f"--data x --model {system}", "run": f"{system}-{fold}-{study}",
            })  # fmt: skip
    write_table(rows, path)


def test_the_report_on_made_up_results(tmp_path):
    made_up(tmp_path / "petct.csv", {"v1": 0.1, "v2": 0.15, "v3": 0.2, "v4": 0.0, "ct": -0.1})
    path = claims.report(tmp_path, "petct")
    text = path.read_text()
    assert (tmp_path / "petct.png").stat().st_size > 5000 and "![petct seg](petct.png)" in text
    mean = np.mean([float(r["dice"]) for r in csv.DictReader(open(tmp_path / "petct.csv")) if r["system"] == "v4" and r["dice"]])
    assert f"{mean:.3f} [" in next(line for line in text.splitlines() if line.startswith("| v4 | 2 of 2 | 24 |"))
    v3 = next(line for line in text.splitlines() if line.startswith("| v3 | 1 of 2, incomplete | 12 |"))
    assert "1.00, 1.00" in v3 and "0.050 [0.050, 0.050]" in v3
    assert "| v1 | v4 | Dice | 18 | 0.100 [0.100, 0.100] | seen |" in text
    assert "| v3 | v2 | Dice | 9 | 0.050 [0.050, 0.050] | can't be told at this scale |" in text  # six patients have both
    assert "| 1 | v4 < v1 < v2 < v3 | **can't be told at this scale** | 3 of 3 |" in text
    assert "| 4 | every version beats them in FPV | **can't be told at this scale** | 4 of 20 |" in text
    assert "Not run: claims 2, 3, 7, 8." in text and "| 6 |" not in text


def test_results_that_may_not_be_compared_are_reported_apart(tmp_path):
    made_up(tmp_path / "a.csv", {"v2": 0.1, "v4": 0.0})
    made_up(tmp_path / "b.csv", {"v2": 0.0}, study="other")
    write_table([*read_rows(tmp_path / "b.csv"), *read_rows(tmp_path / "a.csv")], tmp_path / "petct.csv")
    text = claims.report(tmp_path, "petct").read_text()
    assert text.index("## Study s\n") < text.index("## Study other\n") and (tmp_path / "petct_other.png").exists()
    assert text.count("| v2 | 2 of 2 | 24 |") == 2
    assert claims.report(tmp_path, "brain") is None


def test_the_brains_targets_have_a_table_each(tmp_path):
    for target in ("core", "edema"):
        made_up(tmp_path / f"{target}.csv", {"v1": 0.0, "v2": 0.1}, target=target)
    write_table([r for t in ("core", "edema") for r in read_rows(tmp_path / f"{t}.csv")], tmp_path / "brain.csv")
    text = claims.report(tmp_path, "brain").read_text()
    assert "**core**" in text and "**edema**" in text and (tmp_path / "brain_edema.png").exists()
    assert "| v2 | v1 | Dice, core | 18 | 0.100" in text and "**can't be told at this scale** | 2 of 8 |" in text
