"""The experiment file: the report's defaults, and one sentence for everything that is wrong with it."""

from pathlib import Path

import pytest
import yaml

from lvseg.config import load_experiment
from lvseg.errors import InputError
from lvseg.keys import changed_keys, digest

MINIMAL = {"task": "volume", "name": "best", "data": {"datasets": ["data/some.yaml"]}}


def write(tmp_path, values):
    path = tmp_path / "experiment.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def test_the_reports_numbers_are_the_defaults(tmp_path):
    experiment = load_experiment(write(tmp_path, MINIMAL))
    data, model, train = experiment.data, experiment.model, experiment.train
    assert (data.size, data.neighbours, data.folds, data.test_fraction) == (256, 1, 10, 0.11)
    assert data.spacing_mm == [1.75, 1.75]
    assert (model.width, model.dropout, model.encoder, model.residual) == (64, 0.5, "vgg11", True)
    assert experiment.augment.elastic is not None
    assert (experiment.augment.elastic.sigma_px, experiment.augment.elastic.grid) == (8.0, 8)
    assert (train.steps, train.batch_size, train.learning_rate, train.loss) == (100_000, 1, 1e-4, "cross_entropy")
    assert (train.beta_1, train.beta_2) == (0.9, 0.999)


@pytest.mark.parametrize("path", sorted(Path("experiments").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_experiments_are_valid_and_say_how_they_are_run(path):
    load_experiment(path)
    command = "pretrain" if path.name.startswith("pretrain") else "train"
    assert f"python -m lvseg.{command} --cfg {path}" in path.read_text()


@pytest.mark.parametrize(
    ("task", "neighbours", "spacing_mm"), [("volume", 1, [1.75, 1.75]), ("fatfraction", 4, [1.72, 1.72])]
)
def test_the_experiments_of_the_report_have_all_four_methods(task, neighbours, spacing_mm):
    path = Path(f"experiments/{task}.yaml")
    experiment = load_experiment(path)
    assert (experiment.task, experiment.data.neighbours, experiment.data.spacing_mm) == (task, neighbours, spacing_mm)
    assert experiment.augment.elastic is not None and experiment.augment.elastic.sigma_px == 8.0
    assert experiment.augment.elastic.grid == 8
    assert experiment.model.residual
    assert (experiment.model.encoder, experiment.model.encoder_weights) == ("vgg11", "imagenet")
    assert (experiment.train.steps, experiment.train.batch_size, experiment.train.learning_rate) == (100_000, 1, 1e-4)
    assert load_experiment(path, ["augment.elastic=null"]).augment.elastic is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": {"lerning_rate": 0.1}}, ("train.lerning_rate", "did you mean learning_rate?")),
        ({"augment": {"elastic": {"sigma": 3.0}}}, ("augment.elastic.sigma", "did you mean sigma_px?")),
        ({"optimiser": 1}, ("optimiser", "Expected one of task, name")),
        ({"lerning_rate": 0.1}, ("lerning_rate", "did you mean train.learning_rate?")),
        ({"train": {"learning_rate": float("inf")}}, ("train.learning_rate", "finite")),
        ({"data": {"datasets": []}}, ("data.datasets to have at least 1 item",)),
        ({"train": {"steps": "many"}}, ("train.steps", "integer", "'many'")),
        ({"train": {"steps": 2.5}}, ("train.steps", "integer", "2.5")),
        ({"train": {"deterministic": 1}}, ("train.deterministic", "boolean")),
        ({"train": {"loss": "hinge"}}, ("train.loss", "cross_entropy", "hinge")),
        ({"data": {"datasets": ["x"], "size": 200}}, ("data.size", "32", "200")),
        ({"data": {"datasets": ["x"], "fold": 10}}, ("fold=10", "folds=10")),
        ({"data": {"datasets": ["x"], "clip_percentiles": [0.25, 99]}}, ("clip_percentiles", "0.25")),
        ({"data": {"datasets": ["x"], "clip_percentiles": [99.0, 1.0]}}, ("clip_percentiles",)),
        ({"data": {}}, ("data.datasets",)),
        ({"name": "a b/c"}, ("name", "a b/c")),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_with_file_and_key(tmp_path, change, words):
    path = write(tmp_path, {**MINIMAL, **change})
    with pytest.raises(InputError) as error:
        load_experiment(path)
    assert error.value.code == "BAD_CONFIG"
    assert "\n" not in error.value.sentence and error.value.sentence.count(". ") == 0
    for word in (*words, str(path)):
        assert word in error.value.sentence


def test_a_number_that_yaml_reads_as_text_is_explained(tmp_path):
    path = write(tmp_path, "task: volume\nname: a\ndata: {datasets: [x]}\ntrain: {learning_rate: 1e-4}\n")
    with pytest.raises(
        InputError, match=r"train\.learning_rate, received '1e-4' \(YAML reads it as text; write 1\.0e-04"
    ):
        load_experiment(path)


@pytest.mark.parametrize(
    "text", ["a: [1", "- list\n", "", "\x00", "name: 2020-13-45", "[" * 5000, "a: 1\na: 2\n", "? [x]\n: 1"]
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(InputError, match=r"experiment\.yaml"):
        load_experiment(write(tmp_path, text))


def test_a_folder_in_the_place_of_a_file_is_not_told_as_missing(tmp_path):
    with pytest.raises(InputError, match="received a folder"):
        load_experiment(tmp_path)


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"nowhere\.yaml") as error:
        load_experiment(Path("nowhere.yaml"))
    assert error.value.code == "NOT_FOUND"


def test_set_overrides_any_key_and_is_checked(tmp_path):
    path = write(tmp_path, MINIMAL)
    experiment = load_experiment(path, ["train.steps=7", "augment.elastic.sigma_px=2.0", "data.fold=3"])
    assert (experiment.train.steps, experiment.augment.elastic.sigma_px, experiment.data.fold) == (7, 2.0, 3)
    assert experiment.run_folder == Path("runs/volume/best-fold3")
    for wrong in ("train.stepz=7", "train.steps", "name.x=1", ".=1", "data.size=[", "a=b: c: d", "x=!!python/none"):
        with pytest.raises(InputError) as error:
            load_experiment(path, [wrong])
        assert f"--set {wrong}" in error.value.sentence and "\n" not in error.value.sentence


def test_changed_keys_are_named_dotted_and_digest_ignores_order():
    old = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert changed_keys(old, {"a": {"b": 1, "c": {"d": 5}}, "e": 3, "f": 1}) == ["a.c.d", "f"]
    assert changed_keys(old, old) == []
    assert digest({"x": 1, "y": 2}) == digest({"y": 2, "x": 1}) != digest({"x": 1, "y": 3})


@pytest.mark.parametrize(
    "override, key",
    [
        ("train.warmup_steps=10", "warmup_steps"),
        ("train={steps: 10, schedule: step, decay_steps: [5, 10]}", "decay_steps"),
        ("train={steps: 10, profile_steps: [9, 11]}", "profile_steps"),
        ("train={steps: 10, class_weights: [0.0, 0.0]}", "class_weights"),
        ("train={steps: 10, focal_gamma: 3.0}", "focal_gamma with loss=focal only"),
        ("train={steps: 10, decay_factor: 0.5}", "decay_factor with schedule=step only"),
        ("model={encoder: vgg11, freeze_encoder_steps: 11}", "freeze_encoder_steps"),
        ("model={encoder: vgg11, norm: instance}", "norm"),
        ("train={deterministic: true, jit_compile: true}", "jit_compile"),
        ("augment={flip: {rows: 0.0, columns: 0.0}}", "flip"),
        ("augment={contrast: {kind: fraction}}", "contrast.kind"),
        ("task=fatfraction; augment={contrast: {kind: mixture}}", "contrast.kind"),
        ("data={datasets: [x], axis: coronal}; augment={arms: {}}", "arms"),
        ("data={datasets: [x], axis: sagittal}; augment={table: {}}", "table"),
        ("data={datasets: [x], neighbours: 0}; augment={thickness: {}}", "neighbours"),
        ("augment={field_of_view: {max_share: 0.21}}", "equal to 0.2 for augment.field_of_view.max_share"),
        ("data={datasets: [x], ct_window_hu: [1000, 1000.00001]}", "ct_window_hu"),
        ("task=fatfraction; data={datasets: [x], ct_window_hu: [-160, 240]}", "no data.ct_window_hu"),
        ("task=fatfraction; augment={table: {}}", "no augment.table"),
        ("task=fatfraction; augment={arms: {}, contrast: {kind: fraction}}", "no augment.arms"),
        ("task=fatfraction; augment={bias_field: {}}", "no augment.bias_field"),
        ("task=fatfraction; augment={noise: {kind: rician}}", "no augment.noise.kind=rician"),
        ("model={encoder_weights: none, freeze_encoder_steps: 10}", "freeze_encoder_steps below train.steps=10"),
        ("train={steps: 10, validate_every: 4, early_stopping: {patience: 3}}", "early_stopping.patience"),
        ("train={steps: 10, beta_1: 0.99999999}", "beta_1 below 1 in float32"),
        ("train={steps: 10, beta_2: 0.99999999}", "beta_2 below 1 in float32"),
    ],
)
def test_a_setting_that_would_do_nothing_or_cannot_be_had_is_refused(tmp_path, override, key):
    path = write(tmp_path, MINIMAL)
    with pytest.raises(InputError, match=key):
        load_experiment(path, ["train.steps=10", *override.split("; ")])


@pytest.mark.parametrize(
    "settings",
    [
        ("task=fatfraction", "augment={noise: {}, gamma: {}}"),
        ("task=fatfraction", "augment={noise: {kind: rician}, bias_field: {}, contrast: {kind: fraction}}"),
        ("model={freeze_encoder_steps: 10}",),
        ("model={encoder_weights: none, freeze_encoder_steps: 9}",),
        ("model={encoder_weights: none, freeze_encoder_steps: 10, start_from: models/volume/1}",),
        ("train={steps: 10, validate_every: 5, early_stopping: {patience: 2}}",),
        ("train={steps: 10, beta_1: 0.0, beta_2: 0.9999999}",),
    ],
)
def test_a_setting_beside_those_is_taken(tmp_path, settings):
    load_experiment(write(tmp_path, MINIMAL), ["train.steps=10", *settings])
