"""What the notebooks say, ask and show: numbers, exercises, colors, slices, noise, times."""

import ast
import csv
import importlib
import json
import os
import re
import subprocess
import symtable
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from vision import alike

import figures
import losses
from mirror_unet import MirrorUNet
from patches import corrupt_ct

REASON = "the packages of the notebooks are not installed: pip install '.[dev]'"
nbformat = pytest.importorskip("nbformat", reason=REASON)
pytest.importorskip("jupytext", reason=REASON)
pytest.importorskip("nbclient", reason=REASON)
sys.path.insert(0, str(ROOT / "tutorials"))  # before tests/faults, which has a run.py, too
import run  # noqa: E402

TUTORIALS = ROOT / "tutorials"
SOURCES = sorted(TUTORIALS.glob("[0-9]*.py"))
every_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def notebook_of(source):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


# ------------------------------------------------------------------------------- numbers in texts
# The rule. A sentence of a text cell that holds a word for a result and a number states a result.
# Each of its numbers is printed by one of the four code cells before the text or by the one after
# it, or stands in the section of results/ or docs/ that the sentence's paragraph links to. Numbers
# in digits count anywhere in the sentence; numbers in words ("twelve") count directly before a unit
# or "times". A number is found if a printed one rounds to it. There are no exceptions.
RESULTS = re.compile(
    r"\b(Dice|AUC|FPV|FNV|HU|SUV|accura\w+|sensitivity|specificity|errors?|variance|bytes?|ml|"
    r"milliliters?|percent|seconds?|minutes?|hours?|microseconds?|ms|times|faster|slower|larger|"
    r"smaller|fewer|higher|lower|better|worse)\b|%"
)
DIGITS = re.compile(r"(?<![\w.^{/#-])-?\d[\d,]*(?:\.\d+)?(?:\^\{?-?\d+\}?|e-?\d+)?(?![\w])")
WORDS = {
    word: n
    for n, word in enumerate(
        "one two three four five six seven eight nine ten eleven twelve".split(), start=1
    )
} | {"twenty": 20, "thirty": 30, "hundred": 100, "hundreds": 100, "thousand": 1000, "half": 0.5}
UNITS = r"(?:bytes?|ml|milliliters?|percent|seconds?|minutes?|hours?|ms|times)"
SPELLED = re.compile(rf"\b({'|'.join(WORDS)})(?: (?:a|an|of|or \w+))* {UNITS}\b", re.I)
DEFINITION = re.compile(r"\$\$[^$]*[A-Za-z][^$]*\$\$|\$[^$]*[A-Za-z][^$]*\$|`[^`]*[A-Za-z][^`]*`")
LINK = re.compile(r"\]\(\.\./((?:results|docs)/[^)#]*)(?:#([^)]*))?\)")


def value_of(text: str) -> tuple[float, int]:
    """The value of a number in digits, and how many decimals it has."""
    text = text.replace(",", "").rstrip(".")
    mantissa, _, power = re.sub(r"\^\{?(-?\d+)\}?", r"^\1", text).partition("^")
    value = float(mantissa) ** int(power) if power else float(mantissa)
    return value, len(mantissa.partition(".")[2].partition("e")[0])


def numbers_in(text: str) -> list[tuple[str, float, int]]:
    """All numbers of a text, in digits and before a unit in words: as written, value, decimals."""
    found = [(m[0], *value_of(m[0])) for m in DIGITS.finditer(text)]
    return found + [(m[0], WORDS[m[1].lower()], 0) for m in SPELLED.finditer(text)]


def sentences_of(text: str) -> list[tuple[str, str]]:
    """(sentence, its paragraph), line breaks removed. Items of lists are paragraphs."""
    text = re.sub(r"^```.*$", "", text, flags=re.M)  # what a block of code says is read
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*[*|-] )|\n(?=#)", text)
    joined = [" ".join(paragraph.split()) for paragraph in paragraphs]
    return [(s, p) for p in joined for s in re.split(r"(?<=[.?!])\s+(?=[A-Z(*\[`$])", p)]


def section_of(name: str, anchor: str | None) -> str:
    """A file that is linked to, or its section under the heading of that anchor."""
    text = (ROOT / name).read_text()
    if not anchor:
        return text
    parts = re.split(r"^(?=#+ )", text, flags=re.M)
    titles = [part.split("\n")[0].lstrip("# ").lower() for part in parts]
    names = [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles]
    return parts[names.index(anchor)]


def printed_by(cell) -> str:
    """The text that a code cell printed or showed."""
    texts = [out.get("text", "") for out in cell.get("outputs", [])]
    shown = [out.get("data", {}).get("text/plain", "") for out in cell.get("outputs", [])]
    return "\n".join([*texts, *(text for text in shown if not text.startswith("<"))])


def unproven(cells) -> list[str]:
    """The numbers of text cells that no cell nearby printed and no linked section holds."""
    code = [n for n, cell in enumerate(cells) if cell.cell_type == "code"]
    found = []
    for n, cell in enumerate(cells):
        if cell.cell_type != "markdown":
            continue
        near = [k for k in code if k < n][-4:] + [k for k in code if k > n][:1]
        printed = "\n".join(printed_by(cells[k]) for k in near)
        for sentence, paragraph in sentences_of(cell.source):
            if not RESULTS.search(sentence):
                continue
            text = printed + "\n".join(section_of(*link) for link in LINK.findall(paragraph))
            known = [value for _, value, _ in numbers_in(text)]
            for written, value, decimals in numbers_in(DEFINITION.sub("", LINK.sub("]", sentence))):
                if not any(round(abs(k), decimals) == abs(value) for k in known):
                    found.append(f"cell {n}: {written!r} in {sentence!r}")
    return found


@every_source
def test_links_of_a_notebook_lead_somewhere(source):
    texts = [cell.source for cell in notebook_of(source).cells if cell.cell_type == "markdown"]
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", "\n".join(texts)):
        name, _, anchor = link.partition("#")
        path = (TUTORIALS / name).resolve()
        assert path.exists(), link
        if anchor:
            assert section_of(path.relative_to(ROOT).as_posix(), anchor)


@every_source
def test_numbers_of_results_come_from_a_cell_or_a_linked_section(source):
    assert not unproven(notebook_of(source).cells)


def text_of(*parts: str | tuple[str, str]):
    """Cells: a text is one of text, ("printed", text) a code cell that prints the text."""
    new, cells = nbformat.v4, []
    for part in parts:
        if isinstance(part, str):
            cells.append(new.new_markdown_cell(part))
        else:
            cells.append(new.new_code_cell("", outputs=[new.new_output("stream", text=part[1])]))
    return cells


UNPROVEN = [
    "The mean Dice is 0.83.",
    "The kernel needs\ntwelve times fewer launches.",
    "Averaging removes $0.83$ of the error.",
    "(this takes ten minutes or so)",
    "* The AUC moves\n  by 0.03.",
    "| v1 | Dice 0.71 |",
    "In [the table](../results/a.md#short-runs) the Dice is 0.999.",
    "The Dice of v3 is 0.631.\n\nSee [the table](../results/a.md#short-runs).",
    "The Dice is 0.714 ([wrong section](../results/a.md#short-runs)).",
    "```\npython train.py  # five minutes\n```",
]
PROVEN = [
    "The mean Dice is 0.6.",  # 0.625, printed
    "The mean Dice is 0.625.",
    "It removes 26 bytes.",  # 26.02
    "In [the table](../results/a.md#short-runs) v3 has a Dice of 0.631.",
    "A Dice of 0.5 ([row A](../results/b.csv)).",
    "The Dice loss has a constant, $s=10^{-5}$, and `STEPS = 1000`.",  # definitions
    "There are 28 patients.",  # not a word for a result
]


@pytest.fixture
def linked(tmp_path, monkeypatch):
    """A repository with two files of results."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results/a.md").write_text("# Runs\nv1 0.714\n## Short runs\nv3 0.631\n# More\n")
    (tmp_path / "results/b.csv").write_text("case,dice\nA,0.5\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)


@pytest.mark.parametrize("text", UNPROVEN)
def test_a_planted_number_is_found(text, linked):
    assert unproven(text_of(("printed", "Dice 0.625, 26.02 bytes"), text))


@pytest.mark.parametrize("text", PROVEN)
def test_numbers_that_are_printed_or_linked_pass(text, linked):
    assert not unproven(text_of(("printed", "Dice 0.625, 26.02 bytes"), text))


def test_a_number_is_printed_nearby():
    printed, other, text = ("printed", "Dice 0.83"), ("printed", ""), "The Dice is 0.83."
    assert not unproven(text_of(text, printed))
    assert unproven(text_of(text, other, printed))
    assert not unproven(text_of(printed, other, other, other, text))
    assert unproven(text_of(printed, other, other, other, other, text))


# --------------------------------------------------------------------------------------- exercises
RUNNER = """
import contextlib, io, json, sys
from pathlib import Path

folder, names = Path(sys.argv[1]), {"__name__": "__main__"}
for n, source in enumerate(json.loads(folder.joinpath("cells.json").read_text())):
    file = folder / f"cell_{n}.py"  # a file, in which Triton finds the source of a kernel
    file.write_text(source)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(source, file, "exec"), names)
        said = printed.getvalue().strip().split("\\n")[-1]
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps(said), flush=True)
"""


def run_cells(sources: list[str], folder: Path) -> list[str]:
    """Execute cells in a fresh Python; return the last line of each, or its error."""
    (folder / "cells.json").write_text(json.dumps(sources))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, "-c", RUNNER, str(folder)]
    options = dict(cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    done = subprocess.run(command, **options)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == len(sources), done.stderr
    return said


def names_of(source: str) -> tuple[set[str], set[str]]:
    """The names that a cell sets at its top level, and those that it needs from other cells."""
    top = symtable.symtable(source, "cell", "exec")
    scopes, defined, read = [top], set(), set()
    for scope in scopes:
        scopes += scope.get_children()
        for name in scope.get_symbols():
            if scope is top and (name.is_assigned() or name.is_imported()):
                defined.add(name.get_name())
            if name.is_referenced() and (scope is top or name.is_global()):
                read.add(name.get_name())
    first = {"store": {}, "load": {}}  # name: the line in which it first occurs
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first["store"].setdefault(node.name, node.lineno)
        elif isinstance(node, ast.Name):
            lines = first["load" if isinstance(node.ctx, ast.Load) else "store"]
            lines[node.id] = min(node.lineno, lines.get(node.id, node.lineno))
    set_before = {n for n in defined if first["store"].get(n, 0) < first["load"].get(n, 0)}
    return defined, read - set_before


def needed(cells: list, last: int) -> list[int]:
    """The code cells before `last` without which its names are missing; the first one is."""
    chosen, wanted = {0}, names_of(cells[last].source)[1]
    for n in range(last - 1, -1, -1):
        defined, read = names_of(cells[n].source)
        if defined & wanted and "exercise" not in tags_of(cells[n]):
            chosen.add(n)
            wanted = (wanted - defined) | read
    return sorted(chosen)


def tags_of(cell) -> list[str]:
    return cell.metadata.get("tags", [])


class Body(ast.NodeTransformer):
    """Replaces the body of every function by one statement."""

    def __init__(self, statement: str):
        self.statement = statement

    def visit_FunctionDef(self, node):
        first = node.args.args[0].arg
        node.body = ast.parse(self.statement.format(first=first)).body
        return node


def stubs_of(source: str) -> list[str]:
    """An exercise as it is, with functions that do nothing, and with ones that return their input.

    A kernel returns nothing, and has the first two forms only.
    """
    forms = [source, ast.unparse(Body("pass").visit(ast.parse(source)))]
    if "@jit" not in source:
        forms.append(ast.unparse(Body("return {first}").visit(ast.parse(source))))
    return forms


def faults_of_exercises(cells: list, folder: Path) -> list[str]:
    """What is wrong with the exercises among code cells; each has a check and a solution after it.

    Runs only the cells that they need. A check has to say "not yet" of the exercise as it is, not
    "right" of the other stubs, and "right" of the solution.
    """
    parts, kinds, given = [], [], set()
    for n, cell in enumerate(cells):
        if "exercise" not in tags_of(cell):
            continue
        check, solution = cells[n + 1 : n + 3]
        assert tags_of(check) == ["check"] and tags_of(solution) == ["solution"], cell.source
        for k in needed(cells, n) + needed(cells, n + 1) + needed(cells, n + 2):
            if k not in given | {n, n + 1}:
                given.add(k)
                parts.append(cells[k].source)
                kinds.append("other")
        for stub in stubs_of(cell.source):
            parts += [stub, check.source]
            kinds += ["other", "stub"]
        parts += [cell.source, check.source, solution.source]
        kinds += ["other", "committed", "solution"]
    assert "committed" in kinds, "there is no exercise"
    expected = {
        "committed": r"not yet",
        "stub": r"(?!right)",
        "solution": r"right",
        "other": r"(?!\w+(Error|Exception): )",
    }
    said = run_cells(parts, folder)
    lines = [f"{kind}: {line!r} of\n{part}" for line, kind, part in zip(said, kinds, parts)]
    return [
        text for text, line, kind in zip(lines, said, kinds) if not re.match(expected[kind], line)
    ]


WITH_EXERCISES = [path for path in SOURCES if '"exercise"' in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("source", WITH_EXERCISES, ids=lambda path: path.stem)
def test_the_check_of_an_exercise_fails_on_its_stub_and_passes_on_its_solution(source, tmp_path):
    cells = [cell for cell in notebook_of(source).cells if cell.cell_type == "code"]
    assert not faults_of_exercises(cells, tmp_path)


CHECK = """
def check(function):
    try:
        print("right" if function(3) == {expected} else "not yet")
    except NotImplementedError:
        print("{otherwise}")


check(double)
"""


@pytest.mark.parametrize(
    "expected, otherwise, solution, faults",
    [
        (6, "not yet", "2 * x", 0),
        (6, "right", "2 * x", 2),  # says "right" of a stub: as it is, and among the three forms
        (3, "not yet", "x", 1),  # says "right" of a function that returns its input
        (6, "not yet", "3 * x", 1),  # the solution is wrong
    ],
)
def test_planted_faults_of_exercises_are_found(expected, otherwise, solution, faults, tmp_path):
    def cell(source, *tags):
        return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})

    cells = [
        cell("first = True"),
        cell("def double(x):\n    raise NotImplementedError  # your turn", "exercise"),
        cell(CHECK.format(expected=expected, otherwise=otherwise), "check"),
        cell(f"def twice(x):\n    return {solution}\n\n\ncheck(twice)", "solution"),
    ]
    assert len(faults_of_exercises(cells, tmp_path)) == faults


@every_source
def test_cells_to_be_filled_in_are_tagged_as_exercises(source):
    for cell in notebook_of(source).cells:
        if cell.cell_type == "code" and re.search(r"your turn", cell.source, re.I):
            assert "exercise" in tags_of(cell), cell.source


def test_the_training_of_notebook_4_may_have_more_steps_than_before():
    """Its reader sets STEPS after all cells have run, and runs the cells from `train` on again."""
    source = (TUTORIALS / "04_voxel_shuffling.py").read_text()
    (train,) = [n for n in ast.parse(source).body if getattr(n, "name", "") == "train"]
    size = (32, 32, 32)

    class Patches:
        def __init__(self, cases, size, count, **options):
            self.count = count

        def __getitem__(self, n):
            if n >= self.count:
                raise IndexError(n)
            return {"image": torch.rand(2, *size), "key": torch.tensor(n)}

    def batch_of(patches, numbers):
        items = [patches[n] for n in numbers]
        return torch.stack([p["image"] for p in items]), torch.stack([p["key"] for p in items])

    names = dict(torch=torch, losses=losses, MirrorUNet=MirrorUNet, corrupt_ct=corrupt_ct)
    names |= dict(PatchDataset=Patches, batch_of=batch_of, size=size, flips=None, cases=[0] * 8)
    names |= dict(inputs={"none": torch.rand(1, 1, *size)}, SIDE=8, CUBES=1, STEPS=1)
    exec(compile(ast.Module([train], []), "train", "exec"), names)
    assert list(names["train"]("none")[1]) == [0, 1]
    names["STEPS"] = 3
    assert list(names["train"]("none")[1]) == [0, 3]


# ------------------------------------------------------------------------------------------ colors
HEX = r"#[0-9a-fA-F]{6}"


def colors_of(cells: list) -> list[tuple[str, set[str]]]:
    """Each code cell after the first and its colors: written there, or named there."""
    names = {}  # constants of the notebook: name -> color
    for cell in cells:
        for node in ast.parse(cell.source).body:
            if isinstance(node, ast.Assign):
                targets, values = node.targets[0], node.value
                pairs = [(targets, values)]
                if isinstance(targets, ast.Tuple) and isinstance(values, ast.Tuple):
                    pairs = list(zip(targets.elts, values.elts))
                for target, value in pairs:
                    text = ast.unparse(value).strip("'")
                    text = names.get(text, text)
                    if re.fullmatch(HEX, text):
                        names[ast.unparse(target)] = text.upper()
    theirs = {f"figures.{n}": v for n, v in vars(figures).items() if isinstance(v, str)}
    names |= {name: v.upper() for name, v in theirs.items() if re.fullmatch(HEX, v)}
    found = []
    for cell in cells[1:]:
        nodes = [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.expr)]
        used = {names[text] for n in nodes if (text := ast.unparse(n)) in names}
        used |= {color.upper() for color in re.findall(HEX, cell.source)}
        found.append((cell.source, used))
    return found


def test_colors_that_someone_confuses_are_found():
    assert alike({"#D62728", "#2CA02C"})  # matplotlib's red and green
    assert alike({"#0072B2", "#009E73"})  # blue and green of Okabe and Ito: tritan
    assert not alike({"#56B4E9", "#D55E00", "#F0E442"})
    first = nbformat.v4.new_code_cell("A, B = '#0072B2', '#009E73'\nC = A")
    cell = nbformat.v4.new_code_cell("plot(A, color=C)\nplot('#123456', figures.INK)")
    ((_, used),) = colors_of([first, cell])
    assert used == {"#0072B2", "#123456", figures.INK.upper()}


@every_source
def test_nobody_confuses_the_colors_of_a_cell(source):
    cells = [cell for cell in notebook_of(source).cells if cell.cell_type == "code"]
    for text, used in colors_of(cells):
        assert not alike(used), text


# ------------------------------------------------------------------------------------------ slices
@pytest.fixture
def slices(monkeypatch):
    monkeypatch.syspath_prepend(str(TUTORIALS))
    monkeypatch.delenv("TUTORIALS_STATIC", raising=False)
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "show", lambda: None)
    module = importlib.import_module("slices")
    yield module
    plt.close("all")


class Widgets(types.ModuleType):
    """Stands for ipywidgets: keeps the sliders, and moves each to its end at once."""

    def __init__(self):
        super().__init__("ipywidgets")
        self.moved = []

    def IntSlider(self, **options):
        return options

    def interact(self, function, index):
        assert index["min"] <= index["value"] <= index["max"]
        self.moved.append(index["max"])
        function(index["max"])


def a_kernel(monkeypatch, slices, kernel=True):
    """Let it look as if a notebook ran this, or as if a shell without a kernel did."""
    shell = types.SimpleNamespace(kernel=object()) if kernel else types.SimpleNamespace()
    monkeypatch.setattr(slices, "get_ipython", lambda: shell)


VOLUME = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
MASK = (VOLUME > 60) & (VOLUME < 100)


def show(slices, **options):
    images = {"CT": (VOLUME, {}, "HU"), "PET": (VOLUME, dict(vmin=0, vmax=9), "SUV")}
    return slices.show(images, {"truth": MASK}, (1, 1, 2), **options)


def figures_drawn():
    import matplotlib.pyplot as plt

    return [plt.figure(n) for n in plt.get_fignums()]


def test_without_ipywidgets_there_is_a_figure_and_nothing_else(slices, monkeypatch):
    a_kernel(monkeypatch, slices)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # as if it were not installed
    show(slices)
    (figure,) = figures_drawn()
    pictures = [axes for axes in figure.axes if axes.images]
    assert len(pictures) == 2 * 5
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert {"CT", "PET", "HU", "SUV"} <= set(labels)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["truth"]


def test_with_ipywidgets_a_slider_follows_the_figure(slices, monkeypatch):
    widgets = Widgets()
    a_kernel(monkeypatch, slices)
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    show(slices)
    assert widgets.moved == [5]  # the last of six axial slices
    several, one = figures_drawn()
    title = [axes.get_title() for axes in one.axes if axes.images]
    assert title == ["slice 6 of 6"] * 2
    assert len([axes for axes in several.axes if axes.images]) == 10


@pytest.mark.parametrize("why", ["no kernel", "static"])
def test_no_slider_without_a_kernel_or_when_run_py_makes_the_notebook(slices, monkeypatch, why):
    widgets = Widgets()
    a_kernel(monkeypatch, slices, kernel=why != "no kernel")
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    if why == "static":
        monkeypatch.setenv("TUTORIALS_STATIC", "1")
    show(slices)
    assert not widgets.moved
    assert len(figures_drawn()) == 1


@pytest.mark.parametrize("plane, count", [("sagittal", 4), ("coronal", 5), ("axial", 6)])
def test_slices_lie_along_their_axis(slices, plane, count):
    stack = show(slices, plane=plane)
    axis = slices.AXES[plane]
    assert stack.count == count
    np.testing.assert_array_equal(stack.slice(VOLUME, 1), np.take(VOLUME, 1, axis).T)


def test_slices_are_spread_over_the_outlines_or_else_over_everything(slices):
    stack = show(slices)
    found = np.flatnonzero(MASK.any((0, 1)))
    assert stack.spread(2) == [found[0], found[-1]]
    empty = slices.Stack(stack.images, {"truth": np.zeros_like(MASK)}, (1, 1, 1), "axial")
    assert empty.spread(2) == [0, 5]


# ------------------------------------------------------------------------------------------ run.py
def stderr(text):
    return nbformat.v4.new_output("stream", name="stderr", text=text)


def test_progress_bars_are_dropped_and_other_messages_are_not():
    bar = (
        "training  34% |███▍      | 00:20<00:38 , step 34\rtraining 100% |██████████| 01:41<00:00\n"
    )
    assert run.merge_streams([stderr("preprocessing: 100%|██████████| 24/24\n"), stderr(bar)]) == []
    (kept,) = run.merge_streams([stderr(bar), stderr("a warning\n")])
    assert kept.text == "a warning\n"


def test_a_cell_that_writes_to_stderr_fails(tmp_path):
    source = tmp_path / "01_noise.py"
    source.write_text("# %%\nimport sys\n\n# %%\nprint('a warning', file=sys.stderr)\n")
    with pytest.raises(run.Noise, match="(?s)cell 1 .*a warning"):
        run.run(source)


def test_a_time_replaces_that_of_the_run_before(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "TIMES", tmp_path / "times.csv")
    for name, seconds in (("02_b", 9), ("01_a", 5), ("02_b", 7)):
        row = dict(notebook=name, cells=3, seconds=seconds, cpu_seconds=1, threads=1)
        run.keep_time(row)
    lines = (tmp_path / "times.csv").read_text().splitlines()
    assert lines[1:] == ["01_a,3,5,1,1", "02_b,3,7,1,1"]


@every_source
def test_committed_notebooks_have_no_noise_and_no_widgets(source):
    outputs = [out for cell in notebook_of(source).cells for out in cell.get("outputs", [])]
    assert not [out for out in outputs if out.get("name") == "stderr"]
    kinds = {kind for out in outputs for kind in out.get("data", {})}
    assert kinds <= {"text/plain", "image/png", "text/markdown"}


@every_source
def test_the_time_of_a_notebook_is_kept_and_short(source):
    if "results/tutorials.csv" not in source.read_text():
        pytest.skip("it does not say how long it takes")
    with open(ROOT / "results" / "tutorials.csv") as file:
        times = {row["notebook"]: row for row in csv.DictReader(file)}
    row = times[source.stem]
    assert int(row["cells"]) == len(notebook_of(source).cells)
    assert int(row["threads"]) == 1
    assert int(row["cpu_seconds"]) <= 180  # what it takes alone, on one core
