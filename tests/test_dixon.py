"""Separation of water and fat: right over all fat fractions, decays and fields, unbiased by noise, and in chunks."""

import numpy as np
import pytest

from lvseg.phantom import dixon
from lvseg.phantom.physics import fat_phasor
from lvseg.phantom.scanners import FAT_FRACTION, SCANNERS

PROTOCOLS = [scanner.sequence for scanner in SCANNERS.values() if scanner.task == FAT_FRACTION]
FAT_SHARE, R2STAR_PER_S = np.linspace(0, 1, 101), np.linspace(20, 150, 14)
FIELDS_HZ = np.linspace(-90, 90, 7)


def echoes_of(fat_share, r2star_per_s, field_hz, sequence, phase=0.0, size=100.0):
    """The signal model in its plain complex form, complex128 [echoes, ...]."""
    shape = np.broadcast(fat_share, r2star_per_s, field_hz).shape
    times = sequence.echo_times_s.reshape(-1, *(1,) * len(shape))
    phasor = fat_phasor(sequence.echo_times_s, sequence.field_t).reshape(times.shape)
    mixture = size * np.exp(1j * np.asarray(phase)) * ((1 - fat_share) + fat_share * phasor)
    return mixture * np.exp((2j * np.pi * field_hz - r2star_per_s) * times)


def percent(found):
    return 100 * np.abs(found.fat) / (np.abs(found.fat) + np.abs(found.water))


@pytest.mark.parametrize("sequence", PROTOCOLS, ids=lambda sequence: f"{sequence.field_t} T {sequence.echo_times_ms}")
def test_noiseless_echoes_give_the_planted_fat_fraction(sequence):
    share, r2star = FAT_SHARE[:, None, None], R2STAR_PER_S[None, :, None]
    field = FIELDS_HZ * sequence.field_t / 1.5
    phase = np.random.default_rng(1).uniform(0, 2 * np.pi, (len(FAT_SHARE), len(R2STAR_PER_S), len(field)))
    found = dixon.separate(echoes_of(share, r2star, field, sequence, phase), sequence.echo_times_s, sequence.field_t)
    assert np.abs(percent(found) - 100 * share).max() < 0.5
    assert np.abs(found.field_hz - field).max() < 0.5
    assert np.abs(found.r2star_per_s - r2star).max() < 0.5
    np.testing.assert_allclose(found.water + found.fat, 100 * np.exp(1j * phase), atol=0.1)


@pytest.mark.parametrize("sequence", PROTOCOLS, ids=lambda sequence: f"{sequence.field_t} T {sequence.echo_times_ms}")
@pytest.mark.parametrize("error_ppm", [-0.2, 0.2])
def test_a_field_known_up_to_an_error_is_refined(sequence, error_ppm):
    share, r2star = FAT_SHARE[:, None, None], R2STAR_PER_S[None, :, None]
    field = np.broadcast_to(FIELDS_HZ, (len(FAT_SHARE), len(R2STAR_PER_S), len(FIELDS_HZ)))
    guess = field + error_ppm * 42.577 * sequence.field_t
    found = dixon.separate(
        echoes_of(share, r2star, field, sequence), sequence.echo_times_s, sequence.field_t, field_hz=guess
    )
    assert np.abs(percent(found) - 100 * share).max() < 0.5
    # Without refinement the same guess is not good enough.
    taken = dixon.separate(
        echoes_of(share, r2star, field, sequence), sequence.echo_times_s, sequence.field_t, field_hz=guess, steps=0
    )
    assert np.abs(percent(taken) - 100 * share).max() > 2.0


def test_a_field_one_fat_shift_off_swaps_water_and_fat():
    sequence = PROTOCOLS[0]
    shift_hz = 3.4 * 42.577 * sequence.field_t
    echoes = echoes_of(np.array([0.0, 0.03]), 40.0, 0.0, sequence)
    found = dixon.separate(echoes, sequence.echo_times_s, sequence.field_t, field_hz=np.full(2, shift_hz))
    assert np.all(percent(found) > 80)


def test_noise_spreads_the_answers_but_does_not_move_them():
    sequence, draw = PROTOCOLS[1], np.random.default_rng(5)
    truth = np.repeat([[0.05], [0.2], [0.5], [0.9]], 4000, axis=1)
    clean = echoes_of(truth, 45.0, 12.0, sequence)
    noise = draw.normal(0, 1.5, (2, *clean.shape))
    guess = np.full(truth.shape, 20.0)
    found = dixon.separate(clean + noise[0] + 1j * noise[1], sequence.echo_times_s, sequence.field_t, field_hz=guess)
    along = (found.fat / (found.fat + found.water)).real * 100
    assert np.abs(along.mean(axis=1) - 100 * truth[:, 0]).max() < 0.2
    assert np.all((along.std(axis=1) > 0.3) & (along.std(axis=1) < 4))


def test_background_is_not_refined():
    sequence, draw = PROTOCOLS[0], np.random.default_rng(2)
    noise = draw.normal(0, 1.0, (2, 6, 500))
    echoes = noise[0] + 1j * noise[1]
    echoes[:, :50] += echoes_of(np.full(50, 0.1), 40.0, 5.0, sequence)
    found = dixon.separate(
        echoes, sequence.echo_times_s, sequence.field_t, field_hz=np.full(500, 5.0), least_signal=12.0
    )
    assert np.all(found.r2star_per_s[50:] == 0) and np.all(found.r2star_per_s[:50] > 0)
    # Least squares is linear there, so noise without mean stays noise without mean.
    assert abs(found.water[50:].mean()) < 0.2 and abs(found.fat[50:].mean()) < 0.2


def test_a_voxels_answer_does_not_depend_on_the_others():
    sequence, draw = PROTOCOLS[2], np.random.default_rng(3)
    count = dixon.CHUNK + 77
    echoes = echoes_of(draw.uniform(0, 1, count), draw.uniform(20, 120, count), draw.uniform(-50, 50, count), sequence)
    guess = np.zeros(count)
    times, field_t = sequence.echo_times_s, sequence.field_t
    whole = dixon.separate(echoes, times, field_t, field_hz=guess)
    for part in (slice(0, 10), slice(dixon.CHUNK - 5, dixon.CHUNK + 5)):
        alone = dixon.separate(echoes[:, part], times, field_t, field_hz=guess[part])
        np.testing.assert_array_equal(alone.water, whole.water[part])
        np.testing.assert_array_equal(alone.fat, whole.fat[part])
    shaped = dixon.separate(echoes[:, :60].reshape(6, 3, 4, 5), times, field_t, field_hz=guess[:60].reshape(3, 4, 5))
    np.testing.assert_array_equal(shaped.fat, whole.fat[:60].reshape(3, 4, 5))


@pytest.mark.parametrize("times", [[0.001, 0.002], [0.001, 0.002, 0.003]])
def test_echoes_need_a_time_each_and_three_at_least(times):
    with pytest.raises(ValueError, match="3 or more echoes"):
        dixon.separate(np.ones((2, 5), complex), times, 1.5)


def test_turning_and_decay_are_those_of_the_mathematical_functions():
    turns = np.linspace(-3, 3, 10001, dtype=np.float32)
    cosine, sine = dixon.turn(turns)
    angle = 2 * np.pi * turns.astype(np.float64)
    assert np.abs(cosine - np.cos(angle)).max() < 1e-6 and np.abs(sine - np.sin(angle)).max() < 1e-6
    exponent = np.linspace(0, 5, 5001, dtype=np.float32)
    np.testing.assert_allclose(dixon.decay(exponent), np.exp(-exponent.astype(np.float64)), rtol=2e-4)
    assert {cosine.dtype, sine.dtype, dixon.decay(exponent).dtype} == {np.dtype(np.float32)}
