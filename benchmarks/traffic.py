"""A traffic meter: how many bytes an operation moves, and in how many launches, counted without a GPU.

Two counters, used together; nothing is counted by both.

* `count_triton()` watches Triton's interpreter. A load or store counts its active lanes times the element's size, masks included;
  an atomic counts as both. A launch is a launch. Two lanes that load the same address count twice.
* `CountEager()` watches every op of PyTorch below autograd, so the backward pass too. An op counts each tensor it is given as read once
  and each it returns as written once: the kindest count, as some kernels read twice. An axis expanded by stride 0 counts once. An
  op in place counts a read and a write, unless it only overwrites (`copy_`, `fill_`, ...), and so does scatter for the tensor scattered
  into; indexing counts all of the tensor indexed. Views and allocations (view, detach, empty, ...) count nothing. An op that touches
  data is one launch, though some (a reduction over all voxels, `index_put`) launch more; ops on a few numbers on the host count too.
  Inside our custom ops, the PyTorch ops they run are counted one by one, their Triton launches by `count_triton`.

The peers' 228 bytes a voxel in float32 (C=2) are those with int64 labels; from uint8 both convert twice, 9 bytes each time.

Caches are not modelled: a tensor that stays in the cache from one op to the next would be read from memory only once.

    python benchmarks/traffic.py [--csv results/traffic.csv]        a table: bytes a voxel, ours and the peers
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import argparse  # noqa: E402
import csv  # noqa: E402
from collections import defaultdict  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from unittest import mock  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from peers import INSTALL, LAYOUTS, OPS, arguments, contenders  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402


@dataclass
class Traffic:
    """What one operation, or several, moved: bytes read, bytes written, launches."""

    read: int = 0
    written: int = 0
    launches: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.read + other.read, self.written + other.written, self.launches + other.launches)


def total(counted: dict[str, Traffic]) -> Traffic:
    """All operations together."""
    return sum(counted.values(), Traffic())


@contextmanager
def count_triton():
    """Yields {kernel: Traffic}, filled as interpreted kernels run inside the `with`."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    traffic, running = defaultdict(Traffic), []

    def size(pointers) -> int:
        return max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def lanes(pointers, mask) -> int:
        return int(np.count_nonzero(np.broadcast_to(np.asarray(mask.data), pointers.data.shape)))

    def launch(self, *args, **kwargs):
        running.append(self.fn.__name__)
        traffic[running[-1]].launches += 1
        try:
            with _disable_current_modes():  # the interpreter's own copies are no traffic of ours
                return original["__call__"](self, *args, **kwargs)
        finally:
            running.pop()

    def load(self, pointers, mask, *rest, **kwargs):
        traffic[running[-1]].read += lanes(pointers, mask) * size(pointers)
        return original["create_masked_load"](self, pointers, mask, *rest, **kwargs)

    def store(self, pointers, value, mask, *rest, **kwargs):
        traffic[running[-1]].written += lanes(pointers, mask) * size(pointers)
        return original["create_masked_store"](self, pointers, value, mask, *rest, **kwargs)

    def rmw(self, op, pointers, value, mask, *rest):
        traffic[running[-1]].read += lanes(pointers, mask) * size(pointers)
        traffic[running[-1]].written += lanes(pointers, mask) * size(pointers)
        return original["create_atomic_rmw"](self, op, pointers, value, mask, *rest)

    def cas(self, pointers, *rest):
        traffic[running[-1]].read += pointers.data.size * size(pointers)
        traffic[running[-1]].written += pointers.data.size * size(pointers)
        return original["create_atomic_cas"](self, pointers, *rest)

    # Unmasked loads, block pointers and descriptors all end in the masked ones.
    hooks = {"create_masked_load": load, "create_masked_store": store, "create_atomic_rmw": rmw, "create_atomic_cas": cas}
    original = {name: getattr(InterpreterBuilder, name) for name in hooks} | {"__call__": GridExecutor.__call__}
    with mock.patch.multiple(InterpreterBuilder, **hooks), mock.patch.object(GridExecutor, "__call__", launch):
        yield traffic


def touched(t: torch.Tensor) -> int:
    """Bytes of a tensor, axes expanded by stride 0 counted once."""
    return t.element_size() * int(np.prod([n if s or n == 0 else 1 for n, s in zip(t.shape, t.stride())], dtype=np.int64))


class CountEager(TorchDispatchMode):
    """`with CountEager() as counter: ...` fills counter.traffic, {op: Traffic}."""

    NO_DATA = {
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "detach",
        "detach_",
        "lift_fresh",
        "_unsafe_view",
        "set_",
    }
    OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_"}

    def __init__(self):
        super().__init__()
        self.traffic = defaultdict(Traffic)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        inside = torch._library.custom_ops.OPDEFS.get(name)
        if inside is not None:  # one of ours: count what it runs instead
            with self:
                return inside._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        op = name.split("::")[-1]
        if op in self.NO_DATA or func.is_view or not (results or op in ("_local_scalar_dense", "equal") or func._schema.is_mutable):
            return out
        traffic = self.traffic[op]
        traffic.launches += 1
        given = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
        for argument in func._schema.arguments:
            tensors = [t for t in tree_leaves(given.get(argument.name)) if isinstance(t, torch.Tensor)]
            mutated = argument.alias_info is not None and argument.alias_info.is_write
            overwritten = mutated and (op in self.OVERWRITES or argument.is_out)
            traffic.read += 0 if overwritten else sum(map(touched, tensors))
            traffic.written += sum(map(touched, tensors)) if mutated else 0
        inputs = {id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        traffic.written += sum(touched(t) for t in results if id(t) not in inputs)  # an argument that is returned has been counted
        return out


def measure(function, args: tuple) -> tuple[Traffic, Traffic]:
    """(forward, backward) traffic of a function of tensors that returns one tensor; gradients of all that require one."""
    trained = [a for a in args if a.requires_grad]
    with CountEager() as eager, count_triton() as kernels:
        y = function(*args)
    forward = total(eager.traffic) + total(kernels)
    upstream = torch.ones_like(y).contiguous() if y.dim() == 0 else torch.randn_like(y)
    with CountEager() as eager, count_triton() as kernels:
        torch.autograd.grad(y, trained, upstream)
    return forward, total(eager.traffic) + total(kernels)


SHAPES = {"dice_ce": (2, 2, 32, 32, 32), "norm_act": (2, 16, 32, 32, 32), "norm_act+residual": (2, 16, 32, 32, 32)}
SHAPES["voxel_shuffle"] = (2, 1, 48, 48, 48)
FIELDS = ("op", "dtype", "layout", "what", "forward", "backward", "both", "forward_launches", "backward_launches")


def table(ops=OPS, names=None, dtypes=(torch.float32, torch.bfloat16)) -> tuple[list[dict], list[str]]:
    """(rows, peers not installed). Bytes a voxel for dice_ce (all classes together), an element for the others."""
    rows, missing = [], []
    for op in ops:
        functions, absent = contenders(op)
        missing += absent
        b, c, *size = SHAPES[op]
        unit = b * int(np.prod(size)) * (1 if op == "dice_ce" else c)
        for dtype in dtypes:
            for layout in LAYOUTS:
                for name, function in functions.items():
                    if names is None or name in names:
                        f, g = measure(function, arguments(op, SHAPES[op], dtype, layout))
                        values = (f.bytes / unit, g.bytes / unit, (f + g).bytes / unit, f.launches, g.launches)
                        rows.append(dict(zip(FIELDS, (op, str(dtype)[6:], layout, name, *values))))
    return rows, missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--csv", help="write the table here, too")
    args = parser.parse_args()
    rows, missing = table()
    print("bytes a voxel (dice_ce: all classes of a voxel) or an element (the others); launches in brackets")
    print(f"{'op':18} {'dtype':9} {'layout':14} {'what':12} {'forward':>14} {'backward':>14} {'both':>14}")
    for r in rows:
        pairs = ((r["forward"], r["forward_launches"]), (r["backward"], r["backward_launches"]))
        pairs += ((r["both"], r["forward_launches"] + r["backward_launches"]),)
        print(f"{r['op']:18} {r['dtype']:9} {r['layout']:14} {r['what']:12} " + " ".join(f"{x:9.2f} ({n:2d})" for x, n in pairs))
    if missing:
        print(INSTALL)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
