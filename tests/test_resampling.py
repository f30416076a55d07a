"""Probabilities on their way back to the input's grid: no voxel of the body is out of reach."""

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import voxel_sizes
from test_data import make_affine, save

from data import Case, Preprocessing, load_images
from files import read_header
from predict import to_original

CODES = [
    "".join(codes)
    for axes in permutations(("LR", "PA", "IS"))
    for codes in product(*axes)
]  # the 48 orientations
SPACINGS = (0.9, 1.0, 2.0, 2.036, 3.0, 4.0, 4.0728, 5.0)  # mm


def ones_back(path, suv, affine, spacing) -> np.ndarray:
    """What becomes of a probability of 1 in the whole volume that the network sees."""
    save(path, suv.astype(np.float32), affine)
    case = Case("P", "P", (None, path), None)
    image, grid, _ = load_images(case, Preprocessing(spacing=tuple(spacing)))
    return to_original(np.ones(image.shape[1:], np.float32), grid, read_header(path))


def random_study(rng, body: bool) -> tuple[np.ndarray, np.ndarray]:
    """A PET (D, H, W), uniform or a box in air, and its affine as float32 holds it."""
    shape = rng.integers(1 if not body else 12, 40, 3)
    suv = np.ones(shape)
    if body:
        suv = np.zeros(shape)
        low = rng.integers(0, 5, 3)
        high = shape - rng.integers(0, 5, 3)
        suv[tuple(slice(a, b) for a, b in zip(low, high))] = 1
    codes = CODES[rng.integers(len(CODES))]
    tilt = rng.choice([0, 25])
    affine = make_affine(codes, rng.choice(SPACINGS, 3), rng.uniform(-500, 500, 3), tilt)
    return suv, affine.astype(np.float32).astype(float)


@pytest.mark.parametrize("codes", CODES)
def test_a_map_of_ones_comes_back_as_ones_from_every_orientation(tmp_path, codes):
    rng = np.random.default_rng(CODES.index(codes))
    affine = make_affine(codes, (2.036, 1.5, 3.0), rng.uniform(-500, 500, 3))
    suv = np.ones(rng.integers(10, 30, 3))
    assert (ones_back(tmp_path / "SUV.nii.gz", suv, affine, (4, 4, 4)) == 1).all()


@pytest.mark.parametrize("seed", range(150))
def test_every_voxel_of_the_body_can_be_predicted_and_air_cannot(tmp_path, seed):
    """Any pair of spacings; whole volumes and boxes in air; and equal spacings."""
    rng = np.random.default_rng(seed)
    suv, affine = random_study(rng, body=seed % 2 == 1)
    spacing = rng.choice(SPACINGS, 3)
    if seed % 3 == 0:
        turned = nib.as_closest_canonical(nib.Nifti1Image(suv, affine))
        spacing = voxel_sizes(turned.affine)
    back = ones_back(tmp_path / "SUV.nii.gz", suv, affine, spacing)
    assert back.shape == suv.shape and (back[suv > 0] == 1).all()
    # Air that is farther from the body, along an axis, than a voxel of both grids.
    mm = voxel_sizes(affine)
    limit = np.ceil(spacing.max() / mm + 1).astype(int)
    body = np.argwhere(suv > 0)
    near = tuple(
        slice(max(0, a), b + 1) for a, b in zip(body.min(0) - limit, body.max(0) + limit)
    )
    back[near] = 0
    assert not back.any()


def test_with_equal_spacings_exactly_the_body_can_be_predicted(tmp_path):
    """Rounding of the affine may not cost a face, nor add one."""
    rng = np.random.default_rng(0)
    for i in range(100):
        spacing = float(np.float32(rng.choice(SPACINGS[2:])))
        affine = make_affine("LAS", (spacing,) * 3, rng.uniform(-500, 500, 3))
        affine = affine.astype(np.float32).astype(float)
        suv = np.zeros((14, 12, 16))
        suv[tuple(slice(a, -b) for a, b in zip(rng.integers(1, 5, 3), rng.integers(1, 5, 3)))] = 1
        back = ones_back(tmp_path / "SUV.nii.gz", suv, affine, (spacing,) * 3)
        assert np.array_equal(back, suv), i


def test_inside_the_grid_a_map_is_interpolated_linearly(tmp_path):
    """A linear map stays linear between the outermost centers, and is constant beyond them."""
    affine = make_affine("LAS", (1, 1, 1))
    like = nib.Nifti1Image(np.zeros((16, 4, 4)), affine)
    grid = affine @ np.diag([4.0, 1, 1, 1])
    grid[:3, 3] = (affine @ [1.5, 0, 0, 1])[:3]  # centers at 1.5, 5.5, 9.5 and 13.5
    prob = np.broadcast_to(np.arange(4.0)[:, None, None], (4, 4, 4)).astype(np.float32)
    expected = np.clip((np.arange(16) - 1.5) / 4, 0, 3)
    np.testing.assert_allclose(to_original(prob, grid, like)[:, 0, 0], expected, atol=1e-6)


@pytest.mark.slow
def test_no_true_tumor_of_real_studies_is_out_of_reach(real_petct):
    for folder in sorted(real_petct.glob("*/")):
        case = Case(folder.name, folder.name, (None, folder / "SUV.nii.gz"), None)
        image, grid, _ = load_images(case, Preprocessing(spacing=(4.0, 4.0, 4.0)))
        like = read_header(folder / "SUV.nii.gz")
        back = to_original(np.ones(image.shape[1:], np.float32), grid, like)
        truth = np.asarray(nib.load(folder / "SEG.nii.gz").dataobj) > 0
        assert (back[truth] == 1).all(), folder.name
