"""NIfTI in and out, against plain nibabel and SimpleITK."""

import gzip
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
from bad_files import bad_scans, error_of, is_one_sentence_naming, volume
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from lvseg.errors import InputError
from lvseg.formats import read_volume, stem, write_volume
from lvseg.volume import Volume

REAL_DATA = os.environ.get("LVSEG_REAL_DATA")
AFFINE_RAS = np.array([[-0.9, 0, 0, 40.1], [0, 1.1, 0, -33.3], [0, 0, 4.7, 512.6], [0, 0, 0, 1]]).astype(np.float32)
DTYPES = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64]


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE_RAS, image_class=nibabel.Nifti1Image) -> Path:
    image_class(array, affine, dtype=array.dtype).to_filename(path)
    return path


def load(path: Path) -> Any:
    """nibabel's own reading, whose type hints know no affine."""
    return nibabel.load(path)


def ramp(shape=(4, 5, 6), dtype=np.int16) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    return bad_scans(tmp_path_factory.mktemp("bad"))


def test_a_voxel_and_its_place_are_those_of_nibabel_with_x_and_y_reversed(tmp_path):
    path = save(tmp_path / "a.nii.gz", ramp())
    scan, image = read_volume(path), load(path)
    assert scan.shape == (6, 5, 4)
    for i, j, k in np.ndindex(4, 5, 6):
        assert scan.voxels[k, j, i] == image.dataobj[i, j, k]
        ras = nibabel.affines.apply_affine(image.affine, (i, j, k))
        np.testing.assert_allclose(scan.world_mm((k, j, i)), ras * [-1, -1, 1], atol=1e-9)


def test_a_mask_made_in_canonical_order_returns_on_the_grid_of_each_of_48_files(tmp_path):
    base = nibabel.Nifti1Image(ramp((4, 5, 6)), AFFINE_RAS)
    wanted = read_volume(save(tmp_path / "base.nii", ramp((4, 5, 6)))).canonical()
    flips = [np.array([[axis, sign] for axis, sign in zip(axes, signs, strict=True)])
             for axes in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
             for signs in np.array(np.meshgrid(*[[1, -1]] * 3)).reshape(3, -1).T]  # fmt: skip
    assert len(flips) == 48
    for orientation in flips:
        image = base.as_reoriented(orientation)
        path = tmp_path / "scan.nii.gz"
        image.to_filename(path)
        scan = read_volume(path)
        canonical = scan.canonical()
        np.testing.assert_array_equal(canonical.voxels, wanted.voxels)
        np.testing.assert_allclose(canonical.affine, wanted.affine, atol=1e-4)
        mask = scan.from_canonical((canonical.voxels % 3 == 0).astype(np.uint8))
        [written] = write_volume(mask, tmp_path / "mask.nii.gz")
        answer = load(written)
        loaded = load(path)
        assert answer.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(answer.affine, loaded.affine)
        np.testing.assert_array_equal(np.asarray(answer.dataobj), np.asarray(loaded.dataobj) % 3 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_images_keep_their_dtype_both_ways(tmp_path, dtype, suffix):
    first = read_volume(save(tmp_path / f"a{suffix}", ramp(dtype=dtype)))
    [path] = write_volume(first, tmp_path / f"b{suffix}")
    second = read_volume(path)
    assert first.voxels.dtype == second.voxels.dtype == np.asarray(load(path).dataobj).dtype == dtype
    np.testing.assert_array_equal(first.voxels, second.voxels)


def test_big_endian_files_are_read_as_the_same_numbers(tmp_path):
    header = nibabel.Nifti1Header(endianness=">")
    nibabel.Nifti1Image(ramp().astype(">i2"), AFFINE_RAS, header).to_filename(tmp_path / "big.nii")
    assert (tmp_path / "big.nii").read_bytes()[:4] == b"\x00\x00\x01\x5c"
    scan = read_volume(tmp_path / "big.nii")
    assert scan.voxels.dtype.isnative
    np.testing.assert_array_equal(scan.voxels, ramp().T)


def test_nifti_2_returns_as_nifti_2_with_its_affine_to_the_last_bit(tmp_path):
    affine = AFFINE_RAS.astype(np.float64) + np.array([[0, 0, 0, 1 / 3]] * 3 + [[0] * 4])
    path = save(tmp_path / "a.nii.gz", ramp(), affine, nibabel.Nifti2Image)
    scan = read_volume(path)
    assert scan.metadata["format"] == "NIfTI-2"
    answer = load(write_volume(scan, tmp_path / "b.nii.gz")[0])
    assert isinstance(answer, nibabel.Nifti2Image)
    np.testing.assert_array_equal(answer.affine, affine)


def test_slope_and_intercept_are_applied_as_float32(tmp_path):
    image = nibabel.Nifti1Image(ramp(), AFFINE_RAS)
    image.header.set_slope_inter(0.25, -3)
    image.to_filename(tmp_path / "a.nii")
    scan = read_volume(tmp_path / "a.nii")
    assert scan.voxels.dtype == np.float32
    np.testing.assert_array_equal(scan.voxels, np.asarray(load(tmp_path / "a.nii").dataobj).T.astype("f4"))
    assert len(np.unique(scan.voxels)) > 20


def test_trailing_axes_of_length_one_are_no_further_volumes(tmp_path):
    scan = read_volume(save(tmp_path / "a.nii", ramp()[..., None, None]))
    np.testing.assert_array_equal(scan.voxels, ramp().T)


def test_written_files_say_scanner_coordinates_in_millimetres(tmp_path):
    header = load(write_volume(volume(), tmp_path / "a.nii.gz")[0]).header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    assert header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(header.get_qform(), header.get_sform(), atol=1e-4)


def test_a_pixdim_that_contradicts_an_sform_is_refused_however_the_axes_lean(tmp_path):
    """0.17 degrees off a right angle, which counts as a rounded one, is not off by so much that nothing is compared."""
    affine = np.diag([1.0, 1.0, 10.0, 1.0])
    affine[0, 2] = 0.03
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), affine)
    image.set_sform(affine, code=1)
    image.set_qform(None, code=0, update_affine=False)
    image.header["pixdim"][1] = 1.2
    path = tmp_path / "scan.nii"
    with path.open("wb") as file:
        file.write(image.header.binaryblock + bytes(4) + image.get_fdata().astype(np.int16).tobytes())
    assert error_of(read_volume, path)[0] == "GEOMETRY_AMBIGUOUS"


def test_qform_alone_is_believed(tmp_path):
    image = nibabel.Nifti1Image(ramp(), AFFINE_RAS)
    image.set_qform(AFFINE_RAS, code=1)
    image.set_sform(None, code=0)
    image.to_filename(tmp_path / "a.nii")
    scan = read_volume(tmp_path / "a.nii")
    expected = load(tmp_path / "a.nii").affine
    np.testing.assert_allclose(scan.affine[:, [2, 1, 0, 3]], np.diag([-1, -1, 1, 1]) @ expected, atol=1e-12)


@pytest.mark.parametrize(("moved_mm", "accepted"), [(0.05, True), (0.15, False)])
def test_forms_may_differ_by_a_tenth_of_the_smallest_spacing(tmp_path, moved_mm, accepted):
    image = nibabel.Nifti1Image(ramp(), np.diag([-1.0, 1, 3, 1]))
    moved = np.diag([-1.0, 1, 3, 1])
    moved[0, 3] = moved_mm
    image.set_sform(np.diag([-1.0, 1, 3, 1]), code=2)
    image.set_qform(moved, code=1)
    image.to_filename(tmp_path / "a.nii")
    if accepted:
        assert read_volume(tmp_path / "a.nii").affine[0, 3] == 0
    else:
        assert error_of(read_volume, tmp_path / "a.nii")[0] == "GEOMETRY_AMBIGUOUS"


rotations = st.tuples(*[st.floats(-180, 180)] * 3).map(lambda a: Rotation.from_euler("xyz", a, degrees=True))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rotation=rotations,
    spacing_mm=st.tuples(*[st.floats(0.3, 12)] * 3),
    offset_mm=st.tuples(*[st.floats(-900, 900)] * 3),
    shear=st.floats(-0.004, 0.004),
    shape=st.tuples(*[st.integers(1, 40)] * 3),
)
def test_what_is_written_is_read_back_in_the_same_place(tmp_path, rotation, spacing_mm, offset_mm, shear, shape):
    affine = np.eye(4)
    affine[:3, :3] = rotation.as_matrix() @ np.array([[1, shear, 0], [0, 1, 0], [0, 0, 1]]) * spacing_mm
    affine[:3, 3] = offset_mm
    scan = Volume(np.zeros(shape, np.uint8), affine)
    back = read_volume(write_volume(scan, tmp_path / "a.nii")[0])
    assert back.shape == scan.shape
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)
    np.testing.assert_allclose(back.world_mm(corners), scan.world_mm(corners), atol=1e-3)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rotation=rotations)
def test_simpleitk_finds_every_voxel_at_the_same_point(tmp_path, rotation):
    scan = volume()
    affine = scan.affine.copy()
    affine[:3, :3] = rotation.as_matrix() @ affine[:3, :3]
    scan = Volume(scan.voxels, affine)
    image = SimpleITK.ReadImage(str(write_volume(scan, tmp_path / "a.nii.gz")[0]))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image), scan.voxels)
    for k, j, i in np.ndindex(scan.shape):
        point = image.TransformIndexToPhysicalPoint((i, j, k))
        np.testing.assert_allclose(point, scan.world_mm((k, j, i)), atol=1e-3)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_no_file_cut_short_gives_a_volume(tmp_path, suffix):
    whole = save(tmp_path / f"whole{suffix}", ramp()).read_bytes()
    path = tmp_path / f"cut{suffix}"
    for length in [*range(0, 360, 7), *range(360, len(whole), 11), len(whole) - 1]:
        if length < len(whole):
            path.write_bytes(whole[:length])
            code, sentence = error_of(read_volume, path)
            assert code in ("INPUT_TRUNCATED", "UNSUPPORTED_FORMAT"), length
            assert code == "INPUT_TRUNCATED" or length < 4
            assert is_one_sentence_naming(sentence, path)


def test_a_gzip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "bomb.nii.gz"
    small = save(tmp_path / "small.nii", ramp()).read_bytes()
    path.write_bytes(gzip.compress(small + bytes(64 * 1024**2)))
    tracemalloc.start()
    assert error_of(read_volume, path)[0] == "DECOMPRESS_LIMIT"
    assert tracemalloc.get_traced_memory()[1] < 4 * 1024**2
    tracemalloc.stop()


def test_a_header_that_claims_more_than_gzip_can_hold_is_refused_before_memory_is_taken(tmp_path):
    header = nibabel.Nifti1Header()
    header.set_data_shape((1000, 1000, 1000))
    header.set_data_dtype(np.uint8)
    header.set_sform(np.eye(4), code=1)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    path = tmp_path / "liar.nii.gz"
    path.write_bytes(gzip.compress(header.binaryblock + bytes(1000)))
    assert error_of(read_volume, path)[0] == "INPUT_TRUNCATED"


def test_each_bad_file_gives_its_code_and_one_sentence_with_its_name(bad, capfd):
    for kind, (path, expected) in bad.items():
        code, sentence = error_of(read_volume, path)
        assert code == expected, (kind, sentence)
        assert is_one_sentence_naming(sentence, path), sentence
    assert capfd.readouterr() == ("", "")


def test_metres_are_not_taken_for_millimetres(tmp_path):
    image = nibabel.Nifti1Image(ramp(), AFFINE_RAS)
    image.header.set_xyzt_units("meter")
    image.to_filename(tmp_path / "a.nii")
    assert error_of(read_volume, tmp_path / "a.nii")[0] == "BAD_GEOMETRY"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_header_with_any_bytes_changed_is_read_or_refused_but_never_breaks(tmp_path, changes):
    content = bytearray(save(tmp_path / "good.nii", ramp()).read_bytes())
    for position, value in changes:
        content[position] = value
    (tmp_path / "changed.nii").write_bytes(content)
    try:
        assert read_volume(tmp_path / "changed.nii").voxels.size * 2 <= len(content)
    except InputError as error:
        assert is_one_sentence_naming(error.sentence, tmp_path / "changed.nii")


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from lvseg.formats import write_volume
from lvseg.volume import Volume
mask = np.zeros((20, 50, 50), np.uint8)
mask[5:15, 15:35, 15:35] = 1  # packs to a kilobyte, which waits in a writer's buffer until the file is closed
scan, path, limit = Volume(mask, np.eye(4)), Path(sys.argv[1]), resource.RLIMIT_FSIZE
write_volume(scan, path)
whole = path.stat().st_size
path.unlink()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for room in (whole - 1, whole // 2, 1):
    resource.setrlimit(limit, (room, resource.getrlimit(limit)[1]))
    try:
        write_volume(scan, path)
        sys.exit(f"written with room for {room} of {whole} bytes")
    except OSError:
        pass
"""


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".vti", ".vtk"])
def test_a_file_that_does_not_fit_is_an_error_and_leaves_nothing(tmp_path, suffix):
    """A limit on the size of files stands for a full disk."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / f"liver{suffix}")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_writing_to_an_unknown_suffix_names_the_valid_ones(tmp_path):
    code, sentence = error_of(lambda path: write_volume(volume(), path), tmp_path / "a.png")
    assert code == "UNSUPPORTED_FORMAT"
    assert all(suffix in sentence for suffix in (".nii.gz", ".nii", ".vtk", ".vti"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".nii.gz", ".vtk", ".vti"])
def test_a_dtype_that_the_format_lacks_is_refused_and_leaves_nothing(tmp_path, suffix):
    half = volume().with_voxels(np.zeros((5, 6, 7), np.float16))
    assert error_of(lambda path: write_volume(half, path), tmp_path / f"a{suffix}")[0] == "UNSUPPORTED_PIXEL_TYPE"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".vtk", ".vti"])
def test_truth_values_are_written_as_uint8(tmp_path, suffix):
    mask = volume().with_voxels(volume().voxels > 0)
    back = read_volume(write_volume(mask, tmp_path / f"a{suffix}")[0])
    assert back.voxels.dtype == np.uint8
    np.testing.assert_array_equal(back.canonical().voxels, mask.canonical().voxels)


@pytest.mark.parametrize("name", ["scan", "scan.nii.gz", "scan.vtk", "scan.vti", "scan.dcm"])
@pytest.mark.parametrize("kind", ["pipe", "link to a device"])
def test_what_is_neither_file_nor_folder_is_refused_and_never_waited_for(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    code, sentence = error_of(read_volume, path)
    assert code == "NOT_READABLE"
    assert is_one_sentence_naming(sentence, path)


def test_stem_is_the_name_without_the_suffixes_of_scans(tmp_path):
    (tmp_path / "series.v2").mkdir()
    names = ["liver.nii.gz", "liver.NII", "liver.vtk", "liver.vti", "liver.dcm", "liver"]
    assert {stem(tmp_path / name) for name in names} == {"liver"}
    assert stem(tmp_path / "a.b.nii.gz") == "a.b"
    assert stem(tmp_path / "series.v2") == "series.v2"


@pytest.mark.skipif(not REAL_DATA, reason="LVSEG_REAL_DATA is not set")
def test_the_real_labels_come_back_as_plain_nibabel_has_them(tmp_path):
    path = Path(str(REAL_DATA)) / "ct_dicom_series_organs.nii.gz"
    scan, image = read_volume(path), load(path)
    assert nibabel.aff2axcodes(image.affine) == ("L", "A", "S")
    mask = scan.from_canonical((scan.canonical().voxels == 5).astype(np.uint8))
    answer = load(write_volume(mask, tmp_path / "liver.nii.gz")[0])
    np.testing.assert_array_equal(answer.affine, image.affine)
    np.testing.assert_array_equal(np.asarray(answer.dataobj), np.asarray(image.dataobj) == 5)
