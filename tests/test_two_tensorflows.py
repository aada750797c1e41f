"""Two TensorFlows: which Python gets which, and that a model exported by either is served by either."""

import configparser
import contextlib
import os
import subprocess

import numpy as np
import pytest
import tensorflow as tf
import two_tensorflows
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from small_study import ROOT

STACKS = {"3.11": "constraints.txt", "3.12": "constraints-current.txt"}


def required(python):
    """What setup.cfg asks for on a Python, benchmarks aside: name -> requirement."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = config["options.extras_require"]
    lines = [config["options"]["install_requires"], *(extras[name] for name in extras if name != "bench")]
    found = [Requirement(line) for text in lines for line in text.splitlines() if line]
    here = {"python_version": python, "python_full_version": f"{python}.0"}
    return {canonicalize_name(each.name): each for each in found if each.marker is None or each.marker.evaluate(here)}


def pinned(constraints):
    """The exact versions of a constraints file: name -> version."""
    lines = (ROOT / constraints).read_text(encoding="utf-8").splitlines()
    return {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in lines if not line.startswith("#"))
    }


@pytest.mark.parametrize("python", STACKS)
def test_all_that_setup_cfg_asks_for_is_pinned_to_a_version_it_allows(python):
    versions = pinned(STACKS[python])
    for name, requirement in required(python).items():
        assert requirement.specifier.contains(versions[name]), requirement


def test_python_3_11_gets_addons_and_its_tensorflow_and_python_3_12_the_current_one_without():
    old, new = (pinned(STACKS[python]) for python in STACKS)
    assert (old["tensorflow"].split(".")[:2], new["tensorflow"].split(".")[:2]) == (["2", "15"], ["2", "21"])
    assert (old["keras"].split(".")[:2], new["keras"].split(".")[0]) == (["2", "15"], "3")
    assert "tensorflow-addons" in required("3.11") and "tensorflow-addons" in old
    assert "tensorflow-addons" not in required("3.12") and "tensorflow-addons" not in new
    for python, other in (("3.11", new), ("3.12", old)):
        for name in ("tensorflow", "keras"):
            assert not required(python)[name].specifier.contains(other[name])  # neither would do on the other Python


@pytest.fixture(scope="module")
def told(study, tmp_path_factory):
    """What came of it here, and in the other interpreter: keys that begin with where a model or run is from."""
    other = os.environ.get("LVSEG_OTHER_PYTHON")
    if not other:
        pytest.skip("LVSEG_OTHER_PYTHON names no interpreter with the other TensorFlow")
    ours, theirs = (tmp_path_factory.mktemp(name) for name in ("ours", "theirs"))
    two_tensorflows.export_networks(ours)
    with contextlib.chdir(study):
        two_tensorflows.begin("ours")
    done = subprocess.run(
        [other, two_tensorflows.__file__, ours, theirs],
        cwd=study,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(theirs / "told.npz") as arrays:
        there = {key: arrays[key] for key in arrays.files}
    if str(there.pop("version")) == tf.__version__:
        pytest.skip(f"{other} has TensorFlow {tf.__version__} too")
    here = {}
    with contextlib.chdir(study):
        for origin, folder in (("ours", ours), ("theirs", theirs)):
            found = {**two_tensorflows.answers(folder), **two_tensorflows.restored(origin)}
            here |= {f"{origin} {key}": array for key, array in found.items()}
    return here, there


@pytest.mark.parametrize("origin", ["ours", "theirs"])
@pytest.mark.parametrize("network", two_tensorflows.NETWORKS)
def test_a_model_exported_by_either_tensorflow_is_served_by_either(told, network, origin):
    here, there = (answers[f"{origin} {network} labels"] for answers in told)
    assert here.shape == (11, 37, 45) and np.sort(np.bincount(here.ravel(), minlength=3))[-2] > 0.05 * here.size
    np.testing.assert_array_equal(here, there)
    here, there = (answers[f"{origin} {network} probabilities"] for answers in told)
    assert here.std() > 0.05
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-5)


@pytest.mark.parametrize("network", two_tensorflows.NETWORKS)
def test_both_tensorflows_draw_the_same_network_from_a_seed(told, network):
    """So the networks that the two export are one, and answer alike."""
    here, _ = told
    for kind in ("labels", "probabilities"):
        ours, theirs = (here[f"{origin} {network} {kind}"] for origin in ("ours", "theirs"))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("origin", ["ours", "theirs"])
def test_a_run_begun_with_either_tensorflow_goes_on_with_either(told, in_study, origin):
    """Every layer gets the weights that it had, though the two Keras list a model's weights and name them unlike."""
    here, there = told
    names = [key for key in here if key.startswith(origin) and key.split()[-1].isdigit()]
    assert {name.split()[1] for name in names} >= {"enc1_conv1", "enc5_short", "dec1_up", "dec4_short", "logits"}
    for name in [*names, f"{origin} step"]:
        np.testing.assert_array_equal(here[name], there[name])
    assert here[f"{origin} step"] == 2
    untrained = two_tensorflows.restored(f"{origin}-untrained")
    assert all((here[name] != untrained[name.removeprefix(f"{origin} ")]).any() for name in names)
