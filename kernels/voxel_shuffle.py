"""Voxel shuffling: inside a cube, the voxels are permuted at random (the paper's self-supervision of the CT input).

The permutation is a *keyed bijection* on the cube's coordinates (i, j, k), each in [0, s): a Feistel network whose rounds add a
hash of two coordinates to the third, modulo s. A round is undone by subtracting the same hash, so every key gives a
permutation; nothing is stored, any s works, and 32-bit integer arithmetic gives the same bits on every device.

    repeat ROUNDS times:   i <- i + h(j, k) mod s;   j <- j + h(k, i) mod s;   k <- k + h(i, j) mod s
    y[corner + (i0, j0, k0)] = x[corner + (i, j, k)]

Cubes of one sample are shuffled one after the other, so that overlapping cubes still make a permutation of the volume.
"""

import torch
from torch import Tensor

ROUNDS = 4
_MASK = 0xFFFFFFFF  # int64 tensors hold the 32-bit words


def _mix(h: Tensor) -> Tensor:
    """MurmurHash3's finalizer: a bijection of 32-bit words in which each input bit reaches every output bit."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)


def _permute(size: int, key: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Source coordinates of every voxel of a cube: three (size, size, size) int64 tensors."""
    ijk = list(torch.meshgrid(*[torch.arange(size, device=key.device)] * 3, indexing="ij"))
    steps = [(r, a) for r in range(ROUNDS) for a in range(3)]
    for r, a in reversed(steps) if inverse else steps:
        p, q = ijk[(a + 1) % 3], ijk[(a + 2) % 3]
        h = _mix(_mix((p * 0x9E3779B1 + q + key) & _MASK) ^ (3 * r + a))
        ijk[a] = (ijk[a] - h if inverse else ijk[a] + h) % size
    return tuple(ijk)


def cube_key(seed: int, cube: int) -> Tensor:
    """The 32-bit key of one cube of one sample, from the sample's seed (any integer)."""
    low, high = torch.tensor(seed & _MASK), torch.tensor((seed >> 32) & _MASK)
    return _mix((_mix(low) + _mix(high ^ 0x5BD1E995) + 0x632BE5AB * (cube + 1)) & _MASK)


def voxel_shuffle_ref(x: Tensor, corners: Tensor, size: int, seed: int | Tensor, inverse: bool = False) -> Tensor:
    """Shuffle the voxels inside cubes, in plain PyTorch, on any device.

    Args:
        x: (B, C, D, H, W); all channels of a sample get the same permutation.
        corners: (B, N, 3) integers, the lowest voxel of each cube; cubes must lie inside the volume.
        size: side of the cubes in voxels.
        seed: the permutation's key: an integer (sample b uses seed + b) or (B,) integers, one a sample.
        inverse: undo the shuffle of the same arguments.

    Returns a tensor of x's shape, dtype and layout; x is left as it is. Raises ValueError for cubes outside the volume.
    """
    corners = torch.as_tensor(corners).to("cpu", torch.int64)
    room = torch.tensor(x.shape[2:]) - size
    if corners.dim() != 3 or corners.shape[0] != len(x) or corners.shape[2] != 3:
        raise ValueError(f"corners: expected ({len(x)}, N, 3), got {tuple(corners.shape)}")
    if size < 1 or (corners < 0).any() or (corners > room).any():
        raise ValueError(f"cubes of side {size} at {corners.tolist()} do not lie inside the volume {tuple(x.shape[2:])}")
    seeds = [seed + b for b in range(len(x))] if isinstance(seed, int) else [int(s) for s in seed]
    y = x.clone()  # keeps the layout
    cubes = range(corners.shape[1])
    for b in range(len(x)):
        for n in reversed(cubes) if inverse else cubes:
            i, j, k = _permute(size, cube_key(seeds[b], n).to(x.device), inverse)
            d, h, w = corners[b, n].tolist()
            cube = y[b, :, d : d + size, h : h + size, w : w + size]
            cube.copy_(cube[:, i, j, k])
    return y


voxel_shuffle_plain = voxel_shuffle_triton = voxel_shuffle_ref
