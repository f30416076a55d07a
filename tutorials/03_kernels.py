# %% [markdown]
# # 3. Kernels: move fewer bytes
#
# Between two convolutions a network does things that need little arithmetic and much time: a norm,
# an activation, a loss. On a GPU this time is spent on moving numbers to and from memory. This
# notebook counts the bytes, asks for the smallest possible number, and builds the loss of the
# second notebook, Dice + cross entropy, as a **fused kernel** that reaches it. (A *kernel* is a
# function that runs on the GPU, starting it once is a *launch*, and a fused one does the work of
# many operations.) You write its two halves yourself, in [Triton](https://triton-lang.org), a
# Python dialect for GPU programs. After that you see how a formula for the variance that is correct
# on paper fails in float32, and what a compiler makes of the kernels.
#
# You need no GPU. With `TRITON_INTERPRET=1` Triton runs its kernels in a slow interpreter on the
# CPU, which is ideal for learning: the numbers are right, and every load and store can be watched.
# **Nothing here was measured on a GPU**: bytes, registers and instructions are counted, and where
# the text needs the speed of a GPU it takes the numbers of the public data sheet and says so.
# (What was measured on one is in
# [results/README.md](../results/README.md#first-measurements-on-a-gpu);
# [how long the notebook takes](../results/tutorials.csv).)

# %%
import os
from pathlib import Path

if Path.cwd().name == "tutorials":  # Jupyter starts here; the code is one folder up
    os.chdir("..")
os.environ["TRITON_INTERPRET"] = "1"  # Triton reads this when it is imported, so it comes first

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
# Colors of the Okabe-Ito palette. No figure has two that color-blind readers would confuse.
BLUE, ORANGE, RED, PINK, SKY = "#0072B2", "#EEBC4D", "#D55E00", "#CC79A7", "#56B4E9"
TRUTH = SKY


def without_triton(kernel):
    """Stands for `triton.jit`: the kernel can be defined, but not run."""
    return kernel


try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:
    triton, tl, jit = None, SimpleNamespace(constexpr=None), without_triton
    print("Triton is not installed; it exists for Linux only. This notebook skips the kernels.")

# %% [markdown]
# ## Memory traffic
#
# In *eager* mode, the usual one, PyTorch runs one operation after the other. Each operation
# **reads** all its inputs from memory and **writes** all its output. So `a * b + c` reads two
# volumes and writes one for the product, and again for the sum, six in all. A single operation
# would need four: read a, b and c, write the result.
#
# `benchmarks/traffic.py` measures this. It observes every operation below autograd, including the
# backward pass, and counts each input as read once and each output as written once. Here it
# observes a straightforward implementation of the loss:

# %%
from peers import eager_dice_ce
from traffic import CountEager, count_triton, total

print(inspect.getsource(eager_dice_ce))

a, b, c = torch.rand(3, 1000)
with CountEager() as small:
    a * b + c
number = sum(t.bytes for t in small.traffic.values()) / len(a)
print(f"a * b + c moves {number:.0f} bytes per number; a number has {a.element_size()}\n")

size = 32
# (B, C, D, H, W), the classes are background and tumor; labels (B, 1, D, H, W)
logits = torch.randn(1, 2, size, size, size, requires_grad=True)
labels = torch.randint(0, 2, (1, 1, size, size, size), dtype=torch.uint8)

with CountEager() as forward:
    loss = eager_dice_ce(logits, labels)
with CountEager() as backward:
    loss.backward()

n = size**3
counters = {"forward": forward, "backward": backward}
moved = {}  # direction: {operation: bytes per voxel}
for direction, counter in counters.items():
    moved[direction] = {op: t.bytes / n for op, t in counter.traffic.items()}
    print(f"{direction:8} {sum(moved[direction].values()):4.0f} bytes per voxel")
both = sum(sum(of_direction.values()) for of_direction in moved.values())
print(f"together {both:4.0f} bytes per voxel; a voxel's logits have", end=" ")
print(f"{2 * logits.element_size()} bytes and its label {labels.element_size()}")

# %%
STYLES = {"forward": dict(color=BLUE), "backward": dict(color=ORANGE, hatch="//")}

fig, ax = plt.subplots(figsize=(9, 5.5), layout="constrained")
names, edge = [], 0
for direction, style in STYLES.items():
    for op, b in moved[direction].items():
        if b > 0.5:  # the other operations work on a few numbers
            label = None if any(direction == d for d, _ in names) else direction
            ax.barh(len(names), b, left=edge, edgecolor="white", label=label, **style)
            ax.text(edge + b + 3, len(names), f"{b:.0f}", va="center", fontsize=8)
            names.append((direction, op))
            edge += b
ax.set(yticks=range(len(names)), yticklabels=[op for _, op in names], xlim=(0, edge + 20))
ax.set(xlabel="bytes per voxel, accumulated", title="Bytes moved by Dice + CE in eager PyTorch")
ax.invert_yaxis()
ax.legend()
plt.show()

# %% [markdown]
# Each bar is one kind of operation; repeated calls are added up. The bytes moved are many times
# those of the logits and the label (the last line above): every intermediate result is as large as
# the volume, is written to memory and read again. The largest bar, `_to_copy`, consists of
# conversions only: `one_hot` needs an int64 label and makes an int64 per class, which then become
# floats.
#
# ### Your turn: the fewest bytes
#
# What is the smallest number of bytes per voxel that the forward and the backward pass can move,
# with two classes, float32 logits and uint8 labels? Three facts help. The loss is one number, so
# writing it costs nothing per voxel. The gradient is as large as the logits. And the gradient of
# *each* voxel depends on the Dice score, that is on *all* voxels, so the backward pass can only
# start after the forward pass has read everything.

# %% tags=["exercise"]
least_forward = ...  # your turn: bytes per voxel
least_backward = ...


# %% tags=["check"]
def check_least(forward, backward):
    if ... in (forward, backward):
        print("not yet: replace the dots by two numbers")
    elif (forward, backward) == (9, 17):
        print(f"right: {forward} + {backward} = {forward + backward} bytes per voxel")
    else:
        print("not yet: what has to be read, and what has to be written?")


check_least(least_forward, least_backward)

# %% [markdown]
# The answer (JupyterLab folds its cell; click on the dots to open it):

# %% jupyter={"source_hidden": true} tags=["solution"]
check_least(
    forward=2 * 4 + 1,  # read two logits and a label
    # Read them again, because nothing as large as the volume was kept; write two gradients.
    backward=2 * 4 + 1 + 2 * 4,
)

# %% [markdown]
# [`results/traffic.csv`](../results/traffic.csv) has the counts for the kernel of this repository,
# for the losses of two widely used libraries, and for the eager code above, on a batch of two
# volumes of 32³ voxels:

# %%
table = list(csv.DictReader(open("results/traffic.csv")))
names = ["ours Triton", "MONAI", "nnU-Net", "eager"]
fig, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained", sharex=True, sharey=True)
for ax, dtype in zip(axes, ("float32", "bfloat16")):
    wanted = ("dice_ce", dtype, "NCDHW")
    rows = {r["what"]: r for r in table if (r["op"], r["dtype"], r["layout"]) == wanted}
    start = np.zeros(len(names))
    for direction, style in STYLES.items():
        b = np.array([float(rows[name][direction]) for name in names])
        ax.barh(names, b, left=start, label=direction, edgecolor="white", **style)
        start += b
    for y, name in enumerate(names):
        launches = sum(int(rows[name][f"{direction}_launches"]) for direction in STYLES)
        ax.text(start[y] + 5, y, f"{start[y]:.0f} in {launches}", va="center", fontsize=9)
        print(f"{dtype:8} {name:11} {start[y]:4.0f} bytes per voxel in {launches} launches")
    ax.set(title=f"{dtype} logits", xlabel="bytes per voxel, in how many launches", xlim=(0, 440))
axes[0].invert_yaxis()
axes[1].legend(loc="upper right", fontsize=8)
plt.show()

# %% [markdown]
# With bfloat16 the logits and the gradient have half the size, and the kernel moves about half the
# bytes. The eager code moves more than before, because it converts to float32 first.
#
# ## The roofline
#
# How long does this take? A GPU can move at most `bandwidth` bytes per second and do at most `peak`
# operations per second, both at the same time. So
#
# $$\text{time} \;\ge\; \max\left(\frac{\text{bytes}}{\text{bandwidth}},\
#   \frac{\text{operations}}{\text{peak}}\right)
# \qquad\text{or}\qquad
# \text{speed} \;\le\; \min(\text{intensity} \cdot \text{bandwidth},\ \text{peak}),
# \qquad \text{intensity} = \frac{\text{operations}}{\text{bytes}}.$$
#
# Plotted over the intensity, the bound has the shape of a roof: a slope where memory limits the
# speed, and a ceiling where arithmetic does. The numbers of the roof below are **those of NVIDIA's
# data sheet of the H100 SXM, not measurements**: 3.35 TB/s; 67 TFLOP/s in float32; 989 TFLOP/s in
# bfloat16 on the tensor cores (the 1,979 of the data sheet are for sparse matrices).
#
# The operations of the loss are a rough count: 50 per voxel for both passes, where an exponential
# counts as one. A 3×3×3 convolution from 32 to 32 channels does 2 · 27 · 32 · 32 operations per
# voxel and, if nothing is read twice, moves 64 numbers.

# %%
bandwidth = 3.35e12  # of the H100 SXM, by its data sheet, as the next line
peak = {"float32": 67e12, "bfloat16, tensor cores": 989e12}
convolution = 2 * 27 * 32 * 32  # operations per voxel
points = {  # intensity, type of arithmetic, color, marker
    "loss, eager": (50 / 330, "float32", RED, "o"),
    "loss, MONAI": (50 / 246, "float32", PINK, "s"),
    "loss, fused": (50 / 26, "float32", SKY, "^"),
    "convolution, float32": (convolution / (64 * 4), "float32", BLUE, "D"),
    "convolution, bfloat16": (convolution / (64 * 2), "bfloat16, tensor cores", "black", "v"),
}
x = np.logspace(-1.3, 3.3, 400)
fig, ax = plt.subplots(figsize=(8, 4.3), layout="constrained")
for (name, top), style in zip(peak.items(), ("-", "--")):
    label = f"roof, {name}: {top / 1e12:.0f} TFLOP/s"
    ax.loglog(x, np.minimum(x * bandwidth, top) / 1e12, style, color="gray", label=label)
for name, (intensity, arithmetic, color, marker) in points.items():
    speed = min(intensity * bandwidth, peak[arithmetic]) / 1e12
    label = f"{name}: {intensity:.3g} operations per byte"
    ax.loglog(intensity, speed, marker, ms=9, color=color, label=label)
ax.set(xlabel="intensity, operations per byte", ylabel="largest possible TFLOP/s")
ax.set_title("Roofline of an H100 SXM by its data sheet (nothing was measured)")
ax.legend(fontsize=8, loc="lower right")
ax.grid(alpha=0.3)
plt.show()

# %% [markdown]
# The convolutions reach the ceiling: only more arithmetic units would help. The loss is on the
# slope, fused or not, far to the left. Two things follow. Its arithmetic costs nothing, so
# computing a softmax *twice* to save one pass through memory pays off. And on the slope the number
# of bytes *is* the time:

# %%
voxels = 2 * 96**3  # two patches of the paper's size
for name, b in {"eager": 330, "MONAI": 246, "fused": 26}.items():
    microseconds = b * voxels / bandwidth * 1e6
    print(f"{name:6} {b:4} bytes per voxel: at least {microseconds:4.0f} microseconds", end=" ")
    print("(bandwidth of the data sheet)")

# %% [markdown]
# ## A first kernel
#
# A GPU has about a hundred multiprocessors (an H100 SXM has 132) and one large memory. A Triton
# kernel is a function that is run many times on them, by **programs** that know nothing of each
# other except their own number, `tl.program_id(0)`. A program works on a block of numbers at once:
# `tl.arange` makes a block of indices, `tl.load(pointer + indices, mask)` reads, arithmetic is as
# in NumPy, and `tl.store` writes. The size of a block is a power of two and the size of a volume is
# not, so there is a mask: elements for which it is false are not touched, and read as `other`.
#
# The following kernel counts the tumor voxels of a volume: each program adds up its own block and
# writes **one** number. Read it line by line; the puzzles need all of it.


# %%
@jit
def count(target, partials, n, BLOCK: tl.constexpr):
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,) voxels of this program
    mask = v < n  # the last block may extend beyond the end of the volume
    t = tl.load(target + v, mask=mask, other=0)  # (BLOCK,) labels
    tl.store(partials + tl.program_id(0), tl.sum(t.to(tl.float32), 0))


BLOCK = 1024
target = (torch.rand(5000) < 0.3).to(torch.uint8)
programs = -(-len(target) // BLOCK)  # rounded up
partials = torch.full((programs,), float("nan"))
if triton:
    with count_triton() as traffic:
        count[(programs,)](target, partials, len(target), BLOCK=BLOCK)
    print("partial sums", partials.tolist())
    print(f"their sum {partials.sum().item():.0f}, PyTorch's sum {target.sum().item()}")
    per_voxel = total(traffic).bytes / len(target)
    print(f"{per_voxel:.3f} bytes per voxel, in {total(traffic).launches} launch")

# %% [markdown]
# One byte per voxel, and a few for the partial sums. Masked elements do not count: 5 programs of
# 1024 elements have 5120, but 5000 labels were read.
#
# Why partial sums, and not one total to which every program adds (`tl.atomic_add`)? Programs finish
# in any order, and a sum of floats depends on the order: the same input would give different bits
# each time. Which voxels a program gets depends on the layout in memory, where a volume is one long
# row with the last axis fastest. In the PET/CT volumes here the first axis runs across the body,
# from one arm to the other, so a block is a slab of the body, a vertical strip in the figure:

# %%
import phantom

study = phantom.petct_study(10, has_tumor=True)  # a synthetic patient with 4 mm voxels
y = int(study.seg.sum((0, 2)).argmax())  # the coronal slice with the most tumor
# Blocks of 65,536 voxels here; smaller ones would be too many to see.
program_of = (np.arange(study.seg.size) // (64 * BLOCK)).reshape(study.seg.shape)
sums_of = np.bincount(program_of.ravel(), study.seg.ravel())

fig, axes = plt.subplots(1, 3, figsize=(9, 5.2), layout="constrained")
shown = axes[0].imshow(study.suv[:, y].T, origin="lower", cmap="gray_r", vmin=0, vmax=10)
fig.colorbar(shown, ax=axes[0], location="bottom", label="SUV", extend="max")
axes[0].contour(study.seg[:, y].T, [0.5], colors=TRUTH)
axes[0].set_title("PET, tumor outlined")
shown = axes[1].imshow(program_of[:, y].T, origin="lower", cmap="cividis")
fig.colorbar(shown, ax=axes[1], location="bottom", label="program")
axes[1].contour(study.seg[:, y].T, [0.5], colors="white")
axes[1].set_title("program of each voxel, tumor outlined")
colors = plt.get_cmap("cividis")(np.linspace(0, 1, len(sums_of)))
axes[2].bar(range(len(sums_of)), sums_of, color=colors)
axes[2].set(title="its partial sum", xlabel="program", ylabel="tumor voxels")
for ax in axes[:2]:
    ax.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## Puzzle 1: the sums
#
# **Equation.** With two classes only the difference of the logits matters, $u = l_1 - l_0$: the
# probability of tumor is $p = 1 / (1 + e^{-u})$. With labels $t \in \{0, 1\}$, the loss needs four
# sums over the voxels,
#
# $$I = \sum p\,t \qquad P = \sum p \qquad T = \sum t \qquad N = \sum \log(1 + e^{z}),\quad
# z = \begin{cases} -u & t = 1 \\ \phantom{-}u & t = 0 \end{cases}$$
#
# ($N$ is the sum of the cross entropies, $-\log p = \log(1 + e^{-u})$ for a tumor voxel and
# $-\log(1 - p) = \log(1 + e^{u})$ for any other. The number of voxels, $N$ in notebook 2, is $n$
# here.) Then
#
# $$\text{Dice} = \frac{2I + \varepsilon}{P + T + \varepsilon} \qquad
# \text{loss} = 1 - \text{Dice} + \frac{N}{n},
# \qquad \varepsilon = 10^{-5}.$$
#
# **Overflow.** A network may be very certain, and $e^{100}$ is beyond float32. The second and third
# line below avoid it:

# %%
u = torch.tensor([-100.0, -10.0, 0.0, 10.0, 100.0])
e = (-u.abs()).exp()  # never above 1
formulas = {
    "log(1 + e^u)": torch.log(1 + u.exp()),
    "the same: max(u, 0) + log(1 + e^-|u|)": u.clamp(min=0) + torch.log(1 + e),
    "p: (1 if u > 0, else e^-|u|) / (1 + e^-|u|)": torch.where(u > 0, 1, e) / (1 + e),
}
for formula, values in formulas.items():
    print(f"{formula:44}", " ".join(f"{value:.3g}" for value in values.tolist()))

# %% [markdown]
# **Specification.** Complete the kernel: read each logit and each label once; `partials[0]` to
# `partials[3]` get this program's I, P, T and N. Voxels outside the volume must add nothing. You
# need about ten lines, and nothing that the first kernel or the cell above does not show (`tl.exp`,
# `tl.log`, `tl.abs`, `tl.maximum` and `tl.where` do what you expect).


# %% tags=["exercise"]
@jit
def my_sums(
    logits,  # (2, n) float32: l0 of all voxels, then l1
    target,  # (n,) uint8
    partials,  # (4, programs) float32
    n,
    programs,
    BLOCK: tl.constexpr,
):
    # Your turn: v and mask; l0, l1 and t; u, p and the cross entropy. Store the four sums at
    # partials + k * programs + tl.program_id(0).
    pass


# %% tags=["check"]
def exact_sums(logits, target):
    """I, P, T, N in float64, by PyTorch."""
    u, t = (logits[1] - logits[0]).double(), target.double()
    p = u.sigmoid()
    nll = torch.nn.functional.softplus(torch.where(t == 1, -u, u))
    return torch.stack([(p * t).sum(), p.sum(), t.sum(), nll.sum()])


def with_room(x):
    """x in memory that continues for a block, so that a forgotten mask does no harm."""
    return torch.cat([x.flatten(), x.new_zeros(BLOCK)])[: x.numel()].view(x.shape)


def example(n, scale):
    """Random logits (2, n) and labels (n,)."""
    labels = (torch.rand(n) < 0.3).to(torch.uint8)
    return with_room(scale * torch.randn(2, n)), with_room(labels)


def report(bytes_per_voxel, least):
    more = "" if bytes_per_voxel < least + 0.1 else f": more than the {least} that are needed"
    print(f"right, with {bytes_per_voxel:.2f} bytes per voxel{more}")


def check_sums(kernel, n=5000):
    if triton is None:
        return print("not checked: Triton is not installed")
    programs = -(-n // BLOCK)
    for scale in (2, 1000):  # usual logits, and those of a network that is very certain
        logits, target = example(n, scale)
        partials = torch.full((4, programs), float("nan"))
        with count_triton() as traffic:
            kernel[(programs,)](logits, target, partials, n, programs, BLOCK=BLOCK)
        if partials.isnan().all():
            return print("not yet: the kernel has written nothing")
        found, exact = partials.double().sum(1), exact_sums(logits, target)
        for name, a, b in zip("IPTN", found.tolist(), exact.tolist()):
            if not abs(a - b) <= 1e-5 * b:
                print(f"not yet: for logits of size {scale}, {name} is {a:.3f},", end=" ")
                return print(f"and {b:.3f} is correct")
    report(total(traffic).bytes / n, least=9)


check_sums(my_sums)

# %% [markdown]
# The answer (folded):


# %% jupyter={"source_hidden": true} tags=["solution"]
@jit
def sums(logits, target, partials, n, programs, BLOCK: tl.constexpr):
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = v < n
    l0 = tl.load(logits + v, mask=mask, other=0.0)
    l1 = tl.load(logits + n + v, mask=mask, other=0.0)
    t = tl.load(target + v, mask=mask, other=0).to(tl.float32)
    u = l1 - l0
    e = tl.exp(-tl.abs(u))
    p = tl.where(mask, tl.where(u > 0, 1.0, e) / (1.0 + e), 0.0)
    z = tl.where(t == 1, -u, u)
    nll = tl.where(mask, tl.maximum(z, 0.0) + tl.log(1.0 + e), 0.0)
    out = partials + tl.program_id(0)
    tl.store(out, tl.sum(p * t, 0))
    tl.store(out + programs, tl.sum(p, 0))
    tl.store(out + 2 * programs, tl.sum(t, 0))
    tl.store(out + 3 * programs, tl.sum(nll, 0))


check_sums(sums)

# %% [markdown]
# ## From the sums to the loss
#
# A second kernel, a single program, adds up the partial sums and computes the loss. A few lines of
# PyTorch could do this, but each would be a separate launch that moves a few numbers. The kernel
# also prepares the backward pass. By the quotient rule, with $\text{den} = P + T + \varepsilon$,
#
# $$\frac{\partial (1 - \text{Dice})}{\partial p_v}
#   = \frac{\text{Dice}}{\text{den}} - \frac{2}{\text{den}}\, t_v = a + b\,t_v:$$
#
# two numbers, a and b, hold all that a voxel needs to know about the others. The partial sums are
# added in float64, which costs nothing, because there are only a few.


# %%
@jit
def finish(partials, loss, coefficients, n, programs, STEP: tl.constexpr):
    i = tl.arange(0, STEP)  # STEP >= programs
    mask = i < programs
    inter = tl.sum(tl.load(partials + i, mask=mask, other=0.0).to(tl.float64), 0)
    pred = tl.sum(tl.load(partials + programs + i, mask=mask, other=0.0).to(tl.float64), 0)
    true = tl.sum(tl.load(partials + 2 * programs + i, mask=mask, other=0.0).to(tl.float64), 0)
    nll = tl.sum(tl.load(partials + 3 * programs + i, mask=mask, other=0.0).to(tl.float64), 0)
    den = pred + true + 1e-5
    dice = (2 * inter + 1e-5) / den
    tl.store(loss, 1 - dice + nll / n)
    tl.store(coefficients, dice / den)  # a
    tl.store(coefficients + 1, -2 / den)  # b


# %% [markdown]
# ## Puzzle 2: the gradient
#
# **Equation.** The sigmoid has $\partial p / \partial l_1 = p (1 - p) = -\,\partial p / \partial
# l_0$, and the cross entropy has the well known gradient $p - t$:
#
# $$\frac{\partial\,\text{loss}}{\partial l_1} = (a + b\,t)\; p\,(1 - p) + \frac{p - t}{n}
#   = -\frac{\partial\,\text{loss}}{\partial l_0}.$$
#
# **Specification.** Read the logits and labels again, and three numbers: `grad_output` (the
# gradient of whatever follows the loss, a factor of the result), a and b. Write the gradient of
# both logits, once.


# %% tags=["exercise"]
@jit
def my_gradient(
    grad_output,  # () float32
    logits,  # (2, n) float32
    target,  # (n,) uint8
    coefficients,  # (2,) float32: a and b
    grad,  # (2, n) float32
    n,
    BLOCK: tl.constexpr,
):
    pass  # your turn; tl.load(coefficients) is a, tl.load(coefficients + 1) is b


# %% tags=["check"]
def check_gradient(kernel, n=5000):
    if triton is None:
        return print("not checked: Triton is not installed")
    logits, target = example(n, scale=3)
    logits.requires_grad_()
    inter, pred, true, _ = exact_sums(logits, target)
    den = pred + true + 1e-5
    coefficients = torch.stack([(2 * inter + 1e-5) / den**2, -2 / den]).float().detach()
    eager_dice_ce(logits.view(1, 2, n, 1, 1), target.view(1, 1, n, 1, 1)).backward()
    wanted = -1.7 * logits.grad  # by autograd
    grad = with_room(torch.full((2, n), float("nan")))
    arguments = (torch.tensor(-1.7), logits.detach(), target, coefficients, grad, n)
    with count_triton() as traffic:
        kernel[(-(-n // BLOCK),)](*arguments, BLOCK=BLOCK)
    if grad.isnan().all():
        return print("not yet: the kernel has written nothing")
    if grad.as_strided((BLOCK,), (1,), 2 * n).any():
        return print("not yet: the kernel writes beyond the end of its output; is there a mask?")
    wrong = ~((grad - wanted).abs() <= 1e-5 * wanted.abs().max())
    if wrong.any():
        c, v = wrong.nonzero()[0].tolist()
        print(f"not yet: {wrong.sum()} of {2 * n} numbers are wrong;", end=" ")
        print(f"d loss / d l{c} of voxel {v} is {grad[c, v]:.3g},", end=" ")
        return print(f"and {wanted[c, v]:.3g} is correct")
    report(total(traffic).bytes / n, least=17)


check_gradient(my_gradient)

# %% [markdown]
# The answer (folded):


# %% jupyter={"source_hidden": true} tags=["solution"]
@jit
def gradient(grad_output, logits, target, coefficients, grad, n, BLOCK: tl.constexpr):
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = v < n
    l0 = tl.load(logits + v, mask=mask, other=0.0)
    l1 = tl.load(logits + n + v, mask=mask, other=0.0)
    t = tl.load(target + v, mask=mask, other=0).to(tl.float32)
    u = l1 - l0
    e = tl.exp(-tl.abs(u))
    p = tl.where(u > 0, 1.0, e) / (1.0 + e)
    q = tl.where(u > 0, e, 1.0) / (1.0 + e)  # 1 - p, but with all its digits when p is nearly 1
    a, b = tl.load(coefficients), tl.load(coefficients + 1)
    g = (a + b * t) * p * q + tl.where(t == 1, -q, p) / n
    g *= tl.load(grad_output)
    tl.store(grad + v, -g, mask=mask)
    tl.store(grad + n + v, g, mask=mask)


check_gradient(gradient)

# %% [markdown]
# ## The complete loss
#
# Three launches, connected to autograd. Between the forward and the backward pass we keep the
# inputs, which exist anyway, and two numbers. The kernels are those of the answers; to use yours,
# run `sums, gradient = my_sums, my_gradient` first.


# %%
class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target):
        n = target.numel()
        programs = triton.cdiv(n, BLOCK)
        partials, coefficients = logits.new_empty(4, programs), logits.new_empty(2)
        loss = logits.new_empty(())
        sums[(programs,)](logits, target, partials, n, programs, BLOCK=BLOCK)
        step = triton.next_power_of_2(programs)
        finish[(1,)](partials, loss, coefficients, n, programs, STEP=step)
        ctx.save_for_backward(logits, target, coefficients)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        logits, target, coefficients = ctx.saved_tensors
        grad, n = torch.empty_like(logits), target.numel()
        arguments = (grad_output, logits, target, coefficients, grad, n)
        gradient[(triton.cdiv(n, BLOCK),)](*arguments, BLOCK=BLOCK)
        return grad, None


# %%
from kernels import dice_ce_ref  # the library's definition: plain PyTorch, derived by autograd
from kernels.dice_ce import dice_ce_triton


def library_dice_ce(logits, target):
    return dice_ce_triton(logits, target)[0]


n = 24**3
logits = torch.randn(1, 2, 24, 24, 24, requires_grad=True)
labels = (torch.rand(1, 1, 24, 24, 24) < 0.1).to(torch.uint8)
exact_loss, _ = dice_ce_ref(logits.double(), labels)
(exact_grad,) = torch.autograd.grad(exact_loss, logits)
ways = {"eager": eager_dice_ce, "library": library_dice_ce, "yours": Fused.apply}
if triton:
    from traffic import measure

    per_voxel = {}
    print("         error of loss   of gradient   bytes per voxel   launches")
    for name, way in ways.items():
        loss = way(logits, labels)
        (grad,) = torch.autograd.grad(loss, logits)
        error = abs(loss - exact_loss).item()
        grad_error = ((grad - exact_grad).abs().max() / exact_grad.abs().max()).item()
        first, second = measure(way, (logits, labels))
        print(f"{name:8} {error:13.0e} {grad_error:13.0e}", end=" ")
        per_voxel[name] = (first + second).bytes / n
        print(f"{per_voxel[name]:17.2f}   {first.launches} + {second.launches}")
    print(f"eager moves {per_voxel['eager'] / per_voxel['yours']:.1f} times the bytes of yours")

# %% [markdown]
# (The error of the gradient is relative to its largest value.) The kernel moves the fewest bytes
# that the task allows, and the result is as exact as that of the eager code. `kernels/dice_ce.py`
# is this kernel with everything that a library has to add: more classes and their weights, ignored
# voxels, one Dice per sample, `channels_last` and strided tensors, volumes beyond 2³¹ numbers. You
# have seen all that is essential in it.
#
# What does the gradient look like? Take the patient from above and a poor network,
# `logits = (0, SUV − 4)`. It predicts tumor wherever the uptake is high.

# %%
from matplotlib.colors import SymLogNorm

if triton:
    tumor_logit = torch.from_numpy(study.suv) - 4
    logits = torch.stack([torch.zeros_like(tumor_logit), tumor_logit])[None].requires_grad_()
    labels = torch.from_numpy(study.seg)[None, None]
    BLOCK = 2**14  # in the interpreter a program costs about a millisecond, whatever its size
    loss = Fused.apply(logits, labels)
    loss.backward()

    top = logits.grad[0, 1, :, y].abs().max().item()
    signed = SymLogNorm(linthresh=top / 100, vmin=-top, vmax=top)  # logarithmic except near 0
    tumor_p = logits.detach()[0, 1].sigmoid()
    pictures = {
        "PET, tumor outlined": (study.suv, dict(cmap="gray_r", vmin=0, vmax=10), "SUV"),
        "prediction": (tumor_p, dict(cmap="magma", vmin=0, vmax=1), "probability of tumor"),
        "gradient": (logits.grad[0, 1], dict(cmap="RdBu_r", norm=signed), "d loss / d l₁"),
    }
    fig, axes = plt.subplots(1, 3, figsize=(9, 5.4), layout="constrained")
    for ax, (title, (volume, style, label)) in zip(axes, pictures.items()):
        shown = ax.imshow(np.asarray(volume[:, y]).T, origin="lower", **style)
        ax.contour(study.seg[:, y].T, [0.5], colors=TRUTH, linewidths=1)
        ax.set(title=title, xticks=[], yticks=[])
        bar = fig.colorbar(shown, ax=ax, location="bottom", shrink=0.9, label=label)
    bar.set_ticks([-top, 0, top], labels=[f"{-top:.0e}", "0", f"{top:.0e}"])
    plt.show()
    print(f"loss {loss.item():.3f}")

# %% [markdown]
# (The colors of the gradient are on a logarithmic scale.) Where it is negative (blue), a step
# against it raises the logit; where it is positive (red), the step lowers it. So the step
# strengthens the tumor, which is active but was partly missed, and weakens brain and kidneys. The
# few tumor voxels have the largest gradients: that is Dice, which divides by the sizes of tumor and
# prediction and not by the number of all voxels.
#
# ## A variance that fails
#
# Another fused kernel of this repository, `kernels/norm_act.py`, is the instance norm (each channel
# minus its mean, divided by its standard deviation) with all that follows it. It needs a mean and a
# variance, and there are two formulas, equal on paper:
#
# $$\operatorname{var} = \operatorname{E}\big[(x - \mu)^2\big] = \operatorname{E}[x^2] - \mu^2.$$
#
# The second formula reads x only once, so it is tempting. Try both on a volume with mean 1000 and
# standard deviation 0.1:

# %%
x = (1000 + 0.1 * torch.randn(32, 32, 32, dtype=torch.float64)).float()
mean = x.mean()
print(f"in float64          {x.double().var(correction=0).item():.6f}")
print(f"E[(x - mean)^2]     {((x - mean) ** 2).mean().item():.6f}")
print(f"E[x^2] - mean^2     {((x**2).mean() - mean**2).item():.6f}")
print(f"floats next to mean^2 are {np.spacing(np.float32(mean**2)):.2g} apart")

# %% [markdown]
# A float32 has 24 binary digits. Neighboring floats of the size of $x^2$ are further apart than the
# variance (the last line): it is below the last digit of both terms, and their difference is only
# rounding error. It may even be negative, and its root NaN. In general the error is about
# $2^{-24} \mu^2$, so *relative* to the variance
#
# $$\text{error} \approx 2^{-24} \left(\frac{\mu}{\sigma}\right)^2.$$
#
# The first formula needs μ before it can begin, so it reads x twice. Can one pass be stable, too?
# Yes: a program has its block in registers, next to the arithmetic, where reading it twice costs
# nothing, and the results of two blocks can be **merged**. Keep of each block the number of values
# n, the mean, and $M_2 = \sum (x - \text{mean})^2$.

# %% [markdown]
# ### Your turn: merge two blocks
#
# With $d = \text{mean}_b - \text{mean}_a$ (Chan, Golub and LeVeque, 1979):
#
# $$n = n_a + n_b \qquad \text{mean} = \text{mean}_a + d\,\frac{n_b}{n} \qquad
# M_2 = M_{2,a} + M_{2,b} + d^2\,\frac{n_a n_b}{n}$$


# %% tags=["exercise"]
def my_merge(a, b):
    """(n, mean, M2) of two blocks -> (n, mean, M2) of both together."""
    raise NotImplementedError  # your turn


# %% tags=["check"]
def block_stats(x):
    """(n, mean, M2) of one block. x - x[0] is small, and exact if the mean is large."""
    d = x - x[0]
    shift = d.mean()
    return len(x), x[0] + shift, ((d - shift) ** 2).sum()


def merged_variance(x, merge, block=1024):
    """The variance of x, computed block by block."""
    blocks = [block_stats(part) for part in x.flatten().split(block)]
    while len(blocks) > 1:  # merge pairs, then pairs of pairs, ...
        pairs = [blocks[i : i + 2] for i in range(0, len(blocks), 2)]
        blocks = [merge(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    n, _, m2 = blocks[0]
    return m2 / n


def check_merge(merge):
    try:
        found = merged_variance(x, merge).item()
    except NotImplementedError:
        return print("not yet: my_merge is empty")
    except TypeError as error:  # what it returns is not (n, mean, M2)
        return print("not yet:", error)
    exact = x.double().var(correction=0).item()
    if abs(found - exact) < 1e-5 * exact:
        print("right")
    else:
        print(f"not yet: the variance is {found:.6f}, and {exact:.6f} is correct")


check_merge(my_merge)

# %% [markdown]
# The answer (folded):


# %% jupyter={"source_hidden": true} tags=["solution"]
def merge(a, b):
    (n_a, mean_a, m_a), (n_b, mean_b, m_b) = a, b
    n = n_a + n_b
    d = mean_b - mean_a
    return n, mean_a + d * (n_b / n), m_a + m_b + d * d * (n_a * n_b / n)


check_merge(merge)


# %%
def one_pass(x):
    return (x**2).mean() - x.mean() ** 2


def two_passes(x):
    return ((x - x.mean()) ** 2).mean()


def merged(x):
    return merged_variance(x, merge)


formulas = {  # formula, color and marker
    "E[x²] − mean²: one pass": (one_pass, RED, "o-"),
    "E[(x − mean)²]: two passes": (two_passes, BLUE, "s--"),
    "merged blocks: one pass": (merged, SKY, "^-"),
}
means = np.logspace(-2, 5, 22)
noise = torch.randn(32**3, dtype=torch.float64)
errors = {name: [] for name in formulas}
for mean in means:
    x = (mean + 0.1 * noise).float()
    exact = x.double().var(correction=0)
    for name, (formula, _, _) in formulas.items():
        errors[name].append(abs(formula(x) - exact).item() / exact.item())

fig, ax = plt.subplots(figsize=(8, 4.3), layout="constrained")
for name, (_, color, style) in formulas.items():
    ax.loglog(means, np.maximum(errors[name], 1e-9), style, color=color, ms=4, label=name)
predicted = 2.0**-24 * (means / 0.1) ** 2
ax.loglog(means, predicted, ":", color="gray", label="2⁻²⁴ (mean / deviation)²")
ax.axhline(1, color="black", lw=0.8)
ax.text(0.012, 1.5, "above this line the result is meaningless", fontsize=8)
ax.set(xlabel="mean of x (standard deviation 0.1)", ylabel="relative error of the variance")
ax.set(ylim=(5e-10, 1e6), title="Three formulas that are equal on paper, in float32")
ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.9))
ax.grid(alpha=0.3)
plt.show()
for name in formulas:
    useless = means[np.array(errors[name]) > 1]
    start = f"for means from {useless[0]:.0f} on" if len(useless) else "for none of these means"
    print(f"{name:28} meaningless {start}; largest error {max(errors[name]):.0e}")

# %% [markdown]
# The tempting formula loses two digits for every factor of ten, as predicted, until its result is
# noise (the lines above say from which mean on). Merged blocks stay accurate far beyond that, and
# also need one pass. Do means so far from zero occur? Convolutions have biases, images have offsets
# (CT in Hounsfield units is −1000 in air), and nothing in a network keeps a channel near zero
# *before* its norm. Here is what a network would see:

# %%
from kernels import norm_act_ref
from kernels.norm_act import norm_act_plain, norm_act_triton

wave = torch.linspace(0, 6.28, 32)
x = torch.sin(wave)[:, None, None] * torch.cos(2 * wave)[None, :, None]  # (32, 32, 1)
x = x + 0.3 * torch.randn(32, 32, 8)
x = (1000 + 0.1 * x / x.std())[None, None]  # (1, 1, 32, 32, 8), mean 1000, deviation 0.1
naive = (x - x.mean()) / ((x**2).mean() - x.mean() ** 2 + 1e-5).sqrt()
if triton:
    for volume in (x, torch.randn(1, 1, 32, 32, 32)):
        with count_triton() as traffic:
            norm_act_triton(volume)  # no affine parameters and no slope: the norm alone
        per_element = total(traffic).bytes / volume.numel()
        print(f"norm_act_triton of {volume.numel()} elements: {per_element:.2f} bytes", end=" ")
        print("per element, launches of", ", ".join(traffic))
pictures = {
    "definition, float64": norm_act_ref(x, upcast=True),
    "E[x²] − mean²": naive,
    "norm_act": norm_act_triton(x) if triton else norm_act_plain(x),
}
fig, axes = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained")
for ax, (title, y) in zip(axes, pictures.items()):
    shown = ax.imshow(y[0, 0, :, :, 4], cmap="RdBu_r", vmin=-3, vmax=3)
    ax.set(title=f"{title}\nstandard deviation {y.std().item():.3f}", xticks=[], yticks=[])
fig.colorbar(shown, ax=axes, shrink=0.8, label="normalized value")
plt.show()

# %% [markdown]
# In the middle the variance came out negative, so every value is NaN (white). The lines show what
# the stable kernel moves. A small volume fits into the registers of one program, which reads x once
# and writes y once (the first line). A large one does not: the kernel reads x twice, for the
# statistics and then for the norm (the second line), which is the minimum there.
#
# ## What the compiler makes of it
#
# The interpreter says nothing about machine code. But Triton can also compile for a GPU that is not
# present. Look at three things:
#
# * **Load width.** The threads of a program, here 256, share its block. One instruction can read up
#   to 128 bits, that is four floats, per thread. The compiler uses this only if it can prove that
#   the addresses are multiples of those 128 bits.
# * **Registers.** A thread holds its numbers in at most 255 registers of 32 bits. Numbers that do
#   not fit are **spilled** to memory, which causes the traffic that we want to avoid.
# * **Occupancy.** A multiprocessor of these GPUs has 65,536 registers for all programs that run on
#   it at the same time (CUDA programming guide). While one program waits for memory another can
#   run, so the more programs fit, the better.
#
# The next cell compiles the kernel of puzzle 1 for sm_90 (the H100) in a separate process without
# `TRITON_INTERPRET`, for several block sizes, each with 256 threads per program; once with the
# guarantee that `n` and the pointers are multiples of 16 (Triton gives it to the compiler whenever
# the arguments of a launch are), and once without.

# %%
kernel = sums  # or my_sums, once it is right

script = """
import json, sys
sys.path += ["benchmarks", sys.argv[1]]
from budget import nvidia
from mine import kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

signature = {"logits": "*fp32", "target": "*u8", "partials": "*fp32"}
signature |= {"n": "i32", "programs": "i32", "BLOCK": "constexpr"}
for block in (1024, 2048, 4096, 8192, 16384):
    for aligned in (True, False):
        attrs = {(i,): [["tt.divisibility", 16]] for i in range(4)} if aligned else {}
        source = ASTSource(kernel, signature, {"BLOCK": block}, attrs)
        options = {"num_warps": 8}  # 256 threads
        asm = compile(source, GPUTarget("cuda", 90, 32), options).asm
        registers, spilled, loads, stores = nvidia(asm)
        lines = [line.strip() for line in asm["ptx"].splitlines()]
        row = dict(block=block, aligned=aligned, registers=registers, spilled=spilled)
        row |= dict(loads=len(loads), widest=max(loads))
        row["example"] = next(line for line in lines if "ld.global" in line)
        print(json.dumps(row))
"""
if triton:
    with tempfile.TemporaryDirectory() as folder:
        code = "import triton.language as tl\nfrom triton import jit\n\n"
        code += inspect.getsource(kernel.fn) + f"\nkernel = {kernel.fn.__name__}\n"
        Path(folder, "mine.py").write_text(code)
        environment = dict(os.environ)
        del environment["TRITON_INTERPRET"]
        command = [sys.executable, "-c", script, folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    print(done.stderr or f"{'block':>6} aligned registers spilled loads  first load")
    for r in compiled:
        aligned = "yes" if r["aligned"] else "no"
        print(f"{r['block']:6} {aligned:7} {r['registers']:9} {r['spilled']:7}", end=" ")
        print(f"{r['loads']:5}  {r['example']}")
    loads = {(r["block"], r["aligned"]): r["loads"] for r in compiled}
    more = [loads[block, False] / loads[block, True] for block, aligned in loads if aligned]
    if more:
        print(f"not aligned: {min(more):.1f} to {max(more):.1f} times the loads of aligned")

# %%
if triton:
    fig, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    styles = {True: dict(color=BLUE, marker="o"), False: dict(color=RED, marker="s", ls="--")}
    for aligned, style in styles.items():
        rows = [r for r in compiled if r["aligned"] == aligned]
        label = "aligned" if aligned else "not aligned"
        for ax, key in zip(axes, ("loads", "registers", "spilled")):
            ax.plot([r["block"] for r in rows], [r[key] for r in rows], label=label, **style)
    for ax, what in zip(axes, ("load instructions", "registers", "bytes spilled")):
        ax.set_xscale("log", base=2)
        ax.set(xlabel="BLOCK, with 256 threads", title=f"{what} per thread")
        ax.grid(alpha=0.3)
    axes[0].set_yscale("log", base=2)
    axes[1].axhline(255, color="black", lw=0.8)
    axes[0].legend(fontsize=8)
    plt.show()

# %% [markdown]
# With the guarantee a thread reads four floats (`v4.b32`), or sixteen labels, at once. Without it,
# a thread reads one number at a time and needs several times as many instructions (the last line).
# A volume whose n is not a multiple of 16 gets this kernel. Larger blocks keep more loads in
# progress at the same time, and use more registers, until they spill.
#
# `benchmarks/budget.py` does this for every kernel of this repository and for four GPUs (sm_80 is
# NVIDIA's A100, sm_90 the H100, sm_100 the B200; gfx942 is AMD's MI300). It compiles, reads the
# machine code, and fails if a kernel spills, or loads less than 128 bits at a time although the
# layout would allow it. Its table is `results/budget.csv`:

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
styles = {
    "sm_80": (BLUE, "|"),
    "sm_90": (ORANGE, "x"),
    "sm_100": (SKY, "+"),
    "gfx942": ("black", "."),
}
fig, ax = plt.subplots(figsize=(9, 4.6), layout="constrained")
for y, family in enumerate(families):
    for k, (gpu, (color, marker)) in enumerate(styles.items()):
        rows = [r for r in budget if r["kernel"].startswith(family) and r["target"] == gpu]
        registers = [int(r["registers"]) for r in rows]
        style = dict(ls="", marker=marker, ms=7, color=color, label=gpu if y == 0 else None)
        ax.plot(registers, [y + 0.18 * (k - 1.5)] * len(registers), **style)
spilled = sum(int(r["spilled"]) > 0 for r in budget)
ax.set_title(f"Every kernel on four GPUs: {len(budget)} compiled, {spilled} spill")
ax.set(xlabel="registers per thread", xlim=(0, 150))
ax.set(yticks=range(len(families)), yticklabels=families)
fits = (8, 4, 3, 2)  # programs per multiprocessor
edges = [65536 / 256 / k for k in fits]
top = ax.secondary_xaxis("top")
top.set(xticks=edges, xticklabels=fits)
top.set_xlabel("programs of 256 threads that fit on a multiprocessor (sm_*)")
for edge in edges:
    ax.axvline(edge, color="gray", lw=0.8, ls=":")
ax.invert_yaxis()
ax.legend(fontsize=8, loc="lower right")
plt.show()
name = "dice_ce grad C=2 float32 ncdhw"
grad = next(r for r in budget if (r["kernel"], r["target"]) == (name, "sm_90"))
fit = 65536 // (int(grad["registers"]) * 256)
print(f"{name} on sm_90: {grad['registers']} registers per thread,", end=" ")
print(f"so {fit} programs fit on a multiprocessor")

# %% [markdown]
# ## Where to continue
#
# * `kernels/dice_ce.py`, `norm_act.py`, `voxel_shuffle.py`: each opens with its equations, backward
#   pass, bytes and layout, as here, and depends on no other file.
# * `python benchmarks/traffic.py` and `benchmarks/budget.py`: the counts and the compiler's table,
#   computed on your machine. `benchmarks/kernels.py` measures times if there is a GPU.
# * [`exercises.md`](exercises.md): a Tversky term in the kernel, and eleven more exercises.
