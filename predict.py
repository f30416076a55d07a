"""From a trained network to a mask on the input's own grid.

    python predict.py --checkpoint RUN/best.pt --pet SUV.nii.gz [--ct CTres.nii.gz] --out M.nii.gz
    python predict.py --checkpoint RUN/best.pt --image FOUR_CHANNEL.nii.gz --out M.nii.gz
    python predict.py --checkpoint RUN/best.pt --root DIR --out DIR

The last form predicts every study of a folder, and scores those that come with a truth.

Windows overlap by half. Each is weighted by a Gaussian, so that a voxel depends most on the windows
it is central in, and the probabilities (not the logits) are averaged. Memory holds one map per
target and the sum of the weights. No more is computed than the targets need: v1-v3 run the PET
branch alone, and need no CT.
"""

import argparse
import contextlib
import dataclasses
import math
import pickle
import re
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from nibabel.affines import voxel_sizes
from nibabel.processing import resample_from_to
from torch import Tensor
from tqdm import tqdm

import figures
from config import FIELDS, Config, Parser, check_value, use_kernels
from data import Case, find_brain, find_petct, label_to_grid, load_images
from evaluate import evaluate_case, print_table, read_truth, write_table
from files import CannotWrite, UserError, atomic_write, read_header, run_program, same_grid
from graph import Graph
from mirror_unet import BrainOutput


# ---------------------------------------------------------------------------------- sliding window
def window_starts(shape, size, overlap: float = 0.5) -> list[tuple[int, ...]]:
    """Corners of the windows that cover a volume: a regular grid; the last one ends at the border.

    shape: of the volume, at least as large as the window; size: of the window, both in voxels.
    overlap: in [0, 1).
    """
    axes = []
    for n, s in zip(shape, size, strict=True):
        stride = max(1, int(s * (1 - overlap)))
        count = -(-(n - s) // stride) + 1
        axes.append([min(i * stride, n - s) for i in range(count)])
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
    image: Tensor, predict: Callable[[Tensor], Tensor], size, overlap=0.5, batch=2, title=None
) -> Tensor:
    """Gaussian-weighted mean of `predict` over overlapping windows.

    Args:
        image: (C, D, H, W); zero-padded on both sides if it is smaller than a window.
        predict: (N, C, *size) -> (N, K, *size), called with at most `batch` windows at a time.
        size: of the window, three numbers. overlap: share of a side that neighbors have in common.
        title: of a progress bar; None for no bar.

    Returns (K, D, H, W), float32, on the image's device.
    """
    shape = image.shape[1:]
    missing = [max(s - n, 0) for n, s in zip(shape, size, strict=True)]
    pad = [p for m in reversed(missing) for p in (m // 2, m - m // 2)]
    image = torch.nn.functional.pad(image, pad)
    weight = gaussian_window(size).to(image.device)
    starts = window_starts(image.shape[1:], size, overlap)
    places = [tuple(slice(a, a + s) for a, s in zip(start, size)) for start in starts]
    weights = image.new_zeros(image.shape[1:])
    total = None
    batches = range(0, len(places), batch)
    for i in tqdm(batches, desc=title, unit="batch", leave=False, disable=title is None):
        some = places[i : i + batch]
        windows = torch.stack([image[(slice(None), *place)] for place in some])
        out = predict(windows).float()  # (N, K, *size)
        if total is None:
            total = image.new_zeros(out.shape[1], *image.shape[1:])
        for one, place in zip(out, some):
            total[(slice(None), *place)] += one * weight
            weights[place] += weight
    assert total is not None  # there is at least one window
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
        logits = [t for t in (out.core, out.whole, out.edema) if t is not None]
        tumor = None
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


def autocast(device: str, amp: str) -> torch.autocast:
    """The context of `--amp off | bf16 | fp16`."""
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None)


def predict_image(
    model, image: Tensor, size, overlap=0.5, batch=2, flip_axes=(), amp="off", title=None,
    graph=False,
) -> tuple[Tensor, float | None]:
    """Probability maps (K, D, H, W) of a preprocessed study, and the patient's score.

    The score is the highest tumor probability of a window; None without a classifier.

    Args:
        image: (2, D, H, W), or PET alone (1, D, H, W) if the network needs no CT.
        size, overlap, batch, title: as for `sliding_window`. amp: as for `autocast`.
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
        prob = sliding_window(image, predict, size, overlap, batch, title)
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
    """Resample a map (D, H, W) trilinearly from the grid of `affine` to `like`'s; 0 outside."""
    same = prob.shape == like.shape[:3]
    if same and np.allclose(affine, np.asarray(like.affine), atol=1e-4):
        return prob
    grid = (like.shape[:3], like.affine)
    resampled = resample_from_to(nib.Nifti1Image(prob, affine), grid, order=1, cval=0.0)
    return resampled.get_fdata(dtype=np.float32)


def to_masks(prob: np.ndarray, affine: np.ndarray, like, threshold: float) -> list[np.ndarray]:
    """Maps (K, D, H, W) on the grid of `affine` -> K bool masks (D, H, W) on the grid of `like`."""
    return [to_original(p, affine, like) >= threshold for p in prob]


def save_nifti(array: np.ndarray, like: nib.Nifti1Image, path: Path) -> None:
    """Write (D, H, W) as NIfTI in the array's dtype, with the affine and header of `like`."""
    header = like.header.copy()
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["cal_max"] = header["cal_min"] = 0  # else the input's display window
    with atomic_write(path) as part:
        nib.save(nib.Nifti1Image(array, like.affine, header), part)


# -------------------------------------------------------------------------------------- checkpoints
def load_checkpoint(path, device: str | torch.device = "cpu") -> dict:
    """What train.py saved; its "config" becomes a Config. A foreign file cannot run code.

    Raises UserError for anything that is not a checkpoint of train.py.
    """
    advice = "give a run's best.pt or last.pt"
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as e:  # torch, pickle and zip have their own errors for a broken file
        why = (str(e) or repr(e)).splitlines()[0][:160]
        if isinstance(e, pickle.UnpicklingError):  # its message advises to load the file anyway
            why = "holds more than tensors and plain values"
        problem = "not a checkpoint of train.py, or cut short"
        raise UserError(f"{path}: {problem}; {advice} ({why})") from None
    if not isinstance(state, dict) or "model" not in state or "config" not in state:
        raise UserError(f"{path}: not a checkpoint of train.py: it holds no config; {advice}")
    state["config"] = Config.from_dict(state["config"], path)
    return state


def load_model(path, device: str = "cpu") -> tuple[torch.nn.Module, Config]:
    """The network of a checkpoint, in eval mode, and its run's config. Raises UserError."""
    state = load_checkpoint(path, device)
    c = state["config"]
    try:
        model = c.build_model().to(device)
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        why = " ".join(str(e).split())[:160]
        raise UserError(f"{path}: does not fit the network it names ({c.model}): {why}") from None
    return model.eval(), c


# ---------------------------------------------------------------------------------------- one study
class Prediction(NamedTuple):
    """One segmented study."""

    rows: list[dict]  # of `evaluate_case`, and v3's score of the patient
    tile: dict  # its picture for `figures.overview`


def predict_study(
    models: list[tuple], case: Case, out: Path, device="cpu", probabilities=False, options=None
) -> Prediction:
    """Segment one study, write the mask on the input's grid, and score it if it has a truth.

    Brain masks hold MSD's codes: 1 edema, 2 core.

    Args:
        models: pairs of `load_model`; the probabilities of several are averaged.
        out: the mask to write. probabilities: also write each target's map next to it.
        options: fields of Config that win over the checkpoints' ("threshold", "flips", ...).
    """
    models = [(model, dataclasses.replace(c, **(options or {}))) for model, c in models]
    c = models[0][1]
    like = read_header(case.images[-1])
    if c.task == "petct" and case.images[0]:
        same_grid(read_header(case.images[0]), like, *case.images)
    need_ct = [d.model for model, d in models if "ct" in reads(model)]
    if need_ct and None in case.images:
        problem = f"{case.name}: {need_ct[0]} needs CT and PET, and the CT is missing"
        raise UserError(f"{problem}; v1, v2, v3 and pet segment from PET alone")
    if not need_ct:
        case = dataclasses.replace(case, images=(None, case.images[-1]))
    image, affine, box = load_images(case, c.preprocessing)
    x = torch.from_numpy(image).to(device)
    prob, scores = torch.zeros((), device=device), []
    for model, d in models:
        one, score = predict_image(
            model, x, d.patch, d.overlap, d.batch,
            flip_axes=d.flip_axes if d.flips else (),
            amp=d.amp if torch.device(device).type == "cuda" else "off",
            title=case.name,
            graph=d.graph,
        )
        prob = prob + one.div_(len(models))
        scores += [] if score is None else [score]
    prob = prob.cpu().numpy()
    like = like if like.ndim == 3 else like.slicer[..., 0]
    masks = []
    for target, p in zip(c.targets, prob):
        p = to_original(p, affine, like)
        masks.append(p >= c.threshold)
        if probabilities:
            stem, _, ending = out.name.rpartition(".nii")
            path = out.with_name(f"{stem}_{target}_probability.nii{ending}")
            save_nifti(p.astype(np.float32), like, path)
    mask = masks[0]
    if c.task == "brain":
        mask = np.where(masks[0], 2, np.logical_or.reduce(masks[1:]))
    save_nifti(mask.astype(np.uint8), like, out)

    truth = read_truth(case)
    score = float(np.mean(scores)) if scores else math.nan
    rows = evaluate_case(case, truth, masks, c.targets)
    rows = [row | {"tumor_score": score} for row in rows]
    if truth is not None:
        truth = label_to_grid(truth, c.preprocessing, box) > 0
    title = case.name
    if not math.isnan(rows[0]["dice"]):
        title += f"\nDice {rows[0]['dice']:.2f}"
    predicted = (prob >= c.threshold).any(0)
    spacing = voxel_sizes(affine)
    tile = figures.tile(title, image[-1], predicted, truth, spacing, c.task == "brain")
    return Prediction(rows, tile)


# -------------------------------------------------------------------------------------- the program
def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for what does not go together."""
    parser = Parser(description="From a trained network to a mask on the input's own grid.")
    add = parser.add_argument
    add("--checkpoint", nargs="+", required=True, help="best.pt of a run; several: an ensemble")
    add("--pet", type=Path, help="SUV.nii.gz")
    add("--ct", type=Path, help="CTres.nii.gz on the PET's grid; v1, v2, v3 and pet need none")
    add("--image", type=Path, help="brain: one file of four channels, FLAIR, T1w, T1gd, T2w")
    add("--t2w", type=Path, help="brain: T2w in a separate file, with --flair")
    add("--flair", type=Path, help="brain: FLAIR in a separate file, on T2w's grid")
    add("--root", type=Path, help="a folder of studies in the layout of the training data")
    add("--out", type=Path, required=True, help="the mask, .nii.gz or .nii; with --root a folder")
    add("--probabilities", action="store_true", help="also write OUT_TARGET_probability.nii.gz")
    add("--threshold", type=float, help="probability from which a voxel is tumor (the run's)")
    flips = argparse.BooleanOptionalAction
    add("--flips", action=flips, help="average over mirror images (the run's)")
    add("--overlap", type=float, help="overlap of windows, 0 to 0.9 (the run's)")
    add("--batch", type=int, help="windows at a time (the run's)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--graph", action="store_true", help="on CUDA: replay batches of windows as a CUDA graph")
    add("--device", default=default, help=f"cpu | cuda | cuda:1 ... ({default})")
    add("--kernels", default="", help="auto | triton | plain (MIRROR_UNET_KERNELS, else auto)")
    a = parser.parse_args(argv)
    use_kernels(a.kernels)
    check_files(a)
    for name in ("threshold", "overlap", "batch"):
        if getattr(a, name) is not None:
            try:
                check_value(FIELDS[name], getattr(a, name))
            except ValueError as e:
                raise UserError(f"--{name} {e}") from None
    if not re.fullmatch(r"cpu|cuda(:\d+)?", a.device):
        raise UserError(f"--device {a.device}: use cpu, cuda or cuda:N")
    if a.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {a.device}: PyTorch sees no CUDA device here; use --device cpu")
    if a.graph and a.device == "cpu":
        raise UserError("--graph: CUDA graphs need --device cuda; leave it out")
    return a


def check_files(a: argparse.Namespace) -> None:
    """Refuse inputs and outputs that do not go together: UserError."""
    inputs = [p for p in (a.pet, a.ct, a.image, a.t2w, a.flair) if p]
    if a.ct and not a.pet:
        raise UserError("--ct without --pet: the mask is written on the PET's grid; give both")
    if bool(a.t2w) != bool(a.flair):
        raise UserError("--t2w and --flair go together; or give a four-channel file with --image")
    if sum(map(bool, (a.pet, a.image, a.flair, a.root))) != 1:
        raise UserError("give one input: --pet (and --ct), --image, --t2w and --flair, or --root")
    if a.root and a.out.is_file():
        raise UserError(f"--out {a.out}: a file; name a folder")
    if not a.root and not a.out.name.endswith((".nii", ".nii.gz")):
        raise UserError(f"--out {a.out}: a mask is a NIfTI file; end the name in .nii.gz")
    if not a.root and a.out.is_dir():
        raise UserError(f"--out {a.out}: a folder; name a file")
    if a.out.resolve() in [p.resolve() for p in inputs]:
        raise UserError(f"--out {a.out}: an input, which is never overwritten; choose another name")


def find_cases(a: argparse.Namespace, task: str) -> list[tuple[Case, Path]]:
    """The studies to predict, and the mask to write of each. Raises UserError."""
    if a.root:
        cases = find_brain(a.root) if task == "brain" else find_petct(a.root, complete=False)
        return [(case, a.out / f"{case.name}.nii.gz") for case in cases]
    if bool(a.pet) != (task == "petct"):
        fit = "--pet" if task == "petct" else "--image, or --t2w and --flair,"
        raise UserError(f"this checkpoint is of {task}: give {fit} or --root")
    if a.image:
        images, channels = (a.image,), (3, 0)
    else:
        images, channels = (a.t2w, a.flair) if a.flair else (a.ct, a.pet), ()
    name = images[-1].name.split(".nii")[0]
    return [(Case(name, "", images, None, channels), a.out)]


def main(argv: list[str]) -> None:
    """Checkpoints and files -> masks. Raises UserError for what users can fix."""
    a = parse_arguments(argv)
    torch.backends.cudnn.benchmark = True  # all windows have one shape
    models = [load_model(path, a.device) for path in a.checkpoint]
    c = models[0][1]
    for path, (_, d) in zip(a.checkpoint, models):
        if (d.preprocessing, d.targets) != (c.preprocessing, c.targets):
            problem = f"other preprocessing or targets than {a.checkpoint[0]}"
            raise UserError(f"{path}: {problem}; an ensemble needs networks of one kind")
    names = ("threshold", "flips", "overlap", "batch", "graph")
    options = {k: getattr(a, k) for k in names if getattr(a, k) is not None}
    cases = find_cases(a, c.task)
    rows, tiles, failed = [], [], []
    for case, out in cases:
        try:
            found = predict_study(models, case, out, a.device, a.probabilities, options)
        except CannotWrite:
            raise
        except torch.OutOfMemoryError:
            advice = "use a smaller --batch, or --device cpu"
            raise UserError(f"the GPU's memory is full: {advice}") from None
        except UserError as e:
            if len(cases) == 1:
                raise
            failed.append(str(e))
            continue
        rows += found.rows
        tiles.append(found.tile)
        volumes = ", ".join(f"{r['target']} {r['pred_ml']:.1f} ml" for r in found.rows)
        print(f"{case.name} -> {out}: {volumes}", flush=True)
        if a.root:
            write_table(rows, a.out / "metrics.csv")  # each time, so a stopped run leaves its rows
    if a.root and rows:
        figures.overview(tiles, a.out / "overview.png")
        if any(case.label for case, _ in cases):
            print_table(rows, c.targets)
    if failed:
        count = f"{len(failed)} of {len(cases)} studies"
        raise UserError(f"{count} have no prediction: " + " | ".join(failed))


if __name__ == "__main__":
    run_program(main)
