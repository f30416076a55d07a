# %% [markdown]
# # 2. The losses, by hand
#
# A segmentation network gives a probability to every voxel. The *loss* is one number that says how
# wrong all of them are together, and its gradient is all that the network ever learns from. Mirror
# U-Net adds two losses for segmentation, **Dice** and **cross entropy**, and further losses for the
# other tasks. This notebook computes each of them on four voxels with pencil and paper, explains
# why there are two, derives the gradient, and shows the difficult cases: tumors that are tiny,
# tumors that are absent, and 16-bit numbers.
#
# You need the basics of PyTorch, no GPU and no download
# ([how long it takes](../results/tutorials.csv)). The last section is about the versions v1 to v4,
# which [notebook 1](01_fission.ipynb) explains.

# %%
import os
from pathlib import Path

if Path.cwd().name == "tutorials":  # Jupyter starts here; the code is one folder up
    os.chdir("..")
# Let waiting threads sleep, so that other programs can use the cores. Set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import sys

sys.path.append(".")

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import data
import figures
import losses
import patches
import phantom
from mirror_unet import MirrorUNet

plt.rcParams["figure.dpi"] = 90
DICE, CE = "#D55E00", "#0072B2"  # of the Okabe-Ito palette, for color-blind readers, too

# %% [markdown]
# ## Four voxels
#
# The truth $t_v$ is 1 in tumor and 0 elsewhere; $p_v$ is the predicted probability of tumor. With
# sums over all $N$ voxels $v$,
#
# $$I=\sum_v p_v t_v\qquad P=\sum_v p_v\qquad T=\sum_v t_v$$
#
# $$\mathrm{Dice\ loss}=1-\frac{2I+s}{P+T+s}\qquad
# \mathrm{CE}=-\frac1N\sum_v \log(\text{probability of the true class of } v)$$
#
# The fraction is the Dice score, the overlap of two sets (twice the size of the intersection,
# divided by the sum of both sizes), computed with probabilities instead of yes and no. The constant
# $s=10^{-5}$ keeps it defined if both sets are empty.

# %%
p = torch.tensor([0.9, 0.6, 0.3, 0.1])
t = torch.tensor([1, 1, 0, 0])

inter, P, T = (p * t).sum(), p.sum(), t.sum()
dice_loss = 1 - 2 * inter / (P + T)
p_true = torch.where(t == 1, p, 1 - p)  # probability of the true class: 0.9, 0.6, 0.7, 0.9
ce = -p_true.log().mean()
print(f"I = {inter:.1f}, P = {P:.1f}, T = {T}")
print(f"Dice loss = 1 - {2 * inter:.1f} / {P + T:.1f} = {dice_loss:.4f}")
print(f"probabilities of the true class: {p_true.numpy()}, mean of their -log: {ce:.4f}")

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained")
voxels = np.arange(4)
left.bar(voxels - 0.2, t, 0.4, color="#c9ced6", label="truth t")
left.bar(voxels + 0.2, p, 0.4, color="#56B4E9", hatch="//", label="prediction p")
left.set(xticks=voxels, xlabel="voxel", title="four voxels, two of them tumor")
left.legend()
right.bar(voxels, -p_true.log(), 0.5, color=CE)
right.axhline(ce, color="black", lw=1, ls="--", label="their mean: CE")
right.set(xticks=voxels, xlabel="voxel", title="-log(probability of the true class)")
right.legend()
plt.show()

# %% [markdown]
# A network returns *logits*, arbitrary numbers, one per class; the softmax turns them into
# probabilities. With two classes only the difference of the logits matters:
# $p=\sigma(z)=1/(1+e^{-z})$ with $z = \text{logit of tumor} - \text{logit of background}$. The
# losses of the library take logits $(B, C, D, H, W)$ and integer labels $(B, 1, D, H, W)$. For the
# logits $0$ and $\log\frac{p}{1-p}$ they must give the same numbers as above:

# %%
z = (p / (1 - p)).log()
logits = torch.stack([torch.zeros(4), z]).view(1, 2, 1, 1, 4)  # background, tumor
labels = t.view(1, 1, 1, 1, 4)
print(f"soft_dice     {losses.soft_dice(logits, labels):.4f}")
print(f"cross_entropy {losses.cross_entropy(logits, labels):.4f}")
print(f"dice_ce       {losses.dice_ce(logits, labels):.4f}, their sum")

# %% [markdown]
# **Your turn.** The prediction of voxel 1 becomes certain, $p_1 = 1$. Which of the two losses falls
# more? And if it becomes 0.01 instead, which loss rises more? Guess first, then change `p` above or
# run the next cell.

# %%
for p1 in (1.0, 0.6, 0.01):
    q = torch.tensor([0.9, p1, 0.3, 0.1])
    q_true = torch.where(t == 1, q, 1 - q)
    q_dice, q_ce = 1 - 2 * (q * t).sum() / (q.sum() + T), -q_true.log().mean()
    factors = f"({q_dice / dice_loss:.1f} and {q_ce / ce:.1f} times those above)"
    print(f"p_1 = {p1:4}   Dice loss {q_dice:.2f}   CE {q_ce:.2f}   {factors}")

# %% [markdown]
# A single wrong voxel can raise CE without limit, but the Dice loss only by its share of the
# overlap: in the last line CE has grown much more.
#
# ## The gradient
#
# The derivative is what changes the network. Write $D=\frac{2I+s}{P+T+s}$ and $S = P+T+s$. A small
# increase of $p_v$ raises $P$ by the same amount and $I$ by $t_v$ times that amount, so the
# quotient rule gives
#
# $$\frac{\partial D}{\partial p_v}=\frac{2t_v\,S-(2I+s)}{S^2}=\frac{2t_v-D}{S}$$
#
# and with $\frac{dp}{dz}=p(1-p)$, the derivative of the sigmoid,
#
# $$\frac{\partial\,(1-D)}{\partial z_v}=p_v(1-p_v)\,\frac{D-2t_v}{S}\qquad
# \frac{\partial\,\mathrm{CE}}{\partial z_v}=\frac{p_v-t_v}{N}$$
#
# (For CE: $-\log p$ has the derivative $-1/p$, and $-\frac1p\,p(1-p)=p-1$; for background the same
# steps give $p$.) Here are both formulas in code, next to the result of PyTorch's autograd for the
# losses of the library:


# %%
def gradients(z, t, s=1e-5):
    """d(Dice loss)/dz and dCE/dz at every voxel."""
    p = torch.sigmoid(z)
    S = p.sum() + t.sum() + s
    D = (2 * (p * t).sum() + s) / S
    return p * (1 - p) * (D - 2 * t) / S, (p - t) / t.numel()


logits = logits.double().requires_grad_()
functions = {"Dice": losses.soft_dice, "CE": losses.cross_entropy}
for (name, loss), by_hand in zip(functions.items(), gradients(z.double(), t)):
    (grad,) = torch.autograd.grad(loss(logits, labels), logits)
    grad = grad[0, 1].flatten()  # of the tumor logit; that of the background logit is its negative
    print(f"{name:5} by hand {by_hand.numpy().round(4)}   autograd {grad.numpy().round(4)}")
    assert torch.allclose(by_hand, grad, atol=1e-12)

# %% [markdown]
# The library does not leave this to autograd: it implements the formula (in `kernels/dice_ce.py`,
# for any number of classes), which moves far fewer bytes. How can one check a derivation? Change
# each logit a little and look at the loss:
# $\frac{\partial L}{\partial z}\approx\frac{L(z+h)-L(z-h)}{2h}$. The function
# `torch.autograd.gradcheck` does this for every input, in double precision, and raises an error if
# the two gradients differ.

# %%
torch.manual_seed(0)
# Two samples, three classes, twelve voxels.
example = torch.randn(2, 3, 2, 2, 3, dtype=torch.double, requires_grad=True)
example_labels = torch.randint(0, 3, (2, 1, 2, 2, 3))
for loss in (losses.soft_dice, losses.cross_entropy, losses.dice_ce):
    correct = torch.autograd.gradcheck(loss, (example, example_labels))
    print(f"{loss.__name__:13}", correct)

# %% [markdown]
# ## Why the two losses are added
#
# Look at the two gradients again, for one voxel of a small tumor: 1,000 voxels in a patch of
# $96^3$ = 884,736, half of which the network has found so far ($D=0.5$, $P=T$).

# %%
N, T_small, D = 96**3, 1000, 0.5
S = 2 * T_small
p_grid = torch.logspace(-5, 0, 400)[:-1]
cases = {"a tumor voxel: pulled up": 1, "a background voxel: pushed down": 0}
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
for ax, (title, truth) in zip(axes, cases.items()):
    dice_grad = p_grid * (1 - p_grid) * abs(D - 2 * truth) / S
    ce_grad = (p_grid - truth).abs() / N
    ax.loglog(p_grid, dice_grad, color=DICE, lw=2, label="Dice loss")
    ax.loglog(p_grid, ce_grad, "--", color=CE, lw=2, label="CE")
    ax.set(title=title, xlabel="its predicted probability of tumor", ylim=(1e-11, 1e-3))
    ax.grid(alpha=0.3)
axes[0].set_ylabel("|gradient| of one voxel")
axes[0].legend()
plt.show()
print(f"a tumor of {T_small:,} voxels among {N - T_small:,} others")
for p_v in (0.5, 1e-5):
    pulls = [p_v * (1 - p_v) * abs(D - 2 * truth) / S for truth in (1, 0)]
    ratios = [pull / (abs(p_v - truth) / N) for pull, truth in zip(pulls, (1, 0))]
    print(
        f"at p = {p_v:g} the gradient of Dice is {ratios[0]:.3g} times that of CE in tumor,",
        end=" ",
    )
    print(f"{ratios[1]:.3g} times in background")

# %% [markdown]
# * **Dice divides by the size of the tumor, CE by the size of the patch.** Around $p=0.5$ the
#   Dice gradient is much larger (the second line): the tumor voxels are not outvoted by the many
#   others, and the loss is close to the score that counts in the end.
# * **The Dice gradient vanishes if the network is certain and wrong.** The factor $p(1-p)$ goes to
#   zero on the left: a tumor voxel with $p=10^{-5}$ is hardly pulled at all (the last line). The
#   factor $(1-p)$ of CE stays, however wrong the network is. CE also asks for *calibrated*
#   probabilities: of the voxels with a probability of 0.6, six in ten should be tumor.
#
# So each loss has what the other lacks. The next experiment shows it: a small network (three
# convolutions, in two dimensions to be fast) looks for faint discs in noise, which cover a small
# part of each image. It is trained with Dice, with CE, or with their sum, each time on the same
# images.


# %%
def draw_discs(n, seed):
    """n noisy images (n, 1, 48, 48) and their labels."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    center = 6 + 36 * torch.rand(n, 2, 1, 1, generator=g)
    radius = 2 + 2 * torch.rand(n, 1, 1, generator=g)
    label = ((y - center[:, 0]) ** 2 + (x - center[:, 1]) ** 2 < radius**2).long()
    return (label + torch.randn(n, 48, 48, generator=g))[:, None], label[:, None]


def train_on_discs(loss, seed):
    """Train a small network for 200 steps; return its logits for the test images."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 2, 5, padding=2),
    )
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(200):
        x, label = draw_discs(4, seed=1000 * seed + step)
        value = loss(net(x), label)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    with torch.no_grad():
        return net(images)


def overlap(mask, truth):
    """The Dice score of two masks."""
    return 2 * (mask * truth).sum() / (mask.sum() + truth.sum())


images, truth = draw_discs(100, seed=999_999)
functions["Dice + CE"] = losses.dice_ce
probabilities = {}
print(f"on {len(images)} test images, {truth.float().mean():.1%} of them disc, three seeds each:")
means = {}  # of Dice and CE over the seeds
for name, loss in functions.items():
    outputs = [train_on_discs(loss, seed) for seed in range(3)]
    probabilities[name] = outputs[0].softmax(1)[:, 1]
    dice = [overlap(out.argmax(1, keepdim=True), truth).item() for out in outputs]
    ces = [losses.cross_entropy(out, truth).item() for out in outputs]
    means[name] = np.mean(dice), np.mean(ces)
    print(f"trained with {name:9}  Dice of the masks", *[f"{d:.2f}" for d in dice], end="   ")
    print("CE", *[f"{c:.3f}" for c in ces])
both, alone = means["Dice + CE"], means["Dice"]
print(f"Dice + CE against Dice alone: mean Dice {both[0] - alone[0]:+.2f},", end=" ")
print(f"mean CE {both[1] / alone[1]:.2f} times as high")


# %%
def mosaic(pictures):
    """Nine (48, 48) images as one (144, 144)."""
    rows = [torch.cat(list(pictures[n : n + 3]), 1) for n in (0, 3, 6)]
    return torch.cat(rows, 0)


fig, axes = plt.subplots(1, 4, figsize=(9.4, 2.9), layout="constrained")
axes[0].imshow(mosaic(images[:9, 0]), cmap="gray")
axes[0].set_title("nine test images", fontsize=10)
for ax, (name, p_tumor) in zip(axes[1:], probabilities.items()):
    shown = ax.imshow(mosaic(p_tumor[:9]), cmap="magma", vmin=0, vmax=1)
    ax.set_title(f"trained with {name}", fontsize=10)
for ax in axes:
    ax.contour(mosaic(truth[:9, 0]), [0.5], colors=figures.TRUTH, linewidths=0.9)
    ax.set(xticks=[48, 96], yticks=[48, 96], xticklabels=[], yticklabels=[])
    ax.grid(color="#888888", lw=0.5)
fig.colorbar(shown, ax=axes[3], label="P(tumor)", shrink=0.75)
plt.show()

# %% [markdown]
# The outlines are the true discs. CE alone is cautious: its probabilities are the most truthful (it
# has the lowest CE), but many discs stay below one half and are lost in the mask. Dice alone finds
# more discs, and its probabilities are close to 0 or 1: it is just as certain where it is wrong, so
# its CE is the highest. The sum has an overlap like that of Dice, and a CE between the two (the
# last line above).
#
# ## Patches without tumor
#
# In a patch without tumor $T=0$ and $I=0$, so the Dice score is
#
# $$D=\frac{s}{P+s}$$
#
# **Your turn.** Let $s=10^{-5}$. What is the Dice loss if the network predicts a single false
# voxel, $P=1$? And if it predicts 100 of them? What does this mean for the gradient?

# %%
P_grid = np.logspace(-8, 4, 500)
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for s, style in ((1e-5, "-"), (1.0, "--")):
    options = dict(ls=style, color=DICE, lw=2)
    left.semilogx(P_grid, 1 - s / (P_grid + s), label=f"s = {s:g}", **options)
    right.loglog(P_grid, s / (P_grid + s) ** 2, label=f"Dice, s = {s:g}", **options)
right.axhline(1 / N, color=CE, lw=2, ls=":", label="CE, if p is small")
left.set(title="Dice loss if the truth is empty", xlabel="P, sum of all probabilities")
right.set(title="its gradient with respect to P", xlabel="P, sum of all probabilities")
right.set(ylim=(1e-12, 1e6))
left.legend()
right.legend()
plt.show()

# %% [markdown]
# **Answer:**

# %%
for predicted in (1, 100):
    s, slope = 1e-5, 1e-5 / (predicted + 1e-5) ** 2
    print(
        f"P = {predicted:3}: Dice loss {1 - s / (predicted + s):.7f}, gradient {slope:.0e},",
        end=" ",
    )
    print(f"that of CE {1 / N:.1e}: Dice pulls {slope * N:.2g} times as hard as CE")

# %% [markdown]
# The loss is nearly 1 whatever the network predicts: the Dice loss of an empty patch is practically
# *constant*. Its gradient $s/(P+s)^2$ falls with the square of $P$. At a single false voxel it
# still pulls harder than CE; at a hundred of them, where it matters more, it is negligible, and CE
# alone does the work. The Dice loss falls only once $P$ is far below $s$.
#
# There are two remedies. A larger $s$ (dashed) gives a smoother curve. The paper's solution is
# `batch=True`: the sums run over the whole batch *before* the ratio is taken, so that an empty
# patch is judged together with one that has tumor. Then the false voxels of the empty patch do
# lower a Dice score:

# %%
torch.manual_seed(0)
batch_labels = torch.zeros(2, 1, 8, 8, 8, dtype=torch.long)
batch_labels[0, 0, 2:6, 2:6, 2:6] = 1  # tumor in the first patch, none in the second
z = torch.randn(2, 8, 8, 8) + 4 * batch_labels[:, 0] - 2
batch_logits = torch.stack([torch.zeros_like(z), z], 1).requires_grad_()
print("mean |gradient|   patch with tumor   empty patch")
for batch in (True, False):
    loss = losses.soft_dice(batch_logits, batch_labels, batch=batch)
    (grad,) = torch.autograd.grad(loss, batch_logits)
    with_tumor, empty = grad.abs().mean((1, 2, 3, 4))
    print(f"batch={batch!s:8} {with_tumor:16.1e} {empty:15.1e}")

# %% [markdown]
# ## Sixteen bits
#
# On a GPU networks often run in fp16, numbers of 16 bits: about three decimal digits, nothing above
# 65,504, and nothing between 0 and $6\cdot10^{-8}$. Here are five ways in which this breaks a naive
# implementation of the loss:

# %%
half = torch.float16
total = torch.full((96**3,), 0.5, dtype=half).sum().item()
print("1. A sum over a patch overflows: the sum of p = 0.5 over 96^3 voxels is", total)
confident = torch.tensor([0.0, 20.0], dtype=half)
print("2. log(softmax) of the logits 0 and 20 is", confident.softmax(0).log().tolist(), end="; ")
print("log_softmax is", confident.log_softmax(0).tolist())
smooth, ratio = torch.tensor(1e-8, dtype=half).item(), (torch.zeros(1) / 0).item()
print(f"3. A smoothing constant of 1e-8 becomes {smooth}, and then 0 / 0 = {ratio}")
small = torch.tensor(0.01 / 2 / 96**3, dtype=half).item()
print("4. A gradient p / N = 0.01 / 2 / 96^3 becomes", small)
print("5. A long sum stops growing: see the figure")

ones = np.full(6000, 1.0, np.float16)
fig, ax = plt.subplots(figsize=(9, 2.6), layout="constrained")
ax.plot(np.cumsum(ones.astype(np.float32)), color=CE, lw=2, label="added in float32")
ax.plot(np.cumsum(ones), "--", color=DICE, lw=2, label="added in fp16")
ax.set_title("5. In fp16 the number after 2048 is 2050, so 2048 + 1 is rounded to 2048")
ax.set(xlabel="number of ones added", ylabel="sum")
ax.legend()
plt.show()

# %% [markdown]
# What the library does about it: logits may be fp16, but each value is converted to float32 when it
# is read, and sums are float32 or better (1, 5); the logarithm is computed from the logits,
# $-\log p=\log(1+e^{-z})$, never from a rounded probability (2); and $s=10^{-5}$ is never stored in
# fp16 (3). The fourth problem is left to the training loop, because a gradient has the type of its
# logits: `torch.amp.GradScaler` multiplies the loss by a large number and divides the gradients by
# it before the optimizer step. The worst case still gives finite numbers:

# %%
worst = torch.tensor([60000.0, -60000.0], dtype=half).view(1, 2, 1, 1, 1).requires_grad_()
value = losses.dice_ce(worst, torch.ones(1, 1, 1, 1, 1, dtype=torch.long))
value.backward()
print("the most certain and most wrong logits in fp16:", end=" ")
print(f"loss {value.item():.0f} ({value.dtype}), gradient {worst.grad.flatten().tolist()}")

# %% [markdown]
# ## What v1, v2 and v3 add
#
# $$\mathcal L=\lambda_\text{seg}(\mathrm{Dice}+\mathrm{CE})+\lambda_\text{rec}\,\mathrm{L2}
#   +\lambda_\text{cls}\,\mathrm{BCE}$$
#
# $$\lambda_\text{seg}=0.5\qquad\lambda_\text{rec}=10^{-3}\qquad\lambda_\text{cls}=10^{-2}$$
#
# * **v1** L2: the mean squared error of the CT reconstruction against the *clean* CT.
# * **v2** L2: one mean over the reconstructions of CT and PET (the latter from the bottleneck).
# * **v3** as v2, plus BCE: the cross entropy of a yes-or-no question, "is there tumor?", for each
#   cell of $16^3$ voxels (in the authors' code: once, for the patch).
# * **v4** Dice + CE of the averaged logits, nothing else.
#
# `MirrorLoss` computes this sum. It returns the total, and each part without its weight. Here it is
# for an untrained v3 and a patch of a synthetic patient (drawn by `phantom.py`, scaled to values
# from 0 to 1 by `preprocess`):

# %%
spacing = (6.0, 6.0, 6.0)
phantom.write_petct("cache/tutorials/petct-6mm", 2, spacing=spacing)
case = data.find_petct("cache/tutorials/petct-6mm")[0]
study = data.preprocess(case, data.Preprocessing(spacing=spacing))
start = np.median(study["foreground"], axis=0).astype(int) - 24
image = patches.read_region(study["image"], start, (48, 48, 48)).astype(np.float32)
label = patches.read_region(study["label"], start, (48, 48, 48)).astype(np.int64)
x = torch.from_numpy(image)[None]  # (1, 2, 48, 48, 48): CT, PET
seg = torch.from_numpy(label)[None, None]  # (1, 1, 48, 48, 48)
batch = {"ct": x[:, :1], "pet": x[:, 1:], "seg": seg, "tumor": torch.ones(1)}

torch.manual_seed(0)
net = MirrorUNet("v3", channels=(8, 16, 32, 64, 128))
out = net(x)
total, parts = losses.MirrorLoss("v3")(out, batch)
weight = {"seg_dice": 0.5, "seg_ce": 0.5, "ct_l2": 1e-3 / 2, "pet_l2": 1e-3 / 2, "cls_bce": 1e-2}
for name, value in parts.items():
    print(f"{name:9} {value:7.4f}  x {weight[name]:.4f}  = {weight[name] * value:.5f}")
by_hand = sum(weight[name] * value for name, value in parts.items())
print(f"total     {total:.4f}, sum of the last column {by_hand:.4f}")

# %% [markdown]
# Compared with the segmentation, the other tasks look negligible. Are they? A loss acts through its
# gradient, so for each task and each part of the network we compute the norm of the gradient of the
# *weighted* term. (BCE is that of v3's classifier: of every cell of the bottleneck, which is true
# if a voxel in it is tumor.)

# %%
cell_truth = torch.nn.functional.adaptive_max_pool3d(batch["seg"].float(), out.cells.shape[1:])
tasks = {
    "Dice": 0.5 * losses.soft_dice(out.seg, batch["seg"]),
    "CE": 0.5 * losses.cross_entropy(out.seg, batch["seg"]),
    "L2 of CT": 1e-3 / 2 * losses.l2(out.ct, batch["ct"]),
    "L2 of PET": 1e-3 / 2 * losses.l2(out.pet, batch["pet"]),
    "BCE": 1e-2 * losses.bce(out.cells, cell_truth),
}
places = {
    "CT 1-4": net.ct.levels[:4],
    "CT 6-9": net.ct.levels[5:],
    "shared 5": net.ct.levels[4],
    "PET 1-4": net.pet.levels[:4],
    "PET 6-9": net.pet.levels[5:],
    "light\ndecoder": net.bottleneck_decoder,
    "classifier": net.classifier,
}
norms = np.zeros((len(tasks), len(places)))
for i, value in enumerate(tasks.values()):
    for j, place in enumerate(places.values()):
        parameters = list(place.parameters())
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        norms[i, j] = sum(g.square().sum().item() for g in found if g is not None) ** 0.5

fig, ax = plt.subplots(figsize=(9, 3.6), layout="constrained")
powers = np.log10(np.where(norms > 0, norms, np.nan))
shown = ax.imshow(powers, cmap="YlGnBu", aspect="auto", vmin=-5, vmax=0)
for (i, j), norm in np.ndenumerate(norms):
    text, color = f"{norm:.0e}" if norm else "–", "white" if norm > 0.02 else "black"
    ax.text(j, i, text, ha="center", va="center", fontsize=9, color=color)
ax.set(yticks=range(len(tasks)), yticklabels=tasks)
ax.set(xticks=range(len(places)), xticklabels=places)
ax.set_title("norm of the gradient of each weighted task, in each part of a v3")
fig.colorbar(shown, ax=ax, label="power of ten")
plt.show()

# %% [markdown]
# Read the table column by column. The CT branch's own levels get gradients only from the
# reconstructions, so there a small weight has no competitor; and an optimizer like Adam, which
# divides each gradient by its usual size, makes the weight almost irrelevant. The segmentation
# competes with other tasks in two columns only: at the shared level and in the PET encoder. There,
# at the start, the classifier has a large gradient in spite of its weight of 0.01, and the
# gradients of the reconstructions are tiny compared with those of the segmentation, that of the CT
# most of all. A dash means that there is no gradient: the CT
# reconstruction never reaches a level that belongs to PET.
#
# **Your turn.** Make $\lambda_\text{rec}$ so large that the reconstruction counts as much as the
# segmentation at the shared level. Which factor does this take? (Divide the entries of the column
# "shared 5"; the next cell does it.)

# %%
shared = norms[:, list(places).index("shared 5")]
seg = np.hypot(shared[0], shared[1])  # as if Dice and CE were orthogonal: a rough estimate
rec = np.hypot(shared[2], shared[3])
print(f"about {seg / rec:.0f} times larger, at the start of training")

# %% [markdown]
# **Where to continue.** [`losses.py`](../losses.py) has all of them. The next notebook makes
# Dice + CE fast: the formulas above in one pass over memory. Notebook 4 looks at the input of the
# reconstruction.
