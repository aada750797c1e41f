"""The networks: published sizes, where pretrained weights land, and dropout that depends on seeds alone."""

import keras
import numpy as np
import pytest
import safetensors.numpy
import scipy.signal
import tensorflow as tf

from lvseg import augment
from lvseg.errors import InputError
from lvseg.models import vgg
from lvseg.models.layers import StatelessDropout
from lvseg.models.unet import VGG11_WIDTHS, unet


def test_the_base_network_has_the_published_31_03_million_weights():
    assert unet(256, 1, 2, 64).count_params() == pytest.approx(31.03e6, rel=2e-4)


def vgg_layers(model):
    return [
        model.get_layer(f"enc{level}_conv{number}")
        for level, widths in enumerate(VGG11_WIDTHS, start=1)
        for number in range(1, len(widths) + 1)
    ]


def test_vgg11s_convolutions_have_the_published_9_22_million_weights():
    model = unet(64, 3, 2, 4, encoder="vgg11")
    assert sum(layer.count_params() for layer in vgg_layers(model)) == pytest.approx(9.22e6, rel=1e-3)


@pytest.mark.parametrize("encoder", [None, "vgg11"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 9])
def test_every_combination_gives_probabilities_for_every_pixel(encoder, residual, channels):
    model = unet(32, channels, 3, 2, encoder, residual)
    stacks = np.random.default_rng(0).normal(size=(2, 32, 32, channels)).astype(np.float32)
    probabilities = model([stacks, np.zeros((2, 2), np.int64)]).numpy()
    assert probabilities.shape == (2, 32, 32, 3) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1.0, rtol=1e-5)
    assert probabilities.std() > 0


def test_initial_weights_follow_from_the_seed_and_differ_between_layers():
    one, same, other = (unet(32, 1, 2, 4, seed=seed) for seed in (1, 1, 2))
    for a, b, c in zip(one.trainable_variables, same.trainable_variables, other.trainable_variables, strict=True):
        np.testing.assert_array_equal(a, b)
        assert len(a.shape) == 1 or (np.asarray(a) != np.asarray(c)).any()
    first, second = (one.get_layer(f"enc{level}_conv2").kernel.numpy().ravel() for level in (2, 3))
    assert (first != second[: first.size]).any()


def test_filters_double_at_each_pooling_and_every_layer_is_named():
    model = unet(64, 3, 2, 8)
    filters = [model.get_layer(f"enc{level}_conv1").filters for level in range(1, 6)]
    assert filters == [8, 16, 32, 64, 128]
    assert [model.get_layer(f"dec{level}_up").kernel_size for level in range(1, 5)] == [(2, 2)] * 4
    assert model.get_layer("enc5_conv2").output.shape[1:3] == (4, 4)


@pytest.mark.parametrize("encoder", [None, "vgg11"])
def test_every_decoder_block_gets_the_encoder_block_of_its_level(encoder):
    """With the way up silenced, each level's answer still changes with its own encoder block."""
    model = unet(64, 1, 2, 4, encoder, dropout=0.0)
    rng = np.random.default_rng(0)
    stacks, seeds = rng.normal(size=(1, 64, 64, 1)).astype(np.float32), np.zeros((1, 2), np.int64)
    last = {None: "relu2", "vgg11": "relu1"}[encoder]
    levels = 4 if encoder is None else 5
    for level in range(1, levels + 1):
        up = model.get_layer(f"dec{level}_up")
        kept = up.get_weights()
        up.set_weights([np.zeros_like(weights) for weights in kept])
        numbers = [layer.name for layer in model.layers if layer.name.startswith(f"enc{level}_relu")]
        bridge = keras.Model(model.inputs, model.get_layer(f"dec{level}_bridge").output)([stacks, seeds]).numpy()
        block = keras.Model(model.inputs, model.get_layer(sorted(numbers)[-1]).output)([stacks, seeds]).numpy()
        np.testing.assert_array_equal(bridge[..., : block.shape[-1]], block)
        assert not bridge[..., block.shape[-1] :].any()
        assert model.get_layer(f"dec{level}_{last}").output.shape[1] == 64 // 2 ** (level - 1)
        up.set_weights(kept)


@pytest.mark.parametrize(("encoder", "deepest"), [(None, {"enc4", "enc5"}), ("vgg11", {"enc5", "enc6"})])
def test_dropout_is_in_the_two_deepest_blocks(encoder, deepest):
    layers = [layer for layer in unet(32, 1, 2, 2, encoder).layers if isinstance(layer, StatelessDropout)]
    assert {layer.name.split("_")[0] for layer in layers} == deepest
    assert {layer.rate for layer in layers} == {0.5} and len({layer.stream for layer in layers}) == 2


def test_short_skips_are_over_every_block_but_the_first():
    names = {layer.name for layer in unet(32, 1, 2, 2, residual=True).layers if layer.name.endswith("_short")}
    assert names == {f"enc{level}_short" for level in range(2, 6)} | {f"dec{level}_short" for level in range(1, 5)}
    assert not [layer for layer in unet(32, 1, 2, 2).layers if layer.name.endswith("_short")]


def test_the_ternausnet_decoder_has_a_relu_after_each_transposed_convolution():
    model = unet(64, 1, 2, 4, "vgg11")
    out = keras.Model(model.inputs, [model.get_layer(f"dec{level}_up").output for level in range(1, 6)])
    stacks = np.random.default_rng(0).normal(size=(1, 64, 64, 1)).astype(np.float32)
    for values in out([stacks, np.zeros((1, 2), np.int64)]):
        assert values.numpy().min() == 0.0 and values.numpy().max() > 0


def test_short_skips_carry_the_input_over_a_block():
    model = unet(32, 1, 2, 2, residual=True, dropout=0.0)
    for name in ("enc2_conv1", "enc2_conv2"):
        layer = model.get_layer(name)
        layer.set_weights([np.zeros_like(weights) for weights in layer.get_weights()])
    after = keras.Model(model.inputs, model.get_layer("enc2_relu2").output)
    stacks = np.random.default_rng(0).normal(size=(1, 32, 32, 1)).astype(np.float32)
    assert after([stacks, np.zeros((1, 2), np.int64)]).numpy().any()


def test_input_scaling_makes_offset_and_scale_disappear():
    plain, scaled = unet(32, 1, 2, 2), unet(32, 1, 2, 2, input_offset=50.0, input_scale=0.01)
    scaled.set_weights(plain.get_weights())
    stacks = np.random.default_rng(0).uniform(size=(1, 32, 32, 1)).astype(np.float32)
    seeds = np.zeros((1, 2), np.int64)
    np.testing.assert_allclose(plain([stacks, seeds]), scaled([stacks * 100 + 50, seeds]), atol=1e-5)


def dropout(seeds, rate=0.5, stream=20, shape=(6, 5, 7)):
    values = tf.ones([len(seeds), *shape])
    return StatelessDropout(rate, stream)(values, tf.constant(seeds, tf.int64), training=True).numpy()


def test_dropout_keeps_its_share_and_the_mean():
    dropped = dropout([[1, 2]], 0.25, shape=(50, 50, 40))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert abs((dropped > 0).mean() - 0.75) < 5 * np.sqrt(0.25 * 0.75 / dropped.size)


def test_dropout_follows_from_seed_and_layer_not_from_the_place_in_the_batch():
    alone, together = dropout([[1, 2]]), dropout([[9, 9], [1, 2]])
    np.testing.assert_array_equal(alone[0], together[1])
    assert (together[0] != together[1]).any()
    assert (dropout([[1, 2]], stream=21) != alone).any()


def test_dropout_draws_by_step_and_sample():
    seeds = [augment.sample_seeds(5, 0, step, tf.range(2)).numpy().tolist() for step in (0, 1)]
    draws = [dropout(batch)[place].tobytes() for batch in seeds for place in (0, 1)]
    assert len(set(draws)) == 4


def test_dropout_is_nothing_outside_training():
    values = tf.random.normal([2, 3, 3, 2], seed=1)
    np.testing.assert_array_equal(StatelessDropout(0.5, 16)(values, tf.zeros([2, 2], tf.int64), training=False), values)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """Random weights in the layout that torchvision and timm use."""
    random = np.random.default_rng(0)
    tensors, channels = {}, 3
    for place, filters in zip(vgg.FEATURES, [count for widths in VGG11_WIDTHS for count in widths], strict=True):
        tensors[f"features.{place}.weight"] = random.normal(0, 0.05, (filters, channels, 3, 3)).astype(np.float32)
        tensors[f"features.{place}.bias"] = random.normal(0, 0.05, filters).astype(np.float32)
        channels = filters
    path = tmp_path_factory.mktemp("weights") / "vgg11.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return path, tensors


def features(model, stack):
    """The encoder's output before the bottom, without input scaling."""
    return keras.Model(model.inputs, model.get_layer("enc5_relu2").output)([stack, np.zeros((1, 2), np.int64)]).numpy()


def reference_features(picture, tensors):
    """VGG11's convolutions by scipy: channels first, ReLU after each, 2 x 2 maxima between the blocks."""
    x = picture.transpose(2, 0, 1).astype(np.float64)
    place = iter(vgg.FEATURES)
    for block, widths in enumerate(VGG11_WIDTHS):
        if block:
            c, h, w = x.shape
            x = x.reshape(c, h // 2, 2, w // 2, 2).max(axis=(2, 4))
        for _ in widths:
            number = next(place)
            kernels, bias = tensors[f"features.{number}.weight"], tensors[f"features.{number}.bias"]
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
            x = np.stack([
                sum(scipy.signal.correlate2d(plane, part, "valid") for plane, part in zip(padded, kernel, strict=True))
                for kernel in kernels
            ]) + bias[:, None, None]  # fmt: skip
            x = np.maximum(x, 0)
    return x.transpose(1, 2, 0)


def test_pretrained_convolutions_land_exactly(weights_file):
    path, tensors = weights_file
    model = unet(32, 3, 2, 2, encoder="vgg11")
    assert vgg.load_encoder(model, str(path)) is not None
    picture = np.random.default_rng(1).normal(size=(32, 32, 3)).astype(np.float32)
    expected = reference_features(picture, tensors)
    np.testing.assert_allclose(features(model, picture[None])[0], expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("channels", [1, 9])
def test_equal_slices_give_the_response_of_a_grey_picture(weights_file, channels):
    path, _ = weights_file
    colour, stacked = unet(32, 3, 2, 2, encoder="vgg11"), unet(32, channels, 2, 2, encoder="vgg11")
    for model in (colour, stacked):
        vgg.load_encoder(model, str(path))
    grey = np.random.default_rng(1).normal(size=(1, 32, 32, 1)).astype(np.float32)
    expected = features(colour, grey.repeat(3, axis=-1))
    np.testing.assert_allclose(
        features(stacked, grey.repeat(channels, axis=-1)), expected, atol=1e-4 * np.abs(expected).max()
    )


def test_weights_that_cannot_be_had_say_which_key_to_set(tmp_path, monkeypatch, weights_file):
    model = unet(32, 3, 2, 2, encoder="vgg11")
    with pytest.raises(InputError, match=r"model\.encoder_weights"):
        vgg.load_encoder(model, str(tmp_path / "missing.safetensors"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(InputError, match=r"model\.encoder_weights to that file") as error:
        vgg.load_encoder(model, "imagenet")
    assert error.value.code == "WEIGHTS_UNAVAILABLE"
    _, tensors = weights_file
    (tmp_path / "text.safetensors").write_text("not weights")
    safetensors.numpy.save_file({"features.0.weight": tensors["features.0.weight"]}, tmp_path / "part.safetensors")
    for name in ("text", "part"):
        with pytest.raises(InputError, match=name) as error:
            vgg.load_encoder(model, str(tmp_path / f"{name}.safetensors"))
        assert error.value.code == "BAD_WEIGHTS"


def test_none_leaves_the_start_random_on_purpose():
    assert vgg.load_encoder(unet(32, 3, 2, 2, encoder="vgg11"), "none") is None
