"""NRRD in and out: .nrrd with its voxels behind the header, and .nhdr with a data file beside it.

Axes. NRRD lists its axes fastest first, so its index is (i, j, k) = (column, row, slice). Each spatial axis has a
vector in `space directions`, from one voxel to the next, and `space origin` is the centre of the first voxel. Which way
the world's own axes point is said by `space`: left-posterior-superior is LPS; right-anterior-superior, nibabel's world,
has x and y the other way round, left-anterior-superior y alone. A file that names no such space, or has spacings
without directions, does not say where the scan lies and is refused.

The header is parsed by pynrrd. The voxels are read here: pynrrd unpacks a compressed file to the end, however much
that is, before it looks at the sizes. What the format has beyond one scan is refused: colours, vectors, several
volumes, lists of data files, hexadecimal numbers.
"""

from __future__ import annotations

import bz2
import gzip
import io
import math
import re
import zlib
from pathlib import Path
from typing import IO, Any

import nrrd
import numpy as np
import numpy.typing as npt

from lvseg.errors import InputError
from lvseg.formats.checks import DEFLATE_RATIO, beside, is_of_machine, read_exactly, storable, truncated, voxel_bytes
from lvseg.formats.text import rest_as_numbers
from lvseg.volume import Volume

MAGIC = b"NRRD000"
HEADER_LIMIT_BYTES = 4 * 1024**2  # segmentations by 3D Slicer have some tens of kilobytes
TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
CODES = {name: code for code, names in TYPES.items() for name in names}
LPS_OF_SPACE = {
    "left-posterior-superior": (1, 1, 1),
    "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1),
    "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1),
    "las": (1, -1, 1),
}
ENCODINGS = {
    "raw": "raw",
    "gzip": "gzip",
    "gz": "gzip",
    "bzip2": "bzip2",
    "bz2": "bzip2",
    "text": "text",
    "txt": "text",
    "ascii": "text",
}
SPATIAL_KINDS = ("domain", "space", "???", "none")
MILLIMETRE_NAMES = ("", "mm", "millimeter", "millimetre", "millimeters", "millimetres")


def read(path: Path) -> Volume:
    """Reads one scan or mask.

    Args:
        path: a .nrrd, or a .nhdr whose data file lies in the same folder.

    Returns:
        voxels [k, j, i] in the file's dtype; affine to LPS millimetres; metadata `format` ("NRRD").

    Raises:
        InputError: UNSUPPORTED_FORMAT, UNSUPPORTED_PIXEL_TYPE, NEEDS_VOLUME_INDEX, INPUT_TRUNCATED, DECOMPRESS_LIMIT,
            DIMS_LIMIT, EMPTY_IMAGE, BAD_GEOMETRY, NOT_FOUND or NOT_READABLE.
    """
    with path.open("rb") as file:
        header = _header(file, path)
        code = CODES.get(str(header.get("type", "")).lower())
        if code is None:
            raise InputError(
                "UNSUPPORTED_PIXEL_TYPE",
                f"Expected one real number per voxel, received type {str(header.get('type', ''))[:40]!r} in {path}.",
            )
        sizes, spatial = _sizes(header, path)
        count = voxel_bytes(sizes, int(code[1:]), path)
        affine = _affine(header, spatial, path)
        data_path = _data_file(header, path)
        if data_path is None:
            voxels = _voxels(file, header, code, count, path)
        else:
            with data_path.open("rb") as data:
                voxels = _voxels(data, header, code, count, path)
    shape = [sizes[axis] for axis in reversed(spatial)]
    return Volume(voxels.reshape(shape), affine, source=str(path), metadata={"format": "NRRD"})


def data_file(path: Path) -> Path | None:
    """The file beside a header that holds its voxels, or None where they follow it; InputError as `read`."""
    with path.open("rb") as file:
        return _data_file(_header(file, path), path)


def _data_file(header: dict[str, Any], path: Path) -> Path | None:
    name = header.get("data file", header.get("datafile"))
    return None if name is None else beside(path, str(name))


def write(volume: Volume, path: Path) -> None:
    """Writes the volume's own axis order and directions, in LPS millimetres, gzipped.

    Args:
        volume: any dtype that NRRD has.
        path: ends in .nrrd.

    Raises:
        InputError: UNSUPPORTED_PIXEL_TYPE for a dtype that NRRD lacks, such as float16.
    """
    voxels = storable(volume.voxels)
    if f"{voxels.dtype.kind}{voxels.dtype.itemsize}" not in TYPES:
        raise InputError(
            "UNSUPPORTED_PIXEL_TYPE", f"Expected voxels of a type that NRRD has, received {voxels.dtype} for {path}."
        )
    header = {
        "space": "left-posterior-superior",
        "space directions": volume.affine[:3, [2, 1, 0]].T + 0.0,
        "space origin": volume.affine[:3, 3],
        "space units": ["mm", "mm", "mm"],
        "kinds": ["domain", "domain", "domain"],
        "encoding": "gzip",
    }
    content = io.BytesIO()
    nrrd.write(content, voxels, header, index_order="C", compression_level=6)
    fields, _, data = content.getvalue().partition(b"\n\n")
    # Without pynrrd's comments, one of which is the time: the same scan gives the same file.
    lines = [line for line in fields.split(b"\n") if not line.startswith(b"#")]
    path.write_bytes(b"\n".join(lines) + b"\n\n" + data)


def _header(file: IO[bytes], path: Path) -> dict[str, Any]:
    """The header's fields, read up to the empty line that ends it."""
    lines = [file.readline(HEADER_LIMIT_BYTES)]
    if not lines[0].startswith(MAGIC):
        if MAGIC.startswith(lines[0]):
            raise InputError("INPUT_TRUNCATED", f"Expected an NRRD header, received only a part of one in {path}.")
        raise InputError("UNSUPPORTED_FORMAT", f"Expected an NRRD header, received {lines[0][:8]!r} in {path}.")
    while line := file.readline(HEADER_LIMIT_BYTES):
        if not line.strip():
            break
        lines.append(line)
        is_field = not line.startswith(b"#") and b":=" not in line
        if is_field and not re.fullmatch(rb"[\t\x20-\x7e]*\r?\n?", line):  # pynrrd leaves out what it does not know
            raise InputError("UNSUPPORTED_FORMAT", f"Expected text, received {line[:40]!r} in the header of {path}.")
        if file.tell() > HEADER_LIMIT_BYTES:
            raise InputError(
                "UNSUPPORTED_FORMAT",
                f"Expected a header of at most {HEADER_LIMIT_BYTES} bytes, received more in {path}.",
            )
    try:
        header = dict(nrrd.read_header(lines))
    except Exception as error:  # pynrrd raises whatever its parser meets first
        received = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise InputError("UNSUPPORTED_FORMAT", f"Expected NRRD fields, received {received!r} in {path}.") from error
    if not line and "data file" not in header and "datafile" not in header:
        raise InputError(
            "INPUT_TRUNCATED", f"Expected an empty line behind the header, received the end of the file in {path}."
        )
    return header


def _sizes(header: dict[str, Any], path: Path) -> tuple[list[int], list[int]]:
    """The size of every axis, and which three are spatial; others have to have size 1."""
    sizes = [int(size) for size in np.atleast_1d(header.get("sizes", []))]
    if header.get("dimension") != len(sizes) or not sizes or len(sizes) > 16:
        raise InputError(
            "UNSUPPORTED_FORMAT",
            f"Expected as many sizes as the dimension {header.get('dimension')} says, received {sizes[:16]} in {path}.",
        )
    voxel_bytes(sizes, 1, path)
    kinds = [str(kind).lower() for kind in header.get("kinds", ["domain"] * len(sizes))]
    rows = np.atleast_2d(header["space directions"]) if "space directions" in header else np.empty((0, 0))
    if len(rows) != len(sizes):
        raise InputError(
            "BAD_GEOMETRY",
            f"Expected space directions for {len(sizes)} axes, received {len(rows)} in {path}.",
        )
    spatial = [axis for axis, row in enumerate(rows) if not np.isnan(row).all()]
    others = [sizes[axis] for axis in range(len(sizes)) if axis not in spatial]
    if len(spatial) != 3 or any(size != 1 for size in others):
        raise InputError("NEEDS_VOLUME_INDEX", f"Expected one 3-D volume, received sizes {sizes} in {path}.")
    if len(kinds) != len(sizes) or any(kinds[axis] not in SPATIAL_KINDS for axis in spatial):
        raise InputError(
            "UNSUPPORTED_FORMAT",
            f"Expected axes of kind domain or space, received {[kind[:20] for kind in kinds[:16]]} in {path}.",
        )
    return sizes, spatial


def _affine(header: dict[str, Any], spatial: list[int], path: Path) -> npt.NDArray[np.float64]:
    """Voxel index (k, j, i) to LPS millimetres."""
    space = str(header.get("space", "")).lower()
    signs = LPS_OF_SPACE.get(space)
    if signs is None:
        raise InputError(
            "BAD_GEOMETRY",
            f"Expected a space of {', '.join(name for name in LPS_OF_SPACE if '-' in name)}, received {space[:40]!r} in"
            f" {path}.",
        )
    units = [str(unit).strip().lower() for unit in header.get("space units", [])]
    if any(unit not in MILLIMETRE_NAMES for unit in units):
        raise InputError("BAD_GEOMETRY", f"Expected space units of mm, received {units[:3]} in {path}.")
    directions = np.atleast_2d(header["space directions"])[spatial]
    origin = np.atleast_1d(header.get("space origin", []))
    if directions.shape != (3, 3) or origin.shape != (3,) or not np.isfinite([*directions, origin]).all():
        raise InputError(
            "BAD_GEOMETRY",
            f"Expected three finite space directions and a space origin, received {directions.tolist()} and"
            f" {origin.tolist()} in {path}.",
        )
    affine = np.eye(4)
    affine[:3, :3] = (directions.T * np.array(signs)[:, None])[:, ::-1]
    affine[:3, 3] = origin * signs
    return affine + 0.0  # without negative zeros


def _voxels(file: IO[bytes], header: dict[str, Any], code: str, count: int, path: Path) -> npt.NDArray[Any]:
    """The numbers in their own dtype, native byte order, once the file is known to hold exactly as many."""
    encoding = ENCODINGS.get(str(header.get("encoding", "")).lower())
    order = {"little": "<", "big": ">"}.get(str(header.get("endian", "")).lower())
    if encoding is None:
        raise InputError(
            "UNSUPPORTED_FORMAT",
            f"Expected an encoding of raw, gzip, bzip2 or text, received {str(header.get('encoding', ''))[:40]!r} in"
            f" {path}.",
        )
    if order is None and code[1:] != "1" and encoding != "text":
        raise InputError(
            "UNSUPPORTED_FORMAT",
            f"Expected an endian of little or big, received {str(header.get('endian', ''))[:40]!r} in {path}.",
        )
    _skip(file, header, count, encoding, path)
    if encoding == "text":
        return rest_as_numbers(file, code, count // int(code[1:]), path)
    remaining = Path(file.name).stat().st_size - file.tell()
    # The ratio of bzip2 has no useful limit; memory grows with what comes.
    if count > remaining * {"raw": 1, "gzip": DEFLATE_RATIO, "bzip2": math.inf}[encoding]:
        raise truncated(path, count, remaining)
    try:
        if encoding == "gzip":
            data = read_exactly(gzip.GzipFile(fileobj=file), count, path)  # type: ignore[arg-type]
        elif encoding == "bzip2":
            data = read_exactly(bz2.BZ2File(file), count, path)
        else:
            data = read_exactly(file, count, path)
    except (EOFError, zlib.error, gzip.BadGzipFile, OSError, ValueError) as error:
        if isinstance(error, InputError) or is_of_machine(error):
            raise
        raise InputError(
            "INPUT_TRUNCATED", f"Expected a whole {encoding} stream, received one cut short or damaged in {path}."
        ) from error
    return np.frombuffer(data, f"{order or '<'}{code}").astype(code, copy=False)


def _skip(file: IO[bytes], header: dict[str, Any], count: int, encoding: str, path: Path) -> None:
    """Moves to the first voxel: over lines, then over bytes; -1 means that the voxels are the file's end."""
    lines, skipped = (int(header.get(f"{what} skip", header.get(f"{what}skip", 0))) for what in ("line", "byte"))
    if not 0 <= lines <= 10_000 or not -1 <= skipped <= 2**31 or (skipped and encoding in ("gzip", "bzip2")):
        raise InputError(
            "UNSUPPORTED_FORMAT",
            f"Expected to skip a few lines or bytes of plain voxels, received {lines} and {skipped} in {path}.",
        )
    for _ in range(lines):
        file.readline(HEADER_LIMIT_BYTES)
    if skipped == -1:
        if encoding != "raw":
            raise InputError(
                "UNSUPPORTED_FORMAT", f"Expected byte skip -1 for raw voxels alone, received it in {path}."
            )
        skipped = Path(file.name).stat().st_size - count - file.tell()
        if skipped < 0:
            raise truncated(path, count, count + skipped)
    file.seek(skipped, 1)
