"""Builds scans that no one should accept, for the tests of readers, commands and server."""

from __future__ import annotations

import gzip
import re
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np

from lvseg.formats import write_volume
from lvseg.volume import Volume

# Byte offsets in a NIfTI-1 header, from the standard.
DIM, DATATYPE, PIXDIM, QFORM_CODE, SFORM_CODE, QOFFSET_X, SROW_X = 40, 70, 76, 252, 254, 268, 280


def volume(shape: tuple[int, int, int] = (5, 6, 7), seed: int = 0) -> Volume:
    """A small int16 scan of noise, 3 x 1.5 x 2 mm, axis-aligned but flipped."""
    voxels = np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)
    affine = np.array([[0.0, 0, -2, 30], [0, 1.5, 0, -20], [3, 0, 0, 700.25], [0, 0, 0, 1]])
    return Volume(voxels, affine)


def bad_scans(folder: Path) -> dict[str, tuple[Path, str]]:
    """Writes bad files into a folder.

    Args:
        folder: exists, and is empty.

    Returns:
        For each kind of fault the path, and the code of the InputError that it must give.
    """
    good = write_volume(volume(), folder / "good.nii")[0].read_bytes()
    write_volume(volume(), folder / "good.vtk")
    write_volume(volume(), folder / "good.vti")
    write_volume(volume(), folder / "good.nrrd")
    write_volume(volume(), folder / "good.mha")
    good_nrrd, good_mha = (folder / "good.nrrd").read_bytes(), (folder / "good.mha").read_bytes()
    good_vtk, good_vti = (folder / "good.vtk").read_bytes(), (folder / "good.vti").read_bytes()
    for name in ("good.nii", "good.vtk", "good.vti", "good.nrrd", "good.mha"):
        (folder / name).unlink()

    cases: dict[str, tuple[Path, str]] = {"missing file": (folder / "missing.nii.gz", "NOT_FOUND")}

    def add(kind: str, suffix: str, content: bytes, code: str) -> None:
        path = folder / f"{kind.replace(' ', '_')}{suffix}"
        path.write_bytes(content)
        cases[kind] = (path, code)

    def patched(*changes: tuple[int, str, object]) -> bytes:
        header = bytearray(good)
        for offset, kind, value in changes:
            struct.pack_into(f"<{kind}", header, offset, value)
        return bytes(header)

    text = b"This is no scan but a note about one.\n" * 20
    add("text called nii gz", ".nii.gz", text, "UNSUPPORTED_FORMAT")
    add("text called nii", ".nii", text, "UNSUPPORTED_FORMAT")
    add("text called vtk", ".vtk", text, "UNSUPPORTED_FORMAT")
    add("text called vti", ".vti", text, "UNSUPPORTED_FORMAT")
    add("text called dcm", ".dcm", text, "UNSUPPORTED_FORMAT")
    add("unknown suffix", ".png", text, "UNSUPPORTED_FORMAT")
    for suffix in (".nrrd", ".nhdr", ".mha", ".mhd"):
        add(f"text called {suffix[1:]}", suffix, text, "UNSUPPORTED_FORMAT")
    add("text called zip", ".zip", text, "INPUT_CORRUPT")
    for suffix in (".nrrd", ".mha", ".zip"):
        add(f"empty {suffix[1:]}", suffix, b"", "INPUT_TRUNCATED")
    add("empty nii gz", ".nii.gz", b"", "INPUT_TRUNCATED")
    add("truncated nii gz", ".nii.gz", gzip.compress(good)[:-60], "INPUT_TRUNCATED")
    add("damaged nii gz", ".nii.gz", gzip.compress(good)[:-8] + b"\0" * 8, "INPUT_TRUNCATED")
    add("truncated nii", ".nii", good[:-1], "INPUT_TRUNCATED")
    add("gzip longer than its header", ".nii.gz", gzip.compress(good + b"\0" * 10**6), "DECOMPRESS_LIMIT")
    add("gzip shorter than its header", ".nii.gz", gzip.compress(good[:-10]), "INPUT_TRUNCATED")
    add("truncated vtk", ".vtk", good_vtk[:-1], "INPUT_TRUNCATED")
    add("truncated vti", ".vti", good_vti[:-20], "INPUT_TRUNCATED")
    add("vti with entities", ".vti", b'<!DOCTYPE a [<!ENTITY b "c">]>' + good_vti, "UNSUPPORTED_FORMAT")
    add("huge sizes", ".nii", patched(*((DIM + 2 * axis, "h", 30000) for axis in (1, 2, 3))), "DIMS_LIMIT")
    add("negative size", ".nii", patched((DIM + 2, "h", -7)), "DIMS_LIMIT")
    add("too many dimensions", ".nii", patched((DIM, "h", 9)), "DIMS_LIMIT")
    add("size zero", ".nii", patched((DIM + 4, "h", 0)), "EMPTY_IMAGE")
    add("huge vtk", ".vtk", good_vtk.replace(b"DIMENSIONS 7 6 5", b"DIMENSIONS 99999 99999 99999"), "DIMS_LIMIT")
    add("nan in the affine", ".nii", patched((SROW_X, "f", np.nan)), "BAD_GEOMETRY")
    add("nan spacing", ".nii", patched((PIXDIM + 4, "f", np.nan)), "BAD_GEOMETRY")
    add("zero spacing", ".nii", patched((PIXDIM + 8, "f", 0.0)), "BAD_GEOMETRY")
    add("negative spacing", ".nii", patched((PIXDIM + 12, "f", -3.0)), "BAD_GEOMETRY")
    add("no orientation", ".nii", patched((QFORM_CODE, "h", 0), (SFORM_CODE, "h", 0)), "BAD_GEOMETRY")
    add("sheared affine", ".nii", patched((QFORM_CODE, "h", 0), (SROW_X + 4, "f", 0.7)), "BAD_GEOMETRY")
    add("pixdim that disagrees", ".nii", patched((QFORM_CODE, "h", 0), (PIXDIM + 12, "f", 9.0)), "GEOMETRY_AMBIGUOUS")
    add("forms that disagree", ".nii", patched((QOFFSET_X, "f", 99.0)), "GEOMETRY_AMBIGUOUS")
    add("zero spacing in vtk", ".vtk", good_vtk.replace(b"SPACING 2.0", b"SPACING 0.0"), "BAD_GEOMETRY")
    add("nan directions in vtk", ".vtk", good_vtk.replace(b"DIR=1.0", b"DIR=nan"), "BAD_GEOMETRY")
    add("other dataset in vtk", ".vtk", good_vtk.replace(b"STRUCTURED_POINTS", b"POLYDATA"), "UNSUPPORTED_FORMAT")
    add("three components in vtk", ".vtk", good_vtk.replace(b"short 1", b"short 3"), "UNSUPPORTED_PIXEL_TYPE")

    add("truncated nrrd", ".nrrd", good_nrrd[:-9], "INPUT_TRUNCATED")
    add("truncated mha", ".mha", good_mha[:-1], "INPUT_TRUNCATED")
    add("huge nrrd", ".nrrd", good_nrrd.replace(b"sizes: 7 6 5", b"sizes: 99999 99999 99999"), "DIMS_LIMIT")
    add("huge mha", ".mha", good_mha.replace(b"DimSize = 7 6 5", b"DimSize = 99999 99999 99999"), "DIMS_LIMIT")
    add("nrrd sizes of fewer voxels", ".nrrd", good_nrrd.replace(b"sizes: 7 6 5", b"sizes: 7 6 4"), "DECOMPRESS_LIMIT")
    add(
        "mha sizes of fewer voxels",
        ".mha",
        good_mha.replace(b"DimSize = 7 6 5", b"DimSize = 7 6 4"),
        "DECOMPRESS_LIMIT",
    )
    add("nrrd without a world", ".nrrd", good_nrrd.replace(b"left-posterior-superior", b"scanner-xyz"), "BAD_GEOMETRY")
    add("mha axes that disagree", ".mha", good_mha.replace(b"= LAI", b"= RAI"), "GEOMETRY_AMBIGUOUS")
    add("tiny spacing in mha", ".mha", good_mha.replace(b"Spacing = 2", b"Spacing = 2e-30"), "BAD_GEOMETRY")
    add("offset of light years", ".vti", good_vti.replace(b'Origin="30 ', b'Origin="3e20 '), "BAD_GEOMETRY")

    def save(kind: str, array: np.ndarray, code: str) -> None:
        path = folder / f"{kind.replace(' ', '_')}.nii.gz"
        nibabel.Nifti1Image(array, np.eye(4)).to_filename(path)
        cases[kind] = (path, code)

    save("four dimensions", np.zeros((4, 5, 6, 2), np.int16), "NEEDS_VOLUME_INDEX")
    save("two dimensions", np.zeros((4, 5), np.int16), "NEEDS_VOLUME_INDEX")
    save("rgb", np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "UNSUPPORTED_PIXEL_TYPE")
    save("complex", np.zeros((4, 5, 6), np.complex64), "UNSUPPORTED_PIXEL_TYPE")
    save("nan voxels", np.full((4, 5, 6), np.nan, np.float32), "NONFINITE_VOXELS")
    return cases


def error_of(read: Callable[..., object], path: Path, *more: object) -> tuple[str, str]:
    """Code and sentence of the InputError that `read(path, *more)` raises; fails if it raises none."""
    from lvseg.errors import InputError

    try:
        read(path, *more)
    except InputError as error:
        return error.code, error.sentence
    raise AssertionError(f"{path} was accepted")


def is_one_sentence_naming(sentence: str, path: Path) -> bool:
    """Whether it is exactly one sentence and names the file; what it quotes of the file may hold any character."""
    text = re.sub(r"""b?'(?:\\.|[^'])*'|b?"(?:\\.|[^"])*\"""", "''", sentence.replace(str(path), path.name))
    return sentence.startswith("Expected ") and text.endswith(".") and ". " not in text and path.name in text
