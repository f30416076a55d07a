"""Soft Dice + cross entropy on logits, the segmentation loss of every system here, in one pass forward and one backward.

With p = softmax(logits) over C classes, t the one-hot labels, w_c class weights and sums over the voxels v that are not ignored:

    I_c = sum_v p_cv t_cv        P_c = sum_v p_cv        T_c = sum_v t_cv        N_c = sum_v t_cv (-log p_cv)
    Dice_c = (2 I_c + smooth_nr) / (P_c + T_c + smooth_dr)
    CE = sum_c w_c N_c / sum_c w_c T_c
    loss = dice_weight mean_c (1 - Dice_c) + ce_weight CE

The mean over c leaves the background out unless include_background; CE always has it. `batch=True` sums over the batch before
the ratio (one Dice a class), `batch=False` takes a Dice a sample and class. No squares in the denominator.

Backward. The loss depends on the volume through the 4 C sums alone. Let k = dice_weight / (number of Dice values in the mean) and
den_c = P_c + T_c + smooth_dr. For a class in the mean (a_c = b_c = 0 for one that is not), by the quotient rule,

    d loss / d p_cv = a_c + b_c t_cv        a_c = k Dice_c / den_c        b_c = -2 k / den_c

and through the softmax, d p_c / d l_j = p_c ([c = j] - p_j), with the cross entropy's well known p - t, at a voxel of label y:

    d loss / d l_cv = p_c (a_c + b_c t_c - sum_j p_j a_j - p_y b_y) + v_y (p_c - t_c)        v_c = ce_weight w_c / sum_j w_j T_j

So a voxel's gradient needs its own logits and label and 3 C coefficients. No softmax, one-hot or mask is kept: the backward pass reads
logits and labels once more, which is cheaper than writing and reading p.

Two classes. Only z = (logit of the wrong class) - (logit of the right one) matters. With q = sigmoid(z) the probability of being wrong,
-log p_y = log(1 + e^z), and the general formula shrinks to

    d loss / d l_wrong = q (v_y + (1 - q) m_y) = - d loss / d l_right        m_y = a_other - a_y - b_y

Bytes a voxel (float32 logits, C = 2, uint8 labels):

    forward    read 8 + 1                   the sums: a few numbers for 2048 voxels
    backward   read 8 + 1, write 8          26 in all, 14 in bfloat16

Forward and backward are apart by nature (the gradient of the first voxel depends on the sums over all), so each has to read its input;
nothing else is read or written. What this replaces, softmax -> one-hot -> products -> sums with log-softmax -> gather beside it, moves
about 228. The trade-off: the exponentials are taken twice, in a kernel that would otherwise wait for memory.

Layout. A tile is BLOCK voxels x C classes, whichever of the two axes is contiguous:

    NCDHW               l0 l0 l0 l0 ...  l1 l1 l1 l1 ...      the voxels of a class side by side: a row of BLOCK, C times
    channels_last_3d    l0 l1 l0 l1 l0 l1 l0 l1 ...           the classes of a voxel side by side: one row of BLOCK C, then split

Both are read 128 bits at a time (the second for 2, 4, 8, ... classes). Other strides, of slices and expanded tensors, are walked as they
are: without a copy, and without that width.

Stage one adds up tiles: program i of a sample writes its 4 C partial sums. Stage two, one program, adds them in a fixed order in
float64 and derives loss, Dice and coefficients. No atomics, so that equal inputs give equal bits. Three launches in all.
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


# ------------------------------------------------------------------------------------------------------------ the definition


def dice_ce_ref(
    logits: Tensor,
    target: Tensor,
    include_background: bool = False,
    batch: bool = True,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    class_weight: Tensor | None = None,
    ignore_index: int | None = None,
    sync: bool = False,
    upcast: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loss in plain PyTorch, differentiated by autograd, on any device: what the fast paths are tested against.

    Args:
        logits: (B, C, D, H, W), C >= 2, or any other number of spatial axes; any floating dtype; computed in float32 (float64 if given
            so, or with upcast=True).
        target: integer labels in [0, C), (B, 1, D, H, W) or (B, D, H, W), any integer dtype or bool.
        class_weight: (C,) weights of the cross entropy; Dice is not weighted.
        ignore_index: voxels with this label count neither in Dice nor in cross entropy; may lie outside [0, C).
        sync: the loss of the batch joined over all processes of the default torch.distributed group, the same on each of them. Its
            gradient is multiplied by their number, because DistributedDataParallel averages gradients: so N processes equal one process
            with the N-fold batch. batch=False takes the batch to be equally large on all.

    Returns (loss, dice): a scalar, and the detached soft Dice of all C classes, background included: (C,), or (B, C) of this process's
    samples with batch=False. If every voxel is ignored, cross entropy is 0. Raises ValueError for shapes or dtypes that do not fit.
    A label outside [0, C) that is not ignore_index is an error here and in `dice_ce_plain`; in `dice_ce_triton`, where checking would
    make the host wait for the GPU, it makes the loss and its gradient NaN.
    """
    target = _checked(logits, target, class_weight, sync)
    # Half precision would overflow in the sums over a volume: go up to float32 before anything else.
    log_p = F.log_softmax(logits.double() if upcast or logits.dtype == torch.float64 else logits.float(), dim=1)
    target = target.long()
    kept = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    label = torch.where(kept, target, 0).unsqueeze(1)  # (B, 1, D, H, W)

    p = log_p.exp() * kept.unsqueeze(1)
    one_hot = torch.zeros_like(log_p).scatter_(1, label, 1.0) * kept.unsqueeze(1)
    dims = [d for d in range(logits.dim()) if d != 1 and (batch or d != 0)]
    intersection, total = (p * one_hot).sum(dims), p.sum(dims) + one_hot.sum(dims)
    weight = kept.to(log_p.dtype)  # (B, D, H, W)
    if class_weight is not None:
        weight = weight * class_weight.to(log_p)[label.squeeze(1)]
    nll, weight = -(log_p.gather(1, label).squeeze(1) * weight).sum(), weight.sum()

    # The derivative of an all-reduce is an all-reduce: here the gradient becomes that of the sum of all processes' (equal) losses.
    join = lambda t: t  # noqa: E731
    if sync:
        from torch.distributed.nn.functional import all_reduce as join
    if batch:
        intersection, total = join(intersection), join(total)
    dice = (2 * intersection + smooth_nr) / (total + smooth_dr)
    dice_loss = (1 - (dice if include_background else dice[..., 1:])).mean()
    if not batch and sync:
        dice_loss = join(dice_loss) / dist.get_world_size()
    cross_entropy = join(nll) / join(weight).clamp_min(torch.finfo(log_p.dtype).tiny)
    return dice_weight * dice_loss + ce_weight * cross_entropy, dice.detach()


def _checked(logits: Tensor, target: Tensor, class_weight: Tensor | None, sync: bool) -> Tensor:
    """The labels as (B, D, H, W), if everything fits."""
    if target.dim() == logits.dim():
        target = target.squeeze(1)
    if logits.dim() < 3 or logits.shape[1] < 2 or target.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(f"logits {tuple(logits.shape)} need C >= 2 and labels of shape (B, 1, ...) or (B, ...), got {tuple(target.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"logits: expected a floating dtype, got {logits.dtype}")
    if target.is_floating_point():
        raise ValueError(f"target: expected integer labels, got {target.dtype}")
    if class_weight is not None and class_weight.shape != logits.shape[1:2]:
        raise ValueError(f"class_weight: expected {logits.shape[1]} weights, one a class, got shape {tuple(class_weight.shape)}")
    if sync and not (dist.is_available() and dist.is_initialized()):
        raise ValueError("sync=True joins the batches of several processes: call torch.distributed.init_process_group first")
    return target


# ------------------------------------------------------------------------------------------- the same by hand, in plain PyTorch

CHUNK = 1 << 18, 1 << 20  # logits at a time: what fits one thread's cache; with several threads more, as each step wakes them all


def dice_ce_plain(
    logits, target, include_background=False, batch=True, smooth_nr=1e-5, smooth_dr=1e-5,
    dice_weight=1.0, ce_weight=1.0, class_weight=None, ignore_index=None, sync=False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dice_ce_ref` with the backward pass of this file's head, in plain PyTorch; first derivatives only.

    Made for CPUs: slab by slab, each step in place. It runs on a GPU too, but looks at a few numbers on the way and so waits for it.
    """
    options = (include_background, batch, smooth_nr, smooth_dr, dice_weight, ce_weight, ignore_index, sync)
    return _call(False, logits, target, class_weight, *options)


def _slabs(logits: Tensor, target: Tensor, ignore_index: int | None):
    """Walks a batch in slabs along the first spatial axis, without a copy whatever the strides.

    Yields where, logits (C, d, H, W), labels (d, H, W) with 0 for ignored ones, which are kept (d, H, W) as 0 and 1 (None: all of them),
    and room for 3 numbers a voxel, the same memory each time: fresh memory costs as much as the arithmetic.
    """
    samples, _, depth = logits.shape[:3]
    step, layer = max(1, depth), logits[0, 0, 0].numel() if samples and depth else 0
    if logits.device.type == "cpu":  # elsewhere a sample at once: a launch costs more than a cache miss
        step = min(step, max(1, CHUNK[torch.get_num_threads() > 1] // max(1, layer * logits.shape[1])))
    work = _accumulator(logits.dtype)
    room = logits.new_empty((3, step * layer), dtype=work)
    target = target.view(torch.uint8) if target.dtype == torch.bool else target
    limits = torch.iinfo(target.dtype)
    ignores = ignore_index is not None and limits.min <= ignore_index <= limits.max  # -1 is no uint8
    for sample in range(samples):
        for start in range(0, depth, step):
            y, kept = target[sample, start : start + step], None
            if ignores:
                kept = y != ignore_index
                y, kept = y * kept, kept.to(work)
            slab = slice(start, start + step)
            yield (sample, slab), logits[sample, :, slab].to(work), y, kept, room[:, : y.numel()]


def _sums_plain(logits: Tensor, target: Tensor, ignore_index: int | None, weighted: bool) -> Tensor:
    """I, P, T and N of every class and sample: (4, C, B) float64."""
    b, c = logits.shape[:2]
    sums = torch.zeros(4, c, b, dtype=torch.float64, device=logits.device)
    for (sample, _), x, y, kept, room in _slabs(logits, target, ignore_index):
        labels = room[0].view(y.shape).copy_(y) if c == 2 else y  # two classes go on with the copy
        low, high = labels.aminmax()
        if low < 0 or high >= c:
            low, high = (int(v) for v in y.aminmax())
            raise ValueError(f"target: labels must lie in [0, {c}), or be ignore_index ({ignore_index}); got {low if low < 0 else high}")
        part = _two_class_sums(x, y, kept, room, weighted) if c == 2 else None
        if part is None:
            t, log_p = _one_hot(x, y, kept), F.log_softmax(x, 0)
            nll = log_p.gather(0, y.long()[None]).neg_()
            p = log_p.exp_() if kept is None else log_p.exp_().mul_(kept)
            part = torch.stack([_sum(rows.flatten(1)) for rows in (p * t, p, t, nll * t)])
        sums[:, :, sample] += part
    return sums


def _two_class_sums(x: Tensor, y: Tensor, kept: Tensor | None, room: Tensor, weighted: bool) -> Tensor | None:
    """(4, 2) sums of one slab by the formulas for two classes, room[0] holding its labels; None where e^z leaves floating point's range."""
    (l0, l1), (t, q, denominator) = x.unbind(), room.view(3, *y.shape).unbind()
    torch.sub(l1, l0, out=q)
    q.addcmul_(q, t, value=-2).mul_(1 / log(2)).exp2_()  # e^z; 2^x is twice as fast as e^x here
    if kept is not None:
        q.mul_(kept)
    # Without class weights it does not matter for which class a voxel's cross entropy is counted.
    n1 = _sum_log(torch.addcmul(torch.ones_like(q), q, t)) if weighted else 0.0
    torch.add(q, 1, out=denominator)
    q.div_(denominator)
    n_all = _sum_log(denominator)
    t1, wrong = _sum(room[:2]).tolist()
    if not isfinite(wrong + n_all):
        return None
    wrong1 = _sum(q.mul_(t).view(-1)).item()
    t0, wrong0 = float(y.numel() if kept is None else kept.sum()) - t1, wrong - wrong1
    right0, right1 = t0 - wrong0, t1 - wrong1
    part = [[right0, right1], [right0 + wrong1, right1 + wrong0], [t0, t1], [n_all - n1, n1]]
    return torch.tensor(part, dtype=torch.float64, device=x.device)


def _sum_log(factors: Tensor) -> float:
    """Sum of logarithms, taken of products of four, as one costs as much as some ten products; overwrites the factors."""
    flat = factors.view(-1)
    whole = flat.numel() // 4 * 4
    for half in (whole // 2, whole // 4):
        flat[:half].mul_(flat[half : 2 * half])
    return (_sum(flat[: whole // 4].log_()) + _sum(flat[whole:].log_())).item()


def _sum(numbers: Tensor) -> Tensor:
    """Sum along the last axis: stretch by stretch, and those in float64."""
    whole = numbers.shape[-1] // 8192 * 8192
    stretches = numbers[..., :whole].unflatten(-1, (-1, 8192)).sum(-1)
    return stretches.sum(-1, dtype=torch.float64) + numbers[..., whole:].sum(-1, dtype=torch.float64)


def _one_hot(x: Tensor, y: Tensor, kept: Tensor | None) -> Tensor:
    """t of x's shape and dtype, 0 where a voxel is ignored."""
    t = torch.zeros_like(x).scatter_(0, y.long()[None], 1.0)
    return t if kept is None else t.mul_(kept)


def _finish_plain(
    sums, class_weight, include_background, smooth_nr, smooth_dr, dice_weight, ce_weight, scale
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, Dice (G, C), and scale times the coefficients (2 G + 1, C): a and b of every group, v; from sums (4, C, G)."""
    inter, p, t, nll = sums.transpose(1, 2)  # (G, C) each
    total = p + t + smooth_dr
    dice = (2 * inter + smooth_nr) / total
    scored = torch.ones_like(dice)
    scored[:, 0] = float(include_background)
    k = dice_weight * scored / scored.sum()
    w = torch.ones_like(nll[0]) if class_weight is None else class_weight.to(nll)
    weight = (w * t).sum()
    per_weight = torch.where(weight == 0, 0, 1 / weight)
    loss = (k * (1 - dice)).sum() + ce_weight * per_weight * (w * nll).sum()
    ab = torch.stack([k * dice / total, -2 * k / total], 1)  # (G, 2, C)
    return loss, dice, scale * torch.cat([ab.flatten(0, 1), (ce_weight * per_weight * w)[None]])


def _grad_plain(logits: Tensor, target: Tensor, coefficients: Tensor, ignore_index: int | None) -> Tensor:
    """d loss / d logits, in the logits' layout, from coefficients that hold the upstream gradient as a factor."""
    grad = torch.empty_like(logits)
    *ab, v = coefficients
    if len(v) == 2:
        # In the probability p of class 1 and the label t: d loss / d l_1 = v_t (p - t) + u_t p (1 - p).
        v, v0, v_step = v.to(_accumulator(logits.dtype)), v[0].item(), (v[1] - v[0]).item()
        u0, u_step = [a[1] - a[0] - b[0] for a, b in zip(ab[::2], ab[1::2])], [(b[0] + b[1]).item() for b in ab[1::2]]
    for (sample, slab), x, y, kept, room in _slabs(logits, target, ignore_index):
        group = sample if len(ab) > 2 else 0
        out = grad[sample, :, slab]
        if len(v) == 2:
            (l0, l1), (t, p, g) = x.unbind(), room.view(3, *y.shape).unbind()
            t.copy_(y)
            torch.sub(l1, l0, out=p).sigmoid_()
            torch.add(u0[group], t, alpha=u_step[group], out=g)
            torch.ops.aten.sigmoid_backward.grad_input(g, p, grad_input=g)  # times p (1 - p)
            p.sub_(t)
            if kept is not None:
                room[1:] *= kept.flatten()
            torch.addcmul(g, p, t.mul_(v_step).add_(v0) if v_step else v[0], out=out[1])
            torch.neg(out[1], out=out[0])
        else:
            t, p = _one_hot(x, y, kept), x.softmax(0)
            a, b, v_ = (k.view(-1, *[1] * y.dim()) for k in (ab[2 * group], ab[2 * group + 1], v))
            g = t * b + a
            g = (g - (p * g).sum(0)).mul_(p).add_((v_ * t).sum(0) * (p - t))
            out.copy_(g if kept is None else g.mul_(kept))
    return grad


# --------------------------------------------------------------------------------------------------------------- Triton kernels

TILE = 4096  # numbers of a kind that a program works on at a time, 16 a thread: z of two classes, p of more
PROGRAMS = 2048  # of stage one at most (or one a sample); each loops over its tiles
WARPS = 8  # with four, ptxas spills 8 bytes in one kernel for sm_80


def dice_ce_triton(
    logits, target, include_background=False, batch=True, smooth_nr=1e-5, smooth_dr=1e-5,
    dice_weight=1.0, ce_weight=1.0, class_weight=None, ignore_index=None, sync=False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dice_ce_ref` in three kernel launches: sums, loss, and (backward) gradient; first derivatives only."""
    options = (include_background, batch, smooth_nr, smooth_dr, dice_weight, ce_weight, ignore_index, sync)
    return _call(True, logits, target, class_weight, *options)


if triton is not None:

    @triton.jit
    def _places(first, height, width, d, h, w, FLAT: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr):
        """Offsets of BLOCK voxels from number `first` on, in a tensor with strides d, h, w; FLAT: all that counts is w."""
        v = first + tl.arange(0, BLOCK)
        if FLAT:
            at = v * w
        else:
            v = v.to(INDEX)  # 64-bit division is slow
            row = v // width
            at = (row // height).to(tl.int64) * d + (row % height).to(tl.int64) * h + (v % width).to(tl.int64) * w
        return at

    @triton.jit
    def _labels(target, at, inside, ignore_index):
        """Labels, and which voxels count."""
        y = tl.load(target + at, mask=inside, other=0)
        if target.dtype.element_ty.primitive_bitwidth < 32:
            y = y.to(tl.int32)  # an ignore_index of -1 is no uint8 label
        if ignore_index is not None:
            inside = inside & (y != ignore_index)
        return y, inside

    @triton.jit
    def _load_two(logits, at, first, left, stride_c, SIDE_BY_SIDE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
        """Both logits of BLOCK voxels, of which `left` are there: 2 x (BLOCK,)."""
        if SIDE_BY_SIDE:
            i = tl.arange(0, 2 * BLOCK)
            l0, l1 = tl.split(tl.reshape(tl.load(logits + 2 * first + i, mask=i < 2 * left, other=0.0), (BLOCK, 2)))
        else:
            inside = tl.arange(0, BLOCK) < left
            l0 = tl.load(logits + at, mask=inside, other=0.0)
            l1 = tl.load(logits + stride_c + at, mask=inside, other=0.0)
        return l0.to(ACC), l1.to(ACC)

    @triton.jit
    def _load(
        logits, at, first, left, stride_c,
        C: tl.constexpr, CP: tl.constexpr, SIDE_BY_SIDE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """All logits of BLOCK voxels: (CP, BLOCK). Classes that only fill the tile up to a power of two are -inf, so that p = 0."""
        c = tl.arange(0, CP)[:, None]
        if SIDE_BY_SIDE:
            i = tl.arange(0, C * BLOCK)
            x = tl.trans(tl.reshape(tl.load(logits + C * first + i, mask=i < C * left, other=0.0), (BLOCK, C)))
        else:
            inside = (c < C) & (tl.arange(0, BLOCK) < left)[None, :]
            x = tl.load(logits + c.to(tl.int64) * stride_c + at[None, :], mask=inside, other=0.0)
        return tl.where(c < C, x.to(ACC), float("-inf"))

    @triton.jit
    def _wrong(l0, l1, y):
        """z of the two-class formulas, q = sigmoid(z) and 1 - q, both to full relative precision, and e^-|z|."""
        z = tl.where(y == 1, l0 - l1, l1 - l0)
        e = tl.exp(-tl.abs(z))
        larger = 1.0 / (1.0 + e)
        smaller = e * larger
        return z, tl.where(z > 0, larger, smaller), tl.where(z > 0, smaller, larger), e

    @triton.jit
    def _sums_kernel(
        logits,  # (B, C, D, H, W)
        target,  # (B, D, H, W)
        partials,  # (4, C, B, programs), contiguous
        ignore_index, samples, n, height, width, programs, tiles,
        logits_b, logits_c, logits_d, logits_h, logits_w,
        target_b, target_d, target_h, target_w,
        C: tl.constexpr, CP: tl.constexpr, FLAT: tl.constexpr, SIDE_BY_SIDE: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Stage one: I, P, T and N of every class over `tiles` tiles of one sample."""
        sample, program = tl.program_id(0) // programs, tl.program_id(0) % programs
        logits += sample.to(tl.int64) * logits_b
        target += sample.to(tl.int64) * target_b
        c = tl.arange(0, CP)
        inter, pred, true, nll = tl.zeros((CP,), ACC), tl.zeros((CP,), ACC), tl.zeros((CP,), ACC), tl.zeros((CP,), ACC)
        for tile in range(tiles):
            first = (program.to(tl.int64) * tiles + tile) * BLOCK
            left = tl.minimum(n - first, BLOCK).to(tl.int32)
            at = _places(first, height, width, target_d, target_h, target_w, FLAT, INDEX, BLOCK)
            y, kept = _labels(target, at, tl.arange(0, BLOCK) < left, ignore_index)
            at = _places(first, height, width, logits_d, logits_h, logits_w, FLAT, INDEX, BLOCK)
            # Masks as numbers, which the sums below multiply by: one register a voxel, where a GPU has few for bits. A label outside
            # [0, C) must not go unnoticed: such a voxel counts NaN.
            if C == 2:
                l0, l1 = _load_two(logits, at, first, left, logits_c, SIDE_BY_SIDE, ACC, BLOCK)
                z, wrong, right, e = _wrong(l0, l1, y)
                loss = tl.maximum(z, 0.0) + tl.log(1.0 + e)  # log(1 + e^z)
                t1 = tl.where(kept & (y == 1), 1.0, 0.0)
                t0 = tl.where(kept & (y != 1), tl.where(y == 0, 1.0, float("nan")), 0.0)
                right0, right1 = tl.sum(t0 * right, 0), tl.sum(t1 * right, 0)
                wrong0, wrong1 = tl.sum(t0 * wrong, 0), tl.sum(t1 * wrong, 0)
                inter += tl.where(c == 0, right0, right1)
                pred += tl.where(c == 0, right0 + wrong1, right1 + wrong0)
                true += tl.where(c == 0, tl.sum(t0, 0), tl.sum(t1, 0))
                nll += tl.where(c == 0, tl.sum(t0 * loss, 0), tl.sum(t1 * loss, 0))
            else:
                x = _load(logits, at, first, left, logits_c, C, CP, SIDE_BY_SIDE, ACC, BLOCK)
                x -= tl.max(x, 0)[None, :]
                p = tl.exp(x)
                total = tl.sum(p, 0)[None, :]
                count = tl.where(kept, tl.where((y >= 0) & (y < C), 1.0, float("nan")), 0.0)[None, :]
                p *= count / total
                t = tl.where(y[None, :] == c[:, None], count, 0.0)
                inter += tl.sum(p * t, 1)
                pred += tl.sum(p, 1)
                true += tl.sum(t, 1)
                nll += tl.sum(tl.where(t == 1.0, tl.log(total) - x, 0.0), 1)
        # partials[quantity, c, sample, program]
        at = partials + (c * samples + sample) * programs + program
        step = C * samples * programs
        tl.store(at, inter, mask=c < C)
        tl.store(at + step, pred, mask=c < C)
        tl.store(at + 2 * step, true, mask=c < C)
        tl.store(at + 3 * step, nll, mask=c < C)

    @triton.jit
    def _total(partials, quantity, group, groups, length, C: tl.constexpr, CP: tl.constexpr, STEP: tl.constexpr):
        """The sum over a group's partials of one quantity for every class: (CP,) float64."""
        c = tl.arange(0, CP)[:, None]
        row = partials + ((quantity * C + c).to(tl.int64) * groups + group) * length
        tile = tl.zeros((CP, STEP), tl.float64)
        for start in range(0, length, STEP):
            i = start + tl.arange(0, STEP)[None, :]
            tile += tl.load(row + i, mask=(i < length) & (c < C), other=0.0).to(tl.float64)
        return tl.sum(tile, 1)

    @triton.jit
    def _finish_kernel(
        partials,  # (4, C, G, length), contiguous
        class_weight,  # (C,) or None
        loss,  # ()
        dice,  # (G, C)
        coefficients,  # (2 G + 1, C): a, b of each group, v
        groups, length,
        smooth_nr: tl.float64, smooth_dr: tl.float64, dice_weight: tl.float64, ce_weight: tl.float64, scale: tl.float64,
        BACKGROUND: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, STEP: tl.constexpr,
    ):  # fmt: skip
        """Stage two, one program: from the sums to loss, Dice, and scale times the coefficients of the gradient."""
        c = tl.arange(0, CP)
        real = c < C
        scored = real if BACKGROUND else real & (c > 0)
        k = tl.where(scored, 1.0, 0.0).to(tl.float64)
        k *= dice_weight / (tl.sum(k, 0) * groups)
        w = tl.where(real, 1.0, 0.0).to(tl.float64)
        if class_weight is not None:
            w = tl.load(class_weight + c, mask=real, other=0.0).to(tl.float64)
        lost, weight, nll = tl.zeros((CP,), tl.float64), tl.zeros((CP,), tl.float64), tl.zeros((CP,), tl.float64)
        for g in range(groups):
            true = _total(partials, 2, g, groups, length, C, CP, STEP)
            den = tl.where(real, _total(partials, 1, g, groups, length, C, CP, STEP) + true + smooth_dr, 1.0)
            ratio = (2 * _total(partials, 0, g, groups, length, C, CP, STEP) + smooth_nr) / den
            tl.store(dice + g * C + c, ratio, mask=real)
            tl.store(coefficients + 2 * g * C + c, scale * k * ratio / den, mask=real)
            tl.store(coefficients + (2 * g + 1) * C + c, scale * -2 * k / den, mask=real)
            lost += tl.where(scored, k * (1 - ratio), 0.0)
            weight += w * true
            nll += w * _total(partials, 3, g, groups, length, C, CP, STEP)
        weight = tl.sum(weight, 0)
        per_weight = tl.where(weight == 0, 0.0, ce_weight / tl.where(weight == 0, 1.0, weight))  # every voxel ignored: no cross entropy
        tl.store(loss, tl.sum(lost, 0) + per_weight * tl.sum(nll, 0))
        tl.store(coefficients + 2 * groups * C + c, scale * per_weight * w, mask=real)

    @triton.jit
    def _grad_kernel(
        upstream,  # ()
        logits,  # (B, C, D, H, W)
        target,  # (B, D, H, W)
        coefficients,  # (2 G + 1, C), contiguous
        grad,  # (B, C, D, H, W)
        ignore_index, group_step, last, n, height, width, programs,
        logits_b, logits_c, logits_d, logits_h, logits_w,
        target_b, target_d, target_h, target_w,
        grad_b, grad_c, grad_d, grad_h, grad_w,
        C: tl.constexpr, CP: tl.constexpr, FLAT: tl.constexpr, SIDE_BY_SIDE: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """d loss / d logits of one tile."""
        sample, program = tl.program_id(0) // programs, tl.program_id(0) % programs
        logits += sample.to(tl.int64) * logits_b
        target += sample.to(tl.int64) * target_b
        grad += sample.to(tl.int64) * grad_b
        first = program.to(tl.int64) * BLOCK
        left = tl.minimum(n - first, BLOCK).to(tl.int32)
        inside = tl.arange(0, BLOCK) < left
        at = _places(first, height, width, target_d, target_h, target_w, FLAT, INDEX, BLOCK)
        y, kept = _labels(target, at, inside, ignore_index)
        at = _places(first, height, width, logits_d, logits_h, logits_w, FLAT, INDEX, BLOCK)
        out = _places(first, height, width, grad_d, grad_h, grad_w, FLAT, INDEX, BLOCK)
        up = tl.load(upstream).to(ACC)
        a = coefficients + sample * group_step  # no step where all samples make one group
        b, v = a + C, coefficients + last
        if C == 2:
            l0, l1 = _load_two(logits, at, first, left, logits_c, SIDE_BY_SIDE, ACC, BLOCK)
            z, wrong, right, e = _wrong(l0, l1, y)
            a0, a1 = tl.load(a), tl.load(a + 1)
            m = up * tl.where(y == 1, a0 - a1 - tl.load(b + 1), a1 - a0 - tl.load(b))
            g = tl.where(kept, wrong * (up * tl.where(y == 1, tl.load(v + 1), tl.load(v)) + right * m), 0.0)
            g = tl.where(y == 1, -g, g)  # d loss / d l1
            g0, g1 = (-g).to(grad.dtype.element_ty), g.to(grad.dtype.element_ty)
            if SIDE_BY_SIDE:
                i = tl.arange(0, 2 * BLOCK)
                tl.store(grad + 2 * first + i, tl.reshape(tl.join(g0, g1), (2 * BLOCK,)), mask=i < 2 * left)
            else:
                tl.store(grad + out, g0, mask=inside)
                tl.store(grad + grad_c + out, g1, mask=inside)
        else:
            c = tl.arange(0, CP)
            real = c < C
            a, b, v = tl.load(a + c, mask=real, other=0.0), tl.load(b + c, mask=real, other=0.0), tl.load(v + c, mask=real, other=0.0)
            x = _load(logits, at, first, left, logits_c, C, CP, SIDE_BY_SIDE, ACC, BLOCK)
            p = tl.exp(x - tl.max(x, 0)[None, :])
            p /= tl.sum(p, 0)[None, :]
            t = y[None, :] == c[:, None]
            ab = a[:, None] + tl.where(t, b[:, None], 0.0)
            vy = tl.sum(tl.where(t, v[:, None], 0.0), 0)[None, :]
            g = p * (ab - tl.sum(p * ab, 0)[None, :]) + vy * (p - tl.where(t, 1.0, 0.0))
            g = tl.where(kept[None, :], up * g, 0.0).to(grad.dtype.element_ty)
            if SIDE_BY_SIDE:
                i = tl.arange(0, C * BLOCK)
                tl.store(grad + C * first + i, tl.reshape(tl.trans(g), (C * BLOCK,)), mask=i < C * left)
            else:
                tl.store(grad + (c.to(tl.int64) * grad_c)[:, None] + out[None, :], g, mask=real[:, None] & inside[None, :])


# ---------------------------------------------------------------------------------------- what a launch is given, and for which GPUs


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _flat_stride(size: tuple[int, ...], stride: tuple[int, ...]) -> int | None:
    """The step from voxel to voxel if the axes can be walked as one; None if they can't."""
    axes = [(n, s) for n, s in zip(size, stride) if n != 1] or [(1, 1)]
    return axes[-1][1] if all(outer == n * inner for (_, outer), (n, inner) in pairwise(axes)) else None


def _geometry(logits: Tensor, **others: Tensor) -> dict:
    """Sizes, strides and tile shape, as kernel arguments."""
    c, size = logits.shape[1], logits.shape[2:]
    axes = len(size)
    tensors = {"logits": logits, **others}
    steps = {name: _flat_stride(size, t.stride()[-axes:]) for name, t in tensors.items()}
    flat = None not in steps.values()
    args = {"n": size.numel(), "height": 1 if flat else ([1, 1, *size])[-2], "width": 1 if flat else size[-1]}
    for name, t in tensors.items():
        args[f"{name}_b"] = t.stride(0)
        if name != "target":
            args[f"{name}_c"] = t.stride(1)
        args |= dict(zip((f"{name}_d", f"{name}_h", f"{name}_w"), (0, 0, steps[name]) if flat else (0, 0, *t.stride()[-axes:])[-3:]))
    padded = triton.next_power_of_2(c)
    side_by_side = flat and c == padded and all(t.stride(1) == 1 and steps[k] == c for k, t in tensors.items() if k != "target")
    tile = TILE if logits.device.type != "cpu" else 2 * TILE  # on the CPU it is the interpreter: milliseconds a program
    return args | {
        "C": c, "CP": padded, "FLAT": flat, "SIDE_BY_SIDE": side_by_side, "INDEX": tl.int32 if args["n"] < 2**31 - tile else tl.int64,
        "ACC": tl.float64 if logits.dtype == torch.float64 else tl.float32, "BLOCK": max(1, tile // (1 if c == 2 else padded)),
    }  # fmt: skip


def _sums_launch(logits: Tensor, target: Tensor, ignore_index: int | None):
    """Kernel, grid and arguments of stage one."""
    b, c = logits.shape[:2]
    args = _geometry(logits, target=target)
    tiles = triton.cdiv(args["n"], args["BLOCK"])
    each = max(1, triton.cdiv(tiles, max(1, PROGRAMS // max(1, b))))
    programs = max(1, triton.cdiv(tiles, each))
    partials = logits.new_empty((4, c, b, programs), dtype=_accumulator(logits.dtype))
    args |= {"logits": logits, "target": target, "partials": partials, "ignore_index": ignore_index}
    return _sums_kernel, (programs * b,), args | {"samples": b, "programs": programs, "tiles": each}


def _finish_launch(partials: Tensor, class_weight: Tensor | None, dtype: torch.dtype, background, smooth_nr, smooth_dr, dice, ce, scale):
    """Kernel, grid and arguments of stage two; partials (4, C, G, length)."""
    _, c, groups, length = partials.shape
    outputs = {"loss": (), "dice": (groups, c), "coefficients": (2 * groups + 1, c)}
    args = {name: partials.new_empty(shape, dtype=_accumulator(dtype)) for name, shape in outputs.items()}
    args |= {"partials": partials, "class_weight": class_weight, "groups": groups, "length": length, "BACKGROUND": background}
    args |= {"smooth_nr": smooth_nr, "smooth_dr": smooth_dr, "dice_weight": dice, "ce_weight": ce, "scale": float(scale)}
    padded = triton.next_power_of_2(c)
    return _finish_kernel, (1,), args | {"C": c, "CP": padded, "STEP": max(1, 2048 // padded)}


def _grad_launch(upstream: Tensor, logits: Tensor, target: Tensor, coefficients: Tensor, ignore_index: int | None):
    """Kernel, grid and arguments of the backward pass; the gradient has the layout of the logits."""
    grad = torch.empty_like(logits)
    args = _geometry(logits, target=target, grad=grad)
    args |= {"upstream": upstream, "logits": logits, "target": target, "coefficients": coefficients, "grad": grad}
    rows, c = coefficients.shape
    args |= {"ignore_index": ignore_index, "group_step": 2 * c if rows > 3 else 0, "last": (rows - 1) * c}
    programs = triton.cdiv(args["n"], args["BLOCK"])
    return _grad_kernel, (programs * len(logits),), args | {"programs": programs}


def _run(kernel, grid, args) -> dict:
    if grid[0]:
        with torch.cuda.device_of(next(a for a in args.values() if isinstance(a, Tensor))):
            kernel[grid](**args, num_warps=WARPS)
    return args


# ------------------------------------------------------------------------------------------------------------------------ the op


def _call(fused, logits, target, class_weight, include_background, batch, *rest) -> tuple[Tensor, Tensor]:
    target = _checked(logits, target, class_weight, rest[-1])
    if logits.dim() > 5:  # more axes than a kernel walks: merged, by a copy only where strides forbid a view
        logits, target = logits.flatten(2), target.flatten(1)
    if class_weight is not None:
        class_weight = class_weight.detach().to(logits.device).contiguous()
    loss, dice, _ = _dice_ce(logits, target, class_weight, include_background, batch, *rest, fused)
    dice = dice.detach()
    return loss, dice[0] if batch else dice


@torch.library.custom_op("mirror_unet::dice_ce", mutates_args=())
def _dice_ce(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, include_background: bool, batch: bool, smooth_nr: float, smooth_dr: float,
    dice_weight: float, ce_weight: float, ignore_index: int | None, sync: bool, fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss (), Dice (G, C) and coefficients (2 G + 1, C): G = 1, or B with batch=False. fused: by Triton kernels."""
    if fused:
        labels = target.view(torch.uint8) if target.dtype == torch.bool else target
        partials = _run(*_sums_launch(logits, labels, ignore_index))["partials"]  # (4, C, B, programs)
    else:
        partials = _sums_plain(logits, target, ignore_index, class_weight is not None)[..., None]
    b, scale = len(logits), 1
    if sync:
        scale, rank = dist.get_world_size(), dist.get_rank()
        partials = partials.sum(3, keepdim=True, dtype=torch.float64)
        if batch:
            partials = partials.sum(2, keepdim=True)
        else:  # every process has its place for its samples
            own, partials = partials, partials.new_zeros((*partials.shape[:2], scale * b, 1))
            partials[:, :, rank * b : (rank + 1) * b] = own
        dist.all_reduce(partials)
    if batch:
        partials = partials.flatten(2).unsqueeze(2)
    settings = (include_background, smooth_nr, smooth_dr, dice_weight, ce_weight, scale)
    if fused:
        args = _run(*_finish_launch(partials, class_weight, logits.dtype, *settings))
        loss, dice, coefficients = args["loss"], args["dice"], args["coefficients"]
    else:
        numbers = _finish_plain(partials.sum(3), class_weight, *settings)
        loss, dice, coefficients = (t.to(_accumulator(logits.dtype)).contiguous() for t in numbers)
    if sync and not batch:
        dice = dice[rank * b : (rank + 1) * b].clone()
        coefficients = torch.cat([coefficients[2 * rank * b : 2 * (rank + 1) * b], coefficients[-1:]])
    return loss, dice, coefficients


@_dice_ce.register_fake
def _(logits, target, class_weight, include_background, batch, *rest):
    groups, c, dtype = 1 if batch else logits.shape[0], logits.shape[1], _accumulator(logits.dtype)
    return logits.new_empty((), dtype=dtype), logits.new_empty((groups, c), dtype=dtype), logits.new_empty((2 * groups + 1, c), dtype=dtype)


@torch.library.custom_op("mirror_unet::dice_ce_backward", mutates_args=())
def _dice_ce_backward(
    upstream: Tensor, logits: Tensor, target: Tensor, coefficients: Tensor, ignore_index: int | None, fused: bool
) -> Tensor:
    """d loss / d logits times upstream, ()."""
    if not fused:
        return _grad_plain(logits, target, upstream * coefficients, ignore_index)
    labels = target.view(torch.uint8) if target.dtype == torch.bool else target
    return _run(*_grad_launch(upstream, logits, labels, coefficients, ignore_index))["grad"]


@_dice_ce_backward.register_fake
def _(upstream, logits, target, coefficients, ignore_index, fused):
    return torch.empty_like(logits)


def _keep(ctx, inputs, output):
    logits, target, *_, ignore_index, sync, fused = inputs
    ctx.save_for_backward(logits, target, output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no launches that fill zeros for those two
    ctx.options = ignore_index, fused


def _backward(ctx, upstream, *_):
    if upstream is None:
        return (None,) * 12
    return _dice_ce_backward(upstream, *ctx.saved_tensors, *ctx.options), *[None] * 11


_dice_ce.register_autograd(_backward, setup_context=_keep)


def compile_specs() -> list[dict]:
    """The launches that matter, of tensors that have shapes alone (device meta): for compiling them ahead of time, without a GPU."""
    specs = []
    layouts = {"ncdhw": torch.contiguous_format, "channels_last": torch.channels_last_3d}
    for dtype, (layout, memory_format), c in product((torch.float32, torch.bfloat16), layouts.items(), (2, 3, 4, 8)):
        logits = torch.empty(2, c, 96, 96, 96, dtype=dtype, device="meta").to(memory_format=memory_format)
        target = torch.empty(2, 96, 96, 96, dtype=torch.uint8, device="meta")
        scalar, coefficients = (torch.empty(shape, device="meta") for shape in ((), (3, c)))
        sums, _, args = _sums_launch(logits, target, None)
        launches = {"sums": (sums, args), "grad": _grad_launch(scalar, logits, target, coefficients, None)[::2]}
        if dtype == torch.float32 and layout == "ncdhw":
            partials = args["partials"].flatten(2).unsqueeze(2)
            launches["finish"] = _finish_launch(partials, None, dtype, False, 1e-5, 1e-5, 1.0, 1.0, 1)[::2]
        for name, (kernel, args) in launches.items():
            name = f"dice_ce {name} C={c} {str(dtype)[6:]} {layout}"
            specs.append({"name": name, "kernel": kernel, "arguments": args | {"num_warps": WARPS}})
    return specs
