"""The client's scans: found, checked, and packed as they are sent. Knows nothing of the network."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from serving import protocol
from serving.errors import EXIT_BAD_INPUT, EXIT_ERROR, ClientError

ZSTD_LEVEL = 1  # packs faster than a network of 1 Gbit/s carries
PIECE_BYTES = 1024 * 1024
FOLDERS_DEEP = 8  # as far down as the reader of DICOM looks
# Where in a file which bytes tell what it is.
SIGNATURES = (
    (0, b"\x1f\x8b", ".nii.gz"), (0, b"PK\x03\x04", ".zip"), (128, b"DICM", ".dcm"), (344, b"n+1\0", ".nii"),
    (4, b"n+2\0", ".nii"), (0, b"NRRD", ".nrrd"), (0, b"# vtk DataFile", ".vtk"), (0, b"<?xml", ".vti"),
    (0, b"<VTKFile", ".vti"), (0, b"ObjectType", ".mha"),
)  # fmt: skip
FULL = (errno.ENOSPC, errno.EDQUOT)
SPOOL_BYTES = 64 * 1024 * 1024  # an upload up to this size waits in memory, a larger one in a temporary file


@dataclass(frozen=True)
class Package:
    """A scan as it is sent.

    Args:
        name: base name for messages.
        kind: "file" or "series".
        codec: "raw" or "zstd".
        file: the bytes to send, open at any position.
        bytes: how many.
        content_bytes: how many they unpack to.
        sha256: of the bytes to send.
        members: the local name of each file of a series, in the archive's order; they are not sent.
    """

    name: str
    kind: str
    codec: str
    file: IO[bytes]
    bytes: int
    content_bytes: int
    sha256: str
    members: tuple[str, ...] = ()


def package(scan: Path) -> Package:
    """Makes a scan ready to be sent: a .nii.gz as it is, else zstd; a folder as a stored zip without its files' names.

    Args:
        scan: a file, or a folder of DICOM files.

    Returns:
        With its file open; the caller closes it.

    Raises:
        ClientError: NOT_FOUND, NOT_READABLE or INPUT_TRUNCATED, exit code 2; TEMPORARY_FULL, exit code 1.
    """
    name = name_of(scan)
    with making_room(scan):
        tempfile.gettempdir()  # chosen now, since a full one would look like a scan that is not there
    with reading(scan):
        members = files_of(scan)
        if scan.is_dir():
            names = tuple(str(path.relative_to(scan)) for path in members)
            with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as archive:
                _zip(members, archive)
                archive.seek(0)
                return _packed(name, "series", archive, names)
        with scan.open("rb") as content:
            if is_sent_unchanged(scan):
                return _unchanged(name, content)
            return _packed(name, "file", content)


def check_readable(scan: Path) -> None:
    """Finds out, before a server is asked, whether a scan is there and can be opened.

    Raises:
        ClientError: NOT_FOUND, NOT_READABLE or INPUT_TRUNCATED, exit code 2.
    """
    with reading(scan):
        for path in files_of(scan):
            with path.open("rb") as file:
                if path == scan and not file.read(1):
                    raise ClientError(
                        "INPUT_TRUNCATED", f"Expected a scan, received no bytes in {scan}.", EXIT_BAD_INPUT
                    )


@contextlib.contextmanager
def reading(scan: Path) -> Iterator[None]:
    """Turns what can go wrong with local files into sentences."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ClientError("NOT_FOUND", f"Expected a scan, received no such file: {scan}.", EXIT_BAD_INPUT) from error
    except OSError as error:
        if error.errno in FULL:  # said by what is written while the scan is read
            raise _no_room(scan, error) from error
        raise ClientError(
            "NOT_READABLE", f"Expected a scan that can be read, received '{error.strerror}' for {scan}.", EXIT_BAD_INPUT
        ) from error


@contextlib.contextmanager
def making_room(scan: Path) -> Iterator[None]:
    """Turns what can go wrong with temporary files, which hold a scan as it is sent, into a sentence."""
    try:
        yield
    except OSError as error:
        raise _no_room(scan, error) from error


def _no_room(scan: Path, error: OSError) -> ClientError:
    place = tempfile.tempdir or os.environ.get("TMPDIR", "/tmp")  # None where no folder could be used
    return ClientError(
        "TEMPORARY_FULL",
        f"Expected room for temporary files in {place} to send {scan}, received '{error.strerror}': make room there, or"
        " name another folder with the variable TMPDIR.",
        EXIT_ERROR,
    )


def files_of(scan: Path) -> list[Path]:
    """The files of a scan, each a real one: reading a pipe or a device may never end."""
    if scan.is_dir():
        return _members(scan)
    if not stat.S_ISREG(scan.stat().st_mode):
        raise ClientError(
            "NOT_READABLE", f"Expected a file or a folder, received a device or a pipe: {scan}.", EXIT_BAD_INPUT
        )
    return [scan]


def suffix_by_content(path: Path) -> str:
    """The suffix of what a file holds, told by its first bytes.

    Raises:
        ClientError: NOT_READABLE, exit code 2, for what is none of the known.
    """
    with path.open("rb") as file:
        first = file.read(512)
    for place, signature, suffix in SIGNATURES:
        if first[place : place + len(signature)] == signature:
            return suffix
    raise ClientError(
        "NOT_READABLE", "Expected a scan on standard input, received bytes of no format that is known.", EXIT_BAD_INPUT
    )


def name_of(scan: Path) -> str:
    return protocol.clean_name(scan.name or scan.resolve().name)


def is_sent_unchanged(scan: Path) -> bool:
    """Packing again would gain nothing."""
    return scan.name.lower().endswith(".gz") and not scan.is_dir()


def stem_of(scan: Path) -> str:
    if scan.is_dir():
        return scan.resolve().name
    return scan.name[: len(scan.name) - len(protocol.suffix_of(scan.name))] or scan.name


def _members(scan: Path) -> list[Path]:
    """The files of a folder, which holds what the folders in it hold, as for the reader of DICOM."""
    members = _of_folder(scan, FOLDERS_DEEP)
    if not members:
        raise ClientError("NOT_FOUND", f"Expected DICOM files, received none in the folder {scan}.", EXIT_BAD_INPUT)
    return members


def _of_folder(folder: Path, deep: int) -> list[Path]:
    inside = sorted(folder.iterdir())
    for path in inside:
        if not path.is_file() and not path.is_dir():  # such as a link to a slice that is gone
            raise ClientError(
                "NOT_READABLE", f"Expected files, received a device, a pipe or a broken link: {path}.", EXIT_BAD_INPUT
            )
    folders = [path for path in inside if path.is_dir()]
    for path in folders:  # as for the reader of DICOM: slices of one that is passed over would not be missed
        if path.is_symlink():
            raise ClientError(
                "NOT_READABLE", f"Expected files and folders, received a link to a folder: {path}.", EXIT_BAD_INPUT
            )
        if not deep:
            raise ClientError(
                "NOT_READABLE",
                f"Expected folders at most {FOLDERS_DEEP} deep, received one that is deeper: {path}.",
                EXIT_BAD_INPUT,
            )
    members = [path for path in inside if path.is_file()]
    return members + [path for folder in folders for path in _of_folder(folder, deep - 1)]


def _zip(members: Sequence[Path], content: IO[bytes]) -> None:
    """A stored zip: zstd packs it afterwards. Without the names, which often hold the patient's, or any date."""
    with zipfile.ZipFile(content, "w") as archive:
        for number, member in enumerate(members, start=1):
            name = f"{number:06d}{protocol.member_suffix(member.name)}"
            with member.open("rb") as source, archive.open(zipfile.ZipInfo(name), "w") as entry:
                while piece := source.read(PIECE_BYTES):
                    entry.write(piece)


def _packed(name: str, kind: str, content: IO[bytes], members: tuple[str, ...] = ()) -> Package:
    import zstandard

    packer = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compressobj()
    return _copied(name, kind, "zstd", content, packer.compress, packer.flush, members)


def _unchanged(name: str, content: IO[bytes]) -> Package:
    return _copied(name, "file", "raw", content, lambda piece: piece, lambda: b"", ())


def _copied(
    name: str,
    kind: str,
    codec: str,
    content: IO[bytes],
    pack: Callable[[bytes], bytes],
    flush: Callable[[], bytes],
    members: tuple[str, ...],
) -> Package:
    """Through `pack` into a file of our own, so that what is sent is what was hashed, whoever changes the scan."""
    packed: IO[bytes] = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115 the caller closes it
    digest = hashlib.sha256()
    size = 0
    try:
        while piece := content.read(PIECE_BYTES):
            size += len(piece)
            part = pack(piece)
            digest.update(part)
            packed.write(part)
        part = flush()
        digest.update(part)
        packed.write(part)
        packed.flush()  # what does not fit is told here
    except BaseException:
        with contextlib.suppress(OSError):
            packed.close()
        raise
    return Package(name, kind, codec, packed, packed.tell(), size, digest.hexdigest(), members)
