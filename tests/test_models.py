"""The networks: published sizes, where pretrained weights land, and dropout that depends on seeds alone."""

import hashlib
import http.server
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.constants
import keras
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

from lvseg import draws
from lvseg.errors import InputError
from lvseg.models import vgg
from lvseg.models.layers import StatelessDropout
from lvseg.models.unet import VGG11_WIDTHS, encoder_layers, encoder_variables, unet

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
VGG_BLOCKS = {f"enc{level}" for level in range(1, 6)}


def shapes(model):
    """Layer name -> pixels of a side and channels of its answer, of the layers with weights."""
    return {layer.name: tuple(layer.output.shape[2:]) for layer in model.layers if layer.weights}


def test_the_base_network_is_the_published_one():
    """31.03 million weights (31,030,593 with one channel and one class), blocks of 64 to 1024 filters, 256 to 16 px."""
    model = unet(256, 1, 1, 64)
    assert model.count_params() == 31_030_593
    expected = {}
    for level, filters in enumerate((64, 128, 256, 512, 1024), start=1):
        blocks = ("enc", "dec") if level < 5 else ("enc",)
        names = [f"{block}{level}_conv{number}" for block in blocks for number in (1, 2)]
        names += [f"dec{level}_up"] if level < 5 else []
        expected |= dict.fromkeys(names, (256 // 2 ** (level - 1), filters))
    assert shapes(model) == {**expected, "logits": (256, 1)}


def test_the_vgg11_encoder_is_the_published_one():
    """Configuration A at its own 224 pixels; 9.22 million weights (9,220,480) in its convolutions."""
    model = unet(224, 3, 2, 4, encoder="vgg11")
    assert [layer.output.shape[2:] for layer in encoder_layers(model)] == [
        (224, 64), (112, 128), (56, 256), (56, 256), (28, 512), (28, 512), (14, 512), (14, 512)
    ]  # fmt: skip
    assert sum(layer.count_params() for layer in encoder_layers(model)) == 9_220_480
    assert {layer.kernel_size for layer in encoder_layers(model)} == {(3, 3)}


def test_the_decoder_of_vgg11_is_ternausnets():
    """UNet11 with 32 filters, to which `width` 64 corresponds; every convolution is 3 x 3."""
    model = unet(32, 3, 2, 64, encoder="vgg11")
    decoder = {name: channels for name, (_, channels) in shapes(model).items() if name[:4] not in VGG_BLOCKS}
    assert decoder == {
        "enc6_conv1": 512,
        "dec5_up": 256, "dec5_conv1": 512,
        "dec4_up": 256, "dec4_conv1": 512,
        "dec3_up": 128, "dec3_conv1": 256,
        "dec2_up": 64, "dec2_conv1": 128,
        "dec1_up": 32, "dec1_conv1": 32,
        "logits": 2,
    }  # fmt: skip
    assert {model.get_layer(name).kernel_size for name in decoder if name != "logits"} == {(3, 3)}


@pytest.mark.parametrize("encoder", [None, "vgg11"])
def test_every_layer_is_named(encoder):
    kind = r"conv\d|norm\d|relu\d|pool|up|bridge|short|add|dropout|projection"
    plain = "stacks|seeds|input_scaling|logits|probabilities"
    how = {"encoder_input": "projection"} if encoder else {"norm": "instance"}
    model = unet(32, 3, 2, 2, encoder, residual=True, **how)
    assert all(re.fullmatch(rf"{plain}|(enc|dec)\d_({kind})", layer.name) for layer in model.layers)


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


@pytest.mark.parametrize("residual", [False, True])
def test_instance_norm_stands_between_every_convolution_and_its_relu_and_knows_no_other_sample(residual):
    model = unet(32, 3, 2, 4, None, residual, norm="instance")
    rng = np.random.default_rng(0)
    for layer in model.layers:
        layer.set_weights([rng.normal(0.3, 0.3, weights.shape) for weights in layer.get_weights()])
    stacks, seeds = rng.normal(size=(3, 32, 32, 3)).astype(np.float32), np.zeros((3, 2), np.int64)

    def output(name):
        return keras.Model(model.inputs, model.get_layer(name).output)([stacks, seeds]).numpy().astype(np.float64)

    blocks = [f"enc{level}" for level in range(1, 6)] + [f"dec{level}" for level in range(1, 5)]
    for name in [f"{block}_{{}}{number}" for block in blocks for number in (1, 2)]:
        values, (gamma, beta) = output(name.format("conv")), model.get_layer(name.format("norm")).get_weights()
        mean, variance = values.mean(axis=(1, 2), keepdims=True), values.var(axis=(1, 2), keepdims=True)
        expected = (values - mean) / np.sqrt(variance + 1e-5) * gamma + beta
        np.testing.assert_allclose(output(name.format("norm")), expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(output("enc1_relu1"), np.maximum(output("enc1_norm1"), 0))
    together = model([stacks, seeds]).numpy()
    for number in range(3):
        alone = model([stacks[number : number + 1], seeds[:1]]).numpy()
        np.testing.assert_allclose(alone[0], together[number], atol=1e-5)


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


@pytest.mark.parametrize("precision", PRECISIONS[1:])
@pytest.mark.parametrize("encoder", [None, "vgg11"])
def test_mixed_precision_computes_in_16_bits_between_ends_of_32(encoder, precision):
    model = unet(32, 3, 2, 2, encoder, True, precision=precision)
    wide = {"stacks", "seeds", "input_scaling", "logits", "probabilities"}
    computed = {layer.name: layer.compute_dtype for layer in model.layers if layer.name not in wide}
    assert set(computed.values()) == {precision.removeprefix("mixed_")}
    assert {model.get_layer(name).compute_dtype for name in wide - {"seeds"}} == {"float32"}
    assert {str(np.asarray(weights).dtype) for weights in model.get_weights()} == {"float32"}


def test_mixed_precision_answers_and_learns_nearly_what_float32_does():
    """Dropout and the projection included; scans of thousands lose nothing, since they are scaled in 32 bits."""
    stacks = np.random.default_rng(0).normal(3000, 1, size=(2, 32, 32, 9)).astype(np.float32)
    seeds = np.array([[1, 2], [3, 4]])
    answers, slopes = {}, {}
    for name in PRECISIONS:
        model = unet(32, 9, 2, 4, "vgg11", True, 0.5, 3000.0, 1.0, encoder_input="projection", precision=name)
        with tf.GradientTape() as tape:
            probabilities = model([stacks, seeds], training=True)
            loss = -tf.reduce_mean(tf.math.log(probabilities[..., 1]))
        gradients = tape.gradient(loss, model.trainable_variables)
        answers[name] = probabilities.numpy()
        slopes[name] = np.concatenate([gradient.numpy().ravel() for gradient in gradients])
        slopes[name] /= np.linalg.norm(slopes[name])
    for name in PRECISIONS[1:]:
        assert answers[name].dtype == slopes[name].dtype == np.float32
        np.testing.assert_allclose(answers[name], answers["float32"], atol=0.02)
        assert slopes[name] @ slopes["float32"] > 0.99
    assert answers["float32"].std() > 0.1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder", "vgg16"),
        ("encoder_input", "projection"),
        ("encoder_input", "first"),
        ("precision", "float16"),
        ("norm", "batch"),
    ],
)
def test_what_there_is_not_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}='{value}'"):
        unet(32, 3, 2, 2, **{name: value})


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
    seeds = [draws.sample_seeds(5, 0, step, tf.range(2)).numpy().tolist() for step in (0, 1)]
    drawn = [dropout(batch)[place].tobytes() for batch in seeds for place in (0, 1)]
    assert len(set(drawn)) == 4


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_dropout_drops_the_same_in_16_bits(precision):
    values = tf.ones([1, 6, 5, 7])
    layer = StatelessDropout(0.5, 20, dtype=precision)
    dropped = layer(values, tf.constant([[1, 2]], tf.int64), training=True)
    assert dropped.dtype == precision.removeprefix("mixed_")
    np.testing.assert_array_equal(tf.cast(dropped, tf.float32), dropout([[1, 2]]))


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
    """VGG11's convolutions in NumPy: channels first, ReLU after each, 2 x 2 maxima between the blocks."""
    x = picture.transpose(2, 0, 1).astype(np.float64)
    place = iter(vgg.FEATURES)
    for block, widths in enumerate(VGG11_WIDTHS):
        if block:
            c, h, w = x.shape
            x = x.reshape(c, h // 2, 2, w // 2, 2).max(axis=(2, 4))
        for _ in widths:
            number = next(place)
            kernels, bias = tensors[f"features.{number}.weight"], tensors[f"features.{number}.bias"]
            _, h, w = x.shape
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
            moved = [(kernels[:, :, r, c], padded[:, r : r + h, c : c + w]) for r in range(3) for c in range(3)]
            x = sum(np.tensordot(kernel, shifted, 1) for kernel, shifted in moved) + bias[:, None, None]
            x = np.maximum(x, 0)
    return x.transpose(1, 2, 0)


def test_pretrained_convolutions_land_exactly(weights_file):
    path, tensors = weights_file
    model = unet(32, 3, 2, 2, encoder="vgg11")
    vgg.load_encoder(model, str(path))
    picture = np.random.default_rng(1).normal(size=(32, 32, 3)).astype(np.float32)
    expected = reference_features(picture, tensors)
    np.testing.assert_allclose(features(model, picture[None])[0], expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("channels", "how"), [(1, "spread"), (9, "spread"), (3, "projection"), (9, "projection")])
def test_equal_slices_give_the_response_of_a_grey_picture(weights_file, channels, how):
    path, _ = weights_file
    colour = unet(32, 3, 2, 2, encoder="vgg11")
    stacked = unet(32, channels, 2, 2, encoder="vgg11", encoder_input=how)
    for model in (colour, stacked):
        vgg.load_encoder(model, str(path))
    grey = np.random.default_rng(1).normal(size=(1, 32, 32, 1)).astype(np.float32)
    expected = features(colour, grey.repeat(3, axis=-1))
    np.testing.assert_allclose(
        features(stacked, grey.repeat(channels, axis=-1)), expected, atol=1e-4 * np.abs(expected).max()
    )


def test_the_projection_starts_as_the_mean_of_the_slices_and_is_learned():
    model = unet(32, 9, 2, 2, encoder="vgg11", encoder_input="projection")
    stacks, seeds = np.random.default_rng(1).normal(size=(1, 32, 32, 9)).astype(np.float32), np.zeros((1, 2), np.int64)
    projected = keras.Model(model.inputs, model.get_layer("enc0_projection").output)([stacks, seeds]).numpy()
    np.testing.assert_allclose(projected, stacks.mean(axis=-1, keepdims=True).repeat(3, axis=-1), atol=1e-6)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.math.log(model([stacks, seeds])[..., 1]))
    (slope,) = tape.gradient(loss, model.get_layer("enc0_projection").trainable_variables[:1])
    assert len(np.unique(slope, axis=-1)[0, 0, 0]) == 3  # the colours part ways at the first step


def test_encoder_variables_are_vgg11s_convolutions_and_no_others():
    model = unet(32, 9, 2, 2, "vgg11", residual=True, encoder_input="projection")
    chosen = encoder_variables(model)
    trainable = [id(variable) for variable in model.trainable_variables]
    assert len(chosen) == 16 and set(map(id, chosen)) <= set(trainable)
    assert sum(np.prod(variable.shape) for variable in chosen) == 9_220_480
    own = {id(variable) for name in ("enc2_short", "enc0_projection", "enc6_conv1", "dec1_conv1")
           for variable in model.get_layer(name).weights}  # fmt: skip
    assert not own & set(map(id, chosen))
    with pytest.raises(ValueError, match="VGG11's filters"):
        encoder_variables(unet(32, 3, 2, 2))


def test_loading_says_what_was_loaded(tmp_path, weights_file):
    path, _ = weights_file
    model = unet(32, 3, 2, 2, encoder="vgg11")
    loaded = vgg.load_encoder(model, str(path))
    assert loaded.name == path.name and loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.description
    told = tmp_path / "told.safetensors"
    vgg.save_encoder(model, told, "made by this test", {"task": "none"})
    assert vgg.load_encoder(model, str(told)).description == "made by this test"
    for split in (
        None,
        3,
        {"train": 3, "validation": []},
        {"train": ["a"]},
    ):  # of others, who mean something else by it
        vgg.save_encoder(model, told, "made by this test", {"split": split})
        assert vgg.load_encoder(model, str(told)).split is None


def test_none_leaves_the_start_random_on_purpose_and_says_so():
    model, untouched = unet(32, 3, 2, 2, encoder="vgg11"), unet(32, 3, 2, 2, encoder="vgg11")
    loaded = vgg.load_encoder(model, "none")
    assert loaded.name == "none" and loaded.sha256 is None and "random" in loaded.description
    for one, other in zip(model.get_weights(), untouched.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_saved_encoder_is_the_file_that_was_loaded(tmp_path, weights_file):
    _, tensors = weights_file
    model, other = unet(32, 3, 2, 2, encoder="vgg11"), unet(32, 3, 3, 4, "vgg11", residual=True)
    vgg.load_encoder(model, str(weights_file[0]))
    paths = [tmp_path / name for name in ("one.safetensors", "two.safetensors")]
    for path in paths:
        vgg.save_encoder(model, path, "a test", {"task": "volume", "step": 3})
    vgg.load_encoder(other, str(paths[0]))
    for one, two in zip(encoder_variables(model), encoder_variables(other), strict=True):
        np.testing.assert_array_equal(one, two)
    saved = safetensors.numpy.load_file(paths[0])
    assert set(saved) == set(tensors)
    for name, values in tensors.items():
        np.testing.assert_array_equal(saved[name], values)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    with pytest.raises(ValueError, match="3 channels, received 9"):
        vgg.save_encoder(unet(32, 9, 2, 2, "vgg11"), tmp_path / "nine.safetensors", "", {})


def test_damaged_weights_are_refused_and_change_nothing(tmp_path, weights_file):
    path, tensors = weights_file
    model = unet(32, 3, 2, 2, encoder="vgg11")
    before = model.get_weights()
    last = f"features.{vgg.FEATURES[-1]}.weight"
    endless = tensors[last].copy()
    endless[3, 2, 1, 0] = np.nan
    rest = {name: values for name, values in tensors.items() if name != last}
    for name, changed in (
        ("part", {}),
        ("shape", {last: np.ascontiguousarray(tensors[last][:, :-1])}),
        ("half", {last: tensors[last].astype(np.float16)}),
        ("endless", {last: endless}),
    ):
        safetensors.numpy.save_file(rest | changed, tmp_path / f"{name}.safetensors")
    (tmp_path / "text.safetensors").write_text("not weights")
    (tmp_path / "short.safetensors").write_bytes(path.read_bytes()[:-1])
    for name, said in (("part", f"tensor {last}"), ("shape", r"\(512, 512, 3, 3\), received F32 of \(512, 511, 3, 3\)"),
                       ("half", "F32 .* received F16"), ("endless", "finite"), ("text", "something else"),
                       ("short", "something else")):  # fmt: skip
        with pytest.raises(InputError, match=said) as error:
            vgg.load_encoder(model, str(tmp_path / f"{name}.safetensors"))
        assert error.value.code == "BAD_WEIGHTS" and f"{name}.safetensors" in error.value.sentence
    for one, two in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_missing_file_says_which_key_to_set(tmp_path):
    with pytest.raises(InputError, match=r"model\.encoder_weights") as error:
        vgg.load_encoder(unet(32, 3, 2, 2, encoder="vgg11"), str(tmp_path / "missing.safetensors"))
    assert error.value.code == "WEIGHTS_UNAVAILABLE"


@pytest.fixture
def hub(tmp_path, monkeypatch, weights_file):
    """A hub on this machine that has the random weights as ImageNet's; yields what it answers and was asked."""
    body = weights_file[0].read_bytes()
    monkeypatch.setattr(vgg, "SHA256", hashlib.sha256(body).hexdigest())
    answers = SimpleNamespace(body=body, asked=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            answers.asked.append(f"{self.command} {self.path}")
            found = self.path == f"/timm/vgg11.tv_in1k/resolve/{vgg.REVISION}/model.safetensors"
            self.send_response(200 if found else 404)
            self.send_header("X-Repo-Commit", vgg.REVISION)
            self.send_header("ETag", f'"{vgg.SHA256}"')
            self.send_header("Content-Length", str(len(answers.body) if found else 0))
            self.end_headers()
            return found

        def do_GET(self):
            if self.do_HEAD():
                self.wfile.write(answers.body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield answers
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


def test_imagenets_weights_are_downloaded_once_and_used_without_a_network_after(hub, monkeypatch, weights_file):
    path, _ = weights_file
    model, expected = unet(32, 3, 2, 2, encoder="vgg11"), unet(32, 3, 2, 2, encoder="vgg11")
    vgg.load_encoder(expected, str(path))
    loaded = vgg.load_encoder(model, "imagenet")
    assert loaded.name == "imagenet" and loaded.sha256 == vgg.SHA256 and vgg.REPOSITORY in loaded.description
    for one, two in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    asked = [request for request in hub.asked if request.startswith("GET") and "safetensors" in request]
    assert len(asked) == 1
    hub.asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert vgg.load_encoder(model, "imagenet") == loaded
    assert not hub.asked


def test_a_download_of_other_bytes_is_never_used(hub):
    model = unet(32, 3, 2, 2, encoder="vgg11")
    before = model.get_weights()
    good, hub.body = hub.body, hub.body[:-1] + bytes([hub.body[-1] ^ 1])
    with pytest.raises(InputError, match="published, received others") as error:
        vgg.load_encoder(model, "imagenet")
    assert error.value.code == "BAD_WEIGHTS"
    for one, two in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    # It says which file to delete, and that helps.
    hub.body = good
    Path(re.search(r"delete (\S+) and", error.value.sentence).group(1)).unlink()
    assert vgg.load_encoder(model, "imagenet").sha256 == vgg.SHA256


def test_without_a_network_imagenet_says_how_to_bring_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"timm/vgg11\.tv_in1k/model\.safetensors") as error:
        vgg.load_encoder(unet(32, 3, 2, 2, encoder="vgg11"), "imagenet")
    assert error.value.code == "WEIGHTS_UNAVAILABLE"
    assert "model.encoder_weights to that file" in error.value.sentence and "\n" not in error.value.sentence
