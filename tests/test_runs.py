"""Runs that lose nothing when they are killed, meet a full disk, or use several processes.

Also the errors for people: every one is a single line that says what to do.
"""

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
import files
import kernels
import parallel
import phantom
import predict
import train
from files import CannotWrite, UserError, atomic_write, clean_parts, run_program

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port"]


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Six small studies and their filled cache: (root, options of train.py)."""
    root = tmp_path_factory.mktemp("studies")
    phantom.write_petct(root / "petct", 6, spacing=(10.0, 10.0, 10.0))
    args = ["--data", "petct", "--root", str(root / "petct"), "--cache", str(root / "cache")]
    args += ["--folds", "2", "--device", "cpu", *SMALL]  # equal bits, two processes: no GPU
    train.load_cases(train.parse_config(args))
    return root, args


def with_root(args: list[str], old: Path, new: Path) -> list[str]:
    """The options with one folder replaced by another."""
    return [str(new) if a == str(old) else a for a in args]


def start(args, program="train.py", launcher=(sys.executable,), **more) -> subprocess.Popen:
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | more
    return subprocess.Popen([*launcher, str(ROOT / program), *map(str, args)], **more)


def call(args, program="train.py", launcher=(sys.executable,), **more):
    process = start(args, program, launcher, **more)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def log_of(folder: Path) -> list[dict]:
    """The rows of a run's log, without the time it took."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def names_in(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


# ------------------------------------------------------------------------------------- killed runs
def kill_during_a_checkpoint(process: subprocess.Popen, folder: Path) -> None:
    """Send SIGKILL while last.pt is being written under its temporary name.

    The process is halted before the last look, so that it can't finish writing after it.
    """
    temporary = f".{process.pid}.*.last.pt"
    while process.poll() is None:
        if any(folder.glob(temporary)):
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if any(folder.glob(temporary)):
                break
            process.send_signal(signal.SIGCONT)
    process.kill()


def kill_while_training(process: subprocess.Popen, folder: Path, delay: float) -> None:
    """Send SIGKILL `delay` seconds after the process's first step."""
    log = folder / "metrics.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0
    limit = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < limit:
        if log.exists() and log.stat().st_mtime_ns > before:
            break
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 5])
def test_a_run_killed_at_random_moments_logs_the_same_bits(studies, tmp_path, kills):
    """SIGKILL may come at start-up, within a step, or in the middle of a checkpoint."""
    _, args = studies
    args = [*args, "--model", "v3", "--steps", 40 + 12 * kills, "--validations", 3]
    args += ["--ema", 0.9, "--checkpoint-minutes", 0]
    uninterrupted = call([*args, "--out", tmp_path / "uninterrupted"])
    assert uninterrupted.returncode == 0, uninterrupted.stderr

    rng = random.Random(kills)
    folder = tmp_path / "killed"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for kill in range(kills):
        process = start([*args, "--out", folder, "--resume"], **quiet)
        if kill % 2:
            kill_during_a_checkpoint(process, folder)
        elif kill % 6 == 4:
            time.sleep(rng.uniform(0.1, 3))  # while Python, PyTorch and the network are loaded
            process.kill()
        else:
            kill_while_training(process, folder, rng.uniform(0, 0.4))
        process.wait()
        assert process.returncode == -signal.SIGKILL, "the run ended before the kill: lengthen it"
        if kill % 2:
            assert any(folder.glob(f".{process.pid}.*.last.pt"))  # it was in the middle of it

    last = call(["--resume", "--out", folder])
    assert last.returncode == 0, last.stderr
    assert log_of(folder) == log_of(tmp_path / "uninterrupted")
    assert names_in(folder) == names_in(tmp_path / "uninterrupted")  # no temporary files are left
    folders = (folder, tmp_path / "uninterrupted")
    a, b = (torch.load(f / "best.pt", weights_only=True)["model"] for f in folders)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_a_finished_run_says_so_and_changes_nothing(studies, tmp_path):
    _, args = studies
    folder = tmp_path / "r"
    train.main([*args, "--model", "v1", "--steps", "2", "--out", str(folder)])
    kept = names_in(folder) - {"config.json"}
    before = {name: (folder / name).read_bytes() for name in kept}
    done = call(["--resume", "--out", folder])
    assert done.returncode == 0
    assert "this run is finished (step 2)" in done.stdout
    assert before == {name: (folder / name).read_bytes() for name in kept}
    assert names_in(folder) == kept | {"config.json"}
    train.main(["--resume", "--out", str(folder), "--steps", "3"])
    assert [r["step"] for r in log_of(folder) if "loss" in r] == [1, 2, 3]


@pytest.mark.slow
def test_sigterm_finishes_the_step_saves_and_says_how_to_continue(studies, tmp_path):
    _, args = studies
    folder = tmp_path / "r"
    endless = ["--model", "v2", "--steps", 100_000, "--validations", 1]
    process = start([*args, *endless, "--out", folder])
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    steps = len(log_of(folder))
    assert process.returncode == 128 + signal.SIGTERM  # as shells expect
    command = f"python train.py --resume --out {folder}"
    assert err.splitlines()[-1] == f"stopped after step {steps}; to continue: {command}"
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == steps


def test_a_checkpoint_names_the_code_that_wrote_it(studies, tmp_path):
    _, args = studies
    run = make_run([*args, "--model", "v1", "--steps", "4", "--out", str(tmp_path / "r")])
    run.save("last.pt")
    code = torch.load(run.folder / "last.pt", weights_only=True)["code"]
    assert code["torch"] == torch.__version__
    assert len(code["code"]) >= 7


def test_a_shortened_log_is_noticed(studies, tmp_path):
    _, args = studies
    run = make_run([*args, "--model", "v1", "--steps", "4", "--out", str(tmp_path / "r")])
    run.log({"step": 0, "loss": 1.0})
    run.save("last.pt")
    (run.folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="missing or shorter"):
        run.resume()


# ---------------------------------------------------------------------------------------- full disk
def limited(size: int):
    """For a child process: files beyond `size` bytes fail, as they do on a full disk."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.slow
def test_a_full_disk_gives_a_clear_message_and_costs_no_checkpoint(studies, tmp_path):
    _, args = studies
    out = tmp_path / "r"
    train.main([*args, "--model", "v1", "--steps", "2", "--out", str(out)])
    before = (out / "last.pt").read_bytes()
    more = ["--resume", "--out", out, "--steps", 4]
    done = call(more, preexec_fn=limited(len(before) // 2))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"error: {out / 'last.pt'}: cannot be written: ")
    assert (out / "last.pt").read_bytes() == before
    assert not list(out.glob(".*"))
    train.main([str(a) for a in more])
    assert [r["step"] for r in log_of(out) if "loss" in r] == [1, 2, 3, 4]


@pytest.mark.parametrize("written", ["cache", "mask"])
@pytest.mark.slow
def test_a_full_disk_leaves_no_partial_file(studies, tmp_path, written):
    root, args = studies
    if written == "cache":
        args = with_root(args, root / "cache", tmp_path / "cache")
        options = [*args, "--steps", 2, "--out", tmp_path / "r"]
        done = call(options, preexec_fn=limited(20_000))
    else:
        weights = checkpoint(tmp_path / "w.pt")
        options = ["--checkpoint", weights, "--pet", root / "petct" / SUV]
        options += ["--out", tmp_path / "m.nii"]
        done = call(options, "predict.py", preexec_fn=limited(1000))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert "cannot be written" in message and "free some space" in message
    assert {p.name for p in tmp_path.rglob("*")} <= {"cache", "w.pt"}


def test_atomic_write_keeps_the_old_file_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_write(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and names_in(tmp_path) == {"a.txt"}
    with atomic_write(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names_in(tmp_path) == {"a.txt"}
    with pytest.raises(CannotWrite, match="cannot be written"), atomic_write(path / "below"):
        pass


def test_atomic_write_keeps_a_folder_that_another_process_wrote_first(tmp_path):
    folder = tmp_path / "entry"
    with atomic_write(folder) as part:
        part.mkdir()
        (part / "mine").touch()
        folder.mkdir()
        (folder / "theirs").touch()
    assert names_in(tmp_path) == {"entry"} and names_in(folder) == {"theirs"}


def test_temporary_files_of_dead_processes_are_removed(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    here = files._place()
    (tmp_path / f".{dead.pid}.{here}.last.pt").touch()
    (tmp_path / f".{dead.pid}.{here}.entry").mkdir()
    kept = {
        f".{os.getpid()}.{here}.last.pt",  # of a living process
        f".{dead.pid}.0123abcd.last.pt",  # of another host, where that process may live
        ".notes", ".2024.notes.txt",
    }  # fmt: skip
    for name in kept:
        (tmp_path / name).touch()
    clean_parts(tmp_path)
    assert names_in(tmp_path) == kept
    old = tmp_path / f".{dead.pid}.89abcdef.last.pt"
    old.touch()
    os.utime(old, (0, 0))  # no process writes for that long
    clean_parts(tmp_path)
    assert names_in(tmp_path) == kept
    clean_parts(tmp_path, alone=True)
    assert names_in(tmp_path) == {".notes", ".2024.notes.txt"}


# -------------------------------------------------------------------------------- several processes


@pytest.mark.slow
@pytest.mark.parametrize("model", ["v2", "v3", "v4", "valindria", "nnunet"])
def test_two_processes_equal_one_with_the_doubled_batch(studies, tmp_path, model):
    """Losses agree within 1e-5 at every step; v3's classifier has a batch norm and a dropout."""
    _, args = studies
    # No rotation: it brings in almost empty patches, in which instance norm magnifies rounding
    # errors 300 times.
    args = [*args, "--model", model, "--steps", 6, "--validations", 2, "--ema", 0.9]
    args += ["--rotate", 0, "--scale", 0]
    port = random.Random(os.getpid() + len(model + model)).randrange(20_000, 60_000)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = [*TORCHRUN, str(port)]
    two = call([*args, "--batch", 1, "--out", tmp_path / "two"], launcher=launcher, env=env)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("studies to train on") == 1
    train.main([str(a) for a in [*args, "--batch", 2, "--out", tmp_path / "one"]])

    a, b = log_of(tmp_path / "two"), log_of(tmp_path / "one")
    assert [r["step"] for r in a] == [r["step"] for r in b]
    assert len([r for r in a if "loss" in r]) == 6
    for x, y in zip(a, b):
        if "loss" not in x:
            continue
        assert x.keys() == y.keys()
        assert x.pop("grad_norm") == pytest.approx(y.pop("grad_norm"), rel=1e-3)
        assert x == pytest.approx(y, abs=1e-5)
    assert names_in(tmp_path / "two") == names_in(tmp_path / "one")
    tables = [(tmp_path / f / "validation.csv").read_text().splitlines() for f in ("one", "two")]
    cases = [[line.split(",")[0] for line in table] for table in tables]
    assert cases[0] == cases[1]


def test_the_parts_of_all_processes_are_gathered_in_order(monkeypatch):
    items = list(range(7))
    parts = [items[rank::3] for rank in range(3)]

    def all_gather(out, _):
        out[:] = parts

    monkeypatch.setattr(parallel, "size", lambda: 3)
    monkeypatch.setattr(parallel.dist, "all_gather_object", all_gather)
    assert parallel.gather(parts[0]) == items


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.slow
def test_the_number_of_loader_processes_does_not_change_the_batches(studies, tmp_path, workers):
    _, args = studies
    runs = []
    for count in (0, workers):
        options = ["--steps", "5", "--workers", str(count), "--out", str(tmp_path / str(count))]
        run = make_run([*args, *options])
        run.seen = 2  # as after one step
        runs.append(run)
    one, other = (list(run.batches()) for run in runs)
    assert len(one) == len(other) == 4
    assert all(torch.equal(a[k], b[k]) for a, b in zip(one, other) for k in a)
    second = [runs[0].patches[i]["image"] for i in (2, 3)]
    assert torch.equal(one[0]["image"], torch.stack(second))


# ------------------------------------------------------------------------------ errors for people
SUV = "PETCT_0000/visit1/SUV.nii.gz"
CT = "PETCT_0000/visit1/CTres.nii.gz"
SEG = "PETCT_0000/visit1/SEG.nii.gz"


def edit(path: Path, change) -> None:
    """Replace an image by change(voxels, affine)."""
    image = nib.load(path)
    voxels, affine = change(np.asarray(image.dataobj).copy(), image.affine.copy())
    nib.save(nib.Nifti1Image(voxels, affine), path)


def with_nan(voxels, affine):
    voxels[tuple(n // 2 for n in voxels.shape)] = np.nan  # in the body; outside it becomes air
    return voxels, affine


def elsewhere(voxels, affine):
    affine[0, 3] += 3000  # mm
    return voxels, affine


def shifted(voxels, affine):
    affine[0, 3] += 9  # mm
    return voxels, affine


BAD_DATA = {  # what is done to a folder of good studies, and words of the message
    "corrupt": (
        lambda r: (r / SUV).write_bytes(b"nonsense"),
        [SUV, "not a readable NIfTI file", "export it again"],
    ),
    "truncated": (
        lambda r: (r / CT).write_bytes((r / CT).read_bytes()[:3000]),
        [CT, "cut short", "copy or export it again"],
    ),
    "missing": (
        lambda r: (r / SEG).unlink(),
        [SEG, "missing", "a study needs PET, CT and truth"],
    ),
    "a CT of another place": (
        lambda r: edit(r / CT, elsewhere),
        [CT, "SUV.nii.gz"],
    ),
    "origins that differ": (
        lambda r: edit(r / SEG, shifted),
        [SEG, "not on one grid"],
    ),
    "NaN": (
        lambda r: edit(r / SUV, with_nan),
        [SUV, "NaN or infinite"],
    ),
    "4D": (
        lambda r: edit(r / SUV, lambda voxels, affine: (np.stack([voxels, voxels], -1), affine)),
        [SUV, "expected 3 dimensions", "take one volume"],
    ),
    "labels out of range": (
        lambda r: edit(r / SEG, lambda voxels, affine: (voxels + 6, affine)),
        [SEG, "expected labels [0, 1], found [0, 6, 7]", "--label-values"],
    ),
    "Bq/ml": (
        lambda r: edit(r / SUV, lambda voxels, affine: (voxels * 5000, affine)),
        [SUV, "look like Bq/ml or SUV x 1000, not SUV", "divide by injected dose"],
    ),
    "an empty folder": (
        lambda r: shutil.rmtree(r) or r.mkdir(),
        ["no studies", "expected SUV.nii.gz or another layout"],
    ),
    "no folder": (
        lambda r: shutil.rmtree(r),
        ["no such folder"],
    ),
    "a study twice": (
        lambda r: shutil.copytree(r / "PETCT_0000", r / "COPY"),
        ["COPY", "PETCT_0000", "remove one of the two"],
    ),
    "a name twice": (
        lambda r: shutil.copytree(r / "PETCT_0000/visit1", r / "PETCT_0000__visit1"),
        ["both would be study PETCT_0000__visit1", "rename one"],
    ),
}


def error_of(main, args, capsys) -> str:
    """Run a program that must print one error line, without a traceback, and exit with 2."""
    before = sys.argv
    sys.argv = ["program", *map(str, args)]
    try:
        with pytest.raises(SystemExit) as left:
            run_program(main)
    finally:
        sys.argv = before
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line and "%|" not in line]  # without progress bars
    assert line.startswith("error: ") and len(line) < 500
    return line


@pytest.mark.parametrize("defect", BAD_DATA)
def test_bad_data_gives_a_clear_message(studies, tmp_path, capsys, defect):
    root, args = studies
    shutil.copytree(root / "petct", tmp_path / "in")
    change, words = BAD_DATA[defect]
    change(tmp_path / "in")
    args = with_root(args, root / "petct", tmp_path / "in")
    message = error_of(train.main, [*args, "--steps", "1", "--out", tmp_path / "r"], capsys)
    assert all(w in message for w in words), message
    assert not (tmp_path / "r").exists()


OPTIONS = {  # options, or the content of a file of splits, and words of the message
    "a split that leaks": (
        '[{"train": ["PETCT_0000", "PETCT_0001"], "val": ["PETCT_0001"]}]',
        ["training and validation"],
    ),
    "a split with unknown cases": (
        '[{"train": ["PETCT_0000"], "val": ["Smith"]}]',
        ["names ['Smith'], which the data does not hold"],
    ),
    "a split that is no JSON": ("{", ["expected a JSON list"]),
    "a patch that the strides do not divide": (
        "--patch 40 32 32",
        ["size (40, 32, 32)", "multiples of 16", "use (32, 32, 32)"],
    ),
    "an unknown model": ("--model v7", ["no version 'v7'"]),
    "a missing GPU": ("--device cuda", ["sees no CUDA device", "use --device cpu"]),
    "Triton without a GPU": ("--kernels triton", ["Triton kernels were asked for"]),
    "no steps": ("--steps 0", ["give 1 or more"]),
    "too much overlap": ("--overlap 1.5", ["give 0.9 or less"]),
    "an unknown fold": ("--fold 9", ["there are folds 0 to 1"]),
    "a file as the run folder": ("--out {file}", ["a file; name a folder"]),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_impossible_options_give_a_clear_message(studies, tmp_path, capsys, monkeypatch, option):
    _, args = studies
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    text, words = OPTIONS[option]
    file = tmp_path / "file"
    file.write_text(text)
    more = ["--splits", file]
    if text.startswith("--"):
        more = text.format(file=file).split()
    message = error_of(train.main, [*args, "--out", tmp_path / "r", *more], capsys)
    assert all(w in message for w in words), message
    assert names_in(tmp_path) == {"file"}


def test_prediction_refuses_unsuitable_checkpoints_and_options(studies, tmp_path, capsys):
    root, _ = studies
    pet = root / "petct" / SUV
    mask = tmp_path / "m.nii.gz"

    def message(*args):
        return error_of(predict.main, args, capsys)

    def message_for(*weights):
        return message("--checkpoint", *weights, "--pet", pet, "--out", mask)

    good = checkpoint(tmp_path / "a.pt")
    brain = checkpoint(tmp_path / "brain.pt", data="brain", model="v2")
    assert "of brain: give --image" in message_for(brain)
    assert "an ensemble needs networks of one kind" in message_for(good, brain)
    wide = checkpoint(tmp_path / "wide.pt", channels=[4, 4, 4, 4, 4])
    assert "does not fit the network it names" in message_for(wide)
    half = tmp_path / "half.pt"
    half.write_bytes(good.read_bytes()[:5000])
    expected = "not a checkpoint of train.py, or cut short; give a run's best.pt"
    assert expected in message_for(half)
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert "it holds no config" in message_for(tmp_path / "other.pt")
    assert "no such checkpoint" in message_for(tmp_path / "none.pt")
    assert "never overwritten" in message("--checkpoint", good, "--pet", pet, "--out", pet)
    one = ("--checkpoint", good, "--pet", pet, "--out", mask)
    assert "use one of auto, triton, plain" in message(*one, "--kernels", "fast")
    assert not mask.exists()


def test_prediction_refuses_a_model_of_a_later_version(studies, tmp_path, capsys):
    root, _ = studies
    state = torch.load(checkpoint(tmp_path / "a.pt"), weights_only=True)
    later = tmp_path / "v9.pt"
    torch.save(state | {"config": state["config"] | {"model": "v9"}}, later)
    args = ["--checkpoint", later, "--pet", root / "petct" / SUV, "--out", tmp_path / "m.nii.gz"]
    assert "does not fit the network it names (v9)" in error_of(predict.main, args, capsys)


@pytest.mark.slow
def test_resuming_refuses_another_model(studies, tmp_path, capsys):
    _, args = studies
    folder = tmp_path / "r"
    train.main([*args, "--model", "v1", "--steps", "1", "--out", str(folder)])
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    capsys.readouterr()
    message = error_of(train.main, ["--resume", "--out", folder, "--model", "v2"], capsys)
    assert "of a run with --model v1, not --model v2; give another --out" in message
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.slow
def test_a_patch_larger_than_the_volume_is_padded(studies, tmp_path):
    _, args = studies
    out = tmp_path / "r"
    patch = ["--patch", "96", "64", "128"]
    train.main([*args, *patch, "--steps", "1", "--model", "v1", "--out", str(out)])
    training, _ = train.load_cases(train.parse_config(args))
    assert training[0].array("label").shape[0] < 96
    assert (out / "best.pt").exists()


@pytest.mark.slow
def test_an_error_in_a_preprocessing_process_gives_the_same_message(studies, tmp_path):
    root, args = studies
    shutil.copytree(root / "petct", tmp_path / "in")
    (tmp_path / "in" / SUV).write_bytes(b"nonsense")
    args = with_root(args, root / "petct", tmp_path / "in")
    args = with_root(args, root / "cache", tmp_path / "c")
    done = call([*args, "--out", tmp_path / "r"])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith("error: ") and "not a readable NIfTI file" in message
    assert not [name for name in names_in(tmp_path / "c") if name.startswith(".")]
    assert len(data.find_petct(tmp_path / "in")) == 6


@pytest.mark.slow
def test_a_reader_that_closes_the_pipe_causes_no_traceback():
    """As in `replicate.py --list | head`."""
    reader, writer = os.pipe()
    process = start(["--list"], program="replicate.py", stdout=writer)
    os.close(reader)
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert err == "" and process.returncode == 1
