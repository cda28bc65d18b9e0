"""How well a ranking does: where the right answer stands among all candidates.

Source: Radford et al. (2103.00020) Table 13, recall at 1, 5 and 10 in retrieval; Tables 10 and 11, accuracy and mean
per class accuracy; Bianchi et al. (2108.08688), mean reciprocal rank and hits at k.

    similarities  (Q, G)       right  (Q, G)
    0.9  0.1  0.2              1  0  0         rank 1     recall at 1: 1/3   at 2: 2/3
    0.8  0.5  0.1              0  1  0         rank 2     reciprocal rank at 2: (1 + 1/2 + 0) / 3
    0.3  0.2  0.1              0  0  1         rank 3

A classifier is the case of one right candidate, so top-k accuracy is recall at k. "Recall" is CLIP's word for what
others call hits at k, or the hit rate: that at least one right answer is among the first k, not which share of them.

Nothing is won by luck: candidates as near as the right one count as nearer, so that a model which gives everything one
place scores nothing; and a right answer whose similarity is no number is never found.
"""

from collections.abc import Sequence

import torch

__all__ = [
    "confusion_matrix",
    "mean_per_class_accuracy",
    "mean_reciprocal_rank_at_k",
    "ranks",
    "recall_at_k",
    "top_k_accuracy",
]

CELLS = 2**24  # of a matrix looked at at once: what is computed on the way has this size
NEVER = torch.iinfo(torch.int64).max  # the rank of what is no number


def ranks(similarities: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The place of the best right answer in each query's ranking.

    Parameters
    ----------
    similarities : torch.Tensor
        (Q, G), floats or integers, of Q queries with G candidates.
    right : torch.Tensor
        (Q, G), bool: which candidates are right; several may be, and at least one for each query.

    Returns
    -------
    torch.Tensor
        (Q,), int64, counted from 1. Right answers do not push each other down.

    Raises
    ------
    ValueError
        If the shapes differ, or a query has no right answer.
    """
    if similarities.shape != right.shape or similarities.dim() != 2:
        raise ValueError(f"expected two (Q, G) matrices, got {tuple(similarities.shape)} and {tuple(right.shape)}")
    if len(right) == 0 or not right.any(dim=1).all():
        raise ValueError("expected queries with at least one right answer each")
    rows = max(1, CELLS // right.shape[1])
    parts = zip(similarities.split(rows), right.split(rows), strict=True)
    return torch.cat([_ranks(*part) for part in parts])


def _ranks(similarities: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The ranks of some queries."""
    similarities = _floats(similarities)
    best = similarities.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    nearer = (~(similarities < best) & ~right).sum(dim=1)  # (Q,); a NaN is not far, it is unknown, and counts as near
    return (nearer + 1).masked_fill(best.isnan()[:, 0], NEVER)


def _floats(scores: torch.Tensor) -> torch.Tensor:
    """Scores in a type that has an infinity; integers stay exact up to 2^53."""
    return scores if scores.is_floating_point() else scores.double()


def recall_at_k(similarities: torch.Tensor, right: torch.Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """The share of queries that find at least one right answer among their k nearest: recall at k, or hits at k.

    Parameters
    ----------
    similarities, right : torch.Tensor
        As for :func:`ranks`.
    ks : sequence of int
        Where to cut. A k beyond G counts all candidates.

    Returns
    -------
    dict of int to float
        Between 0 and 1, for each k.

    Raises
    ------
    ValueError
        As :func:`ranks`.
    """
    rank = ranks(similarities, right)
    return {k: (rank <= k).double().mean().item() for k in ks}


def mean_reciprocal_rank_at_k(
    similarities: torch.Tensor, right: torch.Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """The mean over all queries of 1 / rank, or of 0 where no right answer is among the k nearest.

    Parameters and errors are those of :func:`recall_at_k`; at k = 1 both are the same.

    Returns
    -------
    dict of int to float
        Between 0 and 1, for each k.
    """
    rank = ranks(similarities, right)
    return {k: rank.double().reciprocal().masked_fill(rank > k, 0).mean().item() for k in ks}


def top_k_accuracy(scores: torch.Tensor, targets: torch.Tensor, ks: Sequence[int] = (1, 5)) -> dict[int, float]:
    """The share of pictures whose class is among the k with the highest scores.

    Parameters
    ----------
    scores : torch.Tensor
        (N, K), of N pictures for K classes: cosines, logits or probabilities.
    targets : torch.Tensor
        (N,), int64, in [0, K): the true classes.
    ks : sequence of int
        Where to cut.

    Returns
    -------
    dict of int to float
        Between 0 and 1, for each k.

    Raises
    ------
    ValueError
        If the shapes do not fit, or a target is no class.
    """
    rank = _target_ranks(scores, targets)
    return {k: (rank <= k).double().mean().item() for k in ks}


def mean_per_class_accuracy(scores: torch.Tensor, targets: torch.Tensor) -> float:
    """The mean of the classes' accuracies, so that a class of many pictures counts no more than one of few.

    Parameters and errors are those of :func:`top_k_accuracy`. Classes without a picture do not count.
    """
    right = (_target_ranks(scores, targets) == 1).double()
    pictures = targets.bincount()
    accuracies = targets.bincount(right) / pictures  # (K,), NaN for a class without a picture
    return accuracies[pictures > 0].mean().item()


def confusion_matrix(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """How many pictures of each class were taken for which.

    Parameters and errors are those of :func:`top_k_accuracy`.

    Returns
    -------
    torch.Tensor
        (K, K), int64: row the true class, column the one with the highest score. The diagonal holds what top-1
        accuracy counts: where the true class shares the highest score, another one is taken.
    """
    right = _target_ranks(scores, targets) == 1
    others = _floats(scores).nan_to_num(nan=torch.inf).scatter(1, targets[:, None], -torch.inf)
    taken = torch.where(right, targets, others.argmax(dim=1))
    classes = scores.shape[1]
    return (targets * classes + taken).bincount(minlength=classes**2).view(classes, classes)


def _target_ranks(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The places of the true classes among the scores."""
    if scores.dim() != 2 or targets.shape != scores.shape[:1]:
        raise ValueError(
            f"expected scores (N, K) and targets (N,), got {tuple(scores.shape)} and {tuple(targets.shape)}"
        )
    classes = torch.arange(scores.shape[1], device=scores.device)
    if not torch.isin(targets, classes).all():
        raise ValueError(f"expected targets from 0 to {len(classes) - 1}, got {targets.min()} to {targets.max()}")
    return ranks(scores, targets[:, None] == classes)
