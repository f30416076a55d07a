# %% [markdown]
# # 3. Kernels: move fewer bytes
#
# Between two convolutions a network does things that are easy to calculate and slow to run: a norm, an activation, a loss. On a GPU their
# time goes into moving numbers to and from memory. This notebook counts those bytes, asks what the fewest would be, and builds the loss of
# the second tutorial, Dice + cross entropy, as a **fused kernel** that gets there. You write its two halves yourself, in
# [Triton](https://triton-lang.org), a Python dialect for GPU programs. Then: how a variance goes wrong that looks right on paper, and what
# a compiler makes of all this.
#
# No GPU is needed. `TRITON_INTERPRET=1` makes Triton run its kernels in a slow interpreter on the CPU, which is what one wants for
# learning: the numbers are right, and every load and store can be watched. **No GPU was measured** for what follows: bytes, registers and
# instructions are counted, and where a GPU's speed is needed it is that of its public data sheet, and said to be. About 15 minutes to read;
# a minute to run.

# %%
import os
from pathlib import Path

if Path.cwd().name == "tutorials":  # where Jupyter starts; the code is one folder up
    os.chdir("..")
os.environ["TRITON_INTERPRET"] = "1"  # Triton reads this once, when it is imported: it has to come first

import csv
import inspect
import json
import subprocess
import sys
import tempfile
from types import SimpleNamespace

sys.path += [".", "benchmarks"]

import matplotlib.pyplot as plt
import numpy as np
import torch

torch.manual_seed(0)
plt.rcParams["figure.dpi"] = 90

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:
    triton, jit, tl = None, lambda kernel: kernel, SimpleNamespace(constexpr=None)
    print("Triton is not installed (it exists for Linux only, not for macOS or Windows): what follows runs, but without the kernels.")

# %% [markdown]
# ## Memory traffic
#
# PyTorch runs an expression one operation after the other. Each **reads** its inputs from memory, all of them, and **writes** its output,
# all of it. So `a * b + c` on n float32 numbers moves 24 n bytes: the product reads 8 n and writes 4 n, the sum reads 8 n and writes 4 n.
# If both were one operation, 16 n would do: read a, b and c, write the result.
#
# `benchmarks/traffic.py` is a meter for this. It watches every operation below autograd, so the backward pass too, and counts each input as
# read once and each output as written once. Here it watches the loss, written as one writes it:

# %%
from peers import eager_dice_ce
from traffic import CountEager, count_triton, total

print(inspect.getsource(eager_dice_ce))

size = 32
logits = torch.randn(1, 2, size, size, size, requires_grad=True)  # (B, C, D, H, W): background and tumor
labels = torch.randint(0, 2, (1, 1, size, size, size), dtype=torch.uint8)  # (B, 1, D, H, W)

with CountEager() as forward:
    loss = eager_dice_ce(logits, labels)
with CountEager() as backward:
    loss.backward()

n = size**3
moved = {way: {op: t.bytes / n for op, t in counter.traffic.items()} for way, counter in (("forward", forward), ("backward", backward))}
print({way: f"{sum(ops.values()):.0f} bytes a voxel" for way, ops in moved.items()})

# %%
fig, ax = plt.subplots(figsize=(9, 5.5), layout="constrained")
edge, rows = 0, []
for way, color in (("forward", "tab:blue"), ("backward", "tab:orange")):
    for op, b in moved[way].items():
        if b > 0.5:  # the rest works on a handful of numbers
            ax.barh(len(rows), b, left=edge, color=color)
            ax.text(edge + b + 3, len(rows), f"{b:.0f}", va="center", fontsize=8)
            rows.append(op)
            edge += b
ax.set(
    yticks=range(len(rows)),
    yticklabels=rows,
    xlabel="bytes a voxel, added up",
    xlim=(0, edge + 20),
    title="Where the bytes go: Dice + CE in eager PyTorch",
)
ax.invert_yaxis()
ax.legend(handles=[plt.Rectangle((0, 0), 1, 1, color=c, label=w) for w, c in (("forward", "tab:blue"), ("backward", "tab:orange"))])
plt.show()

# %% [markdown]
# Each bar is an operation; calls of the same name are added up. The logits of a voxel are 8 bytes and its label is 1, yet 330 are moved:
# every intermediate result is as large as the volume, and goes out to memory and comes back. The largest bar, `_to_copy`, is conversions
# alone: `one_hot` wants a label of 8 bytes, and makes as many for each class, which then become floats.
#
# ### Your turn: the fewest bytes
#
# What is the least that forward and backward pass can move, a voxel, with two classes, float32 logits and uint8 labels? Three things help:
# the loss is one number, so writing it costs nothing a voxel; the gradient is as large as the logits; and the gradient of *any* voxel
# depends on the Dice of *all* voxels, so the backward pass cannot begin before the forward pass has seen everything.

# %%
least_forward = ...  # your turn: bytes a voxel
least_backward = ...


# %%
def check_least(forward, backward):
    if ... in (forward, backward):
        print("not yet: put two numbers in place of the dots")
    else:
        print("right" if (forward, backward) == (9, 17) else "not yet: what has to be read, what has to be written?")


check_least(least_forward, least_backward)

# %% [markdown]
# The answer (its cell is folded in JupyterLab; a click on the dots opens it):

# %% jupyter={"source_hidden": true}
check_least(
    forward=2 * 4 + 1,  # read two logits and a label
    backward=2 * 4 + 1 + 2 * 4,  # read them again, for nothing the size of the volume was kept; write the gradient of two logits
)

# %% [markdown]
# So 26 bytes. `results/traffic.csv` has the meter's readings for this repository's kernel, the losses of two widely used libraries, and the
# eager code above, on a batch of two 32³ volumes:

# %%
table = list(csv.DictReader(open("results/traffic.csv")))
names = ["ours Triton", "MONAI", "nnU-Net", "eager"]
fig, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained", sharex=True, sharey=True)
for ax, dtype in zip(axes, ("float32", "bfloat16")):
    readings = {r["what"]: r for r in table if (r["op"], r["dtype"], r["layout"]) == ("dice_ce", dtype, "NCDHW")}
    f, b = (np.array([float(readings[name][way]) for name in names]) for way in ("forward", "backward"))
    ax.barh(names, f, label="forward", color="tab:blue")
    ax.barh(names, b, left=f, label="backward", color="tab:orange")
    for y, name in enumerate(names):
        launches = int(readings[name]["forward_launches"]) + int(readings[name]["backward_launches"])
        ax.text(f[y] + b[y] + 5, y, f"{f[y] + b[y]:.0f} in {launches}", va="center", fontsize=9)
    ax.set(title=f"{dtype} logits", xlabel="bytes a voxel, in how many launches", xlim=(0, 440))
axes[0].invert_yaxis()
axes[1].legend(loc="upper right", fontsize=8)
plt.show()

# %% [markdown]
# In bfloat16, logits and gradient of half the size, the kernel moves 14. The eager code moves more than before, since it converts to
# float32 first.
#
# ## The roofline
#
# How long does that take? A GPU can move at most `bandwidth` bytes a second and do at most `peak` operations a second, both at the same
# time. So
#
# $$\text{time} \;\ge\; \max\left(\frac{\text{bytes}}{\text{bandwidth}},\ \frac{\text{operations}}{\text{peak}}\right)
# \qquad\text{or}\qquad \text{speed} \;\le\; \min(\text{intensity} \cdot \text{bandwidth},\ \text{peak}),
# \qquad \text{intensity} = \frac{\text{operations}}{\text{bytes}}.$$
#
# Drawn over the intensity this is a roof: a slope where memory is what one waits for, and a ceiling where it is arithmetic. The numbers of
# the roof below are **those that NVIDIA's data sheet of the H100 SXM gives, not measurements**: 3.35 TB/s; 67 TFLOP/s in float32; 989
# TFLOP/s in bfloat16 on its tensor cores (the sheet's 1,979 are for sparse matrices).
#
# The operations of the loss are counted roughly, 50 a voxel for both passes, an exponential counted as one. A 3×3×3 convolution from 32 to
# 32 channels does 2 · 27 · 32 · 32 a voxel, and if nothing is read twice moves 64 numbers.

# %%
bandwidth, peak = 3.35e12, {"float32": 67e12, "bfloat16, tensor cores": 989e12}  # data sheet of the H100 SXM
points = {
    "loss, eager": (50 / 330, "float32", "tab:red"),
    "loss, MONAI": (50 / 246, "float32", "tab:purple"),
    "loss, fused": (50 / 26, "float32", "tab:green"),
    "convolution, float32": (2 * 27 * 32 * 32 / (64 * 4), "float32", "tab:brown"),
    "convolution, bfloat16": (2 * 27 * 32 * 32 / (64 * 2), "bfloat16, tensor cores", "black"),
}
x = np.logspace(-1.3, 3.3, 400)
fig, ax = plt.subplots(figsize=(8, 4.3), layout="constrained")
for (name, top), style in zip(peak.items(), ("-", "--")):
    ax.loglog(x, np.minimum(x * bandwidth, top) / 1e12, style, color="gray", label=f"roof, {name}: {top / 1e12:.0f} TFLOP/s")
for name, (intensity, kind, color) in points.items():
    ax.loglog(
        intensity, min(intensity * bandwidth, peak[kind]) / 1e12, "o", ms=9, color=color, label=f"{name}: {intensity:.3g} operations a byte"
    )
ax.set(
    xlabel="intensity: operations a byte", ylabel="TFLOP/s at most", title="Roofline of an H100 SXM by its data sheet (nothing measured)"
)
ax.legend(fontsize=8, loc="lower right")
ax.grid(alpha=0.3)
plt.show()

# %% [markdown]
# The convolutions hang below the ceiling: only more arithmetic units would help. The loss sits on the slope, fused or not, far to the left.
# Two things follow. Its arithmetic is free, so calculating a softmax *twice* to save one trip to memory is a good bargain. And for a thing
# on the slope, bytes *are* time:

# %%
voxels = 2 * 96**3  # two patches of the paper's size
for name, b in {"eager": 330, "MONAI": 246, "fused": 26}.items():
    print(f"{name:6} {b:4} bytes a voxel: {b * voxels / bandwidth * 1e6:6.0f} microseconds at least, by the data sheet's bandwidth")

# %% [markdown]
# ## A first kernel
#
# A GPU is some hundred multiprocessors (an H100 SXM has 132) with one large memory. A Triton kernel is a function that is run many times on
# them, by **programs** that know nothing of each other but their number, `tl.program_id(0)`. A program works on a block of numbers at once:
# `tl.arange` makes a block of indices, `tl.load(pointer + indices, mask)` fetches, arithmetic is as in NumPy, `tl.store` writes back. Block
# sizes are powers of two and volumes are not, hence the mask: lanes where it is false are not touched, and read as `other`.
#
# This one counts the tumor voxels of a volume: each program adds up its own block and writes **one** number. Read it line by line, you
# will need all of it.


# %%
@jit
def count(target, partials, n, BLOCK: tl.constexpr):
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,) numbers of this program's voxels
    inside = v < n  # the last program may hang over the end
    t = tl.load(target + v, mask=inside, other=0)  # (BLOCK,) labels
    tl.store(partials + tl.program_id(0), tl.sum(t.to(tl.float32), 0))


BLOCK = 1024
target = (torch.rand(5000) < 0.3).to(torch.uint8)
programs = -(-len(target) // BLOCK)  # rounded up
partials = torch.full((programs,), float("nan"))
if triton:
    with count_triton() as traffic:
        count[(programs,)](target, partials, len(target), BLOCK=BLOCK)
    print("partial sums", partials.tolist(), "together", partials.sum().item(), "and by PyTorch", target.sum().item())
    print(f"{total(traffic).bytes / len(target):.3f} bytes a voxel, in {total(traffic).launches} launch")

# %% [markdown]
# One byte a voxel, and a few for the partial sums. Masked lanes do not count: 5 programs of 1024 have 5120 lanes, but 5000 labels were
# loaded.
#
# Why partial sums, and not one total to which every program adds (`tl.atomic_add`)? Programs finish in any order, and a sum of floats
# depends on the order: the same input would give other bits each time. Which voxels a program has is a matter of memory, where a volume is
# one long row with the last axis fastest. In a PET/CT volume here the first axis is left to right, so a block is a slab of the body, as
# seen from the side:

# %%
import phantom

study = phantom.petct_study(10, healthy=False)  # a synthetic patient; 4 mm voxels
where = int(study.seg.sum((0, 2)).argmax())  # the coronal slice with most tumor
owner = (np.arange(study.seg.size) // (64 * BLOCK)).reshape(study.seg.shape)  # blocks of 65,536, else there would be too many to see

fig, axes = plt.subplots(1, 3, figsize=(9, 5.2), layout="constrained")
axes[0].imshow(study.suv[:, where].T, origin="lower", cmap="gray_r", vmax=10)
axes[0].contour(study.seg[:, where].T, [0.5], colors="tab:green")
axes[0].set_title("PET, tumor outlined")
axes[1].imshow(owner[:, where].T % 20, origin="lower", cmap="tab20")
axes[1].contour(study.seg[:, where].T, [0.5], colors="black")
axes[1].set_title("which program has the voxel")
sums_of = np.bincount(owner.ravel(), study.seg.ravel())
axes[2].bar(range(len(sums_of)), sums_of, color=plt.get_cmap("tab20")(np.arange(len(sums_of)) % 20))
axes[2].set(title="what each of them writes", xlabel="program", ylabel="tumor voxels")
for ax in axes[:2]:
    ax.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## Puzzle 1: the sums
#
# **Equation.** With two classes only the difference of the logits matters, $u = l_1 - l_0$: the probability of tumor is
# $p = 1 / (1 + e^{-u})$. With labels $t \in \{0, 1\}$, the loss needs four sums over the voxels,
#
# $$I = \sum p\,t \qquad P = \sum p \qquad T = \sum t \qquad N = \sum \log(1 + e^{z}),\quad
# z = \begin{cases} -u & t = 1 \\ \phantom{-}u & t = 0 \end{cases}$$
#
# ($N$ is the cross entropy: $-\log p = \log(1 + e^{-u})$ for a tumor voxel, $-\log(1 - p) = \log(1 + e^{u})$ for another). Then
#
# $$\text{Dice} = \frac{2I + \varepsilon}{P + T + \varepsilon} \qquad \text{loss} = 1 - \text{Dice} + \frac{N}{n},
# \qquad \varepsilon = 10^{-5}.$$
#
# **A trap.** A network may be very sure, and $e^{100}$ is beyond float32:

# %%
u = torch.tensor([-100.0, -10.0, 0.0, 10.0, 100.0])
e = (-u.abs()).exp()  # never above 1
print("log(1 + e^u), as written           ", torch.log(1 + u.exp()).tolist())
print("max(u, 0) + log(1 + e^-|u|), equal ", (u.clamp(min=0) + torch.log(1 + e)).tolist())
print("p = (1 where u > 0 else e) / (1 + e)", (torch.where(u > 0, 1, e) / (1 + e)).tolist())

# %% [markdown]
# **Specification.** Fill in the kernel: read each logit and each label once; `partials[0]` to `partials[3]` get this program's I, P, T and
# N. Voxels outside must add nothing. It needs about ten lines, and nothing that the first kernel or the cell above does not show (`tl.exp`,
# `tl.log`, `tl.abs`, `tl.maximum`, `tl.where` are what you expect).


# %%
@jit
def my_sums(
    logits,  # (2, n) float32: l0 of all voxels, then l1
    target,  # (n,) uint8
    partials,  # (4, programs) float32
    n,
    programs,
    BLOCK: tl.constexpr,
):
    pass  # your turn: v and inside, l0, l1 and t; u, p and the cross entropy; four sums, to partials + k * programs + tl.program_id(0)


# %%
def right_sums(logits, target):
    """I, P, T, N in float64, by PyTorch."""
    u, t = (logits[1] - logits[0]).double(), target.double()
    p = u.sigmoid()
    return torch.stack([(p * t).sum(), p.sum(), t.sum(), torch.nn.functional.softplus(torch.where(t == 1, -u, u)).sum()])


def with_room(x):
    """x in memory with a block to spare behind it: there a forgotten mask does no harm."""
    return torch.cat([x.flatten(), x.new_zeros(BLOCK)])[: x.numel()].view(x.shape)


def check_sums(kernel, n=5000):
    if triton is None:
        return print("not checked: Triton is not installed")
    programs = -(-n // BLOCK)
    for scale in (2, 1000):  # logits of a network, and of one that is very sure
        logits, target = with_room(scale * torch.randn(2, n)), with_room((torch.rand(n) < 0.3).to(torch.uint8))
        partials = torch.full((4, programs), float("nan"))
        with count_triton() as traffic:
            kernel[(programs,)](logits, target, partials, n, programs, BLOCK=BLOCK)
        if partials.isnan().all():
            return print("not yet: the kernel has written nothing")
        for name, found, true in zip("IPTN", partials.double().sum(1).tolist(), right_sums(logits, target).tolist()):
            if not abs(found - true) <= 1e-5 * true:
                return print(f"not yet: for logits of size {scale}, {name} is {found:.3f} and should be {true:.3f}")
    per_voxel = total(traffic).bytes / n
    print(f"right, at {per_voxel:.2f} bytes a voxel" + ("" if per_voxel < 9.1 else ": more than the 9 it needs"))


check_sums(my_sums)

# %% [markdown]
# The answer (folded):


# %% jupyter={"source_hidden": true}
@jit
def sums(logits, target, partials, n, programs, BLOCK: tl.constexpr):
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = v < n
    u = tl.load(logits + n + v, mask=inside, other=0.0) - tl.load(logits + v, mask=inside, other=0.0)
    t = tl.load(target + v, mask=inside, other=0).to(tl.float32)
    e = tl.exp(-tl.abs(u))
    p = tl.where(inside, tl.where(u > 0, 1.0, e) / (1.0 + e), 0.0)
    z = tl.where(t == 1, -u, u)
    nll = tl.where(inside, tl.maximum(z, 0.0) + tl.log(1.0 + e), 0.0)
    out = partials + tl.program_id(0)
    tl.store(out, tl.sum(p * t, 0))
    tl.store(out + programs, tl.sum(p, 0))
    tl.store(out + 2 * programs, tl.sum(t, 0))
    tl.store(out + 3 * programs, tl.sum(nll, 0))


check_sums(sums)

# %% [markdown]
# ## From sums to the loss
#
# A second kernel, one program, adds up the partial sums and makes the loss of them. It could be a few lines of PyTorch, but each would be a
# launch of its own, to move a handful of numbers. It also leaves something for the backward pass. By the quotient rule, with
# $\text{den} = P + T + \varepsilon$,
#
# $$\frac{\partial (1 - \text{Dice})}{\partial p_v} = \frac{\text{Dice}}{\text{den}} - \frac{2}{\text{den}}\, t_v = a + b\,t_v:$$
#
# all that a voxel needs to know of the others is in two numbers, a and b. The sums are added in float64: there are few of them, and so it
# costs nothing.


# %%
@jit
def finish(partials, loss, coefficients, n, programs, STEP: tl.constexpr):
    i = tl.arange(0, STEP)  # STEP >= programs
    there = i < programs
    inter = tl.sum(tl.load(partials + i, mask=there, other=0.0).to(tl.float64), 0)
    pred = tl.sum(tl.load(partials + programs + i, mask=there, other=0.0).to(tl.float64), 0)
    true = tl.sum(tl.load(partials + 2 * programs + i, mask=there, other=0.0).to(tl.float64), 0)
    nll = tl.sum(tl.load(partials + 3 * programs + i, mask=there, other=0.0).to(tl.float64), 0)
    den = pred + true + 1e-5
    dice = (2 * inter + 1e-5) / den
    tl.store(loss, 1 - dice + nll / n)
    tl.store(coefficients, dice / den)  # a
    tl.store(coefficients + 1, -2 / den)  # b


# %% [markdown]
# ## Puzzle 2: the gradient
#
# **Equation.** From the sigmoid, $\partial p / \partial l_1 = p (1 - p) = -\,\partial p / \partial l_0$, and for the cross entropy the well
# known $p - t$:
#
# $$\frac{\partial\,\text{loss}}{\partial l_1} = (a + b\,t)\; p\,(1 - p) + \frac{p - t}{n} = -\frac{\partial\,\text{loss}}{\partial l_0}.$$
#
# **Specification.** Read logits and labels once more, and the three numbers `upstream` (autograd's factor, by which everything is
# multiplied), a and b; write the gradient of both logits, once.


# %%
@jit
def my_gradient(
    upstream,  # () float32
    logits,  # (2, n) float32
    target,  # (n,) uint8
    coefficients,  # (2,) float32: a and b
    grad,  # (2, n) float32
    n,
    BLOCK: tl.constexpr,
):
    pass  # your turn; tl.load(coefficients) is a, tl.load(coefficients + 1) is b


# %%
def check_gradient(kernel, n=5000):
    if triton is None:
        return print("not checked: Triton is not installed")
    logits, target = with_room(3 * torch.randn(2, n)).requires_grad_(), with_room((torch.rand(n) < 0.3).to(torch.uint8))
    inter, pred, true, _ = right_sums(logits, target)
    den = pred + true + 1e-5
    coefficients = torch.stack([(2 * inter + 1e-5) / den**2, -2 / den]).float().detach()
    eager_dice_ce(logits.view(1, 2, n, 1, 1), target.view(1, 1, n, 1, 1)).backward()  # autograd's gradient
    grad, wanted = with_room(torch.full((2, n), float("nan"))), -1.7 * logits.grad
    with count_triton() as traffic:
        kernel[(-(-n // BLOCK),)](torch.tensor(-1.7), logits.detach(), target, coefficients, grad, n, BLOCK=BLOCK)
    if grad.isnan().all():
        return print("not yet: the kernel has written nothing")
    if grad.as_strided((BLOCK,), (1,), 2 * n).any():
        return print("not yet: the kernel writes behind the end of its output; is there a mask?")
    wrong = ~((grad - wanted).abs() <= 1e-5 * wanted.abs().max())
    if wrong.any():
        c, v = wrong.nonzero()[0].tolist()
        print(f"not yet: {wrong.sum()} of {2 * n} numbers are wrong;", end=" ")
        return print(f"d loss / d l{c} of voxel {v} is {grad[c, v]:.3g} and should be {wanted[c, v]:.3g}")
    per_voxel = total(traffic).bytes / n
    print(f"right, at {per_voxel:.2f} bytes a voxel" + ("" if per_voxel < 17.1 else ": more than the 17 it needs"))


check_gradient(my_gradient)

# %% [markdown]
# The answer (folded):


# %% jupyter={"source_hidden": true}
@jit
def gradient(upstream, logits, target, coefficients, grad, n, BLOCK: tl.constexpr):
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = v < n
    u = tl.load(logits + n + v, mask=inside, other=0.0) - tl.load(logits + v, mask=inside, other=0.0)
    t = tl.load(target + v, mask=inside, other=0).to(tl.float32)
    e = tl.exp(-tl.abs(u))
    p = tl.where(u > 0, 1.0, e) / (1.0 + e)
    q = tl.where(u > 0, e, 1.0) / (1.0 + e)  # 1 - p, but with all its digits where p is nearly 1
    g = (tl.load(coefficients) + tl.load(coefficients + 1) * t) * p * q + tl.where(t == 1, -q, p) / n
    g *= tl.load(upstream)
    tl.store(grad + v, -g, mask=inside)
    tl.store(grad + n + v, g, mask=inside)


check_gradient(gradient)

# %% [markdown]
# ## Put together
#
# Three launches, tied to autograd. What is kept between forward and backward pass is the inputs, which exist anyway, and two numbers.


# %%
class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target):
        n = target.numel()
        programs = triton.cdiv(n, BLOCK)
        partials, loss, coefficients = logits.new_empty(4, programs), logits.new_empty(()), logits.new_empty(2)
        sums[(programs,)](logits, target, partials, n, programs, BLOCK=BLOCK)
        finish[(1,)](partials, loss, coefficients, n, programs, STEP=triton.next_power_of_2(programs))
        ctx.save_for_backward(logits, target, coefficients)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        logits, target, coefficients = ctx.saved_tensors
        grad, n = torch.empty_like(logits), target.numel()
        gradient[(triton.cdiv(n, BLOCK),)](upstream, logits, target, coefficients, grad, n, BLOCK=BLOCK)
        return grad, None


# %%
from kernels import dice_ce_ref  # the library's definition: plain PyTorch, differentiated by autograd
from kernels.dice_ce import dice_ce_triton

n = 24**3
logits = torch.randn(1, 2, 24, 24, 24, requires_grad=True)
labels = (torch.rand(1, 1, 24, 24, 24) < 0.1).to(torch.uint8)
ways = {"eager": eager_dice_ce, "the library's": lambda x, y: dice_ce_triton(x, y)[0], "yours": Fused.apply}
exact_loss, _ = dice_ce_ref(logits.double(), labels)
(exact_gradient,) = torch.autograd.grad(exact_loss, logits)
if triton:
    from traffic import measure

    for name, way in ways.items():
        loss = way(logits, labels)
        (grad,) = torch.autograd.grad(loss, logits)
        there, back = measure(way, (logits, labels))
        off, grad_off = abs(loss - exact_loss).item(), (grad - exact_gradient).abs().max().item() / exact_gradient.abs().max().item()
        print(f"{name:13} off by {off:.0e}, gradient by {grad_off:.0e} of its largest; ", end="")
        print(f"{(there + back).bytes / n:6.2f} bytes a voxel in {there.launches} + {back.launches} launches")

# %% [markdown]
# 26 bytes, twelve times fewer than the eager code, and no less exact. `kernels/dice_ce.py` is this kernel with what a library has to add:
# more classes and their weights, ignored voxels, samples with a Dice of their own, `channels_last` and strided tensors, volumes beyond 2³¹
# numbers. You have seen all that is essential in it.
#
# What did it write? Take the patient from above, and a poor network: `logits = (0, SUV − 4)`. It calls everything tumor that uses much
# sugar.

# %%
from matplotlib.colors import SymLogNorm

if triton:
    logits = torch.stack([torch.zeros(study.suv.shape), torch.from_numpy(study.suv) - 4])[None].requires_grad_()
    labels = torch.from_numpy(study.seg)[None, None]
    BLOCK = 2**14  # in the interpreter each program costs a millisecond or so, large or small
    loss = Fused.apply(logits, labels)
    loss.backward()

    pictures = {"PET and truth": study.suv, "p: probability of tumor": logits.detach()[0, 1].sigmoid(), "d loss / d l₁": logits.grad[0, 1]}
    top = logits.grad[0, 1, :, where].abs().max().item()
    signed = SymLogNorm(linthresh=top / 100, vmin=-top, vmax=top)  # logarithmic, but for what is nearly 0
    looks = (dict(cmap="gray_r", vmax=10), dict(cmap="magma"), dict(cmap="RdBu_r", norm=signed))
    fig, axes = plt.subplots(1, 3, figsize=(9, 5.4), layout="constrained")
    for ax, (title, volume), look in zip(axes, pictures.items(), looks):
        shown = ax.imshow(np.asarray(volume[:, where]).T, origin="lower", **look)
        ax.contour(study.seg[:, where].T, [0.5], colors="tab:green", linewidths=1)
        ax.set(title=title, xticks=[], yticks=[])
        bar = fig.colorbar(shown, ax=ax, location="bottom", shrink=0.9)
    bar.set_ticks([-top, 0, top], labels=[f"{-top:.0e}", "0", f"{top:.0e}"])
    plt.show()
    print(f"loss {loss.item():.3f}")

# %% [markdown]
# Blue: the logit is to rise; red: it is to sink. A step against the gradient lights up the tumor, which is warm but was missed in part,
# and dims brain and kidneys. The tumor's few voxels pull hardest, each of them: that is Dice, which divides by the sizes of tumor and
# prediction and not by the number of all voxels.
#
# ## A variance that fails
#
# Another fused kernel here is the instance norm with all that follows it, `kernels/norm_act.py`. It needs a mean and a variance, and there
# are two formulas, equal on paper:
#
# $$\operatorname{var} = \operatorname{E}\big[(x - \mu)^2\big] = \operatorname{E}[x^2] - \mu^2.$$
#
# The second reads x only once, so it is tempting. Try it on a volume with mean 1000 and standard deviation 0.1:

# %%
x = (1000 + 0.1 * torch.randn(32, 32, 32, dtype=torch.float64)).float()
mean = x.mean()
print(f"truth               {x.double().var(correction=0).item():.6f}")
print(f"E[(x - mean)^2]     {((x - mean) ** 2).mean().item():.6f}")
print(f"E[x^2] - mean^2     {((x**2).mean() - mean**2).item():.6f}")

# %% [markdown]
# A float32 has 24 binary digits. $x^2$ is about 1,000,000, and there neighbouring floats are 0.06 apart: a variance of 0.01 lies below the
# last digit of both terms, and what their difference shows is rounding. It may even be negative, and its root NaN. In general the error is
# about $2^{-24} \mu^2$, so *relative* to the variance
#
# $$\text{error} \approx 2^{-24} \left(\frac{\mu}{\sigma}\right)^2.$$
#
# The first formula needs μ before it can begin, so it reads x twice. Can one pass be stable, too? Yes: a program has its block in
# registers, where a second look costs nothing, and two blocks can be **merged**. Keep of each its number of values n, its mean, and
# $M_2 = \sum (x - \text{mean})^2$.

# %% [markdown]
# ### Your turn: merge two blocks
#
# With $d = \text{mean}_b - \text{mean}_a$ (Chan, Golub and LeVeque, 1979):
#
# $$n = n_a + n_b \qquad \text{mean} = \text{mean}_a + d\,\frac{n_b}{n} \qquad M_2 = M_{2,a} + M_{2,b} + d^2\,\frac{n_a n_b}{n}$$


# %%
def my_merge(a, b):
    """(n, mean, M2) of two blocks -> (n, mean, M2) of both together."""
    raise NotImplementedError  # your turn


# %%
def stats(x):
    """(n, mean, M2) of one block, seen from its first value: x - x[0] is small, and exact where the mean is large."""
    d = x - x[0]
    shift = d.mean()
    return len(x), x[0] + shift, ((d - shift) ** 2).sum()


def merged_variance(x, merge, block=1024):
    """The variance of x, block by block."""
    blocks = [stats(part) for part in x.flatten().split(block)]
    while len(blocks) > 1:  # pairs, then pairs of pairs, ...
        blocks = [merge(*blocks[i : i + 2]) if i + 1 < len(blocks) else blocks[i] for i in range(0, len(blocks), 2)]
    n, _, m2 = blocks[0]
    return m2 / n


def check_merge(merge):
    try:
        found = merged_variance(x, merge).item()
    except NotImplementedError:
        return print("not yet")
    true = x.double().var(correction=0).item()
    print("right" if abs(found - true) < 1e-5 * true else f"not yet: the variance comes out as {found:.6f} and is {true:.6f}")


check_merge(my_merge)

# %% [markdown]
# The answer (folded):


# %% jupyter={"source_hidden": true}
def merge(a, b):
    (n_a, mean_a, m_a), (n_b, mean_b, m_b) = a, b
    n, d = n_a + n_b, mean_b - mean_a
    return n, mean_a + d * (n_b / n), m_a + m_b + d * d * (n_a * n_b / n)


check_merge(merge)

# %%
means = np.logspace(-2, 5, 22)
noise = torch.randn(32**3, dtype=torch.float64)
formulas = {
    "E[x²] − mean²: one pass": lambda x: (x**2).mean() - x.mean() ** 2,
    "E[(x − mean)²]: two passes": lambda x: ((x - x.mean()) ** 2).mean(),
    "blocks merged: one pass": lambda x: merged_variance(x, merge),
}
errors = {name: [] for name in formulas}
for m in means:
    x = (m + 0.1 * noise).float()
    true = x.double().var(correction=0)
    for name, formula in formulas.items():
        errors[name].append(abs(formula(x) - true).item() / true.item())

fig, ax = plt.subplots(figsize=(8, 4.3), layout="constrained")
for (name, e), style in zip(errors.items(), ("o-", "s-", "^-")):
    ax.loglog(means, np.maximum(e, 1e-9), style, ms=4, label=name)
ax.loglog(means, 2.0**-24 * (means / 0.1) ** 2, ":", color="gray", label="2⁻²⁴ (mean / deviation)²")
ax.axhline(1, color="tab:red", lw=0.8)
ax.text(0.012, 1.5, "above this line the result means nothing", color="tab:red", fontsize=8)
ax.set(
    xlabel="mean of x (standard deviation 0.1)",
    ylabel="relative error of the variance",
    ylim=(5e-10, 1e6),
    title="Two formulas that are equal on paper, in float32",
)
ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.9))
ax.grid(alpha=0.3)
plt.show()

# %% [markdown]
# The tempting formula loses two digits with every factor of ten, as predicted, and is noise from a mean of a few hundred on. Merged blocks
# stay exact far beyond that, also in one pass. Is a mean so far from zero real? Convolutions have biases, images have offsets (CT in
# Hounsfield units reads −1000 in air), and nothing in a network keeps a channel near zero *before* its norm. Here is what a network would
# see:

# %%
from kernels import norm_act_ref
from kernels.norm_act import norm_act_plain, norm_act_triton

wave = torch.linspace(0, 6.28, 32)
x = torch.sin(wave)[:, None, None] * torch.cos(2 * wave)[None, :, None] + 0.3 * torch.randn(32, 32, 8)
x = (1000 + 0.1 * x / x.std())[None, None]  # (1, 1, 32, 32, 8), mean 1000, standard deviation 0.1
naive = (x - x.mean()) / ((x**2).mean() - x.mean() ** 2 + 1e-5).sqrt()
if triton:
    with count_triton() as traffic:
        norm_act_triton(x)  # no affine, no slope: the norm alone
    print(f"norm_act_triton: {total(traffic).bytes / x.numel():.2f} bytes an element, launches of", ", ".join(traffic))
pictures = {
    "definition, float64": norm_act_ref(x, upcast=True),
    "E[x²] − mean²": naive,
    "norm_act": norm_act_triton(x) if triton else norm_act_plain(x),
}
fig, axes = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained")
for ax, (title, y) in zip(axes, pictures.items()):
    shown = ax.imshow(y[0, 0, :, :, 4], cmap="RdBu_r", vmin=-3, vmax=3)
    ax.set(title=f"{title}\nstandard deviation {y.std().item():.3f}", xticks=[], yticks=[])
fig.colorbar(shown, ax=axes, shrink=0.8)
plt.show()

# %% [markdown]
# The kernel takes x twice (the statistics, then the norm) and writes y once: 12 bytes an element, the fewest for a volume that does not fit
# into a multiprocessor.
#
# ## What the compiler made of it
#
# The interpreter says nothing about machine code. But Triton can compile for a GPU that is not there. Three things to look at:
#
# * **Load width.** A program's block is shared out among threads, here 256. A thread can fetch up to 128 bits, four floats, with one
#   instruction. The compiler does so only if it can prove that addresses are multiples of 16 bytes.
# * **Registers.** A thread holds its numbers in at most 255 registers of 32 bits; what does not fit is **spilled** to memory, the traffic
#   that we came to avoid.
# * **Occupancy.** A multiprocessor of these GPUs has 65,536 registers for all programs that are on it at a time (CUDA's programming guide).
#   While one waits for memory, another can go on: the more fit, the better.
#
# Below, the kernel of puzzle 1 is compiled for sm_90 (the H100), in a process of its own without `TRITON_INTERPRET`, for several block
# sizes, each worked on by 256 threads; once with the promise that `n` and the pointers are multiples of 16, which Triton gives the compiler
# where a launch's arguments are, and once without.

# %%
kernel = sums  # my_sums, once it is right

script = """
import json, sys
sys.path += ["benchmarks", sys.argv[1]]
from budget import nvidia
from mine import kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

signature = {"logits": "*fp32", "target": "*u8", "partials": "*fp32", "n": "i32", "programs": "i32", "BLOCK": "constexpr"}
for block in (1024, 2048, 4096, 8192, 16384):
    for promise in (True, False):
        attrs = {(i,): [["tt.divisibility", 16]] for i in range(4)} if promise else {}
        asm = compile(ASTSource(kernel, signature, {"BLOCK": block}, attrs), GPUTarget("cuda", 90, 32), {"num_warps": 8}).asm  # 256 threads
        registers, spilled, loads, stores = nvidia(asm)
        example = next(line.strip() for line in asm["ptx"].splitlines() if "ld.global" in line)
        row = dict(block=block, promise=promise, registers=registers, spilled=spilled, loads=len(loads), widest=max(loads), example=example)
        print(json.dumps(row))
"""
if triton:
    with tempfile.TemporaryDirectory() as folder:
        code = inspect.getsource(kernel.fn) + f"\nkernel = {kernel.fn.__name__}\n"
        Path(folder, "mine.py").write_text("import triton.language as tl\nfrom triton import jit\n\n" + code)
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run([sys.executable, "-c", script, folder], env=environment, capture_output=True, text=True)
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    print(done.stderr or f"{'block':>6} promise registers spilled loads  widest")
    for r in compiled:
        promise, example = "yes" if r["promise"] else "no", f"{r['widest']} bits: {r['example']}"
        print(f"{r['block']:6} {promise:7} {r['registers']:9} {r['spilled']:7} {r['loads']:5}  {example}")

# %%
if triton:
    fig, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    for promise, style in ((True, "o-"), (False, "s--")):
        rows = [r for r in compiled if r["promise"] == promise]
        for ax, key in zip(axes, ("loads", "registers", "spilled")):
            ax.plot([r["block"] for r in rows], [r[key] for r in rows], style, label="aligned" if promise else "no promise")
    for ax, title in zip(axes, ("load instructions a thread", "registers a thread", "bytes spilled a thread")):
        ax.set_xscale("log", base=2)
        ax.set(xlabel="BLOCK, by 256 threads", title=title)
        ax.grid(alpha=0.3)
    axes[0].set_yscale("log", base=2)
    axes[1].axhline(255, color="tab:red", lw=0.8)
    axes[0].legend(fontsize=8)
    plt.show()

# %% [markdown]
# With the promise a thread fetches four floats, or sixteen labels, at once; without it, a number at a time, with four to sixteen times the
# instructions. A volume whose n is no multiple of 16 gets that worse kernel. Larger blocks keep more loads under way at a time, and cost
# registers, until they spill.
#
# `benchmarks/budget.py` does this for every kernel of this repository and four GPUs. It compiles, reads the machine code, and fails where a
# kernel spills, or loads less than 128 bits at a time where the layout would allow it. Its table is `results/budget.csv`:

# %%
budget = list(csv.DictReader(open("results/budget.csv")))
families = [
    "dice_ce sums",
    "dice_ce grad",
    "norm_act_tile_stats",
    "norm_act_forward",
    "norm_act_tile_sums",
    "norm_act_backward",
    "voxel_shuffle",
]
colors = {"sm_80": "tab:blue", "sm_90": "tab:green", "sm_100": "tab:purple", "gfx942": "tab:red"}
fig, ax = plt.subplots(figsize=(9, 4.2), layout="constrained")
for y, family in enumerate(families):
    for k, (gpu, color) in enumerate(colors.items()):
        registers = [int(r["registers"]) for r in budget if r["kernel"].startswith(family) and r["target"] == gpu]
        ax.plot(registers, [y + 0.18 * (k - 1.5)] * len(registers), "|", ms=9, color=color, label=gpu if y == 0 else None)
ax.set(xlabel="registers a thread", xlim=(0, 150), yticks=range(len(families)), yticklabels=families)
ax.set_title(f"Every kernel on four GPUs: {len(budget)} compiled, {sum(int(r['spilled']) > 0 for r in budget)} spill")
top = ax.secondary_xaxis("top")
top.set(xticks=[65536 / 256 / k for k in (8, 4, 3, 2)], xticklabels=[8, 4, 3, 2], xlabel="programs of 256 threads a multiprocessor (sm_*)")
for k in (8, 4, 3, 2):
    ax.axvline(65536 / 256 / k, color="gray", lw=0.8, ls=":")
ax.invert_yaxis()
ax.legend(fontsize=8, loc="lower right")
plt.show()
grad = next(r for r in budget if r["kernel"] == "dice_ce grad C=2 float32 ncdhw" and r["target"] == "sm_90")
fit = 65536 // (int(grad["registers"]) * 256)
print(f"{grad['kernel']} on sm_90: {grad['registers']} registers a thread, so {fit} programs a multiprocessor")

# %% [markdown]
# ## Where to go from here
#
# * `kernels/dice_ce.py`, `norm_act.py`, `voxel_shuffle.py`: each opens with its equations, backward pass, bytes and layout, as here, and
#   stands alone.
# * `python benchmarks/traffic.py`, `benchmarks/budget.py`: the meter and the compiler's table, live. `benchmarks/kernels.py` measures times
#   where there is a GPU.
# * `tutorials/exercises.md`: a Tversky term in the kernel, and nine more.
