"""The exported model and what predict does with it: one answer whatever the way, on the grid that came in."""

import errno
import http.server
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dicom_files
import nibabel
import numpy as np
import pytest
import tensorflow as tf
from bad_files import bad_scans
from scipy import ndimage
from small_study import ROOT, command, scan

from lvseg import export, metrics, pipeline, predict, preprocess, records, waterfat
from lvseg.errors import InputError
from lvseg.export import export_model, publish, weights_sha256, write_version
from lvseg.formats import read_volume, write_volume
from lvseg.models.unet import unet
from lvseg.postprocess import postprocess
from lvseg.predict import Segmenter, newest_version
from lvseg.volume import Volume


def card(**changes):
    return {
        "task": "volume", "labels": ["background", "organ"], "axis": "transversal", "spacing_mm": [4.0, 3.0],
        "size": 32,
        "neighbours": 1, "normalisation": "patient", "clip_percentiles": None, "global_bounds": None, "batch_size": 4,
        **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return unet(32, 3, 2, 2, input_offset=0.2, input_scale=2.0, seed=1)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "volume" / "1"
    export_model(model, card(), folder)
    return folder


@pytest.fixture(scope="module")
def signatures(exported):
    loaded = tf.saved_model.load(str(exported))
    yield loaded.signatures
    del loaded  # the signatures die with it


VOXELS = np.random.default_rng(0).normal(100, 40, (11, 37, 45)).astype(np.float32)
SPACING_MM = tf.constant([5.0, 2.5, 2.0])


def test_signatures_keep_their_contract(exported, signatures):
    assert set(signatures) >= {"prepare", "infer", "restore", "segment", "serving_default"}
    slices = signatures["prepare"](voxels=tf.constant(VOXELS), spacing_mm=SPACING_MM)["slices"]
    assert slices.shape == (11, 32, 32) and slices.dtype == tf.float32
    stacks = preprocess.stack_neighbours(slices, 1)
    probabilities = signatures["infer"](stacks=stacks)["probabilities"]
    assert probabilities.shape == (11, 32, 32, 2) and probabilities.dtype == tf.float32
    labels = signatures["restore"](probabilities=probabilities, shape=tf.constant(VOXELS.shape), spacing_mm=SPACING_MM)[
        "labels"
    ]
    assert labels.shape == VOXELS.shape and labels.dtype == tf.uint8
    written = json.loads((exported / "model.json").read_text())
    assert written["weights_sha256"] == weights_sha256(exported) and written["batch_size"] == 4


def test_prepare_is_harmonise_and_normalise(signatures):
    slices = signatures["prepare"](voxels=tf.constant(VOXELS), spacing_mm=SPACING_MM)["slices"].numpy()
    harmonised = preprocess.harmonise(
        tf.constant(VOXELS), SPACING_MM, (4.0, 3.0), 32, tf.constant(VOXELS.min())
    ).numpy()
    np.testing.assert_allclose(slices, (harmonised - VOXELS.min()) / np.ptp(VOXELS), atol=1e-5)


def test_infer_is_the_network(signatures, model):
    stacks = np.random.default_rng(1).uniform(size=(4, 32, 32, 3)).astype(np.float32)
    np.testing.assert_allclose(
        signatures["infer"](stacks=tf.constant(stacks))["probabilities"],
        model([stacks, np.zeros((4, 2), np.int64)]),
        atol=1e-5,
    )


@pytest.mark.parametrize("slices", [1, 3, 4, 5, 11])
def test_segment_in_one_call_is_the_three_one_after_another(signatures, slices):
    voxels = tf.constant(VOXELS[:slices])
    prepared = signatures["prepare"](voxels=voxels, spacing_mm=SPACING_MM)["slices"]
    probabilities = signatures["infer"](stacks=preprocess.stack_neighbours(prepared, 1))["probabilities"]
    parts = signatures["restore"](probabilities=probabilities, shape=tf.shape(voxels), spacing_mm=SPACING_MM)[
        "labels"
    ].numpy()
    for name in ("segment", "serving_default"):
        whole = signatures[name](voxels=voxels, spacing_mm=SPACING_MM)["labels"].numpy()
        assert whole.shape == parts.shape
        assert np.mean(whole != parts) < 1e-3  # other batches round differently where two classes are even
    assert 0 < parts.mean() < 1


def test_saved_model_cli_finds_what_tensorflow_serving_asks_for_and_gets_the_same_labels(
    exported, signatures, tmp_path
):
    """TensorFlow Serving takes models/<name>/<version>/ with a signature serving_default whose method is predict."""
    assert exported.name.isdigit() and (exported / "saved_model.pb").is_file()
    tool = [sys.executable, "-m", "tensorflow.python.tools.saved_model_cli"]
    which = ["--dir", exported, "--tag_set", "serve", "--signature_def", "serving_default"]
    shown = subprocess.run([*tool, "show", *which], capture_output=True, text=True, check=True).stdout
    assert "Method name is: tensorflow/serving/predict" in shown
    found = re.findall(r"(inputs|outputs)\['(\w+)'\].*\n\s+dtype: (\w+)\n\s+shape: (\(.*\))", shown)
    assert set(found) == {
        ("inputs", "voxels", "DT_FLOAT", "(-1, -1, -1)"),
        ("inputs", "spacing_mm", "DT_FLOAT", "(3)"),
        ("outputs", "labels", "DT_UINT8", "(-1, -1, -1)"),
    }
    np.save(tmp_path / "voxels.npy", VOXELS)
    np.save(tmp_path / "spacing_mm.npy", SPACING_MM.numpy())
    inputs = ";".join(f"{name}={tmp_path / name}.npy" for name in ("voxels", "spacing_mm"))
    subprocess.run(
        [*tool, "run", *which, "--inputs", inputs, "--outdir", tmp_path / "out"], capture_output=True, check=True
    )
    answer = signatures["serving_default"](voxels=tf.constant(VOXELS), spacing_mm=SPACING_MM)["labels"].numpy()
    np.testing.assert_array_equal(np.load(tmp_path / "out/labels.npy"), answer)


class AsTensorFlowServing(http.server.BaseHTTPRequestHandler):
    """Answers POST /v1/models/volume:predict in the columnar format of TensorFlow Serving's REST API."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (self.path, body["signature_name"]) == ("/v1/models/volume:predict", "serving_default")
        inputs = {name: tf.constant(value, tf.float32) for name, value in body["inputs"].items()}
        labels = self.server.signature(**inputs)["labels"].numpy()
        answer = json.dumps({"outputs": labels.tolist()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("number", [0, 1])
def test_the_examples_without_the_server_give_the_mask_of_predict(exported, signatures, tmp_path, number):
    """Those of docs/serving.md, as they stand there, of a scan with padding and a model that wants its masks mended."""
    folder = tmp_path / "models/volume/1"
    shutil.copytree(exported, folder)
    facts = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**facts, "postprocessing": ["largest_component"]}))
    affine = np.array([[0, 0, 2.0, 0], [0, -2.5, 0, 0], [5.0, 0, 0, 0], [0, 0, 0, 1]])
    voxels = VOXELS.copy()
    voxels[:, :8, :8] = -2000
    write_volume(Volume(voxels, affine), tmp_path / "scan.nii.gz")
    example = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.DOTALL)[number]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), AsTensorFlowServing) as server:
        server.signature = signatures["serving_default"]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        example = example.replace("localhost:8501", f"127.0.0.1:{server.server_port}")
        subprocess.run(
            [sys.executable, "-c", example], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        server.shutdown()
    mask = Segmenter(folder).segment(read_volume(tmp_path / "scan.nii.gz")).mask.canonical()
    written = read_volume(tmp_path / "liver.vtk").canonical()
    assert np.mean(written.voxels != mask.voxels) < 1e-3 and 0 < written.voxels.mean() < 1
    np.testing.assert_allclose(written.affine, mask.affine, atol=1e-4)


def test_the_segmenter_gives_what_the_signatures_give(exported, signatures):
    affine = np.array([[0, 0, 2.0, 0], [0, 2.5, 0, 0], [5.0, 0, 0, 0], [0, 0, 0, 1]])
    answer = Segmenter(exported).segment(Volume(VOXELS, affine))
    whole = signatures["segment"](voxels=tf.constant(VOXELS), spacing_mm=SPACING_MM)["labels"].numpy()
    assert np.mean(answer.mask.voxels != whole) < 1e-3
    assert answer.measurements["voxels"]["organ"] == np.count_nonzero(answer.mask.voxels)
    assert answer.measurements["volume_ml"]["organ"] == pytest.approx(answer.measurements["voxels"]["organ"] * 0.025)


def test_progress_tells_every_slice_once(exported):
    affine = np.diag([1.0, 1, 1, 1])[[2, 1, 0, 3]]
    told = []
    Segmenter(exported).segment(Volume(VOXELS, affine), lambda done, total: told.append((done, total)))
    assert told == [(4, 11), (8, 11), (11, 11)]


def orientations():
    """The 48 ways to store one scan: every order of the axes, every direction of each."""
    return list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))


def test_each_of_the_48_orientations_of_one_scan_gets_the_same_mask_in_its_own(trained, tmp_path):
    image, truth = scan("a", 1)
    path = write_volume(image, tmp_path / "image.nii.gz")[0]
    nifti = nibabel.load(path)
    segmenter = Segmenter(trained / "model")
    expected = segmenter.segment(read_volume(path)).mask
    assert metrics.dice(expected.voxels, truth.voxels) > 0.8
    write_volume(expected, tmp_path / "mask.nii.gz")
    reference = nibabel.load(tmp_path / "mask.nii.gz")
    for number, (order, signs) in enumerate(orientations()):
        orientation = np.array(list(zip(order, signs, strict=True)), dtype=float)
        turned = nifti.as_reoriented(orientation)
        source, target = tmp_path / f"{number}.nii.gz", tmp_path / f"{number}-mask.nii.gz"
        nibabel.save(turned, source)
        write_volume(segmenter.segment(read_volume(source)).mask, target)
        answer = nibabel.load(target)
        np.testing.assert_array_equal(answer.affine, turned.affine)
        np.testing.assert_array_equal(
            np.asarray(answer.dataobj), np.asarray(reference.as_reoriented(orientation).dataobj)
        )


@pytest.mark.parametrize("axis", ["coronal", "sagittal"])
def test_a_model_of_another_axis_answers_on_the_scans_own_grid(model, tmp_path, axis):
    export_model(model, card(axis=axis), tmp_path / "1")
    affine = np.array([[0, 0, 2.0, 0], [0, 2.5, 0, 0], [5.0, 0, 0, 0], [0, 0, 0, 1]])
    answer = Segmenter(tmp_path).segment(Volume(VOXELS, affine)).mask
    order = preprocess.AXIS_PERMUTATIONS[axis]
    turned = np.ascontiguousarray(VOXELS.transpose(order))
    spacing_mm = tf.constant(np.array([5.0, 2.5, 2.0], np.float32)[list(order)])
    labels = tf.saved_model.load(str(tmp_path / "1")).signatures["segment"]
    expected = labels(voxels=tf.constant(turned), spacing_mm=spacing_mm)["labels"].numpy()
    assert np.mean(answer.voxels.transpose(order) != expected) < 1e-3


@pytest.mark.parametrize(("normalisation", "clip"), [("none", [1.0, 99.0]), ("slice", None), ("global", [1.0, 99.0])])
def test_every_normalisation_travels_inside_the_model(model, tmp_path, normalisation, clip):
    bounds = [0.0, 200.0] if normalisation == "global" else None
    export_model(model, card(normalisation=normalisation, clip_percentiles=clip, global_bounds=bounds), tmp_path / "1")
    prepare = tf.saved_model.load(str(tmp_path / "1")).signatures["prepare"]
    slices = prepare(voxels=tf.constant(VOXELS), spacing_mm=SPACING_MM)["slices"].numpy()
    if normalisation == "none":
        low, high = np.percentile(VOXELS, clip)
        assert slices.min() == pytest.approx(low, rel=1e-3) and slices.max() == pytest.approx(high, rel=1e-3)
    else:
        assert slices.min() >= 0 and slices.max() <= 1 and slices.std() > 0.05


@pytest.mark.parametrize("clip", [None, [1.0, 95.0]])
@pytest.mark.parametrize("normalisation", ["none", "slice", "patient", "global"])
def test_training_sees_what_serving_sees(model, tmp_path, normalisation, clip):
    """The pipeline's stacks of a shard are those of the exported `prepare`, padding and bright minimum included."""
    voxels = VOXELS + np.float32(300) + 20 * np.arange(11, dtype=np.float32)[:, None, None]
    bounds = [250.0, 480.0] if normalisation == "global" else None
    export_model(model, card(normalisation=normalisation, clip_percentiles=clip, global_bounds=bounds), tmp_path / "1")
    prepare = tf.saved_model.load(str(tmp_path / "1")).signatures["prepare"]
    served = preprocess.stack_neighbours(prepare(voxels=tf.constant(voxels), spacing_mm=SPACING_MM)["slices"], 1)

    statistics = preprocess.statistics(tf.constant(voxels))
    image = preprocess.harmonise(tf.constant(voxels), SPACING_MM, (4.0, 3.0), 32, statistics.minimum).numpy()
    shard = records.Harmonised("p", "1", "s", "d", (), "", voxels.shape, (5.0, 2.5, 2.0), statistics, image,
                               np.zeros(image.shape, np.uint8), None)  # fmt: skip
    records.write_shard(shard, tmp_path / "one.tfrecord")
    reading = pipeline.Reading(32, 1, normalisation, clip, bounds)
    (samples,) = pipeline.volume_samples([tmp_path / "one.tfrecord"], reading)
    trained_on = pipeline.intensities(samples, normalisation)
    np.testing.assert_allclose(trained_on, served, atol=1e-4 * np.ptp(served))


AFFINE = np.array([[0, 0, 3.0, 0], [0, 4.0, 0, 0], [5.0, 0, 0, 0], [0, 0, 0, 1]])


def test_a_ct_is_seen_through_the_models_window_and_nothing_else_is(model, tmp_path):
    export_model(model, card(ct_window_hu=[-160, 240]), tmp_path / "1")
    segmenter = Segmenter(tmp_path / "1")
    hu = np.random.default_rng(3).uniform(-1000, 1500, (5, 32, 40)).astype(np.float32)

    def seen(voxels, told, **metadata):
        answer = segmenter.segment(Volume(voxels, AFFINE, metadata=metadata), modality=told, keep=True)
        return answer.slices, answer.measurements["flags"]

    windowed, _ = seen(np.clip(hu, -160, 240), "MR")
    assert np.array_equal(seen(hu, "CT")[0], windowed)
    assert np.array_equal(seen(hu, None, modality="CT")[0], windowed)  # DICOM says so itself
    plain, flags = seen(hu, None)
    assert not np.array_equal(plain, windowed) and any("Hounsfield" in flag for flag in flags)
    assert not any("Hounsfield" in flag for flag in seen(hu, "CT")[1] + seen(np.abs(hu), None)[1])
    assert any("may not be Hounsfield" in flag for flag in seen(np.abs(hu), "CT")[1])  # an MR, or a CT with an offset
    assert any("of modality PT" in flag for flag in seen(np.abs(hu), None, modality="PT")[1])
    assert not any(
        "of modality" in flag for told in ("MR", "CT", "", None) for flag in seen(np.abs(hu), None, modality=told)[1]
    )
    with pytest.raises(InputError, match="CT window"):
        seen(np.where(hu > 0, -900.0, -1000.0).astype(np.float32), "CT")
    export_model(model, card(), tmp_path / "2")  # a model without a window sees all of a CT
    other = Segmenter(tmp_path / "2").segment(Volume(hu, AFFINE), modality="CT", keep=True)
    assert np.array_equal(other.slices, plain)


def test_padding_is_no_tissue_and_is_told(model, tmp_path):
    export_model(model, card(normalisation="patient", clip_percentiles=[0.5, 99.5]), tmp_path / "1")
    segmenter = Segmenter(tmp_path / "1")
    voxels = np.random.default_rng(3).uniform(10, 900, (5, 32, 40)).astype(np.float32)
    padded, plain = voxels.copy(), voxels.copy()
    padded[:, :6], plain[:, :6] = -32768, voxels[:, 6:].min()
    ours, theirs = (segmenter.segment(Volume(own, AFFINE), keep=True) for own in (padded, plain))
    np.testing.assert_array_equal(ours.slices, theirs.slices)
    assert [flag for flag in ours.measurements["flags"] if "-32768" in flag and "padding" in flag]
    assert not any("padding" in flag or "Hounsfield" in flag for flag in theirs.measurements["flags"])
    assert not any("Hounsfield" in flag for flag in ours.measurements["flags"])


def test_unknown_normalisation_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="z_score"):
        export_model(model, card(normalisation="z_score"), tmp_path / "1")


@pytest.mark.parametrize(
    ("metadata", "word"),
    [
        ({"slice_distance_source": "SliceThickness"}, "SliceThickness"),
        ({"directions": "assumed LPS identity"}, "assumed"),
        ({"slice_warnings": ["slices lie 12 mm apart"]}, "12 mm apart"),
    ],
)
def test_geometry_that_was_not_read_but_assumed_is_flagged(exported, metadata, word):
    affine = np.array([[0, 0, 2.0, 0], [0, 2.5, 0, 0], [5.0, 0, 0, 0], [0, 0, 0, 1]])
    flags = Segmenter(exported).segment(Volume(VOXELS, affine, metadata=metadata)).measurements["flags"]
    assert any(word in flag for flag in flags)
    assert not any(word in flag for flag in Segmenter(exported).segment(Volume(VOXELS, affine)).measurements["flags"])


def test_what_the_crop_cuts_off_is_background_and_said(exported):
    wide = np.full((4, 60, 60), 10, np.int16)
    wide[:, :, 2:58] = 100  # 5 mm pixels: 280 mm of tissue, the network sees 128 x 96 mm
    affine = np.array([[0, 0, 5.0, 0], [0, 5.0, 0, 0], [5.0, 0, 0, 0], [0, 0, 0, 1]])
    answer = Segmenter(exported).segment(Volume(wide, affine))
    assert any("field of view" in flag for flag in answer.measurements["flags"])
    narrow = np.full((4, 60, 60), 10, np.int16)
    narrow[:, 24:36, 24:36] = 100
    answer = Segmenter(exported).segment(Volume(narrow, affine))
    assert not any("field of view" in flag for flag in answer.measurements["flags"])


@pytest.mark.parametrize(
    ("voxels", "code"),
    [
        (np.full((3, 8, 8), 7), "EMPTY_IMAGE"),
        (np.array([[[1.0, np.nan]]]), "NONFINITE_VOXELS"),
        (np.array([[[1.0, 1e39]]]), "NONFINITE_VOXELS"),
    ],
)
def test_scans_without_an_image_are_refused(exported, voxels, code):
    with pytest.raises(InputError) as error:
        Segmenter(exported).segment(Volume(voxels, np.eye(4)[[2, 1, 0, 3]], "scan.nii"))
    assert error.value.code == code and "scan.nii" in error.value.sentence


def test_a_model_folder_means_its_newest_version(exported, tmp_path):
    for version in ("2", "10", "notes"):
        shutil.copytree(exported, tmp_path / version)
    assert newest_version(tmp_path) == tmp_path / "10"
    assert newest_version(tmp_path / "2") == tmp_path / "2"
    assert Segmenter(tmp_path).info["version"] == 10


def test_export_takes_the_next_version(exported, tmp_path):
    run, out = tmp_path / "run", tmp_path / "models"
    shutil.copytree(exported, run / "model")
    assert [publish([run / "model"], out).name for _ in range(3)] == ["1", "2", "3"]
    assert weights_sha256(out / "3") == weights_sha256(exported)
    with pytest.raises(InputError, match="no-run"):
        publish([tmp_path / "no-run/model"], out)


@pytest.mark.parametrize("place", ["1", "1/new"])
def test_no_version_is_written_into_a_model(exported, tmp_path, capsys, place):
    run, out = tmp_path / "run", tmp_path / "models"
    shutil.copytree(exported, run / "model")
    shutil.copytree(exported, out / "1")
    before = sorted(out.rglob("*"))
    assert export.main(["--run", str(run), "--out", str(out / place)]) == 2
    error = capsys.readouterr().err
    assert f"such as {out}, received {out / place}" in error and "lvseg.export: Expected" in error
    assert sorted(out.rglob("*")) == before  # the server would not know the model again


@pytest.mark.parametrize("options", [[], ["--foreground-odds", "2"]])
def test_a_disk_that_gets_full_under_an_export_is_one_sentence(exported, tmp_path, monkeypatch, capsys, options):
    run, out = tmp_path / "run", tmp_path / "models"
    shutil.copytree(exported, run / "model")
    text = "No space left on device"

    def full(_, folder, *__):  # as TensorFlow and shutil say it
        (Path(folder) / "variables").mkdir(parents=True)
        if options:
            raise tf.errors.ResourceExhaustedError(None, None, f"{folder}/variables; {text}")
        raise shutil.Error([(f"{number}", folder, f"[Errno 28] {text}: '{number}'") for number in range(9)])

    monkeypatch.setattr(tf.saved_model, "save", full)
    monkeypatch.setattr(shutil, "copytree", full)
    assert export.main(["--run", str(run), "--out", str(out), *options]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("lvseg.export: Expected to") and line.count(text) == 1
    assert not list(out.iterdir())


def test_two_that_export_at_once_write_a_version_each(tmp_path):
    meet = threading.Barrier(3)

    def one(number: int) -> Path:
        def write(temporary: Path) -> None:
            temporary.mkdir()
            (temporary / "whose").write_text(str(number))
            meet.wait(60)  # all are written before any gets its number

        return write_version(tmp_path / "models", write)

    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(one, range(3)))
    assert sorted(folder.name for folder in folders) == ["1", "2", "3"]
    assert [(folder / "whose").read_text() for folder in folders] == ["0", "1", "2"]
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["1", "2", "3"]


def test_a_number_that_was_taken_meanwhile_is_left_alone(tmp_path):
    def write(temporary: Path) -> None:
        temporary.mkdir()
        (temporary / "new").touch()

    def late(path: Path) -> list[Path]:
        looks.append(found := list(there(path)))
        (tmp_path / "1").mkdir(exist_ok=True)  # by another process, after the look
        (tmp_path / "1/old").touch()
        return found

    there, looks = Path.iterdir, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda path: iter(late(path)))
        assert write_version(tmp_path, write) == tmp_path / "2"
    assert [len(look) for look in looks] == [1, 2]  # what is being written, and then version 1
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["old"]


def test_an_ensemble_answers_with_the_mean_of_its_members(exported, tmp_path):
    export_model(unet(32, 3, 2, 2, seed=2), card(name="other"), tmp_path / "other/model")
    shutil.copytree(exported, tmp_path / "one/model")
    done = command(
        tmp_path, "lvseg.export", "--run", "one", "other", "--out", "models", "--postprocessing", "fill_holes"
    )
    assert done.returncode == 0, done.stderr
    members = [Segmenter(tmp_path / name / "model") for name in ("one", "other")]
    ensemble = Segmenter(tmp_path / "models")
    stacks = tf.random.stateless_uniform([4, 32, 32, 3], [1, 2])
    answers = [each.infer(stacks=stacks)["probabilities"].numpy() for each in (*members, ensemble)]
    assert np.abs(answers[0] - answers[1]).max() > 0.01
    np.testing.assert_allclose(answers[2], (answers[0] + answers[1]) / 2, atol=1e-6)
    assert [each["weights_sha256"] for each in ensemble.info["members"]] == [
        each.info["weights_sha256"] for each in members
    ]
    assert ensemble.info["weights_sha256"] == weights_sha256(tmp_path / "models/1")
    assert ensemble.info["postprocessing"] == ["fill_holes"]
    # One call of the whole scan answers as the batches do.
    image = scan("a", 1)[0]
    labels = ensemble.loaded.signatures["segment"](
        voxels=tf.constant(image.canonical().voxels.astype(np.float32)), spacing_mm=tf.constant(image.spacing_mm)
    )["labels"].numpy()
    np.testing.assert_array_equal(labels, ensemble.segment(image, postprocessing=[]).mask.canonical().voxels)


def test_an_ensemble_of_models_that_see_scans_unlike_is_refused(exported, tmp_path):
    export_model(unet(32, 3, 2, 2, seed=2), card(normalisation="slice"), tmp_path / "other/model")
    shutil.copytree(exported, tmp_path / "one/model")
    with pytest.raises(InputError, match="Expected models of one normalisation, received patient"):
        publish([tmp_path / "one/model", tmp_path / "other/model"], tmp_path / "models")
    with pytest.raises(InputError, match="Expected models of other weights each"):
        publish([tmp_path / "one/model"] * 2, tmp_path / "models")
    assert not list((tmp_path / "models").glob("*"))


@pytest.mark.parametrize("classes", [2, 3])
def test_odds_of_the_classes_are_multiplied_and_stay_so_in_later_versions(tmp_path, classes):
    labels = ["background", "organ", "vessel"][:classes]
    network = unet(32, 3, classes, 2, residual=True, norm="instance", seed=2)
    export_model(network, card(labels=labels, measured={"validation_dice": 0.5}), tmp_path / "one/model")
    done = command(tmp_path, "lvseg.export", "--run", "one", "--out", "models", "--foreground-odds", "4")
    assert done.returncode == 0, done.stderr
    publish([tmp_path / "models/1"], tmp_path / "models", foreground_odds=0.5)
    stacks = tf.random.stateless_uniform([4, 32, 32, 3], [1, 2])
    own, fourfold, twofold = (
        Segmenter(tmp_path / name).infer(stacks=stacks)["probabilities"].numpy()
        for name in ("one/model", "models/1", "models/2")
    )
    for changed, odds in ((fourfold, 4.0), (twofold, 2.0)):
        expected = own * np.array([1.0, odds, odds])[:classes]
        np.testing.assert_allclose(changed, expected / expected.sum(axis=-1, keepdims=True), rtol=1e-4, atol=1e-6)
    cards = [Segmenter(tmp_path / name).info for name in ("one/model", "models/1", "models/2")]
    corrected = [each.get("provenance", {}).get("corrected", []) for each in cards]
    assert [[step["foreground_odds"] for step in steps] for steps in corrected] == [[], [4.0], [4.0, 0.5]]
    assert [step["from"]["weights_sha256"] for step in corrected[2]] == [each["weights_sha256"] for each in cards[:2]]
    assert corrected[1][0]["from"]["measured"] == {"validation_dice": 0.5} and "measured" not in cards[1]
    assert len({each["weights_sha256"] for each in cards}) == 3
    assert cards[2]["weights_sha256"] == weights_sha256(tmp_path / "models/2")
    # Smaller and larger masks, in one call of the whole scan as well.
    image = scan("a", 1)[0]
    voxels = {
        name: tf.saved_model.load(str(tmp_path / name))
        .signatures["segment"](
            voxels=tf.constant(image.canonical().voxels.astype(np.float32)), spacing_mm=tf.constant(image.spacing_mm)
        )["labels"]
        .numpy()
        for name in ("one/model", "models/1")
    }
    assert np.count_nonzero(voxels["models/1"]) > np.count_nonzero(voxels["one/model"])


@pytest.mark.parametrize("odds", [0.0, -1.0, 1e4, float("inf"), float("nan")])
def test_odds_out_of_range_are_refused(exported, tmp_path, odds):
    with pytest.raises(InputError, match=r"Expected --foreground-odds from 0.001 to 1000, received"):
        publish([exported], tmp_path / "models", foreground_odds=odds)
    assert not list(tmp_path.glob("models/*"))


def test_a_network_that_ends_in_something_else_is_refused_for_odds(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "one")
    info = json.loads((tmp_path / "one/model.json").read_text()) | {"labels": ["background", "a", "b", "c"]}
    (tmp_path / "one/model.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match="Expected a network that ends in 4 biases, received"):
        publish([tmp_path / "one"], tmp_path / "models", foreground_odds=2.0)
    assert not list(tmp_path.glob("models/*"))


def test_odds_of_an_ensemble_are_refused(exported, tmp_path):
    export_model(unet(32, 3, 2, 2, seed=2), card(), tmp_path / "other/model")
    shutil.copytree(exported, tmp_path / "one/model")
    models = [tmp_path / "one/model", tmp_path / "other/model"]
    with pytest.raises(InputError, match="with one run, received 2"):
        publish(models, tmp_path / "models", foreground_odds=2.0)
    with pytest.raises(InputError, match="received an ensemble"):
        publish([publish(models, tmp_path / "models")], tmp_path / "models", foreground_odds=2.0)
    assert not (tmp_path / "models/2").exists()


def test_postprocessing_is_what_the_card_or_the_caller_asks_for(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "run/model")
    segmenter = Segmenter(publish([tmp_path / "run/model"], tmp_path / "models", ["largest_component"]))
    image = scan("a", 1)[0]
    plain = segmenter.segment(image, postprocessing=[]).mask.canonical().voxels
    assert ndimage.label(plain)[1] > 1  # of a network that learnt nothing
    cleaned = segmenter.segment(image).mask.canonical().voxels
    np.testing.assert_array_equal(cleaned, postprocess(plain, ["largest_component"]))
    assert ndimage.label(cleaned)[1] == 1


def test_what_the_network_saw_and_answered_is_kept_on_request(exported):
    segmenter = Segmenter(exported)
    image = scan("a", 1)[0]
    answer = segmenter.segment(image, keep=True)
    assert answer.slices.shape == answer.foreground.shape == (image.shape[0], 32, 32)
    np.testing.assert_allclose(segmenter.foreground(answer.slices), answer.foreground, atol=1e-6)
    assert segmenter.segment(image).slices is None


def test_damaged_models_are_refused_by_name(exported, tmp_path):
    def damage(name):
        folder = tmp_path / name
        shutil.copytree(exported, folder)
        return folder

    (damage("no-card") / "model.json").unlink()
    (damage("bad-graph") / "saved_model.pb").write_bytes(b"nonsense")
    other = next((damage("other-weights") / "variables").glob("*.data*"))
    other.write_bytes(other.read_bytes()[:-4] + bytes(4))
    next((damage("no-weights") / "variables").glob("*.data*")).unlink()
    data = next((damage("cut-weights") / "variables").glob("*.data*"))
    data.write_bytes(data.read_bytes()[:100])
    for name, text in (("empty-card", "{}"), ("list-card", "[]"), ("text-card", "no json")):
        (damage(name) / "model.json").write_text(text)
    (tmp_path / "no-version" / "²").mkdir(parents=True)
    damaged = (
        "no-card",
        "bad-graph",
        "no-weights",
        "cut-weights",
        "empty-card",
        "list-card",
        "text-card",
        "other-weights",
    )
    for name in (*damaged, "no-version", "missing"):
        with pytest.raises(InputError, match=name) as error:
            Segmenter(tmp_path / name)
        assert error.value.code == "MODEL_UNAVAILABLE"


def test_the_command_writes_masks_and_measurements(exported, tmp_path):
    scans = []
    for number in range(2):
        scans += write_volume(scan("b", number)[0], tmp_path / f"scan{number}.nii.gz")
    done = command(
        tmp_path, "lvseg.predict", "--model", exported, *scans, "-o", "out", "--format", "nii.gz", "--json", "m.json"
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "m.json").read_text())
    for number, (path, result) in enumerate(zip(scans, told, strict=True)):
        mask = read_volume(tmp_path / "out" / f"scan{number}.nii.gz")
        np.testing.assert_array_equal(mask.affine, read_volume(path).affine)
        assert result["voxels"]["organ"] == np.count_nonzero(mask.voxels) and "volume_ml" in result


def test_one_bad_scan_of_several_costs_that_scan_alone(exported, tmp_path):
    good = write_volume(scan("a", 0)[0], tmp_path / "good.nii.gz")[0]
    (tmp_path / "bad.nii.gz").write_text("no scan")
    done = command(
        tmp_path, "lvseg.predict", "--model", exported, tmp_path / "bad.nii.gz", good, "-o", "out", "--json", "m.json"
    )
    assert done.returncode == 2 and (tmp_path / "out/good.vtk").is_file() and not (tmp_path / "out/bad.vtk").exists()
    first, second = json.loads((tmp_path / "m.json").read_text())
    assert first["error"]["code"] == "UNSUPPORTED_FORMAT" and "volume_ml" in second


def test_a_call_that_is_cut_off_leaves_what_it_measured_and_says_what_is_older(exported, tmp_path, monkeypatch, capsys):
    scans = [write_volume(scan("a", number)[0], tmp_path / f"{number}.nii.gz")[0] for number in range(3)]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/0.vtk").write_text("of an earlier call")
    (tmp_path / "m.json").write_text("of an earlier call")
    scans[0].write_text("no scan")
    arguments = ["--model", str(exported), *map(str, scans), "-o", str(tmp_path / "out")]
    write, done = predict.write_mask, []

    def full_after_one(*what):
        if done:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done.append(what)
        return write(*what)

    monkeypatch.setattr(predict, "write_mask", full_after_one)
    assert predict.main([*arguments, "--json", str(tmp_path / "m.json")]) == 1
    first, second = json.loads((tmp_path / "m.json").read_text())
    assert first["error"]["code"] == "UNSUPPORTED_FORMAT" and second["scan"] == str(scans[1])
    said = capsys.readouterr().err
    assert "out/0.vtk is of an earlier call" in said and "No space left" in said


def test_bad_scans_get_one_sentence_that_names_the_file_and_exit_code_2(exported, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "bad"
    folder.mkdir()
    loaded = Segmenter(exported)  # once, not for every scan
    monkeypatch.setattr(predict, "Segmenter", lambda _: loaded)
    for kind, (path, _) in bad_scans(folder).items():
        code = predict.main(["--model", str(exported), str(path), "-o", str(tmp_path / "out.vtk")])
        said = capsys.readouterr().err.strip()
        assert code == 2, kind
        assert said.count("\n") == 0 and path.name in said and said.endswith("."), (kind, said)
        assert not (tmp_path / "out.vtk").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["a.nii.gz", "b.nii.gz", "-o", "one.vtk"], "one.vtk"),
        (["a.nii.gz", "x/a.nii.gz", "-o", "out"], "a.vtk"),
        (["a.nii.gz", "-o", "liver.png"], "liver.png"),
        (["a.nii.gz", "-o", "a.nii.gz"], "scan's own"),
        (["a.nii.gz", "-o", ".", "--format", "nii.gz"], "scan's own"),
        (["a.nii.gz", "-o", "liver.vtk", "--json", "x/../a.nii.gz"], "scan's own"),
        (["header.mhd", "-o", "voxels.mha"], "scan's own"),
        (["a.nii.gz", "-o", "liver.vtk", "--json", "liver.vtk"], "twice"),
        (["a.nii.gz", "-o", "liver.vtk", "--json", "liver.vtk.json"], "twice"),
        (["a.nii.gz", "-o", "liver.vtk", "--json", "x"], "folder x"),
        (["a.nii.gz", "-o", "liver.vtk", "--format", "nii.gz"], "--format"),
        (["a.nii.gz", "-o", "b.nii.gz/liver.vtk"], "b.nii.gz"),
        (["a.nii.gz", "-o", f"{'long' * 80}.vtk"], "long"),
        ([f"{'long' * 80}.nii.gz", "-o", "liver.vtk"], "long"),
    ],
)
def test_outputs_that_cannot_be_are_refused_and_scans_stay(exported, tmp_path, monkeypatch, arguments, word, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    for name in ("a.nii.gz", "b.nii.gz", "x/a.nii.gz"):
        write_volume(scan("a", 0)[0], tmp_path / name)
    (tmp_path / "header.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementSpacing = 1 1 1\nElementType = MET_UCHAR\n"
        "ElementDataFile = voxels.mha\n"
    )
    (tmp_path / "voxels.mha").write_bytes(bytes(64))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert predict.main(["--model", str(exported), *arguments]) == 2
    said = capsys.readouterr().err
    assert word in said and "Traceback" not in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


@pytest.fixture(scope="module")
def fat_model(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "fatfraction" / "1"
    export_model(model, card(task="fatfraction", normalisation="none", labels=["background", "liver"]), folder)
    return folder


def water_and_fat(folder):
    """A fatty rim about lean tissue in air, with a fraction that rises through the inside; two NIfTI files."""
    shape, (y, x) = (6, 64, 72), np.meshgrid(np.arange(64) - 31.5, np.arange(72) - 35.5, indexing="ij")
    radius = np.sqrt((y / 26) ** 2 + (x / 30) ** 2)
    percent = np.where(radius < 0.85, 2.0 + 0.3 * np.arange(72), 92.0)
    random = np.random.default_rng(7)
    affine = np.array([[0, 0, 5.0, 0], [0, 5.0, 0, 0], [8.0, 0, 0, 0], [0, 0, 0, 1]])
    paths = []
    for name, share in (("water", 100 - percent), ("fat", percent)):
        noise = random.normal(0, 20, (2, *shape))
        image = np.hypot(np.where(radius < 1, 10.0 * share, 0.0) + noise[0], noise[1])
        paths += write_volume(Volume(np.rint(image).astype(np.int16), affine), folder / f"{name}.nii.gz")
    return paths


def run_predict(*arguments):
    return predict.main([str(argument) for argument in arguments])


def test_water_and_fat_become_a_mask_and_the_fat_inside_it(fat_model, tmp_path, capsys):
    water, fat = water_and_fat(tmp_path)
    told = tmp_path / "m.json"
    out = tmp_path / "liver.nii.gz"
    assert run_predict("--model", fat_model, "--water", water, "--fat", fat, "-o", out, "--json", told) == 0
    (result,) = json.loads(told.read_text())
    mask = read_volume(out)
    np.testing.assert_array_equal(mask.affine, read_volume(water).affine)
    inside = waterfat.from_water_fat(read_volume(water), read_volume(fat)).voxels[mask.voxels == 1].astype(np.float64)
    assert inside.size > 100
    found = result["fat_fraction_percent"]["liver"]
    assert found["mean"] == pytest.approx(inside.mean(), abs=1e-6)
    assert found["median"] == pytest.approx(np.median(inside), abs=1e-6)
    assert found["sd"] == pytest.approx(inside.std(), abs=1e-6)
    assert result["fat_fraction_image"]["swap"]["suspected"] is False and "sources" not in result["fat_fraction_image"]
    said = capsys.readouterr()
    assert "swapped" not in said.err + said.out and "% fat" in said.out

    assert run_predict("--model", fat_model, "--water", fat, "--fat", water, "-o", out, "--json", told) == 0
    assert any("water and fat look swapped" in flag for flag in json.loads(told.read_text())[0]["flags"])
    assert "water and fat look swapped" in capsys.readouterr().err


def test_fat_that_noise_hides_and_fat_that_folds_are_flagged(fat_model, tmp_path):
    water, fat = (read_volume(path) for path in water_and_fat(tmp_path))
    segmenter = Segmenter(fat_model)

    def flags_of(fraction):
        return "; ".join(segmenter.segment(fraction).measurements["flags"])

    fraction = waterfat.from_water_fat(water, fat)
    assert "no more signal than noise" not in flags_of(fraction) and "fold" not in flags_of(fraction)
    inside = segmenter.segment(fraction).mask.voxels > 0
    dark = [image.with_voxels(np.where(inside & (np.indices(image.shape)[2] % 4 == 0), 1, image.voxels))
            for image in (water, fat)]  # fmt: skip
    hidden = waterfat.from_water_fat(*dark)
    share = np.mean(hidden.voxels[segmenter.segment(hidden).mask.voxels > 0] == 0)
    assert share > 0.05
    assert f"liver: {100 * share:.0f} % of its voxels have no more signal than noise" in flags_of(hidden)
    sum_of, difference = water.voxels.astype(np.int32) + fat.voxels, np.abs(water.voxels.astype(np.int32) - fat.voxels)
    folded = waterfat.from_in_opposed_phase(water.with_voxels(sum_of), water.with_voxels(difference))
    assert "fold at 50 %" in flags_of(folded) and "count as 0 %" not in flags_of(folded)
    lean = np.where(inside & (np.indices(water.shape)[2] % 4 == 0), sum_of + 9, difference)  # decay outweighs fat
    clipped = waterfat.from_in_opposed_phase(water.with_voxels(sum_of), water.with_voxels(lean))
    assert "or less fat than noise and count as 0 %" in flags_of(clipped)
    segmenter.info["provenance"] = {"datasets": [{"name": "own", "images": "in_phase, opposed_phase"}]}
    assert "fold at 50 %" not in flags_of(folded)


def test_a_fat_fraction_in_another_unit_gets_the_answer_of_the_same_in_percent(fat_model, tmp_path, capsys):
    percent = waterfat.from_water_fat(*(read_volume(path) for path in water_and_fat(tmp_path)))
    answers = []
    for name, factor, options in (("percent", 1, ()), ("tenths", 10, ()), ("odd", 3, ("--scale", 1 / 3))):
        write_volume(percent.with_voxels(percent.voxels * factor), tmp_path / f"{name}.nii.gz")
        out, told = tmp_path / f"{name}-mask.nii.gz", tmp_path / f"{name}.json"
        assert run_predict("--model", fat_model, tmp_path / f"{name}.nii.gz", "-o", out, "--json", told, *options) == 0
        answers.append((read_volume(out).voxels, json.loads(told.read_text())[0]["fat_fraction_percent"]["liver"]))
    for voxels, fat in answers[1:]:
        assert np.mean(voxels != answers[0][0]) < 1e-3
        assert fat["mean"] == pytest.approx(answers[0][1]["mean"], abs=0.05)
    capsys.readouterr()
    assert run_predict("--model", fat_model, tmp_path / "odd.nii.gz", "-o", tmp_path / "no.vtk") == 2
    assert "odd.nii.gz" in capsys.readouterr().err and not (tmp_path / "no.vtk").exists()
    # A folder with water and fat has a fraction in percent made of them, which no scale is of.
    exam = dicom_files.save(tmp_path / "exam", [dicom_files.enhanced(np.eye(3), range(dicom_files.SLICES))])
    assert run_predict("--model", fat_model, exam, "-o", tmp_path / "exam.vtk") == 0
    capsys.readouterr()
    assert run_predict("--model", fat_model, exam, "--scale", 0.1, "-o", tmp_path / "no.vtk") == 2
    assert "'W' with 6 slices; 'F' with 6 slices" in capsys.readouterr().err and not (tmp_path / "no.vtk").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--water", "water.nii.gz", "-o", "o.vtk"], "--fat"),
        (["water.nii.gz", "--water", "water.nii.gz", "--fat", "fat.nii.gz", "-o", "o.vtk"], "both"),
        (["-o", "o.vtk"], "none of them"),
        (["--water", "water.nii.gz", "--fat", "gone.nii.gz", "-o", "o.vtk"], "gone.nii.gz"),
        (["--water", "water.nii.gz", "--fat", "fat.nii.gz", "-o", "fat.nii.gz"], "scan's own"),
        (["--water", "water.nii.gz", "--fat", "fat.nii.gz", "--scale", "1", "-o", "o.vtk"], "--scale"),
        (["--water", "water.nii.gz", "--fat", "fat.nii.gz", "-o", "o.vtk", "--volume"], "fatfraction"),
    ],
)
def test_pairs_that_cannot_be_are_refused_and_stay(exported, fat_model, tmp_path, monkeypatch, capsys, arguments, word):
    monkeypatch.chdir(tmp_path)
    water_and_fat(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    chosen = exported if arguments[-1] == "--volume" else fat_model  # a model that knows nothing of fat fractions
    assert run_predict("--model", chosen, *[word for word in arguments if word != "--volume"]) == 2
    said = capsys.readouterr().err.strip()
    assert word in said and said.count("\n") == 0
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_real_series_goes_through_and_keeps_its_place(exported, tmp_path, real_data):
    series = real_data / "ct_dicom_series"
    answer = Segmenter(exported).segment(read_volume(series))
    truth = nibabel.load(real_data / "ct_dicom_series_organs.nii.gz")
    assert answer.mask.spacing_mm[0] == pytest.approx(2.0, abs=0.01)
    write_volume(answer.mask, tmp_path / "mask.nii.gz")
    vtk = read_volume(write_volume(answer.mask, tmp_path / "mask.vtk")[0])
    nifti = read_volume(tmp_path / "mask.nii.gz").canonical()
    corners = np.array(list(itertools.product(*((0, count - 1) for count in vtk.shape))))
    np.testing.assert_allclose(vtk.world_mm(corners), nifti.world_mm(corners), atol=0.01)
    np.testing.assert_array_equal(vtk.voxels, nifti.voxels)
    theirs = nibabel.as_closest_canonical(truth)
    own = sorted(map(tuple, np.round(vtk.world_mm(corners) * [-1, -1, 1], 3)))
    ends = np.array(list(itertools.product(*((0, count - 1) for count in theirs.shape))))
    labelled = sorted(map(tuple, np.round(nibabel.affines.apply_affine(theirs.affine, ends), 3)))
    np.testing.assert_allclose(own, labelled, atol=0.01)
