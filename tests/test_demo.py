"""The demo, whole, on a study cut down to seconds: everything it promises is there and agrees."""

import contextlib
import errno
import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_study import ROOT, python, write_study

from lvseg import metrics
from lvseg.cards import find_scans, load_card
from lvseg.errors import RunError
from lvseg.formats import read_volume

PATIENTS = 3


def small_demo(folder):
    """The shipped experiment, cards and server file, with few patients, few steps and a narrow network."""
    for name in ("experiments", "data", "serving"):
        (folder / name).mkdir()
    shutil.copy(ROOT / "serving/server.yaml", folder / "serving")
    experiment = yaml.safe_load((ROOT / "experiments/demo.yaml").read_text())
    for path in experiment["data"]["datasets"]:
        card = yaml.safe_load((ROOT / path).read_text())
        card["simulate"]["patients"] = PATIENTS
        (folder / path).write_text(yaml.safe_dump(card))
    experiment["data"] |= {"folds": 2, "test_patients": ["sim0001-0002", "sim0002-0002"], "shuffle_slices": 32,
                           "folds_file": "folds.yaml"}  # fmt: skip
    folds = [["sim0001-0001", "sim0002-0001"], ["sim0001-0003", "sim0002-0003"]]
    (folder / "folds.yaml").write_text(yaml.safe_dump({"folds": folds}))
    experiment["model"]["width"] = 2
    experiment["train"] |= {"steps": 30, "batch_size": 4, "validate_every": 30, "learning_rate": 3.0e-3}
    (folder / "experiments/demo.yaml").write_text(yaml.safe_dump(experiment))


def working_in(folder):
    """Processes whose working folder is this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # ended while we looked
                if (entry / "cwd").readlink() == folder:
                    found.append(entry.name)
    return found


def test_the_demo_goes_from_simulated_patients_to_served_masks_that_agree(tmp_path):
    small_demo(tmp_path)
    done = python(tmp_path, ROOT / "experiments/demo.py", "--least-dice", 0, "--most-error", 1000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every served .vtk equals" in done.stdout
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    assert summary["patients"] == 2 and set(summary["by_scanner"]) == {"philips_volume", "ge_volume"}
    scores = []
    for card, patient in (("philips_volume", "sim0001-0002"), ("ge_volume", "sim0002-0002")):
        served = read_volume(tmp_path / f"demo/served/{patient}_{card}.vtk")
        truth = read_volume(tmp_path / f"data/raw/phantom_{card}/{patient}/mask.nii.gz").canonical()
        np.testing.assert_allclose(served.affine, truth.affine, atol=1e-6)
        scores.append(metrics.dice(served.voxels, truth.voxels))
        assert summary["by_scanner"][card]["dice"]["mean"] == scores[-1]
        assert (tmp_path / f"runs/volume/demo-fold0/report/overlay_{card}.png").is_file()
    assert summary["dice"]["mean"] == np.mean(scores)
    assert not working_in(tmp_path) and not list((tmp_path / "demo/spool").glob("*/*"))


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The demo as a module, in a folder of the test's own."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "experiments/demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


def test_the_scans_may_lie_on_another_disk_than_the_demo(demo, tmp_path, monkeypatch):
    def another_disk(*_, **__):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", another_disk)
    scans = find_scans(*load_card(write_study(tmp_path) / "cards/a.yaml"))[:2]
    paths = demo.copies(scans)
    assert [path.name for path in paths] == ["a-000_a.nii.gz", "a-001_a.nii.gz"]
    assert [path.read_bytes() for path in paths] == [scan.image.read_bytes() for scan in scans]


def test_a_command_that_fails_ends_the_demo_with_a_sentence_that_names_it(demo, capfd):
    with pytest.raises(RunError, match=r"lvseg\.train .* exit code 2"):
        demo.module("lvseg.train", "--cfg", "nowhere.yaml")
    assert "nowhere.yaml" in capfd.readouterr().err
