"""The paper's claims, as orders between systems, and what results/SOURCE.csv says of each: tables, verdicts, a figure.

An interval is a 95 % bootstrap interval over patients (all studies of a patient together) and seeds, of 10,000 resamples. Two systems are
compared by the differences on the cases that both have predicted: a hard case is hard for both, and cancels out.
"""

import csv
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

import figures
from files import UserError, atomic_write
from metrics import patient_metrics


# --------------------------------------------------------------------------------------------------------- what is claimed
@dataclass(frozen=True)
class Experiment:
    """One system: its name in tables, the data it is for (petct | phantom | brain), and its options of train.py."""

    name: str
    data: str
    options: str


class Order(NamedTuple):
    """The claim that `better` beats `worse` in a measure; `target` is what is segmented."""

    better: str
    worse: str
    measure: str = "dice"
    target: str = "seg"


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, and the orders that it consists of. With a margin the claim is that no difference exceeds it."""

    number: int  # the paper's 1-7 of the README; 8 and 9 are ours
    data: str
    text: str
    orders: tuple[Order, ...]
    margin: float | None = None
    paper: bool = False  # too much for the laptop preset


MEASURES = {  # column of the csv: what it is, and whether more (+1) or less (-1) of it is better
    "dice": ("Dice", 1), "fpv_ml": ("FPV ml", -1), "fnv_ml": ("FNV ml", -1), "healthy_fpv_ml": ("FPV ml, healthy patients", -1),
    "ct_clean": ("CT error HU, clean input", -1), "ct_noise": ("CT error HU, noisy input", -1),
    "ct_shuffle": ("CT error HU, shuffled input", -1),
}  # fmt: skip

VERSIONS, MIRROR = ("v1", "v2", "v3", "v4"), ("v1", "v2", "v3")
SHARES = ("3", "4", "6", "7", "4 5 6", "3 4 5 6 7")
FUSION = ("ef", "mf", "lf")  # early, mid, late
VARIED = ("lambda-rec 1e-4", "lambda-rec 1e-2", "cube 8", "cube 32", "cubes 4")
JOINT = [(skips, tasks) for skips in ("pet", "both") for tasks in ("v2", "none")]

EXPERIMENTS = [
    *[Experiment(m, "petct", f"--model {m}") for m in (*VERSIONS, "ct", "pet", *FUSION, "multitask", "valindria", "nnunet", "blackbean")],
    *[Experiment(f"{m} {how}", "petct", f"--model {m} --corrupt {how}") for m in MIRROR for how in ("noise", "none")],
    *[Experiment(f"v2 share {levels}", "petct", f"--model v2 --share {levels}") for levels in SHARES],
    *[Experiment(f"v2 {option}", "petct", f"--model v2 --{option}") for option in VARIED],
    *[Experiment(f"joint {s} {t}", "petct", f"--model joint --skips {s} --tasks {t}") for s, t in JOINT],
    *[Experiment(m, "phantom", f"--model {m}") for m in ("v2", "v3")],
    *[Experiment(m, "brain", f"--model {m}") for m in ("v2", "v1", "v2-rec", "nnunet", "segresnet")],
]


def beats(better, worse, *measures: str, targets=("seg",)) -> tuple[Order, ...]:
    """Each of the systems `better` beats each of `worse`, in every measure (Dice) and target."""
    return tuple(Order(*o) for o in product(better, worse, measures or ("dice",), targets))


CLAIMS = [
    Claim(1, "petct", "v4 < v1 < v2 < v3", (Order("v1", "v4"), Order("v2", "v1"), Order("v3", "v2"))),
    Claim(2, "petct", "the CT is reconstructed better after voxel shuffling than noise, and than nothing (v2)",
          (Order("v2", "v2 noise", "ct_clean"), Order("v2 noise", "v2 none", "ct_clean"))),
    Claim(2, "petct", "segmentation follows: shuffling > noise > none (v2)", (Order("v2", "v2 noise"), Order("v2 noise", "v2 none"))),
    Claim(2, "petct", "the same in v1 and v3",
          tuple(o for v in ("v1", "v3") for o in (Order(v, f"{v} noise"), Order(f"{v} noise", f"{v} none"))), paper=True),
    Claim(3, "petct", "sharing the bottleneck alone, {5}, is best", beats(["v2"], [f"v2 share {s}" for s in SHARES])),
    Claim(4, "petct", "CT alone is poor", (Order("pet", "ct"),)),
    Claim(4, "petct", "PET alone beats early, mid and late fusion", beats(["pet"], FUSION)),
    Claim(4, "petct", "but PET alone has more false-positive volume than fusion", beats(FUSION, ["pet"], "fpv_ml")),
    Claim(4, "petct", "every version beats CT, PET and fusion in Dice", beats(VERSIONS, ["ct", "pet", *FUSION])),
    Claim(4, "petct", "every version beats them in FPV", beats(VERSIONS, ["ct", "pet", *FUSION], "fpv_ml")),
    Claim(4, "petct", "every version beats them in FNV", beats(VERSIONS, ["ct", "pet", *FUSION], "fnv_ml")),
    Claim(5, "petct", "both ideas beat fission alone (v4, valindria), multi-task alone (multitask) and neither (ef)",
          beats(MIRROR, ["v4", "valindria", "multitask", "ef"])),
    Claim(5, "petct", "they beat nnU-Net and Blackbean", beats(MIRROR, ["nnunet", "blackbean"])),
    Claim(6, "brain", "v2 beats nnU-Net, SegResNet, v1 and v2-rec on core and edema",
          beats(["v2"], ["nnunet", "segresnet", "v1", "v2-rec"], targets=("core", "edema"))),
    Claim(6, "brain", "v2-rec is second there", beats(["v2-rec"], ["nnunet", "segresnet", "v1"], targets=("core", "edema"))),
    Claim(7, "petct", "hyper-parameters matter little: Dice within 0.05 of the default's",
          beats([f"v2 {v}" for v in VARIED], ["v2"]), margin=0.05),
    Claim(8, "petct", "ours: bottleneck features of both modalities beat shared weights",
          beats(["joint pet v2", "joint both v2"], ["v2"])),
    Claim(8, "petct", "ours: they beat early fusion", beats(["joint pet v2", "joint both v2"], ["ef"])),
    Claim(8, "petct", "ours: there, too, reconstruction helps",
          (Order("joint pet v2", "joint pet none"), Order("joint both v2", "joint both none"))),
    Claim(9, "phantom", "ours, on patients who may be healthy: v3's classifier lowers v2's FPV",
          beats(["v3"], ["v2"], "fpv_ml", "healthy_fpv_ml")),
]  # fmt: skip


def systems_of(claim: Claim) -> set[str]:
    """The names of the systems that its orders compare."""
    return {name for o in claim.orders for name in (o.better, o.worse)}


def experiments_for(numbers: list[int], only: list[str], preset: str) -> list[Experiment]:
    """The experiments of some claims. Raises UserError for a claim or a name that does not exist."""
    known = {c.number for c in CLAIMS}
    if not set(numbers) <= known:
        raise UserError(f"--claims {' '.join(map(str, numbers))}: there are claims {min(known)} to {max(known)}; --list shows them")
    unknown = set(only) - {e.name for e in EXPERIMENTS}
    if unknown:
        raise UserError(f"--only {sorted(unknown)}: no such system; --list shows them (quote a name with spaces)")
    claims = [c for c in CLAIMS if (c.number in numbers or not numbers) and (preset == "paper" or not c.paper)]
    wanted = {(c.data, name) for c in claims for name in systems_of(c)}
    return [e for e in EXPERIMENTS if (e.data, e.name) in wanted and (not only or e.name in only)]


# ----------------------------------------------------------------------------------------------------------- what was seen
SEEN, NOT_SEEN, OPEN = "seen", "not seen", "can't be told at this scale"
FEWEST = 10  # patients; an interval over fewer is not to be trusted
RULE = f"""\
Means are over cases; in brackets the 95 % bootstrap interval over patients and seeds (10,000 resamples). A difference is that of the
same cases, first system minus second. An order is *seen* where the interval of its difference lies on the claimed side of 0, *not seen*
where it lies on the other side, else it can't be told; nor can it over fewer than {FEWEST} patients. A claim is *seen* where each of its
orders is, and *not seen* where one of them is reversed, by an interval of level 1 - 0.05/m where it consists of m orders: one of many
goes astray by chance. A claim of "no difference" is judged by its margin in place of 0."""


def read_rows(path: Path) -> list[dict]:
    """A csv file as strings; [] where there is none."""
    if not path.exists():
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def values_of(rows: list[dict], system: str, measure: str, target: str = "seg") -> dict[tuple[str, str], float]:
    """{(case, seed): value} where it is defined. healthy_fpv_ml: the FPV of patients without a tumor."""
    column = measure.removeprefix("healthy_")
    mine = (r for r in rows if r["system"] == system and r["target"] == target and r[column])
    return {(r["case"], r["seed"]): float(r[column]) for r in mine if column == measure or r["has_tumor"] == "False"}


class Estimate(NamedTuple):
    """A mean over cases, its bootstrap distribution, and how many cases and patients it is over."""

    mean: float
    draws: np.ndarray
    cases: int
    patients: int

    def __str__(self) -> str:
        low, high = interval(self.draws)
        digits = 1 if abs(self.mean) >= 10 else 3
        return f"{self.mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def estimate(values: dict[tuple[str, str], float]) -> Estimate | None:
    """Of `values_of`'s, or of their differences; None where there are none."""
    if not values:
        return None
    cases, seeds = (sorted({key[i] for key in values}) for i in (0, 1))
    grid = np.full((len(cases), len(seeds)), np.nan)
    for (case, seed), v in values.items():
        grid[cases.index(case), seeds.index(seed)] = v
    patients = [case.rpartition("__")[0] or case for case in cases]  # PATIENT__STUDY
    return Estimate(float(np.nanmean(grid)), bootstrap_means(grid, patients), len(cases), len(set(patients)))


def difference(rows: list[dict], first: str, second: str, measure: str = "dice", target: str = "seg") -> Estimate | None:
    """First minus second, of the cases and seeds that both have."""
    a, b = (values_of(rows, system, measure, target) for system in (first, second))
    return estimate({key: a[key] - b[key] for key in a if key in b})


def bootstrap_means(values, groups=None, resamples: int = 10_000, seed: int = 0) -> np.ndarray:
    """What the mean might have been with other cases, and other seeds: (resamples,) means of values drawn anew, with replacement.

    Args:
        values: (N,), or (N, S) for S trainings that differ by their seed; NaN is unknown and counts nowhere.
        groups: (N,) names; the cases of one name (a patient) are drawn together. Default: each case for itself.
        seed: of the draws; equal arguments give equal draws.

    A column is drawn as cases are: a network that was lucky is so on all of them. With one column only cases are drawn. A mean is NaN
    where by chance no known value was drawn.
    """
    values = np.asarray(values, float).reshape(len(values), -1)
    _, group = np.unique(np.arange(len(values)) if groups is None else np.asarray(groups), return_inverse=True)
    sums, counts = np.zeros((2, group.max() + 1, values.shape[1]))
    np.add.at(sums, group, np.nan_to_num(values))
    np.add.at(counts, group, ~np.isnan(values))
    rng, (n, s) = np.random.default_rng(seed), sums.shape
    how_often, which = rng.multinomial(n, np.full(n, 1 / n), resamples), rng.multinomial(s, np.full(s, 1 / s), resamples)
    with np.errstate(invalid="ignore"):  # no value drawn at all
        return (how_often @ sums * which).sum(1) / (how_often @ counts * which).sum(1)


def interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of `bootstrap_means`."""
    low, high = np.nanpercentile(draws, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def judge(draws: np.ndarray, level: float = 0.95, margin: float | None = None) -> str:
    """Of differences that are positive where they are as claimed; with a margin: that are small where they are as claimed."""
    low, high = interval(draws, level)
    if margin is not None:
        return SEEN if -margin < low and high < margin else NOT_SEEN if low > margin or high < -margin else OPEN
    return SEEN if low > 0 else NOT_SEEN if high < 0 else OPEN


def verdict(claim: Claim, found: list[Estimate | None]) -> str:
    """Of a claim, from the difference of each of its orders (None: not run)."""
    judged = [(MEASURES[o.measure][1] * f.draws) for o, f in zip(claim.orders, found) if f and f.patients >= FEWEST]
    if any(judge(draws, 1 - 0.05 / len(found), claim.margin) == NOT_SEEN for draws in judged):
        return NOT_SEEN
    return SEEN if len(judged) == len(found) and all(judge(draws, margin=claim.margin) == SEEN for draws in judged) else OPEN


AUC = "ill or healthy: AUC, accuracy"


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [header, ["---"] * len(header), *rows])


def report_study(rows: list[dict], source: str, picture: Path) -> str:
    """Markdown of the runs that may be compared, and their figures, one a target."""
    first, commits = rows[0], ", ".join(sorted({r["commit"] for r in rows}))
    cases, seeds = ({r[k] for r in rows} for k in ("case", "seed"))
    out = [
        f"{first['preset']} preset, {first['steps']} steps a run, {len(cases)} cases, {first['folds']} folds, {len(seeds)} seed(s);\n"
        f"commit {commits}; options `{common_options(rows)}`.\n"
    ]
    for target in dict.fromkeys(r["target"] for r in rows):
        path = picture.with_stem(picture.stem + ("" if target == "seg" else f"_{target}"))
        out += [] if target == "seg" else [f"**{target}**\n"]
        out += [compare_systems([r for r in rows if r["target"] == target], target, path), f"\n![{source} {target}]({path.name})\n"]
    kinds = {"demo": ("petct",), "petct": ("petct", "phantom")}.get(source, (source,))
    found = {c: [difference(rows, *o) for o in c.orders] for c in CLAIMS if c.data in kinds}
    run = {c: f for c, f in found.items() if any(f)}
    summary = [[c.number, c.text, f"**{verdict(c, f)}**", f"{sum(map(bool, f))} of {len(f)}"] for c, f in run.items()]
    out[1:1] = [table(["claim", "", "verdict", "comparisons run"], summary), ""] if run else []
    missing = sorted({str(c.number) for c in found} - {str(c.number) for c in run})
    out += [claim_section(c, f) for c, f in run.items()]
    return "\n".join([*out, f"Not run: claims {', '.join(missing)}."] if missing else out)


def compare_systems(rows: list[dict], target: str, picture: Path) -> str:
    """The table of all systems in one target, and its figure."""
    names = [name for name in dict.fromkeys(e.name for e in EXPERIMENTS) if any(r["system"] == name for r in rows)]
    reference = "v2" if "v2" in names else names[0]
    paired = f"Dice, difference from {reference}"
    lines, bars = [], {}
    for name in names:
        mine = [r for r in rows if r["system"] == name]
        found = {what: estimate(values_of(rows, name, m, target)) for m, (what, _) in MEASURES.items()}
        found[paired] = difference(rows, name, reference, "dice", target) if name != reference else None
        done, total = len({r["run"] for r in mine}), int(mine[0]["folds"]) * len({r["seed"] for r in mine})
        folds = f"{done} of {total}" + (", incomplete" if done < total else "")
        lines.append({"system": name, "folds": folds, "cases": len({r["case"] for r in mine})} | found | {AUC: patients_told_apart(mine)})
        bars[name if done == total else f"{name}, {lines[-1]['cases']} cases"] = {
            what: found[what] and (found[what].mean, *interval(found[what].draws)) for what in ("Dice", paired, "FPV ml", "FNV ml")
        }
    figures.systems(bars, picture)
    columns = ["system", "folds", "cases", "Dice", paired, *[what for what, _ in MEASURES.values() if what != "Dice"], AUC]
    columns = [c for c in columns if any(line[c] for line in lines)]
    return table(columns, [[line[c] or "–" for c in columns] for line in lines])


def claim_section(claim: Claim, found: list[Estimate | None]) -> str:
    """A claim's orders, those that have been run."""
    lines = []
    for o, f in zip(claim.orders, found):
        if f:
            how = judge(MEASURES[o.measure][1] * f.draws, margin=claim.margin) if f.patients >= FEWEST else OPEN
            measure = MEASURES[o.measure][0] + ("" if o.target == "seg" else f", {o.target}")
            lines.append([o.better, o.worse, measure, f.cases, f, how])
    header = ["first", "second", "in", "cases", "difference", "as claimed?"]
    return f"**Claim {claim.number}**: {claim.text}\n\n{table(header, lines)}\n"


def patients_told_apart(rows: list[dict]) -> str:
    """A classifier's area under the ROC curve and accuracy over all held-out cases; "" where the network has none."""
    scored = [r for r in rows if r["tumor_score"]]
    if not scored or len({r["has_tumor"] for r in scored}) < 2:
        return ""
    got = patient_metrics([float(r["tumor_score"]) for r in scored], [r["has_tumor"] == "True" for r in scored])
    return f"{got['auc']:.2f}, {got['accuracy']:.2f}"


def common_options(rows: list[dict]) -> str:
    """The start that the options of all runs share, up to the model."""
    return rows[0]["options"].partition(" --model")[0]


def report(results: Path, source: str) -> Path | None:
    """SOURCE.csv -> SOURCE.md and SOURCE.png; the study with the most runs comes first. None where there is no such file."""
    rows = read_rows(results / f"{source}.csv")
    if not rows:
        return None
    studies: dict[str, list[dict]] = {}
    for row in rows:
        studies.setdefault(row["study"], []).append(row)
    parts = []
    for study, mine in sorted(studies.items(), key=lambda item: -len({r["run"] for r in item[1]})):
        picture = results / (f"{source}.png" if not parts else f"{source}_{study}.png")
        parts.append(f"## Study {study}\n\n" + report_study(mine, source, picture))
    with atomic_write(results / f"{source}.md") as part:
        part.write_text(
            f"# {source}\n\nWritten by `python replicate.py --report` from [{source}.csv]({source}.csv).\n{RULE}\n\n"
            + "\n\n".join(parts)
            + "\n"
        )
    return results / f"{source}.md"
