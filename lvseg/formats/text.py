"""Numbers as text: in headers, and where a file holds its voxels as text."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from lvseg.errors import InputError
from lvseg.formats.checks import truncated


def whole_number(word: str, path: Path) -> int:
    """The integer that a header's word says; anything else is UNSUPPORTED_FORMAT."""
    if not re.fullmatch(r"[+-]?\d{1,18}", word):
        raise InputError("UNSUPPORTED_FORMAT", f"Expected a whole number, received {word[:40]!r} in {path}.")
    return int(word)


def finite_numbers(text: str, count: int, name: str, path: Path) -> list[float]:
    """The numbers of a header's geometry; anything else is BAD_GEOMETRY."""
    try:
        values = [float(word) for word in text.split()]
    except ValueError:
        values = []
    if len(values) != count or not all(math.isfinite(value) for value in values):
        raise InputError(
            "BAD_GEOMETRY", f"Expected {count} finite numbers for {name}, received {text[:80]!r} in {path}."
        )
    return values


def numbers_of_text(source: IO[bytes] | str, code: str, count: int, path: Path) -> npt.NDArray[Any]:
    """Numbers parted by white space [count], float64 or, where that cannot hold them, 64-bit integers.

    A string has to hold no more of them; a file is read so far.

    Raises:
        InputError: INPUT_TRUNCATED for fewer or a bad word, DECOMPRESS_LIMIT for more.
    """
    wide = np.dtype(code if code in ("i8", "u8") else "f8")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # numpy's word for a word that is no number
        try:
            if isinstance(source, str):
                # Asked for a count, numpy fills what a string lacks with whatever memory holds.
                values = np.fromstring(source, wide, sep=" ")
            else:
                values = np.fromfile(source, wide, count, sep=" ")
        except DeprecationWarning:
            values = np.empty(0)
    if values.size < count:
        raise InputError(
            "INPUT_TRUNCATED", f"Expected {count} numbers, received fewer or a bad word before them in {path}."
        )
    if values.size > count:
        raise InputError("DECOMPRESS_LIMIT", f"Expected {count} numbers as the sizes say, received more in {path}.")
    return values


def fitting(values: npt.NDArray[Any], code: str, path: Path) -> npt.NDArray[Any]:
    """The values in their own dtype, refused where it cannot hold them."""
    with np.errstate(invalid="ignore", over="ignore"):  # what does not fit is seen by comparing
        voxels = values.astype(code)
    if voxels.dtype.kind != "f" and not np.array_equal(voxels, values):
        raise InputError(
            "UNSUPPORTED_PIXEL_TYPE", f"Expected whole numbers of type {voxels.dtype}, received others in {path}."
        )
    return voxels


def rest_as_numbers(file: IO[bytes], code: str, count: int, path: Path) -> npt.NDArray[Any]:
    """The rest of a file, which has to be exactly that many numbers and end in white space, in their own dtype [count].

    Raises:
        InputError: INPUT_TRUNCATED for fewer or a bad word, DECOMPRESS_LIMIT for more, UNSUPPORTED_PIXEL_TYPE for
            what the dtype cannot hold.
    """
    remaining = Path(file.name).stat().st_size - file.tell()
    if remaining < 2 * count:  # a digit and a space each
        raise truncated(path, 2 * count, remaining)
    content = file.read()
    if not content[-1:].isspace():
        raise InputError("INPUT_TRUNCATED", f"Expected text that ends in a line break in {path} (cut short).")
    return fitting(numbers_of_text(content.decode("latin-1"), code, count, path), code, path)
