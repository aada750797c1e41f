"""Losses over class logits, a number a sample; the training step adds them up and divides by the global batch size.

So divided, the sum over all devices does not depend on how they share a batch. Two losses need more care for that:

- Class weights multiply each pixel's loss, and the mean is over pixels, not over weights: a mean over weights
  (`torch.nn.CrossEntropyLoss`) would tie the samples of a batch together, and at batch 1 the weights would cancel in
  every slice that holds one class only.
- Dice is of the whole batch, since most slices hold no liver, and a slice's own Dice says nothing there. Its sums are
  added up over the devices before they are divided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import tensorflow as tf

from lvseg.errors import InputError

NAMES = ("cross_entropy", "dice", "cross_entropy_dice", "focal")
# Keeps the slope of (1 - p)^gamma finite where p is 1; below float32's rounding of 1.
LEAST_MISS = 1e-7

Reduce = Callable[[tf.Tensor], tf.Tensor]


class Loss(Protocol):
    """Of logits float32 [B, H, W, C] and labels uint8 [B, H, W, 1], a number a sample: float32 [B].

    `reduce` adds a tensor up over the devices that share a batch, differentiably; on one device there is nothing to do.
    """

    def __call__(self, logits: tf.Tensor, labels: tf.Tensor, reduce: Reduce = tf.identity) -> tf.Tensor: ...


def loss_function(name: str, class_weights: Sequence[float] | None = None, focal_gamma: float = 2.0) -> Loss:
    """The loss of an experiment.

    Args:
        name: one of NAMES.
        class_weights: one a class, background first, for each pixel's cross entropy or focal loss.
        focal_gamma: exponent of the focal loss.

    Raises:
        ValueError: for an unknown name, or class weights for Dice alone, which counts the classes alike as it is.
        InputError: BAD_CONFIG, of the loss when called, if there are not as many weights as classes.
    """
    if name not in NAMES:
        raise ValueError(f"Expected one of {NAMES}, received name={name!r}.")
    if name == "dice" and class_weights is not None:
        raise ValueError(f"Expected no class weights with name='dice', received {list(class_weights)}.")

    def loss(logits: tf.Tensor, labels: tf.Tensor, reduce: Reduce = tf.identity) -> tf.Tensor:
        if name == "dice":
            return soft_dice(logits, labels, reduce)
        if name == "focal":
            return focal(logits, labels, class_weights, focal_gamma)
        pixels = cross_entropy(logits, labels, class_weights)
        return pixels + soft_dice(logits, labels, reduce) if name == "cross_entropy_dice" else pixels

    return loss


def cross_entropy(logits: tf.Tensor, labels: tf.Tensor, class_weights: Sequence[float] | None = None) -> tf.Tensor:
    """Mean over pixels of -log of the true class's probability, times the class's weight: float32 [B], >= 0.

    From logits, since the logarithm of a probability has no gradient left where the network is surely wrong.

    Args:
        logits: float32 [B, H, W, C]; labels: uint8 [B, H, W, 1]; class_weights: C numbers, None for 1 each.
    """
    return _weighted_mean(_surprise(logits, labels), logits, labels, class_weights)


def focal(
    logits: tf.Tensor, labels: tf.Tensor, class_weights: Sequence[float] | None = None, gamma: float = 2.0
) -> tf.Tensor:
    """Cross entropy in which a pixel counts (1 - p)^gamma, p the true class's probability: float32 [B], >= 0.

    Args and class weights as in `cross_entropy`, which it is for gamma 0. Source: Lin et al., 2017.
    """
    surprise = _surprise(logits, labels)
    miss = tf.maximum(-tf.math.expm1(-surprise), LEAST_MISS)
    return _weighted_mean(miss**gamma * surprise, logits, labels, class_weights)


def soft_dice(logits: tf.Tensor, labels: tf.Tensor, reduce: Reduce = tf.identity) -> tf.Tensor:
    """1 - mean Dice of the foreground classes over the whole batch, the same for each sample: float32 [B], 0..1.

    The sums take 1 pixel each so that empty equals empty. Source: Milletari et al., V-Net, 2016.

    Args:
        logits: float32 [B, H, W, C]; labels: uint8 [B, H, W, 1].
        reduce: adds up float32 [2, C - 1], the classes' overlaps and sizes, over the devices that share the batch.
    """
    probabilities = tf.nn.softmax(logits)[..., 1:]
    true = tf.one_hot(tf.cast(labels[..., 0], tf.int32), logits.shape[-1], dtype=logits.dtype)[..., 1:]
    overlap, size = tf.unstack(
        reduce(
            tf.stack(
                [
                    tf.reduce_sum(true * probabilities, axis=[0, 1, 2]),
                    tf.reduce_sum(true + probabilities, axis=[0, 1, 2]),
                ]
            )
        )
    )
    dice = tf.reduce_mean((2.0 * overlap + 1.0) / (size + 1.0))
    return tf.fill([tf.shape(logits)[0]], 1.0 - dice)


def _surprise(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """-log of the true class's probability: float32 [B, H, W]."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(tf.cast(labels[..., 0], tf.int32), logits)


def _weighted_mean(
    pixels: tf.Tensor, logits: tf.Tensor, labels: tf.Tensor, class_weights: Sequence[float] | None
) -> tf.Tensor:
    """Mean of float32 [B, H, W] over a sample's pixels, each times its true class's weight: float32 [B]."""
    if class_weights is not None:
        if len(class_weights) != logits.shape[-1]:
            raise InputError(
                "BAD_CONFIG",
                f"Expected train.class_weights to hold a number for each of {logits.shape[-1]} classes, received"
                f" {len(class_weights)}.",
            )
        weights = tf.constant(list(class_weights), pixels.dtype)
        pixels *= tf.gather(weights, tf.cast(labels[..., 0], tf.int32))
    return tf.reduce_mean(pixels, axis=[1, 2])
