"""Scan files in and out: one reader and one writer a format, chosen by the suffix or, for DICOM, by the content."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lvseg.command import atomic
from lvseg.errors import InputError
from lvseg.formats import dicom, dicom_seg_write, metaimage, nifti, nrrd, png, vti, vtk
from lvseg.formats.checks import check_finite, check_plausible
from lvseg.formats.dicom_file import is_dicom
from lvseg.formats.dicom_origin import check_origin
from lvseg.formats.dicom_seg_write import Algorithm
from lvseg.formats.grid import on_grid
from lvseg.volume import Volume

Reader = Callable[[Path], Volume]
Writer = Callable[[Volume, Path], None]

# Longest suffix first, since a name may end with two of them.
FORMATS: dict[str, tuple[Reader, Writer | None]] = {
    ".nii.gz": (nifti.read, nifti.write),
    ".nii": (nifti.read, nifti.write),
    ".nrrd": (nrrd.read, nrrd.write),
    ".nhdr": (nrrd.read, None),
    ".mha": (metaimage.read, metaimage.write),
    ".mhd": (metaimage.read, None),
    ".vtk": (vtk.read, vtk.write),
    ".vti": (vti.read, vti.write),
    ".dcm": (dicom.read, None),
    ".zip": (dicom.read, None),
}
SEGMENTATION = ".dcm"  # a mask's suffix as a DICOM segmentation
# Of headers whose voxels may lie beside them, whatever they are called.
DATA_FILES = dict.fromkeys((".nhdr", ".nrrd"), nrrd.data_file) | dict.fromkeys((".mhd", ".mha"), metaimage.data_file)


def read_volume(path: Path | str | Sequence[Path | str], series: str | None = None) -> Volume:
    """Reads one scan or mask.

    Args:
        path: a file .nii.gz, .nii, .nrrd, .nhdr, .mha, .mhd, .vtk, .vti or DICOM (any name); a folder, a zip or a list
            of DICOM files.
        series: which of several DICOM series or stacks, as `dicom_series` says: SERIES, SERIES/STACK or STACK.

    Returns:
        voxels [slice, row, column] in the file's own axis order and direction, in its own dtype (float32 where it
        stores them scaled), with the affine to LPS millimetres.

    Raises:
        InputError: NOT_FOUND, NOT_READABLE, UNSUPPORTED_FORMAT, NONFINITE_VOXELS, BAD_GEOMETRY for a place or a size
            that no scan has, UNKNOWN_SERIES for a choice where there is none, or what the format's reader says.
    """
    return _read(path, series, None)


def read_mask(path: Path | str, image: Volume, series: str | None = None) -> Volume:
    """Reads labels onto the grid of their image.

    Args:
        path: whatever `read_volume` reads, a DICOM segmentation, or a folder of PNG files, one a slice.
        image: the scan that the labels belong to.
        series: which of several DICOM series.

    Returns:
        uint8, or uint16 where a label is above 255, in the image's shape and axis order with its affine; metadata
        `labels` ({number: name}) where the file has names.

    Raises:
        InputError: GEOMETRY_MISMATCH where a label does not lie on a voxel of the image, NOT_LABELS for values that are
            no whole numbers from 0 to 65535, and what `read_volume`, `png` and `dicom_seg` raise.
    """
    path = Path(path)
    if path.is_dir() and png.files_of(path) and not any(is_dicom(file) for file in path.iterdir() if file.is_file()):
        return png.read_mask(path, image)
    return on_grid(_read(path, series, image), image)


def write_volume(volume: Volume, path: Path) -> list[Path]:
    """Writes one scan or mask; no file is ever seen half-written.

    Args:
        volume: voxels in any real dtype that the format has; booleans become uint8.
        path: .nii.gz, .nii, .nrrd, .mha or .vti (the volume's own axis order), .vtk (canonical axis order).

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
    if sidecar is not None and needs_sidecar and os.path.lexists(sidecar) and not vtk.is_sidecar(sidecar):
        raise InputError("BAD_OUTPUT", f"Expected a place for the geometry of {path}, received another file {sidecar}.")
    with atomic(path) as temporary:
        writer(volume, temporary)
        if sidecar is not None and not needs_sidecar and vtk.is_sidecar(sidecar):
            sidecar.unlink()  # one left by an earlier, oblique file would give this one wrong directions
        if sidecar is not None and needs_sidecar:
            with atomic(sidecar) as temporary_sidecar:
                vtk.write_sidecar(volume, temporary_sidecar)
    return [path, sidecar] if sidecar is not None and needs_sidecar else [path]


def check_writable(scan: Volume, path: Path) -> None:
    """Whether a mask of a scan can be written in that format, known before the mask is made.

    Raises:
        InputError: BAD_OUTPUT for a DICOM segmentation of a scan that did not come as DICOM images, or whose files lack
            what one refers to.
    """
    if _suffix(Path(path)) == SEGMENTATION:
        check_origin(scan)


def write_mask(mask: Volume, path: Path, algorithm: Algorithm) -> list[Path]:
    """Writes a mask; no file is ever seen half-written.

    Args:
        mask: uint8 labels on the grid of their scan, made by `scan.with_voxels` or `scan.from_canonical`.
        path: as for `write_volume`, or .dcm for a DICOM segmentation of a scan that came as DICOM.
        algorithm: what made it, for a DICOM segmentation to say.

    Returns:
        As `write_volume` does.

    Raises:
        InputError: BAD_OUTPUT as `check_writable` says, and what `write_volume` raises.
    """
    path = Path(path)
    if _suffix(path) != SEGMENTATION:
        return write_volume(mask, path)
    with atomic(path) as temporary:
        dicom_seg_write.write(mask, algorithm, temporary)
    return [path]


def stem(path: Path) -> str:
    """The name without a scan's suffix: `liver` for liver.nii.gz; a folder's own name."""
    path = Path(path)
    if path.is_dir():
        return path.resolve().name
    return path.name[: len(path.name) - len(_suffix(path))]


def files_of(path: Path) -> list[Path]:
    """What of a scan or mask lies in which file: itself, and the data file beside it where it is a header alone.

    Raises:
        InputError: as `read_volume`, of a header.
    """
    find = DATA_FILES.get("" if path.is_dir() else _suffix(path))
    data = find(path) if find is not None else None
    return [path] if data is None else [path, data]


def places_of(scans: Iterable[Path]) -> set[Path]:
    """Files and folders that are scans' own, resolved: themselves, and data files beside headers that can be read."""
    found = set()
    for scan in scans:
        files = [scan]
        with contextlib.suppress(InputError, OSError):  # what is wrong with a scan is told when it is read
            files = files_of(scan)
        found |= {file.resolve() for file in files}
    return found


def _read(path: Path | str | Sequence[Path | str], series: str | None, on: Volume | None) -> Volume:
    files = [Path(path)] if isinstance(path, str | Path) else [Path(file) for file in path]
    try:
        volume = _read_one(files[0], series, on) if isinstance(path, str | Path) else dicom.read(files, series, on)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # where a zip is unpacked: no fault of the scan
            raise
        raise InputError(
            "NOT_READABLE", f"Expected a readable scan, received '{error.strerror}' from {files[0]}."
        ) from error
    check_plausible(volume, Path(volume.source))
    check_finite(volume.voxels, Path(volume.source))
    return volume


def _read_one(path: Path, series: str | None, on: Volume | None) -> Volume:
    if not path.exists():
        raise InputError("NOT_FOUND", f"Expected a scan, received a path where nothing is: {path}.")
    if not path.is_file() and not path.is_dir():  # reading a pipe or a device may never end
        raise InputError("NOT_READABLE", f"Expected a file or a folder, received a device or a pipe: {path}.")
    suffix = "" if path.is_dir() else _suffix(path)
    reader = FORMATS[suffix][0] if suffix else dicom.read
    if reader is dicom.read:
        if suffix or path.is_dir() or is_dicom(path):
            return dicom.read(path, series, on)
        raise InputError(
            "UNSUPPORTED_FORMAT",
            f"Expected a folder of DICOM files, a DICOM file or a name that ends in {', '.join(FORMATS)}, received"
            f" {path}.",
        )
    if series is not None:
        raise InputError(
            "UNKNOWN_SERIES", f"Expected DICOM files to choose series={series[:80]!r} from, received {path}."
        )
    return reader(path)


def _suffix(path: Path) -> str:
    """The one of FORMATS that the name ends in, as long as the name has it (whatever its case), or empty."""
    name = path.name.lower()
    return next((suffix for suffix in FORMATS if name.endswith(suffix) and name != suffix), "")
