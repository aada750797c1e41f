"""XML .vti images in and out: world in LPS millimetres, VTK's index (i, j, k) is our (column, row, slice).

Unlike a legacy .vtk the file holds its directions itself, column k of its Direction matrix for VTK's axis k. So a
volume is written on its own grid: same shape, same axis order, same affine, oblique or not. In half of the orientations
that matrix is left-handed; VTK keeps such a matrix as it is, in memory and in files.

Files are written by VTK and read without it: a few wrong bytes where the voxels' block sizes stand crash VTK's reader
and the process with it, and voxels that no piece covers come back as uninitialised memory. What is read here is what
writers make of an image: one piece, its voxels as text, in base64 or raw, compressed by zlib or not.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import math
import xml.parsers.expat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lvseg.errors import InputError
from lvseg.formats.checks import DEFLATE_RATIO, truncated, voxel_bytes
from lvseg.formats.text import finite_numbers, fitting, numbers_of_text, whole_number
from lvseg.formats.vtk import affine_of_grid, array_name, directions_ijk, reverse, writable
from lvseg.volume import Volume

TYPES = {
    "UInt8": "u1",
    "Int8": "i1",
    "UInt16": "u2",
    "Int16": "i2",
    "UInt32": "u4",
    "Int32": "i4",
    "UInt64": "u8",
    "Int64": "i8",
    "Float32": "f4",
    "Float64": "f8",
}
BYTE_ORDERS = {"LittleEndian": "<", "BigEndian": ">"}
HEADER_WORDS = {"UInt32": "u4", "UInt64": "u8"}
IMAGE_ATTRIBUTES = frozenset(("WholeExtent", "Origin", "Spacing", "Direction"))
COMPRESSORS = ("", "vtkZLibDataCompressor")
FILE_END = b"</VTKFile>"
MARK_WITHIN = 256


def write(volume: Volume, path: Path) -> None:
    """Writes the volume's own axis order and directions, also oblique and left-handed ones (module docstring).

    Args:
        volume: uint8 becomes an array `label`, another dtype `voxels`.
        path: the file.

    Raises:
        InputError: UNSUPPORTED_PIXEL_TYPE for a dtype that VTK lacks.
    """
    from vtkmodules.util.numpy_support import numpy_to_vtk
    from vtkmodules.vtkCommonDataModel import vtkImageData
    from vtkmodules.vtkIOXML import vtkXMLImageDataWriter

    voxels = writable(volume, path)
    image = vtkImageData()
    image.SetDimensions(*reverse(volume.shape))
    image.SetSpacing(*reverse(volume.spacing_mm))
    image.SetOrigin(*volume.affine[:3, 3].tolist())
    image.SetDirectionMatrix(*directions_ijk(volume).ravel().tolist())
    array = numpy_to_vtk(voxels.ravel())  # shares the memory of `voxels`, which lives until the file is written
    array.SetName(array_name(voxels))
    image.GetPointData().SetScalars(array)
    writer = vtkXMLImageDataWriter()
    writer.SetFileName(str(path))
    writer.SetInputData(image)
    writer.SetDataModeToAppended()
    writer.EncodeAppendedDataOff()
    with _vtk_messages() as messages:
        written = writer.Write()
    if not written or messages:
        raise OSError(f"VTK could not write {path}: {' '.join(messages)}")


def read(path: Path) -> Volume:
    """Reads the scalars of the points, or the first array where none is called so.

    Args:
        path: the file.

    Returns:
        voxels [slice, row, column] in the file's dtype and order; metadata `format` ("VTK XML").

    Raises:
        InputError: UNSUPPORTED_FORMAT, UNSUPPORTED_PIXEL_TYPE, NO_PIXELS, INPUT_TRUNCATED, DIMS_LIMIT, EMPTY_IMAGE or
            BAD_GEOMETRY.
    """
    content = path.read_bytes()
    header = _header(content, path)
    missing = [name for name in ("WholeExtent", "Origin", "Spacing") if name not in header.image]
    unknown = sorted(set(header.image) - IMAGE_ATTRIBUTES)
    if missing or unknown:  # a misspelt Direction would be taken for none
        raise InputError(
            "UNSUPPORTED_FORMAT",
            f"Expected an ImageData with WholeExtent, Origin, Spacing and perhaps Direction, received it without"
            f" {missing} and with {[name[:40] for name in unknown[:5]]} in {path}.",
        )
    extent = [whole_number(word, path) for word in header.image["WholeExtent"].split()]
    if len(extent) != 6:
        raise InputError("UNSUPPORTED_FORMAT", f"Expected a WholeExtent of six numbers, received {extent} in {path}.")
    if [piece.get("Extent", "").split() for piece in header.pieces] != [header.image["WholeExtent"].split()]:
        raise InputError(
            "UNSUPPORTED_FORMAT",
            f"Expected one Piece with the Extent of the whole, received {len(header.pieces)} of another in {path}.",
        )
    columns, rows, slices = (last - first + 1 for first, last in zip(extent[::2], extent[1::2], strict=True))
    array = _scalars(header, path)
    code = TYPES.get(array.attributes.get("type", ""))
    components = array.attributes.get("NumberOfComponents", "1")
    if code is None or components != "1":
        raise InputError(
            "UNSUPPORTED_PIXEL_TYPE",
            f"Expected one real number per voxel, received {components[:20]!r} of type"
            f" {array.attributes.get('type', '')[:40]!r} in {path}.",
        )
    # Text goes through 64-bit numbers.
    voxel_bytes([slices, rows, columns], 8 if array.attributes.get("format") == "ascii" else int(code[1:]), path)
    affine = affine_of_grid(
        np.reshape(finite_numbers(header.image.get("Direction", "1 0 0 0 1 0 0 0 1"), 9, "Direction", path), (3, 3)),
        finite_numbers(header.image["Spacing"], 3, "Spacing", path),
        finite_numbers(header.image["Origin"], 3, "Origin", path),
        path,
    )
    affine[:, 3] = affine @ [extent[4], extent[2], extent[0], 1]  # Origin is where index 0 lies, in the extent or not
    voxels = _voxels(header, array, content, code, slices * rows * columns, path).reshape(slices, rows, columns)
    return Volume(voxels, affine, source=str(path), metadata={"format": "VTK XML"})


@dataclass
class _Array:
    attributes: dict[str, str]
    text: list[str] = field(default_factory=list)


@dataclass
class _Header:
    """What the XML says before the appended data."""

    root: dict[str, str] = field(default_factory=dict)
    image: dict[str, str] = field(default_factory=dict)
    pieces: list[dict[str, str]] = field(default_factory=list)
    points: dict[str, str] = field(default_factory=dict)
    arrays: list[_Array] = field(default_factory=list)
    appended: dict[str, str] = field(default_factory=dict)
    appended_at: int = -1


class _AppendedReached(Exception):
    """Ends the parsing, since what follows may be raw bytes, which are no XML."""


def _header(content: bytes, path: Path) -> _Header:
    header, inside = _Header(), [""]
    parser = xml.parsers.expat.ParserCreate()

    def refuse(*_declaration: object) -> None:
        raise InputError("UNSUPPORTED_FORMAT", f"Expected a .vti without DOCTYPE or ENTITY, received one in {path}.")

    def start(name: str, attributes: dict[str, str]) -> None:
        if len(inside) == 1:
            if name != "VTKFile" or attributes.get("type") != "ImageData":
                raise InputError(
                    "UNSUPPORTED_FORMAT",
                    f"Expected a VTKFile of type ImageData, received {name[:40]!r} of type"
                    f" {attributes.get('type', '')[:40]!r} in {path}.",
                )
            header.root = attributes
        elif name == "ImageData":
            header.image = attributes
        elif name == "Piece":
            header.pieces.append(attributes)
        elif name == "PointData":
            header.points = attributes
        elif name in ("DataArray", "Array") and inside[-1] == "PointData":
            header.arrays.append(_Array(attributes))
        elif name == "AppendedData":
            header.appended, header.appended_at = attributes, parser.CurrentByteIndex
            raise _AppendedReached
        inside.append(name)

    def end(_name: str) -> None:
        inside.pop()

    def text(characters: str) -> None:
        if inside[-2:] == ["PointData", "DataArray"]:
            header.arrays[-1].text.append(characters)

    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    try:
        parser.Parse(content)
    except _AppendedReached:
        pass
    except xml.parsers.expat.ExpatError as error:
        raise InputError("UNSUPPORTED_FORMAT", f"Expected XML, received '{error}' in {path}.") from error
    if not header.root or not content.rstrip().endswith(FILE_END):
        raise InputError(
            "INPUT_TRUNCATED", f"Expected {FILE_END.decode()} at the end, received a file cut short in {path}."
        )
    return header


def _scalars(header: _Header, path: Path) -> _Array:
    name = header.points.get("Scalars")
    named = [array for array in header.arrays if array.attributes.get("Name") == name] or header.arrays
    if not named:
        raise InputError("NO_PIXELS", f"Expected an array of one number a point, received none in {path}.")
    return named[0]


def _voxels(header: _Header, array: _Array, content: bytes, code: str, count: int, path: Path) -> npt.NDArray[Any]:
    """The array's numbers [count], native byte order."""
    order = BYTE_ORDERS.get(header.root.get("byte_order", ""))
    word = HEADER_WORDS.get(header.root.get("header_type", "UInt32"))
    compressor = header.root.get("compressor", "")
    form = array.attributes.get("format", "")
    encoding = header.appended.get("encoding", "") if form == "appended" else "base64"
    if form == "ascii":
        return fitting(numbers_of_text("".join(array.text), code, count, path), code, path)
    if (
        order is None
        or word is None
        or compressor not in COMPRESSORS
        or form not in ("appended", "binary")
        or encoding not in ("raw", "base64")
    ):
        raise InputError(
            "UNSUPPORTED_FORMAT",
            f"Expected voxels in ascii, binary or appended form, compressed by zlib or not, received"
            f" {[form[:20], encoding[:20], compressor[:40], header.root.get('byte_order', '')[:20]]} in {path}.",
        )
    if form == "appended":
        mark = content.find(b"_", header.appended_at, header.appended_at + MARK_WITHIN)
        start = mark + 1 + max(0, whole_number(array.attributes.get("offset", ""), path))
        if mark < 0:
            raise _damaged(path)
    else:
        content, start = "".join("".join(array.text).split()).encode("ascii", "replace"), 0
    blocks = _Blocks(content, start, encoding == "base64", np.dtype(f"{order}{word}"), path)
    data = blocks.unpack(count * int(code[1:])) if compressor else blocks.plain(count * int(code[1:]))
    return np.frombuffer(data, f"{order}{code}").astype(code)


@dataclass(frozen=True)
class _Blocks:
    """The bytes of one array: sizes first, as words of the header type, then the voxels, whole or in zlib blocks."""

    content: bytes
    start: int
    is_base64: bool
    word: np.dtype[Any]
    path: Path

    def plain(self, expected: int) -> bytes:
        """Uncompressed: one word with the number of bytes, and these, encoded in one."""
        [size] = self._words(self.start, 1)
        if size != expected:
            raise truncated(self.path, expected, size)
        return self._take(self.start, self.word.itemsize + expected)[self.word.itemsize :]

    def unpack(self, expected: int) -> bytes:
        """Compressed: number of blocks, size of each, of a smaller last one or 0, packed sizes; then the blocks."""
        count, size, last = self._words(self.start, 3)
        sizes_unpacked = _block_sizes(count, size, last, expected)
        if not sizes_unpacked or count > len(self.content):
            raise _damaged(self.path)
        sizes_packed = self._words(self.start, 3 + count)[3:]
        if expected > sum(sizes_packed) * DEFLATE_RATIO:
            raise truncated(self.path, expected, sum(sizes_packed))
        packed = self._take(self.start + self._length((3 + count) * self.word.itemsize), sum(sizes_packed))
        parts, at = [], 0
        for size_packed, size_unpacked in zip(sizes_packed, sizes_unpacked, strict=True):
            try:
                part = zlib.decompressobj().decompress(packed[at : at + size_packed], size_unpacked + 1)
            except zlib.error as error:
                raise _damaged(self.path) from error
            if len(part) != size_unpacked:
                raise _damaged(self.path)
            parts.append(part)
            at += size_packed
        return b"".join(parts)

    def _length(self, count: int) -> int:
        """How much of the content holds that many bytes."""
        return 4 * math.ceil(count / 3) if self.is_base64 else count

    def _take(self, start: int, count: int) -> bytes:
        taken = self.content[start : start + self._length(count)]
        if self.is_base64:
            try:
                taken = base64.b64decode(taken, validate=True)
            except binascii.Error as error:
                raise _damaged(self.path) from error
        if len(taken) < count:
            raise truncated(self.path, start + count, len(self.content))
        return taken[:count]

    def _words(self, start: int, count: int) -> list[int]:
        return [int(word) for word in np.frombuffer(self._take(start, count * self.word.itemsize), self.word)]


def _block_sizes(count: int, size: int, last: int, expected: int) -> list[int]:
    """The unpacked size of each block, or nothing if they do not make up what is expected."""
    whole_blocks = count - 1 if last else count
    if whole_blocks < 0 or whole_blocks * size + last != expected or (size == 0 and whole_blocks):
        return []
    return [size] * whole_blocks + ([last] if last else [])


def _damaged(path: Path) -> InputError:
    return InputError("INPUT_TRUNCATED", f"Expected whole voxels, received damaged or cut short ones in {path}.")


@contextlib.contextmanager
def _vtk_messages() -> Iterator[list[str]]:
    """Collects what VTK would print on stderr, its nested objects included, until the block ends."""
    from vtkmodules.vtkCommonCore import vtkLogger, vtkOutputWindow, vtkStringOutputWindow

    messages: list[str] = []
    window, before = vtkStringOutputWindow(), vtkOutputWindow.GetInstance()
    vtkOutputWindow.SetInstance(window)
    verbosity = vtkLogger.GetCurrentVerbosityCutoff()
    vtkLogger.SetStderrVerbosity(vtkLogger.VERBOSITY_OFF)  # it prints beside the output window, not through it
    try:
        yield messages
    finally:
        vtkLogger.SetStderrVerbosity(verbosity)
        vtkOutputWindow.SetInstance(before)
        if window.GetOutput():
            messages.append(window.GetOutput().strip())
