"""Every random number of a run: what it is keyed by, and numbers that are the same on every device.

A sample's numbers follow from the run's seed, the step and the sample's place in the global batch, and from the stream,
which says what they are for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

# Widths in bits of the fields that `sample_seeds` packs; each word stays below 2**63, since int64 has a sign.
SEED_BITS, STREAM_BITS = 47, 16
STEP_BITS, INDEX_BITS = 31, 32
# Every use of a run's random numbers has a stream of its own; dropout layer k takes DROPOUT_STREAM + k.
ELASTIC_STREAM, SHUFFLE_STREAM, FLIP_STREAM, ROTATE_STREAM, SCALE_STREAM, GAMMA_STREAM = range(6)
BIAS_FIELD_STREAM, BIAS_CONTROL_STREAM, NOISE_STREAM, NOISE_PIXEL_STREAM, RESOLUTION_STREAM = range(6, 11)
DROPOUT_STREAM = 16
(
    CONTRAST_STREAM, SEQUENCE_STREAM, TISSUE_STREAM, RANDOM_TISSUE_STREAM, ROUGHNESS_STREAM, TEXTURE_STREAM,
    THICKNESS_STREAM, BLUR_STREAM, GHOST_STREAM, GHOST_SHIFT_STREAM, VIEW_STREAM, VIEW_CUT_STREAM, TABLE_STREAM,
    TABLE_SHAPE_STREAM, ARMS_STREAM, ARMS_SHAPE_STREAM,
) = range(4096, 4112)  # fmt: skip


def sample_seeds(seed: int, stream: int, step: int | tf.Tensor, indices: tf.Tensor) -> tf.Tensor:
    """Packs what a random draw is keyed by into seeds for TensorFlow's stateless random numbers, without collisions.

    Bits, high to low: word 0 is seed (47), stream (16); word 1 is step (31), index (32).

    Args:
        seed: of the run, 0 to 2**47 - 1.
        stream: which use of randomness (deformation, a layer's dropout, ...), 0 to 2**16 - 1.
        step: of training, 0 to 2**31 - 1; a number or an integer scalar tensor.
        indices: integer [B], each sample's own global index, 0 to 2**32 - 1.

    Returns:
        int64 [B, 2].

    Raises:
        ValueError: for a seed, stream or step (as a number) outside its range; tensors are not looked into.
    """
    ranges = [("seed", seed, SEED_BITS), ("stream", stream, STREAM_BITS)]
    if isinstance(step, int):
        ranges.append(("step", step, STEP_BITS))
    for name, value, bits in ranges:
        if not 0 <= value < 2**bits:
            raise ValueError(f"Expected {name} from 0 to 2**{bits} - 1, received {name}={value}.")
    indices = tf.cast(indices, tf.int64)
    run = tf.zeros_like(indices) + (seed * 2**STREAM_BITS + stream)
    return tf.stack([run, tf.cast(step, tf.int64) * 2**INDEX_BITS + indices], axis=1)


def of_stream(seeds: tf.Tensor, stream: int) -> tf.Tensor:
    """Turns seeds, int64 [B, 2], from `sample_seeds` with stream 0 into those of another stream."""
    return seeds + tf.constant([stream, 0], tf.int64)


def uniform(seed: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    """Draws a sample's numbers, float64 and uniform between 0 and 1, from its seed, int64 [2], alone.

    TensorFlow's own uniform and normal numbers differ between its kernels and XLA; Philox's bits do not, so the bits
    are drawn and made numbers here.
    """
    bits = tf.random.stateless_uniform(shape, seed, minval=None, maxval=None, dtype=tf.uint32, alg="philox")
    return (tf.cast(bits, tf.float64) + 0.5) * 2.0**-32


def strength(seeds: tf.Tensor, stream: int, probability: float, lowest: float, highest: float) -> tf.Tensor:
    """Draws how strongly each sample undergoes an augmentation, or 0 for those that do not.

    Args:
        seeds: int64 [B, 2], from `sample_seeds` with stream 0.
        stream: the augmentation's own.
        probability: of undergoing it.
        lowest, highest: between which the strength is uniform.

    Returns:
        float64 [B].
    """
    drawn = uniform_of_each(seeds, stream, 2)
    return tf.where(drawn[:, 0] < probability, lowest + (highest - lowest) * drawn[:, 1], 0.0)


def uniform_of_each(seeds: tf.Tensor, stream: int, count: int) -> tf.Tensor:
    """Draws `count` numbers, as `uniform` does, of a stream for each of seeds, int64 [B, 2]: float64 [B, count]."""
    return tf.map_fn(
        lambda seed: uniform(seed, [count]),
        of_stream(seeds, stream),
        fn_output_signature=tf.TensorSpec([count], tf.float64),
    )


def one_by_one() -> bool:
    """Whether samples are best changed one by one: a processor then leaves out what a sample does not undergo.

    A GPU is told what to do before it is known who undergoes what; it changes all samples at once.
    """
    return not tf.config.get_visible_devices("GPU")


def where(chosen: tf.Tensor, changed: Callable[[], tf.Tensor], stacks: tf.Tensor) -> tf.Tensor:
    """Changes the samples that are chosen and keeps the others as they are, to the bit.

    What a batch of one does not undergo is not computed where `one_by_one` says so.

    Args:
        chosen: bool [B], of the same B when traced as the stacks.
        changed: makes all samples changed, float32 [B, size, size, C].
        stacks: float32 [B, size, size, C].

    Returns:
        float32 [B, size, size, C].
    """
    if stacks.shape[0] == 1 and one_by_one():
        # No turn of a loop or one, since XLA shares a loop's work among a processor's cores, but not a condition's.
        return tf.while_loop(
            lambda is_left, _: is_left,
            lambda *_: (tf.constant(False), changed()),
            (chosen[0], stacks),
            (tf.TensorShape([]), stacks.shape),
        )[1]
    return tf.where(chosen[:, tf.newaxis, tf.newaxis, tf.newaxis], changed(), stacks)


def of_sample(values: tf.Tensor) -> tf.Tensor:
    """A number a sample, [B], as float32 [B, 1, 1, 1], to meet stacks."""
    return tf.cast(values, tf.float32)[:, tf.newaxis, tf.newaxis, tf.newaxis]


def displacement(seeds: tf.Tensor, sigma_px: float, grid: int) -> tf.Tensor:
    """Draws the control points' displacements, each sample's from its own seed alone.

    Args:
        seeds: int64 [B, 2].
        sigma_px: standard deviation in pixels.
        grid: control points an axis.

    Returns:
        float32 [B, 2, grid, grid] in pixels, (row, column) first; independent normal numbers.
    """

    normal = tf.reshape(normal_of_each(seeds, 2 * grid * grid), [-1, 2, grid, grid])
    return tf.cast(tf.cast(sigma_px, tf.float64) * normal, tf.float32)


def many_bits(seeds: tf.Tensor, count: int) -> tf.Tensor:
    """Draws random bits as fast as pixels can be read, for each of seeds, int64 [B, 2]: uint32 [B, count].

    Each is a hash of its place and of two numbers that Philox draws: multiplications and shifts (the low-bias 32-bit
    mixing of C. Wellons' hash-prospector, 2018, twice), which XLA makes part of what uses them, a fifth of the time
    of Philox. Good enough for the noise of pixels, and the same everywhere.
    """

    def draw(seed: tf.Tensor) -> tf.Tensor:
        keys = tf.random.stateless_uniform([2], seed, minval=None, maxval=None, dtype=tf.uint32, alg="philox")
        return tf.cast(keys, tf.int64)  # of which a GPU can make a list

    keys = tf.cast(tf.map_fn(draw, seeds, fn_output_signature=tf.TensorSpec([2], tf.int64)), tf.uint32)

    def mixed(bits: tf.Tensor) -> tf.Tensor:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            bits = tf.bitwise.bitwise_xor(bits, tf.bitwise.right_shift(bits, tf.constant(shift, tf.uint32)))
            bits *= tf.constant(factor, tf.uint32)
        return tf.bitwise.bitwise_xor(bits, tf.bitwise.right_shift(bits, tf.constant(16, tf.uint32)))

    place = tf.constant((np.arange(count, dtype=np.uint64) * 0x9E3779B9).astype(np.uint32))
    return mixed(tf.bitwise.bitwise_xor(mixed(place + keys[:, :1]), keys[:, 1:]))


def normal_pairs(seeds: tf.Tensor, count: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Draws pairs of independent normal numbers, many and fast, for each of seeds, int64 [B, 2]: float32 [B, count]
    each.

    Box and Muller's (1958), of `many_bits`, 32 a pair: 16 for the radius, so that none is above 4.9, and 16 for the
    angle, whose sine and cosine are polynomials (to 3e-5), as XLA on a processor calls a function for each otherwise.
    """
    bits = many_bits(seeds, count)
    upper = tf.cast(tf.bitwise.right_shift(bits, tf.constant(16, tf.uint32)), tf.float32)
    angle = tf.cast(tf.bitwise.bitwise_and(bits, tf.constant(0x7FFF, tf.uint32)), tf.float32)
    sign = 1.0 - tf.cast(tf.bitwise.bitwise_and(bits, tf.constant(0x8000, tf.uint32)), tf.float32) * 2.0**-14
    radius = sign * tf.sqrt(-2.0 * tf.math.log((upper + 0.5) * 2.0**-16))
    x = ((angle + 0.5) * 2.0**-15 - 0.5) * math.pi  # a half turn; the sign makes it a whole one
    square = x * x
    cosine = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320))))
    sine = x * (1 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880)))))
    return radius * cosine, radius * sine


def normal_of_each(seeds: tf.Tensor, count: int) -> tf.Tensor:
    """Draws `count` independent normal numbers for each of seeds, int64 [B, 2]: float64 [B, count]."""

    def draw(seed: tf.Tensor) -> tf.Tensor:
        drawn = uniform(seed, [2, count])
        return tf.sqrt(-2.0 * tf.math.log(drawn[0])) * tf.cos(2.0 * math.pi * drawn[1])  # Box and Muller, 1958

    return tf.map_fn(draw, seeds, fn_output_signature=tf.TensorSpec([count], tf.float64))
