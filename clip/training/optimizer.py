"""How the weights move: Adam with decoupled weight decay, a warm-up, then half a cosine.

Source: Radford et al. (2103.00020) §2.5 and Tables 18 to 20.

    Adam's β1, β2, ε     0.9, 0.98, 1e-6 with a ViT; 0.9, 0.999, 1e-8 with a ResNet
    weight decay         0.2, on matrices alone: not on gains, biases and the temperature
    learning rate        5e-4 for most models, at batch 32,768; 2,000 steps of warm-up, then a cosine down to 0
"""

import math
from collections.abc import Iterable

import torch

from ..model import CLIP, VisionTransformer

__all__ = ["TOWERS", "adam_settings", "adamw", "freeze", "tower_of", "training_mode", "warmup_cosine"]

TOWERS = ("image", "text")


def tower_of(name: str) -> str | None:
    """The tower that a parameter's name belongs to: "image", "text", or None for the temperature between them."""
    if name == "logit_scale":
        return None
    return "image" if name.startswith("visual.") else "text"


def adam_settings(model: CLIP) -> tuple[tuple[float, float], float]:
    """The betas and the epsilon that CLIP's authors took for this family of image towers (Table 18)."""
    return ((0.9, 0.98), 1e-6) if isinstance(model.visual, VisionTransformer) else ((0.9, 0.999), 1e-8)


def adamw(
    model: CLIP, lr: float, weight_decay: float, image_lr: float | None = None, text_lr: float | None = None
) -> torch.optim.AdamW:
    """The optimiser of §2.5, over the parameters that are not frozen.

    Parameters
    ----------
    model : CLIP
        Its image tower decides the betas and the epsilon.
    lr : float
        Learning rate at the top of the schedule.
    weight_decay : float
        For parameters of two and more dimensions. A decayed temperature would drift to 1, decayed gains to 0.
    image_lr, text_lr : float, optional
        A tower's own learning rate; a pretrained tower beside a new one wants a smaller one.

    Returns
    -------
    torch.optim.AdamW
        Each group keeps the top of its schedule under "top_lr".
    """
    rates = {"image": lr if image_lr is None else image_lr, "text": lr if text_lr is None else text_lr, None: lr}
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((tower_of(name), parameter.ndim >= 2), []).append(parameter)
    betas, eps = adam_settings(model)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rates[tower], "top_lr": rates[tower], "weight_decay": weight_decay * decays}
            for (tower, decays), parameters in groups.items()
        ],
        betas=betas,
        eps=eps,
        fused=True,
    )


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """The share of the top learning rate at a step: up a straight line, then down half a cosine to 0.

    >>> [round(warmup_cosine(step, warmup=2, total=6), 3) for step in range(7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return (1 + math.cos(math.pi * progress)) / 2


def freeze(model: CLIP, towers: Iterable[str]) -> None:
    """Take a tower out of training: its parameters get no gradients, and :func:`training_mode` leaves it alone.

    Parameters
    ----------
    model : CLIP
        Changed in place.
    towers : iterable of str
        "image" or "text".

    Raises
    ------
    ValueError
        If a tower is not one of the two, or nothing would be left to train.
    """
    towers = set(towers)
    if not towers <= set(TOWERS):
        raise ValueError(f"towers to freeze must be among {', '.join(TOWERS)}; got {', '.join(sorted(towers))}")
    if towers == set(TOWERS):
        raise ValueError("both towers are frozen, so there is nothing to train but the temperature; free one of them")
    for name, parameter in model.named_parameters():
        if tower_of(name) in towers:
            parameter.requires_grad_(False)


def training_mode(model: CLIP) -> None:
    """Put a model into training mode but for a frozen image tower, whose BatchNorms would go on moving."""
    model.train()
    model.visual.train(any(parameter.requires_grad for parameter in model.visual.parameters()))
