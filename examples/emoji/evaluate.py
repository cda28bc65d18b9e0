"""Does a model know the emoji by name? Zero-shot naming and search, studio by studio.

    python examples/emoji/evaluate.py runs/emoji/best.safetensors --data data/emoji --studio openmoji
    python examples/emoji/evaluate.py runs/emoji/best.safetensors --data data/emoji --concepts held-out

MODEL is a released name or a checkpoint's path; `prepare.py` wrote the folder. Every picture of a studio is named among
the names of all concepts (top-1, top-5), and for every name its picture is sought among all of the studio's (R@1, R@5,
R@10), once with the name alone and once with five sentences averaged in embedding space (CLIP §3.1.4). A tiny model
takes seconds.

What counts as right: the picture's own name, and the name of a picture of the same studio that is the same file, byte
for byte. OpenMoji draws one astronaut for "astronaut" and "man astronaut", and everybody draws one flag for Norway and
for Svalbard: no model can tell those apart, and either answer is right, in both directions.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from csv import DictReader
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import clip
from clip.tasks.metrics import recall_at_k

STUDIOS = ("noto", "twemoji", "openmoji")
PROMPTS = {
    "name": ("{}",),
    "five prompts": ("{}", "{} emoji", "an emoji of {}", "a picture of {}", "a drawing of {}"),
}
CONCEPTS = {"all": ("0", "1"), "trained": ("0",), "held-out": ("1",)}  # -> what the column held_out may say
BATCH = 256


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Zero-shot naming of emoji, and search by name.")
    parser.add_argument("model", help="a released name or the path of a checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="the folder that prepare.py wrote")
    parser.add_argument("--studio", nargs="+", choices=STUDIOS, default=None, help="default: all in the folder")
    parser.add_argument(
        "--concepts", choices=tuple(CONCEPTS), default="all", help="which to ask about, among themselves (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of a table")
    options = parser.parse_args(arguments)
    if not (options.data / "concepts.csv").exists():
        parser.error(f"expected concepts.csv in {options.data}: run examples/emoji/prepare.py -o {options.data} first")

    names = read_names(options.data, options.concepts)
    studios = options.studio or [studio for studio in STUDIOS if (options.data / f"{studio}.csv").exists()]
    model, preprocess = clip.load(options.model, device="auto")
    classifiers = {
        prompt: clip.ZeroShotClassifier(model, list(names.values()), templates) for prompt, templates in PROMPTS.items()
    }
    results = []
    for studio in studios:
        pictures = [options.data / studio / f"{id}.png" for id in names]
        right = right_answers(pictures).to(model.logit_scale.device)
        features = encode(model, preprocess, pictures)
        for prompt, classifier in classifiers.items():
            results.append({"studio": studio, "text": prompt, **score(features @ classifier.weights, right)})

    if options.json:
        for result in results:
            print(json.dumps({"concepts": options.concepts, "count": len(names), **result}))
    else:
        print(f"{len(names)} concepts ({options.concepts}) among themselves; chance is {1 / len(names):.2%}\n")
        print(table(results))


def read_names(folder: Path, concepts: str) -> dict[str, str]:
    """The names of the chosen concepts, id -> name."""
    with open(folder / "concepts.csv", encoding="utf-8", newline="") as file:
        return {row["id"]: row["name"] for row in DictReader(file) if row["held_out"] in CONCEPTS[concepts]}


def right_answers(pictures: Sequence[Path]) -> torch.Tensor:
    """(N, N), bool: whether the name of picture j is right for picture i, as the two files are the same."""
    kinds = defaultdict(lambda: len(kinds))
    kind = torch.tensor([kinds[path.read_bytes()] for path in pictures])
    return kind[:, None] == kind


@torch.no_grad()
def encode(model: torch.nn.Module, preprocess: clip.preprocess.Preprocess, pictures: Sequence[Path]) -> torch.Tensor:
    """Pictures as unit vectors (N, E), float32."""
    features = []
    for start in tqdm(range(0, len(pictures), BATCH), desc=pictures[0].parent.name, unit="batch"):
        images = preprocess.batch(pictures[start : start + BATCH])
        features.append(model.encode_image(images.to(model.logit_scale.device)).float())
    return F.normalize(torch.cat(features), dim=-1)


def score(cosines: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
    """Of cosines (N pictures, N names): naming from left to right, search from top to bottom."""
    naming = recall_at_k(cosines, right, ks=(1, 5))
    search = recall_at_k(cosines.T, right.T, ks=(1, 5, 10))
    return {f"top-{k}": share for k, share in naming.items()} | {f"R@{k}": share for k, share in search.items()}


def table(results: Sequence[dict[str, str | float]]) -> str:
    """The results as Markdown."""
    header = list(results[0])
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]
    lines += [[f"{value:.1%}" if isinstance(value, float) else value for value in row.values()] for row in results]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
