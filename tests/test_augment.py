import elasticdeform
import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf
from gpu_kernels import nodes, runs_on_gpu, without_gpu_kernel

from lvseg import augment, draws

SIGMA_PX, GRID = 8.0, 8
BORDER_PX = 48  # no field drawn in these tests reaches further


@pytest.fixture(params=["chosen at import", "plain TensorFlow"])
def both_warps(request, monkeypatch):
    if request.param == "plain TensorFlow":
        monkeypatch.setattr(augment, "_dense_image_warp", augment._plain_dense_image_warp)


def smooth_images(batch: int, size: int, channels: int = 3) -> np.ndarray:
    """float32 [batch, size, size, channels] from 0 to 1, every channel and sample its own pattern."""
    rows, columns = np.mgrid[:size, :size] / size
    waves = [
        np.sin(7 * rows + sample) * np.cos(5 * columns * (channel + 1)) + rows * columns
        for sample in range(batch)
        for channel in range(channels)
    ]
    images = np.moveaxis(np.reshape(waves, (batch, channels, size, size)), 1, -1)
    return ((images - images.min()) / np.ptp(images)).astype(np.float32)


def blob_masks(batch: int, size: int) -> np.ndarray:
    """uint8 [batch, size, size, 1] with classes 0, 1 and 3: a mean of 1 and 3 would be a class that is not there."""
    rows, columns = np.mgrid[:size, :size] / size - 0.5
    masks = np.zeros((batch, size, size, 1), np.uint8)
    masks[:, np.hypot(rows, columns) < 0.35] = 1
    masks[:, np.hypot(rows + 0.05, columns) < 0.15] = 3
    return masks


def pixel_positions(size: int) -> np.ndarray:
    """float64 [size, size, 2]: each pixel's (row, column)."""
    return np.moveaxis(np.mgrid[:size, :size], 0, -1).astype(np.float64)


def displacements(batch: int, grid: int = GRID, sigma_px: float = SIGMA_PX, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, sigma_px, (batch, 2, grid, grid)).astype(np.float32)


def deformed_by_reference(images: np.ndarray, displacement: np.ndarray, order: int, mode: str) -> np.ndarray:
    return np.stack(
        [
            elasticdeform.deform_grid(image, each.astype(np.float64), order=order, mode=mode, axis=(0, 1))
            for image, each in zip(images, displacement, strict=True)
        ]
    )


@pytest.mark.parametrize(("size", "grid"), [(256, 8), (128, 8), (64, 3), (33, 2), (80, 20)])
def test_field_is_the_one_elasticdeform_moves_by(size, grid):
    displacement = displacements(2, grid, sigma_px=2.0)
    field = augment.elastic_field(tf.constant(displacement), size).numpy()

    assert field.shape == (2, size, size, 2)
    assert field.dtype == np.float32
    # Deformed linearly, a ramp of row (or column) numbers shows where each pixel came from, while that is inside.
    margin = slice(12, -12)
    ramps = pixel_positions(size)
    came_from = deformed_by_reference(np.stack([ramps, ramps]), displacement, order=1, mode="constant")
    inside = (came_from - ramps)[:, margin, margin]
    np.testing.assert_allclose(field[:, margin, margin], inside, atol=1e-5)


def test_field_passes_through_the_control_points():
    displacement = displacements(1)
    field = augment.elastic_field(tf.constant(displacement), 8 * 7 + 1).numpy()  # a control point every 8 pixels
    np.testing.assert_allclose(np.moveaxis(field[0, ::8, ::8], -1, 0), displacement[0], atol=1e-5)


def test_field_refuses_shapes_that_have_no_spline():
    for shape, size in [((1, 2, 1, 1), 64), ((1, 3, 8, 8), 64), ((1, 2, 8, 7), 64), ((1, 2, 8, 8), 1)]:
        with pytest.raises(ValueError, match=r"Expected displacements"):
            augment.elastic_field(tf.zeros(shape), size)


@pytest.mark.parametrize("size", [256, 128])
def test_linear_warp_agrees_with_elasticdeform(size, both_warps):
    images, displacement = smooth_images(2, size), displacements(2)
    warped = augment.warp(tf.constant(images), augment.elastic_field(tf.constant(displacement), size)).numpy()

    border = slice(BORDER_PX, -BORDER_PX)
    reference = deformed_by_reference(images, displacement, order=1, mode="constant")
    assert np.abs(warped - reference)[:, border, border].max() < 1e-3
    assert np.abs(warped - images).max() > 0.1

    to_the_edge = deformed_by_reference(images, displacement, order=1, mode="nearest")
    assert np.abs(warped - to_the_edge).max() < 1e-3


def test_linear_warp_agrees_with_elasticdeform_on_noise(both_warps):
    images = np.random.default_rng(1).random((1, 128, 128, 1)).astype(np.float32)
    displacement = displacements(1)
    warped = augment.warp(tf.constant(images), augment.elastic_field(tf.constant(displacement), 128)).numpy()
    assert np.abs(warped - deformed_by_reference(images, displacement, order=1, mode="nearest")).max() < 1e-3


@pytest.mark.parametrize("size", [256, 128])
def test_nearest_warp_agrees_with_elasticdeform_away_from_ties(size):
    masks, displacement = blob_masks(2, size), displacements(2)
    field = augment.elastic_field(tf.constant(displacement), size).numpy()
    warped = augment.warp(tf.constant(masks), tf.constant(field), "nearest").numpy()
    reference = deformed_by_reference(masks, displacement, order=0, mode="nearest")

    position = field + pixel_positions(size)
    tie = (np.abs(position - np.floor(position) - 0.5) < 1e-3).any(axis=-1)
    np.testing.assert_array_equal(warped[~tie], reference[~tie])
    assert tie.mean() < 0.01
    assert (warped != masks).mean() > 0.01


@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
def test_zero_field_is_identity(interpolation, both_warps):
    images = smooth_images(2, 32)
    warped = augment.warp(tf.constant(images), tf.zeros([2, 32, 32, 2]), interpolation)
    np.testing.assert_array_equal(warped, images)


@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
def test_constant_field_fetches_from_that_far_and_the_edge_goes_on(interpolation, both_warps):
    images = smooth_images(1, 16)
    field = tf.tile(tf.constant([3.0, -2.0]), [16 * 16])  # from three rows further down, two columns further left
    warped = augment.warp(tf.constant(images), tf.reshape(field, [1, 16, 16, 2]), interpolation).numpy()
    rows = np.minimum(np.arange(16) + 3, 15)
    columns = np.maximum(np.arange(16) - 2, 0)
    np.testing.assert_array_equal(warped[0], images[0][np.ix_(rows, columns)])


def test_constant_displacement_is_a_constant_field():
    displacement = tf.ones([1, 2, GRID, GRID]) * tf.reshape([3.5, -2.25], [1, 2, 1, 1])
    field = augment.elastic_field(displacement, 64).numpy()
    np.testing.assert_allclose(field, np.broadcast_to([3.5, -2.25], field.shape), atol=1e-6)


def test_half_a_pixel_is_the_mean_of_two(both_warps):
    images = tf.constant([[1.0, 3.0], [5.0, 9.0]], shape=[1, 2, 2, 1])
    field = tf.tile(tf.constant([0.0, 0.5], shape=[1, 1, 1, 2]), [1, 2, 2, 1])
    np.testing.assert_array_equal(augment.warp(images, field)[0, :, :, 0], [[2.0, 3.0], [7.0, 9.0]])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "int32", "int64", "bool", "float16", "float32"])
def test_nearest_warp_keeps_the_dtype_and_makes_no_new_value(dtype):
    masks = blob_masks(2, 64).astype(dtype)
    warped = augment.warp(tf.constant(masks), augment.elastic_field(tf.constant(displacements(2)), 64), "nearest")
    assert warped.dtype == dtype
    assert warped.shape == masks.shape
    assert set(np.unique(warped)) == set(np.unique(masks))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_linear_warp_keeps_the_dtype(dtype, both_warps):
    images = smooth_images(1, 32)
    field = augment.elastic_field(tf.constant(displacements(1, sigma_px=2.0)), 32)
    warped = augment.warp(tf.constant(images.astype(dtype)), field)
    assert warped.dtype == dtype
    np.testing.assert_allclose(warped, augment.warp(tf.constant(images), field), atol=2e-3)


def test_warp_refuses_what_it_would_spoil():
    field = tf.zeros([1, 8, 8, 2])
    with pytest.raises(ValueError, match="received dtype=uint8"):
        augment.warp(tf.zeros([1, 8, 8, 1], tf.uint8), field)
    with pytest.raises(ValueError, match="received interpolation='cubic'"):
        augment.warp(tf.zeros([1, 8, 8, 1]), field, "cubic")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [256, 128])
def test_gradient_shares_each_output_out_among_its_sources(size, both_warps):
    images = tf.constant(smooth_images(2, size, channels=1))
    field = augment.elastic_field(tf.constant(displacements(2)), size)
    with tf.GradientTape() as tape:
        tape.watch(images)
        total = tf.reduce_sum(augment.warp(images, field))
    gradient = tape.gradient(total, images).numpy()
    assert gradient.shape == images.shape
    assert gradient.min() >= 0.0
    np.testing.assert_allclose(gradient.sum(axis=(1, 2, 3)), size * size, rtol=1e-4)


def test_seeds_differ_wherever_a_key_differs():
    keys = [
        (seed, stream, step, index)
        for seed in (0, 1, 2**draws.SEED_BITS - 1)
        for stream in (0, 1, 2**draws.STREAM_BITS - 1)
        for step in (0, 1, 2**draws.STEP_BITS - 1)
        for index in (0, 1, 2**draws.INDEX_BITS - 1)
    ]
    packed = {
        tuple(draws.sample_seeds(seed, stream, step, tf.constant([index]))[0].numpy().tolist())
        for seed, stream, step, index in keys
    }
    assert len(packed) == len(keys)
    assert all(0 <= word < 2**63 for words in packed for word in words)


def test_seeds_are_laid_out_as_documented():
    seeds = draws.sample_seeds(seed=5, stream=7, step=11, indices=tf.constant([13, 17], tf.int32))
    assert seeds.dtype == tf.int64
    np.testing.assert_array_equal(seeds, [[5 * 65536 + 7, 11 * 2**32 + 13], [5 * 65536 + 7, 11 * 2**32 + 17]])


def test_step_may_be_a_tensor():
    step = tf.Variable(11, dtype=tf.int64)
    traced = tf.function(lambda indices: draws.sample_seeds(5, 7, step, indices))(tf.constant([13]))
    np.testing.assert_array_equal(traced, draws.sample_seeds(5, 7, 11, tf.constant([13])))


@pytest.mark.parametrize("key", [{"seed": -1}, {"seed": 2**47}, {"stream": 2**16}, {"step": 2**31}])
def test_seeds_outside_their_bits_are_refused(key):
    name, value = next(iter(key.items()))
    with pytest.raises(ValueError, match=f"received {name}={value}"):
        draws.sample_seeds(**{"seed": 0, "stream": 0, "step": 0, "indices": tf.constant([0]), **key})


def test_displacements_are_normal_and_uncorrelated():
    seeds = draws.sample_seeds(0, 0, 0, tf.range(400))
    drawn = draws.displacement(seeds, SIGMA_PX, GRID).numpy()
    assert drawn.dtype == np.float32
    flat = np.sort(drawn.ravel()) / SIGMA_PX
    count = flat.size  # 51,200: a mean's standard error is 0.0044, a standard deviation's 0.0031
    assert abs(flat.mean()) < 0.018
    assert abs(flat.std() - 1) < 0.013
    for bound, share in [(-1.959964, 0.025), (-0.6744898, 0.25), (0.0, 0.5), (1.0, 0.8413447), (2.326348, 0.99)]:
        assert np.searchsorted(flat, bound) / count == pytest.approx(
            share, abs=4 * np.sqrt(share * (1 - share) / count)
        )
    correlation = np.corrcoef(drawn.reshape(400, -1), rowvar=False)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 6 / np.sqrt(400)


def test_a_sample_is_drawn_from_its_own_seed_alone():
    seeds = draws.sample_seeds(3, 1, 70_000, tf.range(5))
    together = draws.displacement(seeds, SIGMA_PX, GRID).numpy()
    backwards = draws.displacement(seeds[::-1], SIGMA_PX, GRID).numpy()
    alone = np.concatenate([draws.displacement(seeds[i : i + 1], SIGMA_PX, GRID) for i in range(5)])
    np.testing.assert_array_equal(together, backwards[::-1])
    np.testing.assert_array_equal(together, alone)
    assert len(np.unique(together[:, 0, 0, 0])) == 5


def test_other_seed_stream_or_step_draws_another_field():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    drawn = [draws.displacement(draws.sample_seeds(*key, tf.constant([0])), 1.0, GRID).numpy() for key in keys]
    assert len({each.tobytes() for each in drawn}) == len(keys)
    assert np.abs(np.corrcoef([each.ravel() for each in drawn]) - np.eye(4)).max() < 0.4


def deform(images: tf.Tensor, masks: tf.Tensor, indices: tf.Tensor, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    seeds = draws.sample_seeds(seed=9, stream=0, step=step, indices=indices)
    return augment.elastic(images, masks, seeds, SIGMA_PX, GRID)


ALL = {
    "elastic": {"sigma_px": 4.0, "grid": 6, "where": "device"},
    "flip": {"rows": 0.5, "columns": 0.5},
    "rotate": {"max_degrees": 180.0, "probability": 1.0},
    "scale": {"max_factor": 1.5, "probability": 1.0},
}


def move(images: tf.Tensor, masks: tf.Tensor, indices: tf.Tensor, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Everything spatial at once."""
    seeds = draws.sample_seeds(seed=9, stream=draws.ELASTIC_STREAM, step=step, indices=indices)
    return augment.spatial(images, masks, seeds, ALL)


@pytest.mark.parametrize("deform", [deform, move])
def test_image_and_mask_move_together(deform, both_warps):
    masks = blob_masks(3, 128)
    images = masks.astype(np.float32)
    deformed, deformed_masks = deform(tf.constant(images), tf.constant(masks), tf.range(3), tf.constant(4))
    assert deformed.dtype == tf.float32
    assert deformed_masks.dtype == tf.uint8
    # The mask as an image, deformed linearly, is within half a class of the mask wherever classes do not meet.
    apart = np.abs(deformed.numpy() - deformed_masks.numpy()) < 1e-4
    assert apart.mean() > 0.9
    assert (deformed_masks.numpy() != masks).mean() > 0.01


@pytest.mark.parametrize("deform", [deform, move])
def test_a_sample_moves_the_same_whatever_the_batch(deform, both_warps):
    images, masks = tf.constant(smooth_images(3, 64)), tf.constant(blob_masks(3, 64))
    together = deform(images, masks, tf.constant([4, 8, 15]), tf.constant(1))
    for position, index in enumerate([4, 8, 15]):
        one = slice(position, position + 1)
        alone = deform(images[one], masks[one], tf.constant([index]), tf.constant(1))
        np.testing.assert_allclose(together[0][one], alone[0], atol=1e-6)
        np.testing.assert_array_equal(together[1][one], alone[1])


def test_elastic_needs_square_slices_of_a_known_size():
    for size in ([16, 32], [None, None]):
        traced = tf.function(deform)
        with pytest.raises(ValueError, match="Expected square slices"):
            traced.get_concrete_function(
                tf.TensorSpec([1, *size, 1]),
                tf.TensorSpec([1, *size, 1], tf.uint8),
                tf.TensorSpec([1], tf.int64),
                tf.TensorSpec([], tf.int64),
            )


@pytest.mark.parametrize(("deform", "size"), [(deform, 256), (deform, 128), (move, 64)])
def test_eager_graph_and_xla_agree(deform, size, both_warps):
    images, masks = tf.constant(smooth_images(2, size)), tf.constant(blob_masks(2, size))
    indices, step = tf.constant([6, 7]), tf.constant(12, tf.int64)
    eager = deform(images, masks, indices, step)
    again = deform(images, masks, indices, step)
    graph = tf.function(deform)(images, masks, indices, step)
    compiled = tf.function(deform, jit_compile=True)(images, masks, indices, step)

    np.testing.assert_array_equal(eager[0], again[0])
    for other in (graph, compiled):
        np.testing.assert_allclose(eager[0], other[0], atol=1e-5)
        assert (eager[1].numpy() != other[1].numpy()).mean() < 1e-4  # a tie may fall either way


@pytest.mark.parametrize("deform", [deform, move])
def test_shapes_survive_tracing_with_any_batch(deform, both_warps):
    image_batches, mask_batches = tf.TensorSpec([None, 256, 256, 3]), tf.TensorSpec([None, 256, 256, 1], tf.uint8)
    traced = tf.function(deform).get_concrete_function(
        image_batches, mask_batches, tf.TensorSpec([None], tf.int64), tf.TensorSpec([], tf.int64)
    )
    assert [output.shape.as_list() for output in traced.structured_outputs] == [
        [None, 256, 256, 3],
        [None, 256, 256, 1],
    ]
    images, masks = smooth_images(2, 256), blob_masks(2, 256)
    step, indices = tf.constant(3, tf.int64), tf.constant([0, 1], tf.int64)
    deformed = traced(tf.constant(images), tf.constant(masks), indices, step)[0]
    np.testing.assert_allclose(deformed, deform(tf.constant(images), tf.constant(masks), indices, step)[0], atol=1e-5)


@pytest.mark.parametrize("batch", [2, None])
@pytest.mark.parametrize("function", [deform, move])
def test_every_op_has_a_kernel_for_gpus(function, batch, both_warps):
    traced = tf.function(function).get_concrete_function(
        tf.TensorSpec([batch, 256, 256, 3]),
        tf.TensorSpec([batch, 256, 256, 1], tf.uint8),
        tf.TensorSpec([batch], tf.int64),
        tf.TensorSpec([], tf.int64),
    )
    assert {"GatherV2", "Einsum", "StatelessRandomUniformFullIntV2"} <= {node.op for node in nodes(traced)}
    assert without_gpu_kernel(traced) == []


def test_the_kernel_check_sees_ops_that_gpus_lack():
    @tf.function
    def on_the_host(mask):
        return tf.while_loop(lambda mask: tf.reduce_any(mask > 0), lambda mask: (tf.gather(mask, [0]),), (mask,))

    found = nodes(on_the_host.get_concrete_function(tf.TensorSpec([1], tf.uint8)))
    assert "GatherV2" in {node.op for node in found if not runs_on_gpu(node)}


def test_host_variant_deforms_alike():
    images, masks = smooth_images(2, 128), blob_masks(2, 128)
    seeds = draws.sample_seeds(0, 0, 5, tf.range(2))
    on_device = augment.elastic(tf.constant(images), tf.constant(masks), seeds, SIGMA_PX, GRID)

    samples = tf.data.Dataset.from_tensor_slices((images, masks, seeds))
    on_host = samples.map(lambda image, mask, seed: augment.elastic_host(image, mask, seed, SIGMA_PX, GRID)).batch(2)

    assert on_host.element_spec[0].shape.as_list() == [None, 128, 128, 3]
    assert on_host.element_spec[1] == tf.TensorSpec([None, 128, 128, 1], tf.uint8)
    deformed, deformed_masks = next(iter(on_host))
    assert np.abs(deformed - on_device[0]).max() < 1e-3
    assert (deformed_masks.numpy() != on_device[1].numpy()).mean() < 1e-3
    assert (deformed_masks.numpy() != masks).mean() > 0.01


def seeds_of(count: int) -> tf.Tensor:
    return draws.sample_seeds(4, draws.ELASTIC_STREAM, 17, tf.range(count))


def spatially(images: np.ndarray, masks: np.ndarray, settings: dict) -> tuple[np.ndarray, np.ndarray]:
    """`augment.spatial` in a graph: thousands of samples one by one take long eagerly."""
    traced = tf.function(lambda images, masks, seeds: augment.spatial(images, masks, seeds, settings))
    moved, moved_masks = traced(tf.constant(images), tf.constant(masks), seeds_of(len(images)))
    return moved.numpy(), moved_masks.numpy()


def only(*names: str) -> dict[str, dict | None]:
    """The settings as an experiment has them, all off but these."""
    return {name: keys if name in names else None for name, keys in ALL.items()}


def moved_positions(size: int, count: int, settings: dict) -> np.ndarray:
    """float64 [count, size, size, 2]: where in the slice each pixel came from, as ramps of rows and columns show."""
    ramps = np.broadcast_to(pixel_positions(size), (count, size, size, 2)).astype(np.float32)
    masks = np.zeros([count, size, size, 1], np.uint8)
    return spatially(ramps, masks, settings)[0].astype(np.float64)


def affine_parts(positions: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The matrix [2, 2] and the centre's image [2] of a linear map, from its values next to the slice's centre."""
    low, high = size // 2 - 1, size // 2
    corner = positions[low, low]
    return np.stack([positions[high, low] - corner, positions[low, high] - corner], axis=1), (
        positions[low : high + 1, low : high + 1].mean(axis=(0, 1))
    )


def test_streams_are_each_others_strangers():
    streams = [value for name, value in vars(draws).items() if name.endswith("_STREAM")]
    assert len(set(streams)) == len(streams) > 10
    # Dropout's layers count on from their own, and there are fewer than a thousand of them.
    taken = [stream for stream in streams if stream != draws.DROPOUT_STREAM]
    assert not any(0 <= stream - draws.DROPOUT_STREAM < 1000 for stream in taken)
    assert max(streams) < 2**draws.STREAM_BITS


@pytest.mark.parametrize("settings", [{}, only(), {"elastic": ALL["elastic"] | {"where": "host"}, "flip": None}])
def test_off_is_untouched(settings):
    images, masks = tf.constant(smooth_images(2, 32)), tf.constant(blob_masks(2, 32))
    moved, moved_masks = augment.spatial(images, masks, seeds_of(2), settings)
    assert moved is images and moved_masks is masks


def test_elastic_alone_moves_by_its_field_to_the_bit():
    images, masks = tf.constant(smooth_images(2, 64)), tf.constant(blob_masks(2, 64))
    field = augment.elastic_field(draws.displacement(seeds_of(2), 4.0, 6), 64)
    moved, moved_masks = augment.spatial(images, masks, seeds_of(2), only("elastic"))
    np.testing.assert_array_equal(moved, augment.warp(images, field))
    np.testing.assert_array_equal(moved_masks, augment.warp(masks, field, "nearest"))


@pytest.mark.parametrize(("rows", "columns"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_flips_are_exact(rows, columns):
    random = np.random.default_rng(0)
    images = random.normal(0, 1e4, (3, 33, 33, 2)).astype(np.float32)
    masks = random.integers(0, 4, (3, 33, 33, 1)).astype(np.uint8)
    moved, moved_masks = spatially(images, masks, {"flip": {"rows": rows, "columns": columns}})
    axes = [axis for axis, probability in ((1, rows), (2, columns)) if probability]
    np.testing.assert_array_equal(moved, np.flip(images, axes))
    np.testing.assert_array_equal(moved_masks, np.flip(masks, axes))


def test_flips_come_as_often_as_asked_and_axis_by_axis():
    count = 2000
    corner = np.zeros((count, 2, 2, 1), np.float32)
    corner[:, 0, 0] = 1.0
    moved, _ = spatially(corner, corner.astype(np.uint8), {"flip": {"rows": 0.3, "columns": 0.6}})
    shares = moved[..., 0].mean(axis=0)  # where the marked corner went
    expected = np.outer([0.7, 0.3], [0.4, 0.6])
    assert np.abs(shares - expected).max() < 4 * np.sqrt(0.25 / count)


@pytest.mark.parametrize("turns", [1, 2, 3, -1])
def test_quarter_turns_are_those_of_numpy(turns):
    images = smooth_images(1, 64)
    field = augment.similarity_field(tf.constant([90.0 * turns], tf.float64), tf.ones([1], tf.float64), 64)
    np.testing.assert_allclose(
        augment.warp(tf.constant(images), field), np.rot90(images, turns, axes=(1, 2)), atol=1e-5
    )


@pytest.mark.parametrize(("degrees", "factor"), [(0.0, 1.3), (20.0, 1.0), (-75.0, 0.8), (140.0, 1.6)])
def test_turning_and_magnifying_agree_with_scipy(degrees, factor, both_warps):
    size = 64
    images = smooth_images(1, size, channels=1)
    angle = np.deg2rad(degrees)
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / factor
    centre = np.full(2, (size - 1) / 2)
    expected = scipy.ndimage.affine_transform(
        images[0, ..., 0].astype(np.float64), matrix, centre - matrix @ centre, order=1, mode="nearest"
    )
    field = augment.similarity_field(tf.constant([degrees], tf.float64), tf.constant([factor], tf.float64), size)
    np.testing.assert_allclose(augment.warp(tf.constant(images), field)[0, ..., 0], expected, atol=1e-4)


def test_no_turn_and_no_magnification_leave_the_elastic_field_to_the_bit():
    field = augment.elastic_field(tf.constant(displacements(2)), 64)
    still = augment.similarity_field(tf.zeros([2], tf.float64), tf.ones([2], tf.float64), 64, field)
    np.testing.assert_array_equal(still, field)


@pytest.mark.parametrize("spacing_mm", [(3.0, 1.5), (1.0, 4.0)])
def test_where_pixels_are_not_square_a_turn_is_one_in_mm(spacing_mm):
    """Each position by hand: in mm from the centre, turned and magnified there, and back in pixels."""
    size, degrees, factor = 33, 25.0, 1.25
    elastic_px = augment.elastic_field(tf.constant(displacements(1, sigma_px=2.0)), size)
    field = augment.similarity_field(
        tf.constant([degrees], tf.float64), tf.constant([factor], tf.float64), size, elastic_px, spacing_mm
    )
    angle, centre, pixels = np.deg2rad(degrees), (size - 1) / 2, pixel_positions(size)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    from_centre_mm = (pixels + elastic_px[0].numpy() - centre) * spacing_mm
    expected = centre + from_centre_mm @ turn.T / factor / spacing_mm - pixels
    np.testing.assert_allclose(field[0], expected, atol=1e-4)


def test_rotation_is_rigid_about_the_centre_and_uniform_up_to_its_angle():
    size, count = 16, 300
    settings = {"rotate": {"max_degrees": 40.0, "probability": 1.0}}
    degrees = []
    for positions in moved_positions(size, count, settings):
        matrix, centre = affine_parts(positions, size)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(2), atol=1e-4)
        np.testing.assert_allclose(centre, (size - 1) / 2, atol=1e-4)
        assert np.linalg.det(matrix) > 0
        degrees.append(np.rad2deg(np.arctan2(matrix[0, 1], matrix[0, 0])))
    shares = np.sort(degrees) / 80 + 0.5
    assert shares[0] > 0 and shares[-1] < 1
    assert np.abs(shares - np.arange(count) / count).max() < 1.63 / np.sqrt(count)  # Kolmogorov and Smirnov, 1 %


def test_scaling_is_about_the_centre_and_log_uniform_either_way():
    size, count = 16, 300
    settings = {"scale": {"max_factor": 1.5, "probability": 1.0}}
    logs = []
    for positions in moved_positions(size, count, settings):
        matrix, centre = affine_parts(positions, size)
        np.testing.assert_allclose(matrix, np.eye(2) * matrix[0, 0], atol=1e-4)
        np.testing.assert_allclose(centre, (size - 1) / 2, atol=1e-4)
        logs.append(-np.log(matrix[0, 0]))
    shares = np.sort(logs) / (2 * np.log(1.5)) + 0.5
    assert shares[0] > 0 and shares[-1] < 1
    assert np.abs(shares - np.arange(count) / count).max() < 1.63 / np.sqrt(count)


def test_a_discs_area_goes_with_the_square_of_the_factor():
    size, count = 128, 6
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    disc = np.broadcast_to((np.hypot(rows, columns) < 35)[..., None], (count, size, size, 1)).astype(np.uint8)
    _, moved = spatially(disc.astype(np.float32), disc, only("scale"))
    factors = [1 / affine_parts(each, size)[0][0, 0] for each in moved_positions(size, count, only("scale"))]
    assert max(factors) / min(factors) > 1.3
    np.testing.assert_allclose(moved.sum(axis=(1, 2, 3)), np.pi * 35**2 * np.square(factors), rtol=0.01)


@pytest.mark.parametrize("name", ["rotate", "scale"])
def test_probability_is_the_share_that_moves_and_the_others_stay_to_the_bit(name):
    count = 500
    images = np.random.default_rng(0).integers(0, 4096, (count, 8, 8, 1)).astype(np.float32)
    moved, _ = spatially(images, np.zeros([count, 8, 8, 1], np.uint8), {name: ALL[name] | {"probability": 0.3}})
    share = (moved != images).any(axis=(1, 2, 3)).mean()
    assert abs(share - 0.3) < 4 * np.sqrt(0.21 / count)


def test_strengths_are_uniform_among_those_that_are_chosen():
    count = 3000
    traced = tf.function(lambda seeds: draws.strength(seeds, draws.ROTATE_STREAM, 0.3, -2.0, 6.0))
    drawn = traced(seeds_of(count)).numpy()
    chosen = np.sort(drawn[drawn != 0])
    assert abs(len(chosen) / count - 0.3) < 4 * np.sqrt(0.21 / count)
    shares = (chosen + 2) / 8
    assert np.abs(shares - np.arange(len(shares)) / len(shares)).max() < 1.63 / np.sqrt(len(shares))


def test_all_together_are_one_resampling_of_the_composed_positions(both_warps):
    """Each part is measured alone, composed by hand, and scipy resamples once; so no part changes another's draw."""
    size, count = 96, 6
    centre, pixels = (size - 1) / 2, pixel_positions(size)
    alone = {name: moved_positions(size, count, only(name)) for name in ALL}
    images, masks = smooth_images(count, size), blob_masks(count, size)
    moved, moved_masks = spatially(images, masks, ALL)
    flips = set()
    for sample in range(count):
        mirror, turn, shrink = (affine_parts(alone[name][sample], size)[0] for name in ("flip", "rotate", "scale"))
        flips.add(tuple(np.diag(mirror)))
        came_from = centre + (alone["elastic"][sample] - centre) @ (mirror @ turn @ shrink).T
        axes = np.moveaxis(came_from, -1, 0)
        # Where the deformation alone stays well inside, its ramps told the truth.
        told = ((alone["elastic"][sample] > 0.5) & (alone["elastic"][sample] < size - 1.5)).all(axis=-1)
        assert told.mean() > 0.7
        for channel in range(3):
            expected = scipy.ndimage.map_coordinates(images[sample, ..., channel], axes, order=1, mode="nearest")
            assert np.abs(moved[sample, ..., channel] - expected)[told].max() < 1e-3
        expected = scipy.ndimage.map_coordinates(masks[sample, ..., 0], axes, order=0, mode="nearest")
        tie = (np.abs(came_from - np.floor(came_from) - 0.5) < 1e-2).any(axis=-1)
        np.testing.assert_array_equal(moved_masks[sample, ..., 0][told & ~tie], expected[told & ~tie])
        assert np.abs(came_from - pixels).max() > 5
    assert len(flips) > 1


def test_spatial_needs_square_slices():
    with pytest.raises(ValueError, match="Expected square slices"):
        augment.spatial(tf.zeros([1, 8, 9, 1]), tf.zeros([1, 8, 9, 1], tf.uint8), seeds_of(1), only("flip"))
