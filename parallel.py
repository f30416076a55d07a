"""Train one network in several processes: torchrun --nproc_per_node=N train.py ...

Uses PyTorch's DDP, with NCCL between GPUs and gloo between CPUs. N processes with batches of B
equal one process with batches of N B at every step, up to rounding:

    patches       of each step's N B patches, process r takes the r-th B
    Dice + CE     computed from sums over all processes (`sync=True` of the loss)
    batch norm    mean and variance over all processes (`JoinedBatchNorm`)
    dropout       each process draws the mask of all N B samples and uses its part (`JoinedDropout`)
    gradients     averaged by DDP, so a loss that each process computes over all batches counts once
    files         written by process 0 only

Without torchrun, everything here does nothing and costs nothing.
"""

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from tqdm import tqdm

from files import UserError
from processes import available_cores


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def say(message: str) -> None:
    """Print a line, once however many processes there are."""
    if rank() == 0:
        tqdm.write(message)


def progress_bar(share: float) -> tqdm:
    """A bar over thousandths of a run, of which `share` (0 to 1) is done."""
    return tqdm(
        total=1000, desc="training", initial=int(1000 * share), disable=rank() > 0,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining} {postfix}",
    )


def loaders(workers: int, device: torch.device, voxels: int) -> int:
    """Return how many of the `workers` that are asked for each process gets as loaders.

    -1: none on CPU, up to 8 on CUDA. The cores and the shared memory (/dev/shm) have to allow them;
    there, a loader puts two batches of `voxels`, each of two float32 channels and a uint8 label.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    asked = (8 if device.type == "cuda" else 0) if workers < 0 else workers
    allowed = min(asked, available_cores() // here or 1)
    if os.path.isdir("/dev/shm"):
        batches = shutil.disk_usage("/dev/shm").free // here // (9 * voxels)
        allowed = max(0, min(allowed, (batches - 1) // 2))  # one more is in use
    if allowed < workers:
        say(f"--workers {workers}: the cores and /dev/shm allow only {allowed}")
    return allowed


def start(device: str) -> torch.device:
    """Join the processes that torchrun started, if any; return this one's device (cpu or cuda)."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return torch.device(device)
    cuda = device == "cuda"
    local = int(os.environ["LOCAL_RANK"])
    if cuda:
        gpus = torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"torchrun: more processes than GPUs; use --nproc_per_node={gpus}")
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        # One process may preprocess or validate for hours while the others wait.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12))
        # Keep the group until the process ends. When PyTorch 2.13 destroys a gloo group, it waits,
        # holding the interpreter's lock, for a thread that may need this lock: the run hangs.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
    return torch.device(device, local) if cuda else torch.device("cpu")


def stop() -> None:
    """Leave the group of processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Run the block in process 0 first, then in the others: it fills a cache that they read."""
    if size() > 1 and rank() > 0:
        dist.barrier()
    yield
    if size() > 1 and rank() == 0:
        dist.barrier()


def share(value):
    """Return process 0's value in every process."""
    box = [value]
    if size() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def gather(items: list) -> list:
    """Return the items of all processes in their order before `items[rank() :: size()]`."""
    if size() == 1:
        return items
    parts: list = [None] * size()
    dist.all_gather_object(parts, items)
    return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]


def largest(*values: float) -> list[float]:
    """Return each value's maximum over the processes, so that all agree on when to stop."""
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    t = torch.tensor(values, dtype=torch.float64, device="cuda" if nccl else "cpu")
    if size() > 1:
        dist.all_reduce(t, dist.ReduceOp.MAX)
    return t.tolist()


def mean(values: Tensor) -> Tensor:
    """Average a tensor over the processes, in place."""
    if size() > 1:
        dist.all_reduce(values)
        values /= size()
    return values


class JoinedBatchNorm(nn.BatchNorm3d):
    """Batch norm over all processes' batches, of equal size. PyTorch's own needs GPUs."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, D, H, W)
        if not self.training:
            return super().forward(x)
        dims = (0, 2, 3, 4)
        x32 = x.float()
        mean = all_reduce(x32.mean(dims, keepdim=True)) / size()  # (1, C, 1, 1, 1); differentiable
        var = all_reduce((x32 - mean).square().mean(dims, keepdim=True)) / size()
        n = size() * x.numel() / x.shape[1]  # values per channel
        with torch.no_grad():
            mean_now, var_now = mean.flatten(), var.flatten() * n / (n - 1)
            self.num_batches_tracked += 1  # type: ignore
            self.running_mean.lerp_(mean_now, self.momentum)  # type: ignore
            self.running_var.lerp_(var_now, self.momentum)  # type: ignore
        weight, bias = (p.view(1, -1, 1, 1, 1) for p in (self.weight, self.bias))
        return ((x32 - mean) * (var + self.eps).rsqrt() * weight + bias).to(x.dtype)


class JoinedDropout(nn.Dropout):
    """Dropout with this process's part of the mask of the joined batch."""

    def forward(self, x: Tensor) -> Tensor:  # (B, ...)
        if not self.training:
            return x
        mask = F.dropout(x.new_ones(size() * len(x), *x.shape[1:]), self.p)  # (N B, ...)
        return x * mask[rank() * len(x) : (rank() + 1) * len(x)]


def distribute(net: nn.Module, device: torch.device) -> nn.Module:
    """Join the network's batch norms and dropouts and wrap it in DDP; one process gets it as is."""
    if size() == 1:
        return net
    joined = {nn.BatchNorm3d: JoinedBatchNorm, nn.Dropout: JoinedDropout}
    for module in net.modules():  # only the class changes: parameters and buffers stay the same
        module.__class__ = joined.get(type(module), type(module))
    ids = [device.index] if device.type == "cuda" else None
    partial = getattr(net, "partial", False)  # some parameters get no gradient, in all processes
    options: dict[str, Any] = dict(broadcast_buffers=False, gradient_as_bucket_view=True)
    options |= dict(device_ids=ids)
    return nn.parallel.DistributedDataParallel(net, find_unused_parameters=partial, **options)
