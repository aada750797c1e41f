"""Harmonises a scan into the network's slices, and brings the network's answer back to the scan's own grid.

Axes. Volumes are [slice, row, column]; `spacing_mm` is (slice, row, column). In a plane, pixel p of the harmonised
axis lies at centre + (p - (size - 1) / 2) * spacing, where centre is the centre of the scan's axis, so one linear
resampling pads and crops as well. A position more than half a voxel beyond the outermost voxel centre is outside and
gets the fill value; within that half voxel the outermost value holds. Nothing is resampled through the slices.

These are TensorFlow functions on purpose: preparation calls them to write shards and the exporter puts the very same
functions into the SavedModel, so training and serving cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import tensorflow as tf

from lvseg.volume import Array

Normalisation = Literal["none", "slice", "patient", "global"]
# Canonical axes in the order that makes the named plane the slices; each permutation's inverse is its argsort.
AXIS_PERMUTATIONS = {"transversal": (0, 1, 2), "coronal": (1, 0, 2), "sagittal": (2, 0, 1)}
# Percentiles kept of every scan, in percent: a table every clipping choice is read from without seeing the scan again.
PERCENTILE_STEPS = 1000
# Every slice becomes one of the network's size, however small it is: no scanner makes more, but a small file may.
SLICES_MAX = 4096
LEAST_PADDED = 0.01  # of all voxels, for a value far below 0 to be padding
_BLOCK_SLICES = 4


def windowed(voxels: Array, modality: str | None, ct_window_hu: Sequence[float] | None) -> Array:
    """A CT's voxels clipped to the range of soft tissue that a network sees; others, or without a window, as they are.

    Args:
        voxels: float32 of any shape; modality: as in DICOM; ct_window_hu: lowest and highest HU, or None.
    """
    if modality != "CT" or ct_window_hu is None:
        return voxels
    low, high = ct_window_hu
    return np.clip(voxels, low, high)


def without_padding(voxels: Array) -> tuple[Array, float | None]:
    """Voxels whose padding, which would be taken for the darkest tissue, has the lowest intensity of the rest.

    Padding is one value below 0 that a hundredth of the voxels or more have, further below all others than those are
    apart.

    Args:
        voxels: float32 of any shape.

    Returns:
        The voxels, and the value that was padding, or None.
    """
    lowest = float(voxels.min())
    if lowest >= 0:
        return voxels, None
    inside = voxels > lowest
    if inside.mean() > 1 - LEAST_PADDED or not inside.any():
        return voxels, None
    rest = voxels[inside]
    if not 0 < rest.max() - rest.min() < rest.min() - lowest:
        return voxels, None
    return np.where(inside, voxels, rest.min()), lowest


class Statistics(NamedTuple):
    """Intensities of a scan before padding: float32 scalars, [S] and [PERCENTILE_STEPS + 1]."""

    minimum: tf.Tensor
    maximum: tf.Tensor
    slice_minimum: tf.Tensor
    slice_maximum: tf.Tensor
    percentiles: tf.Tensor


def statistics(voxels: tf.Tensor, percentiles: bool = True) -> Statistics:
    """Minimum, maximum (also of each slice) and percentiles of a scan.

    Args:
        voxels: float32 [S, H, W].
        percentiles: whether to find them, which takes longest; the field is empty otherwise.
    """
    table = tf.zeros([0], tf.float32)
    if percentiles:
        last = tf.cast(tf.size(voxels) - 1, tf.float64)
        position = tf.cast(tf.range(PERCENTILE_STEPS + 1), tf.float64) / PERCENTILE_STEPS * last
        lower = tf.cast(tf.floor(position), tf.int32)
        upper = tf.minimum(lower + 1, tf.size(voxels) - 1)
        below, above = tf.split(_of_rank(tf.reshape(voxels, [-1]), tf.concat([lower, upper], 0)), 2)
        table = _between(below, above, tf.cast(position - tf.floor(position), tf.float32))
    slice_minimum = tf.reduce_min(voxels, axis=[1, 2])
    slice_maximum = tf.reduce_max(voxels, axis=[1, 2])
    return Statistics(tf.reduce_min(slice_minimum), tf.reduce_max(slice_maximum), slice_minimum, slice_maximum, table)


@tf.function(autograph=False, reduce_retracing=True)
def _of_rank(values: tf.Tensor, ranks: tf.Tensor) -> tf.Tensor:
    """The values of these ranks (0 for the least), exactly: float32 [N] and int32 [K] to float32 [K].

    A radix selection: counts of the values' first 16 bits, then of the next 8 and the last 8 of those values alone that
    share their first bits with a wanted one. TensorFlow's sort, of which a table of percentiles needs little, takes
    many times as long.
    """
    bits = tf.bitcast(values, tf.int32)
    # Negative numbers count backwards in their magnitude's bits; turned over, integers are ordered as their floats.
    key = tf.bitwise.bitwise_xor(bits, tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, 31), 0x7FFFFFFF))
    found, group, groups = (
        tf.zeros_like(ranks),
        tf.zeros_like(ranks),
        1,
    )  # of each rank: its first bits, who shares them
    members = tf.zeros_like(key)  # of each value: the group of its first bits; `groups` for those that nobody wants
    remaining = ranks  # of each rank: how many of its group lie below it
    for shift, digits in ((16, 2**16), (8, 2**8), (0, 2**8)):
        digit = tf.bitwise.right_shift(key, shift)
        digit = digit + digits // 2 if shift == 16 else tf.bitwise.bitwise_and(digit, digits - 1)
        place = members * digits + digit
        places = (groups + 1) * digits
        counts = tf.raw_ops.Bincount(arr=place, size=places, weights=tf.zeros([0], tf.int32))
        below = tf.cumsum(counts, exclusive=True)
        rank = tf.gather(below, group * digits) + remaining
        place_of_rank = tf.searchsorted(below, rank, side="right") - 1
        remaining = rank - tf.gather(below, place_of_rank)
        digit_of_rank = place_of_rank - group * digits
        found = found * digits + (digit_of_rank - digits // 2 if shift == 16 else digit_of_rank)
        if shift:
            groups = tf.size(ranks)
            # Ranks with the same first bits make one group, numbered by the last of them.
            owner = tf.tensor_scatter_nd_max(tf.fill([places], -1), place_of_rank[:, None], tf.range(groups))
            owner = tf.where(owner < 0, groups, owner)
            group, members = tf.gather(owner, place_of_rank), tf.gather(owner, place)
    bits = tf.bitwise.bitwise_xor(found, tf.bitwise.bitwise_and(tf.bitwise.right_shift(found, 31), 0x7FFFFFFF))
    return tf.bitcast(bits, tf.float32)


def percentile(table: tf.Tensor, percent: float) -> tf.Tensor:
    """Reads a percentile, float32 scalar, off `Statistics.percentiles`; `percent` is 0 to 100."""
    position = percent / 100 * PERCENTILE_STEPS
    lower = min(int(position), PERCENTILE_STEPS - 1)
    return table[lower] + (table[lower + 1] - table[lower]) * (position - lower)


def harmonise(
    voxels: tf.Tensor, spacing_mm: tf.Tensor, target_mm: Sequence[float], size: int, fill: tf.Tensor
) -> tf.Tensor:
    """Resamples every slice linearly onto the centred grid of the network.

    Args:
        voxels: float32 [S, H, W].
        spacing_mm: float32 [3], (slice, row, column).
        target_mm: pixel spacing of the result, (row, column).
        size: pixels of a side of the result.
        fill: float32 scalar for positions outside the scan.

    Returns:
        float32 [S, size, size].
    """
    slices = _harmonise(voxels, spacing_mm, tf.constant(target_mm, tf.float64), size, fill)
    return tf.ensure_shape(slices, [None, size, size])


def harmonise_labels(labels: tf.Tensor, spacing_mm: tf.Tensor, target_mm: Sequence[float], size: int) -> tf.Tensor:
    """Resamples each class's indicator linearly and takes the largest; the outside goes to background.

    Args:
        labels: uint8 [S, H, W], 0 for background; however many classes there are, the time is that of one.
        spacing_mm, target_mm, size: as in `harmonise`.

    Returns:
        uint8 [S, size, size]; ties go to the lower class, so to background.
    """
    slices = _harmonise_labels(labels, spacing_mm, tf.constant(target_mm, tf.float64), size)
    return tf.ensure_shape(slices, [None, size, size])


def restore(probabilities: tf.Tensor, shape: tf.Tensor, spacing_mm: tf.Tensor, target_mm: Sequence[float]) -> tf.Tensor:
    """Brings class probabilities back to the scan's own grid and takes the most probable class.

    Args:
        probabilities: float32 [S, size, size, C], C known when traced; outside their grid the background has
            probability 1.
        shape: int32 [3], the scan's slices, rows and columns; the first is not used.
        spacing_mm: float32 [3] of the scan; target_mm: spacing of the probabilities, (row, column).

    Returns:
        uint8 [S, H, W]; ties go to the lower class, so to background.
    """
    size = tf.shape(probabilities)[1]
    rows, columns = (
        _line(_own_positions(shape[axis], spacing_mm[axis], target_mm[axis - 1], size), size) for axis in (1, 2)
    )
    background, *others = (
        _resample(plane, rows, columns, tf.constant(0.0 if label else 1.0))
        for label, plane in enumerate(tf.unstack(probabilities, axis=-1))
    )
    labels, best = tf.zeros(tf.shape(background), tf.uint8), background
    for label, share in enumerate(others, start=1):
        labels = tf.where(share > best, tf.constant(label, tf.uint8), labels)
        best = tf.maximum(best, share)
    return labels


def intensity_bounds(
    scan: Statistics,
    normalisation: Normalisation,
    clip_percentiles: Sequence[float] | None,
    global_bounds: Sequence[float] | None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The lower and upper intensity, float32 [S] each, that `normalise` clips each slice of a scan to.

    Args:
        scan: of the scan before padding.
        normalisation: whose minimum and maximum are meant: the slice's, the scan's or those of the training patients.
        clip_percentiles: (lower, upper) in percent of the scan, or None for no clipping.
        global_bounds: minimum and maximum over the training patients, for "global".
    """
    if normalisation not in get_args(Normalisation):
        raise ValueError(f"Expected one of {get_args(Normalisation)}, received normalisation={normalisation!r}.")
    low, high = scan.minimum, scan.maximum
    if clip_percentiles is not None:
        low, high = (percentile(scan.percentiles, percent) for percent in clip_percentiles)
    if normalisation == "slice":
        return tf.clip_by_value(scan.slice_minimum, low, high), tf.clip_by_value(scan.slice_maximum, low, high)
    if normalisation == "global":
        if global_bounds is None:
            raise ValueError("Expected global_bounds for normalisation='global', received None.")
        low, high = tf.constant(global_bounds[0], tf.float32), tf.constant(global_bounds[1], tf.float32)
    return low + tf.zeros_like(scan.slice_minimum), high + tf.zeros_like(scan.slice_maximum)


def normalise(slices: tf.Tensor, low: tf.Tensor, high: tf.Tensor, normalisation: Normalisation) -> tf.Tensor:
    """Clips intensities to [low, high] and, unless "none", maps that range to 0..1 (min-max normalisation).

    Args:
        slices: float32 [...]; low, high: float32, broadcast to it; a range of zero width becomes 0.

    Returns:
        float32 [...].
    """
    clipped = tf.clip_by_value(slices, low, high)
    if normalisation == "none":
        return clipped
    return tf.math.divide_no_nan(clipped - low, high - low)


def neighbour_indices(slices: tf.Tensor, neighbours: int, count: tf.Tensor) -> tf.Tensor:
    """Which slices make the stack of each slice: int32 [B, 2n+1]; channel k is slice s - n + k, the ends repeated.

    Args:
        slices: int32 [B], the slices s; neighbours: n; count: how many slices the scan has.
    """
    return tf.clip_by_value(slices[:, None] + tf.range(-neighbours, neighbours + 1)[None, :], 0, count - 1)


def stack_neighbours(slices: tf.Tensor, neighbours: int, chosen: tf.Tensor | None = None) -> tf.Tensor:
    """Stacks of neighbouring slices.

    Args:
        slices: any dtype [S, size, size]; neighbours: n on each side.
        chosen: int32 [B], the slices whose stacks are wanted; None for all.

    Returns:
        The same dtype [B, size, size, 2n+1].
    """
    count = tf.shape(slices)[0]
    chosen = tf.range(count) if chosen is None else chosen
    return _channels_last(tf.gather(slices, neighbour_indices(chosen, neighbours, count)))


@tf.function(autograph=False, jit_compile=True, reduce_retracing=True)
def _channels_last(stacks: tf.Tensor) -> tf.Tensor:
    """By XLA, since TensorFlow's own transpose takes four times as long to bring a few channels to the end."""
    return tf.transpose(stacks, [0, 2, 3, 1])


def _harmonised_positions(count: tf.Tensor, own_mm: tf.Tensor, target_mm: float, size: int) -> tf.Tensor:
    """Where the harmonised pixels lie in the scan's axis, float64 [size] in voxels."""
    pixel = tf.cast(tf.range(size), tf.float64) - (size - 1) / 2
    return (tf.cast(count, tf.float64) - 1) / 2 + pixel * (target_mm / tf.cast(own_mm, tf.float64))


def _own_positions(count: tf.Tensor, own_mm: tf.Tensor, target_mm: float, size: tf.Tensor) -> tf.Tensor:
    """Where the scan's voxels lie in the harmonised axis, float64 [count] in pixels."""
    voxel = tf.cast(tf.range(count), tf.float64) - (tf.cast(count, tf.float64) - 1) / 2
    return (tf.cast(size, tf.float64) - 1) / 2 + voxel * (tf.cast(own_mm, tf.float64) / target_mm)


class _Line(NamedTuple):
    """Linear interpolation at the P positions of an axis.

    lower, upper: int32 [P], the voxels around each position; weight: float32 [P], of the upper one;
    inside: bool [P], whether the position lies within the axis.
    """

    lower: tf.Tensor
    upper: tf.Tensor
    weight: tf.Tensor
    inside: tf.Tensor


def _line(positions: tf.Tensor, count: tf.Tensor) -> _Line:
    """Interpolation at `positions`, float64 in voxels, along an axis of `count` voxels."""
    reach = 0.5 + 1e-6  # spacing_mm comes as float32: an exact half voxel may not cost an edge row
    last = tf.cast(count - 1, tf.float64)
    held = tf.clip_by_value(positions, 0.0, last)
    below = tf.floor(held)
    lower = tf.cast(below, tf.int32)
    inside = (positions >= -reach) & (positions <= last + reach)
    return _Line(lower, tf.minimum(lower + 1, count - 1), tf.cast(held - below, tf.float32), inside)


def _harmonised_lines(shape: tf.Tensor, spacing_mm: tf.Tensor, target_mm: tf.Tensor, size: int) -> tuple[_Line, _Line]:
    rows, columns = (
        _line(_harmonised_positions(shape[axis], spacing_mm[axis], target_mm[axis - 1], size), shape[axis])
        for axis in (1, 2)
    )
    return rows, columns


def _between(lower: tf.Tensor, upper: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    return lower + (upper - lower) * weight


@tf.function(autograph=False, reduce_retracing=True)
def _harmonise(values: tf.Tensor, spacing_mm: tf.Tensor, target_mm: tf.Tensor, size: int, fill: tf.Tensor) -> tf.Tensor:
    return _resample(values, *_harmonised_lines(tf.shape(values), spacing_mm, target_mm, size), fill)


def _resample(values: tf.Tensor, rows: _Line, columns: _Line, fill: tf.Tensor) -> tf.Tensor:
    """Linear interpolation of [S, H, W] at rows and columns: [S, rows, columns], `fill` outside.

    In blocks of slices of one length, because XLA compiles for every shape it meets: so only for every H and W.
    """
    count = tf.shape(values)[0]
    missing = -count % _BLOCK_SLICES
    # Not an `if`: graphs are traced without AutoGraph, so nothing makes graph operations of Python's.
    values = tf.cond(
        missing > 0, lambda: tf.concat([values, tf.repeat(values[-1:], missing, axis=0)], 0), lambda: values
    )

    def of_block(first: tf.Tensor) -> tf.Tensor:
        return _resample_block(values[first : first + _BLOCK_SLICES], rows, columns, fill)

    blocks = tf.map_fn(of_block, tf.range(0, count, _BLOCK_SLICES), fn_output_signature=tf.float32)
    return tf.reshape(blocks, [-1, tf.size(rows.lower), tf.size(columns.lower)])[:count]


@tf.function(autograph=False, jit_compile=True, reduce_retracing=True)
def _resample_block(values: tf.Tensor, rows: _Line, columns: _Line, fill: tf.Tensor) -> tf.Tensor:
    """Not by multiplying matrices, which GPUs may round to 10 bits (TF32); XLA makes one pass of the gathers."""
    at_rows = _between(
        tf.gather(values, rows.lower, axis=1), tf.gather(values, rows.upper, axis=1), rows.weight[:, None]
    )
    inside = _between(
        tf.gather(at_rows, columns.lower, axis=2), tf.gather(at_rows, columns.upper, axis=2), columns.weight
    )
    return tf.where(rows.inside[:, None] & columns.inside, inside, fill)


@tf.function(autograph=False, reduce_retracing=True)
def _harmonise_labels(labels: tf.Tensor, spacing_mm: tf.Tensor, target_mm: tf.Tensor, size: int) -> tf.Tensor:
    rows, columns = _harmonised_lines(tf.shape(labels), spacing_mm, target_mm, size)
    # The labels of the four voxels around each pixel. Whole rows are gathered and the image is turned for the columns:
    # a CPU gathers single voxels ten times as slowly as rows.
    corners = []
    for of_row in (rows.lower, rows.upper):
        turned = tf.transpose(tf.gather(labels, of_row, axis=1), [0, 2, 1])
        corners += [tf.gather(turned, of_column, axis=1) for of_column in (columns.lower, columns.upper)]
    top_left, top_right, bottom_left, bottom_right = corners
    # Where all four agree there is nothing to weigh, and that is nearly everywhere.
    mixed = tf.where((top_left != top_right) | (top_left != bottom_left) | (top_left != bottom_right))
    around = [tf.gather_nd(corner, mixed) for corner in corners]
    row_weight = tf.gather(rows.weight, mixed[:, 2])
    column_weight = tf.gather(columns.weight, mixed[:, 1])

    def share(label: tf.Tensor) -> tf.Tensor:
        is_label = [tf.cast(corner == label, tf.float32) for corner in around]
        left = _between(is_label[0], is_label[2], row_weight)
        return _between(left, _between(is_label[1], is_label[3], row_weight), column_weight)

    # Only the background and the four labels around can win.
    best, best_share = tf.zeros_like(around[0]), share(tf.zeros_like(around[0]))
    for label in around:
        label_share = share(label)
        wins = (label_share > best_share) | ((label_share == best_share) & (label < best))
        best, best_share = tf.where(wins, label, best), tf.where(wins, label_share, best_share)
    result = tf.transpose(tf.tensor_scatter_nd_update(top_left, mixed, best), [0, 2, 1])
    return tf.where(rows.inside[:, None] & columns.inside, result, tf.constant(0, labels.dtype))
