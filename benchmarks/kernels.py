"""Time, bandwidth and memory of the three operations, ours and the peers'.

    python benchmarks/kernels.py [--quick] [--csv results/kernels.csv] [--op dice_ce ...]

Runs on a GPU if there is one, else the plain paths on the CPU. Each row is one op, shape, dtype,
layout, pass (fwd, bwd, full) and contender. Contenders take turns, and a row's time is the median
of its turns; `ratio` is that time over ours (above 1: ours is faster). On a GPU also: `share`, the
bandwidth over that of a device-to-device copy, computed from the bytes that the maths needs (the
least, whatever the contender really moves); `peak_mib`, the memory that a call allocates on top of
its inputs; `graph_ms`, the time of a CUDA graph of the call, which the host cannot slow down (empty
if the call waits for the GPU, which a graph cannot hold). Rows are appended to the CSV with the
device's name, versions and commit.
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

# Shapes of this model: the logits, the features of its levels (16 channels at full resolution, 64
# two levels down), the CT input.
SHAPES = {
    "dice_ce": [(2, 2, 96, 96, 96)],
    "norm_act": [(2, 16, 96, 96, 96), (2, 64, 24, 24, 24)],
    "norm_act+residual": [(2, 16, 96, 96, 96)],
    "voxel_shuffle": [(2, 1, 96, 96, 96)],
}
QUICK = {op: [(2, shapes[0][1], 16, 16, 16)] for op, shapes in SHAPES.items()}
FIELDS = (
    "device", "torch", "triton", "commit", "op", "shape", "dtype", "layout", "pass", "what",
    "ms", "ratio", "share", "peak_mib", "graph_ms",
)

RESULTS = Path(__file__).resolve().parent.parent / "results"


def least_bytes(op: str, shape: tuple, item: int) -> dict[str, int]:
    """Bytes that each pass has to move; item: bytes per element. See the heads of the kernels."""
    n = prod(shape)
    if op == "dice_ce":  # logits and uint8 labels, twice; the gradient
        forward = n * item + n // shape[1]
        backward = forward + n * item
    elif op == "voxel_shuffle":  # one read and one write
        forward = backward = 2 * n * item
    else:  # x twice, y (and the residual); x and the gradient of y twice, the gradient of x
        forward = (3 + op.endswith("residual")) * n * item
        backward = 5 * n * item
    return {"fwd": forward, "bwd": backward, "full": forward + backward}


def passes(function, args: tuple) -> dict:
    """{"fwd", "bwd", "full"}: calls without arguments. All "bwd" calls use the same graph."""
    trained = [a for a in args if a.requires_grad]
    y = function(*args)
    grad_output = torch.ones_like(y) if y.dim() == 0 else torch.randn_like(y)

    def forward():
        """The result, without a graph."""
        with torch.no_grad():
            return function(*args)

    def backward():
        """The gradients of an earlier result."""
        return torch.autograd.grad(y, trained, grad_output, retain_graph=True)

    def full():
        """The result with its graph, then the gradients."""
        return torch.autograd.grad(function(*args), trained, grad_output)

    return {"fwd": forward, "bwd": backward, "full": full}


def milliseconds(call, cuda: bool) -> float:
    """Time of one call on a CPU; on a GPU the median of many, with a cold cache."""
    if not cuda:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    from triton.testing import do_bench

    return do_bench(call, return_mode="median")  # flushes the cache between calls


def peak_mib(call) -> float:
    """The most GPU memory, in MiB, that a call holds on top of what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def graph_milliseconds(function, args: tuple) -> dict[str, float | str]:
    """Times of the three passes as CUDA graphs; "" for a pass that cannot be captured."""
    times = {}
    stream = torch.cuda.Stream()  # of all, because backward runs on the stream of forward
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for which, call in passes(function, args).items():
            for _ in range(3):
                call()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=stream):
                    call()
                times[which] = round(milliseconds(graph.replay, True), 4)
            except RuntimeError:
                times[which] = ""
    torch.cuda.current_stream().wait_stream(stream)
    return times


def copy_bandwidth() -> float:
    """Bytes per millisecond of a device-to-device copy of 1 GiB, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / milliseconds(lambda: target.copy_(source), True)


def run(shapes: dict, ops=OPS, turns: int = 7, compiled: bool = True) -> tuple[list, list[str]]:
    """Measure every combination. Returns (rows, names of peers that are not installed)."""
    cuda = torch.cuda.is_available()
    dtypes = (torch.float32, torch.bfloat16) if cuda else (torch.float32,)
    bandwidth = copy_bandwidth() if cuda else None
    rows, missing = [], []
    for op in ops:
        functions, absent = contenders(op)
        missing += absent
        functions.pop("ours plain" if cuda else "ours Triton")
        if compiled and op != "voxel_shuffle":
            functions["torch.compile"] = torch.compile(functions["eager"], dynamic=False)
        for shape in shapes[op]:
            for dtype in dtypes:
                least = least_bytes(op, shape, dtype.itemsize)
                for layout in LAYOUTS:
                    row = {"op": op, "shape": "x".join(map(str, shape))}
                    row |= {"dtype": str(dtype).removeprefix("torch."), "layout": layout}
                    args = arguments(op, shape, dtype, layout, "cuda" if cuda else "cpu")
                    torch._dynamo.reset()  # after eight recompilations it would run eager code
                    measured = compare(functions, args, least, turns, bandwidth)
                    rows += [row | one for one in measured]
    return rows, missing


def compare(functions: dict, args: tuple, least: dict, turns: int, bandwidth: float | None) -> list:
    """Rows of each pass and contender for the same arguments; the first contender is ours.

    least: bytes per pass; bandwidth: of a copy, in bytes per millisecond, or None on a CPU.
    """
    cuda = bandwidth is not None
    calls = {name: passes(function, args) for name, function in functions.items()}
    graphs = {}
    if cuda:
        graphs = {name: graph_milliseconds(f, args) for name, f in functions.items()}
    rows = []
    for which in ("fwd", "bwd", "full"):
        for call in calls.values():
            call[which]()  # warm up, compile
        times = {name: [] for name in calls}
        for _ in range(1 if cuda else turns):  # do_bench repeats by itself
            for name, call in calls.items():
                times[name].append(milliseconds(call[which], cuda))
        medians = {name: statistics.median(t) for name, t in times.items()}
        ours = next(iter(medians.values()))
        for name, ms in medians.items():
            row = {"pass": which, "what": name, "ms": round(ms, 4), "ratio": round(ms / ours, 3)}
            if cuda:
                row["share"] = round(least[which] / ms / bandwidth, 3)
                row["peak_mib"] = round(peak_mib(calls[name][which]), 2)
                row["graph_ms"] = graphs[name][which]
            rows.append(row)
    return rows


def place() -> dict:
    """Where the rows were measured: device, versions and commit."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = ""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "triton": triton_version}
    return {"device": device, **versions, "commit": commit}


def main() -> None:
    """Measure, print the table and append it to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    quick = "tiny shapes, few turns, no torch.compile: only to see that it runs"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    out = "rows are appended here; '' for none"
    parser.add_argument("--csv", default=str(RESULTS / "kernels.csv"), help=out)
    args = parser.parse_args()
    if args.quick:
        rows, missing = run(QUICK, args.op, turns=2, compiled=False)
    else:
        rows, missing = run(SHAPES, args.op)
    where = place()
    print(", ".join(f"{k} {v}" for k, v in where.items()))
    left = "{:18} {:14} {:9} {:14} {:5} {:14}"
    head = left.format("op", "shape", "dtype", "layout", "pass", "what")
    print(f"{head} {'ms':>9} {'ratio':>7} {'share':>6} {'MiB':>8} {'graph ms':>9}")
    for r in rows:
        gpu = ""
        if "share" in r:
            gpu = f"{r['share']:6.2f} {r['peak_mib']:8.1f} {r['graph_ms']:>9}"
        head = left.format(r["op"], r["shape"], r["dtype"], r["layout"], r["pass"], r["what"])
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
