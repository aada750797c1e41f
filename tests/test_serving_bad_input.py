"""What a server is sent by mistake or by an enemy: each gets its code, and costs no memory, no disk and no worker."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import re
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import zmq
import zstandard
from bad_files import DIM, bad_scans, volume
from pydicom.uid import DeflatedExplicitVRLittleEndian, MediaStorageDirectoryStorage
from serving_fixtures import CRASHING, LIMIT_S, Server, children, running, until
from test_dicom import FAULTS, save, slice_of
from test_serving import Raw, expect_right_mask, expect_serving, scan_file, submit_of
from test_serving_operation import figure

from lvseg.formats import write_volume
from serving import protocol
from serving.connection import Client, ClientError
from serving.jobs import STEPS
from serving.keys import read_credentials

MIB = 1024**2
UPLOAD_BYTES, CONTENT_BYTES, MEMBERS = 3 * MIB, 4 * MIB, 20
BOMB_BYTES = 512 * MIB
GROWTH_BYTES = 128 * MIB  # what a scan within the limits may need; a bomb needs more
ANSWER = ""  # the code of what is no fault: the right mask comes back


@dataclass(frozen=True)
class Sent:
    """What a hostile client sends: bytes, and what it says of them where that is not the truth."""

    content: bytes
    says: Mapping[str, Any] = field(default_factory=dict)
    truth: Path | None = None  # a scan that has the same voxels, where an answer is due


Make = Callable[[Path], Path | Sent | Callable[[Raw], str]]
ROWS: dict[str, tuple[str, Make]] = {}


def row(what: str, code: str) -> Callable[[Make], Make]:
    """Enters a maker of bad input under its name and code."""

    def enter(make: Make) -> Make:
        ROWS[what] = (code, make)
        return make

    return enter


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = {"spool_free_bytes": 0, "upload_bytes": UPLOAD_BYTES, "content_bytes": CONTENT_BYTES, "members": MEMBERS}
    with running(tmp_path_factory.mktemp("server"), limits=limits) as one:
        yield one


def peaks(server: Server) -> dict[int, int]:
    """The most memory that each process of the server ever held, in bytes."""
    found = {}
    for pid in [server.process.pid, *children(server.process.pid)]:
        status = Path(f"/proc/{pid}/status").read_text()
        found[pid] = 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0])
    return found


def forget_peaks(server: Server) -> None:
    """Lets the peaks begin anew, where the kernel does that, so that a bomb does not count for the next row, too."""
    for pid in peaks(server):
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


@pytest.fixture(scope="module")
def usual(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[int, int]:
    """The peaks of the processes after scans of usual kinds."""
    folder = tmp_path_factory.mktemp("usual")
    expect_serving(server, folder)
    with server.connect() as client:
        for scan in (save(folder / "series", map(slice_of, range(3))), write_volume(volume(), folder / "a.vti")[0]):
            client.segment(scan, "bright", folder / "mask.vtk", LIMIT_S)
    return peaks(server)


def answer_of(server: Server, sent: Path | Sent | Callable[[Raw], str], folder: Path) -> str:
    """What becomes of an input: the code of its error, or ANSWER once the mask was found to be right."""
    mask = folder / "mask.nii.gz"
    if callable(sent):
        with Raw(server.endpoint) as peer:
            return sent(peer)
    if isinstance(sent, Path):
        with server.connect() as client:
            try:
                client.segment(sent, "bright", mask, 3 * LIMIT_S)
            except ClientError as error:
                assert error.exit_code == 2, error
                assert str(server.spool) not in error.sentence
                assert "upload-" not in error.sentence
                return error.code
        expect_right_mask(sent, mask)
        return ANSWER
    with Raw(server.endpoint) as peer:
        frames = protocol.encode(submit_of(sent.content))
        frames[3] = json.dumps({**json.loads(frames[3]), **sent.says}).encode()
        peer.socket.send_multipart(frames)
        accepted = peer.take_until(protocol.Accepted, protocol.Error)
        if isinstance(accepted, protocol.Error):
            return accepted.code
        job = accepted.job
        for offset in range(0, len(sent.content), MIB // 4):
            chunk = protocol.Chunk(job, offset, sent.content[offset : offset + MIB // 4])
            peer.socket.send_multipart(protocol.encode(chunk))
        end = peer.take_until(protocol.Done, protocol.Error)
        if isinstance(end, protocol.Done):
            fetch = protocol.Fetch(job, "mask.nii.gz", 0, end.files[0].bytes)
            mask.write_bytes(peer.ask(fetch).payload)
            assert sent.truth is not None, "an answer, where an error was due"
            expect_right_mask(sent.truth, mask)
        assert peer.ask(protocol.Close(job)) == protocol.Closed(job)
        return ANSWER if isinstance(end, protocol.Done) else end.code


def expect_unharmed(server: Server, usual: Mapping[int, int], folder: Path) -> None:
    """Nothing is left in the spool, no process was lost or grew, and the next scan has its mask."""
    until(lambda: server.spooled() == [], "the spool is empty")
    expect_serving(server, folder)
    now = peaks(server)
    assert now.keys() == usual.keys(), "a process was lost"
    growth = {pid: now[pid] - usual[pid] for pid in now if now[pid] - usual[pid] > GROWTH_BYTES}
    assert growth == {}
    assert server.spooled() == []


# ---- files: whatever a client sends of its own accord


def good_nifti(shape: tuple[int, int, int] = (6, 20, 24)) -> bytes:
    """An int16 scan of noise as a .nii."""
    return bytes(nibabel.Nifti1Image(volume(shape).voxels.T, np.diag([-2.0, -1.5, 3.0, 1.0])).to_bytes())


def with_sizes(nifti: bytes, *sizes: int) -> bytes:
    """A .nii whose header says other sizes."""
    header = bytearray(nifti)
    struct.pack_into("<8h", header, DIM, len(sizes), *sizes, *[1] * (7 - len(sizes)))
    return bytes(header)


@functools.cache
def deflated(start: bytes, zeros: int, wbits: int) -> bytes:
    """`start` and then so many zeros, packed without ever holding them; the sum at the end is that of `start` alone."""
    packer, same = zlib.compressobj(9, zlib.DEFLATED, wbits), zlib.compressobj(9, zlib.DEFLATED, BARE)
    first = packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH)
    # After a full flush nothing refers to what was before, so the same piece may follow again and again.
    piece = same.compress(bytes(MIB)) + same.flush(zlib.Z_FULL_FLUSH)
    return first + piece * (zeros // MIB) + packer.flush()


GZIP, ZLIB, BARE = 31, 15, -15
TLS_HELLO = b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + bytes(192)


def patched(nifti: bytes, offset: int, form: str, *values: float) -> bytes:
    header = bytearray(nifti)
    struct.pack_into(form, header, offset, *values)
    return bytes(header)


def swapped_sizes(nifti: bytes) -> bytes:
    return nifti[:DIM] + np.frombuffer(nifti[DIM : DIM + 16], "<i2").astype(">i2").tobytes() + nifti[DIM + 16 :]


def nifti2(*sizes: int) -> bytes:
    header = bytearray(nibabel.Nifti2Image(np.zeros((2, 2, 2), np.int16), np.eye(4)).to_bytes())
    struct.pack_into("<4q", header, 16, len(sizes), *sizes)
    return bytes(header)


def infinite() -> bytes:
    return nibabel.Nifti1Image(np.full((4, 5, 6), np.inf, np.float32), np.eye(4)).to_bytes()


def detached() -> bytes:
    return mha_header("/etc/passwd", 0, "4 4 4")


def mha_bomb() -> bytes:
    packed = deflated(b"", BOMB_BYTES, ZLIB)
    return mha_header("LOCAL", len(packed), "1024 1024 256") + packed


def mha_header(data: str, packed_bytes: int, sizes: str) -> bytes:
    return (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        f"CompressedData = {bool(packed_bytes)}\n"
        f"CompressedDataSize = {packed_bytes}\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\n"
        f"ElementSpacing = 1 1 1\nDimSize = {sizes}\nElementType = MET_SHORT\nElementDataFile = {data}\n"
    ).encode()


def vti_bomb() -> bytes:
    packed = deflated(b"", BOMB_BYTES, ZLIB)
    sizes = struct.pack("<4Q", 1, BOMB_BYTES, 0, len(packed))
    header = (
        '<VTKFile type="ImageData" version="1.0" byte_order="LittleEndian" header_type="UInt64"'
        ' compressor="vtkZLibDataCompressor"><ImageData WholeExtent="0 1023 0 1023 0 255" Origin="0 0 0"'
        ' Spacing="1 1 1"><Piece Extent="0 1023 0 1023 0 255"><PointData Scalars="a"><DataArray type="Int16" Name="a"'
        ' format="appended" offset="0"/></PointData></Piece></ImageData><AppendedData encoding="raw">_'
    )
    return header.encode() + sizes + packed + b"</AppendedData></VTKFile>"


def laughing_vti() -> bytes:
    entities = [f'<!ENTITY e{n} "{f"&e{n - 1};" * 10 if n else "ha"}">' for n in range(10)]
    return f"<!DOCTYPE a [{''.join(entities)}]><VTKFile>&e9;</VTKFile>".encode()


def file_row(what: str, code: str, name: str, content: Callable[[], bytes]) -> None:
    """A row of one file."""

    @row(what, code)
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content())
        return folder / name


def in_series(what: str, code: str, change: Callable[[list[pydicom.Dataset]], None]) -> None:
    """A row of a folder of DICOM files with a fault."""

    @row(what, code)
    def make(folder: Path) -> Path:
        datasets = [slice_of(index) for index in range(5)]
        change(datasets)
        return save(folder / "study", datasets)


for fault, (break_it, expected_code, _) in FAULTS.items():
    in_series(f"series: {fault}", expected_code, break_it)

NIFTI_BOMB = (256, 1024, 1024)  # int16: BOMB_BYTES
file_row(
    "gzip longer than its header", "DECOMPRESS_LIMIT", "a.nii.gz", lambda: deflated(good_nifti(), BOMB_BYTES, GZIP)
)
file_row(
    "gzip bomb with an honest header", "DIMS_LIMIT", "a.nii.gz",
    lambda: deflated(with_sizes(good_nifti(), *NIFTI_BOMB)[:352], BOMB_BYTES, GZIP),
)  # fmt: skip
file_row(
    "gzip of many members", "DECOMPRESS_LIMIT", "a.nii.gz",
    lambda: gzip.compress(good_nifti()) + deflated(b"", 64 * MIB, GZIP) * 8,
)  # fmt: skip
file_row("gzip cut short", "INPUT_TRUNCATED", "a.nii.gz", lambda: gzip.compress(good_nifti())[:-20])
file_row("gzip with a wrong sum", "INPUT_TRUNCATED", "a.nii.gz", lambda: gzip.compress(good_nifti())[:-8] + bytes(8))
file_row("gzip in gzip", "UNSUPPORTED_FORMAT", "a.nii.gz", lambda: gzip.compress(gzip.compress(good_nifti())))
file_row("sizes in the other byte order", "DIMS_LIMIT", "a.nii", lambda: swapped_sizes(good_nifti()))
file_row("sizes beyond the file", "INPUT_TRUNCATED", "a.nii", lambda: with_sizes(good_nifti(), 100, 100, 100))
file_row("sizes whose product overflows", "DIMS_LIMIT", "a.nii", lambda: with_sizes(good_nifti(), *[32767] * 7))
file_row("sizes of 64 bits that overflow", "DIMS_LIMIT", "a.nii", lambda: nifti2(2**62, 2**62, 4))
file_row("no slices", "EMPTY_IMAGE", "a.nii", lambda: with_sizes(good_nifti(), 24, 20, 0))
file_row("infinite voxels", "NONFINITE_VOXELS", "a.nii", infinite)
file_row("infinite scale", "UNSUPPORTED_PIXEL_TYPE", "a.nii", lambda: patched(good_nifti(), 112, "<2f", 1.0, np.inf))
file_row("infinite directions", "BAD_GEOMETRY", "a.nii", lambda: patched(good_nifti(), 280, "<f", np.inf))
file_row(
    "a .nrrd bomb", "DIMS_LIMIT", "a.nrrd",
    lambda: b"NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 1024 1024 256\n"
    b"space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\nendian: little\nencoding: gzip\n\n"
    + deflated(b"", BOMB_BYTES, GZIP),
)  # fmt: skip
file_row("an .mha bomb", "DIMS_LIMIT", "a.mha", mha_bomb)
file_row("a .vti bomb", "DIMS_LIMIT", "a.vti", vti_bomb)
file_row("a .vti of a billion laughs", "UNSUPPORTED_FORMAT", "a.vti", laughing_vti)
file_row("a .vti of deep elements", "UNSUPPORTED_FORMAT", "a.vti", lambda: b"<VTKFile>" + b"<a>" * 300_000)


@row("one DICOM file with a deflated bomb", "DECOMPRESS_LIMIT")
def deflated_dicom(folder: Path) -> Path:
    dataset = slice_of(0)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.Rows, dataset.Columns = 16384, 16384
    dataset.PixelData = b""
    dataset.save_as(folder / "a.dcm", enforce_file_format=True)
    whole = (folder / "a.dcm").read_bytes()
    meta_bytes = 144 + int.from_bytes(whole[140:144], "little")  # what the first element of all says of its group
    inside = zlib.decompress(whole[meta_bytes:], BARE)
    assert inside[-12:] == b"\xe0\x7f\x10\0OW\0\0" + bytes(4)
    inside = inside[:-4] + struct.pack("<I", BOMB_BYTES)
    (folder / "a.dcm").write_bytes(whole[:meta_bytes] + deflated(inside, BOMB_BYTES, BARE))
    return folder / "a.dcm"


@row("a DICOMDIR alone, with paths that lead elsewhere", "NOT_FOUND")
def dicomdir(folder: Path) -> Path:
    dataset = slice_of(0)
    del dataset.PixelData
    record = pydicom.Dataset()
    with pydicom.config.disable_value_validation():
        record.DirectoryRecordType, record.ReferencedFileID = "IMAGE", ["..", "..", "etc", "passwd"]
    dataset.DirectoryRecordSequence = [record]
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = MediaStorageDirectoryStorage
    return save(folder / "study", [dataset])


@row("a series of more files than allowed", "TOO_LARGE")
def many_files(folder: Path) -> Path:
    return save(folder / "study", [slice_of(index) for index in range(MEMBERS + 1)])


@row("a DICOM file cut short", "INPUT_TRUNCATED")
def cut_series(folder: Path) -> Path:
    study = save(folder / "study", map(slice_of, range(3)))
    slice_file = study / "IM0001"
    slice_file.write_bytes(slice_file.read_bytes()[:-100])
    return study


# ---- zips: what a user, or an enemy, packs


def zipped(members: Mapping[str, bytes], method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def slices(count: int = 3) -> dict[str, bytes]:
    """The files of a good series, by names of one length."""
    files = {}
    for index in range(count):
        buffer = io.BytesIO()
        slice_of(index).save_as(buffer, enforce_file_format=True)
        files[f"{index}.dcm"] = buffer.getvalue()
    return files


def bomb_zip(members: int = 1, says: int = BOMB_BYTES) -> bytes:
    """Members that each unpack to BOMB_BYTES, whatever the archive says of that."""
    packed = deflated(b"", BOMB_BYTES, BARE)
    local, central = b"", b""
    for number in range(members):
        name = b"%d.dcm" % number
        fields = struct.pack("<HHHHIIIHH", 0, 8, 0, 33, 0, len(packed), says, len(name), 0)
        central += b"PK\x01\x02" + struct.pack("<HH", 20, 20) + fields
        central += struct.pack("<HHHII", 0, 0, 0, 0, len(local)) + name
        local += b"PK\x03\x04" + struct.pack("<H", 20) + fields + name + packed
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, members, members, len(central), len(local), 0)
    return local + central + end


def overlapped() -> bytes:
    """Many members in the directory, all of them the same bytes of the file."""
    one = bomb_zip()
    at = one.index(b"PK\x01\x02")
    local, entry = one[:at], one[at : one.index(b"PK\x05\x06")]
    central = b"".join(entry.replace(b"0.dcm", b"%d.dcm" % number) for number in range(9))
    return local + central + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 9, 9, len(central), len(local), 0)


def directory_says(content: bytes, offset: int, form: str, *values: int) -> bytes:
    """An archive whose first entry in its directory says something else."""
    return patched(content, content.index(b"PK\x01\x02") + offset, form, *values)


def saying(offset: int, form: str, *values: int) -> Callable[[int], bytes]:
    """A good series, but for that."""
    return lambda how: directory_says(zipped(slices(), how), offset, form, *values)


def linked(how: int) -> bytes:
    """A good series in which one member is a link to a file of the server's."""
    members = slices()
    buffer = io.BytesIO(zipped(members, how))
    with zipfile.ZipFile(buffer, "a") as archive:
        link = zipfile.ZipInfo("3.dcm")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    return buffer.getvalue()


# Of each the code and the archive, made with a method of packing.
ZIPS: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "bomb": ("ARCHIVE_LIMIT", lambda _: bomb_zip()),
    "bomb that says it is small": ("ARCHIVE_LIMIT|INPUT_CORRUPT", lambda _: bomb_zip(says=1000)),
    "bomb of overlapping members": ("ARCHIVE_LIMIT|INPUT_CORRUPT", lambda _: overlapped()),
    "bomb of sums of members": ("ARCHIVE_LIMIT", lambda _: zipped(dict.fromkeys(map(str, range(9)), bytes(MIB)), 8)),
    "zip in a zip": ("NOT_FOUND", lambda how: zipped({"inner.zip": zipped(slices(), 8)}, how)),
    "bomb in a zip in a zip": ("NOT_FOUND", lambda how: zipped({"inner.zip": bomb_zip()}, how)),
    "many members": ("ARCHIVE_LIMIT", lambda how: zipped({f"{n}.dcm": b"a" for n in range(MEMBERS + 1)}, how)),
    "no members": ("EMPTY_IMAGE", lambda how: zipped({}, how)),
    "folders alone": ("EMPTY_IMAGE", lambda how: zipped({"study/": b"", "study/series/": b""}, how)),
    "encrypted": ("ARCHIVE_UNSUPPORTED", saying(8, "<H", 1)),
    "bzip2": ("ARCHIVE_UNSUPPORTED", lambda _: zipped(slices(), zipfile.ZIP_BZIP2)),
    "lzma": ("ARCHIVE_UNSUPPORTED", lambda _: zipped(slices(), zipfile.ZIP_LZMA)),
    "unknown method": ("ARCHIVE_UNSUPPORTED", saying(10, "<H", 99)),
    "size too large": ("INPUT_CORRUPT", saying(24, "<I", 2**31)),
    "size too small": ("INPUT_CORRUPT", saying(24, "<I", 10)),
    "packed size beyond the file": (f"{ANSWER}|INPUT_CORRUPT", saying(20, "<I", 2**31)),
    "member beyond the file": ("INPUT_CORRUPT", saying(42, "<I", 2**31)),
    "wrong sum": ("INPUT_CORRUPT", saying(16, "<I", 1)),
    "cut short": ("INPUT_CORRUPT", lambda how: zipped(slices(), how)[:-30]),
    "no zip": ("INPUT_CORRUPT", lambda _: b"no zip at all" * 50),
    "link to a file of the server": ("ARCHIVE_UNSUPPORTED", linked),
    "a slice that is text": ("UNSUPPORTED_FORMAT", lambda how: zipped({**slices(), "3.dcm": b"no slice " * 50}, how)),
}  # fmt: skip
# What archives may call their members; the second pair of names is put in place of the first, at the same length.
NAMES: dict[str, tuple[str, bytes, bytes]] = {
    "names that lead out": ("../../../../out-{}.dcm", b"", b""),
    "names from the root on": ("/tmp/out-{}.dcm", b"", b""),
    "names of a drive": ("C:\\windows\\out-{}.dcm", b"", b""),
    "names that are all one": ("one{}.dcm", b"one1", b"one0"),
    "names that differ in case": ("im{}.dcm", b"im1", b"IM0"),
    "names that are no text": ("ab{}.dcm", b"ab", b"\xff\xfe"),
    "names with a null byte": ("a+{}.dcm", b"a+", b"a\0"),
    "long names": ("a" * 4096 + "{}.dcm", b"", b""),
    "names of devices": ("/dev/null/{}", b"", b""),
    "names with control characters": ("a\n\r\x1b[2J{}.dcm", b"", b""),
}


def named(name: str, old: bytes, new: bytes, how: int) -> bytes:
    """A good series under other names."""
    content = zipped({name.format(number): file for number, file in enumerate(slices().values())}, how)
    return content.replace(old, new) if old else content


def zip_rows(what: str, code: str, content: Callable[[int], bytes]) -> None:
    """Two rows: an archive as a user's file, and as a hostile client's series."""

    @row(f"zip file: {what}", code)
    def as_file(folder: Path) -> Path:
        (folder / "study.zip").write_bytes(content(zipfile.ZIP_DEFLATED))
        return folder / "study.zip"

    @row(f"zipped series: {what}", code)
    def as_series(folder: Path) -> Sent:
        truth = save(folder / "truth", map(slice_of, range(3)))
        whole = content(zipfile.ZIP_STORED)
        says = {"name": "study", "kind": "series", "codec": "zstd", "content_bytes": len(whole)}
        return Sent(zstandard.compress(whole), says, truth)


@row("zipped series: a good one, deflated", ANSWER)
def deflated_series(folder: Path) -> Sent:
    truth = save(folder / "truth", map(slice_of, range(3)))
    whole = zipped(slices(), zipfile.ZIP_DEFLATED)
    assert len(whole) < sum(map(len, slices().values()))
    return Sent(whole, {"name": "study", "kind": "series"}, truth)


for zip_fault, (zip_code, zip_content) in ZIPS.items():
    zip_rows(zip_fault, zip_code, zip_content)
for name_fault, words in NAMES.items():
    zip_rows(name_fault, ANSWER, functools.partial(named, *words))


# ---- what no client of ours sends: false announcements, broken streams and frames


def raw_row(what: str, code: str, content: Callable[[], bytes], **says: Any) -> None:
    """A row of bytes with an announcement."""

    @row(what, code)
    def make(folder: Path) -> Sent:
        return Sent(content(), says)


def window(log: int) -> bytes:
    """A zstd stream that asks for so much memory to be unpacked."""
    how = zstandard.ZstdCompressionParameters(window_log=log, write_content_size=False)
    return zstandard.ZstdCompressor(compression_params=how).compressobj().compress(random_bytes(MIB))


def random_bytes(count: int) -> bytes:
    return np.random.default_rng(0).bytes(count)


def zstd_bomb() -> bytes:
    one = zstandard.compress(bytes(8 * MIB), 1)
    return one * (BOMB_BYTES // (8 * MIB))


def with_content_size(count: int) -> bytes:
    """A zstd frame of a good scan whose header says that it unpacks to so much."""
    stream = zstandard.ZstdCompressor(write_content_size=False).compress(good_nifti())
    assert stream[4] >> 6 == 0 and not stream[4] & 0x20  # no content size yet, and a window instead
    return stream[:4] + bytes([stream[4] | 0xC0]) + stream[5:6] + struct.pack("<Q", count) + stream[6:]


ZSTD = {"codec": "zstd", "name": "a.nii"}
raw_row("zstd bomb", "DECOMPRESS_LIMIT", zstd_bomb, **ZSTD, content_bytes=CONTENT_BYTES)
raw_row("zstd bomb, announced", "TOO_LARGE", zstd_bomb, **ZSTD, content_bytes=BOMB_BYTES)
raw_row("zstd of a long window", "DECOMPRESS_LIMIT", lambda: window(27), **ZSTD, content_bytes=MIB)
raw_row("zstd that says a terabyte", "INPUT_CORRUPT", lambda: with_content_size(2**40), **ZSTD, content_bytes=MIB)
raw_row("zstd that says a byte", "INPUT_CORRUPT", lambda: with_content_size(1), **ZSTD, content_bytes=MIB)
raw_row("zstd cut short", "INPUT_TRUNCATED", lambda: zstandard.compress(bytes(5000))[:-8], **ZSTD, content_bytes=5000)
raw_row(
    "zstd with less than announced", "INPUT_TRUNCATED", lambda: zstandard.compress(bytes(9)), **ZSTD, content_bytes=10
)
raw_row(
    "zstd with more than announced", "DECOMPRESS_LIMIT", lambda: zstandard.compress(bytes(9)), **ZSTD, content_bytes=8
)
raw_row("zstd and more", "INPUT_CORRUPT", lambda: zstandard.compress(bytes(9)) + b"more", **ZSTD, content_bytes=9)
raw_row("no zstd", "INPUT_CORRUPT", lambda: b"no zstd at all" * 9, **ZSTD, content_bytes=5000)
raw_row(
    "a longer upload than allowed", "TOO_LARGE", lambda: b"a", bytes=UPLOAD_BYTES + 1, content_bytes=UPLOAD_BYTES + 1
)
raw_row("a size of 64 bits", "BAD_FRAME", lambda: b"a", bytes=2**63, content_bytes=2**63)
raw_row("an upload unlike its digest", "DIGEST_MISMATCH", lambda: b"12345", sha256="0" * 64)
raw_row("raw bytes that are to unpack to others", "BAD_FRAME", lambda: b"12345", content_bytes=6)
raw_row("a name that leads out", "BAD_FRAME", lambda: b"12345", name="../../a.nii")
raw_row("a model that leads out", "BAD_FRAME", lambda: b"12345", model="../bright")
raw_row("a model that is not served", "MODEL_UNKNOWN", lambda: b"12345", model="kidney")
raw_row("an unknown suffix", "UNSUPPORTED_FORMAT", lambda: b"12345", name="a.exe")
raw_row("a header whose data lie elsewhere", "UNSUPPORTED_FORMAT", detached, name="a.mha")


def frames_row(what: str, code: str, frames: Callable[[], list[bytes]]) -> None:
    """A row of frames, to be answered by one error."""

    def talk(peer: Raw) -> str:
        peer.socket.send_multipart(frames())
        return str(peer.take().code)

    ROWS[what] = (code, lambda folder: talk)


def with_header(text: bytes) -> list[bytes]:
    return [*protocol.encode(protocol.Hello(1, 1, "test"))[:3], text]


HELLO = b'{"proto_min": 1, "proto_max": 1, "client": "test"}'
frames_row("frames: a long header", "BAD_FRAME", lambda: with_header(HELLO + b" " * protocol.HEADER_BYTES_MAX))
frames_row("frames: deep nesting", "BAD_FRAME", lambda: with_header(b'{"a":' * 3000))
frames_row("frames: a long number", "BAD_FRAME", lambda: with_header(HELLO.replace(b"1", b"1" * 6000)))
frames_row("frames: no number", "BAD_FRAME", lambda: with_header(HELLO.replace(b"1", b"NaN")))
frames_row("frames: a key twice", "BAD_FRAME", lambda: with_header(HELLO.replace(b"proto_max", b"proto_min")))
frames_row("frames: no text", "BAD_FRAME", lambda: with_header(b"\xff\xfe" + HELLO))
frames_row("frames: a pickle", "BAD_FRAME", lambda: with_header(b"\x80\x04K\x01."))
frames_row("frames: none but one", "BAD_FRAME", lambda: [b""])
frames_row("frames: a thousand", "BAD_FRAME", lambda: [b"LVS1"] * 1000)
frames_row("frames: a payload where none is due", "BAD_FRAME", lambda: [*with_header(HELLO), bytes(MIB)])
frames_row("frames: another version", "PROTO_UNSUPPORTED", lambda: [b"LVS0", *with_header(HELLO)[1:]])
frames_row("frames: a client of later versions", "PROTO_UNSUPPORTED", lambda: with_header(HELLO.replace(b"1", b"9")))
frames_row(
    "frames: a chunk that is too long", "BAD_FRAME",
    lambda: [*protocol.encode(protocol.Chunk(b"k" * 32, 0, b"a"))[:4], bytes(protocol.PAYLOAD_BYTES_MAX + 1)],
)  # fmt: skip


def chunk_row(what: str, code: str, offset: int, count: int) -> None:
    """A row of a chunk that does not fit an upload of 1000 bytes, of which 500 came."""

    def talk(peer: Raw) -> str:
        job = peer.ask(submit_of(bytes(1000))).job
        peer.socket.send_multipart(protocol.encode(protocol.Chunk(job, 0, bytes(500))))
        received = str(peer.ask(protocol.Chunk(job, offset, bytes(count))).code)
        assert peer.ask(protocol.Status(job)).offset == 500
        assert peer.ask(protocol.Close(job)) == protocol.Closed(job)
        return received

    ROWS[what] = (code, lambda folder: talk)


chunk_row("a chunk after a gap", "BAD_OFFSET", 600, 100)
chunk_row("a chunk that overlaps", "BAD_OFFSET", 400, 100)
chunk_row("a chunk beyond the end", "OVER_CREDIT", 500, 501)


# ---- the tests


@pytest.mark.parametrize("what", ROWS)
def test_a_bad_input_has_its_code_and_costs_nothing(
    server: Server, usual: dict[int, int], tmp_path: Path, what: str
) -> None:
    code, make = ROWS[what]
    sent = make(tmp_path)
    forget_peaks(server)
    received = answer_of(server, sent, tmp_path)
    assert received in code.split("|")
    expect_unharmed(server, usual, tmp_path)


def test_every_reader_s_code_comes_with_the_client_s_own_name(
    server: Server, usual: dict[int, int], tmp_path: Path
) -> None:
    with server.connect() as client:
        for kind, (path, code) in bad_scans(tmp_path).items():
            with pytest.raises(ClientError) as refused:
                client.segment(path, "bright", tmp_path / "out.vtk", LIMIT_S)
            sentence = refused.value.sentence
            assert (refused.value.code, refused.value.exit_code) == (code, 2), (kind, sentence)
            assert path.name in sentence
            assert sentence.endswith(".")
            assert "upload-" not in sentence
            assert str(server.spool) not in sentence
    assert not (tmp_path / "out.vtk").exists()
    expect_unharmed(server, usual, tmp_path)


def test_who_does_not_speak_zeromq_is_cut_off_and_counted(tmp_path: Path) -> None:
    greetings = (b"GET / HTTP/1.1\r\n\r\n", TLS_HELLO, random_bytes(4096), b"\xff" + bytes(8) + b"\x7f", b"", bytes(9))
    with running(tmp_path, secure=True, http="127.0.0.1:0", limits={"spool_free_bytes": 0}) as server:
        host, port = server.endpoint.removeprefix("tcp://").split(":")
        before = peaks(server)
        with contextlib.ExitStack() as stack:
            peers = [stack.enter_context(socket.create_connection((host, int(port)), LIMIT_S)) for _ in greetings]
            for peer, greeting in zip(peers, greetings, strict=True):
                peer.sendall(greeting)
            for peer in peers:
                with contextlib.suppress(ConnectionResetError):
                    while peer.recv(4096):
                        pass
        until(lambda: figure(server, "lvseg_handshakes_failed_total") >= 1, "they are counted")
        assert peaks(server)[server.process.pid] - before[server.process.pid] < GROWTH_BYTES
        with Client(server.endpoint, read_credentials(tmp_path / "access" / "local.json")) as client:
            scan = scan_file(tmp_path)
            client.segment(scan, "bright", tmp_path / "mask.nii.gz", LIMIT_S)
        expect_right_mask(scan, tmp_path / "mask.nii.gz")


def test_a_frame_beyond_the_limit_costs_its_sender_the_connection(
    server: Server, usual: dict[int, int], tmp_path: Path
) -> None:
    with Raw(server.endpoint) as peer:
        assert isinstance(peer.ask(protocol.Ping()), protocol.Pong)
        with contextlib.closing(peer.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)) as monitor:
            peer.socket.send_multipart([*protocol.encode(protocol.Ping()), bytes(64 * MIB)])
            assert monitor.poll(int(1000 * LIMIT_S)), "still connected"
            peer.socket.disable_monitor()
    expect_unharmed(server, usual, tmp_path)


def test_a_parser_that_crashes_costs_its_process_and_nobody_else_anything(server: Server, tmp_path: Path) -> None:
    """The last test here: the process that reads is another one from now on."""
    before = {kind: server.workers(kind) for kind in STEPS}
    (tmp_path / "crash.nii").write_bytes(CRASHING + bytes(1000))
    assert answer_of(server, tmp_path / "crash.nii", tmp_path) == "POISON_INPUT"
    expect_serving(server, tmp_path)
    after = {kind: server.workers(kind) for kind in STEPS}
    assert (after["segment"], after["pack"]) == (before["segment"], before["pack"])
    assert after["unpack"] != before["unpack"]
    assert server.spooled() == []
    assert server.process.poll() is None
