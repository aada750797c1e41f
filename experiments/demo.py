"""From nothing to served .vtk files, with the commands that a user has: `make demo` runs it.

Simulates patients, prepares shards, trains experiments/demo.yaml, evaluates it on held-out patients, exports it, starts
the server, sends it every held-out scan, and checks the .vtk files that come back: voxel for voxel the masks that
lvseg.predict gives, and the very numbers of summary.json. Ends the server it started.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from lvseg import biomarkers, command, metrics
from lvseg.cards import Scan, find_scans, load_card
from lvseg.config import load_experiment
from lvseg.errors import RunError
from lvseg.formats import read_volume
from lvseg.predict import newest_version

EXPERIMENT = Path("experiments/demo.yaml")
OUT = Path("demo")
SERVER_READY_S = 120.0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.splitlines()[0], epilog="Example: make demo")
    parser.add_argument("--least-dice", type=float, default=0.93, help="mean Dice that held-out patients must reach")
    parser.add_argument("--most-error", type=float, default=5.0, help="mean absolute volume error allowed, in percent")
    return command.run(parser, run_demo, None)


def run_demo(arguments: argparse.Namespace) -> int:
    """Runs the demo; 0 if everything agreed and the numbers are as good as they should be."""
    started = time.monotonic()
    experiment = load_experiment(EXPERIMENT)
    run = experiment.run_folder
    cards = [load_card(Path(path)) for path in experiment.data.datasets]
    shutil.rmtree(OUT, ignore_errors=True)

    for card, root in cards:
        simulation = card.simulate
        if simulation is None:
            raise ValueError(f"Expected a card of simulated patients, received {card.name}.")
        step(f"simulating {simulation.patients} patients in {simulation.scanner}")
        module("lvseg.phantom", "--scanner", simulation.scanner, "--patients", simulation.patients,
               "--seed", simulation.seed, "--out", root)  # fmt: skip
    step("preparing shards")
    module("lvseg.prepare", "--cfg", EXPERIMENT)
    step(f"training {experiment.train.steps} steps")
    module("lvseg.train", "--cfg", EXPERIMENT)
    step("evaluating on held-out patients")
    module("lvseg.evaluate", "--run", run, "--split", "test")
    step("exporting the model")
    module("lvseg.export", "--run", run, "--out", OUT / "models" / "volume")

    test = set(json.loads((run / "manifest.json").read_text())["split"]["test"])
    scans = [scan for card, root in cards for scan in find_scans(card, root) if scan.patient in test]
    step(f"serving {len(scans)} held-out scans")
    served = serve(scans)
    step("segmenting the same scans with lvseg.predict")
    module("lvseg.predict", "--model", OUT / "models" / "volume", "-o", OUT / "predicted", *copies(scans))
    step("checking the served .vtk files")
    problems = check(scans, served, run)

    summary = json.loads((run / "report" / "summary.json").read_text())
    for name, part in [*summary["by_scanner"].items(), ("all", summary)]:
        dice, error = part["dice"]["mean"], part["volume_ml"]["mean_absolute_error_percent"]
        if dice < arguments.least_dice or error > arguments.most_error:
            problems.append(
                f"{name}: expected a mean Dice of at least {arguments.least_dice} and an error of at most"
                f" {arguments.most_error} %, received {dice:.3f} and {error:.2f} %"
            )
    with command.atomic(OUT / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1))
    table(summary)
    print(f"\nserved masks   {OUT / 'served'}/*.vtk (open them in 3D Slicer or ParaView)")
    print(f"report         {run / 'report' / 'report.html'} (open it in a browser)")
    print(f"pictures       {run / 'report'}/overlay_*.png")
    print(f"numbers        {run / 'report'}/summary.json and patients.csv")
    print(f"TensorBoard    {Path(sys.executable).parent / 'tensorboard'} --logdir {run.parent}")
    for problem in problems:
        print(f"demo: {problem}", file=sys.stderr)
    if not problems:
        print(
            f"every served .vtk equals lvseg.predict's mask, voxel for voxel; {time.monotonic() - started:.0f} s in all"
        )
    return 1 if problems else 0


def step(name: str) -> None:
    """Says what comes next."""
    print(f"\n== {name}", flush=True)


def module(name: str, *arguments: Any) -> None:
    """Runs a command of the project as a user would; its output is the user's to see. RunError where it fails."""
    code = subprocess.run([sys.executable, "-m", name, *map(str, arguments)], check=False).returncode
    if code:
        raise RunError(f"Expected {name} to be done, received exit code {code}; what it says stands above.")


def copies(scans: list[Scan]) -> list[Path]:
    """The scans under names of their own, since every patient's file is called image.nii.gz.

    Copies, since data/raw may lie on another disk, which no link reaches.
    """
    folder = OUT / "scans"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for scan in scans:
        path = folder / f"{scan.patient}_{scan.card.scanner}.nii.gz"
        if not path.exists():
            shutil.copyfile(scan.image, path)
        paths.append(path)
    return paths


def serve(scans: list[Scan]) -> list[Path]:
    """Starts a server on a free port, sends it the scans, ends it; returns the masks that came back."""
    endpoint, access = OUT / "endpoint", OUT / "access"
    module("serving.admin", "--access", access, "allow-model", newest_version(OUT / "models" / "volume"))
    server = subprocess.Popen(
        [sys.executable, "-m", "serving.server", "--cfg", "serving/server.yaml", "--models", str(OUT / "models"),
         "--spool", str(OUT / "spool"), "--access", str(access), "--bind", "tcp://127.0.0.1:*", "--http", "127.0.0.1:0",
         "--endpoint-file", str(endpoint)]
    )  # fmt: skip
    try:
        deadline = time.monotonic() + SERVER_READY_S
        while not endpoint.exists():
            if server.poll() is not None:
                raise RunError(f"Expected a server, received its exit code {server.returncode} before it was ready.")
            if time.monotonic() > deadline:
                raise RunError(f"Expected a server, received none that was ready within {SERVER_READY_S:.0f} s.")
            time.sleep(0.1)
        paths = copies(scans)
        module("serving.client", "submit", *paths, "--model", "volume", "-o", OUT / "served",
               "--key", access / "local.json", "--server", endpoint.read_text().strip())  # fmt: skip
        return [OUT / "served" / path.name.replace(".nii.gz", ".vtk") for path in paths]
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()


def check(scans: list[Scan], served: list[Path], run: Path) -> list[str]:
    """What does not agree between served masks, lvseg.predict, the truth and the report; empty if all does."""
    problems = []
    with (run / "report" / "patients.csv").open(newline="") as file:
        report = {(row["patient"], row["scanner"]): row for row in csv.DictReader(file)}
    for scan, path in zip(scans, served, strict=True):
        mask, predicted = read_volume(path), read_volume(OUT / "predicted" / path.name)
        truth = read_volume(scan.mask).canonical()
        if not np.array_equal(mask.voxels, predicted.voxels) or not np.array_equal(mask.affine, predicted.affine):
            problems.append(f"{path} differs from lvseg.predict's mask")
        if not np.allclose(mask.affine, truth.affine, atol=1e-6):
            problems.append(f"{path} does not lie where its scan lies")
        row = report[scan.patient, scan.card.scanner]
        dice = metrics.dice(mask.voxels, truth.voxels)
        volume_ml = biomarkers.volume_ml(mask)
        if abs(dice - float(row["dice"])) > 1e-9 or abs(volume_ml - float(row["predicted_volume_ml"])) > 0.01:
            problems.append(f"{path}: Dice {dice} and {volume_ml} ml, but the report says {row}")
    return problems


def table(summary: dict[str, Any]) -> None:
    """Prints the numbers of the held-out patients."""
    print(f"\n{'scanner':<18}{'patients':>9}{'mean Dice':>11}{'volume bias':>13}{'mean abs. error':>17}")
    for name, part in [*summary["by_scanner"].items(), ("all", summary)]:
        volume = part["volume_ml"]
        print(
            f"{name:<18}{part['patients']:>9}{part['dice']['mean']:>11.3f}{volume['bias']:>10.1f} ml"
            f"{volume['mean_absolute_error_percent']:>15.2f} %"
        )


if __name__ == "__main__":
    sys.exit(main())
