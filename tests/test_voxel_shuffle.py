"""voxel_shuffle: a permutation inside its cubes, keyed, random-looking, undone by its inverse."""

import pytest
import torch

import kernels

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
