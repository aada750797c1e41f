"""What a trial needs of a mask: the organ's volume, whether the scan shows all of it, and how fat the liver is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lvseg.volume import Volume

MM3_PER_ML = 1000.0
# Fatty liver begins here (the 95th percentile of healthy people in Szczepaniak et al., Am J Physiol 2005, 288:E462).
STEATOSIS_PERCENT = 5.56


def volume_ml(mask: Volume, label: int = 1) -> float:
    """Volume of one class in millilitres: its voxels times the volume of a voxel.

    Args:
        mask: integer or bool voxels, any orientation.
        label: the class that counts.
    """
    return int(np.count_nonzero(mask.voxels == label)) * mask.voxel_volume_mm3 / MM3_PER_ML


def touches_edge(mask: Volume, label: int = 1) -> list[str]:
    """Names the borders of the scan that a class touches, where part of the organ may lie outside the scan.

    Args:
        mask: integer or bool voxels, any orientation.
        label: the class that counts.

    Returns:
        Of "lowest slice" (towards the feet), "highest slice" (towards the head) and "in-plane edge" (first or last row
        or column), in this order, those that apply; the slices are the canonical ones, whatever the file's order.
    """
    organ = mask.canonical().voxels == label
    borders = {
        "lowest slice": organ[0],
        "highest slice": organ[-1],
        "in-plane edge": np.concatenate([organ[:, [0, -1], :].ravel(), organ[:, :, [0, -1]].ravel()]),
    }
    return [name for name, border in borders.items() if border.any()]


def steatosis_grade(fat_percent: float, grades_percent: Sequence[float] = (STEATOSIS_PERCENT,)) -> int:
    """The steatosis class of a mean fat fraction: how many of the thresholds it reaches; 0 is none.

    Args:
        fat_percent: mean of the liver; grades_percent: ascending, where each grade begins.
    """
    return int(np.searchsorted(grades_percent, fat_percent, side="right"))
