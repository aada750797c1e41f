"""What the service adds to inference: a scan of 55 x 256 x 256 for the report's network of width 64, to and fro.

The server is the command with its defaults (CURVE, loopback); the network has random weights, which cost the same. Bare
inference is the SavedModel's `infer` on the same batches in a process of its own. The two take turns.

python benchmarks/service.py            the scan as .nii.gz, mask back as .vtk
python benchmarks/service.py --width 4  a narrow network, to see the service's part sooner
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import ROOT, Row, main, run_script

SHAPE, SPACING_MM = (55, 256, 256), (5.0, 1.9, 1.9)
SIZE, TARGET_MM, NEIGHBOURS, BATCH = 256, (1.75, 1.75), 1, 4
ROUNDS = 3
READY_S, SCAN_S = 300.0, 1200.0
SHARE_MAX, SECONDS_MAX, INFER_MAX, MEMORY_MAX = 0.05, 0.5, 1.05, 1.2


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Rounds of the server and of bare inference by turns."""
    if arguments.one:
        print(json.dumps(bare(Path(arguments.one))))
        return []
    with tempfile.TemporaryDirectory(prefix="lvseg-") as name:
        folder = Path(name)
        run_script("service.py", "--make", folder, "--width", arguments.width)
        with server(folder) as (endpoint, worker):
            trips, bares = [], []
            for number in range(ROUNDS):
                trips.append(round_trip(endpoint, folder, f"{number}"))
                bares.append(json.loads(run_script("service.py", "--one", folder).splitlines()[-1]))
            worker_mb = resident_mb(worker)
        report_s = report_way(folder)
    return summary(trips, bares, worker_mb, report_s)


def summary(trips: list[dict[str, Any]], bares: list[dict[str, float]], worker_mb: float, report_s: float) -> list[Row]:
    """The table's rows."""
    middle = sorted(trips, key=lambda trip: trip["other"])[len(trips) // 2]
    share = statistics.median(trip["other"] / trip["total"] for trip in trips)
    ratio = statistics.median(trip["infer"] for trip in trips) / statistics.median(one["infer"] for one in bares)
    bare_mb = statistics.median(one["mb"] for one in bares)
    stages = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in middle["stages"].items())
    return [
        Row(
            "service: everything but inference, of the round trip",
            f"at most {SHARE_MAX:.0%} and {SECONDS_MAX} s",
            f"{share:.1%}, {middle['other']:.2f} s of {middle['total']:.2f} s",
            share <= SHARE_MAX and middle["other"] <= SECONDS_MAX,
        ),
        Row("service: seconds by stage", "", stages),
        Row(
            "service: inference through the server against bare", f"at most {INFER_MAX} times", f"{ratio:.2f} times",
            ratio <= INFER_MAX,
        ),
        Row(
            "service: memory of the process with the model against bare", f"at most {MEMORY_MAX} times",
            f"{worker_mb / bare_mb:.2f} times ({worker_mb:.0f} MB against {bare_mb:.0f} MB)",
            worker_mb <= MEMORY_MAX * bare_mb,
        ),
        Row("the report's way: zip with deflate, unzip, scipy's zoom there and back, zip, unzip", "",
            f"{report_s:.2f} s beside inference"),
    ]  # fmt: skip


def round_trip(endpoint: str, folder: Path, name: str) -> dict[str, Any]:
    """One scan through the server; seconds."""
    from serving.connection import Client, find_credentials

    scan = folder / f"{name}.nii.gz"
    volume = np.load(folder / "scan.npy")
    volume[0, 0, 0] += int(name) + 1  # another scan for the server, which would know it
    write(volume, scan)
    with Client(endpoint, find_credentials(folder / "access/local.json")) as client:
        began = time.perf_counter()
        _, result = client.segment(scan, "volume", folder / f"{name}.vtk", SCAN_S)
        total = time.perf_counter() - began
    stages = dict(result["seconds"])
    infer = stages["infer"]
    named = ("receive", "queue", "unpack", "read", "segment", "write")
    rest = total - sum(stages[stage] for stage in named)
    shown = {**stages, "segment beside infer": stages["segment"] - infer, "packing, sending, returning": rest}
    return {"total": total, "infer": infer, "other": total - infer, "stages": shown}


def bare(folder: Path) -> dict[str, float]:
    """Seconds of `infer` on a scan's batches, after one batch to warm up, and the process's peak memory."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(folder / "models/volume/1"))
    infer = loaded.signatures["infer"]
    random = np.random.default_rng(0)
    slices = random.uniform(0, 1000, (SHAPE[0] + 2 * NEIGHBOURS, SIZE, SIZE)).astype(np.float32)
    seconds = 0.0
    for first in range(-BATCH, SHAPE[0], BATCH):
        chosen = np.clip(np.arange(max(first, 0), max(first, 0) + BATCH), 0, SHAPE[0] - 1)
        stacks = tf.constant(np.stack([np.moveaxis(slices[one : one + 2 * NEIGHBOURS + 1], 0, -1) for one in chosen]))
        began = time.perf_counter()
        infer(stacks=stacks)["probabilities"].numpy()
        if first >= 0:
            seconds += time.perf_counter() - began
    return {"infer": seconds, "mb": resident_mb("self")}


def report_way(folder: Path) -> float:
    """Seconds of what the report's clients and server did around inference, on the same scan."""
    import nibabel
    from scipy import ndimage

    source = folder / "report.nii"
    nibabel.save(nibabel.Nifti1Image(np.load(folder / "scan.npy").transpose(2, 1, 0), np.eye(4)), source)
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        _zip(source)
        voxels = np.asarray(nibabel.load(source).dataobj)
        scale = SPACING_MM[1] / TARGET_MM[0]
        planes = [ndimage.zoom(voxels[:, :, number], scale) for number in range(voxels.shape[2])]
        masks = [(plane > plane.mean()).astype(np.uint8) for plane in planes]
        back = [ndimage.zoom(mask, voxels.shape[0] / mask.shape[0], order=0) for mask in masks]
        answer = folder / "answer.nii"
        nibabel.save(nibabel.Nifti1Image(np.stack(back, -1), np.eye(4)), answer)
        _zip(answer)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _zip(path: Path) -> None:
    """To a zip and back."""
    packed = path.with_suffix(".zip")
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, path.name)
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(path.parent)


@contextlib.contextmanager
def server(folder: Path) -> Iterator[tuple[str, int]]:
    """A server's address, and the process that holds the model."""
    arguments = ["--cfg", ROOT / "serving/server.yaml", "--models", folder / "models", "--bind", "tcp://127.0.0.1:*"]
    arguments += ["--spool", folder / "spool", "--access", folder / "access", "--http", "127.0.0.1:0"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.server", *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE,
            stderr=log, text=True,
        )  # fmt: skip
    try:
        line = process.stdout.readline().split() if process.stdout else []
        if not line:
            raise RuntimeError((folder / "log").read_text())
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        holder = next(pid for pid in children if "--kind\0segment" in Path(f"/proc/{pid}/cmdline").read_text())
        yield line[1], int(holder)
    finally:
        process.terminate()
        process.wait()


def resident_mb(pid: int | str) -> float:
    """A process's largest resident memory so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def make(folder: Path, width: int) -> None:
    """The scan, and a model of random weights."""
    from volumes import made_up

    from lvseg.export import export_model
    from lvseg.models.unet import unet

    np.save(folder / "scan.npy", made_up(0, SHAPE[0], SHAPE[1])[0])
    network = unet(SIZE, 2 * NEIGHBOURS + 1, 2, width)
    card = {
        "task": "volume", "labels": ["background", "liver"], "spacing_mm": list(TARGET_MM), "size": SIZE,
        "neighbours": NEIGHBOURS, "axis": "transversal", "batch_size": BATCH, "normalisation": "none",
        "clip_percentiles": None, "global_bounds": None,
    }  # fmt: skip
    export_model(network, card, folder / "models/volume/1")


def write(voxels: np.ndarray[Any, Any], path: Path) -> None:
    """A scan of that spacing."""
    from lvseg.formats import write_volume
    from lvseg.volume import Volume

    affine = np.diag([*SPACING_MM, 1.0])[[2, 1, 0, 3]]
    write_volume(Volume(voxels.astype(np.int16), affine), path)


if __name__ == "__main__":
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--width", type=int, default=64, help="of the network")
    command.add_argument("--one", help=argparse.SUPPRESS)
    command.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    if (options := command.parse_known_args()[0]).make:
        make(options.make, options.width)
        sys.exit(0)
    sys.exit(main(rows, command))
