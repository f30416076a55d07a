"""Keep less for the backward pass: remember how a tensor was made instead of the tensor.

A convolution needs its input in its backward pass, so autograd keeps it. But that input is often
cheap to compute again from tensors that are kept anyway: a norm and PReLU of the previous
convolution's output, or a concatenation. Such a tensor carries a function, `x.again`, that makes it
once more, and the convolution keeps that function instead of x. A v3 step at 96^3 then keeps 178
bytes per voxel of the patch instead of 284 (counted by tests/test_mirror_unet.py), and pays with
one launch more per unit, as `y.known` keeps the statistics. A CPU has the memory, and keeps x.

`convolve` also corrects a choice of PyTorch's: on a CPU, most convolutions of a single sample take
im2col, which is two to four times slower per sample than oneDNN, which larger batches take.

Under torch.compile both functions are plain calls: the compiler has its own recomputation.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

DEVICES = {"cuda"}  # whose memory runs short


def recomputable(make: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """make(*inputs), carrying the call; inputs that are recomputable are then made again, too.

    If the result y of the first call has an attribute `known`, a dict of what is worth keeping, the
    later call is make(*inputs, **y.known).
    """
    y = make(*inputs)
    if y.device.type in DEVICES and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        sources = [getattr(x, "again", lambda x=x: x) for x in inputs]
        known = getattr(y, "known", {})

        @torch.no_grad()
        def again() -> Tensor:
            return make(*[source() for source in sources], **known)

        y.again = again  # type: ignore
    return y


def is_recomputable(x: Tensor) -> bool:
    """Whether x carries the call that makes it."""
    return hasattr(x, "again")


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x); its backward pass keeps x only if x is not recomputable.

    A single sample that PyTorch would give to im2col goes to oneDNN, in oneDNN's layout.
    """
    again, alone = getattr(x, "again", None), takes_im2col(conv, x)
    if again is None and not alone:
        return conv(x)
    kept = again or x.detach()
    source = _OneDNN.apply(x, True) if alone else x
    source_id = id(source)  # the hooks live as long as the graph, so they must not hold it

    def pack(saved):
        return kept if id(saved) == source_id else saved

    def unpack(packed):
        if packed is not kept:
            return packed
        made = again() if again else kept
        return made.to_mkldnn() if alone else made

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = conv(source)
    return _OneDNN.apply(y, False) if alone else y


class _OneDNN(torch.autograd.Function):
    """x.to_mkldnn() or y.to_dense(); autograd's own formulas would keep x and y for backward."""

    @staticmethod
    def forward(ctx, x, into):
        ctx.into = into
        return x.to_mkldnn() if into else x.to_dense()

    @staticmethod
    def backward(ctx, grad):
        return grad.to_dense() if ctx.into else grad.to_mkldnn(), None


def takes_im2col(conv: nn.Module, x: Tensor) -> bool:
    """Whether PyTorch's CPU would compute conv(x) by im2col: one sample, and C D H <= 20,480.

    This is the rule of `use_mkldnn` in ATen's Convolution.cpp for an ungrouped float32 convolution.
    A `released` convolution trains as the release does, to the rounding: a value that falls on the
    other side of a PReLU's kink changes a gradient by 1e-3, and neither side is the better one.
    """
    if torch.is_grad_enabled() and getattr(conv, "released", False):
        return False
    small = x.shape[0] == 1 and x.shape[1:4].numel() <= 20_480
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and isinstance(conv, nn.Conv3d)
    if not (small and plain and torch.backends.mkldnn.is_available()):
        return False
    return not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
