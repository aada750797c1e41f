"""Server and client as real processes over real sockets: right answers, codes for bad requests, killed processes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydicom
import pytest
import zmq
import zstandard
from bad_files import error_of, is_one_sentence_naming, volume
from dicom_files import PATIENT, enhanced, save, series
from scipy.spatial.transform import Rotation
from serving_fixtures import DEADLY, DIGEST, LIMIT_S, STUCK, Server, is_alive, make_models, running, start, until

from lvseg.formats import read_mask, read_volume, write_volume
from serving import client, config, connection, protocol
from serving.catalogue import digest_of, versions_in
from serving.connection import Client, ClientError, Package
from serving.gate import IPC_FOLDER, CannotServe, check_bind, make_ipc_folder
from serving.outputs import check_outputs
from serving.scans import check_readable, package
from serving.server import _report_ready, claim_spool

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that leave it as it was."""
    limits = {"spool_free_bytes": 0, "upload_bytes": 4_000_000, "content_bytes": 8_000_000, "members": 20}
    limits.update(chunk_bytes=1000, window_bytes=8000, queue=3)
    with running(tmp_path_factory.mktemp("server"), limits=limits) as one:
        yield one
        assert one.process.poll() is None
        assert one.spooled() == []


@pytest.fixture
def held(server: Server) -> Iterator[Path]:
    """While the file that this gives exists, the server finishes no scan."""
    server.hold.touch()
    yield server.hold
    server.hold.unlink(missing_ok=True)


def scan_file(folder: Path, seed: int = 0, brightest: int | None = None, name: str = "scan.nii.gz") -> Path:
    """A small scan of noise."""
    scan = volume((6, 20, 24), seed)
    if brightest is not None:
        scan.voxels[2, 3, 4] = brightest
    return write_volume(scan, folder / name)[0]


def expect_right_mask(scan: Path, mask: Path) -> None:
    """The model's answer, worked out here, on the scan's own grid."""
    there, back = read_volume(scan), read_volume(mask)
    there, back = there.canonical(), back.canonical()
    np.testing.assert_array_equal(back.voxels, there.voxels > there.voxels.mean())
    np.testing.assert_allclose(back.affine, there.affine, atol=1e-4)


def expect_serving(server: Server, folder: Path) -> None:
    """Whatever happened before: the next scan is answered."""
    with server.connect() as other:
        scan = scan_file(folder, seed=99, name="next.nii.gz")
        other.segment(scan, "bright", folder / "next_mask.nii.gz", LIMIT_S)
    expect_right_mask(scan, folder / "next_mask.nii.gz")


class Raw:
    """A peer that sends what it likes."""

    def __init__(self, endpoint: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.context.term()

    def take(self) -> Any:
        assert self.socket.poll(int(1000 * LIMIT_S)), "no answer"
        return protocol.decode(self.socket.recv_multipart(), protocol.TO_CLIENT)

    def ask(self, message: Any) -> Any:
        self.socket.send_multipart(protocol.encode(message))
        return self.take()

    def take_until(self, *kinds: type[Any]) -> Any:
        while not isinstance(message := self.take(), kinds):
            pass
        return message


def submit_of(content: bytes, **change: Any) -> protocol.Submit:
    """The announcement of some bytes."""
    values: dict[str, Any] = {"name": "scan.nii.gz", "kind": "file", "model": "bright", "output": "nii.gz"}
    values.update(version=0, modality="")
    values.update(codec="raw", bytes=len(content), content_bytes=len(content), deadline_ms=60_000)
    return protocol.Submit(**{**values, "sha256": hashlib.sha256(content).hexdigest(), **change})


def send_all(peer: Raw, content: bytes, **change: Any) -> bytes:
    """Uploads some bytes as fast as credit allows; the job's key."""
    peer.socket.send_multipart(protocol.encode(submit_of(content, **change)))
    accepted = peer.take_until(protocol.Accepted, protocol.Error)
    assert isinstance(accepted, protocol.Accepted), accepted
    offset, until_byte = 0, accepted.until
    while offset < len(content):
        piece = content[offset : min(offset + 1000, until_byte)]
        peer.socket.send_multipart(protocol.encode(protocol.Chunk(accepted.job, offset, piece)))
        offset += len(piece)
        if offset == until_byte < len(content):
            until_byte = peer.take_until(protocol.Credit).until
    return accepted.job


def send_bad(server: Server, content: bytes, **change: Any) -> protocol.Error:
    """The error that an uploaded scan ends in."""
    with Raw(server.endpoint) as peer:
        job = send_all(peer, content, **change)
        error = peer.take_until(protocol.Error)
        assert error.job == job
        assert peer.ask(protocol.Close(job)) in (protocol.Closed(job), peer_not_found(job))
    return error


def peer_not_found(job: bytes) -> protocol.Error:
    text = "Expected a job of this server, received an unknown key."
    return protocol.Error(job, "NOT_FOUND", "queue", "access", False, 0, text)


# ---- answers


@pytest.mark.parametrize("suffix", [".nii.gz", ".vtk", ".vti"])
@pytest.mark.parametrize("output", [output for output in protocol.OUTPUTS if output != "dcm"])
def test_each_format_goes_there_and_another_comes_back(
    server: Server, tmp_path: Path, suffix: str, output: str
) -> None:
    scan = scan_file(tmp_path, name="scan" + suffix)
    with server.connect() as peer:
        paths, measurements = peer.segment(scan, "bright", tmp_path / "out" / f"liver.{output}", LIMIT_S)
    assert paths == [tmp_path / "out" / f"liver.{output}"]
    assert list((tmp_path / "out").iterdir()) == paths
    expect_right_mask(scan, paths[0])
    assert measurements["source"] == scan.name
    assert server.spooled() == []


@pytest.mark.parametrize("packed", ["folder", "zip", "multi-frame file"])
def test_a_dicom_scan_goes_there_and_a_segmentation_of_it_comes_back(
    server: Server, tmp_path: Path, packed: str
) -> None:
    rotation = Rotation.from_euler("xyz", (20, -35, 190), degrees=True).as_matrix()
    sources = series(rotation)
    if packed == "multi-frame file":
        sources = [enhanced(rotation, order=[4, 0, 3, 5, 1, 2], words=("M",))]
    folder = save(tmp_path / "scan", sources)
    scan = folder
    if packed == "multi-frame file":
        scan = (folder / "IM0000").rename(tmp_path / "scan.dcm")
    elif packed == "zip":
        scan = tmp_path / "scan.zip"
        with zipfile.ZipFile(scan, "w") as archive:
            for file in folder.iterdir():
                archive.write(file, file.name)
    with server.connect() as peer:
        paths, measurements = peer.segment(scan, "bright", tmp_path / "out" / "liver.dcm", LIMIT_S)
    assert list((tmp_path / "out").iterdir()) == paths == [tmp_path / "out" / "liver.dcm"]
    expect_right_mask(scan, paths[0])
    assert measurements["geometry"]["proof"] == "same voxels, same places"
    assert measurements["geometry"]["furthest_mm"] <= 1e-6
    seg = pydicom.dcmread(paths[0])
    assert (seg.PatientName, seg.PatientID) == (PATIENT, "P-17")
    assert seg.FrameOfReferenceUID == sources[0].FrameOfReferenceUID
    there = read_volume(scan)
    uids = {source.SOPInstanceUID for source in sources}
    for group in seg.PerFrameFunctionalGroupsSequence:
        assert group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID in uids
    index = np.argwhere(read_mask(paths[0], there).voxels)
    np.testing.assert_array_equal(index, np.argwhere(there.voxels > there.voxels.mean()))
    [segment] = seg.SegmentSequence
    [by] = segment.SegmentationAlgorithmIdentificationSequence
    assert (segment.SegmentLabel, by.AlgorithmVersion) == ("bright", "3")
    assert DIGEST in by.AlgorithmParameters
    said = server.log.read_text() + json.dumps(measurements)
    for secret in (PATIENT, "P-17", sources[0].StudyInstanceUID, sources[0].SOPInstanceUID, seg.SOPInstanceUID):
        assert secret not in said
    assert server.spooled() == []


def test_a_mask_without_a_voxel_comes_back_as_a_segmentation_of_empty_frames(server: Server, tmp_path: Path) -> None:
    sources = series(np.eye(3))
    for source in sources:  # the model finds nothing above the mean
        source.PixelData = np.full((source.Rows, source.Columns), 7, np.uint16).tobytes()
    folder = save(tmp_path / "scan", sources)
    with server.connect() as peer:
        paths, measurements = peer.segment(folder, "bright", tmp_path / "liver.dcm", LIMIT_S)
    assert measurements["voxels"] == 0
    mask = read_mask(paths[0], read_volume(folder))
    assert not mask.voxels.any()
    assert pydicom.dcmread(paths[0]).NumberOfFrames == len(sources)


def test_a_segmentation_of_what_is_no_dicom_scan_is_refused_before_the_model_is_asked(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = scan_file(tmp_path, name="plain.nii.gz")
    out = tmp_path / "out" / "liver.dcm"
    with server.connect() as peer:
        with pytest.raises(ClientError) as refused:
            peer.segment(scan, "bright", out, LIMIT_S)
        assert (refused.value.code, refused.value.exit_code) == ("BAD_OUTPUT", 2)
        assert is_one_sentence_naming(refused.value.sentence, Path(scan.name))
        assert "DICOM" in refused.value.sentence
    assert client.main(
        ["submit", str(scan), "--model", "bright", "-o", str(out), "--server", server.endpoint, "--insecure"]
    ) == 2  # fmt: skip
    assert "Traceback" not in capsys.readouterr().err
    assert not out.exists()
    assert server.runs(scan.name) == []
    assert server.spooled() == []


def test_an_oblique_scan_brings_its_sidecar_under_the_masks_name(server: Server, tmp_path: Path) -> None:
    scan = volume((6, 20, 24))
    cos, sin = np.cos(0.3), np.sin(0.3)
    tilt = np.array([[1, 0, 0, 0], [0, cos, -sin, 0], [0, sin, cos, 0], [0, 0, 0, 1.0]])
    path = write_volume(type(scan)(scan.voxels, tilt @ scan.affine), tmp_path / "scan.nii.gz")[0]
    with server.connect() as peer:
        paths, _ = peer.segment(path, "bright", tmp_path / "liver.vtk", LIMIT_S)
    assert [one.name for one in paths] == ["liver.vtk", "liver.vtk.json"]
    expect_right_mask(path, paths[0])


def test_an_earlier_scans_sidecar_does_not_stay_beside_a_new_mask_but_another_file_does(
    server: Server, tmp_path: Path
) -> None:
    cos, sin = np.cos(0.3), np.sin(0.3)
    tilt = np.array([[1, 0, 0, 0], [0, cos, -sin, 0], [0, sin, cos, 0], [0, 0, 0, 1.0]])
    (tmp_path / "other.vtk.json").write_text('{"format": "of somebody else"}')
    with server.connect() as peer:
        scan = volume((6, 20, 24))
        oblique = write_volume(type(scan)(scan.voxels, tilt @ scan.affine), tmp_path / "oblique.nii.gz")[0]
        peer.segment(oblique, "bright", tmp_path / "liver.vtk", LIMIT_S)
        assert (tmp_path / "liver.vtk.json").exists()
        for name in ("liver.vtk", "other.vtk"):
            peer.segment(scan_file(tmp_path), "bright", tmp_path / name, LIMIT_S)
    assert not (tmp_path / "liver.vtk.json").exists()
    assert (tmp_path / "other.vtk.json").read_text() == '{"format": "of somebody else"}'


def test_several_clients_at_once_each_get_their_own(server: Server, tmp_path: Path) -> None:
    def one(number: int) -> None:
        scan = scan_file(tmp_path, seed=number, name=f"{number}.nii.gz")
        with server.connect() as peer:
            for turn in range(3):
                out = tmp_path / f"{number}_{turn}.nii.gz"
                _, measurements = peer.segment(scan, "bright", out, LIMIT_S)
                expect_right_mask(scan, out)
                assert measurements["source"] == scan.name

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(one, number) for number in range(6)]:
            done.result(LIMIT_S)


def test_credit_is_kept_and_every_stage_is_told(server: Server, tmp_path: Path) -> None:
    content = scan_file(tmp_path).read_bytes()
    with Raw(server.endpoint) as peer:
        accepted = peer.ask(submit_of(content))
        assert (accepted.offset, accepted.until) == (0, min(8000, len(content)))
        assert peer.ask(protocol.Close(accepted.job)) == protocol.Closed(accepted.job)
        job = send_all(peer, content)
        stages = []
        while not isinstance(message := peer.take(), protocol.Done):
            if isinstance(message, protocol.Progress) and message.stage not in stages:
                stages.append(message.stage)
        assert [stage for stage in stages if stage != "queue"] == ["unpack", "read", "segment", "write"]
        assert [file.name for file in message.files] == ["mask.nii.gz", "result.json"]
        assert peer.ask(protocol.Status(job)) == message
        assert peer.ask(protocol.Close(job)) == protocol.Closed(job)


def test_a_lost_chunk_is_sent_again_from_where_the_server_is(server: Server, tmp_path: Path) -> None:
    content = scan_file(tmp_path).read_bytes()
    with Raw(server.endpoint) as peer:
        job = peer.ask(submit_of(content)).job
        peer.socket.send_multipart(protocol.encode(protocol.Chunk(job, 0, content[:500])))
        refused = peer.ask(protocol.Chunk(job, 600, content[600:700]))
        assert (refused.code, refused.retryable) == ("BAD_OFFSET", True)
    with Raw(server.endpoint) as another:  # as after a lost connection
        assert another.ask(protocol.Status(job)).offset == 500
        for offset in range(500, len(content), 500):
            another.socket.send_multipart(protocol.encode(protocol.Chunk(job, offset, content[offset : offset + 500])))
        assert isinstance(another.take_until(protocol.Done), protocol.Done)
        assert another.ask(protocol.Close(job)) == protocol.Closed(job)


def test_the_queue_tells_positions_and_refuses_when_full(server: Server, held: Path, tmp_path: Path) -> None:
    contents = [scan_file(tmp_path, seed).read_bytes() for seed in range(5)]
    with Raw(server.endpoint) as peer:
        jobs = []
        for waiting in range(4):  # one runs, three wait
            jobs.append(send_all(peer, contents[waiting]))
            peer.take_until(protocol.Stored)
            expected = (jobs[-1], "queue", waiting - 1) if waiting else (jobs[-1], "segment", 0)
            progress = peer.take_until(protocol.Progress)
            while (progress.job, progress.stage, progress.position) != expected:
                progress = peer.take_until(protocol.Progress)
        peer.socket.send_multipart(protocol.encode(submit_of(contents[4])))
        busy = peer.take_until(protocol.Error)
        assert (busy.code, busy.retryable, busy.fault) == ("BUSY", True, "access")
        assert busy.retry_after_ms > 0
        # Without the second, the last moves up; without the first, which runs, so does everyone.
        for closed, position in ((jobs[1], 1), (jobs[0], 0)):
            peer.socket.send_multipart(protocol.encode(protocol.Cancel(closed)))
            moved = peer.take_until(protocol.Progress)
            while (moved.job, moved.stage, moved.position) != (jobs[3], "queue", position):
                moved = peer.take_until(protocol.Progress)
        held.unlink()
        finished: set[bytes] = set()
        while len(finished) < 2:
            finished.add(peer.take_until(protocol.Done).job)
        assert finished == set(jobs[2:])
        for job in jobs[2:]:
            peer.socket.send_multipart(protocol.encode(protocol.Close(job)))
            peer.take_until(protocol.Closed)
    until(lambda: server.spooled() == [], "the spool is empty after CLOSE")


def test_a_busy_server_is_asked_again_until_it_takes_the_scan(server: Server, held: Path, tmp_path: Path) -> None:
    scan = scan_file(tmp_path, seed=9)
    contents = [scan_file(tmp_path, seed, name="other.nii.gz").read_bytes() for seed in range(4)]
    with Raw(server.endpoint) as peer, ThreadPoolExecutor(1) as pool, server.connect() as late:
        jobs = [send_all(peer, contents[0])]
        while peer.take_until(protocol.Progress).stage != "segment":  # until it runs, it counts as one that waits
            pass
        jobs += [send_all(peer, content) for content in contents[1:]]
        peer.socket.send_multipart(protocol.encode(protocol.Ping()))
        # Answered in order: once it has answered this, it has all four.
        while not isinstance(peer.take(), protocol.Pong):
            pass
        with pytest.raises(ClientError, match="busy") as refused:
            late.segment(scan, "bright", tmp_path / "late.nii.gz", timeout_s=0.2)
        assert refused.value.exit_code == 4
        answer = pool.submit(late.segment, scan, "bright", tmp_path / "late.nii.gz", LIMIT_S)
        for job in jobs:
            peer.socket.send_multipart(protocol.encode(protocol.Close(job)))
            peer.take_until(protocol.Closed)
        held.unlink()
        answer.result(LIMIT_S)
    expect_right_mask(scan, tmp_path / "late.nii.gz")


# ---- bad requests


def test_garbage_from_a_zmq_peer_gets_its_code(server: Server, tmp_path: Path) -> None:
    good = protocol.encode(protocol.Hello(1, 1, "test"))
    with Raw(server.endpoint) as peer:
        for frames, code in (
            ([b""], "BAD_FRAME"),
            ([b"garbage"] * 40, "BAD_FRAME"),
            ([*good[:3], b"\x80\x04pickled"], "BAD_FRAME"),
            ([*good[:3], b"[" * 10000], "BAD_FRAME"),
            ([b"LVS2", *good[1:]], "PROTO_UNSUPPORTED"),
            (protocol.encode(protocol.Hello(2, 9, "newer")), "PROTO_UNSUPPORTED"),
            (protocol.encode(protocol.Heartbeat()), "BAD_FRAME"),
            (protocol.encode(protocol.Status(b"k" * 32)), "NOT_FOUND"),
            (protocol.encode(protocol.Chunk(b"k" * 32, 0, b"abc")), "NOT_FOUND"),
            (protocol.encode(protocol.Fetch(b"k" * 32, "mask.vtk", 0, 10)), "NOT_FOUND"),
            (protocol.encode(protocol.Close(b"k" * 32)), "NOT_FOUND"),
        ):
            peer.socket.send_multipart(frames)
            error = peer.take()
            assert isinstance(error, protocol.Error)
            assert (error.code, error.fault) == (code, "access"), error
            assert error.text.endswith(".")
        assert isinstance(peer.ask(protocol.Ping()), protocol.Pong)
    expect_serving(server, tmp_path)


@pytest.mark.parametrize(
    ("change", "code", "fault"),
    [
        ({"model": "kidney"}, "MODEL_UNKNOWN", "input"),
        ({"bytes": 4_000_001}, "TOO_LARGE", "input"),
        ({"codec": "zstd", "content_bytes": 8_000_001}, "TOO_LARGE", "input"),
        ({"content_bytes": 6}, "BAD_FRAME", "access"),
    ],
)
def test_an_announcement_that_cannot_be_kept_is_refused_before_a_byte(
    server: Server, change: dict[str, Any], code: str, fault: str
) -> None:
    with Raw(server.endpoint) as peer:
        error = peer.ask(submit_of(b"12345", **change))
    assert (error.code, error.fault) == (code, fault)
    assert server.spooled() == []


@pytest.mark.parametrize("name", ["scan.mhd", "SCAN.NHDR"])
def test_a_header_without_its_voxels_is_told_as_such(server: Server, name: str) -> None:
    error = send_bad(server, b"ObjectType = Image\n", name=name)
    assert (error.code, error.fault) == ("UNSUPPORTED_FORMAT", "input")
    assert error.text.startswith(
        f"Expected a scan in one file, received the header of one whose voxels lie beside it: {name};"
    )


def test_bytes_beyond_the_credit_are_refused_and_the_job_lives_on(server: Server) -> None:
    content = os.urandom(20_000)
    with Raw(server.endpoint) as peer:
        job = peer.ask(submit_of(content)).job
        assert peer.ask(protocol.Chunk(job, 0, content[:9000])).code == "OVER_CREDIT"
        assert peer.ask(protocol.Status(job)) == protocol.Accepted(job, 0, 8000)
        assert peer.ask(protocol.Close(job)) == protocol.Closed(job)


def test_a_result_that_is_not_there_has_its_code(server: Server, held: Path, tmp_path: Path) -> None:
    with Raw(server.endpoint) as peer:
        job = send_all(peer, scan_file(tmp_path).read_bytes())
        peer.take_until(protocol.Stored)
        peer.socket.send_multipart(protocol.encode(protocol.Fetch(job, "mask.vtk", 0, 100)))
        assert peer.take_until(protocol.Error).code == "NO_SUCH_FILE"
        held.unlink()
        done = peer.take_until(protocol.Done)
        size = done.files[0].bytes
        assert peer.ask(protocol.Fetch(job, "mask.nii.gz", size, 100)).code == "BAD_OFFSET"
        assert len(peer.ask(protocol.Fetch(job, "mask.nii.gz", size - 5, 100)).payload) == 5
        assert peer.ask(protocol.Close(job)) == protocol.Closed(job)


def test_no_name_or_path_of_a_scan_is_logged(server: Server, tmp_path: Path) -> None:
    secret = tmp_path / "Doe_Jane_1970.nii.gz"
    secret.write_text("no scan")
    with server.connect() as peer:
        with pytest.raises(ClientError, match="Doe_Jane_1970"):
            peer.segment(secret, "bright", tmp_path / "out.vtk", LIMIT_S)
        peer.segment(scan_file(tmp_path, name="Doe_Jane_good.nii.gz"), "bright", tmp_path / "out.vtk", LIMIT_S)
    log = server.log.read_text()
    assert "failed at read" in log
    assert "Doe" not in log
    assert "upload-" not in log


# ---- killed and stuck processes


def test_a_worker_killed_during_a_job_costs_nobody_an_answer(server: Server, held: Path, tmp_path: Path) -> None:
    scan = scan_file(tmp_path)
    with server.connect() as peer, ThreadPoolExecutor(1) as pool:
        segmenting = threading.Event()

        def watch(stage: str, done: int, total: int) -> None:
            if stage == "segment":
                segmenting.set()

        answer = pool.submit(peer.segment, scan, "bright", tmp_path / "out.nii.gz", LIMIT_S, watch)
        assert segmenting.wait(LIMIT_S)
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        held.unlink()
        answer.result(LIMIT_S)
    expect_right_mask(scan, tmp_path / "out.nii.gz")
    assert server.workers() != [worker]


def test_a_scan_that_kills_its_worker_twice_is_given_up_and_the_next_one_served(server: Server, tmp_path: Path) -> None:
    with server.connect() as peer, pytest.raises(ClientError) as refused:
        peer.segment(scan_file(tmp_path, brightest=DEADLY), "bright", tmp_path / "out.vtk", LIMIT_S)
    assert (refused.value.code, refused.value.exit_code) == ("POISON_INPUT", 2)
    assert "scan.nii.gz was lost 2 times" in refused.value.sentence
    expect_serving(server, tmp_path)


@pytest.mark.parametrize("how", ["stuck", "stopped"])
def test_a_worker_that_gets_no_further_is_replaced(tmp_path: Path, how: str) -> None:
    deadlines = {"segment_s": 0.3} if how == "stuck" else {"silent_s": 2.5}
    with running(tmp_path, deadlines=deadlines) as server, server.connect() as peer:
        if how == "stuck":
            with pytest.raises(ClientError) as refused:
                peer.segment(scan_file(tmp_path, brightest=STUCK), "bright", tmp_path / "out.vtk", LIMIT_S)
            assert refused.value.code == "POISON_INPUT"
        else:
            (worker,) = server.workers()
            os.kill(worker, signal.SIGSTOP)
        expect_serving(server, tmp_path)


def test_a_client_killed_while_it_sends_leaves_nothing_behind(tmp_path: Path) -> None:
    content = scan_file(tmp_path).read_bytes()
    announcement = tuple(vars(submit_of(content)).values())
    child = (
        "import sys, zmq; sys.path.insert(0, sys.argv[1])\n"
        "from serving import protocol\n"
        "s = zmq.Context().socket(zmq.DEALER); s.connect(sys.argv[2])\n"
        f"s.send_multipart(protocol.encode(protocol.Submit(*{announcement!r})))\n"
        "job = protocol.decode(s.recv_multipart()).job\n"
        "s.send_multipart(protocol.encode(protocol.Chunk(job, 0, b'half')))\n"
        "print('sent', flush=True); sys.stdin.read()\n"
    )
    with running(tmp_path, deadlines={"upload_idle_s": 1.0}) as server:
        with subprocess.Popen(
            [sys.executable, "-c", child, str(ROOT), server.endpoint],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as sender:
            assert sender.stdout is not None
            assert sender.stdout.readline() == "sent\n"
            until(server.spooled, "the upload has begun")
            sender.kill()
        expect_serving(server, tmp_path)
        until(lambda: server.spooled() == [], "the abandoned upload is deleted")
        assert "failed at upload with EXPIRED" in server.log.read_text()


def test_a_result_that_nobody_closes_is_deleted(tmp_path: Path) -> None:
    with running(tmp_path, deadlines={"result_keep_s": 0.5}) as server:
        with Raw(server.endpoint) as peer:
            send_all(peer, scan_file(tmp_path).read_bytes())
            peer.take_until(protocol.Done)
        until(lambda: server.spooled() == [], "the result is deleted")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_server_that_ends_takes_its_workers_along_and_goes_on_with_its_jobs(tmp_path: Path, number: int) -> None:
    scan = scan_file(tmp_path)
    with running(tmp_path, workers=2, deadlines={"drain_s": 0.2}) as server, Raw(server.endpoint) as peer:
        server.hold.touch()
        job = send_all(peer, scan.read_bytes())
        peer.take_until(protocol.Stored)
        workers = server.workers()
        assert len(workers) == 2
        server.process.send_signal(number)
        if number != signal.SIGKILL:
            error = peer.take_until(protocol.Error)
            assert (error.job, error.code, error.retryable) == (job, "SERVER_STOPPING", True)
            assert server.process.wait(LIMIT_S) == 0
            assert not any(is_alive(pid) for pid in workers)
            assert not (tmp_path / "endpoint").exists()
        until(lambda: not any(is_alive(pid) for pid in workers), "the workers end")
        assert [path.name for path in server.spooled()] == [job.hex()]
        server.hold.unlink()
    with running(tmp_path) as server, Raw(server.endpoint) as peer:
        peer.socket.send_multipart(protocol.encode(protocol.Status(job)))
        done = peer.take_until(protocol.Done)
        content = peer.ask(protocol.Fetch(job, "mask.nii.gz", 0, done.files[0].bytes)).payload
        (tmp_path / "mask.nii.gz").write_bytes(content)
        assert peer.ask(protocol.Close(job)) == protocol.Closed(job)
        assert server.spooled() == []
    expect_right_mask(scan, tmp_path / "mask.nii.gz")


def test_the_workers_socket_lies_in_the_spool_where_a_killed_server_leaves_nothing_for_long() -> None:
    with tempfile.TemporaryDirectory(prefix="s") as short:
        spool = Path(short)
        os.close(claim_spool(spool))
        folder = make_ipc_folder(spool)
        assert folder.parent == spool
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "workers").touch()  # and the process is killed
        os.close(claim_spool(spool))
        assert [path.name for path in spool.iterdir()] == [".lock"]
        longest = spool / ("x" * (107 - len(f"{spool}//{IPC_FOLDER}/workers")))
        longest.mkdir()
        folder = make_ipc_folder(longest)
        assert folder.parent == longest
        with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.bind(f"ipc://{folder}/workers")
        too_long = longest.with_name(longest.name + "x")
        too_long.mkdir()
        elsewhere = make_ipc_folder(too_long)
        try:
            assert not elsewhere.is_relative_to(spool)
            assert elsewhere.stat().st_mode & 0o777 == 0o700
        finally:
            elsewhere.rmdir()


# ---- wrong starts


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda folder: (folder / "models" / "bright" / "3" / "saved_model.pb").unlink(), "saved_model.pb"),
        (lambda folder: (folder / "models").rename(folder / "elsewhere"), "no such folder"),
        (lambda folder: (folder / "models" / "bright" / "3" / "model.json").write_text("{}"), "that loads and runs"),
        (lambda folder: {"limits": {"queu": 5}}, "did you mean queue?"),
        (lambda folder: {"workers": "two"}, "integer for workers, received 'two'"),
        (lambda folder: {"limits": 5}, "keys with values for limits"),
        (lambda folder: (folder / "endpoint").mkdir(), "--endpoint-file"),
    ],
)
def test_a_wrong_start_ends_with_two_and_a_sentence(tmp_path: Path, break_it: Any, sentence: str) -> None:
    make_models(tmp_path / "models")
    sections = break_it(tmp_path)
    process = start(tmp_path, **(sections if isinstance(sections, dict) else {}))
    output, _ = process.communicate(timeout=LIMIT_S)
    log = (tmp_path / "log").read_text()
    assert (process.returncode, output) == (2, "")
    assert sentence in log
    assert log.strip().endswith(".")
    assert "Traceback" not in log


UNUSABLE = "x" * 300  # a name that no file system takes, as a place that may not be searched: asked about it, it fails


@pytest.mark.parametrize("ask", [config.load, versions_in, digest_of])
def test_what_cannot_even_be_looked_at_is_one_sentence(tmp_path: Path, ask: Any) -> None:
    code, sentence = error_of(ask, tmp_path / UNUSABLE)
    assert code == ("NOT_READABLE" if ask is config.load else "MODEL_UNAVAILABLE")
    assert is_one_sentence_naming(sentence, tmp_path / UNUSABLE)
    assert "File name too long" in sentence


def test_a_file_in_the_place_of_the_workers_socket_is_one_sentence(tmp_path: Path) -> None:
    make_models(tmp_path / "models")
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / IPC_FOLDER).touch()
    process = start(tmp_path)
    process.communicate(timeout=LIMIT_S)
    (said,) = [line for line in (tmp_path / "log").read_text().splitlines() if not line.startswith("{")]
    assert process.returncode == 1
    assert "Expected a spool that can be used" in said and IPC_FOLDER in said


def test_an_address_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    gate = SimpleNamespace(endpoint="tcp://127.0.0.1:5557", workers=SimpleNamespace(models=()))
    with pytest.raises(CannotServe, match="--endpoint-file, received 'No such file") as refused:
        _report_ready(gate, tmp_path / "gone" / "endpoint")
    assert refused.value.exit_code == 1


@pytest.mark.parametrize(
    "text",
    [
        "workers: 1\nworkers: 64\n",
        "limits:\n  queue: 1\n  queue: 2\n",
        "models: 2020-13-45\n",
        "models: " + "[" * 5000,
        "models: " + "{a: " * 2000 + "1" + "}" * 2000,
        "workers: [\n",
        "workers: two\n",
        "- workers\n",
        "[]",
    ],
)
def test_a_server_file_that_says_nothing_clear_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "server.yaml").write_text(text)
    code, sentence = error_of(config.load, tmp_path / "server.yaml")
    assert code == "BAD_CONFIG"
    assert is_one_sentence_naming(sentence, tmp_path / "server.yaml")


def test_a_folder_without_a_value_is_told_with_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text("models:\n")
    assert "Expected path for models, received None" in error_of(config.load, tmp_path / "server.yaml")[1]


def test_a_server_file_of_comments_alone_leaves_everything_by_default(tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text("# nothing yet\n")
    assert config.load(tmp_path / "server.yaml") == config.ServerConfig()


def test_the_folder_of_the_endpoint_file_is_made(tmp_path: Path) -> None:
    make_models(tmp_path / "models")
    process = start(tmp_path, endpoint_file=tmp_path / "run" / "now" / "endpoint")
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready ")
        assert (tmp_path / "run" / "now" / "endpoint").read_text().startswith("tcp://127.0.0.1:")
    finally:
        process.terminate()
        process.communicate(timeout=LIMIT_S)


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:*", "tcp://127.0.0.1:0", "tcp://127.0.0.1:65535", "tcp://[::1]:5557"]
)
def test_loopback_with_any_port_there_is_can_be_bound(address: str) -> None:
    check_bind(address, insecure=True)


@pytest.mark.parametrize(
    "address",
    [
        "tcp://0.0.0.0:*",
        "tcp://*:5557",
        "tcp://192.168.1.1:5557",
        "ipc:///tmp/x",
        "5557",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:99999",
        "tcp://127.0.0.1:-1",
        "tcp://127.0.0.1:5x",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1",
    ],
)
def test_only_loopback_is_bound_without_encryption(tmp_path: Path, address: str) -> None:
    with pytest.raises(CannotServe, match="loopback") as refused:
        check_bind(address, insecure=True)
    assert refused.value.exit_code == 2


def test_an_address_in_use_and_a_spool_in_use_are_told(server: Server, tmp_path: Path) -> None:
    make_models(tmp_path / "models")
    for arguments, sentence in (
        (["--bind", server.endpoint, "--spool", str(tmp_path / "spool")], "an address in use"),
        (["--bind", "tcp://127.0.0.1:*", "--spool", str(server.spool)], "one in use"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "serving.server", "--cfg", "serving/server.yaml", *arguments]
            + ["--models", str(tmp_path / "models"), "--access", str(tmp_path / "access"), "--http", "127.0.0.1:0"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == 2
        assert sentence in done.stderr


# ---- the client


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The client as users run it."""
    return subprocess.run(
        [sys.executable, "-m", "serving.client", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def test_the_command_segments_scans_and_writes_their_measurements(server: Server, tmp_path: Path) -> None:
    scans = [scan_file(tmp_path, seed=seed, name=f"{seed}.nii.gz") for seed in (1, 2)]
    bad = tmp_path / "bad.nii.gz"
    bad.write_text("no scan")
    arguments = ("--insecure", "--server", server.endpoint, "--model", "bright", "-o", tmp_path / "out")
    report = tmp_path / "reports" / "all.json"
    done = command("submit", scans[0], bad, scans[1], *arguments, "--format", "nii.gz", "--json", report)
    assert done.returncode == 2
    assert "bad.nii.gz" in done.stderr
    assert "Traceback" not in done.stderr
    for scan in scans:
        expect_right_mask(scan, tmp_path / "out" / scan.name)
    results = json.loads(report.read_text())
    assert [Path(result["scan"]).name for result in results] == ["1.nii.gz", "bad.nii.gz", "2.nii.gz"]
    assert results[1]["error"]["code"] == "UNSUPPORTED_FORMAT"
    assert results[0]["voxels"] > 0


def test_ping_and_models_answer(server: Server) -> None:
    assert "ready" in command("ping", "--insecure", "--server", server.endpoint).stdout
    assert command("models", "--insecure", "--server", server.endpoint).stdout.split() == [
        "bright/3",
        digest_of(server.models / "bright" / "3"),
    ]


def test_what_is_wrong_here_needs_no_server(tmp_path: Path) -> None:
    scan = scan_file(tmp_path)
    content = scan.read_bytes()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.nii.gz")
    there = sorted(tmp_path.iterdir())
    for arguments, sentence in (
        ((tmp_path / "missing.nii.gz", "-o", tmp_path / "out.vtk"), "missing.nii.gz"),
        ((tmp_path / "empty", "-o", tmp_path / "out.vtk"), "received none"),
        ((scan, "-o", tmp_path / "out.png"), "out.png"),
        ((scan, scan, "-o", tmp_path / "out"), "different names"),
        ((scan, scan, "-o", tmp_path / "out.vtk"), "a folder for 2 scans"),
        ((scan, "-o", scan), "apart from the scans"),
        ((scan, "-o", tmp_path, "--format", "nii.gz"), "apart from the scans"),
        ((scan, "-o", tmp_path / "out.vtk", "--format", "nii.gz"), "a name in .nii.gz"),
        ((scan, "-o", tmp_path / "out.vtk", "--json", tmp_path / "file" / "x.json"), "Not a directory"),
        ((scan, "-o", scan.with_name("file"), "--format", "vti"), "Not a directory"),
        ((scan, "-o", tmp_path / "out.vtk", "--model", "models/volume"), "received 'models/volume'"),
        ((scan, "-o", tmp_path / "out.vtk", "--model", ""), "received ''"),
        ((tmp_path / "pipe.nii.gz", "-o", tmp_path / "out.vtk"), "a device or a pipe"),
    ):
        done = command("submit", "--insecure", "--server", "tcp://127.0.0.1:1", "--model", "bright", *arguments)
        assert done.returncode == 2, done.stderr
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr
    assert scan.read_bytes() == content
    assert sorted(tmp_path.iterdir()) == there


def test_no_output_may_fall_on_a_scan_or_on_another_output(tmp_path: Path) -> None:
    scan, vtk = scan_file(tmp_path), scan_file(tmp_path, name="other.vtk")
    study, elsewhere, link = tmp_path / "study", tmp_path / "elsewhere", tmp_path / "link.nii.gz"
    study.mkdir()
    elsewhere.symlink_to(study)
    link.symlink_to(scan)
    new = tmp_path / "new.vtk"
    bad: list[tuple[list[Path], list[Path], Path | None]] = [
        ([scan], [scan], None),
        ([scan], [link], None),
        ([link], [scan], None),
        ([scan], [study / ".." / scan.name], None),
        ([scan, vtk], [tmp_path / "a.vtk", scan], None),
        ([scan], [new], scan),
        ([scan], [new], new),
        ([scan], [new], tmp_path / "new.vtk.json"),
        ([tmp_path / "new.vtk.json"], [new], None),
        ([scan, vtk], [new, study / ".." / new.name], None),
        ([study], [study / "liver.vtk"], None),
        ([study], [study / "deep" / "liver.nii.gz"], None),
        ([study], [elsewhere / "liver.vtk"], None),
        ([elsewhere], [study / "liver.vtk"], None),
        ([study], [new], study / "volumes.json"),
        ([scan], [study], None),
        ([scan], [scan / "in" / "a.vtk"], None),
        ([vtk], [new], scan / "volumes.json"),
    ]
    for scans, outputs, report in bad:
        with pytest.raises(ClientError) as refused:
            check_outputs(scans, outputs, report)
        assert (refused.value.code, refused.value.exit_code) == ("BAD_OUTPUT", 2)
        assert refused.value.sentence.endswith(".")
    for scans, outputs, report in (
        ([scan], [new], tmp_path / "new.json"),
        ([scan], [vtk], None),  # an earlier result is written anew
        ([scan, study], [tmp_path / "a.vtk", tmp_path / "study.vtk"], tmp_path / "missing" / "a.json"),
        ([scan], [tmp_path / "new.nii.gz"], tmp_path / "new.nii.gz.json"),
    ):
        check_outputs(scans, outputs, report)


def test_a_scan_is_never_overwritten_by_the_library_either(server: Server, tmp_path: Path) -> None:
    scan = scan_file(tmp_path)
    content = scan.read_bytes()
    with server.connect() as peer:
        for model, out in (("bright", scan), ("models/bright", tmp_path / "out.vtk")):
            with pytest.raises(ClientError) as refused:
                peer.segment(scan, model, out, LIMIT_S)
            assert refused.value.exit_code == 2
        with pytest.raises(ClientError, match="a whole number") as broken:
            peer._say(protocol.Chunk(b"k" * 32, -1, b"abc"), time.monotonic() + LIMIT_S)
        assert (broken.value.code, broken.value.exit_code) == ("BAD_FRAME", 2)
    assert scan.read_bytes() == content


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "broken link"])
@pytest.mark.parametrize("inside", [True, False])
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path, kind: str, inside: bool) -> None:
    scan = tmp_path / "study" / "1.dcm"
    scan.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(scan)
    else:
        scan.symlink_to("/dev/zero" if kind == "link to a device" else tmp_path / "gone.dcm")
    for check in (check_readable, package):
        with pytest.raises(ClientError) as refused:
            check(scan.parent if inside else scan)
        expected = "NOT_FOUND" if kind == "broken link" and not inside else "NOT_READABLE"
        assert (refused.value.code, refused.value.exit_code) == (expected, 2)
        assert str(scan) in refused.value.sentence


def test_a_wrong_model_is_wrong_use(server: Server, tmp_path: Path) -> None:
    done = command(
        "submit",
        scan_file(tmp_path),
        "--insecure",
        "--server",
        server.endpoint,
        "--model",
        "kidney",
        "-o",
        tmp_path / "out.vtk",
    )
    assert done.returncode == 2
    assert "Expected a model of those served (bright/3), received 'kidney'." in done.stderr


@pytest.fixture(params=["closed", "silent", "other"])
def dead_end(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Its kind and address: a port where nothing listens, one that says nothing, one that says something else."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param != "closed":
            listener.listen()
        if request.param == "other":
            threading.Thread(target=_speak_http, args=(listener,), daemon=True).start()
        yield request.param, f"tcp://127.0.0.1:{listener.getsockname()[1]}"


def _speak_http(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def test_a_dead_end_is_told_within_the_limit(dead_end: tuple[str, str]) -> None:
    """Three connections that break off are told as what they are, with time for them; the others only after it."""
    kind, address = dead_end
    connect_s, code = (LIMIT_S, "SERVER_KEY_MISMATCH") if kind == "other" else (0.5, "UNREACHABLE")
    began = time.monotonic()
    with pytest.raises(ClientError) as refused:
        Client(address, insecure=True, connect_s=connect_s)
    assert time.monotonic() - began < connect_s + 2.5
    assert (refused.value.code, refused.value.exit_code) == (code, 4)
    assert address in refused.value.sentence


def test_the_command_ends_with_four_where_no_server_is(tmp_path: Path) -> None:
    done = command("ping", "--insecure", "--server", "tcp://127.0.0.1:1")
    assert done.returncode == 4
    assert "check that it runs" in done.stderr
    for address in ("nonsense", "tcp://127.0.0.1:99999", "tcp://127.0.0.1:0", "tcp://127.0.0.1:1;127.0.0.1:99999"):
        done = command("ping", "--insecure", "--server", address)
        assert (done.returncode, "Expected a server's address" in done.stderr) == (2, True)


def test_no_result_in_time_is_told_and_the_job_given_up(server: Server, held: Path, tmp_path: Path) -> None:
    with server.connect() as peer, pytest.raises(ClientError, match="--timeout-s") as refused:
        peer.segment(scan_file(tmp_path), "bright", tmp_path / "out.vtk", timeout_s=0.5)
    assert (refused.value.code, refused.value.exit_code) == ("TIMEOUT", 4)
    until(lambda: server.spooled() == [], "the job is deleted")
    assert list(tmp_path.glob("*out*")) == []


def test_a_server_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SILENCE_S", 1.0)
    monkeypatch.setattr(connection, "ASK_S", 0.2)
    with running(tmp_path) as server, server.connect() as peer:
        server.hold.touch()

        def kill(stage: str, done: int, total: int) -> None:
            if stage == "segment":
                server.process.kill()

        with pytest.raises(ClientError, match="for 1 s") as refused:
            peer.segment(scan_file(tmp_path), "bright", tmp_path / "out.vtk", LIMIT_S, kill)
    assert (refused.value.code, refused.value.exit_code) == ("UNREACHABLE", 4)


def test_a_series_is_sent_without_its_names_and_named_in_errors(server: Server, tmp_path: Path) -> None:
    study = tmp_path / "study"
    study.mkdir()
    (study / "Jane_Doe_1.dcm").write_bytes(b"no DICOM" * 100)
    with package(study).file as sent:
        sent.seek(0)
        content = zstandard.ZstdDecompressor().stream_reader(sent).read()
    assert b"Jane" not in content
    assert b"000001.dcm" in content
    with server.connect() as peer, pytest.raises(ClientError) as refused:
        peer.segment(study, "bright", tmp_path / "out.vtk", LIMIT_S)
    assert refused.value.code == "UNSUPPORTED_FORMAT"
    assert "study/Jane_Doe_1.dcm" in refused.value.sentence


def test_a_series_in_folders_of_a_folder_is_sent_whole(tmp_path: Path) -> None:
    for name in ("study/1.dcm", "study/one/IM2", "study/two/deep/3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"content")
    sent = package(tmp_path / "study")
    assert sent.members == ("1.dcm", "one/IM2", "two/deep/3.txt")
    with sent.file as file:
        file.seek(0)
        archive = zipfile.ZipFile(io.BytesIO(zstandard.ZstdDecompressor().stream_reader(file).read()))
    assert archive.namelist() == ["000001.dcm", "000002.000", "000003.bin"]  # a nameless one may be a damaged slice


def test_too_large_is_told_before_a_byte_is_sent(server: Server, tmp_path: Path) -> None:
    big = tmp_path / "big.nii.gz"
    big.write_bytes(bytes(4_000_001))
    with server.connect() as peer, pytest.raises(ClientError, match="4000001") as refused:
        peer.segment(big, "bright", tmp_path / "out.vtk", LIMIT_S)
    assert (refused.value.code, refused.value.exit_code) == ("TOO_LARGE", 2)


def test_sizes_are_told_before_anything_is_packed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "package", lambda scan: pytest.fail("packed"))
    with (tmp_path / "big.nii").open("wb") as sparse:
        sparse.truncate(2**40)
    (tmp_path / "study").mkdir()
    for number in range(21):
        (tmp_path / "study" / f"{number}.dcm").write_bytes(b"content")
    with server.connect() as peer:
        for name, size in (("big.nii", str(2**40)), ("study", "21")):
            with pytest.raises(ClientError, match=size) as refused:
                peer.segment(tmp_path / name, "bright", tmp_path / "out.vtk", LIMIT_S)
            assert (refused.value.code, refused.value.exit_code) == ("TOO_LARGE", 2)


def test_a_folder_without_dicom_is_not_taken_for_a_lost_job(server: Server, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("no scan " * 50)
    with server.connect() as peer, pytest.raises(ClientError) as refused:
        peer.segment(tmp_path / "notes", "bright", tmp_path / "out.vtk", LIMIT_S)
    assert (refused.value.code, refused.value.exit_code) == ("NOT_FOUND", 2)
    assert "to know the job" not in refused.value.sentence
    assert "DICOM" in refused.value.sentence
    lost = connection.Refused(peer_not_found(b"k" * 32), server.endpoint)
    assert (lost.exit_code, "to know the job" in lost.sentence) == (4, True)


def test_gate_client_and_protocol_start_fast_and_without_numpy(tmp_path: Path) -> None:
    check = (
        "import sys, importlib; importlib.import_module(sys.argv[1])\n"
        "heavy = [name for name in sys.modules if name.split('.')[0] in sys.argv[2:]]\n"
        "assert not heavy, heavy\n"
    )
    heavy = ("numpy", "tensorflow", "nibabel", "pydicom", "vtk")
    for module, unwanted in (("serving.gate", heavy), ("serving.client", (*heavy, "lvseg", "pydantic"))):
        subprocess.run([sys.executable, "-c", check, module, *unwanted], cwd=ROOT, check=True, timeout=LIMIT_S)
    times = []
    for _ in range(3):  # the fastest: the others may have met a busy machine
        began = time.monotonic()
        assert "example" in command("submit", "--help").stdout
        times.append(time.monotonic() - began)
    assert min(times) < 0.5


def test_a_package_of_a_gz_is_the_file_itself_and_others_are_packed(tmp_path: Path) -> None:
    gz, plain = scan_file(tmp_path), scan_file(tmp_path, name="scan.nii")

    def sent(path: Path) -> tuple[Package, bytes]:
        one = package(path)
        with one.file as file:
            file.seek(0)
            return one, file.read()

    one, content = sent(gz)
    assert (one.codec, content) == ("raw", gz.read_bytes())
    one, content = sent(plain)
    assert one.codec == "zstd"
    assert zstandard.ZstdDecompressor().decompressobj().decompress(content) == plain.read_bytes()
    assert one.content_bytes == plain.stat().st_size
    assert one.sha256 == hashlib.sha256(content).hexdigest()
