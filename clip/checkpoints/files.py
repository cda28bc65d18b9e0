"""A checkpoint to a configuration and a state dict, and back.

    TorchScript archive ─┐                    ┌─ names: "module." and the like taken off, Hugging Face's and
    torch.save, zip     ─┤  archive.py        │  open_clip's turned into OpenAI's (huggingface.py, open_clip.py)
    torch.save, legacy  ─┘     │              │
                               ├── tensors ───┴─ CLIPConfig: what shapes show, and what the file or the JSON beside it
    safetensors         ── safetensors.py        says; of what nobody says, OpenAI's way is taken with a warning

A file is recognised by what it holds, never by its name. Of a folder that is one of Hugging Face's or of open_clip's,
the weights are found by the names that these give them. Whether every weight of the model is there, and of the right
shape, is for the model to say (:func:`clip.model.build_model`); here it must only be some CLIP.
"""

import dataclasses
import json
import os
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch

from ..config import ARCHIVE_SIZES, UNSEEN, CLIPConfig, sizes_shown, tower_alone
from . import huggingface, open_clip
from .archive import StoredTensor, flatten, read_archive
from .families import refuse_other_families
from .mapped_file import CheckpointError, MappedFile, map_file, naming
from .restricted_pickle import Instance
from .safetensors import read_safetensors, write_safetensors

CONFIG_KEY = "clip_config"  # beside the weights in the files we write: the CLIPConfig as JSON
MODEL_KEYS = ("state_dict", "model_state_dict", "model")  # where training programs put the weights
WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
INDEX = ".index.json"  # of weights in several files
FOLDER_WEIGHTS = (
    *open_clip.WEIGHTS,
    *(name for file in ("model.safetensors", "pytorch_model.bin") for name in (file, file + INDEX)),
)
MAX_JSON = 4 << 20  # bytes
OPENAIS = {name: getattr(CLIPConfig, name, None) for name in UNSEEN}  # None: a head for every 64 channels
PREPROCESSING = {name: value for name, value in OPENAIS.items() if name.startswith("image_")}
SUFFIXES = (".safetensors", ".pt")
MAX_EMBEDDING = 1 << 28  # numbers in an embedding with all its rows; the largest CLIP has 2^26
EMBEDDING, ROWS = "token_embedding.weight", "token_embedding.rows"


def read_checkpoint(
    path: str | os.PathLike[str], tower: str | None = None, known: Mapping[str, object] | None = None
) -> tuple[CLIPConfig | dict[str, object], dict[str, torch.Tensor]]:
    """Read a CLIP, or one tower of it, from a file or a folder in any of the forms it is passed around in.

    Parameters
    ----------
    path : path-like
        A TorchScript archive of OpenAI's, a state dict or training checkpoint written by `torch.save`, a safetensors
        file, or what :func:`write_checkpoint` wrote; a folder of Hugging Face's or open_clip's, or the weights in it.
        Nothing in it is executed.
    tower : str, optional
        "image" or "text": return the entries of this tower only, with `logit_scale`. Of the others only the shapes are
        looked at.
    known : mapping, optional
        What the caller knows better than the file, by the names of :class:`CLIPConfig`; only what shapes do not show.

    Returns
    -------
    CLIPConfig
        As written beside the weights; or read from their shapes, and for the rest as OpenAI's models are, with a
        warning unless it is one of OpenAI's files. Of a :class:`clip.DualEncoder` the dict that describes its towers.
    dict of str to torch.Tensor
        The weights under OpenAI's names, in the dtypes of the file. They are views of the mapped file, read when
        touched: copy or clone them soon, and drop each when copied (see :mod:`clip.checkpoints.mapped_file`).

    Raises
    ------
    CheckpointError
        If there is no such file, or it is damaged, asks for code to be run, or is no CLIP.
    ValueError
        If `known` names something else, or there is no such activation, number of heads or preprocessing.
    """
    known = dict(known or {})
    if not known.keys() <= set(UNSEEN):
        raise ValueError(f"expected to be told some of {', '.join(UNSEEN)}, got {', '.join(map(str, known))}")
    path = Path(path)
    contents, folder = _read_files(path, partial(_is_wanted, tower=tower))
    towers = _read_towers(contents.written)
    if towers is not None:
        return towers, {name: tensor for name, tensor in contents.tensors.items() if not tensor.is_meta}
    with naming(path):
        state_dict, said, alone = _understand(contents, folder)
        _check_numbers(state_dict)
        if alone not in (None, tower):
            raise CheckpointError(
                f'it holds the {alone} tower only: load it with tower="{alone}", or the file of a whole model'
            )
        config = _settle(_sizes(state_dict, alone), said, known)
    scale = state_dict.get("logit_scale")
    if scale is not None and scale.shape == (1,):
        state_dict["logit_scale"] = scale[0]
    unsaid = [name for name in UNSEEN if name not in said | known and _concerns(name, tower)]
    if unsaid:
        warnings.warn(_doubt(path, config, unsaid), stacklevel=3)
    return config, {name: tensor for name, tensor in state_dict.items() if not tensor.is_meta}


def write_checkpoint(
    path: str | os.PathLike[str],
    config: CLIPConfig | Mapping[str, object],
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
    config : CLIPConfig or mapping
        The latter describes the towers of a :class:`clip.DualEncoder`, under "image_tower" and the like.
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
    text = json.dumps(dataclasses.asdict(config) if isinstance(config, CLIPConfig) else dict(config))
    with replacing(path) as file:
        if path.suffix == ".safetensors":
            write_safetensors(file, state_dict, {"format": "pt", CONFIG_KEY: text})
        else:
            weights = {name: tensor.detach().cpu() for name, tensor in state_dict.items()}
            extra = {} if training is None else {"training": dict(training)}
            torch.save({CONFIG_KEY: text, "state_dict": weights, **extra}, file)


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Contents:
    """What one or several files hold: tensors by name, the configuration that we wrote beside them, whose they are."""

    tensors: dict[str, torch.Tensor]
    written: object = None
    is_archive: bool = False  # TorchScript, OpenAI's form


def _is_wanted(name: str, tower: str | None) -> bool:
    """Whether the numbers of an entry are needed for the tower; all are, if none is named or nothing is known."""
    for prefix in WRAPPERS * 2:
        name = name.removeprefix(prefix)
    if tower is None or name in ("logit_scale", ROWS) or name.startswith(huggingface.BARE):
        return True
    return (huggingface.tower_of(name) or ("image" if name.startswith("visual.") else "text")) == tower


def _read_files(path: Path, wanted: Callable[[str], bool]) -> tuple[_Contents, Path]:
    """What a file, or the weights in a folder, hold; and the folder, in which more may stand about them."""
    if not path.is_dir():
        with map_file(path) as file:
            return _read_any(file, wanted), path.parent
    name = next((name for name in FOLDER_WEIGHTS if (path / name).exists()), None)
    if name is None:
        raise CheckpointError(
            f"{path}: expected a checkpoint file, found a folder without {', '.join(FOLDER_WEIGHTS)}; "
            "name the file inside it"
        )
    if name.endswith(INDEX):
        return _read_shards(path, name, wanted), path
    with map_file(path / name) as file:
        return _read_any(file, wanted), path


def _read_shards(folder: Path, index: str, wanted: Callable[[str], bool]) -> _Contents:
    """The tensors of several files, of which an index tells which holds what."""
    shard_of = _read_json(folder / index).get("weight_map")
    with naming(folder / index):
        if not isinstance(shard_of, dict) or not all(type(shard) is str for shard in shard_of.values()):
            raise CheckpointError("expected the names of files by the names of tensors, as weight_map")
        shards = sorted(set(shard_of.values()))
        strange = [shard for shard in shards if Path(shard).name != shard or shard == ".." or "\\" in shard]
        if strange:
            raise CheckpointError(f"names a file outside the folder, {strange[0][:100]!r}")
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        with map_file(folder / shard) as file:
            found = _read_any(file, wanted).tensors
            if found.keys() != {name for name in shard_of if shard_of[name] == shard}:
                raise CheckpointError(f"does not hold the tensors that {index} says it holds; the folder is incomplete")
            tensors |= found
    return _Contents(tensors)


def _read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file."""
    with map_file(path) as file:
        if file.size > MAX_JSON:
            raise CheckpointError(f"{file.size} bytes, far more than a model's sizes need")
        try:
            value = json.loads(file.read(0, file.size))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"is no JSON text ({str(error)[:100]})") from None
        if type(value) is not dict:
            raise CheckpointError(f"expected a JSON object, found a {type(value).__name__}")
        return value


def _read_any(file: MappedFile, wanted: Callable[[str], bool]) -> _Contents:
    """What a file in any form holds."""
    start = file.read(0, min(file.size, 64))
    if start[8:9] == b"{":  # first: the length before it can be any eight bytes
        tensors, metadata = read_safetensors(file, wanted)
        return _Contents(tensors, metadata.get(CONFIG_KEY))
    if start[:2] == b"PK" or start[:1] == b"\x80":
        tree = read_archive(file)
        model = _find_model(tree)
        written = tree.get(CONFIG_KEY) if isinstance(tree, dict) else None
        return _Contents(flatten(model, wanted), written, isinstance(model, Instance))
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


def _read_towers(text: object) -> dict[str, object] | None:
    """The description of a dual encoder's towers, if that is what was written beside the weights."""
    try:
        written = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return written if isinstance(written, dict) and "image_tower" in written else None


def _understand(contents: _Contents, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, object], str | None]:
    """The weights under OpenAI's names; what somebody wrote down of their configuration; the tower, if of one alone."""
    tensors = _unwrap(contents.tensors)
    state_dict = all_rows({name: tensor for name, tensor in tensors.items() if name not in ARCHIVE_SIZES})
    if contents.written is not None:
        try:
            return state_dict, vars(CLIPConfig(**json.loads(contents.written))), tower_alone(state_dict)
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"its {CONFIG_KEY} is no CLIPConfig ({str(error)[:200]})") from None
    refuse_other_families(tensors)
    if huggingface.is_huggingface(tensors):
        if not (folder / huggingface.CONFIG).exists():
            raise CheckpointError(
                f"its names are Hugging Face's, but {huggingface.CONFIG}, with heads and activation, is missing"
            )
        state_dict = huggingface.from_huggingface(tensors)
        alone = tower_alone(state_dict)
        return state_dict, huggingface.fields_of(*_read_huggingface(folder), alone), alone
    state_dict = open_clip.from_open_clip(state_dict)
    if contents.is_archive or all(name in tensors for name in ARCHIVE_SIZES):
        return state_dict, OPENAIS, None
    if (folder / open_clip.CONFIG).exists():
        return state_dict, open_clip.fields_of(_read_json(folder / open_clip.CONFIG)), None
    return state_dict, open_clip.published_heads(_sizes(state_dict)) | PREPROCESSING, None


def _read_huggingface(folder: Path) -> tuple[dict[str, object], dict[str, object]]:
    """What config.json says, and what is said of preprocessing, for which there are an older and a newer place."""
    config = _read_json(folder / huggingface.CONFIG)
    for name in huggingface.PREPROCESSORS:
        if (folder / name).exists():
            found = _read_json(folder / name)
            inner = found.get("image_processor", found)
            return config, inner if isinstance(inner, dict) else {}
    return config, {}


def _sizes(state_dict: dict[str, torch.Tensor], tower: str | None = None) -> dict[str, object]:
    """What the shapes show, of both towers or of the one that is there."""
    try:
        return sizes_shown(state_dict, tower)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _settle(shown: dict[str, object], said: dict[str, object], known: dict[str, object]) -> CLIPConfig:
    """The configuration: what the caller knows goes before what the file says, and that must agree with the shapes."""
    try:
        config = CLIPConfig(**{"transformer_heads": None} | shown | said | known)
    except (TypeError, ValueError) as error:
        if known:
            raise ValueError(str(error)) from None
        raise CheckpointError(f"its configuration makes no sense ({str(error)[:200]})") from None
    claimed = vars(config) | {"image_resolution": config.image_resolution // config.stride * config.stride}
    for name, value in shown.items():
        if claimed[name] != value:
            raise CheckpointError(
                f"its configuration says {name} {str(claimed[name])[:50]}, the shapes of its weights say {value}"
            )
    return config


def _concerns(name: str, tower: str | None) -> bool:
    """Whether a field of a configuration matters to somebody who reads this tower only."""
    of = {"vision": "image", "image": "image", "transformer": "text"}.get(name.split("_")[0])
    return None in (tower, of) or tower == of


def _doubt(path: Path, config: CLIPConfig, unsaid: list[str]) -> str:
    """What nobody said about a model, what was taken instead, and how to say it."""
    taken = {name: getattr(config, name) for name in unsaid}
    hint = " (the models of LAION, DataComp and CommonPool have 'gelu')" if "activation" in unsaid else ""
    return (
        f"{path} does not say its model's {', '.join(unsaid)}, nor do its shapes. OpenAI's way was taken; if the model "
        f"was trained another way{hint}, its numbers will be wrong. Say which it is: clip.load(..., config={taken}), "
        "or once for all with `clip convert --set`"
    )


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
