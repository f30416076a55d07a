"""The baselines: what each returns, reads and learns, and that it is what its authors published.

All go through the same training and prediction. The comparisons with MONAI and nnU-Net run if those
packages are installed.
"""

import dataclasses
import types

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import config
import phantom
import predict
import train
from baselines import NAMES, Supervised, SystemLoss, at_size, build, deep_supervision_weights, plan
from config import parse_config
from files import UserError
from losses import MirrorLoss, dice_ce, l2
from mirror_unet import Branch, MirrorOutput, MirrorUNet
from patches import make_targets

WIDTHS = (2, 3, 4, 5, 6)
JOINTS = [{"tasks": "none", "skips": "both"}, {"tasks": "v3", "skips": "pet"}]
SYSTEMS = []  # (task, name, options)
for task, names in NAMES.items():
    for name in names:
        SYSTEMS += [(task, name, options) for options in (JOINTS if name == "joint" else [{}])]


def identifier(task, name, options) -> str:
    return "-".join([task, name, *options.values()])


IDS = [identifier(*system) for system in SYSTEMS]
every_system = pytest.mark.parametrize("task,name,options", SYSTEMS, ids=IDS)
# A fission network with all tasks, one with several outputs in training, and one for the brain
# stand for the others where a test is slow.
QUICK = {"petct-joint-v3-pet", "petct-nnunet", "brain-v2-rec"}
SOME = [
    pytest.param(*system, id=one, marks=[] if one in QUICK else pytest.mark.slow)
    for system, one in zip(SYSTEMS, IDS)
]


def tiny(name, task="petct", **options) -> nn.Module:
    torch.manual_seed(0)
    return build(name, task, WIDTHS, patch=(32, 32, 32), **options)


def cube_batch(task="petct") -> dict:
    """Two noisy samples with a bright cube each, the tumor; brain: its lower half is the core."""
    g = torch.Generator().manual_seed(1)
    label = torch.zeros(2, 1, 32, 32, 32, dtype=torch.uint8)
    label[0, :, 8:20, 6:20, 10:24] = 1
    label[1, :, 12:28, 10:22, 4:18] = 1
    image = torch.rand(2, 2, 32, 32, 32, generator=g) * 0.5 + label
    if task == "brain":
        label[..., :14] *= 2
    return make_targets({"image": image, "label": label, "tumor": torch.ones(2)}, task)


# ------------------------------------------------------------------------------------ every network
@every_system
def test_outputs_have_the_names_and_shapes_of_a_mirror_unet(task, name, options):
    """At a size that is no cube; and `segment` equals `forward`."""
    net = tiny(name, task, **options).eval()
    x = torch.randn(1, 2, 32, 32, 48)
    with torch.no_grad():
        outputs, segmented = net(x), net.segment(x)
    found = {k: t for k, t in outputs._asdict().items() if t is not None}
    late = name in ("lf", "valindria")  # these also return the logits of each modality
    more = {"cells"} if "tumor" in net.tasks else set()
    assert set(found) == ({"seg", "ct", "pet"} if late else set(net.tasks) | more)
    for output, t in found.items():
        channels = 1 if output in ("ct", "pet") and not late else 2
        shapes = {"tumor": (1,), "cells": (1, 2, 2, 3)}
        shape = shapes.get(output, (1, channels, 32, 32, 48))
        assert t.shape == shape and t.isfinite().all(), output
    for output, t in segmented._asdict().items():
        assert t is None or torch.equal(t, found[output])


def test_the_tasks_of_each_network():
    brain = ("core", "whole", "edema")
    found = {identifier(task, name, o): tiny(name, task, **o).tasks for task, name, o in SYSTEMS}
    assert found == {
        "petct-ct": ("seg",), "petct-pet": ("seg",), "petct-ef": ("seg",), "petct-mf": ("seg",),
        "petct-lf": ("seg",), "petct-valindria": ("seg",),
        "petct-multitask": ("seg", "ct", "pet"), "petct-joint-none-both": ("seg",),
        "petct-joint-v3-pet": ("seg", "ct", "pet", "tumor"), "petct-nnunet": ("seg",),
        "petct-blackbean": ("seg",), "petct-segresnet": ("seg",),
        "brain-v2-rec": ("core", "edema", "image"), "brain-nnunet": brain, "brain-segresnet": brain,
    }  # fmt: skip


@pytest.mark.parametrize("name", [*NAMES["petct"], "joint"])
def test_a_config_knows_the_networks_tasks(name):
    for tasks in ("v1", "v2", "v3", "none") if name == "joint" else ("v1",):
        c = parse_config(["--model", name, "--tasks", tasks])
        assert c.network_tasks == tiny(name, tasks=tasks).tasks


@pytest.mark.parametrize("task,name,options", SOME)
@pytest.mark.slow
def test_five_steps_lower_the_loss_and_reach_every_parameter(task, name, options):
    net, batch = tiny(name, task, **options), cube_batch(task)
    loss = SystemLoss(preset=task, tasks=net.tasks)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    totals = []
    for step in range(5):
        net.turn = step % 2
        total, parts = loss(net(batch["image"]), batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
        assert all(v.isfinite() and not v.requires_grad for v in parts.values())
    assert totals[4] < 0.9 * totals[0] and np.isfinite(totals).all()
    unused = [n for n, p in net.named_parameters() if p.grad is None]
    assert not unused or net.partial, unused


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    root = tmp_path_factory.mktemp("systems")
    phantom.write_petct(root / "petct", 2, spacing=(14.0, 14.0, 14.0))
    phantom.write_brain(root / "brain", 2, spacing=(8.0, 8.0, 8.0))
    return root


def make_config(studies, out, task, name, options, *more) -> config.Config:
    argv = f"--data {task} --model {name} --folds 2 --spacing 14 14 14 --patch 32 32 32".split()
    argv += "--channels 2 3 4 5 6 --batch 2 --steps 3 --validations 2 --overlap 0".split()
    argv += ["--no-flips", "--ema", "0", "--root", str(studies / task)]
    argv += ["--cache", str(studies / "cache"), "--out", str(out)]
    for option, value in options.items():
        argv += [f"--{option}", value]
    return parse_config([*argv, *more])


@pytest.mark.parametrize("task,name,options", SOME)
@pytest.mark.slow
def test_training_a_checkpoint_resuming_and_predicting(studies, tmp_path, task, name, options):
    """train.py's steps, a checkpoint as predict.py reads it, a resumed run, a file predicted."""
    c = make_config(studies, tmp_path / "run", task, name, options)
    run = train.Run(c, *train.load_cases(c))
    run.folder.mkdir()
    batches = iter(run.batches())
    rows = [run.train_step(next(batches)) for _ in range(2)]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert any(part.endswith("_dice") for part in rows[0])
    run.step, run.seen = 2, 2 * c.batch
    run.save("last.pt")
    (run.folder / "metrics.jsonl").touch()

    model, stored = predict.load_model(run.folder / "last.pt")
    assert (stored.model, stored.tasks, stored.skips) == (name, c.tasks, c.skips)
    tensors = zip(model.state_dict().values(), run.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in tensors)

    again = train.Run(c, *train.load_cases(c))
    again.resume()
    assert again.train_step(next(iter(again.batches()))) == run.train_step(next(batches))

    if task == "brain":
        image = next((studies / "brain" / "imagesTr").glob("*.nii.gz"))
        files = ["--image", str(image)]
    else:
        image = next((studies / "petct").rglob("SUV.nii.gz"))
        files = ["--pet", str(image), "--ct", str(image.with_name("CTres.nii.gz"))]
    args = ["--checkpoint", str(run.folder / "last.pt"), *files, "--probabilities"]
    predict.main([*args, "--out", str(tmp_path / "m.nii")])
    assert nib.load(tmp_path / "m.nii").shape == nib.load(image).shape[:3]
    maps = [nib.load(p).get_fdata() for p in tmp_path.glob("m_*_probability.nii")]
    assert len(maps) == len(stored.targets)
    assert all(0 <= p.min() and p.max() <= 1 and p.std() > 0 for p in maps)


# ------------------------------------------------------------------- what a segmentation depends on
@pytest.mark.parametrize("name", NAMES["petct"])
def test_a_segmentation_depends_on_what_the_network_reads_and_on_nothing_else(name):
    net = tiny(name).eval()
    x = torch.randn(1, 2, 32, 32, 32)
    assert net.reads == {"ct": ("ct",), "pet": ("pet",)}.get(name, ("ct", "pet"))
    with torch.no_grad():
        seg = predict.foreground_probability(net, x)[0]
        for channel, modality in enumerate(("ct", "pet")):
            other = x.clone()
            other[:, channel] = torch.randn(1, 32, 32, 32)
            same = torch.equal(predict.foreground_probability(net, other)[0], seg)
            assert same == (modality not in net.reads), modality


@pytest.mark.parametrize("skips", ["pet", "both"])
@pytest.mark.parametrize("tasks", ["none", "v1", "v2", "v3"])
def test_joint_segments_from_ct_through_the_bottleneck_and_the_skips(tasks, skips):
    """Unlike v1-v3. With the skips of PET alone, CT has no other way than the bottleneck."""
    net = tiny("joint", tasks=tasks, skips=skips).eval()
    x = torch.randn(1, 2, 32, 32, 32)
    other = torch.cat([torch.randn(1, 1, 32, 32, 32), x[:, 1:]], dim=1)
    with torch.no_grad():
        assert not torch.equal(net(x).seg, net(other).seg)
        nn.init.zeros_(net.bottleneck.units[0].conv.weight)
        nn.init.zeros_(net.bottleneck.shortcut.weight)
        assert torch.equal(net(x).seg, net(other).seg) == (skips == "pet")


def test_predict_asks_for_the_missing_file(studies, tmp_path):
    pet = next((studies / "petct").rglob("SUV.nii.gz"))
    for name in ("ct", "pet", "joint"):
        c = make_config(studies, tmp_path, "petct", name, {})
        state = {"config": c.to_dict(), "model": train.build_model(c).state_dict()}
        torch.save(state, tmp_path / f"{name}.pt")
        args = ["--checkpoint", str(tmp_path / f"{name}.pt"), "--pet", str(pet)]
        args += ["--out", str(tmp_path / f"{name}.nii")]
        if name == "pet":
            predict.main(args)
            assert (tmp_path / "pet.nii").exists()
        else:
            with pytest.raises(UserError, match=f"{name} needs CT and PET, and the CT is missing"):
                predict.main(args)


@pytest.mark.parametrize(
    "name,options,expected",
    [
        ("multitask", {}, ["CT", "PET"]),
        ("joint", {"tasks": "v1"}, ["CT"]),
        ("joint", {"tasks": "none"}, []),
        ("lf", {}, []),
    ],
)
def test_only_networks_with_that_task_reconstruct(name, options, expected):
    image = torch.rand(2, 32, 32, 32)
    assert list(predict.reconstruct(tiny(name, **options), image, (32, 32, 32))) == expected


# ---------------------------------------------------------------------------------- single networks
def mean_of_streams(net, x) -> torch.Tensor:
    """The mean of the tumor probabilities from CT and PET."""
    return sum(net.stream(modality, x).softmax(1)[:, 1:] for modality in (0, 1)) / 2


def test_late_fusion_trains_each_stream_alone_and_averages_probabilities():
    net, batch = tiny("lf"), cube_batch()
    total, parts = SystemLoss(tasks=net.tasks)(net(batch["image"]), batch)
    each = [dice_ce(net.stream(i, batch["image"]), batch["seg"]) for i in (0, 1)]
    assert total.item() == pytest.approx(sum(each).item() / 2, rel=1e-6)
    assert total.item() == pytest.approx((parts["seg_dice"] + parts["seg_ce"]).item(), rel=1e-6)
    weight = net.pet.levels[4].shortcut.weight
    (grad,) = torch.autograd.grad(each[0], weight, allow_unused=True)
    assert grad is None  # the loss of CT does not reach PET's network
    net.eval()
    found = predict.foreground_probability(net, batch["image"])[0]
    torch.testing.assert_close(found, mean_of_streams(net, batch["image"]), rtol=0, atol=1e-6)


def test_valindria_trains_the_modalities_in_turns_and_averages_them_at_test_time():
    net, batch = tiny("valindria"), cube_batch()
    same = [a is b for a, b in zip(net.ct.levels, net.pet.levels)]
    assert same == [n == 5 for n in range(1, 10)]  # only the bottleneck is shared
    for turn, (used, idle) in enumerate(((net.ct, net.pet), (net.pet, net.ct))):
        net.turn = turn
        net.zero_grad()
        SystemLoss(tasks=net.tasks)(net(batch["image"]), batch)[0].backward()
        assert used.levels[0].shortcut.weight.grad is not None
        assert idle.levels[0].shortcut.weight.grad is None
        assert used.levels[4].shortcut.weight.grad is not None
        other = batch["image"].clone()
        other[:, 1 - turn] = 0  # the modality whose turn it is not
        assert torch.equal(net(other).seg, net(batch["image"]).seg)
    net.eval()
    found = [predict.foreground_probability(net, batch["image"])[0] for net.turn in (0, 1)]
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], mean_of_streams(net, batch["image"]), rtol=0, atol=1e-6)


def test_the_training_loop_alternates_between_valindrias_modalities(studies, tmp_path):
    options = "--steps 4 --optimizer adam --weight-decay 0".split()
    c = make_config(studies, tmp_path / "run", "petct", "valindria", {}, *options)
    run = train.Run(c, *train.load_cases(c))
    weights = [branch.levels[0].shortcut.weight for branch in (run.model.ct, run.model.pet)]
    batches, moved = iter(run.batches()), []
    for run.step in range(4):
        before = [w.detach().clone() for w in weights]
        run.train_step(next(batches))
        moved.append([not torch.equal(a, b) for a, b in zip(before, weights)])
    assert moved == [[True, False], [False, True]] * 2


@pytest.mark.parametrize(
    "name,options,version",
    [("joint", {"tasks": "v3"}, "v3"), ("joint", {"tasks": "none"}, "v4"), ("multitask", {}, "v2")],
)
def test_joint_and_multitask_have_the_losses_of_the_mirror_unet(name, options, version):
    net, batch = tiny(name, **options), cube_batch()
    outputs = net(batch["image"])
    weights = dict(lambda_seg=0.7, lambda_rec=0.2, lambda_cls=0.3)
    total, parts = SystemLoss(tasks=net.tasks, **weights)(outputs, batch)
    expected, expected_parts = MirrorLoss(version, **weights)(outputs, batch)
    assert total.item() == expected.item() and parts == expected_parts


def test_v2_rec_adds_the_reconstruction_of_both_images():
    net, batch = tiny("v2-rec", "brain"), cube_batch("brain")
    outputs = net(batch["image"])
    loss = SystemLoss(preset="brain", lambda_rec=0.25, tasks=net.tasks)
    total, parts = loss(outputs, batch)
    seg = dice_ce(outputs.core, batch["core"]) + dice_ce(outputs.edema, batch["edema"])
    expected = seg / 6 + 0.25 * l2(outputs.image, batch["image"])
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert set(parts) == {"core_dice", "core_ce", "edema_dice", "edema_ce", "image_l2"}


# ------------------------------------------------------------------------------------------ nnU-Net
# From nnU-Net v2.8.1's `get_pool_and_conv_props(spacing, patch, 4, 999999)`: strides and kernels
# per stage, as digits.
PLANS = [
    ((96, 96, 96), (2, 2, 3), "111 222 222 222 222", "333 333 333 333 333"),
    ((64, 64, 64), (4, 4, 4), "111 222 222 222 222", "333 333 333 333 333"),
    ((48, 48, 64), (6, 6, 6), "111 222 222 222", "333 333 333 333"),
    ((128, 128, 128), (1, 1, 1), "111 222 222 222 222 222", "333 333 333 333 333 333"),
    ((224, 224, 144), (1, 1, 1), "111 222 222 222 222 222", "333 333 333 333 333 333"),
    ((192, 192, 48), (0.8, 0.8, 5), "111 221 221 222 222 222", "331 331 333 333 333 333"),
    ((20, 320, 256), (6, 1.25, 1.25), "111 122 122 222 222 122 122", "133 133 333 333 333 333 333"),
    ((32, 32, 32), (10, 10, 10), "111 222 222 222", "333 333 333 333"),
]


def digits(stages) -> str:
    return " ".join("".join(str(int(n)) for n in stage) for stage in stages)


@pytest.mark.parametrize("patch,spacing,strides,kernels", PLANS)
def test_the_plan_is_nnunets(patch, spacing, strides, kernels):
    assert tuple(map(digits, plan(patch, spacing))) == (strides, kernels)


def test_the_plan_is_that_of_the_installed_nnunet():
    topology = pytest.importorskip(
        "nnunetv2.experiment_planning.experiment_planners.network_topology",
        reason="nnU-Net is not installed",
    )
    rng = np.random.default_rng(0)
    cases = [(patch, spacing) for patch, spacing, _, _ in PLANS]
    for _ in range(300):
        spacing = np.round(rng.uniform(0.5, 6, 3), 2)
        cases.append((tuple(rng.integers(8, 260, 3).tolist()), tuple(spacing.tolist())))
    for patch, spacing in cases:
        _, *expected, _, _ = topology.get_pool_and_conv_props(spacing, patch, 4, 999999)
        assert list(map(digits, plan(patch, spacing))) == list(map(digits, expected)), patch


def test_nnunet_has_the_planned_widths_strides_and_outputs():
    with torch.device("meta"):
        net = build("nnunet", patch=(128, 128, 128), spacing=(1, 1, 1))
    widths = [stage[0].conv.out_channels for stage in net.encoder]
    assert widths == [32, 64, 128, 256, 320, 320]
    assert net.strides == (32, 32, 32) and [h.out_channels for h in net.heads] == [2] * 5


def test_nnunet_and_blackbean_have_their_own_optimizers():
    c = parse_config(["--data", "petct", "--root", "x", "--model", "nnunet"])
    assert (c.optimizer, c.lr, c.weight_decay, c.schedule) == ("sgd", 1e-2, 3e-5, "poly")
    assert train.learning_rate(c, 0.5) == pytest.approx(0.01 * 0.5**0.9)
    (group,) = train.build_optimizer(c, nn.Linear(2, 2)).param_groups
    assert (group["momentum"], group["nesterov"]) == (0.99, True)
    c = parse_config(["--data", "petct", "--root", "x", "--model", "blackbean", "--lr", "0.003"])
    assert (c.optimizer, c.lr, c.weight_decay, c.schedule) == ("sgd", 0.003, 1e-3, "poly")
    assert set(config.OPTIMIZERS) == {"nnunet", "blackbean"}
    assert parse_config([]).optimizer == "adamw"


def test_deep_supervision_weights_finer_outputs_more_and_drops_the_coarsest():
    assert deep_supervision_weights(4) == [4 / 7, 2 / 7, 1 / 7]  # 1, 1/2, 1/4, normalized
    assert deep_supervision_weights(1) == [1]
    net, batch = tiny("nnunet"), cube_batch()
    outputs = net(batch["image"])
    assert isinstance(outputs, Supervised)
    fine, coarse = [output.seg for _, output in outputs.terms]
    assert fine.shape[2:] == (32, 32, 32) and coarse.shape[2:] == (16, 16, 16)
    total, _ = SystemLoss(tasks=net.tasks)(outputs, batch)
    coarse_labels = batch["seg"][..., 1::2, 1::2, 1::2]
    expected = (2 * dice_ce(fine, batch["seg"]) + dice_ce(coarse, coarse_labels)) / 3
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert isinstance(net.eval()(batch["image"]), MirrorOutput)


@pytest.mark.parametrize("size", [(4, 8, 16), (16, 16, 16), (8, 16, 2)])
def test_labels_at_a_coarser_size_are_the_nearest_ones(size):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 1, 16, 16, 16), generator=g)
    expected = F.interpolate(labels.float(), size, mode="nearest-exact")
    assert torch.equal(at_size(labels, size).float(), expected)


# --------------------------------------------------------------------------- mistakes and old files
@pytest.mark.parametrize(
    "args,message",
    [
        ("--model vnet", "no version 'vnet'.*joint, nnunet, blackbean, segresnet"),
        ("--model v2-rec", "no version 'v2-rec' with preset 'petct'"),
        (
            "--data brain --root x --model ef",
            "with preset 'brain'; there are v1, v2, v2-rec, nnunet, segresnet",
        ),
        ("--model mf --patch 40 48 48", r"multiples of 16 x 16 x 16; use \(32, 48, 48\)"),
        ("--model pet --patch 16 16 16", "one value per channel at the bottleneck; use 32 or more"),
        ("--model segresnet --patch 20 16 16", r"multiples of 8 x 8 x 8; use \(16, 16, 16\)"),
        ("--model nnunet --patch 50 48 48", r"multiples of 8 x 8 x 8; use \(48, 48, 48\)"),
        ("--model nnunet --patch 6 6 6", "no down-sampling"),
        ("--model ef --channels 8 16", "takes 5 numbers"),
        ("--model joint --tasks v4", "use one of v1, v2, v3, none"),
        ("--model joint --skips ct", "use one of pet, both"),
        ("--model ef --tasks v2", "options of --model joint, not of ef"),
        ("--model joint --tasks none --corrupt shuffle", "reconstructs no CT"),
        ("--model nnunet --corrupt noise", "reconstructs no CT"),
    ],
)
def test_impossible_options_get_a_clear_message(args, message):
    with pytest.raises(UserError, match=message):
        train.build_model(parse_config(args.split()))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"norm": "group"}, "norm='group': use one of instance, batch"),
        ({"tasks": "v4"}, "tasks='v4': use one of v1, v2, v3, none"),
        ({"skips": "ct"}, "skips='ct': use one of pet, both"),
        ({"channels": (8, 16)}, "give five widths"),
    ],
)
def test_build_refuses_options_that_no_network_has(options, message):
    with pytest.raises(ValueError, match=message):
        build("joint", **options)


@pytest.mark.parametrize(
    "args,expected",
    [
        ("multitask", "shuffle"),
        ("joint", "shuffle"),
        ("joint --tasks none", "none"),
        ("lf", "none"),
        ("v3", "shuffle"),
    ],
)
def test_the_ct_is_shuffled_by_default_if_it_is_reconstructed(args, expected):
    assert parse_config(["--model", *args.split()]).corrupt == expected


def test_a_checkpoint_from_before_the_baselines_loads_and_resumes(studies, tmp_path):
    c = make_config(studies, tmp_path / "run", "petct", "v1", {})
    run = train.Run(c, *train.load_cases(c))
    run.folder.mkdir()
    run.save("last.pt")
    (run.folder / "metrics.jsonl").touch()
    state = torch.load(run.folder / "last.pt", weights_only=True)
    del state["config"]["tasks"], state["config"]["skips"]
    torch.save(state, run.folder / "last.pt")
    assert isinstance(predict.load_model(run.folder / "last.pt")[0], MirrorUNet)
    run.resume()
    run.c = dataclasses.replace(c, model="joint", tasks="v2")
    with pytest.raises(UserError, match="with --model v1, not .*joint"):
        run.resume()


# ------------------------------------------------------------------------------------ the originals
def in_monai_order(branch: Branch) -> dict:
    """{(level, MONAI's name): our tensor}.

    MONAI concatenates (skip, below), the authors' release and we (below, skip).
    """
    renamed = {
        "norm.": "adn.N.", "slope": "adn.A.weight", "shortcut.": "residual.",
        "refine.units.0.": "1.conv.unit0.", "up.": "0.", "units.": "conv.unit",
        "unit0.weight": "unit0.conv.weight", "unit0.bias": "unit0.conv.bias",
    }  # fmt: skip
    state = {}
    for n, level in enumerate(branch.levels):
        for name, t in level.state_dict().items():
            for ours, theirs in renamed.items():
                name = name.replace(ours, theirs)
            if n >= 5 and name == "0.conv.weight":
                below = branch.levels[4].shortcut.out_channels if n == 5 else len(t) // 2
                t = t.roll(len(t) - below, 0)
            state[n, name] = t
    return state


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("in_channels", [1, 2])
def test_our_unet_is_monais(norm, in_channels):
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    widths = (4, 8, 12, 16, 20)
    ours = Branch(2, widths, norm, in_channels=in_channels)
    theirs = nets.UNet(
        3, in_channels, 2, widths, (2, 2, 2, 2), num_res_units=2,
        norm=("INSTANCE", {"affine": True}) if norm == "instance" else "BATCH",
    )  # fmt: skip
    for p in ours.parameters():
        nn.init.normal_(p, std=0.2)
    inner = "model.1.submodule.1.submodule"
    prefixes = [  # by level
        "model.0", "model.1.submodule.0", f"{inner}.0", f"{inner}.1.submodule.0",
        f"{inner}.1.submodule.1.submodule", f"{inner}.1.submodule.2", f"{inner}.2",
        "model.1.submodule.2", "model.2",
    ]  # fmt: skip
    tensors = in_monai_order(ours).items()
    theirs.load_state_dict({f"{prefixes[level]}.{name}": t for (level, name), t in tensors})
    x = torch.randn(2, in_channels, 32, 32, 48)
    torch.testing.assert_close(ours.decode(*ours.encode(x)), theirs(x), rtol=0, atol=1e-5)


def monai_segresnet_name(ours: str) -> str:
    """Our name of a SegResNet's tensor -> MONAI's."""
    part, *rest = ours.split(".")
    stage = int(rest[0]) if part in ("downs", "encoder", "ups", "decoder") else 0
    block = ".".join(rest[-3:])
    for n in (0, 1):
        block = block.replace(f"norms.{n}", f"norm{n + 1}")
        block = block.replace(f"convs.{n}", f"conv{n + 1}.conv")
    if part == "encoder":  # there, a stage begins with its down-sampling
        return f"down_layers.{stage}.{int(rest[1]) + 1}.{block}"
    return {
        "first": "convInit.conv.weight",
        "downs": f"down_layers.{stage + 1}.0.conv.weight",
        "ups": f"up_samples.{stage}.0.conv.weight",
        "decoder": f"up_layers.{stage}.0.{block}",
        "norm_last": f"conv_final.0.{rest[-1]}",
        "last": f"conv_final.2.conv.{rest[-1]}",
    }[part]


@pytest.mark.parametrize("width,task", [(8, "petct"), (16, "brain")])
def test_our_segresnet_is_monais(width, task):
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    ours = build("segresnet", task, (width // 2, 2, 3, 4, 5))
    classes = 6 if task == "brain" else 2
    theirs = nets.SegResNet(
        3, width, 2, classes, blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1)
    )  # fmt: skip
    for p in ours.parameters():
        nn.init.normal_(p, std=0.2)
    tensors = ours.state_dict().items()
    theirs.load_state_dict({monai_segresnet_name(name): t for name, t in tensors})
    x = torch.randn(1, 2, 32, 24, 40)
    found = torch.cat([t for t in ours(x) if t is not None], dim=1)
    expected = theirs(x)
    torch.testing.assert_close(found / found.std(), expected / found.std(), rtol=0, atol=1e-5)


NNUNET_PARTS = {  # part of our names -> of theirs
    "encoder": "encoder.stages.{}.0.convs", "decoder": "decoder.stages.{}.convs",
    "ups": "decoder.transpconvs.{}", "heads": "decoder.seg_layers.{}",
}  # fmt: skip


@pytest.mark.parametrize("patch,spacing", [((32, 32, 32), (2, 2, 3)), ((64, 32, 16), (1, 1, 3.5))])
def test_our_nnunet_is_theirs_at_every_output(patch, spacing):
    unet = pytest.importorskip(
        "dynamic_network_architectures.architectures.unet",
        reason="dynamic-network-architectures is not installed",
    )
    ours = build("nnunet", channels=(4, 8, 16, 32, 64), patch=patch, spacing=spacing)
    strides, kernels = plan(patch, spacing)
    widths = [stage[0].conv.out_channels for stage in ours.encoder]
    theirs = unet.PlainConvUNet(
        2, len(strides), widths, nn.Conv3d, kernels, strides, 2, 2, 2, True,
        nn.InstanceNorm3d, {"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
    )  # fmt: skip
    for p in ours.parameters():
        nn.init.normal_(p, std=0.1)
    state = {}
    for name, t in ours.state_dict().items():
        part, stage, *rest = name.split(".")
        state[".".join([NNUNET_PARTS[part].format(stage), *rest])] = t
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    # The others are second names of the same tensors.
    assert all(".all_modules." in n or n.startswith("decoder.encoder.") for n in missing)
    by_name = dict(theirs.named_parameters(remove_duplicate=False))
    assert {id(p) for p in theirs.parameters()} == {id(by_name[name]) for name in state}

    x = torch.randn(1, 2, *patch)
    found = [head(f) for head, f in zip(ours.heads[::-1], ours.features(x))]
    for one, expected in zip(found, theirs(x), strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-5)
    theirs.decoder.deep_supervision = False
    torch.testing.assert_close(ours.eval()(x).seg, theirs(x), rtol=0, atol=1e-5)


def test_the_deep_supervision_weights_are_those_of_the_installed_nnunet():
    """As its trainer computes them: 1/2^i, the last set to 0, normalized."""
    pytest.importorskip("nnunetv2", reason="nnU-Net is not installed")
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    trainer = types.SimpleNamespace(
        enable_deep_supervision=True,
        is_ddp=False,
        label_manager=types.SimpleNamespace(has_regions=False, ignore_label=None),
        configuration_manager=types.SimpleNamespace(batch_dice=True),
        _get_deep_supervision_scales=lambda: [[1 / 2**i] * 3 for i in range(5)],
        _do_i_compile=lambda: False,
    )
    theirs = list(nnUNetTrainer._build_loss(trainer).weight_factors)
    assert theirs[-1] == 0 and deep_supervision_weights(5) == pytest.approx(theirs[:-1])


# ------------------------------------------------------------------------------------- the compiler
@pytest.mark.slow
@pytest.mark.parametrize(  # the parts that are not the Mirror U-Net's, and all of its parts
    "task,name,options",
    [
        ("petct", "valindria", {}),
        ("petct", "joint", {"tasks": "v3", "skips": "both"}),
        ("petct", "nnunet", {}),
        ("brain", "segresnet", {}),
    ],
)
def test_compiles_without_a_graph_break(task, name, options):
    net, x = tiny(name, task, **options), torch.randn(2, 2, 32, 32, 32)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for net.turn in (0, 1):
        torch.manual_seed(0)  # of the dropout
        found = compiled(x)
        torch.manual_seed(0)
        torch.testing.assert_close(found, net(x))
