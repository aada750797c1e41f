"""What every reader asks of a file before it trusts what the header says about sizes."""

from __future__ import annotations

import errno
import math
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from lvseg.errors import InputError
from lvseg.volume import Volume

MAXIMUM_VOXEL_BYTES = 2 * 1024**3
PIECE_BYTES = 4 * 1024**2
# No scanner of people makes voxels outside these, and none has a table that reaches further from its isocentre.
SPACING_LIMITS_MM = (0.001, 1000.0)
REACH_LIMIT_MM = 10_000.0
# Deflate cannot shrink its input more than this, so a file that claims more is cut short or lies.
DEFLATE_RATIO = 1032
NAME_BYTES_MAX = 255  # of a file; not characters, of which many take more than a byte


def limit_voxels(count: int) -> None:
    """Lowers for this process what readers take, as a kernel's limit would, but told as DIMS_LIMIT.

    Args:
        count: bytes of one scan's voxels, in place of MAXIMUM_VOXEL_BYTES where it is less.
    """
    global MAXIMUM_VOXEL_BYTES
    MAXIMUM_VOXEL_BYTES = min(count, MAXIMUM_VOXEL_BYTES)


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


def check_plausible(volume: Volume, path: Path) -> None:
    """Refuses a place and a size that no scan of a person has, such as a spacing in metres or an offset of 1e30.

    Raises:
        InputError: BAD_GEOMETRY.
    """
    smallest_mm, largest_mm = SPACING_LIMITS_MM
    if not all(smallest_mm <= mm <= largest_mm for mm in volume.spacing_mm):
        raise InputError(
            "BAD_GEOMETRY",
            f"Expected voxel spacings from {smallest_mm} to {largest_mm:.0f} mm, received {list(volume.spacing_mm)} in"
            f" {path}.",
        )
    corners = np.stack(np.meshgrid(*([0, size - 1] for size in volume.shape)), axis=-1)
    furthest_mm = float(np.abs(volume.world_mm(corners)).max())
    if furthest_mm > REACH_LIMIT_MM:
        raise InputError(
            "BAD_GEOMETRY",
            f"Expected every voxel within {REACH_LIMIT_MM:.0f} mm of the origin, received one at {furthest_mm:.6g} mm"
            f" in {path}.",
        )


def read_exactly(stream: IO[bytes], count: int, path: Path) -> bytearray:
    """The stream's bytes, which have to be `count`; memory grows with what really comes.

    Args:
        stream: at the first voxel, unpacking as it is read if it is packed.
        count: bytes of all voxels, within the limit of `voxel_bytes`.
        path: the file, for the message.

    Raises:
        InputError: INPUT_TRUNCATED for fewer bytes, DECOMPRESS_LIMIT for more.
    """
    data = bytearray()
    while len(data) <= count and (piece := stream.read(min(PIECE_BYTES, count + 1 - len(data)))):
        data += piece
    if len(data) < count:
        raise truncated(path, count, len(data))
    if len(data) > count:
        raise InputError(
            "DECOMPRESS_LIMIT", f"Expected {count} bytes of voxels as the header's sizes say, received more in {path}."
        )
    return data


def is_of_machine(error: Exception) -> bool:
    """Whether an error while a file was read says nothing of the file: want of memory, or a disk that fails."""
    if isinstance(error, OSError):  # without a number a parser's own; EINVAL is a place before the file's first byte
        return error.errno not in (None, errno.EINVAL)
    return isinstance(error, MemoryError)


def beside(path: Path, name: str) -> Path:
    """The file of that name in the folder of a header that calls it its data.

    Raises:
        InputError: UNSUPPORTED_FORMAT for a name that leads anywhere else, NOT_FOUND where there is no such file,
            NOT_READABLE for a link, a device or a pipe.
    """
    is_plain = name and name not in (".", "..") and not any(character in name for character in "/\\:\0")
    if not is_plain or len(name.encode(errors="replace")) > NAME_BYTES_MAX:
        raise InputError(
            "UNSUPPORTED_FORMAT",
            f"Expected the name of a data file in the header's own folder, received {name[:80]!r} in {path}.",
        )
    data = path.with_name(name)
    try:
        mode = data.lstat().st_mode
    except FileNotFoundError:
        raise InputError("NOT_FOUND", f"Expected the data file {name!r} beside {path}, received none.") from None
    if not stat.S_ISREG(mode):  # a link may lead out of the folder, and reading a pipe may never end
        raise InputError("NOT_READABLE", f"Expected a plain data file {name!r} beside {path}, received none.")
    return data


def storable(voxels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The voxels in native byte order and C order, booleans as uint8, which is what files can hold."""
    if voxels.dtype == np.bool_:
        voxels = voxels.astype(np.uint8)
    return np.ascontiguousarray(voxels, dtype=voxels.dtype.newbyteorder("="))


def truncated(path: Path, expected: int, received: int) -> InputError:
    """The error for a file that ends too early."""
    return InputError("INPUT_TRUNCATED", f"Expected {expected} bytes, received {received} in {path} (cut short).")
