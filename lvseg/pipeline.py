"""The tf.data chain from shards to batches, in plain sight; where it stands is a function of the step alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from lvseg import augment, preprocess, records
from lvseg.preprocess import Normalisation

INTERLEAVED_VOLUMES = 8


class Reading(NamedTuple):
    """The choices made while reading, which need no new shards."""

    size: int
    neighbours: int
    normalisation: Normalisation
    clip_percentiles: Sequence[float] | None
    global_bounds: Sequence[float] | None


class Samples(NamedTuple):
    """Slices with their neighbours as they travel to the device, which finishes them with `intensities`.

    stack: uint16 [B, size, size, 2n+1] (float32 once deformed); mask: uint8 [B, size, size, 1];
    slope, intercept: float32 [B]; low, high: float32 [B, 2n+1], the bounds of each channel for `preprocess.normalise`.
    """

    stack: tf.Tensor
    mask: tf.Tensor
    slope: tf.Tensor
    intercept: tf.Tensor
    low: tf.Tensor
    high: tf.Tensor


Deform = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


def training_batches(
    files: Sequence[Path],
    slices: int,
    reading: Reading,
    seed: int,
    batch_size: int,
    shuffle_slices: int,
    step: int,
    deform: Deform | None = None,
) -> tf.data.Dataset:
    """Endless batches of `Samples`, from the given step on, the same whenever and wherever the run is resumed.

    Args:
        files: shards of the training patients; slices: how many slices they hold together.
        seed: of the run; epoch and order follow from it and the position in the stream.
        shuffle_slices: how many slices the shuffle buffer holds.
        step: batches already used.
        deform: deforms one sample on the host, of (stack float32, mask, seeds int64 [2]); None leaves it to the device.
    """
    first_epoch, used = divmod(step * batch_size, slices)
    names = tf.constant([str(file) for file in files])

    def epoch(number: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_shuffle(
            names, seed=augment.sample_seeds(seed, augment.SHUFFLE_STREAM, 0, number[None])[0]
        )
        volumes = tf.data.Dataset.from_tensor_slices(order)
        return (
            # Several patients at a time, slice by slice, so that neighbours in the stream are not neighbours in a body.
            volumes.interleave(
                lambda name: volume_samples(name, reading).unbatch(),
                cycle_length=min(INTERLEAVED_VOLUMES, len(files)),
                block_length=1,
                num_parallel_calls=tf.data.AUTOTUNE,
                deterministic=True,
            )
            .shuffle(shuffle_slices, seed=seed + number, reshuffle_each_iteration=False)
            # After the shuffle: the slices an interrupted run has used are the first of its epoch's order.
            .skip(tf.where(number == first_epoch, tf.constant(used, tf.int64), tf.constant(0, tf.int64)))
        )

    def deformed(deform: Deform, index: tf.Tensor, samples: Samples) -> Samples:
        seeds = augment.sample_seeds(seed, augment.ELASTIC_STREAM, index // batch_size, (index % batch_size)[None])[0]
        stack, mask = deform(tf.cast(samples.stack, tf.float32), samples.mask, seeds)
        return samples._replace(stack=tf.cast(tf.round(stack), tf.uint16), mask=mask)

    samples = tf.data.Dataset.range(first_epoch, 2**31).flat_map(epoch)
    if deform is not None:
        numbered = samples.enumerate(step * batch_size)
        samples = numbered.map(functools.partial(deformed, deform), num_parallel_calls=tf.data.AUTOTUNE)
    return (
        samples
        # Epochs run into each other inside a batch, so every batch is full and a step is a step.
        .batch(batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    )


def volume_samples(name: tf.Tensor, reading: Reading) -> tf.data.Dataset:
    """A dataset of one element: all slices of a shard's volume, in order, as `Samples` with B = S."""
    return tf.data.TFRecordDataset(name).map(
        lambda serialised: _samples(records.decode(serialised, reading.size), reading)
    )


def _samples(volume: records.Slices, reading: Reading) -> Samples:
    low, high = preprocess.intensity_bounds(
        volume.statistics, reading.normalisation, reading.clip_percentiles, reading.global_bounds
    )
    count = tf.shape(volume.image)[0]
    neighbours = preprocess.neighbour_indices(tf.range(count), reading.neighbours, count)
    channels = 2 * reading.neighbours + 1
    return Samples(
        tf.ensure_shape(
            preprocess.stack_neighbours(volume.image, reading.neighbours), [None, reading.size, reading.size, channels]
        ),
        volume.mask[..., None],
        tf.fill([count], volume.slope),
        tf.fill([count], volume.intercept),
        tf.gather(low, neighbours),
        tf.gather(high, neighbours),
    )


def intensities(samples: Samples, normalisation: Normalisation) -> tf.Tensor:
    """Normalised float32 [B, size, size, 2n+1] of samples; runs on the device, where 16 bits travel faster than 32."""
    slope, intercept = samples.slope[:, None, None, None], samples.intercept[:, None, None, None]
    values = tf.cast(samples.stack, tf.float32) * slope + intercept
    return preprocess.normalise(values, samples.low[:, None, None, :], samples.high[:, None, None, :], normalisation)


def training_bounds(
    files: Sequence[Path], size: int, clip_percentiles: Sequence[float] | None
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Constants of the training patients: bounds for "global" normalisation, and the range that is scaled to 0..1.

    The bounds are the least minimum and the greatest maximum (of the clipped intensities, if clipped); the range goes
    from the median of the scans' 0.5th percentiles to that of their 99.5th, which single bright voxels do not move.
    """
    lows, highs, dark, bright = [], [], [], []
    for serialised in tf.data.TFRecordDataset([str(file) for file in files]):
        scan = records.decode(serialised, size).statistics
        low, high = scan.minimum, scan.maximum
        if clip_percentiles is not None:
            low, high = (preprocess.percentile(scan.percentiles, percent) for percent in clip_percentiles)
        lows.append(float(low))
        highs.append(float(high))
        dark.append(float(preprocess.percentile(scan.percentiles, 0.5)))
        bright.append(float(preprocess.percentile(scan.percentiles, 99.5)))
    return (min(lows), max(highs)), (float(np.median(dark)), float(np.median(bright)))
