"""Surface distances by hand on grids whose voxels are no cubes, and against a search over all pairs of points."""

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import cKDTree

from lvseg.surfaces import surface_distances

SPACING_MM = (6.0, 2.0, 1.5)


def block(slices, rows, columns, shape=(12, 30, 40)):
    mask = np.zeros(shape, bool)
    mask[slices, rows, columns] = True
    return mask


def test_a_mask_equals_itself():
    mask = block(np.s_[3:8], np.s_[5:20], np.s_[10:30])
    found = surface_distances(mask, mask, SPACING_MM)
    assert found == {
        "surface_dice_1mm": 1.0, "surface_dice_3mm": 1.0, "hausdorff_95_mm": 0.0, "mean_surface_distance_mm": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(("axis", "step_mm"), list(enumerate(SPACING_MM)))
def test_a_shift_by_a_voxel_is_its_spacing_whatever_the_axis(axis, step_mm):
    mask = block(np.s_[3:8], np.s_[5:20], np.s_[10:30])
    moved = np.roll(mask, 1, axis)
    found = surface_distances(moved, mask, SPACING_MM, (step_mm / 2, step_mm))
    assert found["hausdorff_95_mm"] == pytest.approx(step_mm)
    assert found[f"surface_dice_{step_mm:g}mm"] == pytest.approx(1.0)
    # The faces along the shift coincide, those across it lie a step apart.
    assert 0 < found[f"surface_dice_{step_mm / 2:g}mm"] < 1
    assert 0 < found["mean_surface_distance_mm"] < step_mm


def test_a_slab_that_is_thicker_on_one_side_by_hand():
    # Two slabs of 18 and 24 mm through a picture of 400 x 400 mm: of four large faces two coincide and two lie 6 mm
    # apart; the rims, closed at the scan's edge, are 1,600 mm round and nearly coincide.
    shape = (12, 200, 200)
    thin, thick = block(np.s_[3:6], np.s_[:], np.s_[:], shape), block(np.s_[3:7], np.s_[:], np.s_[:], shape)
    found = surface_distances(thick, thin, (6.0, 2.0, 2.0))
    face, rims = 400.0**2, 1600 * (18 + 24)
    assert found["mean_surface_distance_mm"] == pytest.approx(2 * face * 6 / (4 * face + rims), abs=0.05)
    assert found["surface_dice_3mm"] == pytest.approx((2 * face + rims) / (4 * face + rims), abs=0.01)
    assert found["hausdorff_95_mm"] == pytest.approx(6.0)


def test_the_hausdorff_distance_agrees_with_a_search_over_all_pairs():
    random = np.random.default_rng(1)
    blobs = [ndimage.gaussian_filter(random.normal(size=(12, 30, 40)), 3) > 0.02 for _ in range(2)]
    found = surface_distances(*blobs, SPACING_MM)
    points = [np.argwhere(blob & ~ndimage.binary_erosion(blob)) * SPACING_MM for blob in blobs]
    ways = [cKDTree(points[1 - side]).query(points[side])[0] for side in (0, 1)]
    # Voxel centres instead of surface elements: alike within a voxel's diagonal.
    assert found["hausdorff_95_mm"] == pytest.approx(max(np.percentile(way, 95) for way in ways), abs=6.5)
    assert found["mean_surface_distance_mm"] == pytest.approx(np.mean(np.concatenate(ways)), abs=1.0)


def test_empty_masks_are_decided():
    nothing, mask = block(np.s_[:0], np.s_[:], np.s_[:]), block(np.s_[3:8], np.s_[5:20], np.s_[10:30])
    agrees = surface_distances(nothing, nothing, SPACING_MM, (1.0,))
    assert agrees == {"surface_dice_1mm": 1.0, "hausdorff_95_mm": 0.0, "mean_surface_distance_mm": 0.0}
    for pair in ((mask, nothing), (nothing, mask)):
        differs = surface_distances(*pair, SPACING_MM, (1.0,))
        assert differs == {"surface_dice_1mm": 0.0, "hausdorff_95_mm": None, "mean_surface_distance_mm": None}


def test_masks_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match=r"Expected two masks \[S, H, W\] of one shape"):
        surface_distances(np.ones((2, 3, 4), bool), np.ones((2, 3, 5), bool), SPACING_MM)
