"""DICOM segmentations as labels, against highdicom, which wrote most of them."""

from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from bad_files import error_of, is_one_sentence_naming
from grids import all_48_orientations
from highdicom.seg import Segmentation, SegmentDescription
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, RLELossless, generate_uid
from scipy.spatial.transform import Rotation

from lvseg.formats import read_mask, read_volume, write_volume
from lvseg.volume import Volume

SLICES, ROWS, COLUMNS = 6, 7, 9  # 63 pixels: frames of one bit a pixel do not end where bytes do
NAMES = ("Liver", "Spleen", "Left kidney")
OBLIQUE = Rotation.from_euler("xyz", (20, -35, 10), degrees=True).as_matrix()


def image_files(folder: Path, rotation: np.ndarray = OBLIQUE) -> tuple[list[Dataset], Volume]:
    """An MR series that a segmentation can refer to, and the volume that it is read as."""
    folder.mkdir()
    datasets, frame_of_reference, series, study = [], generate_uid(), generate_uid(), generate_uid()
    for index in range(SLICES):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = MRImageStorage
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
        dataset.PatientName = "Nobody^Known"
        dataset.PatientID = dataset.AccessionNumber = dataset.StudyID = "x"
        dataset.PatientBirthDate = dataset.PatientSex = dataset.StudyDate = dataset.StudyTime = ""
        dataset.ReferringPhysicianName = ""
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
        dataset.FrameOfReferenceUID = frame_of_reference
        dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = "MR", 3, index + 1
        dataset.ImageType = ["ORIGINAL", "PRIMARY"]
        dataset.SliceThickness, dataset.SpacingBetweenSlices = 4, 2.5
        dataset.ImageOrientationPatient = [round(float(c), 9) for c in [*rotation[:, 0], *rotation[:, 1]]]
        position = np.array([-30.0, 20, 100]) + index * 2.5 * rotation[:, 2]
        dataset.ImagePositionPatient = [round(float(mm), 6) for mm in position]
        dataset.PixelSpacing = [1.5, 1.25]
        dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = ROWS, COLUMNS, 1
        dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
        dataset.PixelData = np.full((ROWS, COLUMNS), index, np.uint16).tobytes()
        dataset.save_as(folder / f"IM{index}", enforce_file_format=True)
        datasets.append(dataset)
    return datasets, read_volume(folder)


def labels(seed: int = 0) -> np.ndarray:
    """Three segments that do not touch every slice [slice, row, column]."""
    array = np.random.default_rng(seed).integers(0, 4, (SLICES, ROWS, COLUMNS)).astype(np.uint8)
    array[0] = 0
    array[2][array[2] == 1] = 0
    array[5] = 0
    return array


def segmentation(sources: list[Dataset], array: np.ndarray, kind: str = "BINARY", **options) -> Segmentation:
    """What highdicom makes of it; `array` holds labels, or a segment's share of a voxel along the last axis."""
    described = [
        SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.Organ,
            segmented_property_type=codes.SCT.Liver,
            algorithm_type="MANUAL",
        )
        for number, name in enumerate(NAMES, start=1)
    ]
    return Segmentation(
        source_images=sources,
        pixel_array=array,
        segmentation_type=kind,
        segment_descriptions=described,
        series_instance_uid=generate_uid(),
        series_number=9,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="Maker",
        manufacturer_model_name="Model",
        software_versions="1",
        device_serial_number="1",
        **options,
    )


def saved(dataset: Dataset, path: Path) -> Path:
    dataset.save_as(path)
    return path


def own_grid_of_highdicom(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels and their positions as highdicom reads them [n, 4]: x, y, z in mm and the label, where it is not 0."""
    found = highdicom.seg.segread(path).get_volume(combine_segments=True, rescale_fractional=False)
    index = np.argwhere(found.array)
    return found.map_indices_to_reference(index), found.array[tuple(index.T)]


def sorted_points(points_mm: np.ndarray, values: np.ndarray) -> np.ndarray:
    rows = np.column_stack([np.round(points_mm, 4) + 0.0, values])
    return rows[np.lexsort(rows.T)]


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
@pytest.mark.parametrize("omit", [False, True])
def test_labels_lie_on_the_image_and_on_their_own_grid_where_highdicom_puts_them(tmp_path, kind, omit):
    sources, image = image_files(tmp_path / "image")
    path = saved(segmentation(sources, labels(), kind, omit_empty_frames=omit), tmp_path / "seg.dcm")
    mask = read_mask(path, image)
    np.testing.assert_array_equal(mask.voxels, labels())
    np.testing.assert_array_equal(mask.affine, image.affine)
    assert mask.voxels.dtype == np.uint8
    assert mask.metadata["labels"] == dict(enumerate(NAMES, start=1))
    own = read_volume(path)
    assert own.spacing_mm == pytest.approx((2.5, 1.5, 1.25))
    index = np.argwhere(own.voxels)
    np.testing.assert_allclose(
        sorted_points(own.world_mm(index), own.voxels[tuple(index.T)]),
        sorted_points(*own_grid_of_highdicom(path)),
        atol=2e-4,
    )
    first = 0 if not omit else int(np.flatnonzero(labels().any(axis=(1, 2)))[0])
    np.testing.assert_allclose(own.affine[:3, 3], image.world_mm((first, 0, 0)), atol=1e-4)


def test_the_order_of_frames_and_of_slices_does_not_matter(tmp_path):
    sources, image = image_files(tmp_path / "image")
    dataset = segmentation(sources, labels())
    frames = np.unpackbits(np.frombuffer(dataset.PixelData, np.uint8), bitorder="little")
    frames = frames[: dataset.NumberOfFrames * ROWS * COLUMNS].reshape(-1, ROWS * COLUMNS)
    order = np.random.default_rng(1).permutation(dataset.NumberOfFrames)
    groups = list(dataset.PerFrameFunctionalGroupsSequence)
    dataset.PerFrameFunctionalGroupsSequence = [groups[index] for index in order]
    dataset.PixelData = np.packbits(frames[order].ravel(), bitorder="little").tobytes()
    path = saved(dataset, tmp_path / "seg.dcm")
    np.testing.assert_array_equal(read_mask(path, image).voxels, labels())


def test_labels_come_in_the_axes_of_an_image_of_another_format_and_orientation(tmp_path):
    sources, image = image_files(tmp_path / "image")
    path = saved(segmentation(sources, labels()), tmp_path / "seg.dcm")
    wanted = all_48_orientations(image.with_voxels(labels()))
    for turned, expected in zip(all_48_orientations(image), wanted, strict=True):
        nifti = read_volume(write_volume(turned, tmp_path / "image.nii.gz")[0])
        mask = read_mask(path, nifti)
        np.testing.assert_array_equal(mask.voxels, expected.voxels)
        np.testing.assert_array_equal(mask.affine, nifti.affine)


def test_one_slice_of_a_sparse_object_finds_its_place(tmp_path):
    sources, image = image_files(tmp_path / "image")
    array = np.zeros_like(labels())
    array[3, 2, 1] = 2
    path = saved(segmentation(sources, array), tmp_path / "seg.dcm")
    np.testing.assert_array_equal(read_mask(path, image).voxels, array)
    own = read_volume(path)
    assert own.shape == (1, ROWS, COLUMNS)
    np.testing.assert_allclose(own.world_mm((0, 2, 1)), image.world_mm((3, 2, 1)), atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"transfer_syntax_uid": RLELossless}])
def test_of_a_fractional_object_one_half_is_inside(tmp_path, options):
    sources, image = image_files(tmp_path / "image")
    share = np.zeros((SLICES, ROWS, COLUMNS, 3), np.float32)
    share[1, 0, 0, 0], share[1, 0, 1, 0], share[2, 3, 4, 1] = 0.51, 0.49, 1.0
    share[3, 1, 1] = 0.6, 0.4, 0.2
    dataset = segmentation(sources, share, "FRACTIONAL", max_fractional_value=200, **options)
    mask = read_mask(saved(dataset, tmp_path / "seg.dcm"), image)
    assert {tuple(index): int(mask.voxels[tuple(index)]) for index in np.argwhere(mask.voxels)} == {
        (1, 0, 0): 1,
        (2, 3, 4): 2,
        (3, 1, 1): 1,
    }


def test_segments_that_overlap_are_refused_by_name(tmp_path):
    sources, image = image_files(tmp_path / "image")
    both = np.zeros((SLICES, ROWS, COLUMNS, 3), np.uint8)
    both[2, 3, 4, :2] = 1
    path = saved(segmentation(sources, both), tmp_path / "seg.dcm")
    for read in (read_volume, lambda path: read_mask(path, image)):
        code, sentence = error_of(read, path)
        assert code == "OVERLAPPING_SEGMENTS"
        assert "'Liver' (1) and 'Spleen' (2)" in sentence
        assert is_one_sentence_naming(sentence, path)


def test_numbers_above_255_are_kept(tmp_path):
    sources, image = image_files(tmp_path / "image")
    dataset = segmentation(sources, labels())
    for item in dataset.SegmentSequence:
        item.SegmentNumber += 300
    for group in dataset.PerFrameFunctionalGroupsSequence:
        group.SegmentIdentificationSequence[0].ReferencedSegmentNumber += 300
    mask = read_mask(saved(dataset, tmp_path / "seg.dcm"), image)
    assert mask.voxels.dtype == np.uint16
    np.testing.assert_array_equal(mask.voxels, np.where(labels(), labels().astype(int) + 300, 0))


def moved(dataset: Dataset) -> None:
    planes = [group.PlanePositionSequence[0] for group in dataset.PerFrameFunctionalGroupsSequence]
    for plane in {id(plane): plane for plane in planes}.values():  # frames of one slice share theirs
        plane.ImagePositionPatient = [float(mm) + 1.0 for mm in plane.ImagePositionPatient]


def finer(dataset: Dataset) -> None:
    dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [1.5, 1.0]


def uneven(dataset: Dataset) -> None:
    group = dataset.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0]
    normal = OBLIQUE[:, 2]
    group.ImagePositionPatient = [
        float(mm) + 0.9 * part for mm, part in zip(group.ImagePositionPatient, normal, strict=True)
    ]


def tiled(dataset: Dataset) -> None:
    dataset.DimensionOrganizationType = "TILED_FULL"


def strange(dataset: Dataset) -> None:
    dataset.PerFrameFunctionalGroupsSequence[0].SegmentIdentificationSequence[0].ReferencedSegmentNumber = 77


def nameless(dataset: Dataset) -> None:
    del dataset.SegmentSequence


def other_kind(dataset: Dataset) -> None:
    dataset.SegmentationType = "OTHER"


def short(dataset: Dataset) -> None:
    dataset.PixelData = dataset.PixelData[:-4]


FAULTS = {
    moved: ("GEOMETRY_MISMATCH", None),
    finer: ("GEOMETRY_MISMATCH", None),
    uneven: ("GEOMETRY_MISMATCH", "MISSING_SLICES"),
    tiled: ("UNSUPPORTED_FORMAT", "UNSUPPORTED_FORMAT"),
    strange: ("UNSUPPORTED_FORMAT", "UNSUPPORTED_FORMAT"),
    nameless: ("INPUT_TRUNCATED", "INPUT_TRUNCATED"),
    other_kind: ("UNSUPPORTED_FORMAT", "UNSUPPORTED_FORMAT"),
    short: ("INPUT_TRUNCATED", "INPUT_TRUNCATED"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_segmentation_with_a_fault_is_refused(tmp_path, fault):
    sources, image = image_files(tmp_path / "image")
    dataset = segmentation(sources, labels())
    fault(dataset)
    path = saved(dataset, tmp_path / "seg.dcm")
    on_image, alone = FAULTS[fault]
    code, sentence = error_of(lambda path: read_mask(path, image), path)
    assert code == on_image, sentence
    assert is_one_sentence_naming(sentence, path)
    if alone:
        assert error_of(read_volume, path)[0] == alone
    else:
        assert read_volume(path).voxels.any()


def test_the_real_liver_is_the_same_voxels_as_nrrd_in_the_world_and_on_its_three_slices(real_data):
    folder = real_data / "dicom_seg"
    image = read_volume([folder / f"0{number}.dcm" for number in (1, 2, 3)])
    assert image.spacing_mm == pytest.approx((1.0, 0.810547, 0.810547))
    seg, nrrd = read_volume(folder / "liver.dcm"), read_volume(folder / "liver_seg.nrrd")
    assert seg.metadata["labels"] == {1: "Liver"}
    np.testing.assert_allclose(seg.affine, nrrd.affine, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(seg.voxels, nrrd.voxels)
    on_image = read_mask(folder / "liver.dcm", image)
    np.testing.assert_array_equal(on_image.voxels, read_mask(folder / "liver_seg.nrrd", image).voxels)
    np.testing.assert_array_equal(on_image.affine, image.affine)
    # By hand: each frame lies on the slice whose file has its position.
    dataset = pydicom.dcmread(folder / "liver.dcm")
    for frame, group in zip(dataset.pixel_array, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        position = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        [index] = [k for k in range(3) if np.allclose(image.world_mm((k, 0, 0)), position, atol=1e-3)]
        np.testing.assert_array_equal(on_image.voxels[index], frame)
    assert 40 < np.median(image.voxels[on_image.voxels == 1]) < 160  # Hounsfield units of a liver


def test_the_real_folder_gives_each_of_its_series_when_chosen(real_data):
    folder = real_data / "dicom_seg"
    image = read_volume(folder, series="2")
    assert image.metadata["modality"] == "CT"
    assert image.metadata["slice_files"] == ("03.dcm", "02.dcm", "01.dcm")
    np.testing.assert_array_equal(
        read_mask(folder, image, series="Liver Segmentation").voxels, read_mask(folder / "liver.dcm", image).voxels
    )


def test_the_real_organs_lie_on_the_grid_of_their_ct(real_data):
    image = read_volume(real_data / "ct_dicom_series")
    organs = read_volume(real_data / "ct_dicom_series_organs.nii.gz")
    mask = read_mask(real_data / "ct_dicom_series_organs.nii.gz", image)
    assert mask.shape == image.shape
    np.testing.assert_array_equal(mask.affine, image.affine)
    index = np.argwhere(mask.voxels == 5)[::997]
    in_file = np.rint(np.linalg.solve(organs.affine, np.column_stack([image.world_mm(index), np.ones(len(index))]).T))
    assert (organs.voxels[tuple(in_file[:3].astype(int))] == 5).all()
    assert np.count_nonzero(mask.voxels == 5) == np.count_nonzero(organs.voxels == 5)
