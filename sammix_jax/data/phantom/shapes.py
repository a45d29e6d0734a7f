"""Implicit shapes, smooth random fields and the painter behind the abdominal phantom.

Every shape lives in the *patient frame*: millimetres, x towards the patient's Left, y towards
Posterior, z towards Superior (LPS); x = 0 is the midline, z = 0 about the level of L2.  A shape is
a signed distance, so edges come out with the partial volume a scanner gives them, and organs are
joined, cut and clipped against each other without a mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.interpolate import CubicSpline, make_interp_spline
from scipy.spatial.transform import Rotation

SEAM = 6.0  # mm over which two surfaces melt into one, as fat and capsule round off every organ


class Points(NamedTuple):
    """Sample positions, all float32 arrays of one shape, in mm."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    level: np.ndarray  # y of the scanner: fluid stays horizontal however the patient lies
    cavity: np.ndarray  # signed distance to the inside of the muscle ring


@dataclass(frozen=True)
class Solid:
    """A region: `distance(Points)` in mm, negative inside; `lo`, `hi` (3,) bound it in mm."""

    distance: Callable[[Points], np.ndarray]
    lo: np.ndarray
    hi: np.ndarray

    def grow(self, mm: float) -> Solid:
        return Solid(lambda p: self.distance(p) - mm, self.lo - mm, self.hi + mm)

    def __or__(self, other: Solid) -> Solid:
        lo, hi = np.minimum(self.lo, other.lo), np.maximum(self.hi, other.hi)
        return Solid(lambda p: -_join(-self.distance(p), -other.distance(p)), lo - 2, hi + 2)

    def __and__(self, other: Solid) -> Solid:
        lo, hi = np.maximum(self.lo, other.lo), np.minimum(self.hi, other.hi)
        return Solid(lambda p: _join(self.distance(p), other.distance(p)), lo, hi)

    def __sub__(self, other: Solid) -> Solid:
        return Solid(lambda p: _join(self.distance(p), -other.distance(p)), self.lo, self.hi)


def _join(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    overlap = np.maximum(SEAM - np.abs(a - b), 0)
    return np.maximum(a, b) + overlap * overlap * np.float32(0.25 / SEAM)


def everywhere(distance: Callable[[Points], np.ndarray]) -> Solid:
    """Unbounded solid."""
    return Solid(distance, np.full(3, -np.inf), np.full(3, np.inf))


def ellipsoid(centre, radii, turn=(0.0, 0.0, 0.0)) -> Solid:
    """Ellipsoid with `centre`, `radii` in mm, turned by `turn` degrees about x, y, z."""
    centre, radii = np.asarray(centre, float), np.asarray(radii, float)
    axes = Rotation.from_euler("xyz", turn, degrees=True).as_matrix()
    reach = np.sqrt(((axes * radii) ** 2).sum(1))
    rows = np.float32(axes.T / radii[:, None])
    shift, inverse = np.float32(rows @ centre), np.float32(1 / radii)

    def distance(p: Points) -> np.ndarray:
        near = far = np.float32(1e-12)
        for row, offset, inv in zip(rows, shift, inverse, strict=True):
            q = p.x * row[0] + p.y * row[1] + p.z * row[2] - offset
            q *= q
            near, far = near + q, far + q * (inv * inv)
        return (near - np.sqrt(near)) / np.sqrt(far)

    return Solid(distance, centre - reach, centre + reach)


def tube(points, radii) -> Solid:
    """Round tube through `points` (n, 3) mm whose radius runs linearly along each segment."""
    points = np.asarray(points, np.float32)
    radii = np.broadcast_to(np.asarray(radii, np.float32), len(points))

    def distance(p: Points) -> np.ndarray:
        best = None
        for a, b, ra, rb in zip(points[:-1], points[1:], radii[:-1], radii[1:], strict=True):
            axis = b - a
            x, y, z = p.x - a[0], p.y - a[1], p.z - a[2]
            t = np.clip((x * axis[0] + y * axis[1] + z * axis[2]) / (axis @ axis), 0, 1)
            x, y, z = x - t * axis[0], y - t * axis[1], z - t * axis[2]
            d = np.sqrt(x * x + y * y + z * z) - (ra + t * (rb - ra))
            best = d if best is None else np.minimum(best, d)
        return best

    return Solid(distance, (points - radii[:, None]).min(0), (points + radii[:, None]).max(0))


def curve(knots, n: int = 14) -> np.ndarray:
    """(n, 3) points in mm of a smooth curve through `knots`."""
    return CubicSpline(np.linspace(0, 1, len(knots)), knots)(np.linspace(0, 1, n))


def smooth_field(rng: np.random.Generator, axes, wavelength: float) -> np.ndarray:
    """Random field of mean 0 and sd about 1 on the grid of three coordinate `axes` in mm.

    Values are drawn on a lattice `wavelength` mm apart and joined by splines; a product of three
    1-D bases keeps even fine texture cheap.
    """
    bases, counts = [], []
    for axis in axes:
        knots = np.arange(axis.min() - wavelength, axis.max() + 2 * wavelength, wavelength)
        bases.append(np.float32(make_interp_spline(knots, np.eye(len(knots)))(axis)))
        counts.append(len(knots))
    field = rng.standard_normal(counts, dtype=np.float32)
    for basis in bases:  # each product moves the next lattice axis to the front
        field = np.tensordot(field, basis, axes=(0, 1))
    return np.float32(1.2) * field


class Canvas:
    """HU volume and label volume on one grid, painted from the back to the front."""

    def __init__(self, points: Points, texture, hu: Mapping, organs: tuple, softness: float):
        """`hu`: tissue -> (mean, texture sd) in HU; `softness`: width in mm of a soft edge."""
        self.organs = organs
        self.points, self.texture, self.hu, self.softness = points, texture, hu, softness
        self.image = np.full(texture.shape, -1000, np.float32)
        self.organ = np.full(texture.shape, -1, np.int8)  # index into `organs`
        self._span = []
        for axis, coordinate in enumerate(points[:3]):
            others = tuple({0, 1, 2} - {axis})
            self._span.append((coordinate.min(others), coordinate.max(others)))

    def _box(self, solid: Solid):
        margin, box = 2 * self.softness, []
        for (low, high), lo, hi in zip(self._span, solid.lo, solid.hi, strict=True):
            hit = np.flatnonzero((high >= lo - margin) & (low <= hi + margin))
            box.append(slice(hit[0], hit[-1] + 1) if len(hit) else slice(0, 0))
        return tuple(box)

    def paint(self, solid: Solid, tissue: str, organ: str = "", within: str = "") -> None:
        """Blend `tissue` into the image over `solid` and set the label to `organ` there.

        The label is `tissue` itself if it is an organ and none is named.  `within` keeps the
        brush inside an organ that is already there.
        """
        box = self._box(solid)
        if not self.image[box].size:
            return
        distance = solid.distance(Points(*(c[box] for c in self.points)))
        cover = np.clip(0.5 - distance / self.softness, 0, 1)
        if within:
            cover *= self.organ[box] == self.organs.index(within)
        mean, spread = self.hu[tissue]
        view = self.image[box]
        view += cover * (mean + spread * self.texture[box] - view)
        organ = organ or tissue
        code = self.organs.index(organ) if organ in self.organs else -1
        self.organ[box][cover > 0.5] = code
