"""Frame of the abdominal phantom: body wall, muscles, skeleton and chest.

Positions are in the patient frame of `shapes` (LPS, mm) for one standard body.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sammix_jax.data.phantom.shapes import (
    Canvas,
    Solid,
    curve,
    ellipsoid,
    everywhere,
    smooth_field,
    tube,
)

TOP = 104.0  # mean z (mm) of the top of the liver; z = 0 is about the level of L2
INSIDE = everywhere(lambda p: p.cavity + 0.5)  # all within the muscle ring
SPINE = everywhere(  # vertebrae with the crura and muscles that wrap them; organs keep off it
    lambda p: np.minimum(
        np.hypot(p.x / 1.2, p.y - 44) - 24, np.maximum(np.abs(p.x) - 0.7 * (p.y - 12), 50 - p.y)
    )
)


@dataclass(frozen=True)
class Build:
    """Body of one patient; lengths in mm of the standard body, `scale` times that in the world."""

    width: float  # half width
    depth: float  # half depth, front to back
    fat: float  # mean thickness of subcutaneous fat
    muscle: float  # mean thickness of the abdominal wall
    tip: float  # z of the lowest edge of the liver
    scale: float
    turn: np.ndarray  # (3,) degrees about x, y, z

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Build:
        fat = rng.uniform(8, 24)
        return cls(
            width=134 + fat + rng.uniform(-5, 5),
            depth=98 + 0.6 * fat + rng.uniform(-5, 5),
            fat=fat,
            muscle=rng.uniform(10, 15),
            tip=rng.uniform(-52, -26),
            scale=rng.uniform(0.96, 1.06),
            turn=rng.normal(0, (2, 2, 4)),
        )


def around(rng: np.random.Generator, centre, mm: float = 3.0) -> np.ndarray:
    """(3,) point within `mm` of `centre` on each axis."""
    return np.asarray(centre, float) + rng.uniform(-mm, mm, 3)


def sized(rng: np.random.Generator, radii, share: float = 0.08) -> np.ndarray:
    """(3,) radii in mm, each larger or smaller by up to `share`."""
    return np.asarray(radii, float) * rng.uniform(1 - share, 1 + share, 3)


def body_wall(rng: np.random.Generator, build: Build, axes, x: np.ndarray, y: np.ndarray):
    """Signed distances in mm to the skin and to the outside and inside of the muscle ring.

    `x`, `y` are patient-frame coordinates (mm) on the grid of the world `axes`; the results have
    their shape.
    """
    radius = np.hypot(x, y) + np.float32(1e-3)
    side, back = np.abs(x) / radius, y / radius
    reach = ((side / build.width) ** 2.3 + (np.abs(back) / build.depth) ** 2.3) ** (-1 / 2.3)
    skin = radius - reach
    uneven = 1 + 0.25 * smooth_field(rng, axes, 90.0)
    fat = build.fat * np.clip(uneven, 0.4, 1.8) * (0.75 + 0.35 * side**2 - 0.15 * back)
    wall = skin + np.maximum(fat, 3)
    # Thin in front (linea alba), thick at the flanks and towards the back.
    muscle = build.muscle * (0.65 + 0.35 * side**2 + 0.6 * np.maximum(back, 0) ** 2)
    return skin, wall, wall + muscle


def paint_wall_muscles(canvas: Canvas) -> None:
    """Muscles along the spine, and the fat planes between the layers at the flanks."""
    for side in (-1, 1):
        spinae = everywhere(
            lambda p, s=side: np.hypot((p.x - s * 33) / 1.45, (p.y - 80) * 1.05) - 18
        )
        canvas.paint(spinae.grow(3), "fat")
        canvas.paint(spinae, "muscle")
        psoas = [(side * 28, 46, 20), (side * 40, 42, -60), (side * 56, 24, -190)]
        canvas.paint(tube(psoas, (7, 18, 23)), "muscle")
        quadratus = tube([(side * 62, 64, 10), (side * 76, 60, -110)], (8, 12))
        canvas.paint(quadratus, "muscle")
    plane = everywhere(lambda p: np.maximum(np.abs(p.cavity - 6) - 0.4, p.z - 5))
    canvas.paint(plane, "fat", within="muscle")


def paint_skeleton(canvas: Canvas, rng: np.random.Generator) -> None:
    """Spine, ribs with their cartilage, sternum and iliac wings."""
    pitch = rng.uniform(32, 36)
    phase = rng.uniform(0, pitch)

    def level(p):  # height above the nearest mid-vertebra
        return (p.z + phase) % np.float32(pitch) - np.float32(pitch / 2)

    waist = np.float32(2 * np.pi / pitch)
    column = everywhere(
        lambda p: np.hypot(p.x / 1.22, p.y - 42) - 17.5 + 1.5 * np.cos(waist * level(p))
    )
    vertebra = everywhere(
        lambda p: np.maximum(column.distance(p), np.abs(level(p)) - pitch / 2 + 4)
    )

    def arch(p):
        laminae = np.maximum(np.hypot(p.x / 1.2, p.y - 65) - 13, np.abs(level(p)) - 12)
        flat = np.hypot(p.x * 1.2, level(p) / 3)
        spinous = np.hypot(flat, np.maximum(np.abs(p.y - 84) - 12, 0)) - 4
        flat = np.hypot(p.y - 66 - 0.1 * np.abs(p.x), level(p) / 1.5)
        transverse = np.hypot(flat, np.maximum(np.abs(p.x) - 34, 0)) - 4
        return np.minimum(np.minimum(laminae, spinous), transverse)

    canvas.paint(column, "disc")
    for part in (vertebra, everywhere(arch)):
        canvas.paint(part, "cortex", "bone")
        canvas.paint(part.grow(-2.5), "marrow", "bone")
    canvas.paint(everywhere(lambda p: np.hypot(p.x / 1.25, p.y - 65) - 8), "canal")

    # One formula for all ribs: a ring inside the wall, cut into a helix falling to the front.
    gap, start = rng.uniform(28, 33), rng.uniform(0, 28)

    def ribs(p):
        angle = np.arctan2(np.abs(p.x), p.y - 10)  # 0 at the back, pi in front
        height = (p.z + 44 * angle + start) % np.float32(gap) - np.float32(gap / 2)
        rib = np.hypot(p.cavity - 5, height * 0.62) - 3.6
        margin = 32 * np.maximum(angle - 1.3, 0) ** 2 - 42
        return np.maximum(np.maximum(rib, margin - p.z), (0.3 - angle) * 90)

    ribs_solid = everywhere(ribs)
    front = everywhere(lambda p: p.y + 0.45 * np.abs(p.x) + 22)
    canvas.paint(ribs_solid, "cortex", "bone")
    canvas.paint(ribs_solid.grow(-2.2), "marrow", "bone")
    cartilage = everywhere(lambda p: np.maximum(ribs(p), front.distance(p)))
    canvas.paint(cartilage, "cartilage")
    sternum = everywhere(
        lambda p: np.maximum(
            np.hypot(np.maximum(np.abs(p.x) - 14, 0), p.cavity - 5) - 4,
            np.maximum(88 - p.z, p.y),
        )
    )
    canvas.paint(sternum, "marrow", "bone")
    for side in (-1, 1):  # iliac wings, for the volumes that reach so low
        wing = ellipsoid((side * 100, 38, -195), (9, 48, 62), (0, side * 24, side * 30))
        canvas.paint(wing, "cortex", "bone")
        canvas.paint(wing.grow(-3), "marrow", "bone")


def paint_chest(canvas: Canvas, rng: np.random.Generator) -> Solid:
    """Lungs, heart and gullet; returns the space under the diaphragm."""
    right = ellipsoid((-60, 2, 12), sized(rng, (84, 90, TOP - 8), 0.04))
    left = ellipsoid((62, 6, 6), sized(rng, (82, 88, TOP - 16), 0.04))
    below = right | left | ellipsoid((0, -10, 10), (90, 90, 72))
    outside = everywhere(lambda p: np.maximum(16 - p.z, -below.distance(p)))
    thorax = outside & everywhere(lambda p: p.cavity + 1)
    lungs = (thorax - SPINE).grow(-2.5)  # what is left between lung and liver is the diaphragm
    canvas.paint(thorax - SPINE, "muscle")
    centre = around(rng, (22, -28, TOP + 42), 5)
    heart = ellipsoid(centre, sized(rng, (58, 44, 44)), (0, 25, -35))
    mediastinum = heart.grow(6) | tube([(2, 22, 60), (2, 10, 260)], (20, 26))
    canvas.paint(lungs, "lung")
    bronchi = everywhere(lambda p: lungs.distance(p) + 6)
    for across, along, down in rng.uniform((-1, -1, 0), (1, 1, 1), (44, 3)):
        side = np.sign(across)  # lung vessels fan out from the hila
        hilum = np.array((side * 30, 5, TOP + 50))
        end = hilum + np.array((side * 20 + 70 * across, 65 * along, 20 - 110 * down))
        path = curve([hilum, (hilum + end) / 2 + rng.normal(0, 6, 3), end], 5)
        canvas.paint(tube(path, np.linspace(5, 1.6, 5)) & bronchi, "blood", within="lung")
    canvas.paint(mediastinum & outside, "fat")
    canvas.paint(heart & outside, "myocardium")
    for offset, radii in (((14, -8, -2), (24, 20, 24)), ((-22, 4, 8), (22, 24, 24))):
        chamber = ellipsoid(centre + offset, radii, (0, 25, -35))
        canvas.paint(chamber & outside, "blood")
    canvas.paint(tube([(4, 10, 260), (6, 12, 110), (22, 2, 78)], 8), "bowel_wall")
    return below
