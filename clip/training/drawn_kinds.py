"""Forty kinds of thing, each drawn with a few polygons: what the drawn world (:mod:`clip.training.drawn`) is made of.

The drawings are about as large as the square from (-1, -1) to (1, 1), x to the right and y downwards:

    -1 ┌───────────┐      "house": kind(
       │    ╱╲     │          body(the outline of roof and walls, the chimney),
       │  ╱    ╲   │          detail(the door),
       │  │ ▯  │   │          extra(the windows),
     1 └──┴────┴───┘          room(the middle of a circle, and its radius))

Body parts are filled with the thing's colour and are its silhouette. Details lie on top of them, in black or white,
whichever shows; extras are details that a drawing may leave out. The room is not painted: another thing can be drawn
there. Curves are polygons too, so that every shape can be stretched, bent and turned by moving its points.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BODY", "DETAIL", "EXTRA", "KINDS", "ROOM", "Kind", "Part"]

Point = tuple[float, float]
Polygon = list[Point]
Part = tuple[str, Polygon]

BODY, DETAIL, EXTRA, ROOM = "body", "detail", "extra", "room"


@dataclass(frozen=True)
class Kind:
    """How one kind of thing is drawn.

    Attributes
    ----------
    parts : tuple of (str, list of (float, float))
        What to fill, from the back to the front: `BODY`, `DETAIL` or `EXTRA`, and the corners. The last may be
        a `ROOM`, the rim of a circle inside the thing.
    turn : float
        How far it may be turned either way, in degrees, and still be upright.
    """

    parts: tuple[Part, ...]
    turn: float

    @property
    def roomy(self) -> bool:
        """Whether another thing can be drawn inside."""
        return self.parts[-1][0] == ROOM


def kind(*groups: list[Part], turn: float = 12) -> Kind:
    """A kind from what `body`, `detail`, `extra` and, last, `room` give."""
    return Kind(tuple(part for parts in groups for part in parts), turn)


def body(*polygons: Polygon) -> list[Part]:
    """Parts in the thing's colour."""
    return [(BODY, polygon) for polygon in polygons]


def detail(*polygons: Polygon) -> list[Part]:
    """Parts in black or white."""
    return [(DETAIL, polygon) for polygon in polygons]


def extra(*polygons: Polygon) -> list[Part]:
    """Parts in black or white that may be left out."""
    return [(EXTRA, polygon) for polygon in polygons]


def room(x: float, y: float, radius: float) -> list[Part]:
    """A circle in which another thing has room."""
    return [(ROOM, arc(x, y, radius, radius, 0, 315, 8))]


# Polygons


def box(left: float, top: float, right: float, bottom: float) -> Polygon:
    """An upright rectangle."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def arc(x: float, y: float, rx: float, ry: float, start: float, stop: float, points: int = 12) -> Polygon:
    """Points on an ellipse around (x, y); 0 degrees is right, 90 down. Not closed."""
    angles = [math.radians(start + (stop - start) * i / (points - 1)) for i in range(points)]
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


def disc(x: float, y: float, rx: float, ry: float | None = None) -> Polygon:
    """An ellipse; a circle of radius `rx` if `ry` is not given."""
    points = 10 if rx < 0.25 else 28 if rx > 0.7 else 18
    return arc(x, y, rx, rx if ry is None else ry, 0, 360, points + 1)[:-1]


def hoop(x: float, y: float, outer: float, inner: float) -> Polygon:
    """A disc with a hole: once around outside, back along a seam, once around inside."""
    return arc(x, y, outer, outer, 0, 360, 25) + arc(x, y, inner, inner, 360, 0, 25)


def spikes(count: int, outer: float, inner: float) -> Polygon:
    """A star of `count` points, one of them up."""
    corner = [((outer, inner)[i % 2], math.pi * (i / count - 0.5)) for i in range(2 * count)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in corner]


def symmetric(*right: Point) -> Polygon:
    """The right half, from top to bottom, and its mirror image."""
    return [*right, *((-x, y) for x, y in reversed(right) if x)]


def smooth(points: Sequence[Point], steps: int = 4) -> Polygon:
    """The closed Catmull-Rom curve through some points."""
    curve = []
    for i in range(len(points)):
        p, q, r, s = (points[(i + k) % len(points)] for k in (-1, 0, 1, 2))
        for t in (j / steps for j in range(steps)):
            weights = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2)
            curve.append(tuple(sum(w * a[k] for w, a in zip(weights, (p, q, r, s), strict=True)) / 2 for k in (0, 1)))
    return curve


def stroke(width: float, *points: Point) -> Polygon:
    """A line of some width through points: along its left side and back along its right."""
    left, right = [], []
    for i, (x, y) in enumerate(points):
        (x0, y0), (x1, y1) = points[max(i - 1, 0)], points[min(i + 1, len(points) - 1)]
        scale = width / 2 / math.hypot(x1 - x0, y1 - y0)
        across = (scale * (y1 - y0), scale * (x0 - x1))
        left.append((x + across[0], y + across[1]))
        right.append((x - across[0], y - across[1]))
    return left + right[::-1]


def mirrored(polygon: Polygon) -> Polygon:
    """Left and right exchanged."""
    return [(-x, y) for x, y in polygon]


def moved(polygon: Polygon, x: float, y: float, degrees: float = 0) -> Polygon:
    """Turned around (0, 0), then moved by (x, y)."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in polygon]


def both(polygon: Polygon) -> list[Polygon]:
    """The polygon and its mirror image."""
    return [polygon, mirrored(polygon)]


def heart() -> Polygon:
    """A heart from one formula, (sin³ a, 13 cos a - 5 cos 2a - 2 cos 3a - cos 4a), scaled."""
    angles = [math.tau * i / 28 for i in range(28)]
    return [
        (math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16)
        for a in angles
    ]


def spiral(x: float, y: float, radius: float) -> list[Point]:
    """One and three quarter turns, from the rim to the middle."""
    turns = [(i / 20, math.radians(100 + 630 * i / 20)) for i in range(20)]
    return [(x + radius * (1 - t) * math.cos(a), y + radius * (1 - t) * math.sin(a)) for t, a in turns]


WING = [(0.05, -0.15), (0.35, -0.85), (0.85, -0.95), (1, -0.6), (0.75, -0.1), (0.1, 0.05)]
LOWER_WING = [(0.05, -0.05), (0.65, 0.1), (0.8, 0.5), (0.5, 0.9), (0.2, 0.6)]

# The order decides which colours a kind is never trained with, see `clip.training.drawn.held_out`.
KINDS = {
    # shapes
    "circle": kind(body(disc(0, 0, 1)), room(0, 0, 0.95), turn=180),
    "square": kind(body(box(-0.9, -0.9, 0.9, 0.9)), room(0, 0, 0.85)),
    "triangle": kind(body([(0, -0.95), (1, 0.8), (-1, 0.8)]), room(0, 0.25, 0.5)),
    "star": kind(body(spikes(5, 1, 0.42)), room(0, 0, 0.4), turn=36),
    "heart": kind(body(heart()), room(0, 0.17, 0.5), turn=20),
    "diamond": kind(body([(0, -1), (0.72, 0), (0, 1), (-0.72, 0)]), room(0, 0, 0.54), turn=10),
    "cross": kind(
        body(symmetric((0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3), (0.3, 1))),
        turn=10,
    ),
    "ring": kind(body(hoop(0, 0, 1, 0.62)), room(0, 0, 0.6), turn=180),
    "crescent": kind(body(arc(0, 0, 1, 1, 50, 310, 22) + arc(0.42, 0, 0.8, 0.8, 285, 75, 16)), turn=30),
    "arrow": kind(
        body([(-1, -0.24), (0.15, -0.24), (0.15, -0.75), (1, 0), (0.15, 0.75), (0.15, 0.24), (-1, 0.24)]), turn=180
    ),
    # buildings and furniture
    "house": kind(
        body([(0, -0.95), (1, -0.1), (0.75, -0.1), (0.75, 0.95), (-0.75, 0.95), (-0.75, -0.1), (-1, -0.1)]),
        body(box(0.35, -0.9, 0.62, -0.2)),
        detail(box(-0.18, 0.35, 0.18, 0.87)),
        extra(box(-0.6, 0.15, -0.32, 0.45), box(0.32, 0.15, 0.6, 0.45)),
        extra(box(-0.62, -0.14, 0.62, -0.06)),
        room(0, 0.15, 0.62),
        turn=8,
    ),
    "ladder": kind(
        body(*both(stroke(0.18, (-0.4, -1), (-0.55, 1)))),
        body(*(box(-0.5, y - 0.08, 0.5, y + 0.08) for y in (-0.75, -0.36, 0.03, 0.42, 0.8))),
        turn=20,
    ),
    "chair": kind(
        body(box(-0.55, -1, -0.33, 1), box(-0.55, 0.02, 0.6, 0.26), box(0.38, 0.1, 0.6, 1)),
        body([(-0.55, -1), (-0.25, -1), (-0.2, -0.3), (-0.4, -0.3)]),
        extra(box(-0.3, 0.06, 0.55, 0.12)),
        turn=10,
    ),
    "table": kind(
        body(box(-1, -0.5, 1, -0.24)),
        body(*both(box(0.72, -0.3, 0.92, 0.75)), *both(box(0.3, -0.3, 0.45, 0.5))),
        turn=8,
    ),
    "clock": kind(
        body(disc(0, 0.1, 0.82), *both(disc(0.55, -0.68, 0.3)), *both(stroke(0.22, (0.45, 0.7), (0.7, 1)))),
        detail(disc(0, 0.1, 0.6)),
        body(stroke(0.15, (0, 0.14), (0, -0.4)), stroke(0.15, (-0.05, 0.1), (0.4, 0.25))),
    ),
    "bell": kind(
        body(disc(0, -0.82, 0.18), disc(0, 0.8, 0.2)),
        body(smooth(symmetric((0, -0.78), (0.42, -0.55), (0.55, 0), (0.68, 0.4), (0.98, 0.7), (0.4, 0.76)))),
        detail(stroke(0.12, (-0.58, 0.48), (0.58, 0.48))),
        room(0, 0.18, 0.5),
        turn=20,
    ),
    # things that go
    "boat": kind(
        body([(-1, 0.35), (1, 0.35), (0.65, 0.9), (-0.65, 0.9)], box(-0.06, -1, 0.06, 0.4)),
        body([(0, -0.95), (0.85, 0.15), (0, 0.15)], [(0, -0.7), (-0.6, 0.15), (0, 0.15)]),
        extra(stroke(0.09, (-0.85, 0.52), (0.85, 0.52))),
    ),
    "car": kind(
        body([(-1, 0.05), (-0.62, -0.05), (-0.4, -0.5), (0.3, -0.5), (0.6, -0.02), (1, 0.1), (1, 0.45), (-1, 0.45)]),
        body(*both(disc(0.52, 0.42, 0.27))),
        detail([(-0.45, -0.05), (-0.3, -0.37), (-0.08, -0.37), (-0.08, -0.05)]),
        detail([(0.05, -0.05), (0.05, -0.37), (0.24, -0.37), (0.42, -0.05)]),
        detail(*both(disc(0.52, 0.42, 0.15))),
        turn=10,
    ),
    "rocket": kind(
        body(smooth(symmetric((0, -1), (0.3, -0.5), (0.36, 0.1), (0.24, 0.6)))),
        body(*both([(0.26, 0.1), (0.75, 0.55), (0.75, 0.95), (0.2, 0.55)]), box(-0.13, 0.5, 0.13, 0.85)),
        detail(disc(0, -0.25, 0.17)),
        extra(stroke(0.08, (-0.25, 0.45), (0.25, 0.45))),
        turn=25,
    ),
    "airplane": kind(
        body(
            symmetric(
                *((0, -1), (0.14, -0.75), (0.16, -0.3), (1, 0.28), (1, 0.48)),
                *((0.15, 0.22), (0.12, 0.62), (0.45, 0.85), (0.45, 1), (0, 0.9)),
            )
        ),
        turn=45,
    ),
    # things at home
    "cup": kind(
        body([(-0.9, -0.75), (0.5, -0.75), (0.35, 0.8), (-0.75, 0.8)]),
        body(stroke(0.2, *arc(0.42, -0.1, 0.5, 0.42, -95, 95, 10))),
        extra(stroke(0.1, (-0.75, -0.55), (0.35, -0.55))),
        room(-0.2, -0.08, 0.58),
        turn=10,
    ),
    "bottle": kind(
        body(symmetric((0.17, -1), (0.17, -0.5), (0.3, -0.35), (0.4, -0.2), (0.42, 0), (0.42, 0.95), (0.36, 1))),
        detail(box(-0.3, 0.15, 0.3, 0.65)),
        extra(box(-0.09, -0.88, 0.09, -0.6)),
        turn=15,
    ),
    "key": kind(
        body(hoop(-0.55, 0, 0.45, 0.22), box(-0.15, -0.11, 1, 0.11)),
        body(box(0.78, 0, 1, 0.45), box(0.42, 0, 0.62, 0.35)),
        turn=40,
    ),
    "umbrella": kind(
        body(
            arc(0, 0, 1, 0.9, 180, 360, 17)
            + arc(0.75, 0, 0.25, 0.14, 0, -180, 5)
            + arc(0.25, 0, 0.25, 0.14, 0, -180, 5)
            + arc(-0.25, 0, 0.25, 0.14, 0, -180, 5)
            + arc(-0.75, 0, 0.25, 0.14, 0, -180, 5)
        ),
        body(stroke(0.13, (0, -1), (0, 0.75)), stroke(0.13, *arc(0.18, 0.75, 0.18, 0.2, 180, 0, 7))),
        extra(stroke(0.05, (0, -0.85), (-0.5, -0.13)), stroke(0.05, (0, -0.85), (0.5, -0.13))),
        turn=15,
    ),
    "hat": kind(
        body(box(-0.55, -0.75, 0.55, 0.5), disc(0, 0.5, 1, 0.2)),
        detail(box(-0.43, 0.08, 0.43, 0.3)),
    ),
    "crown": kind(
        body(symmetric((0, -0.6), (0.35, 0.05), (0.85, -0.55), (0.75, 0.75))),
        body(disc(0, -0.65, 0.17), *both(disc(0.85, -0.55, 0.17))),
        detail(box(-0.65, 0.42, 0.65, 0.55)),
        extra(disc(0, 0.18, 0.12), *both(disc(0.4, 0.22, 0.1))),
        turn=10,
    ),
    "sock": kind(
        body(
            [
                *((-0.35, -1), (0.3, -1), (0.3, 0)),
                *arc(0.55, 0.55, 0.42, 0.42, -60, 90, 8),
                *arc(-0.05, 0.6, 0.33, 0.37, 90, 180, 5),
                (-0.35, 0.2),
            ]
        ),
        detail(box(-0.25, -0.82, 0.2, -0.68)),
        extra(box(-0.25, -0.54, 0.2, -0.4)),
    ),
    "balloon": kind(
        body(disc(0, -0.36, 0.58, 0.66), [(0, 0.2), (0.16, 0.42), (-0.16, 0.42)]),
        body(stroke(0.09, (0, 0.35), (0.1, 0.52), (-0.07, 0.72), (0.05, 1))),
        extra(moved(disc(0, 0, 0.08, 0.16), -0.25, -0.6, 25)),
        room(0, -0.36, 0.53),
        turn=20,
    ),
    "apple": kind(
        body(
            smooth(
                symmetric((0, -0.38), (0.4, -0.55), (0.85, -0.3), (0.85, 0.25), (0.55, 0.8), (0.25, 0.97), (0, 0.88))
            )
        ),
        body(stroke(0.13, (0, -0.35), (0.03, -0.7), (0.12, -0.95))),
        body(moved(smooth([(-0.3, 0), (0, -0.15), (0.3, 0), (0, 0.15)], 3), 0.38, -0.75, -20)),
        extra(moved(disc(0, 0, 0.09, 0.18), -0.5, -0.1, 20)),
        room(0, 0.25, 0.56),
        turn=15,
    ),
    # outdoors
    "sun": kind(
        body(disc(0, 0, 0.56), *(moved([(0.5, -0.1), (1, 0), (0.5, 0.1)], 0, 0, 36 * i) for i in range(10))),
        extra(*both(disc(0.2, -0.13, 0.08)), stroke(0.09, *arc(0, 0.05, 0.3, 0.25, 160, 20, 7))),
        turn=18,
    ),
    "cloud": kind(
        body(disc(-0.55, 0.15, 0.42), disc(-0.1, -0.2, 0.5), disc(0.42, -0.05, 0.4), disc(0.68, 0.25, 0.32)),
        body(box(-0.55, 0.1, 0.68, 0.57)),
        room(-0.05, 0, 0.5),
        turn=8,
    ),
    "tree": kind(
        body(
            symmetric(
                (0, -1), (0.42, -0.4), (0.22, -0.4), (0.62, 0.1), (0.35, 0.1), (0.85, 0.65), (0.16, 0.65), (0.16, 1)
            )
        ),
        turn=8,
    ),
    "flower": kind(
        body(
            *(disc(0.36 * math.cos(a), -0.42 + 0.36 * math.sin(a), 0.25) for a in (math.tau * i / 6 for i in range(6)))
        ),
        body(stroke(0.13, (0, -0.4), (0.04, 0.3), (0, 1))),
        body(*both(smooth([(0.02, 0.8), (0.2, 0.45), (0.55, 0.4), (0.35, 0.75)], 3))),
        detail(disc(0, -0.42, 0.2)),
    ),
    "leaf": kind(
        body(smooth([(0, -1), (0.5, -0.35), (0.45, 0.25), (0, 0.65), (-0.45, 0.25), (-0.5, -0.35)])),
        body(stroke(0.13, (0, 0.55), (0.04, 0.8), (0.12, 1))),
        detail(stroke(0.08, (0, -0.7), (0, 0.6))),
        extra(*(stroke(0.06, (0, y), (x, y - 0.25)) for y in (0.3, -0.05) for x in (-0.33, 0.33))),
        room(0, -0.13, 0.48),
        turn=45,
    ),
    "mushroom": kind(
        body([*arc(0, 0, 1, 0.85, 180, 360, 18), (0.85, 0.15), (-0.85, 0.15)]),
        body([(-0.26, 0.1), (0.26, 0.1), (0.36, 0.9), (0.2, 1), (-0.2, 1), (-0.36, 0.9)]),
        detail(disc(-0.48, -0.25, 0.18), disc(0.05, -0.5, 0.19), disc(0.52, -0.18, 0.16)),
    ),
    # animals
    "fish": kind(
        body(smooth([(-1, 0), (-0.6, -0.42), (0, -0.5), (0.5, -0.12), (0.5, 0.12), (0, 0.5), (-0.6, 0.42)])),
        body([(0.3, 0), (1, -0.5), (0.85, 0), (1, 0.5)], [(-0.35, -0.4), (0.15, -0.75), (0.2, -0.35)]),
        detail(disc(-0.62, -0.12, 0.1)),
        extra(stroke(0.07, *arc(-0.6, 0, 0.3, 0.34, -50, 50, 6))),
        room(-0.15, 0, 0.46),
        turn=15,
    ),
    "bird": kind(
        body(smooth([(-0.45, -0.1), (0.1, -0.2), (0.6, 0.1), (0.4, 0.5), (-0.1, 0.6), (-0.5, 0.3)])),
        body(disc(-0.5, -0.4, 0.35), [(-0.75, -0.52), (-1.1, -0.33), (-0.75, -0.25)]),
        body([(0.4, 0.15), (1, -0.25), (1.05, 0.05), (0.5, 0.4)]),
        body(stroke(0.09, (-0.05, 0.5), (-0.1, 1)), stroke(0.09, (0.2, 0.5), (0.2, 1))),
        detail(disc(-0.56, -0.45, 0.09)),
        detail(stroke(0.07, *arc(0.05, 0.08, 0.32, 0.26, 0, 180, 8))),
    ),
    "cat": kind(
        body(smooth([(0, -0.3), (0.32, 0.1), (0.48, 0.7), (0.3, 1), (-0.3, 1), (-0.48, 0.7), (-0.32, 0.1)], 3)),
        body(disc(0, -0.45, 0.5, 0.42), *both([(0.1, -0.75), (0.45, -1.05), (0.49, -0.45)])),
        body(stroke(0.15, (0.3, 0.92), (0.65, 0.9), (0.85, 0.65), (0.75, 0.35), (0.82, 0.15))),
        detail(*both(disc(0.2, -0.48, 0.09)), [(-0.08, -0.33), (0.08, -0.33), (0, -0.23)]),
        extra(*both(stroke(0.04, (0.15, -0.28), (0.42, -0.33))), *both(stroke(0.04, (0.15, -0.24), (0.4, -0.2)))),
        turn=8,
    ),
    "butterfly": kind(
        body(*both(smooth(WING, 3)), *both(smooth(LOWER_WING, 3))),
        body(*both(stroke(0.06, (0, -0.4), (0.12, -0.75), (0.25, -0.98)))),
        body(disc(0, 0.05, 0.2, 0.7)),
        detail(disc(0, 0.05, 0.09, 0.55)),
        extra(*both(disc(0.66, -0.58, 0.14)), *both(disc(0.48, 0.42, 0.12))),
        turn=25,
    ),
    "snail": kind(
        body(
            disc(0.15, -0.05, 0.62), stroke(0.09, (-0.75, 0.2), (-0.68, -0.35)), stroke(0.09, (-0.85, 0.2), (-1, -0.3))
        ),
        body(
            smooth(
                [(-1, 0.3), (-0.8, 0.12), (-0.6, 0.25), (-0.5, 0.5), (0.5, 0.5), (1, 0.65), (0.4, 0.75), (-0.7, 0.75)]
            )
        ),
        detail(stroke(0.1, *spiral(0.15, -0.05, 0.5))),
        turn=10,
    ),
}
