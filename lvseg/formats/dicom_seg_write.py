"""Masks out as DICOM segmentations, beside the series that they were made of.

A binary object of highdicom's, one segment a class, each frame with the position of its slice and a reference to the
image that it lies on. Patient, study and frame of reference are those of the series.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from lvseg.errors import InputError
from lvseg.formats.dicom_file import quiet
from lvseg.volume import Volume

# What a class is called where DICOM has a code for it; anything else is tissue.
ORGANS = {"liver": codes.SCT.Liver, "spleen": codes.SCT.Spleen}
SERIES_NUMBER_OFFSET = 1000  # after the image's own, as for what is derived of it


def write(mask: Volume, sources: Sequence[Path], names: Sequence[str], algorithm: str, version: str, path: Path) -> None:
    """Writes a mask.

    Args:
        mask: uint8 labels on the grid of the series: `dicom.read` gave it, with `slice_files` or `slice_frames`.
        sources: the file of each slice, in the mask's order; one and the same for an Enhanced image.
        names: of the labels from 1 on.
        algorithm, version: of what made it.
        path: the file.

    Raises:
        InputError: UNSUPPORTED_FORMAT for a series that lacks what a segmentation has to say of it.
    """
    import highdicom

    try:
        with quiet():
            datasets = [pydicom.dcmread(source) for source in dict.fromkeys(sources)]
            segments = [_segment(number, name, algorithm, version) for number, name in enumerate(names, start=1)]
            positions = [_position(mask, index) for index in range(len(mask.voxels))]
            dataset = highdicom.seg.Segmentation(
                source_images=datasets,
                pixel_array=mask.voxels,
                segmentation_type="BINARY",
                segment_descriptions=segments,
                plane_positions=positions,
                series_instance_uid=generate_uid(),
                series_number=int(datasets[0].get("SeriesNumber") or 0) + SERIES_NUMBER_OFFSET,
                sop_instance_uid=generate_uid(),
                instance_number=1,
                manufacturer="lvseg",
                manufacturer_model_name=algorithm,
                software_versions=version,
                device_serial_number="0",
            )
            dataset.SeriesDescription = f"lvseg: {', '.join(names)}"[:64]
            dataset.save_as(path)
    except (AttributeError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            "UNSUPPORTED_FORMAT",
            f"Expected a series that a segmentation can refer to, received one without what DICOM asks for"
            f" ({type(error).__name__}) in {mask.source}; ask for another format.",
        ) from error


def _segment(number: int, name: str, algorithm: str, version: str) -> Any:
    import highdicom

    identification = highdicom.AlgorithmIdentificationSequence(
        name=algorithm, version=version, family=codes.DCM.ArtificialIntelligence
    )
    known = ORGANS.get(name.lower())
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=codes.SCT.Organ if known else codes.SCT.Tissue,
        segmented_property_type=known or codes.SCT.Tissue,
        algorithm_type="AUTOMATIC",
        algorithm_identification=identification,
    )


def _position(mask: Volume, index: int) -> Any:
    import highdicom

    first_pixel = np.round(mask.world_mm([index, 0, 0]), 6)
    return highdicom.PlanePositionSequence(coordinate_system="PATIENT", image_position=first_pixel)
