"""A checkpoint file to a configuration and a state dict, and back.

    TorchScript archive ─┐                    ┌─ names: "module." and the like taken off,
    torch.save, zip     ─┤  archive.py        │  the archives' three sizes left out
    torch.save, legacy  ─┘     │              │
                               ├── tensors ───┴─ CLIPConfig: as written beside the weights,
    safetensors         ── safetensors.py        or read from the shapes

A file is recognised by what it holds, never by its name. Whether every weight of the model is there, and of the right
shape, is for the model to say (:func:`clip.model.build_model`); here it must only be some CLIP.
"""

import dataclasses
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch

from ..config import ARCHIVE_SIZES, CLIPConfig
from .archive import StoredTensor, flatten, read_archive
from .mapped_file import CheckpointError, MappedFile, map_file
from .restricted_pickle import Instance
from .safetensors import read_safetensors, write_safetensors

CONFIG_KEY = "clip_config"  # beside the weights in the files we write: the CLIPConfig as JSON
MODEL_KEYS = ("state_dict", "model_state_dict", "model")  # where training programs put the weights
WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
SUFFIXES = (".safetensors", ".pt")
MAX_EMBEDDING = 1 << 28  # numbers in an embedding with all its rows; the largest CLIP has 2^26
EMBEDDING, ROWS = "token_embedding.weight", "token_embedding.rows"


def read_checkpoint(
    path: str | os.PathLike[str], tower: str | None = None
) -> tuple[CLIPConfig, dict[str, torch.Tensor]]:
    """Read a CLIP, or one tower of it, from a file in any of the forms it is passed around in.

    Parameters
    ----------
    path : path-like
        A TorchScript archive of OpenAI's, a state dict or training checkpoint written by `torch.save`, a safetensors
        file, or what :func:`write_checkpoint` wrote. Nothing in it is executed.
    tower : str, optional
        "image" or "text": return the entries of this tower only, with `logit_scale`. Of the others only the shapes are
        looked at.

    Returns
    -------
    CLIPConfig
        As written beside the weights, or else read from their shapes and with QuickGELU, OpenAI's activation.
    dict of str to torch.Tensor
        The weights under OpenAI's names, in the dtypes of the file. They are views of the mapped file, read when
        touched: copy or clone them soon, and drop each when copied (see :mod:`clip.checkpoints.mapped_file`).

    Raises
    ------
    CheckpointError
        If there is no such file, or it is damaged, asks for code to be run, or is no CLIP.
    """
    with map_file(path) as file:
        tensors, written = _read_any(file, partial(_is_wanted, tower=tower))
        state_dict = {name: tensor for name, tensor in _unwrap(tensors).items() if name not in ARCHIVE_SIZES}
        state_dict = all_rows(state_dict)
        _check_numbers(state_dict)
        config = _check_config(state_dict, written)
        return config, {name: tensor for name, tensor in state_dict.items() if not tensor.is_meta}


def write_checkpoint(
    path: str | os.PathLike[str],
    config: CLIPConfig,
    state_dict: Mapping[str, torch.Tensor],
    training: Mapping[str, object] | None = None,
) -> None:
    """Write a CLIP so that :func:`read_checkpoint` gives back the same configuration and, bit by bit, the same weights.

    The file appears whole or not at all; until then, what stood at `path` stays.

    Parameters
    ----------
    path : path-like
        Ends in `.safetensors`, or in `.pt` for a file that `torch.load(path, weights_only=True)` reads:
        `{"clip_config": JSON text, "state_dict": {...}}`.
    config : CLIPConfig
    state_dict : mapping of str to torch.Tensor
    training : mapping, optional
        What a training run needs to go on, of tensors and plain values; kept under "training" in a `.pt` file.

    Raises
    ------
    ValueError
        If `path` has another ending, or is to hold training state and does not end in `.pt`.
    CheckpointError
        If the file cannot be written, because the disk is full for instance.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"expected a file name ending in {' or '.join(SUFFIXES)}, got {path.name!r}")
    if training is not None and path.suffix != ".pt":
        raise ValueError(f"training state goes into a file ending in .pt, got {path.name!r}")
    text = json.dumps(dataclasses.asdict(config))
    with replacing(path) as file:
        if path.suffix == ".safetensors":
            write_safetensors(file, state_dict, {"format": "pt", CONFIG_KEY: text})
        else:
            weights = {name: tensor.detach().cpu() for name, tensor in state_dict.items()}
            extra = {} if training is None else {"training": dict(training)}
            torch.save({CONFIG_KEY: text, "state_dict": weights, **extra}, file)


# -- reading ----------------------------------------------------------------------------------------------------------


def _is_wanted(name: str, tower: str | None) -> bool:
    """Whether the numbers of an entry are needed for the tower; all are, if none is named."""
    for prefix in WRAPPERS * 2:
        name = name.removeprefix(prefix)
    return tower is None or name in ("logit_scale", ROWS) or name.startswith("visual.") == (tower == "image")


def _read_any(file: MappedFile, wanted: Callable[[str], bool]) -> tuple[dict[str, torch.Tensor], object]:
    """The tensors of a file in any form, and the text of the configuration that we wrote beside them, if any."""
    start = file.read(0, min(file.size, 64))
    if start[8:9] == b"{":  # first: the length before it can be any eight bytes
        tensors, metadata = read_safetensors(file, wanted)
        return tensors, metadata.get(CONFIG_KEY)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        tree = read_archive(file)
        return flatten(_find_model(tree), wanted), tree.get(CONFIG_KEY) if isinstance(tree, dict) else None
    raise CheckpointError(
        f"expected a TorchScript archive, a file written by torch.save, or a safetensors file; {_guess(start)}"
    )


def _guess(start: bytes) -> str:
    """What a file with this beginning is instead of a checkpoint, and what to do about it."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"<"):
        return "this is a web page, as a failed or refused download leaves it: fetch the file again"
    if text.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer to the file: fetch the file itself with `git lfs pull`"
    return f"this begins with {start[:16]!r}: fetch the file again if it was downloaded"


def _find_model(tree: object) -> object:
    """The weights in what was saved: all of it, or one entry of a training checkpoint."""
    if isinstance(tree, Instance):
        return tree
    if not isinstance(tree, dict):
        raise CheckpointError(
            f"expected a dict of weights, found a value of type {type(tree).__name__}; save model.state_dict()"
        )
    for key in MODEL_KEYS:
        if isinstance(tree.get(key), dict | Instance):
            return tree[key]
    if not any(isinstance(value, StoredTensor) for value in tree.values()):
        raise CheckpointError(
            f"expected weights by name, or a training checkpoint with them under one of {', '.join(MODEL_KEYS)}; found "
            f"{_some(tree)}"
        )
    return tree


def _unwrap(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take off the prefixes that wrapped models put before every name."""
    for prefix in WRAPPERS * 2:  # stacked in either order
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _check_config(state_dict: dict[str, torch.Tensor], text: object) -> CLIPConfig:
    """The configuration written beside the weights, which must agree with their shapes; else the one they imply."""
    try:
        seen = CLIPConfig.from_state_dict(state_dict)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if text is None:
        return seen
    try:
        written = CLIPConfig(**json.loads(text))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"its {CONFIG_KEY} is no CLIPConfig ({str(error)[:200]})") from None
    # Shapes show neither the number of heads nor the activation, and the resolution only to a multiple of the stride.
    shown = dataclasses.asdict(written)
    shown["image_resolution"] = written.image_resolution // written.stride * written.stride
    for name, value in dataclasses.asdict(seen).items():
        if name not in ("transformer_heads", "activation") and shown[name] != value:
            raise CheckpointError(
                f"its {CONFIG_KEY} says {name} {str(shown[name])[:50]}, the shapes of its weights say {value}"
            )
    return written


def _check_numbers(state_dict: dict[str, torch.Tensor]) -> None:
    """Refuse what is no weight: quantised numbers would be copied into a model as if they were the weights."""
    for name, tensor in state_dict.items():
        counter = name.endswith("num_batches_tracked")  # BatchNorm's count of steps
        if tensor.numel() == 0 or not (tensor.is_floating_point() or counter):
            raise CheckpointError(
                f"expected floating-point weights, found {name!r} of {tensor.dtype} and shape {tuple(tensor.shape)}"
            )


def _some(names: Iterable[object]) -> str:
    """The first names, for a message."""
    names = [str(name)[:50] for name in names]
    return f"{len(names)} entries ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


# -- a vocabulary that was not needed in full --------------------------------------------------------------------------


def trained_rows(state_dict: Mapping[str, torch.Tensor], seen: torch.Tensor) -> dict[str, torch.Tensor]:
    """Leave out the embeddings of tokens that were never trained; most of a small model's file would be these.

    Parameters
    ----------
    state_dict : mapping of str to torch.Tensor
    seen : torch.Tensor
        (V,), bool: which of the V token ids the training captions held.

    Returns
    -------
    dict of str to torch.Tensor
        The embedding has as many rows as tokens were seen; beside it stand their ids, and V at the end of them.
    """
    ids = torch.cat([seen.nonzero().flatten(), torch.tensor([len(seen)])]).int()
    return {**state_dict, EMBEDDING: state_dict[EMBEDDING][seen], ROWS: ids}


def all_rows(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo :func:`trained_rows`; a token that was never seen gets zeros, which leaves its position without a word."""
    if ROWS not in state_dict:
        return state_dict
    state_dict = dict(state_dict)
    ids, kept = state_dict.pop(ROWS), state_dict.get(EMBEDDING)
    if kept is None or kept.dim() != 2 or ids.dtype != torch.int32 or ids.dim() != 1 or len(ids) != len(kept) + 1:
        raise CheckpointError(f"{ROWS} must hold an id for each row of {EMBEDDING}, and the size of the vocabulary")
    *ids, size = ids.tolist()
    if not all(a < b for a, b in zip([-1, *ids], [*ids, size], strict=True)) or size * kept.shape[1] > MAX_EMBEDDING:
        raise CheckpointError(f"{ROWS} must rise, from 0 at least to a vocabulary that fits into memory")
    whole = kept.new_zeros(size, kept.shape[1])
    whole[torch.tensor(ids)] = kept
    return {**state_dict, EMBEDDING: whole}


# -- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place once it is written and on the disk, and is removed if that fails."""
    path = Path(os.path.realpath(path))  # through a link, to where the file is
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
