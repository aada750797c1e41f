"""The wire format: messages to frames and back, and nothing else. No sockets, no files, no state, no pickle.

A message is always four or five frames, on the client's link and on the workers' alike:

    +--------+--------+-----------------+-------------------------+--------------------------+
    | "LVS1" | type   | job key         | header                  | payload                  |
    | 4 bytes| 1 byte | 32 bytes, or    | JSON object in UTF-8,   | CHUNK and DATA only,     |
    |        |        | empty           | at most 16 KiB          | 1 byte to 1 MiB          |
    +--------+--------+-----------------+-------------------------+--------------------------+

One frozen dataclass a message; its field `job` is the third frame, `payload` the fifth, all others are the header's
keys. The schema is strict in both directions: every key is there, no other is, and each value passes its check.
`encode` and `decode` are inverse. What the messages mean is in PROTOCOL.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, TypeVar

VERSION = 1
BUILD = "lvseg 0.1.0"  # what each side says of itself; the version of setup.cfg
MAGIC = b"LVS%d" % VERSION
KEY_BYTES = 32
HEADER_BYTES_MAX = 16 * 1024
PAYLOAD_BYTES_MAX = 1024 * 1024
# libzmq counts this per frame; the slack is for nothing but a clear answer to a payload that is a little too long.
FRAME_BYTES_MAX = PAYLOAD_BYTES_MAX + 64 * 1024
COUNT_MAX = 2**53 - 1  # whole numbers up to here are the same in every language's JSON
TEXT_CHARACTERS_MAX = 2000
LISTED_MAX, LISTED_CHARACTERS_MAX = 32, 60  # what fits a header whatever the names
NAME_CHARACTERS_MAX = 200

MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"
MODEL_CHARACTERS_MAX = 64
OUTPUTS = ("vtk", "nii.gz", "vti", "nrrd", "mha", "dcm")
# Suffixes that reach a file name on the server; readers choose by them. Longest first.
SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha", ".vtk", ".vti", ".dcm", ".zip")
HEADERS = (".mhd", ".nhdr")  # of formats that readers know, whose voxels lie in a second file, which is not sent
# All that is kept of the names in a series: files that call themselves DICOM have to be, and nameless ones may be.
MEMBER_SUFFIXES = (".dcm", ".ima")
MEMBER_NAMELESS = ".000"


class BadFrame(ValueError):
    """Frames that are no message of this protocol.

    Args:
        text: one sentence for the sender.
        code: BAD_FRAME, or PROTO_UNSUPPORTED for another version's frames.
    """

    def __init__(self, text: str, code: str = "BAD_FRAME") -> None:
        super().__init__(text)
        self.text = text
        self.code = code


# ---- checks of header values: each returns what it takes, or raises ValueError saying what it expected

Check = Callable[[Any], Any]
Message = TypeVar("Message")


def _checked(check: Check) -> Any:
    return dataclasses.field(metadata={"check": check})


def _count(maximum: int = COUNT_MAX, minimum: int = 0) -> Any:
    def check(value: Any) -> int:
        if type(value) is not int or not minimum <= value <= maximum:
            raise ValueError(f"a whole number from {minimum} to {maximum}")
        return value

    return _checked(check)


def _flag() -> Any:
    def check(value: Any) -> bool:
        if type(value) is not bool:
            raise ValueError("true or false")
        return value

    return _checked(check)


def _text(maximum: int = TEXT_CHARACTERS_MAX, pattern: str = r".*", what: str = "printable text") -> Any:
    compiled = re.compile(pattern)

    def check(value: Any) -> str:
        if type(value) is not str or len(value) > maximum or not value.isprintable() or not compiled.fullmatch(value):
            raise ValueError(f"{what} of at most {maximum} characters")
        return value

    return _checked(check)


def _one_of(*allowed: str) -> Any:
    def check(value: Any) -> str:
        if type(value) is not str or value not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return value

    return _checked(check)


def _record(kind: type[Any]) -> Any:
    return _checked(lambda value: _from_header(kind, _plain(value)))


def _records(kind: type[Any], maximum: int) -> Any:
    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or len(value) > maximum:
            raise ValueError(f"a list of at most {maximum} entries")
        return tuple(_from_header(kind, _plain(entry)) for entry in value)

    return _checked(check)


def _key() -> Any:
    return dataclasses.field(metadata={"frame": "job"})


def _payload() -> Any:
    return dataclasses.field(metadata={"frame": "payload"})


def _scan_name() -> Any:
    return _text(NAME_CHARACTERS_MAX, r"[^/\\]+", "a base name without separators")


def _task() -> Any:
    return _text(MODEL_CHARACTERS_MAX, MODEL_NAME, "a model's name")


def _digest() -> Any:
    return _text(64, r"[0-9a-f]{64}", "a SHA-256 in 64 lower-case hexadecimal digits")


def _file_name() -> Any:
    return _text(64, r"[a-z][a-z0-9]*(\.[a-z0-9]+){1,2}", "a result's file name")


def _code() -> Any:
    return _text(64, r"[A-Z][A-Z0-9_]*", "an upper-case code")


# ---- records inside headers


@dataclass(frozen=True)
class Limits:
    """What this server takes; a client checks against them before it sends, since ZeroMQ cuts without a word."""

    upload_bytes: int = _count()
    content_bytes: int = _count()
    members: int = _count()
    chunk_bytes: int = _count(PAYLOAD_BYTES_MAX, 1)


@dataclass(frozen=True)
class Model:
    """A version that is served: `models/<name>/<version>/`, and the digest of all its files."""

    name: str = _task()
    version: int = _count()
    sha256: str = _digest()


@dataclass(frozen=True)
class ResultFile:
    """One file of a result: `mask.<format>`, `mask.vtk.json` beside an oblique .vtk, `result.json`."""

    name: str = _file_name()
    bytes: int = _count()
    sha256: str = _digest()


# ---- client and gate: greeting


@dataclass(frozen=True)
class Hello:
    """C>S: the versions a client speaks and its build, for the log."""

    proto_min: int = _count(255)
    proto_max: int = _count(255)
    client: str = _text(64)


@dataclass(frozen=True)
class Welcome:
    """S>C: answer to HELLO. `ready`: the models are loaded and warm (a scan sent before waits in the queue)."""

    proto: int = _count(255)
    build: str = _text(64)
    ready: bool = _flag()
    limits: Limits = _record(Limits)  # noqa: RUF009 makes a field, not a default
    models: tuple[Model, ...] = _records(Model, 64)


@dataclass(frozen=True)
class JobFacts:
    """A job in LISTING: its key in hexadecimal, the scan's name (its end, where it is long), and where it is."""

    job: str = _digest()
    name: str = _text(LISTED_CHARACTERS_MAX)
    model: str = _task()
    state: str = _one_of("receiving", "queue", "unpack", "read", "segment", "write", "done", "failed")
    position: int = _count()


@dataclass(frozen=True)
class Ping:
    """C>S: is anyone there."""


@dataclass(frozen=True)
class Pong:
    """S>C: answer to PING."""


@dataclass(frozen=True)
class Error:
    """S>C: what was wrong with a message (`job` empty, or the one it named) or why a job failed.

    `fault` says whose it is: "input" (the scan or the request), "access" (busy, unknown job, network), "server".
    `retryable`: the same again may succeed, not before `retry_after_ms`.
    """

    job: bytes = _key()
    code: str = _code()
    stage: str = _one_of("frame", "submit", "upload", "queue", "unpack", "read", "segment", "write", "fetch")
    fault: str = _one_of("input", "access", "server")
    retryable: bool = _flag()
    retry_after_ms: int = _count(3_600_000)
    text: str = _text()

    KEY_OPTIONAL: ClassVar[bool] = True


# ---- client and gate: a job


@dataclass(frozen=True)
class Submit:
    """C>S: announces a scan. One at a time per connection: the answer is ACCEPTED or ERROR.

    `name`: base name for messages, never used on disk but for a suffix in SUFFIXES. `kind`: "file", or "series" for a
    zip of DICOM files whose member names are ignored but for `member_suffix`. `version`: of the model, 0 for the
    current one. `modality`: "CT" or "MR", whatever the scan's file says, or "" for that. `bytes` and `sha256`: of
    the bytes as sent. `content_bytes`: of what `codec` unpacks them to. `deadline_ms`: give up when not begun by then,
    counted from SUBMIT. The same bytes with the same wishes from the same client are the same job, see `job_key`.
    """

    name: str = _scan_name()
    kind: str = _one_of("file", "series")
    model: str = _task()
    version: int = _count()
    modality: str = _one_of("", "CT", "MR")
    output: str = _one_of(*OUTPUTS)
    codec: str = _one_of("raw", "zstd")
    bytes: int = _count(minimum=1)
    content_bytes: int = _count(minimum=1)
    sha256: str = _digest()
    deadline_ms: int = _count(86_400_000, 1)


@dataclass(frozen=True)
class Accepted:
    """S>C: send from byte `offset` on, up to byte `until`. Also the answer to STATUS while a job is uploaded.

    `offset` at the end of the upload: the server has the scan already; PROGRESS or DONE follows. `until` equal to
    `offset` before the end: another connection of the same client is sending the same scan; ask STATUS now and then.
    """

    job: bytes = _key()
    offset: int = _count()
    until: int = _count()


@dataclass(frozen=True)
class Chunk:
    """C>S: the bytes of the upload that begin at `offset`."""

    job: bytes = _key()
    offset: int = _count()
    payload: bytes = _payload()


@dataclass(frozen=True)
class Credit:
    """S>C: what came is on disk; bytes before `until` may be sent. Absolute, so nothing adds up wrongly."""

    job: bytes = _key()
    until: int = _count()


@dataclass(frozen=True)
class Stored:
    """S>C: the upload is whole and has the SHA-256 that was announced; the job is queued."""

    job: bytes = _key()
    sha256: str = _digest()


@dataclass(frozen=True)
class Status:
    """C>S: where is my job; also claims its messages for this connection, which heals a lost one."""

    job: bytes = _key()


@dataclass(frozen=True)
class List:
    """C>S: which jobs of mine are there."""


@dataclass(frozen=True)
class Listing:
    """S>C: answer to LIST, the newest first; `total` counts those that had no room as well."""

    total: int = _count()
    jobs: tuple[JobFacts, ...] = _records(JobFacts, LISTED_MAX)


@dataclass(frozen=True)
class Progress:
    """S>C: how far a job is. `position`: jobs before it in the queue, 0 once it runs; `done` of `total` in `stage`."""

    job: bytes = _key()
    stage: str = _one_of("queue", "unpack", "read", "segment", "write")
    position: int = _count()
    done: int = _count()
    total: int = _count()


@dataclass(frozen=True)
class Done:
    """S>C: the result's files are ready to be fetched."""

    job: bytes = _key()
    files: tuple[ResultFile, ...] = _records(ResultFile, 16)


@dataclass(frozen=True)
class Fetch:
    """C>S: asks for at most `bytes` of a result's file from `offset` on; answered by one DATA or ERROR."""

    job: bytes = _key()
    name: str = _file_name()
    offset: int = _count()
    bytes: int = _count(PAYLOAD_BYTES_MAX, 1)


@dataclass(frozen=True)
class Data:
    """S>C: bytes of a result's file."""

    job: bytes = _key()
    name: str = _file_name()
    offset: int = _count()
    payload: bytes = _payload()


@dataclass(frozen=True)
class Close:
    """C>S: this connection wants no more of the job; once none does, the server deletes all of it, done or not."""

    job: bytes = _key()


@dataclass(frozen=True)
class Closed:
    """S>C: this connection hears no more of the job."""

    job: bytes = _key()


@dataclass(frozen=True)
class Cancel:
    """C>S: the job is to end, for every connection of its owner; NOT_FOUND once it has."""

    job: bytes = _key()


@dataclass(frozen=True)
class Cancelled:
    """S>C: answer to CANCEL."""

    job: bytes = _key()


# ---- gate and workers, on ipc inside the server


@dataclass(frozen=True)
class Ready:
    """W>G: models, if this worker holds any, are loaded and warm; give me work."""

    models: tuple[Model, ...] = _records(Model, 64)


@dataclass(frozen=True)
class Unable:
    """W>G: a model cannot be served."""

    model: str = _task()
    version: int = _count()
    code: str = _code()
    text: str = _text()


@dataclass(frozen=True)
class Work:
    """G>W: one step of a job, the worker's kind says which. It finds and leaves its files in the job's folder.

    `version` is that of a loaded model. `received_ms` and `queued_ms` are for the result's timings.
    """

    job: bytes = _key()
    name: str = _scan_name()
    kind: str = _one_of("file", "series")
    model: str = _task()
    version: int = _count()
    modality: str = _one_of("", "CT", "MR")
    output: str = _one_of(*OUTPUTS)
    codec: str = _one_of("raw", "zstd")
    content_bytes: int = _count(minimum=1)
    received_ms: int = _count()
    queued_ms: int = _count()


@dataclass(frozen=True)
class Step:
    """W>G: a stage has begun or come further."""

    job: bytes = _key()
    stage: str = _one_of("unpack", "read", "segment", "write")
    done: int = _count()
    total: int = _count()


@dataclass(frozen=True)
class Result:
    """W>G: the step is done; after the last one the files lie in the job's result folder."""

    job: bytes = _key()
    files: tuple[ResultFile, ...] = _records(ResultFile, 16)


@dataclass(frozen=True)
class Failed:
    """W>G: the job failed, the worker goes on. `code` CANCELLED answers STOP."""

    job: bytes = _key()
    code: str = _code()
    stage: str = _one_of("unpack", "read", "segment", "write")
    fault: str = _one_of("input", "access", "server")
    text: str = _text()


@dataclass(frozen=True)
class Heartbeat:
    """W>G: the worker's process lives (its thread of sockets does; a stuck job is for the stage deadline)."""


@dataclass(frozen=True)
class Stop:
    """G>W: nobody wants this job any more; stop at the next batch."""

    job: bytes = _key()


TYPES: dict[int, type[Any]] = {
    0x01: Hello,
    0x02: Welcome,
    0x03: Ping,
    0x04: Pong,
    0x05: Error,
    0x10: Submit,
    0x11: Accepted,
    0x12: Chunk,
    0x13: Credit,
    0x14: Stored,
    0x20: Status,
    0x21: Progress,
    0x22: Done,
    0x23: List,
    0x24: Listing,
    0x30: Fetch,
    0x31: Data,
    0x40: Close,
    0x41: Closed,
    0x42: Cancel,
    0x43: Cancelled,
    0x80: Ready,
    0x81: Unable,
    0x82: Work,
    0x83: Step,
    0x84: Result,
    0x85: Failed,
    0x86: Heartbeat,
    0x87: Stop,
}
_NUMBERS = {kind: number for number, kind in TYPES.items()}

FROM_CLIENT = frozenset({Hello, Ping, Submit, Chunk, Status, List, Fetch, Close, Cancel})
TO_CLIENT = frozenset(
    {Welcome, Pong, Error, Accepted, Credit, Stored, Progress, Done, Listing, Data, Closed, Cancelled}
)
FROM_WORKER = frozenset({Ready, Unable, Step, Result, Failed, Heartbeat})
TO_WORKER = frozenset({Work, Stop})


# ---- a job's name


def job_key(owner: str, submit: Submit, model_sha256: str) -> bytes:
    """The key of a job: what makes two announcements the same one.

    The owner is part of it, so that nobody learns from an answer that somebody else sent the same scan.

    Args:
        owner: public key of the client, "" on a plain connection.
        submit: the announcement; its name and deadline do not count.
        model_sha256: digest of the model version that it means.

    Returns:
        32 bytes.
    """
    wishes = [submit.kind, submit.codec, submit.output, submit.modality, submit.model, str(submit.version)]
    parts = [f"LVS{VERSION}", owner, submit.sha256, str(submit.bytes), str(submit.content_bytes), model_sha256, *wishes]
    suffix = suffix_of(submit.name) if submit.kind == "file" else ""  # readers choose by it
    return hashlib.sha256("\n".join([*parts, suffix]).encode()).digest()


# ---- the inverse pair


def encode(message: Any) -> list[bytes]:
    """The frames of a message.

    Args:
        message: one of the dataclasses above.

    Returns:
        Four frames, or five if it has a payload.

    Raises:
        BadFrame: the message breaks the schema, so no peer would take it.
    """
    kind = type(message)
    job = payload = b""
    header: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        value = getattr(message, item.name)
        frame = item.metadata.get("frame")
        if frame == "job":
            job = value
        elif frame == "payload":
            payload = value
        else:
            header[item.name] = _plain(_sound(item, value, kind))
    _check_key(kind, job)
    _check_payload(kind, payload)
    text = json.dumps(header, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    if len(text) > HEADER_BYTES_MAX:
        raise BadFrame(f"Expected a header of at most {HEADER_BYTES_MAX} bytes, received {len(text)} bytes.")
    frames = [MAGIC, bytes([_NUMBERS[kind]]), job, text]
    return [*frames, payload] if payload else frames


def decode(frames: Sequence[bytes], allowed: frozenset[type[Any]] = frozenset(_NUMBERS)) -> Any:
    """The message of some frames.

    Args:
        frames: as they came.
        allowed: the messages that this side takes, such as FROM_CLIENT.

    Returns:
        One of the dataclasses above.

    Raises:
        BadFrame: anything that `encode` would not have written.
    """
    if len(frames) not in (4, 5):
        raise BadFrame(f"Expected 4 or 5 frames, received {len(frames)} frames.")
    magic, number, job, text = frames[:4]
    if magic != MAGIC:
        if re.fullmatch(rb"LVS[0-9]", magic):
            raise BadFrame(
                f"Expected protocol {MAGIC.decode()}, received {magic.decode()}: update the client or the server.",
                "PROTO_UNSUPPORTED",
            )
        raise BadFrame(f"Expected a first frame {MAGIC.decode()}, received {len(magic)} other bytes.")
    if len(number) != 1 or number[0] not in TYPES:
        raise BadFrame(f"Expected one byte for the message's type, received 0x{number[:4].hex()}.")
    kind = TYPES[number[0]]
    if kind not in allowed:
        raise BadFrame(f"Expected a message for this side, received a {kind.__name__.upper()}.")
    _check_key(kind, job)
    payload = frames[4] if len(frames) == 5 else b""
    if len(frames) == 5 and not payload:
        raise BadFrame("Expected a payload of at least 1 byte, received an empty fifth frame.")
    _check_payload(kind, payload)
    if len(text) > HEADER_BYTES_MAX:
        raise BadFrame(f"Expected a header of at most {HEADER_BYTES_MAX} bytes, received {len(text)} bytes.")
    header = _parse(text)
    try:
        return _from_header(kind, header, job=job, payload=payload)
    except ValueError as error:
        raise BadFrame(f"Expected {error} in the header of {kind.__name__.upper()}.") from error


def clean(text: str, maximum: int = TEXT_CHARACTERS_MAX) -> str:
    """`text` on one line, printable and at most `maximum` characters, as a header takes it."""
    line = " ".join(text.split())
    printable = "".join(character if character.isprintable() else "?" for character in line)
    return printable if len(printable) <= maximum else printable[: maximum - 4] + " ..."


def clean_name(name: str) -> str:
    """A base name that SUBMIT takes, made from a local file's: separators and unprintable characters become "_"."""
    kept = "".join(character if character.isprintable() and character not in "/\\" else "_" for character in name)
    # The end is what readers choose by, so a long name loses its beginning.
    return kept[-NAME_CHARACTERS_MAX:] or "_"


def is_model_name(text: str) -> bool:
    """Whether SUBMIT can say it as the name of a model."""
    return len(text) <= MODEL_CHARACTERS_MAX and re.fullmatch(MODEL_NAME, text) is not None


def suffix_of(name: str) -> str:
    """The suffix in SUFFIXES that `name` ends with in either case, or the empty string."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def member_suffix(name: str) -> str:
    """What is sent of the name of a file of a series: .dcm, .ima, .bin, or .000 where no letters follow a dot."""
    suffix = next((known for known in MEMBER_SUFFIXES if name.lower().endswith(known) and len(name) > len(known)), "")
    nameless = not name.startswith(".") and not re.search(r"\.[A-Za-z]\w*$", name)
    return suffix or (MEMBER_NAMELESS if nameless else ".bin")


def _sound(item: dataclasses.Field[Any], value: Any, kind: type[Any]) -> Any:
    try:
        return item.metadata["check"](value)
    except ValueError as error:
        raise BadFrame(f"Expected {error} for '{item.name}' in the header of {kind.__name__.upper()}.") from error


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as JSON has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _from_header(kind: type[Message], header: Any, **frames: bytes) -> Message:
    """A dataclass from the keys of a JSON object, each checked; unknown and missing keys are refused."""
    if type(header) is not dict:
        raise ValueError("a JSON object")
    values: dict[str, Any] = {}
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        if "frame" in item.metadata:
            values[item.name] = frames[item.metadata["frame"]]
        elif item.name in header:
            try:
                values[item.name] = item.metadata["check"](header[item.name])
            except ValueError as error:
                raise ValueError(f"{error} for '{item.name}'") from error
        else:
            raise ValueError(f"the key '{item.name}'")
    unknown = set(header) - set(values)
    if unknown:
        raise ValueError(f"no key '{clean(min(unknown), 40)}'")
    return kind(**values)


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise BadFrame("Expected a flat JSON header, received one nested too deeply.") from None
    except ValueError:
        raise BadFrame("Expected a JSON object in UTF-8 with unique keys as header, received something else.") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a key appears twice")
    return dict(pairs)


def _check_key(kind: type[Any], job: bytes) -> None:
    takes = any(item.metadata.get("frame") == "job" for item in dataclasses.fields(kind))
    if not isinstance(job, bytes):
        raise BadFrame(f"Expected the job key as bytes, received {type(job).__name__}.")
    lengths = ({KEY_BYTES} if takes else {0}) | ({0} if getattr(kind, "KEY_OPTIONAL", False) else set())
    if len(job) not in lengths:
        raise BadFrame(
            f"Expected a job key of {max(lengths)} bytes in {kind.__name__.upper()}, received {len(job)} bytes."
        )


def _check_payload(kind: type[Any], payload: bytes) -> None:
    takes = any(item.metadata.get("frame") == "payload" for item in dataclasses.fields(kind))
    if takes != bool(payload):
        received = f"{len(payload)} bytes" if payload else "none"
        raise BadFrame(f"Expected {'a' if takes else 'no'} payload in {kind.__name__.upper()}, received {received}.")
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise BadFrame(f"Expected a payload of at most {PAYLOAD_BYTES_MAX} bytes, received {len(payload)} bytes.")
