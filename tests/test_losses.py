"""losses.py: equal to the authors' release, to values computed by hand, and sound at the limits."""

import json
import math

import numpy as np
import pytest
import torch

import kernels
from losses import MirrorLoss, bce, cross_entropy, dice_ce, l2, soft_dice
from mirror_unet import BrainOutput, MirrorOutput


# ----------------------------------------------------------------------------- the authors' release
@pytest.fixture
def release(golden):
    """Arrays, the batch, and by version the release's (loss, norm of its gradient)."""
    target = np.load(golden / "losses.npz")
    arrays = {k: torch.from_numpy(target[k]) for k in target.files if k != "expected"}
    core, edema = arrays["core"], arrays["edema"]
    batch = {
        "ct": arrays["inp"][:, :1],
        "pet": arrays["inp"][:, 1:],
        "seg": arrays["seg"],
        "tumor": arrays["lab"],
        "core": core,
        "edema": edema,
        "whole": ((core + edema) > 0).to(torch.uint8),
    }
    return arrays, batch, json.loads(str(target["expected"]))


def unpack(version, packed, probability) -> MirrorOutput:
    """The release's channels -> our named outputs."""
    if version == "v4":
        return MirrorOutput(seg=packed)
    return MirrorOutput(
        seg=packed[:, -2:],
        ct=packed[:, :1],
        pet=None if version == "v1" else packed[:, 1:2],
        tumor=torch.logit(probability) if version == "v3" else None,
    )


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v4"])
def test_the_loss_of_each_version_equals_the_release(release, version):
    arrays, batch, expected = release
    packed = arrays[f"p_{version}"].clone().requires_grad_()
    total, parts = MirrorLoss(version)(unpack(version, packed, arrays["prob"]), batch)
    total.backward()
    value, norm = expected[version]
    assert total.item() == pytest.approx(value, abs=1e-6)
    assert packed.grad.norm().item() == pytest.approx(norm, rel=1e-4)
    assert not any(part.requires_grad for part in parts.values())


def test_the_brain_loss_counts_each_term_once_and_the_release_does_not(release):
    """The release adds the edema's Dice twice and never its cross entropy."""
    arrays, batch, expected = release
    packed = arrays["p_brats"].clone().requires_grad_()
    out = BrainOutput(core=packed[:, 0:2], whole=packed[:, 2:4], edema=packed[:, 4:6])
    total, parts = MirrorLoss("v2", "brain")(out, batch)
    assert set(parts) == {f"{n}_{k}" for n in ("core", "whole", "edema") for k in ("dice", "ce")}
    dice = {name: soft_dice(getattr(out, name), batch[name]) for name in out._fields}
    ce = {name: cross_entropy(getattr(out, name), batch[name]) for name in out._fields}
    terms = sum(dice.values()) + sum(ce.values())
    assert total.item() == pytest.approx(terms.item() / 9, abs=1e-6)

    mistaken = (terms + dice["edema"] - ce["edema"]) * 0.333 / 3  # 0.333: the release's one third
    (grad,) = torch.autograd.grad(mistaken, packed)
    value, norm = expected["brats_v2"]
    assert mistaken.item() == pytest.approx(value, abs=1e-6)
    assert grad.norm().item() == pytest.approx(norm, rel=1e-4)
    assert abs(total.item() - value) > 1e-3


def test_the_total_is_the_weighted_sum_of_its_parts(release):
    """A weight belongs to a single term: increased by 1, it adds that term once more."""
    arrays, batch, _ = release
    out = unpack("v3", arrays["p_v3"], arrays["prob"])
    total, parts = MirrorLoss("v3")(out, batch)
    terms = {
        "lambda_seg": parts["seg_dice"] + parts["seg_ce"],
        "lambda_rec": (parts["ct_l2"] + parts["pet_l2"]) / 2,
        "lambda_cls": parts["cls_bce"],
    }
    weights = {"lambda_seg": 0.5, "lambda_rec": 1e-3, "lambda_cls": 1e-2}
    expected = sum(weights[name] * term for name, term in terms.items())
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, term in terms.items():
        more, _ = MirrorLoss("v3", **{name: weights[name] + 1})(out, batch)
        assert (more - total).item() == pytest.approx(term.item(), rel=1e-4), name


# ----------------------------------------------------------------------------------------- by hand
def voxels(*values) -> torch.Tensor:
    """A row of voxels as a volume: (N,) -> (1, 1, 1, 1, N)."""
    return torch.tensor(values).reshape(1, 1, 1, 1, -1)


def logits_of(*probabilities: float) -> torch.Tensor:
    """Two-class logits (1, 2, 1, 1, N) whose tumor probabilities are these."""
    tumor = torch.logit(voxels(*probabilities))
    return torch.cat([torch.zeros_like(tumor), tumor], dim=1)


LOGITS = logits_of(0.75, 0.25)
TRUTH = voxels(1, 0)  # tumor, background
UNSMOOTHED = dict(smooth_nr=0.0, smooth_dr=0.0)


def near(value: float):
    """Approximately `value`, as float32 has it."""
    return pytest.approx(value, abs=1e-6)


def test_dice_and_cross_entropy_by_hand():
    # I = 0.75, P = 0.75 + 0.25 = 1, T = 1: Dice = 1.5 / 2 = 0.75.
    assert soft_dice(LOGITS, TRUTH, **UNSMOOTHED).item() == near(0.25)
    # CE = -(log 0.75 + log 0.75) / 2 = 0.287682.
    assert cross_entropy(LOGITS, TRUTH).item() == near(0.287682)
    assert dice_ce(LOGITS, TRUTH, **UNSMOOTHED).item() == near(0.25 + 0.287682)
    weighted = dice_ce(LOGITS, TRUTH, dice_weight=2.0, ce_weight=3.0, **UNSMOOTHED)
    assert weighted.item() == near(2 * 0.25 + 3 * 0.287682)


def test_smoothing_adds_to_numerator_and_denominator():
    smoothed = soft_dice(LOGITS, TRUTH, smooth_nr=1.0, smooth_dr=2.0)
    assert smoothed.item() == near(1 - (1.5 + 1) / (2 + 2))


def test_an_ignored_voxel_counts_nowhere():
    # The second voxel is ignored: Dice = 2 * 0.75 / (0.75 + 1), CE = -log 0.75.
    masked = voxels(1, 255)
    dice = soft_dice(LOGITS, masked, ignore_index=255, **UNSMOOTHED)
    assert dice.item() == near(1 - 1.5 / 1.75)
    assert cross_entropy(LOGITS, masked, ignore_index=255).item() == near(-math.log(0.75))


@pytest.mark.parametrize(
    "truth,expected",
    [
        # The sum of weight * -log p(label), over the sum of the weights.
        ((1, 1), -(3 * math.log(0.75) + 3 * math.log(0.25)) / 6),
        ((1, 0), -(3 * math.log(0.75) + 1 * math.log(0.75)) / 4),
        ((0, 1), -(1 * math.log(0.25) + 3 * math.log(0.25)) / 4),
        ((0, 0), -(1 * math.log(0.25) + 1 * math.log(0.75)) / 2),
    ],
)
def test_class_weights_by_hand(truth, expected):
    weights = torch.tensor([1.0, 3.0])
    assert cross_entropy(LOGITS, voxels(*truth), class_weight=weights).item() == near(expected)


def test_class_weights_of_voxels_with_different_losses_by_hand():
    # p(label) = 0.75 with weight 3 and 0.9 with weight 1.
    loss = cross_entropy(logits_of(0.75, 0.1), TRUTH, class_weight=torch.tensor([1.0, 3.0]))
    assert loss.item() == near(-(3 * math.log(0.75) + math.log(0.9)) / 4)


def test_batch_dice_sums_over_the_batch_before_the_ratio():
    logits = torch.cat([LOGITS, LOGITS * 3])  # 2nd sample: p = 27 / 28 and 1 / 28
    truth = torch.cat([TRUTH, voxels(0, 0)])
    # Sample 1: I = 0.75, P = 1, T = 1. Sample 2: I = 0, P = 1, T = 0.
    together = 2 * 0.75 / (2 + 1)
    each = (2 * 0.75 / 2 + 0) / 2
    assert soft_dice(logits, truth, **UNSMOOTHED).item() == near(1 - together)
    assert soft_dice(logits, truth, batch=False, **UNSMOOTHED).item() == near(1 - each)
    assert kernels.dice_ce(logits, truth)[1].shape == (2,)
    assert kernels.dice_ce(logits, truth, batch=False)[1].shape == (2, 2)


def test_reconstruction_by_hand():
    found = l2(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]]))
    assert found.item() == (1 + 4) / 2
    with pytest.raises(ValueError, match=r"differ in shape: \(2, 1, 4\) and \(1, 1, 4\)"):
        l2(torch.zeros(2, 1, 4), torch.zeros(1, 1, 4))  # no broadcasting


def test_classification_by_hand():
    # Logits of probability 1/2 and 3/4: -log 1/2 for the positive, -log 1/4 for the negative.
    found = bce(torch.tensor([0.0, math.log(3.0)]), torch.tensor([1.0, 0.0]))
    assert found.item() == near((math.log(2) + math.log(4)) / 2)
    huge = torch.tensor([1e4, -1e4], dtype=torch.float16)
    assert bce(huge, torch.tensor([0.0, 1.0])).item() == pytest.approx(1e4, rel=1e-3)


# ------------------------------------------------------------------------------ limits and symmetry
@pytest.mark.parametrize(
    "true,predicted,dice",
    [(True, True, 0.0), (True, False, 1.0), (False, True, 1.0), (False, False, 0.0)],
)
def test_soft_dice_with_and_without_tumor_in_truth_and_prediction(true, predicted, dice):
    truth = torch.zeros(1, 1, 4, 4, 4, dtype=torch.uint8)
    truth[..., :2] = int(true)
    tumor = torch.full((1, 1, 4, 4, 4), -50.0)
    tumor[..., :2] = 50.0 if predicted else -50.0
    logits = torch.cat([torch.zeros_like(tumor), tumor], dim=1).requires_grad_()
    loss = dice_ce(logits, truth)
    loss.backward()
    assert soft_dice(logits.detach(), truth).item() == pytest.approx(dice, abs=1e-5)
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_an_empty_truth_has_dice_loss_1_unless_the_prediction_is_empty_too():
    """smooth / (P + smooth), as the module says. With p = 0.01 on 64 voxels, P = 0.64."""
    logits = logits_of(*[0.01] * 64)
    dice = soft_dice(logits, voxels(*[0] * 64))
    assert dice.item() == near(1 - 1e-5 / (0.64 + 1e-5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize(
    "options", [{}, {"batch": False}, {"include_background": True}, {"ignore_index": 1}]
)
def test_loss_and_gradient_are_finite_for_every_dtype_and_huge_logits(dtype, scale, options):
    torch.manual_seed(0)
    values = torch.randn(2, 3, 16, 16, 16).clamp(-1, 1) * scale
    logits = values.to(dtype).requires_grad_()
    loss = dice_ce(logits, torch.randint(0, 3, (2, 1, 16, 16, 16)), **options)
    loss.backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == dtype
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_a_volume_that_is_ignored_altogether_has_loss_and_gradient_zero():
    logits = torch.randn(1, 2, 4, 4, 4, requires_grad=True)
    loss = dice_ce(logits, torch.full((1, 1, 4, 4, 4), 7), ignore_index=7)
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]
)
def test_labels_of_every_integer_type_and_both_shapes(dtype):
    torch.manual_seed(0)
    logits, truth = torch.randn(2, 2, 3, 5, 7), torch.randint(0, 2, (2, 1, 3, 5, 7))
    expected = dice_ce(logits, truth)
    assert torch.equal(dice_ce(logits, truth.to(dtype)), expected)
    assert torch.equal(dice_ce(logits, truth[:, 0].to(dtype)), expected)
    last = logits.contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(dice_ce(last, truth), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch": False},
        {"include_background": True},
        {"ignore_index": 2},
        {"class_weight": torch.tensor([1.0, 2.0, 5.0])},
    ],
)
def test_the_gradient_equals_finite_differences(options):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 2, 3, 2, dtype=torch.double, requires_grad=True)
    truth = torch.randint(0, 3, (2, 1, 2, 3, 2))
    assert torch.autograd.gradcheck(lambda x: dice_ce(x, truth, **options), logits)


def test_a_perfect_prediction_has_loss_zero():
    truth = torch.randint(0, 2, (1, 1, 6, 6, 6), generator=torch.Generator().manual_seed(0))
    perfect = torch.nn.functional.one_hot(truth[:, 0], 2).movedim(-1, 1) * 60.0
    assert dice_ce(perfect, truth).item() == near(0)


def test_the_loss_does_not_depend_on_the_order_of_the_voxels():
    torch.manual_seed(0)
    logits, truth = torch.randn(1, 2, 6, 6, 6), torch.randint(0, 2, (1, 1, 6, 6, 6))
    order = torch.randperm(6**3)
    shuffled = [t.flatten(2)[:, :, order].reshape(t.shape) for t in (logits, truth)]
    torch.testing.assert_close(dice_ce(*shuffled), dice_ce(logits, truth))


@pytest.mark.parametrize(
    "logits,truth",
    [
        ((1, 1, 2, 2, 2), (1, 1, 2, 2, 2)),
        ((1, 2, 2, 2, 2), (1, 1, 2, 2, 3)),
        ((2, 2, 2, 2, 2), (1, 1, 2, 2, 2)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(logits, truth):
    with pytest.raises(ValueError, match="labels of shape"):
        dice_ce(torch.zeros(logits), torch.zeros(truth, dtype=torch.long))


def test_labels_that_are_no_integers_are_refused():
    with pytest.raises(ValueError, match="integer labels"):
        dice_ce(torch.zeros(1, 2, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2))
