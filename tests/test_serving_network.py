"""Networks and processes that break off, stand still or are slow: the right answer, or a sentence in time."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from serving_fixtures import LIMIT_S, Server, is_alive, memory_bytes, running, until
from test_serving import Raw, expect_right_mask, expect_serving, scan_file, send_all
from test_serving_operation import figure

from lvseg.formats import write_volume
from lvseg.volume import Volume
from serving import connection, protocol
from serving.connection import Client, ClientError

MIB = 1024 * 1024
CHUNK = 1000
LIMITS = {"spool_free_bytes": 0, "chunk_bytes": CHUNK, "window_bytes": 3 * CHUNK}
LONG_FRAME = 9  # bytes before a payload of more than 255: flags, and the length in eight bytes


@dataclass(frozen=True)
class Fault:
    """What befalls a connection once the bytes `after`, and `more` bytes behind them, went one way.

    Args:
        way: "up", from the client to the server, or "down".
        after: bytes that appear once in that direction.
        more: how many bytes behind them are passed on as well.
        stalls: the directions in which nothing moves from then on; none: the connection is closed on both sides.
        reset: it is closed as by a crash, not in order.
    """

    way: str
    after: bytes
    more: int
    stalls: tuple[str, ...] = ()
    reset: bool = False


class Link:
    """A connection through the proxy."""

    def __init__(self, client: socket.socket, server: socket.socket, fault: Fault | None) -> None:
        self.ends = {"up": (client, server), "down": (server, client)}
        self.fault = fault
        self.seen = bytearray()  # in the fault's direction
        self.moves = {"up", "down"}  # what is passed on

    def close(self, reset: bool = False) -> None:
        for end in self.ends["up"]:
            if reset:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()


class Proxy:
    """Passes bytes between clients and a server, with one fault a connection in the order given, then none.

    Args:
        endpoint: the server's.
        faults: the last of them befalls all further connections as well where `for_good` is set.
    """

    def __init__(self, endpoint: str, faults: Sequence[Fault], for_good: bool = False) -> None:
        host, port = endpoint.removeprefix("tcp://").split(":")
        self._place = host, int(port)
        self._faults = deque(faults)
        self._for_good = for_good
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._told, self._tell = socket.socketpair()
        self._links: list[Link] = []
        self.befell: list[Fault] = []
        self.lets_in, self.sent_away = True, 0
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._tell.close()
        self._thread.join(LIMIT_S)
        for link in self._links:
            link.close()
        self._told.close()
        self._listener.close()

    def cut(self) -> None:
        """Ends all connections, and new ones as they begin until `lets_in` is set again."""
        self.lets_in = False
        for link in list(self._links):
            with contextlib.suppress(OSError):  # ended already
                link.ends["up"][0].shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._told, selectors.EVENT_READ)
            selector.register(self._listener, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._told:
                        return
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    elif key.data[1] in key.data[0].moves:  # else closed a moment ago
                        self._pass(selector, *key.data)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        client, _ = self._listener.accept()
        if not self.lets_in:
            client.close()
            self.sent_away += 1
            return
        fault = self._faults[0] if self._faults else None
        if self._faults and not (self._for_good and len(self._faults) == 1):
            self._faults.popleft()
        link = Link(client, socket.create_connection(self._place, LIMIT_S), fault)
        self._links.append(link)
        for way, (source, _) in link.ends.items():
            selector.register(source, selectors.EVENT_READ, (link, way))

    def _pass(self, selector: selectors.BaseSelector, link: Link, way: str) -> None:
        source, target = link.ends[way]
        due = False
        try:
            content = source.recv(64 * 1024)
            if link.fault is not None and link.fault.way == way and content:
                link.seen += content
                place = link.seen.find(link.fault.after)
                beyond = len(link.seen) - (place + len(link.fault.after) + link.fault.more)
                due = place >= 0 and beyond >= 0
                if due and (way in link.fault.stalls or not link.fault.stalls):
                    content = content[: len(content) - beyond]
            target.sendall(content)
        except OSError:
            content = b""
        if due and link.fault is not None:
            self._befall(selector, link, link.fault)
        elif not content:
            self._end(selector, link)

    def _befall(self, selector: selectors.BaseSelector, link: Link, fault: Fault) -> None:
        self.befell.append(fault)
        link.fault = None
        if not fault.stalls:
            self._end(selector, link, fault.reset)
        for way in fault.stalls:  # not read any more, so that its end is not heard of either
            self._rest(selector, link, way)

    def _end(self, selector: selectors.BaseSelector, link: Link, reset: bool = False) -> None:
        for way in list(link.moves):
            self._rest(selector, link, way)
        link.close(reset)

    def _rest(self, selector: selectors.BaseSelector, link: Link, way: str) -> None:
        link.moves.discard(way)
        selector.unregister(link.ends[way][0])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that leave it as it was."""
    with running(tmp_path_factory.mktemp("server"), limits=LIMITS, http="127.0.0.1:0") as one:
        yield one
        assert one.process.poll() is None
        assert one.spooled() == []


def chunk_header(offset: int) -> bytes:
    """The fourth frame of a CHUNK."""
    return protocol.encode(protocol.Chunk(bytes(32), offset, b"x"))[3]


def data_header(name: str, offset: int) -> bytes:
    """The fourth frame of a DATA."""
    return protocol.encode(protocol.Data(bytes(32), name, offset, b"x"))[3]


# ---- connections that are cut

# At the edge before a payload, at its first byte, in its middle, before its last byte, at the edge behind it.
PLACES = {"header": 0, "begin": LONG_FRAME, "middle": LONG_FRAME + 500, "last": LONG_FRAME + CHUNK - 1,
          "end": LONG_FRAME + CHUNK}  # fmt: skip


def through(server: Server, folder: Path, seed: int, faults: Sequence[Fault]) -> Path:
    """Has a scan of its own segmented through a proxy whose faults all befall it; the scan."""
    scan, out = scan_file(folder, seed, name=f"cut{seed}.nii.gz"), folder / f"cut{seed}.vtk"
    assert scan.stat().st_size > 4 * CHUNK
    with Proxy(server.endpoint, faults) as proxy:
        with Client(proxy.address, insecure=True) as client:
            client.segment(scan, "bright", out, 3 * LIMIT_S)
        assert proxy.befell == list(faults)
    expect_right_mask(scan, out)
    assert len(server.runs(scan.name)) == 1
    return scan


def test_an_upload_cut_anywhere_goes_on_and_each_byte_is_stored_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ASK_S", 0.2)
    before = figure(server, "lvseg_received_bytes_total")
    with ThreadPoolExecutor(len(PLACES)) as pool:
        answers = [
            pool.submit(
                through, server, tmp_path, 100 + seed,
                [Fault("up", chunk_header(offset), more, reset=seed % 2 == 1) for offset in (0, 2 * CHUNK, 3 * CHUNK)],
            )
            for seed, more in enumerate(PLACES.values())
        ]  # fmt: skip
        sent = sum(answer.result(3 * LIMIT_S).stat().st_size for answer in answers)
    assert figure(server, "lvseg_received_bytes_total") - before == sent


def test_a_result_cut_anywhere_arrives_whole(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "ASK_S", 0.2)
    before = figure(server, "lvseg_received_bytes_total")
    with ThreadPoolExecutor(len(PLACES)) as pool:
        answers = [
            pool.submit(
                through, server, tmp_path, 200 + seed,
                [
                    Fault("down", data_header("mask.vtk", 0), more, reset=seed % 2 == 1),
                    Fault("down", data_header("mask.vtk", 2 * CHUNK), min(more, 200)),
                    Fault("down", data_header("result.json", 0), min(more, 200)),
                ],
            )
            for seed, more in enumerate(PLACES.values())
        ]  # fmt: skip
        sent = sum(answer.result(3 * LIMIT_S).stat().st_size for answer in answers)
    assert figure(server, "lvseg_received_bytes_total") - before == sent


def test_an_announcement_or_its_answer_that_is_cut_is_made_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ASK_S", 0.2)
    monkeypatch.setattr(connection, "ANNOUNCE_S", 0.2)
    answer = protocol.encode(protocol.Accepted(bytes(32), 0, 5))[3].partition(b"5")[0]
    stored = protocol.encode(protocol.Stored(bytes(32), "0" * 64))[3].partition(b"0")[0]
    faults = {
        300: [Fault("up", b'"deadline_ms":', 1), Fault("up", b'"deadline_ms":', len("12345}"))],
        301: [Fault("down", answer, 0), Fault("down", answer, len("3000}"))],
        302: [Fault("down", stored, 0)],
        303: [Fault("down", b'{"stage":"segment"', 0), Fault("down", b'{"files":[', 0)],
    }
    with ThreadPoolExecutor(len(faults)) as pool:
        for done in [pool.submit(through, server, tmp_path, seed, some) for seed, some in faults.items()]:
            done.result(3 * LIMIT_S)


def cut_before(client: Client, proxy: Proxy, frame: int) -> list[int]:
    """Ends the connection before the client's next frame but `frame`; goes on once its socket has none, or, where a
    message was begun and the socket would not tell, once it makes another.

    Returns:
        The flags of all frames that were sent by now.
    """
    flags: list[int] = []
    socket_, send = client._socket, client._socket.send

    def cutting(content: bytes, flag: int, **how: Any) -> Any:
        if len(flags) == frame:
            proxy.cut()
            if flags and flags[-1] & zmq.SNDMORE:
                until(lambda: proxy.sent_away, "the client tries to connect again")
                socket_.get(zmq.EVENTS)  # has the socket heed what its connection told it
            else:
                until(lambda: not socket_.poll(0, zmq.POLLOUT), "the client has no connection")
            proxy.lets_in = True
        flags.append(flag)
        return send(content, flag, **how)

    socket_.send = cutting  # type: ignore[method-assign]
    return flags


def test_a_message_whose_connection_ends_as_it_is_to_be_sent_goes_over_the_next(server: Server) -> None:
    with Proxy(server.endpoint, []) as proxy, Client(proxy.address, insecure=True) as client:
        flags = cut_before(client, proxy, 0)
        client.jobs(LIMIT_S)
        assert len(flags) == 1 + len(protocol.encode(protocol.List()))


def test_a_scan_is_segmented_wherever_between_frames_its_connection_ends(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ASK_S", 0.2)
    monkeypatch.setattr(connection, "ANNOUNCE_S", 0.2)
    scans = [scan_file(tmp_path, 700 + frame, name=f"frame{frame}.nii.gz") for frame in range(44)]

    def one(frame: int) -> None:
        scan, out = scans[frame], tmp_path / f"frame{frame}.vtk"
        with Proxy(server.endpoint, []) as proxy, Client(proxy.address, insecure=True) as client:
            sent = cut_before(client, proxy, frame)
            client.segment(scan, "bright", out, 3 * LIMIT_S)
            assert len(sent) > frame
        expect_right_mask(scan, out)
        assert len(server.runs(scan.name)) == 1

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(one, frame) for frame in range(len(scans))]:
            done.result(3 * LIMIT_S)


# ---- connections in which nothing moves

WAYS: tuple[tuple[str, ...], ...] = (("up",), ("down",), ("up", "down"))
MOMENTS = {
    "sending": ("up", chunk_header(CHUNK), LONG_FRAME + 500),
    "waiting": ("down", b'{"stage":"segment"', 0),
    "receiving": ("down", data_header("mask.vtk", CHUNK), LONG_FRAME + 500),
}
STALLS = [Fault(*moment, stalls=ways) for moment in MOMENTS.values() for ways in WAYS]


def test_the_heartbeat_finds_a_connection_in_which_nothing_moves_and_the_job_goes_on(
    server: Server, tmp_path: Path
) -> None:
    """All cases at once, with the heartbeat as it is: 20 seconds without a word at the most, then a new connection."""
    before = figure(server, "lvseg_received_bytes_total")
    with ThreadPoolExecutor(len(STALLS)) as pool:
        answers = [pool.submit(through, server, tmp_path, 400 + seed, [case]) for seed, case in enumerate(STALLS)]
        sent = sum(answer.result(3 * LIMIT_S).stat().st_size for answer in answers)
    assert figure(server, "lvseg_received_bytes_total") - before == sent


def test_a_network_that_stands_still_for_good_ends_in_a_sentence(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SILENCE_S", 1.0)
    monkeypatch.setattr(connection, "ASK_S", 0.2)

    def one(seed: int, fault: Fault) -> None:
        scan, out = scan_file(tmp_path, seed, name=f"still{seed}.nii.gz"), tmp_path / f"still{seed}.vtk"
        with Proxy(server.endpoint, [fault], for_good=True) as proxy, Client(proxy.address, insecure=True) as client:
            with pytest.raises(ClientError) as refused:
                client.segment(scan, "bright", out, LIMIT_S)
            assert (refused.value.code, refused.value.exit_code) == ("UNREACHABLE", 4)
            assert proxy.address in refused.value.sentence
            assert proxy.befell == [fault]
        assert list(tmp_path.glob(f"*{out.name}*")) == []
        with server.connect() as client:  # the same again, over a network that works
            client.segment(scan, "bright", out, LIMIT_S)
        expect_right_mask(scan, out)

    with ThreadPoolExecutor(len(STALLS)) as pool:
        for done in [pool.submit(one, 500 + seed, case) for seed, case in enumerate(STALLS)]:
            done.result(3 * LIMIT_S)


# ---- a connection that does not read


class Slow(Raw):
    """A peer that holds one message at the most that it has not read."""

    def __init__(self, endpoint: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        for option, value in ((zmq.LINGER, 0), (zmq.RCVHWM, 1), (zmq.RCVBUF, 64 * 1024), (zmq.SNDHWM, 0)):
            self.socket.setsockopt(option, value)
        self.socket.connect(endpoint)


def test_slow_readers_cost_the_gate_little_memory_and_twenty_others_nothing(server: Server, tmp_path: Path) -> None:
    voxels = np.zeros((24, 256, 256), np.int16)
    voxels[4:20, 60:200, 60:200] = 1000
    big = write_volume(Volume(voxels, np.diag([3.0, 1.5, 2.0, 1.0])), tmp_path / "big.nii.gz")[0]
    expect_serving(server, tmp_path)  # whatever is loaded at first use is loaded
    before = memory_bytes(server.process.pid)
    fetches, slow_ones = 200, 3

    def one(number: int) -> None:
        scan, out = scan_file(tmp_path, 600 + number, name=f"fast{number}.nii.gz"), tmp_path / f"fast{number}.vtk"
        with server.connect(connect_s=LIMIT_S) as client:
            for _ in range(2):
                client.segment(scan, "bright", out, 3 * LIMIT_S)
        expect_right_mask(scan, out)

    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Slow(server.endpoint)) for _ in range(slow_ones)]
        job = send_all(peers[0], big.read_bytes(), output="vtk")
        assert peers[0].take_until(protocol.Done).files[0].bytes > MIB
        for peer in peers:
            for _ in range(fetches):
                peer.socket.send_multipart(protocol.encode(protocol.Fetch(job, "mask.vtk", 0, MIB)))
        with ThreadPoolExecutor(20) as pool:
            for done in [pool.submit(one, number) for number in range(20)]:
                done.result(3 * LIMIT_S)
        sent = figure(server, "lvseg_sent_bytes_total")
        assert sent < slow_ones * fetches * MIB / 2  # most of what was asked for waits, or is given up
        # Of each connection what libzmq may hold, and room for twenty clients.
        assert memory_bytes(server.process.pid, "VmHWM") - before < slow_ones * 10 * MIB + 32 * MIB
    with Raw(server.endpoint) as peer:
        assert peer.ask(protocol.Cancel(job)) == protocol.Cancelled(job)


# ---- processes that are stopped, not ended


KINDS = {"unpack": "unpack", "segment": "segment", "pack": "write"}  # and where its job is, as LISTING says


def scan_while_stopped(server: Server, folder: Path, kind: str, goes_on: bool) -> int:
    """A scan's way while the worker of a kind is stopped with it; the worker."""
    scan, out = scan_file(folder, name=f"{kind}.nii.gz"), folder / f"{kind}.vtk"
    (worker,) = server.workers(kind)
    os.kill(worker, signal.SIGSTOP)  # it is given its job, since nobody knows yet
    with ThreadPoolExecutor(1) as pool, server.connect() as client:
        answer = pool.submit(client.segment, scan, "bright", out, 3 * LIMIT_S)
        if goes_on:
            with Raw(server.endpoint) as peer:
                where = [KINDS[kind]]
                until(lambda: [job.state for job in peer.ask(protocol.List()).jobs] == where, "it has its job")
            os.kill(worker, signal.SIGCONT)
        answer.result(3 * LIMIT_S)
    expect_right_mask(scan, out)
    return worker


def test_a_worker_that_is_stopped_for_a_while_does_its_job(tmp_path: Path) -> None:
    with running(tmp_path, limits=LIMITS) as server:
        for kind in KINDS:
            worker = scan_while_stopped(server, tmp_path, kind, goes_on=True)
            assert server.workers(kind) == [worker]
        assert all(json.loads(line)["level"] == "info" for line in server.log.read_text().splitlines())


def test_a_worker_that_is_stopped_for_good_is_replaced_and_its_job_is_done_by_the_next(tmp_path: Path) -> None:
    deadlines = {"unpack_s": 2.0, "read_s": 3.0, "segment_s": 2.0, "write_s": 2.0}
    with running(tmp_path, limits=LIMITS, deadlines=deadlines, http="127.0.0.1:0") as server:
        for kind in KINDS:
            worker = scan_while_stopped(server, tmp_path, kind, goes_on=False)
            assert not is_alive(worker)
            assert figure(server, f'lvseg_workers_lost_total{{kind="{kind}"}}') >= 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)  # as someone who does not know might
        expect_serving(server, tmp_path)
        assert server.spooled() == []
