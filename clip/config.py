"""The sizes of a CLIP model: one row of integers, from which everything else follows.

Source: Radford et al. (2103.00020) Appendix F, Tables 19 and 20; the released files for what the tables leave open.

A row is either written down here (the nine released models) or read from the shapes of a state dict. Shapes tell every
size but three. The number of heads is not visible: in the nine models a head is always 64 wide, so heads = width / 64.
Nor is the activation: OpenAI trained with QuickGELU, and a file with no word about it is taken to be theirs. And the
resolution is seen only as whole patches (in a ResNet, whole steps of 32 pixels).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral

import torch

HEAD_DIM = 64  # d_k of every released model, in both towers
MAX_LAYERS = 1000  # what is more is no CLIP but a file made to fill the memory
ARCHIVE_SIZES = ("input_resolution", "context_length", "vocab_size")  # scalars beside the weights in OpenAI's archives


@dataclass(frozen=True)
class CLIPConfig:
    """The constructor arguments of :class:`clip.model.CLIP`.

    Raises
    ------
    ValueError
        If a size is not a positive integer, or sizes do not fit each other.
    """

    embed_dim: int  # E, the joint space
    # image tower
    image_resolution: int  # R, pixels
    vision_layers: int | tuple[int, int, int, int]  # blocks of a ViT, or of each of the four stages of a ResNet
    vision_width: int  # D of a ViT; channels after the stem of a ResNet (the paper prints 32 times this)
    vision_patch_size: int | None  # P, pixels; None for a ResNet
    # text tower
    context_length: int
    vocab_size: int
    transformer_width: int
    transformer_heads: int
    transformer_layers: int
    # the transformers of both towers
    activation: str = "quick_gelu"  # or "gelu"

    def __post_init__(self):
        if isinstance(self.vision_layers, list):  # JSON has no tuples
            object.__setattr__(self, "vision_layers", tuple(self.vision_layers))
        for name, value in vars(self).items():
            sizes = value if isinstance(value, tuple) else (value,)
            if name == "activation" or (name == "vision_patch_size" and value is None):
                continue
            if not all(isinstance(size, Integral) and size > 0 for size in sizes):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.transformer_width % self.transformer_heads:
            raise ValueError(
                f"transformer_width {self.transformer_width} does not divide into {self.transformer_heads} heads"
            )
        if self.is_vit:
            if self.vision_patch_size is None:
                raise ValueError("a Vision Transformer (vision_layers is one number) needs vision_patch_size")
            divisor, what = self.vision_patch_size, "patches"
        else:
            if len(self.vision_layers) != 4:
                raise ValueError(f"vision_layers of a ResNet counts four stages, got {self.vision_layers}")
            divisor, what = 32, "the ResNet's stride"
        if self.image_resolution < divisor:
            raise ValueError(f"image_resolution {self.image_resolution} is smaller than {what} of {divisor} pixels")
        if self._feature_width % self.vision_heads:
            raise ValueError(f"vision_width {self.vision_width} does not divide into {self.vision_heads} heads")

    @property
    def is_vit(self) -> bool:
        """Whether the image tower is a Vision Transformer; otherwise it is a ModifiedResNet."""
        return not isinstance(self.vision_layers, tuple)

    @property
    def stride(self) -> int:
        """Pixels from one place of the image tower's grid to the next: the patch, or 32 in a ResNet."""
        return self.vision_patch_size if self.is_vit else 32

    @property
    def vision_heads(self) -> int:
        """Attention heads of the image tower (of a ResNet: of its attention pool)."""
        return max(1, self._feature_width // HEAD_DIM)

    @property
    def _feature_width(self) -> int:
        """Channels of what the image tower's attention works on."""
        return self.vision_width if self.is_vit else self.vision_width * 32

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, torch.Tensor], activation: str = "quick_gelu") -> "CLIPConfig":
        """Read the sizes off the shapes of a state dict with OpenAI's names.

        Parameters
        ----------
        state_dict : mapping of str to torch.Tensor
            Only shapes and names are looked at.
        activation : str
            What the shapes cannot tell.

        Raises
        ------
        ValueError
            If the entries that fix the sizes are missing or have another number of dimensions than CLIP's.
        """
        shapes = _Shapes(state_dict)
        if "visual.class_embedding" in state_dict:
            vision_width, _, patch_size, _ = shapes("visual.conv1.weight", 4)
            grid = _side(shapes("visual.positional_embedding", 2)[0] - 1)
            image = {
                "image_resolution": patch_size * grid,
                "vision_layers": shapes.count("visual.transformer.resblocks."),
                "vision_width": vision_width,
                "vision_patch_size": patch_size,
            }
        else:
            grid = _side(shapes("visual.attnpool.positional_embedding", 2)[0] - 1)
            image = {
                "image_resolution": grid * 32,
                "vision_layers": tuple(shapes.count(f"visual.layer{stage}.") for stage in (1, 2, 3, 4)),
                "vision_width": shapes("visual.layer1.0.conv1.weight", 4)[0],
                "vision_patch_size": None,
            }
        width, embed_dim = shapes("text_projection", 2)
        return cls(
            embed_dim=embed_dim,
            **image,
            context_length=shapes("positional_embedding", 2)[0],
            vocab_size=shapes("token_embedding.weight", 2)[0],
            transformer_width=width,
            transformer_heads=max(1, width // HEAD_DIM),
            transformer_layers=shapes.count("transformer.resblocks."),
            activation=activation,
        )


class _Shapes:
    """The shapes of a state dict, with errors that say what a CLIP state dict would have had."""

    def __init__(self, state_dict: Mapping[str, torch.Tensor]):
        self.state_dict = state_dict

    def __call__(self, key: str, dims: int) -> tuple[int, ...]:
        if key not in self.state_dict:
            some = ", ".join(sorted(map(str, self.state_dict))[:5]) or "nothing"
            raise ValueError(
                f"not a CLIP state dict with OpenAI's names: no {key!r} among its {len(self.state_dict)} entries "
                f"({some} ...)"
            )
        shape = tuple(self.state_dict[key].shape)
        if len(shape) != dims:
            raise ValueError(f"{key} of a CLIP model has {dims} dimensions, got shape {shape}")
        return shape

    def count(self, prefix: str) -> int:
        """How many numbered children stand under `prefix`: resblocks.0, resblocks.1, ... are two."""
        found = len({key[len(prefix) :].split(".")[0] for key in self.state_dict if key.startswith(prefix)})
        if found > MAX_LAYERS:
            raise ValueError(f"expected at most {MAX_LAYERS} layers named {prefix}*, found {found}")
        return found


def _side(positions: int) -> int:
    """The side of a square grid with about so many positions."""
    return round(max(positions, 0) ** 0.5)


def _text(width: int) -> dict[str, int]:
    """The text tower of a released model: only its width varies, 64 to a head."""
    return {
        "context_length": 77,
        "vocab_size": 49408,
        "transformer_width": width,
        "transformer_heads": width // HEAD_DIM,
        "transformer_layers": 12,
    }


# CLIP Tables 19 (ResNets) and 20 (ViTs), each row in the order of the fields above
RELEASED = {
    "RN50": CLIPConfig(1024, 224, (3, 4, 6, 3), 64, None, **_text(512)),
    "RN101": CLIPConfig(512, 224, (3, 4, 23, 3), 64, None, **_text(512)),
    "RN50x4": CLIPConfig(640, 288, (4, 6, 10, 6), 80, None, **_text(640)),
    "RN50x16": CLIPConfig(768, 384, (6, 8, 18, 8), 96, None, **_text(768)),
    "RN50x64": CLIPConfig(1024, 448, (3, 15, 36, 10), 128, None, **_text(1024)),
    "ViT-B/32": CLIPConfig(512, 224, 12, 768, 32, **_text(512)),
    "ViT-B/16": CLIPConfig(512, 224, 12, 768, 16, **_text(512)),
    "ViT-L/14": CLIPConfig(768, 224, 24, 1024, 14, **_text(768)),
    "ViT-L/14@336px": CLIPConfig(768, 336, 24, 1024, 14, **_text(768)),
}

# Not OpenAI's: the model that comes with this package, trained by us (docs/model_card.md)
TINY = CLIPConfig(256, 64, (2, 2, 2, 2), 20, None, 77, 49408, 128, 2, 3)
