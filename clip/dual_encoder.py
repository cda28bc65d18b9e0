"""Any two towers with CLIP's interface: what Radford et al. (2103.00020) Fig. 3 leaves open, chosen by the caller.

    image  (N, 3, R, R)                      text  (N, L) token ids
      │  visual                                │  text_tower
    (N, D_i)                                 (N, D_t)
      │  visual_projection                     │  text_projection
    image_features  (N, E)                   text_features  (N, E)

Whatever works with a CLIP works with it: `encode_image`, `encode_text`, the trainer and every task. It brings what goes
with its towers, its own preprocessing and, if its text tower does not read CLIP's tokens, its own tokenizer.

    >>> from transformers import AutoModel, AutoTokenizer  # doctest: +SKIP
    >>> image_tower = TimmTower("resnet50", pretrained=True)  # doctest: +SKIP
    >>> text_tower = TransformersTower(AutoModel.from_pretrained("distilbert-base-uncased"))  # doctest: +SKIP
    >>> model = DualEncoder(  # doctest: +SKIP
    ...     image_tower,
    ...     text_tower,
    ...     ResidualHead(image_tower.output_dim, 256),
    ...     ResidualHead(text_tower.output_dim, 256),
    ...     tokenizer=WordTokenizer(AutoTokenizer.from_pretrained("distilbert-base-uncased").backend_tokenizer),
    ... )
"""

import math
from collections.abc import Mapping

import torch
from torch import nn

from .model import CLIP, ImageTower, TextTower, _compare, _matrix_parameters, convert_weights
from .preprocess import Preprocess
from .towers import TimmTower, TransformersTower, WordTokenizer, build, describe

__all__ = ["DualEncoder", "assemble_dual_encoder", "convert_foreign_towers", "description_of"]

TOKENIZER_ENTRY = "tokenizer.json"  # of the state dict


class DualEncoder(CLIP):
    """An image tower and a text tower of any kind, each with a head into the joint space.

    Parameters
    ----------
    image_tower : torch.nn.Module
        (N, 3, R, R) -> (N, D_i), with an attribute `input_resolution`, R: `VisionTransformer`, `ModifiedResNet`,
        :class:`clip.towers.TimmTower`, or your own.
    text_tower : torch.nn.Module
        (N, L) -> (N, D_t), with an attribute `context_length`, the longest L: :class:`clip.towers.TextTransformer`,
        :class:`clip.towers.TransformersTower`, or your own.
    image_projection, text_projection : torch.nn.Module, optional
        (N, D) -> (N, E): a `torch.nn.Linear` without a bias, a :class:`clip.towers.ResidualHead`, or your own. None if
        the tower itself ends in the joint space, as ours do.
    logit_scale : float
        The logarithm of what cosines are multiplied by; learned, unless training is told otherwise.
    tokenizer : WordTokenizer or callable, optional
        Called as `clip.tokenize`, which it is by default.
    preprocess : Preprocess, optional
        CLIP's for R by default. What was pretrained elsewhere mostly wants another mean and deviation.

    Attributes
    ----------
    visual, visual_projection, text_tower, text_projection : torch.nn.Module
        The image side's names begin as in CLIP, since by these the towers are told apart.
    context_length : int
    """

    def __init__(
        self,
        image_tower: nn.Module,
        text_tower: nn.Module,
        image_projection: nn.Module | None = None,
        text_projection: nn.Module | None = None,
        logit_scale: float = math.log(1 / 0.07),
        tokenizer: WordTokenizer | None = None,
        preprocess: Preprocess | None = None,
    ):
        nn.Module.__init__(self)  # none of a CLIP's weights
        self.visual = image_tower
        self.visual_projection = nn.Identity() if image_projection is None else image_projection
        self.text_tower = text_tower
        self.text_projection = nn.Identity() if text_projection is None else text_projection
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale)))
        self.tokenizer = tokenizer
        self.preprocess = Preprocess(image_tower.input_resolution) if preprocess is None else preprocess
        self.context_length = text_tower.context_length

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the towers' matrix products."""
        return next(parameter.dtype for _, parameter in _matrix_parameters(self))

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Embed pictures (N, 3, R, R), as `preprocess` returns them, as (N, E), not unit length."""
        if self.visual is None:
            return TextTower.encode_image(self, image)  # says that it is not there
        return self.visual_projection(super().encode_image(image))

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """Embed token ids (N, L), as the tokenizer returns them, as (N, E), not unit length."""
        if self.text_tower is None:
            return ImageTower.encode_text(self, text)
        return self.text_projection(self.text_tower(text))


def description_of(model: DualEncoder) -> dict[str, object]:
    """What a file must say beside the weights, so that :func:`assemble_dual_encoder` can make the model again.

    Raises
    ------
    ValueError
        If there is something in it that no name and arguments describe, or a tower is missing.
    RuntimeError
        If a tower was changed: what is described has other weights.
    """
    if model.visual is None or model.text_tower is None:
        raise ValueError("expected a model with both towers: load it without `tower`")
    if not isinstance(model.tokenizer, WordTokenizer | None):
        raise ValueError(f"expected a WordTokenizer, or None for clip.tokenize, got {model.tokenizer!r:.100}")
    description = {
        "image_tower": describe(model.visual),
        "image_projection": describe(model.visual_projection),
        "text_tower": describe(model.text_tower),
        "text_projection": describe(model.text_projection),
        "preprocess": _describe_preprocess(model.preprocess),
    }
    with torch.device("meta"):
        expected = _build(description, model.tokenizer).state_dict()
    _compare(expected, model.state_dict())
    return description


def assemble_dual_encoder(
    description: Mapping[str, object],
    weights: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device | str,
    tower: str | None = None,
) -> DualEncoder:
    """Build the model of a description around its weights.

    Parameters
    ----------
    description : mapping
        As :func:`description_of` gives it.
    weights : mapping of str to torch.Tensor
        The model's state dict, or one tower's part of it.
    dtype : torch.dtype
        Of the matrices, and of everything in a tower from outside. The rest is kept in at least float32.
    device : torch.device or str
        Where the model is to live.
    tower : str, optional
        "image" or "text", if `weights` are of this tower alone.

    Returns
    -------
    DualEncoder
        In evaluation mode; without the other tower if one was named.

    Raises
    ------
    ValueError
        If it is no such description.
    RuntimeError
        If entries are missing, unexpected or of another shape.
    """
    text = weights.get(TOKENIZER_ENTRY)
    if text is not None and text.dtype != torch.uint8:
        raise RuntimeError(f"expected {TOKENIZER_ENTRY} to be bytes, got {text.dtype}")
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
        model = _build(description, None if text is None else WordTokenizer(bytes(text.numpy())))
    if tower == "image":
        model.text_tower = model.text_projection = model.tokenizer = None
    elif tower == "text":
        model.visual = model.visual_projection = None

    entries = model.state_dict()
    _compare(entries, weights)
    for name, entry in entries.items():
        if entry.is_floating_point() != weights[name].is_floating_point():  # quantised numbers are no weights
            raise RuntimeError(f"expected {name} to be like {entry.dtype}, got {weights[name].dtype}")
    model.to(device, torch.promote_types(dtype, torch.float32))
    convert_weights(model, dtype)
    convert_foreign_towers(model, dtype)
    model.load_state_dict(weights)
    return model.eval()


def convert_foreign_towers(model: CLIP, dtype: torch.dtype) -> None:
    """Bring towers of timm and transformers to a dtype as a whole: their norms take numbers of their own dtype only."""
    for tower in (model.visual, model.text_tower):
        if isinstance(tower, TimmTower | TransformersTower):
            tower.to(dtype)


def _build(description: Mapping[str, object], tokenizer: WordTokenizer | None) -> DualEncoder:
    """The model of a description with random weights."""
    try:
        parts = [build(description[f"{kind}_{part}"]) for part in ("tower", "projection") for kind in ("image", "text")]
        steps = description["preprocess"].items()
        preprocess = Preprocess(**{name: tuple(v) if isinstance(v, list) else v for name, v in steps})
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"expected a description of a dual encoder, got {description!r:.200}") from error
    return DualEncoder(*parts, tokenizer=tokenizer, preprocess=preprocess)


def _describe_preprocess(preprocess: Preprocess) -> dict[str, object]:
    """The arguments that a :class:`clip.preprocess.Preprocess` was made with; it must not have been edited since."""
    try:
        resize, crop, _, _, normalize = preprocess.transforms
        arguments = {
            "input_resolution": crop.size[0],
            "mean": tuple(normalize.mean),
            "std": tuple(normalize.std),
            "resize": "shortest" if isinstance(resize.size, int) else "squash",
        }
        if repr(Preprocess(**arguments)) == repr(preprocess):
            return arguments
    except (AttributeError, TypeError, ValueError):  # of a step that is none of CLIP's
        pass
    raise ValueError(f"expected the five steps of a Preprocess, got {preprocess}")
