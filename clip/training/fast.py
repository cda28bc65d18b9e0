"""Learning faster: the loss and the gradients of the plain model, with less work and less memory.

The model stays as it is written. While it embeds a batch, its blocks are replaced by others that use the same weights
and differ in the order of the computation:

    the last block   One token of each sequence is read out, so only that one asks the others and goes through the
                     perceptron. What the other positions become reaches neither loss nor gradient.
    QuickGELU        x σ(1.702 x) = silu(1.702 x) / 1.702, where the backward pass needs one tensor instead of two.
    linear layers    On a processor, in float32, they become convolutions of size 1x1: PyTorch gives matrix products to
                     MKL but convolutions to oneDNN, which is twice as fast on AMD's processors with AVX-512.
    attention        On a processor it is computed in float32 also under autocast: PyTorch's kernel for it takes twice
                     the time in bfloat16.

Nothing of this is decided by measuring: it follows from the model, the shapes and the machine, so that a run that is
resumed takes the very steps that it would have taken.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from ..attention import merge_heads, split_heads
from ..model import CLIP, QuickGELU, ResidualAttentionBlock, VisionTransformer
from ..optimize import _BLOCK, _is_ours, _is_untouched
from ..transformer import Transformer

__all__ = ["fast_blocks"]


@contextmanager
def fast_blocks(model: CLIP, tokens: torch.Tensor) -> Iterator[None]:
    """Let a model embed a batch by fast blocks.

    A block that is not as `clip.model` builds it, or has hooks, computes as ever. So does every position of the last
    block, where somebody may see it. What was embedded can be propagated back outside the context.

    Parameters
    ----------
    model : CLIP
        Changed inside the context only.
    tokens : torch.Tensor
        (N, L) token ids: what the text tower is given inside the context. The image tower is given N pictures.
    """
    end = tokens.argmax(dim=-1)  # (N,), as in CLIP.encode_text
    blocks = _fast(model, end, model.ln_final) if type(model) is CLIP else []
    if type(model.visual) is VisionTransformer:
        blocks += _fast(model.visual, torch.zeros_like(end))
    try:
        for sequence, index, block in blocks:
            sequence[index] = block
        yield
    finally:
        for sequence, index, block in blocks:
            sequence[index] = block.plain


def _fast(tower: nn.Module, token: torch.Tensor, *after: nn.Module) -> list[tuple[nn.Sequential, int, "FastBlock"]]:
    """The fast blocks of a tower that is read out at a `token` (N,), and where they belong."""
    transformer = tower.transformer
    if type(transformer) is not Transformer or not isinstance(transformer.resblocks, nn.Sequential):
        return []
    blocks = transformer.resblocks
    fast = [(blocks, index, FastBlock(block)) for index, block in enumerate(blocks) if _is_our_block(block)]
    unseen = all(map(_is_unheard, (tower, transformer, blocks, *after)))  # up to the choice of the token
    if unseen and fast and fast[-1][1] == len(blocks) - 1:
        fast[-1] = (blocks, len(blocks) - 1, PooledBlock(blocks[-1], token))
    return fast


def _is_our_block(block: nn.Module) -> bool:
    """Whether a residual attention block is ours, with one mask for all heads or none, and nobody listens in it."""
    return (
        _is_ours(block, _BLOCK)
        and all(map(_is_unheard, block.modules()))
        and (block.attn_mask is None or block.attn_mask.dim() == 2)
    )


def _is_unheard(module: nn.Module) -> bool:
    """Whether a module has its own methods and no hooks, forward or backward."""
    return _is_untouched(module) and not (module._backward_hooks or module._backward_pre_hooks)


class FastBlock(ResidualAttentionBlock):
    """A residual attention block, with the weights of another one.

    Parameters
    ----------
    plain : ResidualAttentionBlock
        The other one.
    """

    def __init__(self, plain: ResidualAttentionBlock):
        nn.Module.__init__(self)  # no weights of its own
        self.plain = plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(L, N, D) -> (L, N, D)."""
        attn, mask = self.plain.attn, self.plain.attn_mask
        mask = None if mask is None else mask[: len(x), : len(x)]
        q, k, v = _linear(self.plain.ln_1(x), attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
        return self._think(x + self._attend(q, k, v, attn_mask=mask))

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Q (L, N, D), K and V (S, N, D) -> (L, N, D); for the masks see :class:`clip.attention.MultiheadAttention`."""
        attn, dtype = self.plain.attn, q.dtype
        precise = torch.promote_types(dtype, torch.float32) if q.device.type == "cpu" else dtype
        q, k, v = (split_heads(x, attn.num_heads).to(precise) for x in (q, k, v))  # (N, H, L or S, d)
        with torch.autocast(q.device.type, enabled=False):
            mask = attn.score_mask(attn_mask, key_padding_mask, q)
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return _linear(merge_heads(heads).to(dtype), attn.out_proj.weight, attn.out_proj.bias)

    def _think(self, x: torch.Tensor) -> torch.Tensor:
        """(L, N, D) -> (L, N, D): the perceptron, and its input added."""
        mlp = self.plain.mlp
        hidden = _linear(self.plain.ln_2(x), mlp.c_fc.weight, mlp.c_fc.bias)  # (L, N, 4D)
        hidden = F.silu(1.702 * hidden).div_(1.702) if type(mlp.gelu) is QuickGELU else mlp.gelu(hidden)
        return x + _linear(hidden, mlp.c_proj.weight, mlp.c_proj.bias)

    @property
    def is_causal(self) -> bool:
        """Whether the other one is."""
        return self.plain.is_causal


class PooledBlock(FastBlock):
    """A residual attention block of which one token of each sequence is wanted.

    Parameters
    ----------
    plain : ResidualAttentionBlock
        The block whose weights it uses.
    token : torch.Tensor
        (N,) positions.
    """

    def __init__(self, plain: ResidualAttentionBlock, token: torch.Tensor):
        super().__init__(plain)
        self.token = token

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(L, N, D) -> (L, N, D), at every position what became of the token."""
        (length, _, width), attn, mask = x.shape, self.plain.attn, self.plain.attn_mask
        seen = None if mask is None else mask[:, :length].to(x.device)[self.token]  # (N, L)
        w_q, w_kv = attn.in_proj_weight.split((width, 2 * width))
        b_q, b_kv = attn.in_proj_bias.split((width, 2 * width))

        normed = self.plain.ln_1(x)
        q = _linear(self._take(normed), w_q, b_q)  # (1, N, D)
        k, v = _linear(normed, w_kv, b_kv).chunk(2, dim=-1)  # (L, N, D) each
        x = self._think(self._take(x) + self._attend(q, k, v, key_padding_mask=seen))  # (1, N, D)
        return x.expand(length, -1, -1)

    def _take(self, x: torch.Tensor) -> torch.Tensor:
        """(L, N, D) -> (1, N, D): the token of each sequence."""
        return x[self.token, torch.arange(x.shape[1], device=x.device)][None]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` for (L, N, D), where it pays as a convolution over L pictures of 1 x N pixels."""
    is_float32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    if _ONEDNN_LEADS and x.device.type == "cpu" and is_float32 and min(x.shape[:2]) >= 4:
        pixels = x[:, None].permute(0, 3, 1, 2)  # (L, D, 1, N), channels last in memory
        return F.conv2d(pixels, weight[:, :, None, None], bias).permute(0, 2, 3, 1)[:, 0]
    return F.linear(x, weight, bias)


_ONEDNN_LEADS = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
