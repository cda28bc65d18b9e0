"""Zero-shot classification: a classifier made of sentences.

Source: Radford et al. (2103.00020) §3.1.2, how the text tower writes the weights of a linear classifier; §3.1.4, prompt
templates and their ensemble in embedding space, worth almost 5 points on ImageNet.

    label  "cat"
      │  templates                 "a photo of a cat.", "a drawing of a cat.", ...
      │  encode_text, unit length  one vector a sentence
      │  mean, unit length         one vector a label: a column of the classifier
    weights  (E, K)
      │  image_features @ weights
    cosines  (N, K)                how alike, in [-1, 1]
      │  exp(logit_scale) ·, softmax over the K labels
    probabilities  (N, K)          which of these, summing to 1

The two answers differ. A probability says which of *these* labels fits best, even when none does, and changes when a
label is added. A cosine belongs to one picture and one label alone; matches of OpenAI's models lie near 0.3, others
near 0.15. To let "none of these" win, give it sentences of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..model import CLIP
from .encode import encode_texts

TEMPLATE = "a photo of {}."
NONE_OF_THESE = "none of these"
NONE_PROMPTS = ("a photo.", "a picture of something else.", "an image of something.")


@dataclass(frozen=True)
class Match:
    """One label's answer for one picture."""

    label: str
    probability: float  # [0, 1], among the classifier's labels
    cosine: float  # [-1, 1], of this picture and this label alone


@dataclass(frozen=True)
class Classification:
    """The answers for N pictures and K labels.

    Attributes
    ----------
    labels : tuple of str
        The K columns.
    cosines : torch.Tensor
        (N, K), float32, in [-1, 1].
    probabilities : torch.Tensor
        (N, K), float32, rows sum to 1.
    """

    labels: tuple[str, ...]
    cosines: torch.Tensor
    probabilities: torch.Tensor

    def top(self, k: int = 5) -> list[list[Match]]:
        """For each picture its `k` most probable labels (all, if there are fewer), best first."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        best = self.probabilities.topk(min(k, len(self.labels))).indices
        return [
            [Match(self.labels[j], self.probabilities[i, j].item(), self.cosines[i, j].item()) for j in row]
            for i, row in enumerate(best.tolist())
        ]


class ZeroShotClassifier:
    """A linear classifier over `labels`, built once from a model's text tower and used on any number of pictures.

    Parameters
    ----------
    model : CLIP
        Any model with `encode_image`, `encode_text` and `logit_scale`.
    labels : sequence of str
        K different names, put into the templates as they are: with the default template an article belongs to the
        label ("a dog").
    templates : str or sequence of str
        Sentences with ``{}`` where the label goes; several are averaged in embedding space.
    none_prompts : sequence of str
        Sentences, without ``{}``, for one more label, "none of these"; `NONE_PROMPTS` is a start.
    batch_size, progress
        As for :func:`clip.tasks.encode.encode_texts`, which encodes the sentences.

    Attributes
    ----------
    labels : tuple of str
        With "none of these" at the end, if asked for.
    weights : torch.Tensor
        (E, K), float32, columns of unit length.

    Raises
    ------
    ValueError
        If there is no label, a label comes twice, or a template has no ``{}``.
    RuntimeError
        If a sentence is longer than the model's context.

    Examples
    --------
    >>> classifier = ZeroShotClassifier(model, ["a dog", "a cat"])  # doctest: +SKIP
    >>> classifier(preprocess(picture)[None]).top(1)  # doctest: +SKIP
    [[Match(label='a cat', probability=0.997, cosine=0.271)]]
    """

    def __init__(
        self,
        model: CLIP,
        labels: Sequence[str],
        templates: str | Sequence[str] = TEMPLATE,
        none_prompts: Sequence[str] = (),
        batch_size: int = 256,
        progress: bool = False,
    ):
        templates = [templates] if isinstance(templates, str) else list(templates)
        labels = [] if isinstance(labels, str) else list(labels)
        if not labels:
            raise ValueError("expected a list of at least one label")
        sentences = {label: [template.replace("{}", label) for template in templates] for label in labels}
        if len(sentences) < len(labels):
            raise ValueError(f"labels must differ, got {labels}")
        if not templates or not all("{}" in template for template in templates):
            raise ValueError(f"each template needs {{}} where the label goes, got {templates}")
        if none_prompts:
            if NONE_OF_THESE in sentences:
                raise ValueError(f"{NONE_OF_THESE!r} is already among the labels")
            sentences[NONE_OF_THESE] = list(none_prompts)

        self.model = model
        self.labels = tuple(sentences)
        prompts = [text for texts in sentences.values() for text in texts]
        vectors = encode_texts(model, prompts, batch_size, progress=progress)
        per_label = vectors.split([len(texts) for texts in sentences.values()])
        means = torch.stack([group.mean(dim=0) for group in per_label])  # (K, E)
        self.weights = F.normalize(means, dim=-1).T.to(model.logit_scale.device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Classification:
        """Classify pictures.

        Parameters
        ----------
        images : torch.Tensor
            (N, 3, R, R), as `preprocess` makes them, on any device.

        Returns
        -------
        Classification
            On the model's device.
        """
        features = self.model.encode_image(images.to(self.model.logit_scale.device))
        cosines = F.normalize(features.float(), dim=-1) @ self.weights  # (N, K)
        logits = self.model.logit_scale.float().exp() * cosines
        return Classification(self.labels, cosines, logits.softmax(dim=-1))
