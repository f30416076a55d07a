"""From a trained network to a mask on the input's own grid: sliding window -> probabilities -> resample back -> metrics.

    python predict.py --checkpoint runs/NAME/best.pt --pet SUV.nii.gz [--ct CTres.nii.gz] --out SEG_pred.nii.gz
    python predict.py --checkpoint runs/NAME/best.pt --image FOUR_CHANNEL.nii.gz --out SEG_pred.nii.gz          (brain; or --t2w --flair)
    python predict.py --checkpoint runs/NAME/best.pt --root DIR --out DIR      every study of a folder; a table where truth is there

Windows overlap by half; each is weighted by a Gaussian, so that a voxel listens most to the window it is central in, and the
probabilities (not the logits) are averaged. What is kept of a volume is one map a target and the sum of the weights; what is computed,
no more than the target needs: the PET branch alone in v1-v3, which needs no CT.
"""

import argparse
import contextlib
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from nibabel.processing import resample_from_to
from torch import Tensor
from tqdm import tqdm

import baselines
import figures
import kernels
from data import CachedCase, Case, Preprocessing, find_brain, find_petct, label_to_grid, load_images, read_label
from files import CannotWrite, UserError, atomic_write, program, read_header, read_nifti, same_grid
from metrics import case_metrics, print_table, write_table
from mirror_unet import VERSIONS, BrainOutput, MirrorUNet

TARGETS = {"petct": ("seg",), "brain": ("core", "whole", "edema")}


# ----------------------------------------------------------------------------------------------------- sliding window
def window_starts(shape, size, overlap: float = 0.5) -> list[tuple[int, ...]]:
    """Corners of the windows that cover a volume: a regular grid, the last window of an axis moved back inside.

    shape, size: of the volume (at least the window's) and the window, in voxels; overlap in [0, 1).
    """
    axes = []
    for n, s in zip(shape, size, strict=True):
        stride = max(1, int(s * (1 - overlap)))
        count = -(-(n - s) // stride) + 1
        axes.append([min(i * stride, n - s) for i in range(count)])
    return list(product(*axes))


def gaussian_window(size, sigma: float = 0.125) -> Tensor:
    """(D, H, W) weights: a Gaussian of standard deviation `sigma` times the side, 1 at the centre, at least 1e-3."""
    axes = [torch.exp(-0.5 * ((torch.arange(s) - (s - 1) / 2) / (sigma * s)) ** 2) for s in size]
    weight = axes[0][:, None, None] * axes[1][:, None] * axes[2]
    return weight.clamp_min(max(float(weight.min()), 1e-3))


@torch.no_grad()
def sliding_window(image: Tensor, predict: Callable[[Tensor], Tensor], size, overlap=0.5, batch=2, title: str | None = None) -> Tensor:
    """Gaussian-weighted mean of `predict` over overlapping windows.

    Args:
        image: (C, D, H, W); zero-padded on both sides where it is smaller than a window.
        predict: (N, C, *size) -> (N, K, *size), at most `batch` windows at a time.
        size: window, three numbers. overlap: share of a window's side that the next one covers again.
        title: of a progress bar; None: no bar.

    Returns (K, D, H, W) float32 on image's device. Beside the image and that, memory holds the weights' sum (D, H, W) and a batch.
    """
    shape = image.shape[1:]
    missing = [max(s - n, 0) for n, s in zip(shape, size, strict=True)]
    pad = [p for m in reversed(missing) for p in (m // 2, m - m // 2)]
    image = torch.nn.functional.pad(image, pad)
    weight = gaussian_window(size).to(image.device)
    starts = window_starts(image.shape[1:], size, overlap)
    places = [tuple(slice(a, a + s) for a, s in zip(start, size)) for start in starts]
    total = norm = None
    for i in tqdm(range(0, len(places), batch), desc=title, unit="batch", leave=False, disable=title is None):
        out = predict(torch.stack([image[(slice(None), *place)] for place in places[i : i + batch]])).float()
        if total is None:
            total, norm = image.new_zeros(out.shape[1], *image.shape[1:]), image.new_zeros(image.shape[1:])
        for one, place in zip(out, places[i : i + batch]):
            total[(slice(None), *place)] += one * weight
            norm[place] += weight
    inner = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, shape))
    return total.div_(norm)[(slice(None), *inner)]


def reads(model: torch.nn.Module) -> tuple[str, ...]:
    """The modalities that a segmentation by this network takes: a Mirror U-Net v1-v3 takes PET alone."""
    return getattr(model, "reads", ("ct", "pet"))


def foreground_probability(model: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(B, 2, D, H, W) -> probabilities (B, K, D, H, W) of the K targets, and the probability of a tumor (B,) where there is one.

    No more is computed than that takes: a Mirror U-Net v1-v3 runs only its PET branch, and x may be PET alone, (B, 1, D, H, W).
    """
    out = getattr(model, "segment", model)(x[:, -1:] if reads(model) == ("pet",) else x)
    logits = [t for t in (out.core, out.whole, out.edema) if t is not None] if isinstance(out, BrainOutput) else [out.seg]
    prob = torch.cat([t.float().softmax(1)[:, 1:2] for t in logits], dim=1)
    tumor = None if isinstance(out, BrainOutput) or out.tumor is None else out.tumor.float().sigmoid()
    return prob, tumor


@contextlib.contextmanager
def evaluating(model: torch.nn.Module):
    """Eval mode without gradients, and back to the mode it was in."""
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


def predict_image(model, image: Tensor, size, overlap=0.5, batch=2, flip_axes=(), amp="off", title=None) -> tuple[Tensor, float | None]:
    """Probability maps (K, D, H, W) of a preprocessed study, and its score: the highest "tumor" probability of a window (v3).

    image: (2, D, H, W), or PET alone (1, D, H, W) where the network needs no CT. flip_axes: average over the mirror images along all
    combinations of these axes (test-time augmentation): give only axes that training mirrored too. amp, title: as `autocast`'s and
    `sliding_window`'s.
    """
    scores: list[Tensor] = []
    flips = [[2 + axis for axis in some] for n in range(len(flip_axes) + 1) for some in combinations(flip_axes, n)]

    def predict(x: Tensor) -> Tensor:
        mean, score = 0.0, 0.0
        for flip in flips:
            prob, tumor = foreground_probability(model, x.flip(flip))
            mean = mean + prob.flip(flip) / len(flips)
            score = score if tumor is None else score + tumor / len(flips)
        if tumor is not None:
            scores.append(score)
        return mean

    with evaluating(model), autocast(image.device.type, amp):
        prob = sliding_window(image, predict, size, overlap, batch, title)
    return prob, float(torch.cat(scores).max()) if scores else None


def reconstructions(model, image: Tensor, size, overlap=0.5, batch=2) -> dict[str, np.ndarray]:
    """What a network with v1-v3's tasks reconstructs of a clean study (2, D, H, W): {"CT": (D, H, W)}, in v2, v3 also "PET"; else {}."""
    if model.version == "v4" or model.preset == "brain":
        return {}

    def predict(x: Tensor) -> Tensor:
        out = model(x)
        return out.ct if out.pet is None else torch.cat([out.ct, out.pet], dim=1)

    with evaluating(model):
        maps = sliding_window(image, predict, size, overlap, batch)
    return dict(zip(("CT", "PET"), maps.cpu().numpy()))


# -------------------------------------------------------------------------------------- back to the input's own grid
def to_original(prob: np.ndarray, affine: np.ndarray, like: nib.Nifti1Image) -> np.ndarray:
    """Resample a map (D, H, W) from the grid of `affine` to the grid of the image `like`, trilinearly; 0 outside."""
    if prob.shape == like.shape[:3] and np.allclose(affine, like.affine, atol=1e-4):
        return prob
    return resample_from_to(nib.Nifti1Image(prob, affine), (like.shape[:3], like.affine), order=1, cval=0.0).get_fdata(dtype=np.float32)


def to_masks(prob: np.ndarray, affine: np.ndarray, like: nib.Nifti1Image, threshold: float) -> list[np.ndarray]:
    """Maps (K, D, H, W) on the grid of `affine` -> K masks (D, H, W), bool, on the grid of `like`."""
    return [to_original(p, affine, like) >= threshold for p in prob]


def truth_of(case: Case) -> nib.Nifti1Image | None:
    """`read_label`'s labels; None where the study has none."""
    return read_label(case) if case.label else None


def evaluate(case: Case, truth: nib.Nifti1Image | None, masks: list[np.ndarray], targets: tuple[str, ...]) -> list[dict]:
    """Metrics of one case, a row a target. truth: `truth_of(case)`, without which only volumes are known; masks: (D, H, W) bool each,
    on the input's own grid, as truth is."""
    like, rows = read_header(case.images[-1]), []
    spacing = nib.affines.voxel_sizes(like.affine)
    labels = None if truth is None else np.asarray(truth.dataobj)
    for name, mask in zip(targets, masks, strict=True):
        if labels is None:
            numbers = dict.fromkeys(("dice", "fpv_ml", "fnv_ml", "truth_ml"), math.nan)
            numbers["pred_ml"] = np.count_nonzero(mask) * float(np.prod(spacing)) / 1000
        else:
            true = {"seg": labels > 0, "whole": labels > 0, "core": labels == 2, "edema": labels == 1}[name]
            numbers = case_metrics(mask, true, spacing)
        rows.append({"case": case.name, "target": name, **{k: numbers[k] for k in ("dice", "fpv_ml", "fnv_ml", "pred_ml", "truth_ml")}})
    return rows


def suv_threshold(train: list[CachedCase], val: list[CachedCase], most: int = 100) -> tuple[float, list[dict]]:
    """What no network at all would reach: "tumor is where SUV >= t", with the t that is best on the training studies (`most` of them).

    On the files' own grids and values, as a network is scored: its SUV window may end below the best threshold. Returns t and the
    metrics of each held-out study.
    """
    thresholds = np.geomspace(0.5, 50, 93)  # 5 % apart
    scores = np.zeros(len(thresholds))
    ill = [case.case for case in train if case.tumor]
    for case in ill[:: max(1, math.ceil(len(ill) / most))]:
        pet, truth = _suv(case), np.asarray(read_label(case).dataobj) > 0
        counts = [np.histogram(p[p >= thresholds[0]], bins=[*thresholds, np.inf])[0][::-1].cumsum()[::-1] for p in (pet, pet[truth])]
        scores += 2 * counts[1] / (counts[0] + truth.sum())  # Dice of every threshold from two histograms
    best = float(thresholds[scores.argmax()])
    rows = []
    for case in val:
        rows += evaluate(case.case, truth_of(case.case), [_suv(case.case) >= best], ("seg",))
    return best, rows


def _suv(case: Case) -> np.ndarray:
    return read_nifti(case.images[1]).get_fdata(dtype=np.float32)


# ------------------------------------------------------------------------------------- what a run's config (a dict) means
def kind_of(source: str) -> str:
    """ "petct" or "brain", of a run's `data`."""
    return "brain" if source in ("brain", "phantom-brain") else "petct"


def targets_of(c: dict) -> tuple[str, ...]:
    """The names of the maps that `foreground_probability` returns, in its order: the brain's v1, v2-rec have no whole tumor."""
    return tuple(t for t in TARGETS[kind_of(c["data"])] if not (t == "whole" and c["model"] in ("v1", "v2-rec")))


def recipe_of(c: dict) -> Preprocessing:
    """The preprocessing that a config asks for."""
    if kind_of(c["data"]) == "brain":
        return Preprocessing("brain", tuple(c["spacing"]), "RAS")
    return Preprocessing("petct", tuple(c["spacing"]), "LAS", tuple(c["ct_window"]), tuple(c["suv_window"]))


def model_of(c: dict) -> torch.nn.Module:
    """The network that a config names, freshly initialised. Raises ValueError where there is no such network."""
    name, kind = c["model"], kind_of(c["data"])
    if name in VERSIONS[kind]:
        weight = c["ct_weight"] if c["ct_weight"] == "learnable" else float(c["ct_weight"])
        return MirrorUNet(name, c["share"], c["channels"], c["norm"], kind, weight)
    more = {key: c[key] for key in ("tasks", "skips") if key in c}  # not in the config of an old checkpoint
    return baselines.build(name, kind, c["channels"], c["norm"], c["share"], patch=c["patch"], spacing=c["spacing"], **more)


# --------------------------------------------------------------------------------------------------------- the program
def load_model(path, device: str = "cpu") -> tuple[torch.nn.Module, dict]:
    """The network of a checkpoint, in eval mode, and its run's config. Raises UserError for anything that is no checkpoint of ours."""
    state = load_checkpoint(path, device)
    c = state["config"]
    try:
        model = model_of(c).to(device)
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        why = " ".join(str(e).split())[:160]
        raise UserError(f"{path}: does not fit the network it names ({c.get('model')}), perhaps of another version: {why}") from None
    return model.eval(), c


def load_checkpoint(path, device="cpu") -> dict:
    """What train.py saved. A stranger's file cannot run code. Raises UserError for anything that is no checkpoint of ours."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as e:  # torch, pickle and zip each have errors of their own; pickle's advises to load it nevertheless
        why = (
            "holds more than tensors and plain values"
            if isinstance(e, pickle.UnpicklingError)
            else (str(e) or repr(e)).splitlines()[0][:160]
        )
        raise UserError(f"{path}: not a checkpoint of train.py, or cut short; give a run's best.pt or last.pt ({why})") from None
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict) or "model" not in state:
        raise UserError(f"{path}: not a checkpoint of train.py: it holds no config; give a run's best.pt or last.pt")
    return state


def save_nifti(array: np.ndarray, like: nib.Nifti1Image, path: Path) -> None:
    """Write (D, H, W) as NIfTI in the array's dtype, with the affine and header of `like`; whole or not at all."""
    header = like.header.copy()
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["cal_max"] = header["cal_min"] = 0  # the input's display window
    with atomic_write(path) as part:
        nib.save(nib.Nifti1Image(array, like.affine, header), part)


class Prediction(NamedTuple):
    """One segmented study."""

    rows: list[dict]  # `evaluate`'s, and v3's score of the patient
    tile: dict  # its picture for `figures.overview`


def predict_study(models: list[tuple], case: Case, out: Path, device="cpu", probabilities=False, options=None) -> Prediction:
    """Segment one study and write the mask, on the input's grid; score it where its truth is there.

    models: `load_model`'s pairs; the probabilities of several are averaged. Brain masks hold MSD's codes, 1 edema and 2 core.
    probabilities: also write each target's map, beside the mask. options: win over the checkpoints' configs ("threshold", "flips", ...).
    """
    configs = [c | (options or {}) for _, c in models]
    c, brain = configs[0], kind_of(configs[0]["data"]) == "brain"
    ct, like = [d["model"] for model, d in models if "ct" in reads(model)], read_header(case.images[-1])
    if not brain and case.images[0]:
        same_grid(read_header(case.images[0]), like, *case.images)
    if ct and None in case.images:
        raise UserError(f"{case.name}: {ct[0]} needs CT and PET, and the CT is missing; v1, v2, v3 and pet segment from PET alone")
    image, affine, box = load_images(case if ct else replace(case, images=(None, case.images[-1])), recipe_of(c))
    x, prob, scores = torch.from_numpy(image).to(device), 0, []
    for (model, _), d in zip(models, configs):
        flip_axes, amp = d["flip_axes"] if d["flips"] else (), d["amp"] if torch.device(device).type == "cuda" else "off"
        one, score = predict_image(model, x, d["patch"], d["overlap"], d["batch"], flip_axes, amp, title=case.name)
        prob = prob + one.div_(len(models))
        scores += [] if score is None else [score]
    prob = prob.cpu().numpy()
    like = like if like.ndim == 3 else like.slicer[..., 0]
    masks = []
    for target, p in zip(targets_of(c), prob):
        p = to_original(p, affine, like)
        masks.append(p >= c["threshold"])
        if probabilities:
            stem, _, ending = out.name.rpartition(".nii")
            save_nifti(p.astype(np.float32), like, out.with_name(f"{stem}_{target}_probability.nii{ending}"))
    mask = np.where(masks[0], 2, np.logical_or.reduce(masks[1:])) if brain else masks[0]
    save_nifti(mask.astype(np.uint8), like, out)
    score = float(np.mean(scores)) if scores else math.nan
    truth = truth_of(case)
    rows = [row | {"tumor_score": score} for row in evaluate(case, truth, masks, targets_of(c))]
    truth = None if truth is None else label_to_grid(truth, recipe_of(c), box) > 0
    title = case.name + (f"\nDice {rows[0]['dice']:.2f}" if rows[0]["dice"] == rows[0]["dice"] else "")
    tile = figures.tile(title, image[-1], (prob >= c["threshold"]).any(0), truth, nib.affines.voxel_sizes(affine), brain)
    return Prediction(rows, tile)


def options_of(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for what does not go together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", nargs="+", required=True, help="best.pt of a run; several of one kind: an ensemble")
    add("--pet", type=Path, help="SUV.nii.gz")
    add("--ct", type=Path, help="CTres.nii.gz on the PET's grid; v1, v2, v3 and pet do not need it")
    add("--image", type=Path, help="brain: four channels FLAIR, T1w, T1gd, T2w in one file")
    add("--t2w", type=Path, help="brain: T2w in a file of its own, with --flair")
    add("--flair", type=Path, help="brain: FLAIR in a file of its own, on T2w's grid")
    add("--root", type=Path, help="a folder of studies in the layout of the training data")
    add("--out", type=Path, required=True, help="the mask to write, .nii.gz or .nii; with --root a folder")
    add("--probabilities", action="store_true", help="also write the probability maps, OUT_TARGET_probability.nii.gz")
    add("--threshold", type=float, help="probability from which a voxel is tumor; default the run's")
    add("--flips", action=argparse.BooleanOptionalAction, help="average over mirror images; default the run's")
    add("--overlap", type=float, help="of windows, 0 to 0.9; default the run's")
    add("--batch", type=int, help="windows at a time; default the run's")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu | cuda | cuda:1 ...")
    add("--kernels", default="", help="auto | triton | plain; default MIRROR_UNET_KERNELS, else auto")
    a = parser.parse_args(argv)
    try:
        kernels.use(a.kernels)
    except ValueError as e:
        raise UserError(f"--kernels {a.kernels}: {e}") from None
    inputs = [p for p in (a.pet, a.ct, a.image, a.t2w, a.flair) if p]
    if a.ct and not a.pet:
        raise UserError("--ct without --pet: the mask is written on the PET's grid, also by a network that reads CT alone; give both")
    if bool(a.t2w) != bool(a.flair):
        raise UserError("--t2w and --flair go together: give both files, or one four-channel file with --image")
    if sum(map(bool, (a.pet, a.image, a.flair, a.root))) != 1:
        raise UserError("give one input: --pet (and --ct), --image, --t2w and --flair, or --root")
    if not a.root and not a.out.name.endswith((".nii", ".nii.gz")):
        raise UserError(f"--out {a.out}: a mask is a NIfTI file; end the name in .nii.gz")
    if a.out.resolve() in [p.resolve() for p in inputs]:
        raise UserError(f"--out {a.out}: that is an input, which is never overwritten; choose another name")
    if not a.root and a.out.is_dir() or a.root and a.out.is_file():
        raise UserError(f"--out {a.out}: {'a folder; name a file' if a.out.is_dir() else 'a file; name a folder'}")
    if a.overlap is not None and not 0 <= a.overlap <= 0.9 or a.batch is not None and a.batch < 1:
        raise UserError("--overlap lies between 0 and 0.9, and --batch is 1 or more")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", a.device):
        raise UserError(f"--device {a.device}: use cpu, cuda or cuda:N")
    if a.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {a.device}: PyTorch sees no CUDA device here; use --device cpu")
    return a


def cases_of(a: argparse.Namespace, kind: str) -> list[tuple[Case, Path]]:
    """The studies to predict, and each one's mask. Raises UserError where the files are not those of a network of this kind."""
    if not a.root and bool(a.pet) != (kind == "petct"):
        fit = "--pet" if kind == "petct" else "--image, or --t2w and --flair,"
        raise UserError(f"this checkpoint is of {kind}: give {fit} or --root")
    if a.root:
        cases = find_brain(a.root) if kind == "brain" else find_petct(a.root, complete=False)
        return [(case, a.out / f"{case.name}.nii.gz") for case in cases]
    one = a.image or a.flair or a.pet
    images = (a.image,) if a.image else (a.t2w, a.flair) if a.flair else (a.ct, a.pet)
    return [(Case(one.name.split(".nii")[0], "", images, None, (3, 0) if a.image else ()), a.out)]


def main(argv: list[str]) -> None:
    """The program: checkpoints and files -> masks. Raises UserError for what the user can mend."""
    a = options_of(argv)
    models = [load_model(path, a.device) for path in a.checkpoint]
    c = models[0][1]
    for path, (_, d) in zip(a.checkpoint, models):
        if (recipe_of(d), targets_of(d)) != (recipe_of(c), targets_of(c)):
            raise UserError(f"{path}: other preprocessing or targets than {a.checkpoint[0]}; an ensemble needs networks of one kind")
    options = {k: getattr(a, k) for k in ("threshold", "flips", "overlap", "batch") if getattr(a, k) is not None}
    rows, tiles, failed, cases = [], [], [], cases_of(a, kind_of(c["data"]))
    for case, out in cases:
        try:
            found = predict_study(models, case, out, a.device, a.probabilities, options)
        except CannotWrite:
            raise
        except torch.OutOfMemoryError:
            raise UserError("the GPU's memory is full: use a smaller --batch, or --device cpu") from None
        except UserError as e:
            if len(cases) == 1:
                raise
            failed.append(str(e))
            continue
        rows, tiles = rows + found.rows, [*tiles, found.tile]
        print(f"{case.name} -> {out}: " + ", ".join(f"{r['target']} {r['pred_ml']:.1f} ml" for r in found.rows), flush=True)
        if a.root:
            write_table(rows, a.out / "metrics.csv")  # anew each time: a run that is stopped leaves what it did
    if a.root and rows:
        figures.overview(tiles, a.out / "overview.png")
        if any(case.label for case, _ in cases):
            print_table(rows, targets_of(c))
    if failed:
        raise UserError(f"{len(failed)} of {len(cases)} studies have no prediction: " + " | ".join(failed))


if __name__ == "__main__":
    program(main)
