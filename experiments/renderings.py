"""Forty renderings of one simulated patient as training sees them, in one picture to be looked at.

python experiments/renderings.py --cfg experiments/anyscanner_volume_cpu.yaml -o docs/renderings.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image

from lvseg import augment, command, draws, intensity, render
from lvseg.config import add_experiment_arguments, load_experiment
from lvseg.errors import InputError
from lvseg.phantom.anatomy import WHOLE_LIVER
from lvseg.phantom.patients import draw_anatomy
from lvseg.step import SPATIAL

ROWS, COLUMNS, SLICE_MM = 5, 8, 5.0
COLOURS = 64


def renderings(arguments: argparse.Namespace) -> None:
    """Draws the picture: the experiment's augmentation, spatial and of contrast, of the largest slice of the liver."""
    for option, bits in (("seed", draws.SEED_BITS), ("number", draws.INDEX_BITS), ("step", draws.STEP_BITS)):
        if not 0 <= (value := getattr(arguments, option)) < 2**bits:
            raise InputError("BAD_ARGUMENT", f"Expected --{option} from 0 to 2**{bits} - 1, received {value}.")
    experiment = load_experiment(arguments.cfg, arguments.set)
    settings, data = experiment.augment.model_dump(), experiment.data
    if settings["contrast"] is None:
        raise InputError("BAD_CONFIG", f"Expected an experiment with augment.contrast, received {arguments.cfg}.")
    y, x = ((np.arange(data.size) - (data.size - 1) / 2) * mm for mm in data.spacing_mm)
    z = np.arange(-160.0, 160.0, SLICE_MM)
    tissues = draw_anatomy(arguments.seed, arguments.number, varied=True).tissues(x, y, z)
    middle = int(np.isin(tissues, WHOLE_LIVER).sum(axis=(1, 2)).argmax())
    own = tissues[middle - data.neighbours : middle + data.neighbours + 1]
    maps = tf.constant(np.repeat(np.moveaxis(own, 0, -1)[None], ROWS * COLUMNS, axis=0))
    seeds = draws.sample_seeds(arguments.seed, draws.ELASTIC_STREAM, arguments.step, tf.range(ROWS * COLUMNS))
    spatial = {name: settings[name] for name in SPATIAL if settings[name]}
    stacks = tf.zeros(maps.shape, tf.float32)
    _, maps = augment.spatial(stacks, maps, seeds, spatial, data.spacing_mm)
    names = {name: settings[name] for name in intensity.NAMES if settings[name]}
    high = 100.0 if settings["contrast"]["kind"] == "fraction" else 1.0
    contrast = settings["contrast"]
    images = render.contrast(stacks, maps, seeds, contrast["kind"], 1.0, 0.0, high, contrast["partial_volume"])
    images = intensity.intensity(images, seeds, names, 0.0, high).numpy()[..., data.neighbours]
    grey = (255 * np.clip(images / high, 0, 1)).astype(np.uint8)
    picture = grey.reshape(ROWS, COLUMNS, data.size, data.size).transpose(0, 2, 1, 3)
    with command.atomic(arguments.out) as temporary:
        Image.fromarray(picture.reshape(ROWS * data.size, -1)).quantize(COLOURS).save(temporary, optimize=True)
    print(f"{ROWS * COLUMNS} renderings are in {arguments.out}")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="renderings", description=__doc__.splitlines()[0])
    add_experiment_arguments(parser)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=31, help="of patient and random numbers (default: %(default)s)")
    parser.add_argument("--number", type=int, default=3, help="of the patient (default: %(default)s)")
    parser.add_argument("--step", type=int, default=0, help="of training, whose numbers are drawn (default: 0)")
    return command.run(parser, renderings, None)


if __name__ == "__main__":
    sys.exit(main())
