"""Masks out as DICOM segmentations, beside the series that they were made of.

A binary object of highdicom's: a segment a class, a frame a slice and segment, each at the position of the image that
it lies on and with a reference to it. Patient, study and frame of reference are those of the scan. All slices are
written, those where a segment has nothing too: the file alone then holds the scan's whole grid, and a class that was
found nowhere is a segment of empty frames, not a missing file.

highdicom is given stand-ins for the images, single-frame ones with the geometry that the reader found, since it wants
more of its sources than scanners write: an orientation that is the same to the last digit, and in a multi-frame file
one that is shared by all frames, of which all are segmented. The references are put right afterwards.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import MRImageStorage, generate_uid
from pydicom.valuerep import format_number_as_ds

from lvseg.formats.dicom_file import quiet, text
from lvseg.formats.dicom_geometry import UNEVEN_FRACTION, UNEVEN_MM
from lvseg.formats.dicom_origin import Image, Origin, check_origin
from lvseg.volume import Volume

# SNOMED CT names of the code dictionary: category and type (CID 7150, 7166 and the organs of 7154). Any other class is
# tissue without a closer name; which fat it is says the label.
ORGANS = {"liver": "Liver", "spleen": "Spleen", "kidney": "Kidney"}
TISSUES = {
    "muscle": "MuscleTissue", "fat": "AdiposeTissue", "visceral fat": "AdiposeTissue",
    "subcutaneous fat": "AdiposeTissue", "connective tissue": "ConnectiveTissue",
}  # fmt: skip
# Attributes that have to be there, empty if need be.
PRESENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
           "StudyTime", "ReferringPhysicianName")  # fmt: skip
STAND_IN_UID = "2.25"
SERIES_NUMBER_OFFSET = 1000  # after the scan's own, as is usual for what is derived of it
LONGEST_TEXT = 64


@dataclass(frozen=True)
class Algorithm:
    """What made a mask.

    Args:
        task: of the model.
        version: of the model, None where it has none.
        weights_sha256: of the model, hexadecimal.
        labels: the classes' names, from label 0, the background, on.
    """

    task: str
    version: int | None
    weights_sha256: str
    labels: Sequence[str]


def write(mask: Volume, algorithm: Algorithm, path: Path) -> None:
    """Writes a mask.

    Args:
        mask: uint8 labels on the scan's own grid, with the scan's `origin`.
        algorithm: what made it.
        path: the file.

    Raises:
        InputError: BAD_OUTPUT, as `check_origin` says.
        ValueError: the mask does not lie on its images, or has labels without a name.
    """
    origin = check_origin(mask)
    _check(mask, origin, algorithm)
    with quiet(), _silent():
        import highdicom

        dataset = highdicom.seg.Segmentation(
            source_images=[_stand_in(mask, origin, number) for number in range(len(origin.images))],
            pixel_array=mask.voxels,
            segmentation_type="BINARY",
            segment_descriptions=[
                _segment(number, name, algorithm) for number, name in enumerate(algorithm.labels[1:], start=1)
            ],
            omit_empty_frames=False,
            series_instance_uid=generate_uid(),
            series_number=_series_number(origin),
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer="lvseg",
            manufacturer_model_name=f"lvseg {algorithm.task}"[:LONGEST_TEXT],
            software_versions=_own_version(),
            device_serial_number=algorithm.weights_sha256[:LONGEST_TEXT],
            content_label="SEGMENTATION",
            content_description=f"{', '.join(algorithm.labels[1:])}"[:LONGEST_TEXT],
            series_description=f"lvseg {', '.join(algorithm.labels[1:])}"[:LONGEST_TEXT],
            specific_character_set="ISO_IR 192",
        )
        _refer(dataset, origin)
        dataset.save_as(path, enforce_file_format=True)


def _check(mask: Volume, origin: Origin, algorithm: Algorithm) -> None:
    """Whether each slice lies where its image does, and each label has a name."""
    slices = len(mask.voxels)
    if len(origin.images) != slices:
        raise ValueError(f"Expected a mask of {len(origin.images)} slices, received {slices} slices.")
    lies_at = mask.world_mm([(index, 0, 0) for index in range(slices)])
    off_mm = np.linalg.norm(lies_at - [image.position_mm for image in origin.images], axis=1).max()
    if off_mm > max(UNEVEN_MM, UNEVEN_FRACTION * mask.spacing_mm[0]):
        raise ValueError(f"Expected a mask on the images of its scan, received slices up to {off_mm:.3g} mm off them.")
    highest = int(mask.voxels.max())
    if highest >= len(algorithm.labels):
        raise ValueError(f"Expected labels below {len(algorithm.labels)}, received label={highest}.")


def _stand_in(mask: Volume, origin: Origin, number: int) -> Dataset:
    """A single-frame image where slice `number` lies, of the scan's patient and study."""
    image = origin.images[number]
    dataset = Dataset()
    dataset.update(origin.header)
    for keyword in PRESENT:
        if keyword not in dataset:
            setattr(dataset, keyword, None if keyword.endswith(("Date", "Time")) else "")
    dataset.SOPClassUID, dataset.SOPInstanceUID = MRImageStorage, f"{STAND_IN_UID}.{number}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = image.study, image.series
    dataset.FrameOfReferenceUID = image.frame_of_reference
    dataset.Modality = text([origin.header], "Modality") or "OT"
    _, dataset.Rows, dataset.Columns = mask.shape
    slice_mm, row_mm, column_mm = mask.spacing_mm
    dataset.PixelSpacing = _decimals((row_mm, column_mm))
    [dataset.SpacingBetweenSlices] = _decimals((slice_mm,))
    [dataset.SliceThickness] = _decimals((image.thickness_mm or slice_mm,))
    dataset.ImagePositionPatient = _decimals(image.position_mm)
    directions = mask.directions
    dataset.ImageOrientationPatient = _decimals((*directions[:, 2], *directions[:, 1]))
    return dataset


def _refer(dataset: Dataset, origin: Origin) -> None:
    """Puts the scan's own images in the place of their stand-ins."""
    of_stand_in = {f"{STAND_IN_UID}.{number}": image for number, image in enumerate(origin.images)}
    for group in dataset.PerFrameFunctionalGroupsSequence:
        [item] = group.DerivationImageSequence[0].SourceImageSequence
        image = of_stand_in.get(item.ReferencedSOPInstanceUID)
        if image is None:  # the item of a slice is one for all segments, and was met already
            continue
        item.update(_reference(image))
        if image.frame:
            item.ReferencedFrameNumber = image.frame
    files: dict[str, list[Image]] = {}
    for image in origin.images:
        files.setdefault(image.instance, []).append(image)
    series = Dataset()
    series.SeriesInstanceUID = origin.images[0].series
    series.ReferencedInstanceSequence = [_reference(images[0]) for images in files.values()]
    dataset.ReferencedSeriesSequence = [series]
    sources = []
    for images in files.values():
        source = _reference(images[0])
        if images[0].frame and len(images) < images[0].frames:  # of a file of which not all was segmented
            source.ReferencedFrameNumber = sorted(image.frame for image in images)
        sources.append(source)
    dataset.SourceImageSequence = sources


def _reference(image: Image) -> Dataset:
    dataset = Dataset()
    dataset.ReferencedSOPClassUID, dataset.ReferencedSOPInstanceUID = image.kind, image.instance
    return dataset


def _segment(number: int, name: str, algorithm: Algorithm) -> Any:
    import highdicom
    from pydicom.sr.codedict import codes

    plain = name.lower().replace("_", " ")
    is_organ = plain in ORGANS
    version = algorithm.weights_sha256[:12] if algorithm.version is None else str(algorithm.version)
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:LONGEST_TEXT],
        segmented_property_category=codes.SCT.AnatomicalStructure if is_organ else codes.SCT.Tissue,
        segmented_property_type=getattr(codes.SCT, ORGANS[plain] if is_organ else TISSUES.get(plain, "Tissue")),
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=f"lvseg {algorithm.task}"[:LONGEST_TEXT],
            version=version,
            family=codes.DCM.ArtificialIntelligence,
            source="lvseg",
            parameters={"weights_sha256": algorithm.weights_sha256},
        ),
    )


def _series_number(origin: Origin) -> int:
    number = text([origin.header], "SeriesNumber")
    return SERIES_NUMBER_OFFSET + (int(number) if number.isascii() and number.isdecimal() and len(number) < 9 else 0)


def _decimals(numbers: Sequence[float]) -> list[str]:
    """Numbers as decimal strings of DICOM, in as many digits as these hold."""
    return [format_number_as_ds(float(number)) for number in numbers]


def _own_version() -> str:
    try:
        return importlib.metadata.version("lvseg")
    except importlib.metadata.PackageNotFoundError:  # code that was not installed
        return "unknown"


@contextmanager
def _silent() -> Iterator[None]:
    """Within the block highdicom logs nothing: it would log UIDs, and a patient's name that it finds odd."""
    logger = logging.getLogger("highdicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
