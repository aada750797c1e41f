"""What of a DICOM scan a segmentation has to repeat: whose it is, of which study, and the image that each slice was.

Read with every scan and kept beside its voxels as `Volume.origin`, apart from the metadata, which name no patient and
go into reports. It is written nowhere but into a segmentation and, where one was asked for, into the server's spool.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pydicom
from pydicom.valuerep import DA, TM, PersonName

from lvseg.errors import InputError
from lvseg.formats.dicom_file import DicomFile, quiet, text, values
from lvseg.formats.dicom_geometry import Plane
from lvseg.volume import Volume

# What segmentations inherit: the modules on patient, clinical trial and study, the equipment, lossy compression.
KEPT = (
    "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientBirthTime", "PatientSex",
    "OtherPatientIDs", "EthnicGroup", "PatientComments", "PatientSpeciesDescription", "PatientIdentityRemoved",
    "DeidentificationMethod", "DeidentificationMethodCodeSequence",
    "ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialProtocolName", "ClinicalTrialSiteID",
    "ClinicalTrialSiteName", "ClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID",
    "ClinicalTrialProtocolEthicsCommitteeName", "ClinicalTrialProtocolEthicsCommitteeApprovalNumber",
    "ClinicalTrialTimePointID", "ClinicalTrialTimePointDescription",
    "StudyDate", "StudyTime", "AccessionNumber", "StudyID", "StudyDescription", "ReferringPhysicianName",
    "PatientAge", "PatientSize", "PatientWeight",
    "Modality", "SeriesNumber", "PositionReferenceIndicator",
    "Manufacturer", "ManufacturerModelName", "SoftwareVersions", "DeviceSerialNumber", "InstitutionName", "StationName",
    "LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod",
)  # fmt: skip
DATES, TIMES, SEXES = ("PatientBirthDate", "StudyDate"), ("PatientBirthTime", "StudyTime"), ("M", "F", "O")
# What a segmentation says of its images by UID, and cannot be written without.
NEEDED = {
    "study": "StudyInstanceUID",
    "series": "SeriesInstanceUID",
    "frame_of_reference": "FrameOfReferenceUID",
    "kind": "SOPClassUID",
    "instance": "SOPInstanceUID",
}
SAME = ("study", "series", "frame_of_reference")  # of all slices of a scan


@dataclass(frozen=True)
class Image:
    """The image of one slice.

    Args:
        study, series, frame_of_reference, kind, instance: UIDs (`NEEDED`), empty where the file has none.
        frame: its number in a multi-frame file, from 1 on; 0 in a single-frame one.
        frames: how many images its file has.
        position_mm: of its first voxel, LPS.
        thickness_mm: SliceThickness, or 0 where the file has none.
    """

    study: str
    series: str
    frame_of_reference: str
    kind: str
    instance: str
    frame: int
    frames: int
    position_mm: tuple[float, float, float]
    thickness_mm: float


@dataclass(frozen=True, eq=False)
class Origin:
    """Patient and study, and the image of each slice in the order of the volume's slices."""

    header: pydicom.Dataset
    images: tuple[Image, ...]

    def to_json(self) -> str:
        """As text, for `from_json`."""
        with quiet():
            header = self.header.to_json_dict(suppress_invalid_tags=True)
        return json.dumps({"header": header, "images": [asdict(image) for image in self.images]})

    @classmethod
    def from_json(cls, content: str) -> Origin:
        """What `to_json` wrote."""
        facts = json.loads(content)
        with quiet():
            header = pydicom.Dataset.from_json(facts["header"])
        images = [{**image, "position_mm": tuple(image["position_mm"])} for image in facts["images"]]
        return cls(header, tuple(Image(**image) for image in images))


def origin_of(planes: Sequence[Plane]) -> Origin:
    """The origin of a scan whose slices are these images; what cannot be read is left out."""
    headers = {id(plane.frame.file): plane.frame.file for plane in planes}
    uids = {key: {name: text([file.header], word) for name, word in NEEDED.items()} for key, file in headers.items()}
    images = tuple(_image(plane, uids[id(plane.frame.file)]) for plane in planes)
    return Origin(_kept(planes[0].frame.file.header), images)


def origin_warnings(planes: Sequence[Plane], origin: Origin) -> list[str]:
    """What the headers have against the slices' being of one scan: a sentence, or none. It names no patient."""
    headers = {id(plane.frame.file): plane.frame.file.header for plane in planes}.values()
    found = {
        "patients": {text([header], "PatientID") for header in headers},
        "studies": {image.study for image in origin.images},
        "frames of reference": {image.frame_of_reference for image in origin.images},
    }
    told = [f"{len(named)} {name}" for name, values in found.items() if len(named := values - {""}) > 1]
    return [f"the slices' files name {' and '.join(told)}: they may not be of one scan"] if told else []


def check_origin(scan: Volume) -> Origin:
    """What a segmentation needs to know of its scan.

    Raises:
        InputError: BAD_OUTPUT for a scan that did not come as DICOM, or whose files lack what the standard asks for.
    """
    name = scan.source or "the scan"
    origin = scan.origin
    if not isinstance(origin, Origin):
        raise InputError(
            "BAD_OUTPUT",
            f"Expected a scan that came as DICOM images for a DICOM segmentation, received another format in {name};"
            " ask for .vtk, .nii.gz, .vti, .nrrd or .mha.",
        )
    for field, keyword in NEEDED.items():
        found = {getattr(image, field) for image in origin.images}
        if "" in found or (field in SAME and len(found) > 1):
            raise InputError(
                "BAD_OUTPUT",
                f"Expected {'one' if field in SAME else 'a'} {keyword} in every file, which a DICOM segmentation refers"
                f" to, received {'files without' if '' in found else f'{len(found)} of them'} in {name}; ask for"
                " another format.",
            )
    return origin


def _image(plane: Plane, uids: dict[str, str]) -> Image:
    file: DicomFile = plane.frame.file
    is_multi_frame = "PerFrameFunctionalGroupsSequence" in file.header
    x_mm, y_mm, z_mm = (float(mm) for mm in plane.position)
    try:
        thickness_mm = float(text([*plane.frame.groups, file.header], "SliceThickness") or 0)
    except ValueError:
        thickness_mm = 0.0
    frame = plane.frame.index + 1 if is_multi_frame else 0
    return Image(**uids, frame=frame, frames=file.frames, position_mm=(x_mm, y_mm, z_mm), thickness_mm=thickness_mm)


def _kept(header: pydicom.Dataset) -> pydicom.Dataset:
    """The elements that are inherited, decoded, without those that cannot be parsed or mean nothing."""
    kept = pydicom.Dataset()
    for keyword in KEPT:
        try:
            element = header[keyword]
            value = element.value
            if isinstance(value, PersonName):
                value = str(value)  # decoded: the file's own bytes are in its character set, not in ours
            if keyword in DATES:
                DA(value)
            elif keyword in TIMES:
                TM(value)
            elif keyword == "PatientSex" and value not in SEXES:
                continue
            kept.add_new(element.tag, element.VR, value if element.VR == "SQ" or values(value) else None)
        except Exception:
            continue
    return kept
