"""Masks as DICOM segmentations: the voxels, places, references and names in them, as other readers find them."""

import copy
import io
import itertools
import json
import logging
import zipfile
from pathlib import Path
from types import SimpleNamespace

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK
from bad_files import error_of, is_one_sentence_naming, volume
from dicom_files import COLUMNS, PATIENT, ROWS, SLICES, STEP_MM, enhanced, position_of, save, series
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from lvseg import predict
from lvseg.formats import Algorithm, check_writable, dicom_seg_write, read_mask, read_volume, write_mask, write_volume
from lvseg.formats.dicom_origin import Origin
from lvseg.volume import Volume

DIGEST = "ab12" * 16
LIVER = Algorithm("volume", 3, DIGEST, ("background", "liver"))
THREE = Algorithm("thigh", 12, DIGEST, ("background", "fat", "connective_tissue", "muscle"))
AXIAL, OBLIQUE = np.eye(3), Rotation.from_euler("xyz", (20, -35, 10), degrees=True).as_matrix()
UPSIDE_DOWN = Rotation.from_euler("x", 180, degrees=True).as_matrix()  # the normal points to the feet
SAGITTAL = np.array([[0.0, 0, -1], [1, 0, 0], [0, -1, 0]])


def labels_like(scan: Volume, classes: int, seed: int = 0) -> np.ndarray:
    """Every class in some slices, none in the first and the last."""
    array = np.random.default_rng(seed).integers(0, classes + 1, scan.shape).astype(np.uint8)
    array[2 % scan.shape[0]][array[2 % scan.shape[0]] == 1] = 0
    if scan.shape[0] > 2:
        array[[0, -1]] = 0
    return array


def written(scan: Volume, path: Path, algorithm: Algorithm = THREE, seed: int = 0) -> tuple[Volume, pydicom.Dataset]:
    """A mask of the scan, written, and the file as pydicom has it."""
    mask = scan.with_voxels(labels_like(scan, len(algorithm.labels) - 1, seed))
    assert write_mask(mask, path, algorithm) == [path]
    return mask, pydicom.dcmread(path)


def expect_at(points_mm: np.ndarray, values: np.ndarray, mask: Volume) -> None:
    """These values at these places, and background elsewhere, are the mask."""
    index = (points_mm - mask.affine[:3, 3]) @ np.linalg.inv(mask.affine[:3, :3]).T
    np.testing.assert_allclose(index, np.rint(index), rtol=0, atol=1e-3)
    found = np.zeros_like(mask.voxels)
    found[tuple(np.rint(index).astype(int).T)] = values
    np.testing.assert_array_equal(found, mask.voxels)


def expect_same_voxels_at_same_places(mask: Volume, path: Path) -> None:
    """As this project's reader, on the file's own grid and on the scan's, and highdicom's find them."""
    own = read_volume(path)
    np.testing.assert_array_equal(own.voxels, mask.voxels)
    np.testing.assert_allclose(own.affine, mask.affine, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(read_mask(path, mask).voxels, mask.voxels)
    theirs = highdicom.seg.segread(path).get_volume(combine_segments=True)
    assert theirs.array.shape == mask.shape
    index = np.argwhere(theirs.array)
    expect_at(theirs.map_indices_to_reference(index), theirs.array[tuple(index.T)], mask)


def expect_each_frame_to_lie_on_its_image(mask: Volume, seg: pydicom.Dataset, sources: list[pydicom.Dataset]) -> None:
    """By hand: the bits of each frame, its segment, its position, and where the image it refers to lies."""
    by_uid = {source.SOPInstanceUID: source for source in sources}
    bits = np.unpackbits(np.frombuffer(seg.PixelData, np.uint8), bitorder="little")
    frames = bits[: seg.NumberOfFrames * seg.Rows * seg.Columns].reshape(-1, seg.Rows, seg.Columns)
    seen = set()
    for frame, group in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        position = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        [item] = group.DerivationImageSequence[0].SourceImageSequence
        source = by_uid[item.ReferencedSOPInstanceUID]
        assert item.ReferencedSOPClassUID == source.SOPClassUID
        if "PerFrameFunctionalGroupsSequence" in source:
            plane = source.PerFrameFunctionalGroupsSequence[item.ReferencedFrameNumber - 1].PlanePositionSequence[0]
        else:
            assert "ReferencedFrameNumber" not in item
            plane = source
        np.testing.assert_allclose(np.array(plane.ImagePositionPatient, float), position, rtol=0, atol=1e-9)
        [index] = [k for k in range(mask.shape[0]) if np.allclose(mask.world_mm((k, 0, 0)), position, atol=0.02)]
        shared = seg.SharedFunctionalGroupsSequence[0]
        holder = group if "SegmentIdentificationSequence" in group else shared
        number = holder.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        np.testing.assert_array_equal(frame, mask.voxels[index] == number)
        seen.add((index, number))
    assert seen == set(itertools.product(range(mask.shape[0]), range(1, 1 + len(seg.SegmentSequence))))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(angles=st.tuples(*[st.floats(-180, 180)] * 3), seed=st.integers(0, 99))
def test_a_mask_of_a_series_in_any_direction_and_order_lies_where_it_was_made(tmp_path, angles, seed):
    rotation = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    sources = series(rotation)
    folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    scan = read_volume(save(folder / "scan", sources, seed))
    mask, seg = written(scan, folder / "seg.dcm", seed=seed)
    expect_same_voxels_at_same_places(mask, folder / "seg.dcm")
    expect_each_frame_to_lie_on_its_image(mask, seg, sources)


@pytest.mark.parametrize("rotation", [AXIAL, UPSIDE_DOWN, SAGITTAL, OBLIQUE], ids=["axial", "feet", "sagittal", "any"])
@pytest.mark.parametrize("algorithm", [LIVER, THREE], ids=["one class", "three classes"])
def test_masks_that_went_through_canonical_axes_and_through_a_zip_lie_there_too(tmp_path, rotation, algorithm):
    sources = series(rotation)
    folder = save(tmp_path / "scan", sources)
    with zipfile.ZipFile(tmp_path / "scan.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    for scan in (read_volume(folder), read_volume(tmp_path / "scan.zip")):
        canonical = scan.canonical()
        mask = scan.from_canonical(labels_like(canonical, len(algorithm.labels) - 1))
        write_mask(mask, tmp_path / "seg.dcm", algorithm)
        expect_same_voxels_at_same_places(mask, tmp_path / "seg.dcm")
        expect_each_frame_to_lie_on_its_image(mask, pydicom.dcmread(tmp_path / "seg.dcm"), sources)
        back = read_volume(tmp_path / "seg.dcm").canonical()
        np.testing.assert_array_equal(back.voxels, labels_like(canonical, len(algorithm.labels) - 1))


@pytest.mark.parametrize("rotation", [UPSIDE_DOWN, OBLIQUE], ids=["feet", "any"])
@pytest.mark.parametrize("word", ["W", "F"])
def test_of_a_multi_frame_file_the_frames_of_the_chosen_stack_are_referred_to(tmp_path, rotation, word):
    source = enhanced(rotation, order=[4, 0, 3, 5, 1, 2])
    scan = read_volume(save(tmp_path / "scan", [source]), word)
    mask, seg = written(scan, tmp_path / "seg.dcm")
    expect_same_voxels_at_same_places(mask, tmp_path / "seg.dcm")
    expect_each_frame_to_lie_on_its_image(mask, seg, [source])
    numbers = [1 + 2 * place + (word == "F") for place in range(SLICES)]
    for group in seg.PerFrameFunctionalGroupsSequence:
        item = group.DerivationImageSequence[0].SourceImageSequence[0]
        assert item.ReferencedFrameNumber in numbers
    [whole] = seg.SourceImageSequence
    assert list(whole.ReferencedFrameNumber) == numbers
    [instance] = seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert instance.ReferencedSOPInstanceUID == source.SOPInstanceUID


def test_of_a_multi_frame_file_of_one_stack_all_is_referred_to(tmp_path):
    source = enhanced(OBLIQUE, order=[2, 1, 0, 3, 4, 5], words=("M",))
    scan = read_volume(save(tmp_path / "scan", [source]))
    mask, seg = written(scan, tmp_path / "seg.dcm", LIVER)
    expect_same_voxels_at_same_places(mask, tmp_path / "seg.dcm")
    expect_each_frame_to_lie_on_its_image(mask, seg, [source])
    assert "ReferencedFrameNumber" not in seg.SourceImageSequence[0]


def test_a_mask_of_a_fat_fraction_refers_to_the_water_images(tmp_path):
    water, fat = series(OBLIQUE, 0), series(OBLIQUE, 1, SeriesNumber=4)
    for word, datasets in (("W", water), ("F", fat)):
        for dataset in datasets:
            dataset.ImageType = ["ORIGINAL", "PRIMARY", word]
            dataset.StudyInstanceUID = water[0].StudyInstanceUID
    save(tmp_path / "scan/w", water)
    save(tmp_path / "scan/f", fat)
    scan = predict.read_scan(tmp_path / "scan", predict.FAT_FRACTION_TASK)
    mask, seg = written(scan, tmp_path / "seg.dcm")
    expect_same_voxels_at_same_places(mask, tmp_path / "seg.dcm")
    expect_each_frame_to_lie_on_its_image(mask, seg, water)


def test_a_single_slice_has_its_place_and_its_thickness(tmp_path):
    [source] = series(OBLIQUE)[3:4]
    scan = read_volume(save(tmp_path / "scan", [source]))
    mask, seg = written(scan, tmp_path / "seg.dcm", LIVER)
    own = read_volume(tmp_path / "seg.dcm")
    np.testing.assert_array_equal(own.voxels, mask.voxels)
    np.testing.assert_allclose(own.affine, scan.affine, rtol=0, atol=1e-6)
    expect_each_frame_to_lie_on_its_image(mask, seg, [source])


def test_slices_that_are_neither_quite_even_nor_quite_straight_keep_their_own_positions(tmp_path):
    sources = series(OBLIQUE)
    drift = 0.004 * STEP_MM * OBLIQUE[:, 0]  # in all, as far as a series that is read may lean
    jitter = np.random.default_rng(1).uniform(-0.015, 0.015, (SLICES, 3))
    jitter[[0, -1]] = 0
    for index, source in enumerate(sources):
        moved = np.array(position_of(OBLIQUE, index)) + index * drift + jitter[index]
        source.ImagePositionPatient = [round(float(mm), 6) for mm in moved]
    scan = read_volume(save(tmp_path / "scan", sources))
    mask, seg = written(scan, tmp_path / "seg.dcm")
    own = read_volume(tmp_path / "seg.dcm")
    np.testing.assert_array_equal(own.voxels, mask.voxels)
    np.testing.assert_allclose(own.affine, scan.affine, rtol=0, atol=1e-6)
    expect_each_frame_to_lie_on_its_image(mask, seg, sources)


@pytest.mark.parametrize("distance_mm", [8.25, 6.33, 7.15])
def test_positions_rounded_to_a_tenth_of_a_millimetre_have_a_place_each(tmp_path, distance_mm):
    """So that gaps differ by a tenth, within what images may, and their error would add up along the stack."""
    first = series(np.eye(3))[0]
    sources = [copy.deepcopy(first) for _ in range(30)]
    for index, source in enumerate(sources):
        source.SOPInstanceUID = f"1.2.3.{index + 1}"
        source.ImagePositionPatient = [0, 0, round(index * distance_mm, 1)]
        source.SliceThickness = distance_mm
    scan = read_volume(save(tmp_path / "scan", sources))
    mask, _ = written(scan, tmp_path / "seg.dcm", LIVER)
    own = read_volume(tmp_path / "seg.dcm")
    np.testing.assert_array_equal(own.voxels, mask.voxels)
    np.testing.assert_allclose(own.affine, scan.affine, rtol=0, atol=1e-6)


@pytest.mark.parametrize("algorithm", [LIVER, THREE], ids=["one class", "three classes"])
def test_a_class_found_nowhere_is_a_segment_of_empty_frames(tmp_path, algorithm):
    scan = read_volume(save(tmp_path / "scan", series(OBLIQUE)))
    mask = scan.with_voxels(np.zeros(scan.shape, np.uint8))
    write_mask(mask, tmp_path / "seg.dcm", algorithm)
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    classes = len(algorithm.labels) - 1
    assert seg.NumberOfFrames == SLICES * classes
    assert not any(seg.PixelData[: -(-seg.NumberOfFrames * ROWS * COLUMNS // 8)])
    own = read_volume(tmp_path / "seg.dcm")
    assert own.shape == scan.shape
    assert not own.voxels.any()
    np.testing.assert_allclose(own.affine, scan.affine, rtol=0, atol=1e-6)
    assert own.metadata["labels"] == dict(enumerate(algorithm.labels[1:], start=1))


@pytest.mark.parametrize("rotation", [AXIAL, UPSIDE_DOWN, OBLIQUE], ids=["axial", "feet", "any"])
@pytest.mark.parametrize("columns", [9, 16])
def test_itk_finds_the_voxels_of_one_class_at_the_same_places(tmp_path, rotation, columns):
    scan = read_volume(save(tmp_path / "scan", series(rotation, columns=columns)))
    mask, _ = written(scan, tmp_path / "seg.dcm", LIVER)
    image = SimpleITK.ReadImage(str(tmp_path / "seg.dcm"))
    found = np.argwhere(SimpleITK.GetArrayFromImage(image))
    there = [image.TransformIndexToPhysicalPoint([int(i) for i in index[::-1]]) for index in found]
    expect_at(np.array(there), np.ones(len(there)), mask)


def test_the_patient_the_study_and_the_frame_of_reference_are_the_scans(tmp_path):
    sources = series(AXIAL)
    scan = read_volume(save(tmp_path / "scan", sources))
    _, seg = written(scan, tmp_path / "seg.dcm")
    for keyword in (
        "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge", "PatientWeight",
        "ClinicalTrialSubjectID", "ClinicalTrialTimePointID", "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID",
        "AccessionNumber", "ReferringPhysicianName", "FrameOfReferenceUID",
    ):  # fmt: skip
        assert seg[keyword].value == sources[0][keyword].value, keyword
    assert seg.SeriesInstanceUID != sources[0].SeriesInstanceUID
    assert seg.SeriesNumber == 1003
    assert seg.Modality == "SEG"
    [referred] = seg.ReferencedSeriesSequence
    assert referred.SeriesInstanceUID == sources[0].SeriesInstanceUID
    for sequence in (referred.ReferencedInstanceSequence, seg.SourceImageSequence):
        found = [item.ReferencedSOPInstanceUID for item in sequence]
        assert sorted(found) == sorted(source.SOPInstanceUID for source in sources)
    again = written(scan, tmp_path / "again.dcm")[1]
    assert again.SOPInstanceUID != seg.SOPInstanceUID
    assert again.SeriesInstanceUID != seg.SeriesInstanceUID


def test_each_class_has_its_name_its_code_and_the_model_that_found_it(tmp_path):
    scan = read_volume(save(tmp_path / "scan", series(AXIAL)))
    anatomical, tissue = ("91723000", "SCT"), ("85756007", "SCT")
    names = {
        "liver": (anatomical, "10200004"),
        "muscle": (tissue, "91727004"),
        "fat": (tissue, "55603005"),
        "subcutaneous_fat": (tissue, "55603005"),
        "connective_tissue": (tissue, "21793004"),
        "something else": (tissue, "85756007"),
    }
    algorithm = Algorithm("volume", 3, DIGEST, ("background", *names))
    _, seg = written(scan, tmp_path / "seg.dcm", algorithm)
    for item, (name, (category, kind)) in zip(seg.SegmentSequence, names.items(), strict=True):
        [found], [found_kind] = item.SegmentedPropertyCategoryCodeSequence, item.SegmentedPropertyTypeCodeSequence
        assert (found.CodeValue, found.CodingSchemeDesignator) == category
        assert (found_kind.CodeValue, found_kind.CodingSchemeDesignator) == (kind, "SCT")
        assert item.SegmentLabel == name
        assert item.SegmentAlgorithmType == "AUTOMATIC"
        [by] = item.SegmentationAlgorithmIdentificationSequence
        assert (by.AlgorithmName, by.AlgorithmVersion) == ("lvseg volume", "3")
        assert DIGEST in by.AlgorithmParameters
    assert [item.SegmentNumber for item in seg.SegmentSequence] == list(range(1, 7))
    unversioned = Algorithm("volume", None, DIGEST, ("background", "liver"))
    _, seg = written(scan, tmp_path / "seg.dcm", unversioned)
    by = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert by.AlgorithmVersion == DIGEST[:12]


@pytest.mark.parametrize(
    ("character_set", "name"),
    [("ISO_IR 100", "Bäcker^Jörg"), (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"), ("ISO_IR 192", "Ωμέγα^Νίκος")],
)
def test_names_are_the_patients_in_any_character_set(tmp_path, character_set, name):
    sources = series(AXIAL)
    for source in sources:
        source.SpecificCharacterSet = character_set
        source.PatientName = name
    scan = read_volume(save(tmp_path / "scan", sources))
    assert str(written(scan, tmp_path / "seg.dcm")[1].PatientName) == name
    kept = Origin.from_json(scan.origin.to_json())
    again = Volume(scan.voxels, scan.affine, origin=kept)
    assert str(written(again, tmp_path / "again.dcm")[1].PatientName) == name


EMPTY_IF_NEED_BE = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
                    "StudyDate", "StudyTime", "ReferringPhysicianName")  # fmt: skip


@pytest.mark.parametrize("fault", ["absent", "empty", "meaningless"])
def test_what_the_files_do_not_tell_of_the_patient_is_empty(tmp_path, fault):
    sources = series(AXIAL)
    for source in sources:
        if fault == "absent":
            for keyword in (*EMPTY_IF_NEED_BE, "SliceThickness", "SeriesNumber"):
                del source[keyword]
        elif fault == "empty":
            for keyword in (*EMPTY_IF_NEED_BE, "SliceThickness", "SeriesNumber"):
                setattr(source, keyword, None)
        else:
            with pytest.warns(UserWarning):
                source.PatientSex, source.PatientBirthDate, source.StudyTime = "X", "unknown", "noon"
    scan = read_volume(save(tmp_path / "scan", sources))
    mask, seg = written(scan, tmp_path / "seg.dcm")
    expect_same_voxels_at_same_places(mask, tmp_path / "seg.dcm")
    for keyword in EMPTY_IF_NEED_BE if fault != "meaningless" else ("PatientSex", "PatientBirthDate", "StudyTime"):
        assert not seg[keyword].value, keyword
    assert seg.SeriesNumber == (1003 if fault == "meaningless" else 1000)


def test_nothing_of_the_patient_is_logged_shown_or_among_the_metadata(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    sources = series(AXIAL, PatientName="Secret Name Of No Right Form")
    scan = read_volume(save(tmp_path / "scan", sources))
    mask, _ = written(scan, tmp_path / "seg.dcm")
    assert "Secret" not in repr(mask)
    assert "Secret" not in json.dumps(mask.metadata, default=str)
    for record in caplog.records:
        assert "Secret" not in record.getMessage()
        assert not any(source.SOPInstanceUID in record.getMessage() for source in sources)
        assert not record.name.startswith("highdicom")


def test_the_origin_goes_through_json_unchanged(tmp_path):
    for number, sources in enumerate([series(OBLIQUE), [enhanced(OBLIQUE, order=range(SLICES), words=("M",))]]):
        scan = read_volume(save(tmp_path / str(number), sources))
        back = Origin.from_json(scan.origin.to_json())
        assert back.images == scan.origin.images
        assert back.header == scan.origin.header


@pytest.mark.parametrize(
    "keyword", ["StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPClassUID", "SOPInstanceUID"]
)
def test_files_without_a_uid_that_a_segmentation_refers_to_are_refused_before_anything_is_written(tmp_path, keyword):
    sources = series(AXIAL)
    folder = save(tmp_path / "scan", sources)
    for file in folder.iterdir():
        dataset = pydicom.dcmread(file)
        setattr(dataset, keyword, "")
        dataset.save_as(file, enforce_file_format=False)
    scan = read_volume(folder)
    out = tmp_path / "out" / "seg.dcm"
    for refused in (
        lambda _: check_writable(scan, out),
        lambda _: write_mask(scan.with_voxels(np.ones(scan.shape, np.uint8)), out, LIVER),
    ):
        code, sentence = error_of(refused, folder)
        assert code == "BAD_OUTPUT"
        assert keyword in sentence
        assert is_one_sentence_naming(sentence, folder)
    assert not out.exists()
    check_writable(scan, tmp_path / "seg.nii.gz")


def test_slices_of_several_studies_or_frames_of_reference_are_refused(tmp_path):
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
        sources = series(AXIAL)
        setattr(sources[2], keyword, "1.2.3")
        scan = read_volume(save(tmp_path / keyword, sources))
        code, sentence = error_of(lambda _, scan=scan: check_writable(scan, Path("seg.dcm")), tmp_path / keyword)
        assert code == "BAD_OUTPUT"
        assert f"Expected one {keyword}" in sentence


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".vtk"])
def test_a_scan_of_another_format_has_no_segmentation(tmp_path, suffix):
    path = write_volume(volume(), tmp_path / f"scan{suffix}")[0]
    scan = read_volume(path)
    code, sentence = error_of(lambda _: check_writable(scan, tmp_path / "seg.dcm"), path)
    assert code == "BAD_OUTPUT"
    assert is_one_sentence_naming(sentence, path)


def test_a_mask_elsewhere_than_its_images_or_with_a_label_without_a_name_is_not_written(tmp_path):
    scan = read_volume(save(tmp_path / "scan", series(OBLIQUE)))
    ones = np.ones(scan.shape, np.uint8)
    moved = scan.affine.copy()
    moved[:3, 3] += 1
    for mask in (
        Volume(ones, moved, origin=scan.origin),
        Volume(ones[1:], scan.affine, origin=scan.origin),
        scan.with_voxels(2 * ones),
        Volume(np.ascontiguousarray(ones[::-1]), scan.affine @ np.diag([-1.0, 1, 1, 1]), origin=scan.origin),
    ):
        with pytest.raises(ValueError, match="Expected"):
            dicom_seg_write.write(mask, LIVER, tmp_path / "seg.dcm")
    assert not (tmp_path / "seg.dcm").exists()


class Bright:
    """In the place of `Segmenter`: marks what is brighter than the mean."""

    algorithm = LIVER

    def __init__(self, _model: Path) -> None:
        self.info = {"task": "volume"}

    def segment(self, scan: Volume, **_: object) -> SimpleNamespace:
        mask = scan.with_voxels((scan.voxels > scan.voxels.mean()).astype(np.uint8))
        return SimpleNamespace(mask=mask, measurements={"volume_ml": {"liver": 1.0}, "flags": []})


@pytest.fixture
def with_bright(monkeypatch):
    monkeypatch.setattr(predict, "Segmenter", Bright)
    monkeypatch.setattr(predict, "newest_version", lambda model: model)


def test_predict_writes_a_segmentation_of_a_dicom_scan(tmp_path, with_bright, capsys):
    folder = save(tmp_path / "scan", series(OBLIQUE))
    scan = read_volume(folder)
    expected = scan.with_voxels((scan.voxels > scan.voxels.mean()).astype(np.uint8))
    assert predict.main(["--model", "m", str(folder), "-o", str(tmp_path / "liver.dcm")]) == 0
    expect_same_voxels_at_same_places(expected, tmp_path / "liver.dcm")
    assert predict.main(["--model", "m", str(folder), "-o", str(tmp_path / "masks"), "--format", "dcm"]) == 0
    expect_same_voxels_at_same_places(expected, tmp_path / "masks" / "scan.dcm")
    assert "Nobody" not in "".join(capsys.readouterr())


def test_predict_refuses_a_segmentation_of_a_nifti_with_one_sentence(tmp_path, with_bright, capsys):
    path = write_volume(volume(), tmp_path / "scan.nii.gz")[0]
    assert predict.main(["--model", "m", str(path), "-o", str(tmp_path / "liver.dcm")]) == 2
    sentence = capsys.readouterr().err.strip().removeprefix("lvseg.predict: ")
    assert is_one_sentence_naming(sentence, path)
    assert "DICOM" in sentence
    assert [file.name for file in tmp_path.iterdir()] == ["scan.nii.gz"]


# ---- real scans


@pytest.mark.parametrize(
    ("place", "choice"),
    [
        ("dicom_seg", "2"),
        ("mr_enhanced_multiframe/IM_0010", None),
        ("mr_single_slice/MR-SIEMENS-DICOM-WithOverlays.dcm", None),
    ],
)
def test_masks_of_real_scans_lie_where_they_were_made(real_data, tmp_path, place, choice):
    path = real_data / place
    scan = read_volume(path, choice)
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.suffix == ".dcm"]
    sources = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
    mask, seg = written(scan, tmp_path / "seg.dcm")
    own = read_volume(tmp_path / "seg.dcm")
    np.testing.assert_array_equal(own.voxels, mask.voxels)
    np.testing.assert_allclose(own.affine, scan.affine, rtol=0, atol=1e-5)
    expect_each_frame_to_lie_on_its_image(mask, seg, sources)
    theirs = highdicom.seg.segread(io.BytesIO((tmp_path / "seg.dcm").read_bytes()))
    assert theirs.number_of_segments == 3
    assert seg.PatientID == sources[0].PatientID


def test_the_real_liver_comes_back_as_the_voxels_that_its_own_segmentation_has(real_data, tmp_path):
    folder = real_data / "dicom_seg"
    image = read_volume(folder, "2")
    mask = image.with_voxels(read_mask(folder / "liver.dcm", image).voxels)
    write_mask(mask, tmp_path / "seg.dcm", LIVER)
    theirs, ours = pydicom.dcmread(folder / "liver.dcm"), pydicom.dcmread(tmp_path / "seg.dcm")

    def frames(dataset):
        found = {}
        for plane, group in zip(dataset.pixel_array, dataset.PerFrameFunctionalGroupsSequence, strict=True):
            item = group.DerivationImageSequence[0].SourceImageSequence[0]
            found[item.ReferencedSOPInstanceUID] = plane
        return found

    for uid, plane in frames(theirs).items():
        np.testing.assert_array_equal(frames(ours)[uid], plane)
    assert ours.FrameOfReferenceUID == theirs.FrameOfReferenceUID
    assert ours.StudyInstanceUID == theirs.StudyInstanceUID


def test_the_real_series_whose_anonymiser_emptied_the_uids_is_refused(real_data, tmp_path):
    scan = read_volume(real_data / "ct_dicom_series")
    code, sentence = error_of(lambda _: check_writable(scan, tmp_path / "seg.dcm"), real_data / "ct_dicom_series")
    assert code == "BAD_OUTPUT"
    assert "StudyInstanceUID" in sentence


def test_the_patient_is_in_the_segmentation_alone(tmp_path):
    """The name of the fixture's patient is in the bytes of a segmentation and in no other output."""
    scan = read_volume(save(tmp_path / "scan", series(OBLIQUE)))
    mask = scan.with_voxels(labels_like(scan, 1))
    for suffix in ("dcm", "nii.gz", "vtk", "vti", "nrrd", "mha"):
        files = write_mask(mask, tmp_path / f"seg.{suffix}", LIVER)
        held = any(PATIENT.encode() in file.read_bytes() for file in files)
        assert held == (suffix == "dcm"), suffix
