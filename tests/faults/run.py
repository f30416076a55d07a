"""Kills, faults and mutated inputs, counted: make faults, make faults ARGS="--short --seed 7".

    python tests/faults/run.py            75 kills, every fault of kills.FAULTS, 5,000 inputs
    python tests/faults/run.py --short    10 kills, 8 faults, 700 inputs, in about two minutes

Prints a table and every finding, minimized, and writes the inputs found to tests/faults/kept, which
the tests use again. Exits with 1 unless the last four columns are 0: crashed (a traceback, or an
error that is not one line naming its file), hung, over memory, and lost (results that differ, or
other values than the file holds).
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import inputs  # noqa: E402
import judge  # noqa: E402
import kills  # noqa: E402
import torch  # noqa: E402

KILLS = "kills at a change of the file system"
# What a shell starts in the background ignores Ctrl-C, and so would the runs of the trials.
signal.signal(signal.SIGINT, signal.default_int_handler)


def count_inputs(count: int, seed: int, table: dict, findings: list[str], keep: Path) -> None:
    """Judge mutated inputs of all kinds; keep the minimized content of findings."""
    seen = set()
    for result in judge.judge_all(judge.plan(count, seed)):
        table.setdefault(result.kind, []).append(result.outcome)
        if judge.OUTCOMES.index(result.outcome) < 2 or (result.kind, result.detail[:60]) in seen:
            continue
        seen.add((result.kind, result.detail[:60]))
        small = judge.minimize(result)
        content = judge.content_of(*small[:3])
        name = hashlib.sha256(content).hexdigest()[:8] + "." + inputs.KINDS[small.kind].name
        keep.mkdir(exist_ok=True)
        (keep / name).write_bytes(content)
        findings.append(f"{small.kind}, kept as {name}: {small.outcome}: {small.detail}")


def count_kills(count: int, faults: int, seed: int, table: dict, findings: list[str]) -> None:
    """Kill runs at `count` changes of the file system, and let them meet `faults` faults."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="faults") as work:
        folder, reference = Path(work), Path(work) / "reference"
        changes = kills.count_changes(reference)
        print(f"a run changes the file system {changes} times", flush=True)
        jobs = []
        for number in kills.kill_numbers(count, changes, seed):
            jobs.append((KILLS, f"before change {number}", number))
        names = list(kills.FAULTS)
        for name in sorted(rng.sample(names, min(faults, len(names))), key=names.index):
            jobs.append(("faults", name, kills.FAULTS[name]))

        def do(at: Path, job: tuple) -> tuple[str, str]:

            def call() -> str:
                if callable(job[2]):
                    return job[2](at, reference)
                kills.trial(at, reference, job[2])
                return "used rightly"

            found = kills.outcome_of(call)
            shutil.rmtree(at, ignore_errors=True)
            return found

        with ThreadPoolExecutor(2) as pool:
            places = [folder / str(n) for n in range(len(jobs))]
            for (kind, name, _), (outcome, detail) in zip(jobs, pool.map(do, places, jobs)):
                table.setdefault(kind, []).append(outcome)
                if judge.OUTCOMES.index(outcome) >= 2:
                    findings.append(f"{kind}, {name}: {outcome}: {detail}")
                    print(findings[-1], flush=True)


def render(table: dict[str, list[str]]) -> str:
    """The table in Markdown."""
    lines = ["| | tried | " + " | ".join(judge.OUTCOMES) + " |", "|---" * 8 + "|"]
    every = [outcome for outcomes in table.values() for outcome in outcomes]
    for name, outcomes in [*table.items(), ("**all**", every)]:
        counts = [f"{outcomes.count(outcome):,}" for outcome in judge.OUTCOMES]
        lines.append(f"| {name} | {len(outcomes):,} | " + " | ".join(counts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="about two minutes")
    parser.add_argument("--seed", type=int, help="to repeat a run; a new one by default")
    parser.add_argument("--kills", type=int, help="75; --short: 10")
    parser.add_argument("--faults", type=int, help="all; --short: 8")
    parser.add_argument("--inputs", type=int, help="5,000; --short: 700")
    parser.add_argument("--keep", type=Path, default=HERE / "kept", help="where findings are kept")
    a = parser.parse_args()
    seed = a.seed if a.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts = (10, 8, 700) if a.short else (75, len(kills.FAULTS), 5000)
    given = (a.kills, a.faults, a.inputs)
    n_kills, n_faults, n_inputs = (c if g is None else g for g, c in zip(given, counts))
    table: dict[str, list[str]] = {}
    findings: list[str] = []
    start = time.monotonic()
    if n_inputs:
        count_inputs(n_inputs, seed, table, findings, a.keep)
    middle = time.monotonic()
    if n_kills or n_faults:
        count_kills(n_kills, n_faults, seed, table, findings)
    print("\n" + render(table) + "\n")
    print(f"inputs {middle - start:.0f} s, kills and faults {time.monotonic() - middle:.0f} s")
    for line in findings:
        print(line)
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
