"""What is minimised: each picture should pick its own caption out of the batch, and each caption its own picture.

Source: Radford et al. (2103.00020) §2.3, Fig. 3; §2.5 for the cap on the scale.

    image_features (N, E)     text_features (N, E)      as the towers give them
          └──── unit length ─────────┘
       logits = scale · I Tᵀ  (N, N)                    row i: picture i beside every caption
       clip_loss = ½ · (cross entropy of rows + cross entropy of columns), the right answer on the diagonal

A model that cannot tell pictures apart puts 1/N on every answer, so its loss is ln N: the line of not learning. (Where
several answers are right it hits one of them more often, and the line is lower.)

Three losses, one signature: ``loss(image_features, text_features, scale, identities)``. `scale` is what the cosines are
multiplied by, ``logit_scale.exp()``. `identities` (N,) holds one number for each pair; pairs of the same number match
each other too, because they show the same picture or mean the same.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

__all__ = ["LOSSES", "MAX_SCALE", "Loss", "clip_loss", "clip_scale_", "multi_positive_loss", "soft_target_loss"]

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

MAX_SCALE = 100.0  # CLIP §2.5, Table 18: a larger one made training unstable


def clip_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, scale: torch.Tensor, identities: torch.Tensor
) -> torch.Tensor:
    """CLIP's loss: the mean of two cross entropies, one over captions and one over pictures (Fig. 3).

    Parameters
    ----------
    image_features, text_features : torch.Tensor
        (N, E), of any length; row i of one belongs to row i of the other.
    scale : torch.Tensor
        Scalar, 1/τ.
    identities : torch.Tensor
        Not looked at: a second picture of the same thing counts as wrong. In a batch of 32,768 out of 400 million that
        hardly happens; in a small data set it happens in every batch, see :func:`multi_positive_loss`.

    Returns
    -------
    torch.Tensor
        Scalar, at least 0.
    """
    logits = _logits(image_features, text_features, scale)
    diagonal = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2


def multi_positive_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, scale: torch.Tensor, identities: torch.Tensor
) -> torch.Tensor:
    """CLIP's loss where any pair of the same identity is a right answer: -log of the probability of hitting one.

    It does not ask that all of them be hit, as a target spread over the positives would, so captions of one picture may
    still say different things. Where all identities differ it is :func:`clip_loss`.

    Parameters
    ----------
    image_features, text_features : torch.Tensor
        (N, E), of any length.
    scale : torch.Tensor
        Scalar, 1/τ.
    identities : torch.Tensor
        (N,) integers, equal for pairs that match each other.

    Returns
    -------
    torch.Tensor
        Scalar, at least 0.
    """
    logits = _logits(image_features, text_features, scale)
    right = identities[:, None] == identities[None, :]
    hits = logits.masked_fill(~right, -math.inf)
    missed_captions = logits.logsumexp(dim=1) - hits.logsumexp(dim=1)  # (N,)
    missed_pictures = logits.logsumexp(dim=0) - hits.logsumexp(dim=0)
    return (missed_captions.mean() + missed_pictures.mean()) / 2


def soft_target_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, scale: torch.Tensor, identities: torch.Tensor
) -> torch.Tensor:
    """The loss of Simple CLIP (moein-shariatnia/OpenAI-CLIP): targets from the similarities inside each tower.

        logits  = scale · T Iᵀ                          rows are captions
        targets = softmax of the rows of (I Iᵀ + T Tᵀ) / (2 · scale)
        loss    = ½ · (captions against targets + pictures against targetsᵀ)

    It was meant to be kind to duplicates, and is kept as its author wrote it, with what is odd about it:

    - features are not brought to unit length, so with its LayerNorm heads of E = 256 a row has length 16, its logit
      with itself is 256, and the targets are one-hot but for the last digits;
    - two pairs share their target only if their pictures *and* their captions are alike: for one picture with two
      unlike captions, the very case it was meant for, the targets stay one-hot;
    - the temperature, 1 in that project, divides the logits but multiplies what makes the targets;
    - the rows of targetsᵀ do not sum to one, so the pictures' half is no cross entropy of distributions;
    - gradients flow through the targets, so the towers can lower the loss by moving the answer.

    Parameters
    ----------
    image_features, text_features : torch.Tensor
        (N, E), used as they are.
    scale : torch.Tensor
        Scalar, 1/τ; that project fixes it at 1.
    identities : torch.Tensor
        Not looked at.

    Returns
    -------
    torch.Tensor
        Scalar.
    """
    logits = scale * text_features @ image_features.T
    alike = (image_features @ image_features.T + text_features @ text_features.T) / (2 * scale)
    targets = alike.softmax(dim=-1)
    captions = -(targets * logits.log_softmax(dim=-1)).sum(dim=1)
    pictures = -(targets.T * logits.T.log_softmax(dim=-1)).sum(dim=1)
    return (captions + pictures).mean() / 2


LOSSES: dict[str, Loss] = {"clip": clip_loss, "multi-positive": multi_positive_loss, "soft-target": soft_target_loss}


@torch.no_grad()
def clip_scale_(logit_scale: torch.Tensor, maximum: float = MAX_SCALE) -> None:
    """Bring a stored log of the scale down, in place, so that its exponential is at most `maximum` (CLIP §2.5).

    The released code does not contain this step, since it does not train.
    """
    logit_scale.clamp_(max=math.log(maximum))


def _logits(image_features: torch.Tensor, text_features: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scaled cosines (N, N), in at least float32 whatever the towers computed in; rows are pictures."""
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    images = F.normalize(image_features.to(dtype), dim=-1)
    texts = F.normalize(text_features.to(dtype), dim=-1)
    return scale * images @ texts.T
