"""Time, bandwidth and memory of the three operations, ours and the peers'; on a GPU if there is one, else the plain paths on the CPU.

    python benchmarks/kernels.py [--quick] [--csv results/kernels.csv] [--op dice_ce ...]

Each row: one op, shape, dtype, layout, pass (fwd, bwd, full) and contender. Contenders take turns, and a row's time is the median of
its turns; `ratio` is that time over ours (above 1: ours is faster). On a GPU also `share`, the bandwidth of the bytes that the maths
needs (the least, whatever the contender really moves) over that of a device-to-device copy, and `peak_mib`, the memory that a call
allocates on top of its inputs. Rows are appended to the CSV with the device's name, versions and commit.
"""

import argparse
import csv
import platform
import statistics
import subprocess
import time
from math import prod
from pathlib import Path

import torch
from peers import INSTALL, LAYOUTS, OPS, arguments, contenders

# Shapes of this model: the logits, features of the levels (16 channels at full resolution, 64 two levels down), the CT input.
SHAPES = {
    "dice_ce": [(2, 2, 96, 96, 96)],
    "norm_act": [(2, 16, 96, 96, 96), (2, 64, 24, 24, 24)],
    "norm_act+residual": [(2, 16, 96, 96, 96)],
    "voxel_shuffle": [(2, 1, 96, 96, 96)],
}
QUICK = {op: [(2, shapes[0][1], 16, 16, 16)] for op, shapes in SHAPES.items()}
FIELDS = ("device", "torch", "triton", "commit", "op", "shape", "dtype", "layout", "pass", "what", "ms", "ratio", "share", "peak_mib")

RESULTS = Path(__file__).resolve().parent.parent / "results"


def least_bytes(op: str, shape: tuple, item: int) -> dict[str, int]:
    """Bytes that each pass has to move: see the heads of the kernel files."""
    n = prod(shape)
    if op == "dice_ce":  # logits and uint8 labels, twice; the gradient
        forward = n * item + n // shape[1]
        backward = forward + n * item
    elif op == "voxel_shuffle":
        forward = backward = 2 * n * item
    else:  # x twice, y; x and dy twice, dx
        forward, backward = (3 + op.endswith("residual")) * n * item, 5 * n * item
    return {"fwd": forward, "bwd": backward, "full": forward + backward}


def passes(function, args: tuple) -> dict:
    """{"fwd", "bwd", "full"}: calls without arguments. The graph of "bwd" is kept from one call to the next."""
    trained = [a for a in args if a.requires_grad]
    y = function(*args)
    upstream = torch.ones_like(y) if y.dim() == 0 else torch.randn_like(y)

    def forward():
        with torch.no_grad():
            return function(*args)

    return {
        "fwd": forward,
        "bwd": lambda: torch.autograd.grad(y, trained, upstream, retain_graph=True),
        "full": lambda: torch.autograd.grad(function(*args), trained, upstream),
    }


def milliseconds(call, cuda: bool) -> float:
    """One call on a CPU; on a GPU the median of many, with a cold cache."""
    if not cuda:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    from triton.testing import do_bench

    return do_bench(call, return_mode="median")  # flushes the cache between calls


def peak_mib(call) -> float:
    """The most GPU memory that a call holds on top of what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_bandwidth() -> float:
    """Bytes a millisecond of a device-to-device copy of 1 GiB, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / milliseconds(lambda: target.copy_(source), True)


def run(shapes: dict, ops=OPS, turns: int = 7, compiled: bool = True) -> tuple[list[dict], list[str]]:
    """(rows, peers not installed)."""
    cuda = torch.cuda.is_available()
    device, dtypes = ("cuda", (torch.float32, torch.bfloat16)) if cuda else ("cpu", (torch.float32,))
    copy = copy_bandwidth() if cuda else None
    rows, missing = [], []
    for op in ops:
        functions, absent = contenders(op)
        missing += absent
        functions.pop("ours plain" if cuda else "ours Triton")
        ours = next(iter(functions))
        if compiled and op != "voxel_shuffle":
            functions["torch.compile"] = torch.compile(functions["eager"])
        for shape in shapes[op]:
            for dtype in dtypes:
                least = least_bytes(op, shape, dtype.itemsize)
                for layout in LAYOUTS:
                    args = arguments(op, shape, dtype, layout, device)
                    calls = {name: passes(function, args) for name, function in functions.items()}
                    for kind in ("fwd", "bwd", "full"):
                        for call in calls.values():
                            call[kind]()  # warm up, compile
                        times = {name: [] for name in calls}
                        for _ in range(1 if cuda else turns):  # do_bench repeats by itself
                            for name, call in calls.items():
                                times[name].append(milliseconds(call[kind], cuda))
                        median = {name: statistics.median(t) for name, t in times.items()}
                        for name, ms in median.items():
                            row = {"op": op, "shape": "x".join(map(str, shape)), "dtype": str(dtype)[6:], "layout": layout, "pass": kind}
                            row |= {"what": name, "ms": round(ms, 4), "ratio": round(ms / median[ours], 3)}
                            if cuda:
                                row |= {"share": round(least[kind] / ms / copy, 3), "peak_mib": round(peak_mib(calls[name][kind]), 2)}
                            rows.append(row)
    return rows, missing


def place() -> dict:
    """Where the rows were measured."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = ""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"device": device, "torch": torch.__version__, "triton": triton_version, "commit": commit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few turns, no torch.compile: does it run?")
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--csv", default=str(RESULTS / "kernels.csv"), help="rows are appended here; '' for none")
    args = parser.parse_args()
    rows, missing = run(QUICK, args.op, turns=2, compiled=False) if args.quick else run(SHAPES, args.op)
    where = place()
    print(", ".join(f"{k} {v}" for k, v in where.items()))
    print(f"{'op':18} {'shape':14} {'dtype':9} {'layout':14} {'pass':5} {'what':14} {'ms':>9} {'ratio':>7} {'share':>6} {'MiB':>8}")
    for r in rows:
        gpu = f"{r['share']:6.2f} {r['peak_mib']:8.1f}" if "share" in r else ""
        head = f"{r['op']:18} {r['shape']:14} {r['dtype']:9} {r['layout']:14} {r['pass']:5} {r['what']:14}"
        print(f"{head} {r['ms']:9.3f} {r['ratio']:7.2f} {gpu}")
    if missing:
        print(INSTALL)
    if args.csv:
        path = Path(args.csv)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            writer.writerows(where | r for r in rows)


if __name__ == "__main__":
    main()
