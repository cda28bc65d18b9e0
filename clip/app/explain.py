"""`clip explain`: where in the picture is it?"""

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ..preprocess import ImageError, open_image
from ..tasks.encode import encode_images, encode_texts, gather
from ..tasks.explain import METHODS, default_method, explain, seen_box
from .command import add_command, add_model_options, count, load_model, picture_to_write

EPILOG = """\
A map says where, not whether: its highest point is always 1, also for a text that is not about the picture at all.
Whether is the cosine beside it.

peak       the middle of the highest place, in pixels from the picture's left and top
spread     the share of the picture where the map is above one half
seen       (--json) left, top, right, bottom of what the model sees, the center square: outside it the map is 0

attention  ViT: the gradient-weighted attention of all blocks (Chefer et al. 2021); a grid of patches
grad-cam   ResNet: the last stage's channels by their gradients (Selvaraju et al. 2017); a grid of 32 pixels
occlusion  any model: how far the score falls where a window is covered (Zeiler & Fergus 2014); a hundred passes

examples:
  clip explain photo.jpg --text "a cat" -o heat.png
  clip explain photo.jpg --text "a cat" "a dog" "a sofa" -o heat.png --method occlusion
  clip explain examples/pictures/star-above-boat.png --text "a yellow star" "a blue boat" --model tiny -o heat.png"""

WIDTH = 60  # characters of a text in the table
PANEL = 320  # pixels, the long side of each picture drawn
MARGIN = 10
FONT_SIZE = 15
RAMP = ((255, 237, 160), (254, 178, 76), (240, 59, 32), (128, 0, 38))  # pale yellow to dark red, darker all the way
OPACITY = 0.85  # of the ramp's end over the picture in grey; its beginning is transparent


@dataclass(frozen=True)
class Finding:
    """What one map says, in numbers."""

    text: str
    cosine: float  # [-1, 1]
    peak: tuple[int, int] | None  # x, y in pixels, the middle of the highest place; None if the map is 0 everywhere
    spread: float  # [0, 1], the share of the picture above one half


def add_explain_command(commands: argparse._SubParsersAction) -> None:
    """Add `explain` to the commands of `clip`."""
    parser = add_command(
        commands,
        "explain",
        help="show where in a picture a text is",
        description="Show which part of a picture speaks for a text, as a map drawn over it.",
        epilog=EPILOG,
    )
    parser.set_defaults(run=_explain)
    parser.add_argument("picture", metavar="PICTURE", help="a picture file")
    parser.add_argument(
        "--text", nargs="+", action="extend", required=True, metavar="TEXT", help="what to look for, a map for each"
    )
    parser.add_argument(
        "-o", "--out", type=picture_to_write, metavar="FILE", help="the picture to write: the maps side by side"
    )
    parser.add_argument("--method", choices=METHODS, help="how (default: attention for a ViT, grad-cam for a ResNet)")
    parser.add_argument("--window", type=count, metavar="PIXELS", help="side of what occlusion covers")
    parser.add_argument("--stride", type=count, metavar="PIXELS", help="steps of occlusion's window")
    add_model_options(parser, "--model", default="ViT-B/32")


def _explain(options: argparse.Namespace) -> int:
    try:
        picture = open_image(options.picture)
    except ImageError as error:
        print(f"clip explain: {error}", file=sys.stderr)
        return 1
    model, preprocess = load_model(options)
    method = options.method or default_method(model)

    texts = options.text
    features = gather(encode_images(model, preprocess, [picture])).values  # (1, E)
    cosines = (encode_texts(model, texts) @ features[0]).tolist()
    maps = [
        explain(model, picture, text, method, window=options.window, stride=options.stride)
        for text in tqdm(texts, unit="map", leave=False, disable=None if len(texts) > 1 else True)
    ]
    findings = [_finding(*found) for found in zip(texts, cosines, maps, strict=True)]
    seen = seen_box(model, picture)
    if options.out:
        panels = [_panel(picture, None, seen, os.path.basename(options.picture))]
        panels += [
            _panel(picture, heat, seen, f"{finding.text}\n{finding.cosine:.2f}")
            for finding, heat in zip(findings, maps, strict=True)
        ]
        _side_by_side(panels).save(options.out)

    if options.json:
        shared = {"picture": options.picture, "method": method, "seen": seen}
        for finding in findings:
            print(json.dumps(shared | asdict(finding)))
    else:
        print(_table(options.picture, picture, method, findings))
    return 0


def _finding(text: str, cosine: float, heat: torch.Tensor) -> Finding:
    """The numbers of one map (H, W)."""
    highest = heat.max()
    row, column = (heat >= 0.9999 * highest).nonzero().double().mean(dim=0).tolist()  # it may be a plateau
    peak = (int(column), int(row)) if highest > 0 else None
    return Finding(text, cosine, peak, (heat > 0.5).double().mean().item())


def _table(path: str, picture: Image.Image, method: str, findings: list[Finding]) -> str:
    """The findings as a small table."""
    texts = [_one_line(finding.text) for finding in findings]
    width = max(len("text"), *map(len, texts))
    lines = [f"{path}, {picture.width} x {picture.height}, {method}", f"  {'text':{width}}  cosine       peak  spread"]
    for text, finding in zip(texts, findings, strict=True):
        peak = "{}, {}".format(*finding.peak) if finding.peak else "nowhere"
        lines.append(f"  {text:{width}}  {finding.cosine:6.3f}  {peak:>9}  {finding.spread:6.0%}")
    return "\n".join(lines)


def _one_line(text: str) -> str:
    """A text without line breaks and other control characters, cut if it is long."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


def _panel(picture: Image.Image, heat: torch.Tensor | None, seen: tuple[float, ...], caption: str) -> Image.Image:
    """The picture and its caption; under a map (H, W) it becomes grey, and paler where the model sees nothing of it."""
    scale = PANEL / max(picture.size)
    size = tuple(max(1, round(scale * side)) for side in picture.size)
    picture = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    if heat is not None:
        inside = Image.new("L", size, 96)
        inside.paste(255, tuple(round(scale * edge) for edge in seen))
        grey = Image.composite(picture.convert("L"), Image.new("L", size, "white"), inside).convert("RGB")
        values = np.asarray(Image.fromarray(heat.numpy()).resize(size, Image.Resampling.BILINEAR))
        opacity = Image.fromarray((255 * OPACITY * values).round().astype(np.uint8))
        picture = Image.composite(_colored(values), grey, opacity)
    font = ImageFont.load_default(FONT_SIZE)
    width = max(size[0], PANEL // 2)
    lines = [line for part in caption.split("\n") for line in _wrapped(part, font, width)]
    height = round(1.3 * FONT_SIZE)
    panel = Image.new("RGB", (width, size[1] + MARGIN // 2 + height * len(lines)), "white")
    panel.paste(picture, ((width - size[0]) // 2, 0))
    draw = ImageDraw.Draw(panel)
    for i, line in enumerate(lines):
        draw.text((width / 2, size[1] + MARGIN // 2 + height * i), line, "black", font, anchor="ma")
    return panel


def _colored(values: np.ndarray) -> Image.Image:
    """Numbers (H, W) in [0, 1] as colours of the ramp."""
    places = np.linspace(0, 1, len(RAMP))
    channels = [np.interp(values, places, channel) for channel in zip(*RAMP, strict=True)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, as far as words allow."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _side_by_side(panels: list[Image.Image]) -> Image.Image:
    """Pictures in a row, on white."""
    width = sum(panel.width for panel in panels) + MARGIN * (len(panels) + 1)
    whole = Image.new("RGB", (width, max(panel.height for panel in panels) + 2 * MARGIN), "white")
    left = MARGIN
    for panel in panels:
        whole.paste(panel, (left, MARGIN))
        left += panel.width + MARGIN
    return whole
