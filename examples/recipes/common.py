"""What the recipes share: their command line, the emoji artwork, how a model is asked about it, tables and pictures.

data/emoji            written by examples/emoji/prepare.py
  │  emoji_concepts      1,870 things, 150 of them held out: trained in no studio and in no language
  │  emoji_items         a studio's pictures of either, with their English names, as training takes them
  │  score               a picture is named among all names, and sought by its name among all pictures
report                a Markdown table, printed and written
draw_matches          sentences, and the pictures found for them
"""

import argparse
import csv
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from clip.model import CLIP
from clip.preprocess import Preprocess
from clip.tasks.encode import encode_images, encode_texts, gather
from clip.tasks.metrics import mean_reciprocal_rank_at_k, recall_at_k
from clip.training.data import Captioned, read_captions

if TYPE_CHECKING:
    from tokenizers import Tokenizer

STUDIOS = ("noto", "twemoji", "openmoji")
BATCH = 256  # pictures or texts in a tower at once
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]  # BERT's


def without_torchvision_kernels() -> None:
    """Let timm and transformers be imported beside a torchvision that has no kernels for the CPU's torch.

    There is no CPU wheel of torchvision 0.28; the package without its compiled part does, as the recipes need no
    kernel of it. Call it before the first import of either. Where torchvision is whole, it changes nothing they use.
    """
    name = "torchvision._meta_registrations"
    sys.modules.setdefault(name, types.ModuleType(name))


def command_line(teaching: str, name: str) -> argparse.ArgumentParser:
    """A recipe's options: --data, --out and --short; `teaching`, its docstring, is what --help says."""
    parser = argparse.ArgumentParser(description=teaching, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=_artwork, default="data/emoji", help="what examples/emoji/prepare.py wrote (default: data/emoji)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs") / name, help=f"for figures, weights, pictures (default: runs/{name})"
    )
    parser.add_argument("--short", action="store_true", help="all of it in seconds, to see it run")
    return parser


def _artwork(folder: str) -> Path:
    """The folder of the emoji artwork, or how to come by it."""
    if not (Path(folder) / "concepts.csv").exists():
        raise argparse.ArgumentTypeError(
            f"expected the emoji artwork in {folder}: python examples/emoji/prepare.py -o {folder} fetches and draws it"
        )
    return Path(folder)


@dataclass(frozen=True)
class Concept:
    """One thing that the studios draw.

    Attributes
    ----------
    id : str
        Its code points, "1f600", without the variation selector.
    name : str
        The standard's English name, in lower case.
    held_out : bool
        Whether it is one of the 150 kept out of training.
    """

    id: str
    name: str
    held_out: bool

    @property
    def emoji(self) -> str:
        """The character itself, without the variation selector: "😀"."""
        return "".join(chr(int(point, 16)) for point in self.id.split("-"))

    def picture(self, data: Path, studio: str) -> Path:
        """Where a studio's drawing of it lies."""
        return data / studio / f"{self.id}.png"


def emoji_concepts(data: Path) -> list[Concept]:
    """All that is drawn, in the order of concepts.csv."""
    with open(data / "concepts.csv", encoding="utf-8", newline="") as file:
        return [Concept(row["id"], row["name"], row["held_out"] == "1") for row in csv.DictReader(file)]


def emoji_items(data: Path, studio: str, held_out: bool = False) -> list[Captioned]:
    """A studio's pictures of the concepts that are trained, or of those held out, each with all its English names."""
    kept = {concept.id for concept in emoji_concepts(data) if concept.held_out == held_out}
    return [item for item in read_captions(data / f"{studio}.csv") if item.identity in kept]


def word_pieces(captions: Sequence[str], size: int) -> "Tokenizer":
    """A tokenizer with BERT's special tokens and a vocabulary made from captions; the same in every process.

    Its pieces are merged as in BPE: the package's trainer of WordPiece breaks ties anew in every process.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    )
    brackets = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=brackets)
    return tokenizer


def score(model: CLIP, preprocess: Preprocess, pictures: Sequence[Path], names: Sequence[str]) -> dict[str, float]:
    """How well a model knows which picture has which name, among these.

    The measures are those of examples/emoji/evaluate.py. Some studios draw several concepts alike to the last byte, and
    some languages give several one name: the name of an equal picture is right too, and the picture of an equal name.

    Parameters
    ----------
    model : CLIP
        In evaluation mode.
    preprocess : Preprocess
        The model's.
    pictures : sequence of Path
        N of them.
    names : sequence of str
        N; names[i] is what pictures[i] shows.

    Returns
    -------
    dict of str to float
        Shares in [0, 1]. A picture's name among the N names, "top-1" and "top-5"; a name's picture among the N
        pictures, "R@1", "R@5", "R@10", and by mean reciprocal rank, "MRR@1", "MRR@5", "MRR@10".
    """
    images = gather(encode_images(model, preprocess, pictures, BATCH)).values
    cosines = images @ encode_texts(model, names, BATCH, truncate=True).T  # (N, N), pictures beside names
    right = _alike([path.read_bytes() for path in pictures]) | _alike(names)
    return (
        {f"top-{k}": share for k, share in recall_at_k(cosines, right, ks=(1, 5)).items()}
        | {f"R@{k}": share for k, share in recall_at_k(cosines.T, right.T).items()}
        | {f"MRR@{k}": share for k, share in mean_reciprocal_rank_at_k(cosines.T, right.T).items()}
    )


def _alike(things: Sequence[str | bytes]) -> torch.Tensor:
    """(N, N), bool: which are equal to which."""
    seen: dict[str | bytes, int] = {}
    kind = torch.tensor([seen.setdefault(thing, len(seen)) for thing in things])
    return kind[:, None] == kind


def report(rows: Sequence[Mapping[str, str | float]], out: Path) -> None:
    """Print rows of the same columns as a Markdown table, floats as percentages, and write it to `out`/figures.md."""
    header = list(rows[0])
    right = {name for name, value in rows[0].items() if not isinstance(value, str)}
    lines = [header, ["---:" if name in right else "---" for name in header]]
    lines += [[f"{value:.1%}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    out.mkdir(parents=True, exist_ok=True)
    (out / "figures.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def draw_matches(file: Path, found: Mapping[str, Sequence[Path]]) -> None:
    """Draw the pictures found for each sentence, best first, as one row each."""
    from matplotlib.figure import Figure  # pyplot would want a screen

    columns = max(map(len, found.values()))
    figure = Figure(figsize=(columns * 1.1, len(found) * 1.45), layout="constrained")
    parts = figure.subfigures(len(found), 1, squeeze=False)[:, 0]
    for part, (sentence, pictures) in zip(parts, found.items(), strict=True):
        part.suptitle(sentence, x=0.02, ha="left", fontsize=10, parse_math=False)
        for place, axes in enumerate(part.subplots(1, columns, squeeze=False).flat):
            axes.axis("off")
            if place < len(pictures):
                axes.imshow(Image.open(pictures[place]).convert("RGB"))
    figure.savefig(file, dpi=120)
