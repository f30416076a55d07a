"""The three operations that are worth a kernel, and the choice of the path that runs.

    dice_ce          soft Dice + cross entropy: the loss
    norm_act         instance norm -> affine -> PReLU -> + residual, after almost every convolution
    voxel_shuffle    the permutation of voxels for self-supervision

Each comes as `*_ref`, the definition, differentiated by autograd; `*_plain`, PyTorch with the
derived backward pass, on any device; and `*_triton`, the same as Triton kernels. The bare name
chooses: Triton for CUDA tensors (and for CPU tensors under TRITON_INTERPRET=1, Triton's slow
interpreter, for tests), plain PyTorch for all others. `use("triton")` or `use("plain")`, or the
environment variable MIRROR_UNET_KERNELS, asks for one of them: an error if it cannot run.

Each file stands alone: copy it into your project, where the function of the file's name chooses by
the tensor's device alone.
"""

import os
import warnings

import torch
from torch import Tensor

from .dice_ce import dice_ce_plain, dice_ce_ref, dice_ce_triton, triton  # None: not installed
from .norm_act import NormAct, norm_act_plain, norm_act_ref, norm_act_triton
from .voxel_shuffle import voxel_shuffle_plain, voxel_shuffle_ref, voxel_shuffle_triton

CHOICES = ("auto", "triton", "plain")
_choice = os.environ.get("MIRROR_UNET_KERNELS", "auto")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton, too, reads it once, when imported

_ASKED = "Triton kernels were asked for, but"
__all__ = ["dice_ce", "norm_act", "voxel_shuffle", "use", "NormAct"]
__all__ += ["dice_ce_ref", "norm_act_ref", "voxel_shuffle_ref"]


def use(choice: str = "") -> None:
    """Choose one of CHOICES; "": MIRROR_UNET_KERNELS, else "auto". ValueError if it cannot run."""
    global _choice
    choice = choice or os.environ.get("MIRROR_UNET_KERNELS", "auto")
    _check(choice)
    _choice = choice


def _check(choice: str) -> None:
    """Raise ValueError if this choice does not exist or cannot run."""
    if choice not in CHOICES:
        raise ValueError(f"kernels {choice!r}: use one of {', '.join(CHOICES)}")
    if choice == "triton" and triton is None:
        raise ValueError(f"{_ASKED} the package triton is not installed (PyTorch on Linux has it)")
    if choice == "triton" and not INTERPRETED and not torch.cuda.is_available():
        raise ValueError(f"{_ASKED} PyTorch sees no GPU; TRITON_INTERPRET=1 interprets them (slow)")


def _on_triton(x: Tensor) -> bool:
    """Whether an operation on x takes the Triton path."""
    if _choice != "auto":
        _check(_choice)  # the environment's choice has not been checked yet
        if _choice == "triton" and not x.is_cuda and not INTERPRETED:
            raise ValueError(f"{_ASKED} the input is on {x.device}: use a GPU, or use('auto')")
        return _choice == "triton"
    if x.is_cuda and triton is None:
        warnings.warn("triton is not installed: plain PyTorch replaces the kernels", stacklevel=3)
        return False
    return x.is_cuda or INTERPRETED and triton is not None


def dice_ce(logits, target, *options, **named) -> tuple[Tensor, Tensor]:
    """(loss, soft Dice per class); `dice_ce_ref` explains the arguments."""
    path = dice_ce_triton if _on_triton(logits) else dice_ce_plain
    return path(logits, target, *options, **named)


def norm_act(x, *options, **named) -> Tensor:
    """Instance norm, affine, PReLU, + residual; `norm_act_ref` explains the arguments.

    One more, `stats`, is for `norm_act_triton`: what an earlier call kept in y.known["stats"].
    """
    path = norm_act_triton if _on_triton(x) else norm_act_plain
    return path(x, *options, **named)


def voxel_shuffle(x, corners, size, seed, inverse=False) -> Tensor:
    """Permute the voxels in cubes of x; `voxel_shuffle_ref` explains the arguments."""
    path = voxel_shuffle_triton if _on_triton(x) else voxel_shuffle_plain
    return path(x, corners, size, seed, inverse)
