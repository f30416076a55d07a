"""What a run is: every option of training, and the network, targets and preprocessing it means.

One `Config` serves training, prediction and checkpoints. Each option is a field with its default,
its help text and its allowed values; the command line, the checks and the reading of other people's
files all use these. A preset is a bundle of options; each --data has a laptop-sized one by default.
"""

import contextlib
import dataclasses
import hashlib
import json
import typing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import baselines
import options
from data import Preprocessing
from device import choose_device
from files import UserError, writing
from mirror_unet import TASKS, MirrorUNet
from options import Parser, add_option, as_argument, check_value, choice, number, option, show
from patches import Augmentation
from phantom import Harder

# Publications that come with their own optimizer: it is the default of their networks.
OPTIMIZERS: dict[str, dict[str, typing.Any]] = {
    "nnunet": dict(optimizer="sgd", lr=1e-2, weight_decay=3e-5, schedule="poly"),
    "blackbean": dict(optimizer="sgd", lr=1e-4, weight_decay=1e-3, schedule="poly"),
}


@dataclass
class Config:
    """One run. Written to config.json and into every checkpoint."""

    # data
    data: str = choice("phantom petct brain phantom-brain", "layouts: see docs/data.md")
    root: str = option("", "folder of the studies; the phantoms need none")
    patient_regex: str = option("", "what it matches in a study's name is the patient")
    label_values: tuple[int, ...] = number(
        (), -(2**15), 2**16, "PET/CT: values in the truth that are tumor, and no others; default: 1"
    )
    label_nonzero: bool = option(False, "PET/CT: all values in the truth but 0 are tumor")
    cache: str = option("cache", "folder for preprocessed studies")
    phantoms: int = number(100, 1, 100_000, "number of phantom studies")
    phantom_uptake: int = number(0, 0, 50, "PET/CT phantom: benign foci that only CT explains")
    phantom_noise: float = number(1.0, 0, 100, "PET/CT phantom: factor of the noise in PET")
    phantom_breathing: float = number(0.0, 0, 60, "PET/CT phantom: mm, between CT and PET")
    spacing: tuple[float, ...] = number(
        (2.0, 2.0, 3.0), 0.1, 100, "mm, of the network's grid", count=3
    )
    ct_window: tuple[float, ...] = option((-100.0, 250.0), "HU that become 0 and 1", count=2)
    suv_window: tuple[float, ...] = option((0.0, 15.0), "SUV that become 0 and 1", count=2)
    negatives: bool = option(True, "keep studies without tumor", was="healthy")
    splits: str = option("", "JSON file of folds; default: ROOT/splits_final.json, or by patient")
    folds: int = number(5, 2, 1000, "number of folds if there is no --splits")
    fold: int = number(0, -1, 1000, "the fold that is held out; all (or -1): a run for each")
    # patches
    patch: tuple[int, ...] = number((96, 96, 96), 1, 1024, "voxels, multiples of 16", count=3)
    batch: int = number(2, 1, 4096, "patches per step; with torchrun: per process")
    patches_per_case: int = number(
        4, 1, 10_000, "consecutive patches from one study", was="per_case"
    )
    foreground_fraction: float = number(
        2 / 3, 0, 1, "probability of a patch centered on tumor", was="positive"
    )
    flip: float = number(0.5, 0, 1, "probability of mirroring, per axis")
    flip_axes: tuple[int, ...] = option(
        (0, 1, 2), "axes that are mirrored; 0 is left-right", choices=(0, 1, 2)
    )
    rotate: float = number(0.0, 0, 1, "probability of a rotation by up to 30 degrees")
    scale: float = number(0.0, 0, 1, "probability of scaling by up to 20 %")
    intensity: float = number(0.0, 0, 1, "probability of a gain and shift up to 0.1, per channel")
    gamma: float = number(0.0, 0, 1, "probability of an exponent from 1/2 to 2, per channel")
    # model
    model: str = option("v3", f"v1, v2, v3, v4, or a baseline: {', '.join(baselines.ALL)}")
    tasks: str = choice("v1 v2 v3 none", "joint: the version whose tasks it has")
    skips: str = choice("pet both drop gated", "joint: whose skips the segmentation takes; ideas")
    anneal: bool = option(False, "let the weight of the reconstruction fall to 0 over the run")
    share: tuple[int, ...] = option(
        (5,), "levels whose weights both branches share; may be empty", choices=(3, 4, 5, 6, 7)
    )
    channels: tuple[int, ...] = number(
        (16, 32, 64, 128, 256), 1, 4096,
        "widths of levels 1-5; nnunet, blackbean, segresnet start at twice the first", count=5,
    )
    norm: str = choice("instance batch", "nnunet, blackbean and segresnet have their own")
    free_outputs: bool = option(
        True, "no instance norm at the decoders' outputs, which could then take few values",
        before=False,
    )
    classifier: str = choice(
        "- cells release", "of v3: judges each cell of 16^3 voxels, or flattens the bottleneck; "
        "default: the release's with batch norm, else cells", before="release",
    )
    ct_weight: str = option("0.1", "v4: weight of the CT logits, a number or 'learnable'")
    # self-supervision and loss
    corrupt: str = choice("- none noise shuffle", "of the CT; default: shuffle if it is rebuilt")
    cube: int = number(16, 1, 1024, "side of a shuffled cube, voxels")
    cubes: int = number(1, 1, 10_000, "shuffled cubes per patch")
    sigma: float = number(0.3, 0, 1e6, "standard deviation of the noise, in CT windows")
    lambda_seg: float = number(0.5, 0, 1e6, "weight of Dice + CE in v1-v3, multitask, joint")
    lambda_rec: float = number(1e-3, 0, 1e6, "weight of the reconstruction there and in v2-rec")
    lambda_cls: float = number(1e-2, 0, 1e6, "weight of the classification in v3")
    # optimization
    steps: int = number(10_000, 1, 10**9, "training steps")
    minutes: float = number(0.0, 0, 1e6, "stop the steps after this time at the latest; 0: never")
    optimizer: str = choice("adam adamw sgd", "sgd: Nesterov momentum 0.99")
    lr: float = number(1e-3, 0, 1e6, "initial learning rate")
    weight_decay: float = number(1e-5, 0, 1e6, "weight decay of the optimizer")
    schedule: str = choice(
        "cosine poly step constant", "cosine to 0; poly: (1 - t)^0.9; step: x 0.1 at 5/8 of the run"
    )
    clip: float = number(12.0, 0, 1e9, "largest gradient norm; 0: no clipping")
    skip_nonfinite: bool = option(False, "leave out, and count, steps whose loss is not finite")
    ema: float = number(0.0, 0, 0.999999, "decay of the averaged weights, which are saved; 0: off")
    seed: int = number(0, 0, 2**31 - 1, "seed of everything random")
    # machine
    device: str = choice("auto cpu cuda", "where it runs")
    amp: str = choice("off bf16 fp16", "mixed precision; fp16 on CUDA only")
    compile: bool = option(False, "torch.compile the network")
    graph: bool = option(False, "on CUDA: replay the step as a CUDA graph, see graph.py")
    channels_last: bool = option(True, "channels_last_3d memory layout")
    workers: int = number(-1, -1, 1024, "to preprocess and to load; -1: on CPU, none to load")
    kernels: str = choice("- auto triton plain", "default MIRROR_UNET_KERNELS, else auto")
    # validation
    validations: int = number(5, 1, 10**6, "how many times, the last time at the end")
    overlap: float = number(0.5, 0, 0.9, "overlap of sliding windows")
    threshold: float = number(
        0.5, 0, 1, "probability from which a voxel is tumor; best: half the expected Dice"
    )
    flips: bool = option(True, "in the last validation, average over mirror images")
    # run folder
    out: str = option("", "run folder; default runs/DATA-MODEL-foldK, numbered if it exists")
    checkpoint_minutes: float = number(
        1.0, 0, 1e6, "time between two writings of last.pt; 0: after every step"
    )
    overwrite: bool = option(False, "replace a run folder that exists")
    resume: bool = option(False, "continue the run in --out; start it if there is none yet")
    accept_changes: bool = option(False, "resume with other studies: scores may be too good")

    # ------------------------------------------------------------------------------- what it means
    @property
    def task(self) -> str:
        """The kind of study: "petct" or "brain"."""
        return "brain" if self.data in ("brain", "phantom-brain") else "petct"

    @property
    def network_tasks(self) -> tuple[str, ...]:
        """The names of what the network learns, as in `mirror_unet.TASKS`."""
        if self.model in TASKS[self.task]:
            return TASKS[self.task][self.model]
        return baselines.tasks_of(self.model, self.task, self.tasks)

    @property
    def harder(self) -> Harder:
        """What makes the PET/CT phantom harder."""
        return Harder(self.phantom_uptake, self.phantom_noise, self.phantom_breathing)

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of what is segmented, in the order of `predict.foreground_probability`."""
        if self.task == "petct":
            return ("seg",)
        return tuple(t for t in ("core", "whole", "edema") if t in self.network_tasks)

    @property
    def label_codes(self) -> tuple[int | None, ...]:
        """The label_values of `data.find_cases`."""
        return (None,) if self.label_nonzero else self.label_values

    @property
    def preprocessing(self) -> Preprocessing:
        """How a study becomes the network's input."""
        if self.task == "brain":
            return Preprocessing("brain", self.spacing, "RAS")
        return Preprocessing("petct", self.spacing, "LAS", self.ct_window, self.suv_window)

    @property
    def augmentation(self) -> Augmentation:
        """How patches are varied."""
        return Augmentation(
            self.flip, self.flip_axes, self.rotate,
            scale=self.scale, intensity=self.intensity, gamma=self.gamma,
        )

    def build_model(self) -> nn.Module:
        """The network, freshly initialized from PyTorch's random state. Raises ValueError."""
        everywhere = self.norm == "instance" and not self.free_outputs
        norm = "instance_everywhere" if everywhere else self.norm
        if self.model in TASKS[self.task]:
            learnable = self.ct_weight == "learnable"
            weight = self.ct_weight if learnable else float(self.ct_weight)
            return MirrorUNet(
                self.model, self.share, self.channels, norm, self.task, weight, self.classifier
            )
        return baselines.build(
            self.model, self.task, self.channels, norm, self.share,
            self.tasks, self.skips, self.patch, self.spacing, self.classifier,
        )

    @property
    def random_seed(self) -> int:
        """The seed of initial weights, patches and noise: of (seed, fold, system).

        So no two systems of a comparison start from the same weights, and none has an easier fold
        by the luck of one draw.
        """
        values = [self.seed, self.fold, *(getattr(self, name) for name in SYSTEM)]
        return int.from_bytes(hashlib.sha256(json.dumps(values).encode()).digest()[:4]) >> 1

    # --------------------------------------------------------------------------------- in and out
    def to_dict(self) -> dict:
        """What JSON and checkpoints hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values, source) -> "Config":
        """A config that was saved, perhaps by an older version; `source` names the file in errors.

        Options that came later get their defaults. Raises UserError for unknown names and for
        values that no option allows.
        """
        if not isinstance(values, dict):
            raise UserError(f"{source}: expected the options of a run by name, got {values!r:.80}")
        renamed = {f.metadata["was"]: f.name for f in FIELDS.values() if f.metadata["was"]}
        values = {renamed.get(name, name): value for name, value in values.items()}
        unknown = sorted(set(map(str, values)) - set(FIELDS))
        if unknown:
            names = f"{unknown[:5]!r:.200}"
            raise UserError(f"{source}: unknown options {names}; written by another version?")
        before = {f.name: f.metadata["before"] for f in FIELDS.values()}
        checked: dict[str, typing.Any] = {k: v for k, v in before.items() if v is not None}
        for name, value in values.items():
            try:
                checked[str(name)] = check_value(FIELDS[str(name)], value)
            except ValueError as e:
                raise UserError(f"{source}: option {name}: {e}") from None
        return cls(**checked)

    def differences(self) -> str:
        """The preset that is closest to this config, and the options that differ from it."""
        own = ("out", "device", "resume", "overwrite", "corrupt")  # of a run, not of a preset
        found = {}
        for preset, values in PRESETS.items():
            base = Config(**values)
            names = [n for n in FIELDS if getattr(base, n) != getattr(self, n) and n not in own]
            found[preset] = [as_argument(n, getattr(self, n)) for n in names]
        closest = min(found, key=lambda preset: len(found[preset]))
        return f"preset {closest}" + "".join(f" {words}" for words in found[closest])


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
# What makes a system of the comparison: its network and what it learns.
SYSTEM = (
    "model", "tasks", "skips", "share", "channels", "norm", "free_outputs", "classifier",
    "ct_weight", "corrupt",
)
GROUPS = {  # group of options in --help: its first option
    "data": "data", "patches": "patch", "model": "model", "self-supervision and loss": "corrupt",
    "optimization": "steps", "machine": "device", "validation": "validations", "run folder": "out",
}

LAPTOP: dict[str, typing.Any] = dict(
    batch=2, patches_per_case=1, steps=100_000, intensity=0.3, ema=0.99, optimizer="adamw",
    channels=(8, 16, 32, 64, 128),
)
PRESETS: dict[str, dict[str, typing.Any]] = {
    "phantom": LAPTOP | dict(
        spacing=(6.0, 6.0, 6.0), patch=(48, 48, 64), batch=4, steps=700, lr=2e-3, flip_axes=(0,),
        validations=3,
    ),
    "petct": LAPTOP | dict(
        data="petct", spacing=(4.0, 4.0, 4.0), suv_window=(0.0, 5.0), patch=(64, 64, 64),
        minutes=12.0, weight_decay=0.05, rotate=0.5, scale=0.5, intensity=0.5, gamma=0.5,
        threshold=0.35, ema=0.995,
    ),
    "brain": LAPTOP | dict(
        data="brain", model="v2", spacing=(2.0, 2.0, 2.0), patch=(64, 64, 64), minutes=10.0,
    ),
    "autopet": dict(  # 400 epochs
        data="petct", spacing=(2.0, 2.0, 3.0), patch=(96, 96, 96), batch=4, rotate=0.2, scale=0.2,
        schedule="step", steps=320_000, validations=40,
    ),
    "brats": dict(
        data="brain", model="v2", spacing=(1.0, 1.0, 1.0), patch=(224, 224, 144), batch=1,
        patches_per_case=1, intensity=1.0, schedule="step", steps=150_000, validations=40,
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------ checks
def check(c: Config) -> None:
    """Refuse options that exclude each other, fill in those that depend on others: UserError."""
    if c.model != "joint" and (c.tasks, c.skips) != ("v1", "pet"):
        given = f"--tasks {c.tasks} --skips {c.skips}"
        raise UserError(f"{given}: these are options of --model joint, not of {c.model}")
    reconstructs = "ct" in c.network_tasks
    if c.corrupt in ("noise", "shuffle") and not reconstructs:
        problem = f"--corrupt {c.corrupt}: {c.task} {c.model} reconstructs no CT"
        raise UserError(f"{problem}; leave it out, or use v1, v2 or v3 on PET/CT")
    c.corrupt = c.corrupt or ("shuffle" if reconstructs else "none")
    if c.data != "phantom" and str(c.harder):
        given = str(c.harder).replace(", ", " --phantom-")
        raise UserError(f"--phantom-{given}: for --data phantom, not for {c.data}")
    if c.data in ("petct", "brain") and not c.root:
        raise UserError(f"--data {c.data} needs --root, the folder of the studies")
    if c.ct_weight != "learnable":
        try:
            ok = 0 <= float(c.ct_weight) <= 1
        except ValueError:
            ok = False
        if not ok:
            raise UserError(f"--ct-weight {c.ct_weight}: give a number from 0 to 1, or learnable")


# -------------------------------------------------------------------------------- the command line
def build_parser(description: str) -> Parser:
    """An option per field, grouped; the help shows the values of the laptop presets."""
    parser = Parser(description=description, usage="%(prog)s [options]")
    parser.add_argument(
        "--preset", choices=list(PRESETS),
        help="values for many options: phantom, petct and brain are laptop-sized and the default "
        "of each --data; autopet and brats are the paper's recipes",
    )
    starts = {first: title for title, first in GROUPS.items()}
    group = parser
    for f in FIELDS.values():
        if f.name in starts:
            group = parser.add_argument_group(starts[f.name])
        kind = options.fold_or_all if f.name == "fold" else None
        add_option(group, f, f.metadata["help"] + defaults_of(f), kind)
    return parser


def defaults_of(f: dataclasses.Field) -> str:
    """A field's value in each of the laptop presets, in parentheses, for the help."""
    values = {name: PRESETS[name].get(f.name, f.default) for name in ("phantom", "petct", "brain")}
    if f.name == "data" or len(set(map(str, values.values()))) == 1:
        return f" ({show(values['phantom'])})" if values["phantom"] != "" else ""
    return f" ({', '.join(f'{name} {show(value)}' for name, value in values.items())})"


def parse_config(argv: list[str], description: str = "") -> Config:
    """Command line -> Config: defaults < preset < the model's optimizer < options.

    With --resume the run's own config takes the place of the first three. A --steps without
    --minutes lifts the preset's time limit, and --minutes without --steps the phantom preset's
    number of steps. Raises UserError.
    """
    given = vars(build_parser(description).parse_args(argv))
    preset = given.pop("preset") or given.get("data", "phantom").removeprefix("phantom-")
    path = Path(given.get("out", "")) / "config.json"
    with writing(path):  # a name that is too long, a folder that may not be read
        path.exists()
    for name, value in given.items():
        try:
            given[name] = check_value(FIELDS[name], value)
        except ValueError as e:
            raise UserError(f"--{name.replace('_', '-')} {e}") from None
    started = any(path.with_name(n).exists() for n in ("config.json", "last.pt", "best.pt"))
    if given.get("resume") and (started or set(given) <= {"out", "resume"}):
        base = dataclasses.replace(read_config(path), accept_changes=False, overwrite=False)
    else:
        values = PRESETS[preset] | OPTIMIZERS.get(given.get("model", ""), {})
        if "minutes" in given:  # the time is the budget, not the few steps of a laptop-sized run
            values["steps"] = max(values["steps"], LAPTOP["steps"])
        base = Config(**values)
    if "steps" in given:
        given.setdefault("minutes", 0.0)
    c = dataclasses.replace(base, **given)
    check(c)
    choose_device(c)
    return c


def read_config(path: Path) -> Config:
    """The config of an earlier run, or that of its last.pt. Raises UserError if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        for name in ("last.pt", "best.pt"):
            with contextlib.suppress(Exception):  # torch, pickle and zip have their own
                values = torch.load(path.with_name(name), "meta", weights_only=True)["config"]
                break
        else:
            why = type(e).__name__
            raise UserError(f"{path}: no run to resume here ({why}); name it with --out") from None
    return Config.from_dict(values, path)
