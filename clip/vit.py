"""Vision Transformer: a picture read as a sequence of patches.

Source: Dosovitskiy et al. (2010.11929) §3.1, Fig. 1, Eq. 1-4; Radford et al. (2103.00020) §2.4.
Differs from ViT: a LayerNorm before the blocks; a bias-free linear projection instead of a class head.

    image  (N, 3, R, R)
      │  conv1, stride P            one linear map per patch, E in Eq. 1
    patches  (N, G², D)             G = R / P
      │  prepend class_embedding, add positional_embedding, ln_pre
    tokens  (N, G² + 1, D)
      │  transformer                Eq. 2-3
      │  take token 0, ln_post      Eq. 4
      │  proj                       into the joint space
    image_features  (N, E)          not normalised
"""

import torch
from torch import nn

from .layers import LayerNorm
from .transformer import Transformer


class VisionTransformer(nn.Module):
    """The ViT image tower.

    Parameters
    ----------
    input_resolution : int
        R, pixels.
    patch_size : int
        P, pixels.
    width, layers, heads : int
        D, depth and H.
    output_dim : int
        E, the joint space. Setting ``proj = None`` afterwards leaves the class token's D numbers instead.
    activation : str
        "quick_gelu" or "gelu".
    mlp_width : int, optional
        M, the hidden width of the blocks' perceptrons; 4D if not given.
    """

    def __init__(
        self,
        input_resolution: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        output_dim: int,
        activation: str = "quick_gelu",
        mlp_width: int | None = None,
    ):
        super().__init__()
        self.input_resolution = input_resolution
        self.stride = patch_size
        self.output_dim = output_dim
        grid = input_resolution // patch_size
        scale = width**-0.5

        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(grid**2 + 1, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, activation=activation, mlp_width=mlp_width)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed pictures `x` (N, 3, R, R), normalised as `preprocess` does it, as (N, E), not unit length."""
        x = self.conv1(x)  # (N, D, G, G)
        x = x.flatten(2).permute(0, 2, 1)  # (N, D, G, G) -> (N, G², D)
        class_token = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([class_token, x], dim=1)  # (N, G² + 1, D)
        x = x + self.positional_embedding.to(x.dtype)
        x = self.ln_pre(x)

        x = x.permute(1, 0, 2)  # (N, L, D) -> (L, N, D)
        x = self.transformer(x)
        x = x.permute(1, 0, 2)  # (L, N, D) -> (N, L, D)

        x = self.ln_post(x[:, 0])  # (N, D), the class token
        return x if self.proj is None else x @ self.proj
