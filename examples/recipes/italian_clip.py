"""Italian CLIP: an image tower that was trained with English learns to be spoken to in another language.

    python examples/recipes/italian_clip.py
    python examples/recipes/italian_clip.py --language de --out runs/german_clip

About a quarter of an hour on two CPU cores.

Source: Bianchi et al. (2108.08688) and their code, clip-italian/clip-italian: the image tower of OpenAI's ViT-B/32, an
Italian BERT, 1.4 million Italian pairs. Here: an image tower that the script trains first, with English, and what the
emoji are called in Italian, or in another language that the package emoji knows.

    English     image tower + CLIP's text tower      from scratch; stands in for OpenAI's CLIP
      │  keep the image tower with its projection, put a BERT beside it
    stage 1     both towers frozen                   only the two projections learn
      │
    stage 2     everything thawed                    low learning rates, warm-up, cosine

Of the system: bias-free linear projections, the text side's new and drawn from N(0, 0.02), the image side's CLIP's own,
which goes on learning; cosines are multiplied by 20, always; pictures are varied strongly; MRR@k, the mean of 1 / rank
of a name's picture, 0 beyond the first k. What is stage 1 for? The same start is also trained with everything thawed
from its first step on, for as many steps. All are asked about 150 concepts that were trained by no studio and in no
language, in the two studios' drawings, and about the trained ones as a third studio draws them. The English model's own
figures, in English, show what the image tower can give.

What differs from the published code: drawings of one concept are not each other's negatives; AdamW, not AdaBelief with
adaptive gradient clipping; what is frozen has no dropout; a batch is compared as a whole, not by device. And the BERT:
theirs had read Italian, ours is small and random, with a vocabulary made from the captions, as nothing can be fetched.
So its tokens are averaged, where they took BERT's pooler: a random pooler makes nearly the same of all texts (their
mean cosine is 0.998).

To a random tower that stays frozen, texts are alike if they share pieces of words, and that is all that stage 1 can
use; stage 2 sets out from what it made of that. With a BERT that knows its language, stage 1 does more: it keeps away
from it the first gradients, those of a random projection. So give one, if you have it, as a folder of transformers
(--text-model, mostly with --pooling pooler). It is thawed at a tenth of our random one's rate.

Nothing pretrained by us would do as the image tower, since the embedded model has seen all concepts; of a model that
you give, with --image-model, you have to know it.

                                150 held out                1,720 trained
                                top-1    top-5    MRR@10    top-1    top-5    MRR@10
    English, in English         26.3 %   40.7 %   31.0 %    6.6 %    17.7 %   15.6 %
    200 steps frozen             6.7 %   24.7 %   17.4 %    1.4 %     4.8 %    3.4 %
    200 frozen, 200 thawed      22.7 %   41.7 %   30.4 %    6.5 %    19.1 %   15.3 %
    400 thawed                  22.7 %   40.3 %   29.9 %    7.8 %    22.4 %   17.8 %
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import emoji
import torch
from common import (
    Concept,
    command_line,
    draw_matches,
    emoji_concepts,
    report,
    score,
    without_torchvision_kernels,
    word_pieces,
)
from torch import nn

import clip
from clip.model import CLIP
from clip.preprocess import Preprocess
from clip.tasks.encode import encode_images, encode_texts, gather
from clip.towers import POOLINGS, TransformersTower, WordTokenizer
from clip.training.options import TrainingOptions
from clip.training.run import train

without_torchvision_kernels()
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel  # noqa: E402

SEED = 0
SEEN, UNSEEN = ("noto", "twemoji"), "openmoji"  # studios
MEASURES = ("top-1", "top-5", "MRR@1", "MRR@5", "MRR@10")
ENGLISH, FROZEN, THAWED = 500, 200, 200  # steps
SCALE = 20.0
NEW_LR = 1e-3  # of the English model, and of projections between frozen towers
IMAGE_LR, RANDOM_TEXT_LR, TEXT_LR = 1e-4, 5e-4, 5e-5  # of what is thawed

CONTEXT = 96  # tokens
VOCABULARY = 2000
BERT = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512}


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    data, out = options.data, options.out
    out.mkdir(parents=True, exist_ok=True)
    steps_of_english, one, two = (2, 2, 2) if options.short else (ENGLISH, FROZEN, THAWED)
    concepts = emoji_concepts(data)
    english_names = {concept.id: concept.name for concept in concepts}
    names = names_in(options.language, concepts)

    every = TrainingOptions(
        holdout=str(data / "held_out.txt"),
        validation=0,
        loss="multi-positive",
        batch_size=256,
        precision="bfloat16",
        workers=1,
        seed=SEED,
    )
    english = replace(
        every,
        captions=tuple(str(data / f"{studio}.csv") for studio in SEEN),
        model="tiny",
        augment="artwork",
        lr=NEW_LR,
    )
    image_model = options.image_model or learn(english, steps_of_english, out / "english")

    start = str(out / "start.safetensors")
    model = put_text_beside(*clip.load(image_model, device="cpu"), names, concepts, options)
    clip.save(model, start)
    other = replace(
        every,
        captions=(write_captions(out / "captions.csv", names),),
        images=str(data),
        augment=options.augment,
        scale=SCALE,
    )
    frozen = replace(other, init=start, freeze=towers(model), lr=NEW_LR)
    thawed = replace(other, image_lr=IMAGE_LR, text_lr=TEXT_LR if options.text_model else RANDOM_TEXT_LR)
    stage_1 = learn(frozen, one, out / "stage-1")
    stage_2 = learn(replace(thawed, init=stage_1), two, out / "stage-2")
    at_once = learn(replace(thawed, init=start), one + two, out / "at-once")

    asked = concepts[::10] if options.short else concepts
    rows = [
        *measured("English, in English", image_model, english_names, asked, data),
        *measured(f"{one} steps frozen", stage_1, names, asked, data),
        *measured(f"{one} frozen, {two} thawed", stage_2, names, asked, data),
        *measured(f"{one + two} thawed", at_once, names, asked, data),
        *chance(asked),
    ]
    report(sorted(rows, key=lambda row: "trained" in row["concepts"]), out)
    draw_found(out / "found.png", stage_2, names, asked, data)


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, "italian_clip")
    languages = sorted(set(emoji.LANGUAGES) - {"en"})
    parser.add_argument("--language", choices=languages, default="it", help="of the names (default: it)")
    parser.add_argument("--image-model", metavar="MODEL", help="a trained CLIP, name or file, in place of ours")
    parser.add_argument("--text-model", metavar="FOLDER", help="an encoder of transformers, in place of a random BERT")
    parser.add_argument(
        "--pooling",
        choices=POOLINGS,
        default="mean",
        help="how its tokens become one vector (default: mean)",
    )
    parser.add_argument(
        "--augment",
        choices=("strong", "artwork"),
        default="strong",
        help="how pictures are varied: strong is theirs (default), artwork ours",
    )
    options = parser.parse_args(arguments)
    if (options.out / "start.safetensors").exists():
        parser.error(f"{options.out} holds an earlier run; remove it, or choose another folder with --out")
    return options


# Names in another language


def names_in(language: str, concepts: Sequence[Concept]) -> dict[str, str]:
    """What the concepts are called, id -> name: ":faccina_che_piange:" is "faccina che piange"."""
    emoji.config.load_language(language)
    codes = {concept.id: emoji.EMOJI_DATA[concept.emoji][language] for concept in concepts}
    return {id: code.strip(":").replace("_", " ").replace("’", "'").lower() for id, code in codes.items()}


def write_captions(file: Path, names: Mapping[str, str]) -> str:
    """A caption file of the two studios' pictures, and its path; what is held out is left out by the training."""
    with open(file, "w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("image", "caption", "id"))
        writer.writerows((f"{studio}/{id}.png", name, id) for studio in SEEN for id, name in names.items())
    return str(file)


# The two towers


def put_text_beside(
    english: CLIP,
    preprocess: Preprocess,
    names: Mapping[str, str],
    concepts: Sequence[Concept],
    options: argparse.Namespace,
) -> clip.DualEncoder:
    """The image tower of a trained model, and a text tower that it has never met."""
    embed_dim = encode_texts(english, ["any"]).shape[1]
    torch.manual_seed(SEED)
    if options.text_model:
        tokenizer = AutoTokenizer.from_pretrained(options.text_model).backend_tokenizer
        encoder = AutoModel.from_pretrained(options.text_model)
    else:
        tokenizer = word_pieces([names[concept.id] for concept in concepts if not concept.held_out], VOCABULARY)
        encoder = BertModel(BertConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=CONTEXT, **BERT))
    tower = TransformersTower(encoder, options.pooling, CONTEXT)
    projection = nn.Linear(tower.output_dim, embed_dim, bias=False)
    nn.init.normal_(projection.weight, std=0.02)
    return clip.DualEncoder(
        english.visual,
        tower,
        getattr(english, "visual_projection", None),  # a CLIP's is inside its tower
        projection,
        tokenizer=WordTokenizer(tokenizer),
        preprocess=preprocess,
    )


def towers(model: clip.DualEncoder) -> tuple[str, ...]:
    """What stage 1 freezes: both towers, but for the projection that ends a CLIP's image tower."""
    projection = ("visual.proj", "visual.attnpool.c_proj")
    image = [f"visual.{name}" for name, _ in model.visual.named_parameters()]
    return ("text_tower", *(name for name in image if not name.startswith(projection)))


def learn(options: TrainingOptions, steps: int, folder: Path) -> str:
    """Train for so many steps, a tenth of them warm-up; the path of the weights."""
    print(f"{folder}: {steps} steps", flush=True)
    train(replace(options, out=str(folder), steps=steps, warmup=steps // 10, evaluate_every=steps, save_every=steps))
    return str(folder / "best.safetensors")


# What was learned


def measured(
    label: str, file: str, names: Mapping[str, str], concepts: Sequence[Concept], data: Path
) -> list[dict[str, str | float]]:
    """Two rows of the table: held-out concepts, the mean of the two studios; and trained ones, drawn by the third."""
    model, preprocess = clip.load(file, device="cpu")
    rows = []
    for kind, studios in (("held out", SEEN), ("trained", (UNSEEN,))):
        asked = [concept for concept in concepts if concept.held_out == (kind == "held out")]
        texts = [names[concept.id] for concept in asked]
        scores = [score(model, preprocess, [c.picture(data, studio) for c in asked], texts) for studio in studios]
        figures = {measure: mean(one[measure] for one in scores) for measure in MEASURES}
        rows.append({"steps": label, "concepts": f"{len(asked)} {kind}", **figures})
    return rows


def chance(concepts: Sequence[Concept]) -> list[dict[str, str | float]]:
    """What guessing would score."""
    rows = []
    for kind in ("held out", "trained"):
        count = sum(concept.held_out == (kind == "held out") for concept in concepts)
        ranks = {f"MRR@{k}": sum(1 / rank for rank in range(1, k + 1)) / count for k in (1, 5, 10)}
        rows.append({"steps": "chance", "concepts": f"{count} {kind}", "top-1": 1 / count, "top-5": 5 / count, **ranks})
    return rows


def draw_found(file: Path, model_file: str, names: Mapping[str, str], concepts: Sequence[Concept], data: Path) -> None:
    """Some held-out names, and the pictures of a studio that are nearest to each."""
    model, preprocess = clip.load(model_file, device="cpu")
    pictures = [concept.picture(data, SEEN[0]) for concept in concepts]
    asked = [names[concept.id] for concept in concepts if concept.held_out][::15]
    images = gather(encode_images(model, preprocess, pictures)).values
    nearest = (encode_texts(model, asked) @ images.T).topk(8).indices.tolist()
    draw_matches(file, {name: [pictures[i] for i in row] for name, row in zip(asked, nearest, strict=True)})


if __name__ == "__main__":
    main()
