"""The transformer of both towers: a column of residual blocks that attend, then think.

Source: Radford et al. (2103.00020) §2.4; Vaswani et al. (1706.03762) §3; the pre-norm order of GPT-2 and of
ViT (2010.11929) Eq. 2 and 3.

    x  (L, N, D)
      │  x + attention(ln_1(x))     ViT Eq. 2: positions exchange what they know
      │  x + mlp(ln_2(x))           ViT Eq. 3: each position works on it alone, D -> M -> D
    x  (L, N, D)                    once per layer; M is 4D in the paper and in all released models

The image tower lets every token see every other. The text tower puts a causal mask on each block.
"""

from collections import OrderedDict

import torch
from torch import nn

from .attention import MultiheadAttention, is_causal_mask
from .layers import LayerNorm, activation_layer


class ResidualAttentionBlock(nn.Module):
    """One layer: self-attention and a two-layer perceptron, each normalised before and added to its input.

    Parameters
    ----------
    d_model : int
        D.
    n_head : int
        H.
    attn_mask : torch.Tensor, optional
        (L, L) or (N·H, L, L), added to the attention scores. It is kept as the attribute ``attn_mask``, which may be
        replaced or set to None; it follows the block to another device or dtype but is no part of the state dict.
    activation : str
        "quick_gelu" or "gelu".
    mlp_width : int, optional
        M; 4D if not given.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        attn_mask: torch.Tensor | None = None,
        activation: str = "quick_gelu",
        mlp_width: int | None = None,
    ):
        super().__init__()
        mlp_width = mlp_width or d_model * 4
        self.attn = MultiheadAttention(d_model, n_head)
        self.ln_1 = LayerNorm(d_model)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(d_model, mlp_width),
                gelu=activation_layer(activation),
                c_proj=nn.Linear(mlp_width, d_model),
            )
        )
        self.ln_2 = LayerNorm(d_model)
        self.attn_mask = attn_mask
        self._checked = (None, None, False)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """Self-attention over `x` (L, N, D) under the block's mask, of which a shorter sequence uses the corner."""
        mask = self.attn_mask
        if mask is not None:
            length = x.shape[0]
            mask = mask[..., :length, :length].to(x.device if mask.dtype == torch.bool else x)
        return self.attn(x, x, x, need_weights=False, attn_mask=mask)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(L, N, D) -> (L, N, D)."""
        x = x + self.attention(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x

    @property
    def is_causal(self) -> bool:
        """Whether no position can look ahead: the methods are ours, and the mask forbids it.

        A replaced `mlp` or norm, and a hook, are taken to work on each position alone, as perceptrons and norms do.
        """
        methods = (self.attention, self.forward, self.attn.forward)
        return (
            tuple(getattr(method, "__func__", None) for method in methods) == _OWN_METHODS
            and self.attn_mask is not None
            and self._mask_is_causal()
        )

    def _mask_is_causal(self) -> bool:
        """Look at the mask's values, but only once for each mask and each time somebody wrote into it."""
        mask = self.attn_mask
        version = None if mask.is_inference() else mask._version
        if self._checked[0] is not mask or self._checked[1] != version:
            self._checked = (mask, version, is_causal_mask(mask))
        return self._checked[2]

    def _apply(self, fn, recurse=True):
        """Let the mask follow the parameters through ``to``, ``half``, ``cuda`` and the like, and keep its values."""
        super()._apply(fn, recurse)
        if self.attn_mask is not None:
            self.attn_mask = self.attn_mask.to(fn(self.attn_mask))
        return self


_OWN_METHODS = (ResidualAttentionBlock.attention, ResidualAttentionBlock.forward, MultiheadAttention.forward)


class Transformer(nn.Module):
    """`layers` residual attention blocks in a row.

    Parameters
    ----------
    width, layers, heads : int
        D, depth and H.
    attn_mask : torch.Tensor, optional
        The mask that every block starts with.
    activation : str
        "quick_gelu" or "gelu".
    mlp_width : int, optional
        M of every block; 4D if not given.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        attn_mask: torch.Tensor | None = None,
        activation: str = "quick_gelu",
        mlp_width: int | None = None,
    ):
        super().__init__()
        self.width = width
        self.layers = layers
        blocks = [ResidualAttentionBlock(width, heads, attn_mask, activation, mlp_width) for _ in range(layers)]
        self.resblocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(L, N, D) -> (L, N, D), sequence first."""
        return self.resblocks(x)

    @property
    def is_causal(self) -> bool:
        """Whether the output at each position is a function of the inputs up to that position only."""
        return getattr(self.forward, "__func__", None) is _OWN_FORWARD and all(
            isinstance(block, ResidualAttentionBlock) and block.is_causal for block in self.resblocks
        )


_OWN_FORWARD = Transformer.forward
