"""ModifiedResNet: a ResNet-D whose last pooling is a question asked by attention.

Source: He et al. (1512.03385) §4.1 and Fig. 5, the bottleneck; He et al. (1812.01187) §4.2, ResNet-D; Zhang
(1904.11486), anti-aliased strides; Radford et al. (2103.00020) §2.4, attention pooling.
Differs from ResNet: a stem of three 3x3 convolutions; after the first of them, wherever the picture shrinks, an average
pool does it and the convolutions keep stride 1; the global average pool is replaced by attention.

    image  (N, 3, R, R)
      │  stem                      R/4, w channels
      │  layer1                    R/4, 4w channels
      │  layer2, layer3, layer4    R/8, R/16, R/32; 8w, 16w, 32w channels
      │  attnpool                  the mean asks, all positions answer
    image_features  (N, E)         not normalised

`width` w is 64 in RN50; the paper's Table 19 prints the 32w = 2048 features.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from .attention import merge_heads, split_heads


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut (ResNet Fig. 5, right); strides are average pools (ResNet-D).

    Parameters
    ----------
    inplanes : int
        Channels that come in.
    planes : int
        Channels of the narrow middle; 4 · planes go out.
    stride : int
        By which the picture shrinks.
    """

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1):
        super().__init__()
        outplanes = planes * self.expansion

        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU(inplace=True)

        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU(inplace=True)

        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()

        self.conv3 = nn.Conv2d(planes, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.relu3 = nn.ReLU(inplace=True)

        self.downsample = None
        self.stride = stride

        if stride > 1 or inplanes != outplanes:
            # The released files name the weighted children "0" and "1", so the pool before them is "-1".
            shortcut = OrderedDict()
            shortcut["-1"] = nn.AvgPool2d(stride)
            shortcut["0"] = nn.Conv2d(inplanes, outplanes, 1, bias=False)
            shortcut["1"] = nn.BatchNorm2d(outplanes)
            self.downsample = nn.Sequential(shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inplanes, H, W) -> (N, 4 · planes, H / stride, W / stride)."""
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.avgpool(x)
        x = self.bn3(self.conv3(x))
        return self.relu3(x + identity)


class AttentionPool2d(nn.Module):
    """Pool a feature map by one layer of multi-head attention whose only query is the map's mean (CLIP §2.4).

    Parameters
    ----------
    spacial_dim : int
        G, the side of the map; the name is spelled as in the released code.
    embed_dim : int
        C, channels of the map.
    num_heads : int
        H.
    output_dim : int, optional
        E; C if not given.
    """

    def __init__(self, spacial_dim: int, embed_dim: int, num_heads: int, output_dim: int | None = None):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(spacial_dim**2 + 1, embed_dim) / embed_dim**0.5)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.c_proj = nn.Linear(embed_dim, output_dim or embed_dim)
        self.num_heads = num_heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, G, G) -> (N, E)."""
        x = x.flatten(2).permute(2, 0, 1)  # (N, C, G, G) -> (G², N, C)
        x = torch.cat([x.mean(dim=0, keepdim=True), x])  # (G² + 1, N, C)
        x = x + self.positional_embedding[:, None, :].to(x.dtype)

        q = split_heads(self.q_proj(x[:1]), self.num_heads)  # (N, H, 1, d)
        k = split_heads(self.k_proj(x), self.num_heads)  # (N, H, G² + 1, d)
        v = split_heads(self.v_proj(x), self.num_heads)
        x = merge_heads(F.scaled_dot_product_attention(q, k, v))  # (1, N, C)
        return self.c_proj(x).squeeze(0)


class ModifiedResNet(nn.Module):
    """The ResNet image tower.

    Parameters
    ----------
    layers : tuple of int
        Bottlenecks in each of the four stages, (3, 4, 6, 3) in RN50.
    output_dim : int
        E, the joint space.
    heads : int
        H of the attention pool.
    input_resolution : int
        R, pixels.
    width : int
        w, channels after the stem.
    """

    def __init__(
        self,
        layers: tuple[int, int, int, int],
        output_dim: int,
        heads: int,
        input_resolution: int = 224,
        width: int = 64,
    ):
        super().__init__()
        self.output_dim = output_dim
        self.input_resolution = input_resolution
        self.stride = 32

        self.conv1 = nn.Conv2d(3, width // 2, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width // 2, width // 2, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width // 2, width, kernel_size=3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu3 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(2)

        self.layer1 = _stage(width, width, layers[0])
        self.layer2 = _stage(width * 4, width * 2, layers[1], stride=2)
        self.layer3 = _stage(width * 8, width * 4, layers[2], stride=2)
        self.layer4 = _stage(width * 16, width * 8, layers[3], stride=2)
        self.attnpool = AttentionPool2d(input_resolution // 32, width * 32, heads, output_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed pictures `x` (N, 3, R, R), normalised by CLIP's mean and deviation, as (N, E), not unit length."""
        x = x.type(self.conv1.weight.dtype)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.relu3(self.bn3(self.conv3(x)))
        x = self.avgpool(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return self.attnpool(x)


def _stage(inplanes: int, planes: int, blocks: int, stride: int = 1) -> nn.Sequential:
    """A row of bottlenecks, the first of which widens the channels and shrinks the picture."""
    first = Bottleneck(inplanes, planes, stride)
    rest = [Bottleneck(planes * Bottleneck.expansion, planes) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)
