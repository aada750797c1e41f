"""Legacy .vtk and .vti in and out, against VTK's own readers and writers and SimpleITK."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from bad_files import error_of, is_one_sentence_naming, volume
from grids import all_48_orientations, tilted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from vtkmodules.util.numpy_support import numpy_to_vtk, vtk_to_numpy
from vtkmodules.vtkCommonDataModel import vtkImageData
from vtkmodules.vtkIOLegacy import vtkStructuredPointsReader, vtkStructuredPointsWriter
from vtkmodules.vtkIOXML import vtkXMLImageDataReader, vtkXMLImageDataWriter

from lvseg import formats
from lvseg.errors import InputError
from lvseg.formats import read_volume, write_volume
from lvseg.volume import Volume

REAL_DATA = os.environ.get("LVSEG_REAL_DATA")
DTYPES = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64]
CUT_STEP = 13


def vtk_image(path: Path) -> vtkImageData:
    reader = vtkStructuredPointsReader() if path.suffix == ".vtk" else vtkXMLImageDataReader()
    reader.SetFileName(str(path))
    reader.Update()
    return reader.GetOutput()


def image_with(array: np.ndarray, spacing=(2.0, 1.5, 3.0), origin=(-7.0, 8.0, 90.25), name="scalars") -> vtkImageData:
    image = vtkImageData()
    image.SetDimensions(*array.shape[2::-1])
    image.SetSpacing(*spacing)
    image.SetOrigin(*origin)
    scalars = numpy_to_vtk(array.reshape(-1, *array.shape[3:]), deep=1)
    scalars.SetName(name)
    image.GetPointData().SetScalars(scalars)
    return image


def save_legacy(path: Path, image: vtkImageData, ascii_text: bool = False) -> Path:
    writer = vtkStructuredPointsWriter()
    writer.SetFileName(str(path))
    writer.SetInputData(image)
    if ascii_text:
        writer.SetFileTypeToASCII()
    else:
        writer.SetFileTypeToBinary()
    writer.Write()
    return path


def in_the_files_axes(scan: Volume, suffix: str) -> Volume:
    """What a file of it holds: a .vtk canonical axes, a .vti the volume's own."""
    return scan.canonical() if suffix == ".vtk" else scan


def corners_mm(scan: Volume) -> np.ndarray:
    return scan.world_mm(np.array(list(np.ndindex(2, 2, 2))) * (np.array(scan.shape) - 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suffix", [".vtk", ".vti"])
def test_vtk_itself_reads_dimensions_origin_spacing_and_voxels_exactly(tmp_path, dtype, suffix):
    scan = volume()
    affine = scan.affine.copy()
    affine[:3, 3] = 1234.5678912, -158.669123456, 1 / 3
    scan = Volume(scan.voxels.astype(dtype), affine)
    wanted = in_the_files_axes(scan, suffix)
    image = vtk_image(write_volume(scan, tmp_path / f"a{suffix}")[0])
    assert image.GetDimensions() == (7, 6, 5)
    np.testing.assert_allclose(image.GetOrigin(), wanted.affine[:3, 3], rtol=0, atol=1e-12)
    np.testing.assert_allclose(image.GetSpacing(), wanted.spacing_mm[::-1], rtol=0, atol=1e-12)
    voxels = vtk_to_numpy(image.GetPointData().GetScalars())
    assert voxels.dtype == dtype
    np.testing.assert_array_equal(voxels.reshape(5, 6, 7), wanted.voxels)


def test_a_mask_is_named_label_with_one_component(tmp_path):
    mask = volume().with_voxels((volume().voxels > 0).astype(np.uint8))
    header = write_volume(mask, tmp_path / "a.vtk")[0].read_bytes()[:400]
    assert header.startswith(
        b"# vtk DataFile Version 3.0\nlvseg 1; SPACE=LPS; DIR=1.0,0.0,0.0,0.0,1.0,0.0,0.0,0.0,1.0\n"
    )
    assert b"SCALARS label unsigned_char 1\nLOOKUP_TABLE default\n" in header


def test_simpleitk_finds_every_voxel_of_an_aligned_vtk_at_the_same_point(tmp_path):
    scan = volume()
    wanted = scan.canonical()
    [path] = write_volume(scan, tmp_path / "a.vtk")
    image = SimpleITK.ReadImage(str(path))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image), wanted.voxels)
    for k, j, i in np.ndindex(wanted.shape):
        np.testing.assert_allclose(
            image.TransformIndexToPhysicalPoint((i, j, k)), wanted.world_mm((k, j, i)), rtol=0, atol=1e-9
        )


def test_an_oblique_vtk_has_its_whole_geometry_beside_it(tmp_path):
    scan = tilted()
    path, sidecar = write_volume(scan, tmp_path / "liver.vtk")
    assert sidecar == tmp_path / "liver.vtk.json"
    geometry = json.loads(sidecar.read_text())
    image = vtk_image(path)
    voxels = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(image.GetDimensions()[::-1])
    wanted = scan.canonical()
    assert geometry["space"] == "LPS"
    assert geometry["size"] == list(image.GetDimensions())
    np.testing.assert_allclose(geometry["spacing_mm"], image.GetSpacing(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(image.GetOrigin(), wanted.affine[:3, 3], rtol=0, atol=1e-12)
    for i, j, k in np.ndindex(image.GetDimensions()):
        assert voxels[k, j, i] == wanted.voxels[k, j, i]
        point = np.array(geometry["index_to_world_mm"]) @ [i, j, k, 1]
        np.testing.assert_allclose(point[:3], wanted.world_mm((k, j, i)), rtol=0, atol=1e-9)


def test_an_old_sidecar_does_not_stay_beside_an_aligned_file(tmp_path):
    write_volume(tilted(), tmp_path / "liver.vtk")
    assert write_volume(volume(), tmp_path / "liver.vtk") == [tmp_path / "liver.vtk"]
    assert [path.name for path in tmp_path.iterdir()] == ["liver.vtk"]


def test_an_oblique_file_keeps_its_sidecar_until_the_aligned_one_is_whole(tmp_path, monkeypatch):
    files = write_volume(tilted(), tmp_path / "liver.vtk")
    before = [path.read_bytes() for path in files]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(formats.vtk, "write", full)
    monkeypatch.setitem(formats.FORMATS, ".vtk", (formats.vtk.read, full))
    with pytest.raises(OSError, match="No space"):
        write_volume(volume(), tmp_path / "liver.vtk")
    assert [path.read_bytes() for path in files] == before


def test_a_user_s_own_file_of_the_sidecar_s_name_is_not_written_over(tmp_path):
    (tmp_path / "liver.vtk.json").write_text('{"volume_ml": 1500}')
    with pytest.raises(InputError, match=r"received another file .*liver\.vtk\.json"):
        write_volume(tilted(), tmp_path / "liver.vtk")
    assert [path.name for path in tmp_path.iterdir()] == ["liver.vtk.json"]


@pytest.mark.parametrize(
    "content",
    [b"", b'{"volume_ml": 1500}', b"[1, 2]", b"\xff\xfe", b"[" * 60_000, b'{"format": "lvseg 1"}', b" " * 10**5],
)
def test_a_file_of_the_sidecars_name_that_is_none_is_left_alone(tmp_path, content):
    (tmp_path / "liver.vtk.json").write_bytes(content)
    assert write_volume(volume(), tmp_path / "liver.vtk") == [tmp_path / "liver.vtk"]
    assert (tmp_path / "liver.vtk.json").read_bytes() == content


@pytest.mark.parametrize("suffix", [".vtk", ".vti"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    spacing_mm=st.tuples(*[st.floats(1e-2, 50)] * 3),
    offset_mm=st.tuples(*[st.floats(-2000, 2000)] * 3),
    dtype=st.sampled_from(DTYPES),
)
def test_what_is_written_is_read_back_a_vtk_in_canonical_order_a_vti_in_its_own(
    tmp_path, suffix, angles, shape, spacing_mm, offset_mm, dtype
):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing_mm
    affine[:3, 3] = offset_mm
    scan = Volume(np.random.default_rng(0).integers(0, 100, shape).astype(dtype), affine)
    path = write_volume(scan, tmp_path / f"a{suffix}")[0]
    back, wanted = read_volume(path), in_the_files_axes(scan, suffix)
    assert back.voxels.dtype == dtype
    np.testing.assert_array_equal(back.voxels, wanted.voxels)
    np.testing.assert_allclose(corners_mm(back), corners_mm(wanted), rtol=0, atol=1e-9)
    if suffix == ".vtk":
        assert max(len(line) for line in path.read_bytes().split(b"\n", 2)[:2]) < 256


@pytest.mark.parametrize("suffix", [".vtk", ".vti"])
def test_flips_and_permutations_are_exact(tmp_path, suffix):
    for scan in all_48_orientations(volume()):
        back = read_volume(write_volume(scan, tmp_path / f"a{suffix}")[0])
        np.testing.assert_array_equal(back.affine, in_the_files_axes(scan, suffix).affine)


@pytest.mark.parametrize("base", [volume((2, 3, 4)), tilted(scan=volume((2, 3, 4)))], ids=["aligned", "oblique"])
def test_a_vti_lies_on_the_scans_own_grid_and_vtk_agrees_in_all_48_orientations(tmp_path, base):
    handedness = set()
    for scan in all_48_orientations(base):
        path = write_volume(scan, tmp_path / "a.vti")[0]
        back, image = read_volume(path), vtk_image(path)
        np.testing.assert_array_equal(back.voxels, scan.voxels)
        np.testing.assert_allclose(back.affine, scan.affine, rtol=0, atol=1e-12)
        voxels = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(image.GetDimensions()[::-1])
        np.testing.assert_array_equal(voxels, scan.voxels)
        handedness.add(round(image.GetDirectionMatrix().Determinant()))
        for k, j, i in np.ndindex(scan.shape):
            point = [0.0, 0.0, 0.0]
            image.TransformIndexToPhysicalPoint(i, j, k, point)
            np.testing.assert_allclose(point, scan.world_mm((k, j, i)), rtol=0, atol=1e-9)
    assert handedness == {1, -1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ascii_text", [False, True])
def test_files_of_vtks_own_writer_are_read_as_lps_identity(tmp_path, dtype, ascii_text):
    array = np.arange(3 * 4 * 5).reshape(3, 4, 5).astype(dtype)  # uint8 is what VTK writes as COLOR_SCALARS
    scan = read_volume(save_legacy(tmp_path / "a.vtk", image_with(array), ascii_text))
    assert scan.voxels.dtype == dtype
    np.testing.assert_array_equal(scan.voxels, array)
    assert scan.metadata["directions"] == "assumed LPS identity"
    np.testing.assert_array_equal(scan.world_mm((1, 2, 3)), [-7 + 6, 8 + 3, 90.25 + 3])


@pytest.mark.parametrize(("old", "new"), [(b"lvseg", b"lvsag"), (b"SPACE", b"SPADE"), (b"DIR=", b"DIP=")])
def test_a_damaged_title_of_ours_is_not_taken_for_another(tmp_path, old, new):
    path = write_volume(tilted(), tmp_path / "a.vtk")[0]
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    assert error_of(read_volume, path)[0] == "BAD_GEOMETRY"


def test_our_title_line_is_believed_and_said(tmp_path):
    assert read_volume(write_volume(tilted(), tmp_path / "a.vtk")[0]).metadata["directions"] == "title line"


def test_a_vti_whose_extent_starts_elsewhere_keeps_its_place(tmp_path):
    image = image_with(np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    image.SetExtent(10, 14, -3, 0, 7, 9)
    image.SetDirectionMatrix(0, 1, 0, -1, 0, 0, 0, 0, 1)
    writer = vtkXMLImageDataWriter()
    writer.SetFileName(str(tmp_path / "a.vti"))
    writer.SetInputData(image)
    writer.Write()
    point = [0.0, 0.0, 0.0]
    image.TransformIndexToPhysicalPoint(12, -1, 8, point)
    scan = read_volume(tmp_path / "a.vti")
    assert scan.voxels[1, 2, 2] == 32
    np.testing.assert_allclose(scan.world_mm((1, 2, 2)), point, atol=1e-12)


@pytest.mark.parametrize("mode", ["Ascii", "Binary", "Appended", "Raw"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("wide_and_big", [False, True])
def test_every_encoding_of_vti_is_read_and_none_when_cut_short(tmp_path, mode, compressed, wide_and_big, capfd):
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    writer = vtkXMLImageDataWriter()
    writer.SetFileName(str(tmp_path / "a.vti"))
    writer.SetInputData(image_with(array))
    getattr(writer, f"SetDataModeTo{mode.replace('Raw', 'Appended')}")()
    writer.SetEncodeAppendedData(mode != "Raw")
    writer.SetBlockSize(56)  # two whole blocks and a smaller one
    if wide_and_big:
        writer.SetHeaderTypeToUInt64()
        writer.SetByteOrderToBigEndian()
    if not compressed:
        writer.SetCompressorTypeToNone()
    writer.Write()
    np.testing.assert_array_equal(read_volume(tmp_path / "a.vti").voxels, array)
    assert_never_whole_when_cut((tmp_path / "a.vti").read_bytes().rstrip(), tmp_path / "cut.vti")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("ascii_text", [False, True])
def test_no_legacy_file_cut_short_gives_a_volume(tmp_path, ascii_text):
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    whole = save_legacy(tmp_path / "a.vtk", image_with(array), ascii_text).read_bytes()
    end = whole.find(b"METADATA") if b"METADATA" in whole else len(whole)
    assert_never_whole_when_cut(whole[: end - 1] if ascii_text else whole[: whole.find(b"default\n") + 8 + 120],
                                tmp_path / "cut.vtk")  # fmt: skip
    own = write_volume(volume(), tmp_path / "own.vtk")[0].read_bytes()
    assert_never_whole_when_cut(own, tmp_path / "cut.vtk")


def assert_never_whole_when_cut(whole: bytes, path: Path) -> None:
    for length in [*range(0, len(whole) - 1, CUT_STEP), len(whole) - 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        code, sentence = error_of(read_volume, path)
        assert code == "INPUT_TRUNCATED", (length, sentence)
        assert is_one_sentence_naming(sentence, path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=4))
@pytest.mark.parametrize("suffix", [".vtk", ".vti"])
def test_a_file_with_any_bytes_changed_is_read_or_refused_but_never_breaks(tmp_path, suffix, changes):
    content = bytearray(write_volume(volume(), tmp_path / f"good{suffix}")[0].read_bytes())
    for place, value in changes:
        content[int(place * len(content))] = value
    path = tmp_path / f"changed{suffix}"
    path.write_bytes(content)
    try:
        assert read_volume(path).voxels.size * 8 < 10 * len(content)
    except InputError as error:
        assert is_one_sentence_naming(error.sentence, path)


@pytest.mark.parametrize("sizes", [(2**31, 64, 0), (1, 0, 0), (0, 0, 0), (2, 210, 0), (1, 420, 419)])
def test_block_sizes_that_crash_vtks_own_reader_are_refused(tmp_path, sizes):
    path = write_volume(volume(), tmp_path / "a.vti")[0]
    content = bytearray(path.read_bytes())
    start = content.index(b"_", content.index(b"<AppendedData")) + 1
    content[start : start + 12] = np.array(sizes, "<u4").tobytes()
    path.write_bytes(content)
    assert error_of(read_volume, path)[0] == "INPUT_TRUNCATED"


def test_damaged_voxels_of_a_vti_are_an_error_and_vtk_prints_nothing(tmp_path, capfd):
    path = write_volume(volume(), tmp_path / "a.vti")[0]
    content = bytearray(path.read_bytes())
    start = content.index(b"_", content.index(b"<AppendedData")) + 1
    content[start + 16 : start + 40] = bytes(24)
    path.write_bytes(content)
    assert error_of(read_volume, path)[0] == "INPUT_TRUNCATED"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        (b'WholeExtent="0 6 0 5 0 4"', b'WholeExtent="0 6 0 5 0 9"', "UNSUPPORTED_FORMAT"),
        (b'Piece Extent="0 6 0 5 0 4"', b'Piece Extent="0 6 0 5 1 4"', "UNSUPPORTED_FORMAT"),
        (b'Extent="0 6 0 5 0 4"', b'Extent="0 6 0 5 0 9"', "INPUT_TRUNCATED"),
        (b'Extent="0 6 0 5 0 4"', b'Extent="0 6 0 5 0 999999999"', "DIMS_LIMIT"),
        (b'Extent="0 6 0 5 0 4"', b'Extent="0 6 0 5 0 9999999"', "INPUT_TRUNCATED"),
        (b'Extent="0 6 0 5 0 4"', b'Extent="0 6 0 5 0 -1"', "EMPTY_IMAGE"),
        (b"Int16", b"Int64", "INPUT_TRUNCATED"),
        (b"Int16", b"String", "UNSUPPORTED_PIXEL_TYPE"),
        (b'"Int16"', b'"Int16" NumberOfComponents="3"', "UNSUPPORTED_PIXEL_TYPE"),
        (b'Spacing="2 ', b'Spacing="-2 ', "BAD_GEOMETRY"),
        (b'Direction="-1 ', b'Direction="-3 ', "BAD_GEOMETRY"),
        (b"Direction=", b"Directlon=", "UNSUPPORTED_FORMAT"),
        (b"Spacing=", b"Spaclng=", "UNSUPPORTED_FORMAT"),
    ],
)
def test_a_vti_header_that_does_not_fit_its_voxels_is_refused(tmp_path, old, new, code, capfd):
    path = write_volume(volume(), tmp_path / "a.vti")[0]
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    assert error_of(read_volume, path)[0] == code
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["three components", "field before", "cells", "one number less"])
def test_a_vti_or_vtk_that_is_no_single_scan_is_refused(tmp_path, kind):
    path = tmp_path / "a.vtk"
    colours = image_with(np.zeros((3, 4, 5, 3), np.int16))
    text = save_legacy(path, image_with(np.zeros((3, 4, 5), np.int16))).read_bytes()
    if kind == "three components":
        save_legacy(path, colours)
    elif kind == "field before":
        path.write_bytes(text.replace(b"DIMENSIONS", b"FIELD FieldData 1\nx 1 9999999999 int\nDIMENSIONS"))
    elif kind == "cells":
        path.write_bytes(text.replace(b"POINT_DATA", b"CELL_DATA"))
    else:
        path.write_bytes(text.replace(b"POINT_DATA 60", b"POINT_DATA 59"))
    expected = "UNSUPPORTED_PIXEL_TYPE" if kind == "three components" else "UNSUPPORTED_FORMAT"
    assert error_of(read_volume, path)[0] == expected


def test_a_vti_as_text_holds_as_many_numbers_as_its_extent(tmp_path):
    writer = vtkXMLImageDataWriter()
    writer.SetFileName(str(tmp_path / "a.vti"))
    writer.SetInputData(image_with(np.full((3, 4, 5), 7, np.int16)))
    writer.SetDataModeToAscii()
    writer.Write()
    text = (tmp_path / "a.vti").read_text()
    assert " 7 7\n" in text
    for numbers, code in ((" 7\n", "INPUT_TRUNCATED"), (" 7 7 7\n", "DECOMPRESS_LIMIT"), (" 7 x\n", "INPUT_TRUNCATED")):
        (tmp_path / "b.vti").write_text(text.replace(" 7 7\n", numbers, 1))
        assert error_of(read_volume, tmp_path / "b.vti")[0] == code


def test_what_follows_the_scalars_is_not_read(tmp_path):
    path = write_volume(volume(), tmp_path / "a.vtk")[0]
    path.write_bytes(path.read_bytes() + b"\nFIELD FieldData 1\nhuge 1 999999999999 double\n")
    np.testing.assert_array_equal(read_volume(path).voxels, volume().canonical().voxels)


@pytest.mark.parametrize(("text", "code"), [("0 1 2 three", "INPUT_TRUNCATED"), ("0 1 2 300", "UNSUPPORTED_PIXEL_TYPE"),
                                            ("0 1 2 0.5", "UNSUPPORTED_PIXEL_TYPE")])  # fmt: skip
def test_ascii_numbers_that_do_not_fit_are_refused(tmp_path, text, code):
    path = tmp_path / "a.vtk"
    path.write_text(
        "# vtk DataFile Version 3.0\nx\nASCII\nDATASET STRUCTURED_POINTS\nDIMENSIONS 2 2 1\nSPACING 1 1 1\n"
        f"ORIGIN 0 0 0\nPOINT_DATA 4\nSCALARS a unsigned_char 1\nLOOKUP_TABLE default\n{text}\n"
    )
    assert error_of(read_volume, path)[0] == code
    path.write_text(path.read_text().replace(text, "0 1 2 255"))
    assert read_volume(path).voxels.ravel().tolist() == [0, 1, 2, 255]


@pytest.mark.skipif(not REAL_DATA, reason="LVSEG_REAL_DATA is not set")
def test_the_ct_series_lies_in_the_same_place_as_dicom_nifti_vtk_and_vti(tmp_path):
    scan = read_volume(Path(str(REAL_DATA)) / "ct_dicom_series")
    wanted = scan.canonical()
    index = np.stack(np.meshgrid(*[range(0, size, 5) for size in scan.shape], indexing="ij"), axis=-1)
    for suffix in (".nii.gz", ".nii", ".vtk", ".vti"):
        back = read_volume(write_volume(scan, tmp_path / f"a{suffix}")[0]).canonical()
        np.testing.assert_array_equal(back.voxels, wanted.voxels)
        np.testing.assert_allclose(back.world_mm(index), wanted.world_mm(index), rtol=0, atol=0.01)
        (tmp_path / f"a{suffix}").unlink()
