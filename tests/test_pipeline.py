"""The tf.data chain: every slice once an epoch, in an order of the seed alone, from any step on."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from lvseg import pipeline, preprocess, records

SIZE, VOLUMES = 16, 5
READING = pipeline.Reading(SIZE, 1, "none", None, None)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Five volumes of 3 to 7 slices; every pixel of slice s of volume v is 100 v + s, and the mask is s."""
    folder = tmp_path_factory.mktemp("shards")
    files, slices = [], 0
    for number in range(VOLUMES):
        count = 3 + number
        slices += count
        value = (100 * number + np.arange(count, dtype=np.float32))[:, None, None]
        image = np.broadcast_to(value, (count, SIZE, SIZE))
        mask = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None], image.shape)
        volume = records.Harmonised(
            f"p{number}", "1", "s", "d", (), "", (count, SIZE, SIZE), (5.0, 2.0, 2.0),
            preprocess.statistics(tf.constant(np.ascontiguousarray(image))), image, np.ascontiguousarray(mask), None,
        )  # fmt: skip
        files.append(folder / f"{number}.tfrecord")
        records.write_shard(volume, files[-1])
    return files, slices


def batches(shards, step=0, seed=0, batch_size=5, reading=READING, deform=None):
    files, slices = shards
    return pipeline.training_batches(files, slices, reading, seed, batch_size, 8, step, deform)


def values(samples):
    """What each sample's centre slice was filled with."""
    images = pipeline.intensities(samples, "none").numpy()
    return np.rint(images[:, 0, 0, 1]).astype(int).tolist()


def test_an_epoch_has_every_slice_once_and_epochs_differ(shards):
    _, slices = shards
    expected = sorted(100 * number + s for number in range(VOLUMES) for s in range(3 + number))
    stream = [value for samples in batches(shards).take(2 * slices // 5) for value in values(samples)]
    first, second = stream[:slices], stream[slices : 2 * slices]
    assert sorted(first) == sorted(second) == expected
    assert first != second and first != expected


def test_slices_are_shuffled_beyond_the_interleaving_of_patients(shards):
    one_volume = pipeline.training_batches(shards[0][4:], 7, READING, 0, 7, 7, 0).take(6)
    orders = [values(samples) for samples in one_volume]
    assert all(sorted(order) == list(range(400, 407)) for order in orders)
    assert sum(order == sorted(order) for order in orders) <= 1 and len(set(map(tuple, orders))) > 3


def test_the_order_follows_from_the_seed(shards):
    def take(seed):
        return [values(samples) for samples in batches(shards, seed=seed).take(8)]

    assert take(1) == take(1) != take(2)


@pytest.mark.parametrize("step", [1, 4, 5, 7, 23])
def test_from_any_step_the_stream_goes_on_as_if_never_stopped(shards, step):
    unbroken = list(itertools.islice(batches(shards), step, step + 6))
    resumed = list(batches(shards, step).take(6))
    for one, other in zip(unbroken, resumed, strict=True):
        for expected, received in zip(one, other, strict=True):
            np.testing.assert_array_equal(expected, received)


def test_neighbours_and_mask_belong_to_the_slice(shards):
    for samples in batches(shards).take(10):
        images = np.rint(pipeline.intensities(samples, "none").numpy())[:, 3, 5]
        for (below, centre, above), mask in zip(images, samples.mask.numpy()[:, 0, 0, 0], strict=True):
            volume, s = divmod(int(centre), 100)
            last = 3 + volume - 1
            assert mask == s
            assert (below, above) == (100 * volume + max(s - 1, 0), 100 * volume + min(s + 1, last))


def test_normalisation_while_reading_is_that_of_the_scan(shards):
    reading = READING._replace(normalisation="patient")
    for samples in batches(shards, reading=reading).take(5):
        images = pipeline.intensities(samples, "patient").numpy()
        centres = np.rint(pipeline.intensities(samples, "none").numpy()[:, 0, 0, 1]).astype(int)
        low = centres // 100 * 100
        np.testing.assert_allclose(images[:, 0, 0, 1], (centres - low) / (2 + centres // 100), atol=1e-3)


def test_a_volume_is_read_whole_and_in_order(shards):
    files, _ = shards
    (volume,) = pipeline.volume_samples(tf.constant(str(files[2])), READING)
    assert values(volume) == [200, 201, 202, 203, 204]


def test_deformation_on_the_host_gets_seeds_of_the_global_sample(shards):
    def note(stack, mask, seed):
        return tf.fill(tf.shape(stack), tf.cast(seed[1] % 2**32 + 100 * (seed[1] // 2**32), tf.float32)), mask

    for step, samples in enumerate(batches(shards, step=2, deform=note).take(3), start=2):
        np.testing.assert_array_equal(samples.stack[:, 0, 0, 0], 100 * step + np.arange(5))


def test_training_constants_come_from_the_files_given(shards):
    files, _ = shards
    (low, high), (dark, bright) = pipeline.training_bounds(files[:3], SIZE, None)
    assert (low, high) == (0.0, 204.0)
    assert dark == pytest.approx(100.0, abs=0.1) and bright == pytest.approx(103.0, abs=0.1)
