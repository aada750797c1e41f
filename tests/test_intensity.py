import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import scipy.stats
import tensorflow as tf
from gpu_kernels import nodes, without_gpu_kernel

from lvseg import augment, draws, intensity, render

LOW, HIGH = 100.0, 900.0
ALL = {
    "table": {"probability": 1.0},
    "arms": {"probability": 1.0},
    "thickness": {"max_share": 0.3, "probability": 1.0},
    "resolution": {"max_factor": 2.5, "probability": 1.0},
    "blur": {"max_sigma_px": 2.0, "probability": 1.0},
    "bias_field": {"sigma": 0.3, "grid": 4, "probability": 1.0},
    "ghosts": {"max_share": 0.2, "probability": 1.0},
    "gamma": {"max_gamma": 1.5, "probability": 1.0},
    "noise": {"max_sigma_percent": 5.0, "probability": 1.0},
    "field_of_view": {"max_share": 0.4, "probability": 1.0},
}
OBJECTS = ("table", "arms")  # which appear where slices are dark


def only(*names: str) -> dict[str, dict | None]:
    """The settings as an experiment has them, all off but these."""
    return {name: keys if name in names else None for name, keys in ALL.items()}


def seeds_of(count: int) -> tf.Tensor:
    return draws.sample_seeds(4, draws.ELASTIC_STREAM, 17, tf.range(count))


def changed(stacks: np.ndarray, settings: dict) -> np.ndarray:
    """`intensity.intensity` in a graph: hundreds of samples one by one take long eagerly."""
    traced = tf.function(lambda stacks, seeds: intensity.intensity(stacks, seeds, settings, LOW, HIGH))
    return traced(tf.constant(stacks), seeds_of(len(stacks))).numpy()


def slices(batch: int, size: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """float32 [batch, size, size, channels]: blurred noise from a little below LOW to a little above HIGH."""
    noise = np.random.default_rng(seed).normal(size=(batch, size, size, channels))
    smooth = scipy.ndimage.gaussian_filter(noise, 2.0, axes=(1, 2))
    return (LOW + (HIGH - LOW) * (1.2 * (smooth - smooth.min()) / np.ptp(smooth) - 0.1)).astype(np.float32)


def assert_uniform(drawn: np.ndarray, lowest: float, highest: float) -> None:
    """Kolmogorov and Smirnov's test, and nothing outside."""
    assert lowest <= np.min(drawn) and np.max(drawn) <= highest
    assert scipy.stats.kstest((drawn - lowest) / (highest - lowest), "uniform").pvalue > 0.01


@pytest.mark.parametrize("settings", [{}, only()])
def test_off_is_untouched(settings):
    stacks = tf.constant(slices(2, 16))
    assert intensity.intensity(stacks, seeds_of(2), settings, LOW, HIGH) is stacks


@pytest.mark.parametrize("name", ALL)
def test_probability_is_the_share_that_changes_and_the_others_stay_to_the_bit(name):
    count = 400
    stacks = np.full((count, 32, 32, 3), LOW, np.float32) if name in OBJECTS else slices(count, 8)
    after = changed(stacks, {name: ALL[name] | {"probability": 0.3}})
    assert after.dtype == np.float32
    share = (after != stacks).any(axis=(1, 2, 3)).mean()
    assert abs(share - 0.3) < 4 * np.sqrt(0.21 / count)


@pytest.mark.parametrize("name", ALL)
def test_a_sample_changes_the_same_whatever_the_batch(name):
    dark = 1e-2 if name in OBJECTS else 1.0
    stacks, seeds = tf.constant(LOW + dark * (slices(4, 24) - LOW)), seeds_of(4)
    together = intensity.intensity(stacks, seeds, only(name), LOW, HIGH)
    backwards = intensity.intensity(stacks[::-1], seeds[::-1], only(name), LOW, HIGH)
    rtol = 1e-5 if name in intensity.SMOOTHING else 1e-6  # how a product of matrices is summed up depends on its size
    np.testing.assert_allclose(backwards[::-1], together, rtol=rtol)
    for place in range(4):
        one = slice(place, place + 1)
        alone = intensity.intensity(stacks[one], seeds[one], only(name), LOW, HIGH)
        np.testing.assert_allclose(alone, together[one], rtol=rtol)
    same = tf.constant(np.broadcast_to(LOW + dark * (slices(1, 24) - LOW), (4, 24, 24, 3)))
    assert len({each.tobytes() for each in intensity.intensity(same, seeds, only(name), LOW, HIGH).numpy()}) == 4


@pytest.mark.parametrize("is_chosen", [False, True])
def test_what_a_batch_of_one_does_not_undergo_is_not_computed(is_chosen):
    calls, stacks = [], tf.constant(slices(1, 8))

    def changed() -> tf.Tensor:
        tf.py_function(lambda: calls.append(None), [], [])
        return stacks + 1.0

    traced = tf.function(lambda chosen: draws.where(chosen, changed, stacks), autograph=False)
    np.testing.assert_array_equal(traced(tf.constant([is_chosen])), stacks + float(is_chosen))
    assert len(calls) == is_chosen


@pytest.mark.parametrize("name", ["thickness", "bias_field", "ghosts", "gamma", "noise", "field_of_view"])
def test_none_changes_the_draw_of_another(name):
    """With those before it on, it does what it does alone to what they have made."""
    stacks = slices(3, 32)
    before = list(ALL)[: list(ALL).index(name)]
    so_far = changed(stacks, only(*before))
    with_it = changed(stacks, only(*before, name))
    alone = changed(so_far, only(name))
    np.testing.assert_allclose(with_it, alone, rtol=1e-5, atol=1e-3)
    assert np.abs(with_it - so_far).max() > 1.0


def test_no_two_draws_of_a_sample_share_a_stream(monkeypatch):
    used = [draws.ELASTIC_STREAM, draws.SHUFFLE_STREAM]
    of_stream = draws.of_stream

    def recording(seeds: tf.Tensor, stream: int) -> tf.Tensor:
        used.append(stream)
        return of_stream(seeds, stream)

    monkeypatch.setattr(draws, "of_stream", recording)
    intensity.intensity(tf.zeros([2, 8, 8, 1]), seeds_of(2), ALL, LOW, HIGH)
    spatial = {"flip": {"rows": 0.5, "columns": 0.5}, "rotate": {"max_degrees": 9.0, "probability": 0.5}}
    spatial |= {"scale": {"max_factor": 1.2, "probability": 0.5}}
    augment.spatial(tf.zeros([2, 8, 8, 1]), tf.zeros([2, 8, 8, 1], tf.uint8), seeds_of(2), spatial)
    maps = tf.zeros([2, 8, 8, 1], tf.uint8)
    render.contrast(tf.zeros([2, 8, 8, 1]), maps, seeds_of(2), "mixture", 1.0, LOW, HIGH)
    assert len(set(used)) == len(used) == 2 + (3 + 1 + 2 + 2 + 1 + 2 + 2 + 2 + 1) + 3 + 6
    # Dropout's layers count on from their own, and there are fewer than a thousand of them.
    assert not any(draws.DROPOUT_STREAM <= stream < draws.DROPOUT_STREAM + 1000 for stream in used)


def test_all_are_done_in_the_stated_order():
    stacks = slices(2, 32)
    one_by_one = stacks
    for name in ALL:
        one_by_one = changed(one_by_one, only(name))
    np.testing.assert_allclose(changed(stacks, dict(reversed(ALL.items()))), one_by_one, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("size", [64, 45])
def test_coarser_pixels_have_no_frequency_above_their_nyquist(size):
    stacks = np.random.default_rng(1).normal(500, 100, (3, size, size, 2)).astype(np.float32)
    factors = np.array([1.0, 1.6, 2.5])
    after = intensity.smooth(tf.constant(stacks), tf.constant(factors)).numpy().astype(np.float64)
    spectra = [scipy.fft.dctn(each, axes=(1, 2), norm="ortho") for each in (stacks.astype(np.float64), after)]
    for factor, before, left in zip(factors, *spectra, strict=True):
        share = factor * np.arange(size) / size  # 1: half a period a large pixel
        above, kept = share >= 1, share <= 1 - intensity.EDGE
        assert above.any() == (factor > 1)
        # To a millionth of the mean's coefficient, 500 times the size.
        least = 5e-4 * size
        assert np.abs(left[above]).max(initial=0) < least and np.abs(left[:, above]).max(initial=0) < least
        np.testing.assert_allclose(left[np.ix_(kept, kept)], before[np.ix_(kept, kept)], atol=least)
        assert (np.abs(left) <= np.abs(before) + least).all()
        assert (left * before >= -least * np.abs(before)).all()
    np.testing.assert_allclose(after.mean(axis=(1, 2)), stacks.mean(axis=(1, 2), dtype=np.float64), rtol=1e-6)


def test_coarser_pixels_lose_a_fine_wave_and_keep_a_coarse_one():
    """Pixels of twice the size show waves of up to 32 half periods in 64 pixels, the last quarter of those damped."""
    size, column = 64, np.arange(64) + 0.5
    for half_periods, left in [(20, 1.0), (40, 0.0)]:
        wave = np.broadcast_to(np.cos(np.pi * half_periods * column / size), (1, size, size))[..., None]
        after = intensity.smooth(tf.constant(wave.astype(np.float32)), tf.constant([2.0], tf.float64))
        np.testing.assert_allclose(after, left * wave, atol=1e-5)
        after = intensity.smooth(tf.constant(wave.swapaxes(1, 2).astype(np.float32)), tf.constant([2.0], tf.float64))
        np.testing.assert_allclose(after, left * wave.swapaxes(1, 2), atol=1e-5)


def test_coarser_pixels_neither_wrap_around_nor_darken_the_edges():
    flat = np.full((1, 48, 48, 1), 700.0, np.float32)
    factor = tf.constant([3.0], tf.float64)
    np.testing.assert_allclose(intensity.smooth(tf.constant(flat), factor), flat, rtol=1e-6)
    flat[:, :, 40:] = 0.0
    assert np.abs(intensity.smooth(tf.constant(flat), factor)[:, :, :8] - 700.0).max() < 10  # ringing, 1 %


def test_resolutions_are_log_uniform():
    size, count = 64, 200
    stacks = np.zeros((count, size, size, 1), np.float32)
    stacks[:, 0] = 1.0  # all row frequencies; how much of each is left is the window
    left = [scipy.fft.dct(each[:, size // 2, 0]) for each in (*changed(stacks, only("resolution")), stacks[0])]
    window = np.array(left[:-1]) / left[-1]
    factors = size * (1 - intensity.EDGE / 2) / (window.sum(axis=1) - 0.5)  # the trapezoidal rule of its integral
    assert_uniform(np.log(factors), -0.01, np.log(2.5) + 0.01)


def test_bias_field_is_positive_smooth_and_alike_in_all_channels():
    size = 3 * 21 + 1  # a control point every 21 pixels
    stacks = slices(60, size)
    stacks[np.abs(stacks - LOW) < 20] = LOW + 20  # where a factor can be told
    factors = (changed(stacks, only("bias_field")) - LOW) / (stacks - LOW)
    assert factors.min() > 0
    np.testing.assert_allclose(factors[..., 1:], factors[..., :1] + np.zeros(2), rtol=1e-4)
    logs = np.log(factors[..., 0].astype(np.float64))
    control = logs[:, ::21, ::21]
    assert abs(control.std() - 0.3) < 4 * 0.3 / np.sqrt(2 * control.size)
    assert abs(control.mean()) < 4 * 0.3 / np.sqrt(control.size)
    # A cubic spline through numbers of this size turns by no more than this from pixel to pixel.
    assert np.abs(np.diff(logs, axis=1)).max() < 0.3 * 4 * 3 / 21
    assert np.abs(np.diff(logs, 2, axis=1)).max() < 0.3 * 4 * 12 / 21**2
    # Dark stays dark: the coils weigh signal, and there is none.
    dark = np.full((2, size, size, 1), LOW, np.float32)
    np.testing.assert_array_equal(changed(dark, only("bias_field")), dark)


def test_gamma_rises_everywhere_keeps_the_ends_and_is_log_uniform():
    count = 300
    shares = np.array([-0.5, -0.1, 0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5], np.float32)
    stacks = np.broadcast_to(LOW + (HIGH - LOW) * shares, (count, 9, 9)).astype(np.float32)[..., None]
    after = (changed(stacks, only("gamma"))[:, 0, :, 0].astype(np.float64) - LOW) / (HIGH - LOW)
    assert (np.diff(after, axis=1) > 0).all()
    np.testing.assert_allclose(after[:, [2, 7]], np.broadcast_to([0.0, 1.0], (count, 2)), atol=1e-6)
    gamma = np.log(after[:, 5]) / np.log(0.5)
    np.testing.assert_allclose(after[:, [3, 4, 6]], shares[[3, 4, 6]] ** gamma[:, None], rtol=1e-4)
    assert_uniform(np.log(gamma), -np.log(1.5) - 1e-4, np.log(1.5) + 1e-4)


def test_many_bits_are_random_and_the_same_everywhere():
    count = 40_000
    seeds = seeds_of(4)
    bits = draws.many_bits(seeds, count).numpy()
    assert bits.shape == (4, count) and bits.dtype == np.uint32
    ones = np.unpackbits(bits.view(np.uint8).reshape(4, count, 4), axis=2, bitorder="little")
    assert np.abs(ones.mean(axis=1) - 0.5).max() < 4.5 * 0.5 / np.sqrt(count)  # each of 32 bits of each sample
    flips = ones[:, 1:] ^ ones[:, :-1]
    assert np.abs(flips.mean(axis=1) - 0.5).max() < 4.5 * 0.5 / np.sqrt(count)  # neighbours share nothing
    between = (ones[:1] ^ ones[1:]).mean(axis=1)
    assert np.abs(between - 0.5).max() < 4.5 * 0.5 / np.sqrt(count)  # nor do samples
    for byte in range(4):
        found = np.bincount((bits[0] >> (8 * byte)) & 255, minlength=256)
        assert scipy.stats.chisquare(found).pvalue > 1e-3
    assert len(np.unique(bits[0])) > count - 5
    for traced in (tf.function(draws.many_bits), tf.function(draws.many_bits, jit_compile=True)):
        np.testing.assert_array_equal(traced(seeds, count), bits)
    np.testing.assert_array_equal(draws.many_bits(seeds[2:3], count)[0], bits[2])


def test_pairs_are_normal_and_independent():
    first, second = (part.numpy().astype(np.float64) for part in draws.normal_pairs(seeds_of(3), 60_000))
    for part in (first, second):
        assert scipy.stats.kstest(part.ravel(), "norm").pvalue > 0.01
        assert 4.0 < np.abs(part).max() < 5.0
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 4 / np.sqrt(first.size)
    angle = np.arctan2(second, first).ravel()
    assert scipy.stats.kstest(angle, "uniform", (-np.pi, 2 * np.pi)).pvalue > 0.01
    assert scipy.stats.kstest((first**2 + second**2).ravel() / 2, "expon").pvalue > 0.01


def test_noise_is_normal_independent_and_up_to_its_sigma():
    count = 200
    stacks = slices(count, 16)
    noise = (changed(stacks, only("noise")) - stacks).astype(np.float64) / (HIGH - LOW)
    sigma = noise.std(axis=(1, 2, 3))
    pixels = noise[0].size
    assert sigma.max() < 0.05 * (1 + 4 / np.sqrt(2 * pixels))
    assert_uniform(np.minimum(sigma, 0.05), 0.0, 0.05)
    standard = (noise / sigma[:, None, None, None])[sigma > 1e-3]
    assert abs(standard.mean()) < 4 / np.sqrt(standard.size)
    assert scipy.stats.kstest(standard.ravel(), "norm").pvalue > 0.01
    for axis in (1, 2, 3):  # neighbours have nothing in common, channels among them
        first, second = (np.take(standard, range(*ends), axis).ravel() for ends in ((0, 2), (1, 3)))
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(first.size)
    assert np.abs(np.corrcoef(standard.reshape(len(standard), -1)) - np.eye(len(standard))).max() < 6 / np.sqrt(pixels)
    halves = standard.reshape(len(standard), 2, -1)  # the two numbers that come of one pair
    assert abs(np.corrcoef(halves[:, 0].ravel(), halves[:, 1].ravel())[0, 1]) < 4 / np.sqrt(halves[:, 0].size)


def test_noise_fills_slices_of_an_odd_number_of_pixels():
    stacks = np.zeros((2, 15, 15, 1), np.float32)
    noise = changed(stacks, only("noise"))
    assert noise.shape == stacks.shape
    assert all(len(np.unique(each)) > 220 for each in noise)


def test_blur_is_scipys_gaussian():
    stacks = slices(2, 48).astype(np.float64)
    sigma = np.array([0.8, 2.0])
    after = intensity.smooth(tf.constant(stacks, tf.float32), sigma_px=tf.constant(sigma)).numpy()
    for own, before, wide in zip(after, stacks, sigma, strict=True):
        reference = scipy.ndimage.gaussian_filter(before, wide, mode="reflect", axes=(0, 1), truncate=8)
        np.testing.assert_allclose(own, reference, atol=2e-3 * (HIGH - LOW))


def test_a_small_blur_does_not_ring():
    """Every frequency is damped as a Gaussian damps it, the finest too: a share of 0.9 of the Nyquist frequency."""
    size, sigma, half_periods = 50, 0.2, 45
    wave = np.broadcast_to(np.cos(np.pi * half_periods * (np.arange(size) + 0.5) / size), (1, size, size))[..., None]
    after = intensity.smooth(tf.constant(wave.astype(np.float32)), sigma_px=tf.constant([sigma], tf.float64))
    np.testing.assert_allclose(after, np.exp(-0.5 * (sigma * np.pi * 0.9) ** 2) * wave, atol=1e-5)


def test_thicker_slices_are_means_with_their_neighbours():
    stacks = slices(60, 8, channels=4)
    after = changed(stacks, only("thickness")).astype(np.float64)
    padded = np.concatenate([stacks[..., :1], stacks, stacks[..., -1:]], axis=-1).astype(np.float64)
    curvature = padded[..., 2:] + padded[..., :-2] - 2 * padded[..., 1:-1]
    share = ((after - stacks) * curvature).sum(axis=(1, 2, 3)) / (curvature**2).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(after, stacks + share[:, None, None, None] * curvature, atol=1e-2)
    assert_uniform(np.clip(share, 0, 0.3), 0.0, 0.3)


def test_ghosts_are_two_shifted_copies_along_one_axis():
    size, count = 32, 40
    stacks = np.full((count, size, size, 2), LOW, np.float32)
    stacks[:, 10, 13] = HIGH
    after = (changed(stacks, only("ghosts")) - LOW) / (HIGH - LOW)
    np.testing.assert_allclose(after.sum(axis=(1, 2)), 1.0, rtol=1e-5)  # what is repeated is missing in its place
    axes = set()
    for each in after[..., 0]:
        share = 1 - each[10, 13]
        places = np.argwhere((each > 1e-6) & (each < each.max()))
        axis = int((places[:, 0] == 10).all())
        assert (places[:, 1 - axis] == (10, 13)[1 - axis]).all()
        shifts = sorted(int(shift) for shift in (places[:, axis] - (10, 13)[axis]) % size)
        assert sum(shifts) == size or len(shifts) == 1
        np.testing.assert_allclose(each[tuple(places.T)].sum(), share, rtol=1e-4)
        assert 0 < share < 0.2
        axes.add(axis)
    assert axes == {0, 1}


def test_outside_the_field_of_view_is_dark_and_inside_untouched():
    stacks = np.full((100, 40, 40, 2), HIGH, np.float32)
    after = changed(stacks, only("field_of_view"))
    assert set(np.unique(after)) == {LOW, HIGH}
    for each in after == HIGH:
        rows, columns = each.any(axis=(1, 2)), each.any(axis=(0, 2))
        np.testing.assert_array_equal(each, np.broadcast_to((rows[:, None] & columns)[..., None], each.shape))
        for side in (rows, rows[::-1], columns, columns[::-1]):
            first = int(np.argmax(side))
            assert first <= 16 and side[first : 40 - 16].all()
    cut = (after == LOW).mean(axis=(2, 3))[:, 0]
    assert 0 < cut.mean() < 1


def test_tables_lie_below_and_arms_beside_and_neither_on_the_patient():
    size, count = 96, 60
    row, column = np.mgrid[:size, :size] / size
    body = ((row - 0.5) / 0.28) ** 2 + ((column - 0.5) / 0.36) ** 2 < 1
    stacks = np.where(body[None, ..., None], 500.0, LOW + 10).astype(np.float32) * np.ones((count, 1, 1, 2), np.float32)
    for name, where in (("table", row > 0.6), ("arms", (column < 0.3) | (column > 0.7))):
        difference = changed(stacks, only(name)) != stacks
        assert not difference[:, body].any() and not difference[:, ~where].any()
        shares = difference.mean(axis=(1, 2, 3))
        assert 0.002 < np.median(shares) < 0.2
        np.testing.assert_array_equal(difference[..., 0], difference[..., 1])
    arms = changed(stacks, only("arms")) != stacks
    assert (arms[:, :, : size // 2].any(axis=(1, 2, 3)) & arms[:, :, size // 2 :].any(axis=(1, 2, 3))).mean() > 0.9


def test_rician_noise_is_the_magnitude_of_two_channels():
    signal = np.array([0.0, 20.0, 60.0], np.float32)
    stacks = LOW + np.broadcast_to(signal[:, None], (60, 3, 2000)).reshape(60, 3 * 2000)[:, :5625]
    stacks = np.ascontiguousarray(stacks).reshape(60, 75, 75, 1).astype(np.float32)
    noisy = {"noise": ALL["noise"] | {"kind": "rician"}}
    after = changed(stacks, noisy).astype(np.float64).reshape(60, -1) - LOW
    flat = stacks.reshape(60, -1) - LOW
    assert after.min() >= 0
    for own, before in zip(after, flat, strict=True):
        sigma = own[before == 0].mean() / np.sqrt(np.pi / 2)  # Rayleigh
        if sigma < 4:
            continue
        for level in signal:
            reference = scipy.stats.rice(level / sigma, scale=sigma)
            found = own[before == level]
            assert found.mean() == pytest.approx(reference.mean(), abs=5 * reference.std() / np.sqrt(found.size))
            assert found.std() == pytest.approx(reference.std(), rel=0.1)


@pytest.mark.parametrize("count", [1, 2])
def test_eager_graph_and_xla_agree(count):
    stacks, seeds = tf.constant(slices(count, 128)), seeds_of(count)

    def change(stacks: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
        return intensity.intensity(stacks, seeds, ALL, LOW, HIGH)

    eager = change(stacks, seeds)
    np.testing.assert_array_equal(change(stacks, seeds), eager)
    for traced in (tf.function(change), tf.function(change, jit_compile=True)):
        np.testing.assert_allclose(traced(stacks, seeds), eager, rtol=0, atol=2e-6 * (HIGH - LOW))


@pytest.mark.parametrize("batch", [1, 2, None])
def test_every_op_has_a_kernel_for_gpus_and_shapes_survive(batch):
    @tf.function
    def change(stacks: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
        return intensity.intensity(stacks, seeds, ALL, LOW, HIGH)

    traced = change.get_concrete_function(tf.TensorSpec([batch, 64, 64, 3]), tf.TensorSpec([batch, 2], tf.int64))
    assert {"Einsum", "Exp", "StatelessRandomUniformFullIntV2"} <= {node.op for node in nodes(traced)}
    assert without_gpu_kernel(traced) == []
    assert traced.structured_outputs.shape.as_list() == [batch, 64, 64, 3]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="Expected square slices"):
        intensity.intensity(tf.zeros([1, 8, 9, 1]), seeds_of(1), only("noise"), LOW, HIGH)
    with pytest.raises(ValueError, match=r"received low=1\.0 and high=1\.0"):
        intensity.intensity(tf.zeros([1, 8, 8, 1]), seeds_of(1), only("noise"), 1.0, 1.0)
