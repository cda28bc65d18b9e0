"""Search a folder of pictures by a sentence: every picture and the sentence become vectors, and the nearest are shown.

    clip draw --count 200 --held-out -o drawings
    python examples/search_pictures.py drawings "a red fish" --grid matches.png

Prints the best matches with their cosines; `--grid` also writes them side by side. With `--model ViT-B/32` it searches
photographs. Everything is embedded anew in each call.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import clip

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
TILE, MARGIN, LINE = 128, 8, 14  # pixels

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path, help="a folder of pictures")
parser.add_argument("query", help="what to look for")
parser.add_argument("--model", default="tiny", help="a name or path that clip.load takes (default: tiny)")
parser.add_argument("--top", type=int, default=6, help="matches to show (default: 6)")
parser.add_argument("--grid", type=Path, help="also write the matches as one picture")
options = parser.parse_args()

paths = sorted(path for path in options.folder.iterdir() if path.suffix.lower() in SUFFIXES)
if not paths:
    parser.error(f"there are no pictures in {options.folder}")

model, preprocess = clip.load(options.model, device="auto")
device = model.logit_scale.device

with torch.no_grad():
    batches = [preprocess.batch(paths[start : start + 64]) for start in range(0, len(paths), 64)]
    images = torch.cat([model.encode_image(batch.to(device)).float() for batch in batches])  # (N, E)
    text = model.encode_text(clip.tokenize(options.query).to(device)).float()  # (1, E)

images /= images.norm(dim=-1, keepdim=True)
text /= text.norm(dim=-1, keepdim=True)
cosines, places = (images @ text[0]).topk(min(options.top, len(paths)))
matches = [(paths[place], cosine) for place, cosine in zip(places.tolist(), cosines.tolist(), strict=True)]

for path, cosine in matches:
    print(f"{cosine:6.3f}  {path}")

if options.grid:
    step = TILE + MARGIN
    grid = Image.new("RGB", (step * len(matches) + MARGIN, TILE + 2 * MARGIN + LINE), "white")
    for column, (path, cosine) in enumerate(matches):
        left = MARGIN + column * step
        grid.paste(Image.open(path).convert("RGB").resize((TILE, TILE)), (left, MARGIN))
        ImageDraw.Draw(grid).text((left, MARGIN + TILE + 2), f"{cosine:.3f}", fill="black")
    grid.save(options.grid)
