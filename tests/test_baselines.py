"""The other systems of the comparison: what each returns, reads and learns; that all go through one training and prediction; and that
they are what their authors published, number for number, where those packages are installed."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_train import SMALL
from torch import nn

import data
import phantom
import predict
import train
from baselines import NAMES, RECIPES, Supervised, SystemLoss, at_size, build, deep_supervision_weights, plan, version_of
from files import UserError
from losses import MirrorLoss, dice_ce, l2
from mirror_unet import Branch, MirrorOutput, MirrorUNet

TINY = (2, 3, 4, 5, 6)
JOINTS = [{"tasks": "none", "skips": "both"}, {"tasks": "v3", "skips": "pet"}]
ROWS = [(kind, name, options) for kind, names in NAMES.items() for name in names for options in (JOINTS if name == "joint" else [{}])]
IDS = ["-".join([kind, name, *options.values()]) for kind, name, options in ROWS]
every = pytest.mark.parametrize("kind,name,options", ROWS, ids=IDS)
every_name = pytest.mark.parametrize("name", NAMES["petct"])


def tiny(name, kind="petct", **options) -> nn.Module:
    torch.manual_seed(0)
    return build(name, kind, TINY, patch=(32, 32, 32), **options)


def cube_batch(kind="petct") -> dict:
    """Two noisy samples with a bright cube each, which is the tumor (brain: its lower half the core, the upper the edema)."""
    g = torch.Generator().manual_seed(1)
    label = torch.zeros(2, 1, 32, 32, 32, dtype=torch.uint8)
    label[0, :, 8:20, 6:20, 10:24], label[1, :, 12:28, 10:22, 4:18] = 1, 1
    image = torch.rand(2, 2, 32, 32, 32, generator=g) * 0.5 + label
    if kind == "brain":
        label[..., :14] *= 2
    return data.make_targets({"image": image, "label": label, "tumor": torch.ones(2)}, kind)


# ------------------------------------------------------------------------------------------------------------- every network
@every
def test_returns_what_a_mirror_unet_returns(kind, name, options):
    """Names, shapes and finiteness, at a size that is no cube; and `segment` equals `forward`."""
    net = tiny(name, kind, **options).eval()
    x = torch.randn(1, 2, 32, 32, 48)
    with torch.no_grad():
        out, seg = net(x), net.segment(x)
    classes = {"seg": 2, "core": 2, "whole": 2, "edema": 2, "image": 2}
    names = {"v2-rec": {"core", "edema", "image"}, "lf": {"seg", "ct", "pet"}, "valindria": {"seg", "ct", "pet"}}.get(name)
    if names is None:
        tasks = {"v1": {"ct"}, "v2": {"ct", "pet"}, "v3": {"ct", "pet", "tumor"}, "v4": set()}[net.version]
        names = {"core", "whole", "edema"} if kind == "brain" else {"seg"} | tasks
    found = {k: t for k, t in out._asdict().items() if t is not None}
    assert set(found) == names
    for k, t in found.items():
        channels = classes.get(k, 2 if name in ("lf", "valindria") else 1)
        assert t.shape == ((1,) if k == "tumor" else (1, channels, 32, 32, 48)) and t.isfinite().all(), k
    for k, t in seg._asdict().items():
        assert t is None or torch.equal(t, found[k])
    assert net.version == version_of(name, options.get("tasks", "v1")) or kind == "brain"


@every
def test_learns_one_batch(kind, name, options):
    net, batch = tiny(name, kind, **options), cube_batch(kind)
    loss, optimizer = SystemLoss(net.version, kind), torch.optim.Adam(net.parameters(), 0.02)
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


def config(studies, out, kind, name, options, *more):
    args = [
        "--data",
        kind,
        "--root",
        str(studies / kind),
        "--cache",
        str(studies / "cache"),
        "--folds",
        "2",
        *SMALL,
        "--spacing",
        "14",
        "14",
        "14",
    ]
    chosen = [word for key, value in options.items() for word in (f"--{key}", value)]
    return train.parse_config([*args, "--model", name, "--steps", "3", "--ema", "0", "--out", str(out), *chosen, *more])


@every
def test_trains_is_stored_and_predicts_from_its_checkpoint(studies, tmp_path, kind, name, options):
    """train.py's own loop, a checkpoint, another process's view of it, a resumed run, and predict.py from file to file."""
    c = config(studies, tmp_path / "run", kind, name, options)
    run = train.Run(c, *train.load_cases(c))
    run.folder.mkdir()
    batches = iter(run.batches())
    rows = [run.train_step(next(batches)) for _ in range(2)]
    assert all(np.isfinite(list(r.values())).all() for r in rows) and any(k.endswith("_dice") for k in rows[0])
    run.step, run.seen = 2, 2 * c.batch
    run.save("last.pt")
    (run.folder / "metrics.jsonl").touch()
    model, stored = predict.load_model(run.folder / "last.pt")
    assert (stored["model"], stored["tasks"], stored["skips"]) == (name, c.tasks, c.skips)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), run.net.state_dict().values(), strict=True))
    again = train.Run(c, *train.load_cases(c))
    again.resume()
    assert again.train_step(next(iter(again.batches()))) == run.train_step(next(batches))
    image = next((studies / "brain" / "imagesTr").glob("*.nii.gz")) if kind == "brain" else next((studies / "petct").rglob("SUV.nii.gz"))
    files = ["--image", str(image)] if kind == "brain" else ["--pet", str(image), "--ct", str(image.with_name("CTres.nii.gz"))]
    predict.main(["--checkpoint", str(run.folder / "last.pt"), *files, "--out", str(tmp_path / "m.nii"), "--probabilities"])
    assert nib.load(tmp_path / "m.nii").shape == nib.load(image).shape[:3]
    maps = [nib.load(p).get_fdata() for p in tmp_path.glob("m_*_probability.nii")]
    assert len(maps) == len(predict.targets_of(stored)) and all(0 <= p.min() and p.max() <= 1 and p.std() > 0 for p in maps)


# -------------------------------------------------------------------------------------------------- which modality says what
@every_name
def test_reads_what_it_says(name):
    """A modality outside `reads` does not change one bit of the segmentation; one that is read does."""
    net = tiny(name).eval()
    x = torch.randn(1, 2, 32, 32, 32)
    with torch.no_grad():
        seg = predict.foreground_probability(net, x)[0]
        for channel, modality in enumerate(("ct", "pet")):
            other = x.clone()
            other[:, channel] = torch.randn(1, 32, 32, 32)
            assert torch.equal(predict.foreground_probability(net, other)[0], seg) == (modality not in net.reads), modality
    assert net.reads == {"ct": ("ct",), "pet": ("pet",)}.get(name, ("ct", "pet"))


@pytest.mark.parametrize("skips", ["pet", "both"])
@pytest.mark.parametrize("tasks", ["none", "v1", "v2", "v3"])
def test_joint_hears_ct_through_the_bottleneck_whatever_its_tasks_and_skips(tasks, skips):
    """Unlike v1-v3. And with skips from PET alone, CT is heard nowhere else: without the bottleneck it is silent."""
    net = tiny("joint", tasks=tasks, skips=skips).eval()
    x = torch.randn(1, 2, 32, 32, 32)
    other = torch.cat([torch.randn(1, 1, 32, 32, 32), x[:, 1:]], dim=1)
    with torch.no_grad():
        assert not torch.equal(net(x).seg, net(other).seg)
        nn.init.zeros_(net.bottleneck.units[0].conv.weight)
        nn.init.zeros_(net.bottleneck.shortcut.weight)
        assert torch.equal(net(x).seg, net(other).seg) == (skips == "pet")


def test_predict_asks_for_the_file_that_is_missing(studies, tmp_path):
    pet = next((studies / "petct").rglob("SUV.nii.gz"))
    for name in ("ct", "pet", "joint"):
        c = config(studies, tmp_path, "petct", name, {})
        torch.save({"config": dataclasses.asdict(c), "model": train.build_model(c).state_dict()}, tmp_path / f"{name}.pt")
        args = ["--checkpoint", str(tmp_path / f"{name}.pt"), "--pet", str(pet), "--out", str(tmp_path / f"{name}.nii")]
        if name == "pet":
            predict.main(args)
            assert (tmp_path / "pet.nii").exists()
        else:
            with pytest.raises(UserError, match=f"{name} needs CT and PET, and the CT is missing"):
                predict.main(args)
    with pytest.raises(UserError, match="--ct without --pet"):
        predict.main(["--checkpoint", str(tmp_path / "ct.pt"), "--ct", str(pet), "--out", str(tmp_path / "x.nii")])


def test_reconstructions_come_from_those_that_reconstruct():
    image = torch.rand(2, 32, 32, 32)
    for name, options, expected in (
        ("multitask", {}, ["CT", "PET"]),
        ("joint", {"tasks": "v1"}, ["CT"]),
        ("joint", {"tasks": "none"}, []),
        ("lf", {}, []),
    ):
        assert list(predict.reconstructions(tiny(name, **options), image, (32, 32, 32))) == expected


# ----------------------------------------------------------------------------------------------------------- single systems
def test_late_fusion_trains_each_stream_alone_and_averages_probabilities():
    net, batch = tiny("lf"), cube_batch()
    out = net(batch["image"])
    total, parts = SystemLoss("v4")(out, batch)
    each = [dice_ce(net.stream(i, batch["image"]), batch["seg"]) for i in (0, 1)]
    assert total.item() == pytest.approx(sum(each).item() / 2, rel=1e-6)
    assert total.item() == pytest.approx((parts["seg_dice"] + parts["seg_ce"]).item(), rel=1e-6)
    (grad,) = torch.autograd.grad(each[0], net.pet.levels[4].shortcut.weight, allow_unused=True)
    assert grad is None  # CT's loss does not reach PET's network
    net.eval()
    ours = predict.foreground_probability(net, batch["image"])[0]
    mean = sum(net.stream(i, batch["image"]).softmax(1)[:, 1:] for i in (0, 1)) / 2
    torch.testing.assert_close(ours, mean, rtol=0, atol=1e-6)


def test_valindria_takes_the_modalities_in_turns_and_averages_them_in_the_end():
    net, batch = tiny("valindria"), cube_batch()
    assert net.ct.levels[4] is net.pet.levels[4] and sum(a is b for a, b in zip(net.ct.levels, net.pet.levels)) == 1
    for turn, (used, idle) in enumerate(((net.ct, net.pet), (net.pet, net.ct))):
        net.turn = turn
        net.zero_grad()
        SystemLoss(net.version)(net(batch["image"]), batch)[0].backward()
        assert used.levels[0].shortcut.weight.grad is not None and idle.levels[0].shortcut.weight.grad is None
        assert used.levels[4].shortcut.weight.grad is not None
        other = batch["image"].clone()
        other[:, 1 - turn] = 0  # the modality whose turn it is not
        assert torch.equal(net(other).seg, net(batch["image"]).seg)
    net.eval()
    out = [predict.foreground_probability(net, batch["image"])[0] for net.turn in (0, 1)]
    mean = sum(net.stream(i, batch["image"]).softmax(1)[:, 1:] for i in (0, 1)) / 2
    assert torch.equal(*out)
    torch.testing.assert_close(out[0], mean, rtol=0, atol=1e-6)


def test_the_training_loop_takes_the_turns(studies, tmp_path):
    c = config(studies, tmp_path / "run", "petct", "valindria", {}, "--steps", "4", "--optimizer", "adam", "--weight-decay", "0")
    run = train.Run(c, *train.load_cases(c))
    batches, moved = iter(run.batches()), []
    for run.step in range(4):
        before = [b.levels[0].shortcut.weight.clone() for b in (run.net.ct, run.net.pet)]
        run.train_step(next(batches))
        moved.append([not torch.equal(a, b.levels[0].shortcut.weight) for a, b in zip(before, (run.net.ct, run.net.pet))])
    assert moved == [[True, False], [False, True], [True, False], [False, True]]


def test_joint_and_multitask_have_the_mirror_unets_losses():
    batch = cube_batch()
    for net, version in ((tiny("joint", tasks="v3"), "v3"), (tiny("multitask"), "v2"), (tiny("joint", tasks="none"), "v4")):
        out = net(batch["image"])
        options = dict(lambda_seg=0.7, lambda_rec=0.2, lambda_cls=0.3)
        total, parts = SystemLoss(net.version, **options)(out, batch)
        expected, same = MirrorLoss(version, **options)(out, batch)
        assert total.item() == expected.item() and set(parts) == set(same)


def test_v2_rec_adds_the_reconstruction_of_both_images():
    net, batch = tiny("v2-rec", "brain"), cube_batch("brain")
    out = net(batch["image"])
    total, parts = SystemLoss(net.version, "brain", lambda_rec=0.25)(out, batch)
    seg = dice_ce(out.core, batch["core"]) + dice_ce(out.edema, batch["edema"])
    assert total.item() == pytest.approx((seg / 6 + 0.25 * l2(out.image, batch["image"])).item(), rel=1e-6)
    assert set(parts) == {"core_dice", "core_ce", "edema_dice", "edema_ce", "image_l2"}


# ------------------------------------------------------------------------------------------------------------------- nnU-Net
# From nnU-Net v2.8.1's `get_pool_and_conv_props(spacing, patch, 4, 999999)`: strides and kernels a stage, as digits.
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


def test_the_plan_is_what_the_installed_nnunet_plans():
    topology = pytest.importorskip("nnunetv2.experiment_planning.experiment_planners.network_topology", reason="nnU-Net is not installed")
    rng = np.random.default_rng(0)
    cases = [(p, s) for p, s, _, _ in PLANS]
    cases += [(tuple(rng.integers(8, 260, 3).tolist()), tuple(np.round(rng.uniform(0.5, 6, 3), 2).tolist())) for _ in range(300)]
    for patch, spacing in cases:
        _, strides, kernels, _, _ = topology.get_pool_and_conv_props(spacing, patch, 4, 999999)
        assert tuple(map(digits, plan(patch, spacing))) == (digits(strides), digits(kernels)), (patch, spacing)


def test_nnunet_has_the_plans_widths_and_recipe():
    with torch.device("meta"):
        net = build("nnunet", patch=(128, 128, 128), spacing=(1, 1, 1))
    assert [stage[0].conv.out_channels for stage in net.encoder] == [32, 64, 128, 256, 320, 320]
    assert net.strides == (32, 32, 32) and [h.out_channels for h in net.heads] == [2] * 5
    c = train.parse_config(["--data", "petct", "--root", "x", "--model", "nnunet"])
    assert (c.optimizer, c.lr, c.weight_decay, c.schedule, c.flips, c.corrupt) == ("sgd", 1e-2, 3e-5, "poly", True, "none")
    assert train.learning_rate(c, 0.5) == pytest.approx(0.01 * 0.5**0.9)
    (group,) = train.build_optimizer(c, nn.Linear(2, 2)).param_groups
    assert (group["momentum"], group["nesterov"]) == (0.99, True)
    b = train.parse_config(["--data", "petct", "--root", "x", "--model", "blackbean", "--lr", "0.003"])
    assert (b.optimizer, b.lr, b.weight_decay, b.schedule) == ("sgd", 0.003, 1e-3, "poly")
    assert set(RECIPES) == {"nnunet", "blackbean"} and train.parse_config([]).optimizer == "adamw"


def test_deep_supervision_weighs_finer_outputs_more_and_drops_the_coarsest():
    assert deep_supervision_weights(4) == [4 / 7, 2 / 7, 1 / 7]  # 1, 1/2, 1/4, normalised; 1/8 is dropped
    assert deep_supervision_weights(1) == [1]
    net, batch = tiny("nnunet"), cube_batch()
    out = net(batch["image"])
    assert isinstance(out, Supervised) and [tuple(o.seg.shape[2:]) for _, o in out.terms] == [(32,) * 3, (16,) * 3]
    total, parts = SystemLoss("v4")(out, batch)
    coarse = batch["seg"][..., 1::2, 1::2, 1::2]
    expected = (2 * dice_ce(out.terms[0][1].seg, batch["seg"]) + dice_ce(out.terms[1][1].seg, coarse)) / 3
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert isinstance(net.eval()(batch["image"]), MirrorOutput)


@pytest.mark.parametrize("size", [(4, 8, 16), (16, 16, 16), (8, 16, 2)])
def test_labels_at_a_coarser_size_are_the_nearest_ones(size):
    labels = torch.randint(0, 3, (2, 1, 16, 16, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(at_size(labels, size).float(), F.interpolate(labels.float(), size, mode="nearest-exact"))


# ------------------------------------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(
    "args,message",
    [
        ("--model vnet", "no version 'vnet'.*joint, nnunet, blackbean, segresnet"),
        ("--model v2-rec", "no version 'v2-rec' with preset 'petct'"),
        ("--data brain --root x --model ef", "with preset 'brain'; there are v1, v2, v2-rec, nnunet, segresnet"),
        ("--model mf --patch 40 48 48", r"multiples of 16 x 16 x 16; use \(32, 48, 48\)"),
        ("--model pet --patch 16 16 16", "one value a channel at the bottleneck; use 32 or more"),
        ("--model segresnet --patch 20 16 16", r"multiples of 8 x 8 x 8; use \(16, 16, 16\)"),
        ("--model nnunet --patch 50 48 48", r"multiples of 8 x 8 x 8; use \(48, 48, 48\)"),
        ("--model nnunet --patch 6 6 6", "no down-sampling"),
        ("--model ef --channels 8 16", "five widths"),
        ("--model joint --tasks v4", "use one of v1, v2, v3, none"),
        ("--model joint --skips ct", "use one of pet, both"),
        ("--model ef --tasks v2", "options of --model joint, not of ef"),
        ("--model joint --tasks none --corrupt shuffle", "reconstructs no CT"),
        ("--model nnunet --corrupt noise", "reconstructs no CT"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(args, message):
    with pytest.raises(UserError, match=message):
        train.build_model(train.parse_config(args.split()))


def test_corruption_follows_the_tasks():
    for args, expected in (
        ("multitask", "shuffle"),
        ("joint", "shuffle"),
        ("joint --tasks none", "none"),
        ("lf", "none"),
        ("v3", "shuffle"),
    ):
        assert train.parse_config(["--model", *args.split()]).corrupt == expected


def test_a_checkpoint_from_before_the_baselines_still_loads_and_resumes(studies, tmp_path):
    c = config(studies, tmp_path / "run", "petct", "v1", {})
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
    with pytest.raises(UserError, match="--model v1, not joint"):
        run.resume()


# ---------------------------------------------------------------------------------------------------------- the originals
def in_monai_order(branch: Branch) -> dict:
    """Our tensors by level and MONAI's name in it. MONAI concatenates (skip, below), the release and we (below, skip)."""
    state = {}
    for n, level in enumerate(branch.levels):
        for name, t in level.state_dict().items():
            name = name.replace("norm.", "adn.N.").replace("slope", "adn.A.weight").replace("shortcut.", "residual.")
            name = name.replace("refine.units.0.", "1.conv.unit0.").replace("up.", "0.").replace("units.", "conv.unit")
            name = name.replace("unit0.weight", "unit0.conv.weight").replace("unit0.bias", "unit0.conv.bias")
            if n >= 5 and name == "0.conv.weight":
                t = t.roll(len(t) - (branch.levels[4].shortcut.out_channels if n == 5 else len(t) // 2), 0)
            state[n, name] = t
    return state


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("inputs", [1, 2])
def test_our_unet_is_monais(norm, inputs):
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    ours = Branch(2, (4, 8, 12, 16, 20), norm, inputs=inputs)
    kind = ("INSTANCE", {"affine": True}) if norm == "instance" else "BATCH"
    theirs = nets.UNet(3, inputs, 2, (4, 8, 12, 16, 20), (2, 2, 2, 2), num_res_units=2, norm=kind)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.2)
    level = {"model.0": 0, "model.1.submodule.0": 1, "model.2": 8, "model.1.submodule.2": 7}
    level |= {
        "model.1.submodule.1.submodule." + k: v
        for k, v in {"0": 2, "2": 6, "1.submodule.0": 3, "1.submodule.2": 5, "1.submodule.1.submodule": 4}.items()
    }
    state, filled = in_monai_order(ours), {}
    for prefix, n in level.items():
        filled |= {f"{prefix}.{name}": t for (m, name), t in state.items() if m == n}
    theirs.load_state_dict(filled)
    x = torch.randn(2, inputs, 32, 32, 48)
    torch.testing.assert_close(ours.decode(*ours.encode(x)), theirs(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("width,kind", [(8, "petct"), (16, "brain")])
def test_our_segresnet_is_monais(width, kind):
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    ours = build("segresnet", kind, (width // 2, 2, 3, 4, 5))
    theirs = nets.SegResNet(3, width, 2, 6 if kind == "brain" else 2, blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1))
    for p in ours.parameters():
        nn.init.normal_(p, std=0.2)
    names = {}
    for name in ours.state_dict():
        part, *rest = name.split(".")
        i = int(rest[0]) if part in ("downs", "encoder", "ups", "decoder") else 0
        block = (
            ".".join(rest[-3:])
            .replace("norms.0", "norm1")
            .replace("norms.1", "norm2")
            .replace("convs.0", "conv1.conv")
            .replace("convs.1", "conv2.conv")
        )
        names[name] = {
            "first": "convInit.conv.weight", "downs": f"down_layers.{i + 1}.0.conv.weight", "ups": f"up_samples.{i}.0.conv.weight",
            "encoder": f"down_layers.{i}.{int(rest[1]) + 1 if part == 'encoder' else 0}.{block}", "decoder": f"up_layers.{i}.0.{block}",
            "norm_last": f"conv_final.0.{rest[-1]}", "last": f"conv_final.2.conv.{rest[-1]}",
        }[part]  # fmt: skip
    theirs.load_state_dict({names[n]: t for n, t in ours.state_dict().items()})
    x = torch.randn(1, 2, 32, 24, 40)
    out = ours(x)
    out = torch.cat([t for t in out if t is not None], dim=1)
    torch.testing.assert_close(out / out.std(), theirs(x) / out.std(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("patch,spacing", [((32, 32, 32), (2, 2, 3)), ((64, 32, 16), (1, 1, 3.5))])
def test_our_nnunet_is_theirs_at_every_output(patch, spacing):
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet", reason="dynamic-network-architectures is not installed")
    ours = build("nnunet", channels=(4, 8, 16, 32, 64), patch=patch, spacing=spacing)
    strides, kernels = plan(patch, spacing)
    stages, widths = len(strides), [s[0].conv.out_channels for s in ours.encoder]
    theirs = unet.PlainConvUNet(
        2, stages, widths, nn.Conv3d, kernels, strides, 2, 2, 2, True, nn.InstanceNorm3d, {"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
    )  # fmt: skip
    for p in ours.parameters():
        nn.init.normal_(p, std=0.1)
    state = {}
    for name, t in ours.state_dict().items():
        part, i, *rest = name.split(".")
        where = {
            "encoder": f"encoder.stages.{i}.0.convs",
            "decoder": f"decoder.stages.{i}.convs",
            "ups": f"decoder.transpconvs.{i}",
            "heads": f"decoder.seg_layers.{i}",
        }[part]
        state[".".join([where, *rest])] = t
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all(".all_modules." in n or n.startswith("decoder.encoder.") for n in missing)  # second names of the same
    assert {id(p) for p in theirs.parameters()} == {id(dict(theirs.named_parameters(remove_duplicate=False))[n]) for n in state}
    x = torch.randn(1, 2, *patch)
    features = ours.features(x)
    for head, feature, expected in zip(ours.heads[::-1], features, theirs(x), strict=True):
        torch.testing.assert_close(head(feature), expected, rtol=0, atol=1e-5)
    theirs.decoder.deep_supervision = False
    torch.testing.assert_close(ours.eval()(x).seg, theirs(x), rtol=0, atol=1e-5)


def test_the_deep_supervision_weights_are_nnunets():
    """As nnUNetTrainer computes them: 1/2^i, the last set to 0, normalised."""
    pytest.importorskip("nnunetv2", reason="nnU-Net is not installed")
    import inspect

    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class Trainer:
        enable_deep_supervision, is_ddp = True, False
        label_manager = type("L", (), {"has_regions": False, "ignore_label": None})
        configuration_manager = type("C", (), {"batch_dice": True})
        _get_deep_supervision_scales = staticmethod(lambda: [[1 / 2**i] * 3 for i in range(5)])
        _do_i_compile = staticmethod(lambda: False)

    loss = nnUNetTrainer._build_loss(Trainer())
    theirs = list(loss.weight_factors)
    assert theirs[-1] == 0 and deep_supervision_weights(5) == pytest.approx(theirs[:-1]), inspect.getsource(nnUNetTrainer._build_loss)


# --------------------------------------------------------------------------------------------------------------- the compiler
@pytest.mark.slow
@pytest.mark.parametrize(  # those that are not made of the Mirror U-Net's parts alone, and what has all of its parts
    "kind,name,options",
    [("petct", "valindria", {}), ("petct", "joint", {"tasks": "v3", "skips": "both"}), ("petct", "nnunet", {}), ("brain", "segresnet", {})],
)
def test_compiles_without_a_graph_break(kind, name, options):
    net, x = tiny(name, kind, **options), torch.randn(2, 2, 32, 32, 32)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for net.turn in (0, 1):
        torch.manual_seed(0)
        a = compiled(x)
        torch.manual_seed(0)
        torch.testing.assert_close(a, net(x))
