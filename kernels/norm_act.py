"""Instance norm -> affine -> PReLU -> + residual, the operation that follows almost every convolution of the model.

For each instance i = (sample b, channel c), over the n voxels v of its volume:

    mu_i = mean_v x[i, v]        var_i = mean_v (x[i, v] - mu_i)^2        r_i = 1 / sqrt(var_i + eps)
    xhat = (x - mu_i) r_i
    z = weight_c xhat + bias_c
    y = max(z, 0) + slope_c min(z, 0) + residual

Statistics are those of the volume at hand, in training and at test time alike: there are no running averages. The variance is taken
in a second pass, around the mean: E[x^2] - E[x]^2 would lose every digit where the mean is large.

Backward. With g = dL/dy and dz = g where z > 0, slope_c g elsewhere; sums run over v, those of parameters also over b:

    d residual = g        d slope_c = sum g min(z, 0)        d bias_c = sum dz        d weight_c = sum dz xhat
    dx = weight_c r_i (dz - mean_v dz - xhat mean_v(dz xhat))

xhat and z are recomputed from x, so what is kept for the backward pass is x and two numbers an instance.

Layout. In NCDHW the voxels of an instance lie side by side: rows (B, C, n). In channels_last_3d its channels do, C of them, as few as
one, and loops over so few numbers are slow; so `k` voxels make a row, (B, n / k, k C), with each instance's numbers repeated k times.
Nothing is copied, and the result has x's layout. (PyTorch's own `F.instance_norm` copies to NCDHW; its channels-last group norm takes
the variance the unstable way, and in bfloat16 on CPU hands back NaN gradients.)
"""

from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_act_ref(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    slope: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    upcast: bool = False,
) -> Tensor:
    """The definition in plain PyTorch, differentiated by autograd: what the fast paths are tested against.

    Args:
        x: (B, C, D, H, W), contiguous or channels_last_3d; the result has the same layout.
        weight, bias: (C,) affine parameters; None: 1 and 0.
        slope: PReLU slope of negative values, (1,) or (C,); None: no activation.
        residual: added last, of x's shape.
        upcast: compute in float64.

    Returns y, of x's shape and dtype; computed in float32 at least.
    """
    dtype, work = x.dtype, torch.float64 if upcast or x.dtype == torch.float64 else torch.float32
    x, weight, bias, slope, residual = (t if t is None else t.to(work) for t in (x, weight, bias, slope, residual))
    var, mean = torch.var_mean(x, (2, 3, 4), correction=0, keepdim=True)
    y = (x - mean) * (var + eps).rsqrt()
    if weight is not None:
        y = y * weight.view(-1, 1, 1, 1)
    if bias is not None:
        y = y + bias.view(-1, 1, 1, 1)
    if slope is not None:
        y = F.prelu(y, slope)
    return (y if residual is None else y + residual).to(dtype)


def norm_act_plain(x, weight=None, bias=None, slope=None, residual=None, eps=1e-5) -> Tensor:
    """`norm_act_ref` with the backward pass of this file's head, in plain PyTorch on any device; first derivatives only."""
    return _NormAct.apply(x, weight, bias, slope, residual, eps)


class _Rows:
    """Views of (B, C, D, H, W) tensors in x's layout as rows, and sums over an instance's voxels."""

    def __init__(self, x: Tensor):
        self.shape, self.n = x.shape, x[0, 0].numel()
        last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
        self.format = torch.channels_last_3d if last else torch.contiguous_format
        self.work = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.k = gcd(self.n, 16) if last else 0  # voxels a row; 0: NCDHW

    def of(self, t: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, C, n) or (B, n / k, k C); a view where t has x's layout and dtype."""
        t = t.to(self.work, memory_format=self.format)
        b, c = self.shape[:2]
        return t.permute(0, 2, 3, 4, 1).reshape(b, -1, self.k * c) if self.k else t.reshape(b, c, -1)

    def back(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `of`."""
        b, c, *size = self.shape
        t = rows.view(b, *size, c).permute(0, 4, 1, 2, 3) if self.k else rows.view(self.shape)
        return t.to(dtype)

    def spread(self, numbers: Tensor) -> Tensor:
        """(1 or B, C) -> a shape that broadcasts over rows."""
        return numbers.to(self.work).repeat(1, self.k)[:, None] if self.k else numbers.to(self.work)[..., None]

    def total(self, rows: Tensor) -> Tensor:
        """Sum over an instance's voxels: (B, C)."""
        return rows.sum(1).view(len(rows), self.k, -1).sum(1) if self.k else rows.sum(2)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, slope, residual, eps):
        rows = _Rows(x)
        flat = rows.of(x)
        mean = rows.total(flat) / rows.n  # (B, C)
        centred = flat - rows.spread(mean)
        r = (rows.total(centred * centred) / rows.n + eps).rsqrt()  # (B, C)
        ctx.save_for_backward(x, weight, bias, slope, mean, r)
        ctx.rows, ctx.residual = rows, residual is not None
        y = _affine(rows, centred.mul_(rows.spread(r)), weight, bias)
        if slope is not None:
            y = y.clamp(min=0).add_(y.clamp_(max=0).mul_(rows.spread(slope.expand(rows.shape[1])[None])))
        return rows.back(y if residual is None else y.add_(rows.of(residual)), x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, weight, bias, slope, mean, r = ctx.saved_tensors
        rows, residual = ctx.rows, g if ctx.residual else None
        g, r = rows.of(g), rows.spread(r)
        xhat = (rows.of(x) - rows.spread(mean)).mul_(r)
        dz, dslope = g, None
        if slope is not None:
            z = _affine(rows, xhat, weight, bias)
            s = rows.spread(slope.expand(rows.shape[1])[None])
            dz = torch.ops.aten.threshold_backward(g, z, 0.0).mul_(1 - s).addcmul_(g, s)  # g where z > 0, else s g
            dslope = rows.total(z.clamp_(max=0).mul_(g)).sum(0)  # (C,)
            dslope = (dslope.sum(0, keepdim=True) if len(slope) == 1 else dslope).to(slope.dtype)
        dbias, dweight = rows.total(dz), rows.total(dz * xhat)  # (B, C)
        scale = r if weight is None else r * rows.spread(weight[None])
        dx = torch.addcmul(dz - rows.spread(dbias / rows.n), xhat, rows.spread(dweight / rows.n), value=-1).mul_(scale)
        dweight = None if weight is None else dweight.sum(0).to(weight.dtype)
        dbias = None if bias is None else dbias.sum(0).to(bias.dtype)
        return rows.back(dx, x.dtype), dweight, dbias, dslope, residual, None


def _affine(rows: _Rows, xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """weight xhat + bias; a new tensor, as xhat is needed again."""
    z = xhat.clone() if weight is None else xhat * rows.spread(weight[None])
    return z if bias is None else z.add_(rows.spread(bias[None]))


norm_act_triton = norm_act_plain
