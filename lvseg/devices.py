"""On what training runs: one processor or GPU, all GPUs of a machine, or several machines.

Several machines say who they are by TF_CONFIG (as TensorFlow documents it), or by SLURM's variables in a job step of
several tasks; every one runs the same command, and they have to see the same folders.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from typing import Literal, NamedTuple

import tensorflow as tf

from lvseg import allocator, rendezvous
from lvseg.errors import InputError, RunError

Devices = Literal["auto", "cpu", "gpu", "all"]
# How long machines wait for each other at one addition; a lost one is mostly noticed after seconds by its silence.
LOST_AFTER_S = 300.0
# Two jobs on a node need other ports; each takes one a task. All lie below those that systems hand out themselves.
SLURM_FIRST_PORT, SLURM_STEPS, SLURM_TASKS_A_NODE = 10_000, 687, 32


HOST = re.compile(r"[^\s:]+:[0-9]{1,5}|\[[0-9A-Fa-f:.]+\]:[0-9]{1,5}")  # name, IPv4 or [IPv6], with its port


class Cluster(NamedTuple):
    """Which of how many machines this process is, and the devices that share its part of a batch."""

    strategy: tf.distribute.Strategy
    worker: int
    workers: int
    replicas: int  # of this machine

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the run folder; the others only compute."""
        return self.worker == 0


def cluster(devices: Devices, batch_size: int) -> Cluster:
    """Chooses devices; has to come before TensorFlow computes anything.

    Args:
        devices: "auto" is the first GPU, or the processor where there is none; "cpu" and "gpu" insist; "all" is every
            GPU, or every logical processor where there is none. Several machines use all of theirs unless "cpu".
        batch_size: the global one, which the devices share evenly.

    Raises:
        InputError: BAD_CONFIG for a GPU where there is none, a batch that cannot be shared, or a broken TF_CONFIG.
    """
    if devices == "cpu":
        tf.config.set_visible_devices([], "GPU")
    gpus = tf.config.get_visible_devices("GPU")
    if not gpus:
        allocator.keep_memory()
    if devices == "gpu" and not gpus:
        raise InputError("BAD_CONFIG", "Expected a GPU for train.devices=gpu, received none; set it to auto or cpu.")
    resolver = _resolver()
    if resolver is not None:
        tasks = resolver.cluster_spec().as_dict()
        machines = [*tasks.get("chief", []), *tasks.get("worker", [])]
        before = len(tasks.get("chief", [])) if resolver.task_type == "worker" else 0
        worker = before + int(resolver.task_id or 0)
        strategy = _joined(resolver, machines, worker)
        found = Cluster(strategy, worker, len(machines), strategy.num_replicas_in_sync // len(machines))
    elif devices == "all" and (gpus or len(tf.config.list_logical_devices("CPU")) > 1):
        names = [device.name for device in tf.config.list_logical_devices("GPU" if gpus else "CPU")]
        strategy = tf.distribute.MirroredStrategy(names)
        found = Cluster(strategy, 0, 1, len(names))
    else:
        if gpus:
            tf.config.set_visible_devices(gpus[:1], "GPU")
        else:
            # A step is one chain of big operations, each of which takes all cores; two at a time take more memory.
            with contextlib.suppress(RuntimeError):  # where TensorFlow has computed something already
                tf.config.threading.set_inter_op_parallelism_threads(1)
        found = Cluster(tf.distribute.get_strategy(), 0, 1, 1)
    shares = found.workers * found.replicas
    if batch_size % shares:
        raise InputError(
            "BAD_CONFIG",
            f"Expected train.batch_size to be a multiple of the {shares} devices that share it, received {batch_size}.",
        )
    return found


def _joined(
    resolver: tf.distribute.cluster_resolver.ClusterResolver, machines: list[str], worker: int
) -> tf.distribute.Strategy:
    """The strategy of all machines, once they have met; until then signals end this process at once."""
    kept = {}
    with contextlib.suppress(ValueError):  # signals belong to the main thread
        kept = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        rendezvous.meet(machines, worker)
        return tf.distribute.MultiWorkerMirroredStrategy(
            resolver, tf.distribute.experimental.CommunicationOptions(timeout_seconds=LOST_AFTER_S)
        )
    except tf.errors.OpError as error:
        raise RunError(
            f"Expected to meet all machines of {', '.join(machines)}, received"
            f" '{error.message.splitlines()[0]}'; are the names right and the ports free?"
        ) from error
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def lost_machines_named() -> Iterator[None]:
    """RunError instead of TensorFlow's own where another machine of the cluster is gone."""
    try:
        yield
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError) as error:
        raise RunError(
            "Expected every machine to answer, received no answer from one; start all of them again, training goes on"
            " from the last checkpoint."
        ) from error


def _slurm_port() -> int:
    """The first port of this job step's tasks on each node."""
    number = sum(int(os.environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return SLURM_FIRST_PORT + number % SLURM_STEPS * SLURM_TASKS_A_NODE


def _resolver() -> tf.distribute.cluster_resolver.ClusterResolver | None:
    """Who this process is among several; None where it is alone."""
    if "TF_CONFIG" in os.environ:
        try:
            config = json.loads(os.environ["TF_CONFIG"])
            task, hosts = config["task"], config["cluster"][config["task"]["type"]]
            known = task["type"] in ("chief", "worker") and set(config["cluster"]) <= {"chief", "worker"}
            named = isinstance(hosts, list) and all(
                HOST.fullmatch(host) for each in config["cluster"].values() for host in each
            )
            if not (known and named and 0 <= int(task["index"]) < len(hosts)):
                raise ValueError
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(
                "BAD_CONFIG",
                'Expected TF_CONFIG to be JSON with cluster.worker, a list of "host:port", task.type and task.index,'
                f" received {os.environ['TF_CONFIG']!r}.",
            ) from error
        return tf.distribute.cluster_resolver.TFConfigClusterResolver()
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        # Each task takes the GPUs that SLURM shows it (--gpus-per-task). TensorFlow's own resolver sorts the nodes by
        # name, node10 before node9, while SLURM numbers its tasks in the order of its list.
        nodes, tasks = os.environ["SLURM_STEP_NODELIST"], os.environ["SLURM_STEP_TASKS_PER_NODE"]
        first, hosts, counts = _slurm_port(), slurm_hosts(nodes), _slurm_counts(tasks)
        if len(hosts) != len(counts):
            raise InputError(
                "BAD_CONFIG", f"Expected tasks for every node of SLURM's list, received {nodes} with tasks of {tasks}."
            )
        workers = [f"{host}:{first + task}" for host, count in zip(hosts, counts, strict=True) for task in range(count)]
        return tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec({"worker": workers}),
            task_type="worker",
            task_id=int(os.environ["SLURM_PROCID"]),
            num_accelerators={"GPU": len(tf.config.get_visible_devices("GPU"))},
            rpc_layer="grpc",
        )
    return None


def slurm_hosts(text: str) -> list[str]:
    """The nodes of SLURM's list, "gpu1,node[08-10,12]", in its order: gpu1, node08, node09, node10, node12."""
    return [host for part in re.split(r",(?![^\[]*\])", text) for host in _expanded(part)]


def _expanded(part: str) -> list[str]:
    """One part of such a list, which may have several brackets: "rack[1-2]node[1-4]"."""
    brackets = re.search(r"\[([^\]]*)\]", part)
    if brackets is None:
        return [part]
    hosts = []
    for numbers in brackets[1].split(","):
        low, _, high = numbers.partition("-")
        for number in range(int(low), int(high or low) + 1):
            before = f"{part[: brackets.start()]}{number:0{len(low)}d}"
            hosts += [before + after for after in _expanded(part[brackets.end() :])]
    return hosts


def _slurm_counts(text: str) -> list[int]:
    """Tasks of every node: "2(x3),1" is 2, 2, 2, 1."""
    return [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]
