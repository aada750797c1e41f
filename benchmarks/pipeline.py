"""Slices a second as they are handed to the device, stack and mask of 256 x 256: lvseg's pipeline, and MONAI's.

Both start from the same volumes, `lvseg` from its shards (in the page cache), MONAI from what its CacheDataset holds
decoded in memory. Both hand over 16 bits a pixel and leave the rest to the device. Of MONAI two ways are tried, crops
drawn by its own transforms, and views of the cached volumes cut by a function written for it, each with 0, 1 and 2
workers, of which the fastest counts.

python benchmarks/pipeline.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import Row, main, run_script

SIZE, VOLUMES, SLICES = 256, 24, 28
TARGETS = {3: 3000, 9: 2000}
SHUFFLED = 512


def slices_per_second(batches: Iterator[Any], batch_size: int, seconds: float, rounds: int = 5) -> float:
    """Median over rounds of the slices a second that an endless iterator hands over, once it is going."""
    for _ in range(max(2, 200 // batch_size)):
        next(batches)
    rates = []
    for _ in range(rounds):
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds / rounds:
            next(batches)
            count += batch_size
        rates.append(count / (time.perf_counter() - started))
    return statistics.median(rates)


def measure_lvseg(folder: Path, neighbours: int, batch_size: int, seconds: float) -> float:
    """As training does it: `next` from Python."""
    from lvseg import pipeline

    files = sorted(folder.glob("*.tfrecord"))
    reading = pipeline.Reading(SIZE, neighbours, "none", None, None)
    batches = pipeline.training_batches(files, SLICES * len(files), reading, 0, batch_size, SHUFFLED, 0)
    return slices_per_second(iter(batches), batch_size, seconds)


def measure_monai(folder: Path, neighbours: int, batch_size: int, seconds: float) -> dict[str, float]:
    """The same volumes from a CacheDataset, in every way and with 0, 1 and 2 workers."""
    import monai.transforms as mt
    import numpy as np
    import torch
    from monai.data import CacheDataset, DataLoader, Dataset, set_track_meta

    set_track_meta(False)
    torch.set_num_threads(1)  # these copies are too small to share out
    files = [{"image": str(path), "label": str(path).replace("image", "label")} for path in folder.glob("*_image.npy")]
    keys, channels = ["image", "label"], 2 * neighbours + 1

    def load(path: str) -> Any:
        voxels = np.load(path)
        # 16 bits, end slices repeated, a channel axis first; plain tensors, which MONAI handles faster than its own.
        padded = np.pad(voxels, ((neighbours, neighbours), (0, 0), (0, 0)), mode="edge")
        return torch.from_numpy(padded.view(np.int16) if voxels.dtype == np.uint16 else padded)[None]

    loading = mt.Lambdad(keys, load, track_meta=False)
    together = min(batch_size, 4)  # crops of one volume at a time
    crop = mt.RandSpatialCropSamplesd(keys, (channels, SIZE, SIZE), together, random_size=False)
    centre = mt.Lambdad("label", lambda label: label[:, neighbours], track_meta=False)
    crops = CacheDataset(files, mt.Compose([loading, crop, centre]), progress=False, copy_cache=False)

    volumes = CacheDataset(files, loading, progress=False, copy_cache=False)
    held = [volumes[number] for number in range(len(volumes))]

    def stack(place: dict[str, int]) -> dict[str, Any]:
        volume, own = held[place["volume"]], place["slice"]
        image, label = volume["image"], volume["label"]
        return {"image": image[0, own : own + channels], "label": label[:, own + neighbours]}

    stacks = Dataset([{"volume": volume, "slice": own} for volume in range(len(files)) for own in range(SLICES)], stack)

    def forever(loader: Any) -> Iterator[Any]:
        while True:
            yield from loader

    rates = {}
    for way, dataset, items in (("crops", crops, batch_size // together), ("stacks", stacks, batch_size)):
        for workers in (0, 1, 2):
            loader = DataLoader(
                dataset, batch_size=items, shuffle=True, num_workers=workers, persistent_workers=workers > 0
            )
            name = f"{way}, {workers} workers"
            rates[name] = slices_per_second(forever(loader), batch_size, seconds)
    return rates


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Every measurement in a process of its own, lvseg's and MONAI's in turn."""
    if arguments.one:
        found = json.loads(arguments.one)
        measure = {"lvseg": measure_lvseg, "monai": measure_monai}[found.pop("library")]
        print(json.dumps(measure(Path(found.pop("folder")), seconds=arguments.seconds, **found)))
        return []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_script("pipeline.py", "--write", folder)

        def measured(**found: Any) -> Any:
            one = json.dumps({"folder": str(folder), **found})
            return json.loads(run_script("pipeline.py", "--one", one, "--seconds", arguments.seconds).splitlines()[-1])

        result, ratios = [], []
        for channels, target in TARGETS.items():
            for batch_size in (1, 8):
                setting = {"neighbours": channels // 2, "batch_size": batch_size}
                ours = measured(library="lvseg", **setting)
                peers = measured(library="monai", **setting)
                what = f"{channels} channels, batch {batch_size}"
                result.append(
                    Row(f"pipeline, {what}", f"at least {target:,} slices/s", f"{ours:,.0f} slices/s", ours >= target)
                )
                for way, name, least in (("crops", "MONAI's transforms", 5.0), ("stacks", "a view of memory", None)):
                    best = max((setting for setting in peers if setting.startswith(way)), key=lambda one: peers[one])
                    times = ours / peers[best]
                    ratios.append(
                        Row(f"pipeline against CacheDataset and {name}, {what}",
                            f"at least {least:g} times" if least else "",
                            f"{times:.1f} times ({peers[best]:,.0f} slices/s; {best})",
                            times >= least if least else None)
                    )  # fmt: skip
        return result + ratios


def write(folder: Path) -> None:
    """The volumes as shards and as NumPy files."""
    import numpy as np
    from volumes import made_up, write_shards

    write_shards(folder, VOLUMES, SLICES, SIZE)
    for number in range(VOLUMES):
        image, mask = made_up(number, SLICES, SIZE)
        np.save(folder / f"{number:04d}_image.npy", image)
        np.save(folder / f"{number:04d}_label.npy", mask)


if __name__ == "__main__":
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--seconds", type=float, default=4.0, help="of each measurement (default: 4)")
    command.add_argument("--one", help=argparse.SUPPRESS)
    command.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    if "--write" in sys.argv:
        write(command.parse_args().write)
    else:
        sys.exit(main(rows, command))
