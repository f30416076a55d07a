"""Execute the tutorials: each source, a percent script in plain Python, becomes a notebook.

    python tutorials/run.py             run all and write the .ipynb files with their outputs
    python tutorials/run.py 02 04       run these only
    python tutorials/run.py --check     run all and write nothing; fail if a cell raises an error
                                        or if the cells of a notebook differ from its source

The cells run in the parent folder, as `python train.py` does. Each cell may take twenty minutes, so
that slow or busy machines finish, too.
"""

import argparse
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


def cells_of(notebook) -> list[tuple[str, str]]:
    """The cells of a notebook without their outputs: (type, text) of each."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def run(source: Path):
    """Execute a source and return its notebook. Raises CellExecutionError if a cell fails."""
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


def merge_streams(outputs: list) -> list:
    """Join consecutive pieces of one stream, and drop what a progress bar has overwritten."""
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
                lines = [line for line in lines if line.strip()] + [""]
            out.text = "\n".join(lines)
    return [out for out in merged if out.output_type != "stream" or out.text.strip()]


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
        try:
            notebook = run(source)
        except CellExecutionError as e:
            return f"{source.name}: a cell failed\n{e}"
        seconds = time.perf_counter() - start
        print(f"{source.stem}: {len(notebook.cells)} cells in {seconds:.0f} s", flush=True)
        if not args.check:
            nbformat.write(notebook, target)
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
