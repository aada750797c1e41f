"""The server's file, serving/server.yaml, as pydantic models: an unknown key or a wrong type is named."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pydantic

from lvseg.errors import InputError
from lvseg.keys import Keys, check_keys, read_yaml

MIB = 1024 * 1024
Folder = Annotated[Path, pydantic.Field(strict=False)]  # YAML has no paths: text is converted


class Limits(Keys):
    """What one client, and all together, may take. Sizes in bytes."""

    upload_bytes: int = pydantic.Field(default=1024 * MIB, gt=0)  # of one scan as sent
    content_bytes: int = pydantic.Field(default=2048 * MIB, gt=0)  # of one scan unpacked
    members: int = pydantic.Field(default=5000, gt=0)  # files of one DICOM series
    queue: int = pydantic.Field(default=64, gt=0)  # scans that wait
    uploads: int = pydantic.Field(default=64, gt=0)  # scans that come in at once
    jobs: int = pydantic.Field(default=4096, gt=0)  # everything the table holds, results to be fetched included
    jobs_per_client: int = pydantic.Field(default=1024, gt=0)
    submits_a_minute: int = pydantic.Field(default=600, gt=0)  # of one client
    chunk_bytes: int = pydantic.Field(default=MIB // 4, gt=0, le=MIB)
    window_bytes: int = pydantic.Field(default=4 * MIB, gt=0)  # a client may send this much ahead of what is on disk
    spool_free_bytes: int = pydantic.Field(default=512 * MIB, ge=0)  # keep this much of the spool's disk free
    worker_memory_bytes: int | None = pydantic.Field(default=None, gt=0)  # RLIMIT_DATA with models; null with a GPU
    unpacker_memory_bytes: int | None = pydantic.Field(default=8192 * MIB, gt=0)  # RLIMIT_DATA of the others


class Deadlines(Keys):
    """How long each thing may take, in seconds."""

    start_s: float = pydantic.Field(default=300, gt=0)  # a worker loads its models and warms them up
    silent_s: float = pydantic.Field(default=30, gt=0)  # without a heartbeat of the worker's process
    unpack_s: float = pydantic.Field(default=120, gt=0)
    read_s: float = pydantic.Field(default=120, gt=0)
    segment_s: float = pydantic.Field(default=1800, gt=0)
    write_s: float = pydantic.Field(default=120, gt=0)
    upload_idle_s: float = pydantic.Field(default=3600, gt=0)  # an upload that stands still is deleted
    result_keep_s: float = pydantic.Field(default=86_400, gt=0)  # a result that nobody closes is deleted
    drain_s: float = pydantic.Field(default=60, ge=0)  # at SIGTERM jobs at work may be done; others wait in the spool


class ServerConfig(Keys):
    """serving/server.yaml."""

    models: Folder = Path("models")
    bind: str = "tcp://127.0.0.1:5557"
    spool: Folder = Path("spool")
    access: Folder = Path("access")
    http: str | None = None
    workers: int = pydantic.Field(default=1, gt=0, le=64)
    devices: Annotated[list[str], pydantic.Field(min_length=1)] | None = None
    unpackers: int = pydantic.Field(default=1, gt=0, le=64)
    packers: int = pydantic.Field(default=1, gt=0, le=64)
    serve: dict[str, list[int]] = {}  # noqa: RUF012 frozen, and copied by pydantic
    limits: Limits = Limits()
    deadlines: Deadlines = Deadlines()


def load(path: Path, **override: Any) -> ServerConfig:
    """Reads the server's file.

    Args:
        path: YAML.
        override: keys from the command line; None means not given.

    Raises:
        InputError: NOT_FOUND, NOT_READABLE, or BAD_CONFIG for text that is no YAML or has a key twice, and with the key
            for a wrong value or an unknown key.
    """
    try:
        values = read_yaml(path)
    except OSError as error:
        raise InputError(
            "NOT_READABLE", f"Expected a YAML file that can be read, received '{error.strerror}' for {path}."
        ) from error
    values.update({key: value for key, value in override.items() if value is not None})
    return check_keys(ServerConfig, values, str(path))
