"""The harness of `make faults`: inputs that once were findings, and what it has to find."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent / "faults"
sys.path.insert(0, str(HERE))
pytest.importorskip("SimpleITK", reason="an independent reader: pip install SimpleITK")

import inputs  # noqa: E402
import judge  # noqa: E402
import kills  # noqa: E402

from files import UserError  # noqa: E402

KEPT = sorted((HERE / "kept").glob("*.*"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_what_was_found_once_is_fixed(path, tmp_path):
    kind = next(k for k, v in inputs.KINDS.items() if path.name.endswith("." + v.name))
    outcome, detail = judge.judge(kind, path.read_bytes(), tmp_path)
    assert outcome in judge.OUTCOMES[:2], detail


@pytest.mark.parametrize("kind", inputs.KINDS)
def test_what_is_mutated_is_right_before(kind, tmp_path):
    for content in inputs.KINDS[kind].bases:
        assert judge.judge(kind, content, tmp_path) == ("used rightly", "")


def test_an_input_is_a_function_of_its_seeds():
    plan = judge.plan(70, seed=5)
    assert plan == judge.plan(70, seed=5) != judge.plan(70, seed=6)
    assert len({job[0] for job in plan}) == len(inputs.KINDS)
    for job in plan[::9]:
        assert judge.content_of(*job) == judge.content_of(*job)


def test_a_few_mutated_inputs_of_each_kind():
    found = [r for r in judge.judge_all(judge.plan(140, seed=1)) if r.outcome not in
             judge.OUTCOMES[:2]]  # fmt: skip
    assert not found


def hang(_):
    while True:
        pass


def kill_itself(_):
    kills.kill()


def two_lines(path):
    raise UserError(f"{path}: one\ntwo")


def no_name(_):
    raise UserError("something is wrong")


def wrong(_):
    raise inputs.Wrong("other voxels")


def memory(_):
    return b"x" * 2**29


FINDINGS = {  # what a use does: what the harness must say
    hang: "hung", kill_itself: "crashed", two_lines: "refused", no_name: "crashed", wrong: "lost",
    memory: "over memory", lambda _: {}["x"]: "crashed", lambda _: "x" * 2**62: "over memory",
}  # fmt: skip


@pytest.mark.parametrize("use", FINDINGS)
@pytest.mark.slow
def test_the_harness_finds(use, monkeypatch):
    monkeypatch.setattr(judge, "SECONDS", 1)
    monkeypatch.setattr(inputs.KINDS["csv"], "use", use)
    result, after = judge.judge_all([("csv", 0, ()), ("folds", 0, ())])
    assert result.outcome == FINDINGS[use], result
    assert after.outcome == "used rightly"  # the others are judged all the same


def test_a_finding_is_minimized(monkeypatch):
    def use(path):
        if b"\x00" in path.read_bytes():
            raise inputs.Wrong("a zero")

    monkeypatch.setattr(inputs.KINDS["csv"], "use", use)
    monkeypatch.setattr(
        inputs.KINDS["csv"], "mutate", lambda content, rng: content + rng.choice([b"\x00", b"x"])
    )
    result = next(judge.judge_all([("csv", 0, tuple(range(12)))]))
    assert result.outcome == "lost"
    assert len(judge.minimize(result).seeds) == 1


@pytest.mark.slow
def test_kills_at_a_few_changes_of_the_file_system_lose_nothing(tmp_path):
    changes = kills.count_changes(tmp_path / "reference")
    assert changes > 60
    for number in kills.kill_numbers(6, changes, seed=0):
        found = kills.outcome_of(
            lambda n=number: kills.trial(tmp_path / str(n), tmp_path / "reference", n) or "right"
        )
        assert found == ("right", ""), number


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["a second process on the run", "last.pt cut"])
def test_faults_are_met(tmp_path, fault):
    kills.count_changes(tmp_path / "reference")
    outcome, detail = kills.outcome_of(
        lambda: kills.FAULTS[fault](tmp_path / "run", tmp_path / "reference")
    )
    assert outcome in judge.OUTCOMES[:2], detail
