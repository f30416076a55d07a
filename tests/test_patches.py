"""patches.py: patches, their augmentation and the corruption of the CT, checked by hand."""

import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine
from scipy import ndimage
from test_data import refused, same
from torch.utils.data import DataLoader

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

STILL = Augmentation(flip=0)  # no augmentation at all
EVERYTHING = Augmentation(flip=0.5, rotate=0.7, scale=0.7, intensity=0.7)


# helpers
def entry(folder, label, image=None, spacing=(1, 1, 1)) -> CachedCase:
    """A cache entry that holds just these arrays; without `image`, both channels are the label."""
    label = np.asarray(label, np.uint8)
    arrays = {"label": label, "foreground": np.argwhere(label > 0).astype(np.int16)}
    arrays["image"] = np.asarray(np.stack([label, label]) if image is None else image, np.float16)
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return CachedCase(
        folder.name, folder.name, folder, bool(label.any()), np.diag((*spacing, 1)), None
    )


def ramps(shape) -> np.ndarray:
    return np.indices(shape).astype(np.float32)


# ------------------------------------------------------------------------------------------ patches
@pytest.fixture
def three(tmp_path):
    """Two ill patients and a healthy one, of different shapes, smaller than a patch of 8 in places; anisotropic."""
    rng = np.random.default_rng(1)
    shapes = ((14, 12, 10), (6, 20, 9), (8, 7, 30))
    labels = [rng.random(s) < p for s, p in zip(shapes, (0.05, 0.02, 0))]
    return [
        entry(tmp_path / f"c{i}", x, rng.random((2, *x.shape)), (2, 2, 3))
        for i, x in enumerate(labels)
    ]


@pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="counts open files through Linux's /proc"
)
def test_many_cases_do_not_hold_many_files_open(tmp_path):
    """Every map keeps a file descriptor: 1014 studies x 3 arrays are more than the usual limit of 1024 files a process."""
    cases = [entry(tmp_path / f"c{i}", np.eye(4)[None].repeat(4, 0)) for i in range(60)]
    before = len(os.listdir("/proc/self/fd"))
    items = PatchDataset(cases, (2, 2, 2), 60)
    for n in range(60):
        items[n]
    assert len(os.listdir("/proc/self/fd")) - before < 60


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of two cores
def test_item_n_is_a_function_of_seed_and_n_whatever_the_workers_and_the_start(three):
    make = lambda seed=3: PatchDataset(three, (8, 8, 8), 12, seed, EVERYTHING)  # noqa: E731
    batch = lambda items: {k: torch.stack([i[k] for i in items]) for k in items[0]}  # noqa: E731
    backwards = [make()[n] for n in reversed(range(12))][::-1]
    expected = [batch(backwards[n : n + 2]) for n in range(0, 12, 2)]
    for workers in (0, 1, 3):
        assert same(list(DataLoader(make(), 2, num_workers=workers)), expected)
        assert same(
            list(DataLoader(make(), 2, sampler=range(6, 12), num_workers=workers)), expected[3:]
        )  # a resumed run
    assert same(
        [PatchDataset(three, (8, 8, 8), 10**6, 3, EVERYTHING)[n] for n in range(12)], backwards
    )  # a longer run
    assert not any(same(make(4)[n], backwards[n]) for n in range(12))
    assert len({int(i["key"]) for i in backwards}) == 12


def test_the_global_random_state_is_neither_read_nor_written(three):
    items = PatchDataset(three, (8, 8, 8), 9, 0, EVERYTHING)
    first = [items[n] for n in range(9)]
    for seed in (0, 1):
        np.random.seed(seed), torch.manual_seed(seed)  # noqa: NPY002 (the legacy state is what must stay as it is)
        states = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
        assert same([items[n] for n in range(9)], first)
        assert same((np.random.get_state()[1], torch.get_rng_state()), states)  # noqa: NPY002


def test_an_item_has_the_promised_shapes_and_types(three):
    for n, item in enumerate(
        PatchDataset(three, (8, 4, 6), 30, 0, EVERYTHING)[n] for n in range(30)
    ):
        assert {k: (tuple(v.shape), v.dtype) for k, v in item.items()} == {
            "image": ((2, 8, 4, 6), torch.float32), "label": ((1, 8, 4, 6), torch.int64),
            "tumor": ((), torch.float32), "key": ((), torch.int64),
        }, n  # fmt: skip
        assert item["tumor"] == bool(item["label"].any()) and item["key"] >= 0
        assert set(item["label"].unique().tolist()) <= {0, 1}


def test_iterating_over_a_dataset_ends_at_its_length(three):
    items = PatchDataset(three, (2, 2, 2), 5)
    assert len(items) == 5 and len(list(itertools.islice(items, 8))) == 5


@pytest.mark.parametrize("patches_per_case", [1, 4])
def test_each_round_visits_every_case_once_in_a_new_order(tmp_path, patches_per_case):
    cases = [
        entry(tmp_path / f"c{i}", np.zeros((3, 3, 3)), np.full((2, 3, 3, 3), i)) for i in range(7)
    ]
    items = PatchDataset(
        cases, (2, 2, 2), 7 * 5 * patches_per_case, 0, STILL, patches_per_case=patches_per_case
    )
    visits = np.array([int(items[n]["image"][0, 0, 0, 0]) for n in range(len(items))]).reshape(
        5, 7, patches_per_case
    )
    assert (visits == visits[:, :, :1]).all()  # the patches of a case follow one another
    assert (np.sort(visits[:, :, 0], axis=1) == np.arange(7)).all()
    assert len({tuple(v) for v in visits[:, :, 0]}) == 5


def test_two_of_three_patches_hold_tumor(tmp_path):
    label = np.zeros((40, 40, 40))
    label[20, 31, 3] = 1  # a negative patch of 3^3 meets this voxel once in 2,000 times
    items = PatchDataset([entry(tmp_path / "c", label)], (3, 3, 3), 2000, 0)
    assert np.mean([float(items[n]["tumor"]) for n in range(2000)]) == pytest.approx(
        2 / 3, abs=0.03
    )  # 3 standard deviations


@pytest.mark.parametrize("positive", [0, 1])
def test_a_patch_of_one_voxel_is_tumor_or_is_not(tmp_path, positive):
    case = entry(tmp_path / "c", np.random.default_rng(0).random((9, 9, 9)) < 0.5)
    items = PatchDataset([case], (1, 1, 1), 300, 0, STILL, foreground_fraction=positive)
    assert {int(items[n]["label"]) for n in range(300)} == {positive}


def test_positive_patches_without_rotation_always_hold_tumor(three):
    items = PatchDataset(
        three[:2], (5, 8, 3), 200, 0, Augmentation(intensity=1), foreground_fraction=1
    )
    assert all(items[n]["tumor"] for n in range(200))


def test_a_patch_may_be_a_slice_one_voxel_thick(tmp_path):
    case = entry(tmp_path / "c", np.random.default_rng(0).random((9, 9, 9)) < 0.1)
    for patch in ((1, 8, 8), (8, 8, 1), (1, 1, 1)):
        items = PatchDataset([case], patch, 20, 0, EVERYTHING)
        assert all(items[n]["image"].shape == (2, *patch) for n in range(20))


def test_tumor_voxels_are_all_drawn_with_equal_chance(tmp_path):
    label = np.zeros((6, 6, 6))
    label[[0, 0, 5, 2], [0, 5, 5, 3], [0, 1, 5, 4]] = 1  # corners too
    image = np.arange(216).reshape(6, 6, 6)
    items = PatchDataset(
        [entry(tmp_path / "c", label, np.stack([image, image]))],
        (1, 1, 1),
        1200,
        0,
        STILL,
        foreground_fraction=1,
    )
    drawn, count = np.unique([int(items[n]["image"][0]) for n in range(1200)], return_counts=True)
    assert (
        drawn.tolist() == [0, 31, 2 * 36 + 3 * 6 + 4, 215] and count.min() > 240
    )  # 300 each, sd 15


def test_healthy_patients_and_patients_that_are_all_tumor_give_patches(tmp_path):
    for value, name in enumerate(("healthy", "all")):
        items = PatchDataset([entry(tmp_path / name, np.full((5, 5, 5), value))], (3, 3, 3), 20)
        assert {float(items[n]["tumor"]) for n in range(20)} == {float(value)}


# --------------------------------------------------------------------------------- crop and padding
def read(case, centre, size, **params):
    still = {
        "matrix": np.eye(3),
        "flip": [],
        "gain": np.ones(2),
        "shift": np.zeros(2),
        "gamma": np.ones(2),
    }
    return read_patch(case, centre, size, still | params)


def test_without_augmentation_a_patch_is_an_exact_crop_around_its_centre(tmp_path):
    shape = np.array((12, 13, 11))
    serial = np.arange(shape.prod()).reshape(shape)  # below 2048: exact in float16
    label = np.random.default_rng(0).integers(0, 3, shape)
    case = entry(tmp_path / "c", label, np.stack([serial, -serial]))
    for seed in range(60):
        rng = np.random.default_rng(seed)
        size, centre = rng.integers(1, 11, 3), rng.integers(0, shape)
        image, part = read(case, centre, size)
        start = np.array(
            np.unravel_index(int(image[0, 0, 0, 0]), shape)
        )  # the voxels say where they are from
        box = tuple(slice(a, a + s) for a, s in zip(start, size))
        assert same(image, np.stack([serial[box], -serial[box]]).astype(np.float32)) and same(
            part, label[box].astype(np.uint8)
        )
        ideal = centre - size // 2
        assert np.array_equal(
            start, np.clip(ideal, 0, shape - size)
        )  # shifted only where it would leave the volume
        assert image.flags.c_contiguous and part.flags.c_contiguous


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 20, 7), (9, 9, 3), (1, 1, 1), (8, 9, 10)])
def test_a_volume_smaller_than_the_patch_is_centred_in_zeros_and_nothing_is_lost(tmp_path, shape):
    size, rng = np.array((8, 9, 11)), np.random.default_rng(0)
    serial = 1 + np.arange(np.prod(shape)).reshape(shape)
    case = entry(tmp_path / "c", np.ones(shape), np.stack([serial, -serial]))
    for _ in range(20):
        image, label = read(case, rng.integers(0, shape), size)
        box = ndimage.find_objects(label)[0]
        for axis, s in enumerate(box):
            if shape[axis] <= size[axis]:
                before, after = s.start, size[axis] - s.stop
                assert before + shape[axis] + after == size[axis] and abs(before - after) <= 1
            else:
                assert (s.start, s.stop) == (0, size[axis])  # filled
        inside = image[(0, *box)]
        start = np.unravel_index(int(inside[0, 0, 0]) - 1, shape)
        assert np.array_equal(
            inside, serial[tuple(slice(a, a + s) for a, s in zip(start, inside.shape))]
        )
        assert np.array_equal(image[1], -image[0]) and np.array_equal(image[0] > 0, label > 0)


def test_read_region_fills_what_lies_outside_with_zeros():
    line = np.arange(1, 6).reshape(1, 1, 5)
    cases = {
        (-2, 4): [0, 0, 1, 2],
        (3, 4): [4, 5, 0, 0],
        (-1, 7): [0, 1, 2, 3, 4, 5, 0],
        (7, 2): [0, 0],
        (-9, 3): [0, 0, 0],
    }
    for (start, size), expected in cases.items():
        assert read_region(line, (0, 0, start), (1, 1, size)).ravel().tolist() == expected


# ------------------------------------------------------------------------------------- augmentation
def test_flips_move_image_and_label_together_by_hand(tmp_path):
    label = np.arange(24).reshape(2, 3, 4)
    case = entry(tmp_path / "c", label)
    for flip in itertools.chain.from_iterable(
        itertools.combinations(range(3), n) for n in range(4)
    ):
        image, part = read(case, (1, 1, 1), (2, 3, 4), flip=list(flip))
        expected = label[tuple(slice(None, None, -1 if axis in flip else 1) for axis in range(3))]
        assert np.array_equal(part, expected) and np.array_equal(
            image, np.stack([expected, expected])
        )


def test_each_axis_is_flipped_half_of_the_time_on_its_own(three):
    flips = [
        tuple(draw_augmentation(random_stream(n), Augmentation())["flip"]) for n in range(1600)
    ]
    count = {f: flips.count(f) for f in set(flips)}
    assert len(count) == 8 and all(140 < c < 260 for c in count.values())  # 200 each, sd 13


@pytest.mark.parametrize("seed", range(12))
def test_rotation_and_scaling_move_image_and_label_together(tmp_path, seed):
    """The image is a ramp and the label its step at 20: wherever the ramp reads 19.5 or more, so does the label."""
    ramp = ramps((40, 40, 40))
    axis = seed % 3
    case = entry(
        tmp_path / "c", ramp[axis] >= 20, np.stack([ramp[axis], ramp[axis - 1]]), (1, 1.5, 2)
    )
    aug = Augmentation(rotate=1, scale=1)
    image, label = read_patch(
        case, (20, 20, 20), (12, 11, 10), draw_augmentation(random_stream(seed), aug)
    )
    clear = np.abs(image[0] - 19.5) > 1e-3
    assert clear.mean() > 0.9 and 0.1 < label.mean() < 0.9
    assert np.array_equal((image[0] > 19.5)[clear], label.astype(bool)[clear])


def jacobian(folder, params, spacing, size=(9, 10, 11)):
    """(3, 3) in mm: how the place that is read moves with the place in the patch; and the place read in its middle, in voxels."""
    ramp, columns = ramps((48, 48, 48)), []
    for axis in range(3):
        case = entry(folder / f"axis{axis}", np.zeros((48, 48, 48)), ramp[[axis, axis]], spacing)
        columns.append(read_patch(case, (24, 24, 24), size, params)[0][0])
    place = np.stack(columns)  # (3, *size): input voxel of each output voxel
    steps = np.stack([np.diff(place, axis=a + 1).mean((1, 2, 3)) for a in range(3)], 1)
    index = np.indices(size) - (np.reshape(size, (3, 1, 1, 1)) - 1) / 2
    middle = place.mean((1, 2, 3))
    assert np.allclose(
        place, np.einsum("ij,jabc->iabc", steps, index) + middle.reshape(3, 1, 1, 1), atol=2e-3
    )  # affine
    return np.diag(spacing) @ steps @ np.diag(1 / np.array(spacing)), middle


@pytest.mark.parametrize("spacing", [(1, 1, 1), (1, 2, 3)])
def test_a_rotation_is_one_of_millimetres_about_the_middle_of_the_patch(tmp_path, spacing):
    axes = set()
    for seed in range(12):
        params = draw_augmentation(random_stream(seed), Augmentation(flip=0, rotate=1))
        turn, middle = jacobian(tmp_path / f"{seed}", params, spacing)
        assert np.allclose(turn @ turn.T, np.eye(3), atol=2e-3) and np.linalg.det(
            turn
        ) == pytest.approx(1, abs=2e-3)
        assert np.degrees(np.arccos((np.trace(turn) - 1) / 2)) <= 30.1
        assert np.allclose(
            middle, 24 - np.array((9, 10, 11)) // 2 + (np.array((9, 10, 11)) - 1) / 2, atol=2e-3
        )
        (fixed,) = np.flatnonzero(np.isclose(np.diag(turn), 1, atol=1e-4))  # one axis stays
        axes.add(int(fixed))
    assert axes == {0, 1, 2}


def test_scaling_is_the_same_along_all_axes_and_within_a_fifth(tmp_path):
    zooms = []
    for seed in range(12):
        params = draw_augmentation(random_stream(seed), Augmentation(flip=0, scale=1))
        grow, _ = jacobian(tmp_path / f"{seed}", params, (1, 2, 3))
        assert np.allclose(grow, grow[0, 0] * np.eye(3), atol=2e-3)
        zooms.append(1 / grow[0, 0])
    assert 0.8 <= min(zooms) < 0.92 and 1.08 < max(zooms) <= 1.2


def test_a_quarter_turn_by_hand(tmp_path):
    """Reading at +90 degrees about axis 0: output (i, j, k) is input (i, -k, j) about the middle. Spacing 2, 1, 1: the same voxels."""
    rng, quarter = np.random.default_rng(0), np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])
    label = rng.integers(0, 3, (5, 7, 7))
    image, part = read(
        entry(tmp_path / "c", label, spacing=(2, 1, 1)), (2, 3, 3), (5, 7, 7), matrix=quarter
    )
    j, k = np.mgrid[:7, :7]
    expected = label[:, 6 - k, j]
    assert np.array_equal(part, expected) and np.allclose(image[0], expected, atol=1e-5)


def test_probabilities_and_ranges_of_the_augmentation():
    draws = [
        draw_augmentation(
            random_stream(n), Augmentation(0.5, (0, 1, 2), 0.2, 30, 0.2, 0.2, 0.3, 0.1)
        )
        for n in range(2000)
    ]
    matrix, gain, shift = (np.array([d[k] for d in draws]) for k in ("matrix", "gain", "shift"))
    scale = np.cbrt(np.linalg.det(matrix))
    turned = np.abs(matrix / scale[:, None, None] - np.eye(3)).max((1, 2)) > 1e-9
    assert turned.mean() == pytest.approx(0.2, abs=0.03) and (
        np.abs(scale - 1) > 1e-9
    ).mean() == pytest.approx(0.2, abs=0.03)
    assert (
        0.8 <= 1 / scale.max() < 0.81 and 1.19 < 1 / scale.min() <= 1.2
    )  # a patch reads 1 / zoom of its size
    for values, neutral in ((gain, 1), (shift, 0)):
        active = values != neutral
        assert active.mean(0) == pytest.approx([0.3, 0.3], abs=0.03)
        assert np.abs(values - neutral).max() <= 0.1 and np.abs(values - neutral).max() > 0.09
    assert ((gain[:, 0] != 1) & (gain[:, 1] != 1)).mean() == pytest.approx(
        0.09, abs=0.02
    )  # the channels on their own
    assert all((d["gamma"] == 1).all() for d in draws)
    gamma = np.array(
        [draw_augmentation(random_stream(n), Augmentation(gamma=0.3))["gamma"] for n in range(2000)]
    )
    assert (
        (gamma != 1).mean(0) == pytest.approx([0.3, 0.3], abs=0.03)
        and 0.5 <= gamma.min() < 0.51
        and 1.97 < gamma.max() <= 2
    )


def test_switching_one_part_off_leaves_the_others_as_they_are():
    for n in range(50):
        on = draw_augmentation(
            random_stream(n), Augmentation(0.5, (0, 1, 2), 1, 30, 0, 0.2, 1, 0.1)
        )
        no_flip = draw_augmentation(
            random_stream(n), Augmentation(0, (0, 1, 2), 1, 30, 0, 0.2, 1, 0.1)
        )
        no_turn = draw_augmentation(
            random_stream(n), Augmentation(0.5, (0, 1, 2), 0, 30, 0, 0.2, 1, 0.1)
        )
        assert same(
            [on[k] for k in ("matrix", "gain", "shift")],
            [no_flip[k] for k in ("matrix", "gain", "shift")],
        )
        assert (
            on["flip"] == no_turn["flip"]
            and same(on["gain"], no_turn["gain"])
            and np.allclose(no_turn["matrix"], np.eye(3))
        )


def test_intensities_by_hand(tmp_path):
    case = entry(tmp_path / "c", np.eye(3)[None].repeat(3, 0), np.full((2, 3, 3, 3), 0.5))
    image, label = read(
        case, (1, 1, 1), (3, 3, 3), gain=np.array((1.5, 0.5)), shift=np.array((0.25, -0.25))
    )
    assert (image[0] == 1).all() and (image[1] == 0).all()  # 0.5 x 1.5 + 0.25 and 0.5 x 0.5 - 0.25
    case = entry(tmp_path / "d", np.eye(3)[None].repeat(3, 0), np.full((2, 3, 3, 3), -0.25))
    bent = read(case, (1, 1, 1), (3, 3, 3), gamma=np.array((0.5, 2.0)))[0]
    assert (bent[0] == -0.5).all() and (bent[1] == -0.0625).all()  # the sign is kept
    assert np.array_equal(label, case.array("label"))


# ------------------------------------------------------------------------------------------ targets
def test_targets_by_hand():
    image, label = (
        torch.arange(16.0).reshape(1, 2, 2, 2, 2),
        torch.tensor([0, 1, 2, 0, 1, 1, 2, 2]).reshape(1, 1, 2, 2, 2),
    )
    batch = {
        "image": image,
        "label": (label > 0).long(),
        "tumor": torch.ones(1),
        "key": torch.ones(1),
    }
    made = make_targets(batch, "petct")
    assert same({k: made[k] for k in batch}, batch) and same(made["seg"], batch["label"])
    assert same(made["ct"], torch.arange(8.0).reshape(1, 1, 2, 2, 2)) and same(
        made["pet"], 8 + made["ct"]
    )
    made = make_targets(batch | {"label": label}, "brain")
    assert {k: made[k].flatten().tolist() for k in ("edema", "core", "whole")} == {
        "edema": [0, 1, 0, 0, 1, 1, 0, 0], "core": [0, 0, 1, 0, 0, 0, 1, 1], "whole": [0, 1, 1, 0, 1, 1, 1, 1],
    }  # fmt: skip
    assert all(
        made[k].shape == label.shape and made[k].dtype == torch.int64
        for k in ("edema", "core", "whole")
    )


# --------------------------------------------------------------------------------------- corruption
def serial(*shape, fmt=torch.contiguous_format) -> torch.Tensor:
    """Every voxel of a sample its own number, so that one can see where it went."""
    return torch.arange(float(np.prod(shape))).reshape(shape).contiguous(memory_format=fmt)


KEYS = torch.tensor([5, 2**61 + 5, 7, 5])


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("how", ["none", "noise", "shuffle"])
def test_corruption_leaves_pet_and_its_input_alone_and_keeps_the_layout(how, fmt):
    x = serial(4, 2, 9, 8, 7, fmt=fmt)
    before = x.clone()
    y = corrupt_ct(x, how, KEYS, size=5, cubes=2)
    assert same(x, before) and same(y[:, 1], x[:, 1])
    assert y.dtype == x.dtype and y.stride() == x.stride()
    assert (y[:, 0] == x[:, 0]).all() == (how == "none")


@pytest.mark.parametrize("how", ["noise", "shuffle"])
def test_a_samples_corruption_depends_on_its_key_alone(how):
    x = serial(1, 2, 9, 9, 9).repeat(4, 1, 1, 1, 1)
    y = corrupt_ct(x, how, KEYS, 6, 2)
    assert same(y, corrupt_ct(x, how, KEYS, 6, 2))
    for i in range(4):
        assert same(y[i : i + 1], corrupt_ct(x[i : i + 1], how, KEYS[i : i + 1], 6, 2))
    assert same(y.flip(0), corrupt_ct(x, how, KEYS.flip(0), 6, 2))
    assert (
        same(y[0], y[3]) and not same(y[0], y[1]) and not same(y[0], y[2])
    )  # keys that differ in high or low bits only


def test_noise_has_the_asked_for_deviation():
    x = torch.zeros(4, 2, 32, 32, 32)
    for sigma in (0.3, 0.05):
        noise = (corrupt_ct(x, "noise", torch.arange(4), sigma=sigma)[:, 0] / sigma).flatten(1)
        assert (
            noise.mean(1).abs().max() < 0.025 and (noise.std(1) - 1).abs().max() < 0.02
        )  # 4 standard errors each
        assert (noise.abs() < 1).float().mean().item() == pytest.approx(
            0.6827, abs=0.005
        )  # Gaussian
        assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.025
    assert same(corrupt_ct(x, "noise", torch.arange(4), sigma=0.0), x)


@pytest.mark.parametrize("size,cubes", [(3, 1), (8, 1), (5, 3), (16, 1)])
def test_shuffling_moves_voxels_only_inside_its_cubes(size, cubes):
    x = serial(1, 2, 20, 18, 22)
    for key in range(15):
        before, after = x[0, 0], corrupt_ct(x, "shuffle", torch.tensor([key]), size, cubes)[0, 0]
        moved = before != after
        assert same(after.flatten().sort().values, before.flatten())
        assert 0 < moved.sum() <= cubes * size**3
        if cubes == 1:
            box = ndimage.find_objects(moved.numpy().astype(int))[0]
            assert all(s.stop - s.start <= size for s in box) and moved.sum() > 0.7 * size**3
            assert same(after[box].flatten().sort().values, before[box].flatten().sort().values)


def test_cubes_reach_every_corner_of_the_patch():
    x, hit = serial(1, 2, 6, 5, 7), torch.zeros(6, 5, 7, dtype=bool)
    for n in range(200):  # the high half of a key counts too
        hit |= (corrupt_ct(x, "shuffle", torch.tensor([n << 33]), 4) != x)[0, 0]
    assert hit.all()


@pytest.mark.parametrize("shape", [(4, 6, 5), (16, 3, 16), (1, 8, 8), (16, 16, 16)])
def test_a_cube_larger_than_the_patch_is_made_to_fit(shape):
    x = serial(2, 2, *shape)
    y = corrupt_ct(x, "shuffle", torch.tensor([1, 2]), size=32)
    assert same(y[:, 0].flatten(1).sort().values, x[:, 0].flatten(1))
    assert (y != x).sum() <= 2 * min(shape) ** 3 and (min(shape) == 1 or not same(x, y))


def test_an_unknown_corruption_is_refused():
    with refused("blur", "noise", "shuffle"):
        corrupt_ct(torch.zeros(1, 2, 2, 2, 2), "blur", torch.zeros(1))


# ---------------------------------------------------------------------------------- voxel shuffling
CORNERS = torch.tensor(
    [[[0, 0, 0], [2, 1, 3], [4, 4, 2]], [[1, 0, 4], [1, 0, 4], [0, 4, 0]]]
)  # (2, 3, 3), overlapping


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 16])
def test_the_inverse_restores_every_voxel_even_of_overlapping_cubes(size, fmt):
    x = serial(2, 3, size + 4, size + 4, size + 4, fmt=fmt)
    for seed in (0, -7, 2**62, torch.tensor([3, 2**40])):
        y = voxel_shuffle(x, CORNERS, size, seed)
        assert y.stride() == x.stride() and same(y.flatten(2).sort().values, x.flatten(2))
        assert same(voxel_shuffle(y, CORNERS, size, seed, inverse=True), x)
        assert same(y, x) == (size == 1)
        assert same(
            y[:, 1] - y[:, 0], x[:, 1] - x[:, 0]
        )  # channels differ by a constant, and still do: one permutation


def python_shuffle(size: int, seed: int, cube: int) -> np.ndarray:
    """The file's formula in Python's own integers: the source coordinates of every voxel."""
    word = 2**32 - 1

    def mix(h):
        h = ((h ^ h >> 16) * 0x85EBCA6B) & word
        h = ((h ^ h >> 13) * 0xC2B2AE35) & word
        return h ^ h >> 16

    key = mix(
        (mix(seed & word) + mix(((seed >> 32) & word) ^ 0x5BD1E995) + 0x632BE5AB * (cube + 1))
        & word
    )
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
    x = serial(1, 1, size, size, size)
    for cube, corners in ((0, [[[0, 0, 0]]]), (1, [[[0, 0, 0], [0, 0, 0]]])):
        i, j, k = np.moveaxis(python_shuffle(size, seed, cube), -1, 0)
        before = x if cube == 0 else voxel_shuffle(x, [[[0, 0, 0]]], size, seed)
        assert np.array_equal(voxel_shuffle(x, corners, size, seed)[0, 0], before[0, 0][i, j, k])


def test_an_integer_seed_counts_up_over_the_batch():
    x = serial(1, 1, 7, 7, 7).repeat(3, 1, 1, 1, 1)
    corners = torch.ones(3, 1, 3, dtype=torch.int64)
    assert same(
        voxel_shuffle(x, corners, 5, 11), voxel_shuffle(x, corners, 5, torch.tensor([11, 12, 13]))
    )


@pytest.mark.parametrize("size", [4, 5, 8])
def test_the_permutation_is_as_random_as_a_random_one(size):
    """A random permutation of n voxels has 1 fixed point on average, whatever n, with variance 1; along an axis a voxel moves
    (s^2 - 1) / (3 s) on average; neighbours do not stay neighbours."""
    n, keys = size**3, 400
    x = serial(1, 1, size, size, size).repeat(keys, 1, 1, 1, 1)
    source = (
        voxel_shuffle(x, torch.zeros(keys, 1, 3, dtype=torch.int64), size, 0)
        .reshape(keys, n)
        .long()
        .numpy()
    )
    fixed = (source == np.arange(n)).sum(1)
    assert fixed.mean() == pytest.approx(1, abs=0.2) and fixed.var() == pytest.approx(
        1, abs=0.35
    )  # 4 standard errors
    at, place = (
        np.array(np.unravel_index(source, (size,) * 3)),
        np.array(np.unravel_index(np.arange(n), (size,) * 3)),
    )
    assert np.abs(at - place[:, None]).mean((1, 2)) == pytest.approx(
        [(size**2 - 1) / (3 * size)] * 3, rel=0.02
    )
    together = (
        np.abs(np.diff(at, axis=2)).sum(0) == 1
    ).mean()  # neighbours in the file that are neighbours in the cube
    assert together == pytest.approx(6 * size**2 * (size - 1) / (n * (n - 1)), rel=0.1)
    first, last = source[:, 0], source[:, -1]  # where one voxel comes from: everywhere, equally
    for one in (first, last):
        count = np.bincount(one % 4, minlength=4), np.bincount(one // (n // 4) % 4, minlength=4)
        assert all(60 < c.min() and c.max() < 145 for c in count)  # 100 each


@pytest.mark.parametrize(
    "corners,size",
    [
        ([[[0, 0, 3]]], 3),
        ([[[-1, 0, 0]]], 3),
        ([[[0, 0, 0]]], 6),
        ([[[0, 0, 0]]], 0),
        ([[0, 0, 0]], 3),
        ([[[0, 0]]], 3),
        ([[[0, 0, 0]]] * 2, 3),
    ],
)
def test_cubes_outside_the_volume_or_of_a_wrong_shape_are_refused(corners, size):
    with pytest.raises(ValueError):
        voxel_shuffle(torch.zeros(1, 1, 5, 5, 5), torch.tensor(corners), size, 0)
