"""predict.py: sliding window, masks on the input's own grid, the program from files to files."""

import csv
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine, from_matvec
from test_data import make_affine, refused, write_petct
from torch import nn

import data
import phantom
import predict
import train
from config import Config, parse_config
from data import Preprocessing
from evaluate import evaluate_case, read_truth
from files import read_header
from metrics import case_metrics
from mirror_unet import MirrorOutput, MirrorUNet
from predict import (
    foreground_probability,
    gaussian_window,
    load_model,
    main,
    parse_arguments,
    predict_image,
    reconstruct,
    sliding_window,
    to_masks,
    to_original,
    window_starts,
)

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = (2, 3, 4, 5, 6)
SIZE = (32, 16, 16)  # of a window: the smallest that instance norm allows


# ---------------------------------------------------------------------------------- sliding window
@pytest.mark.parametrize(
    "shape,size,overlap,count",
    [
        # Windows per axis: ceil((n - s) / stride) + 1.
        ((40, 33, 16), (16, 16, 16), 0.5, 4 * 4 * 1),  # strides 8, 8, 8
        ((17, 16, 50), (16, 8, 24), 0.25, 2 * 3 * 3),  # strides 12, 6, 18
        ((9, 9, 9), (8, 8, 8), 0.0, 2 * 2 * 2),
    ],
)
def test_windows_cover_every_voxel_and_stay_inside(shape, size, overlap, count):
    starts = window_starts(shape, size, overlap)
    covered = np.zeros(shape, bool)
    for start in starts:
        ends = [a + s for a, s in zip(start, size, strict=True)]
        assert min(start) >= 0 and all(e <= n for e, n in zip(ends, shape, strict=True))
        covered[tuple(map(slice, start, ends))] = True
    assert covered.all()
    assert len(set(starts)) == len(starts) == count


def test_the_weight_of_a_window_is_a_gaussian_with_a_least_value():
    weight = gaussian_window((9, 5, 33))
    assert weight.argmax() == weight.numel() // 2
    assert weight.max() == 1 and weight.min() >= 1e-3
    torch.testing.assert_close(weight, weight.flip(0, 1, 2))
    along = gaussian_window((33, 1, 1)).flatten()
    sigma = 0.125 * 33
    expected = np.exp(-0.5 * (4 / sigma) ** 2)  # four voxels from the center
    assert along[20].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(40, 33, 20), (16, 16, 16), (7, 40, 5)])
def test_a_pointwise_function_comes_back_exactly(shape):
    """Also if the volume is smaller than a window, along some axes or all."""

    def product_and_three(x):
        return torch.stack([x[:, 0] * x[:, 1], torch.full_like(x[:, 0], 3)], dim=1)

    image = torch.randn(2, *shape)
    out = sliding_window(image, product_and_three, (16, 16, 16), batch=3)
    torch.testing.assert_close(out[0], image[0] * image[1])
    torch.testing.assert_close(out[1], torch.full(shape, 3.0))


def test_overlapping_windows_are_averaged_by_their_weights():
    """Two windows of 16 on 24 voxels: one answers 1, the other 2."""
    answers = iter([1.0, 2.0])
    image = torch.zeros(1, 24, 1, 1)
    out = sliding_window(image, lambda x: x + next(answers), (16, 1, 1), batch=1)
    weight = gaussian_window((16, 1, 1)).flatten()
    first, second = weight[8:], weight[:8]  # in the eight voxels that both cover
    both = (1 * first + 2 * second) / (first + second)
    expected = torch.cat([torch.ones(8), both, torch.full((8,), 2.0)])
    torch.testing.assert_close(out[0, :, 0, 0], expected)


def test_windows_of_air_get_the_answer_of_one_of_them():
    calls = []

    def bright(x):
        calls.append(len(x))
        return (x[:, -1:] > 0.5).float() + 0.25

    image = torch.rand(2, 64, 16, 16) * 0.01
    image[1, 40, 8, 8] = 1.0
    expected = sliding_window(image, bright, (16, 16, 16), batch=2)
    assert sum(calls) == 7
    calls.clear()
    found = sliding_window(image, bright, (16, 16, 16), batch=2, air=0.02)
    torch.testing.assert_close(found, expected)
    assert sum(calls) == 3  # two that hold voxel 40, and one of air
    calls.clear()
    assert (sliding_window(image[:, :32], bright, (16, 16, 16), air=0.02) == 0.25).all()
    assert sum(calls) == 1


@pytest.mark.parametrize(
    "window,air,windows",
    [((0.0, 5.0), 0.2, 1), ((0.0, 5.0), 0.1, 3), ((0.0, 1.0), 0.1, 3), ((0.5, 5.0), 0.2, 1)],
)
def test_air_is_given_as_an_suv(window, air, windows):
    """All voxels have an SUV of 0.15, and are 0 in an SUV window from 0.5 on."""
    low, high = window
    calls = []

    class Silent(nn.Module):
        tasks = reads = ()

        def forward(self, x):
            calls.append(len(x))
            return MirrorOutput(seg=x * 0)

    c = Config(patch=(16, 16, 16), suv_window=window, flips=False)
    suv = torch.full((2, 32, 16, 16), 0.15)
    scaled = ((suv - low) / (high - low)).clamp(0, 1)
    predict.predict_ensemble([(Silent(), c)], scaled, "P", skip_air=air)
    assert sum(calls) == windows


@pytest.mark.parametrize(
    "shape,size,overlap",
    [((40, 33, 24), (16, 16, 16), 0.5), ((20, 50, 13), (16, 24, 16), 0.25)],
)
def test_sliding_window_equals_monai(shape, size, overlap):
    reason = "MONAI is not installed: pip install '.[bench]'"
    inferers = pytest.importorskip("monai.inferers", reason=reason)
    torch.manual_seed(0)
    image = torch.randn(2, *shape)
    model = nn.Sequential(  # its output depends on the border
        nn.Conv3d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv3d(4, 3, 3, padding=1)
    )
    with torch.no_grad():
        expected = inferers.sliding_window_inference(
            image[None], size, 3, model, overlap=overlap, mode="gaussian"
        )[0]
    found = sliding_window(image, model, size, overlap, batch=3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------- one image
def test_the_batch_size_changes_nothing():
    model = MirrorUNet("v1", channels=TINY)
    image = torch.randn(2, 48, 24, 20)
    one, four = (predict_image(model, image, SIZE, batch=n)[0] for n in (1, 4))
    torch.testing.assert_close(one, four)


def test_flips_average_over_all_mirror_images_of_the_given_axes():
    model = MirrorUNet("v3", channels=TINY)
    image = torch.randn(2, *SIZE)
    flips = [[], [1], [2], [3], [1, 2], [1, 3], [2, 3], [1, 2, 3]]
    each = [predict_image(model, image.flip(f), SIZE)[0].flip(f) for f in flips]
    found, _ = predict_image(model, image, SIZE, flip_axes=(0, 1, 2))
    torch.testing.assert_close(found, torch.stack(each).mean(0))
    found, _ = predict_image(model, image, SIZE, flip_axes=(1,))
    torch.testing.assert_close(found, (each[0] + each[2]) / 2)


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v4"])
def test_the_probability_of_tumor_is_that_of_the_full_network(version):
    model = MirrorUNet(version, channels=TINY).eval()
    x = torch.randn(2, 2, *SIZE)
    with torch.no_grad():
        out = model(x)
        prob, tumor = foreground_probability(model, x)
    torch.testing.assert_close(prob[:, 0], out.seg.softmax(1)[:, 1], rtol=0, atol=1e-6)
    if version == "v3":
        torch.testing.assert_close(tumor, out.tumor.sigmoid())
    else:
        assert tumor is None


def test_the_score_of_a_patient_is_the_highest_of_the_windows():
    model = MirrorUNet("v3", channels=TINY)
    image = torch.randn(2, 48, 16, 16)
    _, score = predict_image(model, image, SIZE)
    assert model.training  # as before
    model.eval()
    with torch.no_grad():
        windows = [model.segment(image[None, 1:, a : a + 32]).tumor.sigmoid() for a in (0, 16)]
    assert score == pytest.approx(max(windows).item(), rel=1e-5)


@pytest.mark.parametrize("version,targets", [("v1", 2), ("v2", 3)])
def test_the_brain_has_a_map_per_target_and_no_score(version, targets):
    model = MirrorUNet(version, channels=TINY, preset="brain")
    prob, score = predict_image(model, torch.randn(2, *SIZE), SIZE)
    assert prob.shape == (targets, *SIZE) and score is None


@pytest.mark.parametrize("version,names", [("v1", ["CT"]), ("v2", ["CT", "PET"]), ("v4", [])])
def test_reconstructions_are_those_of_the_network(version, names):
    model = MirrorUNet(version, channels=TINY).eval()
    image = torch.rand(2, *SIZE)
    found = reconstruct(model, image, SIZE)
    assert list(found) == names
    with torch.no_grad():
        out = model(image[None])
    for name in names:
        expected = getattr(out, name.lower())[0, 0]
        torch.testing.assert_close(torch.from_numpy(found[name]), expected)


# --------------------------------------------------------------------- back to the input's own grid
def ball(shape, affine, voxel, radius) -> np.ndarray:
    """The mask of a ball about a voxel, its radius in mm."""
    voxels = np.moveaxis(np.indices(shape), 0, -1)
    center = apply_affine(affine, voxel)
    return np.linalg.norm(apply_affine(affine, voxels) - center, axis=-1) <= radius


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR"])
def test_a_mask_survives_the_way_to_the_network_and_back(tmp_path, codes):
    """The preprocessed label as prediction; oblique, anisotropic, with any order of axes."""
    affine = make_affine(codes, (3.1, 2.2, 4.5), tilt=20)
    shape = (40, 44, 30)
    truth = ball(shape, affine, voxel=(20, 22, 15), radius=28)
    write_petct(tmp_path / "P1", 0.5 + 4 * truth, seg=truth, affine=affine)
    found, grid = data.find_petct(tmp_path), Preprocessing(spacing=(2.5, 2.5, 2.5))
    (cached,) = data.build_cache(found, grid, tmp_path / "cache", workers=1)
    label = cached.array("label")[None].astype(np.float32)
    masks = to_masks(label, cached.affine, read_header(cached.case.images[-1]), 0.5)
    (row,) = evaluate_case(cached.case, read_truth(cached.case), masks, ("seg",))
    assert row["dice"] >= 0.97 and row["fpv_ml"] == 0 and row["fnv_ml"] == 0
    assert row["truth_ml"] == pytest.approx(4 / 3 * np.pi * 2.8**3, rel=0.02)


def test_a_map_is_zero_outside_the_grid_of_the_network():
    like = nib.Nifti1Image(np.zeros((10, 10, 10)), np.eye(4))
    inner = from_matvec(np.eye(3), [3, 3, 3])
    back = to_original(np.ones((4, 4, 4), np.float32), inner, like)
    expected = np.zeros((10, 10, 10))
    expected[3:7, 3:7, 3:7] = 1
    assert np.array_equal(back, expected)


def test_a_map_on_the_same_grid_is_not_resampled():
    like = nib.Nifti1Image(np.zeros((10, 10, 10)), np.eye(4))
    prob = np.random.default_rng(0).random((10, 10, 10), np.float32)
    assert to_original(prob, np.eye(4), like) is prob


class Oracle(nn.Module):
    """Segments by a threshold on its second channel, so the PET itself holds the answer."""

    def __init__(self, threshold: float):
        super().__init__()
        self.threshold = threshold

    def forward(self, x):
        evidence = 50 * (x[:, 1:2] - self.threshold)
        return MirrorOutput(seg=torch.cat([-evidence, evidence], dim=1))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR"])
def test_a_saved_mask_lies_on_its_input_voxel_for_voxel(tmp_path, monkeypatch, codes):
    """The program from files to files; oblique, anisotropic, with any order of axes."""
    affine = make_affine(codes, (2.6, 2.0, 4.2), tilt=25)
    shape = (44, 50, 33)
    truth = ball(shape, affine, (15, 17, 11), 22) | ball(shape, affine, (31, 36, 24), 14)
    truth |= ball(shape, affine, (12, 38, 22), 17)  # without any symmetry
    suv = np.where(truth, 4.5, 0.5).astype(np.float32)
    paths = {name: tmp_path / f"{name}.nii.gz" for name in ("pet", "ct", "out")}
    for name, array in (("pet", suv), ("ct", suv * 0)):
        image = nib.Nifti1Image(array, affine)
        image.set_sform(affine, code=2)
        image.header["descrip"] = "kept"
        nib.save(image, paths[name])

    options = "--data petct --root x --spacing 2 2 2 --patch 48 48 48 --no-flips --overlap 0.25"
    c = parse_config(options.split())
    oracle = Oracle(2.5 / c.suv_window[1])  # halfway between tumor and background
    monkeypatch.setattr(predict, "load_model", lambda *_: (oracle, c))
    files = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    main(["--checkpoint", "x", *files, "--threshold", "0.5", "--probabilities"])

    mask, pet = nib.load(paths["out"]), nib.load(paths["pet"])
    assert mask.shape == shape and np.array_equal(mask.affine, pet.affine)
    assert nib.aff2axcodes(mask.affine) == tuple(codes)
    assert mask.header["descrip"] == pet.header["descrip"]
    assert mask.header["sform_code"] == 2
    assert mask.header.get_zooms() == pet.header.get_zooms()
    assert case_metrics(np.asarray(mask.dataobj), truth, (1, 1, 1))["dice"] >= 0.97
    probability = nib.load(tmp_path / "out_seg_probability.nii.gz")
    assert np.array_equal(probability.affine, pet.affine)
    assert probability.get_data_dtype() == np.float32
    assert np.array_equal(probability.get_fdata() >= 0.5, np.asarray(mask.dataobj) > 0)


# ------------------------------------------------------------------------------------- the program
@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with one PET/CT phantom of 10 mm and one brain phantom of 5 mm."""
    root = tmp_path_factory.mktemp("study")
    phantom.write_petct(root / "petct", 1, spacing=(10.0, 10.0, 10.0))
    phantom.write_brain(root / "brain", 1, spacing=(5.0, 5.0, 5.0))
    return root


@pytest.fixture
def study(root):
    """The folder of the PET/CT phantom: SUV, CTres and SEG."""
    return root / "petct" / "PETCT_0000" / "visit1"


def checkpoint(path, data="petct", model="v3", seed=0, **options) -> Path:
    """Save what train.py saves of an untrained network; `options` replace those in its config."""
    words = ["--data", data, "--root", "x", "--model", model, "--seed", str(seed), "--no-flips"]
    words += "--patch 32 32 32 --channels 2 3 4 5 6 --spacing 8 8 8 --overlap 0".split()
    c = parse_config(words)
    weights = train.build_model(c).state_dict()
    for name in [name for name in weights if name.endswith("levels.8.up.conv.weight")]:
        weights[name] *= 10  # outputs start near 0: make them differ between voxels
    torch.save({"config": c.to_dict() | options, "model": weights}, path)
    return path


def run(weights, *words) -> None:
    """Run the program with one checkpoint or several."""
    weights = weights if isinstance(weights, list) else [weights]
    main([str(word) for word in ("--checkpoint", *weights, *words)])


def voxels(path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def table(path) -> list[dict[str, str]]:
    with open(path) as f:
        return list(csv.DictReader(f))


def test_a_mask_has_the_grid_of_its_input_and_nothing_else_is_written(study, tmp_path):
    weights, pet, out = checkpoint(tmp_path / "v3.pt"), study / "SUV.nii.gz", tmp_path / "m.nii.gz"
    run(weights, "--pet", pet, "--out", out, "--threshold", 0.4)
    mask, like = nib.load(out), nib.load(pet)
    assert mask.shape == like.shape and np.array_equal(mask.affine, like.affine)
    assert mask.get_data_dtype() == np.uint8 and set(np.unique(voxels(out))) == {0, 1}
    assert mask.header.get_xyzt_units() == like.header.get_xyzt_units()
    assert {path.name for path in tmp_path.iterdir()} == {"m.nii.gz", "v3.pt"}


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
@pytest.mark.slow
def test_the_ct_does_not_change_a_bit_of_the_prediction_of_v1_to_v3(study, tmp_path, version):
    ct, noise = study / "CTres.nii.gz", tmp_path / "noise.nii.gz"
    like = nib.load(ct)
    hounsfield = np.random.default_rng(0).normal(0, 500, like.shape).astype(np.float32)
    nib.save(nib.Nifti1Image(hounsfield, like.affine), noise)
    weights, out = checkpoint(tmp_path / "w.pt", model=version), tmp_path / "m.nii"
    found = []
    for images in ([], ["--ct", ct], ["--ct", noise]):
        pet = ["--pet", study / "SUV.nii.gz"]
        run(weights, *pet, *images, "--out", out, "--probabilities")
        files = out, tmp_path / "m_seg_probability.nii"
        found.append([path.read_bytes() for path in files])
    assert found[0] == found[1] == found[2]


def test_an_ensemble_averages_the_probabilities_of_its_members(study, tmp_path):
    members = [checkpoint(tmp_path / f"{seed}.pt", model="v1", seed=seed) for seed in (1, 2)]
    maps = []
    for weights in ([members[0]], [members[1]], members):
        out = tmp_path / "m.nii"
        run(weights, "--pet", study / "SUV.nii.gz", "--out", out, "--probabilities")
        maps.append(voxels(tmp_path / "m_seg_probability.nii"))
    assert not np.allclose(maps[0], maps[1])
    np.testing.assert_allclose(maps[2], (maps[0] + maps[1]) / 2, atol=1e-6)


def test_a_folder_gets_masks_a_table_and_a_picture(root, study, tmp_path, capsys):
    weights = [checkpoint(tmp_path / f"{m}.pt", model=m) for m in ("v1", "v2")]
    out = tmp_path / "out"
    run(weights, "--root", root / "petct", "--out", out)
    names = {path.name for path in out.iterdir()}
    assert names == {"PETCT_0000__visit1.nii.gz", "metrics.csv", "lesions.csv", "overview.png"}
    (row,) = table(out / "metrics.csv")
    truth = voxels(study / "SEG.nii.gz")
    expected = case_metrics(voxels(out / "PETCT_0000__visit1.nii.gz"), truth, (10, 10, 10))
    for name, value in expected.items():
        assert float(row[name]) == pytest.approx(value), name
    assert row["tumor_score"] == ""
    assert "\nmean " in capsys.readouterr().out


@pytest.mark.slow
def test_a_study_whose_score_is_below_the_limit_gets_an_empty_mask(root, tmp_path, capsys):
    """A score equal to the limit is kept; the probabilities stay as they are."""
    weights, name = checkpoint(tmp_path / "v3.pt"), "PETCT_0000__visit1"

    def predicted(*words):
        out = tmp_path / "_".join(map(str, ["out", *words]))
        run(weights, "--root", root / "petct", "--out", out, "--probabilities", *words)
        (row,) = table(out / "metrics.csv")
        probability = (out / f"{name}_seg_probability.nii.gz").read_bytes()
        said = f"{name} -> " in (text := capsys.readouterr().out) and "rejected" in text
        return row, voxels(out / f"{name}.nii.gz"), probability, said

    row, mask, probability, said = predicted()
    score = float(row["tumor_score"])
    assert mask.any() and row["rejected"] == "0" and not said
    above = np.nextafter(score, 1)
    for limit in (0, score, above, 1):
        row, found, same, said = predicted("--reject-below", repr(float(limit)))
        lower = score < limit
        assert np.array_equal(found, mask * (not lower)) and same == probability
        assert row["rejected"] == str(int(lower)) and said == lower
        assert float(row["tumor_score"]) == score and (float(row["pred_ml"]) == 0) == lower


@pytest.mark.parametrize("data,model", [("petct", "v1"), ("petct", "v4"), ("brain", "v2")])
def test_only_networks_with_a_tumor_score_reject(root, tmp_path, data, model):
    weights, out = checkpoint(tmp_path / "w.pt", data=data, model=model), tmp_path / "out"
    with refused(f"w.pt: {model} has no tumor score for --reject-below"):
        run(weights, "--root", root / data, "--out", out, "--reject-below", 0)
    assert not out.exists()


def test_a_folder_without_truth_gets_masks_volumes_and_a_picture(study, tmp_path):
    alone = tmp_path / "in" / "P1"
    alone.mkdir(parents=True)
    shutil.copy(study / "SUV.nii.gz", alone)
    out = tmp_path / "out"
    run(checkpoint(tmp_path / "w.pt", model="v1"), "--root", alone.parent, "--out", out)
    (row,) = table(out / "metrics.csv")
    assert row["dice"] == row["fpv_ml"] == row["fnv_ml"] == row["truth_ml"] == ""
    volume = voxels(out / "P1.nii.gz").sum()  # voxels of 1 ml
    assert volume > 0 and float(row["pred_ml"]) == pytest.approx(volume)
    assert (out / "overview.png").stat().st_size > 1000


def test_a_broken_study_does_not_cost_the_others_of_its_folder(root, tmp_path):
    studies, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(root / "petct", studies)
    good = studies / "PETCT_0000" / "visit1" / "SUV.nii.gz"
    (studies / "BROKEN").mkdir()
    (studies / "BROKEN" / "SUV.nii.gz").write_bytes(good.read_bytes()[:2000])
    with refused("1 of 2 studies", "BROKEN/SUV.nii.gz: not a readable NIfTI file"):
        run(checkpoint(tmp_path / "w.pt"), "--root", studies, "--out", out)
    (row,) = table(out / "metrics.csv")
    assert row["case"] == "PETCT_0000__visit1" and 0 <= float(row["tumor_score"]) <= 1
    names = {path.name for path in out.iterdir()}
    assert names == {"PETCT_0000__visit1.nii.gz", "metrics.csv", "lesions.csv", "overview.png"}


def test_a_brain_mask_holds_edema_and_core(root, tmp_path):
    weights = checkpoint(tmp_path / "b.pt", data="brain", model="v2")
    image, out = root / "brain" / "imagesTr" / "BRATS_001.nii.gz", tmp_path / "m.nii"
    run(weights, "--image", image, "--out", out, "--probabilities")
    assert nib.load(out).shape == nib.load(image).shape[:3]
    maps = [tmp_path / f"m_{target}_probability.nii" for target in ("core", "whole", "edema")]
    core, whole, edema = (voxels(path) >= 0.5 for path in maps)
    expected = np.where(core, 2, np.where(whole | edema, 1, 0))
    assert np.array_equal(voxels(out), expected)
    run(weights, "--root", root / "brain", "--out", tmp_path / "out")
    rows = table(tmp_path / "out" / "metrics.csv")
    assert [row["target"] for row in rows] == ["core", "whole", "edema"]


def test_one_brain_file_of_four_channels_or_two_files_give_the_same(root, tmp_path):
    path = root / "brain" / "imagesTr" / "BRATS_001.nii.gz"
    t2w, flair = tmp_path / "t2w.nii.gz", tmp_path / "flair.nii.gz"
    nib.save(nib.load(path).slicer[..., 3], t2w)
    nib.save(nib.load(path).slicer[..., 0], flair)
    weights = checkpoint(tmp_path / "b.pt", data="brain", model="v2")
    names = ("m", "m_core_probability", "m_whole_probability", "m_edema_probability")
    found = []
    for images in (["--image", path], ["--t2w", t2w, "--flair", flair]):
        run(weights, *images, "--out", tmp_path / "m.nii", "--probabilities")
        found.append([voxels(tmp_path / f"{name}.nii").tobytes() for name in names])
    assert found[0] == found[1]
    assert len(set(found[0])) == 4  # the mask and three different maps


@pytest.mark.slow
def test_a_real_brain_study_is_trained_predicted_and_scored(real_brain, tmp_path):
    """One real glioma, coarse and briefly."""
    folder, out = tmp_path / "run", tmp_path / "out"
    words = ["--data", "brain", "--root", real_brain, "--cache", tmp_path / "cache"]
    words += "--spacing 6 6 6 --patch 32 32 32 --channels 2 3 4 5 6 --steps 3".split()
    words += ["--validations", 1, "--no-flips", "--overlap", 0, "--out", folder]
    train.main(list(map(str, words)))
    run(folder / "best.pt", "--root", real_brain, "--out", out)
    trained, predicted = table(folder / "validation.csv"), table(out / "metrics.csv")
    assert [row["target"] for row in predicted] == ["core", "whole", "edema"]
    for row, expected in zip(predicted, trained, strict=True):
        assert float(row["truth_ml"]) > 1 and row["truth_ml"] == expected["truth_ml"]
        dice = float(expected["dice"])  # of the cache, which has half precision
        assert float(row["dice"]) == pytest.approx(dice, abs=1e-3)
    (case,) = data.find_brain(real_brain)
    mask, image = nib.load(out / f"{case.name}.nii.gz"), nib.load(case.images[0])
    assert mask.shape == image.shape[:3] and np.array_equal(mask.affine, image.affine)
    assert (out / "overview.png").exists()


# ---------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    "model,words,message",
    [
        ("v4", "--pet {pet}", "v4 needs CT and PET, and the CT is missing"),
        ("v3", "--image {pet}", "this checkpoint is of petct: give --pet or --root"),
        ("v3", "--pet missing.nii.gz", "missing.nii.gz: no such file"),
        ("v4", "--pet {pet} --ct {small}", "small.nii.gz"),
        (None, "--pet {pet}", "not a checkpoint of train.py, or cut short"),
    ],
)
def test_what_cannot_be_predicted_is_refused_and_leaves_no_file(
    study, tmp_path, model, words, message
):
    small, weights, out = (tmp_path / name for name in ("small.nii.gz", "w.pt", "mask.nii.gz"))
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), small)
    if model:
        checkpoint(weights, model=model)
    else:
        weights.write_bytes(b"no weights")
    words = words.format(pet=study / "SUV.nii.gz", small=small).split()
    with refused(message):
        run(weights, *words, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(
    "words,message",
    [
        ("--pet p.nii", "--out"),
        ("--pet p.nii --out m.nii --blur", "--blur; see --help"),
        ("--out m.nii", "give one input"),
        ("--pet p.nii --image i.nii --out m.nii", "give one input"),
        ("--ct c.nii --out m.nii", "--ct without --pet"),
        ("--flair f.nii --out m.nii", "--t2w and --flair go together"),
        ("--pet p.nii --out m.png", "end the name in .nii.gz"),
        ("--pet p.nii --out .", "end the name in .nii.gz"),
        ("--pet p.nii --out m.nii --overlap 0.95", "--overlap 0.95: give 0.9 or less"),
        ("--pet p.nii --out m.nii --overlap nan", "--overlap expected a number, got nan"),
        ("--pet p.nii --out m.nii --threshold 1.5", "--threshold 1.5: give 1 or less"),
        ("--pet p.nii --out m.nii --reject-below 1.5", "--reject-below 1.5: give a number"),
        ("--pet p.nii --out m.nii --reject-below nan", "--reject-below nan: give a number"),
        ("--pet p.nii --out m.nii --skip-air 2", "--skip-air 2.0: give a number from 0 to 1"),
        ("--pet p.nii --out m.nii --batch 0", "--batch 0: give 1 or more"),
        ("--pet p.nii --out m.nii --device tpu", "--device tpu: use cpu, cuda or cuda:N"),
        ("--pet p.nii --out m.nii --kernels fast", "--kernels fast: "),
    ],
)
def test_options_that_cannot_work_are_refused(words, message):
    with refused(message):
        parse_arguments(["--checkpoint", "x", *words.split()])


def test_a_mask_is_no_folder_and_masks_of_a_folder_are_no_file(study, tmp_path):
    folder, file = tmp_path / "m.nii", tmp_path / "file"
    folder.mkdir()
    file.touch()
    with refused("m.nii is a folder; choose another name"):
        run(checkpoint(tmp_path / "w.pt"), "--pet", study / "SUV.nii.gz", "--out", folder)
    with refused("a file; name a folder"):
        parse_arguments(["--checkpoint", "x", "--root", "r", "--out", str(file)])


def test_a_foreign_checkpoint_cannot_run_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "caught"),)

    torch.save({"config": {}, "model": Trap()}, tmp_path / "trap.pt")
    with refused("trap.pt: not a checkpoint of train.py", "more than tensors and plain values"):
        load_model(tmp_path / "trap.pt")
    assert not (tmp_path / "caught").exists()


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("overlap", 0.9999999, "option overlap: 0.9999999: give 0.9 or less"),
        ("patch", (10**6, 10**6, 10**6), "option patch: 1000000: give 1024 or less"),
        ("patch", (10**400, 32, 32), "option patch: 1000000"),
        ("flip_axes", (0,) * 24, "option flip_axes: names a value twice"),
        ("model", "v9", "does not fit the network it names (v9): no version 'v9'"),
        ("ct_weight", "much", "does not fit the network it names (v3)"),
        ("channels", (4, 4, 4, 4, 4), "does not fit the network it names (v3)"),
    ],
)
def test_a_checkpoint_whose_config_cannot_be_used_is_refused(tmp_path, name, value, message):
    path = checkpoint(tmp_path / "w.pt")
    state = torch.load(path, weights_only=True)
    torch.save(state | {"config": state["config"] | {name: value}}, path)
    with refused(f"{path}: ", message):
        load_model(path)


def test_a_loaded_network_is_the_saved_one_in_eval_mode(tmp_path):
    path = checkpoint(tmp_path / "w.pt", data="brain", model="v2")
    model, c = load_model(path)
    assert not model.training and c.task == "brain" and c.channels == TINY
    saved = torch.load(path, weights_only=True)["model"]
    assert model.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
