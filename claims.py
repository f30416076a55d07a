"""The paper's claims as orders between systems, and what the results say about each of them.

`report` turns results/SOURCE.csv, which replicate.py writes, into tables, verdicts and figures.

Intervals are 95 % bootstrap intervals over patients (all studies of a patient together) and
trainings (one per fold and seed, whose luck holds for its own fold's cases only). Two systems are
compared by their differences on the folds, seeds and cases that both have: a hard case is hard for
both, and its difficulty cancels out.
"""

import csv
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

import figures
from files import UserError, atomic_write


# ---------------------------------------------------------------------------------- what is claimed
@dataclass(frozen=True)
class Experiment:
    """One system: its name in tables, its data and its options of train.py."""

    name: str
    data: str  # petct | phantom | brain
    options: str


class Order(NamedTuple):
    """The claim that `better` beats `worse` in a measure; `target` is what is segmented."""

    better: str
    worse: str
    measure: str = "dice"
    target: str = "seg"


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, and the orders it consists of.

    With a margin, the claim is that no difference exceeds it.
    """

    number: int  # 1-7 as in the README, from the paper; 8 and 9 are ours
    data: str
    text: str
    orders: tuple[Order, ...]
    margin: float | None = None
    paper: bool = False  # too much for the laptop preset


class Measure(NamedTuple):
    """A measure's title in tables, and whether higher (+1) or lower (-1) values are better."""

    title: str
    sign: int


MEASURES = {  # by column of the csv file; negative_fpv_ml: fpv_ml of the patients without a tumor
    "dice": Measure("Dice", 1),
    "fpv_ml": Measure("FPV ml", -1),
    "fnv_ml": Measure("FNV ml", -1),
    "negative_fpv_ml": Measure("FPV ml, patients without tumor", -1),
    "sensitivity": Measure("sensitivity at 0.5", 1),  # of v3's classifier
    "specificity": Measure("specificity at 0.5", 1),
    "ct_clean": Measure("CT error HU, clean input", -1),
    "ct_noise": Measure("CT error HU, noisy input", -1),
    "ct_shuffle": Measure("CT error HU, shuffled input", -1),
}

VERSIONS = ("v1", "v2", "v3", "v4")
MIRROR = ("v1", "v2", "v3")
FUSION = ("ef", "mf", "lf")  # early, mid, late
PLAIN = ("ct", "pet", *FUSION)
SYSTEMS = (*VERSIONS, *PLAIN, "multitask", "valindria", "nnunet", "blackbean")
BRAIN_SYSTEMS = ("v2", "v1", "v2-rec", "nnunet", "segresnet")
CORRUPTED = [(model, how) for model in MIRROR for how in ("noise", "none")]
SHARES = ("3", "4", "6", "7", "4 5 6", "3 4 5 6 7")
VARIED = ("lambda-rec 1e-4", "lambda-rec 1e-2", "cube 8", "cube 32", "cubes 4")
JOINT = [(skips, tasks) for skips in ("pet", "both") for tasks in ("v2", "none")]

EXPERIMENTS = [
    *[Experiment(m, "petct", f"--model {m}") for m in SYSTEMS],
    *[Experiment(f"{m} {how}", "petct", f"--model {m} --corrupt {how}") for m, how in CORRUPTED],
    *[Experiment(f"v2 share {s}", "petct", f"--model v2 --share {s}") for s in SHARES],
    *[Experiment(f"v2 {option}", "petct", f"--model v2 --{option}") for option in VARIED],
    *[
        Experiment(f"joint {s} {t}", "petct", f"--model joint --skips {s} --tasks {t}")
        for s, t in JOINT
    ],
    *[Experiment(m, "phantom", f"--model {m}") for m in ("v2", "v3")],
    *[Experiment(m, "brain", f"--model {m}") for m in BRAIN_SYSTEMS],
]


def beats(better, worse, *measures: str, targets=("seg",)) -> tuple[Order, ...]:
    """Each system of `better` beats each of `worse`, in every measure (default Dice) and target."""
    return tuple(Order(*o) for o in product(better, worse, measures or ("dice",), targets))


CLAIMS = [
    Claim(1, "petct", "v4 < v1 < v2 < v3",
          (Order("v1", "v4"), Order("v2", "v1"), Order("v3", "v2"))),
    Claim(2, "petct", "the CT is reconstructed better after voxel shuffling than after noise, "
          "and after noise than without corruption (v2)",
          (Order("v2", "v2 noise", "ct_clean"), Order("v2 noise", "v2 none", "ct_clean"))),
    Claim(2, "petct", "segmentation follows: shuffling > noise > none (v2)",
          (Order("v2", "v2 noise"), Order("v2 noise", "v2 none"))),
    Claim(2, "petct", "the same in v1 and v3",
          (Order("v1", "v1 noise"), Order("v1 noise", "v1 none"),
           Order("v3", "v3 noise"), Order("v3 noise", "v3 none")), paper=True),
    Claim(3, "petct", "sharing the bottleneck alone, {5}, is best",
          beats(["v2"], [f"v2 share {s}" for s in SHARES])),
    Claim(4, "petct", "CT alone is poor", (Order("pet", "ct"),)),
    Claim(4, "petct", "PET alone beats early, mid and late fusion", beats(["pet"], FUSION)),
    Claim(4, "petct", "but PET alone has more false-positive volume than fusion",
          beats(FUSION, ["pet"], "fpv_ml")),
    Claim(4, "petct", "every version beats CT, PET and fusion in Dice",
          beats(VERSIONS, PLAIN)),
    Claim(4, "petct", "every version beats them in FPV",
          beats(VERSIONS, PLAIN, "fpv_ml")),
    Claim(4, "petct", "every version beats them in FNV",
          beats(VERSIONS, PLAIN, "fnv_ml")),
    Claim(5, "petct", "both ideas beat fission alone (v4, valindria), multi-task alone (multitask) "
          "and neither (ef)", beats(MIRROR, ["v4", "valindria", "multitask", "ef"])),
    Claim(5, "petct", "they beat nnU-Net and Blackbean", beats(MIRROR, ["nnunet", "blackbean"])),
    Claim(6, "brain", "v2 beats nnU-Net, SegResNet, v1 and v2-rec on core and edema",
          beats(["v2"], ["nnunet", "segresnet", "v1", "v2-rec"], targets=("core", "edema"))),
    Claim(6, "brain", "v2-rec is second there",
          beats(["v2-rec"], ["nnunet", "segresnet", "v1"], targets=("core", "edema"))),
    Claim(7, "petct", "hyper-parameters matter little: Dice within 0.05 of the default's",
          beats([f"v2 {v}" for v in VARIED], ["v2"]), margin=0.05),
    Claim(8, "petct", "ours: bottleneck features of both modalities beat shared weights",
          beats(["joint pet v2", "joint both v2"], ["v2"])),
    Claim(8, "petct", "ours: they beat early fusion",
          beats(["joint pet v2", "joint both v2"], ["ef"])),
    Claim(8, "petct", "ours: they beat mid fusion",
          beats(["joint pet v2", "joint both v2"], ["mf"])),
    Claim(8, "petct", "ours: reconstruction helps there, too",
          (Order("joint pet v2", "joint pet none"), Order("joint both v2", "joint both none"))),
    Claim(9, "phantom", "ours, with patients without tumor: v3's classifier lowers v2's FPV",
          beats(["v3"], ["v2"], "fpv_ml", "negative_fpv_ml")),
]  # fmt: skip


def systems_of(claim: Claim) -> set[str]:
    """The names of the systems that its orders compare."""
    return {name for o in claim.orders for name in (o.better, o.worse)}


def experiments_for(numbers: list[int], only: list[str], preset: str) -> list[Experiment]:
    """The experiments of the claims with these numbers ([]: of all), or `only` some of them.

    Raises UserError for a claim or a name that does not exist.
    """
    known = {c.number for c in CLAIMS}
    if not set(numbers) <= known:
        given = " ".join(map(str, numbers))
        raise UserError(
            f"--claims {given}: there are claims {min(known)} to {max(known)}; --list shows them"
        )
    unknown = set(only) - {e.name for e in EXPERIMENTS}
    if unknown:
        raise UserError(
            f"--only {sorted(unknown)}: no such system; --list shows them (quote names with spaces)"
        )
    chosen = [c for c in CLAIMS if c.number in numbers or not numbers]
    chosen = [c for c in chosen if preset == "paper" or not c.paper]
    wanted = {(c.data, name) for c in chosen for name in systems_of(c)}
    found = [e for e in EXPERIMENTS if (e.data, e.name) in wanted]
    return [e for e in found if not only or e.name in only]


# ---------------------------------------------------------------------------------------- estimates
def read_rows(path: Path) -> list[dict]:
    """The rows of a csv file, values as text; [] if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8-sig") as f:
        return list(csv.DictReader(f))


def read_results(path: Path) -> list[dict]:
    """`read_rows` of a SOURCE.csv. Raises UserError unless it is one that replicate.py wrote."""
    texts = "study preset system case target commit options run".split()
    texts += "dice fpv_ml fnv_ml has_tumor".split()
    counts = "fold folds seed steps".split()
    values = "dice fpv_ml fnv_ml tumor_score".split()
    later = "ct_clean ct_noise ct_shuffle seconds".split()  # older files may lack these
    line = 1
    try:
        rows = read_rows(path)
        for row in rows:
            line += 1
            if None in (*row, *row.values(), *map(row.get, texts)):
                raise ValueError("more or fewer cells than columns")
            if not re.fullmatch(r"[\w-]+", row["study"]):  # part of a file's name
                raise ValueError(f"study {row['study']!r:.40}")
            numbers = [int(row[name]) for name in counts]
            row |= {name: row.get(name, "") for name in later}
            numbers += [float(row[name] or 0) for name in values + later]
            if min(numbers[:4]) < 0 or not np.isfinite(np.array(numbers, float)).all():
                raise ValueError(f"a number out of range: {numbers!s:.80}")
    except (OSError, KeyError, ValueError, OverflowError, csv.Error) as e:
        problem = f"line {line} is not as replicate.py writes it ({e!r:.120})"
        raise UserError(f"{path}: {problem}; put back the original, or delete it") from None
    return rows


def value_of(row: dict, measure: str) -> float | None:
    """A row's value of a measure; None if it is not defined there."""
    has_tumor = row["has_tumor"] == "True"
    if measure in ("sensitivity", "specificity"):
        positive = measure == "sensitivity"  # the patients that it is about
        if not row["tumor_score"] or has_tumor != positive:
            return None
        return float((float(row["tumor_score"]) >= 0.5) == positive)
    if measure == "negative_fpv_ml" and has_tumor:
        return None
    text = row[measure.removeprefix("negative_")]
    return float(text) if text else None


def values_of(rows: list[dict], system: str, measure: str, target: str = "seg") -> dict:
    """{(fold, case, seed): value} of one system, for the cases in which the measure is defined."""
    mine = [r for r in rows if r["system"] == system and r["target"] == target]
    values = {(r["fold"], r["case"], r["seed"]): value_of(r, measure) for r in mine}
    return {key: value for key, value in values.items() if value is not None}


class Estimate(NamedTuple):
    """A mean over cases (or an AUC), its bootstrap distribution, and how much stands behind it."""

    mean: float
    draws: np.ndarray
    cases: int
    patients: int
    seeds: int  # the fewest of a fold

    def __str__(self) -> str:
        low, high = interval(self.draws)
        digits = 1 if abs(self.mean) >= 10 else 3
        return f"{self.mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def estimate(values: dict[tuple[str, str, str], float], has_tumor=None) -> Estimate | None:
    """Estimate the mean of {(fold, case, seed): value}, or its AUC if {case: has_tumor} is given.

    None if there are no values (AUC: no pair of patients with and without tumor in any fold).
    """
    if not values:
        return None
    cases = sorted({(fold, case) for fold, case, _ in values})
    seeds = sorted({seed for *_, seed in values})
    grid = np.full((len(cases), len(seeds)), np.nan)
    for (fold, case, seed), value in values.items():
        grid[cases.index((fold, case)), seeds.index(seed)] = value
    folds = [fold for fold, _ in cases]
    patients = [case.rpartition("__")[0] or case for _, case in cases]  # PATIENT__STUDY
    if has_tumor is None:
        mean, *draws = bootstrap_means(grid, patients, folds)
    else:
        positive = [has_tumor[case] for _, case in cases]
        mean, *draws = bootstrap_auc(grid, positive, patients, folds)
    if np.isnan(mean):
        return None
    return Estimate(mean, np.array(draws), len(cases), len(set(patients)), fewest_seeds(values))


def fewest_seeds(keys) -> int:
    """The number of seeds of the fold that has the fewest, from (fold, case, seed)."""
    seeds: dict[str, set] = {}
    for fold, _, seed in keys:
        seeds.setdefault(fold, set()).add(seed)
    return min(map(len, seeds.values()))


def difference(
    rows: list[dict], first: str, second: str, measure: str = "dice", target: str = "seg"
) -> Estimate | None:
    """Estimate first minus second, on the folds, cases and seeds that both have."""
    a = values_of(rows, first, measure, target)
    b = values_of(rows, second, measure, target)
    return estimate({key: a[key] - b[key] for key in a if key in b})


def resample(known, groups=None, blocks=None, resamples: int = 10_000, seed: int = 0):
    """Draw patients over all folds, and trainings in each fold, with replacement.

    Args:
        known: (N, S) bool, which of N cases have a value from which of S trainings (seeds).
        groups: (N,) names; cases of the same name (a patient) are drawn together. Default: each
            case is drawn separately.
        blocks: (N,) the fold of each case. Equal seeds of different folds are different trainings,
            so each fold draws among its own. Default: one fold.
        seed: of the draws; equal arguments give equal draws.

    Yields per fold (indices of its n cases, how often each is drawn (1 + resamples, n), the weight
    of each training (1 + resamples, S)). The first row is the sample itself. Of S trainings S - 1
    are drawn, which makes the variance of their mean right on average (Rao and Wu, JASA 1988);
    S draws would give (S - 1) / S of it, a third too little with three seeds. Patients are many.
    """
    groups = np.arange(len(known)) if groups is None else np.asarray(groups)
    blocks = np.zeros(len(known)) if blocks is None else np.asarray(blocks)
    _, group = np.unique(groups, return_inverse=True)
    n = group.max() + 1
    rng = np.random.default_rng(seed)
    patients = rng.multinomial(n, np.full(n, 1 / n), resamples)
    cases = np.vstack([np.ones(n), patients])[:, group]  # (1 + resamples, N)
    for block in np.unique(blocks):
        rows = np.flatnonzero(blocks == block)
        trained = known[rows].any(0)  # (S,)
        if trained.any():
            share, take = trained / trained.sum(), max(trained.sum() - 1, 1)
            drawn = rng.multinomial(take, share, resamples) / take
            yield rows, cases[:, rows], np.vstack([share, drawn])


def bootstrap_means(values, groups=None, blocks=None, resamples=10_000, seed=0) -> np.ndarray:
    """The mean of values and its bootstrap distribution: (1 + resamples,).

    values: (N,), or (N, S) for S trainings with different seeds; NaN is unknown and ignored. The
    others are those of `resample`. A mean is NaN if no known value happens to be drawn.
    """
    values = np.asarray(values, float).reshape(len(values), -1)
    known = ~np.isnan(values)
    sums, counts = np.zeros((2, 1 + resamples))
    for rows, cases, trainings in resample(known, groups, blocks, resamples, seed):
        sums += (cases @ np.nan_to_num(values[rows]) * trainings).sum(1)
        counts += (cases @ known[rows] * trainings).sum(1)
    with np.errstate(invalid="ignore"):  # 0 / 0 if no known value is drawn
        return sums / counts


def bootstrap_auc(
    scores, positive, groups=None, blocks=None, resamples=2_000, seed=0
) -> np.ndarray:
    """The area under the ROC curve and its bootstrap distribution: (1 + resamples,).

    scores: (N, S) as the values of `bootstrap_means`. positive: (N,) bool. The AUC is the share of
    pairs, a patient with tumor and one without, of whom the first has the higher score; ties count
    half. Both are scored by the same training, as scores of two networks need not have one scale.
    """
    scores, positive = np.asarray(scores, float), np.asarray(positive, bool)
    known = ~np.isnan(scores)
    won, pairs = np.zeros((2, 1 + resamples))
    for rows, cases, trainings in resample(known, groups, blocks, resamples, seed):
        for s, weight in enumerate(trainings.T):
            mine = known[rows, s]
            with_tumor, without = mine & positive[rows], mine & ~positive[rows]
            lead = scores[rows[with_tumor], s][:, None] - scores[rows[without], s]
            right = (lead > 0) + (lead == 0) / 2  # per pair
            won += weight * (cases[:, with_tumor] @ right * cases[:, without]).sum(1)
            pairs += weight * cases[:, with_tumor].sum(1) * cases[:, without].sum(1)
    with np.errstate(invalid="ignore"):  # 0 / 0 if no pair is drawn
        return won / pairs


def interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of draws from `bootstrap_means`."""
    low, high = np.nanpercentile(draws, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


# ----------------------------------------------------------------------------------------- verdicts
SEEN, NOT_SEEN, OPEN = "seen", "not seen", "inconclusive"
FEWEST, FEWEST_SEEDS = 10, 2  # patients, seeds; an interval over fewer is not to be trusted
RULE = f"""\
Means are over cases; brackets hold the 95 % bootstrap interval (10,000 resamples; AUC: 2,000).
Patients are drawn over all folds, with all their studies. Trainings are drawn in each fold: a
training, one per fold and seed, is lucky on its own fold's cases only. *Seeds* is how many stand
behind a number, in the fold that has the fewest. If the luck of trainings outweighs the differences
between patients, intervals are a little narrow: in simulations of five folds they cover the truth
in 91 % of cases with three seeds, and in 88 % with two. AUC is the share of pairs, a patient with
tumor and one without, both scored by one training, of whom the first has the higher score.

A difference is the first system minus the second, on the same cases. An order is *seen* if the
interval of its difference lies on the claimed side of 0, *not seen* if it lies on the other side,
and otherwise *inconclusive*; over fewer than {FEWEST} patients or {FEWEST_SEEDS} seeds it is always
*inconclusive*.
A claim is *seen* if each of its orders is, and *not seen* if one of its m orders is reversed by an
interval of level 1 - 0.05/m (Bonferroni: of many orders, one may be reversed by chance); otherwise
it is *inconclusive*. A claim of "no difference" is judged by its margin instead of 0."""


def judge(draws: np.ndarray, level: float = 0.95, margin: float | None = None) -> str:
    """Judge draws of a difference that is claimed to be positive, or with a margin to be small."""
    low, high = interval(draws, level)
    if margin is None:
        seen, not_seen = low > 0, high < 0
    else:
        seen = -margin < low and high < margin
        not_seen = low > margin or high < -margin
    if seen:
        return SEEN
    return NOT_SEEN if not_seen else OPEN


def judge_order(order: Order, found: Estimate | None, level: float = 0.95, margin=None) -> str:
    """Judge an order by its difference, which is None if it has not been run."""
    if found is None or found.patients < FEWEST or found.seeds < FEWEST_SEEDS:
        return OPEN
    return judge(MEASURES[order.measure].sign * found.draws, level, margin)


def verdict(claim: Claim, found: list[Estimate | None]) -> str:
    """Judge a claim by the difference of each of its orders, None if it has not been run."""
    pairs = list(zip(claim.orders, found, strict=True))
    level = 1 - 0.05 / len(found)  # Bonferroni
    if any(judge_order(o, f, level, claim.margin) == NOT_SEEN for o, f in pairs):
        return NOT_SEEN
    each = {judge_order(o, f, margin=claim.margin) for o, f in pairs}
    return SEEN if each == {SEEN} else OPEN


# --------------------------------------------------------------------------------------- the report
ANSWERS = {  # source of the results: the data of the claims that it can answer; default: its own
    "demo": ("petct",),
    "petct": ("petct", "phantom"),  # AutoPET, too, has patients without tumor
}


def report(results: Path, source: str) -> Path | None:
    """Turn SOURCE.csv into SOURCE.md and SOURCE.png; None if there is no such csv file.

    The study with the most seeds comes first; of equal ones, that with the most runs.
    """
    studies: dict[str, list[dict]] = {}
    for row in read_results(results / f"{source}.csv"):
        studies.setdefault(row["study"], []).append(row)
    if not studies:
        return None
    parts = []

    def most(study: str) -> tuple[int, int]:
        return -count(studies[study], "seed"), -count(studies[study], "run")

    for study in sorted(studies, key=most):
        rows = studies[study]
        picture = results / (f"{source}_{study}.png" if parts else f"{source}.png")
        parts.append(f"## Study {study}\n\n{report_study(rows, source, picture)}")
    head = f"Written by `python replicate.py --report` from [{source}.csv]({source}.csv)."
    with atomic_write(results / f"{source}.md") as part:
        part.write_text(f"# {source}\n\n{head}\n{RULE}\n\n" + "\n\n".join(parts) + "\n")
    return results / f"{source}.md"


def report_study(rows: list[dict], source: str, picture: Path) -> str:
    """Markdown for runs that may be compared; draws a figure per target."""
    first, commits = rows[0], sorted({r["commit"] for r in rows})
    options = first["options"].partition(" --model")[0]  # all runs have these in common
    out = [
        f"{first['preset']} preset, {first['steps']} steps per run, {count(rows, 'case')} cases, "
        f"{first['folds']} folds, {count(rows, 'seed')} seed(s);\n"
        f"commit {', '.join(commits)}; options `{options}`.\n"
    ]
    claims = [c for c in CLAIMS if c.data in ANSWERS.get(source, (source,))]
    found = {c: [difference(rows, *o) for o in c.orders] for c in claims}
    run = {c: f for c, f in found.items() if any(f)}
    if run:
        out += [summary(run), ""]
    for target in dict.fromkeys(r["target"] for r in rows):
        path = picture
        if target != "seg":
            path = picture.with_stem(f"{picture.stem}_{target}")
            out.append(f"**{target}**\n")
        mine = [r for r in rows if r["target"] == target]
        out += [compare_systems(mine, target, path), f"\n![{source} {target}]({path.name})\n"]
        out += rejection_section(mine, path.with_stem(f"{path.stem}_rejection"))
    out += [claim_section(c, f) for c, f in run.items()]
    missing = {str(c.number) for c in found} - {str(c.number) for c in run}
    if missing:
        out.append(f"Not run: claims {', '.join(sorted(missing))}.")
    return "\n".join(out)


def count(rows: list[dict], column: str) -> int:
    """Count the different values of a column."""
    return len({row[column] for row in rows})


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    return "\n".join(
        f"| {' | '.join(map(str, row))} |" for row in [header, ["---"] * len(header), *rows]
    )


def summary(found: dict[Claim, list[Estimate | None]]) -> str:
    """The table of claims and verdicts."""
    lines = []
    for claim, differences in found.items():
        seeds = [d.seeds for d in differences if d]
        run = f"{len(seeds)} of {len(differences)}"
        judged = f"**{verdict(claim, differences)}**"
        lines.append([claim.number, claim.text, judged, run, min(seeds)])
    return table(["claim", "", "verdict", "comparisons run", "fewest seeds"], lines)


def compare_systems(rows: list[dict], target: str, picture: Path) -> str:
    """The table of all systems for one target; draws its figure."""
    names = list(dict.fromkeys(e.name for e in EXPERIMENTS))
    names = [name for name in names if any(r["system"] == name for r in rows)]
    reference = "v2" if "v2" in names else names[0]
    paired = f"Dice, difference from {reference}"
    lines, bars = [], {}
    for name in names:
        mine = [r for r in rows if r["system"] == name]
        found = {
            title: estimate(values_of(mine, name, measure, target))
            for measure, (title, _) in MEASURES.items()
        }
        found[paired] = None
        if name != reference:
            found[paired] = difference(rows, name, reference, "dice", target)
        found["AUC"] = classifier_auc(mine)
        if not found["AUC"]:  # without patients of both kinds, neither says anything alone
            found |= {MEASURES[m].title: None for m in ("sensitivity", "specificity")}
        cases, done = count(mine, "case"), count(mine, "run")
        seeds = min(f.seeds for f in found.values() if f)  # behind each number of the row
        total = int(mine[0]["folds"]) * count(mine, "seed")
        runs = f"{done} of {total}" + ", incomplete" * (done < total)
        line = {"system": name, "runs": runs, "seeds": seeds, "cases": cases}
        lines.append(line | {"Dice": found["Dice"], paired: found[paired]} | found)
        shown = {title: bar(found[title]) for title in ("Dice", paired, "FPV ml", "FNV ml")}
        bars[name] = cases, seeds, shown
    figures.systems(bars, picture)
    columns = [column for column in lines[0] if any(line[column] for line in lines)]
    return table(columns, [[line[column] or "–" for column in columns] for line in lines])


def bar(found: Estimate | None) -> tuple[float, float, float] | None:
    """(mean, low, high) for `figures.systems`."""
    return (found.mean, *interval(found.draws)) if found else None


def classifier_auc(rows: list[dict]) -> Estimate | None:
    """Estimate the AUC of one system's classifier; None if it has none."""
    scores = {
        (r["fold"], r["case"], r["seed"]): float(r["tumor_score"]) for r in rows if r["tumor_score"]
    }
    return estimate(scores, {r["case"]: r["has_tumor"] == "True" for r in rows})


ALLOWED = 0.02  # share of the studies with tumor that may lose their mask


def rejection_section(rows: list[dict], picture: Path) -> list[str]:
    """What `predict.py --reject-below P` would do, for systems with a score; draws its figure.

    Without such a system, or without patients of both kinds, there is nothing: [].
    """
    scored = [r for r in rows if r["tumor_score"]]
    if count(scored, "has_tumor") < 2:
        return []
    curves, lines = {}, []
    for name in dict.fromkeys(r["system"] for r in scored):
        mine = [r for r in scored if r["system"] == name]
        if count(mine, "has_tumor") < 2:
            continue
        curves[name] = [(p, *map(bar, rejection(mine, p))) for p in np.linspace(0, 1, 21)]
        chosen = {f"{p:g}": p for p in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)}
        low = threshold_for(mine, ALLOWED)
        chosen[f"{low:.4f}, the highest that loses at most {100 * ALLOWED:g} %"] = low
        for title, p in chosen.items():
            fpv, lost = rejection(mine, p)
            lines.append([name, title, fpv.seeds, fpv, lost])
    figures.rejection(curves, picture)
    header = ["system", "P", "seeds", "FPV ml, patients without tumor", "share of tumors lost"]
    text = (
        "**Masks emptied if the tumor score is below P** (`predict.py --reject-below P`);\n"
        "each system's last P was chosen on these same patients."
    )
    return [f"{text}\n\n{table(header, lines)}\n\n![FPV and lost tumors]({picture.name})\n"]


def rejection(rows: list[dict], p: float) -> tuple[Estimate, Estimate]:
    """Estimate FPV (ml) of patients without tumor, and the share of those with tumor who lose it.

    The mask of a study is emptied if its score is below p. rows: of one system with a score, and of
    patients of both kinds.
    """
    fpv, lost = {}, {}
    for r in rows:
        key, rejected = (r["fold"], r["case"], r["seed"]), float(r["tumor_score"]) < p
        if r["has_tumor"] == "True":
            lost[key] = float(rejected)
        else:
            fpv[key] = 0.0 if rejected else float(r["fpv_ml"])
    mean_fpv, share_lost = estimate(fpv), estimate(lost)
    assert mean_fpv and share_lost
    return mean_fpv, share_lost


def threshold_for(rows: list[dict], allowed: float) -> float:
    """The highest P that empties the masks of at most this share of the studies with tumor."""
    scores = sorted(float(r["tumor_score"]) for r in rows if r["has_tumor"] == "True")
    return scores[int(allowed * len(scores))]


def claim_section(claim: Claim, found: list[Estimate | None]) -> str:
    """The table of a claim's orders, those that have been run."""
    lines = []
    for order, estimated in zip(claim.orders, found):
        if estimated is None:
            continue
        title = MEASURES[order.measure].title
        if order.target != "seg":
            title += f", {order.target}"
        judged = judge_order(order, estimated, margin=claim.margin)
        numbers = [estimated.seeds, estimated.cases, estimated]
        lines.append([order.better, order.worse, title, *numbers, judged])
    header = ["first", "second", "in", "seeds", "cases", "difference", "as claimed?"]
    return f"**Claim {claim.number}**: {claim.text}\n\n{table(header, lines)}\n"
