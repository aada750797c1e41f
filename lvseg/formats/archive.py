"""Zip archives of DICOM files, unpacked within limits that count real bytes, not what the archive says of itself."""

from __future__ import annotations

import re
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

from lvseg.errors import InputError
from lvseg.formats.checks import is_of_machine

PIECE_BYTES = 1024 * 1024
MEMBERS_MAX = 20_000
CONTENT_BYTES_MAX = 4 * 1024**3
# All that is kept of a member's name: files that call themselves DICOM have to be.
SUFFIXES = (".dcm", ".ima")
# For names such as IM0001 or 1.2.840.3: what has one may be a damaged slice. Others get .bin.
NAMELESS = ".000"


def is_nameless(name: str) -> bool:
    """Whether a file's name has no suffix, or a number; what else has such a name as slices have is text."""
    return not name.startswith(".") and not re.search(r"\.[A-Za-z]\w*$", name)


def kept_suffix(name: str) -> str:
    """What is kept of a member's name."""
    suffix = Path(name).suffix.lower()
    if suffix in SUFFIXES:
        return suffix
    return NAMELESS if is_nameless(name) else ".bin"


def unzip(source: Path, folder: Path, content_bytes: int, members: int, name: str) -> dict[str, str]:
    """Unpacks a zip of DICOM files as 000001.dcm, 000002.000, ... in the archive's order.

    Of its names only `kept_suffix` stays on disk, so none can lead anywhere.

    Args:
        source: the zip.
        folder: made here.
        content_bytes: limit for all members together.
        members: limit for their number.
        name: of the scan, for messages.

    Returns:
        For the name of each file the last part of its name in the archive.

    Raises:
        InputError: ARCHIVE_LIMIT, ARCHIVE_UNSUPPORTED, INPUT_CORRUPT, INPUT_TRUNCATED or EMPTY_IMAGE.
    """
    if not source.stat().st_size:
        raise InputError("INPUT_TRUNCATED", f"Expected a zip of DICOM files, received no bytes in {name}.")
    folder.mkdir()
    left = content_bytes
    names: dict[str, str] = {}
    try:
        with zipfile.ZipFile(source) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            if len(entries) > members:
                raise InputError(
                    "ARCHIVE_LIMIT", f"Expected at most {members} files, received {len(entries)} files in {name}."
                )
            if not entries:
                raise InputError("EMPTY_IMAGE", f"Expected DICOM files, received an empty archive in {name}.")
            for number, entry in enumerate(entries, start=1):
                if entry.flag_bits & 0x1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise InputError(
                        "ARCHIVE_UNSUPPORTED",
                        f"Expected members stored or deflated and not encrypted, received another in {name}.",
                    )
                if stat.S_ISLNK(entry.external_attr >> 16):  # to a slice that would not be missed
                    raise InputError(
                        "ARCHIVE_UNSUPPORTED", f"Expected files, received a link in {name}; pack what it leads to."
                    )
                name_in_zip = entry.filename.replace("\\", "/").rpartition("/")[2]
                kept = f"{number:06d}{kept_suffix(name_in_zip)}"
                with archive.open(entry) as member, (folder / kept).open("wb") as file:
                    copied = _copy(member, file, left, name)
                if copied != entry.file_size:
                    raise zipfile.BadZipFile("a member of another size than the directory says")
                left -= copied
                names[kept] = name_in_zip
    except InputError:
        raise
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, NotImplementedError, OSError) as error:
        if is_of_machine(error):
            raise
        raise InputError(
            "INPUT_CORRUPT", f"Expected a sound zip of DICOM files, received one that breaks off in {name}."
        ) from error
    return names


def _copy(member: IO[bytes], file: IO[bytes], limit: int, name: str) -> int:
    copied = 0
    while piece := member.read(PIECE_BYTES):
        copied += len(piece)
        if copied > limit:
            raise InputError("ARCHIVE_LIMIT", f"Expected fewer bytes after unpacking, received too many in {name}.")
        file.write(piece)
    return copied
