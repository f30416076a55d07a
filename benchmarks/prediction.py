"""What a prediction costs: time and peak memory of predict.py on a whole body of AutoPET's size, and of the PET branch alone beside both.

    python benchmarks/prediction.py            both parts; minutes on two cores
    python benchmarks/prediction.py --small    a 100 x 100 x 71 study, to see that it works

Part one writes a synthetic 400 x 400 x 284 study (2.04 x 2.04 x 3 mm) and untrained networks of the laptop's width, and runs predict.py on
them as a program of its own: peak memory is the most that the process ever had resident. Part two predicts two
windows of 96^3, and a whole body, by the PET branch (all that a segmentation by v1-v3 needs) and by both branches with all they give, in
turns. Linux only.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import phantom  # noqa: E402
import train  # noqa: E402

CASES = {  # options of a run that was made with train.py
    "laptop preset: 4 mm, windows of 64^3": "--data petct --root x --model v3",
    "the paper's grid: 2 x 2 x 3 mm, windows of 96^3": "--preset autopet --root x --model v3 --channels 8 16 32 64 128 --batch 2",
}


def write_study(folder: Path, shape) -> Path:
    """A phantom in a field of view of `shape` voxels, with a little activity everywhere, so that nothing is cropped away."""
    spacing = tuple(815.0 / shape[0] for _ in range(2)) + (852.0 / shape[2],)
    study = phantom.petct_study(0, spacing=spacing)
    suv = np.random.default_rng(0).uniform(0.001, 0.02, shape).astype(np.float32)
    here = tuple(slice((n - m) // 2, (n - m) // 2 + m) for n, m in zip(shape, np.minimum(shape, study.suv.shape)))
    inner = tuple(slice(0, s.stop - s.start) for s in here)
    suv[here] += study.suv[inner]
    nib.save(nib.Nifti1Image(suv, study.affine), folder / "SUV.nii.gz")
    return folder / "SUV.nii.gz"


def predict(pet: Path, options: str, folder: Path) -> tuple[float, float]:
    """(seconds, peak GB) of predict.py with an untrained network and no mirror images."""
    c = train.parse_config(options.split())
    torch.save({"config": dataclasses.asdict(c), "model": train.build_model(c).state_dict()}, folder / "w.pt")
    args = [sys.executable, ROOT / "predict.py", "--checkpoint", folder / "w.pt", "--pet", pet, "--out", folder / "m.nii.gz", "--no-flips"]
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, args)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("predict.py failed")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def branches(whole: bool, shape, size: int, channels: tuple, repeats: int) -> tuple[float, float]:
    """(seconds, peak GB above what was resident before) of a prediction in windows of size^3, in a process of its own.

    whole: both branches with all they give: a segmentation, and the reconstructions of CT and PET; else the PET branch's segmentation.
    """
    code = f"""
import time, torch
from pathlib import Path
from mirror_unet import MirrorUNet
from predict import sliding_window

def resident(name):  # GB
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) / 2**20

def both(x):
    out = net(x)
    return torch.cat([out.seg.softmax(1)[:, 1:], out.ct, out.pet], dim=1)

torch.manual_seed(0)
net = MirrorUNet("v3", channels={channels}).eval()
predict = both if {whole} else lambda x: net.segment(x).seg.softmax(1)[:, 1:]
with torch.no_grad():
    both(torch.rand(2, 2, 32, 32, 32))  # what is loaded once is loaded now
    before, times = resident("VmRSS"), []
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    x = torch.rand({1 + whole}, *{tuple(shape)})
    for _ in range({repeats}):
        start = time.perf_counter()
        sliding_window(x, predict, ({size},) * 3, overlap=0)
        times.append(time.perf_counter() - start)
print(sorted(times)[len(times) // 2], resident("VmHWM") - before)
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(map(float, out.split()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    shape = (100, 100, 71) if small else (400, 400, 284)
    study = "x".join(map(str, shape))
    print(f"PyTorch {torch.__version__}, {os.cpu_count()} cores; v3, channels 8-128, {study} voxels, mask on the input's grid")
    with tempfile.TemporaryDirectory() as folder:
        pet = write_study(Path(folder), shape)
        for name, options in CASES.items():
            seconds, peak = predict(pet, options, Path(folder))
            print(f"{name:50} {seconds:7.1f} s   peak {peak:.2f} GB resident")
    size = 48 if small else 96
    paper, laptop = (16, 32, 64, 128, 256), (8, 16, 32, 64, 128)
    for volume, channels in (((size, size, 2 * size), paper), (shape, laptop)):
        found = {False: [], True: []}
        for _ in range(1 if small else 3):  # in turns
            for whole in found:
                found[whole].append(branches(whole, volume, size, channels, 5 if volume[0] == size else 1))
        alone, both = (np.median(found[whole], axis=0) for whole in found)
        print(f"{'x'.join(map(str, volume))} in windows of {size}^3, channels {channels[0]}-{channels[-1]}:")
        print("    PET branch {:.2f} s, {:.3f} GB; both {:.2f} s, {:.3f} GB;".format(*alone, *both), end=" ")
        print("PET branch / both: time {:.2f}, memory {:.2f}".format(*alone / both))


if __name__ == "__main__":
    main()
