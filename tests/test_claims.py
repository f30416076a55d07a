"""Intervals, verdicts and the report: intervals cover the truth, verdicts follow their rule."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import claims
import figures
from claims import (
    NOT_SEEN,
    OPEN,
    SEEN,
    Claim,
    Estimate,
    Order,
    bootstrap_auc,
    bootstrap_means,
    interval,
    judge,
    read_results,
    read_rows,
    value_of,
    values_of,
    verdict,
)
from files import UserError, write_table
from metrics import patient_metrics


# ---------------------------------------------------------------------------------------- intervals
def test_bootstrap_means_of_two_values_by_hand():
    """Two values drawn twice: their means are 0, 1/2, 1 with probability 1/4, 1/2, 1/4."""
    mean, *draws = bootstrap_means([0.0, 1.0], resamples=40_000)
    assert mean == 0.5
    shares = np.bincount((2 * np.array(draws)).astype(int)) / 40_000
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.01)
    assert interval(draws) == (0, 1)
    assert (bootstrap_means([0.0, 1.0], resamples=40_000)[1:] == draws).all()
    assert (bootstrap_means([0.0, 1.0], resamples=40_000, seed=1)[1:] != draws).any()


def test_cases_of_a_patient_are_drawn_together():
    values = np.array([0.0, 0.0, 1.0, 1.0])
    assert set(bootstrap_means(values, ["a", "a", "b", "b"])) == {0.0, 0.5, 1.0}
    assert set(bootstrap_means(values, ["a", "b", "c", "d"])) == {0.0, 0.25, 0.5, 0.75, 1.0}


def test_trainings_are_drawn_independently_of_the_cases():
    lucky = np.array([[0.0, 1.0]] * 5)  # the second training is better on every case
    draws = bootstrap_means(lucky)
    assert draws[0] == 0.5 and set(draws[1:]) == {0.0, 1.0}
    assert np.mean(draws) == pytest.approx(0.5, abs=0.02)


def test_the_variance_of_trainings_is_right_by_hand():
    """Values 0, 1, 2 of three trainings: s^2 = 1, and that of their mean is 1/3; drawing two of
    three gives it, (2/3) / 2, while three of three would give 2/9."""
    draws = bootstrap_means(np.array([[0.0, 1.0, 2.0]] * 4), resamples=40_000)
    assert set(draws) == {0.0, 0.5, 1.0, 1.5, 2.0}
    assert np.var(draws[1:]) == pytest.approx(1 / 3, abs=0.01)


def test_each_fold_draws_its_own_trainings_by_hand():
    """A training is lucky in its fold only. Two folds of one case (drawn together, as one patient),
    each with values 0 and 1: the mean of two independent draws is 0, 1/2, 1 with probability 1/4,
    1/2, 1/4. As one fold, both cases would always share the luck of one training."""
    lucky = np.array([[0.0, 1.0], [0.0, 1.0]])
    draws = bootstrap_means(lucky, ["a", "a"], ["fold 0", "fold 1"], resamples=40_000)
    shares = np.bincount((2 * draws[1:]).astype(int)) / 40_000
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.01)
    assert set(bootstrap_means(lucky, ["a", "a"])[1:]) == {0.0, 1.0}


def test_a_fold_with_fewer_seeds_draws_among_those_it_has_and_counts_as_much():
    """Fold 0 has one training (value 0), fold 1 three (all 1): the mean over cases is 1/2."""
    values = np.array([[0.0, math.nan, math.nan], [1.0, 1.0, 1.0]])
    assert set(bootstrap_means(values, ["a", "a"], [0, 1])) == {0.5}


def test_unknown_values_count_nowhere():
    draws = bootstrap_means(np.array([[0.0, math.nan]] * 3 + [[1.0, 1.0]]))
    assert np.nanmax(draws) == 1 and np.nanmin(draws) == 0
    assert draws[0] == pytest.approx(2 / 5)
    nothing = np.array([[math.nan], [1.0]])
    assert set(bootstrap_means(nothing, ["a", "a"], [0, 1])) == {1.0}


def test_a_mean_without_any_known_value_is_nan():
    draws = bootstrap_means(np.array([math.nan, 1.0]))
    assert set(draws[~np.isnan(draws)]) == {1.0}
    assert np.isnan(draws).mean() == pytest.approx(0.25, abs=0.03)  # the first value drawn twice
    assert interval(draws) == (1, 1)


def test_the_interval_equals_that_of_scipy():
    rng = np.random.default_rng(0)
    values = rng.gamma(2.0, size=40)
    options = dict(n_resamples=10_000, method="percentile", rng=rng)
    expected = stats.bootstrap((values,), np.mean, **options).confidence_interval
    assert interval(bootstrap_means(values)) == pytest.approx(tuple(expected), rel=0.02)


def coverage(case: float, luck: float, rest: float, seeds: int, folds: int = 5) -> float:
    """How often the interval covers the true mean, 0, in 200 simulated studies of 8 cases per fold.

    case, luck, rest: standard deviations between cases, between trainings (of a fold and a seed),
    and of what is left.
    """
    rng = np.random.default_rng(0)
    fold = np.repeat(np.arange(folds), 8)
    covered = []
    for _ in range(200):
        values = case * rng.normal(size=(len(fold), 1))
        values = values + luck * rng.normal(size=(folds, seeds))[fold]
        values += rest * rng.normal(size=values.shape)
        low, high = interval(bootstrap_means(values, None, fold, resamples=300)[1:])
        covered.append(low < 0 < high)
    return float(np.mean(covered))


def test_the_interval_covers_the_true_mean_as_often_as_its_level_says():
    assert 0.91 < coverage(case=1, luck=0, rest=0, seeds=1) < 0.98
    assert 0.91 < coverage(case=0.1, luck=0.03, rest=0.03, seeds=3) < 0.98


def test_three_seeds_make_an_interval_a_little_narrow_if_luck_is_all_there_is():
    """As RULE says. A bootstrap over patients alone would cover the truth in a few cases only."""
    assert 0.88 < coverage(case=0.01, luck=0.05, rest=0, seeds=3) < 0.95
    assert 0.84 < coverage(case=0.01, luck=0.05, rest=0, seeds=2) < 0.93
    assert coverage(case=0.01, luck=0.05, rest=0, seeds=1) < 0.5


# ---------------------------------------------------------------------------------------------- AUC
def test_the_auc_by_hand():
    """With tumor: 3 and 1; without: 2 and 1. Of four pairs two are right, and a tie counts half."""
    draws = bootstrap_auc([[3.0], [1.0], [2.0], [1.0]], [True, True, False, False])
    assert draws[0] == 2.5 / 4
    assert {0.0, 0.5, 1.0} < set(draws[~np.isnan(draws)])  # of the pairs (1, 2), (1, 1), (3, .)
    assert np.isnan(draws).mean() == pytest.approx(2 / 16, abs=0.03)  # all with, or all without


def test_scores_of_two_trainings_are_not_compared():
    """Each training is always right, on a different scale: folds 0 and 1, and two seeds."""
    scores = np.array([[1.0, 5], [0, 4], [9, 7], [8, 6]])
    draws = bootstrap_auc(scores, [True, False] * 2, None, [0, 0, 1, 1])
    assert set(draws[~np.isnan(draws)]) == {1.0}


def test_the_auc_equals_the_metric_and_its_interval_covers_the_truth():
    """Scores of two normal distributions, one standard deviation apart: AUC = Phi(1 / sqrt(2))."""
    rng = np.random.default_rng(0)
    truth, covered = stats.norm.cdf(1 / math.sqrt(2)), []
    positive = np.arange(60) % 3 > 0
    for _ in range(150):
        scores = rng.normal(size=60) + positive
        draws = bootstrap_auc(scores[:, None], positive, resamples=400)
        assert draws[0] == pytest.approx(patient_metrics(scores, positive)["auc"])
        low, high = interval(draws[1:])
        covered.append(low < truth < high)
    assert 0.88 < np.mean(covered) < 0.99


# ----------------------------------------------------------------------------------------- verdicts
NEAR = np.random.default_rng(0).normal(0, 0.01, 10_000)  # draws of a difference around 0
TWO = Claim(1, "petct", "", (Order("a", "b"), Order("b", "c", "fpv_ml")))


def found(mean: float, patients: int = 40, seeds: int = 2) -> Estimate:
    return Estimate(mean, NEAR + mean, patients, patients, seeds)


def test_an_order_is_judged_by_the_interval_of_its_difference():
    assert [judge(NEAR + mean) for mean in (0.05, 0.0, -0.05)] == [SEEN, OPEN, NOT_SEEN]


def test_a_claim_of_no_difference_is_judged_by_its_margin():
    judged = [judge(NEAR + mean, margin=0.05) for mean in (0.0, 0.05, 0.2, -0.2)]
    assert judged == [SEEN, OPEN, NOT_SEEN, NOT_SEEN]


@pytest.mark.parametrize(
    "differences,expected",
    [
        ([found(0.05), found(-0.05)], SEEN),  # lower FPV is better
        ([found(0.05), found(0.0)], OPEN),
        ([found(0.05), found(0.05)], NOT_SEEN),
        ([found(0.05), None], OPEN),  # not run yet
        ([found(-0.05), None], NOT_SEEN),
        ([found(0.05), found(-0.05, patients=9)], OPEN),
        ([found(0.05), found(-0.05, seeds=1)], OPEN),
        ([found(-0.05, seeds=1), found(-0.05)], OPEN),  # not reversed, either
    ],
)
def test_a_claim_is_seen_if_all_orders_are_and_not_seen_if_one_is_reversed(differences, expected):
    assert verdict(TWO, differences) == expected


def test_one_of_many_orders_may_be_reversed_by_chance():
    many = Claim(1, "petct", "", (Order("a", "b"),) * 50)
    slightly = found(-0.021)  # reversed at a level of 95 %, but not at 1 - 0.05/50
    assert judge(slightly.draws) == NOT_SEEN
    assert verdict(many, [slightly] + [found(0.05)] * 49) == OPEN


# --------------------------------------------------------------------------------------- the report
HEAD = {"preset": "laptop", "folds": 2, "pred_ml": 1.0, "truth_ml": 1.0}
TAIL = {"ct_clean": 20.0, "ct_noise": "", "ct_shuffle": "", "steps": 9, "seconds": 1.0}


def write_results(
    path: Path, systems: dict[str, float], target="seg", study="s", seeds=(0, 1)
) -> None:
    """Results in which a system's Dice is a case's own difficulty plus the system's gain.

    24 cases of 12 patients in two folds; every fourth case is without tumor. v3 has a classifier
    that is always right, and has done only the first fold; "ct" has only the first seed.
    """
    difficulty = np.random.default_rng(0).uniform(0.2, 0.7, 24)
    rows = []
    for system, gain in systems.items():
        first_half, some = range(12), seeds[:1] if system == "ct" else seeds
        for i, seed in product(first_half if system == "v3" else range(24), some):
            tumor, fold = i % 4 > 0, i // 12
            score = (0.9 if tumor else 0.1) if system == "v3" else ""
            dice = difficulty[i] + gain + 0.001 * (i % 3)
            rows.append(HEAD | TAIL | {
                "study": study, "system": system, "fold": fold, "case": f"P{i // 2}__{i % 2}",
                "target": target, "dice": dice if tumor else math.nan,
                "fpv_ml": 10 - 20 * gain + (i % 5), "fnv_ml": 0.0 if tumor else math.nan,
                "has_tumor": tumor, "tumor_score": score, "run": f"{system}-{fold}-{seed}-{study}",
                "seed": seed, "commit": "abc1234", "options": f"--data x --model {system}",
            })  # fmt: skip
    write_table(rows, path)


@pytest.fixture
def report(tmp_path) -> list[str]:
    """The lines of a report on made-up results."""
    gains = {"v1": 0.1, "v2": 0.15, "v3": 0.2, "v4": 0.0, "ct": -0.1}
    write_results(tmp_path / "petct.csv", gains)
    path = claims.report(tmp_path, "petct")
    assert (tmp_path / "petct.png").stat().st_size > 5000
    return path.read_text().splitlines()


def line(report: list[str], start: str) -> str:
    [found] = [line for line in report if line.startswith(start)]
    return found


def test_the_report_names_study_options_and_figure(report, tmp_path):
    assert "laptop preset, 9 steps per run, 24 cases, 2 folds, 2 seed(s);" in report
    assert "commit abc1234; options `--data x`." in report
    assert "![petct seg](petct.png)" in report


def test_the_report_has_the_means_of_each_system(report, tmp_path):
    rows = [r for r in read_rows(tmp_path / "petct.csv") if r["system"] == "v4"]
    mean = np.mean([float(r["dice"]) for r in rows if r["dice"]])
    assert f"| v4 | 4 of 4 | 2 | 24 | {mean:.3f} [" in line(report, "| v4 | 4 of 4")
    v3 = line(report, "| v3 | 2 of 4, incomplete | 2 | 12 |")
    assert "| 0.050 [0.050, 0.050] |" in v3  # v3 - v2
    right = "1.000 [1.000, 1.000]"  # sensitivity, specificity, AUC
    assert v3.count(f"| {right}") == 3 and line(report, "| v4 | 4 of 4").count(right) == 0
    assert line(report, "| ct | 2 of 2 | 1 | 24 |")


def test_the_report_judges_orders_and_claims(report):
    assert "| v1 | v4 | Dice | 2 | 18 | 0.100 [0.100, 0.100] | seen |" in report
    # Only six patients have been predicted by both.
    assert "| v3 | v2 | Dice | 2 | 9 | 0.050 [0.050, 0.050] | inconclusive |" in report
    # One seed is inconclusive whatever its interval.
    assert "| v1 | ct | Dice | 1 | 18 | 0.200 [0.200, 0.200] | inconclusive |" in report
    assert "| 1 | v4 < v1 < v2 < v3 | **inconclusive** | 3 of 3 | 2 |" in report
    assert "| 4 | every version beats them in FPV | **inconclusive** | 4 of 20 | 1 |" in report
    assert "Not run: claims 2, 3, 7, 8." in report
    assert not [line for line in report if line.startswith("| 6 |")]  # brain


def test_the_fpv_of_patients_without_tumor_is_a_measure(tmp_path):
    write_results(tmp_path / "phantom.csv", {"v2": 0.0})
    rows = read_rows(tmp_path / "phantom.csv")
    values = values_of(rows, "v2", "negative_fpv_ml")
    assert len(values) == 12 and len(values_of(rows, "v2", "fpv_ml")) == 48
    assert values["0", "P0__0", "0"] == 10 and values["0", "P2__0", "1"] == 14
    text = claims.report(tmp_path, "phantom").read_text()
    assert f"| {np.mean(list(values.values())):.1f} [" in text
    assert "FPV ml, patients without tumor" in text


def test_the_classifier_is_measured_at_one_half():
    def row(tumor: bool, score) -> dict:
        return {"has_tumor": str(tumor), "tumor_score": str(score)}

    rows = [row(True, 0.5), row(True, 0.49), row(False, 0.5), row(False, 0.49), row(True, "")]
    found = [[value_of(r, m) for r in rows] for m in ("sensitivity", "specificity")]
    assert found == [[1, 0, None, None, None], [None, None, 0, 1, None]]


def test_runs_that_may_not_be_compared_are_reported_separately(tmp_path):
    """The study with the most seeds comes first, although the other one has more runs."""
    write_results(tmp_path / "a.csv", {"v2": 0.1}, study="z", seeds=(0, 1, 2))
    many = dict.fromkeys(("v1", "v2", "v4", "pet"), 0.0)
    write_results(tmp_path / "b.csv", many, study="a")
    rows = read_rows(tmp_path / "b.csv") + read_rows(tmp_path / "a.csv")
    write_table(rows, tmp_path / "petct.csv")
    text = claims.report(tmp_path, "petct").read_text()
    assert text.index("## Study z\n") < text.index("## Study a\n")
    assert (tmp_path / "petct_a.png").exists()
    assert text.count("| v2 | 4 of 4 | 2 | 24 |") == 1
    assert text.count("| v2 | 6 of 6 | 3 | 24 |") == 1
    assert claims.report(tmp_path, "brain") is None


def test_each_target_of_the_brain_has_its_table_and_figure(tmp_path):
    rows = []
    for target in ("core", "edema"):
        write_results(tmp_path / "brain.csv", {"v1": 0.0, "v2": 0.1}, target=target)
        rows += read_rows(tmp_path / "brain.csv")
    write_table(rows, tmp_path / "brain.csv")
    text = claims.report(tmp_path, "brain").read_text()
    assert "**core**" in text and "**edema**" in text
    assert (tmp_path / "brain_core.png").exists() and (tmp_path / "brain_edema.png").exists()
    assert "| v2 | v1 | Dice, core | 2 | 18 | 0.100" in text
    assert "**inconclusive** | 2 of 8 | 2 |" in text


def test_the_figure_marks_few_cases_and_one_seed_and_drops_what_is_zero(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(figures, "_save", lambda fig, out: saved.append(fig))
    bars = {"Dice": (0.7, 0.6, 0.8), "FPV ml": (5.0, 1.0, 90.0), "FNV ml": (0.0, 0.0, 0.0)}
    hidden = bars | {"FPV ml": (60.0, 1.0, 90.0)}
    rows = {"a": (40, 3, bars), "b": (16, 3, hidden), "c": (40, 1, bars), "d": (40, 1, bars)}
    figures.systems(rows, tmp_path / "x.png")
    [fig] = saved
    assert [axis.get_title() for axis in fig.axes] == ["Dice", "FPV ml, log scale"]
    [legend] = fig.legends
    assert legend.get_title().get_text().endswith("95 % bootstrap interval over patients and seeds")
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["40 cases, 3 seeds", "16 cases, 3 seeds", "40 cases, one seed: inconclusive"]
    marks = [line for line in fig.axes[0].lines if line.get_marker() != "None"]
    assert [m.get_marker() for m in marks] == ["o", "D", "o", "o"]
    assert [m.get_markerfacecolor() == "white" for m in marks] == [False, False, True, True]
    assert fig.get_size_inches()[0] * 110 < 870  # pixels: what a README shows without shrinking


def scored(scores: list[float], tumor: bool, fpv: float) -> list[dict]:
    """Rows of one system, fold and seed, each of another patient."""
    row = {"system": "v3", "fold": "0", "seed": "0", "fpv_ml": str(fpv), "has_tumor": str(tumor)}
    return [row | {"case": f"{tumor}{i}", "tumor_score": str(s)} for i, s in enumerate(scores)]


def test_rejection_by_hand():
    """At P = 0.5 one of two masks without tumor is emptied, and one of four with tumor; a score of
    P itself keeps its mask."""
    rows = scored([0.4, 0.6], False, 10.0) + scored([0.3, 0.5, 0.8, 0.9], True, 1.0)
    found = [[e.mean for e in claims.rejection(rows, p)] for p in (0.0, 0.5, 0.61, 1.0)]
    assert found == [[10, 0], [5, 0.25], [0, 0.5], [0, 1]]
    assert [claims.threshold_for(rows, share) for share in (0.0, 0.25, 0.3)] == [0.3, 0.5, 0.5]
    for share in (0.0, 0.02, 0.25, 0.5):
        p = claims.threshold_for(rows, share)
        assert claims.rejection(rows, p)[1].mean <= share
        assert claims.rejection(rows, p + 1e-9)[1].mean > share  # the highest that keeps to it


def test_the_report_shows_rejection_for_systems_with_a_score(report, tmp_path):
    assert "| v3 | 0.5 | 2 | 0.000 [0.000, 0.000] | 0.000 [0.000, 0.000] |" in report
    assert line(report, "| v3 | 0 | 2 | 8.333 [")  # FPV of three studies: (6 + 10 + 9) / 3
    assert line(report, "| v3 | 0.9000, the highest that loses at most 2 % | 2 | 0.000")
    assert "![FPV and lost tumors](petct_rejection.png)" in report
    assert (tmp_path / "petct_rejection.png").stat().st_size > 5000
    assert not [row for row in report if row.startswith("| v2 | 0.5 |")]


def test_there_is_no_rejection_without_patients_of_both_kinds():
    assert claims.rejection_section(scored([0.4, 0.6], True, 1.0), Path("unused.png")) == []
    none = [r | {"tumor_score": ""} for r in scored([0.1], True, 1) + scored([0.1], False, 1)]
    assert claims.rejection_section(none, Path("unused.png")) == []


# ----------------------------------------------------------------------------------- broken results
ROW = {
    "study": "s", "preset": "laptop", "system": "v1", "fold": "0", "folds": "1", "seed": "0",
    "case": "P", "target": "seg", "dice": "0.5", "fpv_ml": "1", "fnv_ml": "", "has_tumor": "True",
    "tumor_score": "", "steps": "9", "commit": "c", "options": "--model v1", "run": "k",
}  # fmt: skip


def test_a_file_of_results_may_be_older_and_from_a_spreadsheet(tmp_path):
    text = "\ufeff" + ",".join(ROW) + "\r\n" + ",".join(ROW.values()) + "\r\n"
    (tmp_path / "r.csv").write_bytes(text.encode())
    (row,) = read_results(tmp_path / "r.csv")
    assert row == ROW | dict.fromkeys(("ct_clean", "ct_noise", "ct_shuffle", "seconds"), "")
    assert read_results(tmp_path / "none.csv") == []


@pytest.mark.parametrize(
    "column,values",
    [
        ("study", ["../..", "a/b", "", "a\nb", "/tmp/x"]),
        ("fold", ["x", "", "-1", "1.5", "9" * 5000]),
        ("dice", ["x", "nan", "inf", "1e999"]),
        ("run", [None]),
        ("target", [None]),
    ],
)
def test_results_that_replicate_did_not_write_are_refused_in_a_line(tmp_path, column, values):
    for value in values:
        write_table([ROW, ROW | {column: value}], tmp_path / "petct.csv")
        if value is None:
            write_table([{k: v for k, v in ROW.items() if k != column}], tmp_path / "petct.csv")
        with pytest.raises(UserError) as caught:
            claims.report(tmp_path, "petct")
        message = str(caught.value)
        assert str(tmp_path / "petct.csv") in message and len(message.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["petct.csv"]


NO_TABLES = [b"\xe7", b"study\n\x00", None, b"study,run\ns\n", b"a\n1,2,3\n"]


@pytest.mark.parametrize("content", NO_TABLES)
def test_a_file_that_is_no_table_of_results_is_refused(tmp_path, content):
    path = tmp_path / "petct.csv"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match="petct.csv"):
        read_results(path)
