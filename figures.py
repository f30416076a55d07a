"""The pictures: a run's learning curves and validation panels, and the network drawn from the live model.

Arrays are on the network's grid, axes (left, anterior, superior).
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # not pyplot: whoever imports this file keeps the backend they have
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.path import Path as Outline

from files import atomic_write

TRUTH, PREDICTION = "#2ca02c", "#ff2d95"


def _smooth(values: np.ndarray, share: float = 0.02) -> np.ndarray:
    """Running mean over a share of the run."""
    width = max(1, int(len(values) * share))
    sums = np.cumsum(np.insert(values, 0, 0.0))
    low = np.maximum(np.arange(1, len(values) + 1) - width, 0)
    return (sums[1:] - sums[low]) / (np.arange(1, len(values) + 1) - low)


def curves(metrics: Path, out: Path) -> None:
    """metrics.jsonl -> curves.png: the total loss, each of its parts, and the validations."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    train, val = [r for r in rows if "loss" in r], [r for r in rows if "val" in r]
    if not train:
        return
    steps = np.array([r["step"] for r in train])
    parts = [k for k in train[0] if k.endswith(("_dice", "_ce", "_l2", "_bce"))]
    fig = Figure(figsize=(13, 3.6), layout="constrained")
    axes = fig.subplots(1, 3)
    loss = np.array([r["loss"] for r in train])
    axes[0].plot(steps, loss, lw=0.4, alpha=0.35, color="C0")
    axes[0].plot(steps, _smooth(loss), color="C0")
    axes[0].set(title="training loss", xlabel="step", ylim=(0, np.percentile(loss, 99) * 1.1))
    for i, part in enumerate(parts):
        axes[1].plot(steps, _smooth(np.array([r[part] for r in train])), label=part, color=f"C{i}")
    axes[1].set(title="its parts, unweighted (running mean)", xlabel="step", yscale="log")
    axes[1].legend(fontsize=8)
    for name in sorted({k for r in val for k in r["val"] if k.endswith("dice")}):
        axes[2].plot([r["step"] for r in val], [r["val"].get(name) for r in val], "o-", label=name)
    axes[2].set(title="validation Dice, held-out patients", xlabel="step", ylim=(0, 1))
    axes[2].grid(alpha=0.3)
    if val:
        axes[2].legend(fontsize=8)
    with atomic_write(out) as part:
        fig.savefig(part, dpi=110)


def _outline(axis, mask: np.ndarray, color: str) -> None:
    if mask.any():
        axis.contour(mask.T, levels=[0.5], colors=color, linewidths=1.2)


def panels(rows: list[dict], out: Path) -> None:
    """validation.png, a row a case.

    rows: dicts of "title"; "names", the two input channels; "images" (2, D, H, W); "truth" and "pred", masks (D, H, W); "spacing";
    and "reconstructions", {name: (D, H, W)}. Shown: the axial slice with the most tumor (truth, else prediction), and a coronal
    maximum-intensity projection of the second channel.
    """
    extra = list(rows[0]["reconstructions"])
    titles = [*rows[0]["names"], "truth and prediction", *[f"{n} reconstructed" for n in extra], "projection"]
    size = np.array(rows[0]["truth"].shape) * rows[0]["spacing"]  # mm
    ratios = [size[0] / size[1]] * (len(titles) - 1) + [size[0] / size[2]]
    figsize = (2.2 * sum(ratios) + 0.4, 2.3 * len(rows) + 0.6)
    fig = Figure(figsize=figsize, layout="constrained")
    grid = fig.subplots(len(rows), len(titles), squeeze=False, width_ratios=ratios)
    for row, axes in zip(rows, grid):
        (first, second), truth, pred, s = row["images"], row["truth"], row["pred"], row["spacing"]
        area = truth.sum((0, 1)) if truth.any() else pred.sum((0, 1))
        z = int(area.argmax()) if area.any() else truth.shape[2] // 2
        styles = [dict(vmin=np.percentile(i, 1), vmax=max(np.percentile(i, 99.7), 1e-3), cmap="gray") for i in (first, second)]
        if row["names"][1] == "PET":
            styles[1] |= dict(vmin=0.0, cmap="gray_r")  # as PET is read: uptake is dark
        pictures = [(first, styles[0]), (second, styles[1]), (second, styles[1])]
        pictures += [(image, styles[row["names"].index(name)]) for name, image in row["reconstructions"].items()]
        for axis, (image, style) in zip(axes, pictures):
            axis.imshow(image[:, :, z].T, origin="lower", aspect=s[1] / s[0], **style)
        _outline(axes[2], truth[:, :, z], TRUTH)
        _outline(axes[2], pred[:, :, z], PREDICTION)
        axes[-1].imshow(second.max(1).T, origin="lower", aspect=s[2] / s[0], **styles[1])
        _outline(axes[-1], truth.max(1), TRUTH)
        _outline(axes[-1], pred.max(1), PREDICTION)
        axes[0].set_ylabel(row["title"], fontsize=8)
    for axis, title in zip(grid[0], titles):
        axis.set_title(title, fontsize=9)
    for axis in grid.ravel():
        axis.set(xticks=[], yticks=[])
    _legend(fig)
    with atomic_write(out) as part:
        fig.savefig(part, dpi=110)


def tile(title: str, image: np.ndarray, pred: np.ndarray, truth: np.ndarray | None, spacing, brain: bool) -> dict:
    """A study in one picture, for `overview`: PET's coronal maximum-intensity projection; brain: the axial slice with the most tumor.

    image, pred, truth: (D, H, W), truth None where it is unknown; spacing in mm. What is returned is two-dimensional, and light.
    """
    flat = (lambda a: a.max(1)) if not brain else lambda a: a[:, :, int((pred if truth is None else pred | truth).sum((0, 1)).argmax())]
    aspect = (spacing[1] if brain else spacing[2]) / spacing[0]
    return {"title": title, "image": flat(image), "pred": flat(pred), "truth": None if truth is None else flat(truth), "aspect": aspect,
            "cmap": "gray" if brain else "gray_r"}  # fmt: skip


def overview(tiles: list[dict], out: Path, most: int = 40) -> None:
    """One picture of a folder of predictions: the first `most` tiles, with the prediction's outline and, where it is known, the truth's."""
    tiles = tiles[:most]
    columns = min(8, len(tiles))
    rows = -(-len(tiles) // columns)
    tall = max(t["image"].shape[1] * t["aspect"] / t["image"].shape[0] for t in tiles)
    fig = Figure(figsize=(2 * columns, (2 * tall + 0.4) * rows + 0.3), layout="constrained")
    grid = fig.subplots(rows, columns, squeeze=False)
    for axis in grid.ravel():
        axis.axis("off")
    for axis, t in zip(grid.ravel(), tiles):
        high = max(np.percentile(t["image"], 99.7), 1e-3)
        low = 0.0 if t["cmap"] == "gray_r" else np.percentile(t["image"], 1)
        axis.imshow(t["image"].T, origin="lower", aspect=t["aspect"], vmin=low, vmax=high, cmap=t["cmap"])
        if t["truth"] is not None:
            _outline(axis, t["truth"], TRUTH)
        _outline(axis, t["pred"], PREDICTION)
        axis.set_title(t["title"], fontsize=7)
    _legend(fig)
    with atomic_write(out) as part:
        fig.savefig(part, dpi=110)


def systems(rows: dict[str, dict[str, tuple[float, float, float] | None]], out: Path) -> None:
    """A row a system, a panel a measure: {system: {measure: (mean, low, high)}}, None where it is unknown. A difference has a line at 0."""
    measures = list(next(iter(rows.values())))
    fig = Figure(figsize=(3.2 * len(measures) + 1.2, 0.3 * len(rows) + 1.1), layout="constrained")
    axes = fig.subplots(1, len(measures), sharey=True, squeeze=False)
    for axis, measure in zip(axes[0], measures):
        for y, values in enumerate(rows.values()):
            if values[measure]:
                mean, low, high = values[measure]
                axis.plot([low, high], [y, y], color="C0", lw=2, solid_capstyle="butt")
                axis.plot(mean, y, "o", color="C0", ms=5, clip_on=False)
        if "difference" in measure:
            axis.axvline(0, color="0.5", lw=0.8)
        elif measure.endswith("ml"):
            axis.set_xlim(left=0, right=None if any(v[measure] and v[measure][2] for v in rows.values()) else 1)
        axis.set_title(measure, fontsize=10)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].set(yticks=range(len(rows)), yticklabels=list(rows), ylim=(len(rows) - 0.5, -0.5))
    with atomic_write(out) as part:
        fig.savefig(part, dpi=110)


def _legend(fig) -> None:
    marks = [Line2D([], [], color=TRUTH, label="truth"), Line2D([], [], color=PREDICTION, label="prediction")]
    fig.legend(handles=marks, loc="outside lower center", ncols=2, fontsize=8)


# --------------------------------------------------------------------------------------------------- the architecture
INK, QUIET, CT, PET, DEEP, SHARED, JOIN = "#2b2f36", "#8a919c", "#a9c4e4", "#f6c48f", "#d3d8de", "#7a3fb0", "#e9def5"
TASKS = {  # of the first branch's decoder, of the second's, of the light decoder
    "petct": ("reconstruct CT", "segment tumor", "reconstruct PET"),
    "brain": ("segment\ntumor core", "segment\nedema", "segment\nwhole tumor"),
}
LOSSES = {"reconstruct": "L2", "segment": "Dice + CE", "tumor?": "BCE"}


def _arrow(ax, *points: tuple[float, float], color: str = INK, lw: float = 1.5) -> None:
    style = dict(arrowstyle="-|>", mutation_scale=11, lw=lw, ec=color, fc=color, capstyle="butt", zorder=3)
    ax.add_patch(FancyArrowPatch(path=Outline(points), **style))


def _level(ax, x: float, y: float, level, size: tuple, full: tuple, color: str, text: str = "", up: int = 1) -> tuple[float, float, tuple]:
    """Draw what a level makes of an input of `size`, as a box; `full`: most channels, the net's input. -> half of each side, new size."""
    conv = level.units[0].conv if hasattr(level, "units") else level.up.conv
    size = tuple(s * k if conv.transposed else s // k for s, k in zip(size, conv.stride))
    w, h = max(0.12, 0.31 * (conv.out_channels / full[0]) ** 0.5), 0.49 * (np.prod(size) / np.prod(full[1])) ** (1 / 6)
    ax.add_patch(Rectangle((x - w, y - h), 2 * w, 2 * h, fc=color, ec=INK, zorder=4))
    ax.text(x, y - 0.01, text, ha="center", va="center", size=11.5, weight="bold", color="white" if color == SHARED else INK, zorder=5)
    room = f"{size[0]}³" if len(set(size)) == 1 else f"1/{full[1][0] // size[0]}"  # no cube: the share of the input's sides
    ax.text(x, y + up * (h + 0.12), f"{conv.out_channels} @ {room}", ha="center", va="center", size=11.5, zorder=5)
    return w, h, size


def architecture(model, path, size: tuple[int, int, int] = (96, 96, 96)) -> None:
    """Draw a MirrorUNet, for inputs of `size` (D, H, W), to an image file. Levels that are one module in both branches are joined."""
    brain, version, full, tasks = model.preset == "brain", model.version, (max(model.channels), size), TASKS[model.preset]
    ax = Figure(figsize=(12, 6.8)).add_axes((0, 0, 1, 1), xlim=(0, 12), ylim=(-3.4, 3.4), frame_on=False, xticks=[], yticks=[])
    small, bold, grey = dict(size=11.5, ha="center", va="center", zorder=5), dict(size=12.5, weight="bold"), dict(fc=DEEP, ec=INK)
    xs, ys, end, right = 1.5 + np.arange(9), np.array([2.61, 1.96, 1.45, 1.0, 0.37, 1.0, 1.45, 1.96, 2.61]), 10, 10.15  # in inches
    same = [a is b for a, b in zip(model.ct.levels, model.pet.levels)]
    for up, branch, color, name in ((1, model.ct, CT, "T2w" if brain else "CT"), (-1, model.pet, PET, "FLAIR" if brain else "PET")):
        at, sizes = (0.57, up * ys[0]), [size]
        ax.add_patch(Rectangle((0.12, at[1] - 0.45), 0.9, 0.9, fc=color, ec=INK, zorder=4))
        ax.text(*at, name, **small | dict(size=15, weight="bold"))
        for n, (x, y, level) in enumerate(zip(xs, up * ys, branch.levels)):
            w, h, now = _level(ax, x, y, level, sizes[-1], full, SHARED if same[n] else color, str(n + 1), up)
            _arrow(ax, at, *([(at[0], y), (x - w, y)] if n < 5 else [(x, at[1]), (x, y - up * h)]))
            if n > 4:
                _arrow(ax, (xs[8 - n], y), (x - w, y), color=QUIET, lw=0.9)
            ax.add_patch(Rectangle((x - w, 0), 2 * w, y, fc=JOIN if same[n] else "none", zorder=1))
            at, sizes = (x, y), [*sizes, now]
        _arrow(ax, at, (end, y), *[(end, 0.14 * up)] * (version == "v4"))
    note = "shared weights,\nnot features" if any(same) else "nothing shared:\ntwo separate U-Nets"
    ax.text(xs[same.index(True) if any(same[:5]) else 4] - 0.42, 0, note, ha="right", va="center", color=SHARED, **bold)
    ends = [(0, "segment tumor")] if version == "v4" else [(ys[8], tasks[0]), (-ys[8], tasks[1])]
    if version in ("v2", "v3"):
        ends.append((0, tasks[2]))
        deep, now = [xs[4] + 0.55, *np.linspace(xs[5] + 0.53, xs[8], 4)], sizes[5]
        _arrow(ax, (deep[0], ys[4]), (deep[0], 0.13))
        _arrow(ax, (deep[0], -ys[4]), (deep[0], -0.13))
        ax.text(deep[0], 0, "cat", bbox=dict(boxstyle="round,pad=0.15", **grey), **small)
        for before, x, level in zip(deep, deep[1:], model.bottleneck_decoder):
            w, _, now = _level(ax, x, 0, level, now, full, DEEP)
            _arrow(ax, (before, 0), (x - w, 0))
        _arrow(ax, (x, 0), (end, 0))
        ax.text(xs[6], -0.4, "light decoder", **small)
    if version == "v3":
        ends.append((-0.68, "tumor?"))
        _arrow(ax, (xs[5], -0.68), (end, -0.68))
        ax.text(xs[7], -0.68, "classifier", bbox=dict(boxstyle="square,pad=0.3", **grey), **small)
    if version == "v4":
        ax.text(end, 0, "+", bbox=dict(boxstyle="circle,pad=0.1", **grey), **small)
        w = f"w = {model.ct_weight.clamp(0, 1):.2g}" + ", learned" * model.ct_weight.requires_grad
        ax.text(right, 1.3, f"w · CT logits\n{w}", va="center", size=11.5)
        ax.text(right, -1.3, "(1 − w) · PET logits", va="center", size=11.5)
    for y, what in ends:
        ax.text(right, y + 0.01, what, va="bottom", **bold)
        ax.text(right, y - 0.03, LOSSES[what.split()[0]], va="top", size=11.5)
    ax.text(xs[4], 3.12, f"Mirror U-Net {version}" + ", brain MR" * brain, **small | dict(size=17, weight="bold"))
    ax.text(xs[4], 2.81, f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, input {'×'.join(map(str, size))}", **small)
    ax.text(xs[4], -3.1, "tall box: large; wide box: many channels; grey arrow: skip connection", color="#5a616c", **small)
    ax.figure.savefig(path, dpi=130)
