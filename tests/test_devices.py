"""Training on several devices and several machines equals training on one; what cannot be shared is refused."""

import contextlib
import json
import os
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import tensorflow as tf
from small_study import ROOT, command, rows

from lvseg import devices, fit, pipeline, rendezvous
from lvseg.errors import InputError

LIMIT_S = 500.0  # more than the machines' own patience with each other
# At a higher rate Adam turns the last digit of a gradient that is nearly zero into a step of its own within 20 steps.
SETTINGS = (
    "train.steps=20", "train.validate_every=5", "train.checkpoint_every=10", "train.learning_rate=1.0e-4",
    "train.loss=cross_entropy_dice", "model.dropout=0.5", "augment.flip={}", "augment.noise={}",
)  # fmt: skip
# Two devices of one machine, as far as a processor allows.
TWO_PROCESSORS = """
import sys
import tensorflow as tf
from lvseg.train import main
(processor,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * 2)
sys.exit(main(sys.argv[1:]))
"""


def arguments(name, settings=SETTINGS):
    return ["--cfg", "experiment.yaml", *(word for s in (*settings, f"name={name}") for word in ("--set", s))]


def losses(folder, name):
    found = rows(folder / f"runs/volume/{name}-fold0/metrics.csv")
    return [(float(row["loss"]), float(row["validation_dice"])) for row in found]


@pytest.fixture(scope="module")
def alone(study):
    """Loss and validation Dice of every fifth step on one device."""
    done = command(study, "lvseg.train", *arguments("alone"))
    assert done.returncode == 0, done.stderr
    return losses(study, "alone")


def assert_same(received, expected):
    assert len(received) == len(expected) == 4
    for (loss, dice), (own_loss, own_dice) in zip(received, expected, strict=True):
        assert loss == pytest.approx(own_loss, rel=1e-5)
        assert dice == pytest.approx(own_dice, abs=1e-3)  # a pixel at the border of two classes may fall either way


def free_ports(count):
    """Ports below those that the system hands out, which any other socket may get before who is to listen does."""
    found = []
    for port in random.sample(range(20000, 32000), 100):  # others may be testing here, too
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"{count} ports are not free")


class Workers:
    """The command in two processes that know of each other by TF_CONFIG."""

    def __init__(self, folder, name, settings=SETTINGS):
        cluster = {"worker": [f"localhost:{port}" for port in free_ports(2)]}
        self.logs, self.processes = [folder / f"{name}-{index}.log" for index in range(2)], []
        for index, path in enumerate(self.logs):
            config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
            variables = {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1", "TF_CONFIG": json.dumps(config)}
            with path.open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "lvseg.train", *arguments(name, settings)], cwd=folder,
                    env={**os.environ, **variables}, stdout=subprocess.DEVNULL, stderr=log,
                )  # fmt: skip
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def errors(self):
        """What both have written to stderr so far."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    def until(self, is_so):
        """Waits for something that running workers bring about, or for their end."""
        deadline = time.monotonic() + LIMIT_S
        while not is_so():
            codes = [process.poll() for process in self.processes]
            if time.monotonic() > deadline or codes != [None, None]:
                pytest.fail(f"exit codes {codes} before it came to that: {self.errors()}")
            time.sleep(0.01)

    def codes(self):
        """Both exit codes, once they have ended."""
        try:
            return [process.wait(timeout=LIMIT_S) for process in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"no end: {self.errors()}")


def test_two_workers_give_the_losses_of_one(study, alone):
    with Workers(study, "workers") as workers:
        assert workers.codes() == [0, 0], workers.errors()
    assert_same(losses(study, "workers"), alone)
    run = study / "runs/volume/workers-fold0"
    hardware = json.loads((run / "manifest.json").read_text())["hardware"]
    assert hardware["machines"] == 2
    assert (run / "model/model.json").is_file() and (run / "report/summary.json").is_file()


def test_two_devices_of_a_machine_give_the_losses_of_one(study, alone):
    done = subprocess.run(
        [sys.executable, "-c", TWO_PROCESSORS, *arguments("mirrored", (*SETTINGS, "train.devices=all"))],
        cwd=study, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=LIMIT_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same(losses(study, "mirrored"), alone)
    hardware = json.loads((study / "runs/volume/mirrored-fold0/manifest.json").read_text())["hardware"]
    assert hardware["devices_used_of_each"] == 2


def test_one_worker_s_sigterm_stops_both_at_one_checkpoint_from_which_a_single_machine_goes_on(study, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(study, folder, ignore=shutil.ignore_patterns("runs"))
    settings = ("train.steps=5000", "train.validate_every=5000", "train.checkpoint_every=25")
    checkpoints = folder / "runs/volume/stopped-fold0/checkpoints"
    with Workers(folder, "stopped", settings) as workers:
        workers.until((checkpoints / "ckpt-25.index").is_file)
        workers.processes[1].send_signal(signal.SIGTERM)
        assert workers.codes() == [1, 1], workers.errors()
    newest = tf.train.latest_checkpoint(str(checkpoints))
    number = int(newest.rsplit("-", 1)[1])
    assert number % fit.AGREE_EVERY == 0
    done = subprocess.Popen(
        [sys.executable, "-m", "lvseg.train", *arguments("stopped", settings)],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    limit = threading.Timer(LIMIT_S, done.kill)
    limit.start()
    try:
        assert f"going on from step {number}" in done.stdout.readline()
    finally:
        limit.cancel()
        done.kill()
        done.communicate()


def test_a_worker_that_is_killed_ends_the_other_with_a_sentence(study, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(study, folder, ignore=shutil.ignore_patterns("runs"))
    settings = ("train.steps=100000", "train.validate_every=100000", "train.checkpoint_every=25")
    with Workers(folder, "lost", settings) as workers:
        workers.until((folder / "runs/volume/lost-fold0/checkpoints/ckpt-25.index").is_file)
        workers.processes[1].kill()
        assert workers.codes() == [1, -signal.SIGKILL], workers.errors()
        errors = workers.errors()
    assert "start all of them again" in errors
    assert "Traceback" not in errors


def test_a_batch_that_cannot_be_shared_is_refused(study):
    done = subprocess.run(
        [sys.executable, "-c", TWO_PROCESSORS, *arguments("uneven", ("train.devices=all", "train.batch_size=3"))],
        cwd=study, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=LIMIT_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "train.batch_size" in done.stderr.splitlines()[-1] and "2 devices" in done.stderr


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_one_sentence():
    with pytest.raises(InputError, match=r"train\.devices"):
        devices.cluster("gpu", 1)


@pytest.mark.parametrize(
    "config",
    [
        "not json",
        "[]",
        '{"cluster": {"worker": ["a:1"]}, "task": {"index": 0}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 3}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": -1}}',
        '{"cluster": {"worker": ["a:1"], "ps": ["b:1"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"boss": ["a:1"]}, "task": {"type": "boss", "index": 0}}',
        '{"cluster": {"worker": "a:1"}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": [3333]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a:1", "b"]}, "task": {"type": "worker", "index": 0}}',
    ],
)
def test_a_broken_tf_config_is_one_sentence(monkeypatch, config):
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(InputError, match="TF_CONFIG"):
        devices.cluster("auto", 1)


def test_slurm_s_variables_say_who_is_who(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", str(5 + 10 * devices.SLURM_STEPS))
    monkeypatch.setenv("SLURM_STEP_ID", "2")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2,1")
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_STEP_GPUS", "")
    resolver = devices._resolver()
    port = devices.SLURM_FIRST_PORT + 7 * devices.SLURM_TASKS_A_NODE  # another for every job and step
    assert resolver.cluster_spec().as_dict() == {"worker": [f"node1:{port}", f"node1:{port + 1}", f"node2:{port}"]}
    assert (resolver.task_type, resolver.task_id) == ("worker", 2)


def test_slurm_numbers_its_tasks_in_the_order_of_its_list_not_of_names(monkeypatch):
    for name, value in (
        ("JOB_ID", "1"), ("STEP_ID", "0"), ("STEP_NUM_TASKS", "2"), ("STEP_NODELIST", "node[9-10]"),
        ("STEP_TASKS_PER_NODE", "1(x2)"), ("PROCID", "0"),
    ):  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    resolver = devices._resolver()
    hosts = [address.partition(":")[0] for address in resolver.cluster_spec().as_dict()["worker"]]
    assert hosts == ["node9", "node10"] and resolver.task_id == 0
    assert resolver.num_accelerators() == {"GPU": 0}  # none is visible here


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1 gpu2"),
        ("node[08-10,12],login", "node08 node09 node10 node12 login"),
        ("a[1-2]-ib,b3", "a1-ib a2-ib b3"),
        ("r[1-2]n[09-10],x", "r1n09 r1n10 r2n09 r2n10 x"),
    ],
)
def test_slurm_lists_of_nodes(text, hosts):
    assert devices.slurm_hosts(text) == hosts.split()


def waiting(study, name, addresses, index=0):
    """Starts one of several machines, of which the others are not there."""
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    return subprocess.Popen(
        [sys.executable, "-m", "lvseg.train", *arguments(name)], cwd=study, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CONFIG": json.dumps(config)},
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("index", [0, 1])
def test_a_machine_that_waits_for_the_others_can_be_stopped(study, index, number):
    addresses = [f"localhost:{free_ports(1)[0]}", "nobody.invalid:4444"]
    process = waiting(study, "waits", addresses, index)
    try:
        assert f"waiting for {addresses[1 - index]}\n" in process.stderr
        process.send_signal(number)
        assert process.wait(timeout=60) == -number
    finally:
        process.kill()
        process.stderr.close()


def test_a_port_in_use_is_one_sentence(study):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        address = f"localhost:{taken.getsockname()[1]}"
        with waiting(study, "taken", [address, "localhost:1"]) as process:
            limit = threading.Timer(LIMIT_S, process.kill)
            limit.start()
            error = process.stderr.read()
            limit.cancel()
    assert process.returncode == 1 and "Traceback" not in error
    assert error.splitlines()[-1].startswith(f"lvseg.train: Expected to wait for the other machines at {address}")


def test_machines_meet_whoever_comes_first_and_strangers_are_sent_away(capsys):
    (port,) = free_ports(1)
    addresses = [f"localhost:{port}", "second:1", "third:1"]
    met = queue.SimpleQueue()

    def machine(own):
        rendezvous.meet(addresses, own)
        met.put(own)

    threads = [threading.Thread(target=machine, args=(own,), daemon=True) for own in range(3)]
    threads[1].start()  # nobody listens yet
    threads[0].start()
    for greeting in (b"GET / HTTP/1.1\r\n\r\n", b"lvseg 0003", b"lvseg 0000", b""):
        with connected(port) as stranger:
            with contextlib.suppress(OSError):  # it may have been sent away already
                stranger.sendall(greeting)
                stranger.shutdown(socket.SHUT_WR)
            assert rendezvous._received(stranger, 1) == b""
    assert met.empty()  # the third is not here
    threads[2].start()
    assert sorted(met.get(timeout=30) for _ in addresses) == [0, 1, 2]
    with socket.create_server(("localhost", port)):  # TensorFlow may have it now
        pass
    assert "waiting for second:1, third:1\n" in capsys.readouterr().err


@pytest.mark.parametrize("closes", [True, False])
def test_a_machine_that_died_while_waiting_may_come_again(closes):
    (port,) = free_ports(1)
    addresses = [f"localhost:{port}", "second:1", "third:1"]
    first = threading.Thread(target=rendezvous.meet, args=(addresses, 0), daemon=True)
    first.start()
    dead = connected(port)
    dead.sendall(b"lvseg 0001")
    others = [threading.Thread(target=rendezvous.meet, args=(addresses, own), daemon=True) for own in (1, 2)]
    if closes:
        dead.close()
    others[0].start()
    if not closes:  # nobody heard it die; the newer one counts
        dead.settimeout(30)
        assert dead.recv(1) == b""
        dead.close()
    others[1].start()
    for thread in (first, *others):
        thread.join(timeout=30)
        assert not thread.is_alive()


def connected(port):
    """A connection to who is about to listen at a port."""
    for _ in range(300):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("localhost", port), timeout=30)
        time.sleep(0.05)
    raise AssertionError(f"nobody listens at port {port}")


@pytest.mark.parametrize("workers, replicas", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_the_shares_of_a_batch_are_all_of_it(workers, replicas):
    places = []
    for worker in range(workers):
        own, at_a_time = pipeline.Share(worker, workers, replicas).of_batch(8)
        assert len(own) == 8 // workers and at_a_time * replicas == len(own)
        places += own
    assert places == list(range(8))
    with pytest.raises(ValueError, match="batch_size=9"):
        pipeline.Share(0, 2, 1).of_batch(9)
