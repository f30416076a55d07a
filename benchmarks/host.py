"""Host time: how long Python takes to start each operation and a training step; without a GPU.

    python benchmarks/host.py [--quick] [--csv results/host.csv]

A GPU waits for Python if a kernel runs shorter than the next one takes to be launched. Here
Triton's real binder, compiler (for sm_90) and launcher run on small CPU tensors, on top of a
libcuda that launches nothing (stub_cuda.c, which gcc compiles into a temporary folder). Times are
the CPU time of one thread, the least of several runs. They depend on the machine and on what else
runs there. So a small PyTorch operation, the first row, is timed next to each of them. The second
column is the time on a machine where that takes 1.5 us, for which the limits are.

A step is that of a v3 at 32^3 with 2 to 6 channels, everything included; PyTorch's operations run
on the CPU, so they take longer than their start. Launches are those of Triton.
"""

import os
import sys

if os.environ.get("TRITON_INTERPRET"):  # the interpreter launches nothing; Triton reads this once
    os.environ.pop("TRITON_INTERPRET")
    os.execv(sys.executable, [sys.executable, *sys.argv])

import argparse
import csv
import ctypes
import shutil
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

import kernels
import patches
from kernels import recompute
from kernels.dice_ce import dice_ce_triton
from kernels.norm_act import norm_act_triton
from kernels.voxel_shuffle import voxel_shuffle_triton
from losses import MirrorLoss
from mirror_unet import MirrorUNet

LAST = torch.channels_last_3d
SMALL, add_one = "x.add(1), 64 numbers", partial(torch.ones(64).add, 1)  # the small operation
SMALL_US = 1.5  # its time on the machine of the limits
TARGETS = {"norm_act forward": 25, "norm_act backward": 45, "norm_act again": 8, "step": 34}


# -------------------------------------------------------------------------------- the stub driver
class StubDriver(nvidia.CudaDriver):
    """Triton's driver for one GPU, sm_90, without what it asks PyTorch."""

    def __init__(self):
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device: (9, 0)
        self.set_current_device = lambda device: None

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def load_stub(folder: str) -> ctypes.CDLL:
    """Compile the stub into a folder, where Triton's cache then is, too, and let Triton use it.

    Exits with 2 if there is no gcc.
    """
    if shutil.which("gcc") is None:
        print("error: gcc was not found; it compiles the stub driver: install it", file=sys.stderr)
        sys.exit(2)
    library = Path(folder) / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1"]
    source = Path(__file__).with_name("stub_cuda.c")
    subprocess.run(["gcc", *options, source, "-o", library], check=True)
    library.with_name("libcuda.so").symlink_to(library.name)
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    os.environ["TRITON_CACHE_DIR"] = str(Path(folder) / "cache")  # its launchers link to the stub
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    stub.stub_launches.restype = ctypes.c_longlong
    triton.runtime.driver.set_active(StubDriver())
    kernels._on_triton = lambda x: True  # CPU tensors, too
    torch.set_num_threads(1)
    return stub


# ---------------------------------------------------------------------------------- what is timed
def timed(call, *repeats: int) -> dict:
    """Times of a row: here, and on the machine of the limits, in microseconds."""
    before, here, after = microseconds(add_one), microseconds(call, *repeats), microseconds(add_one)
    return dict(time=here, scaled=here * SMALL_US * 2 / (before + after), unit="us")


def microseconds(call, repeats: int = 300, runs: int = 9) -> float:
    """CPU time of one call: the least of several runs of many calls."""
    for _ in range(20):
        call()
    times = []
    for _ in range(runs):
        start = time.process_time()
        for _ in range(repeats):
            call()
        times.append((time.process_time() - start) / repeats * 1e6)
    return min(times)


def launches(stub: ctypes.CDLL, call, warm_up: int = 2) -> int:
    """Triton launches of one call, after some that compile."""
    for _ in range(warm_up):
        call()
    before = stub.stub_launches()
    call()
    return stub.stub_launches() - before


def operations() -> dict:
    """A call of each operation, by name; "large" instances do not fit into registers."""
    gradients = partial(torch.autograd.grad, retain_graph=True)
    calls = {SMALL: add_one}
    for size, name in ((4, "norm_act"), (24, "norm_act, large")):
        x = torch.randn(2, 16, size, size, size).contiguous(memory_format=LAST).requires_grad_()
        parameters = [torch.ones(n, requires_grad=True) for n in (16, 16, 1)]
        y = norm_act_triton(x, *parameters)
        calls[f"{name} forward"] = partial(norm_act_triton, x, *parameters)
        given = (y, (x, *parameters), torch.ones_like(y))
        calls[f"{name} backward"] = partial(gradients, *given)
        calls[f"{name} again"] = partial(norm_act_triton, x.detach(), *parameters, **y.known)
    logits = torch.randn(2, 2, 8, 8, 8).contiguous(memory_format=LAST).requires_grad_()
    labels = torch.zeros(2, 1, 8, 8, 8, dtype=torch.uint8)
    calls["dice_ce forward"] = partial(dice_ce_triton, logits, labels)
    calls["dice_ce backward"] = partial(gradients, dice_ce_triton(logits, labels)[0], logits)
    image, keys, corners = torch.rand(2, 2, 32, 32, 32), torch.tensor([1, 2]), make_corners(2)
    calls["voxel_shuffle"] = partial(voxel_shuffle_triton, image[:, :1], corners, 16, keys)
    calls["corrupt_ct"] = partial(patches.corrupt_ct, image, "shuffle", keys, corners=corners)
    return calls


def make_corners(batch: int) -> torch.Tensor:
    """A cube per sample, which the loader's processes draw in a run: (B, 1, 3)."""
    return torch.zeros(batch, 1, 3, dtype=torch.long)


def eager_norm_act(x, weight, bias, slope, residual=None, eps=1e-5, **known):
    """PyTorch's instance norm, PReLU and sum."""
    y = F.prelu(F.instance_norm(x, weight=weight, bias=bias, eps=eps), slope.to(x.dtype))
    return y if residual is None else y + residual


def make_step(channels=(2, 3, 4, 5, 6), size=32, batch=1, layout=LAST):
    """A training step of v3: corruption, forward, loss, backward, clipping, Adam, log."""
    torch.manual_seed(0)
    recompute.DEVICES = {"cpu"}  # as on a GPU
    net = MirrorUNet("v3", channels=channels).to(memory_format=layout)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    loss = MirrorLoss("v3")
    image = torch.rand(batch, 2, size, size, size)
    label = torch.zeros(batch, 1, size, size, size, dtype=torch.uint8)
    keys, corners = torch.arange(batch), make_corners(batch)

    def step():
        given = {"image": image, "label": label, "tumor": torch.ones(batch)}
        targets = patches.make_targets(given, "petct")
        x = patches.corrupt_ct(targets["image"], "shuffle", keys, corners=corners)
        total, parts = loss(net(x.contiguous(memory_format=layout)), targets)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 12.0)
        optimizer.step()
        torch.stack([total.detach(), *parts.values()]).tolist()

    return step


def measure(stub: ctypes.CDLL, quick: bool) -> list[dict]:
    """The rows of the table; quick: few repetitions, and no step of the paper's size."""
    rows = []
    for name, call in operations().items():
        with torch.set_grad_enabled(not name.endswith("again")):
            times = timed(call, 20 if quick else 300)
            rows.append(dict(what=name, **times, launches=launches(stub, call)))
    ours = kernels.norm_act
    for name, norm_act in {"step": ours, "step, PyTorch's norm and PReLU": eager_norm_act}.items():
        kernels.norm_act = norm_act
        step = make_step()
        times = timed(step, *((1, 5) if quick else (3, 15)))
        times |= dict(time=times["time"] / 1e3, scaled=times["scaled"] / 1e3, unit="ms")
        rows.append(dict(what=name, **times, launches=launches(stub, step)))
    kernels.norm_act = ours
    layouts = {"channels_last": LAST, "NCDHW": torch.contiguous_format}
    for name, layout in {} if quick else layouts.items():
        step = make_step((16, 32, 64, 128, 256), 96, 2, layout)
        rows.append(dict(what=f"step, 2 x 96^3, {name}", launches=launches(stub, step, 1)))
    return rows


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    quick = "few repetitions, and no step of the paper's size"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--csv", help="also write the table to this file")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, triton {triton.__version__}")
    print(f"{'':32} {'time':>8} {'scaled':>10}    {'at most':>8} {'launches':>9}")
    with tempfile.TemporaryDirectory(prefix="stub_cuda_") as folder:
        rows = measure(load_stub(folder), args.quick)
    for row in rows:
        target = TARGETS.get(row["what"], "")
        times = f"{row['time']:8.1f} {row['scaled']:10.1f} {row['unit']}" if "time" in row else ""
        print(f"{row['what']:32} {times:22} {target:>8} {row['launches']:9}")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, ("what", "time", "scaled", "unit", "launches"))
            writer.writeheader()
            for row in rows:
                writer.writerow({k: round(v, 2) if type(v) is float else v for k, v in row.items()})


if __name__ == "__main__":
    main()
