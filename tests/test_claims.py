"""Intervals, verdicts and the report: intervals cover the truth, verdicts follow their rule."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import claims
from claims import (
    NOT_SEEN,
    OPEN,
    SEEN,
    Claim,
    Estimate,
    Order,
    bootstrap_means,
    interval,
    judge,
    read_results,
    read_rows,
    values_of,
    verdict,
)
from evaluate import write_table
from files import UserError


# ---------------------------------------------------------------------------------------- intervals
def test_bootstrap_means_of_two_values_by_hand():
    """Two values drawn twice: their means are 0, 1/2, 1 with probability 1/4, 1/2, 1/4."""
    draws = bootstrap_means([0.0, 1.0], resamples=40_000)
    shares = np.bincount((2 * draws).astype(int)) / 40_000
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.01)
    assert interval(draws) == (0, 1)
    assert (bootstrap_means([0.0, 1.0], resamples=40_000) == draws).all()
    assert (bootstrap_means([0.0, 1.0], resamples=40_000, seed=1) != draws).any()


def test_cases_of_a_patient_are_drawn_together():
    values = np.array([0.0, 0.0, 1.0, 1.0])
    assert set(bootstrap_means(values, ["a", "a", "b", "b"])) == {0.0, 0.5, 1.0}
    assert set(bootstrap_means(values, ["a", "b", "c", "d"])) == {0.0, 0.25, 0.5, 0.75, 1.0}


def test_trainings_are_drawn_independently_of_the_cases():
    lucky = np.array([[0.0, 1.0]] * 5)  # the second training is better on every case
    draws = bootstrap_means(lucky)
    assert set(draws) == {0.0, 0.5, 1.0} and np.mean(draws) == pytest.approx(0.5, abs=0.02)


def test_unknown_values_count_nowhere():
    draws = bootstrap_means(np.array([[0.0, math.nan]] * 3 + [[1.0, 1.0]]))
    assert np.nanmax(draws) == 1 and np.nanmin(draws) == 0
    assert np.nanmean(draws) == pytest.approx(2 / 5, abs=0.06)


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


def test_the_interval_covers_the_true_mean_as_often_as_its_level_says():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        low, high = interval(bootstrap_means(rng.normal(size=40), resamples=500))
        covered.append(low < 0 < high)
    assert 0.90 < np.mean(covered) < 0.98


# ----------------------------------------------------------------------------------------- verdicts
NEAR = np.random.default_rng(0).normal(0, 0.01, 10_000)  # draws of a difference around 0
TWO = Claim(1, "petct", "", (Order("a", "b"), Order("b", "c", "fpv_ml")))


def found(mean: float, patients: int = 40) -> Estimate:
    return Estimate(mean, NEAR + mean, patients, patients)


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
HEAD = {"preset": "laptop", "folds": 2, "seed": 0, "pred_ml": 1.0, "truth_ml": 1.0}
TAIL = {"ct_clean": 20.0, "ct_noise": "", "ct_shuffle": "", "steps": 9, "seconds": 1.0}


def write_results(path: Path, systems: dict[str, float], target="seg", study="s") -> None:
    """Results in which a system's Dice is a case's own difficulty plus the system's gain.

    24 cases of 12 patients in two folds; every fourth case is without tumor. v3 has a classifier
    that is always right, and has done only the first fold.
    """
    difficulty = np.random.default_rng(0).uniform(0.2, 0.7, 24)
    rows = []
    for system, gain in systems.items():
        for i in range(12 if system == "v3" else 24):
            tumor, fold = i % 4 > 0, i // 12
            score = (0.9 if tumor else 0.1) if system == "v3" else ""
            dice = difficulty[i] + gain + 0.001 * (i % 3)
            rows.append(HEAD | TAIL | {
                "study": study, "system": system, "fold": fold, "case": f"P{i // 2}__{i % 2}",
                "target": target, "dice": dice if tumor else math.nan,
                "fpv_ml": 10 - 20 * gain + (i % 5), "fnv_ml": 0.0 if tumor else math.nan,
                "has_tumor": tumor, "tumor_score": score, "run": f"{system}-{fold}-{study}",
                "commit": "abc1234", "options": f"--data x --model {system}",
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
    assert "laptop preset, 9 steps per run, 24 cases, 2 folds, 1 seed(s);" in report
    assert "commit abc1234; options `--data x`." in report
    assert "![petct seg](petct.png)" in report


def test_the_report_has_the_means_of_each_system(report, tmp_path):
    rows = [r for r in read_rows(tmp_path / "petct.csv") if r["system"] == "v4"]
    mean = np.mean([float(r["dice"]) for r in rows if r["dice"]])
    assert f"| v4 | 2 of 2 | 24 | {mean:.3f} [" in line(report, "| v4 | 2 of 2")
    v3 = line(report, "| v3 | 1 of 2, incomplete | 12 |")
    assert "| 1.00, 1.00 |" in v3 and "| 0.050 [0.050, 0.050] |" in v3  # classifier; v3 - v2


def test_the_report_judges_orders_and_claims(report):
    assert "| v1 | v4 | Dice | 18 | 0.100 [0.100, 0.100] | seen |" in report
    # Only six patients have been predicted by both.
    assert "| v3 | v2 | Dice | 9 | 0.050 [0.050, 0.050] | inconclusive |" in report
    assert "| 1 | v4 < v1 < v2 < v3 | **inconclusive** | 3 of 3 |" in report
    assert "| 4 | every version beats them in FPV | **inconclusive** | 4 of 20 |" in report
    assert "Not run: claims 2, 3, 7, 8." in report
    assert not [line for line in report if line.startswith("| 6 |")]  # brain


def test_the_fpv_of_patients_without_tumor_is_a_measure(tmp_path):
    write_results(tmp_path / "phantom.csv", {"v2": 0.0})
    rows = read_rows(tmp_path / "phantom.csv")
    values = values_of(rows, "v2", "negative_fpv_ml")
    assert len(values) == 6 and len(values_of(rows, "v2", "fpv_ml")) == 24
    assert values["P0__0", "0"] == 10 and values["P2__0", "0"] == 14
    text = claims.report(tmp_path, "phantom").read_text()
    assert f"| {np.mean(list(values.values())):.1f} [" in text
    assert "FPV ml, patients without tumor" in text


def test_runs_that_may_not_be_compared_are_reported_separately(tmp_path):
    write_results(tmp_path / "a.csv", {"v2": 0.1, "v4": 0.0})
    write_results(tmp_path / "b.csv", {"v2": 0.0}, study="other")
    rows = read_rows(tmp_path / "b.csv") + read_rows(tmp_path / "a.csv")
    write_table(rows, tmp_path / "petct.csv")
    text = claims.report(tmp_path, "petct").read_text()
    assert text.index("## Study s\n") < text.index("## Study other\n")  # the one with more runs
    assert (tmp_path / "petct_other.png").exists()
    assert text.count("| v2 | 2 of 2 | 24 |") == 2
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
    assert "| v2 | v1 | Dice, core | 18 | 0.100" in text
    assert "**inconclusive** | 2 of 8 |" in text


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
