"""The worker processes: started, watched, exchanged and ended. No process started here outlives the gate.

Three kinds, one for each of `jobs.STEPS`, so that one scan is unpacked while another is on the device:

    unpack   upload -> voxels     no TensorFlow, limited by the kernel in memory, time, files
    segment  voxels -> labels     holds the models; one a device
    pack     labels -> files      as unpack

A change of the models is a new generation of `segment` processes beside the old ones, which serve until the new ones
are ready, and go on where the new ones fail: no process ever unloads a model, so no memory stays behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from serving import jobs, protocol
from serving.catalogue import Entry
from serving.jobs import Job

if TYPE_CHECKING:
    from serving.config import ServerConfig

WORKER_COMMAND = (sys.executable, "-m", "serving.worker")
UNPACK, SEGMENT, PACK = range(len(jobs.STEPS))
STARTS_MAX = 3  # of a kind of worker that ends before it is ready, in a row
RESTART_MAX_S = 30.0
DOUBLINGS_MAX = 5  # of the time before another start, which is RESTART_MAX_S then; a thousand have no room in a float
REAP_S = 5.0  # a killed process that the kernel cannot end is left behind

log = logging.getLogger("serving.crew")


@dataclass(eq=False)
class Worker:
    """One process. Times are of the monotonic clock, in seconds.

    Args:
        identity: its routing id, drawn anew for each process, so that a dead one's last words are told apart.
        process: for signals and the exit status.
        step: index in jobs.STEPS of what it does.
        generation: of the models that it holds.
        place: which of its kind it is, and so its device.
        heard: time of the last message.
        began: time its present stage began; while it is not ready, the time it was started.
        ready: it takes work.
        served: all that it has loaded.
        job: what it works on.
        stage: of that job.
    """

    identity: bytes
    process: subprocess.Popen[bytes]
    step: int
    generation: int
    place: int
    heard: float
    began: float
    ready: bool = False
    served: tuple[protocol.Model, ...] = ()
    failed: list[protocol.Unable] = field(default_factory=list)
    job: Job | None = None
    stage: str = "start"

    def holds(self, job: Job) -> bool:
        """Whether it has the model version that is to do a job."""
        return job.model in self.served


@dataclass
class Generation:
    """A set of models, and the processes that hold it or are to."""

    number: int
    entries: tuple[Entry, ...]
    failed_starts: int = 0


class Crew:
    """All worker processes of a gate.

    Args:
        config: the server's file.
        endpoint: ZeroMQ address of the gate's side for workers.
        spool: absolute.
        command: what to start as a worker, WORKER_COMMAND but for tests.
    """

    def __init__(self, config: ServerConfig, endpoint: str, spool: Path, command: Sequence[str]) -> None:
        self._config = config
        self._endpoint = endpoint
        self._spool = spool
        self._command = command
        self._workers: dict[bytes, Worker] = {}
        self._failed_starts = dict.fromkeys(range(len(jobs.STEPS)), 0)
        self._restart_at = dict.fromkeys(range(len(jobs.STEPS)), 0.0)
        self.serving: Generation | None = None
        self.coming: Generation | None = None
        self.reload_failed: str | None = None
        self._generations = 0

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._workers.values()))

    def get(self, identity: bytes) -> Worker | None:
        """The worker of a routing id, or None for one that was given up."""
        return self._workers.get(identity)

    # ---- what is there

    @property
    def models(self) -> tuple[protocol.Model, ...]:
        """What clients can ask for now, in the order of the list: of each model the current version first."""
        serving = self.serving
        held = {one for worker in self if worker.ready and self._is_current(worker) for one in worker.served}
        return tuple(entry.served for entry in serving.entries if entry.served in held) if serving else ()

    @property
    def lacking(self) -> tuple[Entry, ...]:
        """What should be served and is not, though its processes are ready."""
        serving = self.serving
        models = self.models
        return tuple(one for one in serving.entries if one.served not in models) if serving and models else ()

    @property
    def ready(self) -> bool:
        """Whether a scan would be done now: each kind of worker is there."""
        return all(any(one.ready and one.step == step and self._is_current(one) for one in self) for step in
                   range(len(jobs.STEPS)))  # fmt: skip

    def count(self, step: int) -> int:
        """How many processes of a kind there are to be."""
        if step == SEGMENT:
            return len(self._config.devices) if self._config.devices is not None else self._config.workers
        return self._config.unpackers if step == UNPACK else self._config.packers

    def idle(self, step: int) -> Iterator[Worker]:
        """Workers that can take a job for a step."""
        for worker in self:
            if worker.step == step and worker.ready and worker.job is None and self._is_current(worker):
                yield worker

    def busy(self) -> bool:
        """Whether any worker has a job."""
        return any(worker.job is not None for worker in self)

    # ---- models

    def bring(self, entries: tuple[Entry, ...]) -> None:
        """Loads a set of models in processes of its own; they take over once they are ready."""
        self._end_generation(self.coming)
        self.coming = None
        if not entries:
            self.reject("Expected an allowed model, received none (python -m serving.admin allow-model).")
            return
        self._generations += 1
        self.coming = Generation(self._generations, entries)
        self.reload_failed = None
        self._restart_at[SEGMENT] = 0.0
        log.info("models wanted: %s", ", ".join(f"{one.model}/{one.version}" for one in entries))

    def became_ready(self, worker: Worker, models: tuple[protocol.Model, ...]) -> bool:
        """A worker is ready; exchanges the generations where all of the coming one are.

        Returns:
            Whether it is of use: one that was started again for models that are served, and has none, is not.
        """
        serving = self.serving
        if worker.step == SEGMENT and serving and worker.generation == serving.number and not models:
            return False
        worker.ready, worker.stage = True, "idle"
        worker.served = models
        self._failed_starts[worker.step] = 0
        coming = self.coming
        if worker.step != SEGMENT or coming is None or worker.generation != coming.number:
            return True
        refused = self._refusal(worker)
        if refused is not None:
            self.reject(refused)
            return True
        mine = [one for one in self if one.step == SEGMENT and one.generation == coming.number]
        if len(mine) == self.count(SEGMENT) and all(one.ready for one in mine):
            old, self.serving, self.coming = self.serving, coming, None
            log.info("models served: %s", ", ".join(f"{one.name}/{one.version}" for one in models) or "none")
            self._end_generation(old)
        return True

    def _refusal(self, worker: Worker) -> str | None:
        """Why a worker of the coming generation may not take over, if so.

        At the start a model that fails costs that model alone. Later it must not take the place of one that works;
        a version that is lacking already does not, and keeps no other from being changed.
        """
        if worker.served and self.serving is None:
            return None
        lacking = {(one.model, one.version) for one in self.lacking} if worker.served else set()
        return next((one.text for one in worker.failed if (one.model, one.version) not in lacking), None)

    def reject(self, why: str) -> None:
        """Gives up the coming generation; what is served stays."""
        log.error("models not taken: %s", why)
        self.reload_failed = why
        self._end_generation(self.coming)
        self.coming = None

    def _end_generation(self, generation: Generation | None) -> None:
        """Ends a generation's idle processes; one with a job ends when that is done (see `release`)."""
        if generation is None:
            return
        for worker in self:
            if worker.step == SEGMENT and worker.generation == generation.number and worker.job is None:
                self.dismiss(worker)

    def release(self, worker: Worker) -> None:
        """A worker has done its job; one whose models were replaced meanwhile is not needed any more."""
        worker.job, worker.stage = None, "idle"
        if not self._is_current(worker):
            self.dismiss(worker)

    def _is_current(self, worker: Worker) -> bool:
        return worker.step != SEGMENT or (self.serving is not None and worker.generation == self.serving.number)

    # ---- processes

    def start_missing(self, now: float) -> None:
        """Starts the processes that should be there and are not."""
        wanted: list[tuple[int, Generation | None]] = [(UNPACK, None), (PACK, None)]
        wanted += [(SEGMENT, generation) for generation in (self.serving, self.coming) if generation is not None]
        for step, generation in wanted:
            number = generation.number if generation else 0
            taken = {worker.place for worker in self if worker.step == step and worker.generation == number}
            for place in sorted(set(range(self.count(step))) - taken):
                if now >= self._restart_at[step]:
                    self._start(step, generation, place, now)

    def excuse(self, gap_s: float) -> None:
        """The gate itself stood still for so long: no worker is silent or slow for that."""
        for worker in self:
            worker.heard += gap_s
            worker.began += gap_s

    def silent_or_stuck(self, now: float) -> list[tuple[Worker, str]]:
        """Workers that are dead, silent or get no further, and what is wrong with each."""
        deadlines = self._config.deadlines
        found = []
        for worker in self:
            stage_s = getattr(deadlines, f"{worker.stage}_s", None)
            if worker.process.poll() is not None:
                found.append((worker, f"ended with status {worker.process.returncode}"))
            elif now - worker.heard > (deadlines.silent_s if worker.ready else deadlines.start_s):
                found.append((worker, "silent"))
            elif stage_s is not None and now - worker.began > stage_s:
                found.append((worker, f"stuck at {worker.stage}"))
        return found

    def lose(self, worker: Worker, now: float) -> bool:
        """Ends a process that failed; whether it is worth another one after so many that never got ready."""
        self.dismiss(worker, at_once=True)
        if worker.ready:
            return True
        self._failed_starts[worker.step] += 1
        failed = self._failed_starts[worker.step]
        self._restart_at[worker.step] = now + min(RESTART_MAX_S, 2.0 ** min(failed - 1, DOUBLINGS_MAX))
        coming = self.coming
        if coming is not None and worker.step == SEGMENT and worker.generation == coming.number:
            coming.failed_starts += 1
            if coming.failed_starts < STARTS_MAX:
                return True
            text = f"Expected a process that loads the models, received {STARTS_MAX} that ended before; see above."
            self.reject(text)
            return self.serving is not None
        return failed < STARTS_MAX or self.serving is not None

    def dismiss(self, worker: Worker, at_once: bool = False) -> None:
        """Ends a process, stopped ones included, and reaps it."""
        del self._workers[worker.identity]
        end([worker], 0.0 if at_once else 3.0)

    def end(self) -> None:
        """Ends all processes."""
        end(list(self._workers.values()))
        self._workers.clear()

    def _start(self, step: int, generation: Generation | None, place: int, now: float) -> None:
        config = self._config
        identity = secrets.token_hex(8)
        arguments = ["--kind", jobs.STEPS[step], "--endpoint", self._endpoint, "--identity", identity]
        arguments += ["--spool", str(self._spool), "--members", str(config.limits.members)]
        memory_bytes = config.limits.worker_memory_bytes if step == SEGMENT else config.limits.unpacker_memory_bytes
        if memory_bytes:
            arguments += ["--memory-bytes", str(memory_bytes)]
        if step != SEGMENT:
            stage_s = max(config.deadlines.unpack_s + config.deadlines.read_s, config.deadlines.write_s)
            arguments += ["--job-cpu-s", str(int(stage_s) + 1)]
            arguments += ["--content-bytes", str(config.limits.content_bytes)]
        for entry in generation.entries if generation else ():
            folder = config.models.resolve() / entry.model / str(entry.version)
            arguments += ["--model", f"{entry.model}/{entry.version}/{entry.sha256}={folder}"]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        if step == SEGMENT and config.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = config.devices[place]
        try:
            process = subprocess.Popen(
                [*self._command, *arguments],
                stdin=subprocess.PIPE,  # never written to: the worker ends when it closes
                stdout=sys.stderr.fileno(),  # the server's own standard output carries the ready line alone
                env=environment,
                start_new_session=True,  # Ctrl-C in a terminal goes to the gate, which ends its workers itself
            )
        except OSError as error:  # too many processes or files, or no memory: that may pass
            log.error("no process to %s can be started: %s", jobs.STEPS[step], error.strerror)
            self._restart_at[step] = now + RESTART_MAX_S / 10
            return
        number = generation.number if generation else 0
        self._workers[identity.encode()] = Worker(identity.encode(), process, step, number, place, heard=now, began=now)


def end(workers: Sequence[Worker], patience_s: float = 3.0, clock: Callable[[], float] = time.monotonic) -> None:
    """Ends processes, with SIGKILL where SIGTERM does not do within `patience_s`, and reaps them."""
    for worker in workers:
        worker.process.terminate()
    limit = clock() + patience_s
    for worker in workers:
        try:
            worker.process.wait(max(0.0, limit - clock()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(REAP_S)
        if worker.process.stdin:
            worker.process.stdin.close()
