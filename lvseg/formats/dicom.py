"""One DICOM series in: single-frame files of a folder, a list or a zip, an Enhanced file, or a segmentation.

Axes. DICOM's world is LPS. A slice's first voxel lies at ImagePositionPatient; the column index runs along the first
triple of ImageOrientationPatient, the row index along the second. Slices are stacked along their normal, the cross
product of the two, from the lowest to the highest position, whatever the files' names and numbers say. The distance
between slices is that of their positions; SliceThickness, which is often another, counts only where there is one slice
alone and no SpacingBetweenSlices, and the metadata says so.

Nothing is picked, filled in or left out: one whole, evenly spaced stack of slices is read. Where there are several,
`dicom_series` lists them and lets one be chosen. Files that are no DICOM, a DICOMDIR, and objects that have no pixels
by their kind are passed over. A folder holds what the folders in it hold, as a zip does; a link to a folder, or folders
deeper than FOLDERS_DEEP, might hold slices too, and are refused.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom

from lvseg.errors import InputError
from lvseg.formats import archive, dicom_seg
from lvseg.formats.checks import voxel_bytes
from lvseg.formats.dicom_file import (
    DicomFile,
    check_pixels,
    decoded,
    holds_dicom,
    is_directory_file,
    number_or_none,
    numbers,
    quiet,
    read_header,
    text,
    with_pixels,
)
from lvseg.formats.dicom_geometry import Plane, affine_of, check_consistent, heights_mm, plane_of, slice_warnings
from lvseg.formats.dicom_origin import origin_of, origin_warnings
from lvseg.formats.dicom_series import Frame, choose, echo_time_ms
from lvseg.volume import Volume

FOLDERS_DEEP = 8
# What is one number or word of the whole stack, by its name in the metadata.
WORDS = {
    "modality": ("Modality",),
    "series_description": ("SeriesDescription",),
    "series_instance_uid": ("SeriesInstanceUID",),
    "series_number": ("SeriesNumber",),
    "manufacturer": ("Manufacturer",),
    "manufacturer_model": ("ManufacturerModelName",),
    "software_versions": ("SoftwareVersions",),
    "sequence_name": ("SequenceName", "PulseSequenceName"),
    "rescale_type": ("RescaleType",),
}
NUMBERS = {
    "field_strength_t": "MagneticFieldStrength",
    "repetition_time_ms": "RepetitionTime",
    "flip_angle_deg": "FlipAngle",
}
# Philips: signal as the scanner measured it is the rescaled value / (rescale slope * this private scale slope), of one
# scan's images each with its own (Chenevert et al., Transl Oncol 2014, 7:65).
PHILIPS_GROUP, PHILIPS_BLOCK, SCALE_SLOPE = 0x2005, "PHILIPS MR IMAGING DD 001", 0x0E


def read(path: Path | Sequence[Path], series: str | None = None, on: Volume | None = None) -> Volume:
    """Reads one stack of slices of one series.

    Args:
        path: a folder, a zip, a file, or several files.
        series: which of several, as `dicom_series` says.
        on: an image; a segmentation is then read on its grid.

    Returns:
        voxels [slice, row, column], from the lowest to the highest position along the normal, with rescale slope and
        intercept applied: int16 where these are whole numbers and the values fit, else float32. Of a segmentation the
        labels (`dicom_seg`). Metadata: the keys of `WORDS` (empty where the file has none) and `NUMBERS` (None where it
        has none), `image_type` (list of words), `echo_times_ms`, `units` (of the rescaled values, empty if none are
        given), `real_world_values` (further mappings of the stored values: slope, intercept, units, label),
        `signal_scale` (rescaled values a unit of the signal as the scanner measured it, None where files do not say or
        not one for all slices),
        `slice_distance_source` ("positions", "SpacingBetweenSlices" or "SliceThickness"), `slice_warnings` (what the
        headers have against it, and against the slices' being of one scan), `slice_files` (the file of
        each slice, of single-frame series) and `format` ("DICOM"). Of images also the `origin` (`dicom_origin`).

    Raises:
        InputError: NOT_FOUND, NOT_READABLE, UNSUPPORTED_FORMAT, MULTIPLE_SERIES, UNKNOWN_SERIES, INCONSISTENT_SERIES,
            MISSING_SLICES, BAD_GEOMETRY, NO_PIXELS, UNSUPPORTED_PIXEL_TYPE, UNSUPPORTED_TRANSFER_SYNTAX,
            INPUT_TRUNCATED, DECOMPRESS_LIMIT, DIMS_LIMIT or EMPTY_IMAGE; of a zip also those of `archive.unzip`; of a
            segmentation those of `dicom_seg`.
    """
    with quiet():
        if isinstance(path, Path) and path.is_file() and path.suffix.lower() == ".zip":
            return _read_zip(path, series, on)
        files, where = (_files(path), path) if isinstance(path, Path) else _of_list(path)
        return _read_files(files, where, series, on, {})


def _read_zip(path: Path, series: str | None, on: Volume | None) -> Volume:
    with tempfile.TemporaryDirectory(prefix="lvseg-") as temporary:
        folder = Path(temporary) / "members"
        names = archive.unzip(path, folder, archive.CONTENT_BYTES_MAX, archive.MEMBERS_MAX, str(path))
        try:
            members = [folder / name for name in names]
            files = [member for member in members if holds_dicom(member) and not is_directory_file(member)]
            if not files:
                raise InputError("NOT_FOUND", f"Expected DICOM files, received none in {path}.")
            return _read_files(files, path, series, on, names)
        except InputError as error:
            sentence = error.sentence.replace(str(folder), str(path))
            shown = {name: "".join(c if c.isprintable() else "_" for c in own) for name, own in names.items()}
            unpacked = "|".join(map(re.escape, shown)) or "(?!)"
            sentence = re.sub(unpacked, lambda found: shown[found[0]], sentence)  # at once: a member may be named alike
            raise InputError(error.code, sentence) from error


def _of_list(paths: Sequence[Path]) -> tuple[list[Path], Path]:
    """The files of a list, each of which has to be DICOM, and their folder for messages."""
    files = [Path(path) for path in paths]
    if not files:
        raise InputError("NOT_FOUND", "Expected DICOM files, received an empty list.")
    if len(set(files)) != len(files):
        raise InputError("INCONSISTENT_SERIES", f"Expected each file once, received one twice in {files[0].parent}.")
    for file in files:
        if not file.is_file():
            raise InputError("NOT_FOUND", f"Expected a DICOM file, received a path where none is: {file}.")
    return [_checked(file) for file in files], files[0].parent


def _checked(file: Path) -> Path:
    if not holds_dicom(file):
        raise InputError("UNSUPPORTED_FORMAT", f"Expected DICM at byte 128, received a file without in {file}.")
    return file


def _files(path: Path) -> list[Path]:
    """The series' files: `path` itself, or the DICOM files of the folder."""
    if not path.is_dir():
        return [_checked(path)]
    files = _of_folder(path, FOLDERS_DEEP)
    if not files:
        raise InputError("NOT_FOUND", f"Expected DICOM files, received none in the folder {path}.")
    return files


def _of_folder(folder: Path, deep: int) -> list[Path]:
    """The DICOM files of the folder and of those in it."""
    inside = sorted(folder.iterdir())
    for entry in inside:
        if not entry.is_file() and not entry.is_dir():  # such as a link to a slice that is gone
            raise InputError("NOT_READABLE", f"Expected files, received a device, a pipe or a broken link: {entry}.")
    files = [entry for entry in inside if entry.is_file() and holds_dicom(entry) and not is_directory_file(entry)]
    folders = [entry for entry in inside if entry.is_dir()]
    for entry in folders:  # slices of one that is passed over would not be missed
        if entry.is_symlink():
            raise InputError("NOT_READABLE", f"Expected files and folders, received a link to a folder: {entry}.")
        if not deep:
            raise InputError(
                "NOT_READABLE", f"Expected folders at most {FOLDERS_DEEP} deep, received one that is deeper: {entry}."
            )
    return files + [file for entry in folders for file in _of_folder(entry, deep - 1)]


def _read_files(
    paths: Sequence[Path], path: Path, series: str | None, on: Volume | None, names: Mapping[str, str]
) -> Volume:
    frames = choose([read_header(file) for file in paths], series, path)
    if frames[0].file.is_segmentation:
        return dicom_seg.read(frames, path) if on is None else dicom_seg.read_on(on, frames, path)
    for file in _distinct(frames):
        check_pixels(file)
    planes = [plane_of(frame) for frame in frames]
    check_consistent(planes, path)
    order = np.argsort(heights_mm(planes), kind="stable")
    planes = [planes[index] for index in order]
    affine, source = affine_of(planes, path)
    rescaling = [_rescaling(plane.frame) for plane in planes]
    voxels = _voxels(planes, rescaling, path)
    metadata = _metadata([plane.frame for plane in planes], rescaling)
    metadata["slice_distance_source"] = source
    origin = origin_of(planes)
    metadata["slice_warnings"] = slice_warnings(planes) + origin_warnings(planes, origin)
    if all("PerFrameFunctionalGroupsSequence" not in frame.file.header for frame in frames):
        metadata["slice_files"] = tuple(names.get(plane.path.name, plane.path.name) for plane in planes)
    return Volume(voxels, affine, source=str(path), metadata=metadata, origin=origin)


def _distinct(frames: Sequence[Frame]) -> Iterator[DicomFile]:
    seen: set[Path] = set()
    for frame in frames:
        if frame.file.path not in seen:
            seen.add(frame.file.path)
            yield frame.file


def _rescaling(frame: Frame) -> tuple[float, float]:
    """Slope and intercept from stored to rescaled values."""
    path = frame.file.path
    groups = [*frame.groups, frame.file.header]  # where some writers of multi-frame files leave them
    slope = float(numbers(groups, "RescaleSlope", 1, path, default=1.0)[0])
    intercept = float(numbers(groups, "RescaleIntercept", 1, path, default=0.0)[0])
    if slope == 0:
        raise InputError("UNSUPPORTED_PIXEL_TYPE", f"Expected a RescaleSlope other than 0, received 0 in {path}.")
    return slope, intercept


def _voxels(planes: Sequence[Plane], rescaling: Sequence[tuple[float, float]], path: Path) -> npt.NDArray[Any]:
    """The rescaled values, int16 or float32 [slice, row, column]."""
    voxel_bytes([len(planes), *planes[0].size], 4, path)
    stored: list[npt.NDArray[Any]] = [np.empty(0)] * len(planes)
    for file in _distinct([plane.frame for plane in planes]):
        dataset = with_pixels(file)
        for place, plane in enumerate(planes):
            if plane.frame.file is file:
                stored[place] = decoded(dataset, plane.frame.index, plane.size, file.path)
    whole = all(slope.is_integer() and intercept.is_integer() for slope, intercept in rescaling)
    limits = np.iinfo(np.int16)
    extremes = [
        int(value) * slope + intercept
        for (slope, intercept), plane in zip(rescaling, stored, strict=True)
        for value in (plane.min(), plane.max())
    ]
    fits = limits.min <= min(extremes) and max(extremes) <= limits.max
    voxels = np.empty((len(planes), *planes[0].size), np.int16 if whole and fits else np.float32)
    for place, (slope, intercept) in enumerate(rescaling):
        with np.errstate(over="ignore"):  # what overflows is infinite, and `read_volume` refuses it
            voxels[place] = stored[place].astype(np.float64) * slope + intercept
    return voxels


def _metadata(frames: Sequence[Frame], rescaling: Sequence[tuple[float, float]]) -> dict[str, Any]:
    header = frames[0].file.header
    groups = [*(group for group in frames[0].groups if group is not header), header]
    echo_times_ms = sorted({echo_ms for frame in frames if (echo_ms := echo_time_ms(frame)) is not None})
    mappings = _real_world_values(groups)
    same = [one["units"] for one in mappings if (one["slope"], one["intercept"]) == rescaling[0]]
    return {
        **{name: next((word for key in keys if (word := text(groups, key))), "") for name, keys in WORDS.items()},
        **{name: number_or_none(groups, keyword) for name, keyword in NUMBERS.items()},
        "image_type": list(frames[0].words),
        "echo_times_ms": echo_times_ms,
        "units": same[0] if same and len(set(rescaling)) == 1 else "",
        "real_world_values": mappings,
        "signal_scale": _signal_scale(frames, rescaling),
        "format": "DICOM",
    }


def _signal_scale(frames: Sequence[Frame], rescaling: Sequence[tuple[float, float]]) -> float | None:
    """Rescaled values a unit of signal, where the maker's own element says it and it is one for all images."""
    slopes = [_scale_slope(frame) for frame in frames]
    scales = {float(f"{slope * own:.6g}") for (slope, _), own in zip(rescaling, slopes, strict=True) if own is not None}
    return scales.pop() if len(scales) == 1 and None not in slopes else None


def _scale_slope(frame: Frame) -> float | None:
    """Philips's scale slope: in the header, or in a sequence of Philips's own in a frame's functional groups."""
    header = frame.file.header
    own = header.get("PerFrameFunctionalGroupsSequence") or [header]
    for group in [own[frame.index], *(header.get("SharedFunctionalGroupsSequence") or []), header]:
        try:
            for dataset in _with_items(group.group_dataset(PHILIPS_GROUP)):
                for creator in dataset.private_creators(PHILIPS_GROUP):
                    block = dataset.private_block(PHILIPS_GROUP, creator)
                    if creator.upper() == PHILIPS_BLOCK and SCALE_SLOPE in block:
                        slope = float(block[SCALE_SLOPE].value)
                        if np.isfinite(slope) and slope > 0:
                            return slope
        except Exception:  # a maker's element that cannot be parsed says nothing
            continue
    return None


def _with_items(dataset: pydicom.Dataset) -> Iterator[pydicom.Dataset]:
    """The dataset, and the items of its sequences, which are parsed only if they are asked for."""
    yield dataset
    for element in dataset:
        if element.VR == "SQ":
            yield from element.value


def _real_world_values(groups: Sequence[pydicom.Dataset]) -> list[dict[str, Any]]:
    """Mappings of the stored values to a physical quantity: its slope, intercept (None of a table), units and label."""
    items = [item for group in groups for item in group.get("RealWorldValueMappingSequence") or []]
    words = ("RealWorldValueSlope", "RealWorldValueLUTData")
    # In Enhanced objects a functional group is an item itself.
    items += [group for group in groups if any(word in group for word in words)]
    mappings = []
    for item in items:
        slope = number_or_none([item], "RealWorldValueSlope")
        intercept = number_or_none([item], "RealWorldValueIntercept")
        codes = list(item.get("MeasurementUnitsCodeSequence") or [])
        if slope is None or intercept is None:
            if "RealWorldValueLUTData" not in item:
                continue
            slope = intercept = None
        units = text(codes, "CodeValue") or text(codes, "CodeMeaning")
        mappings.append({"slope": slope, "intercept": intercept, "units": units, "label": text([item], "LUTLabel")})
    return mappings
