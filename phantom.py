"""Synthetic PET/CT and brain MRI studies, so that everything in this repository runs with nothing downloaded.

1. **Anatomy** is a label map: ellipsoids, rods and stacks of ellipses in millimetres of a standard patient, painted one
   over the other. Each patient has a size, fat, organs of its own, and smooth noise bends all coordinates.
2. `TISSUES` turns labels into Hounsfield units (CT) and standardised uptake values (PET). FDG shows glucose use: brain,
   heart muscle, kidneys and bladder outshine most tumors; throat, bowel or brown fat light up in some patients only.
   So no SUV threshold finds the tumors, only place and shape do.
3. **Lesions** are noisy, sometimes lobed or cold-cored blobs in lung, lymph nodes, liver, bone or soft tissue. One in
   eight touches heart or bladder with the same uptake: PET cannot show that border, the density in CT can.
4. **Physics.** PET: a point spread of 6.5 mm (full width at half maximum) and noise of variance proportional to
   activity, correlated by the reconstruction filter. CT: less blur, 12 HU of noise. The truth is not blurred.

A study is a pure function of (seed, index, spacing). Array axes run left, front, top (LAS) in PET/CT, RAS in the brain.
"""
import gzip
import json
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from scipy import ndimage

from files import UserError, atomic_write

TISSUES = {  # HU, SUV from, SUV to, share of studies that show it, SUV in the others
    "air": (-1000, 0, 0, 1, 0), "fat": (-100, .25, .4, 1, 0), "muscle": (50, .45, .7, 1, 0),
    "lung": (-800, .3, .5, 1, 0), "bone": (600, .5, .9, 1, 0), "marrow": (260, .9, 1.5, 1, 0),
    "skull": (900, .4, .7, 1, 0), "disc": (85, .5, .7, 1, 0), "brain": (35, 7.5, 12, 1, 0), "fluid": (8, .5, 1, 1, 0),
    "blood": (42, 1.2, 1.8, 1, 0), "heart": (48, 4, 10, .55, 1.7), "liver": (60, 1.8, 2.6, 1, 0),
    "spleen": (52, 1.5, 2.1, 1, 0), "stomach": (45, .9, 2.2, 1, 0), "bowel": (40, .8, 2.4, 1, 0),
    "content": (15, .4, .6, 1, 0), "gas": (-850, .2, .3, 1, 0), "kidney": (35, 2.5, 4.5, 1, 0),
    "calyx": (12, 4.5, 8, 1, 0), "bladder": (5, 6, 25, 1, 0), "throat": (52, 2.5, 5.5, .5, .8),
    "brown fat": (-90, 3, 8, .25, .35)}
CODE = {name: code for code, name in enumerate(TISSUES)}

# Stacks of ellipses, mm of the standard patient: z (up), centre x (left), centre y (front), radius x, radius y.
TORSO = ((150, 0, 0, 130, 80), (185, 0, -4, 160, 96), (235, 0, -8, 166, 104), (300, 0, -4, 150, 98),
         (365, 0, 2, 138, 98), (450, 0, 2, 146, 104), (540, 0, 0, 154, 106), (600, 0, -6, 164, 96),
         (635, 0, -10, 168, 78), (655, 0, -12, 140, 66), (676, 0, -10, 82, 60), (695, 0, -6, 60, 58),
         (760, 0, -4, 56, 60))
CAGE = ((400, 0, 6, 112, 78), (450, 0, 4, 124, 84), (540, 0, 2, 128, 86), (600, 0, -4, 110, 74), (645, 0, -10, 72, 50),
        (672, 0, -14, 30, 22))
BELLY = ((188, 0, 0, 20, 18), (215, 0, 0, 64, 54), (250, 0, 4, 88, 62), (310, 0, 10, 112, 72), (440, 0, 8, 120, 80))
LUNG = ((415, 84, -46, 10, 14), (440, 78, -36, 34, 36), (500, 72, -4, 50, 72), (570, 68, -4, 50, 72),
        (625, 54, -10, 40, 52), (655, 42, -16, 24, 32), (672, 40, -18, 6, 8))
SPINE = ((240, 0, -70, 18, 14), (290, 0, -50, 25, 19), (370, 0, -46, 24, 18), (470, 0, -62, 20, 17),
         (560, 0, -68, 18, 16), (650, 0, -48, 14, 12), (710, 0, -30, 12, 11), (752, 0, -30, 10, 10))
LEG = ((-20, 80, -4, 70, 76), (100, 84, -6, 78, 86), (190, 84, -8, 82, 94), (240, 84, -8, 60, 80), (262, 84, -8, 9, 30))
FEMUR = ((-20, 86, 0, 14, 14), (150, 98, 0, 15, 15), (200, 112, -2, 20, 20), (226, 114, -4, 8, 8))
ARM = ((590, 150, -10, 8, 14), (625, 152, -10, 34, 36), (700, 140, -6, 38, 40), (800, 130, 2, 34, 36),
       (960, 118, 12, 29, 30))
# Paths: x, y, z.
COLON = ((-92, 0, 268), (-96, 2, 372), (-50, 52, 372), (20, 60, 356), (84, 20, 400), (96, -4, 300),
         (70, 4, 258), (20, -20, 250))
AORTA = ((-6, 18, 545), (-10, 10, 600), (18, -35, 601), (14, -38, 455), (10, -22, 290))

# Where lesions grow: share, then places as centre, half spread (x is mirrored in half of them), largest radius, all mm.
SITES = {
    "lung": (.20, ((72, -8, 565), (20, 34, 55), 32)),
    "liver": (.15, ((62, 8, 440), (36, 34, 28), 34)),
    "node": (.20, ((8, 2, 598), (16, 14, 24), 26), ((118, -8, 612), (12, 12, 16), 22),
             ((12, -18, 345), (14, 10, 40), 26), ((66, 52, 200), (10, 8, 14), 20), ((42, -4, 690), (6, 8, 14), 16)),
    "bone": (.15, ((0, -48, 330), (4, 4, 40), 22), ((0, -64, 520), (4, 4, 60), 22), ((82, -24, 285), (8, 14, 16), 22),
             ((98, 0, 130), (4, 3, 50), 20)),
    "soft": (.18, ((84, -20, 95), (24, 30, 55), 34), ((84, -84, 235), (24, 10, 24), 32),
             ((46, -86, 400), (10, 6, 60), 24)),
    "touching": (.12, ((40, 18, 505), (38, 34, 44), 24), ((0, 20, 214), (38, 33, 29), 24))}  # here radii of the organ

# FLAIR, T1w, T1gd, T2w of: outside, fluid, grey matter, white matter, edema, non-enhancing core, enhancing rim.
MRI = np.array(((0, 0, 0, 0), (.16, .22, .22, 1), (.58, .5, .52, .56), (.48, .68, .7, .42), (1, .46, .47, .76),
                (.66, .34, .36, 1.02), (.74, .42, 1.15, .9)), np.float32)
MRI_LABELS = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumor"}


class PetCtStudy(NamedTuple):
    ct: np.ndarray      # (X, Y, Z) float32, HU
    suv: np.ndarray     # (X, Y, Z) float32
    seg: np.ndarray     # (X, Y, Z) uint8, 1 in tumor
    affine: np.ndarray  # (4, 4), voxel to scanner mm
    name: str
    patient: str        # two visits share a patient


class BrainStudy(NamedTuple):
    image: np.ndarray   # (X, Y, Z, 4) float32: FLAIR, T1w, T1gd, T2w
    seg: np.ndarray     # (X, Y, Z) uint8, codes of MRI_LABELS
    affine: np.ndarray  # (4, 4), voxel to scanner mm
    name: str


def smooth_noise(rng: np.random.Generator, shape, cell) -> np.ndarray:
    """Random field (*shape) of about unit variance: cubic B-splines over normal values every `cell[axis]` voxels."""
    field = rng.standard_normal([int(n / c) + 4 for n, c in zip(shape, cell)], dtype=np.float32)
    for n, c in zip(shape, cell):
        k, u = np.divmod(np.arange(n) / c, 1)
        weights = np.zeros((n, field.shape[0]), np.float32)
        for j, w in enumerate(((1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, -3 * u**3 + 3 * u**2 + 3 * u + 1, u**3)):
            weights[np.arange(n), k.astype(int) + j] = w / 6
        field = np.tensordot(field, weights, (0, 1))  # the axis just done goes last: after three all are in place
    return field / .33


class _Canvas:
    """A label map (X, Y, Z) to paint on; `xyz` are the bent anatomical coordinates of its voxels, mm."""

    def __init__(self, rng, pose_rng, shape, spacing, size, low):
        self.rng, self.spacing, self.label = rng, np.array(spacing), np.zeros(shape, np.uint8)
        self.axes = [(lo + np.arange(n) * s) / k for lo, n, s, k in zip(low, shape, spacing, size)]
        shift, lean = pose_rng.normal(0, (3, 3, 4)), (*pose_rng.normal(0, .008, 2), 0)  # how the patient lies this time
        self.xyz, self.reach = [], []
        straight = np.meshgrid(*(a.astype(np.float32) for a in self.axes), indexing="ij", sparse=True)
        for a in range(3):
            bend = smooth_noise(rng, shape, 110 / self.spacing) + smooth_noise(rng, shape, 28 / self.spacing) / 4
            bend = (6, 6, 3)[a] * bend + (shift[a] + lean[a] * (self.axes[2] - 450)).astype(np.float32)
            self.xyz.append(straight[a] + bend)
            self.reach.append(np.abs(bend).max())

    def box(self, low, high) -> tuple[slice, ...]:
        """The voxels that may hold points between two corners, mm."""
        return tuple(slice(*np.searchsorted(a, (lo - r, hi + r)))
                     for a, lo, hi, r in zip(self.axes, low, high, self.reach))

    def paint(self, box, level, layers, over):
        """layers: (share of the shape's radius, tissue), outermost first; `over`: the tissues that give way."""
        view = self.label[box]
        free = np.isin(view, [CODE[t] for t in over]) if over else True
        for share, tissue in layers:
            view[(level <= share * share) & free] = CODE[tissue]

    def blob(self, centre, radii, *layers, to=None, over=(), turn=(0, 0), wobble=1.):
        """An ellipsoid turned about z, then y (degrees), or a rod from `centre` to `to`.

        `wobble` scales how much place (2.5 mm) and size (5 %) of an ellipsoid differ between patients."""
        centre, radii = np.array(centre, np.float32), np.broadcast_to(radii, 3).astype(np.float32)
        if to is None:
            centre += wobble * self.rng.normal(0, 2.5, 3).astype(np.float32)
            radii *= 1 + wobble * self.rng.normal(0, .05, 3).astype(np.float32)
        rod = np.zeros(3, np.float32) if to is None else np.subtract(to, centre, dtype=np.float32)
        (cz, cy), (sz, sy) = np.cos(np.radians(turn)), np.sin(np.radians(turn))
        rotation = np.array(((cz, -sz, 0), (sz, cz, 0), (0, 0, 1))) @ np.array(((cy, 0, sy), (0, 1, 0), (-sy, 0, cy)))
        half = np.sqrt((rotation**2 * radii**2).sum(1))
        box = self.box(centre + np.minimum(rod, 0) - half, centre + np.maximum(rod, 0) + half)
        offset = [x[box] - c for x, c in zip(self.xyz, centre)]
        if to is not None:
            along = np.clip(sum(o * r for o, r in zip(offset, rod)) / (rod @ rod), 0, 1)
            offset = [o - along * r for o, r in zip(offset, rod)]
        to_unit = (rotation / radii).T.astype(np.float32)
        level = sum((row[0] * offset[0] + row[1] * offset[1] + row[2] * offset[2])**2 for row in to_unit)
        self.paint(box, level, layers, over)

    def stack(self, rows, *layers, over=(), side=1, comb=None):
        """Ellipses along z; side -1 mirrors. comb (period, share, slope), mm: only bands of z + slope * y."""
        rows = np.array(rows, np.float32) * (1, side, 1, 1, 1)
        first, last = np.searchsorted(self.axes[2], rows[[0, -1], 0])
        profile = [np.interp(self.axes[2][first:last], rows[:, 0], column) for column in rows[:, 1:].T]
        cx, cy, rx, ry = ndimage.gaussian_filter1d(profile, 6 / self.spacing[2], axis=1).astype(np.float32)
        low, high = [(cx - 1.1 * rx).min(), (cy - 1.1 * ry).min(), 0], [(cx + 1.1 * rx).max(), (cy + 1.1 * ry).max(), 0]
        box = *self.box(low, high)[:2], slice(first, last)
        u, v = ((self.xyz[0][box] - cx) / rx)**2, ((self.xyz[1][box] - cy) / ry)**2
        level = u + v - .35 * np.minimum(u * v, 1)  # squarer than an ellipse, as a chest is
        if comb:
            level[(self.xyz[2][box] + comb[2] * self.xyz[1][box]) % comb[0] > comb[1] * comb[0]] = np.inf
        self.paint(box, level, layers, over)


def _frame(c: _Canvas, fat: float) -> None:
    """Outline, muscle, skeleton and head; `fat` is the share of the torso's radius under the skin."""
    spine, arm, hollow = np.array(SPINE), np.array(ARM), ((1, "bone"), (.75, "marrow"))
    for s in (-1, 1):
        c.stack(ARM, (1, "fat"), (.97 - .6 * fat, "muscle"), side=s)
    c.stack(TORSO, (1, "fat"))
    for s in (-1, 1):
        c.stack(LEG, (1, "fat"), (1 - fat, "muscle"), side=s)
    c.stack(TORSO, (1 - fat, "muscle"))
    c.stack(BELLY, (1, "fat"))
    c.stack(CAGE, (1.06, "bone"), comb=(27, .42, .45))  # ribs, and what is within
    c.stack(CAGE, (1, "fat"))
    for s in (-1, 1):
        c.stack(arm * (1, 1, 1, .3, .3), (1, "bone"), (.5, "marrow"), side=s)
        c.blob((s * 15, 44, 640), 7, (1, "bone"), to=(s * 140, -18, 648), over=("muscle", "fat"))  # clavicle
        c.blob((s * 92, -66, 600), (42, 5, 52), (1, "bone"), over=("muscle", "fat"), turn=(s * 25, 0))  # shoulder blade
        c.blob((s * 80, -26, 288), (11, 52, 56), *hollow, turn=(s * -35, s * 14), wobble=.3)  # ilium
        c.blob((s * 66, 14, 224), 9, *hollow, to=(0, 48, 198))  # pubis
        c.blob((s * 70, -28, 222), 13, *hollow, to=(s * 52, -44, 178))  # ischium
        c.blob((s * 84, -6, 230), 31, (1, "bone"), (.82, "disc"), wobble=.3)  # hip joint
        c.stack(FEMUR, (1, "bone"), (.6, "marrow"), side=s)
        c.blob((s * 84, -6, 230), 14, *hollow, to=(s * 108, -2, 208))
        c.blob((s * 84, -6, 230), 23, *hollow, wobble=.3)
        c.stack(spine[:3] * (1, 1, 1, .65, 1) + (0, 35, 2, 0, 4), (1, "muscle"), over=("fat",), side=s)  # psoas
    c.stack(spine * (1, 1, 1, .45, .7) - (0, 0, 28, 0, 0), (1, "bone"), comb=(29, .6, .5))  # spinous processes
    c.stack(spine, (1, "disc"))
    c.stack(spine, (1, "bone"), (.86, "marrow"), comb=(29, .78, 0))
    c.stack(spine * (1, 1, 1, .36, .36) - (0, 0, 23, 0, 0), (1, "content"))
    c.blob((0, -74, 250), (42, 16, 44), *hollow)  # sacrum
    c.blob((0, 82, 500), 9, *hollow, to=(0, 60, 632))  # sternum
    c.blob((0, 18, 752), (54, 68, 64), (1, "fat"), (.94, "muscle"), wobble=.3)  # face
    c.blob((0, 2, 800), (74, 93, 88), (1, "fat"), (.95, "skull"), (.86, "fluid"), (.84, "brain"), wobble=0)
    c.blob((0, 62, 748), (24, 16, 20), (1, "bone"), (.85, "gas"))  # sinuses
    for s in (-1, 1):
        c.blob((s * 9, -2, 810), (5, 30, 14), (1, "fluid"), turn=(s * -8, 0))  # ventricle
        c.blob((s * 31, 74, 770), 13, (1, "content"))  # eye
        c.blob((s * 46, 20, 742), 8, (1, "bone"), to=(s * 16, 74, 716))  # jaw
    c.blob((0, 6, 740), 8, (1, "gas"), to=(0, 8, 690))


def _organs(c: _Canvas) -> None:
    """Organs of chest, belly and pelvis."""
    rng, inside, soft = c.rng, ("fat", "lung"), ("fat", "muscle")
    for s in (-1, 1):
        c.stack(LUNG, (1, "lung"), side=s, over=("fat",))
    c.blob((-8, 26, 522), (44, 38, 46), (1, "blood"), over=inside)  # right heart
    c.blob((36, 16, 505), (37, 33, 43), (1, "heart"), (.66, "blood"), over=(*inside, "blood"), turn=(25, -25))
    for a, b, radius in zip(AORTA, AORTA[1:], (14, 13, 12, 10)):
        c.blob(a, radius, (1, "blood"), to=b, over=inside)
    c.blob((-16, -20, 460), 10, (1, "blood"), to=(-14, -22, 290), over=("fat",))  # inferior vena cava
    for s in (-1, 1):
        c.blob((s * 8, -4, 566), 9, (1, "blood"), to=(s * 44, -10, 548), over=inside)  # pulmonary vessels
        c.blob((s * 10, -22, 290), 7, (1, "blood"), to=(s * 60, 38, 205), over=soft)  # iliac vessels
        c.blob((0, -14, 580), 7, (1, "gas"), to=(s * 34, -18, 556), over=inside)  # bronchus
        c.blob((s * 14, 6, 694), 9, (1, "throat"), to=(s * 20, 0, 710), over=soft)
        c.blob((s * 52, -18, 672), 10, (1, "brown fat"), to=(s * 84, -26, 646), over=(*soft, "lung"))
    c.blob((0, 6, 700), 9, (1, "gas"), to=(0, -14, 578), over=(*soft, "lung"))  # trachea

    c.blob((55, 30, 432), (32, 36, 44), (1, "stomach"), (.72, "content"), over=inside, turn=(0, 25))
    c.blob((58, 46, 446), (16, 12, 16), (1, "gas"), over=("content",))
    c.blob((-56, 6, 436), (68, 74, 66), (1, "liver"), over=inside)
    c.blob((4, 38, 452), (54, 38, 32), (1, "liver"), over=inside)  # its left lobe
    c.blob((92, -38, 440), (22, 36, 42), (1, "spleen"), over=inside, turn=(0, 10))
    for s in (-1, 1):
        c.blob((s * 64, -40, 376), (27, 24, 50), (1, "kidney"), (.5, "calyx"), over=("fat", "liver"), turn=(0, s * -12))
    colon = np.array(COLON) + rng.normal(0, 5, (8, 3))
    for a, b in zip(colon, colon[1:]):
        filled = rng.choice((0, .55, .75)), rng.choice(("gas", "content"))
        c.blob(a, rng.uniform(13, 19), (1, "bowel"), filled, to=b, over=("fat",))
    for _ in range(16):  # small bowel
        a = rng.normal((0, 28, 305), (34, 16, 26))
        c.blob(a, rng.uniform(9, 14), (1, "bowel"), (.5, "content"), to=a + rng.normal(0, 24, 3), over=("fat",))
    c.blob((0, -12, 214), (30, 20, 24), (1, "muscle"), over=("fat",))  # uterus or prostate
    c.blob((0, -42, 240), 13, (1, "bowel"), (.5, "gas"), to=(0, -46, 190), over=soft)  # rectum
    full = rng.uniform(.75, 1.2)
    c.blob((0, 20, 212 + 8 * full), np.multiply((36, 29, 27), full), (1, "bladder"), over=(*soft, "bowel", "content"))


def _lesions(c: _Canvas, key, visit_rng, uptake, ct, suv) -> np.ndarray:
    """Paint 1 to 6 lesions into `ct` (HU) and `suv`; return their mask, uint8. A patient's visits share `key`."""
    seg, kept = np.zeros(ct.shape, np.uint8), [CODE[t] for t in ("air", "brain", "heart", "bladder", "blood")]
    growth = visit_rng.uniform(.9, 1.1)
    for j in range(1 + np.random.default_rng(key).binomial(5, .35)):
        rng = np.random.default_rng([*key, j])
        kind = rng.choice(list(SITES), p=[site[0] for site in SITES.values()])
        centre, spread, largest = SITES[kind][rng.integers(1, len(SITES[kind]))]
        radius = growth * (largest * rng.uniform(.72, 1) if j == 0 else np.clip(rng.lognormal(2.65, .35), 9, largest))
        peak = np.clip(rng.lognormal(2.2, .35), 4 if radius > 14 else 7, 15) * visit_rng.uniform(.85, 1.15)
        if kind == "touching":
            bladder = centre[2] < 300
            direction = rng.normal(0, 1, 3) + (0, 0, bladder)  # rather above the bladder than below
            centre = centre + direction / np.linalg.norm(direction) * (np.array(spread) + .55 * radius)
            peak = np.clip(uptake[CODE["bladder" if bladder else "heart"]], 2.5, 15) * rng.uniform(.9, 1.1)
        else:
            side = -1 if kind == "liver" else rng.choice((-1, 1))
            centre = (centre + np.multiply(spread, rng.uniform(-1, 1, 3))) * (side, 1, 1)
        lobes = [(centre, radius * rng.uniform(.75, 1.2, 3))]
        for _ in range(rng.integers(3)):
            lobes.append((centre + rng.normal(0, .5 * radius, 3), radius * rng.uniform(.5, .7, 3)))
        box = c.box(centre - 1.7 * radius, centre + 1.7 * radius)
        level = np.sqrt(np.min([sum(((x[box] - o) / r)**2 for x, o, r in zip(c.xyz, *lobe)) for lobe in lobes], axis=0))
        level *= 1 + .16 * smooth_noise(rng, level.shape, np.maximum(.6 * radius / c.spacing, 1))
        mask = (level <= 1) & ~np.isin(c.label[box], kept)
        seg[box][mask] = 1
        ct[box][mask] = rng.choice((90, 700)) if kind == "bone" else 40 if kind == "liver" else rng.uniform(65, 80)
        suv[box][mask] = (peak * (1 + .1 * smooth_noise(rng, level.shape, 12 / c.spacing)))[mask]
        if radius > 17 and kind != "touching" and rng.random() < .3:  # necrosis: cold, but tumor
            core = mask & (level <= .55)
            ct[box][core], suv[box][core] = 20, .15 * peak
    return seg


def _visit(index: int) -> tuple[int, str, str]:
    """Patient number, patient and study name: of every four studies the last two are two visits of one patient."""
    number = index // 4 * 3 + min(index % 4, 2)
    return number, f"PETCT_{number:04d}", f"PETCT_{number:04d}_visit{1 + (index % 4 == 3)}"


def petct_study(index: int, seed: int = 0, spacing=(4., 4., 4.), healthy: bool | None = None) -> PetCtStudy:
    """Study `index`: head to mid-thigh, arms up, on a grid of `spacing` mm (96 x 72 x about 222 voxels at 4 mm).

    One of every three patients, drawn by chance, is healthy and has an empty `seg`; `healthy` overrides the draw.
    """
    number, patient, name = _visit(index)
    if healthy is None:
        healthy = number % 3 == np.random.default_rng([seed, 0, number // 3]).integers(3)
    rng, pose = np.random.default_rng([seed, 1, number]), np.random.default_rng([seed, 2, index])
    size = rng.uniform((.92, .92, .95), (1.07, 1.08, 1.03))  # width, depth, height of this patient
    extent = np.array((384, 288, 900 * size[2]))
    shape = tuple(np.round(extent / spacing).astype(int))
    canvas = _Canvas(rng, pose, shape, spacing, size, low=(-extent[0] / 2, -extent[1] / 2, 4))
    _frame(canvas, fat=rng.uniform(.06, .15))
    _organs(canvas)

    hu, low, high, share, otherwise = np.array(list(TISSUES.values()), np.float32).T
    uptake = np.where(pose.random(len(hu)) < share, pose.uniform(low, high), otherwise).astype(np.float32)
    ct, suv = hu[canvas.label], uptake[canvas.label]
    texture = smooth_noise(pose, shape, 9 / canvas.spacing)
    ct += np.where(canvas.label == CODE["lung"], 90 * np.maximum(texture - .8, 0), 5 * texture)  # vessels in the lung
    suv *= 1 + .1 * texture
    suv[(canvas.label == CODE["brain"]) & (np.abs(texture) < .35)] *= .65  # white matter
    seg = np.zeros(shape, np.uint8) if healthy else _lesions(canvas, [seed, 3, number], pose, uptake, ct, suv)

    scanner, recon = np.sqrt((6.5 / 2.355)**2 - 2**2), 2.  # standard deviations, mm: 6.5 FWHM in all
    suv = ndimage.gaussian_filter(suv, scanner / canvas.spacing)
    suv += .2 * np.sqrt(suv + .02) * pose.standard_normal(shape, dtype=np.float32)
    suv = np.maximum(ndimage.gaussian_filter(suv, recon / canvas.spacing), 0)
    ct = ndimage.gaussian_filter(ct, 1.8 / canvas.spacing) + 12 * pose.standard_normal(shape, dtype=np.float32)
    affine = np.diag((-spacing[0], *spacing[1:], 1.))  # world x grows to the right in LAS
    affine[:3, 3] = extent[0] / 2, -extent[1] / 2 - 160, -900. - pose.integers(80)
    # Whole HU and SUV in steps of 1/512: the files hold exactly these values, and compress.
    return PetCtStudy(np.clip(np.round(ct), -1024, 3071), np.round(suv * 512) / 512, seg, affine, name, patient)


def brain_study(index: int, seed: int = 0, spacing=(2., 2., 2.)) -> BrainStudy:
    """Case `index`: skull-stripped brain with one glioma-like tumor, about 80 x 96 x 78 voxels at 2 mm, 0 outside.

    Edema is bright on FLAIR, the core brighter on T2w, its enhancing rim on T1gd. Bias field and scale are arbitrary.
    """
    rng, spacing = np.random.default_rng([seed, 4, index]), np.array(spacing)
    half = rng.uniform((64, 80, 62), (72, 90, 70))  # mm: left-right, back-front, down-up
    shape = tuple(np.round((2 * half + 24) / spacing).astype(int))
    axes = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing)], indexing="ij", sparse=True)
    x, y, z = (a + 2.5 * smooth_noise(rng, shape, 40 / spacing) for a in axes)
    # Depth below the surface, as a share of the way to the centre.
    depth = 1 - np.sqrt((x / half[0])**2 + (y / half[1])**2 + (np.where(z < 0, 1.15, 1) * z / half[2])**2)
    fold = np.abs(smooth_noise(rng, shape, 9 / spacing))  # near 0 in the folds of the cortex
    nuclei = sum(((np.abs(x) - 20) / 12)**2 + ((y - at) / 16)**2 + (z / 13)**2 < 1 for at in (-14, 14)) > 0
    horns = ((np.abs(x) - 11 - .15 * np.abs(y)) / 5)**2 + (y / 36)**2 + ((z - 10 + .006 * y * y) / 10)**2 < 1
    tissue = np.full(shape, 3)
    tissue[(depth < .13 + .12 * (fold < .5)) | (fold < .22) & (depth < .38) | nuclei] = 2
    tissue[(fold < .3) & (depth < .1) | (depth < .02) | horns | (np.abs(x) < 1.6) & (depth < .45) & (z > -20)] = 1
    tissue[depth < 0] = 0

    radius, direction = rng.uniform(12, 22), rng.normal(0, 1, 3)  # mm, of the core
    centre = half * rng.uniform(.3, .58) * direction / np.linalg.norm(direction) * (1, 1, .8)
    core = np.sqrt(sum(((a - m) / r)**2 for a, m, r in zip((x, y, z), centre, radius * rng.uniform(.8, 1.25, 3))))
    core *= 1 + .13 * smooth_noise(rng, shape, .6 * radius / spacing)  # distance from the middle, 1 at the core's edge
    rim = rng.uniform(.6, .85) + .12 * smooth_noise(rng, shape, 14 / spacing)  # inner edge; above 1 the rim has a gap
    reach = rng.uniform(1.45, 1.95) + .22 * smooth_noise(rng, shape, 22 / spacing) - .35 * (tissue == 2)  # less in grey
    grows = (tissue > 1) | (tissue == 1) & (core < 1) & (depth > .02)
    seg = np.select((grows & (core < np.minimum(rim, 1)), grows & (core < 1), grows & (core < reach)), (2, 3, 1), 0)
    image = MRI[np.where(seg > 0, seg + 3, tissue)]  # (X, Y, Z, 4)

    for channel, scale in enumerate(rng.uniform(200, 1200, 4)):
        gain = scale * (1 + .09 * smooth_noise(rng, shape, 90 / spacing))  # bias field
        gain *= 1 + .04 * smooth_noise(rng, shape, 6 / spacing)
        signal = ndimage.gaussian_filter(image[..., channel], 1 / spacing) * gain
        signal += .03 * scale * rng.standard_normal(shape, dtype=np.float32)
        image[..., channel] = np.where(tissue > 0, np.maximum(np.round(signal), 1), 0)
    affine = np.diag((*spacing, 1.))  # RAS
    affine[:3, 3] = -(np.array(shape) - 1) / 2 * spacing
    return BrainStudy(image, seg.astype(np.uint8), affine, f"BRATS_{index + 1:03d}")


def _store(paths: list[Path], seed: int, index: int, spacing, make) -> None:
    """Write what `make() -> (arrays, affine)` returns as NIfTI, unless all is there; headers say how it was made."""
    text = f"phantom 1, seed {seed}, study {index}, {'x'.join(f'{s:g}' for s in spacing)} mm"
    if all(path.exists() for path in paths):
        for path in paths:
            if (found := nib.load(path).header["descrip"].item().decode()) != text:
                raise UserError(f"{path} holds '{found}', not '{text}': choose another folder, or delete this one")
        return
    arrays, affine = make()
    for path, array in zip(paths, arrays):
        image = nib.Nifti1Image(array, affine)
        image.header["descrip"] = text
        image.header.set_xyzt_units("mm")
        with atomic_write(path) as part:
            part.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def write_petct(root, n: int, seed: int = 0, spacing=(4., 4., 4.)) -> list[Path]:
    """Write `n` studies in AutoPET's layout, root/PETCT_0002/visit1/{CTres,SUV,SEG}.nii.gz; return the study folders.

    Complete studies are kept. Raises UserError where they were made with another seed or spacing.
    """
    def make():
        study = petct_study(index, seed, spacing)
        return (study.ct.astype(np.int16), study.suv, study.seg), study.affine

    visits = [_visit(index)[1:] for index in range(n)]
    folders = [Path(root, patient, name.removeprefix(f"{patient}_")) for patient, name in visits]
    for index, folder in enumerate(folders):
        _store([folder / f"{kind}.nii.gz" for kind in ("CTres", "SUV", "SEG")], seed, index, spacing, make)
    return folders


def write_brain(root, n: int, seed: int = 0, spacing=(2., 2., 2.)) -> Path:
    """Write `n` cases in the layout of MSD Task01 (dataset.json, imagesTr, labelsTr); else as `write_petct`."""
    def make():
        study = brain_study(index, seed, spacing)
        return (study.image.astype(np.int16), study.seg), study.affine

    files = [f"BRATS_{index + 1:03d}.nii.gz" for index in range(n)]
    for index, file in enumerate(files):
        _store([Path(root, "imagesTr", file), Path(root, "labelsTr", file)], seed, index, spacing, make)
    modality = "FLAIR", "T1w", "t1gd", "T2w"
    pairs = [{"image": f"./imagesTr/{f}", "label": f"./labelsTr/{f}"} for f in files]
    content = {"name": "synthetic brain tumors", "tensorImageSize": "4D", "modality": dict(zip("0123", modality)),
               "labels": MRI_LABELS, "numTraining": n, "numTest": 0, "training": pairs, "test": []}
    with atomic_write(Path(root, "dataset.json")) as part:
        part.write_text(json.dumps(content, indent=1))
    return Path(root)
