"""One function over many items: in processes of this machine, or on a Ray cluster through joblib's Ray backend.

Items and results should be small (paths and rows, not voxels): they cross the border between processes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError

from lvseg.errors import InputError, RunError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Ray's backend returns a batch of results at a time; one of this many items a worker shows progress often enough.
BATCH_PER_WORKER = 4
CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Engine:
    """Where work is done.

    Args:
        name: "local" for processes of this machine, "ray" for a Ray cluster.
        jobs: processes, -1 for one a core (of the machine or of the cluster).
        address: of a running Ray cluster; None starts one on this machine, or takes the one that RAY_ADDRESS names.
    """

    name: Literal["local", "ray"] = "local"
    jobs: int = -1
    address: str | None = None


def each(function: Callable[[Item], Result], items: Sequence[Item], engine: Engine) -> Iterator[Result]:
    """Yields function(item) for every item, in order.

    Every process but the calling one computes with a single thread, so that as many processes as cores do not get into
    each other's way, and without a GPU, whose memory the first of them would take for minutes. It keeps what it
    imported from one item to the next.

    Args:
        function: of a module, so that other processes can import it.

    Raises:
        InputError: MISSING_PACKAGE without Ray, UNREACHABLE for a cluster that does not answer; and whatever
            `function` raises.
        RunError: a process of this machine was killed, or crashed.
    """
    if not items:
        return
    if engine.name == "ray":
        yield from _each_on_ray(function, items, engine)
        return
    jobs = engine.jobs if engine.jobs < 0 else min(engine.jobs, len(items))
    tasks = (joblib.delayed(_call)(function, item, _process()) for item in items)
    try:
        yield from joblib.Parallel(n_jobs=jobs, return_as="generator")(tasks)
    except TerminatedWorkerError as error:
        raise RunError(
            "Expected processes that end by themselves, received one that was killed, most likely for want of memory;"
            " lvseg.prepare and lvseg.phantom with fewer of them (--jobs) go on where this ended."
        ) from error


def single_thread() -> None:
    """Keeps TensorFlow in this process to one thread; without effect once it has computed something."""
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ.setdefault(name, "1")


def _process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def _call(function: Callable[[Any], Any], item: Any, caller: tuple[str, int]) -> Any:
    if _process() != caller:
        single_thread()
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    return function(item)


@contextlib.contextmanager
def session(engine: Engine) -> Iterator[None]:
    """Within the block one connection to the Ray cluster serves every `each`; nothing is done for a local engine.

    Raises:
        InputError: MISSING_PACKAGE, UNREACHABLE.
    """
    if engine.name == "local":
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about a study leaves for Ray's makers
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise InputError(
            "MISSING_PACKAGE",
            "Expected the package ray for --engine ray, received none; install it with: pip install 'lvseg[cluster]'.",
        ) from error
    started = not ray.is_initialized()
    if started:
        try:
            _check_answers(engine.address)
            ray.init(address=engine.address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                "UNREACHABLE",
                f"Expected a Ray cluster at {engine.address or 'RAY_ADDRESS or on this machine'}, received"
                f" '{' '.join(str(error).split()).rstrip('.')}'.",
            ) from error
    register_ray()
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def _check_answers(address: str | None) -> None:
    """Raises OSError where nobody listens at host:port, which Ray by itself takes minutes to notice."""
    match = re.fullmatch(r"(?:ray://)?(.+):(\d{1,5})", address or "")
    if match:
        socket.create_connection((match[1], int(match[2])), timeout=CONNECT_TIMEOUT_S).close()


def _each_on_ray(function: Callable[[Item], Result], items: Sequence[Item], engine: Engine) -> Iterator[Result]:
    with (
        session(engine),
        joblib.parallel_config(backend="ray"),
        joblib.Parallel(n_jobs=engine.jobs) as parallel,
    ):
        batch = BATCH_PER_WORKER * (engine.jobs if engine.jobs > 0 else _cpus())
        for first in range(0, len(items), batch):
            chosen = items[first : first + batch]
            yield from parallel(joblib.delayed(_call)(function, item, _process()) for item in chosen)


def _cpus() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))
