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


def joined(lists):
    return [*itertools.chain.from_iterable(lists)]


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
    (volume,) = pipeline.volume_samples([files[2]], READING)
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


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Forty volumes of 1 to 3 slices of noise, with masks of up to 32 classes."""
    folder = tmp_path_factory.mktemp("many")
    random, files, counts = np.random.default_rng(0), [], []
    for number in range(40):
        counts.append(1 + number % 3)
        image = random.integers(0, 2**16, (counts[-1], SIZE, SIZE)).astype(np.float32)
        image[0, 0, 0], image[0, 0, 1] = 0, 65535  # slope 1 and intercept 0
        image[:, 8, 8] = 1000 * number + np.arange(counts[-1])  # tells the slice
        mask = random.integers(0, 32, image.shape).astype(np.uint8)
        volume = records.Harmonised(
            f"p{number}", "1", "s", "d", (), "", image.shape, (5.0, 2.0, 2.0),
            preprocess.statistics(tf.constant(image)), image, mask, None,
        )  # fmt: skip
        files.append(folder / f"{number:02d}.tfrecord")
        records.write_shard(volume, files[-1])
    return files, counts


def drawn(many, neighbours=0, batch_size=1, seed=0, step=0, shuffle=8):
    files, counts = many
    reading = READING._replace(neighbours=neighbours)
    return pipeline.training_batches(files, sum(counts), reading, seed, batch_size, shuffle, step)


def numbers(batch, neighbours=0):
    """1000 times the volume plus the slice, of each sample of a batch."""
    return batch.stack.numpy()[:, neighbours, 8, 8].astype(int).tolist()


def test_more_volumes_than_are_shuffled_together_give_every_slice_once_an_epoch(many):
    _, counts = many
    every = [1000 * number + s for number, count in enumerate(counts) for s in range(count)]
    stream = [number for batch in drawn(many).take(2 * len(every)) for number in numbers(batch)]
    epochs = stream[: len(every)], stream[len(every) :]
    for epoch in epochs:
        assert sorted(epoch) == every
    together = [{number // 1000 for number in epoch[:16]} for epoch in epochs]
    assert together[0] != together[1]  # other patients meet in every epoch
    assert all(len(patients) >= 6 for patients in together)


@pytest.mark.parametrize("step", [1, 3, 19, 27])
def test_with_many_volumes_too_the_stream_goes_on_as_if_never_stopped(many, step):
    unbroken = [numbers(batch) for batch in drawn(many, batch_size=3).take(step + 8)]
    assert [numbers(batch) for batch in drawn(many, batch_size=3, step=step).take(8)] == unbroken[step:]


def test_the_stream_does_not_depend_on_the_batch_size(many):
    alone = [number for batch in drawn(many).take(60) for number in numbers(batch)]
    assert [number for batch in drawn(many, batch_size=4).take(15) for number in numbers(batch)] == alone


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("neighbours", [0, 1, 4])
def test_stacks_and_masks_are_those_of_the_volume_bit_by_bit(many, neighbours, batch_size):
    files, counts = many
    read = [records.decode(next(iter(tf.data.TFRecordDataset(str(file)))), SIZE) for file in files]
    expected = [preprocess.stack_neighbours(volume.image, neighbours).numpy() for volume in read]
    for batch in drawn(many, neighbours, batch_size).take(sum(counts) // batch_size):
        assert batch.stack.shape == (batch_size, 2 * neighbours + 1, SIZE, SIZE) and batch.stack.dtype == tf.uint16
        for stack, mask, number in zip(batch.stack, batch.mask, numbers(batch, neighbours), strict=True):
            volume, s = divmod(number, 1000)
            np.testing.assert_array_equal(np.moveaxis(stack.numpy(), 0, -1), expected[volume][s])
            np.testing.assert_array_equal(mask[..., 0], read[volume].mask[s])


def test_each_slice_of_a_stack_is_normalised_by_its_own_bounds(many):
    files, counts = many
    reading = READING._replace(normalisation="slice")
    for batch in pipeline.training_batches(files, sum(counts), reading, 0, 4, 8, 0).take(10):
        slices = pipeline.intensities(batch, "slice").numpy()
        np.testing.assert_allclose(slices.min(axis=(1, 2)), 0.0, atol=1e-4)
        np.testing.assert_allclose(slices.max(axis=(1, 2)), 1.0, atol=1e-4)


def test_volumes_are_read_no_further_ahead_than_promised(many, monkeypatch):
    """Memory: volumes are open, next, or hold a slice that waits to be shuffled, however many there are."""
    _, counts = many
    read, decode = [], records.decode

    def noting(record, size, patients=None, tissues=False):
        def note(image):
            read.append(1)
            return image

        slices = decode(record, size, patients, tissues)
        image = tf.ensure_shape(tf.numpy_function(note, [slices.image], tf.uint16), [None, SIZE, SIZE])
        return slices._replace(image=image)

    monkeypatch.setattr(records, "decode", noting)
    together = pipeline.volumes_together(len(counts), sum(counts), 8)
    assert together == pipeline.MIXED_VOLUMES == 8
    left, most = list(counts), 0
    for batch in drawn(many).take(sum(counts)):
        left[numbers(batch)[0] // 1000] -= 1
        most = max(most, len(read) - left.count(0))
    assert not any(left)
    # Besides, those being read, and those whose last slices wait in the queue of batches.
    assert together <= most <= 3 * together + 2 * pipeline.READING_THREADS + pipeline.WAITING_SLICES


def test_how_many_volumes_are_shuffled_together():
    assert pipeline.volumes_together(100, 2800, 512) == 19  # 512 slices are those of 18.3 volumes of 28
    assert pipeline.volumes_together(100, 32000, 512) == 8  # never fewer patients, however many slices each has
    assert pipeline.volumes_together(5, 140, 512) == 5


@pytest.mark.parametrize("workers, replicas", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("step", [0, 3])
def test_several_machines_and_devices_share_the_batches_of_one(shards, workers, replicas, step):
    """Each machine's part, device by device, put together again is what one machine draws."""
    whole = [values(samples) for samples in batches(shards, step, batch_size=4).take(6)]
    parts = []
    for worker in range(workers):
        share = pipeline.Share(worker, workers, replicas)
        files, slices = shards
        stream = pipeline.training_batches(files, slices, READING, 0, 4, 8, step, share=share)
        drawn = [values(samples) for samples in stream.take(6 * replicas)]
        parts.append([joined(drawn[replicas * n : replicas * (n + 1)]) for n in range(6)])
    assert [joined(shares) for shares in zip(*parts, strict=True)] == whole


def test_a_sample_names_its_file_and_slice(shards):
    for step in (0, 11):
        for samples in batches(shards, step).take(8):
            for value, (file, own) in zip(values(samples), samples.source.numpy(), strict=True):
                assert value == 100 * file + own
    (volume,) = pipeline.volume_samples([shards[0][2]], READING)
    assert volume.source.numpy()[:, 1].tolist() == list(range(5))
