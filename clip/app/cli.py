"""The `clip` command: puts the commands together, and turns what they raise into a sentence and an exit code.

Answers go to standard output, progress and complaints to standard error. The exit code is 0 if all went well, 1 if
something is wrong with the input (a picture that cannot be read, a check that failed), 2 if the command could not do
its work, 130 after Ctrl-C, 141 if the reader of its answers (`head`, say) went away.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Iterator

from .. import __version__
from .classify import add_classify_command
from .command import CommandError
from .convert import add_convert_command
from .doctor import add_doctor_command
from .draw import add_draw_command
from .embed import add_embed_command
from .evaluate import add_evaluate_command
from .explain import add_explain_command
from .index import add_index_command
from .search import add_search_command
from .train import add_train_command
from .verify import add_verify_command

EPILOG = """\
examples, with the model that comes along and needs no connection:
  clip draw --held-out -o drawings                                            pictures to try things on
  clip classify drawings/00000.png --labels "a red fish" "a tree" --model tiny
  clip index drawings -o drawings.clipindex --model tiny                      once, then as often as you like:
  clip search "four purple trees" --index drawings.clipindex
  clip explain drawings/00000.png --text "a red fish" -o heat.png --model tiny
  clip train drawn --model tiny --minutes 10 --out runs/first                 learn from scratch
and with OpenAI's, downloaded once:
  clip classify photo.jpg --labels "a dog" "a cat"

clip COMMAND --help tells more."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command with the given arguments (those of the process, if None) and return its exit code."""
    if hasattr(sys.stdout, "reconfigure"):  # not where a notebook has replaced it
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it: any file name can be printed
    try:
        code = _run(_parser().parse_args(arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return 141


def _run(options: argparse.Namespace) -> int:
    """Do what the command says, and say in a sentence why if that fails."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"clip {options.command}: {message}", file=sys.stderr)
            return options.run(options)
    except BrokenPipeError:
        raise
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
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh", "fish", "tcsh"),
        help="print the rules by which the shell completes this command, and exit",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for add in (
        add_classify_command,
        add_convert_command,
        add_doctor_command,
        add_draw_command,
        add_embed_command,
        add_evaluate_command,
        add_explain_command,
        add_index_command,
        add_search_command,
        add_train_command,
        add_verify_command,
    ):
        add(commands)
    return parser


class _PrintCompletion(argparse.Action):
    """Print a shell's rules for completing the command, made by shtab, and exit."""

    def __call__(self, parser, namespace, shell, option_string=None):
        try:
            import shtab
        except ImportError:
            parser.exit(2, f"clip: {option_string} needs shtab: pip install clip-from-scratch[completion]\n")
        for action in _values(parser):
            action.complete = shtab.FILE
        print(shtab.complete(parser, shell), flush=True)
        parser.exit()


def _values(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments, of all commands, that take something which cannot be listed: often a file."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _values(command)
        elif action.nargs != 0 and not action.choices:
            yield action


def _sentence(error: Exception) -> str:
    """What went wrong, for a person: what the library says of wrong input, or that this is not about the input."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, CommandError | RuntimeError | ValueError | OSError | ImportError) and str(error):
        return str(error)
    return f"unexpected {type(error).__name__}: {error}; --debug shows where it comes from"
