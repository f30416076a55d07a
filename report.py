"""One HTML page per study: a turning projection, slices through the lesions, and their table.

A page holds all it needs, and its security policy lets it load nothing else. Volumes are (D, H, W)
in any order of axes; pictures follow the affine: the patient's left is on the right, heads are up.
"""

import math
from html import escape
from itertools import product
from pathlib import Path

import numpy as np
from nibabel.affines import apply_affine, from_matvec, voxel_sizes
from scipy import ndimage

import files
from data import Case
from figures import PREDICTION, TRUTH, web_outline, web_picture
from metrics import CENTER, LESION_MEASURES, components
from options import show

TURN, FINEST, TALLEST = 10, 3.0, 450  # of the projection: degrees, mm, pixels
FIELD, SIDE, CT_WINDOW = 200.0, 225, (-160, 240)  # of a slice: mm or more, pixels, HU
PLANES = {"axial": ((-1, 0, 0), (0, 1, 0)), "coronal": ((-1, 0, 0), (0, 0, 1))}  # right, up
MOST_SHOWN, MOST_ROWS = 30, 300  # lesions, in pictures and in the table
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
STYLE = """
html { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff }
body { max-width: 1200px; margin: auto; padding: 1rem } h1, p { overflow-wrap: anywhere }
.top { display: flex; flex-wrap: wrap; gap: 2rem } .top > * { flex: 1 1 300px; min-width: 0 }
.top .lesions { flex-grow: 4 } .table { overflow: auto; max-height: 80vh }
figure { display: inline-block; position: relative; width: 25%; min-width: 160px; margin: 0 }
figure :is(img, svg) { display: block; width: 100%; height: auto; object-fit: contain }
#frames > * { width: 100% } #frames :is(img, svg) { height: min(80vh, 44rem) }
figure svg { position: absolute; inset: 0 } img { outline: 1px solid #ccc }
text { font: 600 1em sans-serif; stroke: #fff; stroke-width: .2em; paint-order: stroke }
path { fill: none; stroke: #fff; stroke-width: 1.6; vector-effect: non-scaling-stroke }
.prediction { stroke: var(--prediction); stroke-dasharray: 5 2 } .truth { stroke: var(--truth) }
.bar { filter: drop-shadow(0 0 1px #000) } figcaption, th, td { font-size: 13px }
.key { width: 2.5rem; height: .6rem } #controls { display: flex; gap: 1rem } #angle { flex: 1 }
.grey { background: linear-gradient(to right, #fff, #000); border: 1px solid; padding: 0 3rem }
th, td { padding: .2rem .4rem; text-align: right; border-bottom: 1px solid #ddd }
[hidden] { display: none !important }
"""
SCRIPT = """
const [angle, play, controls] = ["angle", "play", "controls"].map(x => document.getElementById(x));
const frames = document.querySelectorAll("#frames figure");
let turning = false;
const show = n => { angle.value = n; frames.forEach((f, i) => f.hidden = i * angle.step != n); };
const turn = on => { turning = on; play.textContent = on ? "Pause" : "Play"; };
controls.hidden = false;
play.onclick = () => turn(!turning);
angle.oninput = () => { turn(false); show(angle.value); };
setInterval(() => { if (turning) show((+angle.value + +angle.step) % 360); }, 120);
turn(!matchMedia("(prefers-reduced-motion: reduce)").matches);
"""


def write(out: Path, case: Case, suv, mask, affine, lesions, notes, truth=None) -> None:
    """Write the page of a PET/CT study, whose CT may be missing. Raises `files.CannotWrite`.

    suv, mask: the PET and a bool array (D, H, W); affine: (4, 4), of both. lesions: the rows of
    `metrics.lesion_table`. notes: lines that say what made the mask. truth: `read_label(case)`.
    """
    masks = {} if truth is None else {"truth": np.asarray(truth.dataobj) > 0}
    masks, shown, name = masks | {"prediction": mask}, lesions[:MOST_SHOWN], escape(case.name)
    frames, top = projections([suv, *masks.values()], affine, masks, shown)
    numbers = number_lesions(mask, len(shown))
    images = {"PET": (suv, affine, (0, top), "gray_r")}
    try:
        if case.images[0] and shown:
            scan = files.read_nifti(case.images[0], air=-1000.0)
            images = {"CT": (np.asarray(scan.dataobj), scan.affine, CT_WINDOW, "gray")} | images
    except files.UserError as e:
        notes = [*notes, f"The CT is not shown: {e}"]
    rows = slices(shown, numbers, images, masks, affine)
    count = f"{len(lesions)} found. " if lesions else "No lesion was found. "
    if len(lesions) > MOST_SHOWN:
        count += f"The {MOST_SHOWN} largest are shown, and up to {MOST_ROWS} are listed. "
    line = '<svg class="key" viewBox="0 0 40 9" aria-hidden="true"><path class="{0}" d="M0 5h40"/>'
    key = " ".join(f"{line.format(kind)}</svg> {kind}" for kind in masks)
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: predicted lesions</title>
<style>:root {{ --truth: {TRUTH}; --prediction: {PREDICTION} }}{STYLE}</style></head><body><main>
<h1>{name}</h1><p><b>Research software: not for clinical use.</b></p>
<div class="top"><section><div id="frames">{frames}</div><div id="controls" hidden>
<button id="play">Play</button><input id="angle" type="range" max="{360 - TURN}"
step="{TURN}" value="0" aria-label="Degrees"></div><p><small>Maximum-intensity projection. {key}<br>
SUV 0 <span class="grey"></span> {top:g} or more</small></p></section>
<section class="lesions"><h2>Lesions</h2><p>{count}</p>{table(lesions)}<p><small>x, y, z: center,
to the right, front and head. tlg: total lesion glycolysis, SUVmean x volume.</small></p>
<h2>How it was made</h2>{"".join(f"<p>{escape(note)}</p>" for note in notes)}</section></div>
<h2>Slices</h2><p><small>{count}{key}. PET: SUV 0 to {top:g}. CT: {CT_WINDOW[0]} to {CT_WINDOW[1]}
HU. Bar: 5 cm. Left (L) is on the right.</small></p>{rows}</main><script>{SCRIPT}</script></body>
</html>"""
    files.write_file(out, page)


def describe(models, row: dict) -> list[str]:
    """Lines on the networks that made a mask, and on its numbers and other options."""
    names = "model fold data spacing patch overlap flips threshold".split()
    lines = [{name: getattr(c, name) for name in names} for _, c in models]
    lines += [{name: v for name, v in row.items() if v is not None and v == v}]  # v: not NaN
    return [", ".join(f"{k.replace('_', ' ')} {show(v)}" for k, v in x.items()) for x in lines]


def table(lesions: list[dict]) -> str:
    """The rows of lesions.csv, rounded; the exact numbers are in attributes."""
    names = ("lesion", *LESION_MEASURES)
    lines = ["".join(f'<th scope="col">{name.replace("_", " ")}</th>' for name in names)]
    for number, row in enumerate(lesions[:MOST_ROWS], start=1):
        link = f'<a href="#lesion-{number}">{number}</a>' if number <= MOST_SHOWN else number
        cells = [f'<td><data value="{row[k]}">{row[k]:.5g}</data></td>' for k in LESION_MEASURES]
        lines.append(f'<th scope="row">{link}</th>{"".join(cells)}'.replace(">nan<", ">–<"))
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    role = 'tabindex="0" role="region" aria-label="Table of lesions"'
    return f'<div class="table" {role}><table>{rows}</table></div>' if lesions else ""


def sample(volume, affine, grid, shape, order=1, fill=0) -> np.ndarray:
    """A volume (D, H, W) on another grid, float32; both affines (4, 4) lead to mm."""
    options = dict(output=np.float32, order=order, mode="grid-constant", cval=fill)
    to_voxels = np.linalg.inv(affine) @ grid
    return ndimage.affine_transform(volume, to_voxels, output_shape=tuple(shape), **options)


def projections(volumes, affine, kinds, shown) -> tuple[str, float]:
    """The turning projection of PET and masks (D, H, W), and the SUV from which it is black."""
    body = sum(volumes[1:], volumes[0] > 0.1)  # bool: their union
    box = (ndimage.find_objects(body.view(np.uint8)) or [tuple(map(slice, body.shape))])[0]
    corners = np.array(list(product(*((s.start or 0, s.stop) for s in box)))) - 0.5
    low, high = (f(apply_affine(affine, corners), axis=0) for f in (np.min, np.max))
    center, step = (low + high) / 2, max(FINEST, (high[2] - low[2]) / TALLEST)
    shape = np.ceil((high - low) / step).astype(int) + (2, 2, 0)  # air around
    grid = from_matvec(np.eye(3) * step, center - step * (shape - 1) / 2)
    factors = np.maximum(1, step // voxel_sizes(affine)).astype(int)
    for axis, n in enumerate(factors):  # maxima of blocks: no lesion is lost
        starts = np.arange(0, volumes[0].shape[axis], n)
        volumes = [np.maximum.reduceat(v, starts, axis) for v in volumes]
    affine = affine @ from_matvec(np.diag(factors), (factors - 1) / 2)
    volumes = [sample(v, affine, grid, shape) for v in volumes]  # (X, Y, Z)
    top = float(np.clip(np.ceil(np.percentile(volumes[0].max(1), 99)), 5, 15))
    x, y, height = volumes[0].shape
    line = np.arange(math.ceil(math.hypot(x, y)))
    line, size, frames = line - line.mean(), max(height / 50, len(line) / 30), []
    for degrees in range(0, 360, TURN):  # seen from the front, from the left, ...
        right = -np.exp(1j * math.radians(degrees))  # the viewer's, as x + iy
        rays = right * (line[:, None] + 1j * line)
        i = np.rint(rays.real + (x - 1) / 2).clip(0, x - 1).astype(int)
        j = np.rint(rays.imag + (y - 1) / 2).clip(0, y - 1).astype(int)
        pixels, *flat = (v[i, j].max(1)[:, ::-1].T for v in volumes)  # (Z, width)
        marks, words = [web_outline(f, kind) for f, kind in zip(flat, kinds)], []
        for number, row in enumerate(shown, start=1):
            dx, dy, dz = (np.array([row[k] for k in CENTER]) - center) / step
            across = ((dx + 1j * dy) * right.conjugate()).real
            words.append((number, len(line) / 2 + across + size / 4, height / 2 - dz + size / 3))
        ways = (right.real, right.imag, 0), (0, 0, 1)
        alt, hide = f"PET, turned by {degrees} degrees", " hidden" if degrees else ""
        frames.append(web_picture(pixels, (0, top), "gray_r", marks, words, size, *ways, alt, hide))
    return "".join(frames), top


def number_lesions(mask, most: int) -> np.ndarray:
    """The numbers (D, H, W) of the `most` largest lesions as in lesions.csv; 255 for the others."""
    labels, sizes, _ = components(mask, mask)
    order = 1 + np.argsort(-sizes[1:], kind="stable")[:most]
    numbers = np.full(len(sizes), 255, np.uint8)
    numbers[[0, *order]] = np.arange(len(order) + 1)
    return np.concatenate([numbers[part] for part in np.array_split(labels, 16)])  # less memory


def slices(shown, numbers, images, masks, affine) -> str:
    """Axial and coronal slices of each lesion, through its voxel nearest to its center."""
    rows, boxes = [], ndimage.find_objects(numbers, max_label=len(shown))
    for number, (row, box) in enumerate(zip(shown, boxes), start=1):
        center = apply_affine(np.linalg.inv(affine), [row[k] for k in CENTER])
        first = int(np.rint(center[0]))  # each plane between its ends holds some of a lesion
        inside = np.argwhere(numbers[first] == number)
        voxel = (first, *inside[np.abs(inside - center[1:]).sum(1).argmin()])
        ends = apply_affine(affine, [[s.start for s in box], [s.stop for s in box]])
        step = max(FIELD, 1.5 * np.linalg.norm(ends[1] - ends[0])) / SIDE
        rows.append(f'<h3 id="lesion-{number}">Lesion {number}</h3>')
        for plane, (right, up) in PLANES.items():
            axes = step * np.column_stack([right, -np.array(up), np.cross(right, up)])
            origin = apply_affine(affine, voxel) - axes @ (SIDE // 2, SIDE // 2, 0)
            grid = from_matvec(axes, origin), (SIDE, SIDE, 1)
            marks = [f'<path class="bar" d="M10 {SIDE - 8}h{50 / step:.0f}"/>']
            for kind, m in masks.items():
                marks.append(web_outline(sample(m, affine, *grid)[..., 0].T, kind))
            seen, labels = sample(numbers, affine, *grid, order=0)[..., 0], []
            for n in set(np.unique(seen).astype(int)) - {0, 255}:
                x, y = np.nonzero(seen == n)
                labels.append((n, x.max() + 4, y.mean() + 4))
            for name, (volume, own, window, colors) in images.items():
                pixels = sample(volume, own, *grid, fill=window[0])[..., 0].T
                alt = f"Lesion {number}, {plane} {name}"
                rows.append(web_picture(pixels, window, colors, marks, labels, 11, right, up, alt))
    return "".join(rows)
