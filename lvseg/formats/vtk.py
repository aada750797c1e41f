"""Legacy .vtk images in and out.

Axes. The file holds x fastest, its index is (i, j, k) = (column, row, slice), and its world is LPS millimetres.
Files are written in canonical axis order (columns to the patient's left, rows to the back, slices to the head), so for
a scan along the world axes, however flipped or permuted, position = ORIGIN + SPACING * (i, j, k) is exact.

Legacy .vtk has no place for directions. An oblique scan is written with the true position of its first voxel as ORIGIN,
its canonical index axes, and its directions twice where they do no harm: in the title line, which every reader skips,
and in full in `<name>.vtk.json` beside it. The title reads

    lvseg 1; SPACE=LPS; DIR=ix,iy,iz,jx,jy,jz,kx,ky,kz

with the unit vectors of i, j and k one after the other, and is believed when read. A file without it is taken as lying
along the LPS axes, and says so in its metadata.

Legacy files are read without VTK: given a short file VTK reports no error and returns voxels of uninitialised memory,
and given a large number in a part we have no use for it allocates as much. What is left to do once both are checked is
one call to numpy. The file is read as far as its first scalars.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from lvseg.errors import InputError
from lvseg.formats.checks import storable, truncated, voxel_bytes
from lvseg.formats.text import finite_numbers, fitting, numbers_of_text, whole_number
from lvseg.volume import Volume

MAGIC = b"# vtk DataFile Version "
TITLE = "lvseg 1; SPACE=LPS; DIR="
TITLE_WORDS = ("lvseg 1", "SPACE=LPS", "DIR=")
SIDECAR_FORMAT = "lvseg 1"
SIDECAR_LIMIT_BYTES = 64 * 1024  # one of ours has less than a kilobyte
TITLE_LIMIT = 256
LINE_LIMIT = 1024
# Names as the format has them; legacy binary is big-endian. `long` is eight bytes, as VTK writes it outside Windows.
LEGACY_TYPES = {
    "unsigned_char": "u1",
    "char": "i1",
    "signed_char": "i1",
    "unsigned_short": "u2",
    "short": "i2",
    "unsigned_int": "u4",
    "int": "i4",
    "vtktypeuint64": "u8",
    "vtktypeint64": "i8",
    "unsigned_long": "u8",
    "long": "i8",
    "float": "f4",
    "double": "f8",
}
LEGACY_NAMES = {code: name for name, code in reversed(LEGACY_TYPES.items())} | {"i1": "char"}
ASSUMED = "assumed LPS identity"


def write(volume: Volume, path: Path) -> None:
    """Writes a binary legacy .vtk in canonical axis order (module docstring).

    Args:
        volume: uint8 becomes `SCALARS label unsigned_char`; other dtypes `SCALARS voxels` of their own type.
        path: the file.

    Raises:
        InputError: UNSUPPORTED_PIXEL_TYPE for a dtype that VTK lacks, such as float16.
    """
    volume = volume.canonical()
    voxels = writable(volume, path)
    columns, rows, slices = reverse(volume.shape)
    directions = ",".join(repr(cosine) for cosine in directions_ijk(volume).T.ravel().tolist())
    header = (
        f"# vtk DataFile Version 3.0\n{TITLE}{directions}\nBINARY\nDATASET STRUCTURED_POINTS\n"
        f"DIMENSIONS {columns} {rows} {slices}\n"
        f"SPACING {' '.join(repr(mm) for mm in reverse(volume.spacing_mm))}\n"
        f"ORIGIN {' '.join(repr(mm) for mm in volume.affine[:3, 3].tolist())}\n"
        f"POINT_DATA {voxels.size}\n"
        f"SCALARS {array_name(voxels)} {LEGACY_NAMES[_code(voxels.dtype)]} 1\n"
        "LOOKUP_TABLE default\n"
    )
    with path.open("wb") as file:
        file.write(header.encode("ascii"))
        file.write(voxels.astype(voxels.dtype.newbyteorder(">"), copy=False).data)


def sidecar_path(path: Path) -> Path:
    """Where the directions of an oblique legacy .vtk lie: liver.vtk.json beside liver.vtk."""
    return path.with_name(f"{path.name}.json")


def write_sidecar(volume: Volume, path: Path) -> None:
    """Writes the whole geometry of a legacy .vtk as JSON, everything in VTK's own order (i, j, k).

    Args:
        volume: the one written as .vtk, in any axis order.
        path: the JSON file.
    """
    volume = volume.canonical()
    geometry = {
        "format": SIDECAR_FORMAT,
        "space": "LPS",
        "index_order": ["column", "row", "slice"],
        "size": list(reverse(volume.shape)),
        "spacing_mm": list(reverse(volume.spacing_mm)),
        "index_to_world_mm": volume.affine[:, [2, 1, 0, 3]].tolist(),
    }
    path.write_text(json.dumps(geometry, indent=2) + "\n", encoding="utf-8")


def is_sidecar(path: Path) -> bool:
    """Whether `write_sidecar` wrote this file; another file may well have the name by chance, or be a user's own."""
    if not path.is_file() or path.stat().st_size > SIDECAR_LIMIT_BYTES:
        return False
    try:
        geometry = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(geometry, dict) and geometry.get("format") == SIDECAR_FORMAT and "index_to_world_mm" in geometry


def read(path: Path) -> Volume:
    """Reads a legacy .vtk image, binary or ASCII, as far as its first scalars.

    An ASCII file has to end in a line break, or nobody could tell whether its last number is whole.

    Args:
        path: the file.

    Returns:
        voxels [slice, row, column] in the file's dtype; metadata `format` ("VTK legacy") and `directions` ("title line"
        or "assumed LPS identity").

    Raises:
        InputError: UNSUPPORTED_FORMAT, UNSUPPORTED_PIXEL_TYPE, INPUT_TRUNCATED, DIMS_LIMIT, EMPTY_IMAGE or
            BAD_GEOMETRY.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
        if start != MAGIC:
            if MAGIC.startswith(start):
                raise truncated(path, len(MAGIC), len(start))
            raise InputError("UNSUPPORTED_FORMAT", f"Expected '{MAGIC.decode()}', received {start!r} in {path}.")
        _line(file, path)
        title = _line(file, path)
        encoding = _line(file, path).upper()
        if encoding not in ("BINARY", "ASCII"):
            raise InputError("UNSUPPORTED_FORMAT", f"Expected BINARY or ASCII, received {encoding!r} in {path}.")
        header, scalars = _legacy_header(file, path)
        sizes = [whole_number(word, path) for word in header["DIMENSIONS"]]
        scaled_to_one = scalars[0] == "COLOR_SCALARS" and encoding == "ASCII"
        code = _legacy_type(scalars, path)
        item_bytes = int(code[1:]) if encoding == "BINARY" else 8  # ASCII goes through float64 or int64
        needed = voxel_bytes(sizes, item_bytes, path)
        count = math.prod(sizes)
        if whole_number(header["POINT_DATA"][0], path) != count:
            raise InputError(
                "UNSUPPORTED_FORMAT",
                f"Expected POINT_DATA {count} as DIMENSIONS say, received {header['POINT_DATA'][0][:40]!r} in {path}.",
            )
        directions, source = _directions_of_title(title, path)
        affine = affine_of_grid(
            directions,
            finite_numbers(" ".join(header["SPACING"]), 3, "SPACING", path),
            finite_numbers(" ".join(header["ORIGIN"]), 3, "ORIGIN", path),
            path,
        )
        offset = file.tell()
        if encoding == "BINARY":
            if file_bytes < offset + needed:
                raise truncated(path, offset + needed, file_bytes)
            voxels = np.fromfile(file, np.dtype(f">{code}"), count).astype(code, copy=False)
        else:
            voxels = _ascii_voxels(file, code, count, file_bytes - offset, scaled_to_one, path)
    return Volume(
        voxels.reshape(reverse(sizes)),
        affine,
        source=str(path),
        metadata={"format": "VTK legacy", "directions": source},
    )


def reverse(values: Sequence[Any]) -> tuple[Any, Any, Any]:
    """(slice, row, column) to (column, row, slice), or back."""
    first, second, third = values
    return third, second, first


def directions_ijk(volume: Volume) -> npt.NDArray[np.float64]:
    """Column k is the unit vector of VTK's axis k, without the negative zeros of a flip."""
    return volume.directions[:, ::-1] + 0.0


def _code(dtype: np.dtype[Any]) -> str:
    return f"{dtype.kind}{dtype.itemsize}"


def array_name(voxels: npt.NDArray[Any]) -> str:
    """The name of the array: `label` for a mask."""
    return "label" if voxels.dtype == np.uint8 else "voxels"


def writable(volume: Volume, path: Path) -> npt.NDArray[Any]:
    """The voxels as VTK can store them; InputError UNSUPPORTED_PIXEL_TYPE for a dtype that it lacks."""
    voxels = storable(volume.voxels)
    if _code(voxels.dtype) not in LEGACY_NAMES:
        raise InputError(
            "UNSUPPORTED_PIXEL_TYPE", f"Expected voxels of a type that VTK has, received {voxels.dtype} for {path}."
        )
    return voxels


def affine_of_grid(
    directions: npt.NDArray[np.float64],
    spacing_mm: Sequence[float],
    origin_mm: Sequence[float],
    path: Path,
    tolerance: float = 1e-6,
) -> npt.NDArray[np.float64]:
    """Index (slice, row, column) to LPS from directions (columns i, j, k; unit length within `tolerance`)."""
    if not all(0 < mm < math.inf for mm in spacing_mm):
        raise InputError("BAD_GEOMETRY", f"Expected positive SPACING, received {list(spacing_mm)} in {path}.")
    if not np.allclose(np.linalg.norm(directions, axis=0), 1, atol=tolerance, rtol=0):
        raise InputError("BAD_GEOMETRY", f"Expected unit directions, received {directions.T.tolist()} in {path}.")
    affine = np.eye(4)
    affine[:3, :3] = (directions * np.asarray(spacing_mm))[:, ::-1]
    affine[:3, 3] = origin_mm
    return affine


def _line(file: IO[bytes], path: Path) -> str:
    line = file.readline(LINE_LIMIT)
    if not line.endswith(b"\n"):
        if len(line) < LINE_LIMIT:
            raise InputError("INPUT_TRUNCATED", f"Expected a VTK header, received only a part of one in {path}.")
        raise InputError("UNSUPPORTED_FORMAT", f"Expected header lines under {LINE_LIMIT} bytes in {path}.")
    return line.decode("latin-1").strip()


def _legacy_header(file: IO[bytes], path: Path) -> tuple[dict[str, list[str]], list[str]]:
    """The words after each keyword up to the voxels, and those of the line that announces them."""
    lengths = {"DATASET": 1, "DIMENSIONS": 3, "SPACING": 3, "ORIGIN": 3, "POINT_DATA": 1}
    header: dict[str, list[str]] = {}
    while True:
        words = _line(file, path).split()
        if not words:
            continue
        keyword = words[0].upper().replace("ASPECT_RATIO", "SPACING")
        if keyword in ("SCALARS", "COLOR_SCALARS"):
            break
        if lengths.get(keyword) != len(words) - 1:
            raise InputError(
                "UNSUPPORTED_FORMAT",
                f"Expected one of {', '.join(lengths)} or SCALARS with its values, received {' '.join(words)[:80]!r} in"
                f" {path}.",
            )
        header[keyword] = words[1:]
        if keyword == "DATASET" and words[1].upper() != "STRUCTURED_POINTS":
            raise InputError(
                "UNSUPPORTED_FORMAT", f"Expected DATASET STRUCTURED_POINTS, received {words[1][:80]!r} in {path}."
            )
    missing = [name for name in lengths if name not in header]
    if missing:
        raise InputError(
            "UNSUPPORTED_FORMAT", f"Expected {', '.join(missing)} before SCALARS, received a header without in {path}."
        )
    if keyword == "SCALARS":
        table = _line(file, path).split()
        if len(table) != 2 or table[0].upper() != "LOOKUP_TABLE":
            raise InputError(
                "UNSUPPORTED_FORMAT",
                f"Expected LOOKUP_TABLE after SCALARS, received {' '.join(table)[:80]!r} in {path}.",
            )
    return header, [keyword, *words[1:]]


def _legacy_type(scalars: list[str], path: Path) -> str:
    """numpy's code of the voxels that `SCALARS name type [components]` or `COLOR_SCALARS name components` announces."""
    keyword, *words = scalars
    if keyword == "COLOR_SCALARS":
        words = [*words[:1], "unsigned_char", *words[1:]]
    if len(words) not in (2, 3):
        raise InputError("UNSUPPORTED_FORMAT", f"Expected SCALARS name type, received {words} in {path}.")
    code = LEGACY_TYPES.get(words[1].lower())
    components = words[2] if len(words) == 3 else "1"
    if code is None or components != "1":
        raise InputError(
            "UNSUPPORTED_PIXEL_TYPE",
            f"Expected one real number per voxel, received {components[:20]!r} of type {words[1][:40]!r} in {path}.",
        )
    return code


def _directions_of_title(title: str, path: Path) -> tuple[npt.NDArray[np.float64], str]:
    """The directions, column k of axis k, and where they come from."""
    if not any(word in title for word in TITLE_WORDS):  # a title of ours that is damaged is no other title
        return np.eye(3), ASSUMED
    words = title.removeprefix(TITLE).split(",")
    try:
        cosines = np.array([float(word) for word in words]).reshape(3, 3)
    except ValueError:
        cosines = np.full((3, 3), np.nan)
    if not title.startswith(TITLE) or not np.all(np.isfinite(cosines)):
        raise InputError("BAD_GEOMETRY", f"Expected '{TITLE}' and nine numbers, received title {title!r} in {path}.")
    return cosines.T, "title line"


def _ascii_voxels(
    file: IO[bytes], code: str, count: int, remaining_bytes: int, scaled_to_one: bool, path: Path
) -> npt.NDArray[Any]:
    """The voxels of an ASCII file, which has at least a digit and a space each."""
    if remaining_bytes < 2 * count:
        raise truncated(path, 2 * count, remaining_bytes)
    offset = file.tell()
    file.seek(-1, 2)
    if not file.read(1).isspace():
        raise InputError("INPUT_TRUNCATED", f"Expected an ASCII file that ends in a line break in {path} (cut short).")
    file.seek(offset)
    values = numbers_of_text(file, code, count, path)
    return fitting(np.rint(values * 255) if scaled_to_one else values, code, path)
