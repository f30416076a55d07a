"""What a prediction costs: time and peak memory of predict.py, and of the PET branch alone.

    python benchmarks/prediction.py            both parts; minutes on two cores
    python benchmarks/prediction.py --small    a study of 100 x 100 x 71, to see that it works

Part one writes a synthetic study of AutoPET's size, 400 x 400 x 284 (2.04 x 2.04 x 3 mm), and
untrained networks of the laptop's width. It runs predict.py on them in a separate process; peak
memory is the most that the process ever had resident. Part two predicts two windows of 96^3, and a
whole body, by the PET branch (all that a segmentation by v1-v3 needs) and by both branches with all
their outputs, in turns. Linux only.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import phantom
from config import parse_config
from train import build_model

ROOT = Path(__file__).resolve().parent.parent
CASES = {  # the options of a run of train.py
    "laptop preset: 4 mm, windows of 64^3": "--data petct --root x --model v3",
    "the paper's grid: 2 x 2 x 3 mm, windows of 96^3": (
        "--preset autopet --root x --model v3 --channels 8 16 32 64 128 --batch 2"
    ),
}


def write_study(folder: Path, shape) -> Path:
    """A phantom in a field of view of `shape` voxels; returns the PET file.

    A little activity everywhere, below SUV 0.02, prevents cropping.
    """
    spacing = tuple(815.0 / shape[0] for _ in range(2)) + (852.0 / shape[2],)
    study = phantom.petct_study(0, spacing=spacing)
    suv = np.random.default_rng(0).uniform(0.001, 0.02, shape).astype(np.float32)
    sizes = np.minimum(shape, study.suv.shape)
    center = tuple(slice((n - m) // 2, (n - m) // 2 + m) for n, m in zip(shape, sizes))
    suv[center] += study.suv[tuple(slice(0, m) for m in sizes)]
    nib.save(nib.Nifti1Image(suv, study.affine), folder / "SUV.nii.gz")
    return folder / "SUV.nii.gz"


def predict(pet: Path, options: str, folder: Path, *more: str) -> tuple[float, float, float]:
    """(seconds, CPU seconds, peak GB) of predict.py with an untrained network, no mirrored images.

    options: those of the run of train.py; more: of predict.py. Its probabilities are near 0.5, and
    a threshold far from that spares the table of lesions a mask of noise.
    """
    c = parse_config(options.split())
    network = {"config": dataclasses.asdict(c), "model": build_model(c).state_dict()}
    torch.save(network, folder / "w.pt")
    command = [sys.executable, ROOT / "predict.py", "--checkpoint", folder / "w.pt"]
    command += ["--pet", pet, "--out", folder / "m.nii.gz", "--no-flips"]
    command += ["--threshold", "0.9", *more]
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("predict.py failed")
    seconds = time.perf_counter() - start
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


BRANCHES = """
import time, torch
from pathlib import Path
from mirror_unet import MirrorUNet
from predict import sliding_window

def resident(name):  # GB
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) / 2**20

def both(x):
    out = net(x)
    return torch.cat([out.seg.softmax(1)[:, 1:], out.ct, out.pet], dim=1)

def pet(x):
    return net.segment(x).seg.softmax(1)[:, 1:]

torch.manual_seed(0)
net = MirrorUNet("v3", channels={channels}).eval()
with torch.no_grad():
    both(torch.rand(2, 2, 32, 32, 32))  # load now what is loaded once
    before = resident("VmRSS")
    times = []
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    x = torch.rand({images}, *{shape})
    for _ in range({repeats}):
        start = time.perf_counter()
        sliding_window(x, {predict}, ({size},) * 3, overlap=0)
        times.append(time.perf_counter() - start)
print(sorted(times)[len(times) // 2], resident("VmHWM") - before)
"""


def branches(whole: bool, shape, size: int, channels: tuple, repeats: int) -> tuple[float, float]:
    """(seconds, peak GB above the memory before) of a prediction in windows of size^3.

    whole: both branches with all outputs, a segmentation and the reconstructions of CT and PET;
    else the segmentation of the PET branch. Runs in a separate process.
    """
    values = {"channels": channels, "shape": tuple(shape), "size": size, "repeats": repeats}
    values |= {"images": 1 + whole, "predict": "both" if whole else "pet"}
    command = [sys.executable, "-c", BRANCHES.format(**values)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()))


def main() -> None:
    """Measure and print both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    shape = (100, 100, 71) if small else (400, 400, 284)
    study = f"{'x'.join(map(str, shape))} voxels, mask on the input's grid"
    print(f"PyTorch {torch.__version__}, {os.cpu_count()} cores; v3, channels 8-128, {study}")
    with tempfile.TemporaryDirectory() as folder:
        pet = write_study(Path(folder), shape)
        for name, options in CASES.items():
            for more in ([], ["--skip-air", "0.1"]):
                seconds, cpu, peak = predict(pet, options, Path(folder), *more)
                row = " ".join([name, *more])
                print(f"{row:64} {seconds:6.1f} s, CPU {cpu:6.1f} s, peak {peak:.2f} GB resident")
    size = 48 if small else 96
    windows = (size, size, 2 * size)
    paper, laptop = (16, 32, 64, 128, 256), (8, 16, 32, 64, 128)
    for volume, channels, repeats in ((windows, paper, 5), (shape, laptop, 1)):
        found = {False: [], True: []}
        for _ in range(1 if small else 3):  # in turns
            for whole, measured in found.items():
                measured.append(branches(whole, volume, size, channels, repeats))
        alone, both = (np.median(found[whole], axis=0) for whole in found)
        where = f"{'x'.join(map(str, volume))} in windows of {size}^3"
        print(f"{where}, channels {channels[0]}-{channels[-1]}:")
        print("    PET branch {:.2f} s, {:.3f} GB;".format(*alone), end=" ")
        print("both {:.2f} s, {:.3f} GB;".format(*both), end=" ")
        print("PET branch / both: time {:.2f}, memory {:.2f}".format(*alone / both))


if __name__ == "__main__":
    main()
