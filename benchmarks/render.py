"""Rendering a stack of 256 x 256 x 3 from a simulated patient's map of tissues, as the training step does it.

Contrast with all that `experiments/anyscanner_volume.yaml` does to intensities, compiled by XLA as in the step, on one
stack at a time: everything to every stack (the median), and what that experiment draws for each (the mean). The map is
a slice of a simulated patient. A new step, so new random numbers, each time.

python benchmarks/render.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

from measure import ROOT, Row, main, seconds

SIZE, PIXEL_MM, SLICE_MM = 256, 1.75, 5.0
MOST_MS = 15.0


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Everything at once, which has the target, and as drawn."""
    import numpy as np
    import tensorflow as tf

    from lvseg import allocator, draws, intensity, render
    from lvseg.config import load_experiment
    from lvseg.phantom.patients import draw_anatomy

    allocator.keep_memory()
    experiment = load_experiment(ROOT / "experiments" / "anyscanner_volume.yaml")
    settings = {name: keys for name, keys in experiment.augment.model_dump().items() if keys}
    names = [name for name in intensity.NAMES if name in settings]
    in_plane = (np.arange(SIZE) - (SIZE - 1) / 2) * PIXEL_MM
    slices = draw_anatomy(1, 1).tissues(in_plane, in_plane, SLICE_MM * np.arange(-1, 2))
    tissues = tf.constant(np.moveaxis(slices, 0, -1)[None])
    stacks = tf.zeros(tissues.shape, tf.float32)

    def milliseconds(keys: dict[str, dict[str, Any]]) -> list[float]:
        contrast = keys["contrast"]

        @tf.function(jit_compile=True, autograph=False)
        def rendered(step: tf.Tensor) -> tf.Tensor:
            seeds = draws.sample_seeds(0, draws.ELASTIC_STREAM, step, tf.range(1))
            images = render.contrast(
                stacks, tissues, seeds, contrast["kind"], contrast["probability"], 0.0, 1.0, contrast["partial_volume"]
            )
            return intensity.intensity(images, seeds, {name: keys[name] for name in names}, 0.0, 1.0)

        steps = iter(range(2**31))
        return [1e3 * each for each in seconds(lambda: rendered(tf.constant(next(steps), tf.int64)).numpy(), 201)]

    every = {name: keys | {"probability": 1.0} for name, keys in settings.items() if "probability" in keys}
    all_on = statistics.median(milliseconds(every))
    what = f"render a stack of {SIZE} x {SIZE} x 3 with {1 + len(names)} augmentations"
    return [
        Row(f"{what}, all to every stack", f"at most {MOST_MS:g} ms", f"{all_on:.1f} ms", all_on <= MOST_MS),
        Row(f"{what}, as the experiment draws them", "", f"{statistics.mean(milliseconds(settings)):.1f} ms"),
    ]


if __name__ == "__main__":
    sys.exit(main(rows, argparse.ArgumentParser(description=__doc__)))
