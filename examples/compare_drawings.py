"""Compare every drawing of examples/pictures with every caption, as one picture: the matrix of CLIP Fig. 1 and 3.

    python examples/compare_drawings.py -o docs/pictures/drawings.png

A row is a caption, a column a drawing made by hand, each cell their cosine. The brightest of a column is framed: it is
the caption that the model would choose. Needs matplotlib (`pip install clip-from-scratch[train]`), no connection.
"""

import argparse
import csv
from pathlib import Path

import matplotlib
import torch
from PIL import Image

import clip

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import Rectangle

FOLDER = Path(__file__).parent / "pictures"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("-o", "--out", type=Path, default="drawings.png", help="the picture to write")
parser.add_argument("--model", default="tiny", help="a name or path that clip.load takes (default: tiny)")
options = parser.parse_args()

with open(FOLDER / "captions.csv", encoding="utf-8", newline="") as file:
    rows = list(csv.DictReader(file))
captions = [row["caption"] for row in rows]
pictures = [Image.open(FOLDER / row["image"]).convert("RGB") for row in rows]

model, preprocess = clip.load(options.model, device="cpu")
with torch.no_grad():
    image_features = model.encode_image(torch.stack([preprocess(picture) for picture in pictures]))  # (N, E)
    text_features = model.encode_text(clip.tokenize(captions))  # (N, E)
image_features /= image_features.norm(dim=-1, keepdim=True)
text_features /= text_features.norm(dim=-1, keepdim=True)
cosines = text_features @ image_features.T  # (captions, pictures)
chosen = cosines.argmax(dim=0).tolist()

count = len(rows)
figure, axis = pyplot.subplots(figsize=(11, 8), constrained_layout=True)
axis.imshow(cosines, cmap="viridis", vmin=-0.1, vmax=0.9)
for column, picture in enumerate(pictures):
    axis.imshow(picture, extent=(column - 0.47, column + 0.47, -0.55, -1.49))
    axis.add_patch(Rectangle((column - 0.5, chosen[column] - 0.5), 1, 1, fill=False, color="red", linewidth=2))
    for row in range(count):
        color = "black" if cosines[row, column] > 0.55 else "white"
        axis.text(column, row, f"{cosines[row, column]:.2f}", ha="center", va="center", fontsize=8, color=color)
axis.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -1.6), xticks=[], yticks=range(count))
axis.set_yticklabels(captions)
axis.spines[:].set_visible(False)
figure.savefig(options.out, dpi=90, bbox_inches="tight")
print(f"{sum(a == b for a, b in enumerate(chosen))} of {count} drawings find their own caption; see {options.out}")
