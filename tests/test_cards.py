"""Cards: every public layout read to the right voxels and labels, and one sentence for everything else."""

import errno
import json
import os
import shutil
from pathlib import Path

import dataset_trees as trees
import dicom_files
import nibabel
import numpy as np
import pytest
import yaml
from small_study import ROOT, command, scan, write_card

from lvseg import prepare
from lvseg.cards import Card, find_scans, load_card, masks_without_scans, read_image, read_labels, survey
from lvseg.config import Data, load_experiment
from lvseg.errors import InputError
from lvseg.formats import write_volume

PUBLIC = {
    "chaos_mr_inphase": (trees.chaos_mr, "raw/chaos/Train_Sets/MR"),
    "chaos_ct": (trees.chaos_ct, "raw/chaos/Train_Sets/CT"),
    "amos_mr": (lambda root: trees.amos(root)["amos_mr"], "raw/amos22"),
    "amos_ct": (lambda root: trees.amos(root)["amos_ct"], "raw/amos22"),
    "lits": (trees.lits, "raw/lits"),
    "totalsegmentator_mr": (trees.totalsegmentator_mr, "raw/totalsegmentator_mr"),
    "duke_liver": (trees.duke_liver, "raw/duke_liver/Segmentation"),
}


def shipped(name: str, folder: Path) -> Path:
    """The project's card in a data folder of the test's own."""
    folder.mkdir(exist_ok=True)
    return Path(shutil.copy(ROOT / f"data/{name}.yaml", folder))


@pytest.mark.parametrize(("modality", "other"), [("MR", "CT"), ("CT", "MR")])
def test_a_scan_whose_file_says_another_modality_than_its_card_is_refused(tmp_path, modality, other):
    """By the card's it is windowed in training, by the file's in use."""
    series = dicom_files.save(tmp_path / "raw/p1/image", dicom_files.series(np.eye(3), Modality=other))
    path = write_card(tmp_path, "own", root="../raw", image="{patient}/image", modality=modality)
    (tmp_path / "raw/p1/organs.nii.gz").write_bytes(b"")
    (one,) = find_scans(*load_card(path))
    with pytest.raises(InputError, match=f"of the card set_own, {modality}, received {other} in .*p1/image") as error:
        read_image(one)
    assert error.value.code == "BAD_CONFIG"
    dicom_files.save(series, dicom_files.series(np.eye(3), Modality=modality))
    assert read_image(one).metadata["modality"] == modality


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_dataset_is_read_as_it_is_distributed(tmp_path, name):
    make, root = PUBLIC[name]
    card = shipped(name, tmp_path / "data")
    expected = make(tmp_path / "data" / root)
    found = find_scans(*load_card(card))
    assert [(each.patient, each.study) for each in found] == sorted(expected)
    for each in found:
        image = read_image(each)
        wanted_image, wanted_liver = expected[each.patient, each.study]
        np.testing.assert_array_equal(image.canonical().voxels, wanted_image)
        assert image.canonical().spacing_mm == pytest.approx(trees.SPACING_MM)
        labels = read_labels(each, image)
        assert labels.shape == image.shape and labels.voxels.dtype == np.uint8
        np.testing.assert_array_equal(labels.canonical().voxels, wanted_liver)


def test_a_public_pair_becomes_its_fat_fraction(tmp_path):
    """Opposed phase at 3/4 of in phase: a quarter of the signal is missing, so fat is an eighth of it."""
    card = shipped("chaos_mr_fat", tmp_path / "data")
    expected = trees.chaos_mr(tmp_path / "data/raw/chaos/Train_Sets/MR")
    for each in find_scans(*load_card(card)):
        image = read_image(each)
        in_phase, liver = expected[each.patient, each.study]
        inside = in_phase > 0
        np.testing.assert_allclose(image.canonical().voxels[inside], 12.5, atol=0.5)
        assert image.metadata["units"] == "percent" and "fat_fraction" in image.metadata
        np.testing.assert_array_equal(read_labels(each, image).canonical().voxels, liver)


def test_public_datasets_become_shards_and_several_series_of_a_person_stay_one_patient(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    names = ["chaos_mr_inphase", "duke_liver", "totalsegmentator_mr"]
    for name in names:
        shipped(name, folder)
        PUBLIC[name][0](folder / PUBLIC[name][1])
    monkeypatch.chdir(tmp_path)
    data = Data(datasets=[f"data/{name}.yaml" for name in names], shards="shards", spacing_mm=[4.0, 4.0], size=32,
                folds=2, test_fraction=0.0)  # fmt: skip
    sets = prepare.prepare(data, jobs=1)
    assert [len(shards.rows) for shards in sets] == [2, 3, 2]
    duke = sets[1]
    assert [row["patient"] for row in duke.rows] == ["duke-0001", "duke-0001", "duke-0044"]
    assert len(duke.files(["duke-0001"])) == 2
    (tmp_path / "folds.yaml").write_text("folds: [[chaos-mr-13, duke-0044], [totalsegmentator-s0003]]")
    named = {"test_patients": ["duke-0001", "chaos-mr-1", "totalsegmentator-s0001"], "folds_file": "folds.yaml"}
    parts = prepare.split(Data(**{**data.model_dump(), **named}), sets)
    assert "duke-0001" in parts.test and "duke-0001" not in parts.train + parts.validation


def test_a_real_series_with_labels_in_another_orientation(real_data, tmp_path):
    """A compressed CT series, its organs on NIfTI's axes: the labels lie where nibabel says they do."""
    card = write_card(tmp_path, "ct", root=str(real_data), image="{patient}_dicom_series", labels={"liver": [5]},
                      mask="{patient}_dicom_series_organs.nii.gz", modality="CT")  # fmt: skip
    (found,) = find_scans(*load_card(card))
    image = read_image(found)
    labels = read_labels(found, image)
    assert found.patient == "ct" and image.spacing_mm[0] == pytest.approx(2.0, abs=1e-3)
    stored = nibabel.load(real_data / "ct_dicom_series_organs.nii.gz")
    where = np.argwhere(np.asarray(stored.dataobj) == 5)
    world_ras = nibabel.affines.apply_affine(stored.affine, where).mean(axis=0)
    assert len(where) > 1000 and (labels.voxels == 1).sum() == len(where)
    own_lps = image.world_mm(np.argwhere(labels.voxels == 1)).mean(axis=0)
    np.testing.assert_allclose(own_lps * [-1, -1, 1], world_ras, atol=0.01)


def test_every_shipped_card_is_valid_and_says_its_licence_and_where_it_is_told_about():
    text = (ROOT / "data/README.md").read_text(encoding="utf-8")
    cards = {path: load_card(path)[0] for path in sorted((ROOT / "data").glob("*.yaml"))}
    for path, card in cards.items():
        assert card.name == path.stem and path.name in text
        assert card.spacing_mm is not None and card.licence and card.citation
    simulated = {card.name: card.simulate for card in cards.values() if card.simulate is not None}
    assert 0 < len(simulated) == len({each.seed for each in simulated.values()})
    for name, card in ((card.name, card) for card in cards.values() if card.name in simulated):
        assert card.scanner == card.simulate.scanner == name.removeprefix("phantom_")
    trained = [
        yaml.safe_load(path.read_text(encoding="utf-8"))["data"]["datasets"] for path in ROOT.glob("experiments/*.yaml")
    ]
    assert not any("siemens" in dataset for datasets in trained for dataset in datasets)


def test_the_walk_through_for_a_study_of_ones_own_works_as_written(tmp_path):
    blocks = trees.readme_blocks(ROOT / "data/README.md")
    for name in ("data/trial7.yaml", "experiments/trial7.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(blocks[name].replace("/studies", str(tmp_path / "studies")))
    for number in range(6):
        for visit in ("week00", "week12"):
            image, liver, _ = trees.body(10 * number + (visit == "week12"))
            folder = tmp_path / f"studies/trial7/P{number:03d}/{visit}"
            trees.write_dicom(folder / "dixon_water", [f"{index:03d}" for index in range(len(image))], image)
            trees.write_nifti(folder / "liver.nii.gz", (liver * 3).astype(np.uint8), (-1, 1, 1))
    commands = [line for line in blocks["sh"].splitlines() if line.startswith("python -m lvseg.prepare")]
    assert len(commands) == 2
    for line in commands:
        done = command(tmp_path, *line.split("#")[0].split()[2:], "--jobs", 1)
        assert done.returncode == 0, done.stderr
    (page,) = (tmp_path / "data/shards").glob("trial7-*/summary.html")
    assert "P005" in page.read_text(encoding="utf-8")
    template = yaml.safe_load((ROOT / "data/my_study.yaml").read_text(encoding="utf-8"))
    assert set(template) <= set(Card.model_fields) and set(yaml.safe_load(blocks["data/trial7.yaml"])) <= set(template)


def two_patients(folder: Path, image: str = "image.nii.gz", mask: str = "mask.nii.gz") -> None:
    for number, patient in enumerate(("p1", "p2")):
        image_volume, mask_volume = scan("a", number)
        (folder / patient).mkdir(parents=True)
        write_volume(image_volume, folder / patient / image)
        write_volume(mask_volume, folder / patient / mask)


FAT = {"task": "fatfraction", "kind": "fat_fraction"}


def card_of(tmp_path, **changes):
    keys = {"root": "../raw", "mask": "{patient}/mask.nii.gz", "labels": {"organ": [1]}}
    return load_card(write_card(tmp_path, "a", **{**keys, **changes}))


def refused(tmp_path, *words, code=None, **changes):
    with pytest.raises(InputError) as error:
        find_scans(*card_of(tmp_path, **changes))
    assert all(word in error.value.sentence for word in words), error.value.sentence
    assert code is None or error.value.code == code


def test_a_wildcard_finds_what_differs_from_patient_to_patient(tmp_path):
    two_patients(tmp_path / "raw")
    for patient, day in (("p1", "20250102"), ("p2", "20250304")):
        (tmp_path / "raw" / patient / f"scan_{day}").mkdir()
        for name in ("image", "mask"):
            (tmp_path / "raw" / patient / f"{name}.nii.gz").rename(
                tmp_path / f"raw/{patient}/scan_{day}/{day[-1]}-{name}.nii.gz"
            )
    found = find_scans(
        *card_of(tmp_path, image="{patient}/scan_*/?-image.nii.gz", mask="{patient}/scan_*/*mask.nii.gz")
    )
    assert [each.mask.parent.name for each in found] == ["scan_20250102", "scan_20250304"]


def test_preparing_says_how_many_masks_have_no_scan_and_which_shards_are_left_over(tmp_path, monkeypatch, capsys):
    two_patients(tmp_path / "raw")
    card_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    data = Data(datasets=["cards/a.yaml"], shards="shards", spacing_mm=[4.0, 4.0], size=32)
    prepare.prepare(data, jobs=1)
    # A line of progress, "preparing set_a: 1 of 2", may be there on a busy machine.
    assert not [line for line in capsys.readouterr().err.splitlines() if line.startswith("set_a: ")]
    (tmp_path / "raw/p2/image.nii.gz").rename(tmp_path / "raw/p2/Image.nii.gz")
    assert len(prepare.prepare(data, jobs=1)[0].rows) == 1
    masks, shards = (line for line in capsys.readouterr().err.splitlines() if " are " in line or " have " in line)
    assert "1 masks have no scan" in masks and masks.endswith("p2/mask.nii.gz")
    assert "1 shards are of scans" in shards and "p2+1.tfrecord" in shards


@pytest.fixture
def closed(monkeypatch):
    """Takes the rights to what lies in folders away, from root too."""

    def close(*folders):
        def denying(function):
            def own(path=".", *args, **kwargs):
                inside = not isinstance(path, int) and any(folder in Path(path).parents for folder in folders)
                if inside or (function is not stat and path in (*folders, *map(str, folders))):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
                return function(path, *args, **kwargs)

            return own

        stat = Path.stat
        for owner, name in ((os, "scandir"), (os, "listdir"), (Path, "stat")):
            monkeypatch.setattr(owner, name, denying(getattr(owner, name)))

    return close


@pytest.mark.parametrize("image", ["{patient}/image.nii.gz", "{patient}/image*"])
@pytest.mark.parametrize("changes", [{}, {"unlabelled": "skip"}, {"patients": ["p1", "p2"]}, {"patient_pattern": "p."}])
def test_a_patient_whose_folder_may_not_be_read_is_not_passed_over(tmp_path, closed, image, changes):
    two_patients(tmp_path / "raw")
    closed(tmp_path / "raw/p2")
    with pytest.raises(PermissionError, match="raw/p2"):
        find_scans(*card_of(tmp_path, root=str(tmp_path / "raw"), image=image, **changes))


@pytest.mark.parametrize("changes", [{"patients": ["p1", "p2"]}, {"patient_pattern": "p."}])
def test_a_folder_that_may_not_be_read_and_is_no_patients_is_left_alone(tmp_path, closed, changes):
    two_patients(tmp_path / "raw")
    (tmp_path / "raw/lost+found").mkdir()
    closed(tmp_path / "raw/lost+found")
    found = find_scans(*card_of(tmp_path, root=str(tmp_path / "raw"), **changes))
    assert [each.patient for each in found] == ["p1", "p2"]


def test_a_link_to_a_scan_that_is_not_there_is_not_passed_over(tmp_path):
    """As data sets under DataLad have them before the files are fetched."""
    two_patients(tmp_path / "raw")
    for name in ("image.nii.gz", "mask.nii.gz"):
        (tmp_path / "raw/p2" / name).unlink()
        (tmp_path / "raw/p2" / name).symlink_to("../fetched/none")
    found = find_scans(*card_of(tmp_path))
    assert [each.patient for each in found] == ["p1", "p2"]
    with pytest.raises(InputError, match=r"p2/image\.nii\.gz"):
        read_image(found[1])


@pytest.mark.parametrize("image", ["./{patient}/dixon", "{patient}/dixon/", "{patient}//dixon"])
def test_a_path_may_be_spelt_as_people_spell_it(tmp_path, image):
    two_patients(tmp_path / "raw")
    for patient in ("p1", "p2"):
        (tmp_path / "raw" / patient / "dixon").mkdir()
    found = find_scans(*card_of(tmp_path, image=image, mask="./{patient}/mask.nii.gz"))
    assert [each.image.name for each in found] == ["dixon"] * 2


def test_two_matches_for_one_patient_are_an_error_that_lists_them(tmp_path):
    two_patients(tmp_path / "raw")
    shutil.copy(tmp_path / "raw/p2/mask.nii.gz", tmp_path / "raw/p2/mask_old.nii.gz")
    refused(tmp_path, "p2", "mask.nii.gz", "mask_old.nii.gz", "key mask of card set_a", code="AMBIGUOUS_PATH",
            mask="{patient}/mask*.nii.gz")  # fmt: skip
    shutil.copy(tmp_path / "raw/p1/image.nii.gz", tmp_path / "raw/p1/image2.nii.gz")
    refused(tmp_path, "p1", "image2.nii.gz", "key image of card set_a", code="AMBIGUOUS_PATH",
            image="{patient}/image*.nii.gz")  # fmt: skip


def test_brackets_and_braces_in_names_are_names(tmp_path):
    two_patients(tmp_path / "raw")
    (tmp_path / "raw/p1").rename(tmp_path / "raw/p[1]")
    (tmp_path / "raw").rename(tmp_path / "raw[a]")
    found = find_scans(*card_of(tmp_path, root="../raw[a]"))
    assert [each.patient for each in found] == ["p2", "p[1]"]
    assert all(each.mask.exists() and each.mask.parent.name == each.patient for each in found)


def test_scans_without_masks_are_an_error_or_left_out_and_counted(tmp_path):
    two_patients(tmp_path / "raw")
    (tmp_path / "raw/p1/mask.nii.gz").unlink()
    refused(tmp_path, "p1/mask.nii.gz", "key mask of card set_a", code="NOT_FOUND")
    scans, unlabelled = survey(*card_of(tmp_path, unlabelled="skip"))
    assert [each.patient for each in scans] == ["p2"]
    assert [path.parent.name for path in unlabelled] == ["p1"]
    (tmp_path / "raw/p2/mask.nii.gz").unlink()
    refused(tmp_path, "2 without masks", code="NOT_FOUND", unlabelled="skip")


def test_preparing_says_how_many_scans_have_no_mask(tmp_path, monkeypatch, capsys):
    two_patients(tmp_path / "raw")
    (tmp_path / "raw/p1/mask.nii.gz").unlink()
    card_of(tmp_path, unlabelled="skip")
    monkeypatch.chdir(tmp_path)
    (shards,) = prepare.prepare(
        Data(datasets=["cards/a.yaml"], shards="shards", spacing_mm=[4.0, 4.0], size=32), jobs=1
    )
    assert "1 of 2 scans" in capsys.readouterr().err
    assert json.loads((shards.folder / "manifest.json").read_text(encoding="utf-8"))["unlabelled"] == [
        "p1/image.nii.gz"
    ]


@pytest.mark.parametrize(
    ("name", "text", "keys"),
    [
        ("who.txt", "# the first site\np2\n\n", {}),
        ("who.csv", "id;site\np1;A\np2;B\n", {"column": "id", "delimiter": ";", "where": {"site": ["B"]}}),
        ("who.json", '{"a": {"training": ["p2"]}}', {"key": "a.training"}),
        ("who.json", '[{"image": "./images/p2.nii.gz"}]', {"column": "image", "pattern": r"(p\d+)\.nii"}),
    ],
)
def test_a_file_names_the_patients(tmp_path, name, text, keys):
    two_patients(tmp_path / "raw")
    (tmp_path / "raw" / name).write_text(text)
    found = find_scans(*card_of(tmp_path, patients={"file": name, **keys}, patient_prefix="site1-"))
    assert [each.patient for each in found] == ["site1-p2"]


@pytest.mark.parametrize(
    ("name", "text", "keys", "words"),
    [
        ("who.txt", "p1\np3\np9\n", {}, ("p3, p9", "key", "set_a")),
        ("who.csv", "id,site\np1,A\n", {"column": "patient"}, ("patient", "who.csv", "set_a")),
        ("who.json", '{"training": {"p1": 1}}', {"key": "training"}, ("training", "who.json")),
        ("who.json", "{", {}, ("who.json",)),
        ("who.xlsx", "p1", {}, ("who.xlsx", ".csv")),
        ("who.txt", "p1\n", {"pattern": r"(\d\d)"}, ("p1", "patients.pattern")),
        ("who.txt", "p\n", {"pattern": r"p(\d)?"}, ("'p'", "patients.pattern")),
        ("who.txt", "", {}, ("none", "who.txt")),
        ("who.csv", "site,id\nA,p1\nB\n", {"column": "id"}, ("line 3", "who.csv")),
    ],
)
def test_a_list_of_patients_that_cannot_be_used_is_refused(tmp_path, name, text, keys, words):
    two_patients(tmp_path / "raw")
    (tmp_path / "raw" / name).write_text(text)
    refused(tmp_path, *(word for word in words if word != "key"), patients={"file": name, **keys})
    refused(tmp_path, "other.txt", "key patients of card set_a", patients={"file": "other.txt"})


def test_a_misspelt_key_is_told_before_the_one_that_is_missing_for_it(tmp_path):
    path = write_card(tmp_path, "a", scaner="b")
    path.write_text(
        "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if not line.startswith("scanner:"))
    )
    with pytest.raises(InputError, match=r"received scaner \(did you mean scanner\?\)"):
        load_card(path)


def test_a_name_in_another_encoding_is_refused_with_its_bytes(tmp_path):
    two_patients(tmp_path / "raw")
    (tmp_path / "raw/p2").rename(tmp_path / "raw" / os.fsdecode(b"M\xfcller"))
    refused(tmp_path, "UTF-8", r"M\xfcller", "key image of card set_a", code="BAD_PATH")


def test_ids_that_do_not_match_are_not_the_cards(tmp_path):
    two_patients(tmp_path / "raw")
    assert [each.patient for each in find_scans(*card_of(tmp_path, patient_pattern="p[2-9]"))] == ["p2"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{patient}_{study}.nii.gz", ["P01_2024_03.nii.gz", "P01_2025_01.nii.gz"]),
        ("{patient}_*.nii.gz", ["P01_20240301_T1.nii.gz", "P01_20250110_T1.nii.gz"]),
    ],
)
def test_a_path_that_can_be_read_two_ways_is_refused_unless_the_card_says_what_an_id_is(tmp_path, pattern, names):
    """Read as patients P01_2024 and P01_2025 they could be on both sides of a split."""
    (tmp_path / "raw").mkdir()
    for name in names:
        for folder in ("images", "masks"):
            write_volume(scan("a", 1)[folder == "masks"], tmp_path / "raw" / folder / name)
    patterns = {"image": f"images/{pattern}", "mask": f"masks/{pattern}"}
    refused(tmp_path, "'P01_", "'P01'", "patient_pattern", names[0], code="AMBIGUOUS_PATH", **patterns)
    if "{study}" in pattern:
        found = find_scans(*card_of(tmp_path, patient_pattern="P[0-9]{2}", **patterns))
        assert [(each.patient, each.study) for each in found] == [("P01", "2024_03"), ("P01", "2025_01")]
    for folder in ("images", "masks"):
        (tmp_path / "raw" / folder / names[1]).unlink()
    for keys in ({"patient_pattern": "P[0-9]{2}"}, {"patients": ["P01"]}):
        assert [each.patient for each in find_scans(*card_of(tmp_path, **keys, **patterns))] == ["P01"]


def test_a_class_of_its_own_file_and_values_by_range(tmp_path):
    image, mask = scan("a", 3)
    folder = tmp_path / "raw/p1"
    folder.mkdir(parents=True)
    write_volume(image, folder / "image.nii.gz")
    first, second = mask.voxels > 0, np.zeros(mask.shape, bool)
    second[0, :4, :4] = True
    assert not (first & second).any()
    shades = np.where(np.indices(mask.shape).sum(axis=0) % 2, 55, 70)
    write_volume(mask.with_voxels((first * shades).astype(np.uint8)), folder / "one.nii.gz")
    write_volume(mask.with_voxels(second.astype(np.uint8)), folder / "two.nii.gz")
    masks = {"one": "{patient}/one.nii.gz", "two": "{patient}/two.nii.gz"}
    (found,) = find_scans(*card_of(tmp_path, mask=masks, labels={"one": ["55-60", "61-70"], "two": [1]}))
    labels = read_labels(found, read_image(found)).voxels
    np.testing.assert_array_equal(labels, first * 1 + second * 2)
    write_volume(mask.with_voxels((first | second).astype(np.uint8)), folder / "two.nii.gz")
    with pytest.raises(InputError, match=r"two\.nii\.gz") as error:
        read_labels(found, read_image(found))
    assert error.value.code == "OVERLAPPING_LABELS" and str(first.sum()) in error.value.sentence


def test_one_of_several_series_is_read_where_the_card_says_which(tmp_path):
    image, liver, _ = trees.body(1)
    for number, (name, factor) in enumerate((("water", 1), ("fat", 2)), start=7):
        trees.write_dicom(tmp_path / name, [f"{name}{index}" for index in range(len(image))], image * factor,
                          SeriesNumber=number, SeriesDescription=name)  # fmt: skip
    dicom = tmp_path / "raw/p1/dicom"
    dicom.mkdir(parents=True)
    for path in [*(tmp_path / "water").iterdir(), *(tmp_path / "fat").iterdir()]:
        shutil.move(path, dicom)
    trees.write_nifti(tmp_path / "raw/p1/mask.nii.gz", liver.astype(np.uint8))
    (found,) = find_scans(*card_of(tmp_path, image="{patient}/dicom"))
    with pytest.raises(InputError, match="water"):
        read_image(found)
    (found,) = find_scans(*card_of(tmp_path, image="{patient}/dicom", series="fat"))
    np.testing.assert_array_equal(read_image(found).canonical().voxels, 2 * image)
    (found,) = find_scans(*card_of(tmp_path, image=None, water="{patient}/dicom", fat="{patient}/dicom", **FAT,
                                   series={"water": "7", "fat": "8"}))  # fmt: skip
    np.testing.assert_allclose(read_image(found).canonical().voxels[image > 0], 200 / 3, atol=0.01)


def test_a_fat_fraction_series_is_scaled_as_the_card_says(tmp_path):
    image, liver, _ = trees.body(2)
    trees.write_nifti(tmp_path / "raw/p1/image.nii.gz", image)  # up to 700: tenths of a percent
    trees.write_nifti(tmp_path / "raw/p1/mask.nii.gz", liver.astype(np.uint8))
    (found,) = find_scans(*card_of(tmp_path, **FAT, scale=0.1))
    np.testing.assert_allclose(read_image(found).canonical().voxels, image / 10, atol=1e-4)


def test_half_a_pair_is_refused(tmp_path):
    two_patients(tmp_path / "raw", image="water.nii.gz")
    shutil.copy(tmp_path / "raw/p1/water.nii.gz", tmp_path / "raw/p1/fat.nii.gz")
    refused(tmp_path, "p2/fat.nii.gz", "key fat of card set_a", code="NOT_FOUND", image=None,
            water="{patient}/water.nii.gz", fat="{patient}/fat.nii.gz", **FAT)  # fmt: skip


@pytest.mark.parametrize(("name", "unlabelled"), [("p1", "error"), ("p1", "skip"), ("V1", "error")])
def test_a_mask_of_one_whose_name_begins_alike_is_not_taken(tmp_path, name, unlabelled):
    """Of P1 or of visit V1, whose own is not there, * behind the placeholder finds that of P10 or V10."""
    is_patient = name == "p1"
    image, mask = scan("a", 1)
    for each in (name, f"{name}0"):
        place = f"{each}/V" if is_patient else f"p/{each}"
        write_volume(image, tmp_path / f"raw/img/{place}.nii.gz")
    folder = tmp_path / f"raw/seg/{'' if is_patient else 'p/'}{name}0_x"
    folder.mkdir(parents=True)
    write_volume(mask, folder / "mask.nii.gz")
    pattern = "seg/{patient}*/mask.nii.gz" if is_patient else "seg/{patient}/{study}*/mask.nii.gz"
    keys = {"image": "img/{patient}/{study}.nii.gz", "mask": pattern, "unlabelled": unlabelled}
    if unlabelled == "skip":
        scans, left = survey(*card_of(tmp_path, **keys))
        assert [each.patient for each in scans] == ["p10"] and [path.parent.name for path in left] == ["p1"]
    else:
        refused(tmp_path, f"{name}*/mask.nii.gz", "no such file", code="NOT_FOUND", **keys)
    (folder.parent / f"{name}_x").mkdir()
    write_volume(mask, folder.parent / f"{name}_x/mask.nii.gz")
    masks = [each.mask.parent.name for each in find_scans(*card_of(tmp_path, **keys))]
    assert masks == [f"{name}_x", f"{name}0_x"]


@pytest.mark.parametrize(("name", "ending"), [("p1", "0"), ("ab", "mask"), ("p1", "_x0")])
def test_what_a_pattern_says_behind_an_id_may_go_on_with_its_number_or_word(tmp_path, name, ending):
    image, mask = scan("a", 1)
    (tmp_path / "raw").mkdir()
    write_volume(image, tmp_path / f"raw/{name}.nii.gz")
    write_volume(mask, tmp_path / f"raw/{name}{ending}.vti")
    found = find_scans(*card_of(tmp_path, image="{patient}.nii.gz", mask=f"{{patient}}{ending}.vti"))
    assert [(each.patient, each.mask.name) for each in found] == [(name, f"{name}{ending}.vti")]


def test_hidden_files_beside_a_mask_are_no_masks(tmp_path):
    two_patients(tmp_path / "raw")
    (tmp_path / "raw/p1/._mask.nii.gz").write_bytes(b"notes")
    found = find_scans(*card_of(tmp_path, mask="{patient}/*mask.nii.gz"))
    assert [each.mask.name for each in found] == ["mask.nii.gz"] * 2


def test_a_star_may_stand_beside_a_placeholder(tmp_path):
    for patient in ("p1", "p2"):
        two_patients(tmp_path / patient)
        for kind in ("image", "mask"):
            (tmp_path / f"raw/{kind}").mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / patient / f"p1/{kind}.nii.gz", tmp_path / f"raw/{kind}/{patient}.nii.gz")
    card, root = card_of(tmp_path, image="image/{patient}.nii.gz", mask="mask/{patient}*.nii.gz")
    assert [each.patient for each in find_scans(card, root)] == ["p1", "p2"] and masks_without_scans(card, root) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"water": "{patient}/w"}, ("image and water",)),
        ({"image": None}, ("image, or water and fat",)),
        ({"image": None, "water": "{patient}/w", "fat": "{patient}/f"}, ("kind: fat_fraction",)),
        ({"task": "fatfraction"}, ("kind: fat_fraction for the task fatfraction", "kind=intensity")),
        ({"kind": "fat_fraction"}, ("only there", "received kind=fat_fraction for volume")),
        ({"scale": 0.1}, ("scale", "fat_fraction")),
        ({"series": {"fat": "3"}}, ("series", "fat")),
        ({"image": "../{patient}"}, ("image", "below root")),
        ({"image": "**/{patient}"}, ("image", "**")),
        ({"mask": {"other": "{patient}/o"}}, ("mask", "organ", "other")),
        ({"mask": {"organ": "organ.nii.gz"}}, ("mask.organ", "{patient}")),
        ({"labels": {"organ": ["70-55"]}}, ("labels.organ", "70-55")),
        ({"labels": {"organ": ["5-9"], "other": [7]}}, ("share no value", "7")),
        ({"labels": {"organ": [True]}}, ("labels.organ", "True")),
        ({"labels": {"organ": [70000]}}, ("labels.organ", "65535")),
        ({"patient_pattern": "("}, ("patient_pattern", "regular expression")),
        ({"patients": {"file": "x.txt", "pattern": "p"}}, ("patients.pattern", "one group")),
        ({"spacing_mm": [1.5]}, ("spacing_mm",)),
        ({"unlabelled": "ignore"}, ("unlabelled", "'error' or 'skip'")),
        ({"patient_pattern": "(?i)p[0-9]"}, ("patient_pattern", "(?i)p[0-9]", "global flags")),
        ({"patient_pattern": "(?P<patient>p1)"}, ("patient_pattern", "patient")),
        ({"labels": {f"part{number}": [number] for number in range(1, 257)}}, ("labels", "255", "256")),
        ({"patients": {"file": "x.csv", "where": {"split": "train"}}}, ("list for patients.where.split", "'train'")),
        ({"series": {"image": 5}}, ("string for series.image, received 5", "quotes")),
        ({"patients": [1, 2]}, ("string for patients.0, received 1 (YAML reads it as a number", "quotes")),
    ],
)
def test_a_card_that_means_nothing_is_refused_with_its_key(tmp_path, changes, words):
    path = write_card(tmp_path, "a", **changes)
    with pytest.raises(InputError) as error:
        load_card(path)
    assert error.value.code == "BAD_CONFIG" and all(word in error.value.sentence for word in (*words, str(path)))


def test_an_experiment_without_spacing_takes_the_cards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_card(tmp_path, "a", spacing_mm=[1.5, 1.25])
    write_card(tmp_path, "b")
    path = tmp_path / "experiment.yaml"

    def spacing(*overrides, **data):
        keys = {"datasets": ["cards/a.yaml", "cards/b.yaml"], **data}
        path.write_text(yaml.safe_dump({"task": "volume", "name": "x", "data": keys}))
        return load_experiment(path, list(overrides)).data.spacing_mm

    assert spacing() == spacing(spacing_mm=None) == [1.5, 1.25]
    assert spacing(spacing_mm=[2.0, 2.0]) == [2.0, 2.0]
    assert spacing("data.spacing_mm=null", spacing_mm=[2.0, 2.0]) == [1.5, 1.25]
    write_card(tmp_path, "b", spacing_mm=[2.0, 2.0])
    with pytest.raises(InputError) as error:
        spacing(spacing_mm=None)
    assert all(word in error.value.sentence for word in ("cards/a.yaml", "cards/b.yaml", "[1.5, 1.25]", "[2.0, 2.0]"))
    with pytest.raises(InputError, match=r"cards/c\.yaml") as error:
        spacing(datasets=["cards/c.yaml"], spacing_mm=None)
    assert error.value.code == "NOT_FOUND"
    write_card(tmp_path, "b")
    with pytest.raises(InputError, match="spacing_mm"):
        spacing(datasets=["cards/b.yaml"], spacing_mm=None)
