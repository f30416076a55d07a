"""The meters count what a person counts by hand, and the kernels stay within their limits of traffic, launches and registers."""

import csv
import os
import subprocess
import sys

import pytest
import torch
from conftest import DEVICE, ROOT

import kernels
from baselines import build
from mirror_unet import MirrorUNet

sys.path.append(str(ROOT / "benchmarks"))  # last: kernels.py is a name there, too
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="the meter counts in Triton's interpreter")


@pytest.fixture
def traffic():
    import traffic

    return traffic


def numbers(counted) -> tuple[int, int, int]:
    return counted.read, counted.written, counted.launches


@triton.jit
def _copy(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n, other=0), mask=at < n)


@triton.jit
def _count_up(x, BLOCK: tl.constexpr):
    tl.atomic_add(x + tl.arange(0, BLOCK), 1)
    tl.store(x, tl.load(x))


# ------------------------------------------------------------------------------------------------------------------- meters
@interpreted
@pytest.mark.parametrize("dtype,size", [(torch.float32, 4), (torch.int64, 8), (torch.bfloat16, 2), (torch.uint8, 1)])
def test_a_masked_copy_counts_its_active_lanes(traffic, dtype, size):
    x, y = torch.arange(1000).to(dtype), torch.zeros(1024, dtype=dtype)
    with traffic.count_triton() as counted:
        _copy[(2,)](x, y, 1000, BLOCK=512)  # 512 lanes and 488
        _copy[(1,)](x, y, 10, BLOCK=512)
    assert list(counted) == ["_copy"] and numbers(counted["_copy"]) == (1010 * size, 1010 * size, 2)
    assert torch.equal(y[:1000], x) and not y[1000:].any()
    _copy[(1,)](x, y, 10, BLOCK=512)
    assert counted["_copy"].launches == 2  # outside the `with` nothing is counted


@interpreted
def test_an_atomic_is_a_read_and_a_write_and_unmasked_accesses_count(traffic):
    x = torch.zeros(8, dtype=torch.int32)
    with traffic.count_triton() as counted:
        _count_up[(3,)](x, BLOCK=8)
    assert numbers(counted["_count_up"]) == (3 * (32 + 4), 3 * (32 + 4), 1) and (x == 3).all()


n = 1000
A = torch.ones(n)
EAGER = {  # code: bytes read, bytes written, launches
    "a sum of two": (lambda: A + A, 8 * n, 4 * n, 1),
    "in place": (lambda: A.clone().add_(1), 8 * n, 8 * n, 2),  # a copy, then a read and a write
    "overwriting": (lambda: torch.empty(n).copy_(A), 4 * n, 4 * n, 1),
    "filling": (lambda: torch.empty(n).fill_(1), 0, 4 * n, 1),
    "zeros": (lambda: torch.zeros(n), 0, 4 * n, 1),
    "an output argument": (lambda: torch.add(A, A, out=torch.empty(n)), 8 * n, 4 * n, 1),
    "views": (lambda: A.view(10, 100).t()[2:4].detach().unsqueeze(0).expand(5, 2, 10), 0, 0, 0),
    "an expanded input": (lambda: A[:1].expand(n) + A, 4 + 4 * n, 4 * n, 1),
    "a slice": (lambda: A[::2] * 2.0, 2 * n, 2 * n, 1),
    "a conversion": (lambda: A.to(torch.bfloat16), 4 * n, 2 * n, 1),
    "a conversion to what it is": (lambda: A.float(), 0, 0, 0),
    "two results": (lambda: A.view(10, 100).max(1), 4 * n, 10 * (4 + 8), 1),
    "a number for Python": (lambda: A[0].item(), 4, 0, 1),
    "a list of inputs": (lambda: torch.cat([A, A]), 8 * n, 8 * n, 1),
    "nothing": (lambda: A.shape, 0, 0, 0),
}


@interpreted
@pytest.mark.parametrize("code,read,written,launches", EAGER.values(), ids=EAGER.keys())
def test_eager_code_counts_what_its_ops_read_and_write(traffic, code, read, written, launches):
    with traffic.CountEager() as counter:
        code()
    assert numbers(traffic.total(counter.traffic)) == (read, written, launches)


@interpreted
def test_the_backward_pass_is_counted(traffic):
    """y = a b: forward reads both and writes y; backward reads dy twice and a and b once, and writes two gradients."""
    a, b = (torch.ones(n, requires_grad=True) for _ in range(2))
    forward, backward = traffic.measure(torch.mul, (a, b))
    assert numbers(forward) == (8 * n, 4 * n, 1) and numbers(backward) == (16 * n, 8 * n, 2)


@interpreted
def test_our_ops_are_counted_once(traffic):
    """A Triton op by its kernel's loads, not by its arguments again, and the interpreter's own copies of the arguments not at all."""
    from kernels.voxel_shuffle import voxel_shuffle_triton

    x = torch.ones(1, 1, 16, 16, 16)
    with traffic.CountEager() as eager, traffic.count_triton() as kernels:
        voxel_shuffle_triton(x, torch.zeros(1, 1, 3, dtype=torch.int64), 8, 0)
    assert traffic.total(eager.traffic).bytes < 100  # corners and seeds
    assert kernels["_shuffle_kernel"].launches == 1 and kernels["_shuffle_kernel"].written == 4 * 16**3
    assert 0 <= kernels["_shuffle_kernel"].read - 4 * 16**3 < 100  # the cube's corner and key


# ------------------------------------------------------------------------------------------------------------------- limits
LIMITS = {  # (op, dtype): bytes forward, backward, both; launches of kernels and ops, both
    ("dice_ce", torch.float32): (9.1, 17.1, 27, 4),
    ("dice_ce", torch.bfloat16): (5.1, 9.1, 15, 4),
    ("norm_act", torch.float32): (12.1, 20.1, 32.2, 9),
    ("norm_act+residual", torch.float32): (16.1, 20.1, 36.2, 9),
    ("voxel_shuffle", torch.float32): (8.1, 8.1, 16.2, 5),
}


@interpreted
@pytest.mark.parametrize("op,dtype", LIMITS)
def test_kernels_move_no_more_than_their_limits(traffic, op, dtype):
    rows, _ = traffic.table((op,), ("ours Triton",), (dtype,))
    assert {r["layout"] for r in rows} == {"NCDHW", "channels_last"} and len(rows) == 2
    forward, backward, both, launches = LIMITS[op, dtype]
    item = dtype.itemsize
    for r in rows:
        assert item < r["forward"] <= forward and item < r["backward"] <= backward and r["both"] <= both, r
        assert 2 <= r["forward_launches"] + r["backward_launches"] <= launches, r


@interpreted
@pytest.mark.parametrize("peer,launches,float32,bfloat16", [("MONAI", (51, 54), 228, 156), ("nnU-Net", (43, 46), 228, 160)])
def test_the_peers_move_what_the_issue_says(traffic, peer, launches, float32, bfloat16):
    """Two classes, int64 labels: measured on MONAI 1.6.1 and nnU-Net 2.8.1."""
    function = traffic.contenders("dice_ce")[0].get(peer)
    if function is None:
        pytest.skip(f"{peer} is not installed")
    for dtype, bytes_a_voxel, count in ((torch.float32, float32, launches[0]), (torch.bfloat16, bfloat16, launches[1])):
        logits, labels = traffic.arguments("dice_ce", (2, 2, 32, 32, 32), dtype)
        forward, backward = traffic.measure(function, (logits, labels.long()))
        assert (forward + backward).bytes / (2 * 32**3) == pytest.approx(bytes_a_voxel, rel=0.02)
        assert (forward + backward).launches == pytest.approx(count, abs=3)


def python(*args: str) -> subprocess.CompletedProcess:
    """Python in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True, cwd=ROOT / "benchmarks")


def check_budget(tmp_path, *args: str) -> list[dict]:
    done = python("budget.py", "--csv", str(tmp_path / "budget.csv"), *args)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader(open(tmp_path / "budget.csv")))
    assert all(r["spilled"] == "0" and int(r["registers"]) > 0 for r in rows)
    return rows


def test_kernels_stay_within_the_budget(tmp_path):
    rows = check_budget(tmp_path, "--targets", "sm_90", "gfx942", "--match", "C=2 |C=2$|voxel_shuffle")
    assert {r["kernel"].split("_")[0] for r in rows} == {"dice", "norm", "voxel"} and len(rows) >= 40
    assert {r["target"] for r in rows} == {"sm_90", "gfx942"}
    wide = [r for r in rows if "grad" in r["kernel"] or "_backward" in r["kernel"] or r["kernel"] == "voxel_shuffle i32 NCDHW"]
    assert len(wide) >= 10 and all(r["load_widest"] == r["store_widest"] == "128" for r in wide)


@pytest.mark.slow  # some 650 compilations, two minutes; the next run finds them in Triton's cache
def test_every_kernel_stays_within_the_budget_on_every_target(tmp_path):
    rows = check_budget(tmp_path)
    assert {r["target"] for r in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"} and len(rows) > 300


KERNEL = """
import sys
import torch, triton, triton.language as tl

@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n, other=0), mask=at < n)

def compile_specs():
    x = torch.empty(1 << 20 if "whole" in sys.argv else 1000003, device="meta")
    return [{"name": "copy", "kernel": copy, "arguments": {"x": x, "y": x, "n": len(x), "BLOCK": 1024}}]
"""
CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import budget, copy_kernel
budget.import_module = lambda name: copy_kernel
for target in budget.TARGETS:
    row = budget.budget("copy", 0, target)
    print(row["ok"], row["load_widest"], row["load_narrowest"], row["store_widest"], row["store_narrowest"], row["spilled"])
"""


@pytest.mark.parametrize("vectors,expected", [("whole", "True 128 128 128 128 0\n"), ("broken", "False 32 32 32 32 0\n")])
def test_the_budget_sees_wide_accesses_and_fails_narrow_ones(tmp_path, vectors, expected):
    (tmp_path / "copy_kernel.py").write_text(KERNEL)
    done = python("-c", CHECK, str(tmp_path), vectors)
    assert done.stdout == expected * 4, done.stdout + done.stderr


def test_kernel_times_are_written(tmp_path):
    out = tmp_path / "results" / "kernels.csv"
    for repeat in (1, 2):  # the second run appends
        done = python("kernels.py", "--quick", "--op", "dice_ce", "norm_act+residual", "voxel_shuffle", "--csv", str(out))
        assert done.returncode == 0, done.stdout + done.stderr
        rows = list(csv.DictReader(open(out)))
        keys = [tuple(r[k] for k in ("op", "dtype", "layout", "pass", "what")) for r in rows]
        assert len(keys) == repeat * len(set(keys)) and len(set(keys)) >= 3 * 2 * 3 * 2
    assert {r["pass"] for r in rows} == {"fwd", "bwd", "full"} and {r["layout"] for r in rows} == {"NCDHW", "channels_last"}
    assert all(float(r["ms"]) > 0 and float(r["ratio"]) > 0 and r["torch"] and r["commit"] for r in rows)
    assert all(float(r["ratio"]) == 1 for r in rows if r["what"].startswith("ours"))


# ------------------------------------------------------------------------------------------------------------------ systems
def test_the_table_of_systems_is_what_the_script_computes():
    """Every row's name, and the numbers of a few; the Markdown table holds the same."""
    import systems

    with open(ROOT / "results" / "systems.csv") as f:
        rows = list(csv.DictReader(f))
    every = [(data, " ".join([name, *(f"--{k} {v}" for k, v in options.items())])) for data, name, options in systems.systems()]
    assert [(r["data"], r["system"]) for r in rows] == every
    kernels.use("plain")
    try:
        for row in ("petct", "v1"), ("petct", "joint --tasks v1 --skips both"), ("petct", "nnunet"), ("brain", "v2-rec"):
            i = every.index(row)
            assert {k: str(v) for k, v in systems.measure(*systems.systems()[i]).items()} == rows[i]
    finally:
        kernels.use()
    assert systems.markdown([r | {"parameters": int(r["parameters"])} for r in rows]) in (ROOT / "results" / "README.md").read_text()


def test_the_arithmetic_of_a_system_is_that_of_its_convolutions():
    """Counted a second way: 2 x voxels x channels in x channels out x kernel of each convolution that runs."""
    import systems

    counted = []

    def count(module, inputs, output):
        grid = inputs[0] if isinstance(module, torch.nn.ConvTranspose3d) else output  # the grid on which the kernel is laid once a voxel
        counted.append(2 * module.weight.numel() * grid[0, 0].numel())

    for name, where in (("v1", "training GFLOPs"), ("mf", "training GFLOPs"), ("pet", "prediction GFLOPs")):
        counted.clear()
        net = MirrorUNet(name) if name == "v1" else build(name)
        net = net.to("meta")
        for m in net.modules():
            if isinstance(m, torch.nn.Conv3d | torch.nn.ConvTranspose3d):
                m.register_forward_hook(count)
        kernels.use("plain")
        with torch.no_grad():
            net(torch.empty(1, 2, 96, 96, 96, device="meta"))
        kernels.use()
        assert systems.measure("petct", name, {})[where] == round(sum(counted) / 1e9, 2)
