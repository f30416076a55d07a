"""Reading with care: damaged and foreign files, headers, units, values, grids, JSON."""

import bz2
import dataclasses
import gzip
import json
import os
import random
import struct
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from test_data import refused

import data
import figures
import files
from data import Preprocessing
from files import UserError

SHAPE = (10, 11, 12)
GRID = Preprocessing(spacing=(4.0, 4.0, 4.0))
AFFINE = np.diag([-4.0, 4.0, 4.0, 1.0])  # LAS
pytestmark = pytest.mark.usefixtures("nothing_said")


def body(shape=SHAPE) -> np.ndarray:
    """A block of SUV 1 in air, which is noisy but below 0.05."""
    array = np.random.default_rng(0).random(shape).astype(np.float32) / 20
    inner = tuple(slice(n // 4, n - n // 4) for n in shape)
    array[inner] += 1
    return array


def save(path: Path, array, affine=AFFINE, **header) -> Path:
    """Write a NIfTI file with some fields of its header changed."""
    image = nib.Nifti1Image(np.asarray(array), affine)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = bytearray(image.to_bytes())
    head = nib.Nifti1Header(bytes(raw[:348]), check=False)
    for name, value in header.items():
        head[name] = value
    raw[:348] = head.binaryblock
    path.write_bytes(gzip.compress(bytes(raw)) if path.suffix == ".gz" else bytes(raw))
    return path


def write_case(folder: Path, suv=None, ct=None, seg=None, ct_affine=AFFINE, seg_affine=AFFINE):
    """A PET/CT study of small files."""
    suv = body() if suv is None else suv
    ct = np.where(suv > 0.5, 30, -1000).astype(np.int16) if ct is None else ct
    seg = np.zeros(suv.shape, np.uint8) if seg is None else seg
    paths = [
        save(folder / "CTres.nii.gz", ct, ct_affine),
        save(folder / "SUV.nii.gz", suv),
        save(folder / "SEG.nii.gz", seg, seg_affine),
    ]
    return data.Case(folder.name, folder.name, tuple(paths[:2]), paths[2])


# ------------------------------------------------------------------------------------ damaged files
@pytest.mark.parametrize("ending", [".nii.gz", ".nii.bz2"])
def test_one_flipped_bit_of_a_compressed_file_is_noticed(tmp_path, ending):
    """Both formats end with a checksum; a reader that stops after the last voxel never sees it."""
    path = save(tmp_path / "a.nii", body())
    raw = path.read_bytes()
    method = gzip if ending == ".nii.gz" else bz2
    packed = method.compress(raw)
    rng = random.Random(0)
    path = tmp_path / f"a{ending}"
    noticed = 0
    for _ in range(60):
        damaged = bytearray(packed)
        damaged[rng.randrange(10, len(packed))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            same = method.decompress(bytes(damaged)) == raw
        except Exception:
            same = False
        if same:  # a bit that nothing depends on
            assert (files.read_nifti(path).get_fdata(dtype=np.float32) == body()).all()
        else:
            noticed += 1
            with refused(path):
                files.read_nifti(path)
    assert noticed > 50


def test_a_file_that_holds_more_or_less_than_its_header_says_is_refused(tmp_path):
    for name in ("a.nii", "a.nii.gz"):
        path = save(tmp_path / name, body(), dim=[3, 10, 11, 11, 1, 1, 1, 1])
        with refused(path, "more than its header says"):
            files.read_nifti(path)
        path = save(tmp_path / name, body(), dim=[3, 10, 11, 13, 1, 1, 1, 1])
        with refused(path):
            files.read_nifti(path)


@pytest.mark.parametrize("dim", [(32767,) * 3, (4000, 4000, 100), (-1, 5, 5), (0, 5, 5)])
def test_sizes_that_no_scan_has_are_refused_before_anything_is_allocated(tmp_path, dim):
    path = save(tmp_path / "a.nii.gz", body(), dim=[3, *dim, 1, 1, 1, 1])
    tracemalloc.start()
    for read in (files.read_nifti, files.read_header):
        with refused(path, "voxels" if min(dim) > 0 else "found shape"):
            read(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("fields", [{}, {"vox_offset": 1e9}, {"vox_offset": 2.0**25}])
def test_a_gzip_bomb_is_not_unpacked(tmp_path, fields):
    """128 MB of zeros after a header that is honest about 1,320 voxels, or not about itself."""
    path = save(tmp_path / "a.nii", body(), **fields)
    pack = gzip.GzipFile(tmp_path / "a.nii.gz", "wb", 1)
    with pack:
        pack.write(path.read_bytes())
        for _ in range(128):
            pack.write(bytes(2**20))
    tracemalloc.start()
    start = time.process_time()
    with refused("a.nii.gz"):
        files.read_nifti(tmp_path / "a.nii.gz")
    assert time.process_time() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 2**27
    tracemalloc.stop()


def test_extensions_that_lie_about_their_size_are_not_read(tmp_path):
    raw = bytearray(save(tmp_path / "a.nii", body()).read_bytes())
    raw[348] = 1
    struct.pack_into("<f", raw, 108, 368)
    raw[352:352] = struct.pack("<ii", 2**31 - 16, 6) + bytes(8)
    (tmp_path / "a.nii").write_bytes(raw)
    with refused("a.nii", "extension"):
        files.read_header(tmp_path / "a.nii")


@pytest.mark.parametrize(
    "dtype,words",
    [
        (np.complex64, "complex"),
        (np.complex128, "complex"),
        ([("R", "u1"), ("G", "u1"), ("B", "u1")], "colors"),
    ],
)
def test_voxels_that_are_not_numbers_are_refused(tmp_path, dtype, words):
    path = save(tmp_path / "a.nii.gz", np.zeros(SHAPE, dtype))
    for read in (files.read_nifti, files.read_header):
        with refused(path, words):
            read(path)


def test_other_formats_are_refused_also_under_a_wrong_name(tmp_path):
    nib.save(nib.MGHImage(body(), AFFINE), tmp_path / "a.mgz")
    nib.save(nib.Spm2AnalyzeImage(body(), AFFINE), tmp_path / "b.img")
    for path in (tmp_path / "a.mgz", tmp_path / "b.img"):
        with refused(path.stem, "NIfTI header"):
            files.read_nifti(path)
        path.rename(tmp_path / "c.nii.gz")
        with refused("c.nii.gz", "NIfTI header"):
            files.read_nifti(tmp_path / "c.nii.gz")


def test_what_is_not_a_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.nii.gz")
    names = ["pipe.nii.gz", ".", "x" * 300, "nul\0byte", "missing"]
    for read in (files.read_nifti, files.read_header):
        for name in names:
            with refused():
                read(tmp_path / name)


@pytest.mark.parametrize("pair", [nib.Nifti1Pair, nib.Nifti2Pair])
def test_pairs_of_header_and_image_are_read(tmp_path, pair):
    nib.save(pair(body(), AFFINE), tmp_path / "a.img")
    for name in ("a.img", "a.hdr"):
        image = files.read_nifti(tmp_path / name)
        assert (image.get_fdata(dtype=np.float32) == body()).all()
        assert np.array_equal(image.affine, AFFINE)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".NII.GZ"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_what_is_accepted_is_what_nibabel_reads(tmp_path, kind, dtype, order, ending):
    header = kind.header_class(endianness=order)
    header.set_data_dtype(dtype)
    header.set_xyzt_units("mm")
    affine = AFFINE @ [[1, 0, 0, 3.5], [0, 0, 1, -2], [0, 1, 0, 9], [0, 0, 0, 1]]
    image = kind((100 * body()).astype(dtype), affine, header)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"kept"))
    if dtype == np.int16:
        image.header.set_slope_inter(0.37, -1.5)
    path = tmp_path / "a.nii.gz"
    nib.save(image, path)
    expected = nib.load(path)
    raw = gzip.decompress(path.read_bytes())
    path = tmp_path / f"b{ending}"
    path.write_bytes(gzip.compress(raw) if ending.lower().endswith("gz") else raw)
    read, like = files.read_nifti(path), files.read_header(path)
    values = expected.get_fdata(dtype=np.float32)
    assert np.array_equal(read.get_fdata(dtype=np.float32), values)
    assert np.array_equal(read.affine, expected.affine)
    assert like.header == expected.header and like.shape == SHAPE
    assert [e.get_content() for e in like.header.extensions] == [b"kept"]


# ----------------------------------------------------------------------------------------- headers
def test_dimensions_of_one_at_the_end_are_dropped(tmp_path):
    for tail in ((1,), (1, 1), (1, 1, 1)):
        path = save(tmp_path / "a.nii.gz", body()[(..., *[None] * len(tail))])
        assert files.read_nifti(path).shape == files.read_header(path).shape == SHAPE
    path = save(tmp_path / "b.nii.gz", np.zeros((4, 5, 1)))  # a single slice stays a volume
    assert files.read_nifti(path).shape == (4, 5, 1)
    path = save(tmp_path / "c.nii.gz", np.zeros((4, 5, 6, 1, 4)))  # as ITK writes vectors
    assert files.read_nifti(path, ndim=4).shape == (4, 5, 6, 4)
    path = save(tmp_path / "d.nii.gz", np.zeros((4, 5)))
    with refused(path, "(4, 5)"):
        files.read_nifti(path)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "rows,words",
    [
        (np.zeros((3, 4)), "not at right angles"),
        (np.full((3, 4), NAN), "not finite"),
        ([[INF, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], "not finite"),
        ([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]], "not at right angles"),
        ([[4, 0.5, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0]], "sheared"),
        ([[4, 0, 0, 0], [0, 0, 0, 0], [0, 0, 4, 0]], "zero"),
        (np.eye(4)[:3] * 1000, "1000 x 1000 x 1000 mm"),
        (np.eye(4)[:3] * 1e30, "0.1 to 20 mm"),
        (np.eye(4)[:3] * 0.004, "0.004 x 0.004 x 0.004 mm"),
        ([[4, 0, 0, 1e30], [0, 4, 0, 0], [0, 0, 4, 0]], "first at"),
        ([[4, 0, 0, NAN], [0, 4, 0, 0], [0, 0, 4, 0]], "not finite"),
    ],
)
def test_an_sform_that_no_scan_has_is_named(tmp_path, rows, words):
    rows = np.array(rows, np.float32)
    fields = dict(sform_code=1, srow_x=rows[0], srow_y=rows[1], srow_z=rows[2])
    path = save(tmp_path / "a.nii.gz", body(), **fields)
    for read in (files.read_nifti, files.read_header):
        with refused(path, words):
            read(path)


@pytest.mark.parametrize(
    "fields,words",
    [
        (dict(pixdim=[1, 0, 4, 4, 0, 0, 0, 0]), "pixdim"),
        (dict(pixdim=[1, NAN, 4, 4, 0, 0, 0, 0]), "pixdim"),
        (dict(quatern_b=NAN), "qform"),
        (dict(quatern_b=3), "qform"),
        (dict(qoffset_x=INF), "not finite"),
    ],
)
@pytest.mark.parametrize("code", [0, 1])
def test_a_qform_that_no_scan_has_is_named(tmp_path, fields, words, code):
    path = save(tmp_path / "a.nii", body(), sform_code=0, qform_code=code, **fields)
    if code == 0 and "pixdim" not in fields:
        files.read_nifti(path)  # not used: neither form says where the volume is
        return
    with refused(path, words):
        files.read_nifti(path)


def test_a_qform_is_used_without_an_sform_and_an_sform_before_a_qform(tmp_path):
    image = nib.Nifti1Image(body(), None)
    image.set_qform(AFFINE, 1)
    image.set_sform(np.diag([4.0, 4, 4, 1]), 0)
    nib.save(image, tmp_path / "a.nii.gz")
    assert np.allclose(files.read_nifti(tmp_path / "a.nii.gz").affine, AFFINE)
    path = save(tmp_path / "b.nii.gz", body(), qform_code=1, quatern_b=NAN)
    assert np.array_equal(files.read_nifti(path).affine, AFFINE)


@pytest.mark.parametrize("unit,factor", [("mm", 1), ("meter", 1000), ("micron", 0.001), (None, 1)])
def test_units_are_honoured(tmp_path, unit, factor):
    spacing = np.array([0.5, 0.6, 0.8])
    image = nib.Nifti1Image(body(), np.diag([*spacing / factor, 1]))
    image.header.set_xyzt_units(unit or "unknown")
    nib.save(image, tmp_path / "a.nii.gz")
    for read in (files.read_nifti, files.read_header):
        found = read(tmp_path / "a.nii.gz")
        assert np.allclose(nib.affines.voxel_sizes(found.affine), spacing)
    out = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), found.affine, found.header)
    assert np.allclose(out.header.get_zooms(), spacing)  # a mask is written in mm
    assert out.header.get_xyzt_units()[0] == ("unknown" if unit is None else "mm")


def test_micrometers_of_a_scan_of_people_are_refused(tmp_path):
    """Either the unit or the numbers are wrong: 4 mm or 4 m."""
    path = save(tmp_path / "a.nii.gz", body(), np.diag([4000.0, 4000, 4000, 1]), xyzt_units=3)
    with refused(path, "micrometers"):
        files.read_nifti(path)


def test_a_volume_beyond_three_meters_is_refused(tmp_path):
    affine = np.diag([4.0, 4, 20, 1])
    with refused("a.nii.gz", "3 m"):
        files.read_nifti(save(tmp_path / "a.nii.gz", np.zeros((2, 2, 151), np.uint8), affine))
    files.read_nifti(save(tmp_path / "a.nii.gz", np.zeros((2, 2, 150), np.uint8), affine))


# ------------------------------------------------------------------------------------------ values
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_voxels_that_are_not_finite_are_air_outside_the_body(tmp_path, capsys, bad):
    suv, ct = body(), np.where(body() > 0.5, 30, -1000).astype(np.float32)
    for array in (suv, ct):
        array[:2], array[5, 1, 5] = bad, bad  # a face, and a voxel in the air
    case = write_case(tmp_path / "P", suv, ct)
    out = data.preprocess(case, GRID)
    clean = write_case(tmp_path / "Q", np.nan_to_num(suv, False, 0, 0, 0))
    expected = data.preprocess(clean, GRID)
    assert np.array_equal(out["image"], expected["image"])
    count = 2 * SHAPE[1] * SHAPE[2] + 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all(f"{count:,} voxels" in line for line in said)
    assert "SUV.nii.gz" in said[0] and "(0)" in said[0] and "(-1000)" in said[1]


def test_voxels_that_are_not_finite_in_the_body_or_in_a_truth_are_refused(tmp_path):
    suv = body()
    suv[5, 5, 5:7] = NAN
    with refused("SUV.nii.gz", "2 voxels inside the body"):
        data.preprocess(write_case(tmp_path / "P", suv), GRID)
    seg = np.zeros(SHAPE, np.float32)
    seg[0, 0, 0] = NAN
    with refused("SEG.nii.gz", "1 voxels"):
        data.preprocess(write_case(tmp_path / "P", seg=seg), GRID)


@pytest.mark.parametrize("factor", [1000, 5000])
@pytest.mark.parametrize("share", [1, 0.002])
def test_other_units_than_suv_are_recognized(tmp_path, share, factor):
    suv = np.zeros((20, 20, 25), np.float32)
    suv.flat[: int(suv.size * share)] = 1
    with refused("SUV.nii.gz", "Bq/ml", "x 1000", "docs/python.md"):
        data.preprocess(write_case(tmp_path / "P", suv * factor), GRID)
    data.preprocess(write_case(tmp_path / "P", suv), GRID)


# ------------------------------------------------------------------------------------------- grids
def ramp(shape, affine) -> np.ndarray:
    """HU that are linear in the position: interpolation reproduces them exactly."""
    points = nib.affines.apply_affine(affine, np.indices(shape).reshape(3, -1).T)
    return (points @ [1.0, -2.0, 0.5]).reshape(shape).astype(np.float32)


def test_a_ct_on_its_own_grid_is_resampled_to_that_of_the_pet(tmp_path, capsys):
    affine = np.array([[0, 1.7, 0, -40], [1.9, 0, 0, -3], [0, 0, -2.1, 50], [0, 0, 0, 1]])
    ct = ramp((26, 27, 26), affine)
    window = Preprocessing(spacing=(4.0, 4.0, 4.0), ct_window=(-200.0, 200.0))
    case = write_case(tmp_path / "P", np.full(SHAPE, 1.0, np.float32), ct, ct_affine=affine)
    image, grid, _ = data.load_images(case, window)
    (line,) = capsys.readouterr().out.splitlines()
    assert "CTres.nii.gz" in line and "resampled to the PET's grid" in line
    expected = (ramp(SHAPE, grid) + 200) / 400
    seen = image[0] > 0.0
    assert seen.mean() > 0.5 and np.allclose(image[0][seen], expected[seen], atol=1e-4)


@pytest.mark.parametrize("shift,fine", [(0, True), (19, True), (21, False), (100, False)])
def test_grids_that_overlap_by_less_than_half_are_refused(tmp_path, shift, fine):
    affine = AFFINE.copy()
    affine[0, 3] += shift + 0.5  # mm, of 40
    case = write_case(tmp_path / "P", ct_affine=affine)
    if fine:
        data.load_images(case, GRID)
        return
    with refused("SUV.nii.gz", "CTres.nii.gz", "%"):
        data.load_images(case, GRID)


def test_a_truth_on_the_grid_of_the_ct_is_resampled(tmp_path, capsys):
    """As HECKTOR's; on any other grid it is refused (tests/test_data.py)."""
    fine = AFFINE @ np.diag([0.5, 0.5, 0.5, 1])
    fine[:3, 3] = AFFINE[:3, :3] @ [-0.25, -0.25, -0.25]  # the outer faces are the same
    seg = np.zeros(SHAPE, np.uint8)
    seg[4:7, 3:8, 5:9] = 1
    twice = np.repeat(np.repeat(np.repeat(seg, 2, 0), 2, 1), 2, 2)
    case = write_case(tmp_path / "P", None, twice.astype(np.int16), twice, fine, fine)
    truth = data.read_label(case)
    assert np.array_equal(np.asarray(truth.dataobj), seg)
    assert np.array_equal(truth.affine, AFFINE)
    assert "resampled to the PET's grid" in capsys.readouterr().out
    alone = dataclasses.replace(case, images=(None, case.images[1]))
    with refused(case.label, "not on one grid"):
        data.read_label(alone)
    alone = dataclasses.replace(alone, own_grid=True)  # HECKTOR, for a network that reads no CT
    assert np.array_equal(np.asarray(data.read_label(alone).dataobj), seg)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_studies_one_voxel_wide(tmp_path, axis):
    shape = [9, 9, 9]
    shape[axis] = 1
    seg = np.zeros(shape, np.uint8)
    seg.flat[40] = 1
    case = write_case(tmp_path / "P", np.full(shape, 1.5, np.float32), seg=seg)
    for spacing in (4.0, 3.0, 8.0):
        out = data.preprocess(case, Preprocessing(spacing=(spacing,) * 3))
        assert out["image"].shape[1 + axis] == 1 and out["tumor"]
        truth = nib.Nifti1Image(out["label"], out["affine"])
        row = {"case": "P$^$", "dice": 0.5}
        tile = figures.tile(row, out["image"][1], out["label"], truth, out["affine"], (0, 15))
        figures.overview([tile], tmp_path / "overview.png")


# ---------------------------------------------------------------------------------- JSON and names
CASES = [SimpleNamespace(name=n, patient=n) for n in "ab"]
SPLITS = [{"train": ["a"], "val": ["b"]}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_with_a_byte_order_mark_is_read(tmp_path, encoding):
    path = tmp_path / "splits.json"
    path.write_bytes(json.dumps(SPLITS, indent=1).replace("\n", "\r\n").encode(encoding))
    assert data.read_splits(path, CASES) == SPLITS


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "text",
    [DEEP, "\xff\xfe{", '[{"train": ' + DEEP, "1" * 5000, "NaN", '"x"', "[[]]", '[{"train": 1}]'],
)
def test_splits_that_are_no_splits_are_refused(tmp_path, text):
    path = tmp_path / "splits.json"
    path.write_text(text, encoding="latin-1")
    with refused(path, "expected"):
        data.read_splits(path, CASES)


@pytest.mark.parametrize("value", [None, True, 3, 1.5, "x", [], {}, [[[]]], [None], ["x" * 10**6]])
@pytest.mark.parametrize("field", ["train", "val", "fold", "all"])
def test_any_type_in_any_field_of_the_splits_is_used_or_refused(tmp_path, field, value):
    fold = {"train": ["a"], "val": ["b"]} | {field: value}
    content = {"fold": [value], "all": value}.get(field, [fold])
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(content))
    with refused(path):
        data.read_splits(path, CASES)


def test_a_folder_or_a_huge_file_instead_of_json_is_refused(tmp_path):
    (tmp_path / "a.json").mkdir()
    with refused("a.json"):
        files.read_json(tmp_path / "a.json", "folds")
    with open(tmp_path / "b.json", "wb") as f:
        f.truncate(2**30)
    with refused("b.json", "64 MB"):
        files.read_json(tmp_path / "b.json", "folds")


def test_errors_are_one_line_whatever_the_names_in_them():
    error = UserError("P\x1b[31m\nerror: \u2028\u202efake\x85\udcff\r: missing")
    assert str(error) == r"P\x1b[31m\nerror: \u2028\u202efake\x85\udcff\r: missing"
    assert str(UserError(str(error))) == str(error)
    assert files.printable("Ä ü 中文 (1).nii") == "Ä ü 中文 (1).nii"


def test_a_note_is_printed_once(capsys):
    for i in range(3):
        files.note("a.nii: once")
        files.note(f"{i}.nii\x1b: of a kind", kind="kind")
    first, second = capsys.readouterr().out.splitlines()
    assert first == "a.nii: once"
    assert second == r"0.nii\x1b: of a kind (files alike are not named)"


def test_files_with_names_of_255_letters_are_written_atomically(tmp_path):
    path = tmp_path / ("ä" * 120 + "x" * 8 + ".nii.gz")
    assert len(path.name.encode()) == 255
    with files.atomic_write(path) as part:
        part.write_bytes(b"x")
        assert part.name.endswith(".nii.gz")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
