"""Jobs outlive whatever happens: killed servers, damaged databases, lost connections, the same scan fifty times."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving_fixtures import LIMIT_S, running, until
from test_serving import Raw, expect_right_mask, expect_serving, scan_file, send_all, submit_of

from serving import connection, protocol
from serving.jobs import DATABASE, JobTable, State

LIMITS = {"spool_free_bytes": 0, "chunk_bytes": 1000, "window_bytes": 8000}


def fetched(peer: Raw, job: bytes, folder: Path) -> Path:
    """The mask of a job that is done."""
    peer.socket.send_multipart(protocol.encode(protocol.Status(job)))
    done = peer.take_until(protocol.Done)
    path = folder / "fetched.nii.gz"
    path.write_bytes(peer.ask(protocol.Fetch(job, "mask.nii.gz", 0, done.files[0].bytes)).payload)
    return path


def test_fifty_identical_submissions_at_once_are_one_run(tmp_path: Path) -> None:
    with running(tmp_path, limits={**LIMITS, "queue": 3}) as server:
        scan = scan_file(tmp_path, name="same.nii.gz")
        together = threading.Barrier(50)

        def one(number: int) -> Path:
            out = tmp_path / f"{number}.nii.gz"
            with server.connect(connect_s=LIMIT_S) as client:
                together.wait(LIMIT_S)
                client.segment(scan, "bright", out, 3 * LIMIT_S)
            return out

        server.hold.touch()
        with ThreadPoolExecutor(50) as pool:
            answers = [pool.submit(one, number) for number in range(50)]
            until(lambda: server.runs("same.nii.gz"), "the scan is being segmented", 3 * LIMIT_S)
            server.hold.unlink()
            for answer in answers:
                expect_right_mask(scan, answer.result(3 * LIMIT_S))
        # Those that came after the last of the others had its answer may have had it done again.
        assert len(server.runs("same.nii.gz")) == 1
        assert server.spooled() == []


def test_a_client_that_comes_back_has_its_result_without_a_second_run(tmp_path: Path) -> None:
    with running(tmp_path, limits=LIMITS) as server:
        scan = scan_file(tmp_path)
        with Raw(server.endpoint) as peer:
            send_all(peer, scan.read_bytes())
            peer.take_until(protocol.Done)
        with server.connect() as client:  # the first one is gone without a word
            client.segment(scan, "bright", tmp_path / "mask.nii.gz", LIMIT_S)
        expect_right_mask(scan, tmp_path / "mask.nii.gz")
        assert len(server.runs(scan.name)) == 1
        assert server.spooled() == []


def test_an_upload_goes_on_at_its_last_safe_byte_after_the_server_was_killed(tmp_path: Path) -> None:
    scan = scan_file(tmp_path)
    content = scan.read_bytes()
    assert len(content) > 4000
    with running(tmp_path, limits={**LIMITS, "window_bytes": 2000}) as server, Raw(server.endpoint) as peer:
        job = peer.ask(submit_of(content)).job
        for offset in range(0, 3000, 1000):
            chunk = protocol.Chunk(job, offset, content[offset : offset + 1000])
            safe = peer.ask(chunk).until - 2000  # credit is given for what is on the disk
            assert safe == offset + 1000 or safe == len(content) - 2000
        server.process.kill()
        server.process.wait(LIMIT_S)
    with running(tmp_path, limits=LIMITS) as server, Raw(server.endpoint) as peer:
        accepted = peer.ask(submit_of(content))
        assert (accepted.job, accepted.offset >= safe) == (job, True)
        assert accepted.offset <= 4000
        rest = content[accepted.offset :]
        for offset in range(0, len(rest), 1000):
            chunk = protocol.Chunk(job, accepted.offset + offset, rest[offset : offset + 1000])
            peer.socket.send_multipart(protocol.encode(chunk))
        assert peer.take_until(protocol.Stored, protocol.Error) == protocol.Stored(job, submit_of(content).sha256)


@pytest.mark.parametrize("damage", ["garbage", "cut", "gone", "of another version"])
def test_a_damaged_database_costs_no_job_and_no_result(tmp_path: Path, damage: str) -> None:
    first, second = scan_file(tmp_path), scan_file(tmp_path, seed=1, name="second.nii.gz")
    with running(tmp_path, limits=LIMITS) as server, Raw(server.endpoint) as peer:
        finished = send_all(peer, first.read_bytes())
        peer.take_until(protocol.Done)
        server.hold.touch()
        waiting = send_all(peer, second.read_bytes())
        peer.take_until(protocol.Stored)
        server.process.kill()
        server.process.wait(LIMIT_S)
        server.hold.unlink()
    database = server.spool / DATABASE
    for suffix in ("-wal", "-shm"):
        database.with_name(DATABASE + suffix).unlink(missing_ok=True)
    if damage == "garbage":
        database.write_bytes(os.urandom(20_000))
    elif damage == "cut":
        database.write_bytes(database.read_bytes()[:3000])
    elif damage == "of another version":
        with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute("CREATE TABLE jobs (key TEXT PRIMARY KEY, state TEXT)")
    else:
        database.unlink()
    with running(tmp_path, limits=LIMITS) as server, Raw(server.endpoint) as peer:
        for job, scan in ((finished, first), (waiting, second)):
            expect_right_mask(scan, fetched(peer, job, tmp_path))
            assert peer.ask(protocol.Close(job)) == protocol.Closed(job)
        left = [path.name for path in server.spooled() if ".damaged-" not in path.name]
        assert left == []


def test_a_locked_database_is_told_and_what_came_before_and_after_is_done(tmp_path: Path) -> None:
    with running(tmp_path, limits=LIMITS) as server, Raw(server.endpoint) as peer:
        lock = sqlite3.connect(server.spool / DATABASE, isolation_level=None)
        with contextlib.closing(lock):
            lock.execute("BEGIN IMMEDIATE")
            error = peer.ask(submit_of(scan_file(tmp_path).read_bytes()))
            assert (error.code, error.fault, error.retryable) == ("STORAGE_FAILED", "server", True)
            assert server.spooled() == []
            lock.execute("ROLLBACK")
        expect_serving(server, tmp_path)


def test_a_lost_server_is_waited_for_and_the_same_call_ends_with_the_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ASK_S", 0.2)
    scan = scan_file(tmp_path)
    # The same port again, as after a restart by systemd.
    with running(tmp_path, limits=LIMITS) as server:
        port = server.endpoint.rpartition(":")[2]
        client = server.connect()
        server.hold.touch()
        segmenting = threading.Event()

        def watch(stage: str, done: int, total: int) -> None:
            if stage == "segment":
                segmenting.set()

        pool = ThreadPoolExecutor(1)
        answer = pool.submit(client.segment, scan, "bright", tmp_path / "mask.nii.gz", 3 * LIMIT_S, watch)
        assert segmenting.wait(LIMIT_S)
        server.process.kill()
        server.process.wait(LIMIT_S)
        server.hold.unlink()
    with running(tmp_path, port=port, limits=LIMITS):
        answer.result(3 * LIMIT_S)
    pool.shutdown()
    client.close()
    expect_right_mask(scan, tmp_path / "mask.nii.gz")


def test_a_thousand_cancels_at_random_moments_leave_nothing_behind(tmp_path: Path) -> None:
    drawn = random.Random(7)
    contents = [scan_file(tmp_path, seed, name=f"{seed}.nii.gz").read_bytes() for seed in range(8)]
    with running(tmp_path, limits={**LIMITS, "submits_a_minute": 100_000}) as server, Raw(server.endpoint) as peer:
        ended = 0
        while ended < 1000:
            content = drawn.choice(contents)
            peer.socket.send_multipart(protocol.encode(submit_of(content)))
            answer = peer.take_until(protocol.Accepted, protocol.Error)
            while isinstance(answer, protocol.Error) and answer.job:  # a late word on an earlier job
                answer = peer.take_until(protocol.Accepted, protocol.Error)
            if isinstance(answer, protocol.Error):
                assert answer.code == "BUSY", answer
                continue
            for offset in range(answer.offset, drawn.choice((0, 1000, len(content))), 1000):
                chunk = protocol.Chunk(answer.job, offset, content[offset : offset + 1000])
                peer.socket.send_multipart(protocol.encode(chunk))
            for _ in range(drawn.randrange(4)):
                if peer.socket.poll(2):
                    peer.socket.recv_multipart()
            for _ in range(drawn.choice((1, 1, 2))):  # again and again is the same as once
                peer.socket.send_multipart(protocol.encode(protocol.Cancel(answer.job)))
            ended += 1
        peer.socket.send_multipart(protocol.encode(protocol.Ping()))
        peer.take_until(protocol.Pong)
        until(lambda: server.spooled() == [], "every job is gone", 2 * LIMIT_S)
        expect_serving(server, tmp_path)


def test_a_cancelled_job_ends_for_everyone_who_waits_for_it(tmp_path: Path) -> None:
    with running(tmp_path, limits=LIMITS) as server, Raw(server.endpoint) as peer, Raw(server.endpoint) as other:
        server.hold.touch()
        job = send_all(peer, scan_file(tmp_path).read_bytes())
        other.socket.send_multipart(protocol.encode(protocol.Status(job)))
        other.take_until(protocol.Progress)
        peer.socket.send_multipart(protocol.encode(protocol.Cancel(job)))
        peer.take_until(protocol.Cancelled)
        assert other.take_until(protocol.Error).code == "CANCELLED"
        until(lambda: server.spooled() == [], "the job is gone")  # while its worker is still held
        assert other.ask(protocol.Status(job)).code == "NOT_FOUND"
        server.hold.unlink()
        expect_serving(server, tmp_path)


@pytest.mark.parametrize("kind", ["unpack", "segment", "pack"])
def test_a_killed_worker_of_each_kind_costs_nobody_an_answer(tmp_path: Path, kind: str) -> None:
    with running(tmp_path, limits=LIMITS) as server, ThreadPoolExecutor(6) as pool:

        def one(number: int) -> tuple[Path, Path]:
            scan, out = scan_file(tmp_path, number, name=f"{number}.nii.gz"), tmp_path / f"mask{number}.nii.gz"
            with server.connect() as client:
                for _ in range(3):
                    client.segment(scan, "bright", out, 3 * LIMIT_S)
            return scan, out

        answers = [pool.submit(one, number) for number in range(6)]
        (worker,) = server.workers(kind)
        os.kill(worker, signal.SIGKILL)
        for answer in answers:
            expect_right_mask(*answer.result(3 * LIMIT_S))
        assert server.workers(kind) != [worker]
        assert server.spooled() == []


def test_the_table_takes_over_what_an_earlier_one_left_in_its_order(tmp_path: Path) -> None:
    """All states at once, without a server: what waited or ran waits in the order of arrival, uploads go on."""
    table = JobTable(tmp_path, now=0.0)
    jobs = {}
    for name in ("first", "second", "third", "upload", "failed"):
        content = name.encode() * 1000
        submit = submit_of(content)
        model = protocol.Model(submit.model, 3, "0" * 64)
        job = table.add(protocol.job_key("", submit, model.sha256), submit, model, "", 0.0)
        table.write(job, content[: 3000 if name == "upload" else None])
        if name == "upload":
            table.flush(job)
            table.write(job, content[3000:3500])  # not safe yet
        else:
            assert table.stored(job, 0.0)
        jobs[name] = job.key
    assert table.next(0, 0.5) is not None  # the first is at work
    third = table.get(jobs["third"], "")
    failed = table.get(jobs["failed"], "")
    assert third is not None
    assert failed is not None
    error = protocol.Error(failed.key, "EXPIRED", "queue", "access", True, 0, "Expected time, received none.")
    table.fail(failed, error, 1.0)
    table.close()

    again = JobTable(tmp_path, now=100.0)
    states = {name: again.get(key, "").state for name, key in jobs.items()}  # type: ignore[union-attr]
    assert states == {
        "first": State.WAITING,
        "second": State.WAITING,
        "third": State.WAITING,
        "upload": State.RECEIVING,
        "failed": State.FAILED,
    }
    assert again.get(jobs["failed"], "").error == error  # type: ignore[union-attr]
    assert again.get(jobs["first"], "somebody") is None
    upload = again.get(jobs["upload"], "")
    assert upload is not None
    assert upload.offset == 3000
    again.reopen(upload)
    again.write(upload, b"upload" * 500)
    assert again.stored(upload, 101.0)  # whole, and with the right digest
    order = [again.next(0, 102.0) for _ in range(4)]
    assert [job.key for job in order if job] == [jobs[name] for name in ("first", "second", "third", "upload")]
    again.close()
