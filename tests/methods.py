"""The report's four methods in all combinations: train a few steps, export, load, predict."""

import itertools
import json

import numpy as np
import tensorflow as tf
from small_study import scan, write_card

from lvseg import metrics, prepare
from lvseg.config import load_experiment
from lvseg.devices import Cluster
from lvseg.fit import Fit
from lvseg.predict import Segmenter

STEPS = 20
# T, R, V, E of the report's Table 1.
COMBINATIONS = list(itertools.product((False, True), repeat=4))


def name(combination):
    """ "TRVE" with a dot for each method that is off."""
    return "".join(letter if on else "." for letter, on in zip("TRVE", combination, strict=True))


def run(study, folder, task, neighbours, combination, weights_file):
    """Trains one combination on the small study and asserts what holds of every one.

    Args:
        study: the small study's folder, which is the working folder too.
        folder: for the run and the model.
        task: of the cards; neighbours: each side, where V is on.
        combination: of T, R, V, E; weights_file: .safetensors for T.
    """
    pretrained, residual, stacked, elastic = combination
    # The study's intensities, 6 to 251, as fat fractions in percent.
    scale = {"kind": "fat_fraction", "scale": 0.25} if task == "fatfraction" else {}
    cards = [
        write_card(study, f"{task}_{own}", name=f"{task}_{own}", task=task, scanner=own, root=f"../raw/{own}", **scale)
        for own in ("a", "b")
    ]
    overrides = [
        f"task={task}",
        f"data.datasets={json.dumps([f'cards/{card.name}' for card in cards])}",
        f"data.neighbours={neighbours if stacked else 0}",
        f"model={{width: 2, dropout: 0.5, residual: {json.dumps(residual)},"
        f" encoder: {'vgg11' if pretrained else 'null'}, encoder_weights: '{weights_file}'}}",
        f"augment.elastic={'{sigma_px: 1.0, grid: 4}' if elastic else 'null'}",
        f"train={{steps: {STEPS}, batch_size: 2, learning_rate: 1.0e-3, validate_every: {STEPS}}}",
    ]
    experiment = load_experiment(study / "experiment.yaml", overrides)
    sets = prepare.prepare(experiment.data, jobs=1)
    split = prepare.split(experiment.data, sets)
    fit = Fit(experiment, sets, split, folder / "run", Cluster(tf.distribute.get_strategy(), 0, 1, 1))
    names = {layer.name for layer in fit.step.model.layers}
    assert ("enc5_conv2" in names and fit.step.model.get_layer("enc5_conv2").filters == 512) == pretrained
    assert any(layer.endswith("_short") for layer in names) == residual
    before = [weights.copy() for weights in fit.step.model.get_weights()]
    fit.run()
    after = fit.step.model.get_weights()
    assert int(fit.step.number) == STEPS and all(np.isfinite(weights).all() for weights in after)
    assert all((a != b).any() for a, b in zip(before, after, strict=True) if a.ndim > 1)  # every kernel was trained

    card = fit.export(folder / "model", {})
    assert (card["task"], card["neighbours"]) == (task, neighbours if stacked else 0)
    segmenter = Segmenter(folder / "model")
    stacks = tf.random.stateless_uniform([8, 32, 32, 2 * card["neighbours"] + 1], [1, 2]) * 200
    exported = segmenter.infer(stacks=stacks)["probabilities"]
    own = fit.step.model([stacks, tf.zeros([8, 2], tf.int64)])
    np.testing.assert_allclose(exported, own, atol=1e-4)
    for dataset in ("a", "b"):
        image, truth = scan(dataset, 1)
        image = image.with_voxels(image.voxels * scale.get("scale", 1))
        mask = segmenter.segment(image).mask
        assert mask.shape == image.shape and np.allclose(mask.affine, image.affine)
        assert set(np.unique(mask.voxels)) <= {0, 1} and 0 <= metrics.dice(mask.voxels, truth.voxels) <= 1
