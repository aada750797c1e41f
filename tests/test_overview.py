"""The summary page: right numbers, pictures that show the mask, what is unusual flagged, and no network needed."""

import base64
import csv
import html.parser
import io
import json
import math
import re
import shutil

import dataset_trees as trees
import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from dataset_trees import fat_study, write_nifti
from small_study import EXPERIMENT, PATIENTS, scan, write_card

from lvseg import overview, prepare, records
from lvseg.config import Data
from lvseg.errors import InputError
from lvseg.formats import write_volume
from lvseg.overview import Quantity
from lvseg.volume import Volume
from lvseg.workers import Engine

ONE = Engine(jobs=1)


class Page(html.parser.HTMLParser):
    """What a browser would make of the page: texts, attributes, and the rows of the table of all scans."""

    def __init__(self, text):
        super().__init__()
        self.attributes, self.rows, self.cards, self.open = [], [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.attributes.append((tag, found))
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        if "card" in found.get("class", "").split():
            self.open = self.cards.setdefault(found["id"], {"flag": "flag" in found["class"].split(), "text": ""})
        if tag == "img" and self.open is not None:
            self.open["picture"] = found["src"]

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data
        if self.open is not None:
            self.open["text"] += data


def shards_of(folder, monkeypatch, dataset="a", size=64, spacing_mm=(3.0, 3.0)):
    monkeypatch.chdir(folder)
    keys = {"datasets": [f"cards/{dataset}.yaml"], "shards": "shards", "spacing_mm": list(spacing_mm), "size": size}
    return prepare.prepare(Data(**{**EXPERIMENT["data"], **keys}), jobs=1)[0]


@pytest.fixture
def odd_study(tmp_path):
    """Ten patients, of whom 2 is five times as bright, 5 has half the pixels' size, 7 two parts and 8 a tiny organ."""
    for number in range(PATIENTS):
        image, mask = scan("a", number)
        if number == 2:
            image = image.with_voxels(image.voxels * np.int16(5))
        if number == 5:
            affine = image.affine @ np.diag([1, 0.5, 0.5, 1])
            image, mask = Volume(image.voxels, affine), Volume(mask.voxels, affine)
        if number == 7:
            voxels = mask.voxels.copy()
            voxels[4, 1:8, 1:20] = 1
            mask = mask.with_voxels(voxels)
        if number == 8:
            voxels = np.zeros_like(mask.voxels)
            voxels[3:6, 18:22, 20:24] = 1
            mask = mask.with_voxels(voxels)
        home = tmp_path / f"raw/a-{number:03d}"
        home.mkdir(parents=True)
        write_volume(image, home / "image.nii.gz")
        write_volume(mask, home / "mask.nii.gz")
    write_card(tmp_path, "a", root="../raw", mask="{patient}/mask.nii.gz", labels={"organ": [1]})
    return tmp_path


def test_the_page_shows_every_scan_flags_the_odd_ones_and_needs_nothing_else(odd_study, monkeypatch):
    shards = shards_of(odd_study, monkeypatch)
    shutil.rmtree(odd_study / "raw")
    text = overview.write(shards.folder, ONE).read_text(encoding="utf-8")
    assert overview.write(shards.folder, ONE).read_text(encoding="utf-8") == text
    page = Page(text)
    assert not re.search(r"(?:https?:)?//[a-z]", re.sub(r"data:image/jpeg;base64,[\w+/=]+", "", text))
    for tag, found in page.attributes:
        assert tag not in ("link", "iframe", "object") and (tag != "script" or "src" not in found)
        assert found.get("src", "data:image/jpeg").startswith("data:image/jpeg")
    assert len(page.cards) == PATIENTS
    flagged = {name[:5] for name, card in page.cards.items() if card["flag"]}
    assert {"a-002", "a-005", "a-007", "a-008"} <= flagged
    reasons = {name[:5]: card["text"] for name, card in page.cards.items()}
    assert "99th percentile of the intensity" in reasons["a-002"] and "row spacing of 1.500 mm" in reasons["a-005"]
    assert "2 separate parts" in reasons["a-007"] and "organ volume" in reasons["a-008"]
    assert "unusual" not in "".join(reasons[name] for name in reasons if name not in flagged)


def test_numbers_are_those_of_the_shards(odd_study, monkeypatch):
    shards = shards_of(odd_study, monkeypatch)
    overview.write(shards.folder, ONE)
    with (shards.folder / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for number, (row, made) in enumerate(zip(rows, shards.rows, strict=True)):
        image, mask = scan("a", number)
        voxels = image.voxels * (5 if number == 2 else 1)
        mask_there = records.decode(
            next(iter(tf.data.TFRecordDataset(str(shards.folder / made["file"])))), 64
        ).mask.numpy()  # fmt: skip
        assert (row["patient"], row["scan"]) == (f"a-{number:03d}", f"a-{number:03d}/image.nii.gz")
        assert float(row["volume_ml_organ"]) == pytest.approx(mask_there.sum() * 5 * 3 * 3 / 1000, rel=1e-4)
        assert int(row["slices_with_mask"]) == mask_there.any(axis=(1, 2)).sum()
        np.testing.assert_allclose(
            [float(row[name]) for name in ("minimum", "p1", "p50", "p99", "maximum")],
            np.percentile(voxels, [0, 1, 50, 99, 100]),
            rtol=1e-4,
        )
        if number not in (5, 7, 8):  # the grid is the scan's own, so the volume is its mask's
            assert float(row["volume_ml_organ"]) == pytest.approx(mask.voxels.sum() * 45 / 1000, rel=1e-4)
    assert [row["parts_organ"] for row in rows] == ["2" if number == 7 else "1" for number in range(PATIENTS)]


def test_a_picture_is_the_slice_in_grey_with_the_outline_in_colour():
    image, mask = np.zeros((64, 64)), np.zeros((64, 64), np.uint8)
    image[8:56, 8:56], mask[24:40, 20:44] = 100, 2
    picture = PIL.Image.open(io.BytesIO(overview.picture_jpeg(image, mask, (0, 200)))).convert("RGB")
    pixels = np.array(picture).astype(int)
    colour = np.abs(pixels - overview.COLOURS[1]).sum(axis=2) < 120
    side = pixels.shape[0] / 52  # 48 pixels and a margin of 4 % on each side, rounded outwards
    assert side == round(256 / 52)
    where = np.argwhere(colour)
    np.testing.assert_allclose(where.min(axis=0), [(24 - 6) * side, (20 - 6) * side], atol=side)
    np.testing.assert_allclose(where.max(axis=0), [(40 - 6) * side, (44 - 6) * side], atol=side)
    inside = pixels[int(20 * side) : int(30 * side), int(20 * side) : int(30 * side)]
    np.testing.assert_allclose(inside, 127.5, atol=6)  # half of the window, and no outline within
    assert len(overview.picture_jpeg(np.zeros((8, 8)), np.zeros((8, 8), np.uint8), (0, 0))) > 100


def test_fat_fractions_and_swapped_pairs_are_shown(tmp_path, monkeypatch):
    fat_study(tmp_path, 9, swapped=(4,))
    shards = shards_of(tmp_path, monkeypatch, "fat", 80)
    page = Page(overview.write(shards.folder, ONE).read_text(encoding="utf-8"))
    with (shards.folder / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        percent = 100 * (20 + 5 * number) / (500 + 5 * number)
        percent = 100 - percent if number == 4 else percent
        for name in ("mean", "median", "p5", "p95"):
            assert float(row[f"fat_percent_{name}"]) == pytest.approx(percent, abs=0.2)
    cards = {name[:2]: card for name, card in page.cards.items()}
    assert [name for name, card in cards.items() if "swapped" in card["text"]] == ["p4"] and cards["p4"]["flag"]


def test_scans_without_a_mask_are_not_among_those_whose_fat_is_known(tmp_path, monkeypatch):
    fat_study(tmp_path, 4)  # 4.0, 5.0, 5.9 and 6.8 % of fat
    empty = tmp_path / "raw/fat/p3/mask.nii.gz"
    write_nifti(empty, np.zeros((6, 60, 72), np.uint8))
    shards = shards_of(tmp_path, monkeypatch, "fat", 80)
    text = overview.write(shards.folder, ONE).read_text(encoding="utf-8")
    assert "<b>1 of 3</b>above 5.56 % mean fat" in text


def test_what_is_common_to_most_scans_is_said_once(tmp_path, monkeypatch):
    fat_study(tmp_path, 4)  # livers from the first to the last slice
    shards = shards_of(tmp_path, monkeypatch, "fat", 80)
    text = overview.write(shards.folder, ONE).read_text(encoding="utf-8")
    assert "<b>4 of 4</b> scans the mask reaches" in text
    assert not any(card["flag"] for card in Page(text).cards.values())


def test_an_organ_that_the_field_cuts_off_is_told(odd_study, monkeypatch):
    shards = shards_of(odd_study, monkeypatch, size=32, spacing_mm=(1.0, 1.0))
    rows = overview.write(shards.folder, ONE).with_name("summary.csv").read_text(encoding="utf-8")
    assert "the scan is 120 mm high, the field 32 mm" in rows


def test_what_a_scan_s_headers_have_against_its_slices_is_told(tmp_path, monkeypatch, capsys):
    """Slices twice as far apart as SpacingBetweenSlices: every second one may be missing."""
    for number in range(3):
        image, liver, _ = trees.body(number)
        names = [f"{index:03d}.dcm" for index in range(len(image))]
        distance_mm = trees.SPACING_MM[0] / (2 if number == 1 else 1)
        trees.write_dicom(tmp_path / f"raw/p{number}/dicom", names, image, SpacingBetweenSlices=distance_mm)
        trees.write_nifti(tmp_path / f"raw/p{number}/mask.nii.gz", liver.astype(np.uint8))
    write_card(tmp_path, "a", root="../raw", image="{patient}/dicom", mask="{patient}/mask.nii.gz",
               labels={"organ": [1]})  # fmt: skip
    shards = shards_of(tmp_path, monkeypatch)
    told = [line for line in capsys.readouterr().err.splitlines() if "some may be missing" in line]
    assert len(told) == 1 and "raw/p1/dicom" in told[0]
    cards = Page(overview.write(shards.folder, ONE).read_text(encoding="utf-8")).cards
    assert [name[:2] for name, card in cards.items() if "some may be missing" in card["text"]] == ["p1"]


def test_names_from_files_are_text(odd_study, monkeypatch):
    name = "<script>alert(1)<"
    (odd_study / "raw/a-003").rename(odd_study / "raw" / name)
    page = overview.write(shards_of(odd_study, monkeypatch).folder, ONE)
    assert name not in page.read_text(encoding="utf-8")
    assert any(name in cell for row in Page(page.read_text(encoding="utf-8")).rows for cell in row)


QUANTITY = Quantity("x", "size", "mm", False, 0.1, 1)


def reasons(values, quantity=QUANTITY):
    return overview.unusual([{"x": value} for value in values], [quantity], "scanner one")


def test_unusual_is_a_modified_z_score_beyond_its_limit():
    """Median 5.5, median deviation 2.5: 30 has z = 24.5 / (1.4826 x 2.5) = 6.61, 1 has -1.21."""
    found = reasons([*range(1, 10), 30])
    assert [bool(own) for own in found] == [False] * 9 + [True]
    assert all(word in found[9][0] for word in ("size of 30.0 mm", "scanner one", "median is 5.5 mm", "+6.6"))


def test_scans_that_are_all_alike_flag_what_differs_by_more_than_rounding():
    assert [bool(own) for own in reasons([5.0] * 9 + [5.2])] == [False] * 10  # z = 2 of the floor
    assert [bool(own) for own in reasons([5.0] * 9 + [5.5])] == [False] * 9 + [True]


def test_volumes_are_compared_by_their_logarithms_and_few_scans_not_at_all():
    doubling = [2.0**power for power in range(9)]
    logarithm = Quantity("x", "volume", "ml", True, 0.02)
    assert not any(reasons(doubling, logarithm)) and any(reasons(doubling))
    assert not any(reasons([1, 1, 1, 1, 1, 1, 100]))
    assert [bool(own) for own in reasons([math.nan, None, 0.0, *doubling, 2.0**40], logarithm)] == [False] * 12 + [True]


def test_without_a_manifest_the_sentence_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="prepare them first") as error:
        overview.write(tmp_path, ONE)
    assert error.value.code == "NOT_FOUND"


def test_the_pictures_in_the_page_are_the_scans_own(odd_study, monkeypatch):
    shards = shards_of(odd_study, monkeypatch)
    manifest = json.loads((shards.folder / "manifest.json").read_text(encoding="utf-8"))
    page = Page(overview.write(shards.folder, ONE).read_text(encoding="utf-8"))
    for row in manifest["volumes"]:
        card = page.cards[row["file"].replace("+", "%2B")]
        picture = np.array(PIL.Image.open(io.BytesIO(base64.b64decode(card["picture"].split(",")[1]))).convert("RGB"))
        yellow = np.abs(picture.astype(int) - overview.COLOURS[0]).sum(axis=2) < 150
        assert row["patient"] in card["text"] and 20 < yellow.sum() < 0.2 * yellow.size
