"""The losses: exact against the authors' release, by hand on a few voxels, and the laws they obey."""

import json
import math

import numpy as np
import pytest
import torch

import kernels
from losses import MirrorLoss, bce, cross_entropy, dice_ce, l2, soft_dice
from mirror_unet import BrainOutput, MirrorOutput


@pytest.fixture
def release(golden):
    """Inputs, predictions by version, and the expected (loss, gradient norm) of the authors' release."""
    z = np.load(golden / "losses.npz")
    t = {k: torch.from_numpy(z[k]) for k in z.files if k != "expected"}
    batch = {"ct": t["inp"][:, :1], "pet": t["inp"][:, 1:], "seg": t["seg"], "tumor": t["lab"], "core": t["core"], "edema": t["edema"]}
    batch["whole"] = ((t["core"] + t["edema"]) > 0).to(torch.uint8)
    return t, batch, json.loads(str(z["expected"]))


def unpack(version, p, prob):
    logit = None if version != "v3" else torch.logit(prob)
    if version == "v4":
        return MirrorOutput(seg=p)
    return MirrorOutput(seg=p[:, -2:], ct=p[:, :1], pet=None if version == "v1" else p[:, 1:2], tumor=logit)


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v4"])
def test_equals_the_official_loss(release, version):
    t, batch, expected = release
    p = t[f"p_{version}"].clone().requires_grad_()
    total, parts = MirrorLoss(version)(unpack(version, p, t["prob"]), batch)
    total.backward()
    value, norm = expected[version]
    assert total.item() == pytest.approx(value, abs=1e-6)
    assert p.grad.norm().item() == pytest.approx(norm, rel=1e-4)
    assert not any(v.requires_grad for v in parts.values())


def test_brain_loss_is_the_correct_one_and_the_release_differs(release):
    """The release adds the edema's Dice twice and never its cross entropy; ours adds each once."""
    t, batch, expected = release
    p = t["p_brats"].clone().requires_grad_()
    out = BrainOutput(core=p[:, 0:2], whole=p[:, 2:4], edema=p[:, 4:6])
    total, parts = MirrorLoss("v2", "brain")(out, batch)
    terms = {n: (soft_dice(getattr(out, n), batch[n]), cross_entropy(getattr(out, n), batch[n])) for n in ("core", "whole", "edema")}
    correct = sum(d + ce for d, ce in terms.values()) / 9
    defect = (9 * correct + terms["edema"][0] - terms["edema"][1]) * 0.333 / 3  # its "one third" is 0.333
    assert total.item() == pytest.approx(correct.item(), abs=1e-6)
    assert set(parts) == {f"{n}_{k}" for n in terms for k in ("dice", "ce")}
    (grad,) = torch.autograd.grad(defect, p)
    assert defect.item() == pytest.approx(expected["brats_v2"][0], abs=1e-6)
    assert grad.norm().item() == pytest.approx(expected["brats_v2"][1], rel=1e-4)
    assert abs(total.item() - expected["brats_v2"][0]) > 1e-3


def test_total_is_the_weighted_sum_of_its_parts(release):
    """Each lambda weighs its own term and nothing else: doubling it adds the term once more."""
    t, batch, _ = release
    out = unpack("v3", t["p_v3"], t["prob"])
    base, parts = MirrorLoss("v3")(out, batch)
    seg = parts["seg_dice"] + parts["seg_ce"]
    rec = (parts["ct_l2"] + parts["pet_l2"]) / 2
    assert base.item() == pytest.approx((0.5 * seg + 1e-3 * rec + 1e-2 * parts["cls_bce"]).item(), rel=1e-5)
    for name, term in (("lambda_seg", seg), ("lambda_rec", rec), ("lambda_cls", parts["cls_bce"])):
        more = MirrorLoss("v3", **{name: {"lambda_seg": 0.5, "lambda_rec": 1e-3, "lambda_cls": 1e-2}[name] + 1})(out, batch)[0]
        assert (more - base).item() == pytest.approx(term.item(), rel=1e-4), name


# Two voxels, two classes, logits chosen so that p(tumor) = 0.75 and 0.25; the truth is (tumor, background).
LOGITS = torch.tensor([[0.0, 0.0], [math.log(3.0), -math.log(3.0)]]).reshape(1, 2, 1, 1, 2)
TRUTH = torch.tensor([1, 0]).reshape(1, 1, 1, 1, 2)


def test_dice_and_cross_entropy_by_hand():
    # I = 0.75, P = 0.75 + 0.25 = 1, T = 1: Dice = 1.5 / 2 = 0.75. CE = -(log 0.75 + log 0.75) / 2 = 0.287682.
    assert soft_dice(LOGITS, TRUTH, smooth_nr=0.0, smooth_dr=0.0).item() == pytest.approx(0.25, abs=1e-6)
    assert cross_entropy(LOGITS, TRUTH).item() == pytest.approx(0.287682, abs=1e-6)
    assert dice_ce(LOGITS, TRUTH, smooth_nr=0.0, smooth_dr=0.0).item() == pytest.approx(0.537682, abs=1e-6)
    # With smoothing 1: (1.5 + 1) / (2 + 1).
    assert soft_dice(LOGITS, TRUTH, smooth_nr=1.0, smooth_dr=1.0).item() == pytest.approx(1 - 2.5 / 3, abs=1e-6)
    # Class weights 1 and 3: (1 * 0.287682 + 3 * 0.287682) / 4 is the same; make the voxels differ by ignoring none and weighting 0.
    assert cross_entropy(LOGITS * 0, TRUTH, class_weight=torch.tensor([1.0, 3.0])).item() == pytest.approx(math.log(2), abs=1e-6)
    # The second voxel ignored: Dice = 2 * 0.75 / (0.75 + 1), CE = -log 0.75.
    masked = torch.tensor([1, 255]).reshape(1, 1, 1, 1, 2)
    assert soft_dice(LOGITS, masked, ignore_index=255, smooth_nr=0.0, smooth_dr=0.0).item() == pytest.approx(1 - 1.5 / 1.75, abs=1e-6)
    assert cross_entropy(LOGITS, masked, ignore_index=255).item() == pytest.approx(-math.log(0.75), abs=1e-6)


def test_class_weights_by_hand():
    # p = (0.75, 0.25) at a tumor and (0.25, 0.75) swapped at a second tumor voxel: -log 0.25 and -log 0.75 with weights 1 and 3.
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(3.0)]]).reshape(1, 2, 1, 1, 2)  # p(0) = 0.75, 0.25
    truth = torch.tensor([1, 1]).reshape(1, 1, 1, 1, 2)
    other = torch.tensor([0, 1]).reshape(1, 1, 1, 1, 2)
    assert cross_entropy(logits, truth, class_weight=torch.tensor([1.0, 3.0])).item() == pytest.approx(
        -(math.log(0.25) + math.log(0.75)) / 2, abs=1e-6
    )
    half = torch.tensor([0, 0]).reshape(1, 1, 1, 1, 2)
    mixed = -(math.log(0.75) * 1 + math.log(0.75) * 3) / 4
    assert cross_entropy(logits, other, class_weight=torch.tensor([1.0, 3.0])).item() == pytest.approx(mixed, abs=1e-6)
    uneven = -(math.log(0.75) * 1 + math.log(0.25) * 1) / 2
    assert cross_entropy(logits, half, class_weight=torch.tensor([1.0, 3.0])).item() == pytest.approx(uneven, abs=1e-6)


def test_batch_dice_sums_before_the_ratio():
    logits = torch.cat([LOGITS, LOGITS * 3])
    truth = torch.cat([TRUTH, torch.zeros_like(TRUTH)])
    p = logits.softmax(1)[:, 1].flatten(1)
    t = truth.flatten(1).float()
    together = 2 * (p * t).sum() / (p.sum() + t.sum())
    each = (2 * (p * t).sum(1) / (p.sum(1) + t.sum(1))).mean()
    zero = dict(smooth_nr=0.0, smooth_dr=0.0)
    assert soft_dice(logits, truth, **zero).item() == pytest.approx(1 - together.item(), abs=1e-6)
    assert soft_dice(logits, truth, batch=False, **zero).item() == pytest.approx(1 - each.item(), abs=1e-6)
    assert kernels.dice_ce(logits, truth)[1].shape == (2,) and kernels.dice_ce(logits, truth, batch=False)[1].shape == (2, 2)


def mask_and_logits(true: bool, predicted: bool):
    truth = torch.zeros(1, 1, 4, 4, 4, dtype=torch.uint8)
    truth[..., :2] = int(true)
    foreground = torch.full((1, 1, 4, 4, 4), -50.0)
    if predicted:
        foreground[..., :2] = 50.0
    return torch.cat([torch.zeros_like(foreground), foreground], 1), truth


@pytest.mark.parametrize(
    "true,predicted,dice",
    [(True, True, 0.0), (True, False, 1.0), (False, True, 1.0), (False, False, 0.0)],
)
def test_soft_dice_in_the_four_empty_and_non_empty_cases(true, predicted, dice):
    logits, truth = mask_and_logits(true, predicted)
    logits.requires_grad_()
    loss = dice_ce(logits, truth)
    loss.backward()
    assert soft_dice(logits.detach(), truth).item() == pytest.approx(dice, abs=1e-5)
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_an_empty_truth_has_loss_1_until_the_prediction_is_really_empty():
    """As the module says: smooth / (P + smooth). With p = 0.01 on 64 voxels, P = 0.64."""
    logits = torch.zeros(1, 2, 4, 4, 4)
    logits[:, 1] = math.log(0.01 / 0.99)
    truth = torch.zeros(1, 1, 4, 4, 4, dtype=torch.long)
    assert soft_dice(logits, truth).item() == pytest.approx(1 - 1e-5 / (0.64 + 1e-5), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("options", [{}, {"batch": False}, {"include_background": True}, {"ignore_index": 1}])
def test_finite_for_every_dtype_and_huge_logits(dtype, scale, options):
    torch.manual_seed(0)
    logits = (torch.randn(2, 3, 16, 16, 16).clamp(-1, 1) * scale).to(dtype).requires_grad_()
    loss = dice_ce(logits, torch.randint(0, 3, (2, 1, 16, 16, 16)), **options)
    loss.backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == dtype
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_everything_ignored_is_a_loss_of_zero():
    logits = torch.randn(1, 2, 4, 4, 4, requires_grad=True)
    loss = dice_ce(logits, torch.full((1, 1, 4, 4, 4), 7), ignore_index=7)
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool])
def test_labels_of_every_integer_type_and_both_shapes(dtype):
    torch.manual_seed(0)
    logits, truth = torch.randn(2, 2, 3, 5, 7), torch.randint(0, 2, (2, 1, 3, 5, 7))
    expected = dice_ce(logits, truth)
    assert torch.equal(dice_ce(logits, truth.to(dtype)), expected)
    assert torch.equal(dice_ce(logits, truth[:, 0].to(dtype)), expected)
    last = logits.contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(dice_ce(last, truth), expected)


@pytest.mark.parametrize(
    "options", [{}, {"batch": False}, {"include_background": True}, {"ignore_index": 2}, {"class_weight": torch.tensor([1.0, 2.0, 5.0])}]
)
def test_gradient_is_that_of_finite_differences(options):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 2, 3, 2, dtype=torch.double, requires_grad=True)
    truth = torch.randint(0, 3, (2, 1, 2, 3, 2))
    assert torch.autograd.gradcheck(lambda x: dice_ce(x, truth, **options), logits)


def test_a_perfect_prediction_costs_nothing_and_swapping_voxels_changes_nothing():
    truth = torch.randint(0, 2, (1, 1, 6, 6, 6), generator=torch.Generator().manual_seed(0))
    perfect = torch.nn.functional.one_hot(truth[:, 0], 2).movedim(-1, 1) * 60.0
    assert dice_ce(perfect, truth).item() == pytest.approx(0, abs=1e-6)
    logits = torch.randn(1, 2, 6, 6, 6)
    order = torch.randperm(216)
    shuffled = [t.flatten(2)[:, :, order].reshape(t.shape) for t in (logits, truth)]
    torch.testing.assert_close(dice_ce(*shuffled), dice_ce(logits, truth))


def test_reconstruction_and_classification():
    assert l2(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])).item() == 2.5  # (1 + 4) / 2
    with pytest.raises(ValueError, match="differ in shape"):
        l2(torch.zeros(2, 1, 4), torch.zeros(1, 1, 4))  # no broadcasting
    assert bce(torch.tensor([0.0, math.log(3.0)]), torch.tensor([1.0, 0.0])).item() == pytest.approx(
        (math.log(2) + math.log(4)) / 2, abs=1e-6
    )
    assert torch.isfinite(bce(torch.tensor([1e4, -1e4], dtype=torch.float16), torch.tensor([0.0, 1.0])))


def test_shapes_that_do_not_fit_are_refused():
    for logits, truth in (((1, 1, 2, 2, 2), (1, 1, 2, 2, 2)), ((1, 2, 2, 2, 2), (1, 1, 2, 2, 3)), ((2, 2, 2, 2, 2), (1, 1, 2, 2, 2))):
        with pytest.raises(ValueError, match="labels of shape"):
            dice_ce(torch.zeros(logits), torch.zeros(truth, dtype=torch.long))
    with pytest.raises(ValueError, match="integer labels"):
        dice_ce(torch.zeros(1, 2, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2))
