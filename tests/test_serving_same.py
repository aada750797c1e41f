"""The service's answers are lvseg.predict's, voxel for voxel: for every simulated scanner, and for real scans."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage
from test_serving_model import LIMIT_S, serving_models

from lvseg.errors import InputError
from lvseg.formats import read_volume, write_volume
from lvseg.phantom.patients import draw_anatomy, random_stream
from lvseg.phantom.scanners import Scanner, image_patient
from lvseg.phantom.simulate import PROTOCOLS
from lvseg.phantom.varied import VariedScanner, draw_scanner
from lvseg.predict import FAT_FRACTION_TASK, Segmenter, read_scan
from lvseg.volume import Volume
from serving.connection import Client, ClientError
from serving.keys import Credentials

SERIES = "1.2.826.0.1.3680043.8.498.7"
COARSER = 4
SIZE = 32


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks of either task with weights as drawn, which mark about half of what they see."""
    from lvseg.export import export_model
    from lvseg.models.unet import unet

    folder = tmp_path_factory.mktemp("models")
    for seed, task in enumerate(("volume", FAT_FRACTION_TASK)):
        card = {
            "task": task,
            "labels": ["background", "liver"],
            "spacing_mm": [12.0, 12.0],
            "size": SIZE,
            "neighbours": 1,
            "axis": "transversal",
            "batch_size": 8,
            "normalisation": "patient",
            "clip_percentiles": [1.0, 99.0],
            "global_bounds": None,
            "postprocessing": ["largest_component"],
        }
        export_model(unet(SIZE, 3, 2, 4, seed=seed), card, folder / task / "1")
    return folder


@pytest.fixture(scope="module")
def endpoint(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Credentials]]:
    """Address of a server as its command starts it, and the keys of a client."""
    with serving_models(models, tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.fixture(scope="module")
def segmenters(models: Path) -> dict[str, Segmenter]:
    """The models here, without a server."""
    return {task: Segmenter(models / task) for task in ("volume", FAT_FRACTION_TASK)}


def patient(name: str) -> dict[str, Volume]:
    """The images of one simulated patient under a scanner's protocol, of fewer and larger pixels where it is MR."""
    protocol = PROTOCOLS[name]
    if isinstance(protocol, VariedScanner):
        scanner = draw_scanner(name, protocol.task, random_stream(1, 1, f"scanner {name}"))
    elif isinstance(protocol, Scanner):
        scanner = protocol
    else:
        return dict(protocol.image(1, 1).images)
    scanner = replace(
        scanner,
        rows=scanner.rows // COARSER,
        columns=scanner.columns // COARSER,
        pixel_mm=COARSER * scanner.pixel_mm,
    )
    return dict(image_patient(draw_anatomy(1, 1, varied=protocol.varied), scanner).images)


def write_dicom(images: dict[str, Volume], modality: str, folder: Path) -> Path:
    """The images as files of one DICOM series, a word of the image type for each."""
    folder.mkdir()
    for word, image in images.items():
        scan = image.canonical()
        assert scan.voxels.dtype == np.int16
        to_column, to_row = (scan.affine[:3, axis] / np.linalg.norm(scan.affine[:3, axis]) for axis in (2, 1))
        for index, pixels in enumerate(scan.voxels):
            dataset = pydicom.Dataset()
            dataset.file_meta = FileMetaDataset()
            dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            dataset.SOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
            dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
            dataset.SOPInstanceUID = f"{SERIES}.{len(word)}.{index + 1}.{ord(word[0])}"
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
            dataset.StudyInstanceUID = dataset.SeriesInstanceUID = SERIES
            dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = modality, 3, index + 1
            dataset.ImageType = ["DERIVED", "PRIMARY", word]
            dataset.ImageOrientationPatient = [round(float(part), 9) for part in (*to_column, *to_row)]
            dataset.ImagePositionPatient = [round(float(mm), 6) for mm in scan.world_mm((index, 0, 0))]
            dataset.PixelSpacing = [round(float(mm), 6) for mm in scan.spacing_mm[1:]]
            dataset.SliceThickness = round(scan.spacing_mm[0], 6)
            dataset.Rows, dataset.Columns = pixels.shape
            dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = (
                1,
                "MONOCHROME2",
                1,
            )
            dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
            dataset.PixelData = np.ascontiguousarray(pixels, "<i2").tobytes()
            dataset["PixelData"].VR = "OW"
            dataset.save_as(folder / f"{word}{index:03d}.dcm", enforce_file_format=True)
    return folder


def zipped(folder: Path) -> Path:
    """The folder's files as an archive beside it."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.iterdir():
            archive.write(file, f"study/{file.name}")
    return path


def expect_same(
    endpoint: tuple[str, Credentials], segmenter: Segmenter, scan: Path, folder: Path, modality: str = ""
) -> np.ndarray[Any, Any] | None:
    """Has a scan segmented there and here; the mask, or None where both refuse it with the same code.

    NRRD, since it keeps the affine's numbers to the last digit.
    """
    task = segmenter.info["task"]
    with Client(*endpoint) as client:
        try:
            expected = segmenter.segment(read_scan(scan, task), modality=modality or None)
        except InputError as error:
            with pytest.raises(ClientError) as refused:
                client.segment(scan, task, folder / "mask.nrrd", LIMIT_S, modality=modality)
            assert refused.value.code == error.code
            return None
        (path,), measurements = client.segment(scan, task, folder / "mask.nrrd", LIMIT_S, modality=modality)
    served = read_volume(path)
    np.testing.assert_array_equal(served.voxels, expected.mask.voxels)
    np.testing.assert_array_equal(served.affine, expected.mask.affine)
    del measurements["seconds"]
    assert measurements["geometry"].pop("proof") == "same voxels, same places"
    assert measurements["geometry"].pop("furthest_mm") == 0
    assert measurements == json.loads(json.dumps(expected.measurements))
    return served.voxels


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_answer_for_every_scanner_is_that_of_predict(
    endpoint: tuple[str, Credentials], segmenters: dict[str, Segmenter], tmp_path: Path, name: str
) -> None:
    images = patient(name)
    is_ct, is_fat = name.startswith("ct_"), "water" in images
    modality = "CT" if is_ct else "MR"
    segmenter = segmenters[FAT_FRACTION_TASK if is_fat else "volume"]
    parts = {"W": images["water"], "F": images["fat"]} if is_fat else {"M": images["image"]}
    file = write_volume(images["image"], tmp_path / "image.nii.gz")[0]
    folder = write_dicom(parts, modality, tmp_path / "study")
    masks = [
        expect_same(endpoint, segmenter, file, tmp_path, modality),
        expect_same(endpoint, segmenter, folder, tmp_path),
        expect_same(endpoint, segmenter, zipped(folder), tmp_path),
    ]
    for mask in masks:
        assert mask is not None
        assert 0 < np.count_nonzero(mask) < mask.size
    np.testing.assert_array_equal(masks[1], masks[2])


def test_the_answer_for_real_scans_is_that_of_predict(
    endpoint: tuple[str, Credentials], segmenters: dict[str, Segmenter], real_data: Path, tmp_path: Path
) -> None:
    scans = [path for path in sorted(real_data.iterdir()) if path.is_dir() or ".nii" in path.name]
    scans += [file for path in scans if path.is_dir() for file in [min(path.iterdir())]]  # and one file of each
    masks = {scan: expect_same(endpoint, segmenters["volume"], scan, tmp_path) for scan in scans}
    answered = [mask for mask in masks.values() if mask is not None]
    assert len(answered) > len(scans) / 2
    assert all(0 < np.count_nonzero(mask) < mask.size for mask in answered)


def test_a_scan_of_more_slices_than_any_scanner_makes_is_refused(
    endpoint: tuple[str, Credentials], segmenters: dict[str, Segmenter], tmp_path: Path
) -> None:
    """Each slice becomes one of the network's size, so a small file of thin slices would need all memory there is."""
    voxels = np.random.default_rng(0).integers(0, 99, (20_000, 2, 2)).astype(np.uint8)
    scan = write_volume(Volume(voxels, np.diag([0.1, 1.0, 1.0, 1.0])[[2, 1, 0, 3]]), tmp_path / "thin.nii.gz")[0]
    with pytest.raises(InputError) as told:
        segmenters["volume"].segment(read_volume(scan))
    assert told.value.code == "DIMS_LIMIT"
    assert expect_same(endpoint, segmenters["volume"], scan, tmp_path) is None
