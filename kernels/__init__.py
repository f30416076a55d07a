"""The three operations worth a kernel, and which path runs where.

    dice_ce          soft Dice + cross entropy: the loss
    norm_act         instance norm -> affine -> PReLU -> + residual: what follows almost every convolution
    voxel_shuffle    the self-supervision's permutation of voxels

Each comes as `*_ref`, the definition, differentiated by autograd; `*_plain`, the derived backward pass in PyTorch on any device;
and `*_triton`, the same as Triton kernels. The bare name picks: Triton for CUDA tensors (and for CPU tensors under TRITON_INTERPRET=1,
Triton's interpreter: for tests, very slow), plain PyTorch for the rest. `use("triton")` or `use("plain")`, or the environment
variable MIRROR_UNET_KERNELS, asks for one of them, and where that cannot run it is an error that says so.

A file here stands alone (it needs torch, and triton for the fast path): copy it into a project of your own.
"""

import os
import warnings

import torch
from torch import Tensor

from .dice_ce import dice_ce_plain, dice_ce_ref, dice_ce_triton
from .norm_act import norm_act_plain, norm_act_ref, norm_act_triton
from .voxel_shuffle import voxel_shuffle_plain, voxel_shuffle_ref, voxel_shuffle_triton

try:
    import triton
except ImportError:  # macOS, Windows
    triton = None

CHOICES = ("auto", "triton", "plain")
_choice = os.environ.get("MIRROR_UNET_KERNELS", "auto")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it once too, when it is imported

__all__ = ["dice_ce", "dice_ce_ref", "norm_act", "norm_act_ref", "voxel_shuffle", "voxel_shuffle_ref", "use"]


def use(choice: str = "") -> None:
    """Which path the operations take from now on: "auto", "triton" or "plain"; "": what MIRROR_UNET_KERNELS says, else "auto".

    Raises ValueError where Triton is asked for and cannot run.
    """
    global _choice
    choice = choice or os.environ.get("MIRROR_UNET_KERNELS", "auto")
    _refuse(choice)
    _choice = choice


def _refuse(choice: str) -> None:
    if choice not in CHOICES:
        raise ValueError(f"kernels {choice!r}: use one of {', '.join(CHOICES)}")
    if choice == "triton" and triton is None:
        raise ValueError("Triton kernels were asked for, but the package triton is not installed (it comes with PyTorch on Linux)")
    if choice == "triton" and not INTERPRETED and not torch.cuda.is_available():
        raise ValueError("Triton kernels were asked for, but PyTorch sees no GPU; set TRITON_INTERPRET=1 to interpret them (slow)")


def _on_triton(x: Tensor) -> bool:
    """Whether an operation on x takes the Triton path."""
    if _choice != "auto":
        _refuse(_choice)  # what the environment asks for was not looked at yet
        if _choice == "triton" and not x.is_cuda and not INTERPRETED:
            raise ValueError(f"Triton kernels were asked for, but the tensor is on {x.device}; move it to a GPU, or use('auto')")
        return _choice == "triton"
    if x.is_cuda and triton is None:
        warnings.warn("the package triton is not installed: plain PyTorch runs in place of the kernels", stacklevel=3)
        return False
    return x.is_cuda or INTERPRETED and triton is not None


def dice_ce(
    logits, target, include_background=False, batch=True, smooth_nr=1e-5, smooth_dr=1e-5,
    dice_weight=1.0, ce_weight=1.0, class_weight=None, ignore_index=None, sync=False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, soft Dice a class); the arguments are explained in `dice_ce_ref`."""
    path = dice_ce_triton if _on_triton(logits) else dice_ce_plain
    return path(
        logits, target, include_background, batch, smooth_nr, smooth_dr, dice_weight, ce_weight, class_weight, ignore_index, sync
    )  # fmt: skip


def norm_act(x, weight=None, bias=None, slope=None, residual=None, eps=1e-5) -> Tensor:
    """Instance norm, affine, PReLU, + residual; the arguments are explained in `norm_act_ref`."""
    return (norm_act_triton if _on_triton(x) else norm_act_plain)(x, weight, bias, slope, residual, eps)


def voxel_shuffle(x, corners, size, seed, inverse=False) -> Tensor:
    """x with the voxels inside its cubes permuted; the arguments are explained in `voxel_shuffle_ref`."""
    return (voxel_shuffle_triton if _on_triton(x) else voxel_shuffle_plain)(x, corners, size, seed, inverse)
