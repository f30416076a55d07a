"""What README.md and the other documents say of the code is true of the code."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import predict
import replicate
import train
from baselines import NAMES
from config import parse_config
from mirror_unet import TASKS, MirrorUNet

README = (ROOT / "README.md").read_text()
GUIDES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("results/*.md"))]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("tutorials/*.md")]
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


# ------------------------------------------------------------------------------------------- links
def anchors_of(document: Path) -> set[str]:
    """The names by which GitHub links to the headings of a document."""
    text = FENCE.sub("", document.read_text())
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", GUIDES + OTHERS, ids=name_of)
def test_files_and_headings_that_are_linked_exist(document):
    text = FENCE.sub("", document.read_text())
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", text)
    for link in links:
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_of(target), link


def test_anchors_are_those_of_github(tmp_path):
    document = tmp_path / "a.md"
    document.write_text(
        "# The `four` versions, v1-v4\n"
        "```\n"
        "# a comment\n"
        "```\n"
        "## Size (`a/b.py`)\n"
    )
    assert anchors_of(document) == {"the-four-versions-v1-v4", "size-abpy"}


# ---------------------------------------------------------------------------------------- commands
def commands(document: Path, program: str) -> list[list[str]]:
    """The command lines of a program in a document's code blocks, as lists of arguments."""
    blocks = "\n".join(FENCE.findall(document.read_text()))
    start = rf"(?:\.venv/bin/)?(?:python|torchrun --\S+) {re.escape(program)}"
    lines = re.findall(rf"^{start} ?(.*)$", blocks, re.M)
    return [shlex.split(line, comments=True) for line in lines]


def test_commands_are_found_in_code_blocks(tmp_path):
    document = tmp_path / "a.md"
    document.write_text(
        "```\n"
        "python train.py --lr 1  # fast\n"
        "torchrun --nproc_per_node=4 train.py --batch 2\n"
        "```\n"
        "python train.py --lr 2\n"
    )
    assert commands(document, "train.py") == [["--lr", "1"], ["--batch", "2"]]


@pytest.mark.parametrize("document", GUIDES, ids=name_of)
def test_every_command_has_options_that_its_program_knows(document):
    for arguments in commands(document, "train.py"):
        arguments = [a for a in arguments if a != "--resume"]  # it would look for the run
        c = parse_config([*arguments, "--device", "cpu"])
        assert c.model in (*TASKS[c.task], *NAMES[c.task]), arguments
    for arguments in commands(document, "predict.py"):
        assert predict.parse_arguments(arguments).checkpoint
    for arguments in commands(document, "replicate.py"):
        parse_config(replicate.parse_arguments(arguments)[1])  # what goes to train.py


@pytest.mark.parametrize("program", ["train.py", "predict.py", "replicate.py"])
def test_the_documents_show_how_a_program_is_called(program):
    found = [line for document in GUIDES for line in commands(document, program)]
    assert len(found) >= 4


@pytest.mark.parametrize("document", GUIDES + OTHERS, ids=name_of)
def test_every_make_target_exists(document):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    blocks = "\n".join(FENCE.findall(document.read_text()))
    for words in re.findall(r"^make ([\w -]+?)(?: *#.*| *ARGS=.*)?$", blocks, re.M):
        assert set(words.split()) <= set(targets), words


def test_the_example_of_the_readme_runs():
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
    small = code.replace("64, 64, 64", "32, 32, 32")
    assert small != code
    names = {}
    exec(small, names)
    assert set(names["parts"]) == {"seg_dice", "seg_ce", "ct_l2", "pet_l2", "cls_bce"}
    assert torch.isfinite(names["loss"])
    assert names["probability"].shape == (2, 32, 32, 32)


# ------------------------------------------------------------------------------ numbers and names
def lines_of(name: str) -> int:
    return (ROOT / name).read_text().count("\n")


def test_the_table_of_files_has_their_lines():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README, re.M)
    stated = {name: int(count) for name, count in rows}
    sources = [*ROOT.glob("*.py"), *(ROOT / "kernels").glob("*.py")]
    assert set(stated) == {path.relative_to(ROOT).as_posix() for path in sources}
    for name, count in stated.items():
        assert abs(count - lines_of(name)) <= 10, f"{name}: run python docs/lines.py"


def test_the_table_of_versions_has_their_parameters():
    rows = re.findall(r"^\| (brain )?(v\d) \|.*\| ([\d,]+) \|$", README, re.M)
    versions = [("", version) for version in TASKS["petct"]] + [("brain ", "v2")]
    assert [row[:2] for row in rows] == versions
    for brain, version, stated in rows:
        model = MirrorUNet(version, preset="brain" if brain else "petct")
        count = sum(p.numel() for p in model.parameters())
        assert f"{count:,}" == stated, version


def test_the_table_of_systems_names_every_system():
    text = (ROOT / "docs" / "baselines.md").read_text()
    rows = re.findall(r"^\| ((?:`[\w-]+` ?)+)\|", text, re.M)
    named = re.findall(r"`([\w-]+)`", " ".join(rows))
    assert sorted(named) == sorted([*TASKS["petct"], *NAMES["petct"]])
    brain = text.split("On brain data")[1].split("\n\n")[0]
    for name in (*TASKS["brain"], *NAMES["brain"]):
        assert f"`{name}`" in brain, name


@pytest.mark.parametrize("task", NAMES)
def test_every_system_can_be_trained_with_the_command_for_it(task):
    for name in (*TASKS[task], *NAMES[task]):
        words = f"--data {task} --root ROOT --model {name} --device cpu"
        c = parse_config(words.split())
        with torch.device("meta"):
            assert train.build_model(c).tasks == c.network_tasks


def test_the_readme_says_how_many_tests_there_are(request):
    """Counts the tests of this session, so it needs all of them to be collected."""
    items = request.session.items
    files = {item.path for item in items}
    if files != set((ROOT / "tests").glob("test_*.py")):
        pytest.skip("only a part of the tests was collected")
    stated = re.search(r"about\s+([\d,]+)\s+tests", README)
    count = sum(item.get_closest_marker("slow") is None for item in items)
    assert int(stated[1].replace(",", "")) == pytest.approx(count, rel=0.1)


def test_the_path_from_files_to_a_loss_is_short():
    files = ("data.py", "patches.py", "mirror_unet.py", "losses.py")
    assert sum(map(lines_of, files)) <= 1250
