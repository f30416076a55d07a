"""The pictures of a run: learning curves and validation panels. Arrays are on the network's grid, axes (left, anterior, superior)."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

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
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
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
    fig.savefig(out, dpi=110)
    plt.close(fig)


def _outline(axis, mask: np.ndarray, color: str) -> None:
    if mask.any():
        axis.contour(mask.T, levels=[0.5], colors=color, linewidths=1.2)


def panels(rows: list[dict], out: Path) -> None:
    """validation.png, a row a case.

    rows: dicts of "title"; "names", the two input channels; "images" (2, D, H, W); "truth" and "pred", masks (D, H, W); "spacing";
    and "reconstructions", {name: (D, H, W)}. Shown: the axial slice with the most tumour (truth, else prediction), and a coronal
    maximum-intensity projection of the second channel.
    """
    extra = list(rows[0]["reconstructions"])
    titles = [*rows[0]["names"], "truth and prediction", *[f"{n} reconstructed" for n in extra], "projection"]
    fig, grid = plt.subplots(len(rows), len(titles), figsize=(2.7 * len(titles), 2.8 * len(rows)), squeeze=False, constrained_layout=True)
    for row, axes in zip(rows, grid):
        (first, second), truth, pred, s = row["images"], row["truth"], row["pred"], row["spacing"]
        area = truth.sum((0, 1)) if truth.any() else pred.sum((0, 1))
        z = int(area.argmax()) if area.any() else truth.shape[2] // 2
        top = max(float(np.percentile(second, 99.8)), 1e-3)
        limits = dict(vmin=float(np.percentile(first, 1)), vmax=float(np.percentile(first, 99.5)), cmap="gray")
        hot = dict(vmin=min(0.0, float(second.min())), vmax=top, cmap="gray_r")
        pictures = [(first, limits), (second, hot), (second, hot)]
        pictures += [(image, limits if name == row["names"][0] else hot) for name, image in row["reconstructions"].items()]
        for axis, (image, style) in zip(axes, pictures):
            axis.imshow(image[:, :, z].T, origin="lower", aspect=s[1] / s[0], **style)
        _outline(axes[2], truth[:, :, z], TRUTH)
        _outline(axes[2], pred[:, :, z], PREDICTION)
        axes[-1].imshow(second.max(1).T, origin="lower", aspect=s[2] / s[0], **hot)
        _outline(axes[-1], truth.max(1), TRUTH)
        _outline(axes[-1], pred.max(1), PREDICTION)
        axes[0].set_ylabel(row["title"], fontsize=8)
    for axis, title in zip(grid[0], titles):
        axis.set_title(title, fontsize=9)
    for axis in grid.ravel():
        axis.set(xticks=[], yticks=[])
    fig.legend(handles=[plt.Line2D([], [], color=TRUTH, label="truth"), plt.Line2D([], [], color=PREDICTION, label="prediction")],
               loc="outside lower center", ncols=2, fontsize=8)  # fmt: skip
    fig.savefig(out, dpi=110)
    plt.close(fig)
