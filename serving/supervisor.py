"""Worker processes: started, watched and ended. No process that this one started outlives it (see serving.worker)."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.jobs import Job

WORKER_COMMAND = (sys.executable, "-m", "serving.worker")


@dataclass
class Worker:
    """One process. Times are of the monotonic clock, in seconds.

    Args:
        identity: its routing id, drawn anew for each process, so that a dead one's last words are told apart.
        process: for signals and the exit status.
        heard: time of the last message.
        began: time its present stage began; while it is not ready, the time it was started.
        ready: its models are loaded and warm.
        job: what it works on.
        stage: of that job.
    """

    identity: bytes
    process: subprocess.Popen[bytes]
    heard: float
    began: float
    ready: bool = False
    job: Job | None = None
    stage: str = "start"


def start(
    command: Sequence[str],
    endpoint: str,
    spool: Path,
    models: Mapping[str, Path],
    members: int,
    memory_bytes: int | None,
    now: float,
) -> Worker:
    """Starts one worker.

    Args:
        command: what to run; WORKER_COMMAND but for tests.
        endpoint: ZeroMQ address of the gate's side for workers.
        spool: the spool folder.
        models: version folder of each model's name.
        members: limit for the files of a series.
        memory_bytes: limit for the process, or None.
        now: monotonic time.
    """
    identity = secrets.token_hex(8)
    arguments = ["--endpoint", endpoint, "--identity", identity, "--spool", str(spool), "--members", str(members)]
    for name, path in models.items():
        arguments += ["--model", f"{name}={path}"]
    if memory_bytes:
        arguments += ["--memory-bytes", str(memory_bytes)]
    process = subprocess.Popen(
        [*command, *arguments],
        stdin=subprocess.PIPE,  # never written to: the worker ends when it closes
        stdout=sys.stderr.fileno(),  # the server's own standard output carries the ready line alone
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        start_new_session=True,  # Ctrl-C in a terminal goes to the gate, which ends its workers itself
    )
    return Worker(identity.encode(), process, heard=now, began=now)


def end(workers: Sequence[Worker], patience_s: float = 3.0) -> None:
    """Ends processes, with SIGKILL where SIGTERM does not do within `patience_s`, and reaps them."""
    for worker in workers:
        worker.process.terminate()
    limit = time.monotonic() + patience_s
    for worker in workers:
        try:
            worker.process.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
        if worker.process.stdin:
            worker.process.stdin.close()


def kill(worker: Worker) -> None:
    """Ends a process that no longer answers, stopped ones included, and reaps it."""
    worker.process.kill()
    worker.process.wait()
    if worker.process.stdin:
        worker.process.stdin.close()
