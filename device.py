"""What this machine can run: the device and kernels of a run; bugs of PyTorch to stay clear of."""

import os
import re
import warnings
from typing import Any

import torch

import kernels
from files import UserError


def choose_device(c: Any) -> None:
    """Turn --device auto into what this machine has, and refuse what it cannot run: UserError."""
    if c.device == "cuda" and not torch.cuda.is_available():
        advice = "use --device cpu, or install a CUDA build of PyTorch"
        raise UserError(f"--device cuda: PyTorch sees no CUDA device here; {advice}")
    if c.device == "auto":
        c.device = "cuda" if torch.cuda.is_available() else "cpu"
    use_kernels(c.kernels)
    cudnn = torch.backends.cudnn.version() or 0
    if c.amp != "off" and torch.__version__.startswith("2.9.") and 90800 <= cudnn < 91500:
        problem = f"PyTorch 2.9 with cuDNN {cudnn} convolves wrongly or slowly in half precision"
        warnings.warn(f"--amp {c.amp}: {problem} (pytorch#166122, #163539)", stacklevel=2)
    forbids = {
        "a CPU": c.device == "cpu", "--compile": c.compile,
        "--amp fp16, which skips steps": c.amp == "fp16",
        "valindria, whose modalities take turns": c.model == "valindria",
        "torchrun": int(os.environ.get("WORLD_SIZE", 1)) > 1,
    }
    for what in [what for what, found in forbids.items() if found and c.graph]:
        raise UserError(f"--graph does not go with {what}; leave one of them out")
    if c.device != "cpu":
        return
    if c.kernels == "triton" and not kernels.INTERPRETED:
        advice = "use --device cuda, or --kernels plain"
        raise UserError(f"--kernels triton --device cpu: Triton kernels run on a GPU; {advice}")
    if c.amp == "fp16":
        raise UserError("--amp fp16 needs a CUDA device; on CPU use --amp bf16 or off")
    if c.amp == "bf16" and c.patch[0] == 32:
        # Found in PyTorch 2.13: on CPU, the bfloat16 weight gradient of a 3^3 convolution on
        # (2, *, *) voxels reads memory that was never written.
        problem = "a first side of 32 meets a bug of PyTorch's convolution"
        raise UserError(f"--amp bf16 on a CPU: {problem}; use another --patch")


def check_device(device: str, graph: bool) -> None:
    """Refuse a --device of predict.py that this machine lacks, or --graph without a GPU."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: use cpu, cuda or cuda:N")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: PyTorch sees no CUDA device here; use --device cpu")
    if graph and device == "cpu":
        raise UserError("--graph: CUDA graphs need --device cuda; leave it out")


def use_kernels(choice: str) -> None:
    """`kernels.use`, with its error as a UserError about --kernels."""
    try:
        kernels.use(choice)
    except ValueError as e:
        raise UserError(f"--kernels {choice}: {e}") from None


def autocast(device: str, amp: str) -> torch.autocast:
    """The context of `--amp off | bf16 | fp16`."""
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None)
