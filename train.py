"""Train a Mirror U-Net:  python train.py --data phantom|petct|brain [--root DIR] --model v3 [--corrupt shuffle] [--fold 0] ...

Files -> cache -> fold -> patches -> steps -> validation on the original grid -> a run folder with config.json, metrics.jsonl,
last.pt, best.pt, curves.png, validation.png and validation.csv. Without options: the phantom, v3, a few minutes on a laptop.

Every option is a field of `Config`; `--preset` fills in a preprocessing, options given beside it win. On several GPUs: torchrun
--nproc_per_node=N train.py ... (`parallel.py`). A run that was killed, at whatever moment, goes on with --resume exactly where it was.
"""

import os

# Waiting OpenMP threads shall soon sleep: spinning on (the default) makes a step 5 x slower once anything else runs on one of two cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import copy
import dataclasses
import hashlib
import io
import json
import math
import signal
import subprocess
import time
import typing
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import baselines
import data
import figures
import kernels
import parallel
import phantom
from data import Augmentation
from files import Interrupts, UserError, atomic_write, clean_parts, program, writing
from metrics import mean_of, patient_metrics, print_table, write_table
from predict import (
    autocast,
    evaluate,
    kind_of,
    load_checkpoint,
    model_of,
    predict_image,
    recipe_of,
    reconstructions,
    suv_threshold,
    targets_of,
    to_masks,
    truth_of,
)  # fmt: skip


def opt(default, help: str):
    """A config field: its default, and its unit or reason, which is also its --help text."""
    return field(default_factory=lambda: default, metadata={"help": help})


@dataclass
class Config:
    """One run. Written to config.json and into every checkpoint."""

    # data
    data: str = opt("phantom", "phantom | petct (AutoPET layout) | brain (MSD Task01 layout) | phantom-brain")
    root: str = opt("", "folder of the studies; the phantoms need none")
    cache: str = opt("cache", "folder for preprocessed studies")
    phantoms: int = opt(100, "number of phantom studies")
    spacing: tuple[float, ...] = opt((2.0, 2.0, 3.0), "mm, of the network's grid")
    ct_window: tuple[float, ...] = opt((-100.0, 250.0), "HU that become 0 and 1")
    suv_window: tuple[float, ...] = opt((0.0, 15.0), "SUV that become 0 and 1")
    healthy: bool = opt(True, "keep the patients without a tumor")
    splits: str = opt("", "JSON file of folds in nnU-Net's form; default: made by patient, stratified")
    folds: int = opt(5, "number of folds made when there is no --splits")
    fold: int = opt(0, "the fold that is held out")
    # patches
    patch: tuple[int, ...] = opt((96, 96, 96), "voxels, multiples of 16; nnunet is planned for them")
    batch: int = opt(2, "patches a step; with torchrun: a process")
    patches_per_case: int = opt(4, "patches in a row from one study")
    foreground_fraction: float = opt(2 / 3, "probability of a patch centred on tumor")
    flip: float = opt(0.5, "probability of mirroring, an axis")
    flip_axes: tuple[int, ...] = opt((0, 1, 2), "axes that are mirrored; 0 is left-right")
    rotate: float = opt(0.0, "probability of a rotation by up to 30 degrees")
    scale: float = opt(0.0, "probability of scaling by up to 20 %")
    intensity: float = opt(0.0, "probability of a gain and shift of up to 0.1, a channel")
    gamma: float = opt(0.0, "probability of an exponent between 1/2 and 2, a channel")
    # model
    model: str = opt("v3", "v1 | v2 | v3 | v4 | another system of the comparison: " + " | ".join(baselines.ALL))
    tasks: str = opt("v1", "joint: the tasks of v1 | v2 | v3, or none beside segmentation")
    skips: str = opt("pet", "joint: whose encoder's skips the segmentation takes, pet | both")
    share: tuple[int, ...] = opt((5,), "levels 3..7 whose weights both branches share; no number: none")
    channels: tuple[int, ...] = opt(
        (16, 32, 64, 128, 256), "widths of levels 1-5; nnunet, blackbean and segresnet start at twice the first"
    )
    norm: str = opt("instance", "instance | batch, of every network but nnunet, blackbean and segresnet, which have their own")
    ct_weight: str = opt("0.1", "v4: weight of the CT logits, a number or 'learnable'")
    # self-supervision and loss
    corrupt: str = opt(
        "", "none | noise | shuffle, of the CT to be reconstructed; default shuffle where there is one (v1-v3, multitask, joint)"
    )
    cube: int = opt(16, "side of a shuffled cube, voxels")
    cubes: int = opt(1, "shuffled cubes a patch")
    sigma: float = opt(0.3, "standard deviation of the noise, in units of the CT window")
    lambda_seg: float = opt(0.5, "weight of Dice + CE in v1-v3, multitask, joint")
    lambda_rec: float = opt(1e-3, "weight of the reconstruction in v1-v3, multitask, joint, v2-rec")
    lambda_cls: float = opt(1e-2, "weight of the classification in v3")
    # optimisation
    steps: int = opt(10_000, "training steps")
    minutes: float = opt(0.0, "stop the steps after this time, whichever comes first; 0: no limit")
    optimizer: str = opt("adam", "adam | adamw | sgd (Nesterov momentum 0.99)")
    lr: float = opt(1e-3, "initial learning rate")
    weight_decay: float = opt(1e-5, "")
    schedule: str = opt("cosine", "cosine (to 0) | poly ((1 - t)^0.9) | step (x 0.1 at 5/8 of the run) | constant")
    clip: float = opt(12.0, "largest gradient norm; 0: no clipping")
    ema: float = opt(0.0, "decay of the running mean of the weights that is validated and saved; 0: the weights themselves")
    seed: int = opt(0, "of everything random")
    # machine
    device: str = opt("auto", "auto | cpu | cuda")
    amp: str = opt("off", "off | bf16 | fp16 (CUDA only, with a loss scaler)")
    compile: bool = opt(False, "torch.compile the network")
    channels_last: bool = opt(True, "channels_last_3d memory layout")
    workers: int = opt(-1, "loader processes; -1: none on CPU, up to 8 on CUDA")
    kernels: str = opt("", "auto | triton | plain: who computes losses, norms and shuffles; default MIRROR_UNET_KERNELS, else auto")
    # validation
    validations: int = opt(5, "how often a run is validated, the last time at its end")
    overlap: float = opt(0.5, "of sliding windows")
    threshold: float = opt(0.5, "probability from which a voxel is tumor; the best for Dice is half the Dice one can expect")
    flips: bool = opt(True, "average over the mirror images along --flip-axes in the last validation")
    # the run folder
    out: str = opt("", "run folder; default runs/DATA-MODEL-foldK, numbered where it exists")
    checkpoint_minutes: float = opt(1.0, "between two writings of last.pt; 0: after every step")
    overwrite: bool = opt(False, "replace a run folder that exists")
    resume: bool = opt(False, "go on with the run in --out; with a run's other options beside it, start it where there is none")

    @property
    def kind(self) -> str:
        return kind_of(self.data)


LAPTOP = dict(batch=2, patches_per_case=1, steps=100_000, intensity=0.3, ema=0.99, optimizer="adamw")
PRESETS: dict[str, dict] = {
    # laptop-sized, the default of each --data
    "phantom": LAPTOP | dict(
        spacing=(6.0, 6.0, 6.0), patch=(48, 48, 64), channels=(8, 16, 32, 64, 128), batch=4, steps=700, lr=2e-3, flip_axes=(0,),
        threshold=0.4, validations=3,
    ),
    "petct": LAPTOP | dict(
        spacing=(4.0, 4.0, 4.0), suv_window=(0.0, 5.0), patch=(64, 64, 64), channels=(8, 16, 32, 64, 128), minutes=12.0, weight_decay=0.05,
        rotate=0.5, scale=0.5, intensity=0.5, gamma=0.5, threshold=0.35, ema=0.995,
    ),
    "brain": LAPTOP | dict(model="v2", spacing=(2.0, 2.0, 2.0), patch=(64, 64, 64), channels=(8, 16, 32, 64, 128), minutes=10.0),
    # the paper's: 400 epochs
    "autopet": dict(
        data="petct", spacing=(2.0, 2.0, 3.0), patch=(96, 96, 96), batch=4, patches_per_case=4, rotate=0.2, scale=0.2, optimizer="adam", lr=1e-3,
        weight_decay=1e-5, schedule="step", steps=320_000, validations=40,
    ),
    "brats": dict(
        data="brain", model="v2", spacing=(1.0, 1.0, 1.0), patch=(224, 224, 144), batch=1, patches_per_case=1, intensity=1.0,
        optimizer="adam", lr=1e-3, weight_decay=1e-5, schedule="step", steps=150_000, validations=40,
    ),
}  # fmt: skip


def parse_config(argv: list[str]) -> Config:
    """Command line -> Config: defaults < preset < the model's own preprocessing (--resume: the run's own config in their place) < options.

    A --steps without --minutes lifts the preset's time limit, and --minutes without --steps the phantom preset's number of steps.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="phantom, petct, brain: laptop-sized, each the default of its --data; autopet, brats: the paper's",
    )
    for f in dataclasses.fields(Config):
        name, default = f"--{f.name.replace('_', '-')}", f.default_factory()
        text = f"{f.metadata['help']} ({default if default != '' else 'none'})".replace("%", "%%")
        if f.type is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        elif isinstance(default, tuple):
            kind = typing.get_args(f.type)[0]
            parser.add_argument(name, type=kind, nargs="*", default=argparse.SUPPRESS, help=text, metavar="N")
        else:
            parser.add_argument(name, type=f.type, default=argparse.SUPPRESS, help=text, metavar=f.type.__name__.upper())
    given = vars(parser.parse_args(argv))
    source = given.get("data", "phantom")
    preset = given.pop("preset") or source.removeprefix("phantom-")
    path = Path(given.get("out", "")) / "config.json"
    if given.get("resume") and (path.exists() or set(given) <= {"out", "resume"}):
        base = read_config(path)
    elif preset in PRESETS:
        base = PRESETS[preset] | baselines.RECIPES.get(given.get("model", PRESETS[preset].get("model", "")), {})
        if "minutes" in given:  # they are the budget, then, and not the few steps of a laptop-sized run
            base["steps"] = max(base["steps"], LAPTOP["steps"])
    else:
        raise UserError(f"--data {source}: use phantom, petct, brain or phantom-brain")
    if "steps" in given:
        given.setdefault("minutes", 0.0)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in (base | given).items()}
    config = Config(**values)
    check_config(config)
    return config


def read_config(path: Path) -> dict:
    """The config of an earlier run. Raises UserError where there is none or it names options that do not exist."""
    try:
        values = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise UserError(f"{path}: no run to resume here ({type(e).__name__}); say which with --out") from None
    unknown = set(values) - {f.name for f in dataclasses.fields(Config)}
    if unknown:
        raise UserError(f"{path}: unknown options {sorted(unknown)}; written by another version?")
    return values


def check_config(c: Config) -> None:
    """Fill in what depends on the rest, and refuse what can't work, in a sentence that says what would."""
    choices = {
        "data": ("phantom", "petct", "brain", "phantom-brain"), "optimizer": ("adam", "adamw", "sgd"),
        "norm": ("instance", "batch"), "tasks": ("v1", "v2", "v3", "none"), "skips": ("pet", "both"),
        "schedule": ("cosine", "poly", "step", "constant"), "amp": ("off", "bf16", "fp16"),
        "corrupt": ("", "none", "noise", "shuffle"), "device": ("auto", "cpu", "cuda"), "kernels": ("", *kernels.CHOICES),
    }  # fmt: skip
    for name, allowed in choices.items():
        if getattr(c, name) not in allowed:
            raise UserError(f"--{name.replace('_', '-')} {getattr(c, name)}: use one of {', '.join(a for a in allowed if a)}")
    for name in ("batch", "steps", "patches_per_case", "validations", "folds", "phantoms"):
        if getattr(c, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(c, name)}: give 1 or more")
    if not 0 <= c.overlap <= 0.9:
        raise UserError(f"--overlap {c.overlap}: give a share between 0 and 0.9")
    if c.model != "joint" and (c.tasks, c.skips) != ("v1", "pet"):
        raise UserError(f"--tasks {c.tasks} --skips {c.skips}: these two are options of --model joint, not of {c.model}")
    reconstructs = c.kind == "petct" and baselines.version_of(c.model, c.tasks) != "v4"
    if c.corrupt in ("noise", "shuffle") and not reconstructs:
        raise UserError(f"--corrupt {c.corrupt}: {c.kind} {c.model} reconstructs no CT; leave it out, or use v1, v2 or v3 on PET/CT")
    c.corrupt = c.corrupt or ("shuffle" if reconstructs else "none")
    if c.data in ("petct", "brain") and not c.root:
        raise UserError(f"--data {c.data} needs --root, the folder of the studies (--data phantom needs none)")
    for name, n in {"patch": 3, "spacing": 3, "ct_window": 2, "suv_window": 2}.items():
        if len(getattr(c, name)) != n:
            raise UserError(f"--{name.replace('_', '-')} takes {n} numbers, got {getattr(c, name)}")
    if c.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device cpu, or install a CUDA build of PyTorch")
    c.device = c.device if c.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kernels.use(c.kernels)
    except ValueError as e:
        raise UserError(f"--kernels {c.kernels}: {e}") from None
    if c.kernels == "triton" and c.device == "cpu" and not kernels.INTERPRETED:
        raise UserError("--kernels triton --device cpu: Triton kernels run on a GPU; use --device cuda, or --kernels plain")
    if c.amp == "fp16" and c.device == "cpu":
        raise UserError("--amp fp16 needs a CUDA device; on CPU use --amp bf16 or off")
    if c.amp == "bf16" and c.device == "cpu" and c.patch[0] == 32:
        # Found in PyTorch 2.13: the CPU's bfloat16 weight gradient of a 3^3 convolution on (2, *, *) voxels reads memory nobody wrote.
        raise UserError("--amp bf16 on a CPU needs a --patch whose first side is not 32, which meets a bug of PyTorch's convolution")


# ------------------------------------------------------------------------------------------------------- data and model
def load_cases(c: Config) -> tuple[list[data.CachedCase], list[data.CachedCase]]:
    """Find, preprocess and split the studies: (training, validation) of the fold."""
    if not c.data.startswith("phantom") and not Path(c.root).is_dir():
        raise UserError(f"--root {c.root}: no such folder")
    root = Path(c.root)
    if c.data.startswith("phantom"):
        write = phantom.write_brain if c.kind == "brain" else phantom.write_petct
        root = root if c.root else Path(c.cache) / f"{c.data}-{c.phantoms}-{'x'.join(f'{s:g}' for s in c.spacing)}mm"
        write(root, c.phantoms, spacing=c.spacing)  # on the network's grid: nothing to resample
    preprocessing = recipe_of(dataclasses.asdict(c))
    cases = data.build_cache(data.find_petct(root) if c.kind == "petct" else data.find_brain(root), preprocessing, c.cache)
    if len(cases) == 1:
        say("one study only: it is trained on and validated on, so the table says nothing about other patients")
        return cases, cases
    splits = data.read_splits(c.splits, cases) if c.splits else data.make_folds(cases, min(c.folds, len({k.patient for k in cases})))
    if not 0 <= c.fold < len(splits):
        raise UserError(f"--fold {c.fold}: there are folds 0 to {len(splits) - 1}")
    kept = [k for k in cases if k.tumor or c.healthy]
    sides = (set(splits[c.fold][side]) for side in ("train", "val"))
    train, val = ([k for k in kept if k.name in names] for names in sides)
    if not train or not val:
        raise UserError(f"--fold {c.fold}: {len(train)} studies to train on and {len(val)} held out; each side needs one")
    return train, val


def say(*words) -> None:
    """Print, once however many processes there are."""
    if parallel.rank() == 0:
        tqdm.write(" ".join(map(str, words)))


def build_model(c: Config) -> nn.Module:
    """The network that a config names, freshly initialised from its seed."""
    torch.manual_seed(c.seed)
    try:
        net = model_of(dataclasses.asdict(c))
        net.check_input((c.batch, 2, *c.patch))
        return net
    except ValueError as e:
        raise UserError(f"--model {c.model} --patch {' '.join(map(str, c.patch))}: {e}") from None


def build_optimizer(c: Config, net: nn.Module) -> torch.optim.Optimizer:
    """Adam, AdamW, or SGD with Nesterov momentum 0.99."""
    if c.optimizer == "sgd":
        return torch.optim.SGD(net.parameters(), c.lr, momentum=0.99, nesterov=True, weight_decay=c.weight_decay, fused=True)
    kind = torch.optim.AdamW if c.optimizer == "adamw" else torch.optim.Adam
    return kind(net.parameters(), c.lr, weight_decay=c.weight_decay, fused=True)


def learning_rate(c: Config, t: float) -> float:
    """The rate at a share t in [0, 1] of the run."""
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * t)), "poly": (1 - t) ** 0.9, "step": 1.0 if t < 0.625 else 0.1, "constant": 1.0}
    return c.lr * factor[c.schedule]


# ------------------------------------------------------------------------------------------------------------- the run
class Run:
    """One training run and its folder. Everything that decides the next step is in `state()`, so a resumed run is the same run."""

    def __init__(self, c: Config, train: list[data.CachedCase], val: list[data.CachedCase]):
        self.c, self.train_cases, self.val_cases = c, train, val
        self.folder = Path(c.out)
        self.device = parallel.start(c.device)
        layout = torch.channels_last_3d if c.channels_last else torch.contiguous_format
        self.net = build_model(c).to(self.device, memory_format=layout)
        self.mean_net = copy.deepcopy(self.net).requires_grad_(False) if c.ema else self.net
        # Parameters and running statistics of both, each tensor once: a shared level would be averaged twice.
        both = ([*n.parameters(), *n.buffers()] for n in (self.mean_net, self.net))
        self.mean_state, self.net_state = ([p.detach() for p in tensors if p.is_floating_point()] for tensors in both)
        forward = parallel.distribute(self.net, self.device)
        self.forward = torch.compile(forward) if c.compile else forward
        self.loss = baselines.SystemLoss(self.net.version, c.kind, c.lambda_seg, c.lambda_rec, c.lambda_cls, sync=parallel.size() > 1)
        self.optimizer = build_optimizer(c, self.net)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=c.amp == "fp16")
        self.step, self.seen, self.seconds, self.best = 0, 0, 0.0, -1.0  # seen: patches; seconds: spent on steps
        self.finished, self.code = False, code_version()
        self.targets = targets_of(dataclasses.asdict(c))
        aug = Augmentation(c.flip, c.flip_axes, c.rotate, scale=c.scale, intensity=c.intensity, gamma=c.gamma)
        self.patches = data.PatchDataset(train, c.patch, c.steps * c.batch * parallel.size(), c.seed, aug, c.foreground_fraction, c.patches_per_case)

    # ------------------------------------------------------------------------------------------------------- checkpoints
    def state(self) -> dict:
        log = self.folder / "metrics.jsonl"
        return {
            "config": dataclasses.asdict(self.c), "code": self.code, "step": self.step, "seen": self.seen, "seconds": self.seconds,
            "best": self.best, "finished": self.finished, "log_bytes": log.stat().st_size if log.exists() else 0,
            "model": self.mean_net.state_dict(), "net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }  # fmt: skip

    def save(self, name: str) -> None:
        """Write a checkpoint, whole or not at all. The schedule needs no state: it is a function of the share of the run that is done."""
        if parallel.rank() == 0:
            buffer = io.BytesIO()  # torch.save has errors of its own for a full disk
            torch.save(self.state(), buffer)
            with atomic_write(self.folder / name) as part:
                part.write_bytes(buffer.getbuffer())

    def resume(self) -> None:
        """Take up last.pt, and cut metrics.jsonl to what it was then; without a last.pt the run begins anew."""
        path, log = self.folder / "last.pt", self.folder / "metrics.jsonl"
        if not path.exists():
            say(f"{path}: none was written before the run was stopped; it starts from the beginning")
            return self.cut_log(0)
        state = load_checkpoint(path, self.device)
        was_config = dataclasses.asdict(Config()) | state["config"]  # an old one lacks options that came later
        for name in ("data", "model", "tasks", "skips", "share", "channels", "norm", "ct_weight", "optimizer"):
            was, now = (tuple(v) if isinstance(v, list) else v for v in (was_config[name], getattr(self.c, name)))
            if was != now:
                raise UserError(
                    f"{path}: of a run with --{name.replace('_', '-')} {was}, not {now}; leave that option out, or give another --out"
                )
        if self.code != state["code"]:
            say(f"note: {path} was written by other code ({state['code']}, this is {self.code}); the losses may differ from here on")
        try:
            self.net.load_state_dict(state["net"])
            self.mean_net.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        except (ValueError, RuntimeError) as e:
            raise UserError(f"{path}: does not fit this version's network: {' '.join(str(e).split())[:160]}") from None
        self.step, self.seen, self.seconds, self.best = state["step"], state["seen"], state["seconds"], state["best"]
        self.finished = state["finished"]
        if not log.exists() or log.stat().st_size < state["log_bytes"]:
            raise UserError(f"{log}: missing or shorter than when {path.name} was written; put it back to go on")
        self.cut_log(state["log_bytes"])

    def cut_log(self, size: int) -> None:
        log = self.folder / "metrics.jsonl"
        if parallel.rank() == 0 and log.exists():
            os.truncate(log, size)

    def log(self, row: dict) -> None:
        path = self.folder / "metrics.jsonl"
        if parallel.rank() == 0:
            with writing(path), open(path, "a") as f:
                f.write(json.dumps(row) + "\n")

    # ---------------------------------------------------------------------------------------------------------- training
    def progress(self) -> float:
        """Share of the run that is done: of its steps, or of its minutes where those run out first."""
        spent = self.seconds / (60 * self.c.minutes) if self.c.minutes else 0.0
        return min(1.0, max(self.step / self.c.steps, spent))

    def train_step(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One step; returns the total loss and its parts."""
        c = self.c
        keys = batch["key"]
        batch = data.make_targets({k: v.to(self.device, non_blocking=True) for k, v in batch.items()}, c.kind)
        x = data.corrupt_ct(batch["image"], c.corrupt, keys, c.cube, c.cubes, c.sigma)
        if c.channels_last:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        lr = learning_rate(c, self.progress())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(hash((c.seed, self.step)) & 0x7FFFFFFF)  # dropout: a function of (seed, step)
        self.net.turn = self.step % 2  # whose turn it is, where the modalities are trained in turns (valindria)
        with autocast(self.device.type, c.amp):
            out = self.forward(x)
        loss, parts = self.loss(out, batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), c.clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if c.ema:
            decay = min(c.ema, (1 + self.step) / (10 + self.step))  # forget the random start quickly
            torch._foreach_lerp_(self.mean_state, self.net_state, 1 - decay)
        numbers = parallel.mean(torch.stack([loss.detach(), *parts.values(), norm]).double())  # one transfer from the GPU
        return dict(zip(["loss", *parts, "grad_norm"], numbers.tolist())) | {"lr": lr}

    def batches(self) -> DataLoader:
        """The batches of this process from `seen` on."""
        c, step = self.c, self.c.batch * parallel.size()
        mine = parallel.rank() * c.batch
        places = [range(i + mine, i + mine + c.batch) for i in range(self.seen, len(self.patches) - step + 1, step)]
        workers = c.workers if c.workers >= 0 else 0 if self.device.type == "cpu" else min(8, os.cpu_count() or 1)
        return DataLoader(
            self.patches, batch_sampler=places, num_workers=workers, pin_memory=self.device.type == "cuda", worker_init_fn=ignore_interrupts
        )

    def train(self) -> None:
        """Step until the budget is used up, validating on the way."""
        c = self.c
        done = int(self.progress() * c.validations)
        saved = time.monotonic()
        style = "{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining} {postfix}"
        bar = tqdm(total=1000, desc="training", bar_format=style, initial=int(1000 * self.progress()), disable=parallel.rank() > 0)
        self.net.train()
        with Interrupts() as interrupts, bar:
            batches = iter(self.batches())
            while self.progress() < 1:
                start = time.monotonic()
                row = self.train_step(next(batches))
                self.step, self.seen = self.step + 1, self.seen + c.batch * parallel.size()
                self.seconds, stopping = parallel.largest(self.seconds + time.monotonic() - start, float(interrupts.asked))
                if not math.isfinite(row["loss"]) and not self.scaler.is_enabled():
                    raise UserError(f"the loss is {row['loss']} at step {self.step}: try a smaller --lr, or --amp off")
                self.log({"step": self.step, "seconds": round(self.seconds, 3), **row})
                bar.update(int(1000 * self.progress()) - bar.n)
                dice = next(v for k, v in row.items() if k.endswith("_dice"))
                bar.set_postfix_str(f"step {self.step}  loss {row['loss']:.3f}  dice loss {dice:.3f}")
                if int(self.progress() * c.validations) > done and self.progress() < 1:
                    done = int(self.progress() * c.validations)
                    self.validate(last=False)
                if stopping or time.monotonic() - saved >= 60 * c.checkpoint_minutes:
                    self.save("last.pt")
                    saved = time.monotonic()
                if stopping:
                    message = f"\nstopped after step {self.step}; go on with: python train.py --resume --out {self.folder}"
                    raise SystemExit(message if parallel.rank() == 0 else 1)
        self.save("last.pt")
        self.validate(last=True)

    # -------------------------------------------------------------------------------------------------------- validation
    def predict(self, case: data.CachedCase, last: bool) -> tuple[np.ndarray, float | None]:
        """Probabilities (K, D, H, W) of a cached study, and v3's score of the patient."""
        c, image = self.c, torch.from_numpy(case.array("image").astype(np.float32)).to(self.device)
        flip_axes = c.flip_axes if last and c.flips else ()
        prob, score = predict_image(self.mean_net, image, c.patch, c.overlap, c.batch, flip_axes, c.amp)
        return prob.cpu().numpy(), score

    def validate(self, last: bool) -> None:
        """Metrics of every held-out case on its original grid; the last time also the table, the csv and the pictures."""
        mine = self.val_cases[parallel.rank() :: parallel.size()]
        rows = []  # of each case a list of rows
        for case in tqdm(mine, desc="validation", unit="case", leave=False, disable=parallel.rank() > 0):
            prob, score = self.predict(case, last)
            masks = to_masks(prob, case.affine, data.read_header(case.case.images[-1]), self.c.threshold)
            more = {"has_tumor": case.tumor, "tumor_score": math.nan if score is None else score}
            rows.append([r | more for r in evaluate(case.case, truth_of(case.case), masks, self.targets)])
        rows = [r for case_rows in parallel.gather(rows) for r in case_rows]
        summary = summarise(rows, self.targets)
        self.log({"step": self.step, "val": summary})
        say(f"step {self.step}: " + "  ".join(f"{k} {v:.3f}" for k, v in summary.items() if not math.isnan(v)))
        dice = float(np.nan_to_num(np.mean([summary[f"{t}_dice"] for t in self.targets]), nan=-1.0))  # no tumor is held out: -1
        if dice >= self.best:
            self.best = dice
            self.save("best.pt")
        if parallel.rank() == 0:
            figures.curves(self.folder / "metrics.jsonl", self.folder / "curves.png")
            if last:
                self.report(rows)
        self.finished = last  # a run that is killed before this line validates again
        self.save("last.pt")

    def report(self, rows: list[dict]) -> None:
        """The end of a run: its table, the best SUV threshold for comparison, and its pictures."""
        write_table(rows, self.folder / "validation.csv")
        print_table(rows, self.targets)
        if self.c.kind == "petct":
            self.compare_threshold()
        self.draw(rows)

    def compare_threshold(self) -> None:
        """A line below the table: the same held-out studies, segmented by the best threshold on SUV."""
        best, rows = suv_threshold(self.train_cases, self.val_cases)
        summary = {k: mean_of(rows, k) for k in ("dice", "fpv_ml", "fnv_ml")}
        self.log({"step": self.step, "suv_threshold": best, **summary})
        numbers = f"Dice {summary['dice']:.3f}, FPV {summary['fpv_ml']:.1f} ml, FNV {summary['fnv_ml']:.1f} ml"
        print(f"for comparison, SUV > {best:.1f}, the best threshold on the training studies: {numbers}")

    def draw(self, rows: list[dict]) -> None:
        """validation.png: the best, the middle and the worst case."""
        c, cases = self.c, {k.name: k for k in self.val_cases}
        scored = [r for r in rows if r["target"] == self.targets[0] and not math.isnan(r["dice"])]
        order = sorted(scored, key=lambda r: -r["dice"]) or rows[:1]
        panels = []
        for i in sorted({0, len(order) // 2, len(order) - 1}):
            row = order[i]
            case = cases[row["case"]]
            image, label = case.array("image").astype(np.float32), case.array("label")
            made = reconstructions(self.mean_net, torch.from_numpy(image).to(self.device), c.patch, c.overlap, c.batch)
            prob = self.predict(case, last=True)[0]
            panels.append({
                "title": f"{case.name}, {row['target']}\nDice {row['dice']:.2f}  FPV {row['fpv_ml']:.1f} ml  FNV {row['fnv_ml']:.1f} ml",
                "names": ("CT", "PET") if c.kind == "petct" else ("T2w", "FLAIR"), "images": image,
                "truth": label > 0 if c.kind == "petct" else label == 2, "pred": prob[0] >= c.threshold,
                "spacing": nib.affines.voxel_sizes(case.affine), "reconstructions": made,
            })  # fmt: skip
        figures.panels(panels, self.folder / "validation.png")


def summarise(rows: list[dict], targets: tuple[str, ...]) -> dict[str, float]:
    """Means over the cases, a target: {"seg_dice", "seg_fpv_ml", "seg_fnv_ml", ...}; v3 also patient-level accuracy and AUC."""
    out = {}
    for t in targets:
        mine = [r for r in rows if r["target"] == t]
        out |= {f"{t}_{k}": mean_of(mine, k) for k in ("dice", "fpv_ml", "fnv_ml")}
    scored = [r for r in rows if r["target"] == targets[0] and not math.isnan(r["tumor_score"])]
    if scored:
        cls = patient_metrics([r["tumor_score"] for r in scored], [r["has_tumor"] for r in scored])
        out |= {f"patient_{k}": v for k, v in cls.items()}
    return out


def code_version() -> dict[str, str]:
    """What wrote a checkpoint: the commit, or without git a hash of the sources; and PyTorch."""
    here = Path(__file__).parent
    git = lambda *args, **more: subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, **more)  # noqa: E731
    try:
        code = git("describe", "--always", check=True).stdout.strip()
        code += "-dirty" * (git("diff", "--quiet", "HEAD", "--", "*.py").returncode == 1)  # new results make no other code
    except (OSError, subprocess.CalledProcessError):
        code = hashlib.sha256(b"".join(p.read_bytes() for p in sorted([*here.glob("*.py"), *here.glob("kernels/*.py")]))).hexdigest()[:12]
    return {"code": code, "torch": str(torch.__version__)}


def ignore_interrupts(_: int) -> None:
    """In a loader process: Ctrl-C reaches the whole process group, and these have to work until the last step is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def prepare_folder(c: Config) -> None:
    """Choose or check the run folder: one that exists is never written into unless asked."""
    if not c.out:
        base = f"runs/{c.data}-{c.model}-fold{c.fold}"
        c.out = next(name for i in range(1, 10_000) if not Path(name := base if i == 1 else f"{base}-{i}").exists())
    folder = Path(c.out)
    if folder.is_file():
        raise UserError(f"--out {folder}: a file; name a folder")
    if folder.exists() and any(folder.iterdir()) and not c.resume:
        if not c.overwrite:
            raise UserError(f"{folder} holds a run; name another with --out, go on with --resume, or replace it with --overwrite")
        for name in ("metrics.jsonl", "last.pt", "best.pt", "curves.png", "validation.png", "validation.csv", "config.json"):
            (folder / name).unlink(missing_ok=True)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    clean_parts(folder)


def main(argv: list[str]) -> None:
    """The program: options -> a trained network and its run folder. Raises UserError for what the user can mend."""
    c = parse_config(argv)
    with torch.device("meta"):  # allocates nothing
        build_model(c)  # refuses what cannot be built before any data are read
    parallel.start(c.device)
    with parallel.first_alone():
        train, val = load_cases(c)
    if parallel.rank() == 0:
        prepare_folder(c)
    c.out = parallel.share(c.out)
    run = Run(c, train, val)
    if c.resume:
        run.resume()  # refuses what the options given beside it cannot go on with, before anything is written
    if parallel.rank() == 0:
        with atomic_write(run.folder / "config.json") as part:
            part.write_text(json.dumps(dataclasses.asdict(c), indent=1) + "\n")
    say(json.dumps(dataclasses.asdict(c)))
    count = sum(p.numel() for p in run.net.parameters())
    say(f"{c.model}, {count:,} parameters, {len(train)} studies to train on, {len(val)} held out, on {c.device} -> {run.folder}")
    if run.finished and run.progress() == 1:
        say(f"this run is finished, after step {run.step}; to train on, raise --steps or --minutes beside --resume")
    else:
        try:
            run.train()
        except torch.OutOfMemoryError:
            raise UserError("the GPU's memory is full: use a smaller --batch or --patch, or --amp bf16; then go on with --resume") from None
    parallel.stop()


if __name__ == "__main__":
    program(main)
