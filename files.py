"""What all programs here share: errors for people, images read with care, atomic files."""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine


class UserError(ValueError):
    """Something the user can fix: bad files or options. Programs print one line and exit with 2."""


class CannotWrite(UserError):
    """A full disk, no permission, a folder of that name: writing further files would fail too."""


def run_program(main: Callable[[list[str]], None]) -> None:
    """Run main(command-line arguments); print a UserError as one line and exit with code 2."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # as with `| head`; Python flushes stdout again on exit: redirect it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")


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
    part = path.with_name(f".{os.getpid()}.{path.name}")  # keeps the suffix: it tells the format
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
        _remove(part)


def clean_parts(folder: Path) -> None:
    """Remove the temporary files of `atomic_write` that killed processes left in a folder."""
    for part in folder.glob(".[0-9]*.*"):
        pid = part.name.split(".")[1]
        if pid.isdigit() and not _alive(int(pid)):
            _remove(part)


def _remove(part: Path) -> None:
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

    asked = twice = False  # a loop in the block checks `asked`, then finishes its step and saves

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {n: signal.signal(n, self._ask) for n in numbers}
        return self

    def _ask(self, number: int, _) -> None:
        if number == signal.SIGINT and self.twice:
            raise KeyboardInterrupt
        self.asked = True
        self.twice = self.twice or number == signal.SIGINT

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


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
