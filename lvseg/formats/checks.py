"""What every reader asks of a file before it trusts what the header says about sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lvseg.errors import InputError

MAXIMUM_VOXEL_BYTES = 2 * 1024**3
# Deflate cannot shrink its input more than this, so a file that claims more is cut short or lies.
DEFLATE_RATIO = 1032


def voxel_bytes(shape: Sequence[int], item_bytes: int, path: Path) -> int:
    """Bytes that voxels of this shape take, refused where no scan has such a shape.

    Args:
        shape: sizes along each axis, as Python integers, so that no product overflows.
        item_bytes: bytes of one voxel.
        path: the file, for the message.

    Raises:
        InputError: EMPTY_IMAGE for a size of zero; DIMS_LIMIT for a negative size or more than MAXIMUM_VOXEL_BYTES.
    """
    sizes = [int(size) for size in shape]
    if min(sizes) < 0:
        raise InputError("DIMS_LIMIT", f"Expected positive sizes, received {sizes} in {path}.")
    if 0 in sizes:
        raise InputError("EMPTY_IMAGE", f"Expected voxels, received sizes {sizes} in {path}.")
    total = math.prod(sizes) * item_bytes
    if total > MAXIMUM_VOXEL_BYTES:
        raise InputError(
            "DIMS_LIMIT",
            f"Expected at most {MAXIMUM_VOXEL_BYTES} bytes of voxels, received sizes {sizes} that need {total} bytes in"
            f" {path}.",
        )
    return total


def check_finite(voxels: npt.NDArray[Any], path: Path) -> None:
    """Refuses voxels that are not numbers.

    Raises:
        InputError: NONFINITE_VOXELS.
    """
    if voxels.dtype.kind != "f":
        return
    count = sum(int(np.count_nonzero(~np.isfinite(one_slice))) for one_slice in voxels)
    if count:
        raise InputError(
            "NONFINITE_VOXELS", f"Expected finite voxels, received {count} that are NaN or infinite in {path}."
        )


def storable(voxels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The voxels in native byte order and C order, booleans as uint8, which is what files can hold."""
    if voxels.dtype == np.bool_:
        voxels = voxels.astype(np.uint8)
    return np.ascontiguousarray(voxels, dtype=voxels.dtype.newbyteorder("="))


def truncated(path: Path, expected: int, received: int) -> InputError:
    """The error for a file that ends too early."""
    return InputError("INPUT_TRUNCATED", f"Expected {expected} bytes, received {received} in {path} (cut short).")
