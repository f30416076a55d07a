"""Write the table of source files and their line counts into README.md.

    python docs/lines.py            rewrite the table between the two markers
    python docs/lines.py --check    exit with 1 if the table is out of date, and write nothing

Out of date means: a file is missing from the table or no longer exists, a text differs, or a count
is more than 10 lines off.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- lines: python docs/lines.py -->", "<!-- end of lines -->"
TOLERANCE = 10

CORE = {
    "mirror_unet.py": "the network: layers, branch, v1–v4 and their tasks; the authors' weights",
    "losses.py": "Dice, cross entropy, L2, BCE: one loss term per task",
    "data.py": "NIfTI files → cases → preprocessed cache → folds",
    "patches.py": "cached cases → augmented patches; corruption of the CT",
    "config.py": "every option of a run, the presets, and what they mean",
    "train.py": "the training loop, validation, checkpoints, the run folder",
    "predict.py": "sliding window, ensembles, masks on the input's own grid",
    "evaluate.py": "masks against truth: rows per case, means, tables",
    "metrics.py": "Dice, FPV, FNV, scores per patient: pure functions",
    "kernels/__init__.py": "the three operations, and which path runs where",
    "kernels/dice_ce.py": "soft Dice + cross entropy: maths, reference, Triton",
    "kernels/norm_act.py": "instance norm + affine + PReLU + residual: the same",
    "kernels/voxel_shuffle.py": "the keyed permutation of voxels: the same",
    "kernels/recompute.py": "keep less for the backward pass",
}
SUPPORT = {
    "layouts.py": "folders of studies in any layout → cases",
    "files.py": "clear errors, atomic writes, JSON and images read with care",
    "processes.py": "locks, child processes, cores and memory",
    "options.py": "options as fields: allowed values, checks, command line",
    "device.py": "what this machine can run: device, precision, kernels",
    "report.py": "an HTML page per study: projection, slices, lesions",
    "graph.py": "a training step, or a batch of windows, replayed as a CUDA graph",
    "parallel.py": "several processes that equal one with the joined batch",
    "hatch_build.py": "`pip install .`: the package `mirrorunet`, made of these files",
}
STUDY = {
    "baselines.py": "every other network of the paper's comparison, and `joint`",
    "claims.py": "the paper's claims as orders between systems; verdicts",
    "replicate.py": "trains the systems of a claim, resumes, never repeats a run",
    "phantom.py": "synthetic PET/CT and brain studies",
    "figures.py": "learning curves, panels, comparisons, the architecture",
}


def count(name: str) -> int:
    """Lines of a file of the repository."""
    return len((ROOT / name).read_text().splitlines())


def table() -> str:
    """The Markdown table with the counts of today."""
    rows = ["| file | lines | what |", "|---|---|---|"]
    groups = {
        "the core, in reading order": CORE, "what it stands on": SUPPORT,
        "the study's apparatus": STUDY,
    }
    for title, files in groups.items():
        counts = {name: count(name) for name in files}
        rows.append(f"| **{title}** | **{sum(counts.values())}** | |")
        rows += [f"| `{name}` | {counts[name]} | {text} |" for name, text in files.items()]
    return "\n".join(rows)


def split_readme() -> tuple[str, str, str]:
    """README.md: what comes before the table, the table, and what comes after."""
    text = (ROOT / "README.md").read_text()
    if START not in text or END not in text:
        raise SystemExit(f"README.md: the markers {START} and {END} are missing; put them back")
    before, _, rest = text.partition(START + "\n")
    inside, _, after = rest.partition(END)
    return before, inside.strip("\n"), after


def unlisted() -> list[str]:
    """Files that the lists above do not name, and names without a file."""
    sources = [*ROOT.glob("*.py"), *(ROOT / "kernels").glob("*.py")]
    names = {path.relative_to(ROOT).as_posix() for path in sources}
    return sorted(names ^ {*CORE, *SUPPORT, *STUDY})


def outdated() -> list[str]:
    """Rows of README.md's table that are out of date."""
    stated, actual = split_readme()[1].split("\n"), table().split("\n")
    if len(stated) != len(actual):
        return [f"README.md: the table has {len(stated)} rows instead of {len(actual)}"]
    found = []
    for old, new in zip(stated, actual):
        counts = [int(n) for row in (old, new) for n in re.findall(r"\| (\d+) \|", row)]
        same_text = re.sub(r"\d+", "", old) == re.sub(r"\d+", "", new)
        if not same_text or (counts and abs(counts[0] - counts[1]) > TOLERANCE):
            found.append(f"README.md: {old!r} should be {new!r}")
    return found


def main() -> None:
    if names := unlisted():
        raise SystemExit(f"{', '.join(names)}: new or gone; edit the lists in docs/lines.py")
    if "--check" in sys.argv[1:]:
        if found := outdated():
            raise SystemExit("\n".join([*found, "run: python docs/lines.py"]))
        return
    before, _, after = split_readme()
    (ROOT / "README.md").write_text(f"{before}{START}\n\n{table()}\n\n{END}{after}")
    print(table())


if __name__ == "__main__":
    main()
