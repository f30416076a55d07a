"""A small run that is killed at any change of the file system, or meets a fault, and is resumed.

A run's life: phantoms are written, studies preprocessed, steps taken, checkpoints saved, studies
validated, pictures drawn. `trial` ends a run by SIGKILL just before its n-th change; `FAULTS` are
what else may happen. In the end the log, the table and the weights must be those of a run that met
nothing, and nothing else may be left in its folders.
"""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from judge import in_a_fork
from tqdm import tqdm

import data
import files
import parallel
import predict
import processes
import train

OPTIONS = (
    "--data phantom --phantoms 4 --spacing 20 20 20 --patch 32 32 32 --channels 1 1 2 2 2 "
    "--model v1 --batch 1 --folds 2 --steps 4 --validations 2 --overlap 0 --no-flips --ema 0.9 "
    "--workers 0 --checkpoint-minutes 0 --device cpu"
).split()


work = processes.work


def in_this_process(function, jobs: list, _, title: str) -> None:
    """`processes.work` without child processes, so that a kill meets all that a run does."""
    work(function, jobs, 0, title)


class Lost(Exception):
    """A run ended with other results than it should."""


def start(folder: Path, *more, before: Callable = lambda: None) -> tuple[int, str]:
    """Run train.py in a forked process, in `folder`: its exit code and output."""

    def call():
        torch.set_num_threads(1)
        os.chdir(folder)
        sys.argv = ["train.py", *map(str, more)]
        processes.work = in_this_process
        before()
        files.run_program(train.main)

    return in_a_fork(call)


def arguments(*more) -> list[str]:
    return [*OPTIONS, "--cache", "cache", "--out", "run", *map(str, more)]


def results(folder: Path) -> tuple:
    """What must not change: the log without times, the table, the weights, the names of files."""
    run = folder / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    weights = predict.load_checkpoint(run / "best.pt")["model"]
    weights = {name: tensor.numpy().tobytes() for name, tensor in weights.items()}
    names = sorted(str(p.relative_to(run)) for p in run.rglob("*"))
    left = [str(p) for p in folder.rglob(".*")]
    return json.dumps(rows), (run / "validation.csv").read_text(), weights, names, left


def check_same(folder: Path, reference: Path, weights: bool = True) -> None:
    """Raise Lost unless the run in `folder` ended like that in `reference`."""
    names = ("the log", "the table", "the weights", "the files", "what is left over")
    for name, found, expected in zip(names, results(folder), results(reference)):
        if found != expected and (weights or name != "the weights"):
            raise Lost(f"{name} differ: {found!s:.300} instead of {expected!s:.300}")


# ------------------------------------------------------------------------------------------- kills
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link")


def at_change(number: int, act: Callable[[], None], counter: Path | None = None) -> None:
    """From now on, call `act` just before this process's n-th change of the working folder."""
    here, writing = os.getcwd(), os.O_WRONLY | os.O_RDWR
    count = 0

    def hook(event, args):
        nonlocal count
        writes = event == "open" and isinstance(args[2], int) and args[2] & writing
        if not (writes or event in CHANGES) or not isinstance(args[0], str | bytes | os.PathLike):
            return
        if not os.path.abspath(os.fsdecode(args[0])).startswith(here):
            return
        count += 1
        if counter:
            os.pwrite(fd, b"%08d" % count, 0)
        if count == number:
            act()

    fd = os.open(counter, os.O_RDWR | os.O_CREAT) if counter else -1
    sys.addaudithook(hook)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def count_changes(folder: Path) -> int:
    """The reference: a run that meets nothing. Returns how often it changes the file system."""
    folder.mkdir(parents=True)
    counter = folder.with_suffix(".count")
    code, said = start(folder, *arguments(), before=lambda: at_change(-1, kill, counter))
    if code:
        raise RuntimeError(f"the reference run failed: {said[-2000:]}")
    return int(counter.read_text())


def trial(folder: Path, reference: Path, number: int) -> None:
    """Kill a run just before its n-th change, then again soon after, and resume it to its end."""
    folder.mkdir(parents=True)
    for kill_at in (number, 1 + number % 7):
        code, said = start(
            folder, *arguments("--resume"), before=lambda n=kill_at: at_change(n, kill)
        )
        if code not in (-signal.SIGKILL, 0):
            raise AssertionError(f"exit code {code}: {said[-500:]}")
    code, said = start(folder, *arguments("--resume"))
    if code:
        raise AssertionError(f"resume: exit code {code}: {said[-500:]}")
    check_same(folder, reference)


# ------------------------------------------------------------------------------------------ faults
def ended(result: tuple[int, str], *codes: int) -> str:
    """Check an exit code and that there is no traceback; returns what was said last."""
    code, said = result
    lines = said.replace("\r", "\n").strip().splitlines() or [""]
    if code == -1000:
        raise TimeoutError(lines[-1])
    if code not in codes or "Traceback" in said:
        raise AssertionError(f"exit code {code}, not {codes}: {said[-600:]}")
    if code == 2 and not lines[-1].startswith("error: "):
        raise AssertionError(f"not an error in a line: {lines[-1]}")
    return lines[-1]


def halfway(folder: Path) -> None:
    """A run that SIGTERM stopped in its third step."""
    step = train.Run.train_step

    def train_step(self, batch):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    def before():
        train.Run.train_step = train_step  # in the fork only

    folder.mkdir(parents=True)
    ended(start(folder, *arguments(), before=before), 143)


def resumed(act: Callable[[Path], None], refuses: bool = False, weights: bool = True):
    """A fault between two parts of a run: it is refused in a line, or ends as if nothing was."""

    def fault(folder: Path, reference: Path) -> str:
        halfway(folder)
        act(folder)
        ended(start(folder, "--resume", "--out", "run"), 2 if refuses else 0)
        if refuses:
            return "refused"
        check_same(folder, reference, weights)
        return "used rightly"

    return fault


def interrupted(before: Callable[[], None], *codes: int) -> Callable[[Path, Path], str]:
    """A fault during a run, which ends with one of the codes; it then ends as if nothing was."""

    def fault(folder: Path, reference: Path) -> str:
        folder.mkdir(parents=True)
        ended(start(folder, *arguments("--resume"), before=before), *codes)
        if left := [p for p in folder.rglob(".[0-9]*")]:
            raise Lost(f"left behind: {left[0]}")
        ended(start(folder, *arguments("--resume")), 0)
        check_same(folder, reference)
        return "used rightly"

    return fault


def at_call(owner, name: str, number: int, act: Callable[[], None]) -> Callable[[], None]:
    """Before a run: replace a function by one that calls `act` at its n-th call."""

    def before():
        original, count = getattr(owner, name), 0

        def replaced(*args, **more):
            nonlocal count
            count += 1
            if count == number:
                act()
            return original(*args, **more)

        setattr(owner, name, replaced)

    return before


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_memory() -> None:
    raise MemoryError


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def kill_a_child() -> None:
    while not multiprocessing.active_children():
        time.sleep(0.01)
    multiprocessing.active_children()[0].kill()


def loader_killed() -> None:
    parallel.loaders = lambda *_: 1
    at_call(train.Run, "train_step", 2, kill_a_child)()


def preprocessing_killed() -> None:
    processes.work = work  # in child processes
    at_call(data, "preprocess", 1, kill)()


def cut(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        for path in sorted(folder.glob(name)):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return act


def flip(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        for path in sorted(folder.glob(name)):
            raw = bytearray(path.read_bytes())
            raw[len(raw) // 2] ^= 16
            path.write_bytes(raw)

    return act


def removed(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        for path in folder.glob(name):
            path.unlink()

    return act


def other_line_ends(folder: Path) -> None:
    path = folder / "run" / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def another_study(folder: Path) -> None:
    root = next((folder / "cache").glob("phantom-4-*"))
    shutil.copytree(root / "PETCT_0001", root / "PETCT_0009")
    path = next((root / "PETCT_0009").rglob("SUV.nii.gz"))
    image = files.read_nifti(path)
    array = (image.get_fdata() * 0.5).astype(np.float32)
    data.nib.save(data.nib.Nifti1Image(array, image.affine), path)


def a_second_process(folder: Path, reference: Path) -> str:
    """A second process on the run that one is in the middle of: refused; the first is unharmed."""
    folder.mkdir(parents=True)
    answer = folder.with_suffix(".second")

    def second():
        no_bars = tqdm._instances.clear  # else a fork would draw the first run's bar, too
        answer.write_text(json.dumps(start(folder, *arguments("--resume"), before=no_bars)))

    before = at_call(train.Run, "train_step", 3, second)
    ended(start(folder, *arguments(), before=before), 0)
    ended(json.loads(answer.read_text()), 2)
    check_same(folder, reference)
    return "refused"


def not_a_number(folder: Path, reference: Path) -> str:
    """A run whose weights become NaN in its fourth step keeps its state before that."""
    step = train.Run.train_step

    def train_step(self, batch):
        if self.step == 3:
            next(self.model.parameters()).data.fill_(float("nan"))
        return step(self, batch)

    def before():
        train.Run.train_step = train_step

    folder.mkdir(parents=True)
    ended(start(folder, *arguments(), before=before), 2)
    (folder / "run" / "nonfinite.pt").unlink()
    ended(start(folder, "--resume", "--out", "run"), 0)
    check_same(folder, reference)
    return "used rightly"


def another_hosts_entry(folder: Path) -> None:
    part = folder / "cache" / ".4321.0a1b2c3d.PETCT_0000__visit1-0123456789abcdef"
    part.mkdir()


def kept_entry(folder: Path, reference: Path) -> str:
    """An entry that another host is writing to the cache stays."""
    halfway(folder)
    another_hosts_entry(folder)
    ended(start(folder, "--resume", "--out", "run"), 0)
    (folder / "cache" / ".4321.0a1b2c3d.PETCT_0000__visit1-0123456789abcdef").rmdir()
    check_same(folder, reference)
    return "used rightly"


Run, INT, TERM = train.Run, signal.SIGINT, signal.SIGTERM
FAULTS: dict[str, Callable[[Path, Path], str]] = {
    "Ctrl-C while phantoms are written": interrupted(
        at_call(train.phantom, "_store", 3, send(INT)), 130),
    "SIGTERM while the cache is built": interrupted(
        at_call(data, "preprocess", 2, send(TERM)), 143),
    "Ctrl-C in a step": interrupted(at_call(Run, "train_step", 2, send(INT)), 130),
    "SIGTERM in a step": interrupted(at_call(Run, "train_step", 4, send(TERM)), 143),
    "Ctrl-C in a validation": interrupted(at_call(Run, "predict", 2, send(INT)), 130),
    "SIGTERM in the last validation": interrupted(at_call(Run, "predict", 4, send(TERM)), 143),
    "disk full while phantoms are written": interrupted(
        at_call(Path, "write_bytes", 5, no_space), 2),
    "disk full at a checkpoint": interrupted(at_call(Path, "write_bytes", 16, no_space), 2),
    "memory full while preprocessing": interrupted(at_call(data, "preprocess", 2, no_memory), 2),
    "memory full in a step": interrupted(at_call(Run, "train_step", 3, no_memory), 2),
    "GPU memory full in a step": interrupted(at_call(Run, "train_step", 3, out_of_memory), 2),
    "a loader process is killed": interrupted(loader_killed, 2),
    "a preprocessing process is killed": interrupted(preprocessing_killed, 2),
    "a second process on the run": a_second_process,
    "the loss becomes NaN": not_a_number,
    "another host writes to the cache": kept_entry,
    "cache: image.npy cut": resumed(cut("cache/*/image.npy")),
    "cache: a bit of label.npy flipped": resumed(flip("cache/*/label.npy")),
    "cache: case.json missing": resumed(removed("cache/*/case.json")),
    "a phantom's file cut": resumed(cut("cache/phantom*/*/*/SUV.nii.gz")),
    "last.pt cut": resumed(cut("run/last.pt")),
    "a bit of last.pt flipped": resumed(flip("run/last.pt")),
    # The best validation may have been an earlier one: then, best.pt is the next best.
    "best.pt missing": resumed(removed("run/best.pt"), weights=False),
    "config.json cut": resumed(cut("run/config.json")),
    "the log has other line ends": resumed(other_line_ends),
    "the log is missing": resumed(removed("run/metrics.jsonl"), refuses=True),
    "a bit of the log flipped": resumed(flip("run/metrics.jsonl"), refuses=True),
    "a study added": resumed(another_study, refuses=True),
}  # fmt: skip


def outcome_of(call: Callable[[], str]) -> tuple[str, str]:
    """The outcome of a trial or a fault, one of `judge.OUTCOMES`, and what went wrong."""
    try:
        return call(), ""
    except Lost as e:
        return "lost", str(e)
    except TimeoutError as e:
        return "hung", str(e)
    except MemoryError as e:
        return "over memory", str(e)
    except Exception as e:
        return "crashed", f"{type(e).__name__}: {e}"


def kill_numbers(count: int, changes: int, seed: int) -> list[int]:
    """Which changes to be killed at: spread over the whole run, else at random."""
    step = changes / count
    rng = random.Random(seed)
    return [1 + int(step * (k + rng.random())) for k in range(count)]
