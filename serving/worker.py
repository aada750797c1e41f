"""A process that does one step of a job at a time, and leaves what it made in the job's folder of the spool.

Of three kinds (`serving.jobs.STEPS`): unpack and pack know nothing of TensorFlow and are held by the kernel's limits,
since they parse what strangers sent; segment holds the models. Between them go plain arrays and JSON, never pickles:

    upload > work/scan.npy, scan.json > work/labels.npy, segmentation.json > result/mask.<format>, result.json

and, where the result is to be a DICOM segmentation, work/origin.json from unpack to pack: the patient, the study and
the images that it refers to.

Three threads, because TensorFlow may hold the main one for minutes: the main thread works; one owns the socket to the
gate, sends heartbeats and hears of jobs to stop; one waits on standard input, a pipe whose other end the gate holds,
and ends the process when that closes, so no worker outlives its gate however that died. The kernel ends one that cannot
do that, since it is stopped or C code holds Python's lock.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import gc
import json
import logging
import os
import queue
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import zmq

from lvseg.errors import InputError
from serving import logs, protocol, unpack
from serving.jobs import FIRST_STAGES, RESULT, STEPS, UPLOAD, WORK, described

if TYPE_CHECKING:
    from lvseg.predict import Segmentation
    from lvseg.volume import Array, Volume

SCAN, LABELS = "scan", "labels"  # .npy and .json, .npy, in a job's work folder
SEGMENTATION = "segmentation.json"
ORIGIN = "origin.json"
HEARTBEAT_S = 1.0
PROGRESS_EVERY_S = 0.1
PROOF_MM = 0.01
PR_SET_PDEATHSIG = 1  # prctl(2): the signal at the end of the thread that started this process, the gate's main one
OPEN_FILES_MAX = 256
CONTENT_BYTES_MAX = 2 * 1024**3  # of a scan unpacked, where the gate says nothing else
NPY_HEADER_BYTES = 128  # what NumPy writes before an array's bytes
SMALL_FILES_BYTES = 64 * 1024  # a result's, beside the mask's voxels
# What the system says of a place that a scan's own bytes may name, and never of a spool that fails.
OF_CONTENT = frozenset({errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR})
GROWTH = 2  # voxels may need so many times their file's bytes, as scaled ones do

log = logging.getLogger("serving.worker")


class Segments(Protocol):
    """What a model has to offer: `lvseg.predict.Segmenter` does."""

    info: dict[str, Any]

    def segment(
        self, scan: Volume, on_progress: Callable[[int, int], None] | None = None, *, modality: str | None = None
    ) -> Segmentation: ...


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
        self.stopped = b""
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
                    self.stopped = b""  # it may be a job of that key again
                    self._work.put(message)
                else:
                    self.stopped = message.job
            if time.monotonic() >= beat_at:
                beat_at = time.monotonic() + HEARTBEAT_S
                gate.send_multipart(protocol.encode(protocol.Heartbeat()))


class Reporter:
    """Tells the gate how far the job in hand is, now and then, and stops the job when it was cancelled."""

    def __init__(self, link: Link, job: bytes) -> None:
        self._link = link
        self._job = job
        self._sent_at = 0.0
        self._began = time.monotonic()
        self.stage = ""
        self.seconds: dict[str, float] = {}

    def begin(self, stage: str) -> None:
        """The next stage, always told."""
        self.end()
        self.stage = stage
        self._sent_at = 0.0
        self(0, 0)

    def end(self) -> None:
        """The stage is over: `seconds` has its time."""
        now = time.monotonic()
        if self.stage:
            self.seconds[self.stage] = round(now - self._began, 4)
        self._began = now

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` batches of the stage; also where a cancelled job ends."""
        if self._link.stopped == self._job:
            raise Cancelled
        now = time.monotonic()
        if now - self._sent_at >= PROGRESS_EVERY_S or done == total:
            self._sent_at = now
            self._link.send(protocol.Step(self._job, self.stage, done, total))


# ---- what each kind does: from what lies in the job's folder to what the next kind finds there


def unpack_scan(work: protocol.Work, folder: Path, members: int, content_bytes: int, report: Reporter) -> None:
    """The upload as an array with its geometry.

    Args:
        work: the job.
        folder: the job's folder in the spool, with the upload.
        members: limit for the files of a series.
        content_bytes: limit for all of them together, unpacked.
        report: told of stages.

    Raises:
        InputError: whatever is wrong with the scan.
        Cancelled: nobody waits for it any more.
    """
    from lvseg.formats import check_writable
    from lvseg.formats.dicom_origin import Origin
    from lvseg.predict import read_scan

    report.begin("unpack")
    path = _unpacked(work, folder, members, content_bytes)
    report.begin("read")
    scan = replace(read_scan(path, work.model), source=work.name)
    check_writable(scan, _mask_file(work, folder))
    report.end()
    if work.output == "dcm" and isinstance(scan.origin, Origin):
        (folder / WORK / ORIGIN).write_text(scan.origin.to_json(), encoding="utf-8")
    save_scan(scan, folder / WORK, report.seconds)


def segment_scan(work: protocol.Work, folder: Path, segmenter: Segments, report: Reporter) -> None:
    """The array's labels.

    Args:
        work: the job.
        folder: the job's folder in the spool, in which the scan was unpacked.
        segmenter: of the version that the job names.
        report: told of batches.

    Raises:
        InputError: the network cannot take the scan.
        Cancelled: nobody waits for it any more.
    """
    report.begin("segment")
    scan, seconds = load_scan(folder / WORK)
    segmentation = segmenter.segment(scan, report, modality=work.modality or None)
    report.end()
    save_array(segmentation.mask.voxels, folder / WORK / f"{LABELS}.npy")
    parts = {name: round(spent, 4) for name, spent in segmentation.seconds.items()}
    card = {key: segmenter.info[key] for key in ("weights_sha256", "labels")}
    facts = {
        "measurements": segmentation.measurements,
        "seconds": {**seconds, **report.seconds, **parts},
        "algorithm": {"task": work.model, "version": work.version, **card},
    }
    (folder / WORK / SEGMENTATION).write_text(json.dumps(facts, allow_nan=False), encoding="utf-8")


def pack_result(work: protocol.Work, folder: Path, report: Reporter) -> tuple[protocol.ResultFile, ...]:
    """The labels as the client asked for them, read again to prove that they lie where the scan does.

    Args:
        work: the job.
        folder: the job's folder in the spool, in which the scan was segmented.
        report: told of the stage.

    Returns:
        The result's files, which lie in `folder / RESULT`.

    Raises:
        Cancelled: nobody waits for it any more.
    """
    import numpy as np

    from lvseg.formats import Algorithm, read_volume, write_mask
    from lvseg.formats.dicom_origin import Origin

    report.begin("write")
    scan, _ = load_scan(folder / WORK)
    if work.output == "dcm":
        scan = replace(scan, origin=Origin.from_json((folder / WORK / ORIGIN).read_text(encoding="utf-8")))
    labels = np.load(folder / WORK / f"{LABELS}.npy", allow_pickle=False)
    facts = json.loads((folder / WORK / SEGMENTATION).read_text(encoding="utf-8"))
    mask_file = _mask_file(work, folder)
    unfinished = mask_file.parent
    shutil.rmtree(unfinished, ignore_errors=True)  # of an attempt that was killed
    unfinished.mkdir()
    mask = scan.with_voxels(labels)
    require_room(unfinished, labels.nbytes + SMALL_FILES_BYTES)
    paths = write_mask(mask, mask_file, Algorithm(**facts["algorithm"]))
    proof = prove(mask, read_volume(paths[0]))
    report.end()
    answer = facts["measurements"]
    answer["geometry"] = {**answer.get("geometry", {}), **proof}
    seconds = {"receive": work.received_ms / 1000, "queue": work.queued_ms / 1000, **facts["seconds"]}
    answer["seconds"] = {**seconds, **report.seconds}
    result = unfinished / "result.json"
    result.write_text(json.dumps(answer, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    files = tuple(described(path) for path in [*paths, result])
    shutil.rmtree(folder / RESULT, ignore_errors=True)
    unfinished.replace(folder / RESULT)
    return files


def prove(mask: Volume, written: Volume) -> dict[str, Any]:
    """What a reader finds in the file, against the labels on the scan's own grid.

    Returns:
        `proof`: "same voxels, same places"; `furthest_mm`: how far a corner of the grid lies from where it should.

    Raises:
        RuntimeError: the file says something else than the labels.
    """
    import numpy as np

    own, other = mask.canonical(), written.canonical()
    if own.shape != other.shape or not np.array_equal(own.voxels, other.voxels):
        raise RuntimeError("the written labels are not those of the network")
    corners = np.array(np.meshgrid(*((0, count - 1) for count in own.shape))).reshape(3, -1).T
    furthest_mm = float(np.abs(own.world_mm(corners) - other.world_mm(corners)).max())
    if furthest_mm > PROOF_MM:
        raise RuntimeError("the written labels lie elsewhere than the scan")
    return {"proof": "same voxels, same places", "furthest_mm": round(furthest_mm, 6)}


def save_array(array: Array, path: Path) -> None:
    """Writes a .npy, for which room is taken first: of a full disk NumPy says nothing that can be told from a fault."""
    import numpy as np

    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, array.nbytes + NPY_HEADER_BYTES)
        np.save(file, array, allow_pickle=False)
        file.truncate()


def require_room(folder: Path, count: int) -> None:
    """Finds out whether a disk has room, before a library writes there that does not say why it could not.

    Raises:
        OSError: ENOSPC.
    """
    if shutil.disk_usage(folder).free < count:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_scan(scan: Volume, folder: Path, seconds: Mapping[str, float]) -> None:
    """Writes a scan as `load_scan` reads it: its voxels as .npy, everything else as JSON."""
    save_array(scan.voxels, folder / f"{SCAN}.npy")
    facts = {
        "affine": scan.affine.tolist(),
        "source": scan.source,
        "metadata": dict(scan.metadata),
        "seconds": dict(seconds),
    }
    (folder / f"{SCAN}.json").write_text(json.dumps(facts, default=_plain), encoding="utf-8")


def load_scan(folder: Path) -> tuple[Volume, dict[str, float]]:
    """Reads what `save_scan` wrote; the voxels stay on the disk until they are used.

    Where the disk fails then, the kernel ends the process with SIGBUS, which the gate tells as a failing spool.
    """
    import numpy as np

    from lvseg.volume import Volume

    facts = json.loads((folder / f"{SCAN}.json").read_text(encoding="utf-8"))
    voxels = np.load(folder / f"{SCAN}.npy", mmap_mode="r", allow_pickle=False)
    return Volume(voxels, np.array(facts["affine"]), facts["source"], facts["metadata"]), facts["seconds"]


@dataclass(frozen=True)
class Served:
    """A version that this process may load."""

    name: str
    version: int
    sha256: str
    folder: Path

    @classmethod
    def of_argument(cls, text: str) -> Served:
        """From `name/version/sha256=folder`."""
        place, _, folder = text.partition("=")
        name, version, sha256 = place.split("/")
        return cls(name, int(version), sha256, Path(folder))


def serve(
    kind: str,
    link: Link,
    spool: Path,
    models: Sequence[Served],
    members: int,
    content_bytes: int,
    job_cpu_s: int = 0,
    load: Callable[[Path], Segments] = load_segmenter,
) -> None:
    """Loads and warms up the models, if any, then does jobs until the gate goes away; returns never.

    Args:
        kind: one of `serving.jobs.STEPS`.
        link: to the gate.
        spool: folder with a folder for each job, named by its key in hexadecimal.
        models: what to load, of each model the current version first.
        members: limit for the files of a series.
        content_bytes: limit for a scan unpacked.
        job_cpu_s: processor time for one job, after which the kernel ends the process; 0 for any.
        load: makes a segmenter of a version folder.
    """
    segmenters: dict[tuple[str, int], Segments] = {}
    ready: list[protocol.Model] = []
    for served in models:
        try:
            _check_digest(served)
            segmenter = load(served.folder)
            warm_up(segmenter)
        except Exception as error:
            if _is_shortage(error):
                raise  # the next attempt may find more memory
            link.send(_unable(error, served))
            continue
        segmenters[served.name, served.version] = segmenter
        ready.append(protocol.Model(served.name, served.version, served.sha256))
    # What is loaded stays, and is not looked through for garbage amid somebody's scan, which takes a third of a second.
    gc.collect()
    gc.freeze()
    if kind != "segment":
        import lvseg.predict  # noqa: F401 now, so that no user's scan pays for it
        from lvseg.formats.checks import limit_voxels

        limit_voxels(GROWTH * content_bytes)
    link.send(protocol.Ready(tuple(ready)))
    while True:
        work = link.take()
        folder = spool / work.job.hex()
        report = Reporter(link, work.job)
        _allow_cpu(job_cpu_s)
        try:
            files: tuple[protocol.ResultFile, ...] = ()
            if kind == "unpack":
                unpack_scan(work, folder, members, content_bytes, report)
            elif kind == "segment":
                segment_scan(work, folder, segmenters[work.model, work.version], report)
            else:
                files = pack_result(work, folder, report)
            link.send(protocol.Result(work.job, files))
        except Exception as error:  # one bad scan must not cost the next user the loaded models
            is_unwanted = link.stopped == work.job  # so the gate deletes its files, which is no fault of the spool
            failure = Cancelled() if is_unwanted else error
            code, fault, sentence = _explained(failure, work, folder, spool, report.stage)
            link.send(protocol.Failed(work.job, code, report.stage or FIRST_STAGES[STEPS.index(kind)], fault, sentence))


def main(argv: Sequence[str] | None = None, load: Callable[[Path], Segments] = load_segmenter) -> int:
    """The command that the gate starts; not for people."""
    parser = argparse.ArgumentParser(prog="python -m serving.worker", description="Started by serving.server.")
    parser.add_argument("--kind", required=True, choices=STEPS)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--identity", required=True)
    parser.add_argument("--spool", required=True, type=Path)
    parser.add_argument("--model", action="append", default=[], type=Served.of_argument)
    parser.add_argument("--members", required=True, type=int)
    parser.add_argument("--memory-bytes", type=int, default=0)
    parser.add_argument("--job-cpu-s", type=int, default=0)
    parser.add_argument("--content-bytes", type=int, default=CONTENT_BYTES_MAX)
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the gate's to handle
    os.umask(0o077)
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    logs.to_standard_error()
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    _limit(arguments)
    with contextlib.suppress(AttributeError, OSError):  # not Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with_gate, daemon=True, name="lifeline").start()
    link = Link(arguments.endpoint, arguments.identity.encode())
    serve(
        arguments.kind, link, arguments.spool, arguments.model, arguments.members, arguments.content_bytes,
        arguments.job_cpu_s, load,
    )  # fmt: skip
    return 1


def _limit(arguments: argparse.Namespace) -> None:
    """What the kernel holds this process to."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold a patient's scan
    if arguments.memory_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (arguments.memory_bytes, arguments.memory_bytes))
    if arguments.kind != "segment":
        file_bytes = GROWTH * arguments.content_bytes
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing beyond is then an error, not the end
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(OPEN_FILES_MAX, hard), hard))


def _allow_cpu(seconds: int) -> None:
    """From now on; the soft limit alone moves, and reaching it ends the process."""
    if seconds:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _check_digest(served: Served) -> None:
    from serving.catalogue import digest_of

    if digest_of(served.folder) != served.sha256:
        raise InputError(
            "MODEL_UNTRUSTED",
            f"Expected a model as it was allowed, received other files in {served.folder} (if they are to be trusted:"
            " python -m serving.admin allow-model).",
        )


def _end_with_gate() -> None:
    """Returns never: ends the process when the gate closes its end of our standard input."""
    while os.read(0, 4096):
        pass
    os._exit(0)


def _unpacked(work: protocol.Work, folder: Path, members: int, content_bytes: int) -> Path:
    """The scan as a file or folder that readers take; its name is unlike anything else in a sentence."""
    if work.kind == "file" and work.name.lower().endswith(protocol.HEADERS):
        raise InputError(
            "UNSUPPORTED_FORMAT",
            f"Expected a scan in one file, received the header of one whose voxels lie beside it: {work.name}; convert"
            " it to .mha or .nrrd.",
        )
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

    # Not within what was announced, which is the zip's own size: its members may be deflated.
    unzip(content, workplace / stem, content_bytes, members, work.name)
    content.unlink()
    return workplace / stem


def _mask_file(work: protocol.Work, folder: Path) -> Path:
    """Where the mask is written before it is the result's."""
    return folder / WORK / RESULT / f"mask.{work.output}"


def _stem(work: protocol.Work) -> str:
    return f"upload-{work.job.hex()[:12]}"


def _plain(value: Any) -> Any:
    """NumPy's scalars and arrays as JSON has them."""
    return value.tolist()


def _is_shortage(error: Exception) -> bool:
    is_told_by_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or is_told_by_system or type(error).__name__ == "ResourceExhaustedError"


def _is_of_spool(error: OSError) -> bool:
    """Whether the system failed, rather than a reader, or a place that the scan names."""
    return error.errno is not None and error.errno not in OF_CONTENT


def _unable(error: Exception, served: Served) -> protocol.Unable:
    """Why a model cannot be served; where TensorFlow failed on it goes to the log."""
    if isinstance(error, InputError):
        return protocol.Unable(served.name, served.version, error.code, protocol.clean(error.sentence))
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("model %s cannot be loaded: %s\n%s", served.folder, type(error).__name__, where)
    sentence = (
        f"Expected a model that loads and runs, received one that fails with {type(error).__name__} in {served.folder}."
    )
    return protocol.Unable(served.name, served.version, "MODEL_UNAVAILABLE", protocol.clean(sentence))


def _explained(error: Exception, work: protocol.Work, folder: Path, spool: Path, stage: str) -> tuple[str, str, str]:
    """Code, fault and sentence for the client: the scan by the client's name for it, no path of the server."""
    if isinstance(error, Cancelled):
        return "CANCELLED", "access", "The job was closed before it was done."
    cause = error.__cause__ if isinstance(error, InputError) and error.code == "NOT_READABLE" else None
    if isinstance(cause, OSError) and _is_of_spool(cause):
        error = cause  # the scan came whole: it is the spool that cannot be read
    if isinstance(error, InputError):
        stem = _stem(work)
        place = folder / WORK
        sentence = error.sentence
        for own in (place / f"{stem}{protocol.suffix_of(work.name)}", place / stem):
            sentence = sentence.replace(str(own), work.name).replace(own.name, work.name)
        return error.code, "input", protocol.clean(sentence.replace(str(spool), "the spool"))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "STORAGE_FULL", "server", f"Expected room for {work.name}, received a full spool; try again later."
    if isinstance(error, OSError) and error.errno == errno.EFBIG:  # beyond what `_limit` lets a file have
        return (
            "DIMS_LIMIT",
            "input",
            f"Expected a scan within the server's limits, received a larger one in {work.name}.",
        )
    if _is_shortage(error):
        return "OUT_OF_MEMORY", "server", f"Expected a scan that fits the server's memory, received {work.name}."
    # Without the error's own text, which may name a file or a patient; the frames say where.
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("job %s failed at %s with %s\n%s", work.job.hex()[:12], stage, type(error).__name__, where)
    if isinstance(error, OSError) and _is_of_spool(error):
        reason = os.strerror(error.errno or 0)
        return (
            "STORAGE_FAILED",
            "server",
            f"Expected a spool that can be read and written, received '{reason}' for {work.name}; tell the server's"
            " operator.",
        )
    return (
        "INTERNAL",
        "server",
        f"The server failed on {work.name} at '{stage}' ({type(error).__name__}); its log says where, under job"
        f" {work.job.hex()[:12]}.",
    )


if __name__ == "__main__":
    sys.exit(main())
