"""VGG11's ImageNet weights for the U-Net's encoder, in torchvision's layout as timm publishes it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import keras
import numpy as np
import safetensors
import safetensors.numpy

from lvseg.errors import InputError
from lvseg.models.unet import VGG11_WIDTHS

REPOSITORY, FILE = "timm/vgg11.tv_in1k", "model.safetensors"
# ImageNet's mean and standard deviation over the three colours, the scale that the weights were trained on (0..1 in).
IMAGENET_MEAN, IMAGENET_SD = 0.449, 0.226
# Places of the convolutions in torchvision's `features`; between them lie ReLUs and poolings.
FEATURES = (0, 3, 6, 8, 11, 13, 16, 18)


def load_encoder(model: keras.Model, weights: str) -> str | None:
    """Puts pretrained weights into the encoder of `unet(encoder="vgg11")`.

    Three channels take the three colours' kernels as they are; any other number gets their sum divided evenly, so that
    equal slices give the response of a grey picture.

    Args:
        model: built with encoder="vgg11".
        weights: "imagenet" (downloaded once and kept by huggingface_hub), a .safetensors file, or "none".

    Returns:
        sha256 of the file, or None for "none".

    Raises:
        InputError: WEIGHTS_UNAVAILABLE, BAD_WEIGHTS.
    """
    if weights == "none":
        return None
    path = _download() if weights == "imagenet" else Path(weights)
    if not path.is_file():
        raise InputError(
            "WEIGHTS_UNAVAILABLE", f"Expected a .safetensors file in model.encoder_weights, received {path}."
        )
    try:
        tensors = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise InputError("BAD_WEIGHTS", f"Expected a safetensors file, received something else in {path}.") from error
    names = [
        f"enc{level}_conv{number}"
        for level, filters in enumerate(VGG11_WIDTHS, start=1)
        for number in range(1, len(filters) + 1)
    ]
    for name, place in zip(names, FEATURES, strict=True):
        layer = model.get_layer(name)
        kernel_shape = tuple(layer.kernel.shape)
        try:
            kernel = tensors[f"features.{place}.weight"].transpose(2, 3, 1, 0)
            bias = tensors[f"features.{place}.bias"]
        except KeyError as error:
            raise InputError("BAD_WEIGHTS", f"Expected the tensor {error.args[0]}, received none in {path}.") from error
        if place == 0 and kernel_shape[2] != kernel.shape[2]:
            kernel = np.repeat(kernel.sum(axis=2, keepdims=True) / kernel_shape[2], kernel_shape[2], axis=2)
        if kernel.shape != kernel_shape:
            raise InputError(
                "BAD_WEIGHTS",
                f"Expected features.{place}.weight to fit {kernel_shape}, received {kernel.shape} in {path}.",
            )
        layer.set_weights([kernel.astype(np.float32), bias.astype(np.float32)])
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download() -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(REPOSITORY, FILE))
    except Exception as error:  # the library raises many kinds for "no network"; all mean the same to the user
        raise InputError(
            "WEIGHTS_UNAVAILABLE",
            f"Expected to download ImageNet weights ({REPOSITORY}/{FILE}), received {type(error).__name__}; set"
            " model.encoder_weights to that file brought by hand, or to none, or model.encoder to null.",
        ) from error
