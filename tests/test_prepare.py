"""From cards to shards: what is found, what is refused, and that nothing is done twice or half."""

import dataclasses
import json
import shutil
import zlib

import numpy as np
import pytest
import tensorflow as tf
import yaml
from small_study import EXPERIMENT, PATIENTS, ROOT, SCANNERS, command, scan, write_card

from lvseg import prepare, preprocess, records
from lvseg.cards import find_scans, load_card
from lvseg.config import Data
from lvseg.errors import InputError
from lvseg.formats import read_volume, write_volume
from lvseg.volume import Volume, check_same_grid


def data(**changes):
    return Data(**{**EXPERIMENT["data"], **changes})


@pytest.fixture
def own_study(study, tmp_path, monkeypatch):
    """A copy of the study that a test may damage."""
    folder = tmp_path / "study"
    shutil.copytree(study, folder, ignore=shutil.ignore_patterns("shards", "runs"))
    monkeypatch.chdir(folder)
    return folder


def test_every_scan_becomes_a_shard_with_its_own_harmonised_voxels(in_study):
    sets = prepare.prepare(data(), jobs=1)
    assert [len(shards.rows) for shards in sets] == [PATIENTS] * 2
    row = sets[1].rows[4]
    image, mask = scan("b", 4)
    assert (row["patient"], row["scanner"], row["shape"]) == ("b-004", "b", list(SCANNERS["b"][0]))
    canonical, spacing_mm = image.canonical(), tf.constant(image.canonical().spacing_mm, tf.float32)
    voxels = tf.constant(np.ascontiguousarray(canonical.voxels).astype(np.float32))
    expected = preprocess.harmonise(voxels, spacing_mm, (4.0, 4.0), 32, tf.reduce_min(voxels)).numpy()
    serialised = next(iter(tf.data.TFRecordDataset(str(sets[1].folder / row["file"]))))
    read = records.decode(serialised, 32)
    stored = tf.cast(read.image, tf.float32) * read.slope + read.intercept
    np.testing.assert_allclose(stored, expected, atol=1e-4 * np.ptp(expected))
    labels = preprocess.harmonise_labels(
        tf.constant(np.ascontiguousarray(mask.canonical().voxels)), spacing_mm, (4.0, 4.0), 32, 2
    )
    np.testing.assert_array_equal(read.mask, labels)


def test_manifest_has_a_row_a_volume(in_study):
    shards = prepare.prepare(data(), jobs=1)[0]
    manifest = json.loads((shards.folder / "manifest.json").read_text())
    assert manifest["volumes"] == shards.rows and manifest["card"]["name"] == "set_a"
    assert sorted(path.name for path in shards.folder.iterdir()) == sorted(
        ["manifest.json", *(row["file"] for row in shards.rows)]
    )


def test_a_second_call_makes_nothing_anew_and_missing_shards_are_made_the_same(own_study):
    shards = prepare.prepare(data(), jobs=1)[0]
    files = sorted(shards.folder.glob("*.tfrecord"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    files[3].unlink()
    assert prepare.prepare(data(), jobs=2)[0].rows == shards.rows
    for path in files:
        assert path.read_bytes() == before[path][1]
        assert (path.stat().st_mtime_ns == before[path][0]) == (path != files[3])


def test_a_scan_that_changed_is_prepared_anew(own_study):
    before = prepare.prepare(data(), jobs=1)[0].rows
    image, _ = scan("a", 2)
    write_volume(image.with_voxels(image.voxels + np.int16(1)), own_study / "raw/a/a-002/image.nii.gz")
    after = prepare.prepare(data(), jobs=1)[0].rows
    assert [one == other for one, other in zip(before, after, strict=True)].count(False) == 1
    assert before[2]["voxels_sha256"] != after[2]["voxels_sha256"]


def test_other_spacing_gets_shards_of_its_own(own_study):
    folders = {prepare.prepare(data(spacing_mm=[mm, mm]), jobs=1)[0].folder for mm in (4.0, 5.0)}
    assert len(folders) == 2


def test_the_same_voxels_under_two_patients_are_refused_with_both_names(own_study):
    shutil.copytree(own_study / "raw/a/a-003", own_study / "raw/b/b-twin")
    with pytest.raises(InputError) as error:
        prepare.prepare(data(), jobs=1)
    assert error.value.code == "DUPLICATE_SCAN"
    assert "a-003" in error.value.sentence and "b-twin" in error.value.sentence


def test_a_patient_seen_by_two_scanners_is_one_patient(own_study):
    shutil.copytree(own_study / "raw/b/b-005", own_study / "raw/b/a-005")
    shutil.rmtree(own_study / "raw/b/b-005")
    sets = prepare.prepare(data(), jobs=1)
    split = prepare.split(data(), sets)
    parts = [part for part in (split.train, split.validation, split.test) if "a-005" in part]
    assert len(parts) == 1
    assert sum(len(shards.files(["a-005"])) for shards in sets) == 2


def test_a_mask_on_another_grid_is_refused(own_study):
    _, mask = scan("a", 1)
    shifted = mask.affine + np.array([[0, 0, 0, 3.0], [0] * 4, [0] * 4, [0] * 4])
    write_volume(dataclasses.replace(mask, affine=shifted), own_study / "raw/a/a-001/organs.nii.gz")
    with pytest.raises(InputError, match=r"a-001/organs\.nii\.gz") as error:
        prepare.prepare(data(), jobs=1)
    assert error.value.code == "GEOMETRY_MISMATCH"


def test_a_mask_stored_in_another_orientation_is_the_same_mask(own_study):
    before = prepare.prepare(data(), jobs=1)[0]
    _, mask = scan("a", 1)
    turned = mask.voxels.transpose(2, 0, 1)[::-1] * 7
    affine = mask.affine[:, [2, 0, 1, 3]] @ np.diag([-1, 1, 1, 1.0])
    affine[:, 3] = mask.affine @ [0, 0, mask.shape[2] - 1, 1]
    write_volume(Volume(turned, affine), own_study / "raw/a/a-001/organs.nii.gz")
    after = prepare.prepare(data(), jobs=1)[0]
    masks = []
    for shards, row in ((before, before.rows[1]), (after, after.rows[1])):
        serialised = next(iter(tf.data.TFRecordDataset(str(shards.folder / row["file"]))))
        masks.append(records.decode(serialised, 32).mask.numpy())
    np.testing.assert_array_equal(*masks)
    assert before.rows[1]["sources"] != after.rows[1]["sources"]


def test_a_real_series_and_its_labels_in_another_orientation_lie_on_one_grid(real_data):
    check_same_grid(
        read_volume(real_data / "ct_dicom_series"), read_volume(real_data / "ct_dicom_series_organs.nii.gz")
    )


@pytest.mark.parametrize("offset", [500, -500])
def test_statistics_and_fill_are_the_scans_own(own_study, offset):
    """A scan far from zero, padded: what lies outside has its minimum, and the statistics do not know the padding."""
    image, _ = scan("a", 0)
    moved = image.with_voxels(image.voxels + np.int16(offset))
    write_volume(moved, own_study / "raw/a/a-000/image.nii.gz")
    shards = prepare.prepare(data(spacing_mm=[6.0, 6.0]), jobs=1)[0]
    read = records.decode(next(iter(tf.data.TFRecordDataset(str(shards.folder / shards.rows[0]["file"])))), 32)
    np.testing.assert_allclose(
        read.statistics.percentiles, np.percentile(moved.voxels, np.arange(1001) / 10), rtol=1e-5
    )
    corner = float(read.image[0, 0, 0]) * float(read.slope) + float(read.intercept)
    assert corner == pytest.approx(moved.voxels.min(), abs=0.1) and abs(corner) > 200


def test_only_the_cards_values_become_labels_in_its_order(own_study):
    _, mask = scan("a", 2)
    two = mask.voxels * 7
    two[mask.canonical().voxels.shape[0] // 2, 2:6, 2:6] = 3
    two[0, :4, :4] = 99
    write_volume(mask.with_voxels(two), own_study / "raw/a/a-002/organs.nii.gz")
    folders = []
    for labels, expected in (({"organ": [7], "other": [3]}, (7, 3)), ({"other": [3], "organ": [7]}, (3, 7))):
        write_card(own_study, "a", labels=labels)
        shards = prepare.prepare(data(datasets=["cards/a.yaml"]), jobs=1)[0]
        folders.append(shards.folder)
        read = records.decode(next(iter(tf.data.TFRecordDataset(str(shards.folder / shards.rows[2]["file"])))), 32)
        remapped = sum((two == value) * np.uint8(label) for label, value in enumerate(expected, start=1))
        canonical = mask.with_voxels(remapped.astype(np.uint8)).canonical()
        wanted = preprocess.harmonise_labels(
            tf.constant(np.ascontiguousarray(canonical.voxels)), tf.constant(canonical.spacing_mm, tf.float32),
            (4.0, 4.0), 32, 3,
        )  # fmt: skip
        np.testing.assert_array_equal(read.mask, wanted)
    assert len(set(folders)) == 2


def test_tissues_come_from_their_own_file(own_study):
    for number in range(PATIENTS):
        _, mask = scan("a", number)
        write_volume(mask.with_voxels(mask.voxels * 5 + 1), own_study / f"raw/a/a-{number:03d}/tissues.nii.gz")
    write_card(own_study, "a", tissues="{patient}/tissues.nii.gz")
    shards = prepare.prepare(data(datasets=["cards/a.yaml"]), jobs=1)[0]
    serialised = next(iter(tf.data.TFRecordDataset(str(shards.folder / shards.rows[0]["file"])))).numpy()
    lists = tf.train.SequenceExample.FromString(serialised).feature_lists.feature_list
    planes = [zlib.decompress(feature.bytes_list.value[0]) for feature in lists["tissues"].feature]
    found = np.unique(np.frombuffer(b"".join(planes), np.uint8))
    np.testing.assert_array_equal(found, [0, 1, 6])  # outside, and the two tissues


def test_a_class_that_no_mask_holds_is_refused(own_study):
    write_card(own_study, "a", labels={"organ": [9]})
    with pytest.raises(InputError, match="organ") as error:
        prepare.prepare(data(), jobs=1)
    assert error.value.code == "EMPTY_CLASS"


def test_patients_and_studies_never_share_a_shard(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [("p", "1_2"), ("p_1", "2"), ("p", "1+2"), ("p+1", "2"), ("p%2B1", "2")]
    for number, (patient, study) in enumerate(names):
        image, mask = scan("a", number)
        folder = tmp_path / "raw" / patient / study
        folder.mkdir(parents=True)
        write_volume(image, folder / "image.nii.gz")
        write_volume(mask, folder / "mask.nii.gz")
    write_card(
        tmp_path, "a", root="../raw", image="{patient}/{study}/image.nii.gz", mask="{patient}/{study}/mask.nii.gz",
        labels={"organ": [1]},
    )  # fmt: skip
    shards = prepare.prepare(data(datasets=["cards/a.yaml"]), jobs=1)[0]
    assert len({row["file"] for row in shards.rows}) == len(names)
    for row in shards.rows:
        assert records.read_row(shards.folder / row["file"]) == row


def test_one_card_twice_is_refused(own_study):
    write_card(own_study, "b", name="set_a")
    for datasets in (["cards/a.yaml", "cards/a.yaml"], ["cards/a.yaml", "cards/b.yaml"]):
        with pytest.raises(InputError, match="set_a"):
            prepare.prepare(data(datasets=datasets), jobs=1)


@pytest.mark.parametrize("axis", ["coronal", "sagittal"])
def test_slices_along_another_axis_are_a_permutation_of_the_canonical_scan(in_study, axis):
    shards = prepare.prepare(data(axis=axis, shards=f"shards-{axis}"), jobs=1)[0]
    shape = np.array(SCANNERS["a"][0])[list(preprocess.AXIS_PERMUTATIONS[axis])]
    assert shards.rows[0]["shape"] == shape.tolist()
    serialised = next(iter(tf.data.TFRecordDataset(str(shards.folder / shards.rows[0]["file"]))))
    planes = records.decode(serialised, 32).mask.numpy()
    mask = scan("a", 0)[1].canonical().voxels.transpose(preprocess.AXIS_PERMUTATIONS[axis])
    np.testing.assert_array_equal(planes.any(axis=(1, 2)), mask.any(axis=(1, 2)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": "scans/*.nii.gz"}, ("image", "{patient}")),
        ({"labels": {"organ": 7}}, ("labels.organ", "list")),
        ({"labels": {"organ": [0]}}, ("labels.organ",)),
        ({"labels": {"organ": [7], "other": [7]}}, ("labels",)),
        ({"labels": {"background": [7]}}, ("background",)),
        ({"image": "/abs/{patient}.nii.gz"}, ("image", "below root")),
        ({"mask": "{patient}/{organs.nii.gz"}, ("mask",)),
        ({"license": "x"}, ("license", "did you mean licence?")),
    ],
)
def test_a_wrong_card_is_refused_with_its_key(own_study, changes, words):
    path = write_card(own_study, "a", **changes)
    with pytest.raises(InputError) as error:
        load_card(path)
    assert all(word in error.value.sentence for word in (*words, str(path)))


def test_scans_without_masks_and_cards_without_scans_are_refused(own_study):
    (own_study / "raw/a/a-004/organs.nii.gz").unlink()
    with pytest.raises(InputError, match=r"a-004/organs\.nii\.gz"):
        find_scans(*load_card(own_study / "cards/a.yaml"))
    path = write_card(own_study, "a", root="../nowhere")
    with pytest.raises(InputError, match="nowhere"):
        find_scans(*load_card(path))


def test_studies_of_one_patient_are_told_apart(tmp_path):
    image, mask = scan("a", 0)
    for study in ("week0", "week12"):
        folder = tmp_path / "raw" / "p1" / study
        folder.mkdir(parents=True)
        write_volume(image, folder / "image.nii.gz")
        write_volume(mask, folder / "mask.nii.gz")
    path = write_card(
        tmp_path, "a", root="../raw", image="{patient}/{study}/image.nii.gz", mask="{patient}/{study}/mask.nii.gz"
    )
    found = find_scans(*load_card(path))
    assert [(each.patient, each.study) for each in found] == [("p1", "week0"), ("p1", "week12")]


def test_cards_that_simulate_make_their_patients_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_card(
        tmp_path, "a", root="../made", scanner="ge_volume", mask="{patient}/mask.nii.gz",
        tissues="{patient}/tissues.nii.gz", labels={"liver": [1]},
        simulate={"scanner": "ge_volume", "patients": 1, "seed": 5},
    )  # fmt: skip
    shards = prepare.prepare(data(datasets=["cards/a.yaml"]), jobs=1)[0]
    assert [row["patient"] for row in shards.rows] == ["sim0005-0001"]
    serialised = next(iter(tf.data.TFRecordDataset(str(shards.folder / shards.rows[0]["file"])))).numpy()
    lists = tf.train.SequenceExample.FromString(serialised).feature_lists.feature_list
    assert len(lists["tissues"].feature) == len(lists["image"].feature) == 28


def test_the_command_says_what_it_made_and_bad_input_exits_2(own_study):
    done = command(own_study, "lvseg.prepare", "--cfg", "experiment.yaml", "--jobs", 1)
    assert done.returncode == 0 and "set_a: 10 volumes" in done.stdout
    config = yaml.safe_load((own_study / "experiment.yaml").read_text())
    config["train"]["lerning_rate"] = config["train"].pop("learning_rate")
    (own_study / "wrong.yaml").write_text(yaml.safe_dump(config))
    assert command(own_study, "lvseg.prepare", "--cfg", "experiment.yaml", "--jobs", 0).returncode == 2
    bad = command(own_study, "lvseg.prepare", "--cfg", "wrong.yaml")
    assert bad.returncode == 2
    assert bad.stderr.strip().splitlines() == [bad.stderr.strip()] and "did you mean learning_rate?" in bad.stderr


def test_shipped_cards_are_valid_and_the_two_scanners_have_different_patients():
    cards = [load_card(path)[0] for path in sorted((ROOT / "data").glob("*.yaml"))]
    seeds = [card.simulate.seed for card in cards if card.simulate]
    assert len(cards) >= 2 and len(set(seeds)) == len(seeds)


def test_an_image_read_back_from_its_path_is_the_study_as_written(in_study):
    found = find_scans(*load_card(in_study / "cards/b.yaml"))
    assert len(found) == PATIENTS
    np.testing.assert_array_equal(read_volume(found[6].image).voxels, scan("b", 6)[0].voxels)
