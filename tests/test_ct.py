"""Simulated CT: Hounsfield units of the table, noise of a reconstruction, masks and truth of what was planted."""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from lvseg.formats import read_volume, write_volume
from lvseg.phantom import ct
from lvseg.phantom.anatomy import Tissue
from lvseg.phantom.ct import (
    ATTENUATION,
    LOWEST_HU,
    PADDING_HU,
    PROTOCOLS,
    THIGH_ATTENUATION,
    CtProtocol,
    Subject,
    correlated_noise,
    liver_hu,
)
from lvseg.phantom.patients import draw_anatomy
from lvseg.phantom.scan import Scan
from lvseg.phantom.thigh import draw_thighs

SEED = 9  # its first liver is enhanced, its second is not
NAMES = ("ct_liver", "ct_abdomen", "ct_thigh")
LABELS = {
    "ct_liver": {
        1: (Tissue.LIVER, Tissue.HEPATIC_VESSEL, Tissue.PORTAL_VESSEL, Tissue.CYST, Tissue.LESION, Tissue.FOCAL_FAT)
    },
    "ct_abdomen": {1: (Tissue.VISCERAL_FAT,), 2: (Tissue.FAT,)},
    "ct_thigh": {1: (Tissue.FAT, Tissue.INTERMUSCULAR_FAT), 2: (Tissue.CONNECTIVE,), 3: (Tissue.MUSCLE,)},
}


@cache
def scan(name: str, number: int = 1) -> Scan:
    return PROTOCOLS[name].image(SEED, number)


@cache
def body(name: str, number: int = 1):
    return draw_thighs(SEED, number) if name == "ct_thigh" else draw_anatomy(SEED, number)


def pixels(made: Scan) -> np.ndarray:
    return made.images["image"].voxels[0].astype(float)


def inside(made: Scan, *tissues: Tissue, pixels_deep: int = 3) -> np.ndarray:
    """Pixels of these tissues away from their border, so that no other is mixed in."""
    return ndimage.binary_erosion(np.isin(made.tissues.voxels[0], tissues), iterations=pixels_deep)


def quiet(name: str, **changes) -> CtProtocol:
    return replace(PROTOCOLS[name], noise_hu=0.0, padded=0.0, **changes)


@cache
def quiet_scan(name: str) -> Scan:
    return quiet(name).image(SEED, 1)


def test_the_three_protocols_are_those_of_the_report():
    assert tuple(PROTOCOLS) == NAMES
    assert all(protocol.name == protocol.task == name for name, protocol in PROTOCOLS.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_patient_has_one_slice_with_the_geometry_of_a_ct(name):
    made = scan(name)
    assert list(made.images) == ["image"]
    image = made.images["image"]
    assert (image.shape, image.voxels.dtype) == ((1, 512, 512), np.int16)
    assert image.spacing_mm[0] == 5.0 and image.spacing_mm[1] == image.spacing_mm[2]
    assert 0.70 < image.spacing_mm[1] < 0.98 and float(image.spacing_mm[1] * 512).is_integer()
    assert np.array_equal(image.directions, np.eye(3)[::-1])  # slices along z, rows along y, columns along x
    assert image.metadata["modality"] == "CT"
    for other in (made.mask, made.tissues):
        assert other.voxels.dtype == np.uint8 and other.shape == image.shape
        assert np.array_equal(other.affine, image.affine)
    assert image.affine[2, 3] == made.truth["slice_z_mm"]


def test_pixels_differ_between_patients():
    assert len({scan("ct_thigh", number).mask.spacing_mm[1] for number in range(1, 7)}) > 2


@pytest.mark.parametrize("name", NAMES)
def test_a_slice_survives_a_file(name, tmp_path):
    image = scan(name).images["image"]
    write_volume(image, tmp_path / "image.nii.gz")
    again = read_volume(tmp_path / "image.nii.gz")
    assert np.array_equal(again.voxels, image.voxels) and again.voxels.dtype == np.int16
    assert np.allclose(again.affine, image.affine, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_masks_are_the_tissues_of_their_classes_and_nothing_else(name):
    made = scan(name)
    expected = np.zeros(made.mask.shape, dtype=np.uint8)
    for label, tissues in LABELS[name].items():
        expected[np.isin(made.tissues.voxels, tissues)] = label
    assert np.array_equal(made.mask.voxels, expected)
    assert set(np.unique(expected)) == {0, *LABELS[name]}


@pytest.mark.parametrize("name", NAMES)
def test_a_pixel_holds_the_tissue_at_its_centre(name):
    made = scan(name)
    for index in np.argwhere(made.tissues.voxels)[::3001]:
        position = made.tissues.world_mm(index)
        assert body(name).tissues(*position[:, None]).item() == made.tissues.voxels[tuple(index)]
    outside = np.argwhere(made.tissues.voxels == Tissue.AIR)[::20011]
    for position in made.tissues.world_mm(outside):
        assert body(name).tissues(*position[:, None]).item() == Tissue.AIR


@pytest.mark.parametrize("name", NAMES)
def test_areas_of_the_truth_agree_with_an_independent_fine_count(name):
    made = scan(name)
    present = np.argwhere(made.tissues.voxels[0])
    corners = made.tissues.world_mm([(0, *present.min(axis=0) - 4), (0, *present.max(axis=0) + 4)])
    x, y = (np.arange(corners[0, axis], corners[1, axis], 0.93) for axis in (0, 1))
    z = made.truth["slice_z_mm"] + (np.arange(8) + 0.5) * 0.625 - 2.5
    counts = np.bincount(body(name).tissues(x, y, z).ravel(), minlength=len(Tissue)) * 0.93**2 / 8 / 100
    labels = [label.name for label in PROTOCOLS[name].labels]
    for label, tissues in zip(labels, LABELS[name].values(), strict=True):
        fine_cm2 = counts[list(tissues)].sum()
        assert made.truth[f"{label}_area_cm2"] == pytest.approx(fine_cm2, rel=0.01, abs=0.1)
        assert made.truth[f"{label}_area_in_mask_cm2"] == pytest.approx(fine_cm2, rel=0.02, abs=0.3)
    for value, label in enumerate(labels, start=1):
        pixel_cm2 = made.mask.voxel_volume_mm3 / 5.0 / 100.0
        in_mask = np.count_nonzero(made.mask.voxels == value) * pixel_cm2
        assert made.truth[f"{label}_area_in_mask_cm2"] == pytest.approx(in_mask)


@pytest.mark.parametrize("name", NAMES)
def test_every_patient_has_the_same_columns_of_finite_numbers(name):
    truths = [scan(name, number).truth for number in (1, 2)]
    assert list(truths[0]) == list(truths[1])
    assert all(isinstance(value, float) and np.isfinite(value) for truth in truths for value in truth.values())
    assert truths[0] != truths[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_scan_is_the_same_each_time(name):
    again, first = PROTOCOLS[name].image(SEED, 1), scan(name)
    for one, other in (
        (again.images["image"], first.images["image"]),
        (again.mask, first.mask),
        (again.tissues, first.tissues),
    ):
        assert np.array_equal(one.voxels, other.voxels) and np.array_equal(one.affine, other.affine)
    assert again.truth == first.truth
    assert not np.array_equal(pixels(first), pixels(scan(name, 2)))


def test_the_liver_slice_lies_about_the_middle_of_the_liver():
    for number in (1, 2):
        made = scan("ct_liver", number)
        z = np.arange(-200.0, 160.0, 5.0)
        map_ = body("ct_liver", number).tissues(np.arange(-200.0, 200.0, 8.0), np.arange(-150.0, 150.0, 8.0), z)
        levels = z[np.isin(map_, LABELS["ct_liver"][1]).any(axis=(1, 2))]
        height = (made.truth["slice_z_mm"] - levels[0]) / (levels[-1] - levels[0])
        assert 0.35 < height < 0.8
        assert 60 < made.truth["liver_area_cm2"] < 320


def test_the_abdominal_slice_shows_bowel_and_fat_below_liver_and_kidneys():
    tissues = set(np.unique(scan("ct_abdomen").tissues.voxels))
    assert {Tissue.VISCERAL_FAT, Tissue.FAT, Tissue.MUSCLE, Tissue.BOWEL, Tissue.BLOOD, Tissue.SPINAL_FLUID} <= tissues
    assert not {Tissue.KIDNEY, Tissue.KIDNEY_MEDULLA, Tissue.SPLEEN, Tissue.LUNG} & tissues
    for number in (1, 2):
        truth = scan("ct_abdomen", number).truth
        assert 20 < truth["visceral_fat_area_cm2"] < 400 and 15 < truth["subcutaneous_fat_area_cm2"] < 700


@pytest.mark.parametrize("number", (1, 2))
def test_tissues_of_the_thigh_have_the_units_of_the_table(number):
    made = scan("ct_thigh", number)
    image = pixels(made)
    for tissue, tolerance_hu in ((Tissue.FAT, 4), (Tissue.MUSCLE, 6), (Tissue.MARROW, 12), (Tissue.BONE, 60)):
        row = THIGH_ATTENUATION[tissue]
        where = inside(made, tissue, pixels_deep=2)
        assert where.sum() > 25
        # Age takes up to 12 HU off muscle, and marbling more.
        low = row.hu - 2.2 * row.between - tolerance_hu - (35 if tissue == Tissue.MUSCLE else 0)
        assert low < image[where].mean() < row.hu + 2.2 * row.between + tolerance_hu
    in_front = image[5:35, 230:280]
    assert np.all(made.tissues.voxels[0, 5:35, 230:280] == Tissue.AIR)
    assert in_front.mean() == pytest.approx(-1000, abs=6)


def test_unenhanced_and_enhanced_livers_look_as_radiologists_expect():
    made = {scan("ct_liver", number).truth["contrast_enhanced"]: scan("ct_liver", number) for number in (1, 2)}
    assert set(made) == {0.0, 1.0}
    means = {
        enhanced: {
            tissue: pixels(one)[inside(one, tissue)].mean() for tissue in (Tissue.LIVER, Tissue.SPLEEN, Tissue.BLOOD)
        }
        for enhanced, one in made.items()
    }
    plain, bright = means[0.0], means[1.0]
    expected = liver_hu(made[0.0].truth["liver_fat_percent"])
    assert plain[Tissue.LIVER] == pytest.approx(expected, abs=2.2 * ATTENUATION[Tissue.LIVER].between + 4)
    assert 35 < plain[Tissue.SPLEEN] < 60 and 30 < plain[Tissue.BLOOD] < 56
    assert bright[Tissue.BLOOD] > bright[Tissue.LIVER] + 15 > plain[Tissue.LIVER] + 35
    assert bright[Tissue.SPLEEN] > 85
    for one in made.values():
        assert pixels(one)[inside(one, Tissue.LIVER)].mean() == pytest.approx(one.truth["liver_parenchyma_hu"], abs=4.5)


@pytest.mark.parametrize(("fat_percent", "hu"), [(0.5, 65.0), (25.0, 23.0), (40.0, -3.0)])
def test_liver_attenuation_agrees_with_published_calibration(fat_percent, hu):
    # The three patients of figure 2 of Starekova et al., Radiology 2021;301:250.
    assert liver_hu(fat_percent) == pytest.approx(hu, abs=1.0)


def test_liver_attenuation_in_the_image_falls_with_fat(monkeypatch):
    def with_fat(percent: float) -> Scan:
        monkeypatch.setattr(
            ct, "draw_anatomy", lambda seed, number: replace(body("ct_liver", number), liver_fat_percent=percent)
        )
        return quiet("ct_liver").image(SEED, number)

    number = 2
    assert not scan("ct_liver", number).truth["contrast_enhanced"]
    lean, fatty = with_fat(0.0), with_fat(30.0)
    where = inside(lean, Tissue.LIVER)
    fall = (pixels(lean) - pixels(fatty))[where].mean()
    assert fall == pytest.approx(30 * 1.72, abs=0.6)
    assert lean.truth["liver_mean_hu"] - fatty.truth["liver_mean_hu"] > 40
    spleen = inside(lean, Tissue.SPLEEN)
    assert np.abs((pixels(lean) - pixels(fatty))[spleen]).max() <= 1


def spectrum(fields: list[np.ndarray], pixel_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean noise power in rings of 0.04/mm: middle frequencies, and power (1 for white noise of variance 1)."""
    power = np.mean([np.abs(np.fft.fft2(field)) ** 2 / field.size for field in fields], axis=0)
    frequency = np.fft.fftfreq(512, pixel_mm)
    ring = (np.hypot(frequency[:, None], frequency) / 0.04).astype(int).ravel()
    return 0.04 * (np.arange(ring.max() + 1) + 0.5), np.bincount(ring, power.ravel()) / np.bincount(ring)


@pytest.mark.parametrize("pixel_mm", (0.70, 0.97))
def test_noise_is_correlated_as_filtered_back_projection_leaves_it(pixel_mm):
    fields = [correlated_noise(np.random.default_rng(seed), pixel_mm).astype(float) for seed in range(4)]
    assert np.std(fields) == pytest.approx(1.0, rel=0.02) and abs(np.mean(fields)) < 0.01
    frequency, power = spectrum(fields, pixel_mm)
    peak = frequency[power.argmax()]
    assert 0.1 < peak < 0.3  # per mm, as soft-tissue kernels have it
    assert power[0] < 0.3 * power.max()
    assert power[np.searchsorted(frequency, 0.5)] < 0.25 * power.max()
    neighbours = np.mean([np.mean(field[:, 1:] * field[:, :-1]) for field in fields])
    assert 0.3 < neighbours < 0.8


@pytest.mark.parametrize("name", ("ct_thigh", "ct_liver"))
def test_noise_in_the_image_is_as_strong_as_stated_in_the_middle_and_weaker_outside(name):
    made, clean = scan(name), quiet_scan(name)
    noise = pixels(made) - pixels(clean)
    rows, columns = np.nonzero(made.tissues.voxels[0])
    middle = round(0.5 * (rows.min() + rows.max())), round(0.5 * (columns.min() + columns.max()))
    centre = noise[middle[0] - 40 : middle[0] + 40, middle[1] - 40 : middle[1] + 40]
    whole = clean.images["image"].voxels[0][middle[0] - 40 : middle[0] + 40, middle[1] - 40 : middle[1] + 40]
    centre = centre[(whole > -900) | (made.truth["noise_hu"] < 6)]  # air is cut off at -1024
    assert centre.std() == pytest.approx(made.truth["noise_hu"], rel=0.15)
    skin_side = noise[middle[0] - 40 : middle[0] + 40, columns.min() + 12 : columns.min() + 40]
    assert skin_side.std() < 0.85 * centre.std()
    assert clean.truth["noise_hu"] == 0.0


@dataclass(frozen=True)
class Disc:
    """A round body, muscle below this height and fat above."""

    border_mm: float

    def tissues(self, x_mm, y_mm, z_mm):
        z, y, x = np.meshgrid(z_mm, y_mm, x_mm, indexing="ij")
        return np.where(
            np.hypot(x, y) > 100, Tissue.AIR, np.where(z < self.border_mm, Tissue.MUSCLE, Tissue.FAT)
        ).astype(np.uint8)


@pytest.mark.parametrize(("border_mm", "muscle_share"), [(-9.0, 0.0), (-1.5, 0.2), (-0.5, 0.4), (1.5, 0.8), (9.0, 1.0)])
def test_a_slice_averages_what_lies_within_its_thickness(border_mm, muscle_share):
    hu = np.full(len(Tissue), -1000.0, dtype=np.float32)
    hu[Tissue.FAT], hu[Tissue.MUSCLE] = -100.0, 60.0
    still = np.zeros(len(Tissue), dtype=np.float32)

    def disc(border: float) -> Scan:
        subject = Subject(Disc(border), 0.0, hu, still, 0.0, {})
        return quiet("ct_thigh", labels=(), also=(), place=lambda seed, number: subject).image(1, 1)

    fat, mixed = disc(-9.0), disc(border_mm)
    where = inside(fat, Tissue.FAT)
    assert (pixels(mixed) - pixels(fat))[where] == pytest.approx(160.0 * muscle_share, abs=1.0)
    assert pixels(fat)[where].mean() == pytest.approx(-100, abs=4)
    edge = ndimage.binary_dilation(fat.tissues.voxels[0] == Tissue.FAT, iterations=2) & ~where
    assert np.mean((pixels(fat)[edge] > -900) & (pixels(fat)[edge] < -200)) > 0.15


@pytest.mark.parametrize("name", NAMES)
def test_the_table_lies_behind_the_patient_and_is_no_part_of_any_class(name):
    made = quiet_scan(name)
    tissues, image = made.tissues.voxels[0], pixels(made)
    away = ndimage.binary_erosion(tissues == Tissue.AIR, iterations=4)
    table = away & (image > -700)
    rows, columns = np.nonzero(table)
    assert len(rows) > 300 and np.ptp(columns) > 300
    for column in np.unique(columns)[::29]:
        in_body = np.flatnonzero(tissues[:, column] != Tissue.AIR)
        if in_body.size:
            assert rows[columns == column].min() > in_body.max()
    assert not made.mask.voxels[0][table].any()
    front = np.flatnonzero((tissues != Tissue.AIR).any(axis=1)).min()
    assert image[: front - 4].max() < -970


def test_some_scanners_pad_the_corners_and_never_the_patient():
    padded = replace(PROTOCOLS["ct_thigh"], padded=1.0).image(SEED, 1)
    whole = replace(PROTOCOLS["ct_thigh"], padded=0.0).image(SEED, 1)
    offset = np.arange(512) - 255.5
    outside = np.hypot(offset[:, None], offset) > 256
    assert np.all(pixels(padded)[outside] == PADDING_HU) and np.all(padded.tissues.voxels[0][outside] == Tissue.AIR)
    assert np.array_equal(pixels(padded)[~outside], pixels(whole)[~outside])
    assert pixels(whole).min() >= LOWEST_HU and pixels(whole).max() <= 3071
    made = [scan("ct_thigh", number).images["image"].voxels.min() == PADDING_HU for number in range(1, 7)]
    assert 0 < sum(made) < 6


def test_muscle_of_the_old_is_less_dense():
    drawn = [(number, draw_thighs(SEED, number).age_years) for number in range(40)]
    numbers = [number for number, _ in sorted(drawn, key=lambda row: row[1])]
    young, old = (
        np.mean([quiet("ct_thigh").image(SEED, number).truth["muscle_mean_hu"] for number in group])
        for group in (numbers[:3], numbers[-3:])
    )
    assert 28 < old < young - 8 < 55  # 36 HU (SD 7) at 70 to 79 years: Goodpaster et al., J Appl Physiol 2001;90:2157
