"""Small folder trees in the layouts of public datasets, in their real file formats: DICOM, PNG, NIfTI, CSV.

Every maker returns what a reader must find: {(patient, study): (image, liver)}, canonical arrays [slice, row, column].
"""

import csv
import re
import textwrap
from collections.abc import Collection
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from small_study import write_card

SHAPE, SPACING_MM = (5, 36, 40), (6.0, 3.0, 3.0)
Expected = dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]


def body(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image (int16, 0 in air), a liver and a spleen (bool) that no other seed has."""
    random = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*((np.arange(n) - (n - 1) / 2) / n for n in SHAPE), indexing="ij")
    inside = (y / 0.42) ** 2 + (x / 0.45) ** 2 < 1
    left = random.uniform(-0.02, 0.02)
    liver = ((z / 0.45) ** 2 + (y / 0.2) ** 2 + ((x + 0.18 + left) / 0.2) ** 2) < 1
    spleen = (((z - 0.1) / 0.4) ** 2 + ((y - 0.1) / 0.15) ** 2 + ((x - 0.28) / 0.08) ** 2) < 1
    shades = 320 + 60 * np.sin(random.uniform(5, 15) * x + random.uniform(5, 15) * y + random.uniform(0, 6) * (1 + z))
    image = inside * np.rint(shades / 4) * 4 + liver * 300
    return image.astype(np.int16), liver, spleen


def write_dicom(folder: Path, names: list[str], voxels: np.ndarray, modality: str = "MR", **fields: object) -> None:
    """Writes slices, from feet to head, under these names."""
    folder.mkdir(parents=True)
    series, frame = generate_uid(), generate_uid()
    for index, (name, plane) in enumerate(zip(names, voxels, strict=True)):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        storage = MRImageStorage if modality == "MR" else CTImageStorage
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = storage
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = series, series, frame
        dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = modality, 1, index + 1
        dataset.ImageType = ["ORIGINAL", "PRIMARY"]
        dataset.SliceThickness = SPACING_MM[0]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.ImagePositionPatient = [-60, -54, -400 + index * SPACING_MM[0]]
        dataset.PixelSpacing = list(SPACING_MM[1:])
        dataset.Rows, dataset.Columns = plane.shape
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit, dataset.PixelRepresentation = 15, 1
        dataset.PixelData = plane.astype(np.int16).tobytes()
        dataset["PixelData"].VR = "OW"
        for keyword, value in fields.items():
            setattr(dataset, keyword, value)
        dataset.save_as(folder / name, enforce_file_format=True)


def write_png(folder: Path, names: list[str], labels: np.ndarray) -> None:
    """Writes grey-value masks, one a slice."""
    folder.mkdir(parents=True)
    for name, plane in zip(names, labels, strict=True):
        PIL.Image.fromarray(plane.astype(np.uint8)).save(folder / name)


def write_nifti(path: Path, voxels: np.ndarray, signs: tuple[int, int, int] = (1, 1, 1)) -> None:
    """Writes a canonical array, with axes (column, row, slice) as NIfTI files have them and these directions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = voxels.transpose(2, 1, 0)[tuple(slice(None, None, sign) for sign in signs)]
    # Canonical columns and rows run to the left and to the back, which RAS counts downwards.
    steps = np.array([-SPACING_MM[2], -SPACING_MM[1], SPACING_MM[0]]) * signs
    affine = np.diag([*steps, 1.0])
    affine[:3, 3] = [
        origin + (0 if sign > 0 else -step * (count - 1))
        for origin, step, sign, count in zip((60, 54, -400), steps, signs, stored.shape, strict=True)
    ]
    nibabel.save(nibabel.Nifti1Image(stored, affine), path)


def chaos_mr(root: Path) -> Expected:
    """CHAOS: T1-DUAL, odd file numbers out of phase, even ones in phase; a mask has the name of its in-phase file."""
    expected: Expected = {}
    for patient, feet_first in (("1", True), ("13", False)):
        image, liver, spleen = body(int(patient))
        count = len(image)
        order = range(count) if feet_first else range(count - 1, -1, -1)
        numbers = {slice_index: place for place, slice_index in enumerate(order)}
        even = [f"IMG-0004-{2 * numbers[index] + 2:05d}" for index in range(count)]
        odd = [f"IMG-0004-{2 * numbers[index] + 1:05d}" for index in range(count)]
        folder = root / patient / "T1DUAL"
        echoes = {"MagneticFieldStrength": 1.5}
        write_dicom(folder / "DICOM_anon/InPhase", [f"{n}.dcm" for n in even], image, EchoTime=4.6, **echoes)
        write_dicom(folder / "DICOM_anon/OutPhase", [f"{n}.dcm" for n in odd], image * 3 // 4, EchoTime=2.3, **echoes)
        write_png(folder / "Ground", [f"{n}.png" for n in even], liver * 63 + (spleen & ~liver) * 252)
        expected[f"chaos-mr-{patient}", "1"] = image, liver
    return expected


def chaos_ct(root: Path) -> Expected:
    """CHAOS: CT, files from head to feet, masks numbered in the same order."""
    image, liver, _ = body(21)
    count = len(image)
    write_dicom(
        root / "2/DICOM_anon", [f"i{count - 1 - index:04d},0000b.dcm" for index in range(count)], image, "CT",
        RescaleSlope=1, RescaleIntercept=-1200,
    )  # fmt: skip
    write_png(root / "2/Ground", [f"liver_GT_{count - 1 - index:03d}.png" for index in range(count)], liver * 255)
    return {("chaos-ct-2", "1"): (image - 1200, liver)}


def amos(root: Path) -> dict[str, Expected]:
    """AMOS22: CT and MR in one folder, told apart by their numbers; scans for testing have no masks."""
    expected: dict[str, Expected] = {"amos_ct": {}, "amos_mr": {}}
    for number, signs in (("0001", (1, 1, 1)), ("0404", (-1, 1, 1)), ("0507", (1, -1, 1)), ("0600", (-1, -1, 1))):
        image, liver, spleen = body(int(number))
        write_nifti(root / f"imagesTr/amos_{number}.nii.gz", image, signs)
        write_nifti(root / f"labelsTr/amos_{number}.nii.gz", (liver * 6 + (spleen & ~liver)).astype(np.uint8), signs)
        expected["amos_ct" if int(number) < 500 else "amos_mr"][f"amos-{number}", "1"] = image, liver
    write_nifti(root / "imagesTs/amos_0008.nii.gz", body(8)[0])
    (root / "dataset.json").write_text("{}")
    return expected


def lits(root: Path) -> Expected:
    """LiTS: tumours (2) inside livers (1), files in one folder, numbers without zeros."""
    expected: Expected = {}
    for number in (0, 2, 10):
        image, liver, _ = body(100 + number)
        labels = liver.astype(np.uint8)
        labels[2, 16:20, 10:13][liver[2, 16:20, 10:13]] = 2
        write_nifti(root / f"volume-{number}.nii", image, (-1, 1, 1))
        write_nifti(root / f"segmentation-{number}.nii", labels, (-1, 1, 1))
        expected[f"lits-{number}", "1"] = image, liver
    return expected


def totalsegmentator_mr(root: Path) -> Expected:
    """TotalSegmentator MRI: a file an organ; meta.csv, parted by semicolons, says who is for testing."""
    expected: Expected = {}
    rows = [("s0001", "train"), ("s0003", "train"), ("s0175", "test")]
    for patient, part in rows:
        image, liver, spleen = body(1000 + int(patient[1:]))
        write_nifti(root / patient / "mri.nii.gz", image)
        for organ, mask in (("liver", liver), ("spleen", spleen)):
            write_nifti(root / patient / f"segmentations/{organ}.nii.gz", mask.astype(np.uint8))
        if part == "train":
            expected[f"totalsegmentator-{patient}", "1"] = image, liver
    with (root / "meta.csv").open("w", newline="") as file:
        table = csv.writer(file, delimiter=";")
        table.writerow(["image_id", "split", "institute"])
        table.writerows([patient, part, "A"] for patient, part in rows)
    return expected


def duke_liver(root: Path) -> Expected:
    """Duke liver: a folder a patient, one a series, images and masks as DICOM files of one name."""
    expected: Expected = {}
    for patient, study in (("0001", "3"), ("0001", "12"), ("0044", "5")):
        image, liver, _ = body(int(patient) * 100 + int(study))
        names = [f"{index + 1:04d}.dicom" for index in range(len(image))]
        write_dicom(root / patient / study / "images", names, image)
        write_dicom(root / patient / study / "masks", names, liver.astype(np.int16))
        expected[f"duke-{patient}", study] = image, liver
    return expected


def fat_study(folder: Path, patients: int, swapped: Collection[int] = ()) -> None:
    """Water and fat images of bodies with a fatty rim and a liver of (20 + 5 n) / (500 + 5 n) fat, and their card.

    The patients in `swapped` have water and fat under each other's name.
    """
    rows, columns = np.meshgrid(*((np.arange(n) - (n - 1) / 2) for n in (60, 72)), indexing="ij")
    distance = np.hypot(rows / 26, columns / 32)
    fatty, inside = (distance < 1) & (distance > 0.8), distance < 1
    mask = np.broadcast_to(np.hypot(rows, columns + 10) < 10, (6, 60, 72)).astype(np.uint8)
    for number in range(patients):
        water = np.broadcast_to(np.where(fatty, 30, 480) * inside, mask.shape)
        fat = np.broadcast_to(np.where(fatty, 450, 20 + 5 * number) * inside, mask.shape)
        if number in swapped:
            water, fat = fat, water
        home = folder / f"raw/fat/p{number}"
        for name, voxels in (("water", water.astype(np.int16)), ("fat", fat.astype(np.int16)), ("mask", mask)):
            write_nifti(home / f"{name}.nii.gz", voxels)
    write_card(
        folder, "fat", root="../raw/fat", image=None, water="{patient}/water.nii.gz", fat="{patient}/fat.nii.gz",
        task="fatfraction", kind="fat_fraction", mask="{patient}/mask.nii.gz", labels={"organ": [1]},
    )  # fmt: skip


def readme_blocks(path: Path) -> dict[str, str]:
    """The fenced blocks of a Markdown file by the file name in their first line, or `sh` for commands."""
    found = re.findall(r"^ *```(\w+)\n(.*?)^ *```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    blocks = [(kind, textwrap.dedent(text)) for kind, text in found]
    return {(match[1] if (match := re.match(r"# (\S+\.yaml)", text)) else kind): text for kind, text in blocks}
