"""The meters count what a person counts by hand; the kernels stay within their limits."""

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

sys.path.append(str(ROOT / "benchmarks"))  # at the end: it, too, has a kernels.py
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="the meter counts in the interpreter")
slow = pytest.mark.slow
pytestmark = slow


@pytest.fixture
def traffic():
    """The meter, imported late: it chooses Triton's interpreter."""
    import traffic

    return traffic


@pytest.fixture
def plain():
    """The plain path of the kernels, undone after the test."""
    kernels.use("plain")
    yield
    kernels.use()


def python(*args: str) -> subprocess.CompletedProcess:
    """Run Python in benchmarks/, in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    where = ROOT / "benchmarks"
    command = [sys.executable, *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=where)


def read_csv(path) -> list[dict]:
    """The rows of a table."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ----------------------------------------------------------------------------------------- meters
@triton.jit
def _copy(x, y, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets, mask=offsets < n, other=0), mask=offsets < n)


@triton.jit
def _count_up(x, BLOCK: tl.constexpr):
    tl.atomic_add(x + tl.arange(0, BLOCK), 1)
    tl.store(x, tl.load(x))


def numbers(counted) -> tuple[int, int, int]:
    """Bytes read, bytes written, launches."""
    return counted.read, counted.written, counted.launches


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16, torch.uint8])
def test_a_masked_copy_counts_its_active_lanes(traffic, dtype):
    x = torch.arange(1000).to(dtype)
    y = torch.zeros(1024, dtype=dtype)
    with traffic.count_triton() as counted:
        _copy[(2,)](x, y, 1000, BLOCK=512)  # 512 lanes and 488
        _copy[(1,)](x, y, 10, BLOCK=512)
    assert list(counted) == ["_copy"]
    assert numbers(counted["_copy"]) == (1010 * dtype.itemsize, 1010 * dtype.itemsize, 2)
    assert torch.equal(y[:1000], x) and not y[1000:].any()
    _copy[(1,)](x, y, 10, BLOCK=512)
    assert counted["_copy"].launches == 2  # nothing is counted outside the `with` block


@interpreted
def test_an_atomic_counts_as_a_read_and_a_write_and_unmasked_accesses_count(traffic):
    x = torch.zeros(8, dtype=torch.int32)
    with traffic.count_triton() as counted:
        _count_up[(3,)](x, BLOCK=8)
    moved = 3 * (8 * 4 + 4)
    assert numbers(counted["_count_up"]) == (moved, moved, 1)
    assert (x == 3).all()


n = 1000
A = torch.ones(n)
EAGER = {  # name: code, bytes read, bytes written, launches
    "a sum of two": (lambda: A + A, 8 * n, 4 * n, 1),
    "in place": (lambda: A.clone().add_(1), 8 * n, 8 * n, 2),  # a copy, then a read and a write
    "overwriting": (lambda: torch.empty(n).copy_(A), 4 * n, 4 * n, 1),
    "filling": (lambda: torch.empty(n).fill_(1), 0, 4 * n, 1),
    "zeros": (lambda: torch.zeros(n), 0, 4 * n, 1),
    "an output argument": (lambda: torch.add(A, A, out=torch.empty(n)), 8 * n, 4 * n, 1),
    "views": (lambda: A.view(10, 100).t()[2:4].detach()[None].expand(5, 2, 10), 0, 0, 0),
    "an expanded input": (lambda: A[:1].expand(n) + A, 4 + 4 * n, 4 * n, 1),
    "a slice": (lambda: A[::2] * 2.0, 2 * n, 2 * n, 1),
    "a conversion": (lambda: A.to(torch.bfloat16), 4 * n, 2 * n, 1),
    "a conversion to its own dtype": (lambda: A.float(), 0, 0, 0),
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
    """y = a b: forward reads a and b and writes y.

    Backward reads the gradient of y twice, a and b once, and writes two gradients.
    """
    a, b = (torch.ones(n, requires_grad=True) for _ in range(2))
    forward, backward = traffic.measure(torch.mul, (a, b))
    assert numbers(forward) == (8 * n, 4 * n, 1)
    assert numbers(backward) == (16 * n, 8 * n, 2)


@interpreted
def test_our_ops_are_counted_once(traffic):
    """A Triton op counts the loads of its kernel, not its arguments again.

    The interpreter's own copies of the arguments do not count.
    """
    from kernels.voxel_shuffle import voxel_shuffle_triton

    x = torch.ones(1, 1, 16, 16, 16)
    with traffic.CountEager() as eager, traffic.count_triton() as counted:
        voxel_shuffle_triton(x, torch.zeros(1, 1, 3, dtype=torch.int64), 8, 0)
    assert traffic.total(eager.traffic).bytes < 100  # corners and seeds
    shuffle = counted["_shuffle_kernel"]
    assert shuffle.launches == 1 and shuffle.written == 4 * 16**3
    assert 0 <= shuffle.read - 4 * 16**3 < 100  # the cube's corner and key


# ------------------------------------------------------------------------------ limits of traffic
LIMITS = {  # (op, dtype): bytes forward, backward, both; launches of kernels and ops, both
    ("dice_ce", torch.float32): (9.1, 17.1, 27, 4),
    ("dice_ce", torch.bfloat16): (5.1, 9.1, 15, 4),
    ("norm_act", torch.float32): (12.1, 20.1, 32.2, 6),
    ("norm_act+residual", torch.float32): (16.1, 20.1, 36.2, 6),
    ("voxel_shuffle", torch.float32): (8.1, 8.1, 16.2, 5),
}


def check_limits(traffic, op, dtype, layout):
    """Our Triton path moves no more than the limits, but more than one tensor."""
    (row,), _ = traffic.table((op,), ("ours Triton",), (dtype,), (layout,))
    assert row["layout"] == layout
    forward, backward, both, launches = LIMITS[op, dtype]
    assert dtype.itemsize < row["forward"] <= forward, row
    assert dtype.itemsize < row["backward"] <= backward, row
    assert row["both"] <= both, row
    assert 2 <= row["forward_launches"] + row["backward_launches"] <= launches, row


@interpreted
@pytest.mark.parametrize("layout", ["NCDHW", "channels_last"])
@pytest.mark.parametrize(
    "op,dtype", [(op, t) for op, t in LIMITS if not op.startswith("norm_act")]
)
def test_dice_ce_and_voxel_shuffle_move_no_more_than_their_limits(traffic, op, dtype, layout):
    check_limits(traffic, op, dtype, layout)


@slow
@interpreted
@pytest.mark.parametrize("layout", ["NCDHW", "channels_last"])
@pytest.mark.parametrize("op", ["norm_act", "norm_act+residual"])
def test_norm_act_moves_no_more_than_its_limits(traffic, op, layout):
    check_limits(traffic, op, torch.float32, layout)


@interpreted
def test_norm_act_moves_no_more_than_its_limits_in_a_small_volume(traffic, monkeypatch):
    op = "norm_act+residual"
    monkeypatch.setitem(traffic.SHAPES, op, (1, 16, 32, 32, 16))
    check_limits(traffic, op, torch.float32, "channels_last")


@interpreted
@pytest.mark.parametrize("layout", ["NCDHW", "channels_last"])
def test_norm_act_reads_small_instances_only_once(traffic, monkeypatch, layout):
    monkeypatch.setitem(traffic.SHAPES, "norm_act", (2, 16, 12, 12, 12))
    (row,), _ = traffic.table(("norm_act",), ("ours Triton",), (torch.float32,), (layout,))
    assert (row["forward_launches"], row["backward_launches"]) == (1, 2)
    assert 8 < row["forward"] <= 8.1 and 12 < row["backward"] <= 12.1


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peer", ["MONAI", "nnU-Net"])
def test_the_peers_move_what_the_results_state(traffic, peer, dtype):
    """Two classes, int64 labels: measured on MONAI 1.6.1 and nnU-Net 2.8.1."""
    function = traffic.contenders("dice_ce")[0].get(peer)
    if function is None:
        pytest.skip(f"{peer} is not installed")
    bytes_per_voxel, launches = {
        ("MONAI", torch.float32): (228, 51),
        ("MONAI", torch.bfloat16): (156, 54),
        ("nnU-Net", torch.float32): (228, 43),
        ("nnU-Net", torch.bfloat16): (160, 46),
    }[peer, dtype]
    logits, labels = traffic.arguments("dice_ce", (2, 2, 32, 32, 32), dtype)
    forward, backward = traffic.measure(function, (logits, labels.long()))
    both = forward + backward
    assert both.bytes / (2 * 32**3) == pytest.approx(bytes_per_voxel, rel=0.02)
    assert both.launches == pytest.approx(launches, abs=3)


# -------------------------------------------------------------------------- budgets of the kernels
def check_budget(tmp_path, *args: str) -> tuple[list[dict], str]:
    """Run budget.py; its rows, all without spills, and what it prints."""
    path = tmp_path / "budget.csv"
    done = python(*args, "--csv", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_csv(path)
    assert f"{len(rows)} kernels compiled, 0 over budget" in done.stdout
    assert all(r["spilled"] == "0" and int(r["registers"]) > 0 for r in rows)
    return rows, done.stdout


def check_wide(rows: list[dict]) -> int:
    """Kernels that write volumes access them 128 bits at a time; returns how many there are."""
    names = ("grad", "_backward", "voxel_shuffle i32 NCDHW")
    wide = [r for r in rows if any(name in r["kernel"] for name in names)]
    wide = [r for r in wide if not r["kernel"].endswith("strided")]
    assert all(r["load_widest"] == r["store_widest"] == "128" for r in wide)
    return len(wide)


QUICK = """
import sys
sys.path.insert(0, "BENCHMARKS")
import budget
if __name__ == "__main__":  # not again in the processes that compile
    budget.COUNT = "raise SystemExit('no interpreter')"
    budget.main()
"""


@pytest.mark.slow
def test_representative_kernels_stay_within_the_budget(tmp_path):
    """As if Triton's interpreter failed: launches are not counted, all else is reported."""
    script = tmp_path / "quick.py"
    script.write_text(QUICK.replace("BENCHMARKS", str(ROOT / "benchmarks")))
    match = "norm_act_backward float32 NCDHW .*C=2$|_shuffle i32 NCDHW$|dice_ce grad C=2 float32 n"
    rows, text = check_budget(tmp_path, str(script), "--targets", "sm_90", "--match", match)
    assert {r["kernel"].split("_")[0] for r in rows} == {"dice", "norm", "voxel"}
    assert len(rows) == 3 and check_wide(rows) == 3
    assert "not counted, because Triton's interpreter failed: no interpreter" in text


@slow
def test_kernels_stay_within_the_budget_on_two_targets(tmp_path):
    match = ("--match", "C=2 |C=2$|voxel_shuffle")
    rows, text = check_budget(tmp_path, "budget.py", "--targets", "sm_90", "gfx942", *match)
    assert "launches of dice_ce forward 2 backward 1" in text
    assert "launches of norm_act forward 3 backward 3" in text
    assert {r["kernel"].split("_")[0] for r in rows} == {"dice", "norm", "voxel"}
    assert {r["target"] for r in rows} == {"sm_90", "gfx942"}
    assert len(rows) >= 40 and check_wide(rows) >= 10


@slow  # some 650 compilations, two minutes; the next run finds them in Triton's cache
def test_every_kernel_stays_within_the_budget_on_every_target(tmp_path):
    rows, _ = check_budget(tmp_path, "budget.py")
    assert {r["target"] for r in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert len(rows) > 300


COPY = """
import torch, triton, triton.language as tl

@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets, mask=offsets < n, other=0), mask=offsets < n)

def launches():
    found = []
    for n in (1 << 20, 1000003):  # a multiple of 16 elements, and not
        x = torch.empty(n, device="meta")
        arguments = {"x": x, "y": x, "n": n, "BLOCK": 1024}
        found.append({"name": "copy", "kernel": copy, "arguments": arguments})
    return found
"""
CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import budget, copy_kernel
budget.LAUNCHES["copy"] = copy_kernel.launches
for index in (0, 1):
    for target in budget.TARGETS:
        row = budget.budget("copy", index, target)
        widths = [row[f"{a}_{b}"] for a in ("load", "store") for b in ("widest", "narrowest")]
        print(row["ok"], *widths, row["spilled"])
"""


@pytest.mark.slow
def test_the_budget_accepts_wide_accesses_and_rejects_narrow_ones(tmp_path):
    (tmp_path / "copy_kernel.py").write_text(COPY)
    done = python("-c", CHECK, str(tmp_path))
    wide, narrow = "True 128 128 128 128 0\n", "False 32 32 32 32 0\n"
    assert done.stdout == wide * 4 + narrow * 4, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------ times
OPS = ("dice_ce", "norm_act+residual", "voxel_shuffle")


@pytest.mark.slow
@pytest.mark.parametrize("repeats", [1, pytest.param(2, marks=slow)])
def test_times_of_kernels_are_appended_to_the_table(tmp_path, repeats):
    out = tmp_path / "results" / "kernels.csv"
    for _ in range(repeats):
        done = python("kernels.py", "--quick", "--op", *OPS, "--csv", str(out))
        assert done.returncode == 0, done.stdout + done.stderr
    rows = read_csv(out)
    keys = [tuple(r[k] for k in ("op", "dtype", "layout", "pass", "what")) for r in rows]
    assert len(keys) == repeats * len(set(keys))
    assert len(set(keys)) >= len(OPS) * 2 * 3 * 2
    assert {r["pass"] for r in rows} == {"fwd", "bwd", "full"}
    assert {r["layout"] for r in rows} == {"NCDHW", "channels_last"}
    assert all(r["torch"] and r["commit"] for r in rows)
    assert all(float(r["ms"]) > 0 and float(r["ratio"]) > 0 for r in rows)
    assert all(float(r["ratio"]) == 1 for r in rows if r["what"].startswith("ours"))


COMPILED = """
import importlib.util, torch
spec = importlib.util.spec_from_file_location("times", "kernels.py")
times = importlib.util.module_from_spec(spec)
spec.loader.exec_module(times)
compile, graphs = torch.compile, []

def backend(graph, inputs):
    graphs.append(graph)
    return graph

torch.compile = lambda f, **options: compile(f, backend=backend, **options)
shapes = [(1, c, 4, 4, 4) for c in range(2, 12)]
times.run({"norm_act": shapes}, ["norm_act"], turns=1)
print(len(graphs))
"""


@pytest.mark.slow
def test_the_compiled_rows_are_compiled_for_every_shape():
    """Ten shapes in two layouts, each compiled with and without gradients."""
    done = python("-c", COMPILED)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 10 * 2 * 2


# ---------------------------------------------------------------------------------------- systems
def test_the_table_of_systems_is_what_the_script_computes(plain):
    """The names of all rows, and the numbers of a few; the Markdown table has the same."""
    import systems

    rows = read_csv(ROOT / "results" / "systems.csv")
    every = []
    for data, name, options in systems.systems():
        every.append((data, " ".join([name, *(f"--{k} {v}" for k, v in options.items())])))
    assert [(r["data"], r["system"]) for r in rows] == every
    examples = [
        ("petct", "v1"),
        ("petct", "joint --tasks v1 --skips both"),
        ("petct", "nnunet"),
        ("brain", "v2-rec"),
    ]
    for row in examples:
        i = every.index(row)
        measured = systems.measure(*systems.systems()[i])
        assert {k: str(v) for k, v in measured.items()} == rows[i]
    table = systems.markdown([r | {"parameters": int(r["parameters"])} for r in rows])
    assert table in (ROOT / "results" / "README.md").read_text()


@pytest.mark.parametrize(
    "name,which", [("v1", "training"), ("mf", "training"), ("pet", "prediction")]
)
def test_the_arithmetic_of_a_system_is_that_of_its_convolutions(plain, name, which):
    """Counted in a second way: 2 x voxels x channels in x channels out x size of the kernel."""
    import systems

    counted = []

    def count(module, inputs, output):
        # the grid on which the kernel is applied once per voxel
        grid = inputs[0] if isinstance(module, torch.nn.ConvTranspose3d) else output
        counted.append(2 * module.weight.numel() * grid[0, 0].numel())

    net = MirrorUNet(name) if name == "v1" else build(name)
    net = net.to("meta")
    for m in net.modules():
        if isinstance(m, torch.nn.Conv3d | torch.nn.ConvTranspose3d):
            m.register_forward_hook(count)
    with torch.no_grad():
        net(torch.empty(1, 2, 96, 96, 96, device="meta"))
    expected = round(sum(counted) / 1e9, 2)
    assert systems.measure("petct", name, {})[f"{which} GFLOPs"] == expected


# -------------------------------------------------------------------------------------- make gpu
@pytest.mark.slow
def test_the_gpu_benchmark_runs_dry_and_repeats_nothing(tmp_path):
    """Without a GPU: kernels against float64, a step of each mode; a second call adds no row."""
    command = ["gpu.py", "--dry", "--parts", "step", "predict", "--out", str(tmp_path)]
    done = python(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    table = tmp_path / "gpu_dry.csv"
    rows = read_csv(table)
    assert {row["part"] for row in rows} == {"step", "predict"}
    assert all(float(row["value"]) > 0 and row["unit"] == "ms" for row in rows)
    assert {row["case"].split()[-1] for row in rows} == {"eager", "ours"}
    assert (tmp_path / "gpu_dry.png").stat().st_size > 1000
    before = table.read_text()
    again = python(*command)
    assert again.returncode == 0 and table.read_text() == before
    assert f"{len(rows)} rows, 0 failed" in again.stdout and "predict  " not in again.stdout


def test_the_gpu_benchmark_remembers_failures_and_what_waits(tmp_path, monkeypatch):
    import gpu

    monkeypatch.setattr(gpu, "DRY", True)
    monkeypatch.setattr(gpu, "DEVICE", "cpu")

    def broken():
        raise RuntimeError("no such kernel")

    rows = [("good", lambda: (1.5, "ms", "")), ("bad", broken)]
    table = gpu.Table(tmp_path / "t.csv", deadline=float("inf"))
    table.measure("step", iter(rows))
    assert [row["found"] for row in read_csv(tmp_path / "t.csv")] == ["", "FAILED"]
    late = gpu.Table(tmp_path / "t.csv", deadline=0)
    late.measure("step", iter([*rows, ("new", broken)]))
    assert late.waiting == 2  # "bad" is tried again
    assert [row["case"] for row in late.rows] == ["good"]


@slow
def test_the_gpu_benchmark_checks_the_kernels_and_trainings_dry(tmp_path):
    done = python("gpu.py", "--dry", "--parts", "checks", "training", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_csv(tmp_path / "gpu_dry.csv")
    assert len(rows) == 18 + 2 and all(row["found"] == "ok" for row in rows)
