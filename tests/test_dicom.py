"""DICOM series in: synthesised ones with every trap, and the real ones where they are."""

import errno
import itertools
import json
import os
import random
import stat
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
import SimpleITK
from bad_files import error_of, is_one_sentence_naming
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    HEVCMP51,
    UID,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    GrayscaleSoftcopyPresentationStateStorage,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    MediaStorageDirectoryStorage,
    MRImageStorage,
    RLELossless,
    generate_uid,
)
from scipy.spatial.transform import Rotation

from lvseg import predict, waterfat
from lvseg.errors import InputError
from lvseg.formats import archive, read_volume, write_volume
from serving import protocol, scans, worker
from serving.errors import ClientError

REAL_DATA = os.environ.get("LVSEG_REAL_DATA")
real_data = pytest.mark.skipif(not REAL_DATA, reason="LVSEG_REAL_DATA is not set")
SERIES = "1.2.826.0.1.3680043.8.498.1"
DISTANCE_MM = 2.5
AXIAL = np.eye(3)
ROWS, COLUMNS = 36, 33  # the JPEG 2000 encoder takes nothing under 32
# pydicom refuses to write some of the faults below unless it is told that they are meant.
pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE


def slice_of(index: int, rotation: np.ndarray = AXIAL, dtype=np.int16) -> Dataset:
    """Slice number `index` of a series, 1.5 x 1.25 mm, 2.5 mm apart, SliceThickness a lie."""
    pixels = np.random.default_rng(index).integers(0, 2000, (ROWS, COLUMNS)).astype(dtype)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = MRImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = UID(f"{SERIES}.{index + 1}")
    dataset.PatientName = "Secret^Name"
    dataset.Modality, dataset.SeriesDescription = "MR", "t1 axial"
    dataset.Manufacturer, dataset.ManufacturerModelName, dataset.MagneticFieldStrength = "Maker", "Model 1", "1.5"
    dataset.StudyInstanceUID = dataset.SeriesInstanceUID = SERIES
    dataset.SeriesNumber, dataset.InstanceNumber = 4, 100 - index
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.SliceThickness = 7
    dataset.ImageOrientationPatient = [round(float(c), 9) for c in [*rotation[:, 0], *rotation[:, 1]]]
    position = np.array([-30.0, 20, 100]) + index * DISTANCE_MM * rotation[:, 2]
    dataset.ImagePositionPatient = [round(float(mm), 6) for mm in position]
    dataset.PixelSpacing = [1.5, 1.25]
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


def save(folder: Path, datasets, seed: int = 0) -> Path:
    """Writes the series under shuffled names."""
    folder.mkdir(exist_ok=True)
    datasets = list(datasets)
    names = [f"IM{number:04d}" for number in range(len(datasets))]
    random.Random(seed).shuffle(names)
    for name, dataset in zip(names, datasets, strict=True):
        dataset.save_as(folder / name, enforce_file_format=True)
    return folder


def pixels_of(count: int) -> np.ndarray:
    return np.stack([np.random.default_rng(index).integers(0, 2000, (ROWS, COLUMNS)) for index in range(count)])


def test_slices_lie_where_their_positions_say_whatever_their_names_numbers_and_thickness(tmp_path):
    scan = read_volume(save(tmp_path / "scan", [slice_of(index) for index in range(6)]))
    names = [f"IM{number:04d}" for number in range(6)]
    random.Random(0).shuffle(names)
    assert scan.voxels.dtype == np.int16
    assert scan.spacing_mm == (2.5, 1.5, 1.25)
    np.testing.assert_array_equal(scan.voxels, pixels_of(6))
    np.testing.assert_allclose(scan.world_mm((3, 4, 5)), [-30 + 5 * 1.25, 20 + 4 * 1.5, 100 + 3 * 2.5])
    assert scan.metadata == {
        "modality": "MR",
        "series_description": "t1 axial",
        "manufacturer": "Maker",
        "manufacturer_model": "Model 1",
        "software_versions": "",
        "field_strength_t": 1.5,
        "series_instance_uid": SERIES,
        "series_number": "4",
        "image_type": ["ORIGINAL", "PRIMARY"],
        "sequence_name": "",
        "repetition_time_ms": None,
        "flip_angle_deg": None,
        "echo_times_ms": [],
        "rescale_type": "",
        "units": "",
        "real_world_values": [],
        "signal_scale": None,
        "slice_warnings": [],
        "slice_distance_source": "positions",
        "slice_files": tuple(names),
        "format": "DICOM",
    }


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(angles=st.tuples(*[st.floats(-180, 180)] * 3), seed=st.integers(0, 99))
def test_an_oblique_series_agrees_with_simpleitk_and_with_what_is_written_of_it(tmp_path, angles, seed):
    rotation = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    folder = save(tmp_path / "scan", [slice_of(index, rotation) for index in range(4)], seed)
    scan = read_volume(folder)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image), scan.voxels)
    index = list(itertools.product((0, 3), (0, ROWS - 1), (0, COLUMNS - 1)))
    points = [image.TransformIndexToPhysicalPoint(one[::-1]) for one in index]
    np.testing.assert_allclose(scan.world_mm(index), points, atol=1e-3)
    wanted = scan.canonical()
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(wanted.shape) - 1)
    for suffix in (".nii.gz", ".vtk", ".vti"):
        back = read_volume(write_volume(scan, tmp_path / f"a{suffix}")[0]).canonical()
        np.testing.assert_array_equal(back.voxels, wanted.voxels)
        np.testing.assert_allclose(back.world_mm(corners), wanted.world_mm(corners), atol=0.01)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_other_native_syntaxes_hold_the_same_numbers(tmp_path, syntax):
    folder = tmp_path / "scan"
    folder.mkdir()
    for index in range(3):
        dataset = slice_of(index)
        dataset.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes()
        pydicom.dcmwrite(folder / str(index), dataset, enforce_file_format=True)
    np.testing.assert_array_equal(read_volume(folder).voxels, pixels_of(3))


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
def test_compressed_pixels_are_the_same_numbers(tmp_path, syntax, dtype):
    datasets = [slice_of(index, dtype=dtype) for index in range(3)]
    for dataset in datasets:
        dataset.compress(syntax, generate_instance_uid=False)
    scan = read_volume(save(tmp_path / "scan", datasets))
    np.testing.assert_array_equal(scan.voxels, pixels_of(3))


@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"),
    [(1, -1024, np.int16), (2, 0, np.int16), (0.5, 0, np.float32), (1, 0.5, np.float32), (1, 40000, np.float32)],
)
def test_rescaled_values_are_int16_where_that_loses_nothing_else_float32(tmp_path, slope, intercept, dtype):
    datasets = [slice_of(index) for index in range(3)]
    for dataset in datasets:
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
    scan = read_volume(save(tmp_path / "scan", datasets))
    assert scan.voxels.dtype == dtype
    np.testing.assert_array_equal(scan.voxels, pixels_of(3) * slope + intercept)


def test_each_slice_has_its_own_slope(tmp_path):
    datasets = [slice_of(index) for index in range(3)]
    for index, dataset in enumerate(datasets):
        dataset.RescaleSlope, dataset.RescaleIntercept = index + 1, 0
    scan = read_volume(save(tmp_path / "scan", datasets))
    np.testing.assert_array_equal(scan.voxels, pixels_of(3) * np.array([1, 2, 3])[:, None, None])


def test_overlays_in_unused_bits_do_not_leak_into_the_pixels(tmp_path):
    datasets = [slice_of(index, dtype=np.uint16) for index in range(3)]
    for dataset in datasets:
        dataset.BitsStored, dataset.HighBit = 12, 11
        dataset.PixelData = (np.frombuffer(dataset.PixelData, np.uint16) | 0x5000).tobytes()
    np.testing.assert_array_equal(read_volume(save(tmp_path / "scan", datasets)).voxels, pixels_of(3))


@pytest.mark.parametrize("high_bits", [0, 0x5000, 0xF000])
def test_signed_values_of_twelve_bits_keep_their_sign_whatever_the_other_four_hold(tmp_path, high_bits):
    values = pixels_of(1)[0] - 1000
    dataset = slice_of(0)
    dataset.BitsStored, dataset.HighBit = 12, 11
    dataset.PixelData = ((values.astype(np.int16).view(np.uint16) & 0x0FFF) | high_bits).astype(np.uint16).tobytes()
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.dcm").voxels[0], values)


def test_other_files_and_a_dicomdir_are_passed_over_and_a_lone_folder_is_entered(tmp_path):
    folder = save(tmp_path / "scan", [slice_of(index) for index in range(3)])
    (folder / "README.txt").write_text("notes " * 50)
    directory = slice_of(0)
    directory.file_meta.MediaStorageSOPClassUID = directory.SOPClassUID = MediaStorageDirectoryStorage
    directory.save_as(folder / "DICOMDIR", enforce_file_format=True)
    np.testing.assert_array_equal(read_volume(tmp_path).voxels, pixels_of(3))


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "broken link"])
def test_a_series_with_a_member_that_is_no_file_is_refused(tmp_path, kind):
    folder = save(tmp_path / "series", [slice_of(index) for index in range(3)])
    member = folder / "extra.dcm"
    if kind == "pipe":
        os.mkfifo(member)
    else:
        member.symlink_to("/dev/zero" if kind == "link to a device" else tmp_path / "gone.dcm")
    code, sentence = error_of(read_volume, folder)
    assert code == "NOT_READABLE"
    assert is_one_sentence_naming(sentence, member)


@pytest.mark.parametrize("kind", ["link to a folder", "deep"])
def test_slices_in_a_folder_that_is_not_entered_are_not_left_out(tmp_path, kind):
    folder = save(tmp_path / "series", [slice_of(index) for index in range(3)])
    if kind == "deep":
        rest = folder.joinpath(*"12345678", "9")
        rest.mkdir(parents=True)
    else:
        rest = tmp_path / "elsewhere"
        (folder / "rest").symlink_to(rest)
    save(rest, [slice_of(index) for index in range(3, 6)])
    member = rest if kind == "deep" else folder / "rest"
    code, sentence = error_of(read_volume, folder)
    assert code == "NOT_READABLE"
    assert is_one_sentence_naming(sentence, member)
    with pytest.raises(ClientError) as refused:
        scans.files_of(folder)
    assert refused.value.code == "NOT_READABLE"
    assert is_one_sentence_naming(refused.value.sentence, member)


def test_one_file_of_any_name_is_a_scan_of_one_slice(tmp_path):
    dataset = slice_of(2)
    dataset.save_as(tmp_path / "IM0001", enforce_file_format=True)
    scan = read_volume(tmp_path / "IM0001")
    assert scan.spacing_mm[0] == 7
    assert scan.metadata["slice_distance_source"] == "SliceThickness"
    dataset.SpacingBetweenSlices = 8
    dataset.save_as(tmp_path / "IM0001", enforce_file_format=True)
    scan = read_volume(tmp_path / "IM0001")
    assert scan.spacing_mm[0] == 8
    assert scan.metadata["slice_distance_source"] == "SpacingBetweenSlices"
    del dataset.SpacingBetweenSlices, dataset.SliceThickness
    dataset.save_as(tmp_path / "IM0001", enforce_file_format=True)
    assert error_of(read_volume, tmp_path / "IM0001")[0] == "BAD_GEOMETRY"


def enhanced(own: bool) -> Dataset:
    """The series as one Enhanced object, frames out of order; orientation and spacing per frame, or shared by all."""
    order = [2, 0, 1]
    dataset = slice_of(0)
    dataset.NumberOfFrames = 3
    dataset.PixelData = pixels_of(3)[order].astype(np.int16).tobytes()
    frames, shared = [], Dataset()
    for index in order:
        frame, plane, scale = Dataset(), Dataset(), Dataset()
        plane.ImagePositionPatient = slice_of(index).ImagePositionPatient
        frame.PlanePositionSequence = [plane]
        scale.RescaleSlope, scale.RescaleIntercept = index + 1, 0
        frame.PixelValueTransformationSequence = [scale]
        frames.append(frame)
    for target in frames if own else [shared]:
        measures, orientation = Dataset(), Dataset()
        measures.PixelSpacing, measures.SliceThickness = [1.5, 1.25], 7
        orientation.ImageOrientationPatient = dataset.ImageOrientationPatient
        target.PixelMeasuresSequence, target.PlaneOrientationSequence = [measures], [orientation]
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(dataset, keyword)
    dataset.PerFrameFunctionalGroupsSequence, dataset.SharedFunctionalGroupsSequence = frames, [shared]
    return dataset


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_frames_of_an_enhanced_object_lie_where_their_groups_say(tmp_path, own, compressed):
    dataset = enhanced(own)
    if compressed:
        dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    scan = read_volume(tmp_path / "a.dcm")
    assert scan.spacing_mm == (2.5, 1.5, 1.25)
    np.testing.assert_array_equal(scan.voxels, pixels_of(3) * np.array([1, 2, 3])[:, None, None])
    np.testing.assert_allclose(scan.world_mm((2, 0, 0)), [-30, 20, 105])


def test_a_makers_own_groups_of_a_frame_do_not_count(tmp_path):
    dataset = enhanced(own=False)
    for frame in dataset.PerFrameFunctionalGroupsSequence:  # as Philips repeats elements of classic images
        own = Dataset()
        own.PixelSpacing, own.SliceThickness, own.ImageOrientationPatient = [3, 3], 1, [1, 0, 0, 0, 0, -1]
        frame.private_block(0x2005, "Philips MR Imaging DD 005", create=True).add_new(0x0F, "SQ", [own])
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    scan = read_volume(tmp_path / "a.dcm")
    assert scan.spacing_mm == (2.5, 1.5, 1.25)
    np.testing.assert_allclose(scan.world_mm((0, 1, 0)), [-30, 21.5, 100])


def without(keyword: str):
    def change(datasets):
        for dataset in datasets:
            delattr(dataset, keyword)

    return change


def with_one(**values):
    def change(datasets):
        for keyword, value in values.items():
            setattr(datasets[1], keyword, value)

    return change


def with_all(**values):
    def change(datasets):
        for dataset in datasets:
            for keyword, value in values.items():
                setattr(dataset, keyword, value)

    return change


def with_colours(datasets):
    for dataset in datasets:
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
        dataset.PixelData = dataset.PixelData * 3


def with_tilt(datasets):
    for index, dataset in enumerate(datasets):
        dataset.ImagePositionPatient = [-30, 20 + index, 100 + index * DISTANCE_MM]


def with_a_jump(datasets):
    datasets[1].ImagePositionPatient = [-29, 20, 102.5]


def with_other_size(datasets):
    datasets[1].Rows, datasets[1].Columns = COLUMNS, ROWS


def with_unknown_codec(datasets):
    datasets[0].compress(RLELossless, generate_instance_uid=False)
    datasets[0].file_meta.TransferSyntaxUID = HEVCMP51


FAULTS = {
    "two series": (with_one(SeriesInstanceUID=generate_uid(), SeriesDescription="scout"), "MULTIPLE_SERIES", "scout"),
    "missing slice": (
        lambda datasets: datasets.pop(2),
        "MISSING_SLICES",
        "102.50 to 107.50 mm along the normal (missing: 105.00 mm)",
    ),
    "doubled slice": (with_one(ImagePositionPatient=[-30, 20, 105]), "MISSING_SLICES", "105.00"),
    "uneven slice": (with_one(ImagePositionPatient=[-30, 20, 103]), "MISSING_SLICES", "100.00 to 103.00"),
    "other size": (with_other_size, "INCONSISTENT_SERIES", "rows"),
    "other orientation": (with_one(ImageOrientationPatient=[0, 1, 0, 1, 0, 0]), "INCONSISTENT_SERIES", "Orientation"),
    "other spacing": (with_one(PixelSpacing=[1.5, 1.3]), "INCONSISTENT_SERIES", "PixelSpacing"),
    "localiser among them": (
        with_one(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        "MULTIPLE_SERIES",
        "LOCALIZER",
    ),
    "gantry tilt": (with_tilt, "BAD_GEOMETRY", "tilted by 21.80 degrees"),
    "table jump": (with_a_jump, "BAD_GEOMETRY", "straight"),
    "no position": (without("ImagePositionPatient"), "BAD_GEOMETRY", "ImagePositionPatient"),
    "no orientation": (without("ImageOrientationPatient"), "BAD_GEOMETRY", "ImageOrientationPatient"),
    "no pixel spacing": (without("PixelSpacing"), "BAD_GEOMETRY", "PixelSpacing"),
    "zero pixel spacing": (with_all(PixelSpacing=[0, 1]), "BAD_GEOMETRY", "spacing"),
    "no unit vectors": (with_all(ImageOrientationPatient=[1, 0, 0, 0, 2, 0]), "BAD_GEOMETRY", "Orientation"),
    "no pixels": (without("PixelData"), "NO_PIXELS", "PixelData"),
    "colours": (with_colours, "UNSUPPORTED_PIXEL_TYPE", "RGB"),
    "mosaic": (with_all(ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), "UNSUPPORTED_FORMAT", "mosaic"),
    "inverted grey": (with_all(PhotometricInterpretation="MONOCHROME1"), "UNSUPPORTED_PIXEL_TYPE", "MONOCHROME1"),
    "lookup table": (with_all(ModalityLUTSequence=[Dataset()]), "UNSUPPORTED_PIXEL_TYPE", "LUT"),
    "frames without geometry": (with_one(NumberOfFrames=2, Rows=ROWS // 2), "UNSUPPORTED_FORMAT", "frames"),
    "no codec": (with_unknown_codec, "UNSUPPORTED_TRANSFER_SYNTAX", "HEVC"),
    "pixels short of the header": (with_all(Rows=ROWS + 1), "INPUT_TRUNCATED", "bytes"),
    "huge sizes": (with_all(Rows=65535, Columns=65535), "INPUT_TRUNCATED", "bytes"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_series_with_a_fault_gives_its_code_and_one_sentence_with_its_name(tmp_path, kind, capfd):
    break_it, expected, word = FAULTS[kind]
    datasets = [slice_of(index) for index in range(5)]
    break_it(datasets)
    folder = save(tmp_path / "the_scan", datasets)
    code, sentence = error_of(read_volume, folder)
    assert code == expected, sentence
    assert word in sentence
    assert "the_scan" in sentence
    assert sentence.startswith("Expected ")
    assert sentence.endswith(".")
    assert "Secret" not in sentence
    assert SERIES not in sentence
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless, JPEG2000Lossless])
def test_no_file_cut_short_gives_a_volume(tmp_path, syntax):
    dataset = slice_of(0)
    if syntax.is_compressed:
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(tmp_path / "whole", dataset, enforce_file_format=True)
    whole = (tmp_path / "whole").read_bytes()
    folder = tmp_path / "scan"
    folder.mkdir()
    for length in [*range(0, len(whole), 7), *range(len(whole) - 12, len(whole))]:
        (folder / "IM1").write_bytes(whole[:length])
        code, _ = error_of(read_volume, folder)
        assert code in ("INPUT_TRUNCATED", "NO_PIXELS", "UNSUPPORTED_TRANSFER_SYNTAX"), length
        if length > len(whole) - 100:
            assert code == "INPUT_TRUNCATED", length


def test_a_jpeg_2000_image_cut_short_inside_a_whole_file_is_refused(tmp_path):
    dataset = slice_of(0)
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    [frame] = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
    dataset.PixelData = pydicom.encaps.encapsulate([frame[: len(frame) * 2 // 3]])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert error_of(read_volume, tmp_path / "a.dcm")[0] == "INPUT_TRUNCATED"


def test_a_jpeg_2000_image_larger_than_its_header_says_is_not_decoded(tmp_path):
    dataset = slice_of(0)
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    [frame] = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
    bomb = frame[:8] + (60000).to_bytes(4, "big") * 2 + frame[16:]
    dataset.PixelData = pydicom.encaps.encapsulate([bomb])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    code, sentence = error_of(read_volume, tmp_path / "a.dcm")
    assert code == "INCONSISTENT_SERIES"
    assert "60000" in sentence


def test_a_slice_that_lost_its_content_is_not_passed_over(tmp_path):
    folder = save(tmp_path / "scan", [slice_of(index) for index in range(3)])
    (folder / "IM0002").write_bytes(b"")
    code, sentence = error_of(read_volume, folder)
    assert code == "INPUT_TRUNCATED"
    assert "IM0002" in sentence


def test_a_series_whose_anonymiser_emptied_the_uids_is_one_series(tmp_path):
    datasets = [slice_of(index) for index in range(3)]
    for dataset in datasets:
        dataset.SeriesInstanceUID = ""
    np.testing.assert_array_equal(read_volume(save(tmp_path / "scan", datasets)).voxels, pixels_of(3))
    datasets[0].SeriesDescription = "another"
    code, sentence = error_of(read_volume, save(tmp_path / "scan", datasets))
    assert code == "MULTIPLE_SERIES"
    assert "'another' number 4" in sentence
    assert "'t1 axial' number 4" in sentence


def test_a_folder_without_dicom_is_not_a_scan(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here " * 20)
    code, sentence = error_of(read_volume, tmp_path)
    assert code == "NOT_FOUND"
    assert is_one_sentence_naming(sentence, tmp_path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(132, 900), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_file_with_any_bytes_changed_is_read_or_refused_but_never_breaks(tmp_path, changes):
    slice_of(0).save_as(tmp_path / "good", enforce_file_format=True)
    content = bytearray((tmp_path / "good").read_bytes())
    for position, value in changes:
        content[position] = value
    (tmp_path / "changed.dcm").write_bytes(content)
    try:
        assert read_volume(tmp_path / "changed.dcm").voxels.size * 2 <= len(content)
    except InputError as error:
        assert "changed.dcm" in error.sentence


def dixon(count: int = 3, **more) -> list[Dataset]:
    """One series as Philips makes it: water, fat, in-phase and opposed-phase images told apart by their image type."""
    datasets = []
    for number, word in enumerate(("W", "F", "IP", "OP")):
        for index in range(count):
            dataset = slice_of(index)
            dataset.SOPInstanceUID = f"{SERIES}.{number}.{index}"
            dataset.ImageType = ["DERIVED", "PRIMARY", word, word, "DERIVED"]
            dataset.SeriesNumber, dataset.SeriesDescription = 12, "t1/mDIXON"
            dataset.EchoTime = 2.3 if word == "OP" else 4.6
            dataset.PixelData = (pixels_of(count)[index] + 1000 * number).astype(np.int16).tobytes()
            for keyword, value in more.items():
                setattr(dataset, keyword, value)
            datasets.append(dataset)
    return datasets


def test_a_series_of_several_stacks_is_refused_with_a_list_that_names_what_chooses_each(tmp_path):
    folder = save(tmp_path / "scan", dixon())
    code, sentence = error_of(read_volume, folder)
    assert code == "MULTIPLE_SERIES"
    for part in ("4 in", "'t1/mDIXON' number 12", "'W,TE4.6' with 3 slices", "'OP,TE2.3' with 3 slices"):
        assert part in sentence
    assert "Secret" not in sentence
    assert is_one_sentence_naming(sentence, folder)


@pytest.mark.parametrize(
    ("choice", "number"),
    [("W", 0), ("12/F", 1), ("12/ip", 2), ("t1/mDIXON/OP", 3), ("12/TE2.3", 3), ("12/IP,TE4.6", 2), ("/W", 0)],
)
def test_a_stack_is_chosen_by_its_words(tmp_path, choice, number):
    scan = read_volume(save(tmp_path / "scan", dixon()), series=choice)
    np.testing.assert_array_equal(scan.voxels, pixels_of(3) + 1000 * number)
    assert scan.metadata["image_type"][2] == ("W", "F", "IP", "OP")[number]
    assert scan.metadata["echo_times_ms"] == [2.3 if number == 3 else 4.6]
    assert scan.spacing_mm[0] == DISTANCE_MM


@pytest.mark.parametrize("choice", ["13", "12/X", "12/TE4.6", "12", "t1/mDIXON", "1", "12/W,TE2.3"])
def test_a_choice_that_fits_none_or_several_is_refused_with_the_list(tmp_path, choice):
    folder = save(tmp_path / "scan", dixon())
    code, sentence = error_of(lambda path: read_volume(path, choice), folder)
    assert code in ("UNKNOWN_SERIES", "MULTIPLE_SERIES")
    assert "'F,TE4.6' with 3 slices" in sentence
    assert is_one_sentence_naming(sentence, folder)


def test_a_series_whose_images_differ_in_a_word_alone_is_one_stack_when_asked_for(tmp_path):
    datasets = [slice_of(index) for index in range(4)]
    for dataset in datasets[:2]:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    folder = save(tmp_path / "scan", datasets)
    code, sentence = error_of(read_volume, folder)
    assert code == "MULTIPLE_SERIES"
    assert "'4/all' for one stack" in sentence
    np.testing.assert_array_equal(read_volume(folder, "4/all").voxels, pixels_of(4))
    mixed = save(tmp_path / "dixon", dixon())
    assert "/all" not in error_of(read_volume, mixed)[1]
    assert error_of(lambda path: read_volume(path, "12/all"), mixed)[0] == "MISSING_SLICES"


def two_series() -> list[Dataset]:
    other = [slice_of(index) for index in range(2)]
    for dataset in other:
        dataset.SeriesInstanceUID, dataset.SeriesNumber = f"{SERIES}.987654", 7
        dataset.SeriesDescription = "late phase"
        dataset.PixelData = (pixels_of(2)[0] + 5).astype(np.int16).tobytes()
    return [slice_of(index) for index in range(3)] + other


@pytest.mark.parametrize("choice", ["4", "T1 AXIAL", SERIES, "498.1", "4/"])
def test_a_series_is_chosen_by_number_description_or_uid(tmp_path, choice):
    scan = read_volume(save(tmp_path / "scan", two_series()), series=choice)
    np.testing.assert_array_equal(scan.voxels, pixels_of(3))
    assert scan.metadata["series_instance_uid"] == SERIES


@pytest.mark.parametrize("choice", ["7", "late phase", "...987654", f"{SERIES}.987654"])
def test_the_other_series_is_chosen_likewise(tmp_path, choice):
    assert read_volume(save(tmp_path / "scan", two_series()), series=choice).shape[0] == 2


def test_series_that_share_a_number_are_not_chosen_by_it(tmp_path):
    datasets = two_series()
    for dataset in datasets:
        dataset.SeriesNumber = 4
    folder = save(tmp_path / "scan", datasets)
    assert error_of(lambda path: read_volume(path, "4"), folder)[0] == "UNKNOWN_SERIES"
    assert read_volume(folder, "late phase").shape[0] == 2


def test_what_nobody_chose_may_be_anything_but_damaged(tmp_path):
    datasets = two_series()
    datasets[3].PhotometricInterpretation = "MONOCHROME1"
    del datasets[4].ImagePositionPatient
    assert read_volume(save(tmp_path / "scan", datasets), series="4").shape[0] == 3


@pytest.mark.parametrize(
    ("values", "shown", "choice"),
    [
        ({"EchoTime": ("1.15", "2.3")}, "TE2.3", "TE2.3"),
        ({"EchoNumbers": (1, 2)}, "echo2", "echo2"),
        ({"TemporalPositionIdentifier": (1, 2)}, "time2", "4/time2"),
        ({"ComplexImageComponent": ("MAGNITUDE", "PHASE")}, "PHASE", "phase"),
        ({"ConvolutionKernel": ("B30f", "B70f")}, "kernelB70f", "kernelB70f"),
        ({"ImageType": (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"])}, "'P'", "p"),
    ],
)
def test_whatever_tells_images_at_one_position_apart_makes_stacks(tmp_path, values, shown, choice):
    [(keyword, (first, second))] = values.items()
    datasets = []
    for number, value in enumerate((first, second)):
        for index in range(3):
            dataset = slice_of(index)
            setattr(dataset, keyword, value)
            dataset.PixelData = (pixels_of(3)[index] + number).astype(np.int16).tobytes()
            datasets.append(dataset)
    folder = save(tmp_path / "scan", datasets)
    code, sentence = error_of(read_volume, folder)
    assert code == "MULTIPLE_SERIES"
    assert shown in sentence
    np.testing.assert_array_equal(read_volume(folder, choice).voxels, pixels_of(3) + 1)


def test_images_at_one_position_that_nothing_tells_apart_are_named(tmp_path):
    folder = save(tmp_path / "scan", [slice_of(index) for index in (0, 1, 2)])
    twin = slice_of(1)
    twin.save_as(folder / "twin", enforce_file_format=True)
    code, sentence = error_of(read_volume, folder)
    assert code == "MISSING_SLICES"
    assert "102.50 mm" in sentence
    assert "twin" in sentence


def test_several_slices_that_are_missing_are_named_by_where_they_belong(tmp_path):
    folder = save(tmp_path / "scan", [slice_of(index) for index in (0, 1, 4, 5, 7)])
    code, sentence = error_of(read_volume, folder)
    assert code == "MISSING_SLICES"
    assert "missing: 105.00, 107.50, 115.00 mm" in sentence


def test_a_list_of_files_is_a_series(tmp_path):
    folder = save(tmp_path / "scan", [slice_of(index) for index in range(4)])
    scan = read_volume(folder)
    files = [folder / name for name in scan.metadata["slice_files"]]
    np.testing.assert_array_equal(read_volume(files[::-1]).voxels, scan.voxels)
    np.testing.assert_array_equal(read_volume(tuple(files[:2])).voxels, scan.voxels[:2])
    (folder / "notes.txt").write_text("notes " * 50)
    assert error_of(lambda path: read_volume([*files, path]), folder / "notes.txt")[0] == "UNSUPPORTED_FORMAT"
    assert error_of(lambda path: read_volume([*files, path]), folder / "gone")[0] == "NOT_FOUND"
    assert error_of(lambda path: read_volume([*files, path]), files[0])[0] == "INCONSISTENT_SERIES"
    assert error_of(lambda _path: read_volume([]), folder)[0] == "NOT_FOUND"


def test_a_folder_of_folders_holds_the_series_of_all(tmp_path):
    save(tmp_path / "one", two_series()[:3])
    save(tmp_path / "two", two_series()[3:])
    assert error_of(read_volume, tmp_path)[0] == "MULTIPLE_SERIES"
    np.testing.assert_array_equal(read_volume(tmp_path, "4").voxels, pixels_of(3))


@pytest.mark.parametrize("packed", [False, True])
def test_slices_in_folders_of_a_folder_are_slices_of_its_series(tmp_path, packed):
    folder = save(tmp_path / "scan", [slice_of(index) for index in range(2)])
    save(folder / "more", [slice_of(index) for index in range(2, 4)])
    path = folder
    if packed:
        files = [file for file in folder.rglob("*") if file.is_file()]
        path = zipped(tmp_path / "scan.zip", {str(file.relative_to(tmp_path)): file.read_bytes() for file in files})
    np.testing.assert_array_equal(read_volume(path).voxels, pixels_of(4))


@pytest.mark.parametrize("packed", [False, True])
def test_the_notes_of_a_mac_beside_the_slices_are_passed_over(tmp_path, packed):
    folder = tmp_path / "scan"
    folder.mkdir()
    for index in range(3):
        slice_of(index).save_as(folder / f"IM{index}.dcm", enforce_file_format=True)
        note = b"\0\5\x16\7\0\2\0\0Mac OS X        \0\2\0\0\0\x09\0\0\0\x32" + bytes(4062)
        (folder / f"._IM{index}.dcm").write_bytes(note)
    path = folder
    if packed:
        members = {f"__MACOSX/{file.name}" if file.name.startswith(".") else file.name: file.read_bytes()
                   for file in folder.iterdir()}  # fmt: skip
        path = zipped(tmp_path / "scan.zip", members)
    np.testing.assert_array_equal(read_volume(path).voxels, pixels_of(3))


def test_objects_without_pixels_are_passed_over_and_never_an_image_that_lost_its_pixels(tmp_path):
    folder = save(tmp_path / "scan", [slice_of(index) for index in range(3)])
    state = Dataset()
    state.file_meta = FileMetaDataset()
    state.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    state.file_meta.MediaStorageSOPClassUID = state.SOPClassUID = GrayscaleSoftcopyPresentationStateStorage
    state.file_meta.MediaStorageSOPInstanceUID = state.SOPInstanceUID = UID(f"{SERIES}.77")
    state.SeriesInstanceUID = f"{SERIES}.78"
    state.save_as(folder / "PS_0001", enforce_file_format=True)
    np.testing.assert_array_equal(read_volume(folder).voxels, pixels_of(3))
    assert error_of(read_volume, folder / "PS_0001")[0] == "NO_PIXELS"
    lost = slice_of(3)
    del lost.PixelData
    lost.save_as(folder / "lost", enforce_file_format=True)
    assert error_of(read_volume, folder)[0] == "NO_PIXELS"


def zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def members_of(tmp_path: Path, datasets) -> dict[str, bytes]:
    folder = save(tmp_path / "for_zip", datasets)
    return {f"study/series/{file.name}": file.read_bytes() for file in folder.iterdir()}


def test_a_zip_is_read_as_its_folder_would_be_and_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    members = members_of(tmp_path, dixon())
    path = zipped(tmp_path / "scan.zip", {"study/": b"", "README": b"notes " * 50, **members})
    scan = read_volume(path, "12/F")
    np.testing.assert_array_equal(scan.voxels, pixels_of(3) + 1000)
    assert scan.source == str(path)
    assert set(scan.metadata["slice_files"]) <= {name.rpartition("/")[2] for name in members}
    code, sentence = error_of(read_volume, path)
    assert code == "MULTIPLE_SERIES"
    assert is_one_sentence_naming(sentence, path)
    assert not list((tmp_path / "temporary").iterdir())


def test_a_full_place_to_unpack_in_is_no_fault_of_the_scan(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = zipped(tmp_path / "scan.zip", members_of(tmp_path, [slice_of(index) for index in range(3)]))
    monkeypatch.setattr(archive, "_copy", full)
    with pytest.raises(OSError, match="No space left"):
        read_volume(path)


def test_errors_in_a_zip_name_the_member_and_names_lead_nowhere(tmp_path):
    members = members_of(tmp_path, [slice_of(index) for index in range(3)])
    first = min(members)
    cut = {name: content[:-100] if name == first else content for name, content in members.items()}
    code, sentence = error_of(read_volume, zipped(tmp_path / "scan.zip", cut))
    assert code == "INPUT_TRUNCATED"
    assert f"scan.zip/{first.rpartition('/')[2]}" in sentence
    # Members that are named as those before them are unpacked.
    late = {f"{number:06d}.dcm": content for number, content in enumerate(cut.values(), start=2)}
    named = f"{list(cut).index(first) + 2:06d}.dcm"
    _, sentence = error_of(read_volume, zipped(tmp_path / "late.zip", late))
    assert f"late.zip/{named}" in sentence
    evil = {f"../../{tmp_path.name}_out/{number}": content for number, content in enumerate(members.values())}
    assert read_volume(zipped(tmp_path / "evil.zip", evil)).shape[0] == 3
    assert not (tmp_path.parent / f"{tmp_path.name}_out").exists()


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("bomb", "ARCHIVE_LIMIT"),
        ("many", "ARCHIVE_LIMIT"),
        ("encrypted", "ARCHIVE_UNSUPPORTED"),
        ("lzma", "ARCHIVE_UNSUPPORTED"),
        ("link", "ARCHIVE_UNSUPPORTED"),
        ("empty", "EMPTY_IMAGE"),
        ("no dicom", "NOT_FOUND"),
        ("text", "INPUT_CORRUPT"),
        ("cut", "INPUT_CORRUPT"),
    ],
)
def test_a_zip_that_no_one_should_unpack_is_refused(tmp_path, monkeypatch, fault, code):
    monkeypatch.setattr("lvseg.formats.archive.CONTENT_BYTES_MAX", 10**6)
    monkeypatch.setattr("lvseg.formats.archive.MEMBERS_MAX", 4)
    members = {"1.dcm": bytes(100)}
    path = tmp_path / "scan.zip"
    if fault in ("bomb", "many"):
        zipped(path, {"1.dcm": bytes(2 * 10**6)} if fault == "bomb" else {str(n): b"a" for n in range(5)})
    elif fault == "lzma":
        zipped(path, members, zipfile.ZIP_LZMA)
    elif fault == "link":
        zipped(path, members_of(tmp_path, [slice_of(index) for index in range(2)]))
        with zipfile.ZipFile(path, "a") as added:
            entry = zipfile.ZipInfo("study/series/IM0002")
            entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
            added.writestr(entry, "../objects/IM0002")
    elif fault in ("empty", "no dicom"):
        zipped(path, {} if fault == "empty" else {"notes.txt": b"notes " * 50})
    else:
        content = zipped(path, members).read_bytes()
        if fault == "encrypted":
            content = content.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01")
        path.write_bytes(b"no zip at all" if fault == "text" else content[:-9] if fault == "cut" else content)
    received, sentence = error_of(read_volume, path)
    assert received == code, sentence
    assert is_one_sentence_naming(sentence, path)


@pytest.mark.parametrize("moved", [50, -50, 2**31], ids=["later", "earlier", "far away"])
def test_a_zip_whose_directory_lies_elsewhere_than_it_says_is_corrupt(tmp_path, moved):
    path = zipped(tmp_path / "scan.zip", members_of(tmp_path, [slice_of(index) for index in range(2)]))
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x05\x06") + 16
    directory = int.from_bytes(content[at : at + 4], "little")
    content[at : at + 4] = max(0, directory + moved).to_bytes(4, "little")
    path.write_bytes(content)
    code, sentence = error_of(read_volume, path)
    assert code == "INPUT_CORRUPT" and is_one_sentence_naming(sentence, path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"SliceThickness": 2.5}, None),
        ({"SliceThickness": 1.0}, None),  # with a gap
        ({"SliceThickness": 0.5}, "slices of 0.5 mm lie 2.5 mm apart"),
        ({"SliceThickness": 2.5, "SpacingBetweenSlices": 2.5}, None),
        ({"SliceThickness": 1.25, "SpacingBetweenSlices": 1.25}, "SpacingBetweenSlices says 1.25"),
    ],
)
def test_slices_that_are_further_apart_than_the_headers_say_are_told(tmp_path, change, word):
    slices = [slice_of(index) for index in range(3)]
    for dataset in slices:
        for keyword, value in change.items():
            setattr(dataset, keyword, value)
    warnings = read_volume(save(tmp_path / "scan", slices)).metadata["slice_warnings"]
    assert [word in warning for warning in warnings] == [True] * (word is not None)


@pytest.mark.parametrize(
    ("keyword", "value", "words"),
    [("PatientID", "Other", "2 patients"), ("StudyInstanceUID", f"{SERIES}.7", "2 studies"),
     ("FrameOfReferenceUID", f"{SERIES}.7", "2 frames of reference"), ("FrameOfReferenceUID", "", "")],
)  # fmt: skip
def test_slices_of_several_scans_in_one_series_are_told(tmp_path, keyword, value, words):
    datasets = [slice_of(index) for index in range(4)]
    for dataset in datasets:
        dataset.PatientID, dataset.FrameOfReferenceUID = "Somebody", SERIES
    for dataset in datasets[2:]:
        setattr(dataset, keyword, value)
    warnings = read_volume(save(tmp_path / "scan", datasets)).metadata["slice_warnings"]
    assert len(warnings) == bool(words)
    assert all(words in warning and "Somebody" not in warning and "Other" not in warning for warning in warnings)


@pytest.mark.parametrize("zeros", [[5], [1, 3, 5], range(6)], ids=["last", "every second", "all"])
def test_a_slice_that_says_it_has_no_frames_is_a_slice(tmp_path, zeros):
    slices = [slice_of(index) for index in range(6)]
    for index in zeros:
        slices[index].NumberOfFrames = 0
    np.testing.assert_array_equal(read_volume(save(tmp_path / "scan", slices)).voxels, pixels_of(6))


@pytest.mark.parametrize("where", ["pydicom.dcmread", "lvseg.formats.dicom_file.get_decoder"])
@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, os.strerror(errno.EIO))], ids=["memory", "disk"])
def test_want_of_memory_and_a_disk_that_fails_are_not_blamed_on_the_file(tmp_path, monkeypatch, where, error):
    folder = save(tmp_path / "scan", [slice_of(index) for index in range(2)])

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(where, fail)
    if isinstance(error, OSError):
        code, sentence = error_of(read_volume, folder)
        assert (code, "Input/output error" in sentence) == ("NOT_READABLE", True)
    else:
        with pytest.raises(MemoryError):
            read_volume(folder)


@pytest.mark.parametrize("keyword", ["FileMetaInformationVersion", "ExtendedOffsetTable"])
def test_no_more_memory_is_asked_for_than_the_file_could_fill(tmp_path, keyword):
    """A damaged length of 2 GB would otherwise end the process, or wait on swap, before it is found out."""
    slices = [slice_of(index) for index in range(2)]
    for dataset in slices:
        dataset.ExtendedOffsetTable = bytes(8)
    folder = save(tmp_path / "scan", slices)
    path = min(folder.iterdir())
    content = bytearray(path.read_bytes())
    tag = pydicom.datadict.tag_for_keyword(keyword)
    start = content.index((tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little") + b"O")
    content[start + 8 : start + 12] = (0x7FFFFFF0).to_bytes(4, "little")
    path.write_bytes(content)
    tracemalloc.start()
    try:
        code, sentence = error_of(read_volume, folder)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert code in ("INPUT_TRUNCATED", "NO_PIXELS", "UNSUPPORTED_TRANSFER_SYNTAX")
    assert is_one_sentence_naming(sentence, path)
    assert peak_bytes < 20e6


@pytest.mark.parametrize("name", ["a.dcm", "A.IMA", "IM0001", "1.2.840.3", "x.000", "notes.txt", "._IM1", ".dcm", "é"])
def test_the_server_and_the_library_keep_the_same_of_a_members_name(name):
    assert archive.kept_suffix(name) == protocol.member_suffix(name)
    assert archive.kept_suffix(f"000001{archive.kept_suffix(name)}") == archive.kept_suffix(name)


def test_a_damaged_slice_of_a_zip_is_not_passed_over(tmp_path):
    members = members_of(tmp_path, [slice_of(index) for index in range(4)])
    last = max(members)
    spoilt = {**members, last: bytes(300) + members[last][300:]}
    code, sentence = error_of(read_volume, zipped(tmp_path / "scan.zip", spoilt))
    assert code == "UNSUPPORTED_FORMAT"
    assert f"scan.zip/{last.rpartition('/')[2]}" in sentence


def test_a_choice_where_there_is_none_is_refused(tmp_path):
    path = write_volume(read_volume(save(tmp_path / "scan", [slice_of(0)])), tmp_path / "a.nii")[0]
    assert error_of(lambda path: read_volume(path, "4"), path)[0] == "UNKNOWN_SERIES"


def test_predict_segments_the_series_that_its_option_names_and_lists_them_without(tmp_path, monkeypatch, capsys):
    seen = []

    class Segmenter:
        def __init__(self, _model: Path) -> None:
            self.info = {"task": "volume"}
            self.algorithm = None

        def segment(self, scan, *_progress, modality):
            seen.append((scan, modality))
            return predict.Segmentation(
                scan.with_voxels((scan.voxels > 1500).astype(np.uint8)), {"volume_ml": {}, "flags": []}
            )

    monkeypatch.setattr(predict, "Segmenter", Segmenter)
    monkeypatch.setattr(predict, "newest_version", lambda model: model)
    folder = save(tmp_path / "scan", dixon())
    command = ["--model", str(tmp_path), str(folder), "-o", str(tmp_path / "mask.nrrd")]
    assert predict.main(command) == 2
    assert "'W,TE4.6' with 3 slices" in capsys.readouterr().err
    assert not seen
    assert predict.main([*command, "--series", "12/F"]) == 0
    assert predict.main([*command, "--series", "12/F", "--modality", "mr"]) == 0
    (scan, modality), (_, named) = seen
    assert (modality, named) == (None, "MR")
    np.testing.assert_array_equal(scan.voxels, pixels_of(3) + 1000)
    assert read_volume(tmp_path / "mask.nrrd").shape == scan.shape


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("one_series", [True, False])
def test_a_water_and_a_fat_image_are_a_fat_fraction_scan_for_a_model_that_sees_those(tmp_path, one_series, is_zip):
    datasets = dixon()[:6]
    for number, dataset in enumerate(datasets):
        if not one_series:
            dataset.SeriesInstanceUID = f"{SERIES}.{number // 3}"
    path = save(tmp_path / "study", datasets)
    if is_zip:
        members = {f"{number}.dcm": file.read_bytes() for number, file in enumerate(sorted(path.iterdir()))}
        path = zipped(tmp_path / "study.zip", members)
    fraction = predict.read_scan(path, "fatfraction")
    water, fat = (read_volume(path, f"*/{word}") for word in "WF")
    np.testing.assert_array_equal(fat.voxels, pixels_of(3) + 1000)
    np.testing.assert_array_equal(fraction.voxels, waterfat.from_water_fat(water, fat).voxels)
    assert fraction.metadata["units"] == "percent"
    code, _ = error_of(predict.read_scan, path, "volume")
    assert code == "MULTIPLE_SERIES"


def test_what_is_no_pair_of_water_and_fat_stays_a_choice_for_people(tmp_path):
    two_waters = [*dixon()[:6], *dixon()[:3]]
    for number, dataset in enumerate(two_waters):
        dataset.SeriesInstanceUID, dataset.SOPInstanceUID = f"{SERIES}.{number // 3}", f"{SERIES}.9.{number}"
    for datasets in (two_waters, dixon()[6:]):
        path = save(tmp_path / f"study{len(datasets)}", datasets)
        code, sentence = error_of(predict.read_scan, path, "fatfraction")
        assert code == "MULTIPLE_SERIES", sentence


def test_water_and_fat_of_two_studies_are_no_pair(tmp_path):
    datasets = dixon()[:6]
    for number, dataset in enumerate(datasets):
        dataset.SeriesInstanceUID = dataset.StudyInstanceUID = f"{SERIES}.{number // 3}"
    path = save(tmp_path / "study", datasets)
    assert error_of(predict.read_scan, path, "fatfraction")[0] == "MULTIPLE_SERIES"
    fraction = waterfat.from_water_fat(*(read_volume(path, f"*/{word}") for word in "WF"))
    assert any("different studies" in warning for warning in fraction.metadata["fat_fraction"]["warnings"])


def test_what_the_fat_image_s_files_have_against_it_is_told_of_the_fat_fraction(tmp_path):
    datasets = dixon()[:6]
    datasets[5].PatientID = "Other"
    datasets[3].PatientID = "Somebody"
    path = save(tmp_path / "study", datasets)
    fraction = predict.read_scan(path, "fatfraction")
    assert fraction.metadata["slice_warnings"] == []
    assert any("2 patients" in warning for warning in fraction.metadata["fat_fraction"]["warnings"])


PHILIPS = ("Philips MR Imaging DD 001", "Philips MR Imaging DD 005")


def scale_slope(dataset: Dataset, slope: float) -> None:
    dataset.private_block(0x2005, PHILIPS[0], create=True).add_new(0x0E, "FL", slope)


@pytest.mark.parametrize(("fat_slope", "told"), [(2.0, True), (1.0, False)])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_a_maker_s_scale_slope_that_is_not_the_other_image_s_is_told(tmp_path, syntax, fat_slope, told):
    """Signal is the rescaled value / (rescale slope * scale slope): 0.5 * 4 of water, 2 or 1 * 2 of fat."""
    datasets = dixon()[:6]
    for number, dataset in enumerate(datasets):
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.RescaleSlope, dataset.RescaleIntercept = (0.5, 0) if number < 3 else (fat_slope, 0)
        scale_slope(dataset, 4.0 if number < 3 else 2.0)
    path = save(tmp_path / "study", datasets)
    water, fat = (read_volume(path, f"12/{word}") for word in "WF")
    assert (water.metadata["signal_scale"], fat.metadata["signal_scale"]) == (2.0, 2 * fat_slope)
    provenance = waterfat.from_water_fat(water, fat).metadata["fat_fraction"]
    assert any("different scales, 2 and 4" in warning for warning in provenance["warnings"]) == told
    assert provenance["sources"]["fat"]["signal_scale"] == 2 * fat_slope


def test_a_scale_slope_in_a_maker_s_own_groups_of_a_frame_is_found_and_several_are_none(tmp_path):
    dataset = enhanced(own=False)
    for last in (4.0, 8.0):
        for number, frame in enumerate(dataset.PerFrameFunctionalGroupsSequence):
            frame.PixelValueTransformationSequence[0].RescaleSlope = 0.5
            item = Dataset()
            scale_slope(item, last if number == 2 else 4.0)
            frame.private_block(0x2005, PHILIPS[1], create=True).add_new(0x0F, "SQ", [item])
        dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
        assert read_volume(tmp_path / "a.dcm").metadata["signal_scale"] == (2.0 if last == 4.0 else None)


def test_of_several_series_the_one_that_is_named_makes_the_fat_fraction(tmp_path):
    datasets = [*dixon()[:6], *dixon()[:6], *dixon()[6:]]
    for place, dataset in enumerate(datasets):
        number = 12 + min(place // 6, 2)
        dataset.SeriesNumber, dataset.SeriesInstanceUID = number, f"{SERIES}.{number}"
        dataset.SOPInstanceUID = f"{SERIES}.9.{place}"
        if number == 13:
            dataset.PixelData = (
                (np.frombuffer(dataset.PixelData, np.int16) + 500 * (place < 9)).astype(np.int16).tobytes()
            )
    path = save(tmp_path / "study", datasets)
    for number in ("12", "13"):
        water, fat = (read_volume(path, f"{number}/{word}") for word in "WF")
        expected = waterfat.from_water_fat(water, fat).voxels
        np.testing.assert_array_equal(predict.read_scan(path, "fatfraction", number).voxels, expected)
    assert not np.array_equal(read_volume(path, "12/W").voxels, read_volume(path, "13/W").voxels)
    for series in (None, "14"):
        assert error_of(predict.read_scan, path, "fatfraction", series)[0] == "MULTIPLE_SERIES"


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000"])
def test_frames_that_itk_compressed_are_the_same_numbers(tmp_path, compressor):
    """JPEG lossless, which pydicom has no encoder for, from ITK's codec."""
    datasets = [slice_of(index, dtype=np.uint16) for index in range(3)]
    for index, dataset in enumerate(datasets):
        writer = SimpleITK.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.SetUseCompression(True)
        writer.SetCompressor(compressor)
        writer.SetFileName(str(tmp_path / "itk.dcm"))
        writer.Execute(SimpleITK.GetImageFromArray(pixels_of(3)[index][None].astype(np.uint16)))
        packed = pydicom.dcmread(tmp_path / "itk.dcm")
        dataset.file_meta.TransferSyntaxUID = packed.file_meta.TransferSyntaxUID
        dataset.PixelData = packed.PixelData
        dataset["PixelData"].is_undefined_length = True
    np.testing.assert_array_equal(read_volume(save(tmp_path / "scan", datasets)).voxels, pixels_of(3))


@pytest.mark.parametrize("syntax", [JPEGLSLossless, RLELossless])
@pytest.mark.parametrize("keyword", ["Rows", "Columns"])
def test_compressed_pixels_that_do_not_fill_the_sizes_are_refused(tmp_path, syntax, keyword):
    for change in (-1, 1):
        dataset = slice_of(0, dtype=np.uint16)
        dataset.compress(syntax, generate_instance_uid=False)
        setattr(dataset, keyword, getattr(dataset, keyword) + change)
        dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
        code, _ = error_of(read_volume, tmp_path / "a.dcm")
        assert code in ("INCONSISTENT_SERIES", "INPUT_TRUNCATED")


def test_native_pixels_beyond_the_sizes_are_refused(tmp_path):
    dataset = slice_of(0)
    dataset.Rows = ROWS - 1
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert error_of(read_volume, tmp_path / "a.dcm")[0] == "INCONSISTENT_SERIES"


def test_a_deflated_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lvseg.formats.checks.MAXIMUM_VOXEL_BYTES", 1000)
    dataset = slice_of(0)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert error_of(read_volume, tmp_path / "a.dcm")[0] == "DECOMPRESS_LIMIT"


def mapping(slope: float, intercept: float, code: str, label: str) -> Dataset:
    units, item = Dataset(), Dataset()
    units.CodeValue, units.CodingSchemeDesignator, units.CodeMeaning = code, "UCUM", code
    item.RealWorldValueSlope, item.RealWorldValueIntercept, item.LUTLabel = slope, intercept, label
    item.MeasurementUnitsCodeSequence = [units]
    return item


def test_units_are_those_of_the_rescaled_values_and_no_other_mapping_s(tmp_path):
    datasets = [slice_of(index) for index in range(2)]
    for dataset in datasets:
        dataset.RescaleSlope, dataset.RescaleIntercept = 0.1, 0
        dataset.RealWorldValueMappingSequence = [mapping(0.1, 0, "%", "fat"), mapping(2, 5, "ms", "T2*")]
    scan = read_volume(save(tmp_path / "scan", datasets))
    assert scan.metadata["units"] == "%"
    assert [one["label"] for one in scan.metadata["real_world_values"]] == ["fat", "T2*"]
    for dataset in datasets:
        dataset.RescaleSlope = 1
    scan = read_volume(save(tmp_path / "scan", datasets))
    assert scan.metadata["units"] == ""
    np.testing.assert_array_equal(scan.voxels, pixels_of(2))


def test_an_enhanced_ct_has_hounsfield_units_from_its_functional_groups(tmp_path):
    dataset = enhanced(own=False)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = EnhancedCTImageStorage
    dataset.Modality = "CT"
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        kind = Dataset()
        kind.FrameType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
        frame.CTImageFrameTypeSequence = [kind]
        scale = frame.PixelValueTransformationSequence[0]
        scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = 1, -1024, "HU"
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    scan = read_volume(tmp_path / "a.dcm")
    assert scan.voxels.dtype == np.int16
    np.testing.assert_array_equal(scan.voxels, pixels_of(3) - 1024)
    assert (scan.metadata["modality"], scan.metadata["rescale_type"]) == ("CT", "HU")


def test_a_multi_frame_file_that_has_its_rescaling_beside_the_frames_groups_is_rescaled(tmp_path):
    dataset = enhanced(own=False)
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        del frame.PixelValueTransformationSequence
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 2, -1024, "HU"
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    scan = read_volume(tmp_path / "a.dcm")
    np.testing.assert_array_equal(scan.voxels, 2 * pixels_of(3) - 1024)
    assert scan.metadata["rescale_type"] == "HU"


def test_a_zip_that_is_sent_to_the_server_is_unpacked_within_its_limits(tmp_path):
    sent = zipped(tmp_path / "scan.zip", members_of(tmp_path, [slice_of(index) for index in range(3)]))
    job = tmp_path / "job"
    job.mkdir()
    (job / worker.UPLOAD).write_bytes(sent.read_bytes())
    size = sent.stat().st_size
    work = protocol.Work(bytes(32), "scan.zip", "file", "volume", 1, "", "nrrd", "raw", size, 0, 0)
    stages = []

    report = SimpleNamespace(begin=stages.append, end=lambda: None, seconds={"unpack": 0.5})
    worker.unpack_scan(work, job, 3, 10**6, report)
    scan, seconds = worker.load_scan(job / worker.WORK)
    assert stages == ["unpack", "read"] and seconds == {"unpack": 0.5} and scan.source == "scan.zip"
    np.testing.assert_array_equal(scan.voxels, pixels_of(3))
    there = read_volume(sent)
    np.testing.assert_array_equal(scan.affine, there.affine)
    # What the network's side looks at is as a reader found it, but for names of files.
    expected = json.loads(json.dumps(dict(there.metadata)))
    assert {**scan.metadata, "slice_files": None} == {**expected, "slice_files": None}
    with pytest.raises(InputError, match="at most 2 files"):
        worker.unpack_scan(work, job, 2, 10**6, report)
    with pytest.raises(InputError, match="fewer bytes"):
        worker.unpack_scan(work, job, 3, 3000, report)


def test_stacks_of_an_enhanced_object_are_told_apart_by_their_frames(tmp_path):
    dataset = enhanced(own=False)
    dataset.NumberOfFrames = 6
    dataset.PixelData = np.concatenate([pixels_of(3)[[2, 0, 1]]] * 2).astype(np.int16).tobytes()
    frames = []
    for word in ("W", "F"):
        for frame in dataset.PerFrameFunctionalGroupsSequence:
            copy, kind, echo = Dataset(), Dataset(), Dataset()
            copy.update(frame)
            kind.FrameType = ["DERIVED", "PRIMARY", word, word]
            echo.EffectiveEchoTime = 2.5
            copy.MRImageFrameTypeSequence, copy.MREchoSequence = [kind], [echo]
            frames.append(copy)
    dataset.PerFrameFunctionalGroupsSequence = frames
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    code, sentence = error_of(read_volume, tmp_path / "a.dcm")
    assert code == "MULTIPLE_SERIES"
    assert "'W' with 3 slices; 'F' with 3 slices" in sentence
    scan = read_volume(tmp_path / "a.dcm", "F")
    np.testing.assert_array_equal(scan.voxels, pixels_of(3) * np.array([1, 2, 3])[:, None, None])
    assert scan.metadata["image_type"] == ["DERIVED", "PRIMARY", "F", "F"]
    assert scan.metadata["echo_times_ms"] == [2.5]
    assert "slice_files" not in scan.metadata


@real_data
def test_the_real_ct_series_lies_where_each_file_says_and_where_its_labels_lie():
    folder = Path(str(REAL_DATA)) / "ct_dicom_series"
    scan = read_volume(folder)
    assert scan.shape == (20, 512, 512)
    assert scan.spacing_mm == (2.0, 0.9765625, 0.9765625)
    assert scan.metadata["slice_distance_source"] == "positions"
    headers = [pydicom.dcmread(path) for path in folder.iterdir()]
    assert len(headers) == 20
    for header in headers:
        position = np.array(header.ImagePositionPatient, float)
        [index] = [k for k in range(20) if np.allclose(scan.world_mm((k, 0, 0)), position, atol=1e-6)]
        values = header.pixel_array.astype(int) * int(header.RescaleSlope) + int(header.RescaleIntercept)
        np.testing.assert_array_equal(scan.voxels[index], values)
    labels = read_volume(Path(str(REAL_DATA)) / "ct_dicom_series_organs.nii.gz")
    assert labels.canonical().shape == scan.canonical().shape
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(scan.shape) - 1)
    np.testing.assert_allclose(labels.canonical().world_mm(corners), scan.canonical().world_mm(corners), atol=0.01)
    liver = scan.canonical().voxels[labels.canonical().voxels == 5]
    assert 40 < np.median(liver) < 160  # Hounsfield units of a liver, which a flipped axis would not find


@real_data
def test_the_real_single_slice_has_no_overlay_in_its_pixels():
    path = Path(str(REAL_DATA)) / "mr_single_slice" / "MR-SIEMENS-DICOM-WithOverlays.dcm"
    for given_path in (path, path.parent):
        scan = read_volume(given_path)
        assert scan.shape == (1, 484, 484)
        assert scan.spacing_mm == pytest.approx((4.0, 0.72314049586777, 0.72314049586777))
        assert scan.metadata["slice_distance_source"] == "SliceThickness"
        assert scan.metadata["modality"] == "MR"
        raw = np.frombuffer(pydicom.dcmread(path).PixelData, np.uint16).reshape(484, 484)
        np.testing.assert_array_equal(scan.voxels[0], raw & 0x0FFF)
        np.testing.assert_allclose(scan.world_mm((0, 0, 0)), [-159.82565509386, -175.32202350207, 28.426151275635])


@real_data
def test_the_real_enhanced_mr_is_a_volume():
    path = Path(str(REAL_DATA)) / "mr_enhanced_multiframe" / "IM_0010"
    scan = read_volume(path)
    assert scan.shape == (20, 256, 256)
    assert scan.spacing_mm == pytest.approx((7, 1.5625, 1.5625), abs=1e-6)
    assert scan.voxels.dtype == np.float32
    dataset = pydicom.dcmread(path)
    for index, group in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        position = group.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose(scan.world_mm((index, 0, 0)), np.array(position, float), atol=1e-3)
        slope = float(group.PixelValueTransformationSequence[0].RescaleSlope)
        np.testing.assert_allclose(scan.voxels[index], dataset.pixel_array[index] * slope, rtol=1e-6)


@real_data
def test_the_real_folder_with_a_segmentation_holds_two_series():
    folder = Path(str(REAL_DATA)) / "dicom_seg"
    code, sentence = error_of(read_volume, folder)
    assert code == "MULTIPLE_SERIES"
    assert "with 3 files" in sentence
