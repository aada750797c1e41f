"""The scripts beside the experiments: the curve of segmented patients, ablation, robustness, and renderings."""

import importlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from small_study import ROOT, scan

from lvseg import command, metrics
from lvseg.cards import find_scans, load_card, read_image
from lvseg.config import load_experiment
from lvseg.errors import InputError
from lvseg.export import publish
from lvseg.predict import Segmenter
from lvseg.prepare import prepare
from lvseg.volume import Volume


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.append(str(ROOT / "experiments"))  # where scripts find their neighbours
ablation, curve, robustness, tables = (script(name) for name in ("ablation", "curve", "robustness", "rows"))
points = importlib.import_module("points")


@pytest.fixture
def known_and_new(study, monkeypatch, tmp_path):
    """The study's two scanners as the curve's: a is known, b is new."""
    monkeypatch.chdir(study)
    monkeypatch.setattr(curve, "OUT", tmp_path / "curve")
    monkeypatch.setattr(curve, "DIRECTIONS", {"b": ("a",)})
    monkeypatch.setattr(curve, "CONFIGS", {"volume": "experiment.yaml"})
    monkeypatch.setattr(curve, "card_of", lambda task, scanner: Path(f"cards/{scanner}.yaml"))
    return tmp_path / "curve"


def run(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["curve", *map(str, arguments)])
        return curve.main()


def test_no_patient_is_both_segmented_and_measured(known_and_new):
    scans = curve.card_scans(Path("cards/b.yaml"))
    pool, held_out = curve.parts(scans)
    assert not set(pool) & set(held_out) and len(pool) + len(held_out) == len({each.patient for each in scans})
    assert curve.parts(scans[::-1]) == (pool, held_out)
    path = curve.card_with(Path("cards/b.yaml"), pool[:2], known_and_new / "some.yaml")
    card, root = load_card(path)
    assert {each.patient for each in find_scans(card, root)} == set(pool[:2])


def test_a_training_as_in_the_report_sees_the_known_scanner_and_the_chosen_patients_alone(known_and_new, monkeypatch):
    seen = []
    monkeypatch.setattr(curve, "train", seen.append)
    pool, _ = curve.parts(curve.card_scans(Path("cards/b.yaml")))
    curve.trained_as_in_the_report("volume", "b", pool[:3], "one", 50)
    from lvseg import prepare

    sets = prepare.prepare(seen[0].data)
    split = prepare.split(seen[0].data, sets)
    known = {each.patient for each in curve.card_scans(Path("cards/a.yaml"))}
    assert set(split.train) > set(pool[:3]) and set(split.validation) < known and not split.test
    assert set(split.train) | set(split.validation) == known | set(pool[:3])
    assert seen[0].train.steps == 50
    assert seen[0].train.learning_rate == load_experiment(Path("experiment.yaml")).train.learning_rate
    # Other steps or patients are another run, the same ones go on with it.
    for patients, steps in ((pool[:3], None), (pool[1:4], 50), (pool[:3], 50)):
        curve.trained_as_in_the_report("volume", "b", patients, "one", steps)
    folders = [experiment.run_folder for experiment in seen]
    assert len(set(folders)) == 3 and folders[3] == folders[0] and folders[0].name.startswith("one-")
    assert [experiment.train.steps for experiment in seen[:2]] == [
        50, load_experiment(Path("experiment.yaml")).train.steps,
    ]  # fmt: skip


def model_that_knows(patients: set[str], trained: Path, out: Path) -> Path:
    """A model with another split in its card."""
    model = out / "models/volume/1"
    shutil.copytree(trained, model)
    info = json.loads((model / "model.json").read_text())
    info["provenance"]["split"] = {"train": sorted(patients), "validation": [], "test": []}
    (model / "model.json").write_text(json.dumps(info))
    return model


def test_a_model_that_has_seen_the_new_scanner_is_refused(known_and_new, trained, tmp_path, capsys):
    pool, held_out = curve.parts(curve.card_scans(Path("cards/b.yaml")))
    for patient in (pool[0], held_out[0]):
        model = model_that_knows({patient}, trained / "model", tmp_path / patient)
        assert run("--task", "volume", "--model", model, "--only", "b", "--patients", 0) == 2
        assert patient in capsys.readouterr().err
    assert not (known_and_new / "volume.csv").exists()


def test_a_model_of_other_classes_is_refused_before_anything_is_measured(known_and_new, trained, tmp_path, capsys):
    model = model_that_knows({"nobody"}, trained / "model", tmp_path)
    info = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps({**info, "labels": ["background", "spleen"]}))
    assert run("--task", "volume", "--model", model, "--only", "b", "--patients", 0, "--ways", "any") == 2
    assert "background, spleen" in capsys.readouterr().err and not (known_and_new / "volume.csv").exists()


def test_the_curve_measures_both_ways_once_and_goes_on(known_and_new, trained, tmp_path, monkeypatch, capsys):
    made = []
    # Three models, each with other masks: of the report's way, for any scanner, and what that was adapted to.
    known = {each.patient for each in curve.card_scans(Path("cards/a.yaml"))}
    first = model_that_knows(known, publish([trained / "model"], tmp_path / "smaller", None, 0.05), tmp_path)
    larger = publish([trained / "model"], tmp_path / "larger", None, 20.0)

    def train(task, scanner, patients, name, steps):
        made.append(("report", tuple(patients)))
        return trained / "model"

    def adapt(model, cards, out, patients, plan):
        card, root = load_card(cards[0])
        made.append(("any", tuple(sorted({each.patient for each in find_scans(card, root)}))))
        assert model == first and curve.OUT in out.parents
        return {"version": str(larger)}

    monkeypatch.setattr(curve, "trained_as_in_the_report", train)
    monkeypatch.setattr(curve, "adapt", adapt)
    monkeypatch.setattr(curve, "print_measured", lambda measured, own_masks: None)
    options = ["--task", "volume", "--model", first.parent, "--only", "b", "--draws", 2]
    assert run(*options, "--patients", 0, 2, 2) == 0
    pool, held_out = curve.parts(curve.card_scans(Path("cards/b.yaml")))
    assert [way for way, _ in made] == ["report", "report", "any", "report", "any"]
    assert made[0] == ("report", ()) and set(made[1][1]) <= set(pool) and made[1][1] != made[3][1]
    assert set(made[2][1]) == set(made[1][1]) and set(made[4][1]) == set(made[3][1])
    rows = curve.rows_of(known_and_new / "volume.csv", curve.COLUMNS)
    assert len(rows) == 6 * len(held_out) and {row["patient"] for row in rows} == set(held_out)
    segmenters = {
        ("report", "0"): Segmenter(trained / "model"), ("report", "2"): Segmenter(trained / "model"),
        ("any", "0"): Segmenter(first), ("any", "2"): Segmenter(larger),
    }  # fmt: skip
    for row in rows:
        image, truth = scan("b", int(row["patient"][2:]))
        mask = segmenters[row["way"], row["patients"]].segment(image).mask
        assert float(row["dice"]) == pytest.approx(metrics.dice(mask.voxels, truth.voxels))
        error = 100 * (np.count_nonzero(mask.voxels) / np.count_nonzero(truth.voxels) - 1)  # voxels of one size
        assert float(row["volume_error_percent"]) == pytest.approx(error) and row["fat_error_points"] == ""
    of_ways = [{row["dice"] for row in rows if (row["way"], row["patients"]) == each} for each in segmenters]
    assert of_ways[0] == of_ways[1] and not of_ways[1] & of_ways[2] and not of_ways[2] & of_ways[3]
    printed = capsys.readouterr().out
    mean = np.mean([float(row["dice"]) for row in rows if (row["way"], row["patients"]) == ("any", "0")])
    info, steps = json.loads((first / "model.json").read_text()), load_experiment(Path("experiment.yaml")).train.steps
    assert f"| b | any | {info['weights_sha256'][:16]} | 0 | 1 | - | {mean:.3f} (" in printed
    assert f"| b | report | {steps} steps, config " in printed
    with Image.open(known_and_new / "volume.png") as picture:
        assert picture.size[0] > 300
    made.clear()
    assert run(*options, "--patients", 0, 2) == 0 and not made  # all of it is there
    assert run(*options, "--patients", 99) == 2
    for option in ("--draws", "--steps"):
        capsys.readouterr()
        assert run(*options, option, 0) == 2 and f"{option} of 1 or more" in capsys.readouterr().err
    for one_of in (("--steps", 7), ("--steps", steps)):  # other steps have a curve of their own
        assert run(*options, "--patients", 0, *one_of) == 0
    assert made == [("report", ())]
    # So have another postprocessing and other weights.
    for key, value in (("postprocessing", ["largest_component"]), ("weights_sha256", "0" * 64)):
        (first / "model.json").write_text(json.dumps(info | {key: value}))
        with pytest.MonkeyPatch.context() as patch:  # weights that have this digest cannot be made
            patch.setattr("lvseg.predict.weights_sha256", lambda _, own=(info | {key: value})["weights_sha256"]: own)
            assert run(*options, "--patients", 0, "--ways", "any") == 0
    (first / "model.json").write_text(json.dumps(info))
    table = capsys.readouterr().out.splitlines()[-7:]
    assert len({line.split("|")[3] for line in table if "| b | any |" in line}) == 3
    assert len({line.split("|")[3] for line in table if "| b | report |" in line}) == 2
    made.clear()
    assert run("--task", "volume", "--only", "b") == 2 and "--model" in capsys.readouterr().err
    with command.alone(known_and_new / ".lock", known_and_new, waits=False):  # while it measures
        assert run("--task", "volume", "--table") == 0
    assert capsys.readouterr().out.splitlines()[-7:] == table and not made
    assert run(*options, "--patients", len(pool)) == 0 and len(made) == 2  # all draws of everybody would be the same
    monkeypatch.setattr(curve, "parts", lambda scans: (held_out, pool))  # the card's patients are others now
    assert run(*options, "--patients", 0) == 2 and f"received {rows[0]['patient']};" in capsys.readouterr().err


def test_what_was_begun_and_not_ended_is_not_written(tmp_path):
    def breaks():
        yield {"name": "b", "dice": 1.0}
        raise RuntimeError

    path, columns = tmp_path / "deeper/rows.csv", {"name": str, "dice": tables.number}
    tables.add_rows(path, columns, [], [{"name": "a", "dice": 0.5}])
    before = tables.rows_of(path, columns)
    with pytest.raises(RuntimeError):
        tables.add_rows(path, columns, before, breaks())
    assert tables.rows_of(path, columns) == before == [{"name": "a", "dice": "0.5"}]
    tables.add_rows(path, columns, before, [{"name": "b", "dice": 1.0}])
    assert [row["name"] for row in tables.rows_of(path, columns)] == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"name\na\n",
        b"dice,name\n1,a\n",
        b"name,dice\na\n",
        b"name,dice\na,1,2\n",
        b"name,dice\na,much\n",
        b"name,dice\na,nan\n",
        b"name,\xff",
    ],
)
def test_a_damaged_table_is_one_sentence_and_stays_as_it_is(tmp_path, content):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"Expected a table of name, dice in .*rows\.csv, received"):
        tables.rows_of(path, {"name": str, "dice": tables.number})
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("column", "wrong"),
    [("way", "both"), ("patients", "1.5"), ("draw", ""), ("volume_error_percent", "inf"), ("fat_error_points", "much")],
)
def test_a_curves_row_has_what_its_table_and_pictures_need(tmp_path, column, wrong):
    path, (row, *_) = tmp_path / "volume.csv", rows_of_points(("any", "w", "0", "0", 0.5))
    tables.add_rows(path, curve.COLUMNS, [], [row, {**row, "fat_error_points": "-0.2"}])
    assert [each["fat_error_points"] for each in tables.rows_of(path, curve.COLUMNS)] == ["", "-0.2"]
    tables.add_rows(path, curve.COLUMNS, [row], [{**row, column: wrong}])
    with pytest.raises(InputError, match=r"Expected a table of scanner, way, .* in .*volume\.csv, received"):
        tables.rows_of(path, curve.COLUMNS)


def rows_of_points(*known: tuple[str, str, str, str, float], error: float | None = 1.0) -> list[dict[str, str]]:
    """Six patients of each (way, made_of, patients, draw, Dice of the first), a hundredth of Dice apart."""
    return [
        {"scanner": "b", "way": way, "made_of": made_of, "patients": count, "draw": draw, "patient": f"p{place}",
         "dice": str(dice + 0.01 * place), "volume_error_percent": "" if error is None else str(error),
         "fat_error_points": ""}
        for way, made_of, count, draw, dice in known
        for place in range(6)
    ]  # fmt: skip


def test_the_curves_table_says_how_far_draws_lie_apart():
    draws = (("0", 0.60), ("1", 0.90), ("2", 0.95))
    rows = rows_of_points(*(("any", "w", "3", *draw) for draw in draws), ("any", "w", "0", "0", 0.5))
    _, _, none, three = points.table(rows).splitlines()
    assert none.startswith("| b | any | w | 0 | 1 | - | 0.525 (")
    assert three.startswith("| b | any | w | 3 | 3 | 0.625 to 0.975 | 0.842 (")


def test_the_curves_are_drawn_through_the_tables_numbers(tmp_path):
    rows = rows_of_points(("any", "w", "0", "0", 0.5), ("any", "w", "10", "0", 0.6), ("any", "w", "10", "1", 0.8),
                          ("report", "all steps", "10", "0", 0.3))  # fmt: skip
    figure = drawn(rows, tmp_path)
    dice, errors = figure.axes  # no fat was measured
    assert (dice.get_ylabel(), errors.get_ylabel()) == ("mean Dice", "mean absolute volume error (%)")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["as in the report (all steps)", "for any scanner (w)"]
    report, of_any = (container.lines[0].get_ydata() for container in dice.containers)
    np.testing.assert_allclose(report, [0.325])
    np.testing.assert_allclose(of_any, [0.525, 0.725])
    [bars] = dice.containers[1].lines[2]
    mean = points.points(rows)[1].measures["dice"]
    np.testing.assert_allclose(bars.get_segments()[1][:, 1], mean[1:])  # the interval that the table has
    assert [label.get_text() for label in errors.get_xticklabels()] == ["0", "10"]
    assert [0.625, 0.825] in [np.round(line.get_ydata(), 9).tolist() for line in dice.lines]  # each draw


def drawn(rows: list[dict[str, str]], folder: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        figures: list[Any] = []
        patch.setattr(points.figures, "save", lambda figure, path: figures.append(figure))
        points.draw_curves(rows, folder / "volume")
    return figures[0] if figures else None


def test_errors_that_differ_by_rounding_or_not_at_all_are_drawn(tmp_path):
    alike = drawn(rows_of_points(("any", "w", "0", "0", 0.5), error=99.9), tmp_path)  # mean and interval an ulp apart
    assert alike.axes[1].get_yscale() == "log"
    none = drawn(rows_of_points(("any", "w", "0", "0", 0.5), ("any", "w", "1", "0", 0.5), error=0.0), tmp_path)
    (line,) = none.axes[1].containers
    assert none.axes[1].get_yscale() == "linear" and line.lines[0].get_ydata().tolist() == [0.0, 0.0]


def test_draws_of_the_same_patients_make_no_interval_narrower():
    once = rows_of_points(("any", "w", "3", "0", 0.5))
    thrice = rows_of_points(*(("any", "w", "3", draw, 0.5) for draw in "012"))
    (one,), (three,) = points.points(once), points.points(thrice)
    assert len(three.dice_of_draws) == 3
    assert three.measures["dice"] == pytest.approx(one.measures["dice"])


def test_errors_of_volume_and_fat_are_those_of_a_hand_calculation(monkeypatch, tmp_path):
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    fat = Volume(np.full((2, 4, 4), 10.0, np.float32), affine, metadata={"units": "percent"})
    fat.voxels[:, :2] = 30.0
    truth, found, nothing = (np.zeros((2, 4, 4), np.uint8) for _ in range(3))
    truth[:, 1:3] = 1  # half of it at 30 %, half at 10 %: 20 % in 16 voxels
    found[:, :3] = 1  # 24 voxels, two thirds at 30 %: 23.33 %
    answers = iter([found, nothing])

    def segment(image, modality):
        return SimpleNamespace(mask=image.with_voxels(next(answers)))

    monkeypatch.setattr(curve, "Segmenter", lambda model: SimpleNamespace(segment=segment))
    monkeypatch.setattr(curve, "read_image", lambda each: fat)
    monkeypatch.setattr(curve, "read_labels", lambda each, image: fat.with_voxels(truth))
    scans = [SimpleNamespace(patient=name, card=SimpleNamespace(modality="MR")) for name in ("p1", "p2")]
    one, other = curve.measured(tmp_path, scans)
    assert one["dice"] == pytest.approx(2 * 16 / (16 + 24)) and one["volume_error_percent"] == pytest.approx(50)
    assert one["fat_error_points"] == pytest.approx(70 / 3 - 20)
    assert other["volume_error_percent"] == pytest.approx(-100) and other["fat_error_points"] == pytest.approx(-20)


def test_few_patients_have_no_interval(tmp_path):
    two = [row for row in rows_of_points(("any", "w", "0", "0", 0.5)) if row["patient"] in ("p0", "p1")]
    assert "| 0.505 (no interval) | 1.00 % (no interval) | - |" in points.table(two)
    [bars] = drawn(two, tmp_path).axes[0].containers[0].lines[2]
    np.testing.assert_allclose(np.diff(bars.get_segments()[0][:, 1]), 0)
    one = [row for row in two if row["patient"] == "p0"]
    assert drawn(one, tmp_path) is None and points.table(one).endswith("| - | - | - | - |")


def test_many_curves_stay_beside_their_number_of_patients(tmp_path):
    rows = rows_of_points(*(("any", f"w{number}", count, "0", 0.5) for number in range(9) for count in ("0", "1")))
    figure = drawn(rows, tmp_path)
    lines = [container.lines[0] for container in figure.axes[0].containers]
    assert all(abs(line.get_xdata() - [0, 1]).max() < 0.5 for line in lines)
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == 9


IMAGE, TRUTH = scan("a", 3)


def voxels_after(name: str, value: float) -> tuple[np.ndarray, np.ndarray, Volume]:
    image, mask = robustness.changed(IMAGE, TRUTH, name, value, seed=4)
    return image.voxels, mask.voxels, image


def test_changes_that_change_nothing():
    canonical, truth = IMAGE.canonical().voxels.astype(np.float32), TRUTH.canonical().voxels
    spacing_mm = IMAGE.canonical().spacing_mm[0]
    for name, value in {"gamma": 1.0, "intensity offset (share of the range)": 0.0, "intensity scale": 1.0,
                        "noise (% of the range)": 0.0, "share of the liver's slices": 1.0}.items():  # fmt: skip
        image, mask, volume = voxels_after(name, value)
        np.testing.assert_allclose(image, canonical, atol=0.01)
        assert np.array_equal(mask, truth) and volume.spacing_mm[0] == pytest.approx(spacing_mm)
    assert set(robustness.CHANGES) >= {"gamma", "slice distance (mm)"}


def test_intensities_change_as_they_say():
    plain = IMAGE.canonical().voxels.astype(np.float64)
    low, high = plain.min(), np.percentile(plain, 99.5)
    bent, _, _ = voxels_after("gamma", 2.0)
    np.testing.assert_allclose(bent, low + (high - low) * ((plain - low) / (high - low)) ** 2, rtol=1e-4, atol=0.05)
    shifted, _, _ = voxels_after("intensity offset (share of the range)", 0.5)
    np.testing.assert_allclose(shifted - plain, 0.5 * (high - low), rtol=1e-4)
    noisy, _, _ = voxels_after("noise (% of the range)", 5.0)
    bright = plain > low + 0.6 * (high - low)
    assert (noisy - plain)[bright].std() == pytest.approx(0.05 * (high - low), rel=0.1)
    assert noisy.min() >= low - 0.01


def test_thicker_slices_are_means_and_keep_their_truth():
    canonical, truth = IMAGE.canonical(), TRUTH.canonical().voxels
    own_mm = canonical.spacing_mm[0]
    image, mask, volume = voxels_after("slice distance (mm)", 2 * own_mm)
    assert len(image) == len(mask) and volume.spacing_mm[0] == pytest.approx(2 * own_mm)
    height = (len(truth) - 1) * own_mm
    assert (len(image) - 1) * 2 * own_mm <= height < len(image) * 2 * own_mm
    # Centres on every other slice: half of it and a quarter of either neighbour, as far as there are any.
    plain = canonical.voxels.astype(np.float64)
    np.testing.assert_allclose(image[0], (plain[0] + plain[1] * 0.5) / 1.5, rtol=1e-5)
    np.testing.assert_allclose(image[1], (plain[1] * 0.5 + plain[2] + plain[3] * 0.5) / 2, rtol=1e-5)
    assert np.array_equal(mask[1], truth[1] * 0.25 + truth[2] * 0.5 + truth[3] * 0.25 >= 0.5)
    same, same_mask, _ = voxels_after("slice distance (mm)", own_mm)
    np.testing.assert_allclose(same, plain, rtol=1e-5)
    assert np.array_equal(same_mask, truth)
    thin, thin_mask, thin_volume = voxels_after("slice distance (mm)", own_mm / 2)
    assert thin_volume.spacing_mm[0] == pytest.approx(own_mm / 2) and len(thin) == 2 * len(truth) - 1
    np.testing.assert_allclose(thin[::2], plain, rtol=1e-5)
    np.testing.assert_allclose(thin[1], (plain[0] + plain[1]) / 2, rtol=1e-5)
    share = thin_mask.sum() * thin_volume.spacing_mm[0] / (truth.sum() * own_mm)
    assert share == pytest.approx(1.0, abs=0.15)


def test_a_slab_is_a_stretch_of_the_liver():
    truth = TRUTH.canonical().voxels
    liver = int(truth.any(axis=(1, 2)).sum())
    image, mask, _ = voxels_after("share of the liver's slices", 0.5)
    assert len(mask) == round(0.5 * liver) and mask.any(axis=(1, 2)).all()
    plain = IMAGE.canonical().voxels
    assert any(np.array_equal(image, plain[first : first + len(image)]) for first in range(len(plain)))


def test_robustness_writes_a_row_a_scan_and_change_and_draws(trained, in_study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(robustness, "CHANGES", {name: (change, values[-2:]) for name, (change, values)
                                                in robustness.CHANGES.items()})  # fmt: skip
    model = model_that_knows({"nobody"}, trained / "model", tmp_path)

    def measure(*arguments):
        monkeypatch.setattr("sys.argv", ["robustness", "-o", str(tmp_path), *map(str, arguments)])
        return robustness.main()

    monkeypatch.setattr(robustness, "read_image", lambda scan: pytest.fail("something is measured"))
    for arguments, words in (
        (("--model", model, "--card", "cards/a.yaml", "--scans", 0), "--scans of 1 or more, received 0"),
        (("--model", trained / "model", "--card", "cards/a.yaml"), "patients that the model has not seen"),
        (("--model", model, "--card", "cards/a.yaml", "-o", "cards/a.yaml"), "cards/a.yaml"),
    ):
        assert measure(*arguments) == 2 and words in capsys.readouterr().err
    monkeypatch.setattr(robustness, "read_image", read_image)
    # It was trained on these scans, whoever they are of.
    assert measure("--model", model, "--card", "cards/a.yaml") == 2
    assert "under another name" in capsys.readouterr().err and not (tmp_path / "robustness.csv").exists()
    info = json.loads((model / "model.json").read_text())
    del info["provenance"]["scans_sha256"]
    (model / "model.json").write_text(json.dumps(info))
    assert measure("--model", model, "--card", "cards/a.yaml", "--scans", 2) == 0
    rows = (tmp_path / "robustness.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * sum(len(values) for _, values in robustness.CHANGES.values())
    assert (tmp_path / "robustness.png").stat().st_size > 10_000 and (tmp_path / "robustness.svg").is_file()
    told = capsys.readouterr().out
    assert "gamma" in told and "nan" not in told  # two patients have no interval


@pytest.fixture
def small_ablation(trained, study, monkeypatch, tmp_path):
    """The study's scanner a is known, b stands for the varied one, and its run's split says who is measured on."""
    config = tmp_path / "config.yaml"
    config.write_text((ROOT / ablation.CONFIG).read_text())
    monkeypatch.chdir(study)
    monkeypatch.setattr(ablation, "CONFIG", config)
    monkeypatch.setattr(ablation, "CARDS", {"known": ("cards/a.yaml",), "peculiar": (), "varied": ("cards/b.yaml",)})
    monkeypatch.setattr(ablation, "OUT", tmp_path / "ablation.csv")
    monkeypatch.setattr(ablation, "shipped_model", lambda task: trained / "model")
    return json.loads((trained / "model/model.json").read_text())["provenance"]["split"]


def test_each_row_of_the_ablation_has_its_own_augmentations_as_strong_as_in_the_config(small_ablation):
    config = load_experiment(ablation.CONFIG)
    for row, (names, _) in ablation.ROWS.items():
        own = ablation.experiment_of(row, 1, 20, 4)
        assert {name for name, value in own.augment if value is not None} == set(names)
        for name in set(names) - set(ablation.IN_PIXELS):
            assert getattr(own.augment, name) == getattr(config.augment, name)
        assert (own.seed, own.train.steps, own.model.width) == (1, 20, 4)
    everything = ablation.experiment_of("everything", 0, 20, 4)
    assert set(ablation.EVERYTHING) == {name for name, value in config.augment if value is not None}
    for mine, theirs in (
        (everything.augment.elastic.sigma_px, config.augment.elastic.sigma_px),
        (everything.augment.blur.max_sigma_px, config.augment.blur.max_sigma_px),
        (everything.augment.resolution.max_factor, config.augment.resolution.max_factor),
    ):
        assert mine * everything.data.spacing_mm[0] == pytest.approx(theirs * config.data.spacing_mm[0])  # in mm
    neighbours = [ablation.experiment_of(f"everything{name}", 0, 20, 4).data.neighbours for name in
                  ("_without_neighbours", "", "_with_two_neighbours")]  # fmt: skip
    assert neighbours == [0, 1, 2]


def test_the_ablation_learns_and_is_measured_on_validation_patients_alone(small_ablation, monkeypatch):
    split, trained_on = small_ablation, []
    sets = prepare(ablation.experiment_of("nothing", 0, 10, 4).data)
    batches = ablation.pipeline.training_batches

    def watched(files, *others):
        trained_on.append({row["patient"] for each in sets for row in each.rows if each.folder / row["file"] in files})
        return batches(files, *others)

    monkeypatch.setattr(ablation.pipeline, "training_batches", watched)
    little, more = (ablation.dice_of("nothing", 0, steps, 4, sets) for steps in (10, 120))
    varied = ablation.dice_of("everything_on_varied_scans", 1, 1, 4, sets)
    assert set(little) == set(more) == set(varied) == {name for name in split["validation"] if name.startswith("b-")}
    assert np.mean(list(more.values())) > 0.5 > np.mean(list(little.values()))
    of_a, of_b = {row["patient"] for row in sets[0].rows}, {n for n in split["train"] if n.startswith("b-")}
    assert trained_on == [of_a, of_a, of_b] and all(name.startswith("a-") for name in of_a)


def test_a_row_on_varied_anatomy_learns_from_as_many_patients_of_its_own(small_ablation, monkeypatch):
    known, varied = prepare(ablation.experiment_of("nothing", 0, 1, 4).data)
    peculiar = varied.of(small_ablation["train"])
    few = known.of([row["patient"] for row in known.rows[:2]])
    monkeypatch.setattr(ablation, "CARDS", {"known": ("a",), "peculiar": ("b",), "varied": ("b",)})
    trained_on = []
    monkeypatch.setattr(ablation.pipeline, "training_batches", lambda files, *_: trained_on.append(files) or 1 / 0)
    for row in ("varied_anatomy", "everything_on_varied_anatomy", "nothing"):
        with pytest.raises(ZeroDivisionError):
            ablation.dice_of(row, 0, 1, 4, [few, peculiar, varied])
    files = [[shards.folder / row["file"] for row in shards.rows[:2]] for shards in (peculiar, few)]
    assert trained_on == [files[0], files[0], files[1]]


def test_the_ablation_goes_on_and_gives_differences_to_nothing_of_the_same_seed(small_ablation, monkeypatch, capsys):
    """Another gain with each seed, the same for every patient: its mean, without any spread over patients."""
    names = [f"b-{number:03d}" for number in range(6)]
    made = []

    def dice_of(row, seed, steps, width, sets):
        made.append((row, seed))
        order = names if row == "nothing" else names[::-1]
        gain = {"nothing": 0.0, "blur": (0.02, 0.08)[seed]}[row]
        return {name: 0.2 + 0.1 * names.index(name) + 0.05 * seed + gain for name in order}

    monkeypatch.setattr(ablation, "dice_of", dice_of)
    monkeypatch.setattr(ablation, "prepare", lambda data: [])

    def ablate(*options: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["ablation", *map(str, options)])
        return ablation.main(), "".join(capsys.readouterr())

    assert ablate("--only", "nothing", "--seeds", 1)[0] == 0
    code, printed = ablate("--only", "nothing", "blur", "blur", "--seeds", 2)
    assert code == 0 and made == [("nothing", 0), ("blur", 0), ("nothing", 1), ("blur", 1)]
    assert "| nothing | 0.450, 0.500 | - |" in printed
    assert "| blur | 0.470, 0.580 | +0.050 (+0.050 to +0.050) |" in printed
    assert ablate("--table") == (0, printed) and len(made) == 4
    for option, value, said in (
        ("--steps", 7, "received a row 'nothing' of others"),
        ("--steps", 0, "--steps of at least 1"),
        ("--width", 0, "--width of at least 1"),
        ("--seeds", 0, "--seeds of at least 1"),
    ):
        code, printed = ablate("--only", "blur", option, value)
        assert code == 2 and said in printed
    small_ablation["validation"].clear()
    monkeypatch.setattr(ablation, "split_of_shipped", lambda: small_ablation)  # other patients
    assert ablate("--only", "blur")[0] == 2 and len(made) == 4


def test_forty_renderings_are_drawn_and_an_experiment_without_them_is_refused(tmp_path, study, capsys):
    experiment = yaml.safe_load((ROOT / "experiments/anyscanner_volume_cpu.yaml").read_text())
    experiment["data"] |= {"size": 48, "spacing_mm": [9.0, 9.0]}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(experiment))
    drawing = script("renderings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["renderings", "--cfg", str(tmp_path / "small.yaml"), "-o", str(tmp_path / "p.png")])
        assert drawing.main() == 0
        pixels = np.asarray(Image.open(tmp_path / "p.png").convert("L"))
        assert pixels.shape == (5 * 48, 8 * 48)
        tiles = pixels.reshape(5, 48, 8, 48).transpose(0, 2, 1, 3).reshape(40, -1)
        assert tiles.std(axis=1).min() > 5 and len({tile.tobytes() for tile in tiles}) == 40
        patch.setattr(
            "sys.argv", ["renderings", "--cfg", str(study / "experiment.yaml"), "-o", str(tmp_path / "q.png")]
        )
        assert drawing.main() == 2 and not (tmp_path / "q.png").exists()
        for option, value in (("--seed", "-1"), ("--number", "-1"), ("--step", str(2**31))):
            patch.setattr("sys.argv", ["renderings", "--cfg", str(tmp_path / "small.yaml"), option, value,
                                       "-o", str(tmp_path / "q.png")])  # fmt: skip
            assert drawing.main() == 2 and f"{option} from 0" in capsys.readouterr().err
