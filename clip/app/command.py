"""What all commands share: their options, their model, their errors."""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from ..clip import available_models, load
from ..model import CLIP
from ..optimize import optimized_copy
from ..preprocess import Preprocess
from ..tasks.encode import Rows

PICTURE_ENDINGS = (".jpeg", ".jpg", ".pdf", ".png", ".tif", ".tiff", ".webp")  # that Pillow and matplotlib both write
UNPRINTABLE = (*range(0x20), *range(0x7F, 0xA0), *range(0xDC80, 0xDD00))  # the last: bytes of a name that is no UTF-8
ESCAPES = {code: repr(chr(code))[1:-1] for code in UNPRINTABLE}


class CommandError(Exception):
    """Something that the user can mend; its text is all that is shown."""


def add_command(commands: argparse._SubParsersAction, name: str, **text: str) -> argparse.ArgumentParser:
    """A command with what every command has; `text` is its help, description and epilog."""
    parser = commands.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter, **text)
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line, instead of text for people")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def add_model_options(parser: argparse.ArgumentParser, name: str, default: str | None = None) -> None:
    """The model, by name or path, and where it runs."""
    choices = ", ".join(available_models())
    shown = f" (default: {default})" if default else ""
    text = f"a checkpoint's path, hf-hub:OWNER/NAME, or one of {choices}{shown}"
    parser.add_argument(name, metavar="MODEL", default=default, help=text)
    parser.add_argument("--device", metavar="DEVICE", help='"cpu", "cuda", "cuda:1", "mps" or "auto"')


def add_draft_option(parser: argparse.ArgumentParser) -> None:
    """Reading large photographs in less time, for a price."""
    parser.add_argument(
        "--draft", action="store_true", help="decode large JPEGs at a smaller size: faster, and nearly the same vectors"
    )


def draft_side(options: argparse.Namespace, model: CLIP) -> int | None:
    """What the shorter side of a JPEG must keep with --draft: twice what the model reads."""
    return 2 * model.visual.input_resolution if options.draft else None


def load_model(
    options: argparse.Namespace,
    *,
    tower: str | None = None,
    image_size: int | None = None,
    local_files_only: bool = False,
    optimized: bool = False,
) -> tuple[CLIP, Preprocess]:
    """The model of the command line; `optimized` if there is much to encode and the CPU has to do it."""
    model, preprocess = load(
        options.model, options.device, tower=tower, image_size=image_size, local_files_only=local_files_only
    )
    return optimized_copy(model) if optimized and model.logit_scale.device.type == "cpu" else model, preprocess


def complaining(command: str, batches: Iterable[Rows]) -> Iterator[Rows]:
    """The same batches, with a line on standard error for each picture that could not be read."""
    for rows in batches:
        for error in rows.errors.values():
            tqdm.write(printable(f"clip {command}: {error}"), file=sys.stderr)
        yield rows


def printable(text: str) -> str:
    """A text, with the characters escaped that would move the cursor or are no text, as file names may hold them."""
    return text.translate(ESCAPES)


def count(text: str) -> int:
    """A positive number, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


def require_matplotlib(what: str, extra: str) -> None:
    """Raise an ImportError if matplotlib is not installed: before there is something to draw rather than after."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{what} needs matplotlib: pip install clip-from-scratch[{extra}]") from error


def picture_to_write(text: str) -> str:
    """The path of a picture that will be written, for argparse: what is wrong with it is said before the work."""
    folder, ending = os.path.dirname(text) or ".", os.path.splitext(text)[1].lower()
    if ending not in PICTURE_ENDINGS:
        raise argparse.ArgumentTypeError(f"expected a name ending in {', '.join(PICTURE_ENDINGS)}, got {text!r}")
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {folder!r} to write it in")
    return text
