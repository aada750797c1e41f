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

sys.path.insert(0, str(Path(__file__).parents[1]))  # where it runs as a script

from serving.connection import Client

LIMIT_S = 20.0
DEADLY = 6666  # a scan with this brightest voxel kills its worker
STUCK = 7777  # one with this never ends
CRASHING = b"a file that takes its parser down"  # how a file begins whose reader dies
DIGEST = "5e" * 32
HOLD, RUNS, SHORT = ".hold", ".runs", ".short"  # in the models folder, whose versions may not change


def until(condition: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    """The first true value of `condition`, asked again and again; fails at the limit."""
    limit = time.monotonic() + limit_s
    while time.monotonic() < limit:
        if value := condition():
            return value
        time.sleep(0.005)
    raise AssertionError(f"not within {limit_s} s: {what}")


class ResourceExhaustedError(Exception):
    """What TensorFlow calls a device without memory."""


SHORTAGES = {error.__name__: error for error in (MemoryError, ResourceExhaustedError)}


class BrightVoxels:
    """Marks the voxels brighter than the scan's mean.

    While the models folder holds a file `.hold`, it waits; while it holds `.short`, whose content is the name of an
    error, it fails with that.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info = json.loads((folder / "model.json").read_text())
        if self.info.get("broken"):
            raise ValueError("a model that does not load")

    def segment(
        self, scan: Any, on_progress: Callable[[int, int], None] | None = None, *, modality: str | None = None
    ) -> Any:
        from lvseg.predict import Segmentation

        with (self.folder.parents[1] / RUNS).open("a") as runs:
            runs.write(f"{self.folder.name} {scan.source}\n")
        if (short := self.folder.parents[1] / SHORT).exists():
            raise SHORTAGES[short.read_text()]("no memory")
        if scan.voxels.max() == DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        while (self.folder.parents[1] / HOLD).exists() or scan.voxels.max() == STUCK:
            if on_progress:
                on_progress(0, 1)
            time.sleep(0.005)
        if on_progress:
            on_progress(1, 1)
        mask = (scan.voxels > scan.voxels.mean()).astype("uint8")
        return Segmentation(scan.with_voxels(mask), {"voxels": int(mask.sum()), "source": scan.source})


@dataclass
class Server:
    """A server that runs. `models` is its models folder, with one model, bright, of which version 3 is current."""

    process: subprocess.Popen[str]
    endpoint: str
    models: Path
    spool: Path
    log: Path

    @property
    def hold(self) -> Path:
        """While this file exists, no scan is finished."""
        return self.models / HOLD

    @property
    def short(self) -> Path:
        """While this file holds the name of an error, every scan fails with that."""
        return self.models / SHORT

    def runs(self, name: str) -> list[int]:
        """The model versions that scans of a name were given to, one an attempt."""
        lines = (self.models / RUNS).read_text().splitlines() if (self.models / RUNS).exists() else []
        return [int(line.split(" ", 1)[0]) for line in lines if line.split(" ", 1)[1] == name]

    def workers(self, kind: str = "segment") -> list[int]:
        """Process ids of its workers of a kind."""
        return [pid for pid in children(self.process.pid) if f"--kind\0{kind}\0" in command_of(pid)]

    def connect(self, **how: Any) -> Client:
        """A client of it."""
        return Client(self.endpoint, insecure=True, **how)

    def spooled(self) -> list[Path]:
        """What lies in its spool, but for the lock, the socket's folder, the sign of life and the database."""
        own = (".lock", ".ipc", ".alive", "jobs.sqlite", "jobs.sqlite-wal", "jobs.sqlite-shm")
        return [path for path in self.spool.iterdir() if path.name not in own]


def children(pid: int) -> list[int]:
    """Process ids of a process's living children."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def command_of(pid: int) -> str:
    """A process's command line, its words apart by NUL."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def state_of(pid: int) -> str:
    """A process's state as ps(1) has it, such as T for stopped; Z, as for one that was not reaped, for none."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return "Z"


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not reaped does not."""
    return state_of(pid) != "Z"


def memory_bytes(pid: int, what: str = "VmRSS") -> int:
    """A process's resident memory, or its peak (VmHWM)."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith(what + ":")]
    return 1024 * int(line.split()[1])


def make_models(folder: Path) -> Path:
    """A models folder with versions 1 and 3 of `bright`, of which 3 is the newest."""
    for version in (1, 3):
        make_version(folder, version)
    return folder


def make_version(models: Path, version: int, **card: Any) -> Path:
    """One more version of `bright`."""
    path = models / "bright" / str(version)
    path.mkdir(parents=True)
    (path / "saved_model.pb").touch()
    facts = {"task": "bright", "spacing_mm": [2.0, 2.0], "size": 8, "weights_sha256": DIGEST, **card}
    facts.setdefault("labels", ["background", "bright"])
    (path / "model.json").write_text(json.dumps(facts))
    return path


def write_config(folder: Path, **sections: Any) -> Path:
    """A server's file."""
    path = folder / "server.yaml"
    path.write_text(yaml.safe_dump({"limits": {"spool_free_bytes": 0}, **sections}))
    return path


def start(
    folder: Path, endpoint_file: Path | None = None, secure: bool = False, port: str = "*", **sections: Any
) -> subprocess.Popen[str]:
    """Starts a server in a folder that has `models`; its log goes to `log`, its standard output to a pipe."""
    arguments = ["--cfg", str(write_config(folder, **sections)), "--models", str(folder / "models")]
    arguments += [
        "--bind",
        f"tcp://127.0.0.1:{port}",
        "--spool",
        str(folder / "spool"),
        "--access",
        str(folder / "access"),
    ]
    arguments += [] if secure else ["--insecure"]
    arguments += ["--endpoint-file", str(endpoint_file or folder / "endpoint")]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, __file__, "server", *arguments], stdout=subprocess.PIPE, stderr=log, text=True
        )


@contextlib.contextmanager
def running(folder: Path, **how: Any) -> Iterator[Server]:
    """A server that is ready, ended afterwards; fails if a process of it is left.

    In a folder in which one ran before, it is that one started again. `how` is as for `start`.
    """
    models = folder / "models" if (folder / "models").exists() else make_models(folder / "models")
    process = start(folder, **how)
    try:
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], LIMIT_S)
        assert readable, (folder / "log").read_text()
        line = process.stdout.readline().split()
        assert line[:1] == ["ready"], (folder / "log").read_text()
        assert line[2].startswith("bright/")
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


def _read_as_a_parser_with_a_fault() -> None:
    """Lets the reader die of files that begin with CRASHING, as one in C may of some other bytes."""
    from lvseg import predict

    read = predict.read_scan

    def read_or_die(path: Path, *how: Any) -> Any:
        with contextlib.suppress(OSError):  # which is for the reader to say
            if path.is_file() and path.read_bytes().startswith(CRASHING):
                os.abort()
        return read(path, *how)

    predict.read_scan = read_or_die


def main() -> int:
    """The server or the worker."""
    from serving import server, worker

    role, *arguments = sys.argv[1:]
    if role == "worker":
        _read_as_a_parser_with_a_fault()
        return worker.main(arguments, load=BrightVoxels)
    return server.main(arguments, worker_command=(sys.executable, __file__, "worker"))


if __name__ == "__main__":
    sys.exit(main())
