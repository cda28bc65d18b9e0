"""`clip verify`: is this the real thing? Compares a loaded model with figures that others published about it.

Sources: the parameter counts of the nine released models and the token ids are printed in OpenAI's notebooks and in
open_clip's model profile; the cosines are read off the figure of OpenAI's notebook "Interacting with CLIP" (ViT-B/32 on
photographs that ship with scikit-image, each text prefixed "This is "). Its camera column is left out: scikit-image has
replaced that picture since.
"""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from ..checkpoints.released import MODELS, DownloadError, sha256_of
from ..clip import EMBEDDED, find_checkpoint, tokenize
from ..config import RELEASED
from ..model import CLIP, config_of
from ..preprocess import Preprocess, open_image
from .command import CommandError, add_command, add_model_options, load_model

PARAMETERS = {
    "RN50": 102_007_137,
    "RN101": 119_688_033,
    "RN50x4": 178_300_601,
    "RN50x16": 290_979_217,
    "RN50x64": 623_258_305,
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
    "ViT-L/14@336px": 427_944_193,
}
TOKENS = {
    "Hello World!": [49406, 3306, 1002, 256, 49407],
    "a diagram": [49406, 320, 22697, 49407],
    "a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407],
}
# Rows are texts, columns pictures, ViT-B/32, two digits as printed
PICTURES = (
    "page.png",
    "astronaut.png",
    "rocket.jpg",
    "chelsea.png",
    "horse.png",
    "coffee.png",
    "motorcycle_right.png",
)
COSINES = {
    "a page of text about segmentation": (0.35, 0.15, 0.16, 0.20, 0.20, 0.20, 0.16),
    "a portrait of an astronaut with the American flag": (0.13, 0.28, 0.22, 0.17, 0.16, 0.15, 0.15),
    "a rocket standing on a launchpad": (0.17, 0.19, 0.30, 0.18, 0.17, 0.14, 0.16),
    "a facial photo of a tabby cat": (0.12, 0.12, 0.12, 0.31, 0.15, 0.17, 0.12),
    "a black-and-white silhouette of a horse": (0.17, 0.11, 0.15, 0.15, 0.35, 0.15, 0.17),
    "a cup of coffee on a saucer": (0.14, 0.15, 0.12, 0.18, 0.15, 0.29, 0.12),
    "a person looking at a camera on a tripod": (0.19, 0.19, 0.21, 0.21, 0.20, 0.14, 0.16),
    "a red motorcycle standing in a garage": (0.14, 0.15, 0.16, 0.15, 0.16, 0.13, 0.32),
}
TOLERANCE = 0.01  # 0.005 for the rounding of the print, the rest for the half precision it was computed in


def add_verify_command(commands: argparse._SubParsersAction) -> None:
    """Add `verify` to the commands of `clip`."""
    parser = add_command(
        commands,
        "verify",
        help="compare a model with the figures published about it",
        description="Compare a released model with published figures: its size, token ids and, for ViT-B/32, the "
        "cosines\nprinted in OpenAI's notebook for seven pictures of scikit-image.",
        epilog="examples:\n  clip verify ViT-B/32 --download\n  clip verify RN50 --device cuda",
    )
    parser.set_defaults(run=_verify)
    parser.add_argument("--download", action="store_true", help="fetch the released file if it is not here yet")
    add_model_options(parser, "model")


def _verify(options: argparse.Namespace) -> int:
    if options.model in EMBEDDED:
        raise CommandError(f"nothing was published about {options.model}, which is ours; see docs/model_card.md")
    try:
        model, preprocess = load_model(options, local_files_only=not options.download)
    except DownloadError as error:
        if options.download:
            raise
        raise CommandError(f"{error}\nOr fetch it now: clip verify {options.model} --download") from error
    file = find_checkpoint(options.model, local_files_only=True)
    failed = 0
    for check in verify(model, preprocess, file):
        failed += not check.passed
        print(json.dumps(asdict(check)) if options.json else _as_text(check))
    if not options.json:
        print(f"{failed} checks failed" if failed else "all checks passed")
    return 1 if failed else 0


@dataclass(frozen=True)
class Check:
    """One published figure beside the one measured here."""

    what: str
    expected: str
    measured: str
    passed: bool


def _as_text(check: Check) -> str:
    """Three lines: what was compared, what was published, what is here."""
    result = "pass" if check.passed else "FAIL"
    return f"{result}  {check.what}\n        expected  {check.expected}\n        measured  {check.measured}"


def verify(model: CLIP, preprocess: Preprocess, file: str | os.PathLike) -> Iterator[Check]:
    """Compare a model with everything published about the released model of its sizes.

    Parameters
    ----------
    model : CLIP
        In evaluation mode.
    preprocess : Preprocess
        As `clip.load` returned it.
    file : path
        Where the model came from; a folder is never the released file.

    Yields
    ------
    Check
        Sizes, parameters, token ids; of the weights 56 cosines for ViT-B/32, the sha256 of the file for the others.

    Raises
    ------
    ImportError
        If the cosines are to be compared and scikit-image, whose pictures are needed, is not installed.
    """
    config = config_of(model)
    names = [name for name, released in RELEASED.items() if released == config]
    yield Check("architecture", "one of the nine", names[0] if names else "none of them", bool(names))
    if not names:
        return

    expected = PARAMETERS[names[0]]
    count = sum(parameter.numel() for parameter in model.parameters())
    yield Check("parameters", f"{expected:,}", f"{count:,}", count == expected)

    for text, ids in TOKENS.items():
        got = tokenize(text)[0, : len(ids)].tolist()
        yield Check(f"tokens of {text!r}", " ".join(map(str, ids)), " ".join(map(str, got)), got == ids)

    if names[0] == "ViT-B/32":
        yield from _verify_cosines(model, preprocess)
    else:
        *_, digest, _ = MODELS[names[0]].split("/")
        found = sha256_of(Path(file)).hexdigest() if Path(file).is_file() else "none, as this is a folder"
        yield Check("sha256 of the file", digest, found, found == digest)


def _verify_cosines(model: CLIP, preprocess: Preprocess) -> Iterator[Check]:
    """The notebook's table, one check a text."""
    measured = cosine_table(model, preprocess, [f"This is {text}" for text in COSINES])
    for (text, expected), row in zip(COSINES.items(), measured.tolist(), strict=True):
        passed = all(abs(want - got) <= TOLERANCE for want, got in zip(expected, row, strict=True))
        yield Check(f"cosines of {text!r}", _digits(expected), _digits(row), passed)


@torch.no_grad()
def cosine_table(model: CLIP, preprocess: Preprocess, texts: list[str]) -> torch.Tensor:
    """Cosines (texts, 7) of each text with each of scikit-image's seven `PICTURES`."""
    try:
        import skimage
    except ImportError as error:
        raise ImportError("the published cosines are of scikit-image's pictures: pip install scikit-image") from error
    folder = Path(skimage.__file__).parent / "data"
    device = model.logit_scale.device
    # The notebook converts to RGB first; `preprocess` alone would do it last.
    pictures = [open_image(folder / name).convert("RGB") for name in PICTURES]
    images = torch.stack([preprocess(picture) for picture in pictures]).to(device)
    image_features = F.normalize(model.encode_image(images).float(), dim=-1)
    text_features = F.normalize(model.encode_text(tokenize(texts).to(device)).float(), dim=-1)
    return text_features @ image_features.T


def _digits(row: tuple[float, ...] | list[float]) -> str:
    """Cosines as the notebook prints them: two digits."""
    return " ".join(f"{value:5.2f}" for value in row)
