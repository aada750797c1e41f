"""DICOM series in: synthesised ones with every trap, and the real ones where they are."""

import itertools
import os
import random
from pathlib import Path

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
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    MediaStorageDirectoryStorage,
    MRImageStorage,
    RLELossless,
    generate_uid,
)
from scipy.spatial.transform import Rotation

from lvseg.errors import InputError
from lvseg.formats import read_volume, write_volume

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
    assert scan.voxels.dtype == np.int16
    assert scan.spacing_mm == (2.5, 1.5, 1.25)
    np.testing.assert_array_equal(scan.voxels, pixels_of(6))
    np.testing.assert_allclose(scan.world_mm((3, 4, 5)), [-30 + 5 * 1.25, 20 + 4 * 1.5, 100 + 3 * 2.5])
    assert scan.metadata == {
        "modality": "MR",
        "series_description": "t1 axial",
        "manufacturer": "Maker",
        "manufacturer_model": "Model 1",
        "field_strength_t": 1.5,
        "slice_distance_source": "positions",
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


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
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


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
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


def with_deflation(datasets):
    datasets[0].file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian


FAULTS = {
    "two series": (with_one(SeriesInstanceUID=generate_uid(), SeriesDescription="scout"), "MULTIPLE_SERIES", "scout"),
    "missing slice": (lambda datasets: datasets.pop(2), "MISSING_SLICES", "102.50 to 107.50"),
    "doubled slice": (with_one(ImagePositionPatient=[-30, 20, 105]), "MISSING_SLICES", "105.00"),
    "uneven slice": (with_one(ImagePositionPatient=[-30, 20, 103]), "MISSING_SLICES", "100.00 to 103.00"),
    "other size": (with_other_size, "INCONSISTENT_SERIES", "rows"),
    "other orientation": (with_one(ImageOrientationPatient=[0, 1, 0, 1, 0, 0]), "INCONSISTENT_SERIES", "Orientation"),
    "other spacing": (with_one(PixelSpacing=[1.5, 1.3]), "INCONSISTENT_SERIES", "PixelSpacing"),
    "localiser among them": (
        with_one(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        "INCONSISTENT_SERIES",
        "localiser",
    ),
    "gantry tilt": (with_tilt, "BAD_GEOMETRY", "angles"),
    "table jump": (with_a_jump, "BAD_GEOMETRY", "straight"),
    "no position": (without("ImagePositionPatient"), "BAD_GEOMETRY", "ImagePositionPatient"),
    "no orientation": (without("ImageOrientationPatient"), "BAD_GEOMETRY", "ImageOrientationPatient"),
    "no pixel spacing": (without("PixelSpacing"), "BAD_GEOMETRY", "PixelSpacing"),
    "zero pixel spacing": (with_all(PixelSpacing=[0, 1]), "BAD_GEOMETRY", "spacing"),
    "no unit vectors": (with_all(ImageOrientationPatient=[1, 0, 0, 0, 2, 0]), "BAD_GEOMETRY", "Orientation"),
    "no pixels": (without("PixelData"), "NO_PIXELS", "PixelData"),
    "colours": (with_colours, "UNSUPPORTED_PIXEL_TYPE", "RGB"),
    "inverted grey": (with_all(PhotometricInterpretation="MONOCHROME1"), "UNSUPPORTED_PIXEL_TYPE", "MONOCHROME1"),
    "lookup table": (with_all(ModalityLUTSequence=[Dataset()]), "UNSUPPORTED_PIXEL_TYPE", "LUT"),
    "frames without geometry": (with_one(NumberOfFrames=2, Rows=ROWS // 2), "UNSUPPORTED_FORMAT", "frames"),
    "no codec": (with_unknown_codec, "UNSUPPORTED_TRANSFER_SYNTAX", "HEVC"),
    "deflated": (with_deflation, "UNSUPPORTED_TRANSFER_SYNTAX", "Deflated"),
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
