"""The functions that the benchmarks compare: ours, the peers' and straightforward PyTorch.

The functions and their arguments are built at each call.
"""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels.dice_ce import dice_ce_plain, dice_ce_triton
from kernels.norm_act import norm_act_plain, norm_act_triton
from kernels.voxel_shuffle import voxel_shuffle_plain, voxel_shuffle_ref, voxel_shuffle_triton

LAYOUTS = {"NCDHW": torch.contiguous_format, "channels_last": torch.channels_last_3d}
OPS = ("dice_ce", "norm_act", "norm_act+residual", "voxel_shuffle")
INSTALL = "MONAI or nnU-Net is not installed and left out: pip install '.[bench]'"


def contenders(op: str) -> tuple[dict, list[str]]:
    """({name: function}, names of peers that are not installed).

    The functions take what `arguments(op, ...)` returns, and return one tensor.
    """
    missing = []
    if op.startswith("norm_act"):
        found = {"ours Triton": norm_act_triton, "ours plain": norm_act_plain}
        return found | {"eager": eager_norm_act}, missing
    if op == "voxel_shuffle":
        found = {"ours Triton": voxel_shuffle_triton, "ours plain": voxel_shuffle_plain}
        found["eager"] = voxel_shuffle_ref
        return {name: partial(f, size=16, seed=7) for name, f in found.items()}, missing
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


def arguments(op: str, shape: tuple, dtype=torch.float32, layout="NCDHW", device="cpu") -> tuple:
    """Random inputs of shape (B, C, D, H, W) in a layout; trained ones require a gradient."""
    generator = torch.Generator().manual_seed(0)
    b, c, *size = shape

    def random():
        """Normal values of the given shape, dtype and layout."""
        x = torch.randn(shape, generator=generator).to(device, dtype)
        return x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()

    def constant(n: int, value: float):
        """n equal parameters."""
        return torch.full((n,), value, device=device, requires_grad=True)

    if op == "dice_ce":
        logits = random()
        labels = torch.randint(0, c, (b, 1, *size), generator=generator)
        return logits, labels.to(device, torch.uint8)
    if op == "voxel_shuffle":
        x = random()
        return x, torch.randint(0, min(size) - 15, (b, 1, 3), generator=generator)
    given = (random(), constant(c, 1.0), constant(c, 0.0), constant(1, 0.25))
    return (*given, random()) if op.endswith("residual") else given


def eager_dice_ce(logits, labels):
    """The formula as one writes it: soft Dice of the foreground over the batch + cross entropy."""
    p = logits.float().softmax(1)
    one_hot = F.one_hot(labels[:, 0].long(), logits.shape[1]).movedim(-1, 1).float()
    dims = (0, 2, 3, 4)
    dice = (2 * (p * one_hot).sum(dims) + 1e-5) / (p.sum(dims) + one_hot.sum(dims) + 1e-5)
    return 1 - dice[1:].mean() + F.cross_entropy(logits.float(), labels[:, 0].long())


def eager_norm_act(x, weight, bias, slope, residual=None):
    """PyTorch's instance norm and PReLU, one after the other."""
    y = F.instance_norm(x, weight=weight.to(x.dtype), bias=bias.to(x.dtype))
    y = F.prelu(y, slope.to(x.dtype))
    return y if residual is None else y + residual


def _monai():
    """MONAI's loss with the settings of `dice_ce`."""
    from monai.losses import DiceCELoss

    return DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, batch=True)


def _nnunet():
    """nnU-Net's loss with the settings of `dice_ce`."""
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    options = {"weight_ce": 1, "weight_dice": 1, "ignore_label": None}
    return DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss, **options)
