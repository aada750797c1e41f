"""Elastic deformation of one slice of 256 x 256 with 3 channels and of its mask, by lvseg and by three other libraries.

Every call draws a new field (control points 8 x 8, sigma 8 pixels or what is nearest to it) and deforms the slice with
linear interpolation and the mask with the nearest pixel. Every library has processes of its own, in turn, is given its
own layout, and may use one thread or all cores, whichever is faster.

python benchmarks/elastic.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

from measure import Row, main, median_s, run_script

SIZE, CHANNELS, SIGMA_PX, GRID = 256, 3, 8.0, 8
CALLS = 10  # of lvseg's each time: its slice is deformed inside a graph, where no call from Python counts
BATCH = 8  # of the comparison of the two places where lvseg deforms
CORES = len(os.sched_getaffinity(0))
TARGETS = {
    "batchgeneratorsv2": ("batchgeneratorsv2's SpatialTransform", 3.0),
    "monai": ("MONAI's Rand2DElasticd", 6.0),
    "elasticdeform": ("elasticdeform.deform_grid", 10.0),
}


def made_up() -> tuple[Any, Any]:
    """Image float32 [size, size, channels] and mask uint8 [size, size]: noise and a disc."""
    import numpy as np

    image = np.random.default_rng(0).uniform(0, 1, (SIZE, SIZE, CHANNELS)).astype(np.float32)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    return image, ((rows - 120) ** 2 + (columns - 140) ** 2 < 60**2).astype(np.uint8)


def lvseg(threads: int) -> Callable[[], Any]:
    """As in the training step: a part of its graph, compiled by XLA, which makes its own seeds; `CALLS` of them."""
    import tensorflow as tf

    from lvseg import augment, draws

    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    image, mask = (tf.constant(values) for values in made_up())
    image, mask = image[tf.newaxis], mask[tf.newaxis, ..., tf.newaxis]

    @tf.function(jit_compile=True)
    def deform(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        seeds = draws.sample_seeds(0, draws.ELASTIC_STREAM, step, tf.range(1))
        return augment.elastic(image, mask, seeds, SIGMA_PX, GRID)

    @tf.function
    def deform_several(first: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        deformed, labels = image, mask
        for step in tf.range(first, first + CALLS):
            deformed, labels = deform(step)
        return deformed, labels

    steps = iter(range(0, 2**31, CALLS))
    return lambda: [values.numpy() for values in deform_several(tf.constant(next(steps), tf.int64))]


def batchgeneratorsv2(threads: int) -> Callable[[], Any]:
    """Channels first; it smooths noise in the frequency domain, so the width of its Gaussian changes nothing."""
    import numpy as np
    import torch
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

    torch.set_num_threads(threads)
    image, mask = made_up()
    channels_first = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    labels = torch.from_numpy(mask.astype(np.int16))[None]
    deform = SpatialTransform(
        (SIZE, SIZE), 0, random_crop=False, p_elastic_deform=1, elastic_deform_scale=1 / GRID,
        elastic_deform_magnitude=2 * SIGMA_PX, p_synchronize_def_scale_across_axes=1, mode_seg="nearest",
        border_mode_seg="border", padding_mode_image="border",
    )  # fmt: skip
    return lambda: deform(image=channels_first, segmentation=labels)


def monai(threads: int) -> Callable[[], Any]:
    """The dictionary transform, which draws one field for both, on plain tensors without metadata."""
    import numpy as np
    import torch
    from monai.data import set_track_meta
    from monai.transforms import Rand2DElasticd

    set_track_meta(False)
    torch.set_num_threads(threads)
    image, mask = made_up()
    sample = {
        "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
        "mask": torch.from_numpy(mask)[None],
    }
    deform = Rand2DElasticd(
        ["image", "mask"], (SIZE // GRID, SIZE // GRID), (SIGMA_PX, SIGMA_PX), prob=1.0,
        mode=["bilinear", "nearest"], padding_mode="border",
    )  # fmt: skip
    return lambda: deform(sample)


def elasticdeform(threads: int) -> Callable[[], Any]:
    """Both arrays in one call, which computes the field once; it has one thread. Channels first, its faster layout."""
    import elasticdeform
    import numpy as np

    image, mask = made_up()
    channels_first, random = np.ascontiguousarray(image.transpose(2, 0, 1)), np.random.default_rng(0)

    def call() -> Any:
        displacement = random.normal(0, SIGMA_PX, (2, GRID, GRID))
        return elasticdeform.deform_grid(
            [channels_first, mask], displacement, order=[1, 0], mode="nearest", axis=[(1, 2), (0, 1)]
        )

    return call


def measure_places(repeats: int) -> dict[str, float]:
    """Slices a second of batches of 8, deformed in the compiled step and by elasticdeform in the pipeline."""
    import tensorflow as tf

    from lvseg import augment, draws

    seeds = draws.sample_seeds(0, draws.ELASTIC_STREAM, 0, tf.range(BATCH))
    images = tf.random.stateless_uniform([BATCH, SIZE, SIZE, CHANNELS], [1, 2])
    masks = tf.cast(images[..., :1] > 0.5, tf.uint8)
    compiled = tf.function(augment.elastic, jit_compile=True)

    def device() -> None:
        compiled(images, masks, seeds, SIGMA_PX, GRID)[0].numpy()

    samples = tf.data.Dataset.from_tensor_slices((images, masks, seeds)).map(
        lambda image, mask, seed: augment.elastic_host(image, mask, seed, SIGMA_PX, GRID),
        num_parallel_calls=tf.data.AUTOTUNE,
    )

    def host() -> None:
        for _ in samples:
            pass

    return {"device": BATCH / median_s(device, repeats), "host": BATCH / median_s(host, repeats)}


LIBRARIES = {"lvseg": lvseg, "batchgeneratorsv2": batchgeneratorsv2, "monai": monai, "elasticdeform": elasticdeform}


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Rounds of one process a library and number of threads; of each the median of the rounds' medians."""
    if arguments.one:
        found = json.loads(arguments.one)
        if found["library"] == "places":
            print(json.dumps(measure_places(arguments.repeats)))
        else:
            call = LIBRARIES[found["library"]](found["threads"])
            slices = CALLS if found["library"] == "lvseg" else 1
            print(json.dumps(median_s(call, arguments.repeats, least_s=arguments.seconds) / slices))
        return []

    def measured(library: str, threads: int) -> Any:
        one = json.dumps({"library": library, "threads": threads})
        output = run_script(
            "elastic.py", "--one", one, "--repeats", arguments.repeats, "--seconds", arguments.seconds,
            environment={"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        return json.loads(output.splitlines()[-1])

    rounds: dict[tuple[str, int], list[float]] = {}
    for _ in range(arguments.rounds):
        for library in LIBRARIES:
            for threads in sorted({1, CORES}) if library != "elasticdeform" else [1]:
                rounds.setdefault((library, threads), []).append(measured(library, threads))
    best: dict[str, tuple[float, int]] = {}
    for (library, threads), times in rounds.items():
        best[library] = min(best.get(library, (float("inf"), 0)), (statistics.median(times), threads))
    ours_s, ours_threads = best["lvseg"]
    result = []
    for library, (name, least) in TARGETS.items():
        theirs_s, threads = best[library]
        figure = (
            f"{theirs_s / ours_s:.1f} times ({1e3 * ours_s:.2f} ms against {1e3 * theirs_s:.2f} ms;"
            f" threads {ours_threads} and {threads})"
        )
        what = f"elastic deformation of a slice with its mask, against {name}"
        result.append(Row(what, f"at least {least:g} times as fast", figure, theirs_s >= least * ours_s))
    places = measured("places", CORES)
    device, host = places["device"], places["host"]
    figure = f"{device / host:.1f} times ({device:.0f} against {host:.0f} slices/s)"
    what = "elastic deformation of 8 slices in the compiled step against elasticdeform in the pipeline"
    return [*result, Row(what, "", figure)]


if __name__ == "__main__":
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--repeats", type=int, default=50, help="calls, of which the median counts (default: 50)")
    command.add_argument("--seconds", type=float, default=1.0, help="at least this long (default: 1)")
    command.add_argument("--rounds", type=int, default=3, help="processes of each library, in turn (default: 3)")
    command.add_argument("--one", help=argparse.SUPPRESS)
    sys.exit(main(rows, command))
