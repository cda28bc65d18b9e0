"""What all commands share: their options, their model, their errors."""

import argparse

from ..clip import available_models, load
from ..model import CLIP
from ..preprocess import Preprocess


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
    parser.add_argument(name, metavar="MODEL", default=default, help=f"a checkpoint's path, or one of {choices}{shown}")
    parser.add_argument("--device", metavar="DEVICE", help='"cpu", "cuda", "cuda:1", "mps" or "auto"')


def load_model(options: argparse.Namespace, local_files_only: bool = False) -> tuple[CLIP, Preprocess]:
    """The model of the command line."""
    return load(options.model, options.device, local_files_only=local_files_only)


def count(text: str) -> int:
    """A positive number, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)
