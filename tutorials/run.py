"""Execute the tutorials: each source, a percent script in plain Python, becomes a notebook.

    python tutorials/run.py             run all and write the .ipynb files with their outputs
    python tutorials/run.py 02 04       run these only
    python tutorials/run.py --check     run all and write nothing; fail if a cell raises an error
                                        or if the cells of a notebook differ from its source

The cells run in the parent folder, as `python train.py` does. Each cell may take twenty minutes, so
that slow or busy machines finish, too. A cell that writes to stderr fails, progress bars excepted;
these are not kept. Runs that write a notebook also write its time to results/tutorials.csv, but not
with --jobs, where notebooks slow each other down.
"""

import argparse
import csv
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

HERE = Path(__file__).resolve().parent

# The debugger of the kernels checks its own files otherwise, and prints a warning.
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
os.environ["TUTORIALS_STATIC"] = "1"  # no sliders, see slices.py

TIMES = HERE.parent / "results" / "tutorials.csv"
COLUMNS = ("notebook", "cells", "seconds", "cpu_seconds", "threads")


def cells_of(notebook) -> list[tuple[str, str]]:
    """The cells of a notebook without their outputs: (type, text) of each."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


class Noise(Exception):
    """A cell wrote something to stderr that is no progress bar."""


def run(source: Path):
    """Execute a source and return its notebook.

    Raises CellExecutionError if a cell fails, and Noise if one writes to stderr.
    """
    notebook = jupytext.read(source)
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=1200,
            kernel_name="python3",
            resources={"metadata": {"path": str(HERE.parent)}},
            config=kernel_config(Path(folder)),
        )
        client.execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # jupytext draws random names, which would differ in each run
        cell.metadata.pop("execution", None)  # the times at which the cell ran
        if cell.cell_type == "code":
            cell.outputs = merge_streams(cell.outputs)
            for out in cell.outputs:
                if out.get("name") == "stderr":
                    raise Noise(
                        f"cell {number} wrote to stderr; say it on stdout or fix it:\n{out.text}"
                    )
    return notebook


def kernel_config(folder: Path) -> Config:
    """Connect to kernels through sockets in `folder`, which other users cannot read.

    The default is TCP without encryption, about which each kernel prints a warning. Windows has no
    such sockets and keeps the default.
    """
    if os.name == "nt":
        return Config()
    connection = {"transport": "ipc", "connection_file": str(folder / "kernel.json")}
    return Config({"KernelManager": connection})


PROGRESS = re.compile(r"\d+%\s*\|.*\|")


def merge_streams(outputs: list) -> list:
    """Join consecutive pieces of one stream; drop what was overwritten, and progress bars."""
    merged: list = []
    for out in outputs:
        if out.output_type == "stream" and merged and merged[-1].get("name") == out.name:
            merged[-1].text += out.text
        else:
            merged.append(out)
    for out in merged:
        if out.output_type == "stream":
            text = re.sub(r"\n[^\n]*\x1b\[A", "", out.text)  # a bar that is nested in another one
            lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]
            if out.name == "stderr":  # a bar that has vanished leaves a line of spaces
                kept = [line for line in lines if line.strip() and not PROGRESS.search(line)]
                lines = [*kept, ""]
            out.text = "\n".join(lines)
    return [out for out in merged if out.output_type != "stream" or out.text.strip()]


def seconds_of_children() -> float:
    """The CPU time of the kernels that have ended; 0 on Windows, which does not tell."""
    times = os.times()
    return times.children_user + times.children_system


def keep_time(row: dict) -> None:
    """Replace the row of a notebook in results/tutorials.csv."""
    rows = []
    if TIMES.exists():
        with TIMES.open(newline="") as file:
            rows = [r for r in csv.DictReader(file) if r["notebook"] != row["notebook"]]
    with TIMES.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*rows, row], key=lambda r: r["notebook"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("which", nargs="*", help="first characters of names, such as 02; default: all")
    add("--check", action="store_true", help="write nothing; compare the cells")
    add("--jobs", type=int, default=1, help="notebooks at a time, each with one thread (1)")
    args = parser.parse_args()
    sources = sorted(HERE.glob("[0-9]*.py"))
    chosen = [p for p in sources if not args.which or p.name.startswith(tuple(args.which))]
    if not chosen:
        names = " ".join(p.stem for p in sources)
        sys.exit(f"no tutorial begins with {' or '.join(args.which)}; choose from {names}")
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"

    def problem_of(source: Path) -> str:
        """Run one, and write it or compare its cells: "" or what is wrong."""
        start, target = time.perf_counter(), source.with_suffix(".ipynb")
        cpu = seconds_of_children()
        try:
            notebook = run(source)
        except CellExecutionError as e:
            return f"{source.name}: a cell failed\n{e}"
        except Noise as e:
            return f"{source.name}: {e}"
        seconds = time.perf_counter() - start
        print(f"{source.stem}: {len(notebook.cells)} cells in {seconds:.0f} s", flush=True)
        if not args.check:
            nbformat.write(notebook, target)
            if args.jobs == 1:
                threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
                row = dict(notebook=source.stem, cells=len(notebook.cells), threads=threads)
                row |= dict(seconds=round(seconds), cpu_seconds=round(seconds_of_children() - cpu))
                keep_time(row)
        elif not target.exists() or cells_of(nbformat.read(target, 4)) != cells_of(notebook):
            advice = "run `make tutorials` and commit both"
            return f"{target.name}: its cells differ from {source.name}; {advice}"
        return ""

    with ThreadPoolExecutor(args.jobs) as pool:
        for problem in pool.map(problem_of, chosen):
            if problem:
                sys.exit(problem)


if __name__ == "__main__":
    main()
