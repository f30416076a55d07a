"""What a laptop waits for: training steps on a CPU at batch 1 and 2, and patches per second.

    python benchmarks/cpu.py [--side 96] [--threads 2] [--repeats 5]

Steps, per sample, forward, loss and backward pass of a v3 at the paper's widths: ours; in the
release's configuration (batch norm, the loss in eager PyTorch, the convolutions that PyTorch
chooses); and the convolutions of ours alone, each by itself. Times are CPU times of
this process, the least of several in turns: other programs disturb them least.

Patches: from a preprocessed study in the page cache, by one core: plain (flips), with the paper's
rotations and scalings (one of five each), and all rotated and scaled.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kernels
import losses
from data import CachedCase
from mirror_unet import MirrorUNet
from patches import Augmentation, PatchDataset


def seconds(run: Callable[[], object]) -> float:
    """CPU time of a call, of all threads."""
    start = time.process_time()
    run()
    return time.process_time() - start


# ------------------------------------------------------------------------------------------- steps
def batch_of(size: int, side: int) -> dict[str, torch.Tensor]:
    """Random images and targets."""
    x = torch.rand(size, 2, side, side, side)
    seg = (x[:, 1:] > 0.9).byte()
    return {"image": x, "ct": x[:, :1], "pet": x[:, 1:], "seg": seg, "tumor": torch.ones(size)}


def step(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """Forward, loss and backward pass."""
    model.zero_grad()
    losses.MirrorLoss("v3")(model(batch["image"]), batch)[0].backward()


def release_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """The same with the eager loss."""
    ours, kernels.dice_ce = kernels.dice_ce, kernels.dice_ce_ref
    try:
        step(model, batch)
    finally:
        kernels.dice_ce = ours


def convolutions(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[Callable[[], None]]:
    """Forward and backward pass of every convolution of a forward pass, as calls."""
    found = []

    def note(module, inputs, output):
        x, first = inputs[0], inputs[0].shape[1] > 1  # the images need no gradient
        like = torch.rand(x.shape).to_mkldnn() if x.is_mkldnn else torch.rand(x.shape)
        x = like.requires_grad_(first)
        grad = torch.rand(output.shape)
        found.append(lambda: module(x).to_dense().backward(grad))

    layers = [m for m in model.modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    with torch.no_grad():
        model(batch["image"])
    for hook in hooks:
        hook.remove()
    return found


def steps(side: int, repeats: int) -> None:
    """Print the table of steps."""
    model, release = MirrorUNet("v3"), MirrorUNet("v3", norm="batch")
    best: dict[tuple[str, int], float] = {}
    for _ in range(repeats):
        for size in (1, 2):
            batch = batch_of(size, side)
            every = convolutions(model, batch)
            runs = {
                "ours": lambda batch=batch: step(model, batch),
                "release": lambda batch=batch: release_step(release, batch),
                "convolutions": lambda every=every: [run() for run in every],
            }
            for name, run in runs.items():
                best[name, size] = min(best.get((name, size), 1e9), seconds(run) / size)
    for size in (1, 2):
        ours, release_time, alone = (best[n, size] for n in ("ours", "release", "convolutions"))
        print(
            f"batch {size}: ours {ours:.2f} s per sample, the release's configuration "
            f"{release_time:.2f} ({release_time / ours:.2f} times ours), "
            f"convolutions alone {alone:.2f} ({alone / ours:.0%} of ours)",
            flush=True,
        )


# ----------------------------------------------------------------------------------------- patches
def study(folder: Path) -> CachedCase:
    """A cache entry of a whole body's size: random values, one voxel of a hundred tumor."""
    rng = np.random.default_rng(0)
    image = rng.random((2, 180, 170, 260), np.float32).astype(np.float16)
    label = (rng.random(image.shape[1:], np.float32) < 0.01).astype(np.uint8)
    foreground = np.argwhere(label).astype(np.int16)
    for name, array in (("image", image), ("label", label), ("foreground", foreground)):
        np.save(folder / f"{name}.npy", array)
    return CachedCase("study", "study", folder, True, np.diag((2.04, 2.04, 3, 1)), None)


def patches_per_second(side: int, repeats: int) -> None:
    """Print the rates of the data set."""
    kinds = {
        "plain": Augmentation(),
        "the paper's": Augmentation(rotate=0.2, scale=0.2),
        "all rotated and scaled": Augmentation(rotate=1, scale=1),
    }
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        case = study(Path(folder))
        for name, aug in kinds.items():
            data = PatchDataset([case], (side,) * 3, 10**6, 0, aug)
            times = [
                seconds(lambda n=n, data=data: [data[i] for i in range(n, n + 12)])
                for n in range(0, 12 * repeats, 12)
            ]
            print(f"{name}: {12 / min(times):.0f} patches of {side}^3 per second", flush=True)


def main() -> None:
    """Measure and print both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"PyTorch {torch.__version__}, {args.threads} threads, patches of {args.side}^3")
    steps(args.side, args.repeats)
    patches_per_second(args.side, args.repeats)


if __name__ == "__main__":
    main()
