"""A kernel budget: every kernel compiled ahead of time for four GPUs, without a GPU, and what each launch of it takes.

    python benchmarks/budget.py [--targets sm_90 ...] [--match REGEX] [--csv results/budget.csv]

Columns: registers a thread, bytes spilled, shared memory a program, widths in bits of global loads and stores, widest..narrowest.
Exits with 1 where a kernel spills, or where its widest load or store is narrower than the layout allows: 128 bits, or what its
spec says under "vector_bits" (one number, or one for loads and one for stores; 0: not looked at).
"""

import os
import sys

if os.environ.get("TRITON_INTERPRET"):  # there is nothing to compile in the interpreter, and the choice is made when triton is imported
    os.environ.pop("TRITON_INTERPRET")
    os.execv(sys.executable, [sys.executable, *sys.argv])

import argparse  # noqa: E402
import csv  # noqa: E402
import re  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
from concurrent.futures import ProcessPoolExecutor  # noqa: E402
from importlib import import_module  # noqa: E402
from multiprocessing import get_context  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FILES = ("dice_ce", "norm_act", "voxel_shuffle")
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}
# (loads, stores) of kernels that work on a few sums an instance, and of those that read the volume and write only such sums.
NARROW = {"_finish_kernel": (0, 0), "_merge_stats": (0, 0), "_merge_sums": (0, 0)}
NARROW |= {"_sums_kernel": (128, 0), "_tile_stats": (128, 0), "_tile_sums": (128, 0)}
ODD = re.compile(r"dice_ce .*C=3 .*channels_last")  # three channels a voxel side by side: a thread's voxels are no whole vectors
FIELDS = ("kernel", "target", "registers", "spilled", "shared", "load_widest", "load_narrowest", "store_widest", "store_narrowest")


def budget(file: str, index: int, target: str) -> dict:
    """Compile one spec of one file for one target: a row of the table, with "wanted" and "ok"."""
    spec = import_module(f"kernels.{file}").compile_specs()[index]
    registers, spilled, shared, loads, stores = compiled(spec["kernel"], spec["arguments"], target)
    row = dict(zip(FIELDS, (spec["name"], target, registers, spilled, shared, *extremes(loads), *extremes(stores))))
    wanted = spec.get("vector_bits", 0 if ODD.match(spec["name"]) else NARROW.get(spec["kernel"].__name__, 128))
    wanted = (wanted, wanted) if isinstance(wanted, int) else wanted
    return row | {"ok": spilled == 0 and row["load_widest"] >= wanted[0] and row["store_widest"] >= wanted[1], "wanted": wanted}


def compiled(kernel, arguments: dict, target: str) -> tuple[int, int, int, list[int], list[int]]:
    """Registers, bytes spilled, shared memory, and widths in bits of the loads and stores of a launch with these arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    source, options = ASTSource(fn=kernel, **specialised(kernel, arguments)), {"num_warps": arguments.get("num_warps", 4)}
    code = compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    registers, spilled, loads, stores = (nvidia if target.startswith("sm_") else amd)(code.asm)
    return registers, spilled, code.metadata.shared, loads, stores


def specialised(kernel, arguments: dict) -> dict:
    """Signature, constants and alignments, as Triton takes them from a launch's arguments: an integer 1 is a constant, multiples of 16
    are marked, and so are pointers, which PyTorch aligns."""
    constexprs, attrs = {}, {}

    def describe(path: tuple, value, constant: bool, annotation: str):
        if isinstance(value, tuple):
            return tuple(describe((*path, i), v, constant, annotation) for i, v in enumerate(value))
        if constant or value is None or isinstance(value, int) and value == 1:
            constexprs[path] = value
            return "constexpr"
        if isinstance(value, float):
            return annotation or "fp32"
        if not isinstance(value, int) or value % 16 == 0:
            attrs[path] = [["tt.divisibility", 16]]
        if isinstance(value, int):
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        name = str(value.dtype).removeprefix("torch.")  # uint8 -> *u8, bfloat16 -> *bf16, float32 -> *fp32, int64 -> *i64
        return "*" + name.replace("uint", "u").replace("bfloat", "bf").replace("float", "fp").replace("int", "i")

    signature = {p.name: describe((p.num,), arguments.get(p.name, p.default), p.is_constexpr, p.annotation_type) for p in kernel.params}
    return {"signature": signature, "constexprs": constexprs, "attrs": attrs}


def extremes(widths: list[int]) -> tuple[int, int]:
    """Widest and narrowest, 0 where there is none."""
    return max(widths, default=0), min(widths, default=0)


def nvidia(asm: dict) -> tuple[int, int, list[int], list[int]]:
    """(registers, bytes spilled, widths of loads, of stores) of the machine code that Triton would launch, and of its PTX."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    # A spilled register goes to the stack, which our kernels have no other use for. (Asking ptxas again needs Triton's own options to
    # give the same answer: without them it may spill elsewhere.)
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL"))
    widths = [
        [int(n or 1) * int(bits) for n, bits in re.findall(rf"\b{access}\.global[.\w:]*?(?:\.v(\d))?\.[busf](\d+)\b", asm["ptx"])]
        for access in ("ld", "st")
    ]
    return registers, stack + local, *widths


AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}


def amd(asm: dict) -> tuple[int, int, list[int], list[int]]:
    """The same of AMD's assembly. Spilled scalar registers count too, though they go to lanes of vector registers, not to memory."""
    text = asm["amdgcn"]
    count = {name: int(re.search(rf"\.{name}:\s+(\d+)", text).group(1)) for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")}
    spilled = 4 * (count["vgpr_spill_count"] + count["sgpr_spill_count"])
    widths = [
        [AMD_BITS[w] for w in re.findall(rf"\b(?:global|flat|buffer)_{access}_[su]?(dwordx?\d?|short|byte)", text)]
        for access in ("load", "store")
    ]
    return count["vgpr_count"], spilled, *widths


def table(targets=tuple(TARGETS), match: str = "") -> list[dict]:
    """A row for each target and each spec whose name matches, compiled by as many processes as there are cores."""
    specs = [(f, i, spec["name"]) for f in FILES for i, spec in enumerate(import_module(f"kernels.{f}").compile_specs())]
    jobs = [(f, i, t) for f, i, name in specs if re.search(match, name) for t in targets]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return list(pool.map(budget, *zip(*jobs), chunksize=4))


def launches() -> str:
    """The launches of one dice_ce and one norm_act, forward and backward: counted in the interpreter, hence in a process of its own."""
    code = "from traffic import *\nfor r in table(('dice_ce', 'norm_act'), ('ours Triton',), (torch.float32,))[0][::2]:\n"
    code += "    print('launches of', r['op'], 'forward', r['forward_launches'], 'backward', r['backward_launches'])"
    return subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--match", default="", help="only kernels whose name this regular expression is found in")
    parser.add_argument("--csv", help="write the table here, too")
    args = parser.parse_args()
    rows = table(args.targets, args.match)
    print(f"{'kernel':48} {'target':7} {'regs':>5} {'spill':>6} {'shared':>7} {'loads':>10} {'stores':>10}")
    for r in rows:
        loads, stores = (f"{r[a + '_widest']}..{r[a + '_narrowest']}" for a in ("load", "store"))
        flag = "" if r["ok"] else f"   <- wanted no spills, loads and stores of {r['wanted']} bits"
        print(f"{r['kernel']:48} {r['target']:7} {r['registers']:5} {r['spilled']:6} {r['shared']:7} {loads:>10} {stores:>10}{flag}")
    print(launches(), end="")
    failed = sum(not r["ok"] for r in rows)
    print(f"{len(rows)} kernels compiled, {failed} over budget")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    sys.exit(1 if failed or not rows else 0)


if __name__ == "__main__":
    main()
