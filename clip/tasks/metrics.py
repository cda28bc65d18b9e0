"""How well a ranking does: the share of questions whose answer stands near the top.

Source: the retrieval figures of Radford et al. (2103.00020) Table 13 are recall at 1, 5 and 10.
"""

from collections.abc import Sequence

import torch

__all__ = ["recall_at_k"]


def recall_at_k(similarities: torch.Tensor, right: torch.Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """The share of queries that find at least one right answer among their k nearest.

    Parameters
    ----------
    similarities : torch.Tensor
        (Q, G), of Q queries with G candidates.
    right : torch.Tensor
        (Q, G), bool: which candidates are right; several may be, and at least one for each query.
    ks : sequence of int
        Where to cut. A k beyond G counts all candidates.

    Returns
    -------
    dict of int to float
        Between 0 and 1, for each k. Candidates as near as the best right one count as nearer, so a model that gives
        everything the same place scores 0, not 1.

    Raises
    ------
    ValueError
        If the shapes differ, or a query has no right answer.
    """
    if similarities.shape != right.shape or similarities.dim() != 2:
        raise ValueError(f"expected two (Q, G) matrices, got {tuple(similarities.shape)} and {tuple(right.shape)}")
    if len(right) == 0 or not right.any(dim=1).all():
        raise ValueError("expected queries with at least one right answer each")
    best = similarities.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    nearer = (~(similarities < best) & ~right).sum(dim=1)  # (Q,); a NaN is not far, it is unknown, and counts as near
    return {k: (nearer < k).double().mean().item() for k in ks}
