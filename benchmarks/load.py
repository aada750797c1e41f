"""The service under load, with a network too simple to matter: what is added to the seconds of inference, and memory.

A scan is 28 x 320 x 320 voxels as .nii.gz; every client is a process of its own with a scan of its own, on loopback,
without encryption. The time added to a scan is its whole way, from the file to the mask's file, without the seconds of
`segment` in its result.json: it has the waiting for other clients' scans in it.

python benchmarks/load.py                  all parts, about ten minutes
python benchmarks/load.py --only load      or idle, jobs
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import resource
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import ROOT, Row, main

sys.path.insert(0, str(ROOT / "tests"))

from serving_fixtures import Server, memory_bytes, running

from serving.connection import Client

SHAPE = (28, 320, 320)
SPACING_MM = (5.0, 1.5, 1.5)
CLIENTS = (1, 4, 16, 64)
LIMIT_S = 120.0
LEAST_RATE = 8.0  # scans a second from four clients
GATE_MB_MOST, FLAT_MOST = 150.0, 1.1
MIXED_SHAPES = ((5, 20, 24), (28, 64, 64), (12, 128, 128), (28, 320, 320))
FEW_JOBS, MANY_JOBS = 200, 2000
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x29\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x08Identity\0\0\0\0"
PING, PONG = b"\x04PING", b"\x04PONG"
OWN_FILES = 200  # beside the connections

Served = list[tuple[float, float]]  # of each scan when it was done, and the seconds that were added


def rows(arguments: argparse.Namespace) -> list[Row]:
    """The parts that are wanted, each with a server of its own."""
    if arguments.idle:
        hold_idle(arguments.idle, arguments.connections)
        return []
    result: list[Row] = []
    for part in (load, idle, jobs):
        if arguments.only in (None, part.__name__):
            with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as server:
                result += part(server, Path(folder), arguments)
    return result


def served(folder: Path) -> Any:
    """A server with the test suite's network, which marks what is brighter than the mean."""
    limits = {"spool_free_bytes": 0, "submits_a_minute": 1_000_000}
    return running(folder, limits=limits, http="127.0.0.1:0")


# ---- clients


def write_scan(folder: Path, shape: tuple[int, int, int], number: int) -> Path:
    """A scan of noise with something bright in it, unlike any other number's."""
    from lvseg.formats import write_volume
    from lvseg.volume import Volume

    voxels = np.random.default_rng(number).integers(0, 300, shape).astype(np.int16)
    # So bright that the mean lies above the noise: the mask is a body of one piece, as a network's is.
    voxels[:, shape[1] // 3 : -shape[1] // 3, shape[2] // 3 : -shape[2] // 3] += 2000
    affine = np.diag([SPACING_MM[2], SPACING_MM[1], SPACING_MM[0], 1.0])[:, [2, 1, 0, 3]]
    folder.mkdir(exist_ok=True)
    return write_volume(Volume(voxels, affine), folder / f"{number}.nii.gz")[0]


def client(endpoint: str, scans: Sequence[Path], seconds: float, count: int, together: Any, told: Path) -> None:
    """One client: scans in turn, for some seconds, or `count` of them where that is not 0; tells times in a file."""
    with tempfile.TemporaryDirectory() as name, Client(endpoint, insecure=True, connect_s=LIMIT_S) as one:
        out = Path(name) / "mask.nii.gz"
        found: Served = []
        together.wait(LIMIT_S)
        end = time.monotonic() + seconds
        while (len(found) < count) if count else (time.monotonic() < end):
            began = time.monotonic()
            _, measurements = one.segment(scans[len(found) % len(scans)], "bright", out, LIMIT_S)
            done = time.monotonic()
            found.append((done, done - began - measurements["seconds"]["segment"]))
    told.write_text(json.dumps(found))


def run_clients(
    server: Server, scans: Sequence[Sequence[Path]], seconds: float, count: int = 0
) -> tuple[float, Served]:
    """As many clients as there are lists of scans, all at once; when they began, and what they had done."""
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(len(scans) + 1)
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / f"{number}.json" for number in range(len(scans))]
        processes = [
            spawn.Process(target=client, args=(server.endpoint, own, seconds, count, together, told), daemon=True)
            for own, told in zip(scans, files, strict=True)
        ]
        for process in processes:
            process.start()
        together.wait(LIMIT_S)
        began = time.monotonic()
        for process in processes:
            process.join()
            if process.exitcode:
                raise RuntimeError(f"Expected clients that end well, received exit code {process.exitcode}.")
        return began, sorted((done, added) for told in files for done, added in json.loads(told.read_text()))


# ---- load


def load(server: Server, folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Added time and rate of different numbers of clients at once."""
    scans = [[write_scan(folder / "scans", SHAPE, number)] for number in range(max(arguments.clients))]
    run_clients(server, scans[:1], 2.0)  # not counted
    result = []
    for clients in arguments.clients:
        began, found = run_clients(server, scans[:clients], arguments.seconds)
        added = [seconds for _, seconds in found]
        p50, p95, p99 = np.percentile(added, (50, 95, 99))
        thirds = np.histogram([done - began for done, _ in found], 3, (0, arguments.seconds))[0]
        rate = 3 / arguments.seconds * statistics.median(thirds)
        name = f"{clients} client{'s' if clients > 1 else ''} at once, {len(found)} scans"
        figure = f"{p50:.2f} s, {p95:.2f} s, {p99:.2f} s"
        result.append(Row(f"time added to inference, p50, p95, p99; {name}", "", figure))
        is_aim = clients == 4
        target = f"at least {LEAST_RATE:.0f} scans/s" if is_aim else ""
        result.append(Row(f"rate; {name}", target, f"{rate:.1f} scans/s", bool(rate >= LEAST_RATE) if is_aim else None))
    return result


# ---- idle connections


def idle(server: Server, folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Added time of one client with and without connections that say nothing, in turn."""
    scans = [[write_scan(folder / "scans", SHAPE, 0)]]
    run_clients(server, scans, 2.0)  # not counted
    alone: list[float] = []
    beside: list[float] = []
    counts: list[int] = []
    for _ in range(3):
        alone += [seconds for _, seconds in run_clients(server, scans, arguments.seconds / 3)[1]]
        command = [sys.executable, __file__, "--idle", server.endpoint, "--connections", str(arguments.connections)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            if not holder.stdout or not holder.stdin:
                raise RuntimeError("Expected pipes to the process of idle connections, received none.")
            holder.stdout.readline()  # all are open
            beside += [seconds for _, seconds in run_clients(server, scans, arguments.seconds / 3)[1]]
            memory = memory_bytes(server.process.pid)
            holder.stdin.close()
            counts.append(json.loads(holder.stdout.readline()))
    with_them, without = statistics.median(beside), statistics.median(alone)
    figure = f"{with_them / without:.2f} times ({with_them:.3f} s against {without:.3f} s)"
    kept = min(counts)
    return [
        Row(f"median time added beside {kept:,} idle connections, against none", "", figure),
        Row(
            f"idle connections that stay open, of {arguments.connections:,}", "all", f"{kept:,}",
            kept == arguments.connections,
        ),
Row(f"resident memory of the gate with {kept:,} idle connections", "", f"{memory / 1e6:.0f} MB"),
    ]  # fmt: skip


def hold_idle(endpoint: str, count: int) -> None:
    """Opens connections that greet as a DEALER and answer the heartbeat, until standard input closes.

    Prints a line once all are greeted, and at the end how many are still open.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if count + OWN_FILES > most:
        raise SystemExit(f"Expected room for {count + OWN_FILES} open files, received a limit of {most}.")
    resource.setrlimit(resource.RLIMIT_NOFILE, (count + OWN_FILES, most))
    host, port = endpoint.removeprefix("tcp://").split(":")
    opened = 0
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        unheard: set[socket.socket] = set()
        while True:
            if opened < count and len(unheard) < 100:  # not more at once than its backlog takes
                one = socket.create_connection((host, int(port)), LIMIT_S)
                one.sendall(GREETING + READY)
                unheard.add(one)
                selector.register(one, selectors.EVENT_READ)
                opened += 1
            for key, _ in selector.select(0 if opened < count else 1.0):
                if key.fileobj is sys.stdin:
                    print(len(selector.get_map()) - 1, flush=True)
                    return
                one = key.fileobj  # type: ignore[assignment]
                content = b""
                with contextlib.suppress(ConnectionError):
                    content = one.recv(4096)
                if not content:
                    selector.unregister(one)
                    one.close()
                elif (place := content.find(PING)) >= 0:  # behind it two bytes of its time to live, then the context
                    context = content[place + len(PING) + 2 : place + content[place - 1]]
                    one.sendall(b"\x04" + bytes([len(PONG + context)]) + PONG + context)
                if one in unheard:
                    unheard.discard(one)
                    if opened == count and not unheard:
                        print("open", flush=True)


# ---- many jobs


def jobs(server: Server, folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Memory of the gate and of each kind of worker after some jobs of mixed sizes and after many."""
    scans = [
        [write_scan(folder / "scans", shape, 10 * number + place) for place, shape in enumerate(MIXED_SHAPES)]
        for number in range(4)
    ]

    def memory() -> dict[str, float]:
        workers = {kind: server.workers(kind) for kind in ("unpack", "segment", "pack")}
        return {"gate": memory_bytes(server.process.pid) / 1e6} | {
            kind: max(memory_bytes(pid) for pid in pids) / 1e6 for kind, pids in workers.items()
        }

    few, many = arguments.jobs // 10, arguments.jobs
    before = {kind: server.workers(kind) for kind in ("unpack", "segment", "pack")}
    run_clients(server, scans, 0.0, few // 4)
    early = memory()
    run_clients(server, scans, 0.0, (many - few) // 4)
    late = memory()
    if {kind: server.workers(kind) for kind in before} != before:
        raise RuntimeError("Expected the same workers after all jobs, received others: one was lost.")
    result = []
    for name in early:
        figure = f"{late[name] / early[name]:.2f} times ({late[name]:.0f} MB against {early[name]:.0f} MB)"
        result.append(
            Row(
                f"resident memory of {'the gate' if name == 'gate' else f'a worker ({name})'} after {many:,} jobs of"
                f" mixed sizes against {few}", f"at most {FLAT_MOST} times", figure,
                late[name] <= FLAT_MOST * early[name],
            )
        )  # fmt: skip
    peak = memory_bytes(server.process.pid, "VmHWM")
    return [*result, memory_row(f"peak resident memory of the gate over {many:,} jobs", peak)]


def memory_row(what: str, memory: float) -> Row:
    """A row about the gate's memory in bytes."""
    return Row(what, f"below {GATE_MB_MOST:.0f} MB", f"{memory / 1e6:.0f} MB", memory / 1e6 < GATE_MB_MOST)


if __name__ == "__main__":
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--only", choices=("load", "idle", "jobs"), help="one part (default: all)")
    command.add_argument("--clients", type=int, nargs="+", default=CLIENTS, help="at once (default: 1 4 16 64)")
    command.add_argument("--seconds", type=float, default=30.0, help="of each measurement (default: %(default)s)")
    command.add_argument("--connections", type=int, default=5000, help="that are idle (default: %(default)s)")
    command.add_argument("--jobs", type=int, default=MANY_JOBS, help="of mixed sizes (default: %(default)s)")
    command.add_argument("--idle", metavar="ENDPOINT", help=argparse.SUPPRESS)
    sys.exit(main(rows, command))
