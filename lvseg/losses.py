"""Losses over class probabilities, each the sum over a batch's samples divided by the global batch size."""

from __future__ import annotations

import tensorflow as tf

SMALLEST_PROBABILITY = 1e-7


def cross_entropy(probabilities: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Mean over pixels of -log of the true class's probability, per sample.

    Args:
        probabilities: float32 [B, H, W, C]; labels: uint8 [B, H, W, 1].

    Returns:
        float32 [B], >= 0.
    """
    true = tf.one_hot(tf.cast(labels[..., 0], tf.int32), probabilities.shape[-1], dtype=probabilities.dtype)
    log = tf.math.log(tf.clip_by_value(probabilities, SMALLEST_PROBABILITY, 1.0))
    return -tf.reduce_mean(tf.reduce_sum(true * log, axis=-1), axis=[1, 2])


def soft_dice(probabilities: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """1 - Dice of the foreground classes over the whole batch, the same for each sample: float32 [B], 0..1.

    Over the batch, since most single slices hold no liver; the sums take 1 pixel each so that empty equals empty.
    Source: Milletari et al., V-Net, 2016.
    """
    true = tf.one_hot(tf.cast(labels[..., 0], tf.int32), probabilities.shape[-1], dtype=probabilities.dtype)[..., 1:]
    overlap = tf.reduce_sum(true * probabilities[..., 1:], axis=[0, 1, 2])
    total = tf.reduce_sum(true + probabilities[..., 1:], axis=[0, 1, 2])
    dice = tf.reduce_mean((2.0 * overlap + 1.0) / (total + 1.0))
    return tf.fill([tf.shape(probabilities)[0]], 1.0 - dice)


def cross_entropy_dice(probabilities: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """`cross_entropy` plus `soft_dice`: float32 [B]."""
    return cross_entropy(probabilities, labels) + soft_dice(probabilities, labels)


LOSSES = {"cross_entropy": cross_entropy, "dice": soft_dice, "cross_entropy_dice": cross_entropy_dice}
