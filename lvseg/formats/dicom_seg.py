"""DICOM segmentations in, as labels: binary, fractional and label-map objects.

Each frame is one segment's mask of one slice, in any order; frames where a segment has nothing are usually left out. A
voxel's label is the Segment Number; of a fractional object a voxel belongs to a segment from one half on. A voxel of
two segments has no one label, so segments that overlap are refused by name. Pathology's tiled objects are refused.

Frames are placed by the code that places those of Enhanced images. On its own a segmentation gets the grid from its
lowest frame to its highest; on an image's grid each frame has to lie on one of its slices. highdicom, which wants more
of an object than its geometry and its pixels, is the reference in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom

from lvseg.errors import InputError
from lvseg.formats.checks import voxel_bytes
from lvseg.formats.dicom_file import DicomFile, check_pixels, damaged, decoded, text, whole, with_pixels
from lvseg.formats.dicom_geometry import (
    UNEVEN_FRACTION,
    UNEVEN_MM,
    Plane,
    check_consistent,
    heights_mm,
    plane_of,
    thickness_mm,
)
from lvseg.formats.dicom_series import Frame
from lvseg.formats.grid import LARGEST_LABEL, place
from lvseg.volume import SHEAR_TOLERANCE_RAD, Volume


def read(frames: Sequence[Frame], path: Path) -> Volume:
    """Reads a segmentation on its own grid.

    Args:
        frames: of one file.
        path: for messages.

    Returns:
        uint8 labels [slice, row, column], or uint16 where a number is above 255; metadata `labels` ({number: name}),
        `modality` ("SEG"), `format` ("DICOM SEG").

    Raises:
        InputError: OVERLAPPING_SEGMENTS, or what is said of images in `dicom.read`.
    """
    file, planes, names = _opened(frames, path)
    heights = heights_mm(planes)
    lowest = planes[int(heights.argmin())]
    step_mm = _step_mm(heights, lowest, path)
    slices = round(float(heights.max() - heights.min()) / step_mm) + 1
    voxel_bytes([slices, *lowest.size], 2, path)
    places = [round(float(height - heights.min()) / step_mm) for height in heights]
    step = _step(planes, places, lowest, step_mm, path)
    labels = np.zeros((slices, *lowest.size), _dtype(names))
    for index, mask, numbers in _masks(file, planes, names, path):
        _put(labels[places[index]], mask, numbers, names, path)
    return Volume(labels, lowest.affine(step), source=str(path), metadata=_metadata(names, file))


def read_on(image: Volume, frames: Sequence[Frame], path: Path) -> Volume:
    """Reads a segmentation on the grid of its image; what the object leaves out is background.

    Args:
        image: the grid.
        frames: of one file.
        path: for messages.

    Returns:
        As `read` does, in the image's shape and axes, with the image's affine.

    Raises:
        InputError: GEOMETRY_MISMATCH, or what `read` raises.
    """
    file, planes, names = _opened(frames, path)
    labels = np.zeros(image.shape, _dtype(names))
    # A frame is one slice thick, whatever it says of its thickness: the slices of its image may overlap.
    along = np.abs(image.directions.T @ planes[0].normal)
    step = planes[0].normal * image.spacing_mm[int(along.argmax())]
    found = [place(image, one.affine(step), (1, *one.size), str(path)) for one in planes]
    for index, mask, numbers in _masks(file, planes, names, path):
        # A view of the labels in the frame's own axes: what is put there lies in the image's.
        spot = found[index]
        block = labels[spot.box]
        flipped = np.flip(block, [axis for axis, is_flipped in enumerate(spot.flipped) if is_flipped])
        _put(flipped.transpose(np.argsort(spot.axes))[0], mask, numbers, names, path)
    return Volume(labels, image.affine, source=str(path), metadata=_metadata(names, file))


def _opened(frames: Sequence[Frame], path: Path) -> tuple[DicomFile, list[Plane], dict[int, str]]:
    files = {id(frame.file): frame.file for frame in frames}
    if len(files) != 1:
        raise InputError(
            "MULTIPLE_SERIES", f"Expected one segmentation object, received {len(files)} in one series in {path}."
        )
    file = frames[0].file
    check_pixels(file)
    header = file.header
    if text([header], "DimensionOrganizationType").startswith("TILED") or "TotalPixelMatrixColumns" in header:
        raise InputError("UNSUPPORTED_FORMAT", f"Expected slices, received a tiled segmentation in {path}.")
    planes = [plane_of(frame) for frame in frames]
    check_consistent(planes, path)
    voxel_bytes([1, *planes[0].size], 2, path)
    return file, planes, _names(header, path)


def _names(header: pydicom.Dataset, path: Path) -> dict[int, str]:
    """The segments' names by number."""
    names: dict[int, str] = {}
    try:
        for item in header["SegmentSequence"].value:
            number = int(item.SegmentNumber)
            if number in names:
                raise ValueError
            names[number] = str(item.get("SegmentLabel") or "")[:64]
    except Exception as error:  # absent, or whatever pydicom meets in it
        raise damaged(path) from error
    names.pop(0, None)  # a label map may describe its background
    if not names or not all(0 < number <= LARGEST_LABEL for number in names):
        raise InputError(
            "UNSUPPORTED_FORMAT", f"Expected segments numbered from 1 on, received {sorted(names)[:20]} in {path}."
        )
    return names


def _metadata(names: dict[int, str], file: DicomFile) -> dict[str, Any]:
    header = [file.header]
    return {
        "modality": "SEG",
        "format": "DICOM SEG",
        "labels": names,
        "series_description": text(header, "SeriesDescription"),
        "series_instance_uid": text(header, "SeriesInstanceUID"),
        "series_number": text(header, "SeriesNumber"),
    }


def _dtype(names: dict[int, str]) -> type[np.unsignedinteger[Any]]:
    return np.uint8 if max(names) <= 255 else np.uint16


def _step_mm(heights: npt.NDArray[np.float64], plane: Plane, path: Path) -> float:
    """The slice distance of which every distance between frames is a multiple."""
    apart = np.unique(np.round(heights - heights.min(), 6))
    gaps = np.diff(apart)
    gaps = gaps[gaps > UNEVEN_MM]
    said_mm = 0.0
    try:
        said_mm = thickness_mm(plane, path)[0]
    except InputError:
        if not gaps.size:
            raise
    if not gaps.size:
        return said_mm
    # As uneven as images may be, and their positions rounded: the mean of the single steps is the distance.
    smallest_mm = float(gaps.min())
    uneven_mm = max(UNEVEN_MM, UNEVEN_FRACTION * smallest_mm)
    for step_mm in (said_mm, smallest_mm, float(gaps[gaps <= smallest_mm + uneven_mm].mean())):
        if step_mm <= UNEVEN_MM or step_mm > smallest_mm + uneven_mm:
            continue
        steps = apart / step_mm
        # The whole stack is taken at once: an error that grows from slice to slice would place the last one wrongly.
        if (np.abs(steps - np.rint(steps)) * step_mm).max() <= max(UNEVEN_MM, UNEVEN_FRACTION * step_mm):
            return float(apart.max() / np.rint(apart.max() / step_mm))
    raise InputError(
        "MISSING_SLICES",
        f"Expected frames at multiples of one distance, received distances from {gaps.min():.2f} to {gaps.max():.2f} mm"
        f" in {path}.",
    )


def _step(
    planes: Sequence[Plane], places: Sequence[int], lowest: Plane, step_mm: float, path: Path
) -> npt.NDArray[np.float64]:
    """From slice to slice, in mm: along the line from the lowest frame to the highest if images may tilt that much."""
    highest = planes[int(np.argmax(places))]
    step = lowest.normal * step_mm
    if max(places):
        line = (highest.position - lowest.position) / max(places)
        if np.linalg.norm(np.cross(lowest.normal, line)) <= np.sin(SHEAR_TOLERANCE_RAD) * np.linalg.norm(line):
            step = line
    for one, above in zip(planes, places, strict=True):
        off = one.position - lowest.position - above * step
        off_mm = float(np.linalg.norm(off - lowest.normal * (lowest.normal @ off)))
        if off_mm > max(UNEVEN_MM, UNEVEN_FRACTION * step_mm):  # as for images
            raise InputError(
                "BAD_GEOMETRY",
                f"Expected frames stacked on one straight line, received one {off_mm:.2f} mm off it in {path}.",
            )
    return step


def _masks(
    file: DicomFile, planes: Sequence[Plane], names: dict[int, str], path: Path
) -> Iterator[tuple[int, npt.NDArray[Any], npt.NDArray[Any]]]:
    """For each frame its number, where it has something [row, column], and the labels there."""
    kind = text([file.header], "SegmentationType").upper()
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        raise InputError(
            "UNSUPPORTED_FORMAT",
            f"Expected a SegmentationType of BINARY, FRACTIONAL or LABELMAP, received {kind[:20]!r} in {path}.",
        )
    half = 0.5
    if kind == "FRACTIONAL":
        half = whole(file.header, "MaximumFractionalValue", path) / 2
    dataset = with_pixels(file)
    for index, one in enumerate(planes):
        values = decoded(dataset, one.frame.index, one.size, path)
        if kind == "LABELMAP":
            mask = values > 0
            yield index, mask, values[mask]
            continue
        number = whole(_segment_group(one.frame, path), "ReferencedSegmentNumber", path)
        mask = values >= max(half, 0.5)
        yield index, mask, np.full(np.count_nonzero(mask), number, np.uint32)


def _segment_group(frame: Frame, path: Path) -> pydicom.Dataset:
    found = next((group for group in frame.groups if "ReferencedSegmentNumber" in group), None)
    if found is None:
        raise InputError("UNSUPPORTED_FORMAT", f"Expected the segment of each frame, received one without in {path}.")
    return found


def _put(
    plane: npt.NDArray[Any], mask: npt.NDArray[Any], numbers: npt.NDArray[Any], names: dict[int, str], path: Path
) -> None:
    """Writes labels into a slice, refusing those that the object does not describe and voxels that have one already."""
    unknown = set(np.unique(numbers).tolist()) - set(names)
    if unknown:
        raise InputError(
            "UNSUPPORTED_FORMAT",
            f"Expected segments {sorted(names)[:20]}, received voxels of segment {min(unknown)} in {path}.",
        )
    taken = plane[mask]
    both = (taken != 0) & (taken != numbers)
    if both.any():
        first, second = int(taken[both][0]), int(numbers[both][0])
        raise InputError(
            "OVERLAPPING_SEGMENTS",
            f"Expected one segment a voxel, received {int(np.count_nonzero(both))} voxels in one slice of both"
            f" {names[first]!r} ({first}) and {names[second]!r} ({second}) in {path}.",
        )
    plane[mask] = numbers
