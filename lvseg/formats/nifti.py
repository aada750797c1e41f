"""NIfTI-1 and NIfTI-2 in and out, and the one place where nibabel's RAS becomes LPS.

Axes. A NIfTI array is (i, j, k) with i fastest in the file; here it is voxels [k, j, i], taken as [slice, row, column]
in the file's own order and directions, so that a mask leaves with the shape, the affine and the axis order of the scan.
The world of a NIfTI file is RAS; LPS is the same with the signs of x and y flipped, which is exact, so the affine of a
file comes back bit for bit (where the file has an sform; one that has a qform alone comes back rounded to float32).

Where both sform and qform say where the scan lies and do not agree on a corner voxel within a tenth of the smallest
spacing, nobody can know which is true, and the file is refused. Where neither does, likewise.
"""

from __future__ import annotations

import gzip
import itertools
import zlib
from io import BufferedReader
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from lvseg.errors import InputError
from lvseg.formats.checks import DEFLATE_RATIO, storable, truncated, voxel_bytes
from lvseg.volume import SHEAR_TOLERANCE_RAD, Volume

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Of the smallest spacing: less than a mask can show, and well above what rounding in float32 and in writers makes.
FORM_TOLERANCE = 0.1
PIXDIM_TOLERANCE = 0.01  # of the spacing
HEADERS = {348: Nifti1Header, 540: Nifti2Header}
MAGICS = {b"n+1": "NIfTI-1", b"n+2": "NIfTI-2"}
PIXEL_KINDS = "iuf"
NIFTI1_MAXIMUM_SIZE = 32767
MILLIMETRE, UNIT_UNKNOWN = 2, 0
SCANNER = 1


@np.errstate(invalid="ignore", over="ignore")  # a header's numbers may be NaN or huge, which the checks below refuse
def read(path: Path) -> Volume:
    """Reads a NIfTI file, gzipped or not, as its content says.

    Args:
        path: the file.

    Returns:
        voxels [k, j, i]: float32 where the file has a slope or an intercept, else the file's dtype; affine to LPS
        millimetres; metadata `format` ("NIfTI-1" or "NIfTI-2").

    Raises:
        InputError: UNSUPPORTED_FORMAT, INPUT_TRUNCATED, DECOMPRESS_LIMIT, DIMS_LIMIT, EMPTY_IMAGE, NEEDS_VOLUME_INDEX,
            UNSUPPORTED_PIXEL_TYPE, BAD_GEOMETRY or GEOMETRY_AMBIGUOUS.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream = gzip.GzipFile(fileobj=raw) if compressed else raw
        try:
            header = _read_header(stream, path)
            shape = _shape(header, path)
            dtype = _dtype(header, path)
            affine = _affine(header, shape, path)
            stored = _read_voxels(stream, header, shape, dtype, file_bytes, compressed, path)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(
                "INPUT_TRUNCATED", f"Expected a whole gzip file, received one cut short or damaged in {path}."
            ) from error
    voxels = _scaled(stored, header, path)
    magic = bytes(header["magic"].item())[:3]
    return Volume(voxels, affine, source=str(path), metadata={"format": MAGICS[magic]})


def write(volume: Volume, path: Path) -> None:
    """Writes voxels and affine as they are, in the volume's own axis order.

    sform and qform are both written with code 1 (scanner). A qform holds right angles only: where the volume's axes are
    off by so much that both would disagree (module docstring), the qform is left out.

    Args:
        volume: NIfTI-2 if it was read from one or has an axis longer than NIfTI-1 can say, else NIfTI-1.
        path: ends in .nii or .nii.gz.

    Raises:
        InputError: UNSUPPORTED_PIXEL_TYPE for a dtype that NIfTI lacks.
    """
    array = storable(volume.voxels).transpose(2, 1, 0)
    affine = _ijk(volume.affine)
    large = max(array.shape) > NIFTI1_MAXIMUM_SIZE or volume.metadata.get("format") == "NIfTI-2"
    image_class = nibabel.Nifti2Image if large else nibabel.Nifti1Image
    try:
        image = image_class(array, affine, dtype=array.dtype)
    except HeaderDataError as error:
        raise InputError(
            "UNSUPPORTED_PIXEL_TYPE", f"Expected voxels of a type that NIfTI has, received {array.dtype} for {path}."
        ) from error
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=SCANNER)
    image.set_qform(affine, code=SCANNER)
    if not _forms_agree(image.header, array.shape):
        image.set_qform(None, code=0, update_affine=False)
    image.to_filename(path)


def _read_header(stream: BufferedReader | gzip.GzipFile, path: Path) -> Nifti1Header:
    """The header as the file has it; nibabel's own loader repairs bad spacings without saying so."""
    start = stream.read(4)
    if not start:
        raise InputError("INPUT_TRUNCATED", f"Expected a NIfTI file, received an empty one in {path}.")
    sizes = {int.from_bytes(start, "little"): "<", int.from_bytes(start, "big"): ">"}
    header_bytes = next((size for size in sizes if size in HEADERS), None)
    if len(start) < 4 or header_bytes is None:
        raise InputError("UNSUPPORTED_FORMAT", f"Expected a NIfTI header, received {start!r} at the start of {path}.")
    block = start + stream.read(header_bytes - 4)
    if len(block) < header_bytes:
        raise truncated(path, header_bytes, len(block))
    header = HEADERS[header_bytes](block, endianness=sizes[header_bytes], check=False)
    magic = bytes(header["magic"].item())[:3]
    if magic not in MAGICS:
        raise InputError(
            "UNSUPPORTED_FORMAT",
            f"Expected a single-file NIfTI (magic n+1 or n+2), received magic {magic!r} in {path}.",
        )
    return header


def _shape(header: Nifti1Header, path: Path) -> tuple[int, int, int]:
    """Sizes along (i, j, k)."""
    count, *sizes = (int(size) for size in header["dim"])
    if not 1 <= count <= 7:
        raise InputError("DIMS_LIMIT", f"Expected 1 to 7 dimensions, received dim[0]={count} in {path}.")
    sizes = sizes[:count]
    voxel_bytes(sizes, 1, path)
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) != 3:
        raise InputError("NEEDS_VOLUME_INDEX", f"Expected one 3-D volume, received sizes {sizes} in {path}.")
    return sizes[0], sizes[1], sizes[2]


def _dtype(header: Nifti1Header, path: Path) -> np.dtype[Any]:
    """The stored voxels' dtype, in the file's byte order."""
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError):
        code = int(header["datatype"])
        raise InputError(
            "UNSUPPORTED_PIXEL_TYPE", f"Expected a NIfTI datatype, received code {code} in {path}."
        ) from None
    if dtype.kind not in PIXEL_KINDS or dtype.itemsize > 8:
        raise InputError(
            "UNSUPPORTED_PIXEL_TYPE",
            f"Expected one real number per voxel, received {header.get_value_label('datatype')} in {path}.",
        )
    return dtype


def _affine(header: Nifti1Header, shape: tuple[int, int, int], path: Path) -> npt.NDArray[np.float64]:
    """Voxel index (k, j, i) to LPS millimetres, from the sform, else from the qform."""
    spacings = [float(spacing) for spacing in header["pixdim"][1:4]]
    if not all(np.isfinite(spacing) and spacing > 0 for spacing in spacings):
        raise InputError("BAD_GEOMETRY", f"Expected positive spacings (pixdim), received {spacings} in {path}.")
    unit = int(header["xyzt_units"]) & 7
    if unit not in (MILLIMETRE, UNIT_UNKNOWN):
        raise InputError("BAD_GEOMETRY", f"Expected millimetres (xyzt_units 2), received unit code {unit} in {path}.")
    has_sform, has_qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if not has_sform and not has_qform:
        raise InputError(
            "BAD_GEOMETRY",
            f"Expected an sform or a qform that says where the scan lies, received sform_code and qform_code 0 in"
            f" {path}.",
        )
    if has_sform and not np.all(np.isfinite(header.get_sform())):
        raise InputError(
            "BAD_GEOMETRY", f"Expected a finite affine, received sform {header.get_sform().tolist()} in {path}."
        )
    if has_qform:
        if header["pixdim"][0] == 0:
            header["pixdim"][0] = 1  # the standard: "if qfac is 0, it is taken as 1"
        try:
            qform = header.get_qform()
        except (HeaderDataError, ValueError):
            qform = np.full((4, 4), np.nan)
        if not np.all(np.isfinite(qform)):
            names = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
            received = [float(header["pixdim"][0]), *(float(header[name]) for name in names)]
            raise InputError(
                "BAD_GEOMETRY", f"Expected a rotation and an offset, received qfac and qform {received} in {path}."
            )
    if has_sform and has_qform and not _forms_agree(header, shape):
        raise InputError(
            "GEOMETRY_AMBIGUOUS",
            f"Expected an sform and a qform that agree, received two that put corner voxels"
            f" {_corner_distance_mm(header, shape):.2f} mm apart in {path} (set the code of the wrong one to 0).",
        )
    columns = header.get_sform()[:3, :3]
    steps_mm = np.linalg.norm(columns, axis=0)
    across = np.abs(columns.T @ columns / np.outer(steps_mm, steps_mm) - np.eye(3))
    is_sheared = across.max() > SHEAR_TOLERANCE_RAD  # and will be refused as such
    if has_sform and not is_sheared and not np.allclose(steps_mm, spacings, rtol=PIXDIM_TOLERANCE, atol=0):
        raise InputError(
            "GEOMETRY_AMBIGUOUS",
            f"Expected an sform with the spacings that pixdim says, {[round(mm, 4) for mm in spacings]} mm, received"
            f" one of {[round(float(mm), 4) for mm in steps_mm]} mm in {path} (correct the wrong one).",
        )
    return _kji(header.get_sform() if has_sform else header.get_qform())


def _corner_distance_mm(header: Nifti1Header, shape: tuple[int, ...]) -> float:
    """The furthest that sform and qform place a corner voxel apart."""
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, size - 1) for size in shape))])
    apart = corners @ (header.get_sform() - header.get_qform()).T
    return float(np.linalg.norm(apart[:, :3], axis=1).max())


def _forms_agree(header: Nifti1Header, shape: tuple[int, ...]) -> bool:
    smallest_mm = np.linalg.norm(header.get_sform()[:3, :3], axis=0).min()
    return _corner_distance_mm(header, shape) <= FORM_TOLERANCE * float(smallest_mm)


def _kji(ras_of_ijk: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(i, j, k) to RAS becomes (k, j, i) to LPS."""
    return RAS_TO_LPS @ ras_of_ijk.astype(np.float64)[:, [2, 1, 0, 3]]


def _ijk(lps_of_kji: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(k, j, i) to LPS becomes (i, j, k) to RAS."""
    return RAS_TO_LPS @ lps_of_kji[:, [2, 1, 0, 3]]


def _read_voxels(
    stream: BufferedReader | gzip.GzipFile,
    header: Nifti1Header,
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    file_bytes: int,
    compressed: bool,
    path: Path,
) -> npt.NDArray[Any]:
    """Stored values [k, j, i], once the file is known to hold exactly as many as its header says."""
    count = voxel_bytes(shape, dtype.itemsize, path)
    header_bytes = int(header["sizeof_hdr"])
    offset = float(header["vox_offset"]) or float(header_bytes + 4)
    if not header_bytes <= offset <= header_bytes + 2**24:
        raise InputError(
            "UNSUPPORTED_FORMAT", f"Expected voxels right after the header, received vox_offset {offset} in {path}."
        )
    skip = int(offset) - header_bytes
    expected = header_bytes + skip + count
    if expected > file_bytes * (DEFLATE_RATIO if compressed else 1):
        raise truncated(path, expected, file_bytes)
    skipped = len(stream.read(skip))
    data = np.empty(count, np.uint8)
    received = 0
    while skipped == skip and received < count and (more := stream.readinto(data.data[received:])):
        received += more
    if received < count:
        raise truncated(path, expected, header_bytes + skipped + received)
    if stream.read(1):
        raise InputError(
            "DECOMPRESS_LIMIT",
            f"Expected {expected} bytes as the header's sizes say, received more in {path}.",
        )
    i_size, j_size, k_size = shape
    stored = data.view(dtype).reshape(k_size, j_size, i_size)
    return stored.astype(dtype.newbyteorder("="), copy=False)


def _scaled(stored: npt.NDArray[Any], header: Nifti1Header, path: Path) -> npt.NDArray[Any]:
    """The voxels with the file's slope and intercept applied."""
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise InputError(
            "UNSUPPORTED_PIXEL_TYPE", f"Expected a finite intercept, received {header['scl_inter']} in {path}."
        ) from error
    if slope is None or (slope == 1 and intercept == 0):
        return stored
    voxels = np.empty(stored.shape, np.float32)
    for index, one_slice in enumerate(stored):
        # What overflows is infinite, and `read_volume` refuses it.
        voxels[index] = one_slice.astype(np.float64) * slope + intercept
    return voxels
