"""Shared by the tests: the repository's path, the device, folders outside the repository."""

import importlib.util
import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported, see train.py

import signal
import sys
from pathlib import Path

import pytest
import torch

# Tests of kernels call the `*_triton` functions: on a GPU if there is one, else in Triton's
# interpreter, which must be chosen before triton is imported. All other tests, and the programs
# they start, then run the plain path.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("MIRROR_UNET_KERNELS", "plain")
# What a shell starts in the background, as nohup does, ignores Ctrl-C, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = Path(os.environ.get("MIRROR_UNET_SHARED", ROOT.parent / "shared"))


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)

# Triton's interpreter before 3.7 turns arrays of one element into numbers, which NumPy refuses from
# 2.4 on. Then the kernels cannot be interpreted, and the tests that try say so.
REFUSED = "only 0-dimensional arrays can be converted to Python scalars"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except Exception as e:
        triton = sys.modules.get("triton")
        old = triton is not None and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
        if not old or DEVICE != "cpu" or REFUSED not in str(e):
            raise
        pytest.skip(f"Triton {triton.__version__} cannot interpret kernels with this NumPy")


def shared_folder(name: str) -> Path:
    """A folder of exact targets or real data outside the repository; no folder, no test."""
    folder = SHARED / name
    if not folder.exists():
        pytest.skip(f"no {folder}: exact targets and real data are kept outside the repository")
    return folder


@pytest.fixture
def golden() -> Path:
    """Outputs of the authors' release and of the challenge's script."""
    return shared_folder("golden")


@pytest.fixture
def real_petct() -> Path:
    """Real PET/CT studies in AutoPET's layout."""
    return shared_folder("data/sts_petct")


@pytest.fixture
def real_brain() -> Path:
    """A real brain study in the Medical Segmentation Decathlon's layout."""
    return shared_folder("data/brain_tumour")


@pytest.fixture
def one_thread():
    """Compute with one thread, which on a busy machine is five times faster for tiny networks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recomputing(monkeypatch):
    """Compute again in the backward pass what a convolution reads, as on a GPU."""
    monkeypatch.setattr("kernels.recompute.DEVICES", {"cpu"})


@pytest.fixture
def nothing_said(monkeypatch):
    """Notes are printed once per process: forget those of other tests."""
    import files

    monkeypatch.setattr(files, "_said", set())


def pytest_collection_modifyitems(items):
    """Start the test that takes minutes first: at the end, one process would wait for it alone."""
    items.sort(key=lambda item: not item.name.startswith("test_the_default_run"))
