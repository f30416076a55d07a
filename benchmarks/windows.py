"""What a trained v2 or v3 reconstructs in windows of held-out studies:

    python benchmarks/windows.py runs/NAME/best.pt [...]

Prints per checkpoint, over three random windows of each of the first 20 held-out studies: the L2
of PET and CT (the CT corrupted as in training), the variance of the true PET, and the correlation
between the standard deviations of the reconstructed and the true PET over windows.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import patches  # noqa: E402
import train  # noqa: E402
from predict import load_model  # noqa: E402


def measure(path: str) -> dict[str, float]:
    """The numbers of one checkpoint."""
    model, c = load_model(path, "cpu")
    aug, rows = patches.Augmentation(flip=0.0), []
    for n, case in enumerate(train.load_cases(c)[1][:20]):
        for window in range(3):
            rng = patches.random_stream(99, n, window)
            center = rng.integers(0, case.array("label").shape)
            params = patches.draw_augmentation(rng, aug)
            image, _ = patches.read_patch(case, center, c.patch, params)
            x = torch.from_numpy(image.copy())[None]
            key = torch.tensor([10 * n + window])
            corrupted = patches.corrupt_ct(x, c.corrupt, key, c.cube, c.cubes, c.sigma)
            with torch.no_grad():
                out = model(corrupted)
            l2 = [(out.pet - x[:, 1:]).square().mean(), (out.ct - x[:, :1]).square().mean()]
            rows.append([*map(float, l2), float(out.pet.std()), float(x[:, 1].std())])
    pet, ct, spread, true = np.array(rows).T
    found = {"PET L2": pet.mean(), "CT L2": ct.mean(), "PET variance": (true**2).mean()}
    return found | {"correlation of spreads": np.corrcoef(spread, true)[0, 1]}


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(path, "  ".join(f"{k} {v:.4f}" for k, v in measure(path).items()), flush=True)
