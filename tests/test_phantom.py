"""Simulated scans: geometry, contrast, disturbances, masks as people draw them, truth, and the command."""

import csv
import fcntl
import json
import signal
from dataclasses import replace
from functools import cache

import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from lvseg.formats import read_volume
from lvseg.phantom import gallery, imaging, masks, simulate
from lvseg.phantom.__main__ import main
from lvseg.phantom.anatomy import WHOLE_LIVER, Anatomy, Tissue
from lvseg.phantom.patients import draw_anatomy, patient_id, random_stream
from lvseg.phantom.physics import draw_tissues
from lvseg.phantom.scan import Scan
from lvseg.phantom.scanners import FAT_FRACTION, FAT_MARGIN_MM, SCANNERS, VOLUME, Scanner, image_patient
from lvseg.phantom.simulate import PHANTOM_VERSION, PROTOCOLS
from lvseg.volume import Volume

SEED = 11
STEATOTIC = 11  # a patient with a fatty liver
VOLUME_SCANNERS = [name for name, scanner in SCANNERS.items() if scanner.task == VOLUME]
FAT_SCANNERS = [name for name, scanner in SCANNERS.items() if scanner.task == FAT_FRACTION]
TRUTH = [
    "liver_volume_ml",
    "liver_volume_in_mask_ml",
    "whole_liver_ml",
    "liver_fat_percent",
    "mask_fat_percent_mean",
    "steatosis",
]


@cache
def anatomy(number: int) -> Anatomy:
    return draw_anatomy(SEED, number)


@cache
def scan(scanner: str, number: int = 1) -> Scan:
    return image_patient(anatomy(number), SCANNERS[scanner])


def undisturbed(scanner: str, **changes) -> Scanner:
    return replace(SCANNERS[scanner], noise=0.0, shading=0.0, breathes=False, **changes)


@cache
def clean(scanner: str, number: int = 1) -> Scan:
    """Without noise, coils and breathing."""
    return image_patient(anatomy(number), undisturbed(scanner))


def small(scanner: str) -> Scanner:
    """The protocol with a coarse, quick grid."""
    protocol = SCANNERS[scanner]
    return replace(protocol, rows=protocol.rows // 3, columns=protocol.columns // 3, pixel_mm=3 * protocol.pixel_mm)


def patient_mm(volume: Volume, index: np.ndarray) -> np.ndarray:
    """Positions in the patient's own millimetres, (x, y, z), also of a patient who lay tilted."""
    axes = volume.canonical().directions[:, ::-1]  # where the patient's x, y and z point
    return volume.world_mm(index) @ axes


def seen_dice(first: Scan, second: Scan) -> float:
    """Dice of two masks where both scans see, the second looked up at the first's voxel centres in the patient."""
    inverse = np.linalg.inv(second.mask.affine)
    there = patient_mm(first.mask, np.moveaxis(np.indices(first.mask.shape), 0, -1))
    there = there @ second.mask.canonical().directions[:, ::-1].T
    there = there @ inverse[:3, :3].T + inverse[:3, 3]
    seen = np.all((there > -0.5) & (there < np.array(second.mask.shape) - 0.5), axis=-1)
    other = ndimage.map_coordinates(second.mask.voxels, np.moveaxis(there, -1, 0), order=0, mode="nearest")[seen]
    own = first.mask.voxels[seen]
    return 2.0 * float((own & other).sum()) / float(own.sum() + other.sum())


def medians(made: Scan, image: str = "image") -> dict[Tissue, float]:
    tissues, voxels = made.tissues.voxels, made.images[image].voxels
    return {tissue: float(np.median(voxels[tissues == tissue])) for tissue in Tissue if np.any(tissues == tissue)}


@pytest.mark.parametrize(
    ("scanner", "slices", "spacing_mm"),
    [
        ("philips_volume", 55, (5, 2, 2)),
        ("ge_volume", 28, (5, 1.5, 1.5)),
        ("siemens_volume", 64, (3, 1.6, 1.6)),
        ("philips_fat", 34, (6, 1.95, 1.95)),
        ("ge_fat", 25, (10, 1.72, 1.72)),
        ("siemens_fat", 46, (4, 2.1, 2.1)),
    ],
)
def test_scans_have_the_geometry_of_the_report(scanner, slices, spacing_mm):
    made = scan(scanner)
    image = made.images["image"].canonical()
    assert image.shape[0] == slices
    assert image.spacing_mm == pytest.approx(spacing_mm)
    expected = (
        {"image": np.int16} if scanner in VOLUME_SCANNERS else {"image": np.float32, "water": np.int16, "fat": np.int16}
    )
    assert {name: volume.voxels.dtype for name, volume in made.images.items()} == expected
    assert made.mask.voxels.dtype == made.tissues.voxels.dtype == np.uint8
    for other in (*made.images.values(), made.mask, made.tissues):
        assert other.shape == made.mask.shape and np.array_equal(other.affine, made.mask.affine)


@pytest.mark.parametrize("kind", ["volume", "fat"])
def test_makers_store_their_axes_differently(kind):
    stored = {maker: scan(f"{maker}_{kind}").mask for maker in ("philips", "ge", "siemens")}
    straight = {maker: np.sign(np.round(mask.directions, 6))[::-1] for maker, mask in stored.items()}
    assert np.array_equal(straight["philips"], np.eye(3)) and np.array_equal(straight["ge"], -np.eye(3))
    assert not stored["philips"].is_oblique and not stored["ge"].is_oblique
    siemens = stored["siemens"]
    assert siemens.is_oblique and siemens.shape != siemens.canonical().shape
    turned_deg = np.degrees(np.arccos((np.trace(siemens.canonical().directions[::-1]) - 1) / 2))
    assert 0.5 < turned_deg < 11


@pytest.mark.parametrize("scanner", SCANNERS)
def test_labels_are_the_tissue_at_the_voxel_centre(scanner):
    made = scan(scanner)
    if scanner in VOLUME_SCANNERS:
        assert np.array_equal(made.mask.voxels == 1, np.isin(made.tissues.voxels, WHOLE_LIVER))
    index = np.argwhere(made.tissues.voxels)[::20011]
    for voxel, position in zip(index, patient_mm(made.tissues, index), strict=True):
        here = anatomy(1).tissues(*position[:, None] + 1e-4 * np.array([-1, 0, 1]))
        assert made.tissues.voxels[tuple(voxel)] in here


def test_all_scanners_see_the_same_patient():
    assert seen_dice(scan("philips_volume"), scan("ge_volume")) > 0.95
    assert seen_dice(scan("philips_volume"), scan("siemens_volume")) > 0.95


@pytest.mark.parametrize("scanner", ["philips_volume", "ge_volume"])
def test_t1_weighting_without_fat_looks_as_radiologists_know_it(scanner):
    signal = medians(clean(scanner))
    liver = signal[Tissue.LIVER]
    assert signal[Tissue.PANCREAS] > signal[Tissue.SPLEEN] and liver > 1.1 * signal[Tissue.SPLEEN]
    assert signal[Tissue.KIDNEY] > 1.1 * signal[Tissue.KIDNEY_MEDULLA]
    assert signal[Tissue.SPINAL_FLUID] < 0.5 * liver and signal[Tissue.MUSCLE] < 0.9 * liver
    assert signal[Tissue.BLOOD] < 0.85 * liver and signal[Tissue.HEPATIC_VESSEL] < 0.9 * liver
    assert signal[Tissue.FAT] < 0.3 * signal[Tissue.MUSCLE]
    assert signal[Tissue.AIR] == 0 and signal[Tissue.LUNG] < 0.25 * liver


def test_opposed_phase_has_bright_fat_and_black_lines_where_fat_meets_water():
    made = clean("siemens_volume")
    signal = medians(made)
    assert signal[Tissue.FAT] > 1.3 * signal[Tissue.LIVER] > 1.3 * signal[Tissue.SPINAL_FLUID]
    tissues, image = made.tissues.voxels, made.images["image"].voxels
    fat = np.isin(tissues, (Tissue.FAT, Tissue.VISCERAL_FAT))
    wet = np.isin(tissues, (Tissue.MUSCLE, Tissue.KIDNEY, Tissue.SPLEEN, Tissue.LIVER))
    border = np.concatenate(
        [image[:, :, :-1][wet[:, :, :-1] & fat[:, :, 1:]], image[:, :, 1:][wet[:, :, 1:] & fat[:, :, :-1]]]
    )
    assert np.mean(border < 0.7 * signal[Tissue.MUSCLE]) > 0.3
    assert np.mean(border < 0.7 * signal[Tissue.MUSCLE]) > 2 * np.mean(image[wet] < 0.7 * signal[Tissue.MUSCLE])


@pytest.mark.parametrize("scanner", FAT_SCANNERS)
def test_water_fat_and_fat_fraction_look_as_radiologists_know_them(scanner):
    water, fat, percent = (medians(clean(scanner), name) for name in ("water", "fat", "image"))
    assert water[Tissue.BLOOD] > 0.85 * water[Tissue.LIVER]  # little T1 weighting: blood is not dark
    assert water[Tissue.FAT] < 0.2 * water[Tissue.LIVER] and fat[Tissue.LIVER] < 0.2 * fat[Tissue.FAT]
    planted = draw_tissues(anatomy(1), SCANNERS[scanner].sequence.field_t).fat_percent
    for tissue in (Tissue.FAT, Tissue.VISCERAL_FAT, Tissue.LIVER, Tissue.SPLEEN, Tissue.MUSCLE):
        assert percent[tissue] == pytest.approx(planted[tissue], abs=4)
    assert percent[Tissue.MARROW] == pytest.approx(planted[Tissue.MARROW], abs=10)  # discs share its thick slices


def test_scales_differ_between_makers():
    livers = [medians(scan(name))[Tissue.LIVER] for name in VOLUME_SCANNERS]
    assert livers[1] > 2 * livers[0] > 4 * livers[2]


@pytest.mark.parametrize("scanner", VOLUME_SCANNERS)
def test_intensity_alone_does_not_separate_the_liver(scanner):
    made = scan(scanner)
    image, liver = made.images["image"].voxels, made.mask.voxels == 1
    windows = [np.percentile(image[liver], ends) for ends in ((1, 100), (3, 100), (3, 97), (10, 100), (10, 90))]
    chosen = [(image >= low) & (image <= high) for low, high in windows]
    dice = [2 * (window & liver).sum() / (window.sum() + liver.sum()) for window in chosen]
    assert 0.3 < max(dice) < 0.92


def test_air_holds_rayleigh_noise_that_is_not_shared_between_slices():
    protocol = replace(small("philips_volume"), breathes=False, rows=84, columns=84)
    made = image_patient(anatomy(1), protocol)
    corner = made.images["image"].voxels[:, :12, :12].astype(float)
    assert np.all(made.tissues.voxels[:, :12, :12] == Tissue.AIR)
    assert corner.mean() / corner.std() == pytest.approx(np.sqrt(np.pi / 2) / np.sqrt(2 - np.pi / 2), rel=0.04)
    louder = image_patient(anatomy(1), replace(protocol, noise=2 * protocol.noise))
    ratio = louder.images["image"].voxels[:, :12, :12].mean() / corner.mean()
    assert ratio == pytest.approx(2, rel=0.02)
    assert abs(np.corrcoef(corner[10].ravel(), corner[11].ravel())[0, 1]) < 0.25


def test_noise_is_a_share_of_an_average_livers_signal():
    protocol = replace(small("philips_volume"), breathes=False, rows=84, columns=84)
    livers, noises = [], []
    for number in (1, 2, 3):
        made = image_patient(anatomy(number), protocol)
        livers.append(medians(made)[Tissue.LIVER])
        noises.append(made.images["image"].voxels[:, :12, :12].mean() / np.sqrt(np.pi / 2))
    assert np.mean(noises) / np.mean(livers) == pytest.approx(protocol.noise, rel=0.25)
    assert np.mean(livers) == pytest.approx(protocol.liver_intensity, rel=0.25)


@pytest.mark.parametrize("scanner", FAT_SCANNERS)
def test_the_background_of_a_fat_fraction_is_noise(scanner):
    made = scan(scanner)
    air = made.tissues.voxels == Tissue.AIR
    water, fat = (made.images[name].voxels[air] for name in ("water", "fat"))
    liver = medians(made, "water")[Tissue.LIVER]
    assert 0 < np.mean(water) < 0.1 * liver and 0 < np.mean(fat) < 0.1 * liver
    assert np.std(water) > 0.3 * np.mean(water)


def test_coils_shade_the_scan_smoothly():
    shaded = image_patient(anatomy(1), replace(undisturbed("philips_volume"), shading=0.4))
    shaded, even = (made.images["image"].voxels.astype(float) for made in (shaded, clean("philips_volume")))
    ratio = np.divide(shaded, even, out=np.full_like(even, np.nan), where=even > 150)
    assert np.nanmax(ratio) / np.nanmin(ratio) > 1.2
    assert np.nanmax(np.abs(np.diff(ratio, axis=2))) < 0.05


def test_fat_suppression_fails_only_in_a_few_places():
    made = clean("philips_volume")
    tissues, image = made.tissues.voxels, made.images["image"].voxels
    core = ndimage.binary_erosion(np.isin(tissues, (Tissue.FAT, Tissue.VISCERAL_FAT)), iterations=1)
    fat = image[core] / np.median(image[core])
    assert 0 < np.mean(fat > 2.5) < 0.12


class Half:
    """A patient of liver below a plane and of air above it, tilted against every axis."""

    normal, offset_mm = np.array([0.48, 0.6, 0.64]), 3.3

    def tissues(self, x, y, z):
        along = self.normal[0] * np.asarray(x) + self.normal[1] * np.asarray(y)[:, None]
        along = along + self.normal[2] * np.asarray(z)[:, None, None]
        return np.where(along < self.offset_mm, np.uint8(Tissue.LIVER), np.uint8(Tissue.AIR))


def test_a_voxel_holds_its_share_of_each_tissue():
    grid = imaging.Grid(np.arange(-30.0, 30, 5), np.arange(-20.0, 20, 2), np.arange(-20.0, 20, 2))
    table = np.zeros((2, len(Tissue)))
    table[0, Tissue.LIVER], table[1, Tissue.AIR] = 1.0, 3.0
    maps, tissues, liver_ml = imaging.sample(Half(), grid, table)
    np.testing.assert_allclose(maps[0] + maps[1] / 3.0, 1.0, atol=1e-6)
    fine = [
        np.add.outer(axis, (np.arange(10) - 4.5) / 10 * step).ravel()
        for axis, step in zip(grid.axes, (5, 2, 2), strict=True)
    ]
    inside = (Half().tissues(fine[2], fine[1], fine[0]) == Tissue.LIVER).astype(float)
    share = inside.reshape(len(grid.z), 10, len(grid.y), 10, len(grid.x), 10).mean(axis=(1, 3, 5))
    assert np.abs(maps[0] - share).max() < 0.3 and np.abs(maps[0] - share).mean() < 0.02
    mixed = (share > 0.05) & (share < 0.95)
    assert np.mean((maps[0] > 0.05) & (maps[0] < 0.95) & mixed) > 0.9 * np.mean(mixed)
    assert liver_ml == pytest.approx(share.sum() * 20 / 1000, rel=0.01)
    assert np.array_equal(tissues, Half().tissues(grid.x, grid.y, grid.z))


def test_ghosts_are_copies_of_the_front_that_wrap_around():
    grid = imaging.Grid(np.arange(0.0, 15, 5), np.arange(-100.0, 100, 2), np.arange(-50.0, 50, 2))
    maps = np.zeros((1, *grid.shape), np.float32)
    maps[0, 1, 10, 7] = 100.0  # the front, at -80 mm
    maps[0, 1, 80, 7] = 100.0  # the back
    before = maps.copy()
    imaging.add_ghosts(maps, grid, front_mm=-85.0, strength=0.05, draw=random_stream(1, 1, "ghosts"))
    added = maps - before
    rows = np.flatnonzero(added[0, 1, :, 7])
    np.testing.assert_allclose(np.abs(added[0, 1, rows, 7]), 5.0, rtol=1e-6)
    shift = (rows[0] - 10) % 100
    assert sorted(rows) == sorted([(10 + shift) % 100, (10 - shift) % 100]) and 20 <= min(shift, 100 - shift) <= 45
    assert np.count_nonzero(added) == 2  # the back lies still


def test_breathing_spreads_over_slices_with_the_variance_of_the_motion():
    maps = np.zeros((1, 9, 2, 2), np.float32)
    maps[0, 4] = 1.0
    imaging.blur_by_breathing(maps, slice_mm=5.0, breathing_mm=6.0)
    profile = maps[0, :, 0, 0].astype(float)
    assert profile.sum() == pytest.approx(1.0, abs=1e-6)
    assert (profile * (5.0 * (np.arange(9) - 4)) ** 2).sum() == pytest.approx(6.0**2 / 12, rel=1e-5)


def test_the_field_is_off_near_the_lung_and_even_elsewhere():
    looked = imaging.survey(anatomy(1))
    grid = imaging.place(looked, (55, 100, 100), (5.0, 4.0, 4.0), random_stream(1, 1, "stack"))
    field = np.stack(list(imaging.off_resonance_ppm(looked, grid)))
    tissues = anatomy(1).tissues(grid.x, grid.y, grid.z)
    liver = np.isin(tissues, WHOLE_LIVER)
    near = liver & ndimage.binary_dilation(tissues == Tissue.LUNG, iterations=3)
    far = liver & ~ndimage.binary_dilation(tissues == Tissue.LUNG, iterations=8)
    assert 0.05 < np.abs(field[far]).mean() < 0.5
    assert np.abs(field[near]).mean() > 1.5 * np.abs(field[far]).mean()
    assert np.abs(field[liver]).max() < 5


def test_a_liver_higher_than_the_stack_loses_its_lower_tip():
    looked = imaging.survey(anatomy(1))
    low, high = looked.liver_mm()
    for slices in (20, 60):
        grid = imaging.place(looked, (slices, 50, 50), (5.0, 8.0, 8.0), random_stream(1, 1, "stack"))
        assert grid.z[-1] > high - 5
        assert (grid.z[0] < low) == (slices == 60)


@pytest.mark.parametrize("scanner", ["philips_volume", "ge_volume"])
def test_true_volume_and_mask_agree_with_a_fine_count(scanner):
    made = scan(scanner)
    liver = np.argwhere(made.mask.voxels)
    corners = made.mask.world_mm([liver.min(axis=0) - 4, liver.max(axis=0) + 4])
    ends = np.sort(made.mask.world_mm([[-0.5, 0, 0], [made.mask.shape[0] - 0.5, 0, 0]])[:, 2])
    x, y = (np.arange(corners[:, axis].min(), corners[:, axis].max(), 2.3) for axis in (0, 1))
    z = np.linspace(ends[0], ends[1], 121)
    z = 0.5 * (z[1:] + z[:-1])
    fine_ml = np.isin(anatomy(1).tissues(x, y, z), WHOLE_LIVER).sum() * 2.3 * 2.3 * (z[1] - z[0]) / 1000
    assert made.truth["liver_volume_ml"] == pytest.approx(fine_ml, rel=0.01)
    assert made.truth["liver_volume_in_mask_ml"] == pytest.approx(fine_ml, rel=0.02)
    assert made.truth["whole_liver_ml"] >= 0.995 * made.truth["liver_volume_ml"]


@pytest.mark.parametrize("scanner", SCANNERS)
def test_the_truth_is_complete_and_the_patients_own(scanner):
    truth, made = scan(scanner).truth, scan(scanner)
    assert list(truth) == TRUTH
    assert truth["liver_fat_percent"] == anatomy(1).liver_fat_percent
    assert truth["steatosis"] == (anatomy(1).liver_fat_percent > 5.56)
    in_mask = made.mask.voxels.sum() * made.mask.voxel_volume_mm3 / 1000
    assert truth["liver_volume_in_mask_ml"] == pytest.approx(in_mask, rel=1e-6)


@pytest.mark.parametrize("scanner", FAT_SCANNERS)
def test_fat_is_drawn_within_a_margin_and_away_from_vessels(scanner):
    made = scan(scanner)
    mask, tissues = (volume.canonical().voxels for volume in (made.mask, made.tissues))
    pixel_mm = made.mask.canonical().spacing_mm[1:]
    assert set(np.unique(tissues[mask == 1])) <= {Tissue.LIVER, Tissue.FOCAL_FAT}
    for labels, here in zip(mask, tissues, strict=True):
        if labels.any():
            depth_mm = ndimage.distance_transform_edt(np.isin(here, WHOLE_LIVER), sampling=pixel_mm)[labels == 1]
            assert depth_mm.min() > FAT_MARGIN_MM[0]
            vessels = np.isin(here, (Tissue.HEPATIC_VESSEL, Tissue.PORTAL_VESSEL))
            if vessels.any():
                assert ndimage.distance_transform_edt(~vessels, sampling=pixel_mm)[labels == 1].min() > 2.0
            assert labels.sum() * np.prod(pixel_mm) >= 1000
    share = made.truth["liver_volume_in_mask_ml"] / made.truth["liver_volume_ml"]
    assert 0.25 < share < 0.8


@pytest.mark.parametrize("scanner", FAT_SCANNERS)
def test_the_fat_fraction_in_the_mask_is_the_planted_one(scanner):
    def error(made):
        found = made.images["image"].voxels[made.mask.voxels == 1].mean(dtype=float)
        return abs(found - made.truth["mask_fat_percent_mean"])

    assert error(clean(scanner)) < 0.5
    assert error(scan(scanner)) < 1.0
    fatty = scan(scanner, STEATOTIC)
    assert fatty.truth["steatosis"] == 1 and fatty.truth["mask_fat_percent_mean"] > 5.56
    assert error(fatty) < 1.0
    assert scan(scanner).truth["liver_fat_percent"] != fatty.truth["liver_fat_percent"]


def ellipsoid(grid: imaging.Grid) -> np.ndarray:
    z, y, x = np.meshgrid(*grid.axes, indexing="ij")
    return ((x / 57) ** 2 + (y / 48) ** 2 + (z / 70) ** 2 < 1).astype(np.uint8)


def test_hands_deviate_by_what_the_report_says_and_only_at_the_border():
    grid = imaging.Grid(np.arange(-75.0, 76, 15), np.arange(-60.0, 61, 2), np.arange(-70.0, 71, 2))
    mask = ellipsoid(grid)
    draws = [masks.drawn_by_hand(mask, grid, random_stream(3, number, "hand")) for number in range(300)]
    deviation = np.array([100.0 * (drawn.sum() / mask.sum() - 1) for drawn in draws])
    assert np.abs(deviation).mean() == pytest.approx(1.7, abs=0.2)
    assert abs(deviation.mean()) < 0.4
    depth_mm = ndimage.distance_transform_edt(mask, sampling=(1e3, 2, 2)) + ndimage.distance_transform_edt(
        1 - mask, sampling=(1e3, 2, 2)
    )
    for drawn in draws[:20]:
        assert np.any((drawn == 1) & (mask == 0)) and np.any((drawn == 0) & (mask == 1))
        assert depth_mm[drawn != mask].max() < 9
        assert 2 * (drawn & mask).sum() / (drawn.sum() + mask.sum()) > 0.94
        changed = (drawn != mask).astype(np.uint8)
        _, lumps = ndimage.label(changed)
        assert lumps < 0.5 * changed.sum()  # smooth: neighbours move together
    again = masks.drawn_by_hand(mask, grid, random_stream(3, 0, "hand"))
    assert np.array_equal(again, draws[0])


@pytest.mark.parametrize("scanner", ["philips_volume", "philips_fat"])
def test_contour_jitter_changes_the_mask_and_nothing_else(scanner):
    steady = image_patient(anatomy(1), small(scanner))
    jittered = image_patient(anatomy(1), replace(small(scanner), contour_jitter=True))
    assert np.array_equal(steady.images["image"].voxels, jittered.images["image"].voxels)
    assert np.array_equal(steady.tissues.voxels, jittered.tissues.voxels)
    assert not np.array_equal(steady.mask.voxels, jittered.mask.voxels)
    changed = {name for name in TRUTH if steady.truth[name] != jittered.truth[name]}
    assert "liver_volume_in_mask_ml" in changed
    assert changed <= {"liver_volume_in_mask_ml", "mask_fat_percent_mean"}


@pytest.mark.parametrize("scanner", ["philips_volume", "siemens_fat"])
def test_a_scan_is_the_same_each_time_and_each_number_another(scanner):
    first, again, other = (image_patient(draw_anatomy(SEED, number), small(scanner)) for number in (1, 1, 2))
    for name, volume in (*first.images.items(), ("mask", first.mask), ("tissues", first.tissues)):
        same = again.images.get(name, getattr(again, name, None))
        another = other.images.get(name, getattr(other, name, None))
        assert np.array_equal(volume.voxels, same.voxels) and np.array_equal(volume.affine, same.affine)
        assert not np.array_equal(volume.voxels, another.voxels)
    assert first.truth == again.truth != other.truth


@pytest.fixture
def quick(monkeypatch):
    """The command with coarse protocols, so that it takes a second."""
    for name in ("philips_volume", "siemens_fat"):
        monkeypatch.setitem(PROTOCOLS, name, small(name))


def test_two_simulations_into_one_folder_wait_for_each_other(tmp_path, quick, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    held = (tmp_path / "out/.lock").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    of_the_other = tmp_path / f"out/.partial-0badcafe-{patient_id(SEED, 1)}"
    of_the_other.mkdir()
    taken = fcntl.flock

    def release_and_take(file, how):
        if not how & fcntl.LOCK_NB:  # it would wait: the other simulation ends now, its folder untouched
            of_the_other.rename(tmp_path / "untouched")
            held.close()
        taken(file, how)

    monkeypatch.setattr(fcntl, "flock", release_and_take)
    arguments = ["--scanner", "philips_volume", "--patients", "1", "--seed", str(SEED), "--jobs", "1"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "untouched").is_dir() and "waiting" in capsys.readouterr().err


@pytest.mark.parametrize("scanner", ["philips_volume", "siemens_fat"])
def test_the_command_writes_what_it_promises_and_keeps_what_is_finished(tmp_path, quick, scanner):
    out = tmp_path / "patients"
    command = ["--scanner", scanner, "--seed", str(SEED), "--out", str(out)]
    assert main([*command, "--patients", "1", "--jobs", "1"]) == 0
    first = out / patient_id(SEED, 1)
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    (out / f".partial-0badcafe-{patient_id(SEED, 2)}").mkdir()  # as a killed run leaves it

    assert main([*command, "--patients", "2", "--jobs", "2"]) == 0
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before
    shown = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    assert shown == [patient_id(SEED, 1), patient_id(SEED, 2), "truth.csv"] and not list(out.glob(".partial-*"))
    expected = [PROTOCOLS[scanner].image(SEED, number) for number in (1, 2)]
    for number, made in enumerate(expected, start=1):
        folder = out / patient_id(SEED, number)
        volumes = {**made.images, "mask": made.mask, "tissues": made.tissues}
        assert {path.name for path in folder.iterdir()} == {*(f"{name}.nii.gz" for name in volumes), "truth.json"}
        for name, volume in volumes.items():
            written = read_volume(folder / f"{name}.nii.gz")
            assert np.array_equal(written.voxels, volume.voxels) and written.voxels.dtype == volume.voxels.dtype
            assert np.allclose(written.affine, volume.affine, atol=1e-4)
    with (out / "truth.csv").open(newline="") as stream:
        table = csv.DictReader(stream)
        rows = list(table)
    assert table.fieldnames == ["patient", "scanner", *TRUTH]
    assert [row["patient"] for row in rows] == [patient_id(SEED, 1), patient_id(SEED, 2)]
    for row, made in zip(rows, expected, strict=True):
        assert row["scanner"] == scanner
        for name in TRUTH:
            assert float(row[name]) == pytest.approx(made.truth[name], abs=1e-3)
        mask = nibabel.Nifti1Image.from_filename(out / row["patient"] / "mask.nii.gz")
        in_mask_ml = np.asarray(mask.dataobj).sum() * np.prod(mask.header.get_zooms()) / 1000
        assert float(row["liver_volume_in_mask_ml"]) == pytest.approx(in_mask_ml, rel=1e-5)


def test_a_killed_process_is_one_sentence(tmp_path, quick, monkeypatch, capsys):
    # By value, or the other process would import the module without the change.
    monkeypatch.setattr(simulate, "write_patient", lambda *_, **__: signal.raise_signal(signal.SIGKILL))
    arguments = ["--scanner", "philips_volume", "--patients", "2", "--seed", str(SEED), "--jobs", "2"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Expected processes that end by themselves, received one that was killed" in error and "--jobs" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_contour_jitter_by_the_command_and_never_mixed_with_other_masks(tmp_path, quick, capsys):
    command = ["--scanner", "philips_volume", "--patients", "1", "--seed", str(SEED), "--jobs", "1"]
    assert main([*command, "--out", str(tmp_path), "--contour-jitter"]) == 0
    made = replace(PROTOCOLS["philips_volume"], contour_jitter=True).image(SEED, 1)
    written = read_volume(tmp_path / patient_id(SEED, 1) / "mask.nii.gz")
    assert np.array_equal(written.voxels, made.mask.voxels)
    assert main([*command, "--out", str(tmp_path)]) == 2
    assert "contour_jitter True" in capsys.readouterr().err


def test_contour_jitter_is_refused_where_there_is_none(tmp_path, capsys):
    assert main(["--scanner", "ct_liver", "--patients", "1", "--contour-jitter", "--out", str(tmp_path)]) == 2
    assert "ct_liver" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("scanner_and_version", [("ge_volume", PHANTOM_VERSION), ("philips_volume", 1)])
def test_a_folder_of_another_scanner_or_version_is_refused(tmp_path, capsys, scanner_and_version):
    scanner, version = scanner_and_version
    folder = tmp_path / patient_id(1, 1)
    folder.mkdir()
    row = {"patient": "sim0001-0001", "scanner": scanner, "version": version, "contour_jitter": False, "truth": {}}
    (folder / "truth.json").write_text(json.dumps(row))
    assert main(["--scanner", "philips_volume", "--patients", "1", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert scanner in said and f"version {version}" in said and "truth.json" in said


@pytest.mark.parametrize("content", ["", "[]", "{", "no truth"])
def test_a_damaged_truth_is_one_sentence(tmp_path, capsys, content):
    folder = tmp_path / patient_id(1, 1)
    folder.mkdir()
    if content == "no truth":
        content = json.dumps({"scanner": "philips_volume", "version": PHANTOM_VERSION, "contour_jitter": False})
    (folder / "truth.json").write_text(content)
    assert main(["--scanner", "philips_volume", "--patients", "1", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "Expected" in said and str(folder / "truth.json") in said
    assert (folder / "truth.json").read_text() == content and not (tmp_path / "truth.csv").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--patients", "0"), ("--patients", "-3"), ("--seed", "-1"), ("--jobs", "0"), ("--first", "0")],
)
def test_arguments_out_of_range_exit_2_with_a_sentence(tmp_path, capsys, option, value):
    arguments = {"--scanner": "ge_volume", "--patients": "1", "--out": str(tmp_path), option: value}
    assert main([part for pair in arguments.items() for part in pair]) == 2
    said = capsys.readouterr().err
    assert option[2:] in said and value in said and said.endswith(".\n") and not list(tmp_path.iterdir())


def test_an_unknown_scanner_exits_2_and_names_the_known_ones(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--scanner", "philips", "--patients", "1", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert all(name in said for name in PROTOCOLS)


def test_the_gallery_outlines_what_is_drawn_where_it_lies(tmp_path, monkeypatch):
    panel = gallery.Panel("philips_fat", 1, "image", gallery.HILUM, gallery.OUTLINED)
    monkeypatch.setattr(gallery, "PANELS", ((panel,),))
    monkeypatch.setitem(PROTOCOLS, "philips_fat", replace(small("philips_fat"), pixel_mm=3.0, rows=135, columns=135))
    monkeypatch.setattr(gallery, "SEED", SEED)
    assert gallery.main(["--out", str(tmp_path / "picture.png"), "--jobs", "1"]) == 0
    pixels = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB")).astype(int)
    red_rows, red_columns = np.nonzero((pixels[..., 0] > 1.5 * pixels[..., 1]) & (pixels[..., 0] > 150))
    made = PROTOCOLS["philips_fat"].image(SEED, 1)
    mask, tissues = made.mask.canonical().voxels, made.tissues.canonical().voxels
    liver = np.flatnonzero(np.isin(tissues, WHOLE_LIVER).any(axis=(1, 2)))
    drawn = np.argwhere(mask[round(float(liver[0] + gallery.HILUM * (liver[-1] - liver[0])))])
    # The panel is as many pixels a millimetre in both directions; the outline has the mask's proportions and side.
    tall, wide = np.ptp(drawn, axis=0)
    assert np.ptp(red_rows) / np.ptp(red_columns) == pytest.approx((tall + 1) / (wide + 1), rel=0.1)
    assert red_columns.mean() < 0.5 * pixels.shape[1]  # the liver is on the patient's right: the picture's left
    middle_row = drawn[:, 0].mean() / mask.shape[1]
    shown = 0.5 + (middle_row - 0.5) * mask.shape[1] * 3.0 / gallery.SHOWN_MM[0]
    assert red_rows.mean() / pixels.shape[0] == pytest.approx(shown, abs=0.08)


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "example: python -m lvseg.phantom --scanner philips_volume" in capsys.readouterr().out
