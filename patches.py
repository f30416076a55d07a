"""Cached studies -> training patches: the self-supervision of the CT, augmentation, the data set.

Randomness is a pure function of (seed, position in the run): the same patch comes out whatever the
number of workers, before and after a resume. Arrays are (D, H, W): the axes of the NIfTI volume.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from nibabel.affines import voxel_sizes
from torch import Tensor
from torch.utils.data import Dataset

import kernels
from data import CachedCase
from files import UserError


def random_stream(*key: int) -> np.random.Generator:
    """A counter-based generator whose numbers depend only on the key (its low 32 bits each)."""
    seed = np.random.SeedSequence([k & 0xFFFFFFFF for k in key])
    return np.random.Generator(np.random.Philox(seed))


# --------------------------------------------------------------------------- the self-supervision
def draw_corners(key: int, shape, size: int, cubes: int) -> np.ndarray:
    """The lowest voxels of a sample's cubes in a patch of this shape: (cubes, 3) int64."""
    room = np.array(shape) - min(size, *shape) + 1
    return random_stream(4, key, key >> 32).integers(0, room, (cubes, 3))


def corrupt_ct(
    image: Tensor, how: str, keys: Tensor, size: int = 16, cubes: int = 1, sigma: float = 0.3,
    corners: Tensor | None = None,
) -> Tensor:
    """Corrupt the CT that the network has to reconstruct (paper, section 3.3: voxel shuffling).

    Args:
        image: (B, 2, D, H, W), channel 0 CT, channel 1 PET, which is left untouched.
        how: "none" returns the input itself | "noise" adds Gaussian noise of standard deviation
            sigma | "shuffle" permutes the voxels inside random cubes.
        keys: (B,) integers, a seed per sample.
        size, cubes: side of a cube (at most the patch's side), and how many there are per sample.
        corners: (B, cubes, 3), if `draw_corners` has drawn them already, in the loader's processes.

    Returns a new tensor (B, 2, D, H, W); the caller keeps the clean one as the target.
    """
    if how == "none":
        return image
    ct = image[:, 0:1]
    if how == "noise":
        streams = [random_stream(3, k, k >> 32) for k in keys.tolist()]
        noise = np.stack([s.standard_normal(ct.shape[1:], np.float32) for s in streams])
        ct = ct + sigma * torch.from_numpy(noise).to(ct)
    elif how == "shuffle":
        if corners is None:
            drawn = [draw_corners(k, image.shape[2:], size, cubes) for k in keys.tolist()]
            corners = torch.from_numpy(np.stack(drawn))  # (B, cubes, 3)
        ct = kernels.voxel_shuffle(ct, corners, min(size, *image.shape[2:]), keys)
    else:
        raise UserError(f"corruption {how!r}: use none, noise or shuffle")
    return torch.cat([ct, image[:, 1:]], dim=1)


# ------------------------------------------------------------------------------------ augmentation
@dataclass(frozen=True)
class Augmentation:
    """Probabilities and ranges. The paper's AutoPET recipe: flip 0.5, rotate 0.2, scale 0.2."""

    flip: float = 0.5  # probability, of each axis in `flip_axes`
    flip_axes: tuple[int, ...] = (0, 1, 2)  # 0 is left-right, the symmetry of bodies
    rotate: float = 0.0  # probability of a rotation by up to `degrees` about one axis
    degrees: float = 30.0
    scale: float = 0.0  # probability of scaling by a factor within 1 +- `zoom`
    zoom: float = 0.2
    intensity: float = 0.0  # probability, per channel, of x (1 +- `contrast`) + (+- `contrast`)
    contrast: float = 0.1
    gamma: float = 0.0  # probability, per channel, of sign(x) |x|^g with log2 g within +- 1


def draw_augmentation(rng: np.random.Generator, aug: Augmentation) -> dict:
    """Draw the parameters of one patch, to be applied by `read_patch`.

    The number of draws is fixed: switching one part off does not change the others.
    """
    u = rng.random(12)
    angle = np.deg2rad(aug.degrees) * (2 * u[1] - 1) * (u[0] < aug.rotate)
    c, s = np.cos(angle), np.sin(angle)
    rotation = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])  # about axis 0, in mm
    rotation = np.roll(rotation, int(3 * u[2]), axis=(0, 1))  # about a random axis
    zoom = 1 + aug.zoom * (2 * u[4] - 1) * (u[3] < aug.scale)
    active = u[8:10] < aug.intensity
    v = 2 * rng.random(4) - 1
    w = rng.random(4)
    return {
        "matrix": rotation / zoom,  # output offset -> input offset, mm
        "flip": [axis for axis in aug.flip_axes if u[5 + axis] < aug.flip],
        "gain": 1 + aug.contrast * v[:2] * active,  # (2,), per channel
        "shift": aug.contrast * v[2:] * active,
        "gamma": 2.0 ** ((2 * w[:2] - 1) * (w[2:] < aug.gamma)),
    }


def read_region(array: np.ndarray, start, size, flip=()) -> np.ndarray:
    """Read array[..., start : start + size] of the last three axes; 0 outside the volume.

    flip: those of the three axes (0, 1, 2) along which the result is mirrored.
    """
    start, size = np.asarray(start), np.asarray(size)
    low, high = np.maximum(start, 0), np.minimum(start + size, array.shape[-3:])
    out = np.zeros((*array.shape[:-3], *size), array.dtype)
    if (high > low).all():
        source = tuple(slice(a, b) for a, b in zip(low, high))
        target = tuple(slice(a, b) for a, b in zip(low - start, high - start))
        np.flip(out, tuple(axis - 3 for axis in flip))[(..., *target)] = array[(..., *source)]
    return out


def read_patch(case: CachedCase, center, size, params: dict) -> tuple[np.ndarray, np.ndarray]:
    """Read the patch around a voxel and augment it with the `params` of `draw_augmentation`.

    Along each axis the patch, before its rotation, is moved inside the volume if it fits, else
    centered on it; voxels outside are 0. Returns the image (2, *size), float32, and the label
    (*size), uint8.
    """
    image, label = case.array("image"), case.array("label")
    size, shape = np.asarray(size), np.asarray(label.shape)
    spacing = voxel_sizes(case.affine)
    matrix = np.diag(1 / spacing) @ params["matrix"] @ np.diag(spacing)  # in voxels
    start = np.clip(np.asarray(center) - size // 2, 0, np.maximum(shape - size, 0))
    start = start - np.maximum(size - shape, 0) // 2
    if np.allclose(matrix, np.eye(3)):
        image, label = (read_region(a, start, size, params["flip"]) for a in (image, label))
        image = torch.from_numpy(image).float().numpy()  # faster than NumPy's astype
    else:
        image, label = _read_rotated(image, label, start, size, matrix, params["flip"])
    per_channel = (np.asarray(params[k], np.float32) for k in ("gain", "shift", "gamma"))
    gain, shift, gamma = (values.reshape(2, 1, 1, 1) for values in per_channel)
    if (gamma != 1).any():
        image = np.sign(image) * np.abs(image) ** gamma
    image *= gain
    image += shift
    return image, label


def _read_rotated(image, label, start, size, matrix, flip) -> tuple[np.ndarray, np.ndarray]:
    """Read a patch rotated and scaled about its center by `matrix` (output -> input, voxels).

    Linear for the image, the nearest voxel for the label. The rotation is about one axis, so
    trilinear interpolation is bilinear in the plane of the others, then linear along the axis.
    """
    middle = start + (size - 1) / 2
    reach = np.abs(matrix) @ ((size - 1) / 2)  # half the extent of the rotated patch
    low = np.floor(middle - reach).astype(int) - 1
    extent = np.ceil(middle + reach).astype(int) + 2 - low
    offset = middle - low - matrix @ ((size - 1) / 2)
    image, label = read_region(image, low, extent), read_region(label, low, extent)
    axis = next(a for a in range(3) if np.allclose(np.delete(matrix[a], a), 0))
    plane = [a for a in range(3) if a != axis]
    rows, columns, layers = (np.arange(size[a])[:: -1 if a in flip else 1] for a in [*plane, axis])
    turn = matrix[np.ix_(plane, plane)]
    y, x = (m[0] * rows[:, None] + m[1] * columns + o for m, o in zip(turn, offset[plane]))
    z = matrix[axis, axis] * layers + offset[axis]
    i, j, k = (np.floor(v + 0.5).astype(int) for v in (y, x, z))
    label = label.transpose(*plane, axis)[i, j][:, :, k]
    last = extent[plane] - 1
    grid = np.stack([2 * x / last[1] - 1, 2 * y / last[0] - 1], axis=-1)[None]  # -1 to 1
    image = torch.from_numpy(image).float().permute(0, 1 + axis, *(1 + a for a in plane))
    grid = torch.from_numpy(grid).float().expand(2, -1, -1, -1)
    image = F.grid_sample(image, grid, align_corners=True)  # (2, extent[axis], rows, columns)
    k, w = np.floor(z).astype(int), torch.from_numpy(z - np.floor(z)).float()[:, None, None]
    image = torch.lerp(image[:, k], image[:, k + 1], w).movedim(1, 1 + axis)
    return image.contiguous().numpy(), np.ascontiguousarray(np.moveaxis(label, 2, axis))


# ------------------------------------------------------------------------------------ the data set
@dataclass(eq=False)
class PatchDataset(Dataset):
    """A list of training patches: item n is a pure function of (cases, options, seed, n).

    Every cycle visits the cases in a new random order and takes `patches_per_case` consecutive
    patches from each. A patch is centered on a tumor voxel with probability `foreground_fraction`
    (2/3 is the paper's 2:1), else, and always in patients without tumor, on a voxel without tumor.

    Item: a dict of "image" (2, D, H, W), float32; "label" (1, D, H, W), uint8; "tumor", float32,
    whether the patch holds any; "key", int64, the seed of its corruption; with cubes (their side
    and number) also "corners" (number, 3), int64, of those that the corruption shuffles.
    """

    cases: list[CachedCase]
    patch: tuple[int, ...]
    length: int
    seed: int = 0
    aug: Augmentation = Augmentation()
    foreground_fraction: float = 2 / 3
    patches_per_case: int = 1
    cubes: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        if not 0 <= n < self.length:
            raise IndexError(n)  # ends `for item in dataset`
        cycle, place = divmod(n // self.patches_per_case, len(self.cases))
        order = random_stream(self.seed, 1, cycle).permutation(len(self.cases))
        case = self.cases[order[place]]
        rng = random_stream(self.seed, 2, n)
        center = self._center(case, rng)
        image, label = read_patch(case, center, self.patch, draw_augmentation(rng, self.aug))
        key = int(rng.integers(2**62))
        item = {
            "image": torch.from_numpy(image),
            "label": torch.from_numpy(label)[None],
            "tumor": torch.tensor(float(label.any())),
            "key": torch.tensor(key),
        }
        if self.cubes:
            item["corners"] = torch.from_numpy(draw_corners(key, self.patch, *self.cubes))
        return item

    def _center(self, case: CachedCase, rng: np.random.Generator) -> np.ndarray:
        """Draw a voxel of tumor, or one without: any voxel if 20 draws find only tumor."""
        foreground, label = case.array("foreground"), case.array("label")
        if rng.random() < self.foreground_fraction and len(foreground):
            return foreground[rng.integers(len(foreground))]
        for _ in range(20):
            center = rng.integers(0, label.shape)
            if not label[tuple(center)]:
                break
        return center


def make_targets(batch: dict[str, Tensor], task: str) -> dict[str, Tensor]:
    """Add what `MirrorLoss` reads: "ct", "pet", "seg"; for the brain "core", "whole", "edema"."""
    image, label = batch["image"], batch["label"]
    if task == "brain":
        targets = {"core": label == 2, "whole": label > 0, "edema": label == 1}
        return batch | {name: mask.byte() for name, mask in targets.items()}
    return batch | {"ct": image[:, 0:1], "pet": image[:, 1:2], "seg": label}
