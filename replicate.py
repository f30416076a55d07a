"""Replicate the paper: train every system of a claim, collect the results, and judge the claim.

    python replicate.py --preset laptop --claims 1                    needs no data: on the phantom
    python replicate.py --preset laptop --claims 1 2 4 --root ROOT    PET/CT, minutes per run
    python replicate.py --preset paper --claims 1 2 4 --root AUTOPET  the full protocol, for a GPU
    python replicate.py --list                                        show claims and experiments
    python replicate.py --report                                      write tables and figures again

A claim is a list of orders, "this system beats that one" (claims.py); the systems that it names are
its experiments. Every run is a separate process of `train.py --resume`, and several run at a time.
A finished run is recognized by its rows in results/SOURCE.csv and never repeated, not even in a
fresh clone; a killed run resumes from its last checkpoint. Options after `--` go to every train.py:
`... --claims 1 -- --steps 50`.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import train  # first: it sets how OpenMP's threads wait

# isort: split
import numpy as np
import torch

import claims
import patches
from claims import Experiment, experiments_for, read_results, read_rows
from config import FIELDS, Config, parse_config
from files import (
    Interrupts,
    UserError,
    clean_parts,
    run_program,
    source_version,
    write_table,
    writing,
)
from options import ALL_FOLDS
from predict import evaluating, load_model, sliding_window
from processes import available_cores

# What all systems of a source have in common: data and budget. "demo" stands in for PET/CT if there
# is no --root. The PET/CT phantoms are trained on as `make train` does it.
CHEAP = "--validations 1 --overlap 0.25 --no-flips --checkpoint-minutes 0.5"
PRESETS = {
    "laptop": {
        "petct": f"--data petct --steps 450 {CHEAP}",
        "demo": f"--data phantom --phantoms 40 {CHEAP}",
        "phantom": f"--data phantom --phantoms 100 {CHEAP}",
        "brain": f"--data phantom-brain --phantoms 40 --steps 450 {CHEAP}",
    },
    "paper": {
        "petct": "--data petct --preset autopet",
        "brain": "--data brain --preset brats",
    },
}
SOURCES = ("petct", "demo", "phantom", "brain")
# The first estimate of a laptop run's time, in minutes of one core. HEAVY networks work at full
# resolution from the first layer on.
MINUTES, HEAVY_MINUTES = 5, 30
HEAVY = ("nnunet", "blackbean", "segresnet")
# Options that do not change a run's result, and so are not part of its key.
MACHINE = {
    "root", "cache", "splits", "folds", "out", "device", "workers", "kernels", "compile",
    "channels_last", "checkpoint_minutes", "overwrite", "resume",
}  # fmt: skip


# ----------------------------------------------------------------------------------------- the runs
@dataclass
class Run:
    """One training: an experiment, a fold and a seed."""

    experiment: Experiment
    source: str
    preset: str
    fold: int
    folds: int
    seed: int
    key: str  # its permanent name: a digest of the options that matter and the fold's studies
    study: str  # the same for all runs that may be compared
    argv: list[str]
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.source}, {self.experiment.name}, fold {self.fold}, seed {self.seed}"


def digest(*things) -> str:
    """Twelve hexadecimal digits that identify things which JSON can hold."""
    return hashlib.sha256(json.dumps(things).encode()).hexdigest()[:12]


def options_that_matter(c: Config) -> dict:
    """The options that differ from those of the first version, under the names they had first.

    So the keys of finished runs stay the same if an option is renamed, or a new one comes with a
    default that changes nothing. Where the default itself has changed, it is in the key.
    """
    found = {}
    for name, f in FIELDS.items():
        before = f.metadata["before"]
        first = f.default if before is None else before
        if name not in MACHINE and getattr(c, name) != first:
            found[f.metadata["was"] or name] = getattr(c, name)
    return found


def plan(a: argparse.Namespace, extra: list[str]) -> list[Run]:
    """The runs that are asked for, fold by fold. Raises UserError.

    Prepares the data: phantoms are written, volumes preprocessed.
    """
    chosen = experiments_for(a.claims, a.only, a.preset)
    if not chosen:
        names, numbers = " ".join(a.only), " ".join(map(str, a.claims))
        raise UserError(
            f"--only {names}: not among the systems of claim {numbers}; --list shows them"
        )
    runs: dict[str, Run] = {}
    for data in dict.fromkeys(e.data for e in chosen):
        for run in plan_data(data, [e for e in chosen if e.data == data], a, extra):
            runs.setdefault(run.key, run)  # a run that serves two claims is made once
    return list(runs.values())


def plan_data(
    data: str, experiments: list[Experiment], a: argparse.Namespace, extra: list[str]
) -> list[Run]:
    """The runs of the experiments that use the same data."""
    source, common = source_of(data, a)
    common = [*common, *extra]
    base = parse_config(common)
    print(f"{source}: finding and preparing the studies", flush=True)
    folds = find_folds(base)
    numbers = a.folds
    if numbers is None:
        numbers = [0] if source == "demo" else range(len(folds))
    study = digest(options_that_matter(dataclasses.replace(base, fold=0, seed=0)), folds)
    runs = []
    for seed, fold, e in product(a.seeds, numbers, experiments):
        if not 0 <= fold < len(folds):
            raise UserError(f"--folds {fold}: there are folds 0 to {len(folds) - 1}")
        argv = [*common, *e.options.split(), "--fold", str(fold), "--seed", str(seed)]
        key = key_of(argv, folds[fold])
        name = f"{e.name} fold{fold} seed{seed} {key}".replace(" ", "-")
        folder = a.runs / a.preset / source / name
        run = Run(e, source, a.preset, fold, len(folds), seed, key, study, argv, folder)
        runs.append(run)
    return runs


def key_of(argv: list[str], fold: list[list[str]]) -> str:
    """The key of the run with these options on these [training, held-out] studies."""
    try:
        return digest(options_that_matter(parse_config(argv)), fold)
    except UserError:  # train.py will report it in the run's log, and the other runs continue
        return digest(argv, fold)


def source_of(data: str, a: argparse.Namespace) -> tuple[str, list[str]]:
    """Where an experiment's studies come from, and the options that all its runs share."""
    sources = PRESETS[a.preset]
    source = data if data in sources else "petct"  # AutoPET, too, has patients without tumor
    if a.preset == "paper" and source == "petct" and not a.root:
        raise UserError("--preset paper needs --root, a folder in AutoPET's layout")
    if a.preset == "paper" and source == "brain" and not a.brain_root:
        raise UserError(
            "--preset paper needs --brain-root, a folder in MSD Task01's layout, for claim 6"
        )
    if source == "petct" and not a.root:
        source = "demo"
    common = sources[source].split()
    if source == "petct":
        common += ["--root", a.root]
        if a.splits:
            common += ["--splits", a.splits]
    if source == "brain" and a.brain_root:
        common += ["--data", "brain", "--root", a.brain_root]
    return source, common


def find_folds(c: Config) -> list[list[list[str]]]:
    """[[training, held-out], ...]: the names of the studies, per fold."""
    folds = train.load_folds(dataclasses.replace(c, fold=ALL_FOLDS))
    return [[sorted(case.name for case in side) for side in fold] for fold in folds]


# ---------------------------------------------------------------------- one run, in its own process
# No run may outlive this program, even if this program is killed (SIGKILL): it would keep using the
# machine unseen. So the standard input of a child process is a pipe to which its parent never
# writes: a read returns when the parent closes the pipe or dies; then the child saves and stops.
COMMAND = [sys.executable, str(Path(__file__).resolve()), "--child"]


def start(run: Run, slot: int, jobs: int) -> subprocess.Popen:
    """Start a run as a process with its share of the cores and a GPU; its output is in log.txt."""
    with writing(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, available_cores() // jobs))}
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    with open(run.folder / "log.txt", "a") as log:
        return subprocess.Popen(
            [*COMMAND, str(run.folder), *run.argv], env=env,
            stdin=subprocess.PIPE, stdout=log, stderr=log,
            start_new_session=True,  # Ctrl-C reaches only this program, which passes it on once
        )


def run_child(folder: Path, argv: list[str]) -> None:
    """The child process: train, then measure the reconstruction."""
    threading.Thread(target=stop_with_parent, daemon=True).start()
    with locked(folder / "lock"):  # wait for an orphan that is still saving
        argv = [*argv, "--resume", "--out", str(folder)]
        train.main(argv)
        reconstruction_errors(folder, parse_config(argv))


def stop_with_parent() -> None:
    """Wait until the parent closes its end of the pipe or dies; then ask train.py to stop."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)  # it saves a checkpoint and stops


@contextlib.contextmanager
def locked(path: Path):
    """Wait until no other process is in this block with the same path.

    The operating system releases the lock when its holder dies, however it dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def reconstruction_errors(folder: Path, c: Config) -> None:
    """Write RUN/reconstruction.csv: per held-out study, the error of the reconstructed CT.

    It is the root mean squared error in HU, for clean, noisy and shuffled input. The corruption is
    the paper's, and the same for every system, whatever the system was trained with. There is no
    file if the network does not reconstruct the CT.
    """
    if "ct" not in c.network_tasks:
        return
    model, _ = load_model(folder / "last.pt", c.device)
    hu = c.ct_window[1] - c.ct_window[0]
    columns = {"none": "ct_clean", "noise": "ct_noise", "shuffle": "ct_shuffle"}
    rows = []
    for n, case in enumerate(train.load_cases(c)[1]):
        image = torch.from_numpy(case.array("image").astype(np.float32)).to(c.device)
        row = {"case": case.name}
        for how, column in columns.items():
            reconstructed = reconstruct_ct(model, image, how, 1_000_000 * n, c)
            error = reconstructed - image[0]
            row[column] = hu * float(error.square().mean().sqrt())
        rows.append(row)
    write_table(rows, folder / "reconstruction.csv")


def reconstruct_ct(
    model: torch.nn.Module, image: torch.Tensor, how: str, first_key: int, c: Config
) -> torch.Tensor:
    """The CT (D, H, W) from an image (2, D, H, W) whose windows are corrupted.

    The windows' corruptions have the keys `first_key`, `first_key` + 1, ...
    """
    keys = iter(range(first_key, first_key + 1_000_000))

    def predict(x: torch.Tensor) -> torch.Tensor:
        own_keys = torch.tensor([next(keys) for _ in x])
        return model(patches.corrupt_ct(x, how, own_keys)).ct

    with evaluating(model):
        return sliding_window(image, predict, c.patch, 0.0, c.batch)[0]


# ------------------------------------------------------------------------------------------ results
def result_rows(run: Run) -> list[dict]:
    """What a finished run adds to the csv file: a row per case and target."""
    log = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    last = [entry for entry in log if "loss" in entry][-1]
    errors = {r["case"]: r for r in read_rows(run.folder / "reconstruction.csv")}
    rows = []
    for row in read_rows(run.folder / "validation.csv"):
        mine = errors.get(row["case"], {})
        rows.append({
            "study": run.study,
            "preset": run.preset,
            "system": run.experiment.name,
            "fold": run.fold,
            "folds": run.folds,
            "seed": run.seed,
            **row,
            **{name: mine.get(name, "") for name in ("ct_clean", "ct_noise", "ct_shuffle")},
            "steps": last["step"],
            "seconds": last["seconds"],
            "commit": source_version(),
            "options": " ".join(without_paths(run.argv)),
            "run": run.key,
        })
    return rows


def without_paths(argv: list[str]) -> list[str]:
    """Options without the paths of this machine."""
    kept = []
    words = iter(argv)
    for word in words:
        if word in ("--root", "--splits", "--cache"):
            next(words, None)  # its value
        else:
            kept.append(word)
    return kept


def record(run: Run, path: Path, lock: Path) -> list[dict]:
    """Put a finished run's rows into the csv file; return them.

    The file is written atomically, in an order that does not depend on which run ended first.
    """
    mine = result_rows(run)
    with locked(lock):
        rows = [r for r in read_results(path) if r["run"] != run.key] + mine
        rows.sort(key=sort_key)
        columns = dict.fromkeys(name for r in rows for name in r)  # an older file may lack some
        write_table([{name: r.get(name, "") for name in columns} for r in rows], path)
    return mine


def sort_key(row: dict) -> tuple:
    fold, seed = int(row["fold"]), int(row["seed"])
    return row["study"], row["system"], seed, fold, row["case"], row["target"]


# ----------------------------------------------------------------------------------------- all runs
@dataclass
class Job:
    """A run in progress."""

    run: Run
    process: subprocess.Popen
    began: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def stop(self) -> None:
        """Let the run save and stop."""
        if self.process.stdin:
            self.process.stdin.close()

    def failure(self) -> str:
        """Why it failed, in one line."""
        log, code = self.run.folder / "log.txt", self.process.returncode
        how = f"killed by signal {-code}; " if code < 0 else ""
        return f"{self.run.title}: {how}{last_line(log)} (full log: {log})"


def run_all(todo: list[Run], jobs: int, results: Path, lock: Path) -> list[str]:
    """Make all runs, `jobs` at a time. Return a line for each that failed.

    Raises SystemExit if interrupted, after the runs have saved.
    """
    waiting, failed = list(todo), []
    running: dict[int, Job] = {}  # by slot: 0 to jobs - 1
    times: list[float] = []  # seconds, of the runs that ended well
    with Interrupts() as interrupts:
        try:
            while running or (waiting and not interrupts.asked):
                while waiting and len(running) < jobs and not interrupts.asked:
                    slot = next(i for i in range(jobs) if i not in running)
                    run = waiting.pop(0)
                    running[slot] = Job(run, start(run, slot, jobs), time.monotonic())
                if interrupts.asked:
                    for job in running.values():
                        job.stop()
                ended = [slot for slot, job in running.items() if job.process.poll() is not None]
                for job in [running.pop(slot) for slot in ended]:
                    if job.process.returncode == 0:
                        rows = record(job.run, results / f"{job.run.source}.csv", lock)
                        times.append(job.seconds)
                        left = time_left(times, len(waiting), list(running.values()), jobs)
                        print_result(f"[{len(times)}/{len(todo)}]", job, rows, left)
                    elif not interrupts.asked:
                        failed.append(job.failure())
                        print(f"failed: {failed[-1]}", flush=True)
                time.sleep(0.1)
        finally:
            for job in running.values():
                job.process.terminate()
    if interrupts.asked:
        raise SystemExit(
            f"stopped after {len(times)} of {len(todo)} runs; the same command resumes the rest"
        )
    return failed


def print_result(count: str, job: Job, rows: list[dict], left: float) -> None:
    """Print the Dice and the time of a finished run, and the time left (seconds)."""
    dice = [float(r["dice"]) for r in rows if r["dice"]]
    mean = np.mean(dice) if dice else math.nan
    more = f"; about {clock(left)} left" if left else ""
    print(f"{count} {job.run.title}: Dice {mean:.3f}, {clock(job.seconds)}{more}", flush=True)


def time_left(times: list[float], waiting: int, running: list[Job], jobs: int) -> float:
    """Estimate the seconds until all runs have ended, from the `times` of those that have."""
    pace = float(np.mean(times))
    return (pace * waiting + sum(max(pace - job.seconds, 0) for job in running)) / jobs


def last_line(path: Path) -> str:
    """Return the last line of a log that is not blank; progress bars rewrite theirs with CR."""
    lines = path.read_text(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")


def clock(seconds: float) -> str:
    """A time in words: "1 h 5 min", "12 min" or "30 s"."""
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if seconds >= 100 else f"{seconds:.0f} s"


# -------------------------------------------------------------------------------------- the program
def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into our options and, after `--`, those of train.py."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Options after -- go to every train.py."
    )
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="laptop",
        help="laptop: minutes of one core per run; paper: the full protocol (laptop)")
    add("--claims", type=int, nargs="+", default=[], help="numbers of claims; --list shows them")
    add("--only", nargs="+", default=[], metavar="NAME", help="only these of their systems")
    add("--root", default="",
        help="PET/CT studies (docs/data.md); without it the laptop preset takes the phantom")
    add("--splits", default="",
        help="folds of --root in nnU-Net's format; default: splits_final.json there, or by patient")
    add("--brain-root", default="",
        help="brain studies (docs/data.md); without it the laptop preset takes the brain phantom")
    add("--folds", type=int, nargs="+",
        help="default: all; only the first of the phantom that stands in for --root")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--jobs", type=int, default=0,
        help="runs at a time; default: one per GPU, or without GPUs one per core, at most 8")
    add("--results", type=Path, default=Path("results"),
        help="folder of the csv files, tables and figures (results)")
    add("--runs", type=Path, default=Path("runs/replicate"),
        help="folder of the run folders (runs/replicate)")
    add("--list", action="store_true", help="show claims and systems, and run nothing")
    add("--report", action="store_true", help="write tables and figures again, and run nothing")
    a = parser.parse_args(argv[:split])
    if not (a.claims or a.only or a.list or a.report):
        raise UserError("say which claims: --claims 1 2 ...; --list shows them")
    if a.jobs < 0:
        raise UserError(f"--jobs {a.jobs}: give 1 or more")
    return a, argv[split + 1 :]


def show_list() -> None:
    """Print the claims, their systems, and the systems' options of train.py."""
    for claim in claims.CLAIMS:
        systems = claims.systems_of(claim)
        names = [e.name for e in claims.EXPERIMENTS if e.data == claim.data and e.name in systems]
        print(f"{claim.number}  {claim.text}" + (" (--preset paper)" if claim.paper else ""))
        print(f"   {claim.data}: {', '.join(names)}")
    print("\nsystems and their options of train.py")
    for e in claims.EXPERIMENTS:
        print(f"   {e.data:8} {e.name:20} {e.options}")


def make_runs(a: argparse.Namespace, runs: list[Run]) -> list[str]:
    """Make those runs that results do not hold yet. Return a line for each that failed."""
    sources = {run.source for run in runs}
    done = {r["run"] for source in sources for r in read_results(a.results / f"{source}.csv")}
    todo = [run for run in runs if run.key not in done]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them in {a.results} already")
    if not todo:
        return []
    jobs = min(a.jobs or torch.cuda.device_count() or min(available_cores(), 8), len(todo))
    print(f"to be run, {jobs} at a time:")
    for run in todo:
        resumes = (run.folder / "last.pt").exists()
        print(f"   {run.title}" + (" (resumes)" if resumes else ""))
    if a.preset == "laptop":
        minutes = [HEAVY_MINUTES if r.experiment.name in HEAVY else MINUTES for r in todo]
        about = clock(60 * max(sum(minutes) / jobs, max(minutes)))
        heavy = f"{', '.join(HEAVY)}: {HEAVY_MINUTES}"
        print(f"about {about} at {MINUTES} minutes of one core per run ({heavy})", flush=True)
    failed = run_all(todo, jobs, a.results, a.runs / "lock")
    return [f"{len(failed)} of {len(todo)} runs failed:", *failed] if failed else []


def main(argv: list[str]) -> None:
    """The program. Raises UserError for errors the user can fix.

    Raises SystemExit with code 1 if a run failed or the work was interrupted.
    """
    if argv[:1] == ["--child"]:
        return run_child(Path(argv[1]), argv[2:])
    a, extra = parse_arguments(argv)
    if a.list:
        return show_list()
    sources, failed = SOURCES, []
    if not a.report:
        if a.results.is_dir():
            clean_parts(a.results)
        runs = plan(a, extra)
        sources = tuple(dict.fromkeys(run.source for run in runs))
        failed = make_runs(a, runs)
    for source in sources:
        if path := claims.report(a.results, source):
            print(f"{path}: tables, verdicts and figures")
        elif a.report:
            print(f"{a.results / source}.csv: no such file; nothing to report")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    run_program(main)
