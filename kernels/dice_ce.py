# SPDX-License-Identifier: MIT, (c) 2026 the Mirror U-Net from scratch contributors
# Needs torch >= 2.8 and, for its kernels, triton >= 3.4; nothing else.
"""Soft Dice + cross entropy, the segmentation loss of every system here, in one pass each way.

With p = softmax(logits) over C classes, t the one-hot labels, w_c class weights and sums over the
voxels v that are not ignored:

    I_c = sum_v p_cv t_cv    P_c = sum_v p_cv    T_c = sum_v t_cv    N_c = sum_v t_cv (-log p_cv)
    Dice_c = (2 I_c + smooth_nr) / (P_c + T_c + smooth_dr)
    CE = sum_c w_c N_c / sum_c w_c T_c
    loss = dice_weight mean_c (1 - Dice_c) + ce_weight CE

The mean over c leaves out the background (class 0) unless include_background; CE always has it.
`batch=True` sums over the batch before taking the ratio (one Dice per class); `batch=False` takes
one Dice per sample and class. The denominator has no squares.

Backward. The loss depends on the volume only through the 4 C sums. Let k = dice_weight / (number
of Dice values in the mean) and den_c = P_c + T_c + smooth_dr. By the quotient rule, for a class
that is in the mean (a_c = b_c = 0 for one that is not),

    d loss / d p_cv = a_c + b_c t_cv        a_c = k Dice_c / den_c        b_c = -2 k / den_c

The softmax has d p_c / d l_j = p_c ([c = j] - p_j), the cross entropy the familiar p - t. So, at a
voxel with label y,

    d loss / d l_cv = p_c (a_c + b_c t_c - sum_j p_j a_j - p_y b_y) + v_y (p_c - t_c)
    v_c = ce_weight w_c / sum_j w_j T_j

The gradient of a voxel needs its logits, its label and 3 C coefficients. No softmax, one-hot
labels or mask are stored: to read logits and labels again is cheaper than to write and read p.

Two classes. Only z = (logit of the wrong class) - (logit of the right class) matters. The
probability of the wrong class is q = sigmoid(z), -log p_y = log(1 + e^z), and the gradient is

    d loss / d l_wrong = q (v_y + (1 - q) m_y) = - d loss / d l_right    m_y = a_other - a_y - b_y

Bytes per voxel (float32 logits, C = 2, uint8 labels):

    forward    read 8 + 1                   the sums: a few numbers per 2048 voxels
    backward   read 8 + 1, write 8          26 in all, 14 in bfloat16

Each pass reads its inputs once; there are two, because the gradient of the first voxel depends on
the sums over all. They replace softmax -> one-hot -> products -> sums next to log-softmax ->
gather, about 228 bytes. The trade-off: exponentials are computed twice, while memory is awaited.

Layout. A tile is BLOCK voxels x C classes. Either axis can be the contiguous one:

    NCDHW               l0 l0 l0 l0 ...  l1 l1 l1 l1 ...      C rows of BLOCK logits
    channels_last_3d    l0 l1 l0 l1 l0 l1 l0 l1 ...           one row of BLOCK C logits, then split

Both are read 128 bits at a time (the second for 2, 4, 8, ... classes). Slices and expanded tensors
are read in place by their strides: no copy, but no wide loads.

Stage one sums over tiles: each program of a sample writes its 4 C partial sums. Stage two, a
single program, adds these in a fixed order in float64 and computes loss, Dice and coefficients.
Stage three is the backward pass. There are no atomics: equal inputs give equal bits.

Several labels per voxel (sigmoid=True, for regions that overlap): p = sigmoid(logits), each t_cv is
0 or 1, and N_c sums the binary cross entropy. It is divided by the number of voxels V_c, a fifth
sum, instead of T_c. No class is the background, and each has its own derivative:

    d loss / d l_cv = p_cv (1 - p_cv) (a_c + b_c t_cv) + v_c (p_cv - t_cv)
"""

from itertools import pairwise, product
from math import isfinite, log

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows
    triton = None

# ---------------------------------------------------------------------------------- the definition
def dice_ce_ref(
    logits: Tensor, target: Tensor, include_background: bool = False, batch: bool = True,
    smooth_nr: float = 1e-5, smooth_dr: float = 1e-5, dice_weight: float = 1.0,
    ce_weight: float = 1.0, class_weight: Tensor | None = None, ignore_index: int | None = None,
    sync: bool = False, sigmoid: bool = False, upcast: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loss in plain PyTorch, differentiated by autograd: the reference for the fast paths.

    logits: (B, C, D, H, W) with C >= 2, or another number of spatial axes; any floating dtype.
        Computed in float32, or in float64 for float64 logits or with upcast=True.
    target: labels in [0, C), (B, 1, D, H, W) or (B, D, H, W); any integer dtype or bool.
    class_weight: (C,) weights of the cross entropy; Dice is not weighted.
    ignore_index: voxels with this label, which may lie outside [0, C), count in neither term.
    sync: compute the loss of the joint batch of all processes in the default torch.distributed
        group, the same on each. Its gradient is multiplied by their number, because
        DistributedDataParallel averages gradients: N processes then equal one with the N-fold
        batch. batch=False needs equally large batches on all processes.
    sigmoid: C >= 1 independent labels per voxel, with binary cross entropy. The target then has the
        shape of the logits (if C = 1, the classes' axis may be missing) and holds 0, 1, or
        ignore_index, per class; floating dtypes are accepted, too. All classes are in the mean.

    Returns (loss, dice): a scalar, and the detached soft Dice of all C classes with background:
    (C,), or (B, C) for this process's samples with batch=False. If every voxel is ignored, the
    cross entropy is 0. Raises ValueError for shapes or dtypes that do not fit, and for a label
    outside [0, C) that is not ignore_index; so does `dice_ce_plain`. In `dice_ce_triton`, where
    checking labels would make the host wait for the GPU, such a label makes loss and gradient NaN.
    """
    target = _checked(logits, target, class_weight, sync, sigmoid)
    # Half precision would overflow in the sums over a volume, so convert before anything else.
    logits = logits.to(torch.float64 if upcast else _accumulator(logits.dtype))
    valid = torch.ones_like(target, dtype=logits.dtype)  # (B, D, H, W), sigmoid: (B, C, D, H, W)
    if ignore_index is not None:
        valid = (target != ignore_index).to(logits.dtype)
    label = torch.where(valid > 0, target, 0)
    wrong = (label < 0) | (label >= (2 if sigmoid else logits.shape[1])) | (label != label.long())
    if wrong.any():
        raise ValueError(_label_error(target[wrong][0], logits.shape[1], ignore_index, sigmoid))
    if sigmoid:
        one_hot = label * valid
        p = logits.sigmoid() * valid
        nll = -F.logsigmoid(logits * (2 * one_hot - 1))
        weight = valid
    else:
        log_p = F.log_softmax(logits, dim=1)
        label, valid = label.long().unsqueeze(1), valid.unsqueeze(1)  # (B, 1, D, H, W)
        one_hot = torch.zeros_like(log_p).scatter_(1, label, 1.0) * valid
        p = log_p.exp() * valid
        nll, weight = -log_p, one_hot
    spatial = list(range(2, logits.dim()))
    axes = [0, *spatial] if batch else spatial
    intersection = (p * one_hot).sum(axes)
    total = p.sum(axes) + one_hot.sum(axes)
    if class_weight is not None:
        weight = weight * class_weight.to(p).view(-1, *[1] * len(spatial))
    nll = torch.where(weight == 0, 0, nll * weight).sum()
    weight = weight.sum()
    if sync:
        # The derivative of an all-reduce is an all-reduce: it sums the processes' (equal) losses.
        from torch.distributed.nn.functional import all_reduce
        nll, weight = all_reduce(nll), all_reduce(weight)
        if batch:
            intersection, total = all_reduce(intersection), all_reduce(total)
    dice = (2 * intersection + smooth_nr) / (total + smooth_dr)
    dice_loss = (1 - (dice if include_background or sigmoid else dice[..., 1:])).mean()
    if sync and not batch:
        dice_loss = all_reduce(dice_loss) / dist.get_world_size()
    cross_entropy = nll / weight.clamp_min(torch.finfo(p.dtype).tiny)
    return dice_weight * dice_loss + ce_weight * cross_entropy, dice.detach()


def _checked(logits, target, class_weight, sync, sigmoid) -> Tensor:
    """The labels as (B, D, H, W), sigmoid: (B, C, D, H, W), bool as uint8, if all arguments fit."""
    shape, given = tuple(logits.shape), tuple(target.shape)
    if sigmoid and shape[1:2] == (1,) and target.dim() == logits.dim() - 1:
        target = target.unsqueeze(1)
    elif not sigmoid and target.dim() == logits.dim():
        target = target.squeeze(1)
    wanted = shape if sigmoid else shape[:1] + shape[2:]
    if len(shape) < 3 or shape[1] < (1 if sigmoid else 2) or tuple(target.shape) != wanted:
        softmax = "need C >= 2 and labels of shape (B, 1, ...) or (B, ...)"
        expected = "with sigmoid=True need labels of the same shape (B, C, ...)"
        raise ValueError(f"logits {shape} {expected if sigmoid else softmax}, got {given}")
    if not logits.is_floating_point():
        raise ValueError(f"logits: expected a floating dtype, got {logits.dtype}")
    if target.is_floating_point() and not sigmoid:
        raise ValueError(f"target: expected integer labels, got {target.dtype}; pass target.long()")
    if class_weight is not None and class_weight.shape != shape[1:2]:
        weights = f"expected one weight per class, {shape[1:2]}, got {tuple(class_weight.shape)}"
        raise ValueError(f"class_weight: {weights}")
    if sync and not (dist.is_available() and dist.is_initialized()):
        raise ValueError("sync=True: call torch.distributed.init_process_group first")
    return target.view(torch.uint8) if target.dtype == torch.bool else target


def _label_error(label, classes: int, ignore_index: int | None, sigmoid: bool) -> str:
    """What to say about a label that is not allowed."""
    allowed = "be 0 or 1" if sigmoid else f"lie in [0, {classes})"
    return f"target: labels must {allowed}, or be ignore_index ({ignore_index}); got {label}"


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ------------------------------------------------------ the derived backward pass in plain PyTorch
SLAB = 1 << 18  # logits per slab on a CPU: they fit the cache of a thread


def dice_ce_plain(logits, target, *options, **named) -> tuple[Tensor, Tensor]:
    """`dice_ce_ref` with the backward pass derived above, in PyTorch; first derivatives only. Made
    for CPUs: on a GPU it waits, because it checks labels on the host."""
    return _call(False, logits, target, *options, **named)


def _slabs(logits, target, ignore_index):
    """Walk through a batch in slabs along the first spatial axis, which fit the cache of a CPU.

    Yields the slab's places in target and logits, logits x (C, d, H, W), labels y (d, H, W) or,
    with sigmoid, (C, d, H, W), and valid like y, 0 if ignored (y is 0, too), else 1, or None if no
    voxel can be ignored. x, y and valid have the dtype of the arithmetic.
    """
    samples, c, depth = logits.shape[:3]
    step = max(1, depth)
    if logits.device.type == "cpu":  # on a GPU, a launch costs more than a cache miss
        size = SLAB if torch.get_num_threads() == 1 else 4 * SLAB  # waking threads costs time, too
        step = max(1, size // max(1, c * logits.shape[3:].numel()))
    dtype = _accumulator(logits.dtype)
    limits = torch.finfo if target.is_floating_point() else torch.iinfo
    limits = limits(target.dtype)  # an ignore_index of -1 must not match the uint8 label 255
    ignores = ignore_index is not None and limits.min <= ignore_index <= limits.max
    for sample, start in product(range(samples), range(0, depth, step)):
        slab = slice(start, start + step)
        place = (sample, slice(None), slab)
        where = place if target.dim() == logits.dim() else (sample, slab)
        x, y, valid = logits[place].to(dtype), target[where].to(dtype, copy=True), None
        if ignores:
            valid = (target[where] != ignore_index).to(dtype)
            y *= valid
        yield where, place, x, y, valid


def _sums_plain(logits, target, ignore_index, weighted) -> Tensor:
    """I, P, T, N (with sigmoid also V) of every class and sample: (4 or 5, C, B) float64."""
    b, c = logits.shape[:2]
    sigmoid = target.dim() == logits.dim()
    sums = torch.zeros(5 if sigmoid else 4, c, b, dtype=torch.float64, device=logits.device)
    for where, (sample, *_), x, y, valid in _slabs(logits, target, ignore_index):
        low, high = y.aminmax()
        top = 2 if sigmoid else c
        if low < 0 or high >= top or (target.is_floating_point() and (y != y.trunc()).any()):
            wrong = target[where][(y < 0) | (y >= top) | (y != y.trunc())][0]
            raise ValueError(_label_error(wrong, c, ignore_index, sigmoid))
        part = _two_class_sums(x, y, valid, weighted) if c == 2 and not sigmoid else None
        if part is None:
            counts = torch.ones_like(y) if valid is None else valid
            if sigmoid:
                p = x.sigmoid() * counts
                quantities = p * y, p, y, F.logsigmoid(x * (2 * y - 1)) * -counts, counts
            else:
                label = y.long()[None]  # (1, d, H, W)
                t = torch.zeros_like(x).scatter_(0, label, counts[None])
                log_p = F.log_softmax(x, 0)
                p = log_p.exp() * counts
                quantities = p * t, p, t, -log_p.gather(0, label) * t
            part = torch.stack([_sum(rows.flatten(1)) for rows in quantities])
        sums[:, :, sample] += part
    return sums


def _sum(x: Tensor) -> Tensor:
    """Sum along the last axis: 8192 numbers at a time, then these sums in float64."""
    whole = x.shape[-1] // 8192 * 8192
    sums = x[..., :whole].unflatten(-1, (-1, 8192)).sum(-1)
    return sums.sum(-1, dtype=torch.float64) + x[..., whole:].sum(-1, dtype=torch.float64)


def _finish_plain(
    sums, class_weight, include_background, smooth_nr, smooth_dr, dice_weight, ce_weight, scale
) -> tuple[Tensor, Tensor, Tensor]:
    """From sums (4, C, G): loss (), Dice (G, C), and scale times the coefficients (2 G + 1, C):
    a and b of every group, then v."""
    inter, p, t, nll, *voxels = sums.transpose(1, 2)  # (G, C) each
    den = p + t + smooth_dr
    dice = (2 * inter + smooth_nr) / den
    scored = torch.ones_like(dice)
    scored[:, 0] = float(include_background)
    k = dice_weight * scored / scored.sum()
    w = torch.ones_like(nll[0]) if class_weight is None else class_weight.to(nll)
    weight = (w * (voxels[0] if voxels else t)).sum()
    per_weight = torch.where(weight == 0, 0, 1 / weight)
    loss = (k * (1 - dice)).sum() + ce_weight * per_weight * (w * nll).sum()
    ab = torch.stack([k * dice / den, -2 * k / den], 1).flatten(0, 1)  # (2 G, C)
    return loss, dice, scale * torch.cat([ab, (ce_weight * per_weight * w)[None]])


def _grad_plain(logits, target, coefficients, ignore_index) -> Tensor:
    """d loss / d logits, in the layout of the logits; the coefficients include grad_output."""
    grad = torch.empty_like(logits)
    rows = coefficients[(...,) + (None,) * (logits.dim() - 2)]  # (2 G + 1, C, 1, 1, 1)
    for _, place, x, y, valid in _slabs(logits, target, ignore_index):
        group = 2 * place[0] if len(rows) > 3 else 0
        a, b, v = rows[group], rows[group + 1], rows[-1]
        if y.dim() == x.dim():  # sigmoid
            p = x.sigmoid()
            g = (a + b * y) * p * (1 - p) + v * (p - y)
        elif len(x) == 2:
            _two_class_grad(x, y, valid, a, b, v, out=grad[place])
            continue
        else:
            t = torch.zeros_like(x).scatter_(0, y.long()[None], 1.0)
            p = x.softmax(0)
            g = a + b * t
            g = p * (g - (p * g).sum(0)) + (v * t).sum(0) * (p - t)
        grad[place] = g if valid is None else g * valid
    return grad


# ------------------------------------------------------------- fast path for two classes on a CPU
# Readers can skip this section: the general code above computes the same, in five times the time.
def _two_class_sums(x, t, valid, weighted) -> Tensor | None:
    """The (4, 2) sums of one slab by the two-class formulas, or None if e^z overflows."""
    z = x[1] - x[0]
    z.addcmul_(z, t, value=-2)
    e = z.mul_(1 / log(2)).exp2_()  # e^z; 2^x is twice as fast as e^x here
    if valid is not None:
        e *= valid
    # Without class weights, it does not matter which class the cross entropy is counted for.
    n1 = _sum_log(1 + e * t) if weighted else 0.0
    total = 1 + e
    q = e.div_(total)
    n = _sum_log(total)
    wrong = _sum(q.flatten()).item()
    if not isfinite(wrong + n):
        return None
    wrong1 = _sum(q.mul_(t).flatten()).item()
    wrong0 = wrong - wrong1
    t1 = _sum(t.flatten()).item()
    t0 = float(t.numel() if valid is None else valid.sum()) - t1
    i0, i1 = t0 - wrong0, t1 - wrong1
    sums = [[i0, i1], [i0 + wrong1, i1 + wrong0], [t0, t1], [n - n1, n1]]
    return torch.tensor(sums, dtype=torch.float64, device=x.device)


def _sum_log(factors: Tensor) -> float:
    """The sum of logarithms, each of a product of four, as one costs as much as ten products.
    Overwrites the factors."""
    flat = factors.flatten()
    whole = flat.numel() // 4 * 4
    for half in (whole // 2, whole // 4):
        flat[:half].mul_(flat[half : 2 * half])
    return (_sum(flat[: whole // 4].log_()) + _sum(flat[whole:].log_())).item()


def _two_class_grad(x, t, valid, a, b, v, out) -> None:
    """d loss / d l_1 = v_t (p - t) + u_t p (1 - p), with p the probability of class 1,
    u_0 = m_0 = a_1 - a_0 - b_0 and u_1 = -m_1 = a_1 - a_0 + b_1 = u_0 + b_0 + b_1."""
    p = (x[1] - x[0]).sigmoid_()
    u = torch.add(a[1] - a[0] - b[0], t, alpha=(b[0] + b[1]).item())
    u = torch.ops.aten.sigmoid_backward.grad_input(u, p, grad_input=u)  # u_t p (1 - p)
    error = p.sub_(t)
    if valid is not None:
        u *= valid
        error *= valid
    v_t = v[0] if v[0] == v[1] else v[0] + (v[1] - v[0]) * t
    torch.addcmul(u, error, v_t, out=out[1])
    torch.neg(out[1], out=out[0])


# ---------------------------------------------------------------------------------- Triton kernels
TILE = 4096  # numbers of each kind per tile, 16 per thread: z of two classes, p of more
PROGRAMS = 2048  # of stage one, at most (or one per sample); each loops over its tiles
WARPS = 8  # with four, ptxas spills 8 bytes in one kernel for sm_80


def dice_ce_triton(logits, target, *options, **named) -> tuple[Tensor, Tensor]:
    """`dice_ce_ref` in three launches: sums, loss, gradient (backward); first derivatives only."""
    return _call(True, logits, target, *options, **named)


def dice_ce(logits, target, *options, **named) -> tuple[Tensor, Tensor]:
    """`dice_ce_ref` by the path that fits the logits' device: a GPU's kernels, or plain PyTorch."""
    return _call(logits.is_cuda and triton is not None, logits, target, *options, **named)


if triton is not None:
    # In all kernels, a tile starts at voxel number `first` of a sample, and `count` of its BLOCK
    # voxels exist. CP is C, padded to a power of two; ACC is the dtype of the arithmetic.
    # Strides are those of (B, D, H, W) and, if a tensor has it, C. FLAT: the spatial axes have one
    # stride, that of W. INTERLEAVED: so have the logits' voxels and classes (channels_last_3d).

    @triton.jit
    def _offsets(
        first, height, width, strides, FLAT: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr
    ):
        """Offsets of the voxels of a tile: (BLOCK,)."""
        voxel = first + tl.arange(0, BLOCK)
        if FLAT:
            offsets = voxel * strides[3]
        else:
            voxel = voxel.to(INDEX)  # 64-bit division is slow
            row = voxel // width
            offsets = (row // height).to(tl.int64) * strides[1]
            offsets += (row % height).to(tl.int64) * strides[2]
            offsets += (voxel % width).to(tl.int64) * strides[3]
        return offsets

    @triton.jit
    def _labels(target, offsets, mask, ignore_index):
        """Labels, and which of them count, in the shape of the offsets."""
        y = tl.load(target + offsets, mask=mask, other=0)
        if target.dtype.element_ty.is_int() and target.dtype.element_ty.primitive_bitwidth < 32:
            y = y.to(tl.int32)  # an ignore_index of -1 equals no uint8 label
        if ignore_index is not None:
            mask = mask & (y != ignore_index)
        return y, mask

    @triton.jit
    def _two_classes(
        logits, offsets, first, count, stride_c, y,
        INTERLEAVED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
    ):
        """z, q = sigmoid(z) and 1 - q, both to full relative precision, and e^-|z|: (BLOCK,)."""
        if INTERLEAVED:
            i = tl.arange(0, 2 * BLOCK)
            x = tl.load(logits + 2 * first + i, mask=i < 2 * count, other=0.0)
            l0, l1 = tl.split(tl.reshape(x, (BLOCK, 2)))
        else:
            mask = tl.arange(0, BLOCK) < count
            l0 = tl.load(logits + offsets, mask=mask, other=0.0)
            l1 = tl.load(logits + stride_c + offsets, mask=mask, other=0.0)
        l0, l1 = l0.to(ACC), l1.to(ACC)
        z = tl.where(y == 1, l0 - l1, l1 - l0)
        e = tl.exp(-tl.abs(z))
        larger = 1.0 / (1.0 + e)
        smaller = e * larger
        return z, tl.where(z > 0, larger, smaller), tl.where(z > 0, smaller, larger), e

    @triton.jit
    def _load(
        logits, offsets, first, count, stride_c, C: tl.constexpr, CP: tl.constexpr,
        INTERLEAVED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
    ):
        """All logits of each voxel: (CP, BLOCK). Those of padding classes are -inf, so p = 0."""
        c = tl.arange(0, CP)[:, None]
        if INTERLEAVED:
            i = tl.arange(0, C * BLOCK)
            x = tl.load(logits + C * first + i, mask=i < C * count, other=0.0)
            x = tl.trans(tl.reshape(x, (BLOCK, C)))
        else:
            mask = (c < C) & (tl.arange(0, BLOCK) < count)[None, :]
            x = tl.load(logits + c.to(tl.int64) * stride_c + offsets[None, :], mask=mask, other=0.0)
        return tl.where(c < C, x.to(ACC), float("-inf"))

    @triton.jit
    def _sums_kernel(
        logits, logits_strides,  # (B, C, D, H, W)
        target, target_strides,  # (B, D, H, W)
        partials,  # (4, C, B, programs), with sigmoid (5, ...), contiguous
        ignore_index, samples, n, height, width, programs, tiles,
        C: tl.constexpr, CP: tl.constexpr, SIGMOID: tl.constexpr, FLAT: tl.constexpr,
        INTERLEAVED: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
    ):
        """Stage one: I, P, T, N (and V) of every class, over `tiles` tiles of one sample."""
        sample = tl.program_id(0) // programs
        program = tl.program_id(0) % programs
        logits += sample.to(tl.int64) * logits_strides[0]
        target += sample.to(tl.int64) * target_strides[0]
        c = tl.arange(0, CP)
        inter = tl.zeros((CP,), ACC)
        pred = tl.zeros((CP,), ACC)
        true = tl.zeros((CP,), ACC)
        nll = tl.zeros((CP,), ACC)
        voxels = tl.zeros((CP,), ACC)
        for tile in range(tiles):
            first = (program.to(tl.int64) * tiles + tile) * BLOCK
            count = tl.minimum(n - first, BLOCK).to(tl.int32)
            offsets = _offsets(first, height, width, target_strides, FLAT, INDEX, BLOCK)
            mask = tl.arange(0, BLOCK) < count
            if SIGMOID:
                offsets = (c.to(tl.int64) * target_strides[4])[:, None] + offsets[None, :]
                mask = (c < C)[:, None] & mask[None, :]
            y, valid = _labels(target, offsets, mask, ignore_index)
            offsets = _offsets(first, height, width, logits_strides, FLAT, INDEX, BLOCK)
            stride_c = logits_strides[4]
            # The masks become numbers that the sums multiply by: a GPU has few registers for bits,
            # and a number takes one register per voxel. A label outside [0, C) must not go
            # unnoticed, so such a voxel counts as NaN.
            if SIGMOID:
                x = _load(logits, offsets, first, count, stride_c, C, CP, INTERLEAVED, ACC, BLOCK)
                one = tl.where((y == 0) | (y == 1), 1.0, float("nan"))
                one = tl.where(valid, one, 0.0)
                e = tl.exp(-tl.abs(x))
                p = one * tl.where(x > 0, 1.0, e) / (1.0 + e)
                loss = tl.maximum(tl.where(y == 1, -x, x), 0.0) + tl.log(1.0 + e)
                t = tl.where(y == 1, one, 0.0)
                inter += tl.sum(p * t, 1)
                pred += tl.sum(p, 1)
                true += tl.sum(t, 1)
                nll += tl.sum(one * loss, 1)
                voxels += tl.sum(one, 1)
            elif C == 2:
                z, wrong, right, e = _two_classes(
                    logits, offsets, first, count, stride_c, y, INTERLEAVED, ACC, BLOCK
                )
                loss = tl.maximum(z, 0.0) + tl.log(1.0 + e)  # log(1 + e^z)
                t1 = tl.where(valid & (y == 1), 1.0, 0.0)
                t0 = tl.where(valid & (y != 1), tl.where(y == 0, 1.0, float("nan")), 0.0)
                right0 = tl.sum(t0 * right, 0)
                right1 = tl.sum(t1 * right, 0)
                wrong0 = tl.sum(t0 * wrong, 0)
                wrong1 = tl.sum(t1 * wrong, 0)
                inter += tl.where(c == 0, right0, right1)
                pred += tl.where(c == 0, right0 + wrong1, right1 + wrong0)
                true += tl.where(c == 0, tl.sum(t0, 0), tl.sum(t1, 0))
                nll += tl.where(c == 0, tl.sum(t0 * loss, 0), tl.sum(t1 * loss, 0))
            else:
                x = _load(logits, offsets, first, count, stride_c, C, CP, INTERLEAVED, ACC, BLOCK)
                x -= tl.max(x, 0)[None, :]
                p = tl.exp(x)
                total = tl.sum(p, 0)[None, :]
                one = tl.where((y >= 0) & (y < C), 1.0, float("nan"))
                one = tl.where(valid, one, 0.0)[None, :]
                p *= one / total
                t = tl.where(y[None, :] == c[:, None], one, 0.0)
                inter += tl.sum(p * t, 1)
                pred += tl.sum(p, 1)
                true += tl.sum(t, 1)
                nll += tl.sum(tl.where(t == 1.0, tl.log(total) - x, 0.0), 1)
        out = partials + (c * samples + sample) * programs + program
        step = C * samples * programs
        tl.store(out, inter, mask=c < C)
        tl.store(out + step, pred, mask=c < C)
        tl.store(out + 2 * step, true, mask=c < C)
        tl.store(out + 3 * step, nll, mask=c < C)
        if SIGMOID:
            tl.store(out + 4 * step, voxels, mask=c < C)

    @triton.jit
    def _total(
        partials, quantity, group, groups, length,
        C: tl.constexpr, CP: tl.constexpr, STEP: tl.constexpr,
    ):
        """The sum of a group's partials of one quantity, for every class: (CP,) float64."""
        c = tl.arange(0, CP)[:, None]
        row = partials + ((quantity * C + c).to(tl.int64) * groups + group) * length
        tile = tl.zeros((CP, STEP), tl.float64)
        for start in range(0, length, STEP):
            i = start + tl.arange(0, STEP)[None, :]
            tile += tl.load(row + i, mask=(i < length) & (c < C), other=0.0).to(tl.float64)
        return tl.sum(tile, 1)

    @triton.jit
    def _finish_kernel(
        partials,  # (4 or 5, C, G, length), contiguous
        class_weight,  # (C,) or None
        loss,  # ()
        dice,  # (G, C)
        coefficients,  # (2 G + 1, C): a and b of each group, v
        groups, length, smooth_nr: tl.float64, smooth_dr: tl.float64,
        dice_weight: tl.float64, ce_weight: tl.float64, scale: tl.float64, STEP: tl.constexpr,
        BACKGROUND: tl.constexpr, SIGMOID: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    ):
        """Stage two, one program: loss, Dice, and scale times the coefficients, from the sums."""
        c = tl.arange(0, CP)
        mask = c < C
        scored = mask if BACKGROUND else mask & (c > 0)
        k = tl.where(scored, 1.0, 0.0).to(tl.float64)
        k *= dice_weight / (tl.sum(k, 0) * groups)
        w = tl.where(mask, 1.0, 0.0).to(tl.float64)
        if class_weight is not None:
            w = tl.load(class_weight + c, mask=mask, other=0.0).to(tl.float64)
        dice_loss = tl.zeros((CP,), tl.float64)
        weight = tl.zeros((CP,), tl.float64)
        nll = tl.zeros((CP,), tl.float64)
        for g in range(groups):
            true = _total(partials, 2, g, groups, length, C, CP, STEP)
            den = _total(partials, 1, g, groups, length, C, CP, STEP) + true + smooth_dr
            den = tl.where(mask, den, 1.0)
            inter = _total(partials, 0, g, groups, length, C, CP, STEP)
            ratio = (2 * inter + smooth_nr) / den
            tl.store(dice + g * C + c, ratio, mask=mask)
            tl.store(coefficients + 2 * g * C + c, scale * k * ratio / den, mask=mask)
            tl.store(coefficients + (2 * g + 1) * C + c, scale * -2 * k / den, mask=mask)
            dice_loss += tl.where(scored, k * (1 - ratio), 0.0)
            voxels = true
            if SIGMOID:
                voxels = _total(partials, 4, g, groups, length, C, CP, STEP)
            weight += w * voxels
            nll += w * _total(partials, 3, g, groups, length, C, CP, STEP)
        weight = tl.sum(weight, 0)
        # If every voxel is ignored, the cross entropy is 0.
        per_weight = tl.where(weight == 0, 0.0, ce_weight / tl.where(weight == 0, 1.0, weight))
        tl.store(loss, tl.sum(dice_loss, 0) + per_weight * tl.sum(nll, 0))
        tl.store(coefficients + 2 * groups * C + c, scale * per_weight * w, mask=mask)

    @triton.jit
    def _grad_kernel(
        grad_output,  # ()
        logits, logits_strides,  # (B, C, D, H, W)
        target, target_strides,  # (B, D, H, W)
        grad, grad_strides,  # (B, C, D, H, W)
        coefficients,  # (2 G + 1, C), contiguous
        ignore_index, group_step, last, n, height, width, programs,
        C: tl.constexpr, CP: tl.constexpr, SIGMOID: tl.constexpr, FLAT: tl.constexpr,
        INTERLEAVED: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
    ):
        """d loss / d logits of one tile."""
        sample = tl.program_id(0) // programs
        program = tl.program_id(0) % programs
        logits += sample.to(tl.int64) * logits_strides[0]
        target += sample.to(tl.int64) * target_strides[0]
        grad += sample.to(tl.int64) * grad_strides[0]
        stride_c = logits_strides[4]
        first = program.to(tl.int64) * BLOCK
        count = tl.minimum(n - first, BLOCK).to(tl.int32)
        mask = tl.arange(0, BLOCK) < count
        c = tl.arange(0, CP)
        each = (c < C)[:, None] & mask[None, :]
        offsets = _offsets(first, height, width, target_strides, FLAT, INDEX, BLOCK)
        if SIGMOID:
            offsets = (c.to(tl.int64) * target_strides[4])[:, None] + offsets[None, :]
        y, valid = _labels(target, offsets, each if SIGMOID else mask, ignore_index)
        offsets = _offsets(first, height, width, logits_strides, FLAT, INDEX, BLOCK)
        out = _offsets(first, height, width, grad_strides, FLAT, INDEX, BLOCK)
        scale = tl.load(grad_output).to(ACC)
        a = coefficients + sample * group_step  # group_step is 0 if all samples form one group
        b = a + C
        v = coefficients + last
        if C == 2 and not SIGMOID:
            z, wrong, right, e = _two_classes(
                logits, offsets, first, count, stride_c, y, INTERLEAVED, ACC, BLOCK
            )
            d = tl.load(a) - tl.load(a + 1)
            m = scale * tl.where(y == 1, d - tl.load(b + 1), -d - tl.load(b))
            v_y = tl.where(y == 1, tl.load(v + 1), tl.load(v))
            g = tl.where(valid, wrong * (scale * v_y + right * m), 0.0)
            g = tl.where(y == 1, -g, g)  # d loss / d l1
            g0, g1 = (-g).to(grad.dtype.element_ty), g.to(grad.dtype.element_ty)
            if INTERLEAVED:
                row = tl.reshape(tl.join(g0, g1), (C * BLOCK,))
            else:
                tl.store(grad + out, g0, mask=mask)
                tl.store(grad + grad_strides[4] + out, g1, mask=mask)
        else:
            a = tl.load(a + c, mask=c < C, other=0.0)[:, None]
            b = tl.load(b + c, mask=c < C, other=0.0)[:, None]
            v = tl.load(v + c, mask=c < C, other=0.0)[:, None]
            x = _load(logits, offsets, first, count, stride_c, C, CP, INTERLEAVED, ACC, BLOCK)
            if SIGMOID:
                e = tl.exp(-tl.abs(x))
                p = tl.where(x > 0, 1.0, e) / (1.0 + e)
                t = tl.where(y == 1, 1.0, 0.0)
                g = (a + b * t) * e / (1.0 + e) / (1.0 + e) + v * (p - t)
            else:
                valid = valid[None, :]
                p = tl.exp(x - tl.max(x, 0)[None, :])
                p /= tl.sum(p, 0)[None, :]
                t = y[None, :] == c[:, None]
                ab = a + tl.where(t, b, 0.0)
                v_y = tl.sum(tl.where(t, v, 0.0), 0)[None, :]
                g = p * (ab - tl.sum(p * ab, 0)[None, :]) + v_y * (p - tl.where(t, 1.0, 0.0))
            g = tl.where(valid, scale * g, 0.0).to(grad.dtype.element_ty)
            if INTERLEAVED:
                row = tl.reshape(tl.trans(g), (C * BLOCK,))
            else:
                rows = grad + (c.to(tl.int64) * grad_strides[4])[:, None]
                tl.store(rows + out[None, :], g, mask=each)
        if INTERLEAVED:
            i = tl.arange(0, C * BLOCK)
            tl.store(grad + C * first + i, row, mask=i < C * count)


# ------------------------------------------------------------------------------ kernel launches
def _flat_stride(size, stride) -> int | None:
    """The stride from voxel to voxel if the axes can be walked as one, else None."""
    axes = [(n, s) for n, s in zip(size, stride) if n != 1] or [(1, 1)]
    flat = all(outer == n * inner for (_, outer), (n, inner) in pairwise(axes))
    return axes[-1][1] if flat else None


def _geometry(logits: Tensor, **others: Tensor) -> dict:
    """Sizes, strides and the tile's shape as kernel arguments."""
    c, size = logits.shape[1], logits.shape[2:]
    n = size.numel()
    padded = triton.next_power_of_2(c)
    tensors = {"logits": logits, **others}
    steps = {name: _flat_stride(size, x.stride()[-len(size) :]) for name, x in tensors.items()}
    flat = None not in steps.values()
    packed = [x.stride(1) == 1 and steps[k] == c for k, x in tensors.items() if k != "target"]
    interleaved = flat and c == padded and all(packed)
    args = {}
    for name, x in tensors.items():
        spatial = (0, 0, steps[name]) if flat else (0, 0, *x.stride()[-len(size) :])[-3:]
        channel = x.stride()[1 : 1 + x.dim() - 1 - len(size)]  # labels have none, unless sigmoid
        args[f"{name}_strides"] = (x.stride(0), *spatial, *channel)
    # On a CPU it is the interpreter that runs, which takes milliseconds per program.
    tile = 2 * TILE if logits.device.type == "cpu" else TILE
    args |= {"n": n, "height": 1 if flat else ([1, *size])[-2], "width": 1 if flat else size[-1]}
    args |= {"C": c, "CP": padded, "FLAT": flat, "INTERLEAVED": interleaved}
    sigmoid = others["target"].dim() == logits.dim()
    args |= {"BLOCK": max(1, tile // (1 if c == 2 and not sigmoid else padded)), "SIGMOID": sigmoid}
    args |= {"INDEX": tl.int32 if n < 2**31 - tile else tl.int64}
    return args | {"ACC": tl.float64 if logits.dtype == torch.float64 else tl.float32}


def _sums_launch(logits: Tensor, target: Tensor, ignore_index: int | None):
    """Kernel, grid and arguments of stage one."""
    b, c = logits.shape[:2]
    args = _geometry(logits, target=target)
    tiles = triton.cdiv(args["n"], args["BLOCK"])
    per_program = max(1, triton.cdiv(tiles, max(1, PROGRAMS // max(1, b))))
    programs = max(1, triton.cdiv(tiles, per_program))
    quantities = 5 if args["SIGMOID"] else 4
    partials = logits.new_empty((quantities, c, b, programs), dtype=_accumulator(logits.dtype))
    args |= {"logits": logits, "target": target, "partials": partials, "samples": b}
    args |= {"ignore_index": ignore_index, "programs": programs, "tiles": per_program}
    return _sums_kernel, (programs * b,), args


def _finish_launch(
    partials, class_weight, dtype, background, smooth_nr, smooth_dr, dice_weight, ce_weight, scale
):
    """Kernel, grid and arguments of stage two; partials (4 or 5, C, G, length), logits' dtype."""
    quantities, c, groups, length = partials.shape
    padded = triton.next_power_of_2(c)
    outputs = {"loss": (), "dice": (groups, c), "coefficients": (2 * groups + 1, c)}
    dtype = _accumulator(dtype)
    args = {name: partials.new_empty(shape, dtype=dtype) for name, shape in outputs.items()}
    args |= dict(partials=partials, class_weight=class_weight, BACKGROUND=background, C=c)
    args |= dict(smooth_nr=smooth_nr, smooth_dr=smooth_dr, scale=float(scale), CP=padded)
    args |= dict(dice_weight=dice_weight, ce_weight=ce_weight, groups=groups, length=length)
    args |= dict(SIGMOID=quantities == 5, STEP=max(1, 2048 // padded))
    return _finish_kernel, (1,), args


def _grad_launch(grad_output, logits, target, coefficients, ignore_index):
    """Kernel, grid and arguments of the backward pass; grad has the layout of the logits."""
    grad = torch.empty_like(logits)
    rows, c = coefficients.shape
    args = _geometry(logits, target=target, grad=grad)
    args |= {"grad_output": grad_output, "logits": logits, "target": target, "grad": grad}
    args |= {"coefficients": coefficients, "ignore_index": ignore_index}
    args |= {"group_step": 2 * c if rows > 3 else 0, "last": (rows - 1) * c}
    programs = triton.cdiv(args["n"], args["BLOCK"])
    return _grad_kernel, (programs * len(logits),), args | {"programs": programs}


def _run(kernel, grid, args) -> dict:
    if grid[0]:
        with torch.cuda.device_of(next(x for x in args.values() if isinstance(x, Tensor))):
            kernel[grid](**args, num_warps=WARPS)
    return args


# ------------------------------------------------------------------------------------ custom ops
def _call(
    fused, logits, target, include_background=False, batch=True, smooth_nr=1e-5, smooth_dr=1e-5,
    dice_weight=1.0, ce_weight=1.0, class_weight=None, ignore_index=None, sync=False, sigmoid=False,
):
    """Check and prepare the arguments, then run the op. fused: by Triton kernels."""
    target = _checked(logits, target, class_weight, sync, sigmoid)
    if logits.dim() > 5:  # merge axes for the kernels; flatten copies only if strides forbid a view
        target = target.flatten(target.dim() - logits.dim() + 2)
        logits = logits.flatten(2)
    if class_weight is not None:
        class_weight = class_weight.detach().to(logits.device).contiguous()
    settings = (include_background or sigmoid, batch, smooth_nr, smooth_dr, dice_weight, ce_weight)
    loss, dice, _ = _dice_ce(logits, target, class_weight, *settings, ignore_index, sync, fused)
    return loss, (dice[0] if batch else dice).detach()


@torch.library.custom_op("mirror_unet::dice_ce", mutates_args=())
def _dice_ce(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, include_background: bool,
    batch: bool, smooth_nr: float, smooth_dr: float, dice_weight: float, ce_weight: float,
    ignore_index: int | None, sync: bool, fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), Dice (G, C) and coefficients (2 G + 1, C): G = 1, or B with batch=False."""
    if fused:
        partials = _run(*_sums_launch(logits, target, ignore_index))["partials"]
    else:
        partials = _sums_plain(logits, target, ignore_index, class_weight is not None)[..., None]
    processes = dist.get_world_size() if sync else 1
    if sync:
        partials = partials.sum(3, keepdim=True, dtype=torch.float64)
        if batch:
            partials = partials.sum(2, keepdim=True)
        gathered = [torch.empty_like(partials) for _ in range(processes)]
        dist.all_gather(gathered, partials)
        partials = torch.cat(gathered, 2)  # (4 or 5, C, processes * B or processes, 1)
    if batch:
        partials = partials.flatten(2).unsqueeze(2)  # (4 or 5, C, 1, all partial sums)
    settings = (include_background, smooth_nr, smooth_dr, dice_weight, ce_weight, processes)
    if fused:
        args = _run(*_finish_launch(partials, class_weight, logits.dtype, *settings))
        loss, dice, coefficients = args["loss"], args["dice"], args["coefficients"]
    else:
        results = _finish_plain(partials.sum(3), class_weight, *settings)
        dtype = _accumulator(logits.dtype)
        loss, dice, coefficients = (x.to(dtype).contiguous() for x in results)
    if sync and not batch:  # keep what belongs to this process's samples
        b, rank = len(logits), dist.get_rank()
        dice = dice[rank * b : (rank + 1) * b].clone()
        own = coefficients[2 * rank * b : 2 * (rank + 1) * b]
        coefficients = torch.cat([own, coefficients[-1:]])
    return loss, dice, coefficients


@_dice_ce.register_fake
def _(logits, target, class_weight, include_background, batch, *rest):
    c = logits.shape[1]
    groups = 1 if batch else logits.shape[0]
    new = logits.to(_accumulator(logits.dtype)).new_empty
    return new(()), new((groups, c)), new((2 * groups + 1, c))


@torch.library.custom_op("mirror_unet::dice_ce_backward", mutates_args=())
def _dice_ce_backward(
    grad_output: Tensor, logits: Tensor, target: Tensor, coefficients: Tensor,
    ignore_index: int | None, fused: bool,
) -> Tensor:
    """d loss / d logits times grad_output, ()."""
    if not fused:
        return _grad_plain(logits, target, grad_output * coefficients, ignore_index)
    return _run(*_grad_launch(grad_output, logits, target, coefficients, ignore_index))["grad"]


@_dice_ce_backward.register_fake
def _(grad_output, logits, target, coefficients, ignore_index, fused):
    return torch.empty_like(logits)


def _setup_context(ctx, inputs, output):
    logits, target, *_, ignore_index, sync, fused = inputs
    ctx.save_for_backward(logits, target, output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no launches that fill zeros for Dice and coefficients
    ctx.options = ignore_index, fused


def _backward(ctx, grad_output, *_):
    if grad_output is None:
        return (None,) * 12
    return _dice_ce_backward(grad_output, *ctx.saved_tensors, *ctx.options), *[None] * 11


_dice_ce.register_autograd(_backward, setup_context=_setup_context)
