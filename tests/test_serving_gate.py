"""What the gate decides of models, places, shares and time, with time given or against real processes."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from serving_fixtures import LIMIT_S, STUCK, BrightVoxels, is_alive, make_models, make_version, running, state_of, until
from test_serving import Raw, expect_right_mask, expect_serving, scan_file, send_all, submit_of

from lvseg.errors import InputError
from serving import access, catalogue, crew, jobs, protocol, worker
from serving.config import ServerConfig
from serving.connection import Client
from serving.crew import Generation
from serving.errors import ClientError, KeyFileUnreadable
from serving.gate import CLIENT_IDLE_S, Gate
from serving.handlers import CREDIT_EVERY_S
from serving.jobs import RESULT, UPLOAD, JobTable, State
from serving.replies import Outbox, Refusal

LIMITS = {"spool_free_bytes": 0}
MODEL = protocol.Model("bright", 3, "0" * 64)


@contextlib.contextmanager
def gate(folder: Path, command: tuple[str, ...], **keys: object) -> Iterator[Gate]:
    """A gate in this process whose workers are any command; its loop is not run."""
    models, spool = make_models(folder / "models"), folder / "spool"
    spool.mkdir(mode=0o700)
    catalogue.trust_on_first_start(folder / "access", models)
    values = {"models": models, "spool": spool, "access": folder / "access", "bind": "tcp://127.0.0.1:*", **keys}
    made = Gate(ServerConfig.model_validate(values), None, command)
    try:
        yield made
    finally:
        made.close()


def table_with(folder: Path, *names: str, now: float = 0.0) -> tuple[JobTable, list[jobs.Job]]:
    """A table with whole uploads that wait."""
    table = JobTable(folder, now)
    added = []
    for name in names:
        content = name.encode() * 100
        submit = submit_of(content)
        job = table.add(protocol.job_key("", submit, MODEL.sha256), submit, MODEL, "", now)
        table.write(job, content)
        assert table.stored(job, now)
        added.append(job)
    return table, added


# ---- processes


def test_workers_that_end_together_while_they_load_cost_the_new_models_alone(tmp_path: Path) -> None:
    """Losing the first ends the generation, and so the second, which is then not lost a second time."""
    with gate(tmp_path, ("sh", "-c", "exit 3", "sh"), workers=2) as one:
        one._follow_lists()
        served, one.workers.coming = one.workers.coming, None
        assert served is not None
        one.workers.serving = Generation(0, served.entries)  # as if these were served; their processes end, too
        one.workers.bring(served.entries)
        now = 0.0
        while one.workers.coming is not None:
            assert now < 1000.0
            now += 100.0  # beyond any delay before the next start
            one.workers.start_missing(now)
            for worker in one.workers:
                worker.process.wait(LIMIT_S)
            one._watch_workers(now)
        assert one.workers.serving is not None


def device_of(worker: crew.Worker) -> str:
    """What a process was told to see."""
    entries = Path(f"/proc/{worker.process.pid}/environ").read_bytes().split(b"\0")
    return next((one.decode().partition("=")[2] for one in entries if one.startswith(b"CUDA_VISIBLE_DEVICES=")), "")


def test_a_worker_that_is_started_again_gets_the_device_of_the_one_lost(tmp_path: Path) -> None:
    with gate(tmp_path, ("sh", "-c", "exec sleep 1000", "sh"), devices=["5", "7"]) as one:
        one._follow_lists()
        one.workers.start_missing(0.0)

        def both() -> dict[str, crew.Worker] | None:
            found = {device_of(worker): worker for worker in one.workers if worker.step == crew.SEGMENT}
            return found if set(found) == {"5", "7"} else None  # one that is just being started says nothing yet

        for lost in ("5", "7", "5"):
            worker = until(both, "both are there")[lost]
            worker.ready = True
            one._lose(worker, 1.0)
            one.workers.start_missing(2.0)
        until(both, "both are there")


class Line:
    """A worker's link, over which the word that nobody wants its only job comes as soon as that has begun."""

    def __init__(self, work: protocol.Work) -> None:
        self.work, self.sent, self.stopped = [work], [], b""

    def send(self, message: object) -> None:
        self.sent.append(message)
        if isinstance(message, protocol.Step):
            self.stopped = message.job

    def take(self) -> protocol.Work:
        if not self.work:
            raise SystemExit
        return self.work.pop()


def test_the_deleted_files_of_a_job_that_was_cancelled_are_not_told_as_a_fault_of_the_spool(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    version = make_version(tmp_path / "models", 3)
    served = worker.Served("bright", 3, catalogue.digest_of(version), version)
    key = b"1" * 32
    line = Line(protocol.Work(key, "scan.nii.gz", "file", "bright", 3, "", "vtk", "raw", 100, 0, 0))
    try:
        with pytest.raises(SystemExit):
            worker.serve("segment", line, tmp_path, [served], 10, 1000, load=BrightVoxels)
    finally:
        gc.unfreeze()
    failed = line.sent[-1]
    assert (type(failed), failed.job, failed.code) == (protocol.Failed, key, "CANCELLED")
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_command_that_cannot_be_started_is_tried_again_and_ends_nothing(tmp_path: Path) -> None:
    with gate(tmp_path, (str(tmp_path / "not-there"),)) as one:
        one._follow_lists()
        one._watch_workers(0.0)
        assert list(one.workers) == []
        one.workers._command = ("sh", "-c", "exec sleep 1000", "sh")
        one._watch_workers(1000.0)
        assert {worker.step for worker in one.workers} == {crew.UNPACK, crew.SEGMENT, crew.PACK}


def test_a_worker_that_never_gets_ready_again_is_tried_for_ever(tmp_path: Path) -> None:
    """While models are served, such as with a disk that lacks a library since it was exchanged, until it is back."""
    with gate(tmp_path, ("sh", "-c", "exec sleep 1000", "sh")) as one:
        one._follow_lists()
        one.workers.serving, one.workers.coming = one.workers.coming, None
        for failed_before in (0, 5, 2000):  # the last are seventeen hours
            one.workers.start_missing(1e9)
            worker = next(iter(one.workers))
            one.workers._failed_starts[worker.step] = failed_before
            one._lose(worker, 0.0)
            assert 1.0 <= one.workers._restart_at[worker.step] <= crew.RESTART_MAX_S


def test_a_server_that_stood_still_gives_no_worker_up(tmp_path: Path) -> None:
    deadlines = {"silent_s": 2.0, "start_s": 60.0}
    with running(tmp_path, limits=LIMITS, deadlines=deadlines) as server:
        before = {pid for kind in jobs.STEPS for pid in server.workers(kind)}
        assert len(before) == len(jobs.STEPS)
        everyone = [server.process.pid, *before]
        for pid in everyone:  # as a machine that is suspended
            os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(ClientError), server.connect(connect_s=4.0):
                pass  # the wait for this is how long it stands still
        finally:
            for pid in everyone:
                os.kill(pid, signal.SIGCONT)
        expect_serving(server, tmp_path)
        assert {pid for kind in jobs.STEPS for pid in server.workers(kind)} == before


def test_a_server_that_stood_still_gives_no_scan_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a machine that was suspended, or a disk that answered no more for so long."""
    with gate(tmp_path, ("sh", "-c", "exec sleep 1000", "sh")) as one:
        now, stood_still_s, turns = 100.0, 2 * one.config.deadlines.result_keep_s, iter(range(5))
        upload, waiting, result = (
            one.jobs.add(protocol.job_key("", submit, MODEL.sha256), submit, MODEL, "", now)
            for submit in (submit_of(b"upload"), submit_of(b"scan"), submit_of(b"result"))
        )
        one.jobs.write(waiting, b"scan")
        assert one.jobs.stored(waiting, now)
        result.state = State.DONE

        def stopping() -> int:
            nonlocal now
            turn = next(turns)
            now += stood_still_s if turn == 2 else 0.1
            return 2 if turn == 4 else 0

        monkeypatch.setattr("serving.gate.time", SimpleNamespace(monotonic=lambda: now))
        one.run(stopping, lambda: None)
        assert [job.state for job in (upload, waiting, result)] == [State.RECEIVING, State.WAITING, State.DONE]
        assert len(one.jobs) == 3
        one._expire(now + upload.submit.deadline_ms / 1000)  # time goes on
        assert waiting.state is State.FAILED


def test_the_time_for_which_a_server_stood_still_counts_not_after_a_restart_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(jobs, "time", SimpleNamespace(time=lambda: 1e9 + now, monotonic=lambda: now))
    table, _ = table_with(tmp_path, "scan", now=now)
    now += 5000.0
    table.excuse(5000.0)
    now += 10.0
    table.close()
    (again,) = later = JobTable(tmp_path, now)
    assert now - again.touched == pytest.approx(10.0, abs=0.01)
    later.close()


@pytest.mark.parametrize("kind", jobs.STEPS)
def test_a_worker_that_cannot_run_ends_with_a_killed_server(tmp_path: Path, kind: str) -> None:
    """Else it would keep its device's memory, and could go on in a spool that is the next server's."""
    with running(tmp_path, limits=LIMITS) as server:
        (worker,) = server.workers(kind)
        os.kill(worker, signal.SIGSTOP)
        until(lambda: state_of(worker) == "T", "it is stopped")
        server.process.kill()
        try:
            until(lambda: not is_alive(worker), "it ends, too")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


def test_a_worker_that_loads_nothing_when_started_again_is_no_worker_and_the_scan_waits(tmp_path: Path) -> None:
    with running(tmp_path, limits=LIMITS) as server:
        aside = tmp_path / "aside"
        (server.models / "bright/3").rename(aside)
        os.kill(server.workers()[0], signal.SIGKILL)
        scan = scan_file(tmp_path)
        with ThreadPoolExecutor() as pool, server.connect() as client:
            answer = pool.submit(client.segment, scan, "bright", tmp_path / "mask.nii.gz", 3 * LIMIT_S)
            until(lambda: "loads nothing" in server.log.read_text(), "it is seen", 2 * LIMIT_S)
            aside.rename(server.models / "bright/3")
            answer.result(3 * LIMIT_S)
        expect_right_mask(scan, tmp_path / "mask.nii.gz")
        assert server.spooled() == []


# ---- versions


def test_a_name_never_means_an_older_version_that_is_loaded_beside_a_current_one_that_fails(tmp_path: Path) -> None:
    make_models(tmp_path / "models")
    shutil.rmtree(tmp_path / "models/bright/3")
    make_version(tmp_path / "models", 3, broken=True)
    with running(tmp_path, limits=LIMITS, serve={"bright": [1]}) as server, server.connect() as client:
        scan = scan_file(tmp_path)
        with pytest.raises(ClientError) as raised:
            client.segment(scan, "bright", tmp_path / "mask.nii.gz", LIMIT_S)
        assert raised.value.code == "MODEL_UNKNOWN"
        client.segment(scan, "bright/1", tmp_path / "mask.nii.gz", LIMIT_S)
        expect_right_mask(scan, tmp_path / "mask.nii.gz")
        assert server.runs(scan.name) == [1]


def test_a_scan_that_waits_while_models_are_exchanged_is_done_by_the_new_one_and_not_given_out_as_the_old_ones(
    tmp_path: Path,
) -> None:
    access = tmp_path / "access"
    with running(tmp_path, limits=LIMITS) as server, Raw(server.endpoint) as peer:
        first = scan_file(tmp_path, brightest=STUCK, name="one.nii.gz")
        second = scan_file(tmp_path, seed=1, name="two.nii.gz")
        stuck = send_all(peer, first.read_bytes(), name=first.name)
        until(lambda: server.runs(first.name), "the first is at work")
        job = send_all(peer, second.read_bytes(), name=second.name)
        named = send_all(peer, second.read_bytes(), name="named.nii.gz", version=3)
        catalogue.allow(access, make_version(server.models, 4))
        gone = peer.take_until(protocol.Error)  # who asked for version 3 gets no other
        assert (gone.job, gone.code, gone.retryable) == (named, "MODEL_UNAVAILABLE", True)
        peer.socket.send_multipart(protocol.encode(protocol.Cancel(stuck)))
        done = peer.take_until(protocol.Done)
        while done.job != job:
            done = peer.take_until(protocol.Done)
        assert (server.runs(first.name), server.runs(second.name)) == ([3], [4])
        catalogue.roll_back(access, server.models, "bright")
        until(lambda: [one.version for one in welcome(server.endpoint).models] == [3], "it is rolled back")
        with server.connect() as client:  # the same scan for the same version as at first: not what version 4 said
            client.segment(second, "bright", tmp_path / "mask.nii.gz", LIMIT_S)
        assert server.runs(second.name) == [4, 3]
        gone = peer.take_until(protocol.Error)  # who waited for the answer of version 4 is told
        assert (gone.job, gone.code) == (job, "CANCELLED")


def welcome(endpoint: str) -> protocol.Welcome:
    with Client(endpoint, insecure=True) as client:
        return client.greeting


def test_scans_of_a_model_that_cannot_be_loaded_wait_for_it_and_hold_up_no_other(tmp_path: Path) -> None:
    """A start, or a worker started again, that finds one of several models damaged."""
    how = {"limits": LIMITS, "serve": {"bright": [1]}}
    waiting = [scan_file(tmp_path, seed=seed, name=f"{seed}.nii.gz") for seed in range(1, 5)]
    scan = scan_file(tmp_path)
    with running(tmp_path, **how) as server, Raw(server.endpoint) as peer:
        server.hold.touch()
        keys = set()
        for one in waiting:
            keys.add(send_all(peer, one.read_bytes(), name=one.name))
            peer.take_until(protocol.Stored)
        server.process.kill()
        server.process.wait(LIMIT_S)
        server.hold.unlink()
    (server.models / "bright/3").rename(tmp_path / "third")
    with running(tmp_path, **how) as server, server.connect() as client:
        client.segment(scan, "bright/1", tmp_path / "mask.nii.gz", LIMIT_S)
        expect_right_mask(scan, tmp_path / "mask.nii.gz")
        assert {bytes.fromhex(job.job): job.state for job in client.jobs().jobs} == dict.fromkeys(keys, "queue")
    (tmp_path / "third").rename(server.models / "bright/3")
    with running(tmp_path, **how) as server, server.connect() as client:
        for one in waiting:
            client.segment(one, "bright", tmp_path / "mask.nii.gz", LIMIT_S)
            expect_right_mask(one, tmp_path / "mask.nii.gz")
            assert server.runs(one.name).count(1) == 0


def test_a_model_that_cannot_be_loaded_keeps_no_other_from_being_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gate(tmp_path, ("sleep", "1000")) as one:
        one._follow_lists()
        coming = one.workers.coming
        assert coming is not None
        lost, other = catalogue.Entry("dark", 1, "ab" * 32, "2026-11-28"), coming.entries[0]
        told = [protocol.Unable(each.model, each.version, "MODEL_UNAVAILABLE", each.model) for each in (lost, other)]
        worker = crew.Worker(b"w", cast(Any, None), crew.SEGMENT, coming.number, 0, 0.0, 0.0)
        worker.served, worker.failed = (other.served,), told[:1]
        assert one.workers._refusal(worker) is None  # at the start
        one.workers.serving = crew.Generation(0, coming.entries)
        assert one.workers._refusal(worker) == "dark"  # it would take the place of one that works
        monkeypatch.setattr(crew.Crew, "lacking", (lost,))
        assert one.workers._refusal(worker) is None
        worker.failed = told
        assert one.workers._refusal(worker) == other.model
        worker.served, worker.failed = (), told[:1]
        assert one.workers._refusal(worker) == "dark"


def test_a_scan_waits_for_a_model_that_cannot_be_loaded_as_long_as_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gate(tmp_path, ("sleep", "1000")) as one:
        one._follow_lists()
        assert one.workers.coming is not None
        entry = next(entry for entry in one.workers.coming.entries if entry.version == 3)
        monkeypatch.setattr(crew.Crew, "lacking", (entry,))
        submit = submit_of(b"scan")
        job = one.jobs.add(b"1" * 32, submit, entry.served, "", 0.0)
        one.jobs.write(job, b"scan")
        assert one.jobs.stored(job, 0.0)
        job.losses, one.was_ready = 1, True
        one._expire(submit.deadline_ms / 1000 - 1.0)
        assert (job.state, one.jobs.waiting(0), one.jobs.waiting(0, but={entry.served})) == (State.WAITING, 1, 0)
        limits = one.config.limits.model_copy(update={"queue": 1})
        monkeypatch.setattr(one.handlers, "config", one.config.model_copy(update={"limits": limits}))
        one.handlers._check_comes_in([job], 0.0)  # it holds nobody up
        monkeypatch.setattr(crew.Crew, "lacking", ())
        with pytest.raises(Refusal, match="1 scans wait"):
            one.handlers._check_comes_in([job], 0.0)
        monkeypatch.setattr(crew.Crew, "lacking", (entry,))
        one._expire(submit.deadline_ms / 1000 + 1.0)
        assert job.error is not None and job.error.code == "EXPIRED"
        assert "Expected bright/3 to be loaded in time for scan.nii.gz" in job.error.text


# ---- the table, with time given


def test_a_result_whose_row_cannot_be_written_is_made_again_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LOCKED_S", 0.05)
    table, (job,) = table_with(tmp_path, "scan")
    for step in range(3):
        assert table.next(step, 1.0) is job
        if step < 2:
            table.advance(job, 1.0)
    (job.folder / RESULT).mkdir()
    (job.folder / RESULT / "result.json").write_text("{}")
    lock = sqlite3.connect(tmp_path / jobs.DATABASE, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    table.done(job, (jobs.described(job.folder / RESULT / "result.json"),), 2.0)
    assert table.problem
    lock.execute("ROLLBACK")
    lock.close()
    table.probe()
    assert not table.problem
    table.close()
    (job.folder / RESULT / "result.json").unlink()
    again = JobTable(tmp_path, 3.0)
    taken = again.get(job.key, "")
    assert taken is not None
    assert taken.state is State.WAITING
    assert again.next(0, 4.0) is taken
    assert taken.queued_s == 1.0  # since the start; not since the machine's
    again.close()


def test_a_job_cancelled_while_it_runs_does_not_come_back_after_a_crash(tmp_path: Path) -> None:
    table, (job, other) = table_with(tmp_path, "cancelled", "other")
    assert table.next(0, 1.0) is job
    table.remove(job)
    assert not (job.folder / UPLOAD).exists()
    table.close()  # as a crash leaves it: the worker has not let go yet
    again = JobTable(tmp_path, 2.0)
    assert [each.key for each in again] == [other.key]
    assert not job.folder.exists()
    again.close()


def test_an_upload_whose_client_is_gone_holds_no_place_and_no_room(tmp_path: Path) -> None:
    table = JobTable(tmp_path, 0.0)
    submit = submit_of(b"x" * 1000)
    job = table.add(protocol.job_key("", submit, MODEL.sha256), submit, MODEL, "", 0.0)
    table.write(job, b"x" * 400)
    assert table.receiving(1.0) == [job]
    assert table.reserved_bytes(1.0) == 600 + submit.content_bytes
    later = jobs.UPLOAD_ACTIVE_S + 1.0
    assert (table.receiving(later), table.reserved_bytes(later)) == ([], 0)
    table.close()


def test_an_upload_that_stood_still_goes_on_only_where_there_is_place_and_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later, route = jobs.UPLOAD_ACTIVE_S + 1.0, b"route"
    with gate(tmp_path, ("sleep", "1000"), limits={"uploads": 1, **LIMITS}) as one:
        still, other = (
            one.jobs.add(protocol.job_key("", submit, MODEL.sha256), submit, MODEL, "", began)
            for submit, began in ((submit_of(b"x" * 1000), 0.0), (submit_of(b"y" * 1000), later))
        )
        for job in (still, other):
            job.until, job.sender = 1000, route
        with pytest.raises(Refusal) as told:  # the other one has its place
            one.handlers._chunk(route, protocol.Chunk(still.key, 0, b"x" * 10), "", later)
        assert (told.value.code, still.offset, still.state) == ("BUSY", 0, State.RECEIVING)
        one._expire(one.config.deadlines.upload_idle_s + 1.0)  # it was heard of later
        assert still.state is State.RECEIVING
        one.jobs.remove(other)
        monkeypatch.setattr(one.handlers, "_check_submit", lambda _: MODEL)  # no worker has it
        free = SimpleNamespace(free=999)
        monkeypatch.setattr("serving.handlers.shutil.disk_usage", lambda _: free)
        with pytest.raises(Refusal) as told:
            one.handlers._submit(route, still.submit, "", later)
        assert (told.value.code, still.state) == ("STORAGE_FULL", State.RECEIVING)
        free.free = 10**9
        one.handlers._chunk(route, protocol.Chunk(still.key, 0, b"x" * 10), "", later)
        assert still.offset == 10
        free.free = 0  # for one that goes on, room was kept
        one.handlers._chunk(route, protocol.Chunk(still.key, 10, b"x" * 10), "", later + 1.0)
        assert still.offset == 20


def test_what_is_older_than_its_machine_has_run_is_given_up_in_its_time(tmp_path: Path) -> None:
    """The clock that does not jump begins at 0 when the machine is started."""
    with gate(tmp_path, ("sleep", "1000")) as one:
        day_s, started = one.config.deadlines.result_keep_s, 20.0
        upload, result, young = (
            one.jobs.add(protocol.job_key("", submit, MODEL.sha256), submit, MODEL, "", started - age_s)
            for submit, age_s in ((submit_of(b"1"), 3601.0), (submit_of(b"2"), day_s + 1.0), (submit_of(b"3"), 3599.0))
        )
        result.state = State.DONE
        one._expire(started)
        assert upload.error is not None and upload.error.code == "EXPIRED"
        assert list(one.jobs) == [upload, young] and young.state is State.RECEIVING


@pytest.mark.parametrize("step", [0, 1])
def test_a_scan_whose_worker_was_lost_is_not_given_up_for_its_time(tmp_path: Path, step: int) -> None:
    with gate(tmp_path, ("sleep", "1000")) as one:
        begun, waiting = (
            one.jobs.add(protocol.job_key("", submit, MODEL.sha256), submit, MODEL, "", 0.0)
            for submit in (submit_of(b"one"), submit_of(b"two"))
        )
        for job, content in ((begun, b"one"), (waiting, b"two")):
            one.jobs.write(job, content)
            assert one.jobs.stored(job, 0.0)
        assert one.jobs.next(0, 1.0) is begun
        if step:
            one.jobs.advance(begun, 2.0)
            assert one.jobs.next(1, 3.0) is begun
        late = begun.submit.deadline_ms / 1000 + 1.0
        assert one.jobs.again(begun, late)  # its worker was lost
        one._expire(late)
        assert (begun.state, waiting.state) == (State.WAITING, State.FAILED)
        assert waiting.error is not None and waiting.error.code == "EXPIRED"


def test_what_waited_while_no_server_ran_has_its_time_anew(tmp_path: Path) -> None:
    table, (job,) = table_with(tmp_path, "scan")
    table.close()
    with contextlib.closing(sqlite3.connect(tmp_path / jobs.DATABASE, isolation_level=None)) as database:
        database.execute("UPDATE jobs SET created = created - 1e6, changed = changed - 1e6")  # or a clock set wrongly
    again = JobTable(tmp_path, 100.0)
    (taken,) = again
    assert taken.state is State.WAITING and taken.expires == 100.0 + job.submit.deadline_ms / 1000
    again.close()


def test_a_quiet_connection_is_kept_as_long_as_it_waits_to_hear_of_a_job(tmp_path: Path) -> None:
    with gate(tmp_path, ("sleep", "1000")) as one:
        submit = submit_of(b"one")
        job = one.jobs.add(protocol.job_key("", submit, MODEL.sha256), submit, MODEL, "", 0.0)
        for route in (b"waits", b"idle"):
            one.handlers.replies.heard(route, "", 0.0)
        job.routes.add(b"waits")
        one._expire(CLIENT_IDLE_S + 1.0)
        assert b"waits" in one.handlers.replies and b"idle" not in one.handlers.replies
        one.jobs.remove(job)
        one._expire(CLIENT_IDLE_S + 1.0)
        assert b"waits" not in one.handlers.replies


def test_monitoring_is_told_of_a_list_of_clients_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(path: Path) -> dict[str, str]:
        raise KeyFileUnreadable(f"Expected a file with keys, received 'Permission denied' for {path}.")

    with gate(tmp_path, ("sleep", "1000")) as one:
        with monkeypatch.context() as failing:
            failing.setattr(access, "read_clients", unreadable)
            one._follow_lists()
            assert [reason for reason in one.reasons() if "list of clients" in reason] != []
        one._follow_lists()
        assert [reason for reason in one.reasons() if "list of clients" in reason] == []


@pytest.mark.parametrize("at", ["access/models.json", "models"])
def test_a_version_that_was_allowed_while_its_list_or_folder_could_not_be_read_is_loaded_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at: str
) -> None:
    with gate(tmp_path, ("sleep", "1000")) as one:
        one._follow_lists()
        one.workers.serving, one.workers.coming = one.workers.coming, None
        catalogue.allow(tmp_path / "access", make_version(tmp_path / "models", 4))
        with monkeypatch.context() as failing:

            def fail_there(call: Callable[..., object], path: Path, *given: object, **how: object) -> object:
                if Path(path) == tmp_path / at:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return call(path, *given, **how)

            failing.setattr(os, "open", functools.partial(fail_there, os.open))
            failing.setattr(os, "listdir", functools.partial(fail_there, os.listdir))
            for _ in range(3):
                one._follow_lists()
            assert caplog.text.count("Input/output error") == 1
            assert ([reason for reason in one.reasons() if "list of models" in reason] == []) == (at == "models")
        one._follow_lists()
        assert one.workers.coming is not None
        assert [entry.version for entry in one.workers.coming.entries] == [4]
        assert [reason for reason in one.reasons() if "list of models" in reason] == []


def test_only_waiting_counts_as_the_queue(tmp_path: Path) -> None:
    table, (job,) = table_with(tmp_path, "scan", now=10.0)
    table.next(0, 12.0)
    table.advance(job, 20.0)  # eight seconds of work are not the queue's
    table.next(1, 21.0)
    table.advance(job, 30.0)
    table.next(2, 30.5)
    assert job.queued_s == pytest.approx(2.0 + 1.0 + 0.5)
    table.close()


def test_a_job_that_another_version_is_to_do_keeps_its_scan_where_the_row_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LOCKED_S", 0.05)
    table, (job,) = table_with(tmp_path, "scan")
    with contextlib.closing(sqlite3.connect(tmp_path / jobs.DATABASE, isolation_level=None)) as lock:
        lock.execute("BEGIN IMMEDIATE")
        table.assign(job, protocol.Model("bright", 4, "1" * 64))
        lock.execute("ROLLBACK")
    table.close()
    again = JobTable(tmp_path, 1.0)
    assert [(one.key, one.state) for one in again] == [(job.key, State.WAITING)]
    again.close()


def test_restarts_make_no_result_young_again(tmp_path: Path) -> None:
    table, (job,) = table_with(tmp_path, "scan")
    for step in range(3):
        table.next(step, 1.0)
        if step < 2:
            table.advance(job, 1.0)
    (job.folder / RESULT).mkdir()
    (job.folder / RESULT / "result.json").write_text("{}")
    table.done(job, (jobs.described(job.folder / RESULT / "result.json"),), 2.0)
    table.close()
    with contextlib.closing(sqlite3.connect(tmp_path / jobs.DATABASE, isolation_level=None)) as database:
        database.execute("UPDATE jobs SET changed = changed - 70000")  # a while ago
    for _ in range(3):
        again = JobTable(tmp_path, 100_000.0)
        (taken,) = again
        assert taken.state is State.DONE
        assert 70_000 <= 100_000.0 - taken.touched < 71_000
        again.close()


def test_no_job_ages_while_no_server_runs_and_every_one_does_while_one_does(tmp_path: Path) -> None:
    table, _ = table_with(tmp_path, "scan")
    table.close()

    def some_time_later(seconds: float) -> None:
        """As if the spool's last use, and the last change of its jobs, were so long ago."""
        facts = (tmp_path / jobs.ALIVE).stat()
        os.utime(tmp_path / jobs.ALIVE, (facts.st_atime - seconds, facts.st_mtime - seconds))
        with contextlib.closing(sqlite3.connect(tmp_path / jobs.DATABASE, isolation_level=None)) as database:
            database.execute("UPDATE jobs SET changed = changed - ?", (seconds,))

    age_s = 0.0
    for down_s in (7200.0, 200_000.0):
        some_time_later(down_s)
        again = JobTable(tmp_path, 1_000_000.0)  # of another start of the machine, too
        assert 0 <= 1_000_000.0 - next(iter(again)).touched - age_s < 60
        some_time_later(1000.0)
        again.close()  # it ran all the time
        age_s += 1000.0


@pytest.mark.parametrize("set_by_s", [820_000_000.0, -7200.0])
def test_a_clock_that_is_set_while_a_server_runs_makes_no_job_older_or_younger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_by_s: float
) -> None:
    table, _ = table_with(tmp_path, "scan")
    table.close()
    with contextlib.closing(sqlite3.connect(tmp_path / jobs.DATABASE, isolation_level=None)) as database:
        database.execute("UPDATE jobs SET changed = changed - 1000")
    table, right = JobTable(tmp_path, 1_000_000.0), jobs.time.time
    monkeypatch.setattr(jobs.time, "time", lambda: right() + set_by_s)
    content = b"young" * 100
    young = table.add(b"1" * 32, submit_of(content), MODEL, "", 1_000_000.0)
    table.write(young, content)
    assert table.stored(young, 1_000_000.0)
    table.close()
    again = JobTable(tmp_path, 2_000_000.0)
    young_s, old_s = sorted(2_000_000.0 - job.touched for job in again)
    again.close()
    assert 0 <= young_s < 60 and 1000 <= old_s < 1060


def test_an_upload_and_a_result_outlive_a_time_without_a_server(tmp_path: Path) -> None:
    scan, other = scan_file(tmp_path), scan_file(tmp_path, seed=1, name="other.nii.gz")
    how = {"limits": {**LIMITS, "chunk_bytes": 1000, "window_bytes": 2000}, "deadlines": {"upload_idle_s": 600}}
    with running(tmp_path, **how) as server, Raw(server.endpoint) as peer:
        content = scan.read_bytes()
        sent = peer.ask(submit_of(content)).job
        peer.ask(protocol.Chunk(sent, 0, content[:1000]))
        done = send_all(peer, other.read_bytes())
        peer.take_until(protocol.Done)
        server.process.kill()
        server.process.wait(LIMIT_S)
    days_s = 3 * 86_400
    os.utime(server.spool / jobs.ALIVE, (0, (server.spool / jobs.ALIVE).stat().st_mtime - days_s))
    with contextlib.closing(sqlite3.connect(server.spool / jobs.DATABASE, isolation_level=None)) as database:
        database.execute("UPDATE jobs SET changed = changed - ?", (days_s,))
    with running(tmp_path, **how) as server, Raw(server.endpoint) as peer:
        assert peer.ask(submit_of(content)).offset == 1000
        peer.socket.send_multipart(protocol.encode(protocol.Status(done)))
        peer.take_until(protocol.Done)


def without_database(folder: Path) -> None:
    for path in folder.glob(f"{jobs.DATABASE}*"):
        path.unlink()


@pytest.mark.parametrize("facts", ["", "{", "[]", "{}"])
def test_a_scan_whose_job_nobody_understands_is_kept_aside(tmp_path: Path, facts: str) -> None:
    table, (job,) = table_with(tmp_path, "scan")
    table.close()
    content = (job.folder / UPLOAD).read_bytes()
    without_database(tmp_path)
    (job.folder / jobs.JOB).write_text(facts)
    again = JobTable(tmp_path, 1.0)
    assert list(again) == []
    again.close()
    (aside,) = tmp_path.glob(f".damaged-{job.key.hex()}-*")
    assert (aside / UPLOAD).read_bytes() == content
    third = JobTable(tmp_path, 2.0)  # which does not look at it again
    third.close()
    assert (aside / UPLOAD).exists() and not job.folder.exists()


def test_what_is_left_of_a_job_that_was_closed_at_work_is_deleted(tmp_path: Path) -> None:
    table, (job,) = table_with(tmp_path, "scan")
    table.next(0, 1.0)
    (job.folder / jobs.WORK).mkdir()
    (job.folder / RESULT).mkdir()
    (job.folder / RESULT / "result.json").write_text("{}")
    table.remove(job)
    table.close()
    assert job.folder.exists()  # its worker has it
    JobTable(tmp_path, 2.0).close()
    assert [path.name for path in tmp_path.iterdir() if job.key.hex() in path.name] == []


def test_a_result_that_may_not_be_on_the_disk_is_made_again_where_the_database_is_lost(tmp_path: Path) -> None:
    """As a power cut leaves it before the gate's flush; once that is done, the upload is deleted."""
    table, (job,) = table_with(tmp_path, "scan")
    table.close()
    without_database(tmp_path)
    (job.folder / RESULT).mkdir()
    for name in ("mask.vtk", "result.json"):
        (job.folder / RESULT / name).touch()
    again = JobTable(tmp_path, 1.0)
    assert [(one.key, one.state, one.files) for one in again] == [(job.key, State.WAITING, ())]
    again.close()


class Killed(BaseException):
    """What no code handles."""


@pytest.mark.parametrize("is_done", [False, True])
def test_a_kill_amid_a_deletion_leaves_no_part_of_a_result_or_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_done: bool
) -> None:
    """Killed at each call in turn that takes a name from a folder, until one was not killed any more."""
    content, were_killed = b"", 0
    for survived in range(100):
        spool = tmp_path / str(survived)
        spool.mkdir()
        table, (job,) = table_with(spool, "scan")
        content = (job.folder / UPLOAD).read_bytes()
        if is_done:
            (job.folder / RESULT).mkdir()
            for name in ("mask.vtk", "result.json"):
                (job.folder / RESULT / name).write_text(name)
            for step in range(3):
                table.next(step, 1.0)
                if step < 2:
                    table.advance(job, 1.0)
            table.done(job, tuple(jobs.described(path) for path in sorted((job.folder / RESULT).iterdir())), 2.0)
        (job.folder / jobs.WORK).mkdir()
        (job.folder / jobs.WORK / "scan.npy").touch()
        left = survived

        def call_or_die(call: Callable[..., None], *given: object, **how: object) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            call(*given, **how)

        with monkeypatch.context() as killing:
            for name in ("unlink", "rmdir", "rename"):
                killing.setattr(os, name, functools.partial(call_or_die, getattr(os, name)))
            with contextlib.suppress(Killed):
                table.remove(job)
        were_killed += left < 0
        table.close()
        again = JobTable(spool, 3.0)
        for one in again:  # the whole job, or none
            assert {path.name for path in (one.folder / RESULT).glob("*")} == {file.name for file in job.files}
            assert is_done or (one.folder / UPLOAD).read_bytes() == content
        again.close()
        assert [path.name for path in spool.iterdir() if path.name.startswith((".damaged", ".deleted"))] == []
        if left >= 0:
            break
    assert were_killed > 4


def test_a_disk_that_cannot_be_read_ends_the_start_and_costs_no_job(tmp_path: Path) -> None:
    table, (job,) = table_with(tmp_path, "scan")
    table.close()
    without_database(tmp_path)
    facts = (job.folder / jobs.JOB).rename(tmp_path / "facts")
    (job.folder / jobs.JOB).symlink_to("/proc/self/mem")  # a file that says EIO at its start
    with pytest.raises(OSError, match="Input/output error"):
        JobTable(tmp_path, 1.0)
    facts.replace(job.folder / jobs.JOB)
    again = JobTable(tmp_path, 2.0)
    assert [(one.key, one.state) for one in again] == [(job.key, State.WAITING)]
    again.close()


def test_what_a_job_is_made_anew_from_is_on_the_disk_before_it_is_told_to_be_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, int]] = []
    sync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    table, (job,) = table_with(tmp_path, "scan")
    table.close()
    facts = (job.folder / jobs.JOB).stat()
    folders = [inode for inode, _ in synced]
    assert synced.index((facts.st_ino, facts.st_size)) < folders.index(job.folder.stat().st_ino)
    assert tmp_path.stat().st_ino in folders


# ---- answers


def test_a_sender_hears_by_amount_and_by_time(tmp_path: Path) -> None:
    with gate(tmp_path, ("sleep", "1000")) as one:
        submit = submit_of(b"x" * 1000)
        job = one.jobs.add(protocol.job_key("", submit, MODEL.sha256), submit, MODEL, "", 0.0)
        job.until, job.credited = 1000, 10.0  # all of it may come; over a slow link that takes its time
        assert not one.handlers._is_due(job, 10.0 + CREDIT_EVERY_S - 0.1)
        assert one.handlers._is_due(job, 10.0 + CREDIT_EVERY_S)
        job.until = 500
        assert one.handlers._is_due(job, 10.0)


def test_one_client_leaves_half_of_the_queue_to_others(tmp_path: Path) -> None:
    with gate(tmp_path, ("sleep", "1000"), limits={"queue": 4, "uploads": 4}) as one:
        own = []
        for number in range(2):
            one.handlers._check_share(own, [])
            submit = submit_of(bytes(number + 1))
            own.append(one.jobs.add(protocol.job_key("", submit, MODEL.sha256), submit, MODEL, "", 0.0))
        with pytest.raises(Refusal, match="share"):
            one.handlers._check_share(own, own)
        for job in own:
            one.jobs.write(job, bytes(job.submit.bytes))
            assert one.jobs.stored(job, 1.0)
        with pytest.raises(Refusal, match="share"):
            one.handlers._check_share(own, [])


def test_of_a_slow_readers_news_of_a_job_only_the_last_is_kept() -> None:
    box = Outbox(0.0, "")
    one, other = b"1" * 32, b"2" * 32
    for position in range(1000):
        box.keep(protocol.Progress(one, "queue", position, 0, 0))
        box.keep(protocol.Progress(other, "queue", position, 0, 0))
    box.keep(protocol.Closed(one))
    box.keep(protocol.Closed(one))
    assert [type(each) for each in box.waiting] == [protocol.Progress] * 2 + [protocol.Closed] * 2
    assert {each.job: each.position for each in list(box.waiting)[:2]} == {one: 999, other: 999}


def test_a_result_file_that_was_cut_is_an_error_and_not_the_servers_end(tmp_path: Path) -> None:
    with running(tmp_path, limits=LIMITS) as server, Raw(server.endpoint) as peer:
        job = send_all(peer, scan_file(tmp_path).read_bytes())
        name = peer.take_until(protocol.Done).files[0].name
        (server.spool / job.hex() / RESULT / name).write_bytes(b"")
        error = peer.ask(protocol.Fetch(job, name, 0, 1000))
        assert (error.code, error.stage) == ("STORAGE_FAILED", "fetch")
        assert peer.ask(protocol.Close(job)) == protocol.Closed(job)
        expect_serving(server, tmp_path)


def test_a_second_announcement_gives_a_scan_that_waits_more_time(tmp_path: Path) -> None:
    with running(tmp_path, limits=LIMITS) as server, Raw(server.endpoint) as peer, Raw(server.endpoint) as second:
        server.hold.touch()
        try:
            first = scan_file(tmp_path, name="first.nii.gz")
            send_all(peer, first.read_bytes(), name=first.name)
            until(lambda: server.runs(first.name), "a scan is at work")
            contents = [scan_file(tmp_path, seed=seed).read_bytes() for seed in (1, 2)]
            longer = send_all(peer, contents[0], deadline_ms=4000)
            assert second.ask(submit_of(contents[0], deadline_ms=60_000)).job == longer
            short = send_all(peer, contents[1], deadline_ms=4000)
            gone = peer.take_until(protocol.Error)  # of two with the same time, the one that came later
            assert (gone.job, gone.code) == (short, "EXPIRED")
            second.socket.send_multipart(protocol.encode(protocol.Cancel(longer)))
            assert second.take_until(protocol.Cancelled, protocol.Error) == protocol.Cancelled(longer)
        finally:
            server.hold.unlink()


def test_a_link_in_a_model_is_refused_since_its_digest_would_not_hold(tmp_path: Path) -> None:
    version = make_version(tmp_path / "models", 1)
    (tmp_path / "elsewhere").write_text("may change")
    (version / "assets").mkdir()
    (version / "assets/link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="link"):
        catalogue.digest_of(version)
