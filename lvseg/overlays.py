"""Pictures of a segmentation over its scan, in the report's colours.

Axes. Pictures show canonical volumes [slice, row, column] as radiologists look at them, from the feet and from the
front: the patient's right is on the left of the picture. Axial: rows downwards (front at the top), columns to the
right. Coronal: slices upwards (head at the top), columns to the right. Both in millimetres, at one scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

from lvseg.command import atomic
from lvseg.volume import Volume

Array = npt.NDArray[Any]

Rgb = tuple[int, int, int]


class Palette(NamedTuple):
    """Colours of a mask over the truth: where they agree, what the mask misses, and what it has too much."""

    agreement: Rgb
    missed: Rgb
    excess: Rgb
    names: tuple[str, str, str]


# The report's figures 7 and 12; and those three of Okabe and Ito's that colour-blind readers tell apart best, and that
# differ in lightness too.
REPORT_COLOURS = Palette((170, 0, 200), (255, 40, 40), (40, 110, 255), ("purple", "red", "blue"))
COLOUR_BLIND = Palette((86, 180, 233), (213, 94, 0), (240, 228, 66), ("light blue", "vermilion", "yellow"))
PALETTES = {"report": REPORT_COLOURS, "colour_blind": COLOUR_BLIND}
OPACITY = 0.5
# Intensities between these percentiles spread over the grey levels, so that a few bright vessels do not darken all.
WINDOW_PERCENTILES = (0.5, 99.5)
AXIAL_AT = (0.25, 0.5, 0.75)  # of the organ's extent
SCALE_BAR_MM = 50.0
PANEL_WIDTH_INCH = 3.2
STRIP_HEIGHT = 160  # pixels
TALLEST_PANEL = 3.0  # times its width; a scan of few columns would make a picture of any height


def overlay_rgb(
    slice_image: Array,
    predicted: Array,
    true: Array,
    window: tuple[float, float] | None = None,
    palette: Palette = REPORT_COLOURS,
) -> npt.NDArray[np.uint8]:
    """Colours a prediction and the truth over a grey slice: by default purple agreement, red missed, blue too much.

    Args:
        slice_image: real [..., H, W].
        predicted: bool [..., H, W].
        true: bool [..., H, W].
        window: intensities shown black and white; None takes the 0.5 and 99.5 percentiles of each [H, W] by itself.
        palette: of `PALETTES`.

    Returns:
        uint8 [..., H, W, 3].

    Raises:
        ValueError: for shapes that differ.
    """
    if not slice_image.shape == predicted.shape == true.shape:
        raise ValueError(
            f"Expected one shape, received {slice_image.shape} (image), {predicted.shape} (predicted) and"
            f" {true.shape} (true)."
        )
    image = np.asarray(slice_image, np.float32)
    if window is None:
        low, high = np.percentile(image, WINDOW_PERCENTILES, axis=(-2, -1), keepdims=True)
    else:
        low, high = np.float32(window[0]), np.float32(window[1])
    width = np.where(high > low, high - low, 1)  # an image of one intensity has no window, and is black
    rgb = np.repeat(255 * np.clip((image - low) / width, 0, 1)[..., np.newaxis], 3, axis=-1)
    predicted, true = predicted.astype(bool), true.astype(bool)
    for where, colour in (
        (predicted & true, palette.agreement),
        (~predicted & true, palette.missed),
        (predicted & ~true, palette.excess),
    ):
        rgb[where] = (1 - OPACITY) * rgb[where] + OPACITY * np.array(colour)
    return np.rint(rgb).astype(np.uint8)


def overlay_figure(
    image: Volume,
    predicted: Volume,
    true: Volume,
    path: Path,
    title: str,
    label: int = 1,
    palette: Palette = REPORT_COLOURS,
) -> None:
    """Writes one picture of a patient: three axial slices and a coronal one, with prediction and truth over the scan.

    The axial slices lie at 25, 50 and 75 % of the organ's extent, the coronal one at 50 %; the organ is what either
    mask calls so, and the whole scan where neither does.

    Args:
        image: the scan, in any orientation.
        predicted: the predicted mask on the scan's grid, integer or bool.
        true: the true mask on the scan's grid, integer or bool.
        path: the PNG; written whole or not at all, folders made as needed.
        title: stands above the picture.
        label: the class that is shown; palette: of `PALETTES`.

    Raises:
        ValueError: for masks on another grid than the scan's.
    """
    for name, mask in (("predicted", predicted), ("true", true)):
        if mask.shape != image.shape or not np.allclose(mask.affine, image.affine, atol=1e-3):
            raise ValueError(
                f"Expected masks on the scan's grid, shape={image.shape} and affine={image.affine.tolist()}, received"
                f" {name} with shape={mask.shape} and affine={mask.affine.tolist()}."
            )
    scan = image.canonical()
    found, truth = predicted.canonical().voxels == label, true.canonical().voxels == label
    slice_mm, row_mm, column_mm = scan.spacing_mm
    low, high = np.percentile(scan.voxels, WINDOW_PERCENTILES)
    window = (float(low), float(high))

    organ = found | truth
    slices, row = _at_extent(organ, 0, AXIAL_AT), _at_extent(organ, 1, (0.5,))[0]
    panels = [(f"slice {index + 1} of {scan.shape[0]}", np.s_[index], row_mm) for index in slices] + [
        (f"coronal, row {row + 1} of {scan.shape[1]}", np.s_[::-1, row], slice_mm)
    ]

    heights = [scan.voxels[where].shape[0] * pixel_mm for _, where, pixel_mm in panels]
    panel_height = PANEL_WIDTH_INCH * min(max(heights) / (scan.shape[2] * column_mm), TALLEST_PANEL)
    figure = Figure(
        figsize=(PANEL_WIDTH_INCH * len(panels), panel_height + 1.1), facecolor="black", layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title, color="white", parse_math=False)  # a "$" in a file's name is no formula
    for axes, (name, where, pixel_mm) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        rgb = overlay_rgb(scan.voxels[where], found[where], truth[where], window, palette)
        _show(axes, rgb, pixel_mm, column_mm, name)
    names = ("agreement", "under-segmentation", "over-segmentation")
    colours = list(zip(names, palette[:3], strict=True))
    figure.legend(
        handles=[Patch(color=(red / 255, green / 255, blue / 255), label=name) for name, (red, green, blue) in colours],
        loc="outside lower center",
        ncols=len(colours),
        frameon=False,
        labelcolor="white",
    )
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def strip(image: Volume, predicted: Volume, true: Volume, path: Path, palette: Palette = REPORT_COLOURS) -> None:
    """Writes a small JPEG of a patient for lists: three axial slices and a coronal one, as `overlay_figure` has them.

    Args:
        image: the scan, in any orientation; predicted, true: masks on its grid, every class above 0 counts.
        path: the JPEG; written whole or not at all; palette: of `PALETTES`.
    """
    scan = image.canonical()
    found, truth = predicted.canonical().voxels > 0, true.canonical().voxels > 0
    slice_mm, row_mm, column_mm = scan.spacing_mm
    low, high = np.percentile(scan.voxels, WINDOW_PERCENTILES)
    organ = found | truth
    where: list[tuple[Any, float]] = [(np.s_[index], row_mm) for index in _at_extent(organ, 0, AXIAL_AT)]
    where.append((np.s_[::-1, _at_extent(organ, 1, (0.5,))[0]], slice_mm))
    panels = []
    for chosen, down_mm in where:
        rgb = overlay_rgb(scan.voxels[chosen], found[chosen], truth[chosen], (float(low), float(high)), palette)
        across = STRIP_HEIGHT * rgb.shape[1] * column_mm / (rgb.shape[0] * down_mm)
        size = (round(min(max(across, STRIP_HEIGHT / 2), 2 * STRIP_HEIGHT)), STRIP_HEIGHT)
        panels.append(np.array(PIL.Image.fromarray(rgb).resize(size, PIL.Image.Resampling.BILINEAR)))
    with atomic(path) as temporary:
        PIL.Image.fromarray(np.concatenate(panels, axis=1)).save(temporary, "JPEG", quality=85, subsampling=0)


def _at_extent(organ: npt.NDArray[np.bool_], axis: int, fractions: tuple[float, ...]) -> list[int]:
    """Indices along an axis at fractions of the organ's extent; of the whole axis where there is no organ."""
    others = tuple({0, 1, 2} - {axis})
    inside = np.flatnonzero(organ.any(axis=others))
    first, last = (inside[0], inside[-1]) if inside.size else (0, organ.shape[axis] - 1)
    return [round(first + fraction * (last - first)) for fraction in fractions]


def _show(axes: Axes, rgb: npt.NDArray[np.uint8], down_mm: float, across_mm: float, name: str) -> None:
    """Draws one picture [H, W, 3] in mm, with its sides named and a scale bar."""
    height_mm, width_mm = rgb.shape[0] * down_mm, rgb.shape[1] * across_mm
    axes.imshow(rgb, extent=(0, width_mm, height_mm, 0), interpolation="nearest")
    axes.set_title(name, color="white", fontsize="small")
    axes.axis("off")
    # White with a black edge is readable over air and over fat.
    style: dict[str, Any] = {"color": "white", "path_effects": [withStroke(linewidth=2, foreground="black")]}
    for side, x, align in (("R", 0.02, "left"), ("L", 0.98, "right")):
        axes.text(x, 0.97, side, ha=align, va="top", transform=axes.transAxes, **style)
    margin_mm, thickness_mm = 0.04 * width_mm, 0.012 * width_mm
    corner_mm = (margin_mm, height_mm - margin_mm)
    axes.add_patch(Rectangle(corner_mm, SCALE_BAR_MM, thickness_mm, facecolor="white", edgecolor="none"))
    axes.text(margin_mm, height_mm - 1.3 * margin_mm, f"{SCALE_BAR_MM / 10:g} cm", fontsize="small", **style)
