"""Size and arithmetic of every system of the comparison: parameters, and GFLOPs of a forward pass and of a prediction.

    python benchmarks/systems.py [--csv results/systems.csv]

At the paper's widths (16 to 256) and one patch of 96^3 with both modalities, 2 x 2 x 3 mm (brain: 1 mm). A multiply-add is two
operations; those of convolutions and linear layers are counted by PyTorch's own counter on the meta device, which computes nothing,
so the table is the same on every machine. Training is a forward pass in training mode (backward takes about twice as much again);
prediction is what `predict.foreground_probability` runs: in v1-v3, for example, the PET branch alone.
"""

import argparse
import csv
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import claims  # noqa: E402
import kernels  # noqa: E402
from baselines import NAMES, build  # noqa: E402
from mirror_unet import VERSIONS, MirrorUNet  # noqa: E402
from predict import foreground_probability  # noqa: E402

JOINTS = [{"tasks": tasks, "skips": skips} for skips in ("pet", "both") for tasks in ("none", "v1", "v2", "v3")]
FIELDS = ("data", "system", "reads", "parameters", "training GFLOPs", "prediction GFLOPs")


def systems() -> list[tuple[str, str, dict]]:
    """(data, --model, its options) of every row."""
    names = [(data, name) for data in ("petct", "brain") for name in (*VERSIONS[data], *NAMES[data])]
    return [(data, name, options) for data, name in names for options in (JOINTS if name == "joint" else [{}])]


def measure(data: str, name: str, options: dict, channels=(16, 32, 64, 128, 256), patch=(96, 96, 96)) -> dict:
    """A row of the table: a system's size, and the arithmetic of one patch."""
    with torch.device("meta"):
        if name in VERSIONS[data]:
            net = MirrorUNet(name, channels=channels, preset=data)
        else:
            spacing = (1.0, 1.0, 1.0) if data == "brain" else (2.0, 2.0, 3.0)
            net = build(name, data, channels, patch=patch, spacing=spacing, **options)
        x = torch.empty(1, 2, *patch)
    flops = []
    with torch.no_grad():
        for run in (net.train(), lambda x: foreground_probability(net.eval(), x)):
            with FlopCounterMode(display=False) as counter:
                run(x)
            flops.append(round(counter.get_total_flops() / 1e9, 2))
    title = name + "".join(f" --{key} {value}" for key, value in options.items())
    parameters = sum(p.numel() for p in net.parameters())
    images = {"ct": "T2w", "pet": "FLAIR"} if data == "brain" else {"ct": "CT", "pet": "PET"}
    reads = "+".join(images[branch] for branch in net.reads)
    return dict(zip(FIELDS, (data, title, reads, parameters, *flops), strict=True))


def table() -> list[dict]:
    """Every row, in the order of `systems`."""
    kernels.use("plain")  # Triton's kernels want real tensors
    try:
        return [measure(*system) for system in systems()]
    finally:
        kernels.use()


def markdown(rows: list[dict]) -> str:
    """The table of results/README.md."""
    return claims.table(list(FIELDS), [[f"{v:,}" if isinstance(v, int) else v for v in row.values()] for row in rows])


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=Path(__file__).resolve().parent.parent / "results" / "systems.csv")
    out, rows = parser.parse_args(argv).csv, table()
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as f:
        writer = csv.DictWriter(f, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()
