"""Synthetic PET/CT and brain MR studies, so that everything here runs without downloading data.

1. **Anatomy** is a label map: ellipsoids, rods and stacks of ellipses, in millimetres of a standard
   patient, painted one over the other. Patients differ in size, fat and organs, and smooth noise
   bends all coordinates.
2. `TISSUES` turns labels into Hounsfield units (CT) and standardised uptake values (SUV, PET). FDG
   shows glucose use: brain, heart muscle, kidneys and bladder are brighter than most tumors, and
   throat, bowel or brown fat light up in some patients. So no SUV threshold finds the tumors; only
   their place and shape do.
3. **Lesions** are noisy blobs, some lobed or with a cold core, in lung, lymph nodes, liver, bone or
   soft tissue. One in eight touches the heart or the bladder and has the same uptake: PET cannot
   show this border, but the density in CT can.
4. **Physics.** PET has a point spread of 6.5 mm (full width at half maximum) and noise with a
   variance proportional to activity, correlated by the reconstruction filter. CT has less blur and
   12 HU of noise. The ground truth is not blurred.

`Harder` PET/CT studies, on demand, have what real ones have in addition: benign uptake that only CT
explains, more noise in PET, and a CT in another state of breathing than the PET.

A study is a pure function of (seed, index, spacing, harder). Array axes point left, anterior,
superior (LAS) in PET/CT, and right, anterior, superior (RAS) in brain MR.
"""

import gzip
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from numpy.random import default_rng
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from files import UserError, atomic_write, clean_parts

TISSUES = {  # HU, SUV from, SUV to, share of the studies that show it, SUV in the others
    "air": (-1000, 0, 0, 1, 0), "fat": (-100, .25, .4, 1, 0),
    "muscle": (50, .45, .7, 1, 0), "lung": (-800, .3, .5, 1, 0),
    "bone": (600, .5, .9, 1, 0), "marrow": (260, .9, 1.5, 1, 0),
    "skull": (900, .4, .7, 1, 0), "disc": (85, .5, .7, 1, 0),
    "brain": (35, 7.5, 12, 1, 0), "fluid": (8, .5, 1, 1, 0),
    "blood": (42, 1.2, 1.8, 1, 0), "heart": (48, 4, 10, .55, 1.7),
    "liver": (60, 1.8, 2.6, 1, 0), "spleen": (52, 1.5, 2.1, 1, 0),
    "stomach": (45, .9, 2.2, 1, 0), "bowel": (40, .8, 2.4, 1, 0),
    "content": (15, .4, .6, 1, 0), "gas": (-850, .2, .3, 1, 0),
    "kidney": (35, 2.5, 4.5, 1, 0), "calyx": (12, 4.5, 8, 1, 0),
    "bladder": (5, 6, 25, 1, 0), "throat": (52, 2.5, 5.5, .5, .8),
    "brown fat": (-90, 3, 8, .25, .35),
}
CODE = {name: code for code, name in enumerate(TISSUES)}

# Stacks of ellipses: z (up), centre x (left), centre y (front), radius x, radius y, in mm.
TORSO = ((150, 0, 0, 130, 80), (185, 0, -4, 160, 96), (235, 0, -8, 166, 104),
         (300, 0, -4, 150, 98), (365, 0, 2, 138, 98), (450, 0, 2, 146, 104),
         (540, 0, 0, 154, 106), (600, 0, -6, 164, 96), (635, 0, -10, 168, 78),
         (655, 0, -12, 140, 66), (676, 0, -10, 82, 60), (695, 0, -6, 60, 58),
         (760, 0, -4, 56, 60))
CAGE = ((400, 0, 6, 112, 78), (450, 0, 4, 124, 84), (540, 0, 2, 128, 86),
        (600, 0, -4, 110, 74), (645, 0, -10, 72, 50), (672, 0, -14, 30, 22))
BELLY = ((188, 0, 0, 20, 18), (215, 0, 0, 64, 54), (250, 0, 4, 88, 62),
         (310, 0, 10, 112, 72), (440, 0, 8, 120, 80))
LUNG = ((415, 84, -46, 10, 14), (440, 78, -36, 34, 36), (500, 72, -4, 50, 72),
        (570, 68, -4, 50, 72), (625, 54, -10, 40, 52), (655, 42, -16, 24, 32),
        (672, 40, -18, 6, 8))
SPINE = ((240, 0, -70, 18, 14), (290, 0, -50, 25, 19), (370, 0, -46, 24, 18),
         (470, 0, -62, 20, 17), (560, 0, -68, 18, 16), (650, 0, -48, 14, 12),
         (710, 0, -30, 12, 11), (752, 0, -30, 10, 10))
LEG = ((-20, 80, -4, 70, 76), (100, 84, -6, 78, 86), (190, 84, -8, 82, 94),
       (240, 84, -8, 60, 80), (262, 84, -8, 9, 30))
FEMUR = ((-20, 86, 0, 14, 14), (150, 98, 0, 15, 15), (200, 112, -2, 20, 20),
         (226, 114, -4, 8, 8))
ARM = ((590, 150, -10, 8, 14), (625, 152, -10, 34, 36), (700, 140, -6, 38, 40),
       (800, 130, 2, 34, 36), (960, 118, 12, 29, 30))
# Paths: x, y, z in mm.
COLON = ((-92, 0, 268), (-96, 2, 372), (-50, 52, 372), (20, 60, 356),
         (84, 20, 400), (96, -4, 300), (70, 4, 258), (20, -20, 250))
AORTA = ((-6, 18, 545), (-10, 10, 600), (18, -35, 601), (14, -38, 455),
         (10, -22, 290))

# Sites of lesions: their share, then places as (centre, half spread, largest radius), all in mm.
# In half of the lesions, x is mirrored; not in the liver.
SITES = {
    "lung": (.20, ((72, -8, 565), (20, 34, 55), 32)),
    "liver": (.15, ((62, 8, 440), (36, 34, 28), 34)),
    "node": (.20, ((8, 2, 598), (16, 14, 24), 26),
             ((118, -8, 612), (12, 12, 16), 22), ((12, -18, 345), (14, 10, 40), 26),
             ((66, 52, 200), (10, 8, 14), 20), ((42, -4, 690), (6, 8, 14), 16)),
    "bone": (.15, ((0, -48, 330), (4, 4, 40), 22), ((0, -64, 520), (4, 4, 60), 22),
             ((82, -24, 285), (8, 14, 16), 22), ((98, 0, 130), (4, 3, 50), 20)),
    "soft": (.18, ((84, -20, 95), (24, 30, 55), 34),
             ((84, -84, 235), (24, 10, 24), 32), ((46, -86, 400), (10, 6, 60), 24)),
    # Here the centre and the radii of the organ that is touched: heart, bladder.
    "touching": (.12, ((40, 18, 505), (38, 34, 44), 24),
                 ((0, 20, 214), (38, 33, 29), 24)),
}

# FLAIR, T1w, T1gd and T2w signal of: outside, fluid, grey matter, white matter, edema,
# non-enhancing core, enhancing rim.
MRI = ((0, 0, 0, 0), (.16, .22, .22, 1), (.58, .5, .52, .56), (.48, .68, .7, .42),
       (1, .46, .47, .76), (.66, .34, .36, 1.02), (.74, .42, 1.15, .9))
LABELS = ("background", "edema", "non-enhancing tumor", "enhancing tumor")
MRI_LABELS = dict(zip("0123", LABELS))


class Harder(NamedTuple):
    """What makes a PET/CT phantom harder; the defaults change nothing."""
    uptake: int = 0  # benign foci per study: uptake of a lesion, density of fat or urine
    noise: float = 1.  # factor of the PET's noise
    breathing: float = 0.  # mm, largest shift along the body between CT and PET, at the diaphragm

    def __str__(self) -> str:
        """The options that differ from the defaults; "" if none does."""
        names = ("uptake", "noise", "breathing")
        pairs = zip(names, self, USUAL, strict=True)
        return ", ".join(f"{name} {value:g}" for name, value, usual in pairs if value != usual)


USUAL = Harder()


class PetCtStudy(NamedTuple):
    """One synthetic PET/CT study; all arrays lie on one grid."""
    ct: np.ndarray  # (X, Y, Z) float32, HU
    suv: np.ndarray  # (X, Y, Z) float32
    seg: np.ndarray  # (X, Y, Z) uint8, 1 in tumor
    affine: np.ndarray  # (4, 4), voxel to scanner mm
    name: str
    patient: str  # two visits share a patient


class BrainStudy(NamedTuple):
    """One synthetic brain MR study."""
    image: np.ndarray  # (X, Y, Z, 4) float32: FLAIR, T1w, T1gd, T2w
    seg: np.ndarray  # (X, Y, Z) uint8, codes of MRI_LABELS
    affine: np.ndarray  # (4, 4), voxel to scanner mm
    name: str


def smooth_noise(rng: np.random.Generator, shape, cell) -> np.ndarray:
    """Random field (*shape), variance about 1: B-splines over normal values every `cell` voxels."""
    knots = [int(n / c) + 4 for n, c in zip(shape, cell)]
    field = rng.standard_normal(knots, dtype=np.float32)
    for n, c in zip(shape, cell):
        k, u = np.divmod(np.arange(n) / c, 1)
        basis = (1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, -3 * u**3 + 3 * u**2 + 3 * u + 1, u**3
        weights = np.zeros((n, field.shape[0]), np.float32)
        for j, w in enumerate(basis):
            weights[np.arange(n), k.astype(int) + j] = w / 6
        # The new axis comes last, so after three rounds the axes are in order again.
        field = np.tensordot(field, weights, (0, 1))
    return field / .33


class _Canvas:
    """A label map (X, Y, Z) to paint on; `xyz` are the bent anatomical coordinates of voxels, mm.

    A layer is a tissue or (share of the shape's radius, tissue); layers go from the outermost
    inwards. `over`: the tissues that a shape may replace, () for all.
    """

    def __init__(self, rng, visit_rng, shape, spacing, size, low):
        self.rng = rng
        self.spacing = np.array(spacing)
        self.label = np.zeros(shape, np.uint8)
        self.side = 1
        grid = zip(low, shape, spacing, size)
        self.axes = [(lo + np.arange(n) * s) / k for lo, n, s, k in grid]
        shift = visit_rng.normal(0, (3, 3, 4))  # how the patient lies at this visit
        lean = (*visit_rng.normal(0, .008, 2), 0)
        straight = np.ix_(*(a.astype(np.float32) for a in self.axes))
        self.xyz = []
        self.reach = []  # the largest bend along each axis, mm
        for a in range(3):
            coarse = smooth_noise(rng, shape, 110 / self.spacing)
            bend = coarse + smooth_noise(rng, shape, 28 / self.spacing) / 4
            pose = shift[a] + lean[a] * (self.axes[2] - 450)
            bend = (6, 6, 3)[a] * bend + pose.astype(np.float32)
            self.xyz.append(straight[a] + bend)
            self.reach.append(np.abs(bend).max())

    def both_sides(self):
        """Run a loop twice, the first time with all shapes mirrored."""
        for self.side in (-1, 1):
            yield

    def box(self, low, high) -> tuple[slice, ...]:
        """The slices of voxels that may lie between two corners, given in mm."""
        ranges = zip(self.axes, low, high, self.reach)
        return tuple(slice(*np.searchsorted(a, (lo - r, hi + r))) for a, lo, hi, r in ranges)

    def paint(self, box, level, layers, over):
        """Paint by `level`: the squared share of the shape's radius."""
        view = self.label[box]
        free = np.isin(view, [CODE[t] for t in over]) if over else True
        for layer in layers:
            share, tissue = (1, layer) if isinstance(layer, str) else layer
            view[(level <= share * share) & free] = CODE[tissue]

    def blob(self, centre, radii, *layers, to=None, over=(), turn=(0, 0), wobble=1.):
        """Paint an ellipsoid, turned about z, then y (degrees), or a rod from `centre` to `to`.

        Places vary by 2.5 mm and radii by 5 % between patients, times `wobble`; rods do not vary.
        """
        mirror = (self.side, 1, 1)
        centre = np.multiply(centre, mirror).astype(np.float32)
        radii = np.broadcast_to(radii, 3).astype(np.float32)
        if to is None:
            centre += wobble * self.rng.normal(0, 2.5, 3).astype(np.float32)
            radii *= 1 + wobble * self.rng.normal(0, .05, 3).astype(np.float32)
            rod = np.zeros(3, np.float32)
        else:
            rod = np.subtract(np.multiply(to, mirror), centre, dtype=np.float32)
        angles = np.radians(np.multiply(turn, self.side))
        (cz, cy), (sz, sy) = np.cos(angles), np.sin(angles)
        about_z = np.array(((cz, -sz, 0), (sz, cz, 0), (0, 0, 1)))
        about_y = np.array(((cy, 0, sy), (0, 1, 0), (-sy, 0, cy)))
        rotation = about_z @ about_y
        half = np.sqrt((rotation**2 * radii**2).sum(1))
        box = self.box(centre + np.minimum(rod, 0) - half, centre + np.maximum(rod, 0) + half)
        offset = [x[box] - c for x, c in zip(self.xyz, centre)]
        if to is not None:  # the offset from the nearest point of the rod
            along = np.clip(sum(o * r for o, r in zip(offset, rod)) / (rod @ rod), 0, 1)
            offset = [o - along * r for o, r in zip(offset, rod)]
        x, y, z = offset
        to_unit = (rotation / radii).T.astype(np.float32)
        level = sum((row[0] * x + row[1] * y + row[2] * z) ** 2 for row in to_unit)
        self.paint(box, level, layers, over)

    def stack(self, rows, *layers, over=(), comb=None):
        """Paint ellipses along z. comb (period, share, slope), mm: only bands of z + slope * y."""
        rows = np.array(rows, np.float32) * (1, self.side, 1, 1, 1)
        first, last = np.searchsorted(self.axes[2], rows[[0, -1], 0])
        z = self.axes[2][first:last]
        profile = [np.interp(z, rows[:, 0], column) for column in rows[:, 1:].T]
        profile = gaussian_filter1d(profile, 6 / self.spacing[2], axis=1)
        cx, cy, rx, ry = profile.astype(np.float32)
        low = [(cx - 1.1 * rx).min(), (cy - 1.1 * ry).min(), 0]
        high = [(cx + 1.1 * rx).max(), (cy + 1.1 * ry).max(), 0]
        box = *self.box(low, high)[:2], slice(first, last)
        x, y, z = (axis[box] for axis in self.xyz)
        u = ((x - cx) / rx) ** 2
        v = ((y - cy) / ry) ** 2
        level = u + v - .35 * np.minimum(u * v, 1)  # squarer than an ellipse
        if comb:
            period, share, slope = comb
            level[(z + slope * y) % period > share * period] = np.inf
        self.paint(box, level, layers, over)


FAT = ("fat",)
SOFT = ("fat", "muscle")
INNER = ("fat", "lung")
HOLLOW = ("bone", (.75, "marrow"))


def _frame(c: _Canvas, fat: float) -> None:
    """Paint outline, muscle, skeleton and head; `fat`: share of the torso's radius that is fat."""
    spine = np.array(SPINE)
    for _ in c.both_sides():
        c.stack(ARM, "fat", (.97 - .6 * fat, "muscle"))
    c.stack(TORSO, "fat")
    for _ in c.both_sides():
        c.stack(LEG, "fat", (1 - fat, "muscle"))
    c.stack(TORSO, (1 - fat, "muscle"))
    c.stack(BELLY, "fat")
    c.stack(CAGE, (1.06, "bone"), comb=(27, .42, .45))  # ribs
    c.stack(CAGE, "fat")
    for _ in c.both_sides():
        c.stack(np.array(ARM) * (1, 1, 1, .3, .3), "bone", (.5, "marrow"))
        c.blob((15, 44, 640), 7, "bone", to=(140, -18, 648), over=SOFT)  # clavicle
        c.blob((92, -66, 600), (42, 5, 52), "bone", over=SOFT, turn=(25, 0))  # shoulder blade
        c.blob((80, -26, 288), (11, 52, 56), *HOLLOW, turn=(-35, 14), wobble=.3)  # ilium
        c.blob((66, 14, 224), 9, *HOLLOW, to=(0, 48, 198))  # pubis
        c.blob((70, -28, 222), 13, *HOLLOW, to=(52, -44, 178))  # ischium
        c.blob((84, -6, 230), 31, "bone", (.82, "disc"), wobble=.3)  # hip joint
        c.stack(FEMUR, "bone", (.6, "marrow"))
        c.blob((84, -6, 230), 14, *HOLLOW, to=(108, -2, 208))
        c.blob((84, -6, 230), 23, *HOLLOW, wobble=.3)
        psoas = spine[:3] * (1, 1, 1, .65, 1) + (0, 35, 2, 0, 4)
        c.stack(psoas, "muscle", over=FAT)
    processes = spine * (1, 1, 1, .45, .7) - (0, 0, 28, 0, 0)
    c.stack(processes, "bone", comb=(29, .6, .5))
    c.stack(spine, "disc")
    c.stack(spine, "bone", (.86, "marrow"), comb=(29, .78, 0))
    canal = spine * (1, 1, 1, .36, .36) - (0, 0, 23, 0, 0)
    c.stack(canal, "content")
    c.blob((0, -74, 250), (42, 16, 44), *HOLLOW)  # sacrum
    c.blob((0, 82, 500), 9, *HOLLOW, to=(0, 60, 632))  # sternum
    c.blob((0, 18, 752), (54, 68, 64), "fat", (.94, "muscle"), wobble=.3)  # face
    head = ("fat", (.95, "skull"), (.86, "fluid"), (.84, "brain"))
    c.blob((0, 2, 800), (74, 93, 88), *head, wobble=0)
    c.blob((0, 62, 748), (24, 16, 20), "bone", (.85, "gas"))  # sinuses
    for _ in c.both_sides():
        c.blob((9, -2, 810), (5, 30, 14), "fluid", turn=(-8, 0))  # ventricle
        c.blob((31, 74, 770), 13, "content")  # eye
        c.blob((46, 20, 742), 8, "bone", to=(16, 74, 716))  # jaw
    c.blob((0, 6, 740), 8, "gas", to=(0, 8, 690))  # pharynx


def _chest(c: _Canvas) -> None:
    """Paint lungs, heart, large vessels and airways."""
    for _ in c.both_sides():
        c.stack(LUNG, "lung", over=FAT)
    c.blob((-8, 26, 522), (44, 38, 46), "blood", over=INNER)  # right heart
    heart = ("heart", (.66, "blood"))
    c.blob((36, 16, 505), (37, 33, 43), *heart, over=(*INNER, "blood"), turn=(25, -25))
    for a, b, radius in zip(AORTA, AORTA[1:], (14, 13, 12, 10)):
        c.blob(a, radius, "blood", to=b, over=INNER)
    c.blob((-16, -20, 460), 10, "blood", to=(-14, -22, 290), over=FAT)  # inferior vena cava
    for _ in c.both_sides():
        c.blob((8, -4, 566), 9, "blood", to=(44, -10, 548), over=INNER)  # pulmonary vessels
        c.blob((10, -22, 290), 7, "blood", to=(60, 38, 205), over=SOFT)  # iliac vessels
        c.blob((0, -14, 580), 7, "gas", to=(34, -18, 556), over=INNER)  # bronchus
        c.blob((14, 6, 694), 9, "throat", to=(20, 0, 710), over=SOFT)
        c.blob((52, -18, 672), 10, "brown fat", to=(84, -26, 646), over=(*SOFT, "lung"))
    c.blob((0, 6, 700), 9, "gas", to=(0, -14, 578), over=(*SOFT, "lung"))  # trachea


def _belly(c: _Canvas) -> None:
    """Paint the organs of belly and pelvis; those of the gut differ most between patients."""
    rng = c.rng
    stomach = ("stomach", (.72, "content"))
    c.blob((55, 30, 432), (32, 36, 44), *stomach, over=INNER, turn=(0, 25))
    c.blob((58, 46, 446), (16, 12, 16), "gas", over=("content",))
    c.blob((-56, 6, 436), (68, 74, 66), "liver", over=INNER)
    c.blob((4, 38, 452), (54, 38, 32), "liver", over=INNER)  # its left lobe
    c.blob((92, -38, 440), (22, 36, 42), "spleen", over=INNER, turn=(0, 10))
    kidney = ("kidney", (.5, "calyx"))
    for _ in c.both_sides():
        c.blob((64, -40, 376), (27, 24, 50), *kidney, over=("fat", "liver"), turn=(0, -12))
    colon = np.array(COLON) + rng.normal(0, 5, (8, 3))
    for a, b in zip(colon, colon[1:]):
        filled = rng.choice((0, .55, .75)), rng.choice(("gas", "content"))
        c.blob(a, rng.uniform(13, 19), "bowel", filled, to=b, over=FAT)
    for _ in range(16):  # small bowel
        a = rng.normal((0, 28, 305), (34, 16, 26))
        radius = rng.uniform(9, 14)
        b = a + rng.normal(0, 24, 3)
        c.blob(a, radius, "bowel", (.5, "content"), to=b, over=FAT)
    c.blob((0, -12, 214), (30, 20, 24), "muscle", over=FAT)  # uterus or prostate
    c.blob((0, -42, 240), 13, "bowel", (.5, "gas"), to=(0, -46, 190), over=SOFT)  # rectum
    full = rng.uniform(.75, 1.2)
    radii = np.multiply((36, 29, 27), full)
    c.blob((0, 20, 212 + 8 * full), radii, "bladder", over=(*SOFT, "bowel", "content"))


def _place_lesion(rng, visit_rng, first: bool, growth: float, uptake) -> tuple:
    """Draw (site, centre in mm, radius in mm, peak SUV); the first lesion of a patient is large."""
    site = rng.choice(list(SITES), p=[share for share, *_ in SITES.values()])
    _, *places = SITES[site]
    centre, spread, largest = places[rng.integers(len(places))]
    if first:
        radius = growth * (largest * rng.uniform(.72, 1))
    else:
        radius = growth * np.clip(rng.lognormal(2.65, .35), 9, largest)
    peak = np.clip(rng.lognormal(2.2, .35), 4 if radius > 14 else 7, 15)
    peak *= visit_rng.uniform(.85, 1.15)
    if site != "touching":
        side = -1 if site == "liver" else rng.choice((-1, 1))
        centre = (centre + np.multiply(spread, rng.uniform(-1, 1, 3))) * (side, 1, 1)
        return site, centre, radius, peak
    bladder = centre[2] < 300
    direction = rng.normal(0, 1, 3) + (0, 0, bladder)  # rather above the bladder
    distance = np.array(spread) + .55 * radius
    centre = centre + direction / np.linalg.norm(direction) * distance
    peak = np.clip(uptake[CODE["bladder" if bladder else "heart"]], 2.5, 15)
    return site, centre, radius, peak * rng.uniform(.9, 1.1)


def _shape_lesion(c: _Canvas, rng, centre, radius) -> tuple:
    """Draw 1 to 3 lobes: (box, level); level is the distance from the middle, 1 at the edge."""
    lobes = [(centre, radius * rng.uniform(.75, 1.2, 3))]
    for _ in range(rng.integers(3)):
        offset = rng.normal(0, .5 * radius, 3)
        lobes.append((centre + offset, radius * rng.uniform(.5, .7, 3)))
    box = c.box(centre - 1.7 * radius, centre + 1.7 * radius)
    xyz = [x[box] for x in c.xyz]
    squares = [sum(((x - o) / r) ** 2 for x, o, r in zip(xyz, *lobe)) for lobe in lobes]
    level = np.sqrt(np.min(squares, axis=0))
    cell = np.maximum(.6 * radius / c.spacing, 1)
    return box, level * (1 + .16 * smooth_noise(rng, level.shape, cell))


SPARED = [CODE[t] for t in ("air", "brain", "heart", "bladder", "blood")]  # by lesions


def _lesions(c: _Canvas, key, visit_rng, uptake, ct, suv) -> np.ndarray:
    """Paint 1 to 6 lesions into `ct` (HU) and `suv`; return their mask. Visits share `key`."""
    seg = np.zeros(ct.shape, np.uint8)
    growth = visit_rng.uniform(.9, 1.1)
    count = 1 + default_rng(key).binomial(5, .35)
    for j in range(count):
        rng = default_rng([*key, j])
        site, centre, radius, peak = _place_lesion(rng, visit_rng, j == 0, growth, uptake)
        box, level = _shape_lesion(c, rng, centre, radius)
        mask = (level <= 1) & ~np.isin(c.label[box], SPARED)
        seg[box][mask] = 1
        if site == "bone":
            hu = rng.choice((90, 700))
        else:
            hu = 40 if site == "liver" else rng.uniform(65, 80)
        ct[box][mask] = hu
        texture = 1 + .1 * smooth_noise(rng, level.shape, 12 / c.spacing)
        suv[box][mask] = (peak * texture)[mask]
        if radius > 17 and site != "touching" and rng.random() < .3:
            necrosis = mask & (level <= .55)  # cold, but tumor
            ct[box][necrosis] = 20
            suv[box][necrosis] = .15 * peak
    return seg


def _benign_foci(c: _Canvas, key, number: int, uptake, ct, suv, seg) -> None:
    """Paint foci into `ct` and `suv` that PET cannot tell from lesions: brown fat, or urine.

    Places, shapes and uptake are those of a patient's further lesions in nodes and soft tissue.
    """
    for j in range(number):
        rng = default_rng([*key, j])
        site = ""
        while site not in ("node", "soft"):
            site, centre, radius, peak = _place_lesion(rng, rng, False, 1., uptake)
        box, level = _shape_lesion(c, rng, centre, radius)
        mask = (level <= 1) & ~np.isin(c.label[box], SPARED) & (seg[box] == 0)
        texture = 1 + .1 * smooth_noise(rng, level.shape, 12 / c.spacing)
        ct[box][mask] = rng.choice((-90, 5))
        suv[box][mask] = (peak * texture)[mask]


def _breathe(ct, z, most: float, rng) -> np.ndarray:
    """Shift a CT along the body by up to `most` mm: fully at the diaphragm, less away from it.

    z: coordinates of the slices, mm. PET and truth stay where they are.
    """
    shift = most * rng.uniform(-1, 1) * np.exp(-(((z - 430) / 110) ** 2))
    slices = np.interp(z + shift, z, np.arange(len(z)))
    below = np.minimum(slices.astype(int), len(z) - 2)
    share = (slices - below).astype(np.float32)
    return (1 - share) * ct[..., below] + share * ct[..., below + 1]


def _visit(index: int) -> tuple[int, str, str]:
    """Patient number, patient, study name: the last two of every four studies share a patient."""
    number = index // 4 * 3 + min(index % 4, 2)
    patient = f"PETCT_{number:04d}"
    return number, patient, f"{patient}_visit{1 + (index % 4 == 3)}"


def petct_study(
    index: int, seed: int = 0, spacing=(4., 4., 4.), has_tumor=None, harder: Harder = USUAL
) -> PetCtStudy:
    """Make study `index`: head to mid-thigh, arms up, on a grid of `spacing` mm.

    At 4 mm it has 96 x 72 x about 222 voxels. One of every three patients, drawn at random, has no
    tumor and an empty `seg`; `has_tumor` (True or False) overrides the draw.
    """
    number, patient, name = _visit(index)
    if has_tumor is None:
        has_tumor = number % 3 != default_rng([seed, 0, number // 3]).integers(3)
    rng = default_rng([seed, 1, number])
    visit_rng = default_rng([seed, 2, index])
    # Width, depth and height of the patient, relative to the standard.
    size = rng.uniform((.92, .92, .95), (1.07, 1.08, 1.03))
    extent = np.array((384, 288, 900 * size[2]))
    shape = tuple(np.round(extent / spacing).astype(int))
    c = _Canvas(rng, visit_rng, shape, spacing, size, (-extent[0] / 2, -extent[1] / 2, 4))
    _frame(c, fat=rng.uniform(.06, .15))
    _chest(c)
    _belly(c)

    hu, lowest, highest, share, otherwise = np.array(list(TISSUES.values()), np.float32).T
    shown = visit_rng.random(len(hu)) < share
    uptake = np.where(shown, visit_rng.uniform(lowest, highest), otherwise).astype(np.float32)
    ct = hu[c.label]
    suv = uptake[c.label]
    texture = smooth_noise(visit_rng, shape, 9 / c.spacing)
    vessels = 90 * np.maximum(texture - .8, 0)
    ct += np.where(c.label == CODE["lung"], vessels, 5 * texture)
    suv *= 1 + .1 * texture
    white_matter = (c.label == CODE["brain"]) & (np.abs(texture) < .35)
    suv[white_matter] *= .65
    seg = np.zeros(shape, np.uint8)
    if has_tumor:
        seg = _lesions(c, [seed, 3, number], visit_rng, uptake, ct, suv)
    _benign_foci(c, [seed, 5, index], harder.uptake, uptake, ct, suv, seg)
    suv = _pet_scan(suv, c.spacing, visit_rng, harder.noise)
    if harder.breathing:
        ct = _breathe(ct, c.axes[2], harder.breathing, default_rng([seed, 6, index]))
    ct = gaussian_filter(ct, 1.8 / c.spacing)
    ct = ct + 12 * visit_rng.standard_normal(shape, dtype=np.float32)

    affine = np.diag((-spacing[0], *spacing[1:], 1.))  # LAS
    affine[:3, 3] = extent[0] / 2, -extent[1] / 2 - 160, -900. - visit_rng.integers(80)
    # Whole HU and SUV in steps of 1/512: files hold exactly these values and compress well.
    ct = np.clip(np.round(ct), -1024, 3071)
    suv = np.round(suv * 512) / 512
    return PetCtStudy(ct, suv, seg, affine, name, patient)


def _pet_scan(suv, spacing, rng, noise: float) -> np.ndarray:
    """Blur by the scanner, add noise, and blur by the reconstruction: 6.5 mm FWHM in total."""
    reconstruction = 2.  # standard deviations, mm
    scanner = np.sqrt((6.5 / 2.355) ** 2 - 2**2)
    suv = gaussian_filter(suv, scanner / spacing)
    suv += .2 * noise * np.sqrt(suv + .02) * rng.standard_normal(suv.shape, dtype=np.float32)
    return np.maximum(gaussian_filter(suv, reconstruction / spacing), 0)


def brain_study(index: int, seed: int = 0, spacing=(2., 2., 2.)) -> BrainStudy:
    """Make case `index`: a skull-stripped brain, 0 outside, with one glioma-like tumor.

    At 2 mm it has about 80 x 96 x 78 voxels. Edema is bright in FLAIR, the core is brighter in T2w,
    and its enhancing rim in T1gd. Bias fields and scales are arbitrary, as in clinical MR.
    """
    rng = default_rng([seed, 4, index])
    spacing = np.array(spacing)
    half = rng.uniform((64, 80, 62), (72, 90, 70))  # mm
    shape = tuple(np.round((2 * half + 24) / spacing).astype(int))
    axes = np.ix_(*((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing)))
    xyz = [a + 2.5 * smooth_noise(rng, shape, 40 / spacing) for a in axes]
    tissue, depth = _brain_tissue(rng, xyz, half, spacing)
    seg = _glioma(rng, xyz, half, spacing, tissue, depth)
    image = np.array(MRI, np.float32)[np.where(seg > 0, seg + 3, tissue)]  # (X, Y, Z, 4)
    for channel, scale in enumerate(rng.uniform(200, 1200, 4)):
        gain = scale * (1 + .09 * smooth_noise(rng, shape, 90 / spacing))  # bias field
        gain *= 1 + .04 * smooth_noise(rng, shape, 6 / spacing)
        signal = gaussian_filter(image[..., channel], 1 / spacing) * gain
        signal += .03 * scale * rng.standard_normal(shape, dtype=np.float32)
        image[..., channel] = np.where(tissue > 0, np.maximum(np.round(signal), 1), 0)
    affine = np.diag((*spacing, 1.))  # RAS
    affine[:3, 3] = -(np.array(shape) - 1) / 2 * spacing
    return BrainStudy(image, seg.astype(np.uint8), affine, f"BRATS_{index + 1:03d}")


def _brain_tissue(rng, xyz, half, spacing) -> tuple:
    """Tissue (0 outside, 1 fluid, 2 grey, 3 white); depth (0 at the surface, 1 in the middle)."""
    x, y, z = xyz
    flat = np.where(z < 0, 1.15, 1) * z  # the base of the brain is flatter
    depth = 1 - np.sqrt((x / half[0]) ** 2 + (y / half[1]) ** 2 + (flat / half[2]) ** 2)
    # Near 0 in the folds of the cortex.
    fold = np.abs(smooth_noise(rng, x.shape, 9 / spacing))
    cortex = (depth < .13 + .12 * (fold < .5)) | (fold < .22) & (depth < .38)
    nuclei = np.zeros(x.shape, bool)
    for y0 in (-14, 14):
        nuclei |= ((np.abs(x) - 20) / 12) ** 2 + ((y - y0) / 16) ** 2 + (z / 13) ** 2 < 1
    bent_x = (np.abs(x) - 11 - .15 * np.abs(y)) / 5
    bent_z = (z - 10 + .006 * y * y) / 10
    ventricles = bent_x**2 + (y / 36) ** 2 + bent_z**2 < 1
    sulci = (fold < .3) & (depth < .1) | (depth < .02)
    fissure = (np.abs(x) < 1.6) & (depth < .45) & (z > -20)
    tissue = np.full(x.shape, 3)
    tissue[cortex | nuclei] = 2
    tissue[sulci | ventricles | fissure] = 1
    tissue[depth < 0] = 0
    return tissue, depth


def _glioma(rng, xyz, half, spacing, tissue, depth) -> np.ndarray:
    """Draw one tumor: codes of MRI_LABELS."""
    shape = tissue.shape
    radius = rng.uniform(12, 22)  # mm, of the core
    direction = rng.normal(0, 1, 3)
    centre = half * rng.uniform(.3, .58) * direction / np.linalg.norm(direction) * (1, 1, .8)
    radii = radius * rng.uniform(.8, 1.25, 3)
    core = np.sqrt(sum(((a - m) / r) ** 2 for a, m, r in zip(xyz, centre, radii)))
    # Distance from the middle, 1 at the edge of the core.
    core *= 1 + .13 * smooth_noise(rng, shape, .6 * radius / spacing)
    # Inner edge of the rim; where it is above 1, the rim has a gap.
    rim = rng.uniform(.6, .85) + .12 * smooth_noise(rng, shape, 14 / spacing)
    # Outer edge of the edema, which spreads less in grey matter.
    reach = rng.uniform(1.45, 1.95) + .22 * smooth_noise(rng, shape, 22 / spacing)
    reach = reach - .35 * (tissue == 2)
    grows = (tissue > 1) | (tissue == 1) & (core < 1) & (depth > .02)
    necrotic = grows & (core < np.minimum(rim, 1))
    return np.select((necrotic, grows & (core < 1), grows & (core < reach)), (2, 3, 1), 0)


def _store(paths: list[Path], make, index: int, seed: int, spacing, extra: str = "") -> None:
    """Write the first fields of the study make(index, seed, spacing), unless all files are there.

    Headers say how files were made: see `_is_made`.
    """
    voxel = "x".join(f"{s:g}" for s in spacing)
    text = f"phantom 1, seed {seed}, study {index}, {voxel} mm"
    text = f"{text}, {extra}".removesuffix(", ")[:80]  # the header has room for 80
    if all([_is_made(path, text) for path in paths]):
        return
    for folder in {path.parent for path in paths}:
        clean_parts(folder)  # of processes that were killed
    study = make(index, seed, spacing)
    arrays = study[0].astype(np.int16), *study[1:]
    for path, array in zip(paths, arrays):
        image = nib.Nifti1Image(array, study.affine)
        image.header["descrip"] = text
        image.header.set_xyzt_units("mm")
        with atomic_write(path) as part:
            part.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _is_made(path: Path, text: str) -> bool:
    """Whether a file is there and undamaged. UserError if its header says other than `text`."""
    try:
        with gzip.open(path) as f:
            header = nib.Nifti1Header.from_fileobj(f)
            found = header["descrip"].item().decode()
            f.read()  # to the end, where gzip compares checksums
            size = f.tell()
        voxels = int(np.prod(header.get_data_shape())) * header.get_data_dtype().itemsize
    except PermissionError:
        raise
    except Exception:  # nibabel, zlib and gzip raise different errors for a broken file
        return False
    if found != text:
        advice = "choose another folder, or delete this one"
        raise UserError(f"{path} holds '{found}', not '{text}': {advice}")
    return size == header.get_data_offset() + voxels


def write(
    data: str, root, cache, n: int, spacing, harder: Harder = USUAL
) -> Path:
    """Write a run's `n` studies into `root`, or if that is empty, into a folder of `cache`.

    data: "phantom" or "phantom-brain". Returns the folder; its name in `cache` says what decides
    the studies.
    """
    sides = "x".join(f"{s:g}" for s in spacing)
    name = f"{data}-{n}-{sides}mm {harder}".strip().replace(", ", "-").replace(" ", "-")
    root = Path(root) if root else Path(cache) / name
    if data == "phantom":
        write_petct(root, n, spacing=spacing, harder=harder)
    else:
        write_brain(root, n, spacing=spacing)
    return root


def write_petct(
    root, n: int, seed: int = 0, spacing=(4., 4., 4.), harder: Harder = USUAL
) -> list[Path]:
    """Write `n` studies in AutoPET's layout, root/PETCT_0002/visit1/{CTres,SUV,SEG}.nii.gz.

    Returns the study folders. Keeps complete studies; UserError if they were made differently.
    """
    folders = []
    for index in range(n):
        _, patient, name = _visit(index)
        folder = Path(root, patient, name.removeprefix(f"{patient}_"))
        paths = [folder / f"{image}.nii.gz" for image in ("CTres", "SUV", "SEG")]
        make = partial(petct_study, harder=harder)
        _store(paths, make, index, seed, spacing, str(harder))
        folders.append(folder)
    return folders


def write_brain(root, n: int, seed: int = 0, spacing=(2., 2., 2.)) -> Path:
    """Write `n` cases in MSD Task01's layout: dataset.json, imagesTr, labelsTr; return `root`.

    Existing files are treated as in `write_petct`.
    """
    root = Path(root)
    pairs = []
    for index in range(n):
        file = f"BRATS_{index + 1:03d}.nii.gz"
        paths = [root / "imagesTr" / file, root / "labelsTr" / file]
        _store(paths, brain_study, index, seed, spacing)
        pairs.append({"image": f"./imagesTr/{file}", "label": f"./labelsTr/{file}"})
    modality = dict(zip("0123", ("FLAIR", "T1w", "t1gd", "T2w")))
    content = {"name": "synthetic brain tumors", "tensorImageSize": "4D"}
    content |= {"modality": modality, "labels": MRI_LABELS}
    content |= {"numTraining": n, "numTest": 0, "training": pairs, "test": []}
    with atomic_write(root / "dataset.json") as part:
        part.write_text(json.dumps(content, indent=1))
    return root
