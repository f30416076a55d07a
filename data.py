"""From NIfTI files to preprocessed studies: find the cases -> preprocess once into a cache -> folds.

    find_petct, find_brain      a folder in AutoPET or MSD Task01 layout -> [Case]
    build_cache                 orientation, resampling, intensity windows, crop -> [CachedCase],
                                each a few memory-mapped arrays
    make_folds, read_splits     folds by patient, stratified by tumor; or the user's own folds

Arrays are in nibabel's order: (D, H, W) are the first, second and third axis of the volume.
"""

import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nibabel.processing import resample_from_to
from scipy import ndimage
from tqdm import tqdm

from files import (
    UserError,
    atomic_write,
    clean_parts,
    glance,
    read_header,
    read_nifti,
    same_grid,
    writing,
)


# ------------------------------------------------------------------------------------------------------ files -> cases
@dataclass(frozen=True)
class Case:
    """One study on disk. `images`: petct (CT or None, PET) files; brain (one file of four channels,), or (T2w, FLAIR) files."""

    name: str
    patient: str
    images: tuple[Path | None, ...]
    label: Path | None
    channels: tuple[int, ...] = ()  # brain, one file: which channels are T2w and FLAIR
    roles: tuple[tuple[int, str], ...] = ()  # brain: label code -> "edema" | "core"


def find_petct(root, complete: bool = True) -> list[Case]:
    """Studies in AutoPET layout: SUV.nii.gz with CTres.nii.gz and SEG.nii.gz beside it, at any depth below root.

    The patient of PATIENT/STUDY/SUV.nii.gz is PATIENT; a study right below root is a patient of its own. A case's name is its
    path below root, with "__" for "/". Raises UserError where there are none or a file is missing; with complete=False, for
    prediction, CT and truth may be, and are None then.
    """
    root = Path(root)
    cases = []
    folders = (Path(path) for path, _, files in os.walk(root, followlinks=True) if "SUV.nii.gz" in files)  # rglob follows no links
    for folder in sorted(folders):
        suv = folder / "SUV.nii.gz"
        ct, seg = folder / "CTres.nii.gz", folder / "SEG.nii.gz"
        for path in (ct, seg):
            if complete and not path.exists():
                raise UserError(f"{path}: missing, though {suv.name} lies beside it; a study needs SUV, CTres and SEG")
        parts = folder.relative_to(root).parts or (root.resolve().name,)
        patient = "__".join(parts[:-1] or parts)
        ct, seg = (path if path.exists() else None for path in (ct, seg))
        cases.append(Case("__".join(parts), patient, (ct, suv), seg))
    if not cases:
        raise UserError(f"{root}: no SUV.nii.gz at any depth; expected AutoPET's layout, PATIENT/STUDY/SUV.nii.gz")
    return cases


def find_brain(root) -> list[Case]:
    """Cases in MSD Task01 layout: root/dataset.json with "training": [{"image", "label"}], images of four channels.

    Channels and label codes are read from dataset.json's own names; without names they are MSD's (FLAIR, T1w, T1gd, T2w; 1 edema,
    2 and 3 core), or BraTS's (1 and 4 core, 2 edema) if a code 4 occurs. Raises UserError.
    """
    path = Path(root) / "dataset.json"
    try:
        meta = json.loads(path.read_text())
        entries = [(path.parent / e["image"], path.parent / e["label"]) for e in meta["training"]]
        names = {str(v).lower(): int(k) for k, v in meta.get("modality", {}).items()}
        labels = {int(code): str(name).lower() for code, name in meta.get("labels", {}).items()}
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: missing; expected the Medical Segmentation Decathlon's layout") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f'{path}: not a dataset.json with "training": [{{"image": ..., "label": ...}}] ({e!r})') from None
    if not entries:
        raise UserError(f'{path}: "training" lists no cases')
    flair = [k for name, k in names.items() if "flair" in name]
    t2w = [k for name, k in names.items() if "t2" in name and "flair" not in name]
    if names and not (flair and t2w):
        raise UserError(f'{path}: "modality" names no T2w and FLAIR among {sorted(names)}')
    channels = (t2w[0], flair[0]) if names else (3, 0)
    roles = tuple(
        (code, "edema" if "edema" in name else "core")
        for code, name in labels.items()
        if code and any(word in name for word in ("edema", "tumo", "core", "enhanc", "necro"))
    )
    roles = roles if "edema" in dict(roles).values() else ()
    stem = {image: image.name.split(".nii")[0] for image, _ in entries}
    return [Case(stem[image], stem[image], (image,), label, channels, roles) for image, label in entries]


# ------------------------------------------------------------------------------------------------------- preprocessing
@dataclass(frozen=True)
class Preprocessing:
    """How a volume becomes a network's input. Defaults: the paper's AutoPET preprocessing; `BRAIN_PREPROCESSING` is the brain's."""

    task: str = "petct"  # "petct" | "brain"
    spacing: tuple[float, float, float] = (2.0, 2.0, 3.0)  # mm
    orientation: str = "LAS"
    ct_window: tuple[float, float] = (-100.0, 250.0)  # HU -> [0, 1]
    suv_window: tuple[float, float] = (0.0, 15.0)  # SUV -> [0, 1]


BRAIN_PREPROCESSING = Preprocessing(task="brain", spacing=(1.0, 1.0, 1.0), orientation="RAS")


def to_grid(image: nib.Nifti1Image, orientation: str, spacing) -> nib.Nifti1Image:
    """Turn the axes to `orientation`, then resample trilinearly to `spacing` (mm); an oblique image stays oblique.

    The new voxels cover the same field of view: their outer faces, not their centres, are aligned. A spacing that is equal to 0.1 %
    is left as it is.
    """
    turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(orientation))
    image = image.as_reoriented(turn)
    old = np.array(nib.affines.voxel_sizes(image.affine))
    if np.allclose(old, spacing, rtol=1e-3):
        return image
    shape = np.maximum(1, np.round(np.array(image.shape) * old / spacing)).astype(int)
    step = np.asarray(spacing) / old  # new voxels in units of old ones
    first = (np.array(image.shape) - 1) / 2 - step * (shape - 1) / 2  # both grids share their centre
    affine = image.affine @ nib.affines.from_matvec(np.diag(step), first)
    return resample_from_to(image, (tuple(int(s) for s in shape), affine), order=1, mode="nearest")


def _window(image: nib.Nifti1Image, low: float, high: float) -> np.ndarray:
    return np.clip((image.get_fdata(dtype=np.float32) - low) / (high - low), 0, 1)


def load_images(case: Case, preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray, tuple[slice, ...]]:
    """The network's input (2, D, H, W) float32 on the preprocessing's grid, cropped to the patient; that grid's affine; the crop's slices.

    The crop is the bounding box of PET > 0 (brain: of any non-zero channel). Without a CT file (None) PET is all: (1, D, H, W).
    """
    if preprocessing.task == "brain":
        if len(case.images) == 2:
            pair = [read_nifti(path) for path in case.images]
            same_grid(*pair, *case.images)
        else:
            image = read_nifti(case.images[0], ndim=4)
            if image.shape[3] <= max(case.channels):
                raise UserError(f"{case.images[0]}: {image.shape[3]} channels, but T2w and FLAIR are numbers {case.channels}")
            pair = [image.slicer[..., c] for c in case.channels]
        grids = [to_grid(nib.Nifti1Image(p.dataobj, pair[0].affine), preprocessing.orientation, preprocessing.spacing) for p in pair]
        data, grid = np.stack([_z_score(g.get_fdata(dtype=np.float32)) for g in grids]), grids[0]
        inside = (data != 0).any(0)
    else:
        suv = read_nifti(case.images[1])
        if np.percentile(suv.get_fdata(dtype=np.float32), 99) > 200:
            raise UserError(f"{case.images[1]}: values look like Bq/ml, not SUV; divide by injected dose per body weight first")
        grid = to_grid(suv, preprocessing.orientation, preprocessing.spacing)
        channels = [_window(grid, *preprocessing.suv_window)]
        if case.images[0]:
            ct = read_nifti(case.images[0])
            same_grid(ct, suv, *case.images)
            ct = nib.Nifti1Image(ct.dataobj, suv.affine)  # equal up to rounding; the new grids must be equal
            channels.insert(0, _window(to_grid(ct, preprocessing.orientation, preprocessing.spacing), *preprocessing.ct_window))
        data, inside = np.stack(channels), channels[-1] > 0
    box = (ndimage.find_objects(inside.astype(np.uint8)) or [tuple(slice(0, n) for n in inside.shape)])[0]
    corner = nib.affines.from_matvec(np.eye(3), [edge.start for edge in box])
    return data[(slice(None), *box)].astype(np.float32, copy=False), grid.affine @ corner, box


def _z_score(data: np.ndarray) -> np.ndarray:
    """(x - mean) / sd of the non-zero voxels, which are the brain; the rest stays 0."""
    brain = data != 0
    values = data[brain] if brain.any() else np.ones(1)
    mean, sd = values.mean(dtype=np.float64), values.std(dtype=np.float64)
    return np.where(brain & (sd > 1e-6 * abs(mean)), (data - mean) / max(sd, 1e-8), 0).astype(np.float32)


def read_label(case: Case) -> nib.Nifti1Image:
    """Labels on the image's own grid: petct 0/1; brain 0, 1 edema, 2 core, whatever the file's own codes."""
    image, like = read_nifti(case.label), read_header(case.images[-1])
    same_grid(image, like, case.label, case.images[-1])
    image = nib.Nifti1Image(image.dataobj, like.affine)  # equal up to rounding
    data = image.get_fdata(dtype=np.float32)
    codes = [int(c) if c == int(c) else float(c) for c in np.unique(data) if c]
    if not case.channels:  # PET/CT
        if codes not in ([], [1]):
            raise UserError(f"{case.label}: expected labels 0 and 1, found {[0, *codes]}; write tumor as 1 and all else as 0")
        return nib.Nifti1Image(data.astype(np.uint8), image.affine)
    if not set(codes) <= {1, 2, 3, 4} or {3, 4} <= set(codes):
        raise UserError(f"{case.label}: expected labels 0 to 3 (MSD) or 0, 1, 2, 4 (BraTS), found {[0, *codes]}; rename them")
    bare = {1: "core", 2: "edema"} if 4 in codes else {1: "edema", 2: "core", 3: "core"}
    roles = {4: "core"} | (dict(case.roles) or bare)  # code 4 is the enhancing core wherever it occurs
    out = np.zeros(data.shape, np.uint8)
    for code in codes:
        out[data == code] = 1 if roles.get(code, "core") == "edema" else 2
    return nib.Nifti1Image(out, image.affine)


# --------------------------------------------------------------------------------------------------------------- cache
CACHE_VERSION = 2  # raise it when `preprocess` changes, so that older entries are not taken for new ones


@dataclass
class CachedCase:
    """One preprocessed study. The arrays are memory-mapped: a patch reads its own bytes and no more."""

    name: str
    patient: str
    folder: Path
    tumor: bool  # any foreground in the truth
    affine: np.ndarray  # (4, 4) of the cached grid
    case: Case

    def array(self, name: str) -> np.ndarray:
        """ "image" (2, D, H, W) float16 | "label" (D, H, W) uint8 | "foreground" (N, 3) int16 voxels of the tumor."""
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")  # anew each time: a map that is kept holds a file open


def _fingerprint(case: Case, preprocessing: Preprocessing) -> str:
    """Changes when the preprocessing or one of the files does."""
    files = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in (*case.images, case.label) if p.exists()]
    text = json.dumps([CACHE_VERSION, asdict(preprocessing), files, case.channels, case.roles])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def preprocess(case: Case, preprocessing: Preprocessing) -> dict:
    """Read one study and bring it to the network's grid: {"image", "label", "foreground", "affine", "tumor"}.

    "tumor" is that of the file: resampling may lose a tiny one.
    """
    image, affine, box = load_images(case, preprocessing)
    truth = read_label(case)
    label = label_to_grid(truth, preprocessing, box)
    foreground = np.argwhere(label > 0).astype(np.int16)
    tumor = bool(np.any(truth.dataobj))
    return {"image": image.astype(np.float16), "label": label, "foreground": foreground, "affine": affine, "tumor": tumor}


def label_to_grid(truth: nib.Nifti1Image, preprocessing: Preprocessing, box: tuple[slice, ...]) -> np.ndarray:
    """`read_label`'s labels on `load_images`' grid, (D, H, W) uint8: resampled as soft masks, the largest wins."""
    codes = (1,) if preprocessing.task == "petct" else (1, 2)
    soft = [nib.Nifti1Image((np.asarray(truth.dataobj) == c).astype(np.float32), truth.affine) for c in codes]
    soft = np.stack([to_grid(s, preprocessing.orientation, preprocessing.spacing).get_fdata(dtype=np.float32)[box] for s in soft])
    return np.where(soft.sum(0) >= 0.5, soft.argmax(0) + 1, 0).astype(np.uint8)


def _cache_one(job: tuple[Case, Preprocessing, Path]) -> None:
    """Preprocess one study; the entry is whole or not there. Where another process was faster, its entry is as good."""
    case, preprocessing, folder = job
    arrays = preprocess(case, preprocessing)
    with atomic_write(folder) as part:
        part.mkdir()
        for name in ("image", "label", "foreground"):
            np.save(part / f"{name}.npy", np.ascontiguousarray(arrays[name]))
        (part / "case.json").write_text(json.dumps({"affine": arrays["affine"].tolist(), "tumor": arrays["tumor"]}))


def refuse_duplicates(cases: list[Case]) -> None:
    """UserError where two cases bear one name, or hold the same files: one study would be trained on and validated on."""
    seen: dict[object, Path] = {}
    for case in cases:
        glances = tuple(glance(path) for path in (*case.images, case.label) if path and path.exists())
        for key, what in ((case.name, f"case {case.name} occurs twice"), (glances, "one study under two names")):
            if key and key in seen:
                raise UserError(f"{what}: {seen[key]} and {case.images[-1]}; remove one of the two")
            seen[key] = case.images[-1]


def build_cache(cases: list[Case], preprocessing: Preprocessing, cache, workers: int | None = None) -> list[CachedCase]:
    """Preprocess every case that the cache does not hold yet; an entry is made anew when its files or the preprocessing change.

    Args: cache: folder for the entries, about 5 bytes a voxel of the preprocessing's grid. workers: processes, default one a core.
    Raises UserError for unreadable data, and for two cases of one name.
    """
    cache = Path(cache)
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
    clean_parts(cache)
    refuse_duplicates(cases)
    folders = [cache / f"{c.name}-{_fingerprint(c, preprocessing)}" for c in cases]
    jobs = [(c, preprocessing, f) for c, f in zip(cases, folders) if not (f / "case.json").exists()]
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    bar = {"total": len(jobs), "desc": "preprocessing", "unit": "case", "disable": not jobs}
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            list(tqdm(pool.map(_cache_one, jobs), **bar))
    else:
        list(tqdm(map(_cache_one, jobs), **bar))
    out = []
    for case, folder in zip(cases, folders):
        meta = json.loads((folder / "case.json").read_text())
        out.append(CachedCase(case.name, case.patient, folder, meta["tumor"], np.array(meta["affine"]), case))
    return out


# --------------------------------------------------------------------------------------------------------------- folds
def make_folds(cases, k: int = 5, seed: int = 0) -> list[dict[str, list[str]]]:
    """k folds in nnU-Net's form, [{"train": names, "val": names}]: studies of a patient stay together, and each fold gets its share
    of the patients with a tumor. Raises UserError for fewer patients than folds."""
    patients: dict[str, list] = {}
    for case in cases:
        patients.setdefault(case.patient, []).append(case)
    if not 2 <= k <= len(patients):
        raise UserError(f"{k} folds of {len(patients)} patient(s): the number of folds must lie between 2 and that of the patients")
    names = sorted(patients)
    np.random.default_rng([seed, 0xF01D]).shuffle(names)
    ill_first = sorted(names, key=lambda p: not any(c.tumor for c in patients[p]))  # stable: the shuffle stays within each group
    fold_of = {patient: i % k for i, patient in enumerate(ill_first)}
    val = [sorted(c.name for c in cases if fold_of[c.patient] == f) for f in range(k)]
    return [{"train": sorted(c.name for c in cases if fold_of[c.patient] != f), "val": v} for f, v in enumerate(val)]


def read_splits(path, cases) -> list[dict[str, list[str]]]:
    """The user's own folds: a JSON list of {"train": [...], "val": [...]}; a name is a case's or a patient's.

    Raises UserError for names the data does not hold and for patients on both sides of a fold.
    """
    try:
        splits = json.loads(Path(path).read_text())
        splits = [{side: [str(name) for name in fold[side]] for side in ("train", "val")} for fold in splits]
        if not splits:
            raise ValueError("no folds")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f'{path}: expected a JSON list of {{"train": [names], "val": [names]}} ({e!r})') from None
    of = {c.patient: [d.name for d in cases if d.patient == c.patient] for c in cases} | {c.name: [c.name] for c in cases}
    patient = {c.name: c.patient for c in cases}
    for i, fold in enumerate(splits):
        unknown = [n for side in fold.values() for n in side if n not in of]
        if unknown:
            raise UserError(f"{path}: fold {i} names {unknown[:3]}, which the data does not hold (it has {list(patient)[:3]}, ...)")
        fold |= {side: sorted({name for n in names for name in of[n]}) for side, names in fold.items()}
        both = {patient[n] for n in fold["train"]} & {patient[n] for n in fold["val"]}
        if both:
            raise UserError(f"{path}: fold {i} has {sorted(both)[:3]} in training and validation: scores would be too good")
        if not fold["train"] or not fold["val"]:
            raise UserError(f"{path}: fold {i} has an empty side")
    return splits
