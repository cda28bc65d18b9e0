"""The `clip` command: puts the commands together, and turns what they raise into a sentence and an exit code.

Answers go to standard output, progress and complaints to standard error. The exit code is 0 if all went well, 1 if
something is wrong with the input (a picture that cannot be read, a check that failed), 2 if the command could not do
its work, 130 after Ctrl-C.
"""

import argparse
import os
import sys

from .. import __version__
from .classify import add_classify_command
from .command import CommandError
from .draw import add_draw_command
from .train import add_train_command
from .verify import add_verify_command

EPILOG = """\
examples, with the model that comes along and needs no connection:
  clip draw -o drawings --held-out                                       pictures to try things on
  clip classify drawings/00000.png --labels "a fish" "a tree" --model tiny
  clip train drawn --model tiny --minutes 10 --out runs/first            learn from scratch
and with OpenAI's, downloaded once:
  clip classify photo.jpg --labels "a dog" "a cat"

clip COMMAND --help tells more."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command with the given arguments (those of the process, if None) and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stop:
        if str(stop):
            print(f"clip {options.command}: {stop}", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        print(f"clip {options.command}: {_sentence(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clip",
        description="OpenAI's CLIP: pictures and words in one space.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"clip-from-scratch {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for add in (add_classify_command, add_draw_command, add_train_command, add_verify_command):
        add(commands)
    return parser


def _sentence(error: Exception) -> str:
    """What went wrong, for a person: what the library says of wrong input, or that this is not about the input."""
    if isinstance(error, CommandError | RuntimeError | ValueError | OSError | ImportError) and str(error):
        return str(error)
    return f"unexpected {type(error).__name__}: {error}; --debug shows where it comes from"
