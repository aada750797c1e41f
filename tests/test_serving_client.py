"""The client against servers and links that lose, repeat, wait and break off: scripted servers over real sockets."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import zmq
from serving_fixtures import DIGEST, LIMIT_S, until

from serving import connection, protocol, scans
from serving.client import main
from serving.connection import Client, ClientError
from serving.scans import package

ROOT = Path(__file__).parents[1]
CHUNK = 10_000
RATE = 400_000  # bytes a second of a slow link
MASK, MEASURED = b"mask" * 10, b'{"volume_ml": 1}'


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as one:
        one.bind(("::1", 0))
        return True
    return False


HOSTS = ["127.0.0.1", *(["[::1]"] if has_ipv6() else [])]


def key_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def error(job: bytes, code: str, stage: str, fault: str = "access", retryable: bool = True) -> protocol.Error:
    return protocol.Error(job, code, stage, fault, retryable, 0, "Expected something, received something else.")


class Job:
    """What a scripted server has of a scan."""

    def __init__(self, submit: protocol.Submit, until_byte: int) -> None:
        self.submit = submit
        self.offset, self.until = 0, until_byte


class Scripted:
    """A server that does each job at once, but for what a test has it say instead.

    Args:
        script: given each message, returns what is answered; None for what a server would answer.
        window: bytes that a client may send ahead.
        mask: the result of every job.
        host: where it listens.
    """

    def __init__(
        self,
        script: Callable[[Any], Sequence[Any] | None] = lambda _: None,
        window: int = 10**9,
        mask: bytes = MASK,
        host: str = "127.0.0.1",
    ) -> None:
        self.script, self.window = script, window
        self.heard: list[Any] = []
        self.jobs: dict[bytes, Job] = {}
        self.results = {"mask.vtk": mask, "result.json": MEASURED}
        self.files = tuple(
            protocol.ResultFile(name, len(content), hashlib.sha256(content).hexdigest())
            for name, content in self.results.items()
        )
        self.problems: list[BaseException] = []
        self.route = b""  # from which the last message came
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.IPV6, "[" in host)
        self.socket.bind(f"tcp://{host}:*")
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def __enter__(self) -> Scripted:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.thread.join()
        self.socket.close()
        self.context.term()
        assert self.problems == []

    def run(self) -> None:
        while not self.closing.is_set():
            if not self.socket.poll(20):
                continue
            route, *frames = self.socket.recv_multipart()
            self.route = route
            try:
                message = protocol.decode(frames, protocol.FROM_CLIENT)
                self.heard.append(message)
                answers = self.script(message)
                for answer in self.answers(message) if answers is None else answers:
                    self.socket.send_multipart([route, *protocol.encode(answer)])
            except Exception as problem:  # for the test to tell
                self.problems.append(problem)

    def all(self, kind: type[Any]) -> list[Any]:
        """What was heard of a kind."""
        return [message for message in list(self.heard) if isinstance(message, kind)]

    def answers(self, message: Any) -> list[Any]:
        """What a server answers."""
        if isinstance(message, protocol.Hello):
            models = (protocol.Model("bright", 3, DIGEST),)
            return [protocol.Welcome(1, "scripted", True, protocol.Limits(10**9, 10**9, 100, CHUNK), models)]
        if isinstance(message, protocol.Submit):
            key = key_of(message.name)
            job = self.jobs.setdefault(key, Job(message, min(message.bytes, self.window)))
            return [protocol.Accepted(key, job.offset, job.until), *self.ready(key)]
        key = message.job
        if isinstance(message, protocol.Close):
            self.jobs.pop(key, None)
            return [protocol.Closed(key)]
        if key not in self.jobs:
            return [error(key, "NOT_FOUND", "queue", retryable=False)]
        job = self.jobs[key]
        if isinstance(message, protocol.Status):
            return self.ready(key) or [protocol.Accepted(key, job.offset, job.until)]
        if isinstance(message, protocol.Fetch):
            content = self.results[message.name][message.offset : message.offset + message.bytes]
            return [protocol.Data(key, message.name, message.offset, content)]
        if not isinstance(message, protocol.Chunk) or message.offset != job.offset:
            return [error(key, "BAD_OFFSET", "upload")]
        job.offset += len(message.payload)
        if job.offset == job.submit.bytes:
            return [protocol.Stored(key, job.submit.sha256), *self.ready(key)]
        if job.until < job.submit.bytes and job.until - job.offset <= self.window // 2:
            job.until = min(job.submit.bytes, job.offset + self.window)
            return [protocol.Credit(key, job.until)]
        return []

    def ready(self, key: bytes) -> list[Any]:
        """DONE, once the scan is there."""
        job = self.jobs[key]
        return [protocol.Done(key, self.files)] if job.offset == job.submit.bytes else []


class Link:
    """A link to a server, as slow as is asked for, that can be cut.

    Args:
        endpoint: of the server.
        up, down: bytes a second to and from the server; None for as fast as it goes.
    """

    def __init__(self, endpoint: str, up: float | None = None, down: float | None = None) -> None:
        self.port = int(endpoint.rpartition(":")[2])
        self.rates = {"up": up, "down": down}
        self.carried = {"up": 0, "down": 0}
        self.to_break = self.broken = 0
        self.ends: list[socket.socket] = []
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        self.endpoint = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.cut()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                if self.to_break:
                    self.to_break -= 1
                    self.broken += 1
                    near.close()
                    continue
                far = socket.socket()
                far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
                far.connect(("127.0.0.1", self.port))
                self.ends += [near, far]
                for source, sink, way in ((near, far, "up"), (far, near, "down")):
                    threading.Thread(target=self.carry, args=(source, sink, way), daemon=True).start()

    def carry(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(8192):
                self.carried[way] += len(piece)
                if rate := self.rates[way]:
                    time.sleep(len(piece) / rate)
                sink.sendall(piece)

    def cut(self, breaking: int = 0) -> None:
        """Ends the connections, and breaks off so many of those that begin afterwards."""
        self.to_break = breaking
        ends, self.ends = self.ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def scan_of(folder: Path, size: int = 3 * CHUNK, name: str = "scan.nii.gz") -> Path:
    """A file that calls itself a scan; a scripted server looks no further."""
    path = folder / name
    path.write_bytes(os.urandom(size))
    return path


def segment(endpoint: str, scan: Path, out: Path, **how: Any) -> tuple[list[Path], dict[str, Any]]:
    """One scan over a connection of its own."""
    with Client(endpoint, insecure=True) as client:
        return client.segment(scan, "bright", out, how.pop("timeout_s", LIMIT_S), **how)


def expect_done(answer: tuple[list[Path], dict[str, Any]], out: Path, mask: bytes = MASK) -> None:
    assert answer == ([out], json.loads(MEASURED))
    assert out.read_bytes() == mask


# ---- slow links


@pytest.mark.parametrize("host", HOSTS)
def test_addresses_of_either_kind_are_reached(tmp_path: Path, host: str) -> None:
    with Scripted(host=host) as server:
        assert host in server.endpoint
        expect_done(segment(server.endpoint, scan_of(tmp_path), tmp_path / "out.vtk"), tmp_path / "out.vtk")


def test_over_a_slow_link_every_byte_is_sent_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "ASK_S", 0.05)
    scan, size, window = scan_of(tmp_path, 80 * CHUNK), 80 * CHUNK, 40 * CHUNK
    with Scripted(window=window) as server, Link(server.endpoint, up=RATE) as link:
        expect_done(segment(link.endpoint, scan, tmp_path / "out.vtk"), tmp_path / "out.vtk")
    assert [chunk.offset for chunk in server.all(protocol.Chunk)] == list(range(0, size, CHUNK))
    assert link.carried["up"] < 1.1 * size
    assert len(server.all(protocol.Status)) <= 2 + 2 * size // (window // 2)  # one at a time, not one every 0.05 s


def test_an_answer_that_was_not_asked_for_is_no_place_to_go_back_to(tmp_path: Path) -> None:
    def script(message: Any) -> list[Any] | None:
        if isinstance(message, protocol.Chunk) and message.offset == 0:
            return [*server.answers(message), protocol.Accepted(message.job, 0, 10 * CHUNK)]
        return None

    with Scripted(script, window=6 * CHUNK) as server:
        segment(server.endpoint, scan_of(tmp_path, 10 * CHUNK), tmp_path / "out.vtk")
    assert [chunk.offset for chunk in server.all(protocol.Chunk)] == list(range(0, 10 * CHUNK, CHUNK))


def test_what_another_connection_sends_of_the_same_scan_is_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ASK_S", 0.05)

    def script(message: Any) -> list[Any] | None:
        if isinstance(message, protocol.Submit):
            key = server.answers(message)[0].job
            return [protocol.Accepted(key, 0, 0)]  # its credit is the other connection's
        if isinstance(message, protocol.Status) and (job := server.jobs[message.job]).offset < job.submit.bytes:
            job.offset = min(job.submit.bytes, job.offset + 2 * CHUNK)
            return server.ready(message.job) or [protocol.Accepted(message.job, job.offset, job.offset)]
        return None

    with Scripted(script) as server:
        expect_done(segment(server.endpoint, scan_of(tmp_path, 10 * CHUNK), tmp_path / "out.vtk"), tmp_path / "out.vtk")
        assert server.all(protocol.Chunk) == []


def test_a_chunk_that_the_server_did_not_get_is_sent_again(tmp_path: Path) -> None:
    lost = []

    def script(message: Any) -> list[Any] | None:
        if isinstance(message, protocol.Chunk) and message.offset == 2 * CHUNK and not lost:
            lost.append(message)
            return []
        return None

    with Scripted(script) as server:
        expect_done(segment(server.endpoint, scan_of(tmp_path, 10 * CHUNK), tmp_path / "out.vtk"), tmp_path / "out.vtk")


@pytest.mark.parametrize("code", ["BAD_OFFSET", "OVER_CREDIT"])
def test_late_words_about_chunks_end_nothing(tmp_path: Path, code: str) -> None:
    def script(message: Any) -> list[Any] | None:
        late = error(message.job, code, "upload") if hasattr(message, "job") else None
        if isinstance(message, protocol.Chunk) and message.offset == 2 * CHUNK:
            stored, done = server.answers(message)
            return [stored, late, late, done]
        return [late, *server.answers(message)] if isinstance(message, protocol.Fetch) else None

    with Scripted(script) as server:
        expect_done(segment(server.endpoint, scan_of(tmp_path), tmp_path / "out.vtk"), tmp_path / "out.vtk")
    assert len(server.all(protocol.Submit)) == 1


def test_over_a_slow_link_every_byte_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "ASK_S", 0.01)  # less than a DATA takes
    mask = os.urandom(60 * CHUNK)
    with Scripted(mask=mask) as server, Link(server.endpoint, down=RATE) as link:
        expect_done(segment(link.endpoint, scan_of(tmp_path), tmp_path / "out.vtk"), tmp_path / "out.vtk", mask)
    fetched = [fetch.offset for fetch in server.all(protocol.Fetch) if fetch.name == "mask.vtk"]
    assert fetched == list(range(0, len(mask), CHUNK))
    assert link.carried["down"] < 1.2 * len(mask)


@pytest.mark.parametrize("stage", ["send", "receive"])
def test_a_connection_that_is_lost_on_the_way_costs_nothing_but_time(tmp_path: Path, stage: str) -> None:
    mask, scan, cut = os.urandom(40 * CHUNK), scan_of(tmp_path, 40 * CHUNK), []

    def once(at: str, done: int, total: int) -> None:
        if at == stage and 0 < done < total and not cut:
            cut.append(done)
            link.cut()

    with Scripted(window=20 * CHUNK, mask=mask) as server, Link(server.endpoint, up=RATE, down=RATE) as link:
        answer = segment(link.endpoint, scan, tmp_path / "out.vtk", on_progress=once)
    expect_done(answer, tmp_path / "out.vtk", mask)
    assert cut


def test_a_result_that_comes_twice_is_the_same(tmp_path: Path) -> None:
    mask = os.urandom(20 * CHUNK)

    def script(message: Any) -> list[Any] | None:
        return 2 * server.answers(message) if isinstance(message, protocol.Fetch) else None

    with Scripted(script, mask=mask) as server:
        expect_done(segment(server.endpoint, scan_of(tmp_path), tmp_path / "out.vtk"), tmp_path / "out.vtk", mask)


def test_data_that_was_lost_without_a_sign_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "ASK_S", 0.05)
    monkeypatch.setattr(connection, "NO_DATA_S", 0.2)
    lost = []

    def script(message: Any) -> list[Any] | None:
        if isinstance(message, protocol.Fetch) and not lost:
            lost.append(message)
            return []
        return None

    with Scripted(script) as server:
        expect_done(segment(server.endpoint, scan_of(tmp_path), tmp_path / "out.vtk"), tmp_path / "out.vtk")


# ---- servers that are started again


def test_a_server_that_gives_smaller_pieces_than_it_did_is_asked_for_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was started again with a smaller `chunk_bytes`."""
    monkeypatch.setattr(connection, "NO_DATA_S", 10 * LIMIT_S)  # waiting is not the way
    mask = os.urandom(20 * CHUNK + 1)
    contents = {"mask.vtk": mask, "result.json": MEASURED}

    def script(message: Any) -> list[Any] | None:
        if not isinstance(message, protocol.Fetch):
            return None
        piece = contents[message.name][message.offset : message.offset + min(message.bytes, CHUNK // 3)]
        return [protocol.Data(message.job, message.name, message.offset, piece)]

    with Scripted(script, mask=mask) as server:
        expect_done(segment(server.endpoint, scan_of(tmp_path), tmp_path / "out.vtk"), tmp_path / "out.vtk", mask)
        pieces = sum(-(-len(content) // (CHUNK // 3)) for content in contents.values())
        assert len(server.all(protocol.Fetch)) <= pieces + connection.FETCHES_AHEAD * len(contents)


def test_a_late_answer_is_not_taken_for_one_about_the_next_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has the first scan already; what it says of that comes only after the second one was announced."""
    monkeypatch.setattr(connection, "SILENCE_S", 0.5)
    first, second = scan_of(tmp_path, name="first.nii.gz"), scan_of(tmp_path, name="second.nii.gz")
    late: list[tuple[bytes, Any]] = []

    def script(message: Any) -> list[Any] | None:
        if not isinstance(message, protocol.Submit):
            return None
        if message.name == first.name:
            job = server.jobs.setdefault(key_of(first.name), Job(message, message.bytes))
            job.offset = message.bytes
            late.extend((server.route, answer) for answer in server.answers(message))
            return []
        for route, answer in late:
            server.socket.send_multipart([route, *protocol.encode(answer)])
        return None

    with Scripted(script) as server, Client(server.endpoint, insecure=True) as client:
        with pytest.raises(ClientError) as told:
            client.segment(first, "bright", tmp_path / "first.vtk")
        assert told.value.code == "UNREACHABLE"
        expect_done(client.segment(second, "bright", tmp_path / "second.vtk"), tmp_path / "second.vtk")
        assert [chunk.job for chunk in server.all(protocol.Chunk)] == [key_of(second.name)] * 3
        assert {fetch.job for fetch in server.all(protocol.Fetch)} == {key_of(second.name)}


def test_an_announcement_that_is_lost_with_a_server_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ANNOUNCE_S", 0.2)
    monkeypatch.setattr(connection, "SILENCE_S", 5.0)

    def script(message: Any) -> list[Any] | None:
        return [] if isinstance(message, protocol.Submit) and len(server.all(protocol.Submit)) == 1 else None

    with Scripted(script) as server:
        expect_done(segment(server.endpoint, scan_of(tmp_path), tmp_path / "out.vtk"), tmp_path / "out.vtk")
    assert len(server.all(protocol.Submit)) == 2


def test_connections_that_break_off_while_a_server_is_started_again_are_waited_for(tmp_path: Path) -> None:
    broken = connection.BROKEN_MAX

    def script(message: Any) -> list[Any] | None:
        is_back = link.broken == broken
        if isinstance(message, protocol.Chunk) and message.offset == 2 * CHUNK:
            return [server.answers(message)[0], protocol.Progress(message.job, "segment", 0, 0, 1)]
        if isinstance(message, protocol.Status) and not is_back:
            return [protocol.Progress(message.job, "segment", 0, 0, 1)]
        return None

    def once(stage: str, done: int, total: int) -> None:
        if stage == "segment" and not link.broken and not link.to_break:
            link.cut(breaking=broken)

    with Scripted(script) as server, Link(server.endpoint) as link:
        answer = segment(link.endpoint, scan_of(tmp_path), tmp_path / "out.vtk", on_progress=once)
        assert link.broken == broken
    expect_done(answer, tmp_path / "out.vtk")


def test_connections_that_break_off_before_a_server_has_greeted_are_told() -> None:
    with Scripted() as server, Link(server.endpoint) as link:
        link.cut(breaking=100)
        with pytest.raises(ClientError) as told:
            Client(link.endpoint, insecure=True)
    assert told.value.code == "SERVER_KEY_MISMATCH"


# ---- errors that may pass


@pytest.mark.parametrize(
    ("code", "fault", "retryable", "tries"),
    [
        ("STORAGE_FAILED", "server", True, 2), ("MODEL_UNAVAILABLE", "access", True, 2),
        ("NOT_FOUND", "access", False, 2), ("INTERNAL", "server", False, 1), ("CANCELLED", "access", False, 1),
        ("BAD_GEOMETRY", "input", True, 1),
    ],
)  # fmt: skip
def test_the_server_says_what_is_worth_another_try(
    tmp_path: Path, code: str, fault: str, retryable: bool, tries: int
) -> None:
    def script(message: Any) -> list[Any] | None:
        if isinstance(message, protocol.Chunk) and len(server.all(protocol.Submit)) == 1:
            server.jobs.pop(message.job, None)
            return [error(message.job, code, "queue", fault, retryable)] if message.offset == 0 else []
        return None

    with Scripted(script) as server:
        scan, out = scan_of(tmp_path, 100), tmp_path / "out.vtk"
        if tries == 1:
            with pytest.raises(ClientError) as told:
                segment(server.endpoint, scan, out)
            assert told.value.code == code
        else:
            expect_done(segment(server.endpoint, scan, out), out)
        assert len(server.all(protocol.Submit)) == tries
        assert len(server.all(protocol.Close)) == 1


def test_a_server_that_stays_unable_is_given_up_at_the_limit(tmp_path: Path) -> None:
    def script(message: Any) -> list[Any] | None:
        return [error(b"", "STORAGE_FAILED", "submit", "server")] if isinstance(message, protocol.Submit) else None

    with Scripted(script) as server, pytest.raises(ClientError) as told:
        segment(server.endpoint, scan_of(tmp_path), tmp_path / "out.vtk", timeout_s=0.5)
    assert told.value.code == "STORAGE_FAILED"
    assert len(server.all(protocol.Submit)) > 1


def test_memory_that_never_suffices_ends_after_a_few_tries(tmp_path: Path) -> None:
    def script(message: Any) -> list[Any] | None:
        if isinstance(message, protocol.Chunk):
            del server.jobs[message.job]
            return [error(message.job, "OUT_OF_MEMORY", "segment", "server")]
        return None

    with Scripted(script) as server, pytest.raises(ClientError) as told:
        segment(server.endpoint, scan_of(tmp_path, 100), tmp_path / "out.vtk")
    assert told.value.code == "OUT_OF_MEMORY"
    assert len(server.all(protocol.Submit)) == connection.SHORT_MAX


# ---- this computer's own trouble


def test_a_result_that_cannot_be_written_is_kept_for_the_same_call_again(tmp_path: Path) -> None:
    out = tmp_path / "masks/out.vtk"

    def remove(stage: str, done: int, total: int) -> None:
        if stage == "receive" and done == len(MASK):
            shutil.rmtree(out.parent)

    scan = scan_of(tmp_path)
    with Scripted() as server:
        with pytest.raises(ClientError) as told:
            segment(server.endpoint, scan, out, on_progress=remove)
        assert told.value.code == "BAD_OUTPUT"
        assert server.all(protocol.Close) == []
        expect_done(segment(server.endpoint, scan, out), out)
        assert len(server.all(protocol.Chunk)) == 3  # sent once
        assert len(server.all(protocol.Close)) == 1


def test_an_answer_is_on_the_disk_before_the_server_may_forget_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of each file before it gets its name, and the names of files and of new folders."""
    scan, out, table = scan_of(tmp_path), tmp_path / "new/masks/out.vtk", tmp_path / "tables/volumes.json"
    synced: list[tuple[int, int]] = []  # file and size
    at_close: list[tuple[int, int]] = []
    sync = os.fsync

    def noted(descriptor: int) -> None:
        facts = os.fstat(descriptor)
        synced.append((facts.st_ino, 0 if Path(f"/proc/self/fd/{descriptor}").is_dir() else facts.st_size))
        sync(descriptor)

    def script(message: Any) -> list[Any] | None:
        if isinstance(message, protocol.Close):
            at_close.extend(synced)
        return None

    monkeypatch.setattr(os, "fsync", noted)
    with Scripted(script) as server:
        how = ["--insecure", "--server", server.endpoint, "--model", "bright", "-o", str(out), "--json", str(table)]
        assert main(["submit", str(scan), *how]) == 0
    files = [(path.stat().st_ino, path.stat().st_size) for path in (out, table)]
    folders = [(path.stat().st_ino, 0) for path in (tmp_path, tmp_path / "new", out.parent, table.parent)]
    assert set(files + folders) <= set(at_close)
    assert at_close.index(files[0]) < at_close.index((out.parent.stat().st_ino, 0))


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL])
def test_a_disk_that_fails_is_told_and_one_that_syncs_no_folders_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def failing(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", failing)
    scan, out = scan_of(tmp_path), tmp_path / "out.vtk"
    with Scripted() as server:
        if code == errno.EINVAL:
            expect_done(segment(server.endpoint, scan, out), out)
        else:
            with pytest.raises(ClientError) as told:
                segment(server.endpoint, scan, out)
            assert told.value.code == "BAD_OUTPUT"
            assert server.all(protocol.Close) == []  # the same call again finds the result


def test_a_full_folder_for_temporary_files_is_told_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = scan_of(tmp_path)
    monkeypatch.setattr(scans.tempfile, "SpooledTemporaryFile", lambda _: Path("/dev/full").open("r+b"))  # noqa: SIM115
    with pytest.raises(ClientError) as told:
        package(scan)
    assert (told.value.code, told.value.exit_code) == ("TEMPORARY_FULL", 1)
    assert tempfile.gettempdir() in told.value.sentence
    assert os.strerror(errno.ENOSPC) in told.value.sentence


def test_no_folder_for_temporary_files_is_not_taken_for_a_missing_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = scan_of(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    with pytest.raises(ClientError) as told:
        package(scan)
    assert told.value.code == "TEMPORARY_FULL"


# ---- the command


@contextlib.contextmanager
def command(server: Scripted, folder: Path, *arguments: object, stdin: Path | None = None) -> Iterator[Any]:
    """`submit` in a process that looks often and waits little; `folder/told` is what it says. Ended by Ctrl-C."""
    (folder / "temporary").mkdir()
    impatient = (
        "import sys, serving.client as c, serving.scans as s; s.SPOOL_BYTES = 10;"
        "c.LOOK_EVERY_S, c.SETTLED_S, c.PATIENCE_S, c.DONE_EVERY_S = 0.05, 0.2, 0.1, 0.1; sys.exit(c.main())"
    )
    line = [sys.executable, "-c", impatient, "submit", "--insecure", "--server", server.endpoint, "--model", "bright"]
    with contextlib.ExitStack() as stack:
        told = stack.enter_context((folder / "told").open("w"))
        given = stack.enter_context(stdin.open("rb")) if stdin else subprocess.DEVNULL
        process = stack.enter_context(
            subprocess.Popen(
                [*line, *map(str, arguments)], cwd=ROOT, stdin=given, stdout=subprocess.DEVNULL, stderr=told,
                env={**os.environ, "TMPDIR": str(folder / "temporary")},
            )
        )  # fmt: skip
        try:
            yield process
            process.send_signal(signal.SIGINT)
            assert process.wait(LIMIT_S) == 1
        finally:
            process.kill()
    assert "Traceback" not in (folder / "told").read_text()
    assert list((folder / "temporary").iterdir()) == []


def test_what_is_said_of_a_scan_is_there_before_the_server_may_forget_it(tmp_path: Path) -> None:
    scans_there = [scan_of(tmp_path, name=f"{name}.nii.gz") for name in ("one", "two")]
    table, found = tmp_path / "volumes.json", []

    def script(message: Any) -> list[Any] | None:
        if isinstance(message, protocol.Close):
            found.append(json.loads(table.read_text()))
        return [] if isinstance(message, protocol.Submit) and message.name == "two.nii.gz" else None

    with Scripted(script) as server:
        with command(server, tmp_path, *scans_there, "-o", tmp_path / "masks", "--json", table):
            until(lambda: found, "one scan is done")
        (said,) = found[0]
        assert (said["scan"], said["volume_ml"]) == (str(scans_there[0]), 1)
        assert json.loads(table.read_text()) == [said]  # after Ctrl-C, too


def test_a_table_keeps_what_an_earlier_call_said_until_a_scan_is_done_again(tmp_path: Path) -> None:
    """So that a call that comes to nothing costs no measurements, whose results are gone from the server."""
    done, cut = (scan_of(tmp_path, name=f"{name}.nii.gz") for name in ("done", "cut"))
    table = tmp_path / "volumes.json"
    old = [{"scan": str(each), "volume_ml": 7} for each in (tmp_path / "other", done, cut)]
    table.write_text(json.dumps(old))

    def script(message: Any) -> list[Any] | None:
        return [] if isinstance(message, protocol.Submit) and message.name == cut.name else None

    given = (done, cut, "-o", tmp_path / "masks", "--json", table)
    with Scripted(script) as server, command(server, tmp_path, *given):
        until(lambda: server.all(protocol.Close), "one scan is done")
    assert [(each["scan"], each["volume_ml"]) for each in json.loads(table.read_text())] == [
        (str(done), 1),
        (str(cut), 7),
    ]


def test_a_table_that_cannot_be_written_costs_no_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every mask is made, the results stay with the server for the same call again, and it is said."""
    scans_there = [scan_of(tmp_path, name=f"{name}.nii.gz") for name in ("one", "two", "three")]

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with Scripted() as server:
        arguments = ["--insecure", "--server", server.endpoint, "--model", "bright", "-o", str(tmp_path / "masks")]
        code = main(["submit", *map(str, scans_there), *arguments, "--json", str(tmp_path / "volumes.json")])
        assert server.all(protocol.Close) == []
    assert code != 0 and "volumes.json" in capsys.readouterr().err
    assert len(list((tmp_path / "masks").glob("*.vtk"))) == 3


@pytest.mark.parametrize(
    ("code", "fault", "worst"), [("INTERNAL", "server", 1), ("CANCELLED", "access", 4), ("EXPIRED", "access", 4)]
)
def test_what_happens_to_one_scan_of_many_ends_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str, fault: str, worst: int
) -> None:
    """Nor is a scan that is under way meanwhile given up on the server; a bad scan beside it does not hide the code."""
    names, table = ("bad", "first", "second", "third"), tmp_path / "volumes.json"
    scans_there = [scan_of(tmp_path, 100, f"{name}.nii.gz") for name in names]
    held: list[bytes] = []

    def script(message: Any) -> list[Any] | None:
        job = getattr(message, "job", b"")
        if job == key_of("bad.nii.gz") and isinstance(message, protocol.Chunk):
            return [error(job, "BAD_GEOMETRY", "read", "input", False)]
        if job == key_of("second.nii.gz") and isinstance(message, protocol.Chunk):
            return [error(job, code, "segment", fault, False)]
        ended = any(close.job == key_of("second.nii.gz") for close in server.all(protocol.Close))
        if job == key_of("first.nii.gz") and isinstance(message, protocol.Chunk) and not ended:
            held.append(server.route)
            return [protocol.Progress(job, "segment", 0, 0, 1)]
        if job == key_of("second.nii.gz") and isinstance(message, protocol.Close) and held:
            first = key_of("first.nii.gz")  # the one under way is done only now
            server.jobs[first].offset = server.jobs[first].submit.bytes
            server.socket.send_multipart([held[0], *protocol.encode(protocol.Done(first, server.files))])
        return None

    with Scripted(script) as server:
        arguments = ["--insecure", "--server", server.endpoint, "--model", "bright", "-o", str(tmp_path / "masks")]
        given = [*map(str, scans_there), *arguments, "--json", str(table), "--at-once", "2"]
        assert main(["submit", *given]) == worst
    assert {path.name for path in (tmp_path / "masks").iterdir()} == {"first.vtk", "third.vtk"}
    said = json.loads(table.read_text())
    assert [each.get("error", {}).get("code") for each in said] == ["BAD_GEOMETRY", None, code, None]
    assert capsys.readouterr().err.count("serving.client: ") == 2


def test_what_is_of_the_access_ends_all_scans(tmp_path: Path) -> None:
    scans_there = [scan_of(tmp_path, 100, f"{name}.nii.gz") for name in ("one", "two", "three")]

    def script(message: Any) -> list[Any] | None:
        is_out = isinstance(message, protocol.Submit)
        return [error(b"", "NOT_AUTHORISED", "frame", retryable=False)] if is_out else None

    with Scripted(script) as server:
        arguments = ["--insecure", "--server", server.endpoint, "--model", "bright", "-o", str(tmp_path / "masks")]
        assert main(["submit", *map(str, scans_there), *arguments, "--at-once", "1"]) == 4
        assert len(server.all(protocol.Submit)) == 1


def test_a_watched_folder_has_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--watch", str(tmp_path), "--model", "bright", "-o", str(tmp_path / "masks"), "--json", "v.json"]
    assert main(["submit", "--insecure", *arguments]) == 2
    assert "--json without --watch" in capsys.readouterr().err


def test_a_watched_folder_that_cannot_be_looked_at_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ("x" * 300)
    out = ["--model", "bright", "-o", str(tmp_path / "masks")]
    assert main(["submit", "--insecure", "--watch", str(folder), *out]) == 2
    said = f"serving.client: Expected a folder to watch, received 'File name too long' for {folder}."
    assert said in capsys.readouterr().err


@pytest.fixture
def incoming(tmp_path: Path) -> Path:
    """A folder to watch."""
    (tmp_path / "incoming").mkdir()
    return tmp_path / "incoming"


def test_a_watched_scan_that_has_to_wait_holds_up_no_other(tmp_path: Path, incoming: Path) -> None:
    out, is_free = tmp_path / "masks", threading.Event()
    slow, again, bad = (key_of(f"{name}.nii.gz") for name in ("slow", "again", "bad"))

    def script(message: Any) -> list[Any] | None:
        job = getattr(message, "job", b"")
        if job == slow and isinstance(message, protocol.Chunk | protocol.Status) and not is_free.is_set():
            return [protocol.Progress(job, "segment", 0, 0, 1)]
        if isinstance(message, protocol.Chunk) and job == bad:
            return [error(job, "BAD_GEOMETRY", "read", "input", False)]
        first = [one.name for one in server.all(protocol.Submit)].count("again.nii.gz") == 1
        if isinstance(message, protocol.Chunk) and job == again and first:
            return [error(job, "CANCELLED", "queue", retryable=False)]
        return None

    for name in ("again", "bad", "good", "slow"):
        scan_of(incoming, 100, f"{name}.nii.gz")
    with Scripted(script) as server, command(server, tmp_path, "--watch", incoming, "-o", out):
        for done in ("good.vtk.result.json", "again.vtk.result.json", "bad.vtk.failed.json"):
            until((out / done).exists, f"{done} is written while another scan waits")
        assert not (out / "slow.vtk").exists()
        job = server.jobs[slow]
        job.offset = job.submit.bytes
        is_free.set()
        until((out / "slow.vtk.result.json").exists, "the scan that had to wait is done")
        assert json.loads((out / "bad.vtk.failed.json").read_text())["error"]["code"] == "BAD_GEOMETRY"
        assert not (out / "again.vtk.failed.json").exists()


def test_a_watched_folder_that_is_empty_is_no_scan_yet(tmp_path: Path, incoming: Path) -> None:
    out, study = tmp_path / "masks", incoming / "study"
    study.mkdir()
    (incoming / "late.nii.gz").touch()
    with Scripted() as server, command(server, tmp_path, "--watch", incoming, "-o", out):
        for name in ("one", "two"):  # each takes as long to settle as the folder would
            scan_of(incoming, 100, f"{name}.nii.gz")
            until((out / f"{name}.vtk.result.json").exists, "a scan beside it is done")
        assert {path.name.partition(".")[0] for path in out.iterdir()} == {"one", "two"}
        scan_of(study, 100, "1.dcm")
        scan_of(incoming, 100, "late.nii.gz")
        for name in ("study", "late"):
            until((out / f"{name}.vtk.result.json").exists, "what was filled is done")


def test_a_watched_series_that_grew_after_it_was_sent_is_sent_again_whole(tmp_path: Path, incoming: Path) -> None:
    """An export that pauses for longer than a scan takes to settle, and goes on while the server is at work."""
    out, study = tmp_path / "masks", incoming / "study"
    study.mkdir()
    scan_of(study, 100, "1.dcm")

    def script(message: Any) -> list[Any] | None:
        if isinstance(message, protocol.Chunk) and not (study / "2.dcm").exists():
            scan_of(study, 100, "2.dcm")
        return None

    with Scripted(script) as server, command(server, tmp_path, "--watch", incoming, "-o", out):
        result = out / "study.vtk.result.json"
        until(result.exists, "the series is done")
        assert json.loads(result.read_text())["scan_mark"][:2] == [2, 200]
        assert len(server.all(protocol.Submit)) == 2
        assert (out / "study.vtk").read_bytes() == MASK
        assert "changed after it was sent" in (tmp_path / "told").read_text()
        scan_of(study, 100, "3.dcm")
        until(lambda: json.loads(result.read_text())["scan_mark"][:2] == [3, 300], "what came later is sent, too")


def test_a_watched_scan_that_is_replaced_is_done_again_and_loses_its_failure(tmp_path: Path, incoming: Path) -> None:
    out, scan = tmp_path / "masks", scan_of(incoming, 100)
    result, failure = out / "scan.vtk.result.json", out / "scan.vtk.failed.json"

    def script(message: Any) -> list[Any] | None:
        is_bad = isinstance(message, protocol.Chunk) and len(server.all(protocol.Submit)) == 1
        return [error(message.job, "BAD_GEOMETRY", "read", "input", False)] if is_bad else None

    with Scripted(script) as server, command(server, tmp_path, "--watch", incoming, "-o", out):
        until(failure.exists, "the first one is told to be bad")
        server.jobs.clear()
        scan_of(incoming, 200)
        until(result.exists, "the one in its place is done")
        until(lambda: not failure.exists(), "the failure was of the first one")
        assert json.loads(result.read_text())["scan_mark"] == [1, 200, scan.stat().st_mtime_ns]


def test_a_watched_scan_that_fits_no_memory_is_written_down_and_holds_no_place(tmp_path: Path, incoming: Path) -> None:
    def script(message: Any) -> list[Any] | None:
        if isinstance(message, protocol.Chunk) and message.job == key_of("huge.nii.gz"):
            del server.jobs[message.job]
            return [error(message.job, "OUT_OF_MEMORY", "segment", "server")]
        return None

    scan_of(incoming, 100, "huge.nii.gz")
    scan_of(incoming, 100, "small.nii.gz")
    out = tmp_path / "masks"
    with Scripted(script) as server, command(server, tmp_path, "--watch", incoming, "-o", out, "--at-once", "1"):
        until((out / "small.vtk.result.json").exists, "the scan behind it is done")
        failure = json.loads((out / "huge.vtk.failed.json").read_text())
        assert failure["error"]["code"] == "OUT_OF_MEMORY"


def test_a_watched_scan_that_was_taken_away_while_it_was_done_has_its_answer(tmp_path: Path, incoming: Path) -> None:
    scan = scan_of(incoming, 100)

    def script(message: Any) -> list[Any] | None:
        if isinstance(message, protocol.Chunk):
            scan.unlink()
        return None

    with Scripted(script) as server, command(server, tmp_path, "--watch", incoming, "-o", tmp_path / "masks"):
        until((tmp_path / "masks/scan.vtk.result.json").exists, "it is done")
        assert len(server.all(protocol.Submit)) == 1


def test_what_an_earlier_version_wrote_of_a_watched_scan_counts_and_what_is_cut_short_does_not(
    tmp_path: Path, incoming: Path
) -> None:
    out = tmp_path / "masks"
    out.mkdir()
    for name, said in (("earlier", '{"volume_ml": 7}'), ("cut", '{"volume_ml"'), ("last", "")):
        scan_of(incoming, 100, f"{name}.nii.gz")
        (out / f"{name}.vtk.result.json").write_text(said)
    with Scripted() as server, command(server, tmp_path, "--watch", incoming, "-o", out):
        for name in ("cut", "last"):
            result = out / f"{name}.vtk.result.json"
            until(lambda result=result: "scan_mark" in result.read_text(), "it is done again")
        assert json.loads((out / "earlier.vtk.result.json").read_text()) == {"volume_ml": 7}
        assert {submit.name for submit in server.all(protocol.Submit)} == {"cut.nii.gz", "last.nii.gz"}


def test_of_two_watched_scans_with_one_mask_the_second_is_told_and_left(tmp_path: Path, incoming: Path) -> None:
    out = tmp_path / "masks"
    scan_of(incoming, 100, "one.nii.gz")
    scan_of(incoming, 100, "one.nrrd")
    out.mkdir()
    (out / "two.vtk").write_text("a mask without its measurements, as a client that was killed leaves it")
    scan_of(incoming, 100, "two.nii.gz")
    with Scripted() as server, command(server, tmp_path, "--watch", incoming, "-o", out):
        for name in ("one", "two"):
            until((out / f"{name}.vtk.result.json").exists, "it is done")
        until(lambda: "one.nrrd" in (tmp_path / "told").read_text(), "the other one is told")
        assert [submit.name for submit in server.all(protocol.Submit)].count("one.nrrd") == 0


def test_a_watched_scan_that_comes_later_takes_no_other_one_s_mask(tmp_path: Path, incoming: Path) -> None:
    out = tmp_path / "masks"
    scan_of(incoming, 100, "one.nrrd")
    with Scripted() as server, command(server, tmp_path, "--watch", incoming, "-o", out):
        until((out / "one.vtk.result.json").exists, "it is done")
        scan_of(incoming, 100, "one.nii.gz")  # before it in the alphabet
        until(lambda: "one.nii.gz" in (tmp_path / "told").read_text(), "the other one is told")
        scan_of(incoming, 100, "two.nii.gz")
        until((out / "two.vtk.result.json").exists, "it was looked again")
        assert [submit.name for submit in server.all(protocol.Submit)] == ["one.nrrd", "two.nii.gz"]


def test_a_watched_folder_that_goes_away_is_looked_for_until_it_is_back(tmp_path: Path, incoming: Path) -> None:
    out = tmp_path / "masks"
    with Scripted() as server, command(server, tmp_path, "--watch", incoming, "-o", out) as process:
        for turn in ("one", "two"):
            scan_of(incoming, 100, f"{turn}.nii.gz")
            until((out / f"{turn}.vtk.result.json").exists, "a scan is done")
            incoming.rename(tmp_path / "away")
            said = 1 if turn == "one" else 2
            until(lambda n=said: (tmp_path / "told").read_text().count("\n") == n, "one sentence says so")
            (tmp_path / "away").rename(incoming)
        assert process.poll() is None


@pytest.mark.parametrize("is_stdin", [False, True])
def test_an_interrupted_upload_leaves_nothing_here_and_no_job_there(tmp_path: Path, is_stdin: bool) -> None:
    out, names = tmp_path / "masks", ["stdin.nii.gz"] if is_stdin else [f"{number}.nii.gz" for number in range(3)]
    sent = [scan_of(tmp_path, name=name) for name in names]
    if is_stdin:
        sent[0].write_bytes(b"\x1f\x8b" + sent[0].read_bytes())

    def script(message: Any) -> list[Any] | None:
        return [] if isinstance(message, protocol.Chunk) else None  # and no credit for more

    with Scripted(script, window=CHUNK) as server:
        arguments = ["-" if is_stdin else scan for scan in sent]
        with command(server, tmp_path, *arguments, "-o", out, stdin=sent[0] if is_stdin else None):
            until(lambda: len(server.all(protocol.Chunk)) == len(names), "all are being sent")
        assert {close.job for close in server.all(protocol.Close)} == {key_of(name) for name in names}
        assert server.jobs == {}
    assert not out.exists() or list(out.iterdir()) == []
