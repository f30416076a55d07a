# SPDX-License-Identifier: MIT, (c) 2026 the Mirror U-Net from scratch contributors
# Needs torch >= 2.8 and, for its kernels, triton >= 3.4; nothing else.
"""Voxel shuffling: random permutations of the voxels in cubes (the paper's self-supervision of CT).

The permutation is a *keyed bijection* of the cube's coordinates (i, j, k), each in [0, s): a
Feistel network over three words. Let h be a hash to 32-bit words, a different one in each of the
3 ROUNDS steps, keyed by seed, sample and cube:

    repeat ROUNDS times:   i <- i + h(j, k) mod s,  j <- j + h(k, i) mod s,  k <- k + h(i, j) mod s
    y[corner + (i0, j0, k0)] = x[corner + (i, j, k)]     (i0, j0, k0): coordinates before the steps

Why it is a permutation. A step changes one coordinate by an amount that depends on the other two,
which it leaves unchanged. So after the step h(j, k) is still known, and subtracting it gives i
back: the step has an inverse, for every h and every s (not only powers of two). So has a chain of
steps, undone from last to first. A map of a finite set with an inverse is a permutation: every
voxel is read exactly once. h only needs to look random. 32-bit integers wrap alike on every device,
so CPU and GPU give the same bits. Nothing is stored: a table of random indices would cost 8 s^3
bytes per cube to write, and as many to read.

Overlapping cubes. The cubes of a sample are shuffled one after the other, which is again a
permutation of the volume. One pass does all of them: it follows each voxel p of y back through the
cubes, from last to first (the inverse: from first to last, with the inverse steps). If p is in a
cube, it moves to its source there. x is read at the end:

    for n = N-1 .. 0:   if p in cube n:   p <- corner_n + permute_n(p - corner_n)
    y[start] = x[p]

Backward. y = P x with a permutation matrix P, so dx = P^T dy = P^-1 dy: the inverse shuffle of dy.
Only corners and seeds are saved.

Bytes. Each element is read once and written once, 8 bytes per element in float32, forward and
backward alike; no out-of-place copy moves less. Elements are moved as integers of their size, so
every dtype is exact. Plain PyTorch launches about 300 small kernels per cube.

Layout. A program handles BLOCK elements that are adjacent in memory, whichever axis is fastest:

    NCDHW             one channel of one sample, D H W elements:   v v v v | v v v v | ...
    channels_last_3d  one sample, D H W C elements:                c c v' c | c v'' c c | ...
                      (v: a voxel; c: a voxel's channels, then those of the next, v', v'', ...)

Blocks that no cube touches, nearly all of them, are copied with 128-bit loads and stores. The
others compute each voxel's source and gather: the stores stay wide, the loads are random. A strided
view (`DENSE` false) is read through its strides, not copied beforehand, and y has x's layout.
"""

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows
    triton = None

ROUNDS = 4
_MASK = 0xFFFFFFFF  # int64 tensors hold the 32-bit words
# Bytes per program: 16, the widest access, per thread of 4 warps of 64 (AMD), 32 for warps of 32;
# half as many for 1-byte elements, to save registers. The interpreter takes its time per program.
_BYTES = 2**18 if os.environ.get("TRITON_INTERPRET") == "1" else 4096
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _mix(h: Tensor | int) -> Tensor | int:
    """MurmurHash3's finalizer: a bijection of 32-bit words; each bit depends on all input bits."""
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


def _checked(x: Tensor, corners: Tensor, seeds: Tensor, size: int) -> Tensor:
    """Corners (B, N, 3) as int64, all checked; on a GPU moved into the volume, without waiting."""
    b, volume = len(x), x.shape[2:]
    if corners.dim() != 3 or corners.shape[0] != b or corners.shape[2] != 3:
        raise ValueError(f"corners: expected ({b}, N, 3), got {tuple(corners.shape)}")
    if seeds.shape != (b,):
        raise ValueError(f"seed: expected one integer or one per sample, got {tuple(seeds.shape)}")
    corners = corners.long()
    room = [side - size for side in volume]
    if corners.device.type != "cpu" and min(size - 1, *room) >= 0:
        return torch.stack([corners[..., i].clamp(0, room[i]) for i in range(3)], -1)
    for corner in corners.flatten(0, 1).tolist():
        if size < 1 or not all(0 <= c <= limit for c, limit in zip(corner, room)):
            outside = f"not inside the volume {tuple(volume)}"
            raise ValueError(f"cube at {corner}, side {size}: {outside}")
    return corners


def _key(seed: int, cube: int) -> int:
    """The 32-bit key of one cube of one sample, from the sample's seed."""
    low, high = _mix(seed & _MASK), _mix(((seed >> 32) & _MASK) ^ 0x5BD1E995)
    return _mix((low + high + 0x632BE5AB * (cube + 1)) & _MASK)


def _seeds(x: Tensor, seed: int | list[int] | Tensor) -> Tensor:
    """(B,) int64: one per sample. Longer integers keep their low 64 bits."""
    if isinstance(seed, Tensor):
        return seed
    seeds = [seed + b for b in range(len(x))] if isinstance(seed, int) else seed
    return torch.tensor([(int(s) + 2**63) % 2**64 - 2**63 for s in seeds], dtype=torch.int64)


def voxel_shuffle_ref(
    x: Tensor, corners: Tensor, size: int, seed: int | list[int] | Tensor, inverse: bool = False
) -> Tensor:
    """Shuffle the voxels in cubes: the definition in plain PyTorch, differentiated by autograd.

    Args:
        x: (B, C, D, H, W), any dtype; all channels of a sample get the same permutation.
        corners: (B, N, 3) integers: the lowest voxel of each cube. Corners on a GPU are not checked
            by the Triton path, which would have to wait, but moved into the volume.
        size: side of the cubes in voxels.
        seed: the key: an integer (sample b uses seed + b) or (B,) integers, one per sample.
        inverse: undo the shuffle with the same arguments.

    Returns a new tensor like x. Raises ValueError if a cube is not inside the volume.
    """
    corners, seeds = torch.as_tensor(corners).cpu(), _seeds(x, seed)
    corners = _checked(x, corners, seeds, size).tolist()
    y = x.clone()  # keeps the layout
    for b, sample_seed in enumerate(seeds.tolist()):
        cubes = list(enumerate(corners[b]))
        for n, (d, h, w) in reversed(cubes) if inverse else cubes:
            key = torch.tensor(_key(sample_seed, n), device=x.device)
            i, j, k = _permute(size, key, inverse)
            cube = y[b, :, d : d + size, h : h + size, w : w + size]  # (C, size, size, size)
            cube.copy_(cube[:, i, j, k])
    return y


if triton is not None:

    @triton.jit
    def _mix_word(h):
        """`_mix` in uint32, which wraps around without masks."""
        h = (h ^ (h >> 16)) * 0x85EBCA6B
        h = (h ^ (h >> 13)) * 0xC2B2AE35
        return h ^ (h >> 16)

    @triton.jit
    def _step(a, p, q, key, number: tl.constexpr, SIZE: tl.constexpr, INVERSE: tl.constexpr):
        """a + h(p, q) mod SIZE, or a - h(p, q); all uint32. h is reduced first: no overflow."""
        h = _mix_word(_mix_word(p * 0x9E3779B1 + q + key) ^ number) % SIZE
        return (a + (SIZE - h if INVERSE else h)) % SIZE

    @triton.jit
    def _offsets(c, d, h, w, strides):
        offsets = c.to(tl.int64) * strides[1] + d.to(tl.int64) * strides[2]
        return offsets + h.to(tl.int64) * strides[3] + w.to(tl.int64) * strides[4]

    @triton.jit
    def _shuffle_kernel(
        x, y,  # (B, C, D, H, W)
        cubes,  # (B, 3 N + 1) int64: corners d, h, w of all cubes, then the seed
        N, H, W, run,  # run: the number of elements adjacent in memory, D H W INNER
        runs, blocks,  # runs per sample, blocks per run
        x_strides, y_strides,  # of b, c, d, h, w
        INNER: tl.constexpr,  # channels that are adjacent: C in channels_last_3d, else 1
        DENSE: tl.constexpr,  # x and y are laid out as the runs are
        WIDE: tl.constexpr,  # a run of 2^31 elements or more
        SIZE: tl.constexpr, INVERSE: tl.constexpr, BLOCK: tl.constexpr,
        ROUNDS: tl.constexpr = ROUNDS,
    ):
        block = tl.program_id(0) % blocks
        index = tl.program_id(0) // blocks
        b = (index // runs).to(tl.int64)
        x += b * x_strides[0]
        y += b * y_strides[0]
        if INNER == 1:  # one run per channel
            x += (index % runs).to(tl.int64) * x_strides[1]
            y += (index % runs).to(tl.int64) * y_strides[1]
        cubes += b * (3 * N + 1)
        start = (block.to(tl.int64) if WIDE else block) * BLOCK
        m = start + tl.arange(0, BLOCK)  # (BLOCK,) index in the run
        mask = m < run

        # Does any cube touch this block? Its first and last voxel tell, by their slices d and, if
        # these are the same, their rows h.
        row0 = start // INNER // W
        row1 = (tl.minimum(start + BLOCK, run) - 1) // INNER // W
        d0, d1 = row0 // H, row1 // H
        near = d0 < 0  # no
        for n in range(N):
            d, h = tl.load(cubes + 3 * n), tl.load(cubes + 3 * n + 1)
            rows = (d0 != d1) | (row1 - d0 * H >= h) & (row0 - d0 * H < h + SIZE)
            near = near | ((d1 >= d) & (d0 < d + SIZE) & rows)

        if DENSE and not near:
            tl.store(y + m, tl.load(x + m, mask=mask, other=0), mask=mask)
        else:
            v, c = m // INNER, m % INNER
            d, h, w = (v // W // H).to(tl.int32), (v // W % H).to(tl.int32), (v % W).to(tl.int32)
            target = m if DENSE else _offsets(c, d, h, w, y_strides)
            seed = tl.load(cubes + 3 * N)
            low = _mix_word(seed.to(tl.uint32))
            high = _mix_word((seed >> 32).to(tl.uint32) ^ 0x5BD1E995)
            for step in range(N):
                n = step if INVERSE else N - 1 - step
                d_n = tl.load(cubes + 3 * n).to(tl.int32)
                h_n = tl.load(cubes + 3 * n + 1).to(tl.int32)
                w_n = tl.load(cubes + 3 * n + 2).to(tl.int32)
                key = _mix_word(low + high + 0x632BE5AB * tl.cast(n + 1, tl.uint32))  # `_key`
                # Unsigned: coordinates below the corner become huge; one comparison per axis.
                i, j, k = (d - d_n).to(tl.uint32), (h - h_n).to(tl.uint32), (w - w_n).to(tl.uint32)
                in_cube = (i < SIZE) & (j < SIZE) & (k < SIZE)
                for r in tl.static_range(ROUNDS):
                    if INVERSE:
                        k = _step(k, i, j, key, 3 * (ROUNDS - 1 - r) + 2, SIZE, INVERSE)
                        j = _step(j, k, i, key, 3 * (ROUNDS - 1 - r) + 1, SIZE, INVERSE)
                        i = _step(i, j, k, key, 3 * (ROUNDS - 1 - r), SIZE, INVERSE)
                    else:
                        i = _step(i, j, k, key, 3 * r, SIZE, INVERSE)
                        j = _step(j, k, i, key, 3 * r + 1, SIZE, INVERSE)
                        k = _step(k, i, j, key, 3 * r + 2, SIZE, INVERSE)
                d = tl.where(in_cube, d_n + i.to(tl.int32), d)
                h = tl.where(in_cube, h_n + j.to(tl.int32), h)
                w = tl.where(in_cube, w_n + k.to(tl.int32), w)
            source = _offsets(c, d, h, w, x_strides)
            tl.store(y + target, tl.load(x + source, mask=mask, other=0), mask=mask)


def _launch(x: Tensor, y: Tensor, cubes: Tensor, size: int, inverse: bool) -> tuple:
    """(kernel, grid, arguments) that shuffle x into y."""
    batch, channels, depth, height, width = x.shape
    channels_last = y.stride(1) == 1 and y.is_contiguous(memory_format=torch.channels_last_3d)
    inner = channels if channels_last else 1
    voxel = (height * width * inner, width * inner, inner)  # strides (d, h, w) in a run
    run = depth * voxel[0]
    dense = inner == 1 or x.stride(1) == 1
    for axis, stride in zip((2, 3, 4), voxel):  # the stride of an axis of length 1 means nothing
        dense &= all(t.stride(axis) == stride or t.shape[axis] == 1 for t in (x, y))
    word = _WORDS[x.element_size()]
    block = min(_BYTES // max(x.element_size(), 2), triton.next_power_of_2(run))
    runs, blocks = channels // inner, triton.cdiv(run, block)
    arguments = {"x": x.view(word), "y": y.view(word), "cubes": cubes, "N": cubes.shape[1] // 3}
    arguments |= {"H": height, "W": width, "run": run, "INNER": inner, "DENSE": dense}
    arguments |= {"runs": runs, "blocks": blocks, "x_strides": x.stride(), "y_strides": y.stride()}
    arguments |= {"SIZE": size, "INVERSE": inverse, "WIDE": run + block > 2**31, "BLOCK": block}
    return _shuffle_kernel, (blocks * runs * batch,), arguments


@torch.library.custom_op("mirror_unet::voxel_shuffle", mutates_args=())
def _shuffle(
    x: Tensor, corners: Tensor, seeds: Tensor, size: int, inverse: bool, use_triton: bool
) -> Tensor:
    """The shuffle as an op for autograd and torch.compile."""
    if not use_triton:
        return voxel_shuffle_ref(x, corners, size, seeds, inverse)
    parts = [_checked(x, corners, seeds, size).flatten(1), seeds.long()[:, None]]
    if corners.device != seeds.device:
        parts = [part.to(x.device, non_blocking=True) for part in parts]
    cubes = torch.cat(parts, 1).to(x.device, non_blocking=True)
    y = torch.empty_like(x)
    if x.numel():
        kernel, grid, arguments = _launch(x, y, cubes, size, inverse)
        with torch.cuda.device_of(x):  # Triton launches on the current GPU
            kernel[grid](**arguments)
    return y


def _save(ctx, inputs, output):
    _, corners, seeds, ctx.size, ctx.inverse, ctx.use_triton = inputs
    ctx.save_for_backward(corners, seeds)


def _backward(ctx, grad_output):
    options = (ctx.size, not ctx.inverse, ctx.use_triton)
    return _shuffle(grad_output, *ctx.saved_tensors, *options), None, None, None, None, None


_shuffle.register_fake(lambda x, *_: torch.empty_like(x))
_shuffle.register_autograd(_backward, setup_context=_save)


def voxel_shuffle_plain(x, corners, size, seed, inverse=False) -> Tensor:
    """`voxel_shuffle_ref` with the inverse shuffle as its gradient, on any device."""
    return _shuffle(x, torch.as_tensor(corners), _seeds(x, seed), size, inverse, False)


def voxel_shuffle_triton(x, corners, size, seed, inverse=False) -> Tensor:
    """`voxel_shuffle_ref` as one Triton launch, the same bits; on a GPU, or in the interpreter."""
    return _shuffle(x, torch.as_tensor(corners), _seeds(x, seed), size, inverse, True)


def voxel_shuffle(x, corners, size, seed, inverse=False) -> Tensor:
    """`voxel_shuffle_ref` by the path that fits x's device: a GPU's kernel, or plain PyTorch."""
    use_triton = x.is_cuda and triton is not None
    return _shuffle(x, torch.as_tensor(corners), _seeds(x, seed), size, inverse, use_triton)
