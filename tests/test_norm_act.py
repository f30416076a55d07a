"""norm_act: against its definition in float64, in both layouts and every dtype."""

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
