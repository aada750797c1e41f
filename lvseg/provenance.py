"""What made a run: hashes, versions, seed and hardware, as `manifest.json` and inside `model.json`."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tensorflow as tf

from lvseg import command
from lvseg.config import Experiment
from lvseg.devices import Cluster
from lvseg.errors import InputError
from lvseg.keys import digest, read_json
from lvseg.models.vgg import EncoderWeights
from lvseg.prepare import ShardSet
from lvseg.split import SCAN_DIGITS, Split

PACKAGES = ("tensorflow", "keras", "tensorflow-addons", "numpy", "nibabel", "pydicom", "vtk")


def manifest(
    experiment: Experiment,
    sets: Sequence[ShardSet],
    split: Split,
    encoder_weights: EncoderWeights | None,
    cluster: Cluster,
    started_from: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that a run's result depends on, JSON-able; equal hashes mean equal inputs."""
    shards = {shards.card.name: [row["shard_sha256"] for row in shards.rows] for shards in sets}
    made = {
        "config_sha256": digest(experiment.model_dump()),
        "shards_sha256": digest(shards),
        "split_sha256": digest(asdict(split)),
        "code_sha256": code_sha256(),
        "encoder_weights": encoder_weights.facts() if encoder_weights else None,
        "started_from": started_from,
        "split": asdict(split),
        "scans_sha256": {part: _scans(sets, patients) for part, patients in asdict(split).items()},
        "datasets": [each.card.source for each in sets],
        "seed": experiment.seed,
        "versions": {"lvseg": _version("lvseg"), "python": platform.python_version()}
        | {package: _version(package) for package in PACKAGES},
        "hardware": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "devices": [_device(device) for device in tf.config.list_physical_devices()],
            "machines": cluster.workers,
            "devices_used_of_each": cluster.replicas,
        },
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return {**made, "sessions": [session(made, 0)]}


def continued(run: Path, new: dict[str, Any], step: int) -> dict[str, Any]:
    """The manifest of a run that goes on: the new one, with the start of the run and all its sessions.

    Args:
        run: folder; new: of `manifest`; step: the run goes on from.

    Returns:
        `new` with `started` of the first session and `sessions`, one a start of the command, each with the step it
        began at, its time, code, versions and hardware.

    Raises:
        InputError: CHANGED_DATA if shards or split are no longer those that the run was started with.
    """
    old = read_json(run / "manifest.json")
    for key, what in (
        ("shards_sha256", "scans"),
        ("split_sha256", "split of patients"),
        ("encoder_weights", "encoder weights"),
    ):
        if old.get(key) != new[key]:
            raise InputError(
                "CHANGED_DATA",
                f"Expected the {what} that the run was started with, received others than in {run / 'manifest.json'};"
                " give the experiment another name.",
            )
    sessions = old.get("sessions", [])
    last = sessions[-1] if sessions else old
    changed = [key for key in ("code_sha256", "versions", "hardware") if last.get(key) != new[key]]
    if changed:
        print(f"note: {', '.join(changed)} changed since the run was last worked on; manifest.json keeps both")
    return {**new, "started": old.get("started"), "sessions": [*sessions, session(new, step)]}


def session(manifest: dict[str, Any], step: int) -> dict[str, Any]:
    """What one start of the command adds to a run's `sessions`."""
    return {"first_step": step, **{key: manifest[key] for key in ("started", "code_sha256", "versions", "hardware")}}


def finished(manifest: dict[str, Any], weights_sha256: str) -> dict[str, Any]:
    """The manifest of a run whose model is exported."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {**manifest, "weights_sha256": weights_sha256, "finished": True, "finished_at": now}


def code_sha256() -> str:
    """sha256 over the library's source files, in the order of their names."""
    folder = Path(__file__).parent
    sources = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        sources.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return sources.hexdigest()


def write(run: Path, manifest: dict[str, Any]) -> None:
    """Writes a run's manifest.json."""
    with command.atomic(run / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _scans(sets: Sequence[ShardSet], patients: Sequence[str]) -> list[str]:
    """What tells the scans of some patients from others, whatever they are called."""
    chosen = set(patients)
    return sorted(
        {row["voxels_sha256"][:SCAN_DIGITS] for shards in sets for row in shards.rows if row["patient"] in chosen}
    )


def _device(device: tf.config.PhysicalDevice) -> str:
    details = tf.config.experimental.get_device_details(device)
    return f"{device.device_type} {details.get('device_name', platform.machine())}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
