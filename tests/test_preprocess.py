"""Harmonising and the way back, against scipy, hand arithmetic and properties."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tensorflow.python.framework import kernels

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


def exact_plane(plane, spacing_mm, target_mm, size, fill):
    """First-order interpolation in float64 from its definition: a hat function around each voxel, held and filled."""
    weights, reached = [], []
    for count, own, target in zip(plane.shape, spacing_mm, target_mm, strict=True):
        position = (count - 1) / 2 + (np.arange(size) - (size - 1) / 2) * target / float(np.float32(own))
        held = np.clip(position, 0, count - 1)
        weights.append(np.maximum(0, 1 - np.abs(held[:, None] - np.arange(count))))
        reached.append((position >= -0.5 - 1e-6) & (position <= count - 0.5 + 1e-6))
    values = weights[0] @ plane.astype(np.float64) @ weights[1].T
    return np.where(reached[0][:, None] & reached[1], values, fill)


# Shape, spacing and target spacing in mm, size, seed.
geometries = st.tuples(
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.just(5.0), st.floats(0.3, 6.0), st.floats(0.3, 6.0)),
    st.tuples(st.floats(0.3, 6.0), st.floats(0.3, 6.0)),
    st.sampled_from([16, 32]),
    st.integers(0, 2**16),
)
few = settings(max_examples=15, deadline=None, derandomize=True)


@few
@given(geometries)
def test_harmonise_is_the_exact_interpolation_for_any_geometry(geometry):
    shape, spacing_mm, target_mm, size, seed = geometry
    voxels = np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)
    ours = preprocess.harmonise(tf.constant(voxels), tf.constant(spacing_mm), target_mm, size, tf.constant(7.0))
    exact = np.stack([exact_plane(plane, spacing_mm[1:], target_mm, size, 7.0) for plane in voxels])
    np.testing.assert_allclose(ours, exact, atol=1e-5)


@few
@given(geometries, st.integers(1, 31))
def test_labels_are_those_of_the_largest_exact_share(geometry, classes):
    shape, spacing_mm, target_mm, size, seed = geometry
    labels = np.random.default_rng(seed).integers(0, classes + 1, shape).astype(np.uint8)
    ours = preprocess.harmonise_labels(tf.constant(labels), tf.constant(spacing_mm), target_mm, size).numpy()
    for plane, result in zip(labels, ours, strict=True):
        shares = np.stack(
            [exact_plane(plane == c, spacing_mm[1:], target_mm, size, float(c == 0)) for c in range(classes + 1)]
        )
        won = np.take_along_axis(shares, result[None].astype(int), axis=0)[0]
        assert (won >= shares.max(axis=0) - 1e-5).all()
        clear = np.sort(shares, axis=0)[-1] - np.sort(shares, axis=0)[-2] > 1e-5
        np.testing.assert_array_equal(result[clear], np.argmax(shares, axis=0)[clear])


def test_one_pass_over_all_labels_equals_a_pass_for_each():
    """To the last bit what `harmonise` of every indicator, one after the other, decides; ties to the lower class."""
    labels = np.random.default_rng(3).integers(0, 32, (2, 30, 41)).astype(np.uint8)
    spacing_mm, target_mm = tf.constant([5.0, 2.0, 1.3]), (1.0, 1.7)
    shares = [
        preprocess.harmonise(
            tf.constant((labels == c).astype(np.float32)), spacing_mm, target_mm, 64, tf.constant(float(c == 0))
        ).numpy()
        for c in range(32)
    ]
    ours = preprocess.harmonise_labels(tf.constant(labels), spacing_mm, target_mm, 64)
    np.testing.assert_array_equal(ours, np.argmax(shares, axis=0))


@few
@given(geometries, st.integers(2, 4))
def test_restore_is_the_largest_exact_probability(geometry, classes):
    shape, spacing_mm, target_mm, size, seed = geometry
    raw = np.random.default_rng(seed).uniform(0, 1, (1, size, size, classes)).astype(np.float32)
    ours = preprocess.restore(tf.constant(raw), tf.constant(shape), tf.constant(spacing_mm), target_mm).numpy()[0]
    weights, reached = [], []
    for count, own, target in zip(shape[1:], spacing_mm[1:], target_mm, strict=True):
        position = (size - 1) / 2 + (np.arange(count) - (count - 1) / 2) * float(np.float32(own)) / target
        weights.append(np.maximum(0, 1 - np.abs(np.clip(position, 0, size - 1)[:, None] - np.arange(size))))
        reached.append((position >= -0.5 - 1e-6) & (position <= size - 0.5 + 1e-6))
    exact = np.einsum("rh,hwc,vw->crv", weights[0], raw[0].astype(np.float64), weights[1])
    inside = reached[0][:, None] & reached[1]
    assert not ours[~inside].any()
    won = np.take_along_axis(exact, ours[None].astype(int), axis=0)[0]
    assert (won >= exact.max(axis=0) - 1e-5)[inside].all()


def harmonise_all(path):
    """What a shard holds of one scan, to a file."""
    voxels = np.random.default_rng(0).normal(0, 1, (9, 160, 170)).astype(np.float32)
    spacing_mm, target_mm, size = tf.constant([5.0, 2.1, 1.3]), (1.75, 1.6), 256
    scan = preprocess.statistics(tf.constant(voxels))
    np.savez(
        path,
        slices=preprocess.harmonise(tf.constant(voxels), spacing_mm, target_mm, size, scan.minimum),
        labels=preprocess.harmonise_labels(tf.constant((voxels > 0).astype(np.uint8)), spacing_mm, target_mm, size),
        percentiles=scan.percentiles,
    )


def test_the_number_of_threads_does_not_change_a_bit(tmp_path):
    """Shards are the same byte for byte however many threads a worker has."""
    program = "import sys, tensorflow as tf; tf.config.threading.set_intra_op_parallelism_threads(1);" \
              "tf.config.threading.set_inter_op_parallelism_threads(1); import test_preprocess as test;" \
              "test.harmonise_all(sys.argv[1])"  # fmt: skip
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    subprocess.run(
        [sys.executable, "-c", program, tmp_path / "one.npz"],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    harmonise_all(tmp_path / "many.npz")
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "many.npz") as many:
        for name in one.files:
            np.testing.assert_array_equal(one[name], many[name])


def test_traced_for_any_scan_it_gives_the_same_bits():
    voxels, spacing_mm = tf.constant(random_voxels((3, 50, 61))), tf.constant([5.0, 2.1, 1.3])

    def harmonise(voxels):
        return preprocess.harmonise(voxels, spacing_mm, (1.75, 1.6), 64, tf.constant(0.0))

    traced = tf.function(harmonise).get_concrete_function(tf.TensorSpec([None, None, None]))
    assert traced.structured_outputs.shape.as_list() == [None, 64, 64]
    np.testing.assert_array_equal(traced(voxels), harmonise(voxels))


def test_every_op_has_a_kernel_for_gpus():
    """And none multiplies matrices in float32, which GPUs since Ampere round to 10 bits unless told not to."""

    def there_and_back(voxels, probabilities, spacing_mm):
        scan = preprocess.statistics(voxels)
        slices = preprocess.harmonise(voxels, spacing_mm, (1.75, 1.75), 256, scan.minimum)
        low, high = preprocess.intensity_bounds(scan, "patient", (1.0, 99.0), None)
        slices = preprocess.normalise(slices, low[:, None, None], high[:, None, None], "patient")
        labels = preprocess.restore(probabilities, tf.shape(voxels), spacing_mm, (1.75, 1.75))
        return preprocess.stack_neighbours(slices, 1), labels

    graph = tf.function(there_and_back).get_concrete_function(
        tf.TensorSpec([None, None, None]), tf.TensorSpec([None, 256, 256, 2]), tf.TensorSpec([3])
    ).graph.as_graph_def()  # fmt: skip
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    operations = {node.op for node in nodes}
    assert {"GatherV2", "Bincount", "Transpose"} <= operations
    assert not operations & {"MatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum", "Conv2D"}
    lacking = {
        node.op
        for node in nodes
        if not any(
            kernel.device_type in ("GPU", "DEFAULT")
            and all(node.attr[limit.name].type in limit.allowed_values.list.type for limit in kernel.constraint)
            for kernel in kernels.get_registered_kernels_for_op(node.op).kernel
        )
    }
    assert not lacking


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
    result = preprocess.harmonise_labels(labels, tf.constant([1.0, 1.0, 1.0]), (0.5, 0.5), 3)
    np.testing.assert_array_equal(result[0], [[0, 0, 2]] * 3)


def test_labels_stay_labels_and_the_outside_is_background():
    labels = np.random.default_rng(1).choice([0, 1, 3], (4, 20, 30)).astype(np.uint8)
    result = preprocess.harmonise_labels(tf.constant(labels), tf.constant([5.0, 2.0, 2.0]), (1.3, 1.3), 80).numpy()
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
    harmonised = preprocess.harmonise_labels(tf.constant(mask), spacing, (1.75, 1.75), 256)
    back = preprocess.restore(tf.one_hot(harmonised, 2), tf.constant(shape), spacing, (1.75, 1.75)).numpy()
    assert back.shape == shape and back.dtype == np.uint8
    assert 2 * np.sum(back & mask) / (back.sum() + mask.sum()) >= 0.985


@pytest.mark.parametrize("scanner", ["philips_volume", "ge_fat"])
def test_there_and_back_keeps_a_simulated_liver(scanner):
    liver = image_patient(draw_anatomy(11, 1), SCANNERS[scanner]).mask.canonical()
    mask, spacing = tf.constant(np.ascontiguousarray(liver.voxels)), tf.constant(liver.spacing_mm, tf.float32)
    harmonised = preprocess.harmonise_labels(mask, spacing, (1.75, 1.75), 256)
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


@few
@given(
    arrays(np.float32, st.integers(1, 300), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    st.integers(0, 2**16),
)
def test_values_of_a_rank_are_those_of_the_sorted_scan(values, seed):
    ranks = np.random.default_rng(seed).integers(0, values.size, 50).astype(np.int32)
    np.testing.assert_array_equal(preprocess._of_rank(tf.constant(values), tf.constant(ranks)), np.sort(values)[ranks])


@pytest.mark.parametrize("kind", ["whole numbers", "ties", "wide", "one voxel"])
def test_percentiles_are_exact_whatever_the_intensities(kind):
    random = np.random.default_rng(5)
    voxels = {
        "whole numbers": random.integers(-1024, 3071, (3, 40, 50)),
        "ties": np.repeat([[-3.5, 0.0, 1e-30]], 4, axis=0)[None],
        "wide": random.lognormal(0, 20, (2, 30, 30)) * random.choice([-1, 1], (2, 30, 30)),
        "one voxel": np.full((1, 1, 1), -7.25),
    }[kind].astype(np.float32)
    table = preprocess.statistics(tf.constant(voxels)).percentiles
    exact = np.percentile(voxels.astype(np.float64), np.arange(1001) / 10)
    np.testing.assert_allclose(table, exact, rtol=1e-5, atol=1e-6 * np.ptp(voxels))


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


def test_padding_lies_far_below_all_others_and_is_given_their_lowest():
    tissue = np.random.default_rng(0).uniform(5, 800, 990).astype(np.float32)
    for count, value, is_padding in (
        (10, -2000.0, True), (9, -2000.0, False),  # a hundredth, and less
        (10, -700.0, False),  # no further away than the others are apart
        (10, 0.0, False), (400, -32768.0, True),
    ):  # fmt: skip
        voxels = np.concatenate([np.full(count, value, np.float32), tissue])
        found, padding = preprocess.without_padding(voxels)
        assert padding == (value if is_padding else None)
        np.testing.assert_array_equal(found[count:], tissue)
        assert set(found[:count]) == {tissue.min() if is_padding else value}
    for flat in (np.full(8, -5.0, np.float32), np.array([-9.0, 1, 1, 1], np.float32)):
        assert preprocess.without_padding(flat) == (pytest.approx(flat), None)
