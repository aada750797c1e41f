"""Simulated anatomy: organs that are where they belong, in the amounts that people have."""

from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from lvseg.phantom.anatomy import WHOLE_LIVER, Anatomy, Tissue
from lvseg.phantom.patients import draw_anatomy, drawn_liver_fat_percent, drawn_liver_ml, liver_volume_ml

SEED = 11
FOUND_IN_SOME = {Tissue.CYST, Tissue.LESION, Tissue.FOCAL_FAT}
NEVER_FOUND = {Tissue.FREE_FLUID}  # but in varied patients
# Drawn on purpose: patients of this seed whose livers hold each of them.
PATIENTS = range(1, 5)


@cache
def anatomy(number: int) -> Anatomy:
    return draw_anatomy(SEED, number)


@cache
def coarse_map(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Tissues [z, y, x] of a patient every 4 mm, and the positions [z, y, x, 3] in (x, y, z) order."""
    x, y, z = np.arange(-240.0, 241, 4), np.arange(-180.0, 181, 4), np.arange(-160.0, 161, 4)
    where = np.stack(np.meshgrid(z, y, x, indexing="ij")[::-1], axis=-1)
    return anatomy(number).tissues(x, y, z), where


def centroid_mm(number: int, *tissues: Tissue) -> np.ndarray:
    map_, where = coarse_map(number)
    return where[np.isin(map_, tissues)].mean(axis=0)


def volume_ml(number: int, *tissues: Tissue) -> float:
    return float(np.isin(coarse_map(number)[0], tissues).sum()) * 0.064


@pytest.mark.parametrize("number", PATIENTS)
def test_organs_lie_where_they_belong(number):
    liver, spleen = centroid_mm(number, *WHOLE_LIVER), centroid_mm(number, Tissue.SPLEEN)
    spine, lung = centroid_mm(number, Tissue.DISC, Tissue.MARROW), centroid_mm(number, Tissue.LUNG)
    assert liver[0] < spine[0] - 30 and spleen[0] > spine[0] + 40
    assert spine[1] > liver[1] + 20 and spleen[1] > liver[1]
    assert lung[2] > liver[2] + 50
    assert centroid_mm(number, Tissue.HEART)[2] > centroid_mm(number, Tissue.KIDNEY)[2]
    map_, where = coarse_map(number)
    kidneys = where[map_ == Tissue.KIDNEY]
    assert (kidneys[:, 0] < spine[0] - 25).sum() > 100 and (kidneys[:, 0] > spine[0] + 25).sum() > 100
    level = (where[..., 2] > -80) & (where[..., 2] < -20)
    aorta, cava = (where[level & (map_ == tissue)][:, 0] for tissue in (Tissue.BLOOD, Tissue.VENOUS_BLOOD))
    assert np.median(cava) < np.median(aorta) - 15  # the cava lies to the right of the aorta


@pytest.mark.parametrize("number", PATIENTS)
def test_a_body_holds_every_tissue_in_plausible_amounts(number):
    """Ranges are those of adults, widened for a grid of 4 mm."""
    assert set(np.unique(coarse_map(number)[0])) | FOUND_IN_SOME == set(Tissue) - NEVER_FOUND
    assert 40 < volume_ml(number, Tissue.SPLEEN) < 500
    assert 120 < volume_ml(number, Tissue.KIDNEY, Tissue.KIDNEY_MEDULLA) < 600
    assert 4 < volume_ml(number, Tissue.GALLBLADDER) < 100
    vessels = volume_ml(number, Tissue.HEPATIC_VESSEL, Tissue.PORTAL_VESSEL)
    assert 0.003 < vessels / volume_ml(number, *WHOLE_LIVER) < 0.08


@pytest.mark.parametrize("number", PATIENTS)
def test_the_liver_is_one_piece_between_lung_and_abdomen(number):
    liver = np.isin(coarse_map(number)[0], WHOLE_LIVER)
    pieces, _ = ndimage.label(liver)
    assert np.bincount(pieces.ravel())[1:].max() > 0.99 * liver.sum()
    shell = ndimage.binary_dilation(liver, iterations=2) & ~liver
    neighbours = set(np.unique(coarse_map(number)[0][shell]))
    assert {Tissue.LUNG, Tissue.MUSCLE, Tissue.VISCERAL_FAT, Tissue.VENOUS_BLOOD} <= neighbours


@pytest.mark.parametrize("number", PATIENTS)
def test_skin_encloses_the_body_and_fat_lies_under_it(number):
    map_, _ = coarse_map(number)
    body = map_ != Tissue.AIR
    assert not body[:, [0, -1]].any() and not body[:, :, [0, -1]].any()
    for plane, inside in zip(map_[::8], body[::8], strict=True):
        pieces, _ = ndimage.label(inside)
        assert np.bincount(pieces.ravel())[1:].max() > 0.999 * inside.sum()
        rim = inside & ~ndimage.binary_erosion(inside, iterations=4)
        below = plane[rim & (plane != Tissue.SKIN)]
        assert np.mean(below == Tissue.FAT) > 0.5


def test_planes_of_fat_divide_the_muscles_of_the_wall():
    fine = np.arange(-200.0, 200.0, 1.0)
    plane = anatomy(1).tissues(fine, fine, [-120.0])[0]
    row = plane[np.argmin(np.abs(fine - 0.0))]  # through the middle of the flank, from the patient's right
    order = [tissue for tissue, before in zip(row[1:], row, strict=False) if tissue != before]
    wall = order[: order.index(Tissue.VISCERAL_FAT)]
    assert wall == [
        Tissue.SKIN, Tissue.FAT, Tissue.MUSCLE, Tissue.INTERMUSCULAR_FAT, Tissue.MUSCLE,
        Tissue.INTERMUSCULAR_FAT, Tissue.MUSCLE,
    ]  # fmt: skip


def test_findings_replace_liver_alone_and_are_there_in_some():
    have = dict.fromkeys(FOUND_IN_SOME, 0)
    for number in range(1, 61):
        patient = draw_anatomy(5, number)
        for tissue in FOUND_IN_SOME:
            organs = [organ for organ in patient.organs if organ.shells[-1][1] == tissue]
            assert all(organ.only_in == Tissue.LIVER for organ in organs)
            have[tissue] += bool(organs)
    assert 4 <= have[Tissue.CYST] <= 22 and 1 <= have[Tissue.LESION] <= 16 and 2 <= have[Tissue.FOCAL_FAT] <= 18


def test_liver_volumes_vary_as_in_adults():
    drawn = [draw_anatomy(3, number) for number in range(1, 13)]
    volumes = np.array([liver_volume_ml(patient, step_mm=5.0) for patient in drawn])
    assert np.allclose(volumes, [patient.target_liver_ml for patient in drawn], rtol=0.05)
    many = np.array([drawn_liver_ml(3, number) for number in range(2000)])
    assert many.min() >= 800 and many.max() <= 3500
    assert np.median(many) == pytest.approx(1500, rel=0.03)
    assert np.std(np.log(many)) == pytest.approx(0.28, rel=0.06)


def test_a_quarter_of_the_livers_are_fatty():
    percents = np.array([drawn_liver_fat_percent(3, number) for number in range(4000)])
    liver, focal = percents.T
    assert np.mean(liver > 5.56) == pytest.approx(0.25, abs=0.025)
    assert np.median(liver) == pytest.approx(3.0, rel=0.06) and liver.max() <= 45
    assert np.all(focal > liver + 7.9) and focal.max() <= 65
    assert anatomy(1).liver_fat_percent == drawn_liver_fat_percent(SEED, 1)[0]


def test_the_map_does_not_depend_on_the_grid_it_is_asked_on():
    x, y, z = np.arange(-100.0, 0, 4), np.arange(-80.0, 80, 4), np.arange(-60.0, 60, 4)
    whole = anatomy(1).tissues(x, y, z)
    assert np.array_equal(whole[5:9, 3:30:3, 4::2], anatomy(1).tissues(x[4::2], y[3:30:3], z[5:9]))
    wide = np.arange(-400.0, 400.0, 4)
    assert np.array_equal(anatomy(1).tissues(wide, wide, z)[:, 80:120, 75:100], whole)
    assert not anatomy(1).tissues(wide[:10], wide[:10], z).any()  # far from the body is air
