"""The models that come with lvseg: whole, small, told what they are, and right on scans that nothing was trained on."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from small_study import ROOT

from lvseg import export, metrics
from lvseg.config import Experiment, load_experiment
from lvseg.export import weights_sha256
from lvseg.formats import read_volume, write_volume
from lvseg.keys import check_keys
from lvseg.phantom.scanners import SCANNERS
from lvseg.predict import SHIPPED, Segmenter, main, newest_version, shipped_model

UNSEEN = 101, 3  # seed and number of a patient that no card has


@pytest.fixture(scope="module")
def patient():
    """A simulated patient under a scanner that is never trained on."""
    return SCANNERS["siemens_volume"].image(*UNSEEN)


@pytest.fixture(scope="module")
def segmenter():
    return Segmenter(shipped_model("volume"))


def test_it_is_what_its_card_says_and_small_enough_for_the_repository():
    for task in SHIPPED.iterdir():
        folder = newest_version(task)
        info = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        assert info["task"] == task.name and info["weights_sha256"] == weights_sha256(folder)
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 8e6
        text = (task / "README.md").read_text(encoding="utf-8")
        assert info["weights_sha256"] in text and info["provenance"]["config_sha256"] in text
        split = info["provenance"]["split"]
        patients = [len(split[part]) for part in ("train", "validation", "test")]
        assert f"On {patients[0]} of the {sum(patients)} " in text
        assert "{} chose, {} were kept for the test".format(*patients[1:]) in text
        assert not any("siemens" in row["name"] for row in info["provenance"]["datasets"])
        for heading in ("How it was made", "What it was measured on", "What it must not be used for"):
            assert f"## {heading}\n" in text


def test_the_last_command_of_its_card_is_the_training_that_made_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    for task in SHIPPED.iterdir():
        info = json.loads((newest_version(task) / "model.json").read_text(encoding="utf-8"))
        text = (task / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
        words = shlex.split(re.findall(r"python -m lvseg\.train (.*)", text)[-1])
        config = Path(words[words.index("--cfg") + 1])
        overrides = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
        assert len(words) == 2 + 2 * len(overrides)
        made_by = check_keys(Experiment, info["experiment"], "model.json")
        assert load_experiment(config, overrides) == made_by, task


def test_its_files_name_no_folder_of_the_machine_that_trained_it():
    """In JSON no text begins with an absolute path, and nowhere are the folders that systems keep people's files in."""
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert any(path.name == "saved_model.pb" for path in files)
    for path in files:
        content = path.read_bytes()
        found = re.findall(rb"(?<![\w.)/-])/(?:home|root|tmp|work|usr|var|opt|mnt|Users)/", content)
        assert not found, path
        assert path.suffix != ".json" or not re.search(rb'"(/|[A-Za-z]:)', content), path


def test_all_of_it_is_in_what_pip_installs(tmp_path):
    for name in ("lvseg", "serving"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "tree")
    build = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), "./tree"]
    subprocess.run([sys.executable, "-m", *build], check=True, cwd=tmp_path)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert files and {path.relative_to(ROOT).as_posix() for path in files} <= names


def test_the_model_is_made_ready_for_a_server_without_a_word_of_tensorflow_about_gpus(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TF_CPP_MIN_LOG_LEVEL"}
    command = [sys.executable, "-m", "lvseg.export", "--shipped", "fatfraction", "--out", str(tmp_path / "models")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == "" and (tmp_path / "models/1/saved_model.pb").is_file()


def test_the_command_needs_no_model_and_finds_the_liver_of_a_scanner_never_seen(patient, tmp_path, capfd):
    write_volume(patient.images["image"], tmp_path / "scan.nii.gz")
    assert main([str(tmp_path / "scan.nii.gz"), "-o", str(tmp_path / "liver.nii.gz")]) == 0
    assert "liver" in capfd.readouterr().out
    mask = read_volume(tmp_path / "liver.nii.gz")
    assert metrics.dice(mask.voxels, patient.mask.voxels) > 0.9
    np.testing.assert_allclose(mask.affine, patient.mask.affine, atol=1e-3)


@pytest.mark.parametrize("task", ["volume", "fatfraction"])
def test_they_are_handed_to_the_server_as_they_are(task, tmp_path, capfd):
    assert export.main(["--shipped", task, "--out", str(tmp_path / task)]) == 0
    own, there = newest_version(shipped_model(task)), tmp_path / task / "1"
    assert capfd.readouterr().out.strip() == str(there)
    for path in own.rglob("*"):
        assert path.is_dir() or (there / path.relative_to(own)).read_bytes() == path.read_bytes()


def test_a_task_without_a_model_is_said(tmp_path, capfd):
    assert export.main(["--shipped", "lung", "--out", str(tmp_path / "lung")]) == 2
    assert (
        "comes with a model for (fatfraction, volume), received lung" in capfd.readouterr().err
        and not (tmp_path / "lung").exists()
    )


@pytest.mark.parametrize("scanner", ["philips_volume", "ge_volume"])
def test_other_scanners_that_nothing_was_trained_on(segmenter, scanner):
    scan = SCANNERS[scanner].image(*UNSEEN)
    assert metrics.dice(segmenter.segment(scan.images["image"]).mask.voxels, scan.mask.voxels) > 0.93


@pytest.mark.parametrize("change", ["brighter", "bent up", "bent down"])
def test_intensities_have_no_scale_and_no_curve(segmenter, patient, change):
    image = patient.images["image"]
    values = np.maximum(image.voxels.astype(np.float32), 0)
    bright = float(np.percentile(values, 99.5))
    values = {
        "brighter": 37 * values + 4000,
        "bent up": bright * (values / bright) ** 0.6,
        "bent down": bright * (values / bright) ** 1.7,
    }[change]
    answer = segmenter.segment(image.with_voxels(values))
    assert metrics.dice(answer.mask.voxels, patient.mask.voxels) > 0.9


@pytest.mark.parametrize("scanner", ["siemens_fat", "philips_fat", "ge_fat"])
def test_water_and_fat_need_no_model_either(tmp_path: Path, scanner, capfd):
    made = SCANNERS[scanner].image(*UNSEEN)
    for name in ("water", "fat"):
        write_volume(made.images[name], tmp_path / f"{name}.nii.gz")
    pair = ["--water", str(tmp_path / "water.nii.gz"), "--fat", str(tmp_path / "fat.nii.gz")]
    outputs = ["-o", str(tmp_path / "liver.nii.gz"), "--json", str(tmp_path / "liver.json")]
    assert main([*pair, *outputs]) == 0, capfd.readouterr().err
    assert metrics.dice(read_volume(tmp_path / "liver.nii.gz").voxels, made.mask.voxels) > 0.87
    (measured,) = json.loads((tmp_path / "liver.json").read_text(encoding="utf-8"))
    mean = measured["fat_fraction_percent"]["liver"]["mean"]
    assert mean == pytest.approx(made.truth["mask_fat_percent_mean"], abs=0.5)
    assert measured["model"]["task"] == "fatfraction"


def test_a_fat_fraction_image_names_its_task(tmp_path, capfd):
    made = SCANNERS["siemens_fat"].image(*UNSEEN)
    write_volume(made.images["image"], tmp_path / "fraction.nii.gz")
    own = [str(tmp_path / "fraction.nii.gz"), "-o", str(tmp_path / "liver.nii.gz"), "--task", "fatfraction"]
    assert main([*own, "--scale", "1"]) == 0
    assert metrics.dice(read_volume(tmp_path / "liver.nii.gz").voxels, made.mask.voxels) > 0.87
    capfd.readouterr()
    assert main([*own, "--model", str(shipped_model("volume"))]) == 2
    assert "Expected --task without --model" in capfd.readouterr().err
