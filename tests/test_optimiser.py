"""Adam against Keras' own; frozen variables, clipping and loss scaling; and the learning-rate schedules."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from lvseg.optimiser import FIRST_LOSS_SCALE, STEPS_TO_DOUBLE, Adam, learning_rate

TRUE = tf.constant(True)
RATE = tf.constant(0.01)


def variables():
    random = np.random.default_rng(0)
    return [tf.Variable(random.normal(size=shape).astype(np.float32)) for shape in ((3, 4), (4,), ())]


def gradients(steps, scale=1.0):
    random = np.random.default_rng(1)
    return [[tf.constant(scale * random.normal(size=v.shape), tf.float32) for v in variables()] for _ in range(steps)]


def trained(optimiser, drawn, first=0):
    for step, own in enumerate(drawn, start=first):
        assert optimiser.apply(own, RATE, tf.constant(step, tf.int64), TRUE)


def values(own):
    return [variable.numpy() for variable in own]


def assert_close(one, other):
    for a, b in zip(values(one), values(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("beta_1, beta_2", [(0.9, 0.999), (0.5, 0.9)])
def test_it_is_the_adam_of_keras(beta_1, beta_2):
    own, theirs = variables(), [keras.Variable(v) if hasattr(keras, "Variable") else v for v in variables()]
    reference = keras.optimizers.Adam(0.01, beta_1, beta_2)
    drawn = gradients(20)
    trained(Adam(own, [0, 0, 0], beta_1, beta_2), drawn)
    for step in drawn:
        reference.apply_gradients(zip(step, theirs, strict=True))
    assert_close(own, theirs)


def test_gradients_are_clipped_by_the_norm_of_all_together():
    drawn = gradients(3, scale=100.0)
    norms = [np.sqrt(sum(float(tf.reduce_sum(g**2)) for g in step)) for step in drawn]
    clipped = [[g * (2.0 / norm) for g in step] for step, norm in zip(drawn, norms, strict=True)]
    own, expected = variables(), variables()
    trained(Adam(own, [0, 0, 0], clip_norm=2.0), drawn)
    trained(Adam(expected, [0, 0, 0]), clipped)
    assert_close(own, expected)
    small = gradients(3, scale=1e-3)
    own, expected = variables(), variables()
    trained(Adam(own, [0, 0, 0], clip_norm=2.0), small)
    trained(Adam(expected, [0, 0, 0]), small)
    assert_close(own, expected)


def test_a_frozen_variable_begins_later_as_if_the_others_had_waited_too():
    drawn = gradients(6)
    own, late = variables(), variables()
    optimiser = Adam(own, [0, 4, 0])
    before = own[1].numpy()
    trained(optimiser, drawn[:4])
    np.testing.assert_array_equal(own[1], before)
    trained(optimiser, drawn[4:], first=4)
    trained(Adam(late, [0, 0, 0]), drawn[4:])
    np.testing.assert_allclose(own[1], late[1], rtol=1e-6)
    everything = variables()
    trained(Adam(everything, [0, 0, 0]), drawn)
    np.testing.assert_allclose(own[0], everything[0], rtol=1e-6)


def test_a_frozen_variable_s_gradient_does_not_count_for_clipping():
    (step,) = gradients(1)
    huge = [step[0], step[1] * 1e6, step[2]]
    own, expected = variables(), variables()
    for variables_, gradients_ in ((own, huge), (expected, [step[0], step[1] * 0, step[2]])):
        trained(Adam(variables_, [0, 4, 0], clip_norm=0.1), [gradients_])
    assert_close(own, expected)


def states(optimiser):
    return [variable.numpy() for variable in tf.nest.flatten(optimiser.state)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_changes_nothing(bad):
    own = variables()
    optimiser = Adam(own, [0, 0, 0])
    trained(optimiser, gradients(3))
    before, state = values(own), states(optimiser)
    (poisoned,) = gradients(1)
    poisoned[1] = tf.constant([1.0, bad, 1.0, 1.0])
    step = tf.constant(3, tf.int64)
    assert not optimiser.apply(poisoned, RATE, step, TRUE)
    assert optimiser.apply(gradients(1)[0], RATE, step, tf.constant(False))  # finite, yet of a loss that was not
    for one, other in zip([*before, *state], [*values(own), *states(optimiser)], strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_loss_is_scaled_and_an_overflow_halves_the_scale():
    own, expected = variables(), variables()
    optimiser = Adam(own, [0, 0, 0], scales_loss=True)
    assert float(optimiser.scaled(tf.constant(2.0))) == 2 * FIRST_LOSS_SCALE
    drawn = gradients(2)
    trained(optimiser, [[g * FIRST_LOSS_SCALE for g in step] for step in drawn])
    trained(Adam(expected, [0, 0, 0]), drawn)
    assert_close(own, expected)
    before = values(own)
    assert not optimiser.apply([g * np.inf for g in drawn[0]], RATE, tf.constant(2, tf.int64), TRUE)
    for one, other in zip(before, values(own), strict=True):
        np.testing.assert_array_equal(one, other)
    assert float(optimiser.scaled(tf.constant(2.0))) == FIRST_LOSS_SCALE


def test_the_scale_doubles_after_enough_steps_without_an_overflow():
    optimiser = Adam(variables(), [0, 0, 0], scales_loss=True)
    optimiser.steps_without_overflow.assign(STEPS_TO_DOUBLE - 2)
    for expected in (1, 2, 2):
        trained(optimiser, gradients(1))
        assert float(optimiser.scaled(tf.constant(1.0))) == expected * FIRST_LOSS_SCALE
    optimiser.apply([g * np.nan for g in gradients(1)[0]], RATE, tf.constant(0, tf.int64), TRUE)
    assert int(optimiser.steps_without_overflow) == 0


def rates(numbers, **settings):
    return np.array([float(learning_rate(tf.constant(step, tf.int64), 0.1, **settings)) for step in numbers])


def test_schedules_by_hand():
    steps = np.array([0, 25, 50, 75, 100, 120])
    done = np.minimum(steps / 100, 1)
    np.testing.assert_allclose(rates(steps, schedule="constant", steps=100), 0.1)
    np.testing.assert_allclose(rates(steps, schedule="cosine", steps=100), 0.05 * (1 + np.cos(np.pi * done)), atol=1e-8)
    np.testing.assert_allclose(rates(steps, schedule="polynomial", steps=100), 0.1 * (1 - done) ** 0.9, atol=1e-8)
    stepped = rates([0, 49, 50, 79, 80, 99], schedule="step", steps=100, decay_steps=[50, 80], decay_factor=0.5)
    np.testing.assert_allclose(stepped, [0.1, 0.1, 0.05, 0.05, 0.025, 0.025], rtol=1e-6)


def test_warm_up_rises_to_the_peak_before_the_schedule_begins():
    rising = rates(range(6), schedule="cosine", steps=105, warmup_steps=4)
    np.testing.assert_allclose(rising[:5], [0.02, 0.04, 0.06, 0.08, 0.1], rtol=1e-6)
    assert rising[5] < rising[4]
    assert rates([105], schedule="cosine", steps=105, warmup_steps=4)[0] == pytest.approx(0, abs=1e-9)
