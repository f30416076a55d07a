"""From NIfTI files to preprocessed studies: find cases -> preprocess once into a cache -> folds.

    find_petct, find_brain      a folder of studies -> [Case] (`layouts.find_cases`)
    build_cache                 orientation, resampling, intensity windows, crop -> [CachedCase],
                                each a few memory-mapped arrays
    make_folds                  folds by patient, stratified by tumor (`layouts.read_splits`: the
                                user's own)

Arrays are in nibabel's order: (D, H, W) are the first, second and third axis of the volume.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import from_matvec, voxel_sizes
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nibabel.processing import resample_from_to
from scipy import ndimage
from tqdm import tqdm

import files
import layouts
import processes
from files import UserError, note, on_one_grid, overlap, read_header, read_nifti, same_grid

# Studies are found there, and known here: data.Case, data.find_petct(root).
from layouts import Case, find_brain, find_cases, find_petct, find_splits, read_splits  # noqa: F401


# ---------------------------------------------------------------------------------- preprocessing
@dataclass(frozen=True)
class Preprocessing:
    """How a volume becomes a network's input. The defaults are the paper's for AutoPET."""

    task: str = "petct"  # "petct" | "brain"
    spacing: tuple[float, ...] = (2.0, 2.0, 3.0)  # mm
    orientation: str = "LAS"
    ct_window: tuple[float, ...] = (-100.0, 250.0)  # HU -> [0, 1]
    suv_window: tuple[float, ...] = (0.0, 15.0)  # SUV -> [0, 1]

    def resample(self, image: nib.Nifti1Image) -> nib.Nifti1Image:
        """Bring an image to the orientation and the spacing of the network's input."""
        return to_grid(image, self.orientation, self.spacing)


BRAIN_PREPROCESSING = Preprocessing(task="brain", spacing=(1.0, 1.0, 1.0), orientation="RAS")
Recipe, BRAIN_RECIPE = Preprocessing, BRAIN_PREPROCESSING  # their older names


def to_grid(image: nib.Nifti1Image, orientation: str, spacing) -> nib.Nifti1Image:
    """Reorder the axes to `orientation`, then resample trilinearly to `spacing` (mm).

    The field of view stays: the outer faces of the two volumes are aligned, not the centers of
    their first voxels. An oblique image stays oblique. A spacing that is right to 0.1 % is kept.
    """
    turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(orientation))
    image = image.as_reoriented(turn)  # type: ignore
    old = np.array(voxel_sizes(image.affine))
    if np.allclose(old, spacing, rtol=1e-3):
        return image
    shape = np.maximum(1, np.round(np.array(image.shape) * old / spacing)).astype(int)
    step = np.asarray(spacing) / old  # a new voxel's size in old voxels
    first = (np.array(image.shape) - 1) / 2 - step * (shape - 1) / 2  # the centers coincide
    affine = image.affine @ from_matvec(np.diag(step), first)
    grid = (tuple(int(s) for s in shape), affine)
    return resample_from_to(image, grid, order=1, mode="nearest")


def load_images(case: Case, preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray, tuple]:
    """Read the network's input, cropped to the bounding box of PET > 0 (brain: of the brain).

    Returns the image (2, D, H, W), float32: CT and PET, without a CT file (1, D, H, W), PET alone;
    brain: T2w and FLAIR; the affine (4, 4) of the cropped grid; and the slices of the crop. Raises
    UserError if the files cannot be read, differ in their grids or hold unexpected values.
    """
    load = _load_brain if preprocessing.task == "brain" else _load_petct
    data, mask, affine = load(case, preprocessing)
    everything = tuple(slice(0, n) for n in mask.shape)
    box = (ndimage.find_objects(mask.astype(np.uint8)) or [everything])[0]
    corner = from_matvec(np.eye(3), [edge.start for edge in box])
    cropped = data[(slice(None), *box)].astype(np.float32, copy=False)
    return cropped, affine @ corner, box


def _load_petct(case: Case, preprocessing: Preprocessing) -> tuple:
    """Return the channels (2 or 1, D, H, W), the mask PET > 0 (D, H, W) and the affine (4, 4)."""
    suv = read_nifti(case.images[1])
    files.refuse_becquerel(suv, case.images[1])
    pet = preprocessing.resample(suv)
    like = read_header(case.images[1])
    del suv  # memory: a whole body takes 0.6 GB
    data = np.empty((2 if case.images[0] else 1, *pet.shape), np.float32)
    _window(pet, *preprocessing.suv_window, out=data[-1])
    grid = (pet.shape, pet.affine)
    del pet
    if case.images[0]:
        ct = read_nifti(case.images[0], air=-1000.0)
        if on_one_grid(ct, like):  # equal but for rounding: resample alike
            ct = preprocessing.resample(nib.Nifti1Image(ct.dataobj, like.affine))
        else:
            share = overlap(like, ct, case.images[1], case.images[0])
            line = f"resampled to the PET's grid, of which it covers {share:.0%}"
            note(f"{case.images[0]}: {line}", kind="CT")
            ct = resample_from_to(ct, grid, order=1, cval=-1000.0)
        _window(ct, *preprocessing.ct_window, out=data[0])
    return data, data[-1] > 0, grid[1]


def _load_brain(case: Case, preprocessing: Preprocessing) -> tuple:
    """Return the channels (2, D, H, W), the mask of the brain (D, H, W) and the affine (4, 4)."""
    if len(case.images) == 2:
        pair = [read_nifti(path) for path in case.images]
        same_grid(pair[0], pair[1], case.images[0], case.images[1])
    else:
        image = read_nifti(case.images[0], ndim=4)
        if image.shape[3] <= max(case.channels):
            problem = f"{image.shape[3]} channels, but T2w and FLAIR are numbers {case.channels}"
            raise UserError(f"{case.images[0]}: {problem}")
        pair = [image.slicer[..., c] for c in case.channels]
    pair = [nib.Nifti1Image(image.dataobj, pair[0].affine) for image in pair]
    pair = [preprocessing.resample(image) for image in pair]
    data = np.stack([_z_score(image.get_fdata(dtype=np.float32)) for image in pair])
    return data, (data != 0).any(0), pair[0].affine


def _window(image: nib.Nifti1Image, low: float, high: float, out: np.ndarray) -> None:
    """Map the intensities low..high to 0..1 and clip, into `out`."""
    np.subtract(image.get_fdata(dtype=np.float32), low, out=out)
    np.clip(np.divide(out, high - low, out=out), 0, 1, out=out)


def _z_score(data: np.ndarray) -> np.ndarray:
    """(x - mean) / sd over the non-zero voxels, which are the brain; the others stay 0."""
    brain = data != 0
    values = data[brain] if brain.any() else np.ones(1)
    mean, sd = values.mean(dtype=np.float64), values.std(dtype=np.float64)
    varies = sd > 1e-6 * abs(mean)  # else the channel is constant, but for rounding
    return np.where(brain & varies, (data - mean) / max(sd, 1e-8), 0).astype(np.float32)


def read_label(case: Case) -> nib.Nifti1Image:
    """Read the labels on the image's own grid as uint8: PET/CT 0, 1; brain 0, 1 edema, 2 core.

    Labels that are on the grid of a CT with its own grid are resampled. Raises UserError for codes
    without a meaning (`Case.roles`), and for any other grid.
    """
    image = read_nifti(case.label, air=None)
    data = image.get_fdata(dtype=np.float32)
    roles = dict(case.roles or (layouts.MSD if case.channels else [(1, "tumor")]))
    codes = [int(c) if c == int(c) else float(c) for c in np.unique(data[data != 0])]
    others = sorted(set(codes) - set(roles))
    if others and roles.get(None) == "none":
        note(f"{case.label}: {others!s:.80} are not tumor, as --label-values says", kind="labels")
    elif others and None not in roles:
        advice = 'name them in dataset.json ("labels")'
        if "tumor" in roles.values():
            advice = "say which are tumor with --label-values, or all but 0: --label-nonzero"
        problem = f"expected labels {[*({0: ''} | roles)]}, found {[0, *codes]!s:.80}"
        raise UserError(f"{case.label}: {problem}; {advice}")
    labels = np.zeros(data.shape, np.uint8)
    for code, role in roles.items():
        labels[data != 0 if code is None else data == code] = layouts.ROLES[role]
    like = read_header(case.images[-1])
    if not check_grid(case, image, like):
        note(f"{case.label}: resampled to the PET's grid", kind="truth")
        image = nib.Nifti1Image(labels.astype(np.float32), image.affine)
        image = resample_from_to(image, (like.shape[:3], like.affine), order=1)
        labels = (np.asarray(image.dataobj) >= 0.5).astype(np.uint8)
    return nib.Nifti1Image(labels, like.affine)


def check_grid(case: Case, truth: nib.Nifti1Image, like: nib.Nifti1Image) -> bool:
    """Whether a study's truth is on the grid of its last image, `like`.

    If not, it may be that of a CT with its own grid. Raises UserError for any other.
    """
    if on_one_grid(truth, like):
        return True
    ct = None if case.channels else case.images[0]
    if not (case.own_grid or (ct and on_one_grid(truth, read_header(ct)))):
        same_grid(truth, like, case.label, case.images[-1])
    overlap(truth, like, case.label, case.images[-1])
    return False


def label_to_grid(truth: nib.Nifti1Image, preprocessing: Preprocessing, box: tuple) -> np.ndarray:
    """Resample `read_label`'s labels to the cropped grid of `load_images`: (D, H, W), uint8.

    Each code is resampled as a soft mask; the largest wins where they sum to at least one half.
    """
    codes = (1,) if preprocessing.task == "petct" else (1, 2)
    labels = np.asarray(truth.dataobj)
    masks = [nib.Nifti1Image((labels == c).astype(np.float32), truth.affine) for c in codes]
    masks = [preprocessing.resample(m).get_fdata(dtype=np.float32)[box] for m in masks]
    masks = np.stack(masks)  # (number of codes, D, H, W)
    return np.where(masks.sum(0) >= 0.5, masks.argmax(0) + 1, 0).astype(np.uint8)


# ------------------------------------------------------------------------------------------ cache
CACHE_VERSION = 2  # increase it when `preprocess` changes: older entries are then ignored


@dataclass
class CachedCase:
    """One preprocessed study. Its arrays are memory-mapped: a patch reads only its own bytes."""

    name: str
    patient: str
    folder: Path
    tumor: bool  # whether the truth has any foreground
    affine: np.ndarray  # (4, 4) of the cached grid
    case: Case
    source: str = ""  # checksums of the study's files

    def array(self, name: str) -> np.ndarray:
        """Map "image" (2, D, H, W), float16; "label" (D, H, W), uint8; or "foreground" (N, 3),
        int16, the indices of the tumor's voxels. Raises UserError if the file is gone."""
        path = self.folder / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r")  # not kept: open maps hold file descriptors
        except (OSError, ValueError, EOFError) as e:
            problem = f"removed or changed while it was used ({e})"
            raise UserError(f"{path}: {problem}; the next run makes it again") from None


def _fingerprint(case: Case, preprocessing: Preprocessing) -> str:
    """A hash that changes if the preprocessing or one of the files changes."""
    files = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in case.files()]
    content = [CACHE_VERSION, asdict(preprocessing), files, case.channels, case.roles]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _read_entry(job: tuple[Case, Preprocessing, Path]) -> CachedCase | None:
    """The entry of a study, or None unless it is complete and its checksum is right."""
    case, _, folder = job
    if (meta := files.unseal(folder)) is None:
        return None
    affine = np.array(meta["affine"])
    return CachedCase(case.name, case.patient, folder, meta["tumor"], affine, case, meta["source"])


def preprocess(case: Case, preprocessing: Preprocessing) -> dict:
    """Read one study on the network's grid: `CachedCase.array`'s arrays, "affine" and "tumor".

    "tumor" is taken from the file, as resampling may lose a tiny one. Raises UserError.
    """
    image, affine, box = load_images(case, preprocessing)
    truth = read_label(case)
    label = label_to_grid(truth, preprocessing, box)
    foreground = np.argwhere(label > 0).astype(np.int16)
    arrays = {"image": image.astype(np.float16), "label": label, "foreground": foreground}
    return arrays | {"affine": affine, "tumor": bool(np.any(truth.dataobj))}


def _cache_one(job: tuple[Case, Preprocessing, Path]) -> None:
    """Preprocess one study and write its entry atomically; an entry that exists by then stays."""
    case, preprocessing, folder = job
    entry = preprocess(case, preprocessing)
    meta = {"affine": entry["affine"].tolist(), "tumor": entry["tumor"]}
    meta["source"] = " ".join(f"{files.checksum(path):08x}" for path in case.files())
    with files.atomic_write(folder) as part:
        part.mkdir()
        for name in ("image", "label", "foreground"):
            np.save(part / f"{name}.npy", np.ascontiguousarray(entry[name]))
        files.seal(part, meta)


def build_cache(
    cases: list[Case], preprocessing: Preprocessing, cache, workers: int | None = None
) -> list[CachedCase]:
    """Preprocess the cases that are not in the cache, or whose files or preprocessing changed.

    Entries that are there are checked, and made again if they are damaged. cache: a folder; an
    entry takes about 5 bytes per voxel of the network's grid. workers: number of processes; by
    default one per core, or fewer by free memory. Raises UserError for bad data and duplicates.
    """
    cache = Path(cache)
    with files.writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
    files.clean_parts(cache)
    layouts.refuse_duplicates(cases)
    jobs = []
    for case in cases:
        name = os.fsdecode(os.fsencode(case.name)[:180])  # a file's name has at most 255 bytes
        folder = cache / f"{name}-{_fingerprint(case, preprocessing)}"
        jobs.append((case, preprocessing, folder))
    with ThreadPoolExecutor(processes.available_cores()) as pool:
        entries = list(pool.map(_read_entry, jobs))
    missing = [job for job, entry in zip(jobs, entries) if entry is None]
    for _, _, folder in missing:
        if folder.exists():
            tqdm.write(f"{folder}: damaged, and made again")
            files.remove(folder)
    count = 0  # in this process
    if workers != 1:
        count = processes.most_workers(workers, max(map(_memory_needed, missing), default=1))
    try:
        processes.work(_cache_one, missing, count, "preprocessing")
    finally:
        files.clean_parts(cache)  # of processes that were killed
    entries = [entry or _read_entry(job) for job, entry in zip(jobs, entries)]
    if None in entries:
        folder = jobs[entries.index(None)][2]
        raise UserError(f"{folder}: damaged, and cannot be replaced; delete it")
    return [entry for entry in entries if entry]


def _memory_needed(job: tuple[Case, Preprocessing, Path]) -> int:
    """Bytes that `preprocess` takes: measured, up to 18 per voxel of the file and of the grid."""
    case, preprocessing, _ = job
    image = read_header(case.images[-1])
    scale = np.prod(voxel_sizes(image.affine)) / np.prod(preprocessing.spacing)
    return int(20 * (1 + scale) * np.prod(image.shape[:3], dtype=float)) + 2**28


# ------------------------------------------------------------------------------------------ folds
def make_folds(cases, k: int = 5, seed: int = 0) -> list[dict[str, list[str]]]:
    """Divide the cases into k folds in nnU-Net's form, [{"train": names, "val": names}].

    Studies of a patient stay together; patients with a tumor are spread evenly over the folds.
    Raises UserError unless 2 <= k <= number of patients.
    """
    patients = sorted({case.patient for case in cases})
    if not 2 <= k <= len(patients):
        limits = "give at least 2 folds and at most one per patient (see --patient-regex)"
        raise UserError(f"{k} folds of {len(patients)} patient(s): {limits}")
    np.random.default_rng([seed, 0xF01D]).shuffle(patients)
    positive = {case.patient for case in cases if case.tumor}
    patients.sort(key=lambda p: p not in positive)  # stable: each group stays shuffled
    fold_of = {patient: i % k for i, patient in enumerate(patients)}
    folds = []
    for i in range(k):
        train = sorted(case.name for case in cases if fold_of[case.patient] != i)
        val = sorted(case.name for case in cases if fold_of[case.patient] == i)
        folds.append({"train": train, "val": val})
    return folds
