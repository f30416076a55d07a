"""Soft Dice + cross entropy on logits, the segmentation loss of every system here.

With p = softmax(logits) over C classes, t the one-hot labels, w_c class weights and sums over the voxels v that are not ignored:

    I_c = sum_v p_cv t_cv        P_c = sum_v p_cv        T_c = sum_v t_cv
    Dice_c = (2 I_c + smooth_nr) / (P_c + T_c + smooth_dr)
    CE = sum_v w_(label v) (-log p_(label v, v)) / sum_v w_(label v)
    loss = dice_weight mean_c (1 - Dice_c) + ce_weight CE

The mean over c leaves the background out unless include_background; CE always has it. `batch=True` sums over the batch before
the ratio (one Dice a class), `batch=False` takes a Dice a sample and class. No squares in the denominator.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dice_ce_ref(
    logits: Tensor,
    target: Tensor,
    include_background: bool = False,
    batch: bool = True,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    class_weight: Tensor | None = None,
    ignore_index: int | None = None,
    sync: bool = False,
    upcast: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loss in plain PyTorch, on any device.

    Args:
        logits: (B, C, D, H, W), C >= 2, any floating dtype; computed in float32 (float64 if given so, or with upcast=True).
        target: integer labels in [0, C), (B, 1, D, H, W) or (B, D, H, W), any integer dtype or bool.
        class_weight: (C,) weights of the cross entropy; Dice is not weighted.
        ignore_index: voxels with this label count neither in Dice nor in cross entropy.

    Returns (loss, dice): a scalar, and the detached soft Dice of all C classes, background included: (C,), or (B, C) with
    batch=False. If every voxel is ignored, cross entropy is 0. Raises ValueError for shapes or dtypes that do not fit.
    """
    if target.dim() == logits.dim():
        target = target.squeeze(1)
    if logits.dim() < 3 or logits.shape[1] < 2 or target.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(f"logits {tuple(logits.shape)} need C >= 2 and labels of shape (B, 1, ...) or (B, ...), got {tuple(target.shape)}")
    if target.is_floating_point():
        raise ValueError(f"target: expected integer labels, got {target.dtype}")
    # Half precision would overflow in the sums over a volume: go up to float32 before anything else.
    log_p = F.log_softmax(logits.double() if upcast or logits.dtype == torch.float64 else logits.float(), dim=1)
    target = target.long()
    kept = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    label = torch.where(kept, target, 0).unsqueeze(1)  # (B, 1, D, H, W)

    p = log_p.exp() * kept.unsqueeze(1)
    one_hot = torch.zeros_like(log_p).scatter_(1, label, 1.0) * kept.unsqueeze(1)
    dims = [d for d in range(logits.dim()) if d != 1 and (batch or d != 0)]
    intersection, total = (p * one_hot).sum(dims), p.sum(dims) + one_hot.sum(dims)
    dice = (2 * intersection + smooth_nr) / (total + smooth_dr)

    weight = kept.to(log_p.dtype)  # (B, D, H, W)
    if class_weight is not None:
        weight = weight * class_weight.to(log_p)[label.squeeze(1)]
    tiny = torch.finfo(log_p.dtype).tiny
    cross_entropy = -(log_p.gather(1, label).squeeze(1) * weight).sum() / weight.sum().clamp_min(tiny)

    scored = dice if include_background else dice[..., 1:]
    return dice_weight * (1 - scored).mean() + ce_weight * cross_entropy, dice.detach()


dice_ce_plain = dice_ce_triton = dice_ce_ref
