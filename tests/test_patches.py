"""patches.py: patches, their augmentation and the corruption of the CT, checked by hand."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from test_data import refused, same
from torch.utils.data import DataLoader, default_collate

from data import CachedCase
from kernels import voxel_shuffle
from patches import (
    Augmentation,
    PatchDataset,
    corrupt_ct,
    draw_augmentation,
    make_targets,
    random_stream,
    read_patch,
    read_region,
)

NO_AUGMENTATION = Augmentation(flip=0)
EVERYTHING = Augmentation(flip=0.5, rotate=0.7, scale=0.7, intensity=0.7)
LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


# --------------------------------------------------------------------------------------- helpers
def write_entry(folder, label, image=None, spacing=(1, 1, 1)) -> CachedCase:
    """Write a cache entry of these arrays; without `image`, both channels are the label."""
    label = np.asarray(label, np.uint8)
    image = np.stack([label, label]) if image is None else image
    foreground = np.argwhere(label > 0).astype(np.int16)
    folder.mkdir(parents=True)
    np.save(folder / "image.npy", np.asarray(image, np.float16))
    np.save(folder / "label.npy", label)
    np.save(folder / "foreground.npy", foreground)
    affine = np.diag((*spacing, 1))
    return CachedCase(folder.name, folder.name, folder, bool(label.any()), affine, None)


def numbered(*shape, layout=torch.contiguous_format) -> torch.Tensor:
    """A tensor whose voxels are 0, 1, 2, ...: each shows where it comes from."""
    numbers = torch.arange(float(np.prod(shape))).reshape(shape)
    return numbers.contiguous(memory_format=layout)


def crop(array, start, size):
    return array[tuple(slice(a, a + n) for a, n in zip(start, size))]


def draw(n: int, **options) -> dict:
    """The n-th draw of an augmentation without flips, except for `options`."""
    return draw_augmentation(random_stream(n), Augmentation(**{"flip": 0, **options}))


# -------------------------------------------------------------------------------------- data set
@pytest.fixture
def three_cases(tmp_path):
    """Two patients with tumor and one without; anisotropic, some axes shorter than 8 voxels."""
    rng = np.random.default_rng(1)
    cases = []
    for shape, density in (((14, 12, 10), 0.05), ((6, 20, 9), 0.02), ((8, 7, 30), 0)):
        label = rng.random(shape) < density
        image = rng.random((2, *shape))
        cases.append(write_entry(tmp_path / f"c{len(cases)}", label, image, (2, 2, 3)))
    assert [case.tumor for case in cases] == [True, True, False]
    return cases


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_an_item_depends_only_on_seed_and_index(three_cases):
    def dataset(seed=3, length=12):
        return PatchDataset(three_cases, (8, 8, 8), length, seed, EVERYTHING)

    items = [dataset()[n] for n in reversed(range(12))][::-1]
    batches = [default_collate(items[n : n + 2]) for n in range(0, 12, 2)]
    for workers in (0, 1, 3):
        assert same(list(DataLoader(dataset(), 2, num_workers=workers)), batches)
        resumed = DataLoader(dataset(), 2, sampler=range(6, 12), num_workers=workers)
        assert same(list(resumed), batches[3:])
    longer = dataset(length=10**6)
    assert same([longer[n] for n in range(12)], items)
    assert not any(same(dataset(seed=4)[n], items[n]) for n in range(12))
    assert len({int(item["key"]) for item in items}) == 12


def test_the_global_random_state_is_neither_read_nor_written(three_cases):
    dataset = PatchDataset(three_cases, (8, 8, 8), 9, 0, EVERYTHING)
    first = [dataset[n] for n in range(9)]
    numpy_state = np.random.mtrand._rand  # what np.random.seed and np.random.rand use
    for seed in (0, 1):
        numpy_state.seed(seed)
        torch.manual_seed(seed)
        before = numpy_state.get_state()[1].copy(), torch.get_rng_state()
        assert same([dataset[n] for n in range(9)], first)
        assert same((numpy_state.get_state()[1], torch.get_rng_state()), before)


def test_an_item_has_the_documented_shapes_and_types(three_cases):
    dataset = PatchDataset(three_cases, (8, 4, 6), 30, 0, EVERYTHING)
    expected = {
        "image": ((2, 8, 4, 6), torch.float32),
        "label": ((1, 8, 4, 6), torch.uint8),
        "tumor": ((), torch.float32),
        "key": ((), torch.int64),
    }
    for n in range(30):
        item = dataset[n]
        assert {k: (tuple(v.shape), v.dtype) for k, v in item.items()} == expected
        assert item["tumor"] == float(item["label"].any()) and item["key"] >= 0
        assert set(item["label"].unique().tolist()) <= {0, 1}


def test_iterating_over_a_data_set_ends_at_its_length(three_cases):
    dataset = PatchDataset(three_cases, (2, 2, 2), 5)
    assert len(dataset) == 5 and len(list(itertools.islice(dataset, 8))) == 5


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts files in Linux's /proc")
def test_many_cases_do_not_keep_many_files_open(tmp_path):
    """A map holds a file descriptor: 1014 studies with 3 arrays exceed the usual limit of 1024."""
    label = np.eye(4)[None].repeat(4, 0)
    cases = [write_entry(tmp_path / f"c{i}", label) for i in range(60)]
    before = len(os.listdir("/proc/self/fd"))
    dataset = PatchDataset(cases, (2, 2, 2), 60)
    for n in range(60):
        dataset[n]
    assert len(os.listdir("/proc/self/fd")) - before < 60


@pytest.mark.parametrize("patches_per_case", [1, 4])
def test_every_cycle_visits_each_case_once_in_a_new_order(tmp_path, patches_per_case):
    zeros = np.zeros((3, 3, 3))
    cases = []
    for i in range(7):
        cases.append(write_entry(tmp_path / f"c{i}", zeros, np.full((2, 3, 3, 3), i)))
    length = 5 * 7 * patches_per_case
    dataset = PatchDataset(
        cases, (2, 2, 2), length, 0, NO_AUGMENTATION, patches_per_case=patches_per_case
    )
    visits = np.array([int(dataset[n]["image"][0, 0, 0, 0]) for n in range(length)])
    visits = visits.reshape(5, 7, patches_per_case)  # cycles, cases, patches
    assert (visits == visits[:, :, :1]).all()  # the patches of a case follow one another
    assert (np.sort(visits[:, :, 0], axis=1) == np.arange(7)).all()
    assert len({tuple(order) for order in visits[:, :, 0]}) == 5


def test_two_of_three_patches_hold_tumor(tmp_path):
    label = np.zeros((40, 40, 40))
    label[20, 31, 3] = 1  # 1 in 2,000 of the other patches of 3^3 voxels holds this voxel too
    dataset = PatchDataset([write_entry(tmp_path / "c", label)], (3, 3, 3), 300, 0)
    fraction = np.mean([float(dataset[n]["tumor"]) for n in range(300)])
    assert fraction == pytest.approx(2 / 3, abs=0.08)  # 3 standard errors


@pytest.mark.parametrize("fraction", [0, 1])
def test_the_center_of_a_patch_is_tumor_or_not_as_drawn(tmp_path, fraction):
    label = np.random.default_rng(0).random((9, 9, 9)) < 0.5
    case = write_entry(tmp_path / "c", label)
    dataset = PatchDataset([case], (1, 1, 1), 100, 0, NO_AUGMENTATION, foreground_fraction=fraction)
    assert {int(dataset[n]["label"]) for n in range(100)} == {fraction}


def test_positive_patches_without_rotation_always_hold_tumor(three_cases):
    aug = Augmentation(intensity=1)
    dataset = PatchDataset(three_cases[:2], (5, 8, 3), 100, 0, aug, foreground_fraction=1)
    assert all(dataset[n]["tumor"] for n in range(100))


def test_a_patch_may_be_one_voxel_thick(tmp_path):
    label = np.random.default_rng(0).random((9, 9, 9)) < 0.1
    case = write_entry(tmp_path / "c", label)
    for patch in ((1, 8, 8), (8, 8, 1), (1, 1, 1)):
        dataset = PatchDataset([case], patch, 20, 0, EVERYTHING)
        assert all(dataset[n]["image"].shape == (2, *patch) for n in range(20))


def test_all_tumor_voxels_are_drawn_with_equal_probability(tmp_path):
    label = np.zeros((6, 6, 6))
    label[[0, 0, 5, 2], [0, 5, 5, 3], [0, 1, 5, 4]] = 1  # two of them in corners
    image = np.arange(216).reshape(6, 6, 6)
    case = write_entry(tmp_path / "c", label, np.stack([image, image]))
    dataset = PatchDataset([case], (1, 1, 1), 400, 0, NO_AUGMENTATION, foreground_fraction=1)
    drawn = [int(dataset[n]["image"][0]) for n in range(400)]
    voxels, count = np.unique(drawn, return_counts=True)
    assert voxels.tolist() == [0, 31, 2 * 36 + 3 * 6 + 4, 215]
    assert 65 < count.min() and count.max() < 135  # 100 each, standard deviation 8.7


@pytest.mark.parametrize("value", [0, 1])
def test_patients_without_tumor_and_patients_full_of_tumor_give_patches(tmp_path, value):
    case = write_entry(tmp_path / "c", np.full((5, 5, 5), value))
    dataset = PatchDataset([case], (3, 3, 3), 20)
    assert {float(dataset[n]["tumor"]) for n in range(20)} == {float(value)}


# ------------------------------------------------------------------------------ crop and padding
def read(case, center, size, **params):
    """Read a patch without augmentation, except for `params`."""
    neutral = {
        "matrix": np.eye(3),
        "flip": [],
        "gain": np.ones(2),
        "shift": np.zeros(2),
        "gamma": np.ones(2),
    }
    return read_patch(case, center, size, neutral | params)


def test_without_augmentation_a_patch_is_an_exact_crop_around_its_center(tmp_path):
    shape = np.array((12, 13, 11))
    numbers = np.arange(shape.prod()).reshape(shape)  # below 2048: exact in float16
    label = np.random.default_rng(0).integers(0, 3, shape)
    case = write_entry(tmp_path / "c", label, np.stack([numbers, -numbers]))
    for seed in range(60):
        rng = np.random.default_rng(seed)
        size = rng.integers(1, 11, 3)
        center = rng.integers(0, shape)
        image, part = read(case, center, size)
        start = np.clip(center - size // 2, 0, shape - size)  # moved if it would leave the volume
        expected = crop(numbers, start, size)
        assert same(image, np.stack([expected, -expected]).astype(np.float32))
        assert same(part, crop(label, start, size).astype(np.uint8))
        assert image.flags.c_contiguous and part.flags.c_contiguous


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 20, 7), (9, 9, 3), (1, 1, 1), (8, 9, 10)])
def test_a_volume_smaller_than_the_patch_is_centered_in_zeros(tmp_path, shape):
    size = np.array((8, 9, 11))
    rng = np.random.default_rng(0)
    numbers = 1 + np.arange(np.prod(shape)).reshape(shape)
    case = write_entry(tmp_path / "c", np.ones(shape), np.stack([numbers, -numbers]))
    for _ in range(20):
        image, label = read(case, rng.integers(0, shape), size)
        box = ndimage.find_objects(label)[0]
        for n, patch, part in zip(shape, size, box):
            before, after = part.start, patch - part.stop
            if n <= patch:  # all of it is there
                assert before + n + after == patch and abs(before - after) <= 1
            else:
                assert before == after == 0
        inside = image[(0, *box)]
        start = np.unravel_index(int(inside[0, 0, 0]) - 1, shape)
        assert np.array_equal(inside, crop(numbers, start, inside.shape))
        assert np.array_equal(image[1], -image[0]) and np.array_equal(image[0] > 0, label > 0)


@pytest.mark.parametrize(
    "start,size,expected",
    [
        (-2, 4, [0, 0, 1, 2]),
        (3, 4, [4, 5, 0, 0]),
        (-1, 7, [0, 1, 2, 3, 4, 5, 0]),
        (7, 2, [0, 0]),
        (-9, 3, [0, 0, 0]),
    ],
)
def test_read_region_is_zero_outside_the_volume(start, size, expected):
    line = np.arange(1, 6).reshape(1, 1, 5)
    assert read_region(line, (0, 0, start), (1, 1, size)).ravel().tolist() == expected


# ---------------------------------------------------------------------------------- augmentation
@pytest.mark.parametrize("axes", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_flips_move_image_and_label_together(tmp_path, axes):
    label = np.arange(24).reshape(2, 3, 4)
    case = write_entry(tmp_path / "c", label)
    image, part = read(case, (1, 1, 1), (2, 3, 4), flip=list(axes))
    expected = label
    for axis in axes:
        reverse = np.arange(label.shape[axis])[::-1]
        expected = np.take(expected, reverse, axis)
    assert np.array_equal(part, expected)
    assert np.array_equal(image, np.stack([expected, expected]))


def test_each_axis_is_flipped_independently_with_probability_one_half():
    flips = [tuple(draw(n, flip=0.5)["flip"]) for n in range(1600)]
    counts = [flips.count(flip) for flip in set(flips)]
    assert len(counts) == 8
    assert 140 < min(counts) and max(counts) < 260  # 200 each, standard deviation 13


@pytest.mark.parametrize("seed", range(12))
def test_rotation_and_scaling_move_image_and_label_together(tmp_path, seed):
    """The label is 1 where the image, a ramp, is 20 or more: after resampling, above 19.5."""
    ramps = np.indices((40, 40, 40))
    axis = seed % 3
    image = np.stack([ramps[axis], ramps[axis - 1]])
    case = write_entry(tmp_path / "c", ramps[axis] >= 20, image, (1, 1.5, 2))
    params = draw(seed, flip=0.5, rotate=1, scale=1)
    image, label = read_patch(case, (20, 20, 20), (12, 11, 10), params)
    clear = np.abs(image[0] - 19.5) > 1e-3
    assert clear.mean() > 0.9 and 0.1 < label.mean() < 0.9
    assert np.array_equal((image[0] > 19.5)[clear], label.astype(bool)[clear])


PATCH = np.array((9, 10, 11))


def measured_map(folder, params, spacing) -> tuple[np.ndarray, np.ndarray]:
    """The map from positions in the patch to positions in the volume, from patches of ramps.

    Returns the matrix (3, 3), in mm, and the voxel of the volume at the center of the patch.
    """
    ramps = np.indices((48, 48, 48))
    source = []
    for axis in range(3):
        image = ramps[[axis, axis]]
        case = write_entry(folder / f"axis{axis}", np.zeros((48, 48, 48)), image, spacing)
        source.append(read_patch(case, (24, 24, 24), PATCH, params)[0][0])
    source = np.stack(source)  # (3, *PATCH): the voxel that each voxel of the patch shows
    steps = [np.diff(source, axis=axis + 1).mean((1, 2, 3)) for axis in range(3)]
    matrix = np.stack(steps, axis=1)
    center = source.mean((1, 2, 3))
    offsets = np.indices(PATCH) - np.reshape((PATCH - 1) / 2, (3, 1, 1, 1))
    affine = np.einsum("ij,jabc->iabc", matrix, offsets) + center.reshape(3, 1, 1, 1)
    assert np.allclose(source, affine, atol=2e-3)
    return np.diag(spacing) @ matrix @ np.diag(1 / np.array(spacing)), center


@pytest.mark.parametrize("spacing", [(1, 1, 1), (1, 2, 3)])
def test_a_rotation_is_rigid_in_mm_and_about_the_center_of_the_patch(tmp_path, spacing):
    axes = set()
    for seed in range(12):
        params = draw(seed, rotate=1)
        rotation, center = measured_map(tmp_path / f"{seed}", params, spacing)
        assert np.allclose(rotation @ rotation.T, np.eye(3), atol=2e-3)
        assert np.linalg.det(rotation) == pytest.approx(1, abs=2e-3)
        assert np.degrees(np.arccos((np.trace(rotation) - 1) / 2)) <= 30.1
        assert np.allclose(center, 24 - PATCH // 2 + (PATCH - 1) / 2, atol=2e-3)
        (axis,) = np.flatnonzero(np.isclose(np.diag(rotation), 1, atol=1e-4))
        axes.add(int(axis))
    assert axes == {0, 1, 2}


def test_scaling_is_equal_along_all_axes_and_by_at_most_a_fifth(tmp_path):
    zooms = []
    for seed in range(12):
        matrix, _ = measured_map(tmp_path / f"{seed}", draw(seed, scale=1), (1, 2, 3))
        assert np.allclose(matrix, matrix[0, 0] * np.eye(3), atol=2e-3)
        zooms.append(1 / matrix[0, 0])
    assert 0.8 <= min(zooms) < 0.92 and 1.08 < max(zooms) <= 1.2


def test_a_rotation_by_90_degrees_by_hand(tmp_path):
    """About axis 0, output (i, j, k) is input (i, -k, j), measured from the center."""
    rotation = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])
    label = np.random.default_rng(0).integers(0, 3, (5, 7, 7))
    case = write_entry(tmp_path / "c", label, spacing=(2, 1, 1))
    image, part = read(case, (2, 3, 3), (5, 7, 7), matrix=rotation)
    j, k = np.mgrid[:7, :7]
    expected = label[:, 6 - k, j]
    assert np.array_equal(part, expected) and np.allclose(image[0], expected, atol=1e-5)


def test_the_spatial_augmentation_has_the_given_probabilities_and_ranges():
    draws = [draw(n, rotate=0.2, scale=0.2, zoom=0.2) for n in range(2000)]
    matrix = np.array([params["matrix"] for params in draws])
    scale = np.cbrt(np.linalg.det(matrix))
    rotation = matrix / scale[:, None, None]
    rotated = np.abs(rotation - np.eye(3)).max((1, 2)) > 1e-9
    scaled = np.abs(scale - 1) > 1e-9
    assert rotated.mean() == pytest.approx(0.2, abs=0.03)
    assert scaled.mean() == pytest.approx(0.2, abs=0.03)
    zoom = 1 / scale  # a patch shows 1 / zoom times its size
    assert 0.8 <= zoom.min() < 0.81 and 1.19 < zoom.max() <= 1.2


def test_the_intensity_augmentation_has_the_given_probabilities_and_ranges():
    draws = [draw(n, intensity=0.3, contrast=0.1) for n in range(2000)]
    gain, shift = (np.array([params[key] for params in draws]) for key in ("gain", "shift"))
    for values, neutral in ((gain, 1), (shift, 0)):
        assert (values != neutral).mean(0) == pytest.approx([0.3, 0.3], abs=0.03)
        assert 0.09 < np.abs(values - neutral).max() <= 0.1
    both = (gain[:, 0] != 1) & (gain[:, 1] != 1)
    assert both.mean() == pytest.approx(0.09, abs=0.02)  # the channels are independent
    assert all((params["gamma"] == 1).all() for params in draws)


def test_gamma_has_the_given_probability_and_range():
    gamma = np.array([draw(n, gamma=0.3)["gamma"] for n in range(2000)])
    assert (gamma != 1).mean(0) == pytest.approx([0.3, 0.3], abs=0.03)
    assert 0.5 <= gamma.min() < 0.51 and 1.97 < gamma.max() <= 2


def test_switching_one_part_off_does_not_change_the_others():
    for n in range(50):
        everything = draw(n, flip=0.5, rotate=1, scale=0.5, intensity=1, gamma=0.5)
        no_flip = draw(n, flip=0, rotate=1, scale=0.5, intensity=1, gamma=0.5)
        no_space = draw(n, flip=0.5, rotate=0, scale=0, intensity=1, gamma=0.5)
        no_intensity = draw(n, flip=0.5, rotate=1, scale=0.5, intensity=0, gamma=0)
        for key in ("matrix", "gain", "shift", "gamma"):
            assert same(everything[key], no_flip[key])
        for key in ("gain", "shift", "gamma"):
            assert same(everything[key], no_space[key])
        assert same(everything["matrix"], no_intensity["matrix"])
        assert everything["flip"] == no_space["flip"] == no_intensity["flip"]
        assert no_flip["flip"] == [] and np.allclose(no_space["matrix"], np.eye(3))


def test_intensity_changes_by_hand(tmp_path):
    label = np.eye(3)[None].repeat(3, 0)
    case = write_entry(tmp_path / "c", label, np.full((2, 3, 3, 3), 0.5))
    change = dict(gain=np.array((1.5, 0.5)), shift=np.array((0.25, -0.25)))
    image, part = read(case, (1, 1, 1), (3, 3, 3), **change)
    assert (image[0] == 1).all() and (image[1] == 0).all()  # 0.5 x 1.5 + 0.25, 0.5 x 0.5 - 0.25
    assert np.array_equal(part, label)
    case = write_entry(tmp_path / "d", label, np.full((2, 3, 3, 3), -0.25))
    image, _ = read(case, (1, 1, 1), (3, 3, 3), gamma=np.array((0.5, 2.0)))
    assert (image[0] == -0.5).all() and (image[1] == -0.0625).all()  # the sign is kept


# --------------------------------------------------------------------------------------- targets
def test_petct_targets_by_hand():
    image = numbered(1, 2, 2, 2, 2)
    label = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1]).reshape(1, 1, 2, 2, 2)
    batch = {"image": image, "label": label, "tumor": torch.ones(1), "key": torch.ones(1)}
    targets = make_targets(batch, "petct")
    assert same({key: targets[key] for key in batch}, batch)
    assert same(targets["seg"], label)
    assert same(targets["ct"], torch.arange(8.0).reshape(1, 1, 2, 2, 2))
    assert same(targets["pet"], torch.arange(8.0, 16.0).reshape(1, 1, 2, 2, 2))


def test_brain_targets_by_hand():
    label = torch.tensor([0, 1, 2, 0, 1, 1, 2, 2]).reshape(1, 1, 2, 2, 2)
    targets = make_targets({"image": numbered(1, 2, 2, 2, 2), "label": label}, "brain")
    by_hand = {
        "edema": [0, 1, 0, 0, 1, 1, 0, 0],
        "core": [0, 0, 1, 0, 0, 0, 1, 1],
        "whole": [0, 1, 1, 0, 1, 1, 1, 1],
    }
    for name, values in by_hand.items():
        expected = torch.tensor(values, dtype=torch.uint8).reshape(1, 1, 2, 2, 2)
        assert same(targets[name], expected)


# ------------------------------------------------------------------------------------ corruption
KEYS = torch.tensor([5, 2**61 + 5, 7, 5])  # they differ in their high or in their low bits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["none", "noise", "shuffle"])
def test_corruption_keeps_the_pet_the_input_and_the_layout(how, layout):
    x = numbered(4, 2, 9, 8, 7, layout=layout)
    before = x.clone()
    y = corrupt_ct(x, how, KEYS, size=5, cubes=2)
    assert same(x, before) and same(y[:, 1], x[:, 1])
    assert y.dtype == x.dtype and y.stride() == x.stride()
    assert torch.equal(y[:, 0], x[:, 0]) == (how == "none")


@pytest.mark.parametrize("how", ["noise", "shuffle"])
def test_the_corruption_of_a_sample_depends_only_on_its_key(how):
    x = numbered(1, 2, 9, 9, 9).repeat(4, 1, 1, 1, 1)
    y = corrupt_ct(x, how, KEYS, 6, 2)
    assert same(y, corrupt_ct(x, how, KEYS, 6, 2))
    for i in range(4):
        assert same(y[i : i + 1], corrupt_ct(x[i : i + 1], how, KEYS[i : i + 1], 6, 2))
    assert same(y.flip(0), corrupt_ct(x, how, KEYS.flip(0), 6, 2))
    assert same(y[0], y[3])
    assert not same(y[0], y[1]) and not same(y[0], y[2])


@pytest.mark.parametrize("size,cubes", [(3, 2), (99, 1)])
def test_the_loader_draws_the_corners_that_the_corruption_would_draw(three_cases, size, cubes):
    data = PatchDataset(three_cases, (8, 6, 10), 2, cubes=(size, cubes))
    batch = torch.utils.data.default_collate([data[0], data[1]])
    assert batch["corners"].shape == (2, cubes, 3) and batch["corners"].dtype == torch.int64
    drawn = corrupt_ct(batch["image"], "shuffle", batch["key"], size, cubes)
    given = corrupt_ct(batch["image"], "shuffle", batch["key"], size, corners=batch["corners"])
    assert torch.equal(given, drawn) and not torch.equal(given, batch["image"])


def test_noise_is_gaussian_with_the_given_standard_deviation():
    x = torch.zeros(4, 2, 32, 32, 32)
    for sigma in (0.3, 0.05):
        noise = corrupt_ct(x, "noise", torch.arange(4), sigma=sigma)[:, 0] / sigma
        noise = noise.flatten(1)  # (4, 32^3)
        assert noise.mean(1).abs().max() < 0.025  # 4 standard errors, as the next
        assert (noise.std(1) - 1).abs().max() < 0.02
        within = (noise.abs() < 1).float().mean().item()
        assert within == pytest.approx(0.6827, abs=0.005)
        assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.025
    assert same(corrupt_ct(x, "noise", torch.arange(4), sigma=0.0), x)


@pytest.mark.parametrize("size,cubes", [(3, 1), (8, 1), (5, 3), (16, 1)])
def test_shuffling_moves_voxels_only_inside_its_cubes(size, cubes):
    x = numbered(1, 2, 20, 18, 22)
    before = x[0, 0]
    for key in range(15):
        after = corrupt_ct(x, "shuffle", torch.tensor([key]), size, cubes)[0, 0]
        moved = before != after
        assert same(after.flatten().sort().values, before.flatten())
        assert 0 < moved.sum() <= cubes * size**3
        if cubes == 1:
            box = ndimage.find_objects(moved.numpy().astype(int))[0]
            assert all(side.stop - side.start <= size for side in box)
            assert moved.sum() > 0.7 * size**3
            assert same(after[box].flatten().sort().values, before[box].flatten().sort().values)


def test_cubes_reach_every_corner_of_the_patch():
    x = numbered(1, 2, 6, 5, 7)
    reached = torch.zeros(6, 5, 7, dtype=torch.bool)
    for n in range(200):  # only the high half of the key varies
        reached |= (corrupt_ct(x, "shuffle", torch.tensor([n << 33]), 4) != x)[0, 0]
    assert reached.all()


@pytest.mark.parametrize("shape", [(4, 6, 5), (16, 3, 16), (1, 8, 8), (16, 16, 16)])
def test_a_cube_larger_than_the_patch_is_reduced_to_fit(shape):
    x = numbered(2, 2, *shape)
    y = corrupt_ct(x, "shuffle", torch.tensor([1, 2]), size=32)
    assert same(y[:, 0].flatten(1).sort().values, x[:, 0].flatten(1))
    moved = int((y != x).sum())
    assert moved <= 2 * min(shape) ** 3
    assert moved > 0 or min(shape) == 1


def test_an_unknown_corruption_is_an_error():
    with refused("blur", "noise", "shuffle"):
        corrupt_ct(torch.zeros(1, 2, 2, 2, 2), "blur", torch.zeros(1))


# ------------------------------------------------------------------------------- voxel shuffling
OVERLAPPING = torch.tensor(
    [[[0, 0, 0], [2, 1, 3], [4, 4, 2]], [[1, 0, 4], [1, 0, 4], [0, 4, 0]]]
)  # (2 samples, 3 cubes, 3)
ONE_CUBE = [[[0, 0, 0]]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_the_inverse_restores_every_voxel_of_overlapping_cubes(size, layout):
    side = size + 4
    x = numbered(2, 3, side, side, side, layout=layout)
    for seed in (0, -7, 2**62, torch.tensor([3, 2**40])):
        y = voxel_shuffle(x, OVERLAPPING, size, seed)
        assert y.stride() == x.stride()
        assert same(y.flatten(2).sort().values, x.flatten(2))
        assert same(voxel_shuffle(y, OVERLAPPING, size, seed, inverse=True), x)
        assert same(y, x) == (size == 1)
        assert same(y[:, 1] - y[:, 0], x[:, 1] - x[:, 0])  # one permutation for all channels


def shuffle_in_python(size: int, seed: int, cube: int) -> np.ndarray:
    """The formula of kernels/voxel_shuffle.py in Python's integers: (size, size, size, 3).

    The last axis holds the coordinates of the voxel that each voxel comes from.
    """
    word = 2**32 - 1

    def mix(h):
        h = ((h ^ h >> 16) * 0x85EBCA6B) & word
        h = ((h ^ h >> 13) * 0xC2B2AE35) & word
        return h ^ h >> 16

    low = mix(seed & word)
    high = mix(((seed >> 32) & word) ^ 0x5BD1E995)
    key = mix((low + high + 0x632BE5AB * (cube + 1)) & word)
    out = np.empty((size, size, size, 3), int)
    for voxel in itertools.product(range(size), repeat=3):
        ijk = list(voxel)
        for r, a in itertools.product(range(4), range(3)):
            p, q = ijk[(a + 1) % 3], ijk[(a + 2) % 3]
            ijk[a] = (ijk[a] + mix(mix((p * 0x9E3779B1 + q + key) & word) ^ (3 * r + a))) % size
        out[voxel] = ijk
    return out


@pytest.mark.parametrize("size,seed", [(2, 0), (3, 2**33 + 1), (5, -1), (7, 2**61 - 1)])
def test_the_permutation_is_the_documented_formula_to_the_last_bit(size, seed):
    x = numbered(1, 1, size, size, size)
    first = voxel_shuffle(x, ONE_CUBE, size, seed)
    i, j, k = np.moveaxis(shuffle_in_python(size, seed, cube=0), -1, 0)
    assert np.array_equal(first[0, 0], x[0, 0][i, j, k])
    second = voxel_shuffle(x, [[[0, 0, 0], [0, 0, 0]]], size, seed)
    i, j, k = np.moveaxis(shuffle_in_python(size, seed, cube=1), -1, 0)
    assert np.array_equal(second[0, 0], first[0, 0][i, j, k])


def test_an_integer_seed_counts_up_over_the_batch():
    x = numbered(1, 1, 7, 7, 7).repeat(3, 1, 1, 1, 1)
    corners = torch.ones(3, 1, 3, dtype=torch.int64)
    one_per_sample = voxel_shuffle(x, corners, 5, torch.tensor([11, 12, 13]))
    assert same(voxel_shuffle(x, corners, 5, 11), one_per_sample)


@pytest.mark.parametrize("size", [4, 5, 8])
def test_the_permutation_has_the_statistics_of_a_random_one(size):
    """Of n = size^3 voxels, a random permutation leaves 1 in its place on average, variance 1.

    Along an axis of s voxels the mean distance of a move is (s^2 - 1) / (3 s). Of the n (n - 1)
    ordered pairs of voxels, 6 s^2 (s - 1) are neighbors, so this is the share of neighbors that
    are neighbors again.
    """
    n, keys = size**3, 400
    x = numbered(1, 1, size, size, size).repeat(keys, 1, 1, 1, 1)
    corners = torch.zeros(keys, 1, 3, dtype=torch.int64)
    source = voxel_shuffle(x, corners, size, 0).reshape(keys, n).long().numpy()
    fixed = (source == np.arange(n)).sum(1)
    assert fixed.mean() == pytest.approx(1, abs=0.2)  # 4 standard errors, as the next
    assert fixed.var() == pytest.approx(1, abs=0.35)
    places = np.array(np.unravel_index(np.arange(n), (size,) * 3))  # (3, n)
    sources = np.array(np.unravel_index(source, (size,) * 3))  # (3, keys, n)
    distance = np.abs(sources - places[:, None]).mean((1, 2))
    assert distance == pytest.approx([(size**2 - 1) / (3 * size)] * 3, rel=0.02)
    neighbors = (np.abs(np.diff(sources, axis=2)).sum(0) == 1).mean()
    assert neighbors == pytest.approx(6 * size**2 * (size - 1) / (n * (n - 1)), rel=0.1)
    for voxel in (0, -1):  # it comes from everywhere with equal probability
        for quarter in (source[:, voxel] % 4, source[:, voxel] // (n // 4) % 4):
            counts = np.bincount(quarter, minlength=4)
            assert 60 < counts.min() and counts.max() < 145  # 100 each


@pytest.mark.parametrize(
    "corners,size,words",
    [
        ([[[0, 0, 3]]], 3, "inside the volume"),
        ([[[-1, 0, 0]]], 3, "inside the volume"),
        (ONE_CUBE, 6, "inside the volume"),
        (ONE_CUBE, 0, "inside the volume"),
        ([[0, 0, 0]], 3, "expected"),
        ([[[0, 0]]], 3, "expected"),
        (ONE_CUBE * 2, 3, "expected"),
    ],
)
def test_cubes_outside_the_volume_or_of_a_wrong_shape_are_an_error(corners, size, words):
    with pytest.raises(ValueError, match=words):
        voxel_shuffle(torch.zeros(1, 1, 5, 5, 5), torch.tensor(corners), size, 0)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (2, 1, 3)])
@pytest.mark.parametrize("flip", [0, 0.5])
def test_a_rotated_patch_is_that_of_scipy_in_float64(tmp_path, spacing, flip):
    """SciPy's trilinear interpolation in float64; ours is in float32, plane by plane."""
    rng = np.random.default_rng(0)
    image = rng.random((2, 21, 19, 23)).astype(np.float16)
    case = write_entry(tmp_path / "c", rng.integers(0, 3, image.shape[1:]), image, spacing)
    for n in range(12):
        params = draw(n, rotate=1, scale=n % 2, flip=flip)
        center, size = rng.integers(0, image.shape[1:]), np.array((12, 10, 9 + n % 3))
        patch, part = read_patch(case, center, size, params)
        start = np.clip(center - size // 2, 0, np.array(image.shape[1:]) - size)
        matrix = np.diag(1 / np.array(spacing)) @ params["matrix"] @ np.diag(spacing)
        offset = start + (size - 1) / 2 - matrix @ ((size - 1) / 2) + 20  # 20 voxels of padding
        expected = []
        for volume, order in ((image[0], 1), (image[1], 1), (case.array("label"), 0)):
            padded = np.pad(volume, 20).astype(np.float64)
            turned = ndimage.affine_transform(padded, matrix, offset, tuple(size), order=order)
            expected.append(np.flip(turned, params["flip"]))
        assert np.abs(patch - expected[:2]).max() < 2e-6
        assert np.array_equal(part, expected[2])
        assert patch.dtype == np.float32 and patch.flags.c_contiguous and part.flags.c_contiguous
