"""The three operations: against their definitions in float64, in both layouts and every dtype."""

import pytest
import torch

import kernels


def reference(x, weight, bias, slope, residual, eps=1e-5):
    """The formula of the module's docstring, in float64."""
    x, weight, bias, slope, residual = (t.double() for t in (x, weight, bias, slope, residual))
    mean = x.mean((2, 3, 4), keepdim=True)
    var = (x - mean).square().mean((2, 3, 4), keepdim=True)
    z = (x - mean) / (var + eps).sqrt() * weight.view(-1, 1, 1, 1) + bias.view(-1, 1, 1, 1)
    return z.clamp(min=0) + slope.view(-1, 1, 1, 1) * z.clamp(max=0) + residual


def arguments(shape=(2, 3, 5, 7, 9), slopes=1, dtype=torch.float32, layout=torch.contiguous_format):
    torch.manual_seed(0)
    c = shape[1]
    x, residual = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    return x, torch.rand(c) + 0.5, torch.randn(c), torch.rand(slopes), residual


LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slopes", [1, 3])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_norm_act_and_its_gradients_equal_the_definition(layout, slopes, dtype, tolerance):
    args = [t.requires_grad_() for t in arguments(slopes=slopes, dtype=dtype, layout=layout)]
    y = kernels.norm_act(*args)
    assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
    upstream = torch.randn(y.shape)
    expected = reference(*args)
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    found = torch.autograd.grad(y, args, upstream.to(dtype))
    wanted = torch.autograd.grad(expected, args, upstream.double())
    for name, f, w in zip(("x", "weight", "bias", "slope", "residual"), found, wanted):
        worst = (f.double() - w.double()).abs().max() / w.double().abs().max().clamp_min(1)
        assert torch.isfinite(f).all() and worst < tolerance, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_act_is_stable_far_from_zero(layout):
    torch.manual_seed(0)
    x = (1000 + 0.1 * torch.randn(1, 2, 32, 32, 32)).contiguous(memory_format=layout)
    y = kernels.norm_act(x)
    exact = (x.double() - x.double().mean((2, 3, 4), keepdim=True)) / (x.double().var((2, 3, 4), keepdim=True, correction=0) + 1e-5).sqrt()
    assert (y - exact).abs().max() < 2e-3  # one float32 step at 1000 is 6e-5, 6e-4 of the standard deviation


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_act_of_a_constant_is_its_bias_with_finite_gradients(layout, dtype):
    x = torch.full((1, 2, 2, 2, 2), 5.0, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    y = kernels.norm_act(x, torch.ones(2), torch.tensor([1.0, -2.0]), torch.tensor([0.5]))
    y.sum().backward()  # an upstream gradient of stride 0
    torch.testing.assert_close(y[0, :, 0, 0, 0].float(), torch.tensor([1.0, -1.0]), atol=2e-3, rtol=0)
    assert torch.isfinite(x.grad).all()


def test_norm_act_parts_are_optional():
    x = torch.randn(1, 2, 4, 4, 4)
    plain = kernels.norm_act(x)
    torch.testing.assert_close(plain, torch.nn.functional.instance_norm(x))
    torch.testing.assert_close(kernels.norm_act(x, residual=x), plain + x)
    torch.testing.assert_close(kernels.norm_act(x, slope=torch.zeros(1)), plain.relu())


def test_norm_act_gradcheck():
    args = [t.double().requires_grad_() for t in arguments(shape=(2, 2, 2, 3, 2))]
    assert torch.autograd.gradcheck(kernels.norm_act, args)


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 3, 5, 8, 16])
def test_voxel_shuffle_permutes_inside_its_cubes_and_can_be_undone(size, layout):
    x = torch.arange(2 * 3 * 20 * 18 * 16, dtype=torch.float32).reshape(2, 3, 20, 18, 16).contiguous(memory_format=layout)
    corners = torch.tensor([[[0, 0, 0], [4, 2, 0]], [[3, 1, 0], [2, 2, 0]]])  # those of a sample overlap
    y = kernels.voxel_shuffle(x, corners, size, seed=7)
    assert y.is_contiguous(memory_format=layout) and y.dtype == x.dtype
    for b in range(2):
        inside = torch.zeros(20, 18, 16, dtype=torch.bool)
        for d, h, w in corners[b].tolist():
            inside[d : d + size, h : h + size, w : w + size] = True
        assert torch.equal(y[b, :, ~inside], x[b, :, ~inside])
        assert torch.equal(y[b, :, inside].sort(dim=1).values, x[b, :, inside].sort(dim=1).values)
        assert torch.equal(y[b, 1] - y[b, 0], torch.full_like(y[b, 0], 20 * 18 * 16))  # one permutation for all channels
    assert (size == 1) == torch.equal(x, y)
    assert torch.equal(kernels.voxel_shuffle(y, corners, size, seed=7, inverse=True), x)


def test_voxel_shuffle_depends_on_seed_sample_and_cube_alone():
    x = torch.arange(4096.0).reshape(1, 1, 16, 16, 16)
    corner = torch.zeros(1, 1, 3, dtype=torch.long)
    shuffle = lambda seed: kernels.voxel_shuffle(x, corner, 16, seed)  # noqa: E731
    assert torch.equal(shuffle(1), shuffle(1))
    assert (shuffle(1) == shuffle(2)).float().mean() < 0.01
    assert (shuffle(1) == shuffle(1 + 2**40)).float().mean() < 0.01
    two = kernels.voxel_shuffle(x.expand(2, 1, 16, 16, 16), corner.expand(2, 1, 3), 16, seed=5)
    assert torch.equal(two[0], shuffle(5)[0]) and torch.equal(two[1], shuffle(6)[0])
    listed = kernels.voxel_shuffle(x.expand(2, 1, 16, 16, 16), corner.expand(2, 1, 3), 16, torch.tensor([9, 5]))
    assert torch.equal(listed[0], shuffle(9)[0]) and torch.equal(listed[1], shuffle(5)[0])


def test_voxel_shuffle_looks_random():
    """Over 200 keys a voxel lands anywhere: the mean position is the middle, fixed points number about one a permutation."""
    x = torch.arange(512.0).reshape(1, 1, 8, 8, 8)
    out = torch.stack([kernels.voxel_shuffle(x, torch.zeros(1, 1, 3, dtype=torch.long), 8, s).flatten() for s in range(200)])
    fixed = (out == x.flatten()).sum(1).float().mean()
    assert 0.6 < fixed < 1.5  # expected 1, standard error 0.07
    mean = out.mean(0)  # of each place over the keys: 255.5 with standard error 148 / sqrt(200) = 10.5
    assert (mean - 255.5).abs().max() < 5 * 10.5
    steps = (out[:, 1:] - out[:, :-1]).abs().mean()
    assert abs(steps - 512 / 3) < 5  # neighbours are as far apart as two numbers drawn at random
    assert len({tuple(p.tolist()) for p in out}) == 200


def test_voxel_shuffle_refuses_cubes_outside():
    with pytest.raises(ValueError, match="inside the volume"):
        kernels.voxel_shuffle(torch.zeros(1, 1, 8, 8, 8), torch.tensor([[[1, 0, 0]]]), 8, 0)
    with pytest.raises(ValueError, match=r"expected \(1, N, 3\)"):
        kernels.voxel_shuffle(torch.zeros(1, 1, 8, 8, 8), torch.zeros(2, 1, 3), 4, 0)
