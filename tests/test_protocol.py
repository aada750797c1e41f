"""The wire format: what is encoded is decoded to the same, and nothing else is taken."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving import protocol

KEY = bytes(range(32))
printable = st.text(st.sampled_from("aZ09 ._-%{}\"'éß漢😀"), min_size=1, max_size=40)
relaxed = settings(deadline=None)  # a busy machine is no fault
counts = st.integers(0, 255)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
tasks = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}", fullmatch=True)
models = st.builds(protocol.Model, name=tasks, version=st.integers(0, protocol.COUNT_MAX), sha256=digests)
files = st.builds(
    protocol.ResultFile,
    name=st.sampled_from(["mask.vtk", "mask.nii.gz", "mask.vtk.json"]),
    bytes=counts,
    sha256=digests,
)
limits = st.builds(
    protocol.Limits, upload_bytes=counts, content_bytes=counts, members=counts, chunk_bytes=st.integers(1, 2**20)
)
facts = st.builds(
    protocol.JobFacts,
    job=digests,
    name=printable,
    model=tasks,
    state=st.sampled_from(["receiving", "queue", "segment", "done"]),
    position=counts,
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "job": st.binary(min_size=32, max_size=32),
    "payload": st.binary(min_size=1, max_size=64),
    "models": st.lists(models, max_size=3).map(tuple),
    "files": st.lists(files, max_size=3).map(tuple),
    "jobs": st.lists(facts, max_size=3).map(tuple),
    "limits": limits,
    "modality": st.sampled_from(["", "CT", "MR"]),
    "ready": st.booleans(),
    "retryable": st.booleans(),
    "sha256": digests,
    "model": tasks,
    "stage": st.sampled_from(["unpack", "read", "segment", "write"]),
    "fault": st.sampled_from(["input", "access", "server"]),
    "kind": st.sampled_from(["file", "series"]),
    "codec": st.sampled_from(["raw", "zstd"]),
    "output": st.sampled_from(protocol.OUTPUTS),
    "code": st.from_regex(r"[A-Z][A-Z0-9_]{0,20}", fullmatch=True),
    "text": printable,
    "client": printable,
    "build": printable,
}


def values(kind: type[Any], name: str) -> st.SearchStrategy[Any]:
    if name == "name":
        return st.just("mask.vtk") if kind in (protocol.Fetch, protocol.Data) else printable
    return FIELDS.get(name, st.integers(1, 255))


messages = st.sampled_from(sorted(protocol.TYPES.values(), key=lambda kind: kind.__name__)).flatmap(
    lambda kind: st.builds(kind, **{item.name: values(kind, item.name) for item in dataclasses.fields(kind)})
)


@relaxed
@given(messages)
def test_decode_is_the_inverse_of_encode(message: Any) -> None:
    frames = protocol.encode(message)
    assert len(frames) in (4, 5)
    assert frames[0] == b"LVS1"
    assert protocol.decode(frames) == message
    assert protocol.encode(protocol.decode(frames)) == frames


@relaxed
@given(st.lists(st.binary(max_size=40), max_size=7))
def test_random_frames_are_refused_with_a_sentence(frames: list[bytes]) -> None:
    with pytest.raises(protocol.BadFrame) as refused:
        protocol.decode(frames)
    assert refused.value.text.endswith(".")


@relaxed
@given(messages, st.data())
def test_a_changed_byte_is_refused_or_is_another_sound_message(message: Any, data: st.DataObject) -> None:
    frames = protocol.encode(message)
    number = data.draw(st.integers(0, len(frames) - 1))
    frame = bytearray(frames[number])
    if frame:
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    frames[number] = bytes(frame)
    try:
        decoded = protocol.decode(frames)
    except protocol.BadFrame:
        return
    assert protocol.decode(protocol.encode(decoded)) == decoded


def chunk(**change: Any) -> list[bytes]:
    """A sound CHUNK's frames with some replaced by number."""
    frames = protocol.encode(protocol.Chunk(KEY, 5, b"abc"))
    for number, frame in change.items():
        frames[int(number[1:])] = frame
    return frames


@pytest.mark.parametrize(
    "frames",
    [
        [],
        chunk()[:3],
        [*chunk(), b"sixth"],
        chunk(f0=b"HTTP"),
        chunk(f1=b""),
        chunk(f1=b"\x00"),
        chunk(f1=b"\x12\x12"),
        chunk(f2=b""),
        chunk(f2=KEY[:-1]),
        chunk(f3=b""),
        chunk(f3=b"\xff\xfe"),
        chunk(f3=b"[5]"),
        chunk(f3=b'{"offset":5} ' + b" " * protocol.HEADER_BYTES_MAX),
        chunk(f3=b"{}"),
        chunk(f3=b'{"offset":5,"offset":6}'),
        chunk(f3=b'{"offset":5,"more":6}'),
        chunk(f3=b'{"offset":NaN}'),
        chunk(f3=b'{"offset":5.0}'),
        chunk(f3=b'{"offset":true}'),
        chunk(f3=b'{"offset":"5"}'),
        chunk(f3=b'{"offset":-1}'),
        chunk(f3=b'{"offset":9007199254740992}'),
        chunk(f3=b'{"offset":' + b"1" * 9000 + b"}"),
        chunk(f3=b"[" * 16000),
        chunk()[:4],
        chunk(f4=b""),
        chunk(f4=b"a" * (protocol.PAYLOAD_BYTES_MAX + 1)),
        [*protocol.encode(protocol.Ping()), b"payload"],
        [b"LVS1", b"\x03", KEY, b"{}"],
    ],
)
def test_what_encode_would_not_write_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(protocol.BadFrame) as refused:
        protocol.decode(frames)
    assert refused.value.code == "BAD_FRAME"
    assert refused.value.text.startswith("Expected ")
    assert refused.value.text.endswith(".")
    assert len(refused.value.text) < 200


def test_another_version_is_told_apart_from_garbage() -> None:
    with pytest.raises(protocol.BadFrame, match="LVS1, received LVS2") as refused:
        protocol.decode(chunk(f0=b"LVS2"))
    assert refused.value.code == "PROTO_UNSUPPORTED"


def test_a_side_takes_only_its_own_messages() -> None:
    sides = (protocol.FROM_CLIENT, protocol.TO_CLIENT, protocol.FROM_WORKER, protocol.TO_WORKER)
    assert sum(len(side) for side in sides) == len(protocol.TYPES)
    assert frozenset().union(*sides) == frozenset(protocol.TYPES.values())
    with pytest.raises(protocol.BadFrame, match="received a HEARTBEAT"):
        protocol.decode(protocol.encode(protocol.Heartbeat()), protocol.FROM_CLIENT)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", "../scan.nii"),
        ("name", "a\\b"),
        ("name", "a\nb"),
        ("name", ""),
        ("name", "a" * 201),
        ("name", "\ud800"),
        ("kind", "zip"),
        ("output", "png"),
        ("codec", "lzma"),
        ("model", "../volume"),
        ("sha256", "5E" * 32),
        ("bytes", 0),
        ("deadline_ms", 10**9),
    ],
)
def test_neither_side_lets_a_bad_header_value_pass(name: str, value: Any) -> None:
    good = protocol.Submit("scan.nii", "file", "volume", 0, "", "vtk", "raw", 5, 5, "5e" * 32, 1000)
    frames = protocol.encode(good)
    header = {**json.loads(frames[3]), name: value}
    frames[3] = json.dumps(header).encode()
    with pytest.raises(protocol.BadFrame, match=name):
        protocol.decode(frames)
    with pytest.raises(protocol.BadFrame, match=name):
        protocol.encode(dataclasses.replace(good, **{name: value}))


@relaxed
@given(st.text(max_size=300))
def test_any_local_name_becomes_one_that_submit_takes(name: str) -> None:
    cleaned = protocol.clean_name(name)
    submit = protocol.Submit(cleaned, "file", "volume", 0, "", "vtk", "raw", 5, 5, "5e" * 32, 1000)
    assert protocol.decode(protocol.encode(submit)) == submit


@relaxed
@given(st.text(max_size=5000))
def test_any_text_becomes_one_that_error_takes(text: str) -> None:
    error = protocol.Error(b"", "INTERNAL", "read", "server", False, 0, protocol.clean(text))
    assert protocol.decode(protocol.encode(error)) == error


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.nii.gz", ".nii.gz"), ("A.NII", ".nii"), ("a.VTK", ".vtk"), ("IM0001", ""), ("a.tar.gz", ""), ("a.exe", "")],
)
def test_only_known_suffixes_reach_the_disk(name: str, suffix: str) -> None:
    assert protocol.suffix_of(name) == suffix


@pytest.mark.parametrize(
    "name",
    ["volume", "Fat_fraction-2", "7", "a" * 64, "", "a" * 65, "models/volume", "-volume", "volume\n", "é", "a b"],
)
def test_a_models_name_is_one_that_submit_can_say(name: str) -> None:
    submit = protocol.Submit("scan.nii.gz", "file", name, 0, "", "vtk", "raw", 5, 5, "0" * 64, 1000)
    if protocol.is_model_name(name):
        assert protocol.decode(protocol.encode(submit)).model == name
    else:
        with pytest.raises(protocol.BadFrame, match="a model's name"):
            protocol.encode(submit)
