"""The whole service with a real SavedModel: what comes back is voxel for voxel what lvseg.predict gives."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bad_files import volume
from serving_fixtures import children, command_of, is_alive, until

from lvseg.formats import read_volume, write_volume
from lvseg.predict import Segmenter
from serving.connection import Client, ClientError
from serving.keys import Credentials, read_credentials

ROOT = Path(__file__).parents[1]
START_S = 120.0
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with a network of one layer, which marks intensities above zero."""
    import keras

    from lvseg.export import export_model

    stacks = keras.Input((32, 32, 3), name="stacks")
    seeds = keras.Input((2,), dtype="int64", name="seeds")
    layer = keras.layers.Conv2D(2, 1, activation="softmax")
    network = keras.Model([stacks, seeds], layer(stacks))
    kernel = np.zeros((1, 1, 3, 2), np.float32)
    kernel[0, 0, 1, 1] = 0.01  # of the slice in the middle
    layer.set_weights([kernel, np.zeros(2, np.float32)])
    card = {
        "task": "volume",
        "labels": ["background", "liver"],
        "spacing_mm": [2.0, 2.0],
        "size": 32,
        "neighbours": 1,
        "axis": "transversal",
        "batch_size": 4,
        "normalisation": "none",
        "clip_percentiles": None,
        "global_bounds": None,
    }
    folder = tmp_path_factory.mktemp("models")
    export_model(network, card, folder / "volume" / "1")
    return folder


def arguments_of(models: Path, folder: Path) -> list[str]:
    """A server's, which meets no other one."""
    arguments = ["--cfg", "serving/server.yaml", "--models", str(models), "--bind", "tcp://127.0.0.1:*"]
    own = ["--spool", str(folder / "spool"), "--access", str(folder / "access"), "--http", "127.0.0.1:0"]
    return arguments + own


@pytest.fixture(scope="module")
def endpoint(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Credentials]]:
    """Address of a server of these models, and keys for it."""
    with serving_models(models, tmp_path_factory.mktemp("server")) as address:
        yield address


@contextlib.contextmanager
def serving_models(models: Path, folder: Path) -> Iterator[tuple[str, Credentials]]:
    """Address of a server as its command starts it, and the keys that it made for clients on this computer."""
    process = subprocess.Popen(
        [sys.executable, "-m", "serving.server", *arguments_of(models, folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], START_S)[0], "not ready"
        line = process.stdout.readline().split()
        assert (line[0], line[2:]) == ("ready", [f"{path.name}/1" for path in sorted(models.iterdir())])
        workers = children(process.pid)
        assert len(workers) == 3
        yield line[1], read_credentials(folder / "access" / "local.json")
        process.terminate()
        assert process.wait(LIMIT_S) == 0
        assert not any(is_alive(worker) for worker in workers)
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def test_the_served_mask_is_that_of_predict_voxel_for_voxel(
    models: Path, endpoint: tuple[str, Credentials], tmp_path: Path
) -> None:
    segmenter = Segmenter(models / "volume")
    for seed, shape in enumerate([(5, 30, 34), (9, 40, 20)]):
        scan = write_volume(volume(shape, seed), tmp_path / f"{seed}.nii.gz")[0]
        expected = segmenter.segment(read_volume(scan))
        with Client(*endpoint) as client:
            (path,), measurements = client.segment(scan, "volume", tmp_path / f"{seed}_mask.nii.gz", LIMIT_S)
        served = read_volume(path)
        assert 0 < expected.mask.voxels.sum() < expected.mask.voxels.size
        np.testing.assert_array_equal(served.voxels, expected.mask.voxels)
        np.testing.assert_allclose(served.affine, expected.mask.affine, atol=1e-5)
        geometry = measurements["geometry"]
        assert geometry.pop("proof") == "same voxels, same places"
        assert geometry.pop("furthest_mm") < 1e-3
        seconds = measurements.pop("seconds")
        stages = {"receive", "queue", "unpack", "read", "segment", "write"}
        assert set(seconds) == stages | {"prepare", "infer", "restore"}
        assert sum(seconds[part] for part in ("prepare", "infer", "restore")) <= seconds["segment"] + 1e-3
        assert all(second >= 0 for second in seconds.values())
        assert measurements == json.loads(json.dumps(expected.measurements))


def test_a_bad_scan_costs_the_next_one_nothing(endpoint: tuple[str, Credentials], tmp_path: Path) -> None:
    bad = tmp_path / "flat.nii.gz"
    flat = volume((5, 30, 34))
    flat.voxels[:] = 7
    write_volume(flat, bad)
    good = write_volume(volume((5, 30, 34)), tmp_path / "good.nii.gz")[0]
    with Client(*endpoint) as client:
        with pytest.raises(ClientError, match=r"everywhere in flat\.nii\.gz\.") as refused:
            client.segment(bad, "volume", tmp_path / "out.vtk", LIMIT_S)
        assert refused.value.code == "EMPTY_IMAGE"
        client.segment(good, "volume", tmp_path / "out.vtk", LIMIT_S)


def test_a_scan_without_the_organ_has_an_empty_mask_that_says_so(
    endpoint: tuple[str, Credentials], tmp_path: Path
) -> None:
    scan = volume((5, 30, 34))
    scan.voxels[:] = -1 - np.abs(scan.voxels)
    write_volume(scan, tmp_path / "none.nii.gz")
    with Client(*endpoint) as client:
        (path,), measurements = client.segment(tmp_path / "none.nii.gz", "volume", tmp_path / "mask.vtk", LIMIT_S)
    assert not read_volume(path).voxels.any()
    assert measurements["volume_ml"] == {"liver": 0.0}
    assert "liver: empty" in measurements["flags"]


@pytest.mark.skipif("LVSEG_REAL_DATA" not in os.environ, reason="needs LVSEG_REAL_DATA")
def test_a_real_dicom_series_comes_back_on_its_own_grid(
    models: Path, endpoint: tuple[str, Credentials], tmp_path: Path
) -> None:
    series = Path(os.environ["LVSEG_REAL_DATA"]) / "ct_dicom_series"
    expected = Segmenter(models / "volume").segment(read_volume(series))
    with Client(*endpoint) as client:
        for output in ("nii.gz", "vtk"):
            paths, _ = client.segment(series, "volume", tmp_path / f"mask.{output}", LIMIT_S)
            served, own = read_volume(paths[0]).canonical(), expected.mask.canonical()
            np.testing.assert_array_equal(served.voxels, own.voxels)
            np.testing.assert_allclose(served.affine, own.affine, atol=1e-3)


@pytest.mark.parametrize("damaged", ["saved_model.pb", "variables/variables.data-00000-of-00001"])
def test_a_damaged_model_ends_the_server_with_two_and_a_sentence(models: Path, tmp_path: Path, damaged: str) -> None:
    import shutil

    shutil.copytree(models, tmp_path / "models")
    path = tmp_path / "models" / "volume" / "1" / damaged
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = subprocess.run(
        [sys.executable, "-m", "serving.server", *arguments_of(tmp_path / "models", tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert done.returncode == 2, done.stderr
    assert "Expected a model that" in done.stderr
    assert done.stderr.strip().endswith(".")
    assert done.stdout == ""


def test_a_stopped_worker_is_not_waited_for_at_the_end(models: Path, tmp_path: Path) -> None:
    """A signal while the worker still loads TensorFlow, which hears none: the server ends all the same."""
    process = subprocess.Popen([sys.executable, "-m", "serving.server", *arguments_of(models, tmp_path)], cwd=ROOT)
    try:

        def started() -> list[int]:
            pids = children(process.pid)  # a child that is no worker yet is still part of starting it
            return [pid for pid in pids if "--kind\0segment\0" in command_of(pid)]

        (worker,) = until(started, "the worker starts", LIMIT_S)
        os.kill(worker, signal.SIGSTOP)
        process.terminate()
        assert process.wait(LIMIT_S) == 0
        assert not is_alive(worker)
    finally:
        process.kill()
        process.wait()
