"""Frames drawn at random against the port, and requests of two owners in any order against a model of the table."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import zmq
from bad_files import volume
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from serving_fixtures import LIMIT_S, Server, memory_bytes, running, until
from test_access import connected, newcomer, take, upload
from test_serving import Raw, expect_right_mask, scan_file, submit_of
from test_serving_operation import figure, get, monitoring

from lvseg.formats import write_volume
from serving import protocol
from serving.connection import Client

CHUNK, WINDOW = 1000, 3000
LIMITS = {"spool_free_bytes": 0, "chunk_bytes": CHUNK, "window_bytes": WINDOW, "submits_a_minute": 100_000}
MIB = 1024 * 1024


@pytest.fixture(scope="module", params=["plain", "curve"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without encryption, and one with it."""
    secure = request.param == "curve"
    with running(tmp_path_factory.mktemp("server"), secure=secure, limits=LIMITS, http="127.0.0.1:0") as one:
        yield one
        assert one.process.poll() is None
        assert one.spooled() == []


# ---- frames drawn at random

MESSAGES = 100_000  # against each of the two servers
CONNECTIONS, BATCH = 6, 25
RAW_CONNECTIONS = 300
NASTY = (
    -1, 0, 1, 255, 256, 2**31, 2**53, 2**64, 10**400, 1.5, 1e308, True, None, "", "x", "\0", "../../etc", "é" * 70,
    "x" * 17_000, [], [[]] * 70, {}, {"a": {"b": []}}, "0" * 64, "ff" * 32,
)  # fmt: skip


def examples(content: bytes, job: bytes, done: bytes) -> list[Any]:
    """A sound message of every type, those of a client about a job that can be had or one that is done."""
    submit = submit_of(content)
    file = protocol.ResultFile("mask.nii.gz", 5, "0" * 64)
    model = protocol.Model("bright", 3, "0" * 64)
    return [
        protocol.Hello(1, 1, "test"),
        protocol.Welcome(1, "test", True, protocol.Limits(1, 1, 1, 1), (model,)),
        protocol.Ping(),
        protocol.Pong(),
        protocol.Error(job, "BUSY", "submit", "access", True, 1, "A text."),
        submit,
        protocol.Accepted(job, 0, 5),
        protocol.Chunk(job, 0, content),
        protocol.Credit(job, 5),
        protocol.Stored(job, "0" * 64),
        protocol.Status(job),
        protocol.Progress(job, "segment", 0, 1, 2),
        protocol.Done(job, (file,)),
        protocol.List(),
        protocol.Listing(1, (protocol.JobFacts("0" * 64, "scan", "bright", "queue", 0),)),
        protocol.Fetch(job, "mask.nii.gz", 0, 100),
        protocol.Fetch(done, "mask.nii.gz", 0, 100),
        protocol.Data(job, "mask.nii.gz", 0, b"12345"),
        protocol.Close(job),
        protocol.Closed(job),
        protocol.Cancel(job),
        protocol.Cancelled(job),
        protocol.Ready((model,)),
        protocol.Unable("bright", 3, "BROKEN", "A text."),
        protocol.Work(job, "a", "file", "bright", 3, "", "vtk", "raw", 5, 0, 0),
        protocol.Step(job, "segment", 1, 2),
        protocol.Result(job, (file,)),
        protocol.Failed(job, "BROKEN", "segment", "input", "A text."),
        protocol.Heartbeat(),
        protocol.Stop(job),
    ]


class Draws:
    """Messages that are nearly right, or not at all."""

    def __init__(self, seed: int, messages: list[Any]) -> None:
        self._random = random.Random(seed)
        self._sound = [protocol.encode(message) for message in messages]
        # What the gate takes from clients is drawn half of the time.
        self._taken = [protocol.encode(message) for message in messages if type(message) in protocol.FROM_CLIENT]
        self._ways = (
            self._same, self._byte, self._byte, self._cut, self._longer, self._drop, self._more, self._swap,
            self._kind, self._value, self._value, self._key, self._anything,
        )  # fmt: skip

    def next(self) -> list[bytes]:
        """The frames of one message."""
        frames = list(self._random.choice(self._random.choice((self._sound, self._taken))))
        self._random.choice(self._ways)(frames)
        return frames

    def key(self) -> bytes:
        """A job's that is none."""
        return self._random.randbytes(protocol.KEY_BYTES)

    def _bytes(self, most: int) -> bytes:
        return self._random.randbytes(self._random.randrange(most + 1))

    def _same(self, frames: list[bytes]) -> None:
        pass

    def _byte(self, frames: list[bytes]) -> None:
        place = self._random.randrange(len(frames))
        frame = bytearray(frames[place] or b"\0")
        frame[self._random.randrange(len(frame))] = self._random.randrange(256)
        frames[place] = bytes(frame)

    def _cut(self, frames: list[bytes]) -> None:
        place = self._random.randrange(len(frames))
        frames[place] = frames[place][: self._random.randrange(len(frames[place]) + 1)]

    def _longer(self, frames: list[bytes]) -> None:
        frames[self._random.randrange(len(frames))] += self._bytes(self._random.choice((4, 300, 20_000)))

    def _drop(self, frames: list[bytes]) -> None:
        del frames[self._random.randrange(len(frames))]

    def _more(self, frames: list[bytes]) -> None:
        for _ in range(self._random.choice((1, 1, 2, 40))):
            frames.insert(self._random.randrange(len(frames) + 1), self._bytes(20))

    def _swap(self, frames: list[bytes]) -> None:
        self._random.shuffle(frames)

    def _kind(self, frames: list[bytes]) -> None:
        frames[1] = bytes([self._random.randrange(256)])

    def _value(self, frames: list[bytes]) -> None:
        header = json.loads(frames[3])
        name = self._random.choice([*header, "other"])
        header[name] = self._random.choice(NASTY)
        frames[3] = json.dumps(header, ensure_ascii=False).encode()

    def _key(self, frames: list[bytes]) -> None:
        frames[2] = self._random.choice((b"", b"\0" * 32, self._random.randbytes(32), self._bytes(64)))

    def _anything(self, frames: list[bytes]) -> None:
        frames[:] = [self._bytes(50) for _ in range(self._random.randrange(1, 8))]


def bombard(sockets: list[zmq.Socket[bytes]], draws: Draws, count: int) -> Counter[str]:
    """Sends that many messages and takes every answer; what the answers were, errors by code.

    No connection has more than BATCH messages under way, since one that lets answers wait is given up.
    """
    answers: Counter[str] = Counter()
    last = [b""] * len(sockets)  # of each connection the unknown job that it asked for behind its messages

    def take_all(number: int) -> None:
        job = b"" if last[number] else None
        while job is not None and job != last[number]:
            assert sockets[number].poll(int(1000 * LIMIT_S)), "not every message is answered"
            message = protocol.decode(sockets[number].recv_multipart(), protocol.TO_CLIENT)
            answers[message.code if isinstance(message, protocol.Error) else type(message).__name__] += 1
            job = getattr(message, "job", b"")

    for batch in range(count // BATCH):
        number = batch % len(sockets)
        take_all(number)
        last[number] = draws.key()
        for frames in [*(draws.next() for _ in range(BATCH)), protocol.encode(protocol.Status(last[number]))]:
            assert sockets[number].poll(int(1000 * LIMIT_S), zmq.POLLOUT), "the gate takes nothing any more"
            sockets[number].send_multipart(frames, zmq.NOBLOCK)
    for number in range(len(sockets)):
        take_all(number)
    return answers


def raw_garbage(endpoint: str, mechanism: bytes, drawn: random.Random) -> None:
    """One TCP connection that says something wrong before, in or after the greeting of ZMTP, and goes."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32)
    ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
    ready = b"\x04" + bytes([len(ready)]) + ready
    noise = drawn.randbytes(drawn.randrange(1, 2000))
    changed = bytearray(greeting + ready)
    changed[drawn.randrange(len(changed))] = drawn.randrange(256)
    frames = [
        noise,
        greeting[: drawn.randrange(1, 64)],
        greeting + noise,
        greeting + ready + noise,
        bytes(changed) + noise,
        greeting + ready + b"\x02" + struct.pack(">Q", drawn.choice((2**20, 2**31, 2**40, 2**63, 2**64 - 1))) + noise,
        greeting + ready + b"\x01\x01x" * 500,  # one message without end
        greeting + ready + b"\x04\x07\x04PING\0\0" * 200,
        greeting + b"\x04\xc8\x05HELLO" + drawn.randbytes(194),
        greeting + b"\x04\x09\x05ERROR\x03abc",
    ]
    host, port = endpoint.removeprefix("tcp://").split(":")
    with contextlib.suppress(ConnectionError), socket.create_connection((host, int(port)), LIMIT_S) as raw:
        raw.sendall(drawn.choice(frames))


def test_two_hundred_thousand_wrong_messages_crash_hang_and_leak_nothing(server: Server, tmp_path: Path) -> None:
    is_plain = not (server.models.parent / "access" / "local.json").exists()
    credentials = None if is_plain else newcomer(server, "site")
    content, other = (write_volume(volume(seed=seed), tmp_path / "tiny.nii.gz")[0].read_bytes() for seed in range(2))
    scan = scan_file(tmp_path)

    def expect_serving() -> bytes:
        with Client(server.endpoint, credentials, insecure=credentials is None) as client:
            client.segment(scan, "bright", tmp_path / "mask.vtk", LIMIT_S)
            (model,) = client.greeting.models
        expect_right_mask(scan, tmp_path / "mask.vtk")
        return protocol.job_key(credentials.pair.public if credentials else "", submit_of(content), model.sha256)

    job = expect_serving()
    pid, drawn = server.process.pid, random.Random(2)
    with contextlib.ExitStack() as stack:

        def connect() -> zmq.Socket[bytes]:
            if credentials is None:
                return stack.enter_context(Raw(server.endpoint)).socket
            return stack.enter_context(connected(credentials))

        sockets = [connect() for _ in range(CONNECTIONS)]
        done = upload(sockets[0], other)
        take(sockets[0], protocol.Done)
        messages = examples(content, job, done)
        assert {type(message) for message in messages} == set(protocol.TYPES.values())
        draws = Draws(1, messages)
        answers = bombard(sockets, draws, MESSAGES // 10)  # after which everything has its size
        files, memory = len(list(Path(f"/proc/{pid}/fd").iterdir())), memory_bytes(pid)
        answers += bombard(sockets, draws, MESSAGES - MESSAGES // 10)
        for code in ("BAD_FRAME", "PROTO_UNSUPPORTED", "NOT_FOUND", "NO_SUCH_FILE", "BAD_OFFSET", "OVER_CREDIT"):
            assert answers[code] > 0, code
        for code in ("BAD_FRAME", "PROTO_UNSUPPORTED"):  # none was lost, and none counted twice
            assert figure(server, f'lvseg_requests_refused_total{{code="{code}"}}') == answers[code]
        assert answers["BAD_FRAME"] > MESSAGES / 2
        for kind in ("Welcome", "Pong", "Accepted", "Stored", "Data", "Closed", "Cancelled", "Listing"):
            assert answers[kind] > 0, kind  # some were right
        for _ in range(RAW_CONNECTIONS):
            raw_garbage(server.endpoint, b"NULL" if credentials is None else b"CURVE", drawn)
        assert server.process.poll() is None
        assert get(monitoring(server) + "/livez") == (200, "ok\n")
        peer = connect()
        while listed := listing_of(peer).jobs:
            for one in listed:
                ask(peer, protocol.Cancel(bytes.fromhex(one.job)))
        until(lambda: server.spooled() == [], "no job is left")
        until(lambda: len(list(Path(f"/proc/{pid}/fd").iterdir())) <= files + 5, "no file is left open")  # five for it
    assert memory_bytes(pid) - memory < 16 * MIB
    assert figure(server, "lvseg_handshakes_failed_total") > 0
    expect_serving()


def ask(peer: zmq.Socket[bytes], message: Any) -> list[Any]:
    """What comes after a message and before the answer to a PING behind it; the answers are among it, in order."""
    peer.send_multipart(protocol.encode(message))
    peer.send_multipart(protocol.encode(protocol.Ping()))
    came: list[Any] = []
    while True:
        assert peer.poll(int(1000 * LIMIT_S)), f"no answer to {message}"
        came.append(protocol.decode(peer.recv_multipart(), protocol.TO_CLIENT))
        if isinstance(came[-1], protocol.Pong):
            return came[:-1]


def listing_of(peer: zmq.Socket[bytes]) -> protocol.Listing:
    """The answer to LIST."""
    (listing,) = (one for one in ask(peer, protocol.List()) if isinstance(one, protocol.Listing))
    return listing


# ---- two owners, in any order

RECEIVING, TAKEN, DONE, FAILED = "receiving", "taken", "done", "failed"
LISTED = {
    RECEIVING: {"receiving"},
    TAKEN: {"queue", "unpack", "read", "segment", "write", "done"},
    DONE: {"done"},
    FAILED: {"failed"},
}


@dataclass
class Expected:
    """What a job has to be like."""

    state: str = RECEIVING
    offset: int = 0
    until: int = 0
    code: str = ""
    files: tuple[protocol.ResultFile, ...] = ()


@dataclass(frozen=True)
class Scan:
    """What is sent, what is announced, and what has to come of it: a code, or "" for a result."""

    content: bytes
    submit: protocol.Submit
    code: str


class TwoOwners(RuleBasedStateMachine):
    """Requests of two owners, about their own jobs and the other's, against `Expected`.

    One connection an owner. The jobs run as fast as they like: TAKEN is everything between the last byte and DONE.
    """

    peers: ClassVar[list[zmq.Socket[bytes]]]
    owners: ClassVar[list[str]]
    scans: ClassVar[list[Scan]]
    model: ClassVar[str]

    who = st.integers(0, 1)
    which = st.integers(0, 3)

    def __init__(self) -> None:
        super().__init__()
        self.jobs: dict[bytes, Expected] = {}
        self.order: dict[int, list[bytes]] = {0: [], 1: []}  # as LIST has them, the oldest first
        self.ending: set[bytes] = set()  # given up while a worker may have had them

    def key(self, owner: int, which: int) -> bytes:
        return protocol.job_key(self.owners[owner], self.scans[which].submit, self.model)

    def about(self, asker: int, message: Any, job: bytes) -> list[Any]:
        """What the asker hears of a job, without what its worker says around an answer that leaves the job running."""
        heard = [one for one in ask(self.peers[asker], message) if getattr(one, "job", None) == job]
        if isinstance(message, protocol.Chunk | protocol.Fetch) and job in self.order[asker]:
            return [one for one in heard if not isinstance(one, protocol.Progress | protocol.Done)]
        return heard

    def error(self, answers: list[Any], code: str) -> None:
        assert answers, f"expected {code}"
        assert (type(answers[-1]), answers[-1].code) == (protocol.Error, code)

    def gone(self, owner: int, job: bytes) -> None:
        if self.jobs.pop(job).state == TAKEN:
            self.ending.add(job)
        self.order[owner].remove(job)

    @rule(owner=who, which=which)
    def submit(self, owner: int, which: int) -> None:
        job, scan = self.key(owner, which), self.scans[which]
        size, known = scan.submit.bytes, self.jobs.get(job)
        came = ask(self.peers[owner], scan.submit)
        if known is None and job in self.ending:
            busy = [one for one in came if isinstance(one, protocol.Error) and not one.job]
            if busy:
                assert [(one.code, one.retryable) for one in busy] == [("BUSY", True)]
                return
        (accepted,) = (one for one in came if isinstance(one, protocol.Accepted))
        if known is None or known.state == FAILED:
            self.ending.discard(job)
            self.jobs[job] = known = Expected(until=min(size, WINDOW))
            self.order[owner] = [one for one in self.order[owner] if one != job] + [job]
        elif known.state == RECEIVING:
            known.until = max(known.until, min(size, known.offset + WINDOW))
        place = (known.offset, known.until) if known.state == RECEIVING else (size, size)
        assert accepted == protocol.Accepted(job, *place)
        if known.state == DONE:
            assert protocol.Done(job, known.files) in came

    @rule(asker=who, owner=who, which=which, shift=st.sampled_from([0, 0, 0, 0, -1, 1, 1000, -1000]),
          size=st.sampled_from([1, 499, 1000, 1000, 3001]))  # fmt: skip
    def chunk(self, asker: int, owner: int, which: int, shift: int, size: int) -> None:
        job, scan = self.key(owner, which), self.scans[which]
        known = self.jobs.get(job)
        right = known.offset if known else 0
        offset = max(0, right + shift)
        payload = scan.content[offset : offset + size] or b"beyond"
        answers = self.about(asker, protocol.Chunk(job, offset, payload), job)
        end = offset + len(payload)
        if known is None or asker != owner:
            self.error(answers, "NOT_FOUND")
        elif known.state != RECEIVING or offset != right:
            self.error(answers, "BAD_OFFSET")
        elif end > known.until:
            self.error(answers, "OVER_CREDIT")
        else:
            self.took(owner, job, scan, known, end, answers)

    def took(self, owner: int, job: bytes, scan: Scan, known: Expected, end: int, answers: list[Any]) -> None:
        """A chunk was the right one."""
        known.offset = end
        if end < scan.submit.bytes:
            credit = known.until < scan.submit.bytes and known.until - end <= WINDOW // 2
            moved = protocol.Credit(job, min(scan.submit.bytes, end + WINDOW))
            if answers or credit:  # without need, too, where a sender has not heard for seconds
                assert answers == [moved]
                known.until = moved.until
        elif scan.code == "DIGEST_MISMATCH":
            self.error(answers, scan.code)
            known.state, known.code = FAILED, scan.code
        else:
            assert answers[0] == protocol.Stored(job, scan.submit.sha256)
            known.state = TAKEN
            if scan.code:
                self.wait(owner, job, scan, known)

    @rule(owner=who, which=which)
    def send_the_rest(self, owner: int, which: int) -> None:
        job, scan = self.key(owner, which), self.scans[which]
        known = self.jobs.get(job)
        while known and known.state == RECEIVING:
            payload = scan.content[known.offset : min(known.offset + CHUNK, known.until)]
            answers = self.about(owner, protocol.Chunk(job, known.offset, payload), job)
            self.took(owner, job, scan, known, known.offset + len(payload), answers)

    @precondition(lambda self: any(one.state == TAKEN for one in self.jobs.values()))
    @rule(owner=who)
    def wait_for_all(self, owner: int) -> None:
        for which, scan in enumerate(self.scans):
            job = self.key(owner, which)
            if job in self.jobs and self.jobs[job].state == TAKEN:
                self.wait(owner, job, scan, self.jobs[job])

    def wait(self, owner: int, job: bytes, scan: Scan, known: Expected) -> None:
        """Until a job that was sent is done, or has failed as it must."""

        def last() -> Any:
            answers = self.about(owner, protocol.Status(job), job)
            return answers[-1] if isinstance(answers[-1], protocol.Done | protocol.Error) else None

        end = until(last, "the job ends")
        if scan.code:
            assert end.code == scan.code
            known.state, known.code = FAILED, scan.code
        else:
            assert [file.name for file in end.files] == ["mask.nii.gz", "result.json"]
            known.state, known.files = DONE, end.files

    @rule(asker=who, owner=who, which=which)
    def status(self, asker: int, owner: int, which: int) -> None:
        job = self.key(owner, which)
        known, answers = self.jobs.get(job), self.about(asker, protocol.Status(job), job)
        if known is None or asker != owner:
            self.error(answers, "NOT_FOUND")
        elif known.state == RECEIVING:
            known.until = max(known.until, min(self.scans[which].submit.bytes, known.offset + WINDOW))
            assert answers == [protocol.Accepted(job, known.offset, known.until)]
        elif known.state == TAKEN:
            assert isinstance(answers[-1], protocol.Progress | protocol.Done)
        elif known.state == DONE:
            assert answers[-1] == protocol.Done(job, known.files)
        else:
            self.error(answers, known.code)

    @rule(asker=who, owner=who, which=which, name=st.sampled_from(["mask.nii.gz", "result.json", "mask.vtk"]),
          place=st.sampled_from([0, 1, 100, -1, 10**6]))  # fmt: skip
    def fetch(self, asker: int, owner: int, which: int, name: str, place: int) -> None:
        job = self.key(owner, which)
        known = self.jobs.get(job)
        sizes = {file.name: file.bytes for file in known.files} if known else {}
        offset = place if place >= 0 else max(0, sizes.get(name, 1) - 1)
        answers = self.about(asker, protocol.Fetch(job, name, offset, 10_000), job)
        if known is None or asker != owner:
            self.error(answers, "NOT_FOUND")
        elif known.state != DONE and isinstance(answers[-1], protocol.Error):
            assert known.state == TAKEN or answers[-1].code == "NO_SUCH_FILE"
            assert answers[-1].code in ("NO_SUCH_FILE", "BAD_OFFSET")
        elif name not in sizes and known.state == DONE:
            self.error(answers, "NO_SUCH_FILE")
        elif known.state == DONE and offset >= sizes[name]:
            self.error(answers, "BAD_OFFSET")
        else:
            assert known.state in (TAKEN, DONE)
            data = answers[-1]
            assert (type(data), data.name, data.offset) == (protocol.Data, name, offset)
            for file in known.files:
                if (file.name, offset) == (name, 0):
                    assert hashlib.sha256(data.payload).hexdigest() == file.sha256

    @rule(asker=who, owner=who, which=which)
    def close_job(self, asker: int, owner: int, which: int) -> None:
        job = self.key(owner, which)
        answers = self.about(asker, protocol.Close(job), job)
        if job not in self.jobs or asker != owner:
            self.error(answers, "NOT_FOUND")
        else:
            assert answers[-1] == protocol.Closed(job)
            self.gone(owner, job)

    @rule(asker=who, owner=who, which=which, again=st.booleans())
    def cancel(self, asker: int, owner: int, which: int, again: bool) -> None:
        job = self.key(owner, which)
        for _ in range(1 + again):
            answers = self.about(asker, protocol.Cancel(job), job)
            if asker == owner and job in self.jobs:
                assert answers[-1] == protocol.Cancelled(job)
                self.gone(owner, job)
            elif asker != owner or job not in self.ending or isinstance(answers[-1], protocol.Error):
                self.error(answers, "NOT_FOUND")
            else:  # its worker has not let go of it yet
                assert answers[-1] == protocol.Cancelled(job)

    @rule(asker=who)
    def list(self, asker: int) -> None:
        listing = listing_of(self.peers[asker])
        assert [bytes.fromhex(one.job) for one in listing.jobs] == self.order[asker][::-1]
        assert listing.total == len(listing.jobs)
        for one in listing.jobs:
            assert one.state in LISTED[self.jobs[bytes.fromhex(one.job)].state]

    def teardown(self) -> None:
        for owner, peer in enumerate(self.peers):
            for job in list(self.order[owner]):
                ask(peer, protocol.Cancel(job))
            assert listing_of(peer) == protocol.Listing(0, ())


def test_two_owners_in_any_order_get_what_a_model_of_the_table_says(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    with running(tmp_path_factory.mktemp("two"), secure=True, limits=LIMITS) as server:
        good = [scan_file(tmp_path, seed, name=f"{seed}.nii.gz").read_bytes() for seed in range(2)]
        garbage, other = b"no scan" * 600, bytes(range(250)) * 10
        TwoOwners.scans = [
            *(Scan(content, submit_of(content), "") for content in good),
            Scan(garbage, submit_of(garbage), "UNSUPPORTED_FORMAT"),
            Scan(other, submit_of(other, sha256="0" * 64), "DIGEST_MISMATCH"),
        ]
        sites = [newcomer(server, name) for name in ("first", "second")]
        TwoOwners.owners = [site.pair.public for site in sites]
        with Client(credentials=sites[0]) as client:
            TwoOwners.model = client.greeting.models[0].sha256
        with connected(sites[0]) as first, connected(sites[1]) as second:
            TwoOwners.peers = [first, second]
            run_state_machine_as_test(
                TwoOwners,
                settings=settings(
                    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
                ),
            )
        until(lambda: server.spooled() == [], "nothing is left")
