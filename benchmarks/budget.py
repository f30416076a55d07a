"""A kernel budget: what each launch of a kernel takes on four GPUs, compiled without any GPU.

    python benchmarks/budget.py [--targets sm_90 ...] [--match REGEX] [--csv results/budget.csv]

Columns: registers per thread, bytes spilled, shared memory per program, and the widths in bits of
global loads and stores, widest..narrowest. Exits with 1 if a kernel spills or does not compile (its
numbers are then -1), or if its widest load or store is narrower than the layout allows: 128 bits,
or what a launch states as "vector_bits" (one number, or one for loads and one for stores; 0: not
checked).
"""

import os
import sys

if os.environ.get("TRITON_INTERPRET"):  # the interpreter does not compile; Triton reads this once
    os.environ.pop("TRITON_INTERPRET")
    os.execv(sys.executable, [sys.executable, *sys.argv])

import argparse
import csv
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TARGETS = {  # name: Triton's backend and architecture, threads per warp
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
OTHERS = {  # for `--targets` and versions.sh
    "sm_75": ("cuda", 75, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx90a": ("hip", "gfx90a", 64),
    "gfx950": ("hip", "gfx950", 64),
    "gfx1100": ("hip", "gfx1100", 32),
}
LAYOUTS = {"NCDHW": torch.contiguous_format, "channels_last": torch.channels_last_3d}
VECTOR_BITS = {  # of (loads, stores), if not 128
    # kernels that work on a few sums per instance
    "_finish_kernel": (0, 0),
    "_merge_stats": (0, 0),
    "_merge_sums": (0, 0),
    # kernels that read the volume and write only such sums
    "_sums_kernel": (128, 0),
}
# Three adjacent channels per voxel, and channels of 6^3 voxels: not all of a thread's addresses are
# known to be multiples of 16 bytes.
UNALIGNED = re.compile(r"dice_ce .*C=3 .*channels_last|norm_act.* NCDHW 6\^3")
FIELDS = (
    "kernel", "target", "registers", "spilled", "shared",
    "load_widest", "load_narrowest", "store_widest", "store_narrowest",
)


# ----------------------------------------------------------------------------------- the launches
# Each function returns launches as {"name", "kernel", "arguments"[, "vector_bits"]}. The tensors
# have shapes but no memory (device "meta"), so that no GPU is needed.
def dice_ce_launches() -> list[dict]:
    """The launches of dice_ce: float32 and bfloat16, both layouts, 2 to 32 classes, sigmoid."""
    dice_ce = import_module("kernels.dice_ce")
    layouts = {"ncdhw": torch.contiguous_format, "channels_last": torch.channels_last_3d}
    dtypes = (torch.float32, torch.bfloat16)
    cases = [(c, False) for c in (2, 3, 4, 8, 32)] + [(c, True) for c in (1, 3)]
    grad_output = torch.empty((), device="meta")
    launches = []
    for dtype, (layout, memory_format), case in product(dtypes, layouts.items(), cases):
        c, sigmoid = case
        logits = torch.empty(2, c, 96, 96, 96, dtype=dtype, device="meta")
        logits = logits.to(memory_format=memory_format)
        target = torch.empty_like(logits if sigmoid else logits[:, 0], dtype=torch.uint8)
        coefficients = torch.empty(3, c, device="meta")
        sums = dice_ce._sums_launch(logits, target, None)
        grad = dice_ce._grad_launch(grad_output, logits, target, coefficients, None)
        steps = {"sums": sums, "grad": grad}
        if dtype == torch.float32 and layout == "ncdhw":
            partials = sums[2]["partials"].flatten(2).unsqueeze(2)  # (4 or 5, C, 1, B programs)
            settings = (False, 1e-5, 1e-5, 1.0, 1.0, 1)
            steps["finish"] = dice_ce._finish_launch(partials, None, dtype, *settings)
        for step, (kernel, _, arguments) in steps.items():
            kind = f"{step} sigmoid" if sigmoid else step
            name = f"dice_ce {kind} C={c} {short(dtype)} {layout}"
            arguments = arguments | {"num_warps": dice_ce.WARPS}
            launches.append({"name": name, "kernel": kernel, "arguments": arguments})
    return launches


def norm_act_launches() -> list[dict]:
    """The launches of norm_act: float32 and bfloat16, both layouts, channels of every level.

    Small instances take one launch forward and two backward, others three, and one more forward
    launch if the statistics are known.
    """
    norm_act = import_module("kernels.norm_act")
    sizes = ((1, 96), (2, 96), (16, 48), (64, 24), (256, 16), (64, 12), (256, 6))
    launches = []
    for dtype, layout, (c, side) in product((torch.float32, torch.bfloat16), LAYOUTS, sizes):
        x = torch.empty((2, c, side, side, side), dtype=dtype, device="meta")
        x = x.to(memory_format=LAYOUTS[layout])
        weight = bias = torch.empty(c, device="meta")
        slope = torch.empty(1, device="meta")
        _, stats = norm_act._forward_outputs(x)
        given = (x, weight, bias, slope)
        steps = norm_act._forward_launches(1.0, 1e-5, *given, x)
        if len(steps) == 1:
            steps += norm_act._forward_launches(1.0, 1e-5, *given, x, stats)
        steps += norm_act._backward_launches(1.0, x, *given, stats)
        for kernel, _, arguments in steps:
            name = kernel.__name__
            bits = VECTOR_BITS.get(name, (128, 128))
            if not arguments.get("WRITE", True):  # it writes only sums
                name, bits = {"_forward": "_tile_stats"}.get(name, "_tile_sums"), (128, 0)
            elif arguments.get("REDUCE"):
                name += " whole"
            name = f"norm_act{name} {short(dtype)} {layout} {side}^3 C={c}"
            launch = {"name": name, "kernel": kernel, "arguments": arguments}
            launches.append(launch | {"vector_bits": bits})
    return launches


def voxel_shuffle_launches() -> list[dict]:
    """The launches of voxel_shuffle: elements of 1, 2 and 4 bytes, both layouts, a strided view."""
    voxel_shuffle = import_module("kernels.voxel_shuffle")
    cubes = torch.empty(2, 3 * 3 + 1, dtype=torch.int64, device="meta")
    cases = [(dtype, name, True) for dtype in (torch.float32, torch.bfloat16) for name in LAYOUTS]
    cases += [(torch.uint8, "NCDHW", True), (torch.float32, "NCDHW", False)]
    launches = []
    for dtype, layout, dense in cases:
        x = torch.empty(2, 2, 96, 96, 96, dtype=dtype, device="meta")
        x = x.to(memory_format=LAYOUTS[layout])
        y = torch.empty_like(x)
        if not dense:
            x = torch.empty(2, 2, 96, 96, 192, dtype=dtype, device="meta")[..., ::2]
        bits = 8 * x.element_size()
        name = f"voxel_shuffle i{bits} {layout}" + ("" if dense else " strided")
        kernel, _, arguments = voxel_shuffle._launch(x, y, cubes, 16, False)
        launch = {"name": name, "kernel": kernel, "arguments": arguments}
        # Strided views are read element by element, and bytes eight at a time.
        launch["vector_bits"] = (128 if dense else bits, 128) if bits > 8 else (64, 64)
        launches.append(launch)
    return launches


LAUNCHES = {
    "dice_ce": dice_ce_launches,
    "norm_act": norm_act_launches,
    "voxel_shuffle": voxel_shuffle_launches,
}


def short(dtype: torch.dtype) -> str:
    """The name of a dtype: "float32"."""
    return str(dtype).removeprefix("torch.")


# -------------------------------------------------------------------------- compiled, and measured
def budget(op: str, index: int, target: str) -> dict:
    """Compile one launch of an operation for one target.

    Returns a row of the table, with "wanted" (bits of loads and of stores) and "ok".
    """
    launch = LAUNCHES[op]()[index]
    name, kernel = launch["name"], launch["kernel"]
    try:
        registers, spilled, shared, loads, stores = compiled(kernel, launch["arguments"], target)
    except Exception as e:  # the compiler has errors of many kinds; the others are still compiled
        print(f"{name} {target}: {type(e).__name__}: {str(e).strip()[:200]}", file=sys.stderr)
        registers, spilled, shared, loads, stores = -1, -1, -1, [], []
    values = (name, target, registers, spilled, shared, *extremes(loads), *extremes(stores))
    row = dict(zip(FIELDS, values))
    wanted = launch.get("vector_bits", VECTOR_BITS.get(kernel.__name__, (128, 128)))
    if UNALIGNED.match(name):
        wanted = (0, 0)
    if isinstance(wanted, int):
        wanted = (wanted, wanted)
    wide = row["load_widest"] >= wanted[0] and row["store_widest"] >= wanted[1]
    return row | {"ok": spilled == 0 and wide, "wanted": wanted}


def compiled(kernel, arguments: dict, target: str) -> tuple[int, int, int, list[int], list[int]]:
    """Compile a launch with these arguments.

    Returns registers, bytes spilled, shared memory, and the widths in bits of loads and of stores.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    source = ASTSource(fn=kernel, **specialized(kernel, arguments))
    options = {"num_warps": arguments.get("num_warps", 4)}
    code = compile(source, target=GPUTarget(*(TARGETS | OTHERS)[target]), options=options)
    read = nvidia if target.startswith("sm_") else amd
    registers, spilled, loads, stores = read(code.asm)
    return registers, spilled, code.metadata.shared, loads, stores


def specialized(kernel, arguments: dict) -> dict:
    """Signature, constants and alignments, as Triton derives them from the arguments of a launch.

    The integer 1 becomes a constant. Multiples of 16 are marked, and so are pointers, which
    PyTorch aligns.
    """
    constexprs = {}
    attrs = {}

    def describe(path: tuple, value, constant: bool, annotation: str):
        """The type of one argument; notes constants and alignments on the way."""
        if isinstance(value, tuple):
            pairs = enumerate(value)
            return tuple(describe((*path, i), v, constant, annotation) for i, v in pairs)
        if constant or value is None or isinstance(value, int) and value == 1:
            constexprs[path] = value
            return "constexpr"
        if isinstance(value, float):
            return annotation or "fp32"
        if not isinstance(value, int) or value % 16 == 0:
            attrs[path] = [["tt.divisibility", 16]]
        if isinstance(value, int):
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        # uint8 -> *u8, bfloat16 -> *bf16, float32 -> *fp32, int64 -> *i64
        name = short(value.dtype).replace("uint", "u").replace("bfloat", "bf")
        return "*" + name.replace("float", "fp").replace("int", "i")

    signature = {}
    for p in kernel.params:
        value = arguments.get(p.name, p.default)
        signature[p.name] = describe((p.num,), value, p.is_constexpr, p.annotation_type)
    return {"signature": signature, "constexprs": constexprs, "attrs": attrs}


def extremes(widths: list[int]) -> tuple[int, int]:
    """Widest and narrowest; 0 if there are none."""
    return max(widths, default=0), min(widths, default=0)


def nvidia(asm: dict) -> tuple[int, int, list[int], list[int]]:
    """(registers, bytes spilled, widths of loads, of stores) of the machine code and its PTX."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        command = [tool, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def number(name: str) -> int:
        """A number of the tool's report."""
        return int(re.search(rf"\b{name}:(\d+)", usage).group(1))

    def widths(access: str) -> list[int]:
        """Bits of each global access in the PTX: elements of the vector times bits of one."""
        pattern = rf"\b{access}\.global[.\w:]*?(?:\.v(\d))?\.[busf](\d+)\b"
        return [int(n or 1) * int(bits) for n, bits in re.findall(pattern, asm["ptx"])]

    # Spilled registers go to the stack, which our kernels use for nothing else. (A second run of
    # ptxas would need Triton's own options to spill in the same places.)
    return number("REG"), number("STACK") + number("LOCAL"), widths("ld"), widths("st")


AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}
AMD_BITS |= {f"b{bits}": bits for bits in (8, 16, 32, 64, 96, 128)}  # RDNA 3's names: load_b128,
AMD_BITS |= {kind + str(bits): bits for kind in "iu" for bits in (8, 16)}  # load_u8, ...


def amd(asm: dict) -> tuple[int, int, list[int], list[int]]:
    """The same from AMD's assembly.

    Spilled scalar registers count too, though they go to vector registers, not to memory.
    """
    text = asm["amdgcn"]

    def number(name: str) -> int:
        """A number of the kernel's metadata."""
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    def widths(access: str) -> list[int]:
        """Bits of each global access."""
        size = r"[su]?(dwordx?\d?|short|byte|[biu]\d+)\b"
        pattern = rf"\b(?:global|flat|buffer)_{access}_(?:d16_)?(?:hi_)?{size}"
        return [AMD_BITS[word] for word in re.findall(pattern, text)]

    spilled = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    return number("vgpr_count"), spilled, widths("load"), widths("store")


# -------------------------------------------------------------------------------------- the table
def table(targets=tuple(TARGETS), match: str = "") -> list[dict]:
    """One row per target and launch whose name matches; compiled in one process per core."""
    jobs = []
    for op, launches in LAUNCHES.items():
        for i, launch in enumerate(launches()):
            if re.search(match, launch["name"]):
                jobs += [(op, i, target) for target in targets]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return list(pool.map(budget, *zip(*jobs), chunksize=4))


COUNT = """
from traffic import table, torch
rows, _ = table(("dice_ce", "norm_act"), ("ours Triton",), (torch.float32,), ("NCDHW",))
for r in rows:
    counts = r["forward_launches"], r["backward_launches"]
    print("launches of", r["op"], "forward {} backward {}".format(*counts))
"""


def counted_launches() -> str:
    """The number of launches of dice_ce and norm_act, counted by the interpreter in a process."""
    command = [sys.executable, "-c", COUNT]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    if done.returncode:  # for example Triton 3.6, whose interpreter does not work with NumPy 2.4
        reason = done.stderr.strip().split("\n")[-1]
        return f"launches were not counted, because Triton's interpreter failed: {reason}\n"
    return done.stdout


def main() -> None:
    """Compile, print and write the table; exit with 1 if a kernel is over budget."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS | OTHERS, default=list(TARGETS))
    parser.add_argument("--match", default="", help="only kernels whose name matches this regex")
    parser.add_argument("--csv", help="also write the table to this file")
    parser.add_argument("--no-launches", action="store_true", help="do not count launches")
    args = parser.parse_args()
    rows = table(args.targets, args.match)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    line = "{:48} {:7} {:>5} {:>6} {:>7} {:>10} {:>10}"
    print(line.format("kernel", "target", "regs", "spill", "shared", "loads", "stores"))
    for r in rows:
        loads = f"{r['load_widest']}..{r['load_narrowest']}"
        stores = f"{r['store_widest']}..{r['store_narrowest']}"
        numbers = (r["registers"], r["spilled"], r["shared"], loads, stores)
        warning = f"   <- wanted no spills, loads and stores of {r['wanted']} bits"
        text = line.format(r["kernel"], r["target"], *numbers)
        print(text if r["ok"] else text + warning)
    if not args.no_launches:
        print(counted_launches(), end="")
    failed = sum(not r["ok"] for r in rows)
    print(f"{len(rows)} kernels compiled, {failed} over budget")
    sys.exit(1 if failed or not rows else 0)


if __name__ == "__main__":
    main()
