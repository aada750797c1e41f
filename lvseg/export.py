"""Writes the SavedModel that predict, evaluate and the server use; as a command, hands a run's model to the server.

python -m lvseg.export --run runs/volume/best-fold0 --out models/volume
"""

from __future__ import annotations

import argparse
import errno
import functools
import json
import math
import shutil
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lvseg import command, preprocess, quality
from lvseg.errors import InputError, RunError
from lvseg.keys import read_json
from lvseg.optimiser import tf_variable
from lvseg.postprocess import STEPS
from lvseg.predict import (
    VERSION,
    Segmenter,
    check_holds_versions,
    check_weights,
    damaged,
    newest_version,
    shipped_model,
    weights_sha256,
)

ODDS = (0.001, 1000.0)  # that odds may be multiplied by
# What the members of an ensemble must agree on.
SHARED = (
    "task", "labels", "axis", "spacing_mm", "size", "neighbours", "normalisation", "clip_percentiles", "global_bounds",
    "ct_window_hu",
)  # fmt: skip
Network = Callable[[tf.Tensor], tf.Tensor]


def export_model(model: keras.Model, card: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Writes a network, of `models.unet`, as `export_network` says."""

    def network(stacks: tf.Tensor) -> tf.Tensor:
        return model([stacks, tf.zeros([tf.shape(stacks)[0], 2], tf.int64)], training=False)

    return export_network(network, [model], card, folder)


def export_ensemble(models: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Writes one model that answers with the mean of several models' probabilities.

    Args:
        models: SavedModel folders that `export_network` wrote, such as those of a study's folds.
        folder: as `export_network`.

    Returns:
        The card: the first one's, with the members' cards under `members`.

    Raises:
        InputError: MODEL_UNAVAILABLE; BAD_ENSEMBLE if they do not see scans alike or do not answer alike.
    """
    members = [Segmenter(path) for path in models]
    cards = [member.info for member in members]
    if len({card["weights_sha256"] for card in cards}) < len(cards):
        raise InputError(
            "BAD_ENSEMBLE", f"Expected models of other weights each, received {', '.join(map(str, models))}."
        )
    for path, card in zip(models, cards, strict=True):
        for key in SHARED:
            if card.get(key) != cards[0].get(key):
                raise InputError(
                    "BAD_ENSEMBLE",
                    f"Expected models of one {key}, received {cards[0].get(key)} in {models[0]} and {card.get(key)} in"
                    f" {path}.",
                )

    def network(stacks: tf.Tensor) -> tf.Tensor:
        answers = [member.infer(stacks=stacks)["probabilities"] for member in members]
        return tf.add_n(answers) / len(answers)

    own = {key: value for key, value in cards[0].items() if key not in ("measured", "provenance", "version")}
    card = {**own, "name": " + ".join(dict.fromkeys(card.get("name", "unnamed") for card in cards)), "members": cards}
    return export_network(network, [member.loaded for member in members], card, folder)


def export_with_odds(model: Path, odds: float, folder: Path) -> dict[str, Any]:
    """Writes a model whose odds of every class against the background are multiplied, by its last layer's biases.

    Args:
        model: folder of one network's; odds: of ODDS; below 1 for smaller masks, above for larger ones.
        folder: as `export_network`.

    Returns:
        The card of the model, as written; `provenance.corrected` tells of what it was made, by what.

    Raises:
        InputError: BAD_ARGUMENT; MODEL_UNAVAILABLE; BAD_MODEL for an ensemble, whose members have biases of their own,
            and for a network that does not end in the biases of its classes.
    """
    if not ODDS[0] <= odds <= ODDS[1]:
        raise InputError(
            "BAD_ARGUMENT", f"Expected --foreground-odds from {ODDS[0]:g} to {ODDS[1]:g}, received {odds:g}."
        )
    member = Segmenter(model)
    if "members" in member.info:
        raise InputError(
            "BAD_MODEL",
            f"Expected one network to change the odds of, received an ensemble in {model}; correct its runs first.",
        )
    labels, biases = member.info["labels"], member.loaded.variables[-1]  # of unet's last layer, "logits"
    if biases.shape != [len(labels)]:
        raise InputError(
            "BAD_MODEL",
            f"Expected a network that ends in {len(labels)} biases, received {tuple(biases.shape)} in {model}.",
        )
    biases.assign_add(math.log(odds) * np.array([0.0] + [1.0] * (len(labels) - 1)))

    def network(stacks: tf.Tensor) -> tf.Tensor:
        return member.infer(stacks=stacks)["probabilities"]

    # What was measured is of the model as it was.
    parent = {key: member.info.get(key) for key in ("name", "version", "weights_sha256", "measured")}
    card = {key: value for key, value in member.info.items() if key not in ("version", "measured")}
    provenance = card.get("provenance", {})
    corrected = [*provenance.get("corrected", []), {"foreground_odds": odds, "from": parent}]
    card["provenance"] = {**provenance, "corrected": corrected}
    return export_network(network, [member.loaded], card, folder)


def export_network(network: Network, tracked: Sequence[Any], card: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Writes the network with its preprocessing as a SavedModel of four signatures, and `model.json` beside it.

    Signatures: `prepare` (voxels float32 [S,H,W], spacing_mm float32 [3]) -> slices float32 [S,size,size]; `infer`
    (stacks float32 [B,size,size,2n+1]) -> probabilities float32 [B,size,size,C]; `restore` (probabilities, shape
    int32 [3], spacing_mm) -> labels uint8 [S,H,W]; `segment`, also `serving_default`, is the three in one, batch by
    batch, so that its memory beyond the scan's does not grow with S. None of them knows the modality: a CT has to
    be clipped to the card's `ct_window_hu` before, as `predict.Segmenter` does.

    Args:
        network: stacks float32 [B, size, size, 2n+1] -> probabilities float32 [B, size, size, C].
        tracked: what holds its weights.
        card: what `model.json` says: size, neighbours, spacing_mm, normalisation, batch_size and the rest of it.
        folder: written whole or not at all; replaced if there.

    Returns:
        The card with `weights_sha256`, as written.

    Raises:
        OSError: for a disk that is full or fails.
    """
    size, neighbours, batch_size = card["size"], card["neighbours"], card["batch_size"]
    target_mm, normalisation = card["spacing_mm"], card["normalisation"]
    clip, global_bounds = card["clip_percentiles"], card["global_bounds"]

    voxels_spec = tf.TensorSpec([None, None, None], tf.float32, "voxels")
    spacing_spec = tf.TensorSpec([3], tf.float32, "spacing_mm")
    stacks_spec = tf.TensorSpec([None, size, size, 2 * neighbours + 1], tf.float32, "stacks")
    probabilities_spec = tf.TensorSpec([None, size, size, len(card["labels"])], tf.float32, "probabilities")
    shape_spec = tf.TensorSpec([3], tf.int32, "shape")

    def traced(function: Any, *signature: tf.TensorSpec) -> Any:
        graph = tf.function(function, input_signature=signature, autograph=False)
        return graph.get_concrete_function()

    # One graph each, which two signatures call.
    answer = traced(network, stacks_spec)
    on_own_grid = traced(
        functools.partial(preprocess.restore, target_mm=target_mm), probabilities_spec, shape_spec, spacing_spec
    )

    def bounds(voxels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        scan = preprocess.statistics(voxels, percentiles=clip is not None)
        return scan.minimum, *preprocess.intensity_bounds(scan, normalisation, clip, global_bounds)

    def harmonise(
        planes: tf.Tensor, spacing_mm: tf.Tensor, fill: tf.Tensor, low: tf.Tensor, high: tf.Tensor
    ) -> tf.Tensor:
        slices = preprocess.harmonise(planes, spacing_mm, target_mm, size, fill)
        return preprocess.normalise(slices, low[:, None, None], high[:, None, None], normalisation)

    def prepare(voxels: tf.Tensor, spacing_mm: tf.Tensor) -> dict[str, tf.Tensor]:
        fill, low, high = bounds(voxels)
        return {"slices": harmonise(voxels, spacing_mm, fill, low, high)}

    def infer(stacks: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"probabilities": answer(stacks)}

    def restore(probabilities: tf.Tensor, shape: tf.Tensor, spacing_mm: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"labels": on_own_grid(probabilities, shape, spacing_mm)}

    def segment(voxels: tf.Tensor, spacing_mm: tf.Tensor) -> dict[str, tf.Tensor]:
        fill, low, high = bounds(voxels)
        shape = tf.shape(voxels)
        count = shape[0]

        def one_batch(first: tf.Tensor) -> tf.Tensor:
            # The batch's slices with their neighbours, the ends repeated, so that each has all of its own around it.
            around = tf.clip_by_value(first + tf.range(-neighbours, batch_size + neighbours), 0, count - 1)
            planes = harmonise(
                tf.gather(voxels, around), spacing_mm, fill, tf.gather(low, around), tf.gather(high, around)
            )
            stacks = preprocess.stack_neighbours(planes, neighbours, tf.range(neighbours, neighbours + batch_size))
            return on_own_grid(answer(stacks), shape, spacing_mm)

        labels = tf.map_fn(
            one_batch, tf.range(0, count, batch_size), fn_output_signature=tf.uint8, parallel_iterations=1
        )
        return {"labels": tf.reshape(labels, [-1, shape[1], shape[2]])[:count]}

    whole = traced(segment, voxels_spec, spacing_spec)
    signatures = {
        "serving_default": whole,
        "segment": whole,
        "prepare": traced(prepare, voxels_spec, spacing_spec),
        "infer": traced(infer, stacks_spec),
        "restore": traced(restore, probabilities_spec, shape_spec, spacing_spec),
    }
    # Saved as they are: as an archive of Keras's, which keeps the functions too, all graphs would be in it twice.
    held = tf.train.Checkpoint(variables=[tf_variable(own) for each in tracked for own in each.variables])
    with command.atomic(folder) as temporary:
        with command.written_by_tensorflow(folder):
            tf.saved_model.save(held, str(temporary), signatures)
        card = {**card, "weights_sha256": weights_sha256(temporary)}
        (temporary / "model.json").write_text(json.dumps(card, indent=1), encoding="utf-8")
    return card


def weights(folder: Path) -> list[np.ndarray[Any, Any]]:
    """The weights of the one network in a SavedModel that `export_model` wrote, in the order of the network's own.

    Raises:
        InputError: MODEL_UNAVAILABLE for one that is incomplete or damaged, or has other weights than its model.json.
    """
    try:
        found = [variable.numpy() for variable in tf.saved_model.load(str(folder)).variables]
        own = weights_sha256(folder)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, tf.errors.OpError) as error:
        raise damaged(folder, error) from error
    check_weights(own, read_json(folder / "model.json"), folder)
    return found


def write_version(out: Path, write: Callable[[Path], object]) -> Path:
    """Makes the version folder after those that a folder of versions has, whole or not at all, and returns it.

    Whoever else writes one meanwhile, in another process too, has another number.

    Args:
        out: made if missing; write: makes the folder that it is given, which is renamed.

    Raises:
        InputError: BAD_OUTPUT for a folder that is a model or within one.
    """
    check_holds_versions(out)
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".partial-{uuid.uuid4().hex[:8]}"
    try:
        write(temporary)
        while True:
            versions = [int(path.name) for path in out.iterdir() if VERSION.fullmatch(path.name)]
            folder = out / str(max(versions, default=0) + 1)
            try:
                return temporary.rename(folder)
            except OSError as error:  # a folder that holds something is never renamed over
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(
    models: Sequence[Path],
    out: Path,
    postprocessing: Sequence[str] | None = None,
    foreground_odds: float | None = None,
) -> Path:
    """Writes a model, or the ensemble of several, to the next free version folder and returns it.

    A run that was evaluated gives its calibration of the expected Dice along, as `quality` of the card.

    Args:
        models: their folders, such as <run>/model; out: models/<task>, the version folder is made in it.
        postprocessing: of `postprocess.STEPS`, which whoever uses the model applies; None for what its card says.
        foreground_odds: see `export_with_odds`; None to leave them.

    Raises:
        InputError: NOT_FOUND if there is no model yet; BAD_ARGUMENT for odds with several models; see
            `export_ensemble`, `export_with_odds`, `write_version`.
        OSError, RunError: for a disk that is full or fails; nothing is left of the version.
    """
    if foreground_odds is not None and len(models) > 1:
        raise InputError(
            "BAD_ARGUMENT", f"Expected --foreground-odds with one run, received {len(models)}; correct each first."
        )
    for model in models:
        if not (model / "model.json").is_file():
            raise InputError(
                "NOT_FOUND", f"Expected a trained model in {model}, received none; train the run to its end first."
            )

    def write(temporary: Path) -> None:
        if len(models) > 1:
            export_ensemble(models, temporary)
        elif foreground_odds is not None:
            export_with_odds(models[0], foreground_odds, temporary)
        else:
            try:
                shutil.copytree(models[0], temporary)
            except shutil.Error as error:  # a list of every file that could not be copied
                raise RunError(f"Expected to copy {models[0]}, received '{error.args[0][0][2]}'.") from error
        path = temporary / "model.json"
        card = json.loads(path.read_text(encoding="utf-8"))
        calibration, steps = card.pop("quality", None), list(quality.steps(None, card))
        if postprocessing is not None:
            card["postprocessing"] = list(postprocessing)
        if len(models) == 1 and foreground_odds is None:  # of these weights, and of these masks
            calibration = calibration if steps == list(quality.steps(None, card)) else None
            if calibration := quality.of_run(models[0].parent, card) or calibration:
                card["quality"] = calibration
        path.write_text(json.dumps(card, indent=1), encoding="utf-8")

    return write_version(out, write)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="lvseg.export",
        description="Writes a run's model to the next version folder, from which predict and the server load it; of"
        " several runs, such as the folds of one, a model that answers with the mean of their probabilities; or a"
        " model that comes with lvseg.",
        epilog="Example: python -m lvseg.export --run runs/volume/best-fold0 --out models/volume",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, nargs="+", action="extend", help="run folders")
    source.add_argument("--shipped", metavar="TASK", help="the model that comes with lvseg: volume or fatfraction")
    parser.add_argument("--out", type=Path, required=True, help="models/<task>; the version folder is made in it")
    parser.add_argument(
        "--postprocessing", choices=STEPS, nargs="*", help="what whoever uses the model does with its masks"
    )
    parser.add_argument(
        "--foreground-odds",
        type=float,
        help="what the odds of every class against the background are multiplied by, as chosen on validation patients:"
        " above 1 where masks are too small, below where they are too large",
    )

    def body(arguments: argparse.Namespace) -> None:
        if arguments.shipped is not None:
            models = [newest_version(shipped_model(arguments.shipped))]
        else:
            models = [run / "model" for run in arguments.run]
        print(publish(models, arguments.out, arguments.postprocessing, arguments.foreground_odds))

    return command.run(parser, body, argv)


if __name__ == "__main__":
    sys.exit(main())
