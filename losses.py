"""The losses: Dice + cross entropy for segmentation, L2 for reconstruction, BCE for classification.

    v1      lambda_seg (Dice + CE) + lambda_rec L2(CT)
    v2      lambda_seg (Dice + CE) + lambda_rec L2(CT and PET, one mean over both)
    v3      v2's loss + lambda_cls BCE("the patch or patient has a tumor")
    v4      Dice + CE of the fused logits
    brain   mean over the targets (core, edema; v2: + whole) of 1/3 (Dice + CE)

The authors' release differs in three places, by mistake: it weights CE by Dice's weight, v3 ignores
lambda_cls, and its brain loss counts the edema's Dice twice and its cross entropy never.

Soft Dice in the four cases of truth and prediction, smooth = 1e-5 in numerator and denominator:
    tumor, found            the ratio 2 I / (P + T), as it should be
    tumor, not found        about 0: loss 1, and its gradient pulls the true voxels up
    no tumor, some found    smooth / (P + smooth), about 0: loss 1; its gradient fades as 1 / P^2
    no tumor, none found    1 only once P is far below 1e-5; until then CE does the work
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from mirror_unet import TASKS

SEGMENTATIONS = ("seg", "core", "whole", "edema")


def dice_ce(
    logits, target, include_background=False, batch=True, smooth_nr=1e-5, smooth_dr=1e-5,
    dice_weight=1.0, ce_weight=1.0, class_weight=None, ignore_index=None,
) -> Tensor:
    """dice_weight (1 - mean Dice) + ce_weight CE, a float32 scalar.

    logits (B, C, D, H, W), finite of any size in fp16, bf16 or fp32; target integer labels
    (B, 1, D, H, W) or (B, D, H, W). `kernels.dice_ce` explains the options.
    """
    return kernels.dice_ce(
        logits, target, include_background, batch, smooth_nr, smooth_dr,
        dice_weight, ce_weight, class_weight, ignore_index,
    )[0]


def soft_dice(logits: Tensor, target: Tensor, **options) -> Tensor:
    """1 - mean over classes of (2 I + smooth) / (P + T + smooth); arguments as in `dice_ce`."""
    return dice_ce(logits, target, dice_weight=1.0, ce_weight=0.0, **options)


def cross_entropy(logits: Tensor, target: Tensor, **options) -> Tensor:
    """Mean over voxels of -log softmax(logits)[label], with background; arguments as `dice_ce`."""
    return dice_ce(logits, target, dice_weight=0.0, ce_weight=1.0, **options)


def l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over all elements of (prediction - target)^2, in float32. Nothing is broadcast."""
    if prediction.shape != target.shape:
        shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        raise ValueError(f"a reconstruction and its target differ in shape: {shapes}")
    return F.mse_loss(prediction.float(), target.float())


def bce(logit: Tensor, label: Tensor) -> Tensor:
    """Mean of -[y log s(l) + (1 - y) log(1 - s(l))], s the sigmoid; both (B,), or one per cell."""
    return F.binary_cross_entropy_with_logits(logit.float(), label.float().reshape(logit.shape))


class MirrorLoss(nn.Module):
    """The loss of a network: `loss(outputs, batch) -> (total, parts)`, a term per task.

    Args:
        version, preset: as for MirrorUNet; they name the tasks.
        lambda_seg, lambda_rec, lambda_cls: weights of segmentation, reconstruction, classification.
            v4 and the brain segmentations have fixed weights, as in the release.
        sync: join the batches of all processes in Dice and cross entropy, see `dice_ce_ref`.
        tasks: another network's tasks instead of those of `version`, names as in TASKS.

    batch: a dict with the clean images "ct" and "pet" (B, 1, D, H, W), integer labels "seg"
    (B, 1, D, H, W) and "tumor" (B,); brain: integer labels "core", "whole", "edema"
    (B, 1, D, H, W). Only what the tasks need is read.

    parts: every term by name, unweighted and detached: "seg_dice" (soft Dice loss of the
    foreground), "seg_ce", "ct_l2", "pet_l2", "cls_bce", "core_dice", ...
    """

    def __init__(
        self, version="v3", preset="petct", lambda_seg=0.5, lambda_rec=1e-3, lambda_cls=1e-2,
        sync=False, tasks=None,
    ):
        super().__init__()
        self.tasks = TASKS[preset][version] if tasks is None else tasks
        self.preset, self.sync = preset, sync
        self.lambda_seg, self.lambda_rec, self.lambda_cls = lambda_seg, lambda_rec, lambda_cls

    def forward(self, outputs: tuple, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        parts: dict[str, Tensor] = {}
        segmentations, reconstructions, classification = [], [], None
        for name in self.tasks:
            output = getattr(outputs, name)
            if name in SEGMENTATIONS:
                loss, dice = kernels.dice_ce(output, batch[name], sync=self.sync)
                segmentations.append(loss)
                parts[f"{name}_dice"] = 1 - dice[1:].mean()
                parts[f"{name}_ce"] = loss.detach() - parts[f"{name}_dice"]
            elif name == "tumor":
                classification = bce(output, batch["tumor"])
                cells: Tensor | None = getattr(outputs, "cells", None)
                if cells is not None:  # judge every cell by the voxels in it
                    truth = F.adaptive_max_pool3d(batch["seg"].float(), cells.shape[1:])
                    classification = bce(cells, truth)
                parts["cls_bce"] = classification.detach()
            else:
                reconstructions.append(l2(output, batch[name]))
                parts[f"{name}_l2"] = reconstructions[-1].detach()

        total = torch.stack(segmentations).mean()
        if self.preset == "brain":
            total = total / 3
        elif len(self.tasks) > 1:
            total = self.lambda_seg * total
        if reconstructions:  # all of one size, so the mean of their means is the mean over all
            total = total + self.lambda_rec * torch.stack(reconstructions).mean()
        if classification is not None:
            total = total + self.lambda_cls * classification
        return total, parts
