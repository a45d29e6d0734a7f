"""Organs of the abdominal phantom: where they lie, what they are made of, how they vary.

Positions are in the patient frame of `shapes` (LPS, mm) for one standard body; a patient
is that body with jittered organs, seen through a scale, a turn and a smooth random deformation.
"""

from collections.abc import Mapping

import numpy as np
from scipy.spatial.transform import Rotation

from sammix_jax.data.phantom.body import (
    INSIDE,
    SPINE,
    Build,
    around,
    body_wall,
    paint_chest,
    paint_skeleton,
    paint_wall_muscles,
    sized,
)
from sammix_jax.data.phantom.shapes import (
    Canvas,
    Points,
    Solid,
    curve,
    ellipsoid,
    everywhere,
    smooth_field,
    tube,
)

ORGANS = (
    "liver", "tumour", "spleen", "kidney_left", "kidney_right", "gallbladder", "stomach",
    "aorta", "lung", "bone", "muscle", "fat",
)  # fmt: skip


def paint_abdomen(
    rng: np.random.Generator, build: Build, axes, hu: Mapping, softness: float
) -> Canvas:
    """Paint one patient.

    `axes`: three 1-D arrays of world LPS positions in mm, origin at the patient's origin.
    `hu`: tissue -> (mean, texture sd).  Returns a `Canvas` whose `image` (float32 HU, free of
    noise and blur) and `organ` (int8 index into `ORGANS`, -1 elsewhere) are indexed by `axes`.
    """
    world = np.meshgrid(*(np.float32(a) for a in axes), indexing="ij", sparse=True)
    turn = np.float32(Rotation.from_euler("xyz", build.turn, degrees=True).as_matrix().T)
    x, y, z = (
        (row[0] * world[0] + row[1] * world[1] + row[2] * world[2]) / np.float32(build.scale)
        + np.float32(4.5) * smooth_field(rng, axes, 75.0)
        for row in turn
    )
    skin, wall, cavity = body_wall(rng, build, axes, x, y)
    points = Points(x, y, z, np.broadcast_to(world[1], x.shape), cavity)
    texture = (smooth_field(rng, axes, 11.0) + smooth_field(rng, axes, 40.0)) * np.float32(0.7)
    canvas = Canvas(points, texture, hu, ORGANS, softness)

    back = build.depth * build.scale + 5
    across = np.broadcast_to(world[0], x.shape)
    table = np.abs(points.level - back + (across / 24) ** 2) - 4
    for distance, tissue in ((table, "table"), (skin, "skin"), (skin + 2, "fat"), (wall, "muscle")):
        canvas.paint(everywhere(lambda p, d=distance: d), tissue)
    canvas.paint(everywhere(lambda p: p.cavity), "fat")

    paint_wall_muscles(canvas)
    diaphragm = paint_chest(canvas, rng)
    paint_skeleton(canvas, rng)
    _paint_bowel(canvas, rng)
    kidneys = _paint_retroperitoneum(canvas, rng)
    _paint_upper_abdomen(canvas, rng, build, diaphragm.grow(0.5) - SPINE - kidneys)
    return canvas


def _paint_gut(canvas, solid, wall, content, level, tissue="bowel_wall", organ=""):
    """A hollow organ: wall, content, and gas above the world `level` (y in mm)."""
    canvas.paint(solid, tissue, organ)
    lumen = solid.grow(-wall)
    canvas.paint(lumen, content, organ)
    canvas.paint(_above(lumen, level), "gas", organ)


def _above(solid: Solid, level: float) -> Solid:
    """The part of `solid` above a horizontal fluid level."""
    return Solid(
        lambda p: np.maximum(solid.distance(p), p.level - np.float32(level)), solid.lo, solid.hi
    )


def _paint_bowel(canvas, rng):
    contents = np.array(["fluid", "contrast", "stool", "chyme"])
    cells = [(cx, cz) for cz in (-50, -85, -120, -155, -190) for cx in (-62, -22, 20, 60)]
    for cx, cz in cells:  # small bowel: a bent loop or two around each cell of a lattice
        for cy in (-52, -12):
            middle = around(rng, (cx, cy, cz), 8)
            path = curve(middle + rng.normal(0, (20, 13, 15), (4, 3)), 9)
            loop = tube(path, rng.uniform(9, 14)) & INSIDE
            gas = middle[1] - rng.uniform(-4, 30)
            content = rng.choice(contents, p=(0.3, 0.2, 0.1, 0.4))
            _paint_gut(canvas, loop, rng.uniform(2.5, 4.5), content, gas)
    ascending = [(-84, 20, -200), (-94, 16, -110), (-90, 6, -50), (-78, -30, -38)]
    transverse = [(-78, -32, -38), (-40, -64, -44), (20, -68, -52), (72, -48, -8), (92, 2, 22)]
    descending = [(92, 4, 22), (104, 26, -40), (102, 28, -120), (88, 20, -200)]
    for knots in (ascending, descending, transverse):
        knots = np.array(knots) + rng.normal(0, 4, (len(knots), 3))
        path = curve(knots, 22)
        haustra = rng.uniform(15, 20) + 2.5 * np.sin(np.arange(22) * 1.9)
        content = rng.choice(contents, p=(0.15, 0.2, 0.65, 0.0))
        gas = path[:, 1].mean() - rng.uniform(-8, 12)
        _paint_gut(canvas, tube(path, haustra) & INSIDE, 2.5, content, gas)


def _paint_retroperitoneum(canvas, rng) -> Solid:
    """Great vessels, pancreas, kidneys; returns what the kidneys keep free, to the back wall."""
    aorta = curve([(8, 20, 280), (8, 20, 100), (6, 16, 0), (3, 14, -120), (2, 14, -130)])
    canvas.paint(tube(aorta, np.linspace(12.5, 8.5, 14)), "aorta")
    for side in (-1, 1):
        canvas.paint(tube([(2, 14, -128), (side * 34, 16, -210)], (7, 6)), "aorta")
        canvas.paint(tube([(-16, 20, -132), (side * 40 - 4, 22, -210)], (8, 7)), "cava")
    cava = [(-18, 20, -132), (-22, 18, -40), (-24, 16, 30), (-22, 8, 95), (-14, 0, 135)]
    canvas.paint(tube(curve(cava), rng.uniform(9.5, 13)), "cava")
    canvas.paint(tube([(5, 4, 18), (4, -8, -10), (0, -24, -90)], (4.5, 4, 3)), "aorta")
    canvas.paint(tube([(-10, -12, 18), (-10, -14, -10), (-8, -28, -90)], (6.5, 6, 4)), "cava")

    duodenum = [(-26, -38, 6), (-44, -14, -2), (-42, 2, -36), (-6, 0, -46), (26, -8, -30)]
    _paint_gut(canvas, tube(curve(duodenum, 12), 12), 3.5, "chyme", rng.uniform(-40, -8))
    pancreas = [(-30, -12, -24), (-26, -16, 2), (4, -22, 20), (44, 0, 30), (84, 16, 44)]
    lobes = rng.uniform(9, 12) + 1.5 * np.sin(np.arange(12) * 2.3)
    canvas.paint(tube(curve(pancreas, 12), lobes), "pancreas")
    splenic = curve([(-12, -8, 22), (16, -4, 26), (50, 12, 34), (84, 24, 46)], 8)
    canvas.paint(tube(splenic, 4.5), "cava")

    beds = []
    for side, organ, centre in (
        (-1, "kidney_right", around(rng, (-59, 38, -22), 5)),
        (1, "kidney_left", around(rng, (62, 38, -8), 5)),
    ):
        turn = rng.normal((-8, side * 12, side * 28), 4)
        kidney = ellipsoid(centre, sized(rng, (28, 24, 54)), turn)
        fat = kidney.grow(rng.uniform(4, 9))
        beds.append(fat | ellipsoid(centre + np.array((0, 26, -6)), (30, 30, 56), turn))
        sinus = ellipsoid(centre - (side * 17, 6, 0), sized(rng, (19, 11, 24)), turn)
        beat, shift = rng.uniform(15, 19), rng.uniform(0, 6)
        pyramids = everywhere(
            lambda p, b=beat, s=shift: 5 * np.cos(2 * np.pi / b * (p.z + 0.4 * p.y + s)) - 0.5
        )
        canvas.paint(fat & INSIDE, "fat")
        canvas.paint(kidney, "kidney_cortex", organ)
        canvas.paint(kidney.grow(-6.5) & pyramids, "kidney_medulla", organ)
        canvas.paint(sinus & kidney.grow(6), "fat")
        canvas.paint(sinus.grow(-6.5) & kidney.grow(6), "fluid")
        hilum = centre - (side * 20, 8, -2)
        canvas.paint(tube([hilum, (-side * 4 + side * 12, 14, hilum[2] + 10)], 4.5), "cava")
        adrenal = tube([(side * 34, 26, 52), (side * 36, 34, 36)], (3, 4))
        canvas.paint(adrenal, "pancreas")
    return beds[0] | beds[1]


def _liver(rng, build) -> Solid:
    right = ellipsoid(around(rng, (-66, 0, 34)), sized(rng, (72, 84, 78), 0.06), (6, -8, 10))
    reach = (62 - build.tip) / 2
    tongue = ellipsoid(
        around(rng, (-88, 6, build.tip + reach), 2), (*sized(rng, (34, 52, 1))[:2], reach)
    )
    lateral = rng.uniform(40, 72)  # how far the left lobe crosses towards the spleen
    left = tube(
        [(-40, -36, 52), (0, -46, 50), (lateral * 0.6, -46, 58), (lateral, -36, 68)],
        (44, 36, 25, 11),
    )
    caudate = ellipsoid(around(rng, (-16, 0, 50)), (15, 20, 27))
    hollow = ellipsoid(around(rng, (-20, -6, -28)), sized(rng, (46, 66, 50)), (0, 28, 0))
    fissure = ellipsoid(around(rng, (-6, -62, 20)), (4, 34, 36), (18, 0, 14))
    hilum = ellipsoid(around(rng, (-26, -12, 30)), (24, 7, 12), (0, -20, 0))
    return ((right | tongue) - hollow | left - fissure | caudate) - hilum


def _vessels(rng, start, heading, length, radius, depth):
    """Tubes of a branching tree; `heading` is a unit vector, lengths in mm."""
    end = start + length * heading
    bend = (start + end) / 2 + rng.normal(0, 0.09 * length, 3)
    yield tube(curve([start, bend, end], 6), np.linspace(radius, 0.75 * radius, 6))
    for _ in range(2 if depth else 0):
        turn = heading + rng.normal(0, 0.55, 3)
        turn /= np.linalg.norm(turn)
        yield from _vessels(rng, end, turn, 0.75 * length, 0.72 * radius, depth - 1)


def _paint_upper_abdomen(canvas, rng, build, room):
    """Spleen, stomach, liver and gallbladder within `room`."""
    room = room & INSIDE
    liver = _liver(rng, build) & room
    spleen = ellipsoid(around(rng, (94, 36, 44), 4), sized(rng, (44, 56, 57), 0.14), (20, -8, 25))
    hollow = ellipsoid(around(rng, (60, 10, 38)), (32, 46, 58), (10, 0, 25))
    spleen = spleen - hollow & room
    canvas.paint(spleen, "spleen")

    fundus = [(54, 16, 72), (70, -10, 58), (64, -38, 26), (34, -56, 2), (4, -54, 0), (-22, -42, 6)]
    path = curve(np.array(fundus) + rng.normal(0, 4, (6, 3)), 12)
    girth = np.interp(np.arange(12), (0, 3, 8, 11), (31, 31, 20, 11))
    stomach = tube(path, girth * rng.uniform(0.75, 1.1))
    stomach = (stomach & room) - liver.grow(2) - spleen.grow(3)
    content = rng.choice(["fluid", "chyme", "contrast"], p=(0.45, 0.4, 0.15))
    _paint_gut(canvas, stomach, 5, content, rng.uniform(-52, -18), "stomach_wall", "stomach")

    canvas.paint(liver, "liver")
    portal = np.array((-26.0, -12.0, 30.0))
    trunk = tube([(-10, -10, 18), portal], 7)
    canvas.paint(trunk, "vessel")
    caval = np.array((-22.0, 6.0, 84.0))
    for root, heading, length, radius, depth in (
        (portal, (-0.9, 0.1, 0.15), 36, 6.5, 3),
        (portal, (0.3, -0.8, 0.5), 30, 5.5, 2),
        (caval, (-0.85, 0.2, -0.5), 52, 5.5, 1),
        (caval, (-0.55, -0.7, -0.4), 52, 5.5, 1),
        (caval, (0.3, -0.9, -0.3), 45, 5.0, 1),
    ):
        heading = heading + rng.normal(0, 0.1, 3)
        heading /= np.linalg.norm(heading)
        for vessel in _vessels(rng, root, heading, length, radius, depth):
            canvas.paint(vessel, "vessel", "liver", within="liver")
    canvas.paint(tube(curve([(-24, 16, 30), (-23, 12, 60), caval, (-14, 0, 130)]), 11), "cava")

    neck = around(rng, (-34, -30, 14))
    body = neck + rng.normal((-8, -26, -26), 5)
    bladder = tube(curve([neck, (neck + body) / 2 + (-3, 3, 0), body], 6), np.linspace(5, 15, 6))
    bladder = bladder.grow(rng.uniform(-3, 4))
    canvas.paint(bladder.grow(2), "bowel_wall")
    canvas.paint(bladder, "gallbladder")
    _paint_lesions(canvas, rng)


def _paint_lesions(canvas, rng):
    count = rng.integers(0, 6)
    sites = np.flatnonzero(canvas.organ == ORGANS.index("liver"))
    for _ in range(count if len(sites) else 0):
        site = rng.choice(sites)
        centre = [float(c.flat[site]) for c in canvas.points[:3]]
        size = min(rng.lognormal(np.log(11), 0.45), 32)
        bulge = ellipsoid(np.add(centre, rng.normal(0, 0.4 * size, 3)), np.full(3, 0.7 * size))
        shape = ellipsoid(centre, size * rng.uniform(0.8, 1.2, 3), rng.uniform(0, 90, 3)) | bulge
        kind = rng.choice(["tumour", "tumour_dark", "tumour_bright"], p=(0.6, 0.3, 0.1))
        canvas.paint(shape, kind, "tumour", within="liver")
        if size > 16:  # large lesions outgrow their blood supply
            canvas.paint(shape.grow(-0.5 * size), "necrosis", "tumour", within="tumour")
