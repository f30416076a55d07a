"""Keep less for the backward pass: remember how a tensor was made instead of the tensor.

A convolution needs its input in its backward pass, so autograd keeps it. But that input is often
cheap to compute again from tensors that are kept anyway: a norm and PReLU of the previous
convolution's output, or a concatenation. Such a tensor carries a function, `x.again`, that makes it
once more, and the convolution keeps that function instead of x. Between forward and backward pass,
a v3 step at 96^3 then keeps 185 bytes per voxel of the patch instead of 291, and pays with one more
pass of `norm_act` per unit. Both counts are those of tests/test_mirror_unet.py: what autograd saves
without the parameters, and the batch (clean and corrupted images, int64 labels).

Under torch.compile both functions are plain calls: the compiler has its own recomputation.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def recomputable(make: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """make(*inputs), carrying the call; inputs that are recomputable are then made again, too."""
    y = make(*inputs)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        sources = [getattr(x, "again", lambda x=x: x) for x in inputs]

        @torch.no_grad()
        def again() -> Tensor:
            return make(*[source() for source in sources])

        y.again = again  # type: ignore
    return y


def is_recomputable(x: Tensor) -> bool:
    """Whether x carries the call that makes it."""
    return hasattr(x, "again")


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x); its backward pass keeps x only if x is not recomputable."""
    again = getattr(x, "again", None)
    if again is None:
        return conv(x)
    input_id = id(x)  # the hooks live as long as the graph, so they must not hold x itself

    def pack(saved):
        return again if id(saved) == input_id else saved

    def unpack(packed):
        return packed() if packed is again else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return conv(x)
