"""Instance norm -> affine -> PReLU -> + residual, the operation that follows almost every convolution of the model.

For each instance i = (sample b, channel c), over the n voxels v of its volume:

    mu_i = mean_v x[i, v]        var_i = mean_v (x[i, v] - mu_i)^2        r_i = 1 / sqrt(var_i + eps)
    xhat = (x - mu_i) r_i
    z = weight_c xhat + bias_c
    y = max(z, 0) + slope_c min(z, 0) + residual

Statistics are those of the volume at hand, in training and at test time alike: there are no running averages. The variance is taken
around the mean: E[x^2] - E[x]^2 would lose every digit where the mean is large.

Backward. With g = dL/dy and dz = g where z > 0, slope_c g elsewhere; sums run over v, those of parameters also over b:

    d residual = g        d slope_c = sum g min(z, 0)        d bias_c = sum dz        d weight_c = sum dz xhat
    dx = weight_c r_i (dz - mean_v dz - xhat mean_v(dz xhat))

xhat and z are recomputed from x, so what is kept for the backward pass is x and two numbers an instance.

Bytes an element, in float32. An instance is too large for a multiprocessor's memory, and its mean is known only once all of it was
read, so nothing moves less than: forward, x twice and y once, 12 (+ 4 for the residual); backward, x and g twice and dx once, 20. The
Triton kernels take 12.01 and 20.02 in NCDHW, 12.07 and 20.07 in channels_last_3d. Each way is three launches: partial sums of a tile,
a merge of the partials, and the pass that writes (and one more tiny sum where all channels have one slope). They replace some dozen
of PyTorch, which also keep three tensors in place of one; the price is that the backward pass computes z twice.

    statistics of a tile in registers: mean and M2 = sum (x - mean)^2, seen from the tile's first voxel
    two parts become one (Chan):       d = mean_b - mean_a    mean = mean_a + d n_b / n    M2 = M2_a + M2_b + d^2 n_a n_b / n

No atomics, so the same bits every time.

Layout. A sample is a matrix of rows (voxels) and columns (channels), and a program has a tile of it, wherever its cells lie:

    NCDHW               columns are far apart, rows side by side:  8192 x 1
    channels_last_3d    a row's columns lie side by side:          512 x 16, 64 bytes wide
                        few channels: K voxels make a row of K C columns, and column j belongs to channel j mod C
    any other view      rows are found by the strides of D, H and W: no copy, but no wide accesses either

The result has x's layout, and plain PyTorch below does the same with views. (PyTorch's own `F.instance_norm` copies to NCDHW; its
channels-last group norm takes the variance the unstable way, and in bfloat16 on CPU hands back NaN gradients.)
"""

from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the plain path does everything
    triton = None


def norm_act_ref(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    slope: Tensor | float | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    upcast: bool = False,
) -> Tensor:
    """The definition in plain PyTorch, differentiated by autograd: what the fast paths are tested against.

    Args:
        x: (B, C, D, H, W), floating; contiguous, channels_last_3d or a strided view. The result has x's layout.
        weight, bias: (C,) affine parameters; None: 1 and 0.
        slope: of negative values: (1,) or (C,) values (PReLU) or a number (LeakyReLU); None: no activation.
        residual: added last, of x's shape, in any layout.
        upcast: compute in float64.

    Returns y, of x's shape and dtype; computed in float32 at least. Raises ValueError for shapes that do not fit.
    """
    slope, leak = _check(x, weight, bias, slope, residual)
    dtype, work = x.dtype, torch.float64 if upcast or x.dtype == torch.float64 else torch.float32
    x, weight, bias, slope, residual = (t if t is None else t.to(work) for t in (x, weight, bias, slope, residual))
    var, mean = torch.var_mean(x, (2, 3, 4), correction=0, keepdim=True)
    y = (x - mean) * (var + eps).rsqrt()
    if weight is not None:
        y = y * weight.view(-1, 1, 1, 1)
    if bias is not None:
        y = y + bias.view(-1, 1, 1, 1)
    y = F.leaky_relu(y, leak) if slope is None else F.prelu(y, slope)
    return (y if residual is None else y + residual).to(dtype)


def _check(x, weight, bias, slope, residual) -> tuple[Tensor | None, float]:
    """Refuse, in a sentence, what does not fit. Returns the slope as (tensor, 1) or (None, number); no activation is a slope of 1."""
    if x.dim() != 5 or not x.is_floating_point():
        raise ValueError(f"x: expected floating (B, C, D, H, W), got {x.dtype} {tuple(x.shape)}")
    c, leak = x.shape[1], 1.0
    if not isinstance(slope, Tensor):
        slope, leak = None, leak if slope is None else float(slope)
    for name, t, sizes in (("weight", weight, (c,)), ("bias", bias, (c,)), ("slope", slope, (1, c))):
        if t is not None and (t.dim() != 1 or len(t) not in sizes):
            raise ValueError(f"{name}: expected {' or '.join(map(str, sizes))} values for {c} channels, got shape {tuple(t.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: expected the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    return slope, leak


# ------------------------------------------------------------------------------------------------------------ plain PyTorch
def norm_act_plain(x, weight=None, bias=None, slope=None, residual=None, eps=1e-5) -> Tensor:
    """`norm_act_ref` with the backward pass of this file's head, in plain PyTorch on any device; first derivatives only."""
    slope, leak = _check(x, weight, bias, slope, residual)
    return _NormAct.apply(x, weight, bias, slope, leak, residual, eps)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, slope, leak, residual, eps):
        k = _voxels_a_row(x)
        flat = _rows(x, x, k)
        n = x[0, 0].numel()
        mean = _total(flat, k) / n  # (B, C)
        centred = flat - _spread(mean, flat, k)
        r = (_total(centred * centred, k) / n + eps).rsqrt()  # (B, C)
        ctx.save_for_backward(x, weight, bias, slope, mean, r)
        ctx.leak, ctx.residual = leak, residual is not None
        scale = _spread(r if weight is None else r * weight.to(r), flat, k)
        y = centred.mul_(scale) if bias is None else torch.addcmul(_spread(bias[None], flat, k), centred, scale, out=centred)
        if slope is not None:  # F.prelu finds channels in dimension 1
            y = F.prelu(y.flatten(0, 1), _spread(slope.expand(x.shape[1])[None], flat, k).flatten()) if k else F.prelu(y, slope.to(y))
        elif leak != 1:
            y = F.leaky_relu(y, leak)
        if residual is not None:
            y = y.add_(_rows(residual, x, k).view_as(y))
        return _volume(y, x, k)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, slope, mean, r = ctx.saved_tensors
        k, n = _voxels_a_row(x), x[0, 0].numel()
        g = _rows(dy, x, k)
        xhat = (_rows(x, x, k) - _spread(mean, g, k)).mul_(_spread(r, g, k))
        dz, dslope = g, None
        if slope is not None or ctx.leak != 1:
            z = _affine(xhat, weight, bias, k)
            if slope is None:
                dz = torch.ops.aten.leaky_relu_backward(g, z, ctx.leak, False)
            else:  # g where z > 0, else s g
                dz = torch.ops.aten.threshold_backward(g, z, 0.0).lerp_(g, _spread(slope.expand(x.shape[1])[None], g, k))
                dslope = _total(z.clamp_(max=0).mul_(g), k).sum(0)  # (C,)
                dslope = (dslope if len(slope) > 1 else dslope.sum(0, keepdim=True)).to(slope.dtype)
        dbias, dweight = _total(dz, k), _total(dz * xhat, k)  # (B, C)
        dx = (dz - _spread(dbias / n, g, k)).addcmul_(xhat, _spread(dweight / n, g, k), value=-1)
        dx.mul_(_spread(r if weight is None else r * weight.to(r), g, k))
        dweight = None if weight is None else dweight.sum(0).to(weight.dtype)
        dbias = None if bias is None else dbias.sum(0).to(bias.dtype)
        return _volume(dx, x, k), dweight, dbias, dslope, None, dy if ctx.residual else None, None


def _voxels_a_row(x: Tensor) -> int:
    """For channels_last_3d, how many voxels make a row: loops over as few numbers as C are slow. 0 for NCDHW."""
    return gcd(x[0, 0].numel(), 16) if x.stride(1) == 1 and not x.is_contiguous() else 0


def _rows(t: Tensor, x: Tensor, k: int) -> Tensor:
    """(B, C, D, H, W) -> (B, C, n) or (B, n / k, k C), in float32 at least; a view where t has x's layout and that dtype."""
    b, c = x.shape[:2]
    t = t.to(torch.promote_types(x.dtype, torch.float32))
    return t.permute(0, 2, 3, 4, 1).reshape(b, -1, k * c) if k else t.reshape(b, c, -1)


def _volume(rows: Tensor, x: Tensor, k: int) -> Tensor:
    """The inverse of `_rows`, in x's dtype."""
    b, c, *size = x.shape
    return (rows.view(b, *size, c).permute(0, 4, 1, 2, 3) if k else rows.view(x.shape)).to(x.dtype)


def _spread(numbers: Tensor, rows: Tensor, k: int) -> Tensor:
    """(1 or B, C) -> a shape that broadcasts over rows, in their dtype."""
    numbers = numbers.to(rows.dtype)
    return torch.cat([numbers] * k, 1)[:, None] if k else numbers[..., None]  # (repeat takes three times as long)


def _total(rows: Tensor, k: int) -> Tensor:
    """Sum over an instance's voxels: (B, C)."""
    return rows.sum(1).view(len(rows), k, -1).sum(1) if k else rows.sum(2)


def _affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None, k: int) -> Tensor:
    """weight xhat + bias; a new tensor, as xhat is needed again."""
    if weight is None:
        return xhat.clone() if bias is None else xhat + _spread(bias[None], xhat, k)
    weight = _spread(weight[None], xhat, k)
    return xhat * weight if bias is None else torch.addcmul(_spread(bias[None], xhat, k), xhat, weight)


# ---------------------------------------------------------------------------------------------------------- Triton kernels
if triton is not None:

    @triton.jit
    def _program(n_cols, COLS: tl.constexpr):
        """What a program works on: its sample, the number of its span of rows, its columns (COLS,)."""
        blocks = tl.cdiv(n_cols, COLS)  # neighbours take neighbouring columns: in channels_last_3d they are neighbours in memory
        col = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
        return tl.program_id(1).to(tl.int64), tl.program_id(0) // blocks, col

    @triton.jit
    def _offsets(b, row, col, strides, height, width, FLAT: tl.constexpr):
        """Where the cells (row, col) of sample b lie, (COLS, ROWS), in 64 bits; strides: of sample, column, slice, line, row."""
        if FLAT:  # one stride walks all rows
            at = row.to(tl.int64) * strides[4]
        else:  # a row is a voxel (d, h, w) of a view
            d, h, w = row // width // height, row // width % height, row % width
            at = d.to(tl.int64) * strides[2] + h.to(tl.int64) * strides[3] + w.to(tl.int64) * strides[4]
        return b * strides[0] + (col.to(tl.int64) * strides[1])[:, None] + at[None, :]

    @triton.jit
    def _columns(stats, weight, bias, b, col, n_cols, channels):
        """mean, r, weight and bias of a program's columns, each (COLS, 1)."""
        c, there = col % channels, col < n_cols
        mean = tl.load(stats + b * 2 * channels + c, mask=there, other=0)
        r = tl.load(stats + (b * 2 + 1) * channels + c, mask=there, other=0)
        w = tl.full(col.shape, 1, r.dtype) if weight is None else tl.load(weight + c, mask=there, other=0).to(r.dtype)
        beta = tl.full(col.shape, 0, r.dtype) if bias is None else tl.load(bias + c, mask=there, other=0).to(r.dtype)
        return mean[:, None], r[:, None], w[:, None], beta[:, None]

    @triton.jit
    def _slope(slope, LEAK: tl.constexpr, SLOPES: tl.constexpr, col, n_cols, channels, work):
        """The slope of negative values: one for all columns, (1, 1), or one for each, (COLS, 1)."""
        if slope is None:
            return tl.full((1, 1), LEAK, work)
        elif SLOPES == 1:
            return tl.load(slope + tl.arange(0, 1)).to(work)[:, None]
        else:
            return tl.load(slope + col % channels, mask=col < n_cols, other=0).to(work)[:, None]

    @triton.jit
    def _tile_stats(
        x,  # (B, C, D, H, W), as n_rows x n_cols a sample
        partials,  # (B, 2, tiles, n_cols): mean of a tile's column, and sum of squares around it
        x_strides, height, width, n_rows, n_cols,
        FLAT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ):  # fmt: skip
        b, t, col = _program(n_cols, COLS)
        row = t * ROWS + tl.arange(0, ROWS)
        there = (col < n_cols)[:, None] & (row < n_rows)[None, :]
        work = partials.dtype.element_ty
        tile = tl.load(x + _offsets(b, row, col, x_strides, height, width, FLAT), mask=there, other=0).to(work)
        # Seen from the column's first value: that difference is exact where the mean is large, and so are sums of it.
        first = x + _offsets(b, t * ROWS + tl.arange(0, 1), col, x_strides, height, width, FLAT)
        origin = tl.load(first, mask=(col < n_cols)[:, None], other=0).to(work)  # (COLS, 1)
        d = tl.where(there, tile - origin, 0)
        shift = tl.sum(d, 1, keep_dims=True) / tl.minimum(ROWS, n_rows - t * ROWS)  # (COLS, 1)
        d = tl.where(there, d - shift, 0)
        tiles = tl.cdiv(n_rows, ROWS)
        out = partials + (b * 2 * tiles + t) * n_cols + col[:, None]
        tl.store(out, origin + shift, mask=(col < n_cols)[:, None])
        tl.store(out + tiles * n_cols, tl.sum(d * d, 1, keep_dims=True), mask=(col < n_cols)[:, None])

    @triton.jit
    def _merge_stats(
        partials,  # (B, 2, tiles, n_cols) = (B, 2, tiles K, C)
        stats,  # (B, 2, C): mean and 1 / standard deviation
        n_rows, n_cols, channels,
        EPS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, COLS: tl.constexpr,
    ):  # fmt: skip
        b, c = tl.program_id(1).to(tl.int64), tl.program_id(0) * COLS + tl.arange(0, COLS)
        in_row = n_cols // channels  # K
        parts = tl.cdiv(n_rows, ROWS) * in_row  # of a channel
        means = partials + b * 2 * parts * channels + c[:, None]
        # Chan's formula, block of partials by block; the mean starts at the first partial's, from which the others are not far.
        mean = tl.load(means, mask=(c < channels)[:, None], other=0)  # (COLS, 1)
        m2 = tl.zeros_like(mean)
        count = tl.full((), 0, partials.dtype.element_ty)
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)
            there = (c < channels)[:, None] & (part < parts)[None, :]
            size = tl.where(part < parts, tl.minimum(ROWS, n_rows - part // in_row * ROWS), 0)[None, :].to(mean.dtype)  # (1, PARTS)
            block = tl.sum(size)
            d = tl.load(means + part[None, :] * channels, mask=there, other=0) - mean
            e = tl.sum(tl.where(there, size * d, 0), 1, keep_dims=True) / block  # the block's mean, seen from the mean so far
            own = tl.load(means + (parts + part[None, :]) * channels, mask=there, other=0)
            m2 += tl.sum(tl.where(there, own + size * (d - e) * (d - e), 0), 1, keep_dims=True) + e * e * (count * block / (count + block))
            mean += e * (block / (count + block))
            count += block
        out = stats + b * 2 * channels + c[:, None]
        tl.store(out, mean, mask=(c < channels)[:, None])
        tl.store(out + channels, 1 / tl.sqrt(m2 / count + EPS), mask=(c < channels)[:, None])

    @triton.jit
    def _forward(
        x, y, residual,  # (B, C, D, H, W), as n_rows x n_cols a sample
        stats,  # (B, 2, C)
        weight, bias, slope,  # (C,), (C,), (1,) or (C,)
        x_strides, y_strides, residual_strides, height, width, n_rows, n_cols, channels,
        LEAK: tl.constexpr, SLOPES: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ):  # fmt: skip
        b, t, col = _program(n_cols, COLS)
        row = t * ROWS + tl.arange(0, ROWS)
        there = (col < n_cols)[:, None] & (row < n_rows)[None, :]
        tile = tl.load(x + _offsets(b, row, col, x_strides, height, width, FLAT), mask=there, other=0).to(stats.dtype.element_ty)
        mean, r, w, beta = _columns(stats, weight, bias, b, col, n_cols, channels)
        # y = max(z, 0) + slope min(z, 0) + residual
        z = w * ((tile - mean) * r) + beta
        out = tl.where(z > 0, z, z * _slope(slope, LEAK, SLOPES, col, n_cols, channels, z.dtype))
        if residual is not None:
            out += tl.load(residual + _offsets(b, row, col, residual_strides, height, width, FLAT), mask=there, other=0).to(out.dtype)
        tl.store(y + _offsets(b, row, col, y_strides, height, width, FLAT), out.to(y.dtype.element_ty), mask=there)

    @triton.jit
    def _tile_sums(
        dy, x,  # (B, C, D, H, W), as n_rows x n_cols a sample
        stats,  # (B, 2, C)
        weight, bias, slope,  # (C,), (C,), (1,) or (C,)
        partials,  # (B, 3, spans, n_cols): sums of dz, dz xhat and dy min(z, 0) over a span of a column
        dy_strides, x_strides, height, width, n_rows, n_cols, steps, channels,
        LEAK: tl.constexpr, SLOPES: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ):  # fmt: skip
        b, t, col = _program(n_cols, COLS)
        work = stats.dtype.element_ty
        mean, r, w, beta = _columns(stats, weight, bias, b, col, n_cols, channels)
        s = _slope(slope, LEAK, SLOPES, col, n_cols, channels, work)
        sum_dz = tl.zeros((COLS,), work)
        sum_dz_xhat = tl.zeros((COLS,), work)
        sum_g_z = tl.zeros((COLS,), work)
        for start in range(t * steps * ROWS, (t + 1) * steps * ROWS, ROWS):
            row = start + tl.arange(0, ROWS)
            there = (col < n_cols)[:, None] & (row < n_rows)[None, :]
            g = tl.load(dy + _offsets(b, row, col, dy_strides, height, width, FLAT), mask=there, other=0).to(work)
            tile = tl.load(x + _offsets(b, row, col, x_strides, height, width, FLAT), mask=there, other=0).to(work)
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
        partials,  # (B, 3, spans, n_cols) = (B, 3, parts, C): sums of dz, dz xhat and dy min(z, 0)
        means,  # (B, 3, C): means of them over an instance
        dparams,  # (2 or 3, C): sums over all samples, the gradients of bias, weight and slope
        batch, n, parts, channels,
        PARTS: tl.constexpr, COLS: tl.constexpr,
    ):  # fmt: skip
        c = tl.program_id(0) * COLS + tl.arange(0, COLS)
        s = tl.program_id(1)  # which of the sums
        total = tl.zeros((COLS,), partials.dtype.element_ty)
        for b in range(batch):
            sums = tl.zeros((COLS, PARTS), partials.dtype.element_ty)
            first = partials + (b * 3 + s) * parts * channels + c[:, None]
            for start in range(0, parts, PARTS):
                part = (start + tl.arange(0, PARTS))[None, :]
                sums += tl.load(first + part * channels, mask=(c < channels)[:, None] & (part < parts), other=0)
            instance = tl.sum(sums, 1)
            tl.store(means + (b * 3 + s) * channels + c, instance / n, mask=c < channels)
            total += instance
        tl.store(dparams + s * channels + c, total, mask=c < channels)

    @triton.jit
    def _backward(
        dy, x, dx,  # (B, C, D, H, W), as n_rows x n_cols a sample
        stats, means,  # (B, 2, C), (B, 3, C)
        weight, bias, slope,  # (C,), (C,), (1,) or (C,)
        dy_strides, x_strides, dx_strides, height, width, n_rows, n_cols, steps, channels,
        LEAK: tl.constexpr, SLOPES: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ):  # fmt: skip
        b, t, col = _program(n_cols, COLS)
        work = stats.dtype.element_ty
        mean, r, w, beta = _columns(stats, weight, bias, b, col, n_cols, channels)
        s = _slope(slope, LEAK, SLOPES, col, n_cols, channels, work)
        c = means + b * 3 * channels + col % channels
        mean_dz = tl.load(c, mask=col < n_cols, other=0)[:, None]
        mean_dz_xhat = tl.load(c + channels, mask=col < n_cols, other=0)[:, None]
        for start in range(t * steps * ROWS, (t + 1) * steps * ROWS, ROWS):
            row = start + tl.arange(0, ROWS)
            there = (col < n_cols)[:, None] & (row < n_rows)[None, :]
            g = tl.load(dy + _offsets(b, row, col, dy_strides, height, width, FLAT), mask=there, other=0).to(work)
            tile = tl.load(x + _offsets(b, row, col, x_strides, height, width, FLAT), mask=there, other=0).to(work)
            xhat = (tile - mean) * r
            z = w * xhat + beta
            dz = tl.where(z > 0, g, s * g)
            # dx = weight r (dz - mean dz - xhat mean(dz xhat))
            out = w * r * (dz - mean_dz - xhat * mean_dz_xhat)
            tl.store(dx + _offsets(b, row, col, dx_strides, height, width, FLAT), out.to(dx.dtype.element_ty), mask=there)


def _row_stride(t: Tensor) -> int | None:
    """The one stride that walks all voxels of a (B, C, D, H, W) tensor in order, or None where it takes more than one."""
    step = reach = None
    for size, stride in zip(reversed(t.shape[2:]), reversed(t.stride()[2:])):
        if size > 1 and step is not None and stride != reach:
            return None
        if size > 1:
            step, reach = stride if step is None else step, stride * size
    return step or 0


def _walk(like: Tensor, *tensors: Tensor | None, tile: int, steps: int) -> tuple[dict, list, tuple]:
    """How one launch walks its tensors, all (B, C, D, H, W): as n_rows x n_cols a sample, in tiles ROWS x COLS.

    A row is a voxel and a column a channel; where all are dense channels_last_3d, K voxels make a row. The tile is as wide as
    memory wants it for `like`: 64 bytes of channels, or voxels alone. Returns (sizes and tile, strides a tensor, grid).
    """
    b, c, depth, height, width = like.shape
    n = depth * height * width
    if n >= 2**31:
        raise ValueError(f"{n} voxels an instance: 2^31 - 1 is the most")
    strides = [None if t is None else t.stride() for t in tensors]
    walks = [None if t is None else _row_stride(t) for t in tensors]
    given = [(t.stride(), w) for t, w in zip(tensors, walks) if t is not None]
    flat = all(w is not None for _, w in given)
    last = c > 1 and like.stride(1) == 1 and not like.is_contiguous()
    k = gcd(n, 16 // gcd(c, 16)) if last and all(s[1] == 1 and w == c for s, w in given) else 1  # rows of a multiple of 16 elements
    if flat:
        strides = [s and (s[0], s[1], 0, 0, w * k) for s, w in zip(strides, walks)]
        height = width = 1  # not needed
    n_rows, n_cols = n // k, c * k
    cols = min(triton.next_power_of_2(n_cols), 64 // like.element_size()) if last else 1
    rows = min(triton.next_power_of_2(n_rows), tile // cols)
    cols = min(triton.next_power_of_2(n_cols), tile // rows)
    walk = {"height": height, "width": width, "n_rows": n_rows, "n_cols": n_cols, "FLAT": flat, "ROWS": rows, "COLS": cols}
    walk["num_warps"] = min(max(rows * cols // 512, 1), 16)
    if steps > 1:
        walk["steps"] = steps = min(steps, triton.cdiv(n_rows, rows)) if last else 1
    return walk, strides, (triton.cdiv(n_rows, rows * steps) * triton.cdiv(n_cols, cols), b)


def _block(parts: int, channels: int) -> dict:
    """The block of partials that a merging program takes at a time."""
    return {"PARTS": min(triton.next_power_of_2(parts), 128), "COLS": min(triton.next_power_of_2(channels), 16), "num_warps": 8}


def _forward_launches(x, weight, bias, slope, leak, residual, eps) -> tuple[Tensor, Tensor, list]:
    """y and stats, to be filled, and the launches (kernel, grid, arguments) that fill them."""
    (b, c), y, work = x.shape[:2], torch.empty_like(x), torch.promote_types(x.dtype, torch.float32)
    walk, (x_strides, y_strides, residual_strides), grid = _walk(y, x, y, residual, tile=8192, steps=1)
    n_rows, n_cols, rows = walk["n_rows"], walk["n_cols"], walk["ROWS"]
    partials = x.new_empty((b, 2, triton.cdiv(n_rows, rows), n_cols), dtype=work)
    stats = x.new_empty((b, 2, c), dtype=work)
    block = _block(partials[0, 0].numel() // c, c)
    merge = {"partials": partials, "stats": stats, "n_rows": n_rows, "n_cols": n_cols, "channels": c, "EPS": eps, "ROWS": rows} | block
    apply = {"x": x, "y": y, "residual": residual, "stats": stats, "weight": weight, "bias": bias, "slope": slope}
    apply |= {"x_strides": x_strides, "y_strides": y_strides, "residual_strides": residual_strides, "channels": c}
    return (
        y,
        stats,
        [
            (_tile_stats, grid, {"x": x, "partials": partials, "x_strides": x_strides} | walk),
            (_merge_stats, (triton.cdiv(c, block["COLS"]), b), merge),
            (_forward, grid, apply | {"LEAK": leak, "SLOPES": 0 if slope is None else len(slope)} | walk),
        ],
    )


def _backward_launches(dy, x, weight, bias, slope, leak, stats) -> tuple[Tensor, Tensor, list]:
    """dx and the parameters' gradients, to be filled, and the launches that fill them."""
    (b, c), dx = x.shape[:2], torch.empty_like(x)
    walk, (dy_strides, x_strides, dx_strides), grid = _walk(dx, dy, x, dx, tile=4096, steps=4)
    partials = stats.new_empty((b, 3, triton.cdiv(walk["n_rows"], walk["ROWS"] * walk["steps"]), walk["n_cols"]))
    means, dparams = stats.new_empty((b, 3, c)), stats.new_empty((2 if slope is None else 3, c))
    block = _block(partials[0, 0].numel() // c, c)
    merge = {"partials": partials, "means": means, "dparams": dparams, "batch": b, "n": x[0, 0].numel(), "channels": c}
    merge |= {"parts": partials[0, 0].numel() // c} | block
    both = {"dy": dy, "x": x, "stats": stats, "weight": weight, "bias": bias, "slope": slope}
    both |= {"dy_strides": dy_strides, "x_strides": x_strides, "channels": c}
    both |= {"LEAK": leak, "SLOPES": 0 if slope is None else len(slope)} | walk
    return (
        dx,
        dparams,
        [
            (_tile_sums, grid, {"partials": partials} | both),
            (_merge_sums, (triton.cdiv(c, block["COLS"]), len(dparams)), merge),
            (_backward, grid, {"dx": dx, "means": means, "dx_strides": dx_strides} | both),
        ],
    )


def _launch(like: Tensor, launches: list) -> None:
    with torch.cuda.device_of(like):  # Triton launches on the current GPU
        for kernel, grid, arguments in launches:
            kernel[grid](**arguments)


def compile_specs() -> list[dict]:
    """Every kernel as the ops launch it, for compiling it ahead of time: the launches on tensors that have shapes alone."""
    specs = []
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            for c, side in ((1, 96), (2, 96), (16, 48), (64, 24), (256, 16)):
                x = torch.empty((2, c, side, side, side), dtype=dtype, device="meta").to(memory_format=layout)
                w, s = torch.empty(c, device="meta"), torch.empty(1, device="meta")
                _, stats, forward = _forward_launches(x, w, w, s, 1.0, x, 1e-5)
                for kernel, _, arguments in forward + _backward_launches(x, x, w, w, s, 1.0, stats)[2]:
                    name = f"norm_act{kernel.__name__} {dtype} {'NCDHW' if layout == torch.contiguous_format else 'channels_last'} C={c}"
                    specs.append({"name": name.replace("torch.", ""), "kernel": kernel, "arguments": arguments})
    return specs


@torch.library.custom_op("mirror_unet::norm_act", mutates_args=())
def _op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, slope: Tensor | None, leak: float, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """y, and the mean and 1 / standard deviation of every instance, (B, 2, C); three launches."""
    y, stats, launches = _forward_launches(x, weight, bias, slope, leak, residual, eps)
    _launch(x, launches)
    return y, stats


@_op.register_fake
def _(x, weight, bias, slope, leak, residual, eps):
    return torch.empty_like(x), x.new_empty((x.shape[0], 2, x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("mirror_unet::norm_act_backward", mutates_args=())
def _backward_op(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, slope: Tensor | None, leak: float, stats: Tensor
) -> tuple[Tensor, Tensor]:
    """dx, and the gradients of bias, weight and, if there is one, a channel's slope, (2 or 3, C); three launches."""
    dx, dparams, launches = _backward_launches(dy, x, weight, bias, slope, leak, stats)
    _launch(x, launches)
    return dx, dparams


@_backward_op.register_fake
def _(dy, x, weight, bias, slope, leak, stats):
    return torch.empty_like(x), stats.new_empty((2 if slope is None else 3, x.shape[1]))


def _save(ctx, inputs, output):
    x, weight, bias, slope, ctx.leak, residual, _ = inputs
    ctx.save_for_backward(x, weight, bias, slope, output[1])
    ctx.residual = None if residual is None else residual.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no launch that fills zeros for it


def _gradients(ctx, dy, _):
    if dy is None:
        return (None,) * 7
    x, weight, bias, slope, stats = ctx.saved_tensors
    dx, dparams = _backward_op(dy, x, weight, bias, slope, ctx.leak, stats)
    dbias = None if bias is None else dparams[0].to(bias.dtype)
    dweight = None if weight is None else dparams[1].to(weight.dtype)
    dslope = None
    if slope is not None:
        dslope = (dparams[2] if len(slope) > 1 else dparams[2].sum(0, keepdim=True)).to(slope.dtype)
    return dx, dweight, dbias, dslope, None, None if ctx.residual is None else dy.to(ctx.residual), None


_op.register_autograd(_gradients, setup_context=_save)


def norm_act_triton(x, weight=None, bias=None, slope=None, residual=None, eps=1e-5) -> Tensor:
    """`norm_act_ref` as Triton kernels; first derivatives only."""
    slope, leak = _check(x, weight, bias, slope, residual)
    return _op(x, weight, bias, slope, leak, residual, eps)[0]
