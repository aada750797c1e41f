"""What other readers see in a mutated file: nibabel, ITK, VTK, highdicom, Pillow, and pydicom with arithmetic."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import SimpleITK
from PIL import Image
from vtkmodules.util.numpy_support import vtk_to_numpy
from vtkmodules.vtkCommonCore import vtkLogger, vtkObject
from vtkmodules.vtkIOLegacy import vtkStructuredPointsReader
from vtkmodules.vtkIOXML import vtkXMLImageDataReader

Seen = tuple[np.ndarray, np.ndarray]


def warm_up() -> None:
    """Loads what libraries load on first use, and keeps them quiet."""
    vtkObject.GlobalWarningDisplayOff()
    vtkLogger.SetStderrVerbosity(vtkLogger.VERBOSITY_OFF)
    SimpleITK.ProcessObject.GlobalWarningDisplayOff()
    warnings.simplefilter("ignore")


def read(path: Path) -> Seen:
    """Voxels [slice, row, column] and the affine to LPS millimetres, or whatever exception the library raises."""
    name = path.name
    if path.is_dir():
        files = sorted(path.iterdir())
        if any(file.suffix == ".png" for file in files):
            return pictures(files)
        return dicom([pydicom.dcmread(file) for file in files])
    if name.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            return dicom([pydicom.dcmread(io.BytesIO(archive.read(entry))) for entry in archive.infolist()])
    if name.endswith((".nii", ".nii.gz")):
        return nifti(path)
    if name.endswith((".nrrd", ".nhdr", ".mha", ".mhd")):
        return itk(path)
    if name.endswith((".vtk", ".vti")):
        return vtk(path)
    dataset = pydicom.dcmread(path)
    return segmentation(path) if "SegmentSequence" in dataset else dicom([dataset])


def nifti(path: Path) -> Seen:
    image = nibabel.load(path)
    affine = np.diag([-1, -1, 1, 1]) @ image.affine[:, [2, 1, 0, 3]]
    voxels = np.asarray(image.dataobj)
    while voxels.ndim > 3:
        voxels = voxels[..., 0]
    return voxels.transpose(2, 1, 0), affine


def itk(path: Path) -> Seen:
    image = SimpleITK.ReadImage(str(path))
    if image.GetDimension() > 3:
        image = image[:, :, :, 0]
    affine = np.eye(4)
    affine[:3, :3] = (np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing())[:, ::-1]
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image), affine


def vtk(path: Path) -> Seen:
    reader = vtkStructuredPointsReader() if path.suffix == ".vtk" else vtkXMLImageDataReader()
    reader.SetFileName(str(path))
    reader.Update()
    image = reader.GetOutput()
    directions = np.array([image.GetDirectionMatrix().GetElement(i, j) for i in range(3) for j in range(3)])
    directions = directions.reshape(3, 3)
    if path.suffix == ".vtk":  # what no reader of VTK knows: the title line
        title = path.read_bytes().split(b"\n", 2)[1].decode("latin-1")
        if found := re.match(r"lvseg 1; SPACE=LPS; DIR=(.*)", title):
            directions = np.array([float(word) for word in found[1].split(",")]).reshape(3, 3).T
    extent = image.GetExtent()
    affine = np.eye(4)
    affine[:3, :3] = (directions * image.GetSpacing())[:, ::-1]
    affine[:3, 3] = image.GetOrigin() + affine[:3, :3] @ [extent[4], extent[2], extent[0]]
    voxels = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(image.GetDimensions()[::-1])
    return voxels, affine


def segmentation(path: Path) -> Seen:
    found = highdicom.seg.segread(path).get_volume(combine_segments=True)
    voxels, affine = found.array, found.affine.copy()
    if affine[:3, 0] @ np.cross(affine[:3, 2], affine[:3, 1]) < 0:  # slices from the other end
        affine[:3, 3] += affine[:3, 0] * (len(voxels) - 1)
        affine[:3, 0] *= -1
        voxels = voxels[::-1]
    return voxels, affine


def pictures(files: list[Path]) -> Seen:
    """Without geometry, which the files do not have."""
    return np.stack([np.asarray(Image.open(file).convert("I")) for file in files]), np.eye(4)


def first_of(groups: list[pydicom.Dataset], keyword: str, default: object = None) -> object:
    return next((group[keyword].value for group in groups if group.get(keyword) is not None), default)


def dicom(datasets: list[pydicom.Dataset]) -> Seen:
    """Frames sorted along the normal of the first, as the standard's formula places them."""
    frames = []
    for dataset in datasets:
        pixels = dataset.pixel_array
        own = dataset.get("PerFrameFunctionalGroupsSequence")
        if own is None:
            frames.append(([dataset], pixels))
            continue
        shared = list(dataset.SharedFunctionalGroupsSequence)
        for group, plane in zip(own, pixels, strict=True):
            items = [item for part in [group, *shared] for element in part if element.VR == "SQ" for item in element]
            frames.append((items, plane))
    row, column = np.reshape(np.array(first_of(frames[0][0], "ImageOrientationPatient"), float), (2, 3))
    normal = np.cross(row, column)
    placed = []
    for groups, plane in frames:
        position = np.array(first_of(groups, "ImagePositionPatient"), float)
        slope = float(first_of(groups, "RescaleSlope", 1.0))
        intercept = float(first_of(groups, "RescaleIntercept", 0.0))
        placed.append((position, plane.astype(float) * slope + intercept))
    placed.sort(key=lambda one: normal @ one[0])
    spacing = np.array(first_of(frames[0][0], "PixelSpacing"), float)
    affine = np.eye(4)
    affine[:3, 0] = (placed[-1][0] - placed[0][0]) / (len(placed) - 1)
    affine[:3, 1], affine[:3, 2] = column * spacing[0], row * spacing[1]
    affine[:3, 3] = placed[0][0]
    return np.stack([plane for _, plane in placed]), affine
