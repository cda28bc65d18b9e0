"""Honest scores: three numbers that are often taken for one another.

    question                                   function      a number for      in        depends on the other labels
    how alike are this picture and this text?  similarity    each pair         [-1, 1]   no
    which of these labels is it?               classify      each label        [0, 1]    yes: a row sums to 1
    which of these labels are there?           multilabel    each label        [0, 1]    no

All three are made of the same cosines and can only be as good as these. The model was trained to tell which of many
captions belongs to a picture (CLIP §2.3), which is the second question. A cosine has no zero that means "unrelated":
with OpenAI's models 0.2 to 0.3 is normal for a text that fits, and 0.15 for one that does not. And no number here is a
frequency: 0.9 does not mean right nine times out of ten, unless that was measured on pictures like yours.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..model import CLIP
from .encode import encode_texts
from .zero_shot import TEMPLATE, ZeroShotClassifier

__all__ = ["NEUTRAL", "classify", "multilabel", "similarity"]

NEUTRAL = "a photo."


@torch.no_grad()
def similarity(model: CLIP, images: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
    """How alike each picture and each text are: the cosine of their features.

    It is not a percentage, and 0.25 is not little: with OpenAI's models 0.2 to 0.3 is the normal cosine of a picture
    and a text that fits, since pictures lie in one part of the space and texts in another. Compare cosines with each
    other, of one picture over texts or of one text over pictures, rather than with 1; and never those of two models.

    Parameters
    ----------
    model : CLIP
        Any model with `encode_image`, `encode_text` and `logit_scale`.
    images : torch.Tensor
        (N, 3, R, R), as `preprocess` makes them, on any device.
    texts : sequence of str
        M whole sentences, taken as they are.

    Returns
    -------
    torch.Tensor
        (N, M), float32, in [-1, 1], on the model's device. Each number is of one picture and one text alone.

    Raises
    ------
    RuntimeError
        If a text is longer than the model's context.
    """
    device = model.logit_scale.device
    image_features = F.normalize(model.encode_image(images.to(device)).float(), dim=-1)
    return image_features @ encode_texts(model, texts).T.to(device)


def classify(
    model: CLIP, images: torch.Tensor, labels: Sequence[str], templates: str | Sequence[str] = TEMPLATE
) -> torch.Tensor:
    """Which of these labels it is: the softmax over them of exp(logit_scale) times the cosine.

    The rows sum to 1, so the question takes for granted that exactly one label is right. The least bad one gets a high
    number even if none fits, two that both fit share it, and another label changes all of them. exp(logit_scale), 100
    in OpenAI's models, makes it bold: a cosine higher by 0.03 is a probability 20 times as large.

    This is :class:`clip.ZeroShotClassifier` built and used once. Build one yourself for many batches of pictures, for
    the cosines beside the probabilities, or for the answer "none of these".

    Parameters
    ----------
    model, images
        As for :func:`similarity`.
    labels : sequence of str
        K different names.
    templates : str or sequence of str
        Sentences with ``{}`` where the label goes.

    Returns
    -------
    torch.Tensor
        (N, K), float32, in [0, 1], rows sum to 1, on the model's device.

    Raises
    ------
    ValueError, RuntimeError
        As :class:`clip.ZeroShotClassifier`.
    """
    return ZeroShotClassifier(model, labels, templates)(images).probabilities


def multilabel(
    model: CLIP,
    images: torch.Tensor,
    labels: Sequence[str],
    templates: str | Sequence[str] = TEMPLATE,
    neutral: str | Sequence[str] = NEUTRAL,
) -> torch.Tensor:
    """Which of these labels are there: each against a neutral text, by a softmax over the two.

    Any number of labels can be high, and none changes another's. A number above one half says that the picture is
    nearer to the label than to a text that says nothing about it. It does not say that the thing is there: what one
    half means depends on the neutral text, and a label may be nearer merely because it is more specific. Choose the
    threshold on pictures whose labels you know, one for each label if you can.

    Parameters
    ----------
    model, images, labels, templates
        As for :func:`classify`.
    neutral : str or sequence of str
        What the templates would say without a label, in words as the model was trained on; or several texts about all
        kinds of other things, which are averaged as templates are.

    Returns
    -------
    torch.Tensor
        (N, K), float32, in [0, 1], on the model's device.

    Raises
    ------
    ValueError, RuntimeError
        As :class:`clip.ZeroShotClassifier`.
    """
    neutral = [neutral] if isinstance(neutral, str) else neutral
    cosines = ZeroShotClassifier(model, labels, templates, none_prompts=neutral)(images).cosines  # (N, K + 1)
    above = cosines[:, :-1] - cosines[:, -1:]
    return torch.sigmoid(model.logit_scale.detach().float().exp() * above)  # softmax over two is a sigmoid
