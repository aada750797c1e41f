"""Folders of PNG masks onto the grid of a DICOM series."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from bad_files import error_of, is_one_sentence_naming, volume
from PIL import Image
from test_dicom import COLUMNS, ROWS, save, slice_of

from lvseg.formats import read_mask, read_volume, write_volume
from lvseg.volume import Volume

COUNT = 5
GREYS = np.array([0, 63, 126, 189, 252], np.uint8)


def masks() -> np.ndarray:
    """What belongs on each slice, from feet to head."""
    return GREYS[np.random.default_rng(0).integers(0, 5, (COUNT, ROWS, COLUMNS))]


def series(folder: Path, names: list[str]) -> Volume:
    """A series whose files from feet to head have these names."""
    save(folder, [slice_of(index) for index in range(COUNT)])
    scan = read_volume(folder)
    for old in scan.metadata["slice_files"]:
        (folder / old).rename(folder / f"_{old}")
    for old, new in zip(scan.metadata["slice_files"], names, strict=True):
        (folder / f"_{old}").rename(folder / new)
    return read_volume(folder)


def pngs(folder: Path, names: list[str], arrays) -> Path:
    folder.mkdir()
    for name, array in zip(names, arrays, strict=True):
        Image.fromarray(array).save(folder / name)
    return folder


HEAD_FIRST = [f"IMG-0004-{number:05d}.dcm" for number in range(COUNT, 0, -1)]


@pytest.mark.parametrize(
    "names",
    [
        [f"IMG-0004-{number:05d}.png" for number in range(COUNT, 0, -1)],
        [f"liver_GT_{number:03d}.png" for number in range(COUNT - 1, -1, -1)],
    ],
)
def test_a_png_lies_on_the_slice_whose_file_has_its_place_in_the_order_of_names(tmp_path, names):
    image = series(tmp_path / "image", HEAD_FIRST)
    assert image.metadata["slice_files"] == tuple(HEAD_FIRST)
    mask = read_mask(pngs(tmp_path / "Ground", names, masks()), image)
    np.testing.assert_array_equal(mask.voxels, masks())
    np.testing.assert_array_equal(mask.affine, image.affine)
    assert mask.voxels.dtype == np.uint8
    assert set(np.unique(mask.voxels)) == set(GREYS)


@pytest.mark.parametrize("kind", ["1", "16 bits", "RGB"])
def test_grey_values_are_the_labels_however_they_are_stored(tmp_path, kind):
    image = series(tmp_path / "image", HEAD_FIRST)
    wanted = masks().astype(np.uint16)
    if kind == "1":
        arrays, wanted = list(masks() > 0), (masks() > 0).astype(np.uint16)
    elif kind == "16 bits":
        wanted = wanted * 10
        arrays = list(wanted)
    else:
        arrays = [np.repeat(array[..., None], 3, axis=2) for array in masks()]
    mask = read_mask(pngs(tmp_path / "Ground", [name.replace("dcm", "png") for name in HEAD_FIRST], arrays), image)
    assert mask.voxels.dtype == (np.uint16 if kind == "16 bits" else np.uint8)
    np.testing.assert_array_equal(mask.voxels, wanted)


def test_numbers_without_zeros_are_matched_by_the_names_themselves_or_not_at_all(tmp_path):
    bare = ["IM1", "IM2", "IM10", "IM11", "IM20"]
    image = series(tmp_path / "image", bare)
    same = pngs(tmp_path / "same", [f"{name}.png" for name in bare], masks())
    np.testing.assert_array_equal(read_mask(same, image).voxels, masks())
    counted = pngs(tmp_path / "counted", [f"{number:03d}.png" for number in range(COUNT)], masks())
    code, sentence = error_of(lambda path: read_mask(path, image), counted)
    assert code == "GEOMETRY_AMBIGUOUS"
    assert is_one_sentence_naming(sentence, counted)


def test_names_that_place_some_files_elsewhere_than_their_order_are_refused(tmp_path):
    image = series(tmp_path / "image", [f"IM{number:03d}" for number in range(COUNT)])
    shifted = pngs(tmp_path / "shifted", [f"IM{number:03d}.png" for number in range(1, COUNT + 1)], masks())
    code, sentence = error_of(lambda path: read_mask(path, image), shifted)
    assert code == "GEOMETRY_AMBIGUOUS"
    assert is_one_sentence_naming(sentence, shifted)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def damaged(fault: str, good: bytes) -> bytes:
    """A PNG with a fault."""
    if fault == "cut":
        return good[:-20]
    if fault == "flipped":
        place = good.index(b"IDAT") + 12
        return good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]
    if fault == "text":
        return b"no picture " * 9
    if fault == "empty":
        return b""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)  # a bomb
    return good[:8] + chunk(b"IHDR", header) + good[33:]


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("cut", "INPUT_TRUNCATED"),
        ("flipped", "INPUT_TRUNCATED"),
        ("text", "UNSUPPORTED_FORMAT"),
        ("empty", "INPUT_TRUNCATED"),
        ("bomb", "INPUT_TRUNCATED"),
        ("palette", "UNSUPPORTED_PIXEL_TYPE"),
        ("colours", "UNSUPPORTED_PIXEL_TYPE"),
        ("transparent", "UNSUPPORTED_PIXEL_TYPE"),
        ("four bits", "UNSUPPORTED_PIXEL_TYPE"),
        ("larger", "GEOMETRY_MISMATCH"),
        ("a link to nothing", "NOT_READABLE"),
    ],
)
def test_a_png_with_a_fault_is_refused_by_name(tmp_path, fault, code):
    image = series(tmp_path / "image", HEAD_FIRST)
    folder = pngs(tmp_path / "Ground", [name.replace("dcm", "png") for name in HEAD_FIRST], masks())
    path = sorted(folder.iterdir())[2]
    picture = Image.fromarray(masks()[0])
    if fault == "palette":
        picture.convert("P").save(path)
    elif fault == "colours":
        picture.convert("RGB").save(path)
        colours = np.array(Image.open(path))
        colours[0, 0] = 1, 2, 3
        Image.fromarray(colours).save(path)
    elif fault == "transparent":
        picture.convert("RGBA").save(path)
    elif fault == "four bits":
        rows = b"".join(b"\0" + bytes((COLUMNS + 1) // 2) for _ in range(ROWS))
        header = struct.pack(">IIBBBBB", COLUMNS, ROWS, 4, 0, 0, 0, 0)
        path.write_bytes(
            path.read_bytes()[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        )
    elif fault == "larger":
        Image.fromarray(np.zeros((ROWS, COLUMNS + 1), np.uint8)).save(path)
    elif fault == "a link to nothing":
        path.unlink()
        path.symlink_to(tmp_path / "gone")
    else:
        path.write_bytes(damaged(fault, path.read_bytes()))
    received, sentence = error_of(lambda _path: read_mask(folder, image), path)
    assert received == code, sentence
    assert is_one_sentence_naming(sentence, path)


def test_another_number_of_files_and_an_image_without_files_are_refused(tmp_path):
    image = series(tmp_path / "image", HEAD_FIRST)
    folder = pngs(tmp_path / "Ground", [f"{number}.png" for number in range(COUNT - 1)], masks()[1:])
    code, sentence = error_of(lambda path: read_mask(path, image), folder)
    assert code == "GEOMETRY_MISMATCH"
    assert f"received {COUNT - 1} in" in sentence
    Image.fromarray(masks()[0]).save(folder / "9.png")
    nifti = read_volume(write_volume(image, tmp_path / "image.nii.gz")[0])
    assert error_of(lambda path: read_mask(path, nifti), folder)[0] == "GEOMETRY_MISMATCH"
    assert read_mask(folder, image).shape == image.shape


def test_a_folder_of_pictures_is_no_scan(tmp_path):
    folder = pngs(tmp_path / "pictures", ["1.png"], masks()[:1])
    assert error_of(read_volume, folder)[0] == "NOT_FOUND"
    assert error_of(lambda path: read_mask(path, volume()), folder)[0] == "GEOMETRY_MISMATCH"
