"""The training loop from within: what a step computes, when it stops, what it keeps; and every switch of a config."""

import contextlib
import functools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
import yaml
from small_study import best_weights, python, rows, scan
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lvseg import draws, pipeline, prepare, preprocess, records, train
from lvseg.board import Board
from lvseg.command import alone as lock
from lvseg.config import load_experiment
from lvseg.devices import Cluster
from lvseg.errors import InputError, RunError
from lvseg.export import weights
from lvseg.fit import Fit, mean_over_patients
from lvseg.formats import read_volume, write_volume
from lvseg.models import vgg
from lvseg.models.unet import encoder_variables
from lvseg.predict import Segmenter
from lvseg.step import Step

ALONE = Cluster(tf.distribute.get_strategy(), 0, 1, 1)
ELASTIC = "augment.elastic={sigma_px: 1.0, grid: 4}"  # which the fixture `fit` leaves out


def test_scans_without_the_organ_are_not_among_those_whose_fat_is_right():
    task = SimpleNamespace(experiment=SimpleNamespace(task="fatfraction"), reading=SimpleNamespace(neighbours=0))
    stack = np.array([[[[10.0, 20.0], [30.0, 40.0]]]], np.float32)  # one slice of one channel, in percent
    volume = SimpleNamespace(scale=tf.constant([[[1.0, 0.0]]]), stack=tf.constant(stack))
    true, found = np.array([[[1, 1], [0, 0]]]), np.array([[[0, 1], [0, 1]]])
    assert Fit._errors(task, found, true, volume) == (0, pytest.approx(30.0 - 15.0))
    volume_error, fat_error = Fit._errors(task, found, np.zeros_like(true), volume)
    assert volume_error == 200 and np.isnan(fat_error)
    # Two scans of the first patient, of which one has no organ, as the second patient's only one.
    errors = np.array([3.0, np.nan, np.nan, 1.0])
    assert mean_over_patients(errors, [[0, 1], [2], [3]]) == pytest.approx(2.0)
    assert mean_over_patients(np.array([3.0, 1.0, 8.0]), [[0, 1], [2]]) == pytest.approx(5.0)
    assert np.isnan(mean_over_patients(errors, [[2]]))


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


def test_a_test_patient_s_shard_cannot_be_read_by_training_even_where_it_is_named(in_study, tmp_path):
    experiment = load_experiment(in_study / "experiment.yaml")
    sets = prepare.prepare(experiment.data, jobs=1)
    split = prepare.split(experiment.data, sets)
    fit = Fit(experiment, sets, split, tmp_path, ALONE)
    (shard,) = sets[0].files(["a-001"])
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"(?s)Expected a patient of this split.*a-001"):
        list(pipeline.volume_samples([shard], fit.reading))
    fit.files[-1] = shard
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"(?s)Expected a patient of this split.*a-001"):
        list(fit._batches(0).take(fit.slices))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"(?s)Expected a patient of this split.*a-001"):
        pipeline.training_bounds([shard], 32, None, split.train)


def test_xla_on_several_devices_is_refused_in_a_sentence(in_study):
    experiment = load_experiment(in_study / "experiment.yaml", ["train.jit_compile=true", "train.deterministic=false"])
    with pytest.raises(InputError, match=r"train\.jit_compile on one device, received it with 2"):
        Step(experiment, Cluster(tf.distribute.get_strategy(), 0, 1, 2), 2, 0.0, 1.0)


def test_a_checkpoint_that_cannot_be_written_is_a_sentence(fit, monkeypatch):
    one = fit()

    def full(**_):
        raise tf.errors.OutOfRangeError(None, None, "No space left on device\nmore")

    monkeypatch.setattr(one.manager, "save", full)
    with pytest.raises(RunError, match=r"Expected to write a checkpoint into .*'No space left on device'"):
        one.run()


@pytest.mark.parametrize("change", ["replaced", "removed", "made anew"])
@pytest.mark.parametrize("part", ["training", "validation"])
def test_a_shard_that_changes_while_a_run_trains_on_it_ends_the_run_before_the_next_checkpoint(
    fit, monkeypatch, part, change
):
    one = fit()
    _, file = getattr(one, part)[-1]
    kept, train_step = file.read_bytes(), one.step._run
    was_at = file.with_suffix(".kept")

    def change_at_third(samples):
        train_step(samples)
        if int(one.step.number) == 3:
            file.rename(was_at)
            if change != "removed":
                file.write_bytes(kept if change == "made anew" else getattr(one, part)[0][1].read_bytes())

    monkeypatch.setattr(one.step, "_run", change_at_third)
    monkeypatch.setattr(one, "_validate", lambda *_: {"validation_dice": 0.5})
    try:
        if change == "made anew":
            one.run()
        else:
            with pytest.raises(RunError, match=rf"(none|another) at {re.escape(str(file))}"):
                one.run()
    finally:
        was_at.replace(file)
    assert Path(one.manager.latest_checkpoint).name == ("ckpt-4" if change == "made anew" else "ckpt-2")


@pytest.mark.parametrize(
    ("part", "change"), [("training", "removed"), ("training", "somebody else's"), ("validation", "cut short")]
)
def test_a_shard_that_cannot_be_read_any_more_ends_the_run_with_the_same_sentence(fit, monkeypatch, part, change):
    """Long before the next checkpoint, since every epoch and every validation opens it anew."""
    one = fit("train.steps=100", "train.validate_every=20", "train.checkpoint_every=100")
    _, file = getattr(one, part)[-1]
    kept, train_step = file.read_bytes(), one.step._run
    others = prepare.prepare(one.experiment.data, jobs=1)[0].files(["a-001"])[0].read_bytes()

    def change_at_third(samples):
        train_step(samples)
        if int(one.step.number) == 3:
            file.unlink()
            if change != "removed":
                file.write_bytes(kept[:1000] if change == "cut short" else others)

    monkeypatch.setattr(one.step, "_run", change_at_third)
    try:
        with pytest.raises(RunError, match=rf"(none|another) at {re.escape(str(file))}"):
            one.run()
        assert int(one.step.number) < 100
    finally:
        file.write_bytes(kept)


@pytest.mark.parametrize(
    "change",
    [lambda text: text.replace(",", ";"), lambda text: text.replace("\n2,", "\n2.0,"),
     lambda text: text.replace("\n", ",noted\n")],
    ids=["semicolons", "another number", "one more column"],
)  # fmt: skip
def test_metrics_that_a_spreadsheet_has_changed_are_told_before_a_run_goes_on(fit, monkeypatch, change):
    one = fit("train.validate_every=2")
    monkeypatch.setattr(one, "_conclude", interrupted)
    with pytest.raises(KeyboardInterrupt):
        one.run()
    metrics = one.run_folder / "metrics.csv"
    written = metrics.read_text()
    metrics.write_text(change(written))
    changed = metrics.read_text()
    with pytest.raises(InputError, match=re.escape(str(metrics))):
        fit("train.validate_every=2").run()
    assert metrics.read_text() == changed != written
    metrics.write_text(written)
    fit("train.validate_every=2").run()
    assert [row["step"] for row in rows(metrics)] == ["2", "4"]


@pytest.mark.parametrize("normalise", ["none", "slice", "patient", "global"])
@pytest.mark.parametrize("part", ["training", "validation"])
def test_a_scan_of_which_clipping_leaves_one_intensity_is_refused_by_name(fit, tmp_path, monkeypatch, normalise, part):
    settings = (f"data.normalise={normalise}", "data.clip_percentiles=[0.5, 50]")
    row, file = getattr(fit(*settings), part)[0]
    kept = file.read_bytes()
    image = np.zeros((row["shape"][0], 32, 32), np.float32)
    image[:, 10:20, 10:20] = 100.0  # a tenth of each slice, the others are padding
    padded = records.Harmonised(
        row["patient"], row["study"], row["scanner"], row["dataset"], tuple(row["sources"]), "digest",
        tuple(row["shape"]), tuple(row["spacing_mm"]), preprocess.statistics(tf.constant(image)), image,
        (image > 0).astype(np.uint8), None,
    )  # fmt: skip
    try:
        records.write_shard(padded, file)
        if normalise == "global":  # the bounds of all scans are no scan's own
            fit(*settings)
        else:
            with pytest.raises(InputError, match=rf"0\.5th and the 50th of patient {row['patient']}, study 1") as told:
                fit(*settings)
            assert told.value.code == "BAD_SCANS"
        fit(f"data.normalise={normalise}", "data.clip_percentiles=[0.5, 99.5]")
    finally:
        file.write_bytes(kept)


def test_a_run_that_goes_on_does_not_need_the_weights_it_started_from(in_study, tmp_path, fit, capfd):
    weights = tmp_path / "first.safetensors"
    settings = ("model.encoder=vgg11", "model.width=2", f"model.encoder_weights={weights}", "train.steps=2",
                "train.validate_every=2", "train.checkpoint_every=1", "train.deterministic=false")  # fmt: skip
    started = fit(*(each for each in settings if "weights=" not in each), "model.encoder_weights=none")
    vgg.save_encoder(started.step.model, weights, "made by a test", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fit, "export", interrupted)
        assert run_command(tmp_path / "runs", *settings) == 1
    weights.unlink()
    assert run_command(tmp_path / "runs", *settings) == 0
    manifest = json.loads((tmp_path / "runs/volume/small-fold0/manifest.json").read_text())
    assert manifest["encoder_weights"]["name"] == "first.safetensors"
    assert [each["first_step"] for each in manifest["sessions"]] == [0, 2]
    assert run_command(tmp_path / "other", *settings) == 2  # one that begins needs them


def test_a_run_starts_from_another_model_and_goes_on_without_it(trained, in_study, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(trained / "model", start)
    own = json.loads((start / "model.json").read_text())
    older = {
        "split": {"train": ["z-001"], "validation": ["z-002"]},
        "datasets": [{"name": "older", "citation": "c", "licence": "l"}],
    }  # began with it
    own["provenance"]["started_from"] = older
    (start / "model.json").write_text(json.dumps(own))
    small = (f"model.start_from={start}", "train.steps=2", "train.validate_every=2", "train.checkpoint_every=1",
             "train.learning_rate=1.0e-12", "train.deterministic=false")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fit, "export", interrupted)
        assert run_command(tmp_path / "runs", *small) == 1
    shutil.rmtree(start)
    assert run_command(tmp_path / "runs", *small) == 0
    run = tmp_path / "runs/volume/small-fold0"
    for manifest in (run / "manifest.json", run / "model/model.json"):
        content = json.loads(manifest.read_text())
        started_from = content.get("provenance", content)["started_from"]
        assert started_from["weights_sha256"] == own["weights_sha256"] and started_from["name"] == "small"
        split = own["provenance"]["split"]
        for part, grandparents in older["split"].items():
            assert set(started_from["split"][part]) == {*split[part], *grandparents}
        assert {each["name"] for each in started_from["datasets"]} == {"set_a", "set_b", "older"}
    for one, other in zip(weights(run / "model"), weights(trained / "model"), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-8)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("model.start_from=nowhere",), "received nowhere"),
        (("model.start_from=ENSEMBLE",), "one trained network"),
        (("model.start_from=MODEL", "model.width=2"), "the same network"),
        (
            ("model.start_from=EXCHANGED",),
            "labels ['background', 'organ'] in model.start_from, received labels ['organ',",
        ),
        (("model.start_from=MODEL", "data.axis=coronal"), "a model of axis coronal"),
        (("model.start_from=MODEL", "data.test_patients=[a-002, b-002]"), "a-00"),
        (("model.start_from=GRANDCHILD",), "a-001"),
        (("model.start_from=UNKNOWN",), "says whom"),
        (("model.start_from=MODEL", "model.encoder=vgg11"), "encoder_weights=none"),
    ],
)
def test_a_model_that_a_run_cannot_start_from_is_a_sentence(trained, in_study, tmp_path, capfd, settings, words):
    (tmp_path / "several").mkdir()
    (tmp_path / "several/saved_model.pb").touch()
    (tmp_path / "several/model.json").write_text('{"members": []}')
    shutil.copytree(trained / "model", tmp_path / "grandchild")
    info = json.loads((trained / "model/model.json").read_text())
    info["provenance"]["started_from"] = {"split": {"train": ["a-001"], "validation": []}}  # a test patient here
    (tmp_path / "grandchild/model.json").write_text(json.dumps(info))
    shutil.copytree(trained / "model", tmp_path / "unknown")
    (tmp_path / "unknown/model.json").write_text(json.dumps({**info, "provenance": None}))
    shutil.copytree(trained / "model", tmp_path / "exchanged")
    own = json.loads((trained / "model/model.json").read_text())
    (tmp_path / "exchanged/model.json").write_text(json.dumps({**own, "labels": own["labels"][::-1]}))
    places = {"MODEL": str(trained / "model"), "ENSEMBLE": str(tmp_path / "several"),
              **{name.upper(): str(tmp_path / name) for name in ("grandchild", "unknown", "exchanged")}}  # fmt: skip
    settings = [
        functools.reduce(lambda text, name: text.replace(name, places[name]), places, each) for each in settings
    ]
    assert run_command(tmp_path, *settings) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lvseg.train: Expected") and words in error


# In a process of its own: determinism, which XLA cannot do, is never switched off again in one that had it on.
COMPILED_AND_NOT = """
import json
from pathlib import Path
from lvseg import devices, prepare
from lvseg.config import load_experiment
from lvseg.fit import Fit

for compiled in ("true", "false"):
    settings = [f"train.jit_compile={compiled}", "train.deterministic=false", "model.width=2"]
    experiment = load_experiment(Path("experiment.yaml"), settings)
    sets = prepare.prepare(experiment.data)
    split = prepare.split(experiment.data, sets)
    fit = Fit(experiment, sets, split, Path("compiled"), devices.cluster("cpu", 4))
    sums = []
    for samples in fit._batches(0).take(3):
        fit.step(samples)
        sums.append(fit.step.sums.numpy().tolist())
    print(json.dumps(sums))
"""


def test_a_step_compiled_by_xla_trains_as_one_that_is_not(study):
    done = python(study, "-c", COMPILED_AND_NOT)
    assert done.returncode == 0, done.stderr
    compiled, plain = (
        np.array(json.loads(line)) for line in done.stdout.splitlines()[-2:]
    )  # added up from step to step
    assert compiled[:, 0].tolist() == [1, 2, 3]
    np.testing.assert_allclose(np.diff(compiled[:, 1], prepend=0), np.diff(plain[:, 1], prepend=0), rtol=1e-3)
    np.testing.assert_allclose(compiled[:, 2:], plain[:, 2:], atol=0.01 * 3 * 4 * 32 * 32)  # even ones fall either way


@pytest.fixture
def fit(in_study, tmp_path):
    """A training loop that has not begun, on the study in the working folder, with a run folder of its own."""

    def make(*overrides):
        short = ["train.deterministic=false", "train.steps=4", "train.validate_every=4", "train.checkpoint_every=2",
                 "augment.elastic=null"]  # fmt: skip
        experiment = load_experiment(Path("experiment.yaml"), [*short, *overrides])
        sets = prepare.prepare(experiment.data, jobs=1)
        split = prepare.split(experiment.data, sets)
        return Fit(experiment, sets, split, tmp_path / "run", ALONE)

    return make


def interrupted(*_):
    """In place of a method of `Fit`."""
    raise KeyboardInterrupt


def run_command(runs, *settings):
    """Trains the small study with these settings below `runs` by the command, in this process; its exit code."""
    return train.main(
        ["--cfg", "experiment.yaml", *(word for each in (*settings, f"runs={runs}") for word in ("--set", each))]
    )


def test_a_step_deforms_drops_out_and_draws_anew_by_step_and_sample(fit):
    one = fit(ELASTIC)
    batches = list(one._batches(0).take(2))
    drawn, calls, kept = [], [], one.step._logits

    def move(stack, mask, tissues, seeds):
        drawn.append(seeds.numpy())
        return stack + 1000.0, tf.ones_like(mask), tissues

    def logits(inputs, training):
        calls.append((inputs[0].numpy(), inputs[1].numpy(), training))
        return kept(inputs, training=training)

    one.step.move, one.step._logits = move, logits
    before = [variable.numpy() for variable in one.step.model.trainable_variables]
    for samples in batches:
        one.step.on_device(samples)
    for step, seeds in enumerate(drawn):
        np.testing.assert_array_equal(seeds, draws.sample_seeds(3, draws.ELASTIC_STREAM, step, tf.range(4)))
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


def test_a_step_turns_slices_in_mm(fit):
    one, spacing_mm = fit("data.spacing_mm=[4.0, 2.5]", "augment.rotate={max_degrees: 90}"), np.array([4.0, 2.5])
    ramps = np.zeros([4, 3, 32, 32], np.float32)
    ramps[:, 0], ramps[:, 1] = np.mgrid[:32, :32]
    seeds = draws.sample_seeds(0, draws.ELASTIC_STREAM, 0, tf.range(4))
    moved, _, _ = one.step.move(ramps, tf.zeros([4, 32, 32, 1], tf.uint8), tf.zeros([4, 0, 32, 32], tf.uint8), seeds)
    turns = []
    for row, column in moved[:, :2].numpy():  # where the pixels beside the centre came from
        steps = [(part[16, 15] - part[15, 15], part[15, 16] - part[15, 15]) for part in (row, column)]
        turns.append(np.array(steps) * spacing_mm[:, None] / spacing_mm)
        np.testing.assert_allclose(turns[-1] @ turns[-1].T, np.eye(2), atol=1e-4)
    assert np.ptp(turns, axis=0).max() > 0.1


def test_a_step_is_adam_s_on_the_clipped_gradients_of_the_loss_that_the_config_names(fit):
    """Two steps against Adam and the focal loss written out here (Kingma and Ba, 2015; Lin et al., 2017)."""
    peak, beta_1, beta_2, clip_norm = 1.0e-2, 0.8, 0.9, 0.01
    one = fit(
        f"train.learning_rate={peak}", f"train.beta_1={beta_1}", f"train.beta_2={beta_2}",
        f"train.clip_norm={clip_norm}", "train.loss=focal", "train.focal_gamma=1.0", "train.class_weights=[0.5, 3.0]",
        "train.schedule=polynomial", "train.warmup_steps=1", "model.dropout=0",
    )  # fmt: skip
    variables = one.step.model.trainable_variables
    weights = [variable.numpy().astype(np.float64) for variable in variables]
    first, second = ([np.zeros_like(each) for each in weights] for _ in range(2))
    rates = (peak / 2, peak)  # warm-up to the first step that decays, by (1 - 0 / 3)^0.9
    for number, (samples, rate) in enumerate(zip(one._batches(0).take(2), rates, strict=True), start=1):
        with tf.GradientTape() as tape:
            stacks = pipeline.intensities(samples, "none")
            probabilities = one.step.model([stacks, tf.zeros([4, 2], tf.int64)])
            true = tf.gather(probabilities, tf.cast(samples.mask[..., 0], tf.int32), batch_dims=3)
            weight = tf.where(samples.mask[..., 0] > 0, 3.0, 0.5)
            loss = tf.reduce_mean(-weight * (1.0 - true) * tf.math.log(true))
        gradients = [each.numpy().astype(np.float64) for each in tape.gradient(loss, variables)]
        norm = np.sqrt(sum((each**2).sum() for each in gradients))
        assert norm > 2 * clip_norm
        one.step(samples)
        for place, gradient in enumerate(gradients):
            clipped = gradient * clip_norm / norm
            first[place] = beta_1 * first[place] + (1 - beta_1) * clipped
            second[place] = beta_2 * second[place] + (1 - beta_2) * clipped**2
            mean, square = first[place] / (1 - beta_1**number), second[place] / (1 - beta_2**number)
            moved = weights[place] - rate * mean / (np.sqrt(square) + 1e-7 / np.sqrt(1 - beta_2**number))
            np.testing.assert_allclose(variables[place].numpy(), moved, atol=0.02 * rate)
            weights[place] = variables[place].numpy().astype(np.float64)


def test_the_pretrained_encoder_sees_intensities_as_its_weights_expect(fit):
    one = fit("model.encoder=vgg11", "model.encoder_weights=none", "model.width=2")
    _, (dark, bright) = pipeline.training_bounds(one.files, 32, None)
    # torchvision's ImageNet means and standard deviations, of intensities from 0 to 1, averaged over the colours.
    mean, sd = np.mean([0.485, 0.456, 0.406]), np.mean([0.229, 0.224, 0.225])
    for intensity, expected in ((dark, (0 - mean) / sd), (bright, (1 - mean) / sd)):
        assert (intensity - one.step.offset) * one.step.scale == pytest.approx(expected, rel=1e-6)


def test_an_export_to_a_full_disk_is_an_error_of_the_system(fit, tmp_path, monkeypatch):
    one = fit()
    one._validate(2, Board(None))

    def full(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(tf.saved_model, "save", full)
    with pytest.raises(OSError, match="No space left") as error:
        one.export(tmp_path / "model", {})
    assert error.value.filename == str(tmp_path / "model") and not (tmp_path / "model").exists()


def test_the_best_weights_are_kept_and_exported_not_the_last(fit, tmp_path):
    one, board = fit(), Board(None)
    best = [weights.copy() for weights in one.step.model.get_weights()]
    one.step.labels = lambda volume: volume.mask.numpy()[..., 0]
    assert one._validate(2, board)["validation_dice"] == 1.0
    one.step.model.set_weights([weights + 0.5 for weights in best])
    one.step.labels = lambda volume: np.zeros_like(volume.mask.numpy()[..., 0])
    assert one._validate(4, board)["validation_dice"] < 0.5
    card = one.export(tmp_path / "model", {})
    assert card["measured"]["validation_dice"] == 1.0
    stacks = tf.random.stateless_uniform([8, 32, 32, 3], [1, 2]) * 200
    infer = Segmenter(tmp_path / "model").infer(stacks=stacks)["probabilities"]
    one.step.model.set_weights(best)
    np.testing.assert_allclose(infer, one.step.model([stacks, tf.zeros([8, 2], tf.int64)]), atol=1e-5)


def test_a_validation_that_was_interrupted_is_made_up_for(fit, monkeypatch):
    stopped = fit()
    monkeypatch.setattr(stopped, "_validate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = fit()
    assert int(resumed.step.number) == 2  # the checkpoint before the validation, not one that claims it done
    resumed.run()
    assert [int(row["step"]) for row in rows(resumed.run_folder / "metrics.csv")] == [4]
    assert resumed.best_weights.is_file()
    assert int(fit().step.number) == 4


LOGGED = ("step", "loss", "dice", "validation_dice", "validation_volume_error_percent", "learning_rate")
TIMES = ("time/input_wait_share", "time/step_seconds")


def logged(run):
    """What a run wrote: the columns of metrics.csv without times, and of TensorBoard every value by tag and step."""
    events = EventAccumulator(str(run / "logs"), size_guidance={"tensors": 0}).Reload()
    values = [
        (tag, event.step, tf.make_ndarray(event.tensor_proto).tolist())
        for tag in sorted(events.Tags()["tensors"])
        if tag not in TIMES
        for event in events.Tensors(tag)
    ]
    return [{name: row[name] for name in LOGGED} for row in rows(run / "metrics.csv")], values


@pytest.mark.parametrize(("number", "when"), [(2, "at the step"), (4, "amid its validation")])
def test_who_asks_to_stop_waits_for_no_validation_which_is_made_up_for_first(fit, tmp_path, monkeypatch, number, when):
    make = functools.partial(fit, "train.validate_every=2", "train.deterministic=true", ELASTIC,
                             "train.early_stopping={patience: 2}")  # fmt: skip
    whole = make()
    whole.run()
    whole.run_folder.rename(tmp_path / "whole")
    asked = []
    monkeypatch.setattr("lvseg.command.stop_requests", lambda: contextlib.nullcontext(lambda: bool(asked)))
    for attempt in range(2):  # the second is asked while it makes up for the validation
        stopped, seen = make(), []
        assert int(stopped.step.number) == (number if attempt else 0)

        def look(volume, step=stopped.step, seen=seen, labels=stopped.step.labels):
            seen.append(int(step.number))
            if seen.count(number) == 2:
                asked.append("amid its validation")
            return labels(volume)

        def train_step(samples, step=stopped.step, run=stopped.step._run):
            run(samples)
            if int(step.number) == number and when == "at the step":
                asked.append(when)

        stopped.step.labels, stopped.step._run = look, train_step
        with pytest.raises(KeyboardInterrupt):
            stopped.run()
        assert asked.pop() and seen.count(number) == (2 if attempt or when != "at the step" else 0)
    resumed = make()
    resumed.run()
    assert int(resumed.step.number) == 4 and logged(resumed.run_folder) == logged(tmp_path / "whole")
    for one, other in zip(*(tf.nest.flatten(run.step.state) for run in (resumed, whole)), strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    for name in ("best_dice", "best_step", "to_beat", "validations_since"):
        assert getattr(resumed, name).numpy() == getattr(whole, name).numpy()
    best = tmp_path / "whole/checkpoints" / whole.best_weights.name
    with np.load(resumed.best_weights) as one, np.load(best) as other:
        for name in other.files:
            np.testing.assert_array_equal(one[name], other[name])


def test_what_a_killed_run_logged_after_its_checkpoint_is_not_logged_twice(fit, tmp_path, monkeypatch):
    make = functools.partial(fit, "train.steps=6", "train.validate_every=2", "train.checkpoint_every=3",
                             "train.deterministic=true", "train.histograms=true", ELASTIC)  # fmt: skip
    whole = make()
    whole.run()
    whole.run_folder.rename(tmp_path / "whole")
    killed = make()
    train_step = killed.step._run

    def fail_after_the_fifth(samples):
        train_step(samples)
        if int(killed.step.number) == 5:
            raise MemoryError

    monkeypatch.setattr(killed.step, "_run", fail_after_the_fifth)
    with pytest.raises(MemoryError):
        killed.run()
    assert [int(row["step"]) for row in rows(killed.run_folder / "metrics.csv")] == [2, 4]
    resumed = make()
    assert int(resumed.step.number) == 3
    resumed.run()
    assert logged(resumed.run_folder) == logged(tmp_path / "whole")


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
    count = one.training[file][0]["shape"][0]
    assert f"a loss that is not finite at step 5 (slice {own + 1} of {count} of patient {patient} study 1)" in str(
        error.value
    )
    assert all(np.isfinite(variable.numpy()).all() for variable in one.step.model.trainable_variables)
    again = fit("train.steps=9", "train.checkpoint_every=3", "train.validate_every=9")
    assert int(again.step.number) == 3  # the last good checkpoint; none was written after the bad step
    again.run()
    assert int(again.step.number) == 9
    assert any((a != b.numpy()).any() for a, b in zip(weights, again.step.model.trainable_variables, strict=True))


def test_the_command_hands_the_loop_no_shard_of_a_test_patient(in_study, tmp_path, monkeypatch, capfd):
    handed = []

    def stop(experiment, sets, split, run, cluster):
        handed.extend(row["patient"] for shards in sets for row in shards.rows)
        raise InputError("STOP", "seen enough")

    monkeypatch.setattr("lvseg.fit.Fit", stop)
    assert run_command(tmp_path) == 2 and "seen enough" in capfd.readouterr().err
    assert len(handed) == 18 and not {"a-001", "b-001"} & set(handed)


def begun_run(runs, files, manifest):
    """A run folder of the small experiment below `runs` as training would have left it, with these files alone."""
    run = runs / "volume/small-fold0"
    contents = {"config.yaml": yaml.safe_dump(load_experiment(Path("experiment.yaml"), [f"runs={runs}"]).model_dump()),
                "manifest.json": json.dumps(manifest)}  # fmt: skip
    for name in files:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(contents.get(name, "kept"))
    return run


BEGUN = {"sessions": [{"first_step": 0}]}
RESUMED = {"sessions": [{"first_step": 0}, {"first_step": 50}]}
FINISHED = {**BEGUN, "finished": True}


@pytest.mark.parametrize(
    ("files", "manifest", "settings", "code", "words"),
    [
        (("config.yaml", "manifest.json"), FINISHED, (), 0, "is finished"),
        (("config.yaml", "manifest.json"), FINISHED, ("train.steps=9",), 2, "another train.steps than in"),
        (("manifest.json",), FINISHED, (), 2, "without config.yaml in"),
        (("manifest.json",), BEGUN, (), 2, "without config.yaml in"),
        (("config.yaml", "manifest.json"), RESUMED, (), 2, "without checkpoints/checkpoint in"),
        (("config.yaml", "manifest.json", "model/model.json"), BEGUN, (), 2, "without checkpoints/checkpoint in"),
        (("checkpoints/checkpoint", "manifest.json"), BEGUN, (), 2, "without config.yaml in"),
        (("checkpoints/checkpoint", "config.yaml"), BEGUN, (), 2, "without manifest.json in"),
        (("checkpoints/checkpoint",), BEGUN, (), 2, "without manifest.json and config.yaml in"),
    ],
)
def test_a_run_that_lost_files_is_never_trained_over(in_study, tmp_path, capfd, files, manifest, settings, code, words):
    kept = ("metrics.csv", "logs/events", "checkpoints/best-50.npz", "checkpoints/ckpt-50.index")
    run = begun_run(tmp_path, (*files, *kept), manifest)
    assert run_command(tmp_path, *settings) == code
    said = capfd.readouterr()
    assert words in (said.err.strip().splitlines()[-1] if code else said.out) and str(run) in said.out + said.err
    there = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert there == {*files, *kept}


@pytest.mark.parametrize("files", [(), ("config.yaml",), ("config.yaml", "manifest.json")])
@pytest.mark.parametrize("settings", [(), ("train.steps=9",)])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
    in_study, tmp_path, monkeypatch, files, settings
):
    """Also with another config; beside what is asked for lie a log, best weights and a checkpoint not yet listed."""
    others = ("logs/events", "checkpoints/best-1.npz", "checkpoints/ckpt-1.index") if files else ()
    begun_run(tmp_path, (*files, *others), BEGUN)
    asked = []
    monkeypatch.setattr(train, "_train", lambda experiment, run, cluster: asked.append(run))
    assert run_command(tmp_path, *settings) == 0 and asked == [tmp_path / "volume/small-fold0"]


def test_a_second_process_on_a_run_folder_is_refused(in_study, tmp_path, capfd):
    run = tmp_path / "volume/small-fold0"
    with lock(run.parent / ".small-fold0.lock", run):
        assert run_command(tmp_path) == 2
        assert str(run) in capfd.readouterr().err.splitlines()[-1] and not run.exists()
    short = ("train.steps=2", "train.validate_every=2", "train.deterministic=false", "model.width=2")
    assert run_command(tmp_path, *short) == 0


def test_a_learning_rate_that_is_too_high_ends_in_one_sentence(in_study, tmp_path, capfd):
    settings = ("train.learning_rate=1.0e+30", "train.steps=50", "train.deterministic=false")
    assert run_command(tmp_path, *settings) == 1
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"not finite at step \d+ \(slice [1-9] of [79] of patient [ab]-00\d", error)
    assert not (tmp_path / "volume/small-fold0/model").exists()


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
    make = functools.partial(fit, f"train.precision={precision}", "train.deterministic=true", ELASTIC)
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
    exported = Segmenter(tmp_path / "model").infer(stacks=stacks)["probabilities"]
    assert exported.dtype == tf.float32
    np.testing.assert_allclose(exported, resumed.step.model([stacks, tf.zeros([8, 2], tf.int64)]), atol=0.02)


def test_gradients_that_stay_infinite_stop_float16_too(fit):
    one = fit("train.precision=mixed_float16", "train.steps=40", "train.validate_every=40", "train.checkpoint_every=40")
    one.step.optimiser.scaled = lambda loss: loss * np.inf
    with pytest.raises(FloatingPointError, match="received gradients that are not finite"):
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


def test_what_a_test_patient_s_scan_holds_cannot_matter(study, tmp_path, fit, monkeypatch):
    """Training with other scans of the test patients ends with the very same weights."""
    folder = tmp_path / "study"
    shutil.copytree(study, folder, ignore=shutil.ignore_patterns("runs"))
    for own in "ab":
        image, _ = scan(own, 1)
        write_volume(image.with_voxels(255 - image.voxels), folder / f"raw/{own}/{own}-001/image.nii.gz")
    kept = []
    for place in (study, folder):
        monkeypatch.chdir(place)
        one = fit("train.steps=20", "train.validate_every=10", "train.deterministic=true", ELASTIC)
        one.run()
        kept.append(np.load(one.best_weights))
        one.run_folder.rename(tmp_path / f"run of {place.name}")
    for name in kept[0].files:
        np.testing.assert_array_equal(kept[0][name], kept[1][name])


@pytest.mark.parametrize(
    "switches",
    [("augment.elastic.where=host", "data.axis=coronal", "data.normalise=slice"),
     ("model.residual=true", "model.norm=instance"),
     ("augment.elastic=null", "data.normalise=global", "train.loss=cross_entropy_dice")],
    ids=" ".join,
)  # fmt: skip
def test_every_switch_trains_evaluates_and_exports(in_study, tmp_path, switches):
    small = ("train.steps=4", "train.validate_every=4", "train.deterministic=false", "model.width=2")
    assert run_command(tmp_path, *small, *switches) == 0
    run = tmp_path / "volume/small-fold0"
    image = read_volume(in_study / "raw/b/b-001/image.nii.gz")
    assert Segmenter(run / "model").segment(image).mask.shape == image.shape
    assert len(rows(run / "report/patients.csv")) == len(
        json.loads((run / "manifest.json").read_text())["split"]["validation"]
    )


def test_the_pretrained_encoder_trains_without_weights_only_when_told(in_study, tmp_path, capfd):
    vgg = (
        "model.encoder=vgg11",
        "model.width=2",
        "train.steps=2",
        "train.validate_every=2",
        "train.deterministic=false",
    )
    assert run_command(tmp_path, *vgg, "model.encoder_weights=no.safetensors") == 2
    assert "model.encoder_weights" in capfd.readouterr().err.strip().splitlines()[-1]
    assert run_command(tmp_path, *vgg, "model.encoder_weights=none") == 0
