"""The network: exact against the authors' release, and the laws that its design promises."""

import json
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mirror_unet import BrainOutput, MirrorOutput, MirrorUNet, convolve, from_official, with_recipe

TINY = (3, 4, 5, 6, 7)
SHARES = [(), (3,), (4,), (5,), (6,), (7,), (4, 5, 6), (3, 4, 5, 6, 7)]
TARGETS = ["v1_L3", "v1_L4", "v1_L5", "v1_L6", "v1_L456", "v2_L5", "v3_L5", "v4_L5", "brats_v2_L5"]


def pack(out) -> torch.Tensor:
    """Our named outputs -> the release's channels."""
    if isinstance(out, BrainOutput):
        return torch.cat([t for t in (out.core, out.whole, out.edema) if t is not None], 1)
    if out.ct.shape[1] == 2:  # v4
        return out.seg
    parts = [t for t in (out.ct, out.pet, out.seg) if t is not None]
    if out.tumor is not None:
        parts.append(out.tumor.sigmoid().view(-1, 1, 1, 1, 1).expand(-1, 1, *out.seg.shape[2:]))
    return torch.cat(parts, 1)


def load_target(folder, name):
    z = np.load(folder / f"{name}.npz")
    state = {k[3:]: torch.from_numpy(np.array(z[k])) for k in z.files if k.startswith("sd/")}
    return z, json.loads(str(z["meta"])), state


@pytest.fixture
def two_threads():
    """The targets were computed by two threads, and carry the rounding of that order of summation: up to 1e-3 of a slope's gradient."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def noise(seed, shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype("float32"))


@pytest.mark.parametrize("name", TARGETS)
def test_equals_the_official_release(golden, two_threads, name, monkeypatch):
    z, meta, state = load_target(golden, name)
    net, report = from_official(state)
    assert report["left_over"] == ["learnable_th"]
    assert set(report["used"]) == set(state) - {"learnable_th"}
    assert report["channels"] == tuple(meta["channels"])
    x, s = noise(0, meta["input_shape"]), meta["subsample"]
    with torch.no_grad():
        out = pack(net(x))[:, :, ::s, ::s, ::s]
    torch.testing.assert_close(out, torch.from_numpy(z["eval_out"]), atol=1e-5, rtol=0)

    monkeypatch.setattr(F, "dropout", lambda x, *a: x)  # the targets were made with dropout off
    net.train()
    out = pack(net(x))
    torch.testing.assert_close(out.detach()[:, :, ::s, ::s, ::s], torch.from_numpy(z["train_out"]), atol=1e-5, rtol=0)
    (out * noise(1, tuple(out.shape))).sum().backward()
    parameters = dict(net.named_parameters(remove_duplicate=False))
    compared = 0
    for official, ours in report["used"].items():
        if f"gradnorm/{official}" not in z.files:
            continue  # running statistics
        expected, found = z[f"gradnorm/{official}"].item(), parameters[ours[0]].grad.norm().item()
        # A bias before a batch norm has gradient 0: what is left of it is rounding.
        assert found == pytest.approx(expected, rel=1e-4, abs=0.02), official
        compared += 1
    assert compared == sum(k.startswith("gradnorm/") for k in z.files) - 1  # all but learnable_th


def official_state(net: MirrorUNet, finest_first=True) -> dict[str, torch.Tensor]:
    """Our weights under the release's names, from an independent reading of its layout (targets pin the names for nine configs)."""

    def unit(prefix, unit_, out):
        out |= {f"{prefix}.conv.{k}": v for k, v in unit_.conv.state_dict().items()}
        out |= {f"{prefix}.adn.N.{k}": v for k, v in unit_.norm.state_dict().items()}
        out[f"{prefix}.adn.A.weight"] = unit_.slope

    def residual(prefix, r, out):
        for i, u in enumerate(r.units):
            if isinstance(u, torch.nn.Conv3d):
                out |= {f"{prefix}.conv.unit{i}.conv.{k}": v for k, v in u.state_dict().items()}
            else:
                unit(f"{prefix}.conv.unit{i}", u, out)
        out |= {f"{prefix}.residual.{k}": v for k, v in r.shortcut.state_dict().items()}

    def up(prefix, layer, out):
        unit(f"{prefix}.0", layer.up, out)
        residual(f"{prefix}.1", layer.refine, out)

    state = {"learnable_th": torch.tensor(0.25)}
    for n, branch in ((1, net.ct), (2, net.pet)):
        level = dict(enumerate(branch.levels, start=1))
        for i, k in enumerate(k for k in (1, 2, 3, 4) if k not in net.share):
            residual(f"down_{n}.{i}", level[k], state)
        for i, k in enumerate(k for k in (3, 4) if k in net.share):
            residual(f"common_downs.{i}", level[k], state)
        for i, k in enumerate(k for k in (9, 8, 7, 6) if k not in net.share):
            up(f"up_{n}.{i}", level[k], state)
        shared_ups = [k for k in ((7, 6) if finest_first else (6, 7)) if k in net.share]
        for i, k in enumerate(shared_ups):
            up(f"common_ups.{i}", level[k], state)
        residual("bottom_layer" if 5 in net.share else f"bottom_layer_{n}", level[5], state)
    if hasattr(net, "bottleneck_decoder"):
        for i, layer in enumerate(net.bottleneck_decoder):
            up(f"dec.{i}", layer, state)
    if hasattr(net, "classifier"):
        unit("flatten_channels", net.classifier.squeeze, state)
        state |= {f"fc.1.{k}": v for k, v in net.classifier.hidden.state_dict().items()}
        state |= {f"fc.4.{k}": v for k, v in net.classifier.out.state_dict().items()}
    return {k: v.detach().clone() for k, v in state.items()}


@pytest.mark.parametrize("finest_first", [True, False])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(
    "version,preset", [("v1", "petct"), ("v2", "petct"), ("v3", "petct"), ("v4", "petct"), ("v1", "brain"), ("v2", "brain")]
)
def test_from_official_reads_every_configuration(version, preset, share, finest_first):
    torch.manual_seed(0)
    net = MirrorUNet(version, share, TINY, norm="batch", preset=preset).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    said = {"preset": "brain"} if (version, preset) == ("v1", "brain") else {}
    copy, report = from_official(official_state(net, finest_first), **said)
    assert (report["version"], report["preset"], report["share"]) == (version, preset, share)
    x = torch.randn(1, 2, 32, 16, 32)
    for a, b in zip(net(x), copy(x)):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_from_official_refuses_what_does_not_match():
    state = official_state(MirrorUNet("v2", (5,), TINY, norm="batch"))
    with pytest.raises(ValueError, match="surplus"):
        from_official(state | {"surplus.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="dec.1.0.conv.bias"):
        from_official({k: v for k, v in state.items() if k != "dec.1.0.conv.bias"})
    with pytest.raises(ValueError, match="up_2.0.0.conv.weight"):
        from_official(state | {"up_2.0.0.conv.weight": torch.zeros(9, 9)})
    with pytest.raises(ValueError, match="not the weights of an official Mirror U-Net"):
        from_official({"layer1.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="more than one share set"):  # equal widths: levels 3 and 4 look alike
        from_official(official_state(MirrorUNet("v1", (3,), (4, 4, 4, 4, 4), norm="batch")))


def test_from_official_takes_v4_weight_as_told():
    state = official_state(MirrorUNet("v4", (5,), TINY, norm="batch"))
    assert from_official(state)[0].ct_weight.item() == pytest.approx(0.1)
    assert from_official(state, ct_weight=0.3)[0].ct_weight.item() == pytest.approx(0.3)
    learned, report = from_official(state, ct_weight="learnable")
    assert learned.ct_weight.item() == 0.25 and report["left_over"] == []


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_v3_has_the_official_number_of_parameters(norm):
    assert sum(p.numel() for p in MirrorUNet("v3", norm=norm).parameters()) == 8_084_337


@pytest.mark.parametrize("share", SHARES)
def test_sharing_a_level_is_sharing_the_module(share):
    net = MirrorUNet("v2", share, TINY)
    same = {n for n in range(1, 10) if net.ct.levels[n - 1] is net.pet.levels[n - 1]}
    assert same == set(share)
    storage = {p.data_ptr() for p in net.ct.parameters()} & {p.data_ptr() for p in net.pet.parameters()}
    assert storage == {p.data_ptr() for n in share for p in net.ct.levels[n - 1].parameters()}


@pytest.mark.parametrize("size", [(32, 32, 32), (32, 16, 48)])
@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v4"])
def test_outputs_have_their_shapes(version, size):
    out = MirrorUNet(version, channels=TINY)(torch.randn(2, 2, *size))
    rec = 2 if version == "v4" else 1
    expected = MirrorOutput(
        seg=(2, 2, *size), ct=(2, rec, *size), pet=None if version == "v1" else (2, rec, *size), tumor=(2,) if version == "v3" else None
    )
    assert MirrorOutput(*(None if t is None else tuple(t.shape) for t in out)) == expected


def test_brain_outputs():
    x = torch.randn(1, 2, 32, 32, 16)
    assert [None if t is None else tuple(t.shape) for t in MirrorUNet("v2", channels=TINY, preset="brain")(x)] == [(1, 2, 32, 32, 16)] * 3
    assert MirrorUNet("v1", channels=TINY, preset="brain")(x).whole is None


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_segmentation_and_classifier_do_not_depend_on_ct(version, share):
    net = MirrorUNet(version, share, TINY).eval()
    x = torch.randn(1, 2, 32, 32, 32)
    other = x.clone()
    other[:, 0] = torch.randn(1, 32, 32, 32) * 10
    with torch.no_grad():
        a, b, alone = net(x), net(other), net.segment(x[:, 1:])
    assert torch.equal(a.seg, b.seg) and torch.equal(a.seg, alone.seg)
    assert not torch.equal(a.ct, b.ct)
    if version != "v1":
        assert not torch.equal(a.pet, b.pet)  # the bottleneck's reconstruction reads both
    if version == "v3":
        assert torch.equal(a.tumor, b.tumor) and torch.equal(a.tumor, alone.tumor)


def test_v4_fuses_its_branches():
    x = torch.randn(1, 2, 32, 32, 32)
    for weight, value in ((0.1, 0.1), (0.75, 0.75), (3.0, 1.0), ("learnable", 0.5)):
        out = MirrorUNet("v4", channels=TINY, ct_weight=weight)(x)
        torch.testing.assert_close(out.seg, value * out.ct + (1 - value) * out.pet)
    net = MirrorUNet("v4", channels=TINY, ct_weight="learnable")
    net(x).seg.square().sum().backward()
    assert net.ct_weight.grad.abs() > 0
    assert not any(p is MirrorUNet("v4", channels=TINY).ct_weight for p in MirrorUNet("v4", channels=TINY).parameters())
    with pytest.raises(ValueError, match="both modalities"):
        net.segment(x[:, 1:])


def test_learned_weights_reach_both_branches():
    net = MirrorUNet("v1", (5,), TINY)
    x = torch.randn(1, 2, 32, 32, 32)
    out = net(x)
    shared = net.ct.levels[4].units[0].conv.weight
    (from_ct,) = torch.autograd.grad(out.ct.sum(), shared, retain_graph=True)
    (from_pet,) = torch.autograd.grad(out.seg[:, 1].sum(), shared)
    assert from_ct.abs().sum() > 0 and from_pet.abs().sum() > 0


def test_classifier_takes_any_size_and_learns_at_each():
    net = MirrorUNet("v3", channels=TINY)
    for size in ((32, 32, 32), (96, 32, 64), (128, 112, 32)):
        out = net(torch.randn(1, 2, *size))
        (grad,) = torch.autograd.grad(out.tumor.sum(), net.classifier.squeeze.conv.weight)
        assert out.tumor.shape == (1,) and torch.isfinite(grad).all() and grad.abs().sum() > 0


@pytest.mark.parametrize(
    "size,norm,training,message",
    [
        ((40, 32, 32), "instance", True, r"multiples of 16.*\(32, 32, 32\)"),
        ((8, 32, 32), "instance", False, r"\(16, 32, 32\)"),
        ((16, 16, 16), "instance", True, "32 or more"),
        ((16, 16, 16), "instance", False, "32 or more"),
        ((16, 16, 16), "batch", True, "32 or more"),
        ((16, 16, 16), "batch", False, None),
        ((32, 16, 16), "instance", True, None),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_a_sentence(size, norm, training, message):
    net = MirrorUNet("v2", channels=TINY, norm=norm).train(training)
    if message is None:
        assert net(torch.randn(1, 2, *size)).seg.shape[2:] == size
    else:
        with pytest.raises(ValueError, match=message):
            net(torch.randn(1, 2, *size))


@pytest.mark.parametrize(
    "options",
    [
        dict(version="v5"),
        dict(version="v3", preset="brain"),
        dict(preset="mouse"),
        dict(share=(2,)),
        dict(share=(8,)),
        dict(norm="layer"),
        dict(channels=(4, 8)),
    ],
)
def test_options_that_do_not_exist_are_refused(options):
    with pytest.raises(ValueError):
        MirrorUNet(**options)
    with pytest.raises(ValueError, match=r"expected \(B, 2"):
        MirrorUNet(channels=TINY)(torch.randn(1, 3, 32, 32, 32))


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_both_memory_layouts_give_the_same(norm):
    torch.manual_seed(0)
    net = MirrorUNet("v3", channels=TINY, norm=norm).double().eval()
    x = torch.randn(2, 2, 32, 32, 32, dtype=torch.double)
    plain = net(x)
    last = net.to(memory_format=torch.channels_last_3d)(x.contiguous(memory_format=torch.channels_last_3d))
    for a, b in zip(plain, last):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("share", [(), (3, 4, 5, 6, 7)])
@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v4"])
def test_every_parameter_gets_a_gradient_from_its_loss(version, share):
    from losses import MirrorLoss

    net = MirrorUNet(version, share, TINY)
    x = torch.randn(1, 2, 32, 32, 32)
    batch = {"ct": x[:, :1], "pet": x[:, 1:], "seg": (x[:, 1:] > 1).long(), "tumor": torch.ones(1)}
    MirrorLoss(version)(net(x), batch)[0].backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


def test_what_is_made_again_is_not_kept_and_gives_the_same_gradients(monkeypatch):
    torch.manual_seed(0)
    net, x = MirrorUNet("v3", channels=(4, 4, 8, 8, 8)), torch.rand(1, 2, 32, 32, 32)
    net.classifier.dropout.p = 0.0

    def step():
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
            out = net(x)
        net.zero_grad()
        (out.seg.square().mean() + out.ct.square().mean() + out.pet.square().mean() + out.tumor.mean()).backward()
        return sum(t.untyped_storage().nbytes() for t in kept.values()), [p.grad.clone() for p in net.parameters()]

    less, gradients = step()
    monkeypatch.setattr("mirror_unet.with_recipe", lambda make, *inputs: make(*inputs))
    more, expected = step()
    assert less < 0.75 * more
    assert all(torch.equal(g, e) for g, e in zip(gradients, expected))


def test_a_convolutions_input_is_gone_where_it_has_a_recipe():
    x = torch.rand(1, 1, 4, 4, 4, requires_grad=True)
    conv = torch.nn.Conv3d(1, 1, 3)
    y = with_recipe(torch.exp, x.clone())
    gone, out = weakref.ref(y), convolve(conv, y)
    (expected,) = torch.autograd.grad(conv(y).sum(), conv.weight)
    del y
    assert gone() is None
    torch.testing.assert_close(torch.autograd.grad(out.sum(), conv.weight)[0], expected)
