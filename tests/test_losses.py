"""Losses by hand arithmetic."""

import math

import numpy as np
import pytest
import tensorflow as tf

from lvseg.losses import LOSSES, cross_entropy, soft_dice


def two_pixels(first, second):
    """Logits that give the foreground these probabilities in two pixels of one slice."""
    foreground = np.array([[[first, second]]], np.float32)
    return tf.constant(np.log(np.stack([1 - foreground, foreground], axis=-1)))


LABELS = tf.constant([[[[1], [0]]]], tf.uint8)


def test_cross_entropy_is_the_mean_log_of_the_true_class():
    assert float(cross_entropy(two_pixels(0.8, 0.4), LABELS)[0]) == pytest.approx(-(math.log(0.8) + math.log(0.6)) / 2)


@pytest.mark.parametrize("sureness", [9.0, 40.0, 500.0])
def test_cross_entropy_of_a_sure_mistake_is_finite_and_pulls_back(sureness):
    logits = tf.Variable([[[[sureness, -sureness], [sureness, -sureness]]]])
    with tf.GradientTape() as tape:
        loss = cross_entropy(logits, LABELS)
    assert float(loss[0]) == pytest.approx(sureness)  # half of 2 x sureness: the second pixel is right
    np.testing.assert_allclose(tape.gradient(loss, logits)[0, 0, 0], [0.5, -0.5], rtol=1e-5)


def test_soft_dice_counts_the_foreground_of_the_whole_batch():
    # Overlap 0.8; truth 1, predicted 1.2; each sum takes one pixel more: 1 - 2.6 / 3.2.
    assert float(soft_dice(two_pixels(0.8, 0.4), LABELS)[0]) == pytest.approx(1 - 2.6 / 3.2)


def test_soft_dice_of_empty_and_empty_is_zero():
    assert float(soft_dice(two_pixels(1e-30, 1e-30), tf.zeros_like(LABELS))[0]) == pytest.approx(0.0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_better_answer_costs_less_and_gradients_flow(name):
    logits = tf.Variable([[[[0.3, -0.2], [0.1, 0.4]]]])
    with tf.GradientTape() as tape:
        loss = LOSSES[name](logits, LABELS)
    step = tape.gradient(loss, logits)
    better = LOSSES[name](logits - 0.5 * step, LABELS)
    assert loss.shape == (1,) and float(better[0]) < float(loss[0])


def test_three_classes_are_one_loss():
    logits = tf.math.log(tf.constant([[[[0.2, 0.5, 0.3]]]]))
    assert float(cross_entropy(logits, tf.constant([[[[2]]]], tf.uint8))[0]) == pytest.approx(-math.log(0.3))
