"""Explaining: where in the picture is "a cat"?

Three ways to say which pixels made the score of a picture and a text, the logit exp(logit_scale) · cosine, what it is:

    "attention"   ViTs. Chefer et al. (2103.15679) §3, Eq. 5 and 6: how much each look of each
                  head did for the score, followed block by block from the class token back to the patches.
    "grad-cam"    ResNets. Selvaraju et al. (1610.02391) §3, Eq. 1 and 2: the last stage's channels, each weighted by
                  what it does for the score.
    "occlusion"   any image tower. Zeiler & Fergus (1311.2901) §4.2: cover a part of the picture and see how far the
                  score falls. No gradients, a hundred passes.

    picture (H, W)  ── preprocess ──  image (R, R)  ── one of the three ──  grid (G, G)
                                                                              │  negative evidence becomes 0
                                                                              │  bilinear, back through crop and resize
                                                                            map (H, W), in [0, 1]

A map says where, not whether: its highest point is always 1, also for a text that has nothing to do with the picture.
Whether is the cosine. The maps are as fine as their grids, G = R / P for a ViT with patches of P pixels, G = R / 32 for
a ResNet, and for occlusion one pixel, blurred by the window.

What the towers know of single places is to be had too: :func:`tokens`, :func:`attention_maps`, :func:`text_tokens`.
All of this looks at the model as it stands, in evaluation mode, and leaves nothing behind in it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ..clip import preprocess_of, tokenize
from ..model import CLIP, ImageTower
from ..optimize import OptimizedCLIP
from ..preprocess import _margin
from ..resnet import ModifiedResNet
from ..towers import NO_TOKEN, TransformersTower
from ..vit import VisionTransformer
from .encode import encode_texts

__all__ = ["METHODS", "attention_maps", "default_method", "explain", "seen_box", "text_tokens", "tokens"]

METHODS = ("attention", "grad-cam", "occlusion")
RESNET_STRIDE = 32  # pixels from one place of the last stage to the next

Picture = Image.Image | np.ndarray | torch.Tensor


def explain(
    model: CLIP,
    picture: Picture,
    text: str,
    method: str | None = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 64,
) -> torch.Tensor:
    """Say where in a picture a text is.

    Parameters
    ----------
    model : CLIP
        Its weights need not want gradients, and get none. An optimised copy has no gradients at all, and can be asked
        by occlusion only.
    picture : PIL.Image.Image, numpy.ndarray or torch.Tensor
        One picture, as :class:`clip.preprocess.Preprocess` takes it.
    text : str
        What to look for.
    method : str, optional
        "attention", "grad-cam" or "occlusion"; :func:`default_method` otherwise.
    window, stride : int, optional
        Of occlusion: the side of the square that is covered and the steps it takes, in pixels of the model's input
        (R, R). By default 3 R / 8 and R / 8, which takes a hundred passes.
    batch_size : int
        Of occlusion: covered pictures at once.

    Returns
    -------
    torch.Tensor
        (H, W) of the picture as it was given, float32 in [0, 1], on the CPU. Its highest value is 1, unless nothing
        speaks for the text, then all is 0. What the center crop cuts off, see :func:`seen_box`, is 0: nothing there
        can change the score.

    Raises
    ------
    ValueError
        If there is no such method, it is not for this image tower, there is none, or a size is wrong.
    RuntimeError
        If the text is longer than the model's context, there is no text tower, or a changed block does not tell its
        attention weights.
    """
    method = method or default_method(model)
    if method not in METHODS:
        raise ValueError(f"expected a method among {list(METHODS)}, got {method!r}")
    if method != "occlusion" and (window, stride) != (None, None):
        raise ValueError(f"window and stride belong to occlusion, got them for {method!r}")
    # A caller may have turned gradients off; an inference tensor could never have any.
    with torch.inference_mode(False), _evaluating(model):
        image = _image(model, picture).detach()
        target = encode_texts(model, [text])[0].to(image.device)
        if method == "attention":
            heat, cell = _attention(model, image, target)
        elif method == "grad-cam":
            heat, cell = _grad_cam(model, image, target)
        else:
            heat, cell = _occlusion(model, image, target, window, stride, batch_size), 1
    heat = _onto_picture(heat.float().cpu().clamp(min=0), cell, _size(picture), model)
    return heat / heat.max() if heat.max() > 0 else heat


def default_method(model: CLIP) -> str:
    """The method for the model's image tower: attention for a ViT, Grad-CAM for a ResNet, occlusion for others."""
    visual = _visual(model)
    if isinstance(model, OptimizedCLIP):
        return "occlusion"
    towers = {VisionTransformer: "attention", ModifiedResNet: "grad-cam"}
    return next((method for tower, method in towers.items() if isinstance(visual, tower)), "occlusion")


def seen_box(model: CLIP, picture: Picture) -> tuple[float, float, float, float]:
    """The part of the picture that the model sees, the center crop: left, top, right, bottom, in its pixels."""
    height, width = _size(picture)
    resolution = _visual(model).input_resolution
    (y_scale, top), (x_scale, left) = _frame(height, width, model)
    return left / x_scale, top / y_scale, (left + resolution) / x_scale, (top + resolution) / y_scale


# Three ways to explain a score: each returns a grid over the image, negative where something speaks against the text


def _attention(model: CLIP, image: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What reached the class token from each patch, (G, G), by attention weighted with its gradient.

    Relevance R (L, L) says how much of each token's input (columns) is in each token (rows). It starts as the identity;
    a block, x + attention(x), adds what its looks bring: R + Ā R, where Ā is the mean over heads of (∇A ⊙ A)⁺.
    """
    visual = _tower(model, "attention", VisionTransformer)
    with torch.enable_grad():
        features, weights = _encode_with_attention(model, image.requires_grad_())
        gradients = torch.autograd.grad(_score(model, features, target), weights, allow_unused=True)
    if any(gradient is None for gradient in gradients):
        raise RuntimeError("a block's `attn` was changed and returns weights it does not use itself; try occlusion")
    relevance = torch.eye(weights[0].shape[-1], device=image.device)
    for attention, gradient in zip(weights, gradients, strict=True):
        looks = (gradient.float() * attention.detach().float()).clamp(min=0)  # (1, H, L, L)
        relevance = relevance + looks[0].mean(dim=0) @ relevance
    return _grid(relevance[0, 1:]), visual.conv1.stride[0]


def _grad_cam(model: CLIP, image: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The last stage's channels summed, each weighted by its mean gradient (G, G)."""
    visual = _tower(model, "grad-cam", ModifiedResNet)
    with torch.enable_grad(), _outputs(visual.layer4) as outputs:
        score = _score(model, model.encode_image(image.requires_grad_()), target)
        [maps] = outputs  # (1, C, G, G)
        [gradient] = torch.autograd.grad(score, maps)
    importance = gradient.float().mean(dim=(-2, -1), keepdim=True)  # α of Eq. 1
    return (importance * maps.detach().float()).sum(dim=1)[0], RESNET_STRIDE


@torch.no_grad()
def _occlusion(
    model: CLIP, image: torch.Tensor, target: torch.Tensor, window: int | None, stride: int | None, batch_size: int
) -> torch.Tensor:
    """How far the score falls, on average over all windows that cover a pixel, (R, R)."""
    side = image.shape[-1]
    window = side * 3 // 8 if window is None else window
    stride = max(1, side // 8) if stride is None else stride
    if not (0 < stride <= window <= side):
        raise ValueError(f"expected 0 < stride <= window <= {side} pixels, got window {window} and stride {stride}")
    if batch_size < 1:
        raise ValueError(f"expected at least one picture at once, got {batch_size}")
    # Windows reach over the edges, so that each pixel is covered equally often: otherwise the maps lean to the edges.
    starts = torch.arange(stride - window, side, stride, device=image.device)
    pixels = torch.arange(side, device=image.device)
    covers = (starts[:, None] <= pixels) & (pixels < starts[:, None] + window)  # (n, R)
    color = image.mean(dim=(-2, -1), keepdim=True)

    count = len(starts)
    scores = []
    for squares in torch.arange(count**2, device=image.device).split(batch_size):
        covered = covers[squares // count][:, :, None] & covers[squares % count][:, None, :]  # (n, R, R)
        images = torch.where(covered[:, None], color, image)
        scores.append(_score(model, model.encode_image(images), target))
    falls = _score(model, model.encode_image(image), target) - torch.cat(scores).unflatten(0, (count, count))
    covers = covers.float() / covers.sum(dim=0)
    return covers.T @ falls @ covers


def _score(model: CLIP, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The logits (N,) of image features (N, E) with one text, a unit vector (E,)."""
    return model.logit_scale.detach().float().exp() * F.normalize(features.float(), dim=-1) @ target


# What the towers know of single places


def tokens(model: CLIP, picture: Picture) -> torch.Tensor:
    """The image tower's last features that still have a place, before the head makes one vector of them.

    Parameters
    ----------
    model : CLIP
        With a ViT or a ModifiedResNet; no optimised copy.
    picture : PIL.Image.Image, numpy.ndarray or torch.Tensor
        One picture. Gradients flow back into a tensor of floats.

    Returns
    -------
    torch.Tensor
        (G, G, D): what the last block of a ViT leaves at the patches, without the class token. (G, G, 32w): what the
        last stage of a ResNet leaves. Of the model's dtype, on its device, row 0 at the top of the center crop; with
        gradients as PyTorch has them set, so put ``torch.no_grad()`` around it if you want none.

    Raises
    ------
    ValueError
        If there is no image tower, or one of another kind.
    """
    visual = _tower(model, "tokens", VisionTransformer, ModifiedResNet)
    is_vit = isinstance(visual, VisionTransformer)
    with _evaluating(model), _outputs(visual.transformer if is_vit else visual.layer4) as outputs:
        model.encode_image(_image(model, picture))
    [features] = outputs  # (G² + 1, 1, D) or (1, C, G, G)
    return _grid(features[1:, 0]) if is_vit else features[0].permute(1, 2, 0)


def attention_maps(model: CLIP, picture: Picture) -> torch.Tensor:
    """Who looks where in a ViT: the attention weights of every block and head.

    Parameters
    ----------
    model : CLIP
        With a ViT; no optimised copy. What a block was given in place of its own attention is asked too, if it calls
        ``block.attn``.
    picture : PIL.Image.Image, numpy.ndarray or torch.Tensor
        One picture.

    Returns
    -------
    torch.Tensor
        (layers, heads, L, L), in [0, 1]: row i is where token i looks, and sums to 1. Token 0 is the class token, token
        1 + G·y + x the patch in row y and column x. With gradients as PyTorch has them set.

    Raises
    ------
    ValueError
        If there is no image tower, or it is no ViT.
    RuntimeError
        If a changed block does not tell its weights.
    """
    _tower(model, "attention_maps", VisionTransformer)
    with _evaluating(model):
        _, weights = _encode_with_attention(model, _image(model, picture))
    return torch.cat(weights)


def text_tokens(model: CLIP, text: str) -> torch.Tensor:
    """The text tower's features of every token, before the end token's are taken for the text.

    Parameters
    ----------
    model : CLIP
        Any but an optimised copy.
    text : str
        One text.

    Returns
    -------
    torch.Tensor
        (L, D), from the start token to the end token, after `ln_final`. The last row times `text_projection` is what
        the text tower returns. Of a tower of transformers the last hidden states, those of its special tokens too. With
        gradients as PyTorch has them set.

    Raises
    ------
    ValueError
        If there is no text tower that can be looked into.
    RuntimeError
        If the text is longer than the model's context.
    """
    tower = getattr(model, "text_tower", model)  # on a CLIP stand the parts of its text tower themselves
    if isinstance(model, OptimizedCLIP | ImageTower) or tower is None:
        raise ValueError(f"text_tokens needs the plain model and its text tower, got {type(model).__name__}")
    if not isinstance(tower, CLIP | TransformersTower):
        raise ValueError(f"text_tokens needs CLIP's text tower or one of transformers, got {type(tower).__name__}")
    tokenizer = getattr(model, "tokenizer", None) or tokenize
    ids = tokenizer(text, model.context_length).to(model.logit_scale.device)
    if isinstance(tower, TransformersTower):
        last, length = tower.encoder, int((ids != NO_TOKEN).sum())
    else:
        last, length = tower.ln_final, int(ids.argmax()) + 1
    with _evaluating(model), _outputs(last) as outputs:
        model.encode_text(ids)
    [output] = outputs
    return getattr(output, "last_hidden_state", output)[0, :length].type(model.dtype)


# Looking into a model without changing it


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own mode again: BatchNorm would learn from what we ask."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _outputs(*modules: nn.Module) -> Iterator[list]:
    """What modules return, in the order of their calls, as long as this context lasts."""
    outputs = []
    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(lambda module, args, output: outputs.append(output)))
        yield outputs


def _encode_with_attention(model: CLIP, image: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Image features (1, E) and the weights (1, H, L, L) of each block that they were made with.

    The blocks do not ask their attention for its weights, so the question is put into each call on its way.
    """

    def ask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "need_weights": True, "average_attn_weights": False}

    attentions = [block.attn for block in model.visual.transformer.resblocks]
    with ExitStack() as hooks:
        for attention in attentions:
            hooks.enter_context(attention.register_forward_pre_hook(ask, with_kwargs=True))
        outputs = hooks.enter_context(_outputs(*attentions))
        features = model.encode_image(image)
    weights = [weights for _, weights in outputs]
    if len(weights) != len(attentions) or any(each is None for each in weights):
        raise RuntimeError(
            f"expected attention weights from each of the {len(attentions)} blocks of the image tower, got "
            f"{sum(each is not None for each in weights)}: a block was changed so that it does not call its `attn`, or "
            "its `attn` does not return weights; try occlusion"
        )
    return features, weights


def _tower(model: CLIP, purpose: str, *kinds: type) -> nn.Module:
    """The image tower, if it is of a kind that is needed and can be looked into."""
    visual = _visual(model)
    if isinstance(model, OptimizedCLIP):
        raise ValueError(f"{purpose} needs the plain model, got an optimised copy, which nothing can look into")
    if not isinstance(visual, kinds):
        needed = " or a ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{purpose} needs a {needed} as the image tower, got {type(visual).__name__}")
    return visual


def _visual(model: CLIP) -> nn.Module:
    """The image tower, if there is one."""
    visual = getattr(model, "visual", None)
    if visual is None:
        raise ValueError(f"expected a model with an image tower, got {type(model).__name__} with its text tower alone")
    return visual


# From the picture to the model's square and back


def _image(model: CLIP, picture: Picture) -> torch.Tensor:
    """One picture as the model reads it, (1, 3, R, R), on its device."""
    _visual(model)  # there has to be one
    image = preprocess_of(model)(picture)
    if image.dim() != 3:
        raise ValueError(f"expected one picture, got a tensor of shape {tuple(picture.shape)}")
    return image[None].to(model.logit_scale.device)


def _size(picture: Picture) -> tuple[int, int]:
    """(H, W) of a picture."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    height, width = picture.shape[-2:] if isinstance(picture, torch.Tensor) else picture.shape[:2]
    return height, width


def _frame(height: int, width: int, model: CLIP) -> tuple[tuple[float, int], tuple[float, int]]:
    """What preprocessing does to rows and to columns: the factor of the resize, then how many pixels the crop skips."""
    resolution, resize = model.visual.input_resolution, preprocess_of(model).transforms[0]
    resized = resize._new_size(height, width)
    return tuple((new / old, _margin(new, resolution)) for new, old in zip(resized, (height, width), strict=True))


def _onto_picture(grid: torch.Tensor, cell: int, size: tuple[int, int], model: CLIP) -> torch.Tensor:
    """A grid (G, G) with cells of `cell` pixels of the model's square as a map (H, W) of the picture."""
    rows, columns = (
        _interpolation(length, scale, skipped, cell, len(grid))
        for length, (scale, skipped) in zip(size, _frame(*size, model), strict=True)
    )
    return rows @ grid @ columns.T


def _interpolation(length: int, scale: float, skipped: int, cell: int, cells: int) -> torch.Tensor:
    """The matrix (length, cells) by which pixels take linearly from the two cells nearest to them, or from none."""
    place = ((torch.arange(length) + 0.5) * scale - skipped) / cell  # of the pixel's middle, in cells
    inside = (place >= 0) & (place < cells)
    middle = (place - 0.5).clamp(0, cells - 1)
    weights = (1 - (middle[:, None] - torch.arange(cells)).abs()).clamp(min=0)
    return weights * inside[:, None]


def _grid(places: torch.Tensor) -> torch.Tensor:
    """(G², ...) -> (G, G, ...): row by row, as the patches were numbered."""
    side = round(len(places) ** 0.5)
    return places.unflatten(0, (side, side))
