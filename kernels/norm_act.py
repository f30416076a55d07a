"""Instance norm -> affine -> PReLU -> + residual, the operation that follows almost every convolution of the model.

For each instance i = (sample b, channel c), over the n voxels v of its volume:

    mu_i = mean_v x[i, v]        var_i = mean_v (x[i, v] - mu_i)^2        xhat = (x - mu_i) / sqrt(var_i + eps)
    z = weight_c xhat + bias_c
    y = max(z, 0) + slope_c min(z, 0) + residual

Statistics are those of the volume at hand, in training and at test time alike: there are no running averages.
"""

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
    """The op in plain PyTorch, on any device.

    Args:
        x: (B, C, D, H, W), contiguous or channels_last_3d; the result has the same layout.
        weight, bias: (C,) affine parameters; None: 1 and 0.
        slope: PReLU slope of negative values, (1,) or (C,); None: no activation.
        residual: added last, of x's shape.
        upcast: compute in float64, for tests.

    Returns y, of x's shape and dtype.
    """
    dtype = x.dtype
    # Half precision goes up to float32: PyTorch's bfloat16 group norm returns NaN gradients on CPU for channels_last_3d.
    work = torch.float64 if upcast or dtype == torch.float64 else torch.float32
    x, weight, bias, slope, residual = (t if t is None else t.to(work) for t in (x, weight, bias, slope, residual))
    if not x.is_contiguous():
        # In channels_last_3d PyTorch takes the variance as E[x^2] - E[x]^2, wrong for a mean far from 0. Take the mean off first: the
        # result does not depend on it, so neither does the gradient, and it can be detached.
        x = x - x.detach().mean((2, 3, 4), keepdim=True)
    # Group norm with a group a channel *is* instance norm, and unlike F.instance_norm it keeps channels_last_3d.
    y = F.group_norm(x, x.shape[1], weight, bias, eps)
    if slope is not None:
        y = F.prelu(y, slope)
    return (y if residual is None else y + residual).to(dtype)
