"""The grid of a volume: canonical order by permuting and flipping alone, and back."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from lvseg.errors import InputError
from lvseg.volume import Volume

ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3)))


def reoriented(volume: Volume, order: tuple[int, ...], flips: tuple[bool, ...]) -> Volume:
    """The same voxels at the same places with other axes, by index arithmetic that shares nothing with Volume's."""
    voxels = volume.voxels.transpose(order)
    affine = volume.affine[:, [*order, 3]].copy()
    for axis, flip in enumerate(flips):
        if flip:
            voxels = np.flip(voxels, axis)
            affine[:3, 3] += affine[:3, axis] * (voxels.shape[axis] - 1)
            affine[:3, axis] *= -1
    return Volume(voxels, affine)


def canonical_volume(rotation: np.ndarray | None = None) -> Volume:
    voxels = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5)
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if rotation is None else rotation) @ np.array([[0, 0, 2.0], [0, 1.5, 0], [4.0, 0, 0]])
    affine[:3, 3] = -30.5, 12.25, 700
    return Volume(voxels, affine)


def test_every_orientation_has_the_same_canonical_voxels_and_positions():
    wanted = canonical_volume()
    assert len(ORIENTATIONS) == 48
    for order, flips in ORIENTATIONS:
        canonical = reoriented(wanted, order, flips).canonical()
        np.testing.assert_array_equal(canonical.voxels, wanted.voxels)
        np.testing.assert_array_equal(canonical.affine, wanted.affine)


def test_what_is_made_in_canonical_order_goes_back_to_each_orientation():
    wanted = canonical_volume()
    for order, flips in ORIENTATIONS:
        scan = reoriented(wanted, order, flips)
        returned = scan.from_canonical(scan.canonical().voxels)
        np.testing.assert_array_equal(returned.voxels, scan.voxels)
        np.testing.assert_array_equal(returned.affine, scan.affine)


@settings(max_examples=60, deadline=None)
@given(
    rotation=st.tuples(*[st.floats(-180, 180)] * 3).map(
        lambda angles: Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    ),
    orientation=st.sampled_from(ORIENTATIONS),
)
def test_a_tilted_scan_keeps_every_voxel_where_it_is(rotation, orientation):
    scan = reoriented(canonical_volume(rotation), *orientation)
    canonical = scan.canonical()
    index_of = {int(value): index for index, value in np.ndenumerate(canonical.voxels)}
    own = np.array(list(np.ndindex(scan.shape)))
    other = np.array([index_of[int(scan.voxels[tuple(index)])] for index in own])
    np.testing.assert_allclose(scan.world_mm(own), canonical.world_mm(other), atol=1e-9)
    np.testing.assert_array_equal(scan.from_canonical(canonical.voxels).voxels, scan.voxels)
    np.testing.assert_array_equal(canonical.canonical().voxels, canonical.voxels)
    # Each canonical axis has its largest share along its own world axis, or shares a tie.
    assert canonical.voxel_volume_mm3 == pytest.approx(scan.voxel_volume_mm3)
    assert sorted(canonical.spacing_mm) == pytest.approx(sorted(scan.spacing_mm))


def test_canonical_axes_point_to_head_back_and_left():
    steps = reoriented(canonical_volume(), (2, 0, 1), (True, False, True)).canonical().affine[:3, :3]
    np.testing.assert_array_equal(steps, [[0, 0, 2.0], [0, 1.5, 0], [4.0, 0, 0]])


def test_spacing_and_volume_by_hand():
    scan = canonical_volume()
    assert scan.spacing_mm == (4.0, 1.5, 2.0)
    assert scan.voxel_volume_mm3 == pytest.approx(12.0)
    np.testing.assert_array_equal(scan.world_mm([1, 2, 3]), [-30.5 + 6, 12.25 + 3, 704])


@pytest.mark.parametrize(("degrees", "oblique"), [(0.0, False), (0.01, False), (0.1, True), (30.0, True)])
def test_a_scan_is_oblique_when_some_voxel_would_move_by_over_a_hundredth_of_a_millimetre(degrees, oblique):
    rotation = Rotation.from_euler("x", degrees, degrees=True).as_matrix()
    scan = canonical_volume(rotation)
    assert scan.is_oblique is oblique
    assert reoriented(scan, (1, 2, 0), (True, True, False)).is_oblique is oblique
    far = Volume(np.broadcast_to(np.int8(0), (500, 500, 2)), scan.affine)
    assert far.is_oblique is (degrees > 0)


def test_volumes_share_no_affine_that_someone_could_change():
    affine = np.eye(4)
    scan = Volume(np.zeros((2, 2, 2), np.uint8), affine)
    affine[0, 3] = 99
    assert scan.affine[0, 3] == 0
    with pytest.raises(ValueError, match="read-only"):
        scan.affine[0, 3] = 1


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="shape"):
        canonical_volume().with_voxels(np.zeros((4, 4, 5), np.uint8))


@pytest.mark.parametrize(
    ("voxels", "affine", "code"),
    [
        (np.zeros((2, 2)), np.eye(4), "NEEDS_VOLUME_INDEX"),
        (np.zeros((2, 2, 2, 1)), np.eye(4), "NEEDS_VOLUME_INDEX"),
        (np.zeros((2, 0, 2)), np.eye(4), "EMPTY_IMAGE"),
        (np.zeros((2, 2, 2), complex), np.eye(4), "UNSUPPORTED_PIXEL_TYPE"),
        (np.zeros((2, 2, 2)), np.eye(3), "BAD_GEOMETRY"),
        (np.zeros((2, 2, 2)), np.diag([1, 1, np.nan, 1]), "BAD_GEOMETRY"),
        (np.zeros((2, 2, 2)), np.diag([1, 1, 0, 1]), "BAD_GEOMETRY"),
        (np.zeros((2, 2, 2)), np.diag([1, 1, 1, 2]), "BAD_GEOMETRY"),
        (np.zeros((2, 2, 2)), np.eye(4) + np.eye(4, k=1) * [0, 0.1, 0, 0], "BAD_GEOMETRY"),
    ],
)
def test_geometry_that_cannot_be_true_is_refused(voxels, affine, code):
    with pytest.raises(InputError) as caught:
        Volume(voxels, np.asarray(affine, dtype=float), source="scan.nii")
    assert caught.value.code == code
    assert caught.value.sentence.startswith("Expected ")
    assert "scan.nii" in caught.value.sentence
