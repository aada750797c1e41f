"""Scan files in and out: one reader and one writer a format, chosen by the suffix or, for DICOM, by the content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lvseg.command import atomic
from lvseg.errors import InputError
from lvseg.formats import dicom, nifti, vti, vtk
from lvseg.formats.checks import check_finite
from lvseg.volume import Volume

Reader = Callable[[Path], Volume]
Writer = Callable[[Volume, Path], None]

# Longest suffix first, since a name may end with two of them.
FORMATS: dict[str, tuple[Reader, Writer | None]] = {
    ".nii.gz": (nifti.read, nifti.write),
    ".nii": (nifti.read, nifti.write),
    ".vtk": (vtk.read, vtk.write),
    ".vti": (vti.read, vti.write),
    ".dcm": (dicom.read, None),
}


def read_volume(path: Path) -> Volume:
    """Reads one scan or mask.

    Args:
        path: a file .nii.gz, .nii, .vtk, .vti or DICOM (any name), or a folder with one DICOM series.

    Returns:
        voxels [slice, row, column] in the file's own axis order and direction, in its own dtype (float32 where it
        stores them scaled), with the affine to LPS millimetres.

    Raises:
        InputError: NOT_FOUND, NOT_READABLE, UNSUPPORTED_FORMAT, NONFINITE_VOXELS, or what the format's reader says.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise InputError("NOT_FOUND", f"Expected a scan, received a path where nothing is: {path}.")
        if not path.is_file() and not path.is_dir():  # reading a pipe or a device may never end
            raise InputError("NOT_READABLE", f"Expected a file or a folder, received a device or a pipe: {path}.")
        volume = _reader(path)(path)
    except OSError as error:
        raise InputError(
            "NOT_READABLE", f"Expected a readable scan, received '{error.strerror}' from {path}."
        ) from error
    check_finite(volume.voxels, path)
    return volume


def write_volume(volume: Volume, path: Path) -> list[Path]:
    """Writes one scan or mask; no file is ever seen half-written.

    Args:
        volume: voxels in any real dtype that the format has; booleans become uint8.
        path: .nii.gz, .nii or .vti (the volume's own axis order), .vtk (canonical axis order).

    Returns:
        The files written, `path` first; an oblique .vtk has a second one, `<name>.vtk.json`, with its directions. An
        aligned .vtk has none, and one that an earlier .vtk of this name left is deleted.

    Raises:
        InputError: UNSUPPORTED_FORMAT for another suffix, UNSUPPORTED_PIXEL_TYPE for a dtype that the format lacks.
    """
    path = Path(path)
    writer = FORMATS.get(_suffix(path), (None, None))[1]
    if writer is None:
        valid = ", ".join(suffix for suffix, (_, write) in FORMATS.items() if write)
        raise InputError("UNSUPPORTED_FORMAT", f"Expected a file to write that ends in {valid}, received {path}.")
    sidecar = vtk.sidecar_path(path) if writer is vtk.write else None
    needs_sidecar = sidecar is not None and volume.is_oblique
    if sidecar is not None and not needs_sidecar and vtk.is_sidecar(sidecar):
        sidecar.unlink()  # one left by an earlier, oblique file would give this one wrong directions
    with atomic(path) as temporary:
        writer(volume, temporary)
        if sidecar is not None and needs_sidecar:
            with atomic(sidecar) as temporary_sidecar:
                vtk.write_sidecar(volume, temporary_sidecar)
    return [path, sidecar] if sidecar is not None and needs_sidecar else [path]


def stem(path: Path) -> str:
    """The name without a scan's suffix: `liver` for liver.nii.gz; a folder's own name."""
    path = Path(path)
    if path.is_dir():
        return path.resolve().name
    return path.name[: len(path.name) - len(_suffix(path))]


def _suffix(path: Path) -> str:
    """The one of FORMATS that the name ends in, as long as the name has it (whatever its case), or empty."""
    name = path.name.lower()
    return next((suffix for suffix in FORMATS if name.endswith(suffix) and name != suffix), "")


def _reader(path: Path) -> Reader:
    if path.is_dir():
        return dicom.read
    suffix = _suffix(path)
    if suffix:
        return FORMATS[suffix][0]
    if dicom.is_dicom(path):
        return dicom.read
    raise InputError(
        "UNSUPPORTED_FORMAT",
        f"Expected a folder of DICOM files, a DICOM file or a name that ends in {', '.join(FORMATS)}, received {path}.",
    )
