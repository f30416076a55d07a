"""The committed notebooks: made from their sources, run without an error, with their figures."""

import sys

import pytest
from conftest import ROOT

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
