"""Draw each SVG of this folder as a PNG beside it.

    pip install resvg-py
    python examples/pictures/render.py

The PNGs have 256 x 256 pixels and a palette, which keeps each below 8 KB. Takes a second.
"""

import io
from pathlib import Path

import resvg_py
from PIL import Image

SIZE = 256  # pixels
COLOURS = 256  # in the palette: enough for the gradients

for drawing in sorted(Path(__file__).parent.glob("*.svg")):
    drawn = resvg_py.svg_to_bytes(svg_path=str(drawing), width=SIZE, height=SIZE)
    picture = Image.open(io.BytesIO(drawn)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    picture.save(drawing.with_suffix(".png"), optimize=True)
