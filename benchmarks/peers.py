"""What the benchmarks compare: ours, the peers, and the plainest PyTorch, as functions of tensors. Built anew at each call."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels.dice_ce import dice_ce_plain, dice_ce_triton  # noqa: E402
from kernels.norm_act import norm_act_plain, norm_act_triton  # noqa: E402
from kernels.voxel_shuffle import voxel_shuffle_plain, voxel_shuffle_ref, voxel_shuffle_triton  # noqa: E402

LAYOUTS = {"NCDHW": torch.contiguous_format, "channels_last": torch.channels_last_3d}
OPS = ("dice_ce", "norm_act", "norm_act+residual", "voxel_shuffle")
INSTALL = "MONAI or nnU-Net is not installed and left out: pip install '.[bench]'"


def contenders(op: str) -> tuple[dict, list[str]]:
    """({name: function}, names of peers that are not installed). Functions take what `arguments(op, ...)` gives and return one tensor."""
    missing = []
    if op == "dice_ce":
        found = {
            "ours Triton": lambda logits, labels: dice_ce_triton(logits, labels)[0],
            "ours plain": lambda logits, labels: dice_ce_plain(logits, labels)[0],
            "eager": eager_dice_ce,
        }
        for name, build in (("MONAI", _monai), ("nnU-Net", _nnunet)):
            try:
                found[name] = build()
            except ImportError:
                missing.append(name)
        return found, missing
    if op.startswith("norm_act"):
        return {"ours Triton": norm_act_triton, "ours plain": norm_act_plain, "eager": eager_norm_act}, missing
    shuffles = {"ours Triton": voxel_shuffle_triton, "ours plain": voxel_shuffle_plain, "eager": voxel_shuffle_ref}
    return {name: lambda x, corners, f=f: f(x, corners, 16, 7) for name, f in shuffles.items()}, missing


def arguments(op: str, shape: tuple, dtype=torch.float32, layout="NCDHW", device="cpu") -> tuple:
    """Random inputs in the given layout, those that are trained requiring a gradient. shape: (B, C, D, H, W)."""
    generator = torch.Generator().manual_seed(0)
    b, c, *size = shape

    def random():
        x = torch.randn(shape, generator=generator).to(device, dtype)
        return x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()

    if op == "dice_ce":
        return random(), torch.randint(0, c, (b, 1, *size), generator=generator).to(device, torch.uint8)
    if op == "voxel_shuffle":
        return random(), torch.randint(0, min(size) - 15, (b, 1, 3), generator=generator)
    weight, bias, slope = (torch.full((n,), v, device=device, requires_grad=True) for n, v in ((c, 1.0), (c, 0.0), (1, 0.25)))
    return (random(), weight, bias, slope) + ((random(),) if op.endswith("residual") else ())


def eager_dice_ce(logits, labels):
    """The formula as one writes it: soft Dice of the foreground over the batch, plus cross entropy."""
    p = logits.float().softmax(1)
    one_hot = F.one_hot(labels[:, 0].long(), logits.shape[1]).movedim(-1, 1).float()
    dims = (0, 2, 3, 4)
    dice = (2 * (p * one_hot).sum(dims) + 1e-5) / (p.sum(dims) + one_hot.sum(dims) + 1e-5)
    return 1 - dice[1:].mean() + F.cross_entropy(logits.float(), labels[:, 0].long())


def eager_norm_act(x, weight, bias, slope, residual=None):
    """PyTorch's instance norm and PReLU, one after the other."""
    y = F.prelu(F.instance_norm(x, weight=weight.to(x.dtype), bias=bias.to(x.dtype)), slope.to(x.dtype))
    return y if residual is None else y + residual


def _monai():
    from monai.losses import DiceCELoss

    return DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, batch=True)


def _nnunet():
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    return DC_and_CE_loss(dice, {}, weight_ce=1, weight_dice=1, ignore_label=None, dice_class=MemoryEfficientSoftDiceLoss)
