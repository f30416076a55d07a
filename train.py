"""Train a Mirror U-Net or a baseline on PET/CT or brain MR; without options: v3 on the phantom.

    python train.py --data phantom|petct|brain [--root DIR] --model v3 [--corrupt shuffle] ...

Files -> cache -> fold -> patches -> steps -> validation on the original grid -> a run folder with
config.json, metrics.jsonl, last.pt, best.pt, curves.png, validation.png and validation.csv.

Every option is a field of `config.Config`. On several GPUs: torchrun --nproc_per_node=N train.py
... (`parallel.py`). A run that was killed, at any moment, continues with --resume exactly where it
was. `--fold all` makes a run per fold, in OUT/fold0, OUT/fold1, ...
"""

import os

# Let waiting OpenMP threads sleep soon: spinning on, the default, makes a step 5 times slower once
# anything else runs on one of two cores. Must be set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import contextlib
import copy
import dataclasses
import io
import json
import math
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nibabel.affines import voxel_sizes
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import baselines
import data
import evaluate
import figures
import files
import parallel
import patches
import phantom
import processes
from config import SYSTEM, Config, as_argument, parse_config
from device import autocast
from files import Stopped, UserError, atomic_write, note, run_program, writing
from graph import Graph, averaged, move_towards, read_later
from options import ALL_FOLDS
from parallel import say
from predict import load_checkpoint, predict_image, reconstruct, to_masks


# ----------------------------------------------------------------------------------- data and model
def load_folds(c: Config) -> list[tuple[list[data.CachedCase], list[data.CachedCase]]]:
    """Find, preprocess and split the studies: (training, validation) of each fold of the run."""
    if c.data.startswith("phantom"):
        options = (c.phantoms, c.spacing, c.harder)  # on the network's grid: no resampling
        root = phantom.write(c.data, c.root, c.cache, *options)
    else:
        root = Path(c.root)
    found, line = data.find_cases(root, c.task, True, c.patient_regex, c.label_codes)
    cases = data.build_cache(found, c.preprocessing, c.cache, c.workers if c.workers > 0 else None)
    if parallel.rank() == 0:
        note(f"{line}, {sum(not k.tumor for k in cases):,} without tumor")
    if len(cases) == 1:
        say("only one study: the run trains and validates on it; the table says nothing of others")
        return [(cases, cases)]
    if own_folds := c.splits or data.find_splits(root):
        splits = data.read_splits(own_folds, cases)
    else:
        splits = data.make_folds(cases, min(c.folds, len({k.patient for k in cases})))
    if c.fold >= len(splits):
        raise UserError(f"--fold {c.fold}: there are folds 0 to {len(splits) - 1}")
    kept = [k for k in cases if k.tumor or c.negatives]
    sides = []
    for fold in range(len(splits)) if c.fold == ALL_FOLDS else [c.fold]:
        train = [k for k in kept if k.name in set(splits[fold]["train"])]
        val = [k for k in kept if k.name in set(splits[fold]["val"])]
        if not train or not val:
            found = f"{len(train)} studies to train on and {len(val)} held out"
            raise UserError(f"--fold {fold}: {found}; each side needs one")
        sides.append((train, val))
    return sides


def load_cases(c: Config) -> tuple[list[data.CachedCase], list[data.CachedCase]]:
    """The (training, validation) studies of one fold, as `load_folds`."""
    return load_folds(c)[0]


def build_model(c: Config) -> nn.Module:
    """The network of a config, freshly initialized from its seed. Raises UserError."""
    torch.manual_seed(c.random_seed)
    try:
        model = c.build_model()
        check_input: Any = model.check_input
        check_input((c.batch, 2, *c.patch))
        return model
    except ValueError as e:
        patch = " ".join(map(str, c.patch))
        raise UserError(f"--model {c.model} --patch {patch}: {e}") from None


def build_optimizer(c: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Adam, AdamW, or SGD with Nesterov momentum 0.99."""
    weights, lr, decay = model.parameters(), c.lr, c.weight_decay
    if c.optimizer == "sgd":
        return torch.optim.SGD(weights, lr, 0.99, weight_decay=decay, nesterov=True, fused=True)
    adam = torch.optim.AdamW if c.optimizer == "adamw" else torch.optim.Adam
    more: dict[str, Any] = dict(fused=True, capturable=c.graph)
    return adam(weights, lr, weight_decay=decay, **more)


def learning_rate(c: Config, t: float) -> float:
    """The learning rate after a share t in [0, 1] of the run."""
    if c.schedule == "cosine":
        return c.lr * (0.5 * (1 + math.cos(math.pi * t)))
    if c.schedule == "poly":
        return c.lr * (1 - t) ** 0.9
    if c.schedule == "step":
        return c.lr * (1.0 if t < 0.625 else 0.1)
    return c.lr


# ------------------------------------------------------------------------------------------ the run
class Run:
    """One training run and its folder.

    A step    `train_step`: `prepare` a batch, `learn` from it on the device, `judge` its numbers.
    Checked   `judge`: a loss or gradient that is not finite changes nothing, and ends the run or is
              skipped. `save`: no checkpoint holds NaN, or weights whose next loss has exploded.
    Saved     `state`: all that decides the next step, so a resumed run is the same run.
    """

    # Options that a run cannot change when it is resumed.
    FIXED = ("data", "fold", *SYSTEM, "optimizer", "spacing", "ct_window", "suv_window")
    FIXED += ("label_values", "label_nonzero")
    # Numbers that a checkpoint holds.
    COUNTS = "step seen seconds best finished validated skipped".split()

    def __init__(self, c: Config, train: list[data.CachedCase], val: list[data.CachedCase]):
        self.c, self.train_cases, self.val_cases = c, train, val
        self.folder = Path(c.out)
        self.device = parallel.start(c.device)
        layout = torch.channels_last_3d if c.channels_last else torch.contiguous_format
        self.model = build_model(c).to(self.device, memory_format=layout)  # type: ignore
        self.ema_model = self.model
        if c.ema:
            self.ema_model = copy.deepcopy(self.model).requires_grad_(False)
        self.ema_tensors, self.model_tensors = averaged(self.ema_model), averaged(self.model)
        self.forward = parallel.distribute(self.model, self.device)
        if c.compile:
            self.forward = torch.compile(self.forward)
        self.loss = baselines.SystemLoss(
            preset=c.task, lambda_seg=c.lambda_seg, lambda_rec=c.lambda_rec,
            lambda_cls=c.lambda_cls, sync=parallel.size() > 1, tasks=self.model.tasks,
        )
        torch.backends.cudnn.benchmark = True  # the shapes stay the same
        self.optimizer = build_optimizer(c, self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=c.amp == "fp16")
        self.patches = patches.PatchDataset(
            train, c.patch, c.steps * self.batch_of_all, c.random_seed, c.augmentation,
            c.foreground_fraction, c.patches_per_case,
            cubes=(c.cube, c.cubes) if c.corrupt == "shuffle" else None,
        )
        # What a checkpoint holds next to the counts; "model" is what is validated and given away.
        self.parts: dict[str, Any] = {"model": self.ema_model, "net": self.model}
        self.parts |= {"optimizer": self.optimizer, "scaler": self.scaler}
        sides = {"train": train, "val": val}
        self.studies = {side: {k.name: k.source for k in cases} for side, cases in sides.items()}
        self.code = {"code": files.source_version(), "torch": str(torch.__version__)}
        self.lines = files.Log(self.folder / "metrics.jsonl")
        self.again = c.out  # the folder that a stopped run is resumed with
        self.step = 0
        self.seen = 0  # patches
        self.seconds = 0.0  # spent on steps
        self.best = -1.0  # mean Dice of best.pt
        self.finished = False
        self.validated = 0  # how many of the validations are done
        self.skipped = 0  # steps left out by --skip-nonfinite
        self.skipped_since = 0  # those since the last finite one
        self.usual = 0.0  # mean loss of the last hundred steps or so
        self.largest = math.inf if c.clip else 1e18  # norm of a gradient: Adam has to square it
        self.kept: tuple[int, bytes] | None = None  # a step, and last.pt after it: see `save`
        self.written = 0  # the step that --resume continues from
        self.graph = Graph(self.learn, self.device) if c.graph else None
        self.late: Any = None  # with a graph, judges the last step
        # The learning rate, and the share of the way that averaged weights move.
        self.rates: Any = torch.zeros(2, device=self.device).unbind() if c.graph else (c.lr, 1.0)

    @property
    def batch_of_all(self) -> int:
        """Patches per step, of all processes together."""
        return self.c.batch * parallel.size()

    # --------------------------------------------------------------------------------- checkpoints
    def state(self) -> dict:
        """What a checkpoint holds. The schedule needs no state: it depends on `progress` alone."""
        state = {name: getattr(self, name) for name in self.COUNTS}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        log = {"log_bytes": self.lines.size, "log_crc": self.lines.crc}
        return state | log | {"config": self.c.to_dict(), "code": self.code}

    def finite(self) -> bool:
        """Whether all weights and running statistics are."""
        return all(bool(t.isfinite().all()) for t in self.model_tensors)

    def save(self, name: str, now: bool = True) -> None:
        """Write a checkpoint atomically. Refuses NaN.

        now: False keeps it in memory until the next loss shows that the weights have not exploded.
        """
        self.judge_late()
        if parallel.rank() > 0:
            return
        if not self.finite():
            if now:
                raise self.not_finite(f"a weight is not finite after step {self.step}")
            return  # the next loss will not be finite
        # best.pt is given to others, and has no names of patients.
        more = {"studies": self.studies if name == "last.pt" else files.digest(self.studies)}
        buffer = io.BytesIO()  # torch.save has its own errors for a full disk
        torch.save(self.state() | more, buffer)
        if name == "last.pt":
            self.kept = self.step, buffer.getvalue()
            if now:
                self.write_kept()
        else:
            files.write_file(self.folder / name, buffer.getvalue())
            self.written = self.written or self.step

    def write_kept(self) -> None:
        """Write the last.pt that `save` kept, if any."""
        if self.kept:
            step, content = self.kept
            files.write_file(self.folder / "last.pt", content)
            self.written, self.kept = step, None

    def resume(self) -> None:
        """Continue from last.pt, and cut metrics.jsonl to its length then. Raises UserError.

        If last.pt is missing or damaged, best.pt holds an earlier state of the run. Without both,
        the run starts from the beginning.
        """
        found = [self.folder / name for name in ("last.pt", "best.pt")]
        found = [path for path in found if path.exists()]
        if not found:
            if (self.folder / "config.json").exists():  # else it has not begun (--fold all)
                say(f"{self.folder}: stopped before it was first saved; it begins again")
            return self.lines.restore(0)
        for path in found:
            try:
                state = load_checkpoint(path, self.device)
                break
            except UserError as e:
                say(f"warning: {e}")
        else:
            raise UserError(f"{found[0]}: cannot be resumed; begin again with --overwrite")
        ways = "delete it to resume from best.pt, or begin again with --overwrite"
        before = state["config"]
        for name in self.FIXED:
            was, now = getattr(before, name), getattr(self.c, name)
            if was != now:
                options = f"{as_argument(name, was)}, not {as_argument(name, now)}"
                raise UserError(f"{path}: of a run with {options}; give another --out")
        state = {"code": "unknown code", "validated": 10**9, "skipped": 0, "studies": {}} | state
        if self.code != state["code"]:
            codes = f"{state['code']}, this is {self.code}"
            say(f"note: {path} was written by other code ({codes}); losses may differ from here on")
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            for group in self.optimizer.param_groups:
                group["capturable"] = self.c.graph
            for name in self.COUNTS:
                if type(state[name]) is not type(getattr(self, name)) or not state[name] >= -1:
                    raise ValueError(f"{name} is {state[name]!r:.20}")
                setattr(self, name, state[name])
            size = int(state["log_bytes"])
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as e:
            why = " ".join(str(e).split())[:160]
            raise UserError(f"{path}: does not fit this version's network: {why}; {ways}") from None
        if not self.finite():
            raise UserError(f"{path}: holds weights that are NaN or infinite; {ways}")
        changes = files.changed_studies(path, state["studies"], self.studies)
        if changes and not self.c.accept_changes:
            raise UserError(f"{changes}; give another --out, or --accept-changes")
        self.lines.restore(size, state.get("log_crc"))
        if changes:
            say(f"warning: {changes}")
            self.log({"step": self.step, "changes": changes})
        self.written = self.step
        self.patches.length = self.seen + self.batch_of_all * max(0, self.c.steps - self.step)
        self.validated = min(self.validated, int(self.progress() * self.c.validations))
        if self.validated or self.finished:
            try:
                load_checkpoint(self.folder / "best.pt")
            except UserError as e:
                say(f"warning: {e}; the next validation writes it")
                self.best, self.finished = -1.0, False

    def log(self, row: dict) -> None:
        """Append a line to metrics.jsonl."""
        if parallel.rank() == 0:
            self.lines.add(row)

    def log_step(self, row: dict[str, float]) -> None:
        """Append the row of a step."""
        self.log({"step": row["step"], "seconds": round(self.seconds, 3), **row})

    # ------------------------------------------------------------------------------------ training
    def progress(self) -> float:
        """Share of the run that is done: of its steps or its minutes, whichever end first."""
        spent = self.seconds / (60 * self.c.minutes) if self.c.minutes else 0.0
        return min(1.0, max(self.step / self.c.steps, spent))

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of the loader on the device, with "x": its images, the CT corrupted."""
        c = self.c
        names = ("image", "label", "tumor")
        inputs = {name: batch[name].to(self.device, non_blocking=True) for name in names}
        more = (c.cube, c.cubes, c.sigma, batch.get("corners"))
        x = patches.corrupt_ct(inputs["image"], c.corrupt, batch["key"], *more)
        if c.channels_last:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        return inputs | {"x": x}

    def set_rates(self) -> float:
        """Set the rates of this step; returns its learning rate."""
        lr = learning_rate(self.c, self.progress())
        decay = min(self.c.ema, (1 + self.step) / (10 + self.step))  # forget the start quickly
        if self.graph:
            for rate, value in zip(self.rates, (lr, 1 - decay)):
                rate.fill_(value)
        else:
            self.rates = (lr, 1 - decay)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[0]
        return lr

    def train_step(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One step on a batch of the loader; returns its row of the log.

        With --graph this is the row of the step before, {} at first: the host prepares the next
        step meanwhile instead of waiting for the numbers of this one.
        """
        inputs = self.prepare(batch)
        row = {"step": self.step + 1, "lr": self.set_rates()}
        if self.c.anneal:
            self.loss.lambda_rec = self.c.lambda_rec * (1 - self.progress())
        torch.manual_seed(hash((self.c.random_seed, self.step)) & 0x7FFFFFFF)  # of these alone
        self.model.turn = self.step % 2  # valindria trains the modalities in turns
        numbers = (self.graph or self.learn)(**inputs)
        if self.graph:
            late, self.late = self.late, partial(self.judge, read_later(numbers), row, batch)
            return late() if late else {}
        row = self.judge(numbers.tolist, row, batch)
        if "skipped" not in row:
            self.update(self.rates[1])
        return row

    def learn(self, x: Tensor, image: Tensor, label: Tensor, tumor: Tensor) -> Tensor:
        """The device's part of a step: forward, loss, backward; with --graph also `update`.

        Returns the total loss, its parts and the gradient's norm: the numbers of `self.names`. With
        --graph this is what is recorded: nothing here may ask the host.
        """
        c = self.c
        buffers = [t.clone() for t in self.model.buffers()] if c.graph or c.skip_nonfinite else []
        batch = {"image": image, "label": label, "tumor": tumor}
        with autocast(self.device.type, c.amp):
            outputs = self.forward(x)
        loss, parts = self.loss(outputs, patches.make_targets(batch, c.task))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), c.clip or math.inf)
        self.names = ("loss", *parts, "grad_norm")
        numbers = torch.stack([loss.detach(), *parts.values(), norm]).double()
        numbers = parallel.mean(numbers)
        finite = numbers[0].isfinite() & (numbers[-1] < self.largest)
        for tensor, before in zip(self.model.buffers(), buffers):
            tensor.copy_(torch.where(finite, tensor, before))
        if c.graph:  # `judge` will see too late that a number is not finite: change nothing then
            self.optimizer.found_inf = 1 - finite.float()  # type: ignore
            self.update(self.rates[1] * finite)
        return numbers

    def update(self, share: float | Tensor) -> None:
        """Change the weights by their gradients, and the averaged ones by a share of the way."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.c.ema:
            move_towards(self.ema_tensors, self.model_tensors, share)

    def judge(self, read: Callable[[], list], row: dict, batch: dict) -> dict[str, float]:
        """Complete a step's row with the numbers of `learn`, which `read` gives, and check them.

        If they are usual, what `save` kept is good and is written; if they are not finite, `skip`.
        """
        row = dict(zip(self.names, read())) | row
        finite = math.isfinite(row["loss"]) and row["grad_norm"] < self.largest
        if not finite and self.scaler.get_scale() <= 1:  # a larger one is halved instead (fp16)
            return self.skip(batch, row)
        self.usual = self.usual or row["loss"]
        if finite and row["loss"] < 1000 * (1 + self.usual):  # else weights have exploded
            self.usual += 0.01 * (row["loss"] - self.usual)
            self.write_kept()
        self.kept = None
        self.skipped_since = 0
        return row

    def judge_late(self) -> None:
        """With --graph: judge and log the last step, too."""
        late, self.late = self.late, None
        if late:
            self.log_step(late())

    def skip(self, batch: dict[str, Tensor], row: dict[str, float]) -> dict[str, float]:
        """Leave a step out, or end the run with a UserError. Writes the first such batch."""
        step = row["step"]
        if not self.skipped:
            content = {"step": step, "row": row, "batches": parallel.gather([batch])}
            if parallel.rank() == 0:
                with atomic_write(self.folder / "nonfinite.pt") as part:
                    torch.save(content, part)
        what = "grad_norm" if math.isfinite(row["loss"]) else "loss"
        problem = f"the {what} is {row[what]:g} at step {step}"
        if not self.c.skip_nonfinite or self.skipped_since == 100:
            raise self.not_finite(problem)
        say(f"{problem}: left out")
        self.skipped += 1
        self.skipped_since += 1
        return {"step": step, "lr": row["lr"], "skipped": self.skipped}

    def not_finite(self, problem: str) -> UserError:
        """What ends a run that can no longer train."""
        ways = f"try a smaller --lr, or --amp off, with --resume --out {self.folder}"
        ways += f", which continues from step {self.written}, or leave such steps out with"
        return UserError(f"{problem}: {ways} --skip-nonfinite; nonfinite.pt there has the batch")

    def batches(self) -> DataLoader:
        """The batches of this process, from patch number `seen` on."""
        c, size = self.c, self.batch_of_all
        mine = parallel.rank() * c.batch
        starts = range(self.seen + mine, len(self.patches) - size + mine + 1, size)
        return DataLoader(
            self.patches,
            batch_sampler=(list(range(start, start + c.batch)) for start in starts),
            num_workers=parallel.loaders(c.workers, self.device, c.batch * math.prod(c.patch)),
            pin_memory=self.device.type == "cuda",
            worker_init_fn=processes.follow_parent,
        )

    def train(self) -> None:
        """Step until the budget is used up; validate and save at intervals.

        Ctrl-C and SIGTERM finish a step, and break off a validation, which is then repeated.
        """
        self.model.train()
        with files.Interrupts() as interrupts, parallel.progress_bar(self.progress()) as bar:
            try:
                self.take_steps(interrupts, bar)
                self.save("last.pt")
                with interrupts.lifted():
                    self.validate(last=True)
            except (KeyboardInterrupt, Stopped) as e:
                self.write_kept()
                command = f"python train.py --resume --out {self.again}"
                message = f"stopped after step {self.step}; to continue: {command}"
                number = getattr(e, "number", signal.SIGINT)
                raise Stopped(number, message if parallel.rank() == 0 else "") from None

    def take_steps(self, interrupts: files.Interrupts, bar: tqdm) -> None:
        """All steps, and all validations but the last. Raises Stopped when interrupted."""
        c = self.c
        saved = time.monotonic()
        batches = iter(self.batches())
        while self.progress() < 1:
            due = int(self.progress() * c.validations)
            if due > self.validated:
                self.save("last.pt", now=False)
                self.validated = due
                with interrupts.lifted():
                    self.validate(last=False)
            start = time.monotonic()
            row = self.train_step(next(batches))
            self.step += 1
            self.seen += self.batch_of_all
            spent = self.seconds + time.monotonic() - start
            self.seconds, stopping = parallel.largest(spent, float(interrupts.asked))
            if row:
                self.log_step(row)
            bar.update(int(1000 * self.progress()) - bar.n)
            if "loss" in row:  # else it was left out, or comes later (--graph)
                dice = next(v for k, v in row.items() if k.endswith("_dice"))
                numbers = f"loss {row['loss']:.3f}  dice loss {dice:.3f}"
                bar.set_postfix_str(f"step {row['step']}  {numbers}")
            if stopping or time.monotonic() - saved >= 60 * c.checkpoint_minutes:
                self.save("last.pt", now=False)  # once the next loss is finite
                saved = time.monotonic()
            if stopping:
                raise Stopped(int(stopping))

    # ---------------------------------------------------------------------------------- validation
    def predict(self, case: data.CachedCase, last: bool) -> tuple[np.ndarray, float | None]:
        """Probabilities (K, D, H, W) of a cached study, and the patient's score (v3)."""
        c = self.c
        flip_axes = c.flip_axes if last and c.flips else ()
        prob, score = predict_image(
            self.ema_model, self.image_of(case), c.patch, c.overlap, c.batch, flip_axes, c.amp
        )
        return prob.cpu().numpy(), score

    def image_of(self, case: data.CachedCase) -> Tensor:
        """A cached study (2, D, H, W), float32, on the run's device."""
        return torch.from_numpy(case.array("image").astype(np.float32)).to(self.device)

    def score(self, last: bool) -> list[dict]:
        """The rows of all held-out cases, each on its original grid; processes share the work."""
        rows = []  # a list per case
        mine = self.val_cases[parallel.rank() :: parallel.size()]
        quiet = parallel.rank() > 0
        for case in tqdm(mine, desc="validation", unit="case", leave=False, disable=quiet):
            prob, score = self.predict(case, last)
            like = data.read_header(case.case.images[-1])
            masks = to_masks(prob, case.affine, like, self.c.threshold)
            more = {"has_tumor": case.tumor, "tumor_score": math.nan if score is None else score}
            truth = evaluate.read_truth(case.case)
            found = evaluate.evaluate_case(case.case, truth, masks, self.c.targets)
            rows.append([row | more for row in found])
        return [row for case_rows in parallel.gather(rows) for row in case_rows]

    def validate(self, last: bool) -> None:
        """Log the scores and keep the best weights; the last time, also report and draw."""
        self.judge_late()
        targets = self.c.targets
        rows = self.score(last)
        means = evaluate.summarize(rows, targets)
        self.log({"step": self.step, "val": means})
        known = [f"{name} {v:.3f}" for name, v in means.items() if not math.isnan(v)]
        say(f"step {self.step}: " + "  ".join(known))
        dice = np.mean([means[f"{target}_dice"] for target in targets])
        dice = float(np.nan_to_num(dice, nan=-1.0))  # -1 if no held-out study has a tumor
        if dice >= self.best:
            self.best = dice
            self.save("best.pt")
        if parallel.rank() == 0:
            figures.curves(self.folder / "metrics.jsonl", self.folder / "curves.png")
            if last:
                self.report(rows)
        self.finished = last  # a run that is killed before this line validates again
        self.save("last.pt", now=last)

    def report(self, rows: list[dict]) -> None:
        """The end of a run: its table, an SUV threshold, and some of its cases drawn."""
        files.write_table(rows, self.folder / "validation.csv")
        evaluate.print_table(rows, self.c.targets)
        if self.c.task == "petct":
            row = baselines.compare_threshold(self.train_cases, self.val_cases)
            self.log({"step": self.step, **row})
        shown = figures.choose(rows, self.c.targets[0])
        pictures = [self.panel(row) | {"title": title} for title, row in shown]
        figures.panels(pictures, self.folder / "validation.png")

    def panel(self, row: dict) -> dict:
        """What `figures.panels` shows of one case, from its row of the table, but for a title."""
        c = self.c
        case = next(k for k in self.val_cases if k.name == row["case"])
        image = self.image_of(case)
        prob, _ = self.predict(case, last=True)
        return {
            "names": ("CT", "PET") if c.task == "petct" else ("T2w", "FLAIR"),
            "suv": c.suv_window if c.task == "petct" else None,
            "images": image.cpu().numpy(),
            "truth": evaluate.true_mask(case.array("label"), row["target"]),
            "pred": prob[0] >= c.threshold,
            "spacing": voxel_sizes(case.affine),
            "reconstructions": reconstruct(self.ema_model, image, c.patch, c.overlap, c.batch),
        }


def prepare_folder(c: Config) -> None:
    """Choose or check the run folder; never write into one that exists unless asked to."""
    if not c.out:
        base = f"runs/{c.data}-{c.model}-" + ("folds" if c.fold == ALL_FOLDS else f"fold{c.fold}")
        names = [base] + [f"{base}-{i}" for i in range(2, 10_000)]
        c.out = next(name for name in names if not Path(name).exists())
    folder = Path(c.out)
    if folder.is_file():
        raise UserError(f"--out {folder}: a file; name a folder")
    if any(folder.glob("[!.]*")) and not (c.resume or c.overwrite):
        ways = "continue it with --resume, or replace it with --overwrite"
        raise UserError(f"{folder} holds a run; name another with --out, {ways}")
    if (folder / ("last.pt" if c.fold == ALL_FOLDS else "fold0")).exists():
        raise UserError(f"{folder} holds one run, or one per fold, and the other is asked for")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with processes.lock_folder(folder):
        files.clean_parts(folder, alone=True)
        written = "metrics.jsonl last.pt best.pt curves.png validation.png validation.csv"
        for name in (*written.split(), "config.json", "nonfinite.pt"):
            if c.overwrite and not c.resume:
                (folder / name).unlink(missing_ok=True)


def train_fold(c: Config, train: list, val: list, again: str) -> None:
    """Make one run, alone in its folder. again: the folder that a stopped one is resumed with."""
    folder = Path(c.out)
    first = parallel.rank() == 0
    with processes.lock_folder(folder) if first else contextlib.nullcontext():
        run = Run(c, train, val)
        run.again = again
        if c.resume:
            run.resume()  # refuses options that do not fit before anything is written
        if first:
            files.write_file(folder / "config.json", json.dumps(c.to_dict(), indent=1) + "\n")
        count = sum(p.numel() for p in run.model.parameters())
        say(f"{c.differences()}; all options in {folder / 'config.json'}")
        studies = f"{len(train)} studies to train on, {len(val)} held out"
        say(f"{c.model}, {count:,} parameters, {studies}, on {c.device} -> {folder}")
        if run.finished and run.progress() == 1:
            say(f"this run is finished (step {run.step}); to go further, give --steps or --minutes")
        else:
            run.train()


def train_all_folds(c: Config, sides: list) -> None:
    """A run per fold, one after the other, in OUT/fold0, OUT/fold1, ..."""
    if parallel.rank() == 0:
        content = json.dumps(c.to_dict(), indent=1) + "\n"
        files.write_file(Path(c.out) / "config.json", content)
    for fold, (train, val) in enumerate(sides):
        resume = c.resume or not c.overwrite
        one = dataclasses.replace(c, fold=fold, out=f"{c.out}/fold{fold}", resume=resume)
        if parallel.rank() == 0:
            prepare_folder(one)
        train_fold(one, train, val, c.out)
    say(f"for their ensemble: python predict.py --checkpoint {c.out}/fold*/best.pt ...")


@processes.clear_errors()
def main(argv: list[str]) -> None:
    """Options -> a trained network in its run folder. Raises UserError for what users can fix."""
    c = parse_config(argv, "Train a Mirror U-Net or a baseline on PET/CT or brain MR.")
    with torch.device("meta"):  # without memory: refuse what cannot be built before reading data
        build_model(c)
    parallel.start(c.device)
    with parallel.first_alone():
        sides = load_folds(c)
    if parallel.rank() == 0:
        prepare_folder(c)
    c.out = parallel.share(c.out)
    if c.fold == ALL_FOLDS:
        train_all_folds(c, sides)
    else:
        train_fold(c, *sides[0], c.out)
    parallel.stop()


if __name__ == "__main__":
    run_program(main)
