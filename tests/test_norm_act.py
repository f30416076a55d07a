"""norm_act: the definition against a formula of its own, the plain and the Triton path against the definition in float64."""

import pytest
import torch
from conftest import DEVICE
from torch.autograd.graph import saved_tensors_hooks

import kernels
from kernels.norm_act import _backward_launches, _forward_launches, _launch, norm_act_plain, norm_act_ref, norm_act_triton

triton = pytest.importorskip("triton")

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]
PATHS = [norm_act_plain, norm_act_triton]
NAMES = ("y", "x", "weight", "bias", "slope", "residual")


def arguments(shape=(2, 3, 5, 7, 9), slopes=1, dtype=torch.float32, layout=torch.contiguous_format, affine=True, residual=True):
    """Random x, weight, bias, slope, residual; slopes: 1 or C values, "number" or None."""
    torch.manual_seed(0)
    c = shape[1]
    x, r = (torch.randn(shape).to(DEVICE, dtype).contiguous(memory_format=layout) for _ in range(2))
    weight, bias = (torch.rand(c, device=DEVICE) + 0.5, torch.randn(c, device=DEVICE)) if affine else (None, None)
    slope = {None: None, "number": 0.1}[slopes] if slopes in (None, "number") else torch.rand(slopes, device=DEVICE)
    return x, weight, bias, slope, r if residual else None


def both_ways(f, args, upstream, **options):
    """y and the gradients of all tensors among args, on their path."""
    args = [a.detach().requires_grad_() if torch.is_tensor(a) else a for a in args]
    y = f(*args, **options)
    tensors = [a for a in args if torch.is_tensor(a)]
    grads = iter(torch.autograd.grad(y, tensors, upstream))
    return [y, *(next(grads) if torch.is_tensor(a) else None for a in args)]


def check(f, args, upstream=None):
    """f's result and every gradient are as near the float64 reference as the rule asks: twice PyTorch's own error in float32 (a low
    precision result also gets one rounding of its own dtype, two in the interpreter, which cuts bfloat16 off and does not round it)."""
    x = args[0]
    upstream = torch.randn(x.shape, device=DEVICE).to(x.dtype) if upstream is None else upstream
    found = both_ways(f, args, upstream)
    exact = both_ways(norm_act_ref, [a.double() if torch.is_tensor(a) else a for a in args], upstream.double())
    eager = both_ways(norm_act_ref, [a.float() if torch.is_tensor(a) else a for a in args], upstream.float())
    for name, ours, e, theirs in zip(NAMES, found, exact, eager):
        if ours is None:
            continue
        scale = e.abs().max().clamp_min(1)
        own = torch.finfo(ours.dtype).eps if ours.dtype in (torch.float16, torch.bfloat16) else 1e-6
        allowed = 2 * (theirs.double() - e).abs().max() + own * scale
        assert torch.isfinite(ours).all(), name
        worst = (ours.double() - e).abs().max()
        assert worst <= allowed, f"{name}: off by {worst:.2e}, allowed {allowed:.2e}"
    assert found[0].dtype == found[1].dtype == x.dtype and found[0].shape == x.shape
    return found


def reference(x, weight, bias, slope, residual, eps=1e-5):
    """The formula of the module's docstring, in float64."""
    x, weight, bias, slope, residual = (t.double() for t in (x, weight, bias, slope, residual))
    mean = x.mean((2, 3, 4), keepdim=True)
    var = (x - mean).square().mean((2, 3, 4), keepdim=True)
    z = (x - mean) / (var + eps).sqrt() * weight.view(-1, 1, 1, 1) + bias.view(-1, 1, 1, 1)
    return z.clamp(min=0) + slope.view(-1, 1, 1, 1) * z.clamp(max=0) + residual


@pytest.mark.parametrize("slopes", [1, 3])
def test_the_definition_is_the_formula(slopes):
    args = arguments(slopes=slopes, dtype=torch.float64)
    upstream = torch.randn(args[0].shape, dtype=torch.float64, device=DEVICE)
    for name, found, wanted in zip(NAMES, both_ways(norm_act_ref, args, upstream), both_ways(reference, args, upstream)):
        torch.testing.assert_close(found, wanted, msg=name)


def test_by_hand():
    """Values -1, 1, -1, 1: mean 0, variance 1, so z = 2 xhat + 1 is -1 or 3 (eps aside); with slope 0.5 and residual 10: 9.5 or 13."""
    x = torch.tensor([-1.0, 1, -1, 1], device=DEVICE).view(1, 1, 1, 2, 2).requires_grad_()
    w, b, s = (torch.tensor([v], device=DEVICE, requires_grad=True) for v in (2.0, 1.0, 0.5))
    for f in PATHS:
        y = f(x, w, b, s, torch.full_like(x, 10.0), eps=0.0)
        assert y.flatten().tolist() == [9.5, 13, 9.5, 13]
        # dy = 1, 2, 3, 4: dz = 0.5, 2, 1.5, 4; their sum 8, times xhat 4, sum of dy min(z, 0) = -1 - 3
        dx, dw, db, ds = torch.autograd.grad(y, (x, w, b, s), torch.tensor([1.0, 2, 3, 4], device=DEVICE).view_as(x))
        assert (dw.item(), db.item(), ds.item()) == (4, 8, -4)
        assert dx.flatten().tolist() == [-1, -2, 1, 2]  # 2 (dz - 2 - xhat)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slopes", [None, 1, "C", "number"])
@pytest.mark.parametrize("affine,residual", [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("f", PATHS)
def test_options(f, layout, slopes, affine, residual):
    shape = (2, 3, 5, 7, 9)
    check(f, arguments(shape, 3 if slopes == "C" else slopes, layout=layout, affine=affine, residual=residual))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 4, 4, 4), (1, 1, 1, 1, 1), (1, 2, 32, 32, 16), (3, 2, 3, 3, 3), (2, 24, 6, 6, 6), (1, 17, 8, 4, 2), (1, 70, 5, 5, 12)]
)
@pytest.mark.parametrize("f", PATHS)
def test_shapes(f, layout, shape):
    y = check(f, arguments(shape, slopes=shape[1], layout=layout))[0]
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("f", PATHS)
def test_dtypes(f, layout, dtype):
    """Parameters stay float32, as under autocast."""
    y, dx, dweight, _, dslope, dresidual = check(f, arguments((2, 8, 6, 5, 7), layout=layout, dtype=dtype))
    assert dresidual.dtype == dtype and dweight.dtype == dslope.dtype == torch.float32


def views():
    """Tensors (2, 3, 4, 5, 6) that are not dense, by name."""
    big = torch.randn(3, 5, 6, 8, 9, device=DEVICE)
    last = big.to(memory_format=torch.channels_last_3d)
    inside = (slice(0, 2), slice(1, 4), slice(1, 5), slice(2, 7), slice(3, 9))
    return {
        "sliced": big[inside],
        "sliced channels_last": last[inside],
        "every other": torch.randn(4, 6, 8, 10, 12, device=DEVICE)[::2, ::2, ::2, ::2, ::2],
        "channels of more": torch.randn(2, 5, 4, 5, 6, device=DEVICE)[:, 1:4],
        "transposed": torch.randn(2, 3, 6, 5, 4, device=DEVICE).transpose(2, 4),
        "one sample for all": torch.randn(1, 3, 4, 5, 6, device=DEVICE).expand(2, -1, -1, -1, -1),
        "one slice for all": torch.randn(2, 3, 1, 5, 6, device=DEVICE).expand(-1, -1, 4, -1, -1),
        "one number": torch.randn(1, device=DEVICE).expand(2, 3, 4, 5, 6),
    }


@pytest.mark.parametrize("where", ["x", "residual", "upstream"])
@pytest.mark.parametrize("view", list(views()))
@pytest.mark.parametrize("f", PATHS)
def test_views(f, view, where):
    given = views()[view]
    for layout in LAYOUTS:
        x, weight, bias, slope, residual = arguments((2, 3, 4, 5, 6), slopes=3, layout=layout)
        args = (given if where == "x" else x, weight, bias, slope, given if where == "residual" else residual)
        if where == "x" and view == "one number":  # variance 0: every z is the bias
            torch.testing.assert_close(f(*args, eps=1e-3), norm_act_ref(*args, eps=1e-3), atol=1e-4, rtol=0)
            continue
        y = check(f, args, given if where == "upstream" else None)[0]
        if view == "sliced channels_last" and where == "x":
            assert y.is_contiguous(memory_format=torch.channels_last_3d)


def test_layouts_may_differ():
    x, weight, bias, slope, residual = arguments((2, 8, 4, 6, 8))
    last = torch.channels_last_3d
    check(norm_act_triton, (x.contiguous(memory_format=last), weight, bias, slope, residual))
    check(norm_act_triton, (x, weight, bias, slope, residual.contiguous(memory_format=last)))
    check(norm_act_triton, (x, weight, bias, slope, residual), torch.randn_like(x).contiguous(memory_format=last))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 2, 32, 32, 32), (1, 1, 128, 128, 128)])
@pytest.mark.parametrize("f", PATHS)
def test_stable_far_from_zero(f, layout, shape):
    """Mean 1000, deviation 0.1: one float32 step at 1000 is 6e-5, 6e-4 of the deviation, and E[x^2] - E[x]^2 would be all noise."""
    torch.manual_seed(0)
    x = (1000 + 0.1 * torch.randn(shape, device=DEVICE)).contiguous(memory_format=layout)
    y, exact = f(x).double(), norm_act_ref(x, upcast=True).double()
    assert (y - exact).abs().max() < 1e-3
    assert (y.std((2, 3, 4)) - exact.std((2, 3, 4))).abs().max() < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("f", PATHS)
def test_of_a_constant_is_its_bias_with_finite_gradients(f, layout, dtype):
    x = torch.full((1, 2, 3, 2, 2), 5.0, dtype=dtype, device=DEVICE).contiguous(memory_format=layout).requires_grad_()
    y = f(x, torch.ones(2, device=DEVICE), torch.tensor([1.0, -2.0], device=DEVICE), torch.tensor([0.5], device=DEVICE))
    y.sum().backward()  # an upstream gradient of stride 0
    assert y[0, :, 0, 0, 0].tolist() == [1.0, -1.0]
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() < 1e-3


@pytest.mark.parametrize("f", PATHS)
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_upstream_of_any_size(f, scale):
    args = arguments(slopes=3)
    upstream = torch.randn(args[0].shape, device=DEVICE)
    for name, one, scaled in zip(NAMES[1:], both_ways(f, args, upstream)[1:], both_ways(f, args, scale * upstream)[1:]):
        torch.testing.assert_close(scaled / scale, one, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("f", PATHS)
def test_what_is_kept_is_x_the_parameters_and_two_numbers_an_instance(f):
    x, weight, bias, slope, residual = (t.requires_grad_() for t in arguments((2, 8, 4, 4, 4), slopes=8))
    kept = {}
    with saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        f(x, weight, bias, slope, residual)
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) == 4 * (x.numel() + 3 * 8 + 2 * 2 * 8)
    assert residual.data_ptr() not in kept


@pytest.mark.parametrize("f", PATHS)
def test_the_residuals_gradient_is_the_upstream_gradient_itself(f):
    residual = torch.randn(1, 2, 3, 4, 5, device=DEVICE, requires_grad=True)
    y, upstream = f(torch.randn_like(residual), residual=residual), torch.randn_like(residual)
    assert torch.autograd.grad(y, residual, upstream)[0].data_ptr() == upstream.data_ptr()


def test_bitwise_deterministic():
    args = arguments((2, 3, 24, 24, 24))
    upstream = torch.randn(args[0].shape, device=DEVICE)
    for name, a, b in zip(NAMES, both_ways(norm_act_triton, args, upstream), both_ways(norm_act_triton, args, upstream)):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("f", PATHS)
@pytest.mark.parametrize("slopes", [1, 2, "number"])
def test_gradcheck(f, slopes):
    args = [t.double().requires_grad_() if torch.is_tensor(t) else t for t in arguments((2, 2, 1, 3, 1), slopes)]
    assert torch.autograd.gradcheck(f, args)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_canaries(layout):
    """The kernels fill their outputs and touch nothing around them, with tiles that stick out on every side."""
    canary, outputs = 12345.0, {}

    def fence(launches, names):
        """The launches, with the tensors of these names moved into fields of canaries."""
        for _, _, arguments in launches:
            for name in names & set(arguments):
                t = arguments[name]
                field = outputs.setdefault(name, torch.full((t.numel() + 512,), canary, device=DEVICE))
                arguments[name] = field.as_strided(t.shape, t.stride(), 256)
        _launch(x, launches)

    x = torch.randn(2, 3, 5, 3, 7, device=DEVICE).contiguous(memory_format=layout)
    p = torch.ones(3, device=DEVICE)
    fence(_forward_launches(x, p, p, p, 1.0, x, 1e-5)[2], {"y", "stats"})
    stats = outputs["stats"][256:-256].view(2, 2, 3)
    fence(_backward_launches(x, x, p, p, p, 1.0, stats)[2], {"dx", "means", "dparams", "partials"})
    assert set(outputs) == {"y", "stats", "dx", "means", "dparams", "partials"}
    for name, field in outputs.items():
        assert (field[:256] == canary).all() and (field[-256:] == canary).all(), name
        assert (field[256:-256] != canary).all(), name


def huge_samples(shape, gap):
    """Two samples `gap` elements apart in memory that is promised but, beyond the pages written, not there."""
    return torch.empty(gap + shape[1] * shape[2] ** 3, device=DEVICE).as_strided((2, *shape[1:]), (gap, *torch.empty(shape).stride()[1:]))


@pytest.mark.skipif(DEVICE == "cuda", reason="promised memory is a CPU's; on a GPU this would take 9 GB a tensor")
def test_samples_beyond_two_to_the_31_elements():
    shape = (2, 3, 4, 4, 4)
    x, residual, upstream = (huge_samples(shape, 2**31 + 64).copy_(torch.randn(shape)) for _ in range(3))
    _, weight, bias, slope, _ = arguments(shape, slopes=3)
    for f in PATHS:
        check(f, (x, weight, bias, slope, residual), upstream)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [(True, 1, True), (True, 2, False), (False, "number", True), (False, None, False)])
def test_opcheck(layout, options):
    affine, slopes, with_residual = options
    x, weight, bias, slope, residual = arguments((2, 2, 3, 4, 5), slopes, torch.float32, layout, affine, with_residual)
    slope, leak = (None, slope or 1.0) if not torch.is_tensor(slope) else (slope, 1.0)
    tensors = [t if t is None else t.requires_grad_() for t in (x, weight, bias, slope, residual)]
    x, weight, bias, slope, residual = tensors
    torch.library.opcheck(torch.ops.mirror_unet.norm_act.default, (x, weight, bias, slope, leak, residual, 1e-5))
    with torch.no_grad():
        _, stats = torch.ops.mirror_unet.norm_act(x, weight, bias, slope, leak, residual, 1e-5)
    given = [t if t is None else t.detach() for t in (x, x, weight, bias, slope)]
    torch.library.opcheck(torch.ops.mirror_unet.norm_act_backward.default, (*given, leak, stats))


@pytest.mark.parametrize("f", PATHS)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(f, backend):
    for layout in LAYOUTS:
        args = arguments((1, 4, 4, 4, 4), layout=layout)
        upstream = torch.randn_like(args[0])

        def twice(*a):
            return f(f(a[0], slope=0.1) + 1, *a[1:])

        torch._dynamo.reset()
        compiled = torch.compile(twice, fullgraph=True, backend=backend)
        for name, found, wanted in zip(NAMES, both_ways(compiled, args, upstream), both_ways(twice, args, upstream)):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("f", [norm_act_ref, *PATHS])
@pytest.mark.parametrize(
    "change,words",
    [
        ({"x": (2, 3, 4, 4)}, "floating"),
        ({"weight": (4,)}, "weight"),
        ({"slope": (2,)}, "slope"),
        ({"residual": (2, 3, 4, 4, 5)}, "residual"),
    ],
)
def test_what_does_not_fit_is_refused(f, change, words):
    shapes = {"x": (2, 3, 4, 4, 4), "weight": (3,), "bias": (3,), "slope": (1,), "residual": (2, 3, 4, 4, 4)} | change
    with pytest.raises(ValueError, match=words):
        f(**{name: torch.ones(shape, device=DEVICE) for name, shape in shapes.items()})


def test_the_switch_passes_everything_on():
    args = arguments(slopes=3)
    torch.testing.assert_close(kernels.norm_act(*args, eps=0.1), norm_act_ref(*args, eps=0.1))
