"""VGG11's pretrained weights for the U-Net's encoder, as safetensors in torchvision's layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from lvseg import command
from lvseg.errors import InputError
from lvseg.models.unet import VGG11_WIDTHS, encoder_layers

# ImageNet's weights as timm publishes them: the commit that added the file, and the hash that the hub shows for it.
REPOSITORY, FILE = "timm/vgg11.tv_in1k", "model.safetensors"
REVISION = "38b46049b490ec2bdb6d4d32b8354c74977f3347"
SHA256 = "682c023808812148d4e60c76d80ad83dbeaf5d50eb1a952a0b836895003151e5"
# ImageNet's mean and standard deviation over the three colours, the scale that the weights were trained on (0..1 in).
IMAGENET_MEAN, IMAGENET_SD = 0.449, 0.226
# Places of the convolutions in torchvision's `features`; between them lie ReLUs and poolings.
FEATURES = (0, 3, 6, 8, 11, 13, 16, 18)
COLOURS = 3
# The one key of the files' metadata that is ours; safetensors writes several in another order every time.
METADATA = "lvseg"
# Of what stands there, whom the encoder was shown.
SHOWN, PARTS = ("split", "scans_sha256"), ("train", "validation")


class EncoderWeights(NamedTuple):
    """What an encoder started from, for the results that were got with it.

    name: "imagenet", a file's name, or "none"; sha256: of the file, None without one; description: a sentence;
    split, scans_sha256: ids of the patients that it was trained and chosen on ("train", "validation"), and digests of
    their scans; None where the file does not say.
    """

    name: str
    sha256: str | None
    description: str
    split: dict[str, list[str]] | None = None
    scans_sha256: dict[str, list[str]] | None = None

    def facts(self) -> dict[str, Any]:
        """What a manifest keeps, JSON-able."""
        return {key: value for key, value in self._asdict().items() if key not in SHOWN or value is not None}


def load_encoder(model: keras.Model, weights: str) -> EncoderWeights:
    """Puts pretrained weights into the encoder of `unet(encoder="vgg11")`.

    Three channels take the three colours' kernels as they are; any other number gets their sum divided evenly, so that
    equal slices give the response of a grey picture.

    Args:
        model: built with encoder="vgg11".
        weights: "imagenet" (downloaded once and kept by huggingface_hub), a .safetensors file, or "none".

    Raises:
        InputError: WEIGHTS_UNAVAILABLE; BAD_WEIGHTS for a damaged file or other tensors than VGG11's, in which case
            the model is as it was.
    """
    if weights == "none":
        return EncoderWeights("none", None, "started at random")
    imagenet = weights == "imagenet"
    path = _download() if imagenet else Path(weights)
    if not path.is_file():
        raise InputError(
            "WEIGHTS_UNAVAILABLE", f"Expected a .safetensors file in model.encoder_weights, received {path}."
        )
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if imagenet and sha256 != SHA256:
        raise InputError(
            "BAD_WEIGHTS",
            f"Expected the bytes of {REPOSITORY}/{FILE} that were published, received others; delete {path.resolve()}"
            " and try again.",
        )
    tensors, facts = _read(path)
    for place, layer in zip(FEATURES, encoder_layers(model), strict=True):
        kernel, bias = tensors[f"features.{place}.weight"].transpose(2, 3, 1, 0), tensors[f"features.{place}.bias"]
        channels = layer.kernel.shape[2]
        if channels != kernel.shape[2]:  # only in the first layer, which sees slices
            kernel = np.repeat(kernel.sum(axis=2, keepdims=True) / channels, channels, axis=2)
        layer.set_weights([kernel, bias])
    if imagenet:
        return EncoderWeights("imagenet", sha256, f"{REPOSITORY} at {REVISION}")
    return EncoderWeights(path.name, sha256, **facts)


def save_encoder(model: keras.Model, path: Path, description: str, metadata: Mapping[str, Any]) -> None:
    """Writes a model's encoder so that `load_encoder` finds the same weights again; the same bytes every time.

    Args:
        model: built with encoder="vgg11", whose first kernels have three channels.
        path: .safetensors, written whole or not at all.
        description: a sentence for people; metadata: JSON-able facts. Both travel in the file, under the key "lvseg".

    Raises:
        ValueError: for first kernels of another number of channels.
    """
    tensors = {}
    for place, layer in zip(FEATURES, encoder_layers(model), strict=True):
        kernel, bias = layer.get_weights()
        tensors[f"features.{place}.weight"] = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
        tensors[f"features.{place}.bias"] = bias
    channels = tensors["features.0.weight"].shape[1]
    if channels != COLOURS:
        raise ValueError(f"Expected first kernels of {COLOURS} channels, received {channels}.")
    facts = json.dumps({**metadata, "description": description}, sort_keys=True)
    with command.atomic(path) as temporary:
        # Not by save_file, whose files nobody else may read.
        temporary.write_bytes(safetensors.numpy.save(tensors, {METADATA: facts}))


def _read(path: Path) -> tuple[dict[str, npt.NDArray[np.float32]], dict[str, Any]]:
    """VGG11's tensors of a file, checked, and what the file says of itself; a classifier's stay out."""
    shapes: dict[str, tuple[int, ...]] = {}
    channels = COLOURS
    for place, count in zip(FEATURES, [count for widths in VGG11_WIDTHS for count in widths], strict=True):
        shapes[f"features.{place}.weight"], shapes[f"features.{place}.bias"] = (count, channels, 3, 3), (count,)
        channels = count
    tensors = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
            for name, shape in shapes.items():
                if name not in names:
                    raise InputError("BAD_WEIGHTS", f"Expected the tensor {name}, received none in {path}.")
                found = file.get_slice(name)
                if tuple(found.get_shape()) != shape or found.get_dtype() != "F32":
                    raise InputError(
                        "BAD_WEIGHTS",
                        f"Expected {name} to be F32 of shape {shape}, received {found.get_dtype()} of"
                        f" {tuple(found.get_shape())} in {path}.",
                    )
                tensors[name] = file.get_tensor(name)
                if not np.isfinite(tensors[name]).all():
                    raise InputError("BAD_WEIGHTS", f"Expected finite numbers in {name}, received others in {path}.")
    except safetensors.SafetensorError as error:
        raise InputError("BAD_WEIGHTS", f"Expected a safetensors file, received something else in {path}.") from error
    try:
        said = json.loads(metadata[METADATA])
        facts: dict[str, Any] = {"description": str(said["description"])}
        facts |= {key: {part: [*map(str, said[key][part])] for part in PARTS} for key in SHOWN if key in said}
    except (KeyError, ValueError, TypeError):
        facts = {"description": "a file that does not say where it comes from"}
    return tensors, facts


def _download() -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(REPOSITORY, FILE, revision=REVISION))
    except Exception as error:  # the library raises many kinds for "no network"; all mean the same to the user
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InputError(
            "WEIGHTS_UNAVAILABLE",
            f"Expected to download ImageNet weights ({REPOSITORY}/{FILE}), received {reason}; set"
            " model.encoder_weights to that file brought by hand, to one that lvseg.pretrain wrote, or to none, or"
            " model.encoder to null.",
        ) from error
