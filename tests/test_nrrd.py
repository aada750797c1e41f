"""NRRD in and out against SimpleITK, and what no reader should accept."""

import bz2
import gzip
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from bad_files import error_of, is_one_sentence_naming, volume
from grids import all_48_orientations, assert_itk_sees_the_same, itk_image, tilted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from lvseg.formats import read_mask, read_volume, write_volume
from lvseg.volume import Volume

DTYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]
WORLDS = {"left-posterior-superior": (1, 1, 1), "RAS": (-1, -1, 1), "left-anterior-superior": (1, -1, 1)}


@pytest.mark.parametrize("base", [volume((2, 3, 4)), tilted(scan=volume((2, 3, 4)))], ids=["aligned", "oblique"])
def test_all_48_orientations_lie_where_itk_says_in_both_directions(tmp_path, base):
    for scan in all_48_orientations(base):
        path = write_volume(scan, tmp_path / "ours.nrrd")[0]
        assert_itk_sees_the_same(path, scan)
        back = read_volume(path)
        np.testing.assert_array_equal(back.voxels, scan.voxels)
        np.testing.assert_array_equal(back.affine, scan.affine)
        SimpleITK.WriteImage(itk_image(scan), str(tmp_path / "itk.nrrd"), useCompression=True)
        theirs = read_volume(tmp_path / "itk.nrrd")
        np.testing.assert_array_equal(theirs.voxels, scan.voxels)
        np.testing.assert_allclose(theirs.affine, scan.affine, atol=1e-12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    spacing_mm=st.tuples(*[st.floats(1e-2, 50)] * 3),
    offset_mm=st.tuples(*[st.floats(-2000, 2000)] * 3),
    dtype=st.sampled_from(DTYPES),
)
def test_what_is_written_is_read_back(tmp_path, angles, shape, spacing_mm, offset_mm, dtype):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing_mm
    affine[:3, 3] = offset_mm
    scan = Volume(np.random.default_rng(0).integers(0, 100, shape).astype(dtype), affine)
    path = write_volume(scan, tmp_path / "a.nrrd")[0]
    back = read_volume(path)
    assert back.voxels.dtype == np.dtype(dtype)
    assert back.metadata["format"] == "NRRD"
    np.testing.assert_array_equal(back.voxels, scan.voxels)
    np.testing.assert_allclose(back.affine, scan.affine, rtol=0, atol=1e-12)
    assert_itk_sees_the_same(path, scan)
    assert re.search(rb"\d\d:\d\d:\d\d", path.read_bytes().partition(b"\n\n")[0]) is None  # no time of writing


ARRAY = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
FIELDS = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "5 4 3",
    "space directions": "(2,0,0) (0,1.5,0) (0,0,3)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(-10,20,30.5)",
}
AFFINE = np.array([[0, 0, 2, -10], [0, 1.5, 0, 20], [3, 0, 0, 30.5], [0, 0, 0, 1]])


def save(path: Path, data: bytes = ARRAY.tobytes(), **changes: str | None) -> Path:
    """A NRRD made by hand; a change of None leaves a field out, an underscore in its name is a space."""
    fields = {**FIELDS, **{name.replace("_", " "): value for name, value in changes.items()}}
    header = "".join(f"{name}: {value}\n" for name, value in fields.items() if value is not None)
    path.write_bytes(b"NRRD0005\n# a comment\n" + header.encode() + b"key:=value\n\n" + data)
    return path


@pytest.mark.parametrize(("space", "signs"), WORLDS.items())
def test_every_world_comes_out_as_lps_as_itk_has_it(tmp_path, space, signs):
    path = save(tmp_path / "a.nrrd", space=space)
    scan = read_volume(path)
    np.testing.assert_array_equal(scan.affine[:3], np.diag(signs) @ AFFINE[:3])
    assert_itk_sees_the_same(path, scan)


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("raw", bytes),
        ("gzip", gzip.compress),
        ("gz", gzip.compress),
        ("bzip2", bz2.compress),
        ("ascii", lambda data: " ".join(str(n) for n in np.frombuffer(data, "<i2")).encode() + b"\n"),
    ],
)
def test_every_encoding_is_read_attached_and_detached_and_none_when_cut_short(tmp_path, encoding, pack):
    whole = save(tmp_path / "a.nrrd", pack(ARRAY.tobytes()), encoding=encoding)
    np.testing.assert_array_equal(read_volume(whole).voxels, ARRAY)
    np.testing.assert_array_equal(read_volume(whole).affine, AFFINE)
    (tmp_path / "a.data").write_bytes(pack(ARRAY.tobytes()))
    header = save(tmp_path / "b.nhdr", b"", encoding=encoding, data_file="a.data")
    np.testing.assert_array_equal(read_volume(header).voxels, ARRAY)
    content = whole.read_bytes()
    for length in [*range(0, len(content), 5), len(content) - 1]:
        (tmp_path / "cut.nrrd").write_bytes(content[:length])
        code, sentence = error_of(read_volume, tmp_path / "cut.nrrd")
        assert code == "INPUT_TRUNCATED" or length < content.index(b"\n\n"), (length, sentence)
        assert is_one_sentence_naming(sentence, tmp_path / "cut.nrrd")


def test_big_endian_voxels_bytes_to_skip_and_lines_to_skip(tmp_path):
    big = ARRAY.astype(">i2").tobytes()
    np.testing.assert_array_equal(read_volume(save(tmp_path / "a.nrrd", big, endian="big")).voxels, ARRAY)
    path = save(tmp_path / "b.nrrd", b"junk" + ARRAY.tobytes(), byte_skip="4")
    np.testing.assert_array_equal(read_volume(path).voxels, ARRAY)
    path = save(tmp_path / "c.nrrd", b"some header\n" * 9 + ARRAY.tobytes(), byte_skip="-1")
    np.testing.assert_array_equal(read_volume(path).voxels, ARRAY)
    path = save(tmp_path / "d.nrrd", b"one\ntwo\n" + ARRAY.tobytes(), line_skip="2")
    np.testing.assert_array_equal(read_volume(path).voxels, ARRAY)


def test_an_axis_of_size_one_that_is_not_of_space_is_dropped(tmp_path):
    path = save(
        tmp_path / "a.nrrd",
        dimension="4",
        sizes="1 5 4 3",
        kinds="list domain domain domain",
        space_directions=f"none {FIELDS['space directions']}",
    )
    np.testing.assert_array_equal(read_volume(path).voxels, ARRAY)
    np.testing.assert_array_equal(read_volume(path).affine, AFFINE)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"type": "block"}, "UNSUPPORTED_PIXEL_TYPE"),
        ({"type": None}, "UNSUPPORTED_PIXEL_TYPE"),
        ({"sizes": "5 4 4"}, "INPUT_TRUNCATED"),
        ({"sizes": "5 4 2"}, "DECOMPRESS_LIMIT"),
        ({"sizes": "5 4"}, "UNSUPPORTED_FORMAT"),
        ({"sizes": "0 4 3"}, "EMPTY_IMAGE"),
        ({"sizes": "-5 4 3"}, "DIMS_LIMIT"),
        ({"sizes": "99999 99999 99999"}, "DIMS_LIMIT"),
        ({"sizes": "900 900 900"}, "INPUT_TRUNCATED"),
        ({"sizes": "five 4 3"}, "UNSUPPORTED_FORMAT"),
        ({"dimension": "2"}, "UNSUPPORTED_FORMAT"),
        ({"kinds": "RGB-color domain domain"}, "UNSUPPORTED_FORMAT"),
        ({"space": None}, "BAD_GEOMETRY"),
        ({"space": "scanner-xyz"}, "BAD_GEOMETRY"),
        ({"space": "left-posterior-superior-time"}, "BAD_GEOMETRY"),
        ({"space directions": None}, "BAD_GEOMETRY"),
        ({"space directions": "(2,0,0) (0,1.5,0) (0,0,nan)"}, "BAD_GEOMETRY"),
        ({"space directions": "(2,0,0) (0,1.5,0) (0,0,1e-30)"}, "BAD_GEOMETRY"),
        ({"space directions": "(2,0,0) (0,1.5,0) (0,0,0)"}, "BAD_GEOMETRY"),
        ({"space directions": "(2,0,0) (1,1.5,0) (0,0,3)"}, "BAD_GEOMETRY"),
        ({"space origin": None}, "BAD_GEOMETRY"),
        ({"space origin": "(1e30,0,0)"}, "BAD_GEOMETRY"),
        ({"space units": '"cm" "cm" "cm"'}, "BAD_GEOMETRY"),
        ({"encoding": "hex"}, "UNSUPPORTED_FORMAT"),
        ({"encoding": "gzip"}, "INPUT_TRUNCATED"),
        ({"encoding": "bzip2"}, "INPUT_TRUNCATED"),
        ({"endian": None}, "UNSUPPORTED_FORMAT"),
        ({"byte skip": "9"}, "INPUT_TRUNCATED"),
        ({"byte skip": "-2"}, "UNSUPPORTED_FORMAT"),
        ({"data file": "gone.raw"}, "NOT_FOUND"),
        ({"data file": "../a.raw"}, "UNSUPPORTED_FORMAT"),
        ({"data file": "/etc/hostname"}, "UNSUPPORTED_FORMAT"),
        ({"data file": "LIST"}, "NOT_FOUND"),
        ({"data file": "link.raw"}, "NOT_READABLE"),
    ],
)
def test_a_header_that_lies_or_says_too_little_is_refused(tmp_path, changes, code):
    (tmp_path / "outside.raw").write_bytes(ARRAY.tobytes())
    folder = tmp_path / "inside"
    folder.mkdir()
    (folder / "link.raw").symlink_to(tmp_path / "outside.raw")
    path = save(folder / "a.nrrd", **{name.replace(" ", "_"): value for name, value in changes.items()})
    received, sentence = error_of(read_volume, path)
    assert received == code, sentence
    assert is_one_sentence_naming(sentence, path)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress])
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, pack):
    encoding = "gzip" if pack is gzip.compress else "bzip2"
    path = save(tmp_path / "a.nrrd", pack(bytes(50_000_000)), encoding=encoding)
    assert error_of(read_volume, path)[0] == "DECOMPRESS_LIMIT"


def test_a_mask_in_another_orientation_comes_onto_the_grid_of_its_image(tmp_path):
    image = tilted(scan=volume((4, 5, 6)))
    wanted = (image.voxels > 0).astype(np.uint8)
    for mask in all_48_orientations(image.with_voxels(wanted)):
        found = read_mask(write_volume(mask, tmp_path / "mask.nrrd")[0], image)
        assert found.voxels.dtype == np.uint8
        np.testing.assert_array_equal(found.voxels, wanted)
        np.testing.assert_array_equal(found.affine, image.affine)


@pytest.mark.parametrize("fault", ["moved", "cropped", "finer", "turned", "fractions", "negative"])
def test_a_mask_that_does_not_lie_voxel_on_voxel_or_holds_no_labels_is_refused(tmp_path, fault):
    image = volume()
    voxels, affine = np.ones(image.shape, np.float32), image.affine.copy()
    if fault == "moved":
        affine[0, 3] += 1.0
    elif fault == "cropped":
        voxels = voxels[1:]
        affine[:3, 3] += affine[:3, 0]
    elif fault == "finer":
        affine[:3, 1] *= 0.9
    elif fault == "turned":
        affine[:3, :3] = Rotation.from_euler("x", 1, degrees=True).as_matrix() @ affine[:3, :3]
    else:
        voxels[0, 0, 0] = 0.5 if fault == "fractions" else -1
    path = write_volume(Volume(voxels, affine), tmp_path / "mask.nrrd")[0]
    code, sentence = error_of(lambda path: read_mask(path, image), path)
    assert code == ("NOT_LABELS" if fault in ("fractions", "negative") else "GEOMETRY_MISMATCH")
    assert is_one_sentence_naming(sentence, path)


def test_large_labels_are_kept(tmp_path):
    image = volume()
    labels = np.arange(image.voxels.size, dtype=np.int32).reshape(image.shape) + 200
    found = read_mask(write_volume(image.with_voxels(labels), tmp_path / "mask.nrrd")[0], image)
    assert found.voxels.dtype == np.uint16
    np.testing.assert_array_equal(found.voxels, labels)


def test_the_real_liver_is_read_as_itk_reads_it(real_data):
    path = real_data / "dicom_seg" / "liver_seg.nrrd"
    scan = read_volume(path)
    assert scan.voxels.any()
    assert_itk_sees_the_same(path, scan)
