"""norm_act: the definition against the formula, all paths against the definition in float64."""

import importlib
from contextlib import nullcontext
from itertools import product
from unittest import mock

import pytest
import torch
from conftest import DEVICE
from torch.autograd.graph import saved_tensors_hooks

import kernels
from kernels.norm_act import NormAct, norm_act_plain, norm_act_ref, norm_act_triton

triton = pytest.importorskip("triton")
norm_act_file = importlib.import_module("kernels.norm_act")  # kernels.norm_act is the function
pytestmark = pytest.mark.cuda

LAST = torch.channels_last_3d
LAYOUTS = [torch.contiguous_format, LAST]
slow = pytest.mark.slow
NAMES = ("y", "x", "weight", "bias", "slope", "residual")


def norm_act_tiles(*args, **options):
    """`norm_act_triton` in the form for large volumes, inside a `with form(norm_act_tiles)`."""
    return norm_act_triton(*args, **options)


def form(f):
    """A context in which f runs forward and backward."""
    if f is not norm_act_tiles:
        return nullcontext()
    return mock.patch.multiple(norm_act_file, REGISTERS=0, _PLANS={})


PATHS = [norm_act_plain, norm_act_triton]
TRITON = [norm_act_triton, norm_act_tiles]
# Wide sweeps in Triton's interpreter take minutes; a quick test next to each has examples.
SWEEP = [norm_act_plain, *(pytest.param(f, marks=slow) for f in TRITON)]


def make_arguments(
    shape=(2, 3, 5, 7, 9),
    slopes=1,
    dtype=torch.float32,
    layout=torch.contiguous_format,
    affine=True,
    residual=True,
):
    """Random x, weight, bias, slope, residual; slopes: 1 or C values, "number" or None."""
    torch.manual_seed(0)
    c = shape[1]
    x = torch.randn(shape).to(DEVICE, dtype).contiguous(memory_format=layout)
    added = torch.randn(shape).to(DEVICE, dtype).contiguous(memory_format=layout)
    weight = torch.rand(c, device=DEVICE) + 0.5 if affine else None
    bias = torch.randn(c, device=DEVICE) if affine else None
    if slopes in (None, "number"):
        slope = None if slopes is None else 0.1
    else:
        slope = torch.rand(slopes, device=DEVICE)
    return x, weight, bias, slope, added if residual else None


def run_both_ways(f, args, grad_output, **options):
    """y and the gradients of all tensors in args, in their places."""
    args = [a.detach().requires_grad_() if torch.is_tensor(a) else a for a in args]
    tensors = [a for a in args if torch.is_tensor(a)]
    with form(f):
        y = f(*args, **options)
        grads = iter(torch.autograd.grad(y, tensors, grad_output))
    return [y, *(next(grads) if torch.is_tensor(a) else None for a in args)]


def check(f, args, grad_output=None):
    """Compare the result of f and every gradient with the reference in float64.

    The error may be twice that of PyTorch in float32, plus one rounding of a low-precision result
    (two in the interpreter, which truncates to bfloat16 instead of rounding).
    """
    x = args[0]
    if grad_output is None:
        grad_output = torch.randn(x.shape, device=DEVICE).to(x.dtype)
    doubles = [a.double() if torch.is_tensor(a) else a for a in args]
    floats = [a.float() if torch.is_tensor(a) else a for a in args]
    found = run_both_ways(f, args, grad_output)
    exact = run_both_ways(norm_act_ref, doubles, grad_output.double())
    eager = run_both_ways(norm_act_ref, floats, grad_output.float())
    for name, ours, truth, theirs in zip(NAMES, found, exact, eager):
        if ours is None:
            continue
        low_precision = ours.dtype in (torch.float16, torch.bfloat16)
        rounding = torch.finfo(ours.dtype).eps if low_precision else 1e-6
        scale = truth.abs().max().clamp_min(1)
        allowed = 2 * (theirs.double() - truth).abs().max() + rounding * scale
        assert torch.isfinite(ours).all(), name
        worst = (ours.double() - truth).abs().max()
        assert worst <= allowed, f"{name}: error {worst:.2e}, allowed {allowed:.2e}"
    assert found[0].dtype == found[1].dtype == x.dtype
    assert found[0].shape == x.shape
    return found


def formula(x, weight, bias, slope, residual, eps=1e-5):
    """The formula of the module's docstring, in float64."""
    x, weight, bias, slope, residual = (t.double() for t in (x, weight, bias, slope, residual))
    weight, bias, slope = (t.view(-1, 1, 1, 1) for t in (weight, bias, slope))
    mean = x.mean((2, 3, 4), keepdim=True)
    var = (x - mean).square().mean((2, 3, 4), keepdim=True)
    z = (x - mean) / (var + eps).sqrt() * weight + bias
    return z.clamp(min=0) + slope * z.clamp(max=0) + residual


# --------------------------------------------------------------------------------- correct values
@pytest.mark.parametrize("slopes", [1, 3])
def test_the_definition_is_the_formula(slopes):
    args = make_arguments(slopes=slopes, dtype=torch.float64)
    grad_output = torch.randn(args[0].shape, dtype=torch.float64, device=DEVICE)
    found = run_both_ways(norm_act_ref, args, grad_output)
    expected = run_both_ways(formula, args, grad_output)
    for name, ours, truth in zip(NAMES, found, expected):
        torch.testing.assert_close(ours, truth, msg=name)


@pytest.mark.parametrize("f", PATHS)
def test_an_example_computed_by_hand(f):
    """Values -1, 1, -1, 1 have mean 0 and variance 1, so z = 2 xhat + 1 is -1 or 3 for eps = 0.

    With slope 0.5 and residual 10, y is 9.5 or 13.
    """
    x = torch.tensor([-1.0, 1, -1, 1], device=DEVICE).view(1, 1, 1, 2, 2).requires_grad_()
    w, b, s = (torch.tensor([v], device=DEVICE, requires_grad=True) for v in (2.0, 1.0, 0.5))
    y = f(x, w, b, s, torch.full_like(x, 10.0), eps=0.0)
    assert y.flatten().tolist() == [9.5, 13, 9.5, 13]
    # g = 1, 2, 3, 4: dz = 0.5, 2, 1.5, 4 with sum 8; times xhat 4; sum of g min(z, 0) = -1 - 3
    grad_output = torch.tensor([1.0, 2, 3, 4], device=DEVICE).view_as(x)
    dx, dw, db, ds = torch.autograd.grad(y, (x, w, b, s), grad_output)
    assert (dw.item(), db.item(), ds.item()) == (4, 8, -4)
    assert dx.flatten().tolist() == [-1, -2, 1, 2]  # 2 (dz - 2 - xhat)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slopes", [None, 1, 3, "number"])
@pytest.mark.parametrize("affine,residual", [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("f", SWEEP)
def test_all_options(f, layout, slopes, affine, residual):
    check(f, make_arguments(slopes=slopes, layout=layout, affine=affine, residual=residual))


@pytest.mark.parametrize(
    "layout,slopes,affine,residual",
    [
        (torch.contiguous_format, 1, True, True),
        (LAST, 3, True, True),
        (LAST, "number", False, False),
        (torch.contiguous_format, None, True, False),
    ],
)
@pytest.mark.parametrize("f", TRITON)
@pytest.mark.slow
def test_options_on_triton(f, layout, slopes, affine, residual):
    check(f, make_arguments(slopes=slopes, layout=layout, affine=affine, residual=residual))


SHAPES = [
    (1, 1, 4, 4, 4),
    (1, 1, 1, 1, 1),
    (1, 2, 32, 32, 16),
    (3, 2, 3, 3, 3),
    (2, 24, 6, 6, 6),
    (1, 17, 8, 4, 2),
    (1, 70, 5, 5, 12),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("f", SWEEP)
def test_all_shapes(f, layout, shape):
    y = check(f, make_arguments(shape, slopes=shape[1], layout=layout))[0]
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout,shape", [(LAST, SHAPES[4]), (LAYOUTS[0], SHAPES[1])])
@pytest.mark.parametrize("f", TRITON)
def test_shapes_on_triton(f, layout, shape):
    y = check(f, make_arguments(shape, slopes=shape[1], layout=layout))[0]
    assert y.is_contiguous(memory_format=layout)


def check_dtype(f, layout, dtype):
    """Check the values; x, y and residual have the dtype, parameters keep float32."""
    found = check(f, make_arguments((2, 8, 6, 5, 7), layout=layout, dtype=dtype))
    y, dx, dweight, _, dslope, dresidual = found
    assert dresidual.dtype == dtype
    assert dweight.dtype == dslope.dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("f", SWEEP)
def test_all_dtypes(f, layout, dtype):
    check_dtype(f, layout, dtype)


@pytest.mark.parametrize("f", TRITON)
def test_bfloat16_on_triton(f):
    check_dtype(f, LAST, torch.bfloat16)


def test_the_switch_passes_everything_on():
    args = make_arguments(slopes=3)
    found = kernels.norm_act(*args, eps=0.1)
    torch.testing.assert_close(found, norm_act_ref(*args, eps=0.1))


# ---------------------------------------------------------------------------------------- layouts
def views():
    """Tensors (2, 3, 4, 5, 6) that are not dense, by name."""
    big = torch.randn(3, 5, 6, 8, 9, device=DEVICE)
    region = (slice(0, 2), slice(1, 4), slice(1, 5), slice(2, 7), slice(3, 9))
    every_other = (slice(None, None, 2),) * 5
    return {
        "sliced": big[region],
        "sliced channels_last": big.to(memory_format=LAST)[region],
        "every other": torch.randn(4, 6, 8, 10, 12, device=DEVICE)[every_other],
        "some channels": torch.randn(2, 5, 4, 5, 6, device=DEVICE)[:, 1:4],
        "transposed": torch.randn(2, 3, 6, 5, 4, device=DEVICE).transpose(2, 4),
        "one sample for all": torch.randn(1, 3, 4, 5, 6, device=DEVICE).expand(2, -1, -1, -1, -1),
        "one slice for all": torch.randn(2, 3, 1, 5, 6, device=DEVICE).expand(-1, -1, 4, -1, -1),
        "one number": torch.randn(1, device=DEVICE).expand(2, 3, 4, 5, 6),
    }


def check_view(f, view, where):
    """Check f with a view as x, residual or grad_output, the other tensors in both layouts."""
    given = views()[view]
    for layout in LAYOUTS:
        args = make_arguments((2, 3, 4, 5, 6), slopes=3, layout=layout)
        x, weight, bias, slope, residual = args
        x = given if where == "x" else x
        residual = given if where == "residual" else residual
        args = (x, weight, bias, slope, residual)
        if where == "x" and view == "one number":  # variance 0: every z is the bias
            with form(f):
                found = f(*args, eps=1e-3)
            expected = norm_act_ref(*args, eps=1e-3)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
            continue
        y = check(f, args, given if where == "grad_output" else None)[0]
        if view == "sliced channels_last" and where == "x":
            assert y.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("where", ["x", "residual", "grad_output"])
@pytest.mark.parametrize("view", list(views()))
@pytest.mark.parametrize("f", SWEEP)
def test_all_views(f, view, where):
    check_view(f, view, where)


@pytest.mark.parametrize(
    "view,where",
    [
        ("sliced channels_last", "x"),
        ("every other", "residual"),
        ("one number", "grad_output"),
    ],
)
@pytest.mark.parametrize("f", TRITON)
@pytest.mark.slow
def test_views_on_triton(f, view, where):
    check_view(f, view, where)


def test_tensors_may_have_different_layouts():
    x, weight, bias, slope, residual = make_arguments((2, 8, 4, 6, 8))
    last = x.contiguous(memory_format=LAST)
    check(norm_act_triton, (last, weight, bias, slope, residual))
    residual_last = residual.contiguous(memory_format=LAST)
    check(norm_act_triton, (x, weight, bias, slope, residual_last))
    grad_output = torch.randn_like(x).contiguous(memory_format=LAST)
    check(norm_act_triton, (x, weight, bias, slope, residual), grad_output)


@pytest.mark.parametrize("size", [(3, 3, 3), (2, 2, 2), (1, 1, 5), (4, 3, 2)])
@pytest.mark.parametrize("layouts", list(product((torch.contiguous_format, LAST), repeat=3)))
def test_every_mixture_of_layouts_in_small_volumes(size, layouts):
    """Of x, residual and grad_output; an odd number of voxels makes rows of one voxel."""
    for channels, slopes in product((1, 2, 5), (1, None)):
        x, *parameters, residual = make_arguments((2, channels, *size), slopes=slopes)
        x, residual, grad_output = (
            t.contiguous(memory_format=layout)
            for t, layout in zip((x, residual, torch.randn_like(x)), layouts)
        )
        check(norm_act_plain, (x, *parameters, residual), grad_output)


@pytest.mark.parametrize("f", PATHS)
def test_parameters_may_be_views_with_strides(f):
    x, weight, bias, slope, residual = make_arguments((2, 3, 4, 5, 6), slopes=3)
    expected = f(x, weight, bias, slope, residual)
    wide = torch.stack([weight, weight + 1], 1)[:, 0]
    assert torch.equal(f(x, wide, bias.flip(0).flip(0), slope, residual), expected)
    one = slope[1:2]
    assert torch.equal(f(x, weight, bias, one.expand(3)), f(x, weight, bias, one))


@pytest.mark.parametrize("f", TRITON)
def test_more_samples_than_the_second_axis_of_a_grid_has(f):
    x = torch.empty(2**16 + 3, 2, 2, 2, 2, device="meta")
    _, stats = norm_act_file._forward_outputs(x)
    with form(f):
        launches = norm_act_file._forward_launches(1.0, 1e-5, x, None, None, None, None)
        launches += norm_act_file._backward_launches(1.0, x, x, None, None, None, stats)
    assert all(len(grid) == 1 for _, grid, _ in launches)


# ------------------------------------------------------------------- plans, kept between the calls
@pytest.mark.parametrize("f", TRITON)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_later_calls_take_their_own_tensors(f, layout):
    """The first call, with one tensor in two places, must not decide where later calls read."""
    torch.manual_seed(1)
    make = [torch.randn(2, 3, 4, 5, 6, device=DEVICE).contiguous(memory_format=layout)]
    make += [torch.randn_like(make[0]) for _ in range(3)]
    parameters = [torch.rand(3, device=DEVICE) for _ in range(3)]
    w = parameters[0]
    with form(f), mock.patch.object(norm_act_file, "_PLANS", {}):
        same = run_both_ways(norm_act_triton, (make[0], w, w, w, make[0]), make[0])[0]
        plans = len(norm_act_file._PLANS)
        args = (make[1], *parameters, make[2])
        found = run_both_ways(norm_act_triton, args, make[3])
        assert len(norm_act_file._PLANS) == plans == 2
    torch.testing.assert_close(same, norm_act_ref(make[0], w, w, w, make[0]))
    expected = run_both_ways(norm_act_ref, args, make[3])
    for name, ours, truth in zip(NAMES, found, expected):
        torch.testing.assert_close(ours, truth, atol=1e-4, rtol=1e-4, msg=name)


def test_what_a_compiled_kernel_depends_on_makes_a_new_plan():
    with mock.patch.object(norm_act_file, "_PLANS", {}) as plans, torch.no_grad():
        x = torch.randn(2, 4, 4, 4, 5, device=DEVICE)
        w = torch.ones(5, device=DEVICE)
        variants = [
            (x, {}),
            (x, {"eps": 1e-3}),
            (x, {"slope": 0.1}),
            (x, {"slope": 0.2}),
            (x, {"slope": w[:1]}),
            (x, {"slope": w[:4]}),
            (x, {"weight": w[:4]}),
            (x, {"weight": w[1:]}),  # an address that is no multiple of 16
            (x, {"bias": w[:4]}),
            (x, {"residual": x}),
            (x, {"residual": x.contiguous(memory_format=LAST)}),
            (x.contiguous(memory_format=LAST), {}),
            (x.bfloat16(), {}),
            (x[..., :4], {}),
            (x[..., 1:], {}),
        ]
        for n, (x, options) in enumerate(variants):
            for _ in range(2):
                torch.testing.assert_close(
                    norm_act_triton(x, **options), norm_act_ref(x, **options), atol=1e-2, rtol=1e-2
                )
            assert len(plans) == n + 1


@pytest.mark.parametrize("f", TRITON)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_call_with_known_statistics_gives_the_same_bits_in_one_launch(f, layout):
    args = make_arguments((2, 3, 6, 7, 8), layout=layout)
    args[0].requires_grad_()
    with form(f):
        y = f(*args)
        assert set(y.known) == {"stats"} and not y.known["stats"].requires_grad
        with torch.no_grad(), mock.patch.object(norm_act_file, "_PLANS", {}) as plans:
            assert torch.equal(f(*args, **y.known), y)
            assert torch.equal(f(*args, **y.known), y)
            [(_, launches)] = plans.values()
            assert len(launches) == 1
            assert not hasattr(f(*args), "known")
    assert not hasattr(norm_act_plain(*args), "known")


@pytest.mark.parametrize("f", PATHS)
def test_second_derivatives_are_an_error(f):
    x = torch.randn(1, 2, 3, 3, 3, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


# -------------------------------------------------------------------------------------- precision
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "f,shape",
    [
        (norm_act_plain, (1, 1, 128, 128, 128)),
        (norm_act_plain, (1, 2, 32, 32, 32)),
        (norm_act_triton, (1, 2, 32, 32, 32)),
        (norm_act_triton, (1, 2, 16, 16, 16)),
        pytest.param(norm_act_triton, (1, 1, 128, 128, 128), marks=slow),
    ],
)
def test_the_variance_is_stable_far_from_zero(f, layout, shape):
    """Mean 1000, standard deviation 0.1.

    One float32 step at 1000 is 6e-5, or 6e-4 deviations; E[x^2] - E[x]^2 would be only noise.
    """
    torch.manual_seed(0)
    x = (1000 + 0.1 * torch.randn(shape, device=DEVICE)).contiguous(memory_format=layout)
    y = f(x).double()
    exact = norm_act_ref(x, upcast=True).double()
    assert (y - exact).abs().max() < 1e-3
    assert (y.std((2, 3, 4)) - exact.std((2, 3, 4))).abs().max() < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("f", PATHS)
def test_a_constant_becomes_its_bias_with_finite_gradients(f, layout, dtype):
    x = torch.full((1, 2, 3, 2, 2), 5.0, dtype=dtype, device=DEVICE)
    x = x.contiguous(memory_format=layout).requires_grad_()
    bias = torch.tensor([1.0, -2.0], device=DEVICE)
    y = f(x, torch.ones(2, device=DEVICE), bias, torch.tensor([0.5], device=DEVICE))
    y.sum().backward()  # the gradient of y has stride 0
    assert y[0, :, 0, 0, 0].tolist() == [1.0, -1.0]
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() < 1e-3


@pytest.mark.parametrize("f", PATHS)
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_gradients_scale_with_grad_output(f, scale):
    args = make_arguments(slopes=3)
    grad_output = torch.randn(args[0].shape, device=DEVICE)
    _, *ones = run_both_ways(f, args, grad_output)
    _, *scaled = run_both_ways(f, args, scale * grad_output)
    for name, expected, found in zip(NAMES[1:], ones, scaled):
        torch.testing.assert_close(found / scale, expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("f", PATHS)
def test_a_nan_stays_in_its_instance(f, layout):
    x, *parameters = make_arguments((2, 3, 4, 4, 4), layout=layout)
    clean = f(x, *parameters)
    x[1, 2, 0, 0, 0] = float("nan")
    y = f(x, *parameters)
    assert y[1, 2].isnan().all()
    assert torch.equal(y[0], clean[0]) and torch.equal(y[1, :2], clean[1, :2])


@pytest.mark.parametrize("f", TRITON)
def test_triton_is_bitwise_deterministic(f):
    args = make_arguments((1, 2, 24, 24, 24))  # two tiles per instance
    grad_output = torch.randn(args[0].shape, device=DEVICE)
    first, second = (run_both_ways(f, args, grad_output) for _ in range(2))
    for name, a, b in zip(NAMES, first, second):
        assert torch.equal(a, b), name


# ----------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("f", PATHS)
def test_only_x_the_parameters_and_two_numbers_per_instance_are_saved(f):
    args = make_arguments((2, 8, 4, 4, 4), slopes=8)
    x, weight, bias, slope, residual = (t.requires_grad_() for t in args)
    saved = {}

    def pack(t):
        return saved.setdefault(t.untyped_storage().data_ptr(), t)

    with saved_tensors_hooks(pack, lambda t: t):
        f(x, weight, bias, slope, residual)
    expected = 4 * (x.numel() + 3 * 8 + 2 * 2 * 8)
    assert sum(t.untyped_storage().nbytes() for t in saved.values()) == expected
    assert residual.data_ptr() not in saved


@pytest.mark.parametrize("f", PATHS)
def test_the_gradient_of_the_residual_is_grad_output_itself(f):
    residual = torch.randn(1, 2, 3, 4, 5, device=DEVICE, requires_grad=True)
    y = f(torch.randn_like(residual), residual=residual)
    grad_output = torch.randn_like(residual)
    (found,) = torch.autograd.grad(y, residual, grad_output)
    assert found.data_ptr() == grad_output.data_ptr()


OUTPUTS = {"y", "stats", "partials", "grad_x", "means", "sums"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("f", TRITON)
def test_kernels_fill_their_outputs_and_nothing_around_them(f, layout):
    """Every output is moved into a larger field; the tiles exceed the volume on every side."""
    unused = 12345.0
    pad = 256
    fields = {}

    def run(launches):
        """Run the launches, with their outputs moved into the fields."""
        for kernel, grid, arguments in launches:
            for name in OUTPUTS & set(arguments):
                t = arguments[name]
                if t is not None and t is not stats:
                    field = torch.full((t.numel() + 2 * pad,), unused, device=DEVICE)
                    field = fields.setdefault(name, field)
                    arguments[name] = field.as_strided(t.shape, t.stride(), pad)
            kernel[grid](**arguments)

    def check_fields(*names):
        """Every number inside these fields was written, and none around them."""
        for name in names:
            field = fields.pop(name)
            assert (field[:pad] == unused).all() and (field[-pad:] == unused).all(), name
            assert (field[pad:-pad] != unused).all(), name

    x = torch.randn(2, 3, 5, 3, 7, device=DEVICE).contiguous(memory_format=layout)
    p = torch.ones(3, device=DEVICE)
    given = (x, p, p, p[:1])
    stats = None
    with form(f):
        run(norm_act_file._forward_launches(1.0, 1e-5, *given, x))
        stats = fields["stats"][pad:-pad].view(2, 2, 3).clone()
        assert fields.keys() - {"partials"} == {"y", "stats"}
        check_fields(*list(fields))
        run(norm_act_file._forward_launches(1.0, 1e-5, *given, x, stats))
        assert fields.keys() == {"y"}
        check_fields("y")
        run(norm_act_file._backward_launches(1.0, x, *given, stats))
        assert fields.keys() - {"means"} == {"grad_x", "sums", "partials"}
        check_fields(*list(fields))


@pytest.mark.skipif(DEVICE == "cuda", reason="a CPU provides pages on use; a GPU would need 9 GB")
@pytest.mark.parametrize("f", PATHS)
def test_samples_more_than_2_to_31_elements_apart(f):
    shape = (2, 3, 4, 4, 4)
    gap = 2**31 + 64

    def far_apart():
        """Random values in a block of memory of which the system provides only the used pages."""
        block = torch.empty(gap + 3 * 4**3, device=DEVICE)
        return block.as_strided(shape, (gap, 64, 16, 4, 1)).copy_(torch.randn(shape))

    _, weight, bias, slope, _ = make_arguments(shape, slopes=3)
    check(f, (far_apart(), weight, bias, slope, far_apart()), far_apart())


# --------------------------------------------------------------------------- autograd and compiling
@pytest.mark.parametrize("f", SWEEP)
@pytest.mark.parametrize("slopes", [1, 2, "number"])
def test_gradcheck(f, slopes):
    args = make_arguments((2, 2, 1, 3, 1), slopes)
    args = [t.double().requires_grad_() if torch.is_tensor(t) else t for t in args]
    with form(f):
        assert torch.autograd.gradcheck(f, args)


OPTIONS = [  # layout, affine, slopes, residual
    (LAST, True, 2, True),
    *(
        pytest.param(layout, *rest, marks=slow)
        for layout in LAYOUTS
        for rest in [(True, 1, True), (True, 2, False), (False, "number", True)]
    ),
    pytest.param(LAST, False, None, False, marks=slow),
    pytest.param(torch.contiguous_format, False, None, False, marks=slow),
]


@pytest.mark.parametrize("layout,affine,slopes,residual", OPTIONS)
@pytest.mark.slow
def test_opcheck(layout, affine, slopes, residual):
    args = make_arguments((2, 2, 3, 4, 5), slopes, torch.float32, layout, affine, residual)
    x, weight, bias, slope, residual = args
    leak = 1.0
    if not torch.is_tensor(slope):
        leak = slope or 1.0
        slope = None
    tensors = (x, weight, bias, slope, residual)
    x, weight, bias, slope, residual = (t if t is None else t.requires_grad_() for t in tensors)
    forward = torch.ops.mirror_unet.norm_act.default
    backward = torch.ops.mirror_unet.norm_act_backward.default
    torch.library.opcheck(forward, (x, weight, bias, slope, leak, residual, 1e-5))
    with torch.no_grad():
        _, stats = forward(x, weight, bias, slope, leak, residual, 1e-5)
    given = [t if t is None else t.detach() for t in (x, x, weight, bias, slope)]
    torch.library.opcheck(backward, (*given, leak, stats))


@pytest.mark.parametrize(
    "backend,layout",
    [
        ("aot_eager", LAST),
        pytest.param("aot_eager", torch.contiguous_format, marks=slow),
        pytest.param("inductor", LAST, marks=slow),
        pytest.param("inductor", torch.contiguous_format, marks=slow),
    ],
)
@pytest.mark.parametrize("f", PATHS)
@pytest.mark.slow
def test_it_compiles_without_a_graph_break(f, backend, layout):
    args = make_arguments((1, 4, 4, 4, 4), layout=layout)
    grad_output = torch.randn_like(args[0])

    def twice(*args):
        return f(f(args[0], slope=0.1) + 1, *args[1:])

    torch._dynamo.reset()
    compiled = torch.compile(twice, fullgraph=True, backend=backend)
    found = run_both_ways(compiled, args, grad_output)
    expected = run_both_ways(twice, args, grad_output)
    for name, ours, truth in zip(NAMES, found, expected):
        assert truth.abs().max() > 0.1, name
        torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("f", [norm_act_ref, *PATHS])
@pytest.mark.parametrize(
    "name,shape",
    [
        ("x", (2, 3, 4, 4)),
        ("weight", (4,)),
        ("bias", (3, 1)),
        ("slope", (2,)),
        ("residual", (2, 3, 4, 4, 5)),
    ],
)
def test_shapes_that_do_not_match_are_errors(f, name, shape):
    volume = (2, 3, 4, 4, 4)
    shapes = {"x": volume, "weight": (3,), "bias": (3,), "slope": (1,), "residual": volume}
    shapes[name] = shape
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        f(**{name: torch.ones(shape, device=DEVICE) for name, shape in shapes.items()})


# ------------------------------------------------------------------------------------- the module
@pytest.mark.parametrize("affine", [False, True])
def test_the_module_replaces_instance_norm_and_loads_its_state(affine):
    torch.manual_seed(0)
    theirs = torch.nn.InstanceNorm3d(3, eps=1e-3, affine=affine).to(DEVICE)
    ours = NormAct(3, eps=1e-3, affine=affine, slope=torch.full((1,), 0.2)).to(DEVICE)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    x, _, _, _, residual = make_arguments()
    expected = torch.nn.functional.leaky_relu(theirs(x), 0.2) + residual
    torch.testing.assert_close(ours(x, residual), expected)
    torch.testing.assert_close(ours(x[0], residual[0]), expected[0])  # without a batch
    plain = NormAct(3, eps=1e-3, affine=affine).to(DEVICE)
    plain.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(plain(x), theirs(x))
    assert plain.state_dict().keys() == theirs.state_dict().keys()


def test_the_module_learns_its_slopes_and_has_no_running_statistics():
    layer = NormAct(3, affine=True, slope=torch.full((3,), 0.25)).to(DEVICE)
    layer(make_arguments()[0]).square().sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    assert grads.keys() == {"weight", "bias", "slope"} and (grads["slope"] != 0).all()
    again = NormAct(3, affine=True, slope=torch.zeros(3)).to(DEVICE)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.slope, layer.slope)
    with pytest.raises(ValueError, match="no running statistics"):
        NormAct(3, track_running_stats=True)
