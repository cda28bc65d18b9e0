"""Multi-head attention: every position asks all others a question and averages their answers.

Source: Vaswani et al. (1706.03762) §3.2, Eq. 1 and Fig. 2.

    x  (L, N, D)
      │  project                       Q = x W_Q, K = x W_K, V = x W_V, one packed matrix for the three
      │  split_heads                   H heads of width d = D / H
    Q, K, V  (N, H, L, d)
      │  softmax(Q Kᵀ / √d + mask) V   Eq. 1, per head; the mask is 0 where a look is allowed and -inf where not
      │  merge_heads
      │  out_proj                      W_O
    (L, N, D)

The sequence comes first, (L, N, D), as in the released code: callers permute before and after.
"""

import torch
import torch.nn.functional as F
from torch import nn


class MultiheadAttention(nn.MultiheadAttention):
    """PyTorch's module of the same name, its parameters and its call, with the computation written out.

    It is a subclass because code around CLIP tests for that class, calls it with ``need_weights=True`` and reads
    ``in_proj_weight``. How our symbols stand to the paper's: ``in_proj_weight`` (3D, D) stacks the transposes of the
    W_Q, W_K, W_V of all heads, ``out_proj`` is W_O, ``head_dim`` is d_k = d_v, ``num_heads`` is h.

    Parameters
    ----------
    embed_dim : int
        D.
    num_heads : int
        H; it must divide D.
    """

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__(embed_dim, num_heads)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from `query` to `key` and return the average of `value`.

        Parameters
        ----------
        query : torch.Tensor
            (L, N, D), or (L, D) for one sequence.
        key, value : torch.Tensor
            (S, N, D), or (S, D).
        key_padding_mask : torch.Tensor, optional
            (N, S): keys not to be looked at (True), or numbers added to their scores.
        need_weights : bool
            Also return the attention weights.
        attn_mask : torch.Tensor, optional
            (L, S) or (N·H, L, S): looks that are forbidden (True), or numbers added to the scores.
        average_attn_weights : bool
            Return the weights as their mean over the heads.
        is_causal : bool
            A promise of the caller that `attn_mask` is causal. It changes nothing: the mask itself is used.

        Returns
        -------
        torch.Tensor
            Of the shape of `query`.
        torch.Tensor or None
            Weights in [0, 1] whose rows sum to 1, (N, L, S) or (N, H, L, S); None unless `need_weights`.

        Raises
        ------
        RuntimeError
            If `is_causal` is promised without a mask, as in PyTorch.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal only describes attn_mask; expected the mask too, got None")
        q, k, v = (split_heads(x, self.num_heads) for x in self.project(query, key, value))  # (N, H, L or S, d)
        mask = self.score_mask(attn_mask, key_padding_mask, q)

        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5  # (N, H, L, S)
            weights = (scores if mask is None else scores + mask).softmax(dim=-1)
            heads = weights @ v
            weights = weights.mean(dim=-3) if average_attn_weights else weights
        else:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # the same sum, without storing (L, S)
        return self.out_proj(merge_heads(heads)), weights

    def project(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return Q, K and V, each (L or S, N, D); self-attention needs one matrix product for the three."""
        if query is key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        parts = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        return tuple(F.linear(x, weight, bias) for x, weight, bias in parts)

    def score_mask(
        self, attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None, q: torch.Tensor
    ) -> torch.Tensor | None:
        """Sum both masks into one that is added to the scores (N, H, L, S); True becomes -inf."""
        total = None
        if attn_mask is not None:
            total = _additive(attn_mask, q)
            if total.dim() == 3 and q.dim() == 4:
                total = total.unflatten(0, (-1, self.num_heads))  # (N·H, L, S) -> (N, H, L, S)
        if key_padding_mask is not None:
            keys = _additive(key_padding_mask, q)[..., None, None, :]  # (N, S) -> (N, 1, 1, S)
            total = keys if total is None else total + keys
        return total


def _additive(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A mask of the dtype and device of the scores: True becomes -inf, numbers stay numbers."""
    if mask.dtype == torch.bool:
        mask = mask.to(like.device)
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)
    return mask.to(like)


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(L, N, D) -> (N, H, L, D/H): each head gets its own slice of the width."""
    return x.unflatten(-1, (heads, -1)).movedim(0, -2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(N, H, L, d) -> (L, N, H·d), the inverse of :func:`split_heads`."""
    return x.movedim(-2, 0).flatten(-2)


def causal_mask(length: int) -> torch.Tensor:
    """The (L, L) mask that lets position i look at positions 0 ... i only: -inf above the diagonal, 0 elsewhere.

    >>> causal_mask(3)
    tensor([[0., -inf, -inf],
            [0., 0., -inf],
            [0., 0., 0.]])
    """
    return torch.full((length, length), -torch.inf, device="cpu").triu_(1)


def is_causal_mask(mask: torch.Tensor) -> bool:
    """Whether `mask` (..., L, S) forbids every look ahead, whatever else it does."""
    ahead = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu_(1)
    forbidden = mask if mask.dtype == torch.bool else mask == -torch.inf
    return bool(forbidden[..., ahead].all())
