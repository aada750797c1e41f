"""Losses by hand arithmetic."""

import json
import math
from typing import get_args

import numpy as np
import pytest
import tensorflow as tf
from small_study import ROOT, python

from lvseg import losses
from lvseg.config import Train
from lvseg.errors import InputError
from lvseg.losses import cross_entropy, focal, loss_function, soft_dice


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


def test_class_weights_multiply_each_pixels_cross_entropy():
    # The mean is over the two pixels, not over the weights 3 and 0.5.
    expected = -(3 * math.log(0.8) + 0.5 * math.log(0.6)) / 2
    assert float(cross_entropy(two_pixels(0.8, 0.4), LABELS, [0.5, 3.0])[0]) == pytest.approx(expected)


def test_focal_loss_turns_to_the_pixels_that_are_wrong():
    logits = two_pixels(0.8, 0.4)
    for gamma in (0.5, 1.0, 2.0, 5.0):
        expected = -(0.2**gamma * math.log(0.8) + 0.4**gamma * math.log(0.6)) / 2
        assert float(focal(logits, LABELS, gamma=gamma)[0]) == pytest.approx(expected)
    weighted = -(3 * 0.2**2 * math.log(0.8) + 0.5 * 0.4**2 * math.log(0.6)) / 2
    assert float(focal(logits, LABELS, [0.5, 3.0], gamma=2.0)[0]) == pytest.approx(weighted)
    assert float(focal(logits, LABELS, gamma=0.0)[0]) == pytest.approx(float(cross_entropy(logits, LABELS)[0]))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("sureness", [-500.0, -20.0, 0.0, 20.0, 500.0])
def test_focal_loss_has_a_slope_everywhere(gamma, sureness):
    """Surely right, surely wrong and in between; where it is right, gamma below 1 has a pole at p = 1."""
    logits = tf.Variable([[[[-sureness, sureness], [sureness, -sureness]]]])
    with tf.GradientTape() as tape:
        loss = focal(logits, LABELS, gamma=gamma)
    slope = tape.gradient(loss, logits).numpy()
    assert np.isfinite(float(loss[0])) and np.isfinite(slope).all()
    assert (slope[0, 0, 0, 1] < -0.1) == (sureness <= 0)  # wrong or undecided: raise the true class


def test_soft_dice_counts_the_foreground_of_the_whole_batch():
    # Overlap 0.8; truth 1, predicted 1.2; each sum takes one pixel more: 1 - 2.6 / 3.2.
    assert float(soft_dice(two_pixels(0.8, 0.4), LABELS)[0]) == pytest.approx(1 - 2.6 / 3.2)
    # A second slice without an organ: predicted 0.3 more; 1 - 2.6 / 3.5, for both slices.
    logits = tf.concat([two_pixels(0.8, 0.4), two_pixels(0.1, 0.2)], axis=0)
    labels = tf.concat([LABELS, tf.zeros_like(LABELS)], axis=0)
    np.testing.assert_allclose(soft_dice(logits, labels), [1 - 2.6 / 3.5] * 2, rtol=1e-6)


def test_soft_dice_of_empty_and_empty_is_zero():
    assert float(soft_dice(two_pixels(1e-30, 1e-30), tf.zeros_like(LABELS))[0]) == pytest.approx(0.0)


def test_soft_dice_is_the_mean_over_foreground_classes():
    logits = tf.math.log(tf.constant([[[[0.2, 0.5, 0.3], [0.1, 0.3, 0.6]]]]))
    labels = tf.constant([[[[1], [2]]]], tf.uint8)
    first, second = (2 * 0.5 + 1) / (1 + 0.8 + 1), (2 * 0.6 + 1) / (1 + 0.9 + 1)
    assert float(soft_dice(logits, labels)[0]) == pytest.approx(1 - (first + second) / 2)


@pytest.mark.parametrize("name", losses.NAMES)
def test_a_better_answer_costs_less_and_gradients_flow(name):
    logits = tf.Variable([[[[0.3, -0.2], [0.1, 0.4]]]])
    loss_of = loss_function(name)
    with tf.GradientTape() as tape:
        loss = loss_of(logits, LABELS)
    step = tape.gradient(loss, logits)
    better = loss_of(logits - 0.5 * step, LABELS)
    assert loss.shape == (1,) and float(better[0]) < float(loss[0])


def test_three_classes_are_one_loss():
    logits = tf.math.log(tf.constant([[[[0.2, 0.5, 0.3]]]]))
    assert float(cross_entropy(logits, tf.constant([[[[2]]]], tf.uint8))[0]) == pytest.approx(-math.log(0.3))


def test_an_experiments_loss_is_what_its_keys_say():
    logits, weights = two_pixels(0.8, 0.4), [0.5, 3.0]
    dice = 1 - 2.6 / 3.2
    weighted = -(3 * math.log(0.8) + 0.5 * math.log(0.6)) / 2
    assert float(loss_function("dice")(logits, LABELS)[0]) == pytest.approx(dice)
    assert float(loss_function("cross_entropy", weights)(logits, LABELS)[0]) == pytest.approx(weighted)
    assert float(loss_function("cross_entropy_dice", weights)(logits, LABELS)[0]) == pytest.approx(weighted + dice)
    focused = -(0.2**3 * math.log(0.8) + 0.4**3 * math.log(0.6)) / 2
    assert float(loss_function("focal", focal_gamma=3.0)(logits, LABELS)[0]) == pytest.approx(focused)
    assert set(losses.NAMES) == set(get_args(Train.model_fields["loss"].annotation))


# TensorFlow has to be told of two devices before it computes anything, so this runs in a process of its own.
TWO_DEVICES = """
import json
import numpy as np
import tensorflow as tf
from lvseg.losses import NAMES, loss_function

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
random = np.random.default_rng(0)
logits = random.normal(size=(6, 4, 5, 3)).astype(np.float32)
labels = random.integers(0, 3, (6, 4, 5, 1)).astype(np.uint8)
labels[3:] = 0  # the second device's slices hold no organ

def step(strategy, loss_of):
    context = tf.distribute.get_replica_context()
    add_up = lambda values: context.all_reduce("SUM", values)
    shares = strategy.num_replicas_in_sync
    place = context.replica_id_in_sync_group
    own = [tf.reshape(values, [shares, -1, *values.shape[1:]])[place] for values in (logits, labels)]
    factors = tf.ones([3])
    with tf.GradientTape() as tape:
        tape.watch(factors)
        loss = tf.reduce_sum(loss_of(factors * own[0], own[1], add_up)) / len(logits)
    return add_up(loss), add_up(tape.gradient(loss, factors))

answers = {}
for name in NAMES:
    loss_of = loss_function(name, None if name == "dice" else [0.2, 1.0, 2.0], 1.5)
    answers[name] = []
    for place in (strategy, tf.distribute.get_strategy()):
        run = tf.function(lambda: place.run(step, args=(place, loss_of)))
        loss, slope = (place.experimental_local_results(values)[-1].numpy() for values in run())
        answers[name].append([float(loss), *slope.tolist()])
print(json.dumps(answers))
"""


def test_two_devices_that_share_a_batch_learn_what_one_would():
    done = python(ROOT, "-c", TWO_DEVICES)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert set(answers) == set(losses.NAMES)
    for two, one in answers.values():
        assert np.abs(one).min() > 1e-4  # every class's scores matter
        np.testing.assert_allclose(two, one, rtol=1e-5)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"train\.class_weights .* 2 classes, received 3"):
        loss_function("focal", [1.0, 1.0, 1.0])(two_pixels(0.5, 0.5), LABELS)
    with pytest.raises(ValueError, match="no class weights"):
        loss_function("dice", [1.0, 1.0])
    with pytest.raises(ValueError, match="'hinge'"):
        loss_function("hinge")
