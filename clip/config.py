"""The sizes of a CLIP model: one row of integers, from which everything else follows.

Source: Radford et al. (2103.00020) Appendix F, Tables 19 and 20; the released files for what the tables leave open.

A row is either written down here (the nine released models) or read from the shapes of a state dict. What shapes do not
tell (`UNSEEN`) is the same in the nine: heads are 64 wide, the activation is QuickGELU, pictures are normalised by one
mean and deviation. Others vary it, so a file that holds another model has to say so. The resolution is seen as whole
patches only (in a ResNet, whole steps of 32 pixels).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real

import torch

HEAD_DIM = 64  # d_k of every released model, in both towers
MAX_LAYERS = 1000  # what is more is no CLIP but a file made to fill the memory
ACTIVATIONS = ("quick_gelu", "gelu")
RESIZES = ("shortest", "squash")
ARCHIVE_SIZES = ("input_resolution", "context_length", "vocab_size")  # scalars beside the weights in OpenAI's archives
# The fields that no shape shows; those that count nothing; those that may be None
UNSEEN = ("activation", "vision_heads", "transformer_heads", "image_mean", "image_std", "image_resize")
_WORDS = ("activation", "image_mean", "image_std", "image_resize")
_OPTIONAL = ("vision_patch_size", "vision_heads", "transformer_heads", "vision_mlp_width", "transformer_mlp_width")


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
    transformer_heads: int | None  # 64 channels to a head, if None
    transformer_layers: int
    # the transformers of both towers
    activation: str = "quick_gelu"  # or "gelu"
    # what follows from the widths in the released models, and is filled in if it is not given
    vision_heads: int | None = None  # H of the ViT, or of the ResNet's attention pool; 64 channels to a head
    vision_mlp_width: int | None = None  # 4 D; None for a ResNet
    transformer_mlp_width: int | None = None  # 4 D
    # how a picture is made ready, each of the means and deviations for red, green, blue in [0, 1]
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    image_resize: str = "shortest"  # the short side to R, then the middle is cut out; or "squash", both sides to R

    def __post_init__(self):
        for name in ("vision_layers", "image_mean", "image_std"):
            if isinstance(getattr(self, name), list):  # JSON has no tuples
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_words()
        for name, value in vars(self).items():
            sizes = value if name == "vision_layers" and isinstance(value, tuple) else (value,)
            if name in _WORDS or (name in _OPTIONAL and value is None):
                continue
            if not all(isinstance(size, Integral) and size > 0 for size in sizes):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        implied = {
            "vision_heads": max(1, self._feature_width // HEAD_DIM),
            "transformer_heads": max(1, self.transformer_width // HEAD_DIM),
            "vision_mlp_width": 4 * self.vision_width if self.is_vit else None,
            "transformer_mlp_width": 4 * self.transformer_width,
        }
        for name, value in implied.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check_fit()

    def _check_words(self) -> None:
        """Refuse an activation or a preprocessing that there is not."""
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"expected an activation among {list(ACTIVATIONS)}, got {self.activation!r}")
        if self.image_resize not in RESIZES:
            raise ValueError(f"image_resize must be one of {list(RESIZES)}, got {self.image_resize!r}")
        for name, least in (("image_mean", -math.inf), ("image_std", 0)):
            match getattr(self, name):
                case (Real(), Real(), Real()) as values if all(least < value < math.inf for value in values):
                    continue
                case values:
                    raise ValueError(f"{name} must be three numbers above {least}, got {values!r}")

    def _check_fit(self) -> None:
        """Refuse sizes that do not fit each other."""
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
            if self.vision_mlp_width is not None:
                raise ValueError(f"a ResNet has no vision_mlp_width, got {self.vision_mlp_width}")
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
    def _feature_width(self) -> int:
        """Channels of what the image tower's attention works on."""
        return self.vision_width if self.is_vit else self.vision_width * 32

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, torch.Tensor], activation: str = "quick_gelu") -> "CLIPConfig":
        """Read the sizes off the shapes of a state dict with OpenAI's names; heads are taken to be 64 wide.

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
        return cls(**sizes_shown(state_dict), transformer_heads=None, activation=activation)


def sizes_shown(state_dict: Mapping[str, torch.Tensor], tower: str | None = None) -> dict[str, int | tuple | None]:
    """The fields of a :class:`CLIPConfig` that the shapes of a state dict with OpenAI's names show.

    Parameters
    ----------
    state_dict : mapping of str to torch.Tensor
        Only shapes and names are looked at.
    tower : str, optional
        "image" or "text", if there are entries of this tower alone; the other's sizes are those of ViT-B/32 then.

    Raises
    ------
    ValueError
        If the entries that fix the sizes are missing or have another number of dimensions than CLIP's.
    """
    shapes = _Shapes(state_dict)
    released = vars(RELEASED["ViT-B/32"])
    image = {name: released[name] for name in _IMAGE_SIZES} if tower == "text" else _image_sizes(shapes)
    text = {name: released[name] for name in _TEXT_SIZES} if tower == "image" else _text_sizes(shapes)
    if tower != "image":
        embed_dim = shapes("text_projection", 2)[1]
    elif image["vision_patch_size"]:
        embed_dim = shapes("visual.proj", 2)[1]
    else:
        embed_dim = shapes("visual.attnpool.c_proj.weight", 2)[0]
    return {"embed_dim": embed_dim, **image, **text}


def tower_alone(state_dict: Mapping[str, torch.Tensor]) -> str | None:
    """The tower, "image" or "text", that entries with OpenAI's names belong to, if they are of one alone."""
    towers = {"image" if name.startswith("visual.") else "text" for name in state_dict if name != "logit_scale"}
    return towers.pop() if len(towers) == 1 else None


_IMAGE_SIZES = ("image_resolution", "vision_layers", "vision_width", "vision_patch_size", "vision_mlp_width")
_TEXT_SIZES = ("context_length", "vocab_size", "transformer_width", "transformer_layers", "transformer_mlp_width")


def _image_sizes(shapes: "_Shapes") -> dict[str, int | tuple | None]:
    """The sizes of the image tower: a ViT if it has a class token, otherwise a ResNet."""
    if "visual.class_embedding" not in shapes.state_dict:
        return {
            "image_resolution": 32 * _side(shapes("visual.attnpool.positional_embedding", 2)[0] - 1),
            "vision_layers": tuple(shapes.count(f"visual.layer{stage}.") for stage in (1, 2, 3, 4)),
            "vision_width": shapes("visual.layer1.0.conv1.weight", 4)[0],
            "vision_patch_size": None,
            "vision_mlp_width": None,
        }
    width, _, patch_size, _ = shapes("visual.conv1.weight", 4)
    return {
        "image_resolution": patch_size * _side(shapes("visual.positional_embedding", 2)[0] - 1),
        "vision_layers": shapes.count("visual.transformer.resblocks."),
        "vision_width": width,
        "vision_patch_size": patch_size,
        "vision_mlp_width": shapes.mlp_width("visual.transformer.resblocks.0.", width),
    }


def _text_sizes(shapes: "_Shapes") -> dict[str, int | tuple | None]:
    """The sizes of the text tower."""
    width = shapes("text_projection", 2)[0]
    return {
        "context_length": shapes("positional_embedding", 2)[0],
        "vocab_size": shapes("token_embedding.weight", 2)[0],
        "transformer_width": width,
        "transformer_layers": shapes.count("transformer.resblocks."),
        "transformer_mlp_width": shapes.mlp_width("transformer.resblocks.0.", width),
    }


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

    def mlp_width(self, block: str, width: int) -> int:
        """The hidden width of a block's perceptron: 4 `width` if it is not there, which the model will complain of."""
        key = f"{block}mlp.c_fc.weight"
        return self(key, 2)[0] if key in self.state_dict else 4 * width

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
