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
    return "image" if name.startswith("visual") else "text"  # with the tower's head


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


def freeze(model: CLIP, parts: Iterable[str], frozen: bool = True) -> None:
    """Take parts of a model out of training, or let them learn again.

    What is frozen gets no gradients, and :func:`training_mode` leaves it in evaluation mode.

    Parameters
    ----------
    model : CLIP
        Changed in place.
    parts : iterable of str
        A tower with its head, "image" or "text"; or the name of a module: "visual" (the image tower without its head),
        "visual.layer1", "transformer.resblocks.0".
    frozen : bool
        False thaws.

    Raises
    ------
    ValueError
        If there is no such part, or nothing would be left to train.
    """
    names, parts = {name for name, _ in model.named_parameters()}, set(parts)
    found = {part: {name for name in names if _belongs(name, part)} for part in parts}
    if unknown := sorted(part for part in parts if not found[part]):
        raise ValueError(
            f"parts to freeze must be names of modules, or among {', '.join(TOWERS)}; got {', '.join(unknown)}"
        )
    chosen = set().union(*found.values())
    if frozen and names - chosen <= {"logit_scale"}:
        raise ValueError("everything is frozen, so there is nothing to train but the temperature; free some of it")
    for name, parameter in model.named_parameters():
        if name in chosen:
            parameter.requires_grad_(not frozen)


def _belongs(name: str, part: str) -> bool:
    """Whether a parameter of that name is one of a tower, or of a module."""
    return part in (tower_of(name), name) or name.startswith(f"{part}.")


def training_mode(model: CLIP) -> None:
    """Put a model into training mode but for what is frozen: BatchNorms would go on moving, dropout would add noise."""
    model.train()
    for module in model.modules():
        weights = list(module.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            module.eval()
