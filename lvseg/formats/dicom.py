"""One DICOM series in: single-frame files of a folder, or an Enhanced multi-frame file.

Axes. DICOM's world is LPS. A slice's first voxel lies at ImagePositionPatient; the column index runs along the first
triple of ImageOrientationPatient, the row index along the second. Slices are stacked along their normal, the cross
product of the two, from the lowest to the highest position, whatever the files' names and numbers say. The distance
between slices is that of their positions; SliceThickness, which is often another, counts only where there is one slice
alone and no SpacingBetweenSlices, and the metadata says so.

Nothing is picked, filled in or left out: a folder has to hold one whole, evenly spaced series. Files that are no DICOM,
and a DICOMDIR, are passed over; a folder that holds nothing but one folder stands for that one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.encaps import generate_frames
from pydicom.filereader import read_file_meta_info
from pydicom.pixels import get_decoder
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, JPEG2000TransferSyntaxes, MediaStorageDirectoryStorage

from lvseg.errors import InputError
from lvseg.formats.checks import truncated, voxel_bytes
from lvseg.volume import Volume

PREAMBLE_BYTES = 132
UNDEFINED_LENGTH = 0xFFFFFFFF
DELIMITER_BYTES = 8
# Slices count as evenly spaced where distances differ by no more than this part of the smallest one ...
UNEVEN_FRACTION = 0.02
# ... or by this much, which is what positions written with two decimals can differ by.
UNEVEN_MM = 0.02
ORIENTATION_TOLERANCE = 1e-3
HEADER_KEYWORDS = (
    "ImageType",
    "MagneticFieldStrength",
    "Manufacturer",
    "ManufacturerModelName",
    "ModalityLUTSequence",
    "Modality",
    "NumberOfFrames",
    "PerFrameFunctionalGroupsSequence",
    "PhotometricInterpretation",
    "SeriesDescription",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SharedFunctionalGroupsSequence",
)
END_OF_CODESTREAM = b"\xff\xd9"


@dataclass(frozen=True)
class _Slice:
    """What the header says of one frame; positions and spacings in mm, LPS."""

    path: Path
    frame: int
    size: tuple[int, int]
    position: npt.NDArray[np.float64]
    orientation: npt.NDArray[np.float64]
    pixel_spacing: tuple[float, float]
    slope: float
    intercept: float
    localiser: bool

    @property
    def normal(self) -> npt.NDArray[np.float64]:
        return np.cross(self.orientation[:3], self.orientation[3:])


def is_dicom(path: Path) -> bool:
    """Whether the file has DICM at byte 128."""
    with path.open("rb") as file:
        return file.read(PREAMBLE_BYTES)[128:] == b"DICM"


def read(path: Path) -> Volume:
    """Reads one series.

    Args:
        path: a folder or a file.

    Returns:
        voxels [slice, row, column], from the lowest to the highest position along the normal, with rescale slope and
        intercept applied: int16 where these are whole numbers and the values fit, else float32; metadata `modality`,
        `series_description`, `manufacturer`, `manufacturer_model`, `field_strength_t` (None where the file has none),
        `slice_distance_source` ("positions", "SpacingBetweenSlices" or "SliceThickness") and `format` ("DICOM").

    Raises:
        InputError: NOT_FOUND, NOT_READABLE, UNSUPPORTED_FORMAT, MULTIPLE_SERIES, INCONSISTENT_SERIES, MISSING_SLICES,
            BAD_GEOMETRY, NO_PIXELS, UNSUPPORTED_PIXEL_TYPE, UNSUPPORTED_TRANSFER_SYNTAX, INPUT_TRUNCATED, DIMS_LIMIT
            or EMPTY_IMAGE.
    """
    with warnings.catch_warnings():
        # pydicom warns of every small breach of the standard; those that matter here are looked for below.
        warnings.simplefilter("ignore")
        headers = {file: _header(file) for file in _files(path)}
        _one_series(list(headers.values()), path)
        for file, header in headers.items():
            _check_pixel_type(header, file)
        slices = [one for file, header in headers.items() for one in _slices(file, header)]
        _check_consistent(slices, path)
        normal = slices[0].normal
        slices.sort(key=lambda one: float(normal @ one.position))
        first_header = headers[slices[0].path]
        affine, source = _affine(slices, first_header, path)
        voxels = _voxels(slices, headers, path)
    metadata = {
        "modality": str(first_header.get("Modality", "")),
        "series_description": str(first_header.get("SeriesDescription", "")),
        "manufacturer": str(first_header.get("Manufacturer", "")),
        "manufacturer_model": str(first_header.get("ManufacturerModelName", "")),
        "field_strength_t": _number_or_none(first_header.get("MagneticFieldStrength")),
        "slice_distance_source": source,
        "format": "DICOM",
    }
    return Volume(voxels, affine, source=str(path), metadata=metadata)


def _files(path: Path) -> list[Path]:
    """The series' files: `path` itself, or the DICOM files of the folder."""
    if not path.is_dir():
        if not _holds_dicom(path):
            raise InputError("UNSUPPORTED_FORMAT", f"Expected DICM at byte 128, received a file without in {path}.")
        return [path]
    folder = path
    while True:
        inside = sorted(folder.iterdir())
        folders = [entry for entry in inside if entry.is_dir()]
        if len(inside) != 1 or len(folders) != 1:
            break
        folder = folders[0]
    for entry in inside:
        if not entry.is_file() and not entry.is_dir():  # such as a link to a slice that is gone
            raise InputError("NOT_READABLE", f"Expected files, received a device, a pipe or a broken link: {entry}.")
    files = [entry for entry in inside if entry.is_file() and _holds_dicom(entry) and not _is_directory_file(entry)]
    if not files:
        raise InputError("NOT_FOUND", f"Expected DICOM files, received none in the folder {folder}.")
    return files


def _holds_dicom(path: Path) -> bool:
    """Whether the file is DICOM; a file that was one, or calls itself one, is an error rather than passed over."""
    with path.open("rb") as file:
        start = file.read(PREAMBLE_BYTES)
    if start[128:] == b"DICM":
        return True
    if len(start) < PREAMBLE_BYTES and not start.strip(b"\0"):
        # Most preambles are zeros, so this may have been a slice, and one at the end would not be missed.
        raise truncated(path, PREAMBLE_BYTES, len(start))
    if path.suffix.lower() in (".dcm", ".ima") or start[:4] in (b"\x08\0\x00\0", b"\x08\0\x05\0", b"\x02\0\x00\0"):
        raise InputError("UNSUPPORTED_FORMAT", f"Expected DICM at byte 128, received a file without in {path}.")
    return False


def _is_directory_file(path: Path) -> bool:
    return _meta(path, "MediaStorageSOPClassUID") == MediaStorageDirectoryStorage


def _meta(path: Path, keyword: str) -> str:
    """A word of the file's meta information, empty if it has none."""
    try:
        return str(read_file_meta_info(path).get(keyword, ""))
    except Exception as error:  # pydicom raises whatever its parser meets first
        raise _damaged(path) from error


def _damaged(path: Path) -> InputError:
    return InputError("INPUT_TRUNCATED", f"Expected a whole DICOM file, received a damaged or cut short one in {path}.")


def _header(path: Path) -> pydicom.Dataset:
    """Everything before the pixels, once it is known that there are pixels and that the file holds all of them."""
    syntax = UID(_meta(path, "TransferSyntaxUID"))
    if not syntax or syntax == DeflatedExplicitVRLittleEndian or not _has_decoder(syntax):
        raise InputError(
            "UNSUPPORTED_TRANSFER_SYNTAX",
            f"Expected a transfer syntax with a decoder here, received {syntax.name or 'none'!r} in {path}.",
        )
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True)
            start = file.read(12)
            pixels_at = file.tell()
            for keyword in HEADER_KEYWORDS:
                header.get(keyword)  # pydicom finds out only now whether it can be read
            ends_early = _ends_early(header, file_bytes)
        except Exception as error:
            raise _damaged(path) from error
    order: Literal["little", "big"] = "little" if syntax.is_little_endian else "big"
    group, element = (int.from_bytes(start[at : at + 2], order) for at in (0, 2))
    if (group, element) != (0x7FE0, 0x0010):
        if ends_early:
            raise _damaged(path)
        raise InputError("NO_PIXELS", f"Expected PixelData, received a DICOM file without (or cut short) in {path}.")
    length = int.from_bytes(start[4:8] if syntax.is_implicit_VR else start[8:12], order)
    if syntax.is_implicit_VR:
        pixels_at -= 4
    if not syntax.is_encapsulated:
        expected = _whole(header, "Rows", path) * _whole(header, "Columns", path) * _frames(header, path)
        expected *= _whole(header, "BitsAllocated", path) * _whole(header, "SamplesPerPixel", path)
        expected = -(-expected // 8)
        if length < expected or pixels_at + length > file_bytes:
            raise truncated(path, pixels_at + max(length, expected), file_bytes)
    elif length != UNDEFINED_LENGTH:
        raise _damaged(path)
    return header


def _has_decoder(syntax: UID) -> bool:
    try:
        return get_decoder(syntax).is_available
    except NotImplementedError:
        return False


def _ends_early(header: pydicom.Dataset, file_bytes: int) -> bool:
    """Whether the last element before the end of the file is longer than the file."""
    if not len(header):
        return True
    last = header.get_item(max(header.keys()))
    if not isinstance(last, pydicom.dataelem.RawDataElement) or last.length == UNDEFINED_LENGTH:
        return False
    return last.value_tell + last.length != file_bytes


def _check_pixel_type(header: pydicom.Dataset, path: Path) -> None:
    samples, allocated = _whole(header, "SamplesPerPixel", path), _whole(header, "BitsAllocated", path)
    stored, high = _whole(header, "BitsStored", path), _whole(header, "HighBit", path)
    photometric = str(header.get("PhotometricInterpretation", ""))
    if samples != 1 or photometric != "MONOCHROME2" or allocated not in (8, 16, 32) or high != stored - 1:
        raise InputError(
            "UNSUPPORTED_PIXEL_TYPE",
            f"Expected one MONOCHROME2 sample of 8, 16 or 32 bits with the lowest bits stored, received {samples} of"
            f" {photometric!r} with {stored} of {allocated} bits in {path}.",
        )
    if "ModalityLUTSequence" in header:
        raise InputError(
            "UNSUPPORTED_PIXEL_TYPE", f"Expected a rescale slope and intercept, received a ModalityLUT in {path}."
        )


def _whole(header: pydicom.Dataset, keyword: str, path: Path) -> int:
    try:
        return int(header[keyword].value)
    except Exception as error:  # absent, empty, several values or no number
        raise InputError(
            "UNSUPPORTED_PIXEL_TYPE", f"Expected one whole number for {keyword}, received none in {path}."
        ) from error


def _frames(header: pydicom.Dataset, path: Path) -> int:
    return _whole(header, "NumberOfFrames", path) if header.get("NumberOfFrames") is not None else 1


def _one_series(headers: Sequence[pydicom.Dataset], path: Path) -> None:
    """Refuses several series, listing them without anything that names a patient."""
    series: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for header in headers:
        uid = str(header.get("SeriesInstanceUID") or "")
        description, number = str(header.get("SeriesDescription") or "no description"), str(header.get("SeriesNumber"))
        # An anonymiser that empties the UIDs leaves these two to tell series apart.
        key = (uid, "", "") if uid else ("", description, number)
        series.setdefault(key, []).append((description, number))
    if len(series) == 1:
        return
    listed = []
    for (uid, *_), members in series.items():
        description, number = members[0]
        listed.append(f"{description[:64]!r} number {number} uid ...{uid[-6:]} with {len(members)} files")
    raise InputError("MULTIPLE_SERIES", f"Expected one series, received {len(series)} in {path}: {'; '.join(listed)}.")


def _slices(path: Path, header: pydicom.Dataset) -> Iterator[_Slice]:
    """One for each frame of the file."""
    count = _frames(header, path)
    if count == 1 and "PerFrameFunctionalGroupsSequence" not in header:
        yield _slice(path, 0, header, [header])
        return
    frames = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = header.get("SharedFunctionalGroupsSequence") or []
    if len(frames) != count:
        raise InputError(
            "UNSUPPORTED_FORMAT",
            f"Expected single-frame or Enhanced multi-frame images, received {count} frames with the geometry of"
            f" {len(frames)} in {path}.",
        )
    for index, own in enumerate(frames):
        # Each macro is a sequence of one item, in the frame's own groups or in those that all frames share.
        try:
            sequences = [element.value for group in [own, *shared] for element in group if element.VR == "SQ"]
        except Exception as error:
            raise _damaged(path) from error
        groups = [item for sequence in sequences for item in sequence]
        yield _slice(path, index, header, groups)


def _slice(path: Path, frame: int, header: pydicom.Dataset, groups: Sequence[pydicom.Dataset]) -> _Slice:
    position = _numbers(groups, "ImagePositionPatient", 3, path)
    orientation = _numbers(groups, "ImageOrientationPatient", 6, path)
    spacing = _numbers(groups, "PixelSpacing", 2, path)
    slope = _numbers(groups, "RescaleSlope", 1, path, default=1.0)[0]
    intercept = _numbers(groups, "RescaleIntercept", 1, path, default=0.0)[0]
    along, down = orientation[:3], orientation[3:]
    lengths = np.linalg.norm([along, down], axis=1)
    if np.abs(lengths - 1).max() > ORIENTATION_TOLERANCE or abs(along @ down) > ORIENTATION_TOLERANCE:
        raise InputError(
            "BAD_GEOMETRY",
            f"Expected two unit vectors at right angles, received ImageOrientationPatient {orientation.tolist()} in"
            f" {path}.",
        )
    return _Slice(
        path,
        frame,
        (_whole(header, "Rows", path), _whole(header, "Columns", path)),
        position,
        np.concatenate([along / lengths[0], down / lengths[1]]),
        (float(spacing[0]), float(spacing[1])),
        float(slope),
        float(intercept),
        "LOCALIZER" in [str(word).upper() for word in _values(header.get("ImageType"))],
    )


def _values(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, pydicom.multival.MultiValue | list | tuple) else [value]


def _number_or_none(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _numbers(
    groups: Sequence[pydicom.Dataset], keyword: str, count: int, path: Path, default: float | None = None
) -> npt.NDArray[np.float64]:
    """The element's numbers from the first group that has it."""
    received: list[Any] = []
    try:
        received = next((_values(group[keyword].value) for group in groups if keyword in group), [])
        if not received and default is not None:
            return np.array([default])
        numbers = np.array([float(value) for value in received])
    except Exception:  # a value that is no number: pydicom says so when it is first looked at
        numbers = np.full(count, np.nan)
    if numbers.size != count or not np.all(np.isfinite(numbers)):
        code = "UNSUPPORTED_PIXEL_TYPE" if keyword.startswith("Rescale") else "BAD_GEOMETRY"
        shown = [str(value)[:24] for value in received]
        raise InputError(code, f"Expected {count} finite numbers for {keyword}, received {shown} in {path}.")
    return numbers


def _check_consistent(slices: Sequence[_Slice], path: Path) -> None:
    """Refuses a series whose images do not lie on one grid of voxels."""
    first = slices[0]
    for one in slices[1:]:
        differences: dict[str, tuple[npt.ArrayLike, npt.ArrayLike, float]] = {
            "rows and columns": (first.size, one.size, 0.0),
            "PixelSpacing": (first.pixel_spacing, one.pixel_spacing, 1e-4),
            "ImageOrientationPatient": (first.orientation, one.orientation, 1e-4),
            "being a localiser": ((first.localiser,), (one.localiser,), 0.0),
        }
        for name, (expected, received, tolerance) in differences.items():
            if not np.allclose(expected, received, atol=tolerance, rtol=0):
                raise InputError(
                    "INCONSISTENT_SERIES",
                    f"Expected the same {name} in all files, received {np.asarray(expected).tolist()} in"
                    f" {first.path.name} and {np.asarray(received).tolist()} in {one.path.name} of {path}.",
                )


def _affine(slices: Sequence[_Slice], header: pydicom.Dataset, path: Path) -> tuple[npt.NDArray[np.float64], str]:
    """Voxel index (slice, row, column) to LPS of slices sorted by height, and where the slice distance comes from."""
    first = slices[0]
    affine = np.eye(4)
    affine[:3, 1] = first.orientation[3:] * first.pixel_spacing[0]
    affine[:3, 2] = first.orientation[:3] * first.pixel_spacing[1]
    affine[:3, 3] = first.position
    if len(slices) == 1:
        distance_mm, source = _thickness_mm(header, path)
        affine[:3, 0] = first.normal * distance_mm
        return affine, source
    _check_even([float(first.normal @ one.position) for one in slices], path)
    step = (slices[-1].position - first.position) / (len(slices) - 1)
    off_line = np.array([one.position - first.position - index * step for index, one in enumerate(slices)])
    off_mm = float(np.linalg.norm(off_line, axis=1).max())
    if off_mm > max(UNEVEN_MM, UNEVEN_FRACTION * float(np.linalg.norm(step))):
        raise InputError(
            "BAD_GEOMETRY",
            f"Expected slices stacked on one straight line, received one {off_mm:.2f} mm off it in {path}.",
        )
    affine[:3, 0] = step
    return affine, "positions"


def _thickness_mm(header: pydicom.Dataset, path: Path) -> tuple[float, str]:
    groups = [header]
    for keyword in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        for group in header.get(keyword) or []:
            groups += group.get("PixelMeasuresSequence") or []
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        distance_mm = float(_numbers(groups, keyword, 1, path, default=0.0)[0])
        if distance_mm > 0:
            return distance_mm, keyword
    raise InputError(
        "BAD_GEOMETRY",
        f"Expected SpacingBetweenSlices or SliceThickness for a single slice, received neither in {path}.",
    )


def _check_even(heights_mm: Sequence[float], path: Path) -> None:
    """Refuses slices that are missing, doubled or unevenly spaced, naming where."""
    gaps_mm = np.diff(heights_mm)
    doubled = [heights_mm[index] for index in np.flatnonzero(gaps_mm <= UNEVEN_MM)]
    if doubled:
        raise InputError(
            "MISSING_SLICES",
            f"Expected one image at each position, received several at {_listed(doubled)} mm along the normal in"
            f" {path}.",
        )
    smallest_mm = float(gaps_mm.min())
    uneven = np.flatnonzero(gaps_mm - smallest_mm > max(UNEVEN_MM, UNEVEN_FRACTION * smallest_mm))
    if uneven.size:
        where = [f"{heights_mm[index]:.2f} to {heights_mm[index + 1]:.2f}" for index in uneven]
        raise InputError(
            "MISSING_SLICES",
            f"Expected slices {smallest_mm:.2f} mm apart, received gaps from {_listed(where)} mm along the normal in"
            f" {path}.",
        )


def _listed(values: Sequence[float | str], most: int = 5) -> str:
    shown = [value if isinstance(value, str) else f"{value:.2f}" for value in values[:most]]
    return ", ".join(shown) + (f" and {len(values) - most} more" if len(values) > most else "")


def _voxels(slices: Sequence[_Slice], headers: dict[Path, pydicom.Dataset], path: Path) -> npt.NDArray[Any]:
    """The rescaled values, int16 or float32 [slice, row, column]."""
    voxel_bytes([len(slices), *slices[0].size], 4, path)
    stored: list[npt.NDArray[Any]] = [np.empty(0)] * len(slices)
    places: dict[Path, list[int]] = {}
    for place, one in enumerate(slices):
        places.setdefault(one.path, []).append(place)
    for file, of_file in places.items():
        dataset = _with_pixels(file)
        for place in of_file:
            stored[place] = _decoded(dataset, slices[place])
    whole = all(one.slope.is_integer() and one.intercept.is_integer() for one in slices)
    limits = np.iinfo(np.int16)
    extremes = [
        int(value) * one.slope + one.intercept
        for one, plane in zip(slices, stored, strict=True)
        for value in (plane.min(), plane.max())
    ]
    fits = limits.min <= min(extremes) and max(extremes) <= limits.max
    voxels = np.empty((len(slices), *slices[0].size), np.int16 if whole and fits else np.float32)
    for place, one in enumerate(slices):
        with np.errstate(over="ignore"):  # what overflows is infinite, and `read_volume` refuses it
            voxels[place] = stored[place].astype(np.float64) * one.slope + one.intercept
    return voxels


def _with_pixels(path: Path) -> pydicom.Dataset:
    try:
        dataset = pydicom.dcmread(path)
        pixels: Any = dataset.get_item("PixelData")
        ends_at = pixels.value_tell + len(pixels.value)
        compressed = dataset.file_meta.TransferSyntaxUID.is_encapsulated
        frames = list(generate_frames(dataset.PixelData, number_of_frames=_frames(dataset, path))) if compressed else []
    except Exception as error:  # pydicom raises whatever its parser meets first
        raise _damaged(path) from error
    if compressed and ends_at + DELIMITER_BYTES > path.stat().st_size:
        raise _damaged(path)
    for frame in frames:
        _check_codestream(frame, dataset, path)
    return dataset


def _check_codestream(frame: bytes, dataset: pydicom.Dataset, path: Path) -> None:
    """Refuses a JPEG frame that is cut short, which decoders fill up, or larger inside than its header says."""
    syntax = dataset.file_meta.TransferSyntaxUID
    is_jpeg = frame.startswith(b"\xff")
    if is_jpeg and not frame.rstrip(b"\0").endswith(END_OF_CODESTREAM):
        raise _damaged(path)
    if syntax in JPEG2000TransferSyntaxes and frame.startswith(b"\xff\x4f\xff\x51"):
        right, bottom, left, top = (int.from_bytes(frame[at : at + 4], "big") for at in (8, 12, 16, 20))
        if (bottom - top, right - left) != (dataset.Rows, dataset.Columns):
            raise InputError(
                "INCONSISTENT_SERIES",
                f"Expected {dataset.Rows} x {dataset.Columns} pixels as the header says, received a JPEG 2000 image of"
                f" {bottom - top} x {right - left} in {path}.",
            )


def _decoded(dataset: pydicom.Dataset, one: _Slice) -> npt.NDArray[Any]:
    """Stored values of one frame [row, column], overlays in unused bits taken off."""
    try:
        decoder = get_decoder(dataset.file_meta.TransferSyntaxUID)
        plane, _ = decoder.as_array(dataset, index=one.frame, raw=True)
    except Exception as error:  # each codec raises its own
        raise _damaged(one.path) from error
    if plane.shape != one.size:
        raise _damaged(one.path)
    return plane
