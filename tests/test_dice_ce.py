"""dice_ce: the plain and the Triton path against the definition in float64, for all kinds of input,
and what they promise to autograd, the compiler, several processes and the GPU.

Triton's interpreter is slow. Most of the combinations that it runs are marked slow; each behaviour
keeps at least one quick case per path.
"""

import importlib
import os
import resource
import subprocess
import sys
from itertools import product

import pytest
import torch
from conftest import DEVICE, ROOT

import kernels

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.cuda
dice_ce_file = importlib.import_module("kernels.dice_ce")  # kernels.dice_ce itself is the function
dice_ce_plain = dice_ce_file.dice_ce_plain
dice_ce_triton = dice_ce_file.dice_ce_triton
slow = pytest.mark.slow
PATHS = {"plain": dice_ce_plain, "triton": dice_ce_triton}
TRITON = {"triton": dice_ce_triton}
LAYOUTS = {"ncdhw": torch.contiguous_format, "channels_last": torch.channels_last_3d}
OPTIONS = [
    {},
    {"batch": False},
    {"include_background": True},
    {"ignore_index": 1},
    {"ignore_index": -1, "batch": False, "include_background": True},
    {"ignore_index": 0, "class_weight": True},
    {
        "class_weight": True,
        "dice_weight": 0.3,
        "ce_weight": 0.7,
        "smooth_nr": 0.0,
        "smooth_dr": 1e-3,
    },
    {"ce_weight": 0.0},
    {"dice_weight": 0.0},
]


def combinations(quick: tuple = (), **axes):
    """Parametrize a test by all combinations of the axes' values.

    Those on the Triton path are slow, except those whose other ids are listed in `quick`. The id of
    a value is its key if the axis is a dict, else its text.
    """
    named = {
        name: values if isinstance(values, dict) else {text(value): value for value in values}
        for name, values in axes.items()
    }
    cases = []
    for ids in product(*named.values()):
        values = [named[name][key] for name, key in zip(named, ids)]
        rest = "-".join(key for key in ids if key not in PATHS)
        slow = dice_ce_triton in values and rest not in quick
        marks = [pytest.mark.slow] if slow else []
        cases.append(pytest.param(*values, id="-".join(ids), marks=marks))
    return pytest.mark.parametrize(",".join(axes), cases)


def text(value) -> str:
    """The id of a parameter: the names of options, the values of anything else."""
    return (",".join(value) or "default") if isinstance(value, dict) else str(value)


def inputs(
    classes=3, shape=(5, 7, 9), batch=2, dtype=torch.float32, layout=torch.contiguous_format,
    ignored=None, seed=0,
):
    """Random logits and int64 labels, a fifth of which are `ignored`."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, *shape, generator=generator) * 3
    target = torch.randint(0, classes, (batch, *shape), generator=generator)
    if ignored is not None:
        target[torch.rand(target.shape, generator=generator) < 0.2] = ignored
    return logits.to(DEVICE, dtype, memory_format=layout), target.to(DEVICE)


def evaluate(path, logits, target, grad_output=-1.7, **options):
    """Loss, Dice and the gradient of grad_output * loss; class_weight=True stands for 1, 2, ..."""
    if options.get("class_weight") is True:
        options["class_weight"] = torch.arange(1.0, logits.shape[1] + 1, device=DEVICE)
    logits = logits.detach().requires_grad_()
    loss, dice = path(logits, target, **options)
    assert not dice.requires_grad
    grad_output = torch.tensor(grad_output, dtype=loss.dtype, device=loss.device)
    (grad,) = torch.autograd.grad(loss, logits, grad_output)
    assert grad.dtype == logits.dtype and grad.shape == logits.shape
    return loss.detach(), dice, grad


def assert_results_close(found, expected, rtol, atol):
    """Compare (loss, Dice, gradient), naming the one that differs."""
    for name, ours, theirs in zip(("loss", "dice", "grad"), found, expected):
        torch.testing.assert_close(
            ours, theirs, rtol=rtol, atol=atol, msg=lambda message, name=name: f"{name}: {message}"
        )


def assert_as_exact_as_pytorch(path, logits, target, tolerance=1e-6, **options):
    """Loss, Dice and gradient have at most twice the float32 error of PyTorch, against float64.

    The tolerance on top is for a GPU, whose exp and division are exact to two or three units in the
    last place; a wrong formula is further off.
    """
    exact = evaluate(kernels.dice_ce_ref, logits, target, upcast=True, **options)
    pytorch = evaluate(kernels.dice_ce_ref, logits, target, **options)
    results = evaluate(path, logits, target, **options)
    for name, found, reference, truth in zip(("loss", "dice", "grad"), results, pytorch, exact):
        assert found.shape == truth.shape and found.dtype == reference.dtype, name
        truth = truth.double()
        scale = truth.abs().max() if name == "grad" else 1.0
        error = (found.double() - truth).abs().max() / scale
        allowed = (reference.double() - truth).abs().max() / scale
        assert error <= 2 * allowed + tolerance, f"{name}: {error:.2e}, PyTorch: {allowed:.2e}"


# ------------------------------------------------------------------------------------- the numbers
def test_dice_ce_reference_in_float64():
    """The definition against formulas written independently with one_hot and cross_entropy."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, 6, 7) * 5
    truth = torch.randint(0, 3, (2, 5, 6, 7))
    exact, exact_dice = kernels.dice_ce_ref(logits, truth, upcast=True)
    assert exact.dtype == torch.float64
    p = logits.double().softmax(1)
    t = torch.nn.functional.one_hot(truth, 3).movedim(-1, 1)
    axes = (0, 2, 3, 4)
    dice = 2 * (p * t).sum(axes) / (p.sum(axes) + t.sum(axes))
    torch.testing.assert_close(exact_dice, dice, rtol=1e-6, atol=1e-6)
    cross_entropy = torch.nn.functional.cross_entropy(logits.double(), truth)
    torch.testing.assert_close(exact, (1 - dice[1:]).mean() + cross_entropy, rtol=1e-6, atol=1e-6)

    loss, dice = kernels.dice_ce(logits, truth)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dice.double(), exact_dice, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_by_hand(path):
    # p(tumor) = 0.75 and 0.25, truth (tumor, background).
    # I = 0.75, P = 1, T = 1: Dice = 0.75. CE = -log 0.75 = 0.287682.
    log3 = torch.tensor(3.0).log().item()
    logits = torch.tensor([[0.0, 0.0], [log3, -log3]], device=DEVICE).reshape(1, 2, 1, 1, 2)
    logits.requires_grad_()
    target = torch.tensor([1, 0], device=DEVICE).reshape(1, 1, 1, 2)
    loss, dice = path(logits, target, smooth_nr=0.0, smooth_dr=0.0)
    assert loss.item() == pytest.approx(0.25 + 0.287682, abs=1e-6)
    assert dice.tolist() == pytest.approx([0.75, 0.75])
    # Dice: a = 0.75 / 2, b = -2 / 2, times p (1 - p) = 3/16: -0.625 * 3/16 and 0.375 * 3/16.
    # CE: (p - t) / 2 = -0.125 and 0.125.
    loss.backward()
    expected = [-0.1171875 - 0.125, 0.0703125 + 0.125]
    assert logits.grad[0, 1].flatten().tolist() == pytest.approx(expected)
    assert torch.equal(logits.grad[0, 0], -logits.grad[0, 1])


QUICK = ("2-ncdhw-default", "3-ncdhw-default", "4-channels_last-ignore_index,class_weight")


@combinations(QUICK, path=PATHS, classes=(2, 3, 4), layout=LAYOUTS, options=OPTIONS)
def test_as_exact_as_pytorch(path, classes, layout, options):
    logits, target = inputs(classes, layout=layout, ignored=options.get("ignore_index"))
    assert_as_exact_as_pytorch(path, logits, target, **options)
    assert evaluate(path, logits, target, **options)[2].stride() == logits.stride()


@combinations(("5-ncdhw", "32-ncdhw"), path=PATHS, classes=(5, 6, 7, 8, 19, 32), layout=LAYOUTS)
def test_more_classes(path, classes, layout):
    logits, target = inputs(classes, layout=layout, ignored=255)
    options = {"ignore_index": 255, "batch": False, "class_weight": True}
    assert_as_exact_as_pytorch(path, logits, target, **options)


@pytest.mark.parametrize("path", [PATHS["plain"], pytest.param(PATHS["triton"], marks=slow)])
def test_as_many_classes_as_a_whole_body_has_organs(path):
    logits, target = inputs(105, ignored=255)
    assert_as_exact_as_pytorch(path, logits, target, ignore_index=255, batch=False)


SHAPES = ((1, 1, 1), (1, 1, 3), (17, 13, 11), (33,), (16, 31), (2, 3, 2, 3, 2))


@combinations(("2-(33,)", "3-(1, 1, 1)"), path=PATHS, classes=(2, 3), shape=SHAPES)
def test_odd_sizes_any_number_of_axes_and_one_sample(path, classes, shape):
    for batch in (1, 3):
        for options in ({}, {"batch": False}):
            assert_as_exact_as_pytorch(path, *inputs(classes, shape, batch), **options)


@combinations(("2-ncdhw", "3-channels_last"), path=TRITON, classes=(2, 3, 4), layout=LAYOUTS)
@pytest.mark.slow
def test_sums_of_many_programs_and_many_tiles(path, classes, layout, monkeypatch):
    """Tiles of at most 128 voxels: each sample has 3 programs of several tiles; the last tile is
    incomplete."""
    tile = 32 if DEVICE == "cpu" else 128  # the kernels' tiles are larger in the interpreter
    monkeypatch.setattr(dice_ce_file, "TILE", tile)
    monkeypatch.setattr(dice_ce_file, "PROGRAMS", 6)
    logits, target = inputs(classes, (7, 9, 11), layout=layout, ignored=255)
    _, grid, args = dice_ce_file._sums_launch(logits, target, 255)
    assert 1 < grid[0] <= 6 and args["tiles"] > 1
    options = {"ignore_index": 255, "batch": False, "class_weight": True}
    assert_as_exact_as_pytorch(path, logits, target, **options)


@pytest.mark.parametrize("classes", [2, 3])
def test_plain_path_in_many_slabs(classes, monkeypatch):
    monkeypatch.setattr(dice_ce_file, "SLAB", 50)
    logits, target = inputs(classes, (7, 5, 6), ignored=255)
    assert len(list(dice_ce_file._slabs(logits, target, 255))) > len(logits) or DEVICE != "cpu"
    options = {"ignore_index": 255, "batch": False, "class_weight": True}
    assert_as_exact_as_pytorch(dice_ce_plain, logits, target, **options)


# The spacing of numbers near 1. (The interpreter truncates to bfloat16: an error of a whole step.)
STEPS = {torch.float64: 1e-12, torch.float16: 2**-10, torch.bfloat16: 2**-7}
QUICK = ("2-ncdhw-torch.float64", "2-channels_last-torch.bfloat16", "3-ncdhw-torch.float16")


@combinations(QUICK, path=PATHS, classes=(2, 3, 4), layout=LAYOUTS, dtype=list(STEPS))
def test_other_dtypes(path, classes, layout, dtype):
    """Loss and Dice are computed in float32 or better; the gradient is rounded once, at the end."""
    logits, target = inputs(classes, dtype=dtype, layout=layout)
    grad_output = 100.0  # so that no gradient is a subnormal number of float16
    loss, dice, grad = evaluate(path, logits, target, grad_output)
    exact, exact_dice, exact_grad = evaluate(
        kernels.dice_ce_ref, logits.double(), target, grad_output
    )
    double = dtype == torch.float64
    assert loss.dtype == dice.dtype == (torch.float64 if double else torch.float32)
    step = STEPS[dtype]
    torch.testing.assert_close(loss.double(), exact, rtol=0, atol=min(step, 1e-6))
    torch.testing.assert_close(dice.double(), exact_dice, rtol=0, atol=min(step, 1e-6))
    atol = 1e-14 if double else 1e-6
    torch.testing.assert_close(grad.double(), exact_grad, rtol=step, atol=atol)


LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


@combinations(("torch.uint8", "torch.bool"), path=PATHS, dtype=LABELS)
def test_labels_of_every_integer_type_and_both_shapes(path, dtype):
    logits, target = inputs(2)
    expected = evaluate(path, logits, target)
    for labels in (target.to(dtype), target[:, None].to(dtype)):
        for found, wanted in zip(evaluate(path, logits, labels), expected):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_an_ignore_index_of_minus_one_does_not_match_the_uint8_label_255(path):
    target = torch.zeros(1, 1, 1, 3, dtype=torch.uint8, device=DEVICE)
    target[..., 0] = 255  # not ignored, hence an invalid label
    logits = torch.zeros(1, 2, 1, 1, 3, device=DEVICE)
    if path is dice_ce_plain:
        with pytest.raises(ValueError, match="labels must lie in .*got 255"):
            path(logits, target, ignore_index=-1)
    else:
        assert path(logits, target, ignore_index=-1)[0].isnan()


@combinations(("2",), path=PATHS, classes=(2, 3, 4))
def test_views_with_other_strides_are_read_in_place(path, classes):
    logits, target = inputs(classes, (6, 8, 10))
    expected = evaluate(path, logits, target)
    cut = (slice(1, 4, 2), slice(2, 8), slice(1, 9), slice(0, 10))  # of B, D, H, W
    cut_logits = (cut[0], slice(1, -1), *cut[1:])
    for layout in LAYOUTS.values():
        big = torch.full((4, classes + 2, 9, 9, 12), 1e30, device=DEVICE).to(memory_format=layout)
        big_target = target.new_full((4, 9, 9, 12), 99)
        big[cut_logits] = logits
        big_target[cut] = target
        view = big[cut_logits]
        target_view = big_target[cut]
        assert not view.is_contiguous()
        assert not view.is_contiguous(memory_format=torch.channels_last_3d)
        for x, y in ((view, target_view), (view, target), (logits, target_view)):
            assert_results_close(evaluate(path, x, y), expected, rtol=1e-6, atol=1e-8)
    # Axes in another order, every other voxel, and the first channels of a larger number.
    swapped = logits.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    every_other = torch.stack([logits, logits * 0], -1).flatten(-2)[..., ::2]
    more = torch.cat([logits, logits], 1).contiguous(memory_format=torch.channels_last_3d)
    for x in (swapped, every_other, more[:, :classes]):
        assert x.stride() != logits.stride() and torch.equal(x, logits)
        assert_results_close(evaluate(path, x, target), expected, rtol=1e-6, atol=1e-8)


@combinations(("2",), path=PATHS, classes=(2, 3))
def test_expanded_inputs(path, classes):
    logits, target = inputs(classes, (4, 5, 6), batch=1)
    samples = (logits.expand(3, -1, -1, -1, -1), target.expand(3, -1, -1, -1))
    constant = torch.randn(2, classes, 1, 1, 1, device=DEVICE)
    voxels = (constant.expand(2, classes, 4, 5, 6), target[:, :1, :1, :1].expand(2, 4, 5, 6))
    for x, y in (samples, voxels):
        found = evaluate(path, x, y, batch=False)
        expected = evaluate(kernels.dice_ce_ref, x, y, batch=False)
        assert_results_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_grad_outputs_that_are_expanded_or_sliced(path):
    logits, target = inputs(2)
    expected = evaluate(path, logits, target, grad_output=3.0)[2]
    logits.requires_grad_()
    loss, _ = path(logits, target)
    numbers = torch.tensor([1.0, 3.0, 5.0], device=DEVICE)
    expanded = numbers[1:2].expand(7)[4]
    for grad_output in (numbers[1], expanded, numbers[1:2].squeeze()):
        (grad,) = torch.autograd.grad(loss, logits, grad_output, retain_graph=True)
        assert torch.equal(grad, expected)
    loss.expand(3).sum().backward()
    assert torch.equal(logits.grad, expected)


# ---------------------------------------------------------------------------------------- extremes
SIZES = {
    "float32-1e4": (torch.float32, 1e4),
    "bfloat16-1e4": (torch.bfloat16, 1e4),
    "float16-65504": (torch.float16, 65504.0),
    "float32-1e30": (torch.float32, 1e30),
}
SETTINGS = [{}, {"batch": False, "include_background": True}, {"ignore_index": 1}]
QUICK = ("2-float32-1e30-default", "3-float16-65504-default")


@combinations(QUICK, path=PATHS, classes=(2, 3), size=SIZES, options=SETTINGS)
def test_huge_logits(path, classes, size, options):
    dtype, magnitude = size
    logits, target = inputs(classes)
    logits = (logits.sign() * magnitude).to(dtype)
    logits[0] = logits[0, :1]  # equal logits, too
    results = evaluate(path, logits, target, **options)
    expected = evaluate(kernels.dice_ce_ref, logits, target, **options)
    for found, wanted in zip(results, expected):
        assert torch.isfinite(found).all()
        rtol = 1e-6 if found.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-7)


WEIGHTS = [{}, {"class_weight": True}]
SCALES = (15.0, 40.0, 85.0)


@combinations(("default-40.0",), path=PATHS, options=WEIGHTS, scale=SCALES)
def test_confidently_wrong_predictions(path, options, scale):
    """Each e^z fits float32 but their products overflow: the plain path multiplies four of them."""
    logits, target = inputs(2)
    wrong = torch.stack([target, 1 - target], 1).float() * scale
    assert_as_exact_as_pytorch(path, wrong + logits / 10, target, **options)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_class_ruled_out_by_minus_infinity(path, classes):
    logits, target = inputs(classes)
    logits[:, -1] = -torch.inf
    target = target.clamp(max=classes - 2)
    found = evaluate(path, logits, target)
    assert all(torch.isfinite(result).all() for result in found)
    expected = evaluate(kernels.dice_ce_ref, logits, target)
    assert_results_close(found, expected, rtol=1e-6, atol=1e-7)


@combinations(("2-True", "3-False"), path=PATHS, classes=(2, 3), batch=(True, False))
def test_the_loss_is_zero_if_every_voxel_is_ignored(path, classes, batch):
    logits, target = inputs(classes)
    target = torch.full_like(target, 255)
    for weight in (None, True):
        options = {"ignore_index": 255, "batch": batch, "class_weight": weight}
        loss, dice, grad = evaluate(path, logits, target, **options)
        assert loss == 0 and (dice == 1).all() and (grad == 0).all()


SETTINGS = [{}, {"batch": False}, {"include_background": True}]


@combinations(("3-default",), path=PATHS, classes=(2, 3), options=SETTINGS)
def test_absent_classes_and_empty_foreground(path, classes, options):
    logits, target = inputs(classes)
    absent = target.clamp(max=classes - 2)
    unlikely = 40 * torch.eye(classes, device=DEVICE)[1].view(-1, 1, 1, 1)
    for labels in (absent, torch.zeros_like(target), torch.full_like(target, classes - 1)):
        for x in (logits, logits - unlikely):
            assert_as_exact_as_pytorch(path, x, labels, **options)


@combinations(("2--1", "3-200"), path=PATHS, classes=(2, 3), label=(-1, 3, 200, 2**32 + 1))
def test_labels_out_of_range_are_noticed(path, classes, label):
    logits, target = inputs(classes)
    target[0, 1, 2, 3] = label
    if path is dice_ce_plain:
        with pytest.raises(ValueError, match=f"labels must lie in .*got {label}$"):
            path(logits, target)
    else:
        loss, _, grad = evaluate(path, logits, target)
        assert loss.isnan() and grad.isnan().any()
    loss, _, grad = evaluate(path, logits, target, ignore_index=label)
    assert loss.isfinite() and grad.isfinite().all()
    assert (grad[0, :, 1, 2, 3] == 0).all()


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_nan_logits_make_the_loss_nan(path):
    logits, target = inputs(2)
    logits[0, 1, 0, 0, 0] = torch.nan
    assert path(logits, target)[0].isnan()


@pytest.mark.parametrize("path", [*PATHS.values(), kernels.dice_ce_ref], ids=[*PATHS, "ref"])
def test_arguments_that_do_not_fit_are_refused(path):
    logits, target = inputs(3)
    for x, y, options, message in (
        (logits[:, :1], target, {}, "labels of shape"),
        (logits, target[:, 1:], {}, "labels of shape"),
        (logits, target.float(), {}, "integer labels, got torch.float32; pass target.long()"),
        (logits, target, {"sigmoid": True}, "labels of the same shape"),
        (logits[:, :0], target[:, None][:, :0], {"sigmoid": True}, "labels of the same shape"),
        (logits.long(), target, {}, "floating dtype"),
        (logits, target, {"class_weight": torch.ones(2)}, "one weight per class"),
        (logits, target, {"sync": True}, "init_process_group"),
    ):
        with pytest.raises(ValueError, match=message):
            path(x, y, **options)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_symmetries(path):
    logits, target = inputs(4)
    loss, dice, grad = evaluate(path, logits, target, include_background=True)
    # Reordering the classes reorders the results.
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    found = evaluate(path, logits[:, order], order.argsort()[target], include_background=True)
    assert_results_close(found, (loss, dice[order], grad[:, order]), rtol=1e-5, atol=1e-7)
    # Moving the voxels moves the gradient.
    found = evaluate(path, logits.flip(2, 4), target.flip(1, 3), include_background=True)
    assert_results_close(found, (loss, dice, grad.flip(2, 4)), rtol=1e-5, atol=1e-7)
    # Adding a number to all logits of a voxel changes nothing: the gradient sums to 0 over classes.
    shifted = evaluate(path, logits + 5, target, include_background=True)[0]
    torch.testing.assert_close(shifted, loss, rtol=1e-5, atol=0)
    assert grad.sum(1).abs().max() < 1e-6 * grad.abs().max()


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_two_classes_equal_three_of_which_one_never_occurs(path):
    """The formulas for two classes against the general ones."""
    logits, target = inputs(2)
    three = torch.cat([logits, torch.full_like(logits[:, :1], -200.0)], 1)
    loss, dice, grad = evaluate(path, logits, target, dice_weight=0.0)
    dice = torch.cat([dice, dice.new_ones(1)])
    grad = torch.cat([grad, torch.zeros_like(grad[:, :1])], 1)
    found = evaluate(path, three, target, dice_weight=0.0)
    assert_results_close(found, (loss, dice, grad), rtol=1e-5, atol=1e-7)


# --------------------------------------------------------------------------------- memory and bits
@combinations(("ncdhw",), path=PATHS, layout=LAYOUTS)
def test_equal_inputs_give_equal_bits(path, layout):
    logits, target = inputs(2, (24, 25, 26), layout=layout)
    first = evaluate(path, logits, target)
    for _ in range(3):
        again = evaluate(path, logits.clone(), target.clone())
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@combinations(("ncdhw", "channels_last"), path=PATHS, layout=LAYOUTS)
def test_only_the_inputs_and_a_few_numbers_are_saved_for_the_backward_pass(path, layout):
    logits, target = inputs(2, (8, 8, 8), layout=layout)
    logits.requires_grad_()
    target = target.to(torch.uint8)[:, None]
    saved = {}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        path(logits, target)
    assert {logits.data_ptr(), target.data_ptr()} < set(saved)
    inputs_bytes = logits.nbytes + target.nbytes
    assert sum(t.untyped_storage().nbytes() for t in saved.values()) - inputs_bytes <= 32


def coefficients_of(logits, target):
    """The coefficients that the Triton path saves for the backward pass, default options."""
    weights = (1e-5, 1e-5, 1.0, 1.0)
    return dice_ce_file._dice_ce(logits, target, None, False, True, *weights, None, False, True)[2]


def launch_grad(logits, target, coefficients, grad, grad_output):
    """Run the backward kernel with a gradient tensor of our own choice."""
    grad_output = torch.tensor(grad_output, device=DEVICE)
    launch = dice_ce_file._grad_launch(grad_output, logits, target, coefficients, None)
    kernel, grid, args = launch
    args |= dice_ce_file._geometry(logits, target=target, grad=grad) | {"grad": grad}
    dice_ce_file._run(kernel, grid, args)


@combinations(("2-ncdhw",), path=TRITON, classes=(2, 3, 4), layout=LAYOUTS)
def test_memory_around_a_strided_gradient_stays_untouched(path, classes, layout):
    """The kernel writes into the middle of a larger tensor, without changing the rest."""
    logits, target = inputs(classes, (5, 7, 9), layout=layout)
    expected = evaluate(path, logits, target, grad_output=1.0)[2]
    big = torch.full((4, classes, 7, 9, 11), 7.0, device=DEVICE).to(memory_format=layout)
    grad = big[1:3, :, 1:-1, 1:-1, 1:-1]
    launch_grad(logits, target, coefficients_of(logits, target), grad, 1.0)
    torch.testing.assert_close(grad, expected)
    grad.fill_(7.0)
    assert (big == 7).all()


@combinations(("2-ncdhw",), path=TRITON, classes=(2, 3, 4), layout=LAYOUTS)
def test_memory_around_every_output_stays_untouched(path, classes, layout):
    """Dense outputs, which the kernels write in whole tiles, between twice 64 guard elements."""
    logits, target = inputs(classes, (5, 7, 9), layout=layout)
    coefficients = coefficients_of(logits, target)
    grad_output = torch.ones((), device=DEVICE)
    sums = dice_ce_file._sums_launch(logits, target, None)
    partials = dice_ce_file._run(*sums)["partials"].flatten(2).unsqueeze(2)
    settings = (None, torch.float32, False, 1e-5, 1e-5, 1.0, 1.0, 1)
    finish = dice_ce_file._finish_launch(partials, *settings)
    grad = dice_ce_file._grad_launch(grad_output, logits, target, coefficients, None)
    outputs = [(sums, "partials"), (grad, "grad")]
    outputs += [(finish, name) for name in ("loss", "dice", "coefficients")]
    for (kernel, grid, args), name in outputs:
        expected = dice_ce_file._run(kernel, grid, args)[name].clone()
        memory = torch.full((expected.numel() + 128,), 7.0, device=DEVICE)
        output = memory[64:-64].as_strided(expected.shape, expected.stride(), 64)
        dice_ce_file._run(kernel, grid, args | {name: output})
        assert torch.equal(output, expected), name
        assert (memory[:64] == 7).all() and (memory[-64:] == 7).all(), name


FAR = ("sample", "class", "channels_last")


@combinations(("2-sample", "3-class"), path=TRITON, classes=(2, 3), far=FAR)
def test_offsets_beyond_2_to_the_31(path, classes, far):
    """Parts of the tensors are more than 2^31 elements apart. The system commits no memory for the
    gaps, because nobody writes to them."""
    n, gap = 60, 2**31 + 64
    sample, channel = {"sample": (gap, n), "class": (n, gap), "channels_last": (gap, 1)}[far]
    step = classes if far == "channels_last" else 1
    shape = (2, classes, 3, 4, 5)
    strides = (sample, channel, 20 * step, 5 * step, step)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes
    elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
    memory = [torch.empty(elements, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    logits, grad = (x.as_strided(shape, strides) for x in memory)
    target = torch.empty(gap + n, dtype=torch.uint8, device=DEVICE)
    target = target.as_strided((2, 3, 4, 5), (gap, 20, 5, 1))
    values, labels = inputs(classes, (3, 4, 5), dtype=torch.float16)
    logits.copy_(values)
    target.copy_(labels)
    expected = evaluate(path, values, labels)
    for found, wanted in zip(evaluate(path, logits, target), expected):
        torch.testing.assert_close(found, wanted)
    launch_grad(logits, target, coefficients_of(values, labels), grad, -1.7)
    torch.testing.assert_close(grad.contiguous(), expected[2])
    if DEVICE == "cpu":
        committed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert committed < 200_000


# ------------------------------------------------------------------------- several labels per voxel
def independent_labels(classes, ignored=None, **options):
    """Random logits, and labels 0 or 1 of every class, a fifth of which are `ignored`."""
    logits, _ = inputs(classes, **options)
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, 2, logits.shape, generator=generator)
    if ignored is not None:
        target[torch.rand(target.shape, generator=generator) < 0.2] = ignored
    return logits, target.to(DEVICE)


def test_the_sigmoid_reference_against_formulas_written_independently():
    logits, target = independent_labels(3)
    loss, found = kernels.dice_ce_ref(logits, target, sigmoid=True, upcast=True)
    x, t = logits.double(), target.double()
    p, axes = x.sigmoid(), (0, 2, 3, 4)
    dice = (2 * (p * t).sum(axes) + 1e-5) / (p.sum(axes) + t.sum(axes) + 1e-5)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(x, t)
    torch.testing.assert_close(found, dice)
    torch.testing.assert_close(loss, (1 - dice).mean() + bce)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_sigmoid_by_hand(path):
    """One class: the numbers of `test_by_hand`, as its two logits differ by this one."""
    log3 = torch.tensor(3.0).log().item()
    logits = torch.tensor([log3, -log3], device=DEVICE).reshape(1, 1, 1, 1, 2).requires_grad_()
    target = torch.tensor([1, 0], device=DEVICE).reshape(1, 1, 1, 2)
    loss, dice = path(logits, target, smooth_nr=0.0, smooth_dr=0.0, sigmoid=True)
    assert loss.item() == pytest.approx(0.25 + 0.287682, abs=1e-6)
    assert dice.tolist() == pytest.approx([0.75])
    loss.backward()
    expected = [-0.1171875 - 0.125, 0.0703125 + 0.125]
    assert logits.grad.flatten().tolist() == pytest.approx(expected)


SIGMOID = [{}, {"batch": False, "smooth_dr": 1e-3}, {"ignore_index": 255, "class_weight": True}]
QUICK = ("1-ncdhw-default", "3-channels_last-ignore_index,class_weight", "4-channels_last-default")


@combinations(QUICK, path=PATHS, classes=(1, 2, 3, 4, 5), layout=LAYOUTS, options=SIGMOID)
def test_sigmoid_is_as_exact_as_pytorch(path, classes, layout, options):
    logits, target = independent_labels(classes, options.get("ignore_index"), layout=layout)
    assert_as_exact_as_pytorch(path, logits, target, sigmoid=True, **options)
    found = evaluate(path, logits, target, sigmoid=True, **options)[2]
    assert found.stride() == logits.stride()


@combinations(("2-1e+30",), path=PATHS, classes=(1, 2), scale=(30.0, 1e30))
def test_sigmoid_of_huge_logits_and_of_views(path, classes, scale):
    logits, target = independent_labels(classes, shape=(4, 6, 5))
    views = ((logits * scale)[..., 1::2], target[..., 1::2])
    found = evaluate(path, *views, sigmoid=True)
    assert_results_close(found, evaluate(kernels.dice_ce_ref, *views, sigmoid=True), 1e-5, 1e-7)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_independent_labels_of_every_type(path):
    logits, target = independent_labels(2)
    expected = evaluate(path, logits, target, sigmoid=True)
    for dtype in (torch.bool, torch.uint8, torch.float32, torch.float16):
        for found, wanted in zip(evaluate(path, logits, target.to(dtype), sigmoid=True), expected):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("path", [*PATHS.values(), kernels.dice_ce_ref], ids=[*PATHS, "ref"])
@pytest.mark.parametrize("label", [0.5, 2, -1])
def test_independent_labels_other_than_0_and_1_are_noticed(path, label):
    logits, target = independent_labels(2)
    target = target.float()
    target[0, 1, 2, 3, 4] = label
    if path is dice_ce_triton:
        assert path(logits, target, sigmoid=True)[0].isnan()
    else:
        with pytest.raises(ValueError, match=f"labels must be 0 or 1, .*got {label}"):
            path(logits, target, sigmoid=True)


@combinations(("ncdhw",), path=PATHS, layout=LAYOUTS)
@pytest.mark.slow
def test_sigmoid_gradcheck_and_opcheck(path, layout):
    logits, target = independent_labels(2, 255, shape=(2, 3, 2), dtype=torch.float64, layout=layout)
    logits.requires_grad_()

    def loss(x):
        return path(x, target, ignore_index=255, sigmoid=True)[0]

    assert torch.autograd.gradcheck(loss, logits, fast_mode=path is dice_ce_triton)
    fused = path is dice_ce_triton
    settings = (None, True, True, 1e-5, 1e-5, 1.0, 1.0, 255, False, fused)
    torch.library.opcheck(torch.ops.mirror_unet.dice_ce, (logits, target, *settings))


# --------------------------------------------------------------- autograd, the compiler, processes
SETTINGS = [
    {},
    {"batch": False, "include_background": True},
    {"ignore_index": 1, "class_weight": True},
]
QUICK = ("2-channels_last-default", "3-ncdhw-ignore_index,class_weight")


@combinations(QUICK, path=PATHS, classes=(2, 3), layout=LAYOUTS, options=SETTINGS)
def test_gradcheck(path, classes, layout, options):
    logits, target = inputs(classes, (2, 3, 2), dtype=torch.float64, layout=layout)
    if options.get("class_weight"):
        options = options | {"class_weight": torch.arange(1.0, classes + 1, device=DEVICE)}

    def loss(x):
        return path(x, target, **options)[0]

    # To save time, a random direction instead of every element in most cases.
    sampled = path is dice_ce_triton and (options or layout is torch.channels_last_3d)
    fast = bool(sampled) or classes == 3
    assert torch.autograd.gradcheck(loss, logits.requires_grad_(), fast_mode=fast)


@combinations(("ncdhw-True",), path=PATHS, layout=LAYOUTS, batch=(True, False))
@pytest.mark.slow
def test_opcheck(path, layout, batch):
    fused = path is dice_ce_triton
    logits, target = inputs(2, (3, 4, 5), layout=layout)
    weight = torch.tensor([1.0, 2.0], device=DEVICE)
    settings = (weight, False, batch, 1e-5, 1e-5, 1.0, 1.0, 255, False, fused)
    args = (logits.requires_grad_(), target, *settings)
    torch.library.opcheck(torch.ops.mirror_unet.dice_ce, args)
    coefficients = torch.rand(3 if batch else 5, 2, device=DEVICE)
    grad_output = torch.tensor(2.0, device=DEVICE)
    args = (grad_output, logits.detach(), target, coefficients, 255, fused)
    torch.library.opcheck(torch.ops.mirror_unet.dice_ce_backward, args)


@combinations(("ncdhw",), path=PATHS, layout=LAYOUTS)
def test_torch_compile_makes_one_graph(path, layout):
    logits, target = inputs(2, layout=layout)

    def step(x, y):
        loss, dice = path(x * 2, y[:, None], batch=False)
        return loss + dice.sum() * 0

    eager = logits.clone().requires_grad_()
    step(eager, target).backward()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss = compiled(logits.requires_grad_(), target)
    loss.backward()
    assert torch.equal(loss, step(eager, target))
    assert torch.equal(logits.grad, eager.grad)
    assert logits.grad.stride() == logits.stride()


CASES = [
    {},
    {"batch": False, "include_background": True},
    {"ignore_index": 255, "class_weight": torch.tensor([1.0, 3.0])},
]


def four_samples(options):
    """Logits and labels of the batch that two processes share; ignored labels only if asked for."""
    logits, target = inputs(2, (3, 4, 5), batch=4, ignored=255)
    return logits.cpu(), (target if "ignore_index" in options else target.clamp(max=1)).cpu()


def one_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    own = slice(2 * rank, 2 * rank + 2)
    results = {}
    for name in ("ref", "plain", "triton"):
        path = getattr(dice_ce_file, f"dice_ce_{name}")
        for i, options in enumerate(CASES):
            logits, target = four_samples(options)
            results[name, i] = evaluate(path, logits[own], target[own], sync=True, **options)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


GLOO = pytest.mark.skipif(DEVICE != "cpu", reason="gloo and the interpreter need CPU tensors")


@GLOO
@pytest.mark.parametrize("name", ["ref", "plain", "triton"])
def test_a_single_process_with_sync_equals_itself_without(name):
    path = getattr(dice_ce_file, f"dice_ce_{name}")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for options in CASES:
            logits, target = four_samples(options)
            found = evaluate(path, logits, target, sync=True, **options)
            expected = evaluate(path, logits, target, **options)
            assert_results_close(found, expected, rtol=1e-6, atol=1e-8)
    finally:
        torch.distributed.destroy_process_group()


@GLOO
@pytest.mark.slow  # two processes have to start
def test_two_processes_equal_one_with_both_their_batches(tmp_path):
    torch.multiprocessing.spawn(one_of_two_processes, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, i in results[0]:
        logits, target = four_samples(CASES[i])
        loss, dice, grad = evaluate(kernels.dice_ce_ref, logits, target, **CASES[i])
        (loss0, dice0, grad0), (loss1, dice1, grad1) = (result[name, i] for result in results)
        assert torch.equal(loss0, loss1)
        torch.testing.assert_close(loss0, loss, rtol=1e-6, atol=1e-7)
        average = torch.cat([grad0, grad1]) / 2  # as DistributedDataParallel averages
        torch.testing.assert_close(average, grad, rtol=1e-5, atol=1e-7)
        joint = (dice0, dice1) if dice.dim() == 1 else (torch.cat([dice0, dice1]),)
        for found in joint:
            torch.testing.assert_close(found, dice, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------- code for real GPUs
COMPILE = """
import importlib, sys, torch
sys.path.append("benchmarks")
import budget
dice_ce = importlib.import_module("kernels.dice_ce")

# The budget checks the widest load alone, but several loads read the volume.
for launch in budget.dice_ce_launches():
    if "C=2" in launch["name"]:
        loads = budget.compiled(launch["kernel"], launch["arguments"], "sm_80")[3]
        assert loads.count(128) >= 5, f"{launch['name']}: logits are not read 128 bits at a time"

# Other launches (the budget has the spills of the common ones): sizes of 1, all kinds of strides,
# groups, labels and indices.
def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

big = meta(2, 2, 9, 8, 7)
wide = meta(1, 5, 4, 4, 4, dtype=torch.float64)
cases = {
    "one voxel": (meta(1, 2, 1, 1, 1), meta(1, 1, 1, 1, dtype=torch.int64), None),
    "odd": (meta(1, 3, 5, 7, 9, dtype=torch.float16), meta(1, 5, 7, 9, dtype=torch.int16), 1),
    "strided": (big[:, :, 1:8, 2:6, ::2], meta(2, 7, 4, 4, dtype=torch.int32), -1),
    "expanded": (
        wide.expand(3, -1, -1, -1, -1), meta(4, dtype=torch.uint8).expand(3, 4, 4, 4), 255
    ),
}
for name, (x, y, ignore_index) in cases.items():
    b, c = x.shape[:2]
    dtype = dice_ce._accumulator(x.dtype)
    grad_output = meta(dtype=dtype)
    settings = (meta(c), x.dtype, True, 1e-5, 1e-5, 1.0, 1.0, 2)
    launches = [dice_ce._sums_launch(x, y, ignore_index)]
    launches += [dice_ce._finish_launch(meta(4, c, b, 13), *settings)]
    for rows in {3, 2 * b + 1}:
        coefficients = meta(rows, c, dtype=dtype)
        launches += [dice_ce._grad_launch(grad_output, x, y, coefficients, ignore_index)]
    for kernel, _, args in launches:
        for target in ("sm_80", "gfx942"):
            spilled = budget.compiled(kernel, args | {"num_warps": dice_ce.WARPS}, target)[1]
            assert spilled == 0, f"{name}: {kernel.__name__} spills on {target}"
"""


@pytest.mark.slow  # tests/test_benchmarks.py has a quick test of the common launches
def test_kernels_compile_for_gpus_without_spills_and_read_128_bits_at_a_time():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
