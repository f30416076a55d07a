"""What the programs read, in five kinds: how it is used, and what it must give if it is used.

`KINDS[name]` has contents to mutate, a mutation, and `use`, which reads a file as the programs do
and raises `Wrong` if what comes out is not what the file says. Voxels are compared with those that
SimpleITK reads, and where it refuses a file with those of a reader of a few lines (`plain_voxels`).
"""

import gzip
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mutate
import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from nibabel import nifti1, nifti2

import claims
import config
import data
import files
import layouts
import predict
import train

sitk.ProcessObject.SetGlobalWarningDisplay(False)


class Wrong(Exception):
    """An input was used, and gave other values than it holds."""


@dataclass
class Kind:
    """One kind of input. name: its file in the folder that `use` gets; bases: valid contents."""

    name: str
    bases: list[bytes]
    mutate: mutate.Mutation
    use: Callable[[Path], None]
    share: float  # of all inputs


# ------------------------------------------------------------------------------------------- NIfTI
def nifti_bases() -> list[bytes]:
    """Small volumes of several types, byte orders, versions and compressions."""
    rng = np.random.default_rng(0)
    affine = np.diag([-2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = 10, -20, 30
    found = []
    for dtype in ("<i2", ">i2", "<f4", ">f8", "u1", "<u2"):
        for shape in ((5, 6, 7), (4, 5, 3, 2)):
            array = (rng.random(shape) * 200).astype(dtype)
            for kind in (nib.Nifti1Image, nib.Nifti2Image):
                header = kind.header_class(endianness=">" if dtype[0] == ">" else "<")
                image = kind(array, affine, header)
                image.set_data_dtype(dtype)
                if dtype == "<i2":
                    image.header.set_slope_inter(0.5, -3)
                raw = image.to_bytes()
                found += [raw, gzip.compress(raw, 6, mtime=0)]
    return found


def plain_voxels(raw: bytes) -> np.ndarray:
    """The voxels of a NIfTI file in one part, read with numpy alone."""
    raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    for kind, size in ((nifti1.header_dtype, 348), (nifti2.header_dtype, 540)):
        for order in "<>":
            header = np.frombuffer(raw[: kind.itemsize], kind.newbyteorder(order))[0]
            if header["sizeof_hdr"] == size:
                dtypes = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1"}
                dtypes |= {512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
                dtype = np.dtype(dtypes[int(header["datatype"])]).newbyteorder(order)
                shape = [int(n) for n in header["dim"][1 : 1 + int(header["dim"][0])]]
                first = int(header["vox_offset"])
                stored = np.frombuffer(raw[first:], dtype, math.prod(shape)).astype(float)
                slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
                if slope and math.isfinite(slope):
                    stored = stored * slope + (inter if math.isfinite(inter) else 0)
                return stored.reshape(shape, order="F")
    raise Wrong("used, but it has no NIfTI header")


def use_nifti(path: Path) -> None:
    """Read a volume; it must have the voxels that an independent reader finds."""
    ndim = len(files.read_header(path).shape)
    found = np.asarray(files.read_nifti(path, ndim).dataobj)
    if ndim not in (3, 4):
        raise Wrong(f"used with {ndim} dimensions")
    try:
        true = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T.astype(float)
        reader = "SimpleITK"
    except RuntimeError:
        true, reader = plain_voxels(path.read_bytes()), "numpy"
    true = true.reshape([n for i, n in enumerate(true.shape) if i < 3 or n > 1])
    if true.shape != found.shape:
        raise Wrong(f"shape {found.shape}, in {reader} {true.shape}")
    with np.errstate(all="ignore"):
        known = np.isfinite(true) & (np.abs(true) < 1e38)  # others are air, or float32 has none
        apart = np.abs(found - true)[known] > 1e-5 * np.abs(true[known]) + 1e-4
    if apart.any():
        raise Wrong(f"{np.count_nonzero(apart)} of {true.size} voxels are not those of {reader}")


# -------------------------------------------------------------------------------------------- JSON
CASES = [
    data.CachedCase(f"P{k}__visit1", f"P{k}", Path("/"), True, np.eye(4), None)  # type: ignore
    for k in range(5)
]
NAMES = [case.name for case in CASES]
FOLDS = [{"train": [n for n in NAMES if n != m], "val": [m]} for m in NAMES]


def use_splits(path: Path) -> None:
    """Read folds; no patient may be on both sides, and all names must be known."""
    for fold in data.read_splits(path, CASES):
        if set(fold["train"]) & set(fold["val"]) or not set(sum(fold.values(), [])) <= set(NAMES):
            raise Wrong(f"used the fold {fold}")


TRAINING = [
    {"image": f"./imagesTr/BRATS_{k}.nii.gz", "label": f"./labelsTr/BRATS_{k}.nii.gz"}
    for k in range(3)
]
DATASET = {
    "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
    "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing"},
    "training": TRAINING, "test": [], "numTraining": 3,
}  # fmt: skip


def use_dataset(path: Path) -> None:
    """Find the studies of a folder; their names become names of files."""
    for pair in TRAINING:
        for name in pair.values():
            file = path.parent / name
            file.parent.mkdir(exist_ok=True)
            if not file.exists():
                nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)), file)
    for case in layouts.find_cases(path.parent, "brain")[0]:
        if Path(case.name).name != case.name or case.name in (".", "..") or len(case.name) > 255:
            raise Wrong(f"used the name {case.name!r}")
        if set(role for _, role in case.roles) - set(layouts.ROLES) or len(set(case.channels)) != 2:
            raise Wrong(f"used {case}")


def check_config(c: config.Config) -> None:
    """Every option must have a value that is allowed."""
    for name, field in config.FIELDS.items():
        value = getattr(c, name)
        if config.check_value(field, value) != value:
            raise Wrong(f"used {name} = {value!r}")


def use_config(path: Path) -> None:
    """Read a run's config.json."""
    check_config(config.read_config(path))


# --------------------------------------------------------------------------------------------- csv
HEAD = (
    "study,preset,system,fold,folds,seed,case,target,dice,fpv_ml,fnv_ml,pred_ml,truth_ml,has_tumor,"
    "tumor_score,ct_clean,ct_noise,ct_shuffle,steps,seconds,commit,options,run"
)
ROW = "s,laptop,{},0,1,0,P{}__v,seg,0.5,1,0,3,4,True,,1,2,3,10,1.5,c,--model v1,k{}"
RESULTS = "\n".join([HEAD, *(ROW.format(v, k, v) for v in ("v1", "v3") for k in range(3))]) + "\n"


def use_results(path: Path) -> None:
    """Read the results of runs, as replicate.py does for its report."""
    for row in claims.read_results(path):
        for column in ("dice", "fpv_ml", "fnv_ml"):
            if row[column] and not math.isfinite(float(row[column])):
                raise Wrong(f"used {column} = {row[column]!r}")


# ----------------------------------------------------------------------------------- checkpoints
def small_checkpoint() -> bytes:
    """The checkpoint of an untrained v3 of the smallest size."""
    c = config.Config(channels=(1, 1, 2, 2, 2), patch=(32, 32, 32), model="v3")
    buffer = io.BytesIO()
    torch.manual_seed(0)
    torch.save({"model": c.build_model().state_dict(), "config": c.to_dict(), "step": 1}, buffer)
    return buffer.getvalue()


CHECKPOINT = small_checkpoint()
WEIGHTS = torch.load(io.BytesIO(CHECKPOINT), weights_only=True)["model"]


def use_checkpoint(path: Path) -> None:
    """Load a network; all weights must be those that were saved, and of their shapes."""
    model, c = predict.load_model(path)
    check_config(c)
    for name, found in model.state_dict().items():
        if name in WEIGHTS and found.shape == WEIGHTS[name].shape:
            if not torch.equal(found, WEIGHTS[name]) and found.any():
                raise Wrong(f"{name} has other values than were saved")


# ---------------------------------------------------------------------------------- command lines
WORDS = [
    "train --data petct --root . --model v3 --share 4 5 --lr 0.01 --corrupt noise --fold 1",
    "train --preset autopet --root . --patch 48 48 48 --spacing 4 4 4 --no-flips --amp bf16",
    "train --data brain --root . --label-values 1 2 --channels 2 3 4 5 6 --fold all",
    "train --data phantom --phantoms 4 --minutes 1.5 --ct-window -100 250 --workers 0",
    "predict --checkpoint a.pt b.pt --pet SUV.nii.gz --ct CT.nii.gz --out m.nii.gz --threshold 0.4",
    "predict --checkpoint a.pt --root . --out out --min-lesion-ml 0.5 --overlap 0.5 --batch 2",
]


def use_words(path: Path) -> None:
    """Read a command line, kept as JSON; its options must have values that are allowed."""
    program, *words = json.loads(path.read_bytes())
    if program == "predict":
        a = predict.parse_arguments(words)
        for name in ("threshold", "overlap", "batch"):
            if getattr(a, name) is not None:
                config.check_value(config.FIELDS[name], getattr(a, name))
    else:
        check_config(train.parse_config(words))


def as_json(*values) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


COMMANDS = as_json(*(line.split() for line in WORDS))
CONFIGS = as_json(config.Config().to_dict(), config.Config(**config.PRESETS["brain"]).to_dict())
KINDS = {
    "NIfTI": Kind("image.nii.gz", nifti_bases(), mutate.mutate_nifti, use_nifti, 0.4),
    "folds": Kind("splits.json", as_json(FOLDS), mutate.mutate_json, use_splits, 0.1),
    "dataset.json": Kind("dataset.json", as_json(DATASET), mutate.mutate_json, use_dataset, 0.1),
    "config.json": Kind("config.json", CONFIGS, mutate.mutate_json, use_config, 0.1),
    "csv": Kind("petct.csv", [RESULTS.encode()], mutate.mutate_csv, use_results, 0.1),
    "checkpoints": Kind("w.pt", [CHECKPOINT], mutate.mutate_checkpoint, use_checkpoint, 0.1),
    "command lines": Kind("words.json", COMMANDS, mutate.mutate_words, use_words, 0.1),
}
