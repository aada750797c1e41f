"""Masks as operators draw them: the whole liver, the liver within a margin, and the deviations of a hand.

Axes. Canonical arrays [slice, row, column]; operators draw in the slice, so distances are within it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from lvseg.phantom.anatomy import WHOLE_LIVER, Tissue
from lvseg.phantom.imaging import Grid, random_smooth

Labels = npt.NDArray[np.uint8]

AVOIDED = (Tissue.HEPATIC_VESSEL, Tissue.PORTAL_VESSEL, Tissue.CYST, Tissue.LESION)
AVOIDED_MARGIN_MM = 2.5
SMOOTH_MM = 5.0  # the narrowest part that is still drawn is twice as wide
LEAST_SLICE_MM2 = 1000.0
LEAST_PIECE_MM2 = 300.0

# Mean absolute deviation of an operator's volume in the report; of a normal distribution it is sqrt(2 / pi) sigma.
OPERATOR_DEVIATION_PERCENT = 1.7
LARGEST_DEVIATION_SIGMA = 3.0
HAND_SPACING_MM, HAND_SD_MM = 22.0, 1.5


def whole_liver(tissues: Labels) -> Labels:
    """1 in the liver with its vessels and lesions, uint8 in the shape of the map."""
    table = np.zeros(len(Tissue), dtype=np.uint8)
    table[list(WHOLE_LIVER)] = 1
    return table[tissues]


def within_liver(tissues: Labels, spacing_mm: Sequence[float], margin_mm: float) -> Labels:
    """1 where fat is measured: inside the liver by a margin, away from large vessels and lesions, in smooth pieces.

    A slice is left out where too little remains, and where the slice above or below has no liver there, its voxels
    would hold what lies beyond.

    Args:
        tissues: uint8 [slices, rows, columns].
        spacing_mm: (slice, row, column).
        margin_mm: kept from the border, within the slice.

    Returns:
        uint8 [slices, rows, columns].
    """
    mask = np.zeros(tissues.shape, dtype=np.uint8)
    liver = whole_liver(tissues)
    box = _box(liver)
    if box is None:
        return mask
    outline = np.pad(liver[box].astype(bool), 1)  # the border of the image counts as a border of the liver
    avoided = np.isin(np.pad(tissues[box], 1), AVOIDED)
    pixel_mm = tuple(spacing_mm[1:])
    pixel_mm2 = pixel_mm[0] * pixel_mm[1]
    kept = np.zeros_like(outline)
    for index in range(1, len(outline) - 1):
        if not (outline[index - 1].any() and outline[index + 1].any()):
            continue
        inside = ndimage.distance_transform_edt(outline[index], sampling=pixel_mm) > margin_mm
        inside &= outline[index - 1] & outline[index + 1]
        if avoided[index].any():
            inside &= ndimage.distance_transform_edt(~avoided[index], sampling=pixel_mm) > AVOIDED_MARGIN_MM
        core = ndimage.distance_transform_edt(inside, sampling=pixel_mm) > SMOOTH_MM
        if not core.any():
            continue
        inside &= ndimage.distance_transform_edt(~core, sampling=pixel_mm) <= SMOOTH_MM
        pieces, count = ndimage.label(inside)
        areas_mm2 = np.bincount(pieces.ravel(), minlength=count + 1) * pixel_mm2
        areas_mm2[0] = 0.0
        inside &= areas_mm2[pieces] >= LEAST_PIECE_MM2
        if np.count_nonzero(inside) * pixel_mm2 >= LEAST_SLICE_MM2:
            kept[index] = inside
    mask[box] = kept[1:-1, 1:-1, 1:-1]
    return mask


def drawn_by_hand(mask: Labels, grid: Grid, draw: np.random.Generator) -> Labels:
    """The mask with a contour that deviates smoothly, so that its volume is off as an operator's is.

    The contour moves outwards and inwards by a smooth random distance, and the mask takes the voxels nearest to the
    moved contour until its volume is the one drawn: normal about the true one, with a mean absolute deviation of
    `OPERATOR_DEVIATION_PERCENT`.

    Args:
        mask: uint8 [slices, rows, columns], 1 inside.
    """
    sigma = OPERATOR_DEVIATION_PERCENT / 100.0 * np.sqrt(np.pi / 2.0)
    deviation = np.clip(draw.standard_normal(), -LARGEST_DEVIATION_SIGMA, LARGEST_DEVIATION_SIGMA) * sigma
    box = _box(mask, margin=8)
    if box is None:
        return mask
    inside = mask[box].astype(bool)
    box_grid = Grid(*(axis[part] for axis, part in zip(grid.axes, box, strict=True)))
    hand = random_smooth(box_grid, HAND_SPACING_MM, draw)
    pixel_mm = grid.spacing_mm[1:]
    outwards = np.full(inside.shape, np.inf, dtype=np.float32)
    for index, (one, moved) in enumerate(zip(inside, hand, strict=True)):
        if one.any():  # a slice without contour stays without
            beyond = ndimage.distance_transform_edt(~one, sampling=pixel_mm)
            within = ndimage.distance_transform_edt(np.pad(one, 1), sampling=pixel_mm)[1:-1, 1:-1]
            # Distances are between voxel centres; the contour runs half a pixel before them.
            from_contour = beyond - within + np.where(one, 0.5, -0.5) * min(pixel_mm)
            outwards[index] = from_contour.astype(np.float32) - moved * np.float32(HAND_SD_MM)
    wanted = round(float(np.count_nonzero(inside)) * (1.0 + deviation))
    nearest = np.argsort(outwards, axis=None, kind="stable")[:wanted]
    drawn = np.zeros(inside.size, dtype=np.uint8)
    drawn[nearest] = 1
    result = np.zeros_like(mask)
    result[box] = drawn.reshape(inside.shape)
    return result


def _box(mask: Labels, margin: int = 0) -> tuple[slice, slice, slice] | None:
    """The box around what is not zero, grown within the slices by `margin` voxels; None if all is zero."""
    if not mask.any():
        return None
    parts = []
    for axis in range(3):
        hit = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        grown = 0 if axis == 0 else margin
        parts.append(slice(max(0, int(hit[0]) - grown), min(mask.shape[axis], int(hit[-1]) + 1 + grown)))
    return parts[0], parts[1], parts[2]
