"""Size and arithmetic of every compared system: parameters, GFLOPs of training and prediction.

    python benchmarks/systems.py [--csv results/systems.csv]

Measured at the paper's widths (16 to 256) on one patch of 96^3 with both modalities, 2 x 2 x 3 mm
(brain: 1 mm). A multiply-add counts as two operations; PyTorch's own counter adds up those of
convolutions and linear layers on the meta device, which computes nothing, so the table is the same
on every machine. Training is one forward pass in training mode (backward takes about twice as much
again). Prediction is what `predict.foreground_probability` runs: in v1-v3 only the PET branch.
"""

import argparse
import csv
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import claims
import kernels
from baselines import NAMES, build
from mirror_unet import TASKS, MirrorUNet
from predict import foreground_probability

JOINTS = [  # options of the baseline "joint"
    {"tasks": tasks, "skips": skips}
    for skips in ("pet", "both")
    for tasks in ("none", "v1", "v2", "v3")
]
FIELDS = ("data", "system", "reads", "parameters", "training GFLOPs", "prediction GFLOPs")


def systems() -> list[tuple[str, str, dict]]:
    """(data, --model, its options) of every row."""
    found = []
    for data in ("petct", "brain"):
        for name in (*TASKS[data], *NAMES[data]):
            found += [(data, name, options) for options in (JOINTS if name == "joint" else [{}])]
    return found


def measure(
    data: str, name: str, options: dict, channels=(16, 32, 64, 128, 256), patch=(96, 96, 96)
) -> dict:
    """A row of the table: the size of a system, and the arithmetic of one patch."""
    with torch.device("meta"):
        if name in TASKS[data]:
            net = MirrorUNet(name, channels=channels, preset=data)
        else:
            spacing = (1.0, 1.0, 1.0) if data == "brain" else (2.0, 2.0, 3.0)
            net = build(name, data, channels, patch=patch, spacing=spacing, **options)
        x = torch.empty(1, 2, *patch)
    with torch.no_grad():
        with FlopCounterMode(display=False) as training:
            net.train()(x)
        with FlopCounterMode(display=False) as prediction:
            foreground_probability(net.eval(), x)
    flops = [round(c.get_total_flops() / 1e9, 2) for c in (training, prediction)]
    title = name + "".join(f" --{key} {value}" for key, value in options.items())
    parameters = sum(p.numel() for p in net.parameters())
    images = {"ct": "T2w", "pet": "FLAIR"} if data == "brain" else {"ct": "CT", "pet": "PET"}
    reads = "+".join(images[branch] for branch in net.reads)
    return dict(zip(FIELDS, (data, title, reads, parameters, *flops), strict=True))


def table() -> list[dict]:
    """Every row, in the order of `systems`."""
    kernels.use("plain")  # Triton's kernels need tensors with data
    try:
        return [measure(*system) for system in systems()]
    finally:
        kernels.use()


def markdown(rows: list[dict]) -> str:
    """The table of results/README.md."""
    cells = [[f"{v:,}" if isinstance(v, int) else v for v in row.values()] for row in rows]
    return claims.table(list(FIELDS), cells)


def main(argv=None) -> None:
    """Measure every system, write the CSV and print the Markdown table."""
    default = Path(__file__).resolve().parent.parent / "results" / "systems.csv"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=default)
    out = parser.parse_args(argv).csv
    rows = table()
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as f:
        writer = csv.DictWriter(f, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()
