"""The process that holds the models: takes one job at a time from the gate, answers with files in the job's folder.

Three threads, because TensorFlow may hold the main one for minutes: the main thread reads, segments and writes; one
owns the socket to the gate, sends heartbeats and hears of cancelled jobs; one waits on standard input, a pipe whose
other end the gate holds, and ends the process when that closes, so no worker outlives its gate however that died.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import zmq

from lvseg.errors import InputError
from serving import protocol, unpack

if TYPE_CHECKING:
    from lvseg.predict import Segmentation
    from lvseg.volume import Volume

UPLOAD, WORK, RESULT = "upload", "work", "result"  # in a job's folder of the spool
HEARTBEAT_S = 1.0
PROGRESS_EVERY_S = 0.1
EXIT_UNABLE = 3
ZIP_BYTES_MAX = 2 * 1024**3  # unpacked, of a zip that a user sends as a file

log = logging.getLogger("serving.worker")


class Segments(Protocol):
    """What a model has to offer: `lvseg.predict.Segmenter` does."""

    info: dict[str, Any]

    def segment(self, scan: Volume, on_progress: Callable[[int, int], None] | None = None) -> Segmentation: ...


class Cancelled(Exception):
    """The gate no longer wants the job in hand."""


def load_segmenter(model: Path) -> Segments:
    """The SavedModel in a version folder, ready for use; imports TensorFlow."""
    from lvseg.predict import Segmenter

    return Segmenter(model)


def warm_up(segmenter: Segments) -> None:
    """Runs a small scan through the model, so that no user's scan pays for tracing and memory planning."""
    import numpy as np

    from lvseg.volume import Volume

    row_mm, column_mm = segmenter.info["spacing_mm"]
    size = int(segmenter.info["size"])
    voxels = np.random.default_rng(0).integers(1, 1000, (3, size, size)).astype(np.int16)
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = 5.0, row_mm, column_mm, 1.0
    segmenter.segment(Volume(voxels, affine, source="the scan for warming up"))


class Link:
    """The worker's side of the line to the gate. `send` and `take` belong to the main thread.

    Args:
        endpoint: the gate's, for workers.
        identity: routing id that the gate gave this process.
    """

    def __init__(self, endpoint: str, identity: bytes) -> None:
        self._context = zmq.Context()
        self._out = self._context.socket(zmq.PAIR)
        self._out.bind("inproc://out")
        self._work: queue.SimpleQueue[protocol.Work] = queue.SimpleQueue()
        self.cancelled = b""
        threading.Thread(target=self._run, args=(endpoint, identity), daemon=True, name="link").start()

    def send(self, message: Any) -> None:
        """Passes a message on to the gate."""
        self._out.send_multipart(protocol.encode(message))

    def take(self) -> protocol.Work:
        """Waits for the next job."""
        return self._work.get()

    def _run(self, endpoint: str, identity: bytes) -> None:
        inner = self._context.socket(zmq.PAIR)
        inner.connect("inproc://out")
        gate = self._context.socket(zmq.DEALER)
        gate.setsockopt(zmq.IDENTITY, identity)
        gate.setsockopt(zmq.MAXMSGSIZE, protocol.FRAME_BYTES_MAX)
        gate.connect(endpoint)
        poller = zmq.Poller()
        poller.register(inner, zmq.POLLIN)
        poller.register(gate, zmq.POLLIN)
        beat_at = 0.0
        while True:
            ready = dict(poller.poll(max(0, int(1000 * (beat_at - time.monotonic())))))
            if inner in ready:
                gate.send_multipart(inner.recv_multipart())
            if gate in ready:
                message = protocol.decode(gate.recv_multipart(), protocol.TO_WORKER)
                if isinstance(message, protocol.Work):
                    self._work.put(message)
                else:
                    self.cancelled = message.job
            if time.monotonic() >= beat_at:
                beat_at = time.monotonic() + HEARTBEAT_S
                gate.send_multipart(protocol.encode(protocol.Heartbeat()))


class Reporter:
    """Tells the gate how far the job in hand is, now and then, and stops the job when it was cancelled."""

    def __init__(self, link: Link, job: bytes) -> None:
        self._link = link
        self._job = job
        self._sent_at = 0.0
        self.stage = "unpack"

    def begin(self, stage: str) -> None:
        """The next stage, always told."""
        self.stage = stage
        self._sent_at = 0.0
        self(0, 0)

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` batches of the stage; also where a cancelled job ends."""
        if self._link.cancelled == self._job:
            raise Cancelled
        now = time.monotonic()
        if now - self._sent_at >= PROGRESS_EVERY_S or done == total:
            self._sent_at = now
            self._link.send(protocol.Step(self._job, self.stage, done, total))


def answer(
    work: protocol.Work, folder: Path, segmenter: Segments, members: int, report: Reporter
) -> tuple[protocol.ResultFile, ...]:
    """Does one job.

    Args:
        work: the job.
        folder: the job's folder in the spool, with the upload.
        segmenter: of the model that the job names.
        members: limit for the files of a series.
        report: told of stages and batches.

    Returns:
        The result's files, which lie in `folder / RESULT`.

    Raises:
        InputError: whatever is wrong with the scan.
        Cancelled: nobody waits for it any more.
    """
    from lvseg.formats import read_volume, write_volume

    report.begin("unpack")
    scan_path = _unpacked(work, folder, members)
    report.begin("read")
    scan = replace(read_volume(scan_path), source=work.name)
    report.begin("segment")
    segmentation = segmenter.segment(scan, report)
    report.begin("write")
    unfinished = folder / WORK / RESULT
    unfinished.mkdir()
    paths = write_volume(segmentation.mask, unfinished / f"mask.{work.output}")
    measurements = unfinished / "measurements.json"
    measurements.write_text(json.dumps(segmentation.measurements, indent=2, allow_nan=False) + "\n")
    files = tuple(_described(path) for path in [*paths, measurements])
    unfinished.replace(folder / RESULT)
    return files


def serve(
    endpoint: str,
    identity: str,
    spool: Path,
    models: Mapping[str, Path],
    members: int,
    load: Callable[[Path], Segments] = load_segmenter,
) -> int:
    """Loads and warms up the models, then does jobs until the gate goes away.

    Args:
        endpoint: ZeroMQ address of the gate's side for workers.
        identity: what the gate calls this process.
        spool: folder with a folder for each job, named by its key in hexadecimal.
        models: version folder of each model's name.
        members: limit for the files of a series.
        load: makes a segmenter of a version folder.

    Returns:
        EXIT_UNABLE, after telling the gate which model cannot be served.
    """
    threading.Thread(target=_end_with_gate, daemon=True, name="lifeline").start()
    link = Link(endpoint, identity.encode())
    segmenters: dict[str, Segments] = {}
    for name, path in models.items():
        try:
            segmenters[name] = load(path)
            warm_up(segmenters[name])
        except Exception as error:
            if _is_shortage(error):
                raise  # the next attempt may find more memory
            link.send(_unable(error, path))
            _end_with_gate()
            return EXIT_UNABLE
    link.send(protocol.Ready(tuple(_model(name, models[name], segmenters[name]) for name in models)))
    while True:
        work = link.take()
        folder = spool / work.job.hex()
        report = Reporter(link, work.job)
        try:
            files = answer(work, folder, segmenters[work.model], members, report)
            link.send(protocol.Result(work.job, files))
        except Exception as error:  # one bad scan must not cost the next user the loaded models
            code, fault, sentence = _explained(error, work, folder, spool, report.stage)
            link.send(protocol.Failed(work.job, code, report.stage, fault, sentence))


def main(argv: Sequence[str] | None = None, load: Callable[[Path], Segments] = load_segmenter) -> int:
    """The command that the gate starts; not for people."""
    parser = argparse.ArgumentParser(prog="python -m serving.worker", description="Started by serving.server.")
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--identity", required=True)
    parser.add_argument("--spool", required=True, type=Path)
    parser.add_argument("--model", required=True, action="append", help="NAME=FOLDER")
    parser.add_argument("--members", required=True, type=int)
    parser.add_argument("--memory-bytes", type=int, default=0)
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the gate's to handle
    os.umask(0o077)
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    if arguments.memory_bytes:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (arguments.memory_bytes, arguments.memory_bytes))
    models = {name: Path(folder) for name, _, folder in (entry.partition("=") for entry in arguments.model)}
    return serve(arguments.endpoint, arguments.identity, arguments.spool, models, arguments.members, load)


def _end_with_gate() -> None:
    """Returns never: ends the process when the gate closes its end of our standard input."""
    while os.read(0, 4096):
        pass
    os._exit(0)


def _unpacked(work: protocol.Work, folder: Path, members: int) -> Path:
    """The scan as a file or folder that readers take; its name is unlike anything else in a sentence."""
    workplace = folder / WORK
    shutil.rmtree(workplace, ignore_errors=True)  # of an attempt that was killed
    shutil.rmtree(folder / RESULT, ignore_errors=True)
    workplace.mkdir()
    stem = _stem(work)
    content = workplace / (f"{stem}.zip" if work.kind == "series" else stem + protocol.suffix_of(work.name))
    if work.codec == "zstd":
        unpack.decompress(folder / UPLOAD, content, work.content_bytes, work.name)
    else:
        unpack.link(folder / UPLOAD, content)
    if content.suffix != ".zip":
        return content
    from lvseg.formats.archive import unzip

    # A series is announced with what its stored zip unpacks to; a zip that a user made may be deflated.
    content_bytes = work.content_bytes if work.kind == "series" else ZIP_BYTES_MAX
    unzip(content, workplace / stem, content_bytes, members, work.name)
    content.unlink()
    return workplace / stem


def _stem(work: protocol.Work) -> str:
    return f"upload-{work.job.hex()[:12]}"


def _described(path: Path) -> protocol.ResultFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return protocol.ResultFile(path.name, path.stat().st_size, digest)


def _model(name: str, path: Path, segmenter: Segments) -> protocol.Model:
    return protocol.Model(name, int(path.name), segmenter.info["weights_sha256"])


def _is_shortage(error: Exception) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError"


def _unable(error: Exception, model: Path) -> protocol.Unable:
    """Why a model cannot be served; where TensorFlow failed on it goes to the log."""
    if isinstance(error, InputError):
        return protocol.Unable(error.code, protocol.clean(error.sentence))
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("model %s cannot be loaded: %s\n%s", model, type(error).__name__, where)
    sentence = f"Expected a model that loads and runs, received one that fails with {type(error).__name__} in {model}."
    return protocol.Unable("MODEL_UNAVAILABLE", protocol.clean(sentence))


def _explained(error: Exception, work: protocol.Work, folder: Path, spool: Path, stage: str) -> tuple[str, str, str]:
    """Code, fault and sentence for the client: the scan by the client's name for it, no path of the server."""
    if isinstance(error, Cancelled):
        return "CANCELLED", "access", "The job was closed before it was done."
    if isinstance(error, InputError):
        stem = _stem(work)
        place = folder / WORK
        sentence = error.sentence
        for own in (place / f"{stem}{protocol.suffix_of(work.name)}", place / stem):
            sentence = sentence.replace(str(own), work.name).replace(own.name, work.name)
        return error.code, "input", protocol.clean(sentence.replace(str(spool), "the spool"))
    if _is_shortage(error):
        return "OUT_OF_MEMORY", "server", f"Expected a scan that fits the server's memory, received {work.name}."
    # Without the error's own text, which may name a file or a patient; the frames say where.
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("job %s failed at %s with %s\n%s", work.job.hex()[:12], stage, type(error).__name__, where)
    return (
        "INTERNAL",
        "server",
        f"The server failed on {work.name} at '{stage}' ({type(error).__name__}); its log says where, under job"
        f" {work.job.hex()[:12]}.",
    )


if __name__ == "__main__":
    sys.exit(main())
