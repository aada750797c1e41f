import itertools
import json
import math

import numpy as np
import pytest

from lvseg.biomarkers import agreement, touches_edge, volume_ml
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


def test_agreement_by_hand():
    # Errors +10, -20, +40, -10: mean 5, squares of what is left 25 + 625 + 1225 + 225 = 2100, sd sqrt(2100 / 3).
    # In percent of the truth: 1, 2, 10, 0.5.
    found = agreement(predicted=[1010, 980, 440, 1990], true=[1000, 1000, 400, 2000])
    sd = math.sqrt(700)
    assert found == pytest.approx(
        {
            "n": 4,
            "bias": 5.0,
            "sd": sd,
            "limit_of_agreement_lower": 5 - 1.96 * sd,
            "limit_of_agreement_upper": 5 + 1.96 * sd,
            "mean_absolute_error": 20.0,
            "n_percent": 4,
            "mean_absolute_error_percent": 3.375,
            "largest_error_percent": 10.0,
            "share_within_5_percent": 0.75,
        }
    )


def test_too_much_is_positive():
    assert agreement([110], [100])["bias"] == 10.0


def test_an_error_of_exactly_five_percent_is_not_within():
    assert agreement([105, 95, 104], [100, 100, 100])["share_within_5_percent"] == pytest.approx(1 / 3)


def test_one_patient_has_no_spread():
    found = agreement([1100.0], [1000.0])
    assert found["n"] == 1
    assert found["bias"] == 100.0
    assert found["mean_absolute_error_percent"] == pytest.approx(10.0)
    for name in ("sd", "limit_of_agreement_lower", "limit_of_agreement_upper"):
        assert found[name] is None


def test_a_true_number_of_zero_has_no_percentage():
    found = agreement([1.0, 11.0], [0.0, 10.0])
    assert found["n"] == 2
    assert found["mean_absolute_error"] == 1.0
    assert found["n_percent"] == 1
    assert found["mean_absolute_error_percent"] == pytest.approx(10.0)
    assert agreement([1.0], [0.0])["mean_absolute_error_percent"] is None


def test_agreement_goes_into_json():
    found = agreement(np.array([1.0, 2.0], np.float32), np.array([1.0, 3.0], np.float32))
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(("predicted", "true"), [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])])
def test_lists_that_do_not_pair_up_are_refused(predicted, true):
    with pytest.raises(ValueError, match="Expected two numbers for each patient"):
        agreement(predicted, true)


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="Expected finite numbers"):
        agreement([math.nan], [1.0])
