"""Why a loss is no number: which weight, which input, which layer was the first that was not finite."""

from contextlib import nullcontext

import torch
from torch import nn

from ..model import CLIP
from .data import Batch

__all__ = ["TrainingError", "first_non_finite"]


class TrainingError(RuntimeError):
    """A run that cannot go on, and why."""


def first_non_finite(model: CLIP, batch: Batch, chunk: int | None = None, autocast: torch.dtype | None = None) -> str:
    """Say where the first NaN or infinity of a batch comes from.

    Looked for in the order of the computation: the weights, the pictures, then every layer of both towers, in order,
    and at last the gradients.

    Parameters
    ----------
    model : CLIP
        As it was when the loss was computed, with the gradients of that loss.
    batch : Batch
        The batch it was computed on.
    chunk : int, optional
        How many pairs the towers took at once, if not all.
    autocast : torch.dtype, optional
        What the towers' matrix products were computed in.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"The weight {name} already held a number that is not finite before this step."
    for index, picture in enumerate(batch.images):
        if not picture.isfinite().all():
            return f"{_pair(batch, index)} holds a value that is not finite."

    device = model.logit_scale.device
    found: list[str] = []

    def look(name: str) -> object:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(tensor, torch.Tensor) and not tensor.isfinite().all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad(), torch.autocast(device.type, autocast) if autocast else nullcontext():
            size = chunk or len(batch.images)
            images = torch.cat([model.encode_image(part.to(device)) for part in batch.images.split(size)])
            texts = torch.cat([model.encode_text(part.to(device)) for part in batch.tokens.split(size)])
    finally:
        for handle in handles:
            handle.remove()
    for features, what in ((images, "image"), (texts, "text")):
        bad = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            layer = f"the layer {found[0]}" if found else "the projection at its end"
            return (
                f"In the {what} tower {layer} is the first whose output is not finite, for {_pair(batch, bad[0])}"
                + (f" and {len(bad) - 1} more of the batch." if len(bad) > 1 else ".")
            )
    wrong = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if wrong:  # the backward pass comes from the end, so what lies nearest to it is where it began
        return (
            f"Both towers are finite; the gradients of {len(wrong)} weights are not, the last of them {wrong[-1]}. Try "
            "a smaller learning rate, or bfloat16."
        )
    return "Both towers and the gradients are finite, so it is the loss itself: look at logit_scale."


def _pair(batch: Batch, index: int) -> str:
    """A pair of the batch as a person would look for it."""
    return f"pair {index} of the batch ({batch.sources[index]}: {batch.captions[index]!r})"
