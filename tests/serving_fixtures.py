"""A server whose model is simple enough to foretell, run as the real processes; and what the tests need to drive it.

Run as a script it is that server (`server ...`) or its worker (`worker ...`): the real ones, given another loader.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LIMIT_S = 20.0
DEADLY = 6666  # a scan with this brightest voxel kills its worker
STUCK = 7777  # one with this never ends
DIGEST = "5e" * 32


def until(condition: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    """The first true value of `condition`, asked again and again; fails at the limit."""
    limit = time.monotonic() + limit_s
    while time.monotonic() < limit:
        if value := condition():
            return value
        time.sleep(0.005)
    raise AssertionError(f"not within {limit_s} s: {what}")


class BrightVoxels:
    """Marks the voxels brighter than the scan's mean. While the model's folder holds a file `hold`, it waits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info = json.loads((folder / "model.json").read_text())

    def segment(self, scan: Any, on_progress: Callable[[int, int], None] | None = None) -> Any:
        from lvseg.predict import Segmentation

        if scan.voxels.max() == DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        while (self.folder / "hold").exists() or scan.voxels.max() == STUCK:
            if on_progress:
                on_progress(0, 1)
            time.sleep(0.005)
        if on_progress:
            on_progress(1, 1)
        mask = (scan.voxels > scan.voxels.mean()).astype("uint8")
        return Segmentation(scan.with_voxels(mask), {"voxels": int(mask.sum()), "source": scan.source})


@dataclass
class Server:
    """A server that runs. `models` is its models folder, with one model, bright/3."""

    process: subprocess.Popen[str]
    endpoint: str
    models: Path
    spool: Path
    log: Path

    @property
    def hold(self) -> Path:
        """While this file exists, no scan is finished."""
        return self.models / "bright" / "3" / "hold"

    def workers(self) -> list[int]:
        """Process ids of its workers."""
        return children(self.process.pid)

    def spooled(self) -> list[Path]:
        """What lies in its spool, but for the lock and the socket's folder."""
        return [path for path in self.spool.iterdir() if path.name not in (".lock", ".ipc")]


def children(pid: int) -> list[int]:
    """Process ids of a process's living children."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not reaped does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def make_models(folder: Path) -> Path:
    """A models folder with versions 1 and 3 of `bright`, of which 3 is the newest."""
    for version in ("1", "3"):
        path = folder / "bright" / version
        path.mkdir(parents=True)
        (path / "saved_model.pb").touch()
        card = {"task": "bright", "spacing_mm": [2.0, 2.0], "size": 8, "weights_sha256": DIGEST}
        (path / "model.json").write_text(json.dumps(card))
    return folder


def write_config(folder: Path, **sections: Any) -> Path:
    """A server's file."""
    path = folder / "server.yaml"
    path.write_text(yaml.safe_dump({"limits": {"spool_free_bytes": 0}, **sections}))
    return path


def start(folder: Path, endpoint_file: Path | None = None, **sections: Any) -> subprocess.Popen[str]:
    """Starts a server in a folder that has `models`; its log goes to `log`, its standard output to a pipe."""
    arguments = ["--cfg", str(write_config(folder, **sections)), "--models", str(folder / "models")]
    arguments += ["--bind", "tcp://127.0.0.1:*", "--spool", str(folder / "spool")]
    arguments += ["--endpoint-file", str(endpoint_file or folder / "endpoint")]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, __file__, "server", *arguments], stdout=subprocess.PIPE, stderr=log, text=True
        )


@contextlib.contextmanager
def running(folder: Path, **sections: Any) -> Iterator[Server]:
    """A server that is ready, ended afterwards; fails if a process of it is left."""
    models = make_models(folder / "models")
    process = start(folder, **sections)
    try:
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], LIMIT_S)
        assert readable, (folder / "log").read_text()
        line = process.stdout.readline().split()
        assert line[:1] == ["ready"], (folder / "log").read_text()
        assert line[2:] == ["bright/3"]
        assert (folder / "endpoint").read_text().strip() == line[1]
        yield Server(process, line[1], models, folder / "spool", folder / "log")
    finally:
        workers = children(process.pid)
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(LIMIT_S)
        finally:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()
    until(lambda: not any(is_alive(pid) for pid in workers), "the workers end with their server")


def main() -> int:
    """The server or the worker."""
    from serving import server, worker

    role, *arguments = sys.argv[1:]
    if role == "worker":
        return worker.main(arguments, load=BrightVoxels)
    return server.main(arguments, worker_command=(sys.executable, __file__, "worker"))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
