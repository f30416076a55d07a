"""Replay a training step, or the prediction of a batch of windows, as a CUDA graph.

A GPU is often done with a small kernel before Python has started the next one. A CUDA graph is the
recorded list of a step's kernels, and a replay starts all of them at once. The recording holds
addresses and shapes, so `Graph` copies the inputs of every call to the same place. What is recorded
must not ask the host for anything: no tensor's value in Python, no shape that depends on values, no
seed, no transfer. `tests/test_graph.py` checks this for every network, without a GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 3  # ordinary calls, in which kernels are compiled and optimizers get their memory


class Graph:
    """A function of tensors by name: three ordinary calls, a recording, then replays.

    Args:
        function: returns a tensor or a tuple of tensors. They are overwritten by the next call.
        rows: the first axis of inputs and outputs is a batch, which may later be smaller.
    """

    def __init__(self, function: Callable, device: torch.device, rows: bool = False):
        self.function, self.rows, self.calls = function, rows, 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.inputs: dict[str, Tensor] = {}
        self.replay: Callable[[], Any] | None = None
        self.outputs: Any = None

    def __call__(self, **tensors: Tensor) -> Any:
        for name, t in tensors.items():
            if not self.calls:
                self.inputs[name] = torch.empty_like(t)  # keeps the layout
            self.inputs[name][: len(t)].copy_(t, non_blocking=True)
        if self.calls < WARM_UP:
            self.outputs = self.warm_up()
        elif self.replay is None:
            self.replay, self.outputs = record(self.function, self.inputs, self.stream)
        self.calls += 1
        if self.replay is not None:
            self.replay()
        if not self.rows:
            return self.outputs
        count = len(next(iter(tensors.values())))
        return tuple(t[:count] if t.dim() else t for t in self.outputs)

    def warm_up(self) -> Any:
        """An ordinary call, on the stream of the recording."""
        if self.stream is None:
            return self.function(**self.inputs)
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = self.function(**self.inputs)
        current.wait_stream(self.stream)
        return outputs


def record(function: Callable, inputs: dict[str, Tensor], stream) -> tuple[Callable, Any]:
    """Record function(**inputs). Returns what replays it, and the outputs that a replay fills."""
    graph = torch.cuda.CUDAGraph()
    # Only this thread may not allocate: the loader's thread, which pins memory, may.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        outputs = function(**inputs)
    return graph.replay, outputs


def read_later(t: Tensor) -> Callable[[], list]:
    """Start to copy t to the host. Returns what waits for the copy and gives its numbers."""
    if not t.is_cuda:
        return t.clone().tolist
    host = torch.empty_like(t, device="cpu", pin_memory=True)
    host.copy_(t, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list:
        copied.synchronize()
        return host.tolist()

    return read


def averaged(model: nn.Module) -> list[Tensor]:
    """The tensors to average: parameters and running statistics, each shared one once."""
    tensors = [t.detach() for t in (*model.parameters(), *model.buffers())]
    return [t for t in tensors if t.is_floating_point()]


def move_towards(means: list[Tensor], tensors: list[Tensor], share: float | Tensor) -> None:
    """Move means by a share of the way to the tensors, in place: m <- m + share (t - m).

    A share that is a tensor can change between replays; a number would be recorded.
    """
    if isinstance(share, Tensor):
        ways = torch._foreach_sub(tensors, means)  # type: ignore
        torch._foreach_mul_(ways, share)  # type: ignore
        torch._foreach_add_(means, ways)  # type: ignore
    else:
        torch._foreach_lerp_(means, tensors, share)  # type: ignore
