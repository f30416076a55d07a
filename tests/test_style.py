"""How the code and the texts read: line lengths, plain English, one spelling.

python tests/test_style.py [FILE ...] prints what it finds.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = "mirror_unet losses data patches config train predict evaluate metrics".split()
PER = (  # nouns that take "per"
    "modality case voxel class step sample channel element instance patient system fold run row "
    "launch window study tile target level cube cell branch epoch thread core process decoder "
    "encoder task measure axis lesion GPU version"
)
COUNTED = (  # what there is one of, per noun
    "one two three four five six eight ten dozen rows? lines? bytes? bits? patches launches? steps "
    "numbers? values? weights channels logits programs? processes studies minutes seconds hours "
    "runs? maps? Dice FPV FNV masks? cubes cycles prompts? sums? means? slopes? columns? tables? "
    "cases decoders? encoders? U-Nets? seeds? segmentations? permutation gradient loss score task "
    "kernel stride"
)
WHERE = (
    r"\bwhere (?:there (?:is|are) (?:no|none|one|not)|it cannot|it can't|that is cheap)\b"
)
PHRASES = {  # idiom: what to write instead
    rf"(?<!as )(?<!is )\b(?:{'|'.join(COUNTED.split())}|\d+) an? (?:{'|'.join(PER.split())})\b":
        "say per",
    r"\bof (?:its|their|his) own\b": "its own, a separate",
    r"\banew\b": "again, from scratch",
    r"\bbesides?\b": "next to, in addition to",
    r"\bin place of\b": "instead of",
    r"\bat hand\b": "available, given",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\b(?:goes|go|going|went) on\b": "resume, continue",
    r"\bill\b": "with tumor, positive",
    r"\bhealthy\b": "without tumor, negative",
    r"can[’']t be told|cannot be told": "inconclusive",
    r"\bwhole or not\b|\bin a sentence\b": "atomic; a clear message",
    WHERE: "if, when",
    r"[Tt]umour(?!$)": "tumor",
}
# Names of data sets and of options of older versions.
NAMES = re.compile(r"brain_tumour|BrainTumour|was=\"\w+\"|--(no-)?healthy")


def tracked(*patterns: str) -> list[Path]:
    """The repository's files of these patterns."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    command += patterns
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\n") if name and (ROOT / name).exists()]


def idioms(text: str) -> list[str]:
    """Idioms of the table above, one line of report per place."""
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = NAMES.sub("", line)
        for pattern, better in PHRASES.items():
            for match in re.finditer(pattern, line):
                found.append(f"{number}: {match[0]!r}: {better}")
    return found


def code_lines(path: Path) -> list[str]:
    """Lines that hold code: no blank lines, comments or docstrings."""
    text = path.read_text()
    kept = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT):
            kept |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            kept -= set(range(node.lineno, node.end_lineno + 1))
    lines = text.split("\n")
    return [lines[i - 1] for i in sorted(kept) if i <= len(lines) and lines[i - 1].strip()]


TEXTS = tracked("*.py", "*.md", "Makefile", "*.toml", "*.cff", ".ci/run")


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_plain_english(path):
    if path == Path(__file__).resolve():
        pytest.skip("this file holds the table of idioms")
    assert not idioms(path.read_text())


def test_lines_are_short():
    code = [*ROOT.glob("*.py"), *(ROOT / "kernels").glob("*.py")]
    for path in code:
        lines = path.read_text().split("\n")
        assert not [f"{path.name}:{i}" for i, s in enumerate(lines, 1) if len(s) > 100]
    lines = [line for p in code for line in code_lines(p)]
    assert sum(map(len, lines)) / len(lines) <= 54


def test_the_core_stays_small():
    code = [ROOT / f"{name}.py" for name in CORE] + list((ROOT / "kernels").glob("*.py"))
    count = sum(len(p.read_text().splitlines()) for p in code)
    assert count < 5200


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or TEXTS):
        text = path.read_text()
        lines = enumerate(text.split("\n"), 1)
        long = [f"{i}: {len(s)} characters" for i, s in lines if len(s) > 100]
        code = code_lines(path) if path.suffix == ".py" else []
        mean = sum(map(len, code)) / max(1, len(code))
        size = f"{len(text.splitlines())} lines, mean code line {mean:.1f}"
        print(f"{path}: {size}, {len(long)} over 100 characters")
        for line in idioms(text) + (long if path.suffix == ".py" else []):
            print(f"   {line}")
