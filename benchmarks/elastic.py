"""Elastic deformation of slices and masks where the network computes, against elasticdeform on the host.

Both deform batches of 8 slices of 256 x 256 with 3 channels on this machine's processors; on an accelerator the first
costs the host nothing.

python benchmarks/elastic.py
"""

from __future__ import annotations

import argparse
import sys

from measure import Row, main, median_s

SIZE, CHANNELS, BATCH, SIGMA_PX, GRID = 256, 3, 8, 8.0, 8


def rows(arguments: argparse.Namespace) -> list[Row]:
    """The same samples and seeds for both."""
    import tensorflow as tf

    from lvseg import augment

    seeds = augment.sample_seeds(0, augment.ELASTIC_STREAM, 0, tf.range(BATCH))
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

    ours, theirs = (BATCH / median_s(call, arguments.repeats) for call in (device, host))
    figure = f"{ours / theirs:.1f} times ({ours:.0f} against {theirs:.0f} slices/s)"
    return [Row("elastic deformation in the compiled step against elasticdeform on the host", "", figure)]


if __name__ == "__main__":
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--repeats", type=int, default=15, help="of which the median counts (default: 15)")
    sys.exit(main(rows, command))
