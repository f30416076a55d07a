"""Shared by the tests: the repository on the path, and the folders of exact targets and real data where they are present."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in train.py
# Kernel tests call the `*_triton` functions: on a GPU where there is one, else in Triton's interpreter, which is chosen for good when
# triton is imported. All other tests, and the programs they start, run the plain path.
DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("MIRROR_UNET_KERNELS", "plain")
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
