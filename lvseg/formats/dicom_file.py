"""One DICOM file: its header, what has to be true of it before its pixels are decoded, and the pixels.

pydicom parses and decodes. It fills what a damaged file lacks and its codecs allocate what a codestream says of itself,
so lengths and sizes are compared with the file and the header first.
"""

from __future__ import annotations

import contextlib
import io
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import generate_frames
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset, read_preamble
from pydicom.filewriter import write_file_meta_info
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    MediaStorageDirectoryStorage,
    SegmentationStorage,
)

from lvseg.errors import InputError
from lvseg.formats import checks
from lvseg.formats.archive import SUFFIXES, is_nameless
from lvseg.formats.checks import DEFLATE_RATIO, is_of_machine, truncated

PREAMBLE_BYTES = 132
SNIFFED_BYTES = 4096
UNDEFINED_LENGTH = 0xFFFFFFFF
DELIMITER_BYTES = 8
META_GROUP = 0x0002
# The standard's name is in its 2024 edition; pydicom has none for it yet.
LABEL_MAP_STORAGE = UID("1.2.840.10008.5.1.4.1.1.66.7")
SEGMENTATIONS = (SegmentationStorage, LABEL_MAP_STORAGE)
HEADER_KEYWORDS = (
    "AcquisitionNumber",
    "EchoNumbers",
    "EchoTime",
    "FlipAngle",
    "ImageType",
    "MagneticFieldStrength",
    "Manufacturer",
    "ManufacturerModelName",
    "ModalityLUTSequence",
    "Modality",
    "NumberOfFrames",
    "PerFrameFunctionalGroupsSequence",
    "PhotometricInterpretation",
    "PulseSequenceName",
    "RealWorldValueMappingSequence",
    "RepetitionTime",
    "RescaleType",
    "SOPClassUID",
    "SegmentSequence",
    "SequenceName",
    "SeriesDescription",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SharedFunctionalGroupsSequence",
    "SoftwareVersions",
)
# The notes that a Mac keeps beside a file on a foreign disk or in a zip: ._IM0001.dcm, which is no slice.
APPLE_DOUBLE = b"\x00\x05\x16\x07"
END_OF_CODESTREAM = b"\xff\xd9"
# The markers of a JPEG or JPEG-LS frame header; the other codes in the first range are no frame headers.
FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}


@dataclass(frozen=True, eq=False)
class DicomFile:
    """What a file says before its pixels."""

    path: Path
    header: pydicom.Dataset
    syntax: UID
    pixels_at: int  # 0 where the file holds no pixels
    pixel_bytes: int
    file_bytes: int

    @property
    def is_segmentation(self) -> bool:
        return text([self.header], "SOPClassUID") in SEGMENTATIONS

    @property
    def frames(self) -> int:
        """How many; some writers say 0 in files of one image, and a slice must not be passed over."""
        if self.header.get("NumberOfFrames") is None:
            return 1
        return whole(self.header, "NumberOfFrames", self.path) or 1


class _BoundedReader(io.BufferedReader):
    """Reads no more at once than is left of the file.

    pydicom asks for as many bytes as a damaged element says that it has, and Python would allocate all of them first.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path.open("rb", buffering=0))
        self._file_bytes = self.seek(0, io.SEEK_END)
        self.seek(0)

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(self._file_bytes - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block pydicom neither warns of small breaches of the standard nor logs what it found there.

    Those that matter here are looked for, and what it would log may be of the patient.
    """
    settings = pydicom.config.settings
    mode = settings.reading_validation_mode
    settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        settings.reading_validation_mode = mode


def is_dicom(path: Path) -> bool:
    """Whether the file has DICM at byte 128."""
    with path.open("rb") as file:
        return file.read(PREAMBLE_BYTES)[128:] == b"DICM"


def holds_dicom(path: Path) -> bool:
    """Whether the file is DICOM; a file that was one, or may have been one, is an error rather than passed over.

    A slice that is passed over is one that the others may not miss: where every second is, the rest is evenly spaced.
    """
    with path.open("rb") as file:
        start = file.read(SNIFFED_BYTES)
    mark, meta = start[128:PREAMBLE_BYTES], start[PREAMBLE_BYTES : PREAMBLE_BYTES + 4]
    if mark == b"DICM":
        return True
    if start.startswith(APPLE_DOUBLE):
        return False
    if len(start) < PREAMBLE_BYTES and not start.strip(b"\0"):
        # Most preambles are zeros, so this may have been a slice, and one at the end would not be missed.
        raise truncated(path, PREAMBLE_BYTES, len(start))
    is_named = path.suffix.lower() in SUFFIXES
    is_damaged = b"DICM" in start[:256] or meta == b"\x02\0\x00\0"  # bytes lost, added or changed before the header
    is_bare = start[:4] in (b"\x08\0\x00\0", b"\x08\0\x05\0", b"\x02\0\x00\0")
    if is_named or is_damaged or is_bare or (is_nameless(path.name) and b"\0" in start):
        raise InputError("UNSUPPORTED_FORMAT", f"Expected DICM at byte 128, received a file without in {path}.")
    return False


def is_directory_file(path: Path) -> bool:
    return text([_meta(path)], "MediaStorageSOPClassUID") == MediaStorageDirectoryStorage


def damaged(path: Path) -> InputError:
    return InputError("INPUT_TRUNCATED", f"Expected a whole DICOM file, received a damaged or cut short one in {path}.")


@contextlib.contextmanager
def _no_damage(path: Path) -> Iterator[None]:
    """Within the block whatever pydicom's parser or a codec meets first, and raises, means a damaged file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or is_of_machine(error):
            raise
        raise damaged(path) from error


def read_header(path: Path) -> DicomFile:
    """Everything before the pixels.

    Raises:
        InputError: UNSUPPORTED_TRANSFER_SYNTAX where the file names none; INPUT_TRUNCATED.
    """
    syntax = UID(text([_meta(path)], "TransferSyntaxUID"))
    if not syntax.is_transfer_syntax:
        raise _unsupported_syntax(syntax, path)
    with _open(path, syntax) as file:
        file_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        with _no_damage(path):
            header = pydicom.dcmread(file, stop_before_pixels=True)
            start = file.read(12)
            pixels_at = file.tell()
            for keyword in HEADER_KEYWORDS:
                header.get(keyword)  # pydicom finds out only now whether it can be read
            ends_early = _ends_early(header, file_bytes)
    order: Literal["little", "big"] = "little" if syntax.is_little_endian else "big"
    group, element = (int.from_bytes(start[at : at + 2], order) for at in (0, 2))
    if (group, element) != (0x7FE0, 0x0010):
        if ends_early:
            raise damaged(path)
        return DicomFile(path, header, syntax, 0, 0, file_bytes)
    length = int.from_bytes(start[4:8] if syntax.is_implicit_VR else start[8:12], order)
    if syntax.is_implicit_VR:
        pixels_at -= 4
    return DicomFile(path, header, syntax, pixels_at, length, file_bytes)


def check_pixels(file: DicomFile) -> None:
    """Refuses a file whose pixels cannot be decoded to one real number each, or that does not hold all of them.

    Raises:
        InputError: NO_PIXELS, UNSUPPORTED_TRANSFER_SYNTAX, UNSUPPORTED_PIXEL_TYPE or INPUT_TRUNCATED.
    """
    header, path = file.header, file.path
    if not _has_decoder(file.syntax):
        raise _unsupported_syntax(file.syntax, path)
    if not file.pixels_at:
        raise InputError("NO_PIXELS", f"Expected PixelData, received a DICOM file without (or cut short) in {path}.")
    if not file.syntax.is_encapsulated:
        expected = whole(header, "Rows", path) * whole(header, "Columns", path) * file.frames
        expected *= whole(header, "BitsAllocated", path) * whole(header, "SamplesPerPixel", path)
        expected = -(-expected // 8)
        if file.pixel_bytes < expected or file.pixels_at + file.pixel_bytes > file.file_bytes:
            raise truncated(path, file.pixels_at + max(file.pixel_bytes, expected), file.file_bytes)
        if file.pixel_bytes > expected + 1:  # one byte fills up to an even length
            raise InputError(
                "INCONSISTENT_SERIES",
                f"Expected {expected} bytes of pixels as the header's sizes say, received {file.pixel_bytes} in"
                f" {path}.",
            )
    elif file.pixel_bytes != UNDEFINED_LENGTH:
        raise damaged(path)
    samples, allocated = whole(header, "SamplesPerPixel", path), whole(header, "BitsAllocated", path)
    stored, high = whole(header, "BitsStored", path), whole(header, "HighBit", path)
    photometric = str(header.get("PhotometricInterpretation", ""))
    kinds = ("MONOCHROME2", "PALETTE COLOR") if file.is_segmentation else ("MONOCHROME2",)
    widths = (1, 8, 16) if file.is_segmentation else (8, 16, 32)
    big = allocated == 1 and not file.syntax.is_little_endian  # where bits would lie in other places
    if big or samples != 1 or photometric not in kinds or allocated not in widths or high != stored - 1:
        raise InputError(
            "UNSUPPORTED_PIXEL_TYPE",
            f"Expected one MONOCHROME2 sample of {', '.join(str(bits) for bits in widths)} bits with the lowest bits"
            f" stored, received {samples} of {photometric!r} with {stored} of {allocated} bits in {path}.",
        )
    if "ModalityLUTSequence" in header:
        raise InputError(
            "UNSUPPORTED_PIXEL_TYPE", f"Expected a rescale slope and intercept, received a ModalityLUT in {path}."
        )


def with_pixels(file: DicomFile) -> pydicom.Dataset:
    """The whole dataset, once its compressed frames are known to be whole and as large as the header says.

    Raises:
        InputError: INPUT_TRUNCATED or INCONSISTENT_SERIES.
    """
    with _no_damage(file.path):
        with _open(file.path, file.syntax) as content:
            dataset = pydicom.dcmread(content)
        pixels: Any = dataset.get_item("PixelData")
        ends_at = pixels.value_tell + len(pixels.value)
        compressed = file.syntax.is_encapsulated
        frames = list(generate_frames(dataset.PixelData, number_of_frames=file.frames)) if compressed else []
    if compressed and (ends_at + DELIMITER_BYTES > file.file_bytes or len(frames) != file.frames):
        raise damaged(file.path)
    for frame in frames:
        _check_codestream(frame, dataset, file.path)
    return dataset


def decoded(dataset: pydicom.Dataset, frame: int, size: tuple[int, int], path: Path) -> npt.NDArray[Any]:
    """Stored values of one frame [row, column], overlays in unused bits taken off."""
    with _no_damage(path), warnings.catch_warnings():
        if dataset.BitsAllocated == 1 and not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
            return _bits(dataset.PixelData, frame, size)
        decoder = get_decoder(dataset.file_meta.TransferSyntaxUID)
        # More pixels than the header's sizes say: one of the two lies.
        warnings.filterwarnings("error", message="The decoded RLE segment contains")
        plane, _ = decoder.as_array(dataset, index=frame, raw=True)
    if plane.shape != size:
        raise damaged(path)
    return plane


def _bits(packed: bytes, frame: int, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """One frame of one bit a pixel: frames follow bit by bit, which pydicom's decoder of one frame forgets."""
    first, count = frame * size[0] * size[1], size[0] * size[1]
    octets = np.frombuffer(packed, np.uint8)[first // 8 : -(-(first + count) // 8)]
    return np.unpackbits(octets, bitorder="little")[first % 8 : first % 8 + count].reshape(size)


def functional_groups(file: DicomFile) -> list[list[pydicom.Dataset]]:
    """For each frame the datasets that describe it, the most specific first.

    Raises:
        InputError: UNSUPPORTED_FORMAT for several frames without a description of each; INPUT_TRUNCATED.
    """
    header = file.header
    if file.frames == 1 and "PerFrameFunctionalGroupsSequence" not in header:
        return [[header]]
    frames = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = header.get("SharedFunctionalGroupsSequence") or []
    if len(frames) != file.frames:
        raise InputError(
            "UNSUPPORTED_FORMAT",
            f"Expected single-frame or Enhanced multi-frame images, received {file.frames} frames with the geometry of"
            f" {len(frames)} in {file.path}.",
        )
    # Each macro is a sequence of one item, in the frame's own groups or in those that all frames share.
    with _no_damage(file.path):
        of_all = _items(shared)  # pydicom parses nested items when they are first looked at
        return [_items([own]) + of_all for own in frames]


def numbers(
    groups: Sequence[pydicom.Dataset], keyword: str, count: int, path: Path, default: float | None = None
) -> npt.NDArray[np.float64]:
    """The element's numbers from the first group that has it.

    Raises:
        InputError: BAD_GEOMETRY, or UNSUPPORTED_PIXEL_TYPE for a rescaling, where they are not `count` finite numbers.
    """
    received: list[Any] = []
    try:
        received = next((values(group[keyword].value) for group in groups if keyword in group), [])
        if not received and default is not None:
            return np.array([default])
        found = np.array([float(value) for value in received])
    except Exception:  # a value that is no number: pydicom says so when it is first looked at
        found = np.full(count, np.nan)
    if found.size != count or not np.all(np.isfinite(found)):
        code = "UNSUPPORTED_PIXEL_TYPE" if keyword.startswith("Rescale") else "BAD_GEOMETRY"
        shown = [str(value)[:24] for value in received]
        raise InputError(code, f"Expected {count} finite numbers for {keyword}, received {shown} in {path}.")
    return found


def whole(header: pydicom.Dataset, keyword: str, path: Path) -> int:
    """One non-negative whole number; InputError UNSUPPORTED_PIXEL_TYPE for anything else."""
    try:
        number = int(header[keyword].value)
    except Exception as error:  # absent, empty, several values or no number
        raise InputError(
            "UNSUPPORTED_PIXEL_TYPE", f"Expected one whole number for {keyword}, received none in {path}."
        ) from error
    if number < 0:
        raise InputError("UNSUPPORTED_PIXEL_TYPE", f"Expected {keyword} from 0 on, received {number} in {path}.")
    return number


def values(value: Any) -> list[Any]:
    """An element's value as a list, empty where it has none."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, pydicom.multival.MultiValue | list | tuple) else [value]


def text(groups: Sequence[pydicom.Dataset], keyword: str) -> str:
    """The element's first value from the first group that has one, as text, or empty."""
    try:
        found = next((values(group[keyword].value) for group in groups if keyword in group), [])
        return str(found[0]).strip() if found else ""
    except Exception:  # a value that pydicom cannot parse says nothing
        return ""


def number_or_none(groups: Sequence[pydicom.Dataset], keyword: str) -> float | None:
    """The element's first value from the first group that has one, if it is a finite number."""
    try:
        number = float(text(groups, keyword))
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def _items(groups: Sequence[pydicom.Dataset]) -> list[pydicom.Dataset]:
    # A maker's own sequences repeat elements of the standard, on other terms.
    standard = [element for group in groups for element in group if not element.tag.is_private]
    sequences = [element.value for element in standard if element.VR == "SQ"]
    return [item for sequence in sequences for item in sequence]


def _meta(path: Path) -> FileMetaDataset:
    """The file's meta information."""
    with _no_damage(path), _BoundedReader(path) as file:
        read_preamble(file, force=False)
        return FileMetaDataset(read_dataset(file, False, True, stop_when=lambda tag, *_: tag >> 16 != META_GROUP))


def _open(path: Path, syntax: UID) -> IO[bytes]:
    """The file, inflated within limits if its transfer syntax says deflated: pydicom would inflate whatever comes."""
    if syntax != DeflatedExplicitVRLittleEndian:
        return _BoundedReader(path)
    meta = _meta(path)
    group_bytes = number_or_none([meta], "FileMetaInformationGroupLength")
    if group_bytes is None:
        raise damaged(path)
    content = path.read_bytes()[PREAMBLE_BYTES + 12 + int(group_bytes) :]  # 12: the element with that length itself
    limit = min(len(content) * DEFLATE_RATIO, 2 * checks.MAXIMUM_VOXEL_BYTES)
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        dataset = unpacker.decompress(content, limit)
    except zlib.error as error:
        raise damaged(path) from error
    if unpacker.unconsumed_tail:
        raise InputError("DECOMPRESS_LIMIT", f"Expected at most {limit} bytes inflated, received more in {path}.")
    if not unpacker.eof:
        raise damaged(path)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    inflated = DicomBytesIO(bytes(128) + b"DICM")
    inflated.seek(PREAMBLE_BYTES)
    with _no_damage(path):  # what was read may be nothing that can be written
        write_file_meta_info(inflated, meta, enforce_standard=False)
    return io.BytesIO(inflated.getvalue() + dataset)


def _unsupported_syntax(syntax: UID, path: Path) -> InputError:
    return InputError(
        "UNSUPPORTED_TRANSFER_SYNTAX",
        f"Expected a transfer syntax with a decoder here, received {(syntax.name or 'none')[:64]!r} in {path}.",
    )


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


def _check_codestream(frame: bytes, dataset: pydicom.Dataset, path: Path) -> None:
    """Refuses a JPEG frame that is cut short, which decoders fill up, or other inside than its header says."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if not frame.startswith(b"\xff"):
        return
    if not frame.rstrip(b"\0").endswith(END_OF_CODESTREAM):
        raise damaged(path)
    if syntax in JPEG2000TransferSyntaxes:
        right, bottom, left, top = (int.from_bytes(frame[at : at + 4], "big") for at in (8, 12, 16, 20))
        size = (bottom - top, right - left)
        name = "a JPEG 2000 image"
    else:
        size, name = _size_of_jpeg(frame), "a JPEG image"
    if size != (dataset.Rows, dataset.Columns):
        raise InputError(
            "INCONSISTENT_SERIES",
            f"Expected {dataset.Rows} x {dataset.Columns} pixels as the header says, received {name} of"
            f" {size[0]} x {size[1]} in {path}.",
        )


def _size_of_jpeg(frame: bytes) -> tuple[int, int]:
    """Rows and columns in the frame header of a JPEG or JPEG-LS codestream, (0, 0) where it has none."""
    at = 2
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        if frame[at + 1] in FRAME_MARKERS:
            return int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(frame[at + 7 : at + 9], "big")
        at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return 0, 0
