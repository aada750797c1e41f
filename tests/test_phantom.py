"""Simulated patients: anatomy that is where it belongs, scans that are what the protocol says, and the command."""

import csv
from dataclasses import replace
from functools import cache

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from lvseg.formats import read_volume
from lvseg.phantom.__main__ import main
from lvseg.phantom.anatomy import WHOLE_LIVER, Anatomy, Tissue
from lvseg.phantom.patients import draw_anatomy, liver_volume_ml, patient_id
from lvseg.phantom.scanners import SCANNERS, Scan, image_patient

SEED = 11
NOISELESS = replace(SCANNERS["philips_volume"], noise=0.0, shading=0.0)


@cache
def anatomy(number: int) -> Anatomy:
    return draw_anatomy(SEED, number)


@cache
def scan(scanner: str, number: int = 1) -> Scan:
    return image_patient(anatomy(number), SCANNERS[scanner])


@cache
def coarse_map(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Tissues [z, y, x] of a patient every 5 mm, and the positions [z, y, x, 3] in (x, y, z) order."""
    x, y, z = np.arange(-220.0, 221, 5), np.arange(-180.0, 181, 5), np.arange(-160.0, 161, 5)
    where = np.stack(np.meshgrid(z, y, x, indexing="ij")[::-1], axis=-1)
    return anatomy(number).tissues(x, y, z), where


def centroid_mm(number: int, *tissues: Tissue) -> np.ndarray:
    map_, where = coarse_map(number)
    return where[np.isin(map_, tissues)].mean(axis=0)


def volume_ml(number: int, *tissues: Tissue) -> float:
    return float(np.isin(coarse_map(number)[0], tissues).sum()) * 0.125


def in_world_dice(first: Scan, second: Scan) -> float:
    """Dice of two masks where both scans see, the second looked up at the first's voxel centres."""
    inverse = np.linalg.inv(second.mask.affine)
    index = np.moveaxis(np.indices(first.mask.shape), 0, -1)
    there = first.mask.world_mm(index) @ inverse[:3, :3].T + inverse[:3, 3]
    seen = np.all((there > -0.5) & (there < np.array(second.mask.shape) - 0.5), axis=-1)
    other = ndimage.map_coordinates(second.mask.voxels, np.moveaxis(there, -1, 0), order=0, mode="nearest")[seen]
    own = first.mask.voxels[seen]
    return 2.0 * float((own & other).sum()) / float(own.sum() + other.sum())


@pytest.mark.parametrize("number", range(1, 5))
def test_organs_lie_where_they_belong(number):
    liver, spleen = centroid_mm(number, *WHOLE_LIVER), centroid_mm(number, Tissue.SPLEEN)
    spine, lung = centroid_mm(number, Tissue.DISC, Tissue.MARROW), centroid_mm(number, Tissue.LUNG)
    assert liver[0] < spine[0] - 30 and spleen[0] > spine[0] + 40
    assert spine[1] > liver[1] + 20 and spleen[1] > liver[1]
    assert lung[2] > liver[2] + 50
    assert centroid_mm(number, Tissue.HEART, Tissue.BLOOD)[2] > centroid_mm(number, Tissue.KIDNEY)[2]
    map_, where = coarse_map(number)
    kidneys = where[map_ == Tissue.KIDNEY]
    assert (kidneys[:, 0] < spine[0] - 25).sum() > 100 and (kidneys[:, 0] > spine[0] + 25).sum() > 100


@pytest.mark.parametrize("number", range(1, 5))
def test_a_body_holds_every_tissue_in_plausible_amounts(number):
    assert set(np.unique(coarse_map(number)[0])) == set(Tissue)
    assert 40 < volume_ml(number, Tissue.SPLEEN) < 500
    assert 120 < volume_ml(number, Tissue.KIDNEY, Tissue.KIDNEY_MEDULLA) < 600
    assert 4 < volume_ml(number, Tissue.GALLBLADDER) < 100
    vessels, parenchyma = volume_ml(number, Tissue.HEPATIC_VESSEL), volume_ml(number, Tissue.LIVER)
    assert 0.003 < vessels / parenchyma < 0.08


@pytest.mark.parametrize("number", range(1, 5))
def test_the_liver_is_one_piece_between_lung_and_abdomen(number):
    liver = np.isin(coarse_map(number)[0], WHOLE_LIVER)
    pieces, _ = ndimage.label(liver)
    assert np.bincount(pieces.ravel())[1:].max() > 0.99 * liver.sum()
    shell = ndimage.binary_dilation(liver, iterations=2) & ~liver
    neighbours = set(np.unique(coarse_map(number)[0][shell]))
    assert {Tissue.LUNG, Tissue.MUSCLE, Tissue.VISCERAL_FAT, Tissue.BLOOD} <= neighbours


def test_liver_volumes_vary_as_in_adults():
    drawn = [draw_anatomy(3, number) for number in range(1, 13)]
    volumes = np.array([liver_volume_ml(patient, step_mm=5.0) for patient in drawn])
    assert np.all((volumes > 0.75 * 1000) & (volumes < 3.6 * 1000))
    assert 1100 < np.median(volumes) < 2000
    assert np.std(np.log(volumes)) > 0.12
    assert np.allclose(volumes, [patient.target_liver_ml for patient in drawn], rtol=0.05)


def test_a_patient_is_the_same_each_time_and_each_number_another():
    again = image_patient(draw_anatomy(SEED, 1), SCANNERS["philips_volume"])
    first = scan("philips_volume")
    for name in ("image", "mask", "tissues"):
        assert np.array_equal(getattr(again, name).voxels, getattr(first, name).voxels)
        assert np.array_equal(getattr(again, name).affine, getattr(first, name).affine)
    assert not np.array_equal(coarse_map(1)[0], coarse_map(2)[0])
    assert not np.array_equal(coarse_map(1)[0], draw_anatomy(SEED + 1, 1).tissues(*(np.arange(-60.0, 60, 5),) * 3))


def test_the_map_does_not_depend_on_the_grid_it_is_asked_on():
    x, y, z = np.arange(-100.0, 0, 4), np.arange(-80.0, 80, 4), np.arange(-60.0, 60, 4)
    whole = anatomy(1).tissues(x, y, z)
    assert np.array_equal(whole[5:9, 3:30:3, 4::2], anatomy(1).tissues(x[4::2], y[3:30:3], z[5:9]))


@pytest.mark.parametrize(
    ("scanner", "slices", "spacing_mm"), [("philips_volume", 55, (5, 2, 2)), ("ge_volume", 28, (5, 1.5, 1.5))]
)
def test_scans_have_the_geometry_of_the_report(scanner, slices, spacing_mm):
    made = scan(scanner)
    assert made.image.shape[0] == slices
    assert made.image.spacing_mm == pytest.approx(spacing_mm)
    assert (made.image.voxels.dtype, made.mask.voxels.dtype, made.tissues.voxels.dtype) == (
        np.int16,
        np.uint8,
        np.uint8,
    )
    for other in (made.mask, made.tissues):
        assert other.shape == made.image.shape and np.array_equal(other.affine, made.image.affine)


def test_scanners_store_their_axes_in_different_directions():
    directions = {name: np.sign(scan(name).image.affine[[2, 1, 0], [0, 1, 2]]).tolist() for name in SCANNERS}
    assert directions == {"philips_volume": [1, 1, 1], "ge_volume": [-1, -1, -1]}


@pytest.mark.parametrize("scanner", SCANNERS)
def test_labels_are_the_tissue_at_the_voxel_centre(scanner):
    made = scan(scanner)
    assert np.array_equal(made.mask.voxels == 1, np.isin(made.tissues.voxels, WHOLE_LIVER))
    for index in np.argwhere(made.mask.voxels)[::4001]:
        position = made.mask.world_mm(index)
        assert anatomy(1).tissues(*position[:, None]).item() == made.tissues.voxels[tuple(index)]


def test_both_scanners_see_the_same_anatomy():
    assert in_world_dice(scan("philips_volume"), scan("ge_volume")) > 0.95


def test_contrast_and_scale_differ_between_scanners():
    means = {}
    for name in SCANNERS:
        made = scan(name)
        means[name] = {tissue: made.image.voxels[made.tissues.voxels == tissue].mean() for tissue in Tissue}
    philips, ge = means["philips_volume"], means["ge_volume"]
    assert philips[Tissue.LIVER] > 1.1 * philips[Tissue.SPLEEN] and ge[Tissue.LIVER] < ge[Tissue.SPLEEN]
    assert philips[Tissue.BLOOD] < philips[Tissue.LIVER] and ge[Tissue.BLOOD] > 1.2 * ge[Tissue.LIVER]
    assert ge[Tissue.LIVER] > 2 * philips[Tissue.LIVER]
    for signal in means.values():
        assert signal[Tissue.FAT] < 0.4 * signal[Tissue.MUSCLE]
        assert signal[Tissue.AIR] < 0.2 * signal[Tissue.LIVER]


@pytest.mark.parametrize("scanner", SCANNERS)
def test_intensity_alone_does_not_separate_the_liver(scanner):
    made = scan(scanner)
    image, liver = made.image.voxels, made.mask.voxels == 1
    windows = [np.percentile(image[liver], ends) for ends in ((1, 100), (3, 100), (3, 97), (10, 100), (10, 90))]
    chosen = [(image >= low) & (image <= high) for low, high in windows]
    dice = [2 * (window & liver).sum() / (window.sum() + liver.sum()) for window in chosen]
    assert 0.3 < max(dice) < 0.92


def test_air_holds_rayleigh_noise_that_is_not_shared_between_slices():
    protocol, made = SCANNERS["philips_volume"], scan("philips_volume")
    corner = made.image.voxels[:, :12, :12].astype(float)
    assert np.all(made.tissues.voxels[:, :12, :12] == Tissue.AIR)
    noise_sd = protocol.noise * protocol.liver_intensity
    assert corner.mean() == pytest.approx(noise_sd * np.sqrt(np.pi / 2), rel=0.03)
    assert corner.std() == pytest.approx(noise_sd * np.sqrt(2 - np.pi / 2), rel=0.04)
    assert abs(np.corrcoef(corner[10].ravel(), corner[11].ravel())[0, 1]) < 0.25


@cache
def noiseless() -> np.ndarray:
    return image_patient(anatomy(1), NOISELESS).image.voxels.astype(float)


def test_coils_shade_the_scan_smoothly():
    shaded = image_patient(anatomy(1), replace(NOISELESS, shading=0.4)).image.voxels.astype(float)
    even = noiseless()
    ratio = np.divide(shaded, even, out=np.full_like(even, np.nan), where=even > 150)
    assert np.nanmax(ratio) / np.nanmin(ratio) > 1.2
    assert np.nanmax(np.abs(np.diff(ratio, axis=2))) < 0.05


def test_voxels_on_a_border_between_slices_hold_both_tissues():
    tissues, image = scan("philips_volume").tissues.voxels, noiseless()
    border = (tissues[:-1] == Tissue.VISCERAL_FAT) & (tissues[1:] == Tissue.LIVER)
    liver, fat = np.median(image[tissues == Tissue.LIVER]), np.median(image[tissues == Tissue.VISCERAL_FAT])
    share = (np.stack([image[:-1][border], image[1:][border]]) - fat) / (liver - fat)
    assert np.mean((share > 0.3) & (share < 0.7)) > 0.15


@pytest.mark.parametrize("scanner", SCANNERS)
def test_true_volume_and_mask_agree_with_a_fine_count(scanner):
    made = scan(scanner)
    liver = np.argwhere(made.mask.voxels)
    corners = made.mask.world_mm([liver.min(axis=0) - 4, liver.max(axis=0) + 4])
    ends = np.sort(made.mask.world_mm([[-0.5, 0, 0], [made.mask.shape[0] - 0.5, 0, 0]])[:, 2])
    x, y = (np.arange(corners[:, axis].min(), corners[:, axis].max(), 2.3) for axis in (0, 1))
    z = np.linspace(ends[0], ends[1], 121)
    z = 0.5 * (z[1:] + z[:-1])
    count = np.isin(anatomy(1).tissues(x, y, z), WHOLE_LIVER).sum()
    fine_ml = count * 2.3 * 2.3 * (z[1] - z[0]) / 1000
    assert made.liver_volume_ml == pytest.approx(fine_ml, rel=0.01)
    assert made.mask.voxels.sum() * made.mask.voxel_volume_mm3 / 1000 == pytest.approx(fine_ml, rel=0.02)
    assert made.whole_liver_ml >= 0.995 * made.liver_volume_ml


def test_the_command_writes_what_it_promises_and_keeps_what_is_finished(tmp_path):
    out = tmp_path / "patients"
    command = ["--scanner", "philips_volume", "--seed", str(SEED), "--out", str(out)]
    assert main([*command, "--patients", "1", "--jobs", "1"]) == 0
    first = out / patient_id(SEED, 1)
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    (out / f".partial-0badcafe-{patient_id(SEED, 2)}").mkdir()  # as a killed run leaves it

    assert main([*command, "--patients", "2", "--jobs", "2"]) == 0
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before
    assert sorted(path.name for path in out.iterdir()) == [patient_id(SEED, 1), patient_id(SEED, 2), "truth.csv"]
    for number in (1, 2):
        expected = scan("philips_volume", number)
        for name in ("image", "mask", "tissues"):
            written = read_volume(out / patient_id(SEED, number) / f"{name}.nii.gz")
            assert np.array_equal(written.voxels, getattr(expected, name).voxels)
            assert written.voxels.dtype == getattr(expected, name).voxels.dtype
            assert np.allclose(written.affine, getattr(expected, name).affine, atol=1e-4)
    with (out / "truth.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["patient"] for row in rows] == [patient_id(SEED, 1), patient_id(SEED, 2)]
    for number, row in enumerate(rows, start=1):
        assert row["scanner"] == "philips_volume"
        made = scan("philips_volume", number)
        assert float(row["liver_volume_ml"]) == pytest.approx(made.liver_volume_ml, abs=0.01)
        assert float(row["whole_liver_ml"]) == pytest.approx(made.whole_liver_ml, abs=0.01)
        mask = nibabel.Nifti1Image.from_filename(out / row["patient"] / "mask.nii.gz")
        in_mask_ml = np.asarray(mask.dataobj).sum() * np.prod(mask.header.get_zooms()) / 1000
        assert float(row["liver_volume_in_mask_ml"]) == pytest.approx(in_mask_ml, abs=0.01)


def test_a_folder_of_another_scanner_is_refused(tmp_path, capsys):
    folder = tmp_path / patient_id(1, 1)
    folder.mkdir()
    (folder / "truth.json").write_text('{"patient": "sim0001-0001", "scanner": "ge_volume", "version": 1}')
    assert main(["--scanner", "philips_volume", "--patients", "1", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "ge_volume" in said and "truth.json" in said


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
    assert all(name in said for name in SCANNERS)


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "example: python -m lvseg.phantom --scanner philips_volume" in capsys.readouterr().out
