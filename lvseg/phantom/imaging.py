"""What happens between tissue and file: where the stack lies, partial volume, field, coils, breathing, noise, storage.

Axes. Everything here is on canonical grids: [slice, row, column] = [z, y, x], towards head, back and the patient's
left, in the patient's own millimetres (`lvseg.phantom.anatomy`). `stored` alone knows how the scanner holds its arrays
and how the patient lay in it.

What is computed for every voxel is float32 additions, multiplications, divisions and square roots, which IEEE 754
rounds the same way on every machine. The coarse fields they start from are float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lvseg.phantom.anatomy import WHOLE_LIVER, Anatomy, Tissue
from lvseg.phantom.physics import field_of_susceptibility_ppm, susceptibility_ppm
from lvseg.phantom.shapes import Point
from lvseg.volume import Volume

Reals = npt.NDArray[np.float32]
Axis = npt.NDArray[np.float64]
SURVEY_MM = (5.0, 8.0, 8.0)
SURVEY_FROM_MM, SURVEY_COUNT = (-225.0, -208.0, -264.0), (100, 53, 67)
FIELD_ROOM = ((24, 24), (14, 13), (15, 14))  # samples around the survey, so that the repeated box is far away
TEXTURE_SPACING_MM = 9.0
POINT_SPREAD = (0.10, 0.80, 0.10)  # of the in-plane acquisition, in pixels
MOVING_DEPTH_MM = (
    30.0,
    75.0,
)  # behind the front of the body: the wall before the first moves, behind the second nothing

# How uneven a tissue looks at the scale of some voxels, relative to its brightness; 0.03 where not listed.
TEXTURE = {
    Tissue.FAT: 0.06, Tissue.VISCERAL_FAT: 0.12, Tissue.MUSCLE: 0.08, Tissue.MARROW: 0.12, Tissue.LUNG: 0.45,
    Tissue.HEART: 0.10, Tissue.BLOOD: 0.06, Tissue.LIVER: 0.02, Tissue.FOCAL_FAT: 0.02, Tissue.STOMACH_CONTENT: 0.20,
    Tissue.BOWEL: 0.15, Tissue.BOWEL_CONTENT: 0.30, Tissue.PANCREAS: 0.12,
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """Voxel centres: ascending millimetres of slices (z), rows (y) and columns (x), evenly spaced."""

    z: Axis
    y: Axis
    x: Axis

    @property
    def axes(self) -> tuple[Axis, Axis, Axis]:
        """(z, y, x)."""
        return self.z, self.y, self.x

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """(slice, row, column)."""
        dz, dy, dx = (float(axis[1] - axis[0]) for axis in self.axes)
        return dz, dy, dx

    @property
    def shape(self) -> tuple[int, int, int]:
        """[slices, rows, columns]."""
        return len(self.z), len(self.y), len(self.x)


@dataclass(frozen=True)
class Survey:
    """The first quick look at a patient, from which an operator places the stack: uint8 [z, y, x] of tissues."""

    tissues: npt.NDArray[np.uint8]
    z: Axis
    y: Axis
    x: Axis

    def liver_mm(self) -> tuple[float, float]:
        """Lowest and highest z of the liver."""
        inside = self.z[np.isin(self.tissues, WHOLE_LIVER).any(axis=(1, 2))]
        return float(inside[0]), float(inside[-1])

    def body_mm(self) -> tuple[float, float]:
        """Foremost and hindmost y of the body at the liver."""
        low, high = self.liver_mm()
        near = self.tissues[(self.z >= low) & (self.z <= high)]
        inside = self.y[(near != Tissue.AIR).any(axis=(0, 2))]
        return float(inside[0]), float(inside[-1])


def survey(anatomy: Anatomy) -> Survey:
    """Looks at a patient on a coarse grid."""
    z, y, x = (
        first + step * np.arange(count)
        for first, step, count in zip(SURVEY_FROM_MM, SURVEY_MM, SURVEY_COUNT, strict=True)
    )
    return Survey(anatomy.tissues(x, y, z), z, y, x)


def place(
    looked: Survey,
    counts: Sequence[int],
    spacing_mm: Sequence[float],
    draw: np.random.Generator,
    at: float | None = None,
) -> Grid:
    """The operator's stack: slices about the liver's middle, body in the middle of the image, to some millimetres.

    A liver higher than the stack loses its lower tip rather than its dome, unless `at` (0 to 1 of the liver's height)
    says where the stack's middle is to lie.
    """
    low, high = looked.liver_mm()
    front, back = looked.body_mm()
    off = (draw.uniform(-4, 4), draw.uniform(-8, 8), draw.uniform(-6, 6))
    reach = 0.5 * counts[0] * spacing_mm[0]
    centre_z = (max(0.5 * (low + high), high + 6.0 - reach) if at is None else low + at * (high - low)) + off[0]
    centres = (centre_z, 0.5 * (front + back) + off[1], off[2])
    axes = []
    for count, spacing, centre in zip(counts, spacing_mm, centres, strict=True):
        # Scanners report positions to some decimals; thousandths also survive the float32 of file headers.
        axes.append(round(centre - 0.5 * (count - 1) * spacing, 3) + np.arange(count) * spacing)
    return Grid(*axes)


def sample(
    anatomy: Anatomy, grid: Grid, tables: npt.NDArray[np.floating]
) -> tuple[Reals, npt.NDArray[np.uint8], float]:
    """Maps of what the tissues in each voxel have on average.

    A voxel is sampled at its centre, which decides its label and counts half, and at its eight corners, which it shares
    with its neighbours: nine samples for the price of two. Along each axis that is the trapezoidal rule over the voxel.

    Args:
        tables: [maps, tissues], a value a tissue for each map.

    Returns:
        maps: float32 [maps, slices, rows, columns].
        tissues: uint8 [slices, rows, columns] at the voxel centres.
        liver_ml: volume of the whole liver within the stack, from all samples.
    """
    values = tables.astype(np.float32)
    tissues = anatomy.tissues(grid.x, grid.y, grid.z)
    halves = [
        np.append(axis - 0.5 * step, axis[-1] + 0.5 * step)
        for axis, step in zip(grid.axes, grid.spacing_mm, strict=True)
    ]
    corners = anatomy.tissues(*halves[::-1])
    maps = np.empty((len(tables), *grid.shape), dtype=np.float32)
    for map_, table in zip(maps, values, strict=True):
        below = _means_of_four(table.take(corners[0]))
        for index, codes in enumerate(tissues):
            above = _means_of_four(table.take(corners[index + 1]))
            below += above
            below *= np.float32(0.25)
            np.multiply(table.take(codes), np.float32(0.5), out=map_[index])
            map_[index] += below
            below = above
    liver = np.zeros(len(Tissue), dtype=bool)
    liver[list(WHOLE_LIVER)] = True
    weights = [np.append(np.r_[0.5, np.ones(count - 1)], 0.5) for count in grid.shape]
    at_corners = float(np.einsum("zyx,z,y,x->", liver[corners], *weights))
    voxels = 0.5 * (np.count_nonzero(liver[tissues]) + at_corners)
    return maps, tissues, voxels * float(np.prod(grid.spacing_mm)) / 1000.0


def _means_of_four(plane: Reals) -> Reals:
    """Means over each square of four neighbours, float32 [rows - 1, columns - 1]."""
    pairs = plane[:-1] + plane[1:]
    means = pairs[:, :-1] + pairs[:, 1:]
    means *= np.float32(0.25)
    return means


def blur_by_breathing(maps: Reals, slice_mm: float, breathing_mm: float) -> None:
    """Spreads signal to the neighbouring slices, in place, as a diaphragm that moves evenly over this way does."""
    # The variance of an even distribution is its width squared / 12; that of the kernel below, 2 share slice_mm^2.
    share = min(breathing_mm**2 / (24.0 * slice_mm**2), 1.0 / 3.0)
    if share == 0:
        return
    for map_ in maps:
        before = map_[0].copy()
        for index in range(len(map_)):
            here = map_[index].copy()
            after = map_[min(index + 1, len(map_) - 1)]
            map_[index] = here * np.float32(1.0 - 2.0 * share) + (before + after) * np.float32(share)
            before = here


class Smooth:
    """A coarse field as a linear interpolation, made slice by slice."""

    def __init__(self, values: npt.NDArray[np.float64], own: Sequence[Axis], grid: Grid) -> None:
        """`values` float64 [z, y, x] at the evenly spaced positions `own`; the outermost hold beyond them."""
        (self._below, self._share), rows, columns = (_linear(axis, at) for axis, at in zip(own, grid.axes, strict=True))
        self._planes = _between(np.moveaxis(_between(values, *columns), 1, 2), *rows).astype(np.float32)
        self._planes = np.ascontiguousarray(self._planes.transpose(0, 2, 1))

    def slice(self, index: int) -> Reals:
        """float32 [rows, columns]."""
        below, share = self._below[index], np.float32(self._share[index])
        return self._planes[below] * (np.float32(1.0) - share) + self._planes[below + 1] * share

    def __iter__(self) -> Iterator[Reals]:
        return (self.slice(index) for index in range(len(self._below)))


def _linear(own: Axis, at: Axis) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """For each position the index of the value below it, and the share of the one above."""
    position = np.clip((at - own[0]) / (own[1] - own[0]), 0.0, len(own) - 1.0)
    below = np.minimum(position.astype(np.intp), len(own) - 2)
    return below, position - below


def _between(
    values: npt.NDArray[np.float64], below: npt.NDArray[np.intp], share: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Linear interpolation along the last axis."""
    return values[..., below] * (1.0 - share) + values[..., below + 1] * share


def random_smooth(grid: Grid, spacing_mm: float, draw: np.random.Generator) -> Smooth:
    """Normal random values with standard deviation 1 at points `spacing_mm` apart, and linear between."""
    own = [axis[0] + spacing_mm * np.arange(round(float(axis[-1] - axis[0]) / spacing_mm) + 2) for axis in grid.axes]
    return Smooth(draw.standard_normal([len(axis) for axis in own]), own, grid)


def off_resonance_ppm(looked: Survey, grid: Grid) -> Smooth:
    """The main field in the patient, as air, lung and gas leave it after the scanner's shim of the stack.

    The shim takes away what a second-order polynomial can.
    """
    thinned = looked.tissues[::2]
    spacing = (2 * SURVEY_MM[0], SURVEY_MM[1], SURVEY_MM[2])
    below, *others = FIELD_ROOM
    room = np.pad(susceptibility_ppm(thinned), (below, (0, 0), (0, 0)), mode="edge")  # the body goes on
    room = np.pad(room, ((0, 0), *others), mode="edge")  # air
    field = field_of_susceptibility_ppm(room, spacing)
    field = field[
        tuple(slice(before, size - after) for (before, after), size in zip(FIELD_ROOM, room.shape, strict=True))
    ]
    own = (looked.z[::2], looked.y, looked.x)

    z, y, x = np.meshgrid(*(axis / 100.0 for axis in own), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, z, x * x, y * y, z * z, x * y, y * z, z * x], axis=-1)
    tissue = (thinned != Tissue.AIR) & (thinned != Tissue.LUNG) & (thinned != Tissue.GAS)
    tissue &= ((own[0] >= grid.z[0]) & (own[0] <= grid.z[-1]))[:, None, None]
    # Normal equations by einsum's own loops, and coefficients rounded far above what the solver rounds off: the shim is
    # the same whatever linear algebra library solves it.
    among, of_field = terms[tissue], field[tissue]
    shim = np.linalg.solve(np.einsum("nk,nl->kl", among, among), np.einsum("nk,n->k", among, of_field))
    return Smooth(field - np.einsum("zyxk,k->zyx", terms, np.round(shim, 6)), own, grid)


def add_texture(maps: Reals, tissues: npt.NDArray[np.uint8], grid: Grid, draw: np.random.Generator) -> None:
    """Multiplies all maps by 1 plus one smooth random field, as strong as each tissue is uneven."""
    strength = np.array([TEXTURE.get(tissue, 0.03) for tissue in Tissue], dtype=np.float32)
    for index, field in enumerate(random_smooth(grid, TEXTURE_SPACING_MM, draw)):
        field *= strength.take(tissues[index])
        field += np.float32(1.0)
        np.maximum(field, np.float32(0.0), out=field)
        maps[:, index] *= field


def coils(grid: Grid, strength: float, draw: np.random.Generator) -> Reals:
    """Sensitivity, float32 [z, y, x]: brighter towards the coils in front and behind, less at the stack's ends."""
    across, deep, along = (axis / 150.0 for axis in (grid.x, grid.y - grid.y.mean(), grid.z - grid.z.mean()))
    tilt = draw.normal(0.0, 0.35 * strength, 4)
    in_plane = (
        1.0
        + strength * (0.7 * deep**2)[:, None]
        + 0.3 * strength * across**2
        + tilt[0] * across
        + (tilt[1] * deep)[:, None]
        + tilt[2] * across * deep[:, None]
    )
    ends = 1.0 - 0.5 * strength * along**2 + tilt[3] * along
    return (np.maximum(ends, 0.2)[:, None, None] * np.clip(in_plane, 0.3, 3.0)).astype(np.float32)


def add_ghosts(maps: Reals, grid: Grid, front_mm: float, strength: float, draw: np.random.Generator) -> None:
    """Copies of the breathing front of the body, displaced along the phase encoding from front to back.

    Breathing modulates the signal of the wall in front at some frequency, and the modulation appears as a copy to each
    side, displaced by that frequency; what leaves the image on one side enters on the other.

    Args:
        maps: float32 [maps, slices, rows, columns], changed in place.
        front_mm: y of the front of the body.
        strength: of the copies, as a share of the signal that moves.
    """
    shift = round(float(draw.uniform(0.2, 0.45)) * len(grid.y))
    signs = draw.choice([-1.0, 1.0], 2)
    if strength == 0:
        return
    near, far = MOVING_DEPTH_MM
    moves = np.clip((front_mm + far - grid.y) / (far - near), 0.0, 1.0)
    weight = (strength * moves).astype(np.float32)[:, None]
    rows = np.flatnonzero(moves)  # all the others are zero
    for map_ in maps.reshape(-1, *maps.shape[-2:]):
        moving = map_[rows] * weight[rows]
        for sign, by in zip(signs, (shift, -shift), strict=True):
            map_[(rows + by) % len(grid.y)] += moving * np.float32(sign)


def point_spread(maps: Reals) -> None:
    """Blurs within the slice, in place; the outermost pixels repeat."""
    before, here, after = (np.float32(weight) for weight in POINT_SPREAD)
    for plane in maps.reshape(-1, *maps.shape[-2:]):
        padded = np.pad(plane, ((1, 1), (0, 0)), mode="edge")
        blurred = padded[:-2] * before + padded[1:-1] * here + padded[2:] * after
        padded = np.pad(blurred, ((0, 0), (1, 1)), mode="edge")
        plane[:] = padded[:, :-2] * before + padded[:, 1:-1] * here + padded[:, 2:] * after


def noisy_magnitude(real: Reals, imaginary: Reals | None, noise_sd: float, draw: np.random.Generator) -> Reals:
    """Magnitude of a signal with normal noise in its real and imaginary part, float32 in the shape of `real`."""
    out = np.empty_like(real)
    for index, plane in enumerate(real):
        noise = draw.standard_normal((2, *plane.shape), dtype=np.float32)
        noise *= np.float32(noise_sd)
        noise[0] += plane
        if imaginary is not None:
            noise[1] += imaginary[index]
        noise *= noise
        np.sqrt(noise[0] + noise[1], out=out[index])
    return out


def stored(
    voxels: npt.NDArray,
    grid: Grid,
    flips: tuple[bool, bool, bool],
    order: tuple[int, int, int],
    lies: tuple[Point, Point, Point],
) -> Volume:
    """A canonical array as the scanner holds it, with the affine that says where it lies in the scanner.

    Args:
        voxels: [slices, rows, columns].
        flips: which of (slice, row, column) are stored against the canonical direction.
        order: the canonical axis that each stored axis is.
        lies: where the patient's x, y and z axes point in the scanner.
    """
    to_world = np.array(lies).T
    affine = np.zeros((4, 4))
    affine[3, 3] = 1.0
    first = np.zeros(3)
    for axis, (positions, flipped) in enumerate(zip(grid.axes, flips, strict=True)):
        along = 2 - axis  # slices run along z, rows along y, columns along x
        step = positions[0] - positions[1] if flipped else positions[1] - positions[0]
        affine[:3, order.index(axis)] = to_world[:, along] * step
        first[along] = positions[-1] if flipped else positions[0]
    affine[:3, 3] = to_world @ first
    flipped_axes = [axis for axis, flipped in enumerate(flips) if flipped]
    array = np.ascontiguousarray(np.flip(voxels, flipped_axes).transpose(order))
    return Volume(array, affine, metadata={"modality": "MR"})
