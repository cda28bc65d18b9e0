"""Draw each SVG of this folder as a PNG of 256 x 256 pixels beside it.

    pip install resvg-py
    python examples/pictures/render.py

In full colour, without a palette: CLIP's preprocessing resizes before it converts to RGB, and a picture with a palette
can only be resized by picking pixels.
"""

import io
from pathlib import Path

import resvg_py
from PIL import Image

for drawing in sorted(Path(__file__).parent.glob("*.svg")):
    drawn = resvg_py.svg_to_bytes(svg_path=str(drawing), width=256, height=256)
    Image.open(io.BytesIO(drawn)).convert("RGB").save(drawing.with_suffix(".png"), optimize=True)
