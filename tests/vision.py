"""What colour-blind readers see: for the tests of figures and notebooks."""

import itertools

import numpy as np
from matplotlib.colors import to_rgb

# What people with one kind of cone missing see, in linear RGB (Machado et al. 2009, severity 1).
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}  # fmt: skip
TO_XYZ = np.array([
    [0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
])  # fmt: skip


def lab(color: str, kind: str = "none") -> np.ndarray:
    """CIELAB of an sRGB colour as seen with a kind of colour-blindness."""
    c = np.array(to_rgb(color))
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    seen = TO_XYZ @ np.clip(np.array(BLINDNESS[kind]) @ linear, 0, 1) / TO_XYZ.sum(1)
    low = seen <= (6 / 29) ** 3
    f = np.where(low, seen / (3 * (6 / 29) ** 2) + 4 / 29, np.cbrt(seen))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def alike(colors) -> list[tuple]:
    """Pairs of colours that are less than 20 apart for some readers: (a, b, kind, distance)."""
    found = []
    for (a, b), kind in itertools.product(itertools.combinations(colors, 2), BLINDNESS):
        distance = float(np.linalg.norm(lab(a, kind) - lab(b, kind)))
        if distance < 20:
            found.append((a, b, kind, round(distance)))
    return found
