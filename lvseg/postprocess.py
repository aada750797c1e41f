"""What may be mended in a mask without looking at the scan; off unless a model's card asks for it.

Order: largest component first, then holes, so that a hole of a part that goes is not filled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from lvseg.volume import Array

STEPS = ("largest_component", "fill_holes")


def postprocess(labels: Array, steps: Sequence[str]) -> Array:
    """Applies steps of `STEPS` to every class, in their order.

    Args:
        labels: uint8 [S, H, W], 0 is background.
        steps: "largest_component" keeps of each class the largest part of voxels that touch face to face (the first of
            equal ones); "fill_holes" gives each class the background that it encloses in its slice.

    Returns:
        uint8 [S, H, W], a new array; a hole never takes voxels from another class.

    Raises:
        ValueError: for another step.
    """
    unknown = set(steps) - set(STEPS)
    if unknown:
        raise ValueError(f"Expected steps of {', '.join(STEPS)}, received {', '.join(sorted(unknown))}.")
    mended = labels.copy()
    classes = range(1, int(labels.max(initial=0)) + 1)
    if "largest_component" in steps:
        for label in classes:
            parts, _ = ndimage.label(mended == label)
            sizes = np.bincount(parts.ravel())
            if sizes.size > 2:
                mended[(parts > 0) & (parts != 1 + int(np.argmax(sizes[1:])))] = 0
    if "fill_holes" in steps:
        for label in classes:
            own = mended == label
            for index in np.flatnonzero(own.any(axis=(1, 2))):
                filled = ndimage.binary_fill_holes(own[index])
                mended[index][filled & (mended[index] == 0)] = label
    return mended
