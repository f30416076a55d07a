"""The figures: learning curves, segmented cases, systems compared, and the network's architecture.

Volumes are on the network's grid, (D, H, W) with axes left, anterior, superior; spacing is in mm.
Colours are those of Okabe and Ito, which colour-blind readers can tell apart, with a lighter orange
and a darker green, so that any two of them differ enough (tests/test_figures.py).
"""

import base64
import functools
import io
import json
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # not pyplot, which chooses a backend
from matplotlib.image import imsave
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.path import Path as Outline
from nibabel.affines import voxel_sizes
from nibabel.nifti1 import Nifti1Image
from nibabel.processing import resample_from_to

from files import atomic_write

BLUE, SKY, VERMILLION = "#0072B2", "#56B4E9", "#D55E00"
CURVES = (BLUE, "#EEBC4D", "#004F3A", VERMILLION, "#CC79A7", SKY)
LINES = ("-", "--", "-.", ":")
TRUTH, PREDICTION = SKY, VERMILLION
OUTLINES = {TRUTH: "-", PREDICTION: "--"}


def _save(fig: Figure, out: Path) -> None:
    with atomic_write(out) as part:
        fig.savefig(part, dpi=110)


def _running_mean(values: np.ndarray, share: float = 0.02) -> np.ndarray:
    """Mean of each value and those before it, over a window of `share` of all values."""
    width = max(1, int(len(values) * share))
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - width, 0)
    sums = np.cumsum(np.insert(values, 0, 0.0))
    return (sums[1:] - sums[first]) / (last - first)


def curves(metrics: Path, out: Path) -> None:
    """Draw metrics.jsonl as curves.png: the training loss, its terms, and the validation Dice."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    train = [r for r in rows if "loss" in r]
    val = [r for r in rows if "val" in r]
    if not train:
        return
    fig = Figure((13, 3.6), layout="constrained")
    total, terms, dice = fig.subplots(1, 3)
    steps = [r["step"] for r in train]
    loss = np.array([r["loss"] for r in train])
    total.plot(steps, loss, lw=0.4, alpha=0.35, color=BLUE)
    total.plot(steps, _running_mean(loss), color=BLUE)
    top = np.percentile(loss, 99) * 1.1
    total.set(title="training loss", xlabel="step", ylabel="loss", ylim=(0, top))
    names = [k for k in train[0] if k.endswith(("_dice", "_ce", "_l2", "_bce"))]
    for i, name in enumerate(names):
        values = _running_mean(np.array([r[name] for r in train]))
        terms.plot(steps, values, LINES[i % 4], color=CURVES[i % 6], label=name)
    terms.set(title="its unweighted terms", xlabel="step", ylabel="running mean", yscale="log")
    terms.legend(fontsize=8)
    for i, name in enumerate(sorted({k for r in val for k in r["val"] if k.endswith("dice")})):
        values = [r["val"].get(name) for r in val]
        style = dict(marker="os^D"[i % 4], ls=LINES[i % 4], color=CURVES[i % 6])
        dice.plot([r["step"] for r in val], values, label=name, **style)
    dice.set(title="held-out patients", xlabel="step", ylabel="Dice", ylim=(0, 1))
    dice.grid(alpha=0.3)
    if val:
        dice.legend(fontsize=8)
    _save(fig, out)


def _outline(axis, mask, color: str) -> None:
    """Outline a two-dimensional mask, if it is known, not empty and not one voxel wide."""
    if mask is not None and mask.any() and min(mask.shape) > 1:
        style = dict(colors=color, linestyles=OUTLINES[color], linewidths=1.2)
        axis.contour(mask.T, levels=[0.5], **style)


def legend(fig: Figure) -> None:
    """Say below a figure which outline is the truth and which the prediction."""
    named = ((TRUTH, "truth"), (PREDICTION, "prediction"))
    marks = [Line2D([], [], color=c, ls=OUTLINES[c], label=name) for c, name in named]
    fig.legend(handles=marks, loc="outside lower center", ncols=2, fontsize=8)


def _grey_scale(image: np.ndarray, pet: bool) -> dict:
    """Options of imshow; PET is shown as it is read, with uptake dark."""
    low = 0.0 if pet else np.percentile(image, 1)
    high = max(np.percentile(image, 99.7), 1e-3)
    return dict(vmin=low, vmax=high, cmap="gray_r" if pet else "gray", origin="lower")


def choose(rows: list[dict], target: str) -> list[tuple[str, dict]]:
    """The cases that `panels` shows of a table of metrics: (title, row) of each.

    Those with the best, the middle and the worst Dice, and the patient without a tumor who has the
    largest false-positive volume, as far as there are such cases.
    """
    rows = [r for r in rows if r["target"] == target]
    order = sorted((r for r in rows if r["dice"] >= 0), key=lambda r: -r["dice"])
    names = {len(order) // 2: "middle", len(order) - 1: "worst", 0: "best"}  # best of one
    chosen = [(names[i], order[i]) for i in sorted(names) if order]
    negative = [r for r in rows if r["truth_ml"] == 0]
    if negative:
        chosen.append(("no tumor, most false positives", max(negative, key=lambda r: r["fpv_ml"])))
    return [(_title(name, row), row) for name, row in chosen or [("no truth", rows[0])]]


def _title(name: str, row: dict) -> str:
    """A case's name and metrics, in three lines; metrics that are not a number are left out."""
    measured = [("Dice", "dice", ".2f", ""), ("FPV", "fpv_ml", ".1f", " ml")]
    measured += [("FNV", "fnv_ml", ".1f", " ml")]
    known = [f"{m} {row[k]:{f}}{unit}" for m, k, f, unit in measured if not math.isnan(row[k])]
    return "\n".join([name, f"{row['case']}, {row['target']}", "  ".join(known)])


def _suv_text(scale: dict, suv: tuple[float, float]) -> str:
    """What the ends of a grey scale mean. suv: the SUV of the image's 0 and 1."""
    white, black = np.interp((scale["vmin"], scale["vmax"]), (0, 1), suv)
    return f"white: SUV {white:.3g}, black: {black:.3g}"


def panels(rows: list[dict], out: Path) -> None:
    """Draw validation.png, one row per case: an axial slice and a coronal projection.

    rows: dicts of "title"; "names" of the two input channels; "images" (2, D, H, W); "truth" and
    "pred", masks (D, H, W); "spacing"; "reconstructions", {name of a channel: (D, H, W)}; "suv",
    the SUV of the second channel's 0 and 1, or None if it is no PET. The slice has the most tumor
    (truth, else prediction); the projection is the second channel's maximum.
    """
    titles = [*rows[0]["names"], "truth and prediction"]
    titles += [f"{name} reconstructed" for name in rows[0]["reconstructions"]] + ["projection"]
    width, depth, height = np.array(rows[0]["truth"].shape) * rows[0]["spacing"]  # mm
    ratios = [width / depth] * (len(titles) - 1) + [width / height]
    fig = Figure((2.2 * sum(ratios) + 0.4, 2.3 * len(rows) + 0.6), layout="constrained")
    options = dict(squeeze=False, width_ratios=ratios, subplot_kw=dict(xticks=[], yticks=[]))
    grid = fig.subplots(len(rows), len(titles), **options)
    for row, axes in zip(rows, grid):
        _case(axes, row)
    for axis, title in zip(grid[0], titles):
        axis.set_title(title, fontsize=9)
    legend(fig)
    _save(fig, out)


def _case(axes, row: dict) -> None:
    """Draw one row of `panels`."""
    first, second = row["images"]
    truth, pred = row["truth"], row["pred"]
    sx, sy, sz = row["spacing"]
    area = truth.sum((0, 1)) if truth.any() else pred.sum((0, 1))
    z = int(area.argmax()) if area.any() else truth.shape[2] // 2
    scales = [_grey_scale(first, False), _grey_scale(second, row["names"][1] == "PET")]
    shown = [(first, scales[0]), (second, scales[1]), (second, scales[1])]
    for name, image in row["reconstructions"].items():
        shown.append((image, scales[row["names"].index(name)]))
    for axis, (image, scale) in zip(axes, shown):
        axis.imshow(image[:, :, z].T, aspect=sy / sx, **scale)
    axes[-1].imshow(second.max(1).T, aspect=sz / sx, **scales[1])
    for mask, color in ((truth, TRUTH), (pred, PREDICTION)):
        _outline(axes[2], mask[:, :, z], color)
        _outline(axes[-1], mask.max(1), color)
    if row["suv"]:
        axes[1].set_xlabel(_suv_text(scales[1], row["suv"]), fontsize=8)
    axes[0].set_ylabel(row["title"], fontsize=8, parse_math=False)  # names like P$^$


def tile(row: dict, image, pred, truth: Nifti1Image | None, affine, suv: tuple | None) -> dict:
    """Reduce a study's volumes (D, H, W) to a picture for `overview`.

    PET: a coronal maximum-intensity projection; brain: the axial slice with the most tumor.

    Args:
        row: of `evaluate.evaluate_case`, for the title. affine: (4, 4), of the image and of pred.
        truth: the labels on any grid that is parallel to it; None if they are unknown.
        suv: the SUV of the image's 0 and 1; None: it is a brain's.
    """
    if truth is not None:
        truth = resample_from_to(truth, (pred.shape, affine), order=0)
        truth = np.asarray(truth.dataobj) > 0
    title = row["case"]
    if not math.isnan(row["dice"]):
        title += f"\nDice {row['dice']:.2f}"
    spacing = voxel_sizes(affine)
    tumor = pred if truth is None else pred | truth
    z = int(tumor.sum((0, 1)).argmax())

    def flat(volume):  # (D, H, W) -> (D, H) or (D, W)
        if volume is None:
            return None
        return volume.max(1) if suv else volume[:, :, z]

    aspect = spacing[2 if suv else 1] / spacing[0]
    flat_masks = {"pred": flat(pred), "truth": flat(truth)}
    return flat_masks | {"title": title, "image": flat(image), "aspect": aspect, "suv": suv}


def overview(tiles: list[dict], out: Path, most: int = 40) -> None:
    """Draw the first `most` of the pictures made by `tile`, with the outlines of their masks."""
    tiles = tiles[:most]
    columns = min(8, len(tiles))
    rows = -(-len(tiles) // columns)
    tall = max(t["image"].shape[1] * t["aspect"] / t["image"].shape[0] for t in tiles)
    fig = Figure((2 * columns, (2 * tall + 0.4) * rows + 0.3), layout="constrained")
    blank = dict(frame_on=False, xticks=[], yticks=[])
    grid = fig.subplots(rows, columns, squeeze=False, subplot_kw=blank)
    for axis, t in zip(grid.ravel(), tiles):
        scale = _grey_scale(t["image"], bool(t["suv"]))
        axis.imshow(t["image"].T, aspect=t["aspect"], **scale)
        _outline(axis, t["truth"], TRUTH)
        _outline(axis, t["pred"], PREDICTION)
        axis.set_title(t["title"], fontsize=7, parse_math=False)
        if t["suv"]:
            axis.set_xlabel(_suv_text(scale, t["suv"]), fontsize=6)
    legend(fig)
    _save(fig, out)


def systems(rows: dict[str, tuple[int, int, dict]], out: Path) -> None:
    """Draw one line per system and one panel per measure: the mean and its 95 % interval.

    rows: {system: (cases, seeds, {measure: (mean, low, high) or None})}. Systems with fewer cases
    than others, or with one seed, are marked. Leaves out measures that are 0 throughout.
    """
    bars = [measured for _, _, measured in rows.values()]
    known = {m: [b[m] for b in bars if b[m]] for m in bars[0]}
    measures = [m for m in known if np.any(known[m])] or list(known)[:1]
    most = max(cases for cases, _, _ in rows.values())
    styles = [_system_style(cases, seeds, most) for cases, seeds, _ in rows.values()]
    fig = Figure((7.8, 0.25 * len(rows) + 1.5), layout="constrained")  # 858 pixels: README's width
    axes = fig.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axis, measure in zip(axes, measures):
        means = [mean for mean, _, _ in known[measure]]
        volume = measure.endswith("ml")
        wide = bool(volume and max(means) > 5 * np.median(means))  # one would hide the others
        if wide:
            axis.set_xscale("symlog", linthresh=1)
            axis.xaxis.set_major_formatter("{x:g}")
        for y, (measured, style) in enumerate(zip(bars, styles)):
            if measured[measure]:
                mean, low, high = measured[measure]
                axis.plot([low, high], [y, y], style["ls"], color=style["color"], lw=1.8)
                axis.plot(mean, y, clip_on=False, **style | dict(ls="none"))
        if "difference" in measure:
            axis.axvline(0, color="0.5", lw=0.8)
        elif volume:
            axis.set_xlim(left=0)
        axis.set_title(measure + ", log scale" * wide, fontsize=9)
        axis.tick_params(labelsize=9)
        if not wide:
            axis.locator_params(axis="x", nbins=4)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set(yticks=range(len(rows)), yticklabels=list(rows), ylim=(len(rows) - 0.5, -0.5))
    marks = {style["label"]: Line2D([], [], **style) for style in styles}
    over = "patients and seeds" if max(s for _, s, _ in rows.values()) > 1 else "patients"
    title = f"mark: mean; bar: 95 % bootstrap interval over {over}"
    options = dict(title=title, title_fontsize=9, fontsize=9, ncols=2, frameon=False)
    fig.legend(handles=list(marks.values()), loc="outside lower center", **options)
    _save(fig, out)


def _system_style(cases: int, seeds: int, most: int) -> dict:
    """How a system is drawn: as a diamond if it has fewer than `most` cases, hollow if one seed."""
    color, marker = (BLUE, "o") if cases == most else (VERMILLION, "D")
    hollow = dict(ls=":", mfc="white") if seeds == 1 else dict(ls="-")
    number = f"{seeds} seeds" if seeds > 1 else "one seed: inconclusive"
    label = f"{cases} cases, {number}"
    return dict(color=color, marker=marker, ms=5, label=label) | hollow


def rejection(curves: dict[str, list[tuple]], out: Path) -> None:
    """Draw what emptying masks with a score below P does, per system, with 95 % intervals.

    curves: {system: [(P, FPV in ml of patients without tumor, share of tumor patients lost), ...]},
    the last two as (mean, low, high).
    """
    fig = Figure((7.8, 3.4), layout="constrained")
    titles = ("FPV, patients without tumor (ml)", "patients with tumor who lose it (%)")
    for n, (axis, title) in enumerate(zip(fig.subplots(1, 2), titles)):
        for i, (system, points) in enumerate(curves.items()):
            p = [point[0] for point in points]
            mean, low, high = np.array([point[1 + n] for point in points]).T * (1, 100)[n]
            style = dict(color=CURVES[i % 6], ls=LINES[i % 4])
            axis.plot(p, mean, marker="os^D"[i % 4], ms=3, label=system, **style)
            axis.fill_between(p, low, high, color=CURVES[i % 6], alpha=0.15, lw=0)
        axis.set_xlabel("P, the lowest score that keeps its mask", fontsize=9)
        axis.set_title(title, fontsize=9)
        axis.set(xlim=(0, 1), ylim=(0, None))
        axis.grid(alpha=0.3)
    title = "band: 95 % bootstrap interval over patients and seeds"
    marks, names = axis.get_legend_handles_labels()
    options = dict(title=title, title_fontsize=9, fontsize=9, ncols=4, frameon=False)
    fig.legend(marks, names, loc="outside lower center", **options)
    _save(fig, out)


# --------------------------------------------------------------------------- pictures of web pages
@functools.cache  # takes longer than a contour
def _contour_axes():
    return Figure().subplots()


def web_outline(shares, kind: str) -> str:
    """The SVG path around the pixels (rows, columns) above one half; kind is its CSS class.

    It is coarser if it would be long, as the outlines of noise are: a page has hundreds of them.
    """
    edges = np.count_nonzero(np.diff(shares > 0.5))
    stride, path = 1 + int(math.sqrt(edges / 1000)), ""
    while not path or len(path) > 5000:
        part = np.pad(shares[::stride, ::stride], 1)
        if part.max() <= 0.5:
            return ""
        contours = _contour_axes().contour(part, levels=[0.5])
        contours.remove()
        lines = [(line - 1) * stride + 0.5 for line in contours.allsegs[0]]
        path = "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in line) for line in lines)
        stride += 1
    return f'<path class="{kind}" d="{path}"/>'


def web_picture(pixels, window, colors, marks, labels, size, right, up, alt, hide="") -> str:
    """An image (rows, columns) in HTML, with the letters of the patient's sides at its border.

    window: what is drawn in the first and the last of the colors. marks: SVG; labels: (words, x, y)
    in pixels, which is also the unit of their size. right, up: where these lead in the patient,
    (x, y, z). alt: what it shows; hide: an attribute of the figure.
    """
    height, width = pixels.shape
    left = [-way for way in right]
    sides = [(left, 2, height / 2), (right, width - 1.6 * size, height / 2), (up, width / 2, size)]
    for way, *place in sides:
        side = "".join(p[int(d < 0)] for p, d in zip(("RL", "AP", "SI"), way) if abs(d) > 0.4)
        labels = [*labels, (side, *place)]
    texts = [f'<text x="{x:.1f}" y="{y:.1f}">{words}</text>' for words, x, y in labels]
    for quality in (80, 40, 10):  # the latter for noise: a page stays below 5 MB
        file = io.BytesIO()
        options = dict(cmap=colors, format="jpeg", pil_kwargs=dict(quality=quality))
        imsave(file, pixels, vmin=window[0], vmax=window[1], **options)
        if file.tell() <= 12_000:
            break
    return f"""<figure{hide}><img alt="{alt}" width="{width}" height="{height}" decoding="sync"
src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">
<svg viewBox="0 0 {width} {height}" font-size="{size:.1f}" aria-hidden="true">
{"".join([*marks, *texts])}</svg>
<figcaption aria-hidden="true">{alt}</figcaption></figure>"""


# ------------------------------------------------------------------------------- the architecture
INK, QUIET = "#2b2f36", "#8a919c"
CT, PET, GREY = "#8fb5e6", "#f6c48f", "#d3d8de"
SHARED, JOIN = "#7a3fb0", "#e9def5"
DECODER_LABELS = {  # task: height of its output (inches), what the decoder does, its loss
    "ct": (2.61, "reconstruct CT", "L2"),
    "core": (2.61, "segment\ntumor core", "Dice + CE"),
    "pet": (0, "reconstruct PET", "L2"),
    "whole": (0, "segment\nwhole tumor", "Dice + CE"),
    "tumor": (-0.68, "tumor?", "BCE"),
    "seg": (-2.61, "segment tumor", "Dice + CE"),
    "edema": (-2.61, "segment\nedema", "Dice + CE"),
}
# Levels 1 to 9 of the CT branch, inches; the PET branch is its mirror image, at -y.
LEVEL_X = 1.5 + np.arange(9)
LEVEL_Y = np.array([2.61, 1.96, 1.45, 1.0, 0.37, 1.0, 1.45, 1.96, 2.61])
END = 10  # where the last arrows end
TEXT = dict(size=11.5, ha="center", va="center", zorder=5)
FILL = dict(fc=GREY, ec=INK)
BOLD = dict(size=12.5, weight="bold")


def architecture(model, path, size: tuple[int, int, int] = (96, 96, 96)) -> None:
    """Draw a MirrorUNet, for inputs of `size` (D, H, W), to a path or an open file."""
    _Diagram(model, size).ax.figure.savefig(path, dpi=130)


class _Diagram:
    """The drawing of a network from the parts it has; levels that are one module are joined."""

    def __init__(self, model, size):
        self.model = model
        self.size = size
        limits = dict(xlim=(0, 12), ylim=(-3.4, 3.4), xticks=[], yticks=[])
        self.ax = Figure((12, 6.8)).add_axes((0, 0, 1, 1), frame_on=False, **limits)
        self.fused = model.tasks == ("seg",)  # v4: both decoders segment together
        self.shared = [a is b for a, b in zip(model.ct.levels, model.pet.levels)]
        brain = model.preset == "brain"
        bottleneck = self.branch(model.ct, 1, "T2w" if brain else "CT", CT)
        self.branch(model.pet, -1, "FLAIR" if brain else "PET", PET)
        if "pet" in model.tasks or "whole" in model.tasks:
            self.light_decoder(bottleneck)
        if "tumor" in model.tasks:
            y = DECODER_LABELS["tumor"][0]
            self.arrow((LEVEL_X[5], y), (END, y))
            self.text(LEVEL_X[7], y, "classifier", bbox=dict(boxstyle="square,pad=0.3", **FILL))
        if self.fused:
            self.fusion()
        for task in model.tasks:
            y, label, loss = DECODER_LABELS[task]
            y = 0 if self.fused else y
            self.text(END + 0.15, y + 0.01, label, ha="left", va="bottom", **BOLD)
            self.text(END + 0.15, y - 0.03, loss, ha="left", va="top")
        self.captions(f"Mirror U-Net {model.version}" + ", brain MR" * brain)

    def text(self, x, y, text: str, **style) -> None:
        self.ax.text(x, y, text, **TEXT | style)

    def box(self, x, y, w, h, color: str, ec: str = INK, zorder: int = 4) -> None:
        self.ax.add_patch(Rectangle((x, y), w, h, fc=color, ec=ec, zorder=zorder))

    def arrow(self, *points, color: str = INK, lw: float = 1.5) -> None:
        style = dict(mutation_scale=11, capstyle="butt", ec=color, fc=color, lw=lw, zorder=3)
        self.ax.add_patch(FancyArrowPatch(path=Outline(points), arrowstyle="-|>", **style))

    def level(self, x, y, level, size, color: str, text: str = "", up: int = 1) -> tuple:
        """Draw the output for an input of `size`: (half its width, half its height, its size)."""
        conv = level.units[0].conv if hasattr(level, "units") else level.up.conv
        size = tuple(n * s if conv.transposed else n // s for n, s in zip(size, conv.stride))
        w = max(0.12, 0.31 * (conv.out_channels / max(self.model.channels)) ** 0.5)
        h = 0.49 * (np.prod(size) / np.prod(self.size)) ** (1 / 6)
        self.box(x - w, y - h, 2 * w, 2 * h, color)
        self.text(x, y - 0.01, text, weight="bold", color="white" if color == SHARED else INK)
        cube = len(set(size)) == 1
        shape = f"{size[0]}³" if cube else f"1/{self.size[0] // size[0]}"
        self.text(x, y + up * (h + 0.12), f"{conv.out_channels} @ {shape}")
        return w, h, size

    def branch(self, branch, up: int, name: str, color: str) -> tuple:
        """Draw a U-Net above (up = 1) or below (up = -1); return the size of its bottleneck."""
        x0, y0 = 0.57, up * LEVEL_Y[0]
        self.box(0.12, y0 - 0.45, 0.9, 0.9, color)
        self.text(x0, y0, name, size=15, weight="bold")
        sizes = [self.size]
        for n, (x, y, level) in enumerate(zip(LEVEL_X, up * LEVEL_Y, branch.levels)):
            fill = SHARED if self.shared[n] else color
            w, h, size = self.level(x, y, level, sizes[-1], fill, str(n + 1), up)
            sizes.append(size)
            if n < 5:  # encoder: down, then right
                self.arrow((x0, y0), (x0, y), (x - w, y))
            else:  # decoder: right, then up; and the skip connection
                self.arrow((x0, y0), (x, y0), (x, y - up * h))
                self.arrow((LEVEL_X[8 - n], y), (x - w, y), color=QUIET, lw=0.9)
            if self.shared[n]:  # half of the band that joins both boxes
                self.box(x - w, 0, 2 * w, y, JOIN, ec="none", zorder=1)
            x0, y0 = x, y
        corner = [(END, 0.14 * up)] if self.fused else []
        self.arrow((x0, y0), (END, y0), *corner)
        return sizes[5]

    def light_decoder(self, size: tuple) -> None:
        """Draw the decoder of the concatenated bottlenecks, from their `size`."""
        before = LEVEL_X[4] + 0.55
        for up in (1, -1):
            self.arrow((before, up * LEVEL_Y[4]), (before, up * 0.13))
        self.text(before, 0, "cat", bbox=dict(boxstyle="round,pad=0.15", **FILL))
        places = np.linspace(LEVEL_X[5] + 0.53, LEVEL_X[8], 4)
        for x, level in zip(places, self.model.bottleneck_decoder):
            w, _, size = self.level(x, 0, level, size, GREY)
            self.arrow((before, 0), (x - w, 0))
            before = x
        self.arrow((before, 0), (END, 0))
        self.text(LEVEL_X[6], -0.4, "light decoder")

    def fusion(self) -> None:
        """Draw the weighted sum of both decoders' logits."""
        weight = self.model.ct_weight
        w = f"w = {weight.clamp(0, 1):.2g}" + ", learned" * weight.requires_grad
        self.text(END, 0, "+", bbox=dict(boxstyle="circle,pad=0.1", **FILL))
        self.text(END + 0.15, 1.3, f"w · CT logits\n{w}", ha="left")
        self.text(END + 0.15, -1.3, "(1 − w) · PET logits", ha="left")

    def captions(self, title: str) -> None:
        million = sum(p.numel() for p in self.model.parameters()) / 1e6
        size = "×".join(map(str, self.size))
        key = "taller: larger feature maps; wider: more channels; grey arrow: skip connection"
        self.text(LEVEL_X[4], 3.12, title, size=17, weight="bold")
        self.text(LEVEL_X[4], 2.81, f"{million:.1f} M parameters, input {size}")
        self.text(LEVEL_X[4], -3.1, key, color="#5a616c")
        shared = "shared weights,\nnot features"
        note = shared if any(self.shared) else "nothing shared:\ntwo separate U-Nets"
        first = self.shared.index(True) if any(self.shared[:5]) else 4
        self.text(LEVEL_X[first] - 0.42, 0, note, ha="right", color=SHARED, **BOLD)
