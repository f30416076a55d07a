"""What every program here does the same way: errors for people, images read with care, files that are whole or not there."""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np


class UserError(ValueError):
    """Something the user can mend: bad files, folders or options. Programs print it as one line and exit with 2."""


class CannotWrite(UserError):
    """A full disk, no permission, a folder in the file's place: going on to the next file would not help."""


def program(main: Callable[[list[str]], None]) -> None:
    """Run a program's main on the command line; what the user can mend becomes one line on stderr and exit code 2."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head` has read enough; the interpreter flushes once more at its end, so give it another stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong with the disk while writing `path`, in a sentence: CannotWrite."""
    try:
        yield
    except OSError as e:
        raise CannotWrite(f"{path}: cannot be written: {e.strerror or e}; free some space, or choose another folder") from None


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """The name to write a file or folder under, beside `path`; at the block's end it is on disk and renamed to `path`.

    So what bears that name is always whole: a crash, a full disk or a second reader sees the old one or the new one. A folder that
    came to be there meanwhile is kept, and the new one dropped. Raises CannotWrite; the old one stays then.
    """
    path = Path(path)
    part = path.with_name(f".{os.getpid()}.{path.name}")  # the endings stay: nibabel and matplotlib go by them
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
    """Remove what killed programs left of `atomic_write` in a folder; the parts of living ones stay."""
    for part in folder.glob(".[0-9]*.*"):
        pid = part.name.split(".")[1]
        if pid.isdigit() and not _alive(int(pid)):
            _remove(part)


def _remove(part: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(part) if part.is_dir() else part.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Interrupts:
    """Ctrl-C and SIGTERM as a flag, `asked`, while the block runs: the loop inside finishes its step, saves and leaves.

    A second Ctrl-C does not wait.
    """

    def __init__(self):
        self.asked = self.twice = False

    def __enter__(self):
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, _) -> None:
        if number == signal.SIGINT and self.twice:
            raise KeyboardInterrupt
        self.asked, self.twice = True, self.twice or number == signal.SIGINT

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def read_nifti(path, ndim: int = 3) -> nib.Nifti1Image:
    """Load an image whole, as float32. Raises UserError for missing or broken files, wrong dimensions, NaN or infinity."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        image = nib.load(path)
        data = image.get_fdata(dtype=np.float32)
    except Exception as e:  # nibabel, zlib and gzip each have errors of their own for a broken file
        why = (str(e) or repr(e)).splitlines()[0]
        raise UserError(f"{path}: not a readable NIfTI file, perhaps cut short; copy or export it again ({why})") from None
    if data.ndim != ndim:
        advice = "take one volume out of it" if data.ndim > ndim else "give the file that holds all of it"
        raise UserError(f"{path}: expected {ndim} dimensions, found shape {data.shape}; {advice}")
    if not np.isfinite(data).all():
        raise UserError(f"{path}: {int((~np.isfinite(data)).sum())} voxels are NaN or infinite; export it again, or set them to 0")
    return nib.Nifti1Image(np.ascontiguousarray(data), image.affine)  # files are in Fortran order, in which resampling is 4 x slower


def same_grid(a: nib.Nifti1Image, b: nib.Nifti1Image, name_a, name_b) -> None:
    """Raise UserError unless both images have the same voxels (3D shape, and corners within 0.1 mm)."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * a.shape[:3]
    apart = nib.affines.apply_affine(a.affine, corners) - nib.affines.apply_affine(b.affine, corners)
    if a.shape[:3] != b.shape[:3] or np.abs(apart).max() > 0.1:
        raise UserError(f"{name_a} {a.shape[:3]} and {name_b} {b.shape[:3]}: not on one grid; resample one to the other first")


def read_header(path) -> nib.Nifti1Image:
    """The image without its voxels, for its grid. Raises UserError where it is missing or cannot be read."""
    try:
        return nib.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as e:
        raise UserError(f"{path}: not a readable NIfTI file; export it again ({(str(e) or repr(e)).splitlines()[0]})") from None


def glance(path: Path) -> tuple[int, bytes]:
    """A file's size and 64 KB from its middle: enough to tell two scans apart."""
    with open(path, "rb") as f:
        f.seek(max(0, path.stat().st_size // 2 - 2**15))
        return path.stat().st_size, f.read(2**16)
