"""The training command: what it leaves behind, that it learns, that it goes on where it was killed; evaluation."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import yaml
from small_study import EXPERIMENT, ROOT, best_weights, command, rows, scan, write_card
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2 as plugin

from lvseg import biomarkers, evaluate, metrics, overlays, quality
from lvseg.errors import InputError
from lvseg.evaluate import evaluate_run
from lvseg.formats import write_volume
from lvseg.predict import Segmenter
from lvseg.provenance import code_sha256

LIMIT_S = 240.0


def test_a_run_folder_holds_what_the_contract_names(trained):
    names = {path.name for path in trained.iterdir()}
    assert names >= {"config.yaml", "manifest.json", "checkpoints", "logs", "metrics.csv", "model", "report"}
    assert yaml.safe_load((trained / "config.yaml").read_text())["train"]["beta_2"] == 0.999  # resolved
    manifest = json.loads((trained / "manifest.json").read_text())
    assert manifest["finished"] and manifest["code_sha256"] == code_sha256() and manifest["seed"] == EXPERIMENT["seed"]
    card = json.loads((trained / "model/model.json").read_text())
    assert card["weights_sha256"] == manifest["weights_sha256"]
    assert card["labels"] == ["background", "organ"] and card["neighbours"] == 1 and card["axis"] == "transversal"
    assert card["provenance"]["shards_sha256"] == manifest["shards_sha256"]


def test_training_learns(trained):
    steps = rows(trained / "metrics.csv")
    assert [int(row["step"]) for row in steps] == [100, 200, 300]
    assert float(steps[-1]["loss"]) < float(steps[0]["loss"])
    assert max(float(row["validation_dice"]) for row in steps) > 0.85


def test_tensorboard_shows_curves_and_overlays_of_validation_slices(trained):
    events = EventAccumulator(str(trained / "logs"), size_guidance={"tensors": 0}).Reload()
    tags = events.Tags()["tensors"]
    assert {"loss/training", "dice/training", "dice/validation", "learning_rate"} <= set(tags)
    assert [event.step for event in events.Tensors("dice/validation")] == [100, 200, 300]
    assert [event.step for event in events.Tensors("loss/training")] == list(range(25, 301, 25))
    for event in events.Tensors("time/input_wait_share"):
        assert 0 <= tf.make_ndarray(event.tensor_proto) <= 1
    for event in events.Tensors("time/step_seconds"):
        assert 0 < tf.make_ndarray(event.tensor_proto) < LIMIT_S
    assert not [tag for tag in tags if tag.startswith("weights/")]  # histograms are drawn on request only
    overlays = [tag for tag in tags if tag.startswith("validation/")]
    split = json.loads((trained / "manifest.json").read_text())["split"]
    assert overlays and all(tag.split("/")[1].split()[0] in split["validation"] for tag in overlays)
    picture = tf.io.decode_png(tf.make_ndarray(events.Tensors(overlays[0])[-1].tensor_proto)[2]).numpy()
    assert picture.shape == (32, 32, 3)
    assert (picture[..., 0].astype(int) - picture[..., 1] > 30).any()  # purple or red on grey


def test_the_model_is_of_the_best_step(trained, in_study):
    """The exported model scores on the validation patients what metrics.csv says of its best step, nearly."""
    best = max(float(row["validation_dice"]) for row in rows(trained / "metrics.csv"))
    card = json.loads((trained / "model/model.json").read_text())
    assert card["measured"]["validation_dice"] == pytest.approx(best)
    report = rows(trained / "report/patients.csv")
    assert np.mean([float(row["dice"]) for row in report]) == pytest.approx(best, abs=0.1)


def test_training_again_says_it_is_finished_and_touches_nothing(trained, study):
    before = (trained / "manifest.json").stat().st_mtime_ns
    done = command(study, "lvseg.train", "--cfg", "experiment.yaml")
    assert done.returncode == 0 and "finished" in done.stdout
    assert (trained / "manifest.json").stat().st_mtime_ns == before


def test_a_changed_config_is_an_error_that_names_the_keys(trained, study):
    done = command(
        study, "lvseg.train", "--cfg", "experiment.yaml", "--set", "train.beta_1=0.8", "--set", "data.neighbours=0"
    )
    assert done.returncode == 2
    assert "train.beta_1" in done.stderr and "data.neighbours" in done.stderr and "train.beta_2" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def start_training(folder):
    return subprocess.Popen(
        [sys.executable, "-m", "lvseg.train", "--cfg", "experiment.yaml"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def sessions_of(run):
    manifest = run / "manifest.json"
    return json.loads(manifest.read_text())["sessions"] if manifest.exists() else []


def last_checkpoint(run):
    state = run / "checkpoints/checkpoint"
    return max(map(int, re.findall(r"ckpt-(\d+)", state.read_text() if state.exists() else "")), default=0)


def stop_at_checkpoint(folder, step, how, wait_s=0.0):
    """Starts training, sends a signal some time after it has begun and the checkpoint of a step is there."""
    run = folder / "runs/volume/small-fold0"
    before = len(sessions_of(run))
    process = start_training(folder)
    try:
        deadline = time.monotonic() + LIMIT_S
        while len(sessions_of(run)) == before or last_checkpoint(run) < step:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=wait_s)
        process.send_signal(how)
        return process.wait(timeout=LIMIT_S)
    finally:
        process.kill()


def test_killed_and_interrupted_training_ends_with_the_weights_of_an_unbroken_one(trained, study, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(study, folder, ignore=shutil.ignore_patterns("runs"))
    # Five moments within about 50 steps of checkpoints; any may fall into a validation, into the writing
    # of a checkpoint, or before the first step.
    steps_s = 50 * float(rows(trained / "metrics.csv")[-1]["step_seconds"])
    moments = np.random.default_rng().uniform(0, steps_s, 5)
    print(f"killed {moments} s after the checkpoints")
    for step, moment in zip((50, 100, 100, 150, 200), moments, strict=True):
        assert stop_at_checkpoint(folder, step, signal.SIGKILL, moment) == -signal.SIGKILL
    (folder / "raw/a/a-009").rename(folder / "a-009")
    other_data = command(folder, "lvseg.train", "--cfg", "experiment.yaml")
    assert other_data.returncode == 2 and "scans that the run was started with" in other_data.stderr
    (folder / "a-009").rename(folder / "raw/a/a-009")
    assert stop_at_checkpoint(folder, 250, signal.SIGTERM) == 1
    done = command(folder, "lvseg.train", "--cfg", "experiment.yaml")
    assert done.returncode == 0 and "going on from step" in done.stdout
    resumed = folder / "runs/volume/small-fold0"
    with np.load(best_weights(trained)) as unbroken, np.load(best_weights(resumed)) as broken:
        assert unbroken.files == broken.files
        for name in unbroken.files:
            np.testing.assert_array_equal(unbroken[name], broken[name])
    for one, other in zip(rows(trained / "metrics.csv"), rows(resumed / "metrics.csv"), strict=True):
        for column in ("step", "loss", "dice", "validation_dice", "learning_rate"):
            assert one[column] == other[column]
    last = [tf.train.load_checkpoint(str(run / "checkpoints/ckpt-300")) for run in (trained, resumed)]
    bookkeeping = ("_CHECKPOINTABLE", "save_counter")  # how often it was saved may differ
    names = [name for name in last[0].get_variable_to_shape_map() if not name.startswith(bookkeeping)]
    assert len(names) > 100  # weights and the optimiser's moments
    for name in names:
        np.testing.assert_array_equal(last[0].get_tensor(name), last[1].get_tensor(name))
    assert not list(resumed.rglob(".partial-*"))
    sessions = sessions_of(resumed)
    assert [each["first_step"] for each in sessions] == sorted(each["first_step"] for each in sessions)
    assert len(sessions) == 7 and {each["code_sha256"] for each in sessions} == {code_sha256()}


def test_evaluation_measures_the_test_patients_on_their_own_grids(trained, study, in_study):
    done = command(study, "lvseg.evaluate", "--run", "runs/volume/small-fold0", "--split", "test")
    assert done.returncode == 0, done.stderr
    report = rows(trained / "report/patients.csv")
    assert [(row["patient"], row["scanner"]) for row in report] == [("a-001", "a"), ("b-001", "b")]
    summary = json.loads((trained / "report/summary.json").read_text())
    segmenter = Segmenter(trained / "model")
    for row in report:
        image, truth = scan(row["scanner"], 1)
        mask = segmenter.segment(image).mask
        assert float(row["dice"]) == pytest.approx(metrics.dice(mask.voxels, truth.voxels))
        assert float(row["predicted_volume_ml"]) == pytest.approx(biomarkers.volume_ml(mask), abs=0.01)
        assert float(row["true_volume_ml"]) == pytest.approx(biomarkers.volume_ml(truth), abs=0.01)
        assert (trained / "report" / f"overlay_{row['scanner']}.png").stat().st_size > 10_000
    errors = np.array([float(row["predicted_volume_ml"]) - float(row["true_volume_ml"]) for row in report])
    truths = np.array([float(row["true_volume_ml"]) for row in report])
    assert summary["patients"] == 2 and summary["split"] == "test"
    assert summary["dice"]["mean"] == pytest.approx(np.mean([float(row["dice"]) for row in report]))
    assert summary["volume_ml"]["bias"] == pytest.approx(errors.mean(), abs=0.01)
    percent = 100 * np.mean(np.abs(errors) / truths)
    assert summary["volume_ml"]["mean_absolute_error_percent"] == pytest.approx(percent, abs=0.01)
    for number, scanner in enumerate("ab"):
        part = summary["by_scanner"][scanner]
        assert part["patients"] == 1 and part["dice"]["mean"] == pytest.approx(float(report[number]["dice"]))
        assert part["volume_ml"]["bias"] == pytest.approx(errors[number], abs=0.01)


def test_a_card_that_changed_since_training_is_refused_for_its_classes_and_shown_otherwise(trained, in_study, capsys):
    try:
        write_card(in_study, "a", labels={"tumour": [7]})
        assert evaluate.main(["--run", str(trained), "--no-quality"]) == 2
        assert "organ, received volume with background, tumour in cards/a.yaml" in capsys.readouterr().err
        write_card(in_study, "a", labels={"organ": [7, 8]})
        assert evaluate.main(["--run", str(trained), "--no-quality"]) == 0
    finally:
        write_card(in_study, "a")
    page = (trained / "report/report.html").read_text()
    assert "dataset set_a" in page and "measured on set_a" in page and "measured on set_b" not in page


def test_a_scan_that_training_saw_is_not_measured_on_under_another_name(trained, in_study, capsys):
    known = json.loads((trained / "manifest.json").read_text())["split"]["train"][0]
    patient = in_study / "raw/renamed/r-001"
    shutil.copytree(in_study / "raw" / known[0] / known, patient)
    write_card(in_study, "renamed")
    assert evaluate.main(["--run", str(trained), "--card", "cards/renamed.yaml", "--no-quality", "-o", "renamed"]) == 2
    said = capsys.readouterr().err
    assert "trained or chosen on under another name" in said and "r-001" in said
    assert not (in_study / "renamed").exists()


def test_evaluation_measures_all_patients_of_a_dataset_that_training_did_not_see(trained, in_study, capsys):
    for number in (50, 51, 52):
        image, mask = scan("b", number)
        patient = in_study / "raw/outside" / f"o-{number:03d}"
        patient.mkdir(parents=True)
        write_volume(image, patient / "image.nii.gz")
        write_volume(mask.with_voxels(mask.voxels * 7), patient / "organs.nii.gz")
    write_card(in_study, "outside")
    own = (trained / "report").stat().st_mtime
    arguments = ["--run", str(trained), "--card", "cards/outside.yaml", "--no-quality"]
    assert evaluate.main([*arguments, "-o", "outside"]) == 0
    report = rows(in_study / "outside/patients.csv")
    assert [row["patient"] for row in report] == ["o-050", "o-051", "o-052"]
    segmenter = Segmenter(trained / "model")
    for row in report:
        image, truth = scan("b", int(row["patient"][2:]))
        assert float(row["dice"]) == pytest.approx(metrics.dice(segmenter.segment(image).mask.voxels, truth.voxels))
    summary = json.loads((in_study / "outside/summary.json").read_text())
    assert summary["split"] == "external" and list(summary["by_scanner"]) == ["outside"]
    assert (trained / "report").stat().st_mtime == own
    capsys.readouterr()
    assert evaluate.main(arguments) == 2 and "--out" in capsys.readouterr().err
    assert evaluate.main([*arguments[:3], "cards/a.yaml", "-o", "known"]) == 2
    assert "has not seen" in capsys.readouterr().err
    write_card(in_study, "other", root="../raw/outside", labels={"spleen": [7]})
    assert evaluate.main([*arguments[:3], "cards/other.yaml", "-o", "known"]) == 2
    assert "spleen" in capsys.readouterr().err and not (in_study / "known").exists()

    # The model alone, as one that came with lvseg has no run; 1.01 - exp(log 0.21) is the Dice that its card expects.
    alone = in_study / "alone/1"
    shutil.copytree(trained / "model", alone)
    card = json.loads((alone / "model.json").read_text())
    usual = {key: {"median": 5.0, "spread": 1.0} for key in ("volume", "brightness")}
    zeros = [0.0] * len(quality.FEATURES)
    fitted = {"usual": usual, "centre": zeros, "scale": [1.0] * len(zeros), "weights": zeros,
              "intercept": math.log(0.21), "scans": 9, "patients": 9, "left_out_mean_absolute_error": 0.1}  # fmt: skip
    (alone / "model.json").write_text(json.dumps({**card, "quality": fitted}))
    arguments = ["--model", str(alone.parent), "--card", "cards/outside.yaml"]
    assert evaluate.main([*arguments, "-o", "by_model"]) == 0
    found = rows(in_study / "by_model/patients.csv")
    assert [{key: row[key] for key in report[0]} for row in found] == report
    assert {row["expected_dice"] for row in found} == {"0.8"}
    summary = json.loads((in_study / "by_model/summary.json").read_text())
    assert summary["split"] == "external"
    error = np.mean([abs(0.8 - float(row["dice"])) for row in found])
    assert summary["quality"]["mean_absolute_error"] == pytest.approx(error)
    page = (in_study / "by_model/report.html").read_text()
    assert "measured on set_outside" in page and "dataset set_a" in page
    capsys.readouterr()
    for wrong, named in (
        (["--model", str(alone), "-o", "none"], "--run, or --model with --card, received --model alone"),
        (["--card", "cards/outside.yaml", "-o", "none"], "--run, or --model with --card, received --card alone"),
        (arguments, "--out"),
        ([*arguments[:3], "cards/b.yaml", "-o", "none"], "has not seen"),
        (["--model", "nowhere", *arguments[2:], "-o", "none"], "nowhere"),
        ([*arguments, "cards/outside.yaml", "-o", "none"], "set_outside twice"),
        ([*arguments, "-o", str(trained / "report")], "the run's own model"),
        ([*arguments, "--split", "test", "-o", "none"], "--split or --card"),
    ):
        assert evaluate.main(wrong) == 2 and named in capsys.readouterr().err and not (in_study / "none").exists()
    made = card["provenance"]
    for provenance, named in (
        ({**made, "started_from": {"split": {"train": ["o-051"]}}}, "o-051, on whom"),
        ({**made, "started_from": {"name": "before"}}, "says whom"),
        ({**made, "split": {**made["split"], "validation": ["o-052"]}}, "o-052, on whom"),
        ({}, "says whom"),
        (None, "says whom"),
    ):
        (alone / "model.json").write_text(json.dumps({**card, "provenance": provenance}))
        assert evaluate.main([*arguments, "-o", "none"]) == 2 and named in capsys.readouterr().err
    # Patients that it has seen are not simulated first.
    of_model = {**made, "split": {**made["split"], "train": ["sim0005-0001"]}}
    (alone / "model.json").write_text(json.dumps({**card, "provenance": of_model}))
    write_card(
        in_study,
        "made",
        root="../made",
        scanner="ge_volume",
        simulate={"scanner": "ge_volume", "patients": 1, "seed": 5},
    )
    assert evaluate.main([*arguments[:3], "cards/made.yaml", "-o", "none"]) == 2
    assert "sim0005-0001, on whom" in capsys.readouterr().err and not (in_study / "made").exists()
    # An ensemble, one of whose members was adapted and corrected: the page names what each was made of.
    study = {"cards": ["set_c"], "patients": ["c-001", "c-002"], "left_out": ["c-003"]}
    more = {"datasets": [*made["datasets"], {**made["datasets"][0], "name": "set_c", "citation": "Of set c"}],
            "adapted": [study], "corrected": [{"foreground_odds": 2.5}]}  # fmt: skip
    members = [card, {**card, "provenance": {**made, **more}}]
    (alone / "model.json").write_text(json.dumps({**card, "members": members}))
    assert evaluate.main([*arguments, "-o", "by_model"]) == 0
    page = (in_study / "by_model/report.html").read_text()
    assert page.count("dataset set_a</td>") == 1 and "dataset set_c</td><td>Of set c" in page
    assert "member 2: run adapted</td><td><code>set_c: 2 patients, 1 left out" in page and "2.5" in page
    assert "member 1: run adapted" not in page and f"train {len(made['split']['train'])}, validation" in page


def test_the_overlay_shows_the_scan_the_answer_and_the_truth(trained, in_study, monkeypatch):
    shown = {}

    def note(image, predicted, true, path, title, palette):
        assert palette == overlays.REPORT_COLOURS
        shown[path.stem] = (image, predicted, true, title)

    monkeypatch.setattr("lvseg.overlays.overlay_figure", note)
    shutil.copytree(trained / "report", in_study / "kept")
    try:
        evaluate_run(Path("runs/volume/small-fold0"), "test")
    finally:
        shutil.rmtree(trained / "report")
        (in_study / "kept").rename(trained / "report")
    segmenter = Segmenter(trained / "model")
    for scanner in "ab":
        image, predicted, true, title = shown[f"overlay_{scanner}"]
        own, truth = scan(scanner, 1)
        np.testing.assert_array_equal(image.canonical().voxels, own.canonical().voxels)
        np.testing.assert_array_equal(true.canonical().voxels, truth.canonical().voxels)
        np.testing.assert_array_equal(predicted.canonical().voxels, segmenter.segment(own).mask.canonical().voxels)
        assert f"{scanner}-001" in title


def test_an_evaluation_needs_every_patient_and_a_model_of_the_same_classes(trained, in_study, tmp_path):
    run = Path("runs/volume/small-fold0")
    other = tmp_path / "model"
    shutil.copytree(trained / "model", other)
    card = json.loads((other / "model.json").read_text())
    (other / "model.json").write_text(json.dumps({**card, "labels": ["background", "kidney"]}))
    with pytest.raises(InputError, match=r"Expected a model of the run's labels, \['background', 'organ'\], received"):
        evaluate_run(run, "test", model=other, out=tmp_path / "out")
    patient = in_study / "raw/b/b-001"
    patient.rename(tmp_path / "b-001")
    try:
        with pytest.raises(InputError, match=r"Expected scans of the 2 test patients of .*, received none of b-001"):
            evaluate_run(run, "test", out=tmp_path / "out")
    finally:
        (tmp_path / "b-001").rename(patient)
    assert not (tmp_path / "out").exists()


def test_an_untrained_run_is_refused(study, tmp_path):
    for run in ("runs/volume/nothing", tmp_path):
        done = command(study, "lvseg.evaluate", "--run", run)
        assert done.returncode == 2 and str(run) in done.stderr


def test_hyperparameters_are_shown_with_the_dice_they_led_to(trained):
    events = EventAccumulator(str(trained / "logs"), size_guidance={"tensors": 0}).Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    session = plugin.HParamsPluginData.FromString(content).session_start_info.hparams
    assert session["train.learning_rate"].number_value == 3e-3 and session["model.residual"].bool_value is False
    best = max(float(row["validation_dice"]) for row in rows(trained / "metrics.csv"))
    shown = tf.make_ndarray(events.Tensors("hparams/best_validation_dice")[0].tensor_proto)
    assert shown == pytest.approx(best, abs=1e-6)
