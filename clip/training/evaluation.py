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
from ..preprocess import ImageError, Preprocess
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

    @torch.no_grad()
    def evaluate(model: CLIP) -> dict[str, float]:
        readable, images = _embed_pictures(model, items, preprocess)
        texts = [caption for item in readable for caption in item.captions]
        owner = torch.tensor([i for i, item in enumerate(readable) for _ in item.captions])
        captions = _embed_texts(model, texts)
        identities = _numbers([item.identity for item in readable])
        right = identities[:, None] == identities[owner][None, :]  # (pictures, captions)

        counts = torch.tensor([len(item.captions) for item in readable])
        first = counts.cumsum(0) - counts  # where each picture's captions begin
        scale = model.logit_scale.exp().cpu()
        shuffled = torch.randperm(len(readable), generator=torch.Generator().manual_seed(0))
        parts = shuffled.split(batch_size)[: max(1, len(readable) // batch_size)]
        losses = [loss(images[part], captions[first[part]], scale, identities[part]) for part in parts]

        similarities = F.normalize(images, dim=-1) @ F.normalize(captions, dim=-1).T
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
        readable, images = _embed_pictures(model, items, preprocess)
        classifier = ZeroShotClassifier(model, [label.replace("_", " ") for label in labels], templates)
        chosen = (F.normalize(images, dim=-1) @ classifier.weights.cpu()).argmax(dim=1)
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
                images = _embed(model.encode_image, torch.stack([preprocess(q.image) for q in batch]), model)
                texts = sorted({caption for q in batch for caption in q.captions})
                vectors = F.normalize(_embed_texts(model, texts), dim=-1)
                place = {text: i for i, text in enumerate(texts)}
                for question, image in zip(batch, images, strict=True):
                    candidates = vectors[[place[caption] for caption in question.captions]]
                    right += int((candidates @ image).argmax()) == question.answer
            figures[f"drawn_{ability}"] = right / count
        return figures

    return evaluate


@torch.no_grad()
def _embed(encode: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, model: CLIP) -> torch.Tensor:
    """Features of a batch, float32 on the CPU."""
    return encode(inputs.to(model.logit_scale.device)).float().cpu()


def _embed_texts(model: CLIP, texts: list[str]) -> torch.Tensor:
    """Features of texts (len(texts), E), as the tower gives them; of similar length together, since that is faster."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    tokens = (tokenize([texts[i] for i in batch], model.context_length, truncate=True) for batch in batches)
    features = torch.cat([_embed(model.encode_text, batch, model) for batch in tokens])
    return features[torch.tensor(order).argsort()]


def _embed_pictures(
    model: CLIP, items: Sequence[Captioned], preprocess: Preprocess
) -> tuple[list[Captioned], torch.Tensor]:
    """The items whose pictures can be read, and the features of those (n, E)."""
    readable, features = [], []
    for start in range(0, len(items), BATCH):
        pictures = []
        for item in items[start : start + BATCH]:
            try:
                pictures.append(preprocess(item.open()))
            except (ImageError, ValueError) as error:  # unreadable, or of a shape that cannot be resized
                logger.warning("left out of the evaluation: %s: %s", item.source, error)
                continue
            readable.append(item)
        if pictures:
            features.append(_embed(model.encode_image, torch.stack(pictures), model))
    if not features:
        raise ValueError(f"none of the {len(items)} pictures kept for validation can be read")
    return readable, torch.cat(features)


def _numbers(names: Sequence[str]) -> torch.Tensor:
    """The same number for the same name, different ones for others."""
    seen: dict[str, int] = {}
    return torch.tensor([seen.setdefault(name, len(seen)) for name in names])
