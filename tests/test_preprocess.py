"""Harmonising and the way back, against scipy, hand arithmetic and properties."""

import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf

from lvseg import metrics, preprocess
from lvseg.phantom.patients import draw_anatomy
from lvseg.phantom.scanners import SCANNERS, image_patient


def random_voxels(shape=(3, 23, 31), seed=0):
    return np.random.default_rng(seed).normal(100, 30, shape).astype(np.float32)


def reference_plane(plane, spacing_mm, target_mm, size, fill):
    """First-order interpolation by scipy at the positions that the design writes down, held and filled by hand."""
    axes = []
    for count, own, target in zip(plane.shape, spacing_mm, target_mm, strict=True):
        pixel = np.arange(size) - (size - 1) / 2
        axes.append((count - 1) / 2 + pixel * target / own)
    rows, columns = np.meshgrid(*axes, indexing="ij")
    values = scipy.ndimage.map_coordinates(plane.astype(np.float64), [rows, columns], order=1, mode="nearest")
    outside = np.zeros(values.shape, bool)
    for grid, count in ((rows, plane.shape[0]), (columns, plane.shape[1])):
        outside |= (grid < -0.5) | (grid > count - 0.5)
    values[outside] = fill
    return values


@pytest.mark.parametrize("spacing_mm", [(5.0, 2.0, 1.5), (5.0, 0.9, 3.3), (1.0, 1.75, 1.75)])
@pytest.mark.parametrize("size", [16, 64])
def test_harmonise_is_first_order_interpolation_on_the_centred_grid(spacing_mm, size):
    voxels = random_voxels()
    ours = preprocess.harmonise(tf.constant(voxels), tf.constant(spacing_mm), (1.75, 1.6), size, tf.constant(-7.0))
    for plane, result in zip(voxels, ours.numpy(), strict=True):
        expected = reference_plane(plane, spacing_mm[1:], (1.75, 1.6), size, -7.0)
        np.testing.assert_allclose(result, expected, atol=1e-4 * np.ptp(voxels))


def test_half_a_voxel_beyond_the_border_is_held_and_further_out_is_filled():
    voxels = tf.constant([[[10.0, 20.0]]])  # one row, centres at -1 and +1 mm
    # Pixels at -2.5, -1.5, -0.5, 0.5, 1.5 and 2.5 mm: the voxels reach to 2 mm from the centre.
    result = preprocess.harmonise(voxels, tf.constant([1.0, 8.0, 2.0]), (1.0, 1.0), 6, tf.constant(0.0))
    np.testing.assert_allclose(result[0, 3], [0.0, 10.0, 12.5, 17.5, 20.0, 0.0], atol=1e-5)


def test_equal_grids_leave_the_scan_as_it_is():
    voxels = random_voxels((2, 32, 32))
    same = preprocess.harmonise(tf.constant(voxels), tf.constant([5.0, 1.5, 1.5]), (1.5, 1.5), 32, tf.constant(0.0))
    np.testing.assert_array_equal(same, voxels)


def test_slices_are_not_mixed():
    voxels = random_voxels()
    spacing_mm, fill = tf.constant([5.0, 2.0, 1.5]), tf.constant(0.0)
    together = preprocess.harmonise(tf.constant(voxels), spacing_mm, (1.75, 1.75), 32, fill)
    alone = preprocess.harmonise(tf.constant(voxels[1:2]), spacing_mm, (1.75, 1.75), 32, fill)
    np.testing.assert_array_equal(together[1:2], alone)


def test_label_indicators_are_resampled_and_ties_go_to_background():
    labels = tf.constant([[[0, 2], [0, 2]]], tf.uint8)
    # The middle column of three lies half-way between background and class 2.
    result = preprocess.harmonise_labels(labels, tf.constant([1.0, 1.0, 1.0]), (0.5, 0.5), 3, 3)
    np.testing.assert_array_equal(result[0], [[0, 0, 2]] * 3)


def test_labels_stay_labels_and_the_outside_is_background():
    labels = np.random.default_rng(1).choice([0, 1, 3], (4, 20, 30)).astype(np.uint8)
    result = preprocess.harmonise_labels(tf.constant(labels), tf.constant([5.0, 2.0, 2.0]), (1.3, 1.3), 80, 4).numpy()
    assert result.dtype == np.uint8
    assert set(np.unique(result)) <= {0, 1, 3}  # no class appears between two others
    assert not result[:, :20].any() and result.any()


def smooth_organ(shape, spacing_mm):
    """An ellipsoid with a dent, in voxels: large, smooth, asymmetric."""
    axes = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing_mm, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    body = (z / 70) ** 2 + ((y + 8) / 75) ** 2 + ((x + 30) / 95) ** 2 < 1
    dent = (z / 90) ** 2 + ((y - 60) / 40) ** 2 + ((x - 10) / 50) ** 2 < 1
    return (body & ~dent).astype(np.uint8)


@pytest.mark.parametrize(
    ("shape", "spacing_mm"), [((55, 200, 200), (5.0, 2.0, 2.0)), ((28, 256, 256), (5.0, 1.5, 1.5))]
)
def test_there_and_back_keeps_a_mask(shape, spacing_mm):
    mask = smooth_organ(shape, spacing_mm)
    spacing = tf.constant(spacing_mm)
    harmonised = preprocess.harmonise_labels(tf.constant(mask), spacing, (1.75, 1.75), 256, 2)
    back = preprocess.restore(tf.one_hot(harmonised, 2), tf.constant(shape), spacing, (1.75, 1.75)).numpy()
    assert back.shape == shape and back.dtype == np.uint8
    assert 2 * np.sum(back & mask) / (back.sum() + mask.sum()) >= 0.985


@pytest.mark.parametrize("scanner", sorted(SCANNERS))
def test_there_and_back_keeps_a_simulated_liver(scanner):
    liver = image_patient(draw_anatomy(11, 1), SCANNERS[scanner]).mask.canonical()
    mask, spacing = tf.constant(np.ascontiguousarray(liver.voxels)), tf.constant(liver.spacing_mm, tf.float32)
    harmonised = preprocess.harmonise_labels(mask, spacing, (1.75, 1.75), 256, 2)
    back = preprocess.restore(tf.one_hot(harmonised, 2), tf.constant(liver.shape), spacing, (1.75, 1.75)).numpy()
    assert metrics.dice(back, liver.voxels) >= 0.985


def test_restore_resamples_probabilities_not_labels():
    # Two harmonised pixels of 2 mm with foreground 0.9 and 0.3; own voxels of 1 mm between them see 0.75 and 0.45.
    foreground = np.array([[0.9, 0.3], [0.9, 0.3]], np.float32)
    probabilities = tf.constant(np.stack([1 - foreground, foreground], axis=-1)[None])
    labels = preprocess.restore(probabilities, tf.constant([1, 4, 4]), tf.constant([5.0, 1.0, 1.0]), (2.0, 2.0))
    np.testing.assert_array_equal(labels[0, 0], [1, 1, 0, 0])


def test_beyond_the_crop_the_answer_is_background():
    everywhere = tf.one_hot(tf.ones([1, 16, 16], tf.int32), 2)
    labels = preprocess.restore(everywhere, tf.constant([1, 40, 40]), tf.constant([5.0, 1.0, 1.0]), (1.0, 1.0)).numpy()
    np.testing.assert_array_equal(np.argwhere(labels[0]).min(axis=0), [12, 12])
    np.testing.assert_array_equal(np.argwhere(labels[0]).max(axis=0), [27, 27])


def test_ties_between_probabilities_go_to_background():
    even = tf.fill([1, 16, 16, 2], 0.5)
    assert (
        not preprocess.restore(even, tf.constant([1, 16, 16]), tf.constant([1.0, 1.0, 1.0]), (1.0, 1.0)).numpy().any()
    )


def test_percentiles_are_numpys():
    voxels = random_voxels()
    table = preprocess.statistics(tf.constant(voxels)).percentiles
    for percent in (0, 0.1, 0.5, 33.3, 50, 99.5, 100):
        np.testing.assert_allclose(preprocess.percentile(table, percent), np.percentile(voxels, percent), rtol=1e-4)
    np.testing.assert_allclose(table, np.percentile(voxels, np.arange(1001) / 10), rtol=1e-5)


def bounded(voxels, normalisation, clip=None, global_bounds=None):
    scan = preprocess.statistics(tf.constant(voxels))
    low, high = preprocess.intensity_bounds(scan, normalisation, clip, global_bounds)
    return preprocess.normalise(tf.constant(voxels), low[:, None, None], high[:, None, None], normalisation).numpy()


def test_each_normalisation_takes_its_own_minimum_and_maximum():
    voxels = random_voxels()
    np.testing.assert_array_equal(bounded(voxels, "none"), voxels)
    patient = (voxels - voxels.min()) / np.ptp(voxels)
    np.testing.assert_allclose(bounded(voxels, "patient"), patient, atol=1e-6)
    by_slice = np.stack([(plane - plane.min()) / np.ptp(plane) for plane in voxels])
    np.testing.assert_allclose(bounded(voxels, "slice"), by_slice, atol=1e-6)
    np.testing.assert_allclose(
        bounded(voxels, "global", global_bounds=(50.0, 150.0)), np.clip((voxels - 50) / 100, 0, 1), atol=1e-6
    )


def test_clipping_takes_outliers_to_the_percentile():
    voxels = random_voxels()
    voxels[0, 0, 0] = 1e6
    low, high = np.percentile(voxels, [1, 99])
    np.testing.assert_allclose(bounded(voxels, "none", clip=(1, 99)), np.clip(voxels, low, high), rtol=1e-4)
    assert bounded(voxels, "patient", clip=(1, 99)).max() == 1.0


def test_a_constant_slice_becomes_zero_not_nan():
    voxels = np.full((2, 8, 8), 5.0, np.float32)
    voxels[1, 0, 0] = 6.0
    assert np.isfinite(bounded(voxels, "slice")).all() and not bounded(voxels, "slice")[0].any()


@pytest.mark.parametrize("neighbours", [0, 1, 4])
def test_channel_k_of_a_stack_is_slice_s_minus_n_plus_k_and_the_ends_repeat(neighbours):
    slices = np.arange(6, dtype=np.float32)[:, None, None] * np.ones((1, 2, 2), np.float32)
    stacks = preprocess.stack_neighbours(tf.constant(slices), neighbours).numpy()
    assert stacks.shape == (6, 2, 2, 2 * neighbours + 1)
    for s in range(6):
        for k in range(2 * neighbours + 1):
            assert (stacks[s, ..., k] == min(max(s - neighbours + k, 0), 5)).all()
