"""Sliding window, resampling back, and evaluation on the original grid."""

import csv
import dataclasses
import math
import os
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

import data
import phantom
import predict
import train
from data import Preprocessing
from files import UserError
from metrics import case_metrics
from mirror_unet import MirrorOutput, MirrorUNet
from predict import (
    evaluate,
    foreground_probability,
    gaussian_window,
    load_model,
    main,
    predict_image,
    reconstructions,
    sliding_window,
    suv_threshold,
    to_masks,
    to_original,
    truth_of,
    window_starts,
)

TINY = (2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    "shape,size,overlap", [((40, 33, 16), (16, 16, 16), 0.5), ((17, 16, 50), (16, 8, 24), 0.25), ((9, 9, 9), (8, 8, 8), 0.0)]
)
def test_windows_cover_every_voxel_and_stay_inside(shape, size, overlap):
    seen = np.zeros(shape, int)
    for start in window_starts(shape, size, overlap):
        assert all(0 <= a and a + s <= n for a, s, n in zip(start, size, shape))
        seen[tuple(slice(a, a + s) for a, s in zip(start, size))] += 1
    assert seen.min() >= 1
    # (40 - 16) / 8 + 1 = 4 and so on: no window more than the stride asks for
    strides = [int(s * (1 - overlap)) for s in size]
    assert len(window_starts(shape, size, overlap)) == math.prod(math.ceil((n - s) / t) + 1 for n, s, t in zip(shape, size, strides))


def test_window_weight_is_a_gaussian_with_a_floor():
    w = gaussian_window((9, 5, 33))
    assert w.argmax() == w.numel() // 2 and w.max() == 1 and w.min() >= 1e-3
    torch.testing.assert_close(w, w.flip(0, 1, 2))
    one = gaussian_window((33, 1, 1)).flatten()
    assert one[20].item() == pytest.approx(math.exp(-0.5 * (4 / (0.125 * 33)) ** 2), rel=1e-5)


@pytest.mark.parametrize("shape", [(40, 33, 20), (16, 16, 16), (7, 40, 5)])
def test_a_pointwise_function_comes_back_exactly_also_where_the_volume_is_smaller_than_a_window(shape):
    image = torch.randn(2, *shape)
    out = sliding_window(image, lambda x: torch.stack([x[:, 0] * x[:, 1], x[:, 0] * 0 + 3], 1), (16, 16, 16), batch=3)
    torch.testing.assert_close(out[0], image[0] * image[1])
    torch.testing.assert_close(out[1], torch.full(shape, 3.0))


def test_overlapping_windows_are_averaged_by_their_weight():
    """Two windows of 16 on 24 voxels; each answers with its own number, so the result is the weighted mean of 1 and 2."""
    answers = iter([1.0, 2.0])
    out = sliding_window(torch.zeros(1, 24, 1, 1), lambda x: x * 0 + next(answers), (16, 1, 1), batch=1)[0, :, 0, 0]
    w = gaussian_window((16, 1, 1)).flatten()
    both = (1 * w[8:] + 2 * w[:8]) / (w[8:] + w[:8])
    torch.testing.assert_close(out, torch.cat([torch.ones(8), both, torch.full((8,), 2.0)]))


def test_batches_of_windows_change_nothing():
    net = MirrorUNet("v1", channels=TINY).eval()
    image = torch.randn(2, 48, 32, 40)
    one, many = (predict_image(net, image, (32, 32, 32), batch=b)[0] for b in (1, 4))
    torch.testing.assert_close(one, many)


def test_mirroring_at_test_time_averages_the_eight_mirror_images():
    net = MirrorUNet("v3", channels=TINY).eval()
    image = torch.randn(2, 32, 32, 32)
    flips = [f for f in ([], [1], [2], [3], [1, 2], [1, 3], [2, 3], [1, 2, 3])]
    each = torch.stack([predict_image(net, image.flip(f), (32, 32, 32))[0].flip(f) for f in flips])
    torch.testing.assert_close(predict_image(net, image, (32, 32, 32), flip_axes=(0, 1, 2))[0], each.mean(0))
    torch.testing.assert_close(predict_image(net, image, (32, 32, 32), flip_axes=(1,))[0], each[[0, 2]].mean(0))


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v4"])
def test_probability_of_tumor_is_that_of_the_whole_network(version):
    net = MirrorUNet(version, channels=TINY).eval()
    x = torch.randn(2, 2, 32, 32, 32)
    out = net(x)
    prob, tumor = foreground_probability(net, x)
    torch.testing.assert_close(prob[:, 0], out.seg.softmax(1)[:, 1], rtol=0, atol=1e-6)
    assert (tumor is None) == (version != "v3")
    if version == "v3":
        torch.testing.assert_close(tumor, out.tumor.sigmoid())
        image = torch.randn(2, 48, 32, 32)
        score = predict_image(net, image, (32, 32, 32))[1]
        windows = [net.segment(image[None, 1:, a : a + 32]).tumor.sigmoid().item() for a in (0, 16)]
        assert score == pytest.approx(max(windows), rel=1e-5)


def test_brain_has_a_map_a_target():
    for version, k in (("v2", 3), ("v1", 2)):
        net = MirrorUNet(version, channels=TINY, preset="brain")
        prob, score = predict_image(net, torch.randn(2, 32, 32, 32), (32, 32, 32))
        assert prob.shape == (k, 32, 32, 32) and score is None and net.training


def test_reconstructions_by_version():
    image = torch.rand(2, 32, 40, 32)
    for version, names in (("v1", ["CT"]), ("v2", ["CT", "PET"]), ("v4", [])):
        made = reconstructions(MirrorUNet(version, channels=TINY), image, (32, 32, 32))
        assert list(made) == names and all(m.shape == (32, 40, 32) for m in made.values())


def axes_of(codes: str) -> np.ndarray:
    """(3, 3): column i points where the array's axis i does, e.g. "PIR": to the back, down, to the right."""
    axes = np.zeros((3, 3))
    for i, (world, sign) in enumerate(nib.orientations.axcodes2ornt(codes).astype(int)):
        axes[world, i] = sign
    return axes


def ball(shape, centre, radius, affine):
    """Mask of a ball given in world coordinates (mm)."""
    ijk = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    return np.linalg.norm(nib.affines.apply_affine(affine, ijk) - centre, axis=-1) <= radius


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR"])
def test_a_known_mask_survives_the_way_to_the_network_and_back(tmp_path, codes):
    """An oracle: the preprocessed label itself is the prediction. Oblique, anisotropic, any axis order."""
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = nib.affines.from_matvec(turn @ axes_of(codes) @ np.diag([3.1, 2.2, 4.5]), [-50, 30, 700])
    centre = nib.affines.apply_affine(affine, [20, 22, 15])
    truth = ball((40, 44, 30), centre, 28, affine)
    suv = np.full(truth.shape, 0.5, np.float32) + 4 * truth
    for name, array in (("SUV", suv), ("CTres", suv * 0), ("SEG", truth.astype(np.uint8))):
        nib.save(nib.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    (case,) = data.build_cache(data.find_petct(tmp_path), Preprocessing(spacing=(2.5, 2.5, 2.5)), tmp_path / "cache", workers=1)
    masks = to_masks(case.array("label")[None].astype(np.float32), case.affine, nib.load(tmp_path / "SUV.nii.gz"), 0.5)
    (row,) = evaluate(case.case, truth_of(case.case), masks, ("seg",))
    assert row["dice"] >= 0.97 and row["fpv_ml"] == 0 and row["fnv_ml"] == 0
    assert row["truth_ml"] == pytest.approx(4 / 3 * math.pi * 2.8**3, rel=0.02)


class Oracle(torch.nn.Module):
    """Segments by a threshold on its second channel: what the file says is tumor comes out as tumor, on the network's grid."""

    def __init__(self, threshold: float):
        super().__init__()
        self.threshold = threshold

    def forward(self, x):
        evidence = 50 * (x[:, 1:2] - self.threshold)
        return MirrorOutput(seg=torch.cat([-evidence, evidence], dim=1))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR"])
def test_a_saved_mask_lies_on_its_input_voxel_for_voxel(tmp_path, monkeypatch, codes):
    """The whole program, files to file, with an oracle for a network: oblique, anisotropic, any axis order."""
    shape = (44, 50, 33)
    turn = nib.eulerangles.euler2mat(0.3, -0.15, 0.2)
    affine = nib.affines.from_matvec(turn @ axes_of(codes) @ np.diag([2.6, 2.0, 4.2]), [-50, 30, 700])
    truth = np.zeros(shape, bool)
    for ijk, radius in (((15, 17, 11), 22), ((31, 36, 24), 14), ((12, 38, 22), 17)):  # nothing symmetric
        truth |= ball(shape, nib.affines.apply_affine(affine, ijk), radius, affine)
    suv = np.where(truth, 4.5, 0.5).astype(np.float32)
    paths = {name: tmp_path / f"{name}.nii.gz" for name in ("SUV", "CTres", "out")}
    for name, array in (("SUV", suv), ("CTres", suv * 0)):
        image = nib.Nifti1Image(array, affine)
        image.set_sform(affine, code=2)
        image.header["descrip"] = "kept"
        nib.save(image, paths[name])
    config = train.parse_config(["--data", "petct", "--root", "x", "--spacing", "2", "2", "2", "--patch", "48", "48", "48", "--no-flips"])
    monkeypatch.setattr(predict, "load_model", lambda *_: (Oracle(2.5 / 5), dataclasses.asdict(config)))
    args = f"--checkpoint x --pet {paths['SUV']} --ct {paths['CTres']} --out {paths['out']} --threshold 0.5 --probabilities"
    main(args.split())
    mask, pet = nib.load(paths["out"]), nib.load(paths["SUV"])
    assert mask.shape == shape and np.array_equal(mask.affine, pet.affine) and nib.aff2axcodes(mask.affine) == tuple(codes)
    assert (
        mask.header["descrip"] == pet.header["descrip"]
        and mask.header["sform_code"] == 2
        and mask.header.get_zooms() == pet.header.get_zooms()
    )
    assert case_metrics(np.asarray(mask.dataobj), truth, (1, 1, 1))["dice"] >= 0.97
    probability = nib.load(tmp_path / "out_seg_probability.nii.gz")
    assert np.array_equal(probability.affine, pet.affine) and probability.get_data_dtype() == np.float32
    assert np.array_equal(probability.get_fdata() >= 0.5, np.asarray(mask.dataobj) > 0)


def test_outside_the_network_grid_there_is_nothing():
    like = nib.Nifti1Image(np.zeros((10, 10, 10)), np.eye(4))
    inner = nib.affines.from_matvec(np.eye(3), [3, 3, 3])
    back = to_original(np.ones((4, 4, 4), np.float32), inner, like)
    assert back.shape == (10, 10, 10) and back[3:7, 3:7, 3:7].min() == 1 and back.sum() == 64
    assert to_original(np.ones((10, 10, 10), np.float32), np.eye(4), like).min() == 1


@pytest.mark.parametrize(
    "tumor, organ, low, dice, fpv",
    [
        (6, 9, 0.3, 2 * 512 / (576 + 512), 64 * 0.012),  # the organ is hotter: the best threshold pays with false positives
        (9, 6, 6, 1, 0),  # it lies between them, above the window of the network's input
    ],
)
def test_the_suv_threshold_is_the_best_of_the_training_studies(tmp_path, tumor, organ, low, dice, fpv):
    suv, seg = np.full((24, 24, 24), 0.3, np.float32), np.zeros((24, 24, 24), np.uint8)
    seg[4:12, 4:12, 4:12] = 1  # 512 voxels
    suv[seg > 0] = tumor
    suv[16:20, 16:20, 16:20] = organ  # 64 voxels, no tumor
    for i in range(2):
        folder = tmp_path / f"P{i}"
        folder.mkdir()
        for name, array in (("SUV", suv), ("CTres", suv * 0 + i), ("SEG", seg)):
            nib.save(nib.Nifti1Image(array, np.diag([-2.0, 2.0, 3.0, 1.0])), folder / f"{name}.nii.gz")
    preprocessing = Preprocessing(suv_window=(0.0, 5.0), spacing=(4.0, 4.0, 6.0))  # neither its window nor its grid is the threshold's
    a, b = data.build_cache(data.find_petct(tmp_path), preprocessing, tmp_path / "cache", workers=1)
    best, (row,) = suv_threshold([a], [b])
    assert low < best <= tumor
    assert row["dice"] == pytest.approx(dice) and row["fpv_ml"] == pytest.approx(fpv)


# --------------------------------------------------------------------------------------------------------- the program
@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with one phantom study of 10 mm, PET/CT, and a brain case of 5 mm."""
    root = tmp_path_factory.mktemp("study")
    (folder,) = phantom.write_petct(root / "petct", 1, spacing=(10.0, 10.0, 10.0))
    phantom.write_brain(root / "brain", 1, spacing=(5.0, 5.0, 5.0))
    return root, folder


def checkpoint(path, data="petct", model="v3", **options):
    """What train.py saves of an untrained network."""
    more = ["--patch", "32", "32", "32", "--channels", "2", "3", "4", "5", "6", "--spacing", *["8"] * 3, "--no-flips"]
    c = train.parse_config(["--data", data, "--root", "x", "--model", model, *more, "--seed", str(options.pop("seed", 0))])
    net = train.build_model(c)
    torch.save({"config": dataclasses.asdict(c) | options, "model": net.state_dict()}, path)
    return path


def test_a_mask_lies_on_its_input_and_needs_no_ct(study, tmp_path):
    root, folder = study
    weights = str(checkpoint(tmp_path / "v3.pt"))
    pet, ct = folder / "SUV.nii.gz", folder / "CTres.nii.gz"
    main(["--checkpoint", weights, "--pet", str(pet), "--out", str(tmp_path / "alone.nii.gz"), "--threshold", "0.4"])
    main(["--checkpoint", weights, "--pet", str(pet), "--ct", str(ct), "--out", str(tmp_path / "both.nii.gz"), "--threshold", "0.4"])
    alone, both, like = nib.load(tmp_path / "alone.nii.gz"), nib.load(tmp_path / "both.nii.gz"), nib.load(pet)
    assert alone.shape == like.shape and np.array_equal(alone.affine, like.affine) and alone.get_data_dtype() == np.uint8
    assert alone.header.get_xyzt_units() == like.header.get_xyzt_units()
    mask = np.asarray(alone.dataobj)
    assert set(np.unique(mask)) == {0, 1} and np.array_equal(mask, np.asarray(both.dataobj))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone.nii.gz", "both.nii.gz", "v3.pt"]


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_pet_alone_predicts_the_same_bits_as_with_the_ct_or_noise_in_its_place(study, tmp_path, version):
    _, folder = study
    noise = nib.load(folder / "CTres.nii.gz")
    nib.save(
        nib.Nifti1Image(np.random.default_rng(0).normal(0, 500, noise.shape).astype(np.float32), noise.affine), tmp_path / "noise.nii.gz"
    )
    weights, found = str(checkpoint(tmp_path / "w.pt", model=version)), []
    for ct in ([], ["--ct", str(folder / "CTres.nii.gz")], ["--ct", str(tmp_path / "noise.nii.gz")]):
        out = tmp_path / f"{len(found)}.nii"
        main(["--checkpoint", weights, "--pet", str(folder / "SUV.nii.gz"), *ct, "--out", str(out), "--probabilities"])
        found.append((out.read_bytes(), (tmp_path / f"{out.stem}_seg_probability.nii").read_bytes()))
    assert found[0] == found[1] == found[2]


def test_an_ensemble_is_the_mean_of_its_members(study, tmp_path):
    _, folder = study
    paths = []
    for seed in (1, 2):
        paths.append(str(checkpoint(tmp_path / f"{seed}.pt", model="v1", seed=seed)))
    maps = []
    for some in ([paths[0]], [paths[1]], paths):
        main(["--checkpoint", *some, "--pet", str(folder / "SUV.nii.gz"), "--out", str(tmp_path / "m.nii"), "--probabilities"])
        maps.append(nib.load(tmp_path / "m_seg_probability.nii").get_fdata(dtype=np.float32))
    assert not np.allclose(maps[0], maps[1])
    np.testing.assert_allclose(maps[2], (maps[0] + maps[1]) / 2, atol=1e-6)


def test_the_brain_predicts_the_same_from_one_file_of_four_channels_or_two_files(study, tmp_path):
    root, _ = study
    image = nib.load(root / "brain" / "imagesTr" / "BRATS_001.nii.gz")
    for name, channel in (("t2w", 3), ("flair", 0)):
        nib.save(image.slicer[..., channel], tmp_path / f"{name}.nii.gz")
    weights, out = str(checkpoint(tmp_path / "b.pt", data="brain", model="v2")), tmp_path / "m.nii"
    found = []
    for files in (["--image", image.get_filename()], ["--t2w", str(tmp_path / "t2w.nii.gz"), "--flair", str(tmp_path / "flair.nii.gz")]):
        main(["--checkpoint", weights, *files, "--out", str(out), "--probabilities"])
        maps = [tmp_path / f"m_{t}_probability.nii" for t in ("core", "whole", "edema")]
        found.append([nib.load(p).get_fdata().tobytes() for p in (out, *maps)])
    assert found[0] == found[1] and len(set(found[0])) == 4  # the mask and three different maps


def test_one_bad_study_does_not_cost_the_others_of_a_folder(study, tmp_path, capsys):
    root, _ = study
    copy = tmp_path / "in"
    shutil.copytree(root / "petct", copy)
    (copy / "BROKEN").mkdir()
    (copy / "BROKEN" / "SUV.nii.gz").write_bytes((copy / "PETCT_0000" / "visit1" / "SUV.nii.gz").read_bytes()[:2000])
    with pytest.raises(UserError, match=r"1 of 2 studies.*BROKEN.SUV.nii.gz: not a readable"):
        main(["--checkpoint", str(checkpoint(tmp_path / "w.pt")), "--root", str(copy), "--out", str(tmp_path / "out")])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"PETCT_0000__visit1.nii.gz", "metrics.csv", "overview.png"}
    (row,) = csv.DictReader(open(tmp_path / "out" / "metrics.csv"))
    assert 0 <= float(row["tumor_score"]) <= 1


def test_a_folder_without_truth_gets_masks_volumes_and_a_picture(study, tmp_path):
    root, folder = study
    alone = tmp_path / "in" / "P1"
    alone.mkdir(parents=True)
    shutil.copy(folder / "SUV.nii.gz", alone)
    main(["--checkpoint", str(checkpoint(tmp_path / "w.pt", model="v1")), "--root", str(alone.parent), "--out", str(tmp_path / "out")])
    (row,) = csv.DictReader(open(tmp_path / "out" / "metrics.csv"))
    mask = np.asarray(nib.load(tmp_path / "out" / "P1.nii.gz").dataobj)
    assert (row["dice"], row["truth_ml"]) == ("", "") and float(row["pred_ml"]) == pytest.approx(mask.sum() * 1.0)  # voxels of 1 ml
    assert (tmp_path / "out" / "overview.png").stat().st_size > 1000


@pytest.mark.parametrize("shape,size,overlap", [((40, 33, 24), (16, 16, 16), 0.5), ((20, 50, 13), (16, 24, 16), 0.25)])
def test_sliding_window_equals_monais(shape, size, overlap):
    inferers = pytest.importorskip("monai.inferers", reason="MONAI is not installed; pip install '.[bench]'")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv3d(2, 4, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv3d(4, 3, 3, padding=1))  # feels its border
    image = torch.randn(2, *shape)
    with torch.no_grad():
        theirs = inferers.sliding_window_inference(image[None], size, 3, net, overlap=overlap, mode="gaussian")[0]
    torch.testing.assert_close(sliding_window(image, net, size, overlap, batch=3), theirs, rtol=0, atol=1e-5)


def test_a_folder_gets_masks_and_a_table(study, tmp_path, capsys):
    root, _ = study
    weights = [str(checkpoint(tmp_path / f"{m}.pt", model=m)) for m in ("v1", "v2")]
    main(["--checkpoint", *weights, "--root", str(root / "petct"), "--out", str(tmp_path / "out")])
    (row,) = csv.DictReader(open(tmp_path / "out" / "metrics.csv"))
    mask = np.asarray(nib.load(tmp_path / "out" / f"{row['case']}.nii.gz").dataobj)
    truth = nib.load(root / "petct" / "PETCT_0000" / "visit1" / "SEG.nii.gz")
    expected = case_metrics(mask, np.asarray(truth.dataobj), (10.0, 10.0, 10.0))
    assert float(row["fpv_ml"]) == pytest.approx(expected["fpv_ml"]) and float(row["dice"]) == pytest.approx(expected["dice"])
    assert "mean" in capsys.readouterr().out


def test_a_brain_mask_holds_edema_and_core(study, tmp_path):
    root, _ = study
    weights = str(checkpoint(tmp_path / "b.pt", data="brain", model="v2"))
    image = root / "brain" / "imagesTr" / "BRATS_001.nii.gz"
    main(["--checkpoint", weights, "--image", str(image), "--out", str(tmp_path / "m.nii.gz")])
    mask = nib.load(tmp_path / "m.nii.gz")
    assert mask.shape == nib.load(image).shape[:3] and set(np.unique(np.asarray(mask.dataobj))) <= {0, 1, 2}
    main(["--checkpoint", weights, "--root", str(root / "brain"), "--out", str(tmp_path / "o")])
    assert [r["target"] for r in csv.DictReader(open(tmp_path / "o" / "metrics.csv"))] == ["core", "whole", "edema"]


@pytest.mark.parametrize(
    "model,args,message",
    [
        ("v4", "--pet {pet}", "needs CT and PET"),
        ("v3", "--image {pet}", "of petct"),
        ("v3", "--pet missing.nii.gz", "no such file"),
        ("v3", "--pet {pet} --ct {small}", "not on one grid"),
        (None, "--pet {pet}", "not a checkpoint"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence_and_leaves_nothing(study, tmp_path, model, args, message):
    root, folder = study
    small = tmp_path / "small.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), small)
    weights = tmp_path / "w.pt"
    checkpoint(weights, model=model) if model else weights.write_bytes(b"no weights")
    out = tmp_path / "mask.nii.gz"
    with pytest.raises(UserError, match=message):
        main(["--checkpoint", str(weights), *args.format(pet=folder / "SUV.nii.gz", small=small).split(), "--out", str(out)])
    assert not out.exists()


def test_a_strangers_checkpoint_cannot_run_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "caught"),)

    torch.save({"config": {}, "model": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(UserError, match="not a checkpoint"):
        load_model(tmp_path / "trap.pt")
    assert not (tmp_path / "caught").exists()


def test_the_real_brain_case_trains_predicts_and_is_scored(real_brain, tmp_path):
    """One real glioma, coarse and briefly: the whole way from files to a table of core, whole tumor and edema."""
    more = "--spacing 4 4 4 --patch 48 48 48 --channels 4 6 8 10 12 --steps 3 --validations 1 --no-flips".split()
    train.main(["--data", "brain", "--root", str(real_brain), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run"), *more])
    best = str(tmp_path / "run" / "best.pt")
    main(["--checkpoint", best, "--root", str(real_brain), "--out", str(tmp_path / "out")])
    trained, predicted = ([*csv.DictReader(open(tmp_path / f))] for f in ("run/validation.csv", "out/metrics.csv"))
    assert [r["target"] for r in predicted] == ["core", "whole", "edema"]
    assert all(float(r["truth_ml"]) > 1 and 0 <= float(r["dice"]) <= 1 for r in predicted)
    for t, p in zip(trained, predicted):  # one code scores both; the cache keeps half precision
        assert float(t["dice"]) == pytest.approx(float(p["dice"]), abs=1e-3) and t["truth_ml"] == p["truth_ml"]
    (case,) = data.find_brain(real_brain)
    mask, image = nib.load(tmp_path / "out" / f"{case.name}.nii.gz"), nib.load(case.images[0])
    assert mask.shape == image.shape[:3] and np.array_equal(mask.affine, image.affine)
    assert (tmp_path / "out" / "overview.png").exists()
