"""Labels put on the grid of their image: axes permuted and flipped, never a voxel moved or made up.

A mask often comes in another orientation than its image, since another tool wrote it. Its voxel axes have to be the
image's, in any order and direction, and each of its voxels has to lie on one of the image's, within a tenth of the
smallest spacing: less than a mask can show, and well above what rounding in files makes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lvseg.errors import InputError
from lvseg.volume import Array, Volume

TOLERANCE = 0.1
LARGEST_LABEL = 65535


@dataclass(frozen=True)
class Place:
    """Where a block of voxels lies in an image.

    Args:
        axes: for each axis of the image the block's axis along it.
        flipped: for each axis of the image whether the block runs against it.
        start: the image's lowest index (slice, row, column) that the block covers.
        shape: of the block, in the image's axes.
    """

    axes: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]
    start: tuple[int, int, int]
    shape: tuple[int, int, int]

    @property
    def box(self) -> tuple[slice, slice, slice]:
        """What the block covers of the image."""
        first, second, third = (slice(start, start + size) for start, size in zip(self.start, self.shape, strict=True))
        return first, second, third

    def turned(self, block: Array) -> Array:
        """The block in the image's axes and directions."""
        return np.flip(block.transpose(self.axes), [axis for axis, flipped in enumerate(self.flipped) if flipped])


def place(image: Volume, affine: npt.NDArray[np.float64], shape: tuple[int, int, int], name: str) -> Place:
    """Finds where in an image voxels of another affine lie.

    Args:
        image: the grid.
        affine: float64 [4, 4], index of the block to LPS millimetres.
        shape: of the block, in its own axes.
        name: the block's file, for messages.

    Raises:
        InputError: GEOMETRY_MISMATCH where a voxel lies between the image's or outside.
    """
    relative = np.linalg.solve(image.affine, affine)
    turn = np.rint(relative[:3, :3])
    is_turn = np.array_equal(np.abs(turn) @ np.ones(3), np.ones(3)) and abs(round(np.linalg.det(turn))) == 1
    if is_turn:
        corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)
        start = np.rint(relative[:3, 3])
        on_image = corners @ turn.T + start
        apart_mm = np.linalg.norm(image.world_mm(on_image) - (corners @ affine[:3, :3].T + affine[:3, 3]), axis=1).max()
        lowest, highest = on_image.min(axis=0), on_image.max(axis=0)
        if (
            apart_mm <= TOLERANCE * min(image.spacing_mm)
            and (lowest >= 0).all()
            and (highest < np.array(image.shape)).all()
        ):
            axes = np.abs(turn).argmax(axis=1)
            first, second, third = (int(axis) for axis in axes)
            return Place(
                (first, second, third),
                tuple(bool(turn[row, axis] < 0) for row, axis in enumerate(axes)),  # type: ignore[arg-type]
                tuple(int(index) for index in lowest),  # type: ignore[arg-type]
                (shape[first], shape[second], shape[third]),
            )
        detail = f"corners up to {apart_mm:.3g} mm off its voxels or beyond them"
    else:
        detail = "another spacing or direction"
    raise InputError(
        "GEOMETRY_MISMATCH",
        f"Expected labels on the voxels of {image.source or 'the image'} (shape {image.shape}), received {detail}"
        f" (shape {tuple(shape)}) in {name}.",
    )


def on_grid(mask: Volume, image: Volume) -> Volume:
    """The mask's labels on the image's own grid.

    Returns:
        uint8 or uint16 [slice, row, column] in the image's axes, with the image's affine.

    Raises:
        InputError: GEOMETRY_MISMATCH, or NOT_LABELS for values that are no whole numbers from 0 to 65535.
    """
    found = place(image, mask.affine, mask.shape, mask.source or "the mask")
    if found.shape != image.shape:
        raise InputError(
            "GEOMETRY_MISMATCH",
            f"Expected labels for all of {image.source or 'the image'} (shape {image.shape}), received a part (shape"
            f" {mask.shape}) in {mask.source or 'the mask'}.",
        )
    labels = as_labels(found.turned(mask.voxels), mask.source or "the mask")
    return Volume(np.ascontiguousarray(labels), image.affine, source=mask.source, metadata=mask.metadata)


def as_labels(voxels: Array, name: str) -> Array:
    """The voxels as uint8, or uint16 where a label is above 255.

    Raises:
        InputError: NOT_LABELS.
    """
    lowest, highest = voxels.min(), voxels.max()
    if not (lowest >= 0 and highest <= LARGEST_LABEL):
        raise InputError(
            "NOT_LABELS",
            f"Expected labels from 0 to {LARGEST_LABEL}, received values from {lowest} to {highest} in {name}.",
        )
    labels = voxels.astype(np.uint8 if highest <= 255 else np.uint16)
    if voxels.dtype.kind == "f" and not np.array_equal(labels, voxels):
        raise InputError("NOT_LABELS", f"Expected labels, received values that are no whole numbers in {name}.")
    return labels
