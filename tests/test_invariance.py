"""Numbers that must not move: one study in many forms of file gives one mask."""

import gzip

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from test_data import make_affine
from test_resampling import CODES

from config import Config
from data import Case, Preprocessing, load_images
from files import read_header
from predict import predict_image, to_original

SPACING = (3.0, 2.0, 2.5)  # mm, of the files
GRID = Preprocessing(spacing=(4.0, 4.0, 4.0))


@pytest.fixture(scope="module")
def model():
    c = Config(model="v4", channels=(2, 2, 3, 3, 4))
    torch.manual_seed(1)
    return c.build_model().eval()


@pytest.fixture(scope="module")
def volumes():
    """CT in whole HU and PET in steps of 1/4 SUV with air around (D, H, W), and their affine."""
    rng = np.random.default_rng(0)
    pet, ct = np.zeros((40, 44, 36)), np.full((40, 44, 36), -1000.0)
    body = (slice(6, 33), slice(7, 38), slice(5, 30))
    pet[body] = rng.integers(1, 32, pet[body].shape) / 4
    ct[body] = rng.integers(-100, 250, ct[body].shape)
    return ct, pet, make_affine("LAS", SPACING)


def probability(model, folder, ct, pet, batch=2, preprocessing=GRID, ending=".nii.gz"):
    """The probabilities of two files on their own grid."""
    case = Case("P", "P", (folder / f"CTres{ending}", folder / f"SUV{ending}"), None)
    for path, image in zip(case.images, (ct, pet)):
        nib.save(image, path)
    image, affine, _ = load_images(case, preprocessing)
    found, _ = predict_image(model, torch.from_numpy(image), (32, 32, 32), 0.5, batch)
    return to_original(found[0].numpy(), affine, read_header(case.images[1]))


@pytest.fixture(scope="module")
def expected(model, volumes, tmp_path_factory):
    ct, pet, affine = volumes
    images = (nib.Nifti1Image(a.astype(np.float32), affine) for a in (ct, pet))
    found = probability(model, tmp_path_factory.mktemp("plain"), *images)
    assert np.unique(found).size > 1000
    return found


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.slow
def test_the_48_orientations(model, volumes, expected, tmp_path, codes):
    images = []
    for array in volumes[:2]:
        image = nib.Nifti1Image(array.astype(np.float32), volumes[2])
        turn = ornt_transform(io_orientation(volumes[2]), axcodes2ornt(codes))
        images.append(image.as_reoriented(turn))
    found = nib.Nifti1Image(probability(model, tmp_path, *images), images[1].affine)
    turn = ornt_transform(io_orientation(found.affine), io_orientation(volumes[2]))
    back = np.asarray(found.as_reoriented(turn).dataobj)
    np.testing.assert_allclose(back, expected, atol=2e-5)  # positions are rounded differently


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    "dtype,slope", [("i2", 0.25), ("i4", 0.125), ("f4", 1), ("f4", 0.5), ("f8", 1)]
)
def test_types_byte_orders_slopes_and_compression(
    model, volumes, expected, tmp_path, ending, order, dtype, slope
):
    for name, array in zip(("CTres", "SUV"), volumes):
        stored = (array / slope).astype(order + dtype)
        header = nib.Nifti1Image(stored, volumes[2], nib.Nifti1Header(endianness=order)).header
        header.set_data_dtype(order + dtype)
        header["vox_offset"], header["scl_slope"], header["scl_inter"] = 352, slope, 0
        content = header.binaryblock + bytes(4) + stored.tobytes(order="F")
        content = gzip.compress(content) if ending == ".nii.gz" else content
        (tmp_path / f"{name}{ending}").write_bytes(content)
    case = Case("P", "P", (tmp_path / f"CTres{ending}", tmp_path / f"SUV{ending}"), None)
    image, affine, _ = load_images(case, GRID)
    found, _ = predict_image(model, torch.from_numpy(image), (32, 32, 32), 0.5, 2)
    back = to_original(found[0].numpy(), affine, read_header(case.images[1]))
    assert np.array_equal(back, expected)


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_the_number_of_windows_at_a_time(model, volumes, expected, tmp_path, batch):
    ct, pet, affine = volumes
    images = (nib.Nifti1Image(a.astype(np.float32), affine) for a in (ct, pet))
    found = probability(model, tmp_path, *images, batch=batch)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("before,after", [((5, 0, 3), (2, 9, 0)), ((0, 0, 8), (0, 0, 8))])
def test_air_around_a_study_on_the_networks_spacing(model, volumes, tmp_path, before, after):
    """The crop to PET > 0, and with it every window, stays; docs/running.md: other spacings."""
    ct, pet, affine = volumes
    grid = Preprocessing(spacing=SPACING)
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir(), large.mkdir()
    images = [nib.Nifti1Image(a.astype(np.float32), affine) for a in (ct, pet)]
    expected = probability(model, small, *images, preprocessing=grid)
    corner = affine.copy()
    corner[:3, 3] = affine[:3, 3] - affine[:3, :3] @ before
    width = list(zip(before, after))
    padded = [np.pad(ct, width, constant_values=-1000.0), np.pad(pet, width)]
    images = [nib.Nifti1Image(a.astype(np.float32), corner) for a in padded]
    found = probability(model, large, *images, preprocessing=grid)
    inner = tuple(slice(a, n - b) for a, b, n in zip(before, after, found.shape))
    assert np.array_equal(found[inner], expected)
