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

Bytes per element, in float32. An instance does not fit into a multiprocessor's memory, and its
mean is known only after all of it has been read. So nothing can move less than: forward, x twice
and y once, 12 (+ 4 for the residual); backward, x and g twice and dx once, 20. The Triton kernels
move 12.01 and 20.02 in NCDHW, 12.07 and 20.07 in channels_last_3d. Each pass takes three launches:
partial sums per tile, a merge of the partial sums, and the pass that writes the result (plus one
tiny sum if all channels share one slope). They replace about a dozen launches of PyTorch, which
also saves three tensors instead of one. The price: the backward pass computes z twice. There are
no atomics, so results are bitwise reproducible.

    statistics of a tile, in registers: mean and M2 = sum (x - mean)^2, relative to its first voxel
    merging two parts a and b (Chan):   d = mean_b - mean_a        mean = mean_a + d n_b / n
                                        M2 = M2_a + M2_b + d^2 n_a n_b / n

Layout. A sample is read as a matrix of rows (voxels) and columns (channels). Tiles of it are:

    NCDHW               8192 x 1: columns are far apart, the rows of a column are adjacent
    channels_last_3d    512 x 16, 64 bytes wide: the columns of a row are adjacent
                        (few channels: K voxels make a row, whose column j is channel j mod C)
    any other view      rows are found by the strides of D, H and W: no copy, but no wide accesses

The result has x's layout. Plain PyTorch below does the same with views. (`F.instance_norm` copies
to NCDHW. PyTorch's channels-last group norm uses the unstable variance, and returns NaN gradients
in bfloat16 on CPU.)
"""

from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

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


def _check(x, weight, bias, slope, residual) -> tuple[Tensor | None, float]:
    """Check all shapes. Returns slope as (tensor, 1) or (None, number); no activation is 1."""
    if x.dim() != 5 or not x.is_floating_point():
        raise ValueError(f"x: expected floating (B, C, D, H, W), got {x.dtype} {tuple(x.shape)}")
    leak = 1.0 if slope is None or isinstance(slope, Tensor) else float(slope)
    slope = slope if isinstance(slope, Tensor) else None
    c = x.shape[1]
    for name, t, sizes in ("weight", weight, [c]), ("bias", bias, [c]), ("slope", slope, [1, c]):
        if t is not None and (t.dim() != 1 or len(t) not in sizes):
            wanted = f"{' or '.join(map(str, sizes))} values for {c} channels"
            raise ValueError(f"{name}: expected {wanted}, got shape {tuple(t.shape)}")
    if residual is not None and residual.shape != x.shape:
        shapes = f"{tuple(x.shape)}, got {tuple(residual.shape)}"
        raise ValueError(f"residual: expected the shape of x, {shapes}")
    return slope, leak


# ---------------------------------------------------------------------------------- plain PyTorch
def norm_act_plain(x, weight=None, bias=None, slope=None, residual=None, eps=1e-5) -> Tensor:
    """`norm_act_ref` with the backward pass above, on any device; first derivatives only."""
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
        ctx.leak = leak
        ctx.has_residual = residual is not None
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
            y = y.add_(_rows(residual, x, k).view_as(y))
        return _volume(y, x, k)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, bias, slope, mean, r = ctx.saved_tensors
        k = _voxels_per_row(x)
        n = x[0, 0].numel()
        g = _rows(grad_output, x, k)
        xhat = (_rows(x, x, k) - _spread(mean, g, k)).mul_(_spread(r, g, k))
        dz = g
        dslope = None
        if slope is not None:
            z = _affine(xhat, weight, bias, k)
            slopes = _spread(slope.expand(x.shape[1])[None], g, k)
            dz = torch.ops.aten.threshold_backward(g, z, 0.0)  # g where z > 0, else 0
            dz = dz.lerp_(g, slopes)  # g where z > 0, else slope g
            dslope = _total(z.clamp_(max=0).mul_(g), k).sum(0)
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
    """Gradients of the given parameters, else None; dweight, dbias, dslope: per channel, (C,)."""
    if slope is not None and len(slope) == 1:
        dslope = dslope.sum(0, keepdim=True)
    pairs = ((weight, dweight), (bias, dbias), (slope, dslope))
    return [None if p is None else _cast(grad, p.dtype) for p, grad in pairs]


# --------------------------------------------------------------------------------- Triton kernels
if triton is not None:

    @triton.jit
    def _program(n_cols, COLS: tl.constexpr):
        """What a program works on: its sample, the index of its span of rows, its columns."""
        blocks = tl.cdiv(n_cols, COLS)  # neighbors take columns that are adjacent in channels_last
        col = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
        return tl.program_id(1).to(tl.int64), tl.program_id(0) // blocks, col

    @triton.jit
    def _offsets(b, row, col, strides, H, W, FLAT: tl.constexpr):
        """Offsets of cells (row, col), (COLS, ROWS); strides: sample, column, slice, line, row."""
        if FLAT:  # one stride visits all rows
            offsets = row.to(tl.int64) * strides[4]
        else:  # a row is a voxel (d, h, w) of a view
            d = (row // W // H).to(tl.int64)
            h = (row // W % H).to(tl.int64)
            w = (row % W).to(tl.int64)
            offsets = d * strides[2] + h * strides[3] + w * strides[4]
        return b * strides[0] + (col.to(tl.int64) * strides[1])[:, None] + offsets[None, :]

    @triton.jit
    def _load(x, strides, b, row, col, mask, H, W, FLAT: tl.constexpr):
        """The cells (row, col) of a sample, (COLS, ROWS); 0 outside the mask."""
        offsets = _offsets(b, row, col, strides, H, W, FLAT)
        return tl.load(x + offsets, mask=mask, other=0)

    @triton.jit
    def _columns(
        stats, weight, bias, slope, b, col, n_cols, C, LEAK: tl.constexpr, SLOPES: tl.constexpr
    ):
        """mean, r, weight, bias, slope of a program's columns: (COLS, 1), or (1, 1) if shared."""
        c = col % C
        mask = col < n_cols
        mean = tl.load(stats + b * 2 * C + c, mask=mask, other=0)
        r = tl.load(stats + (b * 2 + 1) * C + c, mask=mask, other=0)
        w = tl.full(col.shape, 1, r.dtype)
        if weight is not None:
            w = tl.load(weight + c, mask=mask, other=0).to(r.dtype)
        beta = tl.full(col.shape, 0, r.dtype)
        if bias is not None:
            beta = tl.load(bias + c, mask=mask, other=0).to(r.dtype)
        if slope is None:
            s = tl.full((1,), LEAK, r.dtype)
        elif SLOPES == 1:
            s = tl.load(slope + tl.arange(0, 1)).to(r.dtype)
        else:
            s = tl.load(slope + c, mask=mask, other=0).to(r.dtype)
        return mean[:, None], r[:, None], w[:, None], beta[:, None], s[:, None]

    @triton.jit
    def _tile_stats(
        x,  # (B, C, D, H, W), read as n_rows x n_cols per sample
        partials,  # (B, 2, tiles, n_cols): mean of a tile's column, and sum of squares around it
        x_strides, H, W, n_rows, n_cols,
        FLAT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ):
        b, t, col = _program(n_cols, COLS)
        row = t * ROWS + tl.arange(0, ROWS)
        col_mask = (col < n_cols)[:, None]
        mask = col_mask & (row < n_rows)[None, :]
        work = partials.dtype.element_ty
        tile = _load(x, x_strides, b, row, col, mask, H, W, FLAT).to(work)
        # Relative to the column's first value: that difference is exact if the mean is large.
        first = t * ROWS + tl.arange(0, 1)
        origin = _load(x, x_strides, b, first, col, col_mask, H, W, FLAT).to(work)
        d = tl.where(mask, tile - origin, 0)
        shift = tl.sum(d, 1, keep_dims=True) / tl.minimum(ROWS, n_rows - t * ROWS)  # (COLS, 1)
        d = tl.where(mask, d - shift, 0)
        tiles = tl.cdiv(n_rows, ROWS)
        out = partials + (b * 2 * tiles + t) * n_cols + col[:, None]
        tl.store(out, origin + shift, mask=col_mask)
        tl.store(out + tiles * n_cols, tl.sum(d * d, 1, keep_dims=True), mask=col_mask)

    @triton.jit
    def _merge_stats(
        partials,  # (B, 2, tiles, n_cols) = (B, 2, tiles K, C)
        stats,  # (B, 2, C): mean and 1 / standard deviation
        n_rows, n_cols, C,
        EPS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, COLS: tl.constexpr,
    ):
        b = tl.program_id(1).to(tl.int64)
        c = tl.program_id(0) * COLS + tl.arange(0, COLS)
        col_mask = (c < C)[:, None]
        K = n_cols // C  # voxels per row
        parts = tl.cdiv(n_rows, ROWS) * K  # per channel
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
    def _forward(
        x, y, residual,  # (B, C, D, H, W), read as n_rows x n_cols per sample
        stats,  # (B, 2, C)
        weight, bias, slope,  # (C,), (C,), (1,) or (C,)
        x_strides, y_strides, residual_strides, H, W, n_rows, n_cols, C,
        LEAK: tl.constexpr, SLOPES: tl.constexpr,
        FLAT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ):
        b, t, col = _program(n_cols, COLS)
        row = t * ROWS + tl.arange(0, ROWS)
        mask = (col < n_cols)[:, None] & (row < n_rows)[None, :]
        work = stats.dtype.element_ty
        tile = _load(x, x_strides, b, row, col, mask, H, W, FLAT).to(work)
        mean, r, w, beta, s = _columns(stats, weight, bias, slope, b, col, n_cols, C, LEAK, SLOPES)
        # y = max(z, 0) + slope min(z, 0) + residual
        z = w * ((tile - mean) * r) + beta
        out = tl.where(z > 0, z, z * s)
        if residual is not None:
            out += _load(residual, residual_strides, b, row, col, mask, H, W, FLAT).to(work)
        offsets = _offsets(b, row, col, y_strides, H, W, FLAT)
        tl.store(y + offsets, out.to(y.dtype.element_ty), mask=mask)

    @triton.jit
    def _tile_sums(
        grad_y, x,  # (B, C, D, H, W), read as n_rows x n_cols per sample
        stats,  # (B, 2, C)
        weight, bias, slope,  # (C,), (C,), (1,) or (C,)
        partials,  # (B, 3, spans, n_cols): sums of dz, dz xhat, g min(z, 0) over a span of a column
        grad_y_strides, x_strides, H, W, n_rows, n_cols, steps, C,
        LEAK: tl.constexpr, SLOPES: tl.constexpr,
        FLAT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ):
        b, t, col = _program(n_cols, COLS)
        work = stats.dtype.element_ty
        mean, r, w, beta, s = _columns(stats, weight, bias, slope, b, col, n_cols, C, LEAK, SLOPES)
        sum_dz = tl.zeros((COLS,), work)
        sum_dz_xhat = tl.zeros((COLS,), work)
        sum_g_z = tl.zeros((COLS,), work)
        for start in range(t * steps * ROWS, (t + 1) * steps * ROWS, ROWS):
            row = start + tl.arange(0, ROWS)
            mask = (col < n_cols)[:, None] & (row < n_rows)[None, :]
            g = _load(grad_y, grad_y_strides, b, row, col, mask, H, W, FLAT).to(work)
            tile = _load(x, x_strides, b, row, col, mask, H, W, FLAT).to(work)
            xhat = (tile - mean) * r
            z = w * xhat + beta
            dz = tl.where(z > 0, g, s * g)  # 0 outside, as g is
            sum_dz += tl.sum(dz, 1)
            sum_dz_xhat += tl.sum(dz * xhat, 1)
            sum_g_z += tl.sum(tl.where(z > 0, 0, g * z), 1)
        spans = tl.cdiv(n_rows, steps * ROWS)
        out = partials + (b * 3 * spans + t) * n_cols + col
        tl.store(out, sum_dz, mask=col < n_cols)
        tl.store(out + spans * n_cols, sum_dz_xhat, mask=col < n_cols)
        if slope is not None:
            tl.store(out + 2 * spans * n_cols, sum_g_z, mask=col < n_cols)

    @triton.jit
    def _merge_sums(
        partials,  # (B, 3, spans, n_cols) = (B, 3, parts, C): sums of dz, dz xhat and g min(z, 0)
        means,  # (B, 3, C): means of them over an instance
        sums,  # (2 or 3, C): sums over all samples, the gradients of bias, weight and slope
        B, n, parts, C,
        PARTS: tl.constexpr, COLS: tl.constexpr,
    ):
        c = tl.program_id(0) * COLS + tl.arange(0, COLS)
        s = tl.program_id(1)  # which of the sums
        total = tl.zeros((COLS,), partials.dtype.element_ty)
        for b in range(B):
            block = tl.zeros((COLS, PARTS), partials.dtype.element_ty)
            first = partials + (b * 3 + s) * parts * C + c[:, None]
            for start in range(0, parts, PARTS):
                part = (start + tl.arange(0, PARTS))[None, :]
                mask = (c < C)[:, None] & (part < parts)
                block += tl.load(first + part * C, mask=mask, other=0)
            instance = tl.sum(block, 1)
            tl.store(means + (b * 3 + s) * C + c, instance / n, mask=c < C)
            total += instance
        tl.store(sums + s * C + c, total, mask=c < C)

    @triton.jit
    def _backward(
        grad_y, x, grad_x,  # (B, C, D, H, W), read as n_rows x n_cols per sample
        stats, means,  # (B, 2, C), (B, 3, C)
        weight, bias, slope,  # (C,), (C,), (1,) or (C,)
        grad_y_strides, x_strides, grad_x_strides, H, W, n_rows, n_cols, steps, C,
        LEAK: tl.constexpr, SLOPES: tl.constexpr,
        FLAT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ):
        b, t, col = _program(n_cols, COLS)
        work = stats.dtype.element_ty
        mean, r, w, beta, s = _columns(stats, weight, bias, slope, b, col, n_cols, C, LEAK, SLOPES)
        c = means + b * 3 * C + col % C
        mean_dz = tl.load(c, mask=col < n_cols, other=0)[:, None]
        mean_dz_xhat = tl.load(c + C, mask=col < n_cols, other=0)[:, None]
        for start in range(t * steps * ROWS, (t + 1) * steps * ROWS, ROWS):
            row = start + tl.arange(0, ROWS)
            mask = (col < n_cols)[:, None] & (row < n_rows)[None, :]
            g = _load(grad_y, grad_y_strides, b, row, col, mask, H, W, FLAT).to(work)
            tile = _load(x, x_strides, b, row, col, mask, H, W, FLAT).to(work)
            xhat = (tile - mean) * r
            z = w * xhat + beta
            dz = tl.where(z > 0, g, s * g)
            # dx = weight r (dz - mean dz - xhat mean(dz xhat))
            out = w * r * (dz - mean_dz - xhat * mean_dz_xhat)
            offsets = _offsets(b, row, col, grad_x_strides, H, W, FLAT)
            tl.store(grad_x + offsets, out.to(grad_x.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------ launches and custom ops
def _row_stride(t: Tensor) -> int | None:
    """The one stride that visits all voxels of (B, C, D, H, W) in order; None if it takes more."""
    axes = [(size, stride) for size, stride in zip(t.shape[2:], t.stride()[2:]) if size > 1]
    if any(outer != size * inner for (_, outer), (size, inner) in zip(axes, axes[1:])):
        return None
    return axes[-1][1] if axes else 0


def _walk(like: Tensor, tile: int, steps: int, **tensors: Tensor | None) -> tuple[dict, tuple]:
    """How a launch reads its tensors (B, C, D, H, W): n_rows x n_cols per sample, in tiles.

    A row is a voxel and a column is a channel; if all tensors are dense channels_last_3d, K voxels
    make a row. The layout of `like` decides a tile's width: 64 bytes of channels, or one channel.

    Returns the arguments (the tensors, their strides, sizes and tile) and the grid.
    """
    b, c, depth, height, width = like.shape
    n = depth * height * width
    if n >= 2**31:
        raise ValueError(f"x: at most 2^31 - 1 voxels per instance, got {n}")
    given = [t for t in tensors.values() if t is not None]
    flat = all(_row_stride(t) is not None for t in given)
    last = c > 1 and like.stride(1) == 1 and not like.is_contiguous()
    k = 1
    if last and all(t.stride(1) == 1 and _row_stride(t) == c for t in given):
        k = gcd(n, 16 // gcd(c, 16))  # rows of a multiple of 16 elements
    walk = dict(tensors)
    for name, t in tensors.items():
        strides = None if t is None else t.stride()
        if flat and t is not None:  # one stride visits all rows
            strides = (*strides[:2], 0, 0, _row_stride(t) * k)
        walk[f"{name}_strides"] = strides
    height, width = (1, 1) if flat else (height, width)  # not needed if flat
    n_rows, n_cols = n // k, c * k
    cols = min(triton.next_power_of_2(n_cols), 64 // like.element_size()) if last else 1
    rows = min(triton.next_power_of_2(n_rows), tile // cols)
    cols = min(triton.next_power_of_2(n_cols), tile // rows)
    steps = min(steps, triton.cdiv(n_rows, rows)) if last else 1
    walk |= dict(H=height, W=width, n_rows=n_rows, n_cols=n_cols, C=c, steps=steps)
    walk |= dict(FLAT=flat, ROWS=rows, COLS=cols, num_warps=min(max(rows * cols // 512, 1), 16))
    return walk, (triton.cdiv(n_rows, rows * steps) * triton.cdiv(n_cols, cols), b)


def _merge(parts: int, channels: int) -> tuple[dict, int]:
    """The block of partial results that a merging program reads at once; how many programs."""
    cols = min(triton.next_power_of_2(channels), 16)
    block = {"PARTS": min(triton.next_power_of_2(parts), 128), "COLS": cols, "num_warps": 8}
    return block, triton.cdiv(channels, cols)


def _launch(kernel, grid: tuple, arguments: dict) -> tuple:
    """(kernel, grid, those of the arguments that the kernel takes)."""
    names = (*kernel.arg_names, "num_warps")
    return kernel, grid, {name: arguments[name] for name in names if name in arguments}


def _forward_outputs(x: Tensor, *_) -> tuple[Tensor, Tensor]:
    """Empty y, and stats: mean and 1 / standard deviation of every instance, (B, 2, C)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), x.new_empty((len(x), 2, x.shape[1]), dtype=dtype)


def _forward_launches(x, weight, bias, slope, leak, residual, eps, y, stats) -> list:
    """The launches that fill y and stats."""
    b, c = x.shape[:2]
    given, grid = _walk(y, tile=8192, steps=1, x=x, y=y, residual=residual)
    tiles = triton.cdiv(given["n_rows"], given["ROWS"])
    partials = stats.new_empty((b, 2, tiles, given["n_cols"]))
    given |= dict(stats=stats, partials=partials, weight=weight, bias=bias, slope=slope)
    given |= dict(EPS=eps, LEAK=leak, SLOPES=0 if slope is None else len(slope))
    block, blocks = _merge(tiles * given["n_cols"] // c, c)
    return [
        _launch(_tile_stats, grid, given),
        _launch(_merge_stats, (blocks, b), given | block),
        _launch(_forward, grid, given),
    ]


def _backward_outputs(_, x, weight, bias, slope, leak, stats) -> tuple[Tensor, Tensor]:
    """Empty gradient of x, and sums: those of bias, weight, slope per channel, (2 or 3, C)."""
    return torch.empty_like(x), stats.new_empty((2 if slope is None else 3, x.shape[1]))


def _backward_launches(grad_y, x, weight, bias, slope, leak, stats, grad_x, sums) -> list:
    """The launches that fill grad_x and sums."""
    b, c = x.shape[:2]
    given, grid = _walk(grad_x, tile=4096, steps=4, grad_y=grad_y, x=x, grad_x=grad_x)
    spans = triton.cdiv(given["n_rows"], given["ROWS"] * given["steps"])
    parts = spans * given["n_cols"] // c
    partials = stats.new_empty((b, 3, spans, given["n_cols"]))
    means = stats.new_empty((b, 3, c))
    given |= dict(partials=partials, means=means, sums=sums, stats=stats, B=b)
    given |= dict(weight=weight, bias=bias, slope=slope, n=x[0, 0].numel(), parts=parts)
    given |= dict(LEAK=leak, SLOPES=0 if slope is None else len(slope))
    block, blocks = _merge(parts, c)
    return [
        _launch(_tile_sums, grid, given),
        _launch(_merge_sums, (blocks, len(sums)), given | block),
        _launch(_backward, grid, given),
    ]


def _run(launches: list, like: Tensor) -> None:
    """Start the launches in order, on the GPU of `like`."""
    with torch.cuda.device_of(like):  # Triton launches on the current GPU
        for kernel, grid, arguments in launches:
            kernel[grid](**arguments)


@torch.library.custom_op("mirror_unet::norm_act", mutates_args=())
def _op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, slope: Tensor | None, leak: float,
    residual: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:
    """y and the statistics; three launches."""
    y, stats = _forward_outputs(x)
    _run(_forward_launches(x, weight, bias, slope, leak, residual, eps, y, stats), x)
    return y, stats


@torch.library.custom_op("mirror_unet::norm_act_backward", mutates_args=())
def _backward_op(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None,
    slope: Tensor | None, leak: float, stats: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the parameters; three launches."""
    arguments = (grad_y, x, weight, bias, slope, leak, stats)
    outputs = _backward_outputs(*arguments)
    _run(_backward_launches(*arguments, *outputs), x)
    return outputs


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
    grad_x, sums = _backward_op(grad_output, x, weight, bias, slope, ctx.leak, stats)
    dslope = None if slope is None else sums[2]
    grads = _parameter_grads(weight, bias, slope, sums[1], sums[0], dslope)
    dresidual = None if ctx.residual_dtype is None else grad_output.to(ctx.residual_dtype)
    return grad_x, *grads, None, dresidual, None


_op.register_fake(_forward_outputs)
_backward_op.register_fake(_backward_outputs)
_op.register_autograd(_gradients, setup_context=_save)


def norm_act_triton(x, weight=None, bias=None, slope=None, residual=None, eps=1e-5) -> Tensor:
    """`norm_act_ref` as Triton kernels; first derivatives only."""
    slope, leak = _check(x, weight, bias, slope, residual)
    return _op(x, weight, bias, slope, leak, residual, eps)[0]
