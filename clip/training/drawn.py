"""The drawn world: pictures made on the spot, each with a caption that says what is in it.

Forty kinds of thing in twelve colours, alone, in numbers up to five, or two of them in a relation. The meaning is drawn
first, then twice made concrete: as a picture, and in words.

    Scene((Thing("fish", "red"), Thing("boat", "blue")), relation="above")
      ├─ draw_scene   place, size, proportion, tilt, shade, line and background as the random generator has it
      │                   ┌────────────┐
      │                   │  ><(((°>   │  red
      │                   │     ⛵      │  blue
      │                   └────────────┘
      └─ caption      "a red fish above a blue boat", "there is a blue boat, and above it a red fish", ...

A scene is what its caption states: a size or background that is not stated is drawn in any way.

Two things are easy to get right for a wrong reason, and so can be measured here:

- Knowing combinations by heart. A quarter of the 480 combinations of colour and kind is `held_out`: never in a picture
  or a caption of :class:`DrawnWorld`, always in :func:`questions`.
- Reading captions as bags of words (Yuksekgonul et al. 2210.01936, Thrush et al. 2204.03162). "A red fish above a blue
  boat" has the words of "a blue boat above a red fish" and of "a blue fish above a red boat". With such twins in its
  batch a caption has to be read in order, see `twins`.
"""

import colorsys
import csv
import math
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from .data import Pair
from .drawn_kinds import BODY, DETAIL, EXTRA, KINDS, Part

__all__ = [
    "ABILITIES",
    "BACKGROUNDS",
    "COLOURS",
    "KINDS",
    "NUMBERS",
    "RELATIONS",
    "DrawnWorld",
    "Question",
    "Scene",
    "Thing",
    "draw_scene",
    "held_out",
    "questions",
    "sample_scene",
    "write_folder",
]

# Hue in degrees, saturation, value. Shades of two colours never meet. The order decides what is held out.
COLOURS = {
    "red": ((-8, 5), (0.85, 1), (0.7, 0.95)),
    "orange": ((23, 33), (0.85, 1), (0.93, 1)),
    "yellow": ((50, 59), (0.7, 1), (0.93, 1)),
    "green": ((95, 142), (0.6, 1), (0.42, 0.75)),
    "blue": ((214, 238), (0.7, 1), (0.65, 0.98)),
    "purple": ((268, 286), (0.6, 0.9), (0.45, 0.75)),
    "pink": ((320, 344), (0.3, 0.55), (0.94, 1)),
    "brown": ((18, 30), (0.6, 0.85), (0.34, 0.52)),
    "black": ((0, 360), (0, 0.2), (0, 0.13)),
    "white": ((0, 360), (0, 0.03), (0.96, 1)),
    "grey": ((0, 360), (0, 0.06), (0.45, 0.65)),
    "turquoise": ((170, 184), (0.6, 1), (0.75, 0.92)),
}

NUMBERS = ("one", "two", "three", "four", "five")
PLURALS = {"fish": "fish", "leaf": "leaves", "butterfly": "butterflies", "cross": "crosses"}  # the others take an s

# Half of the longer side of a thing, as a share of the picture's side
ANY_SIZE = (0.16, 0.45)
SIZES = {"small": (0.12, 0.16), "big": (0.42, 0.48)}
ANY_SIZE_OF_TWO = (0.15, 0.23)
SIZES_OF_TWO = {"small": (0.13, 0.15), "big": (0.27, 0.31)}
CONTAINER_SIZE = (0.4, 0.47)
MARGIN = 0.02

BACKGROUNDS = {  # how they are said; as drawn they are LANDSCAPES
    "day": ("by day", "in the day"),
    "night": ("at night", "in the night"),
    "sea": ("at sea", "on the sea"),
    "grass": ("on the grass", "on grass"),
}
RELATIONS = ("above", "below", "left of", "right of", "inside")
CONVERSE = {"above": "below", "left of": "right of", "inside": "around"}
CONVERSE |= {converse: relation for relation, converse in CONVERSE.items()}
RELATION_WORDS = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "inside": ("inside", "in"),
    "around": ("around",),
}
FRAMES = ("{}", "{}", "there {be} {}", "a drawing of {}", "a picture of {}", "a photo of {}.")

# How often there are which scenes, and what is said of them
SHARE_ONE, SHARE_COUNTED = 0.5, 0.25  # the rest: two things in a relation
SHARE_SIZE_SAID, SHARE_BACKGROUND_SAID = 0.25, 0.2
SHARE_BACKGROUND_UNSAID = 0.2

SUPERSAMPLING = 3  # drawn so much larger, then averaged
OUTLINE_WIDTH = (0.01, 0.025)  # as a share of the picture's side
CONTRAST = 110  # distance in RGB, of at most 442, from which things are seen without an outline

RGB = tuple[int, int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom


# What is to be seen


_HELD_OUT = frozenset(
    (kind, colour) for i, kind in enumerate(KINDS) for j, colour in enumerate(COLOURS) if (i + j) % 4 == 0
)


def held_out(kind: str, colour: str) -> bool:
    """Whether this combination is kept from training: three colours of each kind, ten kinds of each colour.

    The rule looks only at both places modulo 4, so two kinds that share one of their held-out colours share all three,
    and can exchange their colours and still be held out.
    """
    return (kind, colour) in _HELD_OUT


@dataclass(frozen=True)
class Thing:
    """One thing: a kind of `KINDS` in a colour of `COLOURS`, perhaps clearly "small" or "big"."""

    kind: str
    colour: str
    size: str | None = None

    def __post_init__(self):
        _check("kind", self.kind, KINDS)
        _check("colour", self.colour, COLOURS)
        if self.size is not None:
            _check("size", self.size, SIZES)

    @property
    def words(self) -> str:
        """Without an article: "small red fish"."""
        return f"{self.size} {self.colour} {self.kind}" if self.size else f"{self.colour} {self.kind}"

    def __str__(self) -> str:
        return f"{'an' if self.words[0] in 'aeiou' else 'a'} {self.words}"


@dataclass(frozen=True)
class Scene:
    """What a caption states, and a picture shows.

    Parameters
    ----------
    things : tuple of Thing
        One, or two that stand in a relation; then their kinds and colours differ, and either one is small and the other
        big or no size is stated.
    count : int
        How many equal things, 1 to 5. Only of one thing without a size.
    relation : str, optional
        One of `RELATIONS`, read from the first thing to the second.
    background : str, optional
        One of `BACKGROUNDS`, if it is stated.

    Raises
    ------
    ValueError
        If these do not go together.
    """

    things: tuple[Thing, ...]
    count: int = 1
    relation: str | None = None
    background: str | None = None

    def __post_init__(self):
        _check("count", self.count, range(1, len(NUMBERS) + 1))
        if self.background is not None:
            _check("background", self.background, BACKGROUNDS)
        if self.relation is None:
            if len(self.things) != 1 or (self.count > 1 and self.things[0].size):
                raise ValueError("expected one thing, and no size if it is counted; two things need a relation")
            return
        _check("relation", self.relation, RELATIONS)
        if len(self.things) != 2 or self.count != 1:
            raise ValueError(f"expected two things {self.relation} each other, uncounted, got {self.things}")
        first, second = self.things
        if first.kind == second.kind or first.colour == second.colour:
            raise ValueError(f"expected two kinds and two colours, got {first} and {second}")
        if {first.size, second.size} not in ({None}, {"small", "big"}) or (first.size and self.relation == "inside"):
            raise ValueError(f"expected one small and one big thing beside each other, got {first} and {second}")
        if self.relation == "inside" and not all(KINDS[thing.kind].roomy for thing in self.things):
            raise ValueError(f"expected kinds with room inside, got {first} and {second}")

    @property
    def identity(self) -> str:
        """The meaning as one plain sentence: the same for all wordings, another for another meaning."""
        if self.relation in ("below", "right of"):
            what = f"{self.things[1]} {CONVERSE[self.relation]} {self.things[0]}"
        elif self.relation:
            what = f"{self.things[0]} {self.relation} {self.things[1]}"
        else:
            what = self.counted()
        return f"{what} {BACKGROUNDS[self.background][0]}" if self.background else what

    def caption(self, rng: random.Random) -> str:
        """One of many wordings. Given equal generators, a scene and its twins differ only in the order of words."""
        frame = rng.choice(FRAMES)
        if self.relation:
            frame, what = self._related(frame, rng)
        else:
            what = self.counted(one=rng.random() < 0.25)
        if self.background:
            what += " " + rng.choice(BACKGROUNDS[self.background])
        return frame.format(what, be="are" if self.count > 1 else "is")

    def counted(self, one: bool = False) -> str:
        """The one thing with its number: "three red fish", "a red fish", or "one red fish" if `one`."""
        thing = self.things[0]
        if self.count > 1:
            return f"{NUMBERS[self.count - 1]} {thing.colour} {PLURALS.get(thing.kind, thing.kind + 's')}"
        return f"one {thing.words}" if one else str(thing)

    def _related(self, frame: str, rng: random.Random) -> tuple[str, str]:
        """A frame, and the two things seen from either."""
        a, b, relation = *self.things, self.relation
        if rng.random() < 0.5:
            a, b, relation = b, a, CONVERSE[relation]
        word, converse = (rng.choice(RELATION_WORDS[r]) for r in (relation, CONVERSE[relation]))
        style = rng.random()
        if style < 0.15:
            return "{}", f"there is {a}, and {converse} it {b}"
        if style < 0.3:
            return "{}", f"{word} {b} there is {a}"
        return frame, f"{a} {word} {b}"

    def places_exchanged(self) -> "Scene":
        """The twin in which the two things have changed places."""
        first, second = self._two()
        return replace(self, things=(second, first))

    def colours_exchanged(self) -> "Scene":
        """The twin in which the two things have exchanged their colours."""
        first, second = self._two()
        return replace(self, things=(replace(first, colour=second.colour), replace(second, colour=first.colour)))

    def _two(self) -> tuple[Thing, Thing]:
        """Both things of a relation."""
        if self.relation is None:
            raise ValueError(f"only two things can exchange something, got {self.identity!r}")
        return self.things


def _check(name: str, value: str | int, known: Iterable[str | int]) -> None:
    """Refuse a value that the world does not have."""
    if value not in known:
        raise ValueError(f"expected a {name} out of {', '.join(map(str, known))}; got {value!r}")


# Which scenes there are


def sample_scene(rng: random.Random, held_out: bool) -> Scene:
    """Some scene.

    Parameters
    ----------
    rng : random.Random
    held_out : bool
        Whether all its combinations of colour and kind are held-out ones, or all are trained ones. The same is true of
        its twin with the colours exchanged.
    """
    share = rng.random()
    if share < SHARE_ONE:
        return _one(rng, held_out)
    if share < SHARE_ONE + SHARE_COUNTED:
        return _counted(rng, held_out, rng.randint(1, len(NUMBERS)))
    return _related(rng, held_out)


def _one(rng: random.Random, held_out: bool) -> Scene:
    """One thing, of any size."""
    size = rng.choice(list(SIZES)) if rng.random() < SHARE_SIZE_SAID else None
    return Scene((replace(_thing(rng, held_out), size=size),), background=_said_background(rng))


def _counted(rng: random.Random, held_out: bool, count: int) -> Scene:
    """Some equal things."""
    return Scene((_thing(rng, held_out),), count, background=_said_background(rng))


def _related(rng: random.Random, held_out: bool) -> Scene:
    """Two things in a relation."""
    relation = rng.choice(RELATIONS)
    kinds = _ROOMY if relation == "inside" else list(KINDS)
    kind = rng.choice(kinds)
    colours = rng.sample(_PARTNERS[kind, held_out], 2)
    others = [k for k in kinds if k != kind and all(((k, c) in _HELD_OUT) == held_out for c in colours)]
    sizes = [None, None]
    if relation != "inside" and rng.random() < SHARE_SIZE_SAID:
        sizes = rng.sample(list(SIZES), 2)
    things = tuple(map(Thing, (kind, rng.choice(others)), colours, sizes))
    return Scene(things, relation=relation, background=_said_background(rng))


def _thing(rng: random.Random, held_out: bool) -> Thing:
    """Any combination, held out or not."""
    kind = rng.choice(list(KINDS))
    return Thing(kind, rng.choice(_PARTNERS[kind, held_out]))


def _said_background(rng: random.Random) -> str | None:
    """A background to state, or none."""
    return rng.choice(list(BACKGROUNDS)) if rng.random() < SHARE_BACKGROUND_SAID else None


_PARTNERS = {
    (kind, held): [colour for colour in COLOURS if held_out(kind, colour) == held]
    for kind in KINDS
    for held in (False, True)
}
_ROOMY = [name for name, kind in KINDS.items() if kind.roomy]


# Drawing


def draw_scene(scene: Scene, rng: random.Random, resolution: int) -> Image.Image:
    """Draw a scene; each time otherwise.

    Parameters
    ----------
    scene : Scene
    rng : random.Random
        Decides all that the scene leaves open.
    resolution : int
        The side of the picture in pixels, at least 16.

    Returns
    -------
    PIL.Image.Image
        RGB.
    """
    _check_resolution(resolution)
    shades = [_shade(thing.colour, rng) for thing in scene.things]
    canvas, ground = _ground(scene.background, shades, resolution * SUPERSAMPLING, rng)
    behind = [ground, ground] if scene.relation != "inside" else [[*ground, shades[1]], ground]
    pens = [_Pen(shade, tones, canvas.width, rng) for shade, tones in zip(shades, behind, strict=False)]
    draw = ImageDraw.Draw(canvas)
    for shape, number in _composed(scene, rng):
        _paint(draw, shape, pens[number], canvas.width)
    return canvas.reduce(SUPERSAMPLING)


def _check_resolution(resolution: int) -> None:
    """Refuse a side too small for anything to be seen."""
    if resolution < 16:
        raise ValueError(f"expected a resolution of at least 16 pixels, got {resolution}")


class _Shape:
    """The points of one drawing of a kind, moved about.

    `points` (N, 2) begin as a variation of the kind's, in a box around (0, 0) whose longer side is 2; :meth:`place`
    moves them into the picture, the square from (0, 0) to (1, 1).
    """

    def __init__(self, kind: str, rng: random.Random):
        self.kind = kind
        x, y = _POINTS[kind]
        stretch, shear, taper, bend = (rng.uniform(-a, a) for a in (0.16, 0.08, 0.09, 0.08))
        angle = math.radians(rng.uniform(-1, 1) * KINDS[kind].turn)
        if rng.random() < 0.5:
            x = -x
        x, y = x * (1 + stretch + taper * y) + shear * y, y * (1 - stretch) + bend * (y * y - 0.5)
        cos, sin = math.cos(angle), math.sin(angle)
        points = np.stack((cos * x - sin * y, sin * x + cos * y), axis=1)
        low, high = points.min(axis=0), points.max(axis=0)
        scale = 2 / (high - low).max()
        self.points = (points - (low + high) / 2) * scale
        self.half = (high - low) / 2 * scale  # (2,), half of width and height

    def place(self, centre: tuple[float, float], scale: float) -> "_Shape":
        """Scaled, then moved to be around `centre`."""
        self.points = self.points * scale + centre
        return self

    def room(self) -> tuple[tuple[float, float], float]:
        """Centre and radius of the circle inside in which another shape can stand."""
        rim = self.points[_SLICES[self.kind][-1][1]]
        centre = rim.mean(axis=0)
        return tuple(centre), float(np.hypot(*(rim - centre).T).min())


def _composed(scene: Scene, rng: random.Random) -> list[tuple[_Shape, int]]:
    """The placed shapes from back to front, and which of the scene's things each is."""
    shapes = [_Shape(thing.kind, rng) for thing in scene.things * scene.count]
    if scene.relation is None:
        _place_apart(shapes, scene.things[0].size, rng)
        return [(shape, 0) for shape in shapes]
    if scene.relation == "inside":
        inner, outer = shapes
        _place_apart([outer], None, rng, CONTAINER_SIZE)
        centre, radius = outer.room()
        inner.place(centre, 0.92 * radius / np.hypot(*inner.points.T).max())
        return [(outer, 1), (inner, 0)]
    _place_related(shapes, scene, rng)
    return [(shapes[0], 0), (shapes[1], 1)]


def _place_apart(
    shapes: list[_Shape], size: str | None, rng: random.Random, sizes: tuple[float, float] = ANY_SIZE
) -> None:
    """Each shape into a part of the picture of its own, all about equally large."""
    cells = _cells((0, 0, 1, 1), len(shapes), rng)
    room = min(min(right - left, bottom - top) for left, top, right, bottom in cells) / 2 - MARGIN
    scale = rng.uniform(*SIZES.get(size, sizes)) if len(shapes) == 1 else room * rng.uniform(0.7, 0.97)
    for shape, (left, top, right, bottom) in zip(shapes, cells, strict=True):
        width, height = shape.half * scale + MARGIN
        shape.place((rng.uniform(left + width, right - width), rng.uniform(top + height, bottom - height)), scale)


def _cells(box: Box, count: int, rng: random.Random) -> list[Box]:
    """Cut a box into some of about equal size, across its longer side first."""
    if count == 1:
        return [box]
    left, top, right, bottom = box
    few = (count + rng.randint(0, 1)) // 2
    share = few / count + rng.uniform(-0.04, 0.04)
    if (right - left) * rng.uniform(0.8, 1.25) > bottom - top:
        cut = left + share * (right - left)
        parts = (left, top, cut, bottom), (cut, top, right, bottom)
    else:
        cut = top + share * (bottom - top)
        parts = (left, top, right, cut), (left, cut, right, bottom)
    return _cells(parts[0], few, rng) + _cells(parts[1], count - few, rng)


def _place_related(shapes: list[_Shape], scene: Scene, rng: random.Random) -> None:
    """Two shapes beside each other, apart, and not far out of line."""
    axis = 1 if scene.relation in ("above", "below") else 0
    order = [0, 1] if scene.relation in ("above", "left of") else [1, 0]
    scales = [rng.uniform(*(SIZES_OF_TWO[thing.size] if thing.size else ANY_SIZE_OF_TWO)) for thing in scene.things]
    first, second = (shapes[i].half * scales[i] for i in order)  # half of width and height, in the picture
    free = 1 - 4 * MARGIN - 2 * (first[axis] + second[axis])
    before, after = sorted(rng.uniform(0, free) for _ in range(2))
    along = [MARGIN + before + first[axis], 3 * MARGIN + after + 2 * first[axis] + second[axis]]

    edges = [MARGIN + half[1 - axis] for half in (first, second)]
    line, near = rng.uniform(max(edges), 1 - max(edges)), 0.2 * (along[1] - along[0])
    across = [min(max(line + rng.uniform(-near, near), edge), 1 - edge) for edge in edges]
    for i, a, b in zip(order, along, across, strict=True):
        shapes[i].place((b, a) if axis else (a, b), scales[i])


class _Pen:
    """How one thing, or some equal ones, are painted: the shade, outlined or not, with which details."""

    def __init__(self, shade: RGB, behind: list[RGB], side: int, rng: random.Random):
        self.shade = shade
        lost = min(math.dist(shade, tone) for tone in behind) < CONTRAST
        self.outline = _neutral([shade, *behind] if lost else [shade], rng) if lost or rng.random() < 0.4 else None
        self.width = max(2, round(rng.uniform(*OUTLINE_WIDTH) * side))
        self.mark = _neutral([shade], rng)
        self.extras = rng.random() < 0.7


def _paint(draw: ImageDraw.ImageDraw, shape: _Shape, pen: _Pen, side: int) -> None:
    """Outline, body and details of a placed shape."""
    coordinates = (shape.points * side).ravel().tolist()
    parts = [(ink, coordinates[2 * s.start : 2 * s.stop]) for ink, s in _SLICES[shape.kind]]
    for ink, polygon in parts:
        if ink == BODY and pen.outline:
            draw.line(polygon + polygon[:4], pen.outline, pen.width)  # its inner half is painted over
    for ink, polygon in parts:
        if ink == BODY:
            draw.polygon(polygon, pen.shade)
        elif ink == DETAIL or (ink == EXTRA and pen.extras):
            draw.polygon(polygon, pen.mark)


def _slices(parts: tuple[Part, ...]) -> list[tuple[str, slice]]:
    """Where each part's points stand among all points of a kind."""
    stops = np.cumsum([len(polygon) for _, polygon in parts]).tolist()
    return [(ink, slice(stop - len(polygon), stop)) for (ink, polygon), stop in zip(parts, stops, strict=True)]


# All points of a kind, x (N,) and y (N,), and which of them are which part
_POINTS = {name: np.array([point for _, polygon in kind.parts for point in polygon]).T for name, kind in KINDS.items()}
_SLICES = {name: _slices(kind.parts) for name, kind in KINDS.items()}


# Colours and backgrounds


def _shade(colour: str, rng: random.Random) -> RGB:
    """One of the shades that bear a name."""
    return _rgb(*(rng.uniform(*limits) for limits in COLOURS[colour]))


def _rgb(hue: float, saturation: float, value: float) -> RGB:
    """From degrees and [0, 1] to bytes."""
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value))


def _neutral(tones: list[RGB], rng: random.Random) -> RGB:
    """Nearly black or nearly white, whichever is further from all these."""
    dark, light = (rng.randint(0, 40),) * 3, (rng.randint(225, 255),) * 3
    return max(dark, light, key=lambda neutral: min(math.dist(neutral, tone) for tone in tones))


# From top to bottom: sky, sky at the horizon, and what lies below the horizon, if there is one
LANDSCAPES = {
    "day": ((95, 175, 245), (215, 238, 252)),
    "night": ((8, 8, 35), (30, 32, 85)),
    "sea": ((190, 225, 245), (225, 240, 250), (50, 130, 200), (15, 70, 140)),
    "grass": ((195, 225, 245), (230, 240, 245), (130, 195, 85), (65, 140, 45)),
}


def _ground(background: str | None, shades: list[RGB], side: int, rng: random.Random) -> tuple[Image.Image, list[RGB]]:
    """The empty canvas, and its colours; plain and apart from the shades if it can be, when no background is stated."""
    if background is None and rng.random() >= SHARE_BACKGROUND_UNSAID:
        for _ in range(8):
            tone = _plain_tone(rng)
            if all(math.dist(tone, shade) >= CONTRAST for shade in shades):
                break
        return Image.new("RGB", (side, side), tone), [tone]

    background = background or rng.choice(list(BACKGROUNDS))
    tones = [tuple(min(255, max(0, c + rng.randint(-12, 12))) for c in tone) for tone in LANDSCAPES[background]]
    canvas = _gradient(*tones[:2], side, side)
    horizon = 0
    if below := tones[2:]:
        horizon = round(side * rng.uniform(0.2, 0.5))
        canvas.paste(_gradient(*below, side, side - horizon), (0, horizon))
    _texture(ImageDraw.Draw(canvas), background, horizon, side, rng)
    return canvas, tones


def _plain_tone(rng: random.Random) -> RGB:
    """White paper, a pale tint, or anything else that is not glaring."""
    share = rng.random()
    if share < 0.3:
        return (rng.randint(240, 255),) * 3
    if share < 0.75:
        return _rgb(rng.uniform(0, 360), rng.uniform(0.05, 0.3), rng.uniform(0.85, 1))
    return _rgb(rng.uniform(0, 360), rng.uniform(0, 0.5), rng.uniform(0.1, 0.85))


def _gradient(top: RGB, bottom: RGB, width: int, height: int) -> Image.Image:
    """From one colour down to another."""
    column = Image.frombytes("RGB", (1, 2), bytes(top + bottom)).resize((1, height), Image.Resampling.BILINEAR)
    return column.resize((width, height), Image.Resampling.NEAREST)


def _texture(draw: ImageDraw.ImageDraw, background: str, top: int, side: int, rng: random.Random) -> None:
    """Stars, waves or blades of grass, from a height on down."""
    unit = side / 64
    for _ in range(14):
        x, y = rng.uniform(0, side), rng.uniform(top, side)
        if background == "night":
            draw.ellipse((x, y, x + unit * 0.8, y + unit * 0.8), (235, 235, 200))
        elif background == "sea":
            draw.arc((x, y, x + 6 * unit, y + 3 * unit), 20, 160, (170, 210, 235), max(1, round(unit * 0.6)))
        elif background == "grass":
            draw.line((x, y, x + rng.uniform(-1, 1) * unit, y - 3 * unit), (45, 115, 35), max(1, round(unit * 0.6)))


# Learning from it, asking about it, writing it down


class DrawnWorld:
    """Scenes of trained combinations, drawn anew each time: a :class:`clip.training.data.PairDataset`.

    Parameters
    ----------
    length : int
        Draws that count as an epoch.
    resolution : int
        The side of the pictures in pixels.
    twins : bool
        Whether two things in a relation come with two more scenes, drawn anew and worded alike: places exchanged, and
        colours exchanged. In one batch they are hard negatives, since the captions have the same words.
    """

    def __init__(self, length: int, resolution: int = 64, twins: bool = False):
        self.length = length
        self.resolution = resolution
        self.twins = twins

    def __len__(self) -> int:
        return self.length

    def draw(self, index: int, rng: random.Random) -> list[Pair]:
        """A scene as a pair, or as three with its twins. All is up to `rng`, whatever the index."""
        scene = sample_scene(rng, held_out=False)
        scenes = [scene]
        if self.twins and scene.relation:
            scenes += [scene.places_exchanged(), scene.colours_exchanged()]
        wording = rng.getrandbits(32)
        return [
            Pair(draw_scene(scene, rng, self.resolution), scene.caption(random.Random(wording)), scene.identity)
            for scene in scenes
        ]


ABILITIES = ("things", "counting", "places", "colours")


@dataclass(frozen=True)
class Question:
    """A picture, and captions of which one is true.

    Attributes
    ----------
    image : PIL.Image.Image
    captions : list of str
    answer : int
        Which of them.
    """

    image: Image.Image
    captions: list[str]
    answer: int


def questions(ability: str, count: int, seed: int, resolution: int) -> Iterator[Question]:
    """Questions about combinations that :class:`DrawnWorld` never shows.

    Parameters
    ----------
    ability : str
        "things" (which of all 480 combinations of colour and kind), "counting" (one to five), "places" (these two
        things, or with their places exchanged) or "colours" (or with their colours exchanged).
    count : int
        How many questions.
    seed : int
        The same one gives the same questions.
    resolution : int
        The side of the pictures in pixels.

    Raises
    ------
    ValueError
        If there is no such ability.
    """
    _check("ability", ability, ABILITIES)
    return (_question(ability, random.Random(f"{ability} {seed} {i}"), resolution) for i in range(count))


def _question(ability: str, rng: random.Random, resolution: int) -> Question:
    """One question."""
    if ability == "things":
        scene = Scene((_thing(rng, True),))
        captions, answer = _ALL_COMBINATIONS, _ALL_COMBINATIONS.index(scene.identity)
    elif ability == "counting":
        thing, answer = _thing(rng, True), rng.randrange(len(NUMBERS))
        scene = Scene((thing,), answer + 1)
        captions = [Scene((thing,), count).counted(one=True) for count in range(1, len(NUMBERS) + 1)]
    else:
        scene, wording, answer = _related(rng, True), rng.getrandbits(32), rng.randrange(2)
        twin = scene.places_exchanged() if ability == "places" else scene.colours_exchanged()
        captions = [each.caption(random.Random(wording)) for each in ((twin, scene) if answer else (scene, twin))]
    return Question(draw_scene(scene, rng, resolution), captions, answer)


_ALL_COMBINATIONS = [str(Thing(kind, colour)) for kind in KINDS for colour in COLOURS]


def write_folder(
    folder: str | os.PathLike, count: int, seed: int = 0, resolution: int = 64, held_out: bool = False
) -> None:
    """Write pictures as PNG and a table `captions.csv` with the columns image, caption and id.

    Parameters
    ----------
    folder : str or os.PathLike
        New or empty.
    count : int
        How many pictures.
    seed : int
        The same one gives the same pictures.
    resolution : int
        Their side in pixels.
    held_out : bool
        Whether they show the held-out combinations, or the trained ones.

    Raises
    ------
    ValueError
        If `count` is not positive.
    FileExistsError
        If there is something in the folder.
    """
    if count < 1:
        raise ValueError(f"expected at least one picture to draw, got {count}")
    _check_resolution(resolution)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name a new folder, nothing is overwritten")
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("image", "caption", "id"))
        for number in tqdm(range(count), desc="drawing", unit="picture", disable=None):
            rng = random.Random(f"folder {seed} {number}")
            scene = sample_scene(rng, held_out)
            name = f"{number:05}.png"
            draw_scene(scene, rng, resolution).save(folder / name)
            table.writerow((name, scene.caption(rng), scene.identity))
