"""The choice of the path, and training steps on each path: equal results, one compiled graph."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import DEVICE, ROOT, needs_triton
from torch import Tensor, nn

import kernels
import patches
from losses import MirrorLoss
from mirror_unet import MirrorUNet, ResidualUnit, UpLayer

pytestmark = pytest.mark.cuda
LAST = torch.channels_last_3d
slow = pytest.mark.slow


@pytest.fixture
def use():
    """`kernels.use`, undone after the test."""
    yield kernels.use
    kernels.use()


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a new process; without Triton's interpreter, unless `environment` sets it."""
    removed = ("TRITON_INTERPRET", "MIRROR_UNET_KERNELS")
    env = {k: v for k, v in os.environ.items() if k not in removed} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


# ------------------------------------------------------------------------- the choice of the path
@needs_triton
def test_the_chosen_path_is_taken(use, monkeypatch):
    taken = []
    names = ("dice_ce", "norm_act", "voxel_shuffle")
    for op in names:
        for path in ("plain", "triton"):
            note = f"{op} {path}"
            monkeypatch.setattr(kernels, f"{op}_{path}", lambda *_, note=note: taken.append(note))
    x = torch.zeros(1, 2, 2, 2, 2, device=DEVICE)
    for choice in ("plain", "triton", "auto"):
        use(choice)
        kernels.dice_ce(x, x)
        kernels.norm_act(x)
        kernels.voxel_shuffle(x, None, 1, 0)
    plain, triton = ([f"{name} {path}" for name in names] for path in ("plain", "triton"))
    assert taken == plain + triton + triton  # auto: a GPU, or the interpreter


WITHOUT_GPU = """
import torch, kernels
x = torch.zeros(1, 2, 4, 4, 4)

def error(f, *args):
    try:
        f(*args)
    except ValueError as e:
        print(e)

error(kernels.norm_act, x)  # the environment variable asks for Triton
error(kernels.use, "triton")
error(kernels.use, "fast")
kernels.use("auto")
print(kernels._on_triton(x))
"""


@pytest.mark.slow
def test_without_gpu_and_interpreter_plain_runs_and_triton_is_an_error_with_a_clear_message():
    done = python(WITHOUT_GPU, CUDA_VISIBLE_DEVICES="", MIRROR_UNET_KERNELS="triton")
    assert done.returncode == 0, done.stderr
    environment, use, unknown, on_triton = done.stdout.splitlines()
    assert use.startswith("Triton kernels were asked for, but PyTorch sees no GPU")
    assert environment == use
    assert unknown == "kernels 'fast': use one of auto, triton, plain"
    assert on_triton == "False"


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as on a machine without Triton, `import triton` fails
import torch, kernels
from losses import MirrorLoss
from mirror_unet import MirrorUNet
net = MirrorUNet("v4", channels=(2, 3, 4, 5, 6))
out = net(torch.rand(1, 2, 32, 32, 32))
labels = torch.zeros(1, 1, 32, 32, 32, dtype=torch.long)
MirrorLoss("v4")(out, {"seg": labels})[0].backward()
corners = torch.zeros(1, 1, 3, dtype=torch.long)
kernels.voxel_shuffle(torch.rand(1, 1, 8, 8, 8), corners, 4, 1)
try:
    kernels.use("triton")
except ValueError as e:
    print(e)
"""


@pytest.mark.slow
def test_everything_except_the_kernels_works_without_triton():
    done = python(WITHOUT_TRITON)
    assert done.returncode == 0, done.stderr
    assert "the package triton is not installed" in done.stdout


COPIED = """
import torch
from dice_ce import dice_ce
from norm_act import NormAct, norm_act
from voxel_shuffle import voxel_shuffle
device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.randn(2, 3, 4, 4, 4, device=device, requires_grad=True)
labels = torch.zeros(2, 1, 4, 4, 4, dtype=torch.uint8, device=device)
dice_ce(x, labels)[0].backward()
norm_act(x, slope=0.1).sum().backward()
NormAct(3, affine=True, slope=0.1, device=device)(x).sum().backward()
voxel_shuffle(x, torch.zeros(2, 1, 3, dtype=torch.long), 4, seed=0).sum().backward()
"""


@pytest.mark.parametrize("without_triton", [False, True])
@pytest.mark.slow
def test_each_file_works_when_it_is_copied(tmp_path, without_triton):
    names = ("dice_ce", "norm_act", "voxel_shuffle")
    for name in names:
        text = (ROOT / "kernels" / f"{name}.py").read_text()
        assert text.startswith("# SPDX-License-Identifier: MIT")
        assert "torch >= 2.8" in text[:300] and "triton >= 3.4" in text[:300]
        (tmp_path / f"{name}.py").write_text(text)
    hidden = "import sys; sys.modules['triton'] = None\n" if without_triton else ""
    done = python(hidden + COPIED, PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------- training steps
class Small(nn.Module):
    """The finest levels of a U-Net: an encoder level, a decoder level, and the loss."""

    def __init__(self):
        super().__init__()
        self.down = ResidualUnit(1, 2, "instance", stride=2)
        self.up = UpLayer(2, 2, "instance", top=True)

    def forward(self, x, batch):
        logits = self.up(self.down(x[:, :1]))  # (B, 2, D, H, W)
        return kernels.dice_ce(logits, batch["seg"])[0]


class Whole(nn.Module):
    """A version of the Mirror U-Net and its loss."""

    def __init__(self, version: str):
        super().__init__()
        self.net = MirrorUNet(version, channels=(2, 3, 4, 5, 6))
        self.loss = MirrorLoss(version)

    def forward(self, x, batch):
        return self.loss(self.net(x), batch)[0]


def make_model(version: str) -> nn.Module:
    """A version, or "small", with weights from seed 0; forward(x, batch) returns the loss."""
    torch.manual_seed(0)
    model = Small() if version == "small" else Whole(version)
    return model.to(DEVICE, memory_format=LAST)


def make_batch(n: int, size: int = 32) -> tuple[Tensor, dict]:
    """Batch number n, a sample with a tumor and one without: input with a shuffled CT, targets."""
    torch.manual_seed(100 + n)
    image = torch.rand(2, 2, size, size, size)
    label = torch.zeros(2, 1, size, size, size, dtype=torch.uint8)
    label[0, :, 4:12, 5:13, 3:11] = 1
    batch = {"image": image, "label": label, "tumor": torch.tensor([1.0, 0.0])}
    batch = {k: v.to(DEVICE) for k, v in patches.make_targets(batch, "petct").items()}
    x = patches.corrupt_ct(batch["image"], "shuffle", torch.tensor([n, n + 1]), 8)
    return x.contiguous(memory_format=LAST), batch


def gradients(model: nn.Module) -> dict:
    """The gradient of every parameter, by name."""
    return {name: p.grad for name, p in model.named_parameters()}


def check_gradients(found: dict, expected: dict) -> None:
    """Every gradient is equal relative to its own norm, so a zero gradient is an error of 1."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        norm = gradient.norm()
        error = (found[name] - gradient).norm()
        if name.endswith(".conv.bias"):  # before an instance norm: 0, except for rounding
            norm = expected[name.replace(".bias", ".weight")].norm()
        assert norm > 0, name
        assert error <= 1e-3 * norm, f"{name}: relative error {error / norm:.1e}"


@pytest.fixture
def exact_convolutions():
    """Without TF32, by which cuDNN keeps only 10 bits of a convolution's inputs."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.mark.parametrize("version,size", [("small", 16), pytest.param("v3", 32, marks=slow)])
@pytest.mark.slow
def test_training_is_the_same_with_and_without_kernels(use, exact_convolutions, version, size):
    losses, grads = {}, {}
    for path in ("plain", "triton"):
        use(path)
        model = make_model(version)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        losses[path] = []
        for n in range(3):
            x, batch = make_batch(n, size)
            torch.manual_seed(1)  # dropout
            loss = model(x, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[path].append(loss.item())
            grads[path, n] = gradients(model)
    rounding = 2e-6 if DEVICE == "cpu" else 1e-4  # cuDNN sums in another order from call to call
    assert losses["triton"] == pytest.approx(losses["plain"], rel=rounding)
    check_gradients(grads["triton", 0], grads["plain", 0])
    assert losses["plain"][-1] < losses["plain"][0]


VERSIONS = ["small", *(pytest.param(version, marks=slow) for version in ("v3", "v4"))]


@pytest.mark.parametrize("path", ["plain", "triton"])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.slow
def test_a_training_step_compiles_to_one_graph(use, exact_convolutions, version, path):
    """fullgraph=True makes a graph break an error; loss and gradients stay the same."""
    use(path)
    x, batch = make_batch(0, 16 if version == "small" else 32)
    losses, grads = [], []
    for compiled in (False, True):
        model = make_model(version)
        step = model
        if compiled:
            torch._dynamo.reset()
            step = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.manual_seed(1)  # dropout
        loss = step(x, batch)
        loss.backward()
        losses.append(loss.item())
        grads.append(gradients(model))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    check_gradients(grads[1], grads[0])


def test_the_network_checks_its_input_without_a_graph_break():
    net = MirrorUNet("v1", channels=(2, 3, 4, 5, 6))

    def check(x):
        net.check_input(x.shape)
        return x + 1

    torch._dynamo.reset()
    compiled = torch.compile(check, fullgraph=True, backend="eager")
    assert (compiled(torch.zeros(1, 2, 32, 32, 32)) == 1).all()


def test_a_training_step_saves_less_than_half_of_the_release(recomputing):
    """Bytes per voxel saved for the backward pass of v3 at 96^3; the authors' release saves 410."""
    torch.manual_seed(0)
    net = MirrorUNet("v3").to(memory_format=LAST)
    parameters = {p.data_ptr() for p in net.parameters()}
    label = torch.zeros(1, 1, 96, 96, 96, dtype=torch.uint8)
    batch = patches.make_targets({"image": torch.rand(1, 2, 96, 96, 96), "label": label}, "petct")
    saved = {}

    def pack(t):
        if t.data_ptr() not in parameters:
            saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = net(batch["image"].contiguous(memory_format=LAST))
        loss, _ = MirrorLoss("v3")(out, batch | {"tumor": torch.ones(1)})
    assert loss.requires_grad
    saved_bytes = sum(t.untyped_storage().nbytes() for t in saved.values())
    assert 100 < saved_bytes / 96**3 <= 205
