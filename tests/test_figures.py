"""The figures: the cases they show, what they say, and colours that everyone can tell apart."""

import math
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.image import imread
from vision import BLINDNESS, alike, lab

import figures


# ----------------------------------------------------------------------------------------- colours
def test_lab_and_the_simulation_by_hand():
    assert np.allclose(lab("white"), (100, 0, 0), atol=0.01)
    assert np.allclose(lab("#ff0000"), (53.24, 80.09, 67.20), atol=0.01)
    for kind in BLINDNESS:  # grey stays grey
        assert np.allclose(lab("#808080", kind), lab("#808080"), atol=0.1)


def test_it_finds_the_palettes_that_were_mended():
    assert {kind for *_, kind, _ in alike(["tab:red", "tab:green"])} == {"deuteranopia"}
    assert alike(["#009E73", "#CC79A7"])  # of Okabe and Ito


PALETTES = {
    "curves": figures.CURVES,
    "masks": (figures.TRUTH, figures.PREDICTION),
    "systems": (figures.BLUE, figures.VERMILLION),
    "architecture": (figures.CT, figures.PET, figures.GREY, figures.SHARED, figures.INK),
}


@pytest.mark.parametrize("name", PALETTES)
def test_colors_of_a_figure_differ_for_every_reader(name):
    assert not alike(PALETTES[name])


SOURCES = sorted((ROOT / "tutorials").glob("[0-9]*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_colors_of_a_notebook_differ_for_every_reader(source):
    text = source.read_text()
    assert not re.findall(r"tab:\w+|\"C\d\"|\"(?:red|green|cyan|lime|magenta|orange)\"", text)
    named = re.findall(r'^[A-Z, ]+ = ((?:"#\w{6}"(?:, )?)+)', text, re.MULTILINE)
    colors = {c.upper() for line in named for c in re.findall(r"#\w{6}", line)}
    used = set(re.findall(r"figures\.([A-Z]+)\b", text))
    boxes = {"CT", "PET", "GREY", "SHARED", "INK"}  # of diagrams, not of curves
    for name in used - boxes - {"LINES", "CURVES", "OUTLINES"}:
        colors.add(getattr(figures, name).upper())
    colors |= set(figures.CURVES) if "CURVES" in used else set()
    assert not alike(sorted(colors))
    assert not alike([getattr(figures, name) for name in used & boxes])


# ------------------------------------------------------------------------------------ what is shown
def rows_of(*dices, target="seg", volumes=()):
    """Rows of a table; patients without tumor have no Dice and these false-positive volumes."""
    known = [dict(dice=d, fpv_ml=1.0, fnv_ml=0.0, truth_ml=9.0) for d in dices]
    empty = [dict(dice=math.nan, fpv_ml=v, fnv_ml=math.nan, truth_ml=0.0) for v in volumes]
    return [dict(case=f"c{i}", target=target, **row) for i, row in enumerate(known + empty)]


@pytest.mark.parametrize(
    "dices, shown",
    [
        ([0.3], {"best": "c0"}),
        ([0.3, 0.5], {"best": "c1", "worst": "c0"}),
        ([0.3, 0.9, 0.5, 0.7], {"best": "c1", "middle": "c2", "worst": "c0"}),
        ([0.3, 0.9, 0.5], {"best": "c1", "middle": "c2", "worst": "c0"}),
    ],
)
def test_the_best_the_middle_and_the_worst_case_are_shown_and_say_so(dices, shown):
    chosen = figures.choose(rows_of(*dices) + rows_of(0.0, target="other"), "seg")
    assert {title.split("\n")[0]: row["case"] for title, row in chosen} == shown


def test_the_patient_without_tumor_who_has_the_most_false_positives_is_shown():
    chosen = figures.choose(rows_of(0.9, 0.5, volumes=(2.0, 7.25, 0.0)), "seg")
    assert chosen[-1][0] == "no tumor, most false positives\nc3, seg\nFPV 7.2 ml"
    assert [row["case"] for _, row in chosen] == ["c0", "c1", "c3"]
    assert chosen[0][0] == "best\nc0, seg\nDice 0.90  FPV 1.0 ml  FNV 0.0 ml"


def test_a_table_without_truth_shows_its_first_case():
    (row,) = rows_of(0.5)
    unknown = row | dict.fromkeys(("dice", "fpv_ml", "fnv_ml", "truth_ml"), math.nan)
    assert figures.choose([unknown], "seg") == [("no truth\nc0, seg\n", unknown)]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    kept = []
    monkeypatch.setattr(figures, "_save", lambda fig, out: kept.append(fig))
    return kept


def test_pet_panels_state_their_suv(drawn, tmp_path):
    image = np.zeros((2, 8, 8, 8), np.float32)
    image[1, 2:6] = 0.4  # SUV 1 + 0.4 x 10 in a window from 1 to 11
    mask = image[1] > 0
    case = dict(title="a", names=("CT", "PET"), images=image, truth=mask, pred=mask, suv=(1, 11))
    case |= dict(spacing=(4, 4, 4), reconstructions={"CT": image[0], "PET": image[1]})
    figures.panels([case], tmp_path / "x.png")
    labels = [axis.get_xlabel() for axis in drawn[0].axes]
    assert labels == ["", "white: SUV 1, black: 5", "", "", "", ""]
    figures.panels([case | dict(suv=None, names=("T2w", "FLAIR"), reconstructions={})], "x.png")
    assert not any(axis.get_xlabel() for axis in drawn[1].axes)


def test_an_overview_of_pet_states_its_suv(drawn):
    image = np.full((8, 8, 8), 0.5, np.float32)
    row = {"case": "a", "dice": 0.5}
    tiles = [figures.tile(row, image, image > 1, None, np.eye(4), suv) for suv in ((0, 20), None)]
    figures.overview(tiles, "x.png")
    assert [axis.get_xlabel() for axis in drawn[0].axes] == ["white: SUV 0, black: 10", ""]


# ------------------------------------------------------------------------------------- the gallery
def without_numbers(page: str) -> str:
    """The text of a page before its table of lesions, every number replaced."""
    return re.sub(r"\d+(\.\d+)?", "N", page.split("| lesion |")[0])


def test_the_gallery_has_its_pictures():
    page = (ROOT / "docs" / "gallery.md").read_text()
    pictures = re.findall(r"\]\((gallery/\w+\.png)\)", page)
    there = sorted(f"gallery/{p.name}" for p in (ROOT / "docs" / "gallery").glob("*.png"))
    assert sorted(pictures) == there and len(there) == 10
    assert "docs/gallery.md" in (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_its_script_draws_the_gallery(tmp_path):
    out, run = tmp_path / "docs", tmp_path / "run"
    command = [sys.executable, "docs/gallery.py", "--steps", "3", "--phantoms", "6"]
    command += ["--out", out, "--run", run]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = without_numbers((out / "gallery.md").read_text())
    assert made == without_numbers((ROOT / "docs" / "gallery.md").read_text())
    for path in (ROOT / "docs" / "gallery").glob("*.png"):
        drawn = imread(out / "gallery" / path.name)[..., :3]
        assert drawn.std() > 0.05  # not blank
        if path.name[:2] in ("v1", "v2", "v3", "v4", "sh"):  # of the networks alone
            assert np.array_equal(drawn, imread(path)[..., :3])
