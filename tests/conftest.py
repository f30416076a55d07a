"""Shared by the tests: the repository on the path, and the folders of exact targets and real data where they are present."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in train.py
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = Path(os.environ.get("MIRROR_UNET_SHARED", ROOT.parent / "shared"))


def shared_folder(name: str) -> Path:
    """A folder of exact targets or real data that is not part of the repository; skips the test where it is missing."""
    folder = SHARED / name
    if not folder.exists():
        pytest.skip(f"{folder} is not here: exact targets and real data are kept outside the repository")
    return folder


@pytest.fixture
def golden() -> Path:
    return shared_folder("golden")


@pytest.fixture
def real_petct() -> Path:
    return shared_folder("data/sts_petct")


@pytest.fixture
def real_brain() -> Path:
    return shared_folder("data/brain_tumour")
