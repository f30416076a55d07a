"""Draw the page of the ideas: docs/gallery.md and its figures in docs/gallery/.

    python docs/gallery.py                   everything; trains a v3 for 700 steps, minutes on a CPU
    python docs/gallery.py --steps 10 --phantoms 6 --out build/gallery        to see that it works

The network that it trains is that of `make train`, fold 0, with the same options. Numbers in the
page's text are those of this run.
"""

import argparse
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from nibabel.affines import apply_affine, voxel_sizes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import figures  # noqa: E402
import patches  # noqa: E402
import train  # noqa: E402
from config import Config, parse_config  # noqa: E402
from data import CachedCase, read_nifti  # noqa: E402
from metrics import CENTER, components  # noqa: E402
from mirror_unet import MirrorUNet  # noqa: E402
from predict import evaluating, foreground_probability, predict_image, to_masks  # noqa: E402

SHARES = ((3, 4, 5, 6, 7), (4, 5, 6), (5,))
MOMENTS = (0, 0.03, 0.1, 0.3, 1)  # shares of the training at which the outputs are drawn
SLICE = dict(origin="lower", cmap="gray", vmin=0, vmax=1)
PET = SLICE | {"cmap": "gray_r", "vmax": 0.5}
BARE = dict(subplot_kw=dict(xticks=[], yticks=[]), squeeze=False)


def save(fig: Figure, path: Path) -> None:
    """Write a figure, in the size of the page."""
    fig.savefig(path, dpi=100)


# ------------------------------------------------------------------------------------- the networks
def share_file(share: tuple[int, ...]) -> str:
    """The name of a share set's diagram."""
    return f"share_{''.join(map(str, share))}.png"


def architectures(folder: Path) -> None:
    """A diagram per version, and one per share set, drawn from the networks."""
    for version in ("v1", "v2", "v3", "v4"):
        figures.architecture(MirrorUNet(version), folder / f"{version}.png")
    for share in SHARES:
        figures.architecture(MirrorUNet("v1", share=share), folder / share_file(share))


# ---------------------------------------------------------------------------------- the corruptions
def window(case: CachedCase, size: tuple[int, ...]) -> tuple[slice, ...]:
    """A window of a study around its largest lesion, (D, H, W), within the study."""
    labels, sizes, _ = components(case.array("label") > 0, case.array("label") > 0)
    center = np.argwhere(labels == 1 + sizes[1:].argmax()).mean(0)
    low = (center - np.array(size) / 2).clip(0, np.array(labels.shape) - size).astype(int)
    return tuple(slice(i, i + n) for i, n in zip(low, size))


def corruptions(case: CachedCase, c: Config, out: Path) -> None:
    """The CT as it is, with noise, and with voxels shuffled in cubes of three sizes."""
    box = window(case, c.patch)
    image = torch.from_numpy(case.array("image")[(slice(None), *box)].astype(np.float32))[None]
    key = torch.tensor([3])
    shown = [("the CT, which is the target", image, None)]
    for sigma in (0.1, c.sigma):
        noisy = patches.corrupt_ct(image, "noise", key, sigma=sigma)
        shown.append((f"noise, σ = {sigma:g}", noisy, None))
    for size in (8, 16, 32):
        low = [(n - size) // 2 for n in c.patch]
        corners = torch.tensor(low)[None, None]
        shuffled = patches.corrupt_ct(image, "shuffle", key, size, corners=corners)
        shown.append((f"voxels shuffled in a {size}³ cube", shuffled, (low, size)))
    fig = Figure((10.5, 7.4), layout="constrained")
    for axis, (title, x, cube) in zip(fig.subplots(2, 3, **BARE).ravel(), shown):
        axis.imshow(x[0, 0, :, :, c.patch[2] // 2].T, **SLICE)
        axis.set_title(title, fontsize=10)
        if cube:
            low, size = cube
            style = dict(fill=False, ec=figures.VERMILLION, ls="--", lw=1.5)
            axis.add_patch(Rectangle((low[0] - 0.5, low[1] - 0.5), size, size, **style))
    save(fig, out)


# --------------------------------------------------------------------------------------- a training
def outputs_of(run: train.Run, case: CachedCase) -> dict:
    """What the network makes of a window of a held-out study, a slice of each output."""
    c, box = run.c, window(case, run.c.patch)
    image = torch.from_numpy(case.array("image")[(slice(None), *box)].astype(np.float32))[None]
    with evaluating(run.model):
        out = run.model(image)
        tumor, score = foreground_probability(run.model, image)
    z = c.patch[2] // 2
    maps = {"ct": out.ct[0, 0], "pet": out.pet[0, 0], "seg": tumor[0, 0]}
    return {name: x[:, :, z].numpy() for name, x in maps.items()} | {"score": float(score)}


def training(c: Config, out: Path) -> tuple[train.Run, CachedCase]:
    """Train, and draw the outputs in a window of one held-out study at some steps."""
    learn, held_out = train.load_cases(c)
    run = train.Run(c, learn, held_out)
    case = max((k for k in held_out if k.tumor), key=lambda k: np.count_nonzero(k.array("label")))
    steps = {round(share * c.steps): None for share in MOMENTS}
    run.model.train()
    drawn = {0: outputs_of(run, case)}
    for batch in run.batches():
        run.train_step(batch)
        run.step += 1
        if run.step in steps:
            drawn[run.step] = outputs_of(run, case)
            print(f"step {run.step}", flush=True)
    box = window(case, c.patch)
    z = box[2].start + c.patch[2] // 2
    ct, pet = (x[box[0], box[1], z] for x in case.array("image"))
    truth = case.array("label")[box[0], box[1], z] > 0
    rows = {"ct": ("CT\nreconstructed", ct), "pet": ("PET\nreconstructed", pet)}
    rows["seg"] = ("tumor\nprobability", truth)
    fig = Figure((2.05 * (len(drawn) + 1) + 0.3, 6.5), layout="constrained")
    grid = fig.subplots(3, len(drawn) + 1, **BARE)
    for axes, (name, (text, target)) in zip(grid, rows.items()):
        axes[0].set_ylabel(text, fontsize=10)
        pictures = [*(d[name] for d in drawn.values()), target]
        for axis, picture in zip(axes, pictures):
            axis.imshow(picture.T, **{"ct": SLICE, "pet": PET, "seg": SLICE}[name])
            if name == "seg" and truth.any():
                axis.contour(truth.T, [0.5], colors=figures.TRUTH, linewidths=1.2)
    for axis, (step, d) in zip(grid[0], drawn.items()):
        axis.set_title(f"step {step}\nscore {d['score']:.2f}", fontsize=10)
    grid[0, -1].set_title("the target\n(tumor: score 1)", fontsize=10)
    save(fig, out)
    return run, case


# ------------------------------------------------------------------------------------- a whole body
def whole_body(run: train.Run, case: CachedCase, out: Path) -> tuple[dict, list[dict]]:
    """Draw a study's projections with its predicted lesions numbered; its row and its lesions."""
    c = run.c
    image = torch.from_numpy(case.array("image").astype(np.float32))
    prob, _ = predict_image(run.model, image, c.patch, c.overlap, c.batch)
    pet = read_nifti(case.case.images[-1])
    truth, suv = evaluate.read_truth(case.case), np.asarray(pet.dataobj, np.float32)
    masks = to_masks(prob.numpy(), case.affine, pet, c.threshold)
    (row,), lesions = evaluate.describe_case(case.case, truth, masks, c.targets, suv, 2.0)
    volumes = (suv, masks[0].astype(np.uint8), np.asarray(truth.dataobj).astype(np.uint8))
    # As a radiologist sees it: x from the patient's right to the left.
    flat = [nib.as_closest_canonical(nib.Nifti1Image(v, pet.affine)) for v in volumes]
    affine, size = flat[0].affine, voxel_sizes(flat[0].affine)
    suv, mask, true = (np.asarray(v.dataobj)[::-1] for v in flat)
    fig = Figure((7.2, 8.2), layout="constrained")
    views = fig.subplots(1, 2, **BARE)[0]
    shades = dict(origin="lower", cmap="gray_r", vmin=0, vmax=10)
    for axis, across, title in zip(views, (1, 0), ("coronal", "sagittal")):
        level = 1 - across  # the horizontal axis of this view
        axis.imshow(suv.max(across).T, aspect=size[2] / size[level], **shades)
        for volume, color in ((true, figures.TRUTH), (mask, figures.PREDICTION)):
            if volume.any():
                style = dict(colors=color, linestyles=figures.OUTLINES[color], linewidths=1)
                axis.contour(volume.max(across).T, [0.5], **style)
        for lesion in lesions:
            at = apply_affine(np.linalg.inv(affine), [lesion[k] for k in CENTER])
            at[0] = suv.shape[0] - 1 - at[0]
            mark = dict(arrowprops=dict(arrowstyle="-", lw=0.8), fontsize=10, weight="bold")
            mark["bbox"] = dict(boxstyle="round,pad=0.15", fc="white", ec="none")
            where = dict(xytext=(14, 10), textcoords="offset points")
            axis.annotate(str(lesion["lesion"]), (at[level], at[2]), **where, **mark)
        axis.set_title(f"{title} projection, white: SUV 0, black: 10 and more", fontsize=9)
    views[0].set_xlabel("right          patient          left", fontsize=9)
    views[1].set_xlabel("back          patient          front", fontsize=9)
    figures.legend(fig)
    save(fig, out)
    return row, lesions


# ----------------------------------------------------------------------------------------- the page
def table(lesions: list[dict]) -> str:
    """The lesions as lesions.csv has them, in Markdown."""
    forms = {"lesion": "d", "volume_ml": ".1f", "suv_max": ".1f", "suv_mean": ".1f", "tlg": ".0f"}
    lines = ["| lesion | volume ml | SUVmax | SUVmean | TLG | |", "|---|---|---|---|---|---|"]
    for lesion in lesions:
        cells = [format(lesion[name], form) for name, form in forms.items()]
        cells.append("meets a true one" if lesion["meets_truth"] else "false")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


PAGE = """# The ideas in pictures

`python docs/gallery.py` drew everything on this page from the code, and trained the network that it
shows.

## Fission: two U-Nets, a shared bottleneck, a task per decoder

Each modality has its own U-Net, and both share the weights of their bottleneck (violet). They do
not exchange features: gradients of both tasks meet in the shared weights. **v1** segments with the
PET branch, and the CT branch reconstructs the CT:

![v1](gallery/v1.png)

**v2** also reconstructs the PET, by a light decoder of both bottlenecks:

![v2](gallery/v2.png)

**v3** also says whether the patient has a tumor:

![v3](gallery/v3.png)

**v4** segments with both branches, and adds their logits:

![v4](gallery/v4.png)

## Which weights are shared

`--share` names the levels that are one module in both branches. The fewer are shared, the more
separate weights each modality has: {shares}.

{share_figures}

## Self-supervision: what is done to the CT

A network with skip connections can copy a clean CT, and learns nothing from that. So its input is
corrupted and the target stays clean. Shuffling keeps the histogram of a cube and destroys its
arrangement:

![corruptions](gallery/corruptions.png)

## What each output looks like while a v3 trains

A window of a patient that the training never sees; {steps} steps of {batch} patches. The score is
the classifier's probability that the window has a tumor, the outline is the true tumor. In the PET,
white is SUV {white:g} and black SUV {black:g} or more:

![outputs](gallery/training.png)

## A whole body, its lesions numbered as in lesions.csv

The same network on the same held-out patient. Dice {dice:.2f}, {found} of {true} true lesions met,
false-positive volume {fpv:.1f} ml:

![whole body](gallery/body.png)

{lesions}
"""


def main() -> None:
    """Draw everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--phantoms", type=int, default=100)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder (docs)")
    parser.add_argument("--run", default="build/gallery-run", help="folder of the training")
    a = parser.parse_args()
    folder = a.out / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--steps", str(a.steps), "--phantoms", str(a.phantoms), "--out", a.run]
    c = parse_config([*options, "--device", "cpu", "--overwrite"])
    Path(c.out).mkdir(parents=True, exist_ok=True)
    architectures(folder)
    run, case = training(c, folder / "training.png")
    corruptions(case, c, folder / "corruptions.png")
    row, lesions = whole_body(run, case, folder / "body.png")
    counts = {s: sum(p.numel() for p in MirrorUNet("v1", share=s).parameters()) for s in SHARES}
    text = PAGE.format(
        shares=", ".join(f"{n / 1e6:.1f} million in all with {list(s)}" for s, n in counts.items()),
        share_figures="\n\n".join(f"![levels {s}](gallery/{share_file(s)})" for s in SHARES),
        steps=c.steps, batch=c.batch, dice=row["dice"], fpv=row["fpv_ml"],
        found=round(row["lesion_sensitivity"] * row["true_lesions"]), true=row["true_lesions"],
        white=c.suv_window[0], black=np.interp(PET["vmax"], (0, 1), c.suv_window),
        lesions=table(lesions),
    )  # fmt: skip
    (a.out / "gallery.md").write_text(text)


if __name__ == "__main__":
    main()
