r"""Mirror U-Net: two 3D U-Nets, one per modality, that share the weights of a few levels.

Marinov et al., "Mirror U-Net: Marrying Multimodal Fission with Multi-task Learning for Semantic
Segmentation in Medical Imaging", arXiv 2303.07126. Fusion networks join PET and CT into one feature
map. Mirror U-Net does the opposite, *fission*: each modality keeps its own U-Net, each decoder
gets its own task, and at a few levels, by default the bottleneck, both nets use the same weights.

    CT  --> 1 2 3 4 --> 5 --> 6 7 8 9 ---> v1-v3: reconstruct CT        v4: segment the tumor
                        :\
           same weights : >--------------> v2, v3: reconstruct PET from both (light decoder)
                        :/
    PET --> 1 2 3 4 --> 5 --> 6 7 8 9 ---> all: segment the tumor
                         +---------------> v3: has this patient a tumor? (classifier)

    here                    in the paper (section 3, Fig. 2)
    levels 1-4, 5, 6-9      encoder, bottleneck, decoder; level 6 is the deepest up layer
    share=(5,)              L = {5}: at these levels both branches use one and the same layer
    "v1"                    (b) transference: segment + reconstruct CT
    "v2"                    (c) fission: v1 + reconstruct PET from the bottleneck
    "v3"                    (d) fission and classification: v2 + classify the patient
    "v4"                    (a) decision fusion: logits = w CT + (1 - w) PET, with w = ct_weight
    preset "brain"          generalization study: T2w -> tumor core, FLAIR -> edema,
                            both bottlenecks (v2) -> whole tumor

What is shared is *weights*, not features: the PET branch reads the PET image alone. So in v1-v3 the
segmentation and the classifier do not depend on the CT input. CT acts in training only, through its
gradients on shared weights (and, with batch norm, through the running statistics there); at test
time v1-v3 are PET networks, and `segment` runs only that half. v4's fused logits depend on both
images, and so does the PET reconstruction, since the light decoder reads both bottlenecks.

Read ConvUnit, ResidualUnit, UpLayer, Branch, LightDecoder, CellClassifier, MirrorUNet. The authors'
release, whose weights `from_official` loads, has norm="batch" and classifier="release".
"""

import re
from itertools import combinations, product
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from kernels.recompute import convolve, is_recomputable, recomputable

# `recomputable(f, x)` is f(x), marked so that a `convolve` that reads it computes it again in its
# backward pass instead of keeping it. Outputs of convolutions are kept; outputs of norms and
# concatenations are made again from them. A training step of v3 then keeps two fifths less.

# What each version learns, by the names of its outputs; the loss has a term for each. "seg",
# "core", "whole" and "edema" are segmented, "ct" and "pet" are reconstructed, "tumor" is the class.
TASKS: dict[str, dict[str, tuple[str, ...]]] = {
    "petct": {
        "v1": ("seg", "ct"),
        "v2": ("seg", "ct", "pet"),
        "v3": ("seg", "ct", "pet", "tumor"),
        "v4": ("seg",),  # both decoders segment, and their logits are fused
    },
    "brain": {"v1": ("core", "edema"), "v2": ("core", "whole", "edema")},
}

# Instance norm on an output would give every window the same mean and spread. So "instance" leaves
# the last two convolutions of each decoder without norm (and has no biases where the norm would
# remove them). "instance_everywhere", for checkpoints of version 1, follows "batch", the release.
NORMS = ("instance", "batch", "instance_everywhere")


class MirrorOutput(NamedTuple):
    """Outputs of a PET/CT network; None if the version has no such output."""

    seg: Tensor  # (B, 2, D, H, W) logits: background, tumor
    ct: Tensor | None = None  # (B, 1, D, H, W) reconstruction; v4: (B, 2, D, H, W) CT branch logits
    pet: Tensor | None = None  # (B, 1, D, H, W) reconstruction; v4: the PET branch's logits
    tumor: Tensor | None = None  # (B,) logit of "there is a tumor"


class CellOutput(NamedTuple):
    """Outputs of a network with a CellClassifier: those of MirrorOutput, and `cells`."""

    seg: Tensor
    ct: Tensor | None
    pet: Tensor | None
    tumor: Tensor
    cells: Tensor  # (B, D/16, H/16, W/16) logit of "there is a tumor" in each part of the patch


class BrainOutput(NamedTuple):
    """Outputs of a brain network: three two-class segmentations, (B, 2, D, H, W) logits each."""

    core: Tensor  # from T2w
    whole: Tensor | None  # from the bottleneck; None in v1
    edema: Tensor  # from FLAIR


# ------------------------------------------------------------------------------------------ layers
class ConvUnit(nn.Module):
    """Convolution (`up`: transposed, sides x 2) -> norm -> PReLU; norm "none": the first alone."""

    def __init__(self, in_channels, out_channels, norm, kernel=3, stride=1, up=False):
        super().__init__()
        widths, more = (in_channels, out_channels), dict(bias=norm != "instance")
        if up:
            self.conv = nn.ConvTranspose3d(*widths, 3, 2, padding=1, output_padding=1, **more)
        else:
            self.conv = nn.Conv3d(*widths, kernel, stride, padding=kernel // 2, **more)
        self.norm: Any = None
        if norm == "batch":
            self.norm = nn.BatchNorm3d(out_channels)
        elif norm != "none":
            self.norm = nn.InstanceNorm3d(out_channels, affine=True)
        if self.norm is not None:
            self.slope = nn.Parameter(torch.full((1,), 0.25))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = convolve(self.conv, x)
        if self.norm is None:
            return x
        if isinstance(self.norm, nn.BatchNorm3d):
            x = F.prelu(self.norm(x), self.slope.to(x.dtype))  # in half precision under autocast
            return x if residual is None else x + residual
        if residual is None or is_recomputable(residual):  # no or an identity shortcut
            return recomputable(self.norm_act, x, residual)
        return self.norm_act(x, residual)  # else the residual would be kept instead

    def norm_act(self, x: Tensor, residual: Tensor | None, **known) -> Tensor:
        """Instance norm, affine, PReLU and the residual sum, fused in one operation."""
        weight, bias = self.norm.weight, self.norm.bias
        return kernels.norm_act(x, weight, bias, self.slope, residual, self.norm.eps, **known)


class ResidualUnit(nn.Module):
    """y = units(x) + shortcut(x), with `n_units` conv units, the first of them strided.

    The shortcut is the identity if shapes allow, else a convolution (k3 with a stride, k1 without).
    `bare=True`: a single convolution without norm and activation, for the output of a decoder.
    """

    def __init__(self, in_channels, out_channels, norm, stride=1, n_units=2, bare=False):
        super().__init__()
        if bare:
            self.units = nn.ModuleList([nn.Conv3d(in_channels, out_channels, 3, padding=1)])
        else:
            self.units = nn.ModuleList([ConvUnit(in_channels, out_channels, norm, stride=stride)])
            for _ in range(n_units - 1):
                self.units.append(ConvUnit(out_channels, out_channels, norm))
        if stride > 1:
            self.shortcut = nn.Conv3d(in_channels, out_channels, 3, stride, padding=1)
        elif in_channels != out_channels:
            self.shortcut = nn.Conv3d(in_channels, out_channels, 1)
        else:
            self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = convolve(self.shortcut, x)
        *first, last = self.units
        for unit in first:
            x = unit(x)
        if isinstance(last, ConvUnit):
            return last(x, residual=shortcut)
        return convolve(last, x) + shortcut


class UpLayer(nn.Module):
    """Double each side with a transposed conv unit, then refine with a residual unit.

    `top=True`, for the output of a decoder: the refinement is a bare convolution, and with
    norm="instance" so is the transposed one; both start small, and the output so near 0.
    """

    def __init__(self, in_channels, out_channels, norm, top=False):
        super().__init__()
        up_norm = "none" if top and norm == "instance" else norm
        self.up = ConvUnit(in_channels, out_channels, up_norm, up=True)
        self.refine = ResidualUnit(out_channels, out_channels, norm, n_units=1, bare=top)
        if up_norm == "none":  # images are in [0, 1]: to unlearn a large output costs features
            for weight in self.parameters():
                weight.data *= 0.1

    def forward(self, below: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            below = recomputable(lambda *maps: torch.cat(maps, dim=1), below, skip)
        return self.refine(self.up(below))


# --------------------------------------------------------------------------------- the two branches
class Branch(nn.Module):
    """One U-Net of the pair: nine levels, numbered as in the paper. `levels[n - 1]` is level n."""

    def __init__(self, out_channels, channels, norm, in_channels=1):
        super().__init__()
        c1, c2, c3, c4, c5 = channels
        self.levels = nn.ModuleList([
            ResidualUnit(in_channels, c1, norm, stride=2),  # 1: (in, D, H, W) -> (c1, D/2, ...)
            ResidualUnit(c1, c2, norm, stride=2),  # 2: -> (c2, D/4, H/4, W/4)
            ResidualUnit(c2, c3, norm, stride=2),  # 3: -> (c3, D/8, H/8, W/8)
            ResidualUnit(c3, c4, norm, stride=2),  # 4: -> (c4, D/16, H/16, W/16)
            ResidualUnit(c4, c5, norm),  # 5: -> (c5, D/16, H/16, W/16), the bottleneck
            UpLayer(c5 + c4, c3, norm),  # 6: with the skip of level 4 -> (c3, D/8, H/8, W/8)
            UpLayer(c3 + c3, c2, norm),  # 7: with level 3 -> (c2, D/4, H/4, W/4)
            UpLayer(c2 + c2, c1, norm),  # 8: with level 2 -> (c1, D/2, H/2, W/2)
            UpLayer(c1 + c1, out_channels, norm, top=True),  # 9: with level 1 -> (out, D, H, W)
        ])

    def encode(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, in, D, H, W) -> bottleneck (B, c5, D/16, H/16, W/16) and four skips, finest first."""
        x = x.contiguous() if x.shape[1] == 1 else x  # else each convolution copies the slice
        skips = []
        for down in self.levels[:4]:
            x = down(x)
            skips.append(x)
        return self.levels[4](x), skips

    def decode(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        """Bottleneck x and skips -> (B, out, D, H, W)."""
        for up, skip in zip(self.levels[5:], reversed(skips), strict=True):
            x = up(x, skip)
        return x


class LightDecoder(nn.Sequential):
    """The bottleneck's decoder: four up layers without skips.

    (B, in, D/16, H/16, W/16) -> (B, out, D, H, W); `in` is 2 c5, both branches' bottlenecks. In the
    release (norm="batch") even the last layer has norm and PReLU.
    """

    def __init__(self, out_channels, channels, norm, in_channels=None):
        c1, c2, c3, _, c5 = channels
        widths = [in_channels or 2 * c5, c3, c2, c1, out_channels]
        tops = (False, False, False, norm == "instance")
        super().__init__(*(UpLayer(i, o, norm, t) for i, o, t in zip(widths, widths[1:], tops)))


class CellClassifier(nn.Module):
    """Has the patient a tumor, and in which cells of 16^3 voxels? -> logits (B,), (B, d, h, w).

    A cell is judged by its features in the PET bottleneck (B, c5, d, h, w) and by the highest logit
    of tumor in it, of the segmentation (B, 2, D, H, W), which gets no gradient. The patch has a
    tumor if a cell has one.
    """

    def __init__(self, in_channels: int):
        super().__init__()
        self.out = nn.Conv3d(in_channels + 1, 1, 1)

    def forward(self, bottleneck: Tensor, seg: Tensor) -> tuple[Tensor, Tensor]:
        logit = (seg[:, 1:] - seg[:, :1]).detach()
        evidence = F.adaptive_max_pool3d(logit, bottleneck.shape[2:])  # (B, 1, d, h, w)
        cells = self.out(torch.cat([bottleneck, evidence], dim=1)).squeeze(1)
        return cells.flatten(1).amax(1), cells


class ReleaseClassifier(nn.Module):
    """The release's: PET bottleneck (B, c5, d, h, w) -> logit (B,) and no cells.

    Average pooling to 6^3 makes it take any patch size; for the paper's 96^3 it is the identity.
    Always with batch norm: instance norm of a single map would erase how strongly it responds.
    """

    def __init__(self, in_channels: int):
        super().__init__()
        self.squeeze = ConvUnit(in_channels, 1, "batch", kernel=1)
        self.hidden = nn.Linear(6**3, 256)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(256, 1)

    def forward(self, bottleneck: Tensor, seg: Tensor | None = None) -> tuple[Tensor, None]:
        x = F.adaptive_avg_pool3d(self.squeeze(bottleneck), 6).flatten(1)  # (B, 216)
        x = self.dropout(F.relu(self.hidden(x)))  # (B, 256)
        return self.out(x).squeeze(1), None


CLASSIFIERS = {"cells": CellClassifier, "release": ReleaseClassifier}


# -------------------------------------------------------------------------------- the Mirror U-Net
class MirrorUNet(nn.Module):
    """Mirror U-Net v1-v4 for PET/CT, or v1 and v2 for brain MR.

    Args:
        version: "v1" | "v2" | "v3" | "v4", see TASKS and the glossary above.
        share: levels 3..7 whose weights both branches share; () shares nothing.
        channels: widths of levels 1-5.
        norm: "instance" | "batch" (the authors' release) | "instance_everywhere", see NORMS.
        preset: "petct" | "brain".
        ct_weight: v4's weight of the CT logits in [0, 1], or "learnable", which starts at 0.5.
        classifier: of v3, "cells" (CellClassifier) | "release"; the default goes with the norm.

    Forward: x (B, 2, D, H, W), channel 0 CT (brain: T2w), channel 1 PET (brain: FLAIR)
    -> MirrorOutput (with cells: CellOutput) | BrainOutput. Raises ValueError, naming a size that
    works, if the strides do not divide D, H, W or the bottleneck gets too small for its norm.
    """

    strides = (16, 16, 16)  # of all down-sampling levels together

    def __init__(
        self, version="v3", share=(5,), channels=(16, 32, 64, 128, 256), norm="instance",
        preset="petct", ct_weight: float | str = 0.1, classifier="",
    ):
        super().__init__()
        if version not in TASKS.get(preset, {}):
            known = {name: list(versions) for name, versions in TASKS.items()}
            raise ValueError(f"no version {version!r} with preset {preset!r}; there are {known}")
        if not set(share) <= {3, 4, 5, 6, 7}:
            raise ValueError(f"share={tuple(share)}: only levels 3, 4, 5, 6, 7 can be shared")
        if len(channels) != 5:
            raise ValueError(f"channels={tuple(channels)}: give five widths, of levels 1 to 5")
        kind = classifier or ("release" if norm == "batch" else "cells")
        for name, value, known in ("norm", norm, NORMS), ("classifier", kind, CLASSIFIERS):
            if value not in known:
                raise ValueError(f"{name}={value!r}: use one of {', '.join(known)}")
        self.version, self.preset, self.norm = version, preset, norm
        self.share, self.channels = tuple(sorted(share)), tuple(channels)
        self.tasks = TASKS[preset][version]
        # The images that `segment` needs.
        self.reads = ("ct", "pet") if version == "v4" or preset == "brain" else ("pet",)

        self.ct = Branch(1 if "ct" in self.tasks else 2, self.channels, norm)
        self.pet = Branch(2, self.channels, norm)
        for level in self.share:  # sharing is this: one module object in two places
            self.pet.levels[level - 1] = self.ct.levels[level - 1]
        self.bottleneck_decoder = None
        if "pet" in self.tasks or "whole" in self.tasks:
            self.bottleneck_decoder = LightDecoder(1 if "pet" in self.tasks else 2, channels, norm)
        self.classifier = CLASSIFIERS[kind](channels[4]) if "tumor" in self.tasks else None
        if version == "v4":
            learnable = ct_weight == "learnable"
            w = torch.tensor(0.5 if learnable else float(ct_weight))
            self.ct_weight = nn.Parameter(w) if learnable else nn.Buffer(w)
        for module in self.modules():
            module.released = norm == "batch"  # type: ignore  # see kernels/recompute.py

    def forward(self, x: Tensor) -> MirrorOutput | CellOutput | BrainOutput:
        self.check_input(x.shape, channels=2)
        ct_bottleneck, ct_skips = self.ct.encode(x[:, 0:1])
        pet_bottleneck, pet_skips = self.pet.encode(x[:, 1:2])
        from_ct = self.ct.decode(ct_bottleneck, ct_skips)
        from_pet = self.pet.decode(pet_bottleneck, pet_skips)
        if self.version == "v4":
            w = self.ct_weight.clamp(0, 1).to(from_ct.dtype)
            fused = w * from_ct + (1 - w) * from_pet
            return MirrorOutput(seg=fused, ct=from_ct, pet=from_pet)
        from_both = None
        if self.bottleneck_decoder is not None:
            from_both = self.bottleneck_decoder(torch.cat([ct_bottleneck, pet_bottleneck], dim=1))
        if self.preset == "brain":
            return BrainOutput(core=from_ct, whole=from_both, edema=from_pet)
        return self.output(pet_bottleneck, from_pet, from_ct, from_both)

    def output(self, bottleneck, seg, ct=None, pet=None) -> MirrorOutput | CellOutput:
        """All outputs: those given, and what the classifier says of bottleneck and segmentation."""
        tumor, cells = self.classifier(bottleneck, seg) if self.classifier else (None, None)
        out = MirrorOutput(seg, ct, pet, tumor)
        return out if cells is None else CellOutput(*out, cells)  # type: ignore

    def segment(self, x: Tensor) -> MirrorOutput | CellOutput | BrainOutput:
        """Segmentation and classification alone, with the least computation.

        v1-v3 take PET alone, x (B, 1, D, H, W), and cost half of `forward`, whose `seg` and `tumor`
        they equal bit for bit in eval mode, whatever the CT. v4 and the brain networks take both
        images, (B, 2, D, H, W), and run `forward`. Any other x is a ValueError.
        """
        if len(self.reads) == 2:
            return self(x)
        self.check_input(x.shape, channels=1)
        bottleneck, skips = self.pet.encode(x)
        return self.output(bottleneck, self.pet.decode(bottleneck, skips))

    def check_input(self, shape: tuple[int, ...], channels: int = 2) -> None:
        """Raise ValueError for an input shape (B, C, D, H, W) that the network cannot take."""
        if len(shape) != 5 or shape[1] != channels:
            raise ValueError(f"expected (B, {channels}, D, H, W), got {tuple(shape)}")
        size, strides = tuple(shape[2:]), self.strides
        if any(n % s or n == 0 for n, s in zip(size, strides)):
            fit = tuple(max(s, s * round(n / s)) for n, s in zip(size, strides))
            need = f"the strides need multiples of {' x '.join(map(str, strides))}"
            raise ValueError(f"size {size}: {need}; use {fit}, for example")
        values = prod([n // s for n, s in zip(size, strides)])  # per channel, at the bottleneck
        values *= shape[0] if self.norm == "batch" else 1
        if values < 2 and (self.norm != "batch" or self.training):
            problem = f"{self.norm.split('_')[0]} norm has one value per channel at the bottleneck"
            raise ValueError(f"size {size}: {problem}; use {2 * max(strides)} or more")


# ---------------------------------------------------------------------------- the authors' weights
_OFFICIAL_PARTS = {  # substrings of our names -> of theirs, replaced in this order
    ".norm.": ".adn.N.",
    ".slope": ".adn.A.weight",
    ".shortcut.": ".residual.",
    ".refine.units.0.": ".1.conv.unit0.",  # an up layer there is a Sequential(up, refine)
    ".up.": ".0.",
    ".units.": ".conv.unit",
    "bottleneck_decoder": "dec",
    "classifier.squeeze": "flatten_channels",
    "classifier.hidden": "fc.1",
    "classifier.out": "fc.4",
}


def _official_name(ours: str, share: tuple[int, ...], finest_first: bool) -> str:
    """Our name -> the release's: "ct.levels.0.norm.bias" -> "down_1.0.adn.N.bias".

    There, layers are listed by side and by whether they are shared: with share = (3, 5), down_1
    and down_2 hold levels 1, 2, 4 and common_downs holds level 3. Up layers are listed finest
    first; for shared ones the release's scripts differ, so both orders are tried.
    """
    name = ours
    if match := re.match(r"(ct|pet)\.levels\.(\d)", ours):
        branch, level = ("ct", "pet").index(match[1]) + 1, int(match[2]) + 1
        shared = level in share
        alike = [n for n in range(1, 10) if (n in share) == shared and (n > 5) == (level > 5)]
        if level > 5 and (finest_first or not shared):
            alike.reverse()
        side = "up" if level > 5 else "down"
        if level == 5:
            place = "bottom_layer" if shared else f"bottom_layer_{branch}"
        elif shared:
            place = f"common_{side}s.{alike.index(level)}"
        else:
            place = f"{side}_{branch}.{alike.index(level)}"
        name = place + ours[match.end() :]
    for part, official in _OFFICIAL_PARTS.items():
        name = name.replace(part, official)
    return re.sub(r"conv\.unit0\.(weight|bias)$", r"conv.unit0.conv.\1", name)  # a bare convolution


def from_official(state_dict, preset=None, ct_weight=0.1) -> tuple[MirrorUNet, dict]:
    """Build the MirrorUNet (norm="batch", eval mode) that fits a state dict of the release.

    Names and shapes tell version, share set and widths. They do not tell a brain v1 from a PET/CT
    v4 (the default; else say preset="brain"), nor v4's `ct_weight`, an option of the release's
    command line (0.1; "learnable" takes the file's `learnable_th`).

    Returns (model, report). The report holds version, preset, share, channels, "used" {official
    name: our names} and "left_over", the file's unused names (at most `learnable_th`). Raises
    ValueError for weights that fit no Mirror U-Net.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    version = "v3" if "fc.1.weight" in state else "v2" if "dec.0.0.conv.weight" in state else None
    both_segment = len(state.get("up_1.0.0.conv.bias", ())) == 2
    preset = preset or ("brain" if version == "v2" and both_segment else "petct")
    version = version or ("v4" if both_segment and preset == "petct" else "v1")
    given = set(state) - {"learnable_th"}
    shares = [share for n in range(6) for share in combinations((3, 4, 5, 6, 7), n)]
    fits, closest = {}, sorted(given)
    for share, finest_first in product(shares, (True, False)):  # exactly one share set must fit
        first = [f"ct.levels.{n}.units.0.conv.weight" for n in range(5)]
        first = [_official_name(name, share, finest_first) for name in first]
        if not set(first) <= given:
            continue
        channels = tuple(len(state[name]) for name in first)
        with torch.device("meta"):  # shapes alone
            shapes = MirrorUNet(version, share, channels, "batch", preset).state_dict()
        shapes.pop("ct_weight", None)
        names = {ours: _official_name(ours, share, finest_first) for ours in shapes}
        wrong = given ^ set(names.values())
        wrong |= {o for n, o in names.items() if o in given and state[o].shape != shapes[n].shape}
        closest = min(closest, sorted(wrong), key=len)
        if not wrong:
            fits.setdefault(share, (channels, names))
    if len(fits) != 1:
        why = f"more than one share set fits: {list(fits)}"
        if not fits:
            why = f"at best, these names or shapes do not match: {closest[:8]}"
        raise ValueError(f"not the weights of a Mirror U-Net ({preset} {version}?): {why}")

    [(share, (channels, names))] = fits.items()
    model = MirrorUNet(version, share, channels, "batch", preset, ct_weight)
    tensors = {name: state[official] for name, official in names.items()}
    used: dict[str, list[str]] = {}
    for name, official in names.items():
        used.setdefault(official, []).append(name)
    if version == "v4" and ct_weight == "learnable":
        if "learnable_th" not in state:
            raise ValueError("ct_weight='learnable' takes the file's `learnable_th`; it has none")
        tensors["ct_weight"] = state["learnable_th"].reshape(())
        used["learnable_th"] = ["ct_weight"]
    elif version == "v4":
        tensors["ct_weight"] = model.ct_weight  # not in the file: keep what was asked for
    model.load_state_dict(tensors)
    report = {"version": version, "preset": preset, "share": share, "channels": channels}
    return model.eval(), report | {"used": used, "left_over": sorted(set(state) - set(used))}
