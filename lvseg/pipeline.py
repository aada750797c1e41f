"""The tf.data chain from shards to batches, in plain sight; where it stands is a function of the step alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from lvseg import draws, preprocess, records
from lvseg.preprocess import Normalisation

# Fewer patients than this are never shuffled together, however many slices each has.
MIXED_VOLUMES = 8
READING_THREADS = 2
WAITING_SLICES = 16


class Reading(NamedTuple):
    """The choices made while reading, which need no new shards; volumes of other patients than `patients` fail."""

    size: int
    neighbours: int
    normalisation: Normalisation
    clip_percentiles: Sequence[float] | None
    global_bounds: Sequence[float] | None
    patients: Sequence[str] | None = None
    tissues: bool = False


class Samples(NamedTuple):
    """Slices with their neighbours as they travel to the device, which finishes them with `intensities`.

    stack: uint16 [B, 2n+1, size, size] (float32 once deformed); mask: uint8 [B, size, size, 1];
    scale: float32 [B, 2n+1, 4], of each channel: slope, intercept, and the bounds for `preprocess.normalise`;
    source: int32 [B, 2], which of the files a sample is of, and which of its slices;
    tissues: uint8 [B, 2n+1, size, size], the map of them, nothing but air for scans without one; [B, 0, size, size]
    where not asked for.

    Channels come first until the device turns them, since a stack is then a stretch of its volume and is never copied.
    """

    stack: tf.Tensor
    mask: tf.Tensor
    scale: tf.Tensor
    source: tf.Tensor
    tissues: tf.Tensor


class _Volume(NamedTuple):
    """A volume with its end slices repeated n times on each side, so that every stack is a stretch of it.

    image: uint16 [S+2n, size, size]; mask: uint8 [S, size, size, 1]; scale: float32 [S+2n, 4], as in `Samples`;
    tissues: uint8 [S+2n, size, size], or [0, size, size].
    """

    image: tf.Tensor
    mask: tf.Tensor
    scale: tf.Tensor
    tissues: tf.Tensor


class Share(NamedTuple):
    """The part of every global batch that one of several machines draws: its `replicas` devices get it one by one."""

    worker: int = 0
    workers: int = 1
    replicas: int = 1

    def of_batch(self, batch_size: int) -> tuple[range, int]:
        """The places in the batch that are this worker's, and how many a device gets; ValueError if it is uneven."""
        if batch_size % (self.workers * self.replicas):
            raise ValueError(
                f"Expected a batch that {self.workers * self.replicas} devices can share, received"
                f" batch_size={batch_size}."
            )
        of_worker = batch_size // self.workers
        return range(self.worker * of_worker, (self.worker + 1) * of_worker), of_worker // self.replicas


ALONE = Share()
Deform = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


@tf.autograph.experimental.do_not_convert
def training_batches(
    files: Sequence[Path],
    slices: int,
    reading: Reading,
    seed: int,
    batch_size: int,
    shuffle_slices: int,
    step: int,
    deform: Deform | None = None,
    share: Share = ALONE,
) -> tf.data.Dataset:
    """Endless batches of `Samples`, from the given step on, the same whenever and wherever the run is resumed.

    An epoch opens its volumes in a random order, has `volumes_together` of them open, and takes a slice of each in
    turn, in a random order within the volume and shuffled once more among volumes. No more than three times that
    many, and the few that are being read, are in memory, however many there are: the open ones, the next ones, and
    those that slices waiting to be shuffled belong to.

    Args:
        files: shards of the training patients; slices: how many slices they hold together.
        seed: of the run; epoch and order follow from it and the position in the stream.
        shuffle_slices: of at least how many slices the volumes are open at a time.
        step: batches already used.
        deform: deforms one sample on the host, of (stack float32 [size, size, 2n+1], mask, seeds int64 [2]); None
            leaves it to the device.
        share: which of each batch's samples are wanted here, and how many at a time.

    Raises:
        ValueError: for a batch that cannot be shared evenly.
    """
    own, at_a_time = share.of_batch(batch_size)
    first_epoch, used = divmod(step * batch_size, slices)
    names = tf.constant([str(file) for file in files])
    together, channels = volumes_together(len(files), slices, shuffle_slices), 2 * reading.neighbours + 1
    alone = at_a_time == 1 and deform is None  # a batch of one is the sample itself: nothing is copied

    def shuffled(values: tf.Tensor, epoch: tf.Tensor, part: int | tf.Tensor) -> tf.Tensor:
        seeds = draws.sample_seeds(seed, draws.SHUFFLE_STREAM, part, epoch[None])[0]
        return tf.random.experimental.stateless_shuffle(values, seed=seeds)

    def stacks(epoch: tf.Tensor, position: tf.Tensor, volume: _Volume) -> tf.data.Dataset:
        slices = shuffled(tf.range(tf.shape(volume.mask)[0]), epoch, position)
        file = order_of(epoch)[tf.cast(position, tf.int32) - 1]
        return tf.data.Dataset.from_tensor_slices(slices).map(functools.partial(stack, volume, file))

    def stack(volume: _Volume, file: tf.Tensor, own: tf.Tensor) -> Samples:
        sample = Samples(
            tf.slice(volume.image, [own, 0, 0], [channels, reading.size, reading.size]),
            volume.mask[own],
            tf.slice(volume.scale, [own, 0], [channels, 4]),
            tf.stack([file, own]),
            tf.slice(volume.tissues, [own, 0, 0], [channels, reading.size, reading.size])
            if reading.tissues
            else volume.tissues,
        )
        return Samples(*(part[tf.newaxis] for part in sample)) if alone else sample

    def order_of(epoch: tf.Tensor) -> tf.Tensor:
        return shuffled(tf.range(len(files)), epoch, 0)

    def samples_of(epoch: tf.Tensor) -> tf.data.Dataset:
        return (
            # Unbuffered, since a shard is one record, which is read at once.
            tf.data.TFRecordDataset(tf.gather(names, order_of(epoch)), buffer_size=0)
            .map(lambda record: _volume(record, reading), num_parallel_calls=READING_THREADS, deterministic=True)
            .enumerate(1)
            # The next patients are read meanwhile: volumes of one length end at the same time.
            .prefetch(together)
            # Several patients at a time, slice by slice, so that neighbours in the stream are not neighbours in a body.
            .interleave(functools.partial(stacks, epoch), cycle_length=together, block_length=1)
            # Views of volumes, not copies, which keep no more than as many volumes in memory.
            .shuffle(together, seed=seed + epoch, reshuffle_each_iteration=False)
        )

    def deformed(deform: Deform, index: tf.Tensor, sample: Samples) -> Samples:
        seeds = draws.sample_seeds(seed, draws.ELASTIC_STREAM, index // batch_size, (index % batch_size)[None])[0]
        stack = tf.transpose(tf.cast(sample.stack, tf.float32), [1, 2, 0])
        stack, mask = deform(stack, sample.mask, seeds)
        return sample._replace(stack=tf.cast(tf.round(tf.transpose(stack, [2, 0, 1])), tf.uint16), mask=mask)

    samples = (
        tf.data.Dataset.range(first_epoch, 2**31)
        .flat_map(samples_of)
        # After the shuffle: the slices an interrupted run has used are the first of its epoch's order.
        .skip(used)
    )
    if share.workers > 1 or deform is not None:
        numbered = samples.enumerate(step * batch_size)
        if share.workers > 1:
            # Every machine draws the whole stream and keeps its own places of a batch: one order, whoever computes it.
            numbered = numbered.filter(lambda index, _: (index % batch_size) // len(own) == share.worker)
        finish = (lambda _, sample: sample) if deform is None else functools.partial(deformed, deform)
        samples = numbered.map(finish, num_parallel_calls=None if deform is None else tf.data.AUTOTUNE)
    if not alone:
        # Epochs run into each other inside a batch, so every batch is full and a step is a step.
        samples = samples.batch(at_a_time, drop_remainder=True)
    return samples.prefetch(max(2, WAITING_SLICES // batch_size))


def volumes_together(volumes: int, slices: int, shuffle_slices: int) -> int:
    """How many of `volumes`, which hold `slices`, are open at a time: as many as hold `shuffle_slices` or more."""
    return min(volumes, max(MIXED_VOLUMES, math.ceil(shuffle_slices * volumes / slices)))


@tf.autograph.experimental.do_not_convert
def volume_samples(files: Sequence[Path], reading: Reading) -> tf.data.Dataset:
    """A dataset of one element a shard, in order: all slices of its volume, in order, as `Samples` with B = S."""

    def samples(record: tf.Tensor) -> Samples:
        volume = _volume(record, reading)
        around = tf.range(tf.shape(volume.mask)[0])[:, None] + tf.range(2 * reading.neighbours + 1)
        own = tf.stack([tf.zeros_like(around[:, 0]), tf.range(tf.shape(volume.mask)[0])], axis=1)
        tissues = (
            tf.gather(volume.tissues, around)
            if reading.tissues
            else tf.zeros([tf.shape(own)[0], 0, reading.size, reading.size], tf.uint8)
        )
        return Samples(tf.gather(volume.image, around), volume.mask, tf.gather(volume.scale, around), own, tissues)

    return tf.data.TFRecordDataset(tf.constant([str(file) for file in files], tf.string)).map(samples)


def _volume(record: tf.Tensor, reading: Reading) -> _Volume:
    volume = records.decode(record, reading.size, reading.patients, reading.tissues)
    low, high = preprocess.intensity_bounds(
        volume.statistics, reading.normalisation, reading.clip_percentiles, reading.global_bounds
    )
    scale = tf.stack([*(value + tf.zeros_like(low) for value in (volume.slope, volume.intercept)), low, high], axis=1)
    count, neighbours = tf.shape(volume.image)[0], reading.neighbours
    repeated = tf.clip_by_value(tf.range(-neighbours, count + neighbours), 0, count - 1)
    tissues = tf.zeros([0, reading.size, reading.size], tf.uint8)
    if volume.tissues is not None:
        tissues = tf.gather(volume.tissues, repeated)
    return _Volume(tf.gather(volume.image, repeated), volume.mask[..., None], tf.gather(scale, repeated), tissues)


@tf.autograph.experimental.do_not_convert
def are_blank(files: Sequence[Path], reading: Reading) -> list[bool]:
    """Of each shard whether its bounds coincide in every slice, so that the network would see nothing but one value."""

    def is_blank(record: tf.Tensor) -> tf.Tensor:  # a graph, which unpacks no image for the statistics
        scan = records.decode(record, reading.size, reading.patients).statistics
        low, high = preprocess.intensity_bounds(
            scan, reading.normalisation, reading.clip_percentiles, reading.global_bounds
        )
        return tf.reduce_all(low >= high)

    names = tf.constant([str(file) for file in files], tf.string)
    return [bool(blank) for blank in tf.data.TFRecordDataset(names).map(is_blank)]


def intensities(samples: Samples, normalisation: Normalisation) -> tf.Tensor:
    """Normalised float32 [B, size, size, 2n+1] of samples; runs on the device, where 16 bits travel faster than 32."""
    slope, intercept, low, high = tf.unstack(samples.scale[:, None, None], axis=-1)
    values = tf.transpose(tf.cast(samples.stack, tf.float32), [0, 2, 3, 1]) * slope + intercept
    return preprocess.normalise(values, low, high, normalisation)


def training_bounds(
    files: Sequence[Path],
    size: int,
    clip_percentiles: Sequence[float] | None,
    patients: Sequence[str] | None = None,
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Constants of the training patients: bounds for "global" normalisation, and the range that is scaled to 0..1.

    The bounds are the least minimum and the greatest maximum (of the clipped intensities, if clipped); the range goes
    from the median of the scans' 0.5th percentiles to that of their 99.5th, which single bright voxels do not move.
    """
    lows, highs, dark, bright = [], [], [], []
    for serialised in tf.data.TFRecordDataset([str(file) for file in files]):
        scan = records.decode(serialised, size, patients).statistics
        low, high = scan.minimum, scan.maximum
        if clip_percentiles is not None:
            low, high = (preprocess.percentile(scan.percentiles, percent) for percent in clip_percentiles)
        lows.append(float(low))
        highs.append(float(high))
        dark.append(float(preprocess.percentile(scan.percentiles, 0.5)))
        bright.append(float(preprocess.percentile(scan.percentiles, 99.5)))
    return (min(lows), max(highs)), (float(np.median(dark)), float(np.median(bright)))
