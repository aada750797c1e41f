"""Where DICOM images lie, and whether they make one grid of voxels (axes: see `dicom`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom

from lvseg.errors import InputError
from lvseg.formats.dicom_file import number_or_none, numbers, whole
from lvseg.formats.dicom_series import Frame
from lvseg.volume import SHEAR_TOLERANCE_RAD

# Slices count as evenly spaced where distances differ by no more than this part of the smallest one ...
UNEVEN_FRACTION = 0.02
# ... or by this much, which is what positions written with two decimals can differ by.
UNEVEN_MM = 0.02
ORIENTATION_TOLERANCE = 1e-3
MISSING_SLICES_MAX = 1000
# Some writers take SpacingBetweenSlices for the gap beside a slice, which is seldom wider than the slice.
FAR_OVER_SPACING, FAR_OVER_THICKNESS = 1.5, 3.0


@dataclass(frozen=True, eq=False)
class Plane:
    """Where one image lies; positions and spacings in mm, LPS."""

    frame: Frame
    size: tuple[int, int]
    position: npt.NDArray[np.float64]
    orientation: npt.NDArray[np.float64]
    pixel_spacing: tuple[float, float]

    @property
    def path(self) -> Path:
        return self.frame.file.path

    @property
    def normal(self) -> npt.NDArray[np.float64]:
        return np.cross(self.orientation[:3], self.orientation[3:])

    def affine(self, step_mm: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Index (slice, row, column) to LPS, float64 [4, 4], of slices that follow this one by `step_mm`."""
        affine = np.eye(4)
        affine[:3, 0] = step_mm
        affine[:3, 1] = self.orientation[3:] * self.pixel_spacing[0]
        affine[:3, 2] = self.orientation[:3] * self.pixel_spacing[1]
        affine[:3, 3] = self.position
        return affine


def plane_of(frame: Frame) -> Plane:
    """Reads where an image lies.

    Raises:
        InputError: BAD_GEOMETRY, UNSUPPORTED_PIXEL_TYPE where its rows and columns are no numbers, UNSUPPORTED_FORMAT
            for many slices tiled into one image.
    """
    path, header = frame.file.path, frame.file.header
    if "MOSAIC" in frame.words:
        raise InputError(
            "UNSUPPORTED_FORMAT",
            f"Expected one slice an image, received a mosaic of many in {path} (convert it first).",
        )
    position = numbers(frame.groups, "ImagePositionPatient", 3, path)
    orientation = numbers(frame.groups, "ImageOrientationPatient", 6, path)
    spacing = numbers(frame.groups, "PixelSpacing", 2, path)
    along, down = orientation[:3], orientation[3:]
    lengths = np.linalg.norm([along, down], axis=1)
    if np.abs(lengths - 1).max() > ORIENTATION_TOLERANCE or abs(along @ down) > ORIENTATION_TOLERANCE:
        raise InputError(
            "BAD_GEOMETRY",
            f"Expected two unit vectors at right angles, received ImageOrientationPatient {orientation.tolist()} in"
            f" {path}.",
        )
    if not (spacing > 0).all():
        raise InputError(
            "BAD_GEOMETRY", f"Expected a positive spacing, received PixelSpacing {spacing.tolist()} in {path}."
        )
    return Plane(
        frame,
        (whole(header, "Rows", path), whole(header, "Columns", path)),
        position,
        np.concatenate([along / lengths[0], down / lengths[1]]),
        (float(spacing[0]), float(spacing[1])),
    )


def check_consistent(planes: Sequence[Plane], path: Path) -> None:
    """Refuses images that do not lie on one grid of voxels: InputError INCONSISTENT_SERIES."""
    first = planes[0]
    for one in planes[1:]:
        differences: dict[str, tuple[npt.ArrayLike, npt.ArrayLike, float]] = {
            "rows and columns": (first.size, one.size, 0.0),
            "PixelSpacing": (first.pixel_spacing, one.pixel_spacing, 1e-4),
            "ImageOrientationPatient": (first.orientation, one.orientation, 1e-4),
        }
        for name, (expected, received, tolerance) in differences.items():
            if not np.allclose(expected, received, atol=tolerance, rtol=0):
                raise InputError(
                    "INCONSISTENT_SERIES",
                    f"Expected the same {name} in all images, received {np.asarray(expected).tolist()} in"
                    f" {first.path.name} and {np.asarray(received).tolist()} in {one.path.name} of {path}.",
                )


def affine_of(planes: Sequence[Plane], path: Path) -> tuple[npt.NDArray[np.float64], str]:
    """Voxel index (slice, row, column) to LPS of images sorted by height, and where the slice distance comes from.

    Raises:
        InputError: MISSING_SLICES or BAD_GEOMETRY, naming where.
    """
    first = planes[0]
    if len(planes) == 1:
        distance_mm, source = thickness_mm(first, path)
        return first.affine(first.normal * distance_mm), source
    _check_even(planes, path)
    step = (planes[-1].position - first.position) / (len(planes) - 1)
    off_line = np.array([one.position - first.position - index * step for index, one in enumerate(planes)])
    off_mm = float(np.linalg.norm(off_line, axis=1).max())
    if off_mm > max(UNEVEN_MM, UNEVEN_FRACTION * float(np.linalg.norm(step))):
        raise InputError(
            "BAD_GEOMETRY",
            f"Expected slices stacked on one straight line, received one {off_mm:.2f} mm off it in {path}.",
        )
    tilt_rad = float(np.arccos(np.clip(first.normal @ step / np.linalg.norm(step), -1, 1)))
    if tilt_rad > SHEAR_TOLERANCE_RAD:
        said = number_or_none([first.frame.file.header], "GantryDetectorTilt")
        header_says = "" if said is None else f", GantryDetectorTilt {said:g}"
        raise InputError(
            "BAD_GEOMETRY",
            f"Expected slices stacked at right angles, received a stack tilted by {np.degrees(tilt_rad):.2f} degrees in"
            f" {path} (a tilted gantry{header_says}; resample the scan first).",
        )
    return first.affine(step), "positions"


def slice_warnings(planes: Sequence[Plane]) -> list[str]:
    """What the headers have against the slices' distance, of several that are evenly spaced: no sentence or one."""
    if len(planes) < 2:
        return []
    step_mm = float(np.linalg.norm(planes[-1].position - planes[0].position)) / (len(planes) - 1)
    groups: list[pydicom.Dataset] = [*planes[0].frame.groups, planes[0].frame.file.header]
    said = (number_or_none(groups, keyword) for keyword in ("SpacingBetweenSlices", "SliceThickness"))
    between_mm, thick_mm = (abs(mm) if mm else None for mm in said)
    if between_mm and step_mm > FAR_OVER_SPACING * between_mm:
        return [
            f"slices lie {step_mm:.4g} mm apart, and SpacingBetweenSlices says {between_mm:.4g}: some may be missing"
        ]
    if thick_mm and step_mm > FAR_OVER_THICKNESS * thick_mm:
        return [f"slices of {thick_mm:.4g} mm lie {step_mm:.4g} mm apart: what is between them was not seen"]
    return []


def thickness_mm(plane: Plane, path: Path) -> tuple[float, str]:
    """The slice distance of a slice alone, and the element that says it: InputError BAD_GEOMETRY if none does."""
    groups: list[pydicom.Dataset] = [*plane.frame.groups, plane.frame.file.header]
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        distance_mm = float(numbers(groups, keyword, 1, path, default=0.0)[0])
        if distance_mm > 0:
            return distance_mm, keyword
    raise InputError(
        "BAD_GEOMETRY",
        f"Expected SpacingBetweenSlices or SliceThickness for a single slice, received neither in {path}.",
    )


def heights_mm(planes: Sequence[Plane]) -> npt.NDArray[np.float64]:
    """Distance of each image from the origin along the normal of the first."""
    return np.array([planes[0].normal @ one.position for one in planes])


def _check_even(planes: Sequence[Plane], path: Path) -> None:
    """Refuses slices that are missing, doubled or unevenly spaced, naming where."""
    heights = heights_mm(planes)
    gaps_mm = np.diff(heights)
    doubled = [
        f"{heights[index]:.2f} mm ({planes[index].path.name}, {planes[index + 1].path.name})"
        for index in np.flatnonzero(gaps_mm <= UNEVEN_MM)
    ]
    if doubled:
        raise InputError(
            "MISSING_SLICES",
            f"Expected one image at each position, received several at {_listed(doubled)} along the normal in {path}.",
        )
    smallest_mm = float(gaps_mm.min())
    uneven = np.flatnonzero(gaps_mm - smallest_mm > max(UNEVEN_MM, UNEVEN_FRACTION * smallest_mm))
    if uneven.size:
        where = [f"{heights[index]:.2f} to {heights[index + 1]:.2f}" for index in uneven]
        missing = [f"{mm:.2f}" for index in uneven for mm in _missing_mm(heights[index], gaps_mm[index], smallest_mm)]
        named = f" (missing: {_listed(missing, 20)} mm)" if missing else ""
        raise InputError(
            "MISSING_SLICES",
            f"Expected slices {smallest_mm:.2f} mm apart, received gaps from {_listed(where)} mm along the"
            f" normal{named} in {path}.",
        )


def _missing_mm(height_mm: float, gap_mm: float, smallest_mm: float) -> list[float]:
    """Where slices belong in a gap that is a multiple of the smallest one."""
    steps = round(gap_mm / smallest_mm)
    off_mm = abs(gap_mm - steps * smallest_mm)
    if steps > MISSING_SLICES_MAX or off_mm > max(UNEVEN_MM, UNEVEN_FRACTION * smallest_mm) * steps:
        return []
    return [height_mm + step * gap_mm / steps for step in range(1, steps)]


def _listed(shown: Sequence[str], most: int = 5) -> str:
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
