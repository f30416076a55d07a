"""Exercise 1: the bytes per voxel of Dice + CE, predicted and then counted.

    PYTHONPATH=.:benchmarks python tutorials/solutions/01_bytes.py     # Linux only
"""

import torch
from traffic import measure  # before the kernels: it sets TRITON_INTERPRET=1

from kernels.dice_ce import dice_ce_triton


def predict(classes: int, logit: int, label: int) -> tuple[int, int]:
    """Bytes per voxel of the forward and the backward pass, from the widths in bytes."""
    read = classes * logit + label  # every logit and the label, once per pass
    return read, read + classes * logit  # the backward pass also writes a gradient per logit


def count(classes: int, logit: torch.dtype, label: torch.dtype) -> tuple[float, float]:
    """The same, counted in Triton's interpreter."""
    x = torch.randn(2, classes, 32, 32, 32).to(logit).requires_grad_()
    y = torch.randint(0, classes, (2, 1, 32, 32, 32), dtype=label)
    passes = measure(lambda x, y: dice_ce_triton(x, y)[0], (x, y))
    return passes[0].bytes / y.numel(), passes[1].bytes / y.numel()


if __name__ == "__main__":
    print("classes  logits          labels         predicted    counted")
    for classes, logit, label in (
        (2, torch.float32, torch.uint8),
        (2, torch.float32, torch.int64),
        (3, torch.float32, torch.uint8),
        (2, torch.bfloat16, torch.uint8),
    ):
        expected = predict(classes, logit.itemsize, label.itemsize)
        counted = count(classes, logit, label)
        print(f"{classes:7}  {str(logit):14}  {str(label):11}", end="")
        print("{:7} + {:2}   {:6.2f} + {:5.2f}".format(*expected, *counted))
