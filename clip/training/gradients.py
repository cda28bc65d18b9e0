"""Gradients of batches that do not fit into memory, without losing a single negative.

Source: Gao et al. (2101.06983), "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup".

CLIP's loss compares every picture of a batch with every caption of it, so summing the gradients of small batches, as
one does elsewhere, gives another loss: each pair would compete with a few others instead of thousands. But the towers
embed each pair by itself. The loss touches them only through the features, (N, E) and small, so the chain rule can be
cut there:

    1  embed chunk by chunk, keeping nothing but the features
    2  loss and its gradient with respect to the features, over the whole batch
    3  embed chunk by chunk once more, and carry that gradient back into the weights

It costs one forward pass more, and is the large batch's gradient exactly where the towers treat pairs one by one. A
BatchNorm does not: it sees the statistics of a chunk.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..model import CLIP, Bottleneck, ResidualAttentionBlock
from .fast import fast_blocks
from .loss import Loss

__all__ = ["backward", "checkpoint_blocks"]


def backward(
    model: CLIP,
    images: torch.Tensor,
    tokens: torch.Tensor,
    identities: torch.Tensor,
    loss: Loss,
    chunk: int | None = None,
    autocast: torch.dtype | None = None,
    scale_loss: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
) -> torch.Tensor:
    """Add a batch's gradients to the parameters' and return its loss.

    Parameters
    ----------
    model : CLIP
        In training mode.
    images : torch.Tensor
        (N, 3, R, R).
    tokens : torch.Tensor
        (N, L).
    identities : torch.Tensor
        (N,), what the loss takes.
    loss : Loss
        One of :data:`clip.training.loss.LOSSES`.
    chunk : int, optional
        Pairs to embed at once, if not all of them.
    autocast : torch.dtype, optional
        bfloat16 or float16 for the towers' matrix products; the loss is computed in float32.
    scale_loss : callable
        A scaler's `scale`, against gradients that are too small for float16.

    Returns
    -------
    torch.Tensor
        Scalar, not scaled, without a graph.
    """

    def embed(images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = torch.autocast(images.device.type, autocast) if autocast else nullcontext()
        with fast_blocks(model, tokens), half:
            features = model.encode_image(images), model.encode_text(tokens)
        return tuple(f.to(torch.promote_types(f.dtype, torch.float32)) for f in features)

    if chunk is None or chunk >= len(images):
        value = loss(*embed(images, tokens), model.logit_scale.exp(), identities)
        scale_loss(value).backward()
        return value.detach()

    chunks = list(zip(images.split(chunk), tokens.split(chunk), strict=True))
    devices = [images.device] if images.is_cuda else []
    with torch.no_grad(), frozen_statistics(model), torch.random.fork_rng(devices):  # dropout comes twice, as the same
        features = [torch.cat(parts) for parts in zip(*(embed(*part) for part in chunks), strict=True)]
    for leaf in features:
        leaf.requires_grad_()
    value = loss(*features, model.logit_scale.exp(), identities)
    scale_loss(value).backward()

    gradients = zip(*(leaf.grad.split(chunk) for leaf in features), strict=True)
    for part, gradient in zip(chunks, gradients, strict=True):
        reached = [(f, g) for f, g in zip(embed(*part), gradient, strict=True) if f.requires_grad]  # not a frozen tower
        torch.autograd.backward([f for f, _ in reached], [g for _, g in reached])
    return value.detach()


def checkpoint_blocks(model: nn.Module) -> None:
    """Keep only what goes into each block for the backward pass, and compute the rest anew (Chen et al. 1604.06174).

    Memory falls from all activations to one tensor a block, for about a third more time. The gradients are the same, as
    are the names of the parameters. In place.
    """
    for module in model.modules():
        for name, child in list(module.named_children()):
            if type(child) is nn.Sequential and all(isinstance(c, (ResidualAttentionBlock, Bottleneck)) for c in child):
                setattr(module, name, CheckpointedBlocks(*child))


class CheckpointedBlocks(nn.Sequential):
    """Blocks in a row that forget their activations until the backward pass comes to them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the blocks compute, of the blocks' shape."""
        for block in self:
            x = checkpoint(
                block, x, use_reentrant=False, context_fn=lambda b=block: (nullcontext(), frozen_statistics(b))
            )
        return x


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorms use a batch's statistics without adding them to their running ones: the batch comes once more."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)
