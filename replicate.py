"""The paper's claims as experiments: train every system of a claim, collect the results, say what was seen.

    python replicate.py --preset laptop --claims 1                       no data needed: small, on the phantom
    python replicate.py --preset laptop --claims 1 2 4 --root ROOT       on PET/CT studies, minutes of one core a run
    python replicate.py --preset paper --claims 1 2 4 --root AUTOPET     the full protocol, for a GPU
    python replicate.py --list | --report                                the experiments | tables and figures from the csv files again

A claim is a list of orders, "this system beats that one"; the systems it names are its experiments. Every run is a process of its own,
`train.py --resume`, several at a time. One that ended is known by its rows in results/SOURCE.csv and never repeated, there or in a fresh
clone; one that was killed goes on from its last checkpoint. Options after `--` go to every train.py: `... --claims 1 -- --steps 50`.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import io
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
from claims import Experiment, experiments_for, read_rows
from config import FIELDS, Config, parse_config
from evaluate import write_table
from files import Interrupts, UserError, clean_parts, run_program, writing
from predict import evaluating, load_model, sliding_window

# What all systems of a source have in common: data and budget. "demo" stands in for PET/CT where no --root is given.
# The phantoms' two patches a step are those of the runs in results/.
CHEAP = "--validations 1 --overlap 0.25 --no-flips --checkpoint-minutes 0.5"
PRESETS = {
    "laptop": {
        "petct": f"--data petct --steps 450 {CHEAP}",
        "demo": f"--data phantom --phantoms 40 --batch 2 --steps 900 {CHEAP}",
        "phantom": f"--data phantom --phantoms 100 --batch 2 --steps 900 {CHEAP}",
        "brain": f"--data phantom-brain --phantoms 40 --steps 450 {CHEAP}",
    },
    "paper": {"petct": "--data petct --preset autopet", "brain": "--data brain --preset brats"},
}
MINUTES, HEAVY_MINUTES = 5, 30  # of one core, a run of the laptop preset: the first estimate
HEAVY = ("nnunet", "blackbean", "segresnet")  # full resolution from the first layer on
MACHINE = {"root", "cache", "splits", "folds", "out", "device", "workers", "kernels", "compile", "channels_last", "checkpoint_minutes",
           "overwrite", "resume"}  # fmt: skip  # options that make no other run


# ------------------------------------------------------------------------------------------------------------------ the runs
@dataclass
class Run:
    """One training: an experiment, a fold, a seed. `key` names it for good: options that matter and the studies of the fold."""

    experiment: Experiment
    source: str
    preset: str
    fold: int
    folds: int
    seed: int
    key: str
    study: str  # the same for all runs that may be compared
    argv: list[str]
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.source}, {self.experiment.name}, fold {self.fold}, seed {self.seed}"


def digest(*things) -> str:
    """Twelve hexadecimal digits that name what JSON can hold."""
    return hashlib.sha256(json.dumps(things).encode()).hexdigest()[:12]


def options_that_matter(c: Config) -> dict:
    """Those that differ from train.py's defaults, so that an option that train.py gets later changes no key."""
    default = Config()
    names = {f.metadata["was"] or name: name for name, f in FIELDS.items() if name not in MACHINE}
    found = {was: (getattr(c, name), getattr(default, name)) for was, name in names.items()}
    return {was: value for was, (value, other) in found.items() if value != other}


def plan(a: argparse.Namespace, extra: list[str]) -> list[Run]:
    """The runs that are asked for, fold by fold. Prepares the data: phantoms are written, volumes preprocessed. Raises UserError."""
    runs: dict[str, Run] = {}  # by key: what serves two claims is run once
    chosen = experiments_for(a.claims, a.only, a.preset)
    if not chosen:
        raise UserError(f"--only {' '.join(a.only)}: not among the systems of claim {' '.join(map(str, a.claims))}; --list shows them")
    for kind in dict.fromkeys(e.data for e in chosen):
        source, common = source_of(kind, a)
        base = parse_config([*common, *extra])
        print(f"{source}: finding and preparing the studies", flush=True)
        folds = splits_of(base)
        numbers = a.folds if a.folds is not None else [0] if source == "demo" else range(len(folds))
        study = digest(options_that_matter(dataclasses.replace(base, fold=0, seed=0)), folds)
        for seed, fold, e in product(a.seeds, numbers, [e for e in chosen if e.data == kind]):
            if not 0 <= fold < len(folds):
                raise UserError(f"--folds {fold}: there are folds 0 to {len(folds) - 1}")
            argv = [*common, *extra, *e.options.split(), "--fold", str(fold), "--seed", str(seed)]
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    key = digest(options_that_matter(parse_config(argv)), folds[fold])
            except (UserError, SystemExit):  # train.py will say so in the run's log, and the other runs go on
                key = digest(argv, folds[fold])
            name = f"{e.name} fold{fold} seed{seed} {key}".replace(" ", "-")
            folder = a.runs / a.preset / source / name
            runs.setdefault(key, Run(e, source, a.preset, fold, len(folds), seed, key, study, argv, folder))
    return list(runs.values())


def source_of(kind: str, a: argparse.Namespace) -> tuple[str, list[str]]:
    """Where the studies of a kind of experiment come from, and the options that all its runs have in common."""
    sources = PRESETS[a.preset]
    source = kind if kind in sources else "petct"  # AutoPET has healthy patients of its own
    if source == "petct" and not a.root:
        if a.preset == "paper":
            raise UserError("--preset paper needs --root, a folder in AutoPET's layout")
        source = "demo"
    common = sources[source].split()
    if source == "petct":
        common += ["--root", a.root, *(["--splits", a.splits] if a.splits else [])]
    if source == "brain" and a.preset == "paper" and not a.brain_root:
        raise UserError("--preset paper needs --brain-root, a folder in MSD Task01's layout, for claim 6")
    if source == "brain" and a.brain_root:
        common += ["--data", "brain", "--root", a.brain_root]
    return source, common


def splits_of(c: Config) -> list[list[list[str]]]:
    """[[training, held-out], ...] names of the studies, a fold."""
    first = train.load_cases(dataclasses.replace(c, fold=0))
    patients = {k.patient for side in first for k in side}
    n = len(json.loads(Path(c.splits).read_text())) if c.splits else min(c.folds, len(patients))
    sides = [first, *[train.load_cases(dataclasses.replace(c, fold=fold)) for fold in range(1, n)]]
    return [[sorted(k.name for k in side) for side in both] for both in sides]


@contextlib.contextmanager
def alone(path: Path):
    """Wait until no other process is in here with the same path. The kernel opens the lock when its holder dies, however it dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def child(folder: Path, argv: list[str]) -> None:
    """One run, in a process of its own: alone in its folder, which an orphan may still be leaving, and no longer than its parent lives."""

    def watch():
        os.read(0, 1)  # a pipe that the parent never writes to: this returns when the parent is gone
        os.kill(os.getpid(), signal.SIGTERM)  # save and stop

    threading.Thread(target=watch, daemon=True).start()
    with alone(folder / "lock"):
        argv = [*argv, "--resume", "--out", str(folder)]
        train.main(argv)
        reconstruction_errors(folder, parse_config(argv))


def reconstruction_errors(folder: Path, c: Config) -> None:
    """RUN/reconstruction.csv: of each held-out study the CT's root mean squared error in HU, of clean, noisy and shuffled input.

    The corruption is the paper's, the same for every system whatever it was trained with. Networks that reconstruct no CT have no file.
    """
    if c.task != "petct":
        return
    model, _ = load_model(folder / "last.pt", c.device)
    with evaluating(model):
        made = getattr(model(torch.zeros(1, 2, *c.patch, device=c.device)), "ct", None)
    if made is None or made.shape[1] != 1:  # v4's is a segmentation
        return
    rows = []
    for n, case in enumerate(train.load_cases(c)[1]):
        image = torch.from_numpy(case.array("image").astype(np.float32)).to(c.device)
        row = {"case": case.name}
        for how in ("none", "noise", "shuffle"):
            keys = iter(range(1_000_000 * n, 1_000_000 * (n + 1)))  # a window's corruption is the same for every system

            def reconstruct(x, how=how, keys=keys):
                return model(patches.corrupt_ct(x, how, torch.tensor([next(keys) for _ in x]))).ct

            with evaluating(model):
                error = sliding_window(image, reconstruct, c.patch, 0.0, c.batch)[0] - image[0]
            hu = c.ct_window[1] - c.ct_window[0]
            row["ct_clean" if how == "none" else f"ct_{how}"] = hu * float(error.square().mean().sqrt())
        rows.append(row)
    write_table(rows, folder / "reconstruction.csv")


def rows_of(run: Run) -> list[dict]:
    """What a run that has ended adds to the csv file, a row a case and target."""
    log = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    last = [r for r in log if "loss" in r][-1]
    made = {r["case"]: r for r in read_rows(run.folder / "reconstruction.csv")}
    head = {"study": run.study, "preset": run.preset, "system": run.experiment.name, "fold": run.fold, "folds": run.folds, "seed": run.seed}
    machine = {"--root", "--splits", "--cache"}
    shown = [w for i, w in enumerate(run.argv) if w not in machine and (not i or run.argv[i - 1] not in machine)]
    tail = {"steps": last["step"], "seconds": last["seconds"], "commit": train.code_version()["code"], "options": " ".join(shown)}
    columns = ("ct_clean", "ct_noise", "ct_shuffle")
    return [
        head | row | {k: made.get(row["case"], {}).get(k, "") for k in columns} | tail | {"run": run.key}
        for row in read_rows(run.folder / "validation.csv")
    ]


def enter(run: Run, path: Path, lock: Path) -> list[dict]:
    """Put a run's rows into the csv file, which is written whole and is in one order whatever ended first."""
    mine = rows_of(run)
    with alone(lock):
        rows = [r for r in read_rows(path) if r["run"] != run.key] + mine
        rows.sort(key=lambda r: (r["study"], r["system"], int(r["seed"]), int(r["fold"]), r["case"], r["target"]))
        columns = dict.fromkeys(k for r in rows for k in r)  # an older file may lack some
        write_table([{k: r.get(k, "") for k in columns} for r in rows], path)
    return mine


COMMAND = [sys.executable, str(Path(__file__).resolve()), "--child"]


def start(run: Run, slot: int, jobs: int) -> subprocess.Popen:
    """A run as a process: its share of the cores, a GPU of its own, its output in log.txt."""
    with writing(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, cores() // jobs))}
    if torch.cuda.is_available():
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        gpus = gpus if gpus[0] else [str(i) for i in range(torch.cuda.device_count())]
        env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    with open(run.folder / "log.txt", "a") as log:  # a session of its own: Ctrl-C is passed on once, by us
        return subprocess.Popen(
            [*COMMAND, str(run.folder), *run.argv], stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, start_new_session=True
        )


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def last_line(path: Path) -> str:
    """Of a log, the last line that says something; a progress bar's rewritings are lines."""
    lines = path.read_text(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing in its log")


def clock(seconds: float) -> str:
    """A time as people say it."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if seconds >= 100 else f"{seconds:.0f} s"


def run_all(todo: list[Run], jobs: int, results: Path, lock: Path) -> list[str]:
    """Run them, `jobs` at a time; returns a line for each that failed. Raises SystemExit when interrupted."""
    waiting, running, failed, times, ended = list(todo), {}, [], [], 0
    with Interrupts() as interrupts:
        try:
            while running or (waiting and not interrupts.asked):
                while waiting and len(running) < jobs and not interrupts.asked:
                    slot = next(i for i in range(jobs) if i not in running)
                    run = waiting.pop(0)
                    running[slot] = run, start(run, slot, jobs), time.monotonic()
                for slot, (run, process, began) in list(running.items()):
                    if interrupts.asked and process.poll() is None and process.stdin:
                        process.stdin.close()  # the child saves and stops
                        process.stdin = None
                    if process.poll() is None:
                        continue
                    del running[slot]
                    if process.returncode:
                        if not interrupts.asked:
                            how = f"killed by signal {-process.returncode}; " if process.returncode < 0 else ""
                            failed.append(f"{run.title}: {how}{last_line(run.folder / 'log.txt')} (all of it: {run.folder / 'log.txt'})")
                            print(f"failed: {failed[-1]}", flush=True)
                        continue
                    mine = enter(run, results / f"{run.source}.csv", lock)
                    ended, now = ended + 1, time.monotonic()
                    times.append(now - began)
                    pace = float(np.mean(times))
                    left = pace * len(waiting) + sum(max(pace - (now - t), 0) for _, _, t in running.values())
                    dice = np.mean([float(r["dice"]) for r in mine if r["dice"]] or [math.nan])
                    more = f"; about {clock(left / jobs)} left" if waiting or running else ""
                    print(f"[{ended}/{len(todo)}] {run.title}: Dice {dice:.3f}, {clock(now - began)}{more}", flush=True)
                time.sleep(0.1)
        finally:
            for _, process, _ in running.values():
                process.terminate()
    if interrupts.asked:
        raise SystemExit(f"stopped with {ended} of {len(todo)} runs ended; the same command goes on where this one was")
    return failed


# --------------------------------------------------------------------------------------------------------------- the program
def options_of(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what follows `--`, which is train.py's."""
    split = argv.index("--") if "--" in argv else len(argv)
    own, extra = argv[:split], argv[split + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Options after -- go to every train.py.")
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="laptop", help="laptop: minutes of one core a run; paper: the full protocol (laptop)")
    add("--claims", type=int, nargs="+", default=[], help="which of the claims; --list shows them")
    add("--only", nargs="+", default=[], metavar="NAME", help="of their systems only these")
    add("--root", default="", help="PET/CT studies in AutoPET's layout; without it the laptop preset takes the phantom")
    add("--splits", default="", help="folds of --root in nnU-Net's form; default: made by patient")
    add("--brain-root", default="", help="brain studies in MSD Task01's layout; without it the laptop preset takes the brain phantom")
    add("--folds", type=int, nargs="+", help="default: all; of the phantom that stands in for --root the first")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--jobs", type=int, default=0, help="runs at a time; default: one a core, at most 8, on GPUs one a GPU")
    add("--results", type=Path, default=Path("results"), help="folder of the csv files, tables and figures (results)")
    add("--runs", type=Path, default=Path("runs/replicate"), help="folder of the run folders (runs/replicate)")
    add("--list", action="store_true", help="show claims and systems, and run nothing")
    add("--report", action="store_true", help="draw tables and figures again, and run nothing")
    a = parser.parse_args(own)
    if not (a.claims or a.only or a.list or a.report):
        raise UserError("say which claims: --claims 1 2 ...; --list shows them")
    if a.jobs < 0:
        raise UserError(f"--jobs {a.jobs}: give 1 or more")
    return a, extra


def show_list() -> None:
    """--list: claims, their systems, and each system's options of train.py."""
    for c in claims.CLAIMS:
        print(f"{c.number}  {c.text}" + (" (--preset paper)" if c.paper else ""))
        print(f"   {c.data}: {', '.join(e.name for e in claims.EXPERIMENTS if e.name in claims.systems_of(c) and e.data == c.data)}")
    print("\nsystems and their options of train.py")
    for e in claims.EXPERIMENTS:
        print(f"   {e.data:8} {e.name:20} {e.options}")


def main(argv: list[str]) -> None:
    """The program. Raises UserError for what the user can mend; exits with 1 where a run failed or the work was interrupted."""
    if argv[:1] == ["--child"]:
        return child(Path(argv[1]), argv[2:])
    a, extra = options_of(argv)
    if a.list:
        return show_list()
    sources, failed = ["petct", "demo", "phantom", "brain"], []
    if not a.report:
        if a.results.is_dir():
            clean_parts(a.results)
        runs = plan(a, extra)
        sources = list(dict.fromkeys(run.source for run in runs))
        done = {r["run"] for source in sources for r in read_rows(a.results / f"{source}.csv")}
        todo = [run for run in runs if run.key not in done]
        jobs = min(a.jobs or (torch.cuda.device_count() or min(cores(), 8)), max(1, len(todo)))
        print(f"{len(runs)} runs, {len(runs) - len(todo)} of them in {a.results} already; to be run, {jobs} at a time:")
        for run in todo:
            print(f"   {run.title}" + (" (goes on)" if (run.folder / "last.pt").exists() else ""))
        if a.preset == "laptop" and todo:
            minutes = [HEAVY_MINUTES if run.experiment.name in HEAVY else MINUTES for run in todo]
            about = clock(60 * max(sum(minutes) / jobs, max(minutes)))
            print(f"about {about} at {MINUTES} minutes of one core a run ({', '.join(HEAVY)}: {HEAVY_MINUTES})", flush=True)
        failed = run_all(todo, jobs, a.results, a.runs / "lock")
    for source in sources:
        if path := claims.report(a.results, source):
            print(f"{path}: tables, verdicts and the figure")
        elif a.report:
            print(f"{a.results / source}.csv: not there")
    if failed:
        raise SystemExit(f"{len(failed)} of {len(todo)} runs failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    run_program(main)
