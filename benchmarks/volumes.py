"""Made-up harmonised volumes for the benchmarks, and the shards of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorflow as tf

from lvseg import preprocess, records


def made_up(number: int, slices: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image, uint16, and mask, uint8, [slices, size, size] each: noise, since it cannot be compressed, and an organ."""
    random = np.random.default_rng(number)
    image = random.integers(0, 4096, (slices, size, size), np.uint16)
    image[0, 0, :2] = 0, 4095
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, count) for count in (slices, size, size)), indexing="ij")
    centre = random.uniform(-0.2, 0.2, 3)
    angle = np.arctan2(y - centre[1], x - centre[2])
    lobes = 0.45 + 0.08 * np.sin(3 * angle + number) + 0.03 * np.sin(11 * angle + 5 * z)
    mask = (z / 0.9) ** 2 * lobes**2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < lobes**2
    return image, mask.astype(np.uint8)


def write_shards(folder: Path, volumes: int, slices: int, size: int) -> list[Path]:
    """Shards of made-up volumes."""
    paths = []
    for number in range(volumes):
        image, mask = made_up(number, slices, size)
        statistics = preprocess.statistics(tf.constant(image.astype(np.float32)))
        volume = records.Harmonised(
            f"patient-{number}", "1", "scanner", "set", (), "", image.shape, (5.0, 1.75, 1.75), statistics,
            image.astype(np.float32), mask, None,
        )  # fmt: skip
        paths.append(folder / f"{number:04d}.tfrecord")
        records.write_shard(volume, paths[-1])
    return paths
