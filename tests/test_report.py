"""report.py: the page read as HTML, on every order of axes, large, noisy, and in a browser."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from matplotlib.image import imread
from nibabel.affines import apply_affine
from test_data import make_affine, refused, save
from test_outputs import PREDICT, WRITE
from test_predict import checkpoint, root, run, study, table  # noqa: F401  # fixtures
from test_resampling import CODES

import report
from data import Case
from files import CannotWrite
from metrics import LESION_MEASURES, lesion_table, remove_small

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "<b>&\"'</title>"  # of a study
VOID = ("meta", "img", "input", "br")


class Page(HTMLParser):
    """What a page holds; an element that is not closed in its turn is an AssertionError."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.tags, self.figures, self.rows = [], [], [], []
        self.texts: dict[str, list[str]] = {}
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append((tag, values))
        self.texts.setdefault(tag, [])
        if tag not in VOID:
            self.open.append(tag)
            self.texts[tag].append("")
        if tag == "figure":
            self.figures.append({"hidden": "hidden" in values, "words": [], "paths": []})
        if tag == "img":
            kind, _, data = values["src"].partition(",")
            assert kind == "data:image/jpeg;base64"
            image = imread(io.BytesIO(base64.b64decode(data, validate=True)), format="jpeg")
            size = int(values["height"]), int(values["width"])
            assert image.shape == (*size, 3) and values["alt"]
            self.figures[-1] |= {"alt": values["alt"], "image": image[..., 0] / 255.0}
        if tag == "text":
            self.figures[-1]["words"].append([float(values["x"]), float(values["y"])])
        if tag == "path" and self.figures and "figure" in self.open:
            self.figures[-1]["paths"].append(values["class"])
        if tag == "tr":
            self.rows.append([])
        if tag == "data":
            self.rows[-1].append(values["value"])

    def handle_startendtag(self, tag, attributes):  # as SVG closes its elements
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]][-1] += data
        if self.open and self.open[-1] == "text":
            self.figures[-1]["words"][-1].insert(0, data)

    def attributes(self, tag) -> list[dict]:
        return [values for name, values in self.tags if name == tag]

    @property
    def frames(self) -> list[dict]:
        return [f for f in self.figures if f["alt"].startswith("PET, turned by")]

    def slices(self, words: str) -> list[dict]:
        return [f for f in self.figures if words in f["alt"]]


def at(figure, words: str) -> np.ndarray:
    """Where a picture has a word, (x, y) in pixels."""
    (place,) = [place for text, *place in figure["words"] if text == words]
    return np.array(place)


def darkest(image) -> np.ndarray:
    """The center (x, y) of an image's darkest pixels."""
    rows, columns = np.nonzero(image <= image.min() + 0.1)
    return np.array([columns.mean(), rows.mean()])


def voxels_near(shape, affine, mm, radius) -> np.ndarray:
    """A mask (D, H, W) of the voxels that are within a radius of a point, in mm."""
    places = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    return np.linalg.norm(places - mm, axis=-1) <= radius


def make(path, suv, mask, affine, name="P", ct=None, truth=None, notes=("by hand",)) -> Page:
    """Write the page of arrays (D, H, W), and read it."""
    known = None if truth is None else np.asarray(truth.dataobj) > 0
    lesions = lesion_table(mask, affine, suv, known)
    report.write(path, Case(name, name, (ct, None), None), suv, mask, affine, lesions, notes, truth)
    return Page(path)


@pytest.fixture(scope="module")
def arrays() -> tuple:
    """PET with three lesions (60, 50, 70), their mask, and the affine, 5 mm."""
    affine = make_affine("LAS", (5.0, 5.0, 5.0))
    suv = np.zeros((60, 50, 70), np.float32)
    suv[10:50, 10:40, 5:65] = 1
    mask = np.zeros(suv.shape, bool)
    mask[20:26, 20:26, 50:56] = mask[40:43, 15:18, 20:23] = mask[30, 30, 30] = True
    suv[mask] = 9
    return suv, mask, affine


@pytest.fixture(scope="module")
def page(arrays, tmp_path_factory) -> Page:
    """A page with CT, truth and a name of markup."""
    folder = tmp_path_factory.mktemp("page")
    suv, mask, affine = arrays
    ct = save(folder / "ct.nii.gz", np.where(suv > 0, 40.0, -1000.0).astype(np.float32), affine)
    truth = nib.Nifti1Image(np.roll(mask, 2, axis=0).astype(np.uint8), affine)
    return make(folder / "page.html", suv, mask, affine, NAME, ct, truth, [f"made by {NAME}"])


# ---------------------------------------------------------------------------------------- contents
def test_a_page_has_a_turn_of_projections_and_four_slices_per_lesion(page):
    assert [f["alt"] for f in page.frames] == [
        f"PET, turned by {degrees} degrees" for degrees in range(0, 360, 10)
    ]
    assert [f["hidden"] for f in page.figures] == [False] + [True] * 35 + [False] * 12
    kinds = ["axial CT", "axial PET", "coronal CT", "coronal PET"]
    expected = [f"Lesion {n}, {kind}" for n in (1, 2, 3) for kind in kinds]
    assert [f["alt"] for f in page.figures[36:]] == expected
    for figure in page.figures:
        assert np.ptp(figure["image"]) > 0.5  # not blank
        assert {"prediction", "truth"} <= set(figure["paths"])


def test_the_table_is_that_of_the_lesions(page, arrays):
    suv, mask, affine = arrays
    lesions = lesion_table(mask, affine, suv, np.roll(mask, 2, axis=0))
    assert page.rows[1:] == [[str(row[k]) for k in LESION_MEASURES] for row in lesions]
    heads = page.texts["th"][: len(LESION_MEASURES) + 1]
    assert heads == ["lesion", *(name.replace("_", " ") for name in LESION_MEASURES)]
    shown = [f"{row[k]:.5g}" for row in lesions for k in LESION_MEASURES]
    assert page.texts["data"] == shown
    assert page.texts["a"] == ["1", "2", "3"]


def test_a_page_loads_nothing(page):
    for tag, values in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "source"), tag
        for name in ("href", "src", "srcset", "action", "data", "poster", "xlink:href"):
            assert values.get(name, "#").startswith(("#", "data:image/jpeg;base64,"))
        assert not any(name.startswith("on") for name in values)
    style, script = page.texts["style"][0], page.texts["script"][0]
    assert not re.search(r"url\(|@import|@font-face", style)
    assert not re.search(r"fetch|XMLHttp|WebSocket|import|http|eval|innerHTML", script)
    assert "http:" not in page.source and "https:" not in page.source
    policy = {v.get("http-equiv"): v["content"] for v in page.attributes("meta") if "content" in v}
    assert policy["Content-Security-Policy"].startswith("default-src 'none'; img-src data:;")


def test_names_and_notes_are_text(page):
    assert page.texts["h1"] == [NAME]
    assert page.texts["title"] == [f"{NAME}: predicted lesions"]
    assert f"made by {NAME}" in page.texts["p"]
    assert page.texts["b"] == ["Research software: not for clinical use."]


def test_a_page_is_accessible(page):
    (language,) = page.attributes("html")
    assert language["lang"] == "en"
    scopes = [values["scope"] for values in page.attributes("th")]
    assert scopes == ["col"] * (len(LESION_MEASURES) + 1) + ["row"] * 3
    ids = [values["id"] for _, values in page.tags if "id" in values]
    assert len(ids) == len(set(ids))
    assert {v["href"][1:] for v in page.attributes("a")} == {f"lesion-{n}" for n in (1, 2, 3)}
    assert {f"lesion-{n}" for n in (1, 2, 3)} <= set(ids)
    assert all(values["aria-hidden"] == "true" for values in page.attributes("svg"))
    (slider,) = page.attributes("input")
    assert slider["type"] == "range" and slider["aria-label"] == "Degrees"
    (controls,) = [v for v in page.attributes("div") if v.get("id") == "controls"]
    assert "hidden" in controls  # without a script, they would do nothing
    assert "prefers-reduced-motion" in page.texts["script"][0]


def test_what_is_seen_is_said(page):
    text = page.texts["small"]
    assert any("SUV 0" in words and "9 or more" in words for words in text)
    assert any("SUV 0 to 9" in words and "-160 to 240" in words for words in text)
    assert "3 found. " in page.texts["p"]


# ------------------------------------------------------------------------------------- orientation
@pytest.mark.parametrize(
    "codes,tilt",
    [(codes, 15) for codes in ("LAS", "PIR", "SRA")]
    + [(codes, 0) for codes in CODES[::7]]
    + [
        pytest.param(codes, 0, marks=pytest.mark.slow) for codes in CODES if codes not in CODES[::7]
    ],
)
def test_left_is_labelled_left_in_every_order_of_the_axes(tmp_path, monkeypatch, codes, tilt):
    """A lesion left, in front and above, and a bright spot 40 mm from it along each axis."""
    monkeypatch.setattr(report, "TURN", 90)
    affine = make_affine(codes, (4.0, 3.0, 5.0), tilt=tilt)
    shape = (54, 72, 43)
    center = apply_affine(affine, (np.array(shape) - 1) / 2)
    suv = voxels_near(shape, affine, center, 95).astype(np.float32)
    lesion = center + (-25, 15, 20)  # mm to the right, front and head
    mask = voxels_near(shape, affine, lesion, 14)
    suv[mask] = 20
    for axis in range(3):
        suv[voxels_near(shape, affine, lesion + 40 * np.eye(3)[axis] * (-1, 1, 1), 6)] = 7
    ct = save(tmp_path / "ct.nii.gz", suv * 10, affine)
    found = make(tmp_path / "p.html", suv, mask, affine, ct=ct)

    front, left, back, right = found.frames
    sides = [("R", "L"), ("A", "P"), ("L", "R"), ("P", "A")]
    ways = [(25, 20), (-15, 20), (-25, 20), (15, 20)]  # mm to the right and up
    height, width = front["image"].shape
    for frame, (a, b), way in zip((front, left, back, right), sides, ways):
        assert at(frame, a)[0] < width / 4 and at(frame, b)[0] > width * 3 / 4
        assert at(frame, "S")[1] < height / 4
        spot = darkest(frame["image"]) - ((width - 1) / 2, (height - 1) / 2)
        np.testing.assert_allclose(spot * (3, -3), way, atol=6)
        np.testing.assert_allclose(at(frame, "1"), darkest(frame["image"]), atol=4)

    pixel = report.FIELD / report.SIDE
    for name, top in (("axial", "A"), ("coronal", "S")):
        for kind in ("PET", "CT"):
            (figure,) = found.slices(f"Lesion 1, {name} {kind}")
            assert at(figure, "R")[0] < 50 and at(figure, "L")[0] > 175 and at(figure, top)[1] < 50
            image = figure["image"] if kind == "PET" else 1 - figure["image"]
            middle, far = report.SIDE // 2, round(40 / pixel)
            reach = slice(middle - 18, middle + 19)
            np.testing.assert_allclose(darkest(image[reach, reach]), 18, atol=3)
            assert image[middle, middle + far] < image[middle, middle - far] - 0.1  # left
            assert image[middle - far, middle] < image[middle + far, middle] - 0.1  # front, head


def test_an_outline_lies_on_its_mask():
    picture = np.zeros((20, 30))
    picture[5:8, 10:20] = 1
    path = report.web_outline(picture, "prediction")
    numbers = np.array(re.findall(r"[\d.]+ [\d.]+", path.split('d="')[1]))
    points = np.array([[float(n) for n in pair.split()] for pair in numbers])
    assert (points.min(0) == (10, 5)).all() and (points.max(0) == (20, 8)).all()
    assert report.web_outline(picture * 0, "truth") == ""


# ------------------------------------------------------------------------------------ special cases
def test_a_study_without_lesions(arrays, tmp_path):
    suv, mask, affine = arrays
    found = make(tmp_path / "p.html", suv, mask & False, affine, ct=tmp_path / "not opened")
    assert "No lesion was found. " in found.texts["p"]
    assert len(found.figures) == 36 and "h3" not in found.texts and not found.rows


def test_a_pet_that_is_empty_or_flat(tmp_path):
    affine = make_affine("LAS", (4.0, 4.0, 4.0))
    for shape in ((20, 20, 20), (20, 20, 1)):
        suv = np.zeros(shape, np.float32)
        assert len(make(tmp_path / "p.html", suv, suv > 0, affine).frames) == 36
        suv[8:12, 8:12] = 7
        found = make(tmp_path / "p.html", suv, suv > 0, affine)
        assert found.frames[0]["image"].min() < 0.3 and len(found.figures) == 38


def test_a_study_without_ct_or_with_a_broken_one(arrays, tmp_path):
    suv, mask, affine = arrays
    found = make(tmp_path / "p.html", suv, mask, affine)
    assert len(found.slices("PET")) == 36 + 6 and not found.slices("CT")
    broken = tmp_path / "<ct>.nii.gz"
    broken.write_bytes(b"no image")
    found = make(tmp_path / "p.html", suv, mask, affine, ct=broken)
    assert not found.slices("CT")
    (note,) = [words for words in found.texts["p"] if words.startswith("The CT is not shown: ")]
    assert str(broken) in note and "not a readable NIfTI file" in note


def test_a_ct_on_another_grid_is_shown_where_it_lies(arrays, tmp_path):
    suv, mask, affine = arrays
    spot = apply_affine(affine, (22.5, 22.5, 52.5))  # the largest lesion
    other = make_affine("PIR", (3.0, 4.0, 2.0), origin=spot + (-150, 150, 200))
    hounsfield = np.full((120, 90, 160), -1000, np.float32)
    bone = voxels_near(hounsfield.shape, other, spot, 12)
    assert bone.any()
    hounsfield[bone] = 1000
    ct = save(tmp_path / "ct.nii.gz", hounsfield, other)
    found = make(tmp_path / "p.html", suv, mask, affine, ct=ct)
    for name in ("axial", "coronal"):
        (figure,) = found.slices(f"Lesion 1, {name} CT")
        np.testing.assert_allclose(darkest(1 - figure["image"]), report.SIDE // 2, atol=4)


def test_neighbors_in_a_slice_have_their_own_numbers(tmp_path):
    affine = np.diag([-2.0, 2.0, 2.0, 1.0])
    mask = np.zeros((80, 40, 40), bool)
    mask[20:30, 15:25, 15:25] = mask[40:45, 18:22, 18:22] = True
    found = make(tmp_path / "p.html", mask * np.float32(8), mask, affine)
    for figure in found.slices("Lesion"):
        one, two = at(figure, "1"), at(figure, "2")
        assert one[0] < two[0] and abs(one[1] - two[1]) < 8  # 2 is farther left, which is right


def test_a_hollow_lesion_is_cut_where_it_is(tmp_path):
    """The center of a shell is no voxel of it."""
    affine = np.diag([-2.0, 2.0, 2.0, 1.0])
    shape = (60, 60, 60)
    mask = voxels_near(shape, affine, apply_affine(affine, (30, 30, 30)), 30)
    mask &= ~voxels_near(shape, affine, apply_affine(affine, (30, 30, 30)), 24)
    found = make(tmp_path / "p.html", mask * np.float32(8), mask, affine)
    for figure in found.slices("Lesion 1"):
        assert figure["image"][report.SIDE // 2, report.SIDE // 2] < 0.3


def test_an_old_page_stays_until_the_new_one_is_complete(arrays, tmp_path, monkeypatch):
    suv, mask, affine = arrays
    monkeypatch.setattr(report, "TURN", 90)
    path = tmp_path / "p.html"
    make(path, suv, mask, affine, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CannotWrite, match="p.html"):
        patch.setattr(os, "replace", fail)
        make(path, suv, mask, affine, "new")
    assert Page(path).texts["h1"] == ["old"] and os.listdir(tmp_path) == ["p.html"]
    assert make(path, suv, mask, affine, "new").texts["h1"] == ["new"]


# -------------------------------------------------------------------------------------------- size
def test_sixty_lesions(tmp_path):
    affine = np.diag([-3.0, 3.0, 3.0, 1.0])
    suv = np.ones((100, 80, 150), np.float32)
    mask = np.zeros(suv.shape, bool)
    for n in range(60):
        x, y, z = 8 + 20 * (n % 4), 8 + 20 * (n // 4 % 3), 8 + 28 * (n // 12)
        mask[x : x + 3 + n // 8, y : y + 3 + n % 8, z : z + 4] = True
    suv[mask] = 9
    found = make(tmp_path / "p.html", suv, mask, affine)
    assert len(found.rows) == 61
    assert found.texts["h3"] == [f"Lesion {n}" for n in range(1, 31)]
    said = "60 found. The 30 largest are shown, and up to 300 are listed. "
    assert said in found.texts["p"] and len(found.source) < 2e6
    drawn = {text for text, *_ in found.frames[0]["words"]}
    assert {str(n) for n in range(1, 31)} <= drawn and "31" not in drawn


def test_noise_gives_no_large_pictures():
    """A page has 36 frames and 120 slices at most, each with two outlines: less than 5 MB."""
    size = 0
    for shape, count in (((450, 225), 36), ((225, 225), 120)):
        noise = np.random.default_rng(0).random(shape)
        path = report.web_outline(noise, "truth")
        ways = (-1, 0, 0), (0, 0, 1)
        html = report.web_picture(noise, (0, 1), "gray", [path, path], [], 11, *ways, "noise")
        assert 1000 < len(path) <= 5050 and len(html) > 10_000 + 2 * len(path)
        size += count * len(html)
    assert 2e6 < size < 4.8e6


@pytest.mark.slow
def test_noise_does_not_make_a_page_large(tmp_path):
    """Pictures that no JPEG compresses, and 64 lesions like sponges."""
    rng = np.random.default_rng(0)
    affine = np.diag([-2.0, 2.0, 2.0, 1.0])
    suv = rng.random((132, 132, 132), np.float32) * 10
    mask = suv > 7
    mask[::33] = mask[:, ::33] = mask[:, :, ::33] = False
    mask = remove_small(mask, (2, 2, 2), 1)
    truth = nib.Nifti1Image((suv < 0.5).astype(np.uint8), affine)
    ct = save(tmp_path / "ct.nii.gz", suv * 50 - 200, affine)
    found = make(tmp_path / "p.html", suv, mask, affine, ct=ct, truth=truth)
    assert len(found.rows) == 1 + 64 and len(found.slices("Lesion")) == 120
    assert len(found.source) < 5e6


@pytest.mark.slow
def test_the_page_of_a_total_body_is_small_and_takes_less_than_3_gb(tmp_path):
    """With sixty lesions, a CT on its own grid and a truth, by the program."""
    more = """
image[:] = 0
image[60:340, 100:300, 20:980] = 10
for n in range(60):
    x, y, z = 70 + 50 * (n % 5), 110 + 60 * (n // 5 % 3), 40 + 230 * (n // 15)
    image[x : x + 16 + n // 8, y : y + 16 + n % 8, z : z + 20] = 80
nib.save(nib.Nifti1Image(image / np.float32(10), fine), "in/P/SUV.nii")
nib.save(nib.Nifti1Image((image > 50).astype(np.uint8), fine), "in/P/SEG.nii")
"""
    weights = checkpoint(tmp_path / "w.pt", model="v1", spacing=(4, 4, 4), patch=(64, 64, 64))
    (tmp_path / "in" / "P").mkdir(parents=True)
    words = ["--checkpoint", str(weights), "--root", "in", "--out", "out", "--report"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for code in (WRITE + more, PREDICT):
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "P.html").stat().st_size < 5e6
    assert float(done.stdout.split()[-1]) < 3  # GB


# ------------------------------------------------------------------------------------- the program
def test_predict_writes_a_page_with_the_rows_of_lesions_csv(root, tmp_path):  # noqa: F811
    weights = [checkpoint(tmp_path / f"{m}.pt", model=m) for m in ("v1", "v3")]
    out = tmp_path / "out"
    words = ["--skip-air", 0.05, "--min-lesion-ml", 2, "--threshold", 0.51]
    run(weights, "--root", root / "petct", "--out", out, "--report", *words)
    names = {"PETCT_0000__visit1.nii.gz", "PETCT_0000__visit1.html"}
    assert {p.name for p in out.iterdir()} == names | {"metrics.csv", "lesions.csv", "overview.png"}
    found, rows = Page(out / "PETCT_0000__visit1.html"), table(out / "lesions.csv")
    assert found.texts["h1"] == ["PETCT_0000__visit1"] and rows
    expected = [[row[k] or "nan" for k in LESION_MEASURES] for row in rows]
    assert found.rows[1:] == expected[:300]
    assert found.slices("CT")  # which the ensemble reads
    notes = " ".join(found.texts["p"])
    for words in ("model v1", "model v3", "threshold 0.51", "skip air 0.05", "min lesion ml 2"):
        assert words in notes, words
    (row,) = table(out / "metrics.csv")
    assert f"tumor score {float(row['tumor_score']):.4g}" in notes


def test_a_single_pet_gets_a_page_next_to_its_mask(study, tmp_path):  # noqa: F811
    weights, out = checkpoint(tmp_path / "w.pt", model="v3"), tmp_path / "m.nii.gz"
    (tmp_path / "m.html").write_text("an earlier page")
    run(weights, "--pet", study / "SUV.nii.gz", "--out", out, "--report", "--reject-below", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"w.pt", "m.nii.gz", "m.html"}
    found = Page(tmp_path / "m.html")
    assert "No lesion was found. " in found.texts["p"]
    assert "rejected 1" in " ".join(found.texts["p"])


def test_no_page_replaces_an_input(study, tmp_path):  # noqa: F811
    weights = checkpoint(tmp_path / "w.pt", model="v1")
    link = tmp_path / "m.html"
    link.symlink_to(weights)
    with refused("m.html is an input, which is never overwritten"):
        run(weights, "--pet", study / "SUV.nii.gz", "--out", tmp_path / "m.nii", "--report")
    assert {path.name for path in tmp_path.iterdir()} == {"w.pt", "m.html"}


def test_brain_studies_have_no_report(root, tmp_path):  # noqa: F811
    weights, out = checkpoint(tmp_path / "b.pt", data="brain", model="v2"), tmp_path / "out"
    with refused("--report and --skip-air need a PET; leave them out for brain MR"):
        run(weights, "--root", root / "brain", "--out", out, "--report")
    assert not out.exists()


def test_the_example_of_the_guide_to_python(study, tmp_path, monkeypatch):  # noqa: F811
    """docs/python.md: the page of a mask from elsewhere."""
    text = (ROOT / "docs" / "python.md").read_text()
    (code,) = [c for c in re.findall(r"```\n(.*?)```", text, re.S) if "report.write" in c]
    (tmp_path / "PATIENT").mkdir()
    shutil.copy(study / "SUV.nii.gz", tmp_path / "PATIENT")
    shutil.copy(study / "SEG.nii.gz", tmp_path / "PATIENT" / "mask.nii.gz")
    monkeypatch.chdir(tmp_path)
    pet = Path("PATIENT/SUV.nii.gz")
    names = {"Path": Path, "case": Case("PATIENT", "PATIENT", (None, pet), None)}
    exec(code.replace("from mirrorunet import", "import"), names)
    assert "drawn by hand" in Page(tmp_path / "P.html").texts["p"]


# ------------------------------------------------------------------------------------- in a browser
BOXES = """<script>
const boxes = [...document.images].map(image => image.getBoundingClientRect());
document.body.dataset.boxes = JSON.stringify(boxes.map(b => [b.x, b.y, b.width, b.height]));
document.body.dataset.width = document.documentElement.scrollWidth;
</script></body>"""


@pytest.fixture(scope="module")
def browse(page, tmp_path_factory):
    """A function that opens the page in a browser and returns its "dom", a text, or a "shot"."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if not program:
        pytest.skip("no chromium or google-chrome on the PATH to open the page with")
    folder = tmp_path_factory.mktemp("browser")
    still = re.sub("<script>.*?</script>", "", page.source, flags=re.S)
    (folder / "still.html").write_text(still)
    (folder / "page.html").write_text(page.source.replace("</body>", BOXES))

    def open_page(what, milliseconds=100, size="1280,3000", *options, name="page"):
        command = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--hide-scrollbars", f"--user-data-dir={folder}/profile", f"--window-size={size}",
            f"--virtual-time-budget={milliseconds}", *options,
        ]  # fmt: skip
        command += [f"--screenshot={folder}/shot.png" if what == "shot" else "--dump-dom"]
        command += [f"file://{folder}/{name}.html"]
        (folder / "shot.png").unlink(missing_ok=True)
        more = dict(check=True, capture_output=True, text=True, timeout=300)
        done = subprocess.run(command, cwd=folder, **more)
        return imread(folder / "shot.png")[..., :3] if what == "shot" else done.stdout

    return open_page


def frame_of(dom: str) -> int:
    """The degrees of the one projection that is seen."""
    seen = re.findall(r'<figure><img alt="PET, turned by (\d+) degrees"', dom)
    assert len(seen) == 1
    return int(seen[0])


def boxes_of(dom: str) -> list[list[float]]:
    text = re.search('data-boxes="(.*?)"', dom)[1]
    return json.loads(text)


def crop(shot, box) -> np.ndarray:
    x, y, width, height = map(round, box)
    return shot[y : y + height, x : x + width]


def test_a_browser_draws_the_pictures_and_their_outlines(browse, page):
    boxes, shot = boxes_of(browse("dom")), browse("shot")
    assert len(boxes) == len(page.figures)
    seen = [(f, b) for f, b in zip(page.figures, boxes) if b[2] > 0]
    assert len(seen) == 1 + 12
    for figure, box in seen:
        part = crop(shot, box)
        assert min(part.shape[:2]) >= 160 and np.ptp(part) > 0.5, figure["alt"]
        warm = part[..., 0] - part[..., 2]  # red less blue: the images are grey
        assert (warm > 0.3).sum() > 5 and (warm < -0.2).sum() > 5, figure["alt"]
    assert len({round(b[1]) for _, b in seen[1:5]}) == 1  # a lesion's four side by side


def test_the_projection_turns_in_a_browser(browse):
    early, late = browse("dom", 200), browse("dom", 1500)
    assert frame_of(early) < frame_of(late) < 360
    assert "Pause</button>" in late and '<div id="controls">' in late
    box = max(boxes_of(early), key=lambda b: b[3])
    first, second = (crop(browse("shot", time), box) for time in (200, 1500))
    assert np.abs(first - second).max() > 0.5


def test_who_prefers_less_motion_gets_a_still_picture(browse):
    dom = browse("dom", 1500, "1280,3000", "--force-prefers-reduced-motion")
    assert frame_of(dom) == 0 and "Play</button>" in dom


def test_without_a_script_the_first_picture_shows_and_no_controls(browse):
    assert frame_of(browse("dom", name="still")) == 0
    shot = browse("shot", 100, "1280,3000", "--force-prefers-reduced-motion")  # also the first
    still, boxes = browse("shot", name="still"), boxes_of(browse("dom"))
    frame, lesion = boxes[0], boxes[36]
    first = crop(still, frame)
    assert np.array_equal(first, crop(shot, frame)) and np.ptp(first) > 0.5
    below = [frame[0], frame[1] + frame[3], frame[2], lesion[1] - frame[1] - frame[3]]
    assert not np.array_equal(crop(still, below), crop(shot, below))


def test_a_page_is_as_wide_as_a_phone(browse):
    dom = browse("dom", 100, "500,1200")
    assert int(re.search('data-width="(.*?)"', dom)[1]) <= 500
