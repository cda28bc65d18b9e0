"""A CLIP written for other programs: OpenAI's package, transformers, open_clip.

    form           what is written                                          what it cannot say
    openai         one file: the state dict of an archive of OpenAI's       anything that shapes do not show
    huggingface    a folder: config.json, model.safetensors, ...            ResNets
    open_clip      a folder: open_clip_config.json, open_clip_model.safetensors

What a form cannot say is refused: its reader would build another model around the same weights.
"""

import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import torch

from ..config import ARCHIVE_SIZES, CLIPConfig
from .huggingface import write_huggingface
from .mapped_file import CheckpointError, naming
from .open_clip import write_open_clip

FORMS = ("openai", "huggingface", "open_clip")


def write_as(form: str, path: Path, config: CLIPConfig, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write a CLIP in the form of another program.

    Parameters
    ----------
    form : str
        One of `FORMS`, see above.
    path : Path
        Where nothing is yet. If the writing fails, something may be there: see :func:`appearing`.
    config : CLIPConfig
    state_dict : mapping of str to torch.Tensor
        As :func:`read_checkpoint` returns them, complete. In a folder all weights get one dtype, the narrowest that
        holds them: float32 for OpenAI's mixture of half and single precision.

    Raises
    ------
    ValueError
        If the form cannot say what this model is, or there is no such form.
    CheckpointError
        If it cannot be written.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    with naming(path):
        if form == "openai":
            _write_openai(path, config, state_dict)
            return
        path.mkdir()
        floats = {name: tensor for name, tensor in state_dict.items() if tensor.is_floating_point()}
        dtype = reduce(torch.promote_types, {tensor.dtype for tensor in floats.values()})
        weights = {**state_dict, **{name: tensor.to(dtype) for name, tensor in floats.items()}}
        if form == "huggingface":
            write_huggingface(path, config, weights)
        else:
            write_open_clip(path, config, weights)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A path beside `path` for a file or a folder, which gets its name once the block is through, or is removed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        with naming(path):
            if path.exists():
                raise CheckpointError("is there already; name another place")
            temporary.rename(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def _write_openai(path: Path, config: CLIPConfig, state_dict: Mapping[str, torch.Tensor]) -> None:
    """The state dict of an archive of OpenAI's, whose reader knows nothing but shapes."""
    implied = vars(CLIPConfig.from_state_dict(state_dict)) | {"vision_mlp_width": None, "transformer_mlp_width": None}
    implied = CLIPConfig(**implied)
    differing = [name for name, value in vars(config).items() if getattr(implied, name) != value]
    if differing:
        said = ", ".join(f"{name} {getattr(config, name)!r}, not {getattr(implied, name)!r}" for name in differing)
        raise ValueError(f"OpenAI's form cannot say that this model has {said}; write it for huggingface or open_clip")
    sizes = (config.image_resolution, config.context_length, config.vocab_size)
    scalars = {name: torch.tensor(size) for name, size in zip(ARCHIVE_SIZES, sizes, strict=True)}
    with path.open("xb") as file:
        torch.save({**{name: tensor.contiguous() for name, tensor in state_dict.items()}, **scalars}, file)
