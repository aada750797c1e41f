"""Stacks rendered from maps of tissues: signals by an independent NumPy, and properties of every rendering."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from gpu_kernels import without_gpu_kernel
from scipy import ndimage

from lvseg import draws, intensity, pipeline, prepare, preprocess, records, render
from lvseg.config import Experiment, load_experiment
from lvseg.devices import Cluster
from lvseg.errors import InputError
from lvseg.fit import Fit
from lvseg.keys import check_keys
from lvseg.phantom import physics
from lvseg.phantom.anatomy import Tissue
from lvseg.step import Step

SIZE = 64


def seeds_of(count, step=3):
    return draws.sample_seeds(9, draws.ELASTIC_STREAM, step, tf.range(count))


def body(channels=3):
    """uint8 [1, SIZE, SIZE, channels]: fat around muscle around a liver with a vessel and a spleen, in air."""
    row, column = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    radius = np.hypot(row / 0.8, column)
    tissues = np.full((SIZE, SIZE), Tissue.AIR, np.uint8)
    for limit, tissue in ((0.46, Tissue.SKIN), (0.44, Tissue.FAT), (0.38, Tissue.MUSCLE), (0.33, Tissue.VISCERAL_FAT)):
        tissues[radius < limit] = tissue
    tissues[np.hypot(row, column + 0.12) < 0.16] = Tissue.LIVER
    tissues[np.hypot(row, column + 0.12) < 0.03] = Tissue.HEPATIC_VESSEL
    tissues[np.hypot(row, column - 0.2) < 0.08] = Tissue.SPLEEN
    return np.repeat(tissues[None, ..., None], channels, axis=-1)


def rendered(count, kind="mixture", probability=1.0, low=0.0, high=1.0, stacks=None, maps=None, partial_volume=0.0):
    maps = np.repeat(body(), count, axis=0) if maps is None else maps
    stacks = np.zeros(maps.shape, np.float32) if stacks is None else stacks
    draw = tf.function(
        lambda stacks, maps, seeds: render.contrast(stacks, maps, seeds, kind, probability, low, high, partial_volume),
        autograph=False,
    )
    return draw(tf.constant(stacks), tf.constant(maps), seeds_of(count)).numpy()


def table(seeds):
    """Magnitudes of `render.signals`, in a graph, traced anew: hundreds of samples one by one take long eagerly."""
    found = tf.function(lambda seeds: render.signals(seeds), autograph=False)(seeds).numpy()
    return np.hypot(found[..., 0], found[..., 1])


def only_image(monkeypatch, name):
    monkeypatch.setattr(render, "SHARES", tuple(float(image == name) for image in render.IMAGES))


def test_the_gradient_echo_is_the_phantoms():
    t1 = np.array([0.3, 0.8, 1.6])
    ours = render.spoiled_gradient_echo(tf.constant(t1), 0.005, np.radians(12.0)).numpy()
    np.testing.assert_allclose(ours, physics.spoiled_gradient_echo(t1, 0.005, 12.0), rtol=1e-12)


def test_signals_of_an_average_person_follow_from_the_phantoms_equations(monkeypatch):
    """Without spread and agent, the echo's signal by `lvseg.phantom.physics`, for each sample's own sequence."""
    only_image(monkeypatch, "echo")
    monkeypatch.setattr(render, "CONCENTRATIONS", {})
    monkeypatch.setattr(draws, "normal_of_each", lambda seeds, count: tf.zeros([tf.shape(seeds)[0], count], tf.float64))
    seeds = seeds_of(30)
    ours = table(seeds)
    drawn = draws.uniform_of_each(seeds, draws.SEQUENCE_STREAM, 16).numpy()
    phases = set()
    for own, u in zip(ours, drawn, strict=True):
        field_t = 3.0 if u[0] < 0.5 else 1.5
        at = int(field_t == 3.0)
        if u[4] < 0.7:
            repetition_s, flip = 0.003 * 4.0 ** u[5], 5 + 15 * u[6]
        else:
            repetition_s, flip = 0.09 * (0.25 / 0.09) ** u[5], 50 + 35 * u[6]
        opposed = physics.opposed_phase_echo_s(field_t)
        echo_s = opposed if u[7] < 1 / 3 else 2 * opposed if u[7] < 2 / 3 else 0.0008 + 0.005 * u[8]
        repetition_s = max(repetition_s, echo_s + 0.001)
        phases.add(echo_s / opposed if u[7] < 2 / 3 else 0)
        for tissue in (Tissue.MUSCLE, Tissue.FAT, Tissue.SPLEEN, Tissue.MARROW, Tissue.AIR):
            row = physics.AVERAGE[tissue]
            r2star = 1000.0 / row.t2_ms[at] + row.r2_prime_per_s * field_t / 1.5
            fat = row.fat_percent / 100
            decay = np.exp(-echo_s * r2star)
            water = row.proton_density * (1 - fat) * decay
            lipid = row.proton_density * fat * decay
            signal = water * physics.spoiled_gradient_echo(row.t1_ms[at] / 1000, repetition_s, flip)
            signal += (
                lipid
                * physics.spoiled_gradient_echo(physics.FAT_T1_MS[at] / 1000, repetition_s, flip)
                * physics.fat_phasor(echo_s, field_t)
            )
            assert own[tissue] == pytest.approx(abs(signal), rel=1e-6, abs=1e-12)
    assert phases == {0, 1, 2}


def test_images_show_what_their_names_say(monkeypatch):
    seeds = seeds_of(200)
    found = {}
    for name in render.IMAGES:
        only_image(monkeypatch, name)
        found[name] = table(seeds)
        assert np.isfinite(found[name]).all() and found[name].min() >= 0
        assert (found[name][:, [Tissue.AIR, Tissue.GAS]] == 0).all()
    assert (found["fat"][:, Tissue.FAT] > found["fat"][:, Tissue.LIVER]).all()
    assert (found["water"][:, Tissue.LIVER] > found["water"][:, Tissue.FAT]).all()
    liver, fat = found["fraction"][:, Tissue.LIVER], found["fraction"][:, Tissue.FAT]
    assert 0.005 <= liver.min() < 0.02 and 0.25 < liver.max() <= 0.4 and 0.85 < fat.min() < fat.max() <= 1
    assert (found["fraction"][:, Tissue.LUNG] == 0).all()
    assert (found["suppressed"][:, Tissue.FAT] < found["echo"][:, Tissue.FAT]).mean() > 0.95
    # Fluid is the brightest in T2 and dark in fast T1-weighted images.
    fluid, muscle = (found["t2"][:, tissue] for tissue in (Tissue.SPINAL_FLUID, Tissue.MUSCLE))
    assert (fluid > 1.5 * muscle).all()
    assert (found["water"][:, Tissue.SPINAL_FLUID] < found["water"][:, Tissue.LIVER]).mean() > 0.95


def test_an_agent_brightens_what_it_reaches_and_nothing_else(monkeypatch):
    only_image(monkeypatch, "water")
    seeds = seeds_of(200)
    with_agent = table(seeds)
    monkeypatch.setattr(render, "CONCENTRATIONS", {})
    without = table(seeds)
    gets_it = (with_agent != without).any(axis=1)
    assert 0.4 < gets_it.mean() < 0.6
    assert (with_agent[:, Tissue.FAT] == without[:, Tissue.FAT]).all()
    ratio = with_agent[gets_it] / np.maximum(without[gets_it], 1e-12)
    assert (ratio[:, Tissue.BLOOD] > 1.05).all() and np.median(ratio[:, Tissue.BLOOD]) > 1.4


def test_random_intensities_are_uniform_independent_and_mostly_dark_outside():
    table = tf.function(render._random)(seeds_of(600)).numpy()
    assert table.min() >= 0 and table.max() <= 1.35
    for tissue in (Tissue.LIVER, Tissue.SPLEEN, Tissue.FAT, Tissue.STOMACH):
        assert table[:, tissue].mean() == pytest.approx(0.5, abs=0.05)
        assert table[:, tissue].std() == pytest.approx(np.sqrt(1 / 12), abs=0.03)
    assert abs(np.corrcoef(table[:, Tissue.LIVER], table[:, Tissue.SPLEEN])[0, 1]) < 0.15
    assert (table[:, Tissue.AIR] <= 0.04).mean() == pytest.approx(0.95, abs=0.03)
    near = np.abs(table[:, Tissue.HEPATIC_VESSEL] - table[:, Tissue.LIVER]) <= 0.1
    assert 0.5 < near.mean() < 0.75


@pytest.mark.parametrize("kind", ["physics", "random", "mixture"])
def test_no_rendering_is_empty_or_absurd(kind):
    images = rendered(150, kind)
    inside = body()[0, ..., 0] != Tissue.AIR
    assert np.isfinite(images).all() and images.min() >= 0
    bright = np.percentile(images, 99, axis=(1, 2, 3))
    assert bright.min() > 0.3 and bright.max() < 3
    spread = images[:, inside].std(axis=(1, 2)) / images[:, inside].mean(axis=(1, 2))
    assert spread.min() > 0.05
    assert len({image.tobytes() for image in images}) == len(images)


def test_a_tissue_is_one_intensity_but_for_its_texture():
    images = rendered(40)
    for tissue in (Tissue.LIVER, Tissue.SPLEEN, Tissue.MUSCLE):
        values = images[:, body()[0, ..., 0] == tissue].reshape(len(images), -1)
        assert (values.std(axis=1) <= 0.2 * values.mean(axis=1) + 1e-6).all()
        assert np.median(values.std(axis=1) / values.mean(axis=1)) > 0.005


def test_no_echo_comes_after_the_next_excitation():
    drawn = tf.constant(np.random.default_rng(0).uniform(size=(2000, 16)))
    for field_t in (1.5, 3.0):
        repetition, echo, flip = (
            part.numpy() for part in render._timing(drawn, tf.fill([2000, 1], tf.constant(field_t, tf.float64)))
        )
        assert (repetition >= echo + 0.001).all() and repetition.max() < 0.26
        assert 0.0007 < echo.min() < 0.0025 and echo.max() < 0.006
        assert (flip[repetition > 0.05] > 49).all() and (flip[repetition < 0.05] < 21).all()


def test_pixels_of_two_tissues_send_the_sum_of_both_with_its_phase(monkeypatch):
    """Against the same sum in NumPy: complex signals, shared with the four neighbours, then their magnitude."""
    monkeypatch.setattr(render, "ROUGHEST", {"physics": 0.0, "random": 0.0})
    only_image(monkeypatch, "echo")
    maps = np.random.default_rng(0).integers(0, render.TISSUES, (6, SIZE, SIZE, 2)).astype(np.uint8)
    most = 0.25
    images = rendered(6, "physics", maps=maps, partial_volume=most)
    seeds = seeds_of(6)
    found = render.signals(seeds, [float(name == "echo") for name in render.IMAGES]).numpy() @ [1.0, 1.0j]
    shares = most * draws.uniform_of_each(seeds, draws.CONTRAST_STREAM, 4).numpy()[:, 3]
    assert shares.min() < 0.1 and shares.max() > 0.15
    for image, own, table, share in zip(images, maps, found, shares, strict=True):
        kernel = [share, 1 - 2 * share, share]
        expected = table[own]
        for axis in (0, 1):
            expected = ndimage.convolve1d(expected.real, kernel, axis) + 1j * ndimage.convolve1d(
                expected.imag, kernel, axis
            )
        expected = np.abs(expected)
        np.testing.assert_allclose(image / image.max(), expected / expected.max(), atol=2e-4)


def test_water_and_fat_of_opposite_phase_cancel_at_their_border(monkeypatch):
    monkeypatch.setattr(render, "ROUGHEST", {"physics": 0.0, "random": 0.0})
    only_image(monkeypatch, "echo")
    maps = np.full((60, SIZE, SIZE, 1), Tissue.FAT, np.uint8)
    maps[:, :, SIZE // 2 :] = Tissue.MUSCLE
    opposed = draws.uniform_of_each(seeds_of(60), draws.SEQUENCE_STREAM, 16).numpy()[:, 7] < 1 / 3
    shares = draws.uniform_of_each(seeds_of(60), draws.CONTRAST_STREAM, 4).numpy()[:, 3]
    strong = shares > 0.6
    rows = rendered(60, "physics", maps=maps, partial_volume=0.25)[:, SIZE // 2, :, 0]
    darkest = rows[:, SIZE // 2 - 1 : SIZE // 2 + 1].min(axis=1)
    sides = np.minimum(rows[:, 2], rows[:, -3])
    assert (opposed & strong).sum() > 3 and (darkest < 0.9 * sides)[opposed & strong].all()
    in_phase = draws.uniform_of_each(seeds_of(60), draws.SEQUENCE_STREAM, 16).numpy()[:, 7]
    in_phase = (in_phase > 1 / 3) & (in_phase < 2 / 3)
    assert in_phase.sum() > 3 and (darkest > 0.9 * sides)[in_phase].all()


def test_samples_without_a_map_or_by_chance_stay_to_the_bit():
    count = 300
    maps = np.repeat(body(), count, axis=0)
    maps[::3] = Tissue.AIR
    stacks = np.random.default_rng(0).normal(size=maps.shape).astype(np.float32)
    after = rendered(count, probability=0.5, stacks=stacks, maps=maps)
    same = (after == stacks).all(axis=(1, 2, 3))
    assert same[::3].all()
    others = np.delete(same, np.arange(0, count, 3))
    assert others.mean() == pytest.approx(0.5, abs=4 * np.sqrt(0.25 / len(others)))


def test_a_fat_fraction_is_in_percent_whatever_the_range_and_of_any_fatness():
    images = rendered(120, "fraction", low=-7.0, high=3.0)
    tissues = body()[0, ..., 0]
    means = {tissue: images[:, tissues == tissue].mean(axis=(1, 2)) for tissue in np.unique(tissues)}
    assert np.abs(means[Tissue.AIR]).max() == 0
    assert np.all((means[Tissue.FAT] > 80) & (means[Tissue.FAT] <= 100))
    assert np.all((means[Tissue.SPLEEN] >= 0) & (means[Tissue.SPLEEN] < 3))
    liver = np.sort(means[Tissue.LIVER])
    # Log-uniform from 0.5 to 40 %.
    expected = 0.5 * 80.0 ** ((np.arange(120) + 0.5) / 120)
    assert np.abs(np.log(liver / expected)).max() < 0.6
    assert images.max() <= 100


def test_low_and_high_are_the_ends_of_the_range():
    unit, scaled = rendered(5), rendered(5, low=100.0, high=900.0)
    np.testing.assert_allclose(scaled, 100 + 800 * unit, rtol=1e-5)


def test_a_body_smaller_than_the_pixels_looked_at_is_not_blown_up():
    maps = np.zeros((40, SIZE, SIZE, 3), np.uint8)
    maps[:, 3:6, 3:7] = Tissue.MUSCLE
    assert rendered(40, "physics", maps=maps).max() < 3


def test_a_sample_is_rendered_the_same_whatever_the_batch_and_the_compiler():
    maps, seeds = tf.constant(np.repeat(body(), 4, axis=0)), seeds_of(4)
    stacks = tf.zeros(maps.shape, tf.float32)

    def draw(stacks, maps, seeds):
        return render.contrast(stacks, maps, seeds, "mixture", 1.0, 0.0, 1.0)

    eager = draw(stacks, maps, seeds).numpy()
    np.testing.assert_array_equal(draw(stacks, maps, seeds), eager)
    for place in range(4):
        one = slice(place, place + 1)
        np.testing.assert_allclose(draw(stacks[one], maps[one], seeds[one]), eager[one], rtol=1e-5, atol=1e-6)
    for traced in (tf.function(draw), tf.function(draw, jit_compile=True)):
        np.testing.assert_allclose(traced(stacks, maps, seeds), eager, rtol=1e-5, atol=1e-5)
    assert np.abs(draw(stacks, maps, seeds_of(4, step=4)) - eager).max() > 0.1


@pytest.mark.parametrize("batch", [1, 2, None])
def test_every_op_has_a_kernel_for_gpus(batch):
    @tf.function
    def draw(stacks, maps, seeds):
        return render.contrast(stacks, maps, seeds, "mixture", 0.9, 0.0, 1.0)

    traced = draw.get_concrete_function(
        tf.TensorSpec([batch, 64, 64, 3]), tf.TensorSpec([batch, 64, 64, 3], tf.uint8),
        tf.TensorSpec([batch, 2], tf.int64),
    )  # fmt: skip
    assert without_gpu_kernel(traced) == []
    assert traced.structured_outputs.shape.as_list() == [batch, 64, 64, 3]


def test_maps_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="Expected maps of the stacks' shape"):
        render.contrast(
            tf.zeros([1, 64, 64, 3]), tf.zeros([1, 64, 64, 1], tf.uint8), seeds_of(1), "random", 1.0, 0.0, 1.0
        )


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A simulated volume with its map of tissues, and a real one without: (files, maps by file)."""
    folder = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(2)
    files, maps = [], []
    for number, has_map in enumerate((True, False)):
        tissues = np.repeat(body(1)[..., 0], 5, axis=0) if has_map else None
        if has_map:
            tissues[:, 3, 3] = np.arange(5)  # every slice is another
        image = random.uniform(0, 100, (5, SIZE, SIZE)).astype(np.float32)
        mask = (tissues == Tissue.LIVER).astype(np.uint8) if has_map else np.ones((5, SIZE, SIZE), np.uint8)
        volume = records.Harmonised(
            f"p{number}", "1", "s", "d", (), "", (5, SIZE, SIZE), (5.0, 2.0, 2.0),
            preprocess.statistics(tf.constant(image)), image, mask, tissues,
        )  # fmt: skip
        files.append(folder / f"{number}.tfrecord")
        records.write_shard(volume, files[-1])
        maps.append(np.zeros((5, SIZE, SIZE), np.uint8) if tissues is None else tissues)
    return files, maps


@pytest.mark.parametrize("batch_size", [1, 4])
def test_maps_travel_with_their_slices_and_neighbours(shards, batch_size):
    files, maps = shards
    reading = pipeline.Reading(SIZE, 1, "none", None, None, tissues=True)
    seen = 0
    for samples in pipeline.training_batches(files, 10, reading, 0, batch_size, 8, 0).take(20 // batch_size):
        for (file, own), tissues in zip(samples.source.numpy(), samples.tissues.numpy(), strict=True):
            around = np.clip(np.arange(own - 1, own + 2), 0, 4)
            np.testing.assert_array_equal(tissues, maps[file][around])
            seen += 1
    assert seen == 20
    (volume,) = pipeline.volume_samples([files[0]], reading)
    np.testing.assert_array_equal(volume.tissues[:, 1], maps[0])
    (volume,) = pipeline.volume_samples([files[0]], reading._replace(tissues=False))
    assert volume.tissues.shape == (5, 0, SIZE, SIZE)


def test_maps_are_deformed_with_their_mask_and_then_rendered(shards, monkeypatch):
    files, _ = shards
    experiment = check_keys(
        Experiment,
        {
            "task": "volume", "name": "rendered",
            "data": {"datasets": ["a"], "size": SIZE, "neighbours": 1},
            "model": {"width": 2, "encoder": None},
            "augment": {"elastic": {"sigma_px": 3.0}, "rotate": {}, "flip": {"columns": 0.5},
                        "contrast": {"kind": "random"}, "noise": {"kind": "rician"}},
            "train": {"batch_size": 8, "steps": 5, "validate_every": 5, "checkpoint_every": 5},
        },
        "test",
    )  # fmt: skip
    train = Step(experiment, Cluster(tf.distribute.get_strategy(), 0, 1, 1), 2, 0.0, 100.0)
    reading = pipeline.Reading(SIZE, 1, "none", None, None, tissues=True)
    samples = next(iter(pipeline.training_batches(files, 10, reading, 0, 8, 8, 0)))
    seeds = seeds_of(8)
    stack, mask, tissues = train.move(tf.cast(samples.stack, tf.float32), samples.mask, samples.tissues, seeds)
    is_simulated = samples.source[:, 0].numpy() == 0
    assert 0 < is_simulated.sum() < 8
    np.testing.assert_array_equal(
        mask[..., 0].numpy()[is_simulated], (tissues[:, 1] == Tissue.LIVER).numpy()[is_simulated]
    )
    assert (mask != samples.mask).numpy().any()
    stacks = pipeline.intensities(samples._replace(stack=stack), "none")
    together, contrast = [], render.contrast

    def recording(stacks, *rest):
        together.append(stacks.shape[0])
        return contrast(stacks, *rest)

    monkeypatch.setattr(render, "contrast", recording)
    shown = train.change(stacks, tissues, seeds).numpy()
    at_once = tf.function(train._change, autograph=False, jit_compile=True)  # as a GPU does it
    np.testing.assert_allclose(shown, at_once(stacks, tissues, seeds), atol=1e-3)
    assert together == ([1, 8] if draws.one_by_one() else [8, 8])
    plain = intensity.intensity(stacks, seeds, {"noise": experiment.augment.noise.model_dump()}, 0.0, 100.0).numpy()
    np.testing.assert_allclose(shown[~is_simulated], plain[~is_simulated], atol=1e-2)  # a scan's own image
    assert (np.abs(shown[is_simulated] - plain[is_simulated]).mean(axis=(1, 2, 3)) > 5).all()
    for _ in range(2):
        train(samples)
    assert int(train.number) == 2 and int(train.bad_step) == 0


def test_contrast_needs_maps_and_deformation_on_the_device(in_study):
    with pytest.raises(InputError, match=r"elastic\.where=device with contrast"):
        load_experiment(Path("experiment.yaml"), ["augment.contrast={}", "augment.elastic={where: host}"])
    experiment = load_experiment(Path("experiment.yaml"), ["augment.contrast={}", "name=none"])
    sets = prepare.prepare(experiment.data, jobs=1)
    split = prepare.split(experiment.data, sets)
    with pytest.raises(InputError, match=r"Expected a map of tissues in at least one .* received cards without"):
        Fit(experiment, sets, split, Path("runs/none"), Cluster(tf.distribute.get_strategy(), 0, 1, 1))
