"""Several processes on one machine: a lock per folder, children that may be killed, cores, memory.

    lock_folder                     one process per run folder, also between containers and hosts
    work                            a function on many studies in child processes
    available_cores, free_memory    what this process may use, also inside a container
    clear_errors                    a full memory or a killed process becomes one line
"""

import contextlib
import errno
import fcntl
import os
import platform
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from files import Stopped, UserError, writing


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder during the block; UserError if one is in it.

    A record lock on FOLDER/.lock, which the block removes at its end. The operating system releases
    it when its holder dies, however it dies; forked processes do not inherit it. It also works
    between containers, and between hosts if their network file system passes locks on (NFS does).
    """
    path = folder / ".lock"
    while True:
        with writing(path):
            file = open(path, "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EAGAIN, errno.EACCES):
                file.seek(0)
                holder = file.read(200) or "another process"
                advice = "wait for its end, stop it, or choose another folder"
                raise UserError(f"{folder}: {holder} is using it; {advice}") from None
            print(f"{folder}: no locks here ({e.strerror}); start only one run in it", flush=True)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its holder removed it meanwhile
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def follow_parent(_=None) -> None:
    """In a child process: leave Ctrl-C and SIGTERM to the parent, and end when the parent dies."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def work(function: Callable, jobs: list, workers: int, title: str) -> None:
    """Call function(job) for all jobs, in `workers` child processes, or in this one if it is 0.

    Raises UserError if a child is killed. Ctrl-C and SIGTERM end all children at once (Stopped).
    """
    bar = tqdm(total=len(jobs), desc=title, unit="case", disable=not jobs)
    pool = ProcessPoolExecutor(min(workers, len(jobs)) or 1, initializer=follow_parent)
    try:
        for _ in (pool.map if workers else map)(function, jobs):
            bar.update()
    except BrokenProcessPool:
        problem = f"{title}: one of {workers} processes was killed, as if memory was full"
        advice = "close other programs, or allow fewer processes with --workers"
        raise UserError(f"{problem}: {advice}; what is done is kept") from None
    except (KeyboardInterrupt, Stopped) as e:
        for process in list((pool._processes or {}).values()):
            process.kill()
        if isinstance(e, Stopped):
            done = f"{bar.n} of {len(jobs)} studies are done and kept"
            raise Stopped(e.number, f"stopped while {title}; {done}") from None
        raise
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)


def available_cores() -> int:
    """The number of cores that this process may use, by its affinity and its container's quota."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    limits = [text.split() for (text,) in _controls("cpu", "cpu.max")]
    limits += _controls("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")
    for quota, period in limits:
        if quota.strip() not in ("max", "-1"):
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def free_memory() -> int:
    """Bytes of memory that are free on this machine, and within the limit of its container."""
    free = 2**62
    with contextlib.suppress(OSError):  # Linux only
        free = int(re.findall(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[0]) * 1024
    limits = _controls("memory", "memory.max", "memory.current", "memory.stat")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    for limit, used, parts in [*limits, *_controls("memory", *names)]:
        if limit.strip() != "max":
            cached = re.findall(r"^(?:total_)?inactive_file (\d+)", parts, re.MULTILINE)
            free = min(free, int(limit) - int(used) + max(map(int, cached), default=0))
    return max(0, free)


def most_workers(asked: int | None, needed: int) -> int:
    """As many processes as asked for, or one per core, but no more than fit into free memory.

    needed: bytes per process. At least 1.
    """
    return min(asked or available_cores(), max(1, free_memory() // needed))


def _controls(controller: str, *names: str) -> list[list[str]]:
    """The texts of these control files, of this process's cgroup and of those above it."""
    found = []
    with contextlib.suppress(OSError):  # Linux only
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)  # version 2 has one tree for all controllers
            root = Path("/sys/fs/cgroup", controller if controllers else "")
            if controllers and controller not in controllers.split(","):
                continue
            folder = root / path.strip("/")
            for group in (folder, *folder.parents):
                if all((group / name).is_file() for name in names):
                    found.append([(group / name).read_text() for name in names])
    return found


SMALLER = "use a smaller --batch or --patch, or close other programs"
CAUSES = {  # words in an error of the system or of PyTorch: what happened, and what to change
    r"CUDA out of memory|CUDA error: out of memory|ALLOC_FAILED":
        "the GPU's memory is full: use a smaller --batch or --patch, or --amp bf16",
    r"shared memory|/torch_\w+|shm|Bus error":
        "shared memory (/dev/shm) is full: use fewer --workers, or 0; in Docker --shm-size=8g",
    r"DataLoader worker .* (?:killed|exited)":
        f"a loader process was killed, as if memory was full: use fewer --workers; {SMALLER}",
    r"[Cc](?:an't|annot|ould not|ouldn't) (?:allocate|create a memory|create a primitive)|bad_alloc"
    r"|not enough memory|Unable to allocate": f"memory is full: {SMALLER}",
    r"start new thread|Resource temporarily unavailable":
        "no more processes or threads are allowed here: use fewer --workers, or raise ulimit -u",
}  # fmt: skip


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Turn errors of a full memory, a killed process or a forbidden file into a UserError."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError, UserError) as e:
        if isinstance(e, UserError):
            if "in DataLoader worker" not in str(e):
                raise
            last = str(e).strip().removesuffix("\\n").split("\\n")[-1]  # of its traceback
            raise UserError(last.partition(": ")[2]) from None
        if isinstance(e, MemoryError):
            raise UserError(f"memory is full: {SMALLER}") from None
        for words, advice in CAUSES.items():
            if re.search(words, str(e)):
                raise UserError(advice) from None
        if isinstance(e, OSError) and e.filename:
            advice = "check its permissions, or choose another"
            raise UserError(f"{e.filename}: {e.strerror}; {advice}") from None
        raise
