"""A traffic meter: the bytes that an operation moves, and its launches, counted without a GPU.

Two counters, used together; nothing is counted by both.

* `count_triton()` observes Triton's interpreter. A load or store counts its active lanes times the
  element's size, masks included; an atomic counts as both. Two lanes that load the same address
  count twice. A launch is a launch.
* `CountEager()` observes every op of PyTorch below autograd, so the backward pass too. An op counts
  each input tensor as read once and each output tensor as written once: a lower bound, as some
  kernels read twice. An axis expanded by stride 0 counts once. An in-place op counts a read and a
  write, unless it only overwrites (`copy_`, `fill_`, ...); so does scatter for its target; indexing
  counts the whole indexed tensor. Views and allocations (view, detach, empty, ...) count nothing.
  An op that touches data is one launch, though some (a reduction over all voxels, `index_put`)
  launch more; ops on a few numbers on the CPU count too. Inside our custom ops, the PyTorch ops are
  counted one by one, the Triton launches by `count_triton`.

The peers' 228 bytes per voxel in float32 (C=2) are for int64 labels; uint8 labels are converted
twice by both peers, at 9 bytes each time.

Caches are not modeled: a tensor that stays in the cache from one op to the next would be read from
memory only once.

    python benchmarks/traffic.py [--csv results/traffic.csv]    a table: bytes per voxel
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import argparse
import csv
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from peers import INSTALL, LAYOUTS, OPS, arguments, contenders
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


@dataclass
class Traffic:
    """What one or several operations moved: bytes read, bytes written, launches."""

    read: int = 0
    written: int = 0
    launches: int = 0

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written

    def __add__(self, other: "Traffic") -> "Traffic":
        read = self.read + other.read
        written = self.written + other.written
        return Traffic(read, written, self.launches + other.launches)


def total(counted: dict[str, Traffic]) -> Traffic:
    """All operations together."""
    return sum(counted.values(), Traffic())


@contextmanager
def count_triton():
    """Yield {kernel: Traffic}, filled while interpreted kernels run in the `with` block."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    traffic = defaultdict(Traffic)
    running = []  # names of the kernels that run, the innermost last

    def moved(pointers, lanes: int) -> int:
        """Bytes of so many lanes."""
        return lanes * max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def active(pointers, mask) -> int:
        """Bytes of the lanes that the mask selects."""
        lanes = np.broadcast_to(np.asarray(mask.data), pointers.data.shape)
        return moved(pointers, int(np.count_nonzero(lanes)))

    def launch(self, *args, **kwargs):
        """Run a kernel."""
        running.append(self.fn.__name__)
        traffic[running[-1]].launches += 1
        try:
            with _disable_current_modes():  # do not count the interpreter's own copies
                return original["__call__"](self, *args, **kwargs)
        finally:
            running.pop()

    def load(self, pointers, mask, *rest, **kwargs):
        """A read."""
        traffic[running[-1]].read += active(pointers, mask)
        return original["create_masked_load"](self, pointers, mask, *rest, **kwargs)

    def store(self, pointers, value, mask, *rest, **kwargs):
        """A write."""
        traffic[running[-1]].written += active(pointers, mask)
        return original["create_masked_store"](self, pointers, value, mask, *rest, **kwargs)

    def atomic_rmw(self, op, pointers, value, mask, *rest):
        """A read, a change and a write."""
        traffic[running[-1]].read += active(pointers, mask)
        traffic[running[-1]].written += active(pointers, mask)
        return original["create_atomic_rmw"](self, op, pointers, value, mask, *rest)

    def atomic_cas(self, pointers, *rest):
        """A comparison and an exchange."""
        traffic[running[-1]].read += moved(pointers, pointers.data.size)
        traffic[running[-1]].written += moved(pointers, pointers.data.size)
        return original["create_atomic_cas"](self, pointers, *rest)

    # Unmasked loads, block pointers and descriptors all end in the masked ones.
    hooks = {"create_masked_load": load, "create_masked_store": store}
    hooks |= {"create_atomic_rmw": atomic_rmw, "create_atomic_cas": atomic_cas}
    original = {name: getattr(InterpreterBuilder, name) for name in hooks}
    original["__call__"] = GridExecutor.__call__
    launches = mock.patch.object(GridExecutor, "__call__", launch)
    with mock.patch.multiple(InterpreterBuilder, **hooks), launches:
        yield traffic


def touched(t: torch.Tensor) -> int:
    """Bytes of a tensor; axes expanded by stride 0 count once."""
    lengths = [n if stride or n == 0 else 1 for n, stride in zip(t.shape, t.stride())]
    return t.element_size() * int(np.prod(lengths, dtype=np.int64))


def tensors(tree) -> list[torch.Tensor]:
    """The tensors among nested arguments or results."""
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


class CountEager(TorchDispatchMode):
    """`with CountEager() as counter: ...` fills counter.traffic, {op: Traffic}."""

    NO_DATA = {
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
        "detach", "detach_", "lift_fresh", "_unsafe_view", "set_",
    }
    OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_"}
    NO_RESULT = {"_local_scalar_dense", "equal"}  # they read data and return no tensor

    def __init__(self):
        super().__init__()
        self.traffic = defaultdict(Traffic)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an op and count it."""
        kwargs = kwargs or {}
        name = func._schema.name
        custom = torch._library.custom_ops.OPDEFS.get(name)
        if custom is not None:  # one of ours: count the ops that it runs instead
            with self:
                return custom._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        op = name.split("::")[-1]
        touches_data = tensors(out) or op in self.NO_RESULT or func._schema.is_mutable
        if op in self.NO_DATA or func.is_view or not touches_data:
            return out
        traffic = self.traffic[op]
        traffic.launches += 1
        given = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
        for argument in func._schema.arguments:
            size = sum(map(touched, tensors(given.get(argument.name))))
            mutated = argument.alias_info is not None and argument.alias_info.is_write
            overwritten = mutated and (op in self.OVERWRITES or argument.is_out)
            traffic.read += 0 if overwritten else size
            traffic.written += size if mutated else 0
        inputs = {id(t) for t in tensors((args, kwargs))}
        # A result that is an argument has been counted.
        traffic.written += sum(touched(t) for t in tensors(out) if id(t) not in inputs)
        return out


def measure(function, args: tuple) -> tuple[Traffic, Traffic]:
    """(forward, backward) traffic of a function of tensors that returns one tensor.

    Backward computes the gradients of all arguments that require one.
    """
    trained = [a for a in args if a.requires_grad]
    with CountEager() as eager, count_triton() as kernels:
        y = function(*args)
    forward = total(eager.traffic) + total(kernels)
    grad_output = torch.ones_like(y).contiguous() if y.dim() == 0 else torch.randn_like(y)
    with CountEager() as eager, count_triton() as kernels:
        torch.autograd.grad(y, trained, grad_output)
    return forward, total(eager.traffic) + total(kernels)


SHAPES = {
    "dice_ce": (2, 2, 32, 32, 32),
    "norm_act": (2, 16, 32, 32, 32),
    "norm_act+residual": (2, 16, 32, 32, 32),
    "voxel_shuffle": (2, 1, 48, 48, 48),
}
FIELDS = (
    "op", "dtype", "layout", "what",
    "forward", "backward", "both", "forward_launches", "backward_launches",
)


def table(
    ops=OPS, names=None, dtypes=(torch.float32, torch.bfloat16), layouts=tuple(LAYOUTS)
) -> tuple[list, list[str]]:
    """Measure the contenders with these names, or all.

    Returns (rows, names of peers that are not installed). The unit is bytes per voxel for dice_ce
    (all classes together), per element for the others.
    """
    rows, missing = [], []
    for op in ops:
        functions, absent = contenders(op)
        missing += absent
        b, c, *size = SHAPES[op]
        unit = b * int(np.prod(size)) * (1 if op == "dice_ce" else c)
        functions = {name: f for name, f in functions.items() if names is None or name in names}
        for dtype in dtypes:
            for layout in layouts:
                for name, function in functions.items():
                    args = arguments(op, SHAPES[op], dtype, layout)
                    forward, backward = measure(function, args)
                    sums = [t.bytes / unit for t in (forward, backward, forward + backward)]
                    launches = (forward.launches, backward.launches)
                    what = (op, str(dtype).removeprefix("torch."), layout, name)
                    rows.append(dict(zip(FIELDS, (*what, *sums, *launches))))
    return rows, missing


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--csv", help="also write the table to this file")
    args = parser.parse_args()
    rows, missing = table()
    print("bytes per voxel (dice_ce: all classes of a voxel) or per element (the others)")
    print("launches in brackets")
    left = "{:18} {:9} {:14} {:12}"
    columns = " ".join(f"{name:>14}" for name in ("forward", "backward", "both"))
    print(left.format("op", "dtype", "layout", "what"), columns)
    for r in rows:
        launches = (r["forward_launches"], r["backward_launches"])
        launches = (*launches, sum(launches))
        bytes_moved = (r["forward"], r["backward"], r["both"])
        columns = " ".join(f"{x:9.2f} ({n:2d})" for x, n in zip(bytes_moved, launches))
        print(left.format(r["op"], r["dtype"], r["layout"], r["what"]), columns)
    if missing:
        print(INSTALL)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
