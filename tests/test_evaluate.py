"""Evaluation around a network whose answers are known: classes, several scans a patient, empty masks, odd names."""

import csv
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lvseg import command, evaluate
from lvseg.errors import InputError
from lvseg.export import publish
from lvseg.predict import Segmentation
from lvseg.volume import Volume

AFFINE = np.array([[0, 0, 2.0, 0], [0, 2.0, 0, 0], [5.0, 0, 0, 0], [0, 0, 0, 1]])
LABELS = ["background", "liver", "spleen"]
# Dataset, patient, study, scanner, and by how many pixels the answer is shifted; None is an empty answer.
SCANS = [
    ("one", "p1", "1", "GE/MR 1.5T", 0), ("one", "p1", "2", "GE/MR 1.5T", 1), ("one", "p2", "1", "GE/MR 1.5T", None),
    ("two", "p1", "1", "philips", 2), ("two", "p3", "1", "philips", 0), ("two", "p4/5", "1", "philips", 1),
    ("two", "p4", "5_1", "philips", 0),
]  # fmt: skip


def labels(shift=0):
    voxels = np.zeros((6, 40, 40), np.uint8)
    voxels[1:5, 8:24, 6 + shift : 20 + shift] = 1
    voxels[1:5, 26:34, 24 + shift : 34 + shift] = 2
    return Volume(voxels, AFFINE)


class Network:
    """Answers by the scan's own intensity, which says by how much the mask is off."""

    def __init__(self, names=LABELS):
        self.info = {"task": "volume", "name": "fake", "labels": list(names), "weights_sha256": "ab" * 32,
                     "provenance": {"seed": 4}}  # fmt: skip

    def segment(self, image, postprocessing=None, keep=False, modality=None):
        shift = int(image.voxels[0, 0, 0])
        mask = labels(shift) if shift < 9 else labels().with_voxels(np.zeros((6, 40, 40), np.uint8))
        return Segmentation(mask, {"flags": [], "volume_ml": {"liver": 1.0}}, None, None)


@pytest.fixture
def report(tmp_path, monkeypatch):
    """A function that evaluates these scans, and the folder of its report."""
    shifts = [9 if shift is None else shift for *_, shift in SCANS]
    scans = [
        SimpleNamespace(
            patient=patient, study=study, shift=shift,
            card=SimpleNamespace(
                name=dataset, scanner=scanner, kind="intensity", modality="MR",
                source={"name": dataset, "citation": "made up", "licence": "none", "card_sha256": "cd" * 32},
            ),
        )
        for (dataset, patient, study, scanner, _), shift in zip(SCANS, shifts, strict=True)
    ]  # fmt: skip
    manifest = {"datasets": [{"name": "one", "citation": "made up", "licence": "none"}],
                "split": {"train": [], "validation": [], "test": ["p1"]}}  # fmt: skip
    monkeypatch.setattr(evaluate, "read_image", lambda scan: labels().with_voxels(
        np.full((6, 40, 40), scan.shift, np.int16)))  # fmt: skip
    monkeypatch.setattr(evaluate, "read_labels", lambda scan, image: labels())
    monkeypatch.setattr(
        evaluate, "open_study", lambda run, split, model, cards: evaluate.Study(run, split, scans, Network(), manifest)
    )

    def run(**options):
        evaluate.evaluate_run(tmp_path / "run", "test", evaluate.Options(quality=False, **options))
        folder = tmp_path / "run" / "report"
        with (folder / "patients.csv").open(newline="") as file:
            return folder, list(csv.DictReader(file)), json.loads((folder / "summary.json").read_text())

    return run


def test_every_scan_and_class_has_a_row_and_every_scan_a_picture_of_its_own(report):
    folder, rows, _ = report()
    assert [(row["dataset"], row["patient"], row["study"]) for row in rows] == [
        scan[:3] for scan in SCANS for _ in LABELS[1:]
    ]
    pictures = {row["picture"] for row in rows}
    assert len(pictures) == len(SCANS) == len(list((folder / "pictures").iterdir()))
    assert all((folder / picture).is_file() for picture in pictures)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count('class="card') == len(SCANS)
    assert len(list(folder.glob("overlay_GE_MR_1.5T*.png"))) == 3  # a scanner's name is no path


def test_what_else_lies_in_a_run_s_report_is_not_deleted_with_the_old_one(report):
    folder, _, _ = report()
    report()  # is replaced
    (folder / "notes.xlsx").write_text("of a reader")
    with pytest.raises(InputError, match=r"received .*report with notes\.xlsx in it"):
        report()
    assert (folder / "notes.xlsx").read_text() == "of a reader"


def test_numbers_by_hand_for_each_class(report):
    _, rows, summary = report()
    by_scan = {(row["dataset"], row["patient"], row["study"], row["class"]): row for row in rows}
    # A liver 14 pixels wide that is shifted by one shares 13 of them, a spleen of 10 shares 9.
    assert float(by_scan["one", "p1", "2", "liver"]["dice"]) == pytest.approx(13 / 14)
    assert float(by_scan["one", "p1", "2", "spleen"]["dice"]) == pytest.approx(9 / 10)
    empty = by_scan["one", "p2", "1", "liver"]
    assert float(empty["dice"]) == 0 and empty["hausdorff_95_mm"] == "" and empty["precision"] == ""
    volume_ml = 4 * 16 * 14 * 20 / 1000
    assert float(empty["true_volume_ml"]) == pytest.approx(volume_ml) and float(empty["predicted_volume_ml"]) == 0
    assert summary["scans"] == 7 and summary["patients"] == 5 and summary["hausdorff_95_mm"]["scans"] == 6
    assert summary["dice"]["mean"] == pytest.approx((3 * 1 + 2 * 13 / 14 + 12 / 14 + 0) / 7)
    assert summary["classes"]["spleen"]["dice"]["mean"] == pytest.approx((3 * 1 + 2 * 9 / 10 + 8 / 10 + 0) / 7)
    assert summary["volume_ml"]["share_within_5_percent"] == pytest.approx(6 / 7)


def test_numbers_that_some_scans_lack_say_of_how_many_they_are(report):
    folder, _, _ = report()
    page = (folder / "report.html").read_text(encoding="utf-8")
    line = page[page.index("95 % Hausdorff distance, mean") :].split("</tr>")[0]
    assert ", 6 scans" in line and ", 2 scans" in line  # of all, and of one scanner
    assert "scans" not in page[page.index("<td>Dice, mean") :].split("</tr>")[0]


def test_columns_of_several_classes_say_which_class_they_are_of(report):
    folder, _, summary = report()
    page = (folder / "report.html").read_text(encoding="utf-8")
    head, line = (page[page.index(start) :].split("</tr>")[0] for start in ('id="agreement"', "<td>Dice, mean"))
    names = re.findall(r'<th class="number">(.*?)</th>', head)
    assert names == ["liver, all", "liver, GE/MR 1.5T", "liver, philips", "spleen, all"]
    values = [float(value) for value in re.findall(r'<td class="number">([\d.]+)', line)]
    assert values[0] == pytest.approx(summary["dice"]["mean"], abs=5e-4)
    assert values[3] == pytest.approx(summary["classes"]["spleen"]["dice"]["mean"], abs=5e-4)


def test_steatosis_is_always_judged_at_its_usual_threshold_too():
    assert evaluate.Options().thresholds_percent == [5.56]
    assert evaluate.Options(grades_percent=(21.7, 16.3)).thresholds_percent == [5.56, 16.3, 21.7]


def test_livers_that_were_missed_are_counted_beside_sensitivity_and_agreement():
    fat = [(3.0, 3.5), (4.0, 4.2), (8.0, 8.5), (12.0, 12.0), (15.0, None), (9.0, None), (2.0, None)]
    rows = [
        {"patient": f"p{number}", **{f"{kind}_fat_{key}_percent": value for key in ("mean", "median")
                                     for kind, value in (("true", true), ("predicted", predicted))}}
        for number, (true, predicted) in enumerate(fat)
    ]  # fmt: skip
    found = evaluate._fat(rows, evaluate.Options())
    (steatosis,) = found["steatosis"]
    assert (steatosis["true_positive"], steatosis["false_negative"]) == (2, 0)
    assert (found["fat_unmeasured"], steatosis["unmeasured_at_or_above"]) == (3, 2)
    assert evaluate._fat(rows[4:], evaluate.Options())["fat_unmeasured"] == 3


def test_no_postprocessing_is_reported_as_none(report):
    assert report()[2]["postprocessing"] == []
    own = Network()
    own.info["postprocessing"] = ["fill_holes"]
    study = SimpleNamespace(segmenter=own, split="test", classes=["liver"], manifest={})
    row = {"class": "liver", "scanner": "a", "patient": "p", "dice": 1.0, "precision": 1.0, "recall": 1.0,
           "voxel_error_percent": 0.0, "surface_dice_1mm": 1.0, "surface_dice_3mm": 1.0, "hausdorff_95_mm": 0.0,
           "mean_surface_distance_mm": 0.0, "predicted_volume_ml": 1.0, "true_volume_ml": 1.0, "predicted_voxels": 1,
           "true_voxels": 1, "incomplete": ""}  # fmt: skip
    for given, expected in ((None, ["fill_holes"]), ([], []), (["largest_component"], ["largest_component"])):
        options = evaluate.Options(postprocessing=given, tolerances_mm=(1, 3))
        assert evaluate._summary(study, options, [row], None)["postprocessing"] == expected


def test_the_expected_dice_is_of_all_classes_together():
    truth, found = labels(), labels(1)
    assert evaluate.mean_dice(found, truth, 2) == pytest.approx((13 / 14 + 9 / 10) / 2)
    rows = [{"picture": "a", "dice": 0.5, "class": "liver"}, {"picture": "a", "dice": 0.9, "class": "spleen"}]
    (scan,) = evaluate._of_scans(rows)
    assert scan["dice"] == pytest.approx(0.7)


@pytest.mark.parametrize("what", ["other files", "other files beside a page", "a page alone", "a link", "a file"])
def test_a_report_replaces_nothing_but_a_report(tmp_path, what):
    out = tmp_path / "out"
    if what == "a file":
        out.write_text("mine")
    elif what == "a link":
        (tmp_path / "target").mkdir()
        out.symlink_to(tmp_path / "target")
    else:
        out.mkdir()
        if what != "a page alone":
            (out / "mine.txt").write_text("mine")
        if what != "other files":
            (out / "report.html").write_text("x")
    with pytest.raises(InputError, match=r"Expected a (new folder|folder for the report)"):
        evaluate._check_output(out, None)


@pytest.mark.parametrize("out", [".", ".."])
def test_a_report_needs_a_folder_with_a_name(tmp_path, monkeypatch, out):
    (tmp_path / "here/below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/below")
    with pytest.raises(InputError, match=r"Expected a (new folder|folder for the report)"):
        evaluate._check_output(Path(out), None)


def test_a_folder_is_whole_under_one_name_or_another_while_it_is_replaced(tmp_path, monkeypatch):
    """Whenever a kill comes: the old one is moved, never deleted file by file in its place."""
    out, seen, remove = tmp_path / "report", [], shutil.rmtree

    def look(path):
        seen.append([[(each / name).read_text() for name in ("one", "two")] for each in (out, path)])
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", look)
    for content in ("old", "new"):
        with command.atomic(out) as folder:
            folder.mkdir()
            for name in ("one", "two"):
                (folder / name).write_text(content)
    assert seen == [[["new"] * 2, ["old"] * 2]]
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_report_replaces_an_earlier_one_but_not_the_runs_own_for_another_model(report, tmp_path):
    folder, _, _ = report()
    evaluate._check_output(folder, None)
    (tmp_path / "run/manifest.json").touch()
    evaluate._check_output(tmp_path / "new", None)
    evaluate._check_output(folder, tmp_path / "run")
    for run in (None, tmp_path / "other"):
        with pytest.raises(InputError, match="of the run's own model"):
            evaluate._check_output(folder, run)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grades-percent", "nan"], "--grades-percent above 0"),
        (["--grades-percent", "16.3", "217"], "--grades-percent above 0 and up to 100"),
        (["--tolerances-mm", "1", "inf"], "--tolerances-mm of 0 or more"),
        (["--seed", "-1"], "--seed of 0 or more"),
        (["--postprocessing", "fill_holes"], "--split validation with --postprocessing"),
        (["--model", "m"], "--out with --model"),
        (["--card", "c", "-o", "o", "--split", "validation"], "--split or --card"),
    ],
)
def test_arguments_without_a_meaning_are_told(tmp_path, capsys, arguments, said):
    assert evaluate.main(["--run", str(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A run with 30 validation scans, whose answers are off by one pixel, and what its calibration was fitted on."""
    scans = [
        SimpleNamespace(
            patient=f"p{number:02}",
            study="1",
            shift=1,
            card=SimpleNamespace(name="one", kind="intensity", modality="MR"),
        )
        for number in range(30)
    ]
    fitted = []
    monkeypatch.setattr(evaluate, "split_scans", lambda run, split, manifest: scans)
    monkeypatch.setattr(evaluate, "read_image", lambda scan: labels().with_voxels(np.full((6, 40, 40), 1, np.int16)))
    monkeypatch.setattr(evaluate, "read_labels", lambda scan, image: labels())
    monkeypatch.setattr(evaluate, "versions", lambda image, truth, kinds, seed: [(image, truth, None)])
    monkeypatch.setattr(evaluate.quality, "features", lambda segmenter, answer: {})
    monkeypatch.setattr(
        evaluate.quality, "fit", lambda found, dice, patients, original: fitted.append((dice, patients)) or {"fit": 1}
    )
    return evaluate.Study(tmp_path, "test", scans, Network(), {}), scans, fitted


def test_validation_scans_that_are_gone_are_told_with_what_they_are_for(study, monkeypatch):
    def gone(*_):
        raise InputError("NOT_FOUND", "Expected scans, received none of p1.")

    monkeypatch.setattr(evaluate, "split_scans", gone)
    with pytest.raises(InputError, match=r"received none of p1, on which .* \(--no-quality leaves it out\)\.$"):
        evaluate.calibrate(study[0], evaluate.Options())


def test_the_calibration_is_fitted_once_for_its_weights_scans_and_postprocessing(study):
    own, scans, fitted = study
    for seed in (0, 5):  # of the bootstrap
        assert evaluate.calibrate(own, evaluate.Options(seed=seed)) == {"fit": 1}
    ((dice, patients),) = fitted
    assert dice == pytest.approx([(13 / 14 + 9 / 10) / 2] * 20)
    assert len(set(patients)) == 20 and patients[0] == "p00" and patients[-1] == "p29"  # from all of the list
    evaluate.calibrate(own, evaluate.Options(postprocessing=["fill_holes"]))
    scans.pop()
    evaluate.calibrate(own, evaluate.Options())
    own.segmenter.info["weights_sha256"] = "cd" * 32
    evaluate.calibrate(own, evaluate.Options())
    assert len(fitted) == 4


def test_an_export_takes_along_the_calibration_of_its_weights_and_postprocessing(study, tmp_path):
    own, _, _ = study
    weights, model = own.segmenter.info["weights_sha256"], own.run / "model"
    model.mkdir()
    (model / "model.json").write_text(json.dumps({"weights_sha256": weights, "postprocessing": ["fill_holes"]}))

    def exported(steps: list[str] | None = None) -> object:
        folder = publish([model], tmp_path / "models", steps)
        return json.loads((folder / "model.json").read_text()).get("quality")

    assert exported() is None  # nothing was evaluated yet
    evaluate.calibrate(own, evaluate.Options(postprocessing=["fill_holes"]))
    assert exported() == {"fit": 1} == exported(["fill_holes"])
    assert exported(["largest_component"]) is None
    one = tmp_path / "models/2"  # has it; from elsewhere, without the run
    shutil.copytree(one, tmp_path / "shipped/1")
    for steps, expected in ((None, {"fit": 1}), (["fill_holes"], {"fit": 1}), ([], None)):
        folder = publish([tmp_path / "shipped/1"], tmp_path / "again", steps)
        assert json.loads((folder / "model.json").read_text()).get("quality") == expected
    (model / "model.json").write_text(json.dumps({"weights_sha256": "cd" * 32, "postprocessing": ["fill_holes"]}))
    assert exported() is None


def test_a_kept_calibration_has_numbers_where_yaml_would_read_text(study, monkeypatch):
    own, _, _ = study
    monkeypatch.setattr(evaluate.quality, "fit", lambda *_: {"scale": [1e-09, 5e-05]})
    for _ in range(2):  # fitted, then kept
        assert evaluate.calibrate(own, evaluate.Options()) == {"scale": [1e-09, 5e-05]}


@pytest.mark.parametrize("content", ["{}", "{", "[1]"])
def test_a_damaged_calibration_is_one_sentence(study, content):
    own, _, fitted = study
    (own.run / "quality.json").write_text(content)
    with pytest.raises(InputError, match=r"quality\.json"):
        evaluate.calibrate(own, evaluate.Options())
    assert (own.run / "quality.json").read_text() == content and not fitted
