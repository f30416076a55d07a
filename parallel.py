"""Several processes, one run: torchrun --nproc_per_node=N train.py ... (PyTorch DDP; NCCL between GPUs, gloo between CPUs).

N processes with batches of B are one process with batches of N B, step by step, up to rounding:

    patches          of each step's N B, process r takes the r-th B
    Dice + CE        computed from sums over all processes (`sync=True` of the loss)
    batch norm       its mean and variance are those of all processes (`JoinedBatchNorm`)
    dropout          every process draws the mask of all N B samples and keeps its part (`JoinedDropout`)
    gradients        averaged by DDP, so a loss that each process computes of the whole batch counts once
    files            one process writes

Without torchrun everything here does nothing, at no cost.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from files import UserError


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def start(device: str) -> torch.device:
    """Join the other processes, where torchrun started this one; returns this process's device ("cpu" | "cuda")."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return torch.device(device)
    local = int(os.environ["LOCAL_RANK"])
    if device == "cuda" and local >= torch.cuda.device_count():
        raise UserError(f"torchrun: a process a GPU, but this machine has {torch.cuda.device_count()}; give --nproc_per_node that number")
    if device == "cuda":
        torch.cuda.set_device(local)
    if not dist.is_initialized():  # a long limit: one process may preprocess or validate for hours while the others wait
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=12))
        # One reference more, so that the group lives as long as the process: where a gloo group ends, PyTorch 2.13 waits, holding the
        # interpreter's lock, for a thread that may be waiting for that lock, and the run hangs after its last line.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
    return torch.device(device, local) if device == "cuda" else torch.device("cpu")


def stop() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Process 0 runs the block while the others wait, then they do: it fills a cache, they read it."""
    if size() > 1 and rank() > 0:
        dist.barrier()
    yield
    if size() > 1 and rank() == 0:
        dist.barrier()


def share(value):
    """Process 0's value, in every process."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def gather(items: list) -> list:
    """The items of all processes, dealt out in turn as `all_items[rank() :: size()]` dealt them."""
    if size() == 1:
        return items
    parts: list = [None] * size()
    dist.all_gather_object(parts, items)
    return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]


def largest(*values: float) -> list[float]:
    """Of each value the largest of all processes: so that all agree on the time that is spent, and on stopping."""
    t = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu")
    if size() > 1:
        dist.all_reduce(t, dist.ReduceOp.MAX)
    return t.tolist()


def mean(values: Tensor) -> Tensor:
    """Mean over the processes."""
    if size() > 1:
        dist.all_reduce(values)
        values /= size()
    return values


class JoinedBatchNorm(nn.BatchNorm3d):
    """Batch norm with the statistics of all processes, whose batches are equally large. (PyTorch's own runs on GPUs alone.)"""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x32, dims = x.float(), (0, 2, 3, 4)
        mean = all_reduce(x32.mean(dims, keepdim=True)) / size()  # (1, C, 1, 1, 1); differentiable
        var = all_reduce((x32 - mean).square().mean(dims, keepdim=True)) / size()
        n = size() * x.numel() / x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * n / (n - 1), self.momentum)
        shape = (1, -1, 1, 1, 1)
        y = (x32 - mean) * (var + self.eps).rsqrt() * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


class JoinedDropout(nn.Dropout):
    """Dropout whose mask is this process's part of the joined batch's."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = F.dropout(x.new_ones(size() * len(x), *x.shape[1:]), self.p)
        return x * mask[rank() * len(x) : (rank() + 1) * len(x)]


def distribute(net: nn.Module, device: torch.device) -> nn.Module:
    """The network as DDP, its batch norms and dropouts joined; itself where there is one process."""
    if size() == 1:
        return net
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm3d:
                joined = JoinedBatchNorm(child.num_features, child.eps, child.momentum).to(child.weight.device)
                joined.weight, joined.bias = child.weight, child.bias
                joined.load_state_dict(child.state_dict())
                setattr(parent, name, joined)
            elif type(child) is nn.Dropout:
                setattr(parent, name, JoinedDropout(child.p))
    ids, partial = [device.index] if device.type == "cuda" else None, getattr(net, "partial", False)
    # partial: a step leaves some parameters without a gradient, in all processes alike
    options = dict(broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=partial)
    return nn.parallel.DistributedDataParallel(net, device_ids=ids, **options)
