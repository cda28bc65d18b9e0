"""The tutorial's CLIP: two small towers, a learned temperature, Fig. 3 as a loop; then a sentence finds pictures.

    python examples/recipes/tutorial_clip.py --data data/emoji
    python examples/recipes/tutorial_clip.py --vision resnet --query "a slice of cake" "the flag of norway"

Source: the many pages that build CLIP on a few thousand pictures to show how it works, most of them with a ViT and a
text transformer, on Flickr8k, Fashion-MNIST or CIFAR-10. docs/recipes.md says where their code differs from this.

    picture  (N, 3, 64, 64)                    sentence  (N, 32) token ids
      │  --vision: ViT, ResNet, any of timm      │  a causal transformer of three layers, read at the end token
    I  (N, 256)                                T  (N, 256)
      └──── unit length ──── logits = exp(t) · I Tᵀ ────┘        t learned, exp(t) at most 100
                             loss = ½ · (cross entropy of rows + of columns)

It learns from one studio's emoji, 1,720 pictures and their names, varied as another draughtsman might. Then every
name asks for its picture among all others (R@1, R@5, R@10), where it gets harder: among the pictures it learned from;
among the same things as two other studios draw them; and among 150 things of which it saw neither picture nor name. By
chance R@1 is 0.06 % of 1,720 pictures, and 0.67 % of 150.

At the end `found-VISION.png` shows what sentences find among all 5,610 pictures of the three studios, the best first.

R@1 after 500 steps each, a quarter of an hour on two cores for both:

              learned from    twemoji    openmoji    things never seen
    vit       58.0 %          12.0 %      5.5 %      21.3 %
    resnet    84.7 %          23.0 %      7.2 %      28.7 %
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    STUDIOS,
    Concept,
    command_line,
    draw_matches,
    emoji_concepts,
    emoji_items,
    report,
    score,
    without_torchvision_kernels,
)
from torch import nn
from tqdm import tqdm

import clip
from clip import DualEncoder
from clip.clip import preprocess_of
from clip.model import CLIP
from clip.preprocess import Preprocess
from clip.tasks.encode import encode_images, encode_texts, gather
from clip.towers import TextTransformer, TimmTower
from clip.training.augment import ArtworkAugment
from clip.training.data import Batch, Batches, CaptionedPictures
from clip.training.fast import fast_blocks
from clip.training.loss import clip_scale_
from clip.training.optimizer import adamw, warmup_cosine

SEED = 0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EMBED_DIM, RESOLUTION = 256, 64
CONTEXT, VOCABULARY = 32, 49408  # token ids in a sentence, and in all
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS = 128, 3, 2
VISION = {  # layers, width, patch
    "vit": (4, 128, 8),
    "resnet": ((2, 2, 2, 2), 20, None),
}
STEPS, BATCH, WARMUP = 500, 256, 50
LR, DECAY, LONGEST_GRADIENT = 1e-3, 0.2, 1.0
SENTENCES = ("a red heart", "a happy face", "a cat", "a slice of cake", "a train", "the flag of norway")
TOP = 8


def main() -> None:
    options = read_options()
    steps, batch_size = STEPS, BATCH
    learned, concepts = emoji_items(options.data, options.studio), emoji_concepts(options.data)
    if options.short:
        steps, batch_size, learned, concepts = 3, 16, learned[:64], concepts[::10]
    options.out.mkdir(parents=True, exist_ok=True)

    rows = []
    for vision, model in {vision: build(vision) for vision in options.vision}.items():
        preprocess = preprocess_of(model)
        pictures = CaptionedPictures(learned, ArtworkAugment(RESOLUTION))
        batches = Batches(pictures, batch_size, preprocess, SEED, workers=1, context_length=CONTEXT)
        train(model, batches, steps, vision)
        rows += ask(vision, model, preprocess, concepts, options)
        clip.save(model, options.out / f"{vision}.safetensors")
        found = search(model, preprocess, options.query, concepts, options.data)
        draw_matches(options.out / f"found-{vision}.png", found)
    report(rows, options.out)


def read_options() -> argparse.Namespace:
    parser = command_line(__doc__, "tutorial_clip")
    parser.add_argument(
        "--vision",
        nargs="+",
        default=list(VISION),
        metavar="NAME",
        help="image towers to train, one after the other: vit, resnet, or names of timm's (default: vit resnet)",
    )
    parser.add_argument(
        "--studio", choices=STUDIOS, default="noto", help="whose pictures it learns from (default: noto)"
    )
    parser.add_argument("--query", nargs="+", default=SENTENCES, metavar="TEXT", help="sentences to find pictures for")
    return parser.parse_args()


def build(vision: str) -> CLIP:
    """A small CLIP with that image tower, its weights drawn at random."""
    torch.manual_seed(SEED)
    if vision in VISION:
        layers, width, patch = VISION[vision]
        text = (CONTEXT, VOCABULARY, TEXT_WIDTH, TEXT_HEADS, TEXT_LAYERS)
        return CLIP(EMBED_DIM, RESOLUTION, layers, width, patch, *text)
    without_torchvision_kernels()
    image_tower = TimmTower(vision, RESOLUTION)
    return DualEncoder(
        image_tower,
        TextTransformer(CONTEXT, VOCABULARY, TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS, EMBED_DIM),
        nn.Linear(image_tower.output_dim, EMBED_DIM, bias=False),
        preprocess=Preprocess(RESOLUTION, image_tower.mean, image_tower.std),
    )


def train(model: CLIP, batches: Batches, steps: int, name: str) -> None:
    """CLIP Fig. 3, `steps` times."""
    model.to(DEVICE).train()
    optimizer = adamw(model, LR, DECAY)
    with tqdm(islice(endless(batches), steps), total=steps, desc=f"training {name}", unit="step") as bar:
        for step, batch in enumerate(bar):
            for group in optimizer.param_groups:
                group["lr"] = LR * warmup_cosine(step, min(WARMUP, steps // 2), steps)

            # each picture and each sentence as a vector; the same numbers as without `fast_blocks`, in half the time
            images, tokens = batch.images.to(DEVICE), batch.tokens.to(DEVICE)
            with fast_blocks(model, tokens), torch.autocast(DEVICE, torch.bfloat16):
                image_features, text_features = model.encode_image(images), model.encode_text(tokens)
            image_features = F.normalize(image_features.float(), dim=-1)  # (N, E)
            text_features = F.normalize(text_features.float(), dim=-1)

            # every picture beside every sentence: the right one is on the diagonal
            logits = model.logit_scale.exp() * image_features @ text_features.T  # (N, N)
            right = torch.arange(len(logits), device=DEVICE)
            loss = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2

            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), LONGEST_GRADIENT)
            optimizer.step()
            clip_scale_(model.logit_scale)
            bar.set_postfix(loss=f"{loss.item():.2f}", scale=f"{model.logit_scale.exp().item():.1f}")
    model.eval()


def endless(batches: Batches) -> Iterator[Batch]:
    """Epoch after epoch, each in another order."""
    for epoch in count():
        yield from batches.epoch(epoch)


def ask(
    vision: str, model: CLIP, preprocess: Preprocess, concepts: Sequence[Concept], options: argparse.Namespace
) -> list[dict[str, str | float]]:
    """Recall of pictures by their names: of the studio learned from, of the others, and of what nobody showed."""
    trained = [concept for concept in concepts if not concept.held_out]
    held_out = [concept for concept in concepts if concept.held_out]
    asked = {f"{options.studio}, learned from": (options.studio, trained)}
    asked |= {f"{studio}, never seen": (studio, trained) for studio in STUDIOS if studio != options.studio}
    asked |= {f"{options.studio}, things never seen": (options.studio, held_out)}
    rows = []
    for what, (studio, those) in asked.items():
        pictures = [concept.picture(options.data, studio) for concept in those]
        shares = score(model, preprocess, pictures, [concept.name for concept in those])
        recall = {name: shares[name] for name in ("R@1", "R@5", "R@10")}
        rows.append({"vision": vision, "pictures": what, "number": f"{len(those):,}", **recall})
    return rows


def search(
    model: CLIP, preprocess: Preprocess, sentences: Sequence[str], concepts: Sequence[Concept], data: Path
) -> dict[str, list[Path]]:
    """The nearest pictures of all studios for each sentence."""
    pictures = [concept.picture(data, studio) for studio in STUDIOS for concept in concepts]
    images = gather(encode_images(model, preprocess, pictures, BATCH)).values
    nearest = (encode_texts(model, sentences, truncate=True) @ images.T).topk(TOP).indices
    return {sentence: [pictures[i] for i in row] for sentence, row in zip(sentences, nearest.tolist(), strict=True)}


if __name__ == "__main__":
    main()
