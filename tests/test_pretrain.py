"""Pretraining: what it writes is the trained encoder, says where it comes from, and starts other networks."""

import hashlib
import json
import re
from copy import deepcopy

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import yaml
from small_study import EXPERIMENT, ROOT, command, rows, scan

from lvseg import evaluate, pretrain, train
from lvseg.config import load_experiment
from lvseg.formats import write_volume
from lvseg.models import vgg
from lvseg.models.unet import encoder_layers, unet
from lvseg.split import scans_seen_by, seen_by
from lvseg.volume import Volume

PATIENTS = 6
STEPS, RATE = 4, 1.0e-3
CARD = {
    "name": "slices",
    "task": "ct_thigh",
    "scanner": "ct",
    "modality": "CT",
    "root": "../raw",
    "image": "{patient}/image.nii.gz",
    "mask": "{patient}/mask.nii.gz",
    "labels": {"left": [1], "right": [2], "rest": [3]},
    "licence": "none",
    "citation": "made by the tests",
}


def slice_of(number):
    """One slice a patient as of a CT, and a mask of three classes beside the background."""
    image, mask = scan("a", number)
    middle = slice(image.voxels.shape[0] // 2, image.voxels.shape[0] // 2 + 1)
    voxels, organ = image.voxels[middle], mask.voxels[middle] > 0
    right = np.arange(organ.shape[-1]) > organ.shape[-1] / 2
    classes = np.where(organ, np.where(right, 2, 1), np.where(voxels > 70, 3, 0)).astype(np.uint8)
    return Volume(voxels, image.affine), Volume(classes, mask.affine)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A study whose encoder starts from a file, pretrained by the command."""
    folder = tmp_path_factory.mktemp("pretrain")
    for number in range(PATIENTS):
        (folder / f"raw/ct-{number}").mkdir(parents=True)
        for volume, name in zip(slice_of(number), ("image", "mask"), strict=True):
            write_volume(volume, folder / f"raw/ct-{number}/{name}.nii.gz")
    (folder / "cards").mkdir()
    (folder / "cards/ct.yaml").write_text(yaml.safe_dump(CARD))
    vgg.save_encoder(unet(32, 3, 2, 2, "vgg11", seed=5), folder / "start.safetensors", "drawn for a test", {})
    experiment = deepcopy(EXPERIMENT) | {"task": "ct_thigh", "augment": {"elastic": None}}
    experiment["data"] |= {"datasets": ["cards/ct.yaml"], "test_patients": ["ct-0"]}
    experiment["model"] |= {"width": 2, "encoder": "vgg11", "encoder_weights": "start.safetensors"}
    experiment["train"] |= {"steps": STEPS, "learning_rate": RATE, "validate_every": 2}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    done = command(folder, "lvseg.pretrain", "--cfg", "experiment.yaml", "--out", "weights/ct.safetensors")
    assert done.returncode == 0, done.stderr
    assert "weights/ct.safetensors" in done.stdout
    return folder


def best_row(run):
    return max(rows(run / "metrics.csv"), key=lambda row: float(row["validation_dice"]))


def test_the_file_holds_the_encoder_with_the_best_validation_dice(folder):
    saved = safetensors.numpy.load_file(folder / "weights/ct.safetensors")
    with np.load(*(folder / "runs/ct_thigh/small-fold0/checkpoints").glob("best-*.npz")) as arrays:
        best = [arrays[name] for name in sorted(arrays.files)[:16]]  # the encoder's come first, kernel and bias in turn
    assert len(saved) == 16
    for place, kernel, bias in zip(vgg.FEATURES, best[::2], best[1::2], strict=True):
        np.testing.assert_array_equal(saved[f"features.{place}.weight"], np.moveaxis(kernel, (3, 2), (0, 1)))
        np.testing.assert_array_equal(saved[f"features.{place}.bias"], bias)


def test_training_went_on_from_the_weights_it_was_given(folder):
    start, end = (
        safetensors.numpy.load_file(folder / name) for name in ("start.safetensors", "weights/ct.safetensors")
    )
    moved = {name: np.abs(end[name] - start[name]).max() for name in end if name.endswith("weight")}
    # Adam's steps are at most (1 - beta_1) / sqrt(1 - beta_2) times the rate.
    assert all(0 < value <= STEPS * RATE * 3.2 for value in moved.values())


def test_the_file_says_where_it_comes_from(folder):
    path, run = folder / "weights/ct.safetensors", folder / "runs/ct_thigh/small-fold0"
    with safetensors.safe_open(path, framework="numpy") as file:
        facts = json.loads(file.metadata()["lvseg"])
    best, manifest = best_row(run), json.loads((run / "manifest.json").read_text())
    assert facts["step"] == int(best["step"]) and facts["validation_dice"] == float(best["validation_dice"])
    assert facts["task"] == "ct_thigh" and facts["datasets"] == ["slices"]
    assert facts["config_sha256"] == manifest["config_sha256"]
    sha256 = hashlib.sha256((folder / "start.safetensors").read_bytes()).hexdigest()
    assert facts["started_from"] == {
        "name": "start.safetensors", "sha256": sha256, "description": "drawn for a test"
    }  # fmt: skip
    loaded = vgg.load_encoder(unet(32, 3, 2, 2, "vgg11"), str(path))
    assert loaded.name == "ct.safetensors" and loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for part in ("slices", "ct_thigh", f"{best['step']} steps", "drawn for a test"):
        assert part in loaded.description
    for key in ("split", "scans_sha256"):
        assert facts[key] == getattr(loaded, key) == {part: manifest[key][part] for part in ("train", "validation")}
        assert len(facts[key]["train"]) + len(facts[key]["validation"]) == PATIENTS - 1


def test_whom_an_encoder_was_shown_goes_along_with_what_begins_with_it(folder, tmp_path):
    """By another pretraining, too: a manifest as it would be written, of a run on two other patients."""
    first = vgg.load_encoder(unet(32, 3, 2, 2, "vgg11"), str(folder / "weights/ct.safetensors"))
    info = {"provenance": {"split": {"train": ["x-1"], "validation": ["x-2"]}, "encoder_weights": first.facts()}}
    assert seen_by(info, tmp_path, "train") == {"x-1", *first.split["train"]}
    assert seen_by(info, tmp_path, "validation") == {"x-2", *first.split["validation"]}
    assert scans_seen_by(info, "train") == set(first.scans_sha256["train"])
    shown = {"encoder_weights": vgg.EncoderWeights("imagenet", "digest", "of others").facts()}
    assert seen_by({"provenance": {**info["provenance"], **shown}}, tmp_path, "train") == {"x-1"}


@pytest.mark.parametrize("part", ["train", "validation"])
def test_an_encoder_that_knows_who_judges_a_run_is_refused(folder, tmp_path, monkeypatch, capsys, part):
    monkeypatch.chdir(folder)
    path = "weights/ct.safetensors"
    split = vgg.load_encoder(unet(32, 3, 2, 2, "vgg11"), path).split
    known = split[part][0]
    arguments = ["--cfg", "experiment.yaml", "--set", f"runs={tmp_path}", "--set", f"model.encoder_weights={path}"]
    assert train.main([*arguments, "--set", f"data.test_patients=[{known}]"]) == 2
    assert re.search(rf"received model\.encoder_weights={path}, which knows .*{known}", capsys.readouterr().err)
    assert not (tmp_path / "ct_thigh/small-fold0/config.yaml").exists()
    if part == "train":  # of the same split, whoever chose the encoder may choose what begins with it
        assert train.main(arguments) == 0
        assert evaluate.main(["--run", str(tmp_path / "ct_thigh/small-fold0"), "--no-quality"]) == 0
        manifest = json.loads((tmp_path / "ct_thigh/small-fold0/manifest.json").read_text())
        assert manifest["encoder_weights"]["split"] == split
        for name in ("summary.json", "report.html"):
            assert known not in (tmp_path / "ct_thigh/small-fold0/report" / name).read_text()


def test_another_network_starts_from_it_exactly(folder):
    path = folder / "weights/ct.safetensors"
    saved = safetensors.numpy.load_file(path)
    model = unet(32, 9, 2, 4, "vgg11", residual=True, encoder_input="projection", precision="mixed_bfloat16")
    vgg.load_encoder(model, str(path))
    for place, layer in zip(vgg.FEATURES, encoder_layers(model), strict=True):
        kernel, bias = layer.get_weights()
        np.testing.assert_array_equal(kernel, saved[f"features.{place}.weight"].transpose(2, 3, 1, 0))
        np.testing.assert_array_equal(bias, saved[f"features.{place}.bias"])


def test_a_finished_run_is_only_written_again(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    run = folder / "runs/ct_thigh/small-fold0"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert pretrain.main(["--cfg", "experiment.yaml", "--out", "again.safetensors"]) == 0
    assert (folder / "again.safetensors").read_bytes() == (folder / "weights/ct.safetensors").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--set", "model.encoder=null"], "Expected model.encoder to be vgg11"),
        (["--set", "model.encoder_input=projection"], "Expected model.encoder_input to be spread"),
        (["--set", "model.freeze_encoder_steps=4"], "Expected model.freeze_encoder_steps below train.steps=4"),
        (["--set", "data.neighbours=4"], "Expected data.neighbours to be 1"),
        (["--out", "weights.npz"], "Expected --out to be a .safetensors file, received weights.npz"),
        (["--set", "train.learning_rate=1.0"], "train.learning_rate"),  # the run was another
    ],
)
def test_what_cannot_be_pretrained_is_refused_before_training(folder, monkeypatch, capsys, given, said):
    monkeypatch.chdir(folder)
    assert pretrain.main(["--cfg", "experiment.yaml", "--out", "other.safetensors", *given]) == 2
    assert said in capsys.readouterr().err and not (folder / "other.safetensors").exists()


def test_the_experiment_file_pretrains_on_any_of_the_simulated_ct_tasks(monkeypatch):
    """As its comment says: one task after another; the cards name as many classes as the network gets."""
    monkeypatch.chdir(ROOT)
    for task, classes in (("ct_abdomen", 3), ("ct_liver", 2), ("ct_thigh", 4)):
        overrides = [f"task={task}", f"data.datasets=[data/phantom_{task}.yaml]"]
        experiment = load_experiment(ROOT / "experiments/pretrain_ct.yaml", overrides)
        card = yaml.safe_load((ROOT / experiment.data.datasets[0]).read_text())
        assert card["task"] == experiment.task and len(card["labels"]) + 1 == classes
        assert experiment.model.encoder == "vgg11" and experiment.data.neighbours == 1
