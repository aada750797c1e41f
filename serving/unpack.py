"""From the bytes as they were sent to files that readers take, within limits that count real bytes, not headers."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

import zstandard

from lvseg.errors import InputError
from serving import protocol

PIECE_BYTES = 1024 * 1024
WINDOW_BYTES_MAX = 8 * 1024 * 1024  # of zstd: a longer window is memory that a sender would make us take


def decompress(source: Path, destination: Path, content_bytes: int, name: str) -> None:
    """Unpacks one zstd stream, writing no byte more than was announced.

    Args:
        source: the upload.
        destination: file to write.
        content_bytes: the announced size, which the caller has checked against the server's limit.
        name: of the scan, for messages.

    Raises:
        InputError: DECOMPRESS_LIMIT, INPUT_TRUNCATED or INPUT_CORRUPT.
    """
    unpacker = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)
    written = 0
    with source.open("rb") as packed, destination.open("wb") as unpacked:
        try:
            # Across frames: what follows the first frame is then an error or is counted, never dropped.
            with unpacker.stream_reader(packed, read_across_frames=True, closefd=False) as reader:
                while piece := reader.read(PIECE_BYTES):
                    written += len(piece)
                    if written > content_bytes:
                        raise InputError(
                            "DECOMPRESS_LIMIT",
                            f"Expected the announced {content_bytes} bytes after zstd, received more in {name}.",
                        )
                    unpacked.write(piece)
        except zstandard.ZstdError as error:
            code = "DECOMPRESS_LIMIT" if "memory" in str(error) else "INPUT_CORRUPT"
            raise InputError(code, f"Expected a sound zstd stream, received one with '{error}' in {name}.") from error
    if written < content_bytes:
        raise InputError(
            "INPUT_TRUNCATED",
            f"Expected the announced {content_bytes} bytes after zstd, received {written} bytes in {name}.",
        )


def unzip(source: Path, folder: Path, content_bytes: int, members: int, name: str) -> None:
    """Unpacks a zip of DICOM files as 000001.dcm, 000002.bin, ... in the archive's order.

    Of its names only a suffix in protocol.MEMBER_SUFFIXES is kept, so none can lead anywhere.

    Args:
        source: the zip.
        folder: made here.
        content_bytes: limit for all members together.
        members: limit for their number.
        name: of the scan, for messages.

    Raises:
        InputError: ARCHIVE_LIMIT, ARCHIVE_UNSUPPORTED, INPUT_CORRUPT or EMPTY_IMAGE.
    """
    folder.mkdir()
    left = content_bytes
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
                suffix = Path(entry.filename).suffix.lower()
                kept = suffix if suffix in protocol.MEMBER_SUFFIXES else ".bin"
                with archive.open(entry) as member, (folder / f"{number:06d}{kept}").open("wb") as file:
                    left -= _copy(member, file, left, name)
    except InputError:
        raise
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, NotImplementedError) as error:
        raise InputError(
            "INPUT_CORRUPT", f"Expected a sound zip of DICOM files, received one that breaks off in {name}."
        ) from error


def _copy(member: IO[bytes], file: IO[bytes], limit: int, name: str) -> int:
    copied = 0
    while piece := member.read(PIECE_BYTES):
        copied += len(piece)
        if copied > limit:
            raise InputError("ARCHIVE_LIMIT", f"Expected fewer bytes after unpacking, received too many in {name}.")
        file.write(piece)
    return copied


def link(source: Path, destination: Path) -> None:
    """The same file under a second name, so that a second attempt finds the upload as it came."""
    os.link(source, destination)
