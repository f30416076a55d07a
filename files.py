"""What all programs here share: errors for people, images read with care, atomic files, locks."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from tqdm import tqdm


class UserError(ValueError):
    """Something the user can fix: bad files or options. Programs print one line and exit with 2."""


class CannotWrite(UserError):
    """A full disk, no permission, a folder of that name: writing further files would fail too."""


class Stopped(SystemExit):
    """Ctrl-C (SIGINT) or SIGTERM; its text says what is kept and how to continue."""

    def __init__(self, number: int, message: str = "interrupted"):
        super().__init__(message)
        self.number = number


def run_program(main: Callable[[list[str]], None]) -> None:
    """Run main(command-line arguments); print a UserError as one line and exit with code 2.

    Ctrl-C and SIGTERM also end it with a line, and with the codes that shells expect, 130 and 143.
    """
    received = []

    def stop(number, _):
        received.append(number)
        raise Stopped(number)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        # nohup ignores a signal; of torchrun's processes, those that wait for the first one are
        # in PyTorch, which calls no handler.
        if signal.getsignal(number) != signal.SIG_IGN and os.environ.get("RANK", "0") == "0":
            before[number] = signal.signal(number, stop)
    try:
        try:
            main(sys.argv[1:])
            sys.stdout.flush()
        except Exception:
            if received:  # numpy, for one, may turn Stopped into another error
                raise Stopped(received[-1]) from None
            raise
    except BrokenPipeError:  # as with `| head`; Python flushes stdout again on exit: redirect it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as e:
        tqdm.write(f"error: {e}", file=sys.stderr)  # after any progress bar
        sys.exit(2)
    except Stopped as e:
        tqdm.write(f"\n{e}", file=sys.stderr)
        sys.exit(128 + e.number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn any OSError of the block, which writes `path`, into a CannotWrite with advice."""
    try:
        yield
    except OSError as e:
        problem = f"{path}: cannot be written: {e.strerror or e}"
        raise CannotWrite(f"{problem}; free some space, or choose another folder") from None


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name next to `path`; after the block, sync it and rename it to `path`.

    So a crash, a full disk and a second reader all meet either the old file or folder or the
    complete new one. A folder that another process wrote meanwhile stays. Raises CannotWrite.
    """
    path = Path(path)
    # The end of the name has the suffix, which tells the format; a longer one might be too long.
    part = path.with_name(f".{os.getpid()}.{_place()}.{path.name[-60:]}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            for file in part.iterdir() if part.is_dir() else [part]:
                with open(file, "rb") as f:
                    os.fsync(f.fileno())
            try:
                os.replace(part, path)
            except OSError:
                if not (part.is_dir() and path.is_dir()):
                    raise
    finally:
        remove(part)


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file atomically."""
    with atomic_write(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def clean_parts(folder: Path, alone: bool = False) -> None:
    """Remove the temporary files of `atomic_write` that killed processes left in a folder.

    Those of other hosts and containers may be in use: they are removed after a day, or at once if
    the caller knows that no other process writes there (`alone`).
    """
    for part in folder.glob(".[0-9]*.*"):
        match = re.fullmatch(r"\.(\d+)\.([0-9a-f]{8})\..+", part.name, re.DOTALL)
        if not match:
            continue
        with contextlib.suppress(FileNotFoundError):
            dead = time.time() - part.stat().st_mtime > 86_400
            if match[2] == _place():
                dead = not _alive(int(match[1]))
            if dead or alone:
                remove(part)


@functools.cache
def _place() -> str:
    """Eight digits of where a process number is valid: this boot of this host, this container."""
    names = [platform.node()]
    with contextlib.suppress(OSError):  # Linux only
        names.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        names.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("".join(names).encode()).hexdigest()[:8]


def remove(part: Path) -> None:
    """Remove a file or a folder, if possible."""
    with contextlib.suppress(OSError):
        shutil.rmtree(part) if part.is_dir() else part.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only checks that the process exists
    except OSError as e:
        return isinstance(e, PermissionError)  # it exists, and belongs to another user
    return True


class Interrupts:
    """In the block, Ctrl-C and SIGTERM only set `asked`; a second Ctrl-C interrupts at once."""

    asked = 0  # the signal's number: a loop in the block checks it, finishes its step and saves

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {n: signal.signal(n, self._ask) for n in numbers}
        return self

    def _ask(self, number: int, _) -> None:
        if number == signal.SIGINT == self.asked:
            raise Stopped(number)
        self.asked = number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """In this inner block, they interrupt at once."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


def _unreadable(path: Path, error: Exception, advice: str) -> UserError:
    reason = (str(error) or repr(error)).splitlines()[0]
    return UserError(f"{path}: not a readable NIfTI file{advice} ({reason})")


def read_nifti(path, ndim: int = 3) -> nib.Nifti1Image:
    """Load an image as float32. UserError if it is missing, broken, not finite or not `ndim`-D."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        image: Any = nib.load(path)
        data = image.get_fdata(dtype=np.float32)
    except Exception as e:  # nibabel, zlib and gzip raise different errors for a broken file
        raise _unreadable(path, e, ", perhaps cut short; copy or export it again") from None
    if data.ndim != ndim:
        many = data.ndim > ndim
        advice = "take one volume out of it" if many else "give the file that holds all of it"
        raise UserError(f"{path}: expected {ndim} dimensions, found shape {data.shape}; {advice}")
    if bad := int((~np.isfinite(data)).sum()):
        raise UserError(f"{path}: {bad} voxels are NaN or infinite; export again or set them to 0")
    data = np.ascontiguousarray(data)  # files are in Fortran order: resampling is 4 times slower
    return nib.Nifti1Image(data, image.affine)


def read_header(path) -> nib.Nifti1Image:
    """Load an image's grid without its voxels; UserError if it is missing or cannot be read."""
    try:
        image: Any = nib.load(path)
        return image
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as e:
        raise _unreadable(path, e, "; export it again") from None


def same_grid(a: nib.Nifti1Image, b: nib.Nifti1Image, name_a, name_b) -> None:
    """Raise UserError unless both images have the same 3D shape and corners within 0.1 mm."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * a.shape[:3]
    apart = apply_affine(a.affine, corners) - apply_affine(b.affine, corners)
    distance = np.abs(apart).max()  # mm, per axis
    if a.shape[:3] != b.shape[:3] or distance > 0.1:
        grids = f"{name_a} {a.shape[:3]} and {name_b} {b.shape[:3]}"
        raise UserError(f"{grids}: not on one grid; resample one to the other first")


def size_and_sample(path: Path) -> tuple[int, bytes]:
    """Return a file's size and 64 KB from its middle: enough to tell two scans apart."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        f.seek(max(0, size // 2 - 2**15))
        return size, f.read(2**16)


# --------------------------------------------------------------------- what a run has to remember
def checksum(path: Path, crc: int = 0) -> int:
    """The CRC-32 of a file, continued from `crc`."""
    with open(path, "rb") as f:
        while chunk := f.read(2**20):
            crc = zlib.crc32(chunk, crc)
    return crc


def seal(folder: Path, meta: dict) -> None:
    """Write `meta` and the checksum of it and of all arrays in the folder to FOLDER/case.json."""
    (folder / "case.json").write_text(json.dumps(meta | {"checksum": _seal_of(folder, meta)}))


def unseal(folder: Path) -> dict | None:
    """Return the `meta` of `seal`, or None if anything in the folder is missing or has changed."""
    try:
        meta = json.loads((folder / "case.json").read_text())
        return meta if meta.pop("checksum") == _seal_of(folder, meta) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _seal_of(folder: Path, meta: dict) -> int:
    crc = zlib.crc32(json.dumps(meta, sort_keys=True).encode())
    for path in sorted(folder.glob("*.npy")):
        crc = checksum(path, zlib.crc32(path.name.encode(), crc))
    return crc


class Log:
    """A file of JSON lines, and its size and CRC-32, which tell a resumed run if it was edited."""

    def __init__(self, path: Path):
        self.path, self.size, self.crc = path, 0, 0

    def add(self, row: dict) -> None:
        """Append a line."""
        line = (json.dumps(row) + "\n").encode()
        with writing(self.path), open(self.path, "ab") as f:
            f.write(line)
        self.size += len(line)
        self.crc = zlib.crc32(line, self.crc)

    def restore(self, size: int, crc: int | None = None) -> None:
        """Cut the file to its first `size` bytes. UserError if they are not those of `crc`."""
        content = self.path.read_bytes() if self.path.exists() else b""
        if crc not in (None, zlib.crc32(content[:size])):
            content = content.replace(b"\r\n", b"\n")  # an editor or a transfer changed line ends
        known = content[:size]
        self.size, self.crc = size, zlib.crc32(known)
        if len(known) < size or crc not in (None, self.crc):
            problem = "missing or shorter than when last.pt was written, or edited since"
            raise UserError(f"{self.path}: {problem}; put it back, or begin again with --overwrite")
        if self.path.exists() and self.path.read_bytes() != known:
            write_file(self.path, known)


def changed_studies(path: Path, before: dict, now: dict) -> str:
    """How the studies of a run have changed since `path` was written; "" if they have not.

    before, now: {"train": {name: checksum}, "val": {name: checksum}}; an older run has {}.
    """
    try:
        train, val = before.get("train", now["train"]), before.get("val", now["val"])
        old, new = train | val, now["train"] | now["val"]
        found = {
            "held out now that it was trained on": train.keys() & now["val"].keys(),
            "trained on now that were held out": val.keys() & now["train"].keys(),
            "added": new.keys() - old.keys(),
            "removed": old.keys() - new.keys(),
            "with changed files": {k for k in new.keys() & old.keys() if new[k] != old[k]},
        }
    except (TypeError, AttributeError):
        raise UserError(f"{path}: its list of studies is damaged; take another --out") from None
    words = [f"{len(names)} {how} ({min(names)})" for how, names in found.items() if names]
    if not words:
        return ""
    return f"{path}: other studies than the run had, {', '.join(words)}: scores may be too good"


def source_version() -> str:
    """The commit of this code, or without git a hash of its sources."""
    here = Path(__file__).parent

    def git(*words, check=False):
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, check=check)

    try:
        code = git("describe", "--always", check=True).stdout.strip()
        changed = git("diff", "--quiet", "HEAD", "--", "*.py").returncode == 1
        return code + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        sources = sorted([*here.glob("*.py"), *here.glob("kernels/*.py")])
        return hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:12]


# -------------------------------------------------------------------- locks, processes and memory
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
        lines = str(e).strip().splitlines() or [""]
        if isinstance(e, UserError):
            if "DataLoader worker" not in lines[0]:
                raise
            raise UserError(lines[-1].partition(": ")[2]) from None  # the last line of a traceback
        if isinstance(e, MemoryError):
            raise UserError(f"memory is full: {SMALLER}") from None
        for words, advice in CAUSES.items():
            if re.search(words, str(e)):
                raise UserError(advice) from None
        if isinstance(e, OSError) and e.filename:
            advice = "check its permissions, or choose another"
            raise UserError(f"{e.filename}: {e.strerror}; {advice}") from None
        raise
