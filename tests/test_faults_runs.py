"""Runs that meet faults: other studies, a second process, NaN, broken files, full memory, signals.

Whatever happens, a run continues as it was, or one line says what to do. Kills at every moment and
mutated inputs are in tests/faults (`make faults`).
"""

import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_data import refused
from test_train import log_of, losses, make_run

import data
import files
import parallel
import phantom
import processes
import train
from files import Stopped, UserError, run_program
from train import Run, main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "no_pictures")]
TINY = (
    "--data petct --model v1 --folds 2 --spacing 20 20 20 --patch 32 32 32 --channels 1 1 2 2 2 "
    "--batch 1 --overlap 0 --no-flips --steps 2 --validations 1"
).split()


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs without the table and pictures of their end, which take most of a short run's time."""
    monkeypatch.setattr(Run, "report", lambda *_: None)
    monkeypatch.setattr(train.figures, "curves", lambda *_: None)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Four small studies and their cache."""
    folder = tmp_path_factory.mktemp("filled")
    phantom.write_petct(folder / "petct", 4, spacing=(20.0, 20.0, 20.0))
    return folder


@pytest.fixture
def run_args(filled, tmp_path):
    """Options of a run of two steps with its own copy of the studies, in tmp_path."""
    shutil.copytree(filled / "petct", tmp_path / "petct")
    return [*TINY, *places(tmp_path)]


def places(folder: Path) -> list[str]:
    """The options that name studies, cache and run in a folder."""
    options = {"--root": folder / "petct", "--cache": folder / "cache", "--out": folder / "run"}
    return [str(word) for option in options.items() for word in option]


def code(program: str, **values) -> subprocess.Popen:
    """Run Python code in the repository in another process."""
    head = "; ".join(f"{name} = {value!r}" for name, value in values.items())
    command = [sys.executable, "-c", f"{head}\n{program}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def exit_code_of(call, monkeypatch, capsys) -> tuple[int, list[str]]:
    """The exit code of a program with this main function, and the lines of its stderr."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_program(lambda _: call())
    return end.value.code, capsys.readouterr().err.splitlines()


def hidden_in(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.name.startswith(".")]


# -------------------------------------------------------------------- a resumed run is the same run
@pytest.fixture(scope="module")
def finished(filled):
    """The folder of a run that has ended."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "report", lambda *_: None)
        main([*TINY, *places(filled)])
    return filled / "run"


@pytest.fixture
def resume_args(finished, run_args, tmp_path):
    """Options that resume a copy of that run, with other copies of the studies, for a step."""
    shutil.copytree(finished, tmp_path / "run")
    return ["--resume", *places(tmp_path), "--steps", "3"]


def add_study(root: Path) -> None:
    shutil.copytree(root / "PETCT_0001", root / "PETCT_0000" / "again")
    file = next((root / "PETCT_0000" / "again").rglob("SUV.nii.gz"))
    change_file(file)


def change_file(path: Path) -> None:
    image = files.read_nifti(path)
    array = image.get_fdata() * 0.9
    data.nib.save(data.nib.Nifti1Image(array.astype(np.float32), image.affine), path)


CHANGES = {
    "a study is added": (add_study, [], "1 added"),
    "studies are removed": (
        lambda root: shutil.rmtree(max(root.iterdir())), [], "removed .PETCT_0002__visit",
    ),
    "a file has changed": (
        lambda root: change_file(next(root.rglob("SUV.nii.gz"))), [], "1 with changed files",
    ),
    "other folds": (lambda root: None, ["--folds", "4"], "held out now that it was trained on|"),
    "another fold": (lambda root: None, ["--fold", "1"], "of a run with --fold 0, not --fold 1"),
    "other labels": (lambda root: None, ["--label-nonzero"], "of a run with --no-label-nonzero"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kept", ["last.pt", "best.pt"])
def test_a_run_is_not_resumed_with_other_studies(resume_args, tmp_path, change, kept):
    act, options, message = CHANGES[change]
    if kept == "best.pt":
        (tmp_path / "run" / "last.pt").unlink()
        message = message if message.startswith("of a run") else "other studies than the run had"
    act(tmp_path / "petct")
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match=message) as e:
        main([*resume_args, *options])
    assert str(tmp_path / "run") in str(e.value) and "--out" in str(e.value)
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_other_studies_are_accepted_on_demand_and_noted(resume_args, tmp_path, capsys):
    add_study(tmp_path / "petct")
    main([*resume_args, "--accept-changes"])
    assert "scores may be too good" in capsys.readouterr().out
    assert [row["step"] for row in log_of(tmp_path / "run") if "changes" in row] == [2]
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert len(state["studies"]["train"]) + len(state["studies"]["val"]) == 5


def test_studies_in_another_place_of_another_date_are_no_change(resume_args, tmp_path):
    for path in (tmp_path / "petct").rglob("*.nii.gz"):
        os.utime(path)
    main(resume_args)
    assert len(losses(tmp_path / "run")) == 3


def test_a_checkpoint_for_others_does_not_name_patients(finished):
    assert b"PETCT_0000" in (finished / "last.pt").read_bytes()
    assert b"PETCT_0000" not in (finished / "best.pt").read_bytes()


# ----------------------------------------------------------------------------- one run, one process
HOLD = """
import time, processes; from pathlib import Path
with processes.lock_folder(Path(folder)):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_one_process_per_run_and_a_lock_that_dies_with_it(run_args, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    holder = code(HOLD, folder=str(folder))
    assert holder.stdout and holder.stdout.readline() == "locked\n"
    try:
        for more in ([], ["--resume"], ["--overwrite"]):
            with refused(folder, f"process {holder.pid}", "stop it, or choose another folder"):
                main([*run_args, *more])
        assert [p.name for p in folder.iterdir()] == [".lock"]
    finally:
        holder.kill()  # SIGKILL: nothing of the process can clean up
        holder.wait()
    main(run_args)
    assert len(losses(folder)) == 2 and not hidden_in(folder)


def test_a_place_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(processes.fcntl, "lockf", lockf)
    with processes.lock_folder(tmp_path):
        pass
    assert capsys.readouterr().out == (
        f"{tmp_path}: no locks here (No locks available); start only one run in it\n"
    )


def test_an_entry_that_another_host_is_writing_stays(run_args, tmp_path):
    theirs = tmp_path / "cache" / ".12345.0a1b2c3d.PETCT_0000__visit1-0123456789abcdef"
    theirs.mkdir(parents=True)
    main(run_args)
    assert theirs.exists()


# ---------------------------------------------------------------------------------------------- NaN
def test_the_last_finite_state_is_kept_and_a_smaller_rate_continues(run_args, tmp_path):
    folder = tmp_path / "run"
    more = ["--lr", "1e4", "--clip", "0", "--checkpoint-minutes", "0", "--steps", "30"]
    with pytest.raises(UserError) as e:
        main([*run_args, *more])
    assert "smaller --lr" in str(e.value) and f"--resume --out {folder}" in str(e.value)
    if (folder / "last.pt").exists():
        state = torch.load(folder / "last.pt", weights_only=True)
        assert all(t.isfinite().all() for t in state["net"].values())
    batch = torch.load(folder / "nonfinite.pt", weights_only=True)["batches"][0]
    assert batch["image"].shape == (1, 2, 32, 32, 32) and batch["label"].dtype == torch.uint8
    main(["--resume", "--out", str(folder), "--lr", "1e-3", "--steps", "6"])
    assert [row["step"] for row in log_of(folder) if "loss" in row] == list(range(1, 7))


def poisoned(steps: set[int]):
    """A `Run.train_step` whose images are NaN in some steps."""
    step = Run.train_step

    def train_step(self, batch):
        if self.step + 1 in steps:
            batch = batch | {"image": torch.full_like(batch["image"], math.nan)}
        return step(self, batch)

    return train_step


def test_steps_that_are_not_finite_are_left_out_on_demand(run_args, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "train_step", poisoned({2, 3}))
    with refused("loss is nan at step 2", "--skip-nonfinite"):
        main([*run_args, "--steps", "5"])
    main([*run_args, "--steps", "5", "--overwrite", "--skip-nonfinite", "--norm", "batch"])
    rows = [row for row in log_of(tmp_path / "run") if "lr" in row]
    assert [row.get("skipped") for row in rows] == [None, 1, 2, None, None]
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["skipped"] == 2
    assert all(t.isfinite().all() for t in state["net"].values())


# ------------------------------------------------------------------------------------- broken files
def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


ENTRIES = ["image.npy", "label.npy", "foreground.npy", "case.json"]
BREAKS = [cut, flip, Path.unlink, lambda path: path.write_bytes(b"")]


@pytest.mark.parametrize("name", ENTRIES)
def test_a_broken_cache_entry_is_made_again(run_args, tmp_path, name, capsys):
    c = train.parse_config(run_args)
    good = {k.name: k.array("image").copy() for k in train.load_cases(c)[0]}
    for act in BREAKS:
        for entry in (tmp_path / "cache").iterdir():
            act(entry / name)
        capsys.readouterr()
        found = train.load_cases(c)[0]
        assert capsys.readouterr().out.count("damaged, and made again") == 4
        assert all(np.array_equal(k.array("image"), good[k.name]) for k in found)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_array_that_is_lost_during_a_run_is_a_line(run_args, tmp_path, monkeypatch, workers):
    run = make_run(run_args)
    for entry in (tmp_path / "cache").iterdir():
        (entry / "image.npy").unlink()
    monkeypatch.setattr(parallel, "loaders", lambda *_: workers)
    with pytest.raises(UserError) as e, processes.clear_errors():
        run.train()
    path, problem = str(e.value).split(": ", 1)
    assert Path(path).name == "image.npy" and Path(path).is_relative_to(tmp_path / "cache")
    assert problem.startswith("removed or changed while it was used") and "next run" in problem


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 1', '"step": 9', 1))


def crlf(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


REBUILT = {  # what is broken after two of four steps; the run then ends as if nothing had been
    "the log has other line ends": ("metrics.jsonl", crlf),
    "config.json is cut": ("config.json", cut),
    "config.json is missing": ("config.json", Path.unlink),
    "best.pt is missing": ("best.pt", Path.unlink),
    "best.pt is damaged": ("best.pt", flip),
    "last.pt is missing": ("last.pt", Path.unlink),
    "last.pt is damaged": ("last.pt", flip),
    "last.pt is empty": ("last.pt", lambda path: path.write_bytes(b"")),
}
REFUSED = {
    "the log is cut": ("metrics.jsonl", cut),
    "the log is missing": ("metrics.jsonl", Path.unlink),
    "the log was edited": ("metrics.jsonl", edit),
}


@pytest.fixture(scope="module")
def halfway(filled, tmp_path_factory):
    """A run after two of four steps, and its losses when it was resumed."""
    folder = tmp_path_factory.mktemp("halfway")
    args = [*TINY, *places(filled), "--steps", "4", "--validations", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "report", lambda *_: None)
        run = make_run([*args, "--out", str(folder / "run")])
        files.write_file(folder / "run" / "config.json", json.dumps(run.c.to_dict()))
        patch.setattr(Run, "progress", lambda self: self.step / 2)
        run.train()
        patch.undo()
        patch.setattr(Run, "report", lambda *_: None)
        shutil.copytree(folder / "run", folder / "end")
        main(["--resume", "--out", str(folder / "end")])
    return folder / "run", losses(folder / "end")


@pytest.mark.parametrize("fault", [*REBUILT, *REFUSED])
def test_broken_files_of_a_run_are_rebuilt_or_named(halfway, tmp_path, fault):
    folder, expected = halfway
    name, act = (REBUILT | REFUSED)[fault]
    shutil.copytree(folder, tmp_path / "run")
    act(tmp_path / "run" / name)
    args = ["--resume", "--out", str(tmp_path / "run")]
    if fault in REFUSED:
        with refused(tmp_path / "run" / name, "put it back, or begin again with --overwrite"):
            main(args)
        return
    main(args)
    assert losses(tmp_path / "run") == expected
    assert {"best.pt", "last.pt", "config.json"} <= {p.name for p in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("act", BREAKS)
def test_a_broken_phantom_file_is_written_again(tmp_path, act):
    path = phantom.write_petct(tmp_path, 1, spacing=(10.0, 10.0, 10.0))[0] / "SUV.nii.gz"
    good = path.read_bytes()
    act(path)
    phantom.write_petct(tmp_path, 1, spacing=(10.0, 10.0, 10.0))
    assert path.read_bytes() == good


# ------------------------------------------------------------------------------- memory and workers
def test_labels_travel_as_bytes(run_args):
    run = make_run(run_args)
    assert next(iter(run.batches()))["label"].dtype == torch.uint8


def kill_a_loader(*_) -> None:
    """End a loader process of this one, as the kernel does when memory is full."""
    deadline = time.monotonic() + 60
    while not (loaders := multiprocessing.active_children()) and time.monotonic() < deadline:
        time.sleep(0.01)
    loaders[0].kill()


def end_at_once(job: int) -> None:
    if job == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_loader_process_is_a_line(run_args, monkeypatch):
    step = Run.train_step
    monkeypatch.setattr(parallel, "loaders", lambda *_: 1)

    def killing(self, batch):
        kill_a_loader()
        return step(self, batch)

    monkeypatch.setattr(Run, "train_step", killing)
    with refused("a loader process was killed", "fewer --workers"):
        main([*run_args, "--steps", "50"])


def test_a_killed_preprocessing_process_is_a_line():
    with refused("preprocessing: one of 1 processes was killed", "--workers", "is kept"):
        processes.work(end_at_once, [1, 2], 1, "preprocessing")


def test_loaders_are_no_more_than_cores_and_shared_memory_allow(monkeypatch, capsys):
    monkeypatch.setattr(parallel, "available_cores", lambda: 4)
    cpu, usage = torch.device("cpu"), shutil.disk_usage("/")
    free = {"value": 2**40}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free["value"]))
    voxels = 4 * 96**3  # 32 MB per batch
    assert [parallel.loaders(w, cpu, voxels) for w in (-1, 0, 3, 100)] == [0, 0, 3, 4]
    assert "--workers 100: the cores and /dev/shm allow only 4" in capsys.readouterr().out
    free["value"] = 2**26  # Docker's default
    assert parallel.loaders(2, cpu, voxels) == 0
    free["value"] = 5 * 9 * voxels
    assert parallel.loaders(2, cpu, voxels) == 2


ERRORS = {
    "CUDA out of memory. Tried to allocate 20 GiB": "the GPU's memory is full: use a smaller",
    "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried":
        "memory is full: use a smaller",
    "unable to open shared memory object </torch_12_3> in read-write mode: No space left":
        "shared memory (/dev/shm) is full: use fewer --workers",
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
    "workers are out of shared memory.": "shared memory (/dev/shm) is full: use fewer --workers",
    "DataLoader worker (pid(s) 12) exited unexpectedly": "a loader process was killed",
    "can't start new thread": "no more processes or threads are allowed here",
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors_of_a_full_memory_are_a_line_that_says_what_to_change(message):
    with refused(ERRORS[message]), processes.clear_errors():
        raise RuntimeError(message)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="sizes differ"), processes.clear_errors():
        raise RuntimeError("sizes differ")
    with refused("memory is full"), processes.clear_errors():
        raise MemoryError
    with refused("/etc/x", "check its permissions"), processes.clear_errors():
        raise PermissionError(errno.EACCES, "Permission denied", "/etc/x")


def test_preprocessing_takes_no_more_processes_than_memory_allows(run_args, monkeypatch, filled):
    counts = []
    monkeypatch.setattr(processes, "work", lambda f, jobs, count, _: counts.append(count))
    monkeypatch.setattr(processes, "available_cores", lambda: 8)
    cases = data.find_petct(filled / "petct")
    for free in (2**40, 2**30, 0):
        monkeypatch.setattr(processes, "free_memory", lambda free=free: free)
        with pytest.raises(UserError):  # as nothing was preprocessed
            data.build_cache(cases, data.Preprocessing(), filled / f"none{free}")
    assert counts[0] == 8 and 1 <= counts[1] <= 3 and counts[2] == 1


def test_the_limits_of_a_container_are_read(tmp_path, monkeypatch):
    values = {("cpu", "cpu.max"): ["150000 100000"]}
    values[("memory", "memory.max", "memory.current", "memory.stat")] = [
        "3000000", "2500000", "anon 1\ninactive_file 700000\n",
    ]  # fmt: skip
    monkeypatch.setattr(
        processes, "_controls", lambda *names: [values[names]] if names in values else []
    )
    assert processes.available_cores() == 1
    assert processes.free_memory() == 3_000_000 - 2_500_000 + 700_000


# ----------------------------------------------------------------------------------------- signals
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize("number,expected", SIGNALS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_while_the_cache_is_built(
    run_args, tmp_path, number, expected, workers, monkeypatch, capsys
):
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    parent, store = os.getpid(), np.save

    def save(path, array):
        store(path, array)
        if os.path.basename(os.path.dirname(path)).split(".")[-1].startswith("PETCT_0001"):
            os.kill(parent, number)  # in the middle of an entry
            time.sleep(0.2 if os.getpid() == parent else 60)

    monkeypatch.setattr(data.np, "save", save)
    monkeypatch.setattr(processes, "available_cores", lambda: 2)
    args = [*run_args, "--workers", str(workers or 1)]
    status, lines = exit_code_of(lambda: main(args), monkeypatch, capsys)
    assert status == expected
    assert lines[-1].startswith("stopped while preprocessing; ") and "kept" in lines[-1]
    assert "Traceback" not in "".join(lines)
    assert not hidden_in(tmp_path / "cache")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "number,expected,when",
    [
        (signal.SIGINT, 130, "step"), (signal.SIGTERM, 143, "validation"),
        (signal.SIGINT, 130, "last validation"),
    ],
)  # fmt: skip
def test_a_signal_during_a_run(run_args, tmp_path, number, expected, when, monkeypatch, capsys):
    method = "train_step" if when == "step" else "predict"
    original = getattr(Run, method)

    def signalled(self, *args):
        if when == "step" or self.step == (4 if "last" in when else 2):
            os.kill(os.getpid(), number)
        return original(self, *args)

    args = [*run_args, "--steps", "4", "--validations", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, method, signalled)
        status, lines = exit_code_of(lambda: main(args), monkeypatch, capsys)
    step = {"step": 1, "validation": 2, "last validation": 4}[when]
    command = f"python train.py --resume --out {tmp_path / 'run'}"
    assert status == expected
    assert lines[-1] == f"stopped after step {step}; to continue: {command}"
    assert not hidden_in(tmp_path / "run")
    main(["--resume", "--out", str(tmp_path / "run")])
    rows = log_of(tmp_path / "run")
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in rows if "val" in r] == [2, 4]  # the one broken off is repeated


def test_a_second_ctrl_c_does_not_wait():
    with pytest.raises(Stopped), files.Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.asked == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


# --------------------------------------------------------------------------------------- --fold all
def test_fold_all_makes_a_run_per_fold_and_resumes(run_args, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    step, steps, said = Run.train_step, [], []

    def train_step(self, batch):
        steps.append((self.c.fold, self.step + 1))
        said.append("".join(capsys.readouterr()))
        if steps == [(0, 1), (0, 2), (1, 1)]:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    monkeypatch.setattr(Run, "train_step", train_step)
    args = [*run_args, "--fold", "all"]
    status, lines = exit_code_of(lambda: main(args), monkeypatch, capsys)
    assert status == 143
    assert lines[-1].endswith(f"python train.py --resume --out {folder}")
    assert "first saved" not in "".join(said)  # neither fold had begun
    main(["--resume", "--out", str(folder)])
    assert steps == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "fold0", "fold1"]
    assert f"{folder}/fold*/best.pt" in capsys.readouterr().out
    states = [torch.load(folder / f"fold{k}" / "last.pt", weights_only=True) for k in range(2)]
    assert states[0]["studies"]["val"].keys() == states[1]["studies"]["train"].keys()
    with refused(folder, "one per fold"):
        main([*run_args, "--fold", "1", "--resume"])
