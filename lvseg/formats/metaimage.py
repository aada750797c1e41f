"""MetaImage in and out: .mha with its voxels behind the header, and .mhd with a .raw or .zraw file beside it.

Axes. The index is (i, j, k) = (column, row, slice), i fastest, and the world is LPS millimetres, as ITK has it. Of the
nine numbers of TransformMatrix the first three are the unit vector of axis i, the next three that of j, then of k;
Offset is the centre of the first voxel. AnatomicalOrientation repeats in three letters where each axis comes from (RAI:
from the right, from the front, from below, which is what identity means); ITK does not look at it when it reads. Where
it contradicts the matrix nobody can know which is true, and the file is refused.

ITK, through SimpleITK, writes the files and is the reference in the tests. They are read without it: it allocates what
the header says before it looks at the file, and takes a missing ElementSpacing as 1 mm.
"""

from __future__ import annotations

import io
import re
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from lvseg.errors import InputError
from lvseg.formats.checks import DEFLATE_RATIO, beside, read_exactly, storable, truncated, voxel_bytes
from lvseg.formats.text import finite_numbers, rest_as_numbers, whole_number
from lvseg.formats.vtk import ASSUMED, affine_of_grid, directions_ijk, reverse
from lvseg.volume import Volume

HEADER_LIMIT_BYTES = 64 * 1024
# MET_LONG is left out: it has four bytes in the format's description and eight in files of some writers.
TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
# Where an axis comes from, as (world axis, sign of its direction along it in LPS).
COMES_FROM = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "I": (2, 1), "S": (2, -1)}
TRUTHS = {"true": True, "1": True, "false": False, "0": False}
# Names under which versions of the format know the same thing.
ALIASES = {
    "Position": "Offset",
    "Origin": "Offset",
    "Orientation": "TransformMatrix",
    "Rotation": "TransformMatrix",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}
# What the format itself has for an image; other keys are its users' own.
KEYS = frozenset(
    (
        "AnatomicalOrientation",
        "BinaryData",
        "BinaryDataByteOrderMSB",
        "CenterOfRotation",
        "Comment",
        "CompressedData",
        "CompressedDataSize",
        "CompressionLevel",
        "DimSize",
        "DistanceUnits",
        "ElementDataFile",
        "ElementMax",
        "ElementMin",
        "ElementNumberOfChannels",
        "ElementSize",
        "ElementSpacing",
        "ElementToIntensityFunctionOffset",
        "ElementToIntensityFunctionSlope",
        "ElementType",
        "HeaderSize",
        "ID",
        "Modality",
        "NDims",
        "Name",
        "ObjectSubType",
        "ObjectType",
        "Offset",
        "ParentID",
        "SequenceID",
        "TransformMatrix",
    )
)
ROUNDED_COSINE = 1e-3  # files with a few digits; as in ITK the vectors count as they are
UNIT_NAMES = ("", "?", "mm")


def read(path: Path) -> Volume:
    """Reads one scan or mask.

    Args:
        path: a .mha, or a .mhd whose data file lies in the same folder.

    Returns:
        voxels [k, j, i] in the file's dtype; affine to LPS millimetres; metadata `format` ("MetaImage") and
        `directions` ("TransformMatrix", or "assumed LPS identity" where the file has none).

    Raises:
        InputError: UNSUPPORTED_FORMAT, UNSUPPORTED_PIXEL_TYPE, NEEDS_VOLUME_INDEX, INPUT_TRUNCATED, DECOMPRESS_LIMIT,
            DIMS_LIMIT, EMPTY_IMAGE, BAD_GEOMETRY, GEOMETRY_AMBIGUOUS, NOT_FOUND or NOT_READABLE.
    """
    with path.open("rb") as file:
        header = _header(file, path)
        if header.get("NDims") != "3":
            raise InputError(
                "NEEDS_VOLUME_INDEX", f"Expected NDims = 3, received {header.get('NDims', 'none')[:20]!r} in {path}."
            )
        sizes = [whole_number(word, path) for word in header.get("DimSize", "").split()]
        if len(sizes) != 3:
            raise InputError("UNSUPPORTED_FORMAT", f"Expected three sizes in DimSize, received {sizes[:9]} in {path}.")
        code, channels = TYPES.get(header.get("ElementType", "")), header.get("ElementNumberOfChannels", "1")
        if code is None or channels != "1":
            raise InputError(
                "UNSUPPORTED_PIXEL_TYPE",
                f"Expected one real number per voxel, received {channels[:20]!r} of type"
                f" {header.get('ElementType', '')[:40]!r} in {path}.",
            )
        count = voxel_bytes(sizes, int(code[1:]), path)
        affine = _affine(header, path)
        data_path = _data_file(header, path)
        if data_path is None:
            voxels = _voxels(file, header, code, count, path)
        else:
            with data_path.open("rb") as data:
                voxels = _voxels(data, header, code, count, path)
    directions = "TransformMatrix" if "TransformMatrix" in header else ASSUMED
    metadata = {"format": "MetaImage", "directions": directions}
    return Volume(voxels.reshape(reverse(sizes)), affine, source=str(path), metadata=metadata)


def data_file(path: Path) -> Path | None:
    """The file beside a header that holds its voxels, or None where they follow it; InputError as `read`."""
    with path.open("rb") as file:
        return _data_file(_header(file, path), path)


def _data_file(header: dict[str, str], path: Path) -> Path | None:
    return None if header["ElementDataFile"].upper() == "LOCAL" else beside(path, header["ElementDataFile"])


def write(volume: Volume, path: Path) -> None:
    """Writes the volume's own axis order and directions, compressed.

    Args:
        volume: any dtype that MetaImage has.
        path: ends in .mha, in whatever case.

    Raises:
        InputError: UNSUPPORTED_PIXEL_TYPE for a dtype that MetaImage lacks, such as float16.
    """
    import SimpleITK

    voxels = storable(volume.voxels)
    if f"{voxels.dtype.kind}{voxels.dtype.itemsize}" not in TYPES.values():
        raise InputError(
            "UNSUPPORTED_PIXEL_TYPE",
            f"Expected voxels of a type that MetaImage has, received {voxels.dtype} for {path}.",
        )
    image = SimpleITK.GetImageFromArray(voxels)
    image.SetSpacing(reverse(volume.spacing_mm))
    image.SetOrigin(volume.affine[:3, 3].tolist())
    image.SetDirection(directions_ijk(volume).ravel().tolist())
    plain = path.with_suffix(".mha")  # of any other suffix, .MHA too, ITK makes two files of other names
    try:
        SimpleITK.WriteImage(image, str(plain), True)
        _check_written(plain)
        plain.replace(path)
    except (RuntimeError, InputError) as error:
        raise OSError(f"SimpleITK could not write {path}") from error
    finally:
        if plain != path:
            plain.unlink(missing_ok=True)


def _check_written(path: Path) -> None:
    """Refuses a file without its end: ITK says nothing where the disk was full when it closed the file.

    Raises:
        InputError: INPUT_TRUNCATED.
    """
    with path.open("rb") as file:
        expected = whole_number(_header(file, path).get("CompressedDataSize", ""), path)
        received = path.stat().st_size - file.tell()
    if received != expected:
        raise truncated(path, expected, received)


def _header(file: IO[bytes], path: Path) -> dict[str, str]:
    """The words behind each key, up to ElementDataFile, which is the last."""
    header: dict[str, str] = {}
    while "ElementDataFile" not in header:
        line = file.readline(HEADER_LIMIT_BYTES)
        if not line.endswith(b"\n"):
            code = "INPUT_TRUNCATED" if header or b"ObjectType".startswith(line[:10]) else "UNSUPPORTED_FORMAT"
            raise InputError(code, f"Expected a MetaImage header up to ElementDataFile, received a part in {path}.")
        text = line.decode("latin-1").strip()
        if not text:
            continue
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not re.fullmatch(r"\w+", key) or file.tell() > HEADER_LIMIT_BYTES:
            raise InputError("UNSUPPORTED_FORMAT", f"Expected lines 'Key = Value', received {text[:40]!r} in {path}.")
        key = ALIASES.get(key, key)
        if key in header:
            raise InputError("UNSUPPORTED_FORMAT", f"Expected each key once, received {key[:40]!r} twice in {path}.")
        header[key] = value
    foreign = sorted(set(header) - KEYS)
    if foreign and not {"TransformMatrix", "Offset"} <= set(header):  # one of them may be there, misspelt
        raise InputError(
            "BAD_GEOMETRY",
            f"Expected TransformMatrix and Offset, received a header without one but with {foreign[0][:40]!r} in"
            f" {path}.",
        )
    if header.get("ObjectType", "Image") != "Image":
        raise InputError(
            "UNSUPPORTED_FORMAT", f"Expected ObjectType = Image, received {header['ObjectType'][:40]!r} in {path}."
        )
    for key, neutral in (("ElementToIntensityFunctionSlope", 1.0), ("ElementToIntensityFunctionOffset", 0.0)):
        if key in header and finite_numbers(header[key], 1, key, path) != [neutral]:
            raise InputError(
                "UNSUPPORTED_PIXEL_TYPE", f"Expected {key} = {neutral:g}, received {header[key][:40]!r} in {path}."
            )
    return header


def _affine(header: dict[str, str], path: Path) -> npt.NDArray[np.float64]:
    """Voxel index (k, j, i) to LPS millimetres."""
    spacing = header.get("ElementSpacing", header.get("ElementSize", ""))
    if header.get("DistanceUnits", "").lower() not in UNIT_NAMES:
        raise InputError(
            "BAD_GEOMETRY", f"Expected DistanceUnits = mm, received {header['DistanceUnits'][:20]!r} in {path}."
        )
    matrix = np.reshape(
        finite_numbers(header.get("TransformMatrix", "1 0 0 0 1 0 0 0 1"), 9, "TransformMatrix", path), (3, 3)
    )
    centre = finite_numbers(header.get("CenterOfRotation", "0 0 0"), 3, "CenterOfRotation", path)
    letters = header.get("AnatomicalOrientation", "").upper()
    if any(centre) and not np.array_equal(matrix, np.eye(3)):
        raise InputError(
            "GEOMETRY_AMBIGUOUS",
            f"Expected CenterOfRotation = 0 0 0, which ITK takes it as, received {centre} in {path}.",
        )
    if re.fullmatch(r"[RLAPIS]{3}", letters):
        signs = [matrix[axis, COMES_FROM[letter][0]] * COMES_FROM[letter][1] for axis, letter in enumerate(letters)]
        if min(signs) <= 0:
            raise InputError(
                "GEOMETRY_AMBIGUOUS",
                f"Expected an AnatomicalOrientation that fits the TransformMatrix {matrix.tolist()}, received {letters}"
                f" in {path} (delete the line if the matrix is right).",
            )
    return affine_of_grid(
        matrix.T,
        finite_numbers(spacing, 3, "ElementSpacing", path),
        finite_numbers(header.get("Offset", "0 0 0"), 3, "Offset", path),
        path,
        ROUNDED_COSINE,
    )


def _truth(header: dict[str, str], key: str, default: str, path: Path) -> bool:
    value = TRUTHS.get(header.get(key, default).lower())
    if value is None:
        raise InputError(
            "UNSUPPORTED_FORMAT", f"Expected {key} = True or False, received {header[key][:20]!r} in {path}."
        )
    return value


def _voxels(file: IO[bytes], header: dict[str, str], code: str, count: int, path: Path) -> npt.NDArray[Any]:
    """The numbers in their own dtype, native byte order, once the file is known to hold exactly as many."""
    compressed = _truth(header, "CompressedData", "False", path)
    binary = _truth(header, "BinaryData", "True", path)
    order = ">" if _truth(header, "BinaryDataByteOrderMSB", "False", path) else "<"
    skip = whole_number(header.get("HeaderSize", "0"), path)
    if skip < -1 or (skip and (compressed or not binary)):
        raise InputError("UNSUPPORTED_FORMAT", f"Expected HeaderSize = 0, received {skip} in {path}.")
    if not binary:
        return rest_as_numbers(file, code, count // int(code[1:]), path)
    remaining = Path(file.name).stat().st_size - file.tell()
    if not compressed:
        skip = remaining - count if skip == -1 else skip
        if not 0 <= skip <= remaining - count:
            raise truncated(path, max(0, skip) + count, remaining)
        file.seek(skip, io.SEEK_CUR)
        return np.frombuffer(read_exactly(file, count, path), f"{order}{code}").astype(code, copy=False)
    if count > remaining * DEFLATE_RATIO:
        raise truncated(path, count, remaining)
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(file.read(), count + 1)
    except zlib.error as error:
        raise InputError(
            "INPUT_TRUNCATED", f"Expected a whole zlib stream, received a damaged one in {path}."
        ) from error
    if len(data) < count or (not unpacker.eof and len(data) == count):
        raise truncated(path, count, len(data))
    if len(data) > count or unpacker.unused_data:
        raise InputError(
            "DECOMPRESS_LIMIT", f"Expected {count} bytes of voxels as the header's sizes say, received more in {path}."
        )
    return np.frombuffer(data, f"{order}{code}").astype(code)
