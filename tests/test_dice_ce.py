"""dice_ce: against its definition in float64."""

import torch

import kernels


def test_dice_ce_reference_in_float64():
    torch.manual_seed(0)
    logits, truth = torch.randn(2, 3, 5, 6, 7) * 5, torch.randint(0, 3, (2, 5, 6, 7))
    loss, dice = kernels.dice_ce(logits, truth)
    exact, exact_dice = kernels.dice_ce_ref(logits, truth, upcast=True)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dice.double(), exact_dice, rtol=1e-6, atol=1e-6)
    p, t = logits.double().softmax(1), torch.nn.functional.one_hot(truth, 3).movedim(-1, 1)
    by_hand = 2 * (p * t).sum((0, 2, 3, 4)) / (p.sum((0, 2, 3, 4)) + t.sum((0, 2, 3, 4)))
    torch.testing.assert_close(exact_dice, by_hand, rtol=1e-6, atol=1e-6)
    ce = torch.nn.functional.cross_entropy(logits.double(), truth)
    torch.testing.assert_close(exact, (1 - by_hand[1:]).mean() + ce, rtol=1e-6, atol=1e-6)
