"""The day a GPU is there: everything about GPUs that cannot be checked without one.

    make gpu                                 25 minutes; a second call continues
    python benchmarks/gpu.py --dry           on a CPU, tiny, kernels in Triton's interpreter
    python benchmarks/gpu.py --parts step    one part: checks, kernels, step, predict, training

Needs torch, triton, numpy, scipy, matplotlib, tqdm, pytest and nibabel. Each row is written to
results/gpu_NAME.csv as soon as it is known: part, case, value, unit, and what was found.

* checks: each kernel against float64 in both layouts and three dtypes, with uninitialized memory
  filled with NaN; without a synchronization; on a side stream; captured in a CUDA graph and
  replayed; the tests of the kernels; under compute-sanitizer, if it is installed.
* kernels: forward and backward pass in ms, ours against eager PyTorch, torch.compile and the time
  of a copy of the input in device memory.
* step, predict: a v3 at 96^3 in every mode (eager, ours, compiled, graph), precision, layout and
  batch size; the step also with its peak memory.
* training: 40 steps of train.py in every mode, whose losses must be those of the eager run; the
  same under torchrun with one process.

Exits with 1 if a check failed. What does not fit into --minutes waits for the next call.
"""

import argparse
import os
import sys

if "--dry" in sys.argv:  # Triton reads it once, when it is imported
    os.environ["TRITON_INTERPRET"] = "1"

import csv
import itertools
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kernels
from losses import MirrorLoss
from mirror_unet import MirrorUNet

ROOT = Path(__file__).resolve().parent.parent
DRY = "--dry" in sys.argv
DEVICE = "cpu" if DRY else "cuda"
SIDE = 32 if DRY else 96
CHANNELS = (2, 2, 4, 4, 4) if DRY else (16, 32, 64, 128, 256)
LAYOUTS = {"NCDHW": torch.contiguous_format, "channels_last": torch.channels_last_3d}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2, "fp16": 4e-3}  # of the largest value
FIELDS = ("device", "torch", "part", "case", "value", "unit", "found")
Row = tuple[str, Callable[[], tuple[float, str, str]]]  # a case, and what measures it


# ---------------------------------------------------------------------------------------- the table
class Table:
    """The CSV file: rows that are in it are not measured again, except for failed ones."""

    def __init__(self, path: Path, deadline: float):
        self.path, self.deadline, self.rows, self.waiting = path, deadline, [], 0
        if path.exists():
            with open(path, newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if row["found"] != "FAILED"]

    def measure(self, part: str, rows: Iterator[Row]) -> None:
        """Measure the rows of a part that are not known yet, while there is time."""
        known = {(row["part"], row["case"]) for row in self.rows}
        for case, run in rows:
            if (part, case) in known:
                continue
            if time.monotonic() > self.deadline:
                self.waiting += 1
                continue
            try:
                value, unit, found = run()
            except Exception as e:  # whatever fails is a row, and the others are still measured
                torch.cuda.set_sync_debug_mode("default") if DEVICE == "cuda" else None
                value, unit, found = float("nan"), "", "FAILED"
                print(f"{part} {case}: {type(e).__name__}: {str(e).strip()[:500]}", flush=True)
            print(f"{part:9} {case:60} {value:10.4g} {unit:8} {found}", flush=True)
            name = "CPU, dry run" if DRY else torch.cuda.get_device_name()
            values = (name, torch.__version__, part, case, f"{value:.6g}", unit, found)
            self.rows.append(dict(zip(FIELDS, values)))
            with open(self.path, "w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                writer.writeheader()
                writer.writerows(self.rows)


def milliseconds(run: Callable[[], object]) -> float:
    """The median time of a call on the device, of at least 10 calls after a warm-up."""
    times = []
    for i in range(1 if DRY else 13):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        if i > 2 or DRY:
            times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph: captured once, after a warm-up on a side stream, then replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# ------------------------------------------------------------------------------------- the kernels
def operations(dtype, layout, side: int) -> dict[str, tuple[Callable, Callable, list[Tensor]]]:
    """Name -> (ours, the reference, tensors that get gradients)."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        x = torch.randn(shape, generator=generator).to(DEVICE, dtype)
        return x.contiguous(memory_format=layout) if x.ndim == 5 else x

    logits, x, residual = (random(2, c, side, side, side) for c in (2, 8, 8))
    label = (torch.rand(2, 1, side, side, side, generator=generator) > 0.9).byte().to(DEVICE)
    weight, bias, slope = (random(n).float() for n in (8, 8, 1))
    corners = torch.randint(0, side - 7, (2, 3, 3), generator=generator)
    given = (weight, bias, slope, residual)

    def shuffle(f):
        return lambda x: f(x, corners.to(x.device), 8, 7)

    def loss(f):
        return lambda x: f(x, label)[0]

    return {
        "dice_ce": (loss(kernels.dice_ce), loss(kernels.dice_ce_ref), [logits]),
        "norm_act": (kernels.norm_act, kernels.norm_act_ref, [x, *given]),
        "voxel_shuffle": (shuffle(kernels.voxel_shuffle), shuffle(kernels.voxel_shuffle_ref), [x]),
    }


def gradients(f: Callable, tensors: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of a weighted sum of it; weights from -1 to 1."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = f(*leaves)
    weights = torch.linspace(-1, 1, y.numel() + 1, device=y.device)[1:].view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, leaves, weights.to(y.dtype))]


def checks() -> Iterator[Row]:
    """Kernels against float64, without synchronization, on a side stream, in a graph; the tests."""
    cases = itertools.product(("dice_ce", "norm_act", "voxel_shuffle"), DTYPES, LAYOUTS)
    for op, dtype, layout in cases:
        ours, reference, tensors = operations(DTYPES[dtype], LAYOUTS[layout], SIDE // 4)[op]

        def exact(ours=ours, reference=reference, tensors=tensors, dtype=dtype):
            expected = gradients(reference, [t.double() for t in tensors])
            torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
            try:
                found = gradients(ours, tensors)
            finally:
                torch.use_deterministic_algorithms(False)
            error = 0.0
            for one, other in zip(found, expected, strict=True):
                assert one.isfinite().all(), "NaN: memory was read before it was written"
                error = max(error, float((one - other).abs().max() / other.abs().max()))
            return error, "of max", "ok" if error < TOLERANCE[dtype] else "FAILED"

        def without_sync(ours=ours, tensors=tensors):
            gradients(ours, tensors)
            torch.cuda.set_sync_debug_mode("error")
            ours(*tensors)
            torch.cuda.set_sync_debug_mode("default")
            return 0.0, "", "ok"

        def elsewhere(ours=ours, tensors=tensors):
            expected = ours(*tensors)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found = ours(*tensors)
            stream.synchronize()
            return 0.0, "", "ok" if torch.equal(found, expected) else "FAILED"

        def replayed(ours=ours, tensors=tensors):
            expected, out = ours(*tensors), []
            replay = captured(lambda: out.append(ours(*tensors)))
            out[-1].zero_()
            replay()
            return 0.0, "", "ok" if torch.equal(out[-1], expected) else "FAILED"

        name = f"{op} {dtype} {layout}"
        yield f"{name}: against float64", exact
        if DEVICE == "cuda":
            yield f"{name}: no synchronization", without_sync
            yield f"{name}: side stream", elsewhere
            yield f"{name}: graph replay", replayed
    if DRY:
        return

    def tests():
        files = [f"tests/test_{n}.py" for n in ("dice_ce", "norm_act", "voxel_shuffle", "kernels")]
        command = [sys.executable, "-m", "pytest", "-q", *files]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        last = done.stdout.strip().rsplit("\n", 1)[-1]
        failed = int((re.search(r"(\d+) failed", last) or [0, 0])[1])
        print(done.stdout[-3000:] if done.returncode else last)
        return failed, "failed", "FAILED" if done.returncode else "ok"

    def sanitized():
        command = ["compute-sanitizer", "--error-exitcode", "1", sys.executable, __file__]
        command += ["--parts", "sanitizer", "--out", tempfile.mkdtemp()]
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout[-3000:] if done.returncode else "")
        return done.returncode, "code", "FAILED" if done.returncode else "ok"

    yield "tests of the kernels", tests
    if shutil.which("compute-sanitizer"):
        yield "compute-sanitizer", sanitized


def kernel_times() -> Iterator[Row]:
    """Forward and backward pass of each kernel: ours, eager, compiled, and a copy of its input."""
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        every = operations(DTYPES[dtype], LAYOUTS[layout], SIDE // 4 if DRY else SIDE)
        for op, (ours, reference, tensors) in every.items():
            functions = {"ours": ours, "eager": reference}
            if not DRY:
                functions["compiled"] = torch.compile(reference, dynamic=False)
            for mode, f in functions.items():

                def timed(f=f, tensors=tensors):
                    torch._dynamo.reset()
                    return milliseconds(lambda: gradients(f, tensors)), "ms", ""

                yield f"{op} {dtype} {layout}: {mode}", timed

            def copy(x=tensors[0]):
                y = torch.empty_like(x)
                return milliseconds(lambda: y.copy_(x)), "ms", ""

            yield f"{op} {dtype} {layout}: copy of the input", copy


# ----------------------------------------------------------------------------- a step, a prediction
def network_times(training: bool) -> Iterator[Row]:
    """A step (or a prediction of one batch) of v3 in every mode, precision, layout, batch size."""
    modes = ("eager", "ours") if DRY else ("eager", "ours", "compiled", "graph")
    precisions = ("fp32", "bf16") if DRY else ("fp32", "tf32", "bf16", "fp16")
    for batch, amp, layout, mode in itertools.product((1, 2, 4, 8), precisions, LAYOUTS, modes):
        if DRY and (batch > 1 or amp != "fp32"):
            continue

        def timed(batch=batch, amp=amp, layout=layout, mode=mode, memory=False):
            run = network(training, batch, amp, LAYOUTS[layout], mode)
            if not memory:
                return milliseconds(run), "ms", ""
            torch.cuda.reset_peak_memory_stats()
            run()
            return torch.cuda.max_memory_allocated() / 2**20, "MiB", ""

        case = f"batch {batch} {amp} {layout} {mode}"
        yield case, timed
        if training and mode in ("eager", "ours") and not DRY:
            yield f"{case}: peak memory", lambda timed=timed: timed(memory=True)
    kernels.use("")


def network(training: bool, batch: int, amp: str, layout, mode: str) -> Callable[[], object]:
    """A call that does one step, or predicts one batch of windows."""
    torch._dynamo.reset()
    # Dry, a network takes the plain path: in the interpreter it would take minutes.
    kernels.use("plain" if DRY or mode in ("eager", "compiled") else "auto")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = amp == "tf32"
    torch.manual_seed(0)
    model = MirrorUNet("v3", channels=CHANNELS).to(DEVICE, memory_format=layout)
    x = torch.rand(batch, 2, SIDE, SIDE, SIDE, device=DEVICE).contiguous(memory_format=layout)
    targets = {"ct": x[:, :1], "pet": x[:, 1:], "seg": (x[:, 1:] > 0.9).byte()}
    targets["tumor"] = torch.ones(batch, device=DEVICE)
    loss = MirrorLoss("v3")
    dtype = DTYPES.get(amp, torch.float32)
    cache = mode != "graph"  # weights that autocast has cast belong to a graph's memory
    half = torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32, cache_enabled=cache)
    forward = torch.compile(model, dynamic=False) if mode == "compiled" else model
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, capturable=mode == "graph")

    def step():
        optimizer.zero_grad(set_to_none=True)
        with half:
            outputs = forward(x)
        loss(outputs, targets)[0].backward()
        optimizer.step()

    @torch.no_grad()
    def predict():
        with half:
            return model.segment(x[:, 1:]).seg

    if not training:
        model.eval()
    run = step if training else predict
    return captured(run) if mode == "graph" else run


# -------------------------------------------------------------------------------------- a training
def trainings() -> Iterator[Row]:
    """40 steps of train.py in every mode, compared with the first: eager, in float32."""
    folder = Path(tempfile.mkdtemp())
    common = "--data phantom --phantoms 6 --steps 40 --validations 1 --model v3".split()
    common += ["--cache", str(folder / "cache"), "--device", DEVICE]
    if DRY:
        common += "--steps 2 --patch 32 32 32 --channels 2 2 4 4 4 --spacing 12 12 12".split()
    modes = {"eager": "--kernels plain", "ours": ""}
    if not DRY:
        modes |= {"channels_last": "--channels-last", "compiled": "--compile", "bf16": "--amp bf16"}
        modes |= {"fp16": "--amp fp16", "torchrun of one": ""}
        if (ROOT / "graph.py").exists():
            modes["graph"] = "--graph"
    first: list[float] = []
    for mode, options in modes.items():

        def run(mode=mode, options=options):
            out = folder / mode.replace(" ", "_")
            program = [sys.executable, str(ROOT / "train.py")]
            if mode.startswith("torchrun"):
                program = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1"]
                program.append(str(ROOT / "train.py"))
            command = [*program, *common, "--out", str(out), *options.split()]
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(done.stderr[-500:])
            log = [json.loads(line) for line in open(out / "metrics.jsonl")]
            losses = [row["loss"] for row in log if "loss" in row]
            first.extend([] if first else losses)
            error = max(abs(a - b) / abs(b) for a, b in zip(losses, first, strict=True))
            limit = 0.05 if "16" in mode else 0.01  # rounding grows from step to step
            return error, "of loss", "ok" if error < limit else "FAILED"

        yield mode, run


PARTS = {
    "checks": checks,
    "kernels": kernel_times,
    "training": trainings,
    "step": lambda: network_times(True),
    "predict": lambda: network_times(False),
}
# Under compute-sanitizer a kernel takes minutes: the comparison with float64 alone.
SANITIZER = {"sanitizer": lambda: (row for row in checks() if row[0].endswith("float64"))}


def draw(rows: list[dict], path: Path) -> None:
    """Bars: a step of v3 in each mode, channels_last, batch 2 (or what there is)."""
    chosen = [r for r in rows if r["part"] == "step" and r["unit"] == "ms"]
    chosen = [r for r in chosen if r["case"].startswith("batch 2")] or chosen
    if not chosen:
        return
    figure = Figure(figsize=(8, 0.25 * len(chosen) + 1.2))
    axis = figure.subplots()
    axis.barh([r["case"] for r in chosen], [float(r["value"]) for r in chosen], color="#0072B2")
    axis.set(xlabel="time of a training step (ms)", title=chosen[0]["device"])
    axis.invert_yaxis()
    figure.savefig(path, bbox_inches="tight", dpi=120)


def main() -> None:
    """Measure what is not known yet; exit with 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="on a CPU: tiny, to see that it works")
    parser.add_argument("--parts", nargs="+", choices=PARTS | SANITIZER, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=25, help="begin nothing new after that")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the table")
    args = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU here; --dry tries the script on a CPU")
    name = "dry" if DRY else re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower()
    args.out.mkdir(parents=True, exist_ok=True)
    table = Table(args.out / f"gpu_{name}.csv", time.monotonic() + 60 * args.minutes)
    for part in args.parts:
        table.measure(part, (PARTS | SANITIZER)[part]())
    draw(table.rows, table.path.with_suffix(".png"))
    failed = sum(row["found"] == "FAILED" for row in table.rows)
    later = f", {table.waiting} wait for the next call" if table.waiting else ""
    print(f"{table.path}: {len(table.rows)} rows, {failed} failed{later}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
