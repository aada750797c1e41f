"""Masks as a folder of PNG files, one a slice, as public data sets have them beside DICOM images.

A PNG does not say where it lies. It belongs to the image file that has its place in the order of names, and its rows
and columns are that image's. Grey values are the labels: 63, 126, 189 and 252 mean different organs in one set, and 255
the only one in another, so nothing is rescaled here. Names are ordered as text and with their numbers as numbers; where
the two orders would put a PNG on different slices, or an order puts it beside its namesake, nobody can know which was
meant, unless all names agree.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lvseg.errors import InputError
from lvseg.formats.checks import is_of_machine
from lvseg.formats.grid import as_labels
from lvseg.volume import Array, Volume

SUFFIX = ".png"
GREY_MODES = ("1", "L", "I;16", "I;16B")
DEPTH_AT = 24  # of the bits a sample in the file's first chunk
WHOLE_BYTES = (1, 8, 16)


def files_of(folder: Path) -> list[Path]:
    """The folder's PNG files in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == SUFFIX and not path.name.startswith("."))


def read_mask(folder: Path, image: Volume) -> Volume:
    """Reads a mask, slice by slice.

    Args:
        folder: with as many PNG files as the image has slices.
        image: read from single-frame DICOM files, so that its metadata has `slice_files`.

    Returns:
        uint8 or uint16 grey values on the image's own grid; metadata `format` ("PNG").

    Raises:
        InputError: GEOMETRY_MISMATCH, GEOMETRY_AMBIGUOUS, INPUT_TRUNCATED, UNSUPPORTED_FORMAT or
            UNSUPPORTED_PIXEL_TYPE.
    """
    files = files_of(folder)
    names = image.metadata.get("slice_files") or ()
    if len(names) != image.shape[0]:
        raise InputError(
            "GEOMETRY_MISMATCH",
            f"Expected an image of DICOM files that the PNG files can be matched with, received"
            f" {image.source or 'one without'} for the masks in {folder}.",
        )
    if len(files) != len(names):
        raise InputError(
            "GEOMETRY_MISMATCH",
            f"Expected {len(names)} PNG files, one for each slice of {image.source or 'the image'}, received"
            f" {len(files)} in {folder}.",
        )
    labels = np.zeros(image.shape, np.uint16)
    for index, path in zip(_slices(names, files, folder), files, strict=True):
        labels[index] = _read(path, image.shape[1:])
    return Volume(as_labels(labels, str(folder)), image.affine, source=str(folder), metadata={"format": "PNG"})


def _slices(names: Sequence[str], files: Sequence[Path], folder: Path) -> list[int]:
    """For each PNG, in the order of names, the slice that it belongs to."""
    stems = {_stem(name): index for index, name in enumerate(names)}
    own = [path.stem for path in files]
    if len(stems) == len(names) and all(stem in stems for stem in own):
        return [stems[stem] for stem in own]
    pairs = []
    for key in (str, _natural):
        images = sorted(range(len(names)), key=lambda index: key(names[index]))
        masks = sorted(range(len(own)), key=lambda index: key(own[index]))
        pairs.append(dict(zip(masks, images, strict=True)))
    if pairs[0] != pairs[1]:
        raise InputError(
            "GEOMETRY_AMBIGUOUS",
            f"Expected numbers with leading zeros in the names, received names whose order as text is not that of their"
            f" numbers in {folder} or its image.",
        )
    if any(stems.get(stem, pairs[0][number]) != pairs[0][number] for number, stem in enumerate(own)):
        raise InputError(
            "GEOMETRY_AMBIGUOUS",
            f"Expected PNG files that all have a DICOM file's name, or none, received some whose namesake is another"
            f" slice than their place in order says in {folder}.",
        )
    return [pairs[0][number] for number in range(len(own))]


def _stem(name: str) -> str:
    return re.sub(r"(?i)\.(dcm|ima)$", "", name)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _read(path: Path, size: tuple[int, int]) -> Array:
    """The grey values [row, column]."""
    if not path.is_file():
        raise InputError("NOT_READABLE", f"Expected a file, received a device, a pipe or a broken link: {path}.")
    if path.stat().st_size == 0:
        raise InputError("INPUT_TRUNCATED", f"Expected a PNG image, received no bytes in {path}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as image:
                rows, columns = image.height, image.width
                mode = image.mode
                if (rows, columns) != tuple(size):
                    raise InputError(
                        "GEOMETRY_MISMATCH",
                        f"Expected {size[0]} x {size[1]} pixels as the image has, received {rows} x {columns} in"
                        f" {path}.",
                    )
                image.verify()  # the checksums, which loading passes over
            with path.open("rb") as file:
                depth = file.read(DEPTH_AT + 1)[DEPTH_AT]
            with Image.open(path, formats=["PNG"]) as image:
                pixels = np.asarray(image)
    except Exception as error:  # each of its parsers raises its own
        if isinstance(error, InputError) or is_of_machine(error):
            raise
        with path.open("rb") as file:
            is_png = file.read(8) == b"\x89PNG\r\n\x1a\n"
        raise InputError(
            "INPUT_TRUNCATED" if is_png else "UNSUPPORTED_FORMAT",
            f"Expected a whole PNG image, received a damaged, cut short or other one in {path}.",
        ) from error
    if mode == "RGB" and (pixels == pixels[..., :1]).all():  # grey saved as colour
        return pixels[..., 0]
    if mode not in GREY_MODES or depth not in WHOLE_BYTES:
        raise InputError(
            "UNSUPPORTED_PIXEL_TYPE",
            f"Expected grey values of 1, 8 or 16 bits, received {mode} of {depth} bits in {path} (a palette or a colour"
            " does not say which label it is).",
        )
    return pixels
