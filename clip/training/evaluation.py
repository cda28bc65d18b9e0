"""How far a model has come, asked now and then while it trains; each evaluation takes the model and gives figures.

Source: retrieval as in Radford et al. (2103.00020) Table 13, zero-shot classification as in §3.1.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import torch
import torch.nn.functional as F

from ..clip import tokenize
from ..model import CLIP
from ..preprocess import Preprocess
from ..tasks.encode import encode_images, encode_texts, gather, read_pictures
from ..tasks.metrics import recall_at_k
from ..tasks.zero_shot import ZeroShotClassifier
from .data import Captioned
from .drawn import ABILITIES, questions
from .loss import Loss

__all__ = ["classification", "drawn_abilities", "retrieval"]

BATCH = 256  # in a tower at once

logger = logging.getLogger(__name__)

Evaluation = Callable[[CLIP], dict[str, float]]


def retrieval(items: Sequence[Captioned], preprocess: Preprocess, loss: Loss, batch_size: int) -> Evaluation:
    """The loss on pictures that were kept back, and recall at 1, 5 and 10 among all of them, in both directions.

    Every caption of a picture asks for it, and a picture may find any of its captions. The loss is over whole batches
    of `batch_size` pictures with their first captions, shuffled once, and so to be compared with the training loss;
    unless fewer pictures were kept than that, which makes it easier.
    """

    def evaluate(model: CLIP) -> dict[str, float]:
        readable, images = _readable(model, items, preprocess)
        texts = [caption for item in readable for caption in item.captions]
        owner = torch.tensor([i for i, item in enumerate(readable) for _ in item.captions])
        captions = encode_texts(model, texts, BATCH, truncate=True)
        identities = _numbers([item.identity for item in readable])
        right = identities[:, None] == identities[owner][None, :]  # (pictures, captions)

        counts = torch.tensor([len(item.captions) for item in readable])
        first = counts.cumsum(0) - counts  # where each picture's captions begin
        scale = model.logit_scale.detach().exp().cpu()
        shuffled = torch.randperm(len(readable), generator=torch.Generator().manual_seed(0))
        parts = shuffled.split(batch_size)[: max(1, len(readable) // batch_size)]
        losses = []
        for part in parts:
            features = _text_features(model, [texts[place] for place in first[part].tolist()])
            losses.append(loss(images[part], features, scale, identities[part]))

        similarities = F.normalize(images, dim=-1) @ captions.T
        same = torch.ones(len(parts[0]), 1)
        guessed = loss(same, same, torch.ones(()), identities[parts[0]])  # what telling nothing apart would cost
        figures = {"validation_loss": (sum(losses) / len(losses)).item(), "validation_chance": guessed.item()}
        for k, recall in recall_at_k(similarities, right).items():
            figures[f"picture_to_text_R@{k}"] = recall
        for k, recall in recall_at_k(similarities.T, right.T).items():
            figures[f"text_to_picture_R@{k}"] = recall
        return figures

    return evaluate


def classification(items: Sequence[Captioned], preprocess: Preprocess, templates: Sequence[str]) -> Evaluation:
    """Zero-shot accuracy among the classes of a folder of classes; an item's identity is its class."""
    labels = sorted({item.identity for item in items})

    def evaluate(model: CLIP) -> dict[str, float]:
        readable, images = _readable(model, items, preprocess)
        classifier = ZeroShotClassifier(model, [label.replace("_", " ") for label in labels], templates)
        chosen = (images @ classifier.weights.cpu()).argmax(dim=1)
        right = torch.tensor([labels.index(item.identity) for item in readable])
        return {"zero_shot_accuracy": (chosen == right).double().mean().item()}

    return evaluate


def drawn_abilities(
    preprocess: Preprocess, count: int = 240, seed: int = 1, abilities: Iterable[str] = ABILITIES
) -> Evaluation:
    """The share of questions about drawn pictures that are answered rightly, for each ability.

    The pictures show combinations of colour and thing that :class:`clip.training.drawn.DrawnWorld` never shows.
    """

    def evaluate(model: CLIP) -> dict[str, float]:
        figures = {}
        for ability in abilities:
            right = 0
            asked = iter(questions(ability, count, seed, preprocess.transforms[0].size))
            while batch := list(islice(asked, BATCH)):
                images = gather(encode_images(model, preprocess, (q.image for q in batch), BATCH)).values
                texts = sorted({caption for q in batch for caption in q.captions})
                vectors = encode_texts(model, texts, BATCH)
                place = {text: i for i, text in enumerate(texts)}
                for question, image in zip(batch, images, strict=True):
                    candidates = vectors[[place[caption] for caption in question.captions]]
                    right += int((candidates @ image).argmax()) == question.answer
            figures[f"drawn_{ability}"] = right / count
        return figures

    return evaluate


@torch.no_grad()
def _readable(model: CLIP, items: Sequence[Captioned], preprocess: Preprocess) -> tuple[list[Captioned], torch.Tensor]:
    """The items whose pictures can be read, and the features of those (n, E), as the tower gives them."""
    pictures = read_pictures((item.open for item in items), preprocess, BATCH)
    rows = gather(batch.through(model.encode_image, model.logit_scale.device) for batch in pictures)
    for index, error in rows.errors.items():
        logger.warning("left out of the evaluation: %s (%s)", items[index].source, error)
    return [items[index] for index in rows.indices], rows.values


@torch.no_grad()
def _text_features(model: CLIP, texts: Sequence[str]) -> torch.Tensor:
    """Texts as the tower gives them (n, E): a loss may look at their lengths, which `encode_texts` takes away."""
    tokenizer = getattr(model, "tokenizer", None) or tokenize
    tokens = tokenizer(texts, model.context_length, truncate=True).to(model.logit_scale.device)
    return torch.cat([model.encode_text(part).float().cpu() for part in tokens.split(BATCH)])


def _numbers(names: Sequence[str]) -> torch.Tensor:
    """The same number for the same name, different ones for others."""
    seen: dict[str, int] = {}
    return torch.tensor([seen.setdefault(name, len(seen)) for name in names])
