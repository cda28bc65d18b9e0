"""The four things everybody calls: list the models, load one, save one, turn text into tokens.

Names, arguments and answers are those of the released package. Code in the wild also takes from here what the released
module merely imported or kept for itself, so those names are here too.
"""

import difflib
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .checkpoints import CheckpointError, hub, read_checkpoint, write_checkpoint
from .checkpoints.released import MODELS as _MODELS
from .checkpoints.released import download as _download
from .config import CLIPConfig
from .dual_encoder import DualEncoder, assemble_dual_encoder, description_of
from .model import CLIP, TOWERS, assemble, build_model, check_entries, config_of, tower_of  # noqa: F401
from .optimize import OptimizedCLIP
from .positions import interpolate_positions
from .preprocess import (  # noqa: F401
    CenterCrop,
    Normalize,
    Preprocess,
    Resize,
    ToTensor,
    _convert_image_to_rgb,
)
from .simple_tokenizer import SimpleTokenizer as _Tokenizer

__all__ = ["available_models", "count_tokens", "load", "save", "tokenize"]

BICUBIC = Image.Resampling.BICUBIC

EMBEDDED = {"tiny": Path(__file__).parent / "weights" / "tiny.safetensors"}  # ours, small enough to come along

_transform = Preprocess
_tokenizer = _Tokenizer()


def available_models() -> list[str]:
    """Return the names that :func:`load` knows: the nine released models, and "tiny", which needs no download."""
    return [*_MODELS, *EMBEDDED]


def load(
    name: str | os.PathLike,
    device: str | int | torch.device | None = None,
    jit: bool = False,
    download_root: str | os.PathLike | None = None,
    *,
    dtype: torch.dtype | None = None,
    local_files_only: bool = False,
    image_size: int | None = None,
    tower: str | None = None,
    config: Mapping[str, object] | None = None,
) -> tuple[CLIP, Preprocess]:
    """Load a model and the preprocessing that goes with it.

    Parameters
    ----------
    name : str or path
        A name listed by :func:`available_models`, or the path of a checkpoint: OpenAI's archives, state dicts saved by
        `torch.save`, safetensors, training checkpoints, folders and files of Hugging Face's and open_clip's. Nothing a
        file says is executed. Or "hf-hub:OWNER/NAME" for a repository of the Hugging Face hub, with "@" and a branch,
        tag or commit behind it if need be (:mod:`clip.checkpoints.hub`).
    device : str, int or torch.device, optional
        "cpu", "cuda", "cuda:1", "mps" in any case, the number of a GPU, or "auto" for the best there is. By default
        "cuda" if there is one, otherwise "cpu".
    jit : bool
        There is one model, and it is not a TorchScript program. True warns and returns it all the same.
    download_root : path, optional
        Where downloaded files are kept; otherwise, of the released ones, the folder named by the environment variable
        CLIP_CACHE or ~/.cache/clip, of those of the hub its own cache.
    dtype : torch.dtype, optional
        Of the matrix products: float32 on the CPU and float16 elsewhere, unless given. In float16 and bfloat16 the
        norms, the embeddings and `logit_scale` stay in float32, as in the released files.
    local_files_only : bool
        Do not download.
    image_size : int, optional
        R, the side in pixels of the pictures that the model is to read, if not that of its training: a multiple of the
        patch, or of 32 for a ResNet. The positional embeddings are interpolated (:mod:`clip.positions`), and a warning
        says what it costs: the model has never seen pictures of that size, so it is not as good as published.
    tower : str, optional
        "image" or "text": read this tower alone, the other never enters memory. `logit_scale` belongs to both; it is
        NaN if the file was of one tower and did not hold it.
    config : mapping, optional
        What you know of the model and its file does not say, by the names of `clip.config.CLIPConfig`: "activation"
        ("quick_gelu" or "gelu"), "vision_heads", "transformer_heads", "image_mean", "image_std", "image_resize". A file
        of bare weights says none of it: OpenAI's way is taken then, and a warning says so until you do.

    Returns
    -------
    model : CLIP
        In evaluation mode. With `tower`, an ImageTower or a TextTower: a CLIP whose `encode_text` or `encode_image`
        says that it is not there.
    preprocess : Preprocess
        Turns a picture into the tensor that the model expects.

    Raises
    ------
    ValueError
        If the model cannot read pictures of that size, or an argument is none of those above.
    ImportError
        If the model needs a package that is not installed.
    RuntimeError
        If there is no model of that name and no such file, or the device is not there.
    DownloadError
        If the file cannot be had.
    CheckpointError
        If the file cannot be read, or is not a CLIP model. Both are RuntimeErrors.
    """
    if jit:
        warnings.warn("jit=True: the model is plain PyTorch and is returned as it is", stacklevel=2)
    device = find_device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.float16
    elif not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating point type, got {dtype}")
    if tower is not None and tower not in TOWERS:
        raise ValueError(f'tower must be "image" or "text", or None for both, got {tower!r}')
    if tower == "text" and image_size is not None:
        raise ValueError('image_size is about the image tower, which tower="text" leaves out')

    path = find_checkpoint(name, download_root, local_files_only)
    sizes, weights = read_checkpoint(path, tower, config)
    if isinstance(sizes, dict):
        if image_size is not None or config:
            raise ValueError("image_size and config are about CLIP's own towers; this model has others, all described")
        try:
            model = assemble_dual_encoder(sizes, weights, dtype, device, tower)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        return model, model.preprocess
    if image_size not in (None, sizes.image_resolution):
        resized = _at_size(sizes, image_size)
        warnings.warn(_cost(sizes, resized), stacklevel=2)
        table = "visual.positional_embedding" if sizes.is_vit else "visual.attnpool.positional_embedding"
        weights[table] = interpolate_positions(weights[table], image_size // sizes.stride)
        sizes = resized
    try:
        model = assemble(sizes, weights, dtype, device, tower)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return model, Preprocess(sizes.image_resolution, sizes.image_mean, sizes.image_std, sizes.image_resize)


def preprocess_of(model: CLIP) -> Preprocess:
    """Return the preprocessing that goes with a model, as :func:`load` does."""
    if isinstance(model, DualEncoder):
        return model.preprocess
    return Preprocess(model.visual.input_resolution, model.image_mean, model.image_std, model.image_resize)


def save(model: CLIP, path: str | os.PathLike, training: Mapping[str, object] | None = None) -> None:
    """Write a model to a file that :func:`load` reads.

    Parameters
    ----------
    model : CLIP
        Its weights are written bit for bit, with its sizes and its activation beside them. `load` casts them to the
        dtype it is asked for: a model that `load` made comes back the same under the same `device`, `dtype` and
        `tower`.
    path : path
        Ending in ".safetensors" (any program can read it, nothing in it can run) or ".pt" (`torch.load` reads it).
    training : mapping, optional
        What a training run needs to go on, of tensors and plain values; kept under "training" in a ".pt" file.

    Raises
    ------
    ValueError
        If the path ends otherwise, or the model's sizes cannot be told any more; or it is one tower of a DualEncoder.
    RuntimeError
        If the model has gained or lost entries, so that it could not be loaded again.
    CheckpointError
        If the file cannot be written; one that was there before is left as it was.
    """
    if isinstance(model, OptimizedCLIP):
        raise ValueError("an optimised copy cannot be saved: save the model it was made from")
    weights = model.state_dict()
    if isinstance(model, DualEncoder):
        config = description_of(model)
    else:
        config = config_of(model)
        check_entries(config, weights, tower_of(model))
    write_checkpoint(path, config, weights, training)


def tokenize(texts: str | Iterable[str], context_length: int = 77, truncate: bool = False) -> torch.Tensor:
    """Turn texts into token ids: start token, text, end token, zeros.

    Parameters
    ----------
    texts : str or iterable of str
        One text or N.
    context_length : int
        Ids in a row; 77 for all released models.
    truncate : bool
        Cut a text that is too long, keeping the end token, instead of raising an error.

    Returns
    -------
    torch.Tensor
        int32, (N, context_length).

    Raises
    ------
    TypeError
        If something is not a string.
    RuntimeError
        If a text is too long and `truncate` is not set.
    ValueError
        If there is no room for start and end token.
    """
    if context_length < 2:
        raise ValueError(f"context_length must be at least 2, for the start and the end token, got {context_length}")
    rows = [_bracketed(text) for text in _texts(texts)]
    tokens = np.zeros((len(rows), context_length), np.int32)  # filled row by row much faster than a tensor
    for i, row in enumerate(rows):
        if len(row) > context_length:
            if not truncate:
                kept = _tokenizer.decode(row[1 : context_length - 1])
                raise RuntimeError(
                    f"text {i}, {_tokenizer.decode(row[1:9])!r}..., has {len(row)} tokens with its start and end, more "
                    f"than the context length of {context_length}; shorten it, or set `truncate` to cut it after "
                    f"...{kept[-40:]!r}"
                )
            row = [*row[: context_length - 1], row[-1]]
        tokens[i, : len(row)] = row
    return torch.from_numpy(tokens)


def count_tokens(texts: str | Iterable[str]) -> list[int]:
    """Return how many tokens each text takes, start and end included: what must not exceed the context length.

    Parameters
    ----------
    texts : str or iterable of str
        One text or N.

    Raises
    ------
    TypeError
        If something is not a string.
    """
    return [len(_bracketed(text)) for text in _texts(texts)]


def _texts(texts: str | Iterable[str]) -> list[str]:
    """One text or several as a list of strings, or a TypeError that says which is none."""
    if isinstance(texts, bytes) or not isinstance(texts, Iterable):
        raise TypeError(f"expected a string or a list of strings, got {type(texts).__name__}")
    listed = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(listed):
        if not isinstance(text, str):
            raise TypeError(f"expected strings, but text {i} is of type {type(text).__name__}: {text!r:.60}")
    return listed


def _bracketed(text: str) -> list[int]:
    """The ids of one text between the start and the end token."""
    start, end = _tokenizer.encoder["<|startoftext|>"], _tokenizer.encoder["<|endoftext|>"]
    return [start, *_tokenizer.encode(text), end]


def find_device(device: str | int | torch.device | None) -> torch.device:
    """The device asked for, if it is there."""
    cuda = torch.cuda.is_available()
    mps = torch.backends.mps.is_available()
    if device is None:
        return torch.device("cuda" if cuda else "cpu")
    if str(device).lower() == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    name = f"cuda:{device}" if isinstance(device, int) else str(device).lower()
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f'device must be like "cpu", "cuda", "cuda:1", "mps" or "auto", got {device!r}') from error
    there = {"cuda": cuda and (chosen.index or 0) < torch.cuda.device_count(), "mps": mps}
    if not there.get(chosen.type, True):
        raise RuntimeError(f'there is no device {chosen} here; expected "cpu", or "auto" for the best there is')
    return chosen


def _at_size(config: CLIPConfig, image_size: int) -> CLIPConfig:
    """The sizes of the model for pictures of `image_size` pixels, which must be whole patches."""
    if not isinstance(image_size, Integral) or image_size < 1:
        raise ValueError(f"image_size must be a positive number of pixels, got {image_size!r}")
    stride, unit = config.stride, "the patch" if config.is_vit else "the stride of a ResNet"
    if image_size % stride:
        below = image_size // stride * stride
        nearest = " and ".join(str(size) for size in (below, below + stride) if size)
        raise ValueError(f"image_size must be a multiple of {stride} pixels, {unit}, got {image_size}; near: {nearest}")
    return replace(config, image_resolution=int(image_size))


def _cost(trained: CLIPConfig, resized: CLIPConfig) -> str:
    """What is to be known about a model that reads pictures of another size than in training."""
    old, new = trained.image_resolution, resized.image_resolution
    return (
        f"the model was trained at {old} x {old} pixels and is loaded for {new} x {new}: its positional embeddings are "
        f"interpolated, so it is not as accurate as published, and a picture takes about {(new / old) ** 2:.2g} times "
        "the computation"
    )


def find_checkpoint(
    name: str | os.PathLike, download_root: str | os.PathLike | None = None, local_files_only: bool = False
) -> str:
    """The path of the checkpoint: a released file or one of the hub, downloaded if need be, or the caller's own."""
    if name in EMBEDDED:
        return os.fspath(EMBEDDED[name])
    if name in _MODELS:
        return _download(_MODELS[name], download_root, local_files_only=local_files_only)
    path = os.fspath(name)
    if path.startswith(hub.PREFIX):
        return os.fspath(hub.fetch(path, download_root, local_files_only=local_files_only))
    if os.path.exists(path):
        return path
    close = difflib.get_close_matches(path.lower(), [known.lower() for known in available_models()], n=1)
    similar = [known for known in available_models() if known.lower() in close]
    hint = f"did you mean {similar[0]!r}? " if similar else ""
    raise RuntimeError(
        f"Model {path} not found: it is neither a file nor a released model; {hint}available models = "
        f"{available_models()}"
    )
