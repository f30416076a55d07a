"""voxel_shuffle: a keyed, random-looking permutation inside its cubes, undone by its inverse."""

import importlib.util
import sys
import types

import pytest
import torch
from conftest import DEVICE, ROOT, needs_triton
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.voxel_shuffle import (
    _launch,
    voxel_shuffle_plain,
    voxel_shuffle_ref,
    voxel_shuffle_triton,
)

pytestmark = pytest.mark.cuda
LAST = torch.channels_last_3d
LAYOUTS = [torch.contiguous_format, LAST]
PATHS = [voxel_shuffle_plain, pytest.param(voxel_shuffle_triton, marks=needs_triton)]
slow = pytest.mark.slow
# Wide sweeps in Triton's interpreter take minutes; a quick test next to each has examples.
SWEEP = [voxel_shuffle_plain, pytest.param(voxel_shuffle_triton, marks=slow)]


# ------------------------------------------------------------------------------- what it computes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 3, 5, 8, 16])
def test_voxels_are_permuted_inside_the_cubes_and_the_inverse_undoes_it(size, layout):
    volume = 20 * 18 * 16
    x = torch.arange(2.0 * 3 * volume).reshape(2, 3, 20, 18, 16).contiguous(memory_format=layout)
    # the cubes of a sample overlap
    corners = torch.tensor([[[0, 0, 0], [4, 2, 0]], [[3, 1, 0], [2, 2, 0]]])
    y = kernels.voxel_shuffle(x, corners, size, seed=7)
    assert y.is_contiguous(memory_format=layout) and y.dtype == x.dtype
    for b in range(2):
        mask = torch.zeros(20, 18, 16, dtype=torch.bool)
        for d, h, w in corners[b].tolist():
            mask[d : d + size, h : h + size, w : w + size] = True
        assert torch.equal(y[b, :, ~mask], x[b, :, ~mask])
        found, expected = (t[b, :, mask].sort(dim=1).values for t in (y, x))
        assert torch.equal(found, expected)
        # all channels get the same permutation
        assert torch.equal(y[b, 1] - y[b, 0], torch.full_like(y[b, 0], volume))
    assert (size == 1) == torch.equal(x, y)
    assert torch.equal(kernels.voxel_shuffle(y, corners, size, seed=7, inverse=True), x)


def test_the_permutation_depends_only_on_seed_sample_and_cube():
    x = torch.arange(4096.0).reshape(1, 1, 16, 16, 16)
    corner = torch.zeros(1, 1, 3, dtype=torch.long)

    def shuffle(seed):
        return kernels.voxel_shuffle(x, corner, 16, seed)

    def shuffle_two(seed):
        return kernels.voxel_shuffle(x.expand(2, -1, -1, -1, -1), corner.expand(2, 1, 3), 16, seed)

    assert torch.equal(shuffle(1), shuffle(1))
    assert (shuffle(1) == shuffle(2)).float().mean() < 0.01
    assert (shuffle(1) == shuffle(1 + 2**40)).float().mean() < 0.01
    assert torch.equal(shuffle_two(5), torch.cat([shuffle(5), shuffle(6)]))
    assert torch.equal(shuffle_two(torch.tensor([9, 5])), torch.cat([shuffle(9), shuffle(5)]))


def test_the_permutation_looks_random():
    """Over 200 keys each voxel gets everywhere, and about one voxel per permutation stays."""
    x = torch.arange(512.0).reshape(1, 1, 8, 8, 8)
    corner = torch.zeros(1, 1, 3, dtype=torch.long)
    shuffled = [kernels.voxel_shuffle(x, corner, 8, seed).flatten() for seed in range(200)]
    shuffled = torch.stack(shuffled)  # (200, 512)
    fixed = (shuffled == x.flatten()).sum(1).float().mean()
    assert 0.6 < fixed < 1.5  # expected 1, standard error 0.07
    mean = shuffled.mean(0)  # expected 255.5, standard error 148 / sqrt(200) = 10.5
    assert (mean - 255.5).abs().max() < 5 * 10.5
    steps = (shuffled[:, 1:] - shuffled[:, :-1]).abs().mean()
    assert abs(steps - 512 / 3) < 5  # neighbors are as far apart as two random numbers
    assert len({tuple(p.tolist()) for p in shuffled}) == 200


@needs_triton
def test_the_low_64_bits_of_a_seed_count():
    x = torch.arange(512.0, device=DEVICE).reshape(1, 1, 8, 8, 8)
    corner = torch.zeros(1, 1, 3, dtype=torch.int64)
    for path in (voxel_shuffle_plain, voxel_shuffle_triton):
        assert torch.equal(path(x, corner, 8, 2**64 + 5), path(x, corner, 8, 5))
        assert not torch.equal(path(x, corner, 8, 2**63), path(x, corner, 8, 5))


@pytest.mark.parametrize("path", [kernels.voxel_shuffle, *PATHS])
def test_arguments_that_do_not_match_are_errors(path):
    x = torch.zeros(1, 1, 8, 8, 8, device=DEVICE)
    for corner in ([1, 0, 0], [0, 0, -1]):
        with pytest.raises(ValueError, match="inside the volume"):
            path(x, torch.tensor([[corner]]), 8, 0)
    with pytest.raises(ValueError, match=r"expected \(1, N, 3\)"):
        path(x, torch.zeros(2, 1, 3), 4, 0)
    with pytest.raises(ValueError, match="one per sample"):
        path(x, torch.zeros(1, 1, 3, dtype=torch.int64), 8, torch.tensor([1, 2]))


@pytest.mark.parametrize("path", [kernels.voxel_shuffle, *PATHS])
def test_the_error_names_the_first_cube_that_is_not_inside(path):
    x = torch.zeros(2, 1, 8, 9, 10, device=DEVICE)
    corners = torch.tensor([[[0, 0, 0], [4, 5, 6]], [[4, 6, 6], [9, 9, 9]]])
    with pytest.raises(ValueError, match=r"cube at \[4, 6, 6\], side 4: .*volume \(8, 9, 10\)"):
        path(x, corners, 4, 0)
    with pytest.raises(ValueError, match="side 0"):
        path(x, corners[:, :1], 0, 0)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs corners on a GPU")
def test_corners_on_a_gpu_are_moved_inside_and_nothing_waits():
    x = torch.randn(2, 1, 9, 8, 7, device=DEVICE)
    seeds = torch.tensor([3, 4], device=DEVICE)
    corners = torch.tensor([[[-5, 2, 1]], [[99, 0, 99]]])
    expected = voxel_shuffle_ref(x, torch.tensor([[[0, 2, 1]], [[4, 0, 2]]]), 5, seeds)
    for given in (corners.cuda(), torch.tensor([[[0, 2, 1]], [[4, 0, 2]]])):
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = voxel_shuffle_triton(x, given, 5, seeds)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(found, expected)


# ------------------------------------------------------------------- all paths give the same bits
# overlapping cubes, and one cube twice
CORNERS = torch.tensor([[[0, 0, 0], [3, 2, 1], [2, 2, 2]], [[1, 0, 2], [1, 0, 2], [3, 2, 0]]])


def crop(x):
    """The values of x as a view into a larger volume."""
    return torch.nn.functional.pad(x, (1, 2, 3, 1, 2, 2))[:, :, 2:-2, 3:-1, 1:-2]


VIEWS = {
    "NCDHW": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=LAST),
    "a channel of two": lambda x: x[:, 1:2],
    "a channel of two, channels_last": lambda x: x.contiguous(memory_format=LAST)[:, 1:2],
    "cropped": crop,
    "cropped channels_last": lambda x: crop(x.contiguous(memory_format=LAST)),
    "expanded over samples": lambda x: x[:1].expand(2, -1, -1, -1, -1),
    "expanded over voxels": lambda x: x[:, :, :1, :, :1].expand(x.shape),
    "transposed": lambda x: x.transpose(2, 4).contiguous().transpose(2, 4),
    "every second row": lambda x: x.repeat_interleave(2, 3)[:, :, :, ::2],
    "samples inside channels": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}
QUICK_VIEWS = [
    ("NCDHW", False),
    ("channels_last", True),
    ("a channel of two, channels_last", False),
    ("cropped", True),
    ("expanded over voxels", False),
]


def check_equal(found, expected):
    """The same dtype, layout and bits."""
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    assert torch.equal(found, expected)


def check_view(path, view, inverse):
    """The path gives the bits of the reference on this view, and leaves it as it is."""
    x = VIEWS[view](torch.randn(2, 2, 9, 8, 7, device=DEVICE))
    before = x.clone()
    expected = voxel_shuffle_ref(x, CORNERS, 5, 11, inverse)
    assert not torch.equal(expected, x)
    check_equal(path(x, CORNERS, 5, 11, inverse), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("path", SWEEP)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_all_views_give_the_bits_of_the_reference(path, view, inverse):
    check_view(path, view, inverse)


@pytest.mark.parametrize("view,inverse", QUICK_VIEWS)
@pytest.mark.slow
def test_triton_gives_the_bits_of_the_reference(view, inverse):
    check_view(voxel_shuffle_triton, view, inverse)


QUICK_DTYPES = [torch.bfloat16, torch.bool, torch.int64]
DTYPES = [torch.float64, torch.float16, torch.int16, torch.uint8]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", QUICK_DTYPES + [pytest.param(t, marks=slow) for t in DTYPES])
@pytest.mark.slow
def test_every_dtype_is_moved_exactly(path, dtype):
    x = (torch.randn(2, 1, 9, 8, 7, device=DEVICE) * 50).to(dtype)
    if dtype.is_floating_point:
        special = torch.tensor([float("nan"), float("inf"), -0.0], dtype=dtype, device=DEVICE)
        x[0, 0, 1, 1, :3] = special
    words = {1: torch.uint8, 2: torch.int16, 8: torch.int64}[x.element_size()]
    expected = voxel_shuffle_ref(x.view(words), CORNERS, 5, 3)
    check_equal(path(x, CORNERS, 5, 3).view(words), expected)


@pytest.mark.parametrize("size,seed", [(3, -1), (8, torch.tensor([3, -7]))])
@pytest.mark.slow
def test_triton_gives_the_bits_of_the_reference_for_examples_of_keys_and_sizes(size, seed):
    check_keys(voxel_shuffle_triton, size, seed)


@pytest.mark.parametrize("path", SWEEP)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("seed", [-1, [2**63, -(2**62)], torch.tensor([3, -7])])
def test_all_keys_and_sizes_give_the_bits_of_the_reference(path, size, seed):
    check_keys(path, size, seed)


def check_keys(path, size, seed):
    """The shuffle equals the reference, and the inverse undoes it."""
    x = torch.arange(2.0 * 11 * 10 * 9, device=DEVICE).reshape(2, 1, 11, 10, 9)
    corners = CORNERS.clamp(max=1)
    shuffled = path(x, corners, size, seed)
    check_equal(shuffled, voxel_shuffle_ref(x, corners, size, seed))
    check_equal(path(shuffled, corners, size, seed, inverse=True), x)


@pytest.mark.parametrize("path", PATHS)
def test_without_cubes_x_is_copied_and_without_samples_nothing_happens(path):
    x = torch.randn(2, 1, 3, 3, 3, device=DEVICE)
    copy = path(x, torch.zeros(2, 0, 3, dtype=torch.int64), 2, 0)
    assert torch.equal(copy, x) and copy.data_ptr() != x.data_ptr()
    empty = path(x[:0], torch.zeros(0, 1, 3, dtype=torch.int64), 2, 0)
    assert empty.shape == (0, 1, 3, 3, 3)


# ------------------------------------------------------------------------- gradients and compiling
@pytest.mark.parametrize(
    "path,layout",
    [
        (voxel_shuffle_plain, torch.contiguous_format),
        (voxel_shuffle_plain, LAST),
        (voxel_shuffle_triton, LAST),
        pytest.param(voxel_shuffle_triton, torch.contiguous_format, marks=slow),
    ],
)
@pytest.mark.slow
def test_the_gradient_is_the_inverse_shuffle(path, layout):
    x = torch.randn(2, 2, 9, 8, 7, device=DEVICE).contiguous(memory_format=layout)
    x.requires_grad_()
    y = path(x, CORNERS, 5, 11)
    sliced = torch.randn(2, 4, 9, 8, 7, device=DEVICE)[:, ::2]
    expanded = torch.ones((), device=DEVICE).expand(y.shape)
    given = {"dense": torch.randn_like(y), "expanded": expanded, "sliced": sliced}
    for name, grad_output in given.items():
        (found,) = torch.autograd.grad(y, x, grad_output, retain_graph=True)
        inverse = voxel_shuffle_ref(grad_output, CORNERS, 5, 11, inverse=True)
        assert torch.equal(found, inverse), name
        reference = voxel_shuffle_ref(x, CORNERS, 5, 11)
        (by_autograd,) = torch.autograd.grad(reference, x, grad_output)
        assert torch.equal(found, by_autograd), name


@pytest.mark.parametrize("path", [*SWEEP, voxel_shuffle_ref])
def test_gradcheck(path):
    x = torch.randn(1, 1, 3, 2, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    corners = torch.tensor([[[0, 0, 0], [1, 0, 0]]])
    assert torch.autograd.gradcheck(lambda x: path(x, corners, 2, 5), x)
    assert torch.autograd.gradgradcheck(
        lambda x: path(x, corners, 2, 5).square(), x, fast_mode=True
    )


@pytest.mark.parametrize(
    "triton,layout,inverse",
    [
        (False, torch.contiguous_format, False),
        (False, LAST, True),
        pytest.param(True, LAST, False, marks=slow),
        pytest.param(True, torch.contiguous_format, False, marks=slow),
        pytest.param(True, LAST, True, marks=slow),
    ],
)
def test_opcheck(triton, layout, inverse):
    x = torch.randn(2, 2, 4, 3, 3, device=DEVICE).contiguous(memory_format=layout)
    x = x[:, :1] if inverse else x.requires_grad_()
    corners = torch.tensor([[[0, 0, 0], [1, 0, 0]], [[1, 0, 0], [0, 0, 0]]])
    arguments = (x, corners, torch.tensor([1, 2]), 3, inverse, triton)
    torch.library.opcheck(torch.ops.mirror_unet.voxel_shuffle, arguments)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.slow
def test_it_compiles_without_a_graph_break_and_not_again_for_every_seed(path):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def function(x, seed):
        return path(x, CORNERS, 5, seed) * 2

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    x = torch.randn(2, 1, 9, 8, 7, device=DEVICE)
    for seed in (4, 5, 2**50, -3):
        check_equal(compiled(x, seed), voxel_shuffle_ref(x, CORNERS, 5, seed) * 2)
    assert len(graphs) <= 2  # the second graph treats the seed as a variable


# ----------------------------------------------------------------------------------------- memory
@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape,corner", [((1, 3, 5, 7, 3), (1, 2, 0)), ((1, 1, 40, 41, 43), (20, 30, 35))]
)
def test_nothing_is_written_outside_the_output(layout, shape, corner):
    """The output is a part of a larger block of memory; the rest of it must not change."""
    x = torch.randn(shape, device=DEVICE).contiguous(memory_format=layout)
    pad = 256
    block = torch.full((x.numel() + 2 * pad,), 7.0, device=DEVICE)
    output = block[pad:-pad].as_strided(x.shape, x.stride(), pad)
    cubes = torch.tensor([[*corner, 99]], device=DEVICE)
    kernel, grid, arguments = _launch(x, output, cubes, 3, False)
    kernel[grid](**arguments)
    assert (block[:pad] == 7).all() and (block[-pad:] == 7).all()
    assert torch.equal(output.flatten().sort().values, x.flatten().sort().values)
    assert not torch.equal(output, x)


@needs_triton
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_strides_beyond_2_to_31(axis):
    """Views into one huge block of memory, of which the system provides only the pages in use."""
    far = 2**31 + 64
    block = torch.empty(2 * far + 4096, dtype=torch.uint8, device=DEVICE)
    shape = [1, 1, 3, 4, 5]
    shape[axis] = 3 if axis == 2 else 2
    strides = [60 * shape[1], 60, 20, 5, 1]
    strides[axis] = far
    x = block.as_strided(shape, strides)
    x.copy_(torch.randint(0, 256, shape, dtype=torch.uint8))
    corners = torch.tensor([[[0, 1, 1]]] * shape[0])
    expected = voxel_shuffle_ref(x.clone(), corners, 3, 5)
    assert torch.equal(voxel_shuffle_triton(x, corners, 3, 5), expected)


@needs_triton
def test_more_samples_than_the_third_axis_of_a_grid_has():
    x = torch.empty(2**16 + 3, 2, 4, 4, 4, device="meta")
    _, grid, _ = _launch(x, x, torch.empty(len(x), 4, dtype=torch.int64, device="meta"), 3, False)
    assert grid == (2 * len(x),)


class CountOps(TorchDispatchMode):
    """Counts the operations that PyTorch runs."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_the_host_does_not_work_longer_for_more_cubes(monkeypatch):
    module = sys.modules["kernels.voxel_shuffle"]
    monkeypatch.setattr(module, "_key", None)  # keys are made by the kernel
    counts = []
    for samples, cubes in ((1, 1), (3, 20)):
        x = torch.randn(samples, 1, 4, 4, 4, device=DEVICE)
        with CountOps() as ops:
            voxel_shuffle_triton(x, torch.zeros(samples, cubes, 3, dtype=torch.int64), 2, 1)
        counts.append(ops.count)
    assert counts[0] == counts[1]


@needs_triton
def test_a_batch_takes_one_launch_that_moves_each_element_once():
    if DEVICE != "cpu":
        pytest.skip("launches are counted in the interpreter")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from traffic import count_triton

    x = torch.randn(2, 2, 9, 8, 7)
    with count_triton() as counted:
        voxel_shuffle_triton(x, CORNERS, 5, 11)
    assert list(counted) == ["_shuffle_kernel"]
    traffic = counted["_shuffle_kernel"]
    assert traffic.launches == 1
    assert traffic.written == 4 * x.numel()
    assert 0 < traffic.read - 4 * x.numel() < 1000  # the rest: corners and keys of the cubes


def test_the_kernel_is_launched_on_the_gpu_of_x(monkeypatch):
    """Triton launches on the current GPU, which may be another one."""
    file, current, launched = sys.modules["kernels.voxel_shuffle"], [], []

    class Guard:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            current.append(self.tensor)

        def __exit__(self, *error):
            current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: launched.extend(current)

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr(file, "_launch", lambda *arguments: (Kernel(), (1,), {}))
    x = torch.zeros(1, 1, 4, 4, 4, device=DEVICE)
    voxel_shuffle_triton(x, torch.zeros(1, 1, 3, dtype=torch.int64), 4, 0)
    assert len(launched) == 1 and launched[0].data_ptr() == x.data_ptr()


# --------------------------------------------------------------------- adapters for other libraries
class Lambdad:
    """As MONAI's: func on data[key] of each key."""

    def __init__(self, keys, func):
        self.keys, self.func = keys, func

    def __call__(self, data):
        return data | {key: self.func(data[key]) for key in self.keys}


class Lambda:
    """As TorchIO's: function on the data of the images of a type."""

    def __init__(self, function, types_to_apply):
        assert types_to_apply == ["intensity"]
        self.function = function

    def __call__(self, tensor):
        return self.function(tensor)


def test_the_adapters_of_the_documentation(monkeypatch):
    """With MONAI's own transform where it is installed, else with one of the same form."""
    text = (ROOT / "docs" / "kernels.md").read_text()
    code = text.split("as a transform of MONAI or TorchIO")[1].split("```")[1]
    names: dict = {}
    monkeypatch.setitem(sys.modules, "voxel_shuffle", sys.modules["kernels.voxel_shuffle"])
    exec(code.removeprefix("python"), names)
    if importlib.util.find_spec("monai") is None:
        transforms = types.SimpleNamespace(Lambdad=Lambdad)
        monkeypatch.setitem(sys.modules, "monai", types.SimpleNamespace(transforms=transforms))
        monkeypatch.setitem(sys.modules, "monai.transforms", transforms)
    torchio = types.SimpleNamespace(INTENSITY="intensity", Lambda=Lambda)
    monkeypatch.setitem(sys.modules, "torchio", torchio)
    x = torch.arange(2.0 * 20 * 18 * 17).reshape(2, 20, 18, 17)
    torch.manual_seed(0)
    shuffled = [names["monai_transform"]()({"image": x})["image"], names["torchio_transform"]()(x)]
    assert not torch.equal(*shuffled)
    torch.manual_seed(0)
    assert torch.equal(names["shuffle_cubes"](x), shuffled[0])
    for y in shuffled:
        assert torch.equal(y[1] - y[0], torch.full_like(y[0], 20 * 18 * 17))
        moved = (y[0] != x[0]).nonzero()
        assert 4000 < len(moved) <= 16**3 and (moved.amax(0) - moved.amin(0) < 16).all()
