"""The switch between the paths, and a training step on either of them: equal losses, and one graph under torch.compile."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import DEVICE, ROOT

import data
import kernels
from losses import MirrorLoss
from mirror_unet import MirrorUNet

TINY = (2, 3, 4, 5, 6)


@pytest.fixture
def use():
    """`kernels.use`, undone after the test."""
    yield kernels.use
    kernels.use()


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a fresh process without Triton's interpreter, unless `environment` asks for it."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MIRROR_UNET_KERNELS")} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)


# ------------------------------------------------------------------------------------------------------------ the switch
def test_each_path_is_taken_where_it_is_asked_for(use, monkeypatch):
    taken = []
    for op in ("dice_ce", "norm_act", "voxel_shuffle"):
        for path in ("plain", "triton"):
            monkeypatch.setattr(kernels, f"{op}_{path}", lambda *_, name=f"{op} {path}": taken.append(name))
    x = torch.zeros(1, 2, 2, 2, 2, device=DEVICE)
    for choice in ("plain", "triton", "auto"):
        use(choice)
        kernels.dice_ce(x, x), kernels.norm_act(x), kernels.voxel_shuffle(x, None, 1, 0)
    names = ("dice_ce", "norm_act", "voxel_shuffle")
    assert taken == [f"{n} plain" for n in names] + [f"{n} triton" for n in names] * 2  # auto: a GPU, or the interpreter


def test_a_cpu_without_the_interpreter_takes_the_plain_path_and_triton_is_refused_in_a_sentence():
    code = "import torch, kernels; x = torch.zeros(1, 2, 4, 4, 4); print(kernels._on_triton(x)); kernels.use('triton')"
    done = python(code, CUDA_VISIBLE_DEVICES="")
    refusal = "ValueError: Triton kernels were asked for, but PyTorch sees no GPU"
    assert done.stdout == "False\n" and done.stderr.splitlines()[-1].startswith(refusal)
    code = "import torch, kernels; kernels.norm_act(torch.zeros(1, 2, 4, 4, 4))"
    done = python(code, CUDA_VISIBLE_DEVICES="", MIRROR_UNET_KERNELS="triton")
    assert done.stderr.splitlines()[-1].startswith(refusal)
    done = python(code, MIRROR_UNET_KERNELS="fast")
    assert done.stderr.splitlines()[-1] == "ValueError: kernels 'fast': use one of auto, triton, plain"


def test_everything_but_the_kernels_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # what a machine without it has: `import triton` fails
import torch, kernels
from losses import MirrorLoss
from mirror_unet import MirrorUNet
net = MirrorUNet("v4", channels=(2, 3, 4, 5, 6))
out = net(torch.rand(1, 2, 32, 32, 32))
MirrorLoss("v4")(out, {"seg": torch.zeros(1, 1, 32, 32, 32, dtype=torch.long)})[0].backward()
kernels.voxel_shuffle(torch.rand(1, 1, 8, 8, 8), torch.zeros(1, 1, 3, dtype=torch.long), 4, 1)
try:
    kernels.use("triton")
except ValueError as e:
    print(e)
"""
    done = python(code)
    assert done.returncode == 0 and "the package triton is not installed" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------------------ a training step
def make_step(version: str, seed: int = 0):
    """A network, its optimizer, and step(batch) -> loss, made anew from the seed."""
    torch.manual_seed(seed)
    net = MirrorUNet(version, channels=TINY).to(DEVICE, memory_format=torch.channels_last_3d)
    loss = MirrorLoss(version)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)

    def step(batch, forward=None):
        x = data.corrupt_ct(batch["image"], "shuffle", batch["key"], 8).contiguous(memory_format=torch.channels_last_3d)
        torch.manual_seed(1)  # dropout
        total, _ = loss((forward or net)(x), batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return total.item()

    return net, loss, step


def make_batch(n: int) -> dict:
    torch.manual_seed(100 + n)
    image, label = torch.rand(2, 2, 32, 32, 32), torch.zeros(2, 1, 32, 32, 32, dtype=torch.uint8)
    label[0, :, 8:20, 10:22, 6:18] = 1
    batch = {"image": image, "label": label, "tumor": torch.tensor([1.0, 0.0])}
    return {k: v.to(DEVICE) for k, v in data.make_targets(batch, "petct").items()} | {"key": torch.tensor([n, n + 1])}


def test_a_short_training_is_the_same_with_kernels_and_without(use):
    curves = {}
    for path in ("plain", "triton"):
        use(path)
        _, _, step = make_step("v3")
        curves[path] = [step(make_batch(n)) for n in range(3)]
    assert curves["triton"] == pytest.approx(curves["plain"], rel=2e-6)
    assert curves["plain"][-1] < curves["plain"][0]


@pytest.mark.parametrize("path", ["plain", "triton"])
@pytest.mark.parametrize("version", ["v3", pytest.param("v4", marks=pytest.mark.slow)])
def test_a_train_step_compiles_to_one_graph(use, version, path):
    """Network and loss, forward and backward, with fullgraph=True: a graph break would be an error. The loss and gradients stay."""
    use(path)
    batch = make_batch(0)
    results = []
    for compiled in (False, True):
        net, loss, _ = make_step(version)

        def forward(x, batch, net=net, loss=loss):
            return loss(net(x), batch)[0]

        run = torch.compile(forward, fullgraph=True, backend="aot_eager") if compiled else forward
        torch.manual_seed(1)
        total = run(batch["image"].contiguous(memory_format=torch.channels_last_3d), {k: v for k, v in batch.items() if k != "key"})
        total.backward()
        results.append((total.item(), [p.grad for p in net.parameters()]))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    for a, b in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_train_step_keeps_less_than_half_of_what_the_release_does():
    """Bytes alive between forward and backward of a v3 step at 96^3, a voxel: the authors' release keeps 410."""
    torch.manual_seed(0)
    net = MirrorUNet("v3").to(memory_format=torch.channels_last_3d)
    parameters = {p.data_ptr() for p in net.parameters()}
    batch = data.make_targets({"image": torch.rand(1, 2, 96, 96, 96), "label": torch.zeros(1, 1, 96, 96, 96, dtype=torch.uint8)}, "petct")
    kept = {}

    def pack(t):
        if t.data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = net(batch["image"].contiguous(memory_format=torch.channels_last_3d))
        loss, _ = MirrorLoss("v3")(out, batch | {"tumor": torch.ones(1)})
    assert loss.requires_grad and 100 < sum(t.untyped_storage().nbytes() for t in kept.values()) / 96**3 <= 205
