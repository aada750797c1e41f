"""Losses over class logits, a number a sample; the training step adds them up and divides by the global batch size."""

from __future__ import annotations

import tensorflow as tf


def cross_entropy(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Mean over pixels of -log of the true class's probability, per sample.

    From logits, since the logarithm of a probability has no gradient left where the network is surely wrong.

    Args:
        logits: float32 [B, H, W, C]; labels: uint8 [B, H, W, 1].

    Returns:
        float32 [B], >= 0.
    """
    classes = tf.cast(labels[..., 0], tf.int32)
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(classes, logits), axis=[1, 2])


def soft_dice(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """1 - Dice of the foreground classes over the whole batch, the same for each sample: float32 [B], 0..1.

    Over the batch, since most single slices hold no liver; the sums take 1 pixel each so that empty equals empty.
    Source: Milletari et al., V-Net, 2016.
    """
    probabilities = tf.nn.softmax(logits)
    true = tf.one_hot(tf.cast(labels[..., 0], tf.int32), logits.shape[-1], dtype=logits.dtype)[..., 1:]
    overlap = tf.reduce_sum(true * probabilities[..., 1:], axis=[0, 1, 2])
    total = tf.reduce_sum(true + probabilities[..., 1:], axis=[0, 1, 2])
    dice = tf.reduce_mean((2.0 * overlap + 1.0) / (total + 1.0))
    return tf.fill([tf.shape(logits)[0]], 1.0 - dice)


def cross_entropy_dice(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """`cross_entropy` plus `soft_dice`: float32 [B]."""
    return cross_entropy(logits, labels) + soft_dice(logits, labels)


LOSSES = {"cross_entropy": cross_entropy, "dice": soft_dice, "cross_entropy_dice": cross_entropy_dice}
