"""One picture of twelve simulated patients under every protocol, to judge by eye.

Axes. Canonical volumes as radiologists look at them: from the feet, the patient's right on the left of the picture, the
front at the top; coronal from the front, the head at the top. Pixels are shown at their size in millimetres, all at one
scale.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import numpy.typing as npt

from lvseg.command import atomic, run
from lvseg.phantom.anatomy import WHOLE_LIVER, Tissue
from lvseg.phantom.scan import Scan
from lvseg.phantom.simulate import PROTOCOLS

SEED = 21
SHOWN_MM = (290.0, 390.0)  # height and width of a panel
CORONAL_AT = 0.42  # of the way from the front of the image to its back
CT_WINDOW_HU = (-160.0, 240.0)
WINDOW_PERCENTILE = 99.7
OUTLINED, OUTLINE = "fat fraction", "#ff4040"
COLOURS = 160  # of the palette: nearly all is grey


@dataclass(frozen=True)
class Panel:
    """One picture: a protocol, the patient's number, what of the scan, and where.

    Args:
        where: "lesion", the slice with most of a cyst or lesion; "coronal"; else a share of the liver's height.
    """

    protocol: str
    number: int
    image: str
    where: str | float
    caption: str


HILUM, DOME = 0.42, 0.74
PANELS = (
    (
        Panel("philips_volume", 20, "image", HILUM, "1.5 T THRIVE, fat suppressed T1"),
        Panel("philips_volume", 20, "image", DOME, "the same patient, slim"),
        Panel("philips_volume", 15, "image", HILUM, "1.5 T THRIVE, obese"),
        Panel("philips_volume", 15, "image", DOME, "the same patient"),
        Panel("philips_volume", 39, "image", "lesion", "1.5 T THRIVE, cyst"),
        Panel("philips_volume", 39, "image", "coronal", "the same patient, coronal"),
    ),
    (
        Panel("ge_volume", 21, "image", HILUM, "3 T water image, large liver"),
        Panel("ge_volume", 21, "image", DOME, "the same patient"),
        Panel("ge_volume", 33, "image", HILUM, "3 T water image"),
        Panel("ge_volume", 33, "image", DOME, "the same patient"),
        Panel("ge_volume", 9, "image", "lesion", "3 T water image, cyst and lesion"),
        Panel("ge_volume", 9, "image", "coronal", "the same patient, coronal"),
    ),
    (
        Panel("philips_fat", 3, "water", HILUM, "1.5 T six echoes: water"),
        Panel("philips_fat", 3, "fat", HILUM, "fat"),
        Panel("philips_fat", 3, "image", HILUM, OUTLINED),
        Panel("ge_fat", 36, "water", HILUM, "3 T six echoes: water"),
        Panel("ge_fat", 36, "fat", HILUM, "fat"),
        Panel("ge_fat", 36, "image", HILUM, OUTLINED),
    ),
    (
        Panel("siemens_volume", 30, "image", "lesion", "3 T VIBE opposed phase, lesion"),
        Panel("siemens_volume", 30, "image", "coronal", "the same patient, coronal"),
        Panel("siemens_fat", 30, "image", "lesion", OUTLINED),
        Panel("ct_liver", 16, "image", HILUM, "CT, liver"),
        Panel("ct_abdomen", 27, "image", HILUM, "CT, abdomen"),
        Panel("ct_thigh", 26, "image", HILUM, "CT, thighs"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lvseg.phantom.gallery",
        description=__doc__,
        epilog="example: python -m lvseg.phantom.gallery --out docs/simulated_patients.png",
    )
    parser.add_argument("--out", required=True, type=Path, help="a .png file")
    parser.add_argument("--jobs", type=int, default=-1, help="processes (default: one a core)")
    return run(parser, _body, argv)


def _body(arguments: argparse.Namespace) -> None:
    wanted = list(dict.fromkeys((panel.protocol, panel.number) for row in PANELS for panel in row))
    scans = joblib.Parallel(n_jobs=arguments.jobs)(
        joblib.delayed(PROTOCOLS[protocol].image)(SEED, number) for protocol, number in wanted
    )
    draw_gallery(dict(zip(wanted, scans, strict=True)), arguments.out)
    patients = len({number for _, number in wanted})
    print(f"{patients} patients, {len(wanted)} scans are in {arguments.out}")


def draw_gallery(scans: dict[tuple[str, int], Scan], path: Path) -> None:
    """Draws `PANELS` and writes them as one PNG with few colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    columns = len(PANELS[0])
    width_inch = 2.55
    height_inch = width_inch * SHOWN_MM[0] / SHOWN_MM[1] + 0.33
    figure = Figure(figsize=(columns * width_inch, len(PANELS) * height_inch), facecolor="black", dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(PANELS), columns, squeeze=False)
    for row, panels in zip(axes, PANELS, strict=True):
        for axis, panel in zip(row, panels, strict=True):
            _draw_panel(axis, panel, scans[panel.protocol, panel.number])
    figure.subplots_adjust(0.004, 0.004, 0.996, 0.965, 0.02, 0.16)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    with atomic(path) as temporary:
        picture.quantize(COLOURS, dither=Image.Dither.NONE).save(temporary, optimize=True)


def _draw_panel(axis: Any, panel: Panel, scan: Scan) -> None:
    image = scan.images[panel.image].canonical()
    tissues, mask = scan.tissues.canonical().voxels, scan.mask.canonical().voxels
    picture, outline, spacing_mm = _cut(panel, image.voxels, tissues, mask, image.spacing_mm)
    low, high = _window(panel, image.voxels)
    tall, wide = (count * spacing for count, spacing in zip(picture.shape, spacing_mm, strict=True))
    extent = (-0.5 * wide, 0.5 * wide, 0.5 * tall, -0.5 * tall)
    axis.set_facecolor("black")
    axis.imshow(picture, cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="bilinear")
    if panel.caption == OUTLINED and outline.any():
        rows, columns = (
            (np.arange(count) - 0.5 * (count - 1)) * spacing
            for count, spacing in zip(picture.shape, spacing_mm, strict=True)
        )
        axis.contour(columns, rows, outline, [0.5], colors=OUTLINE, linewidths=0.8)
    axis.set_xlim(-0.5 * SHOWN_MM[1], 0.5 * SHOWN_MM[1])
    axis.set_ylim(0.5 * SHOWN_MM[0], -0.5 * SHOWN_MM[0])
    axis.set_xticks([])
    axis.set_yticks([])
    text = f"{panel.protocol} {panel.number}: {panel.caption}"
    if panel.caption == OUTLINED:
        text += f", liver {scan.truth['liver_fat_percent']:.1f} %"
    axis.set_title(text, color="white", fontsize=6.5, pad=2)


def _cut(
    panel: Panel,
    voxels: npt.NDArray[Any],
    tissues: npt.NDArray[np.uint8],
    mask: npt.NDArray[np.uint8],
    spacing_mm: tuple[float, float, float],
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8], tuple[float, float]]:
    """The slice to show of a canonical volume, the mask in it, and the spacing of its rows and columns."""
    if panel.where == "coronal":
        row = round(CORONAL_AT * voxels.shape[1])
        return voxels[::-1, row], mask[::-1, row], (spacing_mm[0], spacing_mm[2])
    index = 0
    if panel.where == "lesion":
        index = int(np.isin(tissues, (Tissue.CYST, Tissue.LESION)).sum(axis=(1, 2)).argmax())
    elif len(voxels) > 1:
        liver = np.flatnonzero(np.isin(tissues, WHOLE_LIVER).any(axis=(1, 2)))
        index = round(float(liver[0] + float(panel.where) * (liver[-1] - liver[0])))
    return voxels[index], mask[index], (spacing_mm[1], spacing_mm[2])


def _window(panel: Panel, voxels: npt.NDArray[Any]) -> tuple[float, float]:
    if panel.protocol.startswith("ct_"):
        return CT_WINDOW_HU
    if panel.caption == OUTLINED:
        return 0.0, 100.0
    return 0.0, 1.1 * float(np.percentile(voxels, WINDOW_PERCENTILE))


if __name__ == "__main__":
    sys.exit(main())
