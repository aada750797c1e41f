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

from lvseg import command
from lvseg.config import Experiment
from lvseg.errors import InputError
from lvseg.keys import digest, read_yaml
from lvseg.prepare import ShardSet
from lvseg.split import Split

PACKAGES = ("tensorflow", "keras", "tensorflow-addons", "numpy", "nibabel", "pydicom", "vtk")


def manifest(
    experiment: Experiment, sets: Sequence[ShardSet], split: Split, encoder_weights_sha256: str | None
) -> dict[str, Any]:
    """Everything that a run's result depends on, JSON-able; equal hashes mean equal inputs."""
    import tensorflow as tf

    shards = {shards.card.name: [row["shard_sha256"] for row in shards.rows] for shards in sets}
    return {
        "config_sha256": digest(experiment.model_dump()),
        "shards_sha256": digest(shards),
        "split_sha256": digest(asdict(split)),
        "code_sha256": code_sha256(),
        "encoder_weights_sha256": encoder_weights_sha256,
        "split": asdict(split),
        "datasets": [
            {"name": each.card.name, "licence": each.card.licence, "citation": each.card.citation} for each in sets
        ],
        "seed": experiment.seed,
        "versions": {"lvseg": _version("lvseg"), "python": platform.python_version()}
        | {package: _version(package) for package in PACKAGES},
        "hardware": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "devices": [device.name for device in tf.config.list_physical_devices()],
        },
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def check_unchanged(run: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run that goes on: the new one, with the time the run was started.

    Raises:
        InputError: CHANGED_DATA if shards or split are no longer those that the run was started with.
    """
    old = read_yaml(run / "manifest.json")
    for key, what in (("shards_sha256", "scans"), ("split_sha256", "split of patients")):
        if old.get(key) != new[key]:
            raise InputError(
                "CHANGED_DATA",
                f"Expected the {what} that the run was started with, received others than in {run / 'manifest.json'};"
                " give the experiment another name.",
            )
    return {**new, "started": old.get("started")}


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


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
