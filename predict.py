"""From a trained network to a mask on the input's own grid, and the numbers of its lesions.

    python predict.py --checkpoint RUN/best.pt --pet SUV.nii.gz [--ct CTres.nii.gz] --out M.nii.gz
    python predict.py --checkpoint RUN/best.pt --image FOUR_CHANNEL.nii.gz --out M.nii.gz
    python predict.py --checkpoint RUN/best.pt --root DIR --out DIR     (all studies; scores)

Windows overlap by half. Each is weighted by a Gaussian, so that a voxel depends most on the windows
it is central in, and the probabilities (not the logits) are averaged. No more is computed than the
targets need: v1-v3 run the PET branch alone, and need no CT.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from nibabel.affines import voxel_sizes
from nibabel.processing import resample_from_to
from torch import Tensor
from tqdm import tqdm

import figures
import files
import report
from config import FIELDS, Config, check_value
from data import check_grid, load_images
from device import autocast, check_device, use_kernels
from evaluate import LESION_COLUMNS, describe_case, print_table, read_truth
from files import UserError, overlap, read_header, read_nifti, run_program, same_grid, save_nifti
from graph import Graph
from layouts import Case, find_cases, stem, study_of
from metrics import remove_small
from mirror_unet import BrainOutput
from options import Parser


# ---------------------------------------------------------------------------------- sliding window
def window_starts(shape, size, overlap: float = 0.5) -> list[tuple[int, ...]]:
    """Corners of the windows that cover a volume: a regular grid; the last one ends at the border.

    shape: of the volume, in voxels; size: of a window, not larger; overlap: in [0, 1).
    """
    axes = []
    for n, s in zip(shape, size, strict=True):
        stride = max(1, int(s * (1 - overlap)))
        axes.append([*range(0, n - s, stride), n - s])
    return list(product(*axes))


def gaussian_window(size, sigma: float = 0.125) -> Tensor:
    """(D, H, W) weights: a Gaussian, 1 at the center and at least 1e-3; sigma is per side."""
    axes = []
    for side in size:
        offsets = torch.arange(side) - (side - 1) / 2
        axes.append(torch.exp(-0.5 * (offsets / (sigma * side)) ** 2))
    weight = axes[0][:, None, None] * axes[1][:, None] * axes[2]
    return weight.clamp_min(max(float(weight.min()), 1e-3))


@torch.no_grad()
def sliding_window(
    image: Tensor, predict: Callable[[Tensor], Tensor], size, overlap=0.5, batch=2, title=None,
    air: float | None = None,
) -> Tensor:
    """Gaussian-weighted mean of `predict` over overlapping windows.

    Args:
        image: (C, D, H, W); zero-padded on both sides if it is smaller than a window.
        predict: (N, C, *size) -> (N, K, *size), called with at most `batch` windows at a time.
        size: of the window, three numbers. overlap: share of a side that neighbors have in common.
        title: of a progress bar; None for no bar.
        air: windows without a voxel above it, in the last channel, all get the answer of one.

    Returns (K, D, H, W), float32, on the image's device.
    """
    shape = image.shape[1:]
    missing = [max(s - n, 0) for n, s in zip(shape, size, strict=True)]
    pad = [p for m in reversed(missing) for p in (m // 2, m - m // 2)]
    if any(missing):
        image = torch.nn.functional.pad(image, pad)
    weight = gaussian_window(size).to(image.device)
    starts = window_starts(image.shape[1:], size, overlap)
    places = [tuple(slice(a, a + s) for a, s in zip(start, size)) for start in starts]
    weights, total = image.new_zeros(image.shape[1:]), image.new_zeros(())
    is_dark = [air is not None and bool(image[(-1, *p)].max() <= air) for p in places]
    dark = [p for p, d in zip(places, is_dark) if d]  # they share an answer
    groups = [[p] for p, d in zip(places, is_dark) if not d] + ([dark] if dark else [])
    batches = range(0, len(groups), batch)
    for i in tqdm(batches, desc=title, unit="batch", leave=False, disable=title is None):
        some = groups[i : i + batch]
        windows = torch.stack([image[(slice(None), *group[0])] for group in some])
        out = predict(windows).float()  # (N, K, *size)
        if not total.ndim:  # K is known now
            total = image.new_zeros(out.shape[1], *image.shape[1:])
        for one, group in zip(out, some):
            for place in group:
                total[(slice(None), *place)] += one * weight
                weights[place] += weight
    inner = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, shape))
    return total.div_(weights)[(slice(None), *inner)]


def reads(model: torch.nn.Module) -> tuple[str, ...]:
    """The modalities that the network's segmentation depends on: for v1-v3, PET alone."""
    return getattr(model, "reads", ("ct", "pet"))


def foreground_probability(model: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Segment x (B, 2, D, H, W), or PET alone (B, 1, D, H, W) if the network needs no CT.

    Returns probabilities (B, K, D, H, W) of the K targets and the probability of a tumor (B,), or
    None without a classifier. Computes no more than that: v1-v3 run only their PET branch.
    """
    run = getattr(model, "segment", model)
    out = run(x[:, -1:] if reads(model) == ("pet",) else x)
    if isinstance(out, BrainOutput):
        logits, tumor = [t for t in (out.core, out.whole, out.edema) if t is not None], None
    else:
        logits, tumor = [out.seg], out.tumor
    prob = torch.cat([t.float().softmax(1)[:, 1:2] for t in logits], dim=1)
    return prob, None if tumor is None else tumor.float().sigmoid()


@contextlib.contextmanager
def evaluating(model: torch.nn.Module):
    """Eval mode without gradients; at the end, back to the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def predict_image(
    model, image: Tensor, size, overlap=0.5, batch=2, flip_axes=(), amp="off", title=None,
    graph=False, air=None,
) -> tuple[Tensor, float | None]:
    """Probability maps (K, D, H, W) of a preprocessed study, and the patient's score.

    The score is the highest tumor probability of a window; None without a classifier.

    Args:
        image: (2, D, H, W), or PET alone (1, D, H, W) if the network needs no CT.
        size, overlap, batch, title, air: as for `sliding_window`. amp: as for `autocast`.
        flip_axes: average over the mirror images along all combinations of these axes (test-time
            augmentation); give only axes that training mirrored too.
        graph: replay the batches as a CUDA graph, see graph.py.
    """
    scores: list[Tensor] = []
    counts = range(len(flip_axes) + 1)
    flips = [[2 + axis for axis in some] for n in counts for some in combinations(flip_axes, n)]

    def mean_of_flips(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, score = x.new_zeros(()), x.new_zeros(())
        for flip in flips:
            prob, tumor = foreground_probability(model, x.flip(flip))
            mean = mean + prob.flip(flip) / len(flips)
            if tumor is not None:
                score = score + tumor / len(flips)
        return mean, score

    run = Graph(mean_of_flips, image.device, rows=True) if graph else mean_of_flips

    def predict(x: Tensor) -> Tensor:
        mean, score = run(x=x)
        if score.ndim:
            scores.append(score.clone())  # a replay overwrites it
        return mean

    with evaluating(model), autocast(image.device.type, amp):
        prob = sliding_window(image, predict, size, overlap, batch, title, air)
    return prob, float(torch.cat(scores).max()) if scores else None


def reconstruct(model, image: Tensor, size, overlap=0.5, batch=2) -> dict[str, np.ndarray]:
    """What a network reconstructs of a clean study (2, D, H, W).

    Returns {"CT": (D, H, W)}, in v2 and v3 also "PET"; {} if the network reconstructs neither.
    """
    names = [name for name in ("ct", "pet") if name in model.tasks]
    if not names:
        return {}

    def predict(x: Tensor) -> Tensor:
        outputs = model(x)
        return torch.cat([getattr(outputs, name) for name in names], dim=1)

    with evaluating(model):
        maps = sliding_window(image, predict, size, overlap, batch).cpu().numpy()
    return {name.upper(): volume for name, volume in zip(names, maps)}


# --------------------------------------------------------------------- back to the input's own grid
def to_original(prob: np.ndarray, affine: np.ndarray, like: nib.Nifti1Image) -> np.ndarray:
    """Resample a map (D, H, W) trilinearly from the grid of `affine` to `like`'s.

    `affine` is that of the crop by `data.load_images`; the axes of both grids are parallel. Beyond
    the centers of its outermost voxels the map keeps their values, up to their faces; or, if `like`
    has smaller voxels, as far as the crop can have missed the body: one voxel of the map less one
    of `like`. Farther out is air: 0.
    """
    shape = like.shape[:3]
    if prob.shape == shape and np.allclose(affine, np.asarray(like.affine), atol=1e-4):
        return prob
    image = nib.Nifti1Image(prob, affine)
    out = resample_from_to(image, (shape, like.affine), order=1, mode="nearest")
    out = out.get_fdata(dtype=np.float32)
    steps = np.linalg.inv(affine) @ np.asarray(like.affine)  # from voxels of `like` to the map's
    for step, n in zip(steps, prob.shape):
        axis = int(np.abs(step[:3]).argmax())  # of `like`
        places = step[axis] * np.arange(shape[axis]) + step[3]
        margin = max(0.5, 1 - abs(step[axis])) + 1e-3  # rounding
        outside = (places < -margin) | (places > n - 1 + margin)
        np.moveaxis(out, axis, 0)[outside] = 0
    return out


def to_masks(prob: np.ndarray, affine: np.ndarray, like, threshold: float) -> list[np.ndarray]:
    """Maps (K, D, H, W) on the grid of `affine` -> K bool masks (D, H, W) on the grid of `like`."""
    return [to_original(p, affine, like) >= threshold for p in prob]


# -------------------------------------------------------------------------------------- checkpoints
def load_checkpoint(path, device: str | torch.device = "cpu") -> dict:
    """What train.py saved; its "config" becomes a Config. A foreign file cannot run code.

    Raises UserError for anything that is not a checkpoint of train.py, or is damaged.
    """
    state = files.read_torch(path, device)
    if not isinstance(state, dict) or "model" not in state or "config" not in state:
        raise UserError(f"{path}: not a checkpoint of train.py: it holds no config; give best.pt")
    state["config"] = Config.from_dict(state["config"], path)
    return state


def load_model(path, device: str = "cpu") -> tuple[torch.nn.Module, Config]:
    """The network of a checkpoint, in eval mode, and its run's config. Raises UserError."""
    state = load_checkpoint(path, device)
    c = state["config"]
    try:
        with torch.device("meta"):  # without memory: a config may ask for any number of channels
            c.build_model().load_state_dict(state["model"], assign=True)
        model: Any = c.build_model().to(device).eval()
        model.load_state_dict(state["model"])
        model.check_input((1, 2, *c.patch))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as e:
        why = " ".join(str(e).split())[:160]
        raise UserError(f"{path}: does not fit the network it names ({c.model}): {why}") from None
    for name, weights in model.state_dict().items():
        if not weights.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinity; take an earlier checkpoint")
    return model, c


# ---------------------------------------------------------------------------------------- one study
class Prediction(NamedTuple):
    """One segmented study."""

    rows: list[dict]  # of `describe_case`, v3's score of the patient, and whether it was too low
    lesions: list[dict]
    tile: dict  # its picture for `figures.overview`
    problem: str  # what is wrong with its truth, if it could not be used


def check_study(case: Case, models: list[tuple]) -> tuple[Case, str]:
    """Check the headers of a study's files, before any voxel is read.

    Returns the study without a CT that no network reads, and what is wrong with its truth, if
    anything is. Raises UserError for images that cannot be segmented.
    """
    *others, last = case.images
    like = read_header(last)
    need_ct = [c.model for model, c in models if "ct" in reads(model)]
    if need_ct and None in others:
        problem = f"{case.name}: {need_ct[0]} needs CT and PET, and the CT is missing"
        raise UserError(f"{problem}; v1, v2, v3 and pet segment from PET alone")
    others = others if need_ct else [None] * len(others)
    for path in filter(None, others):
        check = same_grid if models[0][1].task == "brain" else overlap  # a CT is resampled
        check(read_header(path), like, path, last)
    problem = ""
    try:
        if case.label:
            check_grid(case, read_header(case.label), like)
    except UserError as e:
        problem = str(e)
    return dataclasses.replace(case, images=(*others, last)), problem


def predict_study(
    models: list[tuple], case: Case, out: Path, device="cpu", probabilities=False,
    min_lesion_ml: float = 0.0, tolerance: float = 2.0, reject_below: float = 0.0,
    skip_air: float | None = None, page=False,
) -> Prediction:
    """Segment one study, write the mask on the input's grid, and score it if it has a truth.

    Brain masks hold MSD's codes: 1 edema, 2 core. A truth that cannot be used is none.

    Args:
        models: pairs of `load_model`; the probabilities of several are averaged, and the first
            config's threshold counts.
        out: the mask to write. probabilities: also write each target's map next to it.
        min_lesion_ml: smaller components are no lesions. tolerance: of the surface Dice, mm.
        reject_below: the mask is empty if the tumor score is lower; NaN, no score, is not.
        skip_air: windows without a higher SUV all get the network's answer to one of them.
        page: for PET/CT, also write report.py's page next to the mask.
    """
    c = models[0][1]
    used, problem = check_study(case, models)
    image, affine, _ = load_images(used, c.preprocessing)
    prob, score = predict_ensemble(models, torch.from_numpy(image).to(device), case.name, skip_air)
    image = image[-1].astype(np.float16)  # is drawn, and takes less memory
    like = read_header(case.images[-1])
    like = like if like.ndim == 3 else like.slicer[..., 0]
    threshold = math.inf if score < reject_below else c.threshold
    masks = []
    for target, p in zip(c.targets, prob):
        p = to_original(p, affine, like)
        masks.append(remove_small(p >= threshold, voxel_sizes(like.affine), min_lesion_ml))
        if probabilities:
            save_nifti(p.astype(np.float32), like, probability_path(out, target))
    predicted = (prob >= threshold).any(0)
    del p, prob  # memory
    mask = masks[0]
    if c.task == "brain":
        mask = np.where(masks[0], 2, np.logical_or.reduce(masks[1:]))
    save_nifti(mask.astype(np.uint8), like, out)

    truth = None
    try:
        truth = None if problem else read_truth(case)
    except UserError as e:
        problem = str(e)
    suv = np.asarray(read_nifti(case.images[-1]).dataobj) if c.task == "petct" else None
    rows, lesions = describe_case(case, truth, masks, c.targets, suv, tolerance)
    rows = [row | {"tumor_score": score, "rejected": int(score < reject_below)} for row in rows]
    if page:
        made = {"min_lesion_ml": min_lesion_ml, "reject_below": reject_below, "skip_air": skip_air}
        path, notes = out.with_name(f"{stem(out)}.html"), report.describe(models, rows[0] | made)
        report.write(path, case, suv, masks[0], like.affine, lesions, notes, truth)
    window = c.suv_window if c.task == "petct" else None
    tile = figures.tile(rows[0], image, predicted, truth, affine, window)
    return Prediction(rows, lesions, tile, problem)


def predict_ensemble(models, x: Tensor, title: str, skip_air=None) -> tuple[np.ndarray, float]:
    """Mean probabilities (K, D, H, W) and mean score of the patient (NaN without a classifier)."""
    prob, scores = torch.zeros((), device=x.device), []
    for model, c in models:
        low, high = c.suv_window
        air = None if skip_air is None else max(0.0, (skip_air - low) / (high - low))
        one, score = predict_image(
            model, x, c.patch, c.overlap, c.batch, c.flip_axes if c.flips else (),
            amp=c.amp if x.device.type == "cuda" else "off", title=title, graph=c.graph, air=air,
        )
        prob = one.div_(len(models)).add_(prob)
        scores += [] if score is None else [score]
    if not (prob.sum().isfinite() and np.isfinite(scores).all()):
        raise UserError(f"{title}: the network's probabilities are NaN; take another checkpoint")
    return prob.cpu().numpy(), float(np.mean(scores)) if scores else math.nan


def probability_path(mask: Path, target: str) -> Path:
    """Where the map of a target is written: next to the mask."""
    name, _, ending = mask.name.rpartition(".nii")
    return mask.with_name(f"{name}_{target}_probability.nii{ending}")


# -------------------------------------------------------------------------------------- the program
OPTIONS = "threshold flips overlap batch label_values label_nonzero graph".split()  # else the run's


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for what does not go together."""
    parser = Parser(description="From a trained network to a mask on the input's own grid.")
    add = parser.add_argument
    add("--checkpoint", nargs="+", required=True, help="best.pt of a run; several: an ensemble")
    add("--pet", type=Path, help="SUV.nii.gz")
    add("--ct", type=Path, help="CTres.nii.gz; v1, v2, v3 and pet need none")
    add("--image", type=Path, help="brain: one file of four channels, FLAIR, T1w, T1gd, T2w")
    add("--t2w", type=Path, help="brain: T2w in a separate file, with --flair")
    add("--flair", type=Path, help="brain: FLAIR in a separate file, on T2w's grid")
    add("--root", type=Path, help="a folder of studies in a layout of docs/data.md")
    add("--out", type=Path, required=True, help="the mask, .nii.gz or .nii; with --root a folder")
    add("--probabilities", action="store_true", help="also write OUT_TARGET_probability.nii.gz")
    add("--threshold", type=float, help="probability from which a voxel is tumor (the run's)")
    yes_no = argparse.BooleanOptionalAction
    add("--flips", action=yes_no, help="average over mirror images (the run's)")
    add("--overlap", type=float, help="overlap of windows, 0 to 0.9 (the run's)")
    add("--batch", type=int, help="windows at a time (the run's)")
    add("--label-values", type=int, nargs="+", help="of a truth that are tumor (the run's)")
    add("--label-nonzero", action=yes_no, help="all of a truth but 0 is tumor (the run's)")
    add("--min-lesion-ml", type=float, default=0.0, help="leave out smaller lesions (0)")
    add("--reject-below", type=float, help="empty masks of studies with a lower tumor score (off)")
    add("--skip-air", type=float, help="one answer for all windows without a higher SUV (off)")
    add("--tolerance-mm", type=float, default=2.0, help="of the surface Dice (2)")
    add("--report", action="store_true", help="PET/CT: also write a page per study, OUT.html")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--graph", action="store_true", help="on CUDA: replay batches of windows as a CUDA graph")
    add("--device", default=default, help=f"cpu | cuda | cuda:1 ... ({default})")
    add("--kernels", default="", help="auto | triton | plain (MIRROR_UNET_KERNELS, else auto)")
    a = parser.parse_args(argv)
    use_kernels(a.kernels)
    check_files(a)
    for name in OPTIONS:
        if getattr(a, name) is not None:
            try:
                setattr(a, name, check_value(FIELDS[name], getattr(a, name)))
            except ValueError as e:
                raise UserError(f"--{name.replace('_', '-')} {e}") from None
    limits = {"min_lesion_ml": 1e9, "tolerance_mm": 1e9, "reject_below": 1, "skip_air": 1}
    for name, high in limits.items():
        value = getattr(a, name)
        if value is not None and not 0 <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: give a number from 0 to {high:g}")
    check_device(a.device, a.graph)
    return a


def check_files(a: argparse.Namespace) -> None:
    """Refuse inputs and outputs that do not go together: UserError."""
    if a.ct and not a.pet:
        raise UserError("--ct without --pet: the mask is written on the PET's grid; give both")
    if bool(a.t2w) != bool(a.flair):
        raise UserError("--t2w and --flair go together; or give a four-channel file with --image")
    if sum(map(bool, (a.pet, a.image, a.flair, a.root))) != 1:
        raise UserError("give one input: --pet (and --ct), --image, --t2w and --flair, or --root")
    if a.root and os.path.isfile(a.out):
        raise UserError(f"--out {a.out}: a file; name a folder")
    if not a.root and not a.out.name.endswith((".nii", ".nii.gz")):
        raise UserError(f"--out {a.out}: a mask is a NIfTI file; end the name in .nii.gz")


def list_studies(a: argparse.Namespace, c: Config) -> list[tuple[Case, Path]]:
    """The studies to predict, and the mask to write of each. Raises UserError."""
    if a.root:
        cases, line = find_cases(a.root, c.task, complete=False, label_values=c.label_codes)
        print(line, flush=True)
        return [(case, a.out / f"{case.name}.nii.gz") for case in cases]
    if bool(a.pet) != (c.task == "petct"):
        fit = "--pet" if c.task == "petct" else "--image, or --t2w and --flair,"
        raise UserError(f"this checkpoint is of {c.task}: give {fit} or --root")
    images, channels = (a.t2w, a.flair) if a.flair else (a.ct, a.pet), ()
    if a.image:
        images, channels = (a.image,), (3, 0)
    return [(Case(study_of(images[-1]), "", images, None, channels), a.out)]


def predict_cases(models: list[tuple], cases: list[tuple[Case, Path]], a: argparse.Namespace):
    """Check the files of all studies, then segment them; with --root, write tables and a picture.

    A study that cannot be segmented costs no other one: a UserError at the end names all of these.
    """
    checked, failed, rows, lesions, tiles = [], [], [], [], []
    scored = any(case.label for case, _ in cases)
    for case, out in cases:
        try:
            _, problem = check_study(case, models)
        except UserError as e:
            failed.append(str(e))
            continue
        if scored and (problem or not case.label):
            print(f"not scored: {case.name}: {problem or 'no truth'}", flush=True)
            case = dataclasses.replace(case, label=None)
        checked.append((case, out))
    if failed and checked:
        print(f"{len(failed)} of {len(cases)} studies are left out, for reasons given at the end")
    start = time.monotonic()
    for done, (case, out) in enumerate(checked, start=1):
        try:
            found = predict_study(
                models, case, out, a.device, a.probabilities, a.min_lesion_ml, a.tolerance_mm,
                a.reject_below or 0.0, a.skip_air, a.report,
            )
        except files.CannotWrite:
            raise
        except UserError as e:
            failed.append(str(e))
            continue
        except (MemoryError, RuntimeError) as e:
            if not (isinstance(e, MemoryError) or re.search("(out of|allocate) memory", str(e))):
                raise
            failed.append(f"{case.name}: the memory is full; use a smaller --batch")
            continue
        rows += found.rows
        lesions += found.lesions
        tiles.append(found.tile)
        if found.problem:
            print(f"not scored: {case.name}: {found.problem}")
        words = [f"{r['target']} {r['pred_ml']:.1f} ml" for r in found.rows]
        if found.rows[0]["rejected"]:
            words.append(f"rejected, with a tumor score below {a.reject_below:g}")
        if a.root:
            left = (time.monotonic() - start) / done * (len(checked) - done) / 60
            words.append(f"{done} of {len(checked)}, {math.ceil(left)} min left")
            files.write_table(rows, a.out / "metrics.csv")  # so a stopped run leaves its rows
            files.write_table(lesions, a.out / "lesions.csv", LESION_COLUMNS)
        print(f"{case.name} -> {out}: {', '.join(words)}", flush=True)
    if a.root and rows:
        figures.overview(tiles, a.out / "overview.png")
        if scored:
            print_table(rows, models[0][1].targets)
    if failed:
        count = f"{len(failed)} of {len(cases)} studies have no prediction: "
        raise UserError((count if len(cases) > 1 else "") + " | ".join(failed))


def main(argv: list[str]) -> None:
    """Checkpoints and files -> masks. Raises UserError for what users can fix."""
    a = parse_arguments(argv)
    torch.backends.cudnn.benchmark = True  # all windows have one shape
    options = {k: getattr(a, k) for k in OPTIONS if getattr(a, k) is not None}
    if a.label_values:
        options.setdefault("label_nonzero", False)
    loaded = [load_model(path, a.device) for path in a.checkpoint]
    models = [(model, dataclasses.replace(c, **options)) for model, c in loaded]
    c = models[0][1]
    for path, (_, d) in zip(a.checkpoint, models):
        if (d.preprocessing, d.targets) != (c.preprocessing, c.targets):
            problem = f"other preprocessing or targets than {a.checkpoint[0]}"
            raise UserError(f"{path}: {problem}; an ensemble needs networks of one kind")
    if a.reject_below is not None and not any("tumor" in d.network_tasks for _, d in models):
        raise UserError(f"{a.checkpoint[0]}: {c.model} has no tumor score for --reject-below")
    if c.task == "brain" and (a.report or a.skip_air is not None):
        raise UserError("--report and --skip-air need a PET; leave them out for brain MR")
    if len(models) > 1:
        print("mean of", ", ".join(f"{d.model} fold {d.fold}" for _, d in models), flush=True)
    cases = list_studies(a, c)
    outputs = [out for _, out in cases]
    if a.probabilities:
        outputs += [probability_path(out, target) for _, out in cases for target in c.targets]
    if a.report:
        outputs += [out.with_name(f"{stem(out)}.html") for _, out in cases]
    if a.root:
        outputs += [a.out / name for name in ("metrics.csv", "lesions.csv", "overview.png")]
    inputs = [path for case, _ in cases for path in case.files()]
    files.refuse_overwriting(outputs, [*inputs, *map(Path, a.checkpoint)])
    predict_cases(models, cases, a)


if __name__ == "__main__":
    run_program(main)
