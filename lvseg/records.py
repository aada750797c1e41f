"""One harmonised scan <-> one `tf.train.SequenceExample` in a shard of its own.

A shard holds one volume, so a split by patient is a choice of files and no reader opens a patient it should not see.
Context: who (patient, study, scanner, dataset), the scan's own shape and spacing, its statistics before padding, and
`slope` and `intercept`. Feature lists, one entry a slice: `image` (uint16, little-endian, value * slope + intercept is
the intensity, harmonised, not normalised), `slice_minimum` and `slice_maximum` (of the scan before padding), `mask`
and, for simulated patients, `tissues`: labels as planes of bits, the lowest bit first and no more than the volume
needs, eight pixels a byte with the first in its highest bit, zlib.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from lvseg import preprocess
from lvseg.command import atomic, written_by_tensorflow
from lvseg.errors import InputError
from lvseg.preprocess import Statistics
from lvseg.volume import Array

ZLIB_LEVEL = 6
LARGEST_STORED = 65535  # of the 16 bits that the intensities from a scan's minimum to its maximum are spread over


@dataclass(frozen=True)
class Harmonised:
    """A scan ready for a shard.

    Args:
        patient, study, scanner, dataset: who and what it is; text without geometry.
        sources: sha256 of every file it was made from, by name, in the order they were read.
        voxels_sha256: of the scan's canonical voxels and shape, to notice the same scan under two names.
        shape, spacing_mm: of the scan, (slice, row, column), with slices along the card's axis.
        statistics: of the scan before padding.
        image: float32 [S, size, size]; mask: uint8 [S, size, size]; tissues: uint8 [S, size, size] or None.
        metadata: JSON-able facts of how the image was made, such as `fat_fraction` with its warnings.
    """

    patient: str
    study: str
    scanner: str
    dataset: str
    sources: tuple[str, ...]
    voxels_sha256: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    statistics: Statistics
    image: Array
    mask: Array
    tissues: Array | None
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Slices(NamedTuple):
    """A shard's volume as the pipeline sees it.

    image: uint16 [S, size, size]; mask: uint8 [S, size, size]; slope, intercept: float32; statistics: of the scan;
    tissues: uint8 [S, size, size], nothing but air where the scan has no map of them, or None where not asked for.
    """

    image: tf.Tensor
    mask: tf.Tensor
    slope: tf.Tensor
    intercept: tf.Tensor
    statistics: Statistics
    tissues: tf.Tensor | None = None


def voxels_sha256(voxels: Array) -> str:
    """Digest of a scan's canonical voxels and shape; equal values give equal digests in any dtype.

    Without the spacing, whose last digits differ from one file format to another.
    """
    header = f"{voxels.shape} "
    return hashlib.sha256(header.encode() + voxels.astype("<f8").tobytes(order="C")).hexdigest()


def encode(volume: Harmonised) -> bytes:
    """Serialises a volume; the same volume gives the same bytes."""
    low, high = float(volume.statistics.minimum), float(volume.statistics.maximum)
    slope = (high - low) / LARGEST_STORED or 1.0
    stored = np.rint((volume.image.astype(np.float64) - low) / slope).clip(0, LARGEST_STORED).astype("<u2")
    context = {
        "patient": _text(volume.patient),
        "study": _text(volume.study),
        "scanner": _text(volume.scanner),
        "dataset": _text(volume.dataset),
        "sources": _text(*volume.sources),
        "metadata": _text(json.dumps(dict(volume.metadata), sort_keys=True, allow_nan=False)),
        "voxels_sha256": _text(volume.voxels_sha256),
        "classes": tf.train.Feature(int64_list=tf.train.Int64List(value=np.unique(volume.mask))),
        "shape": tf.train.Feature(int64_list=tf.train.Int64List(value=volume.shape)),
        "size": tf.train.Feature(int64_list=tf.train.Int64List(value=[volume.image.shape[1]])),
        "spacing_mm": _floats(volume.spacing_mm),
        "slope": _floats([slope]),
        "intercept": _floats([low]),
    }
    for name in ("minimum", "maximum", "percentiles"):
        context[name] = _floats(np.atleast_1d(np.asarray(getattr(volume.statistics, name))))
    lists = {
        "image": _bytes_list([plane.tobytes() for plane in stored]),
        "mask": _bytes_list(_pack(volume.mask)),
    }
    for name in ("slice_minimum", "slice_maximum"):
        values = np.asarray(getattr(volume.statistics, name))
        lists[name] = tf.train.FeatureList(feature=[_floats([value]) for value in values])
    if volume.tissues is not None:
        lists["tissues"] = _bytes_list(_pack(volume.tissues))
    example = tf.train.SequenceExample(
        context=tf.train.Features(feature=context), feature_lists=tf.train.FeatureLists(feature_list=lists)
    )
    return example.SerializeToString(deterministic=True)


def decode(serialised: tf.Tensor, size: int, patients: Sequence[str] | None = None, tissues: bool = False) -> Slices:
    """Parses a serialised volume inside a TensorFlow graph.

    Args:
        serialised: string scalar, from `encode`.
        size: pixels of a side of the slices.
        patients: whose volumes may be read, so that training cannot see a test patient whatever file it is given; None
            for anybody's.
        tissues: whether to read the map of tissues too.

    Raises:
        tf.errors.InvalidArgumentError: for a volume of somebody else.
    """
    if patients is not None:
        owner, _ = tf.io.parse_single_sequence_example(
            serialised, context_features={"patient": tf.io.FixedLenFeature([], tf.string)}
        )
        allowed = tf.reduce_any(tf.equal(owner["patient"], tf.constant(list(patients), tf.string)))
        refused = tf.debugging.Assert(allowed, ["Expected a patient of this split, received", owner["patient"]])
        with tf.control_dependencies([] if refused is None else [refused]):
            serialised = tf.identity(serialised)
    scalar = tf.io.FixedLenFeature([], tf.float32)
    extreme = tf.io.FixedLenSequenceFeature([], tf.float32)
    planes = tf.io.FixedLenSequenceFeature([], tf.string)
    context, lists = tf.io.parse_single_sequence_example(
        serialised,
        context_features={
            "slope": scalar,
            "intercept": scalar,
            "minimum": scalar,
            "maximum": scalar,
            "percentiles": tf.io.FixedLenFeature([preprocess.PERCENTILE_STEPS + 1], tf.float32),
        },
        sequence_features={"image": planes, "mask": planes, "slice_minimum": extreme, "slice_maximum": extreme}
        | ({"tissues": tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True)} if tissues else {}),
    )
    image = tf.io.decode_raw(lists["image"], tf.uint16, little_endian=True)
    mask = _unpack(lists["mask"], size)
    return Slices(
        tf.reshape(image, [-1, size, size]),
        mask,
        context["slope"],
        context["intercept"],
        Statistics(
            context["minimum"],
            context["maximum"],
            lists["slice_minimum"],
            lists["slice_maximum"],
            context["percentiles"],
        ),
        _tissues(lists["tissues"], mask, size) if tissues else None,
    )


def _tissues(packed: tf.Tensor, mask: tf.Tensor, size: int) -> tf.Tensor:
    return tf.cond(tf.size(packed) > 0, lambda: _unpack(packed, size), lambda: tf.zeros_like(mask))


def _pack(labels: Array) -> list[bytes]:
    """One entry a slice of uint8 [S, size, size], as the module says; bits inflate in a fraction of bytes' time."""
    planes = range(max(1, int(labels.max()).bit_length()))
    bits = np.stack([labels >> plane & 1 for plane in planes], axis=1).reshape(len(labels), len(planes), -1)
    return [zlib.compress(packed.tobytes(), ZLIB_LEVEL) for packed in np.packbits(bits, axis=-1)]


# Eight pixels of one byte of bits, as the eight bytes of an int64; row k has them worth 2**k.
_PIXELS = np.concatenate(
    [(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1) << plane).view(np.int64) for plane in range(8)]
)[:, 0]


def _unpack(packed: tf.Tensor, size: int) -> tf.Tensor:
    """Labels, uint8 [S, size, size], of what `_pack` made."""
    row_bytes = -(-size * size // 8)
    bits = tf.io.decode_raw(tf.io.decode_compressed(packed, "ZLIB"), tf.uint8)
    planes = tf.reshape(bits, [tf.shape(bits)[0], -1, row_bytes])
    row = 256 * tf.range(tf.shape(planes)[1])[:, None]
    # No two planes share a bit of a pixel's byte, so sums of eight pixels at once never carry from one to the next.
    pixels = tf.reduce_sum(tf.gather(tf.constant(_PIXELS), tf.cast(planes, tf.int32) + row), axis=1)
    labels = tf.reshape(tf.bitcast(pixels, tf.uint8), [-1, 8 * row_bytes])
    return tf.reshape(labels[:, : size * size], [-1, size, size])


def write_shard(volume: Harmonised, path: Path) -> None:
    """Writes a volume's shard under its final name only once it is whole.

    Raises:
        OSError: for a disk that is full or fails.
    """
    serialised = encode(volume)
    with written_by_tensorflow(path), atomic(path) as temporary, tf.io.TFRecordWriter(str(temporary)) as writer:
        writer.write(serialised)


def read_row(path: Path) -> dict[str, Any]:
    """The manifest's row of a shard, read from the shard itself.

    Raises:
        InputError: BAD_SHARD if the file is not a whole shard of this project.
    """
    try:
        serialised = next(iter(tf.data.TFRecordDataset(str(path)))).numpy()
        example = tf.train.SequenceExample.FromString(serialised)
    except (StopIteration, tf.errors.OpError, ValueError) as error:
        raise InputError("BAD_SHARD", f"Expected a shard, received a damaged file in {path}; delete it.") from error
    context = example.context.feature

    def text(name: str) -> str:
        return context[name].bytes_list.value[0].decode()

    return {
        "patient": text("patient"),
        "study": text("study"),
        "scanner": text("scanner"),
        "dataset": text("dataset"),
        "file": path.name,
        "shard_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "voxels_sha256": text("voxels_sha256"),
        "sources": [value.decode() for value in context["sources"].bytes_list.value],
        "metadata": json.loads(text("metadata")),
        "classes": list(context["classes"].int64_list.value),
        "shape": list(context["shape"].int64_list.value),
        "spacing_mm": [round(value, 6) for value in context["spacing_mm"].float_list.value],
        "minimum": context["minimum"].float_list.value[0],
        "maximum": context["maximum"].float_list.value[0],
        "percentiles": {
            str(percent): float(preprocess.percentile(np.asarray(context["percentiles"].float_list.value), percent))
            for percent in (0.5, 50, 99.5)
        },
    }


def _text(*values: str) -> tf.train.Feature:
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value.encode() for value in values]))


def _floats(values: Any) -> tf.train.Feature:
    return tf.train.Feature(float_list=tf.train.FloatList(value=[float(value) for value in values]))


def _bytes_list(values: list[bytes]) -> tf.train.FeatureList:
    return tf.train.FeatureList(
        feature=[tf.train.Feature(bytes_list=tf.train.BytesList(value=[value])) for value in values]
    )
