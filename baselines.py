"""The other networks of the paper's comparison, and `joint`, ours:  python train.py --model NAME.

    name       source                       where PET and CT meet       outputs
    ct, pet    U-Net (Kerfoot 2018)         nowhere: it reads only one  segmentation
    ef         early fusion                 input channels              segmentation
    mf         mid fusion                   features of the bottleneck  segmentation
    lf         late fusion                  probabilities               segmentation per modality
    valindria  Valindria et al., WACV 2018  weights of the bottleneck   segmentation per modality
    multitask  multi-task without fission   input channels              segmentation, CT, PET
    joint      ours                         features of the bottleneck  segmentation, CT, PET, tumor
    nnunet     Isensee et al. 2021          input channels              segmentation per scale
    blackbean  Ye et al., AutoPET 2022      input channels              segmentation
    segresnet  Myronenko 2018               input channels              segmentation
    v2-rec     the paper's ablation, brain  weights of the bottleneck   core, edema, both images

The first eight are made of the blocks of mirror_unet.py: they differ only in where the modalities
meet and in what is learned. All take x (B, 2, D, H, W), channel 0 CT (brain: T2w), channel 1 PET
(brain: FLAIR), and return what a Mirror U-Net returns, so training, prediction and evaluation are
the same code for all. `channels` are the widths of levels 1-5; nnunet, blackbean and segresnet
start at 2 c1, the width of their publications (32) if c1 is the paper's 16.
"""

import math
from math import gcd, prod
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import CachedCase, Case, read_label
from evaluate import MEASURES, evaluate_case, mean_of, read_truth
from files import read_nifti
from losses import SEGMENTATIONS, MirrorLoss
from mirror_unet import (
    CLASSIFIERS,
    NORMS,
    TASKS,
    BrainOutput,
    Branch,
    CellOutput,
    ConvUnit,
    LightDecoder,
    MirrorOutput,
    MirrorUNet,
    ResidualUnit,
    UpLayer,
)

Output = MirrorOutput | CellOutput | BrainOutput


# -------------------------------------------------------------------------- what all have in common
class Supervised(NamedTuple):
    """Training output of a network with several segmentations, the first at full resolution."""

    terms: tuple[tuple[float, Output], ...]  # (weight in the loss, output)


class BrainRecOutput(NamedTuple):
    """What v2-rec returns."""

    core: Tensor  # (B, 2, D, H, W) logits, from T2w
    edema: Tensor  # (B, 2, D, H, W) logits, from FLAIR
    image: Tensor  # (B, 2, D, H, W) reconstruction of T2w and FLAIR, from the bottleneck


class SystemLoss(MirrorLoss):
    """`MirrorLoss` for every network of this file; of a `Supervised`, the weighted sum."""

    def forward(self, outputs: tuple, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if not isinstance(outputs, Supervised):
            return super().forward(outputs, batch)
        total, parts = 0.0, {}
        for weight, output in outputs.terms:
            size = output[0].shape[2:]
            labels = {name: at_size(batch[name], size) for name in SEGMENTATIONS if name in batch}
            one, its_parts = super().forward(output, batch | labels)
            total = total + weight * one
            parts = {name: parts.get(name, 0.0) + weight * v for name, v in its_parts.items()}
        return total, parts


def at_size(labels: Tensor, size) -> Tensor:
    """Labels (B, 1, D, H, W) on a grid that is coarser by whole factors.

    A coarse cell gets the label of the voxel at its center, or of the next one if the center lies
    between two voxels.
    """
    steps = [n // m for n, m in zip(labels.shape[2:], size, strict=True)]
    return labels[(..., *(slice(s // 2, None, s) for s in steps))]


class Baseline(nn.Module):
    """What train.py and predict.py ask of a network; the defaults fit a plain segmentation."""

    tasks: tuple[str, ...] = ("seg",)  # what it learns, as in mirror_unet.TASKS
    reads = ("ct", "pet")  # the modalities that a segmentation depends on
    turn = 0  # the training step's number modulo 2, set by train.py: whose turn it is
    partial = False  # a step may leave parameters without a gradient: DDP has to look for them
    preset = "petct"
    norm = "instance"
    strides = (16, 16, 16)  # of all down-sampling levels together
    check_input = MirrorUNet.check_input

    def segment(self, x: Tensor) -> Output:
        """Segmentation and classification alone, by as little computation as they need.

        x as for `forward`, or PET alone if that is all the network `reads`.
        """
        return self(x)


# ------------------------------------------------------- fusion, with the Mirror U-Net's own blocks
class Encoder(nn.ModuleList):
    """Levels 1-4 of a Branch: (B, 1, D, H, W) -> the four feature maps, finest first."""

    def __init__(self, channels: tuple[int, ...], norm: str):
        widths = (1, *channels[:4])
        super().__init__([ResidualUnit(i, o, norm, stride=2) for i, o in zip(widths, widths[1:])])

    def forward(self, x: Tensor) -> list[Tensor]:
        x = x.contiguous()  # else each convolution copies the slice
        features = []
        for down in self:
            x = down(x)
            features.append(x)
        return features


class Decoder(nn.ModuleList):
    """Levels 6-9 of a Branch: bottleneck (B, in, D/16, ...) and skips -> (B, out, D, H, W).

    Skips come finest first; those of several `encoders` are concatenated.
    """

    def __init__(self, out_channels: int, channels, norm: str, in_channels: int, encoders: int = 1):
        c1, c2, c3, c4, _ = channels
        super().__init__([
            UpLayer(in_channels + encoders * c4, c3, norm),
            UpLayer(c3 + encoders * c3, c2, norm),
            UpLayer(c2 + encoders * c2, c1, norm),
            UpLayer(c1 + encoders * c1, out_channels, norm, top=True),
        ])

    def forward(self, bottleneck: Tensor, skips: list[Tensor]) -> Tensor:
        x = bottleneck
        for up, skip in zip(self, reversed(skips), strict=True):
            x = up(x, skip)
        return x


def concatenate_skips(ct: list[Tensor], pet: list[Tensor]) -> list[Tensor]:
    """Join the skips of both encoders along the channels, level by level."""
    return [torch.cat(pair, dim=1) for pair in zip(ct, pet)]


class OneUNet(Baseline):
    """`ct`, `pet`: a U-Net for one modality alone. `ef`, early fusion: both as its input channels.

    It is one branch of a Mirror U-Net, which is MONAI's UNet (Kerfoot et al. 2018) with two
    residual units, except that skips are concatenated last.
    """

    def __init__(self, reads: tuple[str, ...], channels, norm):
        super().__init__()
        self.reads, self.norm = reads, norm
        self.net = Branch(2, channels, norm, in_channels=len(reads))

    def forward(self, x: Tensor) -> MirrorOutput:
        """x (B, 2, D, H, W); `pet` also takes PET alone, (B, 1, D, H, W)."""
        pet_alone = self.reads == ("pet",) and x.shape[1] == 1
        self.check_input(x.shape, channels=1 if pet_alone else 2)
        if self.reads == ("ct",):
            x = x[:, 0:1]
        elif self.reads == ("pet",):
            x = x[:, -1:]
        return MirrorOutput(seg=self.net.decode(*self.net.encode(x)))


class MidFusion(Baseline):
    """`mf`: one encoder and bottleneck (levels 1-5) per modality, and one decoder.

    The decoder gets the concatenation of the bottlenecks and that of the skips.
    """

    def __init__(self, channels, norm):
        super().__init__()
        self.norm = norm
        self.ct, self.pet = Encoder(channels, norm), Encoder(channels, norm)
        self.ct_bottleneck = ResidualUnit(*channels[3:], norm)
        self.pet_bottleneck = ResidualUnit(*channels[3:], norm)
        self.decoder = Decoder(2, channels, norm, in_channels=2 * channels[4], encoders=2)

    def forward(self, x: Tensor) -> MirrorOutput:
        self.check_input(x.shape)
        ct, pet = self.ct(x[:, 0:1]), self.pet(x[:, 1:2])
        bottlenecks = [self.ct_bottleneck(ct[3]), self.pet_bottleneck(pet[3])]
        bottleneck = torch.cat(bottlenecks, dim=1)  # (B, 2 c5, D/16, H/16, W/16)
        return MirrorOutput(seg=self.decoder(bottleneck, concatenate_skips(ct, pet)))


class LateFusion(Baseline):
    """`lf`: one U-Net per modality, each with its own segmentation loss.

    The mean of their probabilities is the prediction. In training the two never meet (but for the
    limit on their common gradient norm), as in late fusion of networks that are trained separately;
    with one loss on the fused logits instead, this is v4. `share` shares levels as in MirrorUNet.
    """

    def __init__(self, channels, norm, share=()):
        super().__init__()
        self.norm = norm
        self.ct, self.pet = Branch(2, channels, norm), Branch(2, channels, norm)
        for level in share:
            self.pet.levels[level - 1] = self.ct.levels[level - 1]

    def forward(self, x: Tensor) -> MirrorOutput | Supervised:
        self.check_input(x.shape)
        if self.training:
            return self.learn(x)
        ct, pet = self.stream(0, x), self.stream(1, x)
        # The softmax of this logarithm is the mean of both softmaxes.
        mean = torch.logaddexp(ct.float().log_softmax(1), pet.float().log_softmax(1))
        return MirrorOutput(seg=mean, ct=ct, pet=pet)

    def stream(self, number: int, x: Tensor) -> Tensor:
        """Logits (B, 2, D, H, W) from CT (0) or PET (1) alone."""
        net = (self.ct, self.pet)[number]
        return net.decode(*net.encode(x[:, number : number + 1]))

    def learn(self, x: Tensor) -> MirrorOutput | Supervised:
        """The training output: a loss for each stream, with equal weights."""
        outputs = [MirrorOutput(seg=self.stream(number, x)) for number in (0, 1)]
        return Supervised(tuple((0.5, output) for output in outputs))


class Valindria(LateFusion):
    """`valindria`: fission without tasks, Valindria et al., "Multi-modal learning from unpaired
    multi-modal data", WACV 2018.

    Two streams share the bottleneck (always level 5, not an option here). Each segments its own
    modality, and training steps alternate between the modalities, because theirs come from
    different patients. Ours come in pairs, so the prediction averages both streams.
    """

    partial = True

    def __init__(self, channels, norm):
        super().__init__(channels, norm, share=(5,))

    def learn(self, x: Tensor) -> MirrorOutput:
        return MirrorOutput(seg=self.stream(self.turn, x))


class MultiTask(Baseline):
    """`multitask`: v2's tasks without fission.

    One early-fusion encoder and bottleneck, and one decoder per task. As in v2, the decoders of
    segmentation and CT take the skips; the light decoder, which reconstructs PET, takes none.
    """

    tasks = TASKS["petct"]["v2"]

    def __init__(self, channels, norm):
        super().__init__()
        self.norm = norm
        self.net = Branch(2, channels, norm, in_channels=2)
        self.ct_decoder = Decoder(1, channels, norm, in_channels=channels[4])
        self.bottleneck_decoder = LightDecoder(1, channels, norm, in_channels=channels[4])

    def forward(self, x: Tensor) -> MirrorOutput:
        self.check_input(x.shape)
        bottleneck, skips = self.net.encode(x)
        return MirrorOutput(
            seg=self.net.decode(bottleneck, skips),
            ct=self.ct_decoder(bottleneck, skips),
            pet=self.bottleneck_decoder(bottleneck),
        )

    def segment(self, x: Tensor) -> MirrorOutput:
        self.check_input(x.shape)
        return MirrorOutput(seg=self.net.decode(*self.net.encode(x)))


class Joint(Baseline):
    """`joint`, ours: a Mirror U-Net whose branches share the *features* of the bottleneck.

    So CT informs the segmentation at test time. The deepest features of both encoders are
    concatenated and pass through one bottleneck, from which the PET decoder segments. The other
    tasks are the Mirror U-Net's.

    Args:
        tasks: "v1": the CT decoder reconstructs CT | "v2": and the light decoder PET |
            "v3": and classification | "none": segmentation alone.
        skips: whose encoder's skips the segmentation takes, "pet" | "both". The CT decoder takes
            those of CT.
    """

    output = MirrorUNet.output

    def __init__(self, channels, norm, tasks="v1", skips="pet", classifier="cells"):
        super().__init__()
        self.tasks = tasks_of("joint", "petct", tasks)
        self.norm, self.skips = norm, skips
        c4, c5 = channels[3:]
        encoders = 1 if skips == "pet" else 2
        self.ct, self.pet = Encoder(channels, norm), Encoder(channels, norm)
        self.bottleneck = ResidualUnit(2 * c4, c5, norm)
        self.pet_decoder = Decoder(2, channels, norm, in_channels=c5, encoders=encoders)
        if "ct" in self.tasks:
            self.ct_decoder = Decoder(1, channels, norm, in_channels=c5)
        if "pet" in self.tasks:
            self.bottleneck_decoder = LightDecoder(1, channels, norm, in_channels=c5)
        self.classifier = CLASSIFIERS[classifier](c5) if "tumor" in self.tasks else None
        if skips == "gated":  # per level: how much of each CT feature PET and CT let through
            self.gates = nn.ModuleList(nn.Conv3d(2 * c, c, 1) for c in channels[:4])

    def encode(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """(B, 2, D, H, W) -> bottleneck (B, c5, D/16, ...), CT's skips, the segmentation's."""
        self.check_input(x.shape)
        given = x[:, 0:1]
        if self.skips == "drop" and self.training:  # one patch in four is learned from PET alone
            given = given * (torch.rand(len(x), 1, 1, 1, 1, device=x.device) >= 0.25)
        ct, pet = self.ct(given), self.pet(x[:, 1:2])
        skips = pet if self.skips == "pet" else concatenate_skips(ct, pet)
        if self.skips == "gated":
            open_ = [gate(both).sigmoid() for gate, both in zip(self.gates, skips)]
            skips = concatenate_skips([s * o for s, o in zip(ct, open_)], pet)
        return self.bottleneck(torch.cat([ct[3], pet[3]], dim=1)), ct, skips

    def forward(self, x: Tensor) -> Output:
        bottleneck, ct_skips, skips = self.encode(x)
        seg = self.pet_decoder(bottleneck, skips)
        ct = self.ct_decoder(bottleneck, ct_skips) if "ct" in self.tasks else None
        pet = self.bottleneck_decoder(bottleneck) if "pet" in self.tasks else None
        return self.output(bottleneck, seg, ct, pet)

    def segment(self, x: Tensor) -> Output:
        bottleneck, _, skips = self.encode(x)
        return self.output(bottleneck, self.pet_decoder(bottleneck, skips))


class BrainRec(MirrorUNet):
    """`v2-rec`: brain v2 whose light decoder reconstructs both images (L2) instead of segmenting.

    Core and edema are segmented as in v1. The paper only names this variant; that both images are
    reconstructed is our reading.
    """

    def __init__(self, share, channels, norm):
        super().__init__("v2", share, channels, norm, preset="brain")
        self.tasks = ("core", "edema", "image")

    def forward(self, x: Tensor, segment: bool = False) -> BrainRecOutput | BrainOutput:
        self.check_input(x.shape)
        t2w, t2w_skips = self.ct.encode(x[:, 0:1])
        flair, flair_skips = self.pet.encode(x[:, 1:2])
        core = self.ct.decode(t2w, t2w_skips)
        edema = self.pet.decode(flair, flair_skips)
        if segment:
            return BrainOutput(core=core, whole=None, edema=edema)
        image = self.bottleneck_decoder(torch.cat([t2w, flair], dim=1))
        return BrainRecOutput(core, edema, image)

    def segment(self, x: Tensor) -> BrainOutput:
        return self(x, segment=True)


# ------------------------------------------------------------------------------- nnU-Net, Blackbean
Stages = list[tuple[int, ...]]  # three numbers per stage, one per axis


def plan(patch, spacing, smallest: int = 4) -> tuple[Stages, Stages]:
    """nnU-Net v2's (strides, kernels) per stage, finest first, for a patch (voxels, mm).

    An axis is halved while it has at least 2 x `smallest` voxels and its spacing is less than twice
    that of the finest axis that can still be halved; if only one axis remains, while it has at
    least 3 x `smallest`. A kernel spans 1 voxel along an axis until the axis's spacing is less than
    twice the finest, and 3 voxels from then on; the bottleneck's is 3^3. (Isensee et al. 2021;
    `get_pool_and_conv_props` in their code.)
    """
    size, spacing, kernel = list(patch), list(spacing), [1, 1, 1]
    strides, kernels = [(1, 1, 1)], []
    while True:
        axes = [i for i in range(3) if size[i] >= 2 * smallest]
        axes = [i for i in axes if spacing[i] / min(spacing[j] for j in axes) < 2]
        if not axes or (len(axes) == 1 and size[axes[0]] < 3 * smallest):
            return strides, [*kernels, (3, 3, 3)]
        kernel = [3 if k == 3 or s / min(spacing) < 2 else 1 for k, s in zip(kernel, spacing)]
        strides.append(tuple(2 if i in axes else 1 for i in range(3)))
        kernels.append(tuple(kernel))
        size = [-(-n // s) for n, s in zip(size, strides[-1])]
        spacing = [mm * s for mm, s in zip(spacing, strides[-1])]


class LeakyUnit(ConvUnit):
    """Convolution -> instance norm -> LeakyReLU: a ConvUnit with a fixed slope of 0.01.

    Kernel and stride are three numbers, one per axis.
    """

    def __init__(self, in_channels, out_channels, kernel=(3, 3, 3), stride=(1, 1, 1)):
        super().__init__(in_channels, out_channels, "instance")
        padding = [k // 2 for k in kernel]
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, padding)
        del self.slope
        self.slope = nn.Buffer(torch.full((1,), 0.01), persistent=False)


def plain_stage(in_channels, width, kernel, stride=(1, 1, 1)) -> nn.Sequential:
    """Two conv units, the first of them with the stride."""
    first = LeakyUnit(in_channels, width, kernel, stride)
    return nn.Sequential(first, LeakyUnit(width, width, kernel))


class PlainUNet(Baseline):
    """`nnunet` and `blackbean`: a U-Net of plain stages.

    A transposed convolution has the stride as its kernel.

    nnunet (Isensee et al., Nature Methods 2021): stages, strides and kernels as nnU-Net v2 plans
    them for the patch and spacing; widths 2 c1 2^i, at most 20 c1 (32 to 320 at c1 = 16). With deep
    supervision: every decoder stage segments, with weight 1/2^i in the loss, except the coarsest.

    blackbean (Ye et al., arXiv 2210.07490): four strides of 2, widths 2 c1 to 2 c5 (32 to 512), one
    segmentation.
    """

    def __init__(self, strides, kernels, widths, preset="petct", deep_supervision=False):
        super().__init__()
        self.preset, self.tasks = preset, segmentations_of(preset)
        self.partial = self.deep_supervision = deep_supervision
        self.strides = tuple(prod(s) for s in zip(*strides))
        stages = zip([2, *widths], widths, kernels, strides)
        self.encoder = nn.ModuleList([plain_stage(*stage) for stage in stages])
        # The decoder, coarsest first: width of the stage below, own width, kernel, stride to below.
        levels = list(zip(widths[1:], widths, kernels, strides[1:]))[::-1]
        self.ups = nn.ModuleList([
            nn.ConvTranspose3d(below, width, stride, stride) for below, width, _, stride in levels
        ])
        self.decoder = nn.ModuleList([
            plain_stage(2 * width, width, kernel) for _, width, kernel, _ in levels
        ])
        heads = levels if deep_supervision else levels[-1:]
        self.heads = nn.ModuleList([
            nn.Conv3d(width, classes_of(preset), 1) for _, width, _, _ in heads
        ])
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):  # nnU-Net's initial weights
                nn.init.kaiming_normal_(module.weight, a=0.01)
                nn.init.zeros_(module.bias)

    def features(self, x: Tensor) -> list[Tensor]:
        """(B, 2, D, H, W) -> the decoder's feature maps, finest first."""
        self.check_input(x.shape)
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        found = []
        for up, stage, skip in zip(self.ups, self.decoder, skips[-2::-1]):
            x = stage(torch.cat([up(x), skip], dim=1))
            found.append(x)
        return found[::-1]

    def forward(self, x: Tensor) -> Output | Supervised:
        features, heads = self.features(x), self.heads[::-1]
        if not (self.training and self.deep_supervision):
            return split(heads[0](features[0]), self.preset)
        weights = deep_supervision_weights(len(features))
        # The coarsest map has no weight, and zip drops it.
        outputs = [split(head(f), self.preset) for _, head, f in zip(weights, heads, features)]
        return Supervised(tuple(zip(weights, outputs)))


def deep_supervision_weights(outputs: int) -> list[float]:
    """nnU-Net's weights, finest first: 1/2^i without the coarsest, normalized to a sum of 1.

    A single output has all the weight.
    """
    weights = [0.5**i for i in range(max(outputs - 1, 1))]
    return [w / sum(weights) for w in weights]


def classes_of(preset: str) -> int:
    """Channels of the logits: background and foreground of each target."""
    return 2 * len(segmentations_of(preset))


def split(logits: Tensor, preset: str) -> Output:
    """(B, 2, D, H, W) -> MirrorOutput; brain: (B, 6, D, H, W) -> three segmentations."""
    if preset == "brain":
        return BrainOutput(*logits.split(2, dim=1))
    return MirrorOutput(seg=logits)


# ---------------------------------------------------------------------------------------- SegResNet
class PreActivationBlock(nn.Module):
    """x + conv(ReLU(norm(conv(ReLU(norm(x)))))), with group norm and no bias."""

    def __init__(self, channels: int):
        super().__init__()
        self.norms = nn.ModuleList([group_norm(channels) for _ in range(2)])
        self.convs = nn.ModuleList([conv3(channels, channels) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs):
            y = conv(F.relu(norm(y)))
        return x + y


def conv3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv3d:
    """A 3^3 convolution without bias."""
    return nn.Conv3d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def group_norm(channels: int) -> nn.GroupNorm:
    """With 8 groups, or the most that divide both 8 and the channels."""
    return nn.GroupNorm(gcd(8, channels), channels)


class SegResNet(Baseline):
    """`segresnet`: Myronenko, "3D MRI brain tumor segmentation using autoencoder regularization",
    2018 (arXiv 1810.11654).

    Group norm, pre-activation residual blocks (1, 2, 2, 4 down, 1 each up), skips that are added,
    trilinear up-sampling; widths 2 c1 to 16 c1 (the publication's 32 to 256 at c1 = 16). Like
    MONAI's SegResNet it has no variational autoencoder; it has no dropout either.
    """

    norm = "group"
    strides = (8, 8, 8)

    def __init__(self, width: int, preset="petct"):
        super().__init__()
        self.preset, self.tasks = preset, segmentations_of(preset)
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.first = conv3(2, width)
        self.downs = nn.ModuleList([conv3(i, o, stride=2) for i, o in zip(widths, widths[1:])])
        self.encoder = nn.ModuleList([
            nn.Sequential(*[PreActivationBlock(w) for _ in range(blocks)])
            for w, blocks in zip(widths, (1, 2, 2, 4))
        ])
        coarsest_first = widths[2::-1]
        self.ups = nn.ModuleList([nn.Conv3d(2 * w, w, 1, bias=False) for w in coarsest_first])
        self.decoder = nn.ModuleList([PreActivationBlock(w) for w in coarsest_first])
        self.norm_last = group_norm(width)
        self.last = nn.Conv3d(width, classes_of(preset), 1)

    def forward(self, x: Tensor) -> Output:
        self.check_input(x.shape)
        x = self.encoder[0](self.first(x))  # (B, w, D, H, W)
        skips = []
        for down, stage in zip(self.downs, self.encoder[1:]):
            skips.append(x)
            x = stage(down(x))  # (B, 2 w, D/2, ...), (B, 4 w, D/4, ...), (B, 8 w, D/8, ...)
        for up, stage, skip in zip(self.ups, self.decoder, reversed(skips)):
            x = stage(F.interpolate(up(x), scale_factor=2, mode="trilinear") + skip)
        return split(self.last(F.relu(self.norm_last(x))), self.preset)


# --------------------------------------------------------------------------------- networks by name
NAMES = {
    "petct": (
        "ct", "pet", "ef", "mf", "lf", "valindria", "multitask", "joint",
        "nnunet", "blackbean", "segresnet",
    ),
    "brain": ("v2-rec", "nnunet", "segresnet"),
}
ALL = (*NAMES["petct"], "v2-rec (brain)")
FUSION = {"mf": MidFusion, "lf": LateFusion, "valindria": Valindria, "multitask": MultiTask}


def segmentations_of(preset: str) -> tuple[str, ...]:
    """The tasks of a network that only segments: the tumor, or the brain's three targets."""
    return TASKS["brain"]["v2"] if preset == "brain" else ("seg",)


def tasks_of(name: str, preset: str = "petct", tasks: str = "v1") -> tuple[str, ...]:
    """What the network of this name learns, as in `mirror_unet.TASKS`; `tasks` is joint's."""
    if name == "joint" and tasks != "none":
        return TASKS["petct"][tasks]
    if name == "multitask":
        return MultiTask.tasks
    if name == "v2-rec":
        return ("core", "edema", "image")
    return segmentations_of(preset)


def build(
    name, preset="petct", channels=(16, 32, 64, 128, 256), norm="instance", share=(5,),
    tasks="v1", skips="pet", patch=(96, 96, 96), spacing=(2.0, 2.0, 3.0), classifier="",
) -> nn.Module:
    """The baseline of this name, freshly initialized. Raises ValueError for options it lacks.

    norm is for the networks made of mirror_unet's blocks, share for v2-rec, tasks, skips and
    classifier for joint; nnunet is planned for patch (voxels) and spacing (mm).
    """
    if name not in NAMES[preset]:
        known = ", ".join((*TASKS[preset], *NAMES[preset]))
        raise ValueError(f"no version {name!r} with preset {preset!r}; there are {known}")
    for option, value, allowed in (
        ("norm", norm, NORMS),
        ("classifier", classifier, ("", *CLASSIFIERS)),
        ("tasks", tasks, ("v1", "v2", "v3", "none")),
        ("skips", skips, ("pet", "both", "drop", "gated")),
    ):
        if value not in allowed:
            raise ValueError(f"{option}={value!r}: use one of {', '.join(allowed)}")
    if len(channels) != 5:
        raise ValueError(f"channels={tuple(channels)}: give five widths, of levels 1 to 5")

    if name in ("ct", "pet", "ef"):
        return OneUNet(("ct", "pet") if name == "ef" else (name,), channels, norm)
    if name in FUSION:
        return FUSION[name](channels, norm)
    if name == "joint":
        return Joint(channels, norm, tasks, skips, classifier or "cells")
    if name == "v2-rec":
        return BrainRec(share, channels, norm)
    if name == "segresnet":
        return SegResNet(2 * channels[0], preset)
    if name == "blackbean":
        strides = [(1, 1, 1)] + 4 * [(2, 2, 2)]
        return PlainUNet(strides, 5 * [(3, 3, 3)], [2 * c for c in channels], preset)
    strides, kernels = plan(patch, spacing)  # nnunet
    if len(strides) < 2:
        raise ValueError(
            f"patch {tuple(patch)}: nnU-Net would plan no down-sampling; use 16 or more per side"
        )
    widths = [min(2 * channels[0] * 2**i, 20 * channels[0]) for i in range(len(strides))]
    return PlainUNet(strides, kernels, widths, preset, deep_supervision=True)


# ----------------------------------------------------------------------------- without a network
def suv_threshold(
    train: list[CachedCase], val: list[CachedCase], most: int = 100
) -> tuple[float, list[dict]]:
    """Segment without a network: tumor is SUV >= t, with the t that is best for training studies.

    At most `most` training studies are read. Everything is computed on the files' own grids and
    values, as a network is scored, because its SUV window may end below the best threshold.
    Returns t and the rows of `evaluate_case` for the held-out studies.
    """
    thresholds = np.geomspace(0.5, 50, 93)  # 5 % apart
    scores = np.zeros(len(thresholds))
    positives = [case.case for case in train if case.tumor]
    for case in positives[:: max(1, math.ceil(len(positives) / most))]:
        pet = _read_suv(case)
        truth = np.asarray(read_label(case).dataobj) > 0
        predicted = _voxels_above(pet, thresholds)
        correct = _voxels_above(pet[truth], thresholds)
        scores += 2 * correct / (predicted + truth.sum())  # Dice of every threshold
    best = float(thresholds[scores.argmax()])
    rows = []
    for case in val:
        mask = _read_suv(case.case) >= best
        rows += evaluate_case(case.case, read_truth(case.case), [mask], ("seg",))
    return best, rows


def compare_threshold(train: list[CachedCase], val: list[CachedCase]) -> dict[str, float]:
    """Print how `suv_threshold` segments the held-out studies; returns the threshold and means."""
    best, rows = suv_threshold(train, val)
    means = {name: mean_of(rows, name) for name in MEASURES}
    volumes = f"FPV {means['fpv_ml']:.1f} ml, FNV {means['fnv_ml']:.1f} ml"
    print(
        f"for comparison, SUV > {best:.1f}, the best threshold on the training studies: "
        f"Dice {means['dice']:.3f}, {volumes}"
    )
    return {"suv_threshold": best, **means}


def _read_suv(case: Case) -> np.ndarray:
    return read_nifti(case.images[1]).get_fdata(dtype=np.float32)


def _voxels_above(values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """How many values lie at or above each threshold (ascending), from one histogram."""
    values = values[values >= thresholds[0]]
    counts = np.histogram(values, bins=[*thresholds, np.inf])[0]
    return counts[::-1].cumsum()[::-1]
