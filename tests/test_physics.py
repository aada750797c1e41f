"""Signal equations against hand arithmetic, the fat spectrum, the field of a sphere, and one patient's tissues."""

import cmath
import math

import numpy as np
import pytest

from lvseg.phantom.anatomy import Tissue
from lvseg.phantom.patients import draw_anatomy
from lvseg.phantom.physics import (
    AVERAGE,
    FAT_AMPLITUDES,
    draw_tissues,
    fat_left_by_suppression,
    fat_phasor,
    field_of_susceptibility_ppm,
    opposed_phase_echo_s,
    spoiled_gradient_echo,
)

PATIENTS = [draw_anatomy(7, number) for number in range(1, 4)]


def test_a_spoiled_gradient_echo_by_hand():
    # E1 = exp(-100/500) = 0.8187308; 0.5 x 0.1812692 / (1 - 0.8660254 x 0.8187308) = 0.0906346 / 0.2909584.
    assert spoiled_gradient_echo(0.5, 0.1, 30.0) == pytest.approx(0.3115037, rel=1e-6)
    assert spoiled_gradient_echo(0.5, 0.1, 30.0, 0.02, 50.0) == pytest.approx(0.3115037 / math.e, rel=1e-6)


def test_the_ernst_angle_gives_most_signal():
    t1_s, repetition_s = 0.6, 0.005
    angles = np.arange(1.0, 40.0, 0.01)
    signal = [float(spoiled_gradient_echo(t1_s, repetition_s, angle)) for angle in angles]
    ernst = math.degrees(math.acos(math.exp(-repetition_s / t1_s)))
    assert angles[np.argmax(signal)] == pytest.approx(ernst, abs=0.02)


def test_a_small_flip_angle_shows_proton_density_and_a_large_one_t1():
    short, long = np.array([0.3, 1.4])
    ratios = [spoiled_gradient_echo(short, 0.007, f) / spoiled_gradient_echo(long, 0.007, f) for f in (0.1, 3, 12, 30)]
    assert ratios[0] == pytest.approx(1.0, abs=2e-3)
    assert np.all(np.diff(ratios) > 0.05) and ratios[-1] < long / short


def test_the_fat_spectrum_is_six_peaks_and_one_at_time_zero():
    assert FAT_AMPLITUDES.sum() == pytest.approx(1.0, abs=1e-12)
    assert fat_phasor(0.0, 3.0) == pytest.approx(1.0)
    peaks = {0.60: 0.047, -0.50: 0.039, -1.95: 0.006, -2.60: 0.120, -3.40: 0.700, -3.80: 0.088}
    for field_t, echo_s in ((1.5, 0.0031), (3.0, 0.00115)):
        expected = sum(
            share * cmath.exp(2j * cmath.pi * ppm * 42.577 * field_t * echo_s) for ppm, share in peaks.items()
        )
        assert fat_phasor(echo_s, field_t) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("field_t", [1.5, 3.0])
def test_fat_opposes_water_and_comes_back_in_phase(field_t):
    opposed = opposed_phase_echo_s(field_t)
    assert opposed == pytest.approx(2.303e-3 * 1.5 / field_t, rel=1e-3)  # 1 / (2 x 3.4 ppm x 63.87 MHz)
    assert fat_phasor(opposed, field_t).real < -0.7
    assert fat_phasor(2 * opposed, field_t).real > 0.7
    # The peaks drift apart, so neither is complete: one peak alone would be exactly -1 and 1.
    assert abs(fat_phasor(opposed, field_t)) < 0.98


def test_fat_suppression_fails_where_the_field_is_off():
    ppm = np.linspace(-4, 4, 801, dtype=np.float32)
    left = fat_left_by_suppression(ppm, 0.09, 1.0)
    assert np.all(left[np.abs(ppm) <= 1.0] == np.float32(0.09))
    assert np.all(left[np.abs(ppm) >= 2.0] == 1.0)
    np.testing.assert_array_equal(left, left[::-1])
    assert np.all(np.diff(left[400:]) >= 0)


def test_the_field_of_a_magnetised_sphere_is_that_of_a_dipole():
    spacing_mm, radius_mm, inside_ppm = (4.0, 5.0, 4.0), 40.0, 9.0
    axes = [spacing * (np.arange(96) - 48) for spacing in spacing_mm]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    distance = np.sqrt(x**2 + y**2 + z**2)
    sphere = np.where(distance < radius_mm, inside_ppm, 0.0)
    field = field_of_susceptibility_ppm(sphere, spacing_mm)
    field -= field[distance > 180].mean()
    # Outside: chi/3 (a/r)^3 (3 cos^2 - 1), with the voxels' own volume for a^3; inside the field stays.
    cubed = sphere.sum() / inside_ppm * np.prod(spacing_mm) * 3 / (4 * np.pi)
    shell = (distance > 1.5 * radius_mm) & (distance < 2.5 * radius_mm)
    expected = inside_ppm / 3 * cubed / distance[shell] ** 3 * (3 * (z[shell] / distance[shell]) ** 2 - 1)
    assert np.abs(field[shell] - expected).max() < 0.05
    assert expected.max() > 1.2 and expected.min() < -0.6
    assert np.abs(field[distance < 0.7 * radius_mm]).max() < 0.15


@pytest.mark.parametrize("patient", PATIENTS)
def test_a_patients_tissues_are_the_same_people_at_both_fields(patient):
    low, high = draw_tissues(patient, 1.5), draw_tissues(patient, 3.0)
    np.testing.assert_array_equal(low.fat_percent, high.fat_percent)
    np.testing.assert_array_equal(low.water + low.fat, high.water + high.fat)
    assert high.water_t1_s[Tissue.LIVER] / low.water_t1_s[Tissue.LIVER] == pytest.approx(809 / 586)
    assert high.water_t1_s[Tissue.SPLEEN] / low.water_t1_s[Tissue.SPLEEN] == pytest.approx(1328 / 1057)
    assert np.all(high.r2star_per_s > 0.9 * low.r2star_per_s)
    between = draw_tissues(patient, 2.25)
    np.testing.assert_allclose(between.water_t1_s, 0.5 * (low.water_t1_s + high.water_t1_s))


@pytest.mark.parametrize("patient", PATIENTS)
def test_fat_fractions_are_the_patients_own(patient):
    percent = draw_tissues(patient, 3.0).fat_percent
    assert percent[Tissue.LIVER] == pytest.approx(patient.liver_fat_percent)
    assert percent[Tissue.FOCAL_FAT] == pytest.approx(patient.focal_fat_percent)
    assert 88 < percent[Tissue.FAT] < 97 and 85 < percent[Tissue.VISCERAL_FAT] < 95
    assert 30 < percent[Tissue.MARROW] < 65 and percent[Tissue.MUSCLE] < 6
    assert np.all(percent[[Tissue.BLOOD, Tissue.SPINAL_FLUID, Tissue.CYST, Tissue.AIR]] == 0)


def test_patients_differ_and_stay_near_the_literature():
    t1_ms = np.array([draw_tissues(patient, 1.5).water_t1_s[Tissue.LIVER] * 1000 for patient in PATIENTS])
    assert len(set(t1_ms)) == len(PATIENTS)
    assert np.all(np.abs(t1_ms - 586) < 0.16 * 586)
    assert set(AVERAGE) == set(Tissue)


def test_blood_is_the_same_in_veins_inside_and_outside_the_liver():
    values = draw_tissues(PATIENTS[0], 3.0)
    veins = [Tissue.VENOUS_BLOOD, Tissue.HEPATIC_VESSEL, Tissue.PORTAL_BLOOD, Tissue.PORTAL_VESSEL]
    for parameter in (values.water, values.water_t1_s, values.r2star_per_s):
        assert len(set(parameter[veins])) == 1
