"""Rendering a stack of 256 x 256 x 3 from a simulated patient's map of tissues, as the training step does it.

Contrast with all that `experiments/anyscanner_volume.yaml` does to intensities, compiled by XLA as in the step, on one
stack at a time; the map is a slice of a simulated patient. A new step, so new random numbers, each time.

python benchmarks/render.py
"""

from __future__ import annotations

import argparse
import sys

from measure import ROOT, Row, main, median_s

SIZE, PIXEL_MM, SLICE_MM = 256, 1.75, 5.0
MOST_MS = 15.0


def rows(arguments: argparse.Namespace) -> list[Row]:
    """The one row."""
    import numpy as np
    import tensorflow as tf

    from lvseg import allocator, draws, intensity, render
    from lvseg.config import load_experiment
    from lvseg.phantom.patients import draw_anatomy

    allocator.keep_memory()
    experiment = load_experiment(ROOT / "experiments" / "anyscanner_volume.yaml")
    settings = experiment.augment.model_dump()
    names = {name: settings[name] for name in intensity.NAMES if settings[name]}
    in_plane = (np.arange(SIZE) - (SIZE - 1) / 2) * PIXEL_MM
    slices = draw_anatomy(1, 1).tissues(in_plane, in_plane, SLICE_MM * np.arange(-1, 2))
    tissues = tf.constant(np.moveaxis(slices, 0, -1)[None])
    stacks = tf.zeros(tissues.shape, tf.float32)

    @tf.function(jit_compile=True, autograph=False)
    def rendered(step: tf.Tensor) -> tf.Tensor:
        seeds = draws.sample_seeds(0, draws.ELASTIC_STREAM, step, tf.range(1))
        contrast = settings["contrast"]
        images = render.contrast(stacks, tissues, seeds, contrast["kind"], 1.0, 0.0, 1.0, contrast["partial_volume"])
        return intensity.intensity(images, seeds, names, 0.0, 1.0)

    steps = iter(range(2**31))
    ms = 1e3 * median_s(lambda: rendered(tf.constant(next(steps), tf.int64)).numpy(), 101)
    what = f"render a stack of {SIZE} x {SIZE} x 3 with {1 + len(names)} augmentations on"
    return [Row(what, f"at most {MOST_MS:g} ms", f"{ms:.1f} ms", ms <= MOST_MS)]


if __name__ == "__main__":
    sys.exit(main(rows, argparse.ArgumentParser(description=__doc__)))
