"""mirror_unet.py: equal to the authors' release, and what the design promises holds."""

import copy
import json
import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import mirror_unet
from config import PRESETS, Config
from kernels.recompute import convolve, recomputable, takes_im2col
from losses import MirrorLoss
from mirror_unet import (
    TASKS,
    BrainOutput,
    CellOutput,
    MirrorOutput,
    MirrorUNet,
    from_official,
)

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = (3, 4, 5, 6, 7)
ALL_SHARED = (3, 4, 5, 6, 7)
SHARES = [(), (3,), (4,), (5,), (6,), (7,), (4, 5, 6), ALL_SHARED]
NETWORKS = [(preset, version) for preset in TASKS for version in TASKS[preset]]


def slow(*values):
    """A case that only `make test-all` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


# ----------------------------------------------------------------------------- the authors' release
def pack(out) -> torch.Tensor:
    """Our named outputs -> the release's channels."""
    if isinstance(out, BrainOutput):
        return torch.cat([t for t in out if t is not None], dim=1)
    if out.ct.shape[1] == 2:  # v4
        return out.seg
    parts = [t for t in (out.ct, out.pet, out.seg) if t is not None]
    if out.tumor is not None:
        probability = out.tumor.sigmoid().view(-1, 1, 1, 1, 1)
        parts.append(probability.expand(-1, 1, *out.seg.shape[2:]))
    return torch.cat(parts, dim=1)


@pytest.fixture
def two_threads():
    """Use two threads, as when the targets were computed.

    Their order of summation makes a difference of up to 1e-3 in the gradient of a slope.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def noise(seed, shape):
    """Gaussian noise as the targets' inputs were drawn."""
    values = np.random.RandomState(seed).standard_normal(shape)
    return torch.from_numpy(values.astype("float32"))


@pytest.mark.parametrize(
    "name",
    [
        "v1_L456", "v3_L5",
        *map(slow, ("v4_L5", "brats_v2_L5", "v1_L3", "v1_L4", "v1_L5", "v1_L6", "v2_L5")),
    ],
)  # fmt: skip
def test_outputs_and_gradients_equal_the_release(golden, two_threads, name, monkeypatch):
    target = np.load(golden / f"{name}.npz")
    meta = json.loads(str(target["meta"]))
    arrays = {key: np.array(target[key]) for key in target.files if key.startswith("sd/")}
    state = {key.removeprefix("sd/"): torch.from_numpy(array) for key, array in arrays.items()}
    model, report = from_official(state)
    assert report["left_over"] == ["learnable_th"]
    assert set(report["used"]) == set(state) - {"learnable_th"}
    assert report["channels"] == tuple(meta["channels"])

    def check(out, expected):
        out = out.detach()[:, :, ::step, ::step, ::step]
        torch.testing.assert_close(out, torch.from_numpy(expected), atol=1e-5, rtol=0)

    x = noise(0, meta["input_shape"])
    step = meta["subsample"]
    with torch.no_grad():
        check(pack(model(x)), target["eval_out"])
    monkeypatch.setattr(F, "dropout", lambda x, *_: x)  # off when the targets were made
    model.train()
    out = pack(model(x))
    check(out, target["train_out"])

    (out * noise(1, tuple(out.shape))).sum().backward()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    norms = [key for key in target.files if key.startswith("gradnorm/")]
    compared = [key for key in norms if key.removeprefix("gradnorm/") in report["used"]]
    assert set(norms) - set(compared) == {"gradnorm/learnable_th"}
    for key in compared:
        (ours, *_) = report["used"][key.removeprefix("gradnorm/")]
        found = parameters[ours].grad.norm().item()
        # A bias before a batch norm has gradient 0 up to rounding.
        assert found == pytest.approx(target[key].item(), rel=1e-4, abs=0.02), key


def official_state(model: MirrorUNet, finest_first=True) -> dict[str, torch.Tensor]:
    """Our weights under the release's names, from a second, independent reading of its layout.

    The exact targets confirm the names for nine configurations.
    """
    state = {"learnable_th": torch.tensor(0.25)}

    def add(prefix, module):
        state.update({f"{prefix}.{name}": value for name, value in module.state_dict().items()})

    def add_unit(prefix, unit):
        add(f"{prefix}.conv", unit.conv)
        add(f"{prefix}.adn.N", unit.norm)
        state[f"{prefix}.adn.A.weight"] = unit.slope

    def add_residual(prefix, residual):
        for i, unit in enumerate(residual.units):
            if isinstance(unit, torch.nn.Conv3d):
                add(f"{prefix}.conv.unit{i}.conv", unit)
            else:
                add_unit(f"{prefix}.conv.unit{i}", unit)
        add(f"{prefix}.residual", residual.shortcut)

    def add_up(prefix, layer):
        add_unit(f"{prefix}.0", layer.up)
        add_residual(f"{prefix}.1", layer.refine)

    for n, branch in ((1, model.ct), (2, model.pet)):
        level = dict(enumerate(branch.levels, start=1))
        for i, k in enumerate(k for k in (1, 2, 3, 4) if k not in model.share):
            add_residual(f"down_{n}.{i}", level[k])
        for i, k in enumerate(k for k in (3, 4) if k in model.share):
            add_residual(f"common_downs.{i}", level[k])
        for i, k in enumerate(k for k in (9, 8, 7, 6) if k not in model.share):
            add_up(f"up_{n}.{i}", level[k])
        shared_ups = [k for k in (7, 6) if k in model.share]
        if not finest_first:
            shared_ups.reverse()
        for i, k in enumerate(shared_ups):
            add_up(f"common_ups.{i}", level[k])
        add_residual("bottom_layer" if 5 in model.share else f"bottom_layer_{n}", level[5])
    if model.bottleneck_decoder is not None:
        for i, layer in enumerate(model.bottleneck_decoder):
            add_up(f"dec.{i}", layer)
    if model.classifier is not None:
        add_unit("flatten_channels", model.classifier.squeeze)
        add("fc.1", model.classifier.hidden)
        add("fc.4", model.classifier.out)
    return {name: value.detach().clone() for name, value in state.items()}


def configurations():
    """(preset, version, share, finest_first): the order matters if both up layers are shared."""
    for preset, version in NETWORKS:
        for share in SHARES:
            case = preset, version, share, True
            yield case if share == (4, 5, 6) and version == "v3" else slow(*case)
        yield slow(preset, version, ALL_SHARED, False)


@pytest.mark.parametrize("preset,version,share,finest_first", list(configurations()))
def test_from_official_reads_every_configuration(preset, version, share, finest_first):
    torch.manual_seed(0)
    model = MirrorUNet(version, share, TINY, norm="batch", preset=preset)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    state = official_state(model, finest_first)
    brain_v1 = (version, preset) == ("v1", "brain")  # its weights look like those of a v4
    copy, report = from_official(state, preset="brain" if brain_v1 else None)
    found = (report["preset"], report["version"], report["share"], report["channels"])
    assert found == (preset, version, share, TINY)
    assert (copy.preset, copy.version, copy.share, copy.channels) == found
    assert copy.norm == "batch" and not copy.training
    expected = model.state_dict()
    assert copy.state_dict().keys() == expected.keys()
    for name, tensor in copy.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_from_official_names_what_does_not_match():
    state = official_state(MirrorUNet("v2", (5,), TINY, norm="batch"))
    with pytest.raises(ValueError, match="surplus"):
        from_official(state | {"surplus.weight": torch.zeros(1)})
    missing = "dec.1.0.conv.bias"
    with pytest.raises(ValueError, match=missing):
        from_official({name: t for name, t in state.items() if name != missing})
    with pytest.raises(ValueError, match="up_2.0.0.conv.weight"):
        from_official(state | {"up_2.0.0.conv.weight": torch.zeros(9, 9)})
    with pytest.raises(ValueError, match="not the weights of a Mirror U-Net"):
        from_official({"layer1.weight": torch.zeros(3)})


def test_from_official_refuses_weights_that_fit_two_share_sets():
    equal_widths = MirrorUNet("v1", (3,), (4, 4, 4, 4, 4), norm="batch")  # levels 3, 4 look alike
    with pytest.raises(ValueError, match=r"more than one share set fits: \[\(3,\), \(4,\)\]"):
        from_official(official_state(equal_widths))


@pytest.mark.slow
def test_from_official_takes_the_weight_of_v4_from_its_argument_or_the_file():
    state = official_state(MirrorUNet("v4", (5,), TINY, norm="batch"))
    assert from_official(state)[0].ct_weight.item() == pytest.approx(0.1)
    assert from_official(state, ct_weight=0.3)[0].ct_weight.item() == pytest.approx(0.3)
    learned, report = from_official(state, ct_weight="learnable")
    assert learned.ct_weight.item() == 0.25 and report["left_over"] == []
    del state["learnable_th"]
    with pytest.raises(ValueError, match="takes the file's `learnable_th`; it has none"):
        from_official(state, ct_weight="learnable")


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("norm", ["batch", "instance_everywhere"])
def test_v3_has_as_many_parameters_as_the_release(norm):
    assert count(MirrorUNet("v3", norm=norm, classifier="release")) == 8_084_337


def test_instance_norm_has_no_bias_that_it_would_remove_and_no_output_goes_through_it():
    model = MirrorUNet("v3", channels=TINY)
    convs = {n: m for n, m in model.named_modules() if hasattr(m, "transposed")}
    units = {n: m for n, m in model.named_modules() if isinstance(m, mirror_unet.ConvUnit)}
    normed = {n for n, unit in units.items() if unit.norm is not None}
    assert set(units) - normed == {"ct.levels.8.up", "pet.levels.8.up", "bottleneck_decoder.3.up"}
    assert {n for n, m in convs.items() if m.bias is None} == {f"{n}.conv" for n in normed}
    assert len(normed) == 36
    assert count(MirrorUNet("v3", classifier="release")) < 8_084_337


@pytest.mark.parametrize("norm", ["instance", "batch", "instance_everywhere"])
def test_the_last_layer_passes_on_how_strong_its_input_is(norm):
    """Under "instance" it is linear; a norm takes a window's factor out of its output."""
    layer = mirror_unet.UpLayer(4, 1, norm, top=True)
    x = torch.randn(2, 4, 8, 8, 8)
    zero, one, ten = (layer(scale * x)[0, 0] for scale in (0, 1, 10))
    ratio = ((ten - ten.mean()).norm() / (one - one.mean()).norm()).item()
    if norm == "instance":
        torch.testing.assert_close(ten - zero, 10 * (one - zero), rtol=1e-4, atol=1e-4)
    else:
        assert ratio < 1.5


def test_the_classifier_of_a_cell_reads_that_cell():
    model = MirrorUNet("v3", channels=TINY)
    bottleneck, seg = torch.zeros(1, TINY[4], 2, 3, 2), torch.zeros(1, 2, 32, 48, 32)
    seg[0, 1, 17, 40, 3] = 5.0  # a voxel of the cell (1, 2, 0) that is likely to be tumor
    seg.requires_grad_()
    with torch.no_grad():
        model.classifier.out.weight[:, -1] = 1.0
    tumor, cells = model.classifier(bottleneck, seg)
    others = cells.flatten().tolist()
    assert others.pop(6 + 2 * 2 + 0) == tumor.item() == pytest.approx(others[0] + 5)
    assert len(set(others)) == 1
    assert not torch.autograd.grad(tumor.sum(), seg, allow_unused=True)[0]


def test_the_loss_of_the_cells_is_that_of_their_voxels():
    """Two cells, one of them with tumor: -[log s(l) + log(1 - s(l'))] / 2."""
    labels = torch.zeros(1, 1, 32, 16, 16, dtype=torch.long)
    labels[0, 0, 20, 3, 4] = 1
    images = torch.zeros(1, 1, 32, 16, 16)
    batch = {"ct": images, "pet": images, "seg": labels, "tumor": torch.ones(1)}
    cells = torch.tensor([[[[-1.0]], [[2.0]]]])
    out = CellOutput(torch.zeros(1, 2, 32, 16, 16), images, images, cells.amax()[None], cells)
    _, parts = MirrorLoss("v3")(out, batch)
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))) / 2
    assert parts["cls_bce"].item() == pytest.approx(expected)
    _, parts = MirrorLoss("v3")(MirrorOutput(*out[:4]), batch)
    assert parts["cls_bce"].item() == pytest.approx(math.log1p(math.exp(-2)))


# ------------------------------------------------------------------------------- tasks and sharing
def test_the_tasks_are_those_of_the_paper():
    assert TASKS == {
        "petct": {
            "v1": ("seg", "ct"), "v2": ("seg", "ct", "pet"), "v3": ("seg", "ct", "pet", "tumor"),
            "v4": ("seg",),
        },
        "brain": {"v1": ("core", "edema"), "v2": ("core", "whole", "edema")},
    }  # fmt: skip


def training_batch(x) -> dict[str, torch.Tensor]:
    """Targets for every task, for an input x (1, 2, D, H, W)."""
    labels = (x[:, 1:] > 1).long()
    batch = dict.fromkeys(("seg", "core", "whole", "edema"), labels)
    return batch | {"ct": x[:, :1], "pet": x[:, 1:], "tumor": torch.ones(1)}


PARTS = {  # task -> the terms of its loss
    "seg": {"seg_dice", "seg_ce"}, "ct": {"ct_l2"}, "pet": {"pet_l2"}, "tumor": {"cls_bce"},
    "core": {"core_dice", "core_ce"}, "whole": {"whole_dice", "whole_ce"},
    "edema": {"edema_dice", "edema_ce"},
}  # fmt: skip


@pytest.mark.parametrize("preset,version", NETWORKS)
def test_a_network_has_an_output_and_a_loss_for_each_of_its_tasks_and_no_other(preset, version):
    tasks = TASKS[preset][version]
    model = MirrorUNet(version, channels=TINY, preset=preset)
    assert model.tasks == tasks
    x = torch.randn(1, 2, 32, 16, 16)
    out = model(x)
    outputs = {name for name, value in out._asdict().items() if value is not None}
    # v4's branches have logits that are not learned apart; the cells belong to the task "tumor".
    more = {"v4": {"ct", "pet"}, "v3": {"cells"}}.get(version, set())
    assert outputs == set(tasks) | more
    _, parts = MirrorLoss(version, preset)(out, training_batch(x))
    assert set(parts) == set().union(*(PARTS[task] for task in tasks))
    assert (model.bottleneck_decoder is not None) == bool({"pet", "whole"} & set(tasks))
    assert (model.classifier is not None) == ("tumor" in tasks)


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_and_its_network_name_the_same_tasks(name):
    c = Config(**PRESETS[name] | {"channels": TINY})
    for version in TASKS[c.task]:
        c.model = version
        assert c.build_model().tasks == c.network_tasks == TASKS[c.task][version]


@pytest.mark.parametrize("share", SHARES)
def test_shared_levels_are_the_same_module_in_both_branches(share):
    model = MirrorUNet("v2", share, TINY)
    pairs = zip(model.ct.levels, model.pet.levels, strict=True)
    same = {n for n, (ct, pet) in enumerate(pairs, start=1) if ct is pet}
    assert same == set(share)
    ct, pet = ({p.data_ptr() for p in branch.parameters()} for branch in (model.ct, model.pet))
    shared = {p.data_ptr() for n in share for p in model.ct.levels[n - 1].parameters()}
    assert ct & pet == shared


def test_shared_weights_get_gradients_from_both_branches():
    model = MirrorUNet("v1", (5,), TINY)
    out = model(torch.randn(1, 2, 32, 32, 32))
    shared = model.ct.levels[4].units[0].conv.weight
    (from_ct,) = torch.autograd.grad(out.ct.sum(), shared, retain_graph=True)
    (from_pet,) = torch.autograd.grad(out.seg[:, 1].sum(), shared)
    assert from_ct.abs().sum() > 0 and from_pet.abs().sum() > 0


@pytest.mark.parametrize("share", [(), ALL_SHARED])
@pytest.mark.parametrize("preset,version", NETWORKS)
def test_every_parameter_gets_a_gradient_from_its_loss(preset, version, share):
    model = MirrorUNet(version, share, TINY, preset=preset)
    x = torch.randn(1, 2, 32, 16, 16)
    MirrorLoss(version, preset)(model(x), training_batch(x))[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


# ----------------------------------------------------------------------------------------- outputs
@pytest.mark.parametrize("size", [(32, 32, 32), (32, 16, 48)])
@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v4"])
def test_shapes_of_the_outputs(version, size):
    out = MirrorUNet(version, channels=TINY)(torch.randn(2, 2, *size))
    image = (2, 2 if version == "v4" else 1, *size)
    expected = MirrorOutput(
        seg=(2, 2, *size),
        ct=image,
        pet=None if version == "v1" else image,
        tumor=(2,) if version == "v3" else None,
    )
    if version == "v3":
        expected = (*expected, (2, *(n // 16 for n in size)))
    shapes = [None if t is None else tuple(t.shape) for t in out]
    assert tuple(shapes) == tuple(expected)
    assert isinstance(out, CellOutput if version == "v3" else MirrorOutput)
    release = MirrorUNet(version, channels=TINY, norm="batch")(torch.randn(2, 2, *size))
    assert isinstance(release, MirrorOutput)


def test_shapes_of_the_brain_outputs():
    x = torch.randn(1, 2, 32, 32, 16)
    for version in ("v1", "v2"):
        out = MirrorUNet(version, channels=TINY, preset="brain")(x)
        shapes = {tuple(t.shape) for t in out if t is not None}
        assert shapes == {(1, 2, 32, 32, 16)}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_segmentation_and_classifier_do_not_depend_on_the_ct(version, share):
    model = MirrorUNet(version, share, TINY).eval()
    x = torch.randn(1, 2, 32, 16, 16)
    other = x.clone()
    other[:, 0] = torch.randn(1, 32, 16, 16) * 10
    with torch.no_grad():
        a, b, alone = model(x), model(other), model.segment(x[:, 1:])
    assert torch.equal(a.seg, b.seg) and torch.equal(a.seg, alone.seg)
    assert not torch.equal(a.ct, b.ct)
    if version != "v1":
        assert not torch.equal(a.pet, b.pet)  # the reconstruction from the bottleneck reads both
    if version == "v3":
        assert torch.equal(a.tumor, b.tumor) and torch.equal(a.tumor, alone.tumor)


@pytest.mark.parametrize("weight,used", [(0.1, 0.1), (0.75, 0.75), (3.0, 1.0), ("learnable", 0.5)])
def test_v4_is_the_weighted_mean_of_its_branches_logits(weight, used):
    out = MirrorUNet("v4", channels=TINY, ct_weight=weight)(torch.randn(1, 2, 32, 32, 32))
    torch.testing.assert_close(out.seg, used * out.ct + (1 - used) * out.pet)


def test_the_weight_of_v4_is_a_parameter_only_if_it_is_learnable():
    fixed = MirrorUNet("v4", channels=TINY)
    assert "ct_weight" in dict(fixed.named_buffers())
    assert "ct_weight" not in dict(fixed.named_parameters())
    learnable = MirrorUNet("v4", channels=TINY, ct_weight="learnable")
    assert "ct_weight" in dict(learnable.named_parameters())
    learnable(torch.randn(1, 2, 32, 32, 32)).seg.square().sum().backward()
    assert learnable.ct_weight.grad.abs() > 0


def test_v4_needs_both_modalities_to_segment():
    x = torch.randn(1, 2, 32, 32, 32)
    model = MirrorUNet("v4", channels=TINY)
    assert torch.equal(model.segment(x).seg, model(x).seg)
    with pytest.raises(ValueError, match=r"expected \(B, 2, D, H, W\)"):
        model.segment(x[:, 1:])


@pytest.mark.parametrize("kind", ["cells", "release"])
def test_the_classifier_takes_any_patch_size_and_learns_from_each(kind):
    model = MirrorUNet("v3", channels=TINY, classifier=kind)
    first = model.classifier.out if kind == "cells" else model.classifier.squeeze.conv
    weight = first.weight
    for size in ((32, 32, 32), (96, 32, 64), (128, 112, 32)):
        tumor = model(torch.randn(1, 2, *size)).tumor
        (grad,) = torch.autograd.grad(tumor.sum(), weight)
        assert tumor.shape == (1,)
        assert torch.isfinite(grad).all() and grad.abs().sum() > 0


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_both_memory_layouts_give_the_same(norm):
    torch.manual_seed(0)
    model = MirrorUNet("v3", channels=TINY, norm=norm).double().eval()
    x = torch.randn(2, 2, 32, 32, 32, dtype=torch.double)
    plain = model(x)
    model.to(memory_format=torch.channels_last_3d)
    last = model(x.contiguous(memory_format=torch.channels_last_3d))
    for a, b in [(a, b) for a, b in zip(plain, last, strict=True) if a is not None]:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    "size,norm,training,message",
    [
        ((40, 32, 32), "instance", True, r"multiples of 16 x 16 x 16; use \(32, 32, 32\)"),
        ((8, 32, 32), "instance", False, r"use \(16, 32, 32\)"),
        ((16, 16, 16), "instance", True, "use 32 or more"),
        ((16, 16, 16), "instance", False, "use 32 or more"),
        ((16, 16, 16), "batch", True, "use 32 or more"),
        ((16, 16, 16), "batch", False, None),  # its statistics are those of training
        ((32, 16, 16), "instance", True, None),
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_one_that_does(size, norm, training, message):
    model = MirrorUNet("v2", channels=TINY, norm=norm).train(training)
    x = torch.randn(1, 2, *size)
    if message is None:
        assert model(x).seg.shape[2:] == size
        return
    with pytest.raises(ValueError, match=message):
        model(x)


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(version="v5"), "no version 'v5' with preset 'petct'; there are"),
        (dict(version="v3", preset="brain"), "no version 'v3' with preset 'brain'; there are"),
        (dict(preset="mouse"), "no version 'v3' with preset 'mouse'; there are"),
        (dict(share=(2,)), r"share=\(2,\): only levels 3, 4, 5, 6, 7"),
        (dict(share=(5, 8)), r"share=\(5, 8\): only levels 3, 4, 5, 6, 7"),
        (dict(norm="layer"), "norm='layer': use one of instance, batch, instance_everywhere"),
        (dict(classifier="max"), "classifier='max': use one of cells, release"),
        (dict(channels=(4, 8)), r"channels=\(4, 8\): give five widths"),
    ],
)
def test_an_option_that_does_not_exist_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        MirrorUNet(**options)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32, 32), (1, 1, 32, 32, 32), (2, 32, 32, 32)])
def test_an_input_that_does_not_have_two_channels_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(B, 2, D, H, W\), got"):
        MirrorUNet(channels=TINY)(torch.randn(shape))


# ----------------------------------------------------------------------------------- recomputation
def plain_call(make, *inputs):
    """What `recomputable` is without the recomputation."""
    return make(*inputs)


def test_a_cpu_keeps_what_it_computed():
    assert not hasattr(recomputable(torch.exp, torch.ones(2, requires_grad=True)), "again")


def test_recomputation_applies_where_it_is_switched_on(recomputing):
    assert hasattr(recomputable(torch.exp, torch.ones(2, requires_grad=True)), "again")


def test_recomputation_keeps_less_and_gives_the_same_gradients(monkeypatch, recomputing):
    torch.manual_seed(0)
    model = MirrorUNet("v3", channels=(4, 4, 8, 8, 8))
    x = torch.rand(1, 2, 32, 32, 32)

    def gradients():
        model.zero_grad()
        out = model(x)
        sum(t.square().mean() for t in out).backward()
        return [p.grad.clone() for p in model.parameters()]

    recomputed = gradients()
    monkeypatch.setattr(mirror_unet, "recomputable", plain_call)
    for one, other in zip(recomputed, gradients(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("side", [48, pytest.param(96, marks=pytest.mark.slow)])
def test_a_step_keeps_178_bytes_per_voxel_and_284_without_recomputation(
    side, monkeypatch, recomputing
):
    """What kernels/recompute.py states, counted over the tensors that a v3 step keeps.

    That is what autograd saves between forward and backward, without the parameters, and the
    batch: clean images (two of float32), labels (uint8) and the corrupted input.
    """
    shape = (2, 2, side, side, side)
    model = MirrorUNet("v3")
    clean = torch.rand(shape)
    label = (clean[:, :1] > 0.9).byte()
    batch = {"ct": clean[:, :1], "pet": clean[:, 1:], "seg": label, "tumor": torch.ones(2)}

    def bytes_per_voxel():
        kept = {t.data_ptr(): t.nbytes for t in batch.values()}

        def keep(t):
            kept[t.data_ptr()] = max(t.nbytes, kept.get(t.data_ptr(), 0))
            return t

        x = clean.clone()
        with saved_tensors_hooks(keep, lambda t: t):
            graph = MirrorLoss("v3")(model(x), batch)
        parameters = {p.data_ptr() for p in model.parameters()}
        total = sum(size for address, size in kept.items() if address not in parameters)
        assert graph[0].requires_grad
        return total / 2 / side**3

    assert bytes_per_voxel() == pytest.approx(178, abs=1)
    monkeypatch.setattr(mirror_unet, "recomputable", plain_call)
    assert bytes_per_voxel() == pytest.approx(284, abs=1)


def test_a_recomputable_input_of_a_convolution_is_freed_and_its_gradient_correct(recomputing):
    x = torch.rand(1, 1, 4, 4, 4, requires_grad=True)
    conv = torch.nn.Conv3d(1, 1, 3)
    y = recomputable(torch.exp, x.clone())
    freed, out = weakref.ref(y), convolve(conv, y)
    (expected,) = torch.autograd.grad(conv(y).sum(), conv.weight)
    del y
    assert freed() is None
    (found,) = torch.autograd.grad(out.sum(), conv.weight)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("channels,side,stride", [((1, 4), 12, 2), ((8, 8), 6, 1), ((2, 2), 10, 1)])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_single_sample_is_convolved_by_onednn_with_exact_gradients(
    channels, side, stride, recomputed, recomputing
):
    """As in float64, whatever the layout; PyTorch itself would call slow_conv3d (im2col)."""
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(*channels, 3, stride, padding=1)
    image = torch.randn(1, channels[0], side, side, side)

    def run(dtype):
        layer = copy.deepcopy(conv).to(dtype)
        x = image.clone().to(dtype).requires_grad_()
        y = convolve(layer, recomputable(torch.tanh, x) if recomputed else x)
        y.sin().sum().backward()
        return [y.detach(), x.grad, layer.weight.grad, layer.bias.grad]

    with torch.profiler.profile() as profile:
        found = run(torch.float32)
    assert "aten::slow_conv3d_forward" not in {event.key for event in profile.key_averages()}
    for one, exact in zip(found, run(torch.float64), strict=True):
        assert one.is_contiguous() and (one - exact).abs().max() < 2e-5 * exact.abs().max()
    assert takes_im2col(conv, image) and not takes_im2col(conv, image.repeat(2, 1, 1, 1, 1))
    assert not takes_im2col(conv, torch.empty(1, 20_481, 1, 1, 1))


def test_the_weights_of_the_release_train_with_its_own_arithmetic():
    """Whose gradients jump at the kinks of PReLU: `takes_im2col` says why this matters."""
    x = torch.zeros(1, 8, 6, 6, 6)
    for norm in ("batch", "instance"):
        conv = MirrorUNet("v1", norm=norm).ct.levels[1].units[0].conv
        assert takes_im2col(conv, x) == (norm == "instance")
        with torch.no_grad():
            assert takes_im2col(conv, x)
