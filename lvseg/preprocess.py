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

import tensorflow as tf

Normalisation = Literal["none", "slice", "patient", "global"]
# Canonical axes in the order that makes the named plane the slices; each permutation's inverse is its argsort.
AXIS_PERMUTATIONS = {"transversal": (0, 1, 2), "coronal": (1, 0, 2), "sagittal": (2, 0, 1)}
# Percentiles kept of every scan, in percent: a table every clipping choice is read from without seeing the scan again.
PERCENTILE_STEPS = 1000


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
        percentiles: whether to find them, which sorts the scan; the field is empty otherwise.
    """
    table = tf.zeros([0], tf.float32)
    if percentiles:
        ordered = tf.sort(tf.reshape(voxels, [-1]))
        last = tf.cast(tf.size(ordered) - 1, tf.float64)
        position = tf.cast(tf.range(PERCENTILE_STEPS + 1), tf.float64) / PERCENTILE_STEPS * last
        lower = tf.cast(tf.floor(position), tf.int32)
        upper = tf.minimum(lower + 1, tf.size(ordered) - 1)
        weight = tf.cast(position - tf.floor(position), tf.float32)
        below = tf.gather(ordered, lower)
        table = below + (tf.gather(ordered, upper) - below) * weight
    slice_minimum = tf.reduce_min(voxels, axis=[1, 2])
    slice_maximum = tf.reduce_max(voxels, axis=[1, 2])
    return Statistics(tf.reduce_min(slice_minimum), tf.reduce_max(slice_maximum), slice_minimum, slice_maximum, table)


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
    for axis in (1, 2):
        positions = _harmonised_positions(tf.shape(voxels)[axis], spacing_mm[axis], target_mm[axis - 1], size)
        voxels = _resample_axis(voxels, positions, axis, fill)
    return voxels


def harmonise_labels(
    labels: tf.Tensor, spacing_mm: tf.Tensor, target_mm: Sequence[float], size: int, classes: int
) -> tf.Tensor:
    """Resamples each class's indicator linearly and takes the largest; ties and the outside go to background.

    Args:
        labels: uint8 [S, H, W] of classes 0 (background) to `classes` - 1.
        spacing_mm, target_mm, size: as in `harmonise`.

    Returns:
        uint8 [S, size, size].
    """
    best = harmonise(tf.cast(labels == 0, tf.float32), spacing_mm, target_mm, size, tf.constant(1.0))
    result = tf.zeros(tf.shape(best), tf.uint8)
    for label in range(1, classes):
        share = harmonise(tf.cast(labels == label, tf.float32), spacing_mm, target_mm, size, tf.constant(0.0))
        wins = share > best
        result = tf.where(wins, tf.constant(label, tf.uint8), result)
        best = tf.maximum(best, share)
    return result


def restore(probabilities: tf.Tensor, shape: tf.Tensor, spacing_mm: tf.Tensor, target_mm: Sequence[float]) -> tf.Tensor:
    """Brings class probabilities back to the scan's own grid and takes the most probable class.

    Args:
        probabilities: float32 [S, size, size, C]; outside their grid the background has probability 1.
        shape: int32 [3], the scan's slices, rows and columns; the first is not used.
        spacing_mm: float32 [3] of the scan; target_mm: spacing of the probabilities, (row, column).

    Returns:
        uint8 [S, H, W]; ties go to the lower class, so to background.
    """
    size = tf.shape(probabilities)[1]
    inside = []
    for axis in (1, 2):
        positions = _own_positions(shape[axis], spacing_mm[axis], target_mm[axis - 1], size)
        inside.append(_is_inside(positions, size))
        probabilities = _resample_axis(probabilities, positions, axis, fill=None)
    labels = tf.cast(tf.argmax(probabilities, axis=-1), tf.uint8)
    return tf.where(inside[0][:, None] & inside[1][None, :], labels, tf.constant(0, tf.uint8))


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
    stacks = tf.gather(slices, neighbour_indices(chosen, neighbours, count))
    return tf.transpose(stacks, [0, 2, 3, 1])


def _harmonised_positions(count: tf.Tensor, own_mm: tf.Tensor, target_mm: float, size: int) -> tf.Tensor:
    """Where the harmonised pixels lie in the scan's axis, float64 [size] in voxels."""
    pixel = tf.cast(tf.range(size), tf.float64) - (size - 1) / 2
    return (tf.cast(count, tf.float64) - 1) / 2 + pixel * (target_mm / tf.cast(own_mm, tf.float64))


def _own_positions(count: tf.Tensor, own_mm: tf.Tensor, target_mm: float, size: tf.Tensor) -> tf.Tensor:
    """Where the scan's voxels lie in the harmonised axis, float64 [count] in pixels."""
    voxel = tf.cast(tf.range(count), tf.float64) - (tf.cast(count, tf.float64) - 1) / 2
    return (tf.cast(size, tf.float64) - 1) / 2 + voxel * (tf.cast(own_mm, tf.float64) / target_mm)


def _is_inside(positions: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    rounding = 1e-6  # spacing_mm comes as float32: an exact half voxel may not cost an edge row
    return (positions >= -0.5 - rounding) & (positions <= tf.cast(count, tf.float64) - 0.5 + rounding)


def _resample_axis(values: tf.Tensor, positions: tf.Tensor, axis: int, fill: tf.Tensor | None) -> tf.Tensor:
    """Linear interpolation of `values` along `axis` (1 or 2) at float64 `positions`; gathers: exact on any device."""
    count = tf.shape(values)[axis]
    held = tf.clip_by_value(positions, 0.0, tf.cast(count - 1, tf.float64))
    lower = tf.cast(tf.floor(held), tf.int32)
    upper = tf.minimum(lower + 1, count - 1)
    broadcast = [1] * values.shape.rank
    broadcast[axis] = -1
    weight = tf.reshape(tf.cast(held - tf.floor(held), values.dtype), broadcast)
    below = tf.gather(values, lower, axis=axis)
    result = below + (tf.gather(values, upper, axis=axis) - below) * weight
    if fill is None:
        return result
    return tf.where(tf.reshape(_is_inside(positions, count), broadcast), result, tf.cast(fill, values.dtype))
