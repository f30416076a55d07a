"""Mutations of a file's content: a bit, a header field, a JSON value, a csv cell, an option.

Each takes the content as bytes and a random generator, and returns other bytes. What it does is a
pure function of the two, so that an input is known by its base and a few seeds.
"""

import csv
import gzip
import io
import json
import random
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from nibabel import nifti1, nifti2

Mutation = Callable[[bytes, random.Random], bytes]

NUMBERS = [
    0, -1, 1, 2, 3, 255, 2**31 - 1, -(2**31), 2**63, 10**30, -0.5, 1e-30, 1e-3, 0.5, 7.5, 1e6, 1e30,
    1e308, float("nan"), float("inf"), -float("inf"),
]  # fmt: skip
TEXTS = [
    "", " ", "x", "nan", "1e999", "../..", "/", ".", "a/b", "\x00", "\x1b[31m", "\u202e", "\ud800",
    "P$^$", "x" * 300, "v3", "auto", "--", "0.5", "-1", "ä", "\n", "1 2 3",
]  # fmt: skip
VALUES: list[Any] = [*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], [1, "a"], {"a": None}]


def damage(content: bytes, rng: random.Random) -> bytes:
    """Flip a bit, overwrite, cut, repeat, remove or insert bytes, as disks and transfers do."""
    if not content:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(20)))
    raw = bytearray(content)
    a = rng.randrange(len(raw))
    b = min(len(raw), a + rng.choice([1, 4, 64, 1000]))
    what = rng.randrange(8)
    if what <= 2:
        raw[a] ^= 1 << rng.randrange(8)
    elif what == 3:
        raw[a:b] = bytes(rng.randrange(256) for _ in range(b - a))
    elif what == 4:
        raw[a:b] = bytes(b - a)
    elif what == 5:
        del raw[a:]
    elif what == 6:
        del raw[a:b]
    else:
        raw[a:a] = raw[a:b]
    return bytes(raw)


# ------------------------------------------------------------------------------------------- NIfTI
FIELDS = """sizeof_hdr dim datatype bitpix pixdim vox_offset scl_slope scl_inter xyzt_units
qform_code sform_code quatern_b quatern_c qoffset_x srow_x srow_y srow_z magic intent_code
dim_info""".split()


def mutate_nifti(content: bytes, rng: random.Random) -> bytes:
    """Change a field of the header or a voxel, inside the compressed stream if there is one."""
    packed = content[:2] == b"\x1f\x8b"
    if rng.random() < 0.3:
        return damage(content, rng)
    try:
        raw = gzip.decompress(content) if packed else content
    except Exception:  # an earlier mutation has broken the stream
        return damage(content, rng)
    raw = damage(raw, rng) if rng.random() < 0.2 else _change_field(raw, rng)
    return gzip.compress(raw, 1, mtime=0) if packed else raw


def _change_field(raw: bytes, rng: random.Random) -> bytes:
    first = int.from_bytes(raw[:4], "little")
    order = "<" if first in (348, 540) else ">"
    kind = nifti2.header_dtype if 540 in (first, int.from_bytes(raw[:4], "big")) else None
    kind = (kind or nifti1.header_dtype).newbyteorder(order)
    if len(raw) <= kind.itemsize:
        return damage(raw, rng)
    header = np.frombuffer(raw[: kind.itemsize], kind).copy()
    if rng.random() < 0.15:  # a voxel
        place = rng.randrange(352, len(raw)) if len(raw) > 352 else 0
        with np.errstate(all="ignore"):
            value = np.float32(rng.choice(NUMBERS)).tobytes()
        return raw[:place] + value + raw[place + 4 :]
    field = header[rng.choice(FIELDS)].reshape(-1)
    place = rng.randrange(len(field))
    with np.errstate(all="ignore"):
        if field.dtype.kind == "S":
            field[place] = rng.choice([b"n+1", b"ni1", b"n+2", b"", b"abc"])
        elif field.dtype.kind == "f":
            scale = [float(field[place]) * s for s in (-1, 0.5, 2, 1000)]
            field[place] = rng.choice(scale + [float(n) for n in NUMBERS])
        else:
            info = np.iinfo(field.dtype)
            whole = [int(field[place]) + n for n in (-1, 1)] + list(range(9)) + [16, 64, 256, 512]
            whole += [int(n) for n in NUMBERS if abs(n) < 2**64]
            field[place] = min(max(rng.choice(whole), int(info.min)), int(info.max))
    return header.tobytes() + raw[kind.itemsize :]


# ------------------------------------------------------------------------------------ JSON and csv
def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """Replace, remove, add or nest a value; sometimes, damage the text."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return damage(content, rng)
    if rng.random() < 0.15:
        return damage(content, rng)
    if rng.random() < 0.1:
        whole = json.dumps(rng.choice(VALUES)).encode()
        wide = content.decode(errors="replace").encode("utf-16")
        return rng.choice([whole, b"[" * 100_000, wide, b"\xff\xfe{"])
    holder = value = [value]
    place: Any = 0
    while isinstance(holder[place], list | dict) and holder[place] and rng.random() < 0.85:
        holder = holder[place]
        place = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    what = rng.randrange(6)
    if what == 0 and holder is not value:
        del holder[place]
    elif what == 1 and isinstance(holder, dict):
        holder[rng.choice(TEXTS)] = rng.choice(VALUES)
    elif what == 2:
        holder[place] = [holder[place]] * rng.choice([1, 2, 1000])
    else:
        holder[place] = rng.choice(VALUES)
    return json.dumps(value[0]).encode()


def mutate_csv(content: bytes, rng: random.Random) -> bytes:
    """Change a cell, drop or repeat a cell, a row or a column; sometimes, damage the text."""
    if rng.random() < 0.2:
        return damage(content, rng)
    try:
        rows = list(csv.reader(io.StringIO(content.decode(), newline="")))
    except (UnicodeDecodeError, csv.Error):
        return damage(content, rng)
    if not rows or not rows[0]:
        return damage(content, rng)
    i = rng.randrange(len(rows))
    j = rng.randrange(len(rows[0]))
    what = rng.randrange(6)
    if what == 0:
        del rows[i]
    elif what == 1:
        rows.insert(i, rows[i])
    elif what == 2:
        del rows[i][j:]
    elif what == 3:
        rows = [row[:j] + row[j + 1 :] for row in rows]
    elif j < len(rows[i]):
        text = str(rng.choice([*TEXTS, *NUMBERS]))
        rows[i][j] = text.encode(errors="replace").decode()
    out = io.StringIO(newline="")
    csv.writer(out).writerows(rows)
    return out.getvalue().encode()


# -------------------------------------------------------------------- checkpoints and command lines
def mutate_checkpoint(content: bytes, rng: random.Random) -> bytes:
    """Change an entry of the checkpoint or of its config, or damage the file."""
    if rng.random() < 0.5:
        return damage(content, rng)
    try:
        if zipfile.ZipFile(io.BytesIO(content)).testzip():
            return damage(content, rng)  # to save it again would make its checksums right
        state = torch.load(io.BytesIO(content), weights_only=True)
        holder = rng.choice([state, state["config"], state["config"], state["model"]])
        name = rng.choice(sorted(holder))
    except Exception:  # an earlier mutation has broken it
        return damage(content, rng)
    if rng.random() < 0.2:
        del holder[name]
    elif rng.random() < 0.2:
        holder[name] = torch.full((2, 3), rng.choice([0.0, float("nan")]))
    else:
        holder[name] = rng.choice([*VALUES, (10**6,) * 3, (1e-3,) * 3, (0, 5), 0.9999999])
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def mutate_words(content: bytes, rng: random.Random) -> bytes:
    """Change, remove, repeat or add a word of a command line, which is kept as JSON."""
    words = json.loads(content)
    place = rng.randrange(len(words))
    what = rng.randrange(5)
    if what == 0:
        del words[place]
    elif what == 1:
        words.insert(place, rng.choice(words))
    elif what == 2:
        words.insert(place, str(rng.choice(VALUES)))
    else:
        words[place] = str(rng.choice([*VALUES, *words]))
    return json.dumps(words or [""]).encode()
