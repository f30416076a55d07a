"""dice_ce: plain and Triton paths against the definition in float64, on every kind of input, and what they promise to GPU and autograd."""

import importlib
import os
import resource
import subprocess
import sys

import pytest
import torch
from conftest import DEVICE, ROOT

import kernels

triton = pytest.importorskip("triton")
dice_ce_file = importlib.import_module("kernels.dice_ce")  # the package's name dice_ce is the function
PATHS = [pytest.param(dice_ce_file.dice_ce_plain, id="plain"), pytest.param(dice_ce_file.dice_ce_triton, id="triton")]
LAYOUTS = [pytest.param(torch.contiguous_format, id="ncdhw"), pytest.param(torch.channels_last_3d, id="channels_last")]
OPTIONS = [
    {},
    {"batch": False},
    {"include_background": True},
    {"ignore_index": 1},
    {"ignore_index": -1, "batch": False, "include_background": True},
    {"ignore_index": 0, "class_weight": True},
    {"class_weight": True, "dice_weight": 0.3, "ce_weight": 0.7, "smooth_nr": 0.0, "smooth_dr": 1e-3},
    {"ce_weight": 0.0},
    {"dice_weight": 0.0},
]
options_of = {"ids": lambda o: ",".join(o) or "default"}


def inputs(classes=3, shape=(5, 7, 9), batch=2, dtype=torch.float32, layout=torch.contiguous_format, ignored=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(batch, classes, *shape, generator=g) * 3).to(DEVICE, dtype, memory_format=layout)
    target = torch.randint(0, classes, (batch, *shape), generator=g)
    if ignored is not None:
        target[torch.rand(target.shape, generator=g) < 0.2] = ignored
    return logits, target.to(DEVICE)


def evaluate(path, logits, target, upstream=-1.7, **options):
    """Loss, Dice and the gradient of upstream * loss; class_weight=True stands for some weights."""
    if options.get("class_weight") is True:
        options["class_weight"] = torch.arange(1.0, logits.shape[1] + 1, device=DEVICE)
    logits = logits.detach().requires_grad_()
    loss, dice = path(logits, target, **options)
    assert not dice.requires_grad
    (grad,) = torch.autograd.grad(loss, logits, torch.tensor(upstream, dtype=loss.dtype, device=loss.device))
    assert grad.dtype == logits.dtype and grad.shape == logits.shape
    return loss.detach(), dice, grad


def assert_as_exact_as_pytorch(path, logits, target, tolerance=1e-7, **options):
    """Each of loss, Dice and gradient is as near the float64 result as PyTorch's own float32 gets, times 2."""
    exact = evaluate(kernels.dice_ce_ref, logits, target, upcast=True, **options)
    pytorch = evaluate(kernels.dice_ce_ref, logits, target, **options)
    for name, found, own, truth in zip(("loss", "dice", "grad"), evaluate(path, logits, target, **options), pytorch, exact):
        assert found.shape == truth.shape and found.dtype == own.dtype, name
        scale = truth.abs().max().double() if name == "grad" else 1.0
        error, allowed = ((t.double() - truth.double()).abs().max() / scale for t in (found, own))
        assert error <= 2 * allowed + tolerance, f"{name}: error {error:.2e}, PyTorch's own {allowed:.2e}"


# ------------------------------------------------------------------------------------------------------------- the numbers


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


@pytest.mark.parametrize("path", PATHS)
def test_by_hand(path):
    # p(tumor) = 0.75 and 0.25, truth (tumor, background). I = 0.75, P = 1, T = 1: Dice = 0.75. CE = -log 0.75.
    log3 = torch.tensor(3.0).log().item()
    logits = torch.tensor([[0.0, 0.0], [log3, -log3]], device=DEVICE).reshape(1, 2, 1, 1, 2).requires_grad_()
    loss, dice = path(logits, torch.tensor([1, 0], device=DEVICE).reshape(1, 1, 1, 2), smooth_nr=0.0, smooth_dr=0.0)
    assert loss.item() == pytest.approx(0.25 + 0.287682, abs=1e-6) and dice.tolist() == pytest.approx([0.75, 0.75])
    # Dice: a = 0.75 / 2, b = -2 / 2, times p (1 - p) = 3/16: -0.625 * 3/16 and 0.375 * 3/16. CE: (p - t) / 2 = -+ 0.125.
    loss.backward()
    assert logits.grad[0, 1].flatten().tolist() == pytest.approx([-0.1171875 - 0.125, 0.0703125 + 0.125])
    assert torch.equal(logits.grad[0, 0], -logits.grad[0, 1])


@pytest.mark.parametrize("options", OPTIONS, **options_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("path", PATHS)
def test_as_exact_as_pytorch(path, classes, layout, options):
    logits, target = inputs(classes, layout=layout, ignored=options.get("ignore_index"))
    assert_as_exact_as_pytorch(path, logits, target, **options)
    assert evaluate(path, logits, target, **options)[2].stride() == logits.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [5, 6, 7, 8, 19])
@pytest.mark.parametrize("path", PATHS)
def test_more_classes(path, classes, layout):
    logits, target = inputs(classes, layout=layout, ignored=255)
    assert_as_exact_as_pytorch(path, logits, target, ignore_index=255, batch=False, class_weight=True)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 3), (17, 13, 11), (33,), (16, 31), (2, 3, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("path", PATHS)
def test_odd_sizes_any_number_of_axes_and_one_sample(path, classes, shape):
    for batch in (1, 3):
        for options in ({}, {"batch": False}):
            assert_as_exact_as_pytorch(path, *inputs(classes, shape, batch), **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [2, 4, 3])
def test_sums_of_many_programs_and_many_tiles(classes, layout, monkeypatch):
    """As on a GPU, where a tile is small: here 128 voxels at most, and 3 programs a sample, of several tiles each, the last one ragged."""
    monkeypatch.setattr(dice_ce_file, "TILE", 32 if DEVICE == "cpu" else 128)  # the interpreter takes 4 times as much
    monkeypatch.setattr(dice_ce_file, "PROGRAMS", 6)
    logits, target = inputs(classes, (7, 9, 11), layout=layout, ignored=255)
    _, grid, args = dice_ce_file._sums_launch(logits, target, 255)
    assert 1 < grid[0] <= 6 and args["tiles"] > 1
    assert_as_exact_as_pytorch(dice_ce_file.dice_ce_triton, logits, target, ignore_index=255, batch=False, class_weight=True)


def test_plain_path_in_many_slabs(monkeypatch):
    monkeypatch.setattr(dice_ce_file, "CHUNK", (200, 200))
    for classes in (2, 3):
        logits, target = inputs(classes, (7, 5, 6), ignored=255)
        assert_as_exact_as_pytorch(dice_ce_file.dice_ce_plain, logits, target, ignore_index=255, batch=False, class_weight=True)


@pytest.mark.parametrize("dtype,step", [(torch.float64, 1e-12), (torch.float16, 2**-10), (torch.bfloat16, 2**-7)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("path", PATHS)
def test_other_dtypes(path, classes, layout, dtype, step):
    """Loss and Dice are computed in float32 at least; the gradient is rounded once (the interpreter truncates bfloat16: a whole step)."""
    logits, target = inputs(classes, dtype=dtype, layout=layout)
    upstream = 100.0  # above the subnormal numbers of float16
    loss, dice, grad = evaluate(path, logits, target, upstream)
    exact, exact_dice, exact_grad = evaluate(kernels.dice_ce_ref, logits.double(), target, upstream)
    assert loss.dtype == dice.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), exact, rtol=0, atol=min(step, 1e-6))
    torch.testing.assert_close(dice.double(), exact_dice, rtol=0, atol=min(step, 1e-6))
    torch.testing.assert_close(grad.double(), exact_grad, rtol=step, atol=1e-6 if dtype != torch.float64 else 1e-14)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_labels_of_every_integer_type_and_both_shapes(path, dtype):
    logits, target = inputs(2)
    expected = evaluate(path, logits, target)
    for labels in (target.to(dtype), target[:, None].to(dtype)):
        for found, wanted in zip(evaluate(path, logits, labels), expected):
            assert torch.equal(found, wanted)
    # -1 is no label of an unsigned type: nothing is ignored, 255 least of all.
    if dtype == torch.uint8:
        assert torch.equal(evaluate(path, logits, target.to(dtype), ignore_index=-1)[0], expected[0])


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("path", PATHS)
def test_strided_views_are_read_as_they_are(path, classes):
    logits, target = inputs(classes, (6, 8, 10))
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        big, labels = (
            torch.full((4, classes + 2, 9, 9, 12), 1e30, device=DEVICE).to(memory_format=layout),
            target.new_full((4, 9, 9, 12), 99),
        )
        inner = (slice(1, 4, 2), slice(2, 8), slice(1, 9), slice(0, 10))
        big[inner[0], 1:-1, *inner[1:]], labels[inner] = logits, target
        view, label_view = big[inner[0], 1:-1, *inner[1:]], labels[inner]
        assert not view.is_contiguous() and not view.is_contiguous(memory_format=torch.channels_last_3d)
        for x, y in ((view, label_view), (view, target), (logits, label_view)):
            for found, wanted in zip(evaluate(path, x, y), evaluate(path, logits, target)):
                torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    # Axes in another order, every other voxel, and the first channels of more.
    swapped = logits.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    halves = torch.stack([logits, logits * 0], -1).flatten(-2)[..., ::2]
    more = torch.cat([logits, logits], 1).contiguous(memory_format=torch.channels_last_3d)[:, :classes]
    for x in (swapped, halves, more):
        assert x.stride() != logits.stride() and torch.equal(x, logits)
        for found, wanted in zip(evaluate(path, x, target), evaluate(path, logits, target)):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("path", PATHS)
def test_expanded_inputs(path, classes):
    logits, target = inputs(classes, (4, 5, 6), batch=1)
    everywhere = torch.randn(2, classes, 1, 1, 1, device=DEVICE).expand(2, classes, 4, 5, 6)
    for x, y in ((logits.expand(3, -1, -1, -1, -1), target.expand(3, -1, -1, -1)), (everywhere, target[:, :1, :1, :1].expand(2, 4, 5, 6))):
        for found, wanted in zip(evaluate(path, x, y, batch=False), evaluate(kernels.dice_ce_ref, x, y, batch=False)):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("path", PATHS)
def test_upstream_gradients_that_are_expanded_or_sliced(path):
    logits, target = inputs(2)
    wanted = evaluate(path, logits, target, upstream=3.0)[2]
    logits.requires_grad_()
    loss, _ = path(logits, target)
    numbers = torch.tensor([1.0, 3.0, 5.0], device=DEVICE)
    for upstream in (numbers[1], numbers[1:2].expand(7)[4], numbers[1:2].expand(1).squeeze()):
        assert torch.equal(torch.autograd.grad(loss, logits, upstream, retain_graph=True)[0], wanted)
    loss.expand(3).sum().backward()
    assert torch.equal(logits.grad, wanted)


# ---------------------------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("options", [{}, {"batch": False, "include_background": True}, {"ignore_index": 1}], **options_of)
@pytest.mark.parametrize(
    "dtype,size", [(torch.float32, 1e4), (torch.bfloat16, 1e4), (torch.float16, 65504.0), (torch.float32, 1e30)], ids=str
)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("path", PATHS)
def test_huge_logits(path, classes, dtype, size, options):
    logits, target = inputs(classes)
    logits = (logits.sign() * size).to(dtype)
    logits[0] = logits[0, :1]  # equal ones too
    found, wanted = evaluate(path, logits, target, **options), evaluate(kernels.dice_ce_ref, logits, target, **options)
    for f, w in zip(found, wanted):
        assert torch.isfinite(f).all()
        torch.testing.assert_close(f, w, rtol=1e-6 if f.dtype == torch.float32 else 2**-7, atol=1e-7)


@pytest.mark.parametrize("scale", [15.0, 40.0, 85.0])
@pytest.mark.parametrize("options", [{}, {"class_weight": True}], **options_of)
@pytest.mark.parametrize("path", PATHS)
def test_confidently_wrong(path, options, scale):
    """Each e^z is a float32 still, their products soon are not: the plain path takes logarithms of products of four."""
    logits, target = inputs(2)
    wrong = torch.stack([target, 1 - target], 1).float() * scale
    assert_as_exact_as_pytorch(path, wrong + logits / 10, target, **options)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("path", PATHS)
def test_a_class_ruled_out_by_minus_infinity(path, classes):
    logits, target = inputs(classes)
    logits[:, -1] = -torch.inf
    target = target.clamp(max=classes - 2)
    for found, wanted in zip(evaluate(path, logits, target), evaluate(kernels.dice_ce_ref, logits, target)):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("path", PATHS)
def test_everything_ignored_is_a_loss_of_zero(path, classes, batch):
    logits, target = inputs(classes)
    for weight in (None, True):
        loss, dice, grad = evaluate(path, logits, torch.full_like(target, 255), ignore_index=255, batch=batch, class_weight=weight)
        assert loss == 0 and (dice == 1).all() and (grad == 0).all()


@pytest.mark.parametrize("options", [{}, {"batch": False}, {"include_background": True}], **options_of)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("path", PATHS)
def test_absent_classes_and_empty_foreground(path, classes, options):
    logits, target = inputs(classes)
    for labels in (target.clamp(max=classes - 2), torch.zeros_like(target), torch.full_like(target, classes - 1)):
        for x in (logits, logits - 40 * torch.eye(classes, device=DEVICE)[1].view(-1, 1, 1, 1)):
            assert_as_exact_as_pytorch(path, x, labels, **options)


@pytest.mark.parametrize("label", [-1, 3, 200, 2**32 + 1])
@pytest.mark.parametrize("classes", [2, 3])
def test_labels_out_of_range_do_not_go_unnoticed(classes, label):
    logits, target = inputs(classes)
    target[0, 1, 2, 3] = label
    with pytest.raises(ValueError, match=f"labels must lie in .*got {label}"):
        kernels.dice_ce(logits, target) if DEVICE == "cpu" else dice_ce_file.dice_ce_plain(logits, target)
    loss, _, grad = evaluate(dice_ce_file.dice_ce_triton, logits, target)
    assert loss.isnan() and grad.isnan().any()
    for path in (dice_ce_file.dice_ce_plain, dice_ce_file.dice_ce_triton):
        loss, _, grad = evaluate(path, logits, target, ignore_index=label)
        assert loss.isfinite() and grad.isfinite().all() and (grad[0, :, 1, 2, 3] == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_nan_logits_are_not_hidden(path):
    logits, target = inputs(2)
    logits[0, 1, 0, 0, 0] = torch.nan
    assert path(logits, target)[0].isnan()


@pytest.mark.parametrize("path", PATHS)
def test_what_does_not_fit_is_refused(path):
    logits, target = inputs(3)
    for x, y, options, message in (
        (logits[:, :1], target, {}, "labels of shape"),
        (logits, target[:, 1:], {}, "labels of shape"),
        (logits, target.float(), {}, "integer labels"),
        (logits.long(), target, {}, "floating dtype"),
        (logits, target, {"class_weight": torch.ones(2)}, "one a class"),
        (logits, target, {"sync": True}, "init_process_group"),
    ):
        with pytest.raises(ValueError, match=message):
            path(x, y, **options)


@pytest.mark.parametrize("path", PATHS)
def test_laws(path):
    logits, target = inputs(4)
    loss, dice, grad = evaluate(path, logits, target, include_background=True)
    # Renaming the classes renames the results; moving voxels moves the gradient.
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    renamed = evaluate(path, logits[:, order], order.argsort()[target], include_background=True)
    for found, wanted in zip(renamed, (loss, dice[order], grad[:, order])):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    flipped = evaluate(path, logits.flip(2, 4), target.flip(1, 3), include_background=True)
    for found, wanted in zip(flipped, (loss, dice, grad.flip(2, 4))):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    # The softmax does not see a number added to all classes, so the gradient adds up to 0 over them.
    torch.testing.assert_close(evaluate(path, logits + 5, target, include_background=True)[0], loss, rtol=1e-5, atol=0)
    assert grad.sum(1).abs().max() < 1e-6 * grad.abs().max()
    # A third class that nobody predicts or sees changes nothing: the formulas of two classes against the general ones.
    two, target = inputs(2)
    three = torch.cat([two, torch.full_like(two[:, :1], -200.0)], 1)
    loss, dice, grad = evaluate(path, two, target, dice_weight=0.0)
    for found, wanted in zip(
        evaluate(path, three, target, dice_weight=0.0), (loss, torch.cat([dice, dice.new_ones(1)]), torch.cat([grad, 0 * grad[:, :1]], 1))
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------------ memory and bits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", PATHS)
def test_equal_inputs_give_equal_bits(path, layout):
    logits, target = inputs(2, (24, 25, 26), layout=layout)
    first = evaluate(path, logits, target)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, evaluate(path, logits.clone(), target.clone())))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", PATHS)
def test_kept_for_the_backward_pass_are_the_inputs_and_a_few_numbers(path, layout):
    logits, target = inputs(2, (8, 8, 8), layout=layout)
    logits, target, kept = logits.requires_grad_(), target.to(torch.uint8)[:, None], {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.untyped_storage().data_ptr(): t}) or t, lambda t: t):
        path(logits, target)
    assert {logits.data_ptr(), target.data_ptr()} < set(kept)
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) - 9 * 2 * 8**3 <= 32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_cells_around_the_outputs_stay_untouched(classes, layout):
    """The kernels write into the middle of a larger tensor, in which every other cell must keep its value."""
    logits, target = inputs(classes, (5, 7, 9), layout=layout)
    _, _, wanted = evaluate(dice_ce_file.dice_ce_triton, logits, target, upstream=1.0)
    coefficients = dice_ce_file._dice_ce(logits, target, None, False, True, 1e-5, 1e-5, 1.0, 1.0, None, False, True)[2]
    big = torch.full((4, classes, 7, 9, 11), 7.0, device=DEVICE).to(memory_format=layout)
    grad = big[1:3, :, 1:-1, 1:-1, 1:-1]
    kernel, grid, args = dice_ce_file._grad_launch(torch.ones((), device=DEVICE), logits, target, coefficients, None)
    dice_ce_file._run(kernel, grid, args | dice_ce_file._geometry(logits, target=target, grad=grad) | {"grad": grad})
    torch.testing.assert_close(grad, wanted)
    grad.fill_(7.0)
    assert (big == 7).all()
    # Dense, where whole tiles are written, and the small outputs.
    launches = [
        dice_ce_file._sums_launch(logits, target, None),
        dice_ce_file._grad_launch(torch.ones((), device=DEVICE), logits, target, coefficients, None),
    ]
    partials = launches[0][2]["partials"].normal_().flatten(2).unsqueeze(2)
    launches.append(dice_ce_file._finish_launch(partials, None, torch.float32, False, 1e-5, 1e-5, 1.0, 1.0, 1))
    for kernel, grid, args in launches:
        for name in {"partials", "grad", "loss", "dice", "coefficients"} & set(args):
            if name in ("partials", "coefficients") and kernel is not launches[("partials", "coefficients").index(name) * 2][0]:
                continue  # an input
            wanted = dice_ce_file._run(kernel, grid, args)[name].clone()
            room = torch.full((wanted.numel() + 128,), 7.0, device=DEVICE)
            inside = room[64:-64].as_strided(wanted.shape, wanted.stride(), 64)
            dice_ce_file._run(kernel, grid, args | {name: inside})
            assert torch.equal(inside, wanted) and (room[:64] == 7).all() and (room[-64:] == 7).all(), name


@pytest.mark.parametrize("far", ["sample", "class", "channels_last"])
@pytest.mark.parametrize("classes", [2, 3])
def test_offsets_beyond_2_to_the_31(classes, far):
    """Tensors whose parts lie more than 2^31 elements apart; memory that nobody touches is never committed."""
    n, gap = 60, 2**31 + 64
    strides = {"sample": (gap, n), "class": (n, gap), "channels_last": (gap, 1)}[far]
    shape, strides = (2, classes, 3, 4, 5), (*strides, *(s * (classes if far == "channels_last" else 1) for s in (20, 5, 1)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
    logits, grad = (torch.empty(reach, dtype=torch.float16, device=DEVICE).as_strided(shape, strides) for _ in range(2))
    target = torch.empty(gap + n, dtype=torch.uint8, device=DEVICE).as_strided((2, 3, 4, 5), (gap, 20, 5, 1))
    values, labels = inputs(classes, (3, 4, 5), dtype=torch.float16)
    logits.copy_(values), target.copy_(labels)
    for found, wanted in zip(evaluate(dice_ce_file.dice_ce_triton, logits, target), evaluate(dice_ce_file.dice_ce_triton, values, labels)):
        torch.testing.assert_close(found, wanted)
    coefficients = dice_ce_file._dice_ce(values, labels, None, False, True, 1e-5, 1e-5, 1.0, 1.0, None, False, True)[2]
    kernel, grid, args = dice_ce_file._grad_launch(torch.tensor(-1.7, device=DEVICE), logits, target, coefficients, None)
    dice_ce_file._run(kernel, grid, args | dice_ce_file._geometry(logits, target=target, grad=grad) | {"grad": grad})
    torch.testing.assert_close(grad.contiguous(), wanted)
    if DEVICE == "cpu":
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


# ------------------------------------------------------------------------------------------- autograd, the compiler, processes


@pytest.mark.parametrize(
    "options", [{}, {"batch": False, "include_background": True}, {"ignore_index": 1, "class_weight": True}], **options_of
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("path", PATHS)
def test_gradcheck(path, classes, layout, options):
    logits, target = inputs(classes, (2, 3, 2), dtype=torch.float64, layout=layout)
    if options.get("class_weight"):
        options = options | {"class_weight": torch.arange(1.0, classes + 1, device=DEVICE)}
    # In the interpreter mostly a random direction instead of all numbers, for time.
    some = path is dice_ce_file.dice_ce_triton and (len(options) > 0 or layout is torch.channels_last_3d)
    assert torch.autograd.gradcheck(lambda x: path(x, target, **options)[0], logits.requires_grad_(), fast_mode=some or classes == 3)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [True, False])
def test_opcheck(fused, layout, batch):
    logits, target = inputs(2, (3, 4, 5), layout=layout)
    weight = torch.tensor([1.0, 2.0], device=DEVICE)
    args = (logits.requires_grad_(), target, weight, False, batch, 1e-5, 1e-5, 1.0, 1.0, 255, False, fused)
    torch.library.opcheck(torch.ops.mirror_unet.dice_ce, args)
    coefficients = torch.rand(3 if batch else 5, 2, device=DEVICE)
    args = (torch.tensor(2.0, device=DEVICE), logits.detach(), target, coefficients, 255, fused)
    torch.library.opcheck(torch.ops.mirror_unet.dice_ce_backward, args)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", PATHS)
def test_compiles_without_a_graph_break(path, layout):
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
    assert torch.equal(loss, step(eager, target)) and torch.equal(logits.grad, eager.grad)
    assert logits.grad.stride() == logits.stride()


CASES = [{}, {"batch": False, "include_background": True}, {"ignore_index": 255, "class_weight": torch.tensor([1.0, 3.0])}]


def one_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    logits, target = inputs(2, (3, 4, 5), batch=4, ignored=255)
    mine = slice(2 * rank, 2 * rank + 2)
    results = {}
    for name in ("ref", "plain", "triton"):
        for i, options in enumerate(CASES):
            y = target if "ignore_index" in options else target.clamp(max=1)
            results[name, i] = evaluate(getattr(dice_ce_file, f"dice_ce_{name}"), logits[mine].cpu(), y[mine].cpu(), sync=True, **options)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE != "cpu", reason="gloo, and Triton's interpreter, are for tensors on the CPU")
def test_two_processes_equal_one_with_both_their_batches(tmp_path):
    torch.multiprocessing.spawn(one_of_two_processes, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    logits, target = inputs(2, (3, 4, 5), batch=4, ignored=255)
    for name, i in results[0]:
        y = target if "ignore_index" in CASES[i] else target.clamp(max=1)
        loss, dice, grad = evaluate(kernels.dice_ce_ref, logits, y, **CASES[i])
        (loss0, dice0, grad0), (loss1, dice1, grad1) = (r[name, i] for r in results)
        assert torch.equal(loss0, loss1)
        torch.testing.assert_close(loss0, loss, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(torch.cat([grad0, grad1]) / 2, grad, rtol=1e-5, atol=1e-7)  # DDP's average
        for d in (dice0, dice1) if dice.dim() == 1 else (torch.cat([dice0, dice1]),):
            torch.testing.assert_close(d, dice, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------- the code for real GPUs

COMPILE = """
import importlib, sys, torch
sys.path.append("benchmarks")
import budget
m = importlib.import_module("kernels.dice_ce")

# The budget looks at the widest load alone; several of these read the volume.
for spec in m.compile_specs():
    if "C=2" in spec["name"]:
        loads = budget.compiled(spec["kernel"], spec["arguments"], "sm_80")[3]
        assert loads.count(128) >= 5, f"{spec['name']}: logits are not read 128 bits at a time"

# What a launch may look like otherwise (the budget has their spills): a size of 1, strides, groups, labels and indices of all kinds.
def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

big = meta(2, 2, 9, 8, 7)
for name, x, y, ignore in (
    ("one voxel", meta(1, 2, 1, 1, 1), meta(1, 1, 1, 1, dtype=torch.int64), None),
    ("odd", meta(1, 3, 5, 7, 9, dtype=torch.float16), meta(1, 5, 7, 9, dtype=torch.int16), 1),
    ("strided", big[:, :, 1:8, 2:6, ::2], meta(2, 7, 4, 4, dtype=torch.int32), -1),
    ("expanded", meta(1, 5, 4, 4, 4, dtype=torch.float64).expand(3, -1, -1, -1, -1), meta(4, dtype=torch.uint8).expand(3, 4, 4, 4), 255),
):
    b, c = x.shape[:2]
    numbers = dict(dtype=m._accumulator(x.dtype))
    launches = [m._sums_launch(x, y, ignore), m._finish_launch(meta(4, c, b, 13), meta(c), x.dtype, True, 1e-5, 1e-5, 1.0, 1.0, 2)]
    launches += [m._grad_launch(meta(**numbers), x, y, meta(rows, c, **numbers), ignore) for rows in {3, 2 * b + 1}]
    for kernel, _, args in launches:
        for target in ("sm_80", "gfx942"):
            spilled = budget.compiled(kernel, args | {"num_warps": m.WARPS}, target)[1]
            assert spilled == 0, f"{name}: {kernel.__name__} spills on {target}"
"""


def test_kernels_compile_for_gpus_without_spills_and_read_128_bits_at_a_time():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
