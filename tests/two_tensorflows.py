"""What two TensorFlows hand each other: exported networks and begun runs, with whichever TensorFlow runs this.

python tests/two_tensorflows.py EXPORTED_ELSEWHERE FOLDER, in the folder of the small study: exports every network below
FOLDER, answers with them and with those that were exported elsewhere, begins the run "theirs", goes on with the run
"ours", and writes what came of it to FOLDER/told.npz.
"""

import contextlib
import sys
from pathlib import Path

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from lvseg import prepare
from lvseg.config import load_experiment
from lvseg.devices import Cluster
from lvseg.export import export_model
from lvseg.fit import Fit
from lvseg.models.unet import unet
from lvseg.volume import Volume
from serving import worker

Arrays = dict[str, npt.NDArray[np.generic]]

SIZE = 32
# Name -> neighbours and the rest of the network's arguments: the report's base network and all of T, R and V.
NETWORKS: dict[str, tuple[int, dict[str, object]]] = {
    "base": (1, {"residual": False}),
    "pretrained": (4, {"encoder": "vgg11", "residual": True}),
}


def export_networks(folder: Path) -> None:
    """Writes a SavedModel for each of `NETWORKS`, with weights of its seed: folder/<name>/1."""
    for seed, (name, (neighbours, arguments)) in enumerate(NETWORKS.items(), start=4):
        keras.backend.clear_session()
        network = unet(SIZE, 2 * neighbours + 1, 3, 4, input_offset=0.4, input_scale=3.0, seed=seed, **arguments)
        card = {
            "task": "volume",
            "labels": ["background", "liver", "spleen"],
            "axis": "transversal",
            "spacing_mm": [4.0, 3.0],
            "size": SIZE,
            "neighbours": neighbours,
            "normalisation": "patient",
            "clip_percentiles": [1.0, 99.0],
            "global_bounds": None,
            "batch_size": 4,
        }
        export_model(network, card, folder / name / "1")


def answers(folder: Path) -> Arrays:
    """What the models below a folder say, loaded as the server's worker loads them.

    Returns:
        "<name> labels": uint8 [S, H, W] of a scan; "<name> probabilities": float32 [B, size, size, 3] of stacks.
    """
    random = np.random.default_rng(0)
    affine = np.array([[0, 0, 2.0, 0], [0, 2.5, 0, 0], [5.0, 0, 0, 0], [0, 0, 0, 1]])
    scan = Volume(random.normal(100, 40, (11, 37, 45)).astype(np.float32), affine)
    found: Arrays = {}
    for name, (neighbours, _) in NETWORKS.items():
        segmenter = worker.load_segmenter(folder / name / "1")
        worker.warm_up(segmenter)
        found[f"{name} labels"] = segmenter.segment(scan).mask.voxels
        stacks = random.uniform(size=(4, SIZE, SIZE, 2 * neighbours + 1)).astype(np.float32)
        found[f"{name} probabilities"] = segmenter.infer(stacks=tf.constant(stacks))["probabilities"].numpy()
    return found


def training(name: str) -> Fit:
    """The training loop of the study in the working folder, from that run's last checkpoint on."""
    short = ["train.steps=4", "train.checkpoint_every=2", "train.validate_every=4", "train.deterministic=false"]
    experiment = load_experiment(Path("experiment.yaml"), [f"name={name}", "model.residual=true", *short])
    sets = prepare.prepare(experiment.data, jobs=1)
    alone = Cluster(tf.distribute.get_strategy(), 0, 1, 1)
    return Fit(experiment, sets, prepare.split(experiment.data, sets), experiment.run_folder, alone)


def begin(name: str) -> None:
    """Begins a run that is cut off after the checkpoint of its second step."""
    fit = training(name)

    def cut_off(*_: object) -> float:
        raise KeyboardInterrupt

    fit._validate = cut_off
    with contextlib.suppress(KeyboardInterrupt):
        fit.run()


def restored(name: str) -> Arrays:
    """What a run goes on from: its step, and each layer's weights by the layer's name."""
    fit = training(name)
    weights = {f"{layer.name} {i}": w for layer in fit.step.model.layers for i, w in enumerate(layer.get_weights())}
    return {"step": fit.step.number.numpy(), **weights}


def main(exported_elsewhere: Path, folder: Path) -> None:
    """The script."""
    export_networks(folder)
    begin("theirs")
    told = {"theirs": {**answers(folder), **restored("theirs")}}
    told["ours"] = {**answers(exported_elsewhere), **restored("ours")}
    arrays = {f"{origin} {key}": array for origin, found in told.items() for key, array in found.items()}
    np.savez(folder / "told.npz", version=tf.__version__, **arrays)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
