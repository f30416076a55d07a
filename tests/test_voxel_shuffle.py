"""voxel_shuffle: a permutation inside its cubes, keyed, random-looking, undone by its inverse."""

import sys

import pytest
import torch
from conftest import DEVICE, ROOT

import kernels
from kernels.voxel_shuffle import _launch, voxel_shuffle_plain, voxel_shuffle_ref, voxel_shuffle_triton

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


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


# ------------------------------------------------------------------------------------------------------------------- Triton
CORNERS = torch.tensor([[[0, 0, 0], [3, 2, 1], [2, 2, 2]], [[1, 0, 2], [1, 0, 2], [3, 2, 0]]])  # overlapping, and one twice
PATHS = [voxel_shuffle_plain, voxel_shuffle_triton]

VIEWS = {
    "NCDHW": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "a channel of two": lambda x: x[:, 1:2],
    "a channel of two, channels_last": lambda x: x.contiguous(memory_format=torch.channels_last_3d)[:, 1:2],
    "cropped": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 1, 2, 2))[:, :, 2:-2, 3:-1, 1:-2],
    "cropped channels_last": lambda x: VIEWS["cropped"](x.contiguous(memory_format=torch.channels_last_3d)),
    "expanded over samples": lambda x: x[:1].expand(2, -1, -1, -1, -1),
    "expanded over voxels": lambda x: x[:, :, :1, :, :1].expand(x.shape),
    "transposed": lambda x: x.transpose(2, 4).contiguous().transpose(2, 4),
    "every second row": lambda x: x.repeat_interleave(2, 3)[:, :, :, ::2],
    "samples inside channels": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


def exact(found, expected):
    assert found.dtype == expected.dtype and found.stride() == expected.stride()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_triton_gives_the_plain_bits_on_any_view(view, inverse):
    x = VIEWS[view](torch.randn(2, 2, 9, 8, 7, device=DEVICE))
    before = x.clone()
    expected = voxel_shuffle_ref(x, CORNERS, 5, 11, inverse)
    assert not torch.equal(expected, x)  # it does shuffle
    for path in PATHS:
        exact(path(x, CORNERS, 5, 11, inverse), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool])
def test_triton_moves_any_dtype_untouched(dtype):
    x = (torch.randn(2, 1, 9, 8, 7, device=DEVICE) * 50).to(dtype)
    if dtype.is_floating_point:
        x[0, 0, 1, 1, :3] = torch.tensor([float("nan"), float("inf"), -0.0], dtype=dtype, device=DEVICE)
    words = {1: torch.uint8, 2: torch.int16, 8: torch.int64}[x.element_size()]
    for path in PATHS:
        exact(path(x, CORNERS, 5, 3).view(words), voxel_shuffle_ref(x.view(words), CORNERS, 5, 3))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("seed", [-1, [2**63, -(2**62)], torch.tensor([3, -7])])
def test_triton_gives_the_plain_bits_for_any_key_and_size(size, seed):
    x = torch.arange(2.0 * 11 * 10 * 9, device=DEVICE).reshape(2, 1, 11, 10, 9)
    corners = CORNERS.clamp(max=1)
    shuffled = voxel_shuffle_triton(x, corners, size, seed)
    exact(shuffled, voxel_shuffle_ref(x, corners, size, seed))
    exact(voxel_shuffle_triton(shuffled, corners, size, seed, inverse=True), x)


def test_the_low_64_bits_of_a_seed_count():
    x = torch.arange(512.0, device=DEVICE).reshape(1, 1, 8, 8, 8)
    corner = torch.zeros(1, 1, 3, dtype=torch.int64)
    for path in PATHS:
        assert torch.equal(path(x, corner, 8, 2**64 + 5), path(x, corner, 8, 5))
        assert not torch.equal(path(x, corner, 8, 2**63), path(x, corner, 8, 5))


@pytest.mark.parametrize("path", PATHS)
def test_no_cube_no_voxel_no_sample(path):
    x = torch.randn(2, 1, 3, 3, 3, device=DEVICE)
    copy = path(x, torch.zeros(2, 0, 3, dtype=torch.int64), 2, 0)
    assert torch.equal(copy, x) and copy.data_ptr() != x.data_ptr()
    assert path(x[:0], torch.zeros(0, 1, 3, dtype=torch.int64), 2, 0).shape == (0, 1, 3, 3, 3)


@pytest.mark.parametrize("path", PATHS)
def test_what_does_not_fit_is_refused(path):
    x = torch.zeros(1, 1, 8, 8, 8, device=DEVICE)
    for corners in ([[[1, 0, 0]]], [[[0, 0, -1]]]):
        with pytest.raises(ValueError, match="inside the volume"):
            path(x, torch.tensor(corners), 8, 0)
    with pytest.raises(ValueError, match="one a sample"):
        path(x, torch.zeros(1, 1, 3, dtype=torch.int64), 8, torch.tensor([1, 2]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_is_the_inverse_shuffle(path, layout):
    x = torch.randn(2, 2, 9, 8, 7, device=DEVICE).contiguous(memory_format=layout).requires_grad_()
    y = path(x, CORNERS, 5, 11)
    gradients = {"plain": torch.randn_like(y), "expanded": torch.ones((), device=DEVICE).expand(y.shape)}
    gradients["sliced"] = torch.randn(2, 4, 9, 8, 7, device=DEVICE)[:, ::2]
    for name, dy in gradients.items():
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        assert torch.equal(dx, voxel_shuffle_ref(dy, CORNERS, 5, 11, inverse=True)), name
        (by_autograd,) = torch.autograd.grad(voxel_shuffle_ref(x, CORNERS, 5, 11), x, dy)
        assert torch.equal(dx, by_autograd), name


@pytest.mark.parametrize("path", [*PATHS, voxel_shuffle_ref])
def test_gradcheck(path):
    x = torch.randn(1, 1, 3, 2, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    corners = torch.tensor([[[0, 0, 0], [1, 0, 0]]])
    assert torch.autograd.gradcheck(lambda x: path(x, corners, 2, 5), x)
    assert torch.autograd.gradgradcheck(lambda x: path(x, corners, 2, 5).square(), x, fast_mode=True)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(kernel, layout):
    x = torch.randn(2, 2, 4, 3, 3, device=DEVICE).contiguous(memory_format=layout).requires_grad_()
    corners = torch.tensor([[[0, 0, 0], [1, 0, 0]], [[1, 0, 0], [0, 0, 0]]])
    torch.library.opcheck(torch.ops.mirror_unet.voxel_shuffle, (x, corners, torch.tensor([1, 2]), 3, False, kernel))
    torch.library.opcheck(torch.ops.mirror_unet.voxel_shuffle, (x.detach()[:, :1], corners, torch.tensor([1, 2]), 3, True, kernel))


@pytest.mark.parametrize("path", PATHS)
def test_compiles_without_a_break_and_not_anew_for_every_seed(path):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x, seed: path(x, CORNERS, 5, seed) * 2, fullgraph=True, backend=backend)
    x = torch.randn(2, 1, 9, 8, 7, device=DEVICE)
    for seed in (4, 5, 6, 2**50, -3):
        exact(compiled(x, seed), voxel_shuffle_ref(x, CORNERS, 5, seed) * 2)
    assert len(graphs) <= 2  # the second treats the seed as a variable


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape,corner", [((1, 3, 5, 7, 3), (1, 2, 0)), ((1, 1, 40, 41, 43), (20, 30, 35))])
def test_nothing_is_written_outside_the_output(layout, shape, corner, monkeypatch):
    """The output is cut from a larger block of memory whose other cells must stay as they are."""
    x = torch.randn(shape, device=DEVICE).contiguous(memory_format=layout)
    canary, pad = torch.full((x.numel() + 512,), 7.0, device=DEVICE), 256
    inside = canary[pad:-pad].as_strided(x.shape, x.stride(), pad)
    monkeypatch.setattr(torch, "empty_like", lambda t: inside)
    _launch(x, torch.tensor([[[*corner, 99]]], device=DEVICE), 3, False)
    assert (canary[:pad] == 7).all() and (canary[-pad:] == 7).all()
    monkeypatch.undo()
    assert torch.equal(inside.flatten().sort().values, x.flatten().sort().values)


def test_samples_channels_and_slices_further_apart_than_2_to_31():
    """Views of one huge block of memory, of which only the pages in use are ever committed."""
    far, room = 2**31 + 64, torch.empty(2 * (2**31 + 64) + 4096, dtype=torch.uint8, device=DEVICE)
    for axis in (0, 1, 2):
        shape = [1, 1, 3, 4, 5]
        shape[axis] = 3 if axis == 2 else 2
        strides = [60 * shape[1], 60, 20, 5, 1]
        strides[axis] = far
        x = room.as_strided(shape, strides)
        x.copy_(torch.randint(0, 256, shape, dtype=torch.uint8))
        corners = torch.tensor([[[0, 1, 1]]] * shape[0])
        assert torch.equal(voxel_shuffle_triton(x, corners, 3, 5), voxel_shuffle_ref(x.clone(), corners, 3, 5))


def test_one_launch_a_batch():
    if DEVICE != "cpu":
        pytest.skip("launches are counted in the interpreter")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from traffic import count_triton

    x = torch.randn(2, 2, 9, 8, 7)
    with count_triton() as counted:
        voxel_shuffle_triton(x, CORNERS, 5, 11)
    assert counted["_shuffle_kernel"].launches == len(counted) == 1
    assert counted["_shuffle_kernel"].written == 4 * x.numel()  # and each element is read once, plus the cubes
    assert 0 < counted["_shuffle_kernel"].read - 4 * x.numel() < 1000
