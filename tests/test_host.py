"""Launches on a stub driver: the right kernels with the right arguments, and few of them."""

import csv
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("triton.backends.nvidia")
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc compiles the stub driver")
slow = pytest.mark.slow


def python(*args: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python in benchmarks/, in a process without the interpreter."""
    removed = ("TRITON_INTERPRET", "MIRROR_UNET_KERNELS")
    env = {k: v for k, v in os.environ.items() if k not in removed} | environment
    command = [sys.executable, *args]
    where = ROOT / "benchmarks"
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=where)


# Prints, for each launch of norm_act, kernel, programs, and the names of its first arguments,
# which are tensors; "?" is memory that belongs to none of these.
OBSERVED = """
import ctypes, importlib, sys, tempfile, torch
import host
norm_act = importlib.import_module("kernels.norm_act")
OBSERVER = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p)
)
seen = []

def observe(kernel, programs, threads, params):
    count = {b"_forward": 6, b"_merge_stats": 2, b"_merge_sums": 2, b"_backward": 8}[kernel]
    pointers = [ctypes.c_int64.from_address(params[i]).value for i in range(count)]
    seen.append((kernel.decode(), programs, pointers))

def report(**tensors):
    names = {t.data_ptr(): name for name, t in tensors.items()}
    for kernel, programs, pointers in seen:
        print(kernel, programs, *(names.get(p, "?") for p in pointers))
    seen.clear()

with tempfile.TemporaryDirectory() as folder:
    stub = host.load_stub(folder)
    observer = OBSERVER(observe)
    stub.stub_observe(observer)
    for call in range(2):  # an ordinary launch, then those of the plan
        for size in (4, 28):
            x = torch.randn(2, 16, size, size, size).requires_grad_()
            g = torch.randn_like(x)
            w, b, s = (torch.ones(n, requires_grad=True) for n in (16, 16, 1))
            y = norm_act.norm_act_triton(x, w, b, s)
            stats = y.known["stats"]
            report(x=x, y=y, stats=stats, w=w, b=b, s=s)
            with torch.no_grad():
                again = norm_act.norm_act_triton(x, w, b, s, **y.known)
            report(x=x, y=again, stats=stats, w=w, b=b, s=s)
            dx, dw, db, ds = torch.autograd.grad(y, (x, w, b, s), g)
            assert db.data_ptr() + 64 == dw.data_ptr() == ds.data_ptr() - 64  # one piece of memory
            report(x=x, g=g, dx=dx, stats=stats, w=w, b=b, s=s, sums=db)
"""
# Instances of 4^3 voxels: 16 channels per program. Of 28^3: three tiles each, two if only summed.
SMALL = """\
_forward 2 x y stats w b s
_forward 2 x y stats w b s
_backward 2 g x dx stats ? w b s
_merge_sums 6 ? sums
"""
LARGE = """\
_forward 96 x y stats ? w b
_merge_stats 4 ? stats
_forward 96 x y stats ? w b
_forward 96 x y stats w b s
_backward 64 g x dx stats ? ? w b
_merge_sums 6 ? ?
_backward 96 g x dx stats ? w b s
"""


@needs_gcc
@slow
def test_every_launch_gets_the_tensors_of_its_own_call():
    done = python("-c", OBSERVED)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (SMALL + LARGE) * 2


@needs_gcc
@slow
def test_the_table_of_host_times_shows_few_launches_and_no_more_time_than_pytorch(tmp_path):
    path = tmp_path / "host.csv"
    done = python("host.py", "--quick", "--csv", str(path))
    assert done.returncode == 0, done.stderr
    with open(path, newline="") as file:
        rows = {r["what"]: r for r in csv.DictReader(file)}
    counts = {name: int(r["launches"]) for name, r in rows.items()}
    expected = {"norm_act forward": 1, "norm_act backward": 2, "norm_act again": 1}
    expected |= {"norm_act, large forward": 3, "norm_act, large backward": 3}
    expected |= {"norm_act, large again": 1, "dice_ce forward": 2, "dice_ce backward": 1}
    expected |= {"voxel_shuffle": 1, "corrupt_ct": 1}
    assert {name: counts[name] for name in expected} == expected
    assert counts["step"] <= 200
    times = {name: float(r["time"]) for name, r in rows.items()}
    assert times["step"] < 1.2 * times["step, PyTorch's norm and PReLU"]
    assert times["norm_act again"] < times["norm_act forward"] < 20 * times["x.add(1), 64 numbers"]


@slow
def test_without_gcc_it_says_so():
    done = python("host.py", PATH="")
    assert done.returncode == 2
    assert done.stderr == "error: gcc was not found; it compiles the stub driver: install it\n"
