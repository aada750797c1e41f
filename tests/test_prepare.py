"""From cards to shards: what is found, what is refused, and that nothing is done twice or half."""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import yaml
from dataset_trees import fat_study
from small_study import EXPERIMENT, PATIENTS, ROOT, SCANNERS, command, scan, write_card

from lvseg import prepare, preprocess, records, workers
from lvseg.cards import find_scans, load_card
from lvseg.config import Data
from lvseg.errors import InputError
from lvseg.formats import read_volume, write_volume
from lvseg.phantom.anatomy import Tissue
from lvseg.volume import Volume, check_same_grid
from lvseg.workers import Engine


def data(**changes):
    return Data(**{**EXPERIMENT["data"], **changes})


def decoded(shards, row):
    return records.decode(next(iter(tf.data.TFRecordDataset(str(shards.folder / row["file"])))), 32)


@pytest.fixture
def own_study(study, tmp_path, monkeypatch):
    """A copy of the study that a test may damage."""
    folder = tmp_path / "study"
    shutil.copytree(study, folder, ignore=shutil.ignore_patterns("shards", "runs"))
    monkeypatch.chdir(folder)
    return folder


def test_shards_that_are_there_are_read_by_one_thread(in_study, monkeypatch):
    """TensorFlow's choice of a function by the types of its arguments fails, rarely, where two threads make it."""
    made = prepare.prepare(data(), jobs=1)
    reading, read_row = [], records.read_row

    def recording(path):
        reading.append((threading.current_thread(), path.name))
        return read_row(path)

    monkeypatch.setattr(records, "read_row", recording)
    assert prepare.prepare(data(), jobs=1) == made
    assert {thread for thread, _ in reading} == {threading.main_thread()}
    assert sorted(name for _, name in reading) == sorted(row["file"] for shards in made for row in shards.rows)


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
        tf.constant(np.ascontiguousarray(mask.canonical().voxels)), spacing_mm, (4.0, 4.0), 32
    )
    np.testing.assert_array_equal(read.mask, labels)


def test_manifest_has_a_row_a_volume(in_study):
    shards = prepare.prepare(data(), jobs=1)[0]
    manifest = json.loads((shards.folder / "manifest.json").read_text())
    assert manifest["volumes"] == shards.rows and manifest["card"]["name"] == "set_a"
    assert manifest["made_by"]["spacing_mm"] == [4.0, 4.0] and manifest["versions"]["numpy"] == np.__version__
    for number, row in enumerate(shards.rows):
        assert row["scan"] == [f"a-{number:03d}/image.nii.gz"]
        assert row["shard_sha256"] == hashlib.sha256((shards.folder / row["file"]).read_bytes()).hexdigest()
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


@pytest.mark.parametrize("kind", ["mhd", "nhdr", "mha", "nrrd"])
def test_a_mask_that_changed_in_the_file_beside_its_header_is_prepared_anew(own_study, kind):
    write_card(own_study, "a", mask=f"{{patient}}/organs.{kind}")
    for home in (own_study / "raw/a").iterdir():
        mask = read_volume(home / "organs.nii.gz").canonical()
        (home / "organs.raw").write_bytes(np.ascontiguousarray(mask.voxels.astype(np.uint8)).tobytes())
        sizes, spacing = (" ".join(map(str, reversed(each))) for each in (mask.shape, mask.spacing_mm))
        origin = " ".join(f"{value:.9g}" for value in mask.affine[:3, 3])
        columns = [mask.affine[:3, axis] / mask.spacing_mm[axis] for axis in (2, 1, 0)]
        lines = {
            "mhd": [
                "ObjectType = Image", "NDims = 3", f"DimSize = {sizes}", f"ElementSpacing = {spacing}",
                f"TransformMatrix = {' '.join(f'{value:.9g}' for each in columns for value in each)}",
                f"Offset = {origin}", "ElementType = MET_UCHAR", "ElementDataFile = organs.raw",
            ],
            "nhdr": [
                "NRRD0004", "type: uchar", "dimension: 3", "space: left-posterior-superior", f"sizes: {sizes}",
                "space directions: " + " ".join(
                    "(" + ",".join(f"{value:.9g}" for value in mask.affine[:3, axis]) + ")" for axis in (2, 1, 0)),
                f"space origin: ({origin.replace(' ', ',')})", "encoding: raw", "data file: organs.raw", "",
            ],
        }[{"mha": "mhd", "nrrd": "nhdr"}.get(kind, kind)]  # fmt: skip
        (home / f"organs.{kind}").write_text("\n".join(lines) + "\n")
    before = prepare.prepare(data(), jobs=1)[0].rows
    raw = own_study / "raw/a/a-002/organs.raw"
    raw.write_bytes(bytes(len(raw.read_bytes())))
    after = prepare.prepare(data(), jobs=1)[0].rows
    assert [one == other for one, other in zip(before, after, strict=True)].count(False) == 1


@pytest.mark.parametrize(("shape", "code"), [((4, 20, 20), "EMPTY_IMAGE"), ((4097, 2, 2), "DIMS_LIMIT")])
def test_a_scan_that_no_network_answers_is_not_prepared(own_study, shape, code):
    """Or a run would be trained whose own report could never be made."""
    affine = np.array([[0, 0, 2, 0], [0, 2, 0, 0], [0.5, 0, 0, 0], [0, 0, 0, 1.0]])
    image, mask = (Volume(np.zeros(shape, dtype), affine) for dtype in (np.int16, np.uint8))
    if code == "DIMS_LIMIT":
        image.voxels[:, 0, 0] = 1
    write_volume(image, own_study / "raw/a/a-002/image.nii.gz")
    write_volume(mask, own_study / "raw/a/a-002/organs.nii.gz")
    with pytest.raises(InputError, match=r"a-002/image\.nii\.gz") as told:
        prepare.prepare(data(), jobs=1)
    assert told.value.code == code


@pytest.mark.parametrize("outlier", [1e7, -1e7])
def test_a_scan_whose_outlier_leaves_tissue_few_values_is_refused_with_what_it_is(own_study, outlier):
    path = own_study / "raw/a/a-002/image.nii.gz"
    image = read_volume(path)
    voxels = image.voxels.astype(np.float32)
    bright = np.percentile(voxels, 99.5)
    voxels[4, 3, 2] = outlier
    write_volume(image.with_voxels(voxels), path)
    with pytest.raises(InputError, match=r"a-002/image\.nii\.gz") as told:
        prepare.prepare(data(), jobs=1)
    assert told.value.code == "OUTLIER" and f"percentile is {bright:.3g}"[:-1] in told.value.sentence
    assert f"{outlier:g} where" in told.value.sentence or f"(lowest {outlier:g}" in told.value.sentence


@pytest.mark.parametrize(("dtype", "brightest"), [(np.float32, 4000.0), (np.int16, 32767)])
def test_a_bright_voxel_that_leaves_tissue_its_values_is_no_outlier(own_study, dtype, brightest):
    """Of an int16 scan each value is kept, whatever is left between the percentiles."""
    path = own_study / "raw/a/a-002/image.nii.gz"
    image = read_volume(path)
    voxels = (image.voxels if dtype is np.float32 else image.voxels // 8).astype(dtype)
    voxels[4, 3, 2] = brightest
    write_volume(image.with_voxels(voxels), path)
    shards = prepare.prepare(data(), jobs=1)[0]
    assert [row["maximum"] for row in shards.rows if row["patient"] == "a-002"] == [brightest]


def test_other_spacing_gets_shards_of_its_own(own_study):
    folders = {prepare.prepare(data(spacing_mm=[mm, mm]), jobs=1)[0].folder for mm in (4.0, 5.0)}
    assert len(folders) == 2


def test_a_window_is_for_ct_alone_and_gets_shards_of_its_own(own_study):
    write_card(own_study, "ct", root="../raw/a", modality="CT")
    datasets = ["cards/a.yaml", "cards/ct.yaml"]
    plain, windowed = data(datasets=datasets), data(datasets=datasets, ct_window_hu=[50, 150])
    before, after = prepare.prepare(plain), prepare.prepare(windowed)
    assert before[0].folder == after[0].folder and before[1].folder != after[1].folder
    rows = zip(before[1].rows, after[1].rows, strict=True)
    for row, seen in rows:
        bounds = [
            [float(value) for value in (statistics.minimum, statistics.maximum)]
            for statistics in (decoded(before[1], row).statistics, decoded(after[1], seen).statistics)
        ]
        assert bounds[0][0] < 50 and bounds[0][1] > 150 and bounds[1] == [50, 150]
        image = decoded(after[1], seen).image.numpy()
        assert image.min() == 0  # the fill is the darkest that the window shows
    with pytest.raises(InputError, match=r"within data\.ct_window_hu, received none in .*raw/a/a-\d+/image"):
        prepare.prepare(data(datasets=datasets, ct_window_hu=[5000, 6000]))


def test_the_same_voxels_under_two_patients_are_refused_with_both_names(own_study):
    shutil.copytree(own_study / "raw/a/a-003", own_study / "raw/b/b-twin")
    with pytest.raises(InputError) as error:
        prepare.prepare(data(), jobs=1)
    assert error.value.code == "DUPLICATE_SCAN"
    assert all(f"{name}/image.nii.gz" in error.value.sentence for name in ("raw/a/a-003", "raw/b/b-twin"))


def test_the_same_voxels_in_another_orientation_and_dtype_are_the_same(own_study):
    """Stored from head to feet, with rows and columns changed places, as float: still one person's scan."""
    for name in ("image", "organs"):
        volume = read_volume(own_study / f"raw/a/a-003/{name}.nii.gz")
        affine = volume.affine[:, [0, 2, 1, 3]] @ np.diag([-1, 1, 1, 1.0])
        affine[:, 3] = volume.affine @ [volume.shape[0] - 1, 0, 0, 1]
        turned = Volume(np.ascontiguousarray(volume.voxels.transpose(0, 2, 1)[::-1]).astype(np.float32), affine)
        (own_study / "raw/b/twin").mkdir(exist_ok=True)
        write_volume(turned, own_study / f"raw/b/twin/{name}.nii.gz")
    with pytest.raises(InputError, match=r"a-003.*twin") as error:
        prepare.prepare(data(), jobs=1)
    assert error.value.code == "DUPLICATE_SCAN"


def test_the_same_voxels_in_another_format_are_the_same_whatever_its_spacing_rounds_to(own_study):
    card, root = load_card(own_study / "cards/a.yaml")
    first, second, *_ = find_scans(card, root)
    image, mask = read_volume(first.image), read_volume(first.mask)
    for volume, path in ((image, second.image), (mask, second.mask)):
        # 0.9999 of it: as far apart as two formats that keep some digits of a spacing
        write_volume(dataclasses.replace(volume, affine=volume.affine @ np.diag([0.9999, 1, 1, 1])), path)
    with pytest.raises(InputError, match=rf"same voxels for patients {first.patient} .* and {second.patient} "):
        prepare.prepare(data(datasets=["cards/a.yaml"]), jobs=1)


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
            (4.0, 4.0), 32,
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
    found = set()
    for feature in lists["tissues"].feature:  # planes of bits, the lowest first
        packed = np.frombuffer(zlib.decompress(feature.bytes_list.value[0]), np.uint8)
        planes = np.unpackbits(packed).reshape(-1, 32 * 32)
        found |= set(np.unique((planes << np.arange(len(planes))[:, None].astype(np.uint8)).sum(axis=0)).tolist())
    assert found == {0, 1, 6}  # outside, and the two tissues


@pytest.mark.parametrize("value", [max(Tissue) + 1, 300])  # 300 is 44 in eight bits
def test_maps_of_tissues_in_another_numbering_are_refused_by_file(own_study, value):
    for number in range(PATIENTS):
        _, mask = scan("a", number)
        tissues = mask.voxels.astype(np.uint16) * (value if number == 4 else max(Tissue))
        write_volume(mask.with_voxels(tissues), own_study / f"raw/a/a-{number:03d}/tissues.nii.gz")
    write_card(own_study, "a", tissues="{patient}/tissues.nii.gz")
    with pytest.raises(InputError, match=rf"tissues 0 to 32 .* received {value} in .*a-004/tissues\.nii\.gz"):
        prepare.prepare(data(datasets=["cards/a.yaml"]), jobs=1)


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
        assert records.read_row(shards.folder / row["file"]).items() <= row.items()
        assert row["scan"] == [f"{row['patient']}/{row['study']}/image.nii.gz"]


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


def test_a_card_of_another_task_is_refused_before_anything_is_read(own_study, capsys):
    code = prepare.main(["--cfg", "experiment.yaml", "--set", "task=spleen", "--jobs", "1"])
    told = capsys.readouterr().err
    assert code == 2 and "task spleen" in told and "volume in cards/a.yaml" in told and not Path("shards").exists()


def test_of_simulated_patients_only_those_of_the_card_are_read(tmp_path, monkeypatch):
    """Whoever an earlier version of the card left in the folder."""
    monkeypatch.chdir(tmp_path)
    keys = {"root": "../raw", "scanner": "ge_volume", "mask": "{patient}/mask.nii.gz", "labels": {"liver": [1]}}
    for seed, count in ((5, 2), (5, 1), (6, 1)):
        write_card(tmp_path, "c", **keys, simulate={"scanner": "ge_volume", "patients": count, "seed": seed})
        expected = [f"sim{seed:04d}-{number + 1:04d}" for number in range(count)]
        assert [each.patient for each in prepare.card_scans(Path("cards/c.yaml"))] == expected
    assert len(list((tmp_path / "raw").glob("sim*"))) == 3


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


def test_an_image_read_back_from_its_path_is_the_study_as_written(in_study):
    found = find_scans(*load_card(in_study / "cards/b.yaml"))
    assert len(found) == PATIENTS
    np.testing.assert_array_equal(read_volume(found[6].image).voxels, scan("b", 6)[0].voxels)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.tfrecord")}


def start_and_kill_at(own_study, fifo, *arguments):
    """Starts the command, waits until it opens a scan that is a pipe, and kills it with its workers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lvseg.prepare", "--cfg", "experiment.yaml", *arguments],
        cwd=own_study,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        opened, ended = threads.submit(fifo.open, "wb"), threads.submit(process.wait)
        done, _ = concurrent.futures.wait((opened, ended), 120, concurrent.futures.FIRST_COMPLETED)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if opened not in done:  # a reader lets the thread that waits for one go
            os.close(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK))
        opened.result().close()
    assert opened in done and process.returncode == -signal.SIGKILL


def test_killed_in_the_middle_it_goes_on_and_the_shards_are_those_of_an_unbroken_run(own_study):
    whole = prepare.prepare(data(shards="unbroken", datasets=["cards/a.yaml"]), jobs=1)[0]
    fifo = own_study / "raw/a/a-004/organs.nii.gz"
    kept = fifo.rename(own_study / "kept.nii.gz")
    os.mkfifo(fifo)
    start_and_kill_at(own_study, fifo, "--jobs", "2")
    folder = own_study / "shards" / whole.folder.name
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.tfrecord")}
    assert 3 <= len(before) < PATIENTS and not (folder / "manifest.json").exists()
    (folder / ".partial-0badcafe-a-007+1.tfrecord").write_bytes(b"half a shard")
    fifo.unlink()
    kept.rename(fifo)
    shards = prepare.prepare(data(datasets=["cards/a.yaml"]), jobs=1)[0]
    assert shards.folder.absolute() == folder and shards.rows == whole.rows
    assert contents(folder) == contents(own_study / whole.folder)
    assert all(path.stat().st_mtime_ns == made for path, made in before.items())
    assert not list(folder.glob(".partial-*"))


def test_two_preparations_of_one_folder_wait_for_each_other(own_study, monkeypatch, capsys):
    folder = own_study / prepare.prepare(data(datasets=["cards/a.yaml"]), jobs=1)[0].folder
    held = (folder.parent / f".{folder.name}.lock").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    taken = fcntl.flock

    def release_and_take(file, how):
        if not how & fcntl.LOCK_NB:  # it would wait: the other preparation ends now
            held.close()
        taken(file, how)

    monkeypatch.setattr(fcntl, "flock", release_and_take)
    assert len(prepare.prepare(data(datasets=["cards/a.yaml"]), jobs=1)[0].rows) == PATIENTS
    assert held.closed and "waiting" in capsys.readouterr().err


def test_every_file_is_hashed_once(own_study, monkeypatch):
    shards = prepare.prepare(data(datasets=["cards/a.yaml"]), jobs=1)[0]
    image, _ = scan("a", 2)
    write_volume(image.with_voxels(image.voxels + np.int16(1)), own_study / "raw/a/a-002/image.nii.gz")
    (shards.folder / shards.rows[5]["file"]).unlink()
    hashed, digest = [], hashlib.file_digest

    def counted(file, name):
        hashed.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    prepare.prepare(data(datasets=["cards/a.yaml"]), jobs=1)
    assert len(hashed) == len(set(hashed)) == 2 * PATIENTS  # an image and a mask of kept, changed and missing alike


def test_a_card_that_reads_the_same_files_another_way_gets_shards_of_its_own(own_study):
    folders = set()
    for changes in ({}, {"labels": {"organ": [6, 7]}}, {"mask": {"organ": "{patient}/organs.nii.gz"}}):
        write_card(own_study, "a", **changes)
        folders.add(prepare.prepare(data(datasets=["cards/a.yaml"]), jobs=1)[0].folder)
    assert len(folders) == 3


def test_a_swapped_pair_is_told_with_patient_and_file_and_kept_with_the_shard(tmp_path, monkeypatch, capsys):
    fat_study(tmp_path, 3, swapped=(1,))
    monkeypatch.chdir(tmp_path)
    (shards,) = prepare.prepare(data(datasets=["cards/fat.yaml"], size=64), jobs=1)
    suspected = [row["metadata"]["fat_fraction"]["swap"]["suspected"] for row in shards.rows]
    assert suspected == [False, True, False]
    lines = [line for line in capsys.readouterr().err.splitlines() if "swap" in line]
    assert len(lines) == 1 and "p1" in lines[0] and "raw/fat/p1/water.nii.gz" in lines[0]
    assert str(tmp_path) not in json.dumps(shards.rows)  # the same shards wherever the scans lie
    read = records.decode(next(iter(tf.data.TFRecordDataset(str(shards.folder / shards.rows[2]["file"])))), 64)
    stored = read.image.numpy() * float(read.slope) + float(read.intercept)
    assert stored[read.mask.numpy() == 1].mean() == pytest.approx(100 * 30 / (480 + 30), abs=1)


def damage(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.fixture
def own_threads(monkeypatch):
    """The command keeps its process to one thread, which is no wish of the tests that come after."""
    for which in ("INTRA", "INTER"):
        monkeypatch.setenv(f"TF_NUM_{which}OP_THREADS", "2")


def test_check_finds_every_bad_shard_and_names_it(own_study, own_threads, capsys):
    shards = prepare.prepare(data(), jobs=1)[0]
    arguments = ["--cfg", str(own_study / "experiment.yaml"), "--check", "--jobs", "1"]
    assert prepare.main(arguments) == 0
    manifest = json.loads((shards.folder / "manifest.json").read_text())
    files = [shards.folder / row["file"] for row in shards.rows]
    damage(files[0], lambda whole: whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    damage(files[1], lambda whole: whole[: len(whole) // 2])
    files[2].unlink()
    shutil.copy(files[3], shards.folder / "stranger+1.tfrecord")
    manifest["volumes"][4]["classes"] = [0]
    # Whole in itself, with a right hash, but of another patient:
    shutil.copy(files[6], files[5])
    manifest["volumes"][5]["shard_sha256"] = manifest["volumes"][6]["shard_sha256"]
    (shards.folder / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert prepare.main(arguments) == 2
    error = capsys.readouterr().err
    named = [path.name for path in files if path.name in error]
    assert named == [files[number].name for number in (0, 1, 2, 4, 5)]
    assert "stranger+1.tfrecord" in error and "received 6" in error.splitlines()[-1]


def test_check_decodes_what_a_right_hash_hides(own_study, capsys):
    """A shard whose masks hold a class that the card does not know, put there with its own hash."""
    shards = prepare.prepare(data(datasets=["cards/a.yaml"]), jobs=1)[0]
    row, path = shards.rows[3], shards.folder / shards.rows[3]["file"]
    found = find_scans(*load_card(own_study / "cards/a.yaml"))[3]
    harmonised = prepare.harmonise_scan(found, row["sources"], data())
    records.write_shard(dataclasses.replace(harmonised, mask=harmonised.mask * np.uint8(2)), path)
    manifest = json.loads((shards.folder / "manifest.json").read_text())
    manifest["volumes"][3] |= records.read_row(path)
    (shards.folder / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = prepare.check(data(datasets=["cards/a.yaml"]), Engine(jobs=1))
    assert path.name in problem and "classes" in problem


def test_check_without_shards_says_so(own_study):
    with pytest.raises(InputError, match="prepare them first") as error:
        prepare.check(data(), Engine(jobs=1))
    assert error.value.code == "NOT_FOUND"


def test_workers_compute_with_one_thread_each_and_no_gpu_and_answer_in_order():
    names = ["TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "CUDA_VISIBLE_DEVICES", "NO_SUCH_VARIABLE"] * 4
    assert list(workers.each(os.getenv, names, Engine(jobs=2))) == ["1", "1", "-1", None] * 4
    assert list(workers.each(os.getenv, [], Engine(jobs=2))) == []


def test_a_ray_cluster_makes_the_same_shards_and_tells_bad_input_the_same(own_study):
    ray = pytest.importorskip("ray")
    (own,) = prepare.prepare(data(shards="own", datasets=["cards/a.yaml"]), jobs=1)
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        (made,) = prepare.prepare(data(datasets=["cards/a.yaml"]), engine=Engine("ray", 2))
        assert own.rows == made.rows and contents(own.folder) == contents(made.folder)
        damage(own_study / "raw/a/a-003/image.nii.gz", lambda whole: whole[:100])
        with pytest.raises(InputError, match=r"a-003/image\.nii\.gz"):
            prepare.prepare(data(datasets=["cards/a.yaml"]), engine=Engine("ray", 2))
    finally:
        ray.shutdown()


def test_a_cluster_that_nobody_runs_is_one_sentence_at_once(own_study, own_threads, capsys):
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    assert prepare.main(["--cfg", "experiment.yaml", "--engine", "ray", "--address", address]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert address in line and "Expected a Ray cluster" in line


def test_ray_that_is_not_installed_is_one_sentence(own_study, own_threads, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert prepare.main(["--cfg", "experiment.yaml", "--engine", "ray"]) == 2
    assert "pip install 'lvseg[cluster]'" in capsys.readouterr().err
    assert prepare.main(["--cfg", "experiment.yaml", "--address", "here:6379"]) == 2
    assert "--engine ray" in capsys.readouterr().err
