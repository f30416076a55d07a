"""What all programs share: errors for people, atomic files, tables, JSON and images with care."""

import bz2
import contextlib
import csv
import functools
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from nibabel import imageglobals, nifti1, nifti2
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.arrayproxy import ArrayProxy
from scipy import ndimage
from tqdm import tqdm

# Control characters, line ends, marks that reverse the text, and bytes that are not UTF-8: as part
# of a name they could break a line in two or rewrite the terminal.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text) -> str:
    """The text on one line, with \\x1b instead of an escape character, and so on."""
    return UNSAFE.sub(lambda c: ascii(c[0])[1:-1], str(text))


class UserError(ValueError):
    """Something the user can fix: bad files or options. Programs print one line and exit with 2."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class CannotWrite(UserError):
    """A full disk, no permission, a folder of that name: writing further files would fail too."""


_said: set[str] = set()


def note(message: str, kind: str = "") -> None:
    """Print a line about a file, once per process; of a kind that many files may share, one line.

    Written at once, as several processes may print.
    """
    if (kind or message) not in _said:
        _said.add(kind or message)
        more = " (files alike are not named)" if kind else ""
        print(printable(message) + more + "\n", end="", flush=True)


class Stopped(SystemExit):
    """Ctrl-C (SIGINT) or SIGTERM; its text says what is kept and how to continue."""

    def __init__(self, number: int, message: str = "interrupted"):
        super().__init__(message)
        self.number = number


def run_program(main: Callable[[list[str]], None]) -> None:
    """Run main(command-line arguments); print a UserError as one line and exit with code 2.

    Ctrl-C and SIGTERM also end it with a line, and with the codes that shells expect, 130 and 143.
    """
    for stream in (sys.stdout, sys.stderr):  # names that the terminal's encoding does not have
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
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
    except OSError as e:  # no permission, a name that is too long, a loop of links
        if e.filename is None:
            raise
        line = f"{e.filename}: {e.strerror}; choose another place, or allow its use"
        tqdm.write(f"error: {printable(line)}", file=sys.stderr)
        sys.exit(2)
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


def refuse_overwriting(outputs: list[Path], inputs: list[Path]) -> None:
    """Raise UserError if an output is an input, also through a link, or two outputs are one."""

    def identity(path: Path) -> tuple[int, int] | None:
        if os.path.exists(path):
            stat = os.stat(path)
            return stat.st_dev, stat.st_ino

    taken = {identity(path) for path in inputs} - {None}
    seen = set()
    for path in outputs:
        problem = "a folder" if os.path.isdir(path) else ""
        if identity(path) in taken:
            problem = "an input, which is never overwritten"
        if problem:
            raise UserError(f"--out: {path} is {problem}; choose another name")
        if path in seen:
            raise UserError(f"--out: two outputs would be {path}; rename one of the studies")
        seen.add(path)


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


# ------------------------------------------------------------------------------------ JSON and CSV
def read_json(path, expected: str) -> Any:
    """Read a JSON file, in UTF-8 or UTF-16, also with a byte-order mark.

    `expected` describes its contents. Raises UserError if it is missing or not JSON.
    """
    path = Path(path)
    try:
        if path.stat().st_size > 2**26:
            raise ValueError("larger than 64 MB")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected {expected}") from None
    except (OSError, ValueError, RecursionError) as e:
        why = getattr(e, "strerror", None) or f"{type(e).__name__}: {e}"
        raise UserError(f"{path}: expected {expected} ({why:.200})") from None


def write_table(rows: list[dict], path: Path, columns=None) -> None:
    """Write rows as a CSV file, with the first row's columns; an undefined number is empty."""
    with atomic_write(path) as part, open(part, "w", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=columns or list(rows[0]))
        writer.writeheader()
        for row in rows:
            nan = [k for k, v in row.items() if isinstance(v, float) and math.isnan(v)]
            writer.writerow(row | dict.fromkeys(nan, ""))


# ------------------------------------------------------------------------------------------ images
MOST_VOXELS = 2**29  # 512 x 512 x 2048: two meters of CT in slices of 1 mm
MOST_EXTENSIONS = 2**26  # bytes before the voxels
MILLIMETERS = {1: 1000.0, 3: 0.001}  # xyzt_units: meters and micrometers; all else means mm
# Headers are checked below; nibabel's remarks on them would be further lines on the terminal.
imageglobals.logger.setLevel("CRITICAL")


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = (str(error) or repr(error)).splitlines()[0]
    advice = "perhaps cut short or damaged; copy or export it again"
    return UserError(f"{path}: not a readable NIfTI file, {advice} ({reason})")


@contextlib.contextmanager
def _open_nifti(path: Path) -> Iterator[tuple[BinaryIO, Any, np.ndarray]]:
    """Yield the stream of a file's voxels, its checked header and its affine in mm (4, 4).

    What is damaged, also if the block that reads it finds so, raises UserError.
    """
    path = path.with_suffix(".hdr") if path.suffix == ".img" else path
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a file; give a NIfTI file")
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")
            stream = stack.enter_context(_open_stream(path))
            header, affine = _read_header(stream, path)
            if not header.is_single:
                stream = stack.enter_context(_open_stream(path.with_suffix(".img")))
            yield stream, header, affine
    except UserError:
        raise
    except FileNotFoundError as e:
        if e.filename not in (None, str(path)):
            raise UserError(f"{path}: its voxels are in {e.filename}: no such file") from None
        raise UserError(f"{path}: no such file") from None
    except MemoryError:
        raise UserError(f"{path}: does not fit into this machine's memory") from None
    except Exception as e:  # nibabel, zlib and gzip raise different errors for a broken file
        raise _unreadable(path, e) from None


def _open_stream(path: Path) -> BinaryIO:
    """Open a file, which is decompressed while it is read if it begins like gzip or bzip2."""
    with open(path, "rb") as f:
        start = f.read(2)
    opener: Any = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open}.get(start, open)
    return opener(path, "rb")


def _read_header(stream: BinaryIO, path: Path) -> tuple[Any, np.ndarray]:
    """Read and check a header: it and the affine in mm (4, 4). Raises UserError, ValueError.

    Nothing of the sizes that the header claims is read or allocated before they are checked.
    """
    start = stream.read(540)
    if nifti2.Nifti2Header.may_contain_header(start):
        kinds = (nifti2.Nifti2Header, nifti2.Nifti2PairHeader)
        magic = start[4:7]
    else:
        kinds = (nifti1.Nifti1Header, nifti1.Nifti1PairHeader)
        magic = start[344:347]
    if magic not in (b"n+1", b"n+2", b"ni1", b"ni2"):
        raise ValueError("it does not begin with a NIfTI header")
    kind: Any = kinds[magic in (b"ni1", b"ni2")]
    size = kind.template_dtype.itemsize
    raw = kind(start[:size], check=False)  # as it is in the file; a check repairs some fields
    _check_size(raw, path)
    before = max(size, int(raw["vox_offset"])) if kind.is_single else MOST_EXTENSIONS
    start += stream.read(max(0, before - len(start)))
    header = kind.from_fileobj(io.BytesIO(start[:before]))
    return header, _check_affine(header, raw["pixdim"][1:4], path)


def _shape(header) -> tuple[int, ...]:
    """The shape without dimensions of size 1 after the third."""
    shape = tuple(map(int, header.get_data_shape()))
    return shape[:3] + tuple(n for n in shape[3:] if n > 1)


def _check_size(header, path: Path) -> None:
    """Raise UserError for voxels that are not clear numbers, and for sizes that no scan has."""
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        kind = "complex numbers" if dtype.kind == "c" else "colors"
        raise UserError(f"{path}: its voxels are {kind}; export it as one real number per voxel")
    shape = _shape(header)
    sides = " x ".join(map(str, shape))
    if len(shape) < 3 or min(shape) < 1:
        raise UserError(f"{path}: expected 3 dimensions, found shape {shape}; export it again")
    if np.prod(np.array(shape, float)) > MOST_VOXELS:
        limit = f"no scan has more than {MOST_VOXELS:,}"
        raise UserError(f"{path}: its header claims {sides} voxels; {limit}; export it again")
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if 0 < abs(slope) < 1e-15:  # SimpleITK takes it for 1
        problem = f"its header scales the voxels by {slope:g}"
        raise UserError(f"{path}: {problem}, which programs read differently; export it again")
    if not (slope and np.isfinite(slope)) and np.isfinite(inter) and inter:
        problem = f"its header has an offset ({inter:g}) without a factor (scl_slope {slope:g})"
        raise UserError(f"{path}: {problem}, which programs read differently; export it again")
    first = header.template_dtype.itemsize + 4 if header.is_single else 0
    if not first <= float(header["vox_offset"]) <= MOST_EXTENSIONS:
        raise UserError(f"{path}: its header names no place for the voxels; export it again")


def _check_affine(header, pixdim: np.ndarray, path: Path) -> np.ndarray:
    """Return the affine in mm (4, 4). Raises UserError if no scan has such voxels.

    pixdim: the three sizes in the file; nibabel takes 1 instead of 0.
    """
    advice = "export it again, or write a correct sform and qform into its header"
    form = "sform" if header["sform_code"] else "qform"
    if form == "qform" and not (np.isfinite(pixdim).all() and pixdim.all()):
        raise UserError(f"{path}: the sizes of its voxels (pixdim) are {pixdim}; {advice}")
    try:
        affine = np.array(header.get_best_affine(), float)
    except Exception as e:  # nibabel has several
        raise UserError(f"{path}: its {form} is damaged ({e}); {advice}") from None
    if not np.isfinite(affine).all():
        raise UserError(f"{path}: its {form} has numbers that are not finite; {advice}")
    unit = int(header["xyzt_units"]) & 7
    affine[:3] *= MILLIMETERS.get(unit, 1.0)
    spacing = voxel_sizes(affine)
    axes = affine[:3, :3] / np.maximum(spacing, 1e-30)
    if np.abs(axes.T @ axes - np.eye(3)).max() > 0.01:  # 0.6 degrees
        problem = f"its {form} is zero, singular or sheared: its axes are not at right angles"
        raise UserError(f"{path}: {problem}; {advice}")
    sizes = " x ".join(f"{s:.4g}" for s in spacing) + " mm"
    if unit in MILLIMETERS:
        sizes += f" (its header says {'meters' if unit == 1 else 'micrometers'})"
    if spacing.min() < 0.0999 or spacing.max() > 20.001:
        raise UserError(f"{path}: voxels of {sizes}; those of a scan have 0.1 to 20 mm; {advice}")
    if unit == 3 and spacing.max() >= 1:  # small animals' scanners write micrometers
        raise UserError(f"{path}: voxels of {sizes}: one of the two seems wrong; write it in mm")
    if (spacing * _shape(header)[:3]).max() > 3000 or np.abs(affine[:3, 3]).max() > 1e5:
        where = f"{_shape(header)} voxels of {sizes}, the first at {affine[:3, 3]} mm"
        raise UserError(f"{path}: {where}: larger than a scan, which has up to 3 m; {advice}")
    return affine


def read_nifti(path, ndim: int = 3, air: float | None = 0.0) -> nib.Nifti1Image:
    """Load an image as float32, with its affine in mm. Dimensions of size 1 at the end are dropped.

    Files are read to their end, so that their checksum is verified. Voxels that are not finite
    become `air` outside the body, which is where the values are well above it; they are counted in
    a note. Raises UserError if the file is missing, damaged or not `ndim`-D, or if other voxels
    are not finite (with air=None: any).
    """
    path = Path(path)
    with _open_nifti(path) as (stream, header, affine):
        data = np.asanyarray(ArrayProxy(stream, header), dtype=np.float32)
        stored = header.get_data_dtype().itemsize * data.size
        stream.seek(header.get_data_offset() + stored)
        if stream.read(1):  # at the end, gzip and bzip2 compare checksums
            raise ValueError("it holds more than its header says")
    data = data.reshape(_shape(header))
    if data.ndim != ndim:
        many = data.ndim > ndim
        advice = "take one volume out of it" if many else "give the file that holds all of it"
        raise UserError(f"{path}: expected {ndim} dimensions, found shape {data.shape}; {advice}")
    data = np.ascontiguousarray(data)  # files are in Fortran order: resampling is 4 times slower
    if not np.isfinite(data).all():
        _fill_outside(data, air, path)
    return nib.Nifti1Image(data, affine)


def _fill_outside(data: np.ndarray, air: float | None, path: Path) -> None:
    """Set the voxels that are not finite to `air`; UserError if some lie inside the body."""
    bad = ~np.isfinite(data)
    inside = bad
    if air is not None:
        body = ~bad & (data > (air / 2 or 0.1))  # CT: above -500 HU; SUV: above 0.1
        inside = bad & _enclosed(body)
    if count := np.count_nonzero(inside):
        where = " inside the body" if air is not None else ""
        problem = f"{count:,} voxels{where} are NaN or infinite"
        raise UserError(f"{path}: {problem}; export it again, or set them to the right values")
    data[bad] = air
    count = np.count_nonzero(bad)
    note(f"{path}: {count:,} voxels outside the body are NaN or infinite: taken as air ({air:g})")


def _enclosed(body: np.ndarray) -> np.ndarray:
    """Whether no path outside the body leads from a voxel to the border; (D, H, W) or with C."""
    if body.ndim == 4:
        return np.stack([_enclosed(volume) for volume in np.moveaxis(body, 3, 0)], axis=3)
    parts = np.zeros(body.shape, np.int32)
    ndimage.label(~body, output=parts)
    border = np.ones_like(body)
    border[1:-1, 1:-1, 1:-1] = False
    outside = np.unique(parts[border])
    return ~np.isin(parts, outside)


def refuse_becquerel(suv: nib.Nifti1Image, path) -> None:
    """Raise UserError if more than a bladder is above SUV 200: 1 % of the body, or 150 ml."""
    data = suv.get_fdata(dtype=np.float32)
    hot = np.count_nonzero(data > 200)
    ml = hot * np.prod(voxel_sizes(suv.affine)) / 1000
    if hot > 0.01 * np.count_nonzero(data > 0) or ml > 150 or data.max() > 1e5:
        advice = "divide by injected dose per body weight first (docs/python.md)"
        raise UserError(f"{path}: values look like Bq/ml or SUV x 1000, not SUV; {advice}")


def read_header(path) -> nib.Nifti1Image:
    """Load an image's grid, in mm, and its header without its voxels, which are 0 here.

    Dimensions of size 1 at the end are dropped. Raises UserError like `read_nifti`.
    """
    with _open_nifti(Path(path)) as (_, header, affine):
        new = isinstance(header, nifti2.Nifti2Header)
        kind: Any = nifti2.Nifti2Image if new else nifti1.Nifti1Image
        units = int(header["xyzt_units"]) & 7
        if units in MILLIMETERS:
            header.set_xyzt_units(2)
        return kind(np.broadcast_to(np.uint8(0), _shape(header)), affine, header)


def save_nifti(array: np.ndarray, like: nib.Nifti1Image, path: Path) -> None:
    """Write (D, H, W) as NIfTI in the array's dtype, with the affine and header of `like`."""
    header = like.header.copy()
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["cal_max"] = header["cal_min"] = 0  # else the input's display window
    with atomic_write(path) as part:
        nib.save(nib.Nifti1Image(array, like.affine, header), part)


def on_one_grid(a: nib.Nifti1Image, b: nib.Nifti1Image) -> bool:
    """Whether both images have the same 3D shape and corners within 0.1 mm."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * a.shape[:3]
    apart = apply_affine(a.affine, corners) - apply_affine(b.affine, corners)
    return a.shape[:3] == b.shape[:3] and bool(np.abs(apart).max() <= 0.1)  # mm, per axis


def same_grid(a: nib.Nifti1Image, b: nib.Nifti1Image, name_a, name_b) -> None:
    """Raise UserError unless both images are `on_one_grid`."""
    if not on_one_grid(a, b):
        grids = f"{name_a} {a.shape[:3]} and {name_b} {b.shape[:3]}"
        raise UserError(f"{grids}: not on one grid; resample one to the other first")


def overlap(a: nib.Nifti1Image, b: nib.Nifti1Image, name_a, name_b) -> float:
    """The share of a's volume that lies in b.

    Raises UserError if what they have in common is less than half of the smaller volume.
    """
    points = np.stack(np.meshgrid(*(np.linspace(0, n - 1, 33) for n in a.shape[:3])), axis=-1)
    to_b = np.linalg.solve(np.asarray(b.affine), np.asarray(a.affine))  # voxels of a -> of b
    inside = apply_affine(to_b, points)
    inside = ((inside >= -0.5) & (inside <= np.array(b.shape[:3]) - 0.5)).all(-1)
    volumes = [np.prod(voxel_sizes(image.affine) * image.shape[:3]) for image in (a, b)]
    common = inside.mean() * volumes[0] / min(volumes)
    if common < 0.5:
        problem = f"only {common:.0%} of the smaller volume lies in the other"
        raise UserError(f"{name_a} and {name_b}: {problem}; are they of one study?")
    return float(inside.mean())


def size_and_sample(path: Path) -> tuple[int, bytes]:
    """Return a file's size and 64 KB from its middle: enough to tell two scans apart."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            f.seek(max(0, size // 2 - 2**15))
            return size, f.read(2**16)
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}; allow reading it") from None


# --------------------------------------------------------------------- what a run has to remember
def checksum(path: Path, crc: int = 0) -> int:
    """The CRC-32 of a file, continued from `crc`."""
    with open(path, "rb") as f:
        while chunk := f.read(2**20):
            crc = zlib.crc32(chunk, crc)
    return crc


def read_torch(path, device: Any = "cpu") -> Any:
    """What torch.save wrote: tensors and plain values, on `device`. A foreign file can't run code.

    Raises UserError if it is missing, damaged or anything else.
    """
    import torch  # not above: preprocessing needs only the rest of this file

    try:
        with zipfile.ZipFile(path) as records:
            if any(record.compress_type for record in records.infolist()):
                raise ValueError("packed")  # perhaps far larger than the file
            if damaged := records.testzip():  # torch does not look at the checksums
                raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as e:  # torch, pickle and zip have their own errors for a broken file
        why = (str(e) or repr(e)).splitlines()[0][:160]
        if isinstance(e, pickle.UnpicklingError):  # its message advises to load the file anyway
            why = "holds more than tensors and plain values"
        problem = "not a checkpoint of train.py, or cut short; give a run's best.pt or last.pt"
        raise UserError(f"{path}: {problem} ({why})") from None


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


def digest(studies: dict) -> int:
    """The CRC-32 of the studies of a run."""
    return zlib.crc32(json.dumps(studies, sort_keys=True).encode())


def changed_studies(path: Path, before: dict | int, now: dict) -> str:
    """How the studies of a run have changed since `path` was written; "" if they have not.

    now: {"train": {name: checksum}, "val": {name: checksum}}; before: the same, or the `digest` of
    it; an older run has {}.
    """
    if isinstance(before, int):
        if before == digest(now):
            return ""
        return f"{path}: other studies than the run had: scores may be too good"
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
