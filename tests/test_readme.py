"""What the README says of the code is true of the code."""

import re

import torch
from conftest import ROOT

import predict
import train
from baselines import NAMES
from mirror_unet import VERSIONS, MirrorUNet

TEXT = (ROOT / "README.md").read_text()


def test_line_counts_are_real():
    stated = {name: int(n) for name, n in re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", TEXT, re.M)}
    sources = {str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.py"), *(ROOT / "kernels").glob("*.py")]}
    assert set(stated) == sources
    for name, n in stated.items():
        actual = (ROOT / name).read_text().count("\n")
        assert abs(n - actual) <= 10, f"{name} has {actual} lines, the README says {n}"


def test_parameter_counts_are_real():
    rows = re.findall(r"^\| (brain )?(v\d) \|.*\| ([\d,]+) \|$", TEXT, re.M)
    assert len(rows) == 5
    for brain, version, stated in rows:
        net = MirrorUNet(version, preset="brain" if brain else "petct")
        assert sum(p.numel() for p in net.parameters()) == int(stated.replace(",", "")), version


def test_the_table_of_systems_names_every_system():
    """And each can be trained with the command above the table, or the one for brain data below it."""
    table = TEXT.split("## The systems of the comparison")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ((?:`[\w-]+` ?)+)\|", table, re.M)
    named = [name for row in rows for name in re.findall(r"`([\w-]+)`", row)]
    assert sorted(named) == sorted([*VERSIONS["petct"], *NAMES["petct"]])
    assert all(f"`{name}`" in table.split("On brain data")[1] for name in (*VERSIONS["brain"], *NAMES["brain"]))
    for kind in NAMES:
        for name in (*VERSIONS[kind], *NAMES[kind]):
            with torch.device("meta"):
                train.build_model(train.parse_config(["--data", kind, "--root", "ROOT", "--model", name]))


def test_commands_are_understood():
    commands = re.findall(r"^(?:\.venv/bin/)?python train\.py (.*?)(?:\s+#.*)?$", TEXT, re.M)
    assert len(commands) >= 4
    for command in commands:
        if "--resume" not in command:
            train.parse_config(command.split())


def test_prediction_commands_are_understood():
    commands = re.findall(r"^python predict\.py (.*?)(?:\s+#.*)?$", TEXT, re.M)
    assert len(commands) >= 4
    for command in commands:
        predict.options_of(command.split())


def test_files_and_pictures_that_are_linked_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / link).exists(), link


def test_the_path_from_files_to_a_loss_stays_short():
    lines = sum((ROOT / f).read_text().count("\n") for f in ("data.py", "mirror_unet.py", "losses.py"))
    assert lines <= 1000
