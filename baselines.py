"""Every other network of the paper's comparison, and `joint`, which goes beyond it:  python train.py --model NAME.

    name        whose                          PET and CT meet              reads       outputs
    ct, pet     U-Net (Kerfoot 2018)           nowhere: one of them alone   one         segmentation
    ef          early fusion                   as input channels            both        segmentation
    mf          mid fusion                     at the bottleneck            both        segmentation
    lf          late fusion                    in the probabilities         both        one segmentation a modality
    valindria   Valindria et al., WACV 2018    in the bottleneck's weights  both        one segmentation a modality, trained in turns
    multitask   multi-task without fission     as input channels            both        segmentation, CT and PET
    joint       ours                           in the bottleneck's features both        segmentation; CT; PET; tumor?
    nnunet      Isensee et al. 2021            as input channels            both        segmentation at every resolution
    blackbean   Ye et al., AutoPET 2022        as input channels            both        segmentation
    segresnet   Myronenko 2018                 as input channels            both        segmentation
    v2-rec      the paper's ablation, brain    in the bottleneck's weights  both        core, edema; both images

The first eight are made of mirror_unet.py's blocks, so that what differs is where the modalities meet and what is learnt, nothing
else. All take x (B, 2, D, H, W), channel 0 CT (brain: T2w), channel 1 PET (brain: FLAIR), and return what a Mirror U-Net returns, so
that training, prediction and evaluation are the same lines for all. `channels` are the widths of levels 1-5 everywhere; nnunet,
blackbean and segresnet start at 2 c1, which is the width of their publications (32) at the paper's c1 = 16.
"""

from math import gcd, prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses import SEGMENTATIONS, MirrorLoss
from mirror_unet import (
    TASKS,
    BrainOutput,
    Branch,
    Classifier,
    ConvUnit,
    LightDecoder,
    MirrorOutput,
    MirrorUNet,
    ResidualUnit,
    UpLayer,
)


class Supervised(NamedTuple):
    """What a network with several segmentations returns in training: (weight, output) each, the first at full resolution."""

    terms: tuple[tuple[float, MirrorOutput | BrainOutput], ...]


class BrainRecOutput(NamedTuple):
    """What v2-rec returns."""

    core: Tensor  # (B, 2, D, H, W) logits, from T2w
    edema: Tensor  # the same, from FLAIR
    image: Tensor  # (B, 2, D, H, W) reconstruction of T2w and FLAIR, from the bottleneck


class SystemLoss(MirrorLoss):
    """`MirrorLoss` of whatever a network here returns: of a `Supervised`, the weighted sum."""

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
    """Labels (B, 1, D, H, W) on a grid that is a whole number of times coarser: of each cell the voxel at or after its centre."""
    steps = [n // m for n, m in zip(labels.shape[2:], size, strict=True)]
    return labels[(..., *(slice(s // 2, None, s) for s in steps))]


class Baseline(nn.Module):
    """What train.py and predict.py ask a network for, MirrorUNet included; the defaults are those of a plain segmentation network."""

    tasks: tuple[str, ...] = ("seg",)  # what it learns, as in mirror_unet.TASKS
    reads = ("ct", "pet")  # the modalities that a segmentation takes
    turn = 0  # the training step's number modulo 2, set by train.py: whose turn it is
    partial = False  # a step may leave parameters without a gradient: DDP has to look for them
    preset, norm, strides = "petct", "instance", (16, 16, 16)  # strides: of the whole way down
    check_input = MirrorUNet.check_input

    def segment(self, x: Tensor) -> MirrorOutput | BrainOutput:
        """What is known of the tumor, and no more computed than that takes; x as `forward`'s, or PET alone if it `reads` no more."""
        return self(x)


# ------------------------------------------------------------------------------ fusion, with the Mirror U-Net's own blocks
class Encoder(nn.ModuleList):
    """Levels 1-4 of a Branch: (B, 1, D, H, W) -> the four feature maps, finest first."""

    def __init__(self, channels: tuple[int, ...], norm: str):
        super().__init__([ResidualUnit(i, o, norm, stride=2) for i, o in zip((1, *channels), channels[:4])])

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for down in self:
            x = down(x)
            features.append(x)
        return features


class Decoder(nn.ModuleList):
    """Levels 6-9 of a Branch: bottleneck (B, deep, D/16, ...) and skips, finest first, -> (B, out, D, H, W).

    encoders: how many encoders the skips come from; theirs are concatenated.
    """

    def __init__(self, out_channels: int, channels: tuple[int, ...], norm: str, deep: int, encoders: int = 1):
        c1, c2, c3, c4, _ = channels
        ups = [UpLayer(b + encoders * s, a, norm) for b, s, a in ((deep, c4, c3), (c3, c3, c2), (c2, c2, c1))]
        super().__init__([*ups, UpLayer(c1 + encoders * c1, out_channels, norm, top=True)])

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        for up, skip in zip(self, reversed(skips), strict=True):
            x = up(x, skip)
        return x


class OneUNet(Baseline):
    """`ct`, `pet`: a U-Net that sees one modality alone; `ef`, early fusion: one that has both as its input channels.

    One branch of a Mirror U-Net, which is MONAI's UNet (Kerfoot et al. 2018) with two residual units, skips concatenated last.
    """

    def __init__(self, reads: tuple[str, ...], channels, norm):
        super().__init__()
        self.reads, self.norm = reads, norm
        self.net = Branch(2, channels, norm, in_channels=len(reads))

    def forward(self, x: Tensor) -> MirrorOutput:
        """x (B, 2, D, H, W); `pet` also takes PET alone, (B, 1, D, H, W)."""
        self.check_input(x.shape, channels=1 if self.reads == ("pet",) and x.shape[1] == 1 else 2)
        x = {("ct",): x[:, :1], ("pet",): x[:, -1:]}.get(self.reads, x)
        return MirrorOutput(seg=self.net.decode(*self.net.encode(x)))


class MidFusion(Baseline):
    """`mf`: an encoder and bottleneck (levels 1-5) a modality; the bottlenecks, and the skips, are concatenated for one decoder."""

    def __init__(self, channels, norm):
        super().__init__()
        self.norm = norm
        self.ct, self.pet = Encoder(channels, norm), Encoder(channels, norm)
        self.ct_bottleneck, self.pet_bottleneck = ResidualUnit(*channels[3:], norm), ResidualUnit(*channels[3:], norm)
        self.decoder = Decoder(2, channels, norm, deep=2 * channels[4], encoders=2)

    def forward(self, x: Tensor) -> MirrorOutput:
        self.check_input(x.shape)
        ct, pet = self.ct(x[:, 0:1]), self.pet(x[:, 1:2])
        deep = torch.cat([self.ct_bottleneck(ct[3]), self.pet_bottleneck(pet[3])], dim=1)  # (B, 2 c5, D/16, H/16, W/16)
        return MirrorOutput(seg=self.decoder(deep, [torch.cat(pair, dim=1) for pair in zip(ct, pet)]))


class LateFusion(Baseline):
    """`lf`: a U-Net a modality, each with a segmentation loss of its own; the mean of their probabilities is the prediction.

    The two never meet in training (but for the limit on their common gradient norm), as in late fusion of networks trained apart;
    v4 is what one gets with one loss on the fused logits instead. With mirror_unet's `share` the two also share levels.
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
        mean = torch.logaddexp(ct.float().log_softmax(1), pet.float().log_softmax(1))  # softmax(mean) is the mean of the softmaxes
        return MirrorOutput(seg=mean, ct=ct, pet=pet)

    def stream(self, modality: int, x: Tensor) -> Tensor:
        """Logits (B, 2, D, H, W) from CT (0) or PET (1) alone."""
        net = (self.ct, self.pet)[modality]
        return net.decode(*net.encode(x[:, modality : modality + 1]))

    def learn(self, x: Tensor) -> MirrorOutput | Supervised:
        return Supervised(tuple((0.5, MirrorOutput(seg=self.stream(modality, x))) for modality in (0, 1)))


class Valindria(LateFusion):
    """`valindria`: Valindria et al., "Multi-modal learning from unpaired multi-modal data", WACV 2018: fission without tasks.

    Two streams with a common bottleneck (level 5, not an option here); each segments its own modality, and training steps take the
    modalities in turns, as theirs come from different patients. Ours come in pairs, so the prediction averages both streams.
    """

    partial = True

    def __init__(self, channels, norm):
        super().__init__(channels, norm, share=(5,))

    def learn(self, x: Tensor) -> MirrorOutput:
        return MirrorOutput(seg=self.stream(self.turn, x))


class MultiTask(Baseline):
    """`multitask`: v2's tasks without fission: one early-fusion encoder and bottleneck, and a decoder a task.

    Segmentation and CT decoders take the skips, the light decoder that reconstructs PET none, all as in v2.
    """

    tasks = TASKS["petct"]["v2"]

    def __init__(self, channels, norm):
        super().__init__()
        self.norm = norm
        self.net = Branch(2, channels, norm, in_channels=2)
        self.ct_decoder = Decoder(1, channels, norm, deep=channels[4])
        self.bottleneck_decoder = LightDecoder(1, channels, norm, in_channels=channels[4])

    def forward(self, x: Tensor) -> MirrorOutput:
        self.check_input(x.shape)
        deep, skips = self.net.encode(x)
        return MirrorOutput(self.net.decode(deep, skips), self.ct_decoder(deep, skips), self.bottleneck_decoder(deep))

    def segment(self, x: Tensor) -> MirrorOutput:
        self.check_input(x.shape)
        return MirrorOutput(seg=self.net.decode(*self.net.encode(x)))


class Joint(Baseline):
    """`joint`, ours: a Mirror U-Net whose branches share the bottleneck's *features*, so that CT informs the segmentation at test time.

    Both encoders' deepest features are concatenated into the one bottleneck, from which the PET decoder segments. The other tasks are
    the Mirror U-Net's. tasks: "v1" the CT decoder reconstructs CT | "v2" + the light decoder reconstructs PET | "v3" + classification |
    "none". skips: the encoders whose skips the segmentation takes, "pet" | "both"; the CT decoder takes CT's.
    """

    def __init__(self, channels, norm, tasks="v1", skips="pet"):
        super().__init__()
        self.tasks = tasks_of("joint", "petct", tasks)
        self.norm, self.skips = norm, skips
        c4, c5 = channels[3:]
        self.ct, self.pet = Encoder(channels, norm), Encoder(channels, norm)
        self.bottleneck = ResidualUnit(2 * c4, c5, norm)
        self.pet_decoder = Decoder(2, channels, norm, deep=c5, encoders=2 if skips == "both" else 1)
        if "ct" in self.tasks:
            self.ct_decoder = Decoder(1, channels, norm, deep=c5)
        if "pet" in self.tasks:
            self.bottleneck_decoder = LightDecoder(1, channels, norm, in_channels=c5)
        if "tumor" in self.tasks:
            self.classifier = Classifier(c5)

    def encode(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """(B, 2, D, H, W) -> the common bottleneck (B, c5, D/16, H/16, W/16), CT's skips and the segmentation's."""
        self.check_input(x.shape)
        ct, pet = self.ct(x[:, 0:1]), self.pet(x[:, 1:2])
        skips = [torch.cat(pair, dim=1) for pair in zip(ct, pet)] if self.skips == "both" else pet
        return self.bottleneck(torch.cat([ct[3], pet[3]], dim=1)), ct, skips

    def forward(self, x: Tensor) -> MirrorOutput:
        deep, ct_skips, skips = self.encode(x)
        seg = self.pet_decoder(deep, skips)
        ct = self.ct_decoder(deep, ct_skips) if "ct" in self.tasks else None
        pet = self.bottleneck_decoder(deep) if "pet" in self.tasks else None
        return MirrorOutput(seg, ct, pet, self.classifier(deep) if "tumor" in self.tasks else None)

    def segment(self, x: Tensor) -> MirrorOutput:
        deep, _, skips = self.encode(x)
        tumor = self.classifier(deep) if "tumor" in self.tasks else None
        return MirrorOutput(seg=self.pet_decoder(deep, skips), tumor=tumor)


class BrainRec(MirrorUNet):
    """`v2-rec`: brain v2 with another task at the bottleneck: its light decoder reconstructs both images (L2) instead of segmenting.

    Core and edema are segmented as in v1. (The paper names the variant; that both images are reconstructed is our reading.)
    """

    def __init__(self, share, channels, norm):
        super().__init__("v2", share, channels, norm, preset="brain")
        self.tasks = ("core", "edema", "image")

    def forward(self, x: Tensor, segment: bool = False) -> BrainRecOutput | BrainOutput:
        self.check_input(x.shape)
        (t2w, t2w_skips), (flair, flair_skips) = self.ct.encode(x[:, 0:1]), self.pet.encode(x[:, 1:2])
        core, edema = self.ct.decode(t2w, t2w_skips), self.pet.decode(flair, flair_skips)
        if segment:
            return BrainOutput(core=core, whole=None, edema=edema)
        return BrainRecOutput(core, edema, self.bottleneck_decoder(torch.cat([t2w, flair], dim=1)))

    def segment(self, x: Tensor) -> BrainOutput:
        return self(x, segment=True)


# ------------------------------------------------------------------------------------------------------ nnU-Net, Blackbean
def plan(patch, spacing, smallest: int = 4) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """nnU-Net v2's topology for a patch (voxels) and spacing (mm): (strides, kernels) a stage, the finest first.

    An axis is halved while it has 2 x `smallest` voxels and its spacing is within a factor 2 of the finest axis that can still be
    halved; a last axis alone goes on only from 3 x `smallest`. A kernel spans 1 voxel along an axis until its spacing has come within
    a factor 2 of the finest, then 3 for good; the bottleneck's is 3^3. (Isensee et al. 2021; `get_pool_and_conv_props` there.)
    """
    size, spacing, kernel = list(patch), list(spacing), [1, 1, 1]
    strides, kernels = [(1, 1, 1)], []
    while True:
        axes = [i for i in range(3) if size[i] >= 2 * smallest]
        axes = [i for i in axes if spacing[i] / min(spacing[j] for j in axes) < 2]
        if not axes or len(axes) == 1 and size[axes[0]] < 3 * smallest:
            return strides, [*kernels, (3, 3, 3)]
        kernel = [3 if k == 3 or s / min(spacing) < 2 else 1 for k, s in zip(kernel, spacing)]
        strides.append(tuple(2 if i in axes else 1 for i in range(3)))
        kernels.append(tuple(kernel))
        size = [-(-n // s) for n, s in zip(size, strides[-1])]
        spacing = [mm * s for mm, s in zip(spacing, strides[-1])]


class LeakyUnit(ConvUnit):
    """Convolution -> instance norm -> LeakyReLU (slope 0.01): a ConvUnit whose slope is not learnt, with a kernel and stride an axis."""

    def __init__(self, in_channels: int, out_channels: int, kernel=(3, 3, 3), stride=(1, 1, 1)):
        super().__init__(in_channels, out_channels, "instance")
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, padding=[k // 2 for k in kernel])
        del self.slope
        self.slope = nn.Buffer(torch.full((1,), 0.01), persistent=False)


class PlainUNet(Baseline):
    """`nnunet` and `blackbean`: a U-Net of plain blocks, two conv units a stage, transposed convolutions of stride and kernel alike.

    nnunet: Isensee et al., Nature Methods 2021: stages, strides and kernels as nnU-Net v2 plans them for the patch and spacing; widths
    2 c1 2^i, at most 20 c1 (32 to 320 at c1 = 16); a segmentation at every decoder stage, weighted 1/2^i in the loss, the coarsest
    left out (deep supervision). blackbean: Ye et al., arXiv 2210.07490: four strides of 2, widths 2 c1 to 2 c5 (32 to 512), one output.
    """

    def __init__(self, strides, kernels, widths, preset="petct", deep_supervision=False):
        super().__init__()
        self.preset, self.tasks = preset, segmentations_of(preset)
        self.partial = self.deep_supervision = deep_supervision
        self.strides = tuple(prod(s) for s in zip(*strides))
        out = 6 if preset == "brain" else 2

        def stage(inputs, width, kernel, stride=(1, 1, 1)):
            return nn.Sequential(LeakyUnit(inputs, width, kernel, stride), LeakyUnit(width, width, kernel))

        self.encoder = nn.ModuleList([stage(*a) for a in zip([2, *widths], widths, kernels, strides)])
        # the decoder's stages, coarsest first
        levels = list(zip(widths[1:], widths, strides[1:], kernels))[::-1]
        self.ups = nn.ModuleList([nn.ConvTranspose3d(below, width, stride, stride) for below, width, stride, _ in levels])
        self.decoder = nn.ModuleList([stage(2 * width, width, kernel) for _, width, _, kernel in levels])
        heads = levels if deep_supervision else levels[-1:]
        self.heads = nn.ModuleList([nn.Conv3d(width, out, 1) for _, width, _, _ in heads])
        for m in self.modules():
            if isinstance(m, nn.Conv3d | nn.ConvTranspose3d):  # as nnU-Net starts
                nn.init.kaiming_normal_(m.weight, a=0.01)
                nn.init.zeros_(m.bias)

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

    def forward(self, x: Tensor) -> MirrorOutput | BrainOutput | Supervised:
        features, heads = self.features(x), self.heads[::-1]
        if not (self.training and self.deep_supervision):
            return split(heads[0](features[0]), self.preset)
        weights = deep_supervision_weights(len(features))
        return Supervised(tuple((w, split(head(f), self.preset)) for w, head, f in zip(weights, heads, features)))


def deep_supervision_weights(outputs: int) -> list[float]:
    """nnU-Net's: 1/2^i from the finest on, the coarsest left out, normalised to 1. A single output has all the weight."""
    weights = [0.5**i for i in range(max(outputs - 1, 1))]
    return [w / sum(weights) for w in weights]


def split(logits: Tensor, preset: str) -> MirrorOutput | BrainOutput:
    """(B, 2, D, H, W) -> MirrorOutput; brain: (B, 6, D, H, W) -> three segmentations of two classes."""
    return BrainOutput(*logits.split(2, dim=1)) if preset == "brain" else MirrorOutput(seg=logits)


# --------------------------------------------------------------------------------------------------------------- SegResNet
class PreActivationBlock(nn.Module):
    """x + conv(ReLU(norm(conv(ReLU(norm(x)))))), group norm of 8 groups, convolutions without a bias."""

    def __init__(self, channels: int):
        super().__init__()
        self.norms = nn.ModuleList([group_norm(channels) for _ in range(2)])
        self.convs = nn.ModuleList([nn.Conv3d(channels, channels, 3, padding=1, bias=False) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs):
            y = conv(F.relu(norm(y)))
        return x + y


def group_norm(channels: int) -> nn.GroupNorm:
    """Of 8 groups, or of as many as divide both 8 and the channels."""
    return nn.GroupNorm(gcd(8, channels), channels)


class SegResNet(Baseline):
    """`segresnet`: Myronenko, "3D MRI brain tumor segmentation using autoencoder regularization", 2018 (arXiv 1810.11654).

    Group norm, pre-activation residual blocks (1, 2, 2, 4 down, 1 each up), skips that are added, trilinear up-sampling; widths 2 c1 to
    16 c1 (the publication's 32 to 256 at c1 = 16). Without its variational autoencoder, as MONAI's SegResNet, and without its dropout.
    """

    norm, strides = "group", (8, 8, 8)

    def __init__(self, width: int, preset="petct"):
        super().__init__()
        self.preset, self.tasks = preset, segmentations_of(preset)
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.first = nn.Conv3d(2, width, 3, padding=1, bias=False)
        self.downs = nn.ModuleList([nn.Conv3d(i, o, 3, stride=2, padding=1, bias=False) for i, o in zip(widths, widths[1:])])
        self.encoder = nn.ModuleList([nn.Sequential(*[PreActivationBlock(w) for _ in range(n)]) for w, n in zip(widths, (1, 2, 2, 4))])
        # coarsest first
        self.ups = nn.ModuleList([nn.Conv3d(2 * w, w, 1, bias=False) for w in widths[2::-1]])
        self.decoder = nn.ModuleList([PreActivationBlock(w) for w in widths[2::-1]])
        self.norm_last = group_norm(width)
        self.last = nn.Conv3d(width, 6 if preset == "brain" else 2, 1)

    def forward(self, x: Tensor) -> MirrorOutput | BrainOutput:
        self.check_input(x.shape)
        x = self.encoder[0](self.first(x))  # (B, w, D, H, W)
        skips = []
        for down, stage in zip(self.downs, self.encoder[1:]):
            skips.append(x)
            x = stage(down(x))  # (B, 2 w, D/2, ...), (B, 4 w, D/4, ...), (B, 8 w, D/8, ...)
        for up, stage, skip in zip(self.ups, self.decoder, reversed(skips)):
            x = stage(F.interpolate(up(x), scale_factor=2, mode="trilinear") + skip)
        return split(self.last(F.relu(self.norm_last(x))), self.preset)


# -------------------------------------------------------------------------------------------------------------- which is which
NAMES = {
    "petct": ("ct", "pet", "ef", "mf", "lf", "valindria", "multitask", "joint", "nnunet", "blackbean", "segresnet"),
    "brain": ("v2-rec", "nnunet", "segresnet"),
}
ALL = (*NAMES["petct"], "v2-rec (brain)")
FUSION = {"mf": MidFusion, "lf": LateFusion, "valindria": Valindria, "multitask": MultiTask}


def segmentations_of(preset: str) -> tuple[str, ...]:
    """What a network that only segments learns: the tumor, or the brain's three targets."""
    return TASKS["brain"]["v2"] if preset == "brain" else ("seg",)


def tasks_of(name: str, preset: str = "petct", tasks: str = "v1") -> tuple[str, ...]:
    """What the network of this name learns, as in `mirror_unet.TASKS`; `tasks` are joint's."""
    if name == "joint" and tasks != "none":
        return TASKS["petct"][tasks]
    if name == "multitask":
        return MultiTask.tasks
    if name == "v2-rec":
        return ("core", "edema", "image")
    return segmentations_of(preset)


def build(name, preset="petct", channels=(16, 32, 64, 128, 256), norm="instance", share=(5,), tasks="v1", skips="pet",
          patch=(96, 96, 96), spacing=(2.0, 2.0, 3.0)) -> nn.Module:  # fmt: skip
    """The baseline of this name, freshly initialised. Raises ValueError where there is none, with the names there are.

    norm: of the networks made of mirror_unet's blocks; share: v2-rec's; tasks, skips: joint's; patch, spacing: what nnunet is planned for.
    """
    if name not in NAMES[preset]:
        raise ValueError(f"no version {name!r} with preset {preset!r}; there are {', '.join((*TASKS[preset], *NAMES[preset]))}")
    if norm not in ("instance", "batch") or tasks not in ("v1", "v2", "v3", "none") or skips not in ("pet", "both"):
        raise ValueError(f"norm={norm!r}, tasks={tasks!r}, skips={skips!r}: use instance or batch; v1, v2, v3 or none; pet or both")
    if len(channels) != 5:
        raise ValueError(f"channels={tuple(channels)}: give five widths, those of levels 1 to 5")
    if name in ("ct", "pet", "ef"):
        return OneUNet(("ct", "pet") if name == "ef" else (name,), channels, norm)
    if name in FUSION:
        return FUSION[name](channels, norm)
    if name == "joint":
        return Joint(channels, norm, tasks, skips)
    if name == "v2-rec":
        return BrainRec(share, channels, norm)
    if name == "segresnet":
        return SegResNet(2 * channels[0], preset)
    if name == "blackbean":
        return PlainUNet([(1, 1, 1)] + 4 * [(2, 2, 2)], 5 * [(3, 3, 3)], [2 * c for c in channels], preset)
    strides, kernels = plan(patch, spacing)  # nnunet
    if len(strides) < 2:
        raise ValueError(f"patch {tuple(patch)}: nnU-Net would plan no down-sampling at all; use 16 or more on a side")
    widths = [min(2 * channels[0] * 2**i, 20 * channels[0]) for i in range(len(strides))]
    return PlainUNet(strides, kernels, widths, preset, deep_supervision=True)
