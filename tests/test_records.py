"""Shards: what goes in comes out, within what 16 bits can hold, and a damaged one is never read."""

import contextlib
import errno
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from lvseg import preprocess, records
from lvseg.errors import InputError
from lvseg.phantom.simulate import PROTOCOLS


def harmonised(seed=0, size=16, slices=5, tissues=False, scale=100.0):
    random = np.random.default_rng(seed)
    image = (random.normal(0, scale, (slices, size, size)) - 3 * scale).astype(np.float32)
    mask = random.integers(0, 3, (slices, size, size)).astype(np.uint8)
    return records.Harmonised(
        "patient", "study", "scanner", "set", ("a", "b"), "digest", (slices, 20, 30), (5.0, 2.0, 2.0),
        preprocess.statistics(tf.constant(image)), image, mask, mask + 4 if tissues else None,
    )  # fmt: skip


def test_a_volume_comes_back_whole():
    volume = harmonised()
    read = records.decode(tf.constant(records.encode(volume)), 16)
    np.testing.assert_array_equal(read.mask, volume.mask)
    for name, value in volume.statistics._asdict().items():
        np.testing.assert_array_equal(getattr(read.statistics, name), value)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e5])
def test_sixteen_bits_change_intensities_by_less_than_1e_4_of_the_range(scale):
    volume = harmonised(scale=scale)
    read = records.decode(tf.constant(records.encode(volume)), 16)
    back = read.image.numpy().astype(np.float64) * float(read.slope) + float(read.intercept)
    assert np.abs(back - volume.image).max() < 1e-4 * np.ptp(volume.image)


def test_a_constant_scan_survives():
    volume = harmonised()
    flat = np.full_like(volume.image, 7.0)
    constant = records.Harmonised(
        **{**volume.__dict__, "image": flat, "statistics": preprocess.statistics(tf.constant(flat))}
    )
    read = records.decode(tf.constant(records.encode(constant)), 16)
    np.testing.assert_allclose(tf.cast(read.image, tf.float32) * read.slope + read.intercept, flat)


def test_the_same_volume_gives_the_same_bytes():
    assert records.encode(harmonised(tissues=True)) == records.encode(harmonised(tissues=True))
    assert records.encode(harmonised()) != records.encode(harmonised(seed=1))


def test_masks_of_any_class_come_back():
    volume = harmonised()
    mask = np.random.default_rng(1).integers(0, 256, volume.mask.shape).astype(np.uint8)
    read = records.decode(tf.constant(records.encode(replace(volume, mask=mask))), 16)
    np.testing.assert_array_equal(read.mask, mask)


@pytest.mark.parametrize("scanner", ["philips_volume", "ge_fat"])
def test_size_on_disk_is_near_the_harmonised_voxels_at_16_bits(tmp_path, scanner):
    """With noise that nothing compresses, and the mask and the map of 32 tissues of a simulated patient."""
    patient = PROTOCOLS[scanner].image(3, 1)
    spacing_mm = tf.constant(patient.mask.canonical().spacing_mm, tf.float32)
    mask, tissues = (
        preprocess.harmonise_labels(
            tf.constant(np.ascontiguousarray(labels.canonical().voxels)), spacing_mm, (1.75, 1.75), 256
        ).numpy()
        for labels in (patient.mask, patient.tissues)
    )
    image = np.random.default_rng(0).normal(0, 1, mask.shape).astype(np.float32)
    statistics = preprocess.statistics(tf.constant(image))
    volume = replace(harmonised(), image=image, mask=mask, tissues=tissues, shape=mask.shape, statistics=statistics)
    path = tmp_path / "one.tfrecord"
    records.write_shard(volume, path)
    assert len(np.unique(tissues)) > 15 and mask.any()
    assert path.stat().st_size <= 1.1 * image.size * 2


def test_a_row_says_what_the_shard_holds(tmp_path):
    path = tmp_path / "one.tfrecord"
    records.write_shard(harmonised(), path)
    row = records.read_row(path)
    assert (row["patient"], row["study"], row["scanner"], row["file"]) == (
        "patient",
        "study",
        "scanner",
        "one.tfrecord",
    )
    assert row["shape"] == [5, 20, 30] and row["spacing_mm"] == [5.0, 2.0, 2.0] and row["sources"] == ["a", "b"]


@pytest.mark.parametrize("keep", [0, 8, 100, 2000])
def test_a_damaged_shard_is_refused_by_name(tmp_path, keep):
    path = tmp_path / "one.tfrecord"
    records.write_shard(harmonised(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"one\.tfrecord"):
        records.read_row(path)


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "one.tfrecord"
    records.write_shard(harmonised(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(InputError):
        records.read_row(path)


def test_voxel_digests_tell_scans_apart_by_content_and_shape_in_any_dtype():
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    same = records.voxels_sha256(voxels)
    assert records.voxels_sha256(np.asfortranarray(voxels)) == same
    assert records.voxels_sha256(voxels.astype(np.float32)) == same
    for other in (voxels + 1, voxels.reshape(3, 2, 4)):
        assert records.voxels_sha256(other) != same


def test_a_disk_that_is_full_is_told_as_the_system_tells_it(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "atomic", lambda _: contextlib.nullcontext(Path("/dev/full")))
    with pytest.raises(OSError) as error:
        records.write_shard(harmonised(), tmp_path / "one.tfrecord")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "one.tfrecord"))
