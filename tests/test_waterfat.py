"""Fat fractions: hand arithmetic, what noise does to them, scales that files state, and swapped water and fat."""

import functools
import itertools
import json
import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage
from scipy import ndimage

from lvseg import preprocess, records, swap, waterfat
from lvseg.errors import InputError
from lvseg.formats import read_volume, write_volume
from lvseg.noise import noise_floor
from lvseg.phantom.anatomy import Tissue
from lvseg.phantom.patients import draw_anatomy
from lvseg.volume import Volume
from lvseg.waterfat import from_in_opposed_phase, from_series, from_water_fat

SPACING_MM = (6.0, 3.0, 3.0)


def volume(voxels, source="", spacing_mm=SPACING_MM, **metadata):
    affine = np.zeros((4, 4))
    affine[[2, 1, 0], [0, 1, 2]] = spacing_mm
    affine[3, 3] = 1
    return Volume(np.ascontiguousarray(voxels), affine, source, metadata)


def told(fraction):
    """The provenance, which has to be JSON."""
    provenance = fraction.metadata["fat_fraction"]
    assert fraction.metadata["units"] == "percent" and fraction.voxels.dtype == np.float32
    assert {"method", "sources", "scale", "noise_floor", "swap", "warnings"} <= set(provenance)
    return json.loads(json.dumps(provenance, allow_nan=False))


def noisy(signal, snr, random, keep_phase=False):
    """A magnitude of signal plus complex noise of standard deviation 1 / snr; or its part along the true phase."""
    noise = random.standard_normal((2, *signal.shape)) / snr
    return np.abs(signal + noise[0]) if keep_phase else np.hypot(signal + noise[0], noise[1])


LEVELS = (0.0, 5.0, 20.0, 50.0, 80.0, 100.0)


def slabs(slices=6, rows=120, columns=150):
    """Water, fat and the planted fractions (NaN in air): a box of tissue in air, one strip a fraction."""
    planted = np.full((slices, rows, columns), np.nan)
    for number, level in enumerate(LEVELS):
        planted[:, 25:-25, 15 + 20 * number : 35 + 20 * number] = level
    inside = np.nan_to_num(planted) / 100
    return np.where(np.isnan(planted), 0.0, 1 - inside), inside, planted


# A patient's water and fat from the map of tissues: relative proton density, and fat fraction where there is some.
DENSITY = {Tissue.AIR: 0.0, Tissue.SKIN: 0.6, Tissue.LUNG: 0.1, Tissue.BONE: 0.1, Tissue.GAS: 0.0}
FAT = {
    Tissue.FAT: 0.93, Tissue.VISCERAL_FAT: 0.88, Tissue.INTERMUSCULAR_FAT: 0.85, Tissue.MARROW: 0.45, Tissue.SKIN: 0.1,
    Tissue.LIVER: 0.06, Tissue.MUSCLE: 0.02,
}  # fmt: skip
PATIENTS = [(31, 1), (31, 2), (31, 3)]


@functools.cache
def patient(seed, number):
    """Water and fat, float64 [10, 110, 150], without noise, each voxel the mean of two samples through the slice."""
    anatomy = draw_anatomy(seed, number)
    z, y, x = ((np.arange(count) - (count - 1) / 2) * step for count, step in ((10, 12.0), (110, 3.0), (150, 3.0)))
    density = np.array([DENSITY.get(tissue, 1.0) for tissue in Tissue])
    fatty = np.array([FAT.get(tissue, 0.0) for tissue in Tissue])
    maps = [anatomy.tissues(x, y, z + offset) for offset in (-3.0, 3.0)]
    return tuple(sum((density * share)[tissues] for tissues in maps) / 2 for share in (1 - fatty, fatty))


def patient_pair(seed, number, snr=25, swapped=np.s_[:0], **noise):
    """The patient's noisy water and fat volumes, int16, with a part of them exchanged."""
    random = np.random.default_rng([seed, number])
    water, fat = (noisy(signal, snr, random, **noise) for signal in patient(seed, number))
    water[swapped], fat[swapped] = fat[swapped].copy(), water[swapped].copy()
    return tuple(volume(np.rint(400 * image).astype(np.int16), spacing_mm=(12.0, 3.0, 3.0)) for image in (water, fat))


# Water and fat images


def test_fractions_by_hand():
    water = volume(np.array([[[3.0, 0.0, 5.0], [0.0, 9.5, 1.0]]]))
    fat = volume(np.array([[[1.0, 5.0, 0.0], [0.0, 0.5, 999.0]]]))
    fraction = from_water_fat(water, fat)
    np.testing.assert_allclose(fraction.voxels, [[[25.0, 100.0, 0.0], [0.0, 5.0, 99.9]]], rtol=1e-6)
    np.testing.assert_array_equal(fraction.affine, water.affine)
    assert told(fraction)["noise_floor"]["measured_in"] == "nothing"


@pytest.mark.parametrize("level", np.linspace(0, 100, 21))
def test_images_without_noise_give_the_planted_fraction(level):
    box = np.zeros((4, 60, 60))
    box[:, 10:50, 10:50] = 1000 * np.linspace(0.4, 1.0, 40)  # uneven coils change nothing
    fraction = from_water_fat(volume(box * (1 - level / 100)), volume(box * level / 100))
    np.testing.assert_allclose(fraction.voxels[box > 0], level, atol=1e-3)
    assert not fraction.voxels[box == 0].any()


def test_even_objects_without_noise_in_air_of_zeros_are_no_air():
    # Of an even object nothing is brighter than the median, and its round edge varies as air does.
    rows, columns = np.mgrid[:96, :128] - np.array([48, 64])[:, None, None]
    check_planted(1000.0 * (np.hypot(rows / 40, columns / 56) < 1), np.full(rows.shape, 10.0))
    # Tubes too thin for a block of their own, blurred, have edges alone.
    discs = np.hypot(np.mod(rows, 32) - 16, np.mod(columns, 32) - 16) <= 3
    check_planted(1000 * ndimage.gaussian_filter(discs.astype(float), 1), np.floor_divide(columns + 64, 32) * 30.0)


def check_planted(total, planted):
    pair = [np.repeat((total * share)[None], 8, 0) for share in (1 - planted / 100, planted / 100)]
    fraction = from_water_fat(*(volume(image.astype(np.float32)) for image in pair))
    inside = pair[0] + pair[1] > 0
    np.testing.assert_allclose(fraction.voxels[inside], np.broadcast_to(planted, inside.shape)[inside], atol=1e-3)
    assert not fraction.voxels[~inside].any()


def test_one_image_given_twice_is_told():
    image = volume(np.rint(400 * noisy(slabs(2)[0], 20, np.random.default_rng(3))))
    for make in (from_water_fat, from_in_opposed_phase):
        assert any("the same, voxel for voxel" in warning for warning in told(make(image, image))["warnings"])


@settings(max_examples=15, deadline=None)
@given(factor=st.floats(1e-3, 1e3))
def test_the_unit_of_both_images_does_not_matter(factor):
    random = np.random.default_rng(0)
    water, fat = (noisy(signal, 20, random).astype(np.float32) for signal in slabs(2)[:2])
    before = from_water_fat(volume(water), volume(fat)).voxels
    after = from_water_fat(volume(water * np.float32(factor)), volume(fat * np.float32(factor))).voxels
    close = np.isclose(before, after, atol=1e-3)
    assert np.mean(~close) < 1e-4  # a voxel at the very threshold may round to the other side


def test_orientation_of_either_file_does_not_matter():
    random = np.random.default_rng(1)
    water, fat = (volume(noisy(signal[:, 3:, 4:], 20, random)) for signal in slabs(3, 80)[:2])
    expected = from_water_fat(water, fat)
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        turned = []
        for image in (water, fat):
            voxels = image.voxels.transpose(order)[tuple(slice(None, None, sign) for sign in signs)]
            affine = image.affine.copy()
            affine[:3, :3] = image.affine[:3, list(order)] * signs
            first = [0 if signs[order.index(axis)] > 0 else image.shape[axis] - 1 for axis in range(3)]
            affine[:3, 3] = image.world_mm(first)
            turned.append(Volume(voxels, affine))
        np.testing.assert_array_equal(from_water_fat(water, turned[1]).voxels, expected.voxels)
        both = from_water_fat(turned[0], fat)
        np.testing.assert_array_equal(both.canonical().voxels, expected.canonical().voxels)
        np.testing.assert_array_equal(both.affine, turned[0].affine)


def test_images_on_two_grids_are_refused_by_name():
    box = np.ones((2, 4, 4))
    for other in (volume(box[:, :3], "f.nii"), volume(box, "f.nii", (6.0, 3.0, 3.1))):
        with pytest.raises(InputError, match=r"w\.nii.*f\.nii") as error:
            from_water_fat(volume(box, "w.nii"), other)
        assert error.value.code == "GEOMETRY_MISMATCH"


@pytest.mark.parametrize("snr", [10, 20, 40])
def test_air_is_zero_and_tissue_is_off_by_what_noise_does_to_magnitudes(snr):
    random = np.random.default_rng(snr)
    water, fat, planted = slabs()
    pair = [volume(np.rint(noisy(signal, snr, random) * 4000).astype(np.int16)) for signal in (water, fat)]
    plain, corrected = from_water_fat(*pair), from_water_fat(*pair, remove_noise_bias=True)
    floor = told(plain)["noise_floor"]
    assert floor["measured_in"] == "air" and floor["magnitudes"]
    np.testing.assert_allclose(floor["sds"], 4000 / snr, rtol=0.03)
    for fraction in (plain, corrected):
        assert np.mean(fraction.voxels[np.isnan(planted)] != 0) < 2e-3
    for level in LEVELS:
        bias = plain.voxels[planted == level].mean() - level
        left = corrected.voxels[planted == level].mean() - level
        if level in (0, 100):
            # A magnitude of no signal is sqrt(pi / 2) / snr, beside a signal of 1.
            nothing = 1.2533 / snr
            assert abs(bias) == pytest.approx(100 * nothing / (1 + nothing), rel=0.08)
            assert abs(left) < 0.55 * abs(bias)
        elif min(level, 100 - level) * snr >= 100:  # the weaker signal is at least as strong as the noise
            assert abs(bias) < 60 / snr and abs(left) < 25 / snr
        else:
            assert 0 < bias < 100 * 1.2533 / snr and abs(left) < 0.55 * bias
    assert floor["bias_at_zero_fat_percent"] == pytest.approx(100 * 1.2533 / snr / 1.1, rel=0.15)
    assert any("noise lifts" in warning for warning in told(plain)["warnings"])


def test_an_image_of_nothing_but_fat_is_100_percent():
    random = np.random.default_rng(4)
    fat = np.zeros((4, 80, 80))
    fat[:, 20:60, 20:60] = 1.0
    fraction = from_water_fat(volume(noisy(0 * fat, 100, random)), volume(noisy(fat, 100, random)))
    assert fraction.voxels[fat > 0].min() > 94 and np.mean(fraction.voxels[fat == 0] != 0) < 3e-3


@pytest.mark.parametrize("snr", [6, 25])
@pytest.mark.parametrize("case", ["air", "little air", "masked", "phase kept", "half masked"])
def test_noise_is_measured_in_air_in_tissue_and_in_phase_sensitive_images(case, snr):
    random = np.random.default_rng(5)
    water, fat, planted = slabs(10)
    pair = [noisy(signal, snr, random, case == "phase kept") for signal in (water, fat)]
    air = np.isnan(planted)
    if case == "masked":
        pair = [np.where(air, 0, image) for image in pair]
    if case == "half masked":  # a scanner's corner without data, and air elsewhere
        pair = [np.where(air & (np.arange(150) < 75), 0, image) for image in pair]
    if case == "little air":
        pair = [image[:, 20:-20, 12:-12] for image in pair]
        planted, air = planted[:, 20:-20, 12:-12], air[:, 20:-20, 12:-12]
    floor = noise_floor(*pair)
    assert floor.measured_in == ("tissue" if case == "masked" else "air")
    assert floor.magnitudes is {"masked": None, "phase kept": False}.get(case, True)
    np.testing.assert_allclose(floor.sds, 1 / snr, rtol=0.1)
    signal = floor.signal(*pair)
    pure = (planted == 0) | (planted == 100)  # at equal parts of water and fat the root of the squares is 0.7
    assert signal[pure].mean() > 0.975 and (snr == 6 or signal[~air].mean() > 0.9999)
    assert signal[air].mean() < (0.01 if case == "phase kept" else 0.003)


@pytest.mark.parametrize("number", PATIENTS)
def test_a_patient_without_air_in_view_keeps_the_tissue(number):
    """The scanner set the air to zero, and organs are full of edges, which are no noise."""
    tissue = sum(patient(*number)) > 0.2
    pair = [np.where(tissue, image.voxels, 0) for image in patient_pair(*number)]
    floor = noise_floor(*(image.astype(np.float64) for image in pair))
    assert floor.measured_in == "tissue" and floor.sds[0] == pytest.approx(400 / 25, rel=0.25)
    kept = from_water_fat(*(volume(image) for image in pair)).voxels > 0
    assert kept[tissue].mean() > 0.99


def test_air_of_interpolated_images_is_air():
    """Filled up with zeros in the frequencies, as scanners do, neighbours share their noise."""
    random = np.random.default_rng(11)
    pair = []
    for signal in slabs(6, 100, 150)[:2]:
        noise = random.standard_normal((2, *signal.shape)) / 20
        spectrum = np.fft.fftshift(np.fft.fft2(signal + noise[0] + 1j * noise[1]), axes=(1, 2))
        padded = np.pad(spectrum, ((0, 0), (50, 50), (75, 75)))
        pair.append(4 * np.abs(np.fft.ifft2(np.fft.ifftshift(padded, axes=(1, 2)))))
    floor = noise_floor(*pair)
    assert floor.measured_in == "air" and floor.magnitudes
    np.testing.assert_allclose(floor.sds, 1 / 20, rtol=0.05)


def test_liver_at_six_times_the_noise_survives():
    random = np.random.default_rng(6)
    water = np.zeros((6, 120, 120))
    water[:, 20:100, 20:100] = np.linspace(1.0, 0.06, 80)  # coils fall off towards the right; noise is 0.01
    pair = [volume(noisy(signal, 100, random)) for signal in (0.95 * water, 0.05 * water)]
    kept = from_water_fat(*pair).voxels > 0
    assert kept[:, 20:100, 95:100].mean() > 0.985 and kept[:, 20:100, 20:95].mean() > 0.999


def test_what_counts_as_signal_is_a_rule_of_each_voxel_by_itself():
    random = np.random.default_rng(7)
    pair = [noisy(signal, 15, random) for signal in slabs(2)[:2]]
    floor = noise_floor(*pair)
    order = random.permutation(pair[0].size)
    shuffled = floor.signal(*(image.ravel()[order] for image in pair))
    np.testing.assert_array_equal(shuffled, floor.signal(*pair).ravel()[order])


def test_values_below_zero_are_noise_or_refused():
    water, fat, planted = slabs(2)
    pair = [volume(signal + np.random.default_rng(8).normal(0, 0.02, signal.shape), "x.nii") for signal in (water, fat)]
    fraction = from_water_fat(*pair)
    assert fraction.voxels.min() == 0 and fraction.voxels.max() == 100
    assert abs(fraction.voxels[planted == 20].mean() - 20) < 0.2
    # Half of the noise about 0 % and about 100 % lies outside.
    ends = np.count_nonzero((planted == 0) | (planted == 100))
    assert told(fraction)["clipped_voxels"] == pytest.approx(ends / 2, rel=0.1)
    with pytest.raises(InputError, match=r"x\.nii") as error:
        from_water_fat(volume(water), volume(fat - 0.5, "x.nii"))
    assert error.value.code == "BAD_VALUES"


def test_bias_is_not_taken_off_images_that_have_none():
    random = np.random.default_rng(9)
    pair = [volume(noisy(signal, 20, random, keep_phase=True)) for signal in slabs(3)[:2]]
    with pytest.raises(InputError, match="phase-sensitive"):
        from_water_fat(*pair, remove_noise_bias=True)


def test_noise_that_cannot_be_measured_has_no_bias_to_state_or_to_take_off():
    random = np.random.default_rng(10)
    pair = [
        volume(noisy(np.full((1, 12, 12), signal), 30, random), name) for signal, name in ((0.95, "w.nii"), (0.05, ""))
    ]
    floor = told(from_water_fat(*pair))["noise_floor"]
    assert floor["measured_in"] == "nothing" and floor["bias_at_zero_fat_percent"] is None
    with pytest.raises(InputError, match=r"noise can be measured .* in w\.nii"):
        from_water_fat(*pair, remove_noise_bias=True)


def test_fat_on_another_scale_than_water_is_noticed():
    water, fat = patient_pair(*PATIENTS[0])
    assert not any("scales" in warning for warning in told(from_water_fat(water, fat))["warnings"])
    quarter = from_water_fat(water, fat.with_voxels(fat.voxels / 4))
    assert any("different scales" in warning for warning in told(quarter)["warnings"])


def test_files_that_call_themselves_the_other_one_are_noticed():
    box = np.ones((1, 2, 2))
    water, fat = volume(box, image_type=["DERIVED", "FAT"]), volume(box, image_type=["DERIVED", "WATER"])
    provenance = told(from_water_fat(water, fat))
    assert provenance["swap"]["suspected"] and provenance["swap"]["decided_by"] == "image type"
    assert any("ImageType" in warning for warning in provenance["warnings"])
    assert not told(from_water_fat(fat, water))["swap"]["suspected"]


# In phase and opposed phase


def phases(water, fat, echoes=(None, None), field_t=1.5):
    return [
        volume(signal, echo_times_ms=[] if echo is None else [echo], field_strength_t=field_t)
        for signal, echo in zip((water + fat, np.abs(water - fat)), echoes, strict=True)
    ]


def test_phases_by_hand_and_their_ambiguity():
    water, fat = np.array([[[100.0, 70.0, 50.0, 20.0, 0.0]]]), np.array([[[0.0, 30.0, 50.0, 80.0, 100.0]]])
    fraction = from_in_opposed_phase(*phases(water, fat))
    np.testing.assert_allclose(fraction.voxels, [[[0.0, 30.0, 50.0, 20.0, 0.0]]], atol=1e-5)
    assert "50 %" in told(fraction)["ambiguity"]


@pytest.mark.parametrize("opposed_first", [True, False])
def test_the_decay_between_the_echoes_is_undone_where_t2star_is_known(opposed_first):
    times_ms = (4.6, 2.3) if opposed_first else (4.6, 6.9)
    in_phase, opposed = phases(np.full((1, 2, 2), 70.0), np.full((1, 2, 2), 30.0), times_ms)
    pair = [
        image.with_voxels(image.voxels * math.exp(-time / 20))
        for image, time in zip((in_phase, opposed), times_ms, strict=True)
    ]
    np.testing.assert_allclose(from_in_opposed_phase(*pair, t2star_ms=20.0).voxels, 30.0, atol=1e-4)
    left = from_in_opposed_phase(*pair)
    # (1 - 0.4 exp(2.3 / 20)) / 2, and exp(-2.3 / 20) with the opposed echo last
    np.testing.assert_allclose(left.voxels, 27.563 if opposed_first else 32.172, atol=1e-3)
    assert ("too low" in told(left)["t2star_bias"]) and told(left)["t2star_ms"] is None
    with pytest.raises(InputError, match="echo time"):
        from_in_opposed_phase(*phases(np.ones((1, 2, 2)), np.ones((1, 2, 2))), t2star_ms=20.0)


@pytest.mark.parametrize(
    ("field_t", "in_ms", "opposed_ms", "suspected", "word"),
    [
        (1.5, 4.6, 2.3, False, None),
        (1.5, 4.76, 2.38, False, None),
        (3.0, 2.3, 1.15, False, None),
        (3.0, 2.45, 3.55, False, None),
        (1.5, 2.3, 4.6, True, "swapped"),
        (3.0, 1.2, 2.4, True, "swapped"),
        (1.5, 3.45, 2.3, False, "neither"),
    ],
)
def test_echo_times_tell_the_phase(field_t, in_ms, opposed_ms, suspected, word):
    images = phases(np.full((1, 2, 2), 70.0), np.full((1, 2, 2), 30.0), (in_ms, opposed_ms), field_t)
    provenance = told(from_in_opposed_phase(*images))
    assert provenance["swap"]["suspected"] == suspected
    assert provenance["warnings"] == [] if word is None else any(word in text for text in provenance["warnings"])


@pytest.mark.parametrize("number", PATIENTS)
def test_swapped_phases_are_noticed_by_where_water_and_fat_cancel(number):
    random = np.random.default_rng(number)
    water, fat = patient(*number)
    # The in-phase echo comes second and has decayed, so it is darker than the opposed one in lean tissue.
    in_phase = volume(noisy(0.91 * (water + fat), 30, random))
    opposed = volume(noisy(np.abs(water - fat), 30, random))
    assert not told(from_in_opposed_phase(in_phase, opposed))["swap"]["suspected"]
    swapped = told(from_in_opposed_phase(opposed, in_phase))
    assert swapped["swap"]["suspected"] and any("look swapped" in warning for warning in swapped["warnings"])


# Series as the scanner made them


def series(factor, random=None, **metadata):
    """A patient's fat fraction in air of zeros, stored as percent / factor."""
    water, fat = patient(*PATIENTS[0])
    total = water + fat
    percent = np.where(total > 0.1, 100 * fat / np.maximum(total, 0.1), 0.0)
    return volume(percent / factor, "ff.nii.gz", (12.0, 3.0, 3.0), **metadata), percent


@pytest.mark.parametrize(
    ("factor", "metadata", "found"),
    [
        (1.0, {}, "range"),
        (100.0, {}, "range"),
        (0.1, {}, "range"),
        (1.0, {"units": "%"}, "unit"),
        (1.0, {"units": "% / Percent"}, "unit"),
        (1.0, {"units": "", "rescale_type": "PCT"}, "unit"),
        (100.0, {"units": "fraction"}, "unit"),
        (0.1, {"units": "10*-3"}, "unit"),
        (0.1, {"units": "[ppth]", "rescale_type": "US"}, "unit"),
        (0.1, {"units": "1"}, "range"),
        (1.0, {"rescale_type": "normalized"}, "range"),
    ],
)
def test_the_scale_of_a_series_is_found(factor, metadata, found):
    stored, percent = series(factor, **metadata)
    fraction = from_series(stored)
    np.testing.assert_allclose(fraction.voxels, percent, atol=1e-3)
    provenance = told(fraction)
    assert provenance["scale"]["percent_per_unit"] == factor and provenance["scale"]["from"].startswith(found)
    assert not provenance["swap"]["suspected"]
    assert bool(provenance["warnings"]) == (found == "range" and factor != 1.0)
    assert from_series(fraction) is fraction


def test_a_given_scale_goes_before_everything():
    stored, percent = series(0.25)
    with pytest.raises(InputError, match=r"ff\.nii\.gz.*scale"):
        from_series(stored)
    np.testing.assert_allclose(from_series(stored, scale=0.25).voxels, percent, atol=1e-3)
    assert told(from_series(stored, scale=0.25))["scale"]["from"] == "given"
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="above 0"):
            from_series(stored, scale=bad)


@pytest.mark.parametrize(
    ("factor", "metadata", "word"),
    [
        (0.1, {"units": "%"}, "scale"),  # says percent and holds up to 930
        (1.0, {"units": "fraction"}, "scale"),
        (1.0, {"rescale_type": "HU"}, "hu"),
        (1.0, {"units": "ms"}, "ms"),
        (5.0, {}, "without a unit"),
        (0.4, {}, "without a unit"),
        (0.01, {}, "without a unit"),
        (0.1, {"image_type": ["DERIVED", "WATER"]}, "WATER"),
    ],
)
def test_a_scale_that_cannot_be_known_is_refused(factor, metadata, word):
    with pytest.raises(InputError, match=word) as error:
        from_series(series(factor, **metadata)[0])
    assert error.value.code == "UNKNOWN_SCALE" and "ff.nii.gz" in error.value.sentence


def test_a_mask_is_no_fraction():
    mask = (series(1.0)[1] > 50).astype(np.uint8)
    with pytest.raises(InputError, match="without a unit"):
        from_series(volume(mask))


def test_values_outside_0_to_100_are_clipped_and_counted():
    stored, percent = series(1.0, units="%")
    beyond = percent.copy()
    beyond[0, 0, :5], beyond[0, 1, :3] = -7.5, 108.0
    fraction = from_series(stored.with_voxels(beyond))
    assert told(fraction)["clipped_voxels"] == 8
    assert not fraction.voxels[0, 0, :5].any() and (fraction.voxels[0, 1, :3] == 100).all()
    assert told(fraction)["scale"]["lowest_value"] == -7.5 and told(fraction)["scale"]["highest_value"] == 108.0


def test_a_series_without_any_fat_is_told():
    assert any("scale may be wrong" in text for text in told(from_series(series(100.0)[0], scale=1.0))["warnings"])


def write_dicom(folder, stacks):
    """One series in a folder, a stack an ImageType word: {word: (stored uint16, more keywords)}."""
    folder.mkdir()
    for number, (word, (stored, more)) in enumerate(stacks.items()):
        for index, plane in enumerate(stored):
            dataset = Dataset()
            dataset.file_meta = FileMetaDataset()
            dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = MRImageStorage
            uid = UID(f"1.2.826.0.1.3680043.8.498.7.{number}.{index}")
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
            dataset.StudyInstanceUID = dataset.SeriesInstanceUID = UID("1.2.826.0.1.3680043.8.498.7")
            dataset.Modality, dataset.SeriesNumber, dataset.ImageType = "MR", 12, ["DERIVED", "PRIMARY", word]
            dataset.ImageOrientationPatient, dataset.PixelSpacing = [1, 0, 0, 0, 1, 0], [3, 3]
            dataset.ImagePositionPatient, dataset.SliceThickness = [0, 0, 12 * index], 12
            dataset.Rows, dataset.Columns = plane.shape
            dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = (
                1,
                "MONOCHROME2",
                0,
            )
            dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
            for keyword, value in more.items():
                setattr(dataset, keyword, value)
            dataset.PixelData = plane.astype("<u2").tobytes()
            dataset.save_as(folder / f"{word}{index}.dcm", enforce_file_format=True)
    return folder


def mapping(slope, intercept, unit):
    """A real world value mapping with a unit of UCUM."""
    code, item = Dataset(), Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = unit, "UCUM", "Percent"
    item.RealWorldValueSlope, item.RealWorldValueIntercept, item.LUTLabel = slope, intercept, "FF"
    item.RealWorldValueFirstValueMapped, item.RealWorldValueLastValueMapped = 0, 65535
    item.MeasurementUnitsCodeSequence = [code]
    return [item]


@pytest.mark.parametrize(
    ("slope", "intercept", "more", "found"),
    [
        (0.1, 0, {"RealWorldValueMappingSequence": mapping(0.1, 0, "%")}, "unit"),
        (0.05, -10, {"RealWorldValueMappingSequence": mapping(0.05, -10, "%"), "RescaleType": "US"}, "unit"),
        (0.05, -10, {"RescaleType": "PCT"}, "unit"),
        (0.1, 0, {}, "range"),
        (1, 0, {}, "range"),
    ],
)
def test_a_dicom_series_is_scaled_by_its_own_fields(tmp_path, slope, intercept, more, found):
    percent = series(1.0)[1]
    # The file without slope holds tenths of a percent; what it says of them is nothing.
    stored = np.rint((percent - intercept) / (0.1 if slope == 1 else slope))
    more = {**more, "RescaleSlope": slope, "RescaleIntercept": intercept}
    fraction = from_series(read_volume(write_dicom(tmp_path / "ff", {"FF": (stored, more)})))
    np.testing.assert_allclose(fraction.voxels, percent, atol=0.06)
    assert told(fraction)["scale"]["from"].startswith(found)
    again = from_series(fraction.with_voxels(fraction.voxels, units="", fat_fraction=None))
    np.testing.assert_allclose(again.voxels, percent, atol=0.06)


def test_a_mapping_to_percent_that_is_not_the_rescaling_is_not_passed_over(tmp_path):
    stored = np.rint(series(1.0)[1] / 0.8)
    more = {"RealWorldValueMappingSequence": mapping(0.8, 0, "%")}
    scan = read_volume(write_dicom(tmp_path / "ff", {"FF": (stored, more)}))
    with pytest.raises(InputError, match=r"mapping to '%' of another slope and intercept \(0.8, 0\)") as error:
        from_series(scan)
    assert error.value.code == "UNKNOWN_SCALE"
    np.testing.assert_allclose(from_series(scan, 0.8).voxels, stored * 0.8, atol=1e-3)


def test_a_mapping_to_percent_by_a_table_is_not_passed_over(tmp_path):
    """The table says tenths of a percent, the range of the stored values percent."""
    [item] = mapping(0.1, 0, "%")
    del item.RealWorldValueSlope, item.RealWorldValueIntercept
    item.RealWorldValueFirstValueMapped, item.RealWorldValueLastValueMapped = 0, 100
    item.RealWorldValueLUTData = [value / 10 for value in range(101)]
    stored = np.rint(series(1.0)[1])
    scan = read_volume(write_dicom(tmp_path / "ff", {"FF": (stored, {"RealWorldValueMappingSequence": [item]})}))
    with pytest.raises(InputError, match="mapping to '%' of a table") as error:
        from_series(scan)
    assert error.value.code == "UNKNOWN_SCALE"
    assert told(from_series(scan, 0.1))["scale"]["percent_per_unit"] == 0.1


@pytest.mark.parametrize(
    ("word", "description", "known"),
    [("M", "t1 vibe", False), ("M", "q-dixon_PDFF", True), ("M", "liver FF", True), ("M", "off", False),
     ("FAT_FRACTION", "t1 vibe", True), ("W", "t1 vibe", False)],
)  # fmt: skip
def test_a_dicom_image_up_to_1000_has_to_call_itself_a_fat_fraction(tmp_path, word, description, known):
    stored = np.rint(10 * series(1.0)[1])
    folder = write_dicom(tmp_path / "ff", {word: (stored, {"SeriesDescription": description})})
    if known:
        np.testing.assert_allclose(from_series(read_volume(folder)).voxels, stored / 10, atol=1e-3)
        return
    with pytest.raises(InputError, match="fat fraction") as error:
        from_series(read_volume(folder))
    assert error.value.code == "UNKNOWN_SCALE"


def test_water_and_fat_are_stacks_of_one_dicom_series(tmp_path):
    water, fat = patient_pair(*PATIENTS[0])
    folder = write_dicom(tmp_path / "dixon", {"W": (water.voxels, {}), "F": (fat.voxels, {})})
    choice = ["--water", folder, "--water-series", "12/W", "--fat", folder, "--fat-series", "12/F"]
    assert run(*choice, "-o", tmp_path / "ff.nii.gz") == 0
    np.testing.assert_allclose(read_volume(tmp_path / "ff.nii.gz").voxels, from_water_fat(water, fat).voxels, atol=1e-4)
    provenance = json.loads((tmp_path / "ff.json").read_text())
    assert provenance["sources"]["fat"]["image_type"][-1] == "F" and not provenance["swap"]["suspected"]


# Swapped water and fat


@pytest.mark.parametrize("number", PATIENTS)
@pytest.mark.parametrize("keep_phase", [False, True])
def test_a_swapped_pair_is_noticed_and_a_right_one_is_not(number, keep_phase):
    water, fat = patient_pair(*number, keep_phase=keep_phase)
    right, wrong = told(from_water_fat(water, fat)), told(from_water_fat(fat, water))
    assert not right["swap"]["suspected"] and right["swap"]["decided_by"] == "whole body"
    assert right["swap"]["rim_fat_percent"] > 80 and right["swap"]["interior_fat_percent"] < 50
    assert not any("look swapped" in warning for warning in right["warnings"])
    assert wrong["swap"]["suspected"] and wrong["swap"]["rim_fat_percent"] < 20
    assert any("water and fat look swapped" in warning for warning in wrong["warnings"])


@pytest.mark.parametrize("number", PATIENTS)
def test_a_swap_turns_the_sign_of_what_decides_and_changes_nothing_else(number):
    water, fat = (image.voxels.astype(np.float64) for image in patient_pair(*number))
    percent = 100 * fat / np.maximum(water + fat, 1) + 1e-4  # off the exact middle, where fatty is undecided
    signal = sum(patient(*number)) > 0.1
    right, wrong = (swap.check_swap(volume(voxels), signal) for voxels in (percent, 100 - percent))
    assert right["difference"] == -wrong["difference"] > 0.3
    assert right["rim_fat_percent"] + wrong["rim_fat_percent"] == pytest.approx(100, abs=0.02)


@pytest.mark.parametrize("number", PATIENTS)
@pytest.mark.parametrize("air", ["zeros", "noise"])
def test_a_swapped_series_is_noticed_without_water_and_fat(number, air):
    water, fat = (image.voxels.astype(np.float64) for image in patient_pair(*number))
    percent = 100 * fat / np.maximum(water + fat, 1)
    wrong = 100 - percent
    if air == "zeros":
        for fraction in (percent, wrong):
            fraction[sum(patient(*number)) < 0.1] = 0
    for voxels, suspected in ((percent, False), (wrong, True)):
        found = from_series(volume(voxels, spacing_mm=(12.0, 3.0, 3.0)), scale=1.0)
        assert told(found)["swap"]["suspected"] == suspected


@pytest.mark.parametrize("number", PATIENTS)
def test_a_swap_of_some_slices_or_one_side_is_noticed_there(number):
    some = told(from_water_fat(*patient_pair(*number, swapped=np.s_[3:6])))
    assert some["swap"]["suspected"] and some["swap"]["slices"] == [3, 4, 5]
    assert any("slices 4-6" in warning for warning in some["warnings"])
    side = told(from_water_fat(*patient_pair(*number, swapped=np.s_[2:7, :, :75])))
    assert side["swap"]["suspected"] and set(side["swap"]["slices"]) <= {2, 3, 4, 5, 6}
    assert side["swap"]["side"] == "right" and "right side" in " ".join(side["warnings"])


def test_a_body_that_the_image_cuts_is_judged_by_the_rim_in_view():
    water, fat = (image.voxels[:, :, 30:-30] for image in patient_pair(*PATIENTS[1]))
    pair = [volume(image, spacing_mm=(12.0, 3.0, 3.0)) for image in (water, fat)]
    assert not told(from_water_fat(*pair))["swap"]["suspected"]
    assert told(from_water_fat(*pair[::-1]))["swap"]["suspected"]


def test_where_there_is_no_rim_it_says_that_it_could_not_look():
    inside = np.full((4, 40, 40), 30.0)
    found = swap.check_swap(volume(inside), np.ones(inside.shape, bool))
    assert not found["suspected"] and found["decided_by"] == "nothing" and found["difference"] is None
    assert "could not be checked" in swap.warnings_of(found)[0]


def test_the_sides_are_the_patients_own_in_any_orientation():
    water, fat = patient_pair(*PATIENTS[0], swapped=np.s_[2:7, :, 75:])  # canonical columns run to the left
    turned = []
    for image in (water, fat):
        affine = image.affine.copy()
        affine[:3, 3] = image.world_mm((9, 0, 149))
        affine[:, [0, 2]] *= -1
        turned.append(Volume(image.voxels[::-1, :, ::-1], affine))
    for pair in ((water, fat), turned):
        found = told(from_water_fat(*pair))["swap"]
        assert found["side"] == "left" and set(found["slices"]) <= {2, 3, 4, 5, 6}


# Measurements, shards, the command


def test_fat_inside_a_mask_by_hand():
    fraction = volume(np.array([[[1.0, 2.0, 6.0, 50.0]]]))
    mask = volume(np.array([[[1, 1, 1, 2]]], np.uint8))
    inside = waterfat.fat_fraction_percent(fraction, mask)
    assert (inside["mean"], inside["median"]) == (3.0, 2.0)
    assert inside["sd"] == pytest.approx(math.sqrt((4 + 1 + 9) / 3))
    assert waterfat.fat_fraction_percent(fraction, mask, 3) == {"mean": None, "median": None, "sd": None}


@settings(max_examples=40, deadline=None)
@given(
    image=arrays.arrays(np.float32, (2, 8, 8), elements=st.floats(-1, 1, width=32, allow_subnormal=False)),
    low=st.sampled_from([0.0, -1000.0, 3.7, 2e4]),
    width=st.sampled_from([100.0, 1e-2, 4096.0]),
)
def test_shards_keep_intensities_to_half_a_step_of_16_bits(image, low, width):
    """At most range / 131,070 beside float32's own rounding: 0.0008 points of a fat fraction from 0 to 100 %."""
    image = (low + (image + 1) / 2 * np.float32(width)).astype(np.float32)
    statistics = preprocess.statistics(tf.constant(image))
    whole = records.Harmonised("p", "1", "s", "d", (), "", image.shape, (1.0, 1.0, 1.0), statistics, image,
                               np.zeros(image.shape, np.uint8), None)  # fmt: skip
    shard = records.decode(tf.constant(records.encode(whole)), image.shape[1])
    back = shard.image.numpy().astype(np.float64) * float(shard.slope) + float(shard.intercept)
    span = float(np.ptp(image))
    rounding = np.finfo(np.float32).eps * (span + np.abs(image).max())
    assert np.abs(back - image).max() <= span / 131070 + rounding
    assert span / 131070 < 1e-4 * span or span == 0


def run(*arguments):
    return waterfat.main([str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path):
    names = {}
    for name, image in zip(("water", "fat"), patient_pair(*PATIENTS[0]), strict=True):
        names[name] = write_volume(image, tmp_path / f"{name}.nii.gz")[0]
    return names


def test_the_command_writes_the_fraction_and_its_provenance(files, tmp_path, capsys):
    out = tmp_path / "sub/fraction.nii.gz"
    assert run("--water", files["water"], "--fat", files["fat"], "-o", out) == 0
    expected = from_water_fat(read_volume(files["water"]), read_volume(files["fat"]))
    written = read_volume(out)
    np.testing.assert_allclose(written.voxels, expected.voxels, atol=1e-4)
    np.testing.assert_allclose(written.affine, expected.affine, atol=1e-5)
    assert json.loads((out.parent / "fraction.json").read_text()) == told(expected)
    capsys.readouterr()
    assert run("--water", files["fat"], "--fat", files["water"], "-o", out) == 0
    assert "water and fat look swapped" in capsys.readouterr().err
    again = tmp_path / "again.nii.gz"
    assert run("--series", out, "--scale", "1", "-o", again) == 0
    np.testing.assert_allclose(read_volume(again).voxels, read_volume(out).voxels, atol=1e-4)
    assert run("--in-phase", files["water"], "--opposed-phase", files["fat"], "-o", again) == 0


def test_a_series_whose_two_units_contradict_each_other_is_refused():
    values = np.linspace(0, 40, 4 * 20 * 20).reshape(4, 20, 20).astype(np.float32)
    for stated, found in (({"units": "mm2/s", "rescale_type": "PCT"}, "unit 'pct'"),
                          ({"units": "%", "rescale_type": "PCT"}, "unit '%'")):  # fmt: skip
        provenance = from_series(Volume(values, np.eye(4), metadata=stated)).metadata["fat_fraction"]
        assert provenance["scale"]["from"] == found
    with pytest.raises(InputError, match="Expected one unit, received '%' and 'fraction'") as error:
        from_series(Volume(values, np.eye(4), metadata={"units": "%", "rescale_type": "fraction"}))
    assert error.value.code == "UNKNOWN_SCALE"


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and "Example: python -m lvseg.waterfat --water" in said


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["-o", "o.nii.gz"], "none of them"),
        (["--water", "water.nii.gz", "-o", "o.nii.gz"], "--fat"),
        (["--water", "water.nii.gz", "--opposed-phase", "fat.nii.gz", "-o", "o.nii.gz"], "--in-phase"),
        (["--water", "water.nii.gz", "--fat", "fat.nii.gz", "--series", "fat.nii.gz", "-o", "o.nii.gz"], "--series"),
        (["--water", "water.nii.gz", "--fat", "gone.nii.gz", "-o", "o.nii.gz"], "gone.nii.gz"),
        (["--water", "water.nii.gz", "--fat", "x/../water.nii.gz", "-o", "o.nii.gz"], "the same"),
        (["--water", "water.nii.gz", "--fat", "fat.nii.gz", "-o", "water.nii.gz"], "an input's own"),
        (["--water", "water.nii.gz", "--fat", "fat.nii.gz", "-o", "x/../fat.nii.gz"], "an input's own"),
        (["--water", "water.nii.gz", "--fat", "fat.nii.gz", "-o", "water.mha"], "water.json"),
        (["--series", "header.mhd", "-o", "voxels.mha"], "an input's own"),
        (["--water", "water.nii.gz", "--fat", "fat.nii.gz", "-o", "x"], "x"),
        (["--water", "water.nii.gz", "--fat", "fat.nii.gz", "-o", "o.png"], "o.png"),
        (["--water", "water.nii.gz", "--fat", "fat.nii.gz", "--scale", "2", "-o", "o.nii.gz"], "scale"),
        (["--series", "fat.nii.gz", "--remove-noise-bias", "-o", "o.nii.gz"], "remove_noise_bias"),
        (["--series", "water.nii.gz", "-o", "o.nii.gz", "--fat-series", "3"], "--fat"),
    ],
)
def test_wrong_use_is_one_sentence_and_changes_nothing(files, tmp_path, monkeypatch, capsys, arguments, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "header.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementSpacing = 1 1 1\nElementType = MET_UCHAR\n"
        "ElementDataFile = voxels.mha\n"
    )
    (tmp_path / "voxels.mha").write_bytes(bytes(64))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert run(*arguments) == 2
    said = capsys.readouterr().err.strip()
    assert word in said and said.count("\n") == 0 and said.endswith(".")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
