"""The losses: Dice + cross entropy for segmentation, L2 for reconstruction, BCE for classification, and their sum a version.

    v1      lambda_seg (Dice + CE) + lambda_rec L2(CT)
    v2      lambda_seg (Dice + CE) + lambda_rec L2(CT and PET, one mean over both)
    v3      as v2 + lambda_cls BCE("the patch or patient has a tumor")
    v4      Dice + CE of the fused logits
    brain   mean over the targets (core, edema; v2: + whole) of 1/3 (Dice + CE)

Where the authors' release differs, it errs, and this file does not: it weighted CE by Dice's weight, left v3 deaf to lambda_cls,
and its brain loss counted the edema's Dice twice and its cross entropy never.

Soft Dice in the four cases of truth and prediction, with smooth = 1e-5 in numerator and denominator, N voxels:
    truth there, predicted            the ratio 2 I / (P + T), as it should be
    truth there, nothing predicted    about 0: loss 1, its gradient pulls the true voxels up
    truth empty, something predicted  smooth / (P + smooth), about 0: loss 1, with a gradient that fades as 1 / P^2
    truth empty, nothing predicted    1 only once P is far below 1e-5; until then it is the case above, and CE does the work
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels


def dice_ce(
    logits, target, include_background=False, batch=True, smooth_nr=1e-5, smooth_dr=1e-5,
    dice_weight=1.0, ce_weight=1.0, class_weight=None, ignore_index=None,
) -> Tensor:  # fmt: skip
    """dice_weight (1 - mean Dice) + ce_weight CE, a float32 scalar.

    logits (B, C, D, H, W); target integer labels (B, 1, D, H, W) or (B, D, H, W); `kernels.dice_ce` explains each option. Finite for
    logits of any size in fp16, bf16 and fp32.
    """
    options = (include_background, batch, smooth_nr, smooth_dr, dice_weight, ce_weight, class_weight, ignore_index)
    return kernels.dice_ce(logits, target, *options)[0]


def soft_dice(logits: Tensor, target: Tensor, **options) -> Tensor:
    """1 - mean over classes of (2 I + smooth) / (P + T + smooth); shapes and options as `dice_ce`."""
    return dice_ce(logits, target, dice_weight=1.0, ce_weight=0.0, **options)


def cross_entropy(logits: Tensor, target: Tensor, **options) -> Tensor:
    """Mean over voxels of -log softmax(logits)[label], background included; shapes and options as `dice_ce`."""
    return dice_ce(logits, target, dice_weight=0.0, ce_weight=1.0, **options)


def l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over all elements of (prediction - target)^2, in float32. Shapes must be equal: nothing is broadcast."""
    if prediction.shape != target.shape:
        raise ValueError(f"reconstruction {tuple(prediction.shape)} and its target {tuple(target.shape)} differ in shape")
    return F.mse_loss(prediction.float(), target.float())


def bce(logit: Tensor, label: Tensor) -> Tensor:
    """Mean over the batch of -[y log s(l) + (1 - y) log(1 - s(l))], s the sigmoid; logit and label (B,)."""
    return F.binary_cross_entropy_with_logits(logit.float(), label.float().reshape(logit.shape))


class MirrorLoss(nn.Module):
    """The loss of one version: `loss(outputs, batch) -> (total, parts)`.

    Args:
        version, preset: as MirrorUNet's.
        lambda_seg, lambda_rec, lambda_cls: weights of segmentation, reconstruction and classification in v1-v3 (the release's
            values are the defaults). v4 and the brain preset have fixed weights and ignore them, as the release does.
        sync: Dice and cross entropy of the batches of all processes together, see `kernels.dice_ce_ref`.

    batch: a dict with the clean images "ct" and "pet" (B, 1, D, H, W), integer labels "seg" (B, 1, D, H, W) and "tumor" (B,);
    brain: integer labels "core", "edema" and (v2) "whole" (B, 1, D, H, W). Only what the version needs is read.

    parts: every term, unweighted and detached, by name ("seg_dice", "seg_ce", "ct_l2", "pet_l2", "cls_bce", "core_dice", ...);
    the soft Dice losses among them are 1 - Dice of the foreground.
    """

    def __init__(self, version="v3", preset="petct", lambda_seg=0.5, lambda_rec=1e-3, lambda_cls=1e-2, sync=False):
        super().__init__()
        self.version, self.preset, self.sync = version, preset, sync
        self.lambda_seg, self.lambda_rec, self.lambda_cls = lambda_seg, lambda_rec, lambda_cls

    def forward(self, outputs: tuple, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        parts: dict[str, Tensor] = {}
        if self.preset == "brain":
            targets = ("core", "edema") if self.version == "v1" else ("core", "whole", "edema")
            terms = [_segmentation(getattr(outputs, name), batch[name], name, parts, self.sync) for name in targets]
            return torch.stack(terms).mean() / 3, parts
        total = _segmentation(outputs.seg, batch["seg"], "seg", parts, self.sync)
        if self.version == "v4":
            return total, parts
        total = self.lambda_seg * total + self.lambda_rec * self._reconstruction(outputs, batch, parts)
        if self.version == "v3":
            parts["cls_bce"] = bce(outputs.tumor, batch["tumor"])
            total = total + self.lambda_cls * parts["cls_bce"]
            parts["cls_bce"] = parts["cls_bce"].detach()
        return total, parts

    def _reconstruction(self, outputs: tuple, batch: dict[str, Tensor], parts: dict[str, Tensor]) -> Tensor:
        """One mean over the reconstructions there are: of equal size, so the mean of their means."""
        names = ("ct",) if self.version == "v1" else ("ct", "pet")
        terms = [l2(getattr(outputs, name), batch[name]) for name in names]
        parts |= {f"{name}_l2": term.detach() for name, term in zip(names, terms)}
        return torch.stack(terms).mean()


def _segmentation(logits: Tensor, target: Tensor, name: str, parts: dict[str, Tensor], sync: bool) -> Tensor:
    """Dice + CE of one target, its two halves entered into parts."""
    loss, dice = kernels.dice_ce(logits, target, sync=sync)
    parts[f"{name}_dice"] = 1 - dice[1:].mean()
    parts[f"{name}_ce"] = loss.detach() - parts[f"{name}_dice"]
    return loss
