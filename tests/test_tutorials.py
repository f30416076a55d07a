"""The committed notebooks: made from their sources, run without an error, with their figures."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

import phantom

REASON = "the packages of the notebooks are not installed: pip install '.[dev]'"
nbformat = pytest.importorskip("nbformat", reason=REASON)
jupytext = pytest.importorskip("jupytext", reason=REASON)
pytest.importorskip("nbclient", reason=REASON)
sys.path.insert(0, str(ROOT / "tutorials"))  # before tests/faults, which has a run.py, too
from run import cells_of  # noqa: E402

SOURCES = sorted((ROOT / "tutorials").glob("[0-9]*.py"))
every_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def notebook_of(source):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def test_every_source_has_a_notebook():
    notebooks = sorted((ROOT / "tutorials").glob("*.ipynb"))
    assert [path.stem for path in notebooks] == [path.stem for path in SOURCES]
    assert len(SOURCES) == 7
    readme = (ROOT / "README.md").read_text()
    for path in notebooks:
        assert f"(tutorials/{path.name})" in readme


@every_source
def test_a_notebook_has_the_cells_of_its_source(source):
    assert cells_of(notebook_of(source)) == cells_of(jupytext.read(source))


@every_source
def test_a_notebook_ran_without_an_error(source):
    cells = notebook_of(source).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1))
    kinds = [out.output_type for cell in code for out in cell.outputs]
    assert "error" not in kinds


@every_source
def test_a_notebook_shows_at_least_three_figures(source):
    cells = notebook_of(source).cells
    outputs = [out for cell in cells for out in cell.get("outputs", [])]
    figures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(figures) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["AutoPET", "nnU-Net"])
def test_the_notebook_about_your_data_takes_a_folder(layout, tmp_path):
    """With ROOT set to a folder of either layout, all cells run, and the folder stays as it is."""
    studies, out = tmp_path / "studies", tmp_path / "out"
    for folder in phantom.write_petct(studies, 8, spacing=(10.0, 10.0, 10.0)):
        if layout == "nnU-Net":
            name = f"{folder.parent.name}_{folder.name}"
            files = {"CTres": f"imagesTr/{name}_0000", "SUV": f"imagesTr/{name}_0001"}
            for old, new in (files | {"SEG": f"labelsTr/{name}"}).items():
                path = studies / f"{new}.nii.gz"
                path.parent.mkdir(exist_ok=True)
                (folder / f"{old}.nii.gz").rename(path)

    def contents():
        found = {path: path.stat() for path in studies.rglob("*.nii.gz")}
        return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}

    before = contents()
    cells = jupytext.read(ROOT / "tutorials/07_your_data.py").cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    for name, value in (("ROOT", str(studies)), ("OUT", str(out)), ("BUDGET", "--steps 3")):
        (line,) = [line for line in code.splitlines() if line.startswith(f"{name} = ")]
        code = code.replace(line, f"{name} = {value!r}")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    options = dict(cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{layout} layout: 8 studies of 6 patients" in done.stdout
    assert "each once" in done.stdout
    assert "mean of v3 fold 0, v3 fold 1, v3 fold 2" in done.stdout
    written = {path.name for path in (out / "predictions").iterdir()}
    assert {"metrics.csv", "lesions.csv", "overview.png"} <= written
    assert contents() == before
