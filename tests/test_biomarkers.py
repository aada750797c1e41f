import itertools
import math

import numpy as np
import pytest

from lvseg.biomarkers import steatosis_grade, touches_edge, volume_ml
from lvseg.volume import Volume

# Canonical [slice, row, column] to LPS: slices go up z, rows up y, columns up x.
CANONICAL = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], float)


def on_grid(voxels: np.ndarray, spacing_mm: tuple[float, float, float] = (5.0, 2.0, 1.5)) -> Volume:
    return Volume(voxels, CANONICAL @ np.diag([*spacing_mm, 1.0]))


def in_file_order(volume: Volume, order: tuple[int, ...], flips: tuple[bool, ...]) -> Volume:
    """The same voxels at the same places, as a file with its axes in another order and direction has them."""
    voxels = np.transpose(volume.voxels, order)
    affine = volume.affine[:, [*order, 3]].copy()
    for axis in np.flatnonzero(flips):
        voxels = np.flip(voxels, axis)
        affine[:3, 3] += affine[:3, axis] * (voxels.shape[axis] - 1)
        affine[:3, axis] *= -1
    return Volume(voxels, affine)


ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product([False, True], repeat=3)))


def test_volume_by_hand():
    voxels = np.zeros((4, 5, 6), np.uint8)
    voxels[1:3, 1:4, 2:4] = 1  # 12 voxels of 5 x 2 x 1.5 = 15 mm^3
    voxels[0, 0, 0] = 2
    assert volume_ml(on_grid(voxels)) == pytest.approx(0.180)
    assert volume_ml(on_grid(voxels), label=2) == pytest.approx(0.015)
    assert volume_ml(on_grid(voxels), label=3) == 0.0
    assert volume_ml(on_grid(voxels == 1)) == pytest.approx(0.180)


def test_volume_of_an_oblique_scan_is_that_of_its_voxels():
    turn = np.eye(4)
    turn[:2, :2] = [[math.cos(0.3), -math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]]
    straight = on_grid(np.ones((3, 3, 3), np.uint8))
    assert volume_ml(Volume(straight.voxels, turn @ straight.affine)) == pytest.approx(volume_ml(straight))


@pytest.mark.parametrize(
    ("index", "flags"),
    [
        ((2, 2, 3), []),
        ((0, 2, 3), ["lowest slice"]),
        ((4, 2, 3), ["highest slice"]),
        ((2, 0, 3), ["in-plane edge"]),
        ((2, 5, 3), ["in-plane edge"]),
        ((2, 2, 0), ["in-plane edge"]),
        ((2, 2, 6), ["in-plane edge"]),
        ((0, 5, 6), ["lowest slice", "in-plane edge"]),
    ],
)
def test_borders_are_named_in_canonical_terms_whatever_the_files_order(index, flags):
    voxels = np.zeros((5, 6, 7), np.uint8)
    voxels[index] = 1
    for order, flips in ORIENTATIONS:
        assert touches_edge(in_file_order(on_grid(voxels), order, flips)) == flags


def test_an_empty_mask_touches_nothing_and_other_labels_do_not_count():
    voxels = np.zeros((3, 4, 4), np.uint8)
    assert touches_edge(on_grid(voxels)) == []
    voxels[0] = 2
    assert touches_edge(on_grid(voxels)) == []
    assert touches_edge(on_grid(voxels), label=2) == ["lowest slice", "in-plane edge"]


def test_a_single_slice_is_both_lowest_and_highest():
    voxels = np.zeros((1, 5, 5), np.uint8)
    voxels[0, 2, 2] = 1
    assert touches_edge(on_grid(voxels)) == ["lowest slice", "highest slice"]


def test_a_steatosis_grade_begins_at_its_threshold():
    assert [steatosis_grade(percent) for percent in (0.0, 5.55, 5.56, 40.0)] == [0, 0, 1, 1]
    grades = (5.56, 16.3, 21.7)
    assert [steatosis_grade(percent, grades) for percent in (5.0, 5.56, 16.29, 16.3, 21.7, 30.0)] == [0, 1, 1, 2, 3, 3]
