"""The committed notebooks are those of their committed sources, ran without an error, and have their figures."""

import sys

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="the notebooks' packages are not installed: pip install '.[dev]'")
jupytext = pytest.importorskip("jupytext", reason="the notebooks' packages are not installed: pip install '.[dev]'")
sys.path.append(str(ROOT / "tutorials"))

SOURCES = sorted((ROOT / "tutorials").glob("[0-9]*.py"))


def notebook_of(source):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def test_every_tutorial_is_there():
    assert [s.stem for s in SOURCES] == ["01_fission", "02_losses", "03_kernels", "04_voxel_shuffling", "05_petct", "06_brain"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_a_notebook_has_the_cells_of_its_source(source):
    from run import cells_of

    assert cells_of(notebook_of(source)) == cells_of(jupytext.read(source))


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_a_notebook_ran_from_top_to_bottom_and_shows_its_figures(source):
    code = [cell for cell in notebook_of(source).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [out for cell in code for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error"]
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 3
