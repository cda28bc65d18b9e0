"""Augmentation: a picture varied at random, so that no model can learn it by heart.

Source: Radford et al. (2103.00020) §2.3, "a random square crop from resized images is the only data augmentation used";
Bianchi et al. (2108.08688), the Italian CLIP, which had 1.4 million pairs instead of 400 million and varied them more.

    name       class              what it may change
    crop       RandomSquareCrop   which part is seen
    strong     StrongAugment      also hue, side, tilt, slant, perspective, contrast
    artwork    ArtworkAugment     what differs between two draughtsmen: place, size, tilt, colours, background, line

Each takes an RGB picture and a `random.Random`, and returns an RGB picture of R by R pixels, which the model's
preprocessing then only normalises. All that is random comes from that generator: the same picture and the same
generator give the same pixels. What a variation changes, captions must not speak of: a mirrored picture is not "a cup
left of a key", a grey one no longer "a red fish".
"""

import math
import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps

__all__ = ["AUGMENTS", "ArtworkAugment", "Augment", "RandomSquareCrop", "StrongAugment"]

GREY = (127, 127, 127)

Augment = Callable[[Image.Image, random.Random], Image.Image]


class RandomSquareCrop:
    """A random square of the picture, resized: the paper's augmentation.

    The paper does not say how much larger than the crop the resized picture was. We follow open_clip, whose crops keep
    90 to 100 % of the area, though as squares; its own may be up to a third wider than high, and are then squeezed.

    Parameters
    ----------
    resolution : int
        R, in pixels.
    scale : (float, float)
        The least and the greatest area of the square, relative to the largest that fits into the picture.
    """

    def __init__(self, resolution: int, scale: tuple[float, float] = (0.9, 1.0)):
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"expected 0 < least <= greatest <= 1, got {scale}")
        self.resolution = resolution
        self.scale = scale

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """A square of the picture."""
        return _square(image, self.resolution, math.sqrt(rng.uniform(*self.scale)), rng)


class StrongAugment:
    """The Italian CLIP's augmentations, in its order and strength.

    The largest square, anywhere in the picture; hue by up to a tenth of the circle; mirrored half of the time; turned
    by up to 15 degrees, moved by a tenth, scaled by a fifth and slanted by 15 degrees, on grey; and with probability
    0.3 each, seen from an angle, stretched to full contrast, and equalised.

    Parameters
    ----------
    resolution : int
        R, in pixels.
    flip : bool
        Whether to mirror. "Left of" in a caption becomes false in the mirror, and so does any text in the picture.
    """

    def __init__(self, resolution: int, flip: bool = True):
        self.resolution = resolution
        self.flip = flip

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """The picture varied."""
        image = _square(image, self.resolution, 1.0, rng)
        image = _shift_hue(image, rng.uniform(-0.1, 0.1))
        if self.flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        image = _affine(
            image,
            degrees=rng.uniform(-15, 15),
            shift=(rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1)),
            scale=rng.uniform(0.8, 1.2),
            shear=rng.uniform(-15, 15),
            fill=GREY,
        )
        if rng.random() < 0.3:
            image = _perspective(image, 0.3, GREY, rng)
        if rng.random() < 0.3:
            image = ImageOps.autocontrast(image)
        if rng.random() < 0.3:
            image = ImageOps.equalize(image)
        return image


class ArtworkAugment:
    """What changes from one draughtsman to the next, for icons and drawings on a plain ground.

    Two studios draw a fish in other proportions, shades and lines, elsewhere on the page. A model that has seen two is
    to know a third, so what gives a studio away is varied, and what makes a fish a fish is left alone. Hues move a
    little only, since captions name colours (one picture in ten is grey all the same); nothing is mirrored, since they
    name sides.

    Parameters
    ----------
    resolution : int
        R, in pixels.
    flip : bool
        Whether to mirror half of the time.
    """

    def __init__(self, resolution: int, flip: bool = False):
        self.resolution = resolution
        self.flip = flip

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """The drawing varied."""
        ground = _border_color(image)
        image = self._drawn_elsewhere(image, ground, rng)
        if self.flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        image = self._drawn_otherwise(image, rng)
        if rng.random() < 0.3:
            image = _recolor_ground(image, tuple(rng.randrange(256) for _ in range(3)))
        return image

    def _drawn_elsewhere(self, image: Image.Image, ground: tuple[int, ...], rng: random.Random) -> Image.Image:
        """Other size, proportion, tilt and place, on more of the same ground."""
        side = self.resolution
        size, stretch = rng.uniform(0.65, 1.1), math.sqrt(rng.uniform(0.8, 1.25))
        longest = max(image.size)
        width = max(1, round(side * size * stretch * image.width / longest))
        height = max(1, round(side * size / stretch * image.height / longest))
        page = Image.new("RGB", (side, side), ground)
        left = round((side - width) * rng.uniform(-0.1, 1.1))  # a little may be cut off
        top = round((side - height) * rng.uniform(-0.1, 1.1))
        page.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
        return _affine(page, degrees=rng.gauss(0, 8), shift=(0, 0), scale=1, shear=rng.gauss(0, 5), fill=ground)

    def _drawn_otherwise(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """Other colours, contrast and line."""
        image = _shift_hue(image, rng.uniform(-0.03, 0.03))
        image = _adjust(
            image,
            saturation=rng.uniform(0.5, 1.4),
            contrast=rng.uniform(0.7, 1.3),
            brightness=rng.uniform(-30, 30),
        )
        if rng.random() < 0.2:
            image = _outlined(image)
        if rng.random() < 0.1:
            image = ImageOps.posterize(image, rng.choice((2, 3)))
        if rng.random() < 0.1:
            image = image.convert("L").convert("RGB")
        if rng.random() < 0.2:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
        return image


AUGMENTS: dict[str, Callable[[int], Augment]] = {
    "crop": RandomSquareCrop,
    "strong": StrongAugment,
    "artwork": ArtworkAugment,
}


# One variation each, of RGB pictures


def _square(image: Image.Image, resolution: int, share: float, rng: random.Random) -> Image.Image:
    """A square of `share` times the short side, anywhere in the picture, resized."""
    side = share * min(image.size)
    left, top = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
    box = (left, top, min(left + side, image.width), min(top + side, image.height))
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)


def _shift_hue(image: Image.Image, turn: float) -> Image.Image:
    """Every hue moved along the colour circle, of length 1; grey has none and stays."""
    steps = round(256 * turn)
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + steps) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _adjust(image: Image.Image, saturation: float, contrast: float, brightness: float) -> Image.Image:
    """Saturation and contrast times a factor, brightness plus levels, in one linear map."""
    luma = (0.299, 0.587, 0.114)
    offset = 127.5 * (1 - contrast) + brightness
    rows = [
        [contrast * (saturation * (i == j) + (1 - saturation) * luma[j]) for j in range(3)] + [offset] for i in range(3)
    ]
    return image.convert("RGB", tuple(value for row in rows for value in row))


def _affine(
    image: Image.Image,
    degrees: float,
    shift: tuple[float, float],
    scale: float,
    shear: float,
    fill: tuple[int, ...],
) -> Image.Image:
    """Slanted by `shear` degrees, turned, scaled about the middle, then moved by a share of the sides."""
    turn, slant = math.radians(degrees), math.tan(math.radians(shear))
    cos, sin = math.cos(turn) * scale, math.sin(turn) * scale
    forward = np.array([[cos, cos * slant - sin], [sin, sin * slant + cos]])
    back = np.linalg.inv(forward)  # Pillow asks where an output pixel comes from
    middle = np.array(image.size) / 2
    origin = middle - back @ (middle + np.array(shift) * image.size)
    coefficients = (back[0, 0], back[0, 1], origin[0], back[1, 0], back[1, 1], origin[1])
    return image.transform(
        image.size, Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BILINEAR, fillcolor=fill
    )


def _perspective(image: Image.Image, distortion: float, fill: tuple[int, ...], rng: random.Random) -> Image.Image:
    """Each corner moved inwards, by up to `distortion` times half a side along both axes."""
    width, height = image.size
    rows, values = [], []
    for x, y in [(0, 0), (width, 0), (width, height), (0, height)]:
        # Where the corner goes, |0 - d| or |side - d|, and what Pillow asks: from there, where it was.
        u, v = abs(x - rng.uniform(0, distortion * width / 2)), abs(y - rng.uniform(0, distortion * height / 2))
        # x = (a u + b v + c) / (g u + h v + 1), y = (d u + e v + f) / (g u + h v + 1): linear in a to h
        rows += [[u, v, 1, 0, 0, 0, -x * u, -x * v], [0, 0, 0, u, v, 1, -y * u, -y * v]]
        values += [x, y]
    coefficients = np.linalg.solve(np.array(rows), np.array(values))
    return image.transform(
        image.size, Image.Transform.PERSPECTIVE, coefficients, resample=Image.Resampling.BILINEAR, fillcolor=fill
    )


def _border_color(image: Image.Image) -> tuple[int, ...]:
    """The colour of the ground: the median of the four corners, channel by channel."""
    right, bottom = image.width - 1, image.height - 1
    corners = [image.getpixel(corner) for corner in ((0, 0), (right, 0), (0, bottom), (right, bottom))]
    return tuple(sum(sorted(levels)[1:3]) // 2 for levels in zip(*corners, strict=True))


def _recolor_ground(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """Another colour for what looks like the border and is reached from it in a straight line.

    White eyes in a face on white stay white. At a soft edge the ground shines through in part, and is replaced in part.
    """
    pixels = np.asarray(image, dtype=np.float32)
    ground = np.array(_border_color(image), dtype=np.float32)
    likeness = (1 - np.abs(pixels - ground).max(axis=2) / 64).clip(0, 1)  # (H, W)
    reach = np.minimum.accumulate  # how much of the ground is left on the way from one side
    share = np.maximum.reduce(
        [
            reach(likeness, axis=0),
            reach(likeness[::-1], axis=0)[::-1],
            reach(likeness, axis=1),
            reach(likeness[:, ::-1], axis=1)[:, ::-1],
        ]
    )
    replaced = pixels + share[:, :, None] * (np.array(color, dtype=np.float32) - ground)
    return Image.fromarray(replaced.clip(0, 255).round().astype(np.uint8))


def _outlined(image: Image.Image) -> Image.Image:
    """A dark line where colours meet."""
    edges = image.convert("L").filter(ImageFilter.FIND_EDGES)
    edges = ImageOps.expand(ImageOps.crop(edges, 1), 1)  # the filter leaves the outermost pixels as they were
    return ImageChops.multiply(image, ImageOps.invert(edges).convert("RGB"))
