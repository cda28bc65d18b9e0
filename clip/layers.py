"""Two small layers that both towers share.

Sources: Ba, Kiros & Hinton (1607.06450) for LayerNorm; Hendrycks & Gimpel (1606.08415) §2 for the activation.
A leaf of the import graph: nothing of ours is needed here.
"""

import torch
import torch.nn.functional as F
from torch import nn


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in at least float32, whatever the dtype of the activations or of its own weights.

    Half precision overflows at 65,504, and the sum of squares over a row of 768 activations gets there easily.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis of `x` (..., D); the result has the dtype of `x`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if entry is None else entry.to(dtype) for entry in (self.weight, self.bias))
        return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU, x · σ(1.702 x), with which OpenAI trained every released model.

    It differs from the exact GELU by up to 0.02, so a model trained with one is wrong with the other.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the activation elementwise; shape and dtype stay."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


def activation_layer(name: str) -> nn.Module:
    """The activation called `name` in a model's configuration; ValueError if there is none of that name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"expected an activation among {list(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()
