"""Grids for the tests of formats: every orientation, oblique ones, and what ITK says of them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import SimpleITK
from bad_files import volume
from scipy.spatial.transform import Rotation

from lvseg.volume import Volume


def tilted(angles_degrees: tuple[float, float, float] = (20.0, -35.0, 10.0), scan: Volume | None = None) -> Volume:
    """The scan turned about the world's axes."""
    scan = scan or volume()
    affine = scan.affine.copy()
    affine[:3, :3] = Rotation.from_euler("xyz", angles_degrees, degrees=True).as_matrix() @ affine[:3, :3]
    return Volume(scan.voxels, affine)


def all_48_orientations(scan: Volume) -> list[Volume]:
    """The same voxels at the same points of the world, in every order and direction of the axes."""
    volumes = []
    for axes in itertools.permutations(range(3)):
        for flipped in itertools.product((False, True), repeat=3):
            flips = [axis for axis in range(3) if flipped[axis]]
            affine = scan.affine[:, [*axes, 3]]
            voxels = np.flip(scan.voxels.transpose(axes), flips)
            for axis in flips:
                affine[:3, 3] += affine[:3, axis] * (voxels.shape[axis] - 1)
                affine[:3, axis] *= -1
            volumes.append(Volume(voxels, affine))
    return volumes


def corners_of(shape: tuple[int, int, int]) -> np.ndarray:
    """Indices (slice, row, column) of the corner voxels [8, 3]."""
    return np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)


def itk_image(scan: Volume) -> SimpleITK.Image:
    """The scan as ITK holds it."""
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(scan.voxels))
    image.SetSpacing(scan.spacing_mm[::-1])
    image.SetOrigin(scan.affine[:3, 3].tolist())
    image.SetDirection(scan.directions[:, ::-1].ravel().tolist())
    return image


def assert_itk_sees_the_same(path: Path, scan: Volume) -> None:
    """ITK reads the file to these voxels, at these points of the world."""
    image = SimpleITK.ReadImage(str(path))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image), scan.voxels)
    corners = corners_of(scan.shape)
    points = [image.TransformIndexToPhysicalPoint([int(i) for i in corner[::-1]]) for corner in corners]
    np.testing.assert_allclose(points, scan.world_mm(corners), rtol=0, atol=1e-9)
