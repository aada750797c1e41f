"""Two thousand mutated files over all formats: each is refused with a sentence, or read as another reader reads it.

Every file is read in a process of its own whose memory and time are limited, so that a crash, a hang or a large
allocation is seen. What is accepted has to lie where the file it was made from lay or, where the mutation made it
honestly say another place, where an independent reader sees it.
"""

from __future__ import annotations

import gzip
import json
import re
import select
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import pytest
import test_dicom
import test_dicom_seg
import test_metaimage
import test_nrrd
import test_vtk
from bad_files import is_one_sentence_naming, volume
from grids import corners_of, tilted
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless
from vtkmodules.vtkIOXML import vtkXMLImageDataWriter

from lvseg.formats import write_volume
from lvseg.formats.dicom_file import quiet

TESTS = Path(__file__).parent
ANSWER_LIMIT_S = 20
COUNTS = {
    "nii": 130, "nii.gz": 110, "nii 2": 70,
    "nrrd raw": 120, "nrrd gzip": 90, "nrrd text": 60, "nhdr": 70,
    "mha raw": 120, "mha zlib": 90, "mhd": 70,
    "vtk": 110, "vtk text": 70, "vti": 120, "vti text": 70,
    "dicom": 130, "dicom rle": 60, "dicom jpeg 2000": 80, "dicom jpeg-ls": 60, "enhanced": 120,
    "seg": 90, "seg label map": 40, "zip": 70, "png": 50,
}  # fmt: skip
NASTY = (
    "0",
    "-1",
    "1e-30",
    "1e30",
    "nan",
    "inf",
    "-inf",
    "99999999",
    "4294967297",
    "1.5",
    "",
    "0x10",
    "3.0000001",
    "x",
)
NASTY_NUMBERS = (0, -1, 1e-30, 1e30, np.nan, np.inf, 2, 0.5, -3, 1e4, 255, 32767, 1.0000001)


@dataclass(frozen=True)
class Sound:
    """A file or folder that is right, and how to spoil it."""

    name: str
    files: dict[str, bytes]  # by name; the first is the one that is mutated
    spoil: Callable[[bytes, np.random.Generator], bytes]  # knows the format
    image: str = ""  # path of the image that a mask belongs to
    folder: bool = False

    def write(self, folder: Path, content: bytes) -> Path:
        folder.mkdir()
        names = list(self.files)
        for name, whole in self.files.items():
            (folder / name).write_bytes(content if name == names[0] else whole)
        return folder if self.folder else folder / names[0]


# ---- mutations


def bytes_changed(content: bytes, draw: np.random.Generator) -> bytes:
    """Flips, overwrites, cuts, inserts, doubles or removes; half of them near the start, where headers are."""
    if draw.random() < 0.15:
        return content[: draw.integers(len(content))]
    changed = bytearray(content)
    reach = len(changed) if draw.random() < 0.5 else min(len(changed), 700)
    for _ in range(draw.integers(1, 5)):
        place = int(draw.integers(reach))
        kind = draw.integers(6)
        if kind == 0:
            changed[place] ^= 1 << int(draw.integers(8))
        elif kind == 1:
            changed[place] = int(draw.choice([0, 1, 0x20, 0x2D, 0x30, 0x7F, 0x80, 0xFF]))
        elif kind == 2:
            changed[place:place] = draw.bytes(int(draw.integers(1, 9)))
        elif kind == 3:
            del changed[place : place + int(draw.integers(1, 9))]
        elif kind == 4:
            changed[place : place + 4] = draw.bytes(4)
        else:
            changed[place:place] = changed[place : place + int(draw.integers(1, 60))]
        reach = max(1, min(reach, len(changed)))
        if not changed:
            return b""
    return bytes(changed)


def text_header_lies(content: bytes, draw: np.random.Generator) -> bytes:
    """One number, or one line, of the readable header says something else."""
    end = content.find(b"\n\n") if content.startswith(b"NRRD") else content.find(b"LOCAL")
    end = min(len(content), 600) if end < 0 else end
    header, data = content[:end], content[end:]
    if draw.random() < 0.2:
        lines = header.split(b"\n")
        line = int(draw.integers(len(lines)))
        kept = [lines[:line] + lines[line + 1 :], lines[: line + 1] + lines[line:], lines[:line]]
        return b"\n".join(kept[draw.integers(3)]) + data
    numbers = list(re.finditer(rb"(?<![\w.])-?\d+(\.\d+)?(e-?\d+)?(?![\w.])", header))
    one = numbers[draw.integers(len(numbers))]
    value = float(one[0])
    other = [*NASTY, f"{value * 2:g}", f"{-value:g}", f"{value + 1:g}", f"{value - 1:g}", f"{value * 1.01:.9g}"]
    return header[: one.start()] + str(draw.choice(other)).encode() + header[one.end() :] + data


NIFTI1 = {"dim": (40, "8h"), "datatype": (70, "2h"), "pixdim": (76, "8f"), "vox_offset": (108, "3f"),
          "units": (123, "B"), "codes": (252, "2h"), "quaternion": (256, "6f"), "srow": (280, "12f")}  # fmt: skip
NIFTI2 = {"datatype": (12, "2h"), "dim": (16, "8q"), "pixdim": (104, "8d"), "vox_offset": (168, "q"),
          "codes": (344, "2i"), "quaternion": (352, "6d"), "srow": (400, "12d"), "units": (500, "i")}  # fmt: skip


def nifti_lies(content: bytes, draw: np.random.Generator) -> bytes:
    """One number of the header says something else; of a gzipped file inside, so that the checksum is right."""
    packed = content.startswith(b"\x1f\x8b")
    header = bytearray(gzip.decompress(content) if packed else content)
    fields = NIFTI1 if header[0] == 92 else NIFTI2
    offset, form = list(fields.values())[draw.integers(len(fields))]
    values = list(struct.unpack_from(f"<{form}", header, offset))
    index = int(draw.integers(len(values)))
    number = draw.choice([*NASTY_NUMBERS, -values[index], values[index] * 2, values[index] + 1])
    kind = form[-1]
    if kind not in "fd":
        bits = 8 * struct.calcsize(kind)
        number = int(number) % 2 ** (bits - 1) * (1 if kind == "B" or number >= 0 else -1) if np.isfinite(number) else 1
    with np.errstate(over="ignore"):
        values[index] = float(np.float32(number)) if kind == "f" else number
    struct.pack_into(f"<{form}", header, offset, *values)
    return gzip.compress(bytes(header), 1) if packed else bytes(header)


DICOM_LIES: dict[str, tuple[object, ...]] = {
    "Rows": (0, 1, 35, 37, 65535),
    "Columns": (0, 1, 32, 34, 65535),
    "BitsAllocated": (0, 1, 8, 12, 32, 65535),
    "BitsStored": (0, 8, 12, 17),
    "SamplesPerPixel": (0, 2, 3),
    "PixelRepresentation": (0, 1, 7),
    "NumberOfFrames": ("0", "-1", "2", "4", "1000000", "99999999999"),
    "PhotometricInterpretation": ("MONOCHROME1", "RGB", "", "PALETTE COLOR"),
    "PixelSpacing": ([0, 1], [-1.5, 1.25], [1e-30, 1], [1e30, 1], [1.5], [1.5, 1.25, 1], "", [3, 3], ["nan", "nan"]),
    "ImageOrientationPatient": ([0] * 6, [1, 0, 0, 1, 0, 0], [0, 1, 0, 1, 0, 0], [1, 0, 0], "", [1e30, 0, 0, 0, 1, 0]),
    "ImagePositionPatient": ([0, 0, 0], ["nan", 0, 0], [1e30, 0, 0], [0, 0], "", [-30, 20, 107.5], [-30, 20, -1e9]),
    "RescaleSlope": ("0", "nan", "inf", "1e300", "2", "0.5", ""),
    "RescaleIntercept": ("nan", "-1024", "1e30"),
    "SliceThickness": ("0", "-1", "1e30"),
    "SpacingBetweenSlices": ("0", "-1", "1e30", "0.001", "2.5"),
    "SeriesInstanceUID": ("", "1.2.3"),
    "ImageType": (["ORIGINAL", "PRIMARY", "LOCALIZER"], "", ["DERIVED"]),
    "ReferencedSegmentNumber": (0, 2, 77),
    "SegmentNumber": (0, 2, 65535),
    "SegmentationType": ("FRACTIONAL", "LABELMAP", "BINARY", ""),
    "MaximumFractionalValue": (0, 1, 255),
    "SOPClassUID": ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.2", ""),
    "PerFrameFunctionalGroupsSequence": ([],),
    "SharedFunctionalGroupsSequence": ([],),
}  # fmt: skip


def dicom_lies(content: bytes, draw: np.random.Generator) -> bytes:
    """One element, wherever in the tree it stands, says something else, or is missing."""
    with quiet():  # pydicom warns of the values below
        return _with_a_lie(pydicom.dcmread(pydicom.filebase.DicomBytesIO(content)), draw)


def _with_a_lie(dataset: pydicom.Dataset, draw: np.random.Generator) -> bytes:
    places: dict[str, list[pydicom.Dataset]] = {}

    def visit(one: pydicom.Dataset) -> None:
        for element in one:
            places.setdefault(element.keyword, []).append(one)
            for item in element.value if element.VR == "SQ" else ():
                visit(item)

    visit(dataset)
    known = [keyword for keyword in DICOM_LIES if keyword in places]
    keyword = known[draw.integers(len(known))]
    one = places[keyword][draw.integers(len(places[keyword]))]
    values = DICOM_LIES[keyword]
    if draw.random() < 0.1:
        delattr(one, keyword)
    else:
        setattr(one, keyword, values[draw.integers(len(values))])
    return saved(dataset)


def zip_lies(content: bytes, draw: np.random.Generator) -> bytes:
    """A size, a checksum, a method or a flag in one of the archive's records says something else."""
    records = [found.start() for found in re.finditer(rb"PK\x01\x02|PK\x03\x04|PK\x05\x06", content)]
    start = records[draw.integers(len(records))]
    changed = bytearray(content)
    place = start + int(draw.integers(4, 30))
    changed[place : place + 1] = bytes([int(draw.choice([0, 1, 8, 9, 99, 255]))])
    return bytes(changed)


def png_lies(content: bytes, draw: np.random.Generator) -> bytes:
    """Sizes, depth and kind of a picture say something else, under a checksum that is right."""
    header = list(struct.unpack(">IIBBBBB", content[16:29]))
    index = int(draw.integers(len(header)))
    header[index] = int(draw.choice([0, 1, 2, 3, 4, 6, 16, 33, 36, 37] + ([60000, 2**31 - 1] if index < 2 else [])))
    chunk = b"IHDR" + struct.pack(">IIBBBBB", *header)
    return content[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]


# ---- the sound files


def text_vti(path: Path) -> bytes:
    writer = vtkXMLImageDataWriter()
    writer.SetFileName(str(path))
    writer.SetInputData(test_vtk.image_with(volume().voxels))
    writer.SetDataModeToAscii()
    writer.Write()
    return path.read_bytes()


def saved(dataset: pydicom.Dataset) -> bytes:
    written = pydicom.filebase.DicomBytesIO()
    pydicom.dcmwrite(written, dataset, enforce_file_format=True)
    return written.getvalue()


def sound_files(folder: Path) -> dict[str, Sound]:
    """One of each kind, small, most of them oblique."""
    folder.mkdir()
    scan, made = tilted(), {}

    def add(kind: str, name: str, content: bytes, spoil: Callable[..., bytes], **more) -> None:
        beside = more.pop("beside", {})
        made[kind] = Sound(kind, {name: content, **beside}, spoil, **more)

    def written(name: str) -> bytes:
        return write_volume(scan, folder / name)[0].read_bytes()

    add("nii", "a.nii", written("a.nii"), nifti_lies)
    add("nii.gz", "a.nii.gz", written("a.nii.gz"), nifti_lies)
    scan.metadata["format"] = "NIfTI-2"
    add("nii 2", "a.nii", written("b.nii"), nifti_lies)
    array, text = test_nrrd.ARRAY, test_metaimage.TEXT
    add("nrrd raw", "a.nrrd", test_nrrd.save(folder / "a.nrrd").read_bytes(), text_header_lies)
    add("nrrd gzip", "b.nrrd", written("b.nrrd"), text_header_lies)
    add("nrrd text", "c.nrrd", test_nrrd.save(folder / "c.nrrd", text, encoding="ascii").read_bytes(), text_header_lies)
    detached = test_nrrd.save(folder / "a.nhdr", b"", data_file="a.raw").read_bytes()
    add("nhdr", "a.nhdr", detached, text_header_lies, beside={"a.raw": array.tobytes()})
    add("mha raw", "a.mha", test_metaimage.save(folder / "a.mha").read_bytes(), text_header_lies)
    add("mha zlib", "b.mha", written("b.mha"), text_header_lies)
    detached = test_metaimage.save(folder / "a.mhd", b"", "a.raw").read_bytes()
    add("mhd", "a.mhd", detached, text_header_lies, beside={"a.raw": array.tobytes()})
    add("vtk", "a.vtk", written("a.vtk"), text_header_lies)
    as_text = test_vtk.save_legacy(folder / "b.vtk", test_vtk.image_with(volume().voxels), True).read_bytes()
    add("vtk text", "b.vtk", as_text, text_header_lies)
    add("vti", "a.vti", written("a.vti"), text_header_lies)
    add("vti text", "b.vti", text_vti(folder / "b.vti"), text_header_lies)

    syntaxes = {
        "": ExplicitVRLittleEndian,
        " rle": RLELossless,
        " jpeg 2000": JPEG2000Lossless,
        " jpeg-ls": JPEGLSLossless,
    }
    for name, syntax in syntaxes.items():
        datasets = [test_dicom.slice_of(index, test_dicom_seg.OBLIQUE) for index in (1, 0, 2)]
        for dataset in datasets if syntax.is_compressed else []:
            dataset.compress(syntax, generate_instance_uid=False)
        first, second, third = (saved(dataset) for dataset in datasets)
        beside = {"IM2": second, "IM3": third}
        add(f"dicom{name}", "IM1", first, dicom_lies, beside=beside, folder=True)
        if not name:
            members = {"IM1": first, **beside}
            add("zip", "a.zip", test_dicom.zipped(folder / "a.zip", members).read_bytes(), zip_lies)
    add("enhanced", "a.dcm", saved(test_dicom.enhanced(own=True)), dicom_lies)
    sources, image = test_dicom_seg.image_files(folder / "image")
    for kind, name in (("BINARY", "seg"), ("LABELMAP", "seg label map")):
        add(name, "seg.dcm", saved(test_dicom_seg.segmentation(sources, test_dicom_seg.labels(), kind)), dicom_lies)
    pictures = {}
    for index in range(len(sources)):
        Image.fromarray(test_dicom_seg.labels()[index]).save(folder / "a.png")
        pictures[f"IM{index}.png"] = (folder / "a.png").read_bytes()
    middle = pictures.pop("IM2.png")
    add("png", "IM2.png", middle, png_lies, beside=pictures, folder=True, image=image.source)
    return made


# ---- reading them


class Reader:
    """A process that reads files; a new one takes its place when it ends."""

    def __init__(self, sound: Path) -> None:
        self._sound = sound
        self._process: subprocess.Popen[str] | None = None

    def ask(self, how: str, path: Path, image: str = "") -> dict[str, object] | None:
        """What came of the file, or None if the process crashed or hung."""
        if self._process is None:
            command = [sys.executable, str(TESTS / "fuzz_worker.py"), str(self._sound)]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                cwd=TESTS.parent,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"how": how, "path": str(path), "image": image}) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_LIMIT_S)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self.close()
            return None
        return json.loads(line)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(write_volume(volume(), tmp_path / "sound.nii.gz")[0])
    yield reader
    reader.close()


def test_a_crash_a_hang_and_a_large_allocation_are_seen_and_the_next_file_is_read(tmp_path, reader):
    path = write_volume(volume(), tmp_path / "a.nii")[0]
    whole = reader.ask("read", path)
    assert whole is not None
    assert whole["shape"] == [5, 6, 7]
    for how in ("crash", "hang"):
        assert reader.ask(how, path) is None
        assert reader.ask("read", path) == whole
    assert "MemoryError" in reader.ask("allocate", path)["exception"]
    moved = {**whole, "affine": (np.array(whole["affine"]) + 0.02).tolist()}
    assert fault_of(moved, whole, lambda: whole, path, is_mask=False)
    assert fault_of(moved, whole, lambda: None, path, is_mask=False)
    assert fault_of(None, whole, lambda: whole, path, is_mask=False)
    assert not fault_of(moved, whole, lambda: moved, path, is_mask=False)


def same_place(one: dict, other: dict) -> bool:
    """Whether all corner voxels lie within a hundredth of a millimetre of each other."""
    if one["shape"] != other["shape"]:
        return False
    corners = np.column_stack([corners_of(one["shape"]), np.ones(8)])
    return bool(np.abs(corners @ (np.array(one["affine"]) - other["affine"]).T).max() < 0.01)


def fault_of(answer: dict | None, sound: dict, reference: Callable[[], dict | None], path: Path, is_mask: bool) -> str:
    """What is wrong with the answer to a mutated file, or nothing."""
    if answer is None:
        return "the process crashed or hung"
    if "exception" in answer:
        return str(answer["exception"])
    if "error" in answer:
        return "" if is_one_sentence_naming(str(answer["sentence"]), path) else str(answer["sentence"])
    if not answer["finite"]:
        return "voxels that are no numbers"
    if same_place(answer, sound) and answer["voxels"] == sound["voxels"]:
        return ""
    seen = reference()
    if seen is None or "shape" not in seen:
        # The other reader refuses the file, or crashes over it: only the place it had before can be right.
        return "" if same_place(answer, sound) else f"another place, and no reader to compare with ({seen})"
    if not is_mask and not same_place(answer, seen):
        return f"lies at {answer['affine']} {answer['shape']}, another reader says {seen['affine']} {seen['shape']}"
    return "" if answer["voxels"] == seen["voxels"] else "other voxels than another reader sees"


def test_two_thousand_mutated_files_are_refused_or_read_right_and_nothing_crashes(tmp_path, reader):
    assert sum(COUNTS.values()) == 2000
    sounds = sound_files(tmp_path / "sound")
    assert set(sounds) == set(COUNTS)
    faults, outcomes, read = [], Counter(), Counter()
    for number, (kind, count) in enumerate(COUNTS.items()):
        sound = sounds[kind]
        name, whole = next(iter(sound.files.items()))
        expected = reader.ask("read", sound.write(tmp_path / f"whole{number}", whole), sound.image)
        assert expected is not None
        assert "shape" in expected, (kind, expected)
        for case in range(count):
            draw = np.random.default_rng([number, case])
            content = (sound.spoil if case % 2 else bytes_changed)(whole, draw)
            path = sound.write(tmp_path / f"{number}-{case}", content)
            answer = reader.ask("read", path, sound.image)
            named = path / name if sound.folder else path
            fault = fault_of(answer, expected, lambda path=path: reader.ask("reference", path), path, bool(sound.image))
            if fault and sound.folder and answer and "sentence" in answer:
                fault = "" if is_one_sentence_naming(str(answer["sentence"]), named) else fault
            if fault:
                faults.append((kind, case, fault[:400]))
            outcomes["refused" if answer and "error" in answer else "read"] += 1
            read[kind] += 1
    assert read == COUNTS
    assert not faults, (len(faults), faults[:12])
    assert min(outcomes.values()) > 200, outcomes  # neither everything nor nothing is refused
