"""Training: what it leaves behind, that it learns, that it goes on exactly where it was killed, and evaluation."""

import contextlib
import csv
import functools
import json
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
from small_study import EXPERIMENT, ROOT, command, scan
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2 as plugin

from lvseg import augment, biomarkers, metrics, pipeline, prepare
from lvseg.board import Board
from lvseg.config import load_experiment
from lvseg.devices import Cluster
from lvseg.errors import InputError
from lvseg.evaluate import evaluate_run
from lvseg.fit import Fit
from lvseg.formats import read_volume, write_volume
from lvseg.models.unet import encoder_variables
from lvseg.predict import Segmenter
from lvseg.provenance import code_sha256

LIMIT_S = 240.0
ALONE = Cluster(tf.distribute.get_strategy(), 0, 1, 1)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


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


def best_weights(run):
    """The one file of best weights that a finished run keeps."""
    (path,) = (run / "checkpoints").glob("best-*.npz")
    return path


def start_training(folder, *overrides):
    return subprocess.Popen(
        [sys.executable, "-m", "lvseg.train", "--cfg", "experiment.yaml", *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def stop_at_checkpoint(folder, step, how, wait_s=0.0):
    """Starts training, sends a signal some time after the checkpoint of a step is there, waits for its end."""
    process = start_training(folder)
    try:
        state = folder / "runs/volume/small-fold0/checkpoints/checkpoint"
        deadline = time.monotonic() + LIMIT_S
        while max(map(int, re.findall(r"ckpt-(\d+)", state.read_text() if state.exists() else "")), default=0) < step:
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
    # Five moments within about 50 steps of checkpoints that are there; any may fall into a validation, into the writing
    # of a checkpoint, or before the first step.
    steps_s = 50 * float(rows(trained / "metrics.csv")[-1]["step_seconds"])
    moments = np.random.default_rng().uniform(0, steps_s, 5)
    print(f"killed {moments} s after the checkpoints")
    for step, moment in zip((50, 50, 100, 150, 150), moments, strict=True):
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


def test_the_overlay_shows_the_scan_the_answer_and_the_truth(trained, in_study, monkeypatch):
    shown = {}

    def note(image, predicted, true, path, title):
        shown[path.stem] = (image, predicted, true, title)

    monkeypatch.setattr("lvseg.figures.overlay_figure", note)
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
        np.testing.assert_array_equal(image.voxels, own.canonical().voxels)
        np.testing.assert_array_equal(true.voxels, truth.canonical().voxels)
        np.testing.assert_array_equal(predicted.voxels, segmenter.segment(own).mask.canonical().voxels)
        assert f"{scanner}-001" in title


def test_an_untrained_run_is_refused(study, tmp_path):
    for run in ("runs/volume/nothing", tmp_path):
        done = command(study, "lvseg.evaluate", "--run", run)
        assert done.returncode == 2 and str(run) in done.stderr


def test_training_opens_no_shard_of_a_test_patient(in_study, tmp_path, monkeypatch):
    seen, bounds = [], pipeline.training_bounds
    monkeypatch.setattr(
        pipeline, "training_bounds", lambda files, *others: seen.append(files) or bounds(files, *others)
    )
    experiment = load_experiment(in_study / "experiment.yaml")
    sets = prepare.prepare(experiment.data, jobs=1)
    split = prepare.split(experiment.data, sets)
    assert split.test == ("a-001", "b-001")
    fit = Fit(experiment, sets, split, tmp_path, ALONE)
    opened = [path.name for path in [*fit.files, *(path for _, path in fit.validation)]]
    assert len(opened) == len(set(opened)) == 18
    assert not [name for name in opened if "-001" in name]
    trained_on = {path.name.split("+")[0] for path in fit.files}
    assert trained_on == set(split.train) and seen == [fit.files]  # constants come from training patients alone


@pytest.fixture
def fit(in_study, tmp_path):
    """A training loop that has not begun, on the small study, with a run folder of its own."""

    def make(*overrides):
        short = ["train.deterministic=false", "train.steps=4", "train.validate_every=4", "train.checkpoint_every=2"]
        experiment = load_experiment(in_study / "experiment.yaml", [*short, *overrides])
        sets = prepare.prepare(experiment.data, jobs=1)
        split = prepare.split(experiment.data, sets)
        return Fit(experiment, sets, split, tmp_path / "run", ALONE)

    return make


def test_a_step_deforms_drops_out_and_draws_anew_by_step_and_sample(fit):
    one = fit()
    batches = list(one._batches(0).take(2))
    drawn, calls, kept = [], [], one.step._logits

    def move(stack, mask, seeds):
        drawn.append(seeds.numpy())
        return stack + 1000.0, tf.ones_like(mask)

    def logits(inputs, training):
        calls.append((inputs[0].numpy(), inputs[1].numpy(), training))
        return kept(inputs, training=training)

    one.step.move, one.step._logits = move, logits
    before = [variable.numpy() for variable in one.step.model.trainable_variables]
    for samples in batches:
        one.step.on_device(samples)
    for step, seeds in enumerate(drawn):
        np.testing.assert_array_equal(seeds, augment.sample_seeds(3, augment.ELASTIC_STREAM, step, tf.range(4)))
        stacks, dropout_seeds, training = calls[step]
        assert training and (dropout_seeds == seeds).all()
        moved = batches[step]._replace(stack=tf.cast(batches[step].stack, tf.float32) + 1000.0)
        np.testing.assert_allclose(stacks, pipeline.intensities(moved, "none"), rtol=1e-5)
    assert len(drawn) == 2 and int(one.step.number) == 2
    count, _, positives, wrong, missed = one.step.sums.numpy()
    assert count == 2 and positives + missed == 2 * 4 * 32 * 32  # the deformed mask is the truth: all foreground here
    assert positives + wrong + missed <= 2 * 4 * 32 * 32
    after = [variable.numpy() for variable in one.step.model.trainable_variables]
    assert any((a != b).any() for a, b in zip(before, after, strict=True))


def test_the_best_weights_are_kept_and_exported_not_the_last(fit, tmp_path):
    one, board = fit(), Board(None)
    best = [weights.copy() for weights in one.step.model.get_weights()]
    one.infer = lambda part: part.mask[..., 0]
    assert one._validate(2, board) == 1.0
    one.step.model.set_weights([weights + 0.5 for weights in best])
    one.infer = lambda part: tf.zeros_like(part.mask[..., 0])
    assert one._validate(4, board) < 0.5
    card = one.export(tmp_path / "model", {})
    assert card["measured"]["validation_dice"] == 1.0
    stacks = tf.random.stateless_uniform([8, 32, 32, 3], [1, 2]) * 200
    infer = Segmenter(tmp_path / "model")._infer(stacks=stacks)["probabilities"]
    one.step.model.set_weights(best)
    np.testing.assert_allclose(infer, one.step.model([stacks, tf.zeros([8, 2], tf.int64)]), atol=1e-5)


def test_a_validation_that_was_interrupted_is_made_up_for(fit, monkeypatch):
    stopped = fit()
    monkeypatch.setattr(stopped, "_validate", lambda number, board: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = fit()
    assert int(resumed.step.number) == 2  # the checkpoint before the validation, not one that claims it done
    resumed.run()
    assert [int(row["step"]) for row in rows(resumed.run_folder / "metrics.csv")] == [4]
    assert resumed.best_weights.is_file()
    assert int(fit().step.number) == 4


@pytest.mark.parametrize("dice, steps", [((0.5, 0.6, 0.6, 0.7), 8), ((0.5, 0.6, 0.6, 0.5), 8), ((0.6, 0.5, 0.6), 6)])
def test_training_stops_early_after_so_many_validations_without_a_better_one(fit, monkeypatch, dice, steps):
    overrides = ["train.steps=8", "train.validate_every=2", "train.checkpoint_every=8"]
    make = functools.partial(fit, *overrides, "train.early_stopping={patience: 2}")
    scores = iter(dice)
    for attempt in range(3):  # whatever is done again once it has stopped, no step is trained
        one = make()
        monkeypatch.setattr(one, "_over_machines", lambda values: values * 0 + next(scores))
        one.run()
        assert int(one.step.number) == steps, attempt
    assert [float(row["validation_dice"]) for row in rows(one.run_folder / "metrics.csv")] == list(dice)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_slices(fit):
    one = fit("train.steps=9", "train.checkpoint_every=3", "train.validate_every=9")
    batches = list(one._batches(0).take(9))
    weights = [variable.numpy() for variable in one.step.model.trainable_variables]
    poisoned = batches[4]._replace(scale=tf.concat([batches[4].scale[:1] * np.nan, batches[4].scale[1:]], axis=0))
    one._distributed = lambda first: iter([*batches[:4], poisoned, *batches[5:]][first:])
    with pytest.raises(FloatingPointError) as error:
        one.run()
    file, own = poisoned.source[0].numpy()
    patient = one.training[file][0]["patient"]
    assert f"at step 5 (slice {own} of patient {patient} study 1)" in str(error.value)
    assert all(np.isfinite(variable.numpy()).all() for variable in one.step.model.trainable_variables)
    again = fit("train.steps=9", "train.checkpoint_every=3", "train.validate_every=9")
    assert int(again.step.number) == 3  # the last good checkpoint; none was written after the bad step
    again.run()
    assert int(again.step.number) == 9
    assert any((a != b.numpy()).any() for a, b in zip(weights, again.step.model.trainable_variables, strict=True))


def test_a_learning_rate_that_is_too_high_ends_in_one_sentence(study, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(study, folder, ignore=shutil.ignore_patterns("runs"))
    settings = ("--set", "train.learning_rate=1.0e+30", "--set", "train.steps=50")
    done = command(folder, "lvseg.train", "--cfg", "experiment.yaml", *settings)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"not finite at step \d+ \(slice \d+ of patient [ab]-00\d", done.stderr)
    assert not (folder / "runs/volume/small-fold0/model").exists()


def test_a_damaged_checkpoint_is_one_sentence(fit):
    one = fit()
    one.run()
    newest = Path(one.manager.latest_checkpoint)
    data = newest.with_name(newest.name + ".data-00000-of-00001")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(InputError, match=re.escape(str(newest))):
        fit()


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_resumes_and_exports_in_float32(fit, tmp_path, precision):
    make = functools.partial(fit, f"train.precision={precision}", "train.deterministic=true")
    whole = make()
    whole.run()
    shutil.rmtree(whole.run_folder)
    stopped, batches = make(), iter(whole._batches(0))
    for _ in range(2):
        stopped.step(next(batches))
    stopped.manager.save(checkpoint_number=2)
    resumed = make()
    assert int(resumed.step.number) == 2
    resumed.run()
    for one, other in zip(whole.step.model.get_weights(), resumed.step.model.get_weights(), strict=True):
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, other)
    for one, other in zip(*(tf.nest.flatten(run.step.optimiser.state) for run in (whole, resumed)), strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    assert (float(resumed.step.optimiser.loss_scale.numpy()) > 1) == (precision == "mixed_float16")
    resumed.export(tmp_path / "model", {})
    stacks = tf.random.stateless_uniform([8, 32, 32, 3], [1, 2]) * 200
    exported = Segmenter(tmp_path / "model")._infer(stacks=stacks)["probabilities"]
    assert exported.dtype == tf.float32
    np.testing.assert_allclose(exported, resumed.step.model([stacks, tf.zeros([8, 2], tf.int64)]), atol=0.02)


def test_gradients_that_stay_infinite_stop_float16_too(fit):
    one = fit("train.precision=mixed_float16", "train.steps=40", "train.validate_every=40", "train.checkpoint_every=40")
    one.step.optimiser.scaled = lambda loss: loss * np.inf
    with pytest.raises(FloatingPointError, match="gradients"):
        one.run()
    assert float(one.step.optimiser.loss_scale.numpy()) == 1


def test_a_small_rise_does_not_put_off_the_end(fit, monkeypatch):
    one = fit("train.steps=8", "train.validate_every=2", "train.early_stopping={patience: 2, min_delta: 0.1}")
    scores = iter((0.5, 0.56, 0.62, 0.65))
    monkeypatch.setattr(one, "_over_machines", lambda values: values * 0 + next(scores))
    one.run()  # 0.62 is 0.12 above 0.5, though only 0.06 above the one before it
    assert int(one.step.number) == 8 and float(one.best_dice) == 0.65
    assert best_weights(one.run_folder).name == "best-8.npz"


def test_the_encoder_stays_as_it_was_for_its_first_steps(fit):
    one = fit("model.encoder=vgg11", "model.encoder_weights=none", "model.freeze_encoder_steps=2", "model.width=2")
    encoder = encoder_variables(one.step.model)
    frozen = {id(variable) for variable in encoder}
    others = [variable for variable in one.step.model.trainable_variables if id(variable) not in frozen]
    before = [[variable.numpy() for variable in part] for part in (encoder, others)]
    for number, samples in enumerate(one._batches(0).take(3), start=1):
        one.step(samples)
        moved = [
            [bool((a != b.numpy()).any()) for a, b in zip(was, part, strict=True)]
            for was, part in zip(before, (encoder, others), strict=True)
        ]
        assert any(moved[1]) and (any(moved[0]) if number == 3 else not any(moved[0]))


def test_histograms_and_a_profile_come_on_request(fit):
    one = fit("train.histograms=true", "train.profile_steps=[2, 3]")
    one.run()
    events = EventAccumulator(str(one.run_folder / "logs"), size_guidance={"tensors": 0}).Reload()
    tags = [tag for tag in events.Tags()["tensors"] if tag.startswith("weights/")]
    assert len(tags) == len(one.step.model.weights) and any("enc1_conv1" in tag for tag in tags)
    assert list((one.run_folder / "logs").rglob("*.xplane.pb"))


def test_hyperparameters_are_shown_with_the_dice_they_led_to(trained):
    events = EventAccumulator(str(trained / "logs"), size_guidance={"tensors": 0}).Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    session = plugin.HParamsPluginData.FromString(content).session_start_info.hparams
    assert session["train.learning_rate"].number_value == 3e-3 and session["model.residual"].bool_value is False
    best = max(float(row["validation_dice"]) for row in rows(trained / "metrics.csv"))
    shown = tf.make_ndarray(events.Tensors("hparams/best_validation_dice")[0].tensor_proto)
    assert shown == pytest.approx(best, abs=1e-6)


def test_what_a_test_patient_s_scan_holds_cannot_matter(trained, study, tmp_path):
    """Training with other scans of the test patients ends with the very same weights."""
    folder = tmp_path / "study"
    shutil.copytree(study, folder, ignore=shutil.ignore_patterns("runs"))
    for own in "ab":
        image, _ = scan(own, 1)
        write_volume(image.with_voxels(255 - image.voxels), folder / f"raw/{own}/{own}-001/image.nii.gz")
    settings = ["--set", "train.steps=50", "--set", "train.validate_every=25"]
    done = [command(place, "lvseg.train", "--cfg", "experiment.yaml", "--set", "name=short", *settings)
            for place in (study, folder)]  # fmt: skip
    assert [one.returncode for one in done] == [0, 0], done[1].stderr
    kept = [np.load(best_weights(place / "runs/volume/short-fold0")) for place in (study, folder)]
    for name in kept[0].files:
        np.testing.assert_array_equal(kept[0][name], kept[1][name])


@pytest.mark.parametrize(
    "override",
    ["augment.elastic.where=host", "augment.elastic=null", "train.loss=cross_entropy_dice", "model.residual=true",
     "data.axis=coronal", "data.normalise=slice", "data.normalise=global"],
)  # fmt: skip
def test_every_switch_trains_evaluates_and_exports(study, tmp_path, override):
    folder = tmp_path / "study"
    shutil.copytree(study, folder, ignore=shutil.ignore_patterns("runs"))
    small = ("--set", "train.steps=4", "--set", "train.validate_every=4", "--set", "model.width=2")
    done = command(folder, "lvseg.train", "--cfg", "experiment.yaml", *small, "--set", override)
    assert done.returncode == 0, done.stderr
    run = folder / "runs/volume/small-fold0"
    image = read_volume(folder / "raw/b/b-001/image.nii.gz")
    assert Segmenter(run / "model").segment(image).mask.shape == image.shape


def test_the_pretrained_encoder_trains_without_weights_only_when_told(study, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(study, folder, ignore=shutil.ignore_patterns("runs"))
    vgg = ("--set", "model.encoder=vgg11", "--set", "model.width=2", "--set", "train.steps=2")
    refused = command(
        folder, "lvseg.train", "--cfg", "experiment.yaml", *vgg, "--set", "model.encoder_weights=no.safetensors"
    )
    assert refused.returncode == 2 and "model.encoder_weights" in refused.stderr
    done = command(folder, "lvseg.train", "--cfg", "experiment.yaml", *vgg, "--set", "model.encoder_weights=none",
                   "--set", "train.validate_every=2")  # fmt: skip
    assert done.returncode == 0, done.stderr
