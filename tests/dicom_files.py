"""DICOM series as scanners write them, for the tests of what refers to them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

SLICES, ROWS, COLUMNS = 6, 7, 9  # 63 pixels: frames of one bit a pixel do not end where bytes do
STEP_MM, ROW_MM, COLUMN_MM = 2.5, 1.5, 1.25
PATIENT = "Nobody^Known"


def pixels(seed: int = 0, columns: int = COLUMNS) -> np.ndarray:
    """Noise [slice, row, column], from the lowest slice along the normal."""
    return np.random.default_rng(seed).integers(0, 900, (SLICES, ROWS, columns)).astype(np.uint16)


def series(rotation: np.ndarray, seed: int = 0, columns: int = COLUMNS, **elements: Any) -> list[Dataset]:
    """Single-frame slices, from the lowest along the normal; SliceThickness is not their distance."""
    study, uid, frame_of_reference = generate_uid(), generate_uid(), generate_uid()
    datasets = []
    for index, plane in enumerate(pixels(seed, columns)):
        dataset = _image(plane, MRImageStorage, study, uid, frame_of_reference)
        dataset.InstanceNumber = SLICES - index
        dataset.SliceThickness = 4
        dataset.ImageOrientationPatient = orientation_of(rotation)
        dataset.ImagePositionPatient = position_of(rotation, index)
        dataset.PixelSpacing = [ROW_MM, COLUMN_MM]
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
        datasets.append(dataset)
    return datasets


def enhanced(rotation: np.ndarray, order: Sequence[int], words: Sequence[str] = ("W", "F")) -> Dataset:
    """A multi-frame object of a stack for each word, the slices of each in an order; orientation a frame."""
    planes = [pixels(seed)[index] for index in order for seed in range(len(words))]
    dataset = _image(np.stack(planes), EnhancedMRImageStorage, generate_uid(), generate_uid(), generate_uid())
    dataset.NumberOfFrames = len(planes)
    dataset.SharedFunctionalGroupsSequence = [Dataset()]
    groups = []
    for index in order:
        for word in words:
            group, plane, measures, orientation, kind = (Dataset() for _ in range(5))
            plane.ImagePositionPatient = position_of(rotation, index)
            orientation.ImageOrientationPatient = orientation_of(rotation)
            measures.PixelSpacing, measures.SliceThickness = [ROW_MM, COLUMN_MM], 4
            kind.FrameType = ["ORIGINAL", "PRIMARY", word]
            group.PlanePositionSequence, group.PlaneOrientationSequence = [plane], [orientation]
            group.PixelMeasuresSequence, group.MRImageFrameTypeSequence = [measures], [kind]
            groups.append(group)
    dataset.PerFrameFunctionalGroupsSequence = groups
    return dataset


def position_of(rotation: np.ndarray, index: int) -> list[float]:
    """Of a slice's first voxel, mm LPS, with as many digits as scanners write."""
    return [round(float(mm), 6) for mm in np.array([-30.0, 20, 100]) + index * STEP_MM * rotation[:, 2]]


def orientation_of(rotation: np.ndarray) -> list[float]:
    return [round(float(cosine), 9) for cosine in [*rotation[:, 0], *rotation[:, 1]]]


def save(folder: Path, datasets: Sequence[Dataset], seed: int = 0) -> Path:
    """Writes files under shuffled names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"IM{number:04d}" for number in range(len(datasets))]
    random.Random(seed).shuffle(names)
    for name, dataset in zip(names, datasets, strict=True):
        dataset.save_as(folder / name, enforce_file_format=True)
    return folder


def _image(plane: np.ndarray, kind: str, study: str, uid: str, frame_of_reference: str) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = kind
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.PatientName, dataset.PatientID, dataset.PatientSex = PATIENT, "P-17", "F"
    dataset.PatientBirthDate, dataset.PatientAge, dataset.PatientWeight = "19600229", "060Y", 71.5
    dataset.ClinicalTrialSubjectID, dataset.ClinicalTrialTimePointID = "0042", "week 12"
    dataset.StudyDate, dataset.StudyTime, dataset.StudyID = "20200301", "101500", "7"
    dataset.AccessionNumber, dataset.ReferringPhysicianName = "A1", "Somebody^Else"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, uid
    dataset.FrameOfReferenceUID = frame_of_reference
    dataset.Modality, dataset.SeriesNumber, dataset.ImageType = "MR", 3, ["ORIGINAL", "PRIMARY"]
    dataset.Rows, dataset.Columns = plane.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelData = plane.tobytes()
    return dataset
