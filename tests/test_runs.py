"""Runs that lose nothing: killed at any moment and resumed; a full disk; several processes; and errors for people, each one line."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from test_predict import checkpoint
from test_train import SMALL, make_run

import data
import phantom
import train
from files import CannotWrite, atomic_write, clean_parts

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port"]


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Six small studies and their cache, filled once."""
    root = tmp_path_factory.mktemp("studies")
    phantom.write_petct(root / "petct", 6, spacing=(10.0, 10.0, 10.0))
    args = ["--data", "petct", "--root", str(root / "petct"), "--cache", str(root / "cache"), "--folds", "2", *SMALL]
    train.load_cases(train.parse_config(args))
    return root, args


def start(args, program="train.py", launcher=(sys.executable,), **more) -> subprocess.Popen:
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | more
    return subprocess.Popen([*launcher, str(ROOT / program), *map(str, args)], **more)


def call(args, program="train.py", launcher=(sys.executable,), **more) -> subprocess.CompletedProcess:
    process = start(args, program, launcher, **more)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def log_of(folder: Path) -> list[dict]:
    """What a run logged, without the time it took."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


# ---------------------------------------------------------------------------------------------------------------- killed
def kill_during_a_checkpoint(process: subprocess.Popen, folder: Path) -> None:
    """SIGKILL while last.pt is being written under its temporary name."""
    part = folder / f".{process.pid}.last.pt"
    while process.poll() is None and not part.exists():
        pass
    process.kill()


def kill_while_training(process: subprocess.Popen, folder: Path, after: float) -> None:
    """SIGKILL some time after the process's first step, or after a few seconds: before it."""
    log = folder / "metrics.jsonl"
    before, limit = log.stat().st_mtime_ns if log.exists() else 0, time.monotonic() + 60
    while process.poll() is None and time.monotonic() < limit and not (log.exists() and log.stat().st_mtime_ns > before):
        time.sleep(0.005)
    time.sleep(after)
    process.kill()


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_is_the_run_that_was_never_killed(studies, tmp_path, kills):
    """Wherever SIGKILL strikes, at start-up, in a step, in the middle of a checkpoint, the resumed run logs the same bits."""
    _, args = studies
    more = ["--model", "v3", "--steps", 40 + 12 * kills, "--validations", 3, "--ema", 0.9, "--checkpoint-minutes", 0]
    whole_run = call([*args, *more, "--out", tmp_path / "whole"])
    assert whole_run.returncode == 0, whole_run.stderr
    rng, folder, in_writing = random.Random(kills), tmp_path / "killed", 0
    for kill in range(kills):
        process = start([*args, *more, "--out", folder, "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if kill % 2:
            kill_during_a_checkpoint(process, folder)
        elif kill % 6 == 4:
            time.sleep(rng.uniform(0.1, 3))  # Python, PyTorch and the network are being loaded
            process.kill()
        else:
            kill_while_training(process, folder, rng.uniform(0, 0.4))
        process.wait()
        assert process.returncode == -signal.SIGKILL, "the run came to its end before it was to be killed: make it longer"
        in_writing += (folder / f".{process.pid}.last.pt").exists()
    assert in_writing >= 1
    last = call(["--resume", "--out", folder])
    assert last.returncode == 0, last.stderr
    assert log_of(folder) == log_of(tmp_path / "whole")
    assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}  # and no litter
    a, b = (torch.load(f / "best.pt", weights_only=True)["model"] for f in (folder, tmp_path / "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_finished_run_says_so_and_changes_nothing(studies, tmp_path):
    _, args = studies
    train.main([*args, "--model", "v1", "--steps", "2", "--out", str(tmp_path / "r")])
    before = {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir() if p.name != "config.json"}
    done = call(["--resume", "--out", tmp_path / "r"])
    assert done.returncode == 0 and "this run is finished, after step 2" in done.stdout
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir() if p.name != "config.json"}
    train.main(["--resume", "--out", str(tmp_path / "r"), "--steps", "3"])
    assert [r["step"] for r in log_of(tmp_path / "r") if "loss" in r] == [1, 2, 3]


def test_sigterm_finishes_the_step_saves_and_says_how_to_go_on(studies, tmp_path):
    _, args = studies
    process = start([*args, "--model", "v2", "--steps", 100_000, "--validations", 1, "--out", tmp_path / "r"])
    while not (tmp_path / "r" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    steps = len(log_of(tmp_path / "r"))
    assert process.returncode == 1 and err.splitlines()[-1] == (
        f"stopped after step {steps}; go on with: python train.py --resume --out {tmp_path / 'r'}"
    )
    assert torch.load(tmp_path / "r" / "last.pt", weights_only=True)["step"] == steps


def test_a_checkpoint_names_its_code_and_a_log_that_was_cut_is_missed(studies, tmp_path):
    _, args = studies
    run = make_run([*args, "--model", "v1", "--steps", "4", "--out", str(tmp_path / "r")])
    run.log({"step": 0, "loss": 1.0})
    run.save("last.pt")
    state = torch.load(run.folder / "last.pt", weights_only=True)
    assert state["code"]["torch"] == torch.__version__ and len(state["code"]["code"]) >= 7
    (run.folder / "metrics.jsonl").write_text("")
    with pytest.raises(train.UserError, match="missing or shorter"):
        run.resume()


# ------------------------------------------------------------------------------------------------------------- full disk
def limited(size: int):
    """In a child process: no file may grow beyond `size` bytes, which fails as a full disk does."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_a_full_disk_is_a_sentence_and_costs_no_checkpoint(studies, tmp_path):
    _, args = studies
    out = tmp_path / "r"
    first = [*args, "--model", "v1", "--steps", "2", "--out", str(out)]
    train.main(first)
    before = (out / "last.pt").read_bytes()
    done = call(["--resume", "--out", out, "--steps", 4], preexec_fn=limited(len(before) // 2))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {out / 'last.pt'}: cannot be written: ")
    assert (out / "last.pt").read_bytes() == before and not list(out.glob(".*"))
    train.main(["--resume", "--out", str(out), "--steps", "4"])
    train.main([*first[:-1], str(tmp_path / "straight"), "--steps", "4"])
    assert len([r for r in log_of(out) if "loss" in r]) == 4


@pytest.mark.parametrize("what", ["cache", "mask"])
def test_a_full_disk_leaves_no_half_cache_entry_and_no_half_mask(studies, tmp_path, what):
    root, args = studies
    if what == "cache":
        args = [str(tmp_path / "cache") if a == str(root / "cache") else a for a in args]
        done = call([*args, "--steps", 2, "--out", tmp_path / "r"], preexec_fn=limited(20_000))
    else:
        pet = root / "petct" / "PETCT_0000" / "visit1" / "SUV.nii.gz"
        todo = ["--checkpoint", checkpoint(tmp_path / "w.pt"), "--pet", pet, "--out", tmp_path / "m.nii"]
        done = call(todo, "predict.py", preexec_fn=limited(1000))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot be written" in done.stderr.splitlines()[-1] and "free some space" in done.stderr.splitlines()[-1]
    assert not [p for p in tmp_path.rglob("*") if p.name not in ("cache", "w.pt")]


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_write(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    with atomic_write(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"
    with pytest.raises(CannotWrite, match="cannot be written"), atomic_write(path / "below"):
        pass
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".{dead.pid}.last.pt").touch()
    (tmp_path / f".{dead.pid}.entry").mkdir()
    (tmp_path / f".{os.getpid()}.last.pt").touch()  # of a living process
    (tmp_path / ".notes").touch()
    clean_parts(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", f".{os.getpid()}.last.pt", ".notes"}


# ----------------------------------------------------------------------------------------------------- several processes
@pytest.mark.parametrize("model", ["v2", "v3", *(pytest.param(m, marks=pytest.mark.slow) for m in ("v4", "valindria", "nnunet"))])
def test_two_processes_equal_one_with_the_doubled_batch(studies, tmp_path, model):
    """Losses within 1e-5 at every step, the same validation, one log; v3 has a batch norm and a dropout in its classifier."""
    _, args = studies
    # No rotation: it brings in patches of nearly nothing, whose instance norm makes rounding 300 times larger.
    more = ["--model", model, "--steps", 6, "--validations", 2, "--ema", 0.9, "--rotate", 0, "--scale", 0]
    port = str(random.Random(os.getpid() + len(model + model)).randrange(20_000, 60_000))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    two = call([*args, *more, "--batch", 1, "--out", tmp_path / "two"], launcher=[*TORCHRUN, port], env=env)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("studies to train on") == 1
    train.main(list(map(str, [*args, *more, "--batch", 2, "--out", tmp_path / "one"])))
    a, b = log_of(tmp_path / "two"), log_of(tmp_path / "one")
    assert [r["step"] for r in a] == [r["step"] for r in b] and len([r for r in a if "loss" in r]) == 6
    for x, y in zip(a, b):
        if "loss" in x:
            assert x.keys() == y.keys() and all(x[k] == pytest.approx(y[k], abs=1e-5) for k in x if k != "grad_norm"), (x, y)
            assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-3)
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}
    tables = [(tmp_path / f / "validation.csv").read_text().splitlines() for f in ("one", "two")]
    assert [line.split(",")[0] for line in tables[0]] == [line.split(",")[0] for line in tables[1]]


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_loader_processes_gives_the_same_batches(studies, tmp_path, workers):
    _, args = studies
    runs = [make_run([*args, "--steps", "5", "--workers", str(w), "--out", str(tmp_path / str(w))]) for w in (0, workers)]
    for run in runs:
        run.seen = 2  # as after one step
    one, other = (list(run.batches()) for run in runs)
    assert len(one) == len(other) == 4
    assert all(torch.equal(a[k], b[k]) for a, b in zip(one, other) for k in a)
    second = [runs[0].patches[i] for i in (2, 3)]
    assert torch.equal(one[0]["image"], torch.stack([s["image"] for s in second]))


# --------------------------------------------------------------------------------------------------- errors for people
def edit(path: Path, change) -> None:
    image = nib.load(path)
    nib.save(nib.Nifti1Image(*change(np.asarray(image.dataobj).copy(), image.affine.copy())), path)


def with_nan(a, affine):
    a[3, 3, 3] = np.nan
    return a, affine


SUV, CT, SEG = "PETCT_0000/visit1/SUV.nii.gz", "PETCT_0000/visit1/CTres.nii.gz", "PETCT_0000/visit1/SEG.nii.gz"
BAD_DATA = {  # what is done to a folder of good studies: (change, words of the message)
    "corrupt": (lambda r: (r / SUV).write_bytes(b"nonsense"), [SUV, "not a readable NIfTI file", "export it again"]),
    "truncated": (lambda r: (r / CT).write_bytes((r / CT).read_bytes()[:3000]), [CT, "cut short", "copy or export it again"]),
    "missing": (lambda r: (r / SEG).unlink(), [SEG, "missing", "a study needs SUV, CTres and SEG"]),
    "grids that differ": (lambda r: edit(r / CT, lambda a, m: (a[1:], m)), [CT, "SUV.nii.gz", "not on one grid", "resample"]),
    "origins that differ": (lambda r: edit(r / SEG, lambda a, m: (a, m + np.eye(4)[:, :1] * [[0, 0, 0, 9]])), [SEG, "not on one grid"]),
    "NaN": (lambda r: edit(r / SUV, with_nan), [SUV, "1 voxels are NaN or infinite", "set them to 0"]),
    "4D": (lambda r: edit(r / SUV, lambda a, m: (np.stack([a, a], -1), m)), [SUV, "expected 3 dimensions", "take one volume"]),
    "labels out of range": (lambda r: edit(r / SEG, lambda a, m: (a + 6, m)), [SEG, "expected labels 0 and 1", "write tumor as 1"]),
    "Bq/ml": (lambda r: edit(r / SUV, lambda a, m: (a * 5000, m)), [SUV, "look like Bq/ml, not SUV", "divide by injected dose"]),
    "an empty folder": (lambda r: shutil.rmtree(r) or r.mkdir(), ["no SUV.nii.gz at any depth", "expected AutoPET's layout"]),
    "no folder": (lambda r: shutil.rmtree(r), ["no such folder"]),
    "a study twice": (lambda r: shutil.copytree(r / "PETCT_0000", r / "COPY"), ["COPY", "PETCT_0000", "remove one of the two"]),
    "a name twice": (lambda r: shutil.copytree(r / "PETCT_0000/visit1", r / "PETCT_0000__visit1"), ["occurs twice", "remove one"]),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data_is_a_sentence(studies, tmp_path, capsys, what):
    root, args = studies
    shutil.copytree(root / "petct", tmp_path / "in")
    change, words = BAD_DATA[what]
    change(tmp_path / "in")
    out = tmp_path / "r"
    args = [str(tmp_path / "in") if a == str(root / "petct") else a for a in args]
    said = refused(train.main, [*args, "--out", str(out)], capsys)
    assert all(w in said for w in words), said
    assert not out.exists()


def refused(main, args, capsys) -> str:
    """Run a program as from the command line: it must say one line, without a traceback, and leave with 2. Returns the line."""
    before = sys.argv
    sys.argv = ["program", *map(str, args)]
    try:
        with pytest.raises(SystemExit) as left:
            train.program(main)
    finally:
        sys.argv = before
    assert left.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]  # not the progress bar
    assert line.startswith("error: ") and len(line) < 500
    return line


OPTIONS = {
    "a split that leaks": ('[{"train": ["PETCT_0000", "PETCT_0001"], "val": ["PETCT_0001"]}]', ["training and validation"]),
    "a split of unknown cases": ('[{"train": ["PETCT_0000"], "val": ["Smith"]}]', ["names ['Smith'], which the data does not hold"]),
    "a split that is none": ("{", ["expected a JSON list"]),
    "strides": ("--patch 40 32 32", ["size (40, 32, 32)", "multiples of 16", "use (32, 32, 32)"]),
    "a model": ("--model v7", ["no version 'v7'"]),
    "a GPU": ("--device cuda", ["sees no CUDA device", "use --device cpu"]),
    "Triton": ("--kernels triton", ["Triton kernels were asked for"]),
    "no steps": ("--steps 0", ["give 1 or more"]),
    "overlap": ("--overlap 1.5", ["between 0 and 0.9"]),
    "a fold": ("--fold 9", ["there are folds 0 to 1"]),
    "a file for a folder": ("--out {file}", ["a file; name a folder"]),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_options_that_cannot_work_are_a_sentence(studies, tmp_path, capsys, monkeypatch, what):
    _, args = studies
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train.kernels, "INTERPRETED", False)
    text, words = OPTIONS[what]
    (tmp_path / "file").write_text(text)
    more = text.format(file=tmp_path / "file").split() if text.startswith("--") else ["--splits", tmp_path / "file"]
    said = refused(train.main, [*args, "--out", tmp_path / "r", *more], capsys)
    assert all(w in said for w in words), said
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_checkpoint_of_something_else_is_a_sentence(studies, tmp_path, capsys):
    """Another model, preset or version, half a file, a stranger's: for prediction and for going on."""
    import predict

    root, args = studies
    pet = root / "petct" / SUV

    def ask(weights, *more):
        return refused(predict.main, ["--checkpoint", weights, "--out", tmp_path / "m.nii.gz", *(more or ["--pet", pet])], capsys)

    assert "of brain: give --image" in ask(checkpoint(tmp_path / "brain.pt", data="brain", model="v2"))
    assert "an ensemble needs networks of one kind" in refused(
        predict.main,
        ["--checkpoint", checkpoint(tmp_path / "a.pt"), tmp_path / "brain.pt", "--pet", pet, "--out", tmp_path / "m.nii"],
        capsys,
    )
    assert "does not fit the network it names" in ask(checkpoint(tmp_path / "wide.pt", channels=[4, 4, 4, 4, 4]))
    relabelled = tmp_path / "v9.pt"  # by a later version of this project, say
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save(state | {"config": state["config"] | {"model": "v9"}}, relabelled)
    assert "does not fit the network it names (v9)" in ask(relabelled)
    half = tmp_path / "half.pt"
    half.write_bytes((tmp_path / "a.pt").read_bytes()[:5000])
    assert "not a checkpoint of train.py, or cut short; give a run's best.pt" in ask(half)
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert "it holds no config" in ask(tmp_path / "other.pt")
    assert "no such checkpoint" in ask(tmp_path / "none.pt")
    assert "never overwritten" in refused(predict.main, ["--checkpoint", tmp_path / "a.pt", "--pet", pet, "--out", pet], capsys)
    with_kernels = ["--checkpoint", tmp_path / "a.pt", "--pet", pet, "--out", tmp_path / "m.nii", "--kernels", "fast"]
    assert "use one of auto, triton, plain" in refused(predict.main, with_kernels, capsys)
    assert not list(tmp_path.glob("m.nii*"))

    train.main([*args, "--model", "v1", "--steps", "1", "--out", str(tmp_path / "r")])
    before = {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()}
    capsys.readouterr()
    said = refused(train.main, ["--resume", "--out", tmp_path / "r", "--model", "v2"], capsys)
    assert "of a run with --model v1, not v2; leave that option out" in said
    assert {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()} == before


def test_a_patch_larger_than_the_volume_is_padded(studies, tmp_path):
    _, args = studies
    train.main([*args, "--patch", "96", "64", "128", "--steps", "1", "--model", "v1", "--out", str(tmp_path / "r")])
    (case,) = {c.name: c for c in train.load_cases(train.parse_config(args))[0][:1]}.values()
    assert case.array("label").shape[0] < 96 and (tmp_path / "r" / "best.pt").exists()


def test_an_error_from_a_loader_or_a_preprocessing_process_is_the_same_sentence(studies, tmp_path):
    root, args = studies
    shutil.copytree(root / "petct", tmp_path / "in")
    (tmp_path / "in" / SUV).write_bytes(b"nonsense")
    args = [str(tmp_path / "in") if a == str(root / "petct") else str(tmp_path / "c") if a == str(root / "cache") else a for a in args]
    done = call([*args, "--out", tmp_path / "r"])
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert not [p for p in (tmp_path / "c").iterdir() if p.name.startswith(".")] and data.find_petct(tmp_path / "in")


def test_a_reader_that_has_read_enough_is_no_error():
    """`replicate.py --list | head`: no traceback."""
    process = start(["--list"], program="replicate.py", stdout=(pipe := os.pipe())[1])
    os.close(pipe[0])
    os.close(pipe[1])
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 1
