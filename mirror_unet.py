"""Mirror U-Net (Marinov et al., arXiv 2303.07126): two 3D U-Nets, one a modality, mirrored about a shared bottleneck.

Fusion models join PET and CT into one feature map. Mirror U-Net does the opposite, *fission*: each modality keeps a U-Net
of its own, each decoder gets a *task* of its own, and the two nets share the weights of a few levels, by default the bottleneck's.

        CT  --> 1 2 3 4 \\         / 6 7 8 9 --> CT decoder's task         v1-v3: reconstruct CT       v4: segment
                         >-- 5 --<
        PET --> 1 2 3 4 /    |    \\ 6 7 8 9 --> PET decoder's task        v1-v4: segment the tumor
                             |
                             +--> light decoder: reconstruct PET (v2, v3);  classifier: is there a tumor? (v3)

What is shared is *weights*, not features: the PET branch reads the PET image alone. So in v1-v3 the segmentation and the
classifier do not depend on the CT input at all. CT acts in training only, through its gradients on the shared weights;
at test time v1-v3 are PET networks (`segment` runs just that half). v4's fused logits and the PET reconstruction read both.

Reading order: ConvUnit -> ResidualUnit -> UpLayer -> Branch -> LightDecoder, Classifier -> MirrorUNet; last, `from_official`.

    code                    paper
    levels 1-4, 5, 6-9      encoder, bottleneck, decoder; 6 is the deepest up layer
    share=(5,)              L = {5}, the levels in which both branches use one and the same layer
    version "v1".."v4"      (b) transference, (c) fission, (d) fission + classification, (a) decision fusion
    ct_weight               w of v4: logits = w CT + (1 - w) PET
    preset "brain"          the generalisation study: T2w -> tumor core, FLAIR -> edema, bottleneck -> whole tumor

Differences from the authors' release, on purpose: instance norm by default (theirs: batch norm, `norm="batch"`), and a
classifier that takes any patch size (theirs is tied to 96^3; ours equals it there).
"""

from itertools import combinations, product
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels

VERSIONS = {"petct": ("v1", "v2", "v3", "v4"), "brain": ("v1", "v2")}


class MirrorOutput(NamedTuple):
    """What a PET/CT Mirror U-Net returns; None where the version has no such output."""

    seg: Tensor  # (B, 2, D, H, W) logits: background, tumor
    ct: Tensor | None = None  # (B, 1, D, H, W) CT reconstruction; v4: (B, 2, D, H, W) logits of the CT branch
    pet: Tensor | None = None  # (B, 1, D, H, W) PET reconstruction; v4: (B, 2, D, H, W) logits of the PET branch
    tumor: Tensor | None = None  # (B,) logit of "there is a tumor"


class BrainOutput(NamedTuple):
    """What the brain preset returns: three two-class segmentations, each (B, 2, D, H, W) logits."""

    core: Tensor  # from T2w
    whole: Tensor | None  # from the bottleneck; None in v1
    edema: Tensor  # from FLAIR


# ---------------------------------------------------------------------------------------------------------------- layers
# What a convolution keeps for its backward pass is its input. Where that input is cheap to make again from tensors that are kept
# anyway (a norm and PReLU of a convolution's output, a concatenation), it carries a recipe, `x.again`, and is not kept.
def with_recipe(make, *inputs: Tensor | None) -> Tensor:
    """make(*inputs), carrying that as its recipe; inputs with a recipe of their own are then made again too."""
    y = make(*inputs)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        parts = [getattr(x, "again", lambda x=x: x) for x in inputs]
        y.again = torch.no_grad()(lambda: make(*[part() for part in parts]))
    return y


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x), which keeps x's recipe in place of x if there is one."""
    again = getattr(x, "again", None)
    if again is None:
        return conv(x)
    this = id(x)  # not x itself: hooks live as long as the graph
    with torch.autograd.graph.saved_tensors_hooks(lambda t: again if id(t) == this else t, lambda kept: kept() if kept is again else kept):
        return conv(x)


class ConvUnit(nn.Module):
    """Convolution -> norm -> PReLU (one slope). `up=True`: a transposed convolution that doubles each side."""

    def __init__(self, in_channels: int, out_channels: int, norm: str, kernel: int = 3, stride: int = 1, up: bool = False):
        super().__init__()
        if up:
            self.conv = nn.ConvTranspose3d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1)
        else:
            self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, padding=kernel // 2)
        self.norm = nn.BatchNorm3d(out_channels) if norm == "batch" else nn.InstanceNorm3d(out_channels, affine=True)
        self.slope = nn.Parameter(torch.full((1,), 0.25))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = convolve(self.conv, x)
        if isinstance(self.norm, nn.InstanceNorm3d):  # norm, affine, PReLU and the shortcut's sum in one op
            f = lambda x, residual: kernels.norm_act(x, self.norm.weight, self.norm.bias, self.slope, residual, self.norm.eps)  # noqa: E731
            made_of_kept = residual is None or hasattr(residual, "again")  # another residual would have to be kept in the result's place
            return with_recipe(f, x, residual) if made_of_kept else f(x, residual)
        x = F.prelu(self.norm(x), self.slope.to(x.dtype))
        return x if residual is None else x + residual


class ResidualUnit(nn.Module):
    """`units` conv units (the first one strided) plus a shortcut: y = units(x) + shortcut(x).

    The shortcut is the identity where shapes allow, else a convolution (k3 where it strides, k1 where it does not).
    `bare=True`: a single convolution without norm and activation in place of the units, for a decoder's output.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: str, stride: int = 1, units: int = 2, bare: bool = False):
        super().__init__()
        if bare:
            self.units = nn.ModuleList([nn.Conv3d(in_channels, out_channels, 3, padding=1)])
        else:
            first = ConvUnit(in_channels, out_channels, norm, stride=stride)
            self.units = nn.ModuleList([first] + [ConvUnit(out_channels, out_channels, norm) for _ in range(units - 1)])
        if stride > 1:
            self.shortcut = nn.Conv3d(in_channels, out_channels, 3, stride, padding=1)
        else:
            self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        *first, last = self.units
        for unit in first:
            x = unit(x)
        return last(x, shortcut) if isinstance(last, ConvUnit) else convolve(last, x) + shortcut


class UpLayer(nn.Module):
    """Double each side with a transposed conv unit, then refine with a residual unit of one conv unit.

    `top=True`: the refinement is a bare convolution, so that the output is free to take any value.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: str, top: bool = False):
        super().__init__()
        self.up = ConvUnit(in_channels, out_channels, norm, up=True)
        self.refine = ResidualUnit(out_channels, out_channels, norm, units=1, bare=top)

    def forward(self, below: Tensor, skip: Tensor | None = None) -> Tensor:
        x = below if skip is None else with_recipe(lambda *parts: torch.cat(parts, dim=1), below, skip)
        return self.refine(self.up(x))


# -------------------------------------------------------------------------------------------------------------- the nets
class Branch(nn.Module):
    """One U-Net of the pair: nine levels, numbered as in the paper. `levels[n - 1]` is level n."""

    def __init__(self, out_channels: int, channels: tuple[int, ...], norm: str, inputs: int = 1):
        super().__init__()
        c1, c2, c3, c4, c5 = channels
        self.levels = nn.ModuleList(
            [
                ResidualUnit(inputs, c1, norm, stride=2),  # 1: (inputs, D, H, W) -> (c1, D/2, H/2, W/2)
                ResidualUnit(c1, c2, norm, stride=2),  # 2: -> (c2, D/4, H/4, W/4)
                ResidualUnit(c2, c3, norm, stride=2),  # 3: -> (c3, D/8, H/8, W/8)
                ResidualUnit(c3, c4, norm, stride=2),  # 4: -> (c4, D/16, H/16, W/16)
                ResidualUnit(c4, c5, norm),  # 5: -> (c5, D/16, H/16, W/16), the bottleneck
                UpLayer(c5 + c4, c3, norm),  # 6: with level 4 -> (c3, D/8, H/8, W/8)
                UpLayer(c3 + c3, c2, norm),  # 7: with level 3 -> (c2, D/4, H/4, W/4)
                UpLayer(c2 + c2, c1, norm),  # 8: with level 2 -> (c1, D/2, H/2, W/2)
                UpLayer(c1 + c1, out_channels, norm, top=True),  # 9: with level 1 -> (out, D, H, W)
            ]
        )

    def encode(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, inputs, D, H, W) -> bottleneck (B, c5, D/16, H/16, W/16) and the four skips, finest first."""
        skips = []
        for down in self.levels[:4]:
            x = down(x)
            skips.append(x)
        return self.levels[4](x), skips

    def decode(self, bottleneck: Tensor, skips: list[Tensor]) -> Tensor:
        """Bottleneck and skips -> (B, out, D, H, W)."""
        x = bottleneck
        for up, skip in zip(self.levels[5:], reversed(skips), strict=True):
            x = up(x, skip)
        return x


class LightDecoder(nn.Sequential):
    """The bottleneck's own decoder: four up layers without skips, (B, inputs or 2 c5, D/16, ...) -> (B, out, D, H, W)."""

    def __init__(self, out_channels: int, channels: tuple[int, ...], norm: str, inputs: int | None = None):
        c1, c2, c3, _, c5 = channels
        widths = [inputs or 2 * c5, c3, c2, c1, out_channels]  # coarsest first
        super().__init__(*[UpLayer(i, o, norm) for i, o in zip(widths, widths[1:])])  # the last keeps norm and PReLU


class Classifier(nn.Module):
    """Is there a tumor? (B, c5, d, h, w) PET bottleneck -> (B,) logit.

    Average pooling to 6^3 makes it take any patch size; at the paper's 96^3 the bottleneck is 6^3 and pooling is the identity.
    Batch norm whatever the rest uses: instance norm of a single map would erase how strongly it responds, which is the answer.
    """

    def __init__(self, in_channels: int):
        super().__init__()
        self.squeeze = ConvUnit(in_channels, 1, "batch", kernel=1)
        self.hidden = nn.Linear(6**3, 256)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(256, 1)

    def forward(self, bottleneck: Tensor) -> Tensor:
        x = F.adaptive_avg_pool3d(self.squeeze(bottleneck), 6).flatten(1)  # (B, 216)
        x = self.dropout(F.relu(self.hidden(x)))  # (B, 256)
        return self.out(x).squeeze(1)


class MirrorUNet(nn.Module):
    """Mirror U-Net v1-v4, for PET/CT or (v1, v2) for brain MR.

    Args:
        version: "v1" reconstruct CT | "v2" + reconstruct PET from the bottleneck | "v3" + classify | "v4" both segment.
        share: levels 3..7 whose weights both branches share; () shares nothing.
        channels: widths of levels 1-5.
        norm: "instance" | "batch" (the authors' release).
        preset: "petct" | "brain".
        ct_weight: v4's weight of the CT logits, a number or "learnable" (starts at 0.5, kept within [0, 1]).

    Forward: x (B, 2, D, H, W), channel 0 CT (brain: T2w), channel 1 PET (brain: FLAIR) -> MirrorOutput | BrainOutput.
    Raises ValueError, with the size to use instead, where the strides do not divide D, H, W or the bottleneck gets too small.
    """

    def __init__(self, version="v3", share=(5,), channels=(16, 32, 64, 128, 256), norm="instance", preset="petct", ct_weight=0.1):
        super().__init__()
        if preset not in VERSIONS or version not in VERSIONS[preset]:
            raise ValueError(f"no version {version!r} with preset {preset!r}; there are {VERSIONS}")
        if not set(share) <= set(range(3, 8)):
            raise ValueError(f"share={tuple(share)}: only the levels 3, 4, 5, 6, 7 can be shared")
        if norm not in ("instance", "batch"):
            raise ValueError(f"norm={norm!r}: use 'instance' or 'batch'")
        if len(channels) != 5:
            raise ValueError(f"channels={tuple(channels)}: give five widths, those of levels 1 to 5")
        self.version, self.preset, self.norm, self.share, self.channels = version, preset, norm, tuple(sorted(share)), tuple(channels)
        self.reads = ("ct", "pet") if version == "v4" or preset == "brain" else ("pet",)  # the modalities that a segmentation takes
        self.ct = Branch(2 if preset == "brain" or version == "v4" else 1, self.channels, norm)
        self.pet = Branch(2, self.channels, norm)
        for level in self.share:  # the whole idea of sharing: one module object, two places
            self.pet.levels[level - 1] = self.ct.levels[level - 1]
        if version in ("v2", "v3"):
            self.bottleneck_decoder = LightDecoder(2 if preset == "brain" else 1, self.channels, norm)
        if version == "v3":
            self.classifier = Classifier(self.channels[4])
        if version == "v4":
            learnable = ct_weight == "learnable"
            w = torch.tensor(0.5 if learnable else float(ct_weight))
            self.ct_weight = nn.Parameter(w) if learnable else nn.Buffer(w)

    def forward(self, x: Tensor) -> MirrorOutput | BrainOutput:
        self.check_input(x.shape, channels=2)
        ct_deep, ct_skips = self.ct.encode(x[:, 0:1])
        pet_deep, pet_skips = self.pet.encode(x[:, 1:2])
        ct = self.ct.decode(ct_deep, ct_skips)
        pet = self.pet.decode(pet_deep, pet_skips)
        if self.version == "v4":
            w = self.ct_weight.clamp(0, 1).to(ct.dtype)
            return MirrorOutput(seg=w * ct + (1 - w) * pet, ct=ct, pet=pet)
        deep = self.bottleneck_decoder(torch.cat([ct_deep, pet_deep], dim=1)) if self.version in ("v2", "v3") else None
        if self.preset == "brain":
            return BrainOutput(core=ct, whole=deep, edema=pet)
        tumor = self.classifier(pet_deep) if self.version == "v3" else None
        return MirrorOutput(seg=pet, ct=ct, pet=deep, tumor=tumor)

    def segment(self, x: Tensor) -> MirrorOutput | BrainOutput:
        """What is known of the tumor, from no more than that takes. v1-v3: `seg` and, in v3, `tumor`, from PET alone, (B, 1, D, H, W),
        at half of forward's cost and equal to forward's, bit for bit, whatever the CT. v4, brain: forward's; ValueError for PET alone.
        """
        if len(self.reads) == 2:
            if x.shape[1] == 1:
                raise ValueError(f"{self.preset} {self.version} reads both modalities: give x with both, (B, 2, D, H, W)")
            return self(x)
        self.check_input(x.shape, channels=1)
        deep, skips = self.pet.encode(x)
        return MirrorOutput(seg=self.pet.decode(deep, skips), tumor=self.classifier(deep) if self.version == "v3" else None)

    def check_input(self, shape: tuple[int, ...], channels: int = 2) -> None:
        """Refuse, in a sentence, a shape (B, C, D, H, W) that would fail or mislead deep inside: ValueError."""
        if len(shape) != 5 or shape[1] != channels:
            raise ValueError(f"expected (B, {channels}, D, H, W), got {tuple(shape)}")
        size, strides = tuple(shape[2:]), getattr(self, "strides", (16, 16, 16))  # of baselines.py's networks: others
        if any(s % m or s == 0 for s, m in zip(size, strides)):
            fit = tuple(max(m, m * round(s / m)) for s, m in zip(size, strides))
            raise ValueError(f"size {size}: the strides need multiples of {' x '.join(map(str, strides))}; use {fit}, for example")
        values = prod([s // m for s, m in zip(size, strides)]) * (shape[0] if self.norm == "batch" else 1)
        if values < 2 and (self.norm == "instance" or self.training):
            raise ValueError(f"size {size}: {self.norm} norm has one value a channel at the bottleneck; use {2 * max(strides)} or more")


# --------------------------------------------------------------------------------------------------- the official weights
def _official_prefixes(version: str, share: tuple[int, ...], ups_finest_first: bool) -> dict[str, str]:
    """Our module path -> the release's, e.g. {"pet.levels.0": "down_2.0"}. There, up layers are listed finest first."""
    names = {"bottleneck_decoder": "dec", "classifier.squeeze": "flatten_channels"} if version in ("v2", "v3") else {}
    for number, branch in enumerate(("ct", "pet"), start=1):
        own = [n for n in range(1, 10) if n not in share]
        down, up = [n for n in own if n < 5], [n for n in own if n > 5][::-1]
        names |= {f"{branch}.levels.{n - 1}": f"down_{number}.{i}" for i, n in enumerate(down)}
        names |= {f"{branch}.levels.{n - 1}": f"up_{number}.{i}" for i, n in enumerate(up)}
        names |= {f"{branch}.levels.{n - 1}": f"common_downs.{i}" for i, n in enumerate(n for n in share if n < 5)}
        ups = sorted((n for n in share if n > 5), reverse=ups_finest_first)
        names |= {f"{branch}.levels.{n - 1}": f"common_ups.{i}" for i, n in enumerate(ups)}
        names[f"{branch}.levels.4"] = "bottom_layer" if 5 in share else f"bottom_layer_{number}"
    return names


def _official_name(ours: str, prefixes: dict[str, str]) -> str:
    """Our parameter name -> the release's, e.g. "ct.levels.0.units.1.norm.bias" -> "down_1.0.conv.unit1.adn.N.bias"."""
    if ours.startswith(("classifier.hidden", "classifier.out")):
        return ours.replace("classifier.hidden", "fc.1").replace("classifier.out", "fc.4")
    prefix = next(p for p in prefixes if ours.startswith(p + "."))
    rest = ours[len(prefix) :].replace(".norm.", ".adn.N.").replace(".slope", ".adn.A.weight").replace(".shortcut.", ".residual.")
    rest = rest.replace(".refine.units.0.", ".1.conv.unit0.").replace(".up.", ".0.")  # an up layer is a Sequential(up, refine)
    rest = rest.replace(".units.", ".conv.unit")
    last = rest.rsplit(".", 1)[-1]  # a bare convolution is itself "unit0.conv" there
    if rest.endswith(f".conv.unit0.{last}"):
        rest = rest.replace(f"unit0.{last}", f"unit0.conv.{last}")
    return prefixes[prefix] + rest


def _candidate_shares(state: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """The share sets with as many shared levels on each side of the bottleneck as the release's names show."""
    shared = [len({k.split(".")[1] for k in state if k.startswith(f"common_{side}s.")}) for side in ("down", "up")]
    middle = (5,) if "bottom_layer.residual.bias" in state else ()
    return [d + middle + u for d, u in product(combinations((3, 4), min(shared[0], 2)), combinations((6, 7), min(shared[1], 2)))]


def _read_channels(state: dict[str, Tensor], prefixes: dict[str, str]) -> tuple[int, ...]:
    """Widths of levels 1-5, from the CT branch's first convolutions; raises KeyError where a layer is missing."""
    return tuple(len(state[f"{prefixes[f'ct.levels.{n}']}.conv.unit0.conv.weight"]) for n in range(5))


def from_official(state_dict: dict[str, Tensor], preset: str | None = None, ct_weight: float | str = 0.1) -> tuple[MirrorUNet, dict]:
    """Build the fitting MirrorUNet (norm="batch", eval mode) from a state dict of the authors' release.

    Names and shapes tell version, preset, share set and widths. Two things they do not tell can be said: `preset`, as a brain
    v1 and a PET/CT v4 have the same tensors (default: PET/CT), and v4's `ct_weight`, which the release keeps on its command line
    (0.1; "learnable" takes the file's `learnable_th`).

    Returns (model, report). report: version, preset, share, channels, "used" {official name: our names}, "left_over" (only the
    release's `learnable_th`, which it does not use unless asked). Raises ValueError for anything that matches no Mirror U-Net.
    """
    state = {k.removeprefix("module."): v for k, v in state_dict.items()}
    version = "v3" if "fc.1.weight" in state else "v2" if "dec.0.0.conv.weight" in state else None
    top = state.get("up_1.0.0.conv.bias")
    two_class = top is not None and len(top) == 2  # branch 1 segments
    preset = preset or ("brain" if version == "v2" and two_class else "petct")
    version = version or ("v4" if two_class and preset == "petct" else "v1")
    given = set(state) - {"learnable_th"}
    closest, fits = None, []
    for share, finest_first in product(_candidate_shares(state), (True, False)):
        prefixes = _official_prefixes(version, share, finest_first)
        try:
            channels = _read_channels(state, prefixes)
            with torch.device("meta"):
                net = MirrorUNet(version, share, channels, norm="batch", preset=preset, ct_weight=ct_weight)
        except (KeyError, ValueError):
            continue
        names = {ours: _official_name(ours, prefixes) for ours in net.state_dict() if ours != "ct_weight"}
        wrong = given ^ set(names.values())
        shapes = net.state_dict()
        wrong |= {o for n, o in names.items() if o in state and state[o].shape != shapes[n].shape}
        if not wrong and share not in [s for s, *_ in fits]:
            fits.append((share, channels, names))
        if closest is None or len(wrong) < len(closest):
            closest = wrong
    if len(fits) != 1:
        why = "levels 1 to 5 are not all there"
        if fits:
            why = f"more than one share set fits: {[s for s, *_ in fits]}"
        elif closest:
            why = f"these names or shapes do not match, at best: {sorted(closest)[:8]}"
        raise ValueError(f"not the weights of an official Mirror U-Net (taken for {preset} {version}): {why}")
    share, channels, names = fits[0]
    if ct_weight == "learnable" and version == "v4" and "learnable_th" not in state:
        raise ValueError("ct_weight='learnable' takes the file's `learnable_th`, and it has none")
    net = MirrorUNet(version, share, channels, norm="batch", preset=preset, ct_weight=ct_weight)
    filled = {ours: state[official] for ours, official in names.items()}
    if version == "v4":
        filled["ct_weight"] = state["learnable_th"].reshape(()) if ct_weight == "learnable" else net.ct_weight
    net.load_state_dict(filled)
    used: dict[str, list[str]] = {}
    for ours, official in names.items():
        used.setdefault(official, []).append(ours)
    left = [] if ct_weight == "learnable" and version == "v4" else sorted(set(state) - set(used))
    return net.eval(), dict(version=version, preset=preset, share=share, channels=channels, used=used, left_over=left)
