# %% [markdown]
# # 2. The losses, by hand
#
# A network that segments gives a probability to every voxel; the *loss* is the one number that says how wrong they are together, and
# its gradient is all the network ever learns from. Mirror U-Net adds two losses for segmentation, **Dice** and **cross entropy**, and
# then more for the other tasks. This notebook computes each on four voxels with pencil and paper, asks why there are two, derives the
# gradient, and meets the traps: tumors that are tiny, tumors that are absent, and 16-bit numbers.
#
# You need PyTorch's basics. It runs in about half a minute, without a GPU and with nothing to download.

# %%
import os
from pathlib import Path

if Path.cwd().name == "tutorials":  # where Jupyter starts; the code is one folder up
    os.chdir("..")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # lets two cores be shared with other programs; must come before torch

import sys

sys.path.append(".")

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import data
import figures
import losses
import phantom
from mirror_unet import MirrorUNet

plt.rcParams["figure.dpi"] = 90
DICE, CE, BOTH = "#d95f02", "#1b6ca8", "#5e3c99"  # colours of the two losses and of their sum

# %% [markdown]
# ## Four voxels
#
# Truth $t_v$ is 1 in tumor and 0 elsewhere, $p_v$ the predicted probability of tumor. Over all $N$ voxels $v$,
#
# $$I=\sum_v p_v t_v\qquad P=\sum_v p_v\qquad T=\sum_v t_v$$
#
# $$\mathrm{Dice\ loss}=1-\frac{2I+s}{P+T+s}\qquad \mathrm{CE}=-\frac1N\sum_v \log(\text{probability given to the truth of } v)$$
#
# The fraction is the overlap of two sets (twice what they share, by the sum of their sizes), with probabilities in place of yes and no.
# $s=10^{-5}$ keeps it defined when both are empty.

# %%
p = torch.tensor([0.9, 0.6, 0.3, 0.1])
t = torch.tensor([1, 1, 0, 0])

inter, P, T = (p * t).sum(), p.sum(), t.sum()
dice_loss = 1 - 2 * inter / (P + T)
right = torch.where(t == 1, p, 1 - p)  # probability given to the truth: 0.9, 0.6, 0.7, 0.9
ce = -right.log().mean()
print(f"I = {inter:.1f}, P = {P:.1f}, T = {T}      Dice loss = 1 - {2 * inter:.1f} / {P + T:.1f} = {dice_loss:.4f}")
print(f"probabilities given to the truth: {right.numpy()}      mean of their -log = {ce:.4f}")

fig, (left, middle) = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained")
at = np.arange(4)
left.bar(at - 0.2, t, 0.4, color="#c9ced6", label="truth t")
left.bar(at + 0.2, p, 0.4, color=BOTH, label="prediction p")
left.set(xticks=at, xlabel="voxel", title="four voxels, two of them tumor")
left.legend()
middle.bar(at, -right.log(), 0.5, color=CE)
middle.axhline(ce, color="black", lw=1, ls="--", label="their mean: CE")
middle.set(xticks=at, xlabel="voxel", title="-log(probability given to the truth)")
middle.legend()
plt.show()

# %% [markdown]
# A network does not give probabilities but *logits*, any numbers, one a class; softmax makes them probabilities. For two classes only
# their difference counts: $p=\sigma(z)=1/(1+e^{-z})$ with $z = \text{logit of tumor} - \text{logit of background}$. So the library's
# losses, which take logits $(B, C, D, H, W)$ and integer labels $(B, 1, D, H, W)$, must give the same numbers for the logits $0$ and
# $\log\frac{p}{1-p}$:

# %%
z = (p / (1 - p)).log()
logits = torch.stack([torch.zeros(4), z]).view(1, 2, 1, 1, 4)  # background, tumor
labels = t.view(1, 1, 1, 1, 4)
print(f"soft_dice {losses.soft_dice(logits, labels):.4f}   cross_entropy {losses.cross_entropy(logits, labels):.4f}", end="   ")
print(f"dice_ce {losses.dice_ce(logits, labels):.4f}, their sum")

# %% [markdown]
# **Your turn.** Voxel 1 becomes certain, $p_1 = 1$. Which of the two losses falls more? And what if voxel 1 becomes 0.01 instead, which
# one rises more? Guess, then change `p` above. (For $p_1=0.01$: the Dice loss doubles, to 0.45; CE grows nearly five-fold, to 1.29.
# One bad voxel can cost CE as much as you like, and Dice at most its share of the overlap.)

# %%
for p1 in (1.0, 0.6, 0.01):
    q = torch.tensor([0.9, p1, 0.3, 0.1])
    right = torch.where(t == 1, q, 1 - q)
    print(f"p_1 = {p1:4}   Dice loss {1 - 2 * (q * t).sum() / (q.sum() + T):.2f}   CE {-right.log().mean():.2f}")

# %% [markdown]
# ## The gradient
#
# What moves the network is the derivative. Write $D=\frac{2I+s}{P+T+s}$ and $S = P+T+s$. Raising $p_v$ by a little raises $I$ by $t_v$
# times that and $P$ by that, so by the quotient rule
#
# $$\frac{\partial D}{\partial p_v}=\frac{2t_v\,S-(2I+s)}{S^2}=\frac{2t_v-D}{S}$$
#
# and with $\frac{dp}{dz}=p(1-p)$, the derivative of the sigmoid,
#
# $$\frac{\partial\,(1-D)}{\partial z_v}=p_v(1-p_v)\,\frac{D-2t_v}{S}\qquad
# \frac{\partial\,\mathrm{CE}}{\partial z_v}=\frac{p_v-t_v}{N}$$
#
# (The second: $-\log p$ has the derivative $-1/p$, and $-\frac1p\,p(1-p)=p-1$; for background likewise $p$.) In code, and beside what
# PyTorch's autograd finds for the library's losses:


# %%
def gradients(z, t, s=1e-5):
    """d(Dice loss)/dz and dCE/dz at every voxel."""
    p = torch.sigmoid(z)
    S = p.sum() + t.sum() + s
    D = (2 * (p * t).sum() + s) / S
    return p * (1 - p) * (D - 2 * t) / S, (p - t) / t.numel()


logits = logits.double().requires_grad_()
for name, loss, mine in zip(("Dice", "CE"), (losses.soft_dice, losses.cross_entropy), gradients(z.double(), t)):
    (found,) = torch.autograd.grad(loss(logits, labels), logits)
    found = found[0, 1].flatten()  # of the tumor's logit; the background's is its negative
    print(f"{name:5} by hand {mine.numpy().round(4)}   autograd {found.numpy().round(4)}")
    assert torch.allclose(mine, found, atol=1e-12)

# %% [markdown]
# The library does not leave this to autograd: it writes the formula down (`kernels/dice_ce.py` has it for any number of classes), since
# that moves far fewer bytes. How does one check a gradient that somebody derived? By moving each logit a little and looking at the
# loss: $\frac{\partial L}{\partial z}\approx\frac{L(z+h)-L(z-h)}{2h}$. That is what `torch.autograd.gradcheck` does, for every input,
# in double precision, and it raises an error where the two differ.

# %%
torch.manual_seed(0)
many = torch.randn(2, 3, 2, 2, 3, dtype=torch.double, requires_grad=True)  # two samples, three classes, twelve voxels
answer = torch.randint(0, 3, (2, 1, 2, 2, 3))
for loss in (losses.soft_dice, losses.cross_entropy, losses.dice_ce):
    print(f"{loss.__name__:13}", torch.autograd.gradcheck(lambda x, loss=loss: loss(x, answer), many))

# %% [markdown]
# ## Why the two are added
#
# Look at the two gradients again, for one voxel of a small tumor: 1,000 voxels in a patch of $96^3$ = 884,736, of which about half has
# been found so far ($D=0.5$, $P=T$).

# %%
N, T_, D = 96**3, 1000, 0.5
S = 2 * T_
grid = torch.logspace(-5, 0, 400)[:-1]
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
for ax, truth, title in ((axes[0], 1, "a tumor voxel: pulled up"), (axes[1], 0, "a background voxel: pushed down")):
    ax.loglog(grid, grid * (1 - grid) * abs(D - 2 * truth) / S, color=DICE, lw=2, label="Dice loss")
    ax.loglog(grid, (grid - truth).abs() / N, color=CE, lw=2, label="CE")
    ax.set(title=title, xlabel="its predicted probability of tumor", ylim=(1e-11, 1e-3))
    ax.grid(alpha=0.3)
axes[0].set_ylabel("|gradient| of one voxel")
axes[0].legend()
plt.show()

# %% [markdown]
# * **Dice divides by the tumor's size, CE by the patch's.** In the middle Dice pulls hundreds of times harder: the 1,000 voxels are
#   not outvoted by 883,736 others, and the loss is near to the score one wants in the end.
# * **Dice goes silent where the network is sure and wrong.** The factor $p(1-p)$ fades on the left: a tumor voxel with $p=10^{-5}$ is
#   hardly pulled at all. CE's $(1-p)$ stays, however wrong. It also goes on being interested in whether 0.6 should be 0.9: it wants
#   probabilities that are *true*.
#
# So each has what the other lacks. See it happen: a small network (three convolutions, in two dimensions to be quick) looks for dim
# discs in noise, about a hundredth of the picture, and is trained for 200 steps with Dice, with CE, or with their sum. All three meet
# the same pictures.


# %%
def discs(n, seed):
    """n noisy pictures (n, 1, 48, 48) and their labels."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    centre = 6 + 36 * torch.rand(n, 2, 1, 1, generator=g)
    radius = 2 + 2 * torch.rand(n, 1, 1, generator=g)
    label = ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < radius**2).long()
    return (label + torch.randn(n, 48, 48, generator=g))[:, None], label[:, None]


def train_on_discs(loss, seed):
    """A small network after 200 steps of one loss, and what it makes of the 100 new pictures."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 2, 5, padding=2))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(200):
        x, label = discs(4, seed=1000 * seed + step)
        value = loss(net(x), label)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    with torch.no_grad():
        return net(picture)


picture, truth = discs(100, seed=999_999)
prob = {}
print("on 100 new pictures, three runs each:")
for name, loss in (("Dice", losses.soft_dice), ("CE", losses.cross_entropy), ("Dice + CE", losses.dice_ce)):
    outs = [train_on_discs(loss, seed) for seed in range(3)]
    prob[name] = outs[0].softmax(1)[:, 1]
    masks = [out.argmax(1, keepdim=True) for out in outs]
    overlap = [f"{2 * (m * truth).sum() / (m.sum() + truth.sum()):.2f}" for m in masks]
    print(f"trained with {name:9}  Dice of the masks", *overlap, "  CE", *[f"{losses.cross_entropy(out, truth):.3f}" for out in outs])


# %%
def mosaic(pictures):
    """Nine (48, 48) pictures as one."""
    return torch.cat([torch.cat(list(pictures[3 * r : 3 * r + 3]), 1) for r in range(3)], 0)


fig, axes = plt.subplots(1, 4, figsize=(9.4, 2.9), layout="constrained")
axes[0].imshow(mosaic(picture[:9, 0]), cmap="gray")
for ax, p_tumor in zip(axes[1:], prob.values()):
    image = ax.imshow(mosaic(p_tumor[:9]), cmap="magma", vmin=0, vmax=1)
for ax, title in zip(axes, ("nine pictures", *[f"trained with {name}" for name in prob])):
    ax.contour(mosaic(truth[:9, 0]), [0.5], colors=figures.TRUTH, linewidths=0.9)
    ax.set_title(title, fontsize=10)
    ax.set(xticks=[48, 96], yticks=[48, 96], xticklabels=[], yticklabels=[])
    ax.grid(color="#888888", lw=0.5)
fig.colorbar(image, ax=axes[3], label="P(tumor)", shrink=0.75)
plt.show()

# %% [markdown]
# CE alone is careful: its probabilities are the truest (lowest CE), but many discs stay below one half and are lost in the mask. Dice
# alone finds more, and is black and white about it: it is as sure where it is wrong, so that its CE is several times higher. The sum
# has the overlap of Dice with a third of its CE, or so.
#
# ## When there is no tumor
#
# A patch without tumor has $T=0$ and $I=0$, and all that is left of Dice is
#
# $$D=\frac{s}{P+s}$$
#
# **Your turn.** With $s=10^{-5}$: what is the Dice loss where the network predicts a single false voxel, $P=1$? And 100 of them? What
# does that mean for the gradient?

# %%
P_ = np.logspace(-8, 4, 500)
fig, (left, right_) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for s, style in ((1e-5, "-"), (1.0, "--")):
    left.semilogx(P_, 1 - s / (P_ + s), style, color=DICE, lw=2, label=f"s = {s:g}")
    right_.loglog(P_, s / (P_ + s) ** 2, style, color=DICE, lw=2, label=f"Dice, s = {s:g}")
right_.axhline(1 / N, color=CE, lw=2, label="CE, where p is small")
left.set(title="Dice loss of an empty truth", xlabel="P, predicted voxels in all")
right_.set(title="how hard it pulls P down", xlabel="P, predicted voxels in all", ylim=(1e-12, 1e6))
left.legend()
right_.legend()
plt.show()

# %% [markdown]
# **Answer.** 0.99999, and 0.9999999: the loss is as good as 1 whatever is predicted, so there is no reason to predict less; the
# gradient $s/(P+s)^2$ is $10^{-5}$ at one voxel and $10^{-9}$ at a hundred, a thousand times less than CE's. The Dice loss of an empty
# patch is a *constant*, and CE alone does the work. Only when $P$ is far below $s$ does Dice notice that all is well.
#
# Two ways out. A larger $s$ (dashed) makes a gentler curve. The paper's way is `batch=True`: sums are taken over the whole batch
# *before* the ratio, so that an empty patch is judged together with one that has tumor. The false voxels of the empty patch then spoil
# a Dice that can be spoilt:

# %%
torch.manual_seed(0)
batch_labels = torch.zeros(2, 1, 8, 8, 8, dtype=torch.long)
batch_labels[0, 0, 2:6, 2:6, 2:6] = 1  # tumor in the first patch, none in the second
z = torch.randn(2, 8, 8, 8) + 4 * batch_labels[:, 0] - 2
batch_logits = torch.stack([torch.zeros_like(z), z], 1).requires_grad_()
for batch in (True, False):
    (g,) = torch.autograd.grad(losses.soft_dice(batch_logits, batch_labels, batch=batch), batch_logits)
    print(
        f"batch={batch!s:5}   mean |gradient| in the patch with tumor {g[0].abs().mean():.1e}, in the empty patch {g[1].abs().mean():.1e}"
    )

# %% [markdown]
# ## Sixteen bits
#
# On a GPU networks often run in fp16, numbers of 16 bits: about three decimal digits, nothing above 65,504, nothing between 0 and
# $6\cdot10^{-8}$. Four ways in which this breaks a loss that is written down naively:

# %%
half = torch.float16
print("1. A sum over a patch overflows:   sum of p = 0.5 over 96^3 voxels =", torch.full((96**3,), 0.5, dtype=half).sum().item())
confident = torch.tensor([0.0, 20.0], dtype=half)
print("2. log(softmax) of logits 0, 20 =", confident.softmax(0).log().tolist(), "  log_softmax =", confident.log_softmax(0).tolist())
print("3. A smoothing constant of 1e-8 becomes", torch.tensor(1e-8, dtype=half).item(), "and then 0 / 0 =", (torch.zeros(1) / 0).item())
print("4. A gradient p / N = 0.01 / 2 / 96^3 becomes", torch.tensor(0.01 / 2 / 96**3, dtype=half).item())

terms = np.full(6000, 1.0, np.float16)
fig, ax = plt.subplots(figsize=(9, 2.6), layout="constrained")
ax.plot(np.cumsum(terms.astype(np.float32)), color=CE, lw=2, label="added up in float32")
ax.plot(np.cumsum(terms), color=DICE, lw=2, label="added up in fp16")
ax.set(title="5. Counting in fp16: at 2048 the next number is 2050, and 2048 + 1 is rounded back", xlabel="ones added", ylabel="sum")
ax.legend()
plt.show()

# %% [markdown]
# The library's answers: logits may be fp16, but each value becomes float32 as it is read, and sums are float32 or better (1, 5); the
# logarithm is taken of the logits, $-\log p=\log(1+e^{-z})$, never of a rounded probability (2); $s=10^{-5}$ is not needed in fp16 at
# all (3). The fourth is the trainer's business, since gradients have the type of the logits: `torch.amp.GradScaler` multiplies the loss
# by a large number, and divides again before the step. The worst case still gives finite numbers:

# %%
worst = torch.tensor([60000.0, -60000.0], dtype=half).view(1, 2, 1, 1, 1).requires_grad_()
value = losses.dice_ce(worst, torch.ones(1, 1, 1, 1, 1, dtype=torch.long))
value.backward()
print(f"as sure and as wrong as fp16 can be: loss {value.item():.0f} ({value.dtype}), gradient {worst.grad.flatten().tolist()}")

# %% [markdown]
# ## What v1, v2 and v3 add
#
# $$\mathcal L=\lambda_\text{seg}(\mathrm{Dice}+\mathrm{CE})+\lambda_\text{rec}\,\mathrm{L2}+\lambda_\text{cls}\,\mathrm{BCE}$$
#
# $$\lambda_\text{seg}=0.5\qquad\lambda_\text{rec}=10^{-3}\qquad\lambda_\text{cls}=10^{-2}$$
#
# * **v1** L2: the mean squared error of the CT's reconstruction against the *clean* CT.
# * **v2** L2: one mean over the reconstructions of CT and PET (the latter from the bottleneck).
# * **v3** as v2, plus BCE: cross entropy of one yes-or-no question, "is there a tumor in this patch?".
# * **v4** Dice + CE of the averaged logits, nothing else.
#
# `MirrorLoss` is that sum. It returns the total, and every part without its weight. Here with an untrained v3 and a patch of a
# synthetic patient (`phantom.py` draws it, `preprocess` scales it to values of 0 to 1):

# %%
phantom.write_petct("cache/tutorials/petct-6mm", 2, spacing=(6.0, 6.0, 6.0))
study = data.preprocess(data.find_petct("cache/tutorials/petct-6mm")[0], data.Preprocessing(spacing=(6.0, 6.0, 6.0)))
middle_ = np.median(study["foreground"], axis=0).astype(int)
patch = data.read_region(study["image"], middle_ - 24, (48, 48, 48)).astype(np.float32)
label = data.read_region(study["label"], middle_ - 24, (48, 48, 48)).astype(np.int64)
x = torch.from_numpy(patch)[None]  # (1, 2, 48, 48, 48): CT, PET
batch = {"ct": x[:, :1], "pet": x[:, 1:], "seg": torch.from_numpy(label)[None, None], "tumor": torch.ones(1)}

torch.manual_seed(0)
net = MirrorUNet("v3", channels=(8, 16, 32, 64, 128))
out = net(x)
total, parts = losses.MirrorLoss("v3")(out, batch)
weight = {"seg_dice": 0.5, "seg_ce": 0.5, "ct_l2": 1e-3 / 2, "pet_l2": 1e-3 / 2, "cls_bce": 1e-2}
for name, value in parts.items():
    print(f"{name:9} {value:7.4f}  x {weight[name]:.4f}  = {weight[name] * value:.5f}")
print(f"total     {total:.4f}  = {sum(weight[name] * value for name, value in parts.items()):.4f}, the sum of the last column")

# %% [markdown]
# The extra tasks look negligible beside the segmentation. Are they? A loss matters through its gradient, so let us ask for each task
# and each part of the network how large the gradient of the *weighted* term is.

# %%
tasks = {
    "Dice": 0.5 * losses.soft_dice(out.seg, batch["seg"]),
    "CE": 0.5 * losses.cross_entropy(out.seg, batch["seg"]),
    "L2 of CT": 1e-3 / 2 * losses.l2(out.ct, batch["ct"]),
    "L2 of PET": 1e-3 / 2 * losses.l2(out.pet, batch["pet"]),
    "BCE": 1e-2 * losses.bce(out.tumor, batch["tumor"]),
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
size = np.zeros((len(tasks), len(places)))
for i, value in enumerate(tasks.values()):
    for j, place in enumerate(places.values()):
        found = torch.autograd.grad(value, list(place.parameters()), retain_graph=True, allow_unused=True)
        size[i, j] = sum(g.square().sum().item() for g in found if g is not None) ** 0.5

fig, ax = plt.subplots(figsize=(9, 3.6), layout="constrained")
image = ax.imshow(np.log10(np.where(size > 0, size, np.nan)), cmap="YlGnBu", aspect="auto", vmin=-5, vmax=0)
for (i, j), s in np.ndenumerate(size):
    ax.text(j, i, f"{s:.0e}" if s else "–", ha="center", va="center", fontsize=9, color="white" if s > 0.02 else "black")
ax.set(yticks=range(len(tasks)), yticklabels=tasks, xticks=range(len(places)), xticklabels=places)
ax.set_title("length of the gradient of each weighted task, at each part of a v3")
fig.colorbar(image, ax=ax, label="power of ten")
plt.show()

# %% [markdown]
# Read it by columns. The CT's own levels hear only the reconstructions, so there a small weight has no competitor; and an optimiser
# like Adam, which divides each gradient by its usual size, makes the weight all but disappear. Only where a column has several entries
# do tasks compete: at the shared level and in the PET encoder. There, at the start, the classifier is loud in spite of its weight of
# 0.01 (its one number depends on everything), and the reconstructions are a whisper beside the segmentation, the CT's most of all. A
# dash is a gradient that does not exist: the CT's reconstruction never touches a level that belongs to PET.
#
# **Your turn.** Make $\lambda_\text{rec}$ so large that the reconstruction weighs as much as the segmentation at the shared level. By
# what factor? (Read the column "shared 5" and divide; the next cell does so.)

# %%
shared = list(places).index("shared 5")
seg = np.hypot(size[0, shared], size[1, shared])  # Dice and CE as if at right angles: good enough for an estimate
rec = np.hypot(size[2, shared], size[3, shared])
print(f"about {seg / rec:.0f} times larger, at the start of training")

# %% [markdown]
# **Where to go on.** [`losses.py`](../losses.py) is a hundred lines. Notebook 3 makes Dice + CE fast: the formulas above in one pass
# over memory. Notebook 4 looks at what the reconstruction gets to see.
