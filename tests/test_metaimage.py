"""MetaImage in and out against SimpleITK, and what no reader should accept."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from bad_files import error_of, is_one_sentence_naming, volume
from grids import all_48_orientations, assert_itk_sees_the_same, itk_image, tilted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from lvseg.formats import read_volume, write_volume
from lvseg.volume import Volume

DTYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]
ARRAY = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
FIELDS = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "TransformMatrix": "0 1 0 -1 0 0 0 0 1",
    "Offset": "-10 20 30.5",
    "CenterOfRotation": "0 0 0",
    "AnatomicalOrientation": "ALI",
    "ElementSpacing": "2 1.5 3",
    "DimSize": "5 4 3",
    "ElementType": "MET_SHORT",
}
AFFINE = np.array([[0, -1.5, 0, -10], [0, 0, 2, 20], [3, 0, 0, 30.5], [0, 0, 0, 1]])


def save(path: Path, data: bytes = ARRAY.tobytes(), data_file: str = "LOCAL", **changes: str | None) -> Path:
    """A MetaImage made by hand; a change of None leaves a key out."""
    fields = {**FIELDS, **changes, "ElementDataFile": data_file}
    header = "".join(f"{key} = {value}\n" for key, value in fields.items() if value is not None)
    path.write_bytes(header.encode() + data)
    return path


@pytest.mark.parametrize("base", [volume((2, 3, 4)), tilted(scan=volume((2, 3, 4)))], ids=["aligned", "oblique"])
def test_all_48_orientations_lie_where_itk_says_in_both_directions(tmp_path, base):
    for scan in all_48_orientations(base):
        path = write_volume(scan, tmp_path / "ours.mha")[0]
        assert_itk_sees_the_same(path, scan)
        back = read_volume(path)
        np.testing.assert_array_equal(back.voxels, scan.voxels)
        np.testing.assert_allclose(back.affine, scan.affine, rtol=0, atol=1e-12)
        for compressed in (False, True):
            SimpleITK.WriteImage(itk_image(scan), str(tmp_path / "itk.mhd"), useCompression=compressed)
            theirs = read_volume(tmp_path / "itk.mhd")
            np.testing.assert_array_equal(theirs.voxels, scan.voxels)
            np.testing.assert_allclose(theirs.affine, scan.affine, rtol=0, atol=1e-12)


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
    path = write_volume(scan, tmp_path / "a.mha")[0]
    back = read_volume(path)
    assert back.voxels.dtype == np.dtype(dtype)
    assert back.metadata == {"format": "MetaImage", "directions": "TransformMatrix"}
    np.testing.assert_array_equal(back.voxels, scan.voxels)
    np.testing.assert_allclose(back.affine, scan.affine, rtol=0, atol=1e-9)
    assert_itk_sees_the_same(path, scan)


def test_a_file_made_by_hand_lies_where_its_numbers_and_itk_say(tmp_path):
    path = save(tmp_path / "a.mha")
    scan = read_volume(path)
    np.testing.assert_array_equal(scan.voxels, ARRAY)
    np.testing.assert_array_equal(scan.affine, AFFINE)
    assert_itk_sees_the_same(path, scan)


def test_names_of_older_files_and_what_they_leave_out(tmp_path):
    old = {"TransformMatrix": None, "Orientation": FIELDS["TransformMatrix"], "Offset": None, "Position": "-10 20 30.5"}
    np.testing.assert_array_equal(read_volume(save(tmp_path / "a.mha", **old)).affine, AFFINE)
    bare = save(tmp_path / "b.mha", TransformMatrix=None, Offset=None, AnatomicalOrientation=None)
    scan = read_volume(bare)
    assert scan.metadata["directions"] == "assumed LPS identity"
    np.testing.assert_array_equal(scan.affine, np.array([[0, 0, 2, 0], [0, 1.5, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1]]))
    assert_itk_sees_the_same(bare, scan)


def test_matrices_rounded_to_a_few_digits_count_as_they_are(tmp_path):
    path = save(
        tmp_path / "a.mha", TransformMatrix="0.9553 0.2955 0 -0.2955 0.9553 0 0 0 1", AnatomicalOrientation="RAI"
    )
    assert_itk_sees_the_same(path, read_volume(path))


TEXT = " ".join(str(number) for number in range(60)).encode() + b"\n"


@pytest.mark.parametrize(
    ("changes", "data"),
    [
        ({}, ARRAY.tobytes()),
        ({"CompressedData": "True"}, zlib.compress(ARRAY.tobytes())),
        ({"CompressedData": "True", "CompressedDataSize": "99"}, zlib.compress(ARRAY.tobytes())),
        ({"BinaryDataByteOrderMSB": None, "ElementByteOrderMSB": "True"}, ARRAY.astype(">i2").tobytes()),
        ({"BinaryData": "False"}, TEXT),
    ],
)
def test_every_encoding_is_read_attached_and_detached_and_none_when_cut_short(tmp_path, changes, data):
    whole = save(tmp_path / "a.mha", data, **changes)
    np.testing.assert_array_equal(read_volume(whole).voxels, ARRAY)
    (tmp_path / "b.raw").write_bytes(data)
    np.testing.assert_array_equal(read_volume(save(tmp_path / "b.mhd", b"", "b.raw", **changes)).voxels, ARRAY)
    content = whole.read_bytes()
    for length in [*range(0, len(content), 5), len(content) - 1]:
        (tmp_path / "cut.mha").write_bytes(content[:length])
        code, sentence = error_of(read_volume, tmp_path / "cut.mha")
        assert code == "INPUT_TRUNCATED", (length, sentence)
        assert is_one_sentence_naming(sentence, tmp_path / "cut.mha")


@pytest.mark.parametrize("size", ["12", "-1"])
def test_a_header_before_detached_voxels_is_skipped(tmp_path, size):
    (tmp_path / "a.raw").write_bytes(b"twelve bytes" + ARRAY.tobytes())
    path = save(tmp_path / "a.mhd", b"", "a.raw", HeaderSize=size)
    np.testing.assert_array_equal(read_volume(path).voxels, ARRAY)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"ObjectType": "Tube"}, "UNSUPPORTED_FORMAT"),
        ({"NDims": "2"}, "NEEDS_VOLUME_INDEX"),
        ({"NDims": None}, "NEEDS_VOLUME_INDEX"),
        ({"DimSize": "5 4"}, "UNSUPPORTED_FORMAT"),
        ({"DimSize": "5 4 2"}, "DECOMPRESS_LIMIT"),
        ({"DimSize": "5 4 4"}, "INPUT_TRUNCATED"),
        ({"DimSize": "5 0 3"}, "EMPTY_IMAGE"),
        ({"DimSize": "5 -4 3"}, "DIMS_LIMIT"),
        ({"DimSize": "99999 99999 99999"}, "DIMS_LIMIT"),
        ({"DimSize": "900 900 900", "CompressedData": "True"}, "INPUT_TRUNCATED"),
        ({"DimSize": "5 4 3.0"}, "UNSUPPORTED_FORMAT"),
        ({"ElementType": "MET_LONG"}, "UNSUPPORTED_PIXEL_TYPE"),
        ({"ElementType": "MET_UCHAR_ARRAY"}, "UNSUPPORTED_PIXEL_TYPE"),
        ({"ElementNumberOfChannels": "3"}, "UNSUPPORTED_PIXEL_TYPE"),
        ({"ElementSpacing": None}, "BAD_GEOMETRY"),
        ({"ElementSpacing": "2 1.5 -3"}, "BAD_GEOMETRY"),
        ({"ElementSpacing": "2 1.5 1e-30"}, "BAD_GEOMETRY"),
        ({"ElementSpacing": "2 1.5 nan"}, "BAD_GEOMETRY"),
        ({"Offset": "1e30 0 0"}, "BAD_GEOMETRY"),
        ({"TransformMatrix": "1 0 0 0 1 0 0 0 0", "AnatomicalOrientation": None}, "BAD_GEOMETRY"),
        ({"TransformMatrix": "1 0 0 0.7071068 0.7071068 0 0 0 1", "AnatomicalOrientation": "RAI"}, "BAD_GEOMETRY"),
        ({"TransformMatrix": "1 0 0"}, "BAD_GEOMETRY"),
        ({"DistanceUnits": "um"}, "BAD_GEOMETRY"),
        ({"AnatomicalOrientation": "RAI"}, "GEOMETRY_AMBIGUOUS"),
        ({"CenterOfRotation": "1 0 0"}, "GEOMETRY_AMBIGUOUS"),
        ({"Position": "1 2 3"}, "UNSUPPORTED_FORMAT"),
        ({"TransformMatrix": None, "TransformMatrlx": "1 0 0 0 1 0 0 0 1"}, "BAD_GEOMETRY"),
        ({"ElementToIntensityFunctionSlope": "2"}, "UNSUPPORTED_PIXEL_TYPE"),
        ({"CompressedData": "Yes"}, "UNSUPPORTED_FORMAT"),
        ({"CompressedData": "True"}, "INPUT_TRUNCATED"),
        ({"HeaderSize": "9"}, "INPUT_TRUNCATED"),
        ({"data_file": "gone.raw"}, "NOT_FOUND"),
        ({"data_file": "../outside.raw"}, "UNSUPPORTED_FORMAT"),
        ({"data_file": "/etc/hostname"}, "UNSUPPORTED_FORMAT"),
        ({"data_file": 100 * "\u00e9"}, "UNSUPPORTED_FORMAT"),  # as it is read, 200 characters and 400 bytes
        ({"data_file": "slice%03d.raw 1 3 1"}, "NOT_FOUND"),
        ({"data_file": "link.raw"}, "NOT_READABLE"),
    ],
)
def test_a_header_that_lies_or_says_too_little_is_refused(tmp_path, changes, code):
    (tmp_path / "outside.raw").write_bytes(ARRAY.tobytes())
    folder = tmp_path / "inside"
    folder.mkdir()
    (folder / "link.raw").symlink_to(tmp_path / "outside.raw")
    path = save(folder / "a.mha", **changes)
    received, sentence = error_of(read_volume, path)
    assert received == code, sentence
    assert is_one_sentence_naming(sentence, path)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = save(tmp_path / "a.mha", zlib.compress(bytes(50_000_000)), CompressedData="True")
    assert error_of(read_volume, path)[0] == "DECOMPRESS_LIMIT"


def test_a_suffix_in_capitals_makes_one_file_of_that_name(tmp_path):
    scan = Volume(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4))
    assert write_volume(scan, tmp_path / "scan.MHA") == [tmp_path / "scan.MHA"]
    assert [file.name for file in tmp_path.iterdir()] == ["scan.MHA"]
    np.testing.assert_array_equal(read_volume(tmp_path / "scan.MHA").voxels, scan.voxels)


def test_a_dtype_that_the_format_lacks_is_refused_and_leaves_nothing(tmp_path):
    half = volume().with_voxels(np.zeros((5, 6, 7), np.float16))
    for suffix in (".mha", ".nrrd"):
        code, _ = error_of(lambda path: write_volume(half, path), tmp_path / f"a{suffix}")
        assert code == "UNSUPPORTED_PIXEL_TYPE"
    assert not list(tmp_path.iterdir())
