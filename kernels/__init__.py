"""The three operations worth a kernel, and which path runs where.

So far each runs in plain PyTorch, on any device. A file here stands alone (it needs torch only): copy it into a project of your own.
"""

from .dice_ce import dice_ce_ref
from .dice_ce import dice_ce_ref as dice_ce
from .norm_act import norm_act, norm_act_ref
from .voxel_shuffle import voxel_shuffle_ref
from .voxel_shuffle import voxel_shuffle_ref as voxel_shuffle

__all__ = ["dice_ce", "dice_ce_ref", "norm_act", "norm_act_ref", "voxel_shuffle", "voxel_shuffle_ref"]
