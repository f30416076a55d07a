"""What a program did with an input: one of `OUTCOMES`, found in a process that may be lost."""

import contextlib
import io
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import inputs
import mutate

from files import UserError

OUTCOMES = ("used rightly", "refused", "crashed", "hung", "over memory", "lost")
SECONDS = 5  # of a core: an input of a few kilobytes takes no longer
WAIT = 120  # seconds in which a process that does nothing is taken to hang, also if others are busy
BYTES = 2**28  # nor does it take more memory than this


class Hung(BaseException):
    """Raised by the alarm; no `except Exception` stops it."""


class Result(NamedTuple):
    """What happened. seeds: those of the mutations, which with the base give the input."""

    kind: str
    base: int
    seeds: tuple[int, ...]
    outcome: str
    detail: str


def content_of(kind: str, base: int, seeds: tuple[int, ...]) -> bytes:
    """The mutated content: a function of its seeds."""
    content = inputs.KINDS[kind].bases[base]
    for seed in seeds:
        try:
            content = inputs.KINDS[kind].mutate(content, random.Random(seed))
        except Exception:  # an earlier mutation has left nothing to change like that
            content = mutate.damage(content, random.Random(seed))
    return content


def judge(kind: str, content: bytes, folder: Path) -> tuple[str, str]:
    """Use a content in this process; returns the outcome and what was said."""
    path = folder / inputs.KINDS[kind].name
    path.write_bytes(content)
    said = io.StringIO()
    before = _peak()
    signal.signal(signal.SIGPROF, _hung)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            inputs.KINDS[kind].use(path)
        outcome, detail = "used rightly", ""
    except UserError as e:
        outcome, detail = "refused", str(e)
        if not detail.isprintable() or len(detail) > 1000:
            outcome, detail = "crashed", f"not a line: {detail!r:.200}"
        elif kind != "command lines" and path.name not in detail:
            outcome, detail = "crashed", f"does not name the file: {detail}"
        elif re.search("machine's memory|memory is full", detail):  # for something so small
            outcome = "over memory"
    except SystemExit as e:
        outcome, detail = "refused" if e.code in (0, 2) else "crashed", f"exit code {e.code}"
    except inputs.Wrong as e:
        outcome, detail = "lost", str(e)
    except Hung:
        outcome, detail = "hung", f"{SECONDS} s"
    except MemoryError:
        outcome, detail = "over memory", "MemoryError"
    except BaseException as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        name = f"{Path(where.filename).name}:{where.lineno}"
        outcome, detail = "crashed", f"{type(e).__name__} at {name}: {e!s:.200}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if _peak() - before > BYTES:
        outcome, detail = "over memory", f"{(_peak() - before) >> 20} MiB"
    return outcome, detail


def _hung(*_):
    raise Hung


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def judge_all(jobs: list[tuple[str, int, tuple[int, ...]]]) -> Iterator[Result]:
    """Judge inputs in a forked process; one that ends or stops it is judged, too."""
    jobs = list(jobs)
    while jobs:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            _child(jobs, write)
        os.close(write)
        rest, hung = b"", False
        while True:
            if not select.select([read], [], [], WAIT)[0]:  # in C, where no alarm is heard
                os.kill(child, signal.SIGKILL)
                hung = True
                break
            chunk = os.read(read, 2**16)
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield Result(*jobs.pop(0), *json.loads(line))
        os.close(read)
        _, status = os.waitpid(child, 0)
        if jobs:
            outcome = "hung" if hung else "crashed"
            detail = f"the process ended with {os.waitstatus_to_exitcode(status)}"
            yield Result(*jobs.pop(0), outcome, detail)


def _child(jobs: list, write: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="faults"))
    code = 1
    try:
        os.chdir(folder)
        size = 2**30 + int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size, size))  # protects the machine
        for job in jobs:
            result = judge(job[0], content_of(*job), folder)
            os.write(write, json.dumps(result).encode() + b"\n")
        code = 0
    except BaseException:  # of the harness, not of what it calls
        traceback.print_exc()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(code)


def plan(count: int, seed: int) -> list[tuple[str, int, tuple[int, ...]]]:
    """Inputs of all kinds, each of one to three mutations."""
    rng = random.Random(seed)
    jobs = []
    for name, kind in inputs.KINDS.items():
        for _ in range(round(count * kind.share)):
            seeds = tuple(rng.getrandbits(32) for _ in range(rng.choice([1, 1, 2, 3])))
            jobs.append((name, rng.randrange(len(kind.bases)), seeds))
    return jobs


def minimize(result: Result) -> Result:
    """The same finding with as few mutations as do it."""
    for seed in result.seeds:
        fewer = tuple(s for s in result.seeds if s != seed)
        found = next(judge_all([(result.kind, result.base, fewer)]))
        if found.outcome == result.outcome:
            return minimize(found)
    return result


def in_a_fork(call: Callable[[], None], seconds: float = 1800) -> tuple[int, str]:
    """Run a program in a forked process: its exit code, or -signal, and what it printed.

    One that does not end in time is killed; its exit code is then -1000.
    """
    with tempfile.TemporaryFile("w+") as out:
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, closefd=False) for n in (1, 2))
            code = 1
            try:
                call()
                code = 0
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        deadline = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                code = -1000
                break
            time.sleep(0.01)
        out.seek(0)
        return code, out.read()
