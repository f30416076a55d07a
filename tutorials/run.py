"""Run the tutorials: each source, a percent script that reads as plain Python, becomes a notebook with its outputs beside it.

    python tutorials/run.py                run all and write the .ipynb files
    python tutorials/run.py 02 04          these only
    python tutorials/run.py --check        run all, write nothing; fail if a cell errors or a notebook's cells are not its source's

Cells run in this folder's parent, as `python train.py` does. A cell is given twenty minutes, for machines that are slow or busy.
"""

import argparse
import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent


def cells_of(notebook) -> list[tuple[str, str]]:
    """What a reader sees of a notebook without its outputs: (kind, text) of each cell."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def run(source: Path):
    """The notebook of a source, with the outputs of running it. Raises CellExecutionError where a cell fails."""
    notebook = jupytext.read(source)
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(HERE.parent)}}).execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # instead of a random name, so that a notebook changes only where its source or an output does
        cell.metadata.pop("execution", None)  # when each cell ran
        if cell.cell_type == "code":  # one text instead of the pieces in which it came
            cell.outputs = _joined(cell.outputs)
    return notebook


def _joined(outputs: list) -> list:
    """Outputs with neighbouring pieces of one stream put together, and what a progress bar overwrote left out."""
    joined: list = []
    for out in outputs:
        if out.output_type == "stream" and joined and joined[-1].get("name") == out.name:
            joined[-1].text += out.text
        else:
            joined.append(out)
    for out in joined:
        if out.output_type == "stream":
            out.text = re.sub(r"\n[^\n]*\x1b\[A", "", out.text)  # a bar below another one
            out.text = "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in out.text.split("\n"))
    return [out for out in joined if out.output_type != "stream" or out.text.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="*", help="beginnings of names, such as 02; default all")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    sources = [p for p in sorted(HERE.glob("[0-9]*.py")) if not args.which or p.name.startswith(tuple(args.which))]
    if not sources:
        sys.exit(f"no tutorial begins with {' or '.join(args.which)}; there are {[p.stem for p in sorted(HERE.glob('[0-9]*.py'))]}")
    for source in sources:
        start, target = time.perf_counter(), source.with_suffix(".ipynb")
        try:
            notebook = run(source)
        except CellExecutionError as e:
            sys.exit(f"{source.name}: a cell fails\n{e}")
        print(f"{source.stem}: {len(notebook.cells)} cells in {time.perf_counter() - start:.0f} s", flush=True)
        if not args.check:
            nbformat.write(notebook, target)
        elif not target.exists() or cells_of(nbformat.read(target, as_version=4)) != cells_of(notebook):
            sys.exit(f"{target.name}: its cells are not those of {source.name}; run `make tutorials` and commit both")


if __name__ == "__main__":
    main()
