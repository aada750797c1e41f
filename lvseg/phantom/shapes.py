"""Smooth implicit shapes: how far a point is from their surface.

Axes. Positions are world millimetres in LPS; x, y and z come as float32 arrays of one shape, and so do the distances,
which are negative inside.

Only additions, multiplications, divisions and square roots in float32 are used, which IEEE 754 rounds the same way on
every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import numpy as np
import numpy.typing as npt

Field = npt.NDArray[np.float32]
Point = tuple[float, float, float]
Corners = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


class Shape(Protocol):
    """Anything with a surface and a box around it."""

    def box_mm(self) -> Corners:
        """Lowest and highest corner, float64 [3] each."""

    def distance_mm(self, x: Field, y: Field, z: Field) -> Field:
        """Distance to the surface, negative inside."""


@dataclass(frozen=True)
class Ellipsoid:
    """An ellipsoid; `axes` are the orthonormal directions of its semi-axes."""

    centre_mm: Point
    semi_axes_mm: Point
    axes: tuple[Point, Point, Point] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))

    def box_mm(self) -> Corners:
        """Lowest and highest corner, float64 [3] each."""
        half = np.sqrt(((np.array(self.axes) * np.array(self.semi_axes_mm)[:, None]) ** 2).sum(axis=0))
        return np.array(self.centre_mm) - half, np.array(self.centre_mm) + half

    def distance_mm(self, x: Field, y: Field, z: Field) -> Field:
        """Distance to the surface to first order, negative inside, float32 in the shape of x."""
        offset = (x - f32(self.centre_mm[0]), y - f32(self.centre_mm[1]), z - f32(self.centre_mm[2]))
        squares = np.zeros_like(x)
        slopes = np.full_like(x, 1e-8)  # keeps the centre, where both vanish, finite
        for direction, semi_axis in zip(self.axes, self.semi_axes_mm, strict=True):
            along = dot(offset, direction) * f32(1.0 / semi_axis)
            along *= along
            squares += along
            slopes += along * f32(1.0 / semi_axis**2)
        radius = np.sqrt(squares)
        return radius * (radius - f32(1.0)) / np.sqrt(slopes)


@dataclass(frozen=True)
class Cone:
    """A round tube from one point to another, with a radius at each end and round caps."""

    start_mm: Point
    end_mm: Point
    start_radius_mm: float
    end_radius_mm: float

    def box_mm(self) -> Corners:
        """Lowest and highest corner, float64 [3] each."""
        ends = np.array([self.start_mm, self.end_mm])
        radius = max(self.start_radius_mm, self.end_radius_mm)
        return ends.min(axis=0) - radius, ends.max(axis=0) + radius

    def distance_mm(self, x: Field, y: Field, z: Field) -> Field:
        """Distance to the surface, negative inside, float32 in the shape of x."""
        axis = np.array(self.end_mm) - np.array(self.start_mm)
        offset = [part - f32(start) for part, start in zip((x, y, z), self.start_mm, strict=True)]
        along = dot(offset, axis / (axis @ axis))
        along = np.clip(along, f32(0.0), f32(1.0))
        squares = np.zeros_like(x)
        for part, step in zip(offset, axis, strict=True):
            part -= along * f32(step)
            squares += part * part
        return np.sqrt(squares) - (f32(self.start_radius_mm) + along * f32(self.end_radius_mm - self.start_radius_mm))


@dataclass(frozen=True)
class Cut:
    """A plane; what lies on the side its unit normal points to is cut off."""

    point_mm: Point
    normal: Point

    def distance_mm(self, x: Field, y: Field, z: Field) -> Field:
        """Distance to the plane, negative on the side that stays."""
        return dot([part - f32(origin) for part, origin in zip((x, y, z), self.point_mm, strict=True)], self.normal)


def f32(value: float) -> np.float32:
    """A parameter as float32, so that no field is widened to float64."""
    return np.float32(value)


def dot(offset: Sequence[Field], vector: Sequence[float] | npt.NDArray[np.float64]) -> Field:
    """Scalar product of a field of vectors, given as its three components, with one vector."""
    terms = [part * f32(cosine) for part, cosine in zip(offset, vector, strict=True) if cosine]
    return reduce(np.add, terms)


def two_sided_square(offset: Field, below: float, above: float) -> Field:
    """offset^2 times `below` where it is negative, times `above` where it is positive."""
    low, high = np.minimum(offset, f32(0.0)), np.maximum(offset, f32(0.0))
    return low * low * f32(below) + high * high * f32(above)


def smooth_minimum(first: Field, second: Field, over_mm: float) -> Field:
    """The smaller of both, rounded where they differ by less than `over_mm`."""
    smaller = np.minimum(first, second)
    if over_mm == 0:
        return smaller
    overlap = np.maximum(f32(over_mm) - np.abs(first - second), f32(0.0))
    return smaller - overlap * overlap * f32(0.25 / over_mm)


def unit(vector: Point) -> Point:
    """The vector at length 1."""
    length = math.sqrt(sum(part * part for part in vector))
    return vector[0] / length, vector[1] / length, vector[2] / length


def rotation(about_x: float, about_y: float, about_z: float) -> tuple[Point, Point, Point]:
    """Where the x, y and z axes go when turned about x, then y, then z (radians)."""
    cx, sx, cy, sy = math.cos(about_x), math.sin(about_x), math.cos(about_y), math.sin(about_y)
    cz, sz = math.cos(about_z), math.sin(about_z)
    return (
        (cz * cy, sz * cy, -sy),
        (cz * sy * sx - sz * cx, sz * sy * sx + cz * cx, cy * sx),
        (cz * sy * cx + sz * sx, sz * sy * cx - cz * sx, cy * cx),
    )
