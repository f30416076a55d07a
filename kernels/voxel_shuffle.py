"""Voxel shuffling: inside a cube, the voxels are permuted at random (the paper's self-supervision of the CT input).

The permutation is a *keyed bijection* on the cube's coordinates (i, j, k), each in [0, s): a Feistel network over three words.
With h a hash into 32-bit words, another one in each of the 3 ROUNDS steps, keyed by seed, sample and cube:

    repeat ROUNDS times:   i <- i + h(j, k) mod s;   j <- j + h(k, i) mod s;   k <- k + h(i, j) mod s
    y[corner + (i0, j0, k0)] = x[corner + (i, j, k)]        (i0, j0, k0) the coordinates before the steps, (i, j, k) after them

Why it is a permutation. A step changes one coordinate by an amount that the other two decide, and leaves those two alone. So whoever
sees the result knows j and k, hence h(j, k), and gets i back by subtracting: the step has an inverse, whatever h is and whatever s is
(no power of two needed), and so has a chain of steps, undone from the last to the first. A map of a finite set with an inverse is a
permutation: every voxel is read exactly once. h need only look random; 32-bit integers wrap alike on every device, so CPU and GPU
give the same bits. Nothing is stored: a table of random indices would cost 8 s^3 bytes a cube to write and as many to read.

Overlapping cubes. A sample's cubes are shuffled one after the other, which is again a permutation of the volume. One pass over the
volume does all of them: the voxel that ends at p came, in the last cube, from its source there; that one came, in the cube before,
from ... So a voxel walks through the cubes from last to first, moves where it lies inside, and x is read once, where the walk ends:

    for n = N-1 .. 0:   if p in cube n:   p <- corner_n + permute_n(p - corner_n)                y[start] = x[p]

The inverse walks from first to last with the inverse steps.

Backward. y = P x with a permutation matrix P, so dx = P^T dy = P^-1 dy: the inverse shuffle of dy. Only corners and seeds are kept.

Bytes. Each element is read once and written once, 8 bytes an element in float32, forward and backward alike; no copy out of place moves
fewer. Elements are moved as integers of their size, so every dtype is exact. Plain PyTorch launches about 300 small kernels a cube.

Layout. A program takes BLOCK elements that lie side by side in memory, whichever axis is the fastest:

    NCDHW             one channel of one sample, D H W elements:     v v v v | v v v v | ...         v: voxel, c: channel
    channels_last_3d  one sample, D H W C elements:                  c c v' c | c v'' c c | ...      a voxel's C channels, then the next's

Blocks that come near no cube, nearly all of them, are copied with 128-bit loads and stores; the others work out where each voxel came
from and gather: the stores stay wide, the loads are as random as the permutation. A strided view (`DENSE` false) is read
through its strides. Nothing is copied beforehand, and y has x's layout.
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
# Bytes a program: 16, the widest access, for each thread of 4 warps of 64 (AMD), and twice that for warps of 32; of 1-byte elements half
# as many, for want of registers. In the interpreter a program's cost hardly depends on its size.
_BYTES = 2**18 if os.environ.get("TRITON_INTERPRET") == "1" else 4096
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _mix(h: Tensor | int) -> Tensor | int:
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


def _cubes(x: Tensor, corners: Tensor, seeds: Tensor, size: int) -> Tensor:
    """(B, N, 4) int64 on the CPU: corner and 32-bit key of every cube; ValueError if one does not fit."""
    # Checked on the host, where corners are drawn anyway. Corners on the GPU cost a synchronisation here.
    corners, seeds = corners.to("cpu", torch.int64), seeds.to("cpu", torch.int64)
    if corners.dim() != 3 or corners.shape[0] != len(x) or corners.shape[2] != 3:
        raise ValueError(f"corners: expected ({len(x)}, N, 3), got {tuple(corners.shape)}")
    if seeds.shape != (len(x),):
        raise ValueError(f"seed: expected an integer or {len(x)} of them, one a sample, got shape {tuple(seeds.shape)}")
    if size < 1 or not all(0 <= a <= n - size for cs in corners.tolist() for c in cs for a, n in zip(c, x.shape[2:])):
        raise ValueError(f"cubes of side {size} at {corners.tolist()} do not lie inside the volume {tuple(x.shape[2:])}")
    table = [[(*corner, _key(s, n)) for n, corner in enumerate(cs)] for s, cs in zip(seeds.tolist(), corners.tolist())]
    return torch.tensor(table, dtype=torch.int64).view(*corners.shape[:2], 4)


def _key(seed: int, cube: int) -> int:
    """The 32-bit key of one cube of one sample, from the sample's seed."""
    return _mix((_mix(seed & _MASK) + _mix(((seed >> 32) & _MASK) ^ 0x5BD1E995) + 0x632BE5AB * (cube + 1)) & _MASK)


def _seeds(x: Tensor, seed: int | list[int] | Tensor) -> Tensor:
    """(B,) int64: one a sample, of which longer integers keep the low 64 bits."""
    if isinstance(seed, Tensor):
        return seed
    if isinstance(seed, int):
        return torch.arange(len(x)) + _low_64(seed)
    return torch.tensor([_low_64(s) for s in seed], dtype=torch.int64)


def _low_64(seed: int) -> int:
    return seed if -(2**63) <= seed < 2**63 else (seed + 2**63) % 2**64 - 2**63


def voxel_shuffle_ref(x: Tensor, corners: Tensor, size: int, seed: int | list[int] | Tensor, inverse: bool = False) -> Tensor:
    """Shuffle the voxels inside cubes: the definition, in plain PyTorch, on any device, differentiated by autograd.

    Args:
        x: (B, C, D, H, W), any dtype; all channels of a sample get the same permutation.
        corners: (B, N, 3) integers, the lowest voxel of each cube; cubes must lie inside the volume. Best kept on the CPU.
        size: side of the cubes in voxels.
        seed: the permutation's key: an integer (sample b uses seed + b) or (B,) integers, one a sample.
        inverse: undo the shuffle of the same arguments.

    Returns a tensor of x's shape, dtype and layout; x is left as it is. Raises ValueError for cubes outside the volume.
    """
    cubes = _cubes(x, torch.as_tensor(corners), _seeds(x, seed), size)
    y = x.clone()  # keeps the layout
    order = range(cubes.shape[1])
    for b in range(len(x)):
        for n in reversed(order) if inverse else order:
            d, h, w, key = cubes[b, n].tolist()
            i, j, k = _permute(size, torch.tensor(key, device=x.device), inverse)
            cube = y[b, :, d : d + size, h : h + size, w : w + size]
            cube.copy_(cube[:, i, j, k])
    return y


if triton is not None:

    @triton.jit
    def _mix_word(h):
        """`_mix` in uint32, where the masks are the hardware's wrap-around."""
        h = (h ^ (h >> 16)) * 0x85EBCA6B
        h = (h ^ (h >> 13)) * 0xC2B2AE35
        return h ^ (h >> 16)

    @triton.jit
    def _step(a, p, q, key, number: tl.constexpr, SIZE: tl.constexpr, INVERSE: tl.constexpr):
        """a + h(p, q) mod SIZE, or a - h(p, q); all uint32. h is reduced first, so that the sum cannot wrap."""
        h = _mix_word(_mix_word(p * 0x9E3779B1 + q + key) ^ number) % SIZE
        return (a + (SIZE - h if INVERSE else h)) % SIZE

    @triton.jit
    def _shuffle_kernel(
        x,  # (B, C, D, H, W), the strides below
        y,  # the same shape
        cubes,  # (B, N, 4) int64: corner d, h, w and key
        N,
        H,
        W,
        run,  # elements that lie side by side: D H W INNER
        xb, xc, xd, xh, xw, yb, yc, yd, yh, yw,
        INNER: tl.constexpr,  # channels that lie inside a voxel: C in channels_last_3d, else 1
        SIZE: tl.constexpr,
        INVERSE: tl.constexpr,
        DENSE: tl.constexpr,  # x and y lie in memory as the runs do
        WIDE: tl.constexpr,  # a run of 2^31 elements or more
        BLOCK: tl.constexpr,
        ROUNDS: tl.constexpr = ROUNDS,
    ):  # fmt: skip
        b = tl.program_id(2).to(tl.int64)
        x, y = x + b * xb, y + b * yb
        if INNER == 1:  # a run a channel
            outer = tl.program_id(1).to(tl.int64)
            x, y = x + outer * xc, y + outer * yc
        cubes += b * N * 4
        block = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
        start = block * BLOCK
        m = start + tl.arange(0, BLOCK)  # (BLOCK,) place in the run
        mask = m < run

        # Does any cube come near this block? Its first and last voxel tell: their slices d, and within one slice their rows h.
        row0, row1 = start // INNER // W, (tl.minimum(start + BLOCK, run) - 1) // INNER // W
        d0, d1 = row0 // H, row1 // H
        near = d0 < 0  # no
        for n in range(N):
            d, h = tl.load(cubes + 4 * n), tl.load(cubes + 4 * n + 1)
            rows = (d0 != d1) | (row1 - d0 * H >= h) & (row0 - d0 * H < h + SIZE)
            near = near | ((d1 >= d) & (d0 < d + SIZE) & rows)

        if DENSE and not near:
            tl.store(y + m, tl.load(x + m, mask=mask, other=0), mask=mask)
        else:
            v, c = m // INNER, m % INNER
            d, h, w = (v // W // H).to(tl.int32), (v // W % H).to(tl.int32), (v % W).to(tl.int32)
            place = m if DENSE else c.to(tl.int64) * yc + d.to(tl.int64) * yd + h.to(tl.int64) * yh + w.to(tl.int64) * yw
            for step in range(N):
                cube = cubes + 4 * (step if INVERSE else N - 1 - step)
                d_n, h_n, w_n = tl.load(cube).to(tl.int32), tl.load(cube + 1).to(tl.int32), tl.load(cube + 2).to(tl.int32)
                key = tl.load(cube + 3).to(tl.uint32)
                # As unsigned words, what lies below the corner is far above it: one comparison an axis.
                i, j, k = (d - d_n).to(tl.uint32), (h - h_n).to(tl.uint32), (w - w_n).to(tl.uint32)
                inside = (i < SIZE) & (j < SIZE) & (k < SIZE)
                for r in tl.static_range(ROUNDS):
                    if INVERSE:
                        k = _step(k, i, j, key, 3 * (ROUNDS - 1 - r) + 2, SIZE, INVERSE)
                        j = _step(j, k, i, key, 3 * (ROUNDS - 1 - r) + 1, SIZE, INVERSE)
                        i = _step(i, j, k, key, 3 * (ROUNDS - 1 - r), SIZE, INVERSE)
                    else:
                        i = _step(i, j, k, key, 3 * r, SIZE, INVERSE)
                        j = _step(j, k, i, key, 3 * r + 1, SIZE, INVERSE)
                        k = _step(k, i, j, key, 3 * r + 2, SIZE, INVERSE)
                d = tl.where(inside, d_n + i.to(tl.int32), d)
                h = tl.where(inside, h_n + j.to(tl.int32), h)
                w = tl.where(inside, w_n + k.to(tl.int32), w)
            source = c.to(tl.int64) * xc + d.to(tl.int64) * xd + h.to(tl.int64) * xh + w.to(tl.int64) * xw
            tl.store(y + place, tl.load(x + source, mask=mask, other=0), mask=mask)


def _arguments(x: Tensor, y: Tensor, cubes: Tensor, size: int, inverse: bool) -> tuple[tuple[int, int, int], dict]:
    """Grid and arguments of the kernel."""
    batch, channels, depth, height, width = x.shape
    inner = channels if y.stride(1) == 1 and y.is_contiguous(memory_format=torch.channels_last_3d) else 1
    voxel = (height * width * inner, width * inner, inner)  # strides (d, h, w) inside a run
    outer, run = channels // inner, depth * voxel[0]
    # The stride of an axis of length 1 means nothing.
    dense = all(t.stride(a) == s or t.shape[a] == 1 for t in (x, y) for a, s in zip((2, 3, 4), voxel))
    dense = dense and (inner == 1 or x.stride(1) == 1)
    word = _WORDS[x.element_size()]
    block = min(_BYTES // max(x.element_size(), 2), triton.next_power_of_2(run))
    args = {"x": x.view(word), "y": y.view(word), "cubes": cubes, "N": cubes.shape[1], "H": height, "W": width, "run": run}
    args |= {name + axis: stride for name, t in (("x", x), ("y", y)) for axis, stride in zip("bcdhw", t.stride())}
    args |= {"INNER": inner, "SIZE": size, "INVERSE": inverse, "DENSE": dense, "WIDE": run + block > 2**31, "BLOCK": block}
    return (triton.cdiv(run, block), outer, batch), args


def _launch(x: Tensor, cubes: Tensor, size: int, inverse: bool) -> Tensor:
    y = torch.empty_like(x)
    if x.numel():
        grid, args = _arguments(x, y, cubes, size, inverse)
        _shuffle_kernel[grid](**args)
    return y


def compile_specs() -> list[dict]:
    """Launches on tensors that have shapes alone (device meta), for compiling them ahead of time; three sizes of element, both layouts."""
    specs = []
    layouts = {"NCDHW": torch.contiguous_format, "channels_last": torch.channels_last_3d}
    cubes = torch.empty(2, 3, 4, dtype=torch.int64, device="meta")
    cases = [(torch.float32, name, True) for name in layouts] + [(torch.bfloat16, name, True) for name in layouts]
    for dtype, layout, dense in [*cases, (torch.uint8, "NCDHW", True), (torch.float32, "NCDHW", False)]:
        x = torch.empty(2, 2, 96, 96, 96, dtype=dtype, device="meta").to(memory_format=layouts[layout])
        y, bits = torch.empty_like(x), 8 * x.element_size()
        if not dense:
            x = torch.empty(2, 2, 96, 96, 192, dtype=dtype, device="meta")[..., ::2]
        spec = {"name": f"voxel_shuffle i{bits} {layout}{'' if dense else ' strided'}", "kernel": _shuffle_kernel}
        spec["arguments"] = _arguments(x, y, cubes, 16, False)[1]
        # Of loads, of stores: strided views are read one by one, and bytes eight at a time.
        specs.append(spec | {"vector_bits": (64, 64) if bits == 8 else (128 if dense else bits, 128)})
    return specs


@torch.library.custom_op("mirror_unet::voxel_shuffle", mutates_args=())
def _shuffle(x: Tensor, corners: Tensor, seeds: Tensor, size: int, inverse: bool, kernel: bool) -> Tensor:
    if not kernel:
        return voxel_shuffle_ref(x, corners, size, seeds, inverse)
    cubes = _cubes(x, corners, seeds, size)
    return _launch(x, cubes.to(x.device, non_blocking=True), size, inverse)


@_shuffle.register_fake
def _(x, corners, seeds, size, inverse, kernel):
    return torch.empty_like(x)


def _keep(ctx, inputs, output):
    _, corners, seeds, ctx.size, ctx.inverse, ctx.kernel = inputs
    ctx.save_for_backward(corners, seeds)


def _backward(ctx, dy):
    return _shuffle(dy, *ctx.saved_tensors, ctx.size, not ctx.inverse, ctx.kernel), None, None, None, None, None


_shuffle.register_autograd(_backward, setup_context=_keep)


def voxel_shuffle_plain(x, corners, size, seed, inverse=False) -> Tensor:
    """`voxel_shuffle_ref` with the inverse shuffle as its gradient, in plain PyTorch on any device."""
    return _shuffle(x, torch.as_tensor(corners), _seeds(x, seed), size, inverse, False)


def voxel_shuffle_triton(x, corners, size, seed, inverse=False) -> Tensor:
    """`voxel_shuffle_ref` as one Triton launch, the same bits; on a GPU, or on the CPU under TRITON_INTERPRET=1."""
    return _shuffle(x, torch.as_tensor(corners), _seeds(x, seed), size, inverse, True)
