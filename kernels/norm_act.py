# SPDX-License-Identifier: MIT, (c) 2026 the Mirror U-Net from scratch contributors
# Needs torch >= 2.8 and, for its kernels, triton >= 3.4; nothing else.
"""Instance norm -> affine -> PReLU -> + residual: what follows almost every convolution here.

For each instance i = (sample b, channel c), over the n voxels v of its volume:

    mu_i = mean_v x[i, v]    var_i = mean_v (x[i, v] - mu_i)^2    r_i = 1 / sqrt(var_i + eps)
    xhat = (x - mu_i) r_i    z = weight_c xhat + bias_c
    y = max(z, 0) + slope_c min(z, 0) + residual

The statistics are those of the given volume, in training and testing: no running averages. The
variance is taken around the mean, as E[x^2] - E[x]^2 loses every digit when the mean is large.

Backward. Let g = dL/dy, and dz = g where z > 0, slope_c g elsewhere. Sums run over v; sums for
parameters also run over b:

    d residual = g    d slope_c = sum g min(z, 0)    d bias_c = sum dz    d weight_c = sum dz xhat
    dx = weight_c r_i (dz - mean_v dz - xhat mean_v(dz xhat))

xhat and z are recomputed from x, so the forward pass saves only x and two numbers per instance.

Bytes per element, in float32. A large instance does not fit into a multiprocessor's memory, and its
mean is known only after all of it has been read. So nothing can move less than: forward, x twice
and y once, 12 (+ 4 for the residual); backward, x and g twice and dx once, 20. The Triton kernels
move 12.01 and 20.01 in NCDHW, 12.07 and 20.09 in channels_last_3d. Each pass takes three launches:
sums per tile, their merge, and the pass that writes the result. Instances of at most 16384 voxels
(in channels_last_3d, 8 channels of at most 2048) stay in registers: 8 and 12 bytes, one launch
forward, and two backward, of which the second sums the parameters' gradients over the batch. All
this replaces about a dozen launches of PyTorch, which saves three tensors instead of one. The
price: the backward pass computes z twice. No atomics: results are bitwise reproducible.

    statistics of a tile, in registers: mean and M2 = sum (x - mean)^2, relative to its first voxel
    merging two parts a and b (Chan):   d = mean_b - mean_a        mean = mean_a + d n_b / n
                                        M2 = M2_a + M2_b + d^2 n_a n_b / n

Layout. A sample is read as a matrix of rows (voxels) and columns (channels). Tiles of it are:

    NCDHW               8192 x 1: columns are far apart, the rows of a column are adjacent
    channels_last_3d    512 x 16, 64 bytes wide: the columns of a row are adjacent
                        (few channels: K voxels make a row, whose column j is channel j mod C)
    any other view      rows are found by the strides of D, H and W: no copy, but no wide accesses

The result has x's layout. Plain PyTorch below does the same with views. (`F.instance_norm` copies
to NCDHW. PyTorch's channels-last group norm uses the unstable variance; on CPU in bfloat16: NaN.)
"""

from collections.abc import Callable
from functools import partial
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the plain path works without it
    triton = None


def norm_act_ref(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
    slope: Tensor | float | None = None, residual: Tensor | None = None,
    eps: float = 1e-5, upcast: bool = False,
) -> Tensor:
    """The definition in plain PyTorch, differentiated by autograd: the reference of the tests.

    Args:
        x: (B, C, D, H, W), floating; contiguous, channels_last_3d or a strided view.
        weight, bias: (C,) affine parameters; None means 1 and 0.
        slope: for z < 0: (1,) or (C,) values (PReLU), a number (LeakyReLU); None: no activation.
        residual: added last; the shape of x, any layout.
        upcast: compute in float64.

    Returns y with the shape, dtype and layout of x, computed in float32 or higher precision.
    Raises ValueError for shapes that do not match.
    """
    slope, leak = _check(x, weight, bias, slope, residual)
    dtype = x.dtype
    work = torch.float64 if upcast or dtype == torch.float64 else torch.float32
    given = (x, weight, bias, slope, residual)
    x, weight, bias, slope, residual = (t if t is None else t.to(work) for t in given)
    var, mean = torch.var_mean(x, (2, 3, 4), correction=0, keepdim=True)
    y = (x - mean) * (var + eps).rsqrt()
    if weight is not None:
        y = y * weight.view(-1, 1, 1, 1)
    if bias is not None:
        y = y + bias.view(-1, 1, 1, 1)
    y = F.leaky_relu(y, leak) if slope is None else F.prelu(y, slope)
    return (y if residual is None else y + residual).to(dtype)


def _split(slope: Tensor | float | None) -> tuple[Tensor | None, float]:
    """Slope as (tensor, 1) or (None, number); no activation is 1."""
    if slope is None or isinstance(slope, Tensor):
        return slope, 1.0
    return None, float(slope)


def _check(x, weight, bias, slope, residual) -> tuple[Tensor | None, float]:
    """Check all shapes. Returns `_split(slope)`."""
    if x.dim() != 5 or not x.is_floating_point():
        raise ValueError(f"x: expected floating (B, C, D, H, W), got {x.dtype} {tuple(x.shape)}")
    slope, leak = _split(slope)
    c = x.shape[1]
    for name, t, sizes in ("weight", weight, [c]), ("bias", bias, [c]), ("slope", slope, [1, c]):
        if t is not None and (t.dim() != 1 or len(t) not in sizes):
            wanted = f"{' or '.join(map(str, sizes))} values for {c} channels"
            raise ValueError(f"{name}: expected {wanted}, got shape {tuple(t.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: expected {tuple(x.shape)}, as x, got {tuple(residual.shape)}")
    return slope, leak


# ---------------------------------------------------------------------------------- plain PyTorch
def norm_act_plain(x, weight=None, bias=None, slope=None, residual=None, eps=1e-5, stats=None):
    """`norm_act_ref` with the backward pass above; first derivatives only. `stats` is not used."""
    slope, leak = _check(x, weight, bias, slope, residual)
    return _NormAct.apply(x, weight, bias, slope, leak, residual, eps)


class _NormAct(torch.autograd.Function):
    """The formulas above on `_rows` of the tensors."""

    @staticmethod
    def forward(ctx, x, weight, bias, slope, leak, residual, eps):
        k = _voxels_per_row(x)
        rows = _rows(x, x, k)
        n = x[0, 0].numel()
        mean = _total(rows, k) / n  # (B, C)
        centered = rows - _spread(mean, rows, k)
        r = (_total(centered * centered, k) / n + eps).rsqrt()  # (B, C)
        ctx.save_for_backward(x, weight, bias, slope, mean, r)
        ctx.leak, ctx.has_residual = leak, residual is not None
        scale = _spread(r if weight is None else r * weight.to(r), rows, k)
        if bias is None:
            y = centered.mul_(scale)
        else:
            y = torch.addcmul(_spread(bias[None], rows, k), centered, scale, out=centered)
        if slope is None:
            y = y if leak == 1 else F.leaky_relu(y, leak)
        elif k:  # F.prelu expects channels in dimension 1: (B n / k, k C)
            y = F.prelu(y.flatten(0, 1), _spread(slope.expand(x.shape[1])[None], rows, k).flatten())
        else:
            y = F.prelu(y, slope.to(y))
        if residual is not None:
            y = y.add_(_rows(residual, x, k).reshape(y.shape))
        return _volume(y, x, k)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, weight, bias, slope, mean, r = ctx.saved_tensors
        k = _voxels_per_row(x)
        n = x[0, 0].numel()
        g = _rows(grad_output, x, k)
        xhat = (_rows(x, x, k) - _spread(mean, g, k)).mul_(_spread(r, g, k))
        dz, dslope = g, None
        if slope is not None:
            z = _affine(xhat, weight, bias, k)
            slopes = _spread(slope.expand(x.shape[1])[None], g, k)
            dz = torch.ops.aten.threshold_backward(g, z, 0.0)  # g where z > 0, else 0
            dz = dz.lerp_(g, slopes)  # g where z > 0, else slope g
            dslope = _total(z.clamp_(max=0).mul_(g), k).sum(0)
            dslope = dslope.sum(0, keepdim=True) if len(slope) == 1 else dslope
        elif ctx.leak != 1:
            z = _affine(xhat, weight, bias, k)
            dz = torch.ops.aten.leaky_relu_backward(g, z, ctx.leak, False)
        dbias = _total(dz, k)  # (B, C)
        dweight = _total(dz * xhat, k)
        dx = dz - _spread(dbias / n, g, k)
        dx.addcmul_(xhat, _spread(dweight / n, g, k), value=-1)
        dx.mul_(_spread(r if weight is None else r * weight.to(r), g, k))
        grads = _parameter_grads(weight, bias, slope, dweight.sum(0), dbias.sum(0), dslope)
        return _volume(dx, x, k), *grads, None, grad_output if ctx.has_residual else None, None


def _voxels_per_row(x: Tensor) -> int:
    """k: 0 for NCDHW; for channels_last_3d the voxels that make a row, as short loops are slow."""
    return gcd(x[0, 0].numel(), 16) if x.stride(1) == 1 and not x.is_contiguous() else 0


def _rows(t: Tensor, x: Tensor, k: int) -> Tensor:
    """(B, C, D, H, W) -> (B, C, n) or (B, n / k, k C), in float32 at least; a view if possible."""
    b, c = x.shape[:2]
    t = t.to(torch.promote_types(x.dtype, torch.float32))
    return t.permute(0, 2, 3, 4, 1).reshape(b, -1, k * c) if k else t.reshape(b, c, -1)


def _volume(rows: Tensor, x: Tensor, k: int) -> Tensor:
    """The inverse of `_rows`, in x's dtype."""
    b, c, *size = x.shape
    volume = rows.view(b, *size, c).permute(0, 4, 1, 2, 3) if k else rows.view(x.shape)
    return _cast(volume, x.dtype)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in dtype. PyTorch 2.11 compiles a backward pass that ends in an idle `.to` to zeros."""
    return t if t.dtype == dtype else t.to(dtype)


def _spread(numbers: Tensor, rows: Tensor, k: int) -> Tensor:
    """(1 or B, C) -> a shape that broadcasts over rows, in their dtype."""
    numbers = numbers.to(rows.dtype)
    return torch.cat([numbers] * k, 1)[:, None] if k else numbers[..., None]  # repeat is slower


def _total(rows: Tensor, k: int) -> Tensor:
    """Sum over the voxels of each instance: (B, C)."""
    return rows.sum(1).view(len(rows), k, -1).sum(1) if k else rows.sum(2)


def _affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None, k: int) -> Tensor:
    """weight xhat + bias; a new tensor, because xhat is needed again."""
    weight, bias = (t if t is None else _spread(t[None], xhat, k) for t in (weight, bias))
    if weight is None:
        return xhat.clone() if bias is None else xhat + bias
    return xhat * weight if bias is None else torch.addcmul(bias, xhat, weight)


def _parameter_grads(weight, bias, slope, dweight, dbias, dslope) -> list[Tensor | None]:
    """Gradients of the given parameters in their dtypes, else None."""
    pairs = ((weight, dweight), (bias, dbias), (slope, dslope))
    return [None if p is None else _cast(grad, p.dtype) for p, grad in pairs]


# --------------------------------------------------------------------------------- Triton kernels
if triton is not None:
    # `cells` is a tile of a sample: sample, rows, columns, which cells exist (COLS, ROWS), H, W.

    @triton.jit
    def _program(spans, n_cols, COLS: tl.constexpr):
        """What a program works on: its sample, the index of its span of rows, its columns."""
        blocks = tl.cdiv(n_cols, COLS)  # neighbors take columns that are adjacent in channels_last
        col = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
        span = tl.program_id(0) // blocks
        return (span // spans).to(tl.int64), span % spans, col

    @triton.jit
    def _offsets(cells, strides, FLAT: tl.constexpr):
        """Offsets of cells, (COLS, ROWS); strides: those of sample, column, slice, line, row."""
        b, row, col, _, H, W = cells
        if FLAT:  # one stride visits all rows
            offsets = row.to(tl.int64) * strides[4]
        else:  # a row is a voxel (d, h, w) of a view
            d = (row // W // H).to(tl.int64)
            h = (row // W % H).to(tl.int64)
            w = (row % W).to(tl.int64)
            offsets = d * strides[2] + h * strides[3] + w * strides[4]
        return b * strides[0] + (col.to(tl.int64) * strides[1])[:, None] + offsets[None, :]

    @triton.jit
    def _load(x, strides, cells, work, FLAT: tl.constexpr):
        """The values of cells in the dtype `work`, (COLS, ROWS); 0 if they do not exist."""
        return tl.load(x + _offsets(cells, strides, FLAT), mask=cells[3], other=0).to(work)

    @triton.jit
    def _load_pair(pairs, b, col, n_cols, C):
        """From (B, 2, C), the two numbers of each column's instance: (COLS, 1) each."""
        first = pairs + b * 2 * C + col % C
        one = tl.load(first, mask=col < n_cols, other=0)
        two = tl.load(first + C, mask=col < n_cols, other=0)
        return one[:, None], two[:, None]

    @triton.jit
    def _parameters(
        weight, bias, slope, col, n_cols, C, work, LEAK: tl.constexpr, SLOPES: tl.constexpr
    ):
        """weight, bias and slope of each column: (COLS, 1), or (1, 1) if shared."""
        c = col % C
        mask = col < n_cols
        w = tl.full(col.shape, 1, work)
        if weight is not None:
            w = tl.load(weight + c, mask=mask, other=0).to(work)
        beta = tl.full(col.shape, 0, work)
        if bias is not None:
            beta = tl.load(bias + c, mask=mask, other=0).to(work)
        if slope is None:
            s = tl.full((1,), LEAK, work)
        elif SLOPES == 1:
            s = tl.load(slope + tl.arange(0, 1)).to(work)
        else:
            s = tl.load(slope + c, mask=mask, other=0).to(work)
        return w[:, None], beta[:, None], s[:, None]

    # Both passes have two steps. REDUCE: sums of each column of a tile. WRITE: the result, from the
    # merged sums. A tile that holds whole instances takes both steps at once.

    @triton.jit
    def _forward(
        x, y, residual,  # (B, C, D, H, W), read as n_rows x n_cols per sample
        stats,  # (B, 2, C): mean and r
        partials,  # (B, 2, spans, n_cols): mean and M2 of a tile's column
        weight, bias, slope,  # (C,), (C,), (1,) or (C,)
        x_strides, y_strides, residual_strides, H, W, n_rows, n_cols, spans, C,
        EPS: tl.constexpr, LEAK: tl.constexpr, SLOPES: tl.constexpr, REDUCE: tl.constexpr,
        WRITE: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ):
        b, t, col = _program(spans, n_cols, COLS)
        row = t * ROWS + tl.arange(0, ROWS)
        col_mask = (col < n_cols)[:, None]
        mask = col_mask & (row < n_rows)[None, :]
        cells = (b, row, col, mask, H, W)
        work = stats.dtype.element_ty
        tile = _load(x, x_strides, cells, work, FLAT)
        if REDUCE:
            # Relative to the column's first value: that difference is exact if the mean is large.
            first = (b, t * ROWS + tl.arange(0, 1), col, col_mask, H, W)
            origin = _load(x, x_strides, first, work, FLAT)
            count = tl.minimum(ROWS, n_rows - t * ROWS)
            d = tl.where(mask, tile - origin, 0)
            shift = tl.sum(d, 1, keep_dims=True) / count  # (COLS, 1)
            d = tl.where(mask, d - shift, 0)
            mean = origin + shift
            r = tl.sum(d * d, 1, keep_dims=True)
            out = partials
            if WRITE:
                r = 1 / tl.sqrt(r / count + EPS)
                out = stats
            out += (b * 2 * spans + t) * n_cols + col[:, None]
            tl.store(out, mean, mask=col_mask)
            tl.store(out + spans * n_cols, r, mask=col_mask)
        else:
            mean, r = _load_pair(stats, b, col, n_cols, C)
        if WRITE:
            w, beta, s = _parameters(weight, bias, slope, col, n_cols, C, work, LEAK, SLOPES)
            # y = max(z, 0) + slope min(z, 0) + residual
            z = w * ((tile - mean) * r) + beta
            out = tl.where(z > 0, z, z * s)
            if residual is not None:
                out += _load(residual, residual_strides, cells, work, FLAT)
            offsets = _offsets(cells, y_strides, FLAT)
            tl.store(y + offsets, out.to(y.dtype.element_ty), mask=mask)

    @triton.jit
    def _merge_stats(
        partials,  # (B, 2, spans, n_cols) = (B, 2, parts, C)
        stats,  # (B, 2, C): mean and 1 / standard deviation
        n_rows, n_cols, parts, C,
        EPS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, COLS: tl.constexpr,
    ):
        b, _, c = _program(1, C, COLS)
        col_mask = (c < C)[:, None]
        K = n_cols // C  # voxels per row
        means = partials + b * 2 * parts * C + c[:, None]
        # Chan's formula, block by block. The mean starts at the first partial's, near the others.
        mean = tl.load(means, mask=col_mask, other=0)  # (COLS, 1)
        m2 = tl.zeros_like(mean)
        count = tl.full((), 0, partials.dtype.element_ty)
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)
            mask = col_mask & (part < parts)[None, :]
            size = tl.minimum(ROWS, n_rows - part // K * ROWS)
            size = tl.where(part < parts, size, 0)[None, :].to(mean.dtype)  # (1, PARTS)
            block = tl.sum(size)
            d = tl.load(means + part[None, :] * C, mask=mask, other=0) - mean
            # The block's mean, relative to the mean so far, and its M2.
            e = tl.sum(tl.where(mask, size * d, 0), 1, keep_dims=True) / block
            own = tl.load(means + (parts + part[None, :]) * C, mask=mask, other=0)
            own = tl.where(mask, own + size * (d - e) * (d - e), 0)
            m2 += tl.sum(own, 1, keep_dims=True) + e * e * (count * block / (count + block))
            mean += e * (block / (count + block))
            count += block
        out = stats + b * 2 * C + c[:, None]
        tl.store(out, mean, mask=col_mask)
        tl.store(out + C, 1 / tl.sqrt(m2 / count + EPS), mask=col_mask)

    @triton.jit
    def _backward(
        grad_y, x, grad_x,  # (B, C, D, H, W), read as n_rows x n_cols per sample
        stats,  # (B, 2, C): mean and r
        means,  # (B, 2, C): means of dz and dz xhat over an instance
        partials,  # (B, 3, spans, n_cols): sums of dz, dz xhat, g min(z, 0) of a tile's column
        weight, bias, slope,  # (C,), (C,), (1,) or (C,)
        grad_y_strides, x_strides, grad_x_strides, H, W, n_rows, n_cols, spans, C,
        LEAK: tl.constexpr, SLOPES: tl.constexpr, REDUCE: tl.constexpr,
        WRITE: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ):
        b, t, col = _program(spans, n_cols, COLS)
        row = t * ROWS + tl.arange(0, ROWS)
        col_mask = (col < n_cols)[:, None]
        mask = col_mask & (row < n_rows)[None, :]
        cells = (b, row, col, mask, H, W)
        work = stats.dtype.element_ty
        mean, r = _load_pair(stats, b, col, n_cols, C)
        w, beta, s = _parameters(weight, bias, slope, col, n_cols, C, work, LEAK, SLOPES)
        g = _load(grad_y, grad_y_strides, cells, work, FLAT)
        xhat = (_load(x, x_strides, cells, work, FLAT) - mean) * r
        z = w * xhat + beta
        dz = tl.where(z > 0, g, s * g)  # 0 outside, as g is
        if REDUCE:
            mean_dz = tl.sum(dz, 1, keep_dims=True)
            mean_dz_xhat = tl.sum(dz * xhat, 1, keep_dims=True)
            sum_g_z = tl.sum(tl.where(z > 0, 0, g * z), 1, keep_dims=True)
            out = partials + (b * 3 * spans + t) * n_cols + col[:, None]
            tl.store(out, mean_dz, mask=col_mask)
            tl.store(out + spans * n_cols, mean_dz_xhat, mask=col_mask)
            tl.store(out + 2 * spans * n_cols, sum_g_z, mask=col_mask)
            mean_dz /= n_rows
            mean_dz_xhat /= n_rows
        else:
            mean_dz, mean_dz_xhat = _load_pair(means, b, col, n_cols, C)
        if WRITE:
            # dx = weight r (dz - mean dz - xhat mean(dz xhat))
            out = w * r * (dz - mean_dz - xhat * mean_dz_xhat)
            offsets = _offsets(cells, grad_x_strides, FLAT)
            tl.store(grad_x + offsets, out.to(grad_x.dtype.element_ty), mask=mask)

    @triton.jit
    def _merge_sums(
        partials,  # (B, 3, spans, n_cols) = (B, 3, parts, C): sums of dz, dz xhat and g min(z, 0)
        means,  # (B, 2, C): means of the first two over an instance; or None
        sums,  # (2 C + slopes,): sums over all samples, the gradients of bias, weight and slope
        B, n, parts, C,
        SLOPES: tl.constexpr, PARTS: tl.constexpr, COLS: tl.constexpr,
    ):
        s, _, c = _program(1, C, COLS)  # s: which of the three
        width, count = C, parts
        if SLOPES == 1 and s == 2:  # all channels have one slope
            width, count = 1, parts * C
        total = tl.zeros((COLS,), partials.dtype.element_ty)
        for b in range(B):
            block = tl.zeros((COLS, PARTS), partials.dtype.element_ty)
            first = partials + (b * 3 + s) * parts * C + c[:, None]
            for start in range(0, count, PARTS):
                part = (start + tl.arange(0, PARTS))[None, :]
                mask = (c < width)[:, None] & (part < count)
                block += tl.load(first + part * width, mask=mask, other=0)
            instance = tl.sum(block, 1)
            if means is not None:
                tl.store(means + (b * 2 + s) * C + c, instance / n, mask=c < C * (s < 2))
            total += instance
        tl.store(sums + s * C + c, total, mask=c < width)


# --------------------------------------------------------------------------------------- launches
REGISTERS = 2**16  # bytes of x in float32 that a program keeps, to read an instance only once


def _row_stride(t: Tensor) -> int | None:
    """The one stride that visits all voxels of (B, C, D, H, W) in order; None if it takes more."""
    axes = [(size, stride) for size, stride in zip(t.shape[2:], t.stride()[2:]) if size > 1]
    if any(outer != size * inner for (_, outer), (size, inner) in zip(axes, axes[1:])):
        return None
    return axes[-1][1] if axes else 0


def _walk(like: Tensor, whole: int, weight, bias, slope, **tensors: Tensor | None) -> dict:
    """How launches read their tensors (B, C, D, H, W): n_rows x n_cols per sample, in tiles.

    A row is a voxel and a column is a channel; if all tensors are dense channels_last_3d, K voxels
    make a row. The layout of `like` decides a tile's width: 64 bytes of channels, or one channel.
    If they fit into REGISTERS, and in channels_last_3d into `whole` bytes (0: never), a tile has
    all rows of a channel, or of 16 bytes or more of channels. Returns arguments of kernels.
    """
    b, c, depth, height, width = like.shape
    n = depth * height * width
    if n > 2**31 - 2**16:  # rows are numbered in 32 bits, also those of a tile that do not exist
        raise ValueError(f"x: at most {2**31 - 2**16} voxels per instance, got {n}")
    given = [t for t in tensors.values() if t is not None]
    flat = all(_row_stride(t) is not None for t in given)
    last = c > 1 and like.stride(1) == 1 and not like.is_contiguous()
    item = like.element_size()
    power = triton.next_power_of_2
    rows, k = power(n), 1
    fit = min(REGISTERS // max(item, 4), whole // item if last else whole)  # elements
    cols = min(power(c), max(1, fit // rows), max(8 if last else 1, 1024 // rows))
    fits = rows * cols <= fit and (not last or cols * item >= 16 or cols >= c)
    if not fits:
        if last and all(t.stride(1) == 1 and _row_stride(t) == c for t in given):
            k = gcd(n, 16 // gcd(c, 16))  # rows of a multiple of 16 elements
        cols = min(power(c * k), 64 // item) if last else 1
        rows = min(power(n // k), 8192 // cols)
        cols = min(power(c * k), 8192 // rows)
    walk = dict(tensors, weight=weight, bias=bias, slope=slope)
    for name, t in tensors.items():
        strides = None if t is None else t.stride()
        if flat and t is not None:  # one stride visits all rows
            strides = (*strides[:2], 0, 0, _row_stride(t) * k)
        walk[f"{name}_strides"] = strides
    height, width = (1, 1) if flat else (height, width)  # not needed if flat
    walk |= dict(B=b, C=c, H=height, W=width, n=n, n_rows=n // k, n_cols=c * k, whole=fits)
    warps = min(max(rows * cols // (1024 // item if fits else 512), 1), 16)
    walk |= dict(FLAT=flat, ROWS=rows, COLS=cols, num_warps=warps, spans=triton.cdiv(n // k, rows))
    return walk | dict(SLOPES=0 if slope is None else len(slope), partials=None)


def _block(parts: int, channels: int) -> dict:
    """The block of partial results that a merging program reads at once."""
    cols = min(triton.next_power_of_2(channels), 8)
    rows = min(triton.next_power_of_2(parts), 4096 // cols)
    return {"parts": parts, "PARTS": rows, "COLS": cols, "num_warps": 8}


def _launch(kernel, groups: int, columns: int, walk: dict, **more) -> tuple:
    """(kernel, grid, arguments) of a launch with a program per group and COLS columns."""
    given = walk | {"REDUCE": False, "WRITE": True} | more
    programs = groups * triton.cdiv(columns, given["COLS"])
    names = (*kernel.arg_names, "num_warps")
    return kernel, (programs,), {name: given[name] for name in names}


def _forward_outputs(x: Tensor, *_) -> tuple[Tensor, Tensor]:
    """Empty y, and stats: mean and 1 / standard deviation of every instance, (B, 2, C)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), x.new_empty((x.shape[0], 2, x.shape[1]), dtype=dtype)


def _forward_launches(leak, eps, x, weight, bias, slope, residual, stats=None) -> list:
    """The launches that fill new tensors y and stats; only y if the statistics are given."""
    _check(x, weight, bias, slope, residual)
    y, new_stats = _forward_outputs(x)
    whole = 2**16 if stats is None else 0
    walk = _walk(y, whole, weight, bias, slope, x=x, y=y, residual=residual)
    walk |= dict(stats=new_stats if stats is None else stats, EPS=eps, LEAK=leak)
    b, c, spans, n_cols = (walk[name] for name in ("B", "C", "spans", "n_cols"))
    if stats is not None or walk["whole"]:
        return [_launch(_forward, b * spans, n_cols, walk, REDUCE=stats is None)]
    walk["partials"] = new_stats.new_empty((b, 2, spans, n_cols))
    return [
        _launch(_forward, b * spans, n_cols, walk, REDUCE=True, WRITE=False),
        _launch(_merge_stats, b, c, walk, **_block(spans * n_cols // c, c)),
        _launch(_forward, b * spans, n_cols, walk),
    ]


def _backward_outputs(_, x, weight, bias, slope, leak, stats) -> tuple[Tensor, Tensor]:
    """Empty gradient of x, and sums (2 C + slopes,): gradients of bias, weight and slope."""
    size = 2 * x.shape[1] + (0 if slope is None else slope.shape[0])
    return torch.empty_like(x), stats.new_empty(size)


def _backward_launches(leak, grad_y, x, weight, bias, slope, stats) -> list:
    """The launches that fill new tensors grad_x and sums."""
    grad_x, sums = _backward_outputs(grad_y, x, weight, bias, slope, leak, stats)
    walk = _walk(grad_x, 2**15, weight, bias, slope, grad_y=grad_y, x=x, grad_x=grad_x)
    walk |= dict(stats=stats, sums=sums, means=None, LEAK=leak)
    b, c, spans, n_cols = (walk[name] for name in ("B", "C", "spans", "n_cols"))
    rows = 2 if slope is None else 3  # of sums
    if walk["whole"]:
        walk["partials"] = stats.new_empty((b, 3, 1, c))
        return [
            _launch(_backward, b, c, walk, REDUCE=True),
            _launch(_merge_sums, rows, c, walk, **_block(1, c)),
        ]
    walk["means"] = stats.new_empty((b, 2, c))
    last = _launch(_backward, b * spans, n_cols, walk)
    walk["ROWS"] *= 2 if stats.dtype == torch.float32 else 1  # sums alone take fewer registers
    walk["spans"] = spans = triton.cdiv(walk["n_rows"], walk["ROWS"])
    walk["partials"] = stats.new_empty((b, 3, spans, n_cols))
    return [
        _launch(_backward, b * spans, n_cols, walk, REDUCE=True, WRITE=False),
        _launch(_merge_sums, rows, c, walk, **_block(spans * n_cols // c, c)),
        last,
    ]


_PLANS: dict[tuple, tuple] = {}  # signature: shapes of new tensors, launches


def _run(plan: Callable, *numbers: float, **tensors: Tensor | None) -> dict[str, Tensor]:
    """Start the launches of plan(*numbers, **tensors) on the GPU of x. Returns all tensors by name.

    Planning, and Triton's own preparation of a launch, take longer than small launches run. So both
    are done once per signature. (Triton compiles for addresses that are multiples of 16 or not.)
    """
    x = tensors["x"]
    traits = [
        t if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16 == 0)
        for t in tensors.values()
    ]
    signature = (plan, numbers, x.device, *traits)
    with torch.cuda.device_of(x):  # Triton launches on the current GPU and stream
        if signature not in _PLANS:
            launches = plan(*numbers, **tensors)
            pairs = [pair for _, _, given in launches for pair in given.items()]
            used = {k: t for k, t in pairs if isinstance(t, Tensor)}
            new = [(k, t.shape, t.dtype) for k, t in used.items() if k not in tensors]
            _PLANS[signature] = new, [_start(*launch) for launch in launches]
            return tensors | used
        new, launches = _PLANS[signature]
        for name, shape, dtype in new:
            like_x = len(shape) == 5
            tensors[name] = torch.empty_like(x) if like_x else x.new_empty(shape, dtype=dtype)
        for launch, arguments, places in launches:
            arguments = arguments.copy()
            for i, name in places:
                arguments[i] = tensors[name]
            launch(*arguments)
    return tensors


def _start(kernel, grid: tuple, given: dict) -> tuple[Callable, list, list]:
    """Start a launch. Returns what starts it again: a function, its arguments, with None for those
    that are tensors, and these tensors' places and names.

    Triton returns the compiled kernel, which can be run without Triton's binding of arguments, in
    1.5 us instead of 10. Only this function touches Triton's internals. If they are not as
    expected, or in the interpreter, every launch is an ordinary one.
    """
    names = list(enumerate(kernel.arg_names))
    places = [(i, name) for i, name in names if isinstance(given[name], Tensor)]
    arguments = [None if (i, name) in places else given[name] for i, name in names]
    compiled = kernel[grid](**given)
    try:
        start = compiled.run
        handle = (compiled.function, compiled.packed_metadata, None, None, None)
        driver = triton.runtime.driver.active
    except AttributeError:
        return partial(kernel[grid], num_warps=given["num_warps"]), arguments, places

    def launch(*values):
        stream = driver.get_current_stream(driver.get_current_device())
        start(*grid, 1, 1, stream, *handle, *values)

    return launch, arguments, places


# ------------------------------------------------------------------------- autograd and custom ops
# In eager mode, `_Direct` calls both passes. torch.compile needs custom ops, with a slow dispatch.
def _forward_pass(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, slope: Tensor | None, leak: float,
    residual: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:
    """y and the statistics."""
    given = dict(x=x, weight=weight, bias=bias, slope=slope, residual=residual)
    tensors = _run(_forward_launches, leak, eps, **given)
    return tensors["y"], tensors["stats"]


def _backward_pass(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None,
    slope: Tensor | None, leak: float, stats: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and those of bias, weight and slope, joined: (2 C + slopes,)."""
    given = dict(grad_y=grad_y, x=x, weight=weight, bias=bias, slope=slope, stats=stats)
    tensors = _run(_backward_launches, leak, **given)
    return tensors["grad_x"], tensors["sums"]


def _save(ctx, inputs, output):
    x, weight, bias, slope, ctx.leak, residual, _ = inputs
    ctx.save_for_backward(x, weight, bias, slope, output[1])
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no launch that fills zeros for the gradient of stats


def _gradients(ctx, grad_output, _):
    if grad_output is None:
        return (None,) * 7
    x, weight, bias, slope, stats = ctx.saved_tensors
    direct = _is_eager(grad_output) and not torch.is_grad_enabled()  # else an error, by the op
    run = _backward_pass if direct else _backward_op
    grad_x, sums = run(grad_output, x, weight, bias, slope, ctx.leak, stats)
    c = x.shape[1]
    dbias, dweight, dslope = sums.split_with_sizes((c, c, sums.shape[0] - 2 * c))
    grads = _parameter_grads(weight, bias, slope, dweight, dbias, dslope)
    dresidual = None if ctx.residual_dtype is None else grad_output.to(ctx.residual_dtype)
    return grad_x, *grads, None, dresidual, None


def _is_eager(x: Tensor) -> bool:
    """Whether kernels can be launched now: not on a compiler's symbolic tensors."""
    return type(x) is Tensor and not torch.compiler.is_compiling()


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _forward_pass(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_gradients)


_op = custom_op("mirror_unet::norm_act", _forward_pass, mutates_args=())
_op.register_fake(_forward_outputs)
_op.register_autograd(_gradients, setup_context=_save)
_backward_op = custom_op("mirror_unet::norm_act_backward", _backward_pass, mutates_args=())
_backward_op.register_fake(_backward_outputs)


def norm_act_triton(x, weight=None, bias=None, slope=None, residual=None, eps=1e-5, stats=None):
    """`norm_act_ref` as Triton kernels; first derivatives only.

    y.known is {"stats": mean and r}. A call without gradients that gets them back, for the same x
    and eps, takes one launch: for what is computed again in the backward pass.
    """
    eager = _is_eager(x) and x.dim() == 5  # then the plan checks all shapes, once
    slope, leak = _split(slope) if eager else _check(x, weight, bias, slope, residual)
    weight, bias, slope = (t if t is None else t.contiguous() for t in (weight, bias, slope))
    inputs = (x, weight, bias, slope, leak, residual, eps)
    if not eager:
        return _op(*inputs)[0]
    if torch.is_grad_enabled():
        y, stats = _Direct.apply(*inputs)
        y.known = {"stats": stats}
        return y
    if stats is None:
        return _forward_pass(*inputs)[0]
    given = dict(x=x, weight=weight, bias=bias, slope=slope, residual=residual, stats=stats)
    return _run(_forward_launches, leak, eps, **given)["y"]


def norm_act(x, *options, **named) -> Tensor:
    """`norm_act_ref` by the path that fits x's device: a GPU's kernels, or plain PyTorch."""
    path = norm_act_triton if x.is_cuda and triton is not None else norm_act_plain
    return path(x, *options, **named)


class NormAct(torch.nn.InstanceNorm3d):
    """A drop-in for `nn.InstanceNorm3d`, whose arguments it takes and whose state dict it loads.

    slope: None: norm alone; a number: LeakyReLU; a tensor of 1 or C values: PReLU, learned. A state
    dict without "slope" leaves it as it is. Statistics are those of x (B, C, D, H, W) or
    (C, D, H, W): track_running_stats=True is a ValueError. The residual is added last.
    """

    def __init__(self, *options, slope: Tensor | float | None = None, **named):
        super().__init__(*options, **named)
        if self.track_running_stats:
            raise ValueError("NormAct has no running statistics: leave track_running_stats out")
        self.slope = torch.nn.Parameter(slope.detach()) if isinstance(slope, Tensor) else slope

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.dim() == 4:  # without a batch
            return self(x[None], None if residual is None else residual[None])[0]
        return norm_act(x, self.weight, self.bias, self.slope, residual, self.eps)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        if isinstance(self.slope, Tensor):
            state_dict.setdefault(prefix + "slope", self.slope.detach())
        super()._load_from_state_dict(state_dict, prefix, *rest)
