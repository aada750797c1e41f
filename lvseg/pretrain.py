"""Command: trains the U-Net on another dataset's slices and keeps its VGG11 encoder as weights for other experiments.

    python -m lvseg.pretrain --cfg experiments/pretrain_ct.yaml --out weights/ct.safetensors

Where ImageNet's weights cannot be had, `model.encoder_weights: weights/ct.safetensors` takes their place. The run
is an ordinary one of lvseg.train: it goes on where it was stopped, and a finished run is only written out.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lvseg import command
from lvseg.config import Experiment, add_experiment_arguments, load_experiment
from lvseg.errors import InputError
from lvseg.keys import read_json
from lvseg.split import scans_seen_by, seen_by
from lvseg.train import train

SUFFIX = ".safetensors"


def pretrain(experiment: Experiment, out: Path) -> None:
    """Trains an experiment's fold and writes the encoder of the best validation Dice in torchvision's layout.

    Args:
        experiment: with model.encoder vgg11 and three slices a stack, one for each of the colours VGG11 was made for;
            model.encoder_weights may be a file of an earlier pretraining, so that datasets follow each other.
        out: .safetensors file.

    Raises:
        InputError: BAD_CONFIG, BAD_ARGUMENT, and all of `lvseg.train.train`.
    """
    if experiment.model.encoder != "vgg11":
        raise InputError("BAD_CONFIG", "Expected model.encoder to be vgg11 for pretraining, received null.")
    if experiment.data.neighbours != 1:
        raise InputError(
            "BAD_CONFIG",
            "Expected data.neighbours to be 1 for pretraining, since VGG11 has three channels, received"
            f" {experiment.data.neighbours}.",
        )
    if experiment.model.encoder_input == "projection":
        raise InputError(
            "BAD_CONFIG",
            "Expected model.encoder_input to be spread for pretraining, since a learned projection is no part of VGG11,"
            " received projection.",
        )
    if experiment.model.freeze_encoder_steps >= experiment.train.steps:
        raise InputError(
            "BAD_CONFIG",
            f"Expected model.freeze_encoder_steps below train.steps={experiment.train.steps} for pretraining, received"
            f" {experiment.model.freeze_encoder_steps}: the encoder would learn nothing.",
        )
    if out.suffix != SUFFIX or out.is_dir():
        raise InputError("BAD_ARGUMENT", f"Expected --out to be a {SUFFIX} file, received {out}.")
    out.parent.mkdir(parents=True, exist_ok=True)  # before the hours, not after them
    if not os.access(out.parent, os.W_OK):
        raise InputError("BAD_ARGUMENT", f"Expected --out in a folder that can be written, received {out}.")
    train(experiment)
    run = experiment.run_folder
    if not read_json(run / "manifest.json").get("finished"):
        return  # one of several machines, and not the one that writes
    _write(experiment, run, out)
    print(f"encoder weights: {out} (use them with model.encoder_weights: {out})")


def _write(experiment: Experiment, run: Path, out: Path) -> None:
    import numpy as np

    from lvseg.models import vgg
    from lvseg.step import network

    card = read_json(run / "model" / "model.json")
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        best = max(csv.DictReader(file), key=lambda row: float(row["validation_dice"]))
    model = network(experiment, len(card["labels"]), 0.0, 1.0, "float32")
    with np.load(run / "checkpoints" / f"best-{best['step']}.npz") as arrays:
        model.set_weights([arrays[name] for name in sorted(arrays.files)])

    manifest = card["provenance"]
    datasets = [dataset["name"] for dataset in manifest["datasets"]]
    step, dice = int(best["step"]), float(best["validation_dice"])
    description = (
        f"trained by lvseg.pretrain on {', '.join(datasets)} ({experiment.task}) for {step} steps to a validation Dice"
        f" of {dice:.3f}; before that {manifest['encoder_weights']['description']}"
    )
    info, parts = {"provenance": manifest}, ("train", "validation")
    facts = {
        "task": experiment.task,
        "datasets": datasets,
        "step": step,
        "validation_dice": dice,
        "started_from": {key: manifest["encoder_weights"][key] for key in ("name", "sha256", "description")},
        "split": {part: sorted(seen_by(info, run, part)) for part in parts},
        "scans_sha256": {part: sorted(scans_seen_by(info, part)) for part in parts},
        "config_sha256": manifest["config_sha256"],
        "shards_sha256": manifest["shards_sha256"],
        "lvseg": importlib.metadata.version("lvseg"),
    }
    vgg.save_encoder(model, out, description, facts)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="lvseg.pretrain",
        description="Trains the U-Net on other slices and writes its VGG11 encoder for model.encoder_weights.",
        epilog="Example: python -m lvseg.pretrain --cfg experiments/pretrain_ct.yaml --out weights/ct.safetensors",
    )
    add_experiment_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help=f"{SUFFIX} file, replaced if there")
    return command.run(parser, lambda given: pretrain(load_experiment(given.cfg, given.set), given.out), argv)


if __name__ == "__main__":
    sys.exit(main())
