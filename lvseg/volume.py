"""A scan and where it lies in the patient.

Axes. `voxels` is [slice, row, column] in whatever order and direction the file has them; `affine` maps a voxel's index
(slice, row, column, 1) to world millimetres in LPS (x towards the patient's left, y towards the back, z towards the
head), as DICOM defines them. Canonical means: slices from feet to head (+z), rows from front to back (+y), columns from
the patient's right to left (+x), the axial view as radiologists see it. It is reached by permuting and flipping axes
alone, so an oblique scan keeps its tilt and no voxel is ever interpolated here. `spacing_mm` is always (slice, row,
column).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import nibabel.orientations
import numpy as np
import numpy.typing as npt

from lvseg.errors import InputError

Array = npt.NDArray[Any]

# Axes further from a right angle than this (radians) are a sheared or tilted stack, not rounded direction cosines.
SHEAR_TOLERANCE_RAD = 5e-3
# A grid without tilt may place a voxel this far from the truth before the scan counts as oblique.
OBLIQUE_TOLERANCE_MM = 0.01


@dataclass(frozen=True, eq=False)  # comparing arrays gives arrays, so == and hash() go by identity
class Volume:
    """One scan or mask with its geometry.

    Args:
        voxels: any real dtype [slice, row, column].
        affine: float64 [4, 4], voxel index (slice, row, column, 1) to LPS millimetres; kept as a read-only copy.
        source: the file or folder it came from, for messages; empty for a volume made in memory.
        metadata: facts of the file that travel with it, such as ``modality`` ("MR", "CT").
        origin: of a scan that came as DICOM, what a segmentation on this grid has to say of patient and images
            (`formats.dicom_origin.Origin`); never shown or logged.

    Raises:
        InputError: BAD_GEOMETRY for an affine that is not finite, singular or sheared; NEEDS_VOLUME_INDEX if not 3-D;
            UNSUPPORTED_PIXEL_TYPE for anything but one real number or truth value per voxel.
    """

    voxels: Array
    affine: npt.NDArray[np.float64]
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    origin: object = field(default=None, repr=False)

    def __post_init__(self) -> None:
        name = self.source or "the volume"
        if self.voxels.ndim != 3:
            raise InputError(
                "NEEDS_VOLUME_INDEX",
                f"Expected one 3-D volume, received an array of shape {tuple(self.voxels.shape)} in {name}.",
            )
        if 0 in self.voxels.shape:
            raise InputError("EMPTY_IMAGE", f"Expected voxels, received shape {self.voxels.shape} in {name}.")
        if self.voxels.dtype.kind not in "biuf":
            raise InputError(
                "UNSUPPORTED_PIXEL_TYPE",
                f"Expected one real number per voxel, received dtype {self.voxels.dtype} in {name}.",
            )
        affine = np.array(self.affine, dtype=np.float64)
        check_affine(affine, name)
        affine.setflags(write=False)  # volumes of one grid share it
        object.__setattr__(self, "affine", affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of slices, rows and columns."""
        slices, rows, columns = self.voxels.shape
        return slices, rows, columns

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along (slice, row, column), in mm."""
        slice_mm, row_mm, column_mm = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(slice_mm), float(row_mm), float(column_mm)

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel in mm^3."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def directions(self) -> npt.NDArray[np.float64]:
        """Direction cosines, float64 [3, 3]: column k is the LPS unit vector of voxel axis k."""
        return self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def is_oblique(self) -> bool:
        """Whether a grid along the world axes, with the same first voxel, would misplace a voxel by over 0.01 mm."""
        canonical = self.canonical()
        along_axes = np.diag(canonical.spacing_mm)[::-1]  # slices along z, rows along y, columns along x
        furthest = np.abs(canonical.affine[:3, :3] - along_axes) @ (np.array(canonical.shape) - 1)
        return bool(np.linalg.norm(furthest) > OBLIQUE_TOLERANCE_MM)

    def world_mm(self, index: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """LPS positions in mm, float64 [..., 3], of voxel indices [..., 3] in (slice, row, column) order."""
        return np.asarray(index, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def with_voxels(self, voxels: Array, **metadata: Any) -> Volume:
        """The same grid holding other voxels of the same shape, such as a mask of this scan."""
        if voxels.shape != self.voxels.shape:
            raise ValueError(f"Expected voxels of shape {self.voxels.shape}, received shape={voxels.shape}.")
        return replace(self, voxels=voxels, metadata={**self.metadata, **metadata})

    def canonical(self) -> Volume:
        """The same voxels in canonical axis order and direction (module docstring); voxels are a view."""
        orientation = _orientation(self.affine)
        voxels = nibabel.orientations.apply_orientation(self.voxels, orientation)
        affine = self.affine @ nibabel.orientations.inv_ornt_aff(orientation, self.voxels.shape)
        return replace(self, voxels=voxels, affine=affine)

    def from_canonical(self, voxels: Array) -> Volume:
        """Puts voxels of `self.canonical()`'s shape, such as a mask made there, back on this volume's own grid."""
        canonical = np.array([[0, 1], [1, 1], [2, 1]])
        to_own = nibabel.orientations.ornt_transform(canonical, _orientation(self.affine))
        own = nibabel.orientations.apply_orientation(voxels, to_own)
        return self.with_voxels(np.ascontiguousarray(own))


def check_same_grid(image: Volume, mask: Volume, tolerance_mm: float = 0.01) -> None:
    """Refuses a mask that does not lie voxel on voxel on its image, in whatever orientation either is stored.

    Raises:
        InputError: GEOMETRY_MISMATCH.
    """
    one, other = image.canonical(), mask.canonical()
    corners = np.array(np.meshgrid(*((0, count - 1) for count in one.shape))).reshape(3, -1).T
    if one.shape != other.shape or np.abs(one.world_mm(corners) - other.world_mm(corners)).max() > tolerance_mm:
        raise InputError(
            "GEOMETRY_MISMATCH",
            f"Expected the grid of {image.source or 'the image'} (shape {one.shape}, canonical), received another one"
            f" (shape {other.shape}) in {mask.source or 'the mask'}.",
        )


def as_float32(voxels: Array, name: str) -> npt.NDArray[np.float32]:
    """The voxels as float32; InputError NONFINITE_VOXELS if one is, or becomes, no finite number."""
    with np.errstate(over="ignore"):
        values = voxels.astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError(
            "NONFINITE_VOXELS",
            f"Expected finite voxels below 3.4e38, received others in {name or 'the scan'}.",
        )
    return values


def check_affine(affine: npt.NDArray[np.float64], name: str) -> None:
    """Refuses geometry that cannot be true.

    Args:
        affine: float64 [4, 4].
        name: the file, for the message.

    Raises:
        InputError: BAD_GEOMETRY.
    """
    if affine.shape != (4, 4) or not np.all(np.isfinite(affine)) or affine[3].tolist() != [0, 0, 0, 1]:
        raise InputError(
            "BAD_GEOMETRY",
            f"Expected a finite 4 x 4 affine whose last row is 0, 0, 0, 1, received {affine.tolist()} in {name}.",
        )
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if np.any(lengths <= 0) or np.any(lengths > 1e4):
        raise InputError(
            "BAD_GEOMETRY",
            f"Expected voxel spacings between 0 and 10000 mm, received {lengths.tolist()} in {name}.",
        )
    directions = affine[:3, :3] / lengths
    cosines = np.abs(directions.T @ directions - np.eye(3))
    if cosines.max() > SHEAR_TOLERANCE_RAD:
        raise InputError(
            "BAD_GEOMETRY",
            f"Expected voxel axes at right angles, received axes that are off by up to"
            f" {np.degrees(np.arcsin(min(1.0, cosines.max()))):.2f} degrees in {name} (a tilted gantry or a sheared"
            " affine; resample the scan first).",
        )


def _orientation(affine: npt.NDArray[np.float64]) -> Array:
    """nibabel's orientation array from this affine's axes to canonical (z, y, x)."""
    zyx = affine[[2, 1, 0, 3]]
    return nibabel.orientations.io_orientation(zyx)
