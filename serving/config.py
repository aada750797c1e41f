"""The server's file, serving/server.yaml, as pydantic models: an unknown key or a wrong type is named."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

import pydantic

from lvseg.errors import InputError
from lvseg.keys import parse_yaml

MIB = 1024 * 1024
Folder = Annotated[Path, pydantic.Field(strict=False)]  # YAML has no paths: text is converted


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class Limits(_Strict):
    """What one client, and all together, may take. Sizes in bytes."""

    upload_bytes: int = pydantic.Field(default=1024 * MIB, gt=0)  # of one scan as sent
    content_bytes: int = pydantic.Field(default=2048 * MIB, gt=0)  # of one scan unpacked
    members: int = pydantic.Field(default=5000, gt=0)  # files of one DICOM series
    queue: int = pydantic.Field(default=64, gt=0)  # scans that wait
    uploads: int = pydantic.Field(default=16, gt=0)  # scans that come in at once
    jobs: int = pydantic.Field(default=1024, gt=0)  # everything the table holds, results to be fetched included
    chunk_bytes: int = pydantic.Field(default=MIB // 4, gt=0, le=MIB)
    window_bytes: int = pydantic.Field(default=4 * MIB, gt=0)  # a client may send this much ahead of what is on disk
    spool_free_bytes: int = pydantic.Field(default=512 * MIB, ge=0)  # keep this much of the spool's disk free
    worker_memory_bytes: int | None = pydantic.Field(default=None, gt=0)  # RLIMIT_DATA of a worker; null with a GPU


class Deadlines(_Strict):
    """How long each thing may take, in seconds."""

    start_s: float = pydantic.Field(default=300, gt=0)  # a worker loads its models and warms them up
    silent_s: float = pydantic.Field(default=30, gt=0)  # without a heartbeat of the worker's process
    unpack_s: float = pydantic.Field(default=120, gt=0)
    read_s: float = pydantic.Field(default=120, gt=0)
    segment_s: float = pydantic.Field(default=1800, gt=0)
    write_s: float = pydantic.Field(default=120, gt=0)
    upload_idle_s: float = pydantic.Field(default=60, gt=0)  # an upload that stands still is deleted
    result_keep_s: float = pydantic.Field(default=3600, gt=0)  # a result that nobody closes is deleted


class ServerConfig(_Strict):
    """serving/server.yaml."""

    models: Folder = Path("models")
    bind: str = "tcp://127.0.0.1:5557"
    spool: Folder = Path("spool")
    workers: int = pydantic.Field(default=1, gt=0, le=64)
    limits: Limits = Limits()
    deadlines: Deadlines = Deadlines()


def load(path: Path, **override: Any) -> ServerConfig:
    """Reads the server's file.

    Args:
        path: YAML.
        override: keys from the command line; None means not given.

    Raises:
        InputError: NOT_FOUND, or BAD_CONFIG for text that is no YAML or has a key twice, and with the key for a wrong
            value or an unknown key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            "NOT_FOUND", f"Expected the server's configuration, received '{error.strerror}' for {path}."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError("BAD_CONFIG", f"Expected YAML in UTF-8, received other bytes in {path}.") from error
    values = parse_yaml(text, str(path))
    if values is None:  # nothing but comments: everything by default
        values = {}
    if not isinstance(values, dict):
        raise InputError("BAD_CONFIG", f"Expected keys with values, received {type(values).__name__} in {path}.")
    values.update({key: value for key, value in override.items() if value is not None})
    try:
        return ServerConfig.model_validate(values)
    except pydantic.ValidationError as error:
        raise InputError("BAD_CONFIG", f"{_explained(error.errors()[0])} in {path}.") from error


def _explained(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"Expected for '{key}': {error['msg'].lower()}, received {error['input']!r}"
    section: Any = ServerConfig
    for part in error["loc"][:-1]:
        section = section.model_fields[part].annotation
    known = list(section.model_fields)
    near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
    return f"Expected a known key, received '{key}' ({hint})"
