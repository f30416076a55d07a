"""The replication: sound experiments, permanent keys, no run repeated or lost."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import claims
import replicate
import train
from claims import CLAIMS, EXPERIMENTS, read_rows
from config import FIELDS, Config, as_argument, parse_config
from files import UserError
from mirror_unet import MirrorOutput

TINY = (
    "--phantoms 6 --spacing 10 10 10 --patch 32 32 32 --channels 2 3 4 5 6 --batch 2 --folds 2"
).split()
FOLDS = [[["a", "b"], ["c", "d"]], [["c", "d"], ["a", "b"]]]  # [training, held-out] per fold
FIVE_FOLDS = [[[b for b in "abcde" if b != a], [a]] for a in "abcde"]


# ---------------------------------------------------------------------------------- the experiments
def test_every_claim_has_experiments_and_every_experiment_a_claim():
    assert {c.number for c in CLAIMS} == set(range(1, 10))
    defined = [(e.data, e.name) for e in EXPERIMENTS]
    assert len(set(defined)) == len(defined)
    named = {(c.data, name) for c in CLAIMS for name in claims.systems_of(c)}
    assert named == set(defined)
    orders = [o for c in CLAIMS for o in c.orders]
    assert all(o.measure in claims.MEASURES and o.better != o.worse for o in orders)


def test_the_presets_choose_the_experiments_of_a_claim():
    def names(number: int, preset: str) -> list[str]:
        return [e.name for e in claims.experiments_for([number], [], preset)]

    assert names(1, "laptop") == ["v1", "v2", "v3", "v4"]
    assert names(2, "laptop") == ["v2", "v2 noise", "v2 none"]
    assert set(names(2, "paper")) >= {"v1 none", "v3 noise"}
    assert {e.data for e in claims.experiments_for([6], [], "laptop")} == {"brain"}


def test_experiments_are_valid_options_of_train_py_and_no_two_are_the_same_run():
    options = set()
    for e in EXPERIMENTS:
        common = replicate.PRESETS["laptop"][e.data].split()
        if e.data == "petct":
            common += ["--root", "x"]
        c = parse_config([*common, *e.options.split()])
        assert c.model == e.options.split()[1]
        assert c.steps < 1000 and not c.minutes and not c.flips
        options.add((e.data, json.dumps(replicate.options_that_matter(c))))
    assert len(options) == len(EXPERIMENTS)
    shares = [e for e in EXPERIMENTS if "share" in e.name]
    found = {e.name: parse_config(e.options.split()).share for e in shares}
    assert found == {
        "v2 share 3": (3,), "v2 share 4": (4,), "v2 share 6": (6,), "v2 share 7": (7,),
        "v2 share 4 5 6": (4, 5, 6), "v2 share 3 4 5 6 7": (3, 4, 5, 6, 7),
    }  # fmt: skip


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
def test_impossible_requests_get_a_clear_message(args, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(replicate, "find_folds", lambda c: FOLDS)
    with pytest.raises(UserError, match=message):
        replicate.main(args.split())


# --------------------------------------------------------------------------------------------- keys
def plan(command: str) -> list[replicate.Run]:
    return replicate.plan(*replicate.parse_arguments(command.split()))


def folds_in_results(rows: list[dict]) -> list[list[list[str]]]:
    """The folds of finished runs: a fold trains on all cases that it does not hold out."""
    cases = {r["case"] for r in rows}
    folds = []
    for fold in range(int(rows[0]["folds"])):
        held_out = {r["case"] for r in rows if r["fold"] == str(fold)}
        folds.append([sorted(cases - held_out), sorted(held_out)])
    return folds


# What newer versions do differently by default.
BEFORE = {f.name: f.metadata["before"] for f in FIELDS.values() if f.metadata["before"] is not None}
OLD = " ".join(as_argument(name, value) for name, value in BEFORE.items())


@pytest.mark.parametrize(
    "source,command,old,runs",
    [
        ("petct", "--claims 1 2 3 4 5 8 --root x", "", (101, 170)),
        ("phantom", "--claims 9", "--lr 2e-3 --threshold 0.4 --batch 2 --steps 900", (10, 30)),
        ("brain", "--claims 6", "", (19, 0)),
    ],
)
def test_the_finished_runs_of_this_repository_keep_their_keys(
    source, command, old, runs, monkeypatch
):
    """If a key changed, hours of finished runs would be repeated. runs: of old and new networks."""
    rows = read_rows(ROOT / "results" / f"{source}.csv")
    folds = folds_in_results(rows)
    monkeypatch.setattr(replicate, "find_folds", lambda c: folds)
    finished = {r["run"]: [r["study"], r["system"], int(r["fold"]), int(r["seed"])] for r in rows}
    plans = plan(f"{command} -- {old} {OLD}"), plan(f"{command} --seeds 0 1 2")
    planned = [{r.key: [r.study, r.experiment.name, r.fold, r.seed] for r in p} for p in plans]
    assert not set(planned[0]) & set(planned[1])
    assert not {r.study for r in plans[0]} & {r.study for r in plans[1]}
    assert {key: (planned[0] | planned[1]).get(key) for key in finished} == finished
    assert tuple(len(set(found) & set(finished)) for found in planned) == runs


# The options of the first version in its order, without those of the machine, by today's names.
FIRST_OPTIONS = """
    data phantoms spacing ct_window suv_window negatives fold patch batch patches_per_case
    foreground_fraction flip flip_axes rotate scale intensity gamma model tasks skips share channels
    norm ct_weight corrupt cube cubes sigma lambda_seg lambda_rec lambda_cls steps minutes optimizer
    lr weight_decay schedule clip ema seed amp validations overlap threshold flips
""".split()


def test_a_key_consists_of_the_first_names_of_all_changed_options():
    """Every option of the first version differs from its default; that version gave this digest."""

    def other(value):
        if isinstance(value, bool):
            return not value
        if isinstance(value, int | float):
            return value + 1
        return value + "x" if isinstance(value, str) else (*value, 1)

    first = Config(**BEFORE)
    assert replicate.options_that_matter(first) == {}
    changed = {name: other(getattr(first, name)) for name in FIRST_OPTIONS}
    c = dataclasses.replace(first, **changed)
    options = replicate.options_that_matter(c)
    assert len(options) == len(FIRST_OPTIONS) and "positive" in options
    assert replicate.digest(options) == "8920d4ba372d"


def test_a_default_that_changed_is_part_of_the_key():
    """So a run of today is never taken for an old one, and an old network can still be named."""
    expected = {"free_outputs": True, "classifier": ""}
    assert replicate.options_that_matter(Config()) == expected
    old = dict(free_outputs=False, classifier="release")
    assert BEFORE == old
    assert replicate.digest(replicate.options_that_matter(Config())) == "f80b37cf31d5"


def test_another_seed_fold_or_system_has_other_weights():
    """Else the luck of one draw would look like a property of all systems and folds."""
    tiny = [*TINY, "--model", "v1"]
    commands = [[], ["--seed", "1"], ["--fold", "1"], ["--corrupt", "noise"], ["--share", "4"]]
    commands += [["--model", "v2"], ["--model", "pet"], ["--model", "v1"]]
    seeds, weights = [], []
    for command in commands:
        c = parse_config([*tiny, *command])
        seeds.append(c.random_seed)
        kernels = (p for p in train.build_model(c).parameters() if p.ndim == 5)
        weights.append(next(kernels))
    assert seeds[-1] == seeds[0] and torch.equal(weights[-1], weights[0])
    assert len(set(seeds)) == len(seeds) - 1
    for i, j in combinations(range(len(commands) - 1), 2):
        assert not torch.equal(weights[i], weights[j]), (commands[i], commands[j])
    assert parse_config([*tiny, "--lr", "1", "--steps", "9"]).random_seed == seeds[0]


def test_options_of_the_machine_are_not_part_of_the_key(monkeypatch):
    monkeypatch.setattr(replicate, "find_folds", lambda c: FOLDS)
    before = plan("--claims 1 --root x --folds 0")
    machine = "--device cpu --cache elsewhere --workers 3 --no-channels-last --checkpoint-minutes 9"
    for now, same in ((f"--root y --folds 0 -- {machine}", True), ("--root x --folds 1", False)):
        after = plan(f"--claims 1 {now}")
        assert ([r.key for r in after] == [r.key for r in before]) is same
        assert [r.study for r in after] == [r.study for r in before]


def test_a_run_that_serves_two_claims_is_made_once(monkeypatch):
    """AutoPET has patients without tumor: with the paper's preset, claim 9 uses claim 1's runs,
    while the laptop trains them on the phantom."""
    monkeypatch.setattr(replicate, "find_folds", lambda c: FOLDS)
    paper = plan("--preset paper --claims 1 9 --root x --folds 0")
    found = [(r.source, r.experiment.name) for r in paper]
    assert found == [("petct", v) for v in ("v1", "v2", "v3", "v4")]
    laptop = plan("--preset laptop --claims 1 9 --root x --folds 0")
    assert {r.source for r in laptop} == {"petct", "phantom"} and len(laptop) == 6


def test_the_planned_study_says_what_its_commands_run(monkeypatch):
    """The table in results/README.md: each command makes as many runs as it says, none twice."""
    monkeypatch.setattr(replicate, "find_folds", lambda c: FIVE_FOLDS)
    lines = (ROOT / "results" / "README.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if "| `python replicate.py" in line]
    assert len(rows) == 8
    keys = set()
    for data, _, folds_seeds, runs, command in rows:
        argv = shlex.split(command.strip(" |`"))[2:]
        if "PET/CT" in data:
            argv += ["--root", "x"]
        planned = {r.key: r for r in replicate.plan(*replicate.parse_arguments(argv))}
        assert len(planned) == int(runs) and not keys & set(planned), command
        keys |= set(planned)
        found = [{r.fold for r in planned.values()}, {r.seed for r in planned.values()}]
        assert [len(f) for f in found] == [int(n) for n in folds_seeds.split(" x ")]


# --------------------------------------------------------------- runs, with a stand-in for train.py
FAKE = """
    import json, os, pathlib, sys
    folder, argv = pathlib.Path(sys.argv[1]), sys.argv[2:]
    model, fold = argv[argv.index("--model") + 1], argv[argv.index("--fold") + 1]
    with open("started.txt", "a") as f:
        f.write(f"{model} {fold}\\n")
    print("step 1\\rstep 2")
    if os.path.exists("slow"):
        os.read(0, 1)  # until the parent closes the pipe
        sys.exit(1)
    if os.path.exists(f"fail {model}"):
        sys.exit("error: the disk is full")
    log = [{"step": 7, "loss": 0.5, "seconds": 1.5}, {"val": {}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in log))
    with open(folder / "validation.csv", "w") as f:
        f.write("case,target,dice,fpv_ml,fnv_ml,pred_ml,truth_ml,has_tumor,tumor_score\\n")
        for case in ("c", "d") if fold == "0" else ("a", "b"):
            dice = f"0.{ord(case)}{ord(model[-1])}"
            f.write(f"{case},seg,{dice},0.1234567890123456,,3,4,True,\\n")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """replicate.py in an empty folder, with a train.py that takes milliseconds.

    Call it with options; it returns which runs were started, as "MODEL FOLD".
    """
    (tmp_path / "fake.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(replicate, "COMMAND", [sys.executable, str(tmp_path / "fake.py")])
    monkeypatch.setattr(replicate, "find_folds", lambda c: FOLDS)

    def call(*args: str) -> list[str]:
        Path("started.txt").write_text("")
        replicate.main(["--claims", "1", "--jobs", "2", *args])
        return sorted(Path("started.txt").read_text().splitlines())

    return call


FOUR = ["v1 0", "v2 0", "v3 0", "v4 0"]  # claim 1 on the first fold of the stand-in for PET/CT


@pytest.mark.slow
def test_a_finished_run_is_never_repeated(fake, capsys):
    assert fake() == FOUR
    assert "[4/4] demo, v" in capsys.readouterr().out
    assert fake() == []
    assert "4 runs, 4 of them in results already" in capsys.readouterr().out
    before = Path("results/demo.csv").read_bytes()
    shutil.rmtree("runs")  # as in a fresh clone: only the csv file is left
    assert fake("--folds", "0", "1") == ["v1 1", "v2 1", "v3 1", "v4 1"]
    assert fake("--only", "v2", "--seeds", "0", "3", "--folds", "1") == ["v2 1"]
    after = Path("results/demo.csv").read_bytes()
    assert set(before.splitlines()) <= set(after.splitlines())
    assert "## Study" in Path("results/demo.md").read_text() and Path("results/demo.png").exists()


@pytest.mark.slow
def test_other_options_make_another_run_and_those_of_the_machine_do_not(fake):
    assert fake() == FOUR
    assert fake("--", "--lr", "0.5") == FOUR
    assert fake("--", "--lr", "0.5", "--device", "cpu", "--cache", "elsewhere") == []
    assert len(read_rows(Path("results/demo.csv"))) == 2 * (4 + 4)


def test_the_row_of_a_run(fake):
    fake("--only", "v2", "--", "--cache", "elsewhere")
    row = read_rows(Path("results/demo.csv"))[0]
    assert len(row.pop("run")) == len(row.pop("study")) == 12 and len(row.pop("commit")) >= 7
    common = replicate.PRESETS["laptop"]["demo"]
    assert row == {
        "preset": "laptop", "system": "v2", "fold": "0", "folds": "2", "seed": "0", "case": "c",
        "target": "seg", "dice": "0.9950", "fpv_ml": "0.1234567890123456", "fnv_ml": "",
        "pred_ml": "3", "truth_ml": "4", "has_tumor": "True", "tumor_score": "", "ct_clean": "",
        "ct_noise": "", "ct_shuffle": "", "steps": "7", "seconds": "1.5",
        "options": f"{common} --model v2 --fold 0 --seed 0",
    }  # fmt: skip


@pytest.mark.slow
def test_the_first_time_estimate_knows_the_networks_of_full_resolution(fake, capsys):
    fake("--claims", "5", "--only", "v1", "v2", "nnunet", "--folds", "0", "1")
    assert "about 40 min at 5 minutes" in capsys.readouterr().out  # (4 x 5 + 2 x 30) / 2
    fake("--claims", "5", "--only", "v3", "blackbean", "--jobs", "5")
    assert "about 30 min at 5 minutes" in capsys.readouterr().out  # the longest run


@pytest.mark.slow
def test_a_failed_run_is_named_and_stops_no_other(fake):
    Path("fail v2").touch()
    with pytest.raises(SystemExit) as error:
        fake()
    expected = (
        "1 of 4 runs failed:\ndemo, v2, fold 0, seed 0: error: the disk is full "
        "(full log: runs/replicate/laptop/demo/v2-"
    )
    assert str(error.value).startswith(expected)
    assert {r["system"] for r in read_rows(Path("results/demo.csv"))} == {"v1", "v3", "v4"}
    Path("fail v2").unlink()
    assert fake() == ["v2 0"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_the_runs_save_and_says_how_to_resume(fake, number, monkeypatch):
    Path("slow").touch()
    start = replicate.start

    def start_and_interrupt(run, *args):
        process = start(run, *args)
        if run.experiment.name == "v2":
            os.kill(os.getpid(), number)
        return process

    monkeypatch.setattr(replicate, "start", start_and_interrupt)
    with pytest.raises(SystemExit, match="stopped after 0 of 4 runs; the same command resumes"):
        fake()
    started = Path("started.txt").read_text().splitlines()
    assert len(started) <= 2  # no further run was started
    Path("slow").unlink()
    monkeypatch.setattr(replicate, "start", start)
    assert fake() == FOUR


@pytest.mark.slow
def test_rows_have_one_order_whichever_run_ended_first(fake):
    fake("--folds", "1", "--only", "v3")
    fake("--folds", "0", "1")
    rows = read_rows(Path("results/demo.csv"))
    keys = [(r["system"], r["fold"], r["case"]) for r in rows]
    assert keys == sorted(keys) and len(keys) == 16


def test_times_in_words():
    times = {5: "5 s", 99.4: "99 s", 100: "2 min", 3500: "58 min", 7260: "2 h 1 min"}
    assert {seconds: replicate.clock(seconds) for seconds in times} == times


def test_the_time_left_assumes_the_mean_of_the_finished_runs():
    now = time.monotonic()
    running = [replicate.Job(None, None, now - 30), replicate.Job(None, None, now - 500)]
    left = replicate.time_left([80.0, 120.0], 3, running, jobs=2)
    assert left == pytest.approx((3 * 100 + 70 + 0) / 2, abs=1)


def test_the_reconstruction_error_is_that_of_the_held_out_ct(tmp_path, monkeypatch):
    """A network that returns its input has no error on the clean CT, and sigma on a noisy one."""
    monkeypatch.chdir(tmp_path)
    c = parse_config(["--model", "v1", "--steps", "1", *TINY, "--phantoms", "2"])

    class Identity(torch.nn.Module):
        def forward(self, x):
            return MirrorOutput(seg=None, ct=x[:, :1])

    monkeypatch.setattr(replicate, "load_model", lambda *args: (Identity(), c))
    replicate.reconstruction_errors(tmp_path, c)
    rows = read_rows(tmp_path / "reconstruction.csv")
    assert {r["case"] for r in rows} == {case.name for case in train.load_cases(c)[1]}
    sigma = 0.3 * 350  # HU
    for r in rows:
        assert float(r["ct_clean"]) < 1e-4
        # Where two windows overlap, the mean of their noise is smaller.
        assert 0.8 * sigma < float(r["ct_noise"]) < 1.02 * sigma
        assert 0 < float(r["ct_shuffle"]) < float(r["ct_noise"])


def test_networks_without_a_reconstruction_of_the_ct_have_no_file(tmp_path):
    for model in ("v4", "pet", "lf"):
        c = parse_config(["--model", model, *TINY])
        replicate.reconstruction_errors(tmp_path, c)  # there is no checkpoint to be read
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------- killed programs
PARENT = """
    import sys, time
    import replicate
    replicate.COMMAND = [sys.executable, "child.py"]
    run = replicate.Run(None, "demo", "laptop", 0, 1, 0, "key", "study", [], replicate.Path("run"))
    replicate.start(run, 0, 1)
    time.sleep(120)
"""
CHILD = """
    import pathlib, signal, sys, threading, time
    import replicate
    def save(*_):
        pathlib.Path("saved").touch()
        sys.exit()
    signal.signal(signal.SIGTERM, save)
    threading.Thread(target=replicate.stop_with_parent, daemon=True).start()
    pathlib.Path("ready").touch()
    time.sleep(120)
"""


def wait_for(condition, seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)
    return condition()


@pytest.mark.slow
def test_no_run_outlives_a_killed_parent(tmp_path):
    for name, text in (("parent.py", PARENT), ("child.py", CHILD)):
        (tmp_path / name).write_text(textwrap.dedent(text))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "parent.py"], cwd=tmp_path, env=env)
    try:
        assert wait_for((tmp_path / "ready").exists, 300)
        assert not (tmp_path / "saved").exists()
    finally:
        parent.kill()  # SIGKILL: the parent can do nothing about it
        parent.wait()
    assert wait_for((tmp_path / "saved").exists, 60)


def replicate_tiny(folder: Path, steps: int) -> subprocess.Popen:
    """The program itself, with two tiny networks that are really trained."""
    args = ["--claims", "1", "--only", "v2", "v3", "--jobs", "2", "--", *TINY]
    args += ["--steps", str(steps), "--checkpoint-minutes", "0.01"]
    command = [sys.executable, str(ROOT / "replicate.py"), *args]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def logged_steps(folder: Path) -> list[list[int]]:
    """The steps in the log of each run."""
    found = []
    for log in folder.glob("runs/*/*/*/*/metrics.jsonl"):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        found.append([r["step"] for r in rows if "loss" in r])
    return found


@pytest.mark.slow
def test_a_replication_that_is_killed_twice_ends_with_the_same_results(tmp_path):
    """Only replicate.py is killed; its runs notice, save and stop. Started again at once, it waits
    for them and resumes them."""
    through, killed = tmp_path / "through", tmp_path / "killed"
    through.mkdir()
    killed.mkdir()
    process = replicate_tiny(through, 60)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "[2/2]" in out, out

    def count() -> int:
        logs = killed.glob("runs/*/*/*/*/metrics.jsonl")
        return sum(log.read_text().count('"loss"') for log in logs)

    for _ in range(2):
        process = replicate_tiny(killed, 60)
        before = count()
        wait_for(lambda before=before: count() >= before + 20, 120)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before the kill: give more steps"
    process = replicate_tiny(killed, 60)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "(resumes)" in out, out

    expected = [r | {"seconds": ""} for r in read_rows(through / "results/demo.csv")]
    found = [r | {"seconds": ""} for r in read_rows(killed / "results/demo.csv")]
    assert found == expected and len(found) >= 4
    assert all(r["ct_clean"] and r["steps"] == "60" for r in found)
    assert logged_steps(killed) == 2 * [list(range(1, 61))]  # each step once
    process = replicate_tiny(killed, 60)
    assert "2 runs, 2 of them in results already" in process.communicate(timeout=60)[0]
